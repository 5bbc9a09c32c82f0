"""Processes of torchrun: they share out seeds, or each has a part of the samples and gradients are averaged."""

import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]  # also as a program, below

import envs  # noqa: E402
import ernie_coma  # noqa: E402
import ernie_maddpg  # noqa: E402
import ernie_mappo  # noqa: E402
import ernie_meanfield  # noqa: E402
import ernie_qcombo  # noqa: E402

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
CPU = torch.device("cpu")


def rows(batch: dict, axis: int, half: slice) -> dict:
    """Samples of a batch that has them on this axis."""
    return {name: x[(slice(None),) * axis + (half,)] for name, x in batch.items()}


def maddpg():
    args = ernie_maddpg.Args(num_seeds=2, num_envs=8, batch_size=8, action_reg_coef=0.1)
    env = ernie_maddpg.make_env(args, 16, CPU)
    nets, optimizers = ernie_maddpg.make_nets(env, args)
    streams = ernie_maddpg.make_generators(1, 2, "games", CPU)
    replay = ernie_maddpg.make_replay(env, 2, 8, env.horizon)
    ernie_maddpg.rollout(env.step, env, nets["actor"], replay, 0, 0.3, streams, args)
    batch = ernie_maddpg.sample(replay, 8, 8, streams)
    noise = ernie_maddpg.draw_noise(streams, env, args)
    losses = {"critic": ernie_maddpg.critic_loss, "actor": ernie_maddpg.actor_loss}

    def step(half):
        part = rows(batch, 1, half), rows(noise, 2, half)
        ernie_maddpg.update(nets, optimizers, losses, *part, env, args)

    return nets, step


def meanfield():
    args = ernie_meanfield.Args(num_seeds=2, num_envs=8, batch_size=8, mean_action_epsilon=0.1)
    env = ernie_meanfield.make_crowd_env(args, 16, CPU)
    nets, optimizers = ernie_meanfield.make_mean_field(env, args)
    streams = ernie_meanfield.make_generators(1, 2, "games", CPU)
    replay = ernie_meanfield.make_crowd_replay(env, 2, 8)
    ernie_meanfield.rollout_crowd(env.step, env, nets, replay, 0, 0.3, streams, args)
    batch = ernie_meanfield.sample_crowds(replay, 8, 8, streams)
    noise = ernie_meanfield.draw_moves(streams, env, args)
    losses = {"critic": ernie_meanfield.mean_field_critic_loss, "actor": ernie_meanfield.mean_field_actor_loss}

    def step(half):
        part = ernie_meanfield.add_own(rows(batch, 1, half), args), rows(noise, 1, half)
        ernie_meanfield.update_mean_field(nets, optimizers, losses, *part, env, args)

    return nets, step


def qcombo():
    args = ernie_qcombo.Args(num_seeds=2, batch_size=8, reg_batch_size=8, regularize="both", action_reg_coef=0.1)
    env = ernie_qcombo.make_traffic(args, 2, CPU)
    nets, optimizer = ernie_qcombo.make_q(env, args)
    (N, O), normal = env.obs_mask.shape, torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=normal)
    batch = {"obs": draw(2, N, 8, O), "next_obs": draw(2, N, 8, O), "rewards": draw(2, N, 8)}
    apart = {"joint": torch.randint(2, (2, 8, N), generator=normal), "terminated": (draw(2, 8) > 0).double()}
    noise = ernie_qcombo.draw_directions(ernie_qcombo.make_generators(1, 2, "noise", CPU), env, args)
    unit = torch.ones(2, N, 1, O)

    def step(half):
        part = rows(batch, 2, half) | rows(apart, 1, half), rows(noise, 2, half)
        ernie_qcombo.update_q(nets, optimizer, ernie_qcombo.qcombo_loss, *part, unit, args)

    return nets, step


def coma():
    sizes = {"num_seeds": 2, "num_envs": 8, "rollout_steps": 2, "reg_batch_size": 16, "critic_updates": 2}
    args = ernie_coma.Args(env_id="simple_spread_v3", **sizes)
    env = ernie_coma.make_particles(args, 16, CPU)
    nets, optimizers = ernie_coma.make_coma(env, args)
    (N, O), A, normal = env.obs_mask.shape, env.action_mask.shape[1], torch.Generator().manual_seed(0)
    draw, mean_and_std = partial(torch.randn, generator=normal), torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    rollout = {"obs": draw(2, 8, 3, N, O), "rewards": draw(2, 8, 2, N), "terminated": torch.zeros(2, 8, 2)}
    rollout |= {"actions": torch.eye(A)[torch.randint(A, (2, 8, 2, N), generator=normal)]}
    rollout |= {"last_action": torch.eye(A)[torch.randint(A, (2, 8, N), generator=normal)]}
    noise = ernie_coma.draw_attack(ernie_coma.make_generators(1, 2, "noise", CPU), env, args)
    losses = {"critic": ernie_coma.coma_critic_loss, "actor": ernie_coma.coma_actor_loss}
    rest = mean_and_std.expand(2, N, 2, O), torch.tensor([0.1, 0.01])

    def step(half):  # samples are pairs of an environment and a step
        part = rows(rollout, 1, half) | {"policy_steps": 0}
        share = noise.unflatten(2, (8, 2))[:, :, half].flatten(2, 3)
        ernie_coma.update_coma(nets, optimizers, losses, part, *rest, share, 0, env, args)

    return nets, step


def mappo():
    args = ernie_mappo.Args(num_seeds=2, num_envs=8, num_minibatches=1, reg_batch_size=10**6)
    env = ernie_mappo.make_task(args, 16, CPU)
    nets, optimizer = ernie_mappo.make_mappo(env, args)
    N, streams = env.num_agents, ernie_mappo.make_generators(1, 2, "games", CPU)
    norm = torch.stack((torch.zeros_like(env.obs_mask[0] * 1.0), torch.ones_like(env.obs_mask[0] * 1.0)))
    norm, value_norm = norm.expand(2, N, 2, -1), torch.zeros(3, 2, 1, N)
    replay = ernie_mappo.play_episodes(env.step, env, nets["actor"], norm, streams, args)
    noise = ernie_mappo.draw_perturbation(streams, env, args)
    unit = torch.ones(2, N, 1, noise.shape[3])

    def step(half):  # samples are pairs of an environment and a step
        batch, _ = ernie_mappo.prepare_episodes(nets, rows(replay, 1, half), norm, value_norm, env, args)
        share = noise.unflatten(2, (8, -1))[:, :, half].flatten(2, 3)
        loss, _ = ernie_mappo.ppo_loss(nets, batch, share, unit, env, args)
        ernie_mappo.descend(loss, list(nets.values()), optimizer, args.max_grad_norm)

    return nets, step


PROBLEMS = {f.__name__: f for f in (maddpg, meanfield, qcombo, coma, mappo)}


def difference(problem) -> tuple[float, float]:
    """Largest change of a parameter by an update on all samples; largest difference to it of one with two ranks."""
    found = []
    for half in (slice(None), slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)):
        nets, step = problem()
        before = {name: net.flat.detach().clone() for name, net in nets.items()}
        with pytest.MonkeyPatch.context() as patch:
            if half == slice(None):
                patch.setattr(dist, "is_initialized", lambda: False)
            step(half)
        found.append([(net.flat.detach() - before[name]).flatten() for name, net in nets.items()])
    whole, shared = (torch.cat(parts) for parts in found)
    return whole.abs().max().item(), (whole - shared).abs().max().item()


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    envs.make = partial(envs.make, dtype=torch.float64)
    dist.init_process_group("gloo")
    results = {name: difference(problem) for name, problem in PROBLEMS.items()}
    if dist.get_rank() == 1:
        print(json.dumps(results))
    dist.destroy_process_group()


def read(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def differences():
    command = [*LAUNCH, __file__]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("name", PROBLEMS)
def test_two_ranks_are_one_batch(differences, name):
    """Each with half of the samples: the update is the one on all of them."""
    change, difference = differences[name]
    assert change > 1e-4 and difference < 1e-9


def test_seeds_are_shared_out(tmp_path):
    """Each rank is a run of its own that does what a single process does with all seeds."""
    flags = ["--seed=3", "--num-seeds=2", "--total-timesteps=3000", "--learning-starts=1000", "--num-envs=4"]
    flags += [
        "--batch-size=8",
        "--hidden-size=16",
        "--log-interval=1000",
        "--eval-episodes=2",
        "--no-track",
        "--no-cuda",
    ]
    script, folders = str(ROOT / "ernie_maddpg.py"), {}
    for name, launch in (("one", [sys.executable]), ("two", LAUNCH)):
        subprocess.run([*launch, script, *flags, f"--runs-dir={tmp_path / name}"], check=True, capture_output=True)
        folders[name] = sorted((tmp_path / name).iterdir())
    assert len(folders["one"]) == 1 and len(folders["two"]) == 2
    rows = {name: [row for f in fs for row in read(f / "metrics.csv")] for name, fs in folders.items()}
    assert {row["seed"] for row in rows["one"]} == {"3", "4"} and len(rows["one"]) == len(rows["two"]) == 4
    for ours, expected in zip(rows["two"], sorted(rows["one"], key=lambda row: row["seed"])):
        columns = ("seed", "global_step", "charts/episodic_return", "losses/critic_loss", "losses/actor_loss")
        assert all(float(ours[c]) == pytest.approx(float(expected[c]), rel=1e-4) for c in columns)
    for seed, folder in zip((3, 4), folders["two"]):
        assert {row["seed"] for row in read(folder / "robustness.csv")} == {str(seed)}
        assert json.loads((folder / "args.json").read_text())["num_seeds"] == 1
        assert not (folder / "checkpoint_rank1.pt").exists()
