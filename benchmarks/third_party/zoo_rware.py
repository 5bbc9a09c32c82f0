"""Robot warehouse (pip install rware==2.0.0): --env-id zoo:zoo_rware --env-kwargs task=rware-tiny-2ag-easy-v2."""

import gymnasium
import rware  # noqa: F401  (registers the tasks)
from pettingzoo import ParallelEnv


class parallel_env(ParallelEnv):
    def __init__(self, task="rware-tiny-2ag-v2", max_cycles=500, **options):
        self.metadata, self.max_cycles = {"name": task}, max_cycles
        self.env = gymnasium.make(task, max_steps=max_cycles, disable_env_checker=True, **options).unwrapped
        self.possible_agents = [f"robot_{i}" for i in range(self.env.n_agents)]
        self.observation_space = dict(zip(self.possible_agents, self.env.observation_space)).get
        self.action_space = dict(zip(self.possible_agents, self.env.action_space)).get

    def reset(self, seed=None, options=None):
        self.agents = self.possible_agents
        return dict(zip(self.agents, self.env.reset(seed=seed)[0])), dict.fromkeys(self.agents, {})

    def step(self, actions):
        obs, rewards, late, *_ = self.env.step([int(actions[agent]) for agent in self.agents])
        everyone, self.agents = self.agents, [] if late else self.agents  # only the time limit ends an episode
        ends = (dict.fromkeys(everyone, value) for value in (False, late, {}))
        return dict(zip(everyone, obs)), dict(zip(everyone, rewards)), *ends
