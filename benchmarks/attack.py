"""The strongest observations that reinforcement learning finds: adversaries trained against the policies of a run.

    python benchmarks/attack.py runs/RUN                         # beside Gaussian noise and MAD at the same radii
    python benchmarks/attack.py runs/RUN --radius 0.5 1 --attack learned mad
    python benchmarks/attack.py runs/RUN --space observation     # the adversary chooses every entry itself

Each cooperating agent has an adversary that sees its observation and replaces it by another one within the radius, in
the unit and norm of the run's own attacks; it is paid minus the team's reward. As the policies are frozen, they are
part of the adversaries' environment (a state-adversarial MDP; Zhang et al. 2021, arXiv 2101.08452), and they learn by
ernie_mappo.py's PPO. With `--space policy` (Sun et al. 2022, arXiv 2106.05087) an adversary chooses the direction in
which the policy's output shall move, and projected ascent steps find the observation that moves it furthest that way:
few numbers to learn, however large the observation is.

Runs of all scripts of ERNIE and of its baselines, and of copies that keep make_env, make_nets and trained_policy. Of
traffic lights, episodes are short: what an adversary does shows within minutes. Leaves learned_attack.csv in the run's
folder: a row per attack, radius and seed.
"""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "baselines"))
sys.path.insert(0, str(ROOT))

import envs  # noqa: E402
import ernie_mappo  # noqa: E402  (the root must be on the path first)
from envs import perturb, robustness, runs  # noqa: E402

Attacks = Annotated[tuple[Literal["gaussian", "mad", "learned"], ...], Field(min_length=1)]
Radii = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]


@runs.arguments
class Args:
    run_dir: Annotated[Path, tyro.conf.Positional]  # folder of a run
    attack: Attacks = ("gaussian", "mad", "learned")  # noise of this mean length, worst observations, adversaries
    radius: Radii = (0.2, 0.5, 1.0)  # radii in the unit of the run's own attacks
    space: Literal["policy", "observation"] = "policy"
    """what a learned adversary chooses: a direction of the policy's output, or the change of every entry"""
    iterations: PositiveInt = 150  # PPO iterations of an adversary
    num_envs: PositiveInt = 64  # environments of a seed that step together; an iteration is an episode of each
    eval_episodes: PositiveInt = 256  # episodes of a seed in which every attack is measured
    ascent_steps: PositiveInt = 3  # projected ascent steps of --space policy
    learning_rate: PositiveFloat = 1e-3  # Adam step size of the adversaries, linear to 0
    init_std: PositiveFloat = 0.5  # standard deviation of their first actions, which are cut to [-1, 1]
    seconds: PositiveInt = 300  # traffic lights: length of an episode
    warmup: NonNegativeInt = 300  # traffic lights: seconds of random switching before it
    compile: bool = False  # compile the environment step, which pays off for traffic lights
    seed: NonNegativeInt = 1  # seed of the adversaries
    cuda: bool = True  # use the GPU if there is one

    def __post_init__(self):
        for name in ("attack", "radius"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must have different values, got {values}")


@dataclass
class Victim:
    """The frozen policies of all seeds of a run."""

    args: object  # of the run
    build: Callable  # number of environments -> environment
    make_policy: Callable  # env -> robustness.Policy
    compile: bool = False  # the environment step

    def task(self, num_envs: int) -> tuple[envs.Env, Callable]:
        """Environment, and its step, compiled once for each size."""
        if num_envs not in self.tasks:
            env = self.build(num_envs=num_envs)
            step = torch.compile(env.step, fullgraph=True) if self.compile else env.step
            self.tasks[num_envs] = env, step
        return self.tasks[num_envs]

    @cached_property
    def tasks(self) -> dict:
        return {}


def load_run(run_dir: Path) -> tuple:
    """The script that left this folder, as a module, its arguments, and what policy.pt or checkpoint.pt holds. Raises
    ValueError for what is no folder of a run."""
    folder = runs.folder(str(run_dir))
    try:
        name = json.loads((folder / "args.json").read_text())["script"]
        script = importlib.import_module(name)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"{run_dir} is no folder of a run: {error}") from None
    path = runs.trained_file(folder)
    checkpoint = runs.load(path)
    try:
        return script, script.Args(**checkpoint["args"]), checkpoint
    except TypeError as error:
        raise ValueError(f"{path} does not fit {name}.py: {error}") from None


def rebuild(run: tuple, device: torch.device, seconds: int, warmup: int) -> tuple[Callable, dict]:
    """What makes `num_envs` environments of a run as load_run returns it, of traffic lights for `seconds` after
    `warmup`, and its trained networks."""
    script, args, checkpoint = run
    build = partial(script.make_env, args, device=device)
    if args.env_id.startswith("traffic_"):
        build = partial(build, horizon=seconds, warmup=warmup)
    nets, _ = script.make_nets(build(num_envs=args.num_seeds), args)
    runs.restore({"nets": {name: net.flat for name, net in nets.items()}}, checkpoint)
    return build, nets


def load(device: torch.device, asked: Args) -> Victim:
    """Raises ValueError for what is no run with policies that observe."""
    script, args, checkpoint = load_run(asked.run_dir)
    if not hasattr(script, "trained_policy"):
        raise ValueError(f"{asked.run_dir} is a run of {script.__name__}.py, whose policies cannot be attacked so")
    build, nets = rebuild((script, args, checkpoint), device, asked.seconds, asked.warmup)
    make_policy = partial(script.trained_policy, nets, args=args)
    return Victim(args, build, make_policy, asked.compile)


class Adversaries:
    """The environment of the adversaries: agents are the cooperating agents of the victims' task, observations theirs,
    an action [-1, 1]^A becomes a perturbation, the reward of all is minus the team's mean."""

    def __init__(self, victim: Victim, num_envs: int, radius: float, args: Args):
        self.victim, self.radius, self.args, self.num_envs = victim, radius, args, num_envs
        self.task, self.advance = victim.task(num_envs)
        self.policy = victim.make_policy(self.task)
        self.num_seeds = victim.args.num_seeds
        self.team, self.device, self.dtype = self.task.cooperators, self.task.device, self.task.dtype
        self.horizon = self.task.horizon
        self.agents = [name for name, chosen in zip(self.task.agents, self.team.tolist()) if chosen]
        self.num_agents = len(self.agents)
        self.cooperators = torch.ones(self.num_agents, dtype=torch.bool, device=self.device)
        self.obs_mask = self.task.obs_mask[self.team]
        self.live = (self.task.obs_mask & self.team[:, None])[:, None].to(self.dtype)  # [N, 1, O]
        self.unit = self.live if self.policy.unit is None else self.live * self.policy.unit
        self.action_mask = self.obs_mask if args.space == "observation" else self.task.action_mask[self.team]
        self.action_sizes = (self.action_mask.shape[1],) * self.num_agents
        self.discrete, self.action_low, self.action_high = False, -1.0, 1.0

    def reset(self, generators: list[torch.Generator]):
        warmup = (self.advance,) if hasattr(self.task, "warmup") else ()
        state, obs = self.task.reset(generators, *warmup)
        return (state, obs), obs[:, self.team]

    def draw(self, generators: list[torch.Generator]):
        return self.task.draw(generators)

    def perturb(self, obs: Tensor, choice: Tensor) -> Tensor:
        """Observations [S, N, B, O] of all agents with those of the team moved as `choice` [S, N, B, A] says."""
        norm, radius = self.policy.norm, self.radius
        if self.args.space == "observation":
            return obs + self.unit * perturb.project(radius * choice * (self.unit != 0), radius, norm)

        def objective(delta: Tensor) -> Tensor:
            return (choice * self.policy.output(obs + self.unit * delta)[..., : choice.shape[-1]]).sum()

        delta = torch.zeros_like(obs)
        for _ in range(self.args.ascent_steps):
            slope = torch.func.grad(objective)(delta)
            step = perturb.steepest(slope, 2 * radius / self.args.ascent_steps, norm)
            delta = perturb.project(delta + step, radius, norm)
        return obs + self.unit * delta

    def respond(self, seen: Tensor) -> Tensor:
        return envs.for_env(self.policy.act(seen), self.task)

    def step(self, state: tuple, action: Tensor, noise: Tensor | None):
        state, obs = state
        choice = torch.zeros(len(obs), self.task.num_agents, action.shape[-1], dtype=obs.dtype, device=obs.device)
        choice[:, self.team] = action.to(obs.dtype)
        seen = self.perturb(envs.by_agent(obs, self.num_seeds), envs.by_agent(choice, self.num_seeds))
        state, obs, reward, terminated, truncated, info = self.advance(state, self.respond(seen), noise)
        loss = -reward[:, self.team].mean(1, keepdim=True).expand(-1, self.num_agents)
        return (state, obs), obs[:, self.team], loss, terminated, truncated, info


def learn(victim: Victim, radius: float, args: Args) -> Callable:
    """Adversaries of all seeds, trained side by side: what they see [S, N, B, O] -> their choices without noise."""
    ppo = ernie_mappo.Args(
        env_id="simple_spread_v3",
        num_seeds=victim.args.num_seeds,
        seed=args.seed,
        num_envs=args.num_envs,
        num_minibatches=4,
        learning_rate=args.learning_rate,
        init_std=args.init_std,
        regularizer="none",
    )
    env = Adversaries(victim, ppo.num_seeds * ppo.num_envs, radius, args)
    nets, optimizers = ernie_mappo.make_nets(env, ppo)
    new_streams = partial(envs.make_generators, args.seed, ppo.num_seeds, device=env.device)
    streams = {purpose: new_streams(purpose) for purpose in ("norm", "rollout", "minibatches")}
    nets["normalizer"].flat.copy_(perturb.observation_moments(env.step, env, streams["norm"]))
    losses = {"critic": ernie_mappo.critic_loss, "actor": ernie_mappo.actor_loss}
    for k in tqdm(range(args.iterations), desc=f"radius {radius:g}", disable=None):
        optimizers["adam"].param_groups[0]["lr"] = args.learning_rate * (1 - k / args.iterations)
        episodes = ernie_mappo.rollout(env.step, env, nets, ppo, ernie_mappo.draw_rollout(env, streams["rollout"]))
        samples = ernie_mappo.prepare(nets, episodes, env, ppo)
        for batch in ernie_mappo.minibatches(samples, streams["minibatches"], ppo):
            ernie_mappo.update(nets, optimizers, losses, batch, env, ppo)
    return ernie_mappo.trained_policy(nets, env, ppo).act


@torch.no_grad()
def returns(victim: Victim, attack: str, radius: float, args: Args, choose: Callable | None = None) -> Tensor:
    """Mean return of the cooperating agents [S] under an attack, on the same episodes for all; of traffic lights the
    reward of all in a second."""
    S, total = victim.args.num_seeds, 0.0
    env = Adversaries(victim, S * args.eval_episodes, radius, args)
    streams = envs.make_generators(victim.args.seed, S, "learned attack", env.device)
    own_streams = envs.make_generators(victim.args.seed, S, "attack's own", env.device)
    state, obs = env.reset(streams)
    for _ in range(env.horizon):
        if attack == "learned":
            action = choose(envs.by_agent(obs, S)).transpose(1, 2).flatten(0, 1)
            state, obs, loss, *_ = env.step(state, action, env.draw(streams))
            total = total - loss[:, 0]
            continue
        seen = envs.by_agent(state[1], S)
        if attack == "gaussian":  # of mean squared length radius^2
            count = (env.unit != 0).sum(-1, keepdim=True).clamp_min(1)
            noise = envs.per_seed(torch.randn, seen.shape[1:], own_streams)
            seen = seen + env.unit * noise * radius / count.sqrt()
        elif attack == "mad":
            seen = robustness.worst_observations(env.task, env.policy, "mad", seen, radius, own_streams)
        inner, everything, reward, *_ = env.advance(state[0], env.respond(seen), env.draw(streams))
        state, total = (inner, everything), total + reward[:, env.team].mean(1)
    scale = env.num_agents / env.horizon if hasattr(env.task, "warmup") else 1.0
    return total.unflatten(0, (S, -1)).mean(1) * scale


def main() -> None:
    with runs.quiet_pipe():
        args = tyro.cli(Args, description=__doc__)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    with runs.exits(2, ValueError, ImportError, OSError):
        victim = load(device, args)
    points = [("clean", 0.0)]
    for attack in args.attack:
        points += [(attack, radius) for radius in args.radius]
    about = {"env_id": victim.args.env_id, "regularizer": getattr(victim.args, "regularizer", ""), "space": args.space}
    rows = []
    print(f"{args.run_dir}: mean and 95% interval over seeds")
    for attack, radius in points:
        choose = learn(victim, radius, args) if attack == "learned" else None
        values = returns(victim, attack, radius, args, choose).double().cpu().numpy()
        half = robustness.half_interval(values)
        print(f"  {attack:10s}{radius:6g}: {np.mean(values):8.2f} ± {half:.2f}", flush=True)
        for k, value in enumerate(values):
            row = {"seed": victim.args.seed + k, "perturbation": attack, "strength": radius, "return": value}
            rows.append(about | row)
    with runs.exits(1, OSError):
        runs.write_rows(runs.folder(str(args.run_dir)) / "learned_attack.csv", rows)


if __name__ == "__main__":
    main()
