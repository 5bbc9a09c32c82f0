"""Copies of a PettingZoo parallel environment, in this process or shared out among worker processes.

    copies = Copies(lambda: multiwalker_v9.parallel_env(), count=8, num_workers=2)
    copies.reset([1, 2, 3, 4])           # the first four of them; their observations lie in copies.arrays.obs[:4]
    copies.arrays.action[:4] = 0.5
    copies.step(autoreset=True)          # copies.arrays.obs, reward, live, terminated, ... [:4]

A copy whose episode is over starts another one in its next step, which plays nothing (Gymnasium's next-step autoreset),
or rests. What an environment does wrong is an EnvironmentFault with the agent's name and the step.

Axes: B copies, N agents, O observation entries, A action entries, W = O, or O + A where the environment has action
masks: then the last A entries of an observation are 1 where an action is legal.
"""

import contextlib
import math
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from multiprocessing.util import Finalize

import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv

LARGEST = float(np.finfo(np.float32).max)
MOST = 10_000  # copies, objects of Python each
SLACK = 0.05  # of a bound's distance from the other, by which an observation may leave its space: some do a little


class EnvironmentFault(OSError, ValueError):
    """An environment raised something, or gave what PettingZoo's interface does not allow."""


@contextlib.contextmanager
def blamed(place: str):
    """What is raised inside is an EnvironmentFault that says where, in one line."""
    try:
        yield
    except EnvironmentFault as error:
        raise EnvironmentFault(f"{place}: {error}") from error
    except Exception as error:
        raise EnvironmentFault(f"{place}: {type(error).__name__}: {error}") from error


# ---------------------------------------------------------------- spaces


def parts_of(space: spaces.Space) -> list[tuple] | None:
    """(key, space) of what a Dict or a Tuple holds."""
    if isinstance(space, spaces.Dict):
        return list(space.spaces.items())
    if isinstance(space, spaces.Tuple):
        return list(enumerate(space.spaces))
    return None


def scale_of(space: spaces.Box) -> float:
    """Bytes are divided by their largest value."""
    return float(max(space.high.max(), 1)) if space.dtype == np.uint8 else 1.0


def limits(space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest values of a flattened observation. Raise ValueError if it cannot be flattened soundly."""
    parts = parts_of(space)
    if parts is not None:
        pairs = [limits(part) for _, part in parts]
        return tuple(np.concatenate(ends) for ends in zip(*pairs))
    if isinstance(space, spaces.Box):
        scale = scale_of(space)
        return space.low.ravel() / scale, space.high.ravel() / scale
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        size = spaces.flatdim(space)
        return np.zeros(size), np.ones(size)
    raise ValueError(f"observations must be Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple, got {space}")


def flatten(space: spaces.Space, x) -> np.ndarray:
    """An observation as numbers in a row. Raise ValueError if it has another shape than its space."""
    parts = parts_of(space)
    if parts is not None:
        return np.concatenate([flatten(part, x[key]) for key, part in parts])
    if not isinstance(space, spaces.Box):
        return spaces.flatten(space, x).ravel()
    array = np.asarray(x)
    if array.shape != space.shape:
        raise ValueError(f"it has the shape {array.shape}, its space {space.shape}")
    return array.ravel() / scale_of(space)


@dataclass
class Agent:
    """How an agent's observations and actions become numbers."""

    name: str
    observation: spaces.Space  # without the action mask
    action: spaces.Space
    is_masked: bool  # the mask stands in a Dict observation

    def split(self, obs, info: dict) -> tuple[np.ndarray, np.ndarray | None]:
        """Flat observation and action mask, None where the environment gives none."""
        mask = obs["action_mask"] if self.is_masked else info.get("action_mask")
        if self.is_masked and not isinstance(self.observation, spaces.Dict):
            obs = obs["observation"]
        return flatten(self.observation, obs), mask

    def native(self, action: np.ndarray, low: float, high: float):
        """An action, scaled to [low, high] where it is continuous, as the agent's own space has it."""
        space = self.action
        if isinstance(space, spaces.Discrete):
            return int(space.start + action)
        unit = (action[: space.low.size] - low) / (high - low)
        value = space.low.ravel() + np.clip(unit, 0, 1) * (space.high - space.low).ravel()
        if np.issubdtype(space.dtype, np.integer):
            value = np.rint(value)
        return np.clip(value.reshape(space.shape).astype(space.dtype), space.low, space.high)


def encode(
    agents: list[Agent], observations: dict, infos: dict, ranges: tuple, out: np.ndarray, over: Sequence[bool]
) -> None:
    """Write observations and action masks into out [N, W], zeros of an agent that is not there. One without a legal
    action, or whose episode is over and who has no mask, has all of them: nothing is chosen there. Raise
    EnvironmentFault for what leaves its space and for a mask that is missing."""
    low, high = ranges  # [N, O] each
    out[:] = 0
    num_own = low.shape[1]
    has_masks = out.shape[1] > num_own
    for i, agent in enumerate(agents):
        mask = None
        if agent.name in observations:
            with blamed(f"observation of {agent.name}"):
                row, mask = agent.split(observations[agent.name], infos.get(agent.name, {}))
                inside = (row >= low[i, : len(row)]) & (row <= high[i, : len(row)]) & (abs(row) < LARGEST)
                outside = ~inside  # nan too
                if outside.any():
                    raise ValueError(f"{row[outside.argmax()]} is outside its space")
                out[i, : len(row)] = row
                if has_masks and mask is None and not over[i]:
                    raise ValueError("it has no action mask, as others have")
        if has_masks:
            count = agent.action.n
            is_empty = mask is None or not np.any(mask)
            out[i, num_own : num_own + count] = 1 if is_empty else np.ravel(mask)
        elif mask is not None and isinstance(agent.action, spaces.Discrete):
            raise EnvironmentFault(f"{agent.name} has an action mask, but nobody had one at the first reset")


def read_agents(env: ParallelEnv) -> list[Agent]:
    """Raise ValueError where spaces are of a kind that is not supported."""
    agents = []
    for name in env.possible_agents:
        observation, action = env.observation_space(name), env.action_space(name)
        is_masked = isinstance(observation, spaces.Dict) and "action_mask" in observation.spaces
        if is_masked:
            others = {key: part for key, part in observation.spaces.items() if key != "action_mask"}
            is_alone = set(others) == {"observation"} and not isinstance(others["observation"], spaces.Dict)
            observation = others["observation"] if is_alone else spaces.Dict(others)
        agents.append(Agent(name, observation, action, is_masked))
    kinds = {type(agent.action) for agent in agents}
    if kinds not in ({spaces.Box}, {spaces.Discrete}):
        actions = [agent.action for agent in agents]
        raise ValueError(f"actions must be Box for all agents or Discrete for all agents, got {actions}")
    return agents


# ---------------------------------------------------------------- a copy


@dataclass
class Arrays:
    """What copies and the process that trains have in common, in shared memory."""

    action: np.ndarray  # [B, N, A], or [B, N] if discrete
    obs: np.ndarray  # [B, N, W]; zeros of an agent that is not there
    reward: np.ndarray  # [B, N]
    live: np.ndarray  # [B, N] bool, agents that had not ended before this step
    terminated: np.ndarray  # [B, N] bool, agents that terminated in this step
    over: np.ndarray  # [B] 0: the episode goes on, 1: all agents have terminated, 2: over for another reason
    total: np.ndarray  # [B, N] return of the episode so far
    finished: np.ndarray  # [B, 1 + N] number of episodes that are over since `reset`, and the sums of their returns


class Copy:
    """One environment and its place in the arrays."""

    def __init__(self, env: ParallelEnv, agents: list[Agent], ranges: tuple, rows: Arrays, label: str):
        self.env, self.agents, self.rows, self.label = env, agents, rows, label
        self.action_range, self.obs_range = ranges
        self.is_active = False
        self.t = 0

    def reset(self, seed: int | None) -> None:
        """Start an episode, and let those that follow depend on its seed; without one the copy rests."""
        self.is_active = seed is not None
        if self.is_active:
            self.seeds = np.random.default_rng(seed)
            self.rows.finished[:] = 0
            self.start(seed)

    def start(self, seed: int) -> None:
        with blamed(f"{self.label}, reset"):
            obs, infos = self.env.reset(seed=seed)
            self.t = 0
            self.ended = np.zeros(len(self.agents), dtype=bool)
            self.died = np.zeros(len(self.agents), dtype=bool)  # terminated, not truncated
            self.rows.over[...] = 0
            self.rows.total[:] = 0
            encode(self.agents, obs, infos, self.obs_range, self.rows.obs, self.ended)

    def step(self, autoreset: bool) -> None:
        rows = self.rows
        rows.reward[:] = 0
        rows.live[:] = False
        rows.terminated[:] = False
        if rows.over:
            if autoreset:
                self.start(int(self.seeds.integers(2**31 - 1)))
            else:
                rows.obs[:] = 0
            return
        with blamed(f"{self.label}, step {self.t}"):
            self.play()

    def play(self) -> None:
        rows, env = self.rows, self.env
        rows.live[:] = ~self.ended
        moves = {}
        for i, agent in enumerate(self.agents):
            if agent.name in env.agents:
                moves[agent.name] = agent.native(rows.action[i], *self.action_range)
        obs, rewards, terminations, truncations, infos = env.step(moves)
        self.t += 1
        for i, agent in enumerate(self.agents):
            name = agent.name
            if name in rewards and rows.live[i]:
                reward = np.asarray(rewards[name], dtype=np.float64)
                if reward.size != 1 or not np.isfinite(reward).all():
                    raise ValueError(f"the reward of {name} must be a number, got {rewards[name]}")
                rows.reward[i] = reward.item()
            if name in terminations or name in truncations:
                died = bool(terminations.get(name, False))
                rows.terminated[i] = died and not self.ended[i]
                self.died[i] = died
                self.ended[i] = died or bool(truncations.get(name, False))
                if self.ended[i] and not died and name not in obs:
                    rows.live[i] = False  # what came next is not known: nothing can be learnt from this step
        if self.ended.all() or not env.agents:
            rows.over[...] = 1 if self.died.all() else 2
        rows.total[:] += rows.reward
        if rows.over:
            rows.finished[0] += 1
            rows.finished[1:] += rows.total
        encode(self.agents, obs, infos, self.obs_range, self.rows.obs, self.ended)


# ---------------------------------------------------------------- all copies


class Copies:
    """`count` copies of `constructor()`; copy b is in worker b % num_workers, of which this process is the first."""

    def __init__(self, constructor: Callable[[], ParallelEnv], count: int, num_workers: int = 1, label: str = "zoo"):
        if not 1 <= count <= MOST:
            raise ValueError(f"num_envs must be 1 or more, {MOST:,} at most of all seeds together, got {count}")
        self.constructor, self.count, self.label = constructor, count, label
        self.now = (0, 0)  # number of resets and steps since then
        with blamed(label):
            first = constructor()
            self.limit = step_limit(first)
            self.agents = read_agents(first)
            ends = [limits(agent.observation) for agent in self.agents]
            _, infos = first.reset(seed=0)
        self.is_discrete = isinstance(self.agents[0].action, spaces.Discrete)
        in_info = any("action_mask" in info for info in (infos or {}).values())
        self.is_masked = self.is_discrete and (in_info or any(agent.is_masked for agent in self.agents))
        self.obs_sizes = tuple(len(low) for low, _ in ends)
        sizes = [agent.action.n if self.is_discrete else math.prod(agent.action.shape) for agent in self.agents]
        self.action_sizes = tuple(int(size) for size in sizes)
        low, high = (self._padded([pair[end] for pair in ends]) for end in (0, 1))
        width = high - low
        slack = 1e-3 + SLACK * np.where(np.isfinite(width), width, 0)
        self.obs_range = (low - slack, high + slack)
        self.action_range = self._read_range()
        self.arrays = self._make_arrays()
        self.connections, self.processes = [], []
        num_workers = min(num_workers, count)
        self.indices = range(0, count, num_workers)  # of the copies in this process
        self.local: list[Copy] = []
        # called by hand, when nobody has a use for the copies, or at the end of the program
        self.close = Finalize(self, close, (self.local, self.connections, self.processes), exitpriority=10)
        self._start_workers(num_workers)
        self.local += self._build([first, *(None for _ in self.indices[1:])], self.indices)
        self._receive()  # that the others are built

    def _padded(self, rows: list[np.ndarray]) -> np.ndarray:
        out = np.zeros((len(rows), max(map(len, rows))))
        for padded, row in zip(out, rows):
            padded[: len(row)] = row
        return out

    def _read_range(self) -> tuple[float, float]:
        """The bounds that all continuous actions share, or those from which they are scaled."""
        if self.is_discrete:
            return 0.0, 1.0
        actions = [agent.action for agent in self.agents]
        low, high = (np.concatenate([getattr(space, end).ravel() for space in actions]) for end in ("low", "high"))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError(f"the bounds of the actions must be finite, got {actions}")
        is_common = (low == low[0]).all() and (high == high[0]).all()
        return (float(low[0]), float(high[0])) if is_common else (-1.0, 1.0)

    def _make_arrays(self) -> Arrays:
        B, N, O, A = self.count, len(self.agents), self.obs_range[0].shape[1], max(self.action_sizes)
        shapes = {
            "action": ((B, N), np.int64) if self.is_discrete else ((B, N, A), np.float64),
            "obs": ((B, N, O + A * self.is_masked), np.float32),
            "reward": ((B, N), np.float64),
            "live": ((B, N), np.bool_),
            "terminated": ((B, N), np.bool_),
            "over": ((B,), np.int8),
            "total": ((B, N), np.float64),
            "finished": ((B, 1 + N), np.float64),
        }
        arrays = {}
        for name, (shape, dtype) in shapes.items():
            memory = multiprocessing.RawArray("b", math.prod(shape) * np.dtype(dtype).itemsize)
            arrays[name] = np.frombuffer(memory, dtype).reshape(shape)
        return Arrays(**arrays)

    def _build(self, envs: Sequence[ParallelEnv | None], indices: Sequence[int]) -> list[Copy]:
        copies = []
        for env, b in zip(envs, indices):
            with blamed(self.label):
                env = env or self.constructor()
            rows = Arrays(**{f.name: getattr(self.arrays, f.name)[b] for f in fields(Arrays)})
            rows.over = self.arrays.over[b : b + 1].reshape(())  # a view, not a number
            copies.append(Copy(env, self.agents, (self.action_range, self.obs_range), rows, self.label))
        return copies

    # ------------------------------------------------------------ workers

    def _start_workers(self, num_workers: int) -> None:
        """Forked, so that any constructor will do, memory is shared and nothing is imported again."""
        context = multiprocessing.get_context("fork")
        for w in range(1, num_workers):
            ours, theirs = context.Pipe()
            indices = range(w, self.count, num_workers)
            process = context.Process(target=self._work, args=(theirs, ours, indices), daemon=True)
            self.connections.append(ours)
            self.processes.append(process)
            process.start()
            theirs.close()

    def _work(self, connection, others, indices: Sequence[int]) -> None:
        """A worker: signals are for the process that trains; when that has ended, so has this one."""
        others.close()
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(kind, signal.SIG_IGN)
        copies = []
        with contextlib.suppress(EOFError, ConnectionError):
            try:
                copies = self._build([None] * len(indices), indices)
                connection.send(None)
            except EnvironmentFault as error:
                connection.send(error)
            while (request := connection.recv()) is not None:
                try:
                    connection.send(answer(copies, indices, *request))
                except EnvironmentFault as error:
                    connection.send(error)

    def _receive(self) -> list:
        replies = []
        for connection in self.connections:
            try:
                replies.append(connection.recv())
            except (EOFError, ConnectionError):
                replies.append(EnvironmentFault(f"{self.label}: a worker process has died"))
        for reply in replies:
            if isinstance(reply, EnvironmentFault):
                raise reply
        return replies

    def _ask(self, command: str, value) -> list:
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError):  # then it does not answer either
                connection.send((command, value))
        try:
            own = answer(self.local, self.indices, command, value)
        finally:
            others = self._receive()
        return [own, *others]

    # ------------------------------------------------------------ what they do

    def reset(self, seeds: Sequence[int]) -> None:
        """Start an episode of as many copies as there are seeds; the others rest."""
        self.now = (self.now[0] + 1, 0)
        self._ask("reset", list(seeds))

    def step(self, autoreset: bool) -> None:
        """A step with `arrays.action` of the copies that do not rest."""
        self.now = (self.now[0], self.now[1] + 1)
        self._ask("step", autoreset)

    def render(self, index: int) -> np.ndarray | None:
        return next((frame for frame in self._ask("render", index) if frame is not None), None)


def step_limit(env: ParallelEnv) -> int | None:
    """Steps of an episode, by the names and in the places that libraries have for them."""
    inner = env.unwrapped
    single = getattr(inner, "single_agent_env", None)  # of MaMuJoCo
    for place in (env, inner, getattr(inner, "env", None), getattr(single, "spec", None)):
        for name in ("max_cycles", "max_steps", "max_episode_steps", "episode_limit"):
            value = getattr(place, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def answer(copies: list[Copy], indices: Sequence[int], command: str, value):
    """What a worker does for the process that trains."""
    for copy, b in zip(copies, indices):
        if command == "reset":
            copy.reset(value[b] if b < len(value) else None)
        elif command == "step" and copy.is_active:
            copy.step(value)
        elif command == "render" and b == value:
            with blamed(f"{copy.label}, render"):
                return copy.env.render()
        elif command == "close":
            with contextlib.suppress(Exception):
                copy.env.close()
    return None


def close(local: list[Copy], connections: list, processes: list) -> None:
    """Close all environments and end the workers."""
    for copy in local:
        with contextlib.suppress(Exception):
            copy.env.close()
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.send(("close", None))
            connection.send(None)
    for process in processes:
        if process.pid is not None:
            process.join(2)
            process.kill()
            process.join()
