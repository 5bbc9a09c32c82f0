"""How fast this repository is beside its peers: one process, one thread, interleaved repeats.

    pip install -r benchmarks/requirements.txt          # the peers; one that is missing is left out
    python benchmarks/speed.py                          # all of what follows but cleanmarl: half an hour
    python benchmarks/speed.py env                      # simple_spread_v3 with 3 and 15 agents: about ten minutes
    python benchmarks/speed.py env --num-agents 3 --num-envs 8192 --peers vmas
    python benchmarks/speed.py env --device cuda --num-agents 3 --num-envs 1024 32768 1000000
    python benchmarks/speed.py train                    # ernie_maddpg.py, every regulariser: about five minutes
    python benchmarks/speed.py games                    # ermas_bimatrix.py, games and training: half a minute
    pip install -r requirements-sumo.txt                # SUMO, or it is left out
    python benchmarks/speed.py traffic                  # traffic_grid_v0, IDM and Krauss: about a minute
    python benchmarks/speed.py traffic --grid 2 4 6 --capacity 48 96    # ten minutes
    python benchmarks/speed.py coma                     # ernie_coma.py, in SUMO too where it is installed: two minutes
    python benchmarks/speed.py mappo                    # ernie_mappo.py on simple_spread_v3: half a minute
    python benchmarks/speed.py meanfield                # ernie_meanfield.py with 3 to 100 agents: five minutes
    python benchmarks/speed.py drones                   # leader_follower_v0 and hover_v0: half a minute
    python benchmarks/speed.py economy --original ORIGINAL/bin/python    # economy_v0: two minutes; ORIGINAL: see below
    python benchmarks/speed.py taxes                    # ermas_economy.py, both phases: three minutes
    git clone https://github.com/AmineAndam04/cleanmarl && git -C cleanmarl checkout 7fe3358
    python benchmarks/speed.py cleanmarl --checkout cleanmarl --repeats 3    # CleanMARL's scripts: ten minutes

A repeat times every contestant once, for `--seconds` or longer; each repeat starts with another one, and ratios are
taken within a repeat. Shown are the median and the quartiles over repeats. On a CPU the process is pinned to one core
and the clock is its CPU time, so that a busy machine disturbs little; on a GPU it is wall-clock time between
synchronisations. On Linux the C library keeps freed memory, for everybody, as in the scripts: otherwise each tensor
above 32 MB (the observations at N=15, B=8192) comes page by page from the kernel, which can take as long as the
simulation. --no-keep-memory shows the difference.

`env` counts environment steps (all N agents of one environment move once) of simple_spread_v3 with discrete actions.
Everybody plays episodes of 25 steps: a reset to fresh random positions, which is included, then 25 steps with actions
drawn beforehand, each of which gives the new state, the full observation and the reward of every agent.

    eager, compiled  envs.particle: a call of `env.step`, or of torch.compile(env.step, fullgraph=True), per step
    mpe2             the original in Python, parallel API; it has no batch: one environment is timed beside every B
    vmas             make_env("simple_spread"), a call per step; its observation lacks the 2(N-1) zeros of the original
    jaxmarl          MPE_simple_spread_v3 at its best: the episode is one jitted lax.scan over `step_env`, five steps
                     unrolled, without the reset that its `step` adds to every step; only the last observation is kept

`train` counts seconds for 50 episodes (1,250 environment steps) of one seed of simple_spread_v3, N=3: rollout,
sampling and one update of batch 1,024 per 100 steps (the default was that once; it is 128 per 25), on a warm replay
buffer.

`games` counts games of 16 steps in the augmented bimatrix game: `play` of ermas_bimatrix.py for 80 runs of 64 games at
once, and the same game in numpy, one step of one game at a time, with the same tables and policies. `training` is a
whole iteration of ERMAS (11 batches for each run, deviations, gradients), counted in games.

`traffic` counts car updates (cars in the network, summed over the seconds simulated) under fixed-time lights, in cycles
of 60 s from second 200 on, when the streets have filled. Ratios are of car updates.

    eager, compiled  envs.traffic: random numbers, controller, lights, cars, observations and rewards of B environments
    libsumo          SUMO alone, one simulation of the same scenario: simulationStep, and the lights when they change;
                     without its search for collisions, and nothing is read but the number of cars every tenth second

`coma` counts environment steps per second of ernie_coma.py's training loop, rollout, update and all, on 2x2 lights: in
the batched simulator, and the same loop on one SUMO process. Seconds are the clock's on the wall, since SUMO's process
has a CPU time of its own.

`mappo` counts environment steps of ernie_mappo.py's iterations on simple_spread_v3, N=3, discrete actions, as --compile
has them: rollout of 80 episodes at once, values and advantages, four epochs of four minibatches, as in JaxMARL's IPPO
(16 environments, 128 steps, 64 units), whose rate is a recorded one, as are those of JaxMARL's recurrent MAPPO and of
BenchMARL's.

`meanfield` times what grows with N in ernie_meanfield.py, minibatches of 64, of which 16 are regularised: the networks
(actor and critic, forwards and backwards, own states given), the update without and with the regulariser, and with
--compile too, which compiles IPOT and, on a GPU, the losses; and the resident memory that a process has needed at most.

`drones` counts environment steps (two quadcopters fly 1/48 s, 1/30 s in hover, in substeps of 1/240 s) in episodes of
242 steps, reset included, with actions drawn beforehand.

    eager, compiled  envs.drones: new state, observation and reward
    package          gym-pybullet-drones, Physics.PYB: MultiHoverAviary of its main branch, or LeaderFollowerAviary of
                     v1.0.0, whichever is installed; one environment beside every B
    crazyflow        the bare simulation (first principles, rotor speeds in) of two drones in each of B worlds, ten
                     substeps of 1/500 s, without observation, reward or end

`economy` counts environment steps of the four-agent game with actions drawn beforehand (half of them moves, a fifth
builds, a quarter orders) and random tax rates, random numbers included.

    eager, compiled  envs.economy: new state, observations of all agents, rewards and masks
    dynamics         the same compiled, without observations and masks
    ai-economist     the original in Python with all its observations and masks; one environment beside every B. It
                     needs numpy below 1.24, so it runs in a Python of its own, whose CPU time counts:
                     python3.11 -m venv ORIGINAL
                     ORIGINAL/bin/pip install numpy==1.23.5 scipy==1.10.1 'pandas<2.1' 'contourpy<1.2' matplotlib
                     ORIGINAL/bin/pip install pyyaml lz4 tqdm GPUtil pycryptodome
                     ORIGINAL/bin/pip install --no-deps ai-economist==1.7.1
    econojax         always a recorded figure: jitted step, observations and masks, four agents, B = 1024; a simpler
                     game (no space, houses or water)

`taxes` counts environment steps of economy_tiny_v0 in which nobody deviates, in iterations of ermas_economy.py with the
step compiled: the environment alone, the episodes (networks included), and whole iterations of phase one and two.

`cleanmarl` counts environment steps of whole runs on simple_spread_v3, N=3, discrete actions, per CPU second beyond
those of a shorter run, so that starting does not count: processes of their own, in turn, on a CPU. Networks have two
layers of 64 units, shared but in our COMA. MADDPG updates once per 25 steps on 125 (ours: 128) transitions, ours after
40 episodes 40 times; MAPPO makes three steps and COMA one on three episodes, or on 64: 21 times fewer updates.
CleanMARL plays one mpe2 environment, without logs and tests; its variants in JAX and with several environments are not
measured.

A peer that is not installed stands there with the figure recorded earlier, on two shared cores of another machine: its
ratios compare machines too.
"""

import itertools
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # read when torch and jax are imported
os.environ["SCIPY_ARRAY_API"] = "1"  # crazyflow insists
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pydantic
import torch
import tyro
from matplotlib.figure import Figure
from pydantic import Field, PositiveFloat, PositiveInt

import envs
import ermas_bimatrix
import ermas_economy
import ernie_coma
import ernie_maddpg as script
import ernie_mappo
import ernie_meanfield
from envs import runs, sumo
from envs.traffic import Traffic, fixed_time

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
Sizes = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
T = 25  # steps of an episode
ENDS = ("", "_lower_quartile", "_upper_quartile")

# Contestants of `env`: (N, B, device) -> a function that plays an episode of T steps in B environments


def ours(N: int, B: int, device: str, compile: bool) -> Callable[[], None]:
    env = envs.make("simple_spread_v3", num_envs=B, device=device, num_agents=N, continuous_actions=False)
    generators = [torch.Generator(device).manual_seed(0)]
    actions = torch.randint(5, (T, B, N), device=device)
    step = torch.compile(env.step, fullgraph=True, dynamic=False) if compile else env.step

    def episode() -> None:
        state, obs = env.reset(generators)
        for action in actions:
            state, obs, reward, terminated, truncated, info = step(state, action, env.draw(generators))

    return episode


def player(reset: Callable, step: Callable, actions: list) -> Callable[[], None]:
    def episode() -> None:
        reset()
        for action in actions:
            step(action)

    return episode


def mpe2(N: int, B: int, device: str) -> Callable[[], None]:
    from mpe2 import simple_spread_v3

    env = simple_spread_v3.parallel_env(N=N, max_cycles=T)
    env.reset(seed=0)
    return player(env.reset, env.step, [{a: int(np.random.randint(5)) for a in env.agents} for _ in range(T)])


def vmas(N: int, B: int, device: str) -> Callable[[], None]:
    from vmas import make_env

    env = make_env("simple_spread", num_envs=B, device=device, continuous_actions=False, n_agents=N, seed=0)
    actions = torch.randint(9, (T, N, B, 1), device=device)  # three choices on each axis
    return player(env.reset, env.step, [list(action) for action in actions])


def jaxmarl(N: int, B: int, device: str) -> Callable[[], None]:
    import jax
    from jaxmarl import make

    if jax.default_backend() != ("cpu" if device == "cpu" else "gpu"):
        raise ImportError(f"jax runs on {jax.default_backend()}")
    env = make("MPE_simple_spread_v3", num_agents=N, num_landmarks=N)
    actions = {a: jax.random.randint(jax.random.key(i), (T, B), 0, 5) for i, a in enumerate(env.agents)}

    def step(carry, action):
        keys, state, *_ = carry
        obs, state, reward, _, _ = jax.vmap(env.step_env)(keys, state, action)
        return (keys, state, obs, reward), None

    @jax.jit
    def play(key, actions):
        keys = jax.random.split(key, B)
        obs, state = jax.vmap(env.reset)(keys)
        start = (keys, state, obs, {a: jax.numpy.zeros(B) for a in env.agents})
        return jax.lax.scan(step, start, actions, unroll=5)[0]

    return lambda: jax.block_until_ready(play(jax.random.key(np.random.randint(2**31)), actions))


OURS = {"eager": partial(ours, compile=False), "compiled": partial(ours, compile=True)}
PEERS = {"mpe2": mpe2, "vmas": vmas, "jaxmarl": jaxmarl}


@runs.arguments
class Timing:
    device: str = "cpu"
    """cpu: everything per CPU-second; cuda: per second"""
    repeats: PositiveInt = 7
    """interleaved repeats"""
    seconds: PositiveFloat = 0.3
    """shortest time of one measurement"""
    keep_memory: bool = True
    """let the C library keep freed memory (Linux)"""

    def __post_init__(self):
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise ValueError(f"device must be one that torch has here, got {self.device} ({error})") from None


def prepare(timing: Timing) -> Callable[[], float]:
    """One thread on one core; returns the clock."""
    torch.set_num_threads(1)
    if timing.keep_memory:
        runs.keep_memory()
    else:
        os.environ["MALLOC_TRIM_THRESHOLD_"] = "131072"  # glibc's own: scripts leave it
    if timing.device != "cpu":
        return lambda: (torch.cuda.synchronize(), time.perf_counter())[1]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return time.process_time


def interleave(jobs: dict[str, Callable[[], None]], timing: Timing, clock: Callable) -> dict[str, np.ndarray]:
    """Seconds of one call of each job, [repeats], after it has been called twice."""

    def timed(job: Callable[[], None], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            job()
        return (clock() - start) / calls

    names, calls, times = list(jobs), {}, {name: [] for name in jobs}
    for name, job in jobs.items():
        job()  # compiles
        calls[name] = math.ceil(timing.seconds / max(timed(job, 1), 1e-6))
    for r in range(timing.repeats):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            times[name].append(timed(jobs[name], calls[name]))
    return {name: np.array(values) for name, values in times.items()}


def quartiles(name: str, values: np.ndarray) -> dict[str, float]:
    return dict(zip((name + end for end in ENDS), np.quantile(values, (0.5, 0.25, 0.75)).tolist()))


def text(row: dict, name: str) -> str:
    """12.3k (11.8k-12.5k)"""

    def short(x: float) -> str:
        return f"{x / 1e6:.3g}M" if x >= 999_500 else f"{x / 1e3:.3g}k" if x >= 999.5 else f"{x:.3g}"

    middle, lower, upper = (short(row[name + end]) for end in ENDS)
    return f"{middle:>8} {f'({lower}-{upper})':17}"


def compare(rates: dict[str, np.ndarray], ways, common: dict, title: str = "") -> list[dict]:
    """A line and a row of each contestant: steps per second, and how many times as fast each of `ways` is."""
    rows, columns = [], ["steps_per_second", *(f"{way}_is_times" for way in ways)]
    print(f"\n{title:31}{'env steps/s (quartiles)':27}" + "".join(f"{f'{way} is times':27}" for way in ways))
    for name, rate in rates.items():
        row = common | {"name": name, "repeats": len(rate)} | quartiles("steps_per_second", rate)
        for way in ways:
            row |= quartiles(f"{way}_is_times", rates[way] / rate)
        print(f"{name:30}", *(text(row, column) for column in columns))
        rows.append(row)
    return rows


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_rows(path, rows)


def bench_env(
    timing: Timing,
    num_agents: Sizes = (3, 15),
    num_envs: Sizes = (1, 32, 1024, 8192),
    peers: tuple[Literal["mpe2", "vmas", "jaxmarl"], ...] = ("mpe2", "vmas", "jaxmarl"),
    out: Path = RESULTS / "speed_env.csv",
) -> None:
    """Steps per second of N `num_agents` in B `num_envs`, beside `peers`; the plot goes beside `out`."""
    clock, rows, wanted = prepare(timing), [], OURS | {name: PEERS[name] for name in peers}
    unit = "environment steps per " + ("CPU-second" if timing.device == "cpu" else "second")
    for N, B in itertools.product(num_agents, num_envs):
        torch.compiler.reset()  # torch refuses to compile one function for many sizes
        jobs = {}
        for name, build in list(wanted.items()):
            try:
                jobs[name] = build(N, B, timing.device)
            except ImportError as error:
                print(f"{name} left out ({error}): pip install -r benchmarks/requirements.txt")
                del wanted[name]
        times = interleave(jobs, timing, clock)
        rates = {name: (1 if name == "mpe2" else B) * T / values for name, values in times.items()}
        print(f"\nN={N} B={B:<8} {'steps/s (quartiles)':26}" + "".join(f"{f'{c} is times':27}" for c in OURS))
        for name, rate in rates.items():
            row = {"device": timing.device, "num_agents": N, "num_envs": B, "name": name, "repeats": len(rate)}
            row |= quartiles("steps_per_second", rate)
            for c in OURS:
                row |= quartiles(f"{c}_is_times", rates[c] / rate)
            print(f"{name:14}", *(text(row, k) for k in ("steps_per_second", *(f"{c}_is_times" for c in OURS))))
            rows.append(row)
    write_csv(out, rows)
    plot_env(rows, unit, out.with_suffix(".png"))


def plot_env(rows: list[dict], unit: str, path: Path) -> None:
    panels = sorted({row["num_agents"] for row in rows})
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, N in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name in dict.fromkeys(row["name"] for row in rows):
            mine = [row for row in rows if (row["num_agents"], row["name"]) == (N, name)]
            x, (y, low, high) = [r["num_envs"] for r in mine], ([r["steps_per_second" + e] for r in mine] for e in ENDS)
            (line,) = axes.plot(x, y, "--" if name == "mpe2" else ".-", label=name)
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel="B, environments that step together", title=f"{N} agents")
    figure.axes[0].set_ylabel(unit)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def training(replay: dict, num_seeds: int, device: torch.device, **options) -> Callable[[], None]:
    """One turn of ernie_maddpg.py's loop: an episode of each of its environments, then the updates that are due."""
    args = script.Args(num_seeds=num_seeds, steps_per_update=100, batch_size=1024, **options)
    env = script.make_env(args, num_seeds * args.num_envs, device)
    nets, optimizers = script.make_nets(env, args)
    losses = {"critic": script.critic_loss, "actor": script.actor_loss}
    streams = envs.make_generators(args.seed, num_seeds, "speed", device)
    num_episodes = args.buffer_size // env.horizon // args.num_envs * args.num_envs

    def play() -> script.Batch:
        return script.rollout(env.step, env, nets["actor"], script.draw_rollout(env, 0.3, streams))

    if not replay:  # shared by all variants; the first fills it
        replay |= script.make_replay(play(), num_episodes)
        for first in range(0, num_episodes, args.num_envs):
            episodes = play()
            for name, values in episodes.items():
                replay[name][:, first : first + args.num_envs] = values

    def turn() -> None:
        episodes = play()
        for name, values in episodes.items():
            replay[name][:, : args.num_envs] = values
        for _ in range(args.num_envs * env.horizon // args.steps_per_update):
            batch = script.sample(replay, num_episodes, args, streams) | script.draw_noise(streams, env, args)
            script.update(nets, optimizers, losses, batch, env, args)

    return turn


def bench_train(
    timing: Timing,
    num_seeds: Sizes = (1, 5),
    continuous_actions: bool = True,
    out: Path = RESULTS / "speed_train.csv",
) -> None:
    """Seconds for 50 episodes of one of `num_seeds` that train side by side."""
    clock, rows, default = prepare(timing), [], script.Args()
    common = {"continuous_actions": continuous_actions, "cuda": timing.device != "cpu"}
    variants = {"none": {"regularizer": "none"}, "m3ddpg": {"regularizer": "none", "minimax_epsilon": 1e-3}}
    for samples in (default.reg_batch_size, default.batch_size):
        for mode, K in itertools.product(("gaussian", "random", "adversarial", "stackelberg"), (1, 3)):
            if K == 1 or mode in ("adversarial", "stackelberg"):
                name = mode + f" K={K}" * (mode in ("adversarial", "stackelberg")) + f", {samples} samples"
                variants[name] = {"regularizer": mode, "attack_steps": K, "reg_batch_size": samples}
    for S in num_seeds:
        replay, device = {}, script.setup(script.Args(**common))
        jobs = {name: training(replay, S, device, **common, **options) for name, options in variants.items()}
        times = interleave(jobs, timing, clock)
        print(f"\n{f'seeds: {S}':31} {'s/50 episodes/seed':26} times `none`")
        for name, values in times.items():
            row = {"device": timing.device, "num_seeds": S, "continuous_actions": continuous_actions, "name": name}
            row |= {"repeats": len(values)} | quartiles("seconds", 50 / default.num_envs / S * values)
            row |= quartiles("times_none", values / times["none"])
            print(f"{name:31}", text(row, "seconds"), text(row, "times_none"))
            rows.append(row)
    write_csv(out, rows)


def bench_games(timing: Timing, num_runs: PositiveInt = 80, out: Path = RESULTS / "speed_games.csv") -> None:
    """Games per second of `num_runs` runs at once beside one game at a time in numpy."""
    clock, S = prepare(timing), num_runs
    args = ermas_bimatrix.Args(num_seeds=S, method=("ermas",), cuda=timing.device != "cpu")
    device = ermas_bimatrix.setup(args)
    env, T = ermas_bimatrix.make_env(args, 1, device), args.horizon
    task = ermas_bimatrix.make_task(env, args)
    nets = {name: ermas_bimatrix.make_policies(task, name, 1, name) for name in ermas_bimatrix.PLAYERS}
    learner = ermas_bimatrix.make_learner(task, nets)
    ermas_bimatrix.anneal(learner.optimizers, 0.0, args)
    streams = envs.make_generators(1, S, "speed", device)
    policies = ermas_bimatrix.joint_policy(task, nets)

    def batched() -> None:
        ermas_bimatrix.play(env, policies, ermas_bimatrix.draw_noise(streams, env, args))

    def training() -> None:
        noises = [ermas_bimatrix.draw_noise(streams, env, args) for _ in range(1 + args.inner_steps)]
        ermas_bimatrix.update(task, learner, noises, deviating=True)
        ermas_bimatrix.plan(task, learner, noises[0])

    rng, transition, rewards = np.random.default_rng(0), env.transition.cpu().numpy(), env.rewards.cpu().numpy()
    bounds = [p[0].cumsum(-1)[:, :-1].cpu().numpy() for p in policies]
    starts = env.start_probs.nonzero()[:, 0].cpu().numpy()

    def one_game() -> None:
        x, total = starts[rng.integers(len(starts))], np.zeros(3)
        for _ in range(T):
            x = transition[x, *((u >= b[x]).sum() for u, b in zip(rng.random(3), bounds))]
            total += rewards[x]

    count = {"batched": S * args.num_envs, "numpy": 1, "training": S * args.num_envs * (2 + 3 * args.inner_steps)}
    times = interleave({"batched": batched, "numpy": one_game, "training": training}, timing, clock)
    rows = []
    print(f"\n{'':12}{'games/s (quartiles)':28}times numpy")
    for name, seconds in times.items():
        row = {"device": timing.device, "num_runs": S, "name": name, "repeats": len(seconds)}
        row |= quartiles("games_per_second", count[name] / seconds)
        row |= quartiles("numpy_is_times", count[name] * times["numpy"] / seconds)
        print(f"{name:12}{text(row, 'games_per_second')} {text(row, 'numpy_is_times')}")
        rows.append(row)
    write_csv(out, rows)


# Contestants of `traffic`: a scenario, a folder for files -> a function that plays so many seconds and returns the mean
# number of cars in a network and how often a car has found its street full

FLOW = {2: 700.0, 4: 550.0, 6: 385.0}  # cars per hour at each entry, by rows and columns of the grid
FILL, GREEN, CYCLE = 200, 27, 60  # s; GREEN and 3 s of yellow for each direction
LIGHTS = {0: "Gr", GREEN: "yr", CYCLE // 2: "rG", CYCLE // 2 + GREEN: "ry"}  # from that second of a cycle on: NS, EW


def batch(env: Traffic, folder: Path, compile: bool) -> Callable[[int], tuple[float, int]]:
    step = torch.compile(env.step, fullgraph=True, dynamic=False) if compile else env.step
    generators = [torch.Generator(env.device).manual_seed(0)]
    state, _ = env.reset(generators)

    def play(seconds: int) -> tuple[float, int]:
        nonlocal state
        cars = 0
        for _ in range(seconds):
            state, *_, info = step(state, fixed_time(env, state, GREEN), env.draw(generators))
            cars = cars + info["vehicles"]
        return cars.sum().item() / env.num_envs / seconds, state.overflow.sum().item()

    return play


def bare_sumo(env: Traffic, folder: Path) -> Callable[[int], tuple[float, int]]:
    sumo.require_sumo()
    import libsumo

    network, routes = sumo.write_network(env, folder), folder / "routes.xml"
    sumo.write_routes(env, 0, routes)
    if libsumo.simulation.isLoaded():  # the scenario before
        libsumo.close()
    command = ["sumo", "-n", str(network), "-r", str(routes), "--time-to-teleport", "-1", "--collision.action", "none"]
    libsumo.start([*command, "--no-warnings", "true", "--no-step-log", "true"])
    libsumo.simulationStep()  # the standing cars enter
    t, links, control = 0, {}, libsumo.trafficlight
    for light in control.getIDList():  # 0: north-south, 1: east-west, of each letter of its signal string
        streets = [int(lane.split("_")[0]) for ((lane, *_),) in control.getControlledLinks(light)]
        links[light] = env.axis[streets].tolist()

    def play(seconds: int) -> tuple[float, int]:
        nonlocal t
        cars, end = 0, t + seconds
        while t < end:
            if t % CYCLE in LIGHTS:
                for light, axes in links.items():
                    control.setRedYellowGreenState(light, "".join(LIGHTS[t % CYCLE][axis] for axis in axes))
            libsumo.simulationStep()
            cars += 0 if t % 10 else 10 * libsumo.vehicle.getIDCount()
            t += 1
        return cars / seconds, 0

    return play


STREETS = {"eager": partial(batch, compile=False), "compiled": partial(batch, compile=True)}


def bench_traffic(
    timing: Timing,
    grid: tuple[Literal[2, 4, 6], ...] = (2,),
    model: tuple[Literal["idm", "krauss"], ...] = ("idm", "krauss"),
    num_envs: Sizes = (256,),
    capacity: Sizes = (96,),
    out: Path = RESULTS / "speed_traffic.csv",
) -> None:
    """Car updates per second on `grid` x `grid` lights, cars following `model`, in B `num_envs` with `capacity` places
    per street, beside one simulation in SUMO."""
    clock, rows, wanted = prepare(timing), [], STREETS | {"libsumo": bare_sumo}
    for G, following, B, N in itertools.product(grid, model, num_envs, capacity):
        torch.compiler.reset()
        scenario = {"rows": G, "cols": G, "flow": FLOW[G], "model": following, "capacity": N}
        env = envs.make("traffic_grid_v0", num_envs=B, device=timing.device, **scenario)
        jobs, seen = {}, {name: [] for name in wanted}
        with tempfile.TemporaryDirectory() as folder:
            for name, build in list(wanted.items()):
                try:
                    play = build(env, Path(folder))
                except ImportError as error:
                    print(f"{name} left out ({error})")
                    del wanted[name]
                    continue
                play(FILL)
                jobs[name] = lambda name=name, play=play: seen[name].append(play(CYCLE))
            times = interleave(jobs, timing, clock)
        cars = {name: np.array(seen[name])[2:, 0].reshape(timing.repeats, -1).mean(1) for name in jobs}
        steps = {name: (1 if name == "libsumo" else B) * CYCLE / values for name, values in times.items()}
        columns = ("car updates/s", "steps/s", "ns/street", *(f"{c} is times" for c in STREETS))
        print(f"\n{f'{G}x{G} {following} B={B} N={N}':27}cars overflow " + "".join(f"{c:27}" for c in columns))
        for name in jobs:
            row = {"device": timing.device, "grid": G, "flow": FLOW[G], "model": following, "num_envs": B}
            row |= {"capacity": N, "name": name, "repeats": timing.repeats}
            row |= {"cars": cars[name].mean(), "overflow": seen[name][-1][1]}
            values = [cars[name] * steps[name], steps[name], 1e9 / steps[name] / env.num_streets]
            values += [cars[c] * steps[c] / values[0] for c in STREETS]
            names = [column.replace("/", "_per_").replace(" ", "_") for column in columns]
            for column, value in zip(names, values):
                row |= quartiles(column, value)
            print(f"{name:24}{row['cars']:7.1f} {row['overflow']:8}", *(text(row, column) for column in names))
            rows.append(row)
        write_csv(out, rows)


# --------------------------------------------------------------------------------------------------------------------
# coma: the training loop of ernie_coma.py


def coma_loop(timing: Timing, num_envs: int, regularizer: str, backend: str = "torch") -> Callable[[], None]:
    """A rollout and its update."""
    args = ernie_coma.Args(num_envs=num_envs, regularizer=regularizer, evaluate="none", backend=backend)
    device = torch.device(timing.device)
    env = ernie_coma.make_env(args, num_envs, device, horizon=10**6)
    step = torch.compile(env.step, fullgraph=True, dynamic=False) if backend == "torch" else env.step
    nets, optimizers = ernie_coma.make_nets(env, args)
    nets["normalizer"].flat[:, :, 1] = 1  # observations stay as they are
    losses = {"critic": ernie_coma.critic_loss, "actor": ernie_coma.actor_loss}
    schedule = {"exploration": args.exploration, "entropy_coef": args.entropy_coef, "policy_steps": 0}
    schedule = {name: torch.tensor(value, device=device) for name, value in schedule.items()}
    streams = {name: envs.make_generators(args.seed, 1, name, device) for name in ("rollout", "noise")}
    now = env.reset(streams["rollout"])

    def turn() -> None:
        nonlocal now
        draws = ernie_coma.draw_rollout(env, streams["rollout"], args)
        now, episodes, _ = ernie_coma.rollout(step, env, nets, now, draws, schedule)
        batch = ernie_coma.prepare(nets, episodes, 0, env, args) | ernie_coma.draw_noise(streams["noise"], env, args)
        ernie_coma.update(nets, optimizers, losses, batch, env, args)

    return turn


def bench_coma(timing: Timing, num_envs: Sizes = (1, 32, 320), out: Path = RESULTS / "speed_coma.csv") -> None:
    """Environment steps per second of the training loop with B `num_envs`, beside one SUMO process."""
    prepare(timing)
    jobs, sizes, rows = {}, {}, []
    for B, mode in itertools.product(num_envs, ("none", "stackelberg")):
        jobs[f"{mode}, B={B}"], sizes[f"{mode}, B={B}"] = coma_loop(timing, B, mode), B
    try:
        sumo.require_sumo()
        for mode in ("none", "stackelberg"):
            jobs[f"{mode}, SUMO"], sizes[f"{mode}, SUMO"] = coma_loop(timing, 1, mode, "sumo"), 1
    except ImportError as error:
        print(f"SUMO is not measured ({error})")
    times = interleave(jobs, timing, time.perf_counter)
    steps = ernie_coma.Args().rollout_steps
    rates = {name: sizes[name] * steps / values for name, values in times.items()}
    print(f"\n{'':31}{'env steps/s (quartiles)':27}times SUMO")
    for name, rate in rates.items():
        row = {"device": timing.device, "name": name, "repeats": len(rate)} | quartiles("steps_per_second", rate)
        base = rates.get(f"{name.split(',')[0]}, SUMO")
        row |= quartiles("times_sumo", np.full_like(rate, np.nan) if base is None else rate / base)
        print(f"{name:30}", *(text(row, k) for k in ("steps_per_second", "times_sumo")))
        rows.append(row)
    write_csv(out, rows)


RECORDED_PPO = {
    "JaxMARL IPPO": 32_200.0,
    "JaxMARL MAPPO-RNN": 2_460.0,
    "BenchMARL MAPPO": 355.0,
}  # steps per CPU-second


def mappo_loop(timing: Timing, regularizer: str, share_parameters: bool) -> Callable[[], None]:
    """An iteration: episodes and their update."""
    options = {"regularizer": regularizer, "share_parameters": share_parameters, "num_envs": 80, "reg_batch_size": 128}
    options |= {"env_id": "simple_spread_v3", "continuous_actions": False, "update_epochs": 4, "num_minibatches": 4}
    args = ernie_mappo.Args(**options)
    device = torch.device(timing.device)
    env = ernie_mappo.make_env(args, args.num_envs, device)
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    step = compiled(env.step)
    losses = {"critic": ernie_mappo.critic_loss, "actor": ernie_mappo.actor_loss}
    if not args.regularized:
        losses = {name: compiled(loss) for name, loss in losses.items()}
    nets, optimizers = ernie_mappo.make_nets(env, args)
    streams = {name: envs.make_generators(args.seed, 1, name, device) for name in ("rollout", "minibatches", "noise")}
    nets["normalizer"].flat.copy_(envs.perturb.observation_moments(env.step, env, streams["rollout"]))

    def turn() -> None:
        episodes = ernie_mappo.rollout(step, env, nets, args, ernie_mappo.draw_rollout(env, streams["rollout"]))
        samples = ernie_mappo.prepare(nets, episodes, env, args)
        for batch in ernie_mappo.minibatches(samples, streams["minibatches"], args):
            batch |= ernie_mappo.draw_noise(streams["noise"], env, args)
            ernie_mappo.update(nets, optimizers, losses, batch, env, args)

    return turn


def bench_mappo(timing: Timing, out: Path = RESULTS / "speed_mappo.csv") -> None:
    """Environment steps per second of training, beside recorded figures of JaxMARL and BenchMARL."""
    clock = prepare(timing)
    ways = {"none, shared": ("none", True), "none": ("none", False), "stackelberg": ("stackelberg", False)}
    times = interleave({name: mappo_loop(timing, *way) for name, way in ways.items()}, timing, clock)
    rates = {name: 80 * T / values for name, values in times.items()}
    rates |= {f"{name}, recorded": np.full(timing.repeats, rate) for name, rate in RECORDED_PPO.items()}
    write_csv(out, compare(rates, ways, {"device": timing.device}))


def crowds(N: int, device: str) -> dict[str, Callable[[], None]]:
    """What grows with N, by name."""
    device, jobs = torch.device(device), {}
    for name in ("none", "stackelberg", "stackelberg, compiled"):
        mode, _, compiled = name.partition(", ")
        options = {"num_agents": N, "eval_agents": (N,), "batch_size": 64, "reg_batch_size": 16}
        args = ernie_meanfield.Args(regularizer=mode, num_envs=4, compile=bool(compiled), **options)
        env = ernie_meanfield.make_env(args, args.num_envs, device)
        nets, optimizers = ernie_meanfield.make_nets(env, args)
        generators = envs.make_generators(args.seed, 1, "speed", device)
        replay = ernie_meanfield.rollout(env.step, env, nets, args, ernie_meanfield.draw_rollout(env, 0.5, generators))
        _, losses = ernie_meanfield.compiled(env, args)

        def update(nets=nets, optimizers=optimizers, losses=losses, replay=replay, env=env, args=args) -> None:
            batch = ernie_meanfield.sample(replay, args.num_envs, args, generators)
            batch |= ernie_meanfield.draw_noise(generators, env, args)
            ernie_meanfield.update(nets, optimizers, losses, batch, env, args)

        jobs[f"update, {name}"] = update
    batch = ernie_meanfield.sample(replay, args.num_envs, args, generators)
    crowd = ernie_meanfield.crowd_of(batch["own"])

    def networks() -> None:
        output = ernie_meanfield.respond(nets, "actor", batch["own"], crowd, batch["landmarks"])
        mean_action = ernie_meanfield.others_mean(output)
        q = ernie_meanfield.q_values(nets, "critic", batch, crowd, output, mean_action)
        names = [f"{role}_{part}" for role in ("actor", "critic") for part in ernie_meanfield.PARTS]
        torch.autograd.grad(q.sum(), [nets[name].flat for name in names])

    return {"networks": networks} | jobs


def peak_memory(N: int, mode: str) -> float:
    """MiB that two updates with N agents need at most beyond what they find, in a process of their own."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import speed\n"
    code += "lines = lambda: open('/proc/self/status').read().splitlines()\n"  # ru_maxrss has the parent's too
    code += "top = lambda: int(next(line for line in lines() if line.startswith('VmHWM')).split()[1]) / 1024\n"
    code += f"speed.torch.set_num_threads(1); few = speed.crowds(3, 'cpu')['update, {mode}']; few(); few()\n"
    code += f"before = top(); many = speed.crowds({N}, 'cpu')['update, {mode}']; many(); many(); print(top() - before)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def bench_meanfield(
    timing: Timing, num_agents: Sizes = (3, 6, 15, 30, 100), out: Path = RESULTS / "speed_meanfield.csv"
) -> None:
    """Seconds and memory of what grows with N in ernie_meanfield.py, as a table and a plot."""
    clock, rows = prepare(timing), []
    print(f"{'N':>5}  {'':31}{'milliseconds (quartiles)':27}MiB")
    for N in num_agents:
        for name, values in interleave(crowds(N, timing.device), timing, clock).items():
            skip = timing.device != "cpu" or name not in ("update, none", "update, stackelberg")
            memory = math.nan if skip else peak_memory(N, name.split(", ")[1])
            row = {"device": timing.device, "num_agents": N, "name": name, "repeats": len(values)}
            rows.append(row | quartiles("milliseconds", 1000 * values) | {"peak_mib": memory})
            print(f"{N:5}  {name:30}", text(rows[-1], "milliseconds"), f"{memory:6.0f}", flush=True)
    write_csv(out, rows)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        for axis, column in zip(axes, ("milliseconds", "peak_mib")):
            axis.plot(num_agents, [row[column] for row in mine], marker="o", label=name)
    for axis, label in zip(axes, ("milliseconds", "MiB beyond those of N = 3")):
        axis.set(xscale="log", yscale="log", xlabel="number of agents", ylabel=label)
        axis.set_xticks(num_agents, num_agents)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(out.with_suffix(".png"), dpi=110)


# Contestants of `drones`: (task, B, device) -> a function that plays an episode

RECORDED = {  # steps per CPU-second, of gym-pybullet-drones and of crazyflow 0.4.0 at B = 4096 and 10 substeps
    "package": {"leader_follower_v0": 2359.0, "hover_v0": 1979.0},
    "crazyflow": {"leader_follower_v0": 429_800.0, "hover_v0": 429_800.0},
}


def swarm(env_id: str, B: int, device: str, compile: bool) -> Callable[[], None]:
    env = envs.make(env_id, num_envs=B, device=device)
    step = torch.compile(env.step, fullgraph=True, dynamic=False) if compile else env.step
    generators = [torch.Generator(device).manual_seed(0)]
    actions = 2 * torch.rand(env.horizon, B, env.num_agents, env.action_sizes[0], device=device) - 1

    def episode() -> None:
        state, obs = env.reset(generators)
        for action in actions:
            state, obs, reward, terminated, truncated, info = step(state, action, env.draw(generators))

    return episode


def package(env_id: str, B: int, device: str) -> Callable[[], None]:
    actions = np.random.uniform(-1, 1, (242, 2, 1)).astype(np.float32)
    if env_id == "hover_v0":
        from gym_pybullet_drones.envs.MultiHoverAviary import MultiHoverAviary
        from gym_pybullet_drones.utils.enums import ActionType

        env = MultiHoverAviary(act=ActionType.ONE_D_RPM)
        return player(env.reset, env.step, list(actions))
    from gym_pybullet_drones.envs.multi_agent_rl.LeaderFollowerAviary import LeaderFollowerAviary
    from gym_pybullet_drones.envs.single_agent_rl.BaseSingleAgentAviary import ActionType

    env = LeaderFollowerAviary(aggregate_phy_steps=5, act=ActionType.ONE_D_RPM)
    return player(env.reset, env.step, [dict(enumerate(action)) for action in actions])


def crazyflow(env_id: str, B: int, device: str) -> Callable[[], None]:
    import jax
    from crazyflow.control import Control
    from crazyflow.dynamics import Dynamics
    from crazyflow.sim import Sim

    place = "cpu" if device == "cpu" else "gpu"
    model = {"dynamics": Dynamics.first_principles, "control": Control.rotor_vel}
    sim = Sim(n_worlds=B, n_drones=2, device=place, **model)
    speeds = jax.random.uniform(jax.random.key(0), (B, 2, 4), minval=14_000, maxval=15_000)

    def episode() -> None:
        sim.reset()
        for _ in range(242):
            sim.rotor_vel_control(speeds)
            sim.step(10)
        jax.block_until_ready(sim.data.states.pos)

    return episode


SWARMS = {"eager": partial(swarm, compile=False), "compiled": partial(swarm, compile=True)}


def bench_drones(
    timing: Timing,
    env_id: tuple[Literal["leader_follower_v0", "hover_v0"], ...] = ("leader_follower_v0", "hover_v0"),
    num_envs: Sizes = (4096,),
    out: Path = RESULTS / "speed_drones.csv",
) -> None:
    """Environment steps per second of two drones in B `num_envs`, beside one package environment and crazyflow."""
    clock, rows = prepare(timing), []
    for task, B in itertools.product(env_id, num_envs):
        torch.compiler.reset()
        jobs, rates = {}, {}
        for name, build in (SWARMS | {"package": package, "crazyflow": crazyflow}).items():
            try:
                jobs[name] = build(task, B, timing.device)
            except ImportError as error:
                print(f"{name} is not measured ({error})")
                rates[f"{name}, recorded"] = np.full(timing.repeats, RECORDED[name][task])
        times = interleave(jobs, timing, clock)
        rates = {name: (1 if name == "package" else B) * 242 / values for name, values in times.items()} | rates
        print(f"\n{f'{task} B={B}':31}{'steps/s (quartiles)':27}" + "".join(f"{f'{c} is times':27}" for c in SWARMS))
        for name, rate in rates.items():
            row = {"device": timing.device, "env_id": task, "num_envs": B, "name": name, "repeats": len(rate)}
            row |= quartiles("steps_per_second", rate)
            for c in SWARMS:
                row |= quartiles(f"{c}_is_times", rates[c] / rate)
            print(f"{name:30}", *(text(row, k) for k in ("steps_per_second", *(f"{c}_is_times" for c in SWARMS))))
            rows.append(row)
    write_csv(out, rows)


# Contestants of `economy`: (B, device) -> a function that plays PLAYED steps, with a reset after 1,000

PLAYED = 100  # steps of a call
PEERS_OF_ECONOMY = {
    "ai-economist": 967.0,
    "econojax": 20_500.0,
}  # recorded: steps per CPU-second, the latter at B = 1024
ORIGINAL = """
import sys
import numpy as np
from ai_economist import foundation

components = [
    ("Build", dict(skill_dist="pareto", payment_max_skill_multiplier=3)),
    ("ContinuousDoubleAuction", dict(max_num_orders=5)),
    ("Gather", dict(skill_dist="pareto")),
    ("PeriodicBracketTax", dict(period=100, tax_model="model_wrapper", bracket_spacing="us-federal", usd_scaling=1000)),
]
env = foundation.make_env_instance(
    scenario_name="layout_from_file/simple_wood_and_stone",
    env_layout_file="quadrant_25x25_20each_30clump.txt",
    components=components,
    fixed_four_skill_and_loc=True,
    starting_agent_coin=0,
    n_agents=4,
    world_size=[25, 25],
    episode_length=1000,
    multi_action_mode_planner=True,
    planner_gets_spatial_info=False,
    flatten_observations=True,
    flatten_masks=True,
)
t = 0
for line in sys.stdin:
    for action, rates in zip(actions, planner):
        if t % 1000 == 0:
            env.reset()
        t += 1
        env.step({**{str(i): int(a) for i, a in enumerate(action)}, "p": rates})
    print("done", flush=True)
"""


def draw_plays(B: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions [PLAYED, B, 4] and choices of rates [PLAYED, B, 7]."""
    generator = torch.Generator().manual_seed(0)
    kind, which = torch.rand(2, PLAYED, B, 4, generator=generator)
    order, move = 2 + (44 * which).long(), 46 + (4 * which).long()
    actions = torch.where(kind < 0.5, move, torch.where(kind < 0.7, 1, torch.where(kind < 0.95, order, 0)))
    return actions, torch.randint(22, (PLAYED, B, 7), generator=generator)


def markets(B: int, device: str, compile: bool, full: bool = True) -> Callable[[], None]:
    env = envs.make("economy_v0", num_envs=B, device=device)
    step = env.step if full else env.advance
    step = torch.compile(step, fullgraph=True, dynamic=False) if compile else step
    generators = [torch.Generator(env.device).manual_seed(0)]
    actions, planner = (x.to(env.device) for x in draw_plays(B))
    state, t = None, 0

    def play() -> None:
        nonlocal state, t
        for action, rates in zip(actions, planner):
            if t % env.horizon == 0:
                state, _ = env.reset(generators)
            result, t = step(state, action, env.draw(generators), rates), t + 1
            state = result[0] if full else result

    return play


def original_economy(python: Path) -> tuple[Callable[[], None], subprocess.Popen]:
    """It runs in another process, which plays PLAYED steps for every line that it reads."""
    actions, planner = (x[:, 0].tolist() for x in draw_plays(1))
    code = f"actions, planner = {actions}, {planner}\n{ORIGINAL}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    worker = subprocess.Popen([python, "-W", "ignore", "-c", code], **pipes)

    def play() -> None:
        worker.stdin.write("\n")
        worker.stdin.flush()
        while (line := worker.stdout.readline()) != "done\n":
            if not line:
                raise RuntimeError(f"ai-economist does not run in {python}")

    return play, worker


MARKETS = {
    "eager": partial(markets, compile=False),
    "compiled": partial(markets, compile=True),
    "dynamics": partial(markets, compile=True, full=False),
}


def bench_economy(
    timing: Timing,
    num_envs: Sizes = (1024,),
    original: Path | None = None,
    out: Path = RESULTS / "speed_economy.csv",
) -> None:
    """Environment steps per second of B `num_envs`, beside ai-economist in the Python interpreter `original`."""
    clock, rows, worker = prepare(timing), [], None
    both = clock
    if original is not None:
        play_original, worker = original_economy(original)
        cpu_clock = (~worker.pid << 3) | 2  # Linux's number for the CPU time of that process
        if timing.device == "cpu":

            def both() -> float:
                return clock() + time.clock_gettime(cpu_clock)

    for B in num_envs:
        torch.compiler.reset()
        jobs = {name: build(B, timing.device) for name, build in MARKETS.items()}
        jobs |= {} if worker is None else {"ai-economist": play_original}
        times = interleave(jobs, timing, both)
        rates = {name: (1 if name == "ai-economist" else B) * PLAYED / values for name, values in times.items()}
        for name, rate in PEERS_OF_ECONOMY.items():
            rates |= {} if name in rates else {f"{name}, recorded": np.full(timing.repeats, rate)}
        rows += compare(rates, MARKETS, {"device": timing.device, "num_envs": B}, f"B={B}")
        write_csv(out, rows)
    if worker is not None:
        worker.stdin.close()


def taxes(timing: Timing, num_seeds: int) -> dict[str, Callable[[], None]]:
    """What an iteration of ermas_economy.py consists of, by name."""
    device, jobs = torch.device(timing.device), {}
    for name, phase, stage, method in (
        ("phase one", "one", "selfish", "marl"),
        ("phase two, marl", "two", "full", "marl"),
        ("phase two, ermas", "two", "full", "ermas"),
    ):
        args = ermas_economy.Args(num_seeds=num_seeds, method=method, compile=True)
        env = ermas_economy.make_env(args, num_seeds, phase, device)
        learner = ermas_economy.make_learner(env, ermas_economy.make_streams(args, device), args)
        task = ermas_economy.make_task(env, args, num_seeds)
        ermas_economy.anneal(learner, phase, 0.5, args)
        jobs[name] = partial(ermas_economy.update, task, learner, stage)
    streams = learner.streams["games"]
    actions = torch.randint(env.action_sizes[0], (num_seeds * args.num_envs, env.num_agents), device=device)

    def environment() -> None:
        for _ in range(1 + args.inner_steps):
            state, _ = env.reset(streams)
            for _ in range(env.horizon):
                state, *_ = task.step(state, actions, env.draw(streams))

    def episodes() -> None:
        for _ in range(1 + args.inner_steps):
            ermas_economy.rollout(task, learner, "full")

    return {"environment": environment, "episodes": episodes} | jobs


def bench_taxes(timing: Timing, num_seeds: PositiveInt = 3, out: Path = RESULTS / "speed_taxes.csv") -> None:
    """Environment steps per second of training with `num_seeds` seeds, and what takes the time."""
    clock, args = prepare(timing), ermas_economy.Args()
    times = interleave(taxes(timing, num_seeds), timing, clock)
    steps = num_seeds * (1 + args.inner_steps) * args.num_envs * 100
    rates = {name: steps / values for name, values in times.items()}
    rates["ai-economist alone (economy_v0), recorded"] = np.full(timing.repeats, PEERS_OF_ECONOMY["ai-economist"])
    write_csv(out, compare(rates, ("environment", "episodes"), {"device": timing.device, "num_seeds": num_seeds}))


THEIRS = "--env-type pz --env-name simple_spread_v3 --actor-hidden-dim 64 --critic-hidden-dim 64"
THEIRS += " --eval-steps 1000000 --log-every 1000000"
QUIET = "--no-cuda --regularizer none --eval-episodes 0 --wandb-mode disabled --hidden-size 64"
QUIET += " --log-interval 1000000 --checkpoint-interval 1000000"
COMA = f"ernie_coma.py {QUIET} --env-id simple_spread_v3 --rollout-steps 25 --critic-updates 1"
MAPPO = f"ernie_mappo.py {QUIET} --env-id simple_spread_v3 --no-continuous-actions --share-parameters"
MAPPO += " --update-epochs 3 --num-minibatches 1"
MATCHED = {  # commands, and the steps of their shorter runs
    "MADDPG": {
        "cleanmarl": (f"maddpg.py {THEIRS} --batch-size 5", 1_000),
        "ours": (f"ernie_maddpg.py {QUIET} --no-continuous-actions", 10_000),
    },
    "MAPPO": {
        "cleanmarl": (f"mappo.py {THEIRS} --batch-size 3", 3_000),
        "ours": (f"{MAPPO} --num-envs 3", 15_000),
        "ours, 64 episodes an update": (f"{MAPPO} --num-envs 64", 64_000),
    },
    "COMA": {
        "cleanmarl": (f"coma.py {THEIRS} --batch-size 3", 3_000),
        "ours": (f"{COMA} --num-envs 3", 15_000),
        "ours, 64 episodes an update": (f"{COMA} --num-envs 64", 64_000),
    },
}
CLEANMARL = """# runs a script of theirs without StarCraft, foraging and TensorBoard
import runpy, sys, types
from importlib import import_module
sys.argv = sys.argv[1:]
nothing = lambda *values, **named: None
writer = types.SimpleNamespace(add_text=nothing, add_scalar=nothing, close=nothing)
missing = {"env.smaclite_wrapper": ("SMACliteWrapper", None), "env.lbf": ("LBFWrapper", None)}
missing["torch.utils.tensorboard"] = "SummaryWriter", lambda folder: writer
for module, (name, value) in missing.items():
    sys.modules[module] = types.ModuleType(module)
    setattr(sys.modules[module], name, value)
sys.modules["pettingzoo.mpe"] = import_module("mpe2")
sys.modules["pettingzoo.mpe.simple_spread_v3"] = import_module("mpe2.simple_spread_v3")
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def cpu_seconds(command: list[str], folder: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if said.returncode:
        raise OSError(f"{command[-1]}: {said.stderr.strip().splitlines()[-1]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bench_cleanmarl(timing: Timing, checkout: Path | None = None, out: Path = RESULTS / "speed_cleanmarl.csv") -> None:
    """Environment steps of training per CPU second, beside the scripts of a `checkout` of CleanMARL."""
    if checkout is None:
        print("CleanMARL is left out: --checkout is missing")
        return
    rows = []
    prepare(timing)  # the processes that are started inherit the core
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="2000000000")  # for everybody
    with tempfile.TemporaryDirectory() as folder:
        for algorithm, contestants in MATCHED.items():
            rates = {name: np.zeros(timing.repeats) for name in contestants}
            for repeat, (name, (line, steps)) in itertools.product(range(timing.repeats), contestants.items()):
                script, *flags = line.split()
                if name == "cleanmarl":
                    command, place = [sys.executable, "-c", CLEANMARL, script], checkout / "cleanmarl"
                else:
                    command, place = [sys.executable, script, f"--runs-dir={folder}"], ROOT
                command += flags
                short, long = (cpu_seconds([*command, f"--total-timesteps={n}"], place) for n in (steps, 4 * steps))
                rates[name][repeat] = 3 * steps / (long - short)
            print(f"\n{algorithm:32}{'env steps/s (quartiles)':27}times cleanmarl")
            for name, rate in rates.items():
                row = {"algorithm": algorithm, "name": name, "repeats": timing.repeats}
                row |= quartiles("steps_per_second", rate) | quartiles("times_cleanmarl", rate / rates["cleanmarl"])
                print(f"{name:31}", text(row, "steps_per_second"), text(row, "times_cleanmarl"), flush=True)
                rows.append(row)
    write_csv(out, rows)


COMMANDS = {
    "env": bench_env,
    "train": bench_train,
    "games": bench_games,
    "traffic": bench_traffic,
    "coma": bench_coma,
    "mappo": bench_mappo,
    "meanfield": bench_meanfield,
    "drones": bench_drones,
    "economy": bench_economy,
    "taxes": bench_taxes,
    "cleanmarl": bench_cleanmarl,
}

if __name__ == "__main__":
    if len(sys.argv) == 1:  # all of them, each in a process of its own
        failed = [name for name in COMMANDS if subprocess.run([sys.executable, __file__, name]).returncode]
        sys.exit(f"speed.py: these failed: {', '.join(failed)}" if failed else 0)
    commands = {name: pydantic.validate_call(function) for name, function in COMMANDS.items()}
    with runs.quiet_pipe(), runs.exits(2, pydantic.ValidationError), runs.exits(1, OSError):
        tyro.extras.subcommand_cli_from_dict(commands, config=(tyro.conf.OmitArgPrefixes,))
