"""envs/drones.py against recordings of gym-pybullet-drones, and against what physics and the tasks' rules demand."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
import replay
import torch
from commands import BACKEND, alike
from pettingzoo.test import parallel_api_test

import envs
from envs import drones, perturb, zoo

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DATA = pathlib.Path(__file__).parent / "data" / "drones"
INDEX = json.loads((DATA / "index.json").read_text())


# ------------------------------------------------------------------------------------------------------ recordings


@pytest.mark.parametrize("name", [entry["file"] for entry in INDEX])
def test_recordings(name):
    for quantity, (error, tolerance) in replay.replay_drones(DATA / name, INDEX).items():
        assert error <= tolerance, (quantity, error)


@pytest.mark.slow
def test_replay_tells_good_from_bad(tmp_path):
    source = "v1_pyb_task_rpm_small_s0.npz"
    changes = {"pos": "position", "vel": "velocity", "quat": "quaternion", "ang_vel": "rates", "rpm": "rpm"}
    for name, quantity in (changes | {"reward": "reward", "obs": "obs", "done": "truncated"}).items():
        arrays = dict(np.load(DATA / source))
        value = arrays[name][20]  # early enough for the physics, too
        arrays[name][20] = ~value if name == "done" else value + 1e-7
        np.savez(tmp_path / source, **arrays)
        error, tolerance = replay.replay_drones(tmp_path / source, INDEX)[quantity]
        assert error > tolerance
    arrays["pos"][7] = np.nan
    np.savez(tmp_path / source, **arrays)
    with pytest.raises(ValueError, match="pos has entries that are not finite"):
        replay.replay_drones(tmp_path / source, INDEX)


@pytest.mark.parametrize("name", ["v1_pyb_task_one_d_rpm_uniform_s0.npz", "main_pyb_task_one_d_rpm_up.npz"])
def test_steps_play_recorded_tasks(name):
    """The whole step, with actions in, observation, reward and end out, up to the first end or contact."""
    data, env, steps = replay.recording(DATA / name, INDEX)
    ends = data["done"] if "done" in data else data["truncated"] | data["terminated"]
    steps = min(steps, ends.argmax() + 1 if ends.any() else steps)
    state, obs = env.reset(generators(0))
    for t in range(steps):
        np.testing.assert_allclose(obs[0, :, :12], data["obs"][t], rtol=0, atol=1e-6)
        action = torch.as_tensor(data["action"][t])[None]
        state, obs, reward, terminated, truncated, _ = env.step(state, action)
        np.testing.assert_allclose(reward[0], np.broadcast_to(data["reward"][t], 2), rtol=0, atol=1e-9)
        assert bool(terminated | truncated) == ends[t]
    np.testing.assert_allclose(state.position[..., 0].T, data["pos"][steps], rtol=0, atol=1e-9)


def test_ground_is_near_bullet():
    data, env, free = replay.recording(DATA / "v1_pyb_task_one_d_rpm_uniform_s0.npz", INDEX)
    state, _ = env.reset(generators(0))
    worst = 0.0
    for t, action in enumerate(data["action"]):
        state, *_ = env.step(state, torch.as_tensor(action)[None])
        worst = max(worst, np.abs(state.position[2, :, 0].numpy() - data["pos"][t + 1, :, 2]).max())
    assert free < 200 and data["pos"][..., 2].min() < 0.014  # it touches
    assert worst < 3e-3


# --------------------------------------------------------------------------------------------------------- physics


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make(env_id: str = "leader_follower_v0", num_envs: int = 1, dtype=torch.float64, **fields) -> drones.Drones:
    return envs.make(env_id, num_envs, DEVICE, dtype, **fields)


def random_actions(env: drones.Drones, seed: int = 0) -> torch.Tensor:
    return perturb.random_actions(env, generators(seed))


def everything(result) -> list[torch.Tensor]:
    """The tensors of a step's result."""
    state, obs, reward, terminated, truncated, info = result
    return [*vars(state).values(), obs, reward, terminated, truncated, *info.values()]


def at(env: drones.Drones, height: float = 100.0, **arrays) -> drones.State:
    """All drones at one height, so high that nobody meets the ground."""
    return env.make_state(torch.tensor([0.0, 0.0, height]).expand(env.num_envs, env.num_agents, 3), **arrays)


def unit(*axis: float, angle: float) -> torch.Tensor:
    """The turn about an axis as a quaternion."""
    axis = torch.tensor(axis, dtype=torch.float64)
    return torch.cat((math.sin(angle / 2) * axis / axis.norm(), torch.tensor([math.cos(angle / 2)], dtype=axis.dtype)))


def still(env: drones.Drones, rpm: float) -> torch.Tensor:
    """The same speed for all rotors."""
    return torch.full((4, env.num_agents, env.num_envs), rpm, dtype=env.dtype, device=DEVICE)


@pytest.mark.parametrize("physics, damping", [("dyn", 0.04), ("pyb", 0.0), ("pyb", 0.04)])
def test_free_fall_and_hover(physics, damping):
    env = make(physics=physics, damping=damping)
    state = at(env)
    for _ in range(48):
        state = env.advance(state, still(env, 0.0))
    drag = damping if physics == "pyb" else 0.0
    speed = drop = 0.0
    for _ in range(240):
        speed += (9.8 - drag * speed * (1 + speed)) / 240
        drop += speed / 240
    assert (speed == pytest.approx(9.8)) == (drag == 0)
    assert state.velocity[2].flatten().tolist() == pytest.approx([-speed] * 2)
    assert (100 - state.position[2]).flatten().tolist() == pytest.approx([drop] * 2)
    held = state = at(env)
    for _ in range(48):
        held = env.advance(held, still(env, drones.HOVER_RPM))
    assert (held.position - state.position).abs().max() < 1e-12


@pytest.mark.parametrize("physics", ["dyn", "pyb"])
@pytest.mark.parametrize("version", drones.VERSIONS)
def test_a_free_spin_keeps_angular_momentum(physics, version):
    """No torque: L = R J w stays, however the body tumbles; not in the old `dyn`, which takes body for Euler rates."""
    env = make(num_agents=1, physics=physics, version=version, damping=0.0, physics_hz=4800)
    rates = torch.tensor([[[3.0, -2.0, 5.0]]])
    state = at(env, quaternion=unit(1, 2, 3, angle=1.0).expand(1, 1, 4), rates=rates)

    def momentum(state):
        axes = drones.axes_of(state.quaternion)
        w = drones.to_body(axes, state.rates) if physics == "pyb" else state.memory
        return torch.stack(drones.to_world(axes, [j * x for j, x in zip(env.inertia, w)])).flatten()

    before = momentum(state)
    for _ in range(12):
        state = env.advance(state, still(env, 0.0))
    turned = (state.quaternion.flatten() - unit(1, 2, 3, angle=1.0).to(DEVICE)).abs().max()
    assert turned > 0.1
    error = ((momentum(state) - before).norm() / before.norm()).item()
    assert error > 1e-2 if physics == "dyn" and version != "main" else error < 3e-3


def test_torques_turn_the_body_the_right_way():
    """Faster rotors on one side lift it: for v1.0.0 rotors 0 and 1 are on the left, for main on the right; nose up is
    a negative pitch; yaw follows the torque of rotors 1 and 3."""
    for physics in ("pyb", "dyn"):
        for version, roll in (("v1.0.0", 1), ("main", -1)):
            env = make(num_agents=1, physics=physics, version=version)
            for fast, axis, sign in (((0, 1), 0, roll), ((1, 2), 1, 1), ((1, 3), 2, 1)):
                rpm = still(env, drones.HOVER_RPM)
                rpm[list(fast)] *= 1.001
                angles = torch.stack(drones.euler(env.advance(at(env), rpm).quaternion)).flatten()
                assert angles[axis] * sign > 1e-6 and angles.abs().argmax() == axis


def test_rotor_forces_lag_one_substep():
    env = make(num_agents=1, physics_hz=240, control_hz=240, damping=0.0, gravity=0.0)
    tilted = at(env, quaternion=unit(0, 1, 0, angle=0.3).expand(1, 1, 4))
    tilted.memory = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=DEVICE).view(3, 1, 1)
    first = env.advance(tilted, still(env, drones.HOVER_RPM))
    second = env.advance(first, still(env, drones.HOVER_RPM))
    kick = 9.8 / 240
    assert first.velocity.flatten().tolist() == pytest.approx([0, 0, kick], abs=1e-12)
    gain = (second.velocity - first.velocity).flatten().tolist()
    assert gain == pytest.approx([kick * math.sin(0.3), 0, kick * math.cos(0.3)], abs=1e-12)
    now = make(num_agents=1, physics="dyn", control_hz=240, gravity=0.0)
    state = now.advance(at(now, quaternion=unit(0, 1, 0, angle=0.3).expand(1, 1, 4)), still(now, drones.HOVER_RPM))
    assert state.velocity.flatten().tolist() == pytest.approx(gain, abs=1e-12)


@pytest.mark.parametrize("physics", ["dyn", "pyb"])
@pytest.mark.parametrize("version", drones.VERSIONS)
def test_a_wild_flight_stays_sound(physics, version):
    """Rotors between 0 and full speed for 10 s in float32: finite, unit quaternions, and a ground in Bullet."""
    env = make(num_envs=16, dtype=torch.float32, physics=physics, version=version)
    state, generator = at(env, 3.0), torch.Generator().manual_seed(0)
    for t in range(480):
        if t % 4 == 0:
            rpm = (21_000 * torch.rand(4, 2, 16, generator=generator)).to(DEVICE)
        state = env.advance(state, rpm)
    assert all(value.isfinite().all() for value in vars(state).values())
    assert (state.quaternion.square().sum(0) - 1).abs().max() < 1e-6
    if physics == "pyb":
        assert (state.position[2] >= drones.REST_HEIGHT - 1e-6).all() and (state.position[2] < 0.1).any()
        assert state.rates.abs().max() <= 100
    else:
        assert (state.position[2] < 0).any()  # as in the package


def test_bullet_limits_every_component_to_100():
    for physics in ("pyb", "dyn"):
        env = make(num_agents=1, physics=physics, gravity=98.0, damping=0.0)
        rpm = still(env, 0.0)
        rpm[:2] = 20_000.0
        state = at(env, 1000.0)
        for _ in range(60):
            state = env.advance(state, rpm)
        fastest = [state.rates[0].abs().item(), state.velocity[2].abs().item()]
        assert fastest == [100, 100] if physics == "pyb" else min(fastest) > 105


@pytest.mark.parametrize(
    "angles", [(0.3, -0.2, 2.9), (-3.0, 1.5, -0.1), (0.0, math.pi / 2, 0.7), (0.0, -math.pi / 2, -0.4)]
)
def test_euler_angles_there_and_back(angles):
    rpy = [torch.tensor(angle, dtype=torch.float64) for angle in angles]
    q = drones.from_euler(rpy)
    assert [a.item() for a in drones.euler(q)] == pytest.approx(angles, abs=1e-7)
    (cr, cp, cy), (sr, sp, sy) = ([f(angle) for angle in angles] for f in (math.cos, math.sin))
    matrix = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]]) @ np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    matrix = matrix @ np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    np.testing.assert_allclose(np.array(drones.axes_of(q)).T, matrix, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- actions


def test_rpm_actions_set_the_lift():
    """hover (1 + 0.05 a) on every rotor, a within [-1, 1]: vertical acceleration (1 + 0.05 a)^2 g - g."""
    values = torch.tensor([-1.0, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64, device=DEVICE)
    for action_type, size in (("one_d_rpm", 1), ("rpm", 4)):
        env = make(num_envs=5, num_agents=1, action_type=action_type, damping=0.0)
        assert env.action_sizes == (size,)
        state, *_ = env.step(at(env), values.view(5, 1, 1).expand(5, 1, size))
        expected = ((1 + 0.05 * values.clamp(-1, 1)) ** 2 - 1) * 9.8 / 48
        torch.testing.assert_close(state.velocity[2, 0], expected)
    env = make(num_agents=1, action_type="rpm")
    command, _ = env.command(at(env), torch.tensor([0.1, -0.2, 0.3, 1.0], device=DEVICE).view(4, 1, 1))
    expected = [drones.HOVER_RPM * (1 + 0.05 * a) for a in (0.1, -0.2, 0.3, 1.0)]
    assert torch.stack(command).flatten().tolist() == pytest.approx(expected)


def test_velocity_actions_are_followed():
    """Direction and share of the speed limit; the last entry counts without its sign."""
    env = make("leader_follower_v1", num_envs=3, num_agents=1)
    rows = [[3.0, 0.0, 4.0, 1.0], [0.0, -0.5, 0.0, -0.5], [0.0, 0.0, 0.0, 1.0]]
    action = torch.tensor(rows, dtype=torch.float64, device=DEVICE)[:, None]
    state, _ = env.reset(generators(0))
    for _ in range(72):
        state, *_ = env.step(state, action)
    # clipped to (1, 0, 1) before the direction is taken
    expected = [[0.5 / 2**0.5, 0.0, 0.5 / 2**0.5], [0.0, -0.25, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(state.velocity[:, 0].T.cpu(), expected, atol=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("version, control_hz", [("v1.0.0", 48), ("master", 240)])
def test_position_actions_reach_their_point(version, control_hz):
    """v1.0.0: 0.1 a from where the drone is, so a constant action moves it on and a zero one holds it; later: the
    point a itself, which may lie outside [-1, 1]."""
    env = make(num_agents=1, version=version, action_type="pid", control_hz=control_hz)
    state = at(env, 2.0)
    point = torch.tensor([0.3, -0.4, 1.5], dtype=torch.float64, device=DEVICE).view(1, 1, 3)
    for _ in range(8 * control_hz):
        action = point if version == "master" else (point - state.position.permute(2, 1, 0)) / 0.1
        state, *_ = env.step(state, action)
    torch.testing.assert_close(state.position.flatten(), point.flatten(), rtol=0, atol=0.02)


def test_position_actions_lead_at_most_one_metre():
    env = make(num_envs=2, num_agents=1, version="main", action_type="pid")
    action = torch.tensor([[3.0, 0.0, 100.0], [1.0, 0.0, 100.0]], dtype=torch.float64, device=DEVICE).T.unsqueeze(1)
    command, memory = env.command(at(env), action)
    assert torch.equal(command[0][0, 0], command[0][0, 1]) and memory[0, 0].tolist() == pytest.approx([1 / 48] * 2)


# --------------------------------------------------------------------------------------------------- perturbations

CHANGES = {
    "mass": 0.03,
    "inertia_scale": 2.0,
    "kf": 3e-10,
    "km": 2e-11,
    "gravity": 9.0,
    "damping": 0.5,
    "wind": [0.02, -0.01, 0.005],
    "gust": 0.02,
    "delay": 1,
    "path_speed": 0.1,
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_value_per_environment_equals_numbers(field):
    """Half of a batch with the usual value, half with another one; each half is what it would be alone."""
    usual = [0.0] * 3 if field == "wind" else float(getattr(make(), field))
    results = []
    for value in (torch.tensor([usual] * 4 + [CHANGES[field]] * 4, dtype=torch.float64), usual, CHANGES[field]):
        env = make("leader_follower_v1", 8, **{field: value})
        streams = generators(3)
        state, _ = env.reset(streams)
        for t in range(12):
            result = env.step(state, random_actions(env, seed=t), env.draw(generators(t)))
            state = result[0]
        results.append(result)
    both, first, second = results
    assert (second[1] - first[1]).abs().amax((1, 2)).min() > 1e-5  # the field matters in every environment
    for index, alone in ((slice(0, 4), first), (slice(4, 8), second)):
        torch.testing.assert_close(both[1][index], alone[1][index], rtol=0, atol=1e-12)
        torch.testing.assert_close(both[2][index], alone[2][index], rtol=0, atol=1e-12)


def test_mass_thrust_and_wind_by_hand():
    """F = m a, with a controller that knows the nominal drone only."""
    hover = torch.zeros(1, 1, 1, dtype=torch.float64, device=DEVICE)
    for fields, expected in (
        ({"mass": 0.03}, (0, 0, (0.027 / 0.03 - 1) * 9.8)),
        ({"kf": 2 * drones.KF}, (0, 0, 9.8)),
        ({"gravity": 4.9}, (0, 0, 4.9)),
        ({"wind": (0.027, -0.054, 0.0)}, (1, -2, 0)),
        ({"wind": (0.0, 0.0, 0.03), "mass": 0.06}, (0, 0, 0.5 + (0.45 - 1) * 9.8)),
    ):
        for physics in ("pyb", "dyn"):
            env = make(num_agents=1, damping=0.0, physics=physics, **fields)
            state, *_ = env.step(at(env), hover)
            assert (48 * state.velocity.flatten()).tolist() == pytest.approx(expected, abs=1e-9)
    # torques: J dw = tau dt
    yaw = 4 * 2e-11 * drones.HOVER_RPM**2 * 0.1
    env = make(num_agents=1, action_type="rpm", damping=0.0, km=2e-11, inertia_scale=3.0)
    action = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64, device=DEVICE).view(1, 1, 4)
    state, *_ = env.step(at(env), action)
    assert state.rates[2].item() == pytest.approx(yaw / (3 * env.inertia[2]) / 48)


def test_gusts_have_their_strength_and_memory():
    env = make(num_envs=4000, gust=torch.linspace(0.01, 0.04, 4000), gust_time=0.25, damping=0.0)
    streams = generators(0)
    state, _ = env.reset(streams)
    action, seen = torch.zeros(4000, 2, 1, dtype=env.dtype, device=DEVICE), [state.gust / env.gust]
    for _ in range(12):
        before = state
        state, *_ = env.step(state, action, env.draw(streams))
        seen.append(state.gust / env.gust)
        moved = (state.velocity - before.velocity).mean(1) * 48
        torch.testing.assert_close(moved[:2], state.gust[:2, 0] / 0.027)
    first, last = seen[0].flatten(), seen[-1].flatten()
    assert [x.std().item() for x in (first, last)] == pytest.approx([1, 1], abs=0.03)
    correlation = torch.corrcoef(torch.stack((first, last)))[0, 1].item()
    assert correlation == pytest.approx(math.exp(-1), abs=0.04)  # 12 steps of 1 / 48 s are gust_time
    assert make().draw(generators(0)) is None


def test_delayed_actions_come_one_step_later():
    late, prompt = make(num_envs=2, delay=torch.tensor([0, 1]), history=2), make(num_envs=1)
    actions = torch.rand(6, 1, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    state, _ = late.reset(generators(0))
    for action in actions:
        state, obs, *_ = late.step(state, action.expand(2, -1, -1))
    assert torch.equal(obs[..., 12:], torch.cat((actions[-2], actions[-1]), -1).expand(2, -1, -1))
    for row, sequence in enumerate((actions, [torch.zeros_like(actions[0]), *actions[:-1]])):
        alone, _ = prompt.reset(generators(0))
        for action in sequence:
            alone, *_ = prompt.step(alone, action)
        torch.testing.assert_close(state.position[..., row], alone.position[..., 0])
    assert not torch.equal(state.position[..., 0], state.position[..., 1])


@pytest.mark.parametrize("env_id", drones.TASKS)
def test_results_do_not_depend_on_the_size_of_the_batch(env_id):
    """Bit by bit on a CPU, in float32."""
    n = 37
    big = make(env_id, n, torch.float32, num_agents=3, gust=0.01, wind=(0.01, 0.0, 0.0))
    state, _ = big.reset(generators(0))
    for t in range(3):
        action, noise = random_actions(big, t), big.draw(generators(t))
        result = big.step(state, action, noise)
        for index in (slice(0, 1), slice(5, 21), slice(36, 37)):
            small = dataclasses.replace(big, num_envs=index.stop - index.start)
            part = drones.State(**{name: value[..., index] for name, value in vars(state).items()})
            alone = small.step(part, action[index], noise[..., index])
            for name, value in vars(alone[0]).items():
                assert alike(value, getattr(result[0], name)[..., index]), name
            assert alike(alone[1], result[1][index]) and alike(alone[2], result[2][index])
        state = result[0]


def test_observation_noise_reaches_all_entries():
    env = make("leader_follower_v1", 500, torch.float32, num_agents=3)
    _, obs = env.reset(generators(0))
    noise = perturb.observation_noise(env, obs, "gaussian", 0.1, generators(1)) - obs
    assert (noise.std(0) - 0.1).abs().max() < 0.02


# ----------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("num_agents", [2, 3, 12])
def test_starts_of_v1(num_agents):
    """Around the waypoint, apart from each other, above the ground, and different in every environment."""
    env = make("leader_follower_v1", 3000, torch.float32, num_agents=num_agents)
    state, _ = env.reset(generators(0))
    point, speed = env.waypoint(state)
    p = state.position
    assert (p[:, 0] - point[:, 0]).abs().max() <= 0.2 + 1e-6 and 0.3 < p[2].min() and p[2].max() < 1.7
    distance = (p[:2, 1:] - p[:2, :1]).norm(dim=0)
    around = max(0.5, (num_agents - 1) / (4 * math.pi))
    assert around - 1e-5 <= distance.min() and around * 1.98 < distance.max() <= 2 * around + 1e-5
    pairs = torch.triu_indices(num_agents, num_agents, 1, device=DEVICE)
    assert (p[:, pairs[0]] - p[:, pairs[1]]).norm(dim=0).min() > 0.2
    angle = torch.atan2(*(p[:2, 1:] - p[:2, :1]).flip(0))
    assert angle.cos().mean().abs() < 0.05 and angle.sin().mean().abs() < 0.05
    assert not state.velocity.any() and not state.rates.any() and not state.t.any()
    assert 0.25 < speed[:2].abs().max() <= 0.3 and 0.05 < speed[2].abs().max() <= 0.09


def test_waypoint_moves_at_its_velocity():
    env = make("leader_follower_v1", 50, path_speed=torch.linspace(0, 1, 50, dtype=torch.float64))
    state, _ = env.reset(generators(0))
    later = dataclasses.replace(state, t=state.t + 1)
    (p, v), (q, w) = env.waypoint(state), env.waypoint(later)
    torch.testing.assert_close((q - p) * 48, (v + w) / 2, rtol=0, atol=1e-3)
    assert not v[..., 0].any() and v.abs().amax() > 0.7


def test_observation_and_reward_of_v1_by_hand():
    """A leader 0.3 m below its waypoint, a follower 0.4 m from it and one 0.15 m from that follower."""
    env = make("leader_follower_v1", 1, num_agents=3)
    goal = torch.tensor([0.5, 0.5, 0.2, 1.0, 0.0, 0.0, math.pi / 2, 0.0, 0.0], dtype=torch.float64).view(9, 1, 1)
    position = torch.tensor([[[0.5, 0.0, 0.7], [0.5, 0.4, 0.7], [0.5, 0.4, 0.85]]], dtype=torch.float64)
    velocity = torch.tensor([[[0.3, 0.0, 0.0], [0.0, 0.6, 0.0], [0.0, 0.0, -9.0]]], dtype=torch.float64)
    quaternion = torch.stack([unit(0, 0, 1, angle=0.5), unit(1, 0, 0, angle=0.2), unit(0, 1, 0, angle=-0.1)])[None]
    rates = torch.tensor([[[0.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, -20.0, 0.0]]], dtype=torch.float64)
    state = env.make_state(position, quaternion, velocity, rates, goal.to(DEVICE))
    point, speed = env.waypoint(state)
    assert point.flatten().tolist() == pytest.approx([0.5, 0, 1]) and speed.flatten().tolist() == pytest.approx([0] * 3)
    pi = math.pi
    expected = [
        # position / (15, 15, 5), roll, pitch, yaw / pi, velocity / 3, rates / 10, target / 2 and / 3, others / 2
        [1 / 30, 0, 0.14, 0, 0, 0.5 / pi, 0.1, 0, 0, 0, 0, 0.2, 0, 0, 0.15, -0.1, 0, 0] + [0, 0.2, 0, 0, 0.2, 0.075],
        [1 / 30, 0.4 / 15, 0.14, 0.2 / pi, 0, 0, 0, 0.2, 0, 0, 0, 0, 0, -0.2, 0, 0.1, -0.2, 0]
        + [0, 0, 0.075, 0, -0.2, 0],
        [1 / 30, 0.4 / 15, 0.17, 0, -0.1 / pi, 0, 0, 0, -1, 0, -1, 0, 0, -0.2, -0.075, 0.1, 0, 1]
        + [0, -0.2, -0.075, 0, 0, -0.075],
    ]
    np.testing.assert_allclose(env.observe(state)[0].cpu(), expected, rtol=0, atol=1e-12)
    far = (0.4**2 + 0.15**2) ** 0.5
    reward, info = env.task.reward(env, state)
    expected = [-(0.3**2), -((0.4 - 0.5) ** 2) - 1, -((far - 0.5) ** 2) - 1]
    assert reward.flatten().tolist() == pytest.approx(expected)
    assert info["distance"].flatten().tolist() == pytest.approx([0.3, 0.4, far])
    assert info["collisions"].tolist() == [[0, 1, 1]]
    other = dataclasses.replace(env, spacing=0.4, collision_distance=0.16, collision_cost=2.0)
    assert other.task.reward(other, state)[0].flatten().tolist() == pytest.approx([-0.09, -2, -((far - 0.4) ** 2) - 2])
    # the reward of a step is that of the state after it
    new, obs, reward, *_, info = env.step(state, torch.zeros(1, 3, 4, dtype=torch.float64, device=DEVICE))
    assert torch.equal(reward, env.task.reward(env, new)[0].T) and torch.equal(obs, env.observe(new))
    assert info["distance"].shape == info["collisions"].shape == (1, 3)


def test_reward_of_v0_with_three_drones():
    env = make(num_agents=3)
    state = env.make_state(torch.tensor([[[0.1, 0.2, 0.7], [5.0, 5.0, 0.4], [0.0, 0.0, 1.3]]]))
    reward = env.task.reward(env, state)[0].flatten().tolist()
    assert reward == pytest.approx([-(0.01 + 0.04 + 0.04), -0.09 / 3, -0.36 / 3])


def test_hover_ends_and_stands_still():
    """One that arrives, one that tilts, one that is too high and one that flies on."""
    env = make("hover_v0", 4, action_type="rpm")
    first, obs = env.reset(generators(0))
    assert obs.shape == (4, 2, 12 + 15 * 4)
    start = first.position.permute(2, 1, 0)
    assert start[0].tolist() == [[0.0, 0.0, pytest.approx(0.1125)], [pytest.approx(0.1588)] * 2 + [0.1125]]
    goals = first.goal.permute(2, 1, 0)
    torch.testing.assert_close(
        goals - start, torch.tensor([[0, 0, 1], [0, 0, 0.5]], device=DEVICE).expand_as(goals).to(goals)
    )
    place, q = start.clone(), torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(4, 2, 1).double()
    place[0], q[1, 1] = goals[0], unit(1, 0, 0, angle=0.41)
    place[2, 0, 2] = 2.01
    state = env.make_state(place, q, goal=first.goal)
    assert [flag.tolist() for flag in env.ends(state)] == [[True, False, False, False], [False, True, True, False]]
    action = random_actions(env)
    after, obs, reward, terminated, truncated, _ = env.step(state, action)
    for name in ("position", "quaternion", "velocity", "rates", "memory", "actions"):
        value, old = getattr(after, name), getattr(state, name)
        assert torch.equal(value[..., :3], old[..., :3]) and not torch.equal(value[..., 3], old[..., 3])
    assert after.t.tolist() == [1] * 4
    assert torch.equal(obs[3, :, -4:], action[3]) and not obs[:3, :, 12:].any()
    assert not reward[:3].any() and (reward[3] > 1).all() and reward[3, 0] == reward[3, 1]
    assert terminated.tolist() == [True, False, False, False] and truncated.tolist() == [False, True, True, False]
    # the step that ends an episode is rewarded
    fast = env.make_state(place[3:], velocity=torch.tensor([0.0, 0.0, 95.0]).expand(1, 2, 3), goal=first.goal[..., 3:])
    _, _, reward, _, truncated, _ = env.step(fast, action[3:])
    assert truncated.all()
    end = env.fly(fast, action[3:])
    torch.testing.assert_close(reward.T, env.task.reward(env, end)[0])
    gap = ((end.position - end.goal) ** 2).sum(0)
    assert env.task.reward(env, end)[0][0] == (2 - gap**2).relu().sum(0)


@pytest.mark.parametrize("env_id", drones.TASKS)
def test_horizon(env_id):
    assert make(env_id).horizon == (240 if env_id == "leader_follower_v1" else 242)
    env = make(env_id, 2, horizon=3)
    state, _ = env.reset(generators(0))
    action, ends = torch.zeros(2, 2, env.action_sizes[0], dtype=torch.float64, device=DEVICE), []
    for _ in range(3):
        state, _, _, terminated, truncated, _ = env.step(state, action)
        ends.append(truncated.tolist())
        assert not terminated.any()
    assert ends == [[False, False], [False, False], [True, True]] and state.t.tolist() == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("env_id", drones.TASKS)
def test_the_simple_controller_is_better_than_hovering(env_id):
    """Everywhere as the recipe of the task demands; 242 steps of v0 cannot go better than -3.3 for the leader."""
    returns = []
    for action_type in (None, "hover"):
        env = make(env_id, 8, torch.float32)
        state, _ = env.reset(generators(0))
        total = 0.0
        for _ in range(env.horizon):
            action = drones.simple_controller(env, state)
            state, _, reward, *_ = env.step(state, torch.zeros_like(action) if action_type else action)
            total = total + reward.mean(0)
        returns.append(total.cpu())
    (leader, follower), (idle, _) = returns[0].tolist(), returns[1].tolist()
    low = {"leader_follower_v0": -3.5, "leader_follower_v1": -2.0, "hover_v0": 850.0}[env_id]
    assert leader > low > idle + 30
    assert follower > {"leader_follower_v0": -0.5, "leader_follower_v1": -5.0, "hover_v0": 850.0}[env_id]


# ------------------------------------------------------------------------------------------------------- interface


def test_seeds_are_independent():
    env = make("leader_follower_v1", 12, torch.float32, gust=0.01)
    together = generators(5, 6, 7)
    state, obs = env.reset(together)
    noise = env.draw(together)
    for k, seed in enumerate((5, 6, 7)):
        block, alone = slice(4 * k, 4 * k + 4), generators(seed)
        part = dataclasses.replace(env, num_envs=4)
        one, one_obs = part.reset(alone)
        assert torch.equal(one_obs, obs[block]) and torch.equal(part.draw(alone), noise[..., block])
        for name, value in vars(one).items():
            assert torch.equal(value, getattr(state, name)[..., block])
    assert len(torch.unique(state.position[0, 0])) == 12
    with pytest.raises(ValueError, match="multiple of the 5 generators"):
        env.reset(generators(*range(5)))


KINDS = [("leader_follower_v0", {}), ("leader_follower_v0", {"physics": "dyn", "action_type": "rpm", "delay": 1})]
KINDS += [("leader_follower_v1", {"gust": 0.01}), ("hover_v0", {"physics": "dyn", "action_type": "pid"})]


@pytest.mark.slow
@pytest.mark.parametrize("env_id, fields", KINDS)
def test_step_is_pure_and_compiles(env_id, fields):
    env = make(env_id, 4, torch.float32, **fields)
    state, _ = env.reset(generators(0))
    action, noise = random_actions(env), env.draw(generators(1))
    before = [value.clone() for value in (*vars(state).values(), action)]
    torch.compiler.reset()
    graph = torch.compile(env.step, fullgraph=True, backend="eager")
    for ours, expected in zip(everything(graph(state, action, noise)), everything(env.step(state, action, noise))):
        assert torch.equal(ours, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, (*vars(state).values(), action)))


@pytest.mark.slow
@pytest.mark.parametrize("env_id, fields", [("leader_follower_v0", {}), ("leader_follower_v1", {"control_hz": 120})])
def test_compiled_code_agrees_and_is_compiled_once(env_id, fields):
    env = make(env_id, 16, **fields)
    torch.compiler.reset()
    compiled = torch.compile(
        env.step, fullgraph=True, backend="inductor" if env_id == "leader_follower_v0" else BACKEND
    )
    state, _ = env.reset(generators(0))
    for t in range(4):
        action = random_actions(env, t)
        with torch.compiler.set_stance("default" if t == 0 else "fail_on_recompile"):
            result = compiled(state, action, None)
        for ours, expected in zip(everything(result), everything(env.step(state, action, None))):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
        state = result[0]


@pytest.mark.parametrize("env_id", drones.TASKS)
def test_single_precision_is_near_double(env_id):
    """A second under the simple controller. The velocity controller is chaotic: there it is less."""
    ends = []
    for dtype in (torch.float64, torch.float32):
        env = make(env_id, 8, torch.float64)
        state, _ = env.reset(generators(0))
        env = dataclasses.replace(env, dtype=dtype)
        state = drones.State(**{k: v if k == "t" else v.to(dtype) for k, v in vars(state).items()})
        for _ in range(env.control_hz // (4 if env.controlled else 1)):
            state, obs, reward, *_ = env.step(state, drones.simple_controller(env, state))
        ends.append((state.position, obs, reward))
        assert obs.dtype == reward.dtype == dtype
    for single, double in zip(ends[1], ends[0]):
        assert 0 < (single - double).abs().max() < 2e-4


def test_global_state_and_names():
    for env_id, width in (("leader_follower_v0", 12), ("leader_follower_v1", 24), ("hover_v0", 27)):
        env = make(env_id, 5, num_agents=3)
        state, obs = env.reset(generators(0))
        assert env.obs_sizes == (width,) * 3 and obs.shape == (5, 3, width) and env.obs_mask.all()
        assert torch.equal(env.global_state(state), obs.reshape(5, 3 * width))
        assert env.cooperators.all() and env.action_mask.shape == (3, env.action_sizes[0]) and not env.discrete
    assert env.agents == ("drone_0", "drone_1", "drone_2")
    assert make(num_agents=3).agents == ("leader_0", "follower_0", "follower_1")
    parallel_api_test(zoo.to_parallel_env(make("leader_follower_v1", dtype=torch.float32)), num_cycles=5)


@pytest.mark.parametrize("env_id", drones.TASKS)
def test_pictures_show_what_moves(env_id):
    env = make(env_id, 2, num_agents=3)
    state, _ = env.reset(generators(0))
    states = [state]
    for _ in range(30):
        state, *_ = env.step(state, drones.simple_controller(env, state))
        states.append(state)
    pictures = [env.render(states[0], 1, size=200), env.render(state, 1, size=200), env.render(state, 1, states, 200)]
    for picture in pictures:
        assert picture.shape == (200, 200, 3) and picture.dtype == np.uint8
        for colour in drones.COLOURS[:3]:
            assert (np.abs(picture.astype(int) - colour).max(-1) < 40).sum() > 20  # each drone is in view
    moved, trails = ((pictures[1] != other).any(-1).sum() for other in (pictures[0], pictures[2]))
    assert moved > 300 and trails > 20


@pytest.mark.parametrize(
    "options, message",
    [
        ({"env_id": "hover_v9"}, "env_id must be one of .*leader_follower_v0, .*, got 'hover_v9'"),
        ({"physics": "mujoco"}, "physics must be pyb or dyn, got 'mujoco'"),
        ({"version": "v0.5"}, "version must be one of v1.0.0, master, main, got 'v0.5'"),
        ({"action_type": "thrust"}, "action_type must be one of one_d_rpm, rpm, vel, velocity, pid, got 'thrust'"),
        ({"num_agents": 0}, "num_agents must be 1 or more, got 0"),
        ({"num_envs": 0}, "num_envs must be 1 or more, got 0"),
        ({"horizon": 0}, "horizon must be 1 or more, got 0"),
        ({"control_hz": 50}, "control_hz must be a divisor of physics_hz = 240, got 50"),
        ({"control_hz": 0}, "control_hz must be 1 or more, got 0"),
        ({"mass": -0.027}, "mass must be positive, got -0.027"),
        ({"mass": torch.ones(3)}, "mass must be a number or .num_envs = 2., got .3."),
        ({"kf": 0.0}, "kf must be positive, got 0.0"),
        ({"damping": float("nan")}, "damping must be 0 or more, got nan"),
        ({"gust": -0.1}, "gust must be 0 or more, got -0.1"),
        ({"gust_time": 0.0}, "gust_time must be positive, got 0.0"),
        ({"delay": 2}, "delay must be 0 or 1, got 2"),
        ({"delay": torch.tensor([0.0, 0.5])}, "delay must be 0 or 1"),
        ({"wind": 0.1}, "wind must be .3. or .num_envs = 2, 3. and finite, got 0.1"),
        ({"wind": (0.0, 0.0, float("inf"))}, "wind must be"),
        ({"spacing": -1.0}, "spacing must be 0 or more, got -1.0"),
        ({"speed_limit": 0.0}, "speed_limit must be positive, got 0.0"),
        ({"thrust": 2}, "fields of leader_follower_v0 are version, .*mass.*, got 'thrust'"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(**{"env_id": "leader_follower_v0", "num_envs": 2, **options})
    assert "\n" not in str(error.value)


def test_states_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"arrays of a state must be \[B, 2, 3 or 4\], got \[1, 3, 3\]"):
        make().make_state(torch.zeros(1, 3, 3))


@pytest.mark.slow
def test_speed_and_gif_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(drones.VELOCITY, "horizon", 8)
    path = tmp_path / "drones.gif"
    threads = torch.get_num_threads()
    drones.main("leader_follower_v1", 4, num_agents=3, seconds=0.01, threads=threads, gif=str(path))
    assert "env steps/s" in capsys.readouterr().out and path.read_bytes().startswith(b"GIF")
