"""envs/zoo.py: our environments pass PettingZoo's own test, and PettingZoo's environments behave like ours."""

import functools
import math
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pettingzoo
import pytest
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.test import parallel_api_test
from test_particle import KINDS, from_mpe2, generators, mpe2_env

import envs
from envs import particle, perturb, robustness, zoo

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
    ):
        with pytest.raises(ValueError, match=message):
            zoo.from_parallel_env(functools.partial(Countdown, **options), 1, horizon=horizon)


# ---------------------------------------------------------------- environments with unpleasant traits


class Trait(ParallelEnv):
    """Two agents see one random number, get reward 1 a step, and nobody ends; subclasses change one thing."""

    metadata = {"name": "trait", "render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    space = spaces.Box(0, 1, (2,), np.float32)
    actions = spaces.Discrete(3)
    max_cycles = 6

    def __init__(self):
        self.possible_agents = ["a", "b"]

    def observation_space(self, agent):
        return self.space

    def action_space(self, agent):
        return self.actions

    def observe(self):
        return {agent: self.rng.random(2, dtype=np.float32) for agent in self.agents}

    def infos(self):
        return {agent: {} for agent in self.agents}

    def reset(self, seed=None, options=None):
        self.rng, self.agents, self.t = np.random.default_rng(seed), ["a", "b"], 0
        return self.observe(), self.infos()

    def ends(self):
        """Who has terminated and who was truncated."""
        return dict.fromkeys(self.agents, False), dict.fromkeys(self.agents, False)

    def rewards(self):
        return dict.fromkeys(self.agents, 1.0)

    def step(self, actions):
        self.t += 1
        self.played = actions
        terminated, truncated = self.ends()
        result = self.observe(), self.rewards(), terminated, truncated, self.infos()
        self.agents = [a for a in self.agents if not (terminated.get(a) or truncated.get(a))]
        return result

    def render(self):
        return np.zeros((4, 4, 3), np.uint8)


class Short(Trait):
    """Cut after 3 to 5 steps, as its seed says."""

    def reset(self, seed=None, options=None):
        result = super().reset(seed)
        self.length = int(self.rng.integers(3, 6))
        return result

    def ends(self):
        return dict.fromkeys(self.agents, False), dict.fromkeys(self.agents, self.t == self.length)


def play(env, steps, action=None, seed=1):
    """What every step gives, from a reset on."""
    state, obs = env.reset(generators(seed))
    shape = (env.num_envs, env.num_agents, *([] if env.discrete else [env.action_mask.shape[1]]))
    action = torch.zeros(shape, dtype=torch.int64 if env.discrete else env.dtype) if action is None else action
    rows = [(obs,)]
    for _ in range(steps):
        state, obs, reward, terminated, truncated, info = env.step(state, action, None)
        rows.append((obs, reward, terminated, truncated, info["live"], info["terminated"]))
    return rows


def test_one_episode_follows_another_in_training():
    """In the step after its end a copy starts again: no reward, nobody live, the observation of a reset."""
    env = zoo.from_parallel_env(Short, 5).for_training(20)
    assert env.horizon == 20 and env.for_training(4).horizon == 4
    env = zoo.from_parallel_env(Short, 5, horizon=30).for_training(20)
    rows = play(env, 20)
    over = torch.stack([row[3] for row in rows[1:]])
    live = torch.stack([row[4] for row in rows[1:]]).bool()
    rewards = torch.stack([row[1] for row in rows[1:]])
    assert torch.equal(live[1:], ~over[:-1, :, None].expand(-1, -1, 2)) and live[0].all()
    assert torch.equal(rewards, live.to(rewards.dtype)) and over[-1].all() and 10 < over[:-1].sum() < 25
    lengths = env.episodic_returns()[:, 0]
    assert (lengths >= 3).all() and (lengths <= 5).all()
    assert torch.equal(torch.stack([row[0] for row in play(env, 20)]), torch.stack([row[0] for row in rows]))
    resting = play(env.for_tests(5), 20)
    assert torch.stack([row[1] for row in resting[1:]]).sum(0).max() <= 5 and not resting[-1][4].any()


@pytest.mark.parametrize("num_workers", [2, 3])
def test_numbers_do_not_depend_on_workers(num_workers):
    alone = zoo.from_parallel_env(Short, 5, horizon=30).for_training(30)
    shared = zoo.from_parallel_env(Short, 5, horizon=30, num_workers=num_workers).for_training(30)
    for ours, theirs in zip(play(alone, 12), play(shared, 12)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert len(shared.envs) == len(range(0, 5, num_workers)) and shared.render(None, 1).shape == (4, 4, 3)
    shared.copies.close()
    assert not any(process.is_alive() for process in shared.copies.processes)


def test_an_evaluation_plays_whole_episodes_in_turns():
    env = zoo.from_parallel_env(Short, 4, horizon=30).for_training(30)
    tests = env.for_tests(10)
    assert (tests.num_envs, tests.turns, tests.horizon, tests.autoreset) == (4, 3, 30, False)
    few = env.for_tests(2)
    policy = robustness.Policy(
        output=lambda obs: torch.zeros(*obs.shape[:3], 3),
        to_action=lambda output: output,
        divergence=lambda output, clean: (output - clean).sum(-1),
    )
    returns = robustness.evaluate(tests, policy, generators(1, 2))
    assert returns.shape == (2, 6, 2) and 1 < len(returns.unique()) and returns.min() >= 3 and returns.max() <= 5
    steps = []
    few.copies.step = lambda autoreset, real=few.copies.step: steps.append(1) or real(autoreset)
    assert robustness.evaluate(few, policy, generators(1, 2)).shape == (2, 1, 2) and len(steps) <= 5


class Mortal(Trait):
    """a dies in step 2 and comes back in step 5; agents that were there have a last reward."""

    max_cycles = 8

    def ends(self):
        return {agent: agent == "a" and self.t == 2 for agent in self.agents}, dict.fromkeys(self.agents, False)

    def step(self, actions):
        result = super().step(actions)
        if self.t == 4:
            self.agents = ["a", "b"]
        return result


def test_the_dead_do_not_count_and_may_return():
    rows = play(zoo.from_parallel_env(Mortal, 1), 7)[1:]
    assert [row[4][0, 0].item() for row in rows] == [1, 1, 0, 0, 0, 1, 1]  # its flags say so in step 5 first
    assert [row[1][0, 0].item() for row in rows] == [1, 1, 0, 0, 0, 1, 1]
    assert [row[5][0, 0].item() for row in rows] == [0, 1, 0, 0, 0, 0, 0]
    assert all(row[4][0, 1] == 1 and not row[2] for row in rows)


class Forgetful(Trait):
    """Everybody terminates in step 3 and stays on the list."""

    def step(self, actions):
        self.t += 1
        ends = dict.fromkeys(self.agents, self.t >= 3)
        return self.observe(), self.rewards(), ends, dict.fromkeys(self.agents, False), self.infos()


class Absent(Trait):
    """b waits from step 2 to step 4 without an end; the list empties in step 5 without one."""

    def step(self, actions):
        result = super().step(actions)
        self.agents = {2: ["a"], 3: ["a"], 4: ["a", "b"], 5: []}.get(self.t, self.agents)
        return result


def test_ends_that_an_environment_forgets():
    rows = play(zoo.from_parallel_env(Forgetful, 1), 5)[1:]
    assert [row[2].item() for row in rows] == [False, False, True, True, True]
    assert [row[1][0, 0].item() for row in rows] == [1, 1, 1, 0, 0]
    rows = play(zoo.from_parallel_env(Absent, 1), 6)[1:]
    assert [row[3].item() for row in rows] == [False] * 4 + [True] * 2 and not rows[4][2]
    assert [row[4][0, 1].item() for row in rows] == [1, 1, 1, 1, 1, 0]  # it waits: its return goes on
    assert [row[0][0, 1].any().item() for row in rows] == [True, True, False, False, True, False]


class Masked(Trait):
    """Each step one of three actions is illegal, as infos say."""

    def infos(self):
        self.illegal = int(self.rng.integers(3))
        mask = np.ones(3, dtype=np.int8)
        mask[self.illegal] = 0
        return {agent: {"action_mask": mask} for agent in self.agents}


class MaskedDict(Masked):
    """The same in a Dict observation, of numbers and bytes."""

    space = spaces.Dict(
        {
            "observation": spaces.Dict({"x": spaces.Box(0, 255, (2,), np.uint8), "y": spaces.Discrete(3)}),
            "action_mask": spaces.MultiBinary(3),
        }
    )

    def observe(self):
        mask = Masked.infos(self)["a"]["action_mask"] if self.agents else None
        inner = {"x": np.array([0, 255], np.uint8), "y": 2}
        return {agent: {"observation": inner, "action_mask": mask} for agent in self.agents}

    def infos(self):
        return {}


@pytest.mark.parametrize("trait", [Masked, MaskedDict])
def test_action_masks_travel_with_observations(trait):
    env = zoo.from_parallel_env(trait, 3, num_workers=1)
    assert (
        env.masked and env.obs_mask[:, -3:].sum() == 0 and env.obs_sizes == (5,) * 2 if trait is MaskedDict else (2, 2)
    )
    state, obs = env.reset(generators(0))
    for _ in range(5):
        legal = envs.legal_actions(obs.unsqueeze(2), env).squeeze(2)
        illegal = [copy.illegal for copy in env.envs]
        assert (~legal).nonzero().tolist() == [[b, n, illegal[b]] for b in range(3) for n in range(2)]
        action = perturb.random_actions(env, generators(3), obs)
        assert legal.gather(2, action[:, :, None]).all()
        noisy = perturb.observation_noise(env, obs, "gaussian", 1.0, generators(4))
        assert torch.equal(noisy[..., -3:], obs[..., -3:]) and not torch.equal(noisy, obs)
        state, obs, *_ = env.step(state, action, None)
    if trait is MaskedDict:
        assert obs[0, 0, :5].tolist() == [0, 1, 0, 0, 1]
    moments = perturb.observation_moments(env.step, env, generators(5))
    assert moments[..., 0, -3:].eq(0).all() and moments[..., 1, -3:].eq(1).all()


class Unmasked(Masked):
    """b has no mask in step 2."""

    def infos(self):
        infos = super().infos()
        return infos | {"b": {}} if self.t == 2 and "b" in infos else infos


class Wide(MaskedDict):
    """The mask beside two other entries."""

    space = spaces.Dict(
        {"own": spaces.Box(0, 1, (2,)), "step": spaces.Discrete(7), "action_mask": spaces.MultiBinary(3)}
    )

    def observe(self):
        mask = Masked.infos(self)["a"]["action_mask"] if self.agents else None
        return {agent: {"own": np.ones(2), "step": self.t, "action_mask": mask} for agent in self.agents}


def test_a_mask_is_never_taken_for_granted():
    with pytest.raises(zoo.EnvironmentFault, match="observation of b.*no action mask"):
        play(zoo.from_parallel_env(Unmasked, 1), 3)
    env = zoo.from_parallel_env(Wide, 1)
    assert env.masked and env.obs_sizes == (9, 9) and play(env, 1)[1][0][0, 0, :9].tolist() == [1, 1, 0, 1] + 5 * [0]
    env = zoo.from_parallel_env(Masked, 1)
    observations, infos = Masked().reset(seed=0)
    with pytest.raises(ValueError, match="infos must be given"):
        env.encode(observations, {})
    assert env.encode(observations, infos)[:, -3:].sum() == 4


def test_an_agent_that_is_cut_unseen_teaches_nothing_in_that_step():
    class Unseen(Short):
        def step(self, actions):
            obs, *result = super().step(actions)
            return ({} if not self.agents else obs), *result

    rows = play(zoo.from_parallel_env(Unseen, 1), 5)[1:]
    last = int(sum(row[1][0, 0] for row in rows)) - 1
    assert [row[4][0, 0].item() for row in rows[: last + 1]] == [1] * last + [0]


def test_a_window_that_cannot_be_closed_is_no_fault():
    class Open(Trait):
        def close(self):
            raise AttributeError("no viewer")

    sys.modules["open_window"] = types.ModuleType("open_window")
    sys.modules["open_window"].parallel_env = lambda num_agents=2: Open()
    assert envs.make("zoo:open_window", 2, num_workers=2, keywords={"num_agents": 2}).num_envs == 2


def test_integer_boxes_round():
    class Whole(Trait):
        actions = spaces.Box(0, 5, (1,), np.int64)

    env = zoo.from_parallel_env(Whole, 1)
    played = []
    for value in (0.0, 0.4, 0.6, 4.4, 4.6, 5.0, 9.0):
        play(env, 1, torch.full((1, 2, 1), value))
        played.append(env.envs[0].played["a"].item())
    assert played == [0, 0, 1, 4, 5, 5, 5]


class Wrong(Trait):
    """What it does wrong in step 2."""

    kind = ""

    def observe(self):
        obs = super().observe()
        if self.t == 2 and self.kind in WRONG_OBSERVATIONS:
            obs["b"] = WRONG_OBSERVATIONS[self.kind]
        return obs

    def rewards(self):
        good = super().rewards()
        return good | {"b": WRONG_REWARDS[self.kind]} if self.t == 2 and self.kind in WRONG_REWARDS else good

    def ends(self):
        if self.kind == "raises" and self.t == 2:
            raise KeyError("no such door")
        return super().ends()


WRONG_OBSERVATIONS = {
    "nan": np.array([0, np.nan], np.float32),
    "infinite": np.array([np.inf, 0], np.float32),
    "huge": np.array([1e39, 0]),
    "outside": np.array([0, 7], np.float32),
    "shape": np.zeros(3, np.float32),
    "object": "x",
}
WRONG_REWARDS = {"vector": np.ones(2), "nan reward": math.nan, "text": "x"}


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("kind", [*WRONG_OBSERVATIONS, *WRONG_REWARDS, "raises"])
def test_what_an_environment_does_wrong_is_named(kind, num_workers):
    class This(Wrong):
        pass

    This.kind = kind
    if kind in ("infinite", "huge"):
        This.space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    env = zoo.from_parallel_env(This, 2, num_workers=num_workers, env_id="zoo:this")
    with pytest.raises(zoo.EnvironmentFault, match=r"zoo:this, step 1.*(of b|no such door|'x'|door)") as caught:
        play(env, 3)
    assert "\n" not in str(caught.value)
    assert kind != "nan" or "nan" in str(caught.value)


def test_rewards_in_arrays_of_one_are_numbers():
    class Ones(Trait):
        def rewards(self):
            return dict.fromkeys(self.agents, np.array([2.0]))

    assert play(zoo.from_parallel_env(Ones, 1), 1)[1][1].tolist() == [[2.0, 2.0]]


def test_a_worker_that_dies_is_named():
    here = os.getpid()

    class Deadly(Trait):
        def ends(self):
            if os.getpid() != here:
                os._exit(3)
            return super().ends()

    env = zoo.from_parallel_env(Deadly, 2, num_workers=2, env_id="zoo:deadly")
    with pytest.raises(zoo.EnvironmentFault, match="zoo:deadly: a worker process has died"):
        play(env, 1)


def test_spaces_that_cannot_be_flattened_are_refused():
    class Words(Trait):
        space = spaces.Text(5)

    with pytest.raises(ValueError, match="observations must be Box"):
        zoo.from_parallel_env(Words, 1)


def test_a_team_is_named_by_first_letters():
    env = envs.make("zoo:mpe2.simple_tag_v3", 1, cooperators=("adversary",))
    assert env.cooperators.tolist() == [True] * 3 + [False]
    env = envs.make("zoo:mpe2.simple_spread_v3", 1, cooperators=("agent_1",), N=11)
    assert env.cooperators.nonzero().flatten().tolist() == [1]  # not agent_10


# ---------------------------------------------------------------- how an environment is found


MODULES = {
    "plain.py": "from test_zoo import Short as parallel_env",
    "only_env.py": "from pettingzoo.utils import parallel_to_aec\nfrom test_zoo import Short\n"
    "def env():\n    aec = parallel_to_aec(Short())\n    aec.metadata['is_parallelizable'] = True\n    return aec",
    "broken.py": "import no_such_package",
    "raising.py": "def parallel_env():\n    raise RuntimeError('no screen')",
    "wordy.py": "def parallel_env(size, colour='red'):\n    assert size == 3\n    "
    "from test_zoo import Short\n    return Short()",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with these modules."""
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_modules_in_the_current_folder(folder):
    assert envs.make("zoo:plain", 2).agents == ["a", "b"]
    assert envs.make("zoo:only_env", 1).agents == ["a", "b"]
    assert envs.make("zoo:wordy", 1, size=3).num_agents == 2
    for name, options, message in (
        ("broken", {}, "no_such_package"),
        ("raising", {}, "no screen"),
        ("wordy", {}, "size"),
        ("wordy", {"size": 3, "shape": 1}, "shape"),
        ("sisl/no_such_thing-v1", {}, "no_such_thing"),
    ):
        with pytest.raises(zoo.EnvironmentFault, match=message):
            envs.make(f"zoo:{name}", 1, **options)


def test_an_id_of_the_registry():
    if not hasattr(pettingzoo, "register"):
        pytest.skip("this PettingZoo has no registry")
    pettingzoo.register("parallel", "ours/Short-v0", entry_point=Short)
    assert envs.make("zoo:ours/Short-v0", 1).agents == ["a", "b"]


def test_the_command_line_reaches_the_environment():
    args = types.SimpleNamespace(
        env_id="zoo:x", env_kwargs=("N=4", '{"a": [1], "b": "c"}', "name=x"), horizon=7, cooperators=("a",)
    )
    args.num_workers, args.capture_video = 1, False
    keywords = {"N": 4, "a": [1], "b": "c", "name": "x"}
    expected = {"keywords": keywords, "horizon": 7, "cooperators": ("a",), "num_workers": 1, "render_mode": None}
    assert envs.task_options(args) == expected
    args.env_id = "simple_spread_v3"
    for wrong, message in (("horizon=3", "there is a flag for it"), ("damping=[1]", "must be a number or a name")):
        args.env_kwargs = (wrong,)
        with pytest.raises(ValueError, match=message):
            envs.task_options(args)
    for wrong in ("N", "{a", "=3"):
        args.env_kwargs = (wrong,)
        with pytest.raises(ValueError, match="--env-kwargs must be JSON or name=value"):
            envs.task_options(args)


OTHERS = {  # what requirements-zoo.txt installs: package, whether agents may end before the episode does
    "sisl/multiwalker-v9": ("Box2D", False),
    "sisl/pursuit-v5": ("pygame", False),
    "butterfly/knights_archers_zombies-v11": ("pygame", True),
    "butterfly/pistonball-v6": ("pymunk", False),
    "magent2.environments.battle_v4": ("magent2", True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_peoples_environments(name, monkeypatch):
    package, are_mortal = OTHERS[name]
    pytest.importorskip(package)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = envs.make(f"zoo:{name}", 2, num_workers=2, render_mode=None).for_training(60)
    state, obs = env.reset(generators(1))
    for _ in range(60):
        action = perturb.random_actions(env, generators(2), obs)
        state, obs, reward, terminated, truncated, info = env.step(state, action, None)
        live = info["live"].bool()
        assert obs.isfinite().all() and reward.isfinite().all() and not reward[~live].any()
        assert are_mortal or (live.all(1) | ~live.any(1)).all()
    assert truncated.all() and env.episodic_returns().isfinite().all()
    env.copies.close()


# ---------------------------------------------------------------- ours -> PettingZoo


def test_pickled_copies_draw_their_own_numbers():
    parallel = zoo.to_parallel_env(envs.make("simple_spread_v3", 1))
    first, second = (pickle.loads(pickle.dumps(parallel)).reset()[0]["agent_0"] for _ in range(2))
    assert not np.array_equal(first, second)


def test_actions_outside_their_space_are_refused():
    for discrete, wrong in ((False, [np.nan] * 5), (False, [2.0] * 5), (False, [0.0] * 4), (True, 5), (True, 1.5)):
        parallel = zoo.to_parallel_env(envs.make("simple_spread_v3", 1, continuous_actions=not discrete))
        parallel.reset(seed=0)
        good = {agent: parallel.action_space(agent).sample() for agent in parallel.agents}
        with pytest.raises(ValueError, match="the action of agent_1 must be in"):
            parallel.step(good | {"agent_1": wrong})
        with pytest.raises(ValueError, match="actions must have one of agent_2"):
            parallel.step({agent: good[agent] for agent in ("agent_0", "agent_1")})


def test_after_the_end_nobody_is_left_to_act():
    parallel = zoo.to_parallel_env(envs.make("simple_spread_v3", 1), max_cycles=2)
    parallel.reset(seed=0)
    for _ in range(2):
        result = parallel.step({agent: np.zeros(5, np.float32) for agent in parallel.agents})
    assert all(result[3].values()) and parallel.agents == [] and parallel.max_cycles == 2
    assert parallel.step({}) == ({}, {}, {}, {}, {})


def test_the_economys_masks_and_planner():
    env = envs.make("economy_tiny_v0", 1)
    parallel = zoo.to_parallel_env(env, with_planner=True)
    parallel_api_test(parallel, num_cycles=30)
    obs, infos = parallel.reset(seed=3)
    assert obs.keys() == infos.keys() == {*env.agents, "planner"}
    mask = infos["agent_0"]["action_mask"]
    assert mask.shape == (env.action_sizes[0],) and 0 < mask.sum() < len(mask)
    rates = infos["planner"]["action_mask"]
    assert rates.shape == (len(env.cutoffs), 1 + env.num_rates) and rates.all()  # a period starts
    still = {agent: 0 for agent in env.agents}
    _, rewards, _, _, infos = parallel.step(still | {"planner": np.full(len(env.cutoffs), 3)})
    assert (parallel.batch_state.rates == 2 * env.rate_step).all() and "planner" in rewards
    assert infos["planner"]["action_mask"][:, 1:].sum() == 0
    with pytest.raises(ValueError, match="it has none"):
        zoo.to_parallel_env(envs.make("simple_spread_v3", 1), with_planner=True)
    wrapped = zoo.from_parallel_env(lambda: zoo.to_parallel_env(env), 1)
    assert wrapped.masked and wrapped.horizon == env.horizon


def test_all_but_zoo_works_without_pettingzoo(tmp_path):
    code = (
        "import sys\nsys.modules['pettingzoo'] = None\nimport envs, ernie_maddpg, ernie_mappo, ernie_coma\n"
        "envs.make('simple_spread_v3', 1)\n"
        "try:\n    envs.make('zoo:x', 1)\nexcept ImportError as error:\n    print('no', error.name)"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stdout == "no pettingzoo\n", result.stderr
