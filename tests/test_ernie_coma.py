"""ernie_coma.py: values, targets and losses by hand, gradients against finite differences, runs."""

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
import torch.nn.functional as F
from commands import ROOT, alike, bad_value, finish, fourth_order, only, plain, refusal, start_script, without_speed

import ernie_coma as script
from envs import traffic
from ernie_coma import Args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = dict(num_envs=2, rollout_steps=5, hidden_size=16, reg_batch_size=8, checkpoint_interval=20, eval_episodes=2)
SMALL |= dict(regularizer="stackelberg", reg_coef=0.1, epsilon=0.1, epsilon_units="std", attack_steps=3, track=False)
TRAFFIC = SMALL | dict(horizon=40, warmup=10, rollout_steps=10, total_timesteps=120, log_interval=60, model="krauss")
TRAFFIC |= dict(eval_warmup=2, eval_seconds=3)
SPREAD = SMALL | dict(env_id="simple_spread_v3", total_timesteps=100, log_interval=50)
TASKS = pytest.mark.parametrize("small", [TRAFFIC, SPREAD], ids=["traffic", "particle"])


@pytest.fixture(autouse=True)
def one_thread_and_float32_afterwards():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more than one wait for each other where a core is busy
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)


def tiny(sizes=(2, 3, 3), team=(True, True, False), num_envs=2, steps=3, **options):
    """(args, env, nets, rollout, norm, noise): two seeds, random networks far from linear and a random rollout in
    float64. The last observation of agent 0 does not vary, agent 0 has fewer actions; env has only what losses ask
    for."""
    torch.set_default_dtype(torch.float64)
    args = dict(num_seeds=2, num_envs=num_envs, rollout_steps=steps, hidden_size=5, reg_batch_size=4, activation="tanh")
    args = Args(**(SMALL | args | dict(reward_scale=1.0) | options))
    N, O, A = len(sizes), 4, max(sizes)
    mask = torch.arange(A, device=DEVICE) < torch.tensor(sizes, device=DEVICE)[:, None]
    env = SimpleNamespace(num_agents=N, obs_mask=torch.ones(N, O, device=DEVICE), action_mask=mask, discrete=True)
    env.device, env.cooperators = DEVICE, torch.tensor(team, device=DEVICE)
    nets, _ = script.make_coma(env, args)
    streams = script.make_generators(3, 2, "test", DEVICE)
    normal = partial(script.draw, torch.randn, generators=streams)
    for net in nets.values():
        noise = normal((net.flat.shape[0] // 2, net.flat.shape[1])).flatten(0, 1)
        net.flat.detach().mul_(2).add_(0.3 * noise)
    norm = torch.stack([normal((N, O)), script.draw(torch.rand, (N, O), streams) + 0.5], 2)
    norm[:, 0, 1, -1] = 0
    S, B, T = 2, num_envs, steps
    action = (script.draw(torch.rand, (B, T + 1, N), streams) * mask.sum(1)).long()
    joint = F.one_hot(action, A).double()
    rollout = {"obs": norm[:, None, None, :, 0] + norm[:, None, None, :, 1] * normal((B, T + 1, N, O))}
    rollout |= {"actions": joint[:, :, :T], "last_action": joint[:, :, T], "rewards": normal((B, T, N))}
    rollout["terminated"] = (torch.arange(S * B * T, device=DEVICE).view(S, B, T) % 5 == 1).double()
    return args, env, nets, rollout | {"policy_steps": 7}, norm, script.draw_attack(streams, env, args)


def critic_heads(critic, s, state, joint, n):
    """Q(s, (a_-n, .)) [A] of agent n: state [N * O], the one-hot actions joint [N, A] without its own, its number."""
    others = joint.clone()
    others[n] = 0
    number = torch.eye(len(joint), device=DEVICE)[n]
    return plain(critic, s, torch.cat([state, others.flatten(), number]))


@pytest.mark.parametrize("sizes", [(2, 3, 3), (2, 2)])
def test_counterfactual_values_against_the_critic_written_out(sizes):
    args, env, nets, rollout, norm, _ = tiny(sizes, [True] * len(sizes))
    batch = script.prepare_rollout(nets, rollout, norm, env, args)
    found = script.counterfactual_values(nets["critic"], batch["x"], batch["joint"], args)
    for s, n, m in itertools.product(range(2), range(len(sizes)), range(6)):
        expected = critic_heads(nets["critic"], s, batch["x"][s, 0, m], batch["joint"][s, m], n)
        torch.testing.assert_close(found[s, n, m], expected, rtol=1e-10, atol=1e-12)
    other = batch["joint"].clone()
    other[:, :, 0] = other[:, :, 0].flip(-1)
    again = script.counterfactual_values(nets["critic"], batch["x"], other, args)
    changed = (again - found).abs().amax((2, 3)) > 1e-6  # [S, N]
    assert not changed[:, 0].any() and changed[:, 1:].all()  # an agent's own action is no input, only a head


def test_a_rollout_becomes_a_batch():
    """Every entry by hand, with the targets as a sum of n-step returns of the target critic."""
    args, env, nets, rollout, norm, _ = tiny(gamma=0.9, td_lambda=0.7, team_reward="sum")
    batch = script.prepare_rollout(nets, rollout, norm, env, args)
    assert all(value.isfinite().all() for value in batch.values())
    for s, b in itertools.product(range(2), range(2)):
        states, joints = [], [*rollout["actions"][s, b], rollout["last_action"][s, b]]
        for t in range(4):
            obs = torch.where(norm[s, :, 1] > 0, (rollout["obs"][s, b, t] - norm[s, :, 0]) / norm[s, :, 1], 0)
            states.append(obs.flatten())
            if t < 3:
                torch.testing.assert_close(batch["obs"][s, :, 3 * b + t], obs)
                torch.testing.assert_close(batch["x"][s, 0, 3 * b + t], obs.flatten())
                assert torch.equal(batch["joint"][s, 3 * b + t], joints[t])
        for n in range(3):
            heads = [critic_heads(nets["critic_target"], s, x, a, n) for x, a in zip(states, joints)]
            q = [head[joint[n].argmax()].item() for head, joint in zip(heads, joints)]
            own = rollout["rewards"][s, b].tolist()
            rewards = [r[0] + r[1] if n < 2 else r[2] for r in own]
            for t in range(3):
                expected = lambda_return(rewards, q, rollout["terminated"][s, b].tolist(), t, 0.9, 0.7)
                assert batch["targets"][s, n, 3 * b + t].item() == pytest.approx(expected, rel=1e-9)
    assert not batch["targets"].requires_grad


def lambda_return(rewards, values, ended, t, gamma, lam):
    """(1 - lambda) sum of lambda^(n - 1) G^n, the rest of the weight on the longest of the n-step returns G^n."""
    total, longest = 0.0, len(rewards) - t
    for n in range(1, longest + 1):
        step_return, alive = 0.0, 1.0
        for i in range(n):
            step_return += alive * gamma**i * rewards[t + i]
            alive *= 1 - ended[t + i]
        step_return += alive * gamma**n * values[t + n]
        total += lam ** (n - 1) * (1 if n == longest else 1 - lam) * step_return
    return total


@pytest.mark.parametrize("ends", [[], [3], [0, 4], [6]])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_td_lambda_targets_are_a_mean_of_n_step_returns(lam, ends):
    torch.set_default_dtype(torch.float64)
    args, generator = Args(gamma=0.9, td_lambda=lam), torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 7, generator=generator), torch.randn(2, 8, generator=generator)
    terminated = torch.zeros(2, 7)
    terminated[1, ends] = 1
    found = script.td_lambda_targets(rewards, values, terminated, args)
    for k, t in itertools.product(range(2), range(7)):
        series = (x[k].tolist() for x in (rewards, values, terminated))
        assert found[k, t].item() == pytest.approx(lambda_return(*series, t, 0.9, lam), rel=1e-12)
    if lam == 0:
        torch.testing.assert_close(found, rewards + 0.9 * (1 - terminated) * values[:, 1:])


def test_the_baseline_is_the_policys_mean_value():
    args, env, nets, rollout, norm, _ = tiny()
    batch = script.prepare_rollout(nets, rollout, norm, env, args)
    z = script.policy(nets["actor"], batch["obs"], env, args)
    probs = script.explore(z, torch.tensor(0.3, device=DEVICE), env).exp()
    q = script.counterfactual_values(nets["critic"], batch["x"], batch["joint"], args)
    mean = 0.0
    for a in range(3):
        one_hot = F.one_hot(torch.full(q.shape[:3], a, device=DEVICE), 3).double()
        found = script.counterfactual_advantage(q, probs, one_hot)
        baseline = sum(probs[..., b] * q[..., b] for b in range(3))
        torch.testing.assert_close(found, (q[..., a] - baseline).detach())
        assert not found.requires_grad and found.abs().mean() > 0.01
        mean = mean + probs[..., a] * found
    assert mean.abs().max() < 1e-12


@pytest.mark.parametrize("team", ["own", "mean", "sum"])
def test_shared_rewards_by_hand(team):
    members = [True, False, True, False, False]
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    env, args = SimpleNamespace(cooperators=torch.tensor(members)), Args(team_reward=team, reward_scale=0.5)
    expected = {"own": [1, 2, 4, 8, 16], "mean": [2.5, 26 / 3, 2.5, 26 / 3, 26 / 3], "sum": [5, 26, 5, 26, 26]}[team]
    for shape in ((5,), (2, 3, 4, 5)):
        found = script.shared_rewards(rewards.expand(shape), env, args)
        torch.testing.assert_close(found, 0.5 * torch.tensor(expected, dtype=torch.float32).expand(shape))


@pytest.mark.parametrize("exploration", [0.0, 0.3, 1.0])
def test_exploration_mixes_with_the_uniform_policy_of_valid_actions(exploration):
    args, env, *_ = tiny()
    z = script.draw(torch.randn, (3, 50, 3), script.make_generators(1, 2, "test", DEVICE)) * 3
    z = torch.where(env.action_mask[:, None], z, -1e9).requires_grad_()
    uniform = env.action_mask / env.action_mask.sum(1, keepdim=True)
    expected = (1 - exploration) * F.softmax(z, -1) + exploration * uniform[:, None]
    logp = script.explore(z, torch.tensor(exploration, device=DEVICE), env)
    torch.testing.assert_close(logp.exp(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones_like(logp[..., 0]))
    assert (logp[:, 0, :, 2].exp() == 0).all() and not (logp.exp()[:, 1:] == 0).any()
    weights = torch.where(env.action_mask[:, None], torch.arange(1.0, 4.0, device=DEVICE), 0)
    values = (logp, expected.clamp_min(1e-300).log())
    ours, theirs = (torch.autograd.grad((v * weights).sum(), z, retain_graph=True)[0] for v in values)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    entropy = (logp.exp() * logp).sum()
    assert entropy.isfinite() and torch.autograd.grad(entropy, z)[0].isfinite().all()


def actor_loss_by_hand(nets, batch, env, args, exploration, entropy_coef, s):
    """Without regulariser, of seed s, an agent and a sample at a time; advantages are numbers."""
    N, M = batch["obs"].shape[1:3]
    terms, advantages, entropy = [], [], 0.0
    for n, m in itertools.product(range(N), range(M)):
        valid = int(env.action_mask[n].sum())
        logits = plain(nets["actor"], s * N + n, batch["obs"][s, n, m])[:valid]
        probs = (1 - exploration) * torch.softmax(logits, 0) + exploration / valid
        q = critic_heads(nets["critic"], s, batch["x"][s, 0, m], batch["joint"][s, m], n)[:valid].tolist()
        taken = batch["joint"][s, m, n].argmax().item()
        advantages.append(q[taken] - sum(p * value for p, value in zip(probs.tolist(), q)))
        terms.append(probs[taken].log())
        entropy = entropy - (probs * probs.log()).sum() / M
    spread = torch.tensor(advantages).std(correction=0).item() + 1e-8 if args.normalize_advantage else 1.0
    gain = sum(term * advantage / spread for term, advantage in zip(terms, advantages)) / M
    return -gain - entropy_coef * entropy


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("exploration", [0.0, 0.2])
def test_actor_loss_and_its_gradient_by_hand(normalize, exploration):
    """The policies move through log pi and the entropy alone: by hand the advantages are numbers."""
    args, env, nets, rollout, norm, _ = tiny(normalize_advantage=normalize)
    batch = script.prepare_rollout(nets, rollout, norm, env, args)
    schedule = torch.tensor([exploration, 0.05], device=DEVICE)
    unit = script.perturbation_unit(norm, args)
    loss, metrics = script.coma_actor_loss(nets, batch, schedule, None, unit, env, args)
    expected = sum(actor_loss_by_hand(nets, batch, env, args, exploration, 0.05, s) for s in range(2))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    flats = [nets["actor"].flat, nets["critic"].flat]
    ours, theirs = (torch.autograd.grad(value, flats, allow_unused=True) for value in (loss, expected))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-7, atol=1e-11)
    assert ours[1] is None and theirs[1] is None and nets["critic_target"].flat.requires_grad is False
    assert not any(name.startswith("ernie/") for name in metrics)


def test_critic_loss_and_its_gradient_by_hand():
    args, env, nets, rollout, norm, _ = tiny()
    batch = script.prepare_rollout(nets, rollout, norm, env, args)
    loss, metrics = script.coma_critic_loss(nets, batch, args)
    expected = 0.0
    for s, n, m in itertools.product(range(2), range(3), range(6)):
        head = critic_heads(nets["critic"], s, batch["x"][s, 0, m], batch["joint"][s, m], n)
        q = head[batch["joint"][s, m, n].argmax()]
        expected = expected + 0.5 * (q - batch["targets"][s, n, m].item()) ** 2 / 18
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10) == metrics["losses/critic"].sum().item()
    flats = [nets["actor"].flat, nets["critic"].flat]
    ours, theirs = (torch.autograd.grad(value, flats, allow_unused=True) for value in (loss, expected))
    assert ours[0] is None
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-8, atol=1e-12)


def regularize(actor, obs, noise, norm, env, args, mode=None):
    """R [S, N, M] and delta."""
    network, unit = partial(script.policy, actor, env=env, args=args), script.perturbation_unit(norm, args)
    obs = obs[:, :, : noise.shape[2]]
    return script.regularizer(mode or args.regularizer, network, obs, network(obs), noise, unit, args)


@pytest.mark.parametrize("divergence", ["kl", "l2_probs", "l2"])
@pytest.mark.parametrize("ball", ["l2", "linf"])
@pytest.mark.parametrize("steps", [1, 3])
def test_hypergradient_is_the_derivative_of_the_whole_unroll(divergence, ball, steps):
    options = dict(divergence=divergence, norm=ball, attack_steps=steps, epsilon=0.3, attack_lr=None)
    args, env, nets, rollout, norm, noise = tiny(**options)
    obs, flat = script.prepare_rollout(nets, rollout, norm, env, args)["obs"], nets["actor"].flat

    def mean_reg(flat, mode=None):
        return regularize(script.MLP(flat, nets["actor"].sizes), obs, noise, norm, env, args, mode)[0].mean(2).sum()

    direction = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    whole, leader = (torch.autograd.grad(mean_reg(flat, m), flat)[0] for m in ("stackelberg", "adversarial"))
    measured = fourth_order(lambda step: mean_reg((flat + step * direction).detach()).item())
    assert (whole * direction).sum().item() == pytest.approx(measured, rel=1e-6)
    assert abs((leader * direction).sum().item() - measured) > 1e-4 * abs(measured)  # the leader alone would fail
    _, delta = regularize(nets["actor"], obs, noise, norm, env, args)
    assert (delta[:, 0, :, -1] == 0).all() and delta.abs().max() <= 0.3 * (1 + 1e-9)
    network, obs = partial(script.policy, nets["actor"], env=env, args=args), obs[:, :, :4]
    z, clean = network(obs + script.perturbation_unit(norm, args) * delta.detach()), network(obs)
    if divergence == "kl":  # written out, the padded action apart
        logp, logq = z.softmax(-1).clamp_min(1e-300).log(), clean.softmax(-1).clamp_min(1e-300).log()
        change = (z.softmax(-1) * (logp - logq)).sum(-1)
    else:
        link = partial(torch.softmax, dim=-1) if divergence == "l2_probs" else lambda x: x
        change = (link(z) - link(clean)).square().sum(-1)
    expected = torch.autograd.grad(change.mean(2).sum(), flat)[0]
    torch.testing.assert_close(leader, expected, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("mode", ["gaussian", "random", "adversarial", "stackelberg"])
def test_regulariser_adds_to_the_actors_of_the_team_alone(mode, detached):
    options = dict(regularizer=mode, reg_coef=0.7, reg_batch_size=5, detach_reference=detached)
    args, env, nets, rollout, norm, noise = tiny(**options)
    batch, unit = script.prepare_rollout(nets, rollout, norm, env, args), script.perturbation_unit(norm, args)
    schedule = torch.tensor([0.1, 0.05], device=DEVICE)
    assert noise.shape == (2, 3, 5, 4)
    loss = partial(script.coma_actor_loss, nets, batch, schedule)
    without, with_reg = (loss(n, unit, env, args) for n in (None, noise))  # (loss, metrics)
    change = regularize(nets["actor"], batch["obs"], noise, norm, env, args)[0]
    torch.testing.assert_close(with_reg[1]["ernie/regularizer"], change[:, :2].mean((1, 2)).detach())
    expected = 0.7 * change[:, :2].mean(2).sum()
    assert (with_reg[0] - without[0]).item() == pytest.approx(expected.item(), rel=1e-9)
    flat = nets["actor"].flat
    ours = torch.autograd.grad(with_reg[0], flat)[0] - torch.autograd.grad(without[0], flat)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, flat)[0], rtol=1e-7, atol=1e-11)
    rows = ours.view(2, 3, -1).abs().amax(2)
    assert (rows[:, 2] < 1e-13).all() and (rows[:, :2] > 1e-6).all()


def test_opponents_of_tag_are_not_regularised():
    args = Args(**(SPREAD | dict(env_id="simple_tag_v3", reg_coef=1.0, epsilon=0.5)))
    env = script.make_particles(args, 2, DEVICE)
    nets, _ = script.make_coma(env, args)
    streams, norm = script.make_generators(0, 1, "test", DEVICE), torch.ones(1, 4, 2, env.obs_mask.shape[1])
    norm = norm.to(DEVICE)
    rest = (torch.tensor(0.1, device=DEVICE), 0, streams, args)
    rollout, *_ = script.play_rollout(env.step, env, nets["actor"], norm, *env.reset(streams), *rest)
    batch, unit = script.prepare_rollout(nets, rollout, norm, env, args), script.perturbation_unit(norm, args)
    gradients = []
    for noise in (None, script.draw_attack(streams, env, args)):
        loss, _ = script.coma_actor_loss(nets, batch, torch.tensor([0.1, 0.0]), noise, unit, env, args)
        gradients.append(torch.autograd.grad(loss, nets["actor"].flat)[0])
    changed = (gradients[0] != gradients[1]).any(1).tolist()
    assert changed == env.cooperators.tolist() == [True, True, True, False]


def sgd(nets):
    return {name: torch.optim.SGD([nets[name].flat], 1.0) for name in ("actor", "critic")}


def losses_counted(calls):
    def count(name, function):
        return lambda *rest: (calls.append(name), function(*rest))[1]

    return {name: count(name, getattr(script, f"coma_{name}_loss")) for name in ("critic", "actor")}


def test_an_update_clips_each_network_and_moves_the_target():
    args, env, nets, rollout, norm, noise = tiny(max_grad_norm=0.01, tau=0.25, critic_updates=1)
    before, calls = {name: net.flat.detach().clone() for name, net in nets.items()}, []
    update = partial(script.update_coma, nets, sgd(nets), losses_counted(calls), rollout, norm)
    schedule = torch.tensor([0.1, 0.05], device=DEVICE)
    update(schedule, noise, 7, env, args)
    for name in ("actor", "critic"):
        step = (nets[name].flat - before[name]).norm(dim=1)
        torch.testing.assert_close(step, torch.full_like(step, 0.01))  # each network of each seed on its own
    target = before["critic_target"] + 0.25 * (nets["critic"].flat - before["critic_target"])
    torch.testing.assert_close(nets["critic_target"].flat, target.detach())
    update(schedule, noise, 7, env, dataclasses.replace(args, critic_updates=3))
    assert calls == ["critic", "actor", *3 * ["critic"], "actor"]


@pytest.mark.parametrize("now", [6, 8])
def test_a_stale_rollout_is_refused(now):
    args, env, nets, rollout, norm, noise = tiny()
    before, calls = {name: net.flat.detach().clone() for name, net in nets.items()}, []
    rest = (torch.tensor([0.1, 0.05]), noise, now, env, args)
    with pytest.raises(ValueError, match=f"policies after 7 steps, not {now}"):
        script.update_coma(nets, sgd(nets), losses_counted(calls), rollout, norm, *rest)
    assert not calls and all(torch.equal(nets[name].flat, flat) for name, flat in before.items())


def test_other_seeds_do_not_see_a_seeds_data():
    results = []
    for bump in (0.0, 1.0):
        args, env, nets, rollout, norm, noise = tiny()
        for name in ("obs", "rewards"):
            rollout[name][0] += bump
        optimizers = {name: torch.optim.Adam([nets[name].flat], 0.01) for name in ("actor", "critic")}
        rest = (torch.tensor([0.1, 0.05], device=DEVICE), noise, 7, env, args)
        metrics = script.update_coma(nets, optimizers, losses_counted([]), rollout, norm, *rest)
        results.append([*(net.flat.detach().view(2, -1) for net in nets.values()), *metrics.values()])
    for a, b in zip(*results):
        assert not torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# ------------------------------------------------------------------------------------------------------------- rollout


@pytest.mark.parametrize("exploration", [0.0, 0.5, 1.0])
def test_rollout_plays_the_policies_and_never_a_padded_action(exploration):
    options = dict(env_id="simple_speaker_listener_v4", num_seeds=2, num_envs=3000, rollout_steps=2)
    args = Args(**(SPREAD | options))
    env = script.make_particles(args, 6000, DEVICE)
    assert env.action_mask.sum(1).tolist() == [3, 5]
    nets, _ = script.make_coma(env, args)
    nets["actor"].flat.detach().mul_(3)
    streams = script.make_generators(0, 2, "test", DEVICE)
    norm = script.draw(torch.rand, (2, 2, env.obs_mask.shape[1]), streams) + 0.1
    state, first = env.reset(streams)
    rest = (torch.tensor(exploration, device=DEVICE), 9, streams, args)
    rollout, _, last, happened = script.play_rollout(env.step, env, nets["actor"], norm, state, first, *rest)
    assert torch.equal(rollout["obs"][:, :, 0].flatten(0, 1), first) and rollout["policy_steps"] == 9
    assert torch.equal(rollout["obs"][:, :, -1].flatten(0, 1), last)
    torch.testing.assert_close(happened["reward"], rollout["rewards"].mean(3).sum(2).mean(1))
    state = env.step(state, rollout["actions"][:, :, 0].argmax(-1).flatten(0, 1), env.draw(streams))
    assert torch.equal(state[1], rollout["obs"][:, :, 1].flatten(0, 1))
    assert torch.equal(state[2], rollout["rewards"][:, :, 0].flatten(0, 1))
    played = torch.cat([rollout["actions"], rollout["last_action"].unsqueeze(2)], 2)  # [S, B, T + 1, N, A]
    assert (played.sum(-1) == 1).all() and not (played.bool() & ~env.action_mask).any()
    x = script.normalize(rollout["obs"].flatten(1, 2).transpose(1, 2), norm)
    z = script.forward(nets["actor"].layers(), x, "relu").masked_fill(~env.action_mask[:, None], -math.inf)
    probs = (1 - exploration) * z.softmax(-1) + exploration * (env.action_mask / env.action_mask.sum(1)[:, None])[
        :, None
    ]
    probs = probs.transpose(1, 2).view_as(played)
    assert (played - probs).mean(1).abs().max() < 0.05  # at every step, by action: four standard errors
    likely = probs.argmax(-1, keepdim=True)
    if exploration < 1:
        hits, expected = (v.gather(-1, likely).mean((1, 2)) for v in (played, probs))
        assert (hits - expected).abs().max() < 0.03 and expected.min() > 0.25
    again = script.play_rollout(env.step, env, nets["actor"], norm, *env.reset(streams), *rest)[0]
    assert not torch.equal(again["actions"], rollout["actions"])


def test_schedules_fall_linearly(tmp_path, monkeypatch):
    seen, real = [], script.update_coma

    def watched(nets, optimizers, losses, rollout, norm, schedule, *rest):
        rates = [optimizers[name].param_groups[0]["lr"] for name in ("actor", "critic")]
        seen.append([*schedule.tolist(), *rates])
        return real(nets, optimizers, losses, rollout, norm, schedule, *rest)

    monkeypatch.setattr(script, "update_coma", watched)
    ends = dict(exploration=0.5, exploration_end=0.1, entropy_coef=0.2, entropy_coef_end=0.02)
    short_train(tmp_path, "run", SPREAD, learning_rate=1e-3, critic_learning_rate=2e-3, **ends)
    for k, found in enumerate(seen):
        expected = [0.5 - 0.04 * k, 0.2 - 0.018 * k, 1e-3 * (1 - k / 10), 2e-3 * (1 - k / 10)]
        assert found == pytest.approx(expected, rel=1e-5)
    assert len(seen) == 10


# ---------------------------------------------------------------------------------------------------------- evaluation


def drivers(num_episodes=3000, **options):
    """(args, env, nets, norm, obs, act, greedy): 3 agents of two seeds, norm with a dead entry, raw obs; agent 0 has
    two actions, agent 2 is no cooperator."""
    args, env, nets, _, norm, _ = tiny(**options)
    streams = script.make_generators(5, 2, "test", DEVICE)
    obs = norm[:, None, :, 0] + script.draw(torch.randn, (num_episodes, 3, 4), streams) * norm[:, None, :, 1]
    play = partial(script.act, nets=nets, norm=norm, obs=obs, generators=streams, env=env, args=args)
    return args, env, nets, norm, obs, play, play("clean", 0.0)


def test_clean_actions_are_the_likeliest_or_samples():
    args, env, nets, norm, obs, play, greedy = drivers()
    x = script.normalize(obs.transpose(1, 2), norm)
    probs = script.policy(nets["actor"], x, env, args).softmax(-1).transpose(1, 2)  # [S, E, N, A]
    assert torch.equal(greedy, probs.argmax(-1))
    sampled = F.one_hot(play("clean", 0.0, args=dataclasses.replace(args, eval_policy="sample")), 3)
    assert (sampled - probs).mean(1).abs().max() < 0.04 and sampled[:, :, 0, 2].sum() == 0


def test_flipped_actions_are_as_many_as_asked_for():
    _, env, *_, play, greedy = drivers()
    changed = {}
    for family in ("flip_one", "flip_each"):
        action = play(family, 0.3)
        changed[family] = (action != greedy).double()
        assert (action < env.action_mask.sum(1)).all()  # of two actions the other
        shift = (action - greedy)[:, :, 1] % 3  # of three, one of the other two
        share = (shift == 2).double().sum() / changed[family][:, :, 1].sum()
        assert share.item() == pytest.approx(0.5, abs=0.06)
    one, each = changed.values()
    assert one.sum(-1).max() == 1 and (one.mean((0, 1)) - 0.15)[:2].abs().max() < 0.02
    assert (each.mean((0, 1)) - 0.3)[:2].abs().max() < 0.03
    assert each[..., :2].prod(-1).mean().item() == pytest.approx(0.09, abs=0.02)  # independent
    assert not (one[..., 2].any() or each[..., 2].any())  # opponents act undisturbed
    for family in ("flip_one", "flip_each", "worst_one"):
        assert torch.equal(play(family, 0.0), greedy)


def test_worst_action_is_the_one_that_the_critic_likes_least():
    args, env, nets, norm, obs, play, greedy = drivers(100)
    found = play("worst_one", 1.0)
    x = script.normalize(obs.transpose(1, 2), norm).transpose(1, 2).flatten(2)
    joint, hits = F.one_hot(greedy, 3).double(), [0, 0, 0]
    for s, e in itertools.product(range(2), range(100)):
        worst = []
        for n in range(3):
            q = critic_heads(nets["critic"], s, x[s, e], joint[s, e], n)[: int(env.action_mask[n].sum())]
            worst.append(q.argmin().item())
        changed = (found[s, e] != greedy[s, e]).nonzero().flatten().tolist()
        assert len(changed) <= 1 and 2 not in changed
        for n in changed:
            assert found[s, e, n].item() == worst[n]
            hits[n] += 1
        assert changed or any(greedy[s, e, n].item() == worst[n] for n in range(2))
    assert hits[0] > 10 and hits[1] > 10


@pytest.mark.parametrize("ball", ["l2", "linf"])
@pytest.mark.parametrize("family", ["mad", "critic"])
def test_worst_observations_are_in_the_ball_and_worse_than_random_ones(family, ball):
    args, env, nets, norm, obs, *_ = drivers(200, norm=ball, epsilon_units="raw")
    x, streams = script.normalize(obs.transpose(1, 2), norm), script.make_generators(7, 2, "test", DEVICE)
    unit = script.perturbation_unit(norm, args)
    with torch.no_grad():
        worst = script.attack_policies(family, nets, x, unit, 0.5, streams, env, args)
    delta = worst - x
    length = torch.linalg.vector_norm(delta, math.inf if ball == "linf" else 2, dim=-1)
    assert length.max() <= 0.5 * (1 + 1e-9) and length[:, :2].mean() > 0.4
    assert (delta[:, 0, :, -1] == 0).all() and (delta[:, 2] == 0).all()  # opponents see undisturbed
    live = (unit > 0) * env.cooperators[:, None, None]
    random = x + live * script.rescale(script.draw(torch.randn, x.shape[1:], streams) * live, 0.5, ball)
    z, z_random, z_worst = (script.policy(nets["actor"], seen, env, args)[:, :2] for seen in (x, random, worst))
    if family == "mad":
        at_random, at_worst = (script.divergence("kl", other, z).mean() for other in (z_random, z_worst))
        assert at_worst > 1.5 * at_random
    else:
        greedy = F.one_hot(script.policy(nets["actor"], x, env, args).argmax(-1), 3).double().transpose(1, 2)
        q = script.counterfactual_values(nets["critic"], script.everybody(x), greedy, args)[:, :2]
        clean, at_random, at_worst = ((other.softmax(-1) * q).sum(-1).mean() for other in (z, z_random, z_worst))
        assert clean - at_worst > 1.5 * (clean - at_random).abs() and clean > at_worst


@pytest.mark.parametrize("trained,tested", [((2, 2), (4, 4)), ((1, 3), (3, 4))])
def test_tiled_lights_act_as_those_that_were_trained(trained, tested):
    args = Args(**(TRAFFIC | dict(num_seeds=2, rows=trained[0], cols=trained[1], idle_logit=0.0)))
    small = script.make_traffic(args, 2, DEVICE)
    large = script.make_traffic(args, 2, DEVICE, env_id="traffic_grid_v0", rows=tested[0], cols=tested[1])
    nets, _ = script.make_coma(small, args)
    streams = script.make_generators(0, 2, "test", DEVICE)
    norm = script.draw(torch.rand, (small.num_agents, 2, small.obs_mask.shape[1]), streams) + 0.1
    tiled, tiled_norm = script.tile(nets, norm, large, args)
    obs = 2 * script.draw(torch.randn, (30, small.num_agents, small.obs_mask.shape[1]), streams)
    cells = list(itertools.product(range(tested[0]), range(tested[1])))  # row-major from the bottom left
    twin = torch.tensor([r % trained[0] * trained[1] + c % trained[1] for r, c in cells], device=DEVICE)
    play = partial(script.act, "clean", 0.0, generators=streams, args=args)
    ours, theirs = play(tiled, tiled_norm, obs[:, :, twin], env=large), play(nets, norm, obs, env=small)
    assert torch.equal(ours, theirs[:, :, twin]) and 0 < theirs.float().mean() < 1


# ---------------------------------------------------------------------------------------------------------------- runs


def short_train(tmp_path, name, small, **options):
    args = Args(**(small | options))
    device = script.setup(args)
    num_envs = args.num_seeds * args.num_envs
    if args.is_traffic:
        env = script.make_traffic(args, num_envs, device, horizon=args.horizon - args.warmup, warmup=args.warmup)
    else:
        env = script.make_particles(args, num_envs, device)
    nets, optimizers = script.make_coma(env, args)
    folder = tmp_path / name
    folder.mkdir()
    norm = script.train(env, nets, optimizers, lambda f: f, args, folder, [])
    assert norm is not None
    return args, nets, norm, list(csv.DictReader(open(folder / "metrics.csv")))


ALONE = [(TRAFFIC, {}), (TRAFFIC, dict(regularizer="none", num_envs=4))]
ALONE += [(SPREAD, dict(num_envs=16, reg_batch_size=n, total_timesteps=800, log_interval=400)) for n in (16, 80)]


@pytest.mark.parametrize("small,options", ALONE)
def test_a_seed_does_not_depend_on_the_others(tmp_path, small, options):
    """On a CPU bit for bit; with a number of samples that is no multiple of 16, products may round a seed otherwise."""
    _, together, norms, rows = short_train(tmp_path, "together", small, seed=5, num_seeds=2, **options)
    for k in range(2):
        _, alone, norm, own = short_train(tmp_path, f"alone{k}", small, seed=5 + k, **options)
        for name in alone:
            assert alike(alone[name].flat, together[name].flat.unflatten(0, (2, -1))[k])
        assert alike(norm[0], norms[k])
        assert alike(without_speed(own), without_speed([row for row in rows if row["seed"] == str(5 + k)]))


MODES = [
    *(dict(regularizer=m) for m in ("none", "gaussian", "random", "adversarial", "stackelberg")),
    *(dict(divergence=d, norm=n) for d, n in (("kl", "linf"), ("l2", "l2"), ("l2_probs", "linf"))),
    dict(regularizer="gaussian", gaussian_std=1.0, epsilon_units="raw", activation="silu", detach_reference=True),
    dict(num_seeds=2, attack_steps=1, anneal_lr=False, normalize_advantage=False, activation="tanh"),
    dict(team_reward="sum", exploration=1.0, td_lambda=1.0, tau=1.0, eval_policy="sample"),
    dict(team_reward="mean", exploration=0.0, td_lambda=0.0, entropy_coef=0.0, critic_updates=1),
]
PARTICLES = [dict(env_id=f"simple_{name}") for name in ("tag_v3", "speaker_listener_v4", "world_comm_v3", "crypto_v3")]
LIGHTS = [
    dict(rows=1, cols=3, flow=(700.0,), warmup=0, model="idm"),
    dict(env_id="traffic_irregular_v0", team_reward="mean", idle_logit=0.5),
    dict(flow=("flow3",), num_seeds=2, regularizer="none"),
]


@pytest.mark.parametrize("small,options", [(SPREAD, o) for o in MODES + PARTICLES] + [(TRAFFIC, o) for o in LIGHTS])
def test_every_option_trains(tmp_path, small, options):
    args, nets, _, rows = short_train(tmp_path, "run", small, **options)
    assert {row["global_step"] for row in rows} == ({"60", "120"} if args.is_traffic else {"50", "100"})
    assert len(rows) == 2 * args.num_seeds and ("ernie/regularizer" in rows[0]) == args.regularized
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    make = script.make_traffic if args.is_traffic else script.make_particles
    fresh, _ = script.make_coma(make(args, 1, DEVICE), args)
    assert all((nets[name].flat != fresh[name].flat).any(1).all() for name in nets)


@pytest.mark.parametrize("options", [dict(attack_steps=0), dict(reg_coef=0.0), dict(epsilon=0.0)])
def test_no_regulariser_is_coma(tmp_path, options):
    _, coma, _, rows = short_train(tmp_path, "coma", SPREAD, regularizer="none")
    _, idle, _, own = short_train(tmp_path, "idle", SPREAD, **options)
    _, ernie, *_ = short_train(tmp_path, "ernie", SPREAD)
    assert all(torch.equal(coma[name].flat, idle[name].flat) for name in coma)
    assert without_speed(rows) == without_speed(own) and not torch.equal(coma["actor"].flat, ernie["actor"].flat)


def test_learns_to_spread(tmp_path):
    """Random policies have -27 or less, untrained greedy ones -31; these 750 small updates give about -21."""
    options = dict(num_envs=16, total_timesteps=60_000, hidden_size=64, reg_batch_size=32, gamma=0.95)
    options |= dict(critic_learning_rate=2e-3, eval_episodes=100, checkpoint_interval=10**6, log_interval=10**6)
    *_, rows = short_train(tmp_path, "run", SPREAD, **options)
    assert float(rows[-1]["eval/reward"]) > -24


def with_small(flags, small=TRAFFIC) -> list[str]:
    """These flags after those of `small`, which go with neither --resume nor --evaluate."""
    small = [f"--{k.replace('_', '-')}={v}" for k, v in small.items() if k != "track"] + ["--no-track"]
    again = any(str(flag).startswith(("--resume", "--evaluate")) for flag in flags)
    return [*([] if again else small), *map(str, flags)]


def main_with(monkeypatch, *flags, small=TRAFFIC):
    """main() in this process with the flags of `small` and these; None, or the exit code."""
    monkeypatch.setattr(sys, "argv", ["ernie_coma.py", *with_small(flags, small)])
    try:
        return script.main()
    except SystemExit as stop:
        return stop.code


METRICS = "reward queue wait delay emergency switch passed left_per_minute backlog".split()


def fake_wandb(monkeypatch):
    logged = [[], []]
    runs = [SimpleNamespace(log=lambda row, step=0, k=k: logged[k].append(row), finish=lambda: None) for k in range(2)]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=dict, Image=str))
    monkeypatch.setattr(script, "start_wandb", lambda *rest: runs)
    return logged


@TASKS
def test_a_whole_run_leaves_what_it_promises(tmp_path, monkeypatch, capsys, small):
    real = script.simulate  # test games of three seconds, the video's too
    short = partial(dataclasses.replace, warmup=2, horizon=3)
    monkeypatch.setattr(script, "simulate", lambda env, *rest: real(short(env), *rest))
    logged, lights = fake_wandb(monkeypatch), small is TRAFFIC
    main_with(monkeypatch, f"--runs-dir={tmp_path}", "--capture-video", "--num-seeds=2", small=small)
    folder, out = only(tmp_path), capsys.readouterr().out
    assert all(len(rows) == 3 and "robustness" in rows[2] and "eval/reward" in rows[1] for rows in logged)
    assert json.loads((folder / "args.json").read_text())["versions"]["torch"] == version("torch")
    for name in ("metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "robustness.png", "videos/episode.gif"):
        assert (folder / name).stat().st_size > 0
    text = (folder / "robustness.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    sweep = script.SWEEP if lights else script.PARTICLE_SWEEP
    swept = {("clean", "0.0"), *((family, str(s)) for family in sweep for s in sweep[family])}
    swept |= {("network", name) for name in script.NETWORKS} if lights else set()
    swept -= set() if lights else {("max_speed_scale", "0.5"), ("max_speed_scale", "2.0")}  # spread has no limit
    changed = {point for point in swept if point[0] in ("clean", "speed", "flow", "network")}
    expected = [("stackelberg", seed, swept) for seed in ("1", "2")] + [("fixed_time", "1", changed)] * lights
    for policy, seed, points in expected:
        found = [r for r in rows if (r["policy" if lights else "regularizer"], r["seed"]) == (policy, seed)]
        assert {(r["perturbation"], r["strength"]) for r in found} == points and len(found) == len(points)
    assert len(rows) == sum(len(points) for *_, points in expected)
    for row in rows:
        assert row["episodes"] == "2" and all(math.isfinite(float(row[name])) for name in METRICS if name in row)
        if lights:
            assert float(row["reward"]) == pytest.approx(sum(float(row[name]) for name in traffic.TERMS), abs=1e-3)
        else:
            assert -200 < float(row["return"]) < 0
    assert all(family in out and (strength in out or not lights) for family, strength in swept)
    assert main_with(monkeypatch, f"--evaluate={folder}") is None
    assert (folder / "robustness.csv").read_text() == text  # the same policies, the same episodes
    main_with(monkeypatch, f"--evaluate={folder}", "--eval-episodes=3")
    assert next(csv.DictReader(open(folder / "robustness.csv")))["episodes"] == "3"  # the flag beats the saved value


LONG = {
    "traffic": TRAFFIC | dict(horizon=400, warmup=50, total_timesteps=1200, checkpoint_interval=300, log_interval=500),
    "particle": SPREAD | dict(total_timesteps=1500, checkpoint_interval=120, log_interval=700),
}


@pytest.fixture(scope="module", params=LONG)
def uninterrupted(request, tmp_path_factory):
    """(flags, folder) of a run of more than one episode, with checkpoints in the middle of them."""
    folder = tmp_path_factory.mktemp("whole")
    short_train(folder, "run", LONG[request.param])
    return LONG[request.param], folder / "run"


def flatten(value) -> list:
    if isinstance(value, dict | list | tuple):
        return [part for item in (value.values() if isinstance(value, dict) else value) for part in flatten(item)]
    return [value]


def assert_same_run(folder, reference):
    ours, theirs = (list(csv.DictReader(open(f / "metrics.csv"))) for f in (folder, reference))
    assert without_speed(ours) == without_speed(theirs) and len(ours) == 3
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, reference))
    for part in ("nets", "optimizers", "streams", "norm", "world", "obs", "iteration", "step"):
        a, b = flatten(ours[part]), flatten(theirs[part])
        assert len(a) == len(b) and all(
            torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b)
        )


def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, uninterrupted):
    small, reference = uninterrupted
    process = start_script("ernie_coma.py", *with_small([f"--runs-dir={tmp_path}"], small))
    until = time.time() + 120
    while not list(tmp_path.glob("*/checkpoint.previous.pt")) and process.poll() is None and time.time() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    folder = only(tmp_path)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 0 < saved["step"] < small["total_timesteps"] and (small["rollout_steps"] == 5 or saved["world"] is not None)
    with open(folder / "metrics.csv", "a") as file:
        file.write("1,99")  # what a kill in the middle of a write leaves
    monkeypatch.setattr(script, "lights_report", lambda *rest: None)
    monkeypatch.setattr(script, "particles_report", lambda *rest: None)
    assert main_with(monkeypatch, f"--resume={folder}") is None
    assert_same_run(folder, reference)


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path, monkeypatch, capsys, uninterrupted):
    (small, reference), calls, real = uninterrupted, [], script.play_rollout
    stop, total = {10: (22, 50), 5: (63, 150)}[small["rollout_steps"]]  # in the middle of an episode, no log is due

    def play_rollout(*rest):
        calls.append(1)
        if len(calls) == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*rest)

    monkeypatch.setattr(script, "play_rollout", play_rollout)
    monkeypatch.setattr(script, "lights_report", lambda *rest: None)
    monkeypatch.setattr(script, "particles_report", lambda *rest: None)
    assert main_with(monkeypatch, f"--runs-dir={tmp_path}", small=small) == 130
    folder = only(tmp_path)
    assert f"--resume {folder}" in capsys.readouterr().err and len(calls) == stop
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["world"] is not None
    assert main_with(monkeypatch, f"--resume={folder}") is None and len(calls) == total
    assert_same_run(folder, reference)


def test_two_ranks_train_one_policy(tmp_path):
    flags = ["--log-interval=1000", "--total-timesteps=60", f"--runs-dir={tmp_path}", "--no-cuda"]
    flags = with_small(flags, SPREAD)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    finish(subprocess.Popen([*launch, str(ROOT / "ernie_coma.py"), *flags], stderr=subprocess.PIPE, text=True))
    folder = only(tmp_path)
    a, b = (torch.load(folder / n, weights_only=True) for n in ("checkpoint.pt", "checkpoint_rank1.pt"))
    assert all(torch.equal(a["nets"][name], b["nets"][name]) for name in a["nets"]) and a["world"] is not None
    assert torch.equal(a["norm"], b["norm"]) and not torch.equal(a["obs"], b["obs"])
    assert (folder / "robustness.csv").exists()


ZOO = SPREAD | dict(env_id="zoo:mpe2.simple_spread_v3", rollout_steps=25, total_timesteps=100)


def test_a_pettingzoo_environment_trains_on_whole_episodes(tmp_path, monkeypatch, capsys):
    error = refused(monkeypatch, capsys, "--rollout-steps=5", small=ZOO)
    assert "--rollout-steps must be the 25 steps of an episode, got 5" in error
    monkeypatch.setattr(script, "PARTICLE_SWEEP", {"mad": (0.1,), "worst_one": (0.2,), "damping": (2.0,)})
    assert main_with(monkeypatch, f"--runs-dir={tmp_path}", small=ZOO) is None
    folder = only(tmp_path)
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [row["global_step"] for row in rows] == ["50", "100"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    found = [row["perturbation"] for row in csv.DictReader(open(folder / "robustness.csv"))]
    assert found == ["clean", "mad", "worst_one"]  # its physics are its own


def test_a_rollout_of_one_sample(tmp_path, monkeypatch):
    """Its advantage has no spread."""
    monkeypatch.setattr(script, "lights_report", lambda *args: None)
    flags = ["--rows=1", "--cols=1", "--num-envs=1", "--rollout-steps=1", "--total-timesteps=40", "--log-interval=20"]
    main_with(monkeypatch, f"--runs-dir={tmp_path}", *flags)
    rows = list(csv.DictReader(open(only(tmp_path) / "metrics.csv")))
    assert rows and all(math.isfinite(float(row["losses/policy"])) for row in rows)


# ----------------------------------------------------------------------------------------------------------- bad input


BAD_VALUES = {
    **dict.fromkeys(["num_seeds", "num_threads", "num_agents", "rows", "cols", "num_envs", "horizon"], 0),
    **dict.fromkeys(["rollout_steps", "critic_updates", "hidden_size", "reg_batch_size", "total_timesteps"], 0),
    **dict.fromkeys(["log_interval", "checkpoint_interval", "eval_episodes", "eval_seconds"], 0),
    **dict.fromkeys(["learning_rate", "critic_learning_rate", "reward_scale", "max_grad_norm", "attack_lr"], 0.0),
    **dict.fromkeys(["attack_init", "gaussian_std"], 0.0),
    **dict.fromkeys(["seed", "attack_steps", "eval_warmup"], -1),
    **dict.fromkeys(["exploration_end", "entropy_coef", "entropy_coef_end", "tau", "td_lambda"], -0.1),
    **{"gamma": 1.5, "exploration": 1.1, "epsilon": math.nan, "reg_coef": math.inf, "idle_logit": math.inf},
    **{"backend": "sumo", "warmup": 40},  # 40 is --horizon
}


def refused(monkeypatch, capsys, *flags, small=TRAFFIC) -> str:
    return refusal(script, monkeypatch, capsys, *with_small(flags, small))


@pytest.mark.parametrize("name,value", BAD_VALUES.items())
def test_bad_value_is_one_line_that_names_the_flag(monkeypatch, capsys, name, value):
    bad_value(script, monkeypatch, capsys, name, value, *with_small([]))


def test_every_number_has_a_bad_value():
    numbers = {name for name, v in Args().__dict__.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    assert numbers <= BAD_VALUES.keys()


def test_values_that_do_not_go_together(monkeypatch, capsys, tmp_path):
    bad = partial(refused, monkeypatch, capsys)
    assert "--rollout-steps must divide the 30 steps of an episode, got 7" in bad("--rollout-steps=7")
    assert "--rollout-steps must divide the 25 steps of an episode" in bad("--rollout-steps=10", small=SPREAD)
    error = bad("--flow=flow9")
    assert "flow must be one of train, flow1" in error and "'flow9'" in error
    assert "flow must have 8 entries" in bad("--flow", "1", "2", "3")
    assert "flow must be 0 or more" in bad("--flow", *"1 2 3 4 5 6 7 -8".split())
    assert "--flow must be" in bad("--flow", "flow1", "flow2")
    for flags in (["--rows=2"], ["--cols=2"], ["--flow", "flow1"]):
        assert f"{flags[0][:6]} must be left out with a particle task" in bad(*flags, small=SPREAD).replace("=2", "")
    assert "--num-agents must be left out with traffic" in bad("--num-agents=3")
    assert "num_agents" in bad("--env-id=simple_tag_v3", "--num-agents=3", small=SPREAD)
    assert "--resume must be left out with --evaluate" in bad(f"--evaluate={tmp_path}", f"--resume={tmp_path}")
    assert "traffic_grid_v0" in bad("--env-id=traffic_gird_v0")
    assert "simple_spread_v3" in bad("--env-id=simple_spred_v3", small=SPREAD)
    assert "--env-id must have discrete actions, got 'hover_v0'" in bad("--env-id=hover_v0", small=SPREAD)
    assert "--no-such-flag" in bad("--no-such-flag")
    assert "no checkpoint at" in bad(f"--resume={tmp_path}/nowhere")


def test_broken_and_foreign_checkpoints(monkeypatch, capsys, tmp_path, uninterrupted):
    bad, (small, reference) = partial(refused, monkeypatch, capsys), uninterrupted
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes((reference / name).read_bytes())
    assert "--gamma is read from" in bad(f"--resume={tmp_path}", "--gamma=0.5")
    if small["rollout_steps"] == 5:
        assert "torch with a particle task" in bad(f"--evaluate={tmp_path}", "--backend=sumo")
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    error = bad(f"--resume={tmp_path}")
    assert "no readable checkpoint" in error and "checkpoint.previous.pt" in error
    monkeypatch.setattr(sys, "argv", ["ernie_coma.py"])
    state = script.load_run(Args(resume=f"{tmp_path}/checkpoint.previous.pt"))[1]
    assert state["iteration"] > 0  # the one before still loads
    torch.save({"script": "ernie_maddpg"}, tmp_path / "checkpoint.pt")
    assert "was written by ernie_maddpg.py" in bad(f"--evaluate={tmp_path}")


@pytest.mark.parametrize("uninterrupted", ["traffic"], indirect=True)
def test_sumo_that_is_not_installed(monkeypatch, capsys, uninterrupted):
    try:
        import libsumo  # noqa: F401
    except ImportError:
        error = refused(monkeypatch, capsys, f"--evaluate={uninterrupted[1]}", "--backend=sumo")
        assert "pip install -r requirements-sumo.txt" in error
    else:
        pytest.skip("SUMO is installed")


def test_non_finite_loss_stops_with_the_step_and_the_last_checkpoint(monkeypatch, capsys, tmp_path):
    real, calls = script.coma_critic_loss, []

    def poisoned(*rest):
        loss, metrics = real(*rest)
        calls.append(1)
        return loss, metrics | {"losses/critic": metrics["losses/critic"] * (math.nan if len(calls) > 18 else 1)}

    monkeypatch.setattr(script, "coma_critic_loss", poisoned)
    error = refused(monkeypatch, capsys, f"--runs-dir={tmp_path}", small=SPREAD)
    last = only(tmp_path) / "checkpoint.pt"
    assert "losses/critic is not finite at step" in error and str(last) in error and last.exists()
