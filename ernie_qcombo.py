"""ERNIE-QCOMBO: Q-learning of traffic lights, kept smooth by an adversarial regulariser.

QCOMBO (Zhang et al. 2019, arXiv 1909.10651; ERNIE's appendix E.1) trains a Q-network per light on its own observation,
which drives it, a global Q-network on everybody's observations and actions, and pulls the global value and the weighted
sum of the individual ones together. ERNIE (Bukharin et al. 2023, arXiv 2310.10810) adds the largest change of each
individual Q under a small perturbation of its observation (Eq. 4, 5), found by K steps of projected gradient ascent
through which the gradient of Q flows (Eq. 6, the Stackelberg game). ERNIE-A (Eq. 7) adds the largest change of the
global Q when `--malicious-agents` lights act otherwise.

    python ernie_qcombo.py --epsilon 0.1                       # 2 x 2 lights: minutes on two CPU cores
    python ernie_qcombo.py --num-seeds 5 --compile             # five runs side by side, the environment compiled
    python ernie_qcombo.py --evaluate runs/RUN --backend sumo  # the same lights in SUMO

Differences to the paper, by their number in the README: 1 l2 ball in standard deviations, 2 squared l2 of Q-values, 7
projection after every step, 8 random start, 16-21 sequential greedy ERNIE-A in the loss of the global Q, 23 malicious
actions by the run's own global Q, 34 target networks (--tau 1: none), 35 greedy actions of the next step, 36 mean
instead of sum, 37 the individual Q-functions are regularised, 39 Gaussian noise of mean length epsilon, 41 mean reward.

Axes: S seeds, N agents (lights), B environments of a seed, T steps of a rollout, M minibatch, O observation, A action;
in evaluation P points, E episodes, L lights.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
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
from envs import perturb, sumo, traffic

Generators = list[torch.Generator]  # one per seed
Batch = dict[str, Tensor]  # a minibatch, the random numbers of an update, or metrics [S]
RANK = int(os.environ.get("RANK", "0"))  # of this process under torchrun
CHECKPOINT = "checkpoint.pt" if RANK == 0 else f"checkpoint_rank{RANK}.pt"


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of this experiment"""
    seed: int = 1
    """seed of the first run; run k uses seed + k"""
    num_seeds: int = 1
    """S, independent runs trained side by side (paper: five, ten for percentiles)"""
    torch_deterministic: bool = True
    """deterministic algorithms only: same seed, same machine, same numbers"""
    cuda: bool = True
    """use the GPU if there is one"""
    num_threads: int = 1
    """CPU threads; with more than one set OMP_WAIT_POLICY=PASSIVE, or one busy core stalls all of them"""
    compile: bool = False
    """compile the environment step, on a GPU the loss too (torch.compile): half a minute per shape, then 9x as fast"""
    runs_dir: str = "runs"
    """folder that receives a folder per run"""
    resume: str | None = None
    """run folder or checkpoint file to continue; all other flags are read from it"""
    evaluate: str | None = None
    """run folder or checkpoint file whose policies are evaluated again, without training"""
    backend: Literal["torch", "sumo"] = "torch"
    """with --evaluate: the batched simulator or SUMO (requirements-sumo.txt), a process per environment"""
    capture_video: bool = False
    """write a GIF of the trained lights"""
    track: bool = True
    """log to Weights & Biases, one run per seed"""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no account; `wandb sync` uploads later"""
    wandb_project_name: str = "robust-marl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team"""

    env_id: Literal["traffic_grid_v0", "traffic_irregular_v0", "traffic_atlanta_v0"] = "traffic_grid_v0"
    """network and flow"""
    rows: int | None = None
    """rows of lights; default: the task's own (traffic_grid_v0: 2)"""
    cols: int | None = None
    """columns of lights; default: the task's own"""
    flow: tuple[float | str, ...] = ()
    """cars per hour: train, flow1 ... flow5 (paper, table 1), one number, or one per entry; default: the task's own"""
    model: Literal["idm", "krauss"] = "idm"
    """car-following model (paper's code: idm)"""
    total_timesteps: int = 320_000
    """environment steps (seconds) of one seed (paper: 15,000)"""
    num_envs: int = 32
    """B, environments of one seed that step together (paper: 1)"""
    horizon: int = 2000
    """seconds of an episode (paper: 3,000)"""
    warmup: int = 1000
    """of these, seconds of random switching at the start; learning begins after the first (paper's code: 1,000)"""
    rollout_steps: int = 10
    """seconds between updates (paper's code: 10)"""
    updates_per_rollout: int = 8
    """minibatches after each rollout (paper's code: 100)"""
    buffer_size: int = 250_000
    """replay capacity of one seed in environment steps (paper's code: 30,000)"""
    batch_size: int = 128
    """M, transitions per minibatch (paper's code: 30)"""
    learning_rate: float = 1e-3
    """Adam step size (paper's code: 1e-4)"""
    anneal_lr: bool = True
    """let the step size fall linearly to 0"""
    gamma: float = 0.995
    """discount factor of a second (paper's code: 0.95)"""
    tau: float = 0.03
    """share by which the targets move at each update; 1: no target networks (paper's formulas)"""
    hidden_size: int = 128
    """width of the two hidden layers (paper: 256; its code: 64)"""
    activation: Literal["relu", "silu", "tanh"] = "relu"
    """hidden activation"""
    exploration: float = 0.02
    """probability of a random action at the start (paper's code: 0.05)"""
    exploration_end: float = 0.0
    """the same at the end, linear in between"""
    reward_scale: float = 0.01
    """factor on the rewards that are learnt from"""
    team_reward: Literal["mean", "sum"] = "mean"
    """the global reward and value are the mean or the sum of the individual ones"""
    consistency_coef: float = 1.7
    """lambda_Q, weight of the consistency regulariser (paper's code: 1.7)"""
    global_q: Literal["auto", "joint", "action_in"] = "auto"
    """global Q with an output per joint action, or with the actions as inputs; auto: joint up to six lights"""
    max_grad_norm: float = 10.0
    """the gradient of each network of each seed is clipped to this norm"""

    regularizer: Literal["none", "gaussian", "random", "adversarial", "stackelberg"] = "stackelberg"
    """none: QCOMBO; gaussian: appendix H; random: a direction of length epsilon; adversarial: Eq. 4; stackelberg: 6"""
    regularize: Literal["local", "global", "both"] = "local"
    """which Q-functions are regularised: the individual ones (paper), the global one (its code), or both"""
    epsilon: float = 0.1
    """radius of the perturbation ball"""
    epsilon_units: Literal["raw", "std"] = "std"
    """unit of epsilon: the observation's own, or each entry's standard deviation under random switching"""
    norm: Literal["l2", "linf"] = "l2"
    """norm of the ball"""
    attack_steps: int = 3
    """K, ascent steps; 0 is the baseline"""
    attack_lr: float | None = None
    """eta, length of an l2-normalised ascent step in units of epsilon; default: 1 if K = 1, else 2.5 / K"""
    attack_init: float = 0.5
    """length of the random start in units of epsilon (at 0 the divergence has no gradient)"""
    reg_coef: float = 0.01
    """lambda, weight of the regulariser"""
    reg_batch_size: int = 128
    """samples of the minibatch on which the regulariser is estimated"""
    divergence: Literal["l2", "kl", "l2_probs"] = "l2"
    """D: squared l2 of Q-values (paper); KL or squared l2 of their softmax"""
    detach_reference: bool = False
    """treat the clean Q in D as a constant"""
    gaussian_std: float | None = None
    """standard deviation of the gaussian mode; default: mean length epsilon (the paper's text: 1)"""
    action_reg_coef: float = 0.0
    """lambda_A, weight of ERNIE-A (Eq. 7) in the loss of the global Q"""
    malicious_agents: int = 1
    """ERNIE-A: so many lights act otherwise (K of Eq. 7)"""

    log_interval: int = 32_000
    """environment steps between two rows of metrics.csv"""
    checkpoint_interval: int = 64_000
    """environment steps between two checkpoints"""
    eval_episodes: int = 4
    """episodes of one seed at each point of the robustness report"""
    eval_warmup: int = 1000
    """seconds of random switching before an evaluation (paper: 1,000)"""
    eval_seconds: int = 1000
    """seconds of an evaluation (paper: 4,000)"""

    def __post_init__(self):
        floats = " ".join(name for name, value in asdict(self).items() if isinstance(value, float))
        counts = "num_seeds num_threads rows cols total_timesteps num_envs horizon warmup rollout_steps buffer_size"
        amounts = "seed updates_per_rollout exploration exploration_end consistency_coef epsilon attack_steps"
        divides = "a multiple of --rollout-steps"
        for names, holds, rule in (
            (floats, math.isfinite, "a finite number"),
            (counts, lambda v: v >= 1, "at least 1"),
            ("batch_size hidden_size reg_batch_size malicious_agents", lambda v: v >= 1, "at least 1"),
            ("log_interval checkpoint_interval eval_episodes eval_seconds", lambda v: v >= 1, "at least 1"),
            ("learning_rate reward_scale max_grad_norm attack_lr gaussian_std", lambda v: v > 0, "above 0"),
            (amounts, lambda v: v >= 0, "0 or more"),
            ("reg_coef action_reg_coef eval_warmup", lambda v: v >= 0, "0 or more"),
            ("horizon warmup", lambda v: v % self.rollout_steps == 0, divides),
            ("warmup", lambda v: v < self.horizon, "below --horizon"),
            ("total_timesteps", lambda v: v > self.warmup * self.num_envs, "above --warmup times --num-envs"),
            (
                "buffer_size",
                lambda v: v >= self.num_envs * self.rollout_steps,
                "at least --num-envs times --rollout-steps",
            ),
            ("exploration exploration_end gamma tau", lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("attack_init", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("flow", lambda v: len(v) < 2 or not any(isinstance(rate, str) for rate in v), "a name, or numbers"),
            ("backend", lambda v: v == "torch" or self.evaluate, "torch unless --evaluate is given"),
            ("resume", lambda v: not self.evaluate, "left out with --evaluate"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {value!r}")
        if self.attack_lr is None:
            self.attack_lr = 1.0 if self.attack_steps <= 1 else 2.5 / self.attack_steps

    @property
    def regularized(self) -> bool:
        """Whether the regulariser does anything: with K, epsilon or lambda at 0 this is QCOMBO, at its speed."""
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


Nets = dict[str, MLP]  # local, global, local_target, global_target


def init_mlp(sizes: list[int], num_agents: int, generators: Generators) -> MLP:
    """Uniform in +-1/sqrt(in), as torch.nn.Linear."""
    used = sum((n_in + 1) * n_out for n_in, n_out in zip(sizes, sizes[1:]))
    flat = 2 * draw(torch.rand, (num_agents, used + -used % 16), generators).flatten(0, 1) - 1
    for layer, n_in in zip(MLP(flat, sizes).layers(), sizes):
        for part in layer:
            part *= n_in**-0.5
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


def joint_values(net: MLP, x: Tensor, args: Args) -> Callable[[Tensor], Tensor]:
    """The global Q(s, .) as a function of C joint actions [S, M, C, N] -> [S, M, C], for states x [S, 1, M, N * O]. The
    network has an output per joint action, or it takes the actions as inputs beside the state."""
    if args.global_q == "joint":
        table = forward(net.layers(), x, args.activation).squeeze(1)  # [S, M, 2^N]
        return lambda joint: table.gather(2, (joint << torch.arange(joint.shape[-1], device=x.device)).sum(-1))
    (weight, bias), *rest = net.layers()
    encoded = torch.baddbmm(bias, weight[:, :, : x.shape[-1]], x.squeeze(1).mT)  # [S, H, M]

    def values(joint: Tensor) -> Tensor:
        h = torch.bmm(weight[:, :, x.shape[-1] :], joint.flatten(1, 2).to(x.dtype).mT).unflatten(2, joint.shape[1:3])
        h = ACTIVATIONS[args.activation]((h + encoded[..., None]).flatten(2)).mT
        return forward(rest, h.unsqueeze(1), args.activation).view(joint.shape[:3])

    return values


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
# Loss and update. Observations are normalised from here on.


def perturbation_unit(norm: Tensor, args: Args) -> Tensor:
    """One unit of delta in each entry of a normalised observation [S, N, 1, O], 0 where it does not vary."""
    std = norm[:, :, 1:]
    return (std > 0).to(std.dtype) if args.epsilon_units == "std" else torch.where(std > 0, 1 / std, 0)


def everybody(obs: Tensor) -> Tensor:
    """The state, what the global Q sees: [S, N, M, O] -> [S, 1, M, N * O]."""
    return obs.transpose(1, 2).flatten(2).unsqueeze(1)


def view(kind: str, nets: Nets, obs: Tensor, joint: Tensor, unit: Tensor, args: Args):
    """What the regulariser of the "local" or "global" Q-functions perturbs: the network as a function of its input, the
    input [S, N, M, O] or [S, 1, M, N * O], and the unit of delta."""
    if kind == "local":
        return partial(forward, nets["local"].layers(), activation=args.activation), obs, unit
    x, unit = everybody(obs), everybody(unit)
    if args.global_q == "joint":
        return partial(forward, nets["global"].layers(), activation=args.activation), x, unit
    joint = joint[:, : args.reg_batch_size].unsqueeze(2)
    return lambda state: joint_values(nets["global"], state, args)(joint).unsqueeze(1), x, unit


def changed_lights(values: Callable, joint: Tensor, num_changed: int) -> Tensor:
    """Greedy search of Eq. (7), appendix G: K times the light whose other action changes Q(s, .) most, none twice.
    joint [S, M, N] -> a' [S, M, N]; N values per round."""
    N = joint.shape[-1]
    flips, changed = torch.eye(N, dtype=torch.int64, device=joint.device), joint
    clean, is_open = values(joint.unsqueeze(2)), torch.ones_like(joint, dtype=torch.bool)
    for _ in range(min(num_changed, N)):
        change = (values(changed.unsqueeze(2) ^ flips) - clean).square()  # [S, M, N]
        flip = F.one_hot(change.masked_fill(~is_open, -1.0).argmax(-1), N)
        changed, is_open = changed ^ flip, is_open & (flip == 0)
    return changed


def qcombo_loss(nets: Nets, batch: Batch, noise: Batch, unit: Tensor, args: Args):
    """ALGO LOGIC: appendix E.1, L(theta) + L(omega) + lambda_Q L_reg, plus lambda R (Eq. 5) and lambda_A R^A (Eq. 7):
    loss, metrics. The targets: y^n = r^n + gamma max Q^n'(o'), y = r + gamma Q'(s', a'), a' greedy with Q^n."""
    obs, next_obs, joint, rewards = (batch[k] for k in ("obs", "next_obs", "joint", "rewards"))
    x, next_x = everybody(obs), everybody(next_obs)
    share = 1 / obs.shape[1] if args.team_reward == "mean" else 1.0
    with torch.no_grad():
        discount = args.gamma * (1 - batch["terminated"])  # [S, M]
        greedy = forward(nets["local"].layers(), next_obs, args.activation).argmax(-1).transpose(1, 2)  # [S, M, N]
        next_q = forward(nets["local_target"].layers(), next_obs, args.activation).amax(-1)
        target = rewards + discount.unsqueeze(1) * next_q  # [S, N, M]
        next_team_q = joint_values(nets["global_target"], next_x, args)(greedy.unsqueeze(2)).squeeze(2)
        team_target = share * rewards.sum(1) + discount * next_team_q  # [S, M]
    z = forward(nets["local"].layers(), obs, args.activation)  # [S, N, M, A]
    q = z.gather(3, joint.transpose(1, 2).unsqueeze(3)).squeeze(3)  # [S, N, M]
    values = joint_values(nets["global"], x, args)
    team_q = values(joint.unsqueeze(2)).squeeze(2)  # [S, M]
    parts = {
        "losses/local": 0.5 * (q - target).square().mean((1, 2)),
        "losses/global": 0.5 * (team_q - team_target).square().mean(1),
        "losses/consistency": 0.5 * (team_q - share * q.sum(1)).square().mean(1),
    }
    loss = parts["losses/local"] + parts["losses/global"] + args.consistency_coef * parts["losses/consistency"]
    if args.action_reg_coef > 0:
        with torch.no_grad():
            changed = changed_lights(values, joint, args.malicious_agents)
        parts["ernie/action_regularizer"] = (values(changed.unsqueeze(2)).squeeze(2) - team_q).square().mean(1)
        loss = loss + args.action_reg_coef * parts["ernie/action_regularizer"]
    for kind, direction in noise.items():
        network, seen, scale = view(kind, nets, obs, joint, unit, args)
        seen = seen[:, :, : args.reg_batch_size]
        clean = z[:, :, : args.reg_batch_size] if kind == "local" else network(seen)
        change, _ = regularizer(args.regularizer, network, seen, clean, direction, scale, args)
        loss = loss + args.reg_coef * change.mean(2).sum(1)
        parts[f"ernie/{kind}_regularizer"] = change.mean((1, 2))
    metrics = {name: value.detach() for name, value in parts.items()}
    return loss.sum(), metrics | {"losses/q_values": q.detach().mean((1, 2))}


def descend(loss: Tensor, nets: list[MLP], optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """One optimiser step; the gradient of each network of each seed is clipped on its own."""
    grads = average_ranks(*torch.autograd.grad(loss, [net.flat for net in nets]))
    for net, grad in zip(nets, grads):
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        net.flat.grad = grad * (max_grad_norm / norm.clamp_min(max_grad_norm))
    optimizer.step()


def update_q(nets: Nets, optimizer, loss_function: Callable, batch, noise, unit: Tensor, args: Args) -> Batch:
    """A step of all Q-functions, then of their targets."""
    loss, metrics = loss_function(nets, batch, noise, unit, args)
    descend(loss, [nets["local"], nets["global"]], optimizer, args.max_grad_norm)
    for name in ("local", "global"):
        nets[name + "_target"].flat.lerp_(nets[name].flat.detach(), args.tau)
    return metrics


def draw_directions(generators: Generators, env, args: Args) -> Batch:
    """The random numbers of one update, for each kind of Q-function that is regularised."""
    N, O, M = env.num_agents, env.obs_mask.shape[1], min(args.batch_size, args.reg_batch_size)
    kinds = [] if not args.regularized else ["local", "global"] if args.regularize == "both" else [args.regularize]
    shapes = {"local": (N, M, O), "global": (1, M, N * O)}
    return {kind: draw(torch.randn, shapes[kind], generators) for kind in kinds}


# --------------------------------------------------------------------------------------------------------------------
# Rollout and replay


def make_replay(env, num_seeds: int, num_episodes: int, T: int) -> Batch:
    """Of E episodes: obs [S, E, T + 1, N, O], actions [S, E, T, N, A], rewards [S, E, T, N], terminated [S, E, T]."""
    N, (O, A) = env.num_agents, (env.obs_mask.shape[1], env.action_mask.shape[1])
    shapes = {"obs": (T + 1, N, O), "actions": (T, N, A), "rewards": (T, N), "terminated": (T,)}
    return {k: torch.zeros(num_seeds, num_episodes, *v, dtype=env.dtype, device=env.device) for k, v in shapes.items()}


def sample(replay: Batch, filled: int, batch_size: int, generators: Generators) -> Batch:
    """Uniform minibatch of the first `filled` episodes: obs, next_obs, actions [S, M, N, .], rewards, terminated."""
    S, E, T = replay["terminated"].shape
    pick = torch.stack([torch.randint(filled * T, (batch_size,), generator=g, device=g.device) for g in generators])
    pick = pick + E * T * torch.arange(S, device=pick.device)[:, None]  # [S, M] into the flattened [S, E, T]
    row = pick + pick // T  # an episode has one observation more than transitions
    rows = {"obs": row, "next_obs": row + 1, "actions": pick, "rewards": pick, "terminated": pick}
    sources = {name: replay[name.removeprefix("next_")].flatten(0, 2) for name in rows}
    return {name: sources[name].index_select(0, i.flatten()).unflatten(0, i.shape) for name, i in rows.items()}


def prepare(batch: Batch, norm: Tensor, args: Args) -> Batch:
    """A minibatch of the replay as the loss takes it: obs, next_obs [S, N, M, O] normalised, joint [S, M, N] action
    numbers, rewards [S, N, M] scaled, terminated [S, M]."""
    obs, next_obs = (normalize(batch[name].transpose(1, 2), norm) for name in ("obs", "next_obs"))
    rewards = args.reward_scale * batch["rewards"].transpose(1, 2)
    joint = batch["actions"].argmax(-1)
    return {"obs": obs, "next_obs": next_obs, "joint": joint, "rewards": rewards, "terminated": batch["terminated"]}


@torch.no_grad()
def collect(step, env, local: MLP, norm, replay: Batch, slot: int, t: int, state, obs, random: float, generators, args):
    """The seconds from t on of every environment, with a share of `random` actions, into replay from `slot` on: the new
    state and obs, and what happened, summed over time, mean over environments [S]. During the warm-up each light
    switches every tenth second with probability 1/2, as in the paper's code."""
    S, B = args.num_seeds, args.num_envs
    part = {k: v[:, slot : slot + B] for k, v in replay.items()}
    uniform = draw(torch.rand, (args.rollout_steps, 2, B, env.num_agents), generators).unbind(1)
    part["obs"][:, :, 0] = obs.unflatten(0, (S, B))
    happened = {}
    for k in range(args.rollout_steps):
        explore, coin = uniform[k].unbind(1)  # [S, B, N]
        if t + k < args.warmup:
            action = (coin < 0.5) * ((t + k) % 10 == 0)
        else:
            x = normalize(obs.unflatten(0, (S, B)).transpose(1, 2), norm)
            greedy = forward(local.layers(), x, args.activation).argmax(-1).transpose(1, 2)
            action = torch.where(explore < random, coin < 0.5, greedy == 1)
        action = action.long()
        state, obs, reward, terminated, _, info = step(state, action.flatten(0, 1), env.draw(generators))
        part["actions"][:, :, k] = F.one_hot(action, 2).to(env.dtype)
        part["obs"][:, :, k + 1] = obs.unflatten(0, (S, B))
        part["rewards"][:, :, k] = reward.unflatten(0, (S, B))
        part["terminated"][:, :, k] = terminated.unflatten(0, (S, B)).to(env.dtype)
        happened = add(happened, outcome(reward, info))
    return state, obs, {name: value.unflatten(0, (S, B)).mean(1) for name, value in happened.items()}


def outcome(reward: Tensor, info: Batch) -> Batch:
    """Of a second, [B]: the reward of all lights and its terms, cars that left in a minute, cars that wait outside."""
    terms = {name: info[name].sum(1) for name in traffic.TERMS}
    return {"reward": reward.sum(1), **terms, "left_per_minute": 60.0 * info["left"], "backlog": info["backlog"] * 1.0}


def add(sums: Batch, values: Batch) -> Batch:
    return {name: sums.get(name, 0.0) + value for name, value in values.items()}


# --------------------------------------------------------------------------------------------------------------------
# Robustness evaluation

SWEEP = {  # perturbation of the task that was trained: strengths
    "gaussian": (0.01, 0.1, 1.0),  # observation noise, standard deviation in raw units (paper, Figures 1a, 5b, Table 2)
    "mad": (0.1, 0.3),  # radius in standard deviations; the observations that change the Q-values most
    "critic": (0.1, 0.3),  # the same; the observations whose action the light's own Q likes least
    "flip_one": (0.03, 0.05),  # probability that one light, chosen at random, does the opposite (paper, Figures 2c, d)
    "flip_each": (0.03, 0.05),  # the same for each light independently (the paper's code)
    "worst_one": (0.03, 0.05),  # as flip_one, with the action that the global Q likes least
    "speed": (30.0, 40.0),  # m/s of the cars, trained at 35 (paper, Figures 1b, 5a and Table 2)
    "flow": (1, 2, 3, 4, 5),  # of the paper's table 1, for 2 x 2 lights (Figure 1c)
}
NETWORKS = {  # where the trained lights are set up, tiled (paper, Figures 2a, 2b, Tables 3 and 4)
    "irregular": {"env_id": "traffic_irregular_v0"},
    "4x4": {"env_id": "traffic_grid_v0", "rows": 4, "cols": 4, "flow": 550.0},
    "6x6": {"env_id": "traffic_grid_v0", "rows": 6, "cols": 6, "flow": 385.0},
    "atlanta": {"env_id": "traffic_atlanta_v0"},
}
Points = list[tuple[str, float | str]]  # perturbation and strength
DRIVER = "local"  # the networks that drive the lights


def make_traffic(args: Args, num_envs: int, device: torch.device, **fields):
    """The task of `args`, or another one where `fields` name its env_id; in SUMO if the backend is."""
    if "env_id" not in fields:
        fields |= {k: getattr(args, k) for k in ("env_id", "rows", "cols") if getattr(args, k) is not None}
        if args.flow and "flow" not in fields:
            fields["flow"] = args.flow[0] if len(args.flow) == 1 else args.flow
    env = envs.make(num_envs=num_envs, device=device, model=args.model, **fields)
    return sumo.from_traffic(env) if args.backend == "sumo" else env


def make_test(args: Args, points: Points, num_seeds: int, device: torch.device):
    """Environments [S, P, E] of an evaluation: speed and flow may differ between points, the network may not."""
    fields = {"warmup": args.eval_warmup, "horizon": args.eval_seconds}
    fields |= NETWORKS[points[0][1]] if points[0][0] == "network" else {}

    def spread(values: list) -> Tensor:
        each = torch.tensor(values).repeat_interleave(args.eval_episodes, 0)
        return torch.cat([each] * num_seeds)

    if any(family in ("speed", "flow") for family, _ in points):
        plain = make_traffic(replace(args, backend="torch"), 1, device)
        own = plain.inflow[:, 0].tolist()
        fields["speed"] = spread([strength if family == "speed" else plain.speed for family, strength in points])
        fields["flow"] = spread([traffic.FLOWS[f"flow{s}"] if family == "flow" else own for family, s in points])
    return make_traffic(args, num_seeds * len(points) * args.eval_episodes, device, **fields)


def attack_lights(family: str, local: MLP, x: Tensor, unit: Tensor, epsilon: float, generators, args: Args) -> Tensor:
    """Worst observations [S, L, M, O] in a ball of `epsilon` standard deviations around x, by five projected ascent
    steps: "mad" on the change of Q, "critic" against the light's own Q, which sees the true observation."""
    q = forward(local.layers(), x, args.activation)
    live = (unit > 0).to(x.dtype)

    def objective(delta: Tensor) -> Tensor:
        perturbed = forward(local.layers(), x + live * delta, args.activation)
        if family == "mad":
            return divergence(args.divergence, perturbed, q)
        return -(F.softmax(perturbed, -1) * q).sum(-1)  # an argmax has no gradient

    start = rescale(draw(torch.randn, x.shape[1:], generators) * live, 0.5 * epsilon, args.norm)
    ball = partial(project, epsilon=epsilon, norm=args.norm)
    return x + live * unroll(objective, start, 5, 0.5 * epsilon, ball, stackelberg=False)


def act(family: str, strength, nets: Nets, norm: Tensor, obs: Tensor, generators, env, args: Args) -> Tensor:
    """Greedy actions [S, E, L] under one perturbation of SWEEP; obs [S, E, L, O]. nets and norm are those of env's
    lights."""
    seen, S = obs, len(obs)
    if family == "gaussian":
        seen = perturb.observation_noise(env, obs.flatten(0, 1), family, strength, generators).unflatten(0, (S, -1))
    x = normalize(seen.transpose(1, 2), norm)  # [S, L, E, O]
    if family in ("mad", "critic"):
        x = attack_lights(family, nets["local"], x, perturbation_unit(norm, args), strength, generators, args)
    action = forward(nets["local"].layers(), x, args.activation).argmax(-1).transpose(1, 2)
    other = 1 - action
    if family == "flip_each":
        return torch.where(draw(torch.rand, action.shape[1:], generators) < strength, other, action)
    if family not in ("flip_one", "worst_one"):
        return action
    if family == "worst_one":
        values = joint_values(nets["global"], everybody(x), args)
        flips = torch.eye(env.num_agents, dtype=torch.int64, device=action.device)
        worse = values(action.unsqueeze(2) ^ flips) < values(action.unsqueeze(2))  # [S, E, L]
        other = torch.where(worse, other, action)
    joint = (action.flatten(0, 1), other.flatten(0, 1))
    return perturb.replace_actions(env, *joint, strength, generators).view(action.shape)


def tile(nets: Nets, norm: Tensor, env, args: Args) -> tuple[Nets, Tensor]:
    """Networks and norm of the trained R x C lights for the lights of a larger grid: R x C blocks side by side."""
    trained = make_traffic(replace(args, backend="torch"), 1, env.device)
    light = torch.arange(env.num_agents, device=env.device)
    index = light // env.cols % trained.rows * trained.cols + light % env.cols % trained.cols
    flat = nets[DRIVER].flat.detach().unflatten(0, (args.num_seeds, -1))[:, index].flatten(0, 1)
    return nets | {DRIVER: MLP(flat, nets[DRIVER].sizes)}, norm[:, index]


@torch.no_grad()
def simulate(env, step: Callable, drive: Callable, generators, frames: list | None = None) -> Batch:
    """Mean outcome of a second [B] over env.horizon seconds after the warm-up, with the lights in the hands of
    drive(state, obs) -> action [B, L]. Every other picture of the first environment is appended to `frames`."""
    state, obs = env.reset(generators, step)
    happened = {}
    for t in range(env.horizon):
        if frames is not None and t % 2 == 0:
            frames.append(Image.fromarray(env.render(state, 0)))
        state, obs, reward, _, _, info = step(state, drive(state, obs), env.draw(generators))
        happened = add(happened, outcome(reward, info))
    return {name: value / env.horizon for name, value in happened.items()}


def simulate_points(nets, norm, points: Points, purpose: str, compiled: Callable, args: Args, device, frames=None):
    """`simulate` the trained lights of all seeds at P points, or, without `nets`, a fixed-time signal: [S or 1, P, E].
    At every point the same warm-ups, so that points can be compared."""
    S = args.num_seeds if nets else 1
    env, shape = make_test(args, points, S, device), (S, len(points), args.eval_episodes)
    streams = [make_generators(args.seed, S, purpose, device) for _ in points]
    streams = [stream[k] for k in range(S) for stream in streams]  # one per seed and point
    perturbations = make_generators(args.seed, S, purpose + " perturbations", device)
    if nets:
        nets, norm = tile(nets, norm, env, args)

    def drive(state, obs: Tensor) -> Tensor:
        if not nets:
            return traffic.fixed_time(env, state)
        obs = obs.unflatten(0, shape)
        actions = [act(*point, nets, norm, obs[:, p], perturbations, env, args) for p, point in enumerate(points)]
        return torch.stack(actions, 1).flatten(0, 2)

    happened = simulate(env, compiled(env.step), drive, streams, frames)
    if args.backend == "sumo":
        env.close()
    return {name: value.unflatten(0, shape) for name, value in happened.items()}


def lights_report(nets: Nets, norm, args: Args, device, compiled: Callable, run_dir: Path, wandb_runs: list) -> None:
    """Sweep all perturbations and networks: a table on the terminal, robustness.csv and .png, and in wandb. Beside the
    trained lights a fixed-time signal (27 s of green). 95% t-intervals over seeds; with one seed, over its episodes."""
    trained = make_traffic(replace(args, backend="torch"), 1, device)
    families = [family for family in SWEEP if family != "flow" or (trained.rows, trained.cols) == (2, 2)]
    points: Points = [("clean", 0.0), *((family, strength) for family in families for strength in SWEEP[family])]
    rows = []
    groups: list[Points] = [points, *([("network", name)] for name in NETWORKS)]  # each in an environment of its own
    for group in tqdm(groups, desc="robustness", disable=None, leave=False):
        changes = [point for point in group if point[0] in ("clean", "speed", "flow", "network")]
        for policy, tested, count in ((args.regularizer, group, args.num_seeds), ("fixed_time", changes, 1)):
            lights = None if policy == "fixed_time" else nets
            happened = simulate_points(lights, norm, tested, "evaluation", compiled, args, device)
            happened = {name: value.double() for name, value in happened.items()}
            errors = happened["reward"].std(-1, correction=0) / (args.eval_episodes - 1) ** 0.5  # one episode: nan
            means = {name: value.mean(-1).tolist() for name, value in happened.items()}
            means["standard_error"] = errors.tolist()
            for k, (p, (family, strength)) in itertools.product(range(count), enumerate(tested)):
                row = {"env_id": args.env_id, "policy": policy, "seed": args.seed + k, "perturbation": family}
                row |= {"strength": strength, "episodes": args.eval_episodes}
                rows.append(row | {name: value[k][p] for name, value in means.items()})
    path = run_dir / ("robustness.csv" if args.backend == "torch" else f"robustness_{args.backend}.csv")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    table = summarize(rows)
    plot_lights(table, args, path.with_suffix(".png"))
    over = f"{args.num_seeds} seeds" if args.num_seeds > 1 else f"episodes ({args.eval_episodes})"
    print(f"\nReward of all lights in a second, {args.env_id}, {args.regularizer}: mean and 95% interval over {over}")
    print("  perturbation strength            reward  cars left/min  outside | fixed-time signal  outside")
    for (family, strength), cells in table.items():
        mean, half, left, backlog = cells[args.regularizer]
        line = f"  {family:12s} {strength:>9} {mean:9.1f} ± {half:<7.1f} {left:8.1f} {backlog:12.1f} |"
        mean, _, _, backlog = cells.get("fixed_time", (None,) * 4)
        print(line if mean is None else f"{line} {mean:12.1f} {backlog:14.1f}")
    with wandb_may_fail(wandb_runs):
        for k, run in enumerate(wandb_runs):
            import wandb

            data = [[str(value) for value in row.values()] for row in rows if row["seed"] == args.seed + k]
            image = wandb.Image(str(path.with_suffix(".png")))
            run.log({"robustness": wandb.Table(columns=list(rows[0]), data=data), "robustness_plot": image})
            run.finish()


def summarize(rows: list[dict]) -> dict[tuple, dict[str, tuple[float, float, float, float]]]:
    """Point -> policy -> mean reward, half of its 95% interval, cars that left in a minute, cars outside."""
    table = {}
    for row in rows:
        table.setdefault((row["perturbation"], row["strength"]), {}).setdefault(row["policy"], []).append(row)
    for cells in table.values():
        for policy, seeds in cells.items():
            rewards = [row["reward"] for row in seeds]
            error, count = seeds[0]["standard_error"], seeds[0]["episodes"]
            if len(seeds) > 1:
                error, count = stats.sem(rewards), len(seeds)
            half = stats.t.ppf(0.975, count - 1) * error if count > 1 else math.nan
            rest = [np.mean([row[name] for row in seeds]) for name in ("left_per_minute", "backlog")]
            cells[policy] = (np.mean(rewards), half, *rest)
    return table


def plot_lights(table: dict[tuple, dict[str, tuple]], args: Args, path: Path) -> None:
    """Reward at each strength, a panel per perturbation, the fixed-time signal beside it where it meets the change."""
    families = list(dict.fromkeys(family for family, _ in table if family != "clean"))
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    for place, family in enumerate(families):
        axis = figure.add_subplot(2, 5, place + 1)
        points = [point for point in table if point[0] == family or (point[0] == "clean" and family != "network")]
        for policy in (args.regularizer, "fixed_time"):
            cells = [table[point].get(policy) for point in points]
            if all(cells):
                means, halves = [cell[0] for cell in cells], np.nan_to_num([cell[1] for cell in cells])
                axis.errorbar(range(len(points)), means, halves, fmt="o", capsize=3, label=policy)
        axis.set_xticks(range(len(points)), ["clean" if f == "clean" else f"{s}" for f, s in points])
        axis.set(title=family)
        axis.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize="small")
    figure.supylabel("reward of all lights in a second")
    figure.suptitle(f"{args.env_id}, {args.regularizer}, {args.num_seeds} seed{'s' * (args.num_seeds > 1)}")
    figure.savefig(path, dpi=110)


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


def make_q(env, args: Args, state: dict | None = None) -> tuple[Nets, torch.optim.Optimizer]:
    """The Q-networks, their targets and an Adam for all. As in checkpoint `state`."""
    generators = make_generators(args.seed, args.num_seeds, "init", env.device)
    N, O, hidden = env.num_agents, env.obs_mask.shape[1], [args.hidden_size] * 2
    joint = [N * O, *hidden, 2**N] if args.global_q == "joint" else [N * (O + 1), *hidden, 1]
    nets = {"local": init_mlp([O, *hidden, 2], N, generators), "global": init_mlp(joint, 1, generators)}
    optimizer = torch.optim.Adam([net.flat for net in nets.values()], args.learning_rate, fused=True)
    nets |= {name + "_target": MLP(net.flat.detach().clone(), net.sizes) for name, net in nets.items()}
    if state is not None:
        for name, net in nets.items():
            net.flat.detach().copy_(state["nets"][name])
        optimizer.load_state_dict(state["optimizer"])
    return nets, optimizer


def train(env, nets, optimizer, compiled, args: Args, run_dir: Path, wandb_runs: list, state: dict | None = None):
    """Train from the start or from `state`, a checkpoint: the norm of observations, or None if Ctrl-C or SIGTERM ended
    it, after a checkpoint."""
    env_step, loss = compiled(env.step), compiled(qcombo_loss) if env.device.type == "cuda" else qcombo_loss
    names, per_iteration, T = ("rollout", "replay", "noise"), args.num_envs * args.rollout_steps, args.rollout_steps
    streams = {name: make_generators(args.seed, args.num_seeds, name, env.device, RANK) for name in names}
    slots = args.buffer_size // per_iteration  # a slot is a rollout of each environment
    replay = make_replay(env, args.num_seeds, slots * args.num_envs, T)
    norm = torch.zeros(args.num_seeds, env.num_agents, 2, env.obs_mask.shape[1], dtype=env.dtype, device=env.device)
    cars, obs, labels, log_path, iteration = None, None, run_labels(args), run_dir / "metrics.csv", 0
    sums, happened, count, driven, first = {}, {}, 0, 0, 0  # since the log at iteration `first`
    if state is not None:
        for name, generators in streams.items():
            for generator, saved in zip(generators, state["streams"][name]):
                generator.set_state(saved)
        for name, tensor in replay.items():
            tensor[:, : state["replay"][name].shape[1]] = state["replay"][name]
        norm, obs = norm.copy_(state["norm"]), state["obs"].to(env.device)
        cars = traffic.State(**{name: value.to(env.device) for name, value in state["cars"].items()})
        iteration = state["iteration"]
        if dist.is_initialized():
            steps = [None] * dist.get_world_size()
            dist.all_gather_object(steps, iteration)
            if len(set(steps)) > 1:
                fail(f"the ranks' checkpoints in {run_dir} are of different iterations: {steps}")
        sums, happened, count, driven, first = state["window"]
        sums, happened = ({k: v.to(env.device) for k, v in values.items()} for values in (sums, happened))
        if RANK == 0 and log_path.exists():  # drop rows that will be written again, and one cut off by a kill
            os.truncate(log_path, state["log_size"])
    stops, is_over = [], iteration * per_iteration >= args.total_timesteps
    handlers = {s: signal.signal(s, lambda *caught: stops.append(caught)) for s in (signal.SIGINT, signal.SIGTERM)}
    step, started = iteration * per_iteration, time.perf_counter()
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=True if RANK else None)
    while not is_over:
        progress, t = step / args.total_timesteps, iteration * T % args.horizon
        random = args.exploration + (args.exploration_end - args.exploration) * progress
        if t == 0:
            cars, obs = env.reset(streams["rollout"])
        slot = iteration % slots * args.num_envs
        rest = (slot, t, cars, obs, random, streams["rollout"], args)
        cars, obs, outcomes = collect(env_step, env, nets["local"], norm, replay, *rest)
        if t >= args.warmup:
            happened, driven = add(happened, outcomes), driven + T
        iteration += 1
        last_step, step = step, iteration * per_iteration
        filled = min(iteration, slots) * args.num_envs
        if iteration * T == args.warmup:
            norm = measure_norm(replay, filled)
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)
        unit = perturbation_unit(norm, args)
        for _ in range(args.updates_per_rollout if iteration * T >= args.warmup else 0):
            batch = prepare(sample(replay, filled, args.batch_size, streams["replay"]), norm, args)
            noise = draw_directions(streams["noise"], env, args)
            metrics = update_q(nets, optimizer, loss, batch, noise, unit, args)
            sums, count = add(sums, metrics), count + 1
        bar.update(per_iteration)
        is_done, is_over = step >= args.total_timesteps, bool(stops) or step >= args.total_timesteps
        if dist.is_initialized():  # all ranks stop together
            over = torch.tensor(float(is_over), device=env.device)
            dist.all_reduce(over)
            is_over = bool(over)
        log = count * driven > 0 and (is_done or step // args.log_interval > last_step // args.log_interval)
        save = is_over or step // args.checkpoint_interval > last_step // args.checkpoint_interval
        for name, value in sums.items() if log or save else ():
            if not value.isfinite().all():
                good = run_dir / CHECKPOINT if (run_dir / CHECKPOINT).exists() else "none yet"
                fail(f"{name} is not finite at step {step}; last good checkpoint: {good}")
        if log:
            row = {f"charts/{name}": value / driven for name, value in happened.items()}
            row |= {name: value / count for name, value in sums.items()}
            row["charts/exploration"] = torch.full((args.num_seeds,), random)
            row |= inspect(nets, norm, replay, filled, compiled, env, args)
            speed = args.num_seeds * per_iteration * (iteration - first) / (time.perf_counter() - started)
            row["charts/SPS"] = torch.full((args.num_seeds,), round(speed))
            if RANK == 0:
                log_metrics(log_path, wandb_runs, labels, step, row)
            bar.set_postfix(reward=f"{row['eval/reward'].mean():.1f}", refresh=False)
            sums, happened, count, driven, first, started = {}, {}, 0, 0, iteration, time.perf_counter()
        if save:
            data = {"script": Path(__file__).stem, "args": asdict(args), "iteration": iteration, "norm": norm}
            data |= {"window": (sums, happened, count, driven, first), "obs": obs}
            data |= {"cars": {field.name: getattr(cars, field.name) for field in fields(cars)}}
            data |= {"log_size": log_path.stat().st_size if log_path.exists() else 0}
            data |= {"nets": {name: net.flat.detach() for name, net in nets.items()}}
            data |= {"optimizer": optimizer.state_dict()}
            data |= {"streams": {p: [g.get_state() for g in generators] for p, generators in streams.items()}}
            data |= {"replay": {name: tensor[:, :filled].clone() for name, tensor in replay.items()}}
            save_checkpoint(run_dir / CHECKPOINT, data)
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return norm if step >= args.total_timesteps else None


def inspect(nets: Nets, norm: Tensor, replay: Batch, filled: int, compiled: Callable, env, args: Args) -> Batch:
    """How the greedy lights do in two episodes of five minutes after five of random switching, and diagnose()."""
    streams = make_generators(args.seed, args.num_seeds, "test", env.device)
    warmup, seconds = min(300, args.eval_warmup), min(300, args.eval_seconds)
    test = replace(args, eval_episodes=2, eval_warmup=warmup, eval_seconds=seconds)
    happened = simulate_points(nets, norm, [("clean", 0.0)], "test", compiled, test, env.device)
    row = {f"eval/{name}": value.mean((1, 2)) for name, value in happened.items()}
    batch = prepare(sample(replay, filled, args.batch_size, streams), norm, args)
    for kind, noise in draw_directions(streams, env, args).items():
        network, obs, unit = view(kind, nets, batch["obs"], batch["joint"], perturbation_unit(norm, args), args)
        team = torch.ones(obs.shape[1], dtype=torch.bool, device=env.device)
        found = diagnose(nets[kind], network, obs, noise, unit, team, args)
        row |= {name.replace("/", f"/{kind}_"): value for name, value in found.items()}
    return row


def main() -> None:
    args = parse_args()
    args, state, run_dir = load_run(args) if args.resume or args.evaluate else (args, None, None)
    device = setup(args)
    try:
        env = make_traffic(replace(args, backend="torch"), args.num_seeds * args.num_envs, device, horizon=args.horizon)
        if args.backend == "sumo":
            sumo.require_sumo()
    except (ValueError, ImportError) as error:
        fail(str(error))
    if args.global_q == "auto":
        args.global_q = "joint" if env.num_agents <= 6 else "action_in"
    if args.global_q == "joint" and env.num_agents > 12:
        fail(f"--global-q must be action_in with more than 12 lights, got joint with {env.num_agents}")
    if args.global_q == "action_in" and args.regularize != "local" and args.divergence != "l2":
        fail(f"--divergence must be l2 where a global Q of one output is regularised, got {args.divergence!r}")
    options = {"comprehensive_padding": False}  # with it gradients are wrong on GPUs (torch 2.11)
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, options=options) if args.compile else lambda f: f
    if args.compile:
        torch._dynamo.config.recompile_limit = 32  # the step is compiled for each network and number of environments
    nets, optimizer = make_q(env, args, state)
    run_dir = run_dir or make_run_dir(args)
    wandb_runs = [] if args.evaluate else start_wandb(args, run_dir, run_labels(args))
    norm = state["norm"].to(device) if args.evaluate else None
    if args.evaluate and not norm.any():
        fail(f"{run_dir} was stopped during its first warm-up and has learnt nothing")
    if not args.evaluate:
        norm = train(env, nets, optimizer, compiled, args, run_dir, wandb_runs, state)
    if norm is None:
        print(f"stopped; go on with: python {Path(__file__).name} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(130)
    if RANK == 0:
        compiled = compiled if args.backend == "torch" else lambda f: f
        lights_report(nets, norm, args, device, compiled, run_dir, wandb_runs)
        if args.capture_video:
            shown, frames = replace(args, backend="torch", eval_episodes=1, eval_warmup=300, eval_seconds=240), []
            simulate_points(nets, norm, [("clean", 0.0)], "video", lambda f: f, shown, device, frames)
            (run_dir / "videos").mkdir(exist_ok=True)
            path = run_dir / "videos" / "lights.gif"
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)
        print(f"results: {run_dir}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # training ends itself, with a checkpoint
        print("stopped during the report; repeat it with --evaluate RUN_DIR", file=sys.stderr)
        sys.exit(130)
