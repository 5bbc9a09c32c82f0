"""Signalised grids of streets after SUMO 1.28, batched: ERNIE's traffic environment (Bukharin et al. 2023, appendix C).

    env = make("traffic_grid_v0", num_envs=256)                       # 2 x 2 lights, 700 cars an hour at every entry
    state, obs = env.reset([torch.Generator().manual_seed(0)])
    noise = env.draw(generators)
    state, obs, reward, terminated, truncated, info = env.step(state, action, noise)

Every street is a chain of cars in entry order on one lane, straight from its entry to its exit, so that a car's leader
is its neighbour in the tensor. A step is SUMO's second (Euler update): lights, speeds from the state before, positions,
cars that reach the exit leave, at most one car enters per street. Rules and constants are SUMO's (MSVehicle.cpp,
MSCFModel.cpp, MSCFModel_Krauss.cpp, MSCFModel_IDM.cpp; docstrings name the functions) and those of ERNIE's environment
(github.com/abukharin3/ERNIE). Left out: turns, lane changes, teleporting, and cars that wait for crossing traffic still
on the junction. The last shows car by car in cycles below 40 s and with IDM; means stay within a few percent. ERNIE's
code reads the index of a light from one digit of its name, which mixes up more than ten lights; not so here.

Speed, and a GIF of the fixed-time controller:

    python -m envs.traffic --compile --capacity 96 --gif traffic.gif

Axes: B environments, L lights (row-major from the bottom left), K = 2 columns + 2 rows streets (southbound columns,
northbound columns, eastbound rows, westbound rows: the order of `flow`), M lights that the longest street passes, so
that it has M + 1 edges, N places for cars per street, O = 22 observation entries. Tensors inside are batch-last
([K, N, B]), so that elementary operations run along contiguous memory; the interface is batch-first. Units: m, s, m/s,
cars per hour.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from envs import Description, can_compile, runs, save_gif

FLOWS = {  # cars per hour at each entry; the paper's training flow and its table 1
    "train": (700,) * 8,
    "flow1": (1000, 1000, 80, 80, 800, 800, 550, 550),
    "flow2": (1000, 1000, 20, 20, 700, 300, 900, 900),
    "flow3": (700, 700, 70, 700, 1400, 600, 80, 80),
    "flow4": (1000, 1200, 200, 200, 300, 300, 900, 900),
    "flow5": (300, 300, 900, 900, 700, 900, 10, 10),
}
TERMS = {"queue": -0.5, "wait": -0.5, "delay": -0.5, "emergency": -0.25, "switch": -1.0, "passed": 1.0}  # of the reward
FAR = 1e6  # position of an empty place: a leader there has no influence
EPS = 1e-3  # SUMO's NUMERICAL_EPS
DEPART = 5.1  # m, front of a car that enters
INITIAL = 6.0  # m, front of the car that stands on each street at first
YELLOW = 3  # s
MIN_GREEN = 1  # s; a switch is obeyed once `since` is as much, hence 2 s of green at least
RED = 0
AMBER = 1
GREEN = 2
INSERTION_STEPS = 6  # of IDM's recursion for the speed of an entering car
NEVER = 2**53  # ms between the cars of an entry without any
POSITIVE = ("speed", "speed_limit", "accel", "decel", "emergency_decel", "tau")
PER_ENV = (*POSITIVE, "sigma", "speed_dev", "min_gap")  # fields that may be a value per environment
HALF_JUNCTION = 0.09  # edges, in pictures
LANE = 0.045  # edges, in pictures
LAMPS = ((220, 40, 40), (250, 200, 40), (60, 220, 80))  # of RED, AMBER, GREEN


@dataclasses.dataclass
class State:
    """Each street is a ring of places: a car's leader is in the place before its own, the newest car before `tail`."""

    position: Tensor  # [K, N, B] front of each car from the start of its street, FAR where there is none
    speed: Tensor  # [K, N, B]
    max_speed: Tensor  # [K, N, B] the car's own limit
    waiting: Tensor  # [K, N, B] s the car has stood on its edge
    tail: Tensor  # [K, B] place of the next car to enter
    entered: Tensor  # [K, B] int64, cars that entered, initial ones included
    left: Tensor  # [K, B] int64, cars that reached the exit
    overflow: Tensor  # [K, B] int64, seconds in which a car could enter but all N - 1 places were taken
    direction: Tensor  # [L, B] int64, 0: north-south has green (or will have, after yellow), 1: east-west
    since: Tensor  # [L, B] int64, s since the last change
    yellow: Tensor  # [L, B] bool
    t: Tensor  # [B] int64, s since reset
    started: Tensor  # [K, B] int64, those of `entered` that did not come from the flow


@dataclasses.dataclass
class Occupancy:
    """Which cars are where."""

    rank: Tensor  # [K, N, B] order of entry in the street, N - 1 for the newest car
    on_edge: Tensor  # [M + 1, K, N, B]
    on_junction: Tensor  # [M, K, N, B] after each line
    incoming: Tensor  # [M, K, N, B] on an edge that ends at a light
    last: Tensor  # [M, K, B] rank of the newest car on the edge after each line, -1 where there is none


def pick(mask: Tensor, values: Tensor, dim: int = 0) -> Tensor:
    """The one of `values` whose mask [M, K, N, B] is true, or 0."""
    return torch.where(mask, values, 0).sum(dim)


def nearest(mask: Tensor, values: Tensor, dim: int = 0) -> Tensor:
    """The smallest of the positions `values` whose mask [M, K, N, B] is true, or FAR."""
    return torch.where(mask, values, FAR).amin(dim)


def newest(mask: Tensor, rank: Tensor) -> Tensor:
    """Rank of the newest car of each edge [M, K, N, B] -> [M, K, B], -1 where there is none."""
    return torch.where(mask, rank, -1.0).amax(2)


def count(mask: Tensor) -> Tensor:
    """Cars of each edge, as float: mask [M, K, N, B] -> [M, K, B]."""
    return torch.where(mask, 1.0, 0.0).sum(2)


def total(values: Tensor) -> Tensor:
    """Sum over the cars of each edge, [M, K, N, B] -> [M, K, B]; in float64, so that rounding does not depend on B."""
    return values.sum(2, dtype=torch.float64).to(values.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Traffic(Description):
    """A description without state; `dataclasses.replace(env, speed=30.0)` is the same task with slower cars. The
    defaults are those of ERNIE's code, where IDM is Flow's default. Fields typed `float | Tensor` take a number or a
    value per environment [B]; `flow` also takes [B, K]."""

    env_id: str
    num_envs: int
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    rows: int = 2
    cols: int = 2
    lengths: float | Sequence[Sequence[float]] = 400.0  # m, of all edges, or of the edges of each street as it drives
    junction: float = 18.8  # m, a lane across a junction
    flow: str | float | Sequence[float] | Tensor = 700.0  # cars per hour: a name in FLOWS, one number, or one per entry
    speed: float | Tensor = 35.0  # m/s, limit of the vehicles, and their speed on entry where depart is "fixed"
    speed_limit: float | Tensor = 35.0  # m/s, of the lanes; normalises the delay term
    depart: str = "fixed"  # or "max", as fast as is safe; "fixed" waits until `speed` is safe
    initial_cars: bool = True  # one standing car on each entry edge
    model: str = "idm"  # car-following: "idm" or "krauss" (SUMO's default)
    sigma: float | Tensor = 0.5  # dawdling of Krauss drivers
    speed_dev: float | Tensor = 0.1  # spread of the drivers' speed factors around 1, cut to [0.2, 2]
    accel: float | Tensor = 2.6  # m/s^2
    decel: float | Tensor = 4.5  # m/s^2
    emergency_decel: float | Tensor = 9.0  # m/s^2
    tau: float | Tensor = 1.0  # s, headway
    min_gap: float | Tensor = 2.5  # m
    car_length: float = 5.0  # m
    # m/s: an emergency stop is v(t) - v(t-1) <= -(decel + tolerance). At 0, as in the paper's code, it is mostly Krauss
    # cars that brake at exactly 4.5; 1e-3 leaves the 2% that brake harder
    emergency_tolerance: float = 0.0
    horizon: int = 3000  # steps of an episode, warm-up not counted
    warmup: int = 0  # s of random switching before reset returns (the paper evaluates after 1000)
    capacity: int | None = None  # N, places per street; None: as many standing cars as fit, so that nothing overflows

    discrete: ClassVar[bool] = True
    action_low: ClassVar[float] = 0.0
    action_high: ClassVar[float] = 1.0

    def __post_init__(self):
        self._set(device=torch.device(self.device))
        self._check()
        for name in PER_ENV:
            value = torch.as_tensor(getattr(self, name))
            value = value.to(self.device, self.dtype) if value.ndim else value.item()
            self._set(**{name: value})
        self._set(num_agents=self.rows * self.cols, num_streets=2 * (self.rows + self.cols))
        self._build_streets()
        self._build_lights()
        self._build_cars()

    # ---------------------------------------------------------------------------------------------------- step

    def reset(self, generators: list[torch.Generator], step: Callable | None = None) -> tuple[State, Tensor]:
        """Generator k alone draws the k-th block of num_envs / len(generators) environments. Every tenth second of the
        warm-up each light switches with probability 1/2, as in ERNIE's code; `step` may be a compiled one."""
        if self.num_envs % len(generators):
            raise ValueError(f"num_envs must be a multiple of the {len(generators)} generators, got {self.num_envs}")
        step = step or self.step
        state = self.make_state(torch.full((1, self.num_streets, 1), INITIAL) if self.initial_cars else None)
        for t in range(self.warmup):
            switch = self._block(torch.rand, generators, self.num_agents).T < 0.5
            state, *_ = step(state, switch.long() * (t % 10 == 0), self.draw(generators))
        return state, self.observe(state)

    def draw(self, generators: list[torch.Generator]) -> tuple[Tensor | None, Tensor | None] | None:
        """The random numbers of one step: uniform [K, N, B] for dawdling, normal [K, B] for the speed factor of a car
        that enters. IDM at a fixed entry speed needs none."""
        if not (self.dawdles or self.spreads):
            return None
        dawdle = self._block(torch.rand, generators, self.num_streets, self.num_places) if self.dawdles else None
        spread = self._block(torch.randn, generators, self.num_streets) if self.spreads else None
        return dawdle, spread

    def make_state(self, position=None, speed=None, max_speed=None) -> State:
        """A state at t = 0 from arrays [B or 1, K, n <= N - 1] of cars, front first and NaN where there is none."""
        shape = (self.num_envs, self.num_streets, self.num_places)
        position = torch.empty(1, self.num_streets, 0) if position is None else torch.as_tensor(position)
        n = position.shape[-1]
        if n >= self.num_places:
            raise ValueError(f"capacity must be above the {n} cars of a street, got {self.num_places}")

        def places(values):
            """[K, N, B], NaN where there is no car."""
            padded = torch.full(shape, math.nan, dtype=self.dtype, device=self.device)
            padded[..., :n] = torch.as_tensor(values)
            return padded.permute(1, 2, 0).contiguous()

        x = places(position)
        there = ~x.isnan()
        cars = there.sum(1)
        limit = torch.full_like(x, math.inf).clamp_max(self.speed).clamp_max(self.speed_limit)
        lights = cars.new_zeros(self.num_agents, self.num_envs)
        return State(
            position=torch.where(there, x, FAR),
            speed=torch.zeros_like(x) if speed is None else torch.where(there, places(speed), 0),
            max_speed=limit if max_speed is None else torch.where(there, places(max_speed), limit),
            waiting=torch.zeros_like(x),
            tail=cars.to(self.dtype),
            entered=cars,
            left=torch.zeros_like(cars),
            overflow=torch.zeros_like(cars),
            direction=lights,
            since=torch.zeros_like(lights),
            yellow=torch.zeros_like(lights, dtype=torch.bool),
            t=cars.new_zeros(self.num_envs),
            started=cars.clone(),
        )

    def step(self, state: State, action: Tensor, noise: tuple | None = None):
        """action [B, L] int64: 0 keeps the lights, 1 switches them if they are neither yellow nor too young.

        Returns state, obs [B, L, O], reward [B, L], terminated [B] (never), truncated [B] (at the horizon), info. Of
        info, the TERMS of the reward are [B, L], weighted; the cars in the network, those that entered, left or found
        no place in this second and those that wait outside are [B].
        """
        before, begins = self.signals(state, action)
        state = self.advance(before, self.aspect(before), noise)
        edges = self.edges(state)
        info = self._reward_terms(before, state, edges, begins)
        reward = sum(info.values())
        for name in ("entered", "left", "overflow"):
            info[name] = (getattr(state, name) - getattr(before, name)).sum(0)
        info["backlog"] = self.backlog(state).sum(0)
        info["vehicles"] = (state.entered - state.left).sum(0)
        truncated = state.t >= self.horizon + self.warmup
        return state, self._observe(state, edges), reward, torch.zeros_like(truncated), truncated, info

    # -------------------------------------------------------------------------------------------------- lights

    def signals(self, state: State, action: Tensor) -> tuple[State, Tensor]:
        """The state with the lights of the coming second, and which of them [L, B] turn yellow in it; action [B, L]."""
        since = state.since + 1
        turns_green = state.yellow & (since >= YELLOW)
        begins = ~state.yellow & (action.T.contiguous() == 1) & (state.since >= MIN_GREEN)
        direction = torch.where(begins, 1 - state.direction, state.direction)
        since = torch.where(turns_green | begins, 0, since)
        yellow = (state.yellow & ~turns_green) | begins
        return dataclasses.replace(state, direction=direction, since=since, yellow=yellow), begins

    def aspect(self, state: State) -> Tensor:
        """[M + 1, K, B] RED, AMBER or GREEN at the end of each edge, GREEN at exits. During yellow, `direction` is
        already the next one."""
        served = state.direction[self.light] == self.axis[:, None]
        changing = state.yellow[self.light]
        next_green = torch.where(changing, RED, GREEN)
        next_red = torch.where(changing, AMBER, RED)
        colour = torch.where(served, next_green, next_red)
        return torch.where(self.signalled, colour, GREEN).to(self.dtype)

    # ---------------------------------------------------------------------------------------------------- cars

    def advance(self, state: State, aspect: Tensor, noise: tuple | None = None) -> State:
        """One second of traffic under given lights: everything of a step but the signals. aspect [M + 1, K, B]: RED,
        AMBER or GREEN at the end of each edge during that second."""
        dawdle, spread = (None, None) if noise is None else noise
        x, v = self.drive(state, aspect, dawdle)
        # MSVehicle::hasArrived: a front within 0.1 m of the exit is through
        x = torch.where(x > self.exit - 0.1, FAR, x)
        v = torch.where(x < FAR, v, 0)
        return self._enter(dataclasses.replace(state, position=x, speed=v), spread)

    def drive(self, state: State, aspect: Tensor, dawdle: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Positions and speeds [K, N, B] one second later, before cars leave and enter."""
        x, v = state.position, state.speed
        occupancy = self._occupancy(state)
        to_stop, barrier = self._stops(state, aspect, occupancy)
        gap = x.roll(1, 1) - self.car_length - self.min_gap - x  # to the leader, beyond min_gap
        if self.model == "krauss":
            safe = torch.minimum(self.krauss_follow(v, gap, v.roll(1, 1)), self.stop_speed(to_stop))
        else:
            safe = self._idm_safe(state, aspect, occupancy, gap, to_stop)
        top = torch.minimum(torch.minimum(v + self.accel, state.max_speed), safe)
        hardest = torch.maximum(top, v - self.emergency_decel).relu()
        low = torch.minimum((v - self.decel).relu(), hardest)
        new = torch.maximum(low, top)
        if dawdle is not None:
            new = torch.maximum(new - self.sigma * dawdle * new.clamp_max(self.accel), low)
        new = torch.where(x < FAR, new, 0)
        moved = x + new
        return torch.minimum(moved, barrier), torch.where(moved > barrier, 0, new)

    def _incoming(self, x: Tensor) -> Tensor:
        """[M, K, N, B] cars at x on the edges that end at lights."""
        return (x > self.begin[:-1]) & (x <= self.line)

    def _occupancy(self, state: State) -> Occupancy:
        x = state.position
        rank = self.place - state.tail[:, None]
        rank = torch.where(rank < 0, rank + self.num_places, rank)
        on_edge = (x > self.begin) & (x <= self.end)
        on_junction = (x > self.line) & (x <= self.begin[1:])
        return Occupancy(rank, on_edge, on_junction, self._incoming(x), newest(on_edge[1:], rank))

    def _stops(self, state: State, aspect: Tensor, occupancy: Occupancy) -> tuple[Tensor, Tensor]:
        """How far each car may go to stop before its next line, FAR where it need not; and the red line that it
        cannot pass, [K, N, B] each."""
        x = state.position
        next_line = (x > self.previous) & (x <= self.line)  # [M, K, N, B], at most one of M
        line = pick(next_line, self.line)
        colour = torch.where(next_line, aspect[:-1, :, None], GREEN).amin(0)
        red = colour == RED
        distance = torch.where(line > 0, line - x, FAR)
        brake = self.brake_distance(state.speed)
        can_stop = distance >= brake
        # nobody enters a junction that he cannot leave behind those before him
        admitted = nearest(occupancy.incoming, self._admitted(state, aspect, occupancy)[:, :, None])
        blocked = (occupancy.rank > admitted - 1) & (distance >= brake + 0.1)
        must_stop = red | blocked | ((colour == AMBER) & can_stop)
        offset = torch.where(can_stop, (distance - brake).clamp(0.1, 1.0), 1.0)
        to_stop = torch.where(must_stop, (distance - offset).relu(), FAR)
        # SUMO stops at the line, in no time, a car that could stop neither before it nor pass during yellow
        return to_stop, torch.where(red, line, 2 * FAR)

    def _admitted(self, state: State, aspect: Tensor, occupancy: Occupancy) -> Tensor:
        """[M, K, B] the rank below which the edge after each line has room for a car.

        MSVehicle::checkRewindLinkLanes, MSLane::getSpaceTillLastStanding: standing cars count where they are, cars on
        the junction and moving ones behind the last standing one with their length and gap.
        """
        v = state.speed
        on_edge = occupancy.on_edge[1:]
        begin = self.begin[1:, :, 0]
        size = self.car_length + self.min_gap
        standing = on_edge & (v < 0.1)
        rear = nearest(standing, state.position + v * self.tau, 2)
        moving = occupancy.last - newest(standing, occupancy.rank)  # cars behind the last standing one
        free = torch.where(rear < FAR, rear - self.car_length - begin - size * moving, FAR)
        # where all move but the light is closed, they will stand
        will_stand = (aspect[1:] < GREEN) & (rear >= FAR)
        free = torch.where(will_stand, self.end[1:, :, 0] - begin - size * count(on_edge), free)
        free = free - size * count(occupancy.on_junction)
        first = torch.where(occupancy.on_edge[:-1], occupancy.rank, self.num_places).amin(2)
        return first + free / size

    def _enter(self, state: State, spread: Tensor | None) -> State:
        """At most one car enters each street, at its tail, and the second is over."""
        x, tail = state.position, state.tail
        last_place = self.num_places - 1
        inside = torch.where(x < FAR, 1.0, 0.0).sum(1)  # [K, B]
        safe, speed, max_speed = self._entry(state, spread)
        wants = safe & (self.due(state.t) > state.entered - state.started)
        # an empty place parts the last car from the first; floats, since compiled code reads masks slowly from memory
        enters = torch.where(wants & (inside < last_place), 1.0, 0.0)
        new = self.place == torch.where(enters > 0, tail, -1.0)[:, None]  # [K, N, B]
        v = torch.where(new, speed[:, None], state.speed)
        after = torch.where(tail == last_place, 0, tail + 1)
        return dataclasses.replace(
            state,
            position=torch.where(new, DEPART, x),
            speed=v,
            max_speed=torch.where(new, max_speed[:, None], state.max_speed),
            waiting=torch.where(v <= 0.1, torch.where(new, 0, state.waiting) + 1, 0),
            tail=torch.where(enters > 0, after, tail),
            entered=state.entered + enters.long(),
            left=state.entered - inside.long(),
            overflow=state.overflow + (wants & (inside >= last_place)),
            t=state.t + 1,
        )

    def _entry(self, state: State, spread: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """MSLane::isInsertionSuccess: may a car enter behind the last one, how fast, and its own limit, [K, B] each."""
        # reductions, where a gather would be recomputed for every place of the street once compiled
        x_last = state.position.amin(1)
        last = torch.where(state.tail == 0, self.num_places - 1, state.tail - 1)
        v_last = pick(self.place == last[:, None], state.speed, 1)
        own = torch.zeros_like(x_last) + self.speed
        if self.depart == "max":  # "fixed": SUMO raises the driver's factor until the speed is legal
            factor = 1.0 if spread is None else (1 + self.speed_dev * spread).clamp(0.2, 2.0)
            own = own.clamp_max(self.speed_limit * factor)
        gap = x_last - self.car_length - self.min_gap - DEPART
        if self.model == "krauss":
            fast = self.stop_speed(gap + self.brake_distance(v_last), self.tau)
        else:
            fast = self._idm_entry_speed(gap, v_last, own)
        if self.depart == "fixed":
            return (gap >= 0) & (fast >= own), own, own
        return gap >= 0, torch.minimum(fast, own), own

    def due(self, t: Tensor) -> Tensor:
        """[K, B] cars that the flow has brought to each entry by time t [B]; the first comes at 0."""
        return (t * 1000 // self.period + 1) * (self.period < NEVER)

    def backlog(self, state: State) -> Tensor:
        """[K, B] cars due in the last second or before that wait outside."""
        return self.due(state.t - 1) * (state.t > 0) - (state.entered - state.started)

    # ------------------------------------------------------------------------------------------- car-following

    def brake_distance(self, v: Tensor) -> Tensor:
        """MSCFModel::brakeGapEuler without headway."""
        k = (v / self.decel).floor()
        return k * v - 0.5 * self.decel * k * (k + 1)

    def stop_speed(self, gap: Tensor, tau: float | Tensor = 1.0) -> Tensor:
        """MSCFModel::maximumSafeStopSpeedEuler: the speed from which braking, begun in a second, ends within `gap`."""
        g = (gap - EPS).relu()
        b = self.decel
        root = (1 + 4 * (2 * g / b - tau + tau**2)).sqrt()
        n = (0.5 - tau + 0.5 * root).floor()
        speed = n * b + (g - 0.5 * b * n * (n - 1) - n * b * tau) / (n + tau)
        return torch.where(gap < EPS, 0, speed)

    def krauss_follow(self, v: Tensor, gap: Tensor, v_leader: Tensor) -> Tensor:
        """MSCFModel::maximumSafeFollowSpeed with calculateEmergencyDeceleration."""
        b = self.decel
        safe = self.stop_speed(gap + self.brake_distance(v_leader), self.tau)
        needed = 0.5 * v**2 / (gap + v_leader**2 / (2 * b))
        needed = torch.where(needed <= b, needed, 0.5 * (v**2 - v_leader**2) / gap)
        needed = torch.where(gap <= 0, self.emergency_decel, needed)
        braking = torch.minimum((1.2 * needed).clamp_min(b), v - safe)
        return torch.where(v - safe > b + EPS, (v - braking).relu(), safe)

    def idm(self, v: Tensor, gap: Tensor, v_leader: Tensor | float, own: Tensor, standstill: float | Tensor) -> Tensor:
        """MSCFModel_IDM::_v, four steps of 0.25 s; `gap` includes the standstill distance."""
        closing = 0.5 / (self.accel * self.decel) ** 0.5
        inverse = 1 / own
        for _ in range(4):
            desired = standstill + (v * (self.tau + (v - v_leader) * closing)).relu()
            gap = (gap - EPS).relu() + EPS  # compiled, half the instructions of clamp_min
            v = (v + 0.25 * self.accel * (1 - ((v * inverse) ** 2) ** 2 - (desired / gap) ** 2)).relu()
            gap = gap - 0.25 * (v - v_leader).relu()
        return v

    def idm_stop(self, v: Tensor, gap: Tensor, own: Tensor) -> Tensor:
        """MSCFModel_IDM::stopSpeed, no further than the gap."""
        speed = self.idm(v, gap, 0.0, own, 0.0)
        speed = torch.where((v < EPS) & (speed < EPS), self.stop_speed(gap), speed)
        return torch.where(gap < 0.01, 0, torch.minimum(speed, gap))

    def _idm_safe(self, state: State, aspect: Tensor, occupancy: Occupancy, gap: Tensor, to_stop: Tensor) -> Tensor:
        """IDM obeys each of the cars and lights that SUMO looks ahead to, not the nearest alone: its leader, and past a
        line that need not stop it, the newest car on the junction, the newest on the next edge and the next light."""
        x, v = state.position, state.speed
        own = state.max_speed
        passes = to_stop >= FAR

        def behind(viewers, cars, last):
            """Safe speed of `viewers` behind the one of `cars` [M, K, N, B] whose rank is `last` [M, K, B]."""
            v_last = pick(cars & (occupancy.rank == last[:, :, None]), v, 2)
            x_last = nearest(cars, x, 2)
            gap = torch.where(passes, nearest(viewers, x_last[:, :, None]) - self.car_length - x, FAR)
            speed = self.idm(v, gap, pick(viewers, v_last[:, :, None]), own, self.min_gap)
            return torch.where(gap < FAR / 2, speed, FAR)

        v_leader = torch.where(gap > FAR / 2, own, v.roll(1, 1))
        safe = self.idm(v, gap + self.min_gap, v_leader, own, self.min_gap)
        crossing = newest(occupancy.on_junction, occupancy.rank)
        safe = torch.minimum(safe, behind(occupancy.incoming, occupancy.on_junction, crossing))
        before_edge = (x > self.begin[:-1]) & (x <= self.begin[1:])  # [M, K, N, B], the junction there included
        safe = torch.minimum(safe, behind(before_edge, occupancy.on_edge[1:], occupancy.last))
        closed = occupancy.incoming & (aspect[1:] < GREEN)[:, :, None]
        to_next = nearest(closed, self.following) - x - 1  # always enough to brake in
        return torch.minimum(safe, self.idm_stop(v, torch.where(passes, to_next, to_stop), own))

    def _idm_entry_speed(self, gap: Tensor, v_last: Tensor, own: Tensor) -> Tensor:
        """MSCFModel_IDM::insertionFollowSpeed, a recursion that ends after few steps."""
        root = 2 * (self.accel * self.decel) ** 0.5
        speed = own
        settled = gap < 0
        slower = self.idm(speed, gap + self.min_gap, v_last, own, self.min_gap)
        for _ in range(INSERTION_STEPS):
            settled = settled | (gap >= (speed * self.tau + speed * (speed - v_last) / root).relu())
            speed = torch.where(settled, speed, slower)
            slower = self.idm(speed, gap + self.min_gap, v_last, own, self.min_gap)
            settled = settled | (speed - slower < 1)
        return speed

    # ------------------------------------------------------------------------------ observations and rewards

    def edges(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queue (cars at 1 m/s or less), mean waiting time, delay (1 if empty) and number of cars, [M, K, B] each."""
        v = state.speed
        incoming = self._incoming(state.position)
        cars = count(incoming)
        queue = count(incoming & (v <= 1))
        wait = total(torch.where(incoming, state.waiting, 0)) / cars.clamp_min(1)
        delay = 1 - total(torch.where(incoming, v, 0)) / (cars + 1e-5) / self.speed_limit
        return queue, wait, delay, cars

    def approaches(self, values: Tensor) -> Tensor:
        """[M, K, B] of the edges that end at lights -> [L, 4, B] of each light's, from W, S, E, N."""
        return values.to(self.dtype).flatten(0, 1)[self.approach]

    def observe(self, state: State) -> Tensor:
        """[B, L, O]: of the incoming edges from W, S, E, N the queues, waiting times, delays and numbers of cars;
        direction of the light; seconds since it changed; its index modulo 4, one-hot. Nothing is normalised."""
        return self._observe(state, self.edges(state))

    def _observe(self, state: State, edges: tuple[Tensor, ...]) -> Tensor:
        lights = torch.stack((state.direction, state.since), 1).to(self.dtype)  # [L, 2, B]
        index = self.one_hot.expand(-1, -1, self.num_envs)
        return torch.cat((*map(self.approaches, edges), lights, index), 1).permute(2, 0, 1)

    def _reward_terms(self, before: State, after: State, edges: tuple, begins: Tensor) -> dict[str, Tensor]:
        """The weighted TERMS of the reward [B, L]."""
        queue, wait, delay, _ = edges
        incoming = self._incoming(after.position)
        brakes = after.speed - before.speed <= -(self.decel + self.emergency_tolerance)
        passed = self._incoming(before.position) & (after.position > self.line)
        terms = {"queue": queue, "wait": wait, "delay": delay}
        terms["emergency"] = count(incoming & brakes)
        terms["passed"] = count(passed)
        terms = {name: self.approaches(value).sum(1) for name, value in terms.items()}
        terms["switch"] = begins.to(self.dtype)
        return {name: (weight * terms[name]).T for name, weight in TERMS.items()}

    def global_state(self, state: State) -> Tensor:
        """[B, 18 L] for centralised critics: the first 17 observations of each light, then the ages of all lights."""
        obs = self.observe(state)
        return torch.cat((obs[..., :17].flatten(1), obs[..., 17]), 1)

    def close(self):
        """Nothing to stop here; SUMO has its processes."""

    # ------------------------------------------------------------------------------------------------ pictures

    def render(self, state: State, index: int = 0, size: int = 400) -> np.ndarray:
        """[size, size, 3] uint8 picture of one environment, all edges drawn equally long: cars from red (standing) to
        green (at the speed limit), the colour of the light at each stop line, and how many cars wait outside."""
        big = 3 * size  # drawn large and scaled down, which smooths
        scale = big / (max(self.rows, self.cols) + 1)  # pixels per edge
        image = Image.new("RGB", (big, big), (70, 110, 75))
        canvas = ImageDraw.Draw(image)
        font = ImageFont.load_default(big // 35)

        def pixel(street, driven, side=1.0):
            x, y = self._drawn_at(street, driven, side)
            return big / 2 + scale * (x - (self.cols - 1) / 2), big / 2 - scale * (y - (self.rows - 1) / 2)

        def disc(place, radius, colour):
            x, y = place
            r = radius * scale
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)

        for k, lengths in enumerate(self.edge_lengths):
            canvas.line((pixel(k, 0), pixel(k, len(lengths))), fill=(60, 60, 65), width=int(scale * LANE * 2))
        position = state.position[..., index]  # [K, N]
        begin = self.begin[..., 0].double().clamp_min(0)
        driven = ((position - begin) / (self.end[..., 0] - begin)).clamp(0, 1).sum(0)  # [K, N] edges
        limit = torch.as_tensor(self.speed_limit).expand(self.num_envs)[index].item()
        aspect = self.aspect(state)[..., index].long().tolist()
        backlog = self.backlog(state)[:, index].tolist()
        for k, lengths in enumerate(self.edge_lengths):
            there = position[k] < FAR
            for d, v in zip(driven[k][there].tolist(), state.speed[k, there, index].tolist()):
                share = min(v / limit, 1.0)
                disc(pixel(k, d), 0.02, (round(235 * (1 - share)) + 20, round(200 * share) + 40, 60))
            for m in range(len(lengths) - 1):
                disc(pixel(k, m + 1 - 1e-9, 2.2), 0.022, LAMPS[aspect[m][k]])
            if backlog[k]:
                canvas.text(pixel(k, 0.08, 3.0), f"+{backlog[k]}", "white", font, anchor="mm")
        canvas.text((big * 0.01, big * 0.01), f"{int(state.t[index])} s", "white", font)
        return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))

    def _drawn_at(self, street: int, driven: float, side: float) -> tuple[float, float]:
        """Where a car is drawn that has driven so many edges (1.5: halfway on the second one), in edges from the first
        light, `side` lanes to the right of the middle of the road."""
        R, C = self.rows, self.cols
        num_edges = len(self.edge_lengths[street])
        edge = min(int(driven), num_edges - 1)
        along = edge - 1 + HALF_JUNCTION + (driven - edge) * (1 - 2 * HALF_JUNCTION)
        aside = LANE * side
        if not C <= street < 2 * C + R:  # southwards or westwards
            along = num_edges - 2 - along
            aside = -aside
        if street < 2 * C:
            return street % C + aside, along
        return along, (street - 2 * C) % R - aside

    # ---------------------------------------------------------------------------------- constants and validation

    def _build_streets(self):
        """Edges and lines of each street, -1 in [M, K] tensors where a street is shorter than the longest."""
        R, C = self.rows, self.cols
        K = self.num_streets
        edge_lengths = self._edge_lengths()
        lights = torch.arange(R * C).view(R, C)
        chains = [*lights.flip(0).T, *lights.T, *lights, *lights.flip(1)]  # the lights of each street as it drives
        begin = torch.full((max(R, C) + 1, K), -1.0, dtype=torch.float64)
        end = begin.clone()
        light = torch.zeros_like(begin, dtype=torch.int64)
        for k, (chain, lengths) in enumerate(zip(chains, edge_lengths)):
            n = len(lengths)
            junctions = self.junction * torch.arange(n, dtype=torch.float64)
            end[:n, k] = torch.tensor(lengths, dtype=torch.float64).cumsum(0) + junctions
            begin[1:n, k] = end[: n - 1, k] + self.junction
            light[: n - 1, k] = chain
        signalled = F.pad(begin[1:] > 0, (0, 0, 0, 1))  # another edge follows
        line = torch.where(signalled, end, -1.0)

        def beside_cars(values):
            return values.to(self.device, self.dtype)[..., None, None]

        self._set(
            edge_lengths=edge_lengths,
            begin=beside_cars(begin),  # [M + 1, K, 1, 1] where each edge begins
            end=beside_cars(end),  # [M + 1, K, 1, 1] and ends
            line=beside_cars(line[:-1]),  # [M, K, 1, 1] stop lines
            previous=beside_cars(F.pad(line[:-2], (0, 0, 1, 0), value=-1.0)),  # the stop lines before
            following=beside_cars(line[1:]),  # and those after
            exit=beside_cars(end.amax(0)),  # [K, 1, 1]
            signalled=signalled[..., None].to(self.device),  # [M + 1, K, 1] does the edge end at a light?
            light=light.to(self.device),  # [M + 1, K] index of that light
            axis=(torch.arange(K, device=self.device) >= 2 * C).long(),  # [K] 0: north-south, 1: east-west
        )

    def _build_lights(self):
        R, C = self.rows, self.cols
        K, L = self.num_streets, self.num_agents
        obs_size = 4 * 4 + 2 + 4
        everyone = torch.ones(L, dtype=torch.bool, device=self.device)
        lights = torch.arange(L, device=self.device)
        r, c = lights // C, lights % C
        # the m-th line of street k has index m K + k; streets as in `flow`
        west = c * K + 2 * C + r
        south = r * K + C + c
        east = (C - 1 - c) * K + 2 * C + R + r
        north = (R - 1 - r) * K + c
        self._set(
            agents=tuple(f"light_{i}" for i in range(L)),
            obs_sizes=(obs_size,) * L,
            action_sizes=(2,) * L,
            obs_mask=everyone[:, None].repeat(1, obs_size),
            action_mask=everyone[:, None].repeat(1, 2),
            cooperators=everyone,
            approach=torch.stack((west, south, east, north), 1),  # [L, 4] index of the line from where cars come
            one_hot=F.one_hot(lights % 4, 4).to(self.dtype)[..., None],  # [L, 4, 1] ERNIE tiles 4 trained agents
        )

    def _build_cars(self):
        # cars stand before lights; on its last edge a car leaves the queue behind it at least as far again
        queues = [sum(edges) + self.junction * (len(edges) - 1) - edges[-1] / 2 for edges in self.edge_lengths]
        room = self.car_length + torch.as_tensor(self.min_gap).min().item()
        num_places = self.capacity or 2 + math.ceil(max(queues) / room)
        inflow = self._inflow()
        # SUMO rounds the time between cars to a millisecond; without cars it is infinite here
        period = (3.6e6 / inflow).round().clamp_max(NEVER)
        self._set(
            inflow=inflow.to(self.device),  # [K, 1 or B] cars per hour
            period=period.to(self.device, torch.int64),  # [K, 1 or B] ms
            num_places=num_places,  # N
            place=torch.arange(num_places, dtype=self.dtype, device=self.device)[:, None],  # [N, 1]
            dawdles=self.model == "krauss" and bool(torch.as_tensor(self.sigma).any()),
            spreads=self.depart == "max" and bool(torch.as_tensor(self.speed_dev).any()),
        )

    def _edge_lengths(self) -> list[list[float]]:
        """The edges of each street, m."""
        counts = [self.rows + 1] * 2 * self.cols + [self.cols + 1] * 2 * self.rows
        lengths = self.lengths
        if isinstance(lengths, (int, float)):
            lengths = [[lengths] * count for count in counts]
        lengths = [[float(edge) for edge in street] for street in lengths]
        if [len(street) for street in lengths] != counts:
            raise ValueError(f"lengths must be of {counts} edges per street, got {[len(s) for s in lengths]}")
        short = self.car_length + INITIAL  # an entering car must fit
        fits = all(short <= edge < FAR / 10 for street in lengths for edge in street)
        self._require("lengths", f"{short} m or more", fits)
        return lengths

    def _inflow(self) -> Tensor:
        """[K, 1 or B] float64 cars per hour."""
        K, flow = self.num_streets, self.flow
        if isinstance(flow, str):
            if flow not in FLOWS:
                raise ValueError(f"flow must be one of {', '.join(FLOWS)} or numbers, got {flow!r}")
            flow = FLOWS[flow]
        flow = torch.as_tensor(flow).to("cpu", torch.float64)
        if flow.ndim == 0:
            flow = flow.expand(K)
        if flow.shape not in ((K,), (self.num_envs, K)):
            raise ValueError(f"flow must have {K} entries (or rows of them), got {list(flow.shape)}")
        self._require("flow", "0 or more", bool(((flow >= 0) & flow.isfinite()).all()))
        return flow.reshape(-1, K).T.contiguous()

    def _check(self):
        for name in ("num_envs", "rows", "cols", "horizon"):
            self._require(name, "1 or more", getattr(self, name) >= 1)
        self._require("warmup", "0 or more", self.warmup >= 0)
        self._require("depart", "fixed or max", self.depart in ("fixed", "max"))
        self._require("model", "idm or krauss", self.model in ("idm", "krauss"))
        for name in ("junction", "car_length"):
            self._require(name, "positive", 0 < getattr(self, name) < math.inf)
        self._require("emergency_tolerance", "finite", math.isfinite(self.emergency_tolerance))
        self._require("capacity", "None or 2 or more", self.capacity is None or self.capacity >= 2)
        for name in PER_ENV:
            value = torch.as_tensor(getattr(self, name))
            if value.shape not in ((), (self.num_envs,)):
                raise ValueError(f"{name} must be a number or [num_envs = {self.num_envs}], got {list(value.shape)}")
            positive = name in POSITIVE
            high_enough = value > 0 if positive else value >= 0
            self._require(name, "positive" if positive else "0 or more", bool((high_enough & value.isfinite()).all()))

    def _require(self, name: str, rule: str, holds: bool):
        if not holds:
            raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")


# ------------------------------------------------------------------------- controllers: (env, state) -> action [B, L]


def fixed_time(env: Traffic, state: State, green: int = 27, offset: int = 0) -> Tensor:
    """`green` s for north-south, yellow, `green` s for east-west, yellow; every other light (chequerboard) `offset` s
    later. Lights that are out of phase, as after random switching, fall in step."""
    light = torch.arange(env.num_agents, device=state.t.device)
    lag = offset * ((light // env.cols + light % env.cols) % 2)  # [L]
    wanted = (state.t[:, None] + YELLOW - lag).div(green + YELLOW, rounding_mode="floor") % 2
    return (wanted != state.direction.T).long()


def _switch_for(env: Traffic, state: State, demand: Tensor, min_green: int) -> Tensor:
    """Switch where the red axis has more demand [M, K, B] than the green one."""
    west, south, east, north = env.approaches(demand).unbind(1)
    excess = (west + east - south - north) * torch.where(state.direction == 0, 1, -1)
    return ((excess > 0) & ~state.yellow & (state.since >= min_green - 1)).long().T


def longest_queue(env: Traffic, state: State, min_green: int = 10) -> Tensor:
    queue, *_ = env.edges(state)
    return _switch_for(env, state, queue, min_green)


def max_pressure(env: Traffic, state: State, min_green: int = 10) -> Tensor:
    """Varaiya 2013: cars on the edge before the light minus cars on the edge after it."""
    cars = count((state.position > env.begin) & (state.position <= env.end))  # [M + 1, K, B]
    return _switch_for(env, state, cars[:-1] - cars[1:], min_green)


CONTROLLERS = {"fixed_time": fixed_time, "longest_queue": longest_queue, "max_pressure": max_pressure}


# ------------------------------------------------------------------------------------ driving the lights of a batch


def outcome(reward: Tensor, info: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a second, [B]: the reward of all lights and its terms, cars that left in a minute, cars that wait outside."""
    outcomes = {"reward": reward.sum(1)}
    for name in TERMS:
        outcomes[name] = info[name].sum(1)
    outcomes["left_per_minute"] = 60.0 * info["left"]
    outcomes["backlog"] = 1.0 * info["backlog"]
    return outcomes


def compiled_step(env: Traffic) -> Callable:
    """env.step, compiled, without gradients, on a CPU for any number of environments, or as it is if it cannot be."""
    if not can_compile("the traffic simulator", "compile"):
        return env.step
    torch._dynamo.config.recompile_limit = 32  # on a GPU for each network and number of environments
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal here differ in other networks
    speed = torch.as_tensor(env.speed, dtype=env.dtype, device=env.device).expand(env.num_envs).clone()
    flow = env.inflow.T.expand(env.num_envs, -1).clone(memory_format=torch.contiguous_format)
    # of each environment, as some have them, and no views, which are guarded otherwise: compiled once
    env = dataclasses.replace(env, speed=speed, flow=flow)
    options = {"comprehensive_padding": False, "joint_graph_constant_folding": False}  # the latter compares sizes
    is_cpu = env.device.type == "cpu"
    compiled = torch.compile(env.step, fullgraph=True, dynamic=is_cpu, options=options)
    step = torch.no_grad()(compiled)  # training resets with gradients on and plays with them off: compiled once
    return lambda state, action, noise=None: step(state, action.clone(memory_format=torch.contiguous_format), noise)


@torch.no_grad()
def simulate(env: Traffic, step: Callable, control: Callable, generators: list[torch.Generator]) -> dict[str, Tensor]:
    """Mean outcome of a second [B] over env.horizon seconds after the warm-up, with the lights in the hands of
    control(state, obs) -> action [B, L]; `step` is env.step, or that compiled."""
    state, obs = env.reset(generators, step)
    sums: dict[str, Tensor] = {}
    for _ in range(env.horizon):
        state, obs, reward, _, _, info = step(state, control(state, obs), env.draw(generators))
        for name, value in outcome(reward, info).items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / env.horizon for name, value in sums.items()}


def side_by_side(env: Traffic, points: Sequence[tuple], num_seeds: int) -> Traffic:
    """The environments of `env` as [S, P, E], those of each of P points (name, strength) beside each other: at a point
    "speed" cars drive so fast (m/s), at a point "flow" they come as FLOWS has it under that number, else as in env."""
    if not any(name in ("speed", "flow") for name, _ in points):
        return env
    num_episodes = env.num_envs // (num_seeds * len(points))
    own = env.inflow[:, 0].tolist()
    speeds, flows = [], []
    for name, strength in points:
        speeds.append(strength if name == "speed" else env.speed)
        flows.append(FLOWS[f"flow{strength}"] if name == "flow" else own)
    speed, flow = (
        torch.cat([torch.tensor(values).repeat_interleave(num_episodes, 0)] * num_seeds) for values in (speeds, flows)
    )
    return dataclasses.replace(env, speed=speed, flow=flow)


def twins(env: Traffic, rows: int, cols: int) -> Tensor:
    """[L] the lights of a rows x cols grid whose places the lights of `env` have, when it is tiled with such grids."""
    light = torch.arange(env.num_agents, device=env.device)
    return light // env.cols % rows * cols + light % env.cols % cols


# --------------------------------------------------------------------------------------------------------------- tasks


def lengths_of(nodes: list, south: list, north: list, west: list, east: list) -> tuple[tuple[float, ...], ...]:
    """Edge lengths of each street, from the places (x, y) of the lights [R][C] and of the ends of columns and rows."""

    def lengths(points):
        return tuple(math.dist(a, b) for a, b in zip(points, points[1:]))

    northwards = [lengths(column) for column in zip(south, *nodes, north)]
    eastwards = [lengths([w, *row, e]) for w, row, e in zip(west, nodes, east)]
    southwards = [column[::-1] for column in northwards]
    westwards = [row[::-1] for row in eastwards]
    return (*southwards, *northwards, *eastwards, *westwards)


# The drawn coordinates of ERNIE's CustomTrafficLightGridNetwork1 and 0 ("Atlanta"). Its code leaves all edges at 400 m
# all the same; here, as in its paper, cars drive what is drawn.
IRREGULAR = lengths_of(
    [[(0, 0), (300, 0)], [(0, 550), (300, 550)]],
    south=[(0, -300), (300, -300)],
    north=[(0, 800), (300, 800)],
    west=[(-300, 0), (-300, 550)],
    east=[(600, 0), (600, 550)],
)
ATLANTA = lengths_of(
    [
        [(190, 0), (460, 30), (720, 0), (1020, 20)],
        [(160, 400), (420, 400), (710, 410), (1010, 430)],
        [(130, 800), (390, 810), (700, 820), (1000, 830)],
        [(10, 1200), (360, 1150), (690, 1200), (990, 1230)],
    ],
    south=[(x, -400) for x in (0, 300, 600, 800)],
    north=[(x, 1400) for x in (0, 300, 600, 800)],
    west=[(-400, y) for y in (0, 400, 800, 1200)],
    east=[(1600, y) for y in (0, 400, 800, 1200)],
)
TASKS = {
    "traffic_grid_v0": {},
    "traffic_irregular_v0": {"lengths": IRREGULAR, "flow": 675.0},
    "traffic_atlanta_v0": {"rows": 4, "cols": 4, "lengths": ATLANTA},
}


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_agents: int | None = None,
    continuous_actions: bool = False,
    **fields,
) -> Traffic:
    """`fields` are those of `Traffic` by name. Actions are always discrete: continuous_actions, which other
    environments know, is ignored."""
    if env_id not in TASKS:
        raise ValueError(f"env_id must be one of {', '.join(TASKS)}, got {env_id!r}")
    known = [field.name for field in dataclasses.fields(Traffic)[4:]]
    for name in fields:
        if name not in known:
            raise ValueError(f"fields of {env_id} are {', '.join(known)}, got {name!r}")
    env = Traffic(env_id, num_envs, device, dtype, **TASKS[env_id] | fields)
    if num_agents not in (None, env.num_agents):
        raise ValueError(f"num_agents of {env_id} must be rows * cols = {env.num_agents}, got {num_agents}")
    return env


def measure(step: Callable, env: Traffic, seconds: float) -> tuple[float, float, int]:
    """Environment steps and car updates per second under fixed-time lights, random numbers included, from 200 s on,
    when the streets have filled; and how often a car found no place."""
    generator = torch.Generator().manual_seed(0)
    state, _ = env.reset([generator])
    for _ in range(200):
        state, *_ = step(state, fixed_time(env, state), env.draw([generator]))
    steps, cars = 0, 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(20):
            state, *_, info = step(state, fixed_time(env, state), env.draw([generator]))
        cars += 20 * info["vehicles"].sum().item()  # waits for the device
        steps += 20 * env.num_envs
    elapsed = time.perf_counter() - start
    return steps / elapsed, cars / elapsed, state.overflow.sum().item()


def write_gif(env: Traffic, path: str, controller: Callable, seconds: int = 180):
    """Environment 0 under a controller, every second one of the time after the first two minutes."""
    generator = torch.Generator().manual_seed(0)
    state, _ = env.reset([generator])
    frames = []
    for t in range(120 + seconds):
        state, *_ = env.step(state, controller(env, state), env.draw([generator]))
        if t >= 120:
            frames.append(env.render(state))
    save_gif(path, frames)


def main(
    env_id: str = "traffic_grid_v0",
    num_envs: int = 256,
    model: str = "idm",
    depart: str = "fixed",
    capacity: int | None = None,
    device: str = "cpu",
    threads: int = 1,
    compile: bool = False,
    seconds: float = 2.0,
    gif: str | None = None,
    controller: str = "fixed_time",
):
    """Measure env steps/s and car updates/s under fixed-time lights, and write a GIF.

    Args:
        env_id: one of the tasks
        num_envs: environments in the batch
        model: idm or krauss
        depart: fixed or max
        capacity: places per street; fewer are faster, and cars that find none are reported
        device: torch device
        threads: CPU threads
        compile: measure the compiled step too
        seconds: how long to measure
        gif: where to write the GIF
        controller: who drives the lights of the GIF, one of fixed_time, longest_queue, max_pressure
    """
    torch.set_num_threads(threads)
    env = make(env_id, num_envs, device, model=model, depart=depart, capacity=capacity)
    print(f"{env_id}, {model}, {num_envs} environments, {env.num_places} places per street, {threads} threads")
    steps = {"eager": env.step}
    if compile:
        steps["compiled"] = torch.compile(env.step, fullgraph=True)
    for name, step in steps.items():
        rate, cars, overflow = measure(step, env, seconds)
        print(f"{name:8} {rate:12,.0f} env steps/s {cars:14,.0f} car updates/s, {overflow} without a place", flush=True)
    if gif:
        write_gif(dataclasses.replace(env, num_envs=1), gif, CONTROLLERS[controller])
        print(f"wrote {gif}")


if __name__ == "__main__":
    with runs.quiet_pipe():
        tyro.cli(main)
