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

FLOWS = {  # cars per hour at each entry; the paper's training flow and its table 1
    "train": (700,) * 8,
    "flow1": (1000, 1000, 80, 80, 800, 800, 550, 550),
    "flow2": (1000, 1000, 20, 20, 700, 300, 900, 900),
    "flow3": (700, 700, 70, 700, 1400, 600, 80, 80),
    "flow4": (1000, 1200, 200, 200, 300, 300, 900, 900),
    "flow5": (300, 300, 900, 900, 700, 900, 10, 10),
}
TERMS = {"queue": -0.5, "wait": -0.5, "delay": -0.5, "emergency": -0.25, "switch": -1.0, "passed": 1.0}
FAR = 1e6  # position of an empty place: a leader there has no influence
EPS = 1e-3  # SUMO's NUMERICAL_EPS
DEPART, INITIAL = 5.1, 6.0  # where fronts of entering cars and of the first car of each street stand
YELLOW, MIN_GREEN = 3, 1  # s; a switch is obeyed once `since` is MIN_GREEN, hence 2 s of green at least
RED, AMBER, GREEN = 0, 1, 2
INSERTION_STEPS = 6  # of IDM's recursion for the speed of an entering car
NEVER = 2**53  # ms between the cars of an entry without any
PER_ENV = {  # fields that may be a value per environment, and whether they may be zero
    **dict.fromkeys(("speed", "speed_limit", "accel", "decel", "emergency_decel", "tau"), False),
    **dict.fromkeys(("sigma", "speed_dev", "min_gap"), True),
}


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


def pick(mask: Tensor, values: Tensor) -> Tensor:
    """The one of `values` [M, K, N or 1, B or 1] whose mask [M, K, N, B] is true, or 0."""
    return torch.where(mask, values, 0).sum(0)


def nearest(mask: Tensor, values: Tensor) -> Tensor:
    """The same for positions, FAR instead of 0."""
    return torch.where(mask, values, FAR).amin(0)


def count(mask: Tensor) -> Tensor:
    """Cars of each edge, as float: mask [M, K, N, B] -> [M, K, B]."""
    return torch.where(mask, 1.0, 0.0).sum(2)


def total(values: Tensor) -> Tensor:
    """Sum over the cars of each edge, [M, K, N, B] -> [M, K, B]; in float64, so that rounding does not depend on B."""
    return values.sum(2, dtype=torch.float64).to(values.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Traffic:
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
            self._set(**{name: value.to(self.device, self.dtype) if value.ndim else value.item()})
        self._build()

    def _set(self, **values):
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen

    def _check(self):
        for name, rule, holds in (
            *((name, "1 or more", getattr(self, name) >= 1) for name in ("num_envs", "rows", "cols", "horizon")),
            ("warmup", "0 or more", self.warmup >= 0),
            ("depart", "fixed or max", self.depart in ("fixed", "max")),
            ("model", "idm or krauss", self.model in ("idm", "krauss")),
            ("junction", "positive", 0 < self.junction < math.inf),
            ("car_length", "positive", 0 < self.car_length < math.inf),
            ("emergency_tolerance", "finite", math.isfinite(self.emergency_tolerance)),
            ("capacity", "None or 2 or more", self.capacity is None or self.capacity >= 2),
        ):
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")
        for name, low in PER_ENV.items():
            value = torch.as_tensor(getattr(self, name))
            if value.shape not in ((), (self.num_envs,)):
                raise ValueError(f"{name} must be a number or [num_envs = {self.num_envs}], got {list(value.shape)}")
            if not bool((((value >= 0) if low else (value > 0)) & value.isfinite()).all()):
                raise ValueError(f"{name} must be {'0 or more' if low else 'positive'}, got {getattr(self, name)}")

    def _inflow(self) -> Tensor:
        """[K, 1 or B] float64 cars per hour."""
        if isinstance(self.flow, str) and self.flow not in FLOWS:
            raise ValueError(f"flow must be one of {', '.join(FLOWS)} or numbers, got {self.flow!r}")
        flow = torch.as_tensor(FLOWS[self.flow] if isinstance(self.flow, str) else self.flow).to("cpu", torch.float64)
        flow = flow.expand(self.num_streets) if flow.ndim == 0 else flow
        if flow.shape not in ((self.num_streets,), (self.num_envs, self.num_streets)):
            raise ValueError(f"flow must have {self.num_streets} entries (or rows of them), got {list(flow.shape)}")
        if not bool(((flow >= 0) & flow.isfinite()).all()):
            raise ValueError(f"flow must be 0 or more, got {self.flow}")
        return flow.reshape(-1, self.num_streets).T

    def _lengths(self) -> list[list[float]]:
        """The edges of each street, m."""
        counts = [self.rows + 1] * 2 * self.cols + [self.cols + 1] * 2 * self.rows
        if isinstance(self.lengths, (int, float)):
            lengths = [[float(self.lengths)] * count for count in counts]
        else:
            lengths = [[float(edge) for edge in street] for street in self.lengths]
        if [len(street) for street in lengths] != counts:
            raise ValueError(f"lengths must be of {counts} edges per street, got {[len(s) for s in lengths]}")
        short = self.car_length + INITIAL  # an entering car must fit
        if not all(short <= edge < FAR / 10 for street in lengths for edge in street):
            raise ValueError(f"lengths must be {short} m or more, got {self.lengths}")
        return lengths

    def _build(self):
        R, C = self.rows, self.cols
        L, K, M = R * C, 2 * (R + C), max(R, C)
        self._set(num_agents=L, num_streets=K, agents=tuple(f"light_{i}" for i in range(L)))
        lights = torch.arange(L).view(R, C)
        chains = [*lights.flip(0).T, *lights.T, *lights, *lights.flip(1)]  # the lights of each street as it drives
        lengths = self._lengths()
        begin, end, line = torch.full((3, M + 1, K), -1.0, dtype=torch.float64)  # empty where a street is shorter
        route, light = torch.zeros(K, dtype=torch.float64), torch.zeros(M + 1, K, dtype=torch.int64)
        for k, (chain, edges) in enumerate(zip(chains, lengths)):
            junctions = self.junction * torch.arange(len(edges), dtype=torch.float64)
            stops = torch.tensor(edges, dtype=torch.float64).cumsum(0) + junctions
            end[: len(edges), k], route[k] = stops, stops[-1]
            line[: len(chain), k], begin[1 : len(edges), k] = stops[:-1], stops[:-1] + self.junction
            light[: len(chain), k] = chain
        # a street and its m-th light for each light's approaches from W, S, E, N
        r, c = lights // C, lights % C
        street = torch.stack((2 * C + r, C + c, 2 * C + R + r, c), -1)
        order = torch.stack((c, r, C - 1 - c, R - 1 - r), -1)
        inflow = self._inflow()
        # SUMO rounds the time between cars to a millisecond
        period = torch.where(inflow > 0, (3.6e6 / inflow).round(), NEVER).clamp_max(NEVER).to(torch.int64)

        def to(tensor):
            return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

        room = self.car_length + torch.as_tensor(self.min_gap).min().item()
        # cars stand before lights; on its last edge a car leaves the queue behind it at least as far again
        most = 2 + max(math.ceil((sum(e) + self.junction * (len(e) - 1) - e[-1] / 2) / room) for e in lengths)
        obs, places = 4 * 4 + 2 + 4, self.capacity or most
        self._set(
            num_places=places,
            edge_counts=[len(edges) for edges in lengths],
            obs_sizes=(obs,) * L,
            action_sizes=(2,) * L,
            obs_mask=torch.ones(L, obs, dtype=torch.bool, device=self.device),
            action_mask=torch.ones(L, 2, dtype=torch.bool, device=self.device),
            cooperators=torch.ones(L, dtype=torch.bool, device=self.device),
            begin=to(begin[:, :, None, None]),  # [M + 1, K, 1, 1] where each edge begins
            end=to(end[:, :, None, None]),  # [M + 1, K, 1, 1] and ends
            line=to(line[:-1, :, None, None]),  # [M, K, 1, 1] stop lines
            signalled=(line[:, :, None] > 0).to(self.device),  # [M + 1, K, 1]
            previous=to(F.pad(line[:-2], (0, 0, 1, 0), value=-1.0)[:, :, None, None]),  # the stop lines before
            following=to(line[1:, :, None, None]),  # and those after
            exit=to(route[:, None, None]),  # [K, 1, 1]
            light=to(light),  # [M + 1, K] index of the light at the end of each edge
            axis=to(torch.arange(K) >= 2 * C).long(),  # [K] 0: north-south, 1: east-west
            approach=to((order * K + street).view(L, 4)),  # [L, 4] index into [M * K] lines
            inflow=inflow.to(self.device),  # [K, 1 or B] cars per hour
            period=to(period),  # [K, 1 or B] ms
            place=to(torch.arange(places).double()[:, None]),  # [N, 1]
            dawdles=self.model == "krauss" and bool((torch.as_tensor(self.sigma) > 0).any()),
            spreads=self.depart == "max" and bool((torch.as_tensor(self.speed_dev) > 0).any()),
            hot=to(F.one_hot(torch.arange(L) % 4, 4).double())[..., None],  # [L, 4, 1] ERNIE tiles 4 trained agents
        )

    # ------------------------------------------------------------------------------------------ car-following

    def brake_distance(self, v: Tensor) -> Tensor:
        """MSCFModel::brakeGapEuler without headway."""
        k = (v / self.decel).floor()
        return k * v - 0.5 * self.decel * k * (k + 1)

    def stop_speed(self, gap: Tensor, tau: float | Tensor = 1.0) -> Tensor:
        """MSCFModel::maximumSafeStopSpeedEuler: the speed from which braking, begun in a second, ends within `gap`."""
        g, b = (gap - EPS).relu(), self.decel
        n = (0.5 - tau + 0.5 * (1 + 4 * (2 * g / b - tau + tau**2)).sqrt()).floor()
        speed = n * b + (g - 0.5 * b * n * (n - 1) - n * b * tau) / (n + tau)
        return torch.where(gap < EPS, 0, speed)

    def krauss_follow(self, v: Tensor, gap: Tensor, v_leader: Tensor) -> Tensor:
        """MSCFModel::maximumSafeFollowSpeed with calculateEmergencyDeceleration."""
        b = self.decel
        w = self.stop_speed(gap + self.brake_distance(v_leader), self.tau)
        closing = 0.5 * v**2 / (gap + v_leader**2 / (2 * b))
        need = torch.where(closing <= b, closing, 0.5 * (v**2 - v_leader**2) / gap)
        need = torch.where(gap <= 0, self.emergency_decel, need)
        hard = (v - torch.minimum((1.2 * need).clamp_min(b), v - w)).relu()
        return torch.where(v - w > b + EPS, hard, w)

    def idm(self, v: Tensor, gap: Tensor, v_leader: Tensor | float, own: Tensor, standstill: float | Tensor) -> Tensor:
        """MSCFModel_IDM::_v, four steps of 0.25 s; `gap` includes the standstill distance."""
        closing, inverse = 0.5 / (self.accel * self.decel) ** 0.5, 1 / own
        for _ in range(4):
            s = standstill + (v * (self.tau + (v - v_leader) * closing)).relu()
            gap = (gap - EPS).relu() + EPS  # compiled, half the instructions of clamp_min
            v = (v + 0.25 * self.accel * (1 - ((v * inverse) ** 2) ** 2 - (s / gap) ** 2)).relu()
            gap = gap - 0.25 * (v - v_leader).relu()
        return v

    def idm_stop(self, v: Tensor, gap: Tensor, own: Tensor) -> Tensor:
        """MSCFModel_IDM::stopSpeed, no further than the gap."""
        w = self.idm(v, gap, 0.0, own, 0.0)
        w = torch.where((v < EPS) & (w < EPS), self.stop_speed(gap), w)
        return torch.where(gap < 0.01, 0, torch.minimum(w, gap))

    # ------------------------------------------------------------------------------------------------- dynamics

    def make_state(self, position=None, speed=None, max_speed=None) -> State:
        """A state at t = 0 from arrays [B or 1, K, n <= N - 1] of cars, front first and NaN where there is none."""
        K, N, B, dtype = self.num_streets, self.num_places, self.num_envs, self.dtype
        position = torch.full((B, K, 0), math.nan) if position is None else torch.as_tensor(position)
        if position.shape[-1] >= N:
            raise ValueError(f"capacity must be above the {position.shape[-1]} cars of a street, got {N}")

        def rows(values, empty):  # [K, N, B]
            values = torch.as_tensor(empty if values is None else values).to(self.device, dtype).expand(position.shape)
            values = values.expand(B, -1, -1).permute(1, 2, 0)
            return F.pad(torch.where(there, values, empty), (0, 0, 0, N - position.shape[-1]), value=empty).contiguous()

        there = ~position.isnan().to(self.device).expand(B, -1, -1).permute(1, 2, 0)
        number = there.sum(1)
        x, v, legal = rows(position, FAR), rows(speed, 0.0), rows(None, math.inf)
        legal = legal.clamp_max(self.speed).clamp_max(self.speed_limit)
        top = legal if max_speed is None else torch.where(x < FAR, rows(max_speed, 1.0), legal)

        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(*shape, B, dtype=dtype, device=self.device)

        return State(
            *(x, v, top, torch.zeros_like(x), number.to(dtype), number, zeros(K), zeros(K)),
            *(zeros(self.num_agents), zeros(self.num_agents), zeros(self.num_agents, dtype=torch.bool)),
            *(zeros(), number.clone()),
        )

    def _ahead(self, state: State, aspect: Tensor):
        """What a car may meet beyond its stop line.

        Returns each car's rank in its street [K, N, B], N - 1 for the newest; the rank below which the edge behind each
        line has room for a car [M, K, B]; and for IDM the places (FAR where there is none) and speeds of the newest car
        on each junction and on the edge behind it, [M, K, B] each.

        MSVehicle::checkRewindLinkLanes, MSLane::getSpaceTillLastStanding: standing cars count where they are, cars on
        the junction and moving ones behind the last standing one with their length and gap.
        """
        x, v, N = state.position, state.speed, self.num_places
        rank = self.place - state.tail[:, None]
        rank = torch.where(rank < 0, rank + N, rank)  # [K, N, B], N - 1 for the newest car
        on_edge = (x > self.begin) & (x <= self.end)  # [M + 1, K, N, B]
        on_junction = (x > self.line) & (x <= self.begin[1:])  # [M, K, N, B]
        first = torch.where(on_edge[:-1], rank, N).amin(2)  # [M, K, B]
        on_edge = on_edge[1:]
        standing = on_edge & (v < 0.1)
        rear = torch.where(standing, x + v * self.tau, FAR).amin(2)
        last_standing, last = (torch.where(mask, rank, -1.0).amax(2) for mask in (standing, on_edge))
        begin, end = self.begin[1:, :, 0], self.end[1:, :, 0]
        size = self.car_length + self.min_gap
        free = torch.where(rear < FAR, rear - self.car_length - begin - size * (last - last_standing), FAR)
        # where all move but the light is closed, they will stand
        waits = (aspect[1:] < GREEN) & (rear >= FAR)
        free = torch.where(waits, end - begin - size * count(on_edge), free) - size * count(on_junction)
        admitted = first + free / size
        if self.model == "krauss":  # there the nearest leader suffices
            return rank, admitted, None
        crossing = torch.where(on_junction, rank, -1.0).amax(2)
        cars = []
        for mask, newest in ((on_junction, crossing), (on_edge, last)):
            speed = torch.where(mask & (rank == newest[:, :, None]), v, 0).sum(2)
            cars.append((torch.where(mask, x, FAR).amin(2)[:, :, None], speed[:, :, None]))
        return rank, admitted, cars

    def drive(self, state: State, aspect: Tensor, dawdle: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Positions and speeds [K, N, B] one second later, before cars leave and enter. aspect [M + 1, K, B]: RED,
        AMBER or GREEN at the end of each edge during that second."""
        x, v, own = state.position, state.speed, state.max_speed
        rank, admitted, cars = self._ahead(state, aspect)
        next_line = (x > self.previous) & (x <= self.line)  # [M, K, N, B], at most one of M
        line = pick(next_line, self.line)
        seen = torch.where(line > 0, line - x, FAR)
        colour = torch.where(next_line, aspect[:-1, :, None], GREEN).amin(0)
        red, amber = colour == RED, colour == AMBER
        x_leader, v_leader = x.roll(1, 1), v.roll(1, 1)
        brake = self.brake_distance(v)
        can_stop = seen >= brake
        # nobody enters a junction that he cannot leave behind those before him
        on_edge = next_line & (x > self.begin[:-1])
        blocked = (rank > nearest(on_edge, admitted[:, :, None]) - 1) & (seen >= brake + 0.1)
        offset = torch.where(can_stop, (seen - brake).clamp(0.1, 1.0), 1.0)
        # FAR where the car need not stop
        to_line = torch.where(red | blocked | (amber & can_stop), (seen - offset).relu(), FAR)
        gap = x_leader - self.car_length - self.min_gap - x
        if self.model == "krauss":
            safe = torch.minimum(self.krauss_follow(v, gap, v_leader), self.stop_speed(to_line))
        else:
            safe = self._idm_safe(state, aspect, on_edge, cars, to_line, gap, v_leader)
        top = torch.minimum(torch.minimum(v + self.accel, own), safe)
        low = torch.minimum((v - self.decel).relu(), torch.maximum(top, v - self.emergency_decel).relu())
        new = torch.maximum(low, top)
        if dawdle is not None:
            new = torch.maximum(new - self.sigma * dawdle * new.clamp_max(self.accel), low)
        new = torch.where(x < FAR, new, 0)
        # SUMO stops at the line, in no time, a car that could stop neither before it nor pass during yellow
        moved, bound = x + new, torch.where(red, line, 2 * FAR)
        return torch.minimum(moved, bound), torch.where(moved > bound, 0, new)

    def _idm_safe(self, state: State, aspect: Tensor, on_edge, cars, to_line, gap, v_leader) -> Tensor:
        """IDM obeys each of the cars and lights that SUMO looks ahead to, not the nearest alone: its leader, and past a
        line that need not stop it, the newest car on the junction, the newest on the next edge and the next light."""
        x, v, own = state.position, state.speed, state.max_speed
        passes = to_line >= FAR
        safe = self.idm(v, gap + self.min_gap, torch.where(gap > FAR / 2, own, v_leader), own, self.min_gap)
        (x_cross, v_cross), (x_edge, v_edge) = cars
        beyond = (x > self.begin[:-1]) & (x <= self.begin[1:])  # [M, K, N, B], an edge or the junction after it
        for mask, position, speed in ((on_edge, x_cross, v_cross), (beyond, x_edge, v_edge)):
            space = torch.where(passes, nearest(mask, position) - self.car_length - x, FAR)
            far = self.idm(v, space, pick(mask, speed), own, self.min_gap)
            safe = torch.minimum(safe, torch.where(space < FAR / 2, far, FAR))
        closed = on_edge & (aspect[1:] < GREEN)[:, :, None]
        space = torch.where(passes, nearest(closed, self.following) - x - 1, to_line)  # always enough to brake in
        return torch.minimum(safe, self.idm_stop(v, space, own))

    def _entering(self, x_last: Tensor, v_last: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """May a car enter behind the last one, and how fast: [K, B] each (MSLane::isInsertionSuccess)."""
        gap = x_last - self.car_length - self.min_gap - DEPART
        if self.model == "krauss":
            fast = self.stop_speed(gap + self.brake_distance(v_last), self.tau)
        else:  # MSCFModel_IDM::insertionFollowSpeed, a recursion that ends after few steps
            fast, settled, root = own, gap < 0, 2 * (self.accel * self.decel) ** 0.5
            slower = self.idm(fast, gap + self.min_gap, v_last, own, self.min_gap)
            for _ in range(INSERTION_STEPS):
                settled = settled | (gap >= (fast * self.tau + fast * (fast - v_last) / root).relu())
                fast = torch.where(settled, fast, slower)
                again = self.idm(fast, gap + self.min_gap, v_last, own, self.min_gap)
                settled, slower = settled | (fast - again < 1), again
        if self.depart == "fixed":
            return (gap >= 0) & (fast >= own), own
        return gap >= 0, torch.minimum(fast, own)

    def due(self, t: Tensor) -> Tensor:
        """[K, B] cars that the flow has brought to each entry by time t [B]; the first comes at 0."""
        return (t * 1000 // self.period + 1) * (self.period < NEVER)

    def backlog(self, state: State) -> Tensor:
        """[K, B] cars due in the last second or before that wait outside."""
        return self.due(state.t - 1) * (state.t > 0) - (state.entered - state.started)

    def advance(self, state: State, aspect: Tensor, noise=None) -> State:
        """One second of traffic under given lights: everything of a step but the signals."""
        dawdle, spread = (None, None) if noise is None else noise
        x, v = self.drive(state, aspect, dawdle)
        N = self.num_places
        # MSVehicle::hasArrived: a front within 0.1 m of the exit is through
        x = torch.where(x > self.exit - 0.1, FAR, x)
        v = torch.where(x < FAR, v, 0)
        tail = state.tail
        last, after = torch.where(tail == 0, N - 1, tail - 1), torch.where(tail == N - 1, 0, tail + 1)
        # reductions, where a gather would be recomputed for every place of the street once compiled
        x_last = x.amin(1)
        v_last = torch.where(self.place == last[:, None], v, 0).sum(1)
        inside = torch.where(x < FAR, 1.0, 0.0).sum(1)
        own = torch.zeros_like(x_last) + self.speed  # [K, B]
        if self.depart == "max":  # "fixed": SUMO raises the driver's factor until the speed is legal
            factor = 1.0 if spread is None else (1 + self.speed_dev * spread).clamp(0.2, 2.0)
            own = torch.minimum(own, torch.zeros_like(own) + self.speed_limit * factor)
        safe, entry_speed = self._entering(x_last, v_last, own)
        wants = safe & (self.due(state.t) > state.entered - state.started)
        # an empty place parts the last car from the first; floats, since compiled code reads masks slowly from memory
        enters = torch.where(wants & (inside < N - 1), 1.0, 0.0)
        new = self.place == torch.where(enters > 0, tail, -1.0)[:, None]  # [K, N, B]
        v = torch.where(new, entry_speed[:, None], v)
        return dataclasses.replace(
            state,
            position=torch.where(new, DEPART, x),
            speed=v,
            max_speed=torch.where(new, own[:, None], state.max_speed),
            waiting=torch.where(v <= 0.1, torch.where(new, 0, state.waiting) + 1, 0),
            tail=torch.where(enters > 0, after, tail),
            entered=state.entered + enters.long(),
            left=state.entered - inside.long(),
            overflow=state.overflow + (wants & (inside >= N - 1)),
            t=state.t + 1,
        )

    def signals(self, state: State, action: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The lights of the coming second, and which of them [L, B] turn yellow in it; action [B, L]."""
        since = state.since + 1
        green = state.yellow & (since >= YELLOW)
        begins = ~state.yellow & (action.T.contiguous() == 1) & (state.since >= MIN_GREEN)
        direction = torch.where(begins, 1 - state.direction, state.direction)
        since = torch.where(green | begins, 0, since)
        return {"direction": direction, "since": since, "yellow": (state.yellow & ~green) | begins}, begins

    def aspect(self, direction: Tensor, since: Tensor, yellow: Tensor) -> Tensor:
        """[M + 1, K, B] RED, AMBER or GREEN at the end of each edge, GREEN at exits. During yellow, `direction` is
        already the next one."""
        served = direction[self.light] == self.axis[:, None]
        amber = yellow[self.light]
        aspect = torch.where(served, torch.where(amber, RED, GREEN), torch.where(amber, AMBER, RED))
        return torch.where(self.signalled, aspect, GREEN).to(self.dtype)

    # ------------------------------------------------------------------------------------------------ interface

    def reset(self, generators: list[torch.Generator], step: Callable | None = None) -> tuple[State, Tensor]:
        """Generator k alone draws the k-th block of num_envs / len(generators) environments. Every tenth second of the
        warm-up each light switches with probability 1/2, as in ERNIE's code; `step` may be a compiled one."""
        if self.num_envs % len(generators):
            raise ValueError(f"num_envs must be a multiple of the {len(generators)} generators, got {self.num_envs}")
        position = torch.full((1, self.num_streets, 1), INITIAL) if self.initial_cars else None
        state = self.make_state(position)
        for t in range(self.warmup):
            action = self._block(generators, lambda *size, **kw: torch.rand(*size, **kw) < 0.5, self.num_agents).T
            state, *_ = (step or self.step)(state, action.long() * (t % 10 == 0), self.draw(generators))
        return state, self.observe(state)

    def _block(self, generators: list[torch.Generator], sample: Callable, *shape: int) -> Tensor:
        """[*shape, B] whose k-th block of environments is drawn by generator k."""
        size = self.num_envs // len(generators)
        parts = [sample(*shape, size, generator=g, device=g.device, dtype=self.dtype) for g in generators]
        return (torch.cat(parts, -1) if len(parts) > 1 else parts[0]).to(self.device)

    def draw(self, generators: list[torch.Generator]) -> tuple[Tensor | None, Tensor | None] | None:
        """The random numbers of one step: uniform [K, N, B] for dawdling, normal [K, B] for the speed factor of a car
        that enters. IDM at a fixed entry speed needs none."""
        dawdle = self._block(generators, torch.rand, self.num_streets, self.num_places) if self.dawdles else None
        spread = self._block(generators, torch.randn, self.num_streets) if self.spreads else None
        return None if dawdle is None and spread is None else (dawdle, spread)

    def _incoming(self, values: Tensor) -> Tensor:
        """[M, K, B] of the edges that end at lights -> [L, 4, B] of each light's, from W, S, E, N."""
        return values.to(self.dtype).flatten(0, 1)[self.approach]

    def edges(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queue (cars at 1 m/s or less), mean waiting time, delay (1 if empty) and number of cars, [M, K, B] each."""
        v = state.speed
        on = (state.position > self.begin[:-1]) & (state.position <= self.line)  # [M, K, N, B]
        cars = count(on)
        wait = total(torch.where(on, state.waiting, 0)) / cars.clamp_min(1)
        delay = 1 - total(torch.where(on, v, 0)) / (cars + 1e-5) / self.speed_limit
        return count(on & (v <= 1)), wait, delay, cars

    def _observe(self, state: State, edges: tuple[Tensor, ...]) -> Tensor:
        lights = torch.stack((state.direction, state.since), 1).to(self.dtype)  # [L, 2, B]
        hot = self.hot.expand(-1, -1, self.num_envs)
        return torch.cat((*map(self._incoming, edges), lights, hot), 1).permute(2, 0, 1)

    def observe(self, state: State) -> Tensor:
        """[B, L, O]: of the incoming edges from W, S, E, N the queues, waiting times, delays and numbers of cars;
        direction of the light; seconds since it changed; its index modulo 4, one-hot. Nothing is normalised."""
        return self._observe(state, self.edges(state))

    def step(self, state: State, action: Tensor, noise: tuple | None = None):
        """action [B, L] int64: 0 keeps the lights, 1 switches them if they are neither yellow nor too young.

        Returns state, obs [B, L, O], reward [B, L], terminated [B] (never), truncated [B] (at the horizon), info. Of
        info, the TERMS of the reward are [B, L], weighted; the cars in the network, those that entered, left or found
        no place in this second and those that wait outside are [B].
        """
        lights, begins = self.signals(state, action)
        before, aspect = dataclasses.replace(state, **lights), self.aspect(**lights)
        state = self.advance(before, aspect, noise)
        edges = self.edges(state)
        queue, wait, delay, _ = edges
        old, new, v = before.position, state.position, state.speed
        on = (new > self.begin[:-1]) & (new <= self.line)  # [M, K, N, B]
        brakes = v - before.speed <= -(self.decel + self.emergency_tolerance)
        emergency = count(on & brakes)
        passed = count((old > self.begin[:-1]) & (old <= self.line) & (new > self.line))
        terms = {"queue": queue, "wait": wait, "delay": delay, "emergency": emergency, "passed": passed}
        terms = {name: self._incoming(value).sum(1) for name, value in terms.items()}
        terms["switch"] = begins.to(self.dtype)
        info = {name: (weight * terms[name]).T for name, weight in TERMS.items()}
        reward = sum(info.values())
        for name in ("entered", "left", "overflow"):
            info[name] = (getattr(state, name) - getattr(before, name)).sum(0)
        info["backlog"], info["vehicles"] = self.backlog(state).sum(0), (state.entered - state.left).sum(0)
        truncated = state.t >= self.horizon + self.warmup
        return state, self._observe(state, edges), reward, torch.zeros_like(truncated), truncated, info

    def global_state(self, state: State) -> Tensor:
        """[B, 18 L] for centralised critics: the first 17 observations of each light, then the ages of all lights."""
        obs = self.observe(state)
        return torch.cat((obs[..., :17].flatten(1), obs[..., 17]), 1)

    def render(self, state: State, index: int = 0, size: int = 400) -> np.ndarray:
        """[size, size, 3] uint8 picture of one environment, all edges drawn equally long: cars from red (standing) to
        green (at the speed limit), the colour of the light at each stop line, and how many cars wait outside."""
        R, C, big = self.rows, self.cols, 3 * size  # drawn large and scaled down, which smooths
        scale, half, lane = big / (max(R, C) + 1), 0.09, 0.045  # pixels per edge; half a junction, half a road
        image = Image.new("RGB", (big, big), (70, 110, 75))
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(big // 35)

        def point(k: int, driven: float, side: float = 1.0) -> tuple[float, float]:
            """Pixel of a car of street k that has driven so many edges; 1.5 is halfway on the second one."""
            edge = min(int(driven), edges[k] - 1)
            along = edge - 1 + half + (driven - edge) * (1 - 2 * half)
            forward = C <= k < 2 * C + R  # northwards or eastwards
            along, aside = (along if forward else edges[k] - 2 - along), lane * side * (1 if forward else -1)
            x, y = (k % C + aside, along) if k < 2 * C else (along, (k - 2 * C) % R - aside)
            return big / 2 + scale * (x - (C - 1) / 2), big / 2 - scale * (y - (R - 1) / 2)

        def disc(place: tuple[float, float], radius: float, colour: tuple[int, int, int]):
            x, y, r = *place, radius * scale
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

        edges, (begin, end) = self.edge_counts, (bound[:, :, 0, 0].tolist() for bound in (self.begin, self.end))
        for k in range(self.num_streets):
            draw.line((*point(k, 0), *point(k, edges[k])), fill=(60, 60, 65), width=int(scale * lane * 2))
        aspect = self.aspect(state.direction, state.since, state.yellow)[..., index].long().tolist()
        limit = torch.as_tensor(self.speed_limit).expand(self.num_envs)[index].item()
        for k in range(self.num_streets):
            cars = zip(state.position[k, :, index].tolist(), state.speed[k, :, index].tolist())
            for x, v in (car for car in cars if car[0] < FAR):
                e = sum(x > end[m][k] for m in range(edges[k] - 1))
                first, share = max(begin[e][k], 0.0), min(v / limit, 1.0)
                driven = e + min(max((x - first) / (end[e][k] - first), 0.0), 1.0)
                disc(point(k, driven), 0.02, (round(235 * (1 - share)) + 20, round(200 * share) + 40, 60))
            for m in range(edges[k] - 1):
                disc(point(k, m + 1 - 1e-9, 2.2), 0.022, ((220, 40, 40), (250, 200, 40), (60, 220, 80))[aspect[m][k]])
            waiting = self.backlog(state)[k, index].item()
            if waiting:
                draw.text(point(k, 0.08, 3.0), f"+{waiting}", "white", font, anchor="mm")
        draw.text((big * 0.01, big * 0.01), f"{int(state.t[index])} s", "white", font)
        return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


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
    west, south, east, north = env._incoming(demand).unbind(1)
    excess = (west + east - south - north) * torch.where(state.direction == 0, 1, -1)
    return ((excess > 0) & ~state.yellow & (state.since >= min_green - 1)).long().T


def longest_queue(env: Traffic, state: State, min_green: int = 10) -> Tensor:
    return _switch_for(env, state, env.edges(state)[0], min_green)


def max_pressure(env: Traffic, state: State, min_green: int = 10) -> Tensor:
    """Varaiya 2013: cars on the edge before the light minus cars on the edge after it."""
    cars = count((state.position > env.begin) & (state.position <= env.end))  # [M + 1, K, B]
    return _switch_for(env, state, cars[:-1] - cars[1:], min_green)


CONTROLLERS = {"fixed_time": fixed_time, "longest_queue": longest_queue, "max_pressure": max_pressure}


def lengths_of(nodes: list, south: list, north: list, west: list, east: list) -> tuple[tuple[float, ...], ...]:
    """Edge lengths of each street, from the places (x, y) of the lights [R][C] and of the ends of columns and rows."""

    def lengths(points):
        return tuple(math.dist(a, b) for a, b in zip(points, points[1:]))

    columns = [lengths((s, *(row[c] for row in nodes), n)) for c, (s, n) in enumerate(zip(south, north))]
    rows = [lengths((w, *row, e)) for row, w, e in zip(nodes, west, east)]
    return (*(c[::-1] for c in columns), *columns, *rows, *(r[::-1] for r in rows))


# The drawn coordinates of ERNIE's CustomTrafficLightGridNetwork1 and 0 ("Atlanta"). Its code leaves all edges at 400 m
# all the same; here, as in its paper, cars drive what is drawn.
IRREGULAR = lengths_of(
    [[(0, 0), (300, 0)], [(0, 550), (300, 550)]],
    *([(x, y) for x in (0, 300)] for y in (-300, 800)),
    *([(x, y) for y in (0, 550)] for x in (-300, 600)),
)
ATLANTA = lengths_of(
    [
        [(190, 0), (460, 30), (720, 0), (1020, 20)],
        [(160, 400), (420, 400), (710, 410), (1010, 430)],
        [(130, 800), (390, 810), (700, 820), (1000, 830)],
        [(10, 1200), (360, 1150), (690, 1200), (990, 1230)],
    ],
    *([(x, y) for x in (0, 300, 600, 800)] for y in (-400, 1400)),
    *([(x, y) for y in (0, 400, 800, 1200)] for x in (-400, 1600)),
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
    steps, cars, start = 0, 0, time.perf_counter()
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
            frames.append(Image.fromarray(env.render(state)))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)


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
    steps = {"eager": env.step} | ({"compiled": torch.compile(env.step, fullgraph=True)} if compile else {})
    for name, step in steps.items():
        rate, cars, overflow = measure(step, env, seconds)
        print(f"{name:8} {rate:12,.0f} env steps/s {cars:14,.0f} car updates/s, {overflow} without a place", flush=True)
    if gif:
        write_gif(dataclasses.replace(env, num_envs=1), gif, CONTROLLERS[controller])
        print(f"wrote {gif}")


if __name__ == "__main__":
    tyro.cli(main)
