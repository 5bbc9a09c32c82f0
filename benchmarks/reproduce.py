"""The papers' robustness figures, from training to picture. Each run is a Ray task, on a laptop as on a cluster.

    pip install -r benchmarks/requirements.txt
    python benchmarks/reproduce.py particle                       # Figures 3 and 9: return against observation noise
    python benchmarks/reproduce.py particle --ray-address auto    # the same on a Ray cluster

Every method gets the same grid of (epsilon, lambda), or alpha for M3DDPG. Chosen is the point with the highest return,
averaged over the clean environment and all strengths of Gaussian noise and of the MAD attack, on the seeds of
`--select-seeds`; the figures come from other seeds, `--seeds`. A run that is already in `--runs-dir` is not run again.
"""

import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import tyro
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).parent.parent
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


@dataclass
class Args:
    figure: tyro.conf.Positional[str] = "particle"
    """what to reproduce; so far: particle"""
    env_ids: tuple[str, ...] = ("simple_spread_v3", "simple_tag_v3", "simple_crypto_v3")
    """tasks"""
    seeds: tuple[int, int] = (1, 5)
    """first and last seed of the figures"""
    select_seeds: tuple[int, int] = (101, 102)
    """first and last seed on which each method's point of the grid is chosen"""
    total_timesteps: int = 200_000
    """environment steps of each run"""
    eval_episodes: int = 1000
    """episodes of a seed at each point of the figures"""
    runs_dir: Path = ROOT / "runs" / "reproduce"
    """folder of the runs"""
    results_dir: Path = ROOT / "benchmarks" / "results"
    """folder of the small CSV files and pictures"""
    ray_address: str | None = None
    """address of a Ray cluster; default: this machine"""


@ray.remote(num_cpus=1)
def train(env_id: str, name: str, flags: str, seeds: tuple[int, int], episodes: int, args: Args) -> Path:
    """Run the script unless its result is there; returns the path of robustness.csv."""
    found = list(args.runs_dir.glob(f"{env_id}__{name}__{seeds[0]}__*/robustness.csv"))
    if not found:
        command = [
            sys.executable,
            str(ROOT / "ernie_maddpg.py"),
            f"--env-id={env_id}",
            f"--exp-name={name}",
            *flags.split(),
        ]
        command += [f"--seed={seeds[0]}", f"--num-seeds={seeds[1] - seeds[0] + 1}", f"--eval-episodes={episodes}"]
        command += [f"--total-timesteps={args.total_timesteps}", f"--runs-dir={args.runs_dir}", "--wandb-mode=disabled"]
        command += ["--batch-size=512", "--reg-batch-size=128", f"--checkpoint-interval={args.total_timesteps}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = list(args.runs_dir.glob(f"{env_id}__{name}__{seeds[0]}__*/robustness.csv"))
    return found[0]


def read(path: Path) -> dict[tuple[str, float], np.ndarray]:
    """(perturbation, strength) -> return of each seed."""
    table = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            table.setdefault((row["perturbation"], float(row["strength"])), []).append(float(row["return"]))
    return {key: np.array(values) for key, values in table.items()}


def score(path: Path) -> float:
    return float(np.mean([v.mean() for (family, _), v in read(path).items() if family in ("clean", *SHOWN)]))


def interval(values: np.ndarray) -> float:
    """Half-width of the 95% t-interval of the mean over seeds."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def particle(args: Args) -> None:
    choices = {(t, m, i): flags for t in args.env_ids for m, grid in METHODS.items() for i, flags in enumerate(grid)}
    pending = {
        key: train.remote(key[0], f"select_{key[1]}_{key[2]}", flags, args.select_seeds, 100, args)
        for key, flags in choices.items()
        if len(METHODS[key[1]]) > 1
    }
    final = {}
    for task in args.env_ids:
        for method, grid in METHODS.items():
            scores = [score(ray.get(pending[task, method, i])) if len(grid) > 1 else 0.0 for i in range(len(grid))]
            flags = grid[int(np.argmax(scores))]
            print(f"{task:18s} {method:12s} {flags}  (grid: {', '.join(f'{s:.2f}' for s in scores)})", flush=True)
            run = train.remote(task, f"final_{method}", flags, args.seeds, args.eval_episodes, args)
            final[task, method] = flags, run
    rows = []
    for (task, method), (flags, path) in final.items():
        for (family, strength), values in read(ray.get(path)).items():
            rows.append([task, method, flags, family, strength, values.mean(), interval(values), len(values)])
    with open(args.results_dir / "particle.csv", "w", newline="") as file:
        columns = ["env_id", "method", "flags", "perturbation", "strength", "return", "interval95", "seeds"]
        csv.writer(file).writerows([columns, *rows])
    for task in args.env_ids:
        plot(task, {m: read(ray.get(path)) for (t, m), (_, path) in final.items() if t == task}, args)


def plot(task: str, tables: dict[str, dict], args: Args) -> None:
    """Return against strength, one panel per perturbation, one line per method with its 95% band over seeds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (family, label) in zip(figure.subplots(1, len(SHOWN), sharey=True), SHOWN.items()):
        for method, table in tables.items():
            points = [(s, v) for (f, s), v in table.items() if f == family or f == "clean"]
            strength, mean = [s for s, _ in points], np.array([v.mean() for _, v in points])
            half = np.array([interval(v) for _, v in points])
            color = f"C{list(METHODS).index(method)}"  # the same in every figure
            axis.plot(strength, mean, marker="o", markersize=3, label=method, color=color)
            axis.fill_between(strength, mean - half, mean + half, color=color, alpha=0.12)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("return of the cooperating agents")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{task}: mean and 95% interval over {len(next(iter(tables.values()))['clean', 0.0])} seeds")
    figure.savefig(args.results_dir / f"particle_{task}.png", dpi=120)


def main() -> None:
    args = tyro.cli(Args)
    if args.figure != "particle":
        sys.exit(f"reproduce.py: error: figure must be particle, got {args.figure!r}")
    args.results_dir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the runs on a machine with other work
    ray.init(address=args.ray_address, log_to_driver=False)
    particle(args)


if __name__ == "__main__":
    main()
