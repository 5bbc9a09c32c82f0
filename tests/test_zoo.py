"""envs/zoo.py: our environments pass PettingZoo's own test, and PettingZoo's environments behave like ours."""

import functools

import numpy as np
import pytest
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.test import parallel_api_test
from test_particle import KINDS, from_mpe2, generators, mpe2_env

import envs
from envs import particle, perturb, zoo

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("env_id, continuous", KINDS)
def test_our_environments_pass_the_api_test(env_id, continuous):
    parallel = zoo.to_parallel_env(envs.make(env_id, 1, DEVICE, continuous_actions=continuous))
    parallel_api_test(parallel, num_cycles=30)


def test_our_environment_as_a_parallel_env():
    env = envs.make("simple_world_comm_v3", 1, DEVICE)
    parallel = zoo.to_parallel_env(env)
    first, infos = parallel.reset(seed=4)
    again, _ = parallel.reset(seed=4)
    other, _ = parallel.reset()
    state, obs = env.reset(generators(4))
    for i, agent in enumerate(env.agents):
        assert np.array_equal(first[agent], again[agent]) and not np.array_equal(first[agent], other[agent])
        assert np.array_equal(first[agent], obs[0, i, : env.obs_sizes[i]].cpu().numpy()) and infos[agent] == {}
    parallel.reset(seed=4)
    assert parallel.state_space.contains(parallel.state()) and parallel.render().dtype == np.uint8
    for t in range(1, 26):
        moves = {agent: parallel.action_space(agent).sample() for agent in parallel.agents}
        padded = torch.zeros(1, 6, 9, device=DEVICE)
        for i, agent in enumerate(env.agents):
            padded[0, i, : env.action_sizes[i]] = torch.as_tensor(moves[agent])
        state, obs, reward, *_ = env.step(state, padded, None)
        result = parallel.step(moves)
        assert result[1] == pytest.approx(dict(zip(env.agents, reward[0].tolist())))
        assert set(result[2].values()) == {False} and set(result[3].values()) == {t == 25}
    assert parallel.agents == []
    with pytest.raises(ValueError, match="call reset"):
        parallel.step(moves)
    with pytest.raises(ValueError, match="num_envs must be 1"):
        zoo.to_parallel_env(envs.make("simple_tag_v3", 2))


@pytest.mark.parametrize("env_id, continuous", [("simple_tag_v3", True), ("simple_reference_v3", False)])
def test_wrapped_mpe2_agrees_with_our_environment(env_id, continuous):
    wrapped = zoo.from_parallel_env(functools.partial(mpe2_env, env_id, continuous), 4, DEVICE, torch.float64)
    env = envs.make(env_id, 4, DEVICE, torch.float64, continuous_actions=continuous)
    for name in (
        "agents",
        "num_agents",
        "obs_sizes",
        "action_sizes",
        "discrete",
        "action_low",
        "action_high",
        "horizon",
    ):
        assert getattr(wrapped, name) == getattr(env, name), name
    handle, obs = wrapped.reset(generators(1, 2))
    state = from_mpe2(env, wrapped.envs)
    torch.testing.assert_close(obs, env.observe(state), rtol=0, atol=1e-5)
    for t in range(25):
        action = perturb.random_actions(env, generators(t))
        state, *ours = env.step(state, action, env.draw([]))
        handle, *theirs = wrapped.step(handle, action, wrapped.draw([]))
        for a, b in zip(ours[:4], theirs[:4]):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert ours[3].all() and not ours[2].any()
    live = torch.cat([ours[0][:, i, :size] for i, size in enumerate(env.obs_sizes)], 1)
    torch.testing.assert_close(wrapped.global_state(handle), live, rtol=0, atol=1e-5)


def test_wrapping_ours_and_resetting_in_blocks():
    def build():
        return zoo.to_parallel_env(particle.make("simple_spread_v3", 1))

    both, second = zoo.from_parallel_env(build, 4), zoo.from_parallel_env(build, 2)
    assert torch.equal(both.reset(generators(1, 2))[1][2:], second.reset(generators(2))[1])
    handle, obs = second.reset(generators(3))
    assert obs.std(0).min() == 0 < obs.std(0).max()  # two different starts, and zeros that never change
    with pytest.raises(ValueError, match="multiple of the 3 generators"):
        second.reset(generators(1, 2, 3))
    later, *_ = second.step(handle, torch.zeros(2, 3, 5), None)
    with pytest.raises(ValueError, match="newest state"):
        second.step(handle, torch.zeros(2, 3, 5), None)
    assert second.render(later, 1).shape == (400, 400, 3)


def test_make_by_name():
    env = envs.make("zoo:mpe2.simple_spread_v3", 2, DEVICE, continuous_actions=False, N=4, cooperators=("agent_1",))
    assert env.discrete and env.num_agents == 4 and env.cooperators.tolist() == [False, True, False, False]
    state, obs = env.reset(generators(0))
    assert obs.shape == (2, 4, 24) and env.obs_mask.all() and env.render(state, 0).ndim == 3
    assert not envs.make("zoo:mpe2.simple_spread_v3", 1).discrete
    for wrong, message in (
        ({"env_id": "zoo:nowhere.at_all"}, "no module 'nowhere.at_all'"),
        ({"env_id": "zoo:json"}, "parallel_env"),
        ({"num_agents": 5}, "num_agents of zoo:mpe2.simple_spread_v3 must be 3"),
        ({"cooperators": ("bob",)}, "cooperators must be some of agent_0, agent_1, agent_2"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.make(**{"env_id": "zoo:mpe2.simple_spread_v3", "num_envs": 1, **wrong})


class Countdown(ParallelEnv):
    """Agent a ends after 2 steps, b after 4; observation: the step; reward: 1 and the sum of the action."""

    def __init__(self, action_spaces=None, bound=1.0):
        self.metadata, self.possible_agents, self.lives = {"name": "countdown"}, ["a", "b"], {"a": 2, "b": 4}
        box = spaces.Box(-bound, bound, (2,), np.float32)
        self.action_spaces = action_spaces or {"a": box, "b": box}
        self.observation_spaces = {"a": spaces.Box(0, 9, (1,)), "b": spaces.Box(0, 9, (2, 2))}

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        self.agents, self.t = ["a", "b"], 0
        return {agent: np.zeros(self.observation_spaces[agent].shape) for agent in self.agents}, {}

    def step(self, actions):
        self.t += 1
        assert set(actions) == set(self.agents)
        acting, self.actions = self.agents, actions
        ended = {agent: self.t == self.lives[agent] for agent in acting}
        self.agents = [agent for agent in acting if not ended[agent]]
        obs = {agent: np.full(self.observation_spaces[agent].shape, self.t) for agent in acting}
        return obs, dict.fromkeys(acting, 1.0), ended, dict.fromkeys(acting, False), {agent: {} for agent in acting}


def test_agents_that_end_early():
    env = zoo.from_parallel_env(Countdown, 2, horizon=6, cooperators=["b"])
    assert env.cooperators.tolist() == [False, True] and env.obs_sizes == (1, 4)
    state, obs = env.reset(generators(0))
    rows = []
    for t in range(1, 7):
        state, obs, reward, terminated, truncated, _ = env.step(state, torch.zeros(2, 2, 2), None)
        rows.append((reward[0].tolist(), terminated[0].item(), truncated[0].item(), obs[0, :, 0].tolist()))
    assert [row[0] for row in rows] == [[1, 1], [1, 1], [0, 1], [0, 1], [0, 0], [0, 0]]
    assert [row[1] for row in rows] == [False, False, False, True, True, True]
    assert not any(row[2] for row in rows)
    assert [row[3] for row in rows] == [[1, 1], [2, 2], [0, 3], [0, 4], [0, 0], [0, 0]]
    env = zoo.from_parallel_env(Countdown, 1, horizon=3)
    state, _ = env.reset(generators(0))
    for _ in range(3):
        state, _, _, terminated, truncated, _ = env.step(state, torch.zeros(1, 2, 2), None)
    assert truncated.all() and not terminated.any()


def test_action_bounds():
    env = zoo.from_parallel_env(functools.partial(Countdown, bound=3.0), 1, horizon=4)
    assert (env.action_low, env.action_high) == (-3.0, 3.0)
    state, _ = env.reset(generators(0))
    env.step(state, torch.tensor([[[1.5, -9.0], [0.0, 3.0]]]), None)
    assert [env.envs[0].actions[agent].tolist() for agent in "ab"] == [[1.5, -3.0], [0.0, 3.0]]
    boxes = {"a": spaces.Box(np.float32([0, -5]), np.float32([10, 5])), "b": spaces.Box(0, 1, (1,))}
    env = zoo.from_parallel_env(functools.partial(Countdown, boxes), 1, horizon=4)
    assert (env.action_low, env.action_high, env.action_sizes) == (-1.0, 1.0, (2, 1))
    state, _ = env.reset(generators(0))
    env.step(state, torch.tensor([[[0.5, -0.2], [0.0, 7.0]]]), None)
    assert env.envs[0].actions["a"].tolist() == pytest.approx([7.5, -1.0]) and env.envs[0].actions["b"] == 0.5
    discrete = {"a": spaces.Discrete(3, start=-1), "b": spaces.Discrete(2)}
    env = zoo.from_parallel_env(functools.partial(Countdown, discrete), 1, horizon=4)
    state, _ = env.reset(generators(0))
    env.step(state, torch.tensor([[2, 1]]), None)
    assert env.discrete and env.envs[0].actions == {"a": 1, "b": 1}


def test_environments_that_cannot_be_wrapped():
    box, endless = spaces.Box(0, 1, (2,)), spaces.Box(-np.inf, np.inf, (2,))
    mixed = {"a": box, "b": spaces.Discrete(2)}
    for options, horizon, message in (
        ({"action_spaces": mixed}, 4, "Box for all agents or Discrete for all agents"),
        ({"action_spaces": {"a": endless, "b": box}}, 4, "bounds of the actions must be finite"),
        ({"action_spaces": dict.fromkeys("ab", spaces.MultiDiscrete([2, 2]))}, 4, "Box for all agents or Discrete"),
        ({}, None, "give horizon"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.from_parallel_env(functools.partial(Countdown, **options), 1, horizon=horizon)
