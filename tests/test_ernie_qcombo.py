"""ernie_qcombo.py: losses by hand, gradients against finite differences, searches against brute force, runs."""

import csv
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT, alike, bad_value, finish, fourth_order, on, only, plain, refusal, start_script, without_speed

import ernie_qcombo as script
from envs import traffic
from ernie_qcombo import Args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = dict(num_envs=2, horizon=40, warmup=10, rollout_steps=10, updates_per_rollout=2, buffer_size=80, batch_size=16)
SMALL |= dict(hidden_size=16, reg_batch_size=8, total_timesteps=120, log_interval=60, checkpoint_interval=40)
SMALL |= dict(model="krauss", eval_episodes=2, eval_warmup=2, eval_seconds=3, track=False)
SMALL |= dict(regularizer="stackelberg", reg_coef=0.1, epsilon=0.1, epsilon_units="std", attack_steps=3)
FORMS = ["joint", "action_in"]


@pytest.fixture(autouse=True)
def one_thread_and_float32_afterwards():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more than one wait for each other where a core is busy
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)


def tiny(num_lights=3, width=4, **options):
    """(args, env, nets, batch, noise, unit): two seeds, random networks far from linear and random data in float64.
    The last observation of light 0 does not vary; env has only what losses ask for."""
    torch.set_default_dtype(torch.float64)
    args = Args(**(SMALL | dict(num_seeds=2, hidden_size=5, batch_size=6, reg_batch_size=4, activation="tanh")))
    args = dataclasses.replace(args, attack_lr=None, **(dict(global_q="joint") | options))
    everything, cpu = torch.ones(num_lights, width, dtype=torch.bool), torch.device("cpu")
    env = SimpleNamespace(num_agents=num_lights, obs_mask=everything, cooperators=everything[:, 0], device=cpu)
    nets, _ = script.make_q(env, args)
    streams = script.make_generators(3, 2, "test", cpu)
    normal = partial(script.draw, torch.randn, generators=streams)
    for name, net in nets.items():
        net.flat.detach().mul_(3).add_(0.1 * normal(net.flat.view(2, -1, net.flat.shape[1]).shape[1:]).flatten(0, 1))
        net.flat.requires_grad_(not name.endswith("_target"))
    S, N, M = 2, num_lights, args.batch_size
    std = script.draw(torch.rand, (N, width), streams) + 0.5
    std[:, 0, -1] = 0
    batch = {name: normal((N, M, width)) * (std > 0)[:, :, None] for name in ("obs", "next_obs")}
    batch |= {"joint": (normal((M, N)) > 0).long(), "rewards": normal((N, M))}
    batch["terminated"] = (torch.arange(S * M).view(S, M) % 3 == 0).double()
    unit = script.perturbation_unit(torch.stack([normal((N, width)), std], 2), args)
    noise = script.draw_directions(streams, env, args)
    env = SimpleNamespace(**on(DEVICE, {"obs_mask": everything, "cooperators": everything[:, 0]}))
    env.num_agents, env.device = num_lights, DEVICE
    return args, env, *(on(DEVICE, x) for x in (nets, batch, noise, unit))


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
        joint, rewards = batch["joint"][s, m].tolist(), batch["rewards"][s, :, m].tolist()
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
    args, _, nets, batch, _, unit = tiny(global_q=form, team_reward=team_reward, gamma=0.9, consistency_coef=0.7)
    for net in nets.values():
        net.flat.requires_grad_()
    loss, metrics = script.qcombo_loss(nets, batch, {}, unit, args)
    seeds = [losses_by_hand(nets, batch, args, s) for s in range(2)]
    for name in seeds[0]:
        torch.testing.assert_close(metrics[name], torch.stack([parts[name] for parts in seeds]).detach())
    expected = sum(p["losses/local"] + p["losses/global"] + 0.7 * p["losses/consistency"] for p in seeds)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    flats = [net.flat for net in nets.values()]
    ours, theirs = (torch.autograd.grad(value, flats, allow_unused=True) for value in (loss, expected))
    assert ours[2:] == theirs[2:] == (None, None)  # the targets
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-9, atol=1e-12)


REGULARIZED = dict(regularize="both", reg_coef=0.3, action_reg_coef=0.2, malicious_agents=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [dict(regularizer="none"), REGULARIZED], ids=["qcombo", "ernie"])
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_gradient_of_the_complete_loss(form, options, activation):
    """Targets are functions of the target networks and of greedy actions, which a small step does not change."""
    args, _, nets, batch, noise, unit = tiny(global_q=form, activation=activation, **options)
    loss, metrics = script.qcombo_loss(nets, batch, noise, unit, args)
    assert sum(name.startswith("ernie/") for name in metrics) == (3 if "regularize" in options else 0)
    gradients = torch.autograd.grad(loss, [nets["local"].flat, nets["global"].flat])
    for name, grad in zip(("local", "global"), gradients):
        flat, used = nets[name].flat, grad.abs().flatten().topk(grad.numel() // 2).indices
        for index in used[:: len(used) // 6].tolist():

            def moved(step, name=name, flat=flat, index=index):
                other = flat.detach().clone()
                other.view(-1)[index] += step
                other = nets | {name: script.MLP(other, nets[name].sizes)}
                return script.qcombo_loss(other, batch, noise, unit, args)[0].item()

            assert grad.flatten()[index].item() == pytest.approx(fourth_order(moved), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_joint_values_of_every_joint_action(form):
    args, _, nets, batch, *_ = tiny(global_q=form)
    every = list(itertools.product([0, 1], repeat=3))
    joint = torch.tensor(every, device=DEVICE).expand(2, 6, -1, -1)
    x = batch["obs"].transpose(1, 2).flatten(2).unsqueeze(1)
    values = script.joint_values(nets["global"], x, args)(joint)
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
@pytest.mark.parametrize("num_changed", [1, 2, 5])
def test_malicious_actions_against_brute_force(form, num_changed):
    args, _, nets, batch, *_ = tiny(num_lights=4, global_q=form)
    x = batch["obs"].transpose(1, 2).flatten(2).unsqueeze(1)
    found = script.changed_lights(script.joint_values(nets["global"], x, args), batch["joint"], num_changed)
    for s, m in itertools.product(range(2), range(6)):
        joint = batch["joint"][s, m].tolist()

        def change(other, s=s, state=x[s, 0, m], joint=joint):
            a, b = (global_value(nets["global"], s, state, actions, args).item() for actions in (other, joint))
            return (a - b) ** 2

        assert found[s, m].tolist() == worst_joint(change, joint, num_changed)
        if num_changed == 1:
            near = [o for o in itertools.product([0, 1], repeat=4) if sum(a != b for a, b in zip(o, joint)) == 1]
            assert change(found[s, m].tolist()) == max(map(change, near))
    assert ((found != batch["joint"]).sum(-1) == min(num_changed, 4)).all()
    assert num_changed == 5 or len((found != batch["joint"]).flatten(0, 1).unique(dim=0)) > 3


@pytest.mark.parametrize("form", FORMS)
def test_action_regularizer_moves_the_global_network_alone(form):
    gradients = []
    for coef in (0.0, 0.4):
        args, _, nets, batch, _, unit = tiny(global_q=form, regularizer="none", action_reg_coef=coef)
        loss, metrics = script.qcombo_loss(nets, batch, {}, unit, args)
        gradients.append(torch.autograd.grad(loss, [nets["local"].flat, nets["global"].flat]))
    assert torch.equal(gradients[0][0], gradients[1][0])
    expected = []
    for s in range(2):
        for m in range(6):
            value = partial(global_value, nets["global"], s, torch.cat([*batch["obs"][s, :, m]]), args=args)
            joint = batch["joint"][s, m].tolist()
            worst = worst_joint(lambda a, v=value, joint=joint: (v(a) - v(joint)).square().item(), joint, 1)
            expected.append((value(worst) - value(joint)).square() / 6)
    torch.testing.assert_close(metrics["ernie/action_regularizer"].sum(), sum(expected).detach())
    (grad,) = torch.autograd.grad(0.4 * sum(expected), [nets["global"].flat])
    torch.testing.assert_close(gradients[1][1] - gradients[0][1], grad, rtol=1e-8, atol=1e-12)


def regularize(kind, nets, batch, noise, unit, args, mode=None):
    """R [S, N, M], delta and the perturbed input of "local" or "global" Q-functions."""
    network, obs, scale = script.view(kind, nets, batch["obs"], batch["joint"], unit, args)
    obs, seen = obs[:, :, : args.reg_batch_size], []

    def watched(x):
        seen.append(x)
        return network(x)

    return *script.regularizer(mode or args.regularizer, watched, obs, network(obs), noise[kind], scale, args), seen[-1]


CASES = [("local", "joint", "l2"), ("local", "joint", "kl"), ("local", "joint", "l2_probs")]
CASES += [("global", "joint", "l2"), ("global", "action_in", "l2")]


@pytest.mark.parametrize("kind,form,divergence", CASES)
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("steps", [1, 3])
def test_hypergradient_is_the_derivative_of_the_whole_unroll(kind, form, divergence, norm, steps):
    options = dict(regularize=kind, global_q=form, divergence=divergence, norm=norm, attack_steps=steps, epsilon=0.3)
    args, _, nets, batch, noise, unit = tiny(**options)
    flat = nets[kind].flat

    def mean_reg(flat, mode=None):
        others = nets | {kind: script.MLP(flat, nets[kind].sizes)}
        return regularize(kind, others, batch, noise, unit, args, mode)[0].mean(2).sum()

    direction = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    whole, leader = (torch.autograd.grad(mean_reg(flat, m), flat)[0] for m in ("stackelberg", "adversarial"))
    measured = fourth_order(lambda step: mean_reg((flat + step * direction).detach()).item())
    assert (whole * direction).sum().item() == pytest.approx(measured, rel=1e-6)
    assert abs((leader * direction).sum().item() - measured) > 1e-4 * abs(measured)  # the leader alone would fail
    _, delta, _ = regularize(kind, nets, batch, noise, unit, args)
    network, obs, scale = script.view(kind, nets, batch["obs"], batch["joint"], unit, args)
    obs = obs[:, :, : args.reg_batch_size]
    change = script.divergence(divergence, network(obs + scale * delta.detach()), network(obs)).mean(2).sum()
    torch.testing.assert_close(leader, torch.autograd.grad(change, flat)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["local", "global"])
@pytest.mark.parametrize("units", ["std", "raw"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_perturbation_is_in_the_ball_and_beats_a_random_direction(kind, units, norm):
    args, _, nets, batch, noise, unit = tiny(width=8, regularize=kind, epsilon_units=units, norm=norm, epsilon=0.2)
    std = torch.tensor([2.0, 0.5, 0.0], device=DEVICE)
    expected = {"raw": [0.5, 2.0, 0.0], "std": [1.0, 1.0, 0.0]}[units]  # what one unit is after normalisation
    assert script.perturbation_unit(std.expand(1, 1, 2, 3), args).flatten().tolist() == expected
    _, obs, scale = script.view(kind, nets, batch["obs"], batch["joint"], unit, args)
    assert (scale == 0).sum() == 2 and (units == "raw" or scale.unique().tolist() == [0, 1])
    order, values = math.inf if norm == "linf" else 2, {}
    for mode in ("random", "adversarial", "stackelberg"):
        values[mode], delta, seen = regularize(kind, nets, batch, noise, unit, args, mode)
        moved = torch.where(scale > 0, (seen - obs[:, :, :4]) / scale, seen - obs[:, :, :4])
        torch.testing.assert_close(moved, delta)
        assert (delta[(scale == 0).expand_as(delta)] == 0).all()
        length = torch.linalg.vector_norm(delta, order, dim=-1)
        assert length.max() <= 0.2 * (1 + 1e-9) and (mode != "random" or length.min() > 0.1999)
    assert values["adversarial"].mean() > 1.3 * values["random"].mean()
    torch.testing.assert_close(values["adversarial"], values["stackelberg"])


def two_updates(**options):
    args, env, nets, batch, noise, unit = tiny(**(dict(regularize="both") | options))
    optimizer = torch.optim.Adam([nets["local"].flat, nets["global"].flat], 0.01)
    for _ in range(2):
        metrics = script.update_q(nets, optimizer, script.qcombo_loss, batch, noise, unit, args)
    return args, nets, metrics, noise


def test_switched_off_regularizer_is_qcombo():
    _, reference, *_ = two_updates(regularizer="none")
    on = two_updates()
    for name in ("local", "global"):
        assert not torch.equal(on[1][name].flat, reference[name].flat)
    for off in (dict(reg_coef=0.0), dict(attack_steps=0), dict(epsilon=0.0)):
        args, nets, metrics, noise = two_updates(**off)
        assert not args.regularized and noise == {} and not any(name.startswith("ernie") for name in metrics)
        assert all(torch.equal(nets[name].flat, reference[name].flat) for name in nets)


def test_clipping_and_targets_of_an_update():
    args, _, nets, batch, noise, unit = tiny(max_grad_norm=0.01, tau=0.25)
    before = {name: net.flat.detach().clone() for name, net in nets.items()}
    optimizer = torch.optim.SGD([nets["local"].flat, nets["global"].flat], 1.0)
    script.update_q(nets, optimizer, script.qcombo_loss, batch, noise, unit, args)
    for name in ("local", "global"):
        step = (nets[name].flat - before[name]).norm(dim=1)
        torch.testing.assert_close(step, torch.full_like(step, 0.01))  # each network of each seed on its own
        target = before[name + "_target"] + 0.25 * (nets[name].flat - before[name + "_target"])
        torch.testing.assert_close(nets[name + "_target"].flat, target)


def test_compiled_loss_has_the_eager_gradients():
    args, _, nets, batch, noise, unit = tiny(global_q="action_in", attack_steps=2, action_reg_coef=0.2)
    gradients = []
    for function in (script.qcombo_loss, torch.compile(script.qcombo_loss, fullgraph=True)):
        value, _ = function(nets, batch, noise, unit, args)
        gradients.append(torch.autograd.grad(value, [nets["local"].flat, nets["global"].flat]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)


def test_other_seeds_do_not_see_a_seeds_data():
    options = dict(regularize="both", action_reg_coef=0.2)
    results = []
    for bump in (0.0, 1.0):
        args, _, nets, batch, noise, unit = tiny(**options)
        for name in ("obs", "next_obs", "rewards"):
            batch[name][0] += bump
        optimizer = torch.optim.Adam([nets["local"].flat, nets["global"].flat], 0.01)
        metrics = script.update_q(nets, optimizer, script.qcombo_loss, batch, noise, unit, args)
        results.append([*(net.flat.detach().view(2, -1) for net in nets.values()), *metrics.values()])
    for a, b in zip(*results):
        assert not torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# -------------------------------------------------------------------------------------- normalisation, replay, rollout


def test_normalized_observations_have_mean_0_and_variance_1_per_seed_and_light():
    args = Args(**(SMALL | dict(num_seeds=2)))
    env = script.make_traffic(args, 2, DEVICE)
    replay = script.make_replay(env, 2, 102, 10)
    streams = script.make_generators(0, 2, "test", DEVICE)
    scale = torch.arange(1, 2 * 4 * 22 + 1, device=DEVICE).view(2, 1, 1, 4, 22)  # all different
    replay["obs"][:] = scale * (script.draw(torch.randn, replay["obs"].shape[1:], streams) + 3)
    replay["obs"][..., 5], replay["obs"][1, :, :, 2, 7] = 0.1, 1.0  # never vary
    replay["obs"][:, 100:] = 1e6  # not filled yet
    replay["obs"][:, :, -1] = -1e6  # the last observation of a rollout is the first of the next one
    norm = script.measure_norm(replay, 100)
    assert norm.shape == (2, 4, 2, 22) and norm.dtype == torch.float32
    x = script.normalize(replay["obs"][:, :100, :-1].flatten(1, 2).transpose(1, 2), norm)  # [S, N, M, O]
    live = torch.ones(2, 4, 22, dtype=torch.bool, device=DEVICE)
    live[..., 5] = live[1, 2, 7] = False
    mean, std = x.double().mean(2), x.double().std(2, correction=0)
    assert mean.abs().max() < 1e-5 and (std[live] - 1).abs().max() < 1e-4
    assert (x.transpose(2, 3)[~live] == 0).all() and (norm[:, :, 1][~live] == 0).all()
    far = script.normalize(1e9 * torch.ones_like(x), norm)
    assert far.max() == 10 and script.normalize(-1e9 * torch.ones_like(x), norm).min() == -10
    replay["actions"][..., 1] = (script.draw(torch.rand, replay["rewards"].shape[1:], streams) < 0.5).float()
    replay["actions"][..., 0] = 1 - replay["actions"][..., 1]
    replay["rewards"][:] = replay["obs"][:, :, :-1, :, 0] + 1000 * replay["actions"][..., 1]
    raw = script.sample(replay, 100, 50, script.make_generators(1, 2, "test", DEVICE))
    batch = script.prepare(raw, norm, dataclasses.replace(args, reward_scale=0.5))
    torch.testing.assert_close(batch["obs"], script.normalize(raw["obs"].transpose(1, 2), norm))
    joint = batch["joint"].transpose(1, 2)
    torch.testing.assert_close(batch["rewards"], 0.5 * (raw["obs"].transpose(1, 2)[..., 0] + 1000 * joint))


def test_rollout_is_random_switching_then_greedy_or_random_lights():
    args = Args(
        **(SMALL | dict(num_seeds=2, num_envs=20, rollout_steps=20, warmup=20, total_timesteps=800, buffer_size=400))
    )
    env = script.make_traffic(args, 40, DEVICE)
    nets, _ = script.make_q(env, dataclasses.replace(args, global_q="joint"))
    streams, replay = script.make_generators(0, 2, "test", DEVICE), script.make_replay(env, 2, 20, 20)
    norm = torch.zeros(2, 4, 2, 22, device=DEVICE)
    norm[:, :, 1] = 10
    state, obs = env.reset(streams)
    for t, random in ((0, 0.0), (20, 0.0), (40, 0.5)):
        first = obs
        rest = (replay, 0, t, state, obs, random, streams, args)
        state, obs, happened = script.collect(env.step, env, nets["local"], norm, *rest)
        assert torch.equal(replay["obs"][:, :, 0].flatten(0, 1), first)
        assert torch.equal(replay["obs"][:, :, -1].flatten(0, 1), obs)
        torch.testing.assert_close(happened["reward"], replay["rewards"].sum((2, 3)).mean(1))
        action = replay["actions"].argmax(-1)  # [S, E, T, N]
        x = script.normalize(replay["obs"][:, :, :-1].flatten(1, 2).transpose(1, 2), norm)
        greedy = script.forward(nets["local"].layers(), x, "relu").argmax(-1).transpose(1, 2).view_as(action)
        assert 0 < greedy.float().mean() < 1
        if t == 0:
            switches = action.float().mean((0, 1, 3))
            assert switches.nonzero().flatten().tolist() == [0, 10] and (switches[[0, 10]] - 0.5).abs().max() < 0.15
        else:
            assert (action != greedy).float().mean().item() == pytest.approx(random / 2, abs=0.03)


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("trained,tested", [((2, 2), (4, 4)), ((2, 2), (2, 2)), ((1, 3), (3, 4))])
def test_tiled_lights_act_as_those_that_were_trained(trained, tested):
    args = Args(**(SMALL | dict(num_seeds=2, rows=trained[0], cols=trained[1], global_q="joint")))
    small = script.make_traffic(args, 2, DEVICE)
    large = script.make_traffic(args, 2, DEVICE, env_id="traffic_grid_v0", rows=tested[0], cols=tested[1])
    nets, _ = script.make_q(small, args)
    streams = script.make_generators(0, 2, "test", DEVICE)
    norm = script.draw(torch.rand, (small.num_agents, 2, 22), streams) + 0.1
    tiled, tiled_norm = script.tile(nets, norm, large, args)
    if trained == tested:
        assert torch.equal(tiled["local"].flat, nets["local"].flat) and torch.equal(tiled_norm, norm)
    obs = 2 * script.draw(torch.randn, (30, small.num_agents, 22), streams)
    cells = list(itertools.product(range(tested[0]), range(tested[1])))  # row-major from the bottom left
    twin = torch.tensor([r % trained[0] * trained[1] + c % trained[1] for r, c in cells], device=DEVICE)
    play = partial(script.act, "clean", 0.0, generators=streams, args=args)
    ours = play(tiled, tiled_norm, obs[:, :, twin], env=large)
    theirs = play(nets, norm, obs, env=small)
    assert torch.equal(ours, theirs[:, :, twin]) and 0 < theirs.float().mean() < 1
    other = play(nets, norm, obs[:, :, torch.arange(small.num_agents - 1, -1, -1)], env=small)
    assert not torch.equal(other.flip(2), theirs)  # the lights differ


def drivers(num_episodes=3000, **options):
    """(args, env, nets, norm, obs, act, greedy): 3 lights of two seeds, norm with a dead entry, raw obs."""
    args, env, nets, *_ = tiny(**options)
    streams = script.make_generators(5, 2, "test", DEVICE)
    norm = script.draw(torch.rand, (3, 2, 4), streams) + 0.5
    norm[:, 0, 1, -1] = 0
    obs = norm[:, None, :, 0] + script.draw(torch.randn, (num_episodes, 3, 4), streams) * norm[:, None, :, 1]
    play = partial(script.act, nets=nets, norm=norm, obs=obs, generators=streams, env=env, args=args)
    return args, nets, norm, obs, play, play("clean", 0.0)


def test_flipped_actions_are_as_many_as_asked_for():
    _, _, _, _, play, greedy = drivers()
    one, each = (play(family, 0.3) != greedy for family in ("flip_one", "flip_each"))
    assert one.sum(-1).max() == 1 and one.any(-1).double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (one.double().mean((0, 1)) - 0.1).abs().max() < 0.02  # no light is preferred
    assert (each.double().mean((0, 1)) - 0.3).abs().max() < 0.03
    assert (each.sum(-1) == 3).double().mean().item() == pytest.approx(0.027, abs=0.01)  # independent
    for family in ("flip_one", "flip_each", "worst_one"):
        assert torch.equal(play(family, 0.0), greedy)


@pytest.mark.parametrize("form", FORMS)
def test_worst_action_is_the_one_that_the_global_q_likes_less(form):
    args, nets, norm, obs, play, greedy = drivers(100, global_q=form)
    found = play("worst_one", 1.0)
    changed = (found != greedy).sum(-1)
    assert changed.max() == 1 and 0.2 < changed.double().mean() < 0.8
    x = script.normalize(obs.transpose(1, 2), norm).transpose(1, 2).flatten(2)
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


def test_observation_noise_has_its_strength_in_raw_units(monkeypatch):
    args, nets, norm, obs, play, greedy = drivers()
    seen, real = [], script.normalize
    monkeypatch.setattr(script, "normalize", lambda raw, norm: (seen.append(raw), real(raw, norm))[1])
    assert torch.equal(play("gaussian", 0.0), greedy) and torch.equal(seen[0].transpose(1, 2), obs)
    action = play("gaussian", 0.5)
    noise = seen[1].transpose(1, 2) - obs
    assert noise.std().item() == pytest.approx(0.5, rel=0.02) and noise.mean().abs() < 0.01
    assert 0.01 < (action != greedy).double().mean() < 0.5


@pytest.mark.parametrize("norm_order", ["l2", "linf"])
def test_worst_observations_are_in_the_ball_and_worse_than_random_ones(norm_order, monkeypatch):
    args, nets, norm, obs, play, greedy = drivers(200, norm=norm_order, epsilon_units="raw")
    x = script.normalize(obs.transpose(1, 2), norm)
    live = (norm[:, :, 1] > 0)[:, :, None]
    seen, real = [], script.forward
    monkeypatch.setattr(script, "forward", lambda layers, x, name: (seen.append(x), real(layers, x, name))[1])

    def change(x_other):
        return (real(nets["local"].layers(), x_other, "tanh") - q).square().sum(-1).mean().item()

    def own_value(action):
        return q.gather(3, action.transpose(1, 2).unsqueeze(3)).mean().item()

    q = real(nets["local"].layers(), x, "tanh").detach()
    direction = script.draw(torch.randn, x.shape[1:], script.make_generators(7, 2, "test", DEVICE)) * live
    random = x + script.rescale(direction, 0.5, norm_order)
    random_action = real(nets["local"].layers(), random, "tanh").argmax(-1).transpose(1, 2)
    for family in ("mad", "critic"):
        action = play(family, 0.5)
        delta = seen[-1] - x  # what the lights saw at last, in standard deviations
        length = torch.linalg.vector_norm(delta, math.inf if norm_order == "linf" else 2, dim=-1)
        assert length.max() <= 0.5 * (1 + 1e-9) and length.mean() > 0.4
        assert (delta[~live.expand_as(delta)] == 0).all()
        if family == "mad":
            assert change(seen[-1]) > 1.5 * change(random)
        else:
            clean, worst = own_value(greedy), own_value(action)
            assert clean - worst > 1.5 * (clean - own_value(random_action)) > 0


def test_each_point_of_a_sweep_has_its_own_traffic():
    args = Args(**(SMALL | dict(num_seeds=2, eval_seconds=20, flow=tuple(range(100, 900, 100)))))
    points = [("clean", 0.0), ("speed", 30.0), ("flow", 3)]
    env = script.make_test(args, points, 2, DEVICE)
    assert env.warmup == 2 and env.horizon == 20 and env.num_envs == 12 and env.model == "krauss"
    assert env.speed.tolist() == 2 * [35.0, 35.0, 30.0, 30.0, 35.0, 35.0]
    own, third = list(args.flow), list(traffic.FLOWS["flow3"])
    assert env.inflow.T.tolist() == 2 * [own, own, own, own, third, third]
    nets, _ = script.make_q(script.make_traffic(args, 1, DEVICE), dataclasses.replace(args, global_q="joint"))
    norm = torch.ones(2, 4, 2, 22, device=DEVICE)
    points = [("clean", 0.0), ("flip_each", 0.0), ("flip_each", 1.0)]
    happened = script.simulate_points(nets, norm, points, "test", lambda f: f, args, DEVICE)["reward"]  # [S, P, E]
    torch.testing.assert_close(happened[:, 1], happened[:, 0])  # the same traffic at every point
    assert happened.shape == (2, 3, 2) and (happened[:, 2] != happened[:, 0]).all()
    for name, rows, lights in (("irregular", 2, 4), ("4x4", 4, 16), ("6x6", 6, 36), ("atlanta", 4, 16)):
        env = script.make_test(args, [("network", name)], 2, DEVICE)
        assert (env.rows, env.num_agents, env.num_envs) == (rows, lights, 4)


# ---------------------------------------------------------------------------------------------------------------- runs


def shorten(monkeypatch):
    """Test games of three seconds, whatever the script asks for."""
    real, short = script.simulate, partial(dataclasses.replace, warmup=2, horizon=3)
    monkeypatch.setattr(script, "simulate", lambda env, *rest: real(short(env), *rest))


def short_train(tmp_path, name, **options):
    args = Args(**(SMALL | options))
    device = script.setup(args)
    env = script.make_traffic(args, args.num_seeds * args.num_envs, device, horizon=args.horizon)
    if args.global_q == "auto":
        args.global_q = "joint"
    nets, optimizer = script.make_q(env, args)
    folder = tmp_path / name
    folder.mkdir()
    norm = script.train(env, nets, optimizer, lambda f: f, args, folder, [])
    assert norm is not None
    return args, nets, norm, list(csv.DictReader(open(folder / "metrics.csv")))


@pytest.mark.parametrize("options", [dict(regularize="both"), dict(global_q="action_in", action_reg_coef=0.1)])
def test_a_seed_does_not_depend_on_the_others(tmp_path, monkeypatch, options):
    shorten(monkeypatch)
    _, together, norms, rows = short_train(tmp_path, "together", seed=5, num_seeds=2, **options)
    for k in range(2):
        _, alone, norm, own = short_train(tmp_path, f"alone{k}", seed=5 + k, **options)
        for name in alone:
            assert alike(alone[name].flat, together[name].flat.unflatten(0, (2, -1))[k])
        assert alike(norm[0], norms[k])
        assert alike(without_speed(own), without_speed([row for row in rows if row["seed"] == str(5 + k)]))


MODES = [
    *(dict(regularizer=m) for m in ("none", "gaussian", "random", "adversarial", "stackelberg")),
    dict(regularizer="gaussian", gaussian_std=1.0, regularize="global", model="idm"),
    dict(regularize="global", norm="linf", epsilon_units="raw", activation="silu", flow=("flow3",)),
    dict(regularize="both", global_q="action_in", action_reg_coef=0.1, malicious_agents=9, detach_reference=True),
    dict(rows=1, cols=3, divergence="kl", global_q="action_in", team_reward="sum", flow=(700.0,), activation="tanh"),
    dict(rows=1, cols=3, divergence="l2_probs", action_reg_coef=0.1, tau=1.0, flow=tuple(range(0, 800, 100))),
    dict(env_id="traffic_irregular_v0", num_seeds=2, attack_steps=1, anneal_lr=False),
]


@pytest.mark.parametrize("options", MODES)
def test_every_option_trains(tmp_path, monkeypatch, options):
    shorten(monkeypatch)
    args, nets, _, rows = short_train(tmp_path, "run", **options)
    assert [row["global_step"] for row in rows] == [s for s in ("60", "120") for _ in range(args.num_seeds)]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    fresh, _ = script.make_q(script.make_traffic(args, 1, DEVICE), args)
    assert all((nets[name].flat != fresh[name].flat).any(1).all() for name in nets)


def test_learns_to_serve_the_street_with_most_cars(tmp_path):
    """One light, nine times as many cars from north and south as from east and west: random switching has -28, 27 s of
    green for each -14, these 900 small updates -7 to -1."""
    options = dict(rows=1, cols=1, flow=(900.0, 900.0, 100.0, 100.0), num_envs=8, horizon=300, warmup=100)
    options |= dict(total_timesteps=4800, updates_per_rollout=16, buffer_size=10_000, batch_size=64, reg_batch_size=32)
    options |= dict(hidden_size=32, learning_rate=2e-3, gamma=0.97, log_interval=10_000)
    *_, rows = short_train(tmp_path, "run", **options)
    assert float(rows[-1]["eval/reward"]) > -11


def with_small(flags) -> list[str]:
    """These flags after those of SMALL, which go with neither --resume nor --evaluate."""
    small = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "track"] + ["--no-track"]
    again = any(str(flag).startswith(("--resume", "--evaluate")) for flag in flags)
    return [*([] if again else small), *map(str, flags)]


def main_with(monkeypatch, *flags):
    """main() in this process with the flags of SMALL and these; None, or the exit code."""
    monkeypatch.setattr(sys, "argv", ["ernie_qcombo.py", *with_small(flags)])
    try:
        return script.main()
    except SystemExit as stop:
        return stop.code


METRICS = "reward queue wait delay emergency switch passed left_per_minute backlog".split()


def test_a_whole_run_leaves_what_it_promises(tmp_path, monkeypatch, capsys):
    shorten(monkeypatch)
    logged = [[], []]
    runs = [SimpleNamespace(log=lambda row, step=0, k=k: logged[k].append(row), finish=lambda: None) for k in range(2)]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=dict, Image=str))
    monkeypatch.setattr(script, "start_wandb", lambda *rest: runs)
    main_with(monkeypatch, f"--runs-dir={tmp_path}", "--capture-video", "--num-seeds=2", "--flow", "train")
    folder, out = only(tmp_path), capsys.readouterr().out
    assert all(len(rows) == 3 and "robustness" in rows[2] and "eval/reward" in rows[1] for rows in logged)
    assert json.loads((folder / "args.json").read_text())["versions"]["torch"] == version("torch")
    for name in ("metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "robustness.png", "videos/lights.gif"):
        assert (folder / name).stat().st_size > 0
    text = (folder / "robustness.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    columns = ["env_id", "policy", "seed", "perturbation", "strength", "standard_error", "episodes", *METRICS]
    assert set(rows[0]) == set(columns)
    swept = {("clean", "0.0"), *((family, str(s)) for family in script.SWEEP for s in script.SWEEP[family])}
    swept |= {("network", name) for name in script.NETWORKS}
    changed = {point for point in swept if point[0] in ("clean", "speed", "flow", "network")}
    for policy, seeds, points in (("stackelberg", ["1", "2"], swept), ("fixed_time", ["1"], changed)):
        for seed in seeds:
            found = [r for r in rows if (r["policy"], r["seed"]) == (policy, seed)]
            assert {(r["perturbation"], r["strength"]) for r in found} == points and len(found) == len(points)
    for row in rows:
        assert row["episodes"] == "2" and all(math.isfinite(float(row[name])) for name in METRICS)
        assert float(row["reward"]) == pytest.approx(sum(float(row[name]) for name in traffic.TERMS), abs=1e-3)
    assert all(family in out and strength in out for family, strength in swept)
    assert main_with(monkeypatch, f"--evaluate={folder}") is None
    assert (folder / "robustness.csv").read_text() == text  # the same policies, the same episodes
    main_with(monkeypatch, f"--evaluate={folder}", "--eval-episodes=3")
    assert next(csv.DictReader(open(folder / "robustness.csv")))["episodes"] == "3"  # the flag beats the saved value


LONG = dict(horizon=400, warmup=50, total_timesteps=1200, checkpoint_interval=300, log_interval=500)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run of one and a half episodes, a checkpoint each eighth of the first."""
    folder = tmp_path_factory.mktemp("whole")
    short_train(folder, "run", **LONG)
    return folder / "run"


def assert_same_run(folder, reference):
    ours, theirs = (list(csv.DictReader(open(f / "metrics.csv"))) for f in (folder, reference))
    assert without_speed(ours) == without_speed(theirs) and len(ours) == 3
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, reference))
    for part in ("nets", "replay", "cars"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])


def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, uninterrupted):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (SMALL | LONG).items() if k != "track"]
    process = start_script("ernie_qcombo.py", *flags, "--no-track", f"--runs-dir={tmp_path}")
    until = time.time() + 120
    while not list(tmp_path.glob("*/checkpoint.previous.pt")) and process.poll() is None and time.time() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    folder = only(tmp_path)
    assert 0 < torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] * 10 < 400
    with open(folder / "metrics.csv", "a") as file:
        file.write("1,99")  # what a kill in the middle of a write leaves
    monkeypatch.setattr(script, "lights_report", lambda *rest: None)
    assert main_with(monkeypatch, f"--resume={folder}") is None
    assert_same_run(folder, uninterrupted)


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path, monkeypatch, capsys, uninterrupted):
    calls, real = [], script.collect

    def collect(*rest):
        calls.append(1)
        if len(calls) == 37:  # neither a log nor a checkpoint is due, in the middle of the first episode
            os.kill(os.getpid(), signal.SIGINT)
        return real(*rest)

    monkeypatch.setattr(script, "collect", collect)
    monkeypatch.setattr(script, "lights_report", lambda *rest: None)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in LONG.items()]
    assert main_with(monkeypatch, *flags, f"--runs-dir={tmp_path}") == 130
    folder = only(tmp_path)
    assert f"--resume {folder}" in capsys.readouterr().err and len(calls) == 37
    assert main_with(monkeypatch, f"--resume={folder}") is None and len(calls) == 60
    assert_same_run(folder, uninterrupted)


def test_two_ranks_train_one_policy(tmp_path):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "track"]
    flags += ["--no-track", "--log-interval=1000", "--eval-seconds=1", "--eval-warmup=0", "--no-cuda"]
    flags += [f"--runs-dir={tmp_path}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    finish(subprocess.Popen([*launch, str(ROOT / "ernie_qcombo.py"), *flags], stderr=subprocess.PIPE, text=True))
    folder = only(tmp_path)
    a, b = (torch.load(folder / n, weights_only=True) for n in ("checkpoint.pt", "checkpoint_rank1.pt"))
    assert all(torch.equal(a["nets"][name], b["nets"][name]) for name in a["nets"])
    assert torch.equal(a["norm"], b["norm"]) and not torch.equal(a["replay"]["obs"], b["replay"]["obs"])
    assert (folder / "robustness.csv").exists()


# ----------------------------------------------------------------------------------------------------------- bad input


BAD_VALUES = {
    **dict.fromkeys(["num_seeds", "num_threads", "rows", "cols", "num_envs", "rollout_steps", "buffer_size"], 0),
    **dict.fromkeys(["batch_size", "hidden_size", "reg_batch_size", "malicious_agents", "warmup"], 0),
    **dict.fromkeys(["log_interval", "checkpoint_interval", "eval_episodes", "eval_seconds"], 0),
    **dict.fromkeys(["learning_rate", "reward_scale", "max_grad_norm", "attack_lr", "attack_init"], 0.0),
    **dict.fromkeys(["seed", "updates_per_rollout", "attack_steps", "eval_warmup"], -1),
    **dict.fromkeys(["exploration_end", "consistency_coef", "action_reg_coef", "tau"], -0.1),
    **{"gaussian_std": 0.0, "gamma": 1.5, "exploration": 1.1, "epsilon": math.nan, "reg_coef": math.inf},
    **{"backend": "sumo", "total_timesteps": 20, "horizon": 45},  # 20 is --warmup times --num-envs
}


def refused(monkeypatch, capsys, *flags) -> str:
    return refusal(script, monkeypatch, capsys, *with_small(flags))


@pytest.mark.parametrize("name,value", BAD_VALUES.items())
def test_bad_value_is_one_line_that_names_the_flag(monkeypatch, capsys, name, value):
    bad_value(script, monkeypatch, capsys, name, value, *with_small([]))


def test_every_number_has_a_bad_value():
    numbers = {name for name, v in Args().__dict__.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    assert numbers <= BAD_VALUES.keys()


def test_values_that_do_not_go_together(monkeypatch, capsys, tmp_path):
    bad = partial(refused, monkeypatch, capsys)
    error = bad("--flow=flow9")
    assert "flow must be one of train, flow1" in error and "'flow9'" in error
    assert "flow must have 8 entries" in bad("--flow", "1", "2", "3")
    assert "flow must have 6 entries" in bad("--rows=1", "--flow=flow1")
    assert "flow must be 0 or more" in bad("--flow", *"1 2 3 4 5 6 7 -8".split())
    assert "--flow must be" in bad("--flow", "flow1", "flow2")
    assert "--warmup must be below --horizon" in bad("--warmup=40")
    assert "--warmup must be a multiple of --rollout-steps" in bad("--warmup=15")
    assert "--resume must be left out with --evaluate" in bad(f"--evaluate={tmp_path}", f"--resume={tmp_path}")
    assert "traffic_grid_v0" in bad("--env-id=traffic_gird_v0")
    assert "--no-such-flag" in bad("--no-such-flag")
    assert "no checkpoint at" in bad(f"--resume={tmp_path}/nowhere")


def test_broken_and_foreign_checkpoints(monkeypatch, capsys, tmp_path, uninterrupted):
    bad = partial(refused, monkeypatch, capsys)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    assert "--gamma is read from" in bad(f"--resume={tmp_path}", "--gamma=0.5")
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    error = bad(f"--resume={tmp_path}")
    assert "no readable checkpoint" in error and "checkpoint.previous.pt" in error
    monkeypatch.setattr(sys, "argv", ["ernie_qcombo.py"])
    state = script.load_run(Args(resume=f"{tmp_path}/checkpoint.previous.pt"))[1]
    assert state["iteration"] > 0  # the one before still loads
    torch.save(state | {"norm": torch.zeros_like(state["norm"])}, tmp_path / "checkpoint.pt")
    assert "warm-up" in bad(f"--evaluate={tmp_path}")
    torch.save({"script": "ernie_maddpg"}, tmp_path / "checkpoint.pt")
    assert "was written by ernie_maddpg.py" in bad(f"--evaluate={tmp_path}")


def test_sumo_that_is_not_installed(monkeypatch, capsys, uninterrupted):
    try:
        import libsumo  # noqa: F401
    except ImportError:
        error = refused(monkeypatch, capsys, f"--evaluate={uninterrupted}", "--backend=sumo")
        assert "pip install -r requirements-sumo.txt" in error
    else:
        pytest.skip("SUMO is installed")


def test_non_finite_loss_stops_with_the_step_and_the_last_checkpoint(monkeypatch, capsys, tmp_path):
    real, calls = script.qcombo_loss, []

    def poisoned(*rest):
        loss, metrics = real(*rest)
        calls.append(1)
        return loss, metrics | {"losses/global": metrics["losses/global"] * (math.nan if len(calls) > 6 else 1)}

    shorten(monkeypatch)
    monkeypatch.setattr(script, "qcombo_loss", poisoned)
    error = refused(monkeypatch, capsys, f"--runs-dir={tmp_path}")
    last = only(tmp_path) / "checkpoint.pt"
    assert "losses/global is not finite at step" in error and str(last) in error and last.exists()
