"""The traffic environment in the real SUMO: the scenario of an `envs.traffic.Traffic` through libsumo.

    pip install -r requirements-sumo.txt
    env = from_traffic(traffic.make("traffic_grid_v0", num_envs=4))
    state, obs = env.reset([torch.Generator().manual_seed(0)])
    state, obs, reward, terminated, truncated, info = env.step(state, action)

Only the cars differ: SUMO moves them, in one process per environment, since libsumo has one simulation per process.
Lights, observations, rewards, pictures and controllers are the code of envs/traffic.py, applied to the positions and
speeds that SUMO reports. Calls are those of SUMO 1.28 (sumo.dlr.de/docs/TraCI.html). Axes and units as in
envs/traffic.py: B environments, L lights, K streets, M lights on the longest street, N places for cars per street; m,
s, m/s, cars per hour.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import traceback
import weakref
from multiprocessing.connection import Connection
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from envs.traffic import AMBER, DEPART, FAR, GREEN, INITIAL, NEVER, RED, State, Traffic

SPACING = 400.0  # m between drawn lights; cars drive the `length` of edges, whatever is drawn
LANE = 3.2  # m; half a junction is drawn as its radius and the width of a lane
LETTERS = {RED: "r", AMBER: "y", GREEN: "G"}
OPTIONS = (  # no car is ever moved or removed by anything but driving
    *("--step-length", "1", "--time-to-teleport", "-1", "--collision.action", "warn"),
    *("--collision.check-junctions", "true", "--no-step-log", "true", "--no-warnings", "true"),
)


def require_sumo():
    if any(importlib.util.find_spec(name) is None for name in ("libsumo", "sumo")):
        raise ImportError("envs.sumo needs SUMO: pip install -r requirements-sumo.txt")


# ------------------------------------------------------------------------------------------------------- scenario


def write_xml(path: pathlib.Path, root: str, rows: list[tuple[str, dict]]):
    """`rows` (name, attributes) as the children of one element; numbers are written in full."""
    tree = ElementTree.Element(root)
    for name, attributes in rows:
        ElementTree.SubElement(tree, name, {key: str(value) for key, value in attributes.items()})
    ElementTree.ElementTree(tree).write(path)


def write_network(env: Traffic, folder: pathlib.Path) -> pathlib.Path:
    """The grid by netconvert: light i is node "i", the m-th edge of street k is "k_m"; all connections are straight.
    The speed limit is set later, as it may differ between environments."""
    import sumo

    R, C, light, lengths = env.rows, env.cols, env.light.tolist(), env.edge_lengths
    place = {str(r * C + c): (c, r) for r in range(R) for c in range(C)}
    place |= {f"{name}{c}": (c, r) for c in range(C) for name, r in (("south", -1), ("north", R))}
    place |= {f"{name}{r}": (c, r) for r in range(R) for name, c in (("west", -1), ("east", C))}
    columns = [(f"{a}{c}", f"{b}{c}") for a, b in (("north", "south"), ("south", "north")) for c in range(C)]
    rows = [(f"{a}{r}", f"{b}{r}") for a, b in (("west", "east"), ("east", "west")) for r in range(R)]
    nodes, edges, connections = [], [], []
    for name, (x, y) in place.items():
        kind = {"type": "traffic_light", "radius": env.junction / 2 - LANE} if name.isdigit() else {"type": "priority"}
        nodes.append(("node", {"id": name, "x": SPACING * x, "y": SPACING * y} | kind))
    for k, (first, last) in enumerate(columns + rows):
        stops = [first, *(str(light[m][k]) for m in range(len(lengths[k]) - 1)), last]
        for m, length in enumerate(lengths[k]):
            ends = {"id": f"{k}_{m}", "from": stops[m], "to": stops[m + 1]}
            edges.append(("edge", ends | {"length": length, "numLanes": 1, "speed": 35.0, "priority": 78}))
            if m:
                lanes = {"fromLane": 0, "toLane": 0}
                connections.append(("connection", {"from": f"{k}_{m - 1}", "to": f"{k}_{m}"} | lanes))
    files = {"nodes": nodes, "edges": edges, "connections": connections}
    for name, content in files.items():
        write_xml(folder / f"{name}.xml", name, content)
    network = folder / "net.xml"
    command = [str(pathlib.Path(sumo.SUMO_HOME) / "bin" / "netconvert"), "--no-turnarounds", "true", "--precision", "6"]
    command += ["-n", folder / "nodes.xml", "-e", folder / "edges.xml", "-x", folder / "connections.xml", "-o", network]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"netconvert failed: {done.stderr}")
    for lane in ElementTree.parse(network).iter("lane"):
        if lane.get("id").startswith(":") and abs(float(lane.get("length")) - env.junction) > 0.01:
            raise ValueError(f"junction must be a length that netconvert can draw, got {env.junction}")
    return network


def write_routes(env: Traffic, index: int, path: pathlib.Path):
    """Drivers, streets, standing cars and flows of one environment. Standing cars enter in SUMO's first second, before
    our time begins, hence flows at second 1. A flow's car i on street k is "k.i"."""

    def value(name: str) -> float:
        return torch.as_tensor(getattr(env, name)).expand(env.num_envs)[index].item()

    drivers = {"accel": "accel", "decel": "decel", "emergencyDecel": "emergency_decel", "tau": "tau"}
    drivers |= {"minGap": "min_gap", "maxSpeed": "speed", "speedDev": "speed_dev"}
    drivers |= {"sigma": "sigma"} if env.model == "krauss" else {}  # IDM has no such attribute
    drivers = {key: value(name) for key, name in drivers.items()}
    model = {"krauss": "Krauss", "idm": "IDM"}[env.model]
    content = [("vType", {"id": "car", "length": env.car_length, "carFollowModel": model, "speedFactor": 1} | drivers)]
    for k, lengths in enumerate(env.edge_lengths):
        content.append(("route", {"id": k, "edges": " ".join(f"{k}_{m}" for m in range(len(lengths)))}))
    for k in range(env.num_streets if env.initial_cars else 0):
        car = {"id": f"{k}.first", "type": "car", "route": k, "depart": 0, "departPos": INITIAL, "departSpeed": 0}
        content.append(("vehicle", car))
    period = env.period.expand(-1, env.num_envs)[:, index].tolist()
    speed = value("speed") if env.depart == "fixed" else "max"
    for k, milliseconds in enumerate(period):
        if milliseconds < NEVER:
            flow = {"id": k, "type": "car", "route": k, "begin": 1, "end": 1e7, "period": milliseconds / 1000}
            content.append(("flow", flow | {"departPos": DEPART, "departSpeed": speed}))
    write_xml(path, "routes", content)


# ------------------------------------------------------------------------------------------------ process of one SUMO


class Simulation:
    """SUMO in this process. `limit` is that of the lanes, m/s; edge m of street k reaches from begin[m, k] to
    end[m, k], in m along the street; sides[k] says from where its cars come to each light (0 W, 1 S, 2 E, 3 N); N is
    `places`."""

    def __init__(self, network: str, routes: str, limit: float, begin, end, sides: list[int], places: int):
        import libsumo

        self.sumo, self.files, self.limit, self.sides = libsumo, ("-n", network, "-r", routes), limit, sides
        self.begin, self.end, self.shape, self.running = begin, end, (len(sides), places), False
        edges = [(m, k) for m, k in np.ndindex(end.shape) if end[m, k] > 0]
        self.lanes = {f"{k}_{m}_0": (begin[m, k].clip(0), end[m, k]) for m, k in edges}  # from where to where
        constants = libsumo.constants
        self.watched = (constants.VAR_LANE_ID, constants.VAR_LANEPOSITION, constants.VAR_SPEED)

    def reset(self, seed: int):
        """Start an episode; after its first second the standing cars are there."""
        sumo = self.sumo
        if self.running:
            sumo.close()
        sumo.start(["sumo", *self.files, "--seed", str(seed), *OPTIONS])
        self.running = True
        for lane in sumo.lane.getIDList():
            sumo.lane.setMaxSpeed(lane, self.limit)
        self.links = {}  # where the cars of each letter of a light's signal string come from
        for light in sumo.trafficlight.getIDList():
            self.links[light] = []
            for ((lane, _, via),) in sumo.trafficlight.getControlledLinks(light):
                k, m, _ = map(int, lane.split("_"))
                self.lanes[via] = self.end[m, k], self.begin[m + 1, k]
                self.links[light].append(self.sides[k])
        self.cars = {}  # street and number in entry order of each car on its way
        self.entered, self.left = np.zeros((2, self.shape[0]), dtype=np.int64)
        self.advance()

    def step(self, colours: np.ndarray):
        """One second under lights of these colours [L, 4]; positions and speeds [K, N], cars that entered and left so
        far [K]."""
        for light, sides in self.links.items():
            letters = "".join(LETTERS[colours[int(light), side]] for side in sides)
            self.sumo.trafficlight.setRedYellowGreenState(light, letters)
        return self.advance()

    def advance(self):
        """One second: what `step` returns."""
        sumo, constants = self.sumo, self.sumo.constants
        sumo.simulationStep()
        for car in sumo.simulation.getDepartedIDList():
            k = int(car.split(".")[0])
            self.cars[car] = k, self.entered[k]
            self.entered[k] += 1
            sumo.vehicle.subscribe(car, self.watched)
        for car in sumo.simulation.getArrivedIDList():
            self.left[self.cars.pop(car)[0]] += 1
        position, speed = np.full(self.shape, FAR), np.zeros(self.shape)
        for car, seen in sumo.vehicle.getAllSubscriptionResults().items():
            k, number = self.cars[car]
            place = k, number % self.shape[1]
            start, end = self.lanes[seen[constants.VAR_LANE_ID]]
            # rounding must not move a car that stands at its line onto the junction
            position[place] = min(max(start + seen[constants.VAR_LANEPOSITION], np.nextafter(start, FAR)), end)
            speed[place] = seen[constants.VAR_SPEED]
        return position, speed, self.entered.copy(), self.left.copy()


def serve(ours: Connection, theirs: Connection, *description):
    """Answer seeds by starting an episode, colours of lights by one second, until the other end is gone."""
    theirs.close()  # or it would never be gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops us
    try:
        simulation = Simulation(*description)
        while True:
            order = ours.recv()
            ours.send(simulation.reset(order) if isinstance(order, int) else simulation.step(order))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception:  # noqa: BLE001 (whatever it is, the parent must hear of it)
        ours.send(traceback.format_exc())


def shut_down(owner: int, connections: list, processes: list, folder: pathlib.Path):
    if os.getpid() != owner:  # a copy in a forked process
        return
    for connection in connections:
        connection.close()
    for process in processes:
        process.kill()  # there is nothing to save, and later processes hold copies of our ends of earlier pipes
    for process in processes:
        process.join()
    shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- environment


@dataclasses.dataclass(frozen=True, eq=False)
class SumoTraffic(Traffic):
    """`Traffic` whose cars SUMO moves. Unlike that, it has a memory: `step` takes the newest state only. `dtype`, that
    of the inside, is float64; `precision` is that of observations, rewards and their terms. `step` cannot be compiled.
    Linux and macOS, whose processes can fork."""

    precision: torch.dtype = torch.float32

    def __post_init__(self):
        require_sumo()
        # SUMO knows no capacity
        self._set(dtype=torch.float64, capacity=None, connections=[], shut=None)
        super().__post_init__()

    def _start(self):
        """Write the files and start a process per environment."""
        folder = pathlib.Path(tempfile.mkdtemp(prefix="sumo_"))
        connections, processes = [], []
        shut = weakref.finalize(self, shut_down, os.getpid(), connections, processes, folder)
        self._set(connections=connections, shut=shut)
        network = write_network(self, folder)
        limits = torch.as_tensor(self.speed_limit).expand(self.num_envs).tolist()
        begin, end = (bound[:, :, 0, 0].cpu().numpy() for bound in (self.begin, self.end))
        sides = [3] * self.cols + [1] * self.cols + [0] * self.rows + [2] * self.rows
        # forked, as a fresh interpreter would import torch for nothing; a process that is gone closes the ends of
        # those before it, so all notice when the parent is killed
        context = multiprocessing.get_context("fork")
        for index, limit in enumerate(limits):
            routes = folder / f"{index}.rou.xml"
            write_routes(self, index, routes)
            ours, theirs = context.Pipe()
            arguments = (theirs, ours, str(network), str(routes), limit, begin, end, sides, self.num_places)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)

    def close(self):
        """Stop all processes; the next reset starts new ones."""
        if self.shut is not None:
            self.shut()
        self._set(connections=[], shut=None)

    def _ask(self, orders: list) -> list:
        """One order to every process, all work at the same time."""
        try:
            for connection, order in zip(self.connections, orders):
                connection.send(order)
            answers = [connection.recv() for connection in self.connections]
            for answer in answers:
                if isinstance(answer, str):
                    raise RuntimeError(f"SUMO failed:\n{answer}")
        except (EOFError, ConnectionError) as error:
            self.close()
            raise RuntimeError("a process of SUMO died") from error
        except BaseException:  # Ctrl-C too: answers that nobody fetched would be taken for later ones
            self.close()
            raise
        return answers

    def make_state(self, *cars) -> State:
        """The state of a reset; SUMO takes no other."""
        state = super().make_state(*cars)
        self._set(newest=state.position)
        return state

    def draw(self, generators: list[torch.Generator]) -> None:
        """SUMO draws its own random numbers."""

    def reset(self, generators: list[torch.Generator], step=None) -> tuple[State, Tensor]:
        """As `Traffic.reset`; each SUMO is seeded with a number that the generator of its block draws. `step`
        is ignored."""
        if self.num_envs % len(generators):
            raise ValueError(f"num_envs must be a multiple of the {len(generators)} generators, got {self.num_envs}")
        size = (self.num_envs // len(generators),)
        seeds = [torch.randint(2**31 - 1, size, generator=g, device=g.device).tolist() for g in generators]
        if not self.connections:
            try:
                self._start()
            except BaseException:
                self.close()
                raise
        self._ask([seed for block in seeds for seed in block])
        return super().reset(generators)

    def advance(self, state: State, aspect: Tensor, noise: None = None) -> State:
        """One second of SUMO under given lights."""
        if not self.connections:
            raise ValueError("SUMO is not running: call reset()")
        if state.position is not self.newest:
            raise ValueError("SUMO steps only from its newest state")
        colours = self.approaches(aspect[:-1]).long().permute(2, 0, 1).cpu().numpy()  # [B, L, 4] from W, S, E, N
        answers = [torch.from_numpy(np.stack(part, -1)).to(self.device) for part in zip(*self._ask(list(colours)))]
        x, v, entered, left = answers
        after = entered.to(self.dtype).remainder(self.num_places)
        new = (self.place == state.tail[:, None]) & (entered > state.entered)[:, None]
        waiting = torch.where(v <= 0.1, torch.where(new, 0, state.waiting) + 1, 0)
        cars = {"position": x, "speed": v, "waiting": waiting, "tail": after, "entered": entered, "left": left}
        self._set(newest=x)
        return dataclasses.replace(state, **cars, t=state.t + 1)

    def observe(self, state: State) -> Tensor:
        return super().observe(state).to(self.precision)

    def step(self, state: State, action: Tensor, noise: None = None):
        """As `Traffic.step`; no car finds its street full (overflow is 0)."""
        state, obs, reward, terminated, truncated, info = super().step(state, action)
        info = {k: v.to(self.precision) if v.is_floating_point() else v for k, v in info.items()}
        return state, obs.to(self.precision), reward.to(self.precision), terminated, truncated, info


def from_traffic(env: Traffic) -> SumoTraffic:
    """The scenario of `env` in SUMO, with observations and rewards of env's dtype. Processes start at the first reset
    and are stopped by `close()`, at exit, or when the environment is collected."""
    fields = {field.name: getattr(env, field.name) for field in dataclasses.fields(Traffic)}
    return SumoTraffic(**fields, precision=env.dtype)
