"""Mean-field ERNIE: mean-field MADDPG made robust by an adversary that moves the distribution of the agents.

Mean-field MADDPG (Li et al. 2021, arXiv 2105.08268, in its setting; Lowe et al. 2017) has one actor and one critic for
all agents. Each sees an agent's own state (velocity, place, its nearest landmarks and neighbours), the empirical
distribution d_s of all agents, and of the landmarks, through a permutation-invariant mean embedding, and, the critic,
the agent's action and the mean action of the others: networks cost the same for each agent, however many there are, and
serve any number. ERNIE (Bukharin et al. 2023, arXiv 2310.10810,
section 5.4 and appendix B) adds the largest squared change of Q when d_s is moved within a Wasserstein distance, found
by K steps of gradient ascent on the agents' places, through which the gradient of the leader flows (Eq. 6). The
distance is optimal transport, solved by IPOT (Xie et al. 2020, arXiv 1802.04307).

    python ernie_meanfield.py --num-agents 15 --epsilon 0.1           # fifteen agents cover fifteen landmarks
    python ernie_meanfield.py --num-agents 6 --num-seeds 5            # five independent runs side by side
    python ernie_meanfield.py --transport budget --regularize critic  # W <= epsilon as section 5.4 has it

Differences to the paper, by their number in the README: 7 projection after every step, 8 random start, 24 W1 with
Euclidean ground cost, 25 the leader does not see the transport term, 26 Q at the policy's action, 27 settings of IPOT,
29 discounted targets, 33 Adam, 39 Gaussian noise of mean length epsilon.

Axes: S seeds, N agents, L landmarks, B environments of a seed, T steps of an episode, M minibatch, A action, H
embedding; n is 1 where all agents see the same crowd, else N.
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
from envs import perturb

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
    """S, independent runs trained side by side (paper: five)"""
    torch_deterministic: bool = True
    """deterministic algorithms only: same seed, same machine, same numbers"""
    cuda: bool = True
    """use the GPU if there is one"""
    num_threads: int = 1
    """CPU threads; with more than one set OMP_WAIT_POLICY=PASSIVE, or one busy core stalls all of them"""
    compile: bool = False
    """compile the environment step, IPOT and, on a GPU or without regulariser, the losses (torch.compile)"""
    runs_dir: str = "runs"
    """folder that receives a folder per run"""
    resume: str | None = None
    """run folder or checkpoint file to continue; all other flags are read from it"""
    evaluate: str | None = None
    """run folder or checkpoint file whose policies are evaluated again, without training"""
    capture_video: bool = False
    """write a GIF of an episode of the trained policy"""
    track: bool = True
    """log to Weights & Biases, one run per seed"""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no account; `wandb sync` uploads later"""
    wandb_project_name: str = "robust-marl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team"""

    env_id: Literal["simple_spread_v3"] = "simple_spread_v3"
    """cooperative navigation, the paper's task; agents of one kind, continuous actions"""
    num_agents: int = 6
    """N (paper: 3, 6, 15, 30)"""
    total_timesteps: int = 250_000
    """environment steps of one seed (paper: 10,000 episodes of 25)"""
    num_envs: int = 40
    """B, environments of one seed that step together"""
    steps_per_update: int = 50
    """environment steps of one seed per update, whatever num_envs is"""
    learning_starts: int = 5_000
    """environment steps before the first update"""
    buffer_size: int = 100_000
    """replay capacity of one seed in environment steps (paper: 100, in units it does not name)"""
    batch_size: int = 256
    """M, transitions per minibatch, of all agents each (paper: 32 with 3 and 30 agents, 100 with 6 and 15)"""
    learning_rate: float = 1e-3
    """Adam step size of actor and critic"""
    gamma: float = 0.95
    """discount factor"""
    reward_scale: float | None = None
    """factor on the rewards that the critic learns; default: 1 / N, as rewards are sums over N landmarks"""
    tau: float = 0.01
    """share by which the targets move at each update"""
    nearest_landmarks: int = 3
    """landmarks that an agent's own state has, the nearest first"""
    nearest_agents: int = 2
    """other agents that it has, the nearest first"""
    hidden_size: int = 64
    """width of the two hidden layers and of the embeddings (paper: 64; 32 to 256 in Figure 4d)"""
    activation: Literal["relu", "silu", "tanh"] = "relu"
    """hidden activation"""
    exploration_noise: float = 0.8
    """standard deviation of the first exploration noise, in half-widths of the action range"""
    exploration_noise_end: float = 0.2
    """the same at the end, linear in between"""
    policy_l2: float = 1e-3
    """weight of the mean squared actor output in the actor loss"""
    max_grad_norm: float = 0.5
    """the gradient of each network of each seed is clipped to this norm"""

    regularizer: Literal["none", "gaussian", "random", "adversarial", "stackelberg"] = "stackelberg"
    """none: mean-field MADDPG; gaussian: appendix H; random: a direction of length epsilon; adversarial: the worst d_s,
    a constant to the leader; stackelberg: Eq. 6"""
    regularize: Literal["critic", "actor", "both"] = "both"
    """whose output must not change: Q (paper), the actor's output before tanh, or both"""
    transport: Literal["penalty", "budget"] = "penalty"
    """penalty: the adversary pays lambda_W W (appendix B); budget: W is at most epsilon (section 5.4)"""
    epsilon: float = 0.1
    """mean distance that agents are moved by K steps of length eta / K; with --transport budget the limit of W"""
    transport_coef: float = 0.01
    """lambda_W, what the adversary pays per unit of W"""
    transport_steps: int = 100
    """iterations of IPOT; 500 where many plans are nearly as good, as for points on a line"""
    transport_beta: float = 0.1
    """proximal step of IPOT, in units of the mean cost"""
    attack_steps: int = 3
    """K, ascent steps; 0 is the baseline"""
    attack_lr: float | None = None
    """eta, root mean square length of an ascent step in units of epsilon; default: 1 if K = 1, else 2.5 / K"""
    attack_init: float = 0.5
    """length of the random start in units of epsilon (W has no gradient at 0)"""
    reg_coef: float = 0.1
    """lambda, weight of the regulariser"""
    reg_batch_size: int = 32
    """samples of the minibatch on which the regulariser is estimated"""
    mean_action_epsilon: float = 0.0
    """radius of a perturbation of the others' mean action, within which Q must not change either; 0 is off"""

    log_interval: int = 10_000
    """environment steps between two rows of metrics.csv"""
    checkpoint_interval: int = 50_000
    """environment steps between two checkpoints"""
    eval_episodes: int | None = None
    """episodes of one seed at each point of the robustness report; default: 3,000 / N"""
    eval_agents: tuple[int, ...] = (3, 6, 15, 30)
    """numbers of agents for which the trained networks are evaluated too"""

    def __post_init__(self):
        floats = " ".join(name for name, value in asdict(self).items() if isinstance(value, float))
        counts = "num_seeds num_threads total_timesteps num_envs steps_per_update buffer_size batch_size hidden_size"
        amounts = "seed learning_starts exploration_noise exploration_noise_end policy_l2 epsilon attack_steps"
        for names, holds, rule in (
            (floats, math.isfinite, "a finite number"),
            (counts, lambda v: v >= 1, "at least 1"),
            ("num_agents", lambda v: v >= 2, "at least 2"),
            ("eval_agents", lambda v: v and all(n >= 2 for n in v), "at least 2 each"),
            (
                "nearest_landmarks",
                lambda v: 0 <= v <= min(self.num_agents, *self.eval_agents),
                "from 0 to the least of --num-agents and --eval-agents",
            ),
            (
                "nearest_agents",
                lambda v: 0 <= v < min(self.num_agents, *self.eval_agents),
                "from 0 to below the least of --num-agents and --eval-agents",
            ),
            ("transport_steps reg_batch_size log_interval checkpoint_interval", lambda v: v >= 1, "at least 1"),
            ("eval_episodes", lambda v: v >= 1, "at least 1"),
            ("learning_rate reward_scale max_grad_norm attack_lr transport_beta", lambda v: v > 0, "above 0"),
            (amounts, lambda v: v >= 0, "0 or more"),
            ("reg_coef transport_coef mean_action_epsilon", lambda v: v >= 0, "0 or more"),
            ("learning_starts", lambda v: v < self.total_timesteps, "below --total-timesteps"),
            ("gamma tau", lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("attack_init", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("resume", lambda v: not self.evaluate, "left out with --evaluate"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {value!r}")
        if self.attack_lr is None:
            self.attack_lr = 1.0 if self.attack_steps <= 1 else 2.5 / self.attack_steps
        if self.reward_scale is None:
            self.reward_scale = 1 / self.num_agents
        if self.eval_episodes is None:
            self.eval_episodes = max(1, 3000 // self.num_agents)

    @property
    def regularized(self) -> bool:
        """Whether the regulariser does anything: with K, epsilon or lambda at 0 this is mean-field MADDPG."""
        idle = self.regularizer in ("adversarial", "stackelberg") and self.attack_steps == 0
        return self.regularizer != "none" and self.reg_coef * self.epsilon > 0 and not idle


# --------------------------------------------------------------------------------------------------------------------
# Networks: the MLPs of all seeds are one batched MLP. Agents share them; those of one agent are not told apart.

ACTIVATIONS = {"relu": torch.relu_, "silu": F.silu, "tanh": torch.tanh_}  # in place where the output gives the slope
PARTS = ("head", "crowd", "landmarks")  # networks of an actor or critic: the latter two embed points


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


Nets = dict[str, MLP]  # actor_head, actor_crowd, ..., critic_landmarks, and the same with _target


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


def embed(net: MLP, points: Tensor, args: Args) -> Tensor:
    """Mean embedding [S, M, n, H] of sets of points [S, M, n, P, 2]: their order does not matter, nor their number. The
    mean is taken before the last layer, which is linear: that layer then sees sets, not points."""
    (weight, bias), last = net.layers()
    h = torch.baddbmm(bias, weight, points.flatten(1, 3).mT.contiguous())  # [S, H, M n P]
    h = ACTIVATIONS[args.activation](h).unflatten(2, points.shape[1:4]).mean(-1)
    return torch.baddbmm(last[1], last[0], h.flatten(2)).mT.contiguous().unflatten(1, points.shape[1:3])


def respond(nets: Nets, who: str, own: Tensor, crowd: Tensor, landmarks: Tensor, args: Args) -> Tensor:
    """Output [S, M, N, out] of `who`, "actor" or "critic" (or "actor_target", ...), for each agent: own [S, M, N, k] is
    what is its own, crowd [S, M, n, N, 2] the places of all agents, landmarks [S, M, n, L, 2]. What the agents share
    passes the first layer once."""
    role, _, target = who.partition("_")
    head, *encoders = (nets["_".join(filter(None, (role, part, target)))] for part in PARTS)
    pooled = torch.cat([embed(net, x, args) for net, x in zip(encoders, (crowd, landmarks))], -1)  # [S, M, n, 2 H]
    (weight, bias), *rest = head.layers()
    k = own.shape[-1]
    h = torch.baddbmm(bias, weight[:, :, :k], own.flatten(1, 2).mT).unflatten(2, own.shape[1:3])  # [S, H, M, N]
    h = h + torch.bmm(weight[:, :, k:], pooled.flatten(1, 2).mT).unflatten(2, pooled.shape[1:3])
    h = ACTIVATIONS[args.activation](h).flatten(2).mT.unsqueeze(1)
    return forward(rest, h, args.activation).view(*own.shape[:3], -1)


def perceive(body: Tensor, crowd: Tensor, landmarks: Tensor, args: Args) -> Tensor:
    """Own states [S, M, N, 4 + 2 k]: velocities and places `body` [S, M, N, 4], then where, seen from the agent, the
    nearest of landmarks [S, M, n, L, 2] and of the other agents in crowd [S, M, n, N, 2] are, the nearest first."""
    parts = [body]
    for points, itself, count in ((landmarks, 0, args.nearest_landmarks), (crowd, 1, args.nearest_agents)):
        away = points - body[..., None, 2:4]  # [S, M, N, P, 2]
        nearest = away.square().sum(-1).topk(itself + count, largest=False).indices[..., itself:]
        parts.append(away.gather(-2, nearest[..., None].expand(*nearest.shape, 2)).flatten(-2))
    return torch.cat(parts, -1)


def others_mean(action: Tensor) -> Tensor:
    """Mean action of the other agents [S, M, N, A]."""
    return (action.sum(-2, keepdim=True) - action) / (action.shape[-2] - 1)


def mean_field_q(nets: Nets, who: str, batch: Batch, crowd: Tensor, action: Tensor, mean_action: Tensor, args: Args):
    """Q(s_n, d_s, a_n, mean action of the others) [S, M, N]; own states and landmarks are those of `batch`."""
    own = torch.cat([batch["own"], action, mean_action], -1)
    return respond(nets, who, own, crowd, batch["landmarks"], args).squeeze(-1)


# --------------------------------------------------------------------------------------------------------------------
# Optimal transport


def distances(moved: Tensor, crowd: Tensor) -> Tensor:
    """[..., N, N] from each point of one crowd to each of the other, [..., N, 2]. Its derivative at 0 is 0."""
    return (moved.unsqueeze(-2) - crowd.unsqueeze(-3)).square().sum(-1).clamp_min(1e-12).sqrt()


def proximal_steps(plan: Tensor, right: Tensor, kernel: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` iterations of IPOT (Xie et al. 2020, algorithm 1 with L = 1): logarithms of the plan [..., N, N] and of
    the factors of its columns [..., 1, N]."""
    N = kernel.shape[-1]
    for _ in range(count):
        plan = plan + kernel
        left = -math.log(N) - torch.logsumexp(plan + right, -1, keepdim=True)
        right = -math.log(N) - torch.logsumexp(plan + left, -2, keepdim=True)
        plan = plan + left + right
    return plan, right


fused_steps = torch.compile(proximal_steps, fullgraph=True, options={"comprehensive_padding": False})


@torch.library.custom_op("ernie::proximal_points", mutates_args=())
def proximal_points(kernel: Tensor, steps: int, fused: bool) -> Tensor:
    """Logarithm of the plan after `steps` iterations. An operator, so that torch.compile meets one call where it would
    unroll hundreds, and so that ten iterations at a time can be compiled inside torch.func.grad (`fused`)."""
    plan, right = torch.zeros_like(kernel), torch.zeros_like(kernel[..., :1, :])
    for done in range(0, steps, 10):
        some = fused_steps if fused and steps - done >= 10 else proximal_steps
        plan, right = some(plan, right, kernel, min(10, steps - done))
    return plan


@proximal_points.register_fake
def _(kernel: Tensor, steps: int, fused: bool) -> Tensor:
    return torch.empty_like(kernel)


@torch.no_grad()
def transport_plan(cost: Tensor, args: Args) -> Tensor:
    """Plan [..., N, N] that carries equal masses at least cost [..., N, N], by inexact proximal points (IPOT) in
    logarithms. There is a best plan that carries nothing in parts: if the largest entries of IPOT's make one it is
    taken, or that of staying where it costs less, which is best before anybody has moved far."""
    N = cost.shape[-1]
    kernel = -cost / (args.transport_beta * cost.mean((-1, -2), keepdim=True).clamp_min(1e-12))
    plan = proximal_points(kernel, args.transport_steps, args.compile)
    whole = F.one_hot(plan.argmax(-1), N).to(cost.dtype) / N
    plan = torch.where((whole.sum(-2) * N == 1).all(-1)[..., None, None], whole, plan.exp())
    stay = torch.eye(N, dtype=cost.dtype, device=cost.device) / N
    better = ((stay * cost).sum((-1, -2)) <= (plan * cost).sum((-1, -2)))[..., None, None]
    return torch.where(better, stay, plan)


def wasserstein(moved: Tensor, crowd: Tensor, args: Args) -> Tensor:
    """W1 [...] between crowds [..., N, 2] of equal masses. The plan is a constant to the gradient, as the envelope
    theorem has it."""
    cost = distances(moved, crowd)
    return (cost * transport_plan(cost.detach(), args)).sum((-1, -2))


def within_budget(delta: Tensor, crowd: Tensor, epsilon: float, args: Args) -> Tensor:
    """`delta` [..., 2 N] shortened until W(crowd + delta, crowd) <= epsilon, by bisection along its ray. W is at most
    the mean length of the moves, so their share epsilon of it is allowed."""
    move = delta.unflatten(-1, (-1, 2))
    with torch.no_grad():
        low = (epsilon / move.square().sum(-1).sqrt().mean(-1).clamp_min(epsilon))[..., None, None]
        high = torch.ones_like(low)
        for _ in range(12):
            middle = (low * high).sqrt()
            inside = (wasserstein(crowd + middle * move, crowd, args) <= epsilon)[..., None, None]
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        most = torch.where((wasserstein(crowd + move, crowd, args) <= epsilon)[..., None, None], 1.0, low)
    # where the ray meets the budget its share is a function of delta: W(share delta) = epsilon
    cost = distances(crowd + most * move, crowd)
    plan = transport_plan(cost, args)
    gap = (cost * plan).sum((-1, -2), keepdim=True)
    with torch.no_grad():
        toward = ((crowd + most * move).unsqueeze(-2) - crowd.unsqueeze(-3)) / cost.unsqueeze(-1)
        slope = (plan * (toward * move.unsqueeze(-2)).sum(-1)).sum((-1, -2), keepdim=True)
    share = torch.where(most < 1, most - (gap - gap.detach()) / slope.clamp_min(1e-8), most)
    return (share * move).flatten(-2)


# --------------------------------------------------------------------------------------------------------------------
# ALGO LOGIC: the distributionally robust regulariser, ERNIE section 5.4 and appendix B


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


def crowd_regularizer(mode: str, change: Callable, crowd: Tensor, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """R_W [S, M] of each sample and the moves delta [S, M, 2 N] of the crowd [S, M, N, 2] behind it. `change` is the
    squared change of the output, summed over its entries, mean over agents [S, M], when the crowd is another one. noise
    [S, M, 2 N] is standard normal."""
    N = crowd.shape[-2]
    length = args.epsilon * math.sqrt(N)  # every agent by epsilon

    def moved(delta: Tensor) -> Tensor:
        return crowd + delta.unflatten(-1, (N, 2))

    def objective(delta: Tensor) -> Tensor:  # the follower's
        gain = change(moved(delta))
        if args.transport == "budget":
            return gain
        return gain - args.transport_coef * wasserstein(moved(delta), crowd, args)

    if mode == "gaussian":  # appendix H; a normal vector in the plane has a mean length of sqrt(pi / 2)
        delta = noise * args.epsilon / math.sqrt(math.pi / 2)
    elif mode == "random":
        delta = rescale(noise, length, "l2")
    else:
        start = rescale(noise, args.attack_init * length, "l2")
        ball = partial(within_budget, crowd=crowd, epsilon=args.epsilon, args=args)
        ball = ball if args.transport == "budget" else lambda delta: delta
        delta = unroll(objective, start, args.attack_steps, args.attack_lr * length, ball, mode == "stackelberg")
    return change(moved(delta)), delta


# --------------------------------------------------------------------------------------------------------------------
# Losses and update


def crowd_of(own: Tensor) -> Tensor:
    """Places of all agents as every one of them sees these, [S, M, 1, N, 2]."""
    return own[..., None, :, 2:4]


def change_of_q(nets: Nets, batch: Batch, rows: int, action: Tensor, args: Args) -> Callable:
    """crowd [S, m, N, 2] -> mean over agents of (Q(d_s') - Q(d_s))^2 [S, m], at the first m = `rows` samples."""
    part = {name: batch[name][:, :rows] for name in ("own", "landmarks")}
    action = action[:, :rows]
    clean = mean_field_q(nets, "critic", part, crowd_of(part["own"]), action, others_mean(action), args)

    def change(crowd: Tensor) -> Tensor:
        q = mean_field_q(nets, "critic", part, crowd.unsqueeze(2), action, others_mean(action), args)
        return (q - clean).square().mean(-1)

    return change


def change_of_actor(nets: Nets, batch: Batch, rows: int, args: Args) -> Callable:
    """crowd [S, m, N, 2] -> mean over agents of the squared change of the actor's output before tanh [S, m]."""
    own, landmarks = batch["own"][:, :rows], batch["landmarks"][:, :rows]
    clean = respond(nets, "actor", own, crowd_of(own), landmarks, args)

    def change(crowd: Tensor) -> Tensor:
        return (respond(nets, "actor", own, crowd.unsqueeze(2), landmarks, args) - clean).square().sum(-1).mean(-1)

    return change


def mean_action_regularizer(nets: Nets, batch: Batch, action: Tensor, noise: Tensor, args: Args) -> Tensor:
    """Mean over agents of (Q(mean action + delta) - Q(mean action))^2 [S, m], for the worst delta of length
    `mean_action_epsilon` of each agent, from noise [S, m, N, A]; the paper names this regulariser in section 5.4."""
    rows, epsilon = noise.shape[1], args.mean_action_epsilon
    part, action = {name: batch[name][:, :rows] for name in ("own", "landmarks")}, action[:, :rows]
    mean = others_mean(action)
    q = partial(mean_field_q, nets, "critic", part, crowd_of(part["own"]), action, args=args)
    clean = q(mean)

    def change(delta: Tensor) -> Tensor:
        return (q(mean + delta) - clean).square()

    start = rescale(noise, args.attack_init * epsilon, "l2")
    ball, follow = partial(project, epsilon=epsilon, norm="l2"), args.regularizer == "stackelberg"
    delta = unroll(change, start, max(1, args.attack_steps), args.attack_lr * epsilon, ball, follow)
    return change(delta).mean(-1)


def project(delta: Tensor, epsilon: float, norm: str) -> Tensor:
    """Nearest point of the ball ||delta|| <= epsilon over the last axis."""
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    return delta * (epsilon / torch.linalg.vector_norm(delta, dim=-1, keepdim=True).clamp_min(epsilon))


def mean_field_critic_loss(nets: Nets, batch: Batch, noise: Batch, env, args: Args):
    """Squared TD error plus lambda R_W at the policy's actions: loss, metrics. ALGO LOGIC: y_n = scale r_n + gamma (1 -
    terminated) Q'(s'_n, d_s', a'_n, mean of the others' a'), a' from the target actor."""
    with torch.no_grad():
        after = {"own": batch["next_own"], "landmarks": batch["landmarks"]}
        crowd = crowd_of(after["own"])
        action = squash_agents(respond(nets, "actor_target", after["own"], crowd, after["landmarks"], args), env)
        discount = args.gamma * (1 - batch["terminated"]).unsqueeze(-1)
        q = mean_field_q(nets, "critic_target", after, crowd, action, others_mean(action), args)
        target = args.reward_scale * batch["rewards"] + discount * q
    action, crowd = batch["actions"], crowd_of(batch["own"])
    q = mean_field_q(nets, "critic", batch, crowd, action, others_mean(action), args)
    loss = (q - target).square().mean((1, 2))  # [S]
    metrics = {"losses/critic_loss": loss.detach(), "losses/q_values": q.detach().mean((1, 2))}
    if args.regularized and args.regularize != "actor":
        rows = noise["crowd"].shape[1]
        with torch.no_grad():  # of all actions those that matter
            now = squash_agents(respond(nets, "actor", batch["own"], crowd, batch["landmarks"], args), env)
        change = change_of_q(nets, batch, rows, now, args)
        change, _ = crowd_regularizer(args.regularizer, change, crowd.squeeze(2)[:, :rows], noise["crowd"], args)
        loss = loss + args.reg_coef * change.mean(1)
        metrics["ernie/critic_regularizer"] = change.detach().mean(1)
    if args.mean_action_epsilon > 0:
        change = mean_action_regularizer(nets, batch, action, noise["mean_action"], args).mean(1)
        loss = loss + args.reg_coef * change
        metrics["ernie/mean_action_regularizer"] = change.detach()
    return loss.sum(), metrics


def mean_field_actor_loss(nets: Nets, batch: Batch, noise: Batch, env, args: Args):
    """ALGO LOGIC: the policy loss, -Q at each agent's own present action, the others' present ones as constants, plus
    lambda R_W of the actor: loss, metrics."""
    crowd = crowd_of(batch["own"])
    z = respond(nets, "actor", batch["own"], crowd, batch["landmarks"], args)  # [S, M, N, A]
    action = squash_agents(z, env)
    critic = nets | {
        f"critic_{part}": MLP(nets[f"critic_{part}"].flat.detach(), nets[f"critic_{part}"].sizes) for part in PARTS
    }
    q = mean_field_q(critic, "critic", batch, crowd, action, others_mean(action.detach()), args)
    policy_loss = -q.mean((1, 2))
    loss = policy_loss + args.policy_l2 * z.square().mean((1, 2, 3))
    metrics = {"losses/actor_loss": policy_loss.detach()}
    if args.regularized and args.regularize != "critic":
        rows = noise["crowd"].shape[1]
        change = change_of_actor(nets, batch, rows, args)
        change, _ = crowd_regularizer(args.regularizer, change, crowd.squeeze(2)[:, :rows], noise["crowd"], args)
        loss = loss + args.reg_coef * change.mean(1)
        metrics["ernie/actor_regularizer"] = change.detach().mean(1)
    return loss.sum(), metrics


def squash_agents(z: Tensor, env) -> Tensor:
    """Deterministic actions: tanh scaled to the action range; z [S, M, N, A]."""
    return (env.action_high + env.action_low) / 2 + (env.action_high - env.action_low) / 2 * torch.tanh(z)


def average_ranks(*tensors: Tensor) -> list[Tensor]:
    """Means over the ranks of torchrun that train the same seeds, all in one message."""
    if not dist.is_initialized():
        return list(tensors)
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors)]


def descend(loss: Tensor, nets: list[MLP], optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """One optimiser step; the gradient of each network of each seed is clipped on its own."""
    grads = average_ranks(*torch.autograd.grad(loss, [net.flat for net in nets]))
    for net, grad in zip(nets, grads):
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        net.flat.grad = grad * (max_grad_norm / norm.clamp_min(max_grad_norm))
    optimizer.step()


def update_mean_field(nets: Nets, optimizers, losses, batch: Batch, noise: Batch, env, args: Args) -> Batch:
    """A step of the critic and its target, then of the actor and its."""
    metrics = {}
    for role in ("critic", "actor"):
        loss, more = losses[role](nets, batch, noise, env, args)
        names = [f"{role}_{part}" for part in PARTS]
        descend(loss, [nets[name] for name in names], optimizers[role], args.max_grad_norm)
        for name in names:
            nets[name + "_target"].flat.lerp_(nets[name].flat.detach(), args.tau)
        metrics |= more
    return metrics


def draw_moves(generators: Generators, env, args: Args) -> Batch:
    """The random numbers of one update."""
    N, M, A, noise = env.num_agents, min(args.batch_size, args.reg_batch_size), env.action_mask.shape[1], {}
    if args.regularized:
        noise["crowd"] = draw(torch.randn, (M, 2 * N), generators)
    if args.mean_action_epsilon > 0:
        noise["mean_action"] = draw(torch.randn, (M, N, A), generators)
    return noise


def diagnose_crowd(nets: Nets, batch: Batch, noise: Tensor, env, args: Args) -> Batch:
    """Of each regularised network: R_W under attack and in a random direction, W, and the leader-follower term of the
    Stackelberg gradient with respect to its head: its norm relative to the leader's, and their cosine."""
    rows, crowd, found = noise.shape[1], crowd_of(batch["own"]).squeeze(2)[:, : noise.shape[1]], {}
    z = respond(nets, "actor", batch["own"], crowd_of(batch["own"]), batch["landmarks"], args).detach()
    changes = {"critic": change_of_q(nets, batch, rows, squash_agents(z, env), args)}
    changes["actor"] = change_of_actor(nets, batch, rows, args)
    for role in ("critic", "actor") if args.regularize == "both" else (args.regularize,):
        gradients = []
        for mode in ("adversarial", "stackelberg"):
            change, delta = crowd_regularizer(mode, changes[role], crowd, noise, args)
            (grad,) = torch.autograd.grad(change.mean(1).sum(), [nets[f"{role}_head"].flat], retain_graph=True)
            gradients.append(grad)
        leader, follower = gradients[0], gradients[1] - gradients[0]
        at_random, _ = crowd_regularizer("random", changes[role], crowd, noise, args)
        moved = crowd + delta.detach().unflatten(-1, (-1, 2))
        found |= {
            f"ernie/{role}_attack": change.detach().mean(1),
            f"ernie/{role}_random_direction": at_random.detach().mean(1),
            f"ernie/{role}_wasserstein": wasserstein(moved, crowd, args).mean(1),
            f"ernie/{role}_interaction_ratio": follower.norm(dim=1) / leader.norm(dim=1),
            f"ernie/{role}_interaction_cosine": F.cosine_similarity(follower, leader, dim=1),
        }
    return found


# --------------------------------------------------------------------------------------------------------------------
# Rollout and replay of whole episodes. What every agent knows stands once: memory is linear in N.


def make_crowd_replay(env, num_seeds: int, num_episodes: int) -> Batch:
    """Of E episodes: body [S, E, T + 1, N, 4], landmarks [S, E, L, 2], actions [S, E, T, N, A], rewards [S, E, T, N],
    terminated [S, E, T]."""
    N, T, A = env.num_agents, env.horizon, env.action_mask.shape[1]
    shapes = {"body": (T + 1, N, 4), "landmarks": (N, 2), "actions": (T, N, A), "rewards": (T, N), "terminated": (T,)}
    return {k: torch.zeros(num_seeds, num_episodes, *v, dtype=env.dtype, device=env.device) for k, v in shapes.items()}


def views(obs: Tensor, env) -> tuple[Tensor, Tensor]:
    """The crowd [S, B, N, N, 2] and the landmarks [S, B, N, L, 2] as each agent sees them: obs [S, B, N, O] has, after
    velocity and place, where the landmarks and then the others are, seen from the agent."""
    N, place = env.num_agents, obs[..., None, 2:4]
    landmarks, others = obs[..., 4 : 4 + 2 * N], obs[..., 4 + 2 * N : 2 + 4 * N]
    crowd = torch.cat([place, others.unflatten(-1, (N - 1, 2)) + place], -2)
    return crowd, landmarks.unflatten(-1, (N, 2)) + place


@torch.no_grad()
def rollout_crowd(
    step: Callable, env, nets: Nets, replay: Batch, slot: int, std: float, generators, args: Args
) -> Tensor:
    """An episode of every environment, with exploration, into replay from `slot` on; mean return of agents [S, N]."""
    S, B = args.num_seeds, args.num_envs
    part = {k: v[:, slot : slot + B] for k, v in replay.items()}
    state, obs = env.reset(generators)
    noise = draw(torch.randn, (env.horizon, B, env.num_agents, env.action_mask.shape[1]), generators).unbind(1)
    half, obs = (env.action_high - env.action_low) / 2, obs.unflatten(0, (S, B))
    part["body"][:, :, 0] = obs[..., :4]
    part["landmarks"].copy_(views(obs, env)[1][:, :, 0])
    landmarks = part["landmarks"].unsqueeze(2)
    for t in range(env.horizon):
        body = part["body"][:, :, t]
        own = perceive(body, crowd_of(body), landmarks, args)
        action = squash_agents(respond(nets, "actor", own, crowd_of(own), landmarks, args), env)
        action = (action + std * half * noise[t]).clamp(env.action_low, env.action_high)
        state, obs, reward, terminated, _, _ = step(state, action.flatten(0, 1), env.draw(generators))
        part["actions"][:, :, t] = action
        part["body"][:, :, t + 1] = obs.unflatten(0, (S, B))[..., :4]
        part["rewards"][:, :, t] = reward.unflatten(0, (S, B))
        part["terminated"][:, :, t] = terminated.unflatten(0, (S, B)).to(env.dtype)
    return part["rewards"].sum(2).mean(1)


def sample_crowds(replay: Batch, filled: int, batch_size: int, generators: Generators) -> Batch:
    """Uniform minibatch of the first `filled` episodes: body, next_body [S, M, N, 4], landmarks [S, M, 1, L, 2],
    actions [S, M, N, A], rewards [S, M, N], terminated [S, M]."""
    S, E, T = replay["terminated"].shape
    pick = torch.stack([torch.randint(filled * T, (batch_size,), generator=g, device=g.device) for g in generators])
    pick = pick + E * T * torch.arange(S, device=pick.device)[:, None]  # [S, M] into the flattened [S, E, T]
    row, episode = pick + pick // T, pick // T  # an episode has one observation more than transitions
    rows = {"body": row, "next_body": row + 1, "actions": pick, "rewards": pick, "terminated": pick}
    batch = {
        k: replay[k.removeprefix("next_")].flatten(0, 2)[i.flatten()].unflatten(0, i.shape) for k, i in rows.items()
    }
    landmarks = replay["landmarks"].flatten(0, 1)[episode.flatten()].unflatten(0, episode.shape)
    return batch | {"landmarks": landmarks.unsqueeze(2)}


def add_own(batch: Batch, args: Args) -> Batch:
    """The batch with own states own, next_own [S, M, N, 4 + 2 k]."""
    bodies = {"own": batch["body"], "next_own": batch["next_body"]}
    return batch | {k: perceive(body, crowd_of(body), batch["landmarks"], args) for k, body in bodies.items()}


# --------------------------------------------------------------------------------------------------------------------
# Robustness evaluation

DYNAMICS = ("damping", "mass", "max_speed_scale", "contact_force")
SWEEP = {  # perturbation: strengths
    "gaussian": (0.1, 0.2, 0.5, 1.0),  # observation noise, standard deviation (paper, Figure 4)
    "uniform": (0.1, 0.2, 0.5, 1.0),  # observation noise, half-width
    "mad": (0.1, 0.2, 0.5, 1.0),  # radius; the observations that change the policy most (maximal action difference)
    "random_action": (0.03, 0.05, 0.2, 0.5),  # probability that one agent acts at random in a step
    **{name: (0.25, 0.5, 2.0, 4.0) for name in DYNAMICS},  # factor on the trained value
}


def make_crowd_env(args: Args, num_envs: int, device: torch.device, family: str = "clean", strength: float = 0.0):
    """The task of `args`, with a physical constant multiplied by `strength`, or with so many agents."""
    count = int(strength) if family == "agents" else args.num_agents
    env = envs.make(args.env_id, num_envs, device, num_agents=count)
    return replace(env, **{family: strength * getattr(env, family)}) if family in DYNAMICS else env


def act_on(nets: Nets, obs: Tensor, env, args: Args) -> Tensor:
    """Actor's output before tanh [S, B, N, A] at observations [S, B, N, O], of which every agent has its own."""
    crowd, landmarks = views(obs, env)
    return respond(nets, "actor", perceive(obs[..., :4], crowd, landmarks, args), crowd, landmarks, args)


def mad_attack(nets: Nets, obs: Tensor, epsilon: float, generators: Generators, env, args: Args) -> Tensor:
    """Observations [S, B, N, O] in an l2 ball around obs that change the actor's output most (maximal action
    difference), by ten projected ascent steps. Entries of the mute agents' messages stay at 0."""
    live = torch.arange(obs.shape[-1], device=obs.device) < 2 + 4 * env.num_agents
    z = act_on(nets, obs, env, args)

    def objective(delta: Tensor) -> Tensor:
        return (act_on(nets, obs + live * delta, env, args) - z).square().sum(-1)

    start = rescale(draw(torch.randn, obs.shape[1:], generators) * live, 0.5 * epsilon, "l2")
    ball = partial(project, epsilon=epsilon, norm="l2")
    return obs + unroll(objective, start, 10, 0.25 * epsilon, ball, stackelberg=False)


@torch.no_grad()
def crowd_returns(env, nets, args: Args, generators, family: str = "clean", strength=0.0, frames=None) -> Tensor:
    """Returns of deterministic policies, mean over agents, [S, episodes], under one perturbation of SWEEP. Pictures of
    the first environment are appended to `frames`."""
    S, total = args.num_seeds, 0.0
    state, obs = env.reset(generators)
    for _ in range(env.horizon):
        if frames is not None:
            frames.append(Image.fromarray(env.render(state, 0)))
        if family in ("gaussian", "uniform"):
            obs = perturb.observation_noise(env, obs, family, strength, generators)
        obs = obs.unflatten(0, (S, -1))
        if family == "mad":
            obs = mad_attack(nets, obs, strength, generators, env, args)
        action = squash_agents(act_on(nets, obs, env, args), env).flatten(0, 1)
        if family == "random_action":
            action = perturb.replace_actions(env, action, perturb.random_actions(env, generators), strength, generators)
        state, obs, reward, _, _, _ = env.step(state, action, env.draw(generators))
        total = total + reward
    return total.mean(1).unflatten(0, (S, -1))


def crowd_report(nets: Nets, args: Args, device: torch.device, run_dir: Path, wandb_runs: list) -> None:
    """Sweep all perturbations and numbers of agents on fresh environments: a table on the terminal, robustness.csv and
    .png, and in wandb. 95% t-intervals over seeds; with one seed, over its episodes."""
    env = make_crowd_env(args, 1, device)
    sweep = {f: strengths for f, strengths in SWEEP.items() if f not in DYNAMICS or f in env.dynamics}
    sweep["agents"] = args.eval_agents
    points = [("clean", 0.0), *((family, strength) for family in sweep for strength in sweep[family])]
    columns = ["env_id", "num_agents", "regularizer", "seed", "perturbation", "strength", "return", "standard_error"]
    rows, table = [], {}
    for family, strength in tqdm(points, desc="robustness", unit="point", disable=None, leave=False):
        episodes = args.eval_episodes
        if family == "agents":  # the same number of agents in all
            episodes = max(1, episodes * args.num_agents // int(strength))
        env = make_crowd_env(args, args.num_seeds * episodes, device, family, strength)
        generators = make_generators(args.seed, args.num_seeds, "evaluation", device)
        returns = crowd_returns(env, nets, args, generators, family, strength).double().cpu().numpy()
        for k, values in enumerate(returns):
            row = [args.env_id, args.num_agents, args.regularizer, args.seed + k, family, strength, values.mean()]
            rows.append([*row, values.std() / len(values) ** 0.5, len(values)])
        found = returns.mean(1) if args.num_seeds > 1 else returns[0]
        half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found) if len(found) > 1 else math.nan
        table.setdefault(family, {})[strength] = (found.mean(), half)
    columns, path = [*columns, "episodes"], run_dir / "robustness.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    plot_crowd(table, args, path.with_suffix(".png"))
    over = f"{args.num_seeds} seeds" if args.num_seeds > 1 else f"{args.eval_episodes} episodes"
    print(
        f"\nReturn of an agent, {args.env_id}, N = {args.num_agents}, {args.regularizer}: mean and 95% interval, {over}"
    )
    for family, cells in table.items():
        cells = (f"{strength:>4g}: {mean:7.2f} ± {half:<5.2f}" for strength, (mean, half) in cells.items())
        print(f"  {family:16s}" + "   ".join(cells))
    with wandb_may_fail(wandb_runs):
        for k, run in enumerate(wandb_runs):
            import wandb

            data = [row for row in rows if row[3] == args.seed + k]
            image = wandb.Image(str(path.with_suffix(".png")))
            run.log({"robustness": wandb.Table(columns=columns, data=data), "robustness_plot": image})
            run.finish()


def plot_crowd(table: dict[str, dict[float, tuple[float, float]]], args: Args, path: Path) -> None:
    """Return against strength, a panel per perturbation, with what was trained at 0, at factor 1, or at N agents."""
    families = [f for f in table if f != "clean"]
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    for place, family in enumerate(families):
        axis = figure.add_subplot(2, 5, place + 1)
        trained = args.num_agents if family == "agents" else float(family in DYNAMICS)
        points = sorted((table[family] | {trained: table["clean"][0.0]}).items())
        mean, half = np.array([value for _, value in points]).T
        axis.errorbar(range(len(points)), mean, np.nan_to_num(half), marker="o", ms=3, capsize=2)
        axis.set_xticks(range(len(points)), [f"{strength:g}" for strength, _ in points])
        axis.set(title=family, xlabel="N" if family == "agents" else "factor" if family in DYNAMICS else "strength")
        axis.grid(alpha=0.3)
    figure.supylabel("episodic return of an agent")
    seeds = f"{args.num_seeds} seed{'s' * (args.num_seeds > 1)}"
    figure.suptitle(f"{args.env_id}, N = {args.num_agents}, {args.regularizer}, {seeds}")
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


def make_mean_field(env, args: Args, state: dict | None = None) -> tuple[Nets, dict[str, torch.optim.Optimizer]]:
    """Actor, critic and their targets, each a head and two encoders; an Adam for the actor and one for the critic. As
    in checkpoint `state`."""
    generators = make_generators(args.seed, args.num_seeds, "init", env.device)
    A, H, nets, optimizers = env.action_mask.shape[1], args.hidden_size, {}, {}
    seen = 4 + 2 * (args.nearest_landmarks + args.nearest_agents)
    for role, own, out in (("actor", seen, A), ("critic", seen + 2 * A, 1)):
        nets[f"{role}_head"] = init_mlp([own + 2 * H, H, H, out], 1, generators)
        nets |= {f"{role}_{part}": init_mlp([2, H, H], 1, generators) for part in PARTS[1:]}
        parameters = [nets[f"{role}_{part}"].flat for part in PARTS]
        optimizers[role] = torch.optim.Adam(parameters, args.learning_rate, fused=True)
    nets |= {name + "_target": MLP(net.flat.detach().clone(), net.sizes) for name, net in nets.items()}
    if state is not None:
        for name, net in nets.items():
            net.flat.detach().copy_(state["nets"][name])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    return nets, optimizers


def train(env, nets, optimizers, args: Args, run_dir: Path, wandb_runs: list, state: dict | None = None) -> bool:
    """Train from the start or from `state`, a checkpoint. False: Ctrl-C or SIGTERM ended it, after a checkpoint."""
    options = {"comprehensive_padding": False}  # with it gradients are wrong on GPUs (torch 2.11)
    compiled = partial(torch.compile, fullgraph=True, options=options) if args.compile else lambda f: f
    env_step = compiled(env.step)
    # on CPUs torch.compile (2.13) gets the gradient through the unrolled attack wrong
    exact = env.device.type == "cuda" or not (args.regularized or args.mean_action_epsilon > 0)
    losses = {"critic": mean_field_critic_loss, "actor": mean_field_actor_loss}
    losses = {name: compiled(loss) if exact else loss for name, loss in losses.items()}
    names, per_iteration = ("rollout", "replay", "noise"), args.num_envs * env.horizon
    streams = {name: make_generators(args.seed, args.num_seeds, name, env.device, RANK) for name in names}
    slots = args.buffer_size // per_iteration  # a slot is an episode of each environment
    replay = make_crowd_replay(env, args.num_seeds, slots * args.num_envs)
    log_path, iteration, num_updates = run_dir / "metrics.csv", 0, 0
    labels = run_labels(args)
    sums, returns, count, first = {}, 0.0, 0, 0  # of metrics, of returns, updates: since the log at iteration `first`
    if state is not None:
        for name, generators in streams.items():
            for generator, saved in zip(generators, state["streams"][name]):
                generator.set_state(saved)
        for name, tensor in replay.items():
            tensor[:, : state["replay"][name].shape[1]] = state["replay"][name]
        iteration, num_updates = state["iteration"], state["num_updates"]
        if dist.is_initialized():
            steps = [None] * dist.get_world_size()
            dist.all_gather_object(steps, iteration)
            if len(set(steps)) > 1:
                fail(f"the ranks' checkpoints in {run_dir} are of different iterations: {steps}")
        sums, returns, count, first = state["window"]
        sums, returns = {k: v.to(env.device) for k, v in sums.items()}, torch.as_tensor(returns, device=env.device)
        if RANK == 0 and log_path.exists():  # drop rows that will be written again, and one cut off by a kill
            os.truncate(log_path, state["log_size"])
    stops, is_over = [], iteration * per_iteration >= args.total_timesteps
    handlers = {s: signal.signal(s, lambda *caught: stops.append(caught)) for s in (signal.SIGINT, signal.SIGTERM)}
    step, started = iteration * per_iteration, time.perf_counter()
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=True if RANK else None)
    while not is_over:
        progress = step / args.total_timesteps
        std = args.exploration_noise + (args.exploration_noise_end - args.exploration_noise) * progress
        slot = iteration % slots * args.num_envs
        returns = returns + rollout_crowd(env_step, env, nets, replay, slot, std, streams["rollout"], args)
        iteration += 1
        last_step, step = step, iteration * per_iteration
        filled = min(iteration, slots) * args.num_envs
        for _ in range(max(0, step - args.learning_starts) // args.steps_per_update - num_updates):
            batch = add_own(sample_crowds(replay, filled, args.batch_size, streams["replay"]), args)
            noise = draw_moves(streams["noise"], env, args)
            metrics = update_mean_field(nets, optimizers, losses, batch, noise, env, args)
            sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
            count, num_updates = count + 1, num_updates + 1
        bar.update(per_iteration)
        is_done, is_over = step >= args.total_timesteps, bool(stops) or step >= args.total_timesteps
        if dist.is_initialized():  # all ranks stop together
            over = torch.tensor(float(is_over), device=env.device)
            dist.all_reduce(over)
            is_over = bool(over)
        log = count > 0 and (is_done or step // args.log_interval > last_step // args.log_interval)
        save = is_over or step // args.checkpoint_interval > last_step // args.checkpoint_interval
        for name, value in sums.items() if log or save else ():
            if not value.isfinite().all():
                good = run_dir / CHECKPOINT if (run_dir / CHECKPOINT).exists() else "none yet"
                fail(f"{name} is not finite at step {step}; last good checkpoint: {good}")
        if log:
            row = {"charts/episodic_return": returns.mean(1) / (iteration - first)}
            row |= {name: value / count for name, value in sums.items()}
            test_streams = make_generators(args.seed, args.num_seeds, "test", env.device)
            test = make_crowd_env(args, args.num_seeds * min(100, args.eval_episodes), env.device)
            row["eval/episodic_return"] = crowd_returns(test, nets, args, test_streams).mean(1)
            if args.regularized:
                batch = add_own(sample_crowds(replay, filled, args.batch_size, test_streams), args)
                row |= diagnose_crowd(nets, batch, draw_moves(test_streams, env, args)["crowd"], env, args)
            speed = args.num_seeds * per_iteration * (iteration - first) / (time.perf_counter() - started)
            row["charts/SPS"] = torch.full((args.num_seeds,), round(speed))
            if RANK == 0:
                log_metrics(log_path, wandb_runs, labels, step, row)
            bar.set_postfix(episodic_return=f"{row['eval/episodic_return'].mean():.2f}", refresh=False)
            sums, returns, count, first, started = {}, 0.0, 0, iteration, time.perf_counter()
        if save:
            data = {"script": Path(__file__).stem, "args": asdict(args), "iteration": iteration}
            data |= {"num_updates": num_updates, "window": (sums, returns, count, first)}
            data |= {"log_size": log_path.stat().st_size if log_path.exists() else 0}
            data |= {"nets": {name: net.flat.detach() for name, net in nets.items()}}
            data |= {"optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}}
            data |= {"streams": {p: [g.get_state() for g in generators] for p, generators in streams.items()}}
            data |= {"replay": {name: tensor[:, :filled].clone() for name, tensor in replay.items()}}
            save_checkpoint(run_dir / CHECKPOINT, data)
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return step >= args.total_timesteps


def main() -> None:
    args = parse_args()
    args, state, run_dir = load_run(args) if args.resume or args.evaluate else (args, None, None)
    device = setup(args)
    env = make_crowd_env(args, args.num_seeds * args.num_envs, device)
    if args.buffer_size < args.num_envs * env.horizon:
        fail(f"--buffer-size must hold {args.num_envs * env.horizon} steps, num_envs episodes, got {args.buffer_size}")
    nets, optimizers = make_mean_field(env, args, state)
    run_dir = run_dir or make_run_dir(args)
    wandb_runs = [] if args.evaluate else start_wandb(args, run_dir, run_labels(args))
    if not args.evaluate and not train(env, nets, optimizers, args, run_dir, wandb_runs, state):
        print(f"stopped; go on with: python {Path(__file__).name} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(130)
    if RANK == 0:
        crowd_report(nets, args, device, run_dir, wandb_runs)
        if args.capture_video:
            frames, streams = [], make_generators(args.seed, args.num_seeds, "video", device)
            crowd_returns(make_crowd_env(args, args.num_seeds, device), nets, args, streams, frames=frames)
            (run_dir / "videos").mkdir(exist_ok=True)
            path = run_dir / "videos" / "episode.gif"
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
