"""The papers' robustness figures, from training to picture. Each run is a Ray task, on a laptop as on a cluster.

    pip install -r benchmarks/requirements.txt
    python benchmarks/reproduce.py particle                       # ERNIE, Figures 3 and 9: MADDPG, observation noise
    python benchmarks/reproduce.py drones                         # ERNIE, Figure 6: MAPPO, observation noise
    python benchmarks/reproduce.py meanfield                      # ERNIE, Figure 4: mean-field MADDPG, N = 3 to 30
    python benchmarks/reproduce.py traffic                        # ERNIE, Figures 1, 2, 5 and Tables 3, 4: QCOMBO
    python benchmarks/reproduce.py traffic --algorithm coma       # ERNIE, Figure 7 and Tables 2, 3, 4: COMA
    python benchmarks/reproduce.py ladder --sumo                  # traffic: simple controllers, in SUMO too
    python benchmarks/reproduce.py traffic-in-sumo                # the runs of `traffic` driven in SUMO
    python benchmarks/reproduce.py economy                        # ERMAS, Figure 6: taxes under other risk aversion
    python benchmarks/reproduce.py particle --ray-address auto    # the same on a Ray cluster

`particle`, `drones` and `meanfield`: every method gets the same grid of (epsilon, lambda), or alpha for M3DDPG. Chosen
is the point with the highest return, averaged over the clean environment and all strengths of Gaussian noise and of the
MAD attack, on the seeds of `--select-seeds` (`meanfield`: with the fewest agents); the figures come from other seeds,
`--seeds`. `traffic`: lambda was chosen on seeds 1 to 3, the figures come from `--seeds`. A run that is already in
`--runs-dir` is not run again.
"""

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ernie_qcombo
from envs import traffic as streets

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Where:
    runs_dir: Path = ROOT / "runs" / "reproduce"
    """folder of the runs"""
    results_dir: Path = ROOT / "benchmarks" / "results"
    """folder of the small CSV files and pictures"""
    ray_address: str | None = None
    """address of a Ray cluster; default: this machine"""


def run(command: list[str], found: tuple[Path, str]) -> Path:
    """Run a script unless its result is there: the newest file of that pattern in a folder."""
    folder, pattern = found
    if not list(folder.glob(pattern)):
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return max(folder.glob(pattern))


def remote(where: Where):
    """`run` as a Ray task."""
    import ray

    where.results_dir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the runs on a machine with other work
    ray.init(address=where.ray_address, log_to_driver=False)
    return ray.remote(num_cpus=1)(run).remote, ray.get


def read(path: Path, policy=None, column="return", agent=None) -> dict[tuple[str, str], np.ndarray]:
    """(perturbation, strength) -> value of each seed; of one policy or agent where the file has several."""
    table = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if policy in (None, row.get("policy")) and agent in (None, row.get("agent")):
                table.setdefault((row["perturbation"], row["strength"]), []).append(float(row[column]))
    return {key: np.array(values) for key, values in table.items()}


def interval(values: np.ndarray) -> float:
    """Half-width of the 95% t-interval of the mean over seeds."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def write(path: Path, columns: list[str], rows: list[list]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


# --------------------------------------------------------------------------------------------------------------------
# particle: ernie_maddpg.py

SHOWN = {"gaussian": "standard deviation of Gaussian noise", "mad": "radius of worst-case observations (MAD)"}
GRID = [f"--epsilon={epsilon} --reg-coef={coef}" for epsilon, coef in ((0.3, 0.02), (0.5, 0.1))]
METHODS = {  # name: flags of each point of its grid
    "none": ["--regularizer=none"],
    "gaussian": [f"--regularizer=gaussian {point}" for point in GRID],
    "random": [f"--regularizer=random {point}" for point in GRID],
    "adversarial": [f"--regularizer=adversarial {point}" for point in GRID],
    "stackelberg": [f"--regularizer=stackelberg {point}" for point in GRID],
    "m3ddpg": [f"--regularizer=none --minimax-epsilon={alpha}" for alpha in (0.01, 0.1)],
}


def score(path: Path, agent: str | None = None) -> float:
    return float(np.mean([v.mean() for (f, _), v in read(path, agent=agent).items() if f in ("clean", *SHOWN)]))


def grids_of(points: tuple[tuple[float, float], ...]) -> dict[str, list[str]]:
    """The plain algorithm, and regularised ones at points (epsilon, lambda): flags of each point of a method's grid."""
    grid = [f"--epsilon={epsilon} --reg-coef={coef}" for epsilon, coef in points]
    modes = ("gaussian", "adversarial", "stackelberg")
    return {"none": ["--regularizer=none"]} | {m: [f"--regularizer={m} {point}" for point in grid] for m in modes}


def command_of(script: str, name: str, flags: str, seeds: tuple[int, int], total_timesteps: int, where: Where) -> list:
    """Command of a run that leaves one checkpoint, at its end."""
    command = [str(ROOT / script), f"--exp-name={name}", *flags.split(), f"--runs-dir={where.runs_dir}", "--no-track"]
    command += [f"--seed={seeds[0]}", f"--num-seeds={seeds[1] - seeds[0] + 1}"]
    return [*command, f"--total-timesteps={total_timesteps}", f"--checkpoint-interval={total_timesteps}"]


def select_and_train(train, get, grids: dict[str, list[str]], seeds, select_seeds, prefix="", agent=None) -> dict:
    """Every point of each method's grid on the selection seeds, then the best one on the others: method -> (flags,
    result of the run). train(name, flags, seeds, selects) starts a run; results are read by `get`."""
    pending = {
        (method, i): train(f"{prefix}select_{method}_{i}", flags, select_seeds, True)
        for method, grid in grids.items()
        for i, flags in enumerate(grid)
        if len(grid) > 1
    }
    final = {}
    for method, grid in grids.items():
        scores = [score(get(pending[method, i]), agent) if len(grid) > 1 else 0.0 for i in range(len(grid))]
        flags = grid[int(np.argmax(scores))]
        print(f"{prefix}{method:12s} {flags}  (grid: {', '.join(f'{s:.2f}' for s in scores)})", flush=True)
        final[method] = flags, train(f"{prefix}final_{method}", flags, seeds, False)
    return final


def particle(
    where: Where,
    env_ids: tuple[str, ...] = ("simple_spread_v3", "simple_tag_v3", "simple_crypto_v3"),
    seeds: tuple[int, int] = (1, 5),
    select_seeds: tuple[int, int] = (101, 102),
    total_timesteps: int = 200_000,
    eval_episodes: int = 1000,
) -> None:
    """Return against observation noise for every method of ernie_maddpg.py.

    Args:
        env_ids: tasks
        seeds: first and last seed of the figures
        select_seeds: first and last seed on which each method's point of the grid is chosen
        total_timesteps: environment steps of each run
        eval_episodes: episodes of a seed at each point of the figures
    """
    start, get = remote(where)

    def train(name: str, flags: str, seeds: tuple[int, int], selects: bool, task: str):
        command = command_of("ernie_maddpg.py", name, flags, seeds, total_timesteps, where)
        command += [f"--env-id={task}", f"--eval-episodes={100 if selects else eval_episodes}"]
        command += ["--batch-size=512", "--reg-batch-size=128"]
        return start(command, (where.runs_dir, f"{task}__{name}__{seeds[0]}__*/robustness.csv"))

    final = {}
    for task in env_ids:
        found = select_and_train(partial(train, task=task), get, METHODS, seeds, select_seeds)
        final |= {(task, method): run for method, run in found.items()}
    rows = []
    for (task, method), (flags, path) in final.items():
        for (family, strength), values in read(get(path)).items():
            rows.append([task, method, flags, family, strength, values.mean(), interval(values), len(values)])
    columns = ["env_id", "method", "flags", "perturbation", "strength", "return", "interval95", "seeds"]
    write(where.results_dir / "particle.csv", columns, rows)
    for task in env_ids:
        tables = {m: read(get(path)) for (t, m), (_, path) in final.items() if t == task}
        plot_particle(task, tables, where.results_dir)


def plot_particle(task: str, tables: dict[str, dict], folder: Path) -> None:
    """Return against strength, one panel per perturbation, one line per method with its 95% band over seeds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (family, label) in zip(figure.subplots(1, len(SHOWN), sharey=True), SHOWN.items()):
        for method, table in tables.items():
            points = [(float(s), v) for (f, s), v in table.items() if f == family or f == "clean"]
            strength, mean = [s for s, _ in points], np.array([v.mean() for _, v in points])
            half = np.array([interval(v) for _, v in points])
            color = f"C{list(METHODS).index(method)}"  # the same in every figure
            axis.plot(strength, mean, marker="o", markersize=3, label=method, color=color)
            axis.fill_between(strength, mean - half, mean + half, color=color, alpha=0.12)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("return of the cooperating agents")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{task}: mean and 95% interval over {len(next(iter(next(iter(tables.values())).values())))} seeds")
    figure.savefig(folder / f"particle_{task}.png", dpi=120)


# --------------------------------------------------------------------------------------------------------------------
# drones: ernie_mappo.py

DRONE_METHODS = grids_of(((0.3, 0.1), (1.0, 0.1), (1.0, 1.0)))


def drones(
    where: Where,
    seeds: tuple[int, int] = (1, 5),
    select_seeds: tuple[int, int] = (101, 102),
    total_timesteps: int = 500_000,
) -> None:
    """Return of leader and follower against observation noise for every method of ernie_mappo.py.

    Args:
        seeds: first and last seed of the figures
        select_seeds: first and last seed on which each method's point of the grid is chosen
        total_timesteps: environment steps of each run
    """
    start, get = remote(where)

    def train(name: str, flags: str, seeds: tuple[int, int], selects: bool):
        command = [*command_of("ernie_mappo.py", name, flags, seeds, total_timesteps, where), "--compile"]
        return start(command, (where.runs_dir, f"leader_follower_v0__{name}__{seeds[0]}__*/robustness.csv"))

    final = select_and_train(train, get, DRONE_METHODS, seeds, select_seeds, "drones_", "mean")
    rows, agents = [], ("leader_0", "follower_0")
    for method, (flags, path) in final.items():
        for agent in (*agents, "mean"):
            for (family, strength), values in read(get(path), agent=agent).items():
                rows.append([method, flags, agent, family, strength, values.mean(), interval(values), len(values)])
    columns = ["method", "flags", "agent", "perturbation", "strength", "return", "interval95", "seeds"]
    write(where.results_dir / "drones.csv", columns, rows)
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (agent, family) in zip(figure.subplots(2, 2).flat, [(a, f) for a in agents for f in SHOWN]):
        for method, (_, path) in final.items():
            table = read(get(path), agent=agent)
            points = [(float(s), v) for (f, s), v in table.items() if f in ("clean", family)]
            means, halves = [v.mean() for _, v in points], [interval(v) for _, v in points]
            axis.errorbar(range(len(points)), means, halves, marker="o", markersize=3, capsize=3, label=method)
            axis.set_xticks(range(len(points)), [f"{s:g}" for s, _ in points])
        axis.set(xlabel=SHOWN[family], ylabel=f"return, {agent}")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"leader_follower_v0: mean and 95% interval over {seeds[1] - seeds[0] + 1} seeds")
    figure.savefig(where.results_dir / "drones.png", dpi=110)


# --------------------------------------------------------------------------------------------------------------------
# meanfield: ernie_meanfield.py

MEAN_FIELD_METHODS = grids_of(((0.1, 0.1), (0.3, 0.1), (0.3, 1.0)))
MADDPG = {  # ernie_maddpg.py: flags, largest number of agents
    "maddpg": ("--regularizer=none", 15),
    "m3ddpg": ("--regularizer=none --minimax-epsilon=0.01", 6),
}


def meanfield(
    where: Where,
    agents: tuple[int, ...] = (3, 6, 15, 30),
    widths: tuple[int, ...] = (32, 64, 128, 256),
    seeds: tuple[int, int] = (1, 5),
    select_seeds: tuple[int, int] = (101, 102),
    total_timesteps: int = 100_000,
) -> None:
    """Return against observation noise for several numbers of agents and, with the first of them, widths.

    Args:
        agents: numbers of agents; MADDPG up to 15, M3DDPG up to 6
        widths: hidden units (Figure 4d)
        seeds: first and last seed of the figures
        select_seeds: first and last seed on which each method's point of the grid is chosen, with the fewest agents
        total_timesteps: environment steps of each run
    """
    start, get = remote(where)

    def train(name: str, flags: str, seeds: tuple[int, int], selects=False, count=agents[0], script="meanfield"):
        name = f"{name}_{count}"
        command = command_of(f"ernie_{script}.py", name, flags, seeds, total_timesteps, where)
        command += [
            f"--num-agents={count}",
            f"--batch-size={1536 // count}",
        ]  # samples of all agents: as many for all N
        command += ["--steps-per-update=25", "--log-interval=20000", "--attack-steps=1"]
        if script == "meanfield":
            transfer = [f"--eval-agents={n}" if k == 0 else str(n) for k, n in enumerate(agents)]
            command += [f"--reg-batch-size={max(8, 96 // count)}", "--transport-steps=50", *transfer]
        return start(command, (where.runs_dir, f"simple_spread_v3__{name}__{seeds[0]}__*/robustness.csv"))

    chosen = select_and_train(train, get, MEAN_FIELD_METHODS, seeds, select_seeds, "meanfield_")
    runs = {(m, agents[0], 64): run for m, run in chosen.items()}
    for count in agents[1:]:
        for method, (flags, _) in chosen.items():
            runs[method, count, 64] = flags, train(f"meanfield_final_{method}", flags, seeds, count=count)
    for method, (flags, most) in MADDPG.items():
        for count in (n for n in agents if n <= most):
            runs[method, count, 64] = flags, train(f"{method}_final", flags, seeds, count=count, script="maddpg")
    for method, (flags, _) in chosen.items():
        for width in (w for w in widths if w != 64 and method in ("none", "stackelberg")):
            wide = f"{flags} --hidden-size={width}"
            runs[method, agents[0], width] = flags, train(f"meanfield_width{width}_{method}", wide, seeds)
    tables, rows = {}, []
    for (method, count, width), (flags, path) in runs.items():
        table = tables[method, count, width] = read(get(path))
        for point, values in table.items():
            rows.append([count, method, width, flags, *point, values.mean(), interval(values), len(values)])
    columns = ["num_agents", "method", "hidden_size", "flags", "perturbation", "strength", "return", "interval95"]
    write(where.results_dir / "meanfield.csv", [*columns, "seeds"], rows)
    plot_meanfield(tables, agents, widths, where.results_dir / "meanfield.png")


def plot_meanfield(tables: dict[tuple, dict], agents: tuple[int, ...], widths: tuple[int, ...], path: Path) -> None:
    """Return against noise (above) and against worst-case observations (below) for each N and for each width."""
    names, titles = [*MEAN_FIELD_METHODS, *MADDPG], [f"N = {n}" for n in agents]
    titles += [f"width, N = {agents[0]}"] * (len(widths) > 1)
    figure = Figure(figsize=(4.5 * len(titles), 7), layout="constrained")
    axes = figure.subplots(2, len(titles), squeeze=False)
    for row, (family, label) in zip(axes, SHOWN.items()):
        panels = [{m: tables[m, n, 64] for m in names if (m, n, 64) in tables} for n in agents]
        panels.append({f"stackelberg, {w} units": tables["stackelberg", agents[0], w] for w in widths})
        for axis, panel, title in zip(row, panels, titles):
            for k, (name, table) in enumerate(panel.items()):
                points = [(float(s), v) for (f, s), v in table.items() if f in ("clean", family)]
                means, halves = [v.mean() for _, v in points], [interval(v) for _, v in points]
                color = f"C{names.index(name) if name in names else k + len(names)}"
                x = np.arange(len(points)) + 0.04 * (k - len(panel) / 2)
                axis.errorbar(x, means, halves, marker="o", ms=3, capsize=2, label=name, color=color)
                axis.set_xticks(range(len(points)), [f"{s:g}" for s, _ in points])
            axis.set(title=title, xlabel=label)
            axis.grid(alpha=0.3)
    for axis in (axes[0, 0], axes[0, -1]):
        axis.legend(fontsize=8)
    figure.supylabel("return of an agent")
    figure.savefig(path, dpi=100)


# --------------------------------------------------------------------------------------------------------------------
# traffic: ernie_qcombo.py and ernie_coma.py

TRAINED = {  # method: flags
    "none": "--regularizer=none",
    "gaussian": "--regularizer=gaussian",
    "adversarial": "--regularizer=adversarial",
    "stackelberg": "--regularizer=stackelberg",
    "ernie_a": "--regularizer=none --action-reg-coef=1",
    "raw_gaussian": "--regularizer=gaussian --epsilon-units=raw",
    "raw_stackelberg": "--regularizer=stackelberg --epsilon-units=raw",
}
QCOMBO_ONLY = ("ernie_a", "raw_gaussian", "raw_stackelberg")


def policy_of(method: str) -> str:
    """What robustness.csv calls the lights of this method: the regulariser."""
    return TRAINED[method].split()[0].removeprefix("--regularizer=")


STUDY = {  # hyper-parameter of Figures 5c and 5d: its values; at 0 the method is none
    "epsilon": (0.0, 0.03, 0.1, 0.3, 1.0),
    "attack_steps": (0, 1, 3, 5),
}
PANELS = {
    "observation noise": [("clean", "0.0"), ("gaussian", "0.01"), ("gaussian", "0.1"), ("gaussian", "1.0")],
    "worst-case observations": [("mad", "0.1"), ("mad", "0.3"), ("critic", "0.1"), ("critic", "0.3")],
    "malicious actions": [(f, p) for f in ("flip_one", "flip_each", "worst_one") for p in ("0.03", "0.05")],
    "speed (m/s)": [("speed", "30.0"), ("clean", "0.0"), ("speed", "40.0")],
    "flow": [("flow", str(k)) for k in (1, 2, 3, 4, 5)],
    "network": [("network", name) for name in ("irregular", "4x4", "6x6", "atlanta")],
}


def traffic_run(method: str, flags: str, seeds: tuple[int, int], seconds: int, where: Where, script="qcombo") -> tuple:
    """Command and result of a run, evaluated for so many seconds after 1,000 s of random switching."""
    method = method if script == "qcombo" else f"{script}_{method}"
    command = [str(ROOT / f"ernie_{script}.py"), f"--exp-name={method}", *flags.split(), "--compile", "--no-track"]
    command += [f"--seed={seeds[0]}", f"--num-seeds={seeds[1] - seeds[0] + 1}", f"--runs-dir={where.runs_dir}"]
    command += ["--eval-episodes=1", f"--eval-seconds={seconds}", "--log-interval=64000"]
    return command, (where.runs_dir, f"traffic_grid_v0__{method}__{seeds[0]}__*/robustness.csv")


def traffic(
    where: Where,
    algorithm: Literal["qcombo", "coma"] = "qcombo",
    seeds: tuple[int, int] = (101, 110),
    study_seeds: tuple[int, int] = (101, 103),
) -> None:
    """Reward on changed speeds, flows, networks, observations and actions for every method of a traffic script.

    Args:
        algorithm: of ernie_qcombo.py or ernie_coma.py
        seeds: first and last seed of the figures
        study_seeds: first and last seed of the study of epsilon and K (QCOMBO)
    """
    start, get = remote(where)
    methods = {m: flags for m, flags in TRAINED.items() if algorithm == "qcombo" or m not in QCOMBO_ONLY}
    pending = {m: start(*traffic_run(m, flags, seeds, 4000, where, algorithm)) for m, flags in methods.items()}
    study = {}
    if algorithm == "qcombo":
        study["none", 0] = start(*traffic_run("study_none", TRAINED["none"], study_seeds, 1000, where))
        for name, value in ((name, value) for name, values in STUDY.items() for value in values if value):
            flags = f"{TRAINED['stackelberg']} --{name.replace('_', '-')}={value}"
            study[name, value] = start(*traffic_run(f"study_{name}_{value}", flags, study_seeds, 1000, where))
    rows, tables = [], {}
    for method, path in pending.items():
        policy, path = policy_of(method), get(path)
        tables[method], tables["fixed_time"] = (read(path, who, "reward") for who in (policy, "fixed_time"))
        left, backlog = (read(path, policy, column) for column in ("left_per_minute", "backlog"))
        for point, values in tables[method].items():
            middle, fixed = stats.trim_mean(values, 0.25), tables["fixed_time"].get(point, [np.nan])[0]
            row = [method, *point, values.mean(), interval(values), middle, values.min()]
            rows.append([*row, left[point].mean(), backlog[point].mean(), fixed, len(values)])
    columns = ["method", "perturbation", "strength", "reward", "interval95", "interquartile_mean", "worst_seed"]
    stem = where.results_dir / ("traffic" if algorithm == "qcombo" else f"traffic_{algorithm}")
    columns += ["left_per_minute", "backlog", "fixed_time", "seeds"]
    write(stem.with_suffix(".csv"), columns, rows)
    plot_traffic(tables, stem.with_suffix(".png"))
    plot_percentiles(tables, stem.with_name(f"{stem.name}_percentiles.png"))
    if study:
        results = {key: read(get(path), "stackelberg" if key[1] else "none", "reward") for key, path in study.items()}
        plot_study(results, where.results_dir)


def plot_traffic(tables: dict[str, dict], path: Path) -> None:
    """Mean reward of each method at each point with its 95% interval, a panel per kind of change."""
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    for axis, (title, points) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for x, point in enumerate(points):
            for value in tables["fixed_time"].get(point, [])[:1]:
                axis.plot([x - 0.4, x + 0.4], [value] * 2, color="gray", linestyle="--")
        methods = [method for method in TRAINED if method in tables]
        for k, method in enumerate(methods):
            values = [tables[method][point] for point in points]
            places = np.arange(len(points)) + (k - (len(methods) - 1) / 2) * min(0.14, 0.8 / len(methods))
            halves = [interval(v) for v in values]
            axis.errorbar(places, [v.mean() for v in values], halves, fmt="o", markersize=4, capsize=2, label=method)
        names = [
            s if f in ("speed", "flow", "network") else "clean" if f == "clean" else f"{f}\n{s}" for f, s in points
        ]
        axis.set_xticks(
            range(len(points)), ["35" if n == "clean" and "speed" in title else n for n in names], fontsize=8
        )
        axis.set_title(title)
        axis.grid(alpha=0.3)
    figure.axes[0].plot([], [], color="gray", linestyle="--", label="fixed time, 27 s")
    figure.axes[0].legend(fontsize=8)
    figure.supylabel("reward of all lights in a second")
    figure.savefig(path, dpi=110)


def plot_percentiles(tables: dict[str, dict], path: Path) -> None:
    """Sorted rewards of the seeds, as in Figures 5a and 5b."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    points = [("clean", "0.0"), ("speed", "30.0"), ("gaussian", "1.0"), ("flip_each", "0.05")]
    for axis, point in zip(figure.subplots(1, len(points)), points):
        for method in (method for method in TRAINED if method in tables):
            values = np.sort(tables[method][point])
            axis.plot(
                100 * (np.arange(len(values)) + 0.5) / len(values), values, marker="o", markersize=3, label=method
            )
        axis.set(title=" ".join(point), xlabel="percentile of seeds")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("reward of all lights in a second")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_study(results: dict[tuple, dict], folder: Path) -> None:
    """Reward against epsilon and K, on changed speeds as in Figures 5c and 5d, and under noise."""
    figure, rows = Figure(figsize=(11, 3.8), layout="constrained"), []
    shown = [("clean", "0.0"), ("speed", "30.0"), ("speed", "40.0"), ("gaussian", "1.0"), ("flip_each", "0.05")]
    for axis, (name, values) in zip(figure.subplots(1, 2, sharey=True), STUDY.items()):
        for point in shown:
            cells = [results[(name, value) if value else ("none", 0)][point] for value in values]
            for value, cell in zip(values, cells):
                rows.append([name, value, *point, cell.mean(), interval(cell), len(cell)])
            means, halves = [c.mean() for c in cells], [interval(c) for c in cells]
            axis.errorbar(range(len(values)), means, halves, marker="o", capsize=3, label=" ".join(point))
        axis.set_xticks(range(len(values)), [f"{v:g}" for v in values])
        axis.set_xlabel({"epsilon": "epsilon (standard deviations)", "attack_steps": "K, attack steps"}[name])
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("reward of all lights in a second")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(folder / "traffic_study.png", dpi=110)
    columns = ["parameter", "value", "perturbation", "strength", "reward", "interval95", "seeds"]
    write(folder / "traffic_study.csv", columns, rows)


def traffic_in_sumo(
    where: Where, methods: tuple[str, ...] = ("none", "stackelberg"), seeds: tuple[int, int] = (101, 110)
) -> None:
    """Drive the runs of `traffic` in SUMO, on all that changes the cars, and plot both rewards (needs SUMO).

    Args:
        methods: whose runs
        seeds: first and last seed of these runs
    """
    where.results_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for method in methods:
        policy = policy_of(method)
        _, (folder, pattern) = traffic_run(method, "", seeds, 4000, where)
        copy = where.runs_dir / f"in_sumo_{method}"
        copy.mkdir(exist_ok=True)
        shutil.copy(max(folder.glob(pattern)).with_name("checkpoint.pt"), copy)
        command = [str(ROOT / "ernie_qcombo.py"), f"--evaluate={copy}", "--eval-episodes=1", "--eval-seconds=1000"]
        here = run(command, (copy, "robustness.csv"))
        there = run([*command, "--backend=sumo"], (copy, "robustness_sumo.csv"))
        for who, name in ((policy, method), ("fixed_time", "fixed_time")):
            ours, theirs = read(here, who, "reward"), read(there, who, "reward")
            for point, values in theirs.items():
                halves = [interval(v) if len(v) > 1 else np.nan for v in (ours[point], values)]
                rows.append([name, *point, ours[point].mean(), values.mean(), *halves])
    columns = ["method", "perturbation", "strength", "torch", "sumo", "torch_interval95", "sumo_interval95"]
    write(where.results_dir / "traffic_in_sumo.csv", columns, rows)
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axis = figure.add_subplot()
    for name in dict.fromkeys(row[0] for row in rows):
        axis.scatter(*-np.array([row[3:5] for row in rows if row[0] == name]).T, s=16, label=name)
    every = np.array([row[3:5] for row in rows])
    low, high = -every.max() * 0.8, -every.min() * 1.25
    correlation = np.corrcoef(np.log(-every).T)[0, 1]
    axis.plot([low, high], [low, high], color="gray", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="cost in the batched simulator", ylabel="cost in SUMO")
    ticks = [tick for tick in (20, 30, 50, 100, 200, 300, 500) if low < tick < high]
    axis.minorticks_off()
    axis.set(xticks=ticks, yticks=ticks, xticklabels=ticks, yticklabels=ticks)
    axis.set_title(
        f"minus the reward of all lights in a second; correlation of logarithms {correlation:.3f}", fontsize=9
    )
    axis.legend(fontsize=8)
    figure.savefig(where.results_dir / "traffic_in_sumo.png", dpi=110)


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


def ladder(where: Where, episodes: int = 10, seconds: int = 4000, sumo: bool = False) -> None:
    """What simple controllers get on the training flow, after 1,000 s of random switching.

    Args:
        episodes: episodes of each controller
        seconds: seconds of an episode
        sumo: in SUMO too
    """
    where.results_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    for backend in ("torch", "sumo") if sumo else ("torch",):
        args = ernie_qcombo.Args(evaluate="none", backend=backend)
        env = ernie_qcombo.make_traffic(args, episodes, torch.device("cpu"), warmup=1000, horizon=seconds)
        step = env.step if backend == "sumo" else torch.compile(env.step, fullgraph=True, dynamic=False)
        for name, controller in CONTROLLERS.items():
            torch.manual_seed(0)
            generators = ernie_qcombo.make_generators(1, 1, "ladder", torch.device("cpu"))
            means = ernie_qcombo.simulate(env, step, lambda state, _: controller(env, state), generators)
            values = [means[column].double().numpy() for column in ("reward", "left_per_minute", "backlog")]
            rows.append([backend, name, values[0].mean(), interval(values[0]), *(v.mean() for v in values[1:])])
            print(f"{backend:6s} {name:40s} {rows[-1][2]:9.1f} ± {rows[-1][3]:.1f}", flush=True)
    columns = ["backend", "controller", "reward", "interval95", "left_per_minute", "backlog"]
    write(where.results_dir / "traffic_ladder.csv", columns, rows)


# --------------------------------------------------------------------------------------------------------------------
# economy: ermas_economy.py

TAX_METHODS = ("free-market", "us-federal", "saez", "marl", "ermas")


def economy(where: Where, seeds: tuple[int, int] = (1, 3)) -> None:
    """Welfare against the risk aversion of new agents for every method of ermas_economy.py, on the tiny map.

    Args:
        seeds: first and last seed
    """
    start, get = remote(where)

    def train(method: str, *reused: str):
        command = [str(ROOT / "ermas_economy.py"), f"--method={method}", f"--exp-name=taxes_{method}", *reused]
        command += [f"--seed={seeds[0]}", f"--num-seeds={seeds[1] - seeds[0] + 1}", f"--runs-dir={where.runs_dir}"]
        found = where.runs_dir, f"economy_tiny_v0__taxes_{method}__{seeds[0]}__*/welfare.csv"
        return start([*command, "--compile", "--no-track"], found)

    first = train(TAX_METHODS[0])  # its agents at the end of phase one, in training and in the test, serve the others
    agents = get(first).parent
    reused = f"--warm-start={agents}", f"--eval-agents={agents / 'test_agents.pt'}"
    pending, tables, rows = {m: train(m, *reused) for m in TAX_METHODS[1:]}, {}, []
    for method, path in ({TAX_METHODS[0]: first} | pending).items():
        with open(get(path), newline="") as file:
            for row in csv.DictReader(file):
                cells = tables.setdefault(method, {}).setdefault(float(row["eta"]), {})
                for name in ("welfare", "equality", "productivity", "labor", "houses", "tax_rate"):
                    cells.setdefault(name, []).append(float(row[name]))
    for method, table in tables.items():
        for eta, cells in table.items():
            values = {name: np.array(value) for name, value in cells.items()}
            gain = values["welfare"] - np.array(tables["marl"][eta]["welfare"])
            figures = [f(value) for value in (*values.values(), gain) for f in (np.mean, interval)]
            rows.append([method, eta, *figures, len(gain)])
    columns = ["method", "eta", *(c for name in (*values, "more_than_marl") for c in (name, f"{name}_interval95"))]
    write(where.results_dir / "economy.csv", [*columns, "seeds"], rows)
    figure = Figure(figsize=(14, 4), layout="constrained")
    titles = {"welfare": "equality x productivity", "equality": "equality", "productivity": "productivity (coin)"}
    for axis, (name, title) in zip(figure.subplots(1, 3), titles.items()):
        for k, (method, table) in enumerate(tables.items()):
            values = [np.array(cells[name]) for cells in table.values()]
            x = np.arange(len(table)) + 0.06 * (k - 2)
            axis.errorbar(x, [v.mean() for v in values], [interval(v) for v in values], fmt="o-", ms=3, label=method)
        axis.set_xticks(range(len(table)), [f"{eta:g}" for eta in table])
        axis.set(xlabel="eta of the new agents (training: 0.23)", title=title)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(where.results_dir / "economy.png", dpi=110)


if __name__ == "__main__":
    commands = {
        "particle": particle,
        "drones": drones,
        "meanfield": meanfield,
        "traffic": traffic,
        "traffic-in-sumo": traffic_in_sumo,
        "ladder": ladder,
        "economy": economy,
    }
    tyro.extras.subcommand_cli_from_dict(commands, config=(tyro.conf.OmitArgPrefixes,))
