"""ermas_economy.py: games, deviations and losses by hand, what the phases hand on, runs."""

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
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from commands import ROOT, alike, bad_value, finish, only, plain, refusal, without_speed
from PIL import Image
from torch.distributions import Categorical, kl_divergence

import ermas_economy as script
from envs import economy
from ermas_economy import MLP, Args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAKE = script.envs.make
SHORT = dict(horizon=20, period=5, start_coin=8.0)  # of the games here; with coin agents trade at once
SMALL = dict(num_envs=2, hidden_size=8, planner_hidden_size=8, num_minibatches=2, update_epochs=1, planner_epochs=1)
SMALL |= dict(num_seeds=2, trust_batch_size=16, cg_steps=3, eval_eta=(0.1, 0.3), eval_episodes=2, track=False)
SMALL |= dict(phase_one_timesteps=160, phase_two_timesteps=240, eval_timesteps=80)  # an iteration has 80
SMALL |= dict(log_interval=80, checkpoint_interval=160)
# what follows is written out so that tests with numbers of these do not depend on defaults
SMALL |= dict(seed=1, eta_train=0.23, labor_constant=300.0, tax_annealing=0.5, rate_step=0.25, activation="tanh")
SMALL |= dict(learning_rate=2e-3, planner_learning_rate=1e-3, gamma=0.99, gae_lambda=0.95, clip_coef=0.2, vf_coef=0.5)
SMALL |= dict(ent_coef=0.025, planner_ent_coef=0.1, planner_ent_coef_end=0.01, value_decay=0.9, max_grad_norm=0.5)
SMALL |= dict(epsilon=0.02, beta=0.4, lambda_init=1.0, lambda_lr=10.0, lambda_damping=100.0, lambda_max=20.0)
SMALL |= dict(clamp_regret=True, inner_steps=1, rho=0.05, meta_gradient="fomaml", cg_damping=1e-2, warmup=0.1)
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def short_games():
    torch.manual_seed(0)
    script.envs.make = partial(MAKE, **SHORT)
    yield
    script.envs.make = MAKE
    torch.set_default_device(None)


def again(streams):
    """Generators that will draw the same numbers."""
    return {k: [torch.Generator(g.device).set_state(g.get_state()) for g in v] for k, v in streams.items()}


def world(phase="two", fields=None, **options) -> SimpleNamespace:
    """All parts of a small problem in float64: policies that are not uniform, arbitrary moments of returns. What a test
    makes from then on is on DEVICE, too."""
    torch.set_default_dtype(torch.float64)
    args = Args(**(SMALL | options))
    script.setup(args)
    script.envs.make = partial(MAKE, dtype=torch.float64, **(SHORT | (fields or {})))
    R, normal = args.num_seeds, torch.Generator(DEVICE).manual_seed(0)
    env = script.build_economy(args, R, args.num_envs, phase, DEVICE)
    nets = script.make_economists(env, script.make_generators(args.seed, R, "init", DEVICE), args)
    for net in nets.values():
        net.flat.detach().add_(0.1 * torch.randn(net.flat.shape, generator=normal, device=DEVICE))
    memory = script.start_memory(env, R, args)
    for name, heads in (("agents_moments", 2), ("planner_moments", 1)):
        mean, std = (torch.rand(R, 1, heads, generator=normal, device=DEVICE) for _ in range(2))
        memory[name] = 0.6 * torch.stack([mean, mean**2 + (1 + std) ** 2, torch.ones_like(mean)])
    streams = {n: script.make_generators(args.seed, R, n, DEVICE) for n in ("games", "minibatches")}
    torch.set_default_device(DEVICE)

    def play(deviations=None, after=None, step=env.step):
        generators = again(streams)["games"]
        return script.play_economy(env, step, nets, after, generators, args, deviations)

    return SimpleNamespace(args=args, env=env, nets=nets, memory=memory, streams=streams, play=play, R=R)


def gae_by_hand(rewards, values, gamma, decay) -> list[float]:
    """Advantages of an episode, after which nothing comes."""
    advantages, last, following = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values)):
        last = reward + gamma * following - value + gamma * decay * last
        following = value
        advantages.append(last)
    return advantages[::-1]


def scale_of(moments, r, head):
    """Mean and standard deviation that undo the normalisation of values."""
    mean, square = (moments[:2, r, 0, head] / moments[2, r, 0, head]).tolist()
    return mean, math.sqrt(max(square - mean**2, 1e-4))


# --------------------------------------------------------------------------------------------------------------- games


def equality_by_hand(coin) -> float:
    n = len(coin)
    gini = sum(abs(a - b) for a in coin for b in coin) / (2 * n * sum(coin) + 1e-10)
    return 1 - gini * n / (n - 1)


@pytest.mark.parametrize("phase", ["one", "two"])
def test_rewards_are_changes_of_utility_and_welfare(phase):
    w = world(phase, dict(horizon=100, period=20, start_coin=0.0), num_envs=6)
    episodes, lone, last = w.play()
    assert not lone and episodes["obs"].shape[:4] == (2, 6, 100, 4)
    coin, labor, eta = episodes["coin"], episodes["labor"], w.args.eta_train
    assert torch.equal(coin.flatten(0, 1).T, w.env.endowment(last)) and coin.max() > 20
    welfare = [equality_by_hand(c) * sum(c) / 4 for c in coin.flatten(0, 1).tolist()]
    close(episodes["planner_rewards"].sum(2).flatten(), torch.tensor(welfare, device=DEVICE))
    before = last.worked.view(2, 6) - (episodes["rewards"][:, :, -1].sum(2) > 0).long()  # the last step
    weight = 1 - torch.exp(-before.unsqueeze(2) / 300.0) if phase == "one" else 1.0
    utility = (coin ** (1 - eta) - 1) / (1 - eta) - 0.21 * weight * labor
    close(episodes["rewards"].sum(2), utility + 1 / (1 - eta))


@pytest.mark.parametrize("phase", ["one", "two"])
def test_facts_of_episodes(phase):
    w = world(phase, dict(horizon=100, period=20, start_coin=0.0), num_envs=6, tax_annealing=0.0)
    episodes, _, last = w.play()
    facts = script.facts_of(episodes)
    houses = (last.tiles >= economy.HOUSE).sum(0).view(2, 6)
    assert torch.equal(facts["houses"].sum(2), houses) and houses.max() > 2
    trade = facts["income"] - facts["houses"] * facts["payment"]
    close(trade.sum(2), torch.zeros(2, 6), rtol=0, atol=1e-9)  # what one pays another gets
    assert trade.abs().max() > 1 and facts["rates"].shape == (2, 6, 5, 7)
    assert torch.equal(facts["payment"].sort(2).values, torch.tensor(economy.RANKED_PAYMENT).expand(2, 6, 4))
    if phase == "one":
        assert not facts["rates"].any()
        close(facts["coin"], facts["income"])
    else:  # taxes move coin from one to another
        assert (facts["coin"] - facts["income"]).abs().max() > 1 and facts["rates"].max() > 0.5
        close(facts["coin"].sum(2), facts["income"].sum(2))
        skill = script.by_skill(facts)
        assert abs(skill["trade"].sum()) < 1e-9 and abs(skill["taxes"].sum()) < 1e-9
        assert skill["building"] + skill["trade"] + skill["taxes"] == pytest.approx(
            facts["coin"].gather(2, facts["payment"].argsort(2)).mean((0, 1)).tolist()
        )


def test_description_by_hand():
    facts = {"coin": torch.tensor([[[1.0, 2, 3, 4], [0, 0, 0, 8]], [[5, 5, 5, 5], [6, 2, 2, 6]]])}
    facts |= {"labor": torch.arange(16.0).view(2, 2, 4), "houses": torch.arange(16).view(2, 2, 4) % 3}
    facts |= {"rates": torch.arange(24.0).view(2, 2, 3, 2)}
    found = script.describe(facts)
    for r in range(2):
        coins = facts["coin"][r].tolist()
        equal = [equality_by_hand(c) for c in coins]
        assert found["equality"][r].item() == pytest.approx(sum(equal) / 2)
        assert found["productivity"][r].item() == pytest.approx((sum(coins[0]) + sum(coins[1])) / 2)
        welfare = (equal[0] * sum(coins[0]) + equal[1] * sum(coins[1])) / 2
        assert found["welfare"][r].item() == pytest.approx(welfare)
    assert found["labor"].tolist() == [14, 46] and found["houses"].tolist() == [3.5, 4]
    assert found["tax_rate"].tolist() == [5.5, 17.5]


def test_masks():
    w = world()
    obs = torch.randn(2, 50, w.nets["agents"].sizes[0])
    valid = torch.rand(2, 50, w.nets["agents"].sizes[-1]) < 0.4
    valid[..., 0] = True
    probs = script.masked_logp(w.nets["agents"], obs, valid, w.args).exp()
    assert (probs[~valid] == 0).all() and (probs[valid] > 0).all()
    close(torch.where(valid, probs, 0).sum(2), torch.ones(2, 50))
    for r, m in itertools.product(range(2), range(3)):
        z = plain(w.nets["agents"], r, obs[r, m])
        close(probs[r, m], torch.where(valid[r, m], z, -math.inf).softmax(0))
    G, heads = w.nets["planner"].sizes[0], script.rate_heads(w.env)
    obs, valid = torch.randn(2, 50, G), (torch.rand(2, 50, *heads) < 0.4).index_fill_(3, torch.tensor([0]), True)
    probs = script.rate_logp(w.nets["planner"], obs, valid, w.args).exp()
    assert heads == (7, 5 + 1) and (probs[~valid] == 0).all()
    for r, m in itertools.product(range(2), range(3)):
        z = plain(w.nets["planner"], r, obs[r, m]).view(heads)
        close(probs[r, m], torch.where(valid[r, m], z, -math.inf).softmax(1))


def follows(probs, taken) -> bool:
    """Was each alternative taken as often as its probability says, up to five standard errors? [M, A], [M]"""
    error = (F.one_hot(taken, probs.shape[1]) - probs).sum(0)
    return bool((error.abs() <= 5 * (probs * (1 - probs)).sum(0).sqrt() + 1e-6).all())


def test_episodes_follow_the_policies():
    """Valid actions with the frequencies and log-probabilities of the networks, of agents at every step, of the planner
    at the start of a period."""
    w = world(num_envs=40, tax_annealing=0.0, fields=dict(horizon=23))  # the last period is cut off
    for net in ("agents", "planner"):
        w.nets[net].layers()[-1][1].detach()[1:] += torch.linspace(2, 0, w.nets[net].sizes[-1])[:, None]
    episodes, _, last = w.play()
    assert last.t.tolist() == [23] * 80 and last.completions.tolist() == [0] * 80
    obs, valid, actions = (episodes[name].flatten(1, 3) for name in ("obs", "valid", "actions"))
    assert valid.gather(2, actions.unsqueeze(2)).all() and not valid.all()
    logp = script.masked_logp(w.nets["agents"], obs, valid, w.args)
    close(episodes["logprobs"].flatten(1), logp.gather(2, actions.unsqueeze(2)).squeeze(2))
    assert all(follows(logp[r].exp(), actions[r]) for r in range(2))
    assert not follows(logp[0].exp(), actions[1])  # of the other run, whose policy is another
    assert episodes["planner_obs"].shape[:3] == (2, 40, 5)
    obs, valid, choices = (episodes[name].flatten(1, 2) for name in ("planner_obs", "planner_valid", "choices"))
    logp = script.rate_logp(w.nets["planner"], obs, valid, w.args)
    taken = logp.gather(3, choices.unsqueeze(3)).squeeze(3)
    close(episodes["choice_logprobs"].flatten(1), taken.sum(2))
    assert all(follows(logp[r].flatten(0, 1).exp(), choices[r].flatten()) for r in range(2))
    assert episodes["rates"].shape == (2, 40, 4, 7) and episodes["last_income"].shape == (2, 40, 4, 4)
    rates = torch.zeros(2, 40, 7)
    for d in range(4):
        choice = episodes["choices"][:, :, d]
        rates = torch.where(choice > 0, (choice - 1) * 0.25, rates)
        close(episodes["rates"][:, :, d], rates)


def test_the_highest_rates_rise_with_the_episodes_of_phase_two():
    """0.1 in the first one, 1 after half of them: of 20 here, of which an environment plays 10 in this time."""
    w = world(tax_annealing=0.5, phase_two_timesteps=20 * 2 * 20, num_seeds=2, num_envs=2)
    w.nets["planner"].flat.detach().zero_()
    w.nets["planner"].layers()[-1][1].detach()[:] = torch.arange(6.0).repeat(7)[:, None] * 99  # the highest allowed
    state = None
    for k in range(13):
        if k == 12:  # the test's agents live with the taxes as they are
            eta = torch.tensor([0.1, 0.5], device=DEVICE)
            env = script.build_economy(w.args, 2, 2, "two", DEVICE, eta)
            assert env.eta.tolist() == [0.1, 0.1, 0.5, 0.5] and (env.rate_limit(state) == 1).all()
            break
        episodes, _, state = w.play(after=state)
        limit = min(1.0, 0.1 + 0.09 * k)
        assert (state.completions == k).all()
        close(w.env.rate_limit(state), torch.full((4,), limit, dtype=torch.float64))
        allowed = [0.25 * c for c in range(5) if 0.25 * c <= w.env.rate_limit(state)[0].item()]
        close(episodes["rates"], torch.full((2, 2, 4, 7), max(allowed)))
    free = world(tax_annealing=0.0)
    assert free.env.tax_warmup is None


# ---------------------------------------------------------------------------------------------------------- deviations


def test_own_part():
    x = torch.arange(5 * 3 * 2 * 4 * 6).view(5, 3, 2, 4, 6)
    own = script.own_part(x)
    assert own.shape == (12, 2, 6)
    for r, i in itertools.product(range(3), range(4)):
        assert torch.equal(own[4 * r + i], x[i, r, :, i])


def test_each_slice_has_one_deviation():
    w = world()
    obs = torch.randn(5, 2, 3, 4, w.nets["agents"].sizes[0])
    valid = torch.rand(5, 2, 3, 4, w.nets["agents"].sizes[-1]) < 0.6
    valid[..., 0] = True
    deviations = MLP(w.nets["agents"].flat.detach().repeat_interleave(4, 0), w.nets["agents"].sizes)
    deviations.flat += 0.1 * torch.randn(deviations.flat.shape)
    found = script.sliced_logp(w.nets, deviations, obs, valid, w.args)
    for l, r, b, n in itertools.product(range(5), range(2), range(3), range(4)):
        net, row = (deviations, 4 * r + n) if l == n else (w.nets["agents"], r)
        z = torch.where(valid[l, r, b, n], plain(net, row, obs[l, r, b, n]), -1e9)
        close(found[l, r, b, n], z.log_softmax(0))


def test_without_a_difference_all_slices_play_the_same_games():
    w = world()
    copies = MLP(w.nets["agents"].flat.detach().repeat_interleave(4, 0), w.nets["agents"].sizes)
    (alone, _, end), (joint, lone, last) = w.play(), w.play(copies)
    for name in alone:
        close(joint[name], alone[name])
    for name in vars(end):
        close(getattr(last, name), getattr(end, name))
    assert lone.keys() == {"obs", "valid", "actions", "rewards"}
    for r, i in itertools.product(range(2), range(4)):
        for name in lone:
            close(lone[name][4 * r + i], joint[name][r, :, :, i])


def test_only_the_deviating_agent_follows_its_copy():
    """Agent 2 of run 1 does nothing, in its slice alone."""
    w, slices = world(), []

    def step(state, action, *rest):
        slices.append(action.view(5, 2, 2, 4))  # [L, R, B, N]
        return w.env.step(state, action, *rest)

    copies = MLP(w.nets["agents"].flat.detach().repeat_interleave(4, 0), w.nets["agents"].sizes)
    _, before, _ = w.play(copies)
    copies.layers()[-1][1][4 + 2, 0] = 1e5
    joint, lone, _ = w.play(copies, step=step)
    actions = torch.stack(slices)
    assert torch.equal(actions[:, 4].permute(1, 2, 0, 3), joint["actions"])
    others = [k for k in range(8) if k != 6]
    assert all(torch.equal(lone[name][others], before[name][others]) for name in lone)
    assert (lone["actions"][6] == 0).all() and (joint["actions"][1, :, :, 2] != 0).any()
    assert (actions[:, :4] == actions[:, 4:])[:, :, 0].all() and (actions[:, [0, 1, 3]] == actions[:, 4:]).all()
    assert (actions[:, 2, 1, :, 2] == 0).all()
    rest = [0, 1, 3]
    assert torch.equal(actions[0, 2, 1][:, rest], actions[0, 4, 1][:, rest])  # at first the others see no difference
    assert not torch.equal(actions[:, 2, 1][..., rest], actions[:, 4, 1][..., rest])


def test_deviations_leave_the_joint_policys_episodes_alone():
    w = world()
    copies = MLP(w.nets["agents"].flat.detach().repeat_interleave(4, 0), w.nets["agents"].sizes)
    copies.layers()[-1][1][:, 0] = 1e5  # all do nothing
    (alone, _, end), (joint, lone, last) = w.play(), w.play(copies)
    assert (lone["actions"] == 0).all() and alone["labor"].max() > 0
    for name in alone:
        close(joint[name], alone[name])
    for name in vars(end):
        close(getattr(last, name), getattr(end, name))


def own_of(joint):
    """The joint policy's samples of each agent, [R * N, B, T, ...]."""
    return {k: joint[k].movedim(3, 1).flatten(0, 1).contiguous() for k in ("obs", "valid", "actions", "rewards")}


def test_samples_of_deviations_by_hand():
    w = world()
    w.args.gae_lambda = 0.8
    joint, _, _ = w.play()
    batch = script.lone_samples(w.nets, own_of(joint), w.memory["agents_moments"], w.args)
    for r, i, b in itertools.product(range(2), range(4), range(2)):
        mean, std = scale_of(w.memory["agents_moments"], r, 0)
        values = [mean + std * plain(w.nets["agents_values"], r, x)[0].item() for x in joint["obs"][r, b, :, i]]
        expected = gae_by_hand(joint["rewards"][r, b, :, i].tolist(), values, 0.99, 0.8)
        found = batch["advantages"][4 * r + i].view(2, 20)[b]
        assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        for name in ("obs", "valid", "actions"):
            assert torch.equal(batch[name][4 * r + i].unflatten(0, (2, 20))[b], joint[name][r, b, :, i])


def by_hand(w, first, after, r: int, i: int):
    """(gradients along the path of agent i of run r, its gains, KL at the end)"""
    streams, sizes, shared, k = again(w.streams), w.nets["agents"].sizes, w.nets["agents"].flat.detach(), 4 * r + i
    anchor_flat = flat = shared[r : r + 1]
    batch, path, gains, state, kl = {name: v[k : k + 1] for name, v in first.items()}, [], [], after, None
    while True:
        leaf, rows = flat.clone().requires_grad_(), batch["actions"].shape[1]
        logp = script.masked_logp(MLP(leaf, sizes), batch["obs"], batch["valid"], w.args)
        terms = [batch["advantages"][0, m] * logp[0, m, batch["actions"][0, m]] for m in range(rows)]
        path.append(torch.autograd.grad(sum(terms) / rows, leaf)[0][0])
        if len(path) > w.args.inner_steps:
            return path, gains, kl
        places = [torch.randperm(rows, generator=g, device=DEVICE) for g in streams["minibatches"]][r][:16]
        chosen = {name: v[:, places] for name, v in batch.items()}

        def policy(f, chosen=chosen):
            return script.masked_logp(MLP(f, sizes), chosen["obs"], chosen["valid"], w.args)

        scores = torch.zeros(1, 16, sizes[-1], device=DEVICE)
        for m in range(16):
            scores[0, m, chosen["actions"][0, m]] = chosen["advantages"][0, m] / 16
        visits = torch.full((1, 16), 1 / 16, device=DEVICE)
        anchor = {"logp": policy(anchor_flat).detach(), "visits": visits}
        flat = script.trust_region_step(policy, flat, scores, visits, anchor, w.args.rho, w.args)
        kl = kl_divergence(*(Categorical(logits=policy(f)) for f in (anchor_flat, flat))).mean()
        copies = shared.repeat_interleave(4, 0)
        copies[k] = flat[0]
        joint, lone, state = script.play_economy(
            w.env, w.env.step, w.nets, state, streams["games"], w.args, MLP(copies, sizes)
        )
        gains.append(lone["rewards"][k].mean() - joint["rewards"][r, :, :, i].mean())
        batch = script.lone_samples(w.nets, lone, w.memory["agents_moments"], w.args)
        batch = {name: v[k : k + 1] for name, v in batch.items()}


def deviate(w, first, after, **options):
    streams, state = again(w.streams), [after]

    def play(deviations):
        games = script.play_economy(w.env, w.env.step, w.nets, state[0], streams["games"], w.args, deviations)
        state[0] = games[2]
        return games[:2]

    args = dataclasses.replace(w.args, **options)
    return script.deviate_in_economy(w.nets, first, play, w.memory["agents_moments"], streams, args)


def test_deviations_and_their_gradients_by_hand():
    w = world(inner_steps=2, rho=0.2, cg_steps=5, fields=dict(labor_coef=0.0))  # so that noise can outweigh gains
    joint, _, after = w.play()
    first = script.lone_samples(w.nets, own_of(joint), w.memory["agents_moments"], w.args)
    fomaml, clamped, kl, more = deviate(w, first, after)
    reptile, regrets, *_ = deviate(w, first, after, meta_gradient="reptile", clamp_regret=False)
    assert len(more) == 2 and fomaml.shape == reptile.shape == (2, 4, w.nets["agents"].flat.shape[1])
    assert (kl <= 0.2).all() and kl.max() > 0.05 and regrets.min() < 0 < regrets.max()
    assert torch.equal(clamped, regrets.clamp_min(0))
    for r, i in itertools.product(range(2), range(4)):
        (g1, g2, g3), gains, size = by_hand(w, first, after, r, i)
        close(fomaml[r, i], g3, rtol=1e-6, atol=1e-9)
        close(reptile[r, i], (g1 + g2) / 2, rtol=1e-6, atol=1e-9)
        close(regrets[r, i], max(gains), rtol=1e-6, atol=1e-9)
        close(kl[r, i], size, rtol=1e-6, atol=1e-9)
        assert not torch.allclose(g1, g3, rtol=0.01) and gains[0] != gains[1]


def test_deviations_of_a_single_seed():
    w = world(num_seeds=1)
    turn(w, adversarial=True, deviating=True)


# -------------------------------------------------------------------------------------------------- advantages, losses


@pytest.mark.parametrize("fresh", [False, True])
def test_advantages_and_returns_by_hand(fresh):
    w = world(gae_lambda=0.7, gamma=0.9, value_decay=0.8)
    moments = w.memory["agents_moments"]
    moments = torch.zeros_like(moments) if fresh else moments
    values, rewards = torch.randn(2, 3, 5, 4, 2), torch.randn(2, 3, 5, 4, 2)
    advantages, returns, new = script.estimate(values, rewards, moments, w.args)
    expected, raw = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for r, b, n, k in itertools.product(range(2), range(3), range(4), range(2)):
        mean, std = (0.0, 0.01) if fresh else scale_of(moments, r, k)
        value = [mean + std * v for v in values[r, b, :, n, k].tolist()]
        found = gae_by_hand(rewards[r, b, :, n, k].tolist(), value, 0.9, 0.7)
        expected[r, b, :, n, k] = torch.tensor(found)
        raw[r, b, :, n, k] = torch.tensor(found) + torch.tensor(value)
    close(advantages, expected, rtol=1e-5, atol=1e-5)
    for r, k in itertools.product(range(2), range(2)):
        own = raw[r, ..., k].flatten()
        newest = torch.stack([own.mean(), own.square().mean(), torch.tensor(1.0)])
        close(new[:, r, 0, k], 0.8 * moments[:, r, 0, k] + 0.2 * newest, rtol=1e-5, atol=1e-5)
        mean, std = scale_of(new, r, k)
        close(returns[r, ..., k], (raw[r, ..., k] - mean) / std, rtol=1e-5, atol=1e-5)


def test_standardized_advantages():
    torch.set_default_dtype(torch.float64)
    x = 3 + 5 * torch.randn(2, 40)
    found, scale = script.standardize(x)
    close(scale, x.std(1, correction=0, keepdim=True))
    close(found, (x - x.mean(1, keepdim=True)) / scale)


def test_samples_of_agents_by_hand():
    w = world()
    joint, _, _ = w.play()
    batch, new = script.agents_samples(w.nets, joint, w.memory["agents_moments"], w.args)
    both, returns = (batch[name].view(2, 2, 20, 4, 2) for name in ("both", "returns"))
    for r, b, n, k in itertools.product(range(2), range(2), range(4), range(2)):
        mean, std = scale_of(w.memory["agents_moments"], r, k)
        value = [mean + std * plain(w.nets["agents_values"], r, x)[k].item() for x in joint["obs"][r, b, :, n]]
        rewards = joint["planner_rewards"][r, b] if k else joint["rewards"][r, b, :, n]
        expected = gae_by_hand(rewards.tolist(), value, 0.99, 0.95)
        assert both[r, b, :, n, k].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        mean, std = scale_of(new, r, k)
        expected = (torch.tensor(expected) + torch.tensor(value) - mean) / std
        close(returns[r, b, :, n, k], expected, rtol=1e-5, atol=1e-5)
    for name in ("obs", "valid", "actions", "logprobs"):
        assert torch.equal(batch[name].unflatten(1, (2, 20, 4)), joint[name])


@pytest.mark.parametrize("horizon", [20, 18])
def test_samples_of_the_planner_by_hand(horizon):
    """A decision is paid the change of welfare until the next one, which is five steps away."""
    w = world(gamma=0.9, gae_lambda=0.7, fields=dict(horizon=horizon))
    joint, _, _ = w.play()
    batch, new = script.planner_samples(w.nets, joint, w.memory["planner_moments"], w.env, w.args)
    assert batch["returns"].shape == (2, 8, 1) and joint["planner_rewards"].abs().max() > 0.01
    for r in range(2):
        mean, std = scale_of(w.memory["planner_moments"], r, 0)
        advantages, returns = [], []
        for b in range(2):
            value = [mean + std * plain(w.nets["planner_values"], r, x).item() for x in joint["planner_obs"][r, b]]
            steps = joint["planner_rewards"][r, b].tolist()
            found = gae_by_hand([sum(steps[d : d + 5]) for d in (0, 5, 10, 15)], value, 0.9**5, 0.7)
            advantages += found
            returns += [a + v for a, v in zip(found, value)]
        advantages = torch.tensor(advantages)
        expected = (advantages - advantages.mean()) / advantages.std(correction=0)
        close(batch["advantages"][r], expected, rtol=1e-5, atol=1e-5)
        mean, std = scale_of(new, r, 0)
        close(batch["returns"][r, :, 0], (torch.tensor(returns) - mean) / std, rtol=1e-5, atol=1e-5)
    names = {"obs": "planner_obs", "valid": "planner_valid", "actions": "choices", "logprobs": "choice_logprobs"}
    assert all(torch.equal(batch[name].unflatten(1, (2, 4)), joint[other]) for name, other in names.items())


def clipped_by_hand(logprob, old, advantage, args):
    ratio = math.exp(logprob - old)
    return -min(ratio * advantage, min(max(ratio, 1 - args.clip_coef), 1 + args.clip_coef) * advantage)


def some_rows(batch, advantages):
    """The first samples, from a policy that was another, so that clipping acts."""
    M = advantages.shape[1]
    rows = {k: batch[k][:, :M] for k in ("obs", "valid", "actions", "logprobs", "returns")}
    other = 0.4 * torch.randn(2, M, device="cpu").to(DEVICE)  # on a GPU the same numbers
    return rows | {"logprobs": rows["logprobs"] + other, "advantages": advantages}


def test_losses_of_the_agents_by_hand():
    w = world(vf_coef=0.7)
    batch, _ = script.agents_samples(w.nets, w.play()[0], w.memory["agents_moments"], w.args)
    rows = some_rows(batch, torch.randn(2, 12))
    correction, total = torch.randn(w.nets["agents"].flat.shape), 0.0
    loss, metrics = script.agents_loss(w.nets, rows, correction, 0.3, w.args)
    for r in range(2):
        parts = []
        for m in range(12):
            z = torch.where(rows["valid"][r, m], plain(w.nets["agents"], r, rows["obs"][r, m]), -1e9)
            pi, old = Categorical(logits=z.detach()), rows["logprobs"][r, m].item()
            logprob = pi.log_prob(rows["actions"][r, m]).item()
            policy = clipped_by_hand(logprob, old, rows["advantages"][r, m].item(), w.args)
            value = plain(w.nets["agents_values"], r, rows["obs"][r, m]).detach() - rows["returns"][r, m]
            ratio = math.exp(logprob - old)
            kl, far = ratio - 1 - (logprob - old), float(abs(ratio - 1) > w.args.clip_coef)
            parts.append([policy, pi.entropy().item(), value.square().mean().item(), kl, far])
        mean = [sum(x) / 12 for x in zip(*parts)]
        for name, value in zip(("policy_loss", "entropy", "value_loss", "approx_kl", "clipfrac"), mean):
            assert metrics[name][r].item() == pytest.approx(value), name
        assert 0.1 < metrics["clipfrac"][r] < 0.9
        total += mean[0] - 0.3 * mean[1] + 0.7 * mean[2]
    assert loss.item() == pytest.approx(total + (correction * w.nets["agents"].flat).sum().item())
    plain_loss, _ = script.agents_loss(w.nets, rows, 0.0, 0.3, w.args)
    gradient, without = (torch.autograd.grad(x, w.nets["agents"].flat)[0] for x in (loss, plain_loss))
    close(gradient - without, correction)  # as it is, once


def test_losses_of_the_planner_by_hand():
    w = world(vf_coef=0.7, tax_annealing=0.0)
    batch, _ = script.planner_samples(w.nets, w.play()[0], w.memory["planner_moments"], w.env, w.args)
    rows = some_rows(batch, torch.randn(2, 8))
    loss, metrics = script.planner_loss(w.nets, rows, 0.3, w.args)
    total = 0.0
    for r in range(2):
        parts = []
        for m in range(8):
            z = plain(w.nets["planner"], r, rows["obs"][r, m]).detach().view(7, 6)
            pi = Categorical(logits=torch.where(rows["valid"][r, m], z, -1e9))
            logprob = pi.log_prob(rows["actions"][r, m]).sum().item()  # of all brackets at once
            policy = clipped_by_hand(logprob, rows["logprobs"][r, m].item(), rows["advantages"][r, m].item(), w.args)
            value = plain(w.nets["planner_values"], r, rows["obs"][r, m]) - rows["returns"][r, m]
            parts.append([policy, pi.entropy().sum().item(), value.square().item()])
        mean = [sum(x) / 8 for x in zip(*parts)]
        for name, value in zip(("policy_loss", "entropy", "value_loss"), mean):
            assert metrics[name][r].item() == pytest.approx(value), name
        total += mean[0] - 0.3 * mean[1] + 0.7 * mean[2]
    assert loss.item() == pytest.approx(total)


@pytest.mark.parametrize("minibatches", [2, 5])
def test_all_samples_are_used_once_in_an_epoch(minibatches):
    w, seen = world(num_minibatches=minibatches, max_grad_norm=0.5), []
    batch = {"advantages": torch.arange(20.0).view(2, 10), "obs": torch.arange(60.0).view(2, 10, 3)}
    net = MLP(torch.zeros(2, 4, requires_grad=True), [1, 2])
    slope = torch.tensor([[3.0, 4, 0, 0], [0.03, 0.04, 0, 0]])

    def loss_of(rows):
        assert torch.equal(rows["obs"][..., 0], 3 * rows["advantages"])  # entries of a sample stay together
        seen.append(rows["advantages"])
        return (slope * net.flat).sum(), {"kind": rows["advantages"].mean(1)}

    optimizer = torch.optim.SGD([net.flat], 1.0)
    found = script.improve([net], optimizer, loss_of, batch, 3, again(w.streams)["minibatches"], w.args)
    epochs = torch.cat(seen, 1).unflatten(1, (3, 10))
    assert len(seen) == 3 * minibatches and torch.equal(epochs.sort(2).values[:, 0], batch["advantages"])
    assert (epochs.sort(2).values == epochs.sort(2).values[:, :1]).all()
    assert not torch.equal(epochs[0, 0], epochs[0, 1]) and not torch.equal(epochs[0], epochs[1] - 10)
    close(found["kind"], batch["advantages"].mean(1))
    clipped = torch.stack([0.5 * slope[0] / 5, slope[1]])  # the gradient of each seed on its own
    close(net.flat.detach(), -3 * minibatches * clipped)


def test_losses_are_means_where_there_are_fewer_minibatches():
    """Ten samples give five chunks of two where six are asked for."""
    w = world(num_minibatches=6)
    batch, net = {"advantages": torch.zeros(2, 10)}, MLP(torch.zeros(2, 4, requires_grad=True), [1, 2])

    def loss_of(rows):
        return net.flat.sum(), {"kind": torch.ones(2)}

    optimizer = torch.optim.SGD([net.flat], 1.0)
    found = script.improve([net], optimizer, loss_of, batch, 1, again(w.streams)["minibatches"], w.args)
    close(found["kind"], torch.ones(2))


# ------------------------------------------------------------------------------------------------------------ iteration

SCHEDULE = dict(adversarial=False, deviating=False, plans=False, ent_coef=0.0, planner_ent_coef=0.0)
ONE_STEP = dict(num_minibatches=1, max_grad_norm=1e9, rho=0.5)  # of the optimiser, and nothing clipped


def turn(w, lambdas=None, **schedule):
    """(the directions in which the networks go, what is remembered, metrics) of an iteration from the same start"""
    memory, still = dict(w.memory), SimpleNamespace(step=lambda: None)
    memory |= {} if lambdas is None else {"lambdas": lambdas}
    for net in w.nets.values():
        net.flat.grad = torch.zeros_like(net.flat)
    found = script.iterate(
        w.env,
        w.env.step,
        w.nets,
        dict(agents=still, planner=still),
        memory,
        again(w.streams),
        SCHEDULE | schedule,
        w.args,
    )
    return {name: -net.flat.grad for name, net in w.nets.items()}, memory, found


@pytest.fixture
def watched(monkeypatch):
    """All games that were played, and what the deviations have found."""
    seen = SimpleNamespace(games=[], deviations=[])
    for name, part in (("play_economy", seen.games), ("deviate_in_economy", seen.deviations)):

        def spy(*rest, real=getattr(script, name), part=part):
            part.append(real(*rest))
            return part[-1]

        monkeypatch.setattr(script, name, spy)
    return seen


@pytest.mark.parametrize("kind", ["own reward", "warm-up", "ermas"])
def test_direction_of_the_agents(watched, kind):
    w = world(**ONE_STEP, beta=0.6, epsilon=0.05, lambda_damping=60.0, lambda_max=2.5, inner_steps=2)
    lambdas = torch.rand(2, 4, generator=torch.Generator().manual_seed(2), device="cpu").to(DEVICE) * 2
    found, memory, metrics = turn(w, lambdas, adversarial=kind != "own reward", deviating=kind == "ermas")
    assert len(watched.games) == 3 and len(watched.deviations) == (kind == "ermas")
    joint = {k: torch.cat([games[0][k] for games in watched.games], 1) for k in watched.games[0][0]}
    assert joint["rewards"].shape[:2] == (2, 6)
    assert memory["state"] is watched.games[-1][2] and (memory["state"].completions == 2).all()
    batch, moments = script.agents_samples(w.nets, joint, w.memory["agents_moments"], w.args)
    close(memory["agents_moments"], moments)
    weight, (gradients, regrets) = lambdas, (torch.zeros(2, 4, 1), torch.zeros(2, 4))
    if kind == "ermas":
        gradients, regrets, kl, _ = watched.deviations[0]
        weight = (lambdas + 60.0 * (regrets - 0.05)).clamp(0, 2.5)
        assert (weight == 2.5).any() and (weight < 2.5).any() and (metrics["ermas/deviation_kl"] == kl.amax(1)).all()
        expected = (lambdas + w.args.lambda_lr * (regrets - 0.05)).clamp(0, 2.5)  # Eq. (12)
        close(memory["lambdas"], expected)
        assert (memory["lambdas"] == 0).any() or (memory["lambdas"] == 2.5).any()
    else:
        assert torch.equal(memory["lambdas"], lambdas) and not metrics["ermas/deviation_kl"].any()
    close(metrics["ermas/lambda"], lambdas.mean(1))
    close(metrics["ermas/local_regret"], regrets.mean(1))
    for r in range(2):
        agent = torch.arange(480) % 4
        own, welfare = batch["both"][r].unbind(1)
        advantages = own if kind == "own reward" else weight[r, agent] * own - welfare
        scale = advantages.std(correction=0)
        leaf = w.nets["agents"].flat.detach()[r : r + 1].clone().requires_grad_()
        logp = script.masked_logp(MLP(leaf, w.nets["agents"].sizes), batch["obs"][[r]], batch["valid"][[r]], w.args)
        taken = logp[0, torch.arange(480), batch["actions"][r]]
        gain = ((advantages - advantages.mean()) / scale * taken).mean()
        expected = torch.autograd.grad(gain, leaf)[0][0]
        lone = sum(weight[r, i] * gradients[r, i] for i in range(4)) / 4
        close(found["agents"][r], expected - 0.6 * lone / scale, rtol=1e-4, atol=1e-6)
        assert kind != "ermas" or (0.6 * lone / scale).norm() > 0.01 * expected.norm()
    assert not found["planner"].any() and not metrics["losses/planner_entropy"].any()


@pytest.mark.parametrize("who", ["agents", "planner"])
def test_entropy_bonus_and_direction_of_the_planner(watched, who):
    w = world(**ONE_STEP, tax_annealing=0.0)
    name = {"agents": "ent_coef", "planner": "planner_ent_coef"}[who]
    (less, memory, metrics), (more, *_) = (turn(w, plans=True, **{name: coef}) for coef in (0.0, 2.0))
    joint = {k: torch.cat([games[0][k] for games in watched.games[:2]], 1) for k in watched.games[0][0]}
    other = {"agents": "planner", "planner": "agents"}[who]
    assert torch.equal(less[other], more[other])
    flat = w.nets[who].flat.detach().clone().requires_grad_()
    if who == "agents":
        logp = script.masked_logp(
            MLP(flat, w.nets[who].sizes), joint["obs"].flatten(1, 3), joint["valid"].flatten(1, 3), w.args
        )
        entropy = Categorical(logits=logp).entropy().mean(1)
    else:
        batch, moments = script.planner_samples(w.nets, joint, w.memory["planner_moments"], w.env, w.args)
        logp = script.rate_logp(MLP(flat, w.nets[who].sizes), batch["obs"], batch["valid"], w.args)
        entropy = Categorical(logits=logp).entropy().sum(2).mean(1)
        taken = logp.gather(3, batch["actions"].unsqueeze(3)).sum((2, 3))
        gain = (batch["advantages"] * taken).mean(1).sum()
        close(less[who], torch.autograd.grad(gain, flat, retain_graph=True)[0], rtol=1e-5, atol=1e-8)
        close(memory["planner_moments"], moments)
        close(metrics["losses/planner_entropy"], entropy.detach())
    close(more[who] - less[who], 2 * torch.autograd.grad(entropy.sum(), flat)[0], rtol=1e-5, atol=1e-8)


def test_reported_figures(watched):
    w = world()
    _, _, metrics = turn(w)
    assert list(metrics) == script.METRICS and all(v.shape == (2,) for v in metrics.values())
    rewards, coin = (torch.cat([games[0][k] for games in watched.games], 1) for k in ("rewards", "coin"))
    close(metrics["charts/episodic_return"], rewards.sum(2).mean((1, 2)))
    close(metrics["charts/productivity"], coin.sum(2).mean(1))


# --------------------------------------------------------------------------------------------------------------- phases


def prepare(**options):
    args = Args(**(SMALL | options))
    device = script.setup(args)
    env = script.build_economy(args, args.num_seeds, args.num_envs, "two", device)
    return (
        args,
        device,
        script.make_economists(env, script.make_generators(args.seed, args.num_seeds, "init", device), args),
    )


def short_train(tmp_path, name, warm=None, **options):
    """(networks, run folder, rows of metrics.csv) of a small run."""
    args, device, nets = prepare(**options)
    folder = tmp_path / name
    folder.mkdir()
    assert script.train(nets, args, device, folder, [], warm, None) is not None
    return nets, folder, rows_of(folder / "metrics.csv")


def rows_of(path: Path) -> list[dict]:
    return list(csv.DictReader(open(path)))


@pytest.fixture
def iterations(monkeypatch):
    """What each iteration begins with."""
    seen, real = [], script.iterate

    def spy(env, step, nets, optimizers, memory, streams, schedule, args):
        start = {name: net.flat.detach().clone() for name, net in nets.items()}
        lr = {who: optimizer.param_groups[0]["lr"] for who, optimizer in optimizers.items()}
        fresh = not any(optimizer.state for optimizer in optimizers.values())
        seen.append(SimpleNamespace(env=env, memory=dict(memory), nets=start, lr=lr, fresh=fresh, **schedule))
        return real(env, step, nets, optimizers, memory, streams, schedule, args)

    monkeypatch.setattr(script, "iterate", spy)
    return seen


def test_phases_and_warm_up(tmp_path, iterations):
    options = dict(phase_one_timesteps=161, phase_two_timesteps=320, warmup=0.5, labor_constant=50.0, eta_train=0.3)
    nets, folder, rows = short_train(tmp_path, "run", **options)
    one, two, planner = iterations[:3], iterations[3:], [x.nets["planner"] for x in iterations] + [nets["planner"].flat]
    assert len(two) == 4 and [row["global_step"] for row in rows[::2]] == [str(80 * k) for k in range(1, 8)]
    assert [row["charts/phase"] for row in rows] == ["1"] * 6 + ["2"] * 8
    for k, x in enumerate(one):
        assert x.env.tax == "free" and x.env.labor_constant == 50 and not x.adversarial and not x.plans
        assert x.memory["state"] is None if k == 0 else (x.memory["state"].completions == 2 * k - 1).all()
        assert x.lr == {"agents": 2e-3, "planner": 1e-3} and x.ent_coef == 0.025
    for k, x in enumerate(two):
        assert x.env.tax == "planner" and x.env.labor_constant == 0 and x.adversarial
        assert x.deviating == x.plans == (k >= 2)
        assert x.env.tax_warmup == pytest.approx(-4 / 9) and x.env.tax_slope == pytest.approx(0.9 / 4)
        assert x.lr == pytest.approx({"agents": 2e-3 * (1 - k / 4), "planner": 1e-3 * (1 - k / 4)})
        assert x.planner_ent_coef == pytest.approx(0.1 - 0.09 * k / 4) and x.ent_coef == 0.025
    for x in iterations:
        assert x.fresh == (x is one[0] or x is two[0]) and torch.allclose(x.env.eta.cpu(), torch.tensor(0.3))
    assert two[0].memory["state"] is None and not two[0].memory["planner_moments"].any()
    assert two[0].memory["agents_moments"][2, 0, 0, 0].item() == pytest.approx(1 - 0.9**3)  # they go on
    assert all((x.memory["lambdas"] == 1).all() for x in iterations[:6])
    assert not (iterations[6].memory["lambdas"] == 1).all()
    assert all(torch.equal(planner[0], p) for p in planner[:6]) and not torch.equal(planner[5], planner[6])
    assert not torch.equal(one[0].nets["agents"], one[1].nets["agents"])
    saved = torch.load(folder / "warm_agents.pt", weights_only=True)
    for name in ("agents", "agents_values"):
        assert torch.equal(saved["nets"][name].to(DEVICE), two[0].nets[name])


@pytest.mark.parametrize("method", ["marl", "saez", "us-federal", "free-market"])
def test_other_methods_agents_learn_for_themselves(tmp_path, iterations, method):
    nets, _, rows = short_train(tmp_path, "run", method=method, warmup=0.0, phase_two_timesteps=160)
    tax = {"marl": "planner", "saez": "saez", "us-federal": "us", "free-market": "free"}[method]
    assert [x.env.tax for x in iterations] == ["free"] * 2 + [tax] * 2
    assert not any(x.adversarial or x.deviating for x in iterations)
    rests = torch.equal(iterations[0].nets["planner"], nets["planner"].flat)
    assert rests == (method != "marl") == (not any(x.plans for x in iterations))
    assert not torch.equal(iterations[-1].nets["agents"], nets["agents"].flat)
    assert {row["ermas/lambda"] for row in rows} == {"1.0"} and {row["ermas/local_regret"] for row in rows} == {"0.0"}
    taxed = {row["charts/tax_rate"] != "0.0" for row in rows if row["charts/phase"] == "2"}
    assert taxed == {method != "free-market"}


def test_taxes_for_all_in_the_test(monkeypatch, tmp_path, iterations):
    """New agents of each risk aversion, phase one without taxes, then under the planner, who keeps its policy."""
    args, device, nets = prepare(eval_episodes=3, phase_one_timesteps=160, eval_timesteps=160, tax_annealing=0.5)
    start = nets["planner"].flat.detach().clone()
    facts = script.run_tests(nets["planner"], None, args, device, tmp_path)
    assert facts["coin"].shape == (2, 2, 3, 4) and facts["rates"].shape == (2, 2, 3, 4, 7)
    assert [x.env.tax for x in iterations] == ["free"] * 2 + ["planner"] * 2
    for x in iterations:
        close(x.env.eta.cpu(), torch.tensor([0.1] * 4 + [0.3] * 4))
        assert torch.equal(x.nets["planner"], start.repeat(2, 1)) and x.env.tax_warmup is None
        assert not (x.plans or x.adversarial or x.deviating)
    assert torch.equal(nets["planner"].flat, start)
    assert iterations[2].fresh and iterations[2].memory["state"] is None
    assert torch.equal(
        iterations[0].nets["agents"][:2], iterations[0].nets["agents"][2:]
    )  # of a seed the same at first
    assert not torch.equal(iterations[1].nets["agents"][:2], iterations[1].nets["agents"][2:])
    assert not torch.equal(iterations[0].nets["agents"][:2], nets["agents"].flat)  # but not those of training
    saved = torch.load(tmp_path / "test_agents.pt", weights_only=True)
    assert torch.equal(saved["nets"]["agents"].to(DEVICE), iterations[2].nets["agents"])
    # other taxes: another second phase after the same first one
    nets["planner"].flat.detach().add_(torch.randn(nets["planner"].flat.shape, device=device))
    os.rename(tmp_path / "test_agents.pt", tmp_path / "before.pt")
    other = script.run_tests(nets["planner"], None, args, device, tmp_path)
    both = [torch.load(tmp_path / name, weights_only=True) for name in ("before.pt", "test_agents.pt")]
    assert same(*both) and not torch.equal(other["coin"], facts["coin"])
    iterations.clear()
    skipped = script.run_tests(nets["planner"], both[0], args, device, tmp_path)
    assert [x.env.tax for x in iterations] == ["planner"] * 2
    assert torch.equal(iterations[0].nets["agents"], both[0]["nets"]["agents"].to(DEVICE))
    assert torch.equal(iterations[0].memory["agents_moments"], both[0]["agents_moments"].to(DEVICE))
    assert skipped["coin"].shape == other["coin"].shape
    one_eta = dataclasses.replace(args, eval_eta=(0.3,))
    alone = script.run_tests(nets["planner"], None, one_eta, device, tmp_path)
    if DEVICE.type == "cpu":  # elsewhere rounding depends on the number of runs, and chance on rounding
        assert all(torch.equal(alone[name][0], other[name][1]) for name in alone)


def same(a, b) -> bool:
    """Are two nested things the same to the last bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_compiled_only_where_asked(monkeypatch):
    args, device, _ = prepare()
    env = script.build_economy(args, 2, 2, "one", device)
    monkeypatch.setattr(torch, "compile", lambda f, **options: (f, options))
    assert script.step_of(env, args) == env.step
    assert script.step_of(env, dataclasses.replace(args, compile=True)) == (
        env.step,
        {"fullgraph": True, "dynamic": False, "options": {"comprehensive_padding": False}},
    )


# ----------------------------------------------------------------------------------------------------------------- runs

OPTIONS = [
    dict(meta_gradient="reptile", inner_steps=2, activation="relu", phase_two_timesteps=300),
    dict(clamp_regret=False, lambda_damping=0.0, activation="silu", tax_annealing=0.0, num_minibatches=3),
    dict(env_id="economy_v0", method="marl", labor_constant=0.0, num_seeds=1),
    dict(warmup=1.0, ent_coef=0.0, vf_coef=0.0, beta=0.0, lambda_init=0.0),
    dict(warmup=0.0, torch_deterministic=False, hidden_size=5, update_epochs=2, planner_epochs=3),
    dict(method="saez", num_seeds=1, value_decay=0.0, gamma=1.0, gae_lambda=1.0),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_trains(tmp_path, iterations, options):
    nets, _, rows = short_train(tmp_path, "run", **options)
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert rows[-1]["charts/phase"] == "2"
    moves = {name: (net.flat - iterations[0].nets[name]).abs().amax(1).min() > 1e-4 for name, net in nets.items()}
    plans = options.get("method", "ermas") in ("ermas", "marl") and options.get("warmup") != 1
    assert moves["agents"] and moves["planner"] == plans


def test_steps_are_counted(tmp_path, watched):
    """global_step against the episodes of the joint policy that were played."""
    _, _, rows = short_train(tmp_path, "run", inner_steps=2)
    played = sum(games[0]["rewards"].shape[1] * 20 for games in watched.games)
    assert int(rows[-1]["global_step"]) == played


@pytest.mark.parametrize("method, alone", [("marl", 1), ("ermas", 2), ("ermas", 1)])
def test_a_seed_does_not_depend_on_the_others(tmp_path, method, alone):
    together, folder, rows = short_train(tmp_path, "together", seed=5, num_seeds=3, method=method)
    own, other, few = short_train(tmp_path, "alone", seed=6, num_seeds=alone, method=method)
    mine = [str(6 + k) for k in range(alone)]
    assert alike(without_speed(few), without_speed([row for row in rows if row["seed"] in mine]))
    for name in own:
        assert alike(own[name].flat, together[name].flat[1 : 1 + alone])
    assert not torch.equal(together["agents"].flat[0], together["agents"].flat[1])


LONG = dict(phase_one_timesteps=480, phase_two_timesteps=800, log_interval=200, checkpoint_interval=80)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    script.envs.make = partial(MAKE, **SHORT)
    return short_train(tmp_path_factory.mktemp("whole"), "run", **LONG)[1]


def flags_of(**options) -> list[str]:
    """Command line of SMALL and `options`."""
    flags = []
    for name, value in (SMALL | options).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def main_here(monkeypatch, *flags):
    """The whole script in this process; None, or the exit code."""
    monkeypatch.setattr(sys, "argv", ["ermas_economy.py", *map(str, flags)])
    try:
        return script.main()
    except SystemExit as stop:
        return stop.code


def without_report(monkeypatch):
    for name in ("play_last", "welfare_report"):
        monkeypatch.setattr(script, name, lambda *rest: None)


def assert_same_run(folder, reference):
    ours, theirs = (rows_of(f / "metrics.csv") for f in (folder, reference))
    assert without_speed(ours) == without_speed(theirs) and len(ours) == 2 * (3 + 4)
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, reference))
    for part in ("nets", "optimizers", "streams", "memory", "phase", "step", "before"):
        assert same(ours[part], theirs[part]), part
    agents = (torch.load(f / "warm_agents.pt", weights_only=True) for f in (folder, reference))
    assert same(*agents)


SHORT_GAMES = f"""
import sys
from functools import partial
sys.path.insert(0, {str(ROOT)!r})
import envs
envs.make = partial(envs.make, **{SHORT!r})
import ermas_economy
ermas_economy.main()
"""


@pytest.mark.parametrize("phase", ["one", "two"])
def test_killed_and_resumed_equals_uninterrupted(monkeypatch, tmp_path, uninterrupted, phase):
    command = [sys.executable, "-c", SHORT_GAMES, f"--runs-dir={tmp_path}", *flags_of(**LONG)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until, sign = time.time() + 120, {"one": "*/checkpoint.pt", "two": "*/warm_agents.pt"}[phase]
    while not list(tmp_path.glob(sign)) and process.poll() is None and time.time() < until:
        time.sleep(0.005)
    while phase == "two" and rows_of(only(tmp_path) / "metrics.csv")[-1]["charts/phase"] == "1":
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    folder = only(tmp_path)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["phase"] == phase and state["step"] < LONG[f"phase_{phase}_timesteps"]
    with open(folder / "metrics.csv", "a") as file:
        file.write("1,99")  # what a kill in the middle of a write leaves
    without_report(monkeypatch)
    assert main_here(monkeypatch, "--resume", folder) is None
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("how, at", [(signal.SIGINT, 4), (signal.SIGTERM, 9)])
def test_a_stopped_run_goes_on(monkeypatch, capsys, tmp_path, uninterrupted, iterations, how, at):
    real = script.play_economy

    def play_economy(*rest):
        if len(iterations) == at and not stopped:  # neither a row nor a checkpoint is due
            stopped.append(os.kill(os.getpid(), how))
        return real(*rest)

    stopped = []
    monkeypatch.setattr(script, "play_economy", play_economy)
    without_report(monkeypatch)
    before = signal.signal(how, lambda *caught: None)  # a run that does not catch it shall not end the tests
    flags = flags_of(**(LONG | dict(checkpoint_interval=10**6)))
    code = main_here(monkeypatch, f"--runs-dir={tmp_path}", *flags)
    signal.signal(how, before)
    folder = only(tmp_path)
    assert code == 130 and f"--resume {folder}" in capsys.readouterr().err
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["phase"], state["step"]) == (("one", 320) if at == 4 else ("two", 240)) and len(iterations) == at
    assert main_here(monkeypatch, f"--resume={folder}") is None and len(iterations) == 16
    assert_same_run(folder, uninterrupted)


def test_two_ranks_train_one_policy(tmp_path):
    options = dict(phase_one_timesteps=800, phase_two_timesteps=800, warmup=0.0, checkpoint_interval=10**6)
    options |= dict(eval_timesteps=1, eval_eta=(0.23,), num_seeds=1, cuda=False)  # episodes have 100 steps here
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launch, str(ROOT / "ermas_economy.py"), f"--runs-dir={tmp_path}", *flags_of(**options)]
    finish(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    folder = only(tmp_path)
    a, b = (torch.load(folder / n, weights_only=True) for n in ("checkpoint.pt", "checkpoint_rank1.pt"))
    assert a["phase"] == b["phase"] == "two" and a["step"] == b["step"] == 800
    for part in ("nets", "optimizers"):
        assert same(a[part], b[part]), part
    for name in ("agents_moments", "planner_moments", "lambdas"):
        assert same(a["memory"][name], b["memory"][name]), name
    assert (a["memory"]["lambdas"] != 1).any() and not same(a["memory"]["state"], b["memory"]["state"])
    assert not any(itertools.starmap(torch.equal, zip(a["streams"]["games"], b["streams"]["games"])))
    assert (folder / "welfare.csv").exists()


def test_means_over_the_ranks(monkeypatch):
    """Two ranks played by one: all_reduce adds what the other would send, three times ours."""
    monkeypatch.setattr(script.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(script.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(script.dist, "all_reduce", lambda x: x.mul_(4))
    close(script.average_ranks(torch.arange(3.0), torch.ones(2))[0], 2 * torch.arange(3.0))
    x = torch.randn(2, 5, 3)
    close(script.mean_and_square(x)[0], 2 * x.double().mean(1, keepdim=True))
    net = MLP(torch.zeros(2, 6, requires_grad=True), [2, 2])
    script.descend((0.01 * net.flat).sum(), [net], torch.optim.SGD([net.flat], 1.0), max_grad_norm=10.0)
    close(net.flat.detach(), torch.full((2, 6), -0.02))


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> SimpleNamespace:
    """A run with all that it prints, logs and leaves."""
    logged, folder, patch = [[], []], tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    runs = [SimpleNamespace(log=lambda row, step=0, k=k: logged[k].append(row), finish=lambda: None) for k in range(2)]
    table = SimpleNamespace(Table=lambda columns, data: data, Image=str)
    patch.setitem(sys.modules, "wandb", table)
    patch.setattr(script, "start_wandb", lambda *rest: runs)
    patch.setattr(script.envs, "make", partial(MAKE, **SHORT))
    assert main_here(patch, f"--runs-dir={folder}", *flags_of(capture_video=True)) is None
    patch.undo()
    return SimpleNamespace(folder=only(folder), logged=logged)


def test_a_whole_run_leaves_what_it_promises(whole):
    folder, given = whole.folder, Args(**SMALL)
    about = json.loads((folder / "args.json").read_text())
    assert about["versions"]["torch"] == version("torch") and about["eval_eta"] == [0.1, 0.3]
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "warm_agents.pt", "test_agents.pt"):
        torch.load(folder / name, weights_only=True)
    with Image.open(folder / "report.png") as picture, Image.open(folder / "videos" / "episode.gif") as film:
        assert picture.format == "PNG" and picture.size == (1700, 380)
        assert film.format == "GIF" and 10 < film.n_frames <= 20  # equal ones are one
    rows = rows_of(folder / "metrics.csv")
    steps = [str(80 * k) for k in range(1, 6)]
    assert [(row["global_step"], row["seed"]) for row in rows] == list(itertools.product(steps, "12"))
    assert list(rows[0]) == ["seed", "global_step", *script.METRICS, "charts/phase", "charts/SPS"]
    tests = rows_of(folder / "welfare.csv")
    assert [(row["seed"], row["eta"]) for row in tests] == list(itertools.product("12", ("0.1", "0.3")))
    for row in tests:
        assert (row["env_id"], row["method"], row["epsilon"]) == (given.env_id, "ermas", "0.02")
        assert 0 < float(row["equality"]) <= 1 and 0 < float(row["welfare"]) < float(row["productivity"])
    for k, of_run in enumerate(whole.logged):
        assert len(of_run) == 6 and of_run[0]["charts/welfare"] == float(rows[k]["charts/welfare"])
        assert [row[3:5] for row in of_run[-1]["welfare"]] == [[1 + k, 0.1], [1 + k, 0.3]]


def test_welfare_csv_has_the_means_of_the_test(monkeypatch, tmp_path):
    args, device, nets = prepare()
    facts = {"coin": torch.rand(2, 2, 6, 4), "labor": torch.rand(2, 2, 6, 4), "houses": torch.ones(2, 2, 6, 4)}
    facts |= {"payment": torch.rand(2, 2, 6, 4), "income": torch.rand(2, 2, 6, 4), "rates": torch.rand(2, 2, 6, 4, 7)}
    monkeypatch.setattr(script, "run_tests", lambda *rest: facts)
    training = {name: value[0] for name, value in facts.items()}
    script.welfare_report(nets, training, None, args, device, tmp_path, [])
    for row in rows_of(tmp_path / "welfare.csv"):
        q, s = ("0.1", "0.3").index(row["eta"]), int(row["seed"]) - 1
        assert float(row["productivity"]) == pytest.approx(facts["coin"][q, s].sum(1).mean().item(), rel=1e-5)
        assert float(row["labor"]) == pytest.approx(facts["labor"][q, s].sum(1).mean().item(), rel=1e-5)
    assert script.interval(torch.tensor([[1.0], [3.0]]).numpy())[0] == pytest.approx(12.706, abs=1e-3)  # t(1) times 1


def test_evaluate(monkeypatch, capsys, whole, iterations):
    """The same planners, the same agents, the same games; flags of the test beat the saved ones, others are refused."""
    folder, before = whole.folder, (whole.folder / "welfare.csv").read_text()
    size = (folder / "metrics.csv").stat().st_size
    assert main_here(monkeypatch, f"--evaluate={folder}", "--no-capture-video") is None
    assert (folder / "welfare.csv").read_text() == before and len(iterations) == 3
    assert main_here(monkeypatch, f"--evaluate={folder}", f"--eval-agents={folder}/test_agents.pt") is None
    assert (folder / "welfare.csv").read_text() != before  # other numbers in the second phase
    assert [x.env.tax for x in iterations[3:]] == ["planner"]
    iterations.clear()
    flags = ["--eval-eta", "0.3", "0.5", "--eval-episodes=3", "--eval-timesteps=160"]
    assert main_here(monkeypatch, f"--evaluate={folder}", *flags) is None
    assert [row["eta"] for row in rows_of(folder / "welfare.csv")] == ["0.3", "0.5"] * 2 and len(iterations) == 4
    assert (folder / "metrics.csv").stat().st_size == size
    capsys.readouterr()
    for flag, value in (("beta", 0.1), ("eta-train", 0.3), ("num-envs", 4), ("phase-two-timesteps", 7)):
        error = refusal(script, monkeypatch, capsys, f"--evaluate={folder}", f"--{flag}={value}")
        assert f"--{flag} is read from" in error
    assert "--eval-eta is read from" in refusal(script, monkeypatch, capsys, f"--resume={folder}", "--eval-eta=0.1")
    (folder / "welfare.csv").write_text(before)


def test_agents_of_another_run(monkeypatch, capsys, tmp_path, whole, iterations):
    """--warm-start takes the place of phase one, --eval-agents that of the test's; both must fit."""
    path = whole.folder / "test_agents.pt"
    assert main_here(monkeypatch, f"--evaluate={whole.folder}") is None  # writes test_agents.pt for these flags
    iterations.clear()
    flags = flags_of(method="marl", warm_start=whole.folder, eval_agents=path, planner_hidden_size=5)
    assert main_here(monkeypatch, f"--runs-dir={tmp_path}", *flags) is None
    assert [x.env.tax for x in iterations] == ["planner"] * 4 and iterations[0].memory["state"] is None
    for saved, start in ((whole.folder / "warm_agents.pt", iterations[0]), (path, iterations[3])):
        saved = torch.load(saved, weights_only=True)
        for name in ("agents", "agents_values"):
            assert torch.equal(saved["nets"][name].to(DEVICE), start.nets[name])
        assert torch.equal(saved["agents_moments"].to(DEVICE), start.memory["agents_moments"])
    rows = rows_of(only(tmp_path) / "metrics.csv")
    assert [row["global_step"] for row in rows[::2]] == ["80", "160", "240"]
    assert {row["charts/phase"] for row in rows} == {"2"}
    capsys.readouterr()
    bad = partial(refusal, script, monkeypatch, capsys, f"--runs-dir={tmp_path}/more")
    for flag, file in (("--warm-start", "warm_agents.pt"), ("--eval-agents", "test_agents.pt")):
        taken = {flag.removeprefix("--").replace("-", "_"): whole.folder / (file if flag == "--eval-agents" else "")}
        changes = dict(seed=2, hidden_size=16, num_seeds=1, activation="relu", env_id="economy_v0")
        own = dict(eta_train=0.3) if flag == "--warm-start" else dict(eval_eta=(0.3, 0.1), phase_one_timesteps=99)
        for name, value in (changes | own).items():
            error = bad(*flags_of(**(taken | {name: value})))
            assert f"error: {flag}: " in error and file in error, name
            assert name.removeprefix("phase_one_") in error
    missing = bad(*flags_of(warm_start=tmp_path))
    assert f"--warm-start: no file {tmp_path}/warm_agents.pt" in missing
    (tmp_path / "broken.pt").write_bytes(path.read_bytes()[:999])
    assert "--eval-agents: " in bad(*flags_of(eval_agents=tmp_path / "broken.pt"))
    assert "is no readable file of agents" in bad(*flags_of(eval_agents=tmp_path / "broken.pt"))
    torch.save({"script": "ernie_maddpg"}, tmp_path / "other.pt")
    assert "was written by ernie_maddpg.py" in bad(*flags_of(eval_agents=tmp_path / "other.pt"))
    assert "num_seeds" in bad(*flags_of(eval_agents=whole.folder / "warm_agents.pt", num_seeds=3))
    assert "eval_eta" in bad(*flags_of(eval_agents=whole.folder / "warm_agents.pt"))
    assert not (tmp_path / "more").exists()


def test_a_checkpoint_is_no_file_of_agents(monkeypatch, capsys, whole):
    flags = flags_of(eval_agents=whole.folder / "checkpoint.pt")
    assert "--eval-agents" in refusal(script, monkeypatch, capsys, *flags)


def test_the_papers_sizes(monkeypatch, tmp_path):
    """--preset paper sets PAPER's values; explicit flags win."""
    seen = []
    monkeypatch.setattr(script, "setup", lambda args: seen.append(args) or sys.exit(7))
    for flags in ([], ["--preset=paper"], ["--preset=paper", "--num-envs=3", "--gamma=0.5"]):
        assert main_here(monkeypatch, f"--runs-dir={tmp_path}", *flags) == 7
    default, paper, own = (dataclasses.asdict(args) for args in seen)
    assert default == dataclasses.asdict(Args()) | {"runs_dir": str(tmp_path)}
    assert paper == default | script.PAPER and own == paper | {"num_envs": 3, "gamma": 0.5}
    assert paper["env_id"] == "economy_v0"


# ----------------------------------------------------------------------------------------------------------- bad input

BAD_VALUES = {
    **dict.fromkeys(["num_seeds", "num_threads", "phase_one_timesteps", "phase_two_timesteps", "num_envs"], 0),
    **dict.fromkeys(["hidden_size", "num_minibatches", "planner_hidden_size", "update_epochs", "planner_epochs"], 0),
    **dict.fromkeys(["inner_steps", "trust_batch_size", "cg_steps", "log_interval", "checkpoint_interval"], 0),
    **dict.fromkeys(["eval_timesteps", "eval_episodes"], 0),
    **dict.fromkeys(["learning_rate", "planner_learning_rate", "clip_coef", "max_grad_norm", "rho"], 0.0),
    **dict.fromkeys(["ent_coef", "planner_ent_coef", "planner_ent_coef_end", "vf_coef", "epsilon"], -0.1),
    **dict.fromkeys(["lambda_lr", "lambda_damping", "cg_damping", "gae_lambda", "lambda_init"], -0.1),
    **dict.fromkeys(["gamma", "tax_annealing", "warmup"], 1.5),
    **{
        "seed": -1,
        "beta": math.nan,
        "labor_constant": math.inf,
        "value_decay": 1.0,
        "lambda_max": 0.0,
        "rate_step": 0.0,
    },
    **{"eta_train": 1.0, "eval_eta": 1.5},
}


@pytest.mark.parametrize("name, value", BAD_VALUES.items())
def test_bad_value_is_one_line_that_names_the_flag(monkeypatch, capsys, name, value):
    bad_value(script, monkeypatch, capsys, name, value)


def test_every_number_has_a_bad_value():
    values = {name: value[0] if isinstance(value, tuple) else value for name, value in Args().__dict__.items()}
    numbers = {name for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    assert numbers == BAD_VALUES.keys()


def test_unknown_names_and_combinations(monkeypatch, capsys, tmp_path):
    bad = partial(refusal, script, monkeypatch, capsys)
    assert "economy_tiny_v0" in bad("--env-id=economy_tiny_v1") and "--no-such-flag" in bad("--no-such-flag")
    assert "--method" in bad("--method=maddpg") and "--preset" in bad("--preset=small")
    assert "--meta-gradient" in bad("--meta-gradient=exact") and "--activation" in bad("--activation=gelu")
    assert "--eval-eta must be values that differ" in bad("--eval-eta", 0.1, 0.1)
    assert "--eval-eta must be one value or more" in bad("--eval-eta") and "nan" in bad("--eval-eta", 0.1, "nan")
    assert "--lambda-init must be between 0 and --lambda-max" in bad("--lambda-init=3", "--lambda-max=2")
    assert "--resume must be left out with --evaluate" in bad("--resume=a", "--evaluate=b")
    assert "no checkpoint at" in bad(f"--resume={tmp_path}/nowhere")
    (tmp_path / "file").write_text("")
    assert "--runs-dir must be a writable folder" in bad(f"--runs-dir={tmp_path}/file")


def test_broken_and_foreign_checkpoints(monkeypatch, capsys, tmp_path, uninterrupted):
    bad = partial(refusal, script, monkeypatch, capsys)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    assert "--beta is read from" in bad(f"--resume={tmp_path}", "--beta=0.1")
    data = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    error = bad(f"--resume={tmp_path}")
    assert "no readable checkpoint" in error and "checkpoint.previous.pt" in error
    monkeypatch.setattr(sys, "argv", ["ermas_economy.py"])
    state = script.load_run(Args(resume=f"{tmp_path}/checkpoint.previous.pt"))[1]
    assert state["phase"] == "two" and 0 < state["step"] < 800  # the one before still loads
    (tmp_path / "checkpoint.pt").unlink()
    assert script.load_run(Args(resume=str(tmp_path)))[1]["step"] == state["step"]  # as after a kill between renames
    torch.save({"weights": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    assert "no readable checkpoint" in bad(f"--evaluate={tmp_path}")
    torch.save({"script": "ernie_maddpg"}, tmp_path / "checkpoint.pt")
    assert "was written by ernie_maddpg.py" in bad(f"--resume={tmp_path}")
    torch.save(state | {"phase": "one"}, tmp_path / "checkpoint.pt")
    assert "has no taxes yet; go on with --resume" in bad(f"--evaluate={tmp_path}")


@pytest.mark.parametrize("name", ["losses/value_loss", "ermas/local_regret"])
def test_what_is_not_finite_stops_with_the_step_and_the_last_checkpoint(monkeypatch, capsys, tmp_path, name):
    real, calls = script.iterate, []

    def poisoned(*rest):
        metrics = real(*rest)
        calls.append(1)
        return metrics | {name: metrics[name] * (math.nan if len(calls) > 4 else 1)}

    monkeypatch.setattr(script, "iterate", poisoned)
    error = refusal(script, monkeypatch, capsys, f"--runs-dir={tmp_path}", *flags_of())
    last = only(tmp_path) / "checkpoint.pt"
    assert f"{name} is not finite at step 400" in error and str(last) in error
    state = torch.load(last, weights_only=True)
    assert (state["phase"], state["step"]) == ("two", 160)


# ------------------------------------------------------------------------------------------------------------ learning


def test_agents_learn_to_build(monkeypatch, tmp_path):
    """Three seeds had 1.5 to 1.7 houses in the first iteration, with a welfare of 7 to 9, 6.2 to 7.6 in this time."""
    monkeypatch.setattr(script.envs, "make", MAKE)
    options = dict(num_seeds=1, num_envs=16, hidden_size=32, num_minibatches=8, update_epochs=4, log_interval=3200)
    options |= dict(phase_one_timesteps=35_200, phase_two_timesteps=1, method="free-market")
    _, _, rows = short_train(tmp_path, "run", **options)
    first, last = rows[0], rows[-2]  # of phase one
    assert last["charts/phase"] == "1" and int(last["global_step"]) == 35_200
    assert float(last["charts/houses"]) > 2 * float(first["charts/houses"]) > 2
    assert float(last["charts/welfare"]) > 2 * float(first["charts/welfare"])
