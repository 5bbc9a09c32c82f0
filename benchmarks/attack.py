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

Runs of all five ERNIE scripts. Of traffic lights, episodes are short: what an adversary does shows within minutes.
Leaves learned_attack.csv in the run's folder: a row per attack, radius and seed.
"""

import csv
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from scipy import stats
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ernie_mappo
from benchmarks import certify


@dataclass
class Args:
    run_dir: Annotated[Path, tyro.conf.Positional]
    """folder of a finished run"""
    attack: tuple[Literal["gaussian", "mad", "learned"], ...] = ("gaussian", "mad", "learned")
    """noise of this mean length, the observations that change the policy most, and the adversaries of this script"""
    radius: tuple[float, ...] = (0.2, 0.5, 1.0)
    """radii in the unit of the run's own attacks"""
    space: Literal["policy", "observation"] = "policy"
    """what a learned adversary chooses: a direction of the policy's output, or the change of every entry"""
    iterations: int = 150
    """PPO iterations of an adversary"""
    num_envs: int = 64
    """environments of a seed that step together; an iteration is an episode of each"""
    eval_episodes: int = 256
    """episodes of a seed in which every attack is measured"""
    ascent_steps: int = 3
    """projected ascent steps of --space policy"""
    learning_rate: float = 1e-3
    """Adam step size of the adversaries, linear to 0"""
    init_std: float = 0.5
    """standard deviation of their first actions, which are cut to [-1, 1]"""
    seconds: int = 300
    """traffic lights: length of an episode"""
    warmup: int = 300
    """traffic lights: seconds of random switching before it"""
    compile: bool = False
    """compile the environment step (torch.compile), which pays off for traffic lights"""
    seed: int = 1
    """seed of the adversaries"""
    cuda: bool = True
    """use the GPU if there is one"""

    def __post_init__(self):
        for name, holds, rule in (
            ("iterations num_envs eval_episodes ascent_steps seconds", lambda v: v >= 1, "at least 1"),
            ("warmup", lambda v: v >= 0, "0 or more"),
            ("learning_rate init_std", lambda v: v > 0, "above 0"),
            ("radius", lambda v: v and all(r > 0 for r in v), "one value or more above 0"),
            ("attack", lambda v: v and len(set(v)) == len(v), "one attack or more, each once"),
        ):
            for flag in name.split():
                if not holds(getattr(self, flag)):
                    raise ValueError(f"--{flag.replace('_', '-')} must be {rule}, got {getattr(self, flag)!r}")


@dataclass
class Victim:
    """The frozen policies of all seeds of a run."""

    script: object
    args: object
    build: Callable[[int], object]
    """number of environments -> environment"""
    output: Callable[[object, Tensor], Tensor]
    """env, observations [S, N, M, O] -> what is attacked of the policies' output [S, N, M, A]"""
    respond: Callable[[object, Tensor], Tensor]
    """env, observations [S, N, M, O] -> actions as env.step takes them"""
    mad: Callable[..., Tensor]
    """env, observations [S, N, M, O], radius, generators -> the worst observations"""
    unit: Tensor
    """one unit of radius in each entry of an observation [S or 1, N, 1, O]; 0 where nothing is perturbed"""
    compile: bool
    """compile the environment step"""
    measure: str = "Return of the cooperating agents"
    """what the run's own report shows"""
    scale: float = 1.0
    """of an agent's return to that"""

    def __post_init__(self):
        self.norm = getattr(self.args, "norm", "l2")
        self.task = functools.cache(self.task)  # compiled once

    def task(self, num_envs: int) -> tuple[object, Callable]:
        """Environment, and its step."""
        env = self.build(num_envs)
        return env, torch.compile(env.step, fullgraph=True) if self.compile else env.step


def load(run_dir: Path, device: torch.device, asked: Args) -> Victim:
    """Raises SystemExit, with one line, for what is no run of these scripts."""
    path = run_dir / "checkpoint.pt" if run_dir.is_dir() else run_dir
    try:
        name = torch.load(path, map_location="cpu", weights_only=True)["script"]
    except Exception as error:
        sys.exit(f"attack.py: error: {run_dir} is no readable run ({type(error).__name__})")
    if not name.startswith("ernie_"):
        sys.exit(f"attack.py: error: {run_dir} is a run of {name}.py, which has no observations of this kind")
    script, args, state = certify.restore(name, run_dir)
    lights = {}
    if certify.is_traffic(script, args):
        args, lights = script.replace(args, backend="torch"), {"horizon": asked.seconds, "warmup": asked.warmup}
    build, make = certify.makers(script, args, device=device, **lights)
    some = build(args.num_seeds)
    nets, _ = make(some, args, state)
    if name == "ernie_maddpg":
        unit = some.obs_mask[None, :, None] * 1.0

        def output(env, obs):
            return script.policy(nets["actor"], obs, env, args)

        def respond(env, obs):
            return script.to_env(script.squash(output(env, obs), env).transpose(1, 2), env)

        def mad(env, obs, radius, generators):
            return script.attack("mad", nets, obs, radius, generators, env, args)

        return Victim(script, args, build, output, respond, mad, unit, asked.compile)
    if name == "ernie_meanfield":  # there observations are [S, M, N, O], whose last entries, messages, are mute
        unit = (torch.arange(some.obs_mask.shape[1], device=device) < 2 + 4 * some.num_agents)[None, None, None] * 1.0

        def output(env, obs):
            return script.act_on(nets, obs.transpose(1, 2), env, args).transpose(1, 2)

        def respond(env, obs):
            return script.squash_agents(output(env, obs).transpose(1, 2), env).flatten(0, 1)

        def mad(env, obs, radius, generators):
            return script.mad_attack(nets, obs.transpose(1, 2), radius, generators, env, args).transpose(1, 2)

        return Victim(script, args, build, output, respond, mad, unit, asked.compile)
    norm = state["norm"].to(device)
    mean, std = norm[:, :, None].unbind(3)

    def normalize(obs):  # as the script's, but with a gradient where an entry never varied
        return torch.where(std > 0, (obs - mean) / torch.where(std > 0, std, 1), 0).clamp(-10, 10)

    if name == "ernie_mappo":
        unit = script.perturbation_unit(norm, script.replace(args, epsilon_units="raw"))
        attack = script.attack_policies_mad

        def whole(env, obs):
            return script.policies(nets["actor"], normalize(obs), env, args)

        def output(env, obs):  # of normal policies the mean
            return whole(env, obs)[..., : env.action_mask.shape[1]]

        def respond(env, obs):
            return script.to_step(script.choose(whole(env, obs), None, env), env)

    else:
        unit = script.perturbation_unit(norm, args)
        if name == "ernie_coma":
            attack = partial(script.attack_policies, "mad")
        else:

            def attack(nets, x, unit, radius, generators, env, args):
                return script.attack_lights("mad", nets["local"], x, unit, radius, generators, args)

        def output(env, obs):  # logits, or the values of a light's own Q
            if name == "ernie_coma":
                return script.policy(nets["actor"], normalize(obs), env, args)
            return script.forward(nets["local"].layers(), normalize(obs), args.activation)

        def respond(env, obs):
            return output(env, obs).argmax(-1).transpose(1, 2).flatten(0, 1)

    def mad(env, obs, radius, generators):
        x = attack(nets, normalize(obs), unit, radius, generators, env, args)
        return torch.where(std > 0, mean + std * x, obs)

    victim = Victim(script, args, build, output, respond, mad, unit * std, asked.compile)
    if lights:
        victim.measure, victim.scale = "Reward of all lights in a second", some.num_agents / asked.seconds
    return victim


class Adversaries:
    """The environment of the adversaries: agents are the cooperating agents of the victims' task, observations theirs,
    an action [-1, 1]^A becomes a perturbation, the reward of all is minus the team's mean."""

    def __init__(self, victim: Victim, num_envs: int, radius: float, args: Args):
        self.victim, self.radius, self.args, self.num_envs = victim, radius, args, num_envs
        self.task, self.advance = victim.task(num_envs)
        env = self.task
        self.team, self.device, self.dtype = env.cooperators, env.device, env.dtype
        self.num_agents, self.horizon, self.discrete = int(env.cooperators.sum()), env.horizon, False
        self.obs_mask = env.obs_mask[self.team]
        self.action_mask = self.obs_mask if args.space == "observation" else env.action_mask[self.team]
        self.action_high, self.action_low = 1.0 * self.action_mask, -1.0 * self.action_mask
        self.cooperators = torch.ones_like(env.cooperators[self.team])

    def reset(self, generators):
        warmup = (self.advance,) if hasattr(self.task, "warmup") else ()
        state, obs = self.task.reset(generators, *warmup)
        return (state, obs), obs[:, self.team]

    def draw(self, generators):
        return self.task.draw(generators)

    def perturb(self, obs: Tensor, choice: Tensor) -> Tensor:
        """Observations [S, N, M, O] of all agents with those of the team moved as `choice` [S, N, M, A] says."""
        script, unit, norm = self.victim.script, self.victim.unit.to(obs.dtype), self.victim.norm
        live = unit * self.team[:, None, None]
        if self.args.space == "observation":
            delta = script.project(self.radius * choice * (live > 0), self.radius, norm)
            return obs + live * delta

        def objective(delta: Tensor) -> Tensor:
            return (choice * self.victim.output(self.task, obs + live * delta)).sum(-1)

        ball, size = partial(script.project, epsilon=self.radius, norm=norm), 2 * self.radius / self.args.ascent_steps
        delta = script.unroll(objective, torch.zeros_like(obs), self.args.ascent_steps, size, ball, False)
        return obs + live * delta

    def step(self, state, action, noise):
        (state, obs), S = state, self.victim.args.num_seeds
        everybody = torch.zeros(len(obs), self.task.num_agents, action.shape[-1], dtype=obs.dtype, device=obs.device)
        everybody[:, self.team] = action.to(obs.dtype)
        seen, choice = (x.unflatten(0, (S, -1)).transpose(1, 2) for x in (obs, everybody))
        joint = self.victim.respond(self.task, self.perturb(seen, choice))
        state, obs, reward, terminated, truncated, info = self.advance(state, joint, noise)
        paid = -reward[:, self.team].mean(1, keepdim=True).expand(-1, self.num_agents)
        return (state, obs), obs[:, self.team], paid, terminated, truncated, info


@torch.no_grad()
def undisturbed(env: Adversaries, num_seeds: int, generators) -> dict[str, Tensor]:
    """Observations of an episode in which the adversaries change nothing, as in a replay, for their norm."""
    state, obs = env.reset(generators)
    nothing, seen = torch.zeros(len(obs), *env.action_mask.shape, device=env.device), [obs]
    for _ in range(env.horizon):
        state, obs, *_ = env.step(state, nothing, env.draw(generators))
        seen.append(obs)
    return {"obs": torch.stack(seen, 1).unflatten(0, (num_seeds, -1))}


def learn(victim: Victim, radius: float, args: Args) -> Callable:
    """Adversaries of all seeds, trained side by side; (env, obs) -> their choices without noise."""
    options = {"num_seeds": victim.args.num_seeds, "seed": args.seed, "num_envs": args.num_envs, "regularizer": "none"}
    options |= {"learning_rate": args.learning_rate, "init_std": args.init_std, "num_minibatches": 4}
    ppo = ernie_mappo.Args(env_id="simple_spread_v3", cuda=args.cuda, **options)
    env = Adversaries(victim, ppo.num_seeds * ppo.num_envs, radius, args)
    nets, optimizer = ernie_mappo.make_mappo(env, ppo)
    names = ("rollout", "minibatches", "noise")
    streams = {n: ernie_mappo.make_generators(args.seed, ppo.num_seeds, n, env.device) for n in names}
    norm = ernie_mappo.measure_norm(undisturbed(env, ppo.num_seeds, streams["rollout"]), ppo.num_envs)
    value_norm = torch.zeros(3, ppo.num_seeds, 1, env.num_agents, dtype=torch.float64, device=env.device)
    unit = ernie_mappo.perturbation_unit(norm, ppo)
    for k in tqdm(range(args.iterations), desc=f"radius {radius:g}", disable=None):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - k / args.iterations)
        replay = ernie_mappo.play_episodes(env.step, env, nets["actor"], norm, streams["rollout"], ppo)
        batch, value_norm = ernie_mappo.prepare_episodes(nets, replay, norm, value_norm, env, ppo)
        ernie_mappo.update_ppo(nets, optimizer, ernie_mappo.ppo_loss, batch, unit, streams, env, ppo)

    def choices(env, obs):
        z = ernie_mappo.policies(nets["actor"], ernie_mappo.normalize(obs, norm), env, ppo)
        return ernie_mappo.to_step(ernie_mappo.choose(z, None, env), env)

    return choices


@torch.no_grad()
def returns(victim: Victim, attack: str, radius: float, args: Args, choices: Callable | None = None) -> Tensor:
    """Mean return of the cooperating agents [S] under an attack, on the same episodes for all."""
    S = victim.args.num_seeds
    env, total = Adversaries(victim, S * args.eval_episodes, radius, args), 0.0
    streams = ernie_mappo.make_generators(victim.args.seed, S, "learned attack", env.device)
    extra = ernie_mappo.make_generators(victim.args.seed, S, "attack's own", env.device)
    state, obs = env.reset(streams)
    for _ in range(env.horizon):
        if choices is not None:
            action = choices(env, obs.unflatten(0, (S, -1)).transpose(1, 2))
            state, obs, reward, *_ = env.step(state, action, env.draw(streams))
            total = total - reward[:, 0]
            continue
        world, everything = state
        seen = everything.unflatten(0, (S, -1)).transpose(1, 2)
        live = victim.unit.to(seen.dtype) * env.team[:, None, None]
        if attack == "gaussian":  # of mean squared length radius^2
            share = (live > 0).sum(-1, keepdim=True).clamp_min(1)
            noise = ernie_mappo.draw(torch.randn, seen.shape[1:], extra)
            seen = seen + live * noise * radius / share.sqrt()
        elif attack == "mad":
            seen = victim.mad(env.task, seen, radius, extra)
        world, everything, reward, *_ = env.advance(world, victim.respond(env.task, seen), env.draw(streams))
        state, total = (world, everything), total + reward[:, env.team].mean(1)
    return total.unflatten(0, (S, -1)).mean(1) * victim.scale


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    victim = load(args.run_dir, device, args)
    points = [("clean", 0.0)] + [(attack, radius) for attack in args.attack for radius in args.radius]
    rows, seed = [], victim.args.seed
    print(f"{victim.measure}, {args.run_dir}: mean and 95% interval over seeds")
    for attack, radius in points:
        choices = learn(victim, radius, args) if attack == "learned" else None
        values = returns(victim, attack, radius, args, choices).double().cpu().numpy()
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else np.nan
        print(f"  {attack:10s}{radius:6g}: {values.mean():8.2f} ± {half:.2f}", flush=True)
        rows += [
            {"seed": seed + k, "perturbation": attack, "strength": radius, "return": v} for k, v in enumerate(values)
        ]
    folder = args.run_dir if args.run_dir.is_dir() else args.run_dir.parent
    with open(folder / "learned_attack.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["env_id", "regularizer", "space", *rows[0]])
        writer.writeheader()
        about = {"env_id": victim.args.env_id, "regularizer": victim.args.regularizer, "space": args.space}
        writer.writerows(about | row for row in rows)


if __name__ == "__main__":
    main()
