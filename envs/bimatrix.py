"""The constrained repeated bimatrix game of ERMAS (Zhao et al. 2021, sections 5.1, 5.3), batched, with exact oracles.

Player "row" moves the index i of a square of an R x C grid, player "column" its index j, and both are paid by the
square they arrive at: r1(i, j) and r2(i, j). The "planner", ERMAS's robust actor, moves nobody. In
`repeated_bimatrix_v0` it is passive and gets r_p(i, j); in `augmented_bimatrix_v0` it chooses an integer incentive a
and gets a * payoff_scale * r_p(i, j) - a^2. Where q > 0 the players have reason to hurt it: they get r_k - q * (its
reward). All three choose at once, so a reward is a function of the new state (i, j, a) alone and a game is a few small
tables, which `exact_value`, `best_response_value`, `regret` and `state_visits` read without sampling.

    env = make("augmented_bimatrix_v0", num_envs=4096, q=0.5)
    state, obs = env.reset([torch.Generator().manual_seed(0)])
    state, obs, reward, terminated, truncated, info = env.step(state, action, env.draw(generators))

Speed, and a GIF of a random policy:

    python -m envs.bimatrix --env-id augmented_bimatrix_v0 --gif bimatrix.gif

Axes: B environments, P joint policies, R rows, C columns, A1 = A + 1 incentives 0..A (1 where the planner is passive),
X = R * C * A1 states (i, j, a) in this order, M moves, O observation entries, T steps. Players are 0 row, 1 column,
2 planner. Payoffs have no unit.
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from envs import Description, new_figure, print_speed, runs, save_gif
from envs.perturb import random_actions
from envs.robustness import half_interval as interval

TASKS = ("repeated_bimatrix_v0", "augmented_bimatrix_v0")
DARK, BRIGHT, RED, BLUE = (40, 50, 95), (250, 225, 130), (200, 80, 70), (66, 110, 190)


def social_dilemma(size: int = 4, temptation: float = 0.45) -> Tensor:
    """[3, size, size] float64 payoffs in [0, 1] of row, column and planner. With x = i / (size - 1), y = j / (size - 1)
    and f(x) = 1 - (1 - x)^2:

    r1 = temptation * f(x) + (1 - temptation) * (1 - y), r2 the same with x and y exchanged, r_p = (x + y) / 2.

    Moving up is strictly dominant, so the one Nash equilibrium is the last square, best for the planner. It pays each
    player `temptation`, the first square 1 - temptation: a tragedy of the commons. The last steps up gain little, so
    that a player can leave them out at little regret.
    """
    if size < 2:
        raise ValueError(f"size must be 2 or more, got {size}")
    if not 0 < temptation < 0.5:
        raise ValueError(f"temptation must be between 0 and 0.5, got {temptation}")
    x = torch.linspace(0, 1, size, dtype=torch.float64)[:, None]
    r1 = temptation * (1 - (1 - x) ** 2) + (1 - temptation) * (1 - x.T)
    return torch.stack((r1, r1.T, (x + x.T) / 2))


def load_payoffs(path: str) -> Tensor:
    """[3, R, C] payoffs of row, column and planner from a JSON file. Raises ValueError if it holds no such matrices."""
    try:
        payoffs = torch.tensor(json.loads(Path(path).read_text()), dtype=torch.float64)
    except (OSError, ValueError, TypeError, RuntimeError, OverflowError, RecursionError) as error:
        raise ValueError(f"payoffs must be a JSON file with three R x C matrices, got {path!r} ({error})") from None
    if payoffs.ndim != 3 or len(payoffs) != 3 or not bool((payoffs.abs() <= 1e6).all()):
        shape = list(payoffs.shape)
        raise ValueError(f"payoffs must be three R x C matrices of numbers up to 1e6, got shape {shape} in {path!r}")
    return payoffs


@dataclasses.dataclass
class State:
    index: Tensor  # [B] int64, (i * C + j) * A1 + a
    t: Tensor  # [B] int64, steps since reset


@dataclasses.dataclass(frozen=True, eq=False)
class Bimatrix(Description):
    """A description without state; `dataclasses.replace(env, q=0.5)` is the same game with another q.

    `planner_observes` is off by default: a planner that sees the position can answer each square as it comes. Blind, it
    commits to incentives without knowing where the others will be, and needs robustness the most. Its observation is
    then one entry, always 1.
    """

    num_envs: int
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    payoffs: Tensor = dataclasses.field(default_factory=social_dilemma)  # [3, R, C]: row, column, planner
    horizon: int = 16  # steps of an episode
    num_moves: int = 3  # 3: index - 1, stay, index + 1; 2: index - 1, index + 1
    start: str | tuple[int, int] = "uniform"  # or the square (i, j); the planner's last action is 0 at the start
    max_incentive: int | None = None  # A; None: the planner is passive
    payoff_scale: float = 4.0  # times the planner's payoff where it acts; 4 makes 2 the best incentive at payoff 1
    q: float | Tensor = 0.0  # weight of the planner's reward in what the others avoid; a number or [B]
    planner_observes: bool = False

    agents: ClassVar[tuple[str, ...]] = ("row", "column", "planner")
    num_agents: ClassVar[int] = 3
    discrete: ClassVar[bool] = True
    action_low: ClassVar[float] = 0.0
    action_high: ClassVar[float] = 1.0

    def __post_init__(self):
        self._set(payoffs=torch.as_tensor(self.payoffs, dtype=torch.float64, device="cpu").detach())
        self._set(device=torch.device(self.device))
        self._check()
        if not isinstance(self.q, (int, float)):
            q = torch.as_tensor(self.q)
            self._set(q=q.to(self.device, self.dtype) if q.ndim else q.item())
        self._build()

    def _check(self):
        shape, most, q = tuple(self.payoffs.shape), self.max_incentive, torch.as_tensor(self.q)
        for name, rule, holds in (
            ("num_envs", "1 or more", self.num_envs >= 1),
            ("payoffs", "[3, R, C]", len(shape) == 3 and shape[0] == 3 and 0 not in shape),
            ("payoffs", "finite", bool(self.payoffs.isfinite().all())),
            ("horizon", "1 or more", self.horizon >= 1),
            ("num_moves", "2 or 3", self.num_moves in (2, 3)),
            ("max_incentive", "None or an integer, 0 or more", most is None or isinstance(most, int) and most >= 0),
            ("payoff_scale", "finite", math.isfinite(self.payoff_scale)),
            ("q", f"a number or a tensor [num_envs = {self.num_envs}]", q.shape in ((), (self.num_envs,))),
            ("q", "finite", bool(q.isfinite().all())),
        ):
            if not holds:
                got = getattr(self, name)
                got = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) and rule != "finite" else got
                raise ValueError(f"{name} must be {rule}, got {got}".replace("\n", ""))
        if self.start not in ("uniform", *itertools.product(*map(range, shape[1:]))):
            raise ValueError(
                f"start must be uniform or a square (i, j) of the {shape[1]} x {shape[2]} grid, got {self.start}"
            )

    def _build(self):
        """The tables that `step` looks up and the oracles sum over."""
        (R, C), acts = self.payoffs.shape[1:], self.max_incentive is not None
        A1, M = self.max_incentive + 1 if acts else 1, self.num_moves
        i, j, a = (v.flatten() for v in torch.meshgrid(*map(torch.arange, (R, C, A1)), indexing="ij"))  # [X]
        moves = torch.tensor([-1, 0, 1] if M == 3 else [-1, 1])
        to_i = (i[:, None] + moves).clamp(0, R - 1)  # [X, M]
        to_j = (j[:, None] + moves).clamp(0, C - 1)
        transition = (to_i[:, :, None, None] * C + to_j[:, None, :, None]) * A1 + torch.arange(A1)
        r1, r2, rp = self.payoffs[:, i, j]
        rewards = torch.stack((r1, r2, a * self.payoff_scale * rp - a**2 if acts else rp), 1)
        i_hot = F.one_hot(i, R)
        j_hot = F.one_hot(j, C)
        a_hot = F.one_hot(a, A1)[:, : A1 * acts]
        sees = torch.cat((i_hot, j_hot, a_hot), 1)  # [X, O]
        planner = sees if self.planner_observes else F.one_hot(torch.zeros_like(i), sees.shape[1])
        observations = torch.stack((sees, torch.cat((j_hot, i_hot, a_hot), 1), planner), 1)
        obs_mask = (observations != 0).any(0)
        start = a == 0
        if self.start != "uniform":
            start = start & (i == self.start[0]) & (j == self.start[1])
        sizes = (M, M, A1)
        self._set(
            obs_sizes=tuple(obs_mask.sum(1).tolist()),
            action_sizes=sizes,
            obs_mask=obs_mask.to(self.device),  # [3, O]
            action_mask=(torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).to(self.device),  # [3, max(M, A1)]
            cooperators=torch.tensor([False, False, True], device=self.device),  # the robust actor
            observations=observations.to(self.device, self.dtype),  # [X, 3, O] what each player sees in each state
            transition=transition.to(self.device),  # [X, M, M, A1] int64, the next state
            rewards=rewards.to(self.device, self.dtype),  # [X, 3] on arrival, at q = 0
            start_probs=(start.double() / start.sum()).to(self.device, self.dtype),  # [X]
        )

    @property
    def env_id(self) -> str:
        return TASKS[self.max_incentive is not None]

    @property
    def num_states(self) -> int:
        return len(self.transition)

    def reset(self, generators: list[torch.Generator]) -> tuple[State, Tensor]:
        """Generator k alone draws the k-th block of num_envs / len(generators) environments."""
        if self.num_envs % len(generators):
            raise ValueError(f"num_envs must be a multiple of the {len(generators)} generators, got {self.num_envs}")
        starts, size = self.start_probs.nonzero()[:, 0], (self.num_envs // len(generators),)
        drawn = [torch.randint(len(starts), size, generator=g, device=g.device).to(self.device) for g in generators]
        index = starts[torch.cat(drawn)]
        return State(index, torch.zeros_like(index)), self.observations[index]

    def draw(self, generators: list[torch.Generator]) -> None:
        """The random numbers of one step: there are none."""

    def step(self, state: State, action: Tensor, noise: None = None):
        """action: [B, 3] int64 below action_sizes; a larger one is an IndexError on a CPU.

        Returns state, obs [B, 3, O], reward [B, 3], terminated [B] (never), truncated [B] (at the horizon), info {}.
        """
        index = self.transition[state.index, action[:, 0], action[:, 1], action[:, 2]]
        state = State(index, state.t + 1)
        truncated = state.t >= self.horizon
        return state, self.observations[index], self._reward(index), torch.zeros_like(truncated), truncated, {}

    def _reward(self, index: Tensor) -> Tensor:
        """[B, 3] of the states [B] just arrived at."""
        rewards = self.rewards[index]
        return rewards - (self.q * rewards[:, 2])[:, None] * ~self.cooperators

    def global_state(self, state: State) -> Tensor:
        """[B, G] for centralised critics: i one-hot, j one-hot and, where the planner acts, its last action one-hot."""
        return self.observations[state.index, 0]

    def render(self, state: State, index: int = 0, size: int = 400) -> np.ndarray:
        """[size, size, 3] uint8 picture of one environment. Brighter squares pay the planner more; in each stand r1 and
        r2 and, below, r_p. A frame marks the current square, a bar its row and another its column; i grows upwards."""
        (R, C), x = self.payoffs.shape[1:], int(state.index[index])
        i, j, a = (int(v) for v in np.unravel_index(x, (R, C, self.action_sizes[2])))
        image = Image.new("RGB", (size, size), "white")
        font = ImageFont.load_default(size // 28)
        edge = size // 14
        draw, cell = ImageDraw.Draw(image), (size - 2 * edge) / max(R, C)
        low, high = self.payoffs[2].min(), self.payoffs[2].max()
        shade = ((self.payoffs[2] - low) / (high - low).clamp_min(1e-12)).tolist()
        corner = [[(edge + cell * c, edge + cell * (R - 1 - r)) for c in range(C)] for r in range(R)]
        for r, c in itertools.product(range(R), range(C)):
            left, top = corner[r][c]
            colour = tuple(round(d + (b - d) * shade[r][c]) for d, b in zip(DARK, BRIGHT))
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=colour)
            r1, r2, rp = self.payoffs[:, r, c].tolist()
            ink = "black" if shade[r][c] > 0.5 else "white"
            place = (left + cell / 2, top + cell / 2)
            draw.text(place, f"{r1:.2f} {r2:.2f}\n{rp:.2f}", ink, font, anchor="mm", align="center")
        left, top = corner[i][j]
        draw.rectangle((left, top, left + cell - 1, top + cell - 1), outline=RED, width=max(2, size // 80))
        draw.rectangle((edge / 2, top, edge * 0.8, top + cell - 1), fill=RED)
        bottom = edge + cell * R
        draw.rectangle((left, bottom + edge * 0.2, left + cell - 1, bottom + edge / 2), fill=BLUE)
        text, t = f"incentive {a}   " if self.max_incentive is not None else "", int(state.t[index])
        if t:  # nothing is paid at the start
            text += "rewards " + "  ".join(f"{value:.2f}" for value in self._reward(state.index)[index].tolist())
        draw.text((edge, edge / 2), f"step {t}   {text}", "black", font, anchor="lm")
        return np.asarray(image)


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_agents: int | None = None,
    continuous_actions: bool = False,
    **fields,
) -> Bimatrix:
    """`fields` are those of `Bimatrix` by name. Actions are always discrete: continuous_actions, which other
    environments know, is ignored. In the augmented game max_incentive is 3 unless given."""
    if env_id not in TASKS:
        raise ValueError(f"env_id must be one of {', '.join(TASKS)}, got {env_id!r}")
    if num_agents not in (None, 3):
        raise ValueError(f"num_agents of {env_id} must be 3, got {num_agents}")
    known = [field.name for field in dataclasses.fields(Bimatrix)[3:]]
    for name in fields:
        if name not in known:
            raise ValueError(f"fields of {env_id} are {', '.join(known)}, got {name!r}")
    incentive = fields.setdefault("max_incentive", None if env_id == TASKS[0] else 3)
    if (incentive is None) != (env_id == TASKS[0]):
        rule = "None, its planner is passive" if env_id == TASKS[0] else "an integer"
        raise ValueError(f"max_incentive of {env_id} must be {rule}, got {incentive}")
    return Bimatrix(num_envs, device, dtype, **fields)


# ------------------------------------------------------------------------------------------------------------ oracles
# `probs` are P joint policies that choose by the state alone: row [P, X, M], column [P, X, M], planner [P, X, A1]. They
# may depend on what a player cannot see; a blind planner's is the same in all states. Values are per step,
# 1/T sum_t gamma^t r_t from the start distribution, and have gradients with respect to `probs`. q: a number or [P],
# None for the env's own. Inside, P comes last, so that each elementary operation runs along contiguous memory.


def _factors(env: Bimatrix, probs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Each player's probabilities over [X, M, M, A1, P], size 1 along the others' actions."""
    expected = [(len(probs[0]), env.num_states, size) for size in env.action_sizes]
    if [tuple(p.shape) for p in probs] != expected:
        raise ValueError(f"probs must have shapes {expected}, got {[tuple(p.shape) for p in probs]}")
    row, column, planner = (p.permute(1, 2, 0).contiguous() for p in probs)
    return [row[:, :, None, None], column[:, None, :, None], planner[:, None, None]]


def _gains(env: Bimatrix, probs: tuple[Tensor, Tensor, Tensor], q: float | Tensor | None) -> Tensor:
    """[3, X, P or 1] of the players on arrival in each state."""
    if q is None and isinstance(env.q, Tensor):
        raise ValueError("q must be given where the env has one per environment, got None")
    rewards = env.rewards.T[..., None].to(probs[0])
    q = torch.as_tensor(env.q if q is None else q, dtype=rewards.dtype, device=rewards.device)
    if q.shape not in ((), (len(probs[0]),)):
        raise ValueError(f"q must be a number or a tensor [P = {len(probs[0])}], got shape {tuple(q.shape)}")
    return rewards - ~env.cooperators[:, None, None] * q * rewards[2]


def _visits(env: Bimatrix, probs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[T + 1, X, P] probability to be in each state after t steps."""
    row, column, planner = _factors(env, probs)
    joint, to = row * column * planner, env.transition.flatten()  # [X, M, M, A1, P]
    visits = [env.start_probs[:, None].to(joint).expand(-1, joint.shape[-1])]
    for _ in range(env.horizon):
        flow = visits[-1][:, None, None, None] * joint
        visits.append(torch.zeros_like(visits[0]).index_add(0, to, flow.flatten(0, 3)))
    return torch.stack(visits)


def state_visits(env: Bimatrix, probs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[P, X]: share of the T steps that begin in each state."""
    return _visits(env, probs)[:-1].mean(0).T


def exact_value(
    env: Bimatrix, probs: tuple[Tensor, Tensor, Tensor], gamma: float = 1.0, q: float | Tensor | None = None
) -> Tensor:
    """[P, 3] value of each joint policy for each player."""
    arrivals = _visits(env, probs)[1:]
    weights = gamma ** torch.arange(env.horizon).to(arrivals) / env.horizon
    return (_gains(env, probs, q) * torch.einsum("t,txp->xp", weights, arrivals)).sum(1).T


def best_response_value(
    env: Bimatrix,
    probs: tuple[Tensor, Tensor, Tensor],
    player: int,
    gamma: float = 1.0,
    q: float | Tensor | None = None,
) -> Tensor:
    """[P]: the best that `player` can get against the other two, by dynamic programming from the last step back. It
    knows the state and the time, more than a blind planner does; memory would not help against such opponents."""
    if player not in (0, 1, 2):
        raise ValueError(f"player must be 0, 1 or 2, got {player}")
    gain, factors = _gains(env, probs, q)[player], _factors(env, probs)
    del factors[player]
    others = factors[0] * factors[1]
    axes = [axis for axis in (1, 2, 3) if axis != player + 1]
    value = torch.zeros_like(others[:, 0, 0, 0])  # [X, P]
    for _ in range(env.horizon):
        ahead = (gain + gamma * value)[env.transition]  # [X, M, M, A1, P]
        value = (ahead * others).sum(axes).amax(1)
    return (env.start_probs.to(value) @ value) / env.horizon


def regret(
    env: Bimatrix, probs: tuple[Tensor, Tensor, Tensor], gamma: float = 1.0, q: float | Tensor | None = None
) -> Tensor:
    """[P, 3]: what each player would gain by its best response; 0 or more, up to rounding."""
    best = [best_response_value(env, probs, player, gamma, q) for player in range(3)]
    return torch.stack(best, 1) - exact_value(env, probs, gamma, q)


def nash_equilibria(payoffs: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Equilibria (x [R], y [C]) of the game in which the row player names i and the column player j, once; payoffs
    [2 or 3, R, C] of row and column (the planner's are not used).

    Supports of equal size are enumerated, which finds every equilibrium of a nondegenerate game (no mixture has more
    pure best responses than its support has members). Of a degenerate game it may miss some, never a pure one.
    """
    r1, r2 = (r / (abs(r).max() or 1.0) for r in torch.as_tensor(payoffs)[:2].double().cpu().numpy())
    (R, C), tolerance, found = r1.shape, 1e-9, []
    for k in range(1, min(R, C) + 1):
        for rows, columns in itertools.product(*(map(list, itertools.combinations(range(n), k)) for n in (R, C))):
            x, y = np.zeros(R), np.zeros(C)
            x[rows] = _equaliser(r2[np.ix_(rows, columns)].T)
            y[columns] = _equaliser(r1[np.ix_(rows, columns)])
            if not min(x[rows].min(), y[columns].min()) > tolerance:  # NaN if there is none
                continue
            if (r1 @ y).max() <= x @ r1 @ y + tolerance and (x @ r2).max() <= x @ r2 @ y + tolerance:
                found.append((x, y))
    return found


def _equaliser(block: np.ndarray) -> np.ndarray:
    """The mixture [k] of the columns of a [k, k] matrix that makes all rows equal; NaN if it is not unique."""
    k = len(block)
    system = np.block([[block, -np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
    try:
        return np.linalg.solve(system, np.eye(k + 1)[k])[:k]
    except np.linalg.LinAlgError:
        return np.full(k, np.nan)


# ------------------------------------------------------------------------------------------ what a run has found
# Rows of a run are those of metrics.csv: a label (method, epsilon, beta, lambda_init, q_train, seed) and metrics.


def setting_name(row: dict) -> str:
    """The setting that a row belongs to."""
    if row["method"] == "ermas":
        names = ("epsilon", "beta", "lambda_init", "q_train")
        return "ermas, " + ", ".join(f"{name} {row[name]:g}" for name in names)
    return f"{row['method']}, q_train {row['q_train']:g}"


def by_setting(rows: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Columns of `rows` for each setting by its name, [seeds, rows of a seed] each, and means over both agents."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        both = {key[:-4]: (row[key] + row[key[:-3] + "column"]) / 2 for key in row if key.endswith("_row")}
        groups.setdefault(setting_name(row), []).append(row | both)
    tables = {}
    for name, group in groups.items():
        num_seeds = len({row["seed"] for row in group})
        tables[name] = {}
        for key in group[0]:
            values = np.array([row[key] for row in group])
            tables[name][key] = values.reshape(num_seeds, -1)
    return tables


def report(run: runs.Run, eval_q: tuple[float, ...], tests: dict[str, Tensor]) -> None:
    """The end of training, the last row of each of S runs, and test games, [S, Q] by name: tables on the terminal,
    results.csv, test_games.csv and report.png in the run's folder, and in wandb."""
    results = run.rows[-len(run.labels) :]
    games = []
    for k, label in enumerate(run.labels):
        for c, q in enumerate(eval_q):
            own = {name: values[k, c].item() for name, values in tests.items()}
            games.append(label | {"q": q} | own)
    runs.write_rows(run.dir / "results.csv", results)
    runs.write_rows(run.dir / "test_games.csv", games)
    print_tables(results, games)
    with runs.written(run.dir / "report.png", "wb") as file:
        plot(results, games).savefig(file, dpi=110)
    columns = ("q", *tests)
    shown = [{name: row[name] for name in columns} for row in games]
    tables = [shown[k : k + len(eval_q)] for k in range(0, len(shown), len(eval_q))]
    runs.log_report(run, {"test_games": tables}, {"report": run.dir / "report.png"})


def print_tables(results: list[dict], games: list[dict]) -> None:
    """Mean and 95% interval over seeds for each setting."""

    def cells(values: np.ndarray, digits: int = 3) -> str:
        texts = []
        for mean, half in zip(values.mean(0), interval(values)):
            texts.append(f"{f'{mean:.{digits}f} ± {half:.{digits}f}':16}")
        return "".join(texts)

    columns = {
        "planner reward": "eval/planner_reward",
        "agent reward": "eval/agent_reward",
        "exact regret": "ermas/exact_regret",
        "local regret": "ermas/local_regret",
        "lambda": "ermas/lambda",
    }
    print("\nPer step: mean and 95% interval over seeds; agents: mean of both")
    print(f"{'':58s}" + "".join(f"{name:16s}" for name in columns))
    for name, group in by_setting(results).items():
        print(f"  {name:56s}" + "".join(cells(group[key]) for key in columns.values()))
    print("\nReward of the planner when new agents learn against it, by Q of the test game")
    groups = by_setting(games)
    print(f"{'':58s}" + "".join(f"Q = {q:<12g}" for q in next(iter(groups.values()))["q"][0]))
    for name, group in groups.items():
        print(f"  {name:56s}" + cells(group["planner_reward"], 2))


def plot(results: list[dict], games: list[dict]):
    """A figure of rewards, regret and test games of every setting."""
    figure = new_figure(13, 4)
    rewards, regrets, tests = figure.subplots(1, 3)
    plot_rewards(rewards, results)
    plot_regret(regrets, results)
    plot_tests(tests, games)
    return figure


def plot_rewards(axis, results: list[dict]) -> None:
    """A point per setting with standard deviations over seeds."""
    for name, group in by_setting(results).items():
        x, y = group["eval/agent_reward"], group["eval/planner_reward"]
        axis.errorbar(x.mean(), y.mean(), y.std(), x.std(), marker="o", capsize=2, label=name)
    axis.set(xlabel="mean reward of both agents", ylabel="reward of the planner", title="rewards per step")
    axis.legend(fontsize=7)


def plot_regret(axis, results: list[dict]) -> None:
    """Exact and local regret under ERMAS, mean over both agents, with standard deviations over seeds."""
    groups = [group for group in by_setting(results).values() if group["method"][0, 0] == "ermas"]
    epsilon = [group["epsilon"][0, 0] for group in groups]
    for kind, mark in (("exact", "o"), ("local", "^")):
        regrets = [group[f"ermas/{kind}_regret"] for group in groups]
        mean = [regret.mean() for regret in regrets]
        axis.errorbar(epsilon, mean, [r.std() for r in regrets], marker=mark, ls="", capsize=2, label=kind)
    axis.axline((0, 0), slope=1, color="grey", lw=1, label="epsilon")
    axis.set(xlabel="epsilon", ylabel="regret per step", title="regret of the agents")
    axis.legend(fontsize=7)


def plot_tests(axis, games: list[dict]) -> None:
    """The planner's reward against new agents, with 95% intervals over seeds."""
    for name, group in by_setting(games).items():
        q, reward = group["q"][0], group["planner_reward"]
        half = interval(reward)
        axis.plot(q, reward.mean(0), marker="o", markersize=3, label=name)
        axis.fill_between(q, reward.mean(0) - half, reward.mean(0) + half, alpha=0.15)
    axis.set(xlabel="Q of the test game", ylabel="reward of the planner", title="against new agents")
    axis.legend(fontsize=7)


# ------------------------------------------------------------------------------------------------- speed and pictures


def write_gif(env: Bimatrix, path: str | Path, policies: list[Tensor], generator: torch.Generator):
    """One episode of environment 0 with the first of P joint policies, [P, X, A] of each player."""
    state, _ = env.reset([generator])
    frames = [env.render(state)]
    for _ in range(env.horizon):
        moves = [torch.multinomial(policy[0, state.index], 1, generator=generator) for policy in policies]
        state, *_ = env.step(state, torch.cat(moves, 1))
        frames.append(env.render(state))
    save_gif(path, frames, 400)


def main(
    env_id: str = TASKS[0],
    num_envs: int = 8192,
    device: str = "cpu",
    threads: int = 1,
    compile: bool = False,
    seconds: float = 2.0,
    gif: str | None = None,
):
    """Measure env steps/s with random actions, and write a GIF of a random policy.

    Args:
        env_id: one of the tasks
        num_envs: environments in the batch
        device: torch device
        threads: CPU threads
        compile: measure the compiled step too
        seconds: how long to measure
        gif: where to write the GIF
    """
    torch.set_num_threads(threads)
    env = make(env_id, num_envs, device)
    print(f"{env_id}, {num_envs} environments, {threads} threads")
    generator = torch.Generator().manual_seed(0)
    print_speed(env, [random_actions(env, [generator]) for _ in range(5)], seconds, compile)
    if gif:
        env = make(env_id, 1, device)
        policies = [torch.full((1, env.num_states, size), 1 / size, device=device) for size in env.action_sizes]
        write_gif(env, gif, policies, torch.Generator(device).manual_seed(0))
        print(f"wrote {gif}")


if __name__ == "__main__":
    with runs.quiet_pipe():
        tyro.cli(main)
