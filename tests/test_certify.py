"""benchmarks/certify.py: constants of known networks, Jacobians against finite differences, Theorem 3.3 against exact
losses of small games, play against the script's own evaluation, runs of all scripts."""

import csv
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT, finish, fourth_order, only, start_script

import envs
import ernie_coma
import ernie_maddpg
import ernie_mappo
import ernie_qcombo
from envs import particle, perturb, robustness

sys.path.insert(0, str(ROOT / "benchmarks"))

import certify  # noqa: E402

SHORT = [
    "--wandb-mode=disabled",
    "--no-cuda",
    "--num-seeds=2",
    "--num-envs=2",
    "--total-timesteps=100",
    "--eval-episodes=0",
]
SPREAD = ["--env-id=simple_spread_v3", "--hidden-size=8", "--log-interval=50", "--checkpoint-interval=100", *SHORT]
STREETS = [
    "--no-compile",
    "--wandb-mode=disabled",
    "--no-cuda",
    "--num-seeds=2",
    "--num-envs=2",
    "--total-timesteps=120",
    "--eval-episodes=0",
]
STREETS += ["--hidden-size=8", "--horizon=40", "--warmup=10", "--eval-warmup=2", "--eval-seconds=3", "--model=krauss"]
STREETS += ["--log-interval=60", "--checkpoint-interval=60"]
MADDPG = ["--learning-starts=50", "--batch-size=16", "--buffer-size=500", "--no-capture-video", *SPREAD]
MAPPO = ["--num-minibatches=2", "--no-capture-video", *SPREAD]
RUNS = {
    "coma": (ernie_coma, ["--rollout-steps=5", *SPREAD]),
    "coma_lights": (ernie_coma, ["--rollout-steps=10", *STREETS]),
    "qcombo": (ernie_qcombo, ["--buffer-size=100", "--batch-size=8", *STREETS]),
    "maddpg": (ernie_maddpg, ["--epsilon-units=std", "--norm=linf", *MADDPG]),
    "maddpg_discrete": (ernie_maddpg, ["--no-continuous-actions", *MADDPG]),
    "mappo": (ernie_mappo, ["--no-continuous-actions", "--share-parameters", "--epsilon-units=raw", *MAPPO]),
    "mappo_normal": (ernie_mappo, ["--state-dependent-std", *MAPPO]),
    "mappo_speakers": (ernie_mappo, ["--no-continuous-actions", *MAPPO, "--env-id=simple_speaker_listener_v4"]),
}


def policies(sizes=(4, 6, 5, 3), activation="tanh", norm="l2", unit=(1.0,) * 4, team=(True, True), gain=3.0):
    """Random policies of two seeds and two agents in float64, the second with an action less, as a Run."""
    streams = envs.make_generators(1, 2, "test", torch.device("cpu"))
    net = ernie_maddpg.init_mlp(list(sizes), activation, 2, streams)
    net = replace(net, flat=gain * net.flat.detach().double())
    mask = torch.ones(2, sizes[-1], dtype=torch.bool)
    mask[1, -1] = False
    obs_mask = torch.ones(2, sizes[0], dtype=torch.bool)
    env = SimpleNamespace(action_mask=mask, obs_mask=obs_mask, discrete=True, cooperators=torch.tensor(team))
    args = ernie_maddpg.Args(num_seeds=2, norm=norm, activation=activation)
    weights = [w.unflatten(0, (2, 2)) for w, _ in net.layers()]
    weights[-1] = weights[-1] * mask[..., None]
    divergence = partial(ernie_maddpg.divergence, "kl")
    policy = robustness.Policy(partial(ernie_maddpg.policy, net, env=env), lambda z: z, divergence, norm=norm)
    unit = torch.tensor(unit, dtype=torch.float64).expand(2, 2, 1, -1)
    return certify.Run(args, env, policy, weights, None, unit=unit)


def observations(count=200, entries=4, size=2.0):
    generator = torch.Generator().manual_seed(2)
    return size * torch.randn(2, 2, count, entries, generator=generator, dtype=torch.float64)


def bounds_of(run, slope=1.0):
    layers = [w.double() for w in (run.weights[0] * run.unit, *run.weights[1:])]
    found = certify.global_constants(layers, run.env.action_mask, slope)
    return {name: value * run.reach for name, value in found.items()}, layers[-1]


def trained(name, tmp_path, monkeypatch):
    """Folder of a short run, made in this process, without a report."""
    module, flags = RUNS[name]
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", f"--runs-dir={tmp_path}", *flags])
    module.main()
    return only(tmp_path)


def asked(**options):
    return certify.Args(run_dirs=(Path("."),), **({"radii": (0.01, 0.1), "samples": 50} | options))


# --------------------------------------------------------------------------------------------------------------------
# Constants


def test_global_constants_of_layers_made_by_hand():
    mask = torch.ones(1, 2, dtype=torch.bool)
    one = torch.diag(torch.tensor([3.0, 4.0])).double().view(1, 1, 2, 2)
    found = certify.global_constants([one], mask, 1.0)
    assert found["below"].item() == 1 and found["output"].item() == pytest.approx(4)
    # less their mean, logits (3 x, 4 y) are (3 x - 4 y) / 2 (1, -1), whose length is at most 5 / sqrt(2)
    assert found["probabilities"].item() == pytest.approx(2.5)
    two = [torch.tensor([[0.0, 2.0], [5.0, 0.0], [0.0, 0.0]]).double().view(1, 1, 3, 2)]
    two += [torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]).double().view(1, 1, 2, 3)]
    found = certify.global_constants(two, mask, 1.1)
    assert found["below"].item() == pytest.approx(5.5) and found["output"].item() == pytest.approx(5.5 * 6**0.5)
    assert found["probabilities"].item() == pytest.approx(0)  # both logits are always the same
    padded = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]).double().view(1, 1, 3, 2)
    found = certify.global_constants([padded], torch.tensor([[True, True, False]]), 1.0)
    assert found["probabilities"].item() == pytest.approx(2.5)  # an action that is not there changes nothing


def test_l1_norm_is_the_largest_over_directions():
    matrices = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = torch.nn.functional.normalize(torch.randn(3, 100_000, dtype=torch.float64), dim=0)
    sampled = (matrices @ v).abs().sum(1).amax(1)
    found = certify.l2_to_l1(matrices)
    assert (found >= sampled).all() and torch.allclose(found, sampled, rtol=1e-3)
    many = torch.randn(2, 9, 3, dtype=torch.float64)
    assert (certify.l2_to_l1(many) >= (many @ v).abs().sum(1).amax(1)).all()


def test_softmax_changes_by_at_most_its_constant():
    logits = torch.cat([torch.zeros(1, 2), 3 * torch.randn(1000, 2)]).double()
    steep = certify.l2_to_l1(torch.func.vmap(torch.func.jacrev(lambda z: z.softmax(0)))(logits))
    assert steep.max().item() == pytest.approx(0.5**0.5)
    logits = 3 * torch.randn(1000, 5, dtype=torch.float64)
    steep = certify.l2_to_l1(torch.func.vmap(torch.func.jacrev(lambda z: z.softmax(0)))(logits))
    assert 0.4 < steep.max().item() <= 0.5**0.5


def test_jacobian_against_finite_differences():
    run, x = policies(), observations(3)
    rows = certify.jacobian(run.network, x)
    for o in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[o] = 1.0
        slope = fourth_order(lambda h, step=step: run.network(x + h * step), 1e-4)
        assert torch.allclose(rows[..., o], slope, atol=1e-8)


@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_global_bounds_hold_for_jacobians_and_for_what_steps_do(activation, norm):
    run, x, radius = policies(activation=activation, norm=norm, unit=(1.0, 0.5, 3.0, 0.0)), observations(), 0.5
    bounds, _ = bounds_of(run, certify.SLOPES[activation])
    for kind in ("output", "probabilities"):
        assert (certify.local_constants(run, x, kind) <= bounds[kind] + 1e-9).all()
    delta = perturb.rescale(torch.randn_like(x), radius, norm)
    before, after = run.network(x), run.network(x + run.unit * delta)
    assert ((after - before).norm(dim=-1) <= radius * bounds["output"]).all()
    assert ((after.softmax(-1) - before.softmax(-1)).abs().sum(-1) <= radius * bounds["probabilities"]).all()


def test_local_constants_are_the_largest_change_of_small_steps():
    run, x, h = policies(unit=(1.0, 0.5, 3.0, 0.0)), observations(5), 1e-6
    v = torch.nn.functional.normalize(torch.randn(5_000, 4, dtype=torch.float64), dim=1)
    for kind, link, order in (("output", lambda z: z, 2), ("probabilities", lambda z: z.softmax(-1), 1)):
        found = certify.local_constants(run, x, kind)
        for m in range(5):
            start = x[:, :, m : m + 1]
            moved = link(run.network(start + run.unit * h * v)) - link(run.network(start))
            steepest = torch.linalg.vector_norm(moved, order, dim=-1).amax(2) / h
            assert torch.allclose(found[:, :, m], steepest, rtol=0.05)
            assert (found[:, :, m] >= 0.9999 * steepest).all()


def test_constants_are_in_the_unit_of_epsilon():
    plain, small = policies(), policies(unit=(0.1,) * 4)
    x, (bounds, _), (tenth, _) = observations(20), bounds_of(plain), bounds_of(small)
    for kind in ("output", "probabilities"):
        assert torch.allclose(tenth[kind], 0.1 * bounds[kind])
        assert torch.allclose(certify.local_constants(small, x, kind), 0.1 * certify.local_constants(plain, x, kind))
    # one unit of linf in each of three live entries is a step of sqrt(3) in l2
    plain, box = (policies(norm=norm, unit=(1.0, 0.1, 0.0, 1.0)) for norm in ("l2", "linf"))
    reach = box.reach
    assert reach.shape == (2, 2, 1) and torch.allclose(reach, torch.full_like(reach, 3**0.5))
    for kind in ("output", "probabilities"):
        wider = 3**0.5 * certify.local_constants(plain, x, kind)
        assert torch.allclose(certify.local_constants(box, x, kind), wider)


def test_search_nearby_finds_the_steepest_point_of_a_tanh():
    run = policies(sizes=(1, 1, 2), unit=(1.0,))
    for weight in run.weights:
        weight.fill_(1.0)
    run.network = lambda x: torch.cat([x.tanh(), 0 * x], -1)
    x = torch.tensor([1.0, -2.0, 0.1]).double().view(1, 1, 3, 1).expand(2, 2, -1, -1)
    found = certify.largest_nearby(run, x, "output", 0.5, envs.make_generators(1, 2, "n", torch.device("cpu")))
    nearest = torch.tensor([0.5, 1.5, 0.0]).double()
    exact = 1 - nearest.tanh().square()
    assert (found <= exact + 1e-9).all() and (found[..., :2] >= 0.999 * exact[:2]).all()
    assert (found >= certify.local_constants(run, x, "output")).all()


def test_greedy_actions_stay_within_the_radius_and_change_where_it_is_exact():
    run = policies(sizes=(4, 3))  # linear: the radius is the distance to the nearest other action
    x = observations(100)
    bounds, last = bounds_of(run)
    z, mask = run.network(x), run.env.action_mask
    radius = certify.greedy_radius(z, last, bounds["below"])
    best = z.argmax(-1)
    nearest, changed = torch.full_like(radius, math.inf), torch.zeros_like(radius, dtype=torch.bool)
    for b in range(3):
        w = last.unsqueeze(2).expand(-1, -1, 100, -1, -1)
        pick = best[..., None, None].expand(-1, -1, -1, 1, 4)
        towards = w[..., b, :] - w.gather(3, pick).squeeze(3)  # [S, N, M, O]
        reaches = (best != b) & mask[:, None, b]
        step = torch.nn.functional.normalize(towards, dim=-1) * radius[..., None]
        changed |= reaches & (run.network(x + 1.001 * step).argmax(-1) != best)
        assert (run.network(x + 0.999 * step).argmax(-1) == best).all()
        gap = (z.gather(3, best[..., None]).squeeze(3) - z[..., b]) / towards.norm(dim=-1)
        nearest = torch.where(reaches, torch.minimum(nearest, gap), nearest)
    assert torch.allclose(radius, nearest) and changed.all()
    deep = policies()
    bounds, last = bounds_of(deep)
    radius = certify.greedy_radius(deep.network(x), last, bounds["below"])
    for _ in range(10):
        step = 0.999 * radius[..., None] * torch.nn.functional.normalize(torch.randn_like(x), dim=-1)
        assert (deep.network(x + step).argmax(-1) == deep.network(x).argmax(-1)).all()


# --------------------------------------------------------------------------------------------------------------------
# Theorem 3.3


def chain(seed, steps, gamma, epsilon, weight):
    """A game of two states with observations -0.3 and 0.3 and two actions of probabilities softmax(weight o, 0): the
    clean value, the worst and the best under perturbations of at most epsilon, from state 0, and the states' clean
    probabilities [T, 2]. Values are linear in the probability, which is monotone in o: the worst is at an end."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(2, 2, generator=generator, dtype=torch.float64)
    moves = torch.rand(2, 2, generator=generator, dtype=torch.float64).round(decimals=1)  # to state 1
    o = torch.tensor([-0.3, 0.3], dtype=torch.float64)
    shifts = torch.tensor([0.0, -epsilon, epsilon], dtype=torch.float64)
    p = torch.sigmoid(weight * (o[:, None] + shifts))  # [state, shift] of action 0
    clean = worst = best = torch.zeros(2, dtype=torch.float64)
    for _ in range(steps):

        def backed_up(value):
            q = rewards + gamma * (value[0] * (1 - moves) + value[1] * moves)
            return p * q[:, :1] + (1 - p) * q[:, 1:]  # [state, shift]

        clean, worst, best = backed_up(clean)[:, 0], backed_up(worst).amin(1), backed_up(best).amax(1)
    visits, at = [], torch.tensor([1.0, 0.0], dtype=torch.float64)
    for _ in range(steps):
        visits.append(at)
        to_one = (at * (p[:, 0] * moves[:, 0] + (1 - p[:, 0]) * moves[:, 1])).sum()
        at = torch.stack([1 - to_one, to_one])
    tv = (p - p[:, :1]).abs().amax(1)  # [state]
    return clean[0], worst[0], best[0], rewards.max() - rewards.min(), torch.stack(visits) @ tv


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_bounds_hold_in_a_game_whose_worst_loss_is_known(gamma):
    steps, weight, tightest = 12, 2.0, 0.0
    # softmax(w o, 0) changes by at most w / 2 in l1 per unit of o, which is what the network's constant says
    layer = torch.tensor([[weight], [0.0]], dtype=torch.float64).view(1, 1, 2, 1)
    constant = certify.global_constants([layer], torch.ones(1, 2, dtype=torch.bool), 1.0)["probabilities"].item()
    assert constant == pytest.approx(weight / 2)
    for seed in range(30):
        for epsilon in (0.01, 0.1, 1.0):
            clean, worst, best, width, visited = chain(seed, steps, gamma, epsilon, weight)
            changes = torch.tensor([constant * epsilon], dtype=torch.float64)
            loss, tv = max(clean - worst, best - clean), certify.total_variation(changes)
            bound = certify.value_loss(certify.parted_anywhere(tv, steps), width, gamma)
            along = certify.value_loss(certify.parted_along(visited), width, gamma)
            assert loss <= bound + 1e-12 and loss <= along + 1e-12
            tightest = max(tightest, loss / bound)
            times = torch.arange(1, steps + 1)
            added = width / 2 * (gamma ** (times - 1) * (times * changes).clamp(max=2)).sum()
            assert bound <= added + 1e-12
            if gamma < 1:
                assert added <= certify.printed_bound(changes, width, gamma) / 2 + 1e-12
    assert tightest > 0.3


def test_bound_is_attained_where_one_mistake_costs_all_that_follows():
    # two agents must both do their part at every step to be paid 1; perturbed, agent i fails with probability tv_i
    tv, gamma, steps = torch.tensor([0.1, 0.25], dtype=torch.float64), 0.9, 7
    value = sum(gamma**t * ((1 - tv[0]) * (1 - tv[1])).item() ** (t + 1) for t in range(steps))
    loss = sum(gamma**t for t in range(steps)) - value
    parted = certify.parted_anywhere(certify.total_variation(2 * tv), steps)
    assert certify.value_loss(parted, 1.0, gamma).item() == pytest.approx(loss, abs=1e-12)
    assert certify.total_variation(torch.tensor([0.0, 5.0])).item() == 1  # no more than all can change
    assert certify.parted_along(torch.tensor([0.5, 0.2, 0.9])).tolist() == pytest.approx([0.5, 0.7, 1.0])
    # as printed: 2 L eps / (1 - gamma)^2 for rewards in [-1, 1]
    changes = torch.tensor([0.2, 0.3], dtype=torch.float64)
    assert certify.printed_bound(changes, 2.0, 0.9).item() == pytest.approx(2 * 0.5 / 0.01)


def test_width_of_rewards_of_crypto():
    env = particle.make("simple_crypto_v3", 500, continuous_actions=False)
    streams, seen = [torch.Generator().manual_seed(1)], []
    state, _ = env.reset(streams)
    for _ in range(env.horizon):
        state, _, reward, *_ = env.step(state, perturb.random_actions(env, streams), env.draw(streams))
        seen.append(reward[:, env.cooperators].mean(1))
    seen = torch.stack(seen)
    assert seen.max() - seen.min() == certify.REWARDS["simple_crypto_v3"] and seen.abs().max() == 2


# --------------------------------------------------------------------------------------------------------------------
# Runs


def test_perturbations_stay_in_the_ball_and_leave_opponents_alone():
    x, streams = observations(50), envs.make_generators(1, 2, "p", torch.device("cpu"))
    for norm, order in (("l2", 2), ("linf", math.inf)):
        run = policies(norm=norm, unit=(1.0, 0.5, 3.0, 0.0), team=(True, False))
        for mode in ("gaussian", "adversarial"):
            delta = certify.perturbation(run, x, mode, 0.2, streams)
            length = torch.linalg.vector_norm((delta / run.unit.clamp_min(1e-9))[..., :3], order, dim=-1)
            assert (length[:, 0] <= 0.2 + 1e-6).all() and length[:, 0].max() > 0.19
            assert not delta[:, 1].any() and not delta[..., 3].any()


@pytest.mark.parametrize("name", ["maddpg_discrete", "mappo_normal"])
def test_play_is_the_evaluation_of_robustness(name, tmp_path, monkeypatch, capsys):
    run = certify.load(trained(name, tmp_path, monkeypatch), asked(episodes=6))
    run.sampled = False
    clean, x = certify.play(run, certify.streams(run, "a"), kept=2)
    assert clean.shape == (2, 6, 25) and x.shape == (2, 3, 50, 18)
    run.measure_unit(x)
    attacked = replace(run.policy, unit=run.unit, ascent_steps=5, starts=1)
    for mode, family in (("clean", "clean"), ("adversarial", "mad")):
        shared = certify.streams(run, "a")  # the module draws the attack's numbers and the game's from one stream
        rewards, _ = certify.play(run, shared, shared, mode, 0.5)
        theirs = robustness.evaluate(run.env, attacked, certify.streams(run, "a"), family, 0.5).mean(2)
        assert torch.allclose(rewards.sum(2), theirs, atol=1e-4), family
    assert torch.equal(clean, certify.play(run, certify.streams(run, "a"))[0])


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_all_scripts(name, tmp_path, monkeypatch, capsys):
    folder, flags = trained(name, tmp_path, monkeypatch), ["--samples=50"]
    flags += ["--seconds=3", "--warmup=2"] if name in ("coma_lights", "qcombo") else ["--episodes=300"]
    monkeypatch.setattr(sys, "argv", ["certify.py", str(folder), "--radii", "0.1", "0.01", *flags])
    capsys.readouterr()
    certify.main()
    printed = capsys.readouterr().out
    with open(folder / "certificates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        label = row["quantity"], row["radius"], row["seed"], row["agent"]
        assert label not in found and math.isfinite(float(row["value"]))
        found[label] = float(row["value"])
    players = {(row["seed"], row["agent"]) for row in rows if row["agent"] != "team"}
    lights, speakers = name in ("coma_lights", "qcombo"), name == "mappo_speakers"
    assert len(players) == 2 * (4 if lights else 2 if speakers else 3)
    discrete, sampled = name not in ("maddpg", "mappo_normal"), name in ("coma", "coma_lights") or "mappo" in name
    sampled = sampled and discrete
    for player in players:
        for kind in ("output", "probabilities") if discrete else ("output",):
            mean, high, top = (found[f"{kind}, local, {part}", "", *player] for part in ("mean", "95%", "largest"))
            nearby = [found[f"{kind}, nearby, largest", radius, *player] for radius in ("0.01", "0.1")]
            assert 0 <= mean <= 1.00001 * top and high <= 1.00001 * top  # rounding of a mean
            assert top <= nearby[0] <= nearby[1]
            assert max(nearby) <= found[f"{kind}, global", "", *player] * (1 + 1e-5)
        for radius in ("0.01", "0.1") if discrete else ():
            certified = found["best action kept", radius, *player]
            assert certified <= found["best action kept under MAD", radius, *player] <= 1
    losses = [label for label in found if label[0].startswith("loss")]
    assert bool(losses) == sampled and ("no bound of the loss" in printed) == (not sampled)
    for quantity, radius, seed, agent in losses:
        part, what = quantity.split(": ")
        assert agent == "team"
        if what == "bound":
            trivial = found[f"{part}: trivial bound", "", seed, agent]
            value = found[quantity, radius, seed, agent]
            assert value == pytest.approx(trivial * found[f"{part}: bound / trivial", radius, seed, agent])
            assert value <= trivial * (1 + 1e-9)
            for measured in ("Gaussian", "MAD"):
                assert abs(found[f"{part}: {measured}", radius, seed, agent]) <= value + 1e-6
            if "gamma" in part:
                assert value <= found[f"{part}: bound as printed", radius, seed, agent] / 2


@pytest.mark.parametrize("name", ["mappo", "mappo_normal", "mappo_speakers"])
def test_weights_are_those_of_observations_and_of_actions_there_are(name, tmp_path, monkeypatch, capsys):
    run = certify.load(trained(name, tmp_path, monkeypatch), asked())
    flat = torch.load(only(tmp_path) / "checkpoint.pt", weights_only=True)["nets"]["actor"]
    O, A = run.env.obs_mask.shape[1], run.env.action_mask.shape[1]
    inputs, count = (O + 3, 1) if name == "mappo" else (O, run.env.num_agents)
    assert [w.shape[2:] for w in run.weights] == [(8, O), (8, 8), (A, 8)]
    net = flat.unflatten(0, (2, count))[1, min(1, count - 1)]  # second seed, second agent
    std = run.std[1, 1]  # [1, O]
    first = torch.where(std > 0, net[: 8 * inputs].view(8, inputs)[:, :O] / std, 0.0)
    assert torch.equal(run.weights[0][1, 1], first)
    at = 8 * (inputs + 1) + 8 * 9
    last = net[at : at + 8 * A].view(A, 8) * run.env.action_mask[1, :, None]
    assert (
        torch.equal(run.weights[2][1, 1], last) and run.network(torch.zeros(2, run.env.num_agents, 1, O)).shape[-1] == A
    )
    padding = ~run.env.action_mask
    assert not run.weights[2][:, padding].any() and padding.any() == (name == "mappo_speakers")


def test_vacuous_bounds_are_called_so_and_intervals_need_seeds():
    run = policies()
    run.args = replace(run.args, num_seeds=2)
    trivial = ("loss, undiscounted: trivial bound", "estimate", "", torch.tensor([10.0, 20.0]))
    full = ("loss, undiscounted: bound", "estimate", 0.1, torch.tensor([9.95, 20.0]))
    half = ("loss, undiscounted: bound", "estimate", 0.01, torch.tensor([5.0, 20.0]))
    lines = certify.table([trivial, half, full], run).splitlines()
    assert len(lines) == 2 and "vacuous" not in lines[0] and lines[1].endswith("vacuous")
    assert lines[1].count("vacuous") == 1 and "0.01: 12.5 ±95 " in lines[1]
    assert "±" not in certify.table([("x", "measured", "", torch.tensor([1.0]))], run)


def test_foreign_folders_get_one_line(tmp_path, monkeypatch, capsys):
    def refused(folder, *flags):
        monkeypatch.setattr(sys, "argv", ["certify.py", str(folder), *flags])
        with pytest.raises(SystemExit) as stop:
            certify.main()
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    assert "no folder of a run" in refused(tmp_path / "nowhere")
    (tmp_path / "args.json").write_text("nonsense")
    assert "no folder of a run" in refused(tmp_path)
    (tmp_path / "args.json").write_text('{"script": "ernie_maddpg"}')
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    assert "no readable checkpoint" in refused(tmp_path)
    assert "radii" in refused(tmp_path, "--radii", "-1")
    assert "episodes" in refused(tmp_path, "--episodes", "0")


@pytest.mark.slow
def test_command_line(tmp_path, monkeypatch):
    folder = trained("coma", tmp_path, monkeypatch)
    flags = ["--radii", "10", "--samples=30", "--episodes=2"]
    out, _ = finish(start_script("benchmarks/certify.py", folder, *flags, is_forked=False))
    assert "probabilities, global" in out and "10.0: " in out and "vacuous" in out and "50 observations each" in out
    assert (folder / "certificates.csv").stat().st_size > 0
