"""PettingZoo in both directions: our environments as parallel environments, and any of those as one of ours.

    parallel = to_parallel_env(envs.make("simple_tag_v3", num_envs=1))
    env = from_parallel_env(lambda: simple_spread_v3.parallel_env(continuous_actions=True), num_envs=8)
    env = envs.make("zoo:mpe2.simple_spread_v3", num_envs=8, N=6)

Axes: B environments, N agents, O observation entries, A action entries.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv
from torch import Tensor

# ---------------------------------------------------------------- ours -> PettingZoo


class TorchParallelEnv(ParallelEnv):
    """One environment behind PettingZoo's parallel interface: no padding, numpy arrays, seeds in `reset`."""

    def __init__(self, env):
        if env.num_envs != 1:
            raise ValueError(f"num_envs must be 1 for a PettingZoo environment, got {env.num_envs}")
        self.env, self.render_mode, self.max_cycles = env, "rgb_array", env.horizon
        self.metadata = {"name": env.env_id, "render_modes": ["rgb_array"], "is_parallelizable": True, "render_fps": 10}
        self.possible_agents, self.agents = list(env.agents), []
        self.observation_spaces, self.action_spaces = {}, {}
        for agent, obs_size, action_size in zip(env.agents, env.obs_sizes, env.action_sizes):
            self.observation_spaces[agent] = spaces.Box(-np.inf, np.inf, (obs_size,), np.float32)
            box = spaces.Box(env.action_low, env.action_high, (action_size,), np.float32)
            self.action_spaces[agent] = spaces.Discrete(action_size) if env.discrete else box
        self.generator = torch.Generator()
        self.generator.seed()

    def observation_space(self, agent: str) -> spaces.Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        return self.action_spaces[agent]

    def _unpad(self, obs: Tensor) -> dict[str, np.ndarray]:
        rows = obs[0].to("cpu", torch.float32).numpy()
        return {
            agent: rows[i, :size].copy() for i, (agent, size) in enumerate(zip(self.env.agents, self.env.obs_sizes))
        }

    def reset(self, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.generator.manual_seed(seed)
        self.batch_state, obs = self.env.reset([self.generator])
        self.agents = list(self.possible_agents)
        return self._unpad(obs), {agent: {} for agent in self.agents}

    def step(self, actions: dict):
        env, width = self.env, max(self.env.action_sizes)
        if not self.agents:
            raise ValueError("the episode is over: call reset()")
        padded = np.zeros((1, env.num_agents) if env.discrete else (1, env.num_agents, width))
        for i, agent in enumerate(env.agents):
            if env.discrete:
                padded[0, i] = actions[agent]
            else:
                padded[0, i, : env.action_sizes[i]] = actions[agent]
        action = torch.as_tensor(padded, dtype=torch.int64 if env.discrete else env.dtype, device=env.device)
        result = env.step(self.batch_state, action, env.draw([self.generator]))
        self.batch_state, obs, reward, terminated, truncated, _ = result
        ended, cut = bool(terminated[0]), bool(truncated[0])
        everyone = self.agents
        self.agents = [] if ended or cut else everyone
        return (
            self._unpad(obs),
            {agent: float(reward[0, i]) for i, agent in enumerate(env.agents)},
            dict.fromkeys(everyone, ended),
            dict.fromkeys(everyone, cut),
            {agent: {} for agent in everyone},
        )

    @functools.cached_property
    def state_space(self) -> spaces.Box:
        state, _ = self.env.reset([torch.Generator().manual_seed(0)])
        return spaces.Box(-np.inf, np.inf, (self.env.global_state(state).shape[1],), np.float32)

    def state(self) -> np.ndarray:
        return self.env.global_state(self.batch_state)[0].to("cpu", torch.float32).numpy()

    def render(self) -> np.ndarray:
        return self.env.render(self.batch_state, 0)

    def close(self):
        """Nothing to release."""


def to_parallel_env(env) -> TorchParallelEnv:
    return TorchParallelEnv(env)


# ---------------------------------------------------------------- PettingZoo -> ours


@dataclasses.dataclass(frozen=True)
class Handle:
    """The state of wrapped environments lives inside them; this only says which moment is meant."""

    episode: int
    t: int


@dataclasses.dataclass(eq=False)
class ZooEnv:
    """num_envs copies of a PettingZoo parallel environment, stepped one after the other. Unlike our own environments it
    has a memory: `step` takes the newest state only."""

    constructor: Callable[[], ParallelEnv]
    num_envs: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    horizon: int | None = None  # None: the environment's max_cycles
    team: Sequence[str] | None = None  # cooperating agents; None: all
    env_id: str = "zoo"

    def __post_init__(self):
        if self.num_envs < 1:
            raise ValueError(f"num_envs must be 1 or more, got {self.num_envs}")
        self.envs = [self.constructor() for _ in range(self.num_envs)]
        first = self.envs[0]
        self.agents = list(first.possible_agents)
        self.num_agents = len(self.agents)
        self.horizon = self.horizon or getattr(first.unwrapped, "max_cycles", None)
        if self.horizon is None:
            raise ValueError(
                f"{self.env_id} needs an attribute max_cycles, steps of an episode (or give horizon in Python)"
            )
        unknown = set(self.team or ()) - set(self.agents)
        if unknown or (self.team is not None and not self.team):
            raise ValueError(f"cooperators must be some of {', '.join(self.agents)}, got {list(self.team)}")
        self.cooperators = torch.tensor([a in (self.team or self.agents) for a in self.agents], device=self.device)
        self._read_spaces(
            [first.observation_space(a) for a in self.agents], [first.action_space(a) for a in self.agents]
        )
        self.episode = self.t = 0

    def _read_spaces(self, observations: list[spaces.Space], actions: list[spaces.Space]):
        if not all(isinstance(space, spaces.Box) for space in observations):
            raise ValueError(f"{self.env_id}: observations must be Box, got {observations}")
        kinds = {type(space) for space in actions}
        if kinds not in ({spaces.Box}, {spaces.Discrete}):
            raise ValueError(
                f"{self.env_id}: actions must be Box for all agents or Discrete for all agents, got {actions}"
            )
        self.discrete, self.action_spaces = kinds == {spaces.Discrete}, actions
        self.obs_sizes = tuple(int(np.prod(space.shape)) for space in observations)
        sizes = [space.n if self.discrete else np.prod(space.shape) for space in actions]
        self.action_sizes = tuple(int(size) for size in sizes)
        self.obs_mask, self.action_mask = (self._mask(sizes) for sizes in (self.obs_sizes, self.action_sizes))
        self.action_low, self.action_high = 0.0, 1.0
        if self.discrete:
            return
        low, high = (np.concatenate([getattr(space, end).ravel() for space in actions]) for end in ("low", "high"))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError(f"{self.env_id}: the bounds of the actions must be finite, got {actions}")
        if (low == low[0]).all() and (high == high[0]).all():
            self.action_low, self.action_high = float(low[0]), float(high[0])
        else:  # bounds that differ are scaled from a common interval
            self.action_low, self.action_high = -1.0, 1.0

    def _mask(self, sizes: Sequence[int]) -> Tensor:
        """[N, max(sizes)]: True for the first sizes[i] entries of agent i."""
        return torch.arange(max(sizes), device=self.device) < torch.tensor(sizes, device=self.device)[:, None]

    def reset(self, generators: list[torch.Generator]) -> tuple[Handle, Tensor]:
        """Each copy is seeded with a number that the generator of its block draws."""
        if self.num_envs % len(generators):
            raise ValueError(f"num_envs must be a multiple of the {len(generators)} generators, got {self.num_envs}")
        size = (self.num_envs // len(generators),)
        seeds = [torch.randint(2**31 - 1, size, generator=g, device=g.device).tolist() for g in generators]
        flat = [seed for block in seeds for seed in block]
        obs = [env.reset(seed=seed)[0] for env, seed in zip(self.envs, flat)]
        self.ended = np.zeros((self.num_envs, self.num_agents), dtype=bool)  # which agents have terminated
        self.episode, self.t = self.episode + 1, 0
        return Handle(self.episode, 0), self._pad(obs)

    def draw(self, generators: list[torch.Generator]) -> None:
        """The copies draw their own random numbers."""

    def _pad(self, observations: list[dict]) -> Tensor:
        """[B, N, O]; zeros for an agent that has ended."""
        rows = np.zeros((self.num_envs, self.num_agents, max(self.obs_sizes)))
        for row, obs in zip(rows, observations):
            for i, agent in enumerate(self.agents):
                if agent in obs:
                    row[i, : self.obs_sizes[i]] = np.ravel(obs[agent])
        self.obs = torch.as_tensor(rows, dtype=self.dtype, device=self.device)
        return self.obs

    def _native(self, i: int, action: np.ndarray):
        """Agent i's action as its own space has it."""
        space = self.action_spaces[i]
        if self.discrete:
            return space.start + action
        unit = (action[: self.action_sizes[i]] - self.action_low) / (self.action_high - self.action_low)
        value = space.low.ravel() + np.clip(unit, 0, 1) * (space.high - space.low).ravel()
        return np.clip(value.reshape(space.shape).astype(space.dtype), space.low, space.high)

    def step(self, state: Handle, action: Tensor, noise: None = None):
        """action: [B, N, A] (clipped to the bounds) or [B, N] int64. An agent that has ended gets reward 0.

        Returns state, obs [B, N, O], reward [B, N], terminated [B] (all agents have terminated), truncated [B] (over
        for another reason), info {}.
        """
        if state != Handle(self.episode, self.t):
            raise ValueError("a wrapped PettingZoo environment steps only from its newest state")
        actions, observations = action.detach().cpu().numpy(), []
        rewards = np.zeros((self.num_envs, self.num_agents))
        over = np.zeros(self.num_envs, dtype=bool)
        for b, env in enumerate(self.envs):
            obs = {}
            if env.agents:
                moves = {a: self._native(i, actions[b, i]) for i, a in enumerate(self.agents) if a in env.agents}
                obs, gained, terminations, _, _ = env.step(moves)
                rewards[b] = [gained.get(agent, 0.0) for agent in self.agents]
                self.ended[b] |= [bool(terminations.get(agent, False)) for agent in self.agents]
            observations.append(obs)
            over[b] = not env.agents
        self.t += 1
        terminated = self.ended.all(1)
        truncated = ~terminated & (over | (self.t >= self.horizon))
        reward = torch.as_tensor(rewards, dtype=self.dtype, device=self.device)
        flags = (torch.as_tensor(flag, device=self.device) for flag in (terminated, truncated))
        return Handle(self.episode, self.t), self._pad(observations), reward, *flags, {}

    def global_state(self, state: Handle) -> Tensor:
        """[B, G]: the newest observations of all agents side by side, without padding."""
        return self.obs[:, self.obs_mask]

    def render(self, state: Handle, index: int = 0) -> np.ndarray:
        frame = self.envs[index].render()
        if frame is None:
            raise ValueError(f"{self.env_id} was not built with render_mode='rgb_array'")
        return np.asarray(frame)


def from_parallel_env(
    constructor: Callable[[], ParallelEnv],
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    horizon: int | None = None,
    cooperators: Sequence[str] | None = None,
    env_id: str = "zoo",
) -> ZooEnv:
    """num_envs copies of `constructor()` under the batched interface; `cooperators` names the team to make robust."""
    return ZooEnv(constructor, num_envs, torch.device(device), dtype, horizon, cooperators, env_id)


def original(env) -> ZooEnv:
    """The original mpe2 task of one of our particle environments, with as many copies and the same team."""
    build = importlib.import_module(f"mpe2.{env.env_id}").parallel_env
    options = {"N": env.num_agents} if env.env_id == "simple_spread_v3" else {}
    constructor = functools.partial(build, continuous_actions=not env.discrete, max_cycles=env.horizon, **options)
    team = [agent for agent, cooperates in zip(env.agents, env.cooperators.tolist()) if cooperates]
    return from_parallel_env(constructor, env.num_envs, env.device, env.dtype, None, team, env.env_id)


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_agents: int | None = None,
    continuous_actions: bool = True,
    horizon: int | None = None,
    cooperators: Sequence[str] | None = None,
    **options,
) -> ZooEnv:
    """`zoo:package.module`: that module's `parallel_env(**options)`. It is asked for this kind of actions and for
    pictures where it knows the usual keywords; where it does not, `env.discrete` says which kind of actions it has."""
    name = env_id.removeprefix("zoo:")
    try:
        build = importlib.import_module(name).parallel_env
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"env_id {env_id}: no module {name!r} with a parallel_env ({error})") from error
    wishes = {"continuous_actions": continuous_actions, "render_mode": "rgb_array"}
    for keys in (("continuous_actions", "render_mode"), ("render_mode",), ()):
        constructor = functools.partial(build, **{key: wishes[key] for key in keys}, **options)
        try:
            constructor().close()
        except TypeError:
            if not keys:
                raise
            continue
        break
    env = from_parallel_env(constructor, num_envs, device, dtype, horizon, cooperators, env_id)
    if num_agents not in (None, env.num_agents):
        raise ValueError(
            f"num_agents of {env_id} must be {env.num_agents} (or set it in its own keywords), got {num_agents}"
        )
    return env
