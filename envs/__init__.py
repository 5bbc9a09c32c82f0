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

    The bimatrix games and traffic are discrete whatever `continuous_actions` says; elsewhere it chooses.

    `zoo:package.module` wraps the `parallel_env` of that module (any PettingZoo parallel environment); there `fields`
    go to its constructor, except `horizon` and `cooperators`, which are `envs.zoo.from_parallel_env`'s.
    """
    modules = [importlib.import_module(f"envs.{name}") for name in ("particle", "bimatrix", "traffic")]
    for module in modules:
        if env_id in module.TASKS:
            return module.make(env_id, num_envs, device, dtype, num_agents, continuous_actions, **fields)
    if env_id.startswith("zoo:"):
        zoo = importlib.import_module("envs.zoo")  # only here: PettingZoo is needed for nothing else
        return zoo.make(env_id, num_envs, device, dtype, num_agents, continuous_actions, **fields)
    tasks = ", ".join(task for module in modules for task in module.TASKS)
    raise ValueError(f"env_id must be one of {tasks} or zoo:package.module, got {env_id!r}")
