"""The quadcopters of envs/drones.py in the real Bullet: the physics of gym-pybullet-drones.

    pip install -r requirements-pybullet.txt
    env = from_drones(drones.make("leader_follower_v0", num_envs=4))
    state, obs = env.reset([torch.Generator().manual_seed(0)])
    state, obs, reward, terminated, truncated, info = env.step(state, action)

Only the physics differ: Bullet moves the drones, in a world per environment, where they touch the ground and each
other. Tasks, observations, rewards, controllers, changed dynamics and pictures are the code of envs/drones.py, applied
to the poses and velocities that Bullet reports. Links, masses and calls are those of the package (cf2x.urdf and
BaseAviary._physics of v1.0.0 and main); recordings of its flights repeat to 1e-12. Axes and units as in envs/drones.py.
"""

import dataclasses
import importlib.util
import os
import pathlib
import tempfile
import weakref

import numpy as np
import torch
from torch import Tensor

from envs.drones import ARM, DAMPING, MASS, URDF_INERTIA, Drones, State

MOST_WORLDS = 1024  # pybullet's MAX_PHYSICS_CLIENTS
BODY = 4  # the link at the centre of mass, after those of the four rotors


def require_pybullet(num_envs: int):
    if importlib.util.find_spec("pybullet") is None:
        raise ImportError("envs.bullet needs Bullet: pip install -r requirements-pybullet.txt")
    if num_envs > MOST_WORLDS:
        raise ValueError(f"num_envs must be at most {MOST_WORLDS}, Bullet's number of worlds, got {num_envs}")


def urdf(main: bool) -> str:
    """The Crazyflie: a cylinder, and massless links at its rotors, which are numbered in another way before `main`, and
    at its centre. That forces act on links matters: Bullet turns these by the attitude of one substep ago."""
    inertial = '<inertial><origin xyz="{} {} 0"/><mass value="{}"/><inertia ixx="{}" iyy="{}" izz="{}"'
    inertial += ' ixy="0" ixz="0" iyz="0"/></inertial>'
    shape = '<collision><geometry><cylinder radius="0.06" length="0.025"/></geometry></collision>'
    links = [f'<link name="base">{inertial.format(0, 0, MASS, *URDF_INERTIA)}{shape}</link>']
    signs = ((1, -1), (-1, -1), (-1, 1), (1, 1)) if main else ((1, 1), (-1, 1), (-1, -1), (1, -1))
    for k, (x, y) in enumerate([*signs, (0, 0)]):
        place = inertial.format(ARM["pyb"] * x, ARM["pyb"] * y, 0, 0, 0, 0)
        links.append(f'<link name="link_{k}">{place}</link>')
        links.append(f'<joint name="joint_{k}" type="fixed"><parent link="base"/><child link="link_{k}"/></joint>')
    return f'<?xml version="1.0"?><robot name="cf2x">{"".join(links)}</robot>'


def shut_down(owner: int, bullet, worlds: list[int], path: pathlib.Path):
    if os.getpid() == owner:  # and not a copy in a forked process
        for world in worlds:
            bullet.disconnect(world)
        path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True, eq=False)
class BulletDrones(Drones):
    """`Drones` that Bullet moves. Unlike that, it has a memory: `step` takes the newest state only, and cannot be
    compiled."""

    def __post_init__(self):
        require_pybullet(self.num_envs)
        if self.physics != "pyb":
            raise ValueError(f"physics must be pyb in Bullet, got {self.physics!r}")
        self._set(worlds=[], newest=None)
        super().__post_init__()

    def _start(self):
        import pybullet

        with tempfile.NamedTemporaryFile("w", suffix=".urdf", delete=False) as file:
            file.write(urdf(self.version == "main"))
        worlds: list[int] = []
        # before there are any, so that none is left when the rest fails
        shut = weakref.finalize(self, shut_down, os.getpid(), pybullet, worlds, pathlib.Path(file.name))
        self._set(bullet=pybullet, worlds=worlds, model=file.name, shut=shut)
        for _ in range(self.num_envs):
            worlds.append(pybullet.connect(pybullet.DIRECT))

    def close(self):
        """Leave Bullet; the next reset starts it again."""
        if self.worlds:
            self.shut()
        self._set(worlds=[], newest=None)

    def _each(self, value: float | Tensor) -> np.ndarray:
        """A value per environment [..., B] of a number or a tensor."""
        value = torch.as_tensor(value, dtype=torch.float64).cpu()
        return value.expand(*value.shape[:-1], self.num_envs).numpy()

    def reset(self, generators: list[torch.Generator]) -> tuple[State, Tensor]:
        """As `Drones.reset`."""
        state, obs = super().reset(generators)
        self.place(state)
        return state, obs

    def place(self, state: State):
        """Start all worlds again from `state`, as the package does: with newly loaded drones."""
        if not self.worlds:
            self._start()
        p = self.bullet
        flags = 0 if self.version == "v1.0.0" else p.URDF_USE_INERTIA_FROM_FILE
        names = ("position", "quaternion", "velocity", "rates")
        poses = [getattr(state, name).double().permute(2, 1, 0).cpu().numpy() for name in names]  # [B, N, 3 or 4]
        mass, scale, damping, gravity = map(self._each, (self.mass, self.inertia_scale, self.damping, self.gravity))
        bodies = []
        for b, world in enumerate(self.worlds):
            p.resetSimulation(physicsClientId=world)
            p.setGravity(0, 0, -gravity[b], world)
            p.setTimeStep(1 / self.physics_hz, world)
            box = p.createCollisionShape(p.GEOM_BOX, halfExtents=(100, 100, 5), physicsClientId=world)
            ground = p.createMultiBody(0, box, basePosition=(0, 0, -5), physicsClientId=world)  # Bullet's plane.urdf
            p.changeDynamics(ground, -1, lateralFriction=1, physicsClientId=world)
            bodies.append([])
            for position, quaternion, velocity, turning in zip(*(part[b] for part in poses)):
                body = p.loadURDF(self.model, position, quaternion, flags=flags, physicsClientId=world)
                p.resetBaseVelocity(body, velocity, turning, world)
                if mass[b] != MASS or scale[b] != 1:  # a new mass alone would bring a new inertia
                    inertia = [scale[b] * j for j in self.inertia]
                    p.changeDynamics(body, -1, mass[b], localInertiaDiagonal=inertia, physicsClientId=world)
                if damping[b] != DAMPING:
                    both = {"linearDamping": damping[b], "angularDamping": damping[b]}
                    p.changeDynamics(body, -1, **both, physicsClientId=world)
                bodies[-1].append(body)
        self._set(bodies=bodies, newest=state.position)

    def advance(self, state: State, rpm: list[Tensor]) -> State:
        """One step of Bullet at four constant rotor speeds rpm [4, N, B]."""
        if not self.worlds:
            raise ValueError("Bullet is not running: call reset()")
        if state.position is not self.newest:
            raise ValueError("Bullet steps only from its newest state")
        p, square = self.bullet, np.square(torch.stack(list(rpm)).double().cpu().numpy())
        lift, torque = self._each(self.kf) * square, self._each(self.km) * square
        yaw = torque[1] + torque[3] - torque[0] - torque[2]
        forces = [self.breeze] * (self.breeze is not None) + [state.gust] * self.gusty
        push = self._each(sum(forces, torch.zeros(3, 1, 1)))  # [3, 1, B]
        seen = np.empty((13, self.num_agents, self.num_envs))
        for b, (world, bodies) in enumerate(zip(self.worlds, self.bodies)):
            for _ in range(self.substeps):
                for n, body in enumerate(bodies):
                    for k in range(4):
                        p.applyExternalForce(body, k, (0, 0, lift[k, n, b]), (0, 0, 0), p.LINK_FRAME, world)
                    p.applyExternalTorque(body, BODY, (0, 0, yaw[n, b]), p.LINK_FRAME, world)
                    if push.any():
                        place, _ = p.getBasePositionAndOrientation(body, world)
                        p.applyExternalForce(body, -1, push[:, 0, b], place, p.WORLD_FRAME, world)
                p.stepSimulation(world)
            for n, body in enumerate(bodies):
                pose, motion = p.getBasePositionAndOrientation(body, world), p.getBaseVelocity(body, world)
                seen[:, n, b] = np.concatenate((*pose, *motion))
        parts = torch.from_numpy(seen).to(self.device, self.dtype).split((3, 4, 3, 3))
        new = dict(zip(("position", "quaternion", "velocity", "rates"), parts))
        self._set(newest=new["position"])
        return dataclasses.replace(state, **new)


def from_drones(env: Drones) -> BulletDrones:
    """The task of `env` in Bullet. Its worlds start at the first reset and end with `close()`, at exit, or when the
    environment is collected."""
    return BulletDrones(**{field.name: getattr(env, field.name) for field in dataclasses.fields(Drones)})
