"""Perturbations for robustness evaluation of any environment: pure functions of (env, tensors, strength, generators).

They act on cooperating agents only (`env.cooperators`) and on live entries only (`env.obs_mask`, `env.action_sizes`).
The numbers of block k of the environments come from generator k alone, so that a seed's evaluation does not depend on
the seeds beside it. At strength 0 the input comes back unchanged, nothing is drawn. Changed dynamics need no function
here: they are fields of the env.

Axes: B environments, N agents, O observation entries, A action entries.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from envs import by_agent, legal_actions, per_seed, std_mean


def draw(
    sampler: Callable, shape: tuple[int, ...], generators: list[torch.Generator], like: Tensor | None = None
) -> Tensor:
    """torch.rand or torch.randn over [B, ...], block k from generator k, in the dtype and on the device of `like`."""
    size, rest = shape[0], shape[1:]
    if size % len(generators):
        raise ValueError(f"the {size} environments must be a multiple of the {len(generators)} generators")
    block = (size // len(generators), *rest)
    if like is not None:
        sampler = partial(sampler, dtype=like.dtype)
    numbers = per_seed(sampler, block, generators).flatten(0, 1)
    return numbers if like is None else numbers.to(like.device)


def length(x: Tensor, norm: str) -> Tensor:
    """[..., 1] the l2 or linf norm over the last axis."""
    return torch.linalg.vector_norm(x, math.inf if norm == "linf" else 2, dim=-1, keepdim=True)


def reach(epsilon: float, live: Tensor, norm: str) -> float | Tensor:
    """The l2 length of the longest perturbation in a ball, of which `live` [..., O] entries are 1 and the others 0."""
    return epsilon * live.sum(-1, keepdim=True).sqrt() if norm == "linf" else epsilon


def steepest(slope: Tensor, size: float, norm: str) -> Tensor:
    """The step of an attack along `slope` whose `norm` is `size`: in l2 along the gradient, in linf along its sign."""
    return size * slope.sign() if norm == "linf" else rescale(slope, size, "l2")


def mean_length(live: Tensor) -> Tensor:
    """[..., 1] the mean l2 length of standard normal vectors with entries where `live` [..., O] is 1."""
    half = live.sum(-1, keepdim=True) / 2
    log_ratio = torch.lgamma(half + 0.5) - torch.lgamma(half)
    return math.sqrt(2) * log_ratio.exp()


def rescale(direction: Tensor, new_length: float, norm: str) -> Tensor:
    return direction * (new_length / length(direction, norm).clamp_min(1e-12))


def project(delta: Tensor, epsilon: float, norm: str) -> Tensor:
    """Nearest point of the ball ||delta|| <= epsilon over the last axis."""
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    return delta * (epsilon / length(delta, "l2").clamp_min(epsilon))


def observation_noise(env, obs: Tensor, kind: str, strength: float, generators: list[torch.Generator]) -> Tensor:
    """obs [B, N, O] plus noise: "gaussian", standard deviation `strength`, or "uniform" on [-strength, strength]."""
    if kind not in ("gaussian", "uniform"):
        raise ValueError(f"kind must be gaussian or uniform, got {kind!r}")
    if not strength >= 0:
        raise ValueError(f"strength must be 0 or more, got {strength}")
    if strength == 0:
        return obs
    if kind == "gaussian":
        noise = draw(torch.randn, obs.shape, generators, obs)
    else:
        noise = 2 * draw(torch.rand, obs.shape, generators, obs) - 1
    return obs + strength * noise * (env.obs_mask & env.cooperators[:, None])


def random_actions(env, generators: list[torch.Generator], obs: Tensor | None = None) -> Tensor:
    """Uniform over the action space: [B, N] int64 if discrete, else [B, N, A] with zeros in the padding. Where the
    environment has action masks, over what obs [B, N, O] says is legal."""
    sizes = torch.tensor(env.action_sizes, device=env.device)
    if getattr(env, "masked", False):
        legal = legal_actions(obs.unsqueeze(2), env).squeeze(2)
        uniform = draw(torch.rand, legal.shape, generators, obs)
        return torch.where(legal, uniform, -1).argmax(-1)
    if env.discrete:
        # float64, so that the product stays below the number of actions
        like = torch.empty(0, dtype=torch.float64, device=env.device)
        uniform = draw(torch.rand, (env.num_envs, env.num_agents), generators, like)
        return (uniform * sizes).long()
    width = max(env.action_sizes)
    like = torch.empty(0, dtype=env.dtype, device=env.device)
    uniform = draw(torch.rand, (env.num_envs, env.num_agents, width), generators, like)
    live = torch.arange(width, device=env.device) < sizes[:, None]  # [N, A]
    return (env.action_low + (env.action_high - env.action_low) * uniform) * live


def replace_actions(
    env, action: Tensor, replacement: Tensor, probability: float, generators: list[torch.Generator]
) -> Tensor:
    """With `probability` in each environment, one cooperating agent, chosen uniformly, plays its `replacement`."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be between 0 and 1, got {probability}")
    if probability == 0:
        return action
    uniform = draw(torch.rand, (len(action), env.num_agents + 1), generators).to(action.device)
    scores = uniform[:, 1:].masked_fill(~env.cooperators, -1.0)
    chosen = scores.argmax(1)  # the largest of independent uniform numbers is a uniform choice
    is_chosen = torch.arange(env.num_agents, device=action.device) == chosen[:, None]
    hit = is_chosen & (uniform[:, :1] < probability)
    if action.ndim == 3:
        hit = hit.unsqueeze(2)
    return torch.where(hit, replacement, action)


@torch.no_grad()
def observation_moments(step_env: Callable, env, generators: list[torch.Generator], period: int = 1) -> Tensor:
    """[S, N, 2, O] mean and standard deviation of each entry of the observations in an episode of random actions, of
    which all but every `period`-th are 0. An entry that does not vary has 0. Action masks, which are seen as they are,
    have 0 and 1; in wrapped environments an entry that did not vary, but may once agents can do more, has 1."""
    S = len(generators)
    state, obs = env.reset(generators)
    seen, live = [], []
    for t in range(env.horizon):
        seen.append(by_agent(obs, S))
        action = random_actions(env, generators, obs)
        state, obs, *_, info = step_env(state, action * (t % period == 0), env.draw(generators))
        if "live" in info:
            live.append(by_agent(info["live"].unsqueeze(2), S).double())
    std, mean = std_mean(torch.cat(seen, 2).double(), 2, torch.cat(live, 2) if live else None)
    std = torch.where(std > 1e-6 * mean.abs(), std, 0)  # only rounding varies elsewhere
    is_wrapped = hasattr(env, "masked")
    if is_wrapped:
        std = torch.where((std == 0) & env.obs_mask[:, None], 1, std)
    moments = torch.cat([mean, std], 2)
    if is_wrapped and env.masked:
        moments[..., -env.action_mask.shape[1] :] = torch.tensor([[0.0], [1.0]], device=obs.device)
    return moments
