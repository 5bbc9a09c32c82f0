"""Replay recorded trajectories of the original simulators against our environments.

    python tests/replay.py KIND FOLDER      KIND: particle

Every .npz file in FOLDER must have the format described in tests/data/KIND/README.md. One line per file: the largest
error of each quantity and its tolerance. Exit code 0: all within tolerance; 1: some above, or a file that cannot be
read; 2: wrong usage.
"""

import json
import pathlib
import sys

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

from envs import particle  # noqa: E402  (the repository's root must be on the path first)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def load_index(kind: str, folder: pathlib.Path) -> dict:
    """The folder's own index.json, or the one that comes with the tests."""
    path = folder / "index.json"
    return json.loads((path if path.exists() else ROOT / "data" / kind / "index.json").read_text())


def replay_particle(path: pathlib.Path, index: dict) -> dict[str, tuple[float, float]]:
    """{quantity: (largest error, tolerance)}: free running in float64, step by step from recorded states in float32."""
    data = np.load(path)
    n = data["apos0"].shape[1]
    info = index.get(path.name, {})
    env_id = info.get("module") or particle_env_id(path.name)
    continuous = info.get("continuous", data["actions"].dtype.kind == "f")
    for name in ("apos0", "avel0", "lpos", "goal", "key", "actions", "apos", "avel", "obs", "obs_steps", "rew"):
        if not np.isfinite(data[name]).all():
            raise ValueError(f"{name} has entries that are not finite")
    errors = {}
    for dtype in (torch.float64, torch.float32):
        tolerance, short = TOLERANCE[dtype], str(dtype).removeprefix("torch.")
        env = particle.make(env_id, len(data["apos0"]), dtype=dtype, num_agents=n, continuous_actions=continuous)
        for quantity, error in run_particle(env, data, forced=dtype == torch.float32).items():
            errors[f"{short} {quantity}"] = (error, tolerance)
    return errors


def particle_env_id(name: str) -> str:
    """simple_spread_n7_disc.npz -> simple_spread_v3, for files that index.json does not list."""
    matches = [env_id for env_id in particle.TASKS if name.startswith(env_id.rsplit("_", 1)[0] + "_")]
    if len(matches) != 1:
        raise ValueError(f"not in index.json, and its name matches {len(matches)} tasks")
    return matches[0]


def particle_states(env: particle.ParticleEnv, data) -> list[particle.State]:
    """The recorded state before the first step and after each step."""
    goal = np.concatenate((data["goal"], data["key"]), 1)[:, : env.task.goals]
    steps, states = data["actions"].shape[1], []
    for t in range(steps + 1):
        i = min(t, data["apos"].shape[1]) - 1  # where nothing moves, one step is stored
        position, velocity = (data["apos0"], data["avel0"]) if t == 0 else (data["apos"][:, i], data["avel"][:, i])
        message = data["comm"][:, t - 1] if t and env.num_speakers else None
        states.append(env.make_state(position, velocity, data["lpos"], goal, message, t))
    return states


def particle_actions(env: particle.ParticleEnv, data) -> torch.Tensor:
    """[T, B, N] or, from the agents' vectors one after the other, [T, B, N, A] with padding."""
    actions = torch.as_tensor(data["actions"])
    if env.discrete:
        return actions.to(torch.int64).transpose(0, 1)
    parts = actions.to(env.dtype).split(env.action_sizes, dim=-1)
    width = max(env.action_sizes)
    return torch.stack([torch.nn.functional.pad(p, (0, width - p.shape[-1])) for p in parts], 2).transpose(0, 1)


def run_particle(env: particle.ParticleEnv, data, forced: bool) -> dict[str, float]:
    errors = dict.fromkeys(("obs", "reward", "position", "velocity", "message"), 0.0)

    def compare(quantity: str, ours: torch.Tensor, recorded: torch.Tensor):
        if ours.shape != recorded.shape:
            raise ValueError(f"{quantity} has shape {list(recorded.shape)}, expected {list(ours.shape)}")
        error = (ours.double() - recorded.double()).abs().nan_to_num(nan=torch.inf)
        errors[quantity] = max(errors[quantity], error.max().item() if error.numel() else 0.0)

    recorded, actions = particle_states(env, data), particle_actions(env, data)
    stored = {int(t): k for k, t in enumerate(data["obs_steps"])}
    if not set(stored) <= set(range(len(recorded))):
        raise ValueError(f"obs_steps must be between 0 and {len(actions)}")

    def compare_obs(t: int, obs: torch.Tensor):
        if t in stored:
            live = torch.cat([obs[:, i, :size] for i, size in enumerate(env.obs_sizes)], 1)
            compare("obs", live, torch.as_tensor(data["obs"][:, stored[t]]))

    state = recorded[0]
    compare_obs(0, env.observe(state))
    for t in range(1, len(actions) + 1):
        before = recorded[t - 1] if forced else state
        state, obs, reward, *_ = env.step(before, actions[t - 1], None)
        goal = recorded[t]
        compare("position", state.position, goal.position)
        compare("velocity", state.velocity, goal.velocity)
        compare("message", state.message, goal.message)
        compare("reward", reward, torch.as_tensor(data["rew"][:, t - 1]))
        compare_obs(t, obs)
    return errors


REPLAYS = {"particle": replay_particle}  # one function per kind: (file, index) -> {quantity: (error, tolerance)}


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in REPLAYS:
        print(f"usage: python tests/replay.py KIND FOLDER with KIND one of {', '.join(REPLAYS)}", file=sys.stderr)
        return 2
    kind, folder = arguments[0], pathlib.Path(arguments[1])
    files = sorted(folder.glob("*.npz"))
    if not files:
        print(f"{folder} has no .npz files", file=sys.stderr)
        return 2
    try:
        index = load_index(kind, folder)
    except ValueError as error:
        print(f"{folder}: index.json cannot be read: {error}", file=sys.stderr)
        return 2
    failed = 0
    for path in files:
        try:
            errors = REPLAYS[kind](path, index)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with a file, the others are still replayed)
            print(f"FAIL {path.name}: cannot be replayed: {type(error).__name__}: {error}")
            failed += 1
            continue
        over = any(not error <= tolerance for error, tolerance in errors.values())
        failed += over
        text = ", ".join(f"{name} {error:.1e} (<= {tolerance:.0e})" for name, (error, tolerance) in errors.items())
        print(f"{'FAIL' if over else 'ok  '} {path.name}: {text}")
    print(f"{len(files) - failed} of {len(files)} files within tolerance")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
