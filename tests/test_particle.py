"""envs/particle.py against mpe2: recorded trajectories, and the installed package live."""

import dataclasses
import importlib
import logging
import pathlib
import shutil

import numpy as np
import pytest
import replay
import torch
from commands import alike

import envs
from envs import particle

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DATA = pathlib.Path(__file__).parent / "data" / "particle"
KINDS = [(env_id, continuous) for env_id in particle.TASKS for continuous in (True, False)]


def mpe2_env(env_id: str, continuous: bool, **options):
    logging.getLogger("pettingzoo.utils.env_logger").setLevel(logging.ERROR)  # a warning for each clipped action
    return importlib.import_module(f"mpe2.{env_id}").parallel_env(continuous_actions=continuous, **options)


def mpe2_goals(env_id: str, world) -> list[int]:
    """What our State.goal holds, read from mpe2's world."""
    landmark = {id(mark): i for i, mark in enumerate(world.landmarks)}
    if env_id in ("simple_adversary_v3", "simple_push_v3"):
        return [landmark[id(world.agents[0].goal_a)]]
    if env_id == "simple_speaker_listener_v4":
        return [landmark[id(world.agents[0].goal_b)]]
    if env_id == "simple_reference_v3":
        return [landmark[id(agent.goal_b)] for agent in world.agents]
    if env_id == "simple_crypto_v3":
        return [landmark[id(world.agents[0].goal_a)], int(np.argmax(world.agents[2].key))]
    return []


def from_mpe2(env: particle.ParticleEnv, originals: list) -> particle.State:
    """The moment in which mpe2 environments are, one per row of the batch."""
    worlds = [original.unwrapped.world for original in originals]

    def entities(kind: str, attribute: str):
        return np.array([[getattr(entity.state, attribute) for entity in getattr(w, kind)] for w in worlds])

    position, velocity, message = (entities("agents", name) for name in ("p_pos", "p_vel", "c"))
    goal = np.array([mpe2_goals(env.env_id, world) for world in worlds]).reshape(len(worlds), env.task.goals)
    return env.make_state(position, velocity, entities("landmarks", "p_pos"), goal, message)


def to_mpe2(env: particle.ParticleEnv, action: torch.Tensor) -> list[dict]:
    """[B, N(, A)] -> one dictionary per environment."""
    rows = action.cpu().numpy()
    if env.discrete:
        return [{agent: int(row[i]) for i, agent in enumerate(env.agents)} for row in rows]
    sizes = env.action_sizes
    return [{agent: row[i, : sizes[i]].astype(np.float32) for i, agent in enumerate(env.agents)} for row in rows]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("*.npz")))
def test_recordings(name):
    for quantity, (error, tolerance) in replay.replay_particle(
        DATA / name, replay.load_index("particle", DATA)
    ).items():
        assert error <= tolerance, quantity


@pytest.mark.slow
def test_replay_command_tells_good_from_bad(tmp_path, capsys):
    source = DATA / "simple_tag_cont.npz"
    shutil.copy(source, tmp_path)
    assert replay.main(["particle", str(tmp_path)]) == 0
    for name, change in (("rew", 1e-6), ("apos", 1e-8), ("obs", 1e-8)):
        arrays = dict(np.load(source))
        arrays[name][-1, -1, -1] += change
        np.savez(tmp_path / source.name, **arrays)
        assert replay.main(["particle", str(tmp_path)]) == 1
    content = source.read_bytes()
    for broken in (b"", b"nothing", content[:5000], content[:5000] + bytes(99) + content[5099:]):
        (tmp_path / source.name).write_bytes(broken)
        assert replay.main(["particle", str(tmp_path)]) == 1
        assert "cannot be replayed" in capsys.readouterr().out
    for wrong in (["particles", str(tmp_path)], ["particle"], ["particle", str(tmp_path / "missing")]):
        assert replay.main(wrong) == 2


def test_replay_of_a_new_number_of_agents(tmp_path):
    original, rng = mpe2_env("simple_spread_v3", False, N=4), np.random.default_rng(0)
    env = particle.make("simple_spread_v3", 1, num_agents=4, continuous_actions=False)
    original.reset(seed=3)
    world = original.unwrapped.world
    arrays = {"goal": [[-1]], "key": [[-1]], "obs_steps": [0]}
    arrays["lpos"] = [[mark.state.p_pos for mark in world.landmarks]]
    for name, attribute in (("apos0", "p_pos"), ("avel0", "p_vel")):  # mpe2 moves its arrays in place
        arrays[name] = [[getattr(agent.state, attribute).copy() for agent in world.agents]]
    arrays["obs"] = [[np.concatenate([original.unwrapped.scenario.observation(a, world) for a in world.agents])]]
    arrays |= {"actions": [[]], "apos": [[]], "avel": [[]], "rew": [[]]}
    for _ in range(25):
        action = {agent: int(rng.integers(5)) for agent in env.agents}
        _, reward, *_ = original.step(action)
        for name, row in (("actions", action), ("rew", reward)):
            arrays[name][0].append(list(row.values()))
        arrays["apos"][0].append([a.state.p_pos.copy() for a in world.agents])
        arrays["avel"][0].append([a.state.p_vel.copy() for a in world.agents])
    np.savez(tmp_path / "simple_spread_n4_disc.npz", **{name: np.array(rows) for name, rows in arrays.items()})
    assert replay.main(["particle", str(tmp_path)]) == 0


@pytest.mark.parametrize("env_id, continuous", KINDS)
def test_live_against_mpe2(env_id, continuous):
    originals = [mpe2_env(env_id, continuous) for _ in range(3)]
    first = [original.reset(seed=seed)[0] for seed, original in enumerate(originals)]
    env = envs.make(env_id, 3, DEVICE, torch.float64, continuous_actions=continuous)
    assert env.agents == originals[0].possible_agents
    for i, agent in enumerate(env.agents):
        assert originals[0].observation_space(agent).shape == (env.obs_sizes[i],)
        space = originals[0].action_space(agent)
        assert env.action_sizes[i] == (space.shape[0] if continuous else space.n)
    state = from_mpe2(env, originals)
    check_obs(env, env.observe(state), first)
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 26):
        if t % 4 == 1:  # hold the actions, so that agents get fast and leave the arena
            action = particle.random_action(env, generator)
        state, obs, reward, terminated, truncated, info = env.step(state, action, env.draw([generator]))
        results = [original.step(moves) for original, moves in zip(originals, to_mpe2(env, action))]
        check_obs(env, obs, [result[0] for result in results])
        expected = torch.tensor([list(result[1].values()) for result in results], device=DEVICE, dtype=torch.float64)
        # mpe2 gets float32 actions and gives float32 observations
        torch.testing.assert_close(reward, expected, rtol=0, atol=1e-5)
        assert truncated.tolist() == [all(result[3].values()) for result in results] == [t == 25] * 3
        assert not terminated.any() and info == {}


def check_obs(env, obs: torch.Tensor, expected: list[dict]):
    for row, observations in zip(obs.cpu().numpy(), expected):
        for i, agent in enumerate(env.agents):
            np.testing.assert_allclose(row[i, : env.obs_sizes[i]], observations[agent], rtol=0, atol=1e-5)
            assert (row[i, env.obs_sizes[i] :] == 0).all()


@pytest.mark.parametrize("env_id", particle.TASKS)
def test_reset_has_the_distribution_of_mpe2(env_id):
    """Mean and spread of every entry of the first observation, and of the hidden state; the ranges of the positions."""
    n = 300
    original, copy = mpe2_env(env_id, True), particle.make(env_id, 1)
    obs, hidden = [], []
    for seed in range(n):
        first = original.reset(seed=seed)[0]
        obs.append(np.concatenate([first[agent] for agent in copy.agents]))
        hidden.append(copy.global_state(from_mpe2(copy, [original]))[0].numpy())
    env = envs.make(env_id, 20_000, DEVICE)
    state, ours = env.reset(generators(0))
    live = torch.cat([ours[:, i, :size] for i, size in enumerate(env.obs_sizes)], 1)
    for a, b in ((np.array(obs), live), (np.array(hidden), env.global_state(state))):
        b = b.double().cpu().numpy()
        error = 5 * a.std(0) / np.sqrt(n) + 1e-5  # five standard errors
        assert (np.abs(a.mean(0) - b.mean(0)) <= error).all()
        assert (np.abs(a.std(0) - b.std(0)) <= error).all()
    reach = env.task.landmark_range
    assert 0.999 < state.position.abs().max() <= 1 and 0.999 * reach < state.landmarks.abs().max() <= reach
    assert not state.velocity.any() and not state.message.any() and not state.t.any()


def test_blocks_of_a_reset_depend_on_their_own_generator_only():
    env = envs.make("simple_reference_v3", 12, DEVICE)
    state, obs = env.reset(generators(5, 6, 7))
    for k, seed in enumerate((5, 6, 7)):
        alone, alone_obs = dataclasses.replace(env, num_envs=4).reset(generators(seed))
        block = slice(4 * k, 4 * k + 4)
        assert torch.equal(alone_obs, obs[block])
        assert torch.equal(alone.goal, state.goal[:, block]) and torch.equal(alone.position, state.position[..., block])
    with pytest.raises(ValueError, match="multiple of the 5 generators"):
        env.reset(generators(*range(5)))


@pytest.mark.slow
@pytest.mark.parametrize("env_id, continuous", KINDS)
def test_step_is_pure_and_compiles(env_id, continuous):
    env = envs.make(env_id, 4, DEVICE, continuous_actions=continuous)
    state, _ = env.reset(generators(0))
    before = particle.State(**{name: value.clone() for name, value in vars(state).items()})
    torch.compiler.reset()
    graph = torch.compile(env.step, fullgraph=True, backend="eager")
    action = particle.random_action(env, torch.Generator().manual_seed(2))
    action_before = action.clone()
    assert_same(graph(state, action, None), env.step(state, action, None))
    assert_same((state, action), (before, action_before))


def assert_same(a, b, atol=0.0):
    for x, y in zip(a, b):
        if isinstance(x, particle.State):
            assert_same(vars(x).values(), vars(y).values(), atol)
        elif isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=atol)
        else:
            assert x == y


@pytest.mark.slow
@pytest.mark.parametrize("env_id, continuous", [("simple_spread_v3", True), ("simple_world_comm_v3", False)])
def test_compiled_code_agrees_and_is_compiled_once(env_id, continuous):
    env = envs.make(env_id, 16, DEVICE, torch.float64, continuous_actions=continuous)
    torch.compiler.reset()
    compiled = torch.compile(env.step, fullgraph=True)
    generator = torch.Generator().manual_seed(3)
    state, _ = env.reset([generator])
    for t in range(5):
        action = particle.random_action(env, generator)
        with torch.compiler.set_stance("default" if t == 0 else "fail_on_recompile"):
            result = compiled(state, action, None)
        assert_same(result, env.step(state, action, None), atol=1e-10)
        state = result[0]


CHANGES = {"dt": 0.2, "damping": 0.5, "contact_force": 50.0, "contact_margin": 0.1, "mass": 2.0, "accel_scale": 0.5}


@pytest.mark.parametrize("field, value", [*CHANGES.items(), ("max_speed_scale", 0.1)])
def test_fields_change_the_dynamics(field, value):
    env = envs.make("simple_tag_v3", 8, DEVICE, torch.float64)
    generator = torch.Generator().manual_seed(0)
    where, action = 0.3 * torch.rand(8, 4, 2, generator=generator), particle.random_action(env, generator)
    ends = []
    per_env = torch.tensor([getattr(env, field)] * 4 + [value] * 4, dtype=torch.float64, device=DEVICE)
    for setting in (getattr(env, field), value, per_env):
        changed = envs.make("simple_tag_v3", 8, DEVICE, torch.float64, **{field: setting})
        state = changed.make_state(where, landmarks=torch.full((8, 2, 2), 0.5))
        for _ in range(5):
            state, *_ = changed.step(state, action, None)
        ends.append(state.position)
    assert ((ends[0] - ends[1]).abs().amax((0, 1)) > 1e-3).all()
    assert alike(ends[2], torch.cat((ends[0][..., :4], ends[1][..., 4:]), -1))  # a value per environment


def test_dynamics_by_hand():
    """One free agent: the position moves with the old velocity; one that is too fast is cut to its limit."""
    env = envs.make("simple_spread_v3", 1, DEVICE, torch.float64, num_agents=1, damping=0.5, mass=2.0, accel_scale=3.0)
    state = env.make_state([[[0.0, 0.0]]], [[[1.0, -1.0]]], [[[3.0, 4.0]]])
    action = torch.tensor([[[9.0, 0.0, 0.4, 1.0, 0.0]]], device=DEVICE, dtype=torch.float64)
    state, obs, reward, *_ = env.step(state, action, None)
    # v = 0.5 v + 0.1 * 15 * (0.4, -1) / 2
    expected = torch.tensor([[[0.1], [-0.1]]], device=DEVICE, dtype=torch.float64)
    torch.testing.assert_close(state.position, expected)
    torch.testing.assert_close(state.velocity, expected * 8 - torch.tensor([[[0.0], [0.45]]]).to(expected))
    torch.testing.assert_close(obs[0, 0, 4:].cpu(), torch.tensor([2.9, 4.1], dtype=torch.float64))
    torch.testing.assert_close(reward.item(), -0.5 * (2.9**2 + 4.1**2) ** 0.5)
    tag = envs.make("simple_tag_v3", 1, DEVICE, torch.float64, max_speed_scale=0.5)
    places = [[[0.0, 5.0], [0.0, -5.0], [5.0, 0.0], [-5.0, 0.0]]]
    state = tag.make_state(places, np.full((1, 4, 2), 3.0), np.full((1, 2, 2), 9.0))
    state, *_ = tag.step(state, torch.zeros(1, 4, 5, device=DEVICE, dtype=torch.float64), None)
    speeds = state.velocity.norm(dim=1)[:, 0].tolist()
    assert speeds == pytest.approx([0.5, 0.5, 0.5, 0.65])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_agents_at_one_point_stay_finite(dtype):
    env = envs.make("simple_tag_v3", 2, DEVICE, dtype)
    state = env.make_state(np.zeros((2, 4, 2)), landmarks=np.zeros((2, 2, 2)))
    for _ in range(3):
        state, obs, reward, *_ = env.step(state, torch.zeros(2, 4, 5, device=DEVICE, dtype=dtype), None)
        assert obs.isfinite().all() and reward.isfinite().all() and state.velocity.isfinite().all()


def test_masks_name_what_is_always_zero():
    dead = {"simple_spread_v3": [[14, 15, 16, 17]] * 3, "simple_crypto_v3": [[], [2, 3], [2, 3, 6, 7]]}
    for env_id in particle.TASKS:
        env = envs.make(env_id, 1, DEVICE)
        assert env.obs_mask.shape == (env.num_agents, max(env.obs_sizes))
        for i, size in enumerate(env.obs_sizes):
            live = [k for k in range(size) if k not in dead.get(env_id, [[]] * 6)[i]]
            assert env.obs_mask[i].nonzero()[:, 0].tolist() == live
        assert env.action_mask.sum(1).tolist() == list(env.action_sizes)


def test_teams():
    teams = {env_id: envs.make(env_id, 1).cooperators.int().tolist() for env_id in particle.TASKS}
    assert teams == {
        "simple_spread_v3": [1, 1, 1],
        "simple_tag_v3": [1, 1, 1, 0],
        "simple_crypto_v3": [0, 1, 1],
        "simple_adversary_v3": [0, 1, 1],
        "simple_push_v3": [0, 1],
        "simple_speaker_listener_v4": [1, 1],
        "simple_reference_v3": [1, 1],
        "simple_world_comm_v3": [1, 1, 1, 1, 0, 0],
    }


def test_global_state_and_pictures():
    for env_id in particle.TASKS:
        env = envs.make(env_id, 2, DEVICE)
        state, _ = env.reset(generators(0))
        parts = [v.movedim(-1, 0).flatten(1) for v in (state.position, state.velocity, state.landmarks)]
        goals = torch.nn.functional.one_hot(state.goal.T, env.num_landmarks).flatten(1)
        expected = torch.cat((*parts, goals, state.message.movedim(-1, 0).flatten(1)), 1)
        assert torch.equal(env.global_state(state), expected)
        picture = env.render(state, 1)
        assert picture.shape == (400, 400, 3) and picture.dtype == np.uint8 and len(np.unique(picture)) > 20


@pytest.mark.parametrize(
    "options, message",
    [
        ({"env_id": "simple_spread_v9"}, "env_id must be one of simple_spread_v3, .*zoo:package.module, got"),
        ({"env_id": "simple_tag_v3", "num_agents": 5}, "num_agents of simple_tag_v3 must be 4, got 5"),
        ({"gravity": 9.81}, "fields of simple_spread_v3 are dt, .*damping.*, got 'gravity'"),
        ({"mass": 0.0}, "mass must be positive, got 0.0"),
        ({"damping": -0.1}, "damping must be 0 or more, got -0.1"),
        ({"contact_force": float("nan")}, "contact_force must be 0 or more, got nan"),
        ({"horizon": 0}, "horizon must be 1 or more, got 0"),
        ({"num_envs": 0}, "num_envs must be 1 or more, got 0"),
        ({"num_agents": 0}, "num_agents must be 1 or more, got 0"),
        ({"nearest_first": "True"}, "nearest_first must be true or false, got 'True'"),
        ({"env_id": "simple_tag_v3", "nearest_first": True}, "nearest_first must be False in simple_tag_v3, got True"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(**{"env_id": "simple_spread_v3", "num_envs": 2, **options})
    assert "\n" not in str(error.value)


def test_nearest_first_is_a_reordering_that_forgets_numbers():
    options = {"num_envs": 3, "device": DEVICE, "num_agents": 4}
    plain, env = envs.make("simple_spread_v3", **options), envs.make("simple_spread_v3", nearest_first=True, **options)
    (state, obs), (_, ordered) = plain.reset(generators(0)), env.reset(generators(0))
    assert torch.equal(env.obs_mask, plain.obs_mask)
    own, marks, others, rest = obs.split((4, 8, 6, 6), 2)
    expected = [own]
    for places in (marks, others):
        pairs = [sorted(row.unflatten(0, (-1, 2)).tolist(), key=lambda p: np.hypot(*p)) for row in places.flatten(0, 1)]
        expected.append(torch.tensor(pairs, device=DEVICE).view_as(places))
    torch.testing.assert_close(ordered, torch.cat((*expected, rest), 2))
    order = [0, 3, 1, 2]  # others and landmarks change their numbers
    position = state.position.movedim(-1, 0)[:, order]
    landmarks = state.landmarks.movedim(-1, 0)[:, [2, 0, 1, 3]]
    renamed = env.make_state(position, torch.zeros_like(position), landmarks)
    assert torch.equal(env.observe(renamed)[:, 0], ordered[:, 0])
    assert not torch.equal(plain.observe(renamed)[:, 0], obs[:, 0])
    action = torch.rand(3, 4, 5, device=DEVICE)
    step = torch.compile(env.step, fullgraph=True, backend="eager")
    assert torch.equal(step(state, action, None)[1], env.step(state, action, None)[1])


def test_number_of_agents_and_horizon():
    env = envs.make("simple_spread_v3", 2, DEVICE, num_agents=7, horizon=2)
    state, obs = env.reset(generators(0))
    assert obs.shape == (2, 7, 42) and env.obs_sizes == (42,) * 7
    action = torch.zeros(2, 7, 5, device=DEVICE)
    state, _, _, _, first, _ = env.step(state, action, None)
    assert not first.any() and env.step(state, action, None)[4].all()
    assert envs.make("simple_tag_v3", 1, num_agents=4).num_agents == 4


@pytest.mark.slow
def test_speed_and_gif_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "tag.gif"
    threads = torch.get_num_threads()
    particle.main(env_id="simple_tag_v3", num_envs=8, seconds=0.01, threads=threads, gif=str(path))
    assert "env steps/s" in capsys.readouterr().out and path.read_bytes().startswith(b"GIF")
