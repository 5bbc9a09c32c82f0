"""How trained policies do when observations, actions or dynamics change: evaluation, table, CSV and picture.

    policy = Policy(output, to_action, divergence)
    returns = evaluate(env, policy, generators, "gaussian", 0.5)         # [S, B, N]
    report(env, lambda env: policy, {"gaussian": (0.1, 0.5), "mass": (0.5, 2.0)}, run, labels)

For any environment and any script: what has to know the networks, the script gives as functions (`Policy`). A physical
constant in `env.dynamics` is multiplied by its strength; `env.scenario(name, value)` is the environment in one of
`env.scenarios`, {name: value in the environment as it is}. `drive` and what follows are for traffic lights, whose few
long episodes run side by side.

Axes: S seeds, B environments of a seed, N agents, O observation entries, A action entries.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import stdtrit  # scipy.stats is slow to import
from torch import Tensor
from tqdm import tqdm

from envs import Env, by_agent, for_env, legal_actions, make_generators, new_figure, per_seed, perturb, runs, traffic

Generators = list[torch.Generator]  # one per seed
Table = dict[str, dict[float, tuple[float, float]]]  # perturbation -> strength -> (mean, half of its 95% interval)
NOISES = ("gaussian", "uniform")
ATTACKS = ("mad", "executed")  # on the observations of any policy; `Policy.attacks` are others
CARS = ("clean", "speed", "flow", "network")  # points of traffic lights that any controller meets alike


@dataclass
class Policy:
    """Deterministic policies. obs [S, N, B, O], output [S, N, B, A], action [S, N, B, A], one-hot if discrete."""

    output: Callable  # obs -> what is attacked: actions before squashing, means, logits or Q-values
    to_action: Callable  # output -> action
    divergence: Callable  # (output, clean output) -> [S, N, B], which the attack "mad" maximises
    attacks: dict[str, Callable] = field(default_factory=dict)  # obs -> objective(perturbed obs), differentiable
    adversaries: dict[str, Callable] = field(default_factory=dict)  # learned ones: (obs, strength) -> perturbed obs
    team_value: Callable | None = None  # (obs, action) -> what the team thinks of a joint action, [S, B]
    norm: str = "l2"  # of the attacks' ball, or linf
    unit: Tensor | None = None  # of the attacks' radius in each entry [S or 1, N, 1, O]; None: the observation's own
    ascent_steps: int = 10  # of the attacks
    starts: int = 2  # of the attacks; of each sample the best is taken

    def act(self, obs: Tensor) -> Tensor:
        return self.to_action(self.output(obs))

    def objective(self, attack: str, obs: Tensor, is_discrete: bool) -> Callable:
        """What `attack` maximises, a function of the perturbed observations. "executed" is about what is played: the
        squared change of the action or, if discrete, by how much another one is likelier than the likeliest was."""
        if attack in self.attacks:
            return self.attacks[attack](obs)
        clean = self.output(obs)
        if attack == "mad":
            return lambda seen: self.divergence(self.output(seen), clean)
        if not is_discrete:
            action = self.to_action(clean)
            return lambda seen: (self.to_action(self.output(seen)) - action).square().sum(-1)

        is_best = F.one_hot(clean.argmax(-1), clean.shape[-1]) > 0

        def margin(seen: Tensor) -> Tensor:
            output = self.output(seen)
            others = output.masked_fill(is_best, -math.inf).amax(-1)
            return others - (output * is_best).sum(-1)

        return margin


def worst_observations(
    env: Env, policy: Policy, attack: str, obs: Tensor, radius: float | Tensor, generators: Generators
) -> Tensor:
    """Observations of cooperating agents in a ball around obs [S, N, B, O] that an attack likes best: projected
    gradient ascent from random starts, side by side, in the l2 ball along the gradient, in the linf ball along its
    sign. A radius for each environment is [B, 1]."""
    live = (env.obs_mask & env.cooperators[:, None])[:, None].to(obs.dtype)  # [N, 1, O]
    unit = live if policy.unit is None else live * policy.unit
    noise = per_seed(torch.randn, (policy.starts, *obs.shape[1:]), generators).movedim(1, 2)  # [S, N, starts, B, O]
    delta = perturb.rescale(noise * (unit > 0).unsqueeze(-3), 0.5 * radius, policy.norm).flatten(2, 3)
    clean = torch.cat([obs] * policy.starts, 2)
    objective = policy.objective(attack, clean, env.discrete)
    if isinstance(radius, Tensor):
        radius = torch.cat([radius] * policy.starts)
    for _ in range(policy.ascent_steps):
        with torch.enable_grad():  # faster than torch.func.grad, which torch.compile and vmap would need
            delta.requires_grad_()
            (slope,) = torch.autograd.grad(objective(clean + unit * delta).sum(), delta)
        step = perturb.steepest(slope, 2.5 / policy.ascent_steps * radius, policy.norm)
        delta = perturb.project(delta.detach() + step, radius, policy.norm)
    seen = clean + unit * delta
    values = objective(seen).unflatten(2, (policy.starts, -1))
    best = values.argmax(2, keepdim=True)[..., None]
    seen = torch.take_along_dim(seen.unflatten(2, (policy.starts, -1)), best, 2).squeeze(2)
    is_better = values.amax(2) > objective(clean)[:, :, : obs.shape[2]]
    return torch.where(is_better[..., None], seen, obs)


def worst_actions(env: Env, policy: Policy, obs: Tensor, action: Tensor) -> Tensor:
    """For each agent the action that is worst for the team, the others acting as they do: of discrete ones the worst
    that are legal, of continuous ones the corner of the action box against the slope."""
    if not env.discrete:
        slope = torch.func.grad(lambda a: policy.team_value(obs, a).sum())(action)
        return torch.where(slope > 0, env.action_low, env.action_high) * env.action_mask[:, None]
    choices = torch.eye(action.shape[-1], dtype=action.dtype, device=action.device)
    is_masked = getattr(env, "masked", False)
    worst = torch.zeros_like(action)
    for agent, count in enumerate(env.action_sizes):
        values = []
        for choice in choices[:count]:
            changed = action.clone()
            changed[:, agent] = choice
            values.append(policy.team_value(obs, changed))
        values = torch.stack(values, -1)
        if is_masked:
            legal = legal_actions(obs, env)[:, agent, :, :count]
            values = values.masked_fill(~legal, math.inf)
        worst[:, agent] = choices[values.argmin(-1)]
    return worst


def see(env: Env, policy: Policy, obs: Tensor, perturbation: str, strength: float, generators: Generators) -> Tensor:
    """What the agents see [S, N, B, O] of obs [S * B, N, O]."""
    S = len(generators)
    if perturbation in NOISES:
        return by_agent(perturb.observation_noise(env, obs, perturbation, strength, generators), S)
    if perturbation in (*ATTACKS, *policy.attacks):
        return worst_observations(env, policy, perturbation, by_agent(obs, S), strength, generators)
    if perturbation in policy.adversaries:
        return policy.adversaries[perturbation](by_agent(obs, S), strength)
    return by_agent(obs, S)


def act(env: Env, policy: Policy, obs: Tensor, perturbation: str, strength: float, generators: Generators) -> Tensor:
    """Actions for env.step at obs [S * B, N, O] under a perturbation."""
    S = len(generators)
    joint = policy.act(see(env, policy, obs, perturbation, strength, generators))
    action = for_env(joint, env)
    if perturbation == "random_action":
        other = perturb.random_actions(env, generators, obs)
    elif perturbation in ("worst_action", "worst_one"):
        other = for_env(worst_actions(env, policy, by_agent(obs, S), joint), env)
    elif perturbation in ("flip_one", "flip_each"):
        other = 1 - action
    else:
        return action
    if perturbation == "flip_each":
        is_flipped = perturb.draw(torch.rand, action.shape, generators) < strength
        return torch.where(is_flipped, other, action)
    return perturb.replace_actions(env, action, other, strength, generators)


@torch.no_grad()
def evaluate(
    env: Env, policy: Policy, generators: Generators, perturbation: str = "clean", strength: float = 0.0
) -> Tensor:
    """Returns [S, B, N] of an episode of every environment, or of several in turns where it has `turns`, in which
    cooperating agents alone are perturbed:

    gaussian, uniform    noise on observations; strength: standard deviation, half-width
    mad, executed, policy.attacks  the worst observations; strength: radius of the ball
    policy.adversaries   observations changed by a learned adversary; strength: its radius
    random_action        with probability `strength` one agent acts at random in a step
    worst_action         the same with the action that is worst for the team
    """
    S, returns = len(generators), []
    for _ in range(getattr(env, "turns", 1)):
        total = 0.0
        state, obs = env.reset(generators)
        for _ in range(env.horizon):
            action = act(env, policy, obs, perturbation, strength, generators)
            state, obs, reward, terminated, truncated, info = env.step(state, action, env.draw(generators))
            total = total + reward
            if "live" in info and bool((terminated | truncated).all()):  # on the CPU anyway
                break
        returns.append(total.unflatten(0, (S, -1)))
    return torch.cat(returns, 1)


def player(env: Env, policy: Policy, num_seeds: int, index: int = 0) -> Callable:
    """The policies of one of the seeds for a loop of PettingZoo's: act(observations, infos) -> actions, dictionaries by
    agent, all as the agents' spaces have them."""

    @torch.no_grad()
    def act(observations: dict, infos: dict | None = None) -> dict:
        if hasattr(env, "encode"):  # it knows spaces that ours do not have
            obs = env.encode(observations, infos or {})
        else:
            obs = torch.zeros(env.obs_mask.shape, dtype=env.dtype, device=env.device)
            for i, agent in enumerate(env.agents):
                row = torch.as_tensor(observations.get(agent, 0.0), dtype=env.dtype, device=env.device)
                obs[i, : env.obs_sizes[i]] = row
        joint = policy.act(obs[None, :, None].expand(num_seeds, -1, 1, -1))
        action = for_env(joint[index : index + 1], env)[0].cpu().numpy()
        if hasattr(env, "decode"):
            return env.decode(action, observations)
        if env.discrete:
            return {agent: int(action[i]) for i, agent in enumerate(env.agents) if agent in observations}
        sizes = zip(env.agents, env.action_sizes)
        return {agent: action[i, :size] for i, (agent, size) in enumerate(sizes) if agent in observations}

    return act


def loader(kind: type, make_env: Callable, make_nets: Callable, trained_policy: Callable) -> Callable:
    """A script's `load_policy`, of its arguments, environment, networks and policies."""

    def load_policy(path: str, seed_index: int = 0) -> Callable:
        """The policies of a run, of one of the seeds in it, for a loop of PettingZoo's, see `player`."""
        args, checkpoint = runs.saved(kind, path)
        if not 0 <= seed_index < args.num_seeds:
            raise ValueError(f"seed_index must be below the run's {args.num_seeds} seeds, got {seed_index}")
        args.num_workers = 1  # of PettingZoo's environments, whose spaces are read
        env = make_env(args, args.num_seeds, torch.device("cpu"))
        nets, _ = make_nets(env, args)
        runs.restore({"nets": {name: net.flat for name, net in nets.items()}}, checkpoint)
        return player(env, trained_policy(nets, env, args), args.num_seeds, seed_index)

    return load_policy


def changed(env: Env, perturbation: str, strength: float, num_seeds: int) -> Env:
    """The environment with other dynamics or in another scenario, or as it is."""
    if perturbation in getattr(env, "dynamics", ()):
        return replace(env, **{perturbation: strength * getattr(env, perturbation)})
    if perturbation in getattr(env, "scenarios", ()):
        other = env.scenario(perturbation, strength)
        episodes = max(1, other.num_envs // num_seeds)
        return replace(other, num_envs=episodes * num_seeds)
    return env


def sweep(
    env: Env, make_policy: Callable, strengths: dict[str, tuple], seeds: list[int], per_agent: bool
) -> list[dict]:
    """A row per perturbation, strength, seed and, with `per_agent`, cooperating agent; else for their mean. What this
    environment or policy does not have is left out."""
    policy = make_policy(env)
    known = (*NOISES, *ATTACKS, "random_action", *policy.attacks, *policy.adversaries)
    known += ("worst_action",) * (policy.team_value is not None)
    known += (*getattr(env, "dynamics", ()), *getattr(env, "scenarios", ()))
    points = [("clean", 0.0)]
    for perturbation in strengths:
        if perturbation in known:
            points += [(perturbation, strength) for strength in strengths[perturbation]]
    names = [name for name, cooperates in zip(env.agents, env.cooperators.tolist()) if cooperates]
    rows = []
    for perturbation, strength in tqdm(points, desc="robustness", unit="point", disable=None, leave=False):
        other = changed(env, perturbation, strength, len(seeds))
        generators = make_generators(seeds[0], len(seeds), "evaluation", env.device)
        returns = evaluate(other, make_policy(other), generators, perturbation, strength)[:, :, other.cooperators]
        agents = {"mean": returns.mean(2)}
        if per_agent:
            agents |= dict(zip(names, returns.unbind(2)))
        for agent, values in agents.items():
            for seed, episodes in zip(seeds, values.double().cpu().numpy()):
                row = {"seed": seed, "agent": agent, "perturbation": perturbation, "strength": strength}
                row |= {"return": episodes.mean(), "standard_error": math.nan, "episodes": len(episodes)}
                if len(episodes) > 1:
                    row["standard_error"] = episodes.std(ddof=1) / len(episodes) ** 0.5
                rows.append(row)
        if hasattr(other, "close"):  # a simulator's worlds; a reset opens them again
            other.close()
    return rows + worst_case(rows, (*ATTACKS, *policy.attacks), "return")


def worst_case(rows: list[dict], attacks: Sequence[str], value: str) -> list[dict]:
    """Of each seed, strength and agent the row of the attack that leaves the least, if there are several attacks."""
    if len({row["perturbation"] for row in rows} & set(attacks)) < 2:
        return []
    worst: dict[tuple, dict] = {}
    for row in rows:
        key = row["seed"], row["strength"], row.get("agent")
        if row["perturbation"] in attacks and (key not in worst or row[value] < worst[key][value]):
            worst[key] = row
    return [row | {"perturbation": "worst_case"} for row in worst.values()]


def half_interval(values: np.ndarray) -> np.ndarray:
    """Half of the 95% t-interval of the mean over seeds, the first axis of [K, ...]: [...], NaN for one seed."""
    K = len(values)
    if K == 1:
        return np.full(values.shape[1:], math.nan)[()]
    return stdtrit(K - 1, 0.975) * values.std(0, ddof=1) / K**0.5


def interval(rows: list[dict], name: str = "return") -> tuple[float, float]:
    """Mean and half of its 95% t-interval over seeds; of a single seed over its episodes."""
    returns = np.array([row[name] for row in rows])
    if len(rows) > 1:
        return returns.mean(), half_interval(returns)
    error, count = rows[0]["standard_error"], rows[0]["episodes"]
    half = stdtrit(count - 1, 0.975) * error if count > 1 else math.nan
    return returns.mean(), half


def summarise(rows: list[dict]) -> dict[str, Table]:
    """A table per agent."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault((row["agent"], row["perturbation"], row["strength"]), []).append(row)
    tables: dict[str, Table] = {}
    for (agent, perturbation, strength), members in cells.items():
        tables.setdefault(agent, {}).setdefault(perturbation, {})[strength] = interval(members)
    return tables


def report(
    env: Env,
    make_policy: Callable,
    strengths: dict[str, tuple],
    run: runs.Run,
    labels: dict,
    name: str = "robustness",
    per_agent: bool = False,
) -> None:
    """Sweep `make_policy(env)` over `strengths`; print the table, write it and a picture to run.dir as `name`.csv and
    .png, and both to each seed's wandb run. `labels` are the first columns."""
    rows = [labels | row for row in sweep(env, make_policy, strengths, run.seeds, per_agent)]
    runs.write_rows(run.dir / f"{name}.csv", rows)
    tables = summarise(rows)
    title = ", ".join(map(str, labels.values()))
    over = counted(run, rows[0]["episodes"])
    for agent, table in tables.items():
        who = "the cooperating agents" if agent == "mean" else agent
        print(f"\nReturn of {who}, {title}: mean and 95% interval over {over}")
        for perturbation, cells in table.items():
            texts = [f"{strength:>4g}: {mean:7.2f} ± {half:<5.2f}" for strength, (mean, half) in cells.items()]
            print(f"  {perturbation:16s}" + "   ".join(texts))
    with runs.written(run.dir / f"{name}.png", "wb") as file:
        plot(tables, env, f"{title}, {over}").savefig(file, dpi=110)
    log_report(rows, run, name)


def counted(run: runs.Run, episodes: int) -> str:
    """What an interval is over."""
    return f"{len(run.seeds)} seeds" if len(run.seeds) > 1 else f"{episodes} episodes"


def log_report(rows: list[dict], run: runs.Run, name: str) -> None:
    """The rows of a report and its picture to each seed's wandb run."""
    tables = [[row for row in rows if row["seed"] == seed] for seed in run.seeds]
    runs.log_report(run, {name: tables}, {f"{name}_plot": run.dir / f"{name}.png"})


def plot(tables: dict[str, Table], env: Env, title: str):
    """A figure of return against strength, a panel per perturbation; training was at strength 0 or, of dynamics, factor
    1, of scenarios what the environment says."""
    dynamics, scenarios = getattr(env, "dynamics", ()), getattr(env, "scenarios", {})
    first = next(iter(tables.values()))
    names = [name for name in first if name != "clean"]
    height = max(1, math.ceil(len(names) / 5))
    figure = new_figure(13, 2.7 * height)
    axes = figure.subplots(height, 5, squeeze=False).flatten()
    for name, axis in zip(names, axes):
        for agent, table in tables.items():
            trained = scenarios[name] if name in scenarios else float(name in dynamics)
            cells = table[name] | {trained: table["clean"][0.0]}
            strengths = sorted(cells)
            mean, half = np.array([cells[strength] for strength in strengths]).T
            places = np.arange(len(strengths))
            axis.fill_between(places, mean - half, mean + half, alpha=0.3)
            axis.plot(places, mean, marker="o", markersize=3, label=agent)
        axis.set_xticks(places, [f"{strength:g}" for strength in strengths])
        axis.set(title=name, xlabel="factor" if name in dynamics else "")
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.remove()
    if len(tables) > 1:
        axes[0].legend(fontsize="small")
    figure.supylabel("episodic return")
    figure.suptitle(title)
    return figure


# ---------------------------------------------------------------- traffic lights: few long episodes, side by side


LIGHTS = {  # perturbation of trained traffic lights: strengths, those of the paper
    "gaussian": (0.01, 0.1, 1.0),  # observation noise, standard deviation in raw units (Figures 1a, 5b, 7, Table 2)
    "mad": (0.1, 0.3),  # radius in the policy's unit; the observations that change its output most
    "executed": (0.1, 0.3),  # the same; the observations that bring another action closest
    "critic": (0.1, 0.3),  # the same; the observations whose action the critic likes least
    "flip_one": (0.03, 0.05),  # probability that one light, chosen at random, does the opposite (Figures 2c, d)
    "flip_each": (0.03, 0.05),  # the same for each light independently (the paper's code)
    "worst_one": (0.03, 0.05),  # as flip_one, with the action that is worst for the team
    "speed": (30.0, 40.0),  # m/s of the cars, trained at 35 (Figures 1b, 5a, 7, Table 2)
    "flow": (1, 2, 3, 4, 5),  # of table 1, for 2 x 2 lights (Figures 1c, 7)
}
NETWORKS = {  # where trained lights are set up, tiled (Figures 2a, 2b, 7, Tables 3 and 4)
    "irregular": {"env_id": "traffic_irregular_v0"},
    "4x4": {"env_id": "traffic_grid_v0", "rows": 4, "cols": 4, "flow": 550.0},
    "6x6": {"env_id": "traffic_grid_v0", "rows": 6, "cols": 6, "flow": 385.0},
    "atlanta": {"env_id": "traffic_atlanta_v0"},
}


SIGNALS = {  # fixed cycles beside which trained lights stand
    "fixed_time": partial(traffic.fixed_time, green=27),  # all lights in phase
    "coordinated": partial(traffic.fixed_time, green=22, offset=25),  # neighbours half a cycle apart
}


@dataclass
class Lights:
    """Trained traffic lights and where they are tried out."""

    make_env: Callable  # (num_envs, **fields of another network) -> environment with a test's warm-up and horizon
    make_step: Callable  # env -> env.step, or that compiled
    make_policy: Callable | None  # env -> Policy of its lights; None: those of run k follow the k-th of SIGNALS
    seeds: Sequence[int]
    episodes: int  # E, of each seed at each point


def drive(lights: Lights, points: list[tuple], purpose: str, **fields) -> dict[str, Tensor]:
    """Mean outcomes of a second, [S, P, E], at each of P points (perturbation, strength), which are all in one batch.
    Every point has the same warm-ups, so that points can be compared.

    gaussian, uniform, mad, executed, policy.attacks  as in `evaluate`
    flip_one    with probability `strength` one light does the opposite in a second
    flip_each   the same for each light, independently
    worst_one   as flip_one, with the action that is worst for the team
    speed, flow, network   other cars, and lights set up elsewhere, as `fields` have it
    """
    S, shape = len(lights.seeds), (len(lights.seeds), len(points), lights.episodes)
    env = traffic.side_by_side(lights.make_env(math.prod(shape), **fields), points, S)
    streams = []
    for seed in lights.seeds:
        for _ in points:
            streams += make_generators(seed, 1, purpose, env.device)
    perturbations = make_generators(lights.seeds[0], S, f"{purpose} perturbations", env.device)
    policy = lights.make_policy(env) if lights.make_policy else None
    attacks = (*ATTACKS, *policy.attacks) if policy else ()
    groups: dict[tuple, list[int]] = {}  # places of points whose lights act in one call
    for place, (name, strength) in enumerate(points):
        if name in CARS:
            key = ("clean", 0.0)
        elif name in attacks:
            key = (name, None)  # an attack costs as much for several strengths as for one
        else:
            key = (name, strength)
        groups.setdefault(key, []).append(place)
    calls = []  # (name, strength, places)
    for (name, strength), members in groups.items():
        if name in attacks:
            strength = torch.tensor([points[place][1] for place in members], device=env.device)
            strength = strength.repeat_interleave(lights.episodes)[:, None]
        calls.append((name, strength, torch.tensor(members, device=env.device)))
    back = torch.cat([places for *_, places in calls]).argsort()  # to the order of `points`

    def control(state: traffic.State, obs: Tensor) -> Tensor:
        if policy is None:
            actions = torch.stack([signal(env, state) for signal in SIGNALS.values()])  # [S, B, L]
            return torch.cat([actions[k].unflatten(0, (S, -1))[k] for k in range(S)])
        obs = obs.unflatten(0, shape)
        actions = []
        for name, strength, places in calls:
            action = act(env, policy, obs[:, places].flatten(0, 2), name, strength, perturbations)
            actions.append(action.unflatten(0, (S, -1, lights.episodes)))
        return torch.cat(actions, 1)[:, back].flatten(0, 2)

    outcomes = traffic.simulate(env, lights.make_step(env), control, streams)
    env.close()
    return {name: values.unflatten(0, shape) for name, values in outcomes.items()}


def drive_rows(lights: Lights, points: list[tuple], labels: dict, fields: dict) -> list[dict]:
    """A row per seed and point."""
    outcomes = {name: values.double() for name, values in drive(lights, points, "evaluation", **fields).items()}
    means = {name: values.mean(2).tolist() for name, values in outcomes.items()}
    deviation = outcomes["reward"].std(2, correction=0)
    means["standard_error"] = (deviation / (lights.episodes - 1) ** 0.5).tolist()  # of one episode: nan
    rows = []
    for k, seed in enumerate(lights.seeds):
        for p, (perturbation, strength) in enumerate(points):
            row = labels | {"seed": seed, "perturbation": perturbation, "strength": strength}
            row["episodes"] = lights.episodes
            for name, values in means.items():
                row[name] = values[k][p]
            rows.append(row)
    return rows + worst_case(rows, (*ATTACKS, "critic"), "reward")


def try_lights(lights: Lights, strengths: dict[str, tuple], networks: dict[str, dict], labels: dict) -> list[dict]:
    """A row per seed and point; `networks` are fields of the environments where the lights are set up too. `labels`
    have the policy's name; beside it stand SIGNALS where they meet the same change."""
    points = [("clean", 0.0)]
    for perturbation, values in strengths.items():
        points += [(perturbation, strength) for strength in values]
    env = lights.make_env(1)
    if (env.rows, env.cols) != (2, 2):  # which FLOWS are of
        points = [point for point in points if point[0] != "flow"]
    groups = [(points, {})] + [([("network", network)], fields) for network, fields in networks.items()]
    fixed = replace(lights, make_policy=None, seeds=[lights.seeds[0]] * len(SIGNALS))
    rows = []
    for points, fields in tqdm(groups, desc="robustness", disable=None, leave=False):
        rows += drive_rows(lights, points, labels, fields)
        changed = [point for point in points if point[0] in CARS]
        for k, row in enumerate(drive_rows(fixed, changed, labels, fields)):  # of one signal after the other
            rows.append(row | {"policy": list(SIGNALS)[k // len(changed)]})
    return rows


def report_lights(
    lights: Lights, strengths: dict[str, tuple], networks: dict[str, dict], run: runs.Run, labels: dict, name: str
) -> None:
    """As `report`, of traffic lights, see `try_lights`. `labels` end with the policy's name."""
    rows = try_lights(lights, strengths, networks, labels)
    runs.write_rows(run.dir / f"{name}.csv", rows)
    table = {}
    for row in rows:
        cells = table.setdefault((row["perturbation"], row["strength"]), {})
        cells.setdefault(row["policy"], []).append(row)
    title = ", ".join(map(str, labels.values()))
    over = counted(run, lights.episodes)
    print(f"\nReward of all lights in a second, {title}: mean and 95% interval over {over}")
    signals = "  ".join(f"{signal:>12s}  outside" for signal in SIGNALS)
    print(f"  perturbation strength            reward  cars left/min  outside |{signals}")
    for (perturbation, strength), cells in table.items():
        mean, half = interval(cells[labels["policy"]], "reward")
        left, outside = (np.mean([r[name] for r in cells[labels["policy"]]]) for name in ("left_per_minute", "backlog"))
        line = f"  {perturbation:12s} {strength:>9} {mean:9.1f} ± {half:<7.1f} {left:8.1f} {outside:12.1f} |"
        for signal in SIGNALS:
            for row in cells.get(signal, []):
                line += f" {row['reward']:12.1f} {row['backlog']:9.1f}"
        print(line)
    with runs.written(run.dir / f"{name}.png", "wb") as file:
        plot_lights(table, f"{title}, {over}").savefig(file, dpi=110)
    log_report([row | {"strength": str(row["strength"])} for row in rows], run, name)


def plot_lights(table: dict[tuple, dict[str, list[dict]]], title: str):
    """A figure of the reward at each strength, a panel per perturbation, beside it the fixed cycles where they meet the
    change."""
    perturbations = list(dict.fromkeys(name for name, _ in table if name != "clean"))
    figure = new_figure(15, 5.4)
    for place, perturbation in enumerate(perturbations):
        axis = figure.add_subplot(2, 6, place + 1)
        points = [point for point in table if point[0] == perturbation]
        if perturbation != "network":
            points.insert(0, ("clean", 0.0))
        for policy in table[points[-1]]:
            cells = [interval(table[point][policy], "reward") for point in points]
            means, halves = np.array(cells).T
            axis.errorbar(range(len(points)), means, np.nan_to_num(halves), fmt="o", capsize=3, label=policy)
        axis.set_xticks(range(len(points)), ["clean" if name == "clean" else f"{value}" for name, value in points])
        axis.set(title=perturbation)
        axis.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize="small")
    figure.supylabel("reward of all lights in a second")
    figure.suptitle(title)
    return figure
