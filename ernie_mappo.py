"""ERNIE-MAPPO: multi-agent PPO whose policies are kept smooth by an adversarial regulariser.

MAPPO (Yu et al. 2022, arXiv 2103.01955) trains a stochastic policy per agent on its own observation with PPO's clipped
objective (Schulman et al. 2017, arXiv 1707.06347); advantages come from a central value function that sees everybody's
observations and is trained on normalised returns. ERNIE (Bukharin et al. 2023, arXiv 2310.10810; appendix D.1) adds the
largest KL divergence of each policy under a small perturbation of its observation (Eq. 4, 5), found by K steps of
projected gradient ascent through which the gradient of the policy flows (Eq. 6, the Stackelberg game).

    python ernie_mappo.py --epsilon 0.1                                     # two quadcopters, minutes on two CPU cores
    python ernie_mappo.py --env-id leader_follower_v1 --num-agents 4        # three followers, in three dimensions
    python ernie_mappo.py --env-id simple_spread_v3 --no-continuous-actions --num-seeds 5 --share-parameters

Differences to the paper, by their number in the README: 1 l2 ball, 5 on the on-policy batch, 7 projection after every
step, 8 random start, 36 mean instead of sum, 39 Gaussian noise of mean length epsilon. Appendix D.1 gives neither
settings nor figures: task and hyper-parameters are ours.

Axes: S seeds, N agents, B environments of a seed, T steps of an episode, M = B * T samples or those of a minibatch, O
observation, A action; in evaluation E episodes. Continuous policies are normal, their output z is [..., 2 A]: mean and
log standard deviation side by side.
"""

import contextlib
import csv
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from torch import Tensor
from tqdm import tqdm

import envs
from envs import bullet, drones, particle, perturb

Generators = list[torch.Generator]  # one per seed
Batch = dict[str, Tensor]  # episodes, a minibatch, or metrics [S]
RANK = int(os.environ.get("RANK", "0"))  # of this process under torchrun
CHECKPOINT = "checkpoint.pt" if RANK == 0 else f"checkpoint_rank{RANK}.pt"


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of this experiment"""
    seed: int = 1
    """seed of the first run; run k uses seed + k"""
    num_seeds: int = 1
    """S, independent runs trained side by side (paper: five)"""
    torch_deterministic: bool = True
    """deterministic algorithms only: same seed, same machine, same numbers"""
    cuda: bool = True
    """use the GPU if there is one"""
    num_threads: int = 1
    """CPU threads; with more than one set OMP_WAIT_POLICY=PASSIVE, or one busy core stalls all of them"""
    compile: bool = False
    """compile the environment step and, on a GPU or without regulariser, the loss (torch.compile)"""
    runs_dir: str = "runs"
    """folder that receives a folder per run"""
    resume: str | None = None
    """run folder or checkpoint file to continue; all other flags are read from it"""
    evaluate: str | None = None
    """run folder or checkpoint file whose policies are evaluated again, without training"""
    backend: Literal["torch", "pybullet"] = "torch"
    """with --evaluate: the batched quadcopters or Bullet (requirements-pybullet.txt), a world per environment"""
    capture_video: bool = True
    """write a GIF of an episode of the trained policies"""
    track: bool = True
    """log to Weights & Biases, one run per seed"""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no account; `wandb sync` uploads later"""
    wandb_project_name: str = "robust-marl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team"""

    env_id: str = "leader_follower_v0"
    """leader_follower_v0, leader_follower_v1, hover_v0, a particle task, or zoo:package.module (PettingZoo)"""
    num_agents: int | None = None
    """N where the task allows a choice (drones, simple_spread_v3); default: the task's own"""
    continuous_actions: bool = True
    """particle tasks: continuous actions, or discrete ones; drones have continuous ones"""
    total_timesteps: int = 1_000_000
    """environment steps of one seed"""
    num_envs: int = 64
    """B, environments of one seed that step together"""
    share_parameters: bool = False
    """one policy for all agents, opponents too, which is told the agent's number, instead of one each"""
    state_dependent_std: bool = False
    """continuous actions: a standard deviation for each observation instead of one per action"""
    init_std: float = 0.5
    """continuous actions: first standard deviation, in half-widths of the action range"""
    hidden_size: int = 64
    """width of the two hidden layers"""
    activation: Literal["relu", "silu", "tanh"] = "tanh"
    """hidden activation"""
    learning_rate: float = 2e-3
    """Adam step size"""
    anneal_lr: bool = True
    """let the step size fall linearly to 0"""
    gamma: float = 0.95
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    update_epochs: int = 10
    """passes over the episodes of an iteration"""
    num_minibatches: int = 8
    """minibatches of a pass"""
    clip_coef: float = 0.2
    """PPO's clipping of the probability ratio"""
    clip_vloss: bool = True
    """clip the change of the values too"""
    entropy_coef: float = 0.0
    """weight of the policies' entropy"""
    normalize_advantage: bool = True
    """subtract the mean of the advantages of an iteration and divide by their standard deviation, per seed and agent"""
    value_decay: float = 0.9
    """weight of the past in the running moments by which returns are normalised, per seed and agent"""
    reward_scale: float = 1.0
    """factor on the rewards that are learnt from"""
    team_reward: Literal["own", "mean", "sum"] = "own"
    """what an agent learns from: its own reward, or the mean or the sum of its team's"""
    max_grad_norm: float = 0.5
    """the gradient of each network of each seed is clipped to this norm"""

    regularizer: Literal["none", "gaussian", "random", "adversarial", "stackelberg"] = "stackelberg"
    """none: MAPPO; gaussian: appendix H; random: a direction of length epsilon; adversarial: Eq. 4; stackelberg: 6"""
    epsilon: float = 0.3
    """radius of the perturbation ball"""
    epsilon_units: Literal["raw", "std"] = "std"
    """unit of epsilon: the observation's own, or each entry's standard deviation under random play"""
    norm: Literal["l2", "linf"] = "l2"
    """norm of the ball"""
    attack_steps: int = 3
    """K, ascent steps; 0 is the baseline"""
    attack_lr: float | None = None
    """eta, length of an l2-normalised ascent step in units of epsilon; default: 1 if K = 1, else 2.5 / K"""
    attack_init: float = 0.5
    """length of the random start in units of epsilon (at 0 the divergence has no gradient)"""
    reg_coef: float = 0.1
    """lambda, weight of the regulariser"""
    reg_batch_size: int = 256
    """samples of a minibatch on which the regulariser is estimated"""
    divergence: Literal["auto", "kl", "kl_normal", "l2", "l2_probs"] = "auto"
    """D: KL of the policies (auto; kl_normal with continuous actions), squared l2 of outputs or of probabilities"""
    detach_reference: bool = False
    """treat the clean policy in D as a constant"""
    detach_std: bool = True
    """treat the standard deviation in D as a constant: else a larger one is the easiest way to a small KL"""
    gaussian_std: float | None = None
    """standard deviation of the gaussian mode; default: mean length epsilon (the paper's text: 1)"""

    log_interval: int = 50_000
    """environment steps between two rows of metrics.csv"""
    checkpoint_interval: int = 200_000
    """environment steps between two checkpoints"""
    eval_episodes: int | None = None
    """episodes of one seed at each point of the robustness report; default: 200 of drones, 1,000 of a particle task"""

    def __post_init__(self):
        divergences = ("auto", "kl_normal", "l2") if self.continuous_actions else ("auto", "kl", "l2", "l2_probs")
        floats = " ".join(name for name, value in asdict(self).items() if isinstance(value, float))
        counts = "num_seeds num_threads num_agents total_timesteps num_envs hidden_size update_epochs num_minibatches"
        for names, holds, rule in (
            (floats, math.isfinite, "a finite number"),
            (counts, lambda v: v >= 1, "at least 1"),
            ("reg_batch_size log_interval checkpoint_interval eval_episodes", lambda v: v >= 1, "at least 1"),
            ("init_std", lambda v: 0.01 <= v <= 7, "between 0.01 and 7"),
            ("learning_rate clip_coef reward_scale max_grad_norm", lambda v: v > 0, "above 0"),
            ("attack_lr gaussian_std", lambda v: v > 0, "above 0"),
            ("seed entropy_coef epsilon attack_steps reg_coef", lambda v: v >= 0, "0 or more"),
            ("gamma gae_lambda", lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("value_decay", lambda v: 0 <= v < 1, "at least 0 and below 1"),
            ("attack_init", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("continuous_actions", lambda v: v or not self.is_drones, "left out with drones"),
            ("divergence", lambda v: v in divergences, f"one of {', '.join(divergences)} with these actions"),
            ("backend", lambda v: v == "torch" or (self.evaluate and self.is_drones), "torch but to evaluate drones"),
            ("resume", lambda v: not self.evaluate, "left out with --evaluate"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {value!r}")
        if self.divergence == "auto":
            self.divergence = "kl_normal" if self.continuous_actions else "kl"
        if self.attack_lr is None:
            self.attack_lr = 1.0 if self.attack_steps <= 1 else 2.5 / self.attack_steps
        if self.eval_episodes is None:
            self.eval_episodes = 200 if self.is_drones else 1000

    @property
    def is_drones(self) -> bool:
        return self.env_id in drones.TASKS

    @property
    def regularized(self) -> bool:
        """Whether the regulariser does anything: with K, epsilon or lambda at 0 this is MAPPO, at its speed."""
        idle = self.regularizer in ("adversarial", "stackelberg") and self.attack_steps == 0
        return self.regularizer != "none" and self.reg_coef * self.epsilon > 0 and not idle


# --------------------------------------------------------------------------------------------------------------------
# Networks: the MLPs of all agents and seeds are one batched MLP

ACTIVATIONS = {"relu": torch.relu_, "silu": F.silu, "tanh": torch.tanh_}  # in place where the output gives the slope


def make_generators(seed: int, num_seeds: int, purpose: str, device: torch.device, rank: int = 0) -> Generators:
    """A random stream per seed and purpose, so that no run depends on how many others train beside it."""
    entropy = [[seed + k, rank, *purpose.encode()] for k in range(num_seeds)]
    states = [int(np.random.SeedSequence(e).generate_state(1, np.uint64)[0] >> 1) for e in entropy]
    return [torch.Generator(device).manual_seed(state) for state in states]


def draw(kind: Callable, shape: tuple[int, ...], generators: Generators) -> Tensor:
    """torch.rand, torch.randn or gumbel of `shape` from each seed's generator: [S, *shape]."""
    return torch.stack([kind(shape, generator=g, device=g.device) for g in generators])


@dataclass
class MLP:
    """S*N networks in one tensor: `flat` [S*N, K] has the weights and biases of a network in a row, K a multiple of 16,
    so that vectorised elementwise operations round every seed alike."""

    flat: Tensor
    sizes: list[int]

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """(weight [S*N, out, in], bias [S*N, out, 1]) of each layer, views of `flat`."""
        shapes = [shape for n_in, n_out in zip(self.sizes, self.sizes[1:]) for shape in ((n_out, n_in), (n_out, 1))]
        counts = [n_out * columns for n_out, columns in shapes]
        parts = self.flat.split([*counts, self.flat.shape[1] - sum(counts)], 1)
        views = [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]
        return list(zip(views[::2], views[1::2]))


Nets = dict[str, MLP]  # actor, critic


def orthogonal_mlp(sizes: list[int], num_agents: int, last_gain: float, generators: Generators) -> MLP:
    """Orthogonal weights of gain sqrt(2), in the last layer `last_gain`; biases 0."""
    used = sum((n_in + 1) * n_out for n_in, n_out in zip(sizes, sizes[1:]))
    flat = torch.zeros(len(generators) * num_agents, used + -used % 16, device=generators[0].device)
    layers = MLP(flat, sizes).layers()
    for k, (weight, _) in enumerate(layers):
        _, rows, columns = weight.shape
        longer, shorter = max(rows, columns), min(rows, columns)
        q, r = torch.linalg.qr(draw(torch.randn, (num_agents, longer, shorter), generators).flatten(0, 1))
        q = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)  # uniform over orthogonal matrices
        weight += (q if rows >= columns else q.mT) * (last_gain if k == len(layers) - 1 else math.sqrt(2))
    return MLP(flat.requires_grad_(), sizes)


def forward(layers: list[tuple[Tensor, Tensor]], x: Tensor, activation: str) -> Tensor:
    """x [S, N, M, in] -> [S, N, M, out]: network (s, n) on its own rows. Samples are last in memory, [S*N, out, M]: a
    matrix product with few outputs is several times faster so."""
    S, N = x.shape[:2]
    x = x.flatten(0, 1).mT.contiguous()
    for k, (weight, bias) in enumerate(layers):
        x = torch.baddbmm(bias, weight, x)
        if k < len(layers) - 1:
            x = ACTIVATIONS[activation](x)
    return x.mT.unflatten(0, (S, N))


def normalize(obs: Tensor, norm: Tensor) -> Tensor:
    """obs [S, N, M, O] in standard deviations from the mean, norm [S, N, 2, O], cut to +-10. Entries that did not vary
    (the number of the light) are 0: to a network of its own they say nothing."""
    mean, std = norm[:, :, None].unbind(3)
    return torch.where(std > 0, (obs - mean) / std, 0).clamp(-10, 10)


def average_ranks(*tensors: Tensor) -> list[Tensor]:
    """Means over the ranks of torchrun that train the same seeds, all in one message."""
    if not dist.is_initialized():
        return list(tensors)
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors)]


def measure_norm(replay: Batch, filled: int) -> Tensor:
    """Mean and standard deviation [S, N, 2, O] of the observations of the first `filled` rollouts."""
    obs = replay["obs"][:, :filled, :-1]  # [S, E, T, N, O]
    moments = torch.stack([obs.double().mean((1, 2)), obs.double().square().mean((1, 2))], 2)
    (moments,) = average_ranks(moments)
    mean, square = moments.unbind(2)
    variance = square - mean.square()
    std = torch.where(variance > 1e-12 * square, variance, 0).sqrt()  # 0 where only rounding varies
    return torch.stack([mean, std], 2).to(obs.dtype)


def policies(actor: MLP, obs: Tensor, env, args: Args) -> Tensor:
    """Output z of the policies at normalised obs [S, N, M, O]: logits [S, N, M, A], -1e9 in padding, or mean and log
    standard deviation [S, N, M, 2 A], 0 in padding."""
    S, N, M = obs.shape[:3]
    layers = actor.layers()
    if args.share_parameters:
        number = torch.eye(N, dtype=obs.dtype, device=obs.device)[:, None].expand(S, N, M, N)
        obs = torch.cat([obs, number], -1).flatten(1, 2).unsqueeze(1)
    if not (env.discrete or args.state_dependent_std):  # the log standard deviation is the bias
        weight, bias = layers[-1]
        mean_rows = weight[:, : weight.shape[1] // 2]
        layers[-1] = (torch.cat([mean_rows, torch.zeros_like(mean_rows)], 1), bias)
    z = forward(layers, obs, args.activation).view(S, N, M, -1)
    if env.discrete:
        return torch.where(env.action_mask[:, None], z, -1e9)
    mean, log_std = z.chunk(2, -1)
    return torch.cat([mean, log_std.clamp(-5, 2)], -1) * env.action_mask.repeat(1, 2)[:, None]


def hold_std(z: Tensor, env, args: Args) -> Tensor:
    """Policies z as the regulariser sees them: with --detach-std only their means can adapt to it."""
    if env.discrete or not args.detach_std:
        return z
    mean, log_std = z.chunk(2, -1)
    return torch.cat([mean, log_std.detach()], -1)


def regularized_policies(actor: MLP, obs: Tensor, env, args: Args) -> Tensor:
    return hold_std(policies(actor, obs, env, args), env, args)


def logprob_and_entropy(z: Tensor, action: Tensor, env) -> tuple[Tensor, Tensor]:
    """log pi(action) and entropy [S, N, M] of policies z at one-hot actions, or normal ones before they are clipped to
    the action range, [S, N, M, A]."""
    if env.discrete:
        logp = F.log_softmax(z, -1)
        return (logp * action).sum(-1), -(logp.exp() * logp).sum(-1)
    mean, log_std = z.chunk(2, -1)
    logp = -0.5 * ((action - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    live = env.action_mask[:, None]
    return (logp * live).sum(-1), ((log_std + 0.5 * math.log(2 * math.pi * math.e)) * live).sum(-1)


def gumbel(shape: tuple[int, ...], **where) -> Tensor:
    """Standard Gumbel noise."""
    return -torch.log(-torch.log(torch.rand(shape, **where).clamp(1e-10, 1 - 1e-7)))


def choose(z: Tensor, noise: Tensor | None, env) -> Tensor:
    """Actions [S, N, M, A] of policies z: samples by noise, Gumbel or normal, or without it the likeliest."""
    if env.discrete:
        return F.one_hot((z if noise is None else z + noise).argmax(-1), z.shape[-1]).to(z.dtype)
    mean, log_std = z.chunk(2, -1)
    return mean if noise is None else (mean + log_std.exp() * noise) * env.action_mask[:, None]


def to_step(action: Tensor, env) -> Tensor:
    """Actions of `choose` as env.step takes them, [S * B, N, A] or [S * B, N]: [-1, 1] becomes the action range."""
    action = action.transpose(1, 2).flatten(0, 1)
    if env.discrete:
        return action.argmax(-1)
    center, half = (env.action_high + env.action_low) / 2, (env.action_high - env.action_low) / 2
    return (center + half * action.clamp(-1, 1)) * env.action_mask


# --------------------------------------------------------------------------------------------------------------------
# ALGO LOGIC: the adversarial regulariser, ERNIE Eq. (4) and (6)


def project(delta: Tensor, epsilon: float, norm: str) -> Tensor:
    """Nearest point of the ball ||delta|| <= epsilon over the last axis."""
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    return delta * (epsilon / torch.linalg.vector_norm(delta, dim=-1, keepdim=True).clamp_min(epsilon))


def rescale(direction: Tensor, length: float | Tensor, norm: str) -> Tensor:
    """`direction` stretched to `length` over the last axis."""
    order = math.inf if norm == "linf" else 2
    return direction * (length / torch.linalg.vector_norm(direction, order, dim=-1, keepdim=True).clamp_min(1e-12))


def unroll(objective: Callable, delta: Tensor, steps: int, size: float, ball: Callable, stackelberg: bool) -> Tensor:
    """delta^K of Eq. (6): ascent steps of l2 length `size` on objective(delta), a value per sample, each projected.
    With `stackelberg` the result is a function of all that `objective` depends on; without, it is a constant (Eq. 4).
    torch.func.grad, because autograd.grad(create_graph=True) silently loses the interaction inside torch.compile;
    contiguous, because on CPUs torch.compile (2.13) gets the gradient of a norm over an axis that is strided wrong.
    """
    with torch.set_grad_enabled(stackelberg):
        for _ in range(steps):
            slope = torch.func.grad(lambda d: objective(d).sum())(delta).contiguous()
            length = torch.linalg.vector_norm(slope, dim=-1, keepdim=True).clamp_min(1e-8)
            delta = ball(delta + size * slope / length)
    return delta


def divergence(kind: str, z: Tensor, clean: Tensor) -> Tensor:
    """D [...] of policy outputs [..., A]: KL(z || clean) of softmax policies or, with mean and log standard deviation
    side by side, of normal ones; or squared l2 before tanh, after it, or of probabilities."""
    if kind == "kl":
        logp, logp_clean = F.log_softmax(z, -1), F.log_softmax(clean, -1)
        return (logp.exp() * (logp - logp_clean)).sum(-1)
    if kind == "kl_normal":
        (mean, log_std), (mean_clean, log_std_clean) = z.chunk(2, -1), clean.chunk(2, -1)
        apart = (mean - mean_clean) * torch.exp(-log_std_clean)
        ratio = 2 * (log_std - log_std_clean)  # logarithm of the ratio of variances
        return 0.5 * (ratio.exp() - 1 - ratio + apart.square()).sum(-1)
    link = {"l2": lambda x: x, "l2_squashed": torch.tanh, "l2_probs": partial(F.softmax, dim=-1)}[kind]
    return (link(z) - link(clean)).square().sum(-1)


def regularizer(mode: str, network: Callable, obs: Tensor, z: Tensor, noise: Tensor, scale: Tensor, args):
    """R [S, N, M] of each agent at each observation and its perturbation delta [S, N, M, O] in units of `scale`, which
    broadcasts to obs and is 0 where nothing is perturbed. obs, noise (standard normal) [S, N, M, O]; z [S, N, M, A] is
    network(obs), shared with the loss.
    """
    live = (scale > 0).to(obs.dtype)
    clean = z.detach() if args.detach_reference else z
    noise = noise * live

    def change(delta: Tensor) -> Tensor:
        return divergence(args.divergence, network(obs + scale * delta), clean)

    if mode == "gaussian":  # appendix H; std so that E||delta|| = epsilon
        half = live.sum(-1, keepdim=True) / 2
        mean_length = math.sqrt(2) * (torch.lgamma(half + 0.5) - torch.lgamma(half)).exp()
        delta = noise * (args.gaussian_std or args.epsilon / mean_length)
    elif mode == "random":
        delta = rescale(noise, args.epsilon, args.norm)
    else:
        start = rescale(noise, args.attack_init * args.epsilon, args.norm)
        ball = partial(project, epsilon=args.epsilon, norm=args.norm)
        delta = unroll(change, start, args.attack_steps, args.attack_lr * args.epsilon, ball, mode == "stackelberg")
    return change(delta), delta


def diagnose(net: MLP, network: Callable, obs: Tensor, noise: Tensor, scale: Tensor, team: Tensor, args: Args) -> Batch:
    """R under attack and in a random direction, the length of the attack's delta, the share of deltas on the sphere,
    and the leader-follower term of the Stackelberg gradient with respect to `net`, which `network` evaluates: its norm
    relative to the leader's, and their cosine. Over the agents of `team` [N]."""
    obs, gradients = obs[:, :, : noise.shape[2]], []
    z = network(obs)
    for mode in ("adversarial", "stackelberg"):
        change, delta = regularizer(mode, network, obs, z, noise, scale, args)
        (grad,) = torch.autograd.grad((change.mean(2) * team).sum(), [net.flat], retain_graph=True)
        gradients.append(grad.view(len(obs), -1))
    leader, follower = gradients[0], gradients[1] - gradients[0]
    length = torch.linalg.vector_norm(delta[:, team], math.inf if args.norm == "linf" else 2, dim=-1).detach()
    change_at_random, _ = regularizer("random", network, obs, z, noise, scale, args)
    return {
        "ernie/attack": change[:, team].mean((1, 2)),
        "ernie/random_direction": change_at_random[:, team].mean((1, 2)),
        "ernie/perturbation_norm": length.mean((1, 2)),
        "ernie/saturation": (length >= 0.999 * args.epsilon).to(obs.dtype).mean((1, 2)),
        "ernie/interaction_ratio": follower.norm(dim=1) / leader.norm(dim=1),
        "ernie/interaction_cosine": F.cosine_similarity(follower, leader, dim=1),
    }


# --------------------------------------------------------------------------------------------------------------------
# Losses and update. Samples come first in memory, [S, M, N, ...], so that a minibatch is a choice of rows.


def perturbation_unit(norm: Tensor, args: Args) -> Tensor:
    """One unit of delta in each entry of a normalised observation [S, N, 1, O], 0 where it does not vary."""
    std = norm[:, :, 1:]
    return (std > 0).to(std.dtype) if args.epsilon_units == "std" else torch.where(std > 0, 1 / std, 0)


def shared_rewards(rewards: Tensor, env, args: Args) -> Tensor:
    """What each agent learns from, [..., N]: its team's mean or sum, or its own reward."""
    if args.team_reward == "own":
        return args.reward_scale * rewards
    team = (env.cooperators[:, None] == env.cooperators).to(rewards.dtype)  # [N, N]
    return args.reward_scale * rewards @ (team if args.team_reward == "sum" else team / team.sum(0))


def central_values(critic: MLP, obs: Tensor, args: Args) -> Tensor:
    """V_i(s) of every agent in normalised units, [S, M, N], from everybody's obs [S, M, N, O]."""
    return forward(critic.layers(), obs.flatten(2).unsqueeze(1), args.activation).squeeze(1)


def gae(rewards: Tensor, values: Tensor, terminated: Tensor, args: Args) -> Tensor:
    """Generalised advantage estimates [S, B, T, N] (Schulman et al. 2016): rewards [S, B, T, N], values [S, B, T + 1,
    N], terminated [S, B, T]. After the last step the return goes on with its value: the time limit is not an end."""
    advantage, advantages = torch.zeros_like(rewards[:, :, 0]), []
    for t in reversed(range(rewards.shape[2])):
        goes_on = args.gamma * (1 - terminated[:, :, t, None])
        delta = rewards[:, :, t] + goes_on * values[:, :, t + 1] - values[:, :, t]
        advantage = delta + goes_on * args.gae_lambda * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1], 2)


def mean_and_square(x: Tensor) -> Tensor:
    """Mean and mean square [2, S, 1, N], in float64, of x [S, M, N] over the samples of all ranks."""
    moments = torch.stack([x.double().mean(1, keepdim=True), x.double().square().mean(1, keepdim=True)])
    return average_ranks(moments)[0]


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[S, 1, N] each, the standard deviation at least 0.01."""
    mean, square = moments
    return mean.float(), (square - mean.square()).clamp_min(1e-4).sqrt().float()


def prepare_episodes(nets: Nets, replay: Batch, norm: Tensor, value_norm: Tensor, env, args: Args):
    """Episodes as a batch of samples for ppo_loss, [S, M, N, ...] each, and the new moments of returns `value_norm` [3,
    S, 1, N]: decaying sums of mean, mean square and weight, of which the last makes up for the start at 0."""
    S, B, T = replay["terminated"].shape
    obs = normalize(replay["obs"].flatten(1, 2).transpose(1, 2), norm).transpose(1, 2)  # [S, B * (T + 1), N, O]
    rewards = shared_rewards(replay["rewards"], env, args)
    with torch.no_grad():
        values = central_values(nets["critic"], obs, args).unflatten(1, (B, T + 1))
        mean, std = (x.unsqueeze(2) for x in mean_and_std(value_norm[:2] / value_norm[2].clamp_min(1e-8)))
        advantages = gae(rewards, mean + std * values, replay["terminated"], args)
        returns = (advantages + (mean + std * values)[:, :, :-1]).flatten(1, 2)
        obs, values = (x.unflatten(1, (B, T + 1))[:, :, :-1].flatten(1, 2) for x in (obs, values.flatten(1, 2)))
        advantages, actions = advantages.flatten(1, 2), replay["actions"].flatten(1, 2)
        newest = torch.cat([mean_and_square(returns), torch.ones_like(value_norm[2:])])
        value_norm = args.value_decay * value_norm + (1 - args.value_decay) * newest
        mean, std = mean_and_std(value_norm[:2] / value_norm[2])
        if args.normalize_advantage:
            center, spread = mean_and_std(mean_and_square(advantages))
            advantages = (advantages - center) / spread
        z = policies(nets["actor"], obs.transpose(1, 2), env, args)
        logprobs, _ = logprob_and_entropy(z, actions.transpose(1, 2), env)
    batch = {"obs": obs, "actions": actions, "logprobs": logprobs.mT, "advantages": advantages}
    return batch | {"values": values, "returns": (returns - mean) / std}, value_norm


def ppo_loss(nets: Nets, batch: Batch, noise: Tensor | None, unit: Tensor, env, args: Args):
    """ALGO LOGIC: PPO's clipped objective for every policy, minus the entropy bonus, plus lambda R (Eq. 5) of the
    cooperating agents, plus the clipped squared error of the values: loss, metrics."""
    obs, advantages = batch["obs"].transpose(1, 2), batch["advantages"].mT
    z = policies(nets["actor"], obs, env, args)
    logprobs, entropy = logprob_and_entropy(z, batch["actions"].transpose(1, 2), env)
    log_ratio = logprobs - batch["logprobs"].mT  # [S, N, M]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean(2)  # [S, N]
    values = central_values(nets["critic"], batch["obs"], args)
    value_loss = (values - batch["returns"]).square()
    if args.clip_vloss:
        near = batch["values"] + (values - batch["values"]).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.maximum(value_loss, (near - batch["returns"]).square())
    value_loss = 0.5 * value_loss.mean((1, 2))
    loss = (policy_loss - args.entropy_coef * entropy.mean(2)).sum(1) + value_loss
    with torch.no_grad():
        metrics = {"losses/policy_loss": policy_loss.mean(1), "losses/value_loss": value_loss}
        metrics |= {"losses/entropy": entropy.mean((1, 2)), "losses/approx_kl": (ratio - 1 - log_ratio).mean((1, 2))}
        metrics["losses/clipfrac"] = ((ratio - 1).abs() > args.clip_coef).to(obs.dtype).mean((1, 2))
    if noise is not None:
        network, M = partial(regularized_policies, nets["actor"], env=env, args=args), noise.shape[2]
        change, _ = regularizer(
            args.regularizer, network, obs[:, :, :M], hold_std(z[:, :, :M], env, args), noise, unit, args
        )
        change = change[:, env.cooperators].mean(2)
        loss = loss + args.reg_coef * change.sum(1)
        metrics["ernie/regularizer"] = change.detach().mean(1)
    return loss.sum(), {name: value.detach() for name, value in metrics.items()}


def descend(loss: Tensor, nets: list[MLP], optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """One optimiser step; the gradient of each network of each seed is clipped on its own."""
    grads = average_ranks(*torch.autograd.grad(loss, [net.flat for net in nets]))
    for net, grad in zip(nets, grads):
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        net.flat.grad = grad * (max_grad_norm / norm.clamp_min(max_grad_norm))
    optimizer.step()


def update_ppo(nets: Nets, optimizer, loss_of: Callable, batch: Batch, unit: Tensor, streams, env, args: Args) -> Batch:
    """Epochs of minibatches over a batch; metrics are summed over these."""
    S, M = batch["obs"].shape[:2]
    first_row = M * torch.arange(S, device=env.device)[:, None]
    rows_of, sums = {name: value.flatten(0, 1) for name, value in batch.items()}, {}
    for _ in range(args.update_epochs):
        order = torch.stack([torch.randperm(M, generator=g, device=g.device) for g in streams["minibatches"]])
        for chosen in (order + first_row).chunk(args.num_minibatches, 1):
            rows = {name: v.index_select(0, chosen.flatten()).unflatten(0, chosen.shape) for name, v in rows_of.items()}
            noise = draw_perturbation(streams["noise"], env, args)
            loss, metrics = loss_of(nets, rows, noise, unit, env, args)
            descend(loss, list(nets.values()), optimizer, args.max_grad_norm)
            sums = add(sums, metrics)
    return sums


def draw_perturbation(generators: Generators, env, args: Args) -> Tensor | None:
    """The random numbers of one update's regulariser, [S, N, M, O]."""
    M = min(args.reg_batch_size, args.num_envs * env.horizon // args.num_minibatches)
    return draw(torch.randn, (env.num_agents, M, env.obs_mask.shape[1]), generators) if args.regularized else None


# --------------------------------------------------------------------------------------------------------------------
# Rollout of whole episodes, so that between two of them a checkpoint needs no environment state


def make_replay(env, num_seeds: int, num_episodes: int, T: int) -> Batch:
    """Of E episodes: obs [S, E, T + 1, N, O], actions [S, E, T, N, A], rewards [S, E, T, N], terminated [S, E, T]."""
    N, (O, A) = env.num_agents, (env.obs_mask.shape[1], env.action_mask.shape[1])
    shapes = {"obs": (T + 1, N, O), "actions": (T, N, A), "rewards": (T, N), "terminated": (T,)}
    return {k: torch.zeros(num_seeds, num_episodes, *v, dtype=env.dtype, device=env.device) for k, v in shapes.items()}


@torch.no_grad()
def play_episodes(step: Callable, env, actor: MLP, norm: Tensor, generators: Generators, args: Args) -> Batch:
    """An episode of every environment with sampled actions, as make_replay lays it out."""
    S, B = args.num_seeds, args.num_envs
    replay = make_replay(env, S, B, env.horizon)
    shape = (env.horizon, env.num_agents, B, env.action_mask.shape[1])
    noise = draw(gumbel if env.discrete else torch.randn, shape, generators).unbind(1)
    state, obs = env.reset(generators)
    replay["obs"][:, :, 0] = obs.unflatten(0, (S, B))
    for t in range(env.horizon):
        x = normalize(replay["obs"][:, :, t].transpose(1, 2), norm)
        action = choose(policies(actor, x, env, args), noise[t], env)
        state, obs, reward, terminated, _, _ = step(state, to_step(action, env), env.draw(generators))
        replay["actions"][:, :, t] = action.transpose(1, 2)
        replay["obs"][:, :, t + 1] = obs.unflatten(0, (S, B))
        replay["rewards"][:, :, t] = reward.unflatten(0, (S, B))
        replay["terminated"][:, :, t] = terminated.unflatten(0, (S, B)).to(env.dtype)
    return replay


@torch.no_grad()
def play_randomly(step: Callable, env, args: Args) -> Batch:
    """Observations of an episode of random actions, as in a replay, for their norm."""
    streams, seen = make_generators(args.seed, args.num_seeds, "norm", env.device, RANK), []
    state, obs = env.reset(streams)
    for _ in range(env.horizon):
        seen.append(obs)
        state, obs, *_ = step(state, perturb.random_actions(env, streams), env.draw(streams))
    return {"obs": torch.stack([*seen, obs], 1).unflatten(0, (args.num_seeds, -1))}


def add(sums: Batch, values: Batch) -> Batch:
    return {name: sums.get(name, 0.0) + value for name, value in values.items()}


# --------------------------------------------------------------------------------------------------------------------
# Robustness evaluation

DYNAMICS = ("damping", "mass", "max_speed_scale", "contact_force")
SWEEP = {  # of a particle or PettingZoo task, perturbation: strengths
    "gaussian": (0.1, 0.2, 0.5, 1.0),  # observation noise, standard deviation
    "uniform": (0.1, 0.2, 0.5, 1.0),  # observation noise, half-width
    "mad": (0.1, 0.2, 0.5, 1.0),  # radius; the observations that change the policy most (maximal action difference)
    "random_action": (0.05, 0.2, 0.5),  # probability that one cooperating agent acts at random in a step
    **{name: (0.5, 2.0) for name in DYNAMICS},  # factor on the trained value
}
DRONE_SWEEP = {
    "gaussian": (0.01, 0.03, 0.1, 0.3),  # observation noise, standard deviation (paper, Figure 6)
    "uniform": (0.01, 0.03, 0.1, 0.3),
    "mad": (0.01, 0.03, 0.1),
    "random_action": (0.05, 0.2, 0.5),
    "mass": (0.95, 1.05),  # factor on the trained value
    "updraft": (-0.01, 0.01),  # N, constant force upwards; a drone weighs 0.265
    "wind": (0.005, 0.01),  # N, constant force along x
    "gust": (0.005, 0.01),  # N, standard deviation of a changing force along each axis
    "delay": (1,),  # steps until an action takes effect
}


def make_task(args: Args, num_envs: int, device: torch.device, family: str = "clean", strength: float = 0.0):
    """The task of `args`, with the changed dynamics of one perturbation of the sweep; in Bullet if the backend is."""
    options = {"num_agents": args.num_agents, "continuous_actions": args.continuous_actions}
    env = envs.make(args.env_id, num_envs, device, **options)
    if family in DYNAMICS:
        env = replace(env, **{family: strength * getattr(env, family)})
    elif family in ("wind", "updraft"):
        env = replace(env, wind=(strength, 0.0, 0.0) if family == "wind" else (0.0, 0.0, strength))
    elif family in ("gust", "delay"):
        env = replace(env, **{family: strength})
    return bullet.from_drones(env) if args.backend == "pybullet" else env


def attack_policies_mad(nets: Nets, x: Tensor, unit: Tensor, epsilon: float, generators, env, args: Args) -> Tensor:
    """Normalised observations [S, N, M, O] of cooperating agents in a ball of `epsilon` units of `unit` around those of
    x that change the policies most, by ten projected ascent steps on the divergence (maximal action difference)."""
    z, scale = policies(nets["actor"], x, env, args), unit * env.cooperators[:, None, None]

    def objective(delta: Tensor) -> Tensor:
        return divergence(args.divergence, policies(nets["actor"], x + scale * delta, env, args), z)

    start = rescale(draw(torch.randn, x.shape[1:], generators) * (scale > 0), 0.5 * epsilon, args.norm)
    ball = partial(project, epsilon=epsilon, norm=args.norm)
    return x + scale * unroll(objective, start, 10, 0.25 * epsilon, ball, stackelberg=False)


@torch.no_grad()
def agent_returns(env, nets, norm, args: Args, generators, family="clean", strength=0.0, watch=None) -> Tensor:
    """Returns [S, E, N] of the likeliest actions under one perturbation of the sweep; opponents see and act
    undisturbed. `watch` is called with the state before each step."""
    S, total = args.num_seeds, 0.0
    unit = perturbation_unit(norm, replace(args, epsilon_units="raw"))
    state, obs = env.reset(generators)
    for _ in range(env.horizon):
        if watch is not None:
            watch(state)
        if family in ("gaussian", "uniform"):
            obs = perturb.observation_noise(env, obs, family, strength, generators)
        x = normalize(obs.unflatten(0, (S, -1)).transpose(1, 2), norm)
        if family == "mad":
            x = attack_policies_mad(nets, x, unit, strength, generators, env, args)
        action = to_step(choose(policies(nets["actor"], x, env, args), None, env), env)
        if family == "random_action":
            action = perturb.replace_actions(env, action, perturb.random_actions(env, generators), strength, generators)
        state, obs, reward, *_ = env.step(state, action, env.draw(generators))
        total = total + reward
    return total.unflatten(0, (S, -1))


def agents_report(nets: Nets, norm: Tensor, args: Args, device: torch.device, run_dir: Path, wandb_runs: list) -> None:
    """Sweep all perturbations on fresh environments: a table on the terminal, robustness.csv and .png, and in wandb; of
    drones for every agent, else for the mean of the cooperating ones. 95% t-intervals over seeds; with one seed, over
    its episodes."""
    env = make_task(replace(args, backend="torch"), args.num_seeds * args.eval_episodes, device)
    sweep = DRONE_SWEEP if args.is_drones else SWEEP
    if args.is_drones:  # rotors that all turn alike are helpless against sideways forces
        families = [f for f in sweep if env.action_type != "one_d_rpm" or f not in ("wind", "gust")]
    else:
        families = [f for f in sweep if f not in DYNAMICS or f in getattr(env, "dynamics", ())]
    points = [("clean", 0.0), *((family, strength) for family in families for strength in sweep[family])]
    team = [name for name, cooperates in zip(env.agents, env.cooperators.tolist()) if cooperates]
    columns = ["env_id", "regularizer", "seed", "agent", "perturbation", "strength", "return", "standard_error"]
    rows, table = [], {name: {} for name in (*team, "mean")}  # agent: perturbation: strength: (mean, half interval)
    for family, strength in tqdm(points, desc="robustness", unit="point", disable=None, leave=False):
        changed = make_task(args, env.num_envs, device, family, strength)
        generators = make_generators(args.seed, args.num_seeds, "evaluation", device)
        returns = agent_returns(changed, nets, norm, args, generators, family, strength)[:, :, env.cooperators]
        returns = torch.cat([returns, returns.mean(2, keepdim=True)], 2).double().cpu().numpy()  # [S, E, N + 1]
        for n, (name, cells) in enumerate(table.items()):
            for k, episodes in enumerate(returns[:, :, n]):
                row = [args.env_id, args.regularizer, args.seed + k, name, family, strength, episodes.mean()]
                rows.append([*row, episodes.std() / len(episodes) ** 0.5, len(episodes)])
            found = returns[:, :, n].mean(1) if args.num_seeds > 1 else returns[0, :, n]
            half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found) if len(found) > 1 else math.nan
            cells.setdefault(family, {})[strength] = (found.mean(), half)
        if args.backend == "pybullet":
            changed.close()
    columns = [*columns, "episodes"]
    path = run_dir / ("robustness.csv" if args.backend == "torch" else f"robustness_{args.backend}.csv")
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    table = {name: table[name] for name in (team if args.is_drones else ["mean"])}
    plot_agents(table, args, path.with_suffix(".png"))
    over = f"{args.num_seeds} seeds" if args.num_seeds > 1 else f"{args.eval_episodes} episodes"
    for name, families in table.items():
        print(f"\nReturn ({name}), {args.env_id}, {args.regularizer}: mean and 95% interval over {over}")
        for family, cells in families.items():
            cells = (f"{strength:>5g}: {mean:7.2f} ± {half:<5.2f}" for strength, (mean, half) in cells.items())
            print(f"  {family:16s}" + "   ".join(cells))
    with wandb_may_fail(wandb_runs):
        for k, run in enumerate(wandb_runs):
            import wandb

            data = [row for row in rows if row[2] == args.seed + k]
            image = wandb.Image(str(path.with_suffix(".png")))
            run.log({"robustness": wandb.Table(columns=columns, data=data), "robustness_plot": image})
            run.finish()


def plot_agents(table: dict[str, dict], args: Args, path: Path) -> None:
    """Return of each agent against strength, a panel per perturbation, with what was trained at 0 or at factor 1."""
    families = [f for f in next(iter(table.values())) if f != "clean"]
    figure = Figure(figsize=(13, 2.7 * math.ceil(len(families) / 5)), layout="constrained")
    for place, family in enumerate(families):
        axis = figure.add_subplot(math.ceil(len(families) / 5), 5, place + 1)
        for name, cells in table.items():
            points = sorted((cells[family] | {float(family in DYNAMICS): cells["clean"][0.0]}).items())
            mean, half = np.array([value for _, value in points]).T
            axis.errorbar(range(len(points)), mean, np.nan_to_num(half), marker="o", ms=3, capsize=2, label=name)
        axis.set_xticks(range(len(points)), [f"{strength:g}" for strength, _ in points])
        axis.set(title=family, xlabel="factor" if family in DYNAMICS else "strength")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.supylabel("episodic return")
    figure.suptitle(f"{args.env_id}, {args.regularizer}, {args.num_seeds} seed{'s' * (args.num_seeds > 1)}")
    figure.savefig(path, dpi=110)


def show_episodes(nets: Nets, norm: Tensor, args: Args, device: torch.device, run_dir: Path) -> None:
    """A GIF of an episode and, of leader_follower_v1, the distance of every drone to what it follows over time."""
    args = replace(args, backend="torch")
    env, states, frames = make_task(args, args.num_seeds * min(100, args.eval_episodes), device), [], []
    streams = make_generators(args.seed, args.num_seeds, "video", device)
    if args.is_drones:
        agent_returns(env, nets, norm, args, streams, watch=states.append)
        frames = [env.render(states[t], 0, states[max(0, t - 60) : t]) for t in range(0, len(states), 4)]
    else:  # the state of a PettingZoo environment is only its newest moment
        agent_returns(env, nets, norm, args, streams, watch=lambda state: frames.append(env.render(state, 0)))
    frames = [Image.fromarray(frame) for frame in frames]
    (run_dir / "videos").mkdir(exist_ok=True)
    duration = 4000 // env.control_hz if args.is_drones else 100
    path = run_dir / "videos" / "episode.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
    if args.env_id != "leader_follower_v1":
        return
    gap = torch.stack([(env.targets(state)[0] - state.position).square().sum(0).sqrt() for state in states])
    figure, seconds = Figure(figsize=(7, 4), layout="constrained"), np.arange(len(states)) / env.control_hz
    axis = figure.add_subplot()
    for name, distance in zip(env.agents, gap.unbind(1)):  # [T, S * E]
        low, middle, high = np.quantile(distance.cpu().numpy(), (0.1, 0.5, 0.9), axis=1)
        label = f"{name} to " + ("waypoint" if name == env.agents[0] else env.agents[0])
        (line,) = axis.plot(seconds, middle, label=label)
        axis.fill_between(seconds, low, high, alpha=0.2, color=line.get_color())
    axis.axhline(env.spacing, color="gray", linestyle="--", label="wanted")
    axis.set(xlabel="seconds", ylabel="distance (m)", title="median and middle 80% of episodes", ylim=(0, None))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    figure.savefig(run_dir / "distance.png", dpi=110)


# --------------------------------------------------------------------------------------------------------------------
# Runs: arguments, folders, checkpoints, logs


def fail(message: str) -> None:
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(default: Args | None = None) -> Args:
    """Flags from the command line over those of `default`; what tyro prints about a wrong one, in one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Args, default=default, description=__doc__.split("\n")[0])
    except SystemExit as stop:
        if not stop.code:
            raise
        box = " ".join(line.strip(" │") for line in said.getvalue().splitlines()[1:])  # without its title
        first = next(part for part in re.split("[-─]{4,}", box) if part.strip())
        fail(" ".join(first.split()).removeprefix("Error parsing Args: "))


def save_checkpoint(path: Path, state: dict) -> None:
    """Write aside, flush to disk, then rename; the checkpoint before stays as *.previous.pt."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, path.with_suffix(".previous.pt"))
    os.replace(path.with_suffix(".tmp"), path)


def load_run(given: Args) -> tuple[Args, dict, Path]:
    """Arguments, checkpoint and folder of the run that --resume or --evaluate names; most other flags are refused."""
    path = Path(given.resume or given.evaluate)
    path = path / CHECKPOINT if path.is_dir() else path
    previous = path.with_suffix(".previous.pt")
    if not path.exists() and previous.exists():  # killed between the two renames of save_checkpoint
        path = previous
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["script"] != Path(__file__).stem:
            fail(f"{path} was written by {state['script']}.py")
        saved = Args(**(state["args"] | {"resume": None}))
    except FileNotFoundError:
        fail(f"no checkpoint at {path}")
    except Exception as error:
        hint = f"; the one before it is {previous}" if previous.exists() and path != previous else ""
        fail(f"{path} is no readable checkpoint ({type(error).__name__}){hint}")
    args = parse_args(saved)
    free = {"resume", "evaluate", "cuda", "num_threads", "track", "wandb_mode", "wandb_project_name", "wandb_entity"}
    if given.evaluate:
        free |= {"backend", "compile", "capture_video", *(name for name in asdict(args) if name.startswith("eval_"))}
    for name, value in asdict(args).items():
        if value != getattr(saved, name) and name not in free:
            fail(f"--{name.replace('_', '-')} is read from {path} and cannot be given with --resume or --evaluate")
    return args, state, path.parent


def make_run_dir(args: Args) -> Path:
    """A new folder with args.json: the arguments, the git commit and the versions of what the run depends on."""
    name = [f"{args.env_id.replace(':', '_')}__{args.exp_name}__{args.seed}__{time.time_ns() // 1_000_000}"]
    if dist.is_initialized():
        dist.broadcast_object_list(name)
    failed, commit = subprocess.getstatusoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
    about = asdict(args) | {"git_commit": None if failed else commit}
    about["versions"] = {p: version(p) for p in ("torch", "numpy", "pettingzoo")} | {"python": sys.version.split()[0]}
    run_dir = Path(args.runs_dir) / name[0]
    try:
        run_dir.mkdir(parents=True, exist_ok=dist.is_initialized())
        if RANK == 0:
            (run_dir / "args.json").write_text(json.dumps(about, indent=2))
    except OSError as error:
        fail(f"--runs-dir must be a writable folder, got {args.runs_dir!r} ({error.strerror})")
    return run_dir


def start_wandb(args: Args, run_dir: Path, labels: list[dict]) -> list:
    """A Weights & Biases run per label, grouped by run name; offline if online fails, none if that fails too."""
    modes = {"offline": ["offline"], "online": ["online", "offline"], "disabled": []}[args.wandb_mode]
    names = [f"{run_dir.name}__run{k}__seed{label['seed']}" for k, label in enumerate(labels)]
    options = {"project": args.wandb_project_name, "entity": args.wandb_entity, "group": run_dir.name, "dir": run_dir}
    options |= {"resume": "allow", "reinit": "create_new"}
    for mode in modes if args.track and RANK == 0 else []:
        try:
            import wandb  # slow to import, and may be absent

            options |= {"mode": mode, "settings": wandb.Settings(init_timeout=30, console="off", silent=True)}
            return [wandb.init(name=n, id=n, config=asdict(args) | k, **options) for n, k in zip(names, labels)]
        except Exception as error:
            print(f"wandb ({mode}) is left out: {error!r}", file=sys.stderr)
    return []


@contextlib.contextmanager
def wandb_may_fail(wandb_runs: list):
    """What Weights & Biases raises inside this block ends its logging, not the run."""
    try:
        yield
    except Exception as error:
        wandb_runs.clear()
        print(f"wandb failed and is left out from now on: {error!r}", file=sys.stderr)


def log_metrics(path: Path, wandb_runs: list, labels: list[dict], step: int, metrics: Batch) -> None:
    """A row per label in metrics.csv, and the same in its wandb run; metrics [len(labels)]."""
    values = {name: value.tolist() for name, value in metrics.items()}
    rows = [{name: value[k] for name, value in values.items()} for k in range(len(labels))]
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow([*labels[0], "global_step", *metrics])
        writer.writerows([*label.values(), step, *row.values()] for label, row in zip(labels, rows))
    with wandb_may_fail(wandb_runs):
        for run, row in zip(wandb_runs, rows):
            run.log(row, step=step)


def setup(args: Args) -> torch.device:
    """Torch settings and the device. Under torchrun the ranks share out the seeds if that leaves none over: each is a
    run of its own, with its own folder. Otherwise each plays its own environments of all seeds, and gradients are
    averaged."""
    global RANK, CHECKPOINT
    world, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = args.cuda and torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        fail(f"--nproc-per-node must be at most {torch.cuda.device_count()}, the number of GPUs, or use --no-cuda")
    device = torch.device(f"cuda:{local}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)  # nccl takes the current one
    if world > 1 and args.num_seeds % world == 0:
        args.num_seeds //= world
        args.seed += RANK * args.num_seeds
        RANK, CHECKPOINT = 0, "checkpoint.pt"
    elif world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.set_num_threads(args.num_threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling costs a tenth of an update
    return device


def run_labels(args: Args) -> list[dict]:
    """What tells the rows of metrics.csv apart."""
    return [{"seed": args.seed + k} for k in range(args.num_seeds)]


def make_mappo(env, args: Args, state: dict | None = None) -> tuple[Nets, torch.optim.Optimizer]:
    """The policies, or the one that all share, and the value function of all agents; one Adam. As in `state`."""
    generators = make_generators(args.seed, args.num_seeds, "init", env.device)
    N, (O, A), hidden = env.num_agents, (env.obs_mask.shape[1], env.action_mask.shape[1]), [args.hidden_size] * 2
    inputs, count = (O + N, 1) if args.share_parameters else (O, N)
    sizes = [inputs, *hidden, A if env.discrete else 2 * A]
    nets = {"actor": orthogonal_mlp(sizes, count, 0.01, generators)}
    if not env.discrete:
        nets["actor"].layers()[-1][1].detach()[:, A:] = math.log(args.init_std)
    nets["critic"] = orthogonal_mlp([N * O, *hidden, N], 1, 1.0, generators)
    optimizer = torch.optim.Adam([net.flat for net in nets.values()], args.learning_rate, eps=1e-5, fused=True)
    if state is not None:
        for name, net in nets.items():
            net.flat.detach().copy_(state["nets"][name])
        optimizer.load_state_dict(state["optimizer"])
    return nets, optimizer


def train(env, nets: Nets, optimizer, compiled: Callable, args: Args, run_dir: Path, wandb_runs: list, state=None):
    """Train from the start or from `state`, a checkpoint: the norm of observations, or None if Ctrl-C or SIGTERM ended
    it, after a checkpoint."""
    env_step = env.step if args.env_id.startswith("zoo:") else compiled(env.step)  # Python environments do not compile
    # on CPUs torch.compile (2.13) gets the gradient through the unrolled attack wrong
    loss_of = compiled(ppo_loss) if env.device.type == "cuda" or not args.regularized else ppo_loss
    names, per_iteration, labels = ("rollout", "minibatches", "noise"), args.num_envs * env.horizon, run_labels(args)
    streams = {name: make_generators(args.seed, args.num_seeds, name, env.device, RANK) for name in names}
    log_path, iteration = run_dir / "metrics.csv", 0
    sums, returns, first = {}, 0.0, 0  # of metrics, of returns: since the log at iteration `first`
    if state is None:
        norm = measure_norm(play_randomly(env_step, env, args), args.num_envs)
        value_norm = torch.zeros(3, args.num_seeds, 1, env.num_agents, dtype=torch.float64, device=env.device)
    else:
        for name, generators in streams.items():
            for generator, saved in zip(generators, state["streams"][name]):
                generator.set_state(saved)
        norm, value_norm, iteration = (
            state["norm"].to(env.device),
            state["value_norm"].to(env.device),
            state["iteration"],
        )
        if dist.is_initialized():
            iterations = [None] * dist.get_world_size()
            dist.all_gather_object(iterations, iteration)
            if len(set(iterations)) > 1:
                fail(f"the ranks' checkpoints in {run_dir} are of different iterations: {iterations}")
        sums, returns, first = state["window"]
        sums, returns = {k: v.to(env.device) for k, v in sums.items()}, torch.as_tensor(returns, device=env.device)
        if RANK == 0 and log_path.exists():  # drop rows that will be written again, and one cut off by a kill
            os.truncate(log_path, state["log_size"])
    stops, is_over = [], iteration * per_iteration >= args.total_timesteps
    handlers = {s: signal.signal(s, lambda *caught: stops.append(caught)) for s in (signal.SIGINT, signal.SIGTERM)}
    step, started, unit = iteration * per_iteration, time.perf_counter(), perturbation_unit(norm, args)
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=True if RANK else None)
    while not is_over:
        progress = step / args.total_timesteps
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress) if args.anneal_lr else args.learning_rate
        replay = play_episodes(env_step, env, nets["actor"], norm, streams["rollout"], args)
        returns = returns + replay["rewards"].sum(2).mean(1)  # [S, N]
        batch, value_norm = prepare_episodes(nets, replay, norm, value_norm, env, args)
        sums, iteration = (
            add(sums, update_ppo(nets, optimizer, loss_of, batch, unit, streams, env, args)),
            iteration + 1,
        )
        last_step, step = step, iteration * per_iteration
        bar.update(per_iteration)
        is_done, is_over = step >= args.total_timesteps, bool(stops) or step >= args.total_timesteps
        if dist.is_initialized():  # all ranks stop together
            over = torch.tensor(float(is_over), device=env.device)
            dist.all_reduce(over)
            is_over = bool(over)
        log = is_done or step // args.log_interval > last_step // args.log_interval
        save = is_over or step // args.checkpoint_interval > last_step // args.checkpoint_interval
        for name, value in sums.items() if log or save else ():
            if not value.isfinite().all():
                good = run_dir / CHECKPOINT if (run_dir / CHECKPOINT).exists() else "none yet"
                fail(f"{name} is not finite at step {step}; last good checkpoint: {good}")
        if log:
            count = (iteration - first) * args.update_epochs * args.num_minibatches
            row = {"charts/episodic_return": returns[:, env.cooperators].mean(1) / (iteration - first)}
            row |= {name: value / count for name, value in sums.items()}
            row |= inspect_agents(nets, norm, batch, unit, env, args)
            speed = args.num_seeds * per_iteration * (iteration - first) / (time.perf_counter() - started)
            row["charts/SPS"] = torch.full((args.num_seeds,), round(speed))
            if RANK == 0:
                log_metrics(log_path, wandb_runs, labels, step, row)
            bar.set_postfix(episodic_return=f"{row['eval/episodic_return'].mean():.2f}", refresh=False)
            sums, returns, first, started = {}, 0.0, iteration, time.perf_counter()
        if save:
            data = {"script": Path(__file__).stem, "args": asdict(args), "iteration": iteration}
            data |= {"norm": norm, "value_norm": value_norm, "window": (sums, returns, first)}
            data |= {"log_size": log_path.stat().st_size if log_path.exists() else 0}
            data |= {"nets": {name: net.flat.detach() for name, net in nets.items()}}
            data |= {"optimizer": optimizer.state_dict()}
            data |= {"streams": {p: [g.get_state() for g in generators] for p, generators in streams.items()}}
            save_checkpoint(run_dir / CHECKPOINT, data)
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return norm if step >= args.total_timesteps else None


def inspect_agents(nets: Nets, norm: Tensor, batch: Batch, unit: Tensor, env, args: Args) -> Batch:
    """Returns in evaluation, how much of the returns' variance the values explain, the policies' mean standard
    deviation, and diagnose() on the newest episodes."""
    streams = make_generators(args.seed, args.num_seeds, "test", env.device)
    test = make_task(args, args.num_seeds * min(100, args.eval_episodes), env.device)
    returns = agent_returns(test, nets, norm, args, streams).mean(1)  # [S, N]
    row = {"eval/episodic_return": returns[:, env.cooperators].mean(1)}
    row |= {f"eval/{name}": returns[:, n] for n, name in enumerate(env.agents) if args.is_drones}
    obs = batch["obs"][:, : args.reg_batch_size].transpose(1, 2)
    with torch.no_grad():
        error = batch["returns"] - central_values(nets["critic"], batch["obs"], args)
        z = policies(nets["actor"], obs, env, args)
    row["losses/explained_variance"] = 1 - (error.var(1) / batch["returns"].var(1).clamp_min(1e-8)).mean(1)
    if not env.discrete:
        live = env.action_mask[:, None].to(z.dtype)
        row["charts/policy_std"] = (z.chunk(2, -1)[1].exp() * live).sum((1, 3)).mean(1) / live.sum()
    if args.regularized:
        network, noise = (
            partial(regularized_policies, nets["actor"], env=env, args=args),
            draw_perturbation(streams, env, args),
        )
        row |= diagnose(nets["actor"], network, obs, noise, unit, env.cooperators, args)
    return row


def main() -> None:
    args = parse_args()
    args, state, run_dir = load_run(args) if args.resume or args.evaluate else (args, None, None)
    device = setup(args)
    try:
        env = make_task(replace(args, backend="torch"), args.num_seeds * args.num_envs, device)
        if args.backend == "pybullet":
            bullet.require_pybullet(args.num_seeds * args.eval_episodes)
    except (ValueError, ImportError) as error:
        fail(str(error))
    if not args.is_drones and not args.env_id.startswith("zoo:") and args.env_id not in particle.TASKS:
        fail(f"--env-id must be of drones, particles or zoo:package.module, got {args.env_id!r}")
    if env.discrete == args.continuous_actions:
        fail(f"--continuous-actions must fit {args.env_id}, where it is {not env.discrete}")
    samples = args.num_envs * env.horizon
    if samples % args.num_minibatches:
        fail(f"--num-minibatches must divide the {samples} steps of an iteration, got {args.num_minibatches}")
    options = {"comprehensive_padding": False}  # with it gradients are wrong on GPUs (torch 2.11)
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, options=options) if args.compile else lambda f: f
    nets, optimizer = make_mappo(env, args, state)
    run_dir = run_dir or make_run_dir(args)
    wandb_runs = [] if args.evaluate else start_wandb(args, run_dir, run_labels(args))
    if args.evaluate:
        norm = state["norm"].to(device)
    else:
        norm = train(env, nets, optimizer, compiled, args, run_dir, wandb_runs, state)
    if norm is None:
        print(f"stopped; go on with: python {Path(__file__).name} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(130)
    if RANK == 0:
        if args.capture_video:
            show_episodes(nets, norm, args, device, run_dir)
        agents_report(nets, norm, args, device, run_dir, wandb_runs)
        print(f"results: {run_dir}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # training ends itself, with a checkpoint
        print("stopped during the report; repeat it with --evaluate RUN_DIR", file=sys.stderr)
        sys.exit(130)
