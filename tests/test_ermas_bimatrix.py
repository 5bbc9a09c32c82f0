"""ermas_bimatrix.py: sampled quantities against the exact oracles, updates against hand-computed ones, runs."""

import dataclasses
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from commands import alike, on, without_speed

import ermas_bimatrix as script
from envs import bimatrix, runs
from ermas_bimatrix import Args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REPEATED, AUGMENTED = bimatrix.TASKS
SMALL = dict(num_envs=8, num_iterations=12, warmup_steps=2, num_seeds=1, horizon=6, inner_steps=2, cg_steps=4)
SMALL |= dict(log_interval=4, checkpoint_interval=6, eval_iterations=3, eval_q=(0.0, 0.5))
SMALL["method"] = ("ermas",)


def world(**options) -> SimpleNamespace:
    """All parts of a small problem in float64: policies that are not uniform, an arbitrary baseline. All is drawn on a
    CPU, so that it is the same on every device."""
    torch.set_default_dtype(torch.float64)
    args = Args(**(SMALL | options))
    script.setup(args)
    cpu, env = (dataclasses.replace(script.make_env(args, 1, d), dtype=torch.float64) for d in ("cpu", DEVICE))
    task, settings = script.make_task(env, args), len(args.labels) // args.num_seeds
    plain = script.make_task(cpu, args)
    nets = on(DEVICE, {name: script.make_policies(plain, name, settings, name) for name in script.PLAYERS})
    S = len(args.labels)
    for net in nets.values():
        net.flat.detach().mul_(math.sqrt(net.sizes[0]))
    streams = script.envs.make_generators(args.seed, args.num_seeds, "test", torch.device("cpu"))
    values = 0.3 * torch.randn(
        S, 3, env.horizon, env.num_states, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(DEVICE)
    still = SimpleNamespace(step=lambda: None, param_groups=[{}])  # an optimizer that leaves the gradient to look at
    optimizers = {"agents": still, "planner": still}
    script.anneal(optimizers, 0.0, args)
    parts = dict(args=args, env=env, run=task.settings, seen=task.features, nets=nets, optimizers=optimizers)
    return SimpleNamespace(S=S, policies=script.joint_policy(task, nets), values=values, streams=streams, **parts)


def task_of(w):
    return script.Task(w.env, w.args, w.run, w.seen)


def learner_of(w, lambdas=None):
    return script.Learner(w.nets, w.optimizers, lambdas, w.values)


def rollout(w, policies, games):
    return script.rollout(task_of(w), policies, games, w.values)


def games_of(w, count=1):
    return [on(DEVICE, script.draw_noise(w.streams, w.env, w.args)) for _ in range(count)]


def exact_gradient(w, player: int, reward: int) -> torch.Tensor:
    """[S, K] derivative of the exact value of a reward with respect to a player's parameters."""
    name = "planner" if player == 2 else "agents"
    net = dataclasses.replace(w.nets[name], flat=w.nets[name].flat.detach().requires_grad_())
    policies = script.joint_policy(task_of(w), w.nets)
    policies[player] = script.log_policy(net, w.seen[name])[:, 0 if player == 2 else player].exp()
    value = bimatrix.exact_value(w.env, policies, q=w.run["q"])[:, reward].sum()
    return torch.autograd.grad(value, net.flat)[0].unflatten(0, (w.S, -1))[:, 0 if player == 2 else player]


def one_policy(w):
    """All seeds of `w` play the first one's policies, so that they are repetitions of one experiment."""
    for net in w.nets.values():
        net.flat.detach().unflatten(0, (w.S, -1))[:] = net.flat.detach().unflatten(0, (w.S, -1))[:1].clone()
    w.policies = script.joint_policy(task_of(w), w.nets)


def assert_unbiased(samples: torch.Tensor, exact: torch.Tensor):
    """Mean over the first axis within five standard errors everywhere (of rare events these are too small, hence the
    rest), and somewhere far enough from 0 to tell."""
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - exact).abs() <= 5 * error + 3e-4).all()
    assert (exact.abs() > 3 * error.clamp_min(1e-3)).any()


# --------------------------------------------------------------------------------------------------------------- games

PROBLEMS = [
    dict(env_id=REPEATED, q_train=(0.2,)),
    dict(env_id=AUGMENTED, q_train=(0.1,)),
    dict(env_id=AUGMENTED, q_train=(0.1,), planner_observes=True, hidden_size=4),
]


@pytest.mark.parametrize("options", PROBLEMS)
def test_games_follow_the_policies(options):
    n = 20_000
    w = world(num_envs=n, **options)
    [games] = games_of(w)
    states, moves = script.play(w.env, w.policies, games)
    batch = rollout(w, w.policies, games)
    assert torch.equal(batch["states"], states[..., :-1])
    torch.testing.assert_close(
        batch["visits"][0], states[0, :, :-1].flatten().bincount(minlength=w.env.num_states) / (n * w.env.horizon)
    )
    visits = bimatrix.state_visits(w.env, w.policies)[0]
    for player, policy in enumerate(w.policies):  # share of the steps in each state with each move
        hot = torch.zeros(n, w.env.num_states * policy.shape[2], device=DEVICE)
        for t in range(w.env.horizon):
            hot[torch.arange(n), states[0, :, t] * policy.shape[2] + moves[t, player, 0]] += 1 / w.env.horizon
        exact = (visits[:, None] * policy[0]).flatten()
        error = (exact / w.env.horizon / n).sqrt()  # at most, but for steps of a game that depend on each other
        assert ((hot.mean(0) - exact).abs() <= 5 * (hot.std(0) / n**0.5).maximum(error)).all()
    values = bimatrix.exact_value(w.env, w.policies, q=w.run["q"])[0]
    returns = batch["returns"][0, :, 0]
    assert_unbiased(returns, values)
    torch.testing.assert_close(batch["mean"][0], returns.mean(0))
    arrival = w.env.transition[states[0, :, 0], moves[0, 0, 0], moves[0, 1, 0], moves[0, 2, 0]]
    assert torch.equal(arrival, states[0, :, 1])


def test_same_policies_and_numbers_give_the_same_games():
    w = world(num_seeds=2, num_envs=50)
    [games] = games_of(w)
    twice = [p.repeat(2, 1, 1) for p in w.policies]
    twice[0][3] = twice[0][3].flip(-1)  # but the row player of the last run
    states, moves = script.play(w.env, twice, games)
    assert torch.equal(states[0], states[2]) and torch.equal(moves[:, :, 0], moves[:, :, 2])
    assert not torch.equal(states[0], states[1])
    assert torch.equal(states[1, :, 0], states[3, :, 0]) and not torch.equal(states[1], states[3])


@pytest.mark.slow
def test_compiled_games_are_the_same_games():
    w = world(num_seeds=2, horizon=3)
    [games] = games_of(w)
    policies = [p.repeat(3, 1, 1) for p in w.policies]
    found = []
    for compile in (False, True):
        w.args.compile = compile
        found.append(rollout(w, policies, games))
    eager, compiled = found
    assert eager["states"].shape == (6, 8, 3)
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("options", PROBLEMS)
def test_policy_gradients_are_unbiased_whatever_the_baseline(options):
    w = world(num_seeds=100, num_envs=200, horizon=4, **options)
    one_policy(w)
    [games] = games_of(w)
    batch = rollout(w, w.policies, games)
    for player, reward in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 2)):
        if player == 2 and w.env.max_incentive is None:
            continue  # it has one action
        name, index = ("planner", 0) if player == 2 else ("agents", player)
        table = script.score_table(w.env, batch, player, reward)
        scores = torch.zeros(w.S, len(w.seen[name]), *table.shape[1:], device=DEVICE)
        scores[:, index] = table
        gradient = script.policy_gradient(w.nets[name], w.seen[name], scores.flatten(0, 1)).unflatten(0, (w.S, -1))
        assert_unbiased(gradient[:, index], exact_gradient(w, player, reward)[0])
        assert (gradient.sum(1) == gradient[:, index]).all()


def test_the_baseline_follows_the_mean_return_to_go():
    w = world(num_seeds=2, num_envs=30)
    batch = rollout(w, w.policies, games_of(w)[0])
    after = script.follow(w.values, batch, 0.25)
    for s, t, x in ((0, 0, 5 * 4), (1, 3, 7 * 4 + 1), (1, 5, 63)):
        there = batch["states"][s, :, t] == x
        for player in range(3):
            old = w.values[s, player, t, x]
            new = old + 0.25 * (batch["returns"][s, there, t, player].mean() - old) if there.any() else old
            torch.testing.assert_close(after[s, player, t, x], new)
    seen = torch.zeros_like(w.values[:, 0]).flatten(1).scatter(1, batch["cell"].flatten(1), 1.0)
    assert torch.equal((after != w.values).all(1), seen.view_as(w.values[:, 0]) > 0)


# --------------------------------------------------------------------------------------------------------- trust region


def test_conjugate_gradient_solves_linear_systems():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 12, 12, generator=generator, dtype=torch.float64)
    matrix, b = root @ root.mT + torch.eye(12), torch.randn(5, 12, generator=generator, dtype=torch.float64)
    b[3] = 0
    x = script.conjugate_gradient(lambda v: (matrix @ v[..., None])[..., 0], b, 30)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-7, atol=1e-9)
    early = script.conjugate_gradient(lambda v: (matrix @ v[..., None])[..., 0], b, 3)
    assert not torch.allclose(early, x, rtol=1e-3)


def agents_policy(w):
    """`policy` as the trust region takes it: log-probabilities [P, X, M] of flat [P, K], P = S * 2."""
    return lambda f: script.log_policy(dataclasses.replace(w.nets["agents"], flat=f), w.seen["agents"]).flatten(0, 1)


@pytest.mark.parametrize("hidden_size", [0, 4])
def test_fisher_product_against_the_enumerated_matrix(hidden_size):
    w = world(env_id=REPEATED, num_seeds=2, hidden_size=hidden_size)
    policy, flat = agents_policy(w), w.nets["agents"].flat.detach()
    generator = torch.Generator(DEVICE).manual_seed(0)
    visits = torch.rand(4, w.env.num_states, generator=generator, device=DEVICE)
    visits = visits / visits.sum(1, keepdim=True)
    vector = torch.randn(flat.shape, generator=generator, device=DEVICE)
    product = script.fisher_product(policy, flat, visits, vector)
    slopes = torch.func.jacrev(policy)(flat)  # [P, X, M, P, K]
    for p in range(4):
        weight = visits[p, :, None] * policy(flat)[p].exp()
        fisher = torch.einsum("xa,xak,xal->kl", weight, slopes[p, :, :, p], slopes[p, :, :, p])
        torch.testing.assert_close(product[p], fisher @ vector[p], rtol=1e-9, atol=1e-12)


def trust_region_problem(**options):
    w = world(env_id=REPEATED, num_seeds=2, num_envs=64, **options)
    batch = rollout(w, w.policies, games_of(w)[0])
    scores = torch.stack([script.score_table(w.env, batch, i, i) for i in range(2)], 1).flatten(0, 1)
    flat, visits = w.nets["agents"].flat.detach(), batch["visits"].repeat_interleave(2, 0)
    return w, agents_policy(w), flat, scores, visits, {"logp": agents_policy(w)(flat), "visits": visits}


def kl(anchor, policy, flat):
    terms = anchor["logp"].exp() * (anchor["logp"] - policy(flat))
    return (anchor["visits"][..., None] * terms).sum((1, 2))


@pytest.mark.parametrize("hidden_size", [0, 4])
@pytest.mark.parametrize("rho", [1e-4, 0.5])
def test_trust_region_step(rho, hidden_size):
    w, policy, flat, scores, visits, anchor = trust_region_problem(hidden_size=hidden_size, cg_steps=40)

    def step(flat, scores):
        return script.trust_region_step(policy, flat, {"scores": scores, "visits": visits}, anchor, rho, w.args)

    moved = step(flat, scores)
    gain = (scores * ((policy(moved) - policy(flat)).exp() - 1)).sum((1, 2))
    assert (gain > 0).all() and (kl(anchor, policy, moved) <= rho).all()
    if rho == 1e-4:  # nearly linear objective, quadratic KL: the best point is known, and half of the way is found
        gradient = torch.func.grad(lambda f: (scores * policy(f)).sum())(flat)
        unit = torch.eye(flat.shape[1], device=DEVICE)
        fisher = [script.fisher_product(policy, flat, visits, v.expand_as(flat)) for v in unit]
        natural = torch.linalg.solve(torch.stack(fisher, 2) + w.args.cg_damping * unit, gradient)
        best = (2 * rho * (gradient * natural).sum(1)).sqrt()
        assert (gain > 0.45 * best).all() and (gain < 1.1 * best).all()
    else:
        assert kl(anchor, policy, moved).max() > 0.5 * rho
    none = scores.clone()
    none[2] = 0
    assert torch.equal(step(flat, none)[2], flat[2])  # nothing to gain
    torch.testing.assert_close(step(flat, none)[[0, 1, 3]], moved[[0, 1, 3]])  # each problem for itself
    for _ in range(4):
        moved = step(moved, scores)
        assert (kl(anchor, policy, moved) <= rho).all()


# ----------------------------------------------------------------------------------------------------------- deviations


def deviate(w, games):
    """(estimate, regrets, kl, the joint policy's batches)."""
    first = rollout(w, w.policies, games[0])
    found, joint = script.deviate(task_of(w), learner_of(w), first, games[1:])
    return found["gradient"], found["regrets"], found["kl"], joint


def deviation_by_hand(w, games, i: int):
    """The same for agent i alone: its gradients along the path [M + 1][S, K], displacement, regret, and final KL."""
    net, seen = w.nets["agents"], w.seen["agents"][i : i + 1]

    def policy(flat):
        return script.log_policy(dataclasses.replace(net, flat=flat), seen)[:, 0]

    start = flat = net.flat.detach().unflatten(0, (w.S, 2))[:, i]
    path, gains, anchor = [], [], None
    for k, numbers in enumerate(games):
        policies = list(w.policies)
        policies[i] = policy(flat).exp()
        batch, joint = (rollout(w, p, numbers) for p in (policies, w.policies))
        scores = torch.zeros_like(policies[i])
        for s, x, a, gain in zip(*(v.flatten() for v in by_step(w, batch, i))):
            scores[s, x, a] += gain / w.args.num_envs
        leaf = flat.clone().requires_grad_()
        path.append(torch.autograd.grad((scores * policy(leaf)).sum(), leaf)[0])
        gains.append(batch["mean"][:, i] - joint["mean"][:, i])
        if anchor is None:
            first = anchor = {"logp": policy(flat), "visits": batch["visits"]}
        rho = w.args.rho
        if w.args.trust_region == "literal":
            anchor, rho = {"logp": policy(flat), "visits": batch["visits"]}, rho / w.args.inner_steps
        if k < len(games) - 1:
            own = {"scores": scores, "visits": batch["visits"]}
            flat = script.trust_region_step(policy, flat, own, anchor, rho, w.args)
    return path, flat - start, torch.stack(gains).amax(0).clamp_min(0), kl(first, policy, flat)


def by_step(w, batch, player: int):
    """Seed, state, move and advantage of a player's own reward, each [S, B, T]."""
    seed = torch.arange(w.S, device=DEVICE)[:, None, None].expand_as(batch["states"])
    return seed, batch["states"], batch["moves"][player], batch["advantages"][..., player]


@pytest.mark.parametrize("hidden_size, trust_region", [(0, "anchor"), (4, "literal")])
def test_deviations_and_their_gradients_by_hand(hidden_size, trust_region):
    options = dict(num_seeds=2, num_envs=16, inner_steps=3, rho=0.3, hidden_size=hidden_size, q_train=(0.3,))
    w = world(env_id=REPEATED, trust_region=trust_region, **options)
    games = games_of(w, 4)
    results = {}
    for name, change in {
        "reptile": {},
        "fomaml": dict(meta_gradient="fomaml"),
        "reptile rescaled": dict(meta_rescale=True),
        "fomaml rescaled": dict(meta_gradient="fomaml", meta_rescale=True),
        "displacement": dict(correction="displacement"),
    }.items():
        w.args = dataclasses.replace(
            w.args, **dict(meta_gradient="reptile", meta_rescale=False, correction="gradients") | change
        )
        estimate, regrets, size, batches = deviate(w, games)
        results[name] = estimate.unflatten(0, (w.S, 2))
    assert len(batches) == 3
    for i in range(2):
        (g1, g2, g3, g4), shift, regret, kl_by_hand = deviation_by_hand(w, games, i)
        mean = (g1 + g2 + g3) / 3
        close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
        close(results["reptile"][:, i], mean)
        close(results["fomaml"][:, i], g4)
        close(results["reptile rescaled"][:, i], g1 + 4 * 3 / 2 * (mean - g1))
        close(results["fomaml rescaled"][:, i], g1 + 2 * (g4 - g1))
        length = mean.norm(dim=1, keepdim=True)
        close(results["displacement"][:, i], length * shift / shift.norm(dim=1, keepdim=True))
        close(regrets[:, i], regret)
        close(size[:, i], kl_by_hand)
        assert regret.max() > 0 and not torch.allclose(g1, g4, rtol=0.01)


def test_deviations_are_played_beside_the_joint_policy():
    w = world(num_seeds=2)
    games = games_of(w, 3)
    for batch, numbers in zip(deviate(w, games)[3], games[1:]):
        joint = rollout(w, w.policies, numbers)
        for name in ("states", "returns", "mean"):
            torch.testing.assert_close(batch[name], joint[name])


def test_anchored_deviations_stay_in_the_ball_and_literal_ones_do_not():
    for rho in (0.02, 0.5):
        w = world(env_id=REPEATED, num_seeds=3, num_envs=400, inner_steps=6, rho=rho, cg_steps=10)
        games = games_of(w, 7)
        assert (deviate(w, games)[2] <= rho * (1 + 1e-9)).all()
        w.args.trust_region = "literal"
        assert (deviate(w, games)[2] > 1.5 * rho).any()


@pytest.mark.parametrize(
    "share, options",
    [(0.8, dict(env_id=REPEATED)), (0.5, dict(q_train=(0.3,))), (0.7, dict(env_id=REPEATED, hidden_size=8))],
)
def test_local_regret_is_most_of_the_exact_regret(share, options):
    """It is a lower bound, up to noise: some gains lie behind losses, or further away than the trust region."""
    w = world(num_seeds=3, num_envs=3000, inner_steps=5, rho=8.0, cg_steps=10, **options)
    local = deviate(w, games_of(w, 6))[1]
    exact = bimatrix.regret(w.env, w.policies, q=w.run["q"])[:, :2]
    assert (local < exact + 0.01).all() and local.mean() > share * exact.mean() > 0.05


def test_no_regret_in_equilibrium():
    w = world(env_id=REPEATED, num_seeds=2, num_envs=1000)
    with torch.no_grad():
        w.nets["agents"].flat.zero_()
        w.nets["agents"].layers()[0][1][:, 2] = 6.0  # up
    w.policies = script.joint_policy(task_of(w), w.nets)
    assert bimatrix.regret(w.env, w.policies)[:, :2].max() < 0.01
    assert deviate(w, games_of(w, 3))[1].max() < 0.01


# --------------------------------------------------------------------------------------------------------------- search


def search(w, lambdas, games, warm=False):
    """(the direction in which the agents go up [S, 2, K], lambdas afterwards, metrics)"""
    learner = learner_of(w, lambdas)
    metrics = script.update(task_of(w), learner, games, len(games) > 1 and not warm)
    return -w.nets["agents"].flat.grad.unflatten(0, (w.S, 2)), learner.lambdas, metrics


PLAIN = dict(ent_coef=0.0, lambda_damping=0.0)


@pytest.mark.parametrize("cross_terms", [False, True])
def test_direction_of_the_agents(cross_terms):
    w = world(env_id=REPEATED, num_seeds=80, num_envs=60, horizon=4, cross_terms=cross_terms, q_train=(0.2,), **PLAIN)
    one_policy(w)
    lambdas = torch.tensor([0.7, 1.8], device=DEVICE).repeat(w.S, 1)
    games = games_of(w, 3)
    gradient = {(i, r): exact_gradient(w, i, r)[0] for i in range(2) for r in range(3)}
    directions = {}
    for beta in (0.0, 0.6):
        w.run["beta"][:] = beta
        directions[beta] = search(w, lambdas, games)[0]
    for i in range(2):
        own = 0.7 * gradient[i, 0] + 1.8 * gradient[i, 1] if cross_terms else (0.7, 1.8)[i] * gradient[i, i]
        assert_unbiased(directions[0.0][:, i], own - gradient[i, 2])
    estimate = deviate(w, games)[0].unflatten(0, (w.S, 2))
    torch.testing.assert_close(directions[0.6], directions[0.0] - 0.6 * lambdas[..., None] * estimate)


@pytest.mark.parametrize("method", ["marl", "risk", "domain-randomization"])
def test_baselines_do_not_care_about_the_planner(method):
    w = world(method=(method,), env_id=REPEATED, num_seeds=80, num_envs=100, horizon=4, q_train=(0.2,), **PLAIN)
    one_policy(w)
    direction, lambdas, _ = search(w, w.run["lambda_init"][:, None].repeat(1, 2), games_of(w))
    for i in range(2):
        assert_unbiased(direction[:, i], exact_gradient(w, i, i)[0])
    assert (lambdas == 1).all()


def test_direction_of_the_planner():
    w = world(num_seeds=80, num_envs=100, horizon=4, q_train=(0.3,), planner_observes=True, **PLAIN)
    one_policy(w)
    script.plan(task_of(w), learner_of(w), games_of(w)[0])
    assert_unbiased(-w.nets["planner"].flat.grad, exact_gradient(w, 2, 2)[0])


def test_entropy_bonus():
    w = world(env_id=REPEATED, **PLAIN)
    games, lambdas = games_of(w), torch.zeros(1, 2, device=DEVICE)
    plain = search(w, lambdas, games)[0]
    script.anneal(w.optimizers, 0.75, dataclasses.replace(w.args, ent_coef=2.0))  # a quarter is left
    direction, _, metrics = search(w, lambdas, games)
    visits = rollout(w, w.policies, games[0])["visits"]
    flat = w.nets["agents"].flat.detach().requires_grad_()
    policy = torch.distributions.Categorical(logits=agents_policy(w)(flat).unflatten(0, (1, 2)))
    entropy = (visits[:, None] * policy.entropy()).sum(-1)
    torch.testing.assert_close(metrics["losses/entropy"], entropy.mean(1).detach())
    expected = torch.autograd.grad(0.5 * entropy.sum(), flat)[0].unflatten(0, (1, 2))
    torch.testing.assert_close(direction - plain, expected)


def test_lambda_follows_the_regret():
    w = world(epsilon=(0.0, 9.0), method=("ermas", "marl"), lambda_lr=2.0, lambda_max=3.0, num_seeds=2)
    games = games_of(w, 3)
    for start in (0.01, 1.0, 2.99):
        before = torch.full((w.S, 2), start, device=DEVICE)
        _, after, metrics = search(w, before, games)
        for k, player in enumerate(("row", "column")):
            regret = metrics[f"ermas/local_regret_{player}"]
            assert regret.max() > 0.01 and torch.equal(metrics[f"ermas/lambda_{player}"], before[:, k])
            rise = torch.minimum(start + 2.0 * regret[:2], torch.tensor(3.0))
            torch.testing.assert_close(after[:2, k], rise)  # epsilon 0
            assert (after[2:4, k] == 0).all()  # epsilon 9
            assert (after[4:, k] == start).all()  # marl
    still = torch.full((w.S, 2), 1.0, device=DEVICE)
    assert torch.equal(search(w, still, games, warm=True)[1], still)
    fixed = world(epsilon=(0.0,), num_seeds=2, fixed_lambda=True)
    assert torch.equal(search(fixed, still[:2], games)[1], still[:2])
    assert len(Args(fixed_lambda=True, epsilon=(0.1, 0.2), method=("ermas",), num_seeds=1).labels) == 1


def test_warm_up_has_no_deviations_and_lambda_0():
    w = world(env_id=REPEATED, num_seeds=2, lambda_init=(0.7,), **PLAIN)
    games, lambdas = games_of(w, 3), w.run["lambda_init"][:, None].repeat(1, 2)
    direction, _, metrics = search(w, lambdas, games, warm=True)
    w.run["beta"][:] = 0
    torch.testing.assert_close(direction, search(w, lambdas, games)[0])  # the joint policy's games are the same
    assert not metrics["ermas/local_regret_row"].any() and not metrics["ermas/deviation_kl"].any()


def test_damping_of_lambda():
    """The agents' own reward counts lambda + kappa (regret - epsilon), within the bounds of lambda."""
    w = world(num_seeds=2, epsilon=(0.05,), lambda_max=2.0, ent_coef=0.0, lambda_damping=0.0)
    games, lambdas = games_of(w, 3), torch.tensor([[1.0, 0.1], [0.5, 1.9]], device=DEVICE)
    for kappa in (0.5, -5.0, 50.0):
        w.args.lambda_damping = 0.0
        _, _, metrics = search(w, lambdas, games)
        regrets = torch.stack([metrics[f"ermas/local_regret_{player}"] for player in ("row", "column")], 1)
        weight = (lambdas + kappa * (regrets - 0.05)).clamp(0, 2)
        expected = search(w, weight, games)[0]
        w.args.lambda_damping = kappa
        direction, after, _ = search(w, lambdas, games)
        torch.testing.assert_close(direction, expected)
        torch.testing.assert_close(after, (lambdas + w.args.lambda_lr * (regrets - 0.05)).clamp(0, 2))
    fixed = world(num_seeds=2, fixed_lambda=True, ent_coef=0.0, lambda_damping=50.0)
    direction = search(fixed, lambdas, games)[0]
    fixed.args.lambda_damping = 0.0
    torch.testing.assert_close(search(fixed, lambdas, games)[0], direction)


# ----------------------------------------------------------------------------------------------------------- baselines


def test_learning_rewards_by_hand():
    """Noise on the agents' rewards under domain randomization, the planner's logarithm under risk, nothing else."""
    w = world(method=("ermas", "marl", "domain-randomization", "risk"), q_train=(0.4,), num_envs=5)
    assert w.S == 4
    [games] = games_of(w)
    assert not w.run.pop("noise").any()
    clean = rollout(w, w.policies, games)
    noise = 2 * torch.rand(4, 2, w.env.num_states, 9, generator=torch.Generator().manual_seed(1)) - 1
    w.run["noise"] = noise.to(DEVICE) * w.run["randomized"][:, None, None, None]
    batch = rollout(w, w.policies, games)
    states, moves = script.play(w.env, w.policies, games)
    T, lowest = w.env.horizon, -9.0  # incentive 3 at payoff 0
    for s in range(4):
        for b in range(5):
            rewards = []
            for t in range(T):
                x, (m1, m2, _), y = states[s, b, t], moves[t, :, s, b], states[s, b, t + 1]
                r1, r2, rp = w.env.rewards[y].tolist()
                r1, r2, utility = r1 - 0.4 * rp, r2 - 0.4 * rp, rp
                if s == 2:
                    r1, r2 = (r + noise[2, k, x, 3 * m1 + m2].item() for k, r in enumerate((r1, r2)))
                if s == 3:
                    utility = math.log(rp - lowest + 1)
                rewards.append([r1, r2, utility])
            expected = torch.tensor(rewards, device=DEVICE).flip(0).cumsum(0).flip(0) / T
            torch.testing.assert_close(batch["returns"][s, b], expected)
            for t in range(T):
                torch.testing.assert_close(
                    batch["advantages"][s, b, t], expected[t] - w.values[s, :, t, states[s, b, t]]
                )
    assert torch.equal(batch["mean"], clean["mean"])  # what is reported is the game's own reward
    torch.testing.assert_close(batch["mean"][3, 2], w.env.rewards[states[3, :, 1:], 2].mean())


def test_noise_is_redrawn_for_randomized_runs_only(tmp_path, monkeypatch):
    seen, real = [], script.update

    def spy(task, *rest):
        seen.append(task.settings["noise"].clone())
        return real(task, *rest)

    monkeypatch.setattr(script, "update", spy)
    options = dict(method=("marl", "domain-randomization"), num_seeds=2, randomize_interval=5, search_steps=3)
    short_train(tmp_path, "run", num_iterations=5, **options)
    assert len(seen) == 15  # updates
    for k, noise in enumerate(seen):
        assert not noise[:2].any() and noise[2:].abs().max() <= 1 and noise[2:].min() < -0.99 < 0.99 < noise[2:].max()
        assert abs(noise[2:].mean()) < 0.05 and not torch.equal(noise[2], noise[3])
        assert torch.equal(noise, seen[k - k % 5]) and (k < 5 or not torch.equal(noise[2], seen[k - 5][2]))


# ---------------------------------------------------------------------------------------------------------------- runs


def short_train(tmp_path, name, **options):
    """(networks, rows of metrics.csv) of a small run."""
    args = Args(**(SMALL | options))
    task = script.make_task(script.make_env(args, 1, script.setup(args)), args)
    settings = len(args.labels) // args.num_seeds
    nets = {player: script.make_policies(task, player, settings, player) for player in script.PLAYERS}
    run = runs.Run(tmp_path / name, args.labels)
    run.dir.mkdir()
    script.train(task, script.make_learner(task, nets), run, {})
    return nets, run.rows


def assert_same_runs(ours, theirs):
    """Rows of metrics.csv: all that training has computed must be alike, the oracles' sums but for rounding."""
    ours, theirs = without_speed(ours), without_speed(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs):
        for name in one:
            if name.startswith(("eval/", "ermas/exact")):
                assert float(one[name]) == pytest.approx(float(other[name]), abs=1e-5)
            else:
                assert alike(one[name], other[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [dict(search_steps=2), dict(hidden_size=16, num_envs=5), dict(method=("marl", "domain-randomization", "risk"))],
)
def test_a_seed_does_not_depend_on_the_others(tmp_path, options):
    together, rows = short_train(tmp_path, "together", seed=5, num_seeds=3, **options)
    for k in range(3):
        alone, own = short_train(tmp_path, f"alone{k}", seed=5 + k, **options)
        for name, n in (("agents", 2), ("planner", 1)):
            ours = together[name].flat.unflatten(0, (-1, 3, n))[:, k]
            assert alike(alone[name].flat, ours.flatten(0, 1))
        assert_same_runs(own, [row for row in rows if row["seed"] == 5 + k])


@pytest.mark.slow
def test_a_setting_does_not_depend_on_the_others(tmp_path):
    options = dict(epsilon=(0.05, 0.3), q_train=(0.0, 0.5), num_seeds=2)
    together, rows = short_train(tmp_path, "together", method=("ermas", "marl"), **options)
    alone, own = short_train(tmp_path, "alone", epsilon=(0.3,), q_train=(0.5,), num_seeds=2)
    mine = slice(6, 8)  # after three settings
    assert alike(alone["agents"].flat, together["agents"].flat.unflatten(0, (-1, 2))[mine].flatten(0, 1))
    assert alike(alone["planner"].flat, together["planner"].flat[mine])
    label = {"method": "ermas", "epsilon": 0.3, "q_train": 0.5}
    assert_same_runs(own, [row for row in rows if label.items() <= row.items()])


OPTIONS = [
    dict(method=("ermas", "marl", "domain-randomization", "risk"), epsilon=(0.1, 0.2), search_steps=2),
    dict(meta_gradient="fomaml", trust_region="literal", meta_rescale=True),
    dict(correction="displacement", cross_terms=True, planner_observes=True),
    dict(hidden_size=8, activation="relu", env_id=REPEATED, fixed_lambda=True),
    dict(hidden_size=8, activation="silu", inner_steps=1),
    dict(max_incentive=0, beta=(0.0, 1.0), lambda_init=(0.0, 2.0)),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_trains(tmp_path, options):
    nets, rows = short_train(tmp_path, "run", **options)
    assert len(rows) == 3 * len(Args(**(SMALL | options)).labels)
    names = [name for name in rows[-1] if "/" in name]
    assert all(math.isfinite(float(row[name])) for row in rows for name in names)
    fresh, _ = short_train(tmp_path, "fresh", **(options | dict(num_iterations=1, learning_rate=1e-30)))
    assert (nets["agents"].flat - fresh["agents"].flat).abs().amax(1).min() > 1e-3
    moves = options.get("env_id") != REPEATED and options.get("max_incentive") != 0
    assert ((nets["planner"].flat - fresh["planner"].flat).abs().amax(1).min() > 1e-3) == moves


def test_the_warm_up_rests_the_planner(tmp_path):
    before, _ = short_train(tmp_path, "before", num_iterations=1, warmup_steps=1)
    rested, rows = short_train(tmp_path, "rested", num_iterations=12, warmup_steps=12)
    assert torch.equal(before["planner"].flat, rested["planner"].flat)
    assert {row["ermas/lambda_row"] for row in rows} == {1.0}


def test_steps_are_counted(tmp_path, monkeypatch):
    """global_step against the games that were played."""
    played, real = [], script.play

    def spy(env, probs, noise):
        played.append(len(probs[0]) * noise["start"].shape[1] * len(noise["action"]))
        return real(env, probs, noise)

    monkeypatch.setattr(script, "play", spy)
    _, rows = short_train(tmp_path, "run", warmup_steps=0, search_steps=2, inner_steps=3, num_seeds=2)
    assert 2 * int(rows[-1]["global_step"]) == sum(played)


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_everybody_for_itself_reaches_the_equilibrium(tmp_path):
    options = dict(method=("marl",), env_id=REPEATED, num_seeds=5, num_envs=64, horizon=16, num_iterations=300)
    _, rows = short_train(tmp_path, "run", **options, log_interval=300)
    assert len(rows) == 5
    for row in rows:
        assert float(row["ermas/exact_regret_row"]) < 0.02 and float(row["ermas/exact_regret_column"]) < 0.02
        assert float(row["eval/planner_reward"]) > 0.9


@pytest.mark.slow
def test_agents_do_as_much_harm_as_epsilon_allows(tmp_path):
    options = dict(env_id=REPEATED, epsilon=(0.05, 0.3), num_seeds=2, num_envs=64, horizon=16, inner_steps=3)
    options |= dict(cg_steps=10, num_iterations=250, warmup_steps=50, log_interval=250)
    _, rows = short_train(tmp_path, "run", **options)
    reward = [float(row["eval/planner_reward"]) for row in rows]
    regret = [float(row["ermas/exact_regret_row"]) + float(row["ermas/exact_regret_column"]) for row in rows]
    assert min(reward[:2]) > max(reward[2:]) + 0.2 and max(regret[:2]) < min(regret[2:]) - 0.2
    assert [value / 2 for value in regret] == pytest.approx([0.05, 0.05, 0.3, 0.3], rel=0.3)


# ---------------------------------------------------------------------------------------------------------- test games


def test_test_games_are_learned_and_valued_exactly():
    torch.set_default_dtype(torch.float32)
    options = dict(num_seeds=2, method=("marl", "risk"), eval_q=(0.0, 1.0), eval_iterations=80, num_envs=64)
    args = Args(**(SMALL | options | dict(horizon=16)))
    task = script.make_task(script.make_env(args, 1, script.setup(args)), args)
    planner = script.make_policies(task, "planner", 2, "planner")
    values = {}
    for incentive in (0, 3):
        with torch.no_grad():
            planner.flat.zero_()
            planner.layers()[0][1][:, incentive] = 30.0  # always this one
        found = script.play_tests(task, planner)
        values[incentive], regret = found["planner_reward"], found["agent_regret"]
        assert values[incentive].shape == (4, 2) and regret[:, 0].max() < 0.03
        assert torch.equal(values[incentive][:2], values[incentive][2:])  # new agents of a seed are always the same
    assert values[0].abs().max() < 1e-6  # nothing paid, nothing received
    # Q = 0: they go up, where the planner gets 3 * 4 - 9; Q = 1: they go down, where it gets -9
    assert values[3][:, 0].min() > 1.5 and values[3][:, 1].max() < -7.5 and regret[:, 1].max() < 0.5


# ---------------------------------------------------------------------------------------------------------- wrong input


def test_values_that_do_not_go_together():
    for options, name in (
        (dict(epsilon=()), "epsilon"),
        (dict(method=()), "method"),
        (dict(method=("maddpg",)), "method"),
        (dict(beta=(0.1, 0.1)), "beta must have different values"),
        (dict(epsilon=(0.1, math.nan)), "epsilon"),
        (dict(beta=(0.1, -1.0)), "beta"),
        (dict(lambda_init=(3.0,), lambda_max=2.0), "lambda_init must be at most lambda_max"),
        (dict(meta_rescale=True, inner_steps=1), "meta_rescale"),
        (dict(correction="displacement", meta_gradient="fomaml"), "correction"),
        (dict(payoff_scale=0.0), "payoff_scale"),
        (dict(num_moves=4), "num_moves"),
    ):
        with pytest.raises(ValueError, match=name):
            Args(**(SMALL | options))


PAYOFFS = {
    "missing": None,
    "no JSON": "[[[1, 2",
    "no numbers": '[[["a"]], [[1]], [[1]]]',
    "a dictionary": '{"row": [[1]]}',
    "two matrices": "[[[1, 2]], [[3, 4]]]",
    "ragged": "[[[1, 2], [3]], [[1, 2], [3, 4]], [[1, 2], [3, 4]]]",
    "not a number": "[[[NaN]], [[1]], [[1]]]",
}


PAYOFFS |= {
    "deep": "[" * 100_000,
    "a large number": f"[[[{'9' * 400}]], [[1]], [[1]]]",
    "numbers too large to add": "[[[1e30]], [[1]], [[1]]]",
    "empty": "[]",
}


@pytest.mark.parametrize("kind", PAYOFFS)
def test_wrong_payoffs(tmp_path, kind):
    path = tmp_path / "payoffs.json"
    if PAYOFFS[kind] is not None:
        path.write_text(PAYOFFS[kind])
    with pytest.raises(ValueError, match="payoffs must be"):
        script.make_env(Args(payoffs=str(path)), 1, DEVICE)


def test_other_payoffs(tmp_path):
    payoffs = torch.rand(3, 2, 5).tolist()
    (tmp_path / "payoffs.json").write_text(json.dumps(payoffs))
    assert script.make_env(Args(payoffs=str(tmp_path / "payoffs.json")), 1, DEVICE).payoffs.tolist() == payoffs
    short_train(tmp_path, "run", payoffs=str(tmp_path / "payoffs.json"), num_iterations=2)
