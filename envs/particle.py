"""The multi-agent particle environments of mpe2 1.1.1, batched: states, observations, rewards agree to 1e-9 in float64.

    env = make("simple_spread_v3", num_envs=4096, num_agents=3)
    state, obs = env.reset([torch.Generator().manual_seed(0)])
    state, obs, reward, terminated, truncated, info = env.step(state, action, env.draw(generators))

One description (`Task`) per task drives one physics, one observation builder and one action decoder; a new task is a
reward function and an entry in `TASKS`. Speed, and a GIF of a random policy:

    python -m envs.particle --env-id simple_tag_v3 --gif tag.gif
    python -m envs.particle --num-agents 15 --compile

Axes: B environments, N agents, L landmarks, J bodies an agent can hit (agents, then solid landmarks), G goals,
M speakers, C words, O observation entries, A action entries, P prey, H hunters; n, m some of the agents or landmarks.
Every tensor inside is batch-last ([N, 2, B]), so that each elementary operation runs along contiguous memory; the
interface is batch-first through permuted views, which cost nothing. Lengths and times have no unit in mpe2: the arena
is [-1, 1]^2 and a step lasts `dt`.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from envs import print_speed, runs, save_gif

POSITIVE = ("dt", "mass", "contact_margin")  # fields that must be above zero; the next may be zero
CONSTANTS = (*POSITIVE, "damping", "contact_force", "max_speed_scale", "accel_scale", "local_ratio", "horizon")
FIELDS = (*CONSTANTS, "nearest_first")
MOVE = 5  # entries (values, if discrete) of a movement: nothing, -x, +x, -y, +y
TINY = 1e-30  # smallest squared distance: two bodies at one point push each other with force 0, where mpe2 gives NaN
RED, GREEN, BLUE, GREY, ORANGE = (200, 80, 70), (70, 160, 80), (66, 110, 190), (120, 120, 120), (235, 160, 50)


@dataclasses.dataclass
class State:
    """Everything that changes during an episode, and what an episode draws at its start."""

    position: Tensor  # [N, 2, B] of the agents
    velocity: Tensor  # [N, 2, B]
    landmarks: Tensor  # [L, 2, B] their positions
    goal: Tensor  # [G, B] int64, index of a landmark
    message: Tensor  # [M, C, B] what each speaker said last
    t: Tensor  # [B] int64, steps since reset


@dataclasses.dataclass(frozen=True)
class Role:
    """Consecutive agents with the same body and the same observation."""

    names: tuple[str, ...]
    observes: tuple[Callable, ...]  # blocks of the observation in order; each (env, state, agents) -> [n, width, B]
    size: float = 0.05  # radius
    accel: float = 5.0  # force of a full action
    max_speed: float = math.inf
    moves: bool = True
    speaks: bool = False
    cooperates: bool = True
    colour: tuple[int, int, int] = BLUE


@dataclasses.dataclass(frozen=True)
class Landmarks:
    count: int
    size: float = 0.05
    solid: bool = False  # pushes agents away; solid landmarks come first
    colour: tuple[int, int, int] = GREY


@dataclasses.dataclass(frozen=True)
class Task:
    roles: tuple[Role, ...]
    landmarks: tuple[Landmarks, ...]
    reward: Callable  # (env, state) -> [N, B]
    collide: bool = True  # do agents push each other?
    landmark_range: float = 1.0  # landmarks start uniform in [-range, range]^2; agents always in [-1, 1]^2
    goals: int = 0  # landmark indices drawn at reset
    words: int = 0  # size of a message


# ------------------------------------------------------- observation blocks: (env, state, agents) -> [n, width, B]


def drop_self(q: Tensor, own: slice) -> Tensor:
    """Leave out each agent's own column: [1 or n, m, ..., B] -> [n, m - 1, ..., B]. A gather is slower."""
    shape = (-1, *[1] * (q.ndim - 2))
    k = torch.arange(q.shape[1] - 1, device=q.device).view(shape)
    i = torch.arange(own.start, own.stop, device=q.device).view(-1, 1, *shape[1:])
    return torch.where(k < i, q[:, :-1], q[:, 1:])


def one_hot(index: Tensor, width: int, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """[g, B] -> [g, width, B]: `high` at the index, `low` elsewhere."""
    hot = index[:, None] == torch.arange(width, device=index.device)[:, None]
    return low + (high - low) * hot.to(dtype)


def velocity(env, state: State, agents: slice) -> Tensor:
    return state.velocity[agents]


def position(env, state: State, agents: slice) -> Tensor:
    return state.position[agents]


def landmarks(env, state: State, agents: slice) -> Tensor:
    """Where the landmarks are, seen from the agent."""
    return (state.landmarks - state.position[agents, None]).flatten(1, 2)


def others(env, state: State, agents: slice) -> Tensor:
    """Where the other agents are, seen from the agent."""
    return (drop_self(state.position[None], agents) - state.position[agents, None]).flatten(1, 2)


def nearest_first(block: Callable) -> Callable:
    """The places of an observation block in the order of their distance: what an agent knows of others that are all
    alike does not depend on who has which number."""

    def ordered(env, state: State, agents: slice) -> Tensor:
        places = block(env, state, agents).unflatten(1, (-1, 2))  # [n, m, 2, B]
        order = length(places).argsort(dim=1, stable=True)
        return places.take_along_dim(order[:, :, None], 1).flatten(1, 2)

    return ordered


def silence(env, state: State, agents: slice) -> Tensor:
    """What the others say where nobody can speak: zeros, which mpe2's spread task observes all the same."""
    return state.position.new_zeros(agents.stop - agents.start, 2 * (env.num_agents - 1), len(state.t))


def prey_velocity(env, state: State, agents: slice) -> Tensor:
    """Velocities of the (other) prey, who are the last role."""
    prey = env.slices[-1]
    v = state.velocity[None, prey]  # [1, P, 2, B]
    if agents.start == prey.start:
        v = drop_self(v, slice(0, prey.stop - prey.start))
    return v.flatten(1, 2).expand(agents.stop - agents.start, -1, -1)


def goal_position(env, state: State, agents: slice) -> Tensor:
    """Where the goal is, seen from the agent."""
    return goal_place(state)[:1] - state.position[agents]


def goal_colour(first: int, last: int, width: int, low: float, high: float, shift: int = 0) -> Callable:
    """Colours of the goals first..last-1, as the observation of one agent each."""

    def block(env, state: State, agents: slice) -> Tensor:
        return one_hot(state.goal[first:last] + shift, width, low, high, env.dtype)

    return block


def landmark_colours(env, state: State, agents: slice) -> Tensor:
    """The fixed colours of the push task's two landmarks: (0.1, 0.9, 0.1) and (0.1, 0.1, 0.9)."""
    index = torch.arange(1, 3, device=env.device)[:, None]
    colours = one_hot(index, 3, 0.1, 0.9, env.dtype).reshape(1, 6, 1)
    return colours.expand(agents.stop - agents.start, -1, len(state.t))


def heard(speaker: int) -> Callable:
    """What one speaker said last."""

    def block(env, state: State, agents: slice) -> Tensor:
        return state.message[speaker : speaker + 1].expand(agents.stop - agents.start, -1, -1)

    return block


def heard_from_partner(env, state: State, agents: slice) -> Tensor:
    return state.message.flip(0)


def in_forest(env, state: State, agents: slice) -> Tensor:
    """+1 where the agent's disc touches a forest (the last two landmarks), else -1: [n, 2, B]."""
    return 2 * touches_landmark(env, state, agents, slice(-2, None)).to(env.dtype) - 1


def visible(env, state: State, agents: slice) -> Tensor:
    """[n, N, B]: those in one forest see each other, so do those outside; the leader (agent 0) sees everybody."""
    forest = touches_landmark(env, state, slice(None), slice(-2, None))  # [N, 2, B]
    same = (forest[agents, None] & forest[None]).any(2)
    inside = forest.any(1)  # [N, B]
    seen = same | ~(inside[agents, None] | inside[None])
    return (torch.ones_like(seen) if agents.start == 0 else seen).to(env.dtype)


def visible_others(env, state: State, agents: slice) -> Tensor:
    seen = drop_self(visible(env, state, agents), agents)
    return others(env, state, agents) * seen.repeat_interleave(2, 1)


def visible_prey_velocity(env, state: State, agents: slice) -> Tensor:
    prey = env.slices[-1]
    seen = visible(env, state, agents)[:, prey]  # [n, P, B]
    if agents.start == prey.start:
        seen = drop_self(seen, slice(0, prey.stop - prey.start))
    return prey_velocity(env, state, agents) * seen.repeat_interleave(2, 1)


# ---------------------------------------------------------------- rewards: (env, state) -> [N, B]


def length(v: Tensor) -> Tensor:
    """[..., 2, B] -> [..., B]."""
    x, y = v.unbind(-2)
    return (x * x + y * y).sqrt()


def goal_place(state: State) -> Tensor:
    """[G, 2, B] positions of the goals."""
    return state.landmarks.gather(0, state.goal[:, None].expand(-1, 2, -1))


def agent_distances(state: State, a: slice, b: slice) -> Tensor:
    """[n, m, B] between two sets of agents."""
    return length(state.position[a, None] - state.position[b])


def landmark_distances(state: State, agents: slice, marks: slice) -> Tensor:
    """[n, m, B] from agents to landmarks."""
    return length(state.position[agents, None] - state.landmarks[marks])


def touches_landmark(env, state: State, agents: slice, marks: slice) -> Tensor:
    return landmark_distances(state, agents, marks) < env.agent_size[agents, None] + env.landmark_size[marks]


def caught(env, state: State) -> Tensor:
    """[P, H, B]: which prey (the last role) touches which hunter (everybody else)."""
    prey = env.slices[-1]
    hunters = slice(0, prey.start)
    reach = env.agent_size[prey, None] + env.agent_size[hunters]
    return (agent_distances(state, prey, hunters) < reach).to(env.dtype)


def leaving(p: Tensor) -> Tensor:
    """Penalty for leaving the arena, by coordinate: [n, 2, B] -> [n, B]."""
    c = p.abs()
    return torch.where(c < 0.9, 0.0, torch.where(c < 1.0, 10 * (c - 0.9), (2 * c - 2).exp().clamp_max(10.0))).sum(1)


def spread_reward(env, state: State) -> Tensor:
    """Each landmark wants an agent near (shared); touching another agent costs 1 (own)."""
    every = slice(None)
    shared = -landmark_distances(state, every, every).amin(0).sum(0)  # [B]
    touching = agent_distances(state, every, every) < env.agent_size[:, None] + env.agent_size
    own = 1 - touching.to(env.dtype).sum(1)  # an agent always touches itself, which is not counted
    return (1 - env.local_ratio) * shared + env.local_ratio * own


def tag_reward(env, state: State) -> Tensor:
    """+10 to every hunter and -10 to the prey for each touch; the prey also pays for leaving the arena."""
    touch, prey = caught(env, state), env.slices[-1]
    hunted = -10 * touch.sum(1) - leaving(state.position[prey])
    return torch.cat((10 * touch.sum((0, 1)).expand(prey.start, -1), hunted))


def world_comm_reward(env, state: State) -> Tensor:
    """Tag with food for the prey (landmarks 1 and 2) and a pull towards the nearest prey for the hunters."""
    touch, prey = caught(env, state), env.slices[-1]
    nearest = agent_distances(state, slice(0, prey.start), prey).amin(1)
    hunting = 5 * touch.sum((0, 1)) - 0.1 * nearest
    food = slice(1, 3)
    eaten = touches_landmark(env, state, prey, food).to(env.dtype).sum(1)
    hunted = -5 * touch.sum(1) - 2 * leaving(state.position[prey])
    return torch.cat((hunting, hunted + 2 * eaten - 0.05 * landmark_distances(state, prey, food).amin(1)))


def adversary_reward(env, state: State) -> Tensor:
    """The team wants one of its own near the goal and the adversary far from it."""
    d = length(state.position - goal_place(state))  # [3, B]
    team = d[0] - d[1:].amin(0)
    return torch.stack((-d[0], team, team))


def push_reward(env, state: State) -> Tensor:
    """The good agent wants to be at the goal, the adversary wants to be nearer to it."""
    d = length(state.position - goal_place(state))  # [2, B]
    return torch.stack((d[1] - d[0], -d[1]))


def crypto_reward(env, state: State) -> Tensor:
    """Squared error of what eve and bob say against the goal's colour; saying exactly nothing counts as no error."""
    colour = one_hot(state.goal[:1], env.task.words, 0.0, 1.0, env.dtype)
    said = state.message[:2]  # eve, bob
    eve, bob = (((said - colour) ** 2).sum(1) * (said != 0).any(1)).unbind(0)
    return torch.stack((-eve, eve - bob, eve - bob))


def speaker_listener_reward(env, state: State) -> Tensor:
    """Squared distance of the listener to the goal, for both."""
    return -((state.position[1:] - goal_place(state)) ** 2).sum(1).expand(2, -1)


def reference_reward(env, state: State) -> Tensor:
    """Goal i is where the partner of agent i must go; a mean over both is mixed with the own part."""
    own = -length(state.position.flip(0) - goal_place(state))  # [2, B]
    return (1 - env.local_ratio) * own.mean(0) + env.local_ratio * own


# ---------------------------------------------------------------- the tasks


def spread(num_agents: int = 3, sees_nearest_first: bool = False) -> Task:
    """N agents cover N landmarks without touching."""
    names = tuple(f"agent_{i}" for i in range(num_agents))
    places = (landmarks, others)
    if sees_nearest_first:
        places = map(nearest_first, places)
    observes = (velocity, position, *places, silence)
    return Task((Role(names, observes, size=0.15),), (Landmarks(num_agents),), spread_reward)


HUNTERS = tuple(f"adversary_{i}" for i in range(3))
HUNTER = {"size": 0.075, "accel": 3.0, "max_speed": 1.0, "colour": RED}
PREY = {"accel": 4.0, "max_speed": 1.3, "cooperates": False, "colour": GREEN}
FOE = {"cooperates": False, "colour": RED}
STILL = {"moves": False, "speaks": True}
SEES = (velocity, position, landmarks)
SECRET, KEY = goal_colour(0, 1, 4, 0.0, 1.0), goal_colour(1, 2, 4, 0.0, 1.0)
OWN_COLOUR, GOAL_COLOURS = goal_colour(0, 1, 3, 0.25, 0.75, shift=1), goal_colour(0, 2, 3, 0.25, 0.75)
SEES_WORLD = (*SEES, visible_others, visible_prey_velocity, in_forest, heard(0))

TASKS: dict[str, Task | Callable[[int], Task]] = {
    "simple_spread_v3": spread,
    "simple_tag_v3": Task(
        (
            Role(HUNTERS, (*SEES, others, prey_velocity), **HUNTER),
            Role(("agent_0",), (*SEES, others, prey_velocity), **PREY),
        ),
        (Landmarks(2, size=0.2, solid=True),),
        tag_reward,
        landmark_range=0.9,
    ),
    "simple_crypto_v3": Task(
        (
            Role(("eve_0",), (heard(2),), **STILL, **FOE),
            Role(("bob_0",), (KEY, heard(2)), **STILL),
            Role(("alice_0",), (SECRET, KEY), **STILL),
        ),
        (Landmarks(2),),
        crypto_reward,
        collide=False,
        goals=2,  # the secret, and the key that bob and alice share
        words=4,
    ),
    "simple_adversary_v3": Task(
        (
            Role(("adversary_0",), (landmarks, others), size=0.15, **FOE),
            Role(("agent_0", "agent_1"), (goal_position, landmarks, others), size=0.15),
        ),
        (Landmarks(2, size=0.08),),
        adversary_reward,
        collide=False,
        goals=1,
    ),
    "simple_push_v3": Task(
        (
            Role(("adversary_0",), (velocity, landmarks, others), **FOE),
            Role(("agent_0",), (velocity, goal_position, OWN_COLOUR, landmarks, landmark_colours, others)),
        ),
        (Landmarks(2),),
        push_reward,
        goals=1,
    ),
    "simple_speaker_listener_v4": Task(
        (
            Role(("speaker_0",), (goal_colour(0, 1, 3, 0.15, 0.65),), size=0.075, **STILL),
            Role(("listener_0",), (velocity, landmarks, heard(0)), size=0.075),
        ),
        (Landmarks(3, size=0.04),),
        speaker_listener_reward,
        collide=False,
        goals=1,
        words=3,
    ),
    "simple_reference_v3": Task(
        (Role(("agent_0", "agent_1"), (velocity, landmarks, GOAL_COLOURS, heard_from_partner), speaks=True),),
        (Landmarks(3),),
        reference_reward,
        collide=False,
        goals=2,  # goal i is known to agent i, and is where its partner must go
        words=10,
    ),
    "simple_world_comm_v3": Task(
        (
            Role(("leadadversary_0",), SEES_WORLD, speaks=True, **HUNTER),
            Role(HUNTERS, SEES_WORLD, **HUNTER),
            Role(("agent_0", "agent_1"), (*SEES, visible_others, in_forest, visible_prey_velocity), size=0.045, **PREY),
        ),
        (
            Landmarks(1, size=0.2, solid=True),
            Landmarks(2, size=0.03, colour=ORANGE),  # food
            Landmarks(2, size=0.3, colour=(170, 220, 170)),  # forests
        ),
        world_comm_reward,
        landmark_range=0.9,
        words=4,
    ),
}


# ---------------------------------------------------------------- the environment


@dataclasses.dataclass(eq=False)
class ParticleEnv:
    """A description without state. The physical constants are mpe2 1.1.1's (`_mpe_utils/core.py`); each may be a number
    or a tensor [B], a value per environment. `dataclasses.replace(env, damping=0.5)` is the same task with other
    dynamics."""

    env_id: str
    num_envs: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    num_agents: int | None = None  # None: the task's own number; only spread has a choice
    continuous_actions: bool = True
    dt: float | Tensor = 0.1  # time a step lasts
    damping: float | Tensor = 0.25  # share of its velocity that an agent loses in a step
    contact_force: float | Tensor = 100.0  # force per length of penetration
    contact_margin: float | Tensor = 1e-3  # length over which a contact sets in
    mass: float | Tensor = 1.0  # of every agent
    max_speed_scale: float | Tensor = (
        1.0  # times the speed limit of tag's and world_comm's agents; the others have none
    )
    accel_scale: float | Tensor = 1.0  # times each agent's own force at full action
    local_ratio: float | Tensor = 0.5  # weight of an agent's own part of the reward (spread, reference)
    horizon: int = 25  # steps of an episode (mpe2's max_cycles)
    nearest_first: bool = False  # spread: observations have landmarks and other agents in the order of their distance

    def __post_init__(self):
        self._check()
        task = TASKS[self.env_id]
        if self.env_id == "simple_spread_v3":
            task = spread(self.num_agents or 3, self.nearest_first)
        elif self.nearest_first:
            raise ValueError(f"nearest_first must be False in {self.env_id}, got {self.nearest_first}")
        self.task = task
        self.agents = [name for role in task.roles for name in role.names]
        if self.num_agents not in (None, len(self.agents)):
            raise ValueError(f"num_agents of {self.env_id} must be {len(self.agents)}, got {self.num_agents}")
        self.num_agents = len(self.agents)
        self.num_landmarks = sum(group.count for group in task.landmarks)
        self.num_solid = sum(group.count for group in task.landmarks if group.solid)
        self.num_speakers = sum(len(role.names) for role in task.roles if role.speaks)  # they come first
        self.slices, start = [], 0  # agents of each role
        for role in task.roles:
            self.slices.append(slice(start, start + len(role.names)))
            start += len(role.names)

        def column(values):  # [N or L, 1]
            return torch.tensor(values, dtype=self.dtype, device=self.device)[:, None]

        roles = [role for role in task.roles for _ in role.names]
        self.agent_size = column([role.size for role in roles])  # [N, 1]
        self.accel = column([role.accel for role in roles])[:, None]  # [N, 1, 1]
        self.max_speed = column([role.max_speed for role in roles])[:, None]
        self.moves = column([float(role.moves) for role in roles])[:, None]
        self.landmark_size = column([group.size for group in task.landmarks for _ in range(group.count)])  # [L, 1]
        n = self.num_agents
        i, k = torch.arange(n), torch.arange(1, n // 2 + 1)[:, None]  # agent i and agent i + k are a pair
        self.partner = ((i + k) % n).flatten().to(self.device)  # [K*N]
        self.mirror = ((k - 1) * n + (i - k) % n).flatten().to(self.device)  # [K*N] where agent i is the partner
        # i and i + N / 2 meet twice
        self.pair_weight = torch.where(2 * k == n, 0.5, 1.0).to(self.device, self.dtype)[:, :, None, None]
        self.pair_distance = self.agent_size + self.agent_size[self.partner].view(-1, n, 1)  # [K, N, 1]
        self.solid_distance = self.agent_size[:, None] + self.landmark_size[: self.num_solid]
        self.cooperators = torch.tensor([role.cooperates for role in roles], device=self.device)  # [N]

        self.anybody_moves = any(role.moves for role in roles)
        self.speed_limited = any(role.max_speed < math.inf for role in roles)
        matters = {"damping": self.anybody_moves, "mass": self.anybody_moves, "max_speed_scale": self.speed_limited}
        matters["contact_force"] = self.anybody_moves and task.collide
        self.dynamics = tuple(name for name, does in matters.items() if does)  # fields that change this task's motion
        self.scenarios = {"agents": self.num_agents} if self.env_id == "simple_spread_v3" else {}
        self.discrete = not self.continuous_actions
        self.action_low, self.action_high = 0.0, 1.0
        self.action_sizes = tuple(self._action_size(role) for role in roles)
        width = torch.arange(max(self.action_sizes), device=self.device)
        self.action_mask = width < torch.tensor(self.action_sizes, device=self.device)[:, None]  # [N, A]
        self._probe()

    def _check(self):
        for name in CONSTANTS:
            value = torch.as_tensor(getattr(self, name))
            high_enough = value > 0 if name in POSITIVE else value >= (1 if name == "horizon" else 0)
            if not bool((high_enough & value.isfinite()).all()):
                rule = "positive" if name in POSITIVE else "1 or more" if name == "horizon" else "0 or more"
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")
        if not isinstance(self.nearest_first, bool):
            raise ValueError(f"nearest_first must be true or false, got {self.nearest_first!r}")
        for name in ("num_envs", "num_agents"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")

    def scenario(self, name: str, value: int) -> "ParticleEnv":
        """The task with `value` agents, so many environments that all have as many agents together as here."""
        num_envs = max(1, self.num_envs * self.num_agents // value)
        return dataclasses.replace(self, num_agents=value, num_envs=num_envs)

    def _action_size(self, role: Role) -> int:
        if self.discrete:
            return (MOVE if role.moves else 1) * (self.task.words if role.speaks else 1)
        return MOVE * role.moves + self.task.words * role.speaks

    def _probe(self):
        """Observation sizes, and which entries are not always zero ([N, O]): found by looking at 512 random states."""
        g, b = torch.Generator().manual_seed(0), 512

        def uniform(*shape):
            return 2 * torch.rand(b, *shape, generator=g) - 1

        goal = torch.randint(self.num_landmarks, (b, self.task.goals), generator=g)
        agents, message = (self.num_agents, 2), uniform(self.num_speakers, self.task.words)
        state = self.make_state(uniform(*agents), uniform(*agents), uniform(self.num_landmarks, 2), goal, message)
        blocks = self._blocks(state)
        self.obs_sizes = tuple(block.shape[1] for block in blocks for _ in range(block.shape[0]))
        self.obs_mask = (self.observe(state) != 0).any(0)

    def make_state(self, position, velocity=None, landmarks=None, goal=None, message=None, t=0) -> State:
        """A state from arrays: position, velocity [B, N, 2]; landmarks [B, L, 2]; goal [B, G]; message [B, M, C] of the
        speakers, who are the first agents (more rows are ignored); t [B] or a number. What is left out is zero."""

        def rows(values, *shape, dtype=self.dtype):
            values = torch.zeros(shape) if values is None else torch.as_tensor(values)
            return values.to(self.device, dtype).movedim(0, -1).contiguous()

        b, task = len(position), self.task
        p, v = rows(position), rows(velocity, b, self.num_agents, 2)
        marks = rows(landmarks, b, self.num_landmarks, 2)
        goal = rows(goal, b, task.goals, dtype=torch.int64)[: task.goals]
        message = rows(message, b, self.num_speakers, task.words)[: self.num_speakers]
        t = torch.as_tensor(t, dtype=torch.int64, device=self.device).expand(b).clone()
        return State(p, v, marks, goal, message, t)

    def reset(self, generators: list[torch.Generator]) -> tuple[State, Tensor]:
        """Generator k alone draws the k-th block of num_envs / len(generators) environments."""
        if self.num_envs % len(generators):
            raise ValueError(f"num_envs must be a multiple of the {len(generators)} generators, got {self.num_envs}")
        b, n, marks = self.num_envs // len(generators), self.num_agents, self.num_landmarks
        places, goals = [], []
        for g in generators:
            places.append(torch.rand(n + marks, 2, b, generator=g, device=g.device, dtype=self.dtype))
            goals.append(torch.randint(marks, (self.task.goals, b), generator=g, device=g.device))
        position, landmarks = (2 * torch.cat(places, -1).to(self.device) - 1).split((n, marks))
        goal = torch.cat(goals, -1).to(self.device)
        message = position.new_zeros(self.num_speakers, self.task.words, self.num_envs)
        t = goal.new_zeros(self.num_envs)
        landmarks = self.task.landmark_range * landmarks
        state = State(position, torch.zeros_like(position), landmarks, goal, message, t)
        return state, self.observe(state)

    def draw(self, generators: list[torch.Generator]) -> None:
        """The random numbers of one step: there are none."""

    def _blocks(self, state: State) -> list[Tensor]:
        """One [n, width, B] per role."""
        pairs = zip(self.task.roles, self.slices)
        return [torch.cat([block(self, state, agents) for block in role.observes], 1) for role, agents in pairs]

    def observe(self, state: State) -> Tensor:
        """[B, N, O] (a view of [N, O, B]); shorter observations end in zeros."""
        rows, width = self._blocks(state), max(self.obs_sizes)
        if len(rows) > 1:
            rows = [torch.cat([F.pad(row, (0, 0, 0, width - row.shape[1])) for row in rows])]
        return rows[0].permute(2, 0, 1)

    def _decode(self, action: Tensor) -> tuple[Tensor | None, Tensor]:
        """Directions of the forces [N, 2, B], and the messages [M, C, B]."""
        speakers, words = self.num_speakers, self.task.words
        speakers_move = self.task.roles[0].moves
        if self.discrete:
            move = action.T.to(torch.int32)  # [N, B]; twice as fast as int64 when compiled
            word = move[:speakers]
            if speakers and speakers_move:  # move + 5 * word
                word, move = word // MOVE, move % MOVE
            message = one_hot(word, words, 0.0, 1.0, self.dtype)
            ux = (move == 2).to(self.dtype) - (move == 1).to(self.dtype)
            uy = (move == 4).to(self.dtype) - (move == 3).to(self.dtype)
            return torch.stack((ux, uy), 1), message
        action = action.permute(1, 2, 0).contiguous().clamp(0, 1)  # [N, A, B]
        first = MOVE if speakers_move else 0  # a message follows the movement
        message = action[:speakers, first : first + words].contiguous()
        return action[:, 2:MOVE:2] - action[:, 1:MOVE:2] if self.anybody_moves else None, message

    def _contact(self, state: State) -> Tensor:
        """Force of the other bodies on each agent [N, 2, B]; a pair i, i + k (k <= N / 2) counts once."""
        p, n = state.position, self.num_agents
        force = torch.zeros_like(p)
        if n > 1:
            delta = p - p.index_select(0, self.partner).unflatten(0, (-1, n))  # [K, N, 2, B]
            push = self._push(delta, self.pair_distance) * self.pair_weight
            force = (push - push.flatten(0, 1).index_select(0, self.mirror).view_as(push)).sum(0)
        if self.num_solid:
            force = force + self._push(p[:, None] - state.landmarks[: self.num_solid], self.solid_distance).sum(1)
        return force

    def _push(self, delta: Tensor, distance: Tensor) -> Tensor:
        """Force between two bodies delta [..., 2, B] apart that touch at `distance` [..., 1]."""
        d = length(delta).clamp_min(TINY)  # [..., B]
        z = (distance - d) / self.contact_margin
        # softplus(z); the clamp keeps exp off the denormal numbers (ten times slower) and changes no digit of 1 + exp
        depth = self.contact_margin * (z.relu() + (1 + z.abs().clamp_max(40).neg().exp()).log())
        return delta * (self.contact_force * depth / d).unsqueeze(-2)

    def step(self, state: State, action: Tensor, noise: None = None):
        """action: continuous [B, N, A] (clipped to [0, 1]) or discrete [B, N] int64 (below action_sizes, not checked).

        Returns state, obs [B, N, O], reward [B, N], terminated [B] (never), truncated [B] (at the horizon), info {}.
        """
        direction, message = self._decode(action)
        position, velocity = state.position, state.velocity
        if self.anybody_moves:
            force = self.accel_scale * self.accel * direction
            if self.task.collide:
                force = force + self._contact(state)
            # mpe2 moves with the old velocity: an action shows in the position one step later
            dt = self.dt * self.moves
            position = position + dt * velocity
            velocity = (1 - self.damping * self.moves) * velocity + force / self.mass * dt
            if self.speed_limited:
                limit = self.max_speed_scale * self.max_speed  # [N, 1, 1 or B]
                velocity = velocity * (limit / length(velocity)[:, None].clamp_min(TINY)).clamp_max(1.0)
        state = State(position, velocity, state.landmarks, state.goal, message, state.t + 1)
        truncated = state.t >= self.horizon
        return state, self.observe(state), self.task.reward(self, state).T, torch.zeros_like(truncated), truncated, {}

    def global_state(self, state: State) -> Tensor:
        """[B, G] for centralised critics: positions of all agents (x0 y0 x1 y1 ...), their velocities, positions of all
        landmarks, each goal one-hot over the landmarks, each speaker's message."""
        goals = one_hot(state.goal, self.num_landmarks, 0.0, 1.0, self.dtype).flatten(0, 1)
        parts = (state.position, state.velocity, state.landmarks, state.message)
        position, velocity, landmarks, message = (part.flatten(0, 1) for part in parts)
        return torch.cat((position, velocity, landmarks, goals, message)).T

    def render(self, state: State, index: int = 0, size: int = 400) -> np.ndarray:
        """[size, size, 3] uint8 picture of one environment: landmarks, ringed goals, agents by team, what is said."""
        position, marks = (v[..., index].tolist() for v in (state.position, state.landmarks))
        big = 3 * size  # drawn large and scaled down, which smooths the circles
        scale = big / 2 / max(1.2, *(abs(c) + 0.1 for p in position + marks for c in p))  # pixels per length
        image = Image.new("RGB", (big, big), "white")

        def disc(p, radius, shape="ellipse", **style):
            x, y, r = big / 2 + scale * p[0], big / 2 - scale * p[1], scale * radius
            getattr(ImageDraw.Draw(image), shape)((x - r, y - r, x + r, y + r), width=6, **style)

        disc((0, 0), 1.0, "rectangle", outline=(225, 225, 225))  # the arena
        groups = [group for group in self.task.landmarks for _ in range(group.count)]
        for group, p in sorted(zip(groups, marks), key=lambda pair: -pair[0].size):
            disc(p, group.size, fill=group.colour)
        for ring, k in enumerate(state.goal[:, index].tolist()):
            disc(marks[k], groups[k].size + 0.03 * (ring + 1), outline=(ORANGE, GREEN)[ring])
        roles = [role for role in self.task.roles for _ in role.names]
        for role, p in zip(roles, position):
            disc(p, role.size, fill=role.colour, outline="black")
        image, font = image.resize((size, size), Image.Resampling.LANCZOS), ImageFont.load_default(13)
        for k, said in enumerate(state.message[..., index].tolist()):
            text = f"{self.agents[k]}:  " + "  ".join(f"{v:.1f}" for v in said)
            ImageDraw.Draw(image).text((8, 6 + 16 * k), text, fill="black", font=font)
        return np.asarray(image)


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_agents: int | None = None,
    continuous_actions: bool = True,
    **fields,
) -> ParticleEnv:
    """`fields` set the physical constants of `ParticleEnv` by name."""
    if env_id not in TASKS:
        raise ValueError(f"env_id must be one of {', '.join(TASKS)}, got {env_id!r}")
    for name in fields:
        if name not in FIELDS:
            raise ValueError(f"fields of {env_id} are {', '.join(FIELDS)}, got {name!r}")
    return ParticleEnv(env_id, num_envs, torch.device(device), dtype, num_agents, continuous_actions, **fields)


def random_action(env: ParticleEnv, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(env.num_envs, env.num_agents, max(env.action_sizes), generator=generator).to(env.device)
    return (uniform[..., 0] * env.action_mask.sum(1)).long() if env.discrete else uniform.to(env.dtype)


def write_gif(env: ParticleEnv, path: str):
    """One episode of environment 0 with random actions, each held for five steps, so that something moves."""
    generator = torch.Generator().manual_seed(0)
    state, _ = env.reset([generator])
    frames = [env.render(state)]
    for t in range(env.horizon):
        if t % 5 == 0:
            action = random_action(env, generator)
        state, *_ = env.step(state, action, None)
        frames.append(env.render(state))
    save_gif(path, frames)


def main(
    env_id: str = "simple_spread_v3",
    num_envs: int = 8192,
    num_agents: int | None = None,
    discrete: bool = False,
    device: str = "cpu",
    threads: int = 1,
    compile: bool = False,
    seconds: float = 2.0,
    gif: str | None = None,
):
    """Measure env steps/s with random actions, and write a GIF of a random policy.

    Args:
        env_id: one of the tasks
        num_envs: environments in the batch
        num_agents: agents (spread only)
        discrete: discrete instead of continuous actions
        device: torch device
        threads: CPU threads
        compile: measure the compiled step too
        seconds: how long to measure
        gif: where to write the GIF
    """
    torch.set_num_threads(threads)
    options = {"device": device, "num_agents": num_agents, "continuous_actions": not discrete}
    env = make(env_id, num_envs, **options)
    print(f"{env_id}, {env.num_agents} agents, {num_envs} environments, {threads} threads")
    generator = torch.Generator().manual_seed(0)
    print_speed(env, [random_action(env, generator) for _ in range(5)], seconds, compile)
    if gif:
        write_gif(make(env_id, 1, **options), gif)
        print(f"wrote {gif}")


if __name__ == "__main__":
    with runs.quiet_pipe():
        tyro.cli(main)
