"""PettingZoo in both directions: our environments as parallel environments, and any of those as one of ours.

    parallel = to_parallel_env(envs.make("simple_tag_v3", num_envs=1))
    env = from_parallel_env(lambda: simple_spread_v3.parallel_env(continuous_actions=True), num_envs=8)
    env = envs.make("zoo:mpe2.simple_spread_v3", num_envs=8, N=6)
    env = envs.make("zoo:sisl/multiwalker-v9", num_envs=8, num_workers=2)

Axes: B environments, N agents, O observation entries, A action entries.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pettingzoo
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.utils import aec_to_parallel
from torch import Tensor

from envs import NoPicture
from envs.copies import Copies, EnvironmentFault, blamed, encode

PLANNER = "planner"  # of an economy, an agent like the others
LONG = 500  # steps of an episode where the environment does not say how many

# ---------------------------------------------------------------- ours -> PettingZoo


class TorchParallelEnv(ParallelEnv):
    """One environment behind PettingZoo's parallel interface: no padding, numpy arrays, seeds in `reset`. What an agent
    may do stands in infos[agent]["action_mask"] where that changes. Copies made by pickling draw their own random
    numbers."""

    def __init__(self, env, with_planner: bool = False):
        if env.num_envs != 1:
            raise ValueError(f"num_envs must be 1 for a PettingZoo environment, got {env.num_envs}")
        if with_planner and not hasattr(env, "planner_obs"):
            raise ValueError(f"with_planner must be False of {env.env_id}: it has none")
        self.env, self.render_mode, self.max_cycles = env, "rgb_array", env.horizon
        self.metadata = {"name": env.env_id, "render_modes": ["rgb_array"], "is_parallelizable": True, "render_fps": 10}
        self.possible_agents, self.agents = list(env.agents), []
        self.observation_spaces, self.action_spaces = {}, {}
        for agent, obs_size, action_size in zip(env.agents, env.obs_sizes, env.action_sizes):
            self.observation_spaces[agent] = spaces.Box(-np.inf, np.inf, (obs_size,), np.float32)
            box = spaces.Box(env.action_low, env.action_high, (action_size,), np.float32)
            self.action_spaces[agent] = spaces.Discrete(action_size) if env.discrete else box
        if with_planner:
            self.possible_agents.append(PLANNER)
            self.observation_spaces[PLANNER] = spaces.Box(-np.inf, np.inf, (env.planner_obs_size,), np.float32)
            self.action_spaces[PLANNER] = spaces.MultiDiscrete([1 + env.num_rates] * len(env.cutoffs))
        self.generator = torch.Generator()
        self.generator.seed()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "generator"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.generator = torch.Generator()
        self.generator.seed()

    def observation_space(self, agent: str) -> spaces.Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        return self.action_spaces[agent]

    def _seen(self, obs: Tensor) -> tuple[dict, dict]:
        """Observations and infos of all agents."""
        env, state = self.env, self.batch_state
        rows = {agent: obs[0, i, :size] for i, (agent, size) in enumerate(zip(env.agents, env.obs_sizes))}
        masks = {}
        if hasattr(env, "valid_actions"):
            masks = dict(zip(env.agents, env.valid_actions(state)[0]))
        if PLANNER in self.possible_agents:
            rows[PLANNER] = env.planner_obs(state)[0]
            masks[PLANNER] = env.valid_rates(state)[0]
        observations = {agent: row.to("cpu", torch.float32, copy=True).numpy() for agent, row in rows.items()}
        infos = {agent: {} for agent in rows}
        for agent, mask in masks.items():
            infos[agent]["action_mask"] = mask.to("cpu", torch.int8, copy=True).numpy()
        return observations, infos

    def reset(self, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.generator.manual_seed(seed)
        self.batch_state, obs = self.env.reset([self.generator])
        self.agents = list(self.possible_agents)
        return self._seen(obs)

    def _checked(self, actions: dict, agent: str) -> np.ndarray:
        """An agent's action. Raise ValueError if there is none or it is outside its space."""
        space = self.action_spaces[agent]
        if agent not in actions:
            raise ValueError(f"actions must have one of {agent}, got {sorted(actions)}")
        action = np.asarray(actions[agent])
        if isinstance(space, spaces.Box):
            action = action.astype(space.dtype)
        if not space.contains(action):
            raise ValueError(f"the action of {agent} must be in {space}, got {actions[agent]}")
        return action

    def step(self, actions: dict):
        """After the end of an episode there is nobody left to act: five empty dictionaries."""
        env = self.env
        if not self.agents:
            if actions:
                raise ValueError("the episode is over: call reset()")
            return {}, {}, {}, {}, {}
        padded = np.zeros((1, env.num_agents) if env.discrete else (1, env.num_agents, max(env.action_sizes)))
        for i, agent in enumerate(env.agents):
            action = self._checked(actions, agent)
            if env.discrete:
                padded[0, i] = action
            else:
                padded[0, i, : env.action_sizes[i]] = action
        action = torch.as_tensor(padded, dtype=torch.int64 if env.discrete else env.dtype, device=env.device)
        others = []
        if PLANNER in self.possible_agents:
            others = [torch.as_tensor(self._checked(actions, PLANNER), device=env.device)[None]]
        result = env.step(self.batch_state, action, env.draw([self.generator]), *others)
        self.batch_state, obs, reward, terminated, truncated, info = result
        ended, cut = bool(terminated[0]), bool(truncated[0])
        rewards = dict(zip(env.agents, reward[0].tolist()))
        if PLANNER in self.possible_agents:
            rewards[PLANNER] = float(info["planner_reward"][0])
        everyone = self.agents
        self.agents = [] if ended or cut else everyone
        observations, infos = self._seen(obs)
        return observations, rewards, dict.fromkeys(everyone, ended), dict.fromkeys(everyone, cut), infos

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


def to_parallel_env(env, max_cycles: int | None = None, with_planner: bool = False) -> TorchParallelEnv:
    """`env` of one environment for PettingZoo, with episodes of `max_cycles` steps if given. `with_planner` makes the
    planner of an economy an agent; without it taxes stay as they are."""
    if max_cycles is not None:
        env = dataclasses.replace(env, horizon=max_cycles)
    return TorchParallelEnv(env, with_planner)


# ---------------------------------------------------------------- PettingZoo -> ours


@dataclasses.dataclass(frozen=True)
class Handle:
    """The state of wrapped environments lives inside them; this only says which moment is meant."""

    episode: int
    t: int


@dataclasses.dataclass(eq=False)
class ZooEnv:
    """Copies of a PettingZoo parallel environment. Unlike our own environments they have a memory: `step` takes the
    newest state only. Where there are action masks (`masked`), they are the last A entries of every observation, which
    `obs_mask` leaves out."""

    copies: Copies
    num_envs: int  # B, the first ones of the copies
    device: torch.device
    dtype: torch.dtype
    horizon: int  # steps from `reset` until all episodes are cut
    team: Sequence[str]  # cooperating agents, by name or first letters; empty: all
    env_id: str
    autoreset: bool = False  # start another episode where one is over, instead of resting
    turns: int = 1  # episodes of each copy that an evaluation plays

    def __post_init__(self):
        copies = self.copies
        self.agents = [agent.name for agent in copies.agents]
        self.num_agents = len(self.agents)
        for name in self.team:
            if not any(agent.startswith(name) for agent in self.agents):
                raise ValueError(f"cooperators must be some of {', '.join(self.agents)}, got {name}")
        prefixes = tuple(name for name in self.team if name not in self.agents)
        team = [not self.team or agent in self.team or agent.startswith(prefixes) for agent in self.agents]
        self.cooperators = torch.tensor(team, device=self.device)
        self.discrete, self.masked = copies.is_discrete, copies.is_masked
        self.obs_sizes, self.action_sizes = copies.obs_sizes, copies.action_sizes
        self.action_low, self.action_high = copies.action_range
        self.obs_mask = self._mask(self.obs_sizes, copies.arrays.obs.shape[2])
        self.action_mask = self._mask(self.action_sizes, max(self.action_sizes))

    @property
    def envs(self) -> list[ParallelEnv]:
        """Those in this process."""
        return [copy.env for copy in self.copies.local]

    def _mask(self, sizes: Sequence[int], width: int) -> Tensor:
        """[N, width]: True for the first sizes[i] entries of agent i."""
        return torch.arange(width, device=self.device) < torch.tensor(sizes, device=self.device)[:, None]

    def _tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """What an array of the copies holds now."""
        array = getattr(self.copies.arrays, name)[: self.num_envs]
        return torch.tensor(array, dtype=dtype, device=self.device)

    def for_training(self, num_steps: int) -> "ZooEnv":
        """The same copies, whose episodes follow one another until all are cut after `num_steps`."""
        return dataclasses.replace(self, horizon=num_steps, autoreset=True)

    def for_tests(self, num_episodes: int) -> "ZooEnv":
        """The same copies, of which an evaluation plays about so many whole episodes, in turns."""
        num_envs = min(self.copies.count, num_episodes)
        turns = math.ceil(num_episodes / num_envs)
        return dataclasses.replace(self, num_envs=num_envs, autoreset=False, turns=turns)

    def reset(self, generators: list[torch.Generator]) -> tuple[Handle, Tensor]:
        """Each copy is seeded with a number that the generator of its block draws."""
        if self.num_envs % len(generators):
            raise ValueError(f"num_envs must be a multiple of the {len(generators)} generators, got {self.num_envs}")
        size = (self.num_envs // len(generators),)
        seeds = [torch.randint(2**31 - 1, size, generator=g, device=g.device).tolist() for g in generators]
        self.copies.reset([seed for block in seeds for seed in block])
        return Handle(*self.copies.now), self._tensor("obs", self.dtype)

    def draw(self, generators: list[torch.Generator]) -> None:
        """The copies draw their own random numbers."""

    def step(self, state: Handle, action: Tensor, noise: None = None):
        """action: [B, N, A] (clipped to the bounds) or [B, N] int64; illegal and of agents that have ended: ignored.

        Returns state, obs [B, N, O], zeros of agents that are not there, reward [B, N], terminated [B] (all agents have
        terminated), truncated [B] (over for another reason), and info: "live" [B, N], agents that had not ended before
        this step (none in the step that starts another episode), and "terminated" [B, N], those that terminate in it.
        """
        if state != Handle(*self.copies.now):
            raise ValueError("a wrapped PettingZoo environment steps only from its newest state")
        self.copies.arrays.action[: self.num_envs] = action.detach().cpu().numpy()
        self.copies.step(self.autoreset)
        state = Handle(*self.copies.now)
        over = self._tensor("over")
        truncated = (over == 2) | ((over == 0) & (state.t >= self.horizon))
        info = {
            "live": self._tensor("live", self.dtype),
            "terminated": self._tensor("terminated", self.dtype),
        }
        return state, self._tensor("obs", self.dtype), self._tensor("reward", self.dtype), over == 1, truncated, info

    def episodic_returns(self) -> Tensor:
        """[B, N] mean of the episodes that are over since `reset`, or of the first one so far."""
        count, total = self._tensor("finished").split([1, self.num_agents], 1)
        returns = torch.where(count > 0, total / count.clamp_min(1), self._tensor("total"))
        return returns.to(self.dtype)

    def encode(self, observations: dict, infos: dict) -> Tensor:
        """[N, O] what PettingZoo's dictionaries say of one environment."""
        out = np.zeros(self.copies.arrays.obs.shape[1:], dtype=np.float32)
        if self.masked and not infos and not any(agent.is_masked for agent in self.copies.agents):
            raise ValueError("infos must be given: they have the action masks")
        everyone = [True] * self.num_agents  # who has ended may have no mask
        encode(self.copies.agents, observations, infos, self.copies.obs_range, out, everyone)
        return torch.as_tensor(out, dtype=self.dtype, device=self.device)

    def decode(self, action: np.ndarray, agents: Iterable[str]) -> dict:
        """The actions, [N, A] or [N], of these agents, as their own spaces have them."""
        actions = {}
        for i, agent in enumerate(self.copies.agents):
            if agent.name in agents:
                actions[agent.name] = agent.native(action[i], *self.copies.action_range)
        return actions

    def global_state(self, state: Handle) -> Tensor:
        """[B, G]: the newest observations of all agents side by side, without padding."""
        return self._tensor("obs", self.dtype)[:, self.obs_mask]

    def render(self, state: Handle, index: int = 0) -> np.ndarray:
        """Raise NoPicture if the environment has none, for want of a render mode or of a screen."""
        try:
            frame = self.copies.render(index)
        except EnvironmentFault as error:
            raise NoPicture(str(error)) from error
        if frame is None:
            raise NoPicture(f"{self.env_id} was not built with render_mode='rgb_array'")
        return np.asarray(frame)


def from_parallel_env(
    constructor: Callable[[], ParallelEnv],
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    horizon: int | None = None,
    cooperators: Sequence[str] = (),
    env_id: str = "zoo",
    num_workers: int = 1,
) -> ZooEnv:
    """num_envs copies of `constructor()` under the batched interface. An episode is cut after `horizon` steps; without
    it, after as many as the environment says it has. `cooperators` names the team to make robust, by the first letters
    of its agents. Raise EnvironmentFault, an OSError and ValueError, for an environment that cannot be wrapped."""
    copies = Copies(constructor, num_envs, num_workers, env_id)
    if horizon is None and copies.limit is None:
        print(f"{env_id} does not say how long an episode is: it is cut after {LONG} steps (--horizon)")
    horizon = horizon or copies.limit or LONG
    return ZooEnv(copies, num_envs, torch.device(device), dtype, horizon, tuple(cooperators or ()), env_id)


def original(env) -> ZooEnv:
    """The original mpe2 task of one of our particle environments, with as many copies and the same team."""
    if getattr(env, "nearest_first", True):  # which other environments do not have
        raise EnvironmentFault(f"--backend must be torch: mpe2 has no {env.env_id} with these observations")
    build = importlib.import_module(f"mpe2.{env.env_id}").parallel_env
    options = {"N": env.num_agents} if env.env_id == "simple_spread_v3" else {}
    constructor = functools.partial(build, continuous_actions=not env.discrete, max_cycles=env.horizon, **options)
    team = [agent for agent, cooperates in zip(env.agents, env.cooperators.tolist()) if cooperates]
    return from_parallel_env(constructor, env.num_envs, env.device, env.dtype, None, team, env.env_id)


def find_constructor(name: str) -> Callable[..., ParallelEnv]:
    """What builds the environment: `parallel_env`, or `env` made parallel, of a module, which may lie in the current
    folder, or what PettingZoo's registry has by that id, with a slash: sisl/multiwalker-v9."""
    if "/" in name:
        try:
            pettingzoo.spec("parallel", name)
        except Exception:
            return lambda **options: aec_to_parallel(pettingzoo.make("aec", name, **options))
        return functools.partial(pettingzoo.make, "parallel", name)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(name)
        if hasattr(module, "parallel_env"):
            return module.parallel_env
        build = module.env
    except (ImportError, AttributeError, ValueError) as error:
        raise EnvironmentFault(f"no module {name!r} with a parallel_env or env ({error})") from error
    return lambda **options: aec_to_parallel(build(**options))


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_agents: int | None = None,
    continuous_actions: bool = True,
    horizon: int | None = None,
    cooperators: Sequence[str] = (),
    num_workers: int = 1,
    render_mode: str | None = "rgb_array",
    keywords: dict | None = None,
    **options,
) -> ZooEnv:
    """`zoo:package.module` or `zoo:namespace/Name-v0`, built with `options` and with `keywords`, whose names may be
    those of this function's own. It is asked for this kind of actions and for pictures where it knows the usual
    keywords; where it does not, `env.discrete` says which kind of actions it has."""
    options |= keywords or {}
    wishes = {"continuous_actions": continuous_actions, "render_mode": render_mode}
    with blamed(f"env_id {env_id}"):
        build = find_constructor(env_id.removeprefix("zoo:"))
        for keys in (("continuous_actions", "render_mode"), ("continuous_actions",), ("render_mode",), ()):
            constructor = functools.partial(build, **{key: wishes[key] for key in keys} | options)
            try:
                probe = constructor()
                break
            except TypeError:  # of a keyword that it does not know
                if not keys:
                    raise
            except Exception:  # of a screen that is not there
                if "render_mode" not in keys or render_mode is None:
                    raise
        with contextlib.suppress(Exception):
            probe.close()
    env = from_parallel_env(constructor, num_envs, device, dtype, horizon, cooperators, env_id, num_workers)
    if num_agents not in (None, env.num_agents):
        raise ValueError(
            f"num_agents of {env_id} must be {env.num_agents} (or set it in its own keywords), got {num_agents}"
        )
    return env
