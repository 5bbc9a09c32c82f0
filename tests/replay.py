"""Replay recorded trajectories of the original simulators against our environments.

    python tests/replay.py KIND FOLDER      KIND: particle, traffic, drones

Every recording in FOLDER (.json of traffic, else .npz) must have a format that tests/data/KIND/README.md
describes. One line per file: the largest error of each quantity and its tolerance. Exit code 0: all within tolerance;
1: some above, or a file that cannot be read; 2: wrong usage.
"""

import dataclasses
import json
import math
import pathlib
import sys

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

from envs import drones, particle, traffic  # noqa: E402  (the repository's root must be on the path first)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def load_index(kind: str, folder: pathlib.Path) -> dict | list:
    """The folder's own index.json, or the one that comes with the tests; traffic has none."""
    paths = (folder / "index.json", ROOT / "data" / kind / "index.json")
    return next((json.loads(path.read_text()) for path in paths if path.exists()), {})


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


# --------------------------------------------------------------------------------------------------------- traffic

FIXED = {"dtype": torch.float64, "sigma": 0.0, "speed_dev": 0.0}  # drivers of the deterministic recordings
ASPECT = {"r": traffic.RED, "y": traffic.AMBER, "G": traffic.GREEN, "g": traffic.GREEN}
WITHIN = {"krauss": 0.05, "idm": 0.10}  # relative tolerance of macroscopic means
SEEDS = 20  # environments per macroscopic run


def replay_traffic(path: pathlib.Path, index: dict) -> dict[str, tuple[float, float]]:
    """{quantity: (largest error, tolerance)} of the three formats: micro, deterministic network, macroscopic."""
    data = json.loads(path.read_text())
    if isinstance(data, list):
        return merge([traffic_micro(trace) for trace in data])
    if isinstance(data["runs"], list):
        return merge([traffic_network(run, data["meta"]) for run in data["runs"]])
    return traffic_macro(data["runs"], data["meta"])


def merge(parts: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """The largest error of each quantity; errors of one quantity share a tolerance."""
    if not parts:
        raise ValueError("no recordings")
    errors = {}
    for part in parts:
        for name, (error, tolerance) in part.items():
            errors[name] = (worst(error, errors.get(name, (0.0,))[0]), tolerance)
    return errors


def worst(*errors: float) -> float:
    """The largest, where what is not a number is infinite: Python's max may lose it."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def car_following(name: str) -> str:
    model = name.split()[0].lower()
    if model not in WITHIN:
        raise ValueError(f"car-following must be Krauss or IDM, got {name!r}")
    return model


def street_edges(rows: int, cols: int) -> list[list[str]]:
    """SUMO's names of the edges of each street, as it drives."""
    south = [[f"left{rows - i}_{c}" for i in range(rows + 1)] for c in range(cols)]
    north = [[f"right{i}_{c}" for i in range(rows + 1)] for c in range(cols)]
    east = [[f"bot{r}_{i}" for i in range(cols + 1)] for r in range(rows)]
    west = [[f"top{r}_{cols - i}" for i in range(cols + 1)] for r in range(rows)]
    return [*south, *north, *east, *west]


def traffic_micro(trace: dict) -> dict[str, tuple[float, float]]:
    """Cars on the eastbound street of one junction, or of two where the cars name their edges; front first."""
    signal = trace["signal"] if isinstance(trace["signal"], dict) else {"center0": trace["signal"]}
    vtype, cols = trace["vtype"], len(signal)
    model = car_following(vtype["carFollowModel"])
    names = {"speed": "maxSpeed", "accel": "accel", "decel": "decel", "tau": "tau", "min_gap": "minGap"}
    fields = {name: float(vtype[key]) for name, key in {**names, "car_length": "length"}.items()} | FIXED
    fields |= {
        "lengths": trace["edge_length"],
        "junction": trace["internal_length"],
        "speed_limit": trace["speed_limit"],
    }
    env = traffic.make(
        "traffic_grid_v0", 1, rows=1, cols=cols, flow=0.0, depart="max", initial_cars=False, model=model, **fields
    )
    street = 2 * cols
    starts = dict(zip(street_edges(1, cols)[street], env.begin[:, street, 0, 0].clamp_min(0).tolist()))
    cars = trace["vehicles"]
    position = torch.full((1, env.num_streets, len(cars)), torch.nan, dtype=torch.float64)
    speed = torch.zeros_like(position)
    for i, car in enumerate(cars):
        position[0, street, i] = car["depart_pos"] + starts[car.get("edge", "bot0_0")]
        speed[0, street, i] = float(car["depart_speed"])
    state, t = env.make_state(position, speed), 1  # cars do not move in the second in which they are placed
    errors = {"position": 0.0, "speed": 0.0}
    for time, car, _, _, route_pos, v in sorted(trace["rows"]):
        while t < time:
            aspect = torch.full((cols + 1, env.num_streets, 1), float(traffic.GREEN), dtype=torch.float64)
            for i, name in enumerate(sorted(signal)):
                shown = [letters for since, letters in signal[name] if since <= t][-1]
                aspect[i, street] = ASPECT[shown[3]]  # N, E, S, W: eastbound cars come from the west
            state, t = env.advance(state, aspect), t + 1
        for name, ours, recorded in (("position", state.position, route_pos), ("speed", state.speed, v)):
            errors[name] = worst(errors[name], abs(ours[street, car, 0].item() - recorded))
    tolerance = {"krauss": 1e-3, "idm": 2e-3}[model]
    return {f"{model} {name}": (error, tolerance) for name, error in errors.items()}


def switches(cycle: torch.Tensor, t: int) -> torch.Tensor:
    """Do lights with these cycles, in phase, turn yellow in the second after t?"""
    half = cycle // 2
    return (t % half == half - traffic.YELLOW).long()


def traffic_network(run: dict, meta: dict) -> dict[str, tuple[float, float]]:
    """A deterministic network, second by second. Cars that wait for crossing traffic are not modelled; that shows in
    cycles below 40 s, whose tolerance is wider."""
    rows, cols, limit = run.get("rows", 2), run.get("cols", 2), float(run["speed_limit"])
    depart = run["depart_speed"]
    speed, how = (limit, "max") if depart == "max" else (float(depart), "fixed")
    model, size = car_following(meta["car_following"]), {"rows": rows, "cols": cols, "initial_cars": False}
    fields = {"flow": run["inflow"], "speed": speed, "speed_limit": limit, "depart": how} | size | FIXED
    env = traffic.make("traffic_grid_v0", 1, model=model, **fields)
    place = {name: (e, k) for k, edges in enumerate(street_edges(rows, cols)) for e, name in enumerate(edges)}
    e, k = torch.tensor([place[name] for name in run["edges"]]).T
    state, steps = env.make_state(), len(run["count"])
    ours = {name: [] for name in ("count", "halting", "speed_sum", "arrived", "pending")}
    departures, cycle = {}, torch.tensor(run["cycle_s"])
    for t in range(steps):
        before = state
        action = switches(cycle, t).expand(1, env.num_agents)
        state, *_ = env.step(state, action)
        on = (state.position > env.begin) & (state.position <= env.end)
        ours["count"].append(traffic.count(on)[e, k, 0])
        ours["halting"].append(traffic.count(on & (state.speed < 0.1))[e, k, 0])
        ours["speed_sum"].append(torch.where(on, state.speed, 0).sum(2)[e, k, 0])
        ours["arrived"].append((state.left - before.left).sum())
        ours["pending"].append(env.backlog(state).sum())
        for street in (state.entered - before.entered)[:, 0].nonzero()[:, 0].tolist():
            car, newest = before.entered[street, 0].item(), int(before.tail[street, 0])
            departures[f"f{street}.{car}"] = (t + 1, state.speed[street, newest, 0].item())
    errors = {}
    for name, values in ours.items():
        recorded = torch.tensor(run[name], dtype=torch.float64)
        values = torch.stack(values).double()
        if run["cycle_s"] < 40:
            error = (values.sum() - recorded.sum()).abs() / recorded.sum().clamp_min(1)
            errors[f"total {name}, cycles below 40 s"] = (error.item(), 0.05)
        else:
            error = (values - recorded).abs().max()
            errors[name] = (error.item(), 0.02 if name == "speed_sum" else 0.0)
    recorded = {name: (t, v) for t, name, v in run["departures"]}
    if recorded.keys() != departures.keys():
        raise ValueError(f"{len(departures)} cars enter, {len(recorded)} are recorded, or others")
    late = worst(*(abs(departures[name][0] - t) for name, (t, _) in recorded.items()))
    fast = worst(*(abs(departures[name][1] - v) for name, (_, v) in recorded.items()))
    return errors | {"entry time": (float(late), 0.0), "entry speed": (fast, 0.01)}


def traffic_macro(runs: dict, meta: dict) -> dict[str, tuple[float, float]]:
    """Means over the second half of each run. The error is relative (to 1 at least); it is 0 where the difference lies
    within the 95% interval of both samples' means."""
    model = car_following(meta["car_following"])
    groups = {}
    for name, run in runs.items():
        groups.setdefault((run.get("rows", 2), run.get("cols", 2), run["minutes"]), []).append(run)
    errors = {}
    for (rows, cols, minutes), group in groups.items():
        means = simulate_macro(model, rows, cols, minutes, group, meta)
        for i, run in enumerate(group):
            for name, (recorded, std) in run["second_half"].items():
                ours = means[name][i * SEEDS : (i + 1) * SEEDS]
                difference = abs(ours.mean().item() - recorded)
                interval = 1.96 * (std**2 / run["n_seeds"] + ours.var().item() / SEEDS) ** 0.5
                error = 0.0 if difference <= interval else difference / max(abs(recorded), 1.0)
                # braking at exactly 4.5 m/s^2 counts or not by the last digit
                tolerance = 0.25 if name == "r_emergency" else WITHIN[model]
                errors[name] = (worst(error, errors.get(name, (0.0,))[0]), tolerance)
    return errors


def simulate_macro(model: str, rows: int, cols: int, minutes: int, runs: list, meta: dict) -> dict[str, torch.Tensor]:
    """Means per environment over the second half of the time, SEEDS environments for each run, side by side."""

    def each(values):
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(SEEDS, 0)

    speed = each([float(run.get("speed", meta.get("speed_limit", 35.0))) for run in runs])
    standing = "standing" in meta["inflow"]
    fields = {"flow": each([run["inflow"] for run in runs]), "speed": speed, "speed_limit": speed}
    fields |= {"depart": "max" if "departSpeed max" in meta["inflow"] else "fixed", "initial_cars": standing}
    env = traffic.make("traffic_grid_v0", len(runs) * SEEDS, rows=rows, cols=cols, model=model, **fields)
    step = torch.compile(env.step, fullgraph=True)
    generators = [torch.Generator().manual_seed(0)]
    state, _ = env.reset(generators)
    cycle = each([run["cycle_s"] for run in runs]).long()[:, None]
    means = {}
    late = int(standing)  # there the standing cars come in the recording's first second, with which our time starts
    for t in range(late, 60 * minutes):
        action = switches(cycle, t).expand(-1, env.num_agents)
        state, obs, reward, _, _, info = step(state, action, env.draw(generators))
        if t < 30 * minutes:
            continue
        incoming = (state.position > env.begin[:-1]) & (state.position <= env.line)
        values = {
            "halting": (incoming & (state.speed < 0.1)).sum((0, 1, 2)),
            "queue_v1": obs[..., :4].sum((1, 2)),
            "waiting_time": (obs[..., 4:8] * obs[..., 12:16]).sum((1, 2)),
            "vehicles": info["vehicles"],
            "pending": info["backlog"],
            "departed": 60 * info["entered"],
            "arrived": 60 * info["left"],
            "mean_speed": state.speed.sum((0, 1)) / info["vehicles"].clamp_min(1),
            "reward": reward.sum(1),
        } | {f"r_{name}": info[name].sum(1) for name in traffic.TERMS}
        for name, value in values.items():
            means[name] = means.get(name, 0.0) + value.double() / (30 * minutes)
    if state.overflow.any():
        raise ValueError("streets overflowed")
    return means


# ---------------------------------------------------------------------------------------------------------- drones

VERSIONS = {"v1": "v1.0.0", "master": "master", "main": "main"}


def recording(path: pathlib.Path, index: list[dict]) -> tuple[dict, drones.Drones, int]:
    """Its arrays, the environment that plays it, and the number of steps without contact."""
    data = dict(np.load(path))
    version, physics, case = path.stem.split("_", 2)
    info = next((entry for entry in index if entry["file"] == path.name), {})
    types = [name for name in drones.ACTION_SIZES if case.startswith(f"task_{name}_")]
    action_type = info.get("action_type", types[0] if types else "raw rpm").lower()
    for name, array in data.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has entries that are not finite")
    env = drones.make(
        "hover_v0" if version == "main" else "leader_follower_v0",
        num_envs=1,
        dtype=torch.float64,
        num_agents=data["pos"].shape[1],
        version=VERSIONS[version],
        physics=physics,
        action_type="rpm" if action_type == "raw rpm" else action_type,
        control_hz=info.get("ctrl_hz", 30 if version == "main" else 48),
    )
    return data, env, info.get("contact_free_steps", len(data["rpm"]))


def recorded_state(env: drones.Drones, data: dict, t: int) -> drones.State:
    arrays = [data[name][None, t] for name in ("pos", "quat", "vel", "ang_vel")]
    if t == 0:
        return env.make_state(*arrays)
    return env.make_state(*arrays, goal=recorded_state(env, data, 0).goal, t=t)


def replay_drones(path: pathlib.Path, index: list[dict]) -> dict[str, tuple[float, float]]:
    """{quantity: (largest error, tolerance)}. Physics runs freely with the recorded rotor speeds; the controller and
    the observation get the recorded states, since the closed loop is chaotic."""
    data, env, steps = recording(path, index)
    errors = {}

    def compare(quantity: str, ours: torch.Tensor, recorded: np.ndarray, tolerance: float = 1e-9):
        recorded = torch.as_tensor(recorded)
        if ours.shape != recorded.shape:
            raise ValueError(f"{quantity} has shape {list(recorded.shape)}, expected {list(ours.shape)}")
        error = (ours.double() - recorded.double()).abs().nan_to_num(nan=torch.inf).max().item()
        errors[quantity] = (max(error, errors.get(quantity, (0.0,))[0]), tolerance)

    def rows(values: torch.Tensor) -> torch.Tensor:
        return values[..., 0].T

    single = dataclasses.replace(env, dtype=torch.float32)
    state, rough = recorded_state(env, data, 0), recorded_state(single, data, 0)
    pid, hover = state.pid, env.env_id == "hover_v0"
    for t in range(steps):
        rpm = torch.as_tensor(data["rpm"][t]).T[..., None]
        if "action" in data:
            before = dataclasses.replace(recorded_state(env, data, t), pid=pid)
            command, pid = env.command(before, torch.as_tensor(data["action"][t]).T[..., None])
            compare("rpm", rows(torch.stack(list(command))), data["rpm"][t])
            obs = env.observe(recorded_state(env, data, t + 1))[0, :, :12]
            compare("obs", obs.float() if hover else obs, data["obs"][t + 1], 1e-6 if hover else 1e-9)
        state = dataclasses.replace(env.advance(state, rpm), t=state.t + 1)
        compare("position", rows(state.position), data["pos"][t + 1])
        compare("velocity", rows(state.velocity), data["vel"][t + 1])
        sign = (rows(state.quaternion) * torch.as_tensor(data["quat"][t + 1])).sum(1, keepdim=True).sign()
        compare("quaternion", sign * rows(state.quaternion), data["quat"][t + 1])
        if env.physics == "pyb" or env.version == "main":
            compare("rates", rows(state.rates), data["ang_vel"][t + 1])
        if env.physics == "dyn":
            compare("body rates", rows(state.memory), data["body_rates"][t + 1])
        reward = env.task.reward(env, state)[0][:, 0]
        compare("reward", reward[0] if hover else reward, data["reward"][t])
        ends = dict(zip(("terminated", "truncated"), env.ends(state)))
        for name in ("terminated", "truncated") if hover else ("truncated",):
            compare(name, ends[name][0], data[name if hover else "done"][t], 0.0)
        if t < env.control_hz:
            rough = single.advance(rough, rpm.float())
            compare("float32 position", rows(rough.position), data["pos"][t + 1], 1e-4)
    return errors


# (function, files) per kind: function(file, index) -> {quantity: (error, tolerance)}
REPLAYS = {
    "particle": (replay_particle, "*.npz"),
    "traffic": (replay_traffic, "*.json"),
    "drones": (replay_drones, "*.npz"),
}


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in REPLAYS:
        print(f"usage: python tests/replay.py KIND FOLDER with KIND one of {', '.join(REPLAYS)}", file=sys.stderr)
        return 2
    kind, folder = arguments[0], pathlib.Path(arguments[1])
    function, pattern = REPLAYS[kind]
    files = sorted(path for path in folder.glob(pattern) if path.name != "index.json")
    if not files:
        print(f"{folder} has no {pattern} files", file=sys.stderr)
        return 2
    try:
        index = load_index(kind, folder)
    except ValueError as error:
        print(f"{folder}: index.json cannot be read: {error}", file=sys.stderr)
        return 2
    failed = 0
    for path in files:
        try:
            errors = function(path, index)
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
