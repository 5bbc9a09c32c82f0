"""ernie_qcombo.py: losses by hand, gradients against finite differences, searches against brute force, runs."""

import dataclasses
import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from commands import (
    BACKEND,
    alike,
    check_rollouts_in_a_cuda_graph,
    check_updates_in_a_cuda_graph,
    fourth_order,
    learner,
    on,
    plain,
    rotated,
    without_speed,
)

import ernie_qcombo as script
from envs import perturb, robustness, runs, traffic
from ernie_qcombo import Args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = dict(num_envs=2, horizon=40, warmup=10, rollout_steps=10, updates_per_rollout=2, buffer_size=80, batch_size=16)
SMALL |= dict(hidden_size=16, reg_batch_size=8, total_timesteps=120, log_interval=60, checkpoint_interval=40)
SMALL |= dict(model="krauss", compile=False, eval_episodes=2, eval_warmup=2, eval_seconds=3, wandb_mode="disabled")
SMALL |= dict(regularizer="stackelberg", reg_coef=0.1, epsilon=0.1, epsilon_units="std", attack_steps=3)
FORMS = ["joint", "action_in"]


def tiny(num_lights=3, width=4, **options):
    """(args, env, nets, batch with noise): two seeds, random networks far from linear and random data in float64. The
    last observation of light 0 does not vary; env has only what losses ask for."""
    torch.set_default_dtype(torch.float64)
    small = SMALL | dict(num_seeds=2, hidden_size=5, batch_size=6, reg_batch_size=4, activation="tanh", attack_lr=None)
    args = Args(**(small | dict(global_q="joint", rows=1, cols=num_lights) | options))
    everything, cpu = torch.ones(num_lights, width, dtype=torch.bool), torch.device("cpu")
    env = SimpleNamespace(num_agents=num_lights, obs_mask=everything, cooperators=everything[:, 0], device=cpu)
    env.rows, env.cols, env.dtype, env.discrete = 1, num_lights, torch.float64, True
    env.action_sizes = (2,) * num_lights
    nets, _ = script.make_nets(env, args)
    streams = script.envs.make_generators(3, 2, "test", cpu)
    normal = partial(script.envs.per_seed, torch.randn, generators=streams)
    for name in ("local", "global", "local_target", "global_target"):
        flat = nets[name].flat
        flat.detach().mul_(3).add_(0.1 * normal(flat.view(2, -1, flat.shape[1]).shape[1:]).flatten(0, 1))
        flat.requires_grad_(not name.endswith("_target"))
    S, N, M = 2, num_lights, args.batch_size
    std = script.envs.per_seed(torch.rand, (N, width), streams) + 0.5
    std[:, 0, -1] = 0
    batch = {name: normal((N, M, width)) * (std > 0)[:, :, None] for name in ("obs", "next_obs")}
    batch |= {"actions": (normal((M, N)) > 0).long().transpose(1, 2), "rewards": normal((N, M))}
    batch["terminated"] = (torch.arange(S * M).view(S, M) % 3 == 0).double()
    nets["normalizer"].flat.copy_(torch.stack([normal((N, width)), std], 2))
    batch |= script.draw_noise(streams, env, args)
    env.obs_mask, env.cooperators, env.device = everything.to(DEVICE), everything[:, 0].to(DEVICE), DEVICE
    return args, env, on(DEVICE, nets), on(DEVICE, batch)


def global_value(net, row, state, joint, args):
    """Q(s, a) of state [N * O] and a list of actions."""
    if args.global_q == "joint":
        return plain(net, row, state)[sum(a * 2**i for i, a in enumerate(joint))]
    return plain(net, row, torch.cat([state, torch.tensor(joint, dtype=state.dtype, device=state.device)]))[0]


def losses_by_hand(nets, batch, args, s):
    """Local, global and consistency loss of seed s, a light and a sample at a time; targets are numbers."""
    N, M = batch["obs"].shape[1:3]
    totals = {"losses/local": 0.0, "losses/global": 0.0, "losses/consistency": 0.0}
    share = 1 / N if args.team_reward == "mean" else 1
    for m in range(M):
        joint, rewards = batch["actions"][s, :, m].tolist(), (args.reward_scale * batch["rewards"][s, :, m]).tolist()
        goes_on = args.gamma * (1 - batch["terminated"][s, m].item())
        greedy, sum_q = [], 0.0
        for n in range(N):
            next_obs = batch["next_obs"][s, n, m]
            greedy.append(plain(nets["local"], s * N + n, next_obs).argmax().item())
            best = plain(nets["local_target"], s * N + n, next_obs).max().item()
            q = plain(nets["local"], s * N + n, batch["obs"][s, n, m])[joint[n]]
            sum_q = sum_q + q
            totals["losses/local"] += 0.5 * (q - rewards[n] - goes_on * best) ** 2 / (N * M)
        state, next_state = (torch.cat([*batch[name][s, :, m]]) for name in ("obs", "next_obs"))
        next_team_q = global_value(nets["global_target"], s, next_state, greedy, args).item()
        target = share * sum(rewards) + goes_on * next_team_q
        team_q = global_value(nets["global"], s, state, joint, args)
        totals["losses/global"] += 0.5 * (team_q - target) ** 2 / M
        totals["losses/consistency"] += 0.5 * (team_q - share * sum_q) ** 2 / M
    return totals


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("team_reward", ["mean", "sum"])
def test_losses_and_their_gradient_by_hand(form, team_reward):
    args, _, nets, batch = tiny(
        global_q=form, team_reward=team_reward, gamma=0.9, consistency_coef=0.7, regularizer="none", reward_scale=0.5
    )
    trained = [nets[name] for name in ("local", "global", "local_target", "global_target")]
    for net in trained:
        net.flat.requires_grad_()
    loss, metrics = script.qcombo_loss(nets, batch, args)
    seeds = [losses_by_hand(nets, batch, args, s) for s in range(2)]
    for name in seeds[0]:
        torch.testing.assert_close(metrics[name], torch.stack([parts[name] for parts in seeds]).detach())
    expected = sum(p["losses/local"] + p["losses/global"] + 0.7 * p["losses/consistency"] for p in seeds)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    flats = [net.flat for net in trained]
    ours, theirs = (torch.autograd.grad(value, flats, allow_unused=True) for value in (loss, expected))
    assert ours[2:] == theirs[2:] == (None, None)  # the targets
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-9, atol=1e-12)


REGULARIZED = dict(regularize="both", reg_coef=0.3, action_reg_coef=0.2, malicious_agents=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [dict(regularizer="none"), REGULARIZED], ids=["qcombo", "ernie"])
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_gradient_of_the_complete_loss(form, options, activation):
    """Targets are functions of the target networks and of greedy actions, which a small step does not change."""
    args, _, nets, batch = tiny(global_q=form, activation=activation, **options)
    loss, metrics = script.qcombo_loss(nets, batch, args)
    assert sum(name.startswith("ernie/") for name in metrics) == (3 if "regularize" in options else 0)
    gradients = torch.autograd.grad(loss, [nets["local"].flat, nets["global"].flat])
    for name, grad in zip(("local", "global"), gradients):
        flat, used = nets[name].flat, grad.abs().flatten().topk(grad.numel() // 2).indices
        for index in used[:: len(used) // 6].tolist():

            def moved(step, name=name, flat=flat, index=index):
                other = flat.detach().clone()
                other.view(-1)[index] += step
                other = nets | {name: dataclasses.replace(nets[name], flat=other)}
                return script.qcombo_loss(other, batch, args)[0].item()

            assert grad.flatten()[index].item() == pytest.approx(fourth_order(moved), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_joint_values_of_every_joint_action(form):
    args, _, nets, batch = tiny(global_q=form)
    every = list(itertools.product([0, 1], repeat=3))
    joint = torch.tensor(every, device=DEVICE).expand(2, 6, -1, -1)
    x = batch["obs"].transpose(1, 2).flatten(2).unsqueeze(1)
    values = script.joint_values(nets["global"], x)(joint)
    for s, m in itertools.product(range(2), range(6)):
        expected = [global_value(nets["global"], s, x[s, 0, m], actions, args) for actions in every]
        torch.testing.assert_close(values[s, m], torch.stack(expected))
    assert values.unique().numel() == values.numel()


def worst_joint(score, joint, num_changed):
    """Light by light, the flip with the largest score of those not yet taken."""
    taken = []
    for _ in range(min(num_changed, len(joint))):
        options = [n for n in range(len(joint)) if n not in taken]
        taken.append(max(options, key=lambda n: score([a ^ (i in [*taken, n]) for i, a in enumerate(joint)])))
    return [a ^ (i in taken) for i, a in enumerate(joint)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_changed", [1, 2, 4])
def test_malicious_actions_against_brute_force(form, num_changed):
    args, _, nets, batch = tiny(num_lights=4, global_q=form)
    x, actions = script.everybody(batch["obs"]), batch["actions"].transpose(1, 2)
    found = script.greedy_changes(script.joint_values(nets["global"], x), actions, num_changed)
    for s, m in itertools.product(range(2), range(6)):
        joint = batch["actions"][s, :, m].tolist()

        def change(other, s=s, state=x[s, 0, m], joint=joint):
            a, b = (global_value(nets["global"], s, state, actions, args).item() for actions in (other, joint))
            return (a - b) ** 2

        assert found[s, m].tolist() == worst_joint(change, joint, num_changed)
        if num_changed == 1:
            near = [o for o in itertools.product([0, 1], repeat=4) if sum(a != b for a, b in zip(o, joint)) == 1]
            assert change(found[s, m].tolist()) == max(map(change, near))
    assert ((found != actions).sum(-1) == num_changed).all()
    assert num_changed == 4 or len((found != actions).flatten(0, 1).unique(dim=0)) > 3


@pytest.mark.parametrize("form", FORMS)
def test_action_regularizer_moves_the_global_network_alone(form):
    gradients = []
    for coef in (0.0, 0.4):
        args, _, nets, batch = tiny(global_q=form, regularizer="none", action_reg_coef=coef)
        loss, metrics = script.qcombo_loss(nets, batch, args)
        gradients.append(torch.autograd.grad(loss, [nets["local"].flat, nets["global"].flat]))
    assert torch.equal(gradients[0][0], gradients[1][0])
    expected = []
    for s in range(2):
        for m in range(6):
            value = partial(global_value, nets["global"], s, torch.cat([*batch["obs"][s, :, m]]), args=args)
            joint = batch["actions"][s, :, m].tolist()
            worst = worst_joint(lambda a, v=value, joint=joint: (v(a) - v(joint)).square().item(), joint, 1)
            expected.append((value(worst) - value(joint)).square() / 6)
    torch.testing.assert_close(metrics["ernie/action_regularizer"].sum(), sum(expected).detach())
    (grad,) = torch.autograd.grad(0.4 * sum(expected), [nets["global"].flat])
    torch.testing.assert_close(gradients[1][1] - gradients[0][1], grad, rtol=1e-8, atol=1e-12)


def regularize(kind, nets, batch, args, mode=None):
    """R [S, N, R], delta and the perturbed input of "local" or "global" Q-functions."""
    network, obs, unit = script.perturbable(kind, nets, batch, args)
    seen = []

    def watched(x):
        seen.append(x)
        return network(x)

    args = dataclasses.replace(args, regularizer=mode or args.regularizer)
    return *script.regularizer(watched, obs, network(obs), batch[f"{kind}_noise"], unit, args), seen[-1]


CASES = [("local", "joint", "l2"), ("local", "joint", "kl"), ("local", "joint", "l2_probs")]
CASES += [("global", "joint", "l2"), ("global", "action_in", "l2")]


@pytest.mark.parametrize("kind,form,divergence", CASES)
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("steps", [1, 3])
def test_hypergradient_is_the_derivative_of_the_whole_unroll(kind, form, divergence, norm, steps):
    options = dict(regularize=kind, global_q=form, divergence=divergence, norm=norm, attack_steps=steps, epsilon=0.3)
    args, _, nets, batch = tiny(**options)
    flat = nets[kind].flat

    def mean_reg(flat, mode=None):
        others = nets | {kind: dataclasses.replace(nets[kind], flat=flat)}
        return regularize(kind, others, batch, args, mode)[0].mean(2).sum()

    direction = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    whole, leader = (torch.autograd.grad(mean_reg(flat, m), flat)[0] for m in ("stackelberg", "adversarial"))
    measured = fourth_order(lambda step: mean_reg((flat + step * direction).detach()).item())
    assert (whole * direction).sum().item() == pytest.approx(measured, rel=1e-6)
    assert abs((leader * direction).sum().item() - measured) > 1e-4 * abs(measured)  # the leader alone would fail
    _, delta, _ = regularize(kind, nets, batch, args)
    network, obs, scale = script.perturbable(kind, nets, batch, args)
    change = script.divergence(divergence, network(obs + scale * delta.detach()), network(obs)).mean(2).sum()
    torch.testing.assert_close(leader, torch.autograd.grad(change, flat)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["local", "global"])
@pytest.mark.parametrize("units", ["std", "raw"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_perturbation_is_in_the_ball_and_beats_a_random_direction(kind, units, norm):
    args, _, nets, batch = tiny(width=8, regularize=kind, epsilon_units=units, norm=norm, epsilon=0.2)
    std = torch.tensor([2.0, 0.5, 0.0], device=DEVICE)
    expected = {"raw": [0.5, 2.0, 0.0], "std": [1.0, 1.0, 0.0]}[units]  # what one unit is after normalisation
    assert script.Normalizer(std.expand(1, 1, 2, 3)).unit(units).flatten().tolist() == expected
    _, obs, scale = script.perturbable(kind, nets, batch, args)
    assert (scale == 0).sum() == 2 and (units == "raw" or scale.unique().tolist() == [0, 1])
    order, values = math.inf if norm == "linf" else 2, {}
    for mode in ("random", "adversarial", "stackelberg"):
        values[mode], delta, seen = regularize(kind, nets, batch, args, mode)
        moved = torch.where(scale > 0, (seen - obs[:, :, :4]) / scale, seen - obs[:, :, :4])
        torch.testing.assert_close(moved, delta)
        assert (delta[(scale == 0).expand_as(delta)] == 0).all()
        length = torch.linalg.vector_norm(delta, order, dim=-1)
        assert length.max() <= 0.2 * (1 + 1e-9) and (mode != "random" or length.min() > 0.1999)
    assert values["adversarial"].mean() > 1.3 * values["random"].mean()
    torch.testing.assert_close(values["adversarial"], values["stackelberg"])


def adam(nets):
    return {"q": torch.optim.Adam([nets["local"].flat, nets["global"].flat], 0.01)}


def two_updates(**options):
    args, _, nets, batch = tiny(**(dict(regularize="both") | options))
    optimizers = adam(nets)
    for _ in range(2):
        metrics = script.update(nets, optimizers, script.qcombo_loss, batch, args)
    return args, nets, metrics, batch


def test_switched_off_regularizer_is_qcombo():
    _, reference, *_ = two_updates(regularizer="none")
    regularized = two_updates()
    for name in ("local", "global"):
        assert not torch.equal(regularized[1][name].flat, reference[name].flat)
    for off in (dict(reg_coef=0.0), dict(attack_steps=0), dict(epsilon=0.0)):
        args, nets, metrics, batch = two_updates(**off)
        assert not args.regularized and not any("noise" in name for name in batch)
        assert not any(name.startswith("ernie") for name in metrics)
        assert all(torch.equal(nets[name].flat, reference[name].flat) for name in nets)


def test_gaussian_mode_has_mean_length_epsilon():
    args, _, nets, batch = tiny(epsilon=0.4)
    noise = script.envs.per_seed(torch.randn, (3, 4000, 4), script.envs.make_generators(1, 2, "x", DEVICE))
    repeated = batch | {"obs": batch["obs"].repeat(1, 1, 1000, 1)[:, :, :4000], "local_noise": noise}
    args = dataclasses.replace(args, reg_batch_size=4000)
    _, delta, _ = regularize("local", nets, repeated, args, "gaussian")
    length = delta.norm(dim=-1).mean(2)
    torch.testing.assert_close(length, torch.full_like(length, 0.4), rtol=0.03, atol=0)  # with a dead entry too


def test_clipping_and_targets_of_an_update():
    args, _, nets, batch = tiny(max_grad_norm=0.01, tau=0.25)
    before = {name: net.flat.detach().clone() for name, net in nets.items()}
    optimizers = {"q": torch.optim.SGD([nets["local"].flat, nets["global"].flat], 1.0)}
    script.update(nets, optimizers, script.qcombo_loss, batch, args)
    for name in ("local", "global"):
        step = (nets[name].flat - before[name]).norm(dim=1)
        torch.testing.assert_close(step, torch.full_like(step, 0.01))  # each network of each seed on its own
        target = before[name + "_target"] + 0.25 * (nets[name].flat - before[name + "_target"])
        torch.testing.assert_close(nets[name + "_target"].flat, target)


@pytest.mark.slow
def test_compiled_loss_has_the_eager_gradients():
    args, _, nets, batch = tiny(global_q="action_in", attack_steps=1, action_reg_coef=0.2)
    gradients = []
    for function in (script.qcombo_loss, torch.compile(script.qcombo_loss, fullgraph=True, backend=BACKEND)):
        value, _ = function(nets, batch, args)
        gradients.append(torch.autograd.grad(value, [nets["local"].flat, nets["global"].flat]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)


def test_other_seeds_do_not_see_a_seeds_data():
    options = dict(regularize="both", action_reg_coef=0.2)
    results = []
    for bump in (0.0, 1.0):
        args, _, nets, batch = tiny(**options)
        for name in ("obs", "next_obs", "rewards"):
            batch[name][0] += bump
        metrics = script.update(nets, adam(nets), script.qcombo_loss, batch, args)
        results.append(
            [*(nets[name].flat.detach().view(2, -1) for name in ("local", "global", "local_target")), *metrics.values()]
        )
    for a, b in zip(*results):
        assert not torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# -------------------------------------------------------------------------------------- normalisation, replay, rollout


def test_normalized_observations_have_mean_0_and_variance_1_per_seed_and_light():
    args = Args(**(SMALL | dict(num_seeds=2, batch_size=50, reward_scale=0.5)))
    env = script.make_env(args, 2, DEVICE)
    replay = script.make_replay(env, 2, 102, 10)
    streams = script.envs.make_generators(0, 2, "test", DEVICE)
    draw = partial(script.envs.per_seed, generators=streams)
    scale = torch.arange(1, 2 * 4 * 22 + 1, device=DEVICE).view(2, 1, 1, 4, 22)  # all different
    replay["obs"][:] = scale * (draw(torch.randn, replay["obs"].shape[1:]) + 3)
    replay["obs"][..., 5], replay["obs"][1, :, :, 2, 7] = 0.1, 1.0  # never vary
    replay["obs"][:, 100:] = 1e6  # not filled yet
    replay["obs"][:, :, -1] = -1e6  # the last observation of a rollout is the first of the next one
    normalizer = script.Normalizer(torch.zeros(2, 4, 2, 22, device=DEVICE))
    normalizer.measure(replay["obs"][:, :100, :-1])
    x = normalizer(replay["obs"][:, :100, :-1].flatten(1, 2).transpose(1, 2))  # [S, N, M, O]
    live = torch.ones(2, 4, 22, dtype=torch.bool, device=DEVICE)
    live[..., 5] = live[1, 2, 7] = False
    mean, std = x.double().mean(2), x.double().std(2, correction=0)
    assert mean.abs().max() < 1e-5 and (std[live] - 1).abs().max() < 1e-4
    assert (x.transpose(2, 3)[~live] == 0).all() and (normalizer.flat[:, :, 1][~live] == 0).all()
    assert normalizer(1e9 * torch.ones_like(x)).max() == 10 and normalizer(-1e9 * torch.ones_like(x)).min() == -10
    slope = torch.func.grad(lambda obs: normalizer(obs).sum())(replay["obs"][:, 0].transpose(1, 2))
    assert slope.isfinite().all() and (slope.transpose(2, 3)[~live] == 0).all()
    replay["actions"][:] = draw(torch.rand, replay["rewards"].shape[1:]) < 0.5
    replay["rewards"][:] = replay["obs"][:, :, :-1, :, 0] + 1e4 * replay["actions"]
    batch = script.sample(replay, 100, normalizer, args, script.envs.make_generators(1, 2, "test", DEVICE))
    assert batch["obs"].shape == (2, 4, 50, 22) and batch["actions"].unique().tolist() == [0, 1]
    first = (batch["rewards"] - 1e4 * batch["actions"])[..., None]
    first = script.Normalizer(normalizer.flat[..., :1])(first).squeeze(3)  # the same observation, normalised
    torch.testing.assert_close(batch["obs"][..., 0], first, rtol=1e-2, atol=1e-2)


def test_next_observation_follows_the_observation():
    args = Args(**(SMALL | dict(batch_size=500)))
    env = script.make_env(args, 2, DEVICE)
    replay = script.make_replay(env, 1, 20, 10)
    marks = torch.arange(20 * 11, device=DEVICE, dtype=torch.float32).view(1, 20, 11, 1, 1)
    replay["obs"] += marks
    replay["rewards"] += marks[:, :, :-1, :, 0]
    streams = script.envs.make_generators(0, 1, "test", DEVICE)
    plainly = script.Normalizer(torch.tensor([0.0, 100.0], device=DEVICE)[:, None].expand(1, 4, 2, 22))
    batch = script.sample(replay, 8, plainly, args, streams)
    torch.testing.assert_close(batch["next_obs"], batch["obs"] + 0.01)
    torch.testing.assert_close(100 * batch["obs"][..., 0], batch["rewards"])
    assert len(batch["rewards"].unique()) > 70 and batch["rewards"].max() < 8 * 11


def test_rollout_is_random_switching_then_greedy_or_random_lights():
    small = SMALL | dict(num_envs=20, rollout_steps=20, warmup=20, total_timesteps=800, buffer_size=400)
    args = Args(**(small | dict(num_seeds=2)))
    env = script.make_env(args, 40, DEVICE)
    nets, _ = script.make_nets(env, args)
    streams = script.envs.make_generators(0, 2, "test", DEVICE)
    nets["normalizer"].flat[:, :, 1] = 10
    state, obs = env.reset(streams)
    for t, random in ((0, 0.0), (20, 0.0), (40, 0.5)):
        draws = script.draw_rollout(env, t, random, streams, args)
        state, episodes = script.rollout(env.step, env, nets, state, draws)
        assert torch.equal(episodes["obs"][:, :, 0].flatten(0, 1), obs)
        obs = env.observe(state)
        assert torch.equal(episodes["obs"][:, :, -1].flatten(0, 1), obs)
        torch.testing.assert_close(episodes["reward"], episodes["rewards"].sum(3))
        action = episodes["actions"]  # [S, E, T, N]
        x = nets["normalizer"](episodes["obs"][:, :, :-1].flatten(1, 2).transpose(1, 2))
        greedy = nets["local"](x).argmax(-1).transpose(1, 2).view_as(action)
        assert 0 < greedy.float().mean() < 1
        if t == 0:
            switches = action.float().mean((0, 1, 3))
            assert switches.nonzero().flatten().tolist() == [0, 10] and (switches[[0, 10]] - 0.5).abs().max() < 0.15
        else:
            assert (action != greedy).float().mean().item() == pytest.approx(random / 2, abs=0.03)


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("trained,tested", [((2, 2), (4, 4)), ((2, 2), (2, 2)), ((1, 3), (3, 4))])
def test_tiled_lights_act_as_those_that_were_trained(trained, tested):
    args = Args(**(SMALL | dict(num_seeds=2, rows=trained[0], cols=trained[1])))
    small = script.make_env(args, 2, DEVICE)
    large = script.make_env(args, 2, DEVICE, env_id="traffic_grid_v0", rows=tested[0], cols=tested[1])
    nets, _ = script.make_nets(small, args)
    streams = script.envs.make_generators(0, 2, "test", DEVICE)
    nets["normalizer"].flat.copy_(script.envs.per_seed(torch.rand, (small.num_agents, 2, 22), streams) + 0.1)
    obs = 2 * script.envs.per_seed(torch.randn, (small.num_agents, 30, 22), streams)  # [S, N, B, O]
    cells = list(itertools.product(range(tested[0]), range(tested[1])))  # row-major from the bottom left
    twin = torch.tensor([r % trained[0] * trained[1] + c % trained[1] for r, c in cells], device=DEVICE)
    theirs = script.trained_policy(nets, small, args).act(obs).argmax(-1)
    ours = script.trained_policy(nets, large, args).act(obs[:, twin]).argmax(-1)
    assert torch.equal(ours, theirs[:, twin]) and 0 < theirs.float().mean() < 1
    other = script.trained_policy(nets, small, args).act(obs.flip(1)).argmax(-1)
    assert not torch.equal(other.flip(1), theirs)  # the lights differ


def drivers(num_episodes=3000, **options):
    """(args, policy, nets, raw obs [S, N, B, O], play, greedy): 3 lights of two seeds, one entry does not vary."""
    args, env, nets, _ = tiny(**options)
    streams = script.envs.make_generators(5, 2, "test", DEVICE)
    mean, std = nets["normalizer"].flat[:, :, None].unbind(3)
    obs = mean + std * script.envs.per_seed(torch.randn, (3, num_episodes, 4), streams)
    policy = script.trained_policy(nets, env, args)
    flat = obs.transpose(1, 2).flatten(0, 1)

    def play(perturbation, strength):
        action = robustness.act(env, policy, flat, perturbation, strength, streams)
        return action.unflatten(0, (2, -1))  # [S, B, N]

    return args, policy, nets, obs, play, play("clean", 0.0)


def test_flipped_actions_are_as_many_as_asked_for():
    *_, play, greedy = drivers()
    one, each = (play(name, 0.3) != greedy for name in ("flip_one", "flip_each"))
    assert one.sum(-1).max() == 1 and one.any(-1).double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (one.double().mean((0, 1)) - 0.1).abs().max() < 0.02  # no light is preferred
    assert (each.double().mean((0, 1)) - 0.3).abs().max() < 0.03
    assert (each.sum(-1) == 3).double().mean().item() == pytest.approx(0.027, abs=0.01)  # independent
    for name in ("flip_one", "flip_each", "worst_one"):
        assert torch.equal(play(name, 0.0), greedy)


@pytest.mark.parametrize("form", FORMS)
def test_worst_action_is_the_one_that_the_global_q_likes_less(form):
    args, _, nets, obs, play, greedy = drivers(100, global_q=form)
    found = play("worst_one", 1.0)
    changed = (found != greedy).sum(-1)
    assert changed.max() == 1 and 0.2 < changed.double().mean() < 0.8
    x = nets["normalizer"](obs).transpose(1, 2).flatten(2)
    spared = 0
    for s, e in itertools.product(range(2), range(100)):
        value = partial(global_value, nets["global"], s, x[s, e], args=args)
        before = value(greedy[s, e].tolist())
        if changed[s, e]:
            assert value(found[s, e].tolist()) < before
        else:  # some flip does no harm, or the chosen light would have changed
            flips = greedy[s, e] ^ torch.eye(3, dtype=torch.int64, device=DEVICE)
            spared += 1
            assert any(value(flip) >= before for flip in flips.tolist())
    assert spared


@pytest.mark.parametrize("norm_order", ["l2", "linf"])
def test_worst_observations_are_in_the_ball_and_worse_than_random_ones(norm_order):
    """In standard deviations, whatever the unit of training was."""
    args, policy, nets, obs, _, _ = drivers(200, eval_norm=norm_order, epsilon_units="raw")
    unit = std = nets["normalizer"].flat[:, :, 1:]
    torch.testing.assert_close(policy.unit, unit)
    env = SimpleNamespace(obs_mask=torch.ones(3, 4, dtype=torch.bool, device=DEVICE), discrete=True)
    env.cooperators = env.obs_mask[:, 0]
    streams = script.envs.make_generators(7, 2, "test", DEVICE)
    q = policy.output(obs)
    direction = script.envs.per_seed(torch.randn, obs.shape[1:], streams) * (std > 0)
    random = obs + unit * perturb.rescale(direction, 0.5, norm_order)

    def own_value(seen):
        return q.gather(3, policy.act(seen).argmax(-1, keepdim=True)).mean().item()

    for attack in ("mad", "critic"):
        seen = robustness.worst_observations(env, policy, attack, obs, 0.5, streams)
        delta = torch.where(unit > 0, (seen - obs) / unit, seen - obs)
        length = perturb.length(delta, norm_order)
        assert length.max() <= 0.5 * (1 + 1e-9) and length.mean() > 0.4
        assert (delta[(unit == 0).expand_as(delta)] == 0).all()
        if attack == "mad":
            change, at_random = (policy.divergence(policy.output(x), q).mean() for x in (seen, random))
            assert change > 1.3 * at_random
        else:
            assert own_value(obs) - own_value(seen) > 1.3 * (own_value(obs) - own_value(random)) > 0


def lights_of(args, nets):
    return script.make_lights(nets, args, DEVICE, args.eval_episodes, math.inf)


def test_each_point_of_a_sweep_has_its_own_traffic():
    args = Args(**(SMALL | dict(num_seeds=2, eval_seconds=20, flow=tuple(range(100, 900, 100)))))
    nets, _ = script.make_nets(script.make_env(args, 1, DEVICE), args)
    nets["normalizer"].flat[:] = 1
    lights = lights_of(args, nets)
    points = [("clean", 0.0), ("speed", 30.0), ("flow", 3)]
    env = traffic.side_by_side(lights.make_env(12), points, 2)
    assert env.warmup == 2 and env.horizon == 20 and env.num_envs == 12 and env.model == "krauss"
    assert env.speed.tolist() == 2 * [35.0, 35.0, 30.0, 30.0, 35.0, 35.0]
    own, third = list(args.flow), list(traffic.FLOWS["flow3"])
    assert env.inflow.T.tolist() == 2 * [own, own, own, own, third, third]
    points = [("clean", 0.0), ("flip_each", 1.0), ("flip_each", 0.0), ("speed", 35.0)]
    rewards = robustness.drive(lights, points, "test")["reward"]  # [S, P, E]
    for place in (2, 3):
        torch.testing.assert_close(rewards[:, place], rewards[:, 0])  # the same traffic at every point
    assert rewards.shape == (2, 4, 2) and (rewards[:, 1] != rewards[:, 0]).all()
    for name, rows, num_lights in (("irregular", 2, 4), ("4x4", 4, 16), ("6x6", 6, 36), ("atlanta", 4, 16)):
        env = lights.make_env(4, **robustness.NETWORKS[name])
        assert (env.rows, env.num_agents, env.num_envs) == (rows, num_lights, 4)


METRICS = "reward queue wait delay emergency switch passed left_per_minute backlog".split()


def test_report_has_every_point_and_the_fixed_cycles(tmp_path, capsys):
    args = Args(**(SMALL | dict(num_seeds=2)))
    nets, _ = script.make_nets(script.make_env(args, 1, DEVICE), args)
    nets["normalizer"].flat[:] = 1
    run = runs.Run(tmp_path, [{"seed": seed} for seed in args.seeds])
    labels = {"env_id": args.env_id, "policy": "stackelberg"}
    robustness.report_lights(lights_of(args, nets), robustness.LIGHTS, robustness.NETWORKS, run, labels, "robustness")
    rows, out = runs.read_rows(tmp_path / "robustness.csv"), capsys.readouterr().out
    columns = ["env_id", "policy", "seed", "perturbation", "strength", "episodes", *METRICS, "standard_error"]
    assert list(rows[0]) == columns and (tmp_path / "robustness.png").stat().st_size > 0
    swept = {("clean", "0.0"), *((name, str(s)) for name in robustness.LIGHTS for s in robustness.LIGHTS[name])}
    swept |= {("network", name) for name in robustness.NETWORKS} | {("worst_case", "0.1"), ("worst_case", "0.3")}
    changed = {point for point in swept if point[0] in ("clean", "speed", "flow", "network")}
    worst = {(r["seed"], r["strength"]): float(r["reward"]) for r in rows if r["perturbation"] == "worst_case"}
    for row in rows:
        if row["perturbation"] in ("mad", "executed", "critic"):
            assert worst[row["seed"], row["strength"]] <= float(row["reward"])
    expected = [("stackelberg", ["1", "2"], swept)] + [(name, ["1"], changed) for name in robustness.SIGNALS]
    for policy, seeds, points in expected:
        for seed in seeds:
            found = [r for r in rows if (r["policy"], r["seed"]) == (policy, seed)]
            assert {(r["perturbation"], r["strength"]) for r in found} == points and len(found) == len(points)
    for row in rows:
        assert row["episodes"] == "2" and all(math.isfinite(float(row[name])) for name in METRICS)
        assert float(row["reward"]) == pytest.approx(sum(float(row[name]) for name in traffic.TERMS), abs=1e-3)
    assert all(name in out and strength in out for name, strength in swept)


def test_fixed_cycles_are_the_lights_own_rewards():
    """Each alone and beside the other."""
    args = Args(**(SMALL | dict(eval_warmup=60, eval_seconds=120)))
    nets, _ = script.make_nets(script.make_env(args, 1, DEVICE), args)
    lights = dataclasses.replace(lights_of(args, nets), make_policy=None, seeds=[1, 1])
    both = robustness.drive(lights, [("clean", 0.0), ("speed", 30.0)], "evaluation")["reward"]
    assert (both[0] != both[1]).all()
    for k, signal in enumerate(robustness.SIGNALS.values()):
        env = traffic.side_by_side(lights.make_env(4), [("clean", 0.0), ("speed", 30.0)], 1)
        streams = [script.envs.make_generators(1, 1, "evaluation", DEVICE)[0] for _ in range(2)]
        found = traffic.simulate(env, env.step, lambda state, obs: signal(env, state), streams)["reward"]
        torch.testing.assert_close(found.view(2, 2), both[k])


# ---------------------------------------------------------------------------------------------------------------- runs


def short_train(tmp_path, name, **options):
    args = Args(**(SMALL | options))
    env = script.make_env(args, args.num_seeds * args.num_envs, DEVICE, horizon=args.horizon)
    nets, optimizers = script.make_nets(env, args)
    run = runs.Run(tmp_path / name, [{"seed": seed} for seed in args.seeds])
    run.dir.mkdir()
    script.train(env, nets, optimizers, args, run, {})
    return args, nets, run.rows


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(regularize="both"), dict(global_q="action_in", action_reg_coef=0.1)])
def test_a_seed_does_not_depend_on_the_others(tmp_path, options):
    _, together, rows = short_train(tmp_path, "together", seed=5, num_seeds=2, **options)
    for k in range(2):
        _, alone, own = short_train(tmp_path, f"alone{k}", seed=5 + k, **options)
        for name in alone:
            assert alike(alone[name].flat, together[name].flat.unflatten(0, (2, -1))[k].view_as(alone[name].flat))
        assert alike(without_speed(own), without_speed([row for row in rows if row["seed"] == 5 + k]))


MODES = [
    *(dict(regularizer=m) for m in ("none", "gaussian", "random", "adversarial", "stackelberg")),
    dict(regularizer="gaussian", regularize="global", model="idm"),
    dict(regularize="global", norm="linf", epsilon_units="raw", activation="silu", flow=("flow3",)),
    dict(regularize="both", global_q="action_in", action_reg_coef=0.1, malicious_agents=4),
    dict(rows=1, cols=3, divergence="kl", global_q="action_in", team_reward="sum", flow=(700.0,), activation="tanh"),
    dict(rows=1, cols=3, divergence="l2_probs", action_reg_coef=0.1, tau=1.0, flow=tuple(range(0, 800, 100))),
    dict(env_id="traffic_irregular_v0", num_seeds=2, attack_steps=1, anneal_lr=False),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", MODES)
def test_every_option_trains(tmp_path, options):
    args, nets, rows = short_train(tmp_path, "run", **options)
    assert [row["global_step"] for row in rows] == [s for s in (60, 120) for _ in range(args.num_seeds)]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    fresh, _ = script.make_nets(script.make_env(args, 1, DEVICE), args)
    assert all((nets[name].flat != fresh[name].flat).flatten(1).any(1).all() for name in nets)


@pytest.mark.slow
def test_learns_to_serve_the_street_with_most_cars(tmp_path):
    """One light, nine times as many cars from north and south as from east and west: random switching has -28, 27 s of
    green for each -14, these 900 small updates -7 to -1."""
    options = dict(rows=1, cols=1, flow=(900.0, 900.0, 100.0, 100.0), num_envs=8, horizon=300, warmup=100)
    options |= dict(total_timesteps=4800, updates_per_rollout=16, buffer_size=10_000, batch_size=64, reg_batch_size=32)
    options |= dict(hidden_size=32, learning_rate=2e-3, gamma=0.97, log_interval=10_000)
    *_, rows = short_train(tmp_path, "run", **options)
    assert rows[-1]["eval/reward"] > -11


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "words,options",
    [
        ("rows", dict(rows=10**6)),
        ("cols", dict(cols=65)),
        ("flow", dict(flow=(1e30,))),
        ("flow", dict(flow=(-1.0,))),
        ("flow", dict(flow=("flow9",))),
        ("--flow must be a name, or numbers", dict(flow=("flow1", "flow2"))),
        ("--malicious-agents must be at most the number of lights, 4", dict(malicious_agents=5)),
        ("--warmup must be below --horizon", dict(warmup=40)),
        ("--warmup must be a multiple of --rollout-steps", dict(warmup=15)),
        ("--horizon must be a multiple of --rollout-steps", dict(horizon=45)),
        ("--total-timesteps must be above --warmup times --num-envs", dict(total_timesteps=20)),
        ("--buffer-size must be at least", dict(buffer_size=19)),
        ("--backend must be torch", dict(backend="sumo")),
        ("--global-q must be action_in with more than 12 lights", dict(rows=4, cols=4, global_q="joint")),
        ("--divergence must be l2", dict(global_q="action_in", regularize="both", divergence="kl")),
        ("updates_per_rollout", dict(updates_per_rollout=0)),
    ],
)
def test_values_that_do_not_go_together_are_named(words, options):
    with pytest.raises(ValueError, match=words):
        Args(**(SMALL | options))


@pytest.mark.parametrize("options", [dict(flow=(1.0, 2.0, 3.0)), dict(rows=1, flow=("flow1",))])
def test_a_flow_for_other_streets_is_named(options):
    with pytest.raises(ValueError, match="flow must have [68] entries"):
        script.make_env(Args(**(SMALL | options)), 1, DEVICE)


@pytest.mark.parametrize(
    "options", [dict(regularizer="none"), dict(), dict(action_reg_coef=0.1), dict(global_q="action_in")]
)
def test_updates_in_a_cuda_graph_are_those_without(options, monkeypatch):
    args, env, nets, batch = tiny(**options)
    learners = [learner(script, nets, env, args) for _ in range(2)]
    check_updates_in_a_cuda_graph(learners, rotated(batch, 6, 9), DEVICE, monkeypatch)


@pytest.mark.parametrize("model", ["idm", "krauss"])
def test_rollouts_in_a_cuda_graph_are_those_without(model, monkeypatch):
    args = Args(**(SMALL | dict(num_seeds=2, model=model)))
    env = script.make_env(args, 2 * args.num_envs, DEVICE)
    nets, _ = script.make_nets(env, args)
    nets["normalizer"].flat[:, :, 1] = 10
    streams = script.envs.make_generators(0, 2, "test", DEVICE)
    play = partial(script.rollout, env.step, env, nets)
    state, _ = env.reset(streams)
    draws = []
    for k in range(7):
        draws.append((state, script.draw_rollout(env, 10 * k, 0.5, streams, args)))
        state, _ = play(*draws[-1])
    check_rollouts_in_a_cuda_graph(play, nets, draws, DEVICE, monkeypatch)
