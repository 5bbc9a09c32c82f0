"""Batched multi-agent environments: `envs.make(env_id, num_envs)` describes one; `reset` and `step` are functions."""

import importlib

import torch


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_agents: int | None = None,
    continuous_actions: bool = True,
    **fields,
):
    """Build the environment `env_id`; `fields` set its physical constants by name (for example damping=0.5).

    `zoo:package.module` wraps the `parallel_env` of that module (any PettingZoo parallel environment); there `fields`
    go to its constructor, except `horizon` and `cooperators`, which are `envs.zoo.from_parallel_env`'s.
    """
    particle = importlib.import_module("envs.particle")
    if env_id in particle.TASKS:
        return particle.make(env_id, num_envs, device, dtype, num_agents, continuous_actions, **fields)
    if env_id.startswith("zoo:"):
        zoo = importlib.import_module("envs.zoo")  # only here: PettingZoo is needed for nothing else
        return zoo.make(env_id, num_envs, device, dtype, num_agents, continuous_actions, **fields)
    raise ValueError(f"env_id must be one of {', '.join(particle.TASKS)} or zoo:package.module, got {env_id!r}")
