"""ernie_mappo.py: advantages, moments and losses by hand, gradients against finite differences, rollouts, runs."""

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
from PIL import Image
from torch.distributions import Categorical, Normal, kl_divergence

import ernie_mappo as script
from envs import drones
from ernie_mappo import Args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = dict(num_envs=4, hidden_size=16, num_minibatches=2, update_epochs=2, reg_batch_size=8, eval_episodes=2)
SMALL |= dict(track=False)
SPREAD = SMALL | dict(env_id="simple_spread_v3", total_timesteps=400, log_interval=200, checkpoint_interval=100)
DRONES = SMALL | dict(total_timesteps=64, log_interval=32, checkpoint_interval=32)  # with episodes of 8 steps
VARIANTS = [dict(discrete=d, share_parameters=share) for d in (True, False) for share in (True, False)]
VARIANTS += [dict(state_dependent_std=True, share_parameters=share) for share in (True, False)]
VARIANT = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()))


@pytest.fixture(autouse=True)
def one_thread_and_float32_afterwards():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more than one wait for each other where a core is busy
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def short(monkeypatch):
    """Sets the length of episodes."""
    real = script.envs.make
    return lambda horizon: monkeypatch.setattr(script.envs, "make", partial(real, horizon=horizon))


def tiny(sizes=(2, 3, 3), team=(True, True, False), num_envs=2, steps=3, discrete=False, **options):
    """(args, env, nets, replay, norm, value_norm, noise): two seeds, random networks far from linear and random
    episodes in float64. The last observation of agent 0 does not vary, agent 0 has fewer actions; env has only what
    losses ask for."""
    torch.set_default_dtype(torch.float64)
    small = dict(env_id="simple_spread_v3", num_seeds=2, num_envs=num_envs, hidden_size=5, activation="tanh")
    small |= dict(continuous_actions=not discrete, num_minibatches=1, reg_batch_size=4)
    args = Args(**(SMALL | small | options))
    N, O, A = len(sizes), 4, max(sizes)
    mask = torch.arange(A, device=DEVICE) < torch.tensor(sizes, device=DEVICE)[:, None]
    env = SimpleNamespace(num_agents=N, obs_mask=torch.ones(N, O, device=DEVICE), action_mask=mask, discrete=discrete)
    env.device, env.dtype, env.horizon = DEVICE, torch.float64, steps
    env.cooperators = torch.tensor(team, device=DEVICE)
    nets, _ = script.make_mappo(env, args)
    streams = script.make_generators(3, 2, "test", DEVICE)
    normal = partial(script.draw, torch.randn, generators=streams)
    for net in nets.values():
        noise = normal((net.flat.shape[0] // 2, net.flat.shape[1])).flatten(0, 1)
        net.flat.detach().mul_(1.5).add_(0.3 * noise)
    norm = torch.stack([normal((N, O)), script.draw(torch.rand, (N, O), streams) + 0.5], 2)
    norm[:, 0, 1, -1] = 0
    S, B, T = 2, num_envs, steps
    replay = {"obs": norm[:, None, None, :, 0] + norm[:, None, None, :, 1] * normal((B, T + 1, N, O))}
    if discrete:
        replay["actions"] = F.one_hot((script.draw(torch.rand, (B, T, N), streams) * mask.sum(1)).long(), A).double()
    else:
        replay["actions"] = normal((B, T, N, A)) * mask
    replay["rewards"] = normal((B, T, N))
    replay["terminated"] = (torch.arange(S * B * T, device=DEVICE).view(S, B, T) % 5 == 1).double()
    mean, std = normal((1, N)), script.draw(torch.rand, (1, N), streams) + 0.5
    value_norm = 0.6 * torch.stack([mean, mean**2 + std**2, torch.ones_like(mean)])
    return args, env, nets, replay, norm, value_norm, script.draw_perturbation(streams, env, args)


def batch_of(nets, replay, norm, value_norm, env, args):
    """The batch with log-probabilities and values of a policy and a critic that were others, so that clipping acts."""
    batch, _ = script.prepare_episodes(nets, replay, norm, value_norm, env, args)
    streams = script.make_generators(8, 2, "other", DEVICE)
    for name in ("logprobs", "values"):
        batch[name] = batch[name] + 0.4 * script.draw(torch.randn, batch[name].shape[1:], streams)
    return batch


# ------------------------------------------------------------------------------------------------- networks, policies


@pytest.mark.parametrize("sizes", [[12, 8, 3], [3, 8, 8, 6]])
def test_orthogonal_layers_with_their_gains_and_no_biases(sizes):
    torch.set_default_dtype(torch.float64)
    make = partial(script.orthogonal_mlp, sizes, 3, 0.01)
    net = make(script.make_generators(5, 2, "init", DEVICE))
    assert net.flat.shape == (6, -(-sum((a + 1) * b for a, b in itertools.pairwise(sizes)) // 16) * 16)
    for k, (weight, bias) in enumerate(net.layers()):
        gain = 0.01 if k == len(sizes) - 2 else math.sqrt(2)
        rows, columns = weight.shape[1:]
        small = weight @ weight.mT if rows <= columns else weight.mT @ weight
        torch.testing.assert_close(small, (gain**2 * torch.eye(min(rows, columns), device=DEVICE)).expand_as(small))
        assert (bias == 0).all() and weight.shape[1:] == (sizes[k + 1], sizes[k])
        assert len(weight.flatten(1).round(decimals=6).unique(dim=0)) == 6  # networks differ
    alone = make(script.make_generators(6, 1, "init", DEVICE))
    assert torch.equal(net.flat[3:], alone.flat) and net.flat.requires_grad


def test_orthogonal_matrices_are_uniform():
    """QR alone gives a first column that favours one sign."""
    net = script.orthogonal_mlp([3, 3], 2000, 1.0, script.make_generators(0, 1, "init", DEVICE))
    assert net.layers()[0][0].mean(0).abs().max() < 0.06  # four standard errors


def test_first_policies():
    args = Args(**(SMALL | dict(init_std=0.3, num_seeds=2)))
    env = script.make_task(args, 2, DEVICE)
    nets, _ = script.make_mappo(env, args)
    z = script.policies(nets["actor"], torch.randn(2, 2, 50, 12, device=DEVICE), env, args)
    mean, log_std = z.chunk(2, -1)
    torch.testing.assert_close(log_std.exp(), torch.full_like(log_std, 0.3))
    assert 0 < mean.abs().max() < 0.1  # nearly the middle of the range
    nets["actor"].layers()[-1][1].detach()[:, 1] = torch.tensor([-9.0, -1.0, 1.0, 9.0], device=DEVICE)[:, None]
    log_std = script.policies(nets["actor"], torch.zeros(2, 2, 1, 12, device=DEVICE), env, args)[..., 1].flatten()
    assert log_std.tolist() == [-5, -1, 1, 2]


def distribution(nets, env, args, s, n, x):
    """The policy of agent n of seed s at one normalised observation, of its valid actions only."""
    (N, A), valid, actor = env.action_mask.shape, int(env.action_mask[n].sum()), nets["actor"]
    row = s if args.share_parameters else s * N + n
    if args.share_parameters:
        x = torch.cat([x, torch.eye(N, device=DEVICE)[n]])
    out = plain(actor, row, x)
    if env.discrete:
        return Categorical(logits=out[:valid])
    if not args.state_dependent_std:  # the biases of the last layer
        end = sum((n_in + 1) * n_out for n_in, n_out in itertools.pairwise(actor.sizes))
        out = torch.cat([out[:A], actor.flat[row, end - A : end]])
    return Normal(out[:valid], out[A : A + valid].exp())


def logprob(pi, action):
    """Of an action [A], one-hot if discrete."""
    if isinstance(pi, Categorical):
        return pi.log_prob(action.argmax())
    return pi.log_prob(action[: len(pi.mean)]).sum()


@VARIANT
def test_policies_are_the_networks_written_out(variant):
    """Log-probabilities and entropies as in torch.distributions, where padding contributes nothing."""
    args, env, nets, replay, norm, *_ = tiny(**variant)
    x = script.normalize(replay["obs"].flatten(1, 2).transpose(1, 2), norm)[:, :, :6]
    action = replay["actions"].flatten(1, 2).transpose(1, 2)
    z = script.policies(nets["actor"], x, env, args)
    logprobs, entropy = script.logprob_and_entropy(z, action, env)
    for s, n, m in itertools.product(range(2), range(3), range(6)):
        pi = distribution(nets, env, args, s, n, x[s, n, m])
        torch.testing.assert_close(logprobs[s, n, m], logprob(pi, action[s, n, m]), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(entropy[s, n, m], pi.entropy().sum(), rtol=1e-10, atol=1e-12)
    if not env.discrete:
        assert torch.equal(logprobs, script.logprob_and_entropy(z, action + 7.0 * ~env.action_mask[:, None], env)[0])
        spread = z.chunk(2, -1)[1].std(2)[:, env.action_mask]
        assert (spread > 1e-3).all() if args.state_dependent_std else (spread == 0).all()
    flat = nets["actor"].flat
    grad = torch.autograd.grad((logprobs + entropy).sum(), flat)[0]
    bias = script.MLP(grad, nets["actor"].sizes).layers()[-1][1][..., 0]
    if not args.share_parameters:
        padding = ~env.action_mask if env.discrete else ~env.action_mask.repeat(1, 2)
        rows = bias.view(2, 3, -1)
        assert (rows[:, padding] == 0).all() and (rows[:, ~padding].abs() > 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("discrete", [True, False])
def test_without_noise_the_likeliest_actions(discrete):
    args, env, nets, replay, norm, *_ = tiny(discrete=discrete)
    x = script.normalize(replay["obs"].flatten(1, 2).transpose(1, 2), norm)
    z = script.policies(nets["actor"], x, env, args)
    action = script.choose(z, None, env)
    for s, n, m in itertools.product(range(2), range(3), range(8)):
        pi = distribution(nets, env, args, s, n, x[s, n, m])
        expected = F.one_hot(pi.probs.argmax(), 3) if discrete else pi.mean
        expected = F.pad(expected.double(), (0, 3 - len(expected)))
        torch.testing.assert_close(action[s, n, m], expected)


@pytest.mark.parametrize("low,high", [(0.0, 1.0), (-1.0, 1.0), (-3.0, 5.0)])
def test_actions_are_clipped_and_stretched_to_their_range(low, high):
    mask = torch.tensor([[True, False], [True, True]])
    env = SimpleNamespace(discrete=False, action_low=low, action_high=high, action_mask=mask)
    action = torch.tensor([-7.0, -1.0, 0.5, 3.0]).view(1, 1, 4, 1).expand(2, 2, 4, 2)
    found = script.to_step(action, env)  # [S * B, N, A]
    expected = torch.tensor([low, low, low + 0.75 * (high - low), high]).repeat(2)
    assert found.shape == (8, 2, 2) and (found[:, 0, 1] == 0).all()
    for n, a in ((0, 0), (1, 0), (1, 1)):
        torch.testing.assert_close(found[:, n, a], expected)
    marked = torch.arange(2 * 3 * 4).view(2, 3, 4, 1) % 5  # seeds, agents, environments
    discrete = script.to_step(F.one_hot(marked[..., 0], 5), SimpleNamespace(discrete=True))
    assert torch.equal(discrete.view(2, 4, 3), marked[..., 0].transpose(1, 2))


# --------------------------------------------------------------------------------------------------------- divergences


@pytest.mark.parametrize("kind", ["kl", "kl_normal"])
def test_divergences_are_those_of_torch_and_of_samples(kind):
    torch.manual_seed(0)
    z, clean = (0.7 * torch.randn(5, 6, dtype=torch.float64) for _ in range(2))
    found = script.divergence(kind, z, clean)
    p, q = (Categorical(logits=x) if kind == "kl" else Normal(x[:, :3], x[:, 3:].exp()) for x in (z, clean))
    expected, backwards = (kl if kind == "kl" else kl.sum(1) for kl in (kl_divergence(p, q), kl_divergence(q, p)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    sample = p.sample((100_000,))
    ratio = p.log_prob(sample) - q.log_prob(sample)
    ratio = ratio if kind == "kl" else ratio.sum(2)
    error = 4 * ratio.std(0) / len(ratio) ** 0.5
    assert ((ratio.mean(0) - found).abs() < error).all() and ((backwards - found).abs() > error).any()
    assert (script.divergence(kind, z, z) == 0).all()


def test_padding_changes_no_divergence():
    for kind, discrete in (("kl", True), ("l2_probs", True), ("l2", True), ("kl_normal", False), ("l2", False)):
        args, env, nets, replay, norm, *_ = tiny(discrete=discrete)
        x = script.normalize(replay["obs"].flatten(1, 2).transpose(1, 2), norm)
        z, other = (script.policies(nets["actor"], seen, env, args)[:, 0] for seen in (x, x + 0.3))
        keep = [0, 1] if discrete else [0, 1, 3, 4]  # of agent 0, who has two actions of three
        expected = script.divergence(kind, other[..., keep], z[..., keep])
        torch.testing.assert_close(script.divergence(kind, other, z), expected, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- regulariser


def regularize(actor, obs, noise, norm, env, args, mode=None, network=None):
    """R [S, N, M] and delta."""
    network = network or partial(script.regularized_policies, actor, env=env, args=args)
    obs, unit = obs[:, :, : noise.shape[2]], script.perturbation_unit(norm, args)
    return script.regularizer(mode or args.regularizer, network, obs, network(obs), noise, unit, args)


def constant_std(nets, obs, noise, norm, env, args):
    """Networks for regularize() as functions of flat parameters, whose log standard deviations are numbers: those of
    `nets` at the clean observations and at every delta^k, in the order in which they are asked for."""
    deltas, unit, obs = [torch.zeros_like(noise)], script.perturbation_unit(norm, args), obs[:, :, : noise.shape[2]]
    for k in range(args.attack_steps + 1):
        fewer = dataclasses.replace(args, attack_steps=k)
        deltas.append(regularize(nets["actor"], obs, noise, norm, env, fewer)[1].detach())
    seen = [script.policies(nets["actor"], obs + unit * d, env, args).detach().chunk(2, -1)[1] for d in deltas]

    def make(flat):
        numbers, actor = iter(seen), script.MLP(flat, nets["actor"].sizes)
        return lambda x: torch.cat([script.policies(actor, x, env, args).chunk(2, -1)[0], next(numbers)], -1)

    return make


KINDS = [dict(discrete=True, divergence=d) for d in ("kl", "l2", "l2_probs")]
KINDS += [
    dict(divergence=d, state_dependent_std=dependent, detach_std=detached)
    for d, dependent, detached in itertools.product(("kl_normal", "l2"), (True, False), (True, False))
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()))
@pytest.mark.parametrize("ball", ["l2", "linf"])
@pytest.mark.parametrize("steps", [1, 3])
def test_hypergradient_is_the_derivative_of_the_whole_unroll(kind, ball, steps):
    options = dict(norm=ball, attack_steps=steps, epsilon=0.3, regularizer="stackelberg", epsilon_units="raw")
    args, env, nets, replay, norm, _, noise = tiny(**kind, **options)
    obs = script.normalize(replay["obs"].flatten(1, 2).transpose(1, 2), norm)
    flat, sizes = nets["actor"].flat, nets["actor"].sizes
    held = not env.discrete and args.detach_std
    frozen = constant_std(nets, obs, noise, norm, env, args) if held else None

    def mean_reg(flat, mode=None, network=None):
        return regularize(script.MLP(flat, sizes), obs, noise, norm, env, args, mode, network)[0].mean(2).sum()

    def moved(step):
        point = (flat + step * direction).detach()
        return mean_reg(point, network=frozen(point) if held else None).item()

    direction = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    whole, leader = (torch.autograd.grad(mean_reg(flat, m), flat)[0] for m in ("stackelberg", "adversarial"))
    measured = fourth_order(moved, 1e-6)
    assert (whole * direction).sum().item() == pytest.approx(measured, rel=1e-6)
    assert abs((leader * direction).sum().item() - measured) > 1e-4 * abs(measured)  # the leader alone would fail
    if held:  # nothing reaches the standard deviations
        weight, bias = script.MLP(whole, sizes).layers()[-1]
        assert (weight[:, 3:] == 0).all() and (bias[:, 3:] == 0).all() and (bias[:, :2].abs() > 0).any()
    _, delta = regularize(nets["actor"], obs, noise, norm, env, args)
    assert (delta[:, 0, :, -1] == 0).all()
    length = torch.linalg.vector_norm(delta, math.inf if ball == "linf" else 2, dim=-1)
    assert length.max() <= 0.3 * (1 + 1e-9) and length.mean() > 0.2


TEAM_KINDS = [dict(discrete=True), dict(detach_std=False), dict(detach_std=True, state_dependent_std=True)]


@pytest.mark.parametrize("kind", TEAM_KINDS, ids=str)
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("mode", ["gaussian", "random", "adversarial", "stackelberg"])
def test_regulariser_adds_to_the_actors_of_the_team_alone(mode, detached, kind):
    options = dict(regularizer=mode, reg_coef=0.7, detach_reference=detached, epsilon=0.2)
    args, env, nets, replay, norm, value_norm, noise = tiny(**kind, **options)
    batch, unit = batch_of(nets, replay, norm, value_norm, env, args), script.perturbation_unit(norm, args)
    assert noise.shape == (2, 3, 4, 4)  # of six samples
    without, with_reg = (script.ppo_loss(nets, batch, n, unit, env, args) for n in (None, noise))  # (loss, metrics)
    assert "ernie/regularizer" not in without[1]
    obs = batch["obs"].transpose(1, 2)[:, :, :4]

    def network(x):
        z = script.policies(nets["actor"], x, env, args)
        return torch.cat([z[..., :3], z[..., 3:].detach()], -1) if args.detach_std and not env.discrete else z

    change, delta = regularize(nets["actor"], obs, noise, norm, env, args)
    if mode != "stackelberg":  # the reference and the constant perturbation by hand
        clean = network(obs).detach() if detached else network(obs)
        change = script.divergence(args.divergence, network(obs + unit * delta.detach()), clean)
    torch.testing.assert_close(with_reg[1]["ernie/regularizer"], change[:, :2].mean((1, 2)).detach())
    expected = 0.7 * change[:, :2].mean(2).sum()
    assert (with_reg[0] - without[0]).item() == pytest.approx(expected.item(), rel=1e-9)
    flats = [net.flat for net in nets.values()]
    ours = [a - b for a, b in zip(*(torch.autograd.grad(loss, flats) for loss, _ in (with_reg, without)))]
    torch.testing.assert_close(ours[0], torch.autograd.grad(expected, flats[0])[0], rtol=1e-7, atol=1e-11)
    rows = ours[0].view(2, 3, -1).abs().amax(2)
    assert (rows[:, 2] < 1e-13).all() and (rows[:, :2] > 1e-6).all() and ours[1].abs().max() < 1e-13
    length = delta.norm(dim=-1)
    if mode == "random":
        torch.testing.assert_close(length, torch.full_like(length, 0.2))
    assert mode == "gaussian" or length.max() <= 0.2 * (1 + 1e-9)


def test_opponents_of_tag_are_not_regularised(short):
    short(2)
    args = Args(**(SPREAD | dict(env_id="simple_tag_v3", reg_coef=1.0, epsilon=0.5)))
    env = script.make_task(args, args.num_envs, DEVICE)
    nets, _ = script.make_mappo(env, args)
    streams = script.make_generators(0, 1, "test", DEVICE)
    norm = torch.ones(1, 4, 2, env.obs_mask.shape[1], device=DEVICE)
    replay = script.play_episodes(env.step, env, nets["actor"], norm, streams, args)
    value_norm = torch.zeros(3, 1, 1, 4, dtype=torch.float64, device=DEVICE)
    batch, _ = script.prepare_episodes(nets, replay, norm, value_norm, env, args)
    gradients = []
    for noise in (None, script.draw_perturbation(streams, env, args)):
        loss, _ = script.ppo_loss(nets, batch, noise, script.perturbation_unit(norm, args), env, args)
        gradients.append(torch.autograd.grad(loss, nets["actor"].flat)[0])
    changed = (gradients[0] != gradients[1]).any(1).tolist()
    assert changed == env.cooperators.tolist() == [True, True, True, False]


# ---------------------------------------------------------------------------------------------- advantages and returns


def gae_by_hand(rewards, values, ended, gamma, lam):
    """A_t = sum of (gamma lambda)^i delta_(t + i) up to the end, of one agent; there is one value more than rewards."""
    T = len(rewards)
    errors = [rewards[t] + gamma * (1 - ended[t]) * values[t + 1] - values[t] for t in range(T)]
    advantages = []
    for t in range(T):
        last = next((i for i in range(t, T) if ended[i]), T - 1)
        advantages.append(sum((gamma * lam) ** (i - t) * errors[i] for i in range(t, last + 1)))
    return advantages


@pytest.mark.parametrize("ends", [[], [3], [0, 4], [6]])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_advantages_are_sums_of_discounted_errors(lam, ends):
    torch.set_default_dtype(torch.float64)
    args, generator = Args(gamma=0.9, gae_lambda=lam), torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(2, 2, T, 3, generator=generator) for T in (7, 8))
    terminated = torch.zeros(2, 2, 7)
    terminated[1, 0, ends] = 1
    found = script.gae(rewards, values, terminated, args)
    for s, b, n in itertools.product(range(2), range(2), range(3)):
        ended = terminated[s, b].tolist()
        expected = gae_by_hand(rewards[s, b, :, n].tolist(), values[s, b, :, n].tolist(), ended, 0.9, lam)
        assert found[s, b, :, n].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    if lam == 1:  # the whole return: rewards to the end, and after a truncation the value
        discounts = 0.9 ** torch.arange(7.0)
        whole = (discounts[:, None] * rewards[0, 0]).sum(0) + 0.9**7 * values[0, 0, 7] - values[0, 0, 0]
        torch.testing.assert_close(found[0, 0, 0], whole)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_episodes_become_a_batch(normalized, first):
    """Every entry by hand; the moments of returns are rounded to float32."""
    options = dict(gamma=0.9, gae_lambda=0.7, team_reward="sum", normalize_advantage=normalized, reward_scale=2.0)
    args, env, nets, replay, norm, value_norm, _ = tiny(**options)
    value_norm = torch.zeros_like(value_norm) if first else value_norm
    batch, moments = script.prepare_episodes(nets, replay, norm, value_norm, env, args)
    close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-6)
    for s in range(2):
        expected = {name: torch.zeros(6, 3, device=DEVICE) for name in ("advantages", "values", "returns")}
        if first:
            mean, std = torch.zeros(3, device=DEVICE), torch.full((3,), 0.01, device=DEVICE)
        else:
            mean, square = value_norm[0, s, 0] / 0.6, value_norm[1, s, 0] / 0.6
            std = (square - mean**2).sqrt()
        for b in range(2):
            obs = torch.where(norm[s, :, 1] > 0, (replay["obs"][s, b] - norm[s, :, 0]) / norm[s, :, 1], 0)
            raw = torch.stack([plain(nets["critic"], s, x.flatten()).detach() for x in obs])
            values = mean + std * raw
            own = replay["rewards"][s, b]
            rewards = 2 * torch.stack([own[:, 0] + own[:, 1], own[:, 0] + own[:, 1], own[:, 2]], 1)
            ended = replay["terminated"][s, b].tolist()
            for t, n in itertools.product(range(3), range(3)):
                row, x = 3 * b + t, obs[t]
                advantages = gae_by_hand(rewards[:, n].tolist(), values[:, n].tolist(), ended, 0.9, 0.7)
                expected["advantages"][row, n], expected["values"][row, n] = advantages[t], raw[t, n]
                expected["returns"][row, n] = advantages[t] + values[t, n]
                close(batch["obs"][s, row, n], x[n])
                assert torch.equal(batch["actions"][s, row, n], replay["actions"][s, b, t, n])
                pi = distribution(nets, env, args, s, n, x[n])
                close(batch["logprobs"][s, row, n], logprob(pi, replay["actions"][s, b, t, n]))
        if normalized:
            spread = expected["advantages"].std(0, correction=0)
            expected["advantages"] = (expected["advantages"] - expected["advantages"].mean(0)) / spread
        weight = 0.1 if first else 0.9 * 0.6 + 0.1
        mean = (0.9 * value_norm[0, s, 0] + 0.1 * expected["returns"].mean(0)) / weight
        square = (0.9 * value_norm[1, s, 0] + 0.1 * expected["returns"].square().mean(0)) / weight
        std = (square - mean**2).sqrt()
        close(moments[:, s, 0], torch.stack([mean, square, torch.ones_like(mean)]) * weight)
        expected["returns"] = (expected["returns"] - mean) / std  # values stay in the critic's own units, for clipping
        for name, value in expected.items():
            close(batch[name][s], value)
    assert not any(value.requires_grad for value in batch.values())


def test_moments_of_returns_are_a_weighted_mean():
    """Of the k-th last episodes with weight decay^k, whatever the start; per seed and agent."""
    args, env, nets, replay, norm, value_norm, _ = tiny(value_decay=0.7, gae_lambda=1.0, gamma=0.0)
    value_norm, seen = torch.zeros_like(value_norm), []  # with gamma 0 returns are rewards
    for k in range(4):
        streams = script.make_generators(k, 2, "rewards", DEVICE)
        replay["rewards"] = (k + 1) * script.draw(torch.randn, (2, 3, 3), streams) + k
        seen.append(replay["rewards"].flatten(1, 2))  # [S, M, N]
        batch, value_norm = script.prepare_episodes(nets, replay, norm, value_norm, env, args)
    weights = [0.7**k for k in (3, 2, 1, 0)]
    for s, n in itertools.product(range(2), range(3)):
        samples = [x[s, :, n].tolist() for x in seen]
        mean = sum(w * sum(x) / 6 for w, x in zip(weights, samples)) / sum(weights)
        square = sum(w * sum(v * v for v in x) / 6 for w, x in zip(weights, samples)) / sum(weights)
        found = value_norm[:2, s, 0, n] / value_norm[2, s, 0, n]
        assert found.tolist() == pytest.approx([mean, square], rel=1e-6)
        expected = [(v - mean) / math.sqrt(square - mean**2) for v in samples[-1]]
        assert batch["returns"][s, :, n].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_samples_that_are_all_equal_stay_finite():
    args, env, nets, replay, norm, value_norm, _ = tiny(gamma=0.0)
    replay["rewards"] = torch.full_like(replay["rewards"], 0.3)  # whose mean is rounded
    nets["critic"].flat.detach().zero_()
    batch, _ = script.prepare_episodes(nets, replay, norm, torch.zeros_like(value_norm), env, args)
    assert batch["returns"].abs().max() < 1e-3 and batch["advantages"].abs().max() < 1e-3


# --------------------------------------------------------------------------------------------------- losses and update


def loss_by_hand(nets, batch, env, args, s, cases):
    """Without regulariser, of seed s, an agent and a sample at a time; and its metrics. Appends to `cases` which side
    of the clipping each sample is on."""
    N, M, clip = env.num_agents, batch["obs"].shape[1], args.clip_coef
    gain = entropy = value_loss = 0.0
    ratios = []
    for n, m in itertools.product(range(N), range(M)):
        pi, advantage = distribution(nets, env, args, s, n, batch["obs"][s, m, n]), batch["advantages"][s, m, n]
        ratio = (logprob(pi, batch["actions"][s, m, n]) - batch["logprobs"][s, m, n]).exp()
        ratios.append(ratio.item())
        best = ratio.clamp_max(1 + clip) if advantage > 0 else ratio.clamp_min(1 - clip)  # beyond it nothing is gained
        gain, entropy = gain + best * advantage / M, entropy + pi.entropy().sum() / M
        value = plain(nets["critic"], s, batch["obs"][s, m].flatten())[n]
        old, target = batch["values"][s, m, n].item(), batch["returns"][s, m, n].item()
        error = (value - target) ** 2
        if args.clip_vloss:
            near = value if abs(value.item() - old) < clip else old + math.copysign(clip, value.item() - old)
            error = error if error.item() > (near - target) ** 2 else (near - target) ** 2 + 0 * value
        value_loss = value_loss + 0.5 * error / (N * M)
        cases.append((bool(advantage > 0), (ratio.item() > 1 + clip) - (ratio.item() < 1 - clip)))
    metrics = {"policy_loss": -gain.item() / N, "value_loss": value_loss.item(), "entropy": entropy.item() / N}
    metrics["approx_kl"] = sum(r - 1 - math.log(r) for r in ratios) / len(ratios)
    metrics["clipfrac"] = sum(abs(r - 1) > clip for r in ratios) / len(ratios)
    return -gain - args.entropy_coef * entropy + value_loss, metrics


@VARIANT
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_ppo_loss_and_its_gradient_by_hand(variant, clip_vloss):
    args, env, nets, replay, norm, value_norm, _ = tiny(**variant, clip_vloss=clip_vloss, entropy_coef=0.05, num_envs=4)
    batch, cases = batch_of(nets, replay, norm, value_norm, env, args), []
    loss, metrics = script.ppo_loss(nets, batch, None, script.perturbation_unit(norm, args), env, args)
    by_hand = [loss_by_hand(nets, batch, env, args, s, cases) for s in range(2)]
    expected = sum(loss for loss, _ in by_hand)
    assert set(cases) == set(itertools.product((True, False), (-1, 0, 1)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for name in by_hand[0][1]:
        assert metrics[f"losses/{name}"].tolist() == pytest.approx([m[name] for _, m in by_hand], rel=1e-8)
    assert not any(value.requires_grad for value in metrics.values())
    flats = [net.flat for net in nets.values()]
    ours, theirs = (torch.autograd.grad(value, flats) for value in (loss, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)
        assert a.abs().max() > 1e-3


def test_the_loss_compiles_whole_and_keeps_its_gradient():
    """On a GPU --compile compiles it; here as far as the graphs of its gradient."""
    args, env, nets, replay, norm, value_norm, noise = tiny(attack_steps=1)
    batch, unit = batch_of(nets, replay, norm, value_norm, env, args), script.perturbation_unit(norm, args)
    gradients = []
    for function in (script.ppo_loss, torch.compile(script.ppo_loss, fullgraph=True, backend="aot_eager")):
        loss, _ = function(nets, batch, noise, unit, env, args)
        gradients.append(torch.autograd.grad(loss, nets["actor"].flat)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def streams_of(seed=4):
    return {name: script.make_generators(seed, 2, name, DEVICE) for name in ("minibatches", "noise")}


def test_every_sample_is_used_once_an_epoch_in_an_order_of_its_seed():
    args, env, nets, replay, norm, value_norm, _ = tiny(num_envs=4, num_minibatches=3, update_epochs=2)
    batch, _ = script.prepare_episodes(nets, replay, norm, value_norm, env, args)
    marks = torch.arange(24.0, device=DEVICE).view(2, 12)  # seed and sample
    batch = {name: marks.view(2, 12, *[1] * (v.ndim - 2)).expand_as(v).clone() for name, v in batch.items()}
    seen, noises = [], []

    def loss_of(nets, rows, noise, *rest):
        chosen = rows["obs"][:, :, 0, 0]
        assert rows.keys() == batch.keys() and chosen.shape == (2, 4) and noise.shape == (2, 3, 4, 4)
        assert all((v == chosen.view(2, 4, *[1] * (v.ndim - 2))).all() for v in rows.values())  # rows stay together
        seen.append(chosen)
        noises.append(noise)
        loss = 0 * sum(net.flat.sum() for net in nets.values())
        return loss, {"calls": torch.ones(2, device=DEVICE)}

    optimizer = torch.optim.SGD([net.flat for net in nets.values()], 1.0)
    sums = script.update_ppo(nets, optimizer, loss_of, batch, torch.ones(()), streams_of(), env, args)
    orders = torch.cat(seen, 1).view(2, 2, 12)  # seeds, epochs
    assert torch.equal(orders.sort(-1).values, marks[:, None].expand(2, 2, 12))
    orders = (orders - marks[:, None, :1]).flatten(0, 1)
    assert len(orders.unique(dim=0)) == 4 and sums["calls"].tolist() == [6, 6]
    assert len(torch.stack(noises).flatten(2).transpose(0, 1).flatten(0, 1).unique(dim=0)) == 12


def test_an_update_clips_each_network():
    args, env, nets, replay, norm, value_norm, _ = tiny(max_grad_norm=1e-3, update_epochs=1)
    batch, before = batch_of(nets, replay, norm, value_norm, env, args), {}
    for name, net in nets.items():
        before[name] = net.flat.detach().clone()
    optimizer, unit = torch.optim.SGD([net.flat for net in nets.values()], 1.0), script.perturbation_unit(norm, args)
    script.update_ppo(nets, optimizer, script.ppo_loss, batch, unit, streams_of(), env, args)
    for name, net in nets.items():
        step = (net.flat - before[name]).norm(dim=1)
        torch.testing.assert_close(step, torch.full_like(step, 1e-3))  # each network of each seed on its own


def test_other_seeds_do_not_see_a_seeds_data():
    results = []
    for bump in (0.0, 1.0):
        args, env, nets, replay, norm, value_norm, _ = tiny(num_envs=4, num_minibatches=2)
        for name in ("obs", "rewards"):
            replay[name][0] += bump
        batch, moments = script.prepare_episodes(nets, replay, norm, value_norm, env, args)
        optimizer = torch.optim.Adam([net.flat for net in nets.values()], 0.01)
        unit = script.perturbation_unit(norm, args)
        metrics = script.update_ppo(nets, optimizer, script.ppo_loss, batch, unit, streams_of(), env, args)
        moved = [batch[name] for name in ("obs", "logprobs", "advantages", "values", "returns")]
        moved += [moments[:2].transpose(0, 1), *(net.flat.detach().view(2, -1) for net in nets.values())]
        results.append(moved + [v for name, v in metrics.items() if name != "losses/clipfrac"])
    for a, b in zip(*results):
        assert not torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# ------------------------------------------------------------------------------------------------------------- rollout


def rollout(short, env_id, discrete, num_envs=3000):
    """(args, env, actor, norm, streams, replay) of two steps of two seeds."""
    short(2)
    options = dict(env_id=env_id, num_seeds=2, num_envs=num_envs, continuous_actions=not discrete)
    args = Args(**(SPREAD | options))
    env = script.make_task(args, 2 * num_envs, DEVICE)
    nets, _ = script.make_mappo(env, args)
    streams = script.make_generators(0, 2, "test", DEVICE)
    nets["actor"].flat.detach().mul_(1.5)
    nets["actor"].layers()[-1][0].detach().mul_(50)
    norm = script.draw(torch.rand, (env.num_agents, 2, env.obs_mask.shape[1]), streams) + 0.3
    return args, env, nets["actor"], norm, streams


@pytest.mark.parametrize("discrete", [True, False])
def test_rollout_plays_the_policies_and_never_a_padded_action(short, discrete):
    args, env, actor, norm, streams = rollout(short, "simple_speaker_listener_v4", discrete)
    sent = []

    def step(state, action, noise):
        sent.append(action)
        return env.step(state, action, noise)

    replay = script.play_episodes(step, env, actor, norm, streams, args)
    played, mask = replay["actions"], env.action_mask  # [S, B, T, N, A]
    assert mask.sum(1).tolist() == [3, 5] and not played[..., ~mask].any() and replay["obs"].shape[2] == 3
    x = script.normalize(replay["obs"][:, :, :2].flatten(1, 2).transpose(1, 2), norm)
    z = script.policies(actor, x, env, args).transpose(1, 2).unflatten(1, (3000, 2))
    if discrete:
        assert (played.sum(-1) == 1).all()
        probs = z.softmax(-1)
        assert (played - probs).mean(1).abs().max() < 0.04  # at every step, by action: four standard errors
        likely = probs.argmax(-1, keepdim=True)
        hits, expected = (v.gather(-1, likely).mean((1, 2)) for v in (played, probs))
        assert (hits - expected).abs().max() < 0.03 and expected.min() > 0.25
        assert torch.equal(torch.stack(sent, 1), played.argmax(-1).flatten(0, 1))
    else:
        mean, log_std = z.chunk(2, -1)
        draws = ((played - mean) / log_std.exp())[..., mask].flatten(2)  # [S, B, T * sum of A]
        assert draws.mean(1).abs().max() < 0.08 and (draws.std(1) - 1).abs().max() < 0.06
        for of_seed in draws:  # independent between steps, agents and actions
            assert (torch.corrcoef(of_seed.T) - torch.eye(16, device=DEVICE)).abs().max() < 0.08
        assert torch.corrcoef(draws.flatten(1))[0, 1].abs() < 0.02 and mean.std(1)[..., mask].min() > 0.02
        expected = (0.5 + 0.5 * played.clamp(-1, 1)) * mask  # the range of the task is [0, 1]
        torch.testing.assert_close(torch.stack(sent, 1), expected.flatten(0, 1))
        assert (played[..., mask].abs() > 1).any()  # kept as drawn
    streams = script.make_generators(0, 2, "test", DEVICE)
    script.draw(torch.rand, (env.num_agents, 2, env.obs_mask.shape[1]), streams)  # as in rollout()
    script.draw(script.gumbel if discrete else torch.randn, (2, 2, 3000, 5), streams)
    state, obs = env.reset(streams)
    assert torch.equal(replay["obs"][:, :, 0].flatten(0, 1), obs)
    for t in range(2):
        state, obs, reward, *_ = env.step(state, sent[t], None)
        assert torch.equal(replay["obs"][:, :, t + 1].flatten(0, 1), obs)
        assert torch.equal(replay["rewards"][:, :, t].flatten(0, 1), reward)
    assert not replay["terminated"].any()


def test_an_end_within_an_episode_is_recorded(short):
    """Hovering drones that are already where they shall be."""
    args, env, actor, norm, streams = rollout(short, "hover_v0", False, num_envs=4)

    def step(state, action, noise):
        goal = state.position.clone() if len(calls) else state.goal
        calls.append(1)
        at_goal = torch.arange(8, device=DEVICE) == 5
        return env.step(dataclasses.replace(state, goal=torch.where(at_goal, goal, state.goal)), action, noise)

    calls = []
    replay = script.play_episodes(step, env, actor, norm, streams, args)
    expected = torch.zeros(2, 4, 2, device=DEVICE)
    expected[1, 1, 1] = 1
    assert torch.equal(replay["terminated"], expected)


def test_norm_of_random_play(short):
    short(3)
    args = Args(**(SPREAD | dict(env_id="leader_follower_v0", num_seeds=2, num_envs=50)))
    env, seen = script.make_task(args, 100, DEVICE), []

    def step(state, action, noise):
        assert action.min() < -0.9 and action.max() > 0.9
        seen.append(env.observe(state))
        return env.step(state, action, noise)

    norm = script.measure_norm(script.play_randomly(step, env, args), args.num_envs)
    obs = torch.stack(seen).unflatten(1, (2, 50)).double()  # [T, S, B, N, O], without the last observation
    expected = torch.stack([obs.mean((0, 2)), obs.std((0, 2), correction=0)], 2)
    torch.testing.assert_close(norm, expected.float(), rtol=1e-4, atol=1e-6)
    varies = norm[:, :, 1].flatten(0, 1) > 0  # heights and vertical speeds, as all rotors turn alike
    assert varies.nonzero()[:, 1].tolist() == 4 * [2, 8]


# ---------------------------------------------------------------------------------------------------------- evaluation


def drive(monkeypatch, short, env_id, discrete=False, num_episodes=400, **options):
    """(args, env, nets, norm, play): play(family, strength) is the last thing that policies saw, [S, N, E, O], and the
    actions of an episode of one step of two seeds."""
    short(1)
    args = dict(env_id=env_id, num_seeds=2, continuous_actions=not discrete, **options)
    args = Args(**(SPREAD | args))
    env = script.make_task(args, 2 * num_episodes, DEVICE)
    nets, _ = script.make_mappo(env, args)
    nets["actor"].layers()[-1][0].detach().mul_(50)
    streams = script.make_generators(2, 2, "norm", DEVICE)
    norm = script.draw(torch.rand, (env.num_agents, 2, env.obs_mask.shape[1]), streams) + 0.5
    norm[:, :, 1] *= env.obs_mask
    norm[:, 0, 1, 2] = 0
    real_policies, real_step = script.policies, type(env).step
    seen, sent = [], []
    monkeypatch.setattr(script, "policies", lambda *rest: (seen.append(rest[1]), real_policies(*rest))[1])
    monkeypatch.setattr(type(env), "step", lambda self, *rest: (sent.append(rest[1]), real_step(self, *rest))[1])

    def play(family="clean", strength=0.0):
        generators = script.make_generators(0, 2, "evaluation", DEVICE)
        script.agent_returns(env, nets, norm, args, generators, family, strength)
        return seen[-1], sent[-1].unflatten(0, (2, -1))

    return args, env, nets, norm, play


@pytest.mark.parametrize("discrete", [True, False])
def test_evaluation_plays_the_likeliest_actions(monkeypatch, short, discrete):
    args, env, nets, _, play = drive(monkeypatch, short, "simple_tag_v3", discrete, 50)
    x, played = play()
    z = script.policies(nets["actor"], x, env, args).transpose(1, 2)
    expected = z.argmax(-1) if discrete else 0.5 + 0.5 * z.chunk(2, -1)[0].clamp(-1, 1)  # the range is [0, 1]
    torch.testing.assert_close(played, expected)
    assert len(played.unique()) > 1


@pytest.mark.parametrize("family", ["gaussian", "uniform"])
def test_noise_is_in_units_of_the_observation(monkeypatch, short, family):
    args, env, _, norm, play = drive(monkeypatch, short, "simple_tag_v3")
    (x, clean), (seen, noisy) = play(), play(family, 0.2)
    change = ((seen - x) * norm[:, :, None, 1]).transpose(2, 3)  # [S, N, O, E]
    live = env.obs_mask & env.cooperators[:, None]
    live[0, 2] = False  # did not vary in training
    assert (change[:, ~live] == 0).all()
    change = change[:, live]
    assert change.mean().abs() < 0.002
    if family == "gaussian":
        assert change.std().item() == pytest.approx(0.2, rel=0.02)
    else:
        assert change.abs().max() <= 0.2 * (1 + 1e-5) and change.abs().mean().item() == pytest.approx(0.1, rel=0.02)
    assert torch.equal(clean[:, :, ~env.cooperators], noisy[:, :, ~env.cooperators])
    assert (clean != noisy)[:, :, env.cooperators].any(-1).all()


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("ball", ["l2", "linf"])
def test_mad_stays_in_its_ball_and_changes_policies_more_than_random_noise(monkeypatch, short, discrete, ball):
    args, env, nets, norm, play = drive(monkeypatch, short, "simple_tag_v3", discrete, 200, norm=ball)
    (x, clean), (worst, attacked) = play(), play("mad", 0.2)
    raw = norm[:, :, None, 1]
    length = torch.linalg.vector_norm((worst - x) * raw, math.inf if ball == "linf" else 2, dim=-1)
    assert length.max() <= 0.2 * (1 + 1e-4) and length[:, :3].mean() > 0.18  # in the observation's own units
    assert (worst - x)[:, 0, :, 2].abs().max() == 0 and (worst - x)[:, 3].abs().max() == 0
    assert torch.equal(clean[:, :, 3], attacked[:, :, 3])  # opponents see undisturbed
    live = (raw > 0) * env.cooperators[:, None, None]
    noise = script.draw(torch.randn, x.shape[1:], script.make_generators(9, 2, "noise", DEVICE))
    random = x + script.rescale(noise * live, 0.2, ball) / torch.where(raw > 0, raw, 1)
    z, z_random, z_worst = (script.policies(nets["actor"], seen, env, args)[:, :3] for seen in (x, random, worst))
    at_random, at_worst = (script.divergence(args.divergence, other, z).mean() for other in (z_random, z_worst))
    assert at_worst > 1.5 * at_random > 0


@pytest.mark.parametrize("discrete", [True, False])
def test_random_actions_replace_one_agents_as_often_as_asked_for(monkeypatch, short, discrete):
    args, env, _, _, play = drive(monkeypatch, short, "simple_tag_v3", discrete, 2000)
    (x, clean), (same, played) = play(), play("random_action", 0.5)
    changed = played != clean if discrete else (played != clean).any(-1)  # [S, E, N]
    assert torch.equal(x, same) and changed.sum(-1).max() == 1 and not changed[..., 3].any()
    expected = 0.5 / 3 * (0.8 if discrete else 1.0)  # one of five random actions is the same
    assert (changed.double().mean(1)[:, :3] - expected).abs().max() < 0.04
    if not discrete:
        replaced = played[..., :3, :][changed[..., :3]]
        assert 0 <= replaced.min() < 0.01 and 0.99 < replaced.max() <= 1


CHANGES = [(name, factor, name, factor) for name in script.DYNAMICS for factor in (0.5, 2.0)]
FLIGHT = [("mass", 1.05, "mass", 1.05 * drones.MASS), ("updraft", -0.01, "wind", (0.0, 0.0, -0.01))]
FLIGHT += [("wind", 0.005, "wind", (0.005, 0.0, 0.0)), ("gust", 0.01, "gust", 0.01), ("delay", 1, "delay", 1)]


@pytest.mark.parametrize("family,strength,field,value", CHANGES + FLIGHT)
def test_changed_dynamics_are_those_of_the_task(family, strength, field, value):
    flies = (family, strength, field, value) in FLIGHT
    args = Args(**(SMALL | dict(env_id="leader_follower_v1" if flies else "simple_tag_v3")))
    clean, changed = script.make_task(args, 2, DEVICE), script.make_task(args, 2, DEVICE, family, strength)
    expected = value if flies else value * getattr(clean, field)
    assert getattr(changed, field) == pytest.approx(expected) != getattr(clean, field)
    for other in ("mass", "wind", "gust", "delay", "damping", "max_speed_scale", "contact_force"):
        if other != field and hasattr(clean, other):
            assert getattr(changed, other) == getattr(clean, other)


@pytest.mark.parametrize("env_id,sweep", [("leader_follower_v1", "DRONE_SWEEP"), ("simple_tag_v3", "SWEEP")])
def test_every_point_of_the_sweep_changes_returns(short, env_id, sweep):
    short(15)
    args = Args(**(SMALL | dict(env_id=env_id, num_seeds=2)))
    env = script.make_task(args, 40, DEVICE)
    nets, _ = script.make_mappo(env, args)
    nets["actor"].layers()[-1][0].detach().mul_(50)
    norm = script.measure_norm(script.play_randomly(env.step, env, args), 20)

    def play(family="clean", strength=0.0, alone=False):
        one = dataclasses.replace(args, num_seeds=1, seed=2) if alone else args
        changed = script.make_task(one, 20 if alone else 40, DEVICE, family, strength)
        generators = script.make_generators(one.seed, one.num_seeds, "evaluation", DEVICE)
        second = {name: script.MLP(net.flat[len(net.flat) // 2 :], net.sizes) for name, net in nets.items()}
        given = (second, norm[1:]) if alone else (nets, norm)
        return script.agent_returns(changed, *given, one, generators, family, strength)

    clean, sweep = play(), getattr(script, sweep)
    assert torch.equal(clean, play())
    strongest = {family: strengths[-1] for family, strengths in sweep.items()}
    for family, strength in strongest.items():
        found = play(family, strength)
        assert found.isfinite().all() and (found != clean).flatten(1).any(1).all(), family
    torch.testing.assert_close(play("gaussian", 0.1, alone=True)[0], play("gaussian", 0.1)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("env_id", ["simple_tag_v3", "leader_follower_v0", "leader_follower_v1"])
def test_report_is_of_the_team_on_changed_tasks(tmp_path, monkeypatch, capsys, env_id, num_seeds):
    args = Args(**(SMALL | dict(env_id=env_id, num_seeds=num_seeds, eval_episodes=4)))
    seen, shape = {}, (num_seeds, 4, 4 if env_id == "simple_tag_v3" else 2)
    known = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)

    def agent_returns(env, nets, norm, args, generators, family, strength):
        assert env.num_envs == 4 * num_seeds
        seen[family, strength] = env, generators[-1].initial_seed()
        return known + len(family) + strength

    monkeypatch.setattr(script, "agent_returns", agent_returns)
    script.agents_report(None, None, args, DEVICE, tmp_path, [])
    rows, out = list(csv.DictReader(open(tmp_path / "robustness.csv"))), capsys.readouterr().out
    flies = args.is_drones
    left_out = {"leader_follower_v0": ("wind", "gust")}.get(env_id, ())
    sweep = {f: s for f, s in (script.DRONE_SWEEP if flies else script.SWEEP).items() if f not in left_out}
    assert seen.keys() == {("clean", 0.0), *((f, s) for f in sweep for s in sweep[f])}
    assert len({stream for _, stream in seen.values()}) == 1  # the same episodes at every point
    clean = seen["clean", 0.0][0]
    for (family, strength), (env, _) in seen.items():
        if family in script.DYNAMICS:
            assert getattr(env, family) == pytest.approx(strength * getattr(clean, family))
        elif family in ("gust", "delay"):
            assert getattr(env, family) == strength
    team = [name for name in clean.agents if name != "agent_0"]  # of tag the prey
    for row in rows:
        own = [clean.agents.index(name) for name in (team if row["agent"] == "mean" else [row["agent"]])]
        episodes = known[int(row["seed"]) - 1][:, own].mean(1) + len(row["perturbation"]) + float(row["strength"])
        assert float(row["return"]) == pytest.approx(episodes.mean().item(), rel=1e-9)
        assert float(row["standard_error"]) == pytest.approx(episodes.std(correction=0).item() / 2, rel=1e-9)
        assert (row["episodes"], row["env_id"]) == ("4", env_id)
    assert len(rows) == len(seen) * num_seeds * (len(team) + 1)
    columns = [clean.agents.index(team[0])] if flies else [clean.agents.index(name) for name in team]
    samples = known[..., columns].mean(2) + len("uniform") + sweep["uniform"][0]
    samples = samples.mean(1) if num_seeds > 1 else samples[0]
    quantile = {3: 4.30265, 4: 3.18245}[len(samples)]  # of Student's t with one degree of freedom less
    half = quantile * samples.std() / len(samples) ** 0.5
    (line, *_) = [line for line in out.splitlines() if line.startswith("  uniform")]
    assert f"{sweep['uniform'][0]:g}: {samples.mean():7.2f} ± {half:.2f}" in line
    assert out.count("Return (") == (len(team) if flies else 1) and (tmp_path / "robustness.png").stat().st_size > 0


def test_a_row_of_the_log(short):
    """Explained variance, mean standard deviation and returns in evaluation by hand."""
    short(3)
    args = Args(**(SMALL | dict(num_seeds=2)))
    env = script.make_task(args, 8, DEVICE)
    nets, _ = script.make_mappo(env, args)
    nets["actor"].layers()[-1][1].detach()[:, 1] += torch.tensor([0.0, 0.5, 1.0, 1.5], device=DEVICE)[:, None]
    norm = torch.ones(2, 2, 2, 12, device=DEVICE)
    batch = {"obs": torch.randn(2, 12, 2, 12, device=DEVICE), "returns": torch.randn(2, 12, 2, device=DEVICE)}
    with torch.no_grad():
        values = script.central_values(nets["critic"], batch["obs"], args)
    batch["returns"] = values + torch.tensor([0.1, 0.5], device=DEVICE) * torch.randn(2, 12, 2, device=DEVICE)
    row = script.inspect_agents(nets, norm, batch, script.perturbation_unit(norm, args), env, args)
    for s in range(2):
        left = [(batch["returns"] - values)[s, :, n].var() / batch["returns"][s, :, n].var() for n in range(2)]
        torch.testing.assert_close(row["losses/explained_variance"][s], 1 - sum(left) / 2)
    std = [0.5 * (1 + math.exp(0.5)) / 2, 0.5 * (math.e + math.exp(1.5)) / 2]
    assert row["charts/policy_std"].tolist() == pytest.approx(std, rel=1e-5)
    mean = (row["eval/leader_0"] + row["eval/follower_0"]) / 2
    torch.testing.assert_close(row["eval/episodic_return"], mean)
    assert all(row[f"ernie/{name}"].shape == (2,) for name in ("attack", "random_direction", "interaction_ratio"))


# ---------------------------------------------------------------------------------------------------------------- runs


def short_train(tmp_path, name, small=SPREAD, compiled=lambda f: f, **options):
    args = Args(**(small | options))
    device = script.setup(args)
    env = script.make_task(args, args.num_seeds * args.num_envs, device)
    nets, optimizer = script.make_mappo(env, args)
    folder = tmp_path / name
    folder.mkdir()
    norm = script.train(env, nets, optimizer, compiled, args, folder, [])
    assert norm is not None
    return args, nets, norm, list(csv.DictReader(open(folder / "metrics.csv")))


ALONE = [dict(env_id="leader_follower_v0"), dict(env_id="leader_follower_v1", regularizer="none", hidden_size=64)]
ALONE += [dict(env_id="simple_spread_v3", continuous_actions=False, share_parameters=True)]
ALONE += [dict(env_id="simple_spread_v3", state_dependent_std=True, norm="linf")]


@pytest.mark.parametrize("options", ALONE)
def test_a_seed_does_not_depend_on_the_others(tmp_path, short, options):
    """On a CPU bit for bit; with a number of samples that is no multiple of 16, products may round a seed otherwise."""
    short(12)
    small = SMALL | dict(num_envs=16, num_minibatches=4, reg_batch_size=32, total_timesteps=576, log_interval=384)
    _, together, norms, rows = short_train(tmp_path, "together", small, seed=5, num_seeds=2, **options)
    for k in range(2):
        _, alone, norm, own = short_train(tmp_path, f"alone{k}", small, seed=5 + k, **options)
        for name in alone:
            assert alike(alone[name].flat, together[name].flat.unflatten(0, (2, -1))[k])
        assert alike(norm[0], norms[k]) and len(own) == 2
        assert alike(without_speed(own), without_speed([row for row in rows if row["seed"] == str(5 + k)]))


MODES = [
    *(dict(regularizer=m) for m in ("none", "gaussian", "random", "adversarial", "stackelberg")),
    dict(norm="linf", epsilon_units="raw", divergence="l2", detach_std=False, detach_reference=True),
    dict(continuous_actions=False, divergence="kl", norm="linf"),
    dict(continuous_actions=False, divergence="l2_probs", epsilon_units="raw", share_parameters=True),
    dict(continuous_actions=False, divergence="l2", regularizer="gaussian", gaussian_std=1.0, activation="silu"),
    dict(num_seeds=2, share_parameters=True, state_dependent_std=True, attack_steps=1, anneal_lr=False),
    dict(state_dependent_std=True, detach_std=False, entropy_coef=0.01, clip_vloss=False, normalize_advantage=False),
    dict(team_reward="sum", gae_lambda=1.0, gamma=1.0, value_decay=0.0, activation="relu", reg_batch_size=1000),
    dict(team_reward="mean", gae_lambda=0.0, gamma=0.0, num_minibatches=1, num_envs=1),
    dict(env_id="simple_tag_v3"),
    dict(env_id="simple_speaker_listener_v4", continuous_actions=False),
    dict(env_id="simple_world_comm_v3", share_parameters=True),
    dict(env_id="leader_follower_v0", team_reward="mean"),
    dict(env_id="leader_follower_v1", num_agents=4, share_parameters=True),
    dict(env_id="hover_v0", num_agents=1, state_dependent_std=True),
]


@pytest.mark.parametrize("options", MODES)
def test_every_option_trains(tmp_path, short, options):
    short(8)
    small = SPREAD | dict(total_timesteps=64 * options.get("num_envs", 4) // 4)
    small |= dict(log_interval=small["total_timesteps"] // 2)
    args, nets, _, rows = short_train(tmp_path, "run", small, **options)
    assert len(rows) == 2 * args.num_seeds and ("ernie/regularizer" in rows[0]) == args.regularized
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    fresh, _ = script.make_mappo(script.make_task(args, 1, DEVICE), args)
    assert all((nets[name].flat != fresh[name].flat).any(1).all() for name in nets)


@pytest.mark.parametrize("env_id", ["simple_spread_v3", "leader_follower_v1"])
def test_compiled_steps_train_the_same(tmp_path, monkeypatch, short, env_id):
    short(4)
    asked = []
    real = partial(torch.compile, backend="eager")  # the graphs are whole, machine code would take a minute
    monkeypatch.setattr(torch, "compile", lambda f, **options: (asked.append((f, options)), real(f, **options))[1])
    small = SPREAD | dict(env_id=env_id, total_timesteps=16, log_interval=16, eval_episodes=2)
    for name in ("agents_report", "show_episodes"):
        monkeypatch.setattr(script, name, lambda *rest: None)
    finals = []
    for flag in ("--compile", "--no-compile"):
        assert main_with(monkeypatch, f"--runs-dir={tmp_path}/{flag}", flag, small=small) is None
        finals.append(torch.load(only(tmp_path / flag) / "checkpoint.pt", weights_only=True)["nets"])
    assert asked and all(options["fullgraph"] for _, options in asked)
    for name in finals[0]:
        torch.testing.assert_close(finals[0][name], finals[1][name])


@pytest.mark.parametrize("options", [dict(attack_steps=0), dict(reg_coef=0.0), dict(epsilon=0.0)])
def test_no_regulariser_is_mappo(tmp_path, short, options):
    short(8)
    small = SPREAD | dict(total_timesteps=64, log_interval=32)
    _, mappo, _, rows = short_train(tmp_path, "mappo", small, regularizer="none")
    _, idle, _, own = short_train(tmp_path, "idle", small, **options)
    _, ernie, *_ = short_train(tmp_path, "ernie", small)
    assert all(torch.equal(mappo[name].flat, idle[name].flat) for name in mappo)
    assert without_speed(rows) == without_speed(own) and not torch.equal(mappo["actor"].flat, ernie["actor"].flat)


@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rate_falls_linearly(tmp_path, monkeypatch, short, anneal):
    short(8)
    rates, real = [], script.update_ppo

    def watched(nets, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return real(nets, optimizer, *rest)

    monkeypatch.setattr(script, "update_ppo", watched)
    short_train(tmp_path, "run", SPREAD | dict(total_timesteps=128), anneal_lr=anneal, learning_rate=1e-3)
    assert rates == pytest.approx([1e-3 * (1 - k / 4 * anneal) for k in range(4)])


def test_logged_metrics_are_means_over_the_window(tmp_path, monkeypatch, short):
    short(8)
    real, losses, returns = script.ppo_loss, [], []

    def watched(*rest):
        loss, metrics = real(*rest)
        losses.append(metrics["losses/value_loss"].item())
        return loss, metrics

    real_play = script.play_episodes

    def play_episodes(*rest):
        replay = real_play(*rest)
        returns.append(replay["rewards"].sum(2).mean().item())
        return replay

    monkeypatch.setattr(script, "ppo_loss", watched)
    monkeypatch.setattr(script, "play_episodes", play_episodes)
    *_, rows = short_train(tmp_path, "run", SPREAD | dict(total_timesteps=128, log_interval=64))
    assert [row["global_step"] for row in rows] == ["64", "128"] and len(losses) == 16 and len(returns) == 4
    for k, row in enumerate(rows):
        assert float(row["losses/value_loss"]) == pytest.approx(sum(losses[8 * k : 8 * k + 8]) / 8, rel=1e-5)
        assert float(row["charts/episodic_return"]) == pytest.approx(sum(returns[2 * k : 2 * k + 2]) / 2, rel=1e-5)


def with_small(flags, small=SPREAD) -> list[str]:
    """These flags after those of `small`, which go with neither --resume nor --evaluate."""
    again = any(str(flag).startswith(("--resume", "--evaluate")) for flag in flags)
    small = [
        f"--{'' if v is not False else 'no-'}{k.replace('_', '-')}" + ("" if isinstance(v, bool) else f"={v}")
        for k, v in small.items()
    ]
    return [*(["--no-track"] if again else small), *map(str, flags)]


def main_with(monkeypatch, *flags, small=SPREAD):
    """main() in this process with the flags of `small` and these; None, or the exit code."""
    monkeypatch.setattr(sys, "argv", ["ernie_mappo.py", *with_small(flags, small)])
    try:
        return script.main()
    except SystemExit as stop:
        return stop.code


def fake_wandb(monkeypatch):
    logged = [[], []]
    runs = [SimpleNamespace(log=lambda row, step=0, k=k: logged[k].append(row), finish=lambda: None) for k in range(2)]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=dict, Image=str))
    monkeypatch.setattr(script, "start_wandb", lambda *rest: runs)
    return logged


RUNS = [
    DRONES,
    DRONES | dict(env_id="leader_follower_v1", num_agents=3),
    DRONES | dict(env_id="hover_v0"),
    DRONES | dict(env_id="simple_spread_v3"),
    DRONES | dict(env_id="simple_spread_v3", continuous_actions=False),
]


@pytest.mark.parametrize("small", RUNS)
def test_a_whole_run_leaves_what_it_promises(tmp_path, monkeypatch, capsys, short, small):
    short(8)
    logged = fake_wandb(monkeypatch)
    assert main_with(monkeypatch, f"--runs-dir={tmp_path}", "--num-seeds=2", small=small) is None
    folder, out = only(tmp_path), capsys.readouterr().out
    args, (given,) = json.loads((folder / "args.json").read_text()), [Args(**small)]
    assert args["versions"]["torch"] == version("torch") and args["env_id"] == given.env_id
    for name in ("metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "robustness.png"):
        assert (folder / name).stat().st_size > 0
    assert (folder / "distance.png").exists() == (given.env_id == "leader_follower_v1")
    with Image.open(folder / "videos" / "episode.gif") as film:  # of drones every fourth state
        assert film.n_frames == 2 if given.is_drones else 4 < film.n_frames <= 8  # equal ones are one
    metrics = list(csv.DictReader(open(folder / "metrics.csv")))
    steps = [str(32 * k) for k in (1, 2)]
    assert [(row["global_step"], row["seed"]) for row in metrics] == list(itertools.product(steps, ("1", "2")))
    text = (folder / "robustness.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    agents = script.make_task(given, 1, DEVICE).agents
    assert {row["agent"] for row in rows} == {*agents, "mean"} and {row["seed"] for row in rows} == {"1", "2"}
    assert {f"eval/{name}" in metrics[0] for name in agents} == {given.is_drones}
    left_out = {"wind", "gust"} if given.is_drones and given.env_id != "leader_follower_v1" else set()
    sweep = script.DRONE_SWEEP if given.is_drones else script.SWEEP
    left_out |= set() if given.is_drones else {"max_speed_scale"}  # spread has no speed limit
    points = {("clean", "0.0"), *((f, str(s)) for f in sweep.keys() - left_out for s in sweep[f])}
    for seed, agent in itertools.product(("1", "2"), (*agents, "mean")):
        own = [row for row in rows if (row["seed"], row["agent"]) == (seed, agent)]
        assert {(row["perturbation"], row["strength"]) for row in own} == points and len(own) == len(points)
    assert all(row["episodes"] == "2" and math.isfinite(float(row["return"])) for row in rows)
    assert all(family in out for family, _ in points)
    assert all(len(of_run) == 3 and "eval/episodic_return" in of_run[1] for of_run in logged)
    assert all(len(of_run[2]["robustness"]["data"]) == len(rows) // 2 for of_run in logged)
    if given.env_id == "hover_v0":
        return
    (folder / "distance.png").unlink(missing_ok=True)
    assert main_with(monkeypatch, f"--evaluate={folder}", "--no-capture-video") is None
    assert (folder / "robustness.csv").read_text() == text  # the same policies, the same episodes
    assert not (folder / "distance.png").exists()
    if given.env_id == "leader_follower_v0":
        main_with(monkeypatch, f"--evaluate={folder}", "--eval-episodes=3", "--no-capture-video")
        assert next(csv.DictReader(open(folder / "robustness.csv")))["episodes"] == "3"  # beats the saved value


def test_evaluation_in_bullet_stands_beside_ours(tmp_path, monkeypatch, short):
    """Worlds of Bullet replaced by our own; each is closed, as it has at most 1,024."""
    short(8)
    for name in ("DRONE_SWEEP", "show_episodes"):
        value = {"gaussian": (0.1,), "mass": (1.05,)} if name == "DRONE_SWEEP" else lambda *rest: None
        monkeypatch.setattr(script, name, value)
    opened, closed, asked = [], [], []

    def from_drones(env):
        opened.append(env)
        env._set(close=lambda: closed.append(env))
        return env

    monkeypatch.setattr(script.bullet, "from_drones", from_drones)
    monkeypatch.setattr(script.bullet, "require_pybullet", asked.append)
    assert main_with(monkeypatch, f"--runs-dir={tmp_path}", small=DRONES) is None
    folder = only(tmp_path)
    assert not opened and not (folder / "robustness_pybullet.csv").exists()
    ours = (folder / "robustness.csv").read_text()
    assert main_with(monkeypatch, f"--evaluate={folder}", "--backend=pybullet") is None
    assert (folder / "robustness.csv").read_text() == ours == (folder / "robustness_pybullet.csv").read_text()
    assert (folder / "robustness_pybullet.png").stat().st_size > 0
    assert len(opened) == len(closed) == 3 and asked == [2]


LONG = SPREAD | dict(num_envs=1, num_minibatches=1, total_timesteps=1500, checkpoint_interval=125, log_interval=700)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run of sixty iterations with checkpoints in between."""
    folder = tmp_path_factory.mktemp("whole")
    short_train(folder, "run", LONG)
    return folder / "run"


def flatten(value) -> list:
    if isinstance(value, dict | list | tuple):
        return [part for item in (value.values() if isinstance(value, dict) else value) for part in flatten(item)]
    return [value]


def assert_same_run(folder, reference):
    ours, theirs = (list(csv.DictReader(open(f / "metrics.csv"))) for f in (folder, reference))
    assert without_speed(ours) == without_speed(theirs) and len(ours) == 3
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, reference))
    for part in ("nets", "optimizer", "streams", "norm", "value_norm", "iteration"):
        a, b = flatten(ours[part]), flatten(theirs[part])
        same = (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))
        assert len(a) == len(b) and all(same), part


def without_report(monkeypatch):
    for name in ("agents_report", "show_episodes"):
        monkeypatch.setattr(script, name, lambda *rest: None)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, uninterrupted):
    process = start_script("ernie_mappo.py", *with_small([f"--runs-dir={tmp_path}"], LONG))
    until = time.time() + 120
    while not list(tmp_path.glob("*/checkpoint.previous.pt")) and process.poll() is None and time.time() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    folder = only(tmp_path)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 0 < saved["iteration"] < 60
    with open(folder / "metrics.csv", "a") as file:
        file.write("1,99")  # what a kill in the middle of a write leaves
    without_report(monkeypatch)
    assert main_with(monkeypatch, f"--resume={folder}") is None
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on(tmp_path, monkeypatch, capsys, uninterrupted, how):
    calls, real = [], script.play_episodes

    def play_episodes(*rest):
        calls.append(1)
        if len(calls) == 33:  # neither a row nor a checkpoint is due
            os.kill(os.getpid(), how)
        return real(*rest)

    monkeypatch.setattr(script, "play_episodes", play_episodes)
    without_report(monkeypatch)
    before = signal.signal(how, lambda *caught: None)  # a run that does not catch it shall not end the tests
    assert main_with(monkeypatch, f"--runs-dir={tmp_path}", small=LONG) == 130
    signal.signal(how, before)
    folder = only(tmp_path)
    assert f"--resume {folder}" in capsys.readouterr().err and len(calls) == 33
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] == 33
    assert main_with(monkeypatch, f"--resume={folder}") is None and len(calls) == 60
    assert_same_run(folder, uninterrupted)


def test_two_ranks_train_one_policy(tmp_path):
    small = SPREAD | dict(total_timesteps=200, checkpoint_interval=1000)
    flags = with_small([f"--runs-dir={tmp_path}", "--no-capture-video", "--no-cuda"], small)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    finish(subprocess.Popen([*launch, str(ROOT / "ernie_mappo.py"), *flags], stderr=subprocess.PIPE, text=True))
    folder = only(tmp_path)
    a, b = (torch.load(folder / n, weights_only=True) for n in ("checkpoint.pt", "checkpoint_rank1.pt"))
    assert a["iteration"] == b["iteration"] == 2
    for part in ("nets", "norm", "value_norm"):
        assert all(torch.equal(x, y) for x, y in zip(flatten(a[part]), flatten(b[part]), strict=True))
    differ = [not torch.equal(x, y) for x, y in zip(flatten(a["streams"]), flatten(b["streams"]), strict=True)]
    assert all(differ) and (folder / "robustness.csv").exists()


def test_moments_and_gradients_are_means_over_the_ranks(monkeypatch):
    """Two ranks played by one: all_reduce adds what the other would send, three times ours."""
    monkeypatch.setattr(script.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(script.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(script.dist, "all_reduce", lambda x: x.mul_(4))
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(script.mean_and_square(x)[0], 2 * x.double().mean(1, keepdim=True))
    net = script.MLP(torch.zeros(2, 6, requires_grad=True), [2, 2])
    loss = (0.01 * torch.ones(2, 6) * net.flat).sum()
    script.descend(loss, [net], torch.optim.SGD([net.flat], 1.0), max_grad_norm=10.0)
    torch.testing.assert_close(net.flat.detach(), torch.full((2, 6), -0.02))


ZOO = SPREAD | dict(env_id="zoo:mpe2.simple_spread_v3", total_timesteps=200, log_interval=100)


def test_a_pettingzoo_environment_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SWEEP", {"mad": (0.1,), "random_action": (0.2,), "damping": (2.0,)})
    assert main_with(monkeypatch, f"--runs-dir={tmp_path}", small=ZOO) is None
    folder = only(tmp_path)
    assert folder.name.startswith("zoo_mpe2.simple_spread_v3__ernie_mappo__1__")
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [row["global_step"] for row in rows] == ["100", "200"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    found = {row["perturbation"] for row in csv.DictReader(open(folder / "robustness.csv"))}
    assert found == {"clean", "mad", "random_action"}  # its physics are its own
    assert (folder / "videos" / "episode.gif").stat().st_size > 0


# ----------------------------------------------------------------------------------------------------------- bad input


BAD_VALUES = {
    **dict.fromkeys(["num_seeds", "num_threads", "num_agents", "total_timesteps", "num_envs", "hidden_size"], 0),
    **dict.fromkeys(["update_epochs", "num_minibatches", "reg_batch_size", "log_interval"], 0),
    **dict.fromkeys(["checkpoint_interval", "eval_episodes"], 0),
    **dict.fromkeys(["init_std", "learning_rate", "clip_coef", "reward_scale", "max_grad_norm"], 0.0),
    **dict.fromkeys(["attack_lr", "attack_init", "gaussian_std"], 0.0),
    **dict.fromkeys(["seed", "attack_steps"], -1),
    **dict.fromkeys(["entropy_coef", "gae_lambda"], -0.1),
    **{"gamma": 1.5, "value_decay": 1.0, "epsilon": math.nan, "reg_coef": math.inf},
    **{"divergence": "kl", "backend": "pybullet"},
}


def refused(monkeypatch, capsys, *flags, small=SPREAD) -> str:
    return refusal(script, monkeypatch, capsys, *with_small(flags, small))


@pytest.mark.parametrize("name,value", BAD_VALUES.items())
def test_bad_value_is_one_line_that_names_the_flag(monkeypatch, capsys, name, value):
    bad_value(script, monkeypatch, capsys, name, value, *with_small([]))


def test_every_number_has_a_bad_value():
    numbers = {name for name, v in Args().__dict__.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    assert numbers <= BAD_VALUES.keys()


def test_values_that_do_not_go_together(monkeypatch, capsys, tmp_path, uninterrupted):
    bad = partial(refused, monkeypatch, capsys)
    error = bad("--num-minibatches=3")  # 4 environments of 25 steps
    assert "--num-minibatches must divide the 100 steps of an iteration, got 3" in error
    error = bad("--no-continuous-actions", small=DRONES)
    assert "--continuous-actions must be left out with drones, got False" in error
    assert "--divergence must be one of auto, kl, l2, l2_probs" in bad(
        "--no-continuous-actions", "--divergence=kl_normal"
    )
    assert "--resume must be left out with --evaluate" in bad(f"--evaluate={tmp_path}", f"--resume={tmp_path}")
    error = bad("--env-id=traffic_grid_v0", small=SMALL)
    assert "--env-id must be of drones, particles or zoo:package.module, got 'traffic_grid_v0'" in error
    assert "leader_follower_v0" in bad("--env-id=leader_folower_v0", small=SMALL)
    assert "num_agents" in bad("--env-id=simple_tag_v3", "--num-agents=3", small=SMALL)
    assert "no module 'no.such' with a parallel_env" in bad("--env-id=zoo:no.such", small=SMALL)
    assert "--no-such-flag" in bad("--no-such-flag")
    assert "no checkpoint at" in bad(f"--resume={tmp_path}/nowhere")
    assert "torch but to evaluate drones" in bad("--backend=pybullet", small=DRONES)
    assert "torch but to evaluate drones" in bad(f"--evaluate={uninterrupted}", "--backend=pybullet")
    (tmp_path / "file").write_text("")
    assert "--runs-dir must be a writable folder" in bad(f"--runs-dir={tmp_path}/file")


def test_defaults_follow_the_task():
    assert [Args(env_id=e).eval_episodes for e in ("hover_v0", "simple_spread_v3")] == [200, 1000]
    assert [Args(env_id="simple_tag_v3", continuous_actions=c).divergence for c in (True, False)] == ["kl_normal", "kl"]
    assert [Args(attack_steps=k).attack_lr for k in (1, 5)] == [1.0, 0.5]


def test_broken_and_foreign_checkpoints(monkeypatch, capsys, tmp_path, uninterrupted):
    bad = partial(refused, monkeypatch, capsys)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    assert "--gamma is read from" in bad(f"--resume={tmp_path}", "--gamma=0.5")
    assert "--eval-episodes is read from" in bad(f"--resume={tmp_path}", "--eval-episodes=7")
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    error = bad(f"--resume={tmp_path}")
    assert "no readable checkpoint" in error and "checkpoint.previous.pt" in error
    monkeypatch.setattr(sys, "argv", ["ernie_mappo.py"])
    state = script.load_run(Args(resume=f"{tmp_path}/checkpoint.previous.pt"))[1]
    assert state["iteration"] > 0  # the one before still loads
    torch.save({"script": "ernie_maddpg"}, tmp_path / "checkpoint.pt")
    assert "was written by ernie_maddpg.py" in bad(f"--evaluate={tmp_path}")


def test_bullet_that_is_not_installed(monkeypatch, capsys, tmp_path, short):
    try:
        import pybullet  # noqa: F401
    except ImportError:
        short(8)
        short_train(tmp_path, "run", DRONES)
        error = refused(monkeypatch, capsys, f"--evaluate={tmp_path}/run", "--backend=pybullet")
        assert "pip install -r requirements-pybullet.txt" in error
    else:
        pytest.skip("Bullet is installed")


@pytest.mark.parametrize("name", ["losses/value_loss", "ernie/regularizer"])
def test_non_finite_loss_stops_with_the_step_and_the_last_checkpoint(monkeypatch, capsys, tmp_path, name):
    real, calls = script.ppo_loss, []

    def poisoned(*rest):
        loss, metrics = real(*rest)
        calls.append(1)
        return loss, metrics | {name: metrics[name] * (math.nan if len(calls) > 9 else 1)}

    monkeypatch.setattr(script, "ppo_loss", poisoned)
    error = refused(monkeypatch, capsys, f"--runs-dir={tmp_path}")
    last = only(tmp_path) / "checkpoint.pt"
    assert f"{name} is not finite at step 300" in error and str(last) in error and last.exists()
    assert torch.load(last, weights_only=True)["iteration"] == 2


# ------------------------------------------------------------------------------------------------------------ learning


LEARNS = dict(regularizer="none", log_interval=10**6, checkpoint_interval=10**6, track=False)


def test_learns_to_spread(tmp_path):
    """Random policies have -27, untrained greedy ones -30 or less; five seeds had -20.5 to -22.1 after these steps."""
    small = LEARNS | dict(env_id="simple_spread_v3", continuous_actions=False, num_envs=32, num_minibatches=4)
    *_, rows = short_train(tmp_path, "run", small, total_timesteps=30_000, eval_episodes=100)
    assert float(rows[-1]["eval/episodic_return"]) > -24.5


def test_the_leader_learns_to_climb(tmp_path):
    """In two iterations. Untrained it hovers at -37, near the ground; eight seeds had -11.3 to -16.3."""
    small = LEARNS | dict(env_id="leader_follower_v0", total_timesteps=30_000, eval_episodes=20)
    *_, rows = short_train(tmp_path, "run", small)
    assert float(rows[-1]["eval/leader_0"]) > -25
