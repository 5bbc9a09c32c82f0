"""Batched multi-agent environments: `envs.make(env_id, num_envs)` describes one; `reset` and `step` are functions."""

import importlib
import time
from collections.abc import Callable

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

    The bimatrix games, traffic and the economy are discrete, the drones continuous whatever `continuous_actions` says;
    elsewhere it chooses.

    `zoo:package.module` wraps the `parallel_env` of that module (any PettingZoo parallel environment); there `fields`
    go to its constructor, except `horizon` and `cooperators`, which are `envs.zoo.from_parallel_env`'s.
    """
    tasks = []
    for name in ("particle", "bimatrix", "traffic", "drones", "economy"):
        module = importlib.import_module(f"envs.{name}")
        if env_id in module.TASKS:
            return module.make(env_id, num_envs, device, dtype, num_agents, continuous_actions, **fields)
        tasks += module.TASKS
    if env_id.startswith("zoo:"):
        zoo = importlib.import_module("envs.zoo")  # only here: PettingZoo is needed for nothing else
        return zoo.make(env_id, num_envs, device, dtype, num_agents, continuous_actions, **fields)
    raise ValueError(f"env_id must be one of {', '.join(tasks)} or zoo:package.module, got {env_id!r}")


def measure(step: Callable, env, actions: list[torch.Tensor], seconds: float) -> float:
    """Environment steps per second with `actions` by turns, resets included."""
    generator = torch.Generator().manual_seed(0)
    state, _ = env.reset([generator])
    for action in actions:  # warm up and compile
        state, *_ = step(state, action, None)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        state, _ = env.reset([generator])
        for t in range(env.horizon):
            state, _, reward, *_ = step(state, actions[t % len(actions)], None)
        reward.sum().item()  # wait for the device
        steps += env.horizon * env.num_envs
    return steps / (time.perf_counter() - start)


def print_speed(env, actions: list[torch.Tensor], seconds: float, compile: bool) -> None:
    """What `measure` finds, of the step as it is and compiled."""
    print(f"eager    {measure(env.step, env, actions, seconds):12,.0f} env steps/s", flush=True)
    if compile:
        step = torch.compile(env.step, fullgraph=True)
        print(f"compiled {measure(step, env, actions, seconds):12,.0f} env steps/s")
