"""Crazyflie 2.x quadcopters after gym-pybullet-drones, batched; free flight agrees to 1e-9 in float64.

    env = make("leader_follower_v0", num_envs=4096)
    state, obs = env.reset([torch.Generator().manual_seed(0)])
    state, obs, reward, terminated, truncated, info = env.step(state, action, env.draw(generators))

Tasks: `leader_follower_v0` is the package's LeaderFollowerAviary (the task that ERNIE's appendix D.1 names, whose
settings are not public): the leader hovers 0.5 m above the ground, the followers keep its height. `leader_follower_v1`
is what those words suggest: the leader chases a moving waypoint and the others keep a distance from it, without
touching. `hover_v0` is the package's MultiHoverAviary: every drone climbs to a height of its own.

Physics: `dyn`, the package's explicit equations, and `pyb`, what Bullet (pybullet 3.2.7, 240 Hz) makes of a free drone.
Beside Newton and Euler that is a damping of 4% (in float32) of linear and angular velocity, more at high speed; rotor
forces along the body's axis of one substep ago; and no component above 100 m/s or rad/s. Contacts are not modelled:
in `pyb` a drone stops at the ground, which keeps within 3 mm of Bullet while it is level; drones pass through each
other, which v1 counts and punishes.

Versions of the package (github.com/learnsyslab/gym-pybullet-drones): "v1.0.0" (7688e72), "master" (51caae3, the last
with LeaderFollowerAviary) and "main" (90b178a). They differ in the inertia that Bullet uses, the order of the motors,
the attitude update of `dyn` and the meaning of `pid` actions. The `dyn` of the first two reports an angular velocity
of -1 everywhere; here it is the true one.

Speed, and a GIF of simple controllers:

    python -m envs.drones --compile
    python -m envs.drones --env-id leader_follower_v1 --num-agents 4 --gif drones.gif

Axes: B environments, N drones, A action entries, O observation entries, H past actions. Tensors inside are batch-last
and components come first ([3, N, B]), so that elementary operations run along contiguous memory; the interface is
batch-first. Units: m, s, kg, N, rad; world axes, z upwards; quaternions (x, y, z, w).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from envs import Description, by_agent, for_env, new_figure, print_speed, runs, save_gif

MASS = 0.027  # kg; this and the next from cf2x.urdf
GRAVITY = 9.8  # m/s^2
KF = 3.16e-10  # N/rpm^2
KM = 7.94e-12  # Nm/rpm^2
WEIGHT = MASS * GRAVITY
HOVER_RPM = math.sqrt(WEIGHT / (4 * KF))
ARM = {"pyb": 0.028, "dyn": 0.0397 / math.sqrt(2)}  # m, of the rotors along x and y
DAMPING = 0.03999999910593033  # Bullet's default 0.04 in float32
TOP = 100.0  # m/s and rad/s, Bullet's limit of each component of velocity and angular velocity
REST_HEIGHT = 0.0135  # m, of a drone that stands on the ground in Bullet
URDF_INERTIA = (1.4e-5, 1.4e-5, 2.17e-5)  # kg m^2
BOX_INERTIA = (3.788324848467e-5, 3.788324848467e-5, 7.144199714232e-5)  # of Bullet's box around the collision shape
VERSIONS = ("v1.0.0", "master", "main")
ACTION_SIZES = {"one_d_rpm": 1, "rpm": 4, "vel": 4, "velocity": 3, "pid": 3}  # "velocity" is ours: vel as a vector
SCENARIOS = ("updraft", "wind", "gust", "delay")
POSITIVE = ("mass", "inertia_scale", "kf", "km")
PER_ENV = (*POSITIVE, "gravity", "damping", "gust", "delay", "path_speed")  # fields that may be a value per environment

# the package's DSLPIDControl: gains and limits along x, y, z
FORCE_P = (0.4, 0.4, 1.25)
FORCE_I = 0.05
FORCE_D = (0.2, 0.2, 0.5)
FORCE_LIMIT = (2.0, 2.0, 0.15)  # of the integral
LIFT = (0, 0, WEIGHT)
TORQUE_P = (7e4, 7e4, 6e4)
TORQUE_I = (0, 0, 500)
TORQUE_D = (2e4, 2e4, 1.2e4)
TORQUE_LIMIT = (1.0, 1.0, 1500.0)
# rpm = PWM_SCALE * pwm + PWM_SHIFT
PWM_SCALE = 0.2685
PWM_SHIFT = 4070.3

# v1's waypoint along x, y, z: amplitudes (m), top speeds (in units of path_speed), phases
PATH_LOW = (0.3, 0.3, 0.1, 0.5, 0.5, 0.1, 0.0, 0.0, 0.0)
PATH_HIGH = (0.6, 0.6, 0.3, 1.0, 1.0, 0.3, math.tau, math.tau, math.tau)

# rows: right, up and forwards of a camera that looks from the south-east, 25 degrees downwards
VIEW = np.array([[0.82, 0.57, 0.0], [-0.24, 0.35, 0.906], [-0.52, 0.74, -0.423]])
COLOURS = ((200, 80, 70), (66, 110, 190), (70, 160, 80), (150, 90, 170), (90, 170, 180))  # leader, followers
Vector = Sequence[Tensor]  # components, [N, B] each


@dataclasses.dataclass
class State:
    position: Tensor  # [3, N, B]
    quaternion: Tensor  # [4, N, B]
    velocity: Tensor  # [3, N, B]
    rates: Tensor  # [3, N, B] angular velocity; `dyn` turns it to world axes by the attitude one substep ago
    memory: Tensor  # [3, N, B] pyb: the body's z axis one substep ago; dyn: angular velocity in body axes
    pid: Tensor  # [9, N, B] integrals of the position and attitude errors, roll-pitch-yaw before; else [0, N, B]
    actions: Tensor  # [H, A, N, B] the newest last
    gust: Tensor  # [3, 1, B] force, or [0, 1, B]
    goal: Tensor  # hover: [3, N, B] where to go; v1: [9, 1, B] the waypoint's path; else [0, N, B]
    t: Tensor  # [B] int64, steps since reset


STANDS_STILL = tuple(field.name for field in dataclasses.fields(State) if field.name != "t")  # of State, at an end


@dataclasses.dataclass
class Body:
    """What a substep changes of a State, by components."""

    position: Vector
    quaternion: Vector
    velocity: Vector
    rates: Vector
    memory: Vector


MOVES = ("position", "quaternion", "velocity", "rates", "memory")  # fields of Body, and of State

# ------------------------------------------------------------------------------------------------------ rotations


def dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vector, b: Vector) -> list[Tensor]:
    return [
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    ]


def multiply(a: Vector, b: Vector) -> list[Tensor]:
    """Product of two quaternions."""
    vector = [z + a[3] * y + b[3] * x for x, y, z in zip(a, b, cross(a, b))]
    return [*vector, a[3] * b[3] - dot(a, b)]


def axes_of(q: Vector) -> list[list[Tensor]]:
    """The body's x, y and z axes in world axes: the columns of the rotation matrix."""
    x, y, z, w = q
    return [
        [1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)],
        [2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w)],
        [2 * (x * z + y * w), 2 * (y * z - x * w), 1 - 2 * (x * x + y * y)],
    ]


def to_world(axes: list, v: Vector) -> list[Tensor]:
    return [axes[0][i] * v[0] + axes[1][i] * v[1] + axes[2][i] * v[2] for i in range(3)]


def to_body(axes: list, v: Vector) -> list[Tensor]:
    return [dot(axis, v) for axis in axes]


def atan2(y: Tensor, x: Tensor) -> Tensor:
    """torch.atan2 rounds the last elements of a tensor in another way, so that results would depend on the batch."""
    half_turn = torch.copysign(torch.full_like(y, math.pi), y)
    return torch.atan(y / x) + torch.where(x < 0, half_turn, 0)


def euler(q: Vector) -> list[Tensor]:
    """Roll, pitch, yaw about fixed axes; near the poles roll is 0 (pybullet's getEulerFromQuaternion)."""
    x, y, z, w = q
    sine = 2 * (y * w - x * z)
    side = sine.sign()
    roll = atan2(2 * (y * z + x * w), w * w - x * x - y * y + z * z)
    pitch = torch.asin(sine.clamp(-1, 1))
    yaw = atan2(2 * (x * y + z * w), w * w + x * x - y * y - z * z)
    pole = sine.abs() >= 0.99999
    return [
        torch.where(pole, 0, roll),
        torch.where(pole, side * (math.pi / 2), pitch),
        torch.where(pole, 2 * atan2(-side * x, side * y), yaw),
    ]


def from_euler(rpy: Vector) -> list[Tensor]:
    cr, cp, cy = [torch.cos(angle / 2) for angle in rpy]
    sr, sp, sy = [torch.sin(angle / 2) for angle in rpy]
    return [
        sr * cp * cy - cr * sp * sy,
        cr * sp * cy + sr * cp * sy,
        cr * cp * sy - sr * sp * cy,
        cr * cp * cy + sr * sp * sy,
    ]


def turn(w: Vector, dt: float) -> list[Tensor]:
    """Quaternion of the turn by an angular velocity w in time dt."""
    speed = dot(w, w).sqrt()
    half = speed * (dt / 2)
    scale = torch.sin(half) / speed.clamp_min(1e-12)
    return [*(scale * x for x in w), torch.cos(half)]


def normalized(v: Vector) -> list[Tensor]:
    """Divided by its length, unless that is 0."""
    length = sum(x * x for x in v).sqrt()
    scale = 1 / torch.where(length > 0, length, 1)
    return [scale * x for x in v]


def difference_of_squares(a: Tensor, b: Tensor) -> Tensor:
    """As a product: of equal rotors it is exactly 0, also where a compiler fuses products and sums; otherwise the
    direction of the angular velocity, which is observed, is that of a rounding error."""
    return (a - b) * (a + b)


# ----------------------------------------------------------- observations (env, state) -> blocks [k, N, B] of entries


def pose(state: State) -> Tensor:
    """[6, N, B] position and roll, pitch, yaw in the units of LeaderFollowerAviary."""
    x, y, z = state.position
    place = [x.clamp(-15, 15) / 15, y.clamp(-15, 15) / 15, z.clamp(0, 5) / 5]
    return torch.stack([*place, *(angle / math.pi for angle in euler(state.quaternion))])


def package_scales(env, state: State) -> list[Tensor]:
    """LeaderFollowerAviary's 12 entries in [-1, 1]; angular velocity only as a direction."""
    x, y, z = state.velocity
    velocity = [x.clamp(-3, 3) / 3, y.clamp(-3, 3) / 3, z.clamp(-1, 1) / 3]  # the package divides vz by 3, not 1
    return [pose(state), torch.stack([*velocity, *normalized(state.rates)])]


def raw(env, state: State) -> list[Tensor]:
    """MultiHoverAviary's 12 entries in SI units."""
    return [state.position, torch.stack(euler(state.quaternion)), state.velocity, state.rates]


def relative(env, state: State) -> list[Tensor]:
    """Own pose, velocity / 3, angular velocity / 10; position / 2 and velocity / 3 of the target (the waypoint, or the
    leader), seen from the drone; positions / 2 of the other drones, the next one first. All within [-1, 1]."""
    p, v = state.position, state.velocity
    target, target_velocity = env.targets(state)
    others = (p[:, env.others] - p[:, None]).transpose(0, 1).flatten(0, 1)  # [3 (N - 1), N, B]
    blocks = [v / 3, state.rates / 10, (target - p) / 2, (target_velocity - v) / 3, others / 2]
    return [pose(state), *(block.clamp(-1, 1) for block in blocks)]


# -------------------------------------------------------------------- rewards (env, state) -> [N, B], info


def height_reward(env, state: State) -> tuple[Tensor, dict]:
    """Leader: squared distance to (0, 0, 0.5); followers: a share of their squared difference in height."""
    x, y, z = state.position
    leader = x[:1] ** 2 + y[:1] ** 2 + (z[:1] - 0.5) ** 2
    followers = (z[1:] - z[:1]) ** 2 / env.num_agents
    return -torch.cat((leader, followers)), {}


def team_reward(env, state: State) -> tuple[Tensor, dict]:
    """For everybody the sum over drones of 2 - distance^4, at least 0, to their goals."""
    square = ((state.position - state.goal) ** 2).sum(0)
    return (2 - square**2).relu().sum(0).expand(env.num_agents, -1), {}


def formation_reward(env, state: State) -> tuple[Tensor, dict]:
    """Leader: squared distance to the waypoint; followers: squared difference of their distance to the leader from
    `spacing`; both pay for each drone that is too near."""
    p = state.position
    target, _ = env.targets(state)
    distance = ((target - p) ** 2).sum(0).sqrt()  # [N, B]
    wanted = torch.where(env.is_leader, 0.0, env.spacing)
    gap = ((p[:, env.others] - p[:, None]) ** 2).sum(0)  # [N - 1, N, B]
    touching = (gap < env.collision_distance**2).to(p.dtype).sum(0)
    reward = -((distance - wanted) ** 2) - env.collision_cost * touching
    return reward, {"distance": distance.T, "collisions": touching.T}


# ----------------------------------------------------------------------------------------------------- environment


@dataclasses.dataclass(frozen=True)
class Task:
    observe: Callable
    reward: Callable
    fields: dict  # defaults that differ from those of `Drones`


# with v1.0.0's inertia, three times too high, or at higher speeds the velocity controller tumbles
VELOCITY = {"version": "main", "action_type": "velocity", "speed_limit": 0.5, "horizon": 240}
TASKS = {
    "leader_follower_v0": Task(package_scales, height_reward, {}),
    "leader_follower_v1": Task(relative, formation_reward, VELOCITY),
    "hover_v0": Task(raw, team_reward, {"version": "main", "control_hz": 30, "history": 15}),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Drones(Description):
    """A description without state; `dataclasses.replace(env, mass=0.03)` is the same task with heavier drones. Fields
    typed `float | Tensor` take a number or a value per environment [B]; controllers and the meaning of actions know the
    nominal drone only."""

    env_id: str
    num_envs: int
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    num_agents: int = 2
    version: str = "v1.0.0"  # of the package: "v1.0.0", "master" or "main"
    physics: str = "pyb"  # or "dyn"
    action_type: str = "one_d_rpm"  # or "rpm", "vel", "velocity", "pid"
    physics_hz: int = 240  # Hz, substeps
    control_hz: int = 48  # Hz, steps
    horizon: int = 242  # steps of an episode (the package's 5 s at 48 Hz, 8 s at 30 Hz)
    speed_limit: float = 0.25  # m/s of a full `vel` or `velocity` action
    history: int = 0  # past actions at the end of the observation, oldest first (half a second in hover)
    mass: float | Tensor = MASS  # kg
    inertia_scale: float | Tensor = 1.0
    kf: float | Tensor = KF  # N/rpm^2, thrust
    km: float | Tensor = KM  # Nm/rpm^2, torque of a motor
    gravity: float | Tensor = GRAVITY  # m/s^2
    damping: float | Tensor = DAMPING  # 1/s, of `pyb`
    wind: Sequence[float] | Tensor = (0.0, 0.0, 0.0)  # N, constant force on every drone [3], or [B, 3]
    gust: float | Tensor = 0.0  # N, standard deviation along each axis of a force common to the drones
    gust_time: float = 0.5  # s, its correlation time
    delay: float | Tensor = 0  # 1: an action takes effect one step later, after a first action of zeros
    path_speed: float | Tensor = 0.3  # m/s, top speed of v1's waypoint along x and y
    spacing: float = 0.5  # m, v1's distance between leader and followers
    collision_distance: float = 0.2  # m between centres (Bullet's cylinders touch at 0.122)
    collision_cost: float = 1.0

    discrete: ClassVar[bool] = False
    action_low: ClassVar[float] = -1.0
    action_high: ClassVar[float] = 1.0
    dynamics: ClassVar[tuple[str, ...]] = ("mass",)  # fields that robustness reports scale
    frame_steps: ClassVar[int] = 4  # from one picture of a GIF to the next
    trail: ClassVar[int] = 60  # past states that it shows

    def __post_init__(self):
        self._set(device=torch.device(self.device))
        self._check()
        for name in PER_ENV:
            value = getattr(self, name)
            tensor = torch.as_tensor(value)
            self._set(**{name: tensor.to(self.device, self.dtype) if tensor.ndim else float(value)})
        self._build()

    # ---------------------------------------------------------------------------------------------------- step

    def reset(self, generators: list[torch.Generator]) -> tuple[State, Tensor]:
        """Generator k alone draws the k-th block of num_envs / len(generators) environments. All drones are level and
        at rest: in v0 and hover where the package puts them; in v1 the leader near the waypoint and the followers
        `spacing` to 2 `spacing` around it (further if they are many)."""
        if self.num_envs % len(generators):
            raise ValueError(f"num_envs must be a multiple of the {len(generators)} generators, got {self.num_envs}")
        if self.env_id == "leader_follower_v1":
            state = self._start_formation(generators)
        else:
            place = 0.1588 * torch.arange(self.num_agents, dtype=torch.float64)
            position = torch.stack((place, place, torch.full_like(place, 0.1125)), -1)
            state = self.make_state(position.expand(self.num_envs, -1, -1))
        if self.gusty:
            state.gust = self.gust * self._block(torch.randn, generators, 3, 1)
        return state, self.observe(state)

    def _start_formation(self, generators: list[torch.Generator]) -> State:
        followers = self.num_agents - 1
        low, high = torch.tensor((PATH_LOW, PATH_HIGH), dtype=self.dtype, device=self.device)[..., None, None]
        goal = low + (high - low) * self._block(torch.rand, generators, 9, 1)
        state = self.make_state(torch.zeros(self.num_envs, self.num_agents, 3), goal=goal)
        leader = self.waypoint(state)[0] + (0.4 * self._block(torch.rand, generators, 3, 1) - 0.2)
        uniform = self._block(torch.rand, generators, 3, followers)
        share = torch.arange(followers, device=self.device)[:, None] / followers
        angle = math.tau * (share + uniform[0, :1])
        radius = (1 + uniform[1]) * max(self.spacing, followers / (4 * math.pi))
        around = torch.stack((radius * angle.cos(), radius * angle.sin(), 0.4 * uniform[2] - 0.2))
        state.position = torch.cat((leader, leader + around), 1)
        return state

    def draw(self, generators: list[torch.Generator]) -> Tensor | None:
        """The random numbers of one step: standard normal [3, 1, B] for the gust, if there is any."""
        return self._block(torch.randn, generators, 3, 1) if self.gusty else None

    def make_state(self, position, quaternion=None, velocity=None, rates=None, goal=None, t=0) -> State:
        """A state from arrays: position, velocity, rates (world axes) [B, N, 3], quaternion [B, N, 4] (level if left
        out), goal (State's, batch-last), t [B] or a number. Controllers, past actions and gusts are at zero; hover's
        goals lie 1 / (i + 1) above `position`."""
        B, N = len(position), self.num_agents

        def components(values, size):
            values = torch.zeros(B, N, size) if values is None else torch.as_tensor(values)
            if values.shape != (B, N, size):
                raise ValueError(f"arrays of a state must be [B, {N}, 3 or 4], got {list(values.shape)}")
            return values.to(self.device, self.dtype).permute(2, 1, 0).contiguous()

        position = components(position, 3)
        rates = components(rates, 3)
        if quaternion is None:
            quaternion = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(B, N, 4)
        quaternion = components(quaternion, 4)
        axes = axes_of(quaternion)
        if goal is None:
            goal = self._default_goal(position)
        return State(
            position=position,
            quaternion=quaternion,
            velocity=components(velocity, 3),
            rates=rates,
            memory=torch.stack(axes[2] if self.physics == "pyb" else to_body(axes, rates)),
            pid=position.new_zeros(9 * self.controlled, N, B),
            actions=position.new_zeros(self.past, self.action_sizes[0], N, B),
            gust=position.new_zeros(3 * self.gusty, 1, B),
            goal=goal,
            t=torch.as_tensor(t, dtype=torch.int64, device=self.device).expand(B).clone(),
        )

    def _default_goal(self, position: Tensor) -> Tensor:
        _, N, B = position.shape
        if self.env_id == "hover_v0":
            x, y, z = position
            number = torch.arange(1, N + 1)[:, None].to(position)
            return torch.stack((x, y, z + 1 / number))
        shape = (9, 1) if self.env_id == "leader_follower_v1" else (0, N)
        return position.new_zeros(*shape, B)

    def step(self, state: State, action: Tensor, noise: Tensor | None = None):
        """action [B, N, A] (clipped to [-1, 1], except points that `pid` is to fly to), noise from `draw`.

        Returns state, obs [B, N, O], reward [B, N], terminated [B], truncated [B], info (v1: "distance" to the target
        and "collisions", the number of drones that are too near, [B, N] each). Hover stands still after its end,
        without reward, so that all episodes take `horizon` steps and the sum of rewards is the package's return.
        """
        new = self.fly(state, action, noise)
        reward, info = self.task.reward(self, new)
        if self.env_id == "hover_v0":
            terminated, truncated = self.ends(state)
            over = terminated | truncated
            stopped = {name: torch.where(over, getattr(state, name), getattr(new, name)) for name in STANDS_STILL}
            new = dataclasses.replace(new, **stopped)
            reward = torch.where(over, 0, reward)
        terminated, truncated = self.ends(new)
        return new, self.observe(new), reward.T, terminated, truncated, info

    def fly(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        """A step without observation, reward and end."""
        action = torch.stack([a.T for a in action.unbind(2)])  # batch-last in memory too, which permute is not
        if not self.absolute:
            action = action.clamp(-1, 1)
        actions = state.actions
        if self.past:
            actions = torch.cat((actions[1:], action[None]))
        if self.late is not None:
            action = torch.where(self.late, state.actions[-1], action)
        gust = state.gust
        if self.gusty:
            decay = math.exp(-1 / (self.control_hz * self.gust_time))
            gust = decay * gust + (1 - decay**2) ** 0.5 * self.gust * noise
        rpm, pid = self.command(state, action)
        return self.advance(dataclasses.replace(state, pid=pid, actions=actions, gust=gust, t=state.t + 1), rpm)

    # ------------------------------------------------------------------------------------------------- control

    def command(self, state: State, action: Tensor) -> tuple[list[Tensor], Tensor]:
        """Rotor speeds [4, N, B] for an action [A, N, B], and the controller's new memory [9, N, B]."""
        if not self.controlled:
            rpm = [HOVER_RPM * (1 + 0.05 * a) for a in action]
            if self.action_type == "one_d_rpm":
                rpm = rpm * 4
            return rpm, state.pid
        rpy = euler(state.quaternion)
        zero = torch.zeros_like(rpy[0])
        if self.action_type == "pid":
            return self._pid(state, rpy, self._to_point(state, action), [zero] * 3, zero)
        if self.action_type == "velocity":
            length = dot(action, action).sqrt().clamp_max(1)
        else:
            length = action[3].abs()
        speed = self.speed_limit * length
        velocity = [speed * x for x in normalized(action[:3])]
        return self._pid(state, rpy, [zero] * 3, velocity, rpy[2])

    def _to_point(self, state: State, action: Tensor) -> list[Tensor]:
        """The vector to the position that a `pid` action asks for."""
        if not self.absolute:
            return [0.1 * a for a in action]
        ahead = [a - x for a, x in zip(action, state.position)]
        length = dot(ahead, ahead).sqrt()
        return [x / length.clamp_min(1) for x in ahead]  # at most 1 m

    def _pid(self, state: State, rpy: Vector, error: Vector, velocity: Vector, yaw: Tensor):
        """The package's DSLPIDControl; `error` is the vector to the wanted position."""
        dt = 1 / self.control_hz
        axes = axes_of(state.quaternion)
        total, total_tilt, rpy_before = state.pid.split(3)
        total = [(s + dt * e).clamp(-limit, limit) for s, e, limit in zip(total, error, FORCE_LIMIT)]
        force = []
        for i in range(3):
            damping = FORCE_D[i] * (velocity[i] - state.velocity[i])
            force.append(FORCE_P[i] * error[i] + FORCE_I * total[i] + damping + LIFT[i])
        z = normalized(force)
        y = normalized(cross(z, [yaw.cos(), yaw.sin(), torch.zeros_like(yaw)]))
        wanted = [cross(y, z), y, z]
        # entries (2, 1), (0, 2), (1, 0) of Rd' R - R' Rd
        tilt = [dot(wanted[i], axes[j]) - dot(axes[i], wanted[j]) for i, j in ((2, 1), (0, 2), (1, 0))]
        total_tilt = [(s - dt * e).clamp(-limit, limit) for s, e, limit in zip(total_tilt, tilt, TORQUE_LIMIT)]
        torque = []
        for i in range(3):
            damping = TORQUE_D[i] * (rpy[i] - rpy_before[i]) / dt
            torque.append(TORQUE_I[i] * total_tilt[i] - TORQUE_P[i] * tilt[i] - damping)
        thrust = dot(force, axes[2]).relu()
        return self._rotors(thrust, torque), torch.stack([*total, *total_tilt, *rpy])

    def _rotors(self, thrust: Tensor, torque: Vector) -> list[Tensor]:
        """Rotor speeds for a thrust (N) and a torque (in pulse widths)."""
        base = ((thrust / (4 * KF)).sqrt() - PWM_SHIFT) / PWM_SCALE
        x, y, z = [component.clamp(-3200, 3200) for component in torque]
        x = 0.5 * self.roll_sign * x
        y = 0.5 * y
        pwm = [base + x - y - z, base + x + y + z, base - x + y - z, base - x - y + z]
        return [PWM_SCALE * width.clamp(20000, 65535) + PWM_SHIFT for width in pwm]

    # ------------------------------------------------------------------------------------------------- physics

    def advance(self, state: State, rpm: Vector) -> State:
        """One step of flight at four constant rotor speeds rpm ([4, N, B], not checked)."""
        body = Body(*(getattr(state, name).unbind() for name in MOVES))
        forces = self._forces(state, rpm)
        substep = self._bullet if self.physics == "pyb" else self._explicit
        for _ in range(self.substeps):
            body = substep(body, *forces)
        body.quaternion = normalized(body.quaternion)
        return dataclasses.replace(state, **{name: torch.stack(getattr(body, name)) for name in MOVES})

    def _forces(self, state: State, rpm: Vector) -> tuple[Tensor, Vector, Vector]:
        """What acts throughout a step: lift of the rotors (m/s^2) and their torque about the body's axes (Nm), push of
        gravity and wind (m/s^2, world axes)."""
        d02 = difference_of_squares(rpm[0], rpm[2])
        d13 = difference_of_squares(rpm[1], rpm[3])
        d10 = difference_of_squares(rpm[1], rpm[0])
        d32 = difference_of_squares(rpm[3], rpm[2])
        lift = self.kf * sum(r * r for r in rpm) / self.mass
        arm = self.kf * ARM[self.physics]
        roll = self.roll_sign * arm * (d02 + d13)
        pitch = arm * (d13 - d02)
        yaw = self.km * (d10 + d32)
        # stacked, so that compiled code computes them once and not from the action in every substep, six times slower
        lift, *torque = torch.stack((lift, roll, pitch, yaw))
        push = [0.0, 0.0, -self.gravity]
        if self.breeze is not None:
            push = [a + force / self.mass for a, force in zip(push, self.breeze)]
        if self.gusty:
            push = [a + force / self.mass for a, force in zip(push, state.gust)]
        return lift, torque, push

    def _bullet(self, body: Body, lift: Tensor, torque: Vector, push: Vector) -> Body:
        """Bullet's free flight. Rotors push along the lagged axis, at arms that turn with the present attitude."""
        dt = 1 / self.physics_hz
        v, w = body.velocity, body.rates
        lagged = body.memory
        axes = axes_of(body.quaternion)
        x, y, z = to_body(axes, lagged)
        wx, wy, wz = to_body(axes, w)
        jx, jy, jz = self.moments
        roll, pitch, yaw = torque
        turning = [
            (roll * z + yaw * x - (jz - jy) * wy * wz) / jx,
            (pitch * z + yaw * y - (jx - jz) * wz * wx) / jy,
            (yaw * z - roll * x - pitch * y - (jy - jx) * wx * wy) / jz,
        ]
        drag = self.damping * (1 + dot(v, v).sqrt())
        brake = self.damping * (1 + dot(w, w).sqrt())
        acceleration = [lift * z + a - drag * x for x, z, a in zip(v, lagged, push)]
        v = [(x + dt * a).clamp(-TOP, TOP) for x, a in zip(v, acceleration)]
        w = [(x + dt * (a - brake * x)).clamp(-TOP, TOP) for x, a in zip(w, to_world(axes, turning))]
        p = [x + dt * u for x, u in zip(body.position, v)]
        grounded = p[2] < REST_HEIGHT
        v[2] = torch.where(grounded, v[2].relu(), v[2])
        p[2] = p[2].clamp_min(REST_HEIGHT)
        return Body(p, multiply(turn(w, dt), body.quaternion), v, w, axes[2])

    def _explicit(self, body: Body, lift: Tensor, torque: Vector, push: Vector) -> Body:
        """The package's explicit equations. Before "main" body rates were taken for the derivatives of roll, pitch and
        yaw. There is no ground."""
        dt = 1 / self.physics_hz
        w, q = body.memory, body.quaternion
        axes = axes_of(q)
        gyro = cross(w, [j * x for j, x in zip(self.moments, w)])
        v = [x + dt * (lift * z + a) for x, z, a in zip(body.velocity, axes[2], push)]
        w = [x + dt * (m - g) / j for x, m, g, j in zip(w, torque, gyro, self.moments)]
        # without damping this diverges at some hundred rad/s: the clamp keeps what follows finite
        w = [x.clamp(-10 * TOP, 10 * TOP) for x in w]
        p = [x + dt * u for x, u in zip(body.position, v)]
        if self.version == "main":
            q = multiply(q, turn(w, dt))
        else:
            q = from_euler([angle + dt * x for angle, x in zip(euler(q), w)])
        return Body(p, q, v, to_world(axes, w), w)

    # ----------------------------------------------------------------------------------- targets, ends, observations

    def waypoint(self, state: State) -> tuple[Tensor, Tensor]:
        """Position and velocity [3, 1, B] of v1's waypoint, which swings around (0, 0, 1)."""
        amplitude, speed, phase = state.goal.unflatten(0, (3, 3))
        speed = self.path_speed * speed
        angle = speed / amplitude * (state.t.to(self.dtype) / self.control_hz) + phase
        x, y, z = amplitude * angle.sin()
        return torch.stack((x, y, z + 1)), speed * angle.cos()

    def targets(self, state: State) -> tuple[Tensor, Tensor]:
        """Position and velocity [3, N, B] of what each of v1's drones follows."""
        point, velocity = self.waypoint(state)
        point = torch.where(self.is_leader, point, state.position[:, :1])
        velocity = torch.where(self.is_leader, velocity, state.velocity[:, :1])
        return point, velocity

    def ends(self, state: State) -> tuple[Tensor, Tensor]:
        """terminated, truncated [B]. Hover ends when all are at their goals to 0.1 mm, or one is too far or tilted."""
        truncated = state.t >= self.horizon
        if self.env_id != "hover_v0":
            return torch.zeros_like(truncated), truncated
        x, y, z = state.position
        roll, pitch, _ = euler(state.quaternion)
        lost = (x.abs() > 2) | (y.abs() > 2) | (z > 2) | (roll.abs() > 0.4) | (pitch.abs() > 0.4)
        distance = ((state.position - state.goal) ** 2).sum(0).sqrt()
        return distance.sum(0) < 1e-4, truncated | lost.any(0)

    def observe(self, state: State) -> Tensor:
        """[B, N, O] (a view of [O, N, B])."""
        past = state.actions[self.past - self.history :].flatten(0, 1)
        return torch.cat([*self.task.observe(self, state), past]).permute(2, 1, 0)

    def global_state(self, state: State) -> Tensor:
        """[B, N O] for centralised critics: the observations of all drones."""
        return self.observe(state).flatten(1)

    def scenario(self, name: str, strength: float) -> "Drones":
        """The task with a constant force upwards or along x ("updraft", "wind", N), gusts (N) or late actions."""
        winds = {"updraft": (0.0, 0.0, strength), "wind": (strength, 0.0, 0.0)}
        change = {"wind": winds[name]} if name in winds else {name: strength}
        return dataclasses.replace(self, **change)

    # ------------------------------------------------------------------------------------------------ pictures

    def render(self, state: State, index: int = 0, past: Sequence[State] = (), size: int = 400) -> np.ndarray:
        """[size, size, 3] uint8 picture of one environment from above the side: drones (larger than life), their
        shadows and heights, trails through `past` states, and as crosses what a leader or hover's drones are to
        reach."""
        big = 3 * size  # drawn large and scaled down, which smooths
        centre = np.array([0.0, 0.0, 0.6])
        x, y, _ = np.eye(3)
        image = Image.new("RGB", (big, big), "white")
        canvas = ImageDraw.Draw(image)

        def numbers(tensor):
            return tensor[..., index].T.double().cpu().numpy()

        position = numbers(state.position)  # [N, 3]
        reach = max(1.0, np.abs(position - centre).max() + 0.2)

        def pixels(points):
            right, up, depth = VIEW @ (np.reshape(points, (-1, 3)) - centre).T
            scale = big / (2.2 * reach + 0.4 * depth)
            return list(zip(big / 2 + scale * right, big / 2 - scale * up))

        def line(points, colour, width=1.0):
            canvas.line(pixels(points), fill=colour, width=round(width * big / 400), joint="curve")

        def disc(middle, along, across, colour):
            angle = np.linspace(0, 2 * np.pi, 25)[:, None]
            canvas.polygon(pixels(middle + np.cos(angle) * along + np.sin(angle) * across), fill=colour)

        for k in reach * np.linspace(-1, 1, 9):  # a grid on the ground
            for a, b in ((x, y), (y, x)):
                line((k * a - reach * b, k * a + reach * b), "#e1e1e1")
        goals = np.array([[0.0, 0.0, 0.5]])
        if self.env_id == "hover_v0":
            goals = numbers(state.goal)
        elif self.env_id == "leader_follower_v1":
            times = torch.linspace(0, self.horizon, 100, device=self.device)[:, None]
            path, _ = self.waypoint(dataclasses.replace(state, t=times))
            line(numbers(path), "#f5cd8c")
            goals = numbers(self.waypoint(state)[0])
        colours = [COLOURS[i % len(COLOURS)] for i in range(self.num_agents)]
        trails = np.stack([numbers(s.position) for s in (*past, state)], 1)  # [N, T, 3]
        for p, trail, colour in zip(position, trails, colours):
            shadow = p * (x + y)
            disc(shadow, 0.05 * x, 0.05 * y, "#bebebe")
            line((shadow, p), "#d2d2d2")
            line(trail, tuple((c + 255) // 2 for c in colour), 1.5)
        for goal in goals:
            for spike in 0.06 * np.eye(3):
                line((goal - spike, goal + spike), "#eb9628", 2)
        ahead, aside, _ = [numbers(torch.stack(axis)) for axis in axes_of(state.quaternion)]
        for i in np.argsort(-position @ VIEW[2]):  # far ones first
            for a, b in ((1, 1), (-1, -1), (1, -1), (-1, 1)):
                rotor = position[i] + 0.08 * (a * ahead[i] + b * aside[i])
                line((position[i], rotor), "#3c3c3c", 1.5)
                disc(rotor, 0.05 * ahead[i], 0.05 * aside[i], colours[i])
        seconds = f"{int(state.t[index]) / self.control_hz:.1f} s"
        canvas.text((big * 0.02, big * 0.02), seconds, "black", ImageFont.load_default(big // 30))
        return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))

    # ---------------------------------------------------------------------------------- constants and validation

    def _build(self):
        N, A = self.num_agents, ACTION_SIZES[self.action_type]
        obs_size = 12 + self.history * A
        agents = ("leader_0", *(f"follower_{k}" for k in range(N - 1)))
        if self.env_id == "leader_follower_v1":
            obs_size += 3 * (N + 1)
        elif self.env_id == "hover_v0":
            agents = tuple(f"drone_{k}" for k in range(N))
        inertia = BOX_INERTIA if (self.version, self.physics) == ("v1.0.0", "pyb") else URDF_INERTIA
        i = torch.arange(N, device=self.device)
        everyone = torch.ones(N, dtype=torch.bool, device=self.device)
        wind = torch.as_tensor(self.wind, dtype=self.dtype, device=self.device).reshape(-1, 3).T[:, None]
        delay = torch.as_tensor(self.delay) > 0
        delayed = bool(delay.any())
        self._set(
            task=TASKS[self.env_id],
            agents=agents,
            obs_sizes=(obs_size,) * N,
            action_sizes=(A,) * N,
            obs_mask=everyone[:, None].repeat(1, obs_size),
            action_mask=everyone[:, None].repeat(1, A),
            cooperators=everyone,
            # name: strength here; rotors that all turn alike are helpless against sideways forces
            scenarios=dict.fromkeys(("updraft", "delay") if self.action_type == "one_d_rpm" else SCENARIOS, 0.0),
            frame_ms=1000 * self.frame_steps // self.control_hz,
            substeps=self.physics_hz // self.control_hz,
            inertia=inertia,  # kg m^2, nominal
            moments=[self.inertia_scale * j for j in inertia],  # kg m^2
            roll_sign=-1.0 if self.version == "main" else 1.0,
            controlled=self.action_type in ("vel", "pid", "velocity"),
            absolute=self.action_type == "pid" and self.version != "v1.0.0",
            # None where nothing blows or comes late, which then costs nothing
            breeze=wind.contiguous() if wind.any() else None,  # [3, 1, 1 or B]
            gusty=bool(torch.as_tensor(self.gust).any()),
            late=delay.to(self.device) if delayed else None,
            past=max(self.history, int(delayed)),  # H
            others=(i + i[1:, None]) % N,  # [N - 1, N]
            is_leader=(i == 0)[:, None],  # [N, 1]
        )

    def _check(self):
        for name in ("num_envs", "num_agents", "physics_hz", "control_hz", "horizon"):
            self._require(name, "1 or more", getattr(self, name) >= 1)
        self._require("version", f"one of {', '.join(VERSIONS)}", self.version in VERSIONS)
        self._require("physics", "pyb or dyn", self.physics in ARM)
        self._require("action_type", f"one of {', '.join(ACTION_SIZES)}", self.action_type in ACTION_SIZES)
        rule = f"a divisor of physics_hz = {self.physics_hz}"
        self._require("control_hz", rule, self.physics_hz % self.control_hz == 0)
        for name in ("speed_limit", "gust_time"):
            self._require(name, "positive", 0 < getattr(self, name) < math.inf)
        for name in ("history", "spacing", "collision_distance", "collision_cost"):
            self._require(name, "0 or more", 0 <= getattr(self, name) < math.inf)
        for name in PER_ENV:
            value = torch.as_tensor(getattr(self, name))
            if value.shape not in ((), (self.num_envs,)):
                raise ValueError(f"{name} must be a number or [num_envs = {self.num_envs}], got {list(value.shape)}")
            positive = name in POSITIVE
            high_enough = value > 0 if positive else value >= 0
            self._require(name, "positive" if positive else "0 or more", bool((high_enough & value.isfinite()).all()))
        delay = torch.as_tensor(self.delay)
        self._require("delay", "0 or 1", bool(((delay == 0) | (delay == 1)).all()))
        wind = torch.as_tensor(self.wind)
        fits = wind.shape in ((3,), (self.num_envs, 3)) and bool(wind.isfinite().all())
        self._require("wind", f"[3] or [num_envs = {self.num_envs}, 3] and finite", fits)

    def _require(self, name: str, rule: str, holds: bool):
        if not holds:
            raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_agents: int | None = None,
    continuous_actions: bool = True,
    **fields,
) -> Drones:
    """`fields` are those of `Drones` by name. Actions are always continuous: continuous_actions, which other
    environments know, is ignored.

    Raises ValueError for an unknown task or field, or a value that is out of range."""
    if env_id not in TASKS:
        raise ValueError(f"env_id must be one of {', '.join(TASKS)}, got {env_id!r}")
    known = [field.name for field in dataclasses.fields(Drones)[5:]]
    for name in fields:
        if name not in known:
            raise ValueError(f"fields of {env_id} are {', '.join(known)}, got {name!r}")
    if num_agents is not None:
        fields["num_agents"] = num_agents
    return Drones(env_id, num_envs, device, dtype, **TASKS[env_id].fields | fields)


def target_of(env: Drones, state: State) -> tuple[Tensor, Tensor]:
    """Position and velocity [3, N, B] that the task asks each drone for."""
    p = state.position
    still = torch.zeros_like(p)
    if env.env_id == "hover_v0":
        return state.goal + 1e-3, still  # not exactly there, which would end the episode and its rewards
    if env.env_id == "leader_follower_v0":
        x, y, _ = p * ~env.is_leader
        height = torch.where(env.is_leader, 0.5, p[2, :1])
        return torch.stack((x, y, height)), still
    aim, velocity = env.targets(state)
    spacing = torch.where(env.is_leader, 0.0, env.spacing)
    return aim + spacing * torch.stack(normalized(p - aim)), velocity


def simple_controller(env: Drones, state: State) -> Tensor:
    """Action [B, N, A] of a proportional-derivative controller towards what the task asks for, of any action type: a
    baseline that needs no learning."""
    p, v = state.position, state.velocity
    aim, velocity = target_of(env, state)
    if env.action_type == "pid":
        action = aim if env.absolute else (aim - p) / 0.1
    elif env.controlled:
        action = (velocity + 3 * (aim - p)) / env.speed_limit
        length = action.square().sum(0, keepdim=True).sqrt()
        action = action / length.clamp_min(1)
        if env.action_type == "vel":
            action = torch.cat((action, length.clamp_max(1)))
    else:
        lift = 100 * (aim[2] - p[2]) + 30 * (velocity[2] - v[2])
        action = lift.expand(env.action_sizes[0], -1, -1)
    return action.clamp(-1, 1).permute(2, 1, 0)


@torch.no_grad()
def plot_distances(env: Drones, act: Callable, generators: list[torch.Generator], path: str):
    """A picture of an episode of v1 under `act`, obs [S, N, B, O] -> action [S, N, B, A]: how far each drone is from
    what it follows, over time."""
    state, obs = env.reset(generators)
    seen = []
    for _ in range(env.horizon):
        action = act(by_agent(obs, len(generators)))
        state, obs, _, _, _, info = env.step(state, for_env(action, env), env.draw(generators))
        seen.append(info["distance"])
    distances = torch.stack(seen).cpu().numpy()  # [T, B, N]
    low, middle, high = np.quantile(distances, (0.1, 0.5, 0.9), axis=1)  # [T, N]
    seconds = np.arange(1, env.horizon + 1) / env.control_hz
    figure = new_figure(7, 4)
    axis = figure.subplots()
    for n, name in enumerate(env.agents):
        target = env.agents[0] if n else "waypoint"
        (line,) = axis.plot(seconds, middle[:, n], label=f"{name} to {target}")
        axis.fill_between(seconds, low[:, n], high[:, n], alpha=0.2, color=line.get_color())
    axis.axhline(env.spacing, color="gray", linestyle="--", label="wanted")
    axis.set(xlabel="seconds", ylabel="distance (m)", title="median and middle 80% of episodes", ylim=(0, None))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    with runs.written(path, "wb") as file:
        figure.savefig(file, dpi=110)


def write_gif(env: Drones, path: str):
    """One episode of environment 0 under the simple controller."""
    generator = torch.Generator().manual_seed(0)
    state, _ = env.reset([generator])
    states = [state]
    frames = []
    for t in range(env.horizon):
        state, *_ = env.step(state, simple_controller(env, state), env.draw([generator]))
        states.append(state)
        if t % env.frame_steps == 0:
            frames.append(env.render(state, past=states[-env.trail :]))
    save_gif(path, frames, env.frame_ms)


def main(
    env_id: str = "leader_follower_v0",
    num_envs: int = 4096,
    num_agents: int | None = None,
    physics: str = "pyb",
    action_type: str | None = None,
    device: str = "cpu",
    threads: int = 1,
    compile: bool = False,
    seconds: float = 2.0,
    gif: str | None = None,
):
    """Measure env steps/s with random actions, and write a GIF of the simple controller.

    Args:
        env_id: one of the tasks
        num_envs: environments in the batch
        num_agents: drones
        physics: pyb or dyn
        action_type: one_d_rpm, rpm, vel, velocity or pid; default: the task's
        device: torch device
        threads: CPU threads
        compile: measure the compiled step too
        seconds: how long to measure
        gif: where to write the GIF
    """
    torch.set_num_threads(threads)
    fields = {"physics": physics}
    if action_type:
        fields["action_type"] = action_type
    env = make(env_id, num_envs, device, num_agents=num_agents, **fields)
    print(f"{env_id}, {env.num_agents} drones, {physics}, {env.action_type}, B = {num_envs}, {threads} threads")
    generator = torch.Generator().manual_seed(0)
    shape = (num_envs, env.num_agents, env.action_sizes[0])
    actions = [(2 * torch.rand(shape, generator=generator) - 1).to(env.device) for _ in range(5)]
    print_speed(env, actions, seconds, compile)
    if gif:
        write_gif(dataclasses.replace(env, num_envs=1), gif)
        print(f"wrote {gif}")


if __name__ == "__main__":
    with runs.quiet_pipe():
        tyro.cli(main)
