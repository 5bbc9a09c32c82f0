"""envs/bimatrix.py against plain Python: the rules, the exact oracles against brute force and against sampling."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import envs
from envs import bimatrix
from envs.perturb import random_actions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REPEATED, AUGMENTED = bimatrix.TASKS


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def random_payoffs(R: int, C: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, R, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_probs(env: bimatrix.Bimatrix, P: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(P, env.num_states, n, generator=generator, dtype=torch.float64) for n in env.action_sizes]
    return tuple(torch.softmax(2 * value, -1).to(DEVICE) for value in logits)


def always(env: bimatrix.Bimatrix, *actions: int) -> tuple[torch.Tensor, ...]:
    """The joint policy, P = 1, that plays these three actions in all states."""
    hot = [torch.eye(n, dtype=torch.float64, device=DEVICE)[a] for n, a in zip(env.action_sizes, actions)]
    return tuple(p.expand(1, env.num_states, -1) for p in hot)


def by_hand(env: bimatrix.Bimatrix, square, action, q: float) -> tuple[tuple[int, int, int], list[float]]:
    """The next (i, j, a) and the three rewards, from the rules alone."""
    _, R, C = env.payoffs.shape
    moves = {2: [-1, 1], 3: [-1, 0, 1]}[env.num_moves]
    i, j = (min(max(k + moves[m], 0), n - 1) for k, m, n in zip(square, action, (R, C)))
    r1, r2, planner = env.payoffs[:, i, j].tolist()
    if env.max_incentive is not None:
        planner = action[2] * env.payoff_scale * planner - action[2] ** 2
    return (i, j, action[2]), [r1 - q * planner, r2 - q * planner, planner]


def seen_by_hand(env: bimatrix.Bimatrix, square: tuple[int, int, int]) -> list[list[int]]:
    _, R, C = env.payoffs.shape
    i, j, a = ([int(k == value) for k in range(n)] for n, value in zip((R, C, env.action_sizes[2]), square))
    a = a if env.max_incentive is not None else []
    return [i + j + a, j + i + a, i + j + a if env.planner_observes else [1] + [0] * (R + C + len(a) - 1)]


def squares(env: bimatrix.Bimatrix, state: bimatrix.State) -> list[tuple[int, int, int]]:
    """(i, j, a) of each environment, read from what the row player sees."""
    _, R, C = env.payoffs.shape
    i, j, a = env.global_state(state).cpu().split((R, C, env.observations.shape[2] - R - C), 1)
    a = a.argmax(1).tolist() if a.shape[1] else [0] * env.num_envs
    return list(zip(i.argmax(1).tolist(), j.argmax(1).tolist(), a))


# ------------------------------------------------------------------------------------------------------------- payoffs


@pytest.mark.parametrize("size, temptation", [(4, 0.45), (2, 0.1), (5, 0.3)])
def test_social_dilemma_is_a_tragedy_of_the_commons(size, temptation):
    payoffs = bimatrix.social_dilemma(size, temptation)
    assert payoffs.shape == (3, size, size) and payoffs.min() >= 0 and payoffs.max() <= 1
    r1, r2, rp = payoffs.tolist()
    indices = range(size)
    for low, high in itertools.combinations(indices, 2):  # up is strictly dominant
        assert all(r1[high][j] > r1[low][j] for j in indices) and all(r2[i][high] > r2[i][low] for i in indices)
    pure = [
        (i, j)
        for i, j in itertools.product(indices, indices)
        if r1[i][j] == max(row[j] for row in r1) and r2[i][j] == max(r2[i])
    ]
    assert pure == [(size - 1, size - 1)]
    [(x, y)] = bimatrix.nash_equilibria(payoffs)
    assert x.tolist() == y.tolist() == [0.0] * (size - 1) + [1.0]
    assert r1[-1][-1] == r2[-1][-1] == pytest.approx(temptation)
    assert r1[0][0] == r2[0][0] == pytest.approx(1 - temptation) and r1[0][0] > r1[-1][-1]
    assert sorted(sum(rp, []))[-2] < rp[-1][-1] == 1


def test_the_default_game():
    assert torch.equal(envs.make(REPEATED, 1).payoffs, bimatrix.social_dilemma(4, 0.45))


THIRD = [1 / 3] * 3
GAMES = {  # payoffs of row and column, equilibria
    "prisoner's dilemma": ([[3, 0], [5, 1]], [[3, 5], [0, 1]], [([0, 1], [0, 1])]),
    "matching pennies": ([[1, -1], [-1, 1]], [[-1, 1], [1, -1]], [([0.5, 0.5], [0.5, 0.5])]),
    "battle of the sexes": (
        [[3, 0], [0, 2]],
        [[2, 0], [0, 3]],
        [([1, 0], [1, 0]), ([0, 1], [0, 1]), ([0.6, 0.4], [0.4, 0.6])],
    ),
    "rock paper scissors": (
        [[0, -1, 1], [1, 0, -1], [-1, 1, 0]],
        [[0, 1, -1], [-1, 0, 1], [1, -1, 0]],
        [(THIRD, THIRD)],
    ),
    # columns 0 and 2 with 1/2 each; their mixture dominates the one between them
    "not square": ([[4, 1, 0], [0, 1, 4]], [[0, 1, 3], [3, 1, 0]], [([0.5, 0.5], [0.5, 0, 0.5])]),
}


@pytest.mark.parametrize("scale", [1.0, 1e10, 1e-10])
@pytest.mark.parametrize("name", GAMES)
def test_known_equilibria(name, scale):
    r1, r2, expected = GAMES[name]
    found = bimatrix.nash_equilibria(torch.tensor([r1, r2]) * scale)
    assert len(found) == len(expected)
    for (x, y), (a, b) in zip(found, expected):
        np.testing.assert_allclose(x, a, atol=1e-12)
        np.testing.assert_allclose(y, b, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize("q", [0.0, 0.7, "per environment"])
@pytest.mark.parametrize(
    "env_id, shape, fields",
    [
        (REPEATED, (4, 4), {}),
        (REPEATED, (2, 5), {"num_moves": 2, "planner_observes": True}),
        (AUGMENTED, (3, 2), {"planner_observes": True, "payoff_scale": 2.5}),
        (AUGMENTED, (1, 4), {"num_moves": 2, "max_incentive": 5}),
    ],
)
def test_step_against_plain_python(env_id, shape, fields, q):
    B, T = 96, 6
    q = torch.rand(B, generator=torch.Generator().manual_seed(1)) if isinstance(q, str) else q
    env = envs.make(env_id, B, DEVICE, torch.float64, payoffs=random_payoffs(*shape), horizon=T, q=q, **fields)
    assert env.env_id == env_id and env.discrete and env.agents == ("row", "column", "planner")
    assert env.cooperators.tolist() == [False, False, True]
    width = sum(shape) + (0 if env.max_incentive is None else env.max_incentive + 1)
    assert env.obs_sizes == (width, width, width if env.planner_observes else 1)
    assert env.obs_mask.sum(1).tolist() == list(env.obs_sizes) and env.obs_mask[:, 0].all()
    assert env.action_sizes == (env.num_moves, env.num_moves, 1 if env.max_incentive is None else env.max_incentive + 1)
    assert env.action_mask.sum(1).tolist() == list(env.action_sizes)
    weights = torch.as_tensor(q, dtype=torch.float64).expand(B).tolist()
    generator = torch.Generator().manual_seed(0)
    state, obs = env.reset([generator])
    now = squares(env, state)
    for t in range(T + 1):
        assert state.t.tolist() == [t] * B
        assert obs.dtype == torch.float64 and obs.tolist() == [seen_by_hand(env, square) for square in now]
        action = random_actions(env, [generator])
        before = state.index.clone(), state.t.clone(), action.clone()
        arrived, obs, reward, terminated, truncated, info = env.step(state, action, env.draw([generator]))
        assert all(map(torch.equal, before, (state.index, state.t, action)))  # step is pure
        results = [by_hand(env, *row) for row in zip(now, action.tolist(), weights)]
        state, now = arrived, [square for square, _ in results]
        assert squares(env, state) == now
        expected = torch.tensor([rewards for _, rewards in results], dtype=torch.float64)
        torch.testing.assert_close(reward.cpu(), expected, rtol=0, atol=1e-12)
        assert truncated.tolist() == [t + 1 >= T] * B and not terminated.any() and info == {}


@pytest.mark.parametrize("env_id", bimatrix.TASKS)
def test_start(env_id):
    n = 16_000
    env = envs.make(env_id, n, DEVICE)
    state, _ = env.reset(generators(0))
    starts, counts = np.unique(squares(env, state), axis=0, return_counts=True)
    assert starts.tolist() == [[i, j, 0] for i in range(4) for j in range(4)]
    assert abs(counts - n / 16).max() < 5 * (n * 15 / 256) ** 0.5  # five standard deviations
    fixed = dataclasses.replace(env, start=(3, 1), num_envs=5)
    state, obs = fixed.reset(generators(0))
    assert squares(fixed, state) == [(3, 1, 0)] * 5
    assert obs.tolist() == [seen_by_hand(fixed, (3, 1, 0))] * 5
    for game in (env, fixed):  # where the oracles start
        share = torch.zeros(game.num_states, device=DEVICE).index_add(
            0, game.reset(generators(1))[0].index, torch.full((game.num_envs,), 1 / game.num_envs, device=DEVICE)
        )
        torch.testing.assert_close(share, game.start_probs, rtol=0, atol=0.01)


def test_blocks_of_a_reset_depend_on_their_own_generator_only():
    env = envs.make(REPEATED, 60, DEVICE)
    state, obs = env.reset(generators(5, 6, 7))
    for k, seed in enumerate((5, 6, 7)):
        alone, alone_obs = dataclasses.replace(env, num_envs=20).reset(generators(seed))
        block = slice(20 * k, 20 * k + 20)
        assert torch.equal(alone.index, state.index[block]) and torch.equal(alone_obs, obs[block])
    assert not torch.equal(state.index[:20], state.index[20:40])
    with pytest.raises(ValueError, match="multiple of the 7 generators"):
        env.reset(generators(*range(7)))


@pytest.mark.slow
@pytest.mark.parametrize("q", [0.5, torch.linspace(0, 1, 32)])
def test_compiled_step_agrees_and_is_compiled_once(q):
    env = envs.make(AUGMENTED, 32, DEVICE, q=q)
    torch.compiler.reset()
    compiled = torch.compile(env.step, fullgraph=True)
    generator = torch.Generator().manual_seed(3)
    state, _ = env.reset([generator])
    for t in range(5):
        action = random_actions(env, [generator])
        with torch.compiler.set_stance("default" if t == 0 else "fail_on_recompile"):
            result = compiled(state, action, None)
        expected = env.step(state, action, None)
        for a, b in zip((*vars(result[0]).values(), *result[1:5]), (*vars(expected[0]).values(), *expected[1:5])):
            torch.testing.assert_close(a, b)
        state = result[0]


# ------------------------------------------------------------------------------------------------------------- oracles


def play(env: bimatrix.Bimatrix, policies: list, gamma: float, q: float) -> list[float]:
    """Values of one joint policy by walking through all that can happen; policies[player][t][x]: probabilities."""
    _, R, C = env.payoffs.shape
    total = [0.0] * 3

    def walk(square, t, weight):
        if t == env.horizon:
            return
        x = (square[0] * C + square[1]) * env.action_sizes[2] + square[2]
        for action in itertools.product(*map(range, env.action_sizes)):
            chance = weight
            for policy, a in zip(policies, action):
                chance *= policy[t][x][a]
            if chance:
                arrived, rewards = by_hand(env, square, action, q)
                for player, reward in enumerate(rewards):
                    total[player] += chance * gamma**t * reward / env.horizon
                walk(arrived, t + 1, chance)

    for i, j in itertools.product(range(R), range(C)):
        walk((i, j, 0), 0, 1 / (R * C))
    return total


def deterministic(states: int, actions: int) -> list[list[list[float]]]:
    """All maps from states to actions, as probabilities [X][actions]."""
    hot = np.eye(actions).tolist()
    return [[hot[a] for a in choice] for choice in itertools.product(range(actions), repeat=states)]


SMALL = [(REPEATED, (2, 2), {}), (AUGMENTED, (2, 1), {"max_incentive": 1})]  # four states both


@pytest.mark.parametrize("gamma, q", [(1.0, 0.0), (0.8, 0.6)])
@pytest.mark.parametrize("env_id, shape, fields", SMALL)
def test_exact_value_of_all_deterministic_policies(env_id, shape, fields, gamma, q):
    env = envs.make(
        env_id, 1, DEVICE, torch.float64, payoffs=random_payoffs(*shape), num_moves=2, horizon=3, q=q, **fields
    )
    joint = list(itertools.product(*(deterministic(env.num_states, n) for n in env.action_sizes)))
    probs = tuple(torch.tensor(p, dtype=torch.float64, device=DEVICE) for p in zip(*joint))
    expected = torch.tensor([play(env, [[p] * 3 for p in policy], gamma, q) for policy in joint], dtype=torch.float64)
    torch.testing.assert_close(bimatrix.exact_value(env, probs, gamma).cpu(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma, q", [(1.0, 0.0), (0.8, 0.6)])
@pytest.mark.parametrize("player", range(3))
@pytest.mark.parametrize("env_id, shape, fields", SMALL)
def test_best_response_is_the_best_of_all_policies_of_state_and_time(env_id, shape, fields, player, gamma, q):
    env = envs.make(
        env_id, 1, DEVICE, torch.float64, payoffs=random_payoffs(*shape, seed=1), num_moves=2, horizon=2, q=q, **fields
    )
    probs = random_probs(env, 1)
    policies = [[p[0].tolist()] * 2 for p in probs]
    values = []
    for choice in itertools.product(deterministic(env.num_states, env.action_sizes[player]), repeat=2):
        policies[player] = choice
        values.append(play(env, policies, gamma, q)[player])
    assert bimatrix.best_response_value(env, probs, player, gamma).item() == pytest.approx(max(values), abs=1e-12)


@pytest.mark.parametrize("env_id, shape", [(REPEATED, (4, 4)), (AUGMENTED, (2, 3))])
def test_values_and_visits_against_rollouts(env_id, shape):
    n, gamma = 40_000, 0.9
    payoffs = random_payoffs(*shape, seed=2)
    env = envs.make(env_id, n, DEVICE, torch.float64, payoffs=payoffs, horizon=5, q=0.4)
    probs = random_probs(env, 1, seed=3)
    state, _ = env.reset(generators(4))
    torch.manual_seed(5)
    returns = torch.zeros(n, 3, dtype=torch.float64, device=DEVICE)
    visits = torch.zeros(n, env.num_states, dtype=torch.float64, device=DEVICE)
    for t in range(env.horizon):
        visits[torch.arange(n, device=DEVICE), state.index] += 1 / env.horizon
        action = torch.stack([torch.multinomial(p[0, state.index], 1)[:, 0] for p in probs], 1)
        state, _, reward, _, truncated, _ = env.step(state, action, None)
        returns += gamma**t * reward / env.horizon
    assert truncated.all()
    exact = (bimatrix.exact_value(env, probs, gamma)[0], bimatrix.state_visits(env, probs)[0])
    for sampled, value in zip((returns, visits), exact):
        assert ((sampled.mean(0) - value).abs() <= 5 * sampled.std(0) / n**0.5 + 1e-4).all()  # five standard errors


@pytest.mark.parametrize("env_id", bimatrix.TASKS)
def test_regret_and_visits_of_random_policies(env_id):
    env = envs.make(env_id, 1, DEVICE, torch.float64)
    probs, q = random_probs(env, 5), torch.linspace(0, 2, 5, dtype=torch.float64, device=DEVICE)
    gaps = bimatrix.regret(env, probs, 0.9, q)
    assert (gaps >= -1e-12).all() and (gaps[:, :2] > 0.01).all()
    for k in range(5):  # one q per policy, as if each were a game of its own
        alone = bimatrix.regret(dataclasses.replace(env, q=q[k].item()), tuple(p[k : k + 1] for p in probs), 0.9)
        torch.testing.assert_close(alone[0], gaps[k])
    visits = bimatrix.state_visits(env, probs)
    assert visits.shape == (5, env.num_states) and visits.min() >= 0
    torch.testing.assert_close(visits.sum(1), torch.ones_like(q))
    single = envs.make(env_id, 1, DEVICE)  # float32 tables give nearly the same
    torch.testing.assert_close(bimatrix.regret(single, probs, 0.9, q), gaps, rtol=0, atol=1e-5)
    assert single.rewards.dtype == single.reset(generators(0))[1].dtype == torch.float32


def test_moving_up_is_the_equilibrium_of_the_repeated_game():
    env = envs.make(REPEATED, 1, DEVICE, torch.float64)
    up, down = always(env, 2, 2, 0), always(env, 0, 0, 0)
    assert bimatrix.regret(env, up).abs().max() < 1e-12
    assert (bimatrix.regret(env, down)[0, :2] > 0.1).all()
    assert (bimatrix.exact_value(env, down) > bimatrix.exact_value(env, up))[0].tolist() == [True, True, False]
    last = dataclasses.replace(env, start=(3, 3))
    assert bimatrix.exact_value(last, up)[0].tolist() == pytest.approx([0.45, 0.45, 1.0])
    assert bimatrix.state_visits(last, up)[0].tolist() == pytest.approx([0.0] * 15 + [1.0])


def test_gradients_against_finite_differences():
    env = envs.make(
        AUGMENTED, 1, DEVICE, torch.float64, payoffs=random_payoffs(2, 2), horizon=3, max_incentive=1, num_moves=2
    )
    logits = tuple(p.log().requires_grad_() for p in random_probs(env, 2))
    q = torch.tensor([0.3, 0.8], dtype=torch.float64, device=DEVICE)

    def values(*logits):
        probs = tuple(torch.softmax(value, -1) for value in logits)
        return bimatrix.exact_value(env, probs, 0.9, q), bimatrix.regret(env, probs, 0.9, q)

    assert torch.autograd.gradcheck(values, logits, nondet_tol=1e-12)


# ------------------------------------------------------------------------------------------------ settings and pictures


def test_settings():
    env = envs.make(AUGMENTED, 2, DEVICE, continuous_actions=True, num_agents=3)
    assert isinstance(env, bimatrix.Bimatrix) and env.discrete and env.max_incentive == 3 and env.num_states == 64
    assert envs.make(REPEATED, 2).max_incentive is None
    for q in (torch.tensor([0.5, 1.0]), [0.5, 1.0], np.array([0.5, 1.0])):
        assert dataclasses.replace(env, q=q).q.tolist() == [0.5, 1.0]
    assert dataclasses.replace(env, q=torch.tensor(0.5)).q == 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"env_id": "bimatrix_v9"},
            "env_id must be one of simple_spread_v3, .*repeated_bimatrix_v0, .* got 'bimatrix_v9'",
        ),
        ({"num_envs": 0}, "num_envs must be 1 or more, got 0"),
        ({"num_agents": 2}, "num_agents of repeated_bimatrix_v0 must be 3, got 2"),
        ({"damping": 0.5}, "fields of repeated_bimatrix_v0 are payoffs, .*planner_observes, got 'damping'"),
        ({"payoffs": torch.zeros(2, 4, 4)}, r"payoffs must be \[3, R, C\], got shape \(2, 4, 4\)"),
        ({"payoffs": torch.zeros(3, 4)}, r"payoffs must be \[3, R, C\], got shape \(3, 4\)"),
        ({"payoffs": torch.zeros(3, 0, 4)}, r"payoffs must be \[3, R, C\], got shape \(3, 0, 4\)"),
        ({"payoffs": torch.full((3, 2, 2), float("nan"))}, "payoffs must be finite, got .*nan"),
        ({"horizon": 0}, "horizon must be 1 or more, got 0"),
        ({"num_moves": 4}, "num_moves must be 2 or 3, got 4"),
        ({"start": (4, 0)}, r"start must be uniform or a square \(i, j\) of the 4 x 4 grid, got \(4, 0\)"),
        ({"start": (0, -1)}, "start must be .*-1"),
        ({"start": (0.5, 1)}, "start must be .*0.5"),
        ({"start": 3}, "start must be .* got 3"),
        ({"start": "middle"}, "start must be .* got middle"),
        ({"q": torch.zeros(3)}, r"q must be a number or a tensor \[num_envs = 2\], got shape \(3,\)"),
        ({"q": torch.zeros(2, 1)}, "q must be a number or a tensor"),
        ({"q": torch.tensor([0.0, float("inf")])}, "q must be finite"),
        ({"payoff_scale": float("nan")}, "payoff_scale must be finite, got nan"),
        ({"max_incentive": 2}, "max_incentive of repeated_bimatrix_v0 must be None, its planner is passive, got 2"),
        ({"env_id": AUGMENTED, "max_incentive": None}, "max_incentive of .* must be an integer, got None"),
        ({"env_id": AUGMENTED, "max_incentive": -1}, "max_incentive must be .*, got -1"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(**{"env_id": REPEATED, "num_envs": 2, **options})
    assert "\n" not in str(error.value)


def test_wrong_arguments():
    env = envs.make(REPEATED, 2, DEVICE)
    probs, per_env = random_probs(env, 3), dataclasses.replace(env, q=torch.ones(2))
    for call, message in (
        (lambda: bimatrix.exact_value(env, probs[::-1]), "probs must have shapes"),
        (lambda: bimatrix.state_visits(env, probs[:2]), "probs must have shapes"),
        (lambda: bimatrix.best_response_value(env, probs, 3), "player must be 0, 1 or 2, got 3"),
        (lambda: bimatrix.exact_value(env, probs, q=torch.zeros(2)), r"q must be .*P = 3.* got shape \(2,\)"),
        (lambda: bimatrix.regret(per_env, probs), "q must be given"),
        (lambda: bimatrix.social_dilemma(1), "size must be 2 or more, got 1"),
        (lambda: bimatrix.social_dilemma(4, 0.5), "temptation must be between 0 and 0.5, got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("env_id, shape, size", [(REPEATED, (4, 4), 400), (AUGMENTED, (2, 5), 300)])
def test_pictures(env_id, shape, size):
    env = envs.make(env_id, 2, DEVICE, payoffs=random_payoffs(*shape), start=(1, 0))
    state, _ = env.reset(generators(0))
    moved, *_ = env.step(state, torch.tensor([[1, 1, 0], [0, 2, 0]], device=DEVICE), None)
    centres = []
    for where, index in ((state, 1), (moved, 1), (moved, 0)):
        picture = env.render(where, index, size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
        red = (picture[:, size // 14 :] == bimatrix.RED).all(-1)  # the frame, not the bar left of the grid
        centres.append(np.argwhere(red).mean(0))
    cell = (size - 2 * (size // 14)) / max(shape)
    # down and to the right from (1, 0); the other environment stayed
    np.testing.assert_allclose(centres[1] - centres[0], [cell, cell], atol=2)
    np.testing.assert_allclose(centres[2], centres[0], atol=2)


@pytest.mark.slow
def test_speed_and_gif_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "game.gif"
    threads = torch.get_num_threads()
    bimatrix.main(env_id=AUGMENTED, num_envs=8, seconds=0.01, threads=threads, gif=str(path))
    assert "env steps/s" in capsys.readouterr().out and path.read_bytes().startswith(b"GIF")
