"""Replay recorded trajectories of the original simulators against our environments.

    python tests/replay.py KIND FOLDER      KIND: particle, traffic, drones, economy

Every recording in FOLDER (.json of traffic and economy, .npz of all but traffic) must have a format that
tests/data/KIND/README.md describes. One line per file: the largest error of each quantity and its tolerance. Exit code
0: all within tolerance; 1: some above, or a file that cannot be read; 2: wrong usage.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import sys

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

from envs import drones, economy, particle, runs, traffic  # noqa: E402  (the repository's root must be on the path first)

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


# --------------------------------------------------------------------------------------------------------- economy

EXACT, REAL, SAEZ = 0.0, 1e-9, 1e-6  # tolerances: integers, real numbers, what Saez's rates (ratios near 0/0) touch
BUCKETS = {"model_wrapper": "planner", "us-federal-single-filer-2018-scaled": "us", "saez": "saez"}
RENAMED = {  # keys of an episode's config and the fields that they set
    "isoelastic_eta": "eta",
    "energy_cost": "labor_coef",
    "energy_warmup_constant": "labor_constant",
    "energy_warmup_method": "labor_schedule",
    "mixing_weight_gini_vs_coin": "equality_weight",
    "resource_regen_prob": "regrowth",
    "period": "period",
    "rate_disc": "rate_step",
    "saez_fixed_elas": "saez_elasticity",
}
OBJECTIVE = {
    "coin_eq_times_productivity": "equality_productivity",
    "inv_income_weighted_coin_endowments": "inverse_income_coin",
    "inv_income_weighted_utility": "inverse_income_utility",
}


class Errors(dict):
    """{quantity: (largest error, tolerance)}"""

    def compare(self, quantity: str, ours, recorded, tolerance: float = REAL):
        ours, recorded = (torch.as_tensor(np.asarray(x)).double() for x in (ours, recorded))
        if ours.shape != recorded.shape:
            raise ValueError(f"{quantity} has shape {list(recorded.shape)}, expected {list(ours.shape)}")
        error = torch.where(ours.isnan() & recorded.isnan(), 0, (ours - recorded).abs()).nan_to_num(nan=math.inf)
        largest = error.max().item() if error.numel() else 0.0
        self[quantity] = (max(largest, self.get(quantity, (0.0,))[0]), max(tolerance, self.get(quantity, (0, 0))[1]))


def economies(num_envs: int, **fields) -> economy.Economy:
    return economy.make("economy_v0", num_envs, dtype=torch.float64, **fields)


def last(values: torch.Tensor) -> torch.Tensor:
    """Ours, [..., N, B], as recorded: [B, N, ...]."""
    return values.permute(*range(values.ndim - 1, -1, -1))


def first(values: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Recorded arrays [B, N, ...] as ours."""
    return last(torch.as_tensor(np.asarray(values)).to(dtype)).contiguous()


def economy_state(env: economy.Economy, **arrays) -> economy.State:
    """A state with these fields, [B, N, ...] or [B], at t = 0."""
    zeros = torch.zeros(env.num_agents, env.num_envs, dtype=env.dtype)
    state = env.make_state(zeros + int(tile_of(env, (5, 5))), zeros, zeros)
    return dataclasses.replace(state, **{k: first(v, getattr(state, k).dtype) for k, v in arrays.items()})


def tile_of(env: economy.Economy, place: np.ndarray) -> np.ndarray:
    """Tiles of the places [..., 2]."""
    row, col = np.moveaxis(np.asarray(place, dtype=np.int64), -1, 0) + env.window
    return row * env.stride + col


def contents_of(env: economy.Economy, stone: np.ndarray, wood: np.ndarray, owner: np.ndarray) -> torch.Tensor:
    """State's tiles [T, B] from maps of units and house owners [B, rows, columns]."""
    W = env.window
    ground = env.start.view(-1, env.stride)[W:-W, W:-W].numpy()
    code = np.where(ground == economy.FULL_STONE, economy.STONE_SOURCE + stone, ground)
    code = np.where(ground == economy.FULL_WOOD, economy.WOOD_SOURCE + wood, code)
    code = np.where(owner >= 0, economy.HOUSE + owner, code)
    if (stone * (ground != economy.FULL_STONE)).any() or (wood * (ground != economy.FULL_WOOD)).any():
        raise ValueError("units lie where there is no source")
    padded = np.pad(code, ((0, 0), (W, W), (W, W)), constant_values=economy.OUTSIDE)
    return torch.as_tensor(padded.reshape(len(code), -1).T.astype(np.int8).copy())


def compare_map(errors: Errors, env: economy.Economy, state: economy.State, stone, wood, owner):
    W = env.window
    code = state.tiles.T.view(-1, env.size[0] + 2 * W, env.stride)[:, W:-W, W:-W].int()
    errors.compare("stone", code == economy.FULL_STONE, stone, EXACT)
    errors.compare("wood", code == economy.FULL_WOOD, wood, EXACT)
    errors.compare("houses", torch.where(code >= economy.HOUSE, code - economy.HOUSE, -1), owner, EXACT)


def compare_holdings(errors: Errors, env: economy.Economy, state: economy.State, inv, labor, esc=None, tol=REAL):
    coin, goods = env.escrow(state)
    errors.compare("coin", last(state.coin), inv[..., 0], tol)
    errors.compare("goods", last(state.goods), inv[..., 1:], EXACT)
    errors.compare("labor", last(state.labor), labor)
    if esc is not None:
        errors.compare("escrow", np.concatenate((last(coin)[..., None], last(goods)), -1), esc, EXACT)


def economy_single_steps(data: dict, errors: Errors):
    """One Gather or one Build step of many states."""
    B, moves = len(data["case"]), data["mask"].shape[-1] == 4
    env = economies(B, num_agents=data["loc_0"].shape[1])
    state = economy_state(
        env,
        position=tile_of(env, data["loc_0"]),
        coin=data["inv_0"][..., 0],
        goods=data["inv_0"][..., 1:],
        labor=data["labor_0"],
        payment=data["build_payment"],
        bonus=data["bonus_prob"],
    )
    state.tiles = contents_of(env, data["stone_0"], data["wood_0"], data["house_owner_0"])
    valid, action = env.valid_actions(state), first(data["action"], torch.int32)
    errors.compare("mask", valid[..., -4:] if moves else valid[..., 1:2], data["mask"], EXACT)
    if moves:
        rank = first(np.argsort(data["order"], 1), torch.int32)
        state = env.collect(env.move(state, action - 1, rank), state.bonus > 0.5)
    else:
        state = env.build(state, action == 1)
    errors.compare("position", last(state.position), tile_of(env, data["loc_1"]), EXACT)
    compare_map(errors, env, state, data["stone_1"], data["wood_1"], data["house_owner_1"])
    compare_holdings(errors, env, state, data["inv_1"], data["labor_1"])


def economy_auctions(data: dict, errors: Errors):
    """Scripts of several orders per agent and step, those of one size side by side. Trades in their order give the
    price history of each seller."""
    sizes = list(zip(*(data[name].tolist() for name in ("n_agents", "duration", "max_orders"))))
    for n, duration, most in sorted(set(sizes)):
        ks = np.array([k for k, size in enumerate(sizes) if size == (n, duration, most)])
        env = economies(len(ks), num_agents=n, order_duration=duration, max_orders=most)
        inventory = data["init_inv"][ks, :n]
        state = economy_state(env, coin=inventory[..., 0], goods=inventory[..., 1:])
        trades, history = [[] for _ in ks], np.zeros((len(ks), 2, n, 11))
        for t in range(data["T"][ks].max()):
            live = np.flatnonzero(data["T"][ks] > t)
            now = {name: data[name][ks[live], t, :n] for name in ("mask_buy", "mask_sell", "inv", "escrow", "n_orders")}
            now["labor"], rate = data["labor"][ks[live], t, :n], data["market_rate"][ks[live], t]
            valid = env.valid_actions(state)[live][..., 2:-4].unflatten(2, (2, 2, 11))
            for side, name in enumerate(("mask_buy", "mask_sell")):
                errors.compare(name, valid[:, :, :, side], now[name], EXACT)
            prices = first(data["action"][ks, t, :n], torch.int32) - 1
            state, deals = env.match_orders(env.place_orders(state, prices[::2], prices[1::2]), rounds=2 * n)
            history *= env.history_decay
            # resource after resource, in each the trades in their order
            for j, r, deal in itertools.product(live, (0, 1), deals):
                bid, ask, price = (int(x[r, j]) for x in deal)
                if bid >= 0:
                    ages, (buyer, seller) = [x >> 7 & 127 for x in (bid, ask)], [127 - (x & 127) for x in (bid, ask)]
                    trades[j].append([t, r, buyer, seller, bid >> 14, env.max_price - (ask >> 14), price, *ages])
                    history[j, r, seller, price] += 1
            playing = economy.State(**{name: value[..., live] for name, value in vars(state).items()})
            compare_holdings(errors, env, playing, now["inv"], now["labor"], now["escrow"])
            errors.compare("open orders", last((playing.side > 0).sum(2)), now["n_orders"], EXACT)
            errors.compare("market rate", last(env.market_rate(playing)), rate)
            for j in np.flatnonzero(data["T"][ks] == t + 1):
                compare_books(errors, state, data, int(ks[j]), j, trades[j], history[j])


def compare_books(errors: Errors, state: economy.State, data: dict, k: int, j: int, trades: list, history: np.ndarray):
    """The end of script k, which environment j has played."""
    recorded = [trade for case, *trade in data["trades"].tolist() if case == data["case"][k]]
    errors.compare("trades", np.reshape(trades, (-1, 9)), np.reshape(recorded, (-1, 9)), EXACT)
    errors.compare("history", history, data["price_history"][k, :, : history.shape[1]])
    errors.compare("net history", state.history[..., j], data["price_history"][k].sum(1))
    for (side, name), r in itertools.product(((economy.BID, "bids"), (economy.ASK, "asks")), (0, 1)):
        agent, slot = (state.side[r, ..., j] == side).nonzero(as_tuple=True)
        book = zip(agent.tolist(), *(x[r, agent, slot, j].tolist() for x in (state.price, state.age)))
        rows = sorted(tuple(row) for row in data[name][k, r].tolist() if row[0] >= 0)
        errors.compare(name, np.reshape(sorted(book), (-1, 3)), np.reshape(rows, (-1, 3)), EXACT)


def economy_taxes(cases: list, cutoffs: list, errors: Errors):
    for case in cases:
        capped = case["completions"] is not None
        fields = {"tax": "us" if case["kind"].startswith("us") else "fixed", "fixed_rates": case["rates"]}
        fields |= {"cutoffs": cutoffs, "num_agents": len(case["coin"]), "max_orders": 100}
        env = economies(1, **fields, tax_warmup=-100.0 if capped else None)
        state = economy_state(env, coin=[case["coin"]], last_coin=[case["last_coin"]])
        state.completions += case["completions"] or 0
        for i, escrow in enumerate(case["escrow_coin"]):  # as bids for one coin
            state.side[0, i, : int(escrow)], state.price[0, i, : int(escrow)] = economy.BID, 1
        state.rates = env.schedule.minimum(env.rate_limit(state))
        new = env.levy(state)
        paid = env.tax_due(state.rates, new.last_income).minimum(state.coin)
        ours = {"rates": state.rates, "income": new.last_income, "tax_paid": paid, "marginal_rate": new.last_rate}
        ours |= {"effective_rate": paid / new.last_income.clamp_min(1e-6), "lump_sum": paid.sum() / env.num_agents}
        ours |= {"coin_after": new.coin, "last_coin_after": new.last_coin}
        for name, value in ours.items():
            errors.compare(name, value.squeeze(-1) if value.ndim else value, case[name])


def economy_saez(data: dict, errors: Errors):
    pairs = np.stack((data["incomes"], data["marginal_rates"])).transpose(0, 2, 1)
    pairs = torch.as_tensor(np.ascontiguousarray(pairs))  # [2, M, B]
    before = torch.as_tensor(np.stack((data["elas_tm1"], data["log_z0_tm1"])))
    new, fixed = economy.estimate_elasticity(pairs, before), torch.as_tensor(data["fixed_elas"])
    errors.compare("elas_t", new[0], data["elas_t"])
    errors.compare("log_z0_t", new[1], data["log_z0_t"])
    used = torch.where(fixed.isnan(), new[0], fixed)
    for k, uniform in enumerate(data["uniform_weights"].tolist()):
        one, bins = slice(k, k + 1), data["gz"].shape[1] - 1
        results = economy.saez_schedule(pairs[..., one], used[one], economy.CUTOFFS, uniform, bins)
        results[3] = results[3].clamp(0, data["rate_cap"][k])
        for name, result in zip(("gz", "az", "bin_rates", "rates"), results):
            errors.compare(name, result[:, 0], data[name][k], REAL if name == "gz" else SAEZ)


def economy_social(cases: list, errors: Errors):
    for case in cases:
        coin, utility = first([case["coin"]]), first([case["utility"]])
        equality = economy.equality_of(coin)
        ours = {"equality": equality, "gini": 1 - equality, "productivity": economy.total(coin)}
        for name, fields in (
            ("swf_w1", {"equality_weight": 1.0}),
            ("swf_w05", {"equality_weight": 0.5}),
            ("swf_w0", {"equality_weight": 0.0}),
            ("inv_income_coin", {"objective": "inverse_income_coin"}),
            ("inv_income_utility", {"objective": "inverse_income_utility"}),
        ):
            ours[name] = economies(1, num_agents=len(coin), **fields).social_welfare(coin, utility)
        for name, value in ours.items():
            errors.compare(name, value[0], case[name])


def economy_utilities(cases: list, errors: Errors):
    for case in cases:
        env = economies(1, eta=case["eta"], labor_coef=case["labor_coef"])
        errors.compare(
            "utility", env.utility(first([case["coin"]]), first([case["labor"]]), 1.0)[:, 0], case["utility"]
        )


def economy_annealing(cases: list, errors: Errors):
    for case in cases:
        env = economies(1, tax_warmup=float(case["warmup"]), tax_slope=case["slope"])
        state = economy_state(env, completions=[case["completions"]])
        errors.compare("limit", env.rate_limit(state)[0], case["limit"])
        errors.compare("mask", env.valid_rates(state)[0, 0, 1:], case["mask"], EXACT)


def economy_world(data: dict, errors: Errors):
    """The map and the constants, and where each observation lies."""
    env = economies(1)
    codes = {"stone_sources": "s", "wood_sources": "w", "water": "~"}
    for name, code in codes.items():
        ours = [(r, c) for r, row in enumerate(env.layout) for c, tile in enumerate(row) if tile == code]
        errors.compare(name, ours, sorted(map(tuple, data[name])), EXACT)
    errors.compare("size", env.size, data["size"], EXACT)
    errors.compare("payments", env.payments, data["ranked_build_payment"])
    errors.compare("starts", env.corners, tile_of(env, data["ranked_start"]), EXACT)
    errors.compare("cutoffs", env.cutoffs, data["bracket_cutoffs"])
    errors.compare("US rates", economy.US_FEDERAL, data["us_federal_2018"])
    errors.compare("planner's rates", np.arange(env.num_rates) * env.rate_step, data["disc_rates"])
    kinds = [(f"ContinuousDoubleAuction.{side}_{good}", 11) for good in ("Stone", "Wood") for side in ("Buy", "Sell")]
    actions = [["Build", 1]] + [[name, k + 1] for name, n in [*kinds, ("Gather", 4)] for k in range(n)]
    errors.compare("actions", [actions == [data["action_table"][str(k + 1)] for k in range(49)]], [True], EXACT)
    obs = env.original_obs(economy_state(env))
    for name, fields in (
        ("flat", data["flat_agent_fields"]),
        ("planner_flat", data["flat_planner_fields"]),
        ("planner_agents", data["flat_planner_per_agent_fields"]),
    ):
        errors.compare(f"width of {name}", obs[name].shape[-1], fields[-1][1] + fields[-1][2], EXACT)


def episode_fields(config: dict) -> dict:
    """Fields of the environment that a recorded episode needs; its counters are the state's."""
    config, fields = dict(config), {}
    tax = config.pop("tax", {})
    fields["tax"] = "free" if tax.pop("disable_taxes", False) else BUCKETS[tax["tax_model"]]
    tax.pop("tax_model", None)
    schedule = tax.pop("tax_annealing_schedule", None)
    if schedule:
        fields["tax_warmup"], fields["tax_slope"] = map(float, schedule)
    for key in ("seed", "completions", "integrator"):
        config.pop(key, None)
    if "planner_reward_type" in config:
        fields["objective"] = OBJECTIVE[config.pop("planner_reward_type")]
    if "pareto_weight_type" in tax:
        fields["saez_uniform"] = tax.pop("pareto_weight_type") == "uniform"
    unknown = set(config | tax) - set(RENAMED)
    if unknown:
        raise ValueError(f"config has {', '.join(sorted(unknown))}, which is not known here")
    return fields | {RENAMED[key]: value for key, value in (config | tax).items()}


def economy_episode(data: dict, errors: Errors):
    """A whole episode with its recorded acting orders, draws and regrowth, step by step without correction."""
    config, N = json.loads(str(data["config"])), data["action"].shape[1]
    env = economies(1, num_agents=N, horizon=len(data["action"]), **episode_fields(config))
    tolerance = SAEZ if env.tax == "saez" else REAL
    tile = first(tile_of(env, data["init_loc"][None]), torch.int32)
    state = env.make_state(tile, *(first(data[name][None]) for name in ("build_payment", "bonus_prob")))
    state.completions += config.get("completions", 0)
    state.worked += config.get("integrator", 0)
    state.utility = env.utility(state.coin, state.labor, env.labor_weight(state))
    if env.tax == "saez" and "saez_buffer" in data:
        pairs = torch.as_tensor(data["saez_buffer"][::-1].T.copy())[..., None]  # the newest first
        state.pairs = torch.nn.functional.pad(pairs, (0, 0, 0, 500), value=-1.0)[:, : env.saez_pairs]
    source = {int(tile): k for k, tile in enumerate(env.sources)}
    spawns = {t: [] for t in range(len(data["action"]))}
    for t, resource, cell in data["spawn"].tolist():
        k = source[int(tile_of(env, divmod(cell, env.size[1])))]
        if (k >= env.num_stones) != resource:
            raise ValueError(f"resource {resource} grows on the other one's source")
        spawns[t].append(2 * N + k)
    seen = {int(t): k for k, t in enumerate(data["obs_t"])}
    for t in range(len(data["action"])):
        if t in seen:
            compare_observations(errors, env, state, data, seen[t])
        noise = torch.ones(env.noise_rows, 1, dtype=torch.float64)
        noise[:N, 0] = torch.as_tensor(np.argsort(data["order"][t]))  # the place of each agent in the order
        noise[N : 2 * N, 0] = torch.as_tensor(np.nan_to_num(data["u"][t], nan=1.0))
        noise[spawns[t]] = 0.0
        action, rates = (torch.as_tensor(data[name][t]).long()[None] for name in ("action", "paction"))
        errors.compare("position in the tax cycle", int(state.t) % env.period + 1, data["pos"][t], EXACT)
        new = env.advance(state, action, noise, rates)
        errors.compare("position", last(new.position)[0], tile_of(env, data["loc"][t]), EXACT)
        now = {name: data[name][t][None] for name in ("inv", "labor", "esc")}
        compare_holdings(errors, env, new, **now, tol=tolerance)
        errors.compare("rates", new.rates[:, 0], data["rates"][t], tolerance)
        reward = torch.cat(((new.utility - state.utility)[:, 0], new.welfare - state.welfare))
        errors.compare("reward", reward, data["reward"][t], tolerance)
        errors.compare("labor weight", torch.as_tensor(env.labor_weight(new)).flatten()[0], data["energy_w"][t])
        state = new
    final = (data[f"final_{name}"][None] for name in ("stone", "wood", "house_owner"))
    compare_map(errors, env, state, *final)
    metrics, coin = json.loads(str(data["final_metrics"])), env.endowment(state)
    errors.compare("productivity", economy.total(coin)[0], metrics["social/productivity"], tolerance)
    errors.compare("equality", economy.equality_of(coin)[0], metrics["social/equality"], tolerance)
    utilities = [metrics[f"util/{i}"] for i in range(N)]
    errors.compare("utility", state.utility[:, 0], utilities, tolerance)
    errors.compare("welfare", state.welfare[0], metrics["util/p"], tolerance)


def compare_observations(errors: Errors, env: economy.Economy, state: economy.State, data: dict, k: int):
    """Recorded observations are float32. `build_skill` is left out, which is unrelated noise in them."""
    ours = {name: value[0].float() for name, value in env.original_obs(state).items()}
    errors.compare("map", ours["map"], data["obs_map"][k], EXACT)
    errors.compare("index map", ours["index_map"], data["obs_idx_map"][k], EXACT)
    flat, recorded = (np.delete(x, 1, 1) for x in (ours["flat"].numpy(), data["obs_flat"][k]))
    errors.compare("flat", flat, recorded, 1e-6)
    errors.compare("planner flat", ours["planner_flat"], data["obs_pflat"][k], 1e-6)
    errors.compare("planner agents", ours["planner_agents"], data["obs_pp"][k], 1e-6)
    errors.compare("mask", env.valid_actions(state)[0], data["obs_mask"][k], EXACT)
    if env.tax == "planner":
        errors.compare("planner mask", env.valid_rates(state)[0].flatten(), data["obs_pmask"][k], EXACT)


def replay_economy(path: pathlib.Path, index: dict) -> dict[str, tuple[float, float]]:
    """{quantity: (largest error, tolerance)}; what a file holds is told by the names in it."""
    errors = Errors()
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        if "stone_sources" in data:
            economy_world(data, errors)
            return errors
        kinds = {"rates": "taxes", "gini": "social", "eta": "utilities", "limit": "annealing"}
        kind = next((name for key, name in kinds.items() if key in data["cases"][0]), None)
        cases = (data["cases"], data["cutoffs"]) if kind == "taxes" else (data["cases"],)
        functions = {"taxes": economy_taxes, "social": economy_social, "utilities": economy_utilities}
        {**functions, "annealing": economy_annealing}[kind](*cases, errors)
        return errors
    data = dict(np.load(path))
    kinds = {"spawn": economy_episode, "trades": economy_auctions, "gz": economy_saez, "stone_0": economy_single_steps}
    kind = next((function for key, function in kinds.items() if key in data), None)
    if kind is None:
        raise ValueError("none of the known formats")
    kind(data, errors)
    return errors


# (function, files) per kind: function(file, index) -> {quantity: (error, tolerance)}
REPLAYS = {
    "particle": (replay_particle, "*.npz"),
    "traffic": (replay_traffic, "*.json"),
    "drones": (replay_drones, "*.npz"),
    "economy": (replay_economy, "*.[jn][sp]*"),
}


def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(arguments) != 2 or arguments[0] not in REPLAYS:
        print(f"usage: python tests/replay.py KIND FOLDER with KIND one of {', '.join(REPLAYS)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # with two, small operations wait for each other where other programs run
    kind, folder = arguments[0], pathlib.Path(arguments[1])
    function, pattern = REPLAYS[kind]
    files = sorted(path for path in folder.glob(pattern) if path.name != "index.json")
    if not files:
        print(f"{folder} has no {pattern} files", file=sys.stderr)
        return 2
    try:
        index = load_index(kind, folder)
    except (OSError, ValueError) as error:
        print(f"{folder}: index.json cannot be read: {error}", file=sys.stderr)
        return 2
    failed = 0
    for path in files:
        try:
            errors = function(path, index)
            if not errors:
                raise ValueError("nothing in it is compared")
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
    with runs.quiet_pipe():
        sys.exit(main(sys.argv[1:]))
