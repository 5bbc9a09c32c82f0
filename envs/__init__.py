"""Batched multi-agent environments: `envs.make(env_id, num_envs)` describes one; `reset` and `step` are functions."""

import importlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import pydantic
import torch
from PIL import Image
from torch import Tensor

from envs import runs

# Before its first product, so that MKL rounds alike wherever a matrix lies in memory, as a seed's do beside others
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


class Env(Protocol):
    """What a script may rely on. Axes: B environments, N agents, O observation entries, A action entries; agents with
    fewer entries are padded with zeros."""

    env_id: str
    num_envs: int  # B
    device: torch.device
    dtype: torch.dtype
    agents: list[str]
    num_agents: int  # N
    cooperators: Tensor  # [N] bool, the team that is trained to be robust and reported
    obs_sizes: tuple[int, ...]
    obs_mask: Tensor  # [N, O] bool, False in padding and where an entry is always 0
    action_sizes: tuple[int, ...]
    action_mask: Tensor  # [N, A] bool
    discrete: bool
    action_low: float
    action_high: float
    horizon: int  # steps of an episode, the same for all

    def reset(self, generators: list[torch.Generator]) -> tuple[Any, Tensor]: ...  # state, obs [B, N, O]

    def draw(self, generators: list[torch.Generator]) -> Tensor | None: ...  # a step's random numbers

    def step(self, state: Any, action: Tensor, noise: Tensor | None) -> tuple: ...

    # action [B, N, A], or [B, N] int64 if discrete -> state, obs, reward [B, N], terminated [B], truncated [B], info

    def global_state(self, state: Any) -> Tensor: ...  # [B, G]

    def render(self, state: Any, index: int) -> np.ndarray: ...  # RGB picture of one environment


class Description:
    """What dataclasses that describe environments have in common; most are frozen."""

    def _set(self, **values):
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _block(self, sample: Callable, generators: list[torch.Generator], *shape: int) -> Tensor:
        """[*shape, B] whose k-th block of environments is drawn by generator k."""
        size = self.num_envs // len(generators)
        parts = [sample(*shape, size, generator=g, device=g.device, dtype=self.dtype) for g in generators]
        return torch.cat(parts, -1).to(self.device)


def as_json(text: str):
    """What JSON makes of it, or the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


OWN_FLAGS = {"env_id", "num_envs", "device", "dtype", "num_agents", "continuous_actions", "horizon", "cooperators"}


def task_options(args) -> dict:
    """Fields for `make` from the command line: --env-kwargs, JSON or name=value, --horizon, --cooperators and, of
    wrapped environments, how many processes they use and whether they must be drawn. Raise ValueError for what is
    neither."""
    options = {}
    for text in args.env_kwargs:
        name, equals, value = text.partition("=")
        try:
            if text.startswith("{"):
                options |= json.loads(text)
            elif not name or not equals:
                raise ValueError("no name or no value")
            else:
                options[name] = as_json(value)
        except ValueError as error:
            raise ValueError(f"--env-kwargs must be JSON or name=value, got {text}: {error}") from None
    if args.env_id.startswith("zoo:"):
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        options = {"keywords": options, "num_workers": args.num_workers or max(1, cores)}
        options["render_mode"] = "rgb_array" if args.capture_video else None
    elif taken := OWN_FLAGS & options.keys():
        raise ValueError(f"--env-kwargs must not have {', '.join(sorted(taken))}: there is a flag for it")
    elif wrong := [name for name, value in options.items() if isinstance(value, list | dict)]:
        raise ValueError(f"--env-kwargs {wrong[0]} must be a number or a name, got {options[wrong[0]]}")
    if args.horizon:
        options["horizon"] = args.horizon
    if args.cooperators:
        options["cooperators"] = args.cooperators
    return options


def for_training(env: Env, args) -> Env:
    """Of a wrapped environment the one whose episodes follow one another. If the run is too short for a whole one in
    each of --num-envs, they are cut, and a line says so."""
    if not hasattr(env, "for_training"):
        return env
    longest = math.ceil(args.total_timesteps / args.num_envs)
    if env.horizon > longest:
        print(f"episodes are cut after {longest} of {env.horizon} steps: --total-timesteps has no more for each copy")
        args.horizon = longest
    return env.for_training(min(env.horizon, longest))


def for_tests(env: Env, num_episodes: int) -> Env:
    """The environment in which `robustness.evaluate` plays so many episodes: with as many copies, or, of a wrapped one,
    in turns on those that there are."""
    return env.for_tests(num_episodes) if hasattr(env, "for_tests") else replace(env, num_envs=num_episodes)


def tasks(*modules: str) -> pydantic.AfterValidator:
    """Of the type of --env-id: a task of these modules of `envs`, or one of PettingZoo's."""

    def check(env_id: str) -> str:
        names = [name for module in modules for name in importlib.import_module(f"envs.{module}").TASKS]
        if env_id not in names and not env_id.startswith("zoo:"):
            raise ValueError(f"must be one of {', '.join(names)} or zoo:package.module")
        return env_id

    return pydantic.AfterValidator(check)


class NoPicture(Exception):
    """An environment that cannot be drawn here."""


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_agents: int | None = None,
    continuous_actions: bool = True,
    **fields,
) -> Env:
    """Build the environment `env_id`; `fields` set its physical constants by name (for example damping=0.5).

    The bimatrix games, traffic and the economy are discrete, the drones continuous whatever `continuous_actions` says;
    elsewhere it chooses.

    `zoo:package.module` wraps the `parallel_env` of that module, `zoo:namespace/Name-v0` one of PettingZoo's registry;
    there `fields` go to its constructor, except those that `envs.zoo.make` names.
    """
    tasks = []
    for name in ("particle", "bimatrix", "traffic", "drones", "economy"):
        module = importlib.import_module(f"envs.{name}")
        if env_id in module.TASKS:
            try:
                return module.make(env_id, num_envs, device, dtype, num_agents, continuous_actions, **fields)
            except TypeError as error:  # of a field
                raise ValueError(f"fields of {env_id}: {error}, got {fields}") from error
        tasks += module.TASKS
    if env_id.startswith("zoo:"):
        zoo = importlib.import_module("envs.zoo")  # only here: PettingZoo is needed for nothing else
        return zoo.make(env_id, num_envs, device, dtype, num_agents, continuous_actions, **fields)
    raise ValueError(f"env_id must be one of {', '.join(tasks)} or zoo:package.module, got {env_id!r}")


# ---------------------------------------------------------------- random numbers of each seed


def make_generators(seed: int, num_seeds: int, purpose: str, device: str | torch.device) -> list[torch.Generator]:
    """A random stream per seed and purpose, so that no seed depends on how many others are beside it: what every
    `reset` and `draw` takes."""
    generators = []
    for k in range(num_seeds):
        sequence = np.random.SeedSequence([seed + k, 0, *purpose.encode()])
        state = int(sequence.generate_state(1, np.uint64)[0] >> 1)
        generators.append(torch.Generator(device).manual_seed(state))
    return generators


def per_seed(sampler: Callable, shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """torch.rand, torch.randn or gumbel of `shape` from each seed's generator: [S, *shape]."""
    return torch.stack([sampler(shape, generator=g, device=g.device) for g in generators])


def gumbel(shape: tuple[int, ...], **where) -> Tensor:
    """Standard Gumbel noise, a sampler like torch.randn: the argmax of logits plus it is a sample of their softmax."""
    return -torch.log(-torch.log(torch.rand(shape, **where).clamp(1e-10, 1 - 1e-7)))


@dataclass
class Moments:
    """Of samples of the latest iterations. `flat` [S, H, 3], float64: decaying sums of mean, mean square and weight, of
    which the last makes up for the start at 0."""

    flat: Tensor

    def update(self, x: Tensor, decay: float, live: Tensor | None = None) -> None:
        """Take in x [S, H, M, T], of where `live` is 1."""
        x = x.flatten(2).double()
        weight = torch.ones_like(x) if live is None else live.flatten(2).double()
        newest = torch.stack([x, x.square(), torch.ones_like(x)], 2) * weight.unsqueeze(2)  # [S, H, 3, M * T]
        self.flat.lerp_(newest.mean(3), 1 - decay)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """[S, H, 1, 1] each, the standard deviation at least 0.01."""
        mean, square, weight = self.flat[..., None, None].unbind(2)
        weight = weight.clamp_min(1e-8)
        mean = mean / weight
        variance = square / weight - mean.square()
        return mean.float(), variance.clamp_min(1e-4).sqrt().float()

    def mean_and_error(self, decay: float) -> tuple[Tensor, Tensor]:
        """Of samples [S, H, 1, 1] that came one at a time with this decay: their mean and its standard error, [S, H]
        each. Of weights w, (sum w)^2 / sum w^2 samples with equal weights are worth as much."""
        mean, square, weight = self.flat.unbind(2)
        mean = mean / weight
        variance = square / weight - mean.square()
        samples = (1 + decay) / (1 - decay) * weight / (2 - weight)
        return mean.float(), (variance.clamp_min(0) / (samples - 1).clamp_min(1e-6)).sqrt().float()


# ---------------------------------------------------------------- between environments and networks


def by_agent(x: Tensor, num_seeds: int) -> Tensor:
    """What an environment gives, [S * B, N, X] -> as networks take it, [S, N, B, X]."""
    return x.unflatten(0, (num_seeds, -1)).transpose(1, 2)


def for_env(action: Tensor, env: Env) -> Tensor:
    """Actions [S, N, B, A], one-hot if discrete, as env.step takes them: [S * B, N, A], or numbers [S * B, N]."""
    action = action.transpose(1, 2).flatten(0, 1)
    return action.argmax(-1) if env.discrete else action


def legal_actions(obs: Tensor, env: Env) -> Tensor:
    """Which actions there are at obs [..., N, M, O]: [..., N, M, A] bool. Wrapped environments have their action masks
    in the last entries of observations, so that whoever has the one has the other."""
    exists = env.action_mask[:, None].expand(*obs.shape[:-1], -1)
    if not getattr(env, "masked", False):
        return exists
    return exists & (obs[..., -exists.shape[-1] :] > 0.5)


def live_mean(x: Tensor, live: Tensor | None) -> Tensor:
    """Mean over samples [S, N, M] -> [S, N]; of agents that had not ended if `live` [S, N, M or more] says who: each
    agent counts the same, however few of its samples do."""
    if live is None:
        return x.mean(2)
    live = live[:, :, : x.shape[2]]
    return (x * live).sum(2) / live.sum(2).clamp_min(1)


def std_mean(x: Tensor, dims: int | tuple, live: Tensor | None) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean over `dims`, which stay with size 1; of where `live` is 1, if given."""
    if live is None:
        return torch.std_mean(x, dims, correction=0, keepdim=True)
    count = live.sum(dims, keepdim=True).clamp_min(1)
    mean = (x * live).sum(dims, keepdim=True) / count
    variance = ((x - mean).square() * live).sum(dims, keepdim=True) / count
    return variance.sqrt(), mean


def team_mean(x: Tensor, env: Env) -> Tensor:
    """Mean over cooperating agents, [..., N] -> [...]. By a mask: an index of booleans waits for the device."""
    weight = env.cooperators.to(x.dtype)
    return (x * weight).sum(-1) / weight.sum()


def are_alike(env: Env) -> bool:
    """Are all agents of one team, and do they see and do as much?"""
    return bool(env.cooperators.all()) and len(set(zip(env.obs_sizes, env.action_sizes))) == 1


def episodic_return(returns: Tensor, env: Env) -> Tensor:
    """[S] mean over environments and cooperating agents of the returns [S, B, N] of a rollout, or of the episodes that
    a wrapped environment has finished in it."""
    if hasattr(env, "episodic_returns"):
        returns = env.episodic_returns().view(returns.shape)
    return team_mean(returns.mean(1), env)


@torch.no_grad()
def write_gif(env: Env, act: Callable, generators: list[torch.Generator], path) -> None:
    """An episode of the first environment under `act`, obs [S, N, B, O] -> action [S, N, B, A]. An environment may name
    `frame_steps` between two pictures, `frame_ms` of each, and how many past states its pictures show, `trail`. Where
    it cannot be drawn, a line says why."""
    frame_steps = getattr(env, "frame_steps", 1)
    past = deque(maxlen=getattr(env, "trail", 0))
    state, obs = env.reset(generators)
    frames = []
    for t in range(env.horizon):
        if t % frame_steps == 0:
            try:
                frames.append(env.render(state, 0, past) if past else env.render(state, 0))
            except NoPicture as error:
                print(f"no {path}: {error}")
                return
        past.append(state)
        action = act(by_agent(obs, len(generators)))
        state, obs, _, terminated, truncated, _ = env.step(state, for_env(action, env), env.draw(generators))
        if bool((terminated | truncated)[0]):
            break
    save_gif(path, frames, getattr(env, "frame_ms", 100))


def save_gif(path, frames: list[np.ndarray], duration: int = 100) -> None:
    """RGB pictures of `duration` milliseconds each, over and over."""
    first, *others = map(Image.fromarray, frames)
    with runs.written(path, "wb") as file:
        first.save(file, "GIF", save_all=True, append_images=others, duration=duration, loop=0)


@cache
def can_compile(what: str, flag: str) -> bool:
    """Is there a C++ compiler? What that means for the run is printed, once."""
    from torch._inductor import cpp_builder, exc  # slow to import

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        print(f"no C++ compiler: {what} runs several times slower")
        return False
    print(f"{what} is compiled, which takes up to a minute the first time (--no-{flag}: not)")
    return True


def new_figure(width: float, height: float):
    """An empty matplotlib figure, in inches."""
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height), layout="constrained")


# ---------------------------------------------------------------- speed


def graphed(body: Callable, device: torch.device, optimizers: dict[str, torch.optim.Optimizer] = {}) -> Callable:
    """`body`, an update or a rollout, on a GPU with all its kernels in one launch. The first three calls run it, which
    creates what is created once; the fourth captures it in a CUDA graph. From then on no line of it runs: its kernels
    do, on the same memory with the same Python numbers. So what changes from call to call must be a tensor of its
    arguments, of the same shape and on the device, in containers or dataclasses (one on the host may be passed on, not
    used); step sizes of `optimizers`, fused Adams, may change as well. All calls are without deterministic algorithms.
    """
    return captured(body, device, optimizers) if device.type == "cuda" else body


def captured(body: Callable, device: torch.device, optimizers: dict[str, torch.optim.Optimizer] = {}) -> Callable:
    """What `graphed` returns on a GPU."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    inputs, outputs, step_sizes = (), None, []
    calls = 0

    def run(groups: list[dict]) -> None:
        nonlocal outputs
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        own_step_sizes = [group["lr"] for group in groups]
        for group, step_size in zip(groups, step_sizes):
            group.update(lr=step_size, capturable=calls == 4)  # which Adam asks for in a capture and warns of elsewhere
        # The deterministic scatter_add copies strides from the host (ATen, _scatter_via_index_put), which no capture
        # allows. The other is as good where each sum has one term, as in the gradient of a permutation.
        torch.use_deterministic_algorithms(False)
        outputs = body(*inputs)
        torch.use_deterministic_algorithms(is_deterministic)
        for group, step_size in zip(groups, own_step_sizes):
            group.update(lr=step_size, capturable=False)  # so that checkpoints are those of a run without graphs

    def call(*arguments):
        nonlocal calls, inputs
        calls += 1
        groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
        if calls == 1:
            inputs = runs.map_tensors(torch.clone, arguments)
            step_sizes.extend(torch.zeros((), dtype=torch.float32, device=device) for _ in groups)
        for value, new in zip(runs.tensors_in(inputs), runs.tensors_in(arguments), strict=True):
            if (value.shape, value.dtype) != (new.shape, new.dtype):  # which copy_ may let pass
                raise ValueError(f"a CUDA graph of {value.dtype} {[*value.shape]} got {new.dtype} {[*new.shape]}")
            value.copy_(new)
        for group, step_size in zip(groups, step_sizes):
            step_size.fill_(group["lr"])
        if calls < 4:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                run(groups)
            torch.cuda.current_stream(device).wait_stream(stream)
        elif calls == 4:
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
                run(groups)  # is not carried out
        if calls >= 4:
            graph.replay()
        return runs.map_tensors(torch.clone, outputs)

    return call


def measure(step: Callable, env: Env, actions: list[Tensor], seconds: float) -> float:
    """Environment steps per second with `actions` by turns, resets included."""
    generator = torch.Generator().manual_seed(0)
    state, _ = env.reset([generator])
    for action in actions:  # warm up and compile
        state, *_ = step(state, action, None)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        state, _ = env.reset([generator])
        for t in range(env.horizon):
            state, _, reward, *_ = step(state, actions[t % len(actions)], None)
        reward.sum().item()  # wait for the device
        steps += env.horizon * env.num_envs
    return steps / (time.perf_counter() - start)


def print_speed(env: Env, actions: list[Tensor], seconds: float, compile: bool) -> None:
    """What `measure` finds, of the step as it is and compiled."""
    print(f"eager    {measure(env.step, env, actions, seconds):12,.0f} env steps/s", flush=True)
    if compile:
        step = torch.compile(env.step, fullgraph=True)
        print(f"compiled {measure(step, env, actions, seconds):12,.0f} env steps/s")
