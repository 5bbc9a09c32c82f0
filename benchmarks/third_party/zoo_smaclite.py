"""SMAClite (github.com/uoe-agents/smaclite): --env-id zoo:zoo_smaclite --env-kwargs task=2s3z. The dead do nothing."""

import gymnasium
from pettingzoo import ParallelEnv


class parallel_env(ParallelEnv):
    def __init__(self, task="2s_vs_1sc", max_cycles=150):
        self.max_cycles, task = max_cycles, f"smaclite:smaclite/{task}-v0"
        self.env = gymnasium.make(task, seed=0, max_episode_steps=max_cycles, disable_env_checker=True)
        self.possible_agents = [f"unit_{i}" for i in range(self.env.unwrapped.n_agents)]
        self.observation_space = dict(zip(self.possible_agents, self.env.observation_space)).get
        self.action_space = dict(zip(self.possible_agents, self.env.action_space)).get

    def seen(self, obs):
        masks = [{"action_mask": mask} for mask in self.env.unwrapped.get_avail_actions()]
        return dict(zip(self.possible_agents, obs)), dict(zip(self.possible_agents, masks))

    def reset(self, seed=None, options=None):
        self.agents = self.possible_agents
        return self.seen(self.env.reset(seed=seed)[0])

    def step(self, actions):
        obs, *ends, _ = self.env.step([int(actions[agent]) for agent in self.agents])
        (obs, infos), everyone, self.agents = self.seen(obs), self.agents, [] if any(ends[1:]) else self.agents
        return obs, *(dict.fromkeys(everyone, end) for end in ends), infos
