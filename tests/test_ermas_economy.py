"""ermas_economy.py: games, deviations and losses by hand, what the phases hand on, the report."""

import dataclasses
import itertools
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from commands import ROOT, alike, call, only, plain, without_speed
from torch.distributions import Categorical, kl_divergence

sys.path.insert(0, str(ROOT / "benchmarks"))

from reproduce import words

import envs
import ermas_economy as script
from envs import economy, runs
from envs.runs import read_rows
from ermas_economy import MLP, Args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAKE = envs.make
SHORT = dict(horizon=20, period=5, start_coin=8.0)  # of the games here; with coin agents trade at once
# written out so that tests with numbers of these do not depend on defaults
SMALL = dict(num_envs=2, hidden_size=8, planner_hidden_size=8, num_minibatches=2, update_epochs=1)
SMALL |= dict(num_seeds=2, trust_batch_size=16, cg_steps=3, eval_eta=(0.1, 0.3), eval_episodes=2)
SMALL |= dict(
    phase_one_timesteps=160, response_steps=80, phase_two_timesteps=240, eval_timesteps=80
)  # an iteration: 80
SMALL |= dict(log_interval=80, checkpoint_interval=160, wandb_mode="disabled")
SMALL |= dict(
    seed=1,
    eta_train=(0.23,),
    planner="policy",
    planner_gae_lambda=0.95,
    labor_constant=300.0,
    tax_annealing=0.5,
    rate_step=0.25,
    activation="tanh",
)
SMALL |= dict(learning_rate=2e-3, planner_learning_rate=1e-3, gamma=0.99, gae_lambda=0.95, clip_coef=0.2, vf_coef=0.5)
SMALL |= dict(ent_coef=0.025, planner_ent_coef=0.1, planner_ent_coef_end=0.01, value_decay=0.9, max_grad_norm=0.5)
SMALL |= dict(epsilon=0.02, beta=0.4, lambda_init=1.0, lambda_lr=10.0, lambda_damping=100.0, lambda_max=20.0)
SMALL |= dict(regret_decay=0.9, inner_steps=1, rho=0.05, meta_gradient="fomaml", cg_damping=1e-2, warmup=0.1)
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def short_games():
    torch.manual_seed(0)
    envs.make = partial(MAKE, **SHORT)
    yield
    envs.make = MAKE
    torch.set_default_device(None)


def again(streams):
    """Generators that will draw the same numbers."""
    return {k: [torch.Generator(g.device).set_state(g.get_state()) for g in v] for k, v in streams.items()}


def small_problem(phase="two", fields=None, **options) -> SimpleNamespace:
    """All parts of a small problem in float64: policies that are not uniform, arbitrary moments of returns. What a test
    makes from then on is on DEVICE, too."""
    torch.set_default_dtype(torch.float64)
    args = Args(**(SMALL | options))
    script.setup(args)
    envs.make = partial(MAKE, dtype=torch.float64, **(SHORT | (fields or {})))
    S, normal = args.num_seeds, torch.Generator(DEVICE).manual_seed(0)
    env = script.make_env(args, S, phase, DEVICE)
    learner = script.make_learner(env, script.make_streams(args, DEVICE), args)
    for net in [net for net in learner.nets.values() if isinstance(net, MLP)]:
        net.flat.detach().add_(0.1 * torch.randn(net.flat.shape, generator=normal, device=DEVICE))
    for name, moments in learner.moments.items():
        if name == "regrets":
            continue
        heads = {"agents": 2, "planner": 1}[name]
        mean, std = (torch.rand(S, heads, generator=normal, device=DEVICE) for _ in range(2))
        moments.flat.copy_(0.6 * torch.stack([mean, mean**2 + (1 + std) ** 2, torch.ones_like(mean)], 2))
    torch.set_default_device(DEVICE)
    return SimpleNamespace(args=args, env=env, learner=learner, nets=learner.nets, moments=learner.moments)


def fork(p) -> script.Learner:
    """A learner with the same networks that starts from the same numbers, moments and lambdas."""
    moments = {name: script.Moments(m.flat.clone()) for name, m in p.learner.moments.items()}
    return dataclasses.replace(p.learner, moments=moments, streams=again(p.learner.streams))


def task_of(p, step=None, **options) -> script.Task:
    step = step or p.env.step
    return script.Task(p.env, dataclasses.replace(p.args, **options), step, step)


def play(p, deviations=None, learner=None, step=None, stage="full"):
    """(the joint policy's episodes, those of deviating agents, the last state)"""
    learner = learner or fork(p)
    episodes, own = script.rollout(task_of(p, step), learner, stage, deviations)
    return episodes, own, learner.last


def copies(p) -> MLP:
    """Deviations that do not differ from the policy yet."""
    agents = p.nets["agents"]
    return dataclasses.replace(agents, flat=agents.flat.detach().repeat_interleave(4, 0))


def gae_by_hand(rewards, values, gamma, decay) -> list[float]:
    """Advantages of an episode, after which nothing comes."""
    advantages, last, following = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values)):
        last = reward + gamma * following - value + gamma * decay * last
        following = value
        advantages.append(last)
    return advantages[::-1]


def scale_of(moments, s, head):
    """Mean and standard deviation that undo the normalisation of values."""
    mean, square, weight = moments.flat[s, head].tolist()
    mean, square = mean / weight, square / weight
    return mean, math.sqrt(max(square - mean**2, 1e-4))


# --------------------------------------------------------------------------------------------------------------- games


def equality_by_hand(coin) -> float:
    n = len(coin)
    gini = sum(abs(a - b) for a in coin for b in coin) / (2 * n * sum(coin) + 1e-10)
    return 1 - gini * n / (n - 1)


@pytest.mark.parametrize("phase", ["one", "two"])
def test_rewards_are_changes_of_utility_and_welfare(phase):
    p = small_problem(phase, dict(horizon=100, period=20, start_coin=0.0), num_envs=6)
    episodes, own, last = play(p)
    assert not own and episodes["obs"].shape[:4] == (2, 4, 6, 100)
    coin, labor, eta = (episodes["coin"].transpose(1, 2), episodes["labor"].transpose(1, 2), p.args.eta_train[0])
    assert torch.equal(coin.flatten(0, 1).T, p.env.endowment(last)) and coin.max() > 20
    welfare = [equality_by_hand(c) * sum(c) / 4 for c in coin.flatten(0, 1).tolist()]
    close(episodes["planner_rewards"].sum(3).flatten(), torch.tensor(welfare, device=DEVICE))
    before = last.worked.view(2, 6) - (episodes["rewards"][..., -1].sum(1) > 0).long()  # the last step
    weight = 1 - torch.exp(-before.unsqueeze(2) / 300.0) if phase == "one" else 1.0
    utility = (coin ** (1 - eta) - 1) / (1 - eta) - 0.21 * weight * labor
    close(episodes["rewards"].sum(3).transpose(1, 2), utility + 1 / (1 - eta))


@pytest.mark.parametrize("phase", ["one", "two"])
def test_facts_of_episodes(phase):
    p = small_problem(phase, dict(horizon=100, period=20, start_coin=0.0), num_envs=6, tax_annealing=0.0)
    facts, _, last = play(p)
    houses = (last.tiles >= economy.HOUSE).sum(0).view(2, 6)
    assert torch.equal(facts["houses"].sum(1), houses) and houses.max() > 2
    trade = facts["income"] - facts["houses"] * facts["payment"]
    close(trade.sum(1), torch.zeros(2, 6), rtol=0, atol=1e-9)  # what one pays another gets
    assert trade.abs().max() > 1 and facts["rates"].shape == (2, 7, 6, 5)
    ranked = torch.tensor(economy.RANKED_PAYMENT)[:, None]
    assert torch.equal(facts["payment"].sort(1).values, ranked.expand(2, 4, 6))
    if phase == "one":
        assert not facts["rates"].any()
        close(facts["coin"], facts["income"])
    else:  # taxes move coin from one to another
        assert (facts["coin"] - facts["income"]).abs().max() > 1 and facts["rates"].max() > 0.5
        close(facts["coin"].sum(1), facts["income"].sum(1))
        skill = economy.by_skill(facts)
        assert abs(skill["trade"].sum()) < 1e-9 and abs(skill["taxes"].sum()) < 1e-9
        coin = facts["coin"].gather(1, facts["payment"].argsort(1)).mean((0, 2))
        assert skill["building"] + skill["trade"] + skill["taxes"] == pytest.approx(coin.tolist())


def test_description_by_hand():
    coin = torch.tensor([[[1.0, 2, 3, 4], [0, 0, 0, 8]], [[5, 5, 5, 5], [6, 2, 2, 6]]])  # [S, E, N]
    facts = {"coin": coin.mT, "labor": torch.arange(16.0).view(2, 2, 4).mT}
    facts |= {"houses": (torch.arange(16).view(2, 2, 4) % 3).mT, "rates": torch.arange(24.0).view(2, 2, 3, 2)}
    found = economy.describe(facts)
    for s in range(2):
        coins = coin[s].tolist()
        equal = [equality_by_hand(c) for c in coins]
        assert found["equality"][s].item() == pytest.approx(sum(equal) / 2)
        assert found["productivity"][s].item() == pytest.approx((sum(coins[0]) + sum(coins[1])) / 2)
        welfare = (equal[0] * sum(coins[0]) + equal[1] * sum(coins[1])) / 2
        assert found["welfare"][s].item() == pytest.approx(welfare)
    assert found["labor"].tolist() == [14, 46] and found["houses"].tolist() == [3.5, 4]
    assert found["tax_rate"].tolist() == [5.5, 17.5]


def test_masks():
    p = small_problem()
    obs = torch.randn(2, 1, 50, p.nets["agents"].sizes[0])
    valid = torch.rand(2, 1, 50, p.nets["agents"].sizes[-1]) < 0.4
    valid[..., 0] = True
    probs = script.log_policy(p.nets["agents"], obs, valid).exp()
    assert (probs[~valid] == 0).all() and (probs[valid] > 0).all()
    close(torch.where(valid, probs, 0).sum(3), torch.ones(2, 1, 50))
    for s, m in itertools.product(range(2), range(3)):
        z = plain(p.nets["agents"], s, obs[s, 0, m])
        close(probs[s, 0, m], torch.where(valid[s, 0, m], z, -math.inf).softmax(0))
    obs = torch.randn(2, 1, 50, p.nets["planner"].sizes[0])
    valid = (torch.rand(2, 1, 50, 7, 6) < 0.4).index_fill_(4, torch.tensor([0]), True)
    probs = script.log_policy(p.nets["planner"], obs, valid).exp()
    assert p.nets["planner"].sizes[-1] == 7 * (5 + 1) and (probs[~valid] == 0).all()
    for s, m in itertools.product(range(2), range(3)):
        z = plain(p.nets["planner"], s, obs[s, 0, m]).view(7, 6)
        close(probs[s, 0, m], torch.where(valid[s, 0, m], z, -math.inf).softmax(1))


def follows(probs, taken) -> bool:
    """Was each alternative taken as often as its probability says, up to five standard errors? [M, A], [M]"""
    error = (F.one_hot(taken, probs.shape[1]) - probs).sum(0)
    return bool((error.abs() <= 5 * (probs * (1 - probs)).sum(0).sqrt() + 1e-6).all())


def test_episodes_follow_the_policies():
    """Valid actions with the frequencies and log-probabilities of the networks, of agents at every step, of the planner
    at the start of a period."""
    p = small_problem(num_envs=40, tax_annealing=0.0, fields=dict(horizon=23))  # the last period is cut off
    for net in ("agents", "planner"):
        p.nets[net].layers()[-1][1].detach()[1:] += torch.linspace(2, 0, p.nets[net].sizes[-1])[:, None]
    episodes, _, last = play(p)
    assert last.t.tolist() == [23] * 80 and last.completions.tolist() == [0] * 80
    obs, valid, actions = (episodes[name].flatten(1, 3).unsqueeze(1) for name in ("obs", "valid", "actions"))
    assert valid.gather(3, actions.unsqueeze(3)).all() and not valid.all()
    logp = script.log_policy(p.nets["agents"], obs, valid)
    close(episodes["logprobs"].flatten(1), logp.gather(3, actions.unsqueeze(3)).flatten(1))
    assert all(follows(logp[s, 0].exp(), actions[s, 0]) for s in range(2))
    assert not follows(logp[0, 0].exp(), actions[1, 0])  # of the other run, whose policy is another
    assert episodes["planner_obs"].shape[:4] == (2, 1, 40, 5)
    names = ("planner_obs", "planner_valid", "planner_actions")
    obs, valid, choices = (episodes[name].flatten(2, 3) for name in names)
    logp = script.log_policy(p.nets["planner"], obs, valid)
    taken = logp.gather(4, choices.unsqueeze(4)).squeeze(4)
    close(episodes["planner_logprobs"].flatten(1), taken.sum(3).squeeze(1))
    assert all(follows(logp[s].flatten(0, 2).exp(), choices[s].flatten()) for s in range(2))
    assert episodes["rates"].shape == (2, 7, 40, 4)
    rates = torch.zeros(2, 40, 7)
    for d in range(4):
        choice = episodes["planner_actions"][:, 0, :, d]
        rates = torch.where(choice > 0, (choice - 1) * 0.25, rates)
        close(episodes["rates"][..., d].mT, rates)


def test_the_highest_rates_rise_with_the_episodes_of_phase_two():
    """0.1 in the first one, 1 after half of them: of 20 here, of which an environment plays 10 in this time."""
    p = small_problem(tax_annealing=0.5, phase_two_timesteps=20 * 2 * 20, num_seeds=2, num_envs=2)
    p.nets["planner"].flat.detach().zero_()
    p.nets["planner"].layers()[-1][1].detach()[:] = torch.arange(6.0).repeat(7)[:, None] * 99  # the highest allowed
    for k in range(12):
        episodes, _, state = play(p, learner=p.learner)
        limit = min(1.0, 0.1 + 0.09 * k)
        assert (state.completions == k).all()
        close(p.env.rate_limit(state), torch.full((4,), limit, dtype=torch.float64))
        allowed = [0.25 * c for c in range(5) if 0.25 * c <= p.env.rate_limit(state)[0].item()]
        close(episodes["rates"], torch.full((2, 7, 2, 4), max(allowed)))
    eta = torch.tensor([0.1, 0.5], device=DEVICE)  # the test's agents live with the taxes as they are
    env = script.make_env(p.args, 2, "two", DEVICE, eta)
    assert env.eta.tolist() == [0.1, 0.1, 0.5, 0.5] and (env.rate_limit(state) == 1).all()
    assert small_problem(tax_annealing=0.0).env.tax_warmup is None


# -------------------------------------------------------------------------------------------------- schedules of rates


@pytest.mark.parametrize("stage", ["full", "warm-up", "response", "probe"])
def test_schedules_are_held_and_come_in_antithetic_pairs(stage):
    """The second half of a run's environments has the mirrored rates, and plays by the same random numbers."""
    p = small_problem(planner="schedule", num_envs=6, rates=(0.3,), planner_std=0.1, tax_annealing=0.0)
    with torch.no_grad():  # so that agents do not see the rates
        weight, _ = p.nets["agents"].layers()[0]
        weight[:, :, 1:] = 0.0
    episodes, _, last = play(p, stage=stage)
    drawn = episodes["planner_actions"][:, 0, :, 0]  # [S, B, b]
    one, two = drawn.chunk(2, 1)
    center = 0.6 if stage in ("full", "warm-up") else 1.0
    close(one + two, torch.full_like(one, center))
    limited = drawn.clamp(0, 1)
    for d in range(4):  # every tax period
        close(episodes["rates"][..., d].mT, limited)
    first, second = episodes["actions"][..., :5].chunk(2, 2)
    assert torch.equal(first, second)  # until the first tax day
    assert not torch.equal(*last.coin.view(4, 2, 2, 3)[:, 0].unbind(1))
    if stage == "probe":
        assert (one == 0.25).all()
    else:
        assert one.std(1).min() > 0.01 and not torch.equal(one[0], one[1])


def test_the_planner_is_deterministic_where_agents_are_selfish():
    p = small_problem(planner="schedule", rates=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), tax_annealing=0.0)
    episodes, _, _ = play(p, stage="selfish")
    close(episodes["rates"], torch.linspace(0.1, 0.7, 7).view(1, 7, 1, 1).expand(2, 7, 2, 4))
    first, second = episodes["actions"].unbind(2)
    assert not torch.equal(first, second)  # other games
    p = small_problem()  # the likeliest choice of a policy
    episodes, _, _ = play(p, stage="selfish")
    logp = script.log_policy(p.nets["planner"], *(episodes[f"planner_{x}"].flatten(2, 3) for x in ("obs", "valid")))
    assert torch.equal(logp.argmax(4), episodes["planner_actions"].flatten(2, 3))


def some_schedule(S=2, b=3):
    flat = torch.cat((torch.rand(S, 8), -1 - torch.rand(S, 8)), 1)
    return script.Schedule(flat.double().requires_grad_(), b)


def test_gradient_of_schedules_by_hand():
    """Score function times advantage, mean over environments, of means and of logarithms of standard deviations."""
    planner = some_schedule()
    mean, log_std = (x.detach() for x in planner.mean_and_log_std())
    rates, advantages = torch.rand(2, 5, 3).double(), torch.randn(2, 5).double()
    loss, metrics = script.schedule_loss(planner, rates, advantages, 0.3)
    (gradient,) = torch.autograd.grad(loss, planner.flat)
    noise = (rates - mean) / log_std.exp()
    weight = advantages.unsqueeze(2)
    close(gradient[:, :3], -(weight * noise / log_std.exp()).mean(1))
    close(gradient[:, 8:11], -(weight * (noise.square() - 1)).mean(1) - 0.3)
    assert not gradient[:, 3:8].any() and not gradient[:, 11:].any()
    close(metrics["losses/planner_entropy"], log_std.sum((1, 2)))


def test_gradient_of_schedules_is_that_of_the_expected_welfare():
    """Against finite differences, in closed form, of E w = -sum (rate - best)^2: what is even in the noise drops out of
    the gradient of the means in antithetic pairs, and so does chance that both of a pair have in common."""
    planner = some_schedule(S=1)
    best = torch.tensor([0.2, 0.5, 0.9]).double()

    def expected(flat):
        mean, log_std = dataclasses.replace(planner, flat=flat).mean_and_log_std()
        return -((mean - best).square() + (2 * log_std).exp()).sum()

    def estimated(noise, luck=0.0):
        mean, log_std = (x.detach() for x in planner.mean_and_log_std())
        rates = mean + log_std.exp() * noise
        welfare = -(rates - best).square().sum(2) + luck
        loss, _ = script.schedule_loss(planner, rates, welfare - welfare.mean(1, keepdim=True), 0.0)
        return -torch.autograd.grad(loss, planner.flat)[0]

    exact = torch.zeros(16).double()
    for k in (0, 1, 2, 8, 9, 10):
        step = 1e-4 * F.one_hot(torch.tensor([k]), 16).double()
        with torch.no_grad():
            exact[k] = (expected(planner.flat + step) - expected(planner.flat - step)) / 2e-4
    noise = torch.randn(1, 100_000, 3).double()
    pairs = estimated(torch.cat((noise, -noise), 1))[0]
    close(pairs[:3], exact[:3], rtol=0.03, atol=0.01)
    close(pairs[8:11], exact[8:11], rtol=0.1, atol=0.03)
    games = torch.randn(2, 500, 1, 64).double()  # as much chance in a game as schedules make a difference
    errors = 0.0
    for half, luck in zip(torch.randn(500, 1, 32, 3).double(), games[0, :, :, :32]):
        errors += (estimated(torch.cat((half, -half), 1), luck.repeat(1, 2))[0, :3] - exact[:3]).norm()
    others = 0.0
    for noise, luck in zip(torch.randn(500, 1, 64, 3).double(), games[1]):
        others += (estimated(noise, luck)[0, :3] - exact[:3]).norm()
    assert errors < 0.7 * others


def test_a_planner_finds_the_best_rates_of_a_toy():
    """Welfare falls with the squared distance to rates of 0.7, and noise is as large as what a schedule changes."""
    p = small_problem(planner="schedule", num_envs=32, rates=(0.2,), planner_std=0.2)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for _ in range(150):
        script.anneal(p.learner, "one", 0.0, dataclasses.replace(p.args, planner_learning_rate=0.02))
        rates = script.draw_schedules(task_of(p), p.learner, "full")
        welfare = -(rates - 0.7).square().sum(2) + 0.2 * torch.randn(2, 32, generator=generator)
        episodes = {"planner_rewards": welfare.view(2, 1, 32, 1), "planner_actions": rates.view(2, 1, 32, 1, 7)}
        script.plan_schedules(task_of(p), p.learner, episodes)
    mean, _ = p.nets["planner"].mean_and_log_std()
    assert (mean - 0.7).abs().mean() < 0.1
    for _ in range(150):  # rates stay rates
        rates = script.draw_schedules(task_of(p), p.learner, "full")
        episodes = {"planner_rewards": rates.sum(2).view(2, 1, 32, 1), "planner_actions": rates.view(2, 1, 32, 1, 7)}
        script.plan_schedules(task_of(p), p.learner, episodes)
    assert p.nets["planner"].mean_and_log_std()[0].max() <= 1


def test_rates_of_the_command_line(tmp_path):
    """One, one per bracket, one per bracket and seed, or of a file; else the flag is named."""
    b = 7
    own = tuple(k / 20 for k in range(2 * b))
    expected = {(0.3,): [[0.3] * b] * 2, own[:b]: [list(own[:b])] * 2, own: [list(own[:b]), list(own[b:])]}
    for rates, rows in expected.items():
        p = small_problem(planner="schedule", method="fixed", rates=rates)
        close(p.nets["planner"].mean_and_log_std()[0].squeeze(1), torch.tensor(rows))
        close(p.env.schedule.T.view(2, 2, b)[:, 0].to(DEVICE), torch.tensor(rows))
    torch.set_default_device(None)
    economy.write_schedules(tmp_path, p.env, {1: own[:b], 2: own[b:]})
    for name in ("schedule.csv", "schedule.json"):
        assert Args(rates=str(tmp_path / name), num_envs=2).rates == own
    with pytest.raises(ValueError, match="--rates must be one"):
        small_problem(method="fixed", rates=(0.1, 0.2))


def test_a_range_of_eta():
    """Even over environments, the same in both of a pair; a deviation plays in copies of these environments."""
    p = small_problem(eta_train=(0.1, 0.3), num_envs=4, planner="schedule")
    close(p.env.eta, torch.tensor([0.1, 0.3] * 4))
    found, learner, metrics = turn_task(p, script.make_task(p.env, p.args, 2))
    assert learner.last.coin.shape == (4, 8) and metrics["ermas/deviation_kl"].min() > 0
    wide = script.make_task(p.env, p.args, 2).wide_step.__self__
    close(wide.eta, torch.tensor([0.1, 0.3] * 20))


def test_flags_of_the_economy():
    options = dict(objective="inverse_income_coin", labor_coef=0.4, num_agents=3, cutoffs=(0.0, 5.0))
    with pytest.raises(ValueError, match="period must be at most 8, the steps of an episode, got 9"):
        small_problem(horizon=8, period=9)
    p = small_problem(planner="schedule", horizon=8, period=2, **options)
    env = p.env
    assert (env.objective, env.num_agents, env.cutoffs) == ("inverse_income_coin", 3, (0.0, 5.0))
    assert (env.horizon, env.period) == (8, 2)
    assert env.labor_coef.item() == pytest.approx(0.4)
    episodes, _, _ = play(p)
    assert episodes["rewards"].shape == (2, 3, 2, 8) and episodes["rates"].shape == (2, 2, 2, 4)
    coin = episodes["coin"]  # [S, N, B]
    weight = 1 / coin.clamp_min(1)
    close(
        script.economy.charts(episodes)["charts/planner_return"] + 8.0,
        (weight / weight.sum(1, keepdim=True) * coin).sum(1).mean(1),
    )


# ---------------------------------------------------------------------------------------------------------- deviations


def test_own_slices():
    x = torch.arange(3 * 4 * 5 * 2 * 6).view(3, 4, 5, 2, 6)
    own = script.own_slices(x)
    assert own.shape == (3, 4, 2, 6)
    for s, i in itertools.product(range(3), range(4)):
        assert torch.equal(own[s, i], x[s, i, i])


def test_each_slice_has_one_deviation():
    p = small_problem()
    obs = torch.randn(2, 4, 5, 3, p.nets["agents"].sizes[0])
    valid = torch.rand(2, 4, 5, 3, p.nets["agents"].sizes[-1]) < 0.6
    valid[..., 0] = True
    deviations = copies(p)
    deviations.flat += 0.1 * torch.randn(deviations.flat.shape)
    noise = envs.per_seed(envs.gumbel, (4, 3, valid.shape[-1]), p.learner.streams["games"])
    found = script.act(p.nets["agents"], deviations, obs, valid, noise.unsqueeze(2))
    for s, n, l, b in itertools.product(range(2), range(4), range(5), range(3)):
        net, row = (deviations, 4 * s + n) if l == n else (p.nets["agents"], s)
        z = torch.where(valid[s, n, l, b], plain(net, row, obs[s, n, l, b]), -1e9).log_softmax(0)
        action = (z + noise[s, n, b]).argmax()  # by the same numbers in all slices
        assert found["actions"][s, n, l, b] == action
        close(found["logprobs"][s, n, l, b], z[action])


def test_without_a_difference_all_slices_play_the_same_games():
    p = small_problem()
    (alone, _, end), (joint, own, last) = play(p), play(p, copies(p))
    for name in alone:
        close(joint[name], alone[name])
    for name in vars(end):
        close(getattr(last, name), getattr(end, name))
    assert {"obs", "valid", "actions", "rewards"} <= own.keys()
    for name in own:
        close(own[name], joint[name])


def test_only_the_deviating_agent_follows_its_copy():
    """Agent 2 of run 1 does nothing, in its slice alone."""
    p, slices = small_problem(), []

    def step(state, action, *rest):
        slices.append(action.view(2, 5, 2, 4))  # [S, L, B, N]
        return p.env.step(state, action, *rest)

    deviations = copies(p)
    _, before, _ = play(p, deviations)
    deviations.layers()[-1][1][4 + 2, 0] = 1e5
    joint, own, _ = play(p, deviations, step=step)
    actions = torch.stack(slices)
    assert torch.equal(actions[:, :, 4].permute(1, 3, 2, 0), joint["actions"])
    others = [k for k in range(8) if k != 6]
    assert all(torch.equal(own[name].flatten(0, 1)[others], before[name].flatten(0, 1)[others]) for name in own)
    assert (own["actions"][1, 2] == 0).all() and (joint["actions"][1, 2] != 0).any()
    assert (actions[:, 0] == actions[:, 0, 4:]).all() and (actions[:, :, [0, 1, 3]] == actions[:, :, 4:]).all()
    assert (actions[:, 1, 2, :, 2] == 0).all()
    rest = [0, 1, 3]
    assert torch.equal(actions[0, 1, 2][:, rest], actions[0, 1, 4][:, rest])  # at first the others see no difference
    assert not torch.equal(actions[:, 1, 2][..., rest], actions[:, 1, 4][..., rest])


def test_deviations_leave_the_joint_policys_episodes_alone():
    p = small_problem()
    deviations = copies(p)
    deviations.layers()[-1][1][:, 0] = 1e5  # all do nothing
    (alone, _, end), (joint, own, last) = play(p), play(p, deviations)
    assert (own["actions"] == 0).all() and alone["labor"].max() > 0
    for name in alone:
        close(joint[name], alone[name])
    for name in vars(end):
        close(getattr(last, name), getattr(end, name))


def test_samples_of_deviations_by_hand():
    p = small_problem(gae_lambda=0.8)
    joint, _, _ = play(p)
    batch = script.own_samples(p.learner, joint, p.args)
    for s, i, b in itertools.product(range(2), range(4), range(2)):
        mean, std = scale_of(p.moments["agents"], s, 0)
        values = [mean + std * plain(p.nets["agents_critic"], s, x)[0].item() for x in joint["obs"][s, i, b]]
        expected = gae_by_hand(joint["rewards"][s, i, b].tolist(), values, 0.99, 0.8)
        found = batch["advantages"][s, i].view(2, 20)[b]
        assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        for name in ("obs", "valid", "actions"):
            assert torch.equal(batch[name][s, i].unflatten(0, (2, 20))[b], joint[name][s, i, b])


def by_hand(p, first, learner, s: int, i: int):
    """(gradients along the path of agent i of run s, its gains, KL at the end)"""
    agents, k = p.nets["agents"], 4 * s + i
    anchor_flat = flat = agents.flat.detach()[s : s + 1]
    own = script.own_samples(learner, first, p.args)
    path, gains, kl = [], [], None
    while True:
        batch = {name: values[s : s + 1, i : i + 1] for name, values in own.items()}
        leaf, rows = flat.clone().requires_grad_(), batch["actions"].shape[2]
        logp = script.log_policy(dataclasses.replace(agents, flat=leaf), batch["obs"], batch["valid"])
        terms = [batch["advantages"][0, 0, m] * logp[0, 0, m, batch["actions"][0, 0, m]] for m in range(rows)]
        path.append(torch.autograd.grad(sum(terms) / rows, leaf)[0][0])
        if len(path) > p.args.inner_steps:
            return path, gains, kl
        places = [torch.randperm(rows, generator=g, device=DEVICE) for g in learner.streams["minibatches"]][s][:16]
        chosen = {name: values[:, :, places] for name, values in batch.items()}

        def policy(f, chosen=chosen):
            net = dataclasses.replace(agents, flat=f)
            return script.log_policy(net, chosen["obs"], chosen["valid"]).flatten(0, 1)

        scores = torch.zeros(1, 16, agents.sizes[-1], device=DEVICE)
        for m in range(16):
            scores[0, m, chosen["actions"][0, 0, m]] = chosen["advantages"][0, 0, m] / 16
        visits = torch.full((1, 16), 1 / 16, device=DEVICE)
        anchor = {"logp": policy(anchor_flat).detach(), "visits": visits}
        weighted = {"scores": scores, "visits": visits}
        flat = script.trust_region_step(policy, flat, weighted, anchor, p.args.rho, p.args)
        kl = kl_divergence(*(Categorical(logits=policy(f)) for f in (anchor_flat, flat))).mean()
        deviations = copies(p)
        deviations.flat[k] = flat[0]
        joint, alone, _ = play(p, deviations, learner)
        gains.append(alone["rewards"][s, i].mean() - joint["rewards"][s, i].mean())
        own = script.own_samples(learner, alone, p.args)


def test_deviations_and_their_gradients_by_hand():
    # so that noise can outweigh gains
    p = small_problem(inner_steps=2, rho=0.2, cg_steps=5, fields=dict(labor_coef=0.0))
    first, _, after = play(p)

    def deviate(**options):
        return script.deviate(task_of(p, **options), dataclasses.replace(fork(p), last=after), first)

    (fomaml, joint), (reptile, _) = deviate(), deviate(meta_gradient="reptile")
    kl, regrets = fomaml["kl"], reptile["regrets"]
    assert len(joint) == 2 and fomaml["gradient"].shape == (2, 4, p.nets["agents"].flat.shape[1])
    assert (kl <= 0.2).all() and kl.max() > 0.05 and regrets.min() < 0 < regrets.max()
    assert torch.equal(fomaml["regrets"], regrets)
    for s, i in itertools.product(range(2), range(4)):
        (g1, g2, g3), gains, size = by_hand(p, first, dataclasses.replace(fork(p), last=after), s, i)
        close(fomaml["gradient"][s, i], g3, rtol=1e-6, atol=1e-9)
        close(reptile["gradient"][s, i], (g1 + g2) / 2, rtol=1e-6, atol=1e-9)
        close(regrets[s, i], gains[-1], rtol=1e-6, atol=1e-9)
        close(kl[s, i], size, rtol=1e-6, atol=1e-9)
        assert not torch.allclose(g1, g3, rtol=0.01) and gains[0] != gains[1]


def test_deviations_of_a_single_seed():
    p = small_problem(num_seeds=1)
    turn(p, "full")


# -------------------------------------------------------------------------------------------------- advantages, losses


def test_advantages_and_returns_by_hand():
    """Of episodes after which nothing comes, with values in the units of the moments."""
    p = small_problem(gae_lambda=0.7, gamma=0.9)
    obs, rewards = torch.randn(2, 3, 2, 5, p.nets["agents"].sizes[0]), torch.randn(2, 2, 6, 5)
    advantages, returns = script.estimate(p.learner, "agents", obs, rewards, 0.9, p.args)
    for s, k, n, b in itertools.product(range(2), range(2), range(3), range(2)):
        mean, std = scale_of(p.moments["agents"], s, k)
        value = [mean + std * plain(p.nets["agents_critic"], s, x)[k].item() for x in obs[s, n, b]]
        found = gae_by_hand(rewards[s, k, 2 * n + b].tolist(), value, 0.9, 0.7)
        assert advantages[s, k, 2 * n + b].tolist() == pytest.approx(found, rel=1e-5, abs=1e-5)
        expected = [a + v for a, v in zip(found, value)]
        assert returns[s, k, 2 * n + b].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("fresh", [False, True])
def test_moments_by_hand(fresh):
    p = small_problem()
    moments = p.moments["agents"]
    if fresh:
        moments.flat.zero_()
    before, x = moments.flat.clone(), torch.randn(2, 2, 6, 5)
    moments.update(x, 0.8)
    mean, std = moments.mean_and_std()
    for s, k in itertools.product(range(2), range(2)):
        newest = torch.stack([x[s, k].mean(), x[s, k].square().mean(), torch.tensor(1.0)])
        close(moments.flat[s, k], 0.8 * before[s, k] + 0.2 * newest)
        expected = scale_of(moments, s, k)
        assert (mean[s, k].item(), std[s, k].item()) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_standardized_advantages():
    torch.set_default_dtype(torch.float64)
    x = 3 + 5 * torch.randn(2, 1, 40)
    found, scale = script.standardize(x)
    close(scale, x.std(2, correction=0, keepdim=True))
    close(found, (x - x.mean(2, keepdim=True)) / scale)


def agents_samples(p, joint, learner=None):
    """Samples for the agents' loss, of own and the planner's rewards."""
    welfare = joint["planner_rewards"].expand_as(joint["rewards"])
    both = torch.stack((joint["rewards"], welfare), 1).flatten(2, 3)
    return script.prepare(learner or p.learner, "agents", joint, both, p.args.gamma, p.args)


def test_samples_of_agents_by_hand():
    p = small_problem()
    joint, _, _ = play(p)
    before = fork(p).moments["agents"]
    batch = agents_samples(p, joint)
    advantages = batch["advantages"].view(2, 2, 4, 2, 20)
    returns = batch["returns"].view(2, 4, 2, 20, 2)
    for s, k, n, b in itertools.product(range(2), range(2), range(4), range(2)):
        mean, std = scale_of(before, s, k)
        value = [mean + std * plain(p.nets["agents_critic"], s, x)[k].item() for x in joint["obs"][s, n, b]]
        rewards = joint["planner_rewards"][s, 0, b] if k else joint["rewards"][s, n, b]
        expected = gae_by_hand(rewards.tolist(), value, 0.99, 0.95)
        assert advantages[s, k, n, b].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        mean, std = scale_of(p.moments["agents"], s, k)
        expected = (torch.tensor(expected) + torch.tensor(value) - mean) / std
        close(returns[s, n, b, :, k], expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(before.flat, p.moments["agents"].flat)
    for name in ("obs", "valid", "actions", "logprobs"):
        assert torch.equal(batch[name].squeeze(1).unflatten(1, (4, 2, 20)), joint[name])


@pytest.mark.parametrize("horizon", [20, 18])
def test_samples_of_the_planner_by_hand(monkeypatch, horizon):
    """A decision is paid the change of welfare until the next one, which is five steps away."""
    p = small_problem(gamma=0.9, planner_gae_lambda=0.7, fields=dict(horizon=horizon))
    joint, _, _ = play(p)
    before, seen = fork(p).moments["planner"], []
    monkeypatch.setattr(script, "improve", lambda learner, name, samples, *rest: seen.append(samples))
    script.plan(task_of(p), p.learner, joint)
    (batch,) = seen
    assert batch["returns"].shape == (2, 1, 8, 1) and joint["planner_rewards"].abs().max() > 0.01
    for s in range(2):
        mean, std = scale_of(before, s, 0)
        advantages, returns = [], []
        for b in range(2):
            value = [mean + std * plain(p.nets["planner_critic"], s, x).item() for x in joint["planner_obs"][s, 0, b]]
            steps = joint["planner_rewards"][s, 0, b].tolist()
            found = gae_by_hand([sum(steps[d : d + 5]) for d in (0, 5, 10, 15)], value, 0.9**5, 0.7)
            advantages += found
            returns += [a + v for a, v in zip(found, value)]
        advantages = torch.tensor(advantages)
        expected = (advantages - advantages.mean()) / advantages.std(correction=0)
        close(batch["advantages"][s, 0], expected, rtol=1e-5, atol=1e-5)
        mean, std = scale_of(p.moments["planner"], s, 0)
        close(batch["returns"][s, 0, :, 0], (torch.tensor(returns) - mean) / std, rtol=1e-5, atol=1e-5)
    for name in ("obs", "valid", "actions", "logprobs"):
        assert torch.equal(batch[name].unflatten(2, (2, 4)), joint[f"planner_{name}"])


def clipped_by_hand(logprob, old, advantage, args):
    ratio = math.exp(logprob - old)
    return -min(ratio * advantage, min(max(ratio, 1 - args.clip_coef), 1 + args.clip_coef) * advantage)


def some_rows(batch, M):
    """The first samples, from a policy that was another, so that clipping acts."""
    rows = {k: batch[k][:, :, :M] for k in ("obs", "valid", "actions", "logprobs", "returns")}
    other = 0.4 * torch.randn(2, 1, M, device="cpu").to(DEVICE)  # on a GPU the same numbers
    return rows | {"logprobs": rows["logprobs"] + other, "advantages": torch.randn(2, 1, M)}


def set_ent_coef(learner, value):
    for optimizer in learner.optimizers.values():
        optimizer.param_groups[0]["ent_coef"] = value


@pytest.mark.parametrize("who", ["agents", "planner"])
def test_losses_by_hand(who):
    p = small_problem(vf_coef=0.7, tax_annealing=0.0)
    joint, _, _ = play(p)
    samples, M = agents_samples(p, joint), 12
    if who == "planner":
        rewards = joint["planner_rewards"].unflatten(3, (4, 5)).sum(4)
        decisions = {name: joint[f"planner_{name}"] for name in ("obs", "valid", "actions", "logprobs")}
        samples, M = script.prepare(p.learner, "planner", decisions, rewards, 0.95, p.args), 8
    rows = some_rows(samples, M)
    policy, critic = p.nets[who], p.nets[f"{who}_critic"]
    correction, total = torch.randn(policy.flat.shape), 0.0
    set_ent_coef(p.learner, 0.3)
    loss, metrics = script.ppo_loss(p.learner, who, rows, correction, p.args)
    for s in range(2):
        parts = []
        for m in range(M):
            z = plain(policy, s, rows["obs"][s, 0, m]).detach().view(rows["valid"].shape[3:])
            pi, old = Categorical(logits=torch.where(rows["valid"][s, 0, m], z, -1e9)), rows["logprobs"][s, 0, m].item()
            logprob = pi.log_prob(rows["actions"][s, 0, m]).sum().item()  # of all brackets at once
            clipped = clipped_by_hand(logprob, old, rows["advantages"][s, 0, m].item(), p.args)
            value = plain(critic, s, rows["obs"][s, 0, m]).detach() - rows["returns"][s, 0, m]
            ratio = math.exp(logprob - old)
            kl, far = ratio - 1 - (logprob - old), float(abs(ratio - 1) > p.args.clip_coef)
            parts.append([clipped, pi.entropy().sum().item(), value.square().mean().item(), kl, far])
        mean = [sum(x) / M for x in zip(*parts)]
        for name, value in zip(("policy_loss", "entropy", "value_loss", "approx_kl", "clipfrac"), mean):
            assert metrics[name][s].item() == pytest.approx(value), name
        assert 0.1 < metrics["clipfrac"][s] < 0.9
        total += mean[0] - 0.3 * mean[1] + 0.7 * mean[2]
    assert loss.item() == pytest.approx(total + (correction * policy.flat).sum().item())
    plain_loss, _ = script.ppo_loss(p.learner, who, rows, 0.0, p.args)
    gradient, without = (torch.autograd.grad(x, policy.flat)[0] for x in (loss, plain_loss))
    close(gradient - without, correction)  # as it is, once


@pytest.mark.parametrize("minibatches", [2, 5])
def test_all_samples_are_used_once_in_an_epoch(minibatches):
    p = small_problem(num_minibatches=minibatches, update_epochs=3)
    samples = {"advantages": torch.arange(20.0).view(2, 1, 10), "obs": torch.arange(60.0).view(2, 1, 10, 3)}
    seen = []
    for batch in script.minibatches(samples, again(p.learner.streams)["minibatches"], p.args):
        assert torch.equal(batch["obs"][..., 0], 3 * batch["advantages"])  # entries of a sample stay together
        seen.append(batch["advantages"].squeeze(1))
    epochs = torch.cat(seen, 1).unflatten(1, (3, 10))
    assert len(seen) == 3 * minibatches and torch.equal(epochs.sort(2).values[:, 0], samples["advantages"][:, 0])
    assert (epochs.sort(2).values == epochs.sort(2).values[:, :1]).all()
    assert not torch.equal(epochs[0, 0], epochs[0, 1]) and not torch.equal(epochs[0], epochs[1] - 10)


def test_gradients_are_clipped_one_by_one_and_metrics_are_means(monkeypatch):
    """Ten samples give five chunks of two where six are asked for."""
    p = small_problem(num_minibatches=6, max_grad_norm=0.5, update_epochs=3)
    flat = torch.zeros(2, 4, requires_grad=True)
    slope = torch.tensor([[3.0, 4, 0, 0], [0.03, 0.04, 0, 0]])
    net, still = SimpleNamespace(flat=flat), SimpleNamespace(flat=torch.zeros(2, 4, requires_grad=True))
    learner = dataclasses.replace(fork(p), nets={"agents": net, "agents_critic": still})
    learner.optimizers = {"agents": torch.optim.SGD([flat], 1.0)}
    counts = itertools.count(1.0)

    def loss(learner, name, batch, correction, args):
        return (slope * flat).sum() + still.flat.sum(), {"kind": torch.full((2,), next(counts))}

    monkeypatch.setattr(script, "ppo_loss", loss)
    found = script.improve(learner, "agents", {"advantages": torch.zeros(2, 1, 10)}, 0.0, p.args)
    close(flat.detach(), -15 * torch.stack([0.5 * slope[0] / 5, slope[1]]))
    close(found["losses/kind"], torch.full((2,), 8.0))


# ----------------------------------------------------------------------------------------------------------- an update

ONE_STEP = dict(num_minibatches=1, max_grad_norm=1e9, rho=0.5)  # of the optimiser, and nothing clipped


def turn_task(p, task):
    learner = fork(p)
    learner.optimizers = script.make_optimizers(learner.nets)
    script.anneal(learner, "two", 0.0, p.args)
    metrics = script.update(task, learner, "full")
    return learner.nets, learner, metrics


def test_running_regret():
    """Signed, and its error is that of a weighted mean of as many iterations."""
    moments = envs.Moments(torch.zeros(2, 4, 3, dtype=torch.float64))
    regrets, decay = 0.005 * torch.randn(60, 2, 4, dtype=torch.float64), 0.95
    for regret in regrets:
        moments.update(regret[..., None, None], decay)
    mean, error = moments.mean_and_error(decay)
    weight = decay ** torch.arange(59, -1, -1.0).double()
    weight = (weight / weight.sum()).view(60, 1, 1)
    expected = (weight * regrets).sum(0)
    variance = (weight * regrets.square()).sum(0) - expected.square()
    close(mean.double(), expected, rtol=1e-4, atol=1e-7)
    share = weight.square().sum()  # 1 / number of equal weights
    close(error.double(), (variance * share / (1 - share)).sqrt(), rtol=1e-3, atol=1e-7)
    assert mean.min() < 0 < mean.max() and error.max() < 0.005 / 4


def test_an_epsilon_that_chance_decides_is_named(capsys):
    moments = envs.Moments(torch.zeros(1, 4, 3, dtype=torch.float64))
    for k in range(40):
        moments.update(torch.full((1, 4, 1, 1), 0.002 + 0.006 * (-1) ** k), 0.95)
    economy.check_epsilon(moments, Args(epsilon=0.001, num_envs=8))
    assert "epsilon 0.001 is not measurable with 8 environments" in capsys.readouterr().out
    economy.check_epsilon(moments, Args(epsilon=0.01))
    assert not capsys.readouterr().out


def test_the_planner_rests_between_updates_of_the_agents(tmp_path, updates):
    short_train(tmp_path, agent_updates=2, warmup=0.0, phase_two_timesteps=400)
    assert [x.stage for x in updates if x.stage not in ("selfish", "response")] == ["full", "agents"] * 2 + ["full"]
    planner = [x.nets["planner"] for x in updates][-5:]
    assert torch.equal(planner[1], planner[2]) and not torch.equal(planner[0], planner[1])


def test_response_of_agents():
    """Productivity under 0.75 over that under 0.25, by the same random numbers whenever it is asked for."""
    p = small_problem(planner="schedule", num_envs=8)
    learner = fork(p)
    one, two = (script.probe(task_of(p), learner) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (2,) and (one > 0).all()
    before = again(p.learner.streams)["games"][0].get_state()
    assert torch.equal(learner.streams["games"][0].get_state(), before)  # training's numbers go on


def turn(p, stage, lambdas=None, ent_coef=0.0, planner_ent_coef=0.0):
    """(the directions in which the networks go, what training has changed, metrics) of an update"""
    learner = fork(p)
    if lambdas is not None:
        learner.lambdas = lambdas
    learner.optimizers = {}
    for name, coef in (("agents", ent_coef), ("planner", planner_ent_coef)):
        group = {"ent_coef": coef}
        learner.optimizers[name] = SimpleNamespace(step=lambda: None, param_groups=[group])
    for net in p.nets.values():
        net.flat.grad = torch.zeros_like(net.flat)
    metrics = script.update(task_of(p), learner, stage)
    return {name: -net.flat.grad for name, net in p.nets.items()}, learner, metrics


@pytest.fixture
def watched(monkeypatch):
    """All games that were played, and what the deviations have found."""
    seen = SimpleNamespace(games=[], deviations=[])
    for name, part in (("rollout", seen.games), ("deviate", seen.deviations)):

        def spy(*rest, real=getattr(script, name), part=part):
            part.append(real(*rest))
            return part[-1]

        monkeypatch.setattr(script, name, spy)
    return seen


@pytest.mark.parametrize("kind", ["own reward", "warm-up", "ermas"])
def test_direction_of_the_agents(watched, kind):
    options = dict(beta=0.6, epsilon=0.05, lambda_lr=20.0, lambda_damping=60.0, lambda_max=2.5, inner_steps=2)
    p = small_problem(**ONE_STEP, **options)
    stage = {"own reward": "selfish", "ermas": "full"}.get(kind, kind)
    lambdas = torch.rand(2, 4, generator=torch.Generator().manual_seed(2), device="cpu").to(DEVICE) * 2
    found, learner, metrics = turn(p, stage, lambdas)
    assert len(watched.games) == 3 and len(watched.deviations) == (kind == "ermas")
    joint = {k: torch.cat([games[0][k] for games in watched.games], 2) for k in watched.games[0][0]}
    assert joint["rewards"].shape[:3] == (2, 4, 6) and (learner.last.completions == 2).all()
    other = fork(p)
    batch = agents_samples(p, joint, other)
    close(learner.moments["agents"].flat, other.moments["agents"].flat)
    weight, gradients, regrets = lambdas, torch.zeros(2, 4, 1), torch.zeros(2, 4)
    if kind == "ermas":
        outcome, _ = watched.deviations[0]
        gradients, regrets, kl = (outcome[name] for name in ("gradient", "regrets", "kl"))
        moments = fork(p).moments["regrets"]  # the running mean decides
        moments.update(regrets[..., None, None], 0.9)
        regrets, error = moments.mean_and_error(0.9)
        close(metrics["ermas/regret_error"], error.mean(1))
        weight = (lambdas + 60.0 * (regrets.clamp_min(0) - 0.05)).clamp(0, 2.5)
        assert (weight == 2.5).any() and (weight < 2.5).any() and (metrics["ermas/deviation_kl"] == kl.amax(1)).all()
        expected = (lambdas + p.args.lambda_lr * (regrets.clamp_min(0) - 0.05)).clamp(0, 2.5)  # Eq. (12)
        close(learner.lambdas, expected)
        assert (learner.lambdas == 0).any() or (learner.lambdas == 2.5).any()
    else:
        assert torch.equal(learner.lambdas, lambdas) and not metrics["ermas/deviation_kl"].any()
    close(metrics["ermas/lambda"], lambdas.mean(1))
    close(metrics["ermas/local_regret"], regrets.mean(1))
    for s in range(2):
        agent = torch.arange(480) // 120
        own, welfare = batch["advantages"][s]
        advantages = own if kind == "own reward" else weight[s, agent] * own - welfare
        scale = advantages.std(correction=0)
        leaf = p.nets["agents"].flat.detach()[s : s + 1].clone().requires_grad_()
        net = dataclasses.replace(p.nets["agents"], flat=leaf)
        logp = script.log_policy(net, batch["obs"][[s]], batch["valid"][[s]])
        taken = logp[0, 0, torch.arange(480), batch["actions"][s, 0]]
        gain = ((advantages - advantages.mean()) / scale * taken).mean()
        expected = torch.autograd.grad(gain, leaf)[0][0]
        lone = sum(weight[s, i] * gradients[s, i] for i in range(4)) / 4
        close(found["agents"][s], expected - 0.6 * lone / scale, rtol=1e-4, atol=1e-6)
        assert kind != "ermas" or (0.6 * lone / scale).norm() > 0.01 * expected.norm()
    assert found["planner"].any() == ("losses/planner_entropy" in metrics) == (kind == "ermas")  # else it rests


@pytest.mark.parametrize("who", ["agents", "planner"])
def test_entropy_bonus_and_direction_of_the_planner(watched, who):
    p = small_problem(**ONE_STEP, tax_annealing=0.0, method="marl")
    name = {"agents": "ent_coef", "planner": "planner_ent_coef"}[who]
    (less, learner, metrics), (more, *_) = (turn(p, "full", **{name: coef}) for coef in (0.0, 2.0))
    joint = {k: torch.cat([games[0][k] for games in watched.games[:2]], 2) for k in watched.games[0][0]}
    other = {"agents": "planner", "planner": "agents"}[who]
    assert torch.equal(less[other], more[other])
    flat = p.nets[who].flat.detach().clone().requires_grad_()
    net = dataclasses.replace(p.nets[who], flat=flat)
    if who == "agents":
        obs, valid = (joint[key].flatten(1, 3).unsqueeze(1) for key in ("obs", "valid"))
        entropy = Categorical(logits=script.log_policy(net, obs, valid)).entropy().mean((1, 2))
    else:
        rewards = joint["planner_rewards"].unflatten(3, (4, 5)).sum(4)
        decisions = {key: joint[f"planner_{key}"] for key in ("obs", "valid", "actions", "logprobs")}
        again = fork(p)
        batch = script.prepare(again, "planner", decisions, rewards, p.args.gamma**5, p.args)
        logp = script.log_policy(net, batch["obs"], batch["valid"])
        entropy = Categorical(logits=logp).entropy().sum(3).mean((1, 2))
        taken = logp.gather(4, batch["actions"].unsqueeze(4)).sum((3, 4))
        gain = (script.standardize(batch["advantages"])[0] * taken).mean(2).sum()
        close(less[who], torch.autograd.grad(gain, flat, retain_graph=True)[0], rtol=1e-5, atol=1e-8)
        close(learner.moments["planner"].flat, again.moments["planner"].flat)
        close(metrics["losses/planner_entropy"], entropy.detach())
    close(more[who] - less[who], 2 * torch.autograd.grad(entropy.sum(), flat)[0], rtol=1e-5, atol=1e-8)


def test_reported_figures(watched):
    p = small_problem()
    _, _, metrics = turn(p, "full")
    assert {name.split("/")[0] for name in metrics} == {"charts", "losses", "ermas"}
    assert all(values.shape == (2,) for values in metrics.values())
    rewards, coin = (torch.cat([games[0][k] for games in watched.games], 2) for k in ("rewards", "coin"))
    close(metrics["charts/episodic_return"], rewards.sum(3).mean((1, 2)))
    close(metrics["charts/productivity"], coin.sum(1).mean(1))


# --------------------------------------------------------------------------------------------------------------- phases


def start(**options):
    args = Args(**(SMALL | options))
    device = script.setup(args)
    env = script.make_env(args, args.num_seeds, "two", device)
    return args, env, script.make_learner(env, script.make_streams(args, device), args)


def short_train(folder, **options):
    """(what training has changed, rows of metrics.csv) of a small run."""
    args, env, learner = start(**options)
    folder.mkdir(exist_ok=True)
    run = runs.Run(folder, [{"seed": args.seed + k} for k in range(args.num_seeds)])
    for phase in script.PHASES:
        script.train(phase, learner, args, run, {})
    return learner, read_rows(folder / "metrics.csv")


@pytest.fixture
def updates(monkeypatch):
    """What each update begins with."""
    seen, real = [], script.update

    def spy(task, learner, stage):
        groups = {who: dict(optimizer.param_groups[0]) for who, optimizer in learner.optimizers.items()}
        begin = SimpleNamespace(
            env=task.env,
            stage=stage,
            nets={name: net.flat.detach().clone() for name, net in learner.nets.items()},
            lr={who: group["lr"] for who, group in groups.items()},
            ent_coef={who: group["ent_coef"] for who, group in groups.items()},
            fresh=not any(optimizer.state for optimizer in learner.optimizers.values()),
            last=learner.last,
            moments={name: m.flat.clone() for name, m in learner.moments.items()},
            lambdas=learner.lambdas,
        )
        seen.append(begin)
        return real(task, learner, stage)

    monkeypatch.setattr(script, "update", spy)
    return seen


def test_phases_and_warm_up(tmp_path, updates):
    options = dict(
        phase_one_timesteps=161,
        phase_two_timesteps=320,
        warmup=0.5,
        labor_constant=50.0,
        eta_train=(0.3,),
        response_steps=0,
    )
    learner, rows = short_train(tmp_path, **options)
    one, two = updates[:3], updates[3:]
    planner = [x.nets["planner"] for x in updates] + [learner.nets["planner"].flat]
    assert len(two) == 4 and [row["global_step"] for row in rows[::2]] == [str(80 * k) for k in range(1, 8)]
    assert [row["charts/phase"] for row in rows] == ["1"] * 6 + ["2"] * 8
    for k, x in enumerate(one):
        assert x.env.tax == "free" and x.env.labor_constant == 50 and x.stage == "selfish"
        assert x.last is None if k == 0 else (x.last.completions == 2 * k - 1).all()
        assert x.lr == {"agents": 2e-3, "planner": 1e-3} and x.ent_coef["agents"] == 0.025
    for k, x in enumerate(two):
        assert x.env.tax == "planner" and x.env.labor_constant == 0 and x.stage == ("full" if k >= 2 else "warm-up")
        assert x.env.tax_warmup == pytest.approx(-4 / 9) and x.env.tax_slope == pytest.approx(0.9 / 4)
        assert x.lr == pytest.approx({"agents": 2e-3 * (1 - k / 4), "planner": 1e-3 * (1 - k / 4)})
        assert x.ent_coef == pytest.approx({"agents": 0.025, "planner": 0.1 - 0.09 * k / 4})
    for x in updates:
        assert x.fresh == (x is one[0] or x is two[0]) and torch.allclose(x.env.eta.cpu(), torch.tensor(0.3))
    assert two[0].last is None and not two[0].moments["planner"].any()
    assert two[0].moments["agents"][0, 0, 2].item() == pytest.approx(1 - 0.9**3)  # they go on
    assert all((x.lambdas == 1).all() for x in updates[:6])
    assert not (updates[6].lambdas == 1).all()
    assert all(torch.equal(planner[0], p) for p in planner[:6]) and not torch.equal(planner[5], planner[6])
    assert not torch.equal(one[0].nets["agents"], one[1].nets["agents"])
    saved = runs.load(tmp_path / "warm_agents.pt")["warm_agents"]
    assert torch.equal(saved["policy"].to(DEVICE), two[0].nets["agents"])
    assert torch.equal(saved["critic"].to(DEVICE), two[0].nets["agents_critic"])


@pytest.mark.parametrize("method", ["marl", "saez", "us-federal", "free-market", "fixed"])
def test_other_methods_agents_learn_for_themselves(tmp_path, updates, method):
    """Without a planner there is nothing to learn in phase two, which is skipped."""
    learner, rows = short_train(tmp_path, method=method, warmup=0.0, phase_two_timesteps=160)
    planned = method == "marl"
    stages = ["response", "full", "full"] if planned else []
    assert [x.stage for x in updates] == ["selfish"] * 2 + stages
    assert [x.env.tax for x in updates] == ["free"] * 2 + ["planner"] * len(stages)
    assert torch.equal(updates[0].nets["planner"], learner.nets["planner"].flat) != planned
    assert not torch.equal(updates[-1].nets["agents"], learner.nets["agents"].flat)
    assert {row["ermas/lambda"] for row in rows} == {"1.0"} and {row["ermas/local_regret"] for row in rows} == {"0.0"}
    assert [row["charts/phase"] for row in rows[4::2]] == (["1.5", "2", "2"] if planned else [])
    assert (tmp_path / "warm_agents.pt").exists()


def test_taxes_for_all_in_the_test(tmp_path, updates):
    """New agents of each risk aversion, phase one without taxes, then under the planner, who keeps its policy."""
    args, _, learner = start(eval_episodes=3, phase_one_timesteps=160, eval_timesteps=160, tax_annealing=0.5)
    planner = learner.nets["planner"].flat
    begin = planner.detach().clone()
    facts = script.play_tests(learner, {}, args, tmp_path)
    assert facts["coin"].shape == (2, 2, 4, 3) and facts["rates"].shape == (2, 2, 7, 3, 4)
    assert [x.env.tax for x in updates] == ["free"] * 2 + ["planner"] * 2
    for x in updates:
        close(x.env.eta.cpu(), torch.tensor([0.1] * 4 + [0.3] * 4))
        assert torch.equal(x.nets["planner"], begin.repeat(2, 1)) and x.env.tax_warmup is None and x.stage == "selfish"
    assert torch.equal(planner, begin)
    assert updates[2].fresh and updates[2].last is None
    agents = [x.nets["agents"] for x in updates]
    assert torch.equal(agents[0][:2], agents[0][2:])  # of a seed the same at first
    assert not torch.equal(agents[1][:2], agents[1][2:])
    assert not torch.equal(agents[0][:2], learner.nets["agents"].flat)  # but not those of training
    before = runs.load(tmp_path / "test_agents.pt")
    assert torch.equal(before["test_agents"]["policy"].to(DEVICE), agents[2])
    # other taxes: another second phase after the same first one
    planner.detach().add_(torch.randn(planner.shape, device=DEVICE))
    other = script.play_tests(learner, {}, args, tmp_path)
    after = runs.load(tmp_path / "test_agents.pt")["test_agents"]
    assert all(torch.equal(before["test_agents"][name], after[name]) for name in after)
    assert not torch.equal(other["coin"], facts["coin"])
    updates.clear()
    skipped = script.play_tests(learner, before, args, tmp_path)
    assert [x.env.tax for x in updates] == ["planner"] * 2
    assert torch.equal(updates[0].nets["agents"], after["policy"].to(DEVICE))
    assert torch.equal(updates[0].moments["agents"], after["moments"].to(DEVICE))
    assert skipped["coin"].shape == other["coin"].shape
    one_eta = dataclasses.replace(args, eval_eta=(0.3,))
    alone = script.play_tests(learner, {}, one_eta, tmp_path)
    if DEVICE.type == "cpu":  # elsewhere rounding depends on the number of runs, and chance on rounding
        assert all(torch.equal(alone[name][0], other[name][1]) for name in alone)


def test_compiled_only_where_asked(monkeypatch):
    args, env, _ = start()
    monkeypatch.setattr(torch, "compile", lambda f, **options: (f, options))
    task = script.make_task(env, args, 2)
    assert task.step == task.wide_step == env.step
    options = {"fullgraph": True, "dynamic": False, "options": {"comprehensive_padding": False}}
    task = script.make_task(env, dataclasses.replace(args, compile=True), 2)
    assert task.step == task.wide_step == (env.step, options)


# ----------------------------------------------------------------------------------------------------------------- runs

OPTIONS = [
    dict(meta_gradient="reptile", inner_steps=2, activation="relu", phase_two_timesteps=300),
    dict(regret_decay=0.0, lambda_damping=0.0, activation="silu", tax_annealing=0.0, num_minibatches=3),
    dict(env_id="economy_v0", method="marl", labor_constant=0.0, num_seeds=1),
    dict(warmup=1.0, ent_coef=0.0, vf_coef=0.0, beta=0.0, lambda_init=0.0),
    dict(warmup=0.0, torch_deterministic=False, hidden_size=5, update_epochs=2),
    dict(method="saez", num_seeds=1, value_decay=0.0, gamma=1.0, gae_lambda=1.0),
    dict(planner="schedule", agent_updates=2, warmup=0.0, anneal_lr=False, eta_train=(0.1, 0.3)),
    dict(planner="schedule", method="marl", objective="inverse_income_utility", num_agents=3, cutoffs=(0.0, 4.0)),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_trains(tmp_path, updates, options):
    learner, rows = short_train(tmp_path, **options)
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    planned = options.get("method", "ermas") in ("ermas", "marl")
    assert rows[-1]["charts/phase"] == ("2" if planned else "1")
    moves = {}
    for name, net in learner.nets.items():
        moves[name] = (net.flat - updates[0].nets[name]).abs().amax(1).min() > 1e-4
    plans = planned and options.get("warmup") != 1
    assert moves["agents"] and moves["planner"] == plans


def test_steps_are_counted(monkeypatch, tmp_path, watched):
    """global_step against the episodes of the joint policy that were played, but for probes."""
    monkeypatch.setattr(script, "probe", lambda task, learner: torch.ones(2))
    _, rows = short_train(tmp_path, inner_steps=2)
    played = sum(games[0]["rewards"].shape[2] * 20 for games in watched.games)
    assert int(rows[-1]["global_step"]) == played


@pytest.mark.slow
@pytest.mark.parametrize("method, alone", [("marl", 1), ("ermas", 2), ("ermas", 1)])
def test_a_seed_does_not_depend_on_the_others(tmp_path, method, alone):
    together, rows = short_train(tmp_path / "together", seed=5, num_seeds=3, method=method)
    own, few = short_train(tmp_path / "alone", seed=6, num_seeds=alone, method=method)
    mine = [str(6 + k) for k in range(alone)]
    assert alike(without_speed(few), without_speed([row for row in rows if row["seed"] in mine]))
    for name in own.nets:
        assert alike(own.nets[name].flat, together.nets[name].flat[1 : 1 + alone])
    assert not torch.equal(together.nets["agents"].flat[0], together.nets["agents"].flat[1])


def flags_of(**options) -> list[str]:
    """Command line of SMALL and `options`."""
    return words(SMALL | options)


def whole_run(folder, **options) -> Path:
    """The folder of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs, "make", partial(MAKE, **SHORT))
        assert call(script, patch, f"--runs-dir={folder}", *flags_of(**options)) == 0
    return only(folder)


LONG = dict(
    phase_one_timesteps=480, response_steps=160, phase_two_timesteps=800, log_interval=200, checkpoint_interval=10**6
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    return whole_run(tmp_path_factory.mktemp("long"), **LONG)


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [4, 6, 7, 8, 11])
def test_a_run_that_stops_in_either_phase_or_at_its_end_goes_on(monkeypatch, tmp_path, uninterrupted, updates, stop_at):
    """As if it had not been stopped, of six updates in phase one, two under random rates and ten in phase two; no
    update is made twice."""
    real = script.update

    def stopping(*rest):
        if len(updates) == stop_at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*rest)

    monkeypatch.setattr(script, "update", stopping)
    assert call(script, monkeypatch, f"--runs-dir={tmp_path}/stopped", *flags_of(**LONG)) == 130
    monkeypatch.setattr(script, "update", real)
    folder, whole = only(tmp_path / "stopped"), uninterrupted
    assert runs.load(folder / "checkpoint.pt")["iteration"] == len(updates) == stop_at
    assert call(script, monkeypatch, f"--resume={folder}") == 0
    assert len([x for x in updates if x.env.eta.ndim == 0]) == 18  # in the test each environment has its own
    ours, theirs = (without_speed(read_rows(f / "metrics.csv")) for f in (folder, whole))
    assert ours == theirs and len(ours) == 2 * (3 + 1 + 4)
    for name in ("checkpoint.pt", "warm_agents.pt", "test_agents.pt", "policy.pt"):
        ours, theirs = (runs.load(f / name) for f in (folder, whole))
        for part in ours.keys() - {"args", "rows"}:
            assert same(ours[part], theirs[part]), (name, part)
    assert (folder / "welfare.csv").read_text() == (whole / "welfare.csv").read_text()


def same(a, b) -> bool:
    """Are two nested things the same to the last bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_report_has_the_means_of_the_test(monkeypatch, tmp_path, capsys):
    args, env, _ = start()
    facts = {name: torch.rand(2, 2, 4, 6) for name in ("coin", "labor", "payment", "income")}
    facts |= {"houses": torch.ones(2, 2, 4, 6), "rates": torch.rand(2, 2, 7, 6, 4)}
    logged, run = [[], []], runs.Run(tmp_path, [{"seed": 1}, {"seed": 2}], [{"global_step": 400}])
    for k in range(2):
        record = SimpleNamespace(log=lambda row, step, k=k: logged[k].append((step, row)), finish=lambda: None)
        run.wandb_runs.append(record)
    table = SimpleNamespace(Table=lambda columns, data: (columns, data), Image=str)
    monkeypatch.setitem(sys.modules, "wandb", table)
    economy.report(run, env, args, facts)
    rows = read_rows(tmp_path / "welfare.csv")
    assert [(row["seed"], row["eta"]) for row in rows] == list(itertools.product("12", ("0.1", "0.3")))
    for row in rows:
        q, s = ("0.1", "0.3").index(row["eta"]), int(row["seed"]) - 1
        assert float(row["productivity"]) == pytest.approx(facts["coin"][q, s].sum(0).mean().item(), rel=1e-5)
        assert float(row["labor"]) == pytest.approx(facts["labor"][q, s].sum(0).mean().item(), rel=1e-5)
        assert float(row["tax_rate"]) == pytest.approx(facts["rates"][q, s].mean().item(), rel=1e-5)
    by_seed = facts["coin"][0].sum(1).mean(1)
    half = 12.706 * (by_seed[0] - by_seed[1]).abs().item() / 2  # t(1) times the standard error
    assert f"{by_seed.mean():.3g} ± {half:.2g}" in capsys.readouterr().out
    for k in range(2):
        ((step, row),) = logged[k]
        columns, data = row["welfare"]
        assert step == 400 and [line[3:5] for line in data] == [[k + 1, 0.1], [k + 1, 0.3]]
        assert columns[:5] == ["env_id", "method", "epsilon", "seed", "eta"] and row["report"].endswith("report.png")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return whole_run(tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_evaluate_takes_flags_of_the_test_and_agents(monkeypatch, capsys, whole, updates):
    before = (whole / "welfare.csv").read_text()
    assert call(script, monkeypatch, f"--evaluate={whole}", f"--eval-agents={whole}/test_agents.pt") == 0
    assert (whole / "welfare.csv").read_text() == before  # the same numbers in the second phase
    assert [x.env.tax for x in updates] == ["planner"]
    updates.clear()
    flags = ["--eval-eta", "0.3", "0.5", "--eval-episodes=3", "--eval-timesteps=160"]
    assert call(script, monkeypatch, f"--evaluate={whole}", *flags) == 0
    assert [row["eta"] for row in read_rows(whole / "welfare.csv")] == ["0.3", "0.5"] * 2 and len(updates) == 4
    assert runs.load(whole / "test_agents.pt")["args"]["eval_eta"] == [0.1, 0.3]  # other runs may rely on it


@pytest.mark.slow
def test_agents_of_another_run(monkeypatch, capsys, tmp_path, whole, updates):
    """--warm-start takes the place of phase one, --eval-agents that of the test's; both must fit."""
    path = whole / "test_agents.pt"
    updates.clear()
    flags = flags_of(method="marl", warm_start=whole, eval_agents=path, planner_hidden_size=5)
    assert call(script, monkeypatch, f"--runs-dir={tmp_path}", *flags) == 0
    assert [x.env.tax for x in updates] == ["planner"] * 4 and updates[0].last is None
    for name, first in (("warm_agents", updates[0]), ("test_agents", updates[3])):
        saved = runs.load(whole / f"{name}.pt")[name]
        assert torch.equal(saved["policy"].to(DEVICE), first.nets["agents"])
        assert torch.equal(saved["critic"].to(DEVICE), first.nets["agents_critic"])
        assert torch.equal(saved["moments"].to(DEVICE), first.moments["agents"])
    rows = read_rows(only(tmp_path) / "metrics.csv")
    assert [row["global_step"] for row in rows[::2]] == ["80", "160", "240"]
    assert {row["charts/phase"] for row in rows} == {"2"}
    folder = only(tmp_path)
    assert call(script, monkeypatch, "--resume", folder) == 0  # its phase two begins with the first update
    assert read_rows(folder / "metrics.csv") == rows


@pytest.mark.slow
def test_the_tests_first_phase_is_played_once(monkeypatch, capsys, tmp_path, updates):
    """By runs in one folder that differ in what untaxed agents do not know; others play their own."""
    assert set(script.TAXED) < {field.name for field in dataclasses.fields(Args)}
    reports = {}
    for folder, options in (
        ("shared", {"method": "marl"}),
        ("shared", {"method": "us-federal"}),
        ("shared", {"method": "us-federal", "objective": "inverse_income_coin"}),
        ("own", {"method": "us-federal"}),
    ):
        updates.clear()
        before = set(tmp_path.glob("*/*"))
        assert call(script, monkeypatch, f"--runs-dir={tmp_path}/{folder}", *flags_of(**options)) == 0
        (run,) = set(tmp_path.glob("*/*")) - before
        assert (run / "test_agents.pt").exists()
        is_reused = "test_agents taken from" in capsys.readouterr().out
        if options["method"] == "us-federal":  # two updates of its own, three of the test
            assert len(updates) == 5 - 2 * is_reused
        reports[folder, *options.values()] = is_reused, (run / "welfare.csv").read_text()
    assert [is_reused for is_reused, _ in reports.values()] == [False, True, False, False]
    assert reports["shared", "us-federal"][1] == reports["own", "us-federal"][1]
    damaged = next(tmp_path.glob("own/*/test_agents.pt"))
    damaged.write_bytes(damaged.read_bytes()[:999])
    args = runs.load(next(tmp_path.glob("own/*/policy.pt")))["args"]
    assert runs.find_part("test_agents", Args(**args), script.TAXED) == {}


@pytest.mark.parametrize("flag", ["--warm-start", "--eval-agents"])
def test_agents_that_do_not_fit_are_refused_by_name(monkeypatch, capsys, tmp_path, whole, flag):
    name = flag.removeprefix("--").replace("-", "_")
    file = {"--warm-start": "warm_agents.pt", "--eval-agents": "test_agents.pt"}[flag]

    def refused(folder=whole, **options) -> str:
        """With `folder`, or the file of it that the flag takes."""
        path = folder if flag == "--warm-start" else folder / file
        assert call(script, monkeypatch, f"--runs-dir={tmp_path}/more", *flags_of(**{name: path}, **options)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(folder) in error and not (tmp_path / "more").exists()
        return error

    changes = dict(seed=2, hidden_size=16, num_seeds=1, activation="relu", env_id="economy_v0")
    changes |= dict(eta_train=(0.3,)) if flag == "--warm-start" else dict(eval_eta=(0.3, 0.1), phase_one_timesteps=99)
    for changed, value in changes.items():
        assert f"--{changed.replace('_', '-')} must be" in refused(**{changed: value})
    assert "no checkpoint at" in refused(tmp_path)
    (tmp_path / file).write_bytes((whole / file).read_bytes()[:999])
    assert "no readable checkpoint" in refused(tmp_path)
    for other in ("checkpoint.pt", *{"warm_agents.pt", "test_agents.pt"} - {file}):
        (tmp_path / file).write_bytes((whole / other).read_bytes())
        assert f"{file.removesuffix('.pt')} is missing" in refused(tmp_path)
    runs.save(tmp_path / file, {"args": {"seed": 1}, file.removesuffix(".pt"): {}})
    assert "--env-id must be None" in refused(tmp_path)


def test_a_checkpoint_of_phase_one_has_no_taxes_to_evaluate(monkeypatch, capsys, tmp_path, whole):
    state = runs.load(whole / "checkpoint.pt")
    runs.save(tmp_path / "checkpoint.pt", state | {"iteration": 2})
    assert call(script, monkeypatch, f"--evaluate={tmp_path}") == 2
    assert "has no taxes yet; go on with --resume" in capsys.readouterr().err


def test_the_papers_sizes(monkeypatch, tmp_path):
    """--preset paper sets PAPER's values; explicit flags win."""
    seen = []
    monkeypatch.setattr(script, "setup", lambda args: seen.append(args) or sys.exit(7))
    for flags in ([], ["--preset=paper"], ["--preset=paper", "--num-envs=6", "--gamma=0.5"]):
        assert call(script, monkeypatch, f"--runs-dir={tmp_path}", *flags) == 7
    default, paper, own = (dataclasses.asdict(args) for args in seen)
    assert default == dataclasses.asdict(Args()) | {"runs_dir": str(tmp_path)}
    assert paper == default | script.PAPER | {"preset": "paper"} and own == paper | {"num_envs": 6, "gamma": 0.5}
    assert paper["env_id"] == "economy_v0"


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(lambda_init=3.0, lambda_max=2.0), "lambda_init must be at most lambda_max"),
        (dict(eval_eta=(0.1, 0.1)), "must have different values"),
        (dict(eval_eta=()), "eval_eta"),
        (dict(eval_eta=(0.1, math.nan)), "eval_eta"),
        (dict(eta_train=(1.0,)), "eta_train"),
        (dict(rate_step=0.0), "rate_step"),
        (dict(value_decay=1.0), "value_decay"),
        (dict(method="maddpg"), "method"),
        (dict(preset="small"), "preset"),
        (dict(meta_gradient="exact"), "meta_gradient"),
        (dict(horizon=0), "horizon"),
    ],
)
def test_wrong_values_and_combinations(options, words):
    with pytest.raises(ValueError, match=words):
        Args(**options)


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.slow
def test_agents_learn_to_build(monkeypatch, tmp_path):
    """Three seeds had 1.5 to 1.7 houses in the first iteration, with a welfare of 7 to 9, 6.2 to 7.6 in this time."""
    monkeypatch.setattr(envs, "make", MAKE)
    options = dict(num_seeds=1, num_envs=16, hidden_size=32, num_minibatches=8, update_epochs=4, log_interval=3200)
    options |= dict(phase_one_timesteps=35_200, phase_two_timesteps=1, method="free-market")
    _, rows = short_train(tmp_path, **options)
    first, last = rows[0], rows[-1]
    assert last["charts/phase"] == "1" and int(last["global_step"]) == 35_200
    assert float(last["charts/houses"]) > 2 * float(first["charts/houses"]) > 2
    assert float(last["charts/welfare"]) > 2 * float(first["charts/welfare"])
