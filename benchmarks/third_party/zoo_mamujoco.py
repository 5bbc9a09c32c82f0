"""MaMuJoCo (pip install gymnasium-robotics==1.4.2 mujoco): --env-id zoo:zoo_mamujoco --env-kwargs scenario=Ant."""

from gymnasium_robotics.envs.multiagent_mujoco.mujoco_multi import MultiAgentMujocoEnv


def parallel_env(scenario="HalfCheetah", agent_conf="2x3", max_cycles=1000, **options):
    return MultiAgentMujocoEnv(scenario, agent_conf, max_episode_steps=max_cycles, **options)
