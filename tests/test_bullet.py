"""envs/bullet.py: the real Bullet moves drones as envs/drones.py does, and as the package's recordings say. Needs
requirements-pybullet.txt, but for the last test."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch
from commands import ROOT
from replay import recorded_state, recording

from envs import bullet, drones

FOLDER = ROOT / "tests" / "data" / "drones"
INDEX = json.loads((FOLDER / "index.json").read_text())
FLIGHTS = sorted(path.name for path in FOLDER.glob("*_pyb_*.npz"))
installed = importlib.util.find_spec("pybullet") is not None
needs_bullet = pytest.mark.skipif(not installed, reason="needs requirements-pybullet.txt")


def start(**fields):
    """The same task in torch and in Bullet, both reset, with random actions and gusts of some steps."""
    env = drones.make("leader_follower_v1", 3, dtype=torch.float64, num_agents=2, **fields)
    real = bullet.from_drones(env)
    states = [e.reset([torch.Generator().manual_seed(3)])[0] for e in (env, real)]
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, env.action_sizes[0])
    actions = 2 * torch.rand(24, *shape, generator=generator, dtype=torch.float64) - 1
    return env, real, states, actions, [env.draw([generator]) for _ in actions]


@needs_bullet
@pytest.mark.parametrize("name", FLIGHTS)
def test_a_recorded_flight_repeats(name):
    data, env, steps = recording(FOLDER / name, INDEX)
    env = bullet.from_drones(env)
    state = recorded_state(env, data, 0)
    env.place(state)
    for t, rpm in enumerate(data["rpm"][:steps]):
        state = env.advance(state, list(torch.as_tensor(rpm).T[:, :, None]))
        for ours, recorded in (("position", "pos"), ("velocity", "vel"), ("rates", "ang_vel")):
            assert np.abs(getattr(state, ours)[..., 0].T.numpy() - data[recorded][t + 1]).max() < 1e-11
    env.close()


@needs_bullet
@pytest.mark.parametrize("version", ["v1.0.0", "main"])
@pytest.mark.parametrize(
    "changed",
    [
        *({}, {"mass": 0.03}, {"inertia_scale": 2.0}, {"kf": 3.3e-10}, {"km": 1e-11}, {"gravity": 9.0}),
        *({"damping": 0.2}, {"wind": (0.01, 0.005, 0.02)}, {"gust": 0.02}, {"delay": 1}),
        {"mass": torch.tensor([0.02, 0.027, 0.03]), "action_type": "velocity"},
    ],
)
def test_free_flight_is_that_of_torch(changed, version):
    env, real, (ours, theirs), actions, gusts = start(**{"version": version, "action_type": "rpm"} | changed)
    plain = dataclasses.replace(env, **{name: drones.Drones.__dataclass_fields__[name].default for name in changed})
    moved = 0.0
    for action, gust in zip(actions, gusts):
        before = ours
        ours, obs, reward, *_ = env.step(before, action, gust)
        theirs, obs_there, reward_there, *_ = real.step(theirs, action, gust)
        assert (obs - obs_there).abs().max() < 1e-11 and (reward - reward_there).abs().max() < 1e-11
        moved = max(
            moved,
            (plain.advance(before, env.command(before, action.permute(2, 1, 0))[0]).velocity - ours.velocity)
            .abs()
            .max()
            .item(),
        )
    if changed and "action_type" not in changed:
        assert moved > 1e-9, "the change had no effect, so nothing was tested"
    real.close()


@needs_bullet
def test_drones_touch_the_ground_and_each_other():
    env = bullet.from_drones(drones.make("leader_follower_v0", 1, dtype=torch.float64))
    state = env.make_state(np.array([[[0, 0, 0.1], [0, 0, 0.3]]]))
    env.place(state)
    for _ in range(env.horizon):
        state = env.advance(state, [torch.zeros(2, 1, dtype=torch.float64)] * 4)
    low, high = sorted(state.position[2, :, 0].tolist())
    assert 0.01 < low < 0.02, "one lies on the ground"
    apart = (state.position[:, 0, 0] - state.position[:, 1, 0]).norm()
    assert high > 0.03 or apart > 0.1, "and the other one on it, or beside it"
    env.close()


@needs_bullet
def test_only_the_newest_state_steps_and_closing_ends_it():
    env, real, (_, state), actions, _ = start()
    real.step(state, actions[0])
    with pytest.raises(ValueError, match="^Bullet steps only from its newest state$"):
        real.step(state, actions[0])
    again, obs = real.reset([torch.Generator().manual_seed(3)])
    assert torch.equal(again.position, state.position)
    real.close()
    with pytest.raises(ValueError, match="^Bullet is not running: call reset()"):
        real.step(again, actions[0])
    assert torch.equal(real.reset([torch.Generator().manual_seed(3)])[1], obs)
    real.close()


@needs_bullet
def test_what_bullet_cannot_do():
    with pytest.raises(ValueError, match="^physics must be pyb in Bullet, got 'dyn'$"):
        bullet.from_drones(drones.make("leader_follower_v0", 1, physics="dyn"))
    with pytest.raises(ValueError, match="^num_envs must be at most 1024, Bullet's number of worlds, got 1025$"):
        bullet.from_drones(drones.make("leader_follower_v0", 1025))


def test_without_bullet(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="^envs.bullet needs Bullet: pip install -r requirements-pybullet.txt$"):
        bullet.from_drones(drones.make("leader_follower_v0", 1))
