"""ernie_coma.py: values, targets and losses by hand, gradients against finite differences, runs."""

import itertools
import math
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from commands import (
    alike,
    check_rollouts_in_a_cuda_graph,
    check_updates_in_a_cuda_graph,
    fourth_order,
    learner,
    only,
    plain,
    rotated,
    without_speed,
)

import envs
import ernie_coma as script
from envs import perturb, robustness, runs
from ernie_coma import Args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = dict(num_envs=2, rollout_steps=5, hidden_size=16, reg_batch_size=8, checkpoint_interval=20, eval_episodes=2)
SMALL |= dict(regularizer="stackelberg", reg_coef=0.1, epsilon=0.1, attack_steps=3, wandb_mode="disabled")
TRAFFIC = SMALL | dict(horizon=40, warmup=10, rollout_steps=10, total_timesteps=120, log_interval=60, model="krauss")
TRAFFIC |= dict(eval_warmup=2, eval_seconds=3, compile=False)
SPREAD = SMALL | dict(env_id="simple_spread_v3", total_timesteps=100, log_interval=50)


def tiny(sizes=(2, 3, 3), team=(True, True, False), num_envs=2, steps=3, **options):
    """(args, env, nets, episodes, noise): two seeds, random networks far from linear and a random rollout in float64.
    The last observation of agent 0 does not vary, agent 0 has fewer actions; env has only what losses ask for."""
    torch.set_default_dtype(torch.float64)
    args = dict(num_seeds=2, num_envs=num_envs, rollout_steps=steps, hidden_size=5, reg_batch_size=4, activation="tanh")
    args = Args(**(SMALL | args | dict(reward_scale=1.0) | options))
    N, O, A = len(sizes), 4, max(sizes)
    mask = torch.arange(A, device=DEVICE) < torch.tensor(sizes, device=DEVICE)[:, None]
    env = SimpleNamespace(num_agents=N, action_mask=mask, action_sizes=sizes, discrete=True, device=DEVICE)
    env.obs_mask = torch.ones(N, O, dtype=torch.bool, device=DEVICE)
    env.cooperators = torch.tensor(team, device=DEVICE)
    nets, _ = script.make_nets(env, args)
    streams = envs.make_generators(3, 2, "test", DEVICE)
    normal = partial(envs.per_seed, torch.randn, generators=streams)
    for name in ("actor", "critic", "critic_target"):
        flat = nets[name].flat.detach()
        flat.mul_(2).add_(0.3 * normal((len(flat) // 2, flat.shape[1])).flatten(0, 1))
    nets["normalizer"].flat[:, :, 0] = normal((N, O))
    nets["normalizer"].flat[:, :, 1] = envs.per_seed(torch.rand, (N, O), streams) + 0.5
    nets["normalizer"].flat[:, 0, 1, -1] = 0
    S, B, T = 2, num_envs, steps
    action = (envs.per_seed(torch.rand, (N, B, T + 1), streams) * mask.sum(1)[:, None, None]).long()
    obs = normal((N, B, T + 1, O))
    obs[:, 0, ..., -1] = 0
    episodes = {
        "obs": obs,
        "actions": F.one_hot(action, A).double(),
        "rewards": normal((N, B, T)),
        "terminated": (torch.arange(S * B * T, device=DEVICE).view(S, 1, B, T) % 5 == 1).double(),
        "exploration": torch.tensor(0.1, device=DEVICE),
        "entropy_coef": torch.tensor(0.05, device=DEVICE),
        "policy_steps": torch.tensor(7),
    }
    return args, env, nets, episodes, script.draw_noise(streams, env, args)


def prepared(**options):
    """(args, env, nets, batch) of a tiny problem, noise included."""
    args, env, nets, episodes, noise = tiny(**options)
    return args, env, nets, script.prepare(nets, episodes, 7, env, args) | noise


def state_of(batch, s, m):
    return batch["obs"][s, :, m].flatten()


def critic_heads(critic, s, state, joint, n):
    """Q(s, (a_-n, .)) [A] of agent n: state [N * O], the one-hot actions joint [N, A] without its own, its number."""
    others = joint.clone()
    others[n] = 0
    number = torch.eye(len(joint), device=DEVICE)[n]
    return plain(critic, s, torch.cat([state, others.flatten(), number]))


@pytest.mark.parametrize("sizes", [(2, 3, 3), (2, 2)])
def test_counterfactual_values_against_the_critic_written_out(sizes):
    _, _, nets, batch = prepared(sizes=sizes, team=[True] * len(sizes))
    values = script.counterfactual_values(nets["critic"], batch["obs"], batch["actions"])
    for s, n, m in itertools.product(range(2), range(len(sizes)), range(6)):
        expected = critic_heads(nets["critic"], s, state_of(batch, s, m), batch["actions"][s, :, m], n)
        torch.testing.assert_close(values[s, n, m], expected, rtol=1e-10, atol=1e-12)
    other = batch["actions"].clone()
    other[:, 0] = other[:, 0].flip(-1)
    again = script.counterfactual_values(nets["critic"], batch["obs"], other)
    changed = (again - values).abs().amax((2, 3)) > 1e-6  # [S, N]
    assert not changed[:, 0].any() and changed[:, 1:].all()  # an agent's own action is no input, only a head


def test_a_rollout_becomes_a_batch():
    """Every entry by hand, with the targets as a sum of n-step returns of the target critic."""
    args, env, nets, episodes, _ = tiny(gamma=0.9, td_lambda=0.7, team_reward="sum")
    batch = script.prepare(nets, episodes, 7, env, args)
    for s, b in itertools.product(range(2), range(2)):
        states, joints = [], []
        for t in range(4):
            states.append(episodes["obs"][s, :, b, t].flatten())
            joints.append(episodes["actions"][s, :, b, t])
            if t < 3:
                assert torch.equal(batch["obs"][s, :, 3 * b + t], episodes["obs"][s, :, b, t])
                assert torch.equal(batch["actions"][s, :, 3 * b + t], joints[t])
        for n in range(3):
            heads = [critic_heads(nets["critic_target"], s, x, a, n) for x, a in zip(states, joints)]
            q = [head[joint[n].argmax()].item() for head, joint in zip(heads, joints)]
            own = episodes["rewards"][s, :, b].T.tolist()
            rewards = [r[0] + r[1] if n < 2 else r[2] for r in own]
            ended = episodes["terminated"][s, 0, b].tolist()
            for t in range(3):
                expected = lambda_return(rewards, q, ended, t, 0.9, 0.7)
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
    targets = script.td_lambda_targets(rewards, values, terminated, args)
    for k, t in itertools.product(range(2), range(7)):
        series = (x[k].tolist() for x in (rewards, values, terminated))
        assert targets[k, t].item() == pytest.approx(lambda_return(*series, t, 0.9, lam), rel=1e-12)
    if lam == 0:
        torch.testing.assert_close(targets, rewards + 0.9 * (1 - terminated) * values[:, 1:])


def test_the_baseline_is_the_policys_mean_value():
    """The advantage is the action's value less that of the policy's mean, a number to the gradient."""
    args, env, nets, batch = prepared(regularizer="none", normalize_advantage=False)
    batch["entropy_coef"] = torch.zeros((), device=DEVICE)
    output = script.policy(nets["actor"], batch["obs"], env)
    probs = script.mixed_logprobs(output, batch["exploration"]).exp()
    q = script.counterfactual_values(nets["critic"], batch["obs"], batch["actions"])
    baseline = (probs * q).sum(-1)
    taken = (q * batch["actions"]).sum(-1)
    gain = ((taken - baseline).detach() * (probs * batch["actions"]).sum(-1).log()).mean(2).sum()
    loss, _ = script.actor_loss(nets, batch, env, args)
    assert loss.item() == pytest.approx(-gain.item(), rel=1e-10)
    flat = nets["actor"].flat
    ours, theirs = (torch.autograd.grad(value, flat)[0] for value in (loss, -gain))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("team", ["own", "mean", "sum"])
def test_team_rewards_by_hand(team):
    members = [True, False, True, False, False]
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    env, args = SimpleNamespace(cooperators=torch.tensor(members)), Args(team_reward=team)
    expected = {"own": [1, 2, 4, 8, 16], "mean": [2.5, 26 / 3, 2.5, 26 / 3, 26 / 3], "sum": [5, 26, 5, 26, 26]}[team]
    shared = script.team_rewards(rewards[:, None, None].expand(2, 5, 3, 4), env, args)
    torch.testing.assert_close(shared, torch.tensor(expected)[:, None, None].expand(2, 5, 3, 4).float())


@pytest.mark.parametrize("exploration", [0.0, 0.3, 1.0])
def test_exploration_mixes_with_the_uniform_policy_of_valid_actions(exploration):
    _, env, *_ = tiny()
    z = envs.per_seed(torch.randn, (3, 50, 3), envs.make_generators(1, 2, "test", DEVICE)) * 3
    z = torch.where(env.action_mask[:, None], z, -1e9).requires_grad_()
    uniform = env.action_mask / env.action_mask.sum(1, keepdim=True)
    expected = (1 - exploration) * F.softmax(z, -1) + exploration * uniform[:, None]
    logprobs = script.mixed_logprobs(z, torch.tensor(exploration, device=DEVICE))
    torch.testing.assert_close(logprobs.exp(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones_like(logprobs[..., 0]))
    assert (logprobs[:, 0, :, 2].exp() == 0).all() and not (logprobs.exp()[:, 1:] == 0).any()
    weights = torch.where(env.action_mask[:, None], torch.arange(1.0, 4.0, device=DEVICE), 0)
    values = (logprobs, expected.clamp_min(1e-300).log())
    ours, theirs = (torch.autograd.grad((v * weights).sum(), z, retain_graph=True)[0] for v in values)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    entropy = (logprobs.exp() * logprobs).sum()
    assert entropy.isfinite() and torch.autograd.grad(entropy, z)[0].isfinite().all()


def actor_loss_by_hand(nets, batch, env, args, s):
    """Without regulariser, of seed s, an agent and a sample at a time; advantages are numbers."""
    N, M = batch["obs"].shape[1:3]
    exploration, entropy_coef = batch["exploration"].item(), batch["entropy_coef"].item()
    terms, advantages, entropy = [], [], 0.0
    for n, m in itertools.product(range(N), range(M)):
        valid = int(env.action_mask[n].sum())
        logits = plain(nets["actor"], s * N + n, batch["obs"][s, n, m])[:valid]
        probs = (1 - exploration) * torch.softmax(logits, 0) + exploration / valid
        q = critic_heads(nets["critic"], s, state_of(batch, s, m), batch["actions"][s, :, m], n)[:valid].tolist()
        taken = batch["actions"][s, n, m].argmax().item()
        worth = batch["targets"][s, n, m].item() if args.advantage == "targets" else q[taken]
        advantages.append(worth - sum(p * value for p, value in zip(probs.tolist(), q)))
        terms.append(probs[taken].log())
        entropy = entropy - (probs * probs.log()).sum() / M
    spread = torch.tensor(advantages).std(correction=0).item() + 1e-8 if args.normalize_advantage else 1.0
    gain = sum(term * advantage / spread for term, advantage in zip(terms, advantages)) / M
    return -gain - entropy_coef * entropy


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("exploration", [0.0, 0.2])
@pytest.mark.parametrize("advantage", ["q", "targets"])
def test_actor_loss_and_its_gradient_by_hand(normalize, exploration, advantage):
    """The policies move through log pi and the entropy alone: by hand the advantages are numbers."""
    args, env, nets, batch = prepared(normalize_advantage=normalize, regularizer="none", advantage=advantage)
    batch["exploration"] = torch.tensor(exploration, device=DEVICE)
    loss, metrics = script.actor_loss(nets, batch, env, args)
    expected = sum(actor_loss_by_hand(nets, batch, env, args, s) for s in range(2))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    flats = [nets["actor"].flat, nets["critic"].flat]
    ours, theirs = (torch.autograd.grad(value, flats, allow_unused=True) for value in (loss, expected))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-7, atol=1e-11)
    assert ours[1] is None and theirs[1] is None and nets["critic_target"].flat.requires_grad is False
    assert not any(name.startswith("ernie/") for name in metrics)


def test_critic_loss_and_its_gradient_by_hand():
    args, env, nets, batch = prepared()
    loss, metrics = script.critic_loss(nets, batch, env, args)
    expected = 0.0
    for s, n, m in itertools.product(range(2), range(3), range(6)):
        head = critic_heads(nets["critic"], s, state_of(batch, s, m), batch["actions"][s, :, m], n)
        q = head[batch["actions"][s, n, m].argmax()]
        expected = expected + 0.5 * (q - batch["targets"][s, n, m].item()) ** 2 / 18
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10) == metrics["losses/critic"].sum().item()
    flats = [nets["actor"].flat, nets["critic"].flat]
    ours, theirs = (torch.autograd.grad(value, flats, allow_unused=True) for value in (loss, expected))
    assert ours[0] is None
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-8, atol=1e-12)


def regularize(nets, batch, env, args, mode=None):
    """R [S, N, M] and delta."""
    obs = batch["obs"][:, :, : args.reg_batch_size]
    clean = script.policy(nets["actor"], obs, env)
    mode_args = replace(args, regularizer=mode or args.regularizer)
    return script.regularizer(nets, obs, clean, batch["perturbation"], env, mode_args)


@pytest.mark.parametrize("divergence", ["kl", "l2_probs", "l2"])
@pytest.mark.parametrize("ball", ["l2", "linf"])
@pytest.mark.parametrize("steps", [1, 3])
def test_hypergradient_is_the_derivative_of_the_whole_unroll(divergence, ball, steps):
    options = dict(divergence=divergence, norm=ball, attack_steps=steps, epsilon=0.3, attack_lr=None)
    args, env, nets, batch = prepared(**options)
    flat = nets["actor"].flat

    def mean_reg(flat, mode=None):
        moved = nets | {"actor": replace(nets["actor"], flat=flat)}
        return regularize(moved, batch, env, args, mode)[0].mean(2).sum()

    direction = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    whole, leader = (torch.autograd.grad(mean_reg(flat, m), flat)[0] for m in ("stackelberg", "adversarial"))
    measured = fourth_order(lambda step: mean_reg((flat + step * direction).detach()).item())
    assert (whole * direction).sum().item() == pytest.approx(measured, rel=1e-6)
    assert abs((leader * direction).sum().item() - measured) > 1e-4 * abs(measured)  # the leader alone would fail
    _, delta = regularize(nets, batch, env, args)
    assert (delta[:, 0, :, -1] == 0).all() and delta.abs().max() <= 0.3 * (1 + 1e-9)
    obs = batch["obs"][:, :, :4]
    unit = nets["normalizer"].unit(args.epsilon_units)
    z = script.policy(nets["actor"], obs + unit * delta.detach(), env)
    clean = script.policy(nets["actor"], obs, env)
    if divergence == "kl":  # written out, the padded action apart
        logprobs, clean_logprobs = z.softmax(-1).clamp_min(1e-300).log(), clean.softmax(-1).clamp_min(1e-300).log()
        change = (z.softmax(-1) * (logprobs - clean_logprobs)).sum(-1)
    else:
        link = partial(torch.softmax, dim=-1) if divergence == "l2_probs" else lambda x: x
        change = (link(z) - link(clean)).square().sum(-1)
    expected = torch.autograd.grad(change.mean(2).sum(), flat)[0]
    torch.testing.assert_close(leader, expected, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("mode", ["gaussian", "random", "adversarial", "stackelberg"])
def test_regulariser_adds_to_the_actors_of_the_team_alone(mode):
    args, env, nets, batch = prepared(regularizer=mode, reg_coef=0.7, reg_batch_size=5, idle_logit=2.0)
    assert batch["perturbation"].shape == (2, 3, 5, 4)
    without = script.actor_loss(nets, batch, env, replace(args, regularizer="none"))
    with_reg = script.actor_loss(nets, batch, env, args)  # (loss, metrics)
    change = regularize(nets, batch, env, args)[0]
    torch.testing.assert_close(with_reg[1]["ernie/regularizer"], change[:, :2].mean((1, 2)).detach())
    expected = 0.7 * change[:, :2].mean(2).sum()
    assert (with_reg[0] - without[0]).item() == pytest.approx(expected.item(), rel=1e-9)
    flat = nets["actor"].flat
    ours = torch.autograd.grad(with_reg[0], flat)[0] - torch.autograd.grad(without[0], flat)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, flat)[0], rtol=1e-7, atol=1e-11)
    rows = ours.view(2, 3, -1).abs().amax(2)
    assert (rows[:, 2] < 1e-13).all() and (rows[:, :2] > 1e-6).all()


def sgd(nets):
    return {name: torch.optim.SGD([nets[name].flat], 1.0) for name in ("actor", "critic")}


def losses_counted(calls):
    def count(name, function):
        return lambda *rest: (calls.append(name), function(*rest))[1]

    return {name: count(name, getattr(script, f"{name}_loss")) for name in ("critic", "actor")}


def flats(nets):
    return {name: net.flat.detach().clone() for name, net in nets.items()}


def test_an_update_clips_each_network_and_moves_the_target():
    args, env, nets, batch = prepared(max_grad_norm=0.01, tau=0.25, critic_updates=1)
    before, calls = flats(nets), []
    update = partial(script.update, nets, sgd(nets), losses_counted(calls), batch, env)
    update(args)
    for name in ("actor", "critic"):
        step = (nets[name].flat - before[name]).norm(dim=1)
        torch.testing.assert_close(step, torch.full_like(step, 0.01))  # each network of each seed on its own
    target = before["critic_target"] + 0.25 * (nets["critic"].flat - before["critic_target"])
    torch.testing.assert_close(nets["critic_target"].flat, target.detach())
    assert torch.equal(nets["normalizer"].flat, before["normalizer"])
    update(replace(args, critic_updates=3))
    assert calls == ["critic", "actor", *3 * ["critic"], "actor"]


@pytest.mark.parametrize("now", [6, 8])
def test_a_stale_rollout_is_refused(now):
    args, env, nets, episodes, _ = tiny()
    with pytest.raises(ValueError, match=f"policies after 7 steps, not {now}"):
        script.prepare(nets, episodes, now, env, args)


def test_other_seeds_do_not_see_a_seeds_data():
    results = []
    for bump in (0.0, 1.0):
        args, env, nets, episodes, noise = tiny()
        for name in ("obs", "rewards"):
            episodes[name][0] += bump
        optimizers = {name: torch.optim.Adam([nets[name].flat], 0.01) for name in ("actor", "critic")}
        batch = script.prepare(nets, episodes, 7, env, args) | noise
        metrics = script.update(nets, optimizers, losses_counted([]), batch, env, args)
        trained = [nets[name].flat.detach().view(2, -1) for name in ("actor", "critic", "critic_target")]
        results.append([*trained, *metrics.values()])
    for a, b in zip(*results):
        assert not torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# ------------------------------------------------------------------------------------------------------------- rollout


def play(env, nets, streams, args, exploration, step_env=None):
    schedule = {"exploration": torch.tensor(exploration, device=DEVICE), "policy_steps": torch.tensor(9)}
    start = env.reset(streams)
    draws = script.draw_rollout(env, streams, args)
    return start, *script.rollout(step_env or env.step, env, nets, start, draws, schedule)


@pytest.mark.parametrize("exploration", [0.0, 0.5, 1.0])
def test_rollout_plays_the_policies_and_never_a_padded_action(exploration):
    options = dict(env_id="simple_speaker_listener_v4", num_seeds=2, num_envs=3000, rollout_steps=2)
    args = Args(**(SPREAD | options))
    env = script.make_env(args, 6000, DEVICE)
    assert env.action_mask.sum(1).tolist() == [3, 5]
    nets, _ = script.make_nets(env, args)
    nets["actor"].flat.detach().mul_(3)
    streams = envs.make_generators(0, 2, "test", DEVICE)
    nets["normalizer"].flat = envs.per_seed(torch.rand, (2, 2, env.obs_mask.shape[1]), streams) + 0.1
    mean, std = nets["normalizer"].flat.unsqueeze(3).unbind(2)
    start, end, episodes, outcomes = play(env, nets, streams, args, exploration)

    def seen(obs):
        return ((envs.by_agent(obs, 2) - mean) / std).clamp(-10, 10)

    torch.testing.assert_close(episodes["obs"][:, :, :, 0], seen(start[1]))
    torch.testing.assert_close(episodes["obs"][:, :, :, 2], seen(end[1]))
    assert torch.equal(end[1], env.observe(end[0])) and episodes["policy_steps"] == 9
    torch.testing.assert_close(outcomes["charts/reward"], episodes["rewards"].mean((1, 2, 3)))
    after = env.step(start[0], envs.for_env(episodes["actions"][:, :, :, 0], env), env.draw(streams))
    torch.testing.assert_close(episodes["obs"][:, :, :, 1], seen(after[1]))
    assert torch.equal(envs.by_agent(after[2], 2), episodes["rewards"][..., 0])
    played = episodes["actions"]  # [S, N, B, T + 1, A]
    mask = env.action_mask[:, None, None]
    assert (played.sum(-1) == 1).all() and not (played.bool() & ~mask).any()
    z = nets["actor"](episodes["obs"].flatten(2, 3)).view_as(played).masked_fill(~mask, -math.inf)
    probs = (1 - exploration) * z.softmax(-1) + exploration * mask / mask.sum(-1, keepdim=True)
    assert (played - probs).mean(2).abs().max() < 0.05  # at every step, by action: four standard errors
    likely = probs.argmax(-1, keepdim=True)
    if exploration < 1:
        hits, expected = (v.gather(-1, likely).mean((2, 3)) for v in (played, probs))
        assert (hits - expected).abs().max() < 0.03 and expected.min() > 0.25
    *_, again, _ = play(env, nets, streams, args, exploration)
    assert not torch.equal(again["actions"], episodes["actions"])


def test_outcomes_of_lights_are_means_of_their_terms():
    args = Args(**(TRAFFIC | dict(num_seeds=2, rollout_steps=4)))
    env = script.make_env(args, 4, DEVICE, warmup=30)
    nets, _ = script.make_nets(env, args)
    _, end, episodes, outcomes = play(env, nets, envs.make_generators(0, 2, "test", DEVICE), args, 0.5)
    torch.testing.assert_close(outcomes["charts/reward"], episodes["rewards"].sum(1).mean((1, 2)))
    terms = sum(outcomes[f"charts/{name}"] for name in script.traffic.TERMS)
    torch.testing.assert_close(outcomes["charts/reward"], terms)
    assert (end[0].t == 34).all()


def test_the_normaliser_is_measured_in_an_episode_of_random_play():
    for small, horizon in ((TRAFFIC, 40), (SPREAD, 25)):
        args = Args(**(small | dict(num_seeds=2)))
        env = script.make_env(args, 4, DEVICE, warmup=10, horizon=30)
        nets, _ = script.make_nets(env, args)
        observed = [env.reset(envs.make_generators(0, 2, "test", DEVICE))[1] * 0]

        def step(state, action, noise, env=env, observed=observed, lights=small is TRAFFIC):
            assert not lights or len(observed) % 10 == 1 or not action.any()
            result = env.step(state, action, noise)
            observed.append(result[1])
            return result

        streams = envs.make_generators(0, 2, "norm", DEVICE)
        played, period = (replace(env, warmup=0, horizon=40), 10) if small is TRAFFIC else (env, 1)
        nets["normalizer"].flat.copy_(perturb.observation_moments(step, played, streams, period))
        assert len(observed) == horizon + 1
        first = (replace(env, warmup=0) if small is TRAFFIC else env).reset(envs.make_generators(0, 2, "norm", DEVICE))
        x = torch.stack([first[1], *observed[1:-1]], 1).unflatten(0, (2, -1)).flatten(1, 2)  # [S, M, N, O]
        mean, std = nets["normalizer"].flat.unbind(2)
        torch.testing.assert_close(mean, x.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std, x.std(1, correction=0), rtol=1e-4, atol=1e-5)
        constant = x.amax(1) == x.amin(1)
        assert (std[constant] == 0).all() and (constant.any() or small is SPREAD)
        scaled = nets["normalizer"](x.transpose(1, 2))
        assert scaled.isfinite().all() and scaled.abs().max() <= 10
        assert (scaled.abs().amax(2)[constant] == 0).all()


def test_schedules_fall_linearly(tmp_path, monkeypatch):
    seen, real = [], script.update

    def watched(nets, optimizers, losses, batch, **named):
        rates = [optimizers[name].param_groups[0]["lr"] for name in ("actor", "critic")]
        seen.append([batch["exploration"].item(), batch["entropy_coef"].item(), *rates])
        return real(nets, optimizers, losses, batch, **named)

    monkeypatch.setattr(script, "update", watched)
    ends = dict(exploration=0.5, exploration_end=0.1, entropy_coef=0.2, entropy_coef_end=0.02)
    short_train(tmp_path, "run", SPREAD, learning_rate=1e-3, critic_learning_rate=2e-3, **ends)
    for k, values in enumerate(seen):
        expected = [0.5 - 0.04 * k, 0.2 - 0.018 * k, 1e-3 * (1 - k / 10), 2e-3 * (1 - k / 10)]
        assert values == pytest.approx(expected, rel=1e-5)
    assert len(seen) == 10


# ---------------------------------------------------------------------------------------------------------- evaluation


def drivers(num_episodes=3000, **options):
    """(args, env, nets, policy, obs): 3 agents of two seeds, a normaliser with a dead entry, raw obs [S, N, E, O];
    agent 0 has two actions, agent 2 is no cooperator."""
    args, env, nets, *_ = tiny(env_id="simple_spread_v3", **options)
    streams = envs.make_generators(5, 2, "test", DEVICE)
    mean, std = nets["normalizer"].flat.unsqueeze(3).unbind(2)
    obs = mean + std * envs.per_seed(torch.randn, (3, num_episodes, 4), streams)
    return args, env, nets, script.trained_policy(nets, env, args), obs


def test_clean_actions_are_the_likeliest_or_samples():
    args, env, nets, policy, obs = drivers()
    probs = script.policy(nets["actor"], nets["normalizer"](obs), env).softmax(-1)  # [S, N, E, A]
    assert torch.equal(policy.act(obs).argmax(-1), probs.argmax(-1))
    sampled = script.trained_policy(nets, env, replace(args, eval_policy="sample")).act(obs)
    assert (sampled - probs).mean(2).abs().max() < 0.04 and sampled[:, 0, :, 2].sum() == 0


def test_worst_action_is_the_one_that_the_teams_critics_like_least():
    _, env, nets, policy, obs = drivers(40)
    action = policy.act(obs)
    worst = robustness.worst_actions(env, policy, obs, action)
    x = nets["normalizer"](obs)
    for s, e, n in itertools.product(range(2), range(40), range(2)):
        values = []
        for choice in torch.eye(3, device=DEVICE)[: env.action_sizes[n]]:
            joint = action[s, :, e].clone()
            joint[n] = choice
            heads = [critic_heads(nets["critic"], s, x[s, :, e].flatten(), joint, k) for k in range(2)]
            values.append(sum(head[joint[k].argmax()] for k, head in enumerate(heads)).item())
        assert worst[s, n, e].argmax().item() == values.index(min(values))


@pytest.mark.parametrize("ball", ["l2", "linf"])
@pytest.mark.parametrize("attack", ["mad", "executed", "critic"])
def test_worst_observations_are_in_the_ball_and_worse_than_random_ones(attack, ball):
    _, env, nets, policy, obs = drivers(200, eval_norm=ball)
    streams = envs.make_generators(7, 2, "test", DEVICE)
    with torch.no_grad():
        worst = robustness.worst_observations(env, policy, attack, obs, 0.5, streams)
    std = nets["normalizer"].flat[:, :, 1:]
    unit = torch.where(std > 0, std, math.inf)
    delta = (worst - obs) / unit
    length = perturb.length(delta, ball)
    assert length.max() <= 0.5 * (1 + 1e-9) and length[:, :2].mean() > 0.4
    assert (worst == obs)[:, 0, :, -1].all() and (worst == obs)[:, 2].all()  # opponents see undisturbed
    live = (std > 0) * env.cooperators[:, None, None]
    noise = envs.per_seed(torch.randn, obs.shape[1:], streams) * live
    random = obs + std * live * perturb.rescale(noise, 0.5, ball)
    z, z_random, z_worst = (policy.output(seen)[:, :2] for seen in (obs, random, worst))
    if attack == "mad":
        at_random, at_worst = (script.divergence("kl", other, z).mean() for other in (z_random, z_worst))
        assert at_worst > 1.5 * at_random
    else:
        greedy = script.one_hot_best(policy.output(obs))
        q = script.counterfactual_values(nets["critic"], nets["normalizer"](obs), greedy)[:, :2]
        clean, at_random, at_worst = ((other.softmax(-1) * q).sum(-1).mean() for other in (z, z_random, z_worst))
        assert clean - at_worst > 1.5 * (clean - at_random).abs() and clean > at_worst


@pytest.mark.parametrize("trained,tested", [((2, 2), (4, 4)), ((1, 3), (3, 4))])
def test_tiled_lights_act_as_those_that_were_trained(trained, tested):
    args = Args(**(TRAFFIC | dict(num_seeds=2, rows=trained[0], cols=trained[1], idle_logit=0.0)))
    small = script.make_env(args, 2, DEVICE)
    large = script.make_env(args, 2, DEVICE, env_id="traffic_grid_v0", rows=tested[0], cols=tested[1])
    nets, _ = script.make_nets(small, args)
    streams = envs.make_generators(0, 2, "test", DEVICE)
    N, O = small.obs_mask.shape
    nets["normalizer"].flat = envs.per_seed(torch.rand, (N, 2, O), streams) + 0.1
    obs = 2 * envs.per_seed(torch.randn, (N, 30, O), streams)
    cells = list(itertools.product(range(tested[0]), range(tested[1])))  # row-major from the bottom left
    twin = torch.tensor([r % trained[0] * trained[1] + c % trained[1] for r, c in cells], device=DEVICE)
    ours = script.trained_policy(nets, large, args).act(obs[:, twin])
    theirs = script.trained_policy(nets, small, args).act(obs)
    assert torch.equal(ours, theirs[:, twin]) and 0 < theirs[..., 1].mean() < 1


# ---------------------------------------------------------------------------------------------------------------- runs


def short_train(tmp_path, name, small, checkpoint=None, **options):
    """(args, nets, rows of metrics.csv) after training, from a checkpoint if one is given."""
    args = Args(**(small | options))
    device = script.setup(args)
    num_envs = args.num_seeds * args.num_envs
    lights = {"warmup": args.warmup, "horizon": args.horizon - args.warmup} if args.is_traffic else {}
    env = script.make_env(args, num_envs, device, **lights)
    nets, optimizers = script.make_nets(env, args)
    if checkpoint:
        runs.restore({"nets": {name: net.flat for name, net in nets.items()}}, checkpoint)
    folder = tmp_path / name
    folder.mkdir()
    run = runs.Run(folder, [{"seed": seed} for seed in args.seeds], (checkpoint or {}).get("rows", []))
    script.train(env, nets, optimizers, args, run, checkpoint or {})
    return args, nets, runs.read_rows(folder / "metrics.csv")


ALONE = [(TRAFFIC, {}), (TRAFFIC, dict(regularizer="none", num_envs=4))]
ALONE += [(SPREAD, dict(num_envs=16, reg_batch_size=n, total_timesteps=800, log_interval=400)) for n in (16, 80)]


@pytest.mark.slow
@pytest.mark.parametrize("small,options", ALONE)
def test_a_seed_does_not_depend_on_the_others(tmp_path, small, options):
    """On a CPU bit for bit; with a number of samples that is no multiple of 16, products may round a seed otherwise."""
    _, together, rows = short_train(tmp_path, "together", small, seed=5, num_seeds=2, **options)
    for k in range(2):
        _, alone, own = short_train(tmp_path, f"alone{k}", small, seed=5 + k, **options)
        for name in alone:
            assert alike(alone[name].flat, together[name].flat.flatten(1).chunk(2)[k].view_as(alone[name].flat))
        assert alike(without_speed(own), without_speed([row for row in rows if row["seed"] == str(5 + k)]))


LONG = {
    "traffic": TRAFFIC | dict(horizon=100, warmup=20, total_timesteps=500, log_interval=250, num_seeds=2),
    "particle": SPREAD | dict(total_timesteps=300, log_interval=150, num_seeds=2),
}


@pytest.mark.parametrize("name", LONG)
def test_a_checkpoint_in_the_middle_of_an_episode_goes_on_exactly(tmp_path, monkeypatch, name):
    small = LONG[name] | dict(checkpoint_interval=10**9)
    calls, real = [], script.update

    def stopped(*rest, **named):
        calls.append(1)
        if len(calls) == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*rest, **named)

    _, nets, rows = short_train(tmp_path, "whole", small)
    monkeypatch.setattr(script, "update", stopped)
    with pytest.raises(KeyboardInterrupt, match="at step"):
        short_train(tmp_path, "cut", small)
    checkpoint = runs.load(tmp_path / "cut" / "checkpoint.pt")
    assert checkpoint["state"] and checkpoint["iteration"] == 13
    _, again, resumed = short_train(tmp_path, "resumed", small, checkpoint)
    assert alike(without_speed(resumed), without_speed(rows))
    assert all(alike(nets[name].flat, again[name].flat) for name in nets)


MODES = [
    *(dict(regularizer=m) for m in ("none", "gaussian", "random", "adversarial", "stackelberg")),
    *(dict(divergence=d, norm=n) for d, n in (("kl", "linf"), ("l2", "l2"), ("l2_probs", "linf"))),
    dict(regularizer="gaussian", epsilon_units="raw", activation="silu"),
    dict(num_seeds=2, attack_steps=1, anneal_lr=False, normalize_advantage=False, activation="tanh"),
    dict(team_reward="sum", exploration=1.0, td_lambda=1.0, tau=1.0, eval_policy="sample"),
    dict(team_reward="mean", exploration=0.0, td_lambda=0.0, entropy_coef=0.0, critic_updates=1),
]
PARTICLES = [dict(env_id=f"simple_{name}") for name in ("tag_v3", "speaker_listener_v4", "world_comm_v3", "crypto_v3")]
LIGHTS = [
    dict(rows=1, cols=3, flow=(700.0,), warmup=0, model="idm"),
    dict(env_id="traffic_irregular_v0", team_reward="mean", idle_logit=0.5),
    dict(flow=("flow3",), num_seeds=2, regularizer="none"),
    dict(rows=1, cols=1, num_envs=1, rollout_steps=1, total_timesteps=60, log_interval=30),  # no spread of advantages
]


@pytest.mark.slow
@pytest.mark.parametrize("small,options", [(SPREAD, o) for o in MODES + PARTICLES] + [(TRAFFIC, o) for o in LIGHTS])
def test_every_option_trains(tmp_path, small, options):
    args, nets, rows = short_train(tmp_path, "run", small, **options)
    assert len(rows) == 2 * args.num_seeds and ("ernie/regularizer" in rows[0]) == args.regularized
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    fresh, _ = script.make_nets(script.make_env(args, 1, DEVICE), args)
    changed = [(nets[name].flat != fresh[name].flat).flatten(1).any(1).all() for name in nets]
    assert all(changed) or args.num_envs == 1


@pytest.mark.parametrize("options", [dict(attack_steps=0), dict(reg_coef=0.0), dict(epsilon=0.0)])
def test_no_regulariser_is_coma(tmp_path, options):
    _, coma, rows = short_train(tmp_path, "coma", SPREAD, regularizer="none")
    _, idle, own = short_train(tmp_path, "idle", SPREAD, **options)
    _, ernie, _ = short_train(tmp_path, "ernie", SPREAD)
    assert all(torch.equal(coma[name].flat, idle[name].flat) for name in coma)
    assert without_speed(rows) == without_speed(own) and not torch.equal(coma["actor"].flat, ernie["actor"].flat)


@pytest.mark.slow
def test_learns_to_spread(tmp_path):
    """Random policies have -27 or less, untrained greedy ones -31; these 750 small updates give about -21."""
    options = dict(num_envs=16, total_timesteps=60_000, hidden_size=64, reg_batch_size=32, gamma=0.95)
    options |= dict(critic_learning_rate=2e-3, eval_episodes=100, checkpoint_interval=10**6, log_interval=10**6)
    *_, rows = short_train(tmp_path, "run", SPREAD, **options)
    assert float(rows[-1]["eval/reward"]) > -24


def main_with(monkeypatch, small, *flags):
    """main() in this process with the flags of `small` and these; None, or the exit code."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in small.items() if name != "compile"]
    flags = [*given, "--no-compile", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", ["ernie_coma.py", *flags])
    try:
        return script.main()
    except SystemExit as stop:
        return stop.code


def points_of(folder):
    rows = runs.read_rows(folder / "robustness.csv")
    return {(row["perturbation"], row["strength"]) for row in rows if row["policy"] == "stackelberg"}, rows


def test_the_report_of_a_particle_task(tmp_path, monkeypatch):
    assert main_with(monkeypatch, SPREAD, f"--runs-dir={tmp_path}", "--capture-video") is None
    folder = only(tmp_path)
    points, rows = points_of(folder)
    assert len(points) == len(rows) and ("worst_action", "0.5") in points and ("critic", "1.0") in points
    assert {name for name, _ in points} == {"clean", "worst_case", *script.SWEEP} - {
        "max_speed_scale"
    }  # spread has no limit
    assert all(-200 < float(row["return"]) < 0 for row in rows)
    assert (folder / "episode.gif").stat().st_size > 0


ZOO = SPREAD | dict(env_id="zoo:mpe2.simple_spread_v3", rollout_steps=25, total_timesteps=100)


def test_a_pettingzoo_environment_trains_on_whole_episodes(tmp_path, monkeypatch, capsys):
    assert main_with(monkeypatch, ZOO, "--rollout-steps=5") == 2
    assert "--rollout-steps must fit an episode's 25 steps, got 5" in capsys.readouterr().err
    monkeypatch.setattr(script, "SWEEP", {"mad": (0.1,), "worst_action": (0.2,), "damping": (2.0,)})
    assert main_with(monkeypatch, ZOO, f"--runs-dir={tmp_path}") is None
    folder = only(tmp_path)
    rows = runs.read_rows(folder / "metrics.csv")
    assert [row["global_step"] for row in rows] == ["50", "100"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert {name for name, _ in points_of(folder)[0]} == {"clean", "mad", "worst_action"}  # its physics are its own


@pytest.mark.parametrize(
    "small,flags,words",
    [
        (TRAFFIC, "--rollout-steps=7", "--rollout-steps must fit an episode's 30 steps, got 7"),
        (SPREAD, "--rollout-steps=10", "--rollout-steps must fit an episode's 25 steps, got 10"),
        (TRAFFIC, "--warmup=40", "warmup must be below horizon"),
        (TRAFFIC, "--backend=sumo", "backend must be torch unless evaluate is given"),
        (SPREAD, "--evaluate=nowhere --backend=sumo", "no checkpoint"),
        (TRAFFIC, "--flow flow9", "flow9"),
        (TRAFFIC, "--flow flow1 flow2", "flow must be a name, or numbers"),
        (TRAFFIC, "--flow 1 2 3", "flow must have 8 entries"),
        (TRAFFIC, "--num-agents=3", "num_agents of traffic_grid_v0 must be"),
        (SPREAD, "--rows=2", "rows"),
        (SPREAD, "--flow flow1", "flow"),
        (
            SPREAD,
            "--env-id=zoo:mpe2.simple_spread_v3 --env-kwargs continuous_actions=true",
            "must have discrete actions",
        ),
        (TRAFFIC, "--env-id=traffic_gird_v0", "traffic_grid_v0"),
    ],
)
def test_values_that_do_not_go_together(monkeypatch, capsys, tmp_path, small, flags, words):
    assert main_with(monkeypatch, small, f"--runs-dir={tmp_path}", *flags.split()) == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.replace("│", " ").split()) and "Traceback" not in error


def test_sumo_that_is_not_installed(tmp_path, monkeypatch, capsys):
    try:
        import libsumo  # noqa: F401
    except ImportError:
        short_train(tmp_path, "run", TRAFFIC, total_timesteps=40)
        monkeypatch.setattr(sys, "argv", ["ernie_coma.py", f"--evaluate={tmp_path}/run", "--backend=sumo"])
        with pytest.raises(SystemExit) as stop:
            script.main()
        assert stop.value.code == 2
        assert "pip install -r requirements-sumo.txt" in capsys.readouterr().err
    else:
        pytest.skip("SUMO is installed")


@pytest.mark.parametrize("options", [dict(regularizer="none"), dict(regularizer="stackelberg")])
def test_updates_in_a_cuda_graph_are_those_without(options, monkeypatch):
    args, env, nets, batch = prepared(**options)
    learners = [learner(script, nets, env, args) for _ in range(2)]
    batches = rotated(batch, 6, 9)
    for k, changed in enumerate(batches):
        changed["exploration"] = torch.tensor(0.1 + 0.05 * k, device=DEVICE)
        changed["entropy_coef"] = torch.tensor(0.05 + 0.1 * k, device=DEVICE)
    check_updates_in_a_cuda_graph(learners, batches, DEVICE, monkeypatch)


@pytest.mark.parametrize("options", [dict(), dict(env_id="simple_reference_v3")])
def test_rollouts_in_a_cuda_graph_are_those_without(options, monkeypatch):
    args = Args(**(SMALL | dict(num_seeds=2, rollout_steps=5, num_envs=4) | options))
    env = script.make_env(args, 8, DEVICE)
    nets, _ = script.make_nets(env, args)
    nets["normalizer"].flat[:, :, 1] = 2
    streams = envs.make_generators(0, 2, "test", DEVICE)
    play = partial(script.rollout, env.step, env, nets)
    start = env.reset(streams)
    draws = []
    for k in range(7):
        schedule = {"exploration": torch.tensor(0.1 * k, device=DEVICE), "policy_steps": torch.tensor(k)}
        draws.append((start, script.draw_rollout(env, streams, args), schedule))
        start, *_ = play(*draws[-1])
    check_rollouts_in_a_cuda_graph(play, nets, draws, DEVICE, monkeypatch)
