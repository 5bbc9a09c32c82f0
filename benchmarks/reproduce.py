"""The papers' figures and tables, from training to picture and verdict. Each run is a Ray task, on a laptop as on a
cluster whose machines share `--runs-dir`.

    pip install -r benchmarks/requirements.txt
    python benchmarks/reproduce.py --figure ernie-3                        # trains what is missing, draws, judges
    python benchmarks/reproduce.py --table ernie-2 --figure ermas-6
    python benchmarks/reproduce.py --all --quick                           # all of it in small: does everything run?
    python benchmarks/reproduce.py --study drones --gpus-per-run 0.25      # four runs share a GPU
    python benchmarks/reproduce.py --extra ladder --sumo                   # traffic: simple controllers, in SUMO too
    python benchmarks/reproduce.py --extra in-sumo                         # the trained lights driven in SUMO
    python benchmarks/reproduce.py --all --ray-address auto                # on a Ray cluster
    python benchmarks/reproduce.py --all --redraw                          # pictures and verdicts from the tables there

A study is a script, its methods and their flags. Where a method has several points of (epsilon, lambda), or of alpha
for M3DDPG, all methods as many, the point is chosen that has the highest mean over the clean environment and all
strengths of the perturbations shown, on seeds of its own. Where a study has fixed opponents, the teams of every method
are judged against those that the first method has trained. A study leaves in `--results-dir`

    STUDY.csv             a row per script, environment, method, perturbation, level and seed
    STUDY_summary.csv     mean with 95% t-interval, interquartile mean with 95% bootstrap interval, worst seed, and the
                          difference to the study's first method, paired by seed
    STUDY.png             mean against level for every perturbation shown, and differences to the first method
    STUDY_PERTURBATION.png  the same of one that deserves it
    STUDY_points.csv, STUDY_points.png  what each point of the grids got on the seeds of the choice
    verdicts.csv          the paper's claims, the paired differences behind them, and what they say

A run that finished with the same flags and seeds is found in `--runs-dir` and not run again; one that was killed goes
on from its last checkpoint. A run that fails is reported at the end and left out; the others go on.
"""

import ctypes
import hashlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import envs
import ernie_qcombo
from benchmarks import attack
from envs import bimatrix, robustness, runs
from envs import traffic as streets

interval = robustness.half_interval
ROOT = Path(__file__).resolve().parents[1]
Flags = dict[str, object]  # of a script, by name: {"epsilon": 0.3, "eval_agents": (3, 6), "compile": True}
Rows = list[dict]
Table = dict[tuple[str, str, str], np.ndarray]  # (agent, perturbation, level) -> value of each seed


class Result(NamedTuple):
    """The table that a run leaves."""

    file: str = "robustness.csv"
    value: str = "return"
    level: str = "strength"


@dataclass(frozen=True)
class Study:
    """Runs behind figures and tables of a paper, what is shown of them, and what the paper claims."""

    script: str
    text: str  # the paper's claim in words
    methods: dict[str, list[Flags]]  # of each method the points of its grid
    flags: Flags = field(default_factory=dict)  # of every run
    quick: Flags = field(default_factory=dict)  # what makes a run short, for --quick
    select: Flags = field(default_factory=dict)  # of the runs that choose a point of a grid
    scripts: dict[str, str] = field(default_factory=dict)  # of methods that another script has
    seeds: tuple[int, int] = (1, 5)  # first and last
    select_seeds: tuple[int, int] = (101, 102)
    result: Result = Result()
    shown: tuple[str, ...] = ("gaussian", "mad")  # perturbations of the picture and the choice
    claims: tuple[tuple[str, str], ...] = (("stackelberg", "none"),)  # (method, a worse one), under all of these
    percentiles: tuple[tuple[str, str], ...] = ()  # (perturbation, level) of a picture of the seeds' values in order
    alone: tuple[str, ...] = ()  # perturbations that have a picture of their own too
    points: str | None = None  # perturbation of a picture of every point of the grids, on the seeds of the choice
    fixed_opponents: bool = False  # teams are judged against opponents of the first method, see `cross_play`
    reuse: tuple[str, Flags] | None = None  # the method that trains first, and flags of the others with its {folder}
    label: Callable[[dict, str], str] | None = None  # (row, run) -> method, where a run holds several
    picture: Callable[[dict[str, Rows], dict[str, Path]], Figure] | None = None  # from rows and files, in place of ours


# --------------------------------------------------------------------------------------------------------------------
# Studies


def regularizers(modes: Sequence[str], points: Sequence[Flags]) -> dict[str, list[Flags]]:
    """The plain algorithm, and each regulariser at the points of a grid."""
    methods = {"none": [{"regularizer": "none"}]}
    for mode in modes:
        methods[mode] = [{"regularizer": mode} | point for point in points]
    return methods


ERNIE = ("gaussian", "adversarial", "stackelberg")
CLAIMS = (("stackelberg", "none"), ("stackelberg", "adversarial"), ("stackelberg", "gaussian"), ("m3ddpg", "none"))
PARTICLE = partial(
    Study,
    script="ernie_maddpg.py",
    text="ERNIE is better than or level with MADDPG under observation noise; unrolling the attack is better than or "
    "level with not unrolling it (Figure 9); M3DDPG gives some robustness",
    quick={"total_timesteps": 8_000, "eval_episodes": 10},
    claims=CLAIMS,
)
MODES = ("gaussian", "random", "adversarial", "stackelberg")
SPREAD_METHODS = regularizers(
    MODES,
    (
        {"epsilon": 0.1, "reg_coef": 0.02},
        {"epsilon": 0.1, "reg_coef": 0.1},
        {"epsilon": 0.3, "reg_coef": 0.005},
        {"epsilon": 0.3, "reg_coef": 0.02},
        {"epsilon": 0.3, "reg_coef": 0.1},
        {"epsilon": 1.0, "reg_coef": 0.01},
    ),
)
SPREAD_METHODS["default"] = [{}]  # a stronger point than the choice finds
SPREAD_METHODS["m3ddpg"] = [
    {"regularizer": "none", "minimax_epsilon": alpha} for alpha in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
]
SPREAD_METHODS["rma3c"] = [{"epsilon": epsilon} for epsilon in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)]
RIVALS_METHODS = {method: points for method, points in SPREAD_METHODS.items() if method != "default"}
RIVALS_FLAGS = {"total_timesteps": 200_000, "eval_episodes": 10}  # what counts is the report of the cross-play
RIVALS = partial(
    PARTICLE,
    methods=RIVALS_METHODS,
    select={"total_timesteps": 100_000},
    scripts={"rma3c": "baselines/rma3c.py"},
    claims=(*CLAIMS, ("rma3c", "none")),
    seeds=(1, 10),
    select_seeds=(101, 103),
    shown=("gaussian", "mad", "worst_case"),
    points="worst_case",
    fixed_opponents=True,
)


def crowd(num_agents: int) -> Study:
    """Mean-field methods, which choose lambda with three agents, and MADDPG. Minibatches hold as many samples of all
    agents for every N."""
    flags = {
        "num_agents": num_agents,
        "batch_size": 1536 // num_agents,
        "total_timesteps": 100_000,
        "steps_per_update": 25,
        "attack_steps": 1,
        "eval_episodes": 1000 // num_agents if num_agents > 6 else 200,
    }
    meanfield = {
        "reg_batch_size": max(8, 96 // num_agents),
        "transport_steps": 50,
        "eval_agents": (3, 6, 15, 30),
        "compile": num_agents > 15,  # half the time of an update
    }
    coefs = (0.1, 1.0) if num_agents == 3 else (1.0,)  # what gaussian and stackelberg chose; adversarial takes it too
    methods = regularizers(ERNIE, [{"epsilon": 0.3, "reg_coef": coef} | meanfield for coef in coefs])
    methods["none"] = [{"regularizer": "none"} | meanfield]
    claims = [("stackelberg", "none"), ("stackelberg", "gaussian")]
    scripts = {}
    if num_agents <= 15:
        methods["maddpg"] = [{"regularizer": "none"}]
        scripts["maddpg"] = "ernie_maddpg.py"
    if num_agents <= 6:
        methods["m3ddpg"] = [{"regularizer": "none", "minimax_epsilon": 0.01}]
        scripts["m3ddpg"] = "ernie_maddpg.py"
        claims.append(("stackelberg", "m3ddpg"))
    return Study(
        "ernie_meanfield.py",
        "ERNIE has a higher return than mean-field MADDPG and M3DDPG and falls more slowly with observation noise",
        methods,
        flags,
        quick={"total_timesteps": 8_000, "eval_episodes": 4},
        select={"total_timesteps": 50_000, "eval_episodes": 100},
        scripts=scripts,
        seeds=(1, 10) if num_agents <= 6 else (1, 5),
        shown=("gaussian", "mad", "worst_case"),
        claims=tuple(claims),
    )


WIDTHS = {
    "num_agents": 3,
    "batch_size": 512,
    "total_timesteps": 100_000,
    "steps_per_update": 25,
    "attack_steps": 1,
    "reward_scale": 1,
    "epsilon": 0.3,
    "reg_coef": 1.0,
    "reg_batch_size": 32,
    "transport_steps": 50,
    "eval_agents": (3, 6),
}
LIGHTS_CLAIMS = (
    ("stackelberg", "none"),
    ("stackelberg", "adversarial"),
    ("stackelberg", "gaussian"),
    ("adversarial", "none"),
)
TRAFFIC_FLAGS = {"compile": True, "eval_episodes": 1, "log_interval": 64_000, "eval_seconds": 4_000}
TRAFFIC = partial(
    Study,
    flags=TRAFFIC_FLAGS,
    quick={"total_timesteps": 64_000, "eval_seconds": 200},
    seeds=(101, 110),
    result=Result(value="reward"),
    shown=("gaussian", "mad", "flip_one", "speed", "flow", "network"),
    percentiles=(("clean", "0.0"), ("speed", "30.0"), ("gaussian", "1.0"), ("flip_each", "0.05")),
)


def sensitivity(**grid: tuple[float, ...]) -> dict[str, list[Flags]]:
    """The plain algorithm, and ERNIE's defaults with one flag changed, to each of its values in turn."""
    methods = {"none": [{"regularizer": "none"}]}
    for name, values in grid.items():
        for value in values:
            methods[f"{name}_{value}"] = [{name: value}]
    return methods


LIGHTS_POINTS = partial(TRAFFIC, shown=("speed", "gaussian", "network"), percentiles=())
QCOMBO_POINTS = sensitivity(epsilon=(0.03, 0.1, 0.3, 1.0), attack_steps=(1, 5))


def game_label(row: dict, run: str) -> str:
    """The setting of a row; runs "fixed" and "shared" keep their lambda, the latter with shared rewards."""
    if row["method"] != "ermas":
        return f"{row['method']}, q {row['q_train']}"
    if run == "fixed":
        return f"ermas, lambda {row['lambda_init']}"
    if run == "shared":
        return f"ermas, lambda {row['lambda_init']}, shared rewards"
    if row["beta"] == "0.4":
        return f"ermas, epsilon {row['epsilon']}"
    return f"ermas, epsilon {row['epsilon']}, beta {row['beta']}"


LEARNED = {"method": ("marl", "ermas"), "epsilon": (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)}
FIXED = {"method": "ermas", "fixed_lambda": True, "lambda_init": (0, 0.25, 0.5, 1, 1.5, 2, 3, 5)}


def game_points(axis, rows_of: dict[str, Rows]) -> None:
    """Rewards of agents and planner, a point per setting with standard deviations over seeds; of each kind of setting
    a colour. Epsilon or the fixed lambda stands beside the point."""
    for k, (run, rows) in enumerate(rows_of.items()):
        groups = {}
        for row in rows:
            groups.setdefault(row["method"], []).append(row)
        for name, group in groups.items():
            x, y = (np.array([float(row[f"eval/{who}_reward"]) for row in group]) for who in ("agent", "planner"))
            axis.errorbar(x.mean(), y.mean(), y.std(), x.std(), marker="o", capsize=2, color=f"C{k}")
            axis.annotate(name.removeprefix("ermas, "), (x.mean(), y.mean()), fontsize=6)
        axis.plot([], [], "o", color=f"C{k}", label=run)
    axis.set(xlabel="mean reward of both agents", ylabel="reward of the planner", title="rewards per step")
    axis.legend(fontsize=8)


def game_payoffs(axis, players: list[int]) -> None:
    payoff = bimatrix.social_dilemma()[players].sum(0).numpy()
    axis.imshow(payoff, origin="lower")
    for (i, j), value in np.ndenumerate(payoff):
        is_bright = value > (payoff.min() + payoff.max()) / 2
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if is_bright else "white")
    names = " + ".join(bimatrix.Bimatrix.agents[player] for player in players)
    axis.set(title=f"payoff of {names}", xlabel="column j", ylabel="row i")


def game_curves(axis, path: Path, metric: str) -> None:
    """Learning curves from metrics.csv beside `path`, a line per beta, with standard errors over seeds."""
    curves: dict[float, dict[int, list[float]]] = {}
    for row in runs.read_rows(path.with_name("metrics.csv")):
        steps = curves.setdefault(float(row["beta"]), {})
        steps.setdefault(int(row["global_step"]), []).append(float(row[metric]))
    for beta, steps in sorted(curves.items()):
        values = np.array(list(steps.values()))  # [steps, K]
        mean, error = values.mean(1), stats.sem(values, 1)
        axis.plot(list(steps), mean, label=f"beta {beta:g}")
        axis.fill_between(list(steps), mean - error, mean + error, alpha=0.2)
    axis.set(xlabel="environment steps of a run", title=metric.removeprefix("eval/").replace("_", " "))
    axis.legend(fontsize=8)


def draw_figure_3(rows_of: dict[str, Rows], paths: dict[str, Path]) -> Figure:
    figure = Figure(figsize=(17, 4), layout="constrained")
    agents, planner, rewards, regret = figure.subplots(1, 4)
    game_payoffs(agents, [0, 1])
    game_payoffs(planner, [2])
    game_points(rewards, rows_of)
    rows = [row for row in rows_of["learned"] if row["method"].startswith("ermas")]
    for kind, mark in (("exact", "o"), ("local", "^")):
        columns = [f"ermas/{kind}_regret_{player}" for player in ("row", "column")]
        values = [(float(row["epsilon"]), np.mean([float(row[c]) for c in columns])) for row in rows]
        regret.plot(*zip(*values), mark, label=kind)
    regret.axline((0, 0), slope=1, color="grey", lw=1, label="epsilon")
    regret.set(xlabel="epsilon", ylabel="regret per step", title="regret of the agents")
    regret.legend()
    return figure


def draw_figure_4(rows_of: dict[str, Rows], paths: dict[str, Path]) -> Figure:
    figure = Figure(figsize=(17, 4), layout="constrained")
    rewards, *curves = figure.subplots(1, 4)
    game_points(rewards, rows_of)
    for axis, player in zip(curves, bimatrix.Bimatrix.agents):
        game_curves(axis, paths["betas"], f"eval/{player}_reward")
    return figure


GAMES = partial(
    Study,
    script="ermas_bimatrix.py",
    flags={"env_id": "repeated_bimatrix_v0"},
    quick={"num_iterations": 20, "eval_iterations": 10},
    seeds=(1, 10),
    result=Result("results.csv", "eval/planner_reward", ""),
    shown=(),
    claims=(),
    label=game_label,
)
STUDIES = {
    "spread": PARTICLE(
        methods=SPREAD_METHODS,
        flags={"env_id": "simple_spread_v3", "total_timesteps": 500_000, "eval_episodes": 200},
        select={"total_timesteps": 150_000, "eval_episodes": 100},
        scripts={"rma3c": "baselines/rma3c.py"},
        seeds=(1, 10),
        select_seeds=(101, 103),
        shown=("gaussian", "mad", "worst_case"),
        claims=(
            ("stackelberg", "none"),
            ("stackelberg", "adversarial"),
            ("stackelberg", "random"),
            ("stackelberg", "gaussian"),
            ("default", "none"),
            ("m3ddpg", "none"),
            ("rma3c", "none"),
        ),
        points="mad",
    ),
    "spread_6": PARTICLE(
        text="ERNIE is better than or level with MADDPG under observation noise",
        methods={
            "none": [{"regularizer": "none"}],
            "stackelberg": [{"epsilon": 0.1}],
            "discrete": [{"regularizer": "none", "continuous_actions": False}],
            "numbered": [{"regularizer": "none", "env_kwargs": ()}],
        },
        flags={"num_agents": 6, "env_kwargs": ("nearest_first=true",), "eval_episodes": 200},
        shown=("gaussian", "mad", "worst_case"),
        claims=(("stackelberg", "none"),),
    ),
    "spread_unrolling": PARTICLE(
        text="unrolling the attack is better than or level with not unrolling it (Figure 9)",
        methods=regularizers(("stackelberg", "adversarial"), [{}]) | {"stackelberg_1": [{"attack_steps": 1}]},
        flags={"total_timesteps": 500_000, "eval_episodes": 200},
        seeds=(1, 10),
        shown=("gaussian", "mad", "worst_case"),
        claims=(
            ("stackelberg", "adversarial"),
            ("stackelberg_1", "adversarial"),  # takes as much time: K = 1 unrolled, K = 3 not
        ),
    ),
    "tag": RIVALS(flags=RIVALS_FLAGS | {"env_id": "simple_tag_v3"}),
    "crypto": RIVALS(flags=RIVALS_FLAGS | {"env_id": "simple_crypto_v3"}),
    "drones": Study(
        "ernie_mappo.py",
        "ERNIE is more robust to observation noise than MAPPO, for both drones",
        regularizers(
            ERNIE,
            (
                {"epsilon": 0.3, "reg_coef": 0.1},
                {"epsilon": 1.0, "reg_coef": 0.1},
                {"epsilon": 1.0, "reg_coef": 1.0},
            ),
        ),
        flags={"total_timesteps": 500_000, "compile": True},
        quick={"total_timesteps": 20_000, "eval_episodes": 4},
        shown=("gaussian", "mad", "worst_case"),
    ),
    "meanfield_3": crowd(3),
    "meanfield_6": crowd(6),
    "meanfield_15": crowd(15),
    "meanfield_30": crowd(30),
    "meanfield_widths": Study(
        "ernie_meanfield.py",
        "wider networks (128, 256 units) keep their return under strong noise better than narrow ones (32, 64)",
        {f"{width}_units": [{"hidden_size": width}] for width in (32, 64, 128, 256)},
        flags=WIDTHS,
        quick={"total_timesteps": 8_000, "eval_episodes": 4},
        claims=(("256_units", "32_units"), ("128_units", "32_units")),
    ),
    "qcombo": TRAFFIC(
        script="ernie_qcombo.py",
        text="ERNIE has a more stable reward than QCOMBO on each change of the environment, ERNIE-A under changed "
        "actions; without unrolling the attack it is worse; Gaussian noise helps against noise only",
        methods=regularizers(("stackelberg", "adversarial", "random", "gaussian"), [{}])
        | {"ernie_a": [{"regularizer": "none", "action_reg_coef": 1}]},
        claims=(*LIGHTS_CLAIMS, ("stackelberg", "random"), ("ernie_a", "none")),
        alone=("network",),
    ),
    "qcombo_sensitivity": LIGHTS_POINTS(
        script="ernie_qcombo.py",
        text="all values of epsilon and of K are better than the baseline on changed speeds (Figures 5c and 5d)",
        methods=QCOMBO_POINTS,
        claims=tuple((name, "none") for name in QCOMBO_POINTS if name != "none"),
        seeds=(101, 105),
    ),
    "qcombo_short": TRAFFIC(  # the paper's number of steps, in one environment
        script="ernie_qcombo.py",
        text="ERNIE has a more stable reward than QCOMBO on each change of the environment",
        methods=regularizers(("stackelberg",), [{}]),
        flags=TRAFFIC_FLAGS | {"total_timesteps": 15_000, "num_envs": 1, "horizon": 3_000, "buffer_size": 15_000},
        quick={"total_timesteps": 4_000, "eval_seconds": 200},
        seeds=(101, 105),
        percentiles=(),
    ),
    "coma": TRAFFIC(
        script="ernie_coma.py",
        text="ERNIE and ERNIE without unrolling are better than COMA in all changed environments",
        methods=regularizers(("stackelberg", "adversarial", "gaussian"), [{}]),
        claims=(*LIGHTS_CLAIMS, ("gaussian", "none")),
        seeds=(121, 130),
        alone=("network",),
    ),
    "coma_sensitivity": LIGHTS_POINTS(
        script="ernie_coma.py",
        text="nothing: it has one epsilon and one lambda for COMA",
        methods=sensitivity(epsilon=(0.3, 1.0, 3.0, 8.0), reg_coef=(0.1, 10.0)),
        seeds=(131, 135),
        claims=(),
    ),
    "coma_settings": LIGHTS_POINTS(
        script="ernie_coma.py",
        text="nothing",
        methods={
            "none": [{"regularizer": "none"}],
            "own_reward": [{"regularizer": "none", "team_reward": "own"}],
            "targets": [{"regularizer": "none", "advantage": "targets"}],
        },
        seeds=(131, 135),
        claims=(),
    ),
    "spread_settings": PARTICLE(
        text="nothing",
        methods={
            "none": [{"regularizer": "none"}],
            "gamma_0.95": [{"regularizer": "none", "gamma": 0.95}],
            "tau_0.01": [{"regularizer": "none", "tau": 0.01}],
            "lr_0.001": [{"regularizer": "none", "learning_rate": 1e-3, "learning_rate_end": 1e-3}],
            "lr_constant": [{"regularizer": "none", "learning_rate_end": 3e-3}],
            "own_networks": [{"regularizer": "none", "share_parameters": False}],
            "fewer_updates": [{"regularizer": "none", "steps_per_update": 100, "batch_size": 512}],
            "wider": [{"regularizer": "none", "hidden_size": 128}],
        },
        flags={"total_timesteps": 500_000, "eval_episodes": 200},
        seeds=(21, 25),
        shown=("gaussian", "mad", "worst_case"),
        claims=(),
    ),
    "bimatrix_3": GAMES(
        text="as epsilon grows the planner's reward falls and the agents' regret rises",
        methods={"learned": [LEARNED]},
        picture=draw_figure_3,
    ),
    "bimatrix_4": GAMES(
        text="no fixed lambda reaches these equilibria; very small and very large beta fail",
        methods={
            "learned": [LEARNED],
            "fixed": [FIXED],
            "shared": [FIXED | {"cross_terms": True}],
            "betas": [{"method": "ermas", "epsilon": 0.2, "beta": (0, 0.2, 0.4, 0.6, 0.9, 1.5)}],
        },
        picture=draw_figure_4,
    ),
    "bimatrix_5": GAMES(
        text="ERMAS is at least as good as MARL trained at Q = 0.5; domain randomization and risk aversion give little",
        methods={
            "all": [
                {"method": ("ermas", "marl", "domain-randomization", "risk"), "epsilon": (0.1, 0.15, 0.2, 0.3)},
            ],
            "marl": [{"method": "marl", "q_train": 0.5}],
        },
        flags={},
        seeds=(11, 20),
        result=Result("test_games.csv", "planner_reward", "q"),
        shown=("q",),
        claims=tuple(("ermas, epsilon 0.2", other) for other in ("marl, q 0.0", "marl, q 0.5", "risk, q 0.0")),
    ),
    "economy": Study(
        "ermas_economy.py",
        "ERMAS has a higher welfare than the AI Economist (MARL), Saez, US federal rates and no taxes at every eta of "
        "new agents (beyond the paper: and than MARL on mixed risk aversion)",
        {name: [{"method": name}] for name in ("marl", "ermas", "saez", "us-federal", "free-market")}
        | {"marl_mixed": [{"method": "marl", "eta_train": (0.17, 0.32), "warm_start": None}]},  # trains its own agents
        flags={"compile": True, "eval_eta": (0.17, 0.23, 0.32)},
        quick={
            "phase_one_timesteps": 12_800,
            "response_steps": 12_800,
            "phase_two_timesteps": 12_800,
            "eval_timesteps": 12_800,
            "eval_episodes": 64,
        },
        seeds=(11, 22),
        result=Result("welfare.csv", "welfare", "eta"),
        shown=("eta",),
        claims=tuple(("ermas", other) for other in ("marl", "saez", "us-federal", "free-market", "marl_mixed")),
        reuse=("marl", {"warm_start": "{folder}", "eval_agents": "{folder}/test_agents.pt"}),
    ),
}
PARTICLES = ("spread", "tag", "crypto")
CROWDS = tuple(name for name in STUDIES if name.startswith("meanfield"))
FIGURES = {
    **{f"ernie-{k}": ("qcombo", "qcombo_short") for k in (1, 2)},
    "ernie-3": (*PARTICLES, "spread_6"),
    "ernie-9": (*PARTICLES, "spread_unrolling"),
    "ernie-4": CROWDS,
    "ernie-5": ("qcombo", "qcombo_sensitivity"),
    "ernie-6": ("drones",),
    "ernie-7": ("coma",),
    **{f"ermas-{k}": (f"bimatrix_{k}",) for k in (3, 4, 5)},
    "ermas-6": ("economy",),
}
TABLES = {"ernie-2": ("coma",), "ernie-3": ("qcombo", "coma"), "ernie-4": ("qcombo", "coma")}


@runs.arguments
class Args:
    figure: tuple[Literal[tuple(FIGURES)], ...] = ()
    """figures of the papers (ERNIE's Figures 1 to 7 and 9, ERMAS's 3 to 6)"""
    table: tuple[Literal[tuple(TABLES)], ...] = ()
    """tables of the ERNIE paper (1 lists the flows that envs/traffic.py has)"""
    study: tuple[Literal[tuple(STUDIES)], ...] = ()
    """studies by name"""
    extra: tuple[Literal["ladder", "in-sumo"], ...] = ()
    """beyond the papers: what simple controllers of traffic lights get; the trained lights of qcombo and coma, or of
    those of them in --study, driven in SUMO"""
    all: bool = False
    """all studies: those of figures and tables, and the others"""
    redraw: bool = False
    """nothing is trained: summaries, pictures (but those of Figures 3 and 4 of ERMAS) and verdicts from the tables"""
    quick: bool = False
    """short runs of two seeds, results in a folder `quick`: to see that everything works, not for figures"""
    seeds: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """first and last seed instead of the studies' own"""
    sumo: bool = False
    """--extra ladder: in SUMO too"""
    episodes: PositiveInt = 10
    """--extra ladder: episodes of each controller"""
    runs_dir: Path = ROOT / "runs" / "reproduce"
    """folder of the runs; on a cluster one that all machines see"""
    results_dir: Path = ROOT / "benchmarks" / "results"
    """folder of the small CSV files and pictures"""
    ray_address: str | None = None
    """address of a Ray cluster; default: this machine"""
    cpus_per_run: PositiveFloat = 1.0
    """CPUs that a run takes"""
    gpus_per_run: NonNegativeFloat = 0.0
    """GPUs that a run takes, 0.25 for a quarter of one"""

    def __post_init__(self):
        if self.seeds and self.seeds[0] > self.seeds[1]:
            raise ValueError(f"seeds must be the first and the last, got {self.seeds}")


# --------------------------------------------------------------------------------------------------------------------
# Runs


def end_with_parent() -> None:
    """On Linux a run ends, with a checkpoint, when its Ray worker is killed: otherwise it would run twice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run(command: list[str], runs_dir: Path, pattern: str, result: str) -> Path:
    """Run a script unless its result is there; go on with a run that was killed. The path of the result.

    Raises:
        RuntimeError: the script failed; with the end of what it said
    """
    finished = list(runs_dir.glob(f"{pattern}/{result}"))
    if not finished:
        begun = sorted(path.parent for path in runs_dir.glob(f"{pattern}/checkpoint.pt"))
        command = [command[0], f"--resume={begun[-1]}", "--wandb-mode=disabled"] if begun else command
        said = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, preexec_fn=end_with_parent, cwd=ROOT
        )
        if said.returncode:
            raise RuntimeError((said.stderr.strip().splitlines() or ["nothing said"])[-1])
        finished = list(runs_dir.glob(f"{pattern}/{result}"))
    return max(finished)


OPPONENTS, EPISODES = 4, 50  # opponents that a team meets in `cross_play`, and episodes against each


def cross_play(result: Path, rivals: Path) -> tuple[Path, int]:
    """A folder with policies of a run of ernie_maddpg.py or rma3c.py whose teams meet opponents that have trained
    elsewhere, the same for every method: the team of seed k those of the next seeds of the run of `rivals`; and how
    many."""
    ours, theirs = (runs.load(path.with_name("policy.pt")) for path in (result, rivals))
    args = ours["args"]
    S = args["num_seeds"]
    count = min(OPPONENTS, S - 1)
    shift = 1 + torch.arange(count)
    other = (torch.arange(S)[:, None] + shift).flatten() % S  # [S * count]
    is_team = envs.make(args["env_id"], 1).cooperators[:, None]
    nets = {}
    for name, flat in ours["nets"].items():
        own = flat.unflatten(0, (S, -1)).repeat_interleave(count, 0)
        rival = flat if name.startswith("adversary") else theirs["nets"][name]  # RMA3C's, which the rivals have not
        opponents = rival.unflatten(0, (S, -1))[other]
        nets[name] = torch.where(is_team, own, opponents).flatten(0, 1)
    digest = hashlib.sha256(f"{rivals} {count} {EPISODES}".encode()).hexdigest()[:8]
    folder = result.with_name(f"cross_play-{digest}")
    folder.mkdir(exist_ok=True)
    runs.save(folder / "policy.pt", {"args": args | {"num_seeds": S * count}, "nets": nets})
    return folder, count


def averaged(result: Path, count: int) -> Path:
    """The result of a cross-play, of each team its mean over the opponents, beside it."""
    rows = runs.read_rows(result)
    first = int(rows[0]["seed"])
    cells: dict[tuple, list[float]] = {}
    for row in rows:
        seed = first + (int(row["seed"]) - first) // count
        point = row["env_id"], seed, row["agent"], row["perturbation"], row["strength"]
        cells.setdefault(point, []).append(float(row["return"]))
    names = "env_id", "seed", "agent", "perturbation", "strength"
    means = [dict(zip(names, point)) | {"return": np.mean(values)} for point, values in cells.items()]
    means = [row for row in means if row["perturbation"] != "worst_case"]  # of the means, not of each opponent
    means += robustness.worst_case(means, (*robustness.ATTACKS, "critic"), "return")
    path = result.with_name("mean.csv")
    runs.write_rows(path, means)
    return path


def words(flags: Flags) -> list[str]:
    """A command line."""
    line = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            line += [f"--{flag}", *map(str, value)]
        else:
            line.append(f"--{flag}={value}")
    return line


@dataclass
class Cluster:
    """Ray, what runs on it and what went wrong."""

    args: Args
    failures: list[str] = field(default_factory=list)

    def __post_init__(self):
        try:
            import ray
        except ImportError:
            sys.exit("reproduce.py: error: Ray is missing: pip install -r benchmarks/requirements.txt")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the runs on a machine with other work
        ray.init(address=self.args.ray_address, log_to_driver=False)
        self.ray = ray
        self.task = ray.remote(num_cpus=self.args.cpus_per_run, num_gpus=self.args.gpus_per_run, max_retries=5)(run)

    def start(self, name: str, study: Study, method: str, flags: Flags, seeds: tuple[int, int], reused: Flags = {}):
        """The task of a run; its name is `name`, the study's and the method's, with a digest of its flags and seeds:
        a run with others is another run. `reused` flags, paths that differ between machines, do not count, and give
        way to its own."""
        script = study.scripts.get(method, study.script)
        flags = study.flags | flags
        if self.args.quick:
            flags |= study.quick
            name = f"quick_{name}"
        flags |= {"seed": seeds[0], "num_seeds": seeds[1] - seeds[0] + 1}
        digest = hashlib.sha256(" ".join([script, *words(flags)]).encode()).hexdigest()[:8]
        name = f"{name}-{digest}"
        flags = reused | flags | {"exp_name": name, "runs_dir": self.args.runs_dir, "wandb_mode": "disabled"}
        command = [str(ROOT / script), *words(flags)]
        task = self.task.options(name=name)
        return name, task.remote(command, self.args.runs_dir, f"*__{name}__{seeds[0]}__*", study.result.file)

    def get(self, started) -> Path | None:
        """The result of a run, None if it failed."""
        name, reference = started
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            self.failures.append(f"{name}: {cause}")
            print(f"FAILED {self.failures[-1]}", file=sys.stderr, flush=True)
            return None

    def meet(self, study: Study, found: list[tuple[str, Path | None]], rivals: Path | None) -> list[Path | None]:
        """Results of runs, each with its method, against the opponents of another one where the study asks for that."""
        if not study.fixed_opponents:
            return [path for _, path in found]
        started = {}
        for method, path in found:
            if path and rivals:
                folder, count = cross_play(path, rivals)
                script = study.scripts.get(method, study.script)
                command = [str(ROOT / script), f"--evaluate={folder}", f"--eval-episodes={EPISODES}"]
                task = self.task.remote(command, folder.parent, folder.name, study.result.file)
                started[path] = (f"{path.parent.name}, cross-play", task), count
        means = {}
        for path, (run, count) in started.items():
            if result := self.get(run):
                means[path] = averaged(result, count)
        return [means.get(path) for _, path in found]


def train(name: str, cluster: Cluster) -> dict[str, tuple[Flags, Path]]:
    """All runs of a study: method -> flags of its point of the grid, result."""
    study, quick = STUDIES[name], cluster.args.quick
    seeds = (1, 2) if quick else cluster.args.seeds or study.seeds
    grids = {method: grid[:1] if quick else grid for method, grid in study.methods.items()}
    pending = {}
    for method, grid in grids.items():
        if len(grid) > 1 or (study.points or study.fixed_opponents) and not quick:
            run_name = f"{name}_{method}_select"
            pending[method] = [
                cluster.start(f"{run_name}{k}", study, method, flags | study.select, study.select_seeds)
                for k, flags in enumerate(grid)
            ]
    reused, found = {}, {}
    if study.reuse:
        first, more = study.reuse
        (flags,) = grids[first]
        path = cluster.get(cluster.start(f"{name}_{first}", study, first, flags, seeds))
        if path is None:
            return {}
        found[first] = flags, path
        reused = {flag: value.format(folder=path.parent) for flag, value in more.items()}
    chosen = {method: grid[0] for method, grid in grids.items()}
    started = {}
    remaining = [method for method in grids if method not in found]
    points = []
    plain = next(iter(grids))
    rivals = None  # of the choice
    for method in sorted(remaining, key=lambda method: method in pending):  # choices last
        if method in pending:
            paths = [cluster.get(run) for run in pending[method]]
            if method == plain:
                rivals = paths[0]
            paths = cluster.meet(study, [(method, path) for path in paths], rivals)
            scores = [score(study, method, path) if path else np.nan for path in paths]
            if len(grids[method]) > 1:
                if not np.isfinite(scores).any():
                    cluster.failures.append(f"{name}_{method}: no point of its grid has a result")
                    continue
                chosen[method] = grids[method][int(np.nanargmax(scores))]
            for number, (flags, path) in enumerate(zip(grids[method], paths), 1):
                if path:
                    points += point_rows(study, method, number, flags, path)
            shown = ", ".join(f"{value:.2f}" for value in scores)
            print(f"{name} {method}: {' '.join(words(chosen[method]))}  (scores: {shown})", flush=True)
        flags = chosen[method]
        started[method] = flags, cluster.start(f"{name}_{method}", study, method, flags, seeds, reused)
    paths = {method: cluster.get(task) for method, (_, task) in started.items()}
    met = cluster.meet(study, list(paths.items()), paths.get(plain))
    for (method, (flags, _)), path in zip(started.items(), met):
        if path:
            found[method] = flags, path
    if study.points and points:
        runs.write_rows(cluster.args.results_dir / f"{name}_points.csv", points)
    return {method: found[method] for method in grids if method in found}


# --------------------------------------------------------------------------------------------------------------------
# Results


def read(study: Study, method: str, path: Path) -> Rows:
    """A row per method, perturbation, level and seed of a run's result."""
    rows = []
    for row in runs.read_rows(path):
        found = {"script": study.scripts.get(method, study.script), "env_id": row.pop("env_id", "")}
        found["method"] = study.label(row, method) if study.label else method
        policy = row.pop("policy", None)  # traffic: the trained lights, or a fixed cycle
        if policy in robustness.SIGNALS:
            found["method"] = policy
        found |= {"perturbation": row.pop("perturbation", study.result.level or "training")}
        found |= {"level": row.pop(study.result.level, "0.0"), "seed": row.pop("seed")}
        own = ("regularizer", "method", "num_agents", "standard_error", "episodes")
        rows.append(found | {k: v for k, v in row.items() if k not in own})
    return rows


def table_of(rows: Rows, method: str, value: str) -> Table:
    table = {}
    for row in rows:
        if row["method"] == method:
            values = table.setdefault((row.get("agent", ""), row["perturbation"], row["level"]), {})
            values[int(row["seed"])] = row[value]
    return {key: np.array([float(seeds[s]) for s in sorted(seeds)]) for key, seeds in table.items()}


def cells(study: Study, table: Table, family: str) -> list[np.ndarray]:
    """Values of each seed at every level of a perturbation; of agents taken together where there are rows of each."""
    agents = {agent for agent, *_ in table}
    return [v for (agent, f, _), v in table.items() if f == family and (agent == "mean" or "mean" not in agents)]


def score(study: Study, method: str, path: Path) -> float:
    """What the point of a grid is chosen by."""
    table = table_of(read(study, method, path), method, study.result.value)
    return float(np.mean([v.mean() for family in ("clean", *study.shown) for v in cells(study, table, family)]))


def point_rows(study: Study, method: str, number: int, flags: Flags, path: Path) -> Rows:
    """A row per perturbation of a point of a grid: mean over the levels, with its interval over seeds, and the last."""
    rows, table = [], table_of(read(study, method, path), method, study.result.value)
    for family in ("clean", *study.shown):
        levels = np.array(cells(study, table, family))  # [levels, seeds]
        values = levels.mean(0)
        row = {"method": method, "point": number, "flags": " ".join(words(flags)), "perturbation": family}
        row |= {"seeds": len(values), study.result.value: values.mean(), "interval95": interval(values)}
        row["strongest"] = levels[-1].mean()
        rows.append(row)
    return rows


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half."""
    return stats.trim_mean(values, 0.25, axis=axis)


def bootstrap(values: np.ndarray, statistic: Callable = iqm, repeats: int = 2000) -> tuple[float, float]:
    """95% percentile interval of a statistic of [levels, seeds]: seeds are drawn again, within every level the same
    ones, because a level's values are of the same trained policies."""
    values = np.atleast_2d(values)
    pick = np.random.default_rng(0).integers(values.shape[1], size=(repeats, values.shape[1]))
    found = statistic(values[:, pick].swapaxes(0, 1).reshape(repeats, -1), axis=-1)
    return tuple(np.quantile(found, (0.025, 0.975)).tolist())


def summarise(study: Study, tables: dict[str, Table]) -> Rows:
    """A row per method, agent, perturbation and level."""
    rows, baseline = [], next(iter(tables))
    for method, table in tables.items():
        for (agent, family, level), values in table.items():
            low, high = bootstrap(values)
            other = tables[baseline].get((agent, family, level), np.array([]))
            gain = values - other if len(other) == len(values) else np.array([np.nan])
            rows.append(
                {"method": method, "agent": agent, "perturbation": family, "level": level, "seeds": len(values)}
                | {study.result.value: values.mean(), "interval95": interval(values)}
                | {"iqm": iqm(values), "iqm_low": low, "iqm_high": high, "worst_seed": values.min()}
                | {f"less_{baseline}": gain.mean(), f"less_{baseline}_interval95": interval(gain)}
            )
    return rows


def judge(name: str, study: Study, tables: dict[str, Table]) -> Rows:
    """What paired differences between two methods, mean over the levels of a perturbation, say of the claims."""
    rows = []
    for better, worse in study.claims:
        for family in ("clean", *study.shown):
            if better not in tables or worse not in tables:
                continue
            pairs = [cells(study, tables[method], family) for method in (better, worse)]
            if not pairs[0] or {v.shape for v in pairs[0]} != {v.shape for v in pairs[1]}:
                continue
            gains = np.array(pairs[0]) - np.array(pairs[1])  # [levels, seeds]
            mean, half, (low, high) = gains.mean(), interval(gains.mean(0)), bootstrap(gains)
            verdict = "better" if mean > half else "worse" if mean < -half else "no difference"
            if np.isnan(half):
                verdict = "a single seed"
            row = {"study": name, "method": better, "compared_with": worse, "perturbation": family, "mean": mean}
            row |= {"interval95": half, "iqm": iqm(gains.reshape(-1)), "iqm_low": low, "iqm_high": high}
            p = stats.ttest_1samp(gains.mean(0), 0).pvalue if gains.shape[1] > 1 else 1.0
            rows.append(row | {"seeds": gains.shape[1], "p": p, "verdict": verdict})
    return rows


METHODS = {  # colour, and name in a legend with the paper's
    "none": ("C0", "none: the plain algorithm"),
    "gaussian": ("C1", "gaussian: the paper's noise baseline"),
    "random": ("C2", "random: a direction of equal length"),
    "adversarial": ("C3", "adversarial: ERNIE without Stackelberg"),
    "stackelberg": ("C4", "stackelberg: ERNIE"),
    "stackelberg_1": ("C1", "stackelberg: ERNIE, K = 1"),
    "ernie_a": ("C5", "ERNIE-A"),
    "maddpg": ("C9", "MADDPG"),
    "m3ddpg": ("C5", "M3DDPG"),
    "default": ("C6", "stackelberg: ERNIE, epsilon 0.3, lambda 0.1"),
    "rma3c": ("C7", "RMA3C"),
    "discrete": ("C8", "none, discrete actions"),
    "numbered": ("C5", "none, observations in mpe2's order"),
}
PERTURBATIONS = {  # what an axis shows
    "clean": "as in training",
    "gaussian": "Gaussian noise on observations, standard deviation",
    "mad": "worst-case observations (MAD), radius",
    "executed": "worst-case observations (played action), radius",
    "worst_case": "the worst of the attacks on observations, radius",
    "flip_one": "one light does the opposite, probability",
    "flip_each": "each light does the opposite, probability",
    "speed": "speed of the cars, m/s",
    "flow": "flow of cars, of the paper's table 1",
    "network": "lights set up in another network",
    "eta": "risk aversion of new agents",
    "q": "Q of the test game",
}
VALUES = {
    "return": "return of an agent",
    "reward": "reward of all lights in a second",
    "welfare": "equality x productivity",
    "planner_reward": "reward of the planner in a step",
}


def style(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and name of each method: those of METHODS, or the colour of its place."""
    return {method: METHODS.get(method, (f"C{k}", method)) for k, method in enumerate(methods)}


def draw_levels(axis, curves: dict[str, np.ndarray], levels: list[str], styles: dict, is_ordered: bool) -> None:
    """Mean and 95% interval over seeds of curves [levels, seeds]: lines with bands, or points where levels have no
    order. An interval that is wider than all means are apart, of a seed that is lost, leaves the picture."""
    means = np.array([values.mean(1) for values in curves.values()])
    halves = np.array([interval(values.T) for values in curves.values()])
    is_wide = halves > np.ptp(means)
    if not is_ordered and is_wide.any() and not is_wide.all():
        low, high = (means - halves)[~is_wide].min(), (means + halves)[~is_wide].max()
        margin = 0.05 * (high - low)
        if margin > 0:  # more than the baseline's own difference is left
            axis.set_ylim(low - margin, high + margin)
    for k, (method, mean, half) in enumerate(zip(curves, means, halves)):
        color, label = styles[method]
        x = np.arange(len(mean))
        if is_ordered:
            axis.plot(x, mean, "o-", color=color, markersize=3, label=label)
            axis.fill_between(x, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
        else:
            x = x + 0.08 * (k - (len(curves) - 1) / 2)
            axis.errorbar(x, mean, half, fmt="o", color=color, markersize=3, capsize=2, label=label)
    axis.set_xticks(range(len(levels)), levels)
    axis.grid(alpha=0.3)


def draw(name: str, study: Study, tables: dict[str, Table]) -> Figure:
    """Under every perturbation shown the value of each method and, below, its difference to the first one, paired by
    seed."""
    first = next(iter(tables))
    names = dict.fromkeys(agent for agent, *_ in tables[first])
    agents = [agent for agent in names if agent != "mean"] or list(names)
    panels = []
    for agent in agents:
        for family in study.shown:
            levels = [level for a, f, level in tables[first] if a == agent and f in ("clean", family)]
            if len(levels) > 1:
                panels.append((agent, family, levels))
    across = 2 if len(panels) in (2, 4) else max(1, min(3, len(panels)))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(max(6.5, 4.2 * across), 4.8 * down + 0.8), layout="constrained")
    axes = figure.subplots(2 * down, across, squeeze=False)
    styles = style(list(tables))
    for k in range(down * across):
        row, column = 2 * (k // across), k % across
        value_axis, gain_axis = axes[row, column], axes[row + 1, column]
        if k >= len(panels):
            value_axis.remove()
            gain_axis.remove()
            continue
        agent, family, levels = panels[k]
        curves = {}
        for method, table in tables.items():
            points = [v for (a, f, _), v in table.items() if a == agent and f in ("clean", family)]
            if len(points) == len(levels):
                curves[method] = np.array(points)
        gains = {m: values - curves[first] for m, values in curves.items() if values.shape == curves[first].shape}
        labels = ["clean" if level == "0.0" and family not in ("q", "eta") else level for level in levels]
        is_ordered = family not in ("flow", "network")
        draw_levels(value_axis, curves, labels, styles, is_ordered)
        draw_levels(gain_axis, gains, labels, styles, is_ordered)
        gain_axis.set_xlabel(PERTURBATIONS[family])
        value_axis.set_title(agent if len(agents) > 1 else "", fontsize=10)
        if column == 0:
            value_axis.set_ylabel(VALUES[study.result.value], fontsize=9)
            gain_axis.set_ylabel(f"less {first}, paired", fontsize=9)
    handles = {}
    for axis in figure.axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=max(2, across), fontsize=9)
    seeds = {len(values) for table in tables.values() for values in table.values()}
    figure.suptitle(f"{name}: mean and 95% interval over {max(seeds)} seeds")
    return figure


def draw_points(study: Study, rows: Rows) -> Figure:
    """Each point of the grids: its value as in training and under the perturbation of `study.points`."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    axis = figure.subplots()
    styles = style(list(dict.fromkeys(row["method"] for row in rows)))
    for method, (color, label) in styles.items():
        values = {}
        for family in ("clean", study.points):
            own = [row for row in rows if row["method"] == method and row["perturbation"] == family]
            values[family] = {row["point"]: float(row["strongest"]) for row in own}
        x, y = values.values()
        axis.plot(x.values(), y.values(), "o", color=color, label=label)
        for point in x:
            axis.annotate(point, (x[point], y[point]), (3, 3), textcoords="offset points", fontsize=7, clip_on=True)
    clean = [float(row["strongest"]) for row in rows if row["perturbation"] == "clean"]
    low, high = np.quantile(clean, 0.1), max(clean)
    margin = 0.1 * (high - low)
    axis.set_xlim(low - margin, high + margin)
    value, under = VALUES[study.result.value], PERTURBATIONS[study.points].rsplit(",", 1)[0]
    axis.set(xlabel=f"{value}, {PERTURBATIONS['clean']}", ylabel=f"{value}, {under} of the largest radius")
    seeds = rows[0]["seeds"]
    title = f"short runs, mean of {seeds} seeds; numbers as in the table; the tenth that loses most is outside"
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def draw_percentiles(study: Study, tables: dict[str, Table]) -> Figure:
    """The seeds' values in order, as in ERNIE's Figures 5a and 5b."""
    styles = style(list(tables))
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axis, point in zip(figure.subplots(1, len(study.percentiles)), study.percentiles):
        for method, table in tables.items():
            values = np.sort(table.get(("", *point), np.array([])))
            x = 100 * (np.arange(len(values)) + 0.5) / len(values)
            color, label = styles[method]
            axis.plot(x, values, marker="o", markersize=3, color=color, label=label)
        family, level = point
        title = PERTURBATIONS[family].replace(", ", ",\n")
        title += "" if family == "clean" else f": {float(level):g}"
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("percentile of seeds")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel(VALUES[study.result.value])
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def report(name: str, found: dict[str, tuple[Flags, Path]], args: Args) -> None:
    """The table of a study, and what is made of it."""
    study = STUDIES[name]
    every = {method: read(study, method, path) for method, (_, path) in found.items()}
    first = next(iter(every))  # fixed cycles of lights are in the results of every run
    rows = [row for m, rows in every.items() for row in rows if m == first or row["method"] not in robustness.SIGNALS]
    runs.write_rows(args.results_dir / f"{name}.csv", rows)
    if study.picture:
        paths = {method: path for method, (_, path) in found.items()}
        study.picture(every, paths).savefig(args.results_dir / f"{name}.png", dpi=110)
    publish(name, rows, args)


def publish(name: str, rows: Rows, args: Args) -> None:
    """Summary, pictures and verdicts from the table of a study."""
    study, folder = STUDIES[name], args.results_dir
    methods = dict.fromkeys(row["method"] for row in rows)
    tables = {method: table_of(rows, method, study.result.value) for method in methods}
    runs.write_rows(folder / f"{name}_summary.csv", summarise(study, tables))
    learnt = {method: table for method, table in tables.items() if method not in robustness.SIGNALS}
    if not study.picture:
        draw(name, study, learnt).savefig(folder / f"{name}.png", dpi=100)
    for family in study.alone:
        draw(name, replace(study, shown=(family,)), learnt).savefig(folder / f"{name}_{family}.png", dpi=100)
    if study.points and (folder / f"{name}_points.csv").exists():
        points = runs.read_rows(folder / f"{name}_points.csv")
        draw_points(study, points).savefig(folder / f"{name}_points.png", dpi=100)
    if study.percentiles:
        draw_percentiles(study, learnt).savefig(folder / f"{name}_percentiles.png", dpi=100)
    verdicts, path = judge(name, study, tables), folder / "verdicts.csv"
    print(f"\n{name}. The paper: {study.text}.")
    for row in verdicts:
        line = "  {method} less {compared_with}, {perturbation}: {mean:+.2f} ± {interval95:.2f}: {verdict}"
        print(line.format_map(row), flush=True)
    kept = []
    if path.exists():
        kept = [row for row in runs.read_rows(path) if row["study"] != name and row["study"] in STUDIES]
    rows = sorted(kept + verdicts, key=lambda row: list(STUDIES).index(row["study"]))
    if rows:
        adjusted = stats.false_discovery_control([float(row["p"]) for row in rows])  # for so many comparisons
        for row, value in zip(rows, adjusted):
            row["p_adjusted"] = value
        runs.write_rows(path, rows)


# --------------------------------------------------------------------------------------------------------------------
# Beyond the papers: traffic lights


def in_sumo(args: Args) -> None:
    """Drive the trained lights of some studies, and the fixed cycles, in SUMO and in the batched simulator wherever the
    cars change, and plot both rewards."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    cars = {name: robustness.LIGHTS[name] for name in ("speed", "flow")}
    studies = [name for name in args.study if name in ("qcombo", "coma")] or ["qcombo", "coma"]
    path = args.results_dir / "traffic_in_sumo.csv"
    rows = runs.read_rows(path) if path.exists() else []
    rows = [row for row in rows if row.get("study") not in studies]
    for study, method in itertools.product(studies, ("none", "stackelberg")):
        seeds = args.seeds or STUDIES[study].seeds
        pattern = f"*__{study}_{method}-*__{seeds[0]}__*/policy.pt"
        trained = max(args.runs_dir.glob(pattern), key=os.path.getmtime, default=None)
        if trained is None:
            sys.exit(f"reproduce.py: error: no {pattern} in {args.runs_dir}: --study {study} trains it")
        run = attack.load_run(trained.parent)
        script, options, _ = run
        _, nets = attack.rebuild(run, device, seconds=1, warmup=0)
        rewards = {}  # (method, perturbation, level, seed) -> in each simulator
        for backend in ("torch", "sumo"):
            chosen = replace(options, evaluate=str(trained), backend=backend, eval_seconds=1000)
            lights = script.make_lights(nets, chosen, device, 1, np.inf)
            for row in robustness.try_lights(lights, cars, robustness.NETWORKS, {"policy": method}):
                point = row["policy"], row["perturbation"], str(row["strength"]), row["seed"]
                rewards.setdefault(point, {})[backend] = row["reward"]
        names = "method", "perturbation", "level", "seed"
        rows += [{"study": study} | dict(zip(names, point)) | both for point, both in rewards.items()]
    runs.write_rows(path, rows)
    draw_in_sumo(rows).savefig(args.results_dir / "traffic_in_sumo.png", dpi=110)


def draw_in_sumo(rows: Rows) -> Figure:
    """Minus the reward in SUMO against that in the batched simulator, a point per method, change and seed."""
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axis = figure.add_subplot()
    costs = {}
    for row in rows:
        name = row["method"] if row["method"] in robustness.SIGNALS else f"{row['study']}, {row['method']}"
        costs.setdefault(name, []).append((-float(row["torch"]), -float(row["sumo"])))
    for name, points in costs.items():
        axis.scatter(*zip(*points), s=10, alpha=0.6, label=name)
    every = np.concatenate(list(costs.values()))
    low, high = every.min() * 0.8, every.max() * 1.25
    correlation = np.corrcoef(np.log(every).T)[0, 1]
    axis.plot([low, high], [low, high], color="gray", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="cost in the batched simulator", ylabel="cost in SUMO")
    ticks = [tick for tick in (20, 30, 50, 100, 200, 300, 500, 1000) if low < tick < high]
    axis.minorticks_off()
    axis.set(xticks=ticks, yticks=ticks, xticklabels=ticks, yticklabels=ticks)
    title = f"minus the reward of all lights in a second, of each seed;\ncorrelation of logarithms {correlation:.3f}"
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8)
    return figure


CONTROLLERS = {
    "never switching": lambda env, state: torch.zeros_like(state.direction.T),
    "random, p = 0.05": lambda env, state: (torch.rand_like(state.direction.T * 1.0) < 0.05).long(),
    "random, p = 0.5": lambda env, state: (torch.rand_like(state.direction.T * 1.0) < 0.5).long(),
    **{f"fixed time {g} s": partial(streets.fixed_time, green=g) for g in (7, 12, 17, 22, 27, 32, 42)},
    **{
        f"fixed time {g} s, half a cycle apart": partial(streets.fixed_time, green=g, offset=g + 3)
        for g in (17, 22, 27)
    },
    **{f"longest queue, {g} s": partial(streets.longest_queue, min_green=g) for g in (10, 25)},
    **{f"max pressure, {g} s": partial(streets.max_pressure, min_green=g) for g in (10, 25)},
}


def ladder(args: Args, seconds: int = 4000) -> None:
    """What simple controllers get on the training flow, after 1,000 s of random switching."""
    torch.set_num_threads(1)
    rows = []
    for backend in ("torch", "sumo") if args.sumo else ("torch",):
        options = ernie_qcombo.Args(evaluate="none", backend=backend)
        env = ernie_qcombo.make_env(options, args.episodes, torch.device("cpu"), warmup=1000, horizon=seconds)
        step = env.step if backend == "sumo" else torch.compile(env.step, fullgraph=True, dynamic=False)
        for name, controller in CONTROLLERS.items():
            torch.manual_seed(0)
            generators = envs.make_generators(1, 1, "ladder", torch.device("cpu"))
            means = streets.simulate(env, step, lambda state, _: controller(env, state), generators)
            values = {column: means[column].double().numpy() for column in ("reward", "left_per_minute", "backlog")}
            row = {"backend": backend, "controller": name, "reward": values["reward"].mean()}
            row |= {"interval95": interval(values["reward"]), "left_per_minute": values["left_per_minute"].mean()}
            rows.append(row | {"backlog": values["backlog"].mean()})
            print(f"{backend:6s} {name:40s} {row['reward']:9.1f} ± {row['interval95']:.1f}", flush=True)
    runs.write_rows(args.results_dir / "traffic_ladder.csv", rows)


def main() -> None:
    with runs.quiet_pipe():
        args = tyro.cli(Args, description=__doc__)
    wanted = [FIGURES[f] for f in args.figure] + [TABLES[t] for t in args.table]
    wanted.append(tuple(STUDIES) if args.all else args.study)
    names = list(dict.fromkeys(name for group in wanted for name in group))
    args.runs_dir = args.runs_dir.resolve()  # a task may start elsewhere
    args.results_dir = args.results_dir / "quick" if args.quick else args.results_dir
    with runs.exits(2, ValueError, OSError):
        if not names and not args.extra:
            raise ValueError("nothing asked for: --figure, --table, --study, --extra or --all")
        if args.seeds and args.seeds[0] == args.seeds[1] and any(STUDIES[name].fixed_opponents for name in names):
            raise ValueError("--seeds must be two or more of tag and crypto, whose teams meet each other's opponents")
        for folder in (args.runs_dir, args.results_dir):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"cannot write into {folder}")
    if args.redraw:
        for name in names:
            with runs.exits(2, OSError):
                rows = runs.read_rows(args.results_dir / f"{name}.csv")
            publish(name, rows, args)
        return
    failures = []
    if names:
        cluster = Cluster(args)
        with ThreadPoolExecutor(len(names)) as pool:  # all runs of all studies are in the queue at once
            for name, found in zip(names, pool.map(partial(train, cluster=cluster), names)):
                if found:
                    report(name, found, args)
        failures = cluster.failures
    for extra in args.extra:
        {"ladder": ladder, "in-sumo": in_sumo}[extra](args)
    if failures:
        sys.exit("\n".join(["reproduce.py: these runs failed:", *failures]))


if __name__ == "__main__":
    main()
