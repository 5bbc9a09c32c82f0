"""ernie_meanfield.py: transport against the exact one, gradients against finite differences, losses by hand, runs."""

import dataclasses
import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import (
    alike,
    call,
    check_rollouts_in_a_cuda_graph,
    check_updates_in_a_cuda_graph,
    fourth_order,
    learner,
    on,
    plain,
    rotated,
    without_speed,
)
from scipy.optimize import linear_sum_assignment

import ernie_meanfield as script
from envs import perturb, robustness, runs
from ernie_meanfield import PARTS, Args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = dict(num_agents=3, num_envs=2, batch_size=8, hidden_size=8, learning_starts=50, buffer_size=150)
SMALL |= dict(reg_batch_size=4, transport_steps=10, eval_episodes=2, eval_agents=(3,))
SMALL |= dict(total_timesteps=200, log_interval=100, checkpoint_interval=100)  # four iterations, three updates
ROLES = ("critic", "actor")


def close(a, b, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def random(*shape, seed=0, dtype=None):
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype or torch.get_default_dtype()).to(DEVICE)


def world(**options):
    """(args, env, nets, batch with noise): two seeds of four agents with random networks far from linear, whose
    targets are others, and an episode of random play; float64, drawn on a CPU, so that it is the same everywhere."""
    torch.set_default_dtype(torch.float64)
    small = dict(num_seeds=2, num_agents=4, hidden_size=6, activation="tanh", num_envs=3, batch_size=7)
    args = Args(**(SMALL | small | dict(reg_batch_size=5, transport_steps=60) | options))
    cpu, env = (
        script.envs.make(args.env_id, args.num_seeds * args.num_envs, d, torch.float64, num_agents=args.num_agents)
        for d in ("cpu", DEVICE)
    )
    nets, _ = script.make_nets(cpu, args)
    for k, net in enumerate(nets.values()):
        net.flat.detach().mul_(1.5).add_(0.2 * random(*net.flat.shape, seed=k).cpu())
    streams = script.envs.make_generators(3, args.num_seeds, "test", torch.device("cpu"))
    episodes = script.rollout(cpu.step, cpu, nets, args, script.draw_rollout(cpu, 0.8, streams))
    batch = script.sample(episodes, args.num_envs, args, streams) | script.draw_noise(streams, cpu, args)
    return args, env, on(DEVICE, nets), on(DEVICE, batch)


def first(batch, rows=5):
    """The samples of the regulariser."""
    return {name: value[:, :rows] for name, value in batch.items()}


def act_on(nets, obs, env, args):
    """Outputs of the trained policy [S, B, N, A] at observations [S, B, N, O]."""
    return script.trained_policy(nets, env, args).output(obs.transpose(1, 2)).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------- optimal transport


def exact_w(moved, crowd):
    """W1 of crowds [..., N, 2] by the best assignment, float64."""
    cost = torch.cdist(moved.double(), crowd.double(), compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
    found = [c[linear_sum_assignment(c)].mean() for c in cost.reshape(-1, *cost.shape[-2:])]
    return torch.tensor(np.array(found).reshape(cost.shape[:-2]), device=DEVICE)


def clouds(kind, n, count=30):
    """Pairs of crowds [count, n, 2] in float64."""
    random64 = partial(random, dtype=torch.float64)
    x, other = (2 * torch.special.ndtr(random64(count, n, 2, seed=k)) - 1 for k in (1, 2))
    if isinstance(kind, float):
        return x + kind * random64(count, n, 2, seed=3), x
    if kind == "from one place":
        return other, x[:, :1].expand_as(x)
    if kind == "to one place":
        return other[:, :1].expand_as(x), x
    if kind == "from a line":
        return other, x * torch.tensor([1.0, 0.0], device=DEVICE)
    if kind == "on a line":
        return other * torch.tensor([1.0, 0.0], device=DEVICE), x * torch.tensor([1.0, 0.0], device=DEVICE)
    if kind == "duplicated":
        return other[:, torch.arange(n) // 2], x[:, torch.arange(n) // 2]
    return {"unrelated": other, "shuffled": x.flip(1), "far": other + 50}[kind], x


CLOUDS = [0.02, 0.1, 0.3, "unrelated", "shuffled", "far", "from one place", "to one place", "duplicated"]
CLOUDS += ["from a line", "on a line"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 6, 15, 30])
@pytest.mark.parametrize("kind", CLOUDS)
def test_transport_is_the_exact_one(kind, n, dtype):
    moved, crowd = clouds(kind, n)
    args = Args(transport_steps=500) if "line" in str(kind) else Args()  # many plans are best or nearly so
    found = script.wasserstein(moved.to(dtype), crowd.to(dtype), args)
    exact = exact_w(moved, crowd)
    assert found.dtype == dtype and found.shape == (30,)
    assert ((found.double() - exact).abs() <= 0.01 * exact + 1.001e-6).all()  # distances are at least 1e-6
    if isinstance(kind, float):  # W is at most the mean length of the moves
        assert (found <= (moved - crowd).norm(dim=-1).mean(-1) * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_transport_of_a_crowd_to_itself_is_free(size, dtype):
    for kind, n in itertools.product(("unrelated", "to one place", "on a line", "duplicated"), (3, 15)):
        crowd = (size * clouds(kind, n)[0]).to(dtype)
        assert (script.wasserstein(crowd, crowd, Args()) <= 1e-6 * (1 + 1e-5)).all()
    moved, crowd = clouds("unrelated", 6)  # no unit of length
    found = script.wasserstein((size * moved).to(dtype), (size * crowd).to(dtype), Args())
    assert ((found.double() / (size * exact_w(moved, crowd)) - 1).abs() < 0.01).all()


def test_distances_and_their_gradient_at_zero():
    moved, crowd = random(2, 3, 4, 2).requires_grad_(), random(2, 3, 4, 2, seed=1)
    found = script.distances(moved, crowd)
    for i, j in itertools.product(range(4), range(4)):
        close(found[..., i, j], (moved[..., i, :] - crowd[..., j, :]).norm(dim=-1), 1e-5, 1e-7)
    same = crowd.clone().requires_grad_()
    (grad,) = torch.autograd.grad(script.distances(same, crowd).diagonal(dim1=-2, dim2=-1).sum(), same)
    assert (grad == 0).all()


@pytest.mark.parametrize("kind", [0.1, "unrelated", "duplicated", "from one place", "from a line"])
def test_plan_carries_equal_masses(kind):
    moved, crowd = clouds(kind, 6)
    plan = script.transport_plan(script.distances(moved, crowd), Args())
    sixth = torch.full_like(plan[..., 0], 1 / 6)
    assert (plan >= 0).all()
    close(plan.sum(-2), sixth, 1e-6)
    close(plan.sum(-1), sixth, 1e-2)


def test_transport_costs_at_most_what_staying_does():
    """However bad the plan is."""
    for kind, n in itertools.product((0.02, 0.3, "unrelated"), (3, 15)):
        moved, crowd = clouds(kind, n)
        found = script.wasserstein(moved, crowd, Args(transport_steps=1, transport_beta=5.0))
        assert (found <= (moved - crowd).norm(dim=-1).mean(-1) * (1 + 1e-9)).all()


@pytest.mark.parametrize("n", [3, 6])
@pytest.mark.parametrize("kind", [0.1, 0.3, "unrelated"])
def test_gradient_of_transport_is_that_of_the_exact_one(kind, n):
    torch.set_default_dtype(torch.float64)
    moved, crowd = clouds(kind, n, 20)
    direction, leaf = random(*moved.shape), moved.clone().requires_grad_()
    (grad,) = torch.autograd.grad(script.wasserstein(leaf, crowd, Args(transport_steps=500)).sum(), leaf)
    close((grad * direction).sum((1, 2)), fourth_order(lambda h: exact_w(moved + h * direction, crowd), 1e-6), 1e-5)
    other = crowd.clone().requires_grad_()
    (grad,) = torch.autograd.grad(script.wasserstein(moved, other, Args(transport_steps=500)).sum(), other)
    close((grad * direction).sum((1, 2)), fourth_order(lambda h: exact_w(moved, crowd + h * direction), 1e-6), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 10, 23])
def test_compiled_iterations_are_the_others(steps):
    moved, crowd = (x.float() for x in clouds(0.3, 6))
    kernel = -5 * script.distances(moved, crowd)
    plain, fused = (script.proximal_points(kernel, steps, compiled) for compiled in (False, True))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(script.proximal_points, (kernel, steps, False))
    slopes = []
    for compiled in (False, True):
        args = Args(transport_steps=steps, compile=compiled)
        slopes.append(torch.func.grad(lambda x: script.wasserstein(x, crowd, args).sum())(moved))
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


def test_no_gradient_flows_through_the_plan():
    """One iteration leaves a plan that is none of the best, and depends on the costs."""
    torch.set_default_dtype(torch.float64)
    args = Args(transport_steps=1, transport_beta=5.0)
    moved, crowd = clouds("unrelated", 5)
    leaf = moved.clone().requires_grad_()
    cost = script.distances(leaf, crowd)
    plan = script.transport_plan(cost, args)
    assert not plan.requires_grad and ((plan > 0) & (plan < 0.19)).any()
    grad = torch.autograd.grad(script.wasserstein(leaf, crowd, args).sum(), leaf)[0]
    away = moved.unsqueeze(-2) - crowd.unsqueeze(-3)
    close(grad, (plan[..., None] * away / away.norm(dim=-1, keepdim=True)).sum(-2))


# --------------------------------------------------------------------------------------------------- networks and views


def written_out(nets, who, s, own, crowd, landmarks):
    """respond() for one agent of seed s: own [k], crowd [N, 2], landmarks [L, 2]."""
    head, *encoders = (nets[f"{who}_{part}"] for part in PARTS)
    pooled = [
        torch.stack([plain(net, s, p) for p in points]).mean(0) for net, points in zip(encoders, (crowd, landmarks))
    ]
    return plain(head, s, torch.cat([own, *pooled]))


@pytest.mark.parametrize("who", ["actor", "critic", "actor_target", "critic_target"])
def test_networks_are_those_written_out(who):
    args, env, nets, batch = world()
    own, crowd = batch["own"], batch["own"][..., None, :, 2:4] + 0.1
    if who.startswith("critic"):
        own = torch.cat([own, random(*own.shape[:3], 10)], -1)
    found = script.respond(nets, who, own, crowd, batch["landmarks"])
    assert found.shape == (2, 7, 4, 1 if who.startswith("critic") else 5)
    for s, m, n in itertools.product(range(2), range(0, 7, 3), range(4)):
        expected = written_out(nets, who, s, own[s, m, n], crowd[s, m, 0], batch["landmarks"][s, m, 0])
        close(found[s, m, n], expected)
    many = [x.expand(-1, -1, 4, -1, -1) for x in (crowd, batch["landmarks"])]  # a crowd for each agent
    close(script.respond(nets, who, own, *many), found)
    many[0] = many[0] + random(2, 7, 4, 1, 1)
    found = script.respond(nets, who, own, *many)
    close(found[1, 2, 3], written_out(nets, who, 1, own[1, 2, 3], many[0][1, 2, 3], many[1][1, 2, 3]))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("role", ROLES)
def test_order_of_crowd_landmarks_and_agents(role, shared):
    args, env, nets, batch = world()
    own, order, marks = batch["own"], torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2])
    if role == "critic":
        own = torch.cat([own, random(*own.shape[:3], 10)], -1)
    crowd, landmarks = script.crowd_of(own), batch["landmarks"]
    if not shared:
        crowd, landmarks = (x + 0.1 * random(2, 7, 4, 4, 2) for x in (crowd, landmarks))
    out = script.respond(nets, role, own, crowd, landmarks)
    close(script.respond(nets, role, own, crowd[..., order, :], landmarks[..., marks, :]), out, 1e-12)
    for other in (crowd + 0.1, landmarks + 0.1):  # both are seen
        seen = (other, landmarks) if other.shape == crowd.shape and (other - crowd).std() < 1e-9 else (crowd, other)
        assert (script.respond(nets, role, own, *seen) - out).abs().max() > 1e-4
    if not shared:
        crowd, landmarks = crowd[:, :, order], landmarks[:, :, order]
    close(script.respond(nets, role, own[:, :, order], crowd, landmarks), out[:, :, order], 1e-12)
    twice = script.respond(nets, role, own, torch.cat([crowd, crowd], -2), landmarks)
    close(twice[:, :, order] if not shared else twice, out if shared else twice[:, :, order], 1e-12)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("transport", ["penalty", "budget"])
def test_order_of_agents_does_not_matter_to_the_regulariser(role, transport):
    args, env, nets, batch = world(transport=transport)
    order = torch.tensor([2, 0, 3, 1])
    found = []
    for index in (torch.arange(4), order):
        part = {"own": batch["own"][:, :5, index], "landmarks": batch["landmarks"][:, :5].flip(3)}
        z = batch["crowd_noise"].unflatten(-1, (4, 2))[:, :, index].flatten(-2)
        change = changes(role, nets, part, batch["actions"][:, :5, index])
        found.append(script.regularizer(change, part["own"][..., 2:4], z, args))
    close(found[1][0], found[0][0], 1e-8)
    close(found[1][1].unflatten(-1, (4, 2)), found[0][1].unflatten(-1, (4, 2))[:, :, order], 1e-8)


def test_perturbations_of_samples_do_not_depend_on_each_other():
    args, env, nets, batch = world()
    _, delta = regularize("critic", nets, batch, args)
    order = torch.tensor([3, 1, 4, 0, 2])
    mixed = {name: value[:, :5][:, order] for name, value in batch.items()}
    _, other = regularize("critic", nets, mixed, args)
    close(other, delta[:, order], 1e-9)


def test_perceive_has_the_nearest():
    args, env, _, batch = world(num_agents=6, eval_agents=(6,), nearest_landmarks=4, nearest_agents=3)
    body, marks = batch["own"][..., :4], batch["landmarks"]
    for crowd, landmarks in (
        (script.crowd_of(body), marks),
        (script.crowd_of(body).expand(-1, -1, 6, -1, -1), marks + 0.1 * random(2, 7, 6, 6, 2)),
    ):
        own = script.perceive(body, crowd, landmarks, args)
        assert own.shape == (2, 7, 6, 4 + 8 + 6)
        for s, m, n in itertools.product(range(2), range(7), range(6)):
            here = body[s, m, n, 2:]
            row = min(n, landmarks.shape[2] - 1)
            away = sorted((x - here for x in landmarks[s, m, row]), key=lambda d: d.norm().item())[:4]
            others = [body[s, m, k, 2:] - here for k in range(6) if k != n]
            others = sorted(others, key=lambda d: d.norm().item())[:3]
            close(own[s, m, n], torch.cat([body[s, m, n], *away, *others]))


def test_perceive_of_nothing_is_the_body():
    args, _, _, batch = world(nearest_landmarks=0, nearest_agents=0)
    assert batch["own"].shape[-1] == 4
    close(script.perceive(batch["own"], script.crowd_of(batch["own"]), batch["landmarks"], args), batch["own"])


@pytest.mark.parametrize("n", [2, 3, 15])
def test_views_are_the_places(n):
    """In float32, as they are used."""
    env = script.envs.make("simple_spread_v3", 6, DEVICE, num_agents=n)
    state, _ = env.reset([torch.Generator(DEVICE).manual_seed(k) for k in range(2)])
    state = env.step(state, torch.rand(6, n, 5, device=DEVICE))[0]
    crowd, landmarks = script.views(env.observe(state).unflatten(0, (2, 3)), n)
    assert crowd.shape == landmarks.shape == (2, 3, n, n, 2)
    position, marks = (x.permute(2, 0, 1).unflatten(0, (2, 3)) for x in (state.position, state.landmarks))
    for i in range(n):
        others = [i, *(k for k in range(n) if k != i)]  # itself first
        close(crowd[:, :, i], position[:, :, others], 0, 1e-6)
        close(landmarks[:, :, i], marks, 0, 1e-6)


def test_without_noise_acting_is_what_training_does():
    args, env, nets, *_ = world()
    state, obs = env.reset(script.envs.make_generators(1, 2, "a", DEVICE))
    for _ in range(3):  # agents come to have velocities
        state, obs, *_ = env.step(state, random(6, 4, 5).abs())
    obs = obs.unflatten(0, (2, 3))
    landmarks = state.landmarks.permute(2, 0, 1).unflatten(0, (2, 3)).unsqueeze(2)
    own = script.perceive(obs[..., :4], script.crowd_of(obs), landmarks, args)
    close(script.crowd_of(own).squeeze(2), state.position.permute(2, 0, 1).unflatten(0, (2, 3)))
    z = script.respond(nets, "actor", own, script.crowd_of(own), landmarks)
    found = act_on(nets, obs, env, args)
    close(found, z)
    noisy = obs.clone()
    noisy[:, :, 1] += 0.1 * random(*obs[:, :, 1].shape)
    moved = (act_on(nets, noisy, env, args) - found).abs().amax((0, 1, 3)) > 0
    assert moved.tolist() == [False, True, False, False]  # the others do not see its noise


# ------------------------------------------------------------------------------------------------------- regulariser


def changes(role, nets, batch, action):
    return script.change_of_q(nets, batch, action) if role == "critic" else script.change_of_actor(nets, batch)


def regularize(role, nets, batch, args, mode=None):
    """R [S, M] and delta."""
    part = first(batch)
    change = changes(role, nets, part, part["actions"])
    args = dataclasses.replace(args, regularizer=mode or args.regularizer)
    return script.regularizer(change, part["own"][..., 2:4], part["crowd_noise"], args)


def of_mode(args, mode):
    return dataclasses.replace(args, regularizer=mode)


def with_flat(nets, name, flat):
    return nets | {name: dataclasses.replace(nets[name], flat=flat)}


@pytest.mark.parametrize("role", ROLES)
def test_change_is_the_networks_written_out(role):
    args, env, nets, batch = world()
    moved = batch["own"][:, :5, :, 2:4] + 0.2 * random(2, 5, 4, 2)
    found = changes(role, nets, first(batch), batch["actions"][:, :5])(moved)
    for s, m in itertools.product(range(2), range(5)):
        total = 0.0
        for n in range(4):
            own, action = batch["own"][s, m, n], batch["actions"][s, m]
            if role == "critic":
                others = (action.sum(0) - action[n]) / 3
                own = torch.cat([own, action[n], others])
            out = [
                written_out(nets, role, s, own, crowd, batch["landmarks"][s, m, 0])
                for crowd in (moved[s, m], batch["own"][s, m, :, 2:4])
            ]
            total += (out[0] - out[1]).square().sum() / 4
        close(found[s, m], total)


def exact_budget(delta, crowd, args):
    """The projection that within_budget() approximates, found to the last digit; no gradient."""
    move, epsilon = delta.unflatten(-1, (-1, 2)), args.epsilon
    low = epsilon / move.norm(dim=-1).mean(-1).clamp_min(epsilon)
    high = torch.ones_like(low)
    for _ in range(40):
        middle = (low + high) / 2
        inside = script.wasserstein(crowd + middle[..., None, None] * move, crowd, args) <= epsilon
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    low = torch.where(script.wasserstein(crowd + move, crowd, args) <= epsilon, 1.0, low)
    return (low[..., None, None] * move).flatten(-2)


@pytest.mark.parametrize("epsilon", [0.05, 0.4])
def test_gradient_of_the_budget_is_that_of_the_exact_projection(epsilon):
    torch.set_default_dtype(torch.float64)
    args = Args(transport_steps=60, epsilon=epsilon)
    _, crowd = clouds(0.1, 4, 20)
    delta, direction, weight = (random(20, 8, seed=k) for k in (5, 6, 7))
    leaf = delta.clone().requires_grad_()
    projected = script.within_budget(leaf, crowd, args)
    exact = exact_budget(delta, crowd, args)
    is_close = (projected.detach() - exact).abs().amax(-1) < 2e-3
    assert is_close.double().mean() >= 0.8  # the others' agents swap places on the way
    assert (projected - leaf).abs().amax(-1).gt(0.01).all()
    (grad,) = torch.autograd.grad((projected * weight).sum(), leaf)
    measured = fourth_order(lambda h: (exact_budget(delta + h * direction, crowd, args) * weight).sum(-1))[is_close]
    predicted = (grad * direction).sum(-1)[is_close]
    assert ((predicted - measured).norm() / measured.norm()).item() < 5e-3


CASES = [("penalty", 1), ("penalty", 3), ("budget", 1), ("budget", 3)]


@pytest.mark.parametrize("part", ["head", "crowd"])
@pytest.mark.parametrize("transport,steps", CASES)
@pytest.mark.parametrize("role", ROLES)
def test_hypergradient_is_the_derivative_of_the_whole_unroll(monkeypatch, role, transport, steps, part):
    options = dict(transport=transport, attack_steps=steps, epsilon=0.3, transport_coef=1e-3)
    args, env, nets, batch = world(**options)
    name = f"{role}_{part}"
    flat = nets[name].flat.detach().clone().requires_grad_()
    value, delta = regularize(role, with_flat(nets, name, flat), batch, args)
    (grad,) = torch.autograd.grad(value.mean(), flat, retain_graph=True)
    leader, fixed = regularize(role, with_flat(nets, name, flat), batch, args, "adversarial")
    (other,) = torch.autograd.grad(leader.mean(), flat)
    assert not fixed.requires_grad and value.mean() > 1e-4
    close(leader, value)
    direction = random(*flat.shape, seed=11)
    predicted, leader = ((g * direction).sum().item() for g in (grad, other))
    # the budget's bisection is one of twelve halvings, its gradient that of the exact projection
    monkeypatch.setattr(script, "within_budget", exact_budget)

    def moved(h):
        return regularize(role, with_flat(nets, name, flat.detach() + h * direction), batch, args)[0].mean()

    measured = fourth_order(moved, 1e-5).item()
    assert predicted == pytest.approx(measured, rel=1e-6 if transport == "penalty" else 1e-2)
    assert abs(leader - measured) > 3 * abs(predicted - measured)  # the leader term alone would fail this test


@pytest.mark.parametrize("transport", ["penalty", "budget"])
@pytest.mark.parametrize("role", ROLES)
def test_adversarial_gradient_is_the_leader_term(role, transport):
    args, env, nets, batch = world(transport=transport)
    _, delta = regularize(role, nets, batch, args)
    change = changes(role, nets, first(batch), batch["actions"][:, :5])
    leader = change(batch["own"][:, :5, :, 2:4] + delta.detach().unflatten(-1, (4, 2))).mean()
    flats = [nets[f"{role}_{part}"].flat for part in PARTS]
    expected = torch.autograd.grad(leader, flats)
    actual = torch.autograd.grad(regularize(role, nets, batch, args, "adversarial")[0].mean(), flats)
    for a, b in zip(actual, expected):
        close(a, b, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [0.02, 0.3, 2.0])
def test_budget_is_kept_and_used(epsilon, dtype):
    args, count = Args(epsilon=epsilon), 12
    for n, size in itertools.product((3, 15), (0.3, 1.0, 5.0, 100.0)):
        crowd = clouds("unrelated", n, count)[1].to(dtype)
        delta = size * epsilon * random(count, 2 * n, dtype=dtype)
        found = script.within_budget(delta, crowd, args)
        after, before = (
            script.wasserstein(crowd + d.unflatten(-1, (n, 2)), crowd, args) / epsilon for d in (found, delta)
        )
        inside = before <= 1
        assert (after <= 1 + 1e-4).all() and torch.equal(found[inside], delta[inside])
        if size <= 5 and epsilon < 1 and not inside.all():
            assert after[~inside].mean() > 0.97 and after[~inside].min() > 0.8
        cosine = torch.nn.functional.cosine_similarity(found, delta, dim=-1)
        close(cosine, torch.ones_like(cosine), 1e-5)
        assert inside.all() if size == 0.3 else not inside.any() if size == 100 and epsilon < 1 else True


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["penalty", "budget"])
@pytest.mark.parametrize("role", ROLES)
def test_attack_beats_a_random_direction(role, transport):
    args, env, nets, batch = world(transport=transport, transport_coef=1e-4, batch_size=30)
    crowd, change = batch["own"][..., 2:4], changes(role, nets, batch, batch["actions"])
    found = {}
    for mode in ("random", "adversarial", "stackelberg"):
        found[mode], delta = script.regularizer(change, crowd, random(2, 30, 8), of_mode(args, mode))
        close(found[mode], change(crowd + delta.unflatten(-1, (4, 2))))
        if transport == "budget":
            moved = crowd + delta.detach().unflatten(-1, (4, 2))
            assert mode == "random" or (exact_w(moved, crowd) <= args.epsilon * (1 + 1e-4)).all()
    assert found["adversarial"].mean() > 1.5 * found["random"].mean()
    close(found["adversarial"], found["stackelberg"])


@pytest.mark.parametrize("role", ROLES)
def test_transport_costs_the_adversary(role):
    """At a price of 1 it ends near epsilon, however large the gain is; without one it goes as far as its steps."""
    paid = []
    for coef in (0.0, 1.0, 100.0):
        args, env, nets, batch = world(transport="penalty", transport_coef=coef, attack_steps=12, attack_lr=0.3)
        _, delta = regularize(role, nets, batch, args)
        crowd = batch["own"][:, :5, :, 2:4]
        paid.append(exact_w(crowd + delta.detach().unflatten(-1, (4, 2)), crowd).mean().item())
    assert paid[1] == pytest.approx(args.epsilon, rel=0.25)
    assert paid[0] > 1.5 * paid[1] and paid[2] < 0.7 * paid[1]


def test_lengths_of_perturbations_that_need_no_gradient():
    args, crowd = Args(epsilon=0.4), random(2, 3000, 6, 2)

    def moves(mode):
        _, delta = script.regularizer(lambda c: c.sum((-1, -2)), crowd, random(2, 3000, 12), of_mode(args, mode))
        return delta.unflatten(-1, (6, 2)).norm(dim=-1)

    assert moves("gaussian").mean().item() == pytest.approx(0.4, rel=0.01)
    close(moves("random").mean(-1), torch.full((2, 3000), 0.4, device=DEVICE), 1e-5)


def test_the_start_and_the_steps_have_their_lengths():
    """Along a constant slope: a random start of half, then three steps of 2.5 / 3, in units of epsilon sqrt(N)."""
    torch.set_default_dtype(torch.float64)
    args = Args(epsilon=0.4, transport="penalty", transport_coef=0.0)
    crowd, slope = random(2, 5, 6, 2), random(12, seed=1)
    noise, length = random(2, 5, 12, seed=2), 0.4 * 6**0.5
    _, delta = script.regularizer(
        lambda c: 1e3 + (c.flatten(-2) * slope).sum(-1), crowd, noise, of_mode(args, "adversarial")
    )
    close(delta, length * (0.5 * noise / noise.norm(dim=-1, keepdim=True) + 2.5 * slope / slope.norm()))


def test_mean_action_of_the_others():
    action = random(2, 3, 5, 4)
    found = script.others_mean(action)
    for n in range(5):
        close(found[:, :, n], torch.stack([action[:, :, k] for k in range(5) if k != n]).mean(0), 1e-5, 1e-6)


@pytest.mark.parametrize("regularizer", ["stackelberg", "adversarial"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("part", PARTS)
def test_hypergradient_of_the_mean_action_regulariser(part, steps, regularizer):
    args, env, nets, batch = world(mean_action_epsilon=0.5, attack_steps=steps, attack_lr=0.8, regularizer=regularizer)
    name = f"critic_{part}"
    flat, direction = nets[name].flat.detach().clone().requires_grad_(), random(*nets[name].flat.shape, seed=11)

    def value(flat):
        found = script.mean_action_regularizer(with_flat(nets, name, flat), first(batch), args)
        assert found.shape == (2, 5)
        return found.mean()

    predicted = (torch.autograd.grad(value(flat), flat)[0] * direction).sum().item()
    measured = fourth_order(lambda h: value(flat.detach() + h * direction)).item()
    is_derivative = predicted == pytest.approx(measured, rel=1e-6)
    assert is_derivative == (regularizer == "stackelberg")


def test_mean_action_regulariser_is_exact_for_a_linear_critic():
    args, env, nets, batch = world(mean_action_epsilon=0.3, attack_steps=60, attack_lr=1.0, activation="relu")
    head, k = nets["critic_head"], batch["own"].shape[-1]
    (weight, bias), (second, bias2), (third, _) = [[x.detach() for x in layer] for layer in head.layers()]
    bias.fill_(1e3)
    bias2.fill_(1e5)  # every hidden unit is active
    slope = (third @ second @ weight)[:, 0, k + 5 : k + 10]
    found = script.mean_action_regularizer(nets, first(batch), args)
    exact = 0.09 * slope.square().sum(-1, keepdim=True).expand_as(found)
    assert (found <= exact * (1 + 1e-6)).all()
    close(found, exact, 1e-2)


# ------------------------------------------------------------------------------------------------------------- losses


def greedy(nets, who, s, own, landmarks, env):
    """Actions [N, A] of the policy, one agent after the other."""
    z = torch.stack([written_out(nets, who, s, x, own[:, 2:4], landmarks) for x in own])
    return (env.action_low + env.action_high) / 2 + (env.action_high - env.action_low) / 2 * torch.tanh(z), z


def q_of(nets, who, s, n, own, landmarks, action, others):
    x = torch.cat([own[n], action[n], torch.stack([others[k] for k in range(len(own)) if k != n]).mean(0)])
    return written_out(nets, who, s, x, own[:, 2:4], landmarks)[0]


def test_critic_loss_written_out():
    args, env, nets, batch = world(regularizer="none", gamma=0.9, batch_size=4)
    batch["terminated"] = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]], device=DEVICE)
    total = 0.0
    for s, m in itertools.product(range(2), range(4)):
        own, after, marks = batch["own"][s, m], batch["next_own"][s, m], batch["landmarks"][s, m, 0]
        then, _ = greedy(nets, "actor_target", s, after, marks, env)
        for n in range(4):
            target = 0.25 * batch["rewards"][s, m, n]  # 1 / N
            if not batch["terminated"][s, m]:
                target = target + 0.9 * q_of(nets, "critic_target", s, n, after, marks, then, then)
            action = batch["actions"][s, m]
            total += (q_of(nets, "critic", s, n, own, marks, action, action) - target.detach()) ** 2 / 16
    loss, metrics = script.critic_loss(nets, batch, env, args)
    close(loss, total)
    close(metrics["losses/critic_loss"].sum(), total.detach())
    assert "crowd_noise" not in batch and metrics.keys() == {"losses/critic_loss", "losses/q_values"}
    flats = [nets[f"critic_{part}"].flat for part in PARTS]
    for a, b in zip(torch.autograd.grad(loss, flats), torch.autograd.grad(total, flats)):
        close(a, b)


def test_actor_loss_written_out():
    args, env, nets, batch = world(regularizer="none", policy_l2=0.1, batch_size=4)
    total = 0.0
    for s, m in itertools.product(range(2), range(4)):
        own, marks = batch["own"][s, m], batch["landmarks"][s, m, 0]
        action, z = greedy(nets, "actor", s, own, marks, env)
        q = [q_of(nets, "critic", s, n, own, marks, action, action.detach()) for n in range(4)]
        total += -sum(q) / 16 + 0.1 * z.square().mean() / 4
    loss, _ = script.actor_loss(nets, batch, env, args)
    close(loss, total)
    flats = [nets[f"actor_{part}"].flat for part in PARTS]
    expected = torch.autograd.grad(total, flats)
    for a, b in zip(torch.autograd.grad(loss, flats, retain_graph=True), expected):
        close(a, b)
    critics = [nets[f"critic_{part}"].flat for part in PARTS]
    assert torch.autograd.grad(loss, critics, allow_unused=True) == (None,) * 3


@pytest.mark.parametrize("regularize_what", ["critic", "actor", "both"])
@pytest.mark.parametrize("mode", ["gaussian", "random", "adversarial", "stackelberg"])
def test_losses_have_lambda_times_the_regulariser(mode, regularize_what):
    args, env, nets, batch = world(regularizer=mode, regularize=regularize_what, reg_coef=0.7)
    bare = dataclasses.replace(args, regularizer="none")
    crowd = script.crowd_of(batch["own"])
    z = script.respond(nets, "actor", batch["own"], crowd, batch["landmarks"])
    now = {"critic": script.squash(z, env).detach()}  # Q at the policy's actions
    for role in ROLES:
        loss = getattr(script, f"{role}_loss")
        flats = [nets[f"{role}_{part}"].flat for part in PARTS]
        full, metrics = loss(nets, batch, env, args)
        expected, _ = loss(nets, batch, env, bare)
        name = f"ernie/{role}_regularizer"
        assert (name in metrics) == (regularize_what in (role, "both"))
        if name in metrics:
            change = changes(role, nets, first(batch), now["critic"][:, :5])
            change, _ = script.regularizer(change, crowd.squeeze(2)[:, :5], batch["crowd_noise"], args)
            close(metrics[name], change.detach().mean(1))
            expected = expected + 0.7 * change.mean(1).sum()
        close(full, expected)
        for a, b in zip(*(torch.autograd.grad(x, flats, retain_graph=True) for x in (full, expected))):
            close(a, b, 1e-9)


def test_mean_action_regulariser_is_in_the_critic_loss():
    args, env, nets, batch = world(regularizer="none", mean_action_epsilon=0.2, reg_coef=0.7)
    full, metrics = script.critic_loss(nets, batch, env, args)
    bare, _ = script.critic_loss(nets, batch, env, dataclasses.replace(args, mean_action_epsilon=0.0))
    change = script.mean_action_regularizer(nets, first(batch), args).mean(1)
    close(full, bare + 0.7 * change.sum())
    close(metrics["ernie/mean_action_regularizer"], change.detach())
    assert (change > 0).all()


def test_update_steps_and_target_networks():
    args, env, nets, batch = world(tau=0.3, max_grad_norm=1e-3)
    optimizers = {role: torch.optim.SGD([nets[f"{role}_{part}"].flat for part in PARTS], 1.0) for role in ROLES}
    before = {name: net.flat.detach().clone() for name, net in nets.items()}
    losses = {role: getattr(script, f"{role}_loss") for role in ROLES}
    metrics = script.update(nets, optimizers, losses, batch, env, args)
    for role, part in itertools.product(ROLES, PARTS):
        name = f"{role}_{part}"
        step = (nets[name].flat.detach() - before[name]).norm(dim=1)
        close(step, torch.full_like(step, 1e-3), 1e-6)  # clipped, each seed and network on its own
        expected = 0.7 * before[f"{role}_target_{part}"] + 0.3 * nets[name].flat.detach()
        close(nets[f"{role}_target_{part}"].flat, expected)
    assert {"losses/critic_loss", "losses/actor_loss", "ernie/actor_regularizer"} <= metrics.keys()


def test_first_networks():
    args = Args(**SMALL | dict(num_seeds=2, hidden_size=64))
    env = script.make_env(args, 2, DEVICE)
    nets, optimizers = script.make_nets(env, args)
    for role, own, out in (("actor", 14, 5), ("critic", 24, 1)):
        assert nets[f"{role}_head"].sizes == [own + 128, 64, 64, out]
        assert nets[f"{role}_crowd"].sizes == nets[f"{role}_landmarks"].sizes == [2, 64, 64]
        assert not torch.equal(nets[f"{role}_crowd"].flat, nets[f"{role}_landmarks"].flat)
        assert [id(p) for p in optimizers[role].param_groups[0]["params"]] == [
            id(nets[f"{role}_{part}"].flat) for part in PARTS
        ]
        for part in PARTS:
            assert torch.equal(nets[f"{role}_{part}"].flat, nets[f"{role}_target_{part}"].flat)
    alone, _ = script.make_nets(env, dataclasses.replace(args, seed=2, num_seeds=1))
    for name, net in nets.items():
        assert torch.equal(net.flat[1:], alone[name].flat) and len(net.flat) == 2


def test_diagnostics_are_what_they_say():
    args, env, nets, batch = world(attack_steps=2)
    found = script.diagnose(nets, batch, env, args)
    part = first(batch)
    crowd, noise = part["own"][..., 2:4], part["crowd_noise"]
    z = script.respond(nets, "actor", part["own"], script.crowd_of(part["own"]), part["landmarks"])
    for role in ROLES:
        change, flat = changes(role, nets, part, script.squash(z, env).detach()), nets[f"{role}_head"].flat
        value, delta = script.regularizer(change, crowd, noise, of_mode(args, "stackelberg"))
        close(found[f"ernie/{role}_attack"], value.detach().mean(1))
        at_random, _ = script.regularizer(change, crowd, noise, of_mode(args, "random"))
        close(found[f"ernie/{role}_random_direction"], at_random.detach().mean(1))
        moved = crowd + delta.detach().unflatten(-1, (4, 2))
        close(found[f"ernie/{role}_wasserstein"], exact_w(moved, crowd).mean(1), 1e-2)
        leader = script.regularizer(change, crowd, noise, of_mode(args, "adversarial"))[0]
        a, b = (torch.autograd.grad(x.mean(1).sum(), flat, retain_graph=True)[0] for x in (leader, value))
        close(found[f"ernie/{role}_interaction_ratio"], (b - a).norm(dim=1) / a.norm(dim=1), 1e-7)
        cosine = ((b - a) * a).sum(1) / (b - a).norm(dim=1) / a.norm(dim=1)
        close(found[f"ernie/{role}_interaction_cosine"], cosine, 1e-7)


@pytest.mark.slow
def test_losses_compile_to_the_same_gradients():
    """Without breaks in the graph, which is what --compile asks for; without its slow code generator."""
    args, env, nets, batch = world(transport_steps=2, attack_steps=1, reg_coef=1.0)
    for role in ROLES:
        loss, flats = getattr(script, f"{role}_loss"), [nets[f"{role}_{part}"].flat for part in PARTS]
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        expected, found = (torch.autograd.grad(f(nets, batch, env, args)[0], flats) for f in (loss, compiled))
        for a, b in zip(found, expected):
            close(a, b, 1e-8)


# ------------------------------------------------------------------------------------------------- rollout and replay


def test_replay_has_what_the_environment_did():
    args, env, nets, *_ = world()
    streams = script.envs.make_generators(5, 2, "test", DEVICE)
    part = script.rollout(env.step, env, nets, args, script.draw_rollout(env, 0.4, streams))
    replay = script.make_replay(env, 2, 3)
    assert {name: x.shape for name, x in part.items()} == {name: x.shape for name, x in replay.items()}
    state, obs = env.reset(script.envs.make_generators(5, 2, "test", DEVICE))
    spread = []
    for t in range(env.horizon):
        obs = obs.unflatten(0, (2, 3))
        close(part["body"][:, :, t], obs[..., :4])
        policy = script.squash(act_on(nets, obs, env, args), env)
        actions = part["actions"][:, :, t]
        assert (actions >= 0).all() and (actions <= 1).all()
        spread.append((actions - policy)[(actions > 0) & (actions < 1)])
        state, obs, reward, *_ = env.step(state, actions.flatten(0, 1))
        close(part["rewards"][:, :, t], reward.unflatten(0, (2, 3)))
    close(part["body"][:, :, -1], obs.unflatten(0, (2, 3))[..., :4])
    close(part["landmarks"], state.landmarks.permute(2, 0, 1).unflatten(0, (2, 3)))
    assert torch.cat(spread).std().item() == pytest.approx(0.2, abs=0.05)  # in half-widths, less what is cut off


def test_without_exploration_the_policy_acts():
    args, env, nets, *_ = world()
    streams = script.envs.make_generators(5, 2, "test", DEVICE)
    replay = script.rollout(env.step, env, nets, args, script.draw_rollout(env, 0.0, streams))
    body, marks = replay["body"][:, :, 7], replay["landmarks"].unsqueeze(2)
    own = script.perceive(body, script.crowd_of(body), marks, args)
    z = script.respond(nets, "actor", own, script.crowd_of(own), marks)
    close(replay["actions"][:, :, 7], script.squash(z, env))


def test_sampled_transitions_are_those_of_the_replay():
    """Every number tells its seed, episode, step and agent."""
    args = Args(**SMALL | dict(num_seeds=3, batch_size=2000, nearest_landmarks=0, nearest_agents=0))
    env = script.make_env(args, 3, DEVICE)
    replay = script.make_replay(env, 3, 8)
    for tensor in replay.values():
        shape, names = tensor.shape, [1e6, 1e4, 1e2, 1]
        if tensor is replay["landmarks"]:
            names = [1e6, 1e4, 1]
        for axis, (size, unit) in enumerate(zip(shape, names)):
            tensor += unit * torch.arange(size, device=DEVICE).view(-1, *[1] * (tensor.ndim - axis - 1))
    batch = script.sample(replay, 5, args, script.envs.make_generators(0, 3, "test", DEVICE))
    code = batch["terminated"]  # [S, M]
    seed, episode, step = code // 1e6, code % 1e6 // 1e4, code % 1e4 // 1e2
    assert (seed == torch.arange(3, device=DEVICE)[:, None]).all()
    for s in range(3):
        assert len(code[s].unique()) == 5 * env.horizon  # all of the first five episodes, nothing else
    assert episode.max() == 4 and step.max() == env.horizon - 1
    agents = torch.arange(3, device=DEVICE).float()
    assert torch.equal(batch["rewards"], code[..., None] + agents)
    for name, later in (("own", 0), ("next_own", 100)):
        assert batch[name].shape == (3, 2000, 3, 4)
        assert torch.equal(batch[name], (code[..., None] + agents + later)[..., None].expand(-1, -1, -1, 4))
    assert torch.equal(batch["actions"], (code[..., None] + agents)[..., None].expand(-1, -1, -1, 5))
    expected = (1e6 * seed + 1e4 * episode)[..., None, None] + agents
    assert torch.equal(batch["landmarks"], expected[..., None].expand(-1, -1, -1, -1, 2))
    assert len(batch["terminated"][0].unique()) > 100 and not torch.equal(episode[0], episode[1])


def test_draws_are_only_those_that_are_needed():
    env = SimpleNamespace(num_agents=3, action_mask=torch.ones(3, 5))
    streams = script.envs.make_generators(0, 2, "test", DEVICE)
    noise = script.draw_noise(streams, env, Args(**SMALL | dict(mean_action_epsilon=0.1)))
    assert noise["crowd_noise"].shape == (2, 4, 6) and noise["mean_action_noise"].shape == (2, 4, 3, 5)
    assert script.draw_noise(streams, env, Args(**SMALL | dict(reg_batch_size=99)))["crowd_noise"].shape == (2, 8, 6)
    assert script.draw_noise(streams, env, Args(**SMALL | dict(regularizer="none"))) == {}


# ----------------------------------------------------------------------------------------------------------- training


def short_train(tmp_path, name, small=SMALL, **options):
    """(args, env, nets, rows of metrics.csv)."""
    args = Args(**(small | options))
    script.setup(args)
    env = script.make_env(args, args.num_seeds * args.num_envs, DEVICE)
    nets, optimizers = script.make_nets(env, args)
    run = runs.Run(tmp_path / name, [{"seed": seed} for seed in args.seeds])
    run.dir.mkdir()
    script.train(env, nets, optimizers, args, run, {})
    return args, env, nets, run.rows


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(transport="budget", mean_action_epsilon=0.1)])
def test_a_seed_does_not_depend_on_the_others(tmp_path, options):
    _, _, together, rows = short_train(tmp_path, "together", seed=5, num_seeds=3, **options)
    for k in range(3):
        _, _, alone, own = short_train(tmp_path, f"alone{k}", seed=5 + k, **options)
        for name in alone:
            assert alike(alone[name].flat, together[name].flat[k : k + 1])
        assert alike(without_speed(own), without_speed([row for row in rows if row["seed"] == 5 + k]))


def test_other_seeds_data_do_not_matter():
    args, env, nets, batch = world()
    for role in ROLES:
        flats = [nets[f"{role}_{part}"].flat for part in PARTS]
        loss = partial(getattr(script, f"{role}_loss"), nets, env=env, args=args)
        grads = []
        for shift in (0.0, 1.0):
            other = {name: torch.cat([value[:1], value[1:] + shift]) for name, value in batch.items()}
            grads.append(torch.autograd.grad(loss(other)[0], flats))
        for a, b in zip(*grads):
            assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


MODES = [
    *(dict(regularizer=m) for m in ("none", "gaussian", "random")),
    *(
        dict(regularizer=m, regularize=r, transport=t)
        for m, r, t in itertools.product(
            ("adversarial", "stackelberg"), ("critic", "actor", "both"), ("penalty", "budget")
        )
    ),
    dict(mean_action_epsilon=0.1, regularizer="none"),
    dict(mean_action_epsilon=0.1, regularizer="adversarial", attack_steps=1),
    dict(activation="silu", num_agents=4),
    dict(activation="tanh", nearest_landmarks=0, nearest_agents=0, eval_agents=(2,)),
    dict(torch_deterministic=False, num_agents=2, nearest_landmarks=2, nearest_agents=1, eval_agents=(2,)),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", MODES, ids=lambda v: "-".join(map(str, v.values())))
def test_every_option_trains(tmp_path, options):
    args, env, nets, rows = short_train(tmp_path, "run", total_timesteps=100, log_interval=50, **options)
    fresh, _ = script.make_nets(env, args)
    for name in nets:
        assert (nets[name].flat != fresh[name].flat).any(), name
    assert [row["global_step"] for row in rows] == [100] and all(math.isfinite(float(v)) for v in rows[0].values())
    regularized = {"critic", "actor"} if args.regularize == "both" else {args.regularize}
    for role in ROLES:
        name = f"ernie/{role}_regularizer"
        assert (name in rows[0]) == (args.regularized and role in regularized) == (f"ernie/{role}_attack" in rows[0])
        assert name not in rows[0] or float(rows[0][name]) > 0
    assert ("ernie/mean_action_regularizer" in rows[0]) == (args.mean_action_epsilon > 0)


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", ["none", "stackelberg"])
def test_compiled_functions_are_those_that_train(tmp_path, monkeypatch, regularizer):
    """On a CPU the losses are compiled without the regulariser only."""
    asked, called = [], set()

    def compile(function, fullgraph, options):
        asked.append((function.__name__, fullgraph))
        return lambda *rest: called.add(function.__name__) or function(*rest)

    monkeypatch.setattr(script.torch, "compile", compile)
    short_train(tmp_path, "run", compile=True, total_timesteps=100, regularizer=regularizer)
    names = ["critic_loss", "actor_loss", "step"]
    if regularizer != "none" and DEVICE.type == "cpu":
        names = names[2:]
    assert asked == [(name, True) for name in names] and called == set(names)


@pytest.mark.parametrize("off", [dict(reg_coef=0.0), dict(attack_steps=0), dict(epsilon=0.0)])
def test_switched_off_regulariser_is_the_baseline(tmp_path, off):
    *_, expected, rows = short_train(tmp_path, "none", regularizer="none")
    *_, nets, own = short_train(tmp_path, "off", **off)
    assert without_speed(rows) == without_speed(own) and not any(k.startswith("ernie") for k in own[0])
    assert all(torch.equal(nets[name].flat, expected[name].flat) for name in nets)
    *_, other, _ = short_train(tmp_path, "on")
    assert not torch.equal(other["actor_head"].flat, nets["actor_head"].flat)


def test_one_network_serves_any_number_of_agents():
    args = Args(**SMALL)
    nets, _ = script.make_nets(script.make_env(args, 2, DEVICE), args)
    for n in (3, 6, 15):
        env = script.make_env(dataclasses.replace(args, num_agents=n), 2, DEVICE)
        _, obs = env.reset(script.envs.make_generators(0, 1, "test", DEVICE))
        z = act_on(nets, obs.unsqueeze(0), env, args)
        assert z.shape == (1, 2, n, 5) and z.isfinite().all() and z.std(2).min() > 0


def test_returns_are_the_sums_of_rewards():
    args, env, nets, *_ = world()
    policy = script.trained_policy(nets, env, args)
    found = robustness.evaluate(env, policy, script.envs.make_generators(2, 2, "test", DEVICE)).mean(2)
    state, obs = env.reset(script.envs.make_generators(2, 2, "test", DEVICE))
    total = torch.zeros(6, device=DEVICE)
    for _ in range(25):
        action = script.squash(act_on(nets, obs.unflatten(0, (2, 3)), env, args), env)
        state, obs, reward, *_ = env.step(state, action.flatten(0, 1))
        total += sum(reward[:, n] for n in range(4)) / 4
    close(found, total.view(2, 3))


@pytest.mark.parametrize("family", script.SWEEP)
def test_perturbations_change_returns(family):
    args = Args(**SMALL)
    env = script.make_env(args, 8, DEVICE)
    nets, _ = script.make_nets(env, args)
    make_policy, found = partial(script.trained_policy, nets, args=args), []
    is_factor = family in ("damping", "mass", "max_speed_scale", "contact_force")
    for strength in (1.0, 4.0, 4.0) if is_factor else (0.0, 0.5, 0.5):
        other = robustness.changed(env, family, strength, 1)
        streams = script.envs.make_generators(2, 1, "test", DEVICE)
        found.append(robustness.evaluate(other, make_policy(other), streams, family, strength).mean(2))
    assert torch.equal(found[1], found[2]) and found[0].shape == (1, 8)
    assert torch.equal(found[0], found[1]) == (family == "max_speed_scale")  # spread has no speed limit


def test_the_report_has_other_crowds_with_as_many_agents_in_all():
    args = Args(**SMALL | dict(num_seeds=2))
    env = script.make_env(args, 10, DEVICE)
    nets, _ = script.make_nets(env, args)
    make_policy = partial(script.trained_policy, nets, args=args)
    rows = robustness.sweep(env, make_policy, {"agents": (3, 6, 15)}, [1, 2], per_agent=False)
    points = [(row["perturbation"], row["strength"], row["episodes"]) for row in rows[::2]]
    assert points == [("clean", 0.0, 5), ("agents", 3, 5), ("agents", 6, 2), ("agents", 15, 1)]
    assert [row["return"] for row in rows[:2]] == [row["return"] for row in rows[2:4]]  # the same episodes


def test_worst_observations_are_in_the_ball_and_beat_random_ones():
    args, env, nets, *_ = world()
    _, obs = env.reset(script.envs.make_generators(2, 2, "test", DEVICE))
    obs = script.envs.by_agent(obs, 2)
    policy, streams = script.trained_policy(nets, env, args), script.envs.make_generators(3, 2, "test", DEVICE)
    with torch.no_grad():
        delta = robustness.worst_observations(env, policy, "mad", obs, 0.3, streams) - obs
    assert delta.norm(dim=-1).max() <= 0.3 * (1 + 1e-9) and (delta[..., 2 + 4 * 4 :] == 0).all()
    live = torch.arange(obs.shape[-1], device=DEVICE) < 18
    at_random = perturb.rescale(random(*obs.shape) * live, 0.3, "l2")
    clean = policy.output(obs)
    worst, usual = (policy.divergence(policy.output(obs + d), clean).mean() for d in (delta, at_random))
    assert worst > 2 * usual


@pytest.mark.slow
@pytest.mark.parametrize("can", [True, False])
@pytest.mark.parametrize(
    "flags,looks",
    [("", True), ("--compile-transport", True), ("--no-compile-transport", False), ("--epsilon=0", False)],
)
def test_transport_is_compiled_where_it_can_be(tmp_path, monkeypatch, flags, looks, can):
    """With a C++ compiler, which is not looked for where nothing is transported."""
    asked = []
    monkeypatch.setattr(script.envs, "can_compile", lambda *what: asked.append(what) or can)
    monkeypatch.setattr(script, "train", lambda env, nets, optimizers, args, run, checkpoint: trained.append(args))
    trained = []
    small = "--num-agents=3 --eval-agents 3 --eval-episodes=0 --wandb-mode=disabled"
    assert call(script, monkeypatch, *small.split(), *flags.split(), f"--runs-dir={tmp_path}") == 0
    assert [args.compile_transport for args in trained] == [looks and can] and len(asked) == looks


def test_values_that_do_not_go_together():
    for options, name in (
        (dict(nearest_landmarks=4), "nearest_landmarks"),
        (dict(nearest_agents=3), "nearest_agents"),
        (dict(eval_agents=(2, 3), nearest_agents=2), "nearest_agents"),
        (dict(eval_agents=()), "eval_agents"),
        (dict(eval_agents=(1,)), "eval_agents"),
        (dict(num_agents=1), "num_agents"),
        (dict(learning_starts=200), "learning_starts"),
    ):
        with pytest.raises(ValueError, match=name):
            Args(**SMALL | options)


def test_defaults_follow_the_number_of_agents_and_steps():
    assert Args(num_agents=15).eval_episodes == 200 and Args(num_agents=15).reward_scale == 1 / 15
    assert Args(attack_steps=1).attack_lr == 1.0 and Args(attack_steps=5).attack_lr == 0.5


@pytest.mark.slow
def test_learns_to_spread(tmp_path):
    """Random policies have -25.5, untrained ones -24.3 or less; five seeds had -19.0 to -21.6 after these steps."""
    small = dict(num_agents=3, regularizer="none", log_interval=10**6, checkpoint_interval=10**6)
    small |= dict(learning_starts=2000, total_timesteps=35_000, eval_episodes=100)
    *_, rows = short_train(tmp_path, "run", small)
    assert float(rows[-1]["eval/episodic_return"]) > -23


@pytest.mark.parametrize(
    "options", [dict(regularizer="none"), dict(), dict(transport="penalty"), dict(mean_action_epsilon=0.1)]
)
def test_updates_in_a_cuda_graph_are_those_without(options, monkeypatch):
    args, env, nets, batch = world(compile_transport=False, **options)
    learners = [learner(script, nets, env, args) for _ in range(2)]
    check_updates_in_a_cuda_graph(learners, rotated(batch, 7, 9), DEVICE, monkeypatch)


def test_rollouts_in_a_cuda_graph_are_those_without(monkeypatch):
    args, env, nets, _ = world()
    streams = script.envs.make_generators(5, 2, "test", DEVICE)
    play = partial(script.rollout, env.step, env, nets, args)
    draws = [(script.draw_rollout(env, 0.1 * k, streams),) for k in range(7)]
    check_rollouts_in_a_cuda_graph(play, nets, draws, DEVICE, monkeypatch)
