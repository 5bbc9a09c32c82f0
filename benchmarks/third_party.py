"""What the scripts learn in other people's environments, beside random play.

    pip install -r requirements.txt -r requirements-zoo.txt
    export PYTHONPATH=benchmarks/third_party            # environments that need a few lines to become PettingZoo's
    python benchmarks/third_party.py                    # train and measure all, an hour on two cores (--names: some)
    python benchmarks/third_party.py --no-train         # measure the newest finished runs again

Random play, the untrained policy, the trained one and, of discrete actions, the trained one that samples as in training
play whole episodes: mean return per agent and half of its 95% interval over episodes. CPU seconds are those of the
training process and its workers, user and system, evaluations included. Writes results/third_party.csv, a row per run.
"""

import importlib
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import envs  # noqa: E402  (the root must be on the path first)
from envs import perturb, robustness, runs  # noqa: E402

TABLE = ROOT / "benchmarks/results/third_party.csv"
PPO = "ernie_mappo.py --learning-rate 1e-3 --gamma 0.99 --regularizer none --num-envs 8 --share-parameters"
CHOICE = f"{PPO} --no-continuous-actions --entropy-coef 0.01"
FORAGING = "--env-id zoo:zoo_lbforaging --reward-scale 1 --gamma 0.99 --entropy-coef 0.01 --reg-coef 0.01"
RUNS = {
    "foraging": f"ernie_mappo.py {FORAGING} --no-continuous-actions --num-envs 32 --total-timesteps 200000",
    "foraging_coma": f"ernie_coma.py {FORAGING} --num-envs 8 --learning-rate 2e-3 --critic-learning-rate 3e-4"
    " --total-timesteps 400000",
    "multiwalker": f"{PPO} --env-id zoo:pettingzoo.sisl.multiwalker_v9 --total-timesteps 120000",
    "cheetah": f"{PPO} --env-id zoo:zoo_mamujoco --no-share-parameters --num-minibatches 16 --total-timesteps 200000",
    "cheetah_maddpg": "ernie_maddpg.py --env-id zoo:zoo_mamujoco --num-envs 8 --gamma 0.99 --regularizer none "
    "--exploration-noise 0.4 --steps-per-update 40 --log-interval 40000 --total-timesteps 120000 "
    "--no-share-parameters --tau 0.01 --batch-size 1024 --learning-rate 1e-3 --learning-rate-end 1e-3",
    "battle": f"{CHOICE} --env-id zoo:magent2.environments.battle_v4 --env-kwargs map_size=16 max_cycles=200 "
    "--total-timesteps 32000",
    "pursuit": f"{CHOICE} --env-id zoo:pettingzoo.sisl.pursuit_v5 --env-kwargs max_cycles=200 --total-timesteps 24000",
    "smaclite": f"{CHOICE} --env-id zoo:zoo_smaclite --env-kwargs task=2s_vs_1sc --total-timesteps 24000",
    "zombies": f"{CHOICE} --env-id zoo:butterfly/knights_archers_zombies-v11 --horizon 450 --total-timesteps 36000",
    "pong": f"{CHOICE} --env-id zoo:zoo_pong --horizon 200 --total-timesteps 12800",
    "pistonball": f"{PPO} --env-id zoo:zoo_pistonball --env-kwargs n_pistons=10 --total-timesteps 5000",
    "warehouse": f"{CHOICE} --env-id zoo:zoo_rware --total-timesteps 40000",
}


@dataclass
class Args:
    names: tuple[Literal[*RUNS], ...] = tuple(RUNS)  # runs of the list above
    train: bool = True  # or measure the newest run in runs_dir
    episodes: int = 48  # about so many of each policy
    runs_dir: Path = Path("runs/third_party")


def train(name: str, args: Args) -> float:
    """CPU seconds of a training in a process of its own."""
    script, *flags = RUNS[name].split()
    flags += ["--exp-name", name, "--runs-dir", str(args.runs_dir), "--eval-episodes", "0", "--wandb-mode", "disabled"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, str(ROOT / script), *flags], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(name: str, args: Args) -> dict[str, float]:
    """Mean return per agent, and half of its 95% interval, of each policy."""
    script = importlib.import_module(RUNS[name].split(".")[0])
    run_dir = max(args.runs_dir.glob(f"*__{name}__*"), key=os.path.getmtime)
    run_args, checkpoint = runs.saved(script.Args, str(run_dir))
    env = envs.for_tests(script.make_env(run_args, run_args.num_envs, torch.device("cpu")), args.episodes)
    noise = envs.make_generators(1, 1, "noise", env.device)

    def chance(obs: torch.Tensor) -> torch.Tensor:
        action = perturb.random_actions(env, noise, obs[0].transpose(0, 1))
        return envs.by_agent(F.one_hot(action, max(env.action_sizes)) if env.discrete else action, 1)

    def sample(logits: torch.Tensor) -> torch.Tensor:
        return players["trained"].to_action(logits + envs.per_seed(envs.gumbel, logits.shape[1:], noise))

    players = {"random": robustness.Policy(output=lambda obs: obs, to_action=chance, divergence=None)}
    for player in ("untrained", "trained"):
        nets, _ = script.make_nets(env, run_args)
        known = nets if player == "trained" else nets.keys() & {"normalizer"}  # which is measured before training
        runs.restore({key: nets[key].flat for key in known}, checkpoint["nets"])
        players[player] = script.trained_policy(nets, env, run_args)
    if env.discrete:
        players["sampled"] = replace(players["trained"], to_action=sample)
    row = {"steps": run_args.total_timesteps, "episodes": env.num_envs * env.turns}
    for player, policy in players.items():
        generators = envs.make_generators(1, 1, "evaluation", env.device)
        returns = robustness.evaluate(env, policy, generators)[0].mean(1)  # of all agents
        half = robustness.half_interval(returns.double().numpy())
        row |= {player: f"{returns.mean():.3f}", f"{player}_half": f"{half:.3f}"}
    env.copies.close()
    return row


def main() -> None:
    with runs.quiet_pipe():
        args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "SDL_VIDEODRIVER": "dummy"}  # the second one: no window
    for name in args.names:
        seconds = round(train(name, args)) if args.train else None
        figures = measure(name, args)
        rows = {row["name"]: row for row in runs.read_rows(TABLE)} if TABLE.exists() else {}
        seconds = seconds or rows.get(name, {}).get("cpu_seconds")
        rows[name] = {"name": name, "cpu_seconds": seconds, "command": RUNS[name]} | figures
        print(rows[name], flush=True)
        runs.write_rows(TABLE, [rows[name] for name in RUNS if name in rows])


if __name__ == "__main__":
    main()
