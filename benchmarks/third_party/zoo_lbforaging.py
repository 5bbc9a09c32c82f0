"""Level-based foraging (pip install lbforaging==2.0.0): --env-id zoo:zoo_lbforaging --env-kwargs task=..."""

import gymnasium
import lbforaging  # noqa: F401  (registers the tasks)
from pettingzoo import ParallelEnv


class parallel_env(ParallelEnv):
    def __init__(self, task="Foraging-8x8-2p-2f-v3", **options):
        self.env = gymnasium.make(task, disable_env_checker=True, **options).unwrapped
        self.metadata, self.max_cycles = {"name": task}, self.env._max_episode_steps
        self.possible_agents = [f"player_{i}" for i in range(len(self.env.players))]
        self.observation_space = dict(zip(self.possible_agents, self.env.observation_space)).get
        self.action_space = dict(zip(self.possible_agents, self.env.action_space)).get

    def reset(self, seed=None, options=None):
        self.agents = self.possible_agents
        return dict(zip(self.agents, self.env.reset(seed=seed)[0])), dict.fromkeys(self.agents, {})

    def step(self, actions):
        obs, rewards, over, *_ = self.env.step([int(actions[agent]) for agent in self.agents])
        eaten, everyone, self.agents = not self.env.field.any(), self.agents, [] if over else self.agents
        ends = (dict.fromkeys(everyone, value) for value in (eaten, over and not eaten, {}))
        return dict(zip(everyone, obs)), dict(zip(everyone, rewards)), *ends
