"""ERNIE-COMA: counterfactual multi-agent policy gradients, kept smooth by an adversarial regulariser.

COMA (Foerster et al. 2018, arXiv 1705.08926; ERNIE's appendix E.3) trains a stochastic policy per agent on its own
observation. A central critic sees everybody's observations and what the others do, and has a head for each action of
the agent it is asked about, so that one pass gives the counterfactual advantage: how much better the agent's action was
than its policy's average, the others acting as they did. ERNIE (Bukharin et al. 2023, arXiv 2310.10810) adds the
largest divergence of each policy under a small perturbation of its observation (Eq. 4, 5), found by K steps of
projected gradient ascent through which the gradient of the policy flows (Eq. 6, the Stackelberg game).

    python ernie_coma.py --epsilon 0.1                            # 2 x 2 traffic lights: minutes on two CPU cores
    python ernie_coma.py --num-seeds 5 --compile                  # five runs side by side, the environment compiled
    python ernie_coma.py --env-id simple_spread_v3 --epsilon 0.1  # a particle task with discrete actions

Differences to the paper, by their number in the README: 1 l2 ball in standard deviations, 2 KL of the policies, 5 on
the on-policy batch, 7 projection after every step, 8 random start, 36 mean instead of sum, 39 Gaussian noise of mean
length epsilon, 41 mean reward.

Axes: S seeds, N agents, B environments of a seed, T steps of a rollout, M = B * T samples, O observation, A action; in
evaluation P points, E episodes, L lights.
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
from envs import particle, perturb, sumo, traffic

Generators = list[torch.Generator]  # one per seed
Batch = dict[str, Tensor]  # a rollout, the random numbers of an update, or metrics [S]
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
    """compile the environment step, on a GPU the losses too (torch.compile): half a minute a shape, then 9x as fast"""
    runs_dir: str = "runs"
    """folder that receives a folder per run"""
    resume: str | None = None
    """run folder or checkpoint file to continue; all other flags are read from it"""
    evaluate: str | None = None
    """run folder or checkpoint file whose policies are evaluated again, without training"""
    backend: Literal["torch", "sumo"] = "torch"
    """with --evaluate: the batched simulator or SUMO (requirements-sumo.txt), a process per environment"""
    capture_video: bool = False
    """write a GIF of the trained policies"""
    track: bool = True
    """log to Weights & Biases, one run per seed"""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no account; `wandb sync` uploads later"""
    wandb_project_name: str = "robust-marl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team"""

    env_id: str = "traffic_grid_v0"
    """traffic_grid_v0, traffic_irregular_v0, traffic_atlanta_v0, or a particle task such as simple_spread_v3"""
    num_agents: int | None = None
    """agents of simple_spread_v3; default: the task's own"""
    rows: int | None = None
    """rows of lights; default: the task's own (traffic_grid_v0: 2)"""
    cols: int | None = None
    """columns of lights; default: the task's own"""
    flow: tuple[float | str, ...] = ()
    """cars per hour: train, flow1 ... flow5 (paper, table 1), one number, or one per entry; default: the task's own"""
    model: Literal["idm", "krauss"] = "idm"
    """car-following model (paper's code: idm)"""
    total_timesteps: int = 960_000
    """environment steps (seconds) of one seed (paper: 15,000)"""
    num_envs: int = 32
    """B, environments of one seed that step together (paper: 1)"""
    horizon: int = 2000
    """traffic: seconds of an episode (paper: 3,000); a particle task has its own"""
    warmup: int = 1000
    """traffic: of these, seconds of random switching at the start, not learnt from (paper's code: 1,000)"""
    rollout_steps: int = 5
    """T, steps between updates, a divisor of the episode that is learnt from (paper's code: 50)"""
    critic_updates: int = 4
    """gradient steps of the critic on each rollout; the policy takes one"""
    learning_rate: float = 1e-3
    """Adam step size of the policies (paper's code: 5e-5)"""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critic (paper's code: 5e-4)"""
    anneal_lr: bool = True
    """let both step sizes fall linearly to 0"""
    gamma: float = 0.99
    """discount factor of a step (paper's code: 0.95)"""
    td_lambda: float = 0.8
    """lambda of the critic's TD(lambda) targets"""
    tau: float = 0.1
    """share by which the target critic moves at each of its updates"""
    hidden_size: int = 128
    """width of the two hidden layers (paper: 256; its code: 64 in the policies)"""
    activation: Literal["relu", "silu", "tanh"] = "relu"
    """hidden activation"""
    exploration: float = 0.02
    """epsilon of the policy (1 - epsilon) softmax + epsilon / A at the start (COMA's paper: 0.5; ERNIE's code: 0.05)"""
    exploration_end: float = 0.0
    """the same at the end, linear in between (COMA's paper: 0.02)"""
    idle_logit: float | None = None
    """head start of action 0 in the untrained policies; default: 2 in traffic, where it keeps the lights for some ten
    seconds, as long as it takes to see what that is good for, else 0"""
    entropy_coef: float = 0.01
    """weight of the policies' entropy at the start"""
    entropy_coef_end: float = 0.0
    """the same at the end, linear in between"""
    normalize_advantage: bool = True
    """divide the advantages of a rollout and seed by their standard deviation"""
    reward_scale: float = 0.01
    """factor on the rewards that are learnt from"""
    team_reward: Literal["own", "mean", "sum"] = "own"
    """what an agent learns from: its own reward, or the mean or the sum of its team's"""
    max_grad_norm: float = 10.0
    """the gradient of each network of each seed is clipped to this norm"""

    regularizer: Literal["none", "gaussian", "random", "adversarial", "stackelberg"] = "stackelberg"
    """none: COMA; gaussian: appendix H; random: a direction of length epsilon; adversarial: Eq. 4; stackelberg: 6"""
    epsilon: float = 0.1
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
    reg_coef: float = 1.0
    """lambda, weight of the regulariser (paper's code: 0.1)"""
    reg_batch_size: int = 160
    """samples of the rollout on which the regulariser is estimated"""
    divergence: Literal["kl", "l2_probs", "l2"] = "kl"
    """D: KL of the policies (paper), squared l2 of their probabilities (its code, unsquared) or of their logits"""
    detach_reference: bool = False
    """treat the clean policy in D as a constant"""
    gaussian_std: float | None = None
    """standard deviation of the gaussian mode; default: mean length epsilon (the paper's text: 1)"""

    log_interval: int = 96_000
    """environment steps between two rows of metrics.csv"""
    checkpoint_interval: int = 192_000
    """environment steps between two checkpoints"""
    eval_policy: Literal["greedy", "sample"] = "greedy"
    """in evaluation: the likeliest action, or a sample as in training"""
    eval_episodes: int | None = None
    """episodes of one seed at each point of the robustness report; default: 4 of traffic, 1,000 of a particle task"""
    eval_warmup: int = 1000
    """traffic: seconds of random switching before an evaluation (paper: 1,000)"""
    eval_seconds: int = 1000
    """traffic: seconds of an evaluation (paper: 4,000)"""

    def __post_init__(self):
        floats = " ".join(name for name, value in asdict(self).items() if isinstance(value, float))
        counts = "num_seeds num_threads num_agents rows cols total_timesteps num_envs horizon rollout_steps"
        amounts = "seed warmup entropy_coef entropy_coef_end epsilon attack_steps reg_coef eval_warmup"
        for names, holds, rule in (
            (floats, math.isfinite, "a finite number"),
            (counts, lambda v: v >= 1, "at least 1"),
            ("critic_updates hidden_size reg_batch_size", lambda v: v >= 1, "at least 1"),
            ("log_interval checkpoint_interval eval_episodes eval_seconds", lambda v: v >= 1, "at least 1"),
            ("learning_rate critic_learning_rate", lambda v: v > 0, "above 0"),
            ("reward_scale max_grad_norm attack_lr gaussian_std", lambda v: v > 0, "above 0"),
            (amounts, lambda v: v >= 0, "0 or more"),
            ("warmup", lambda v: v < self.horizon, "below --horizon"),
            ("gamma td_lambda tau exploration exploration_end", lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("attack_init", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("flow", lambda v: len(v) < 2 or not any(isinstance(rate, str) for rate in v), "a name, or numbers"),
            ("num_agents", lambda v: not self.is_traffic, "left out with traffic, where --rows and --cols choose"),
            ("rows cols flow", lambda v: self.is_traffic or not v, "left out with a particle task"),
            ("backend", lambda v: v == "torch" or self.evaluate, "torch unless --evaluate is given"),
            ("backend", lambda v: v == "torch" or self.is_traffic, "torch with a particle task"),
            ("resume", lambda v: not self.evaluate, "left out with --evaluate"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {value!r}")
        if self.attack_lr is None:
            self.attack_lr = 1.0 if self.attack_steps <= 1 else 2.5 / self.attack_steps
        if self.idle_logit is None:
            self.idle_logit = 2.0 if self.is_traffic else 0.0
        if self.eval_episodes is None:
            self.eval_episodes = 4 if self.is_traffic else 1000

    @property
    def is_traffic(self) -> bool:
        return self.env_id.startswith("traffic")

    @property
    def regularized(self) -> bool:
        """Whether the regulariser does anything: with K, epsilon or lambda at 0 this is COMA, at its speed."""
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


Nets = dict[str, MLP]  # actor, critic, critic_target


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


def policy(actor: MLP, obs: Tensor, env, args: Args) -> Tensor:
    """Actions before tanh, or logits: obs [S, N, M, O] -> [S, N, M, A]. Padding is 0, or -1e9 where discrete."""
    z = forward(actor.layers(), obs, args.activation)
    return torch.where(env.action_mask[:, None], z, -1e9 if env.discrete else 0.0)


def gumbel(shape: tuple[int, ...], **where) -> Tensor:
    """Standard Gumbel noise."""
    return -torch.log(-torch.log(torch.rand(shape, **where).clamp(1e-10, 1 - 1e-7)))


def explore(z: Tensor, exploration: Tensor, env) -> Tensor:
    """Log-probabilities [S, N, M, A] of the policies that act: softmax of logits z, mixed with the uniform one."""
    uniform = torch.where(env.action_mask, -env.action_mask.sum(1, keepdim=True).to(z.dtype).log(), -1e9)[:, None]
    return torch.logaddexp(torch.log1p(-exploration) + F.log_softmax(z, -1), exploration.log() + uniform)


def counterfactual_values(critic: MLP, x: Tensor, joint: Tensor, args: Args) -> Tensor:
    """Q(s, (a_-n, .)) [S, N, M, A] of every action of each agent, the others acting as in joint [S, M, N, A], one-hot,
    in states x [S, 1, M, N * O]. Inputs of the critic: the state, the others' actions, one-hot, and the agent's number;
    the state passes the first layer once for all agents."""
    N, A = joint.shape[2:]
    (weight, bias), *rest = critic.layers()
    encoded = torch.baddbmm(bias, weight[:, :, : x.shape[-1]], x.squeeze(1).mT)  # [S, H, M]
    others = joint.unsqueeze(2) * (1 - torch.eye(N, dtype=joint.dtype, device=joint.device)).unsqueeze(2)
    h = torch.bmm(weight[:, :, x.shape[-1] : -N], others.flatten(3).flatten(1, 2).mT).unflatten(2, (-1, N))
    h = ACTIVATIONS[args.activation](h + encoded.unsqueeze(3) + weight[:, :, None, -N:])  # [S, H, M, N]
    return forward(rest, h.flatten(2).mT.unsqueeze(1), args.activation).view(*joint.shape).transpose(1, 2)


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
# Losses and update. Observations are normalised from here on.


def perturbation_unit(norm: Tensor, args: Args) -> Tensor:
    """One unit of delta in each entry of a normalised observation [S, N, 1, O], 0 where it does not vary."""
    std = norm[:, :, 1:]
    return (std > 0).to(std.dtype) if args.epsilon_units == "std" else torch.where(std > 0, 1 / std, 0)


def everybody(obs: Tensor) -> Tensor:
    """The state, what the global Q sees: [S, N, M, O] -> [S, 1, M, N * O]."""
    return obs.transpose(1, 2).flatten(2).unsqueeze(1)


def td_lambda_targets(rewards: Tensor, values: Tensor, terminated: Tensor, args: Args) -> Tensor:
    """TD(lambda) targets [..., T]: G_t = r_t + gamma ((1 - lambda) Q_t+1 + lambda G_t+1), G_T = Q_T. rewards and
    terminated [..., T]; values [..., T + 1] are Q of the actions that were taken."""
    target, targets = values[..., -1], []
    for t in reversed(range(rewards.shape[-1])):
        blend = (1 - args.td_lambda) * values[..., t + 1] + args.td_lambda * target
        target = rewards[..., t] + args.gamma * (1 - terminated[..., t]) * blend
        targets.append(target)
    return torch.stack(targets[::-1], -1)


def shared_rewards(rewards: Tensor, env, args: Args) -> Tensor:
    """What each agent learns from, [..., N]: its team's mean or sum, or its own reward."""
    if args.team_reward == "own":
        return args.reward_scale * rewards
    team = (env.cooperators[:, None] == env.cooperators).to(rewards.dtype)  # [N, N]
    return args.reward_scale * rewards @ (team if args.team_reward == "sum" else team / team.sum(0))


def prepare_rollout(nets: Nets, rollout: Batch, norm: Tensor, env, args: Args) -> Batch:
    """A rollout as the losses take it: obs [S, N, M, O] normalised, x [S, 1, M, N * O] the same of everybody, joint
    actions [S, M, N, A] one-hot, targets [S, N, M] of the critic, M = B * T."""
    T, rewards = args.rollout_steps, shared_rewards(rollout["rewards"], env, args)
    obs = normalize(rollout["obs"].flatten(1, 2).transpose(1, 2), norm)  # [S, N, B * (T + 1), O]
    joint = torch.cat([rollout["actions"], rollout["last_action"].unsqueeze(2)], 2).flatten(1, 2)
    with torch.no_grad():
        q = counterfactual_values(nets["critic_target"], everybody(obs), joint, args)  # [S, N, B * (T + 1), A]
        values = (q * joint.transpose(1, 2)).sum(-1).unflatten(2, (-1, T + 1))
        ended = rollout["terminated"].unsqueeze(1)  # [S, 1, B, T]
        targets = td_lambda_targets(rewards.movedim(3, 1), values, ended, args).flatten(2)
    obs = obs.unflatten(2, (-1, T + 1))[:, :, :, :-1].flatten(2, 3)
    return {"obs": obs, "x": everybody(obs), "joint": rollout["actions"].flatten(1, 2), "targets": targets}


def coma_critic_loss(nets: Nets, batch: Batch, args: Args):
    """L(theta^c) of appendix E.3 with TD(lambda) targets: loss, metrics."""
    q = counterfactual_values(nets["critic"], batch["x"], batch["joint"], args)
    taken = (q * batch["joint"].transpose(1, 2)).sum(-1)
    loss = 0.5 * (taken - batch["targets"]).square().mean((1, 2))
    return loss.sum(), {"losses/critic": loss.detach(), "losses/q_values": taken.detach().mean((1, 2))}


def counterfactual_advantage(q: Tensor, probs: Tensor, action: Tensor) -> Tensor:
    """A_n(s, a) = Q(s, a) - sum_a' pi_n(a' | o_n) Q(s, (a_-n, a')), a constant to the policy: [S, N, M] of q, probs and
    one-hot action [S, N, M, A]."""
    return ((action - probs) * q).sum(-1).detach()


def coma_actor_loss(nets: Nets, batch: Batch, schedule: Tensor, noise: Tensor | None, unit: Tensor, env, args: Args):
    """ALGO LOGIC: Eq. (16) of appendix E.3, -E[sum_n log pi_n A_n], minus the entropy bonus, plus lambda R (Eq. 5) of
    the cooperating agents: loss, metrics."""
    obs, action = batch["obs"], batch["joint"].transpose(1, 2)
    z = policy(nets["actor"], obs, env, args)  # [S, N, M, A]
    exploration, entropy_coef = schedule
    logp = explore(z, exploration, env)
    with torch.no_grad():
        q = counterfactual_values(nets["critic"], batch["x"], batch["joint"], args)
        advantage = counterfactual_advantage(q, logp.exp(), action)
        (mean,) = average_ranks(advantage.mean((1, 2), keepdim=True))
        (square,) = average_ranks((advantage - mean).square().mean((1, 2), keepdim=True))
        spread = square.sqrt() + 1e-8
        advantage = advantage / spread if args.normalize_advantage else advantage
    entropy = -(logp.exp() * logp).sum(-1).mean(2)  # [S, N]
    gain = ((logp * action).sum(-1) * advantage).mean(2)
    loss = -(gain + entropy_coef * entropy).sum(1)
    metrics = {"losses/policy": -gain.detach().mean(1), "losses/entropy": entropy.detach().mean(1)}
    metrics["losses/advantage_std"] = spread.flatten()
    if noise is not None:
        network, M = partial(policy, nets["actor"], env=env, args=args), noise.shape[2]
        change, _ = regularizer(args.regularizer, network, obs[:, :, :M], z[:, :, :M], noise, unit, args)
        change = change[:, env.cooperators].mean(2)
        loss = loss + args.reg_coef * change.sum(1)
        metrics["ernie/regularizer"] = change.detach().mean(1)
    return loss.sum(), metrics


def descend(loss: Tensor, nets: list[MLP], optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """One optimiser step; the gradient of each network of each seed is clipped on its own."""
    grads = average_ranks(*torch.autograd.grad(loss, [net.flat for net in nets]))
    for net, grad in zip(nets, grads):
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        net.flat.grad = grad * (max_grad_norm / norm.clamp_min(max_grad_norm))
    optimizer.step()


def update_coma(nets: Nets, optimizers, losses, rollout: Batch, norm, schedule, noise, policy_steps: int, env, args):
    """The critic's steps towards TD(lambda) targets, then one of the policies. Raises ValueError if the rollout was
    played with other policies than those of now: COMA's gradient holds for their own actions only."""
    if rollout["policy_steps"] != policy_steps:
        raise ValueError(f"the rollout is of policies after {rollout['policy_steps']} steps, not {policy_steps}")
    batch = prepare_rollout(nets, rollout, norm, env, args)
    for _ in range(args.critic_updates):
        loss, metrics = losses["critic"](nets, batch, args)
        descend(loss, [nets["critic"]], optimizers["critic"], args.max_grad_norm)
        nets["critic_target"].flat.lerp_(nets["critic"].flat.detach(), args.tau)
    loss, found = losses["actor"](nets, batch, schedule, noise, perturbation_unit(norm, args), env, args)
    descend(loss, [nets["actor"]], optimizers["actor"], args.max_grad_norm)
    return metrics | found


def draw_attack(generators: Generators, env, args: Args) -> Tensor | None:
    """The random numbers of one update's regulariser, [S, N, M, O]."""
    M = min(args.reg_batch_size, args.num_envs * args.rollout_steps)
    return draw(torch.randn, (env.num_agents, M, env.obs_mask.shape[1]), generators) if args.regularized else None


# --------------------------------------------------------------------------------------------------------------------
# Rollout


def make_replay(env, num_seeds: int, num_episodes: int, T: int) -> Batch:
    """Of E episodes: obs [S, E, T + 1, N, O], actions [S, E, T, N, A], rewards [S, E, T, N], terminated [S, E, T]."""
    N, (O, A) = env.num_agents, (env.obs_mask.shape[1], env.action_mask.shape[1])
    shapes = {"obs": (T + 1, N, O), "actions": (T, N, A), "rewards": (T, N), "terminated": (T,)}
    return {k: torch.zeros(num_seeds, num_episodes, *v, dtype=env.dtype, device=env.device) for k, v in shapes.items()}


@torch.no_grad()
def play_rollout(
    step, env, actor: MLP, norm: Tensor, state, obs: Tensor, exploration, policy_steps: int, generators, args: Args
):
    """T steps of every environment with sampled actions: the rollout (make_replay's tensors, the action after the last
    step, the age of the policies), the new state and obs, and what happened, summed over time, [S]."""
    S, B, N, A = args.num_seeds, args.num_envs, env.num_agents, env.action_mask.shape[1]
    rollout = make_replay(env, S, B, args.rollout_steps)
    noise = draw(gumbel, (args.rollout_steps + 1, B, N, A), generators).transpose(0, 1)  # [T + 1, S, B, N, A]
    rollout["obs"][:, :, 0] = obs.unflatten(0, (S, B))
    happened = {}
    for t in range(args.rollout_steps + 1):
        z = policy(actor, normalize(obs.unflatten(0, (S, B)).transpose(1, 2), norm), env, args)
        action = (explore(z, exploration, env).transpose(1, 2) + noise[t]).argmax(-1)  # [S, B, N]
        if t == args.rollout_steps:
            break
        state, obs, reward, terminated, _, info = step(state, action.flatten(0, 1), env.draw(generators))
        rollout["actions"][:, :, t] = F.one_hot(action, A).to(env.dtype)
        rollout["obs"][:, :, t + 1] = obs.unflatten(0, (S, B))
        rollout["rewards"][:, :, t] = reward.unflatten(0, (S, B))
        rollout["terminated"][:, :, t] = terminated.unflatten(0, (S, B)).to(env.dtype)
        happened = add(happened, outcome(reward, info) if args.is_traffic else {"reward": team_mean(reward, env)})
    rollout |= {"last_action": F.one_hot(action, A).to(env.dtype), "policy_steps": policy_steps}
    return rollout, state, obs, {name: value.unflatten(0, (S, B)).mean(1) for name, value in happened.items()}


@torch.no_grad()
def random_play(step, env, args: Args) -> Batch:
    """Observations of an episode of random actions, as in a replay, for their norm; lights switch every tenth second
    with probability 1/2, as in the warm-up of the paper's code."""
    streams, seen = make_generators(args.seed, args.num_seeds, "norm", env.device, RANK), []
    state, obs = (replace(env, warmup=0) if args.is_traffic else env).reset(streams)
    for t in range(args.horizon if args.is_traffic else env.horizon):
        seen.append(obs)
        action = perturb.random_actions(env, streams) * (t % 10 == 0 or not args.is_traffic)
        state, obs, *_ = step(state, action, env.draw(streams))
    return {"obs": torch.stack([*seen, obs], 1).unflatten(0, (args.num_seeds, -1))}


def outcome(reward: Tensor, info: Batch) -> Batch:
    """Of a second, [B]: the reward of all lights and its terms, cars that left in a minute, cars that wait outside."""
    terms = {name: info[name].sum(1) for name in traffic.TERMS}
    return {"reward": reward.sum(1), **terms, "left_per_minute": 60.0 * info["left"], "backlog": info["backlog"] * 1.0}


def add(sums: Batch, values: Batch) -> Batch:
    return {name: sums.get(name, 0.0) + value for name, value in values.items()}


def team_mean(reward: Tensor, env) -> Tensor:
    """Mean reward [B] of the cooperating agents."""
    return reward[:, env.cooperators].mean(1)


# --------------------------------------------------------------------------------------------------------------------
# Robustness evaluation

SWEEP = {  # perturbation of the task that was trained: strengths
    "gaussian": (0.01, 0.1, 1.0),  # observation noise, standard deviation in raw units (paper, Figure 7 and Table 2)
    "mad": (0.1, 0.3),  # radius in standard deviations; the observations that change the policy most
    "critic": (0.1, 0.3),  # the same; the observations whose action the critic likes least
    "flip_one": (0.03, 0.05),  # probability that one light, chosen at random, does the opposite (paper, Figures 2c, d)
    "flip_each": (0.03, 0.05),  # the same for each light independently (the paper's code)
    "worst_one": (0.03, 0.05),  # as flip_one, with the action that the critic likes least
    "speed": (30.0, 40.0),  # m/s of the cars, trained at 35 (paper, Figure 7 and Table 2)
    "flow": (1, 2, 3, 4, 5),  # of the paper's table 1, for 2 x 2 lights (Figure 7)
}
NETWORKS = {  # where the trained lights are set up, tiled (paper, Figure 7, Tables 3 and 4)
    "irregular": {"env_id": "traffic_irregular_v0"},
    "4x4": {"env_id": "traffic_grid_v0", "rows": 4, "cols": 4, "flow": 550.0},
    "6x6": {"env_id": "traffic_grid_v0", "rows": 6, "cols": 6, "flow": 385.0},
    "atlanta": {"env_id": "traffic_atlanta_v0"},
}
DYNAMICS = ("damping", "mass", "max_speed_scale", "contact_force")
PARTICLE_SWEEP = {  # of a particle task: strengths
    "gaussian": (0.1, 0.2, 0.5, 1.0),
    "mad": (0.1, 0.3, 1.0),
    "critic": (0.1, 0.3, 1.0),
    "flip_one": (0.05, 0.2, 0.5),  # probability that one cooperating agent acts at random
    "worst_one": (0.05, 0.2, 0.5),
    **{name: (0.5, 2.0) for name in DYNAMICS},  # factor on the trained value
}
Points = list[tuple[str, float | str]]  # perturbation and strength
DRIVER = "actor"  # the networks that drive the lights


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


def make_particles(args: Args, num_envs: int, device: torch.device, **factors: float):
    """The particle task of `args`, with physical constants multiplied by `factors`."""
    env = envs.make(args.env_id, num_envs, device, num_agents=args.num_agents, continuous_actions=False)
    return replace(env, **{name: factor * getattr(env, name) for name, factor in factors.items()}) if factors else env


def attack_policies(family: str, nets: Nets, x: Tensor, unit, epsilon: float, generators, env, args: Args) -> Tensor:
    """Worst observations [S, N, M, O] of the cooperating agents in a ball of `epsilon` standard deviations around x, by
    five projected ascent steps: "mad" on the divergence of the policy, "critic" against the critic, which sees the true
    observations and the others' likeliest actions."""
    z = policy(nets["actor"], x, env, args)
    live = (unit > 0).to(x.dtype) * env.cooperators[:, None, None]
    if family == "critic":
        likeliest = F.one_hot(z.argmax(-1), z.shape[-1]).to(x.dtype).transpose(1, 2)
        q = counterfactual_values(nets["critic"], everybody(x), likeliest, args)

    def objective(delta: Tensor) -> Tensor:
        perturbed = policy(nets["actor"], x + live * delta, env, args)
        if family == "mad":
            return divergence(args.divergence, perturbed, z)
        return -(F.softmax(perturbed, -1) * q).sum(-1)

    start = rescale(draw(torch.randn, x.shape[1:], generators) * live, 0.5 * epsilon, args.norm)
    ball = partial(project, epsilon=epsilon, norm=args.norm)
    return x + live * unroll(objective, start, 5, 0.5 * epsilon, ball, stackelberg=False)


def act(family: str, strength, nets: Nets, norm: Tensor, obs: Tensor, generators, env, args: Args) -> Tensor:
    """Actions [S, E, N] under one perturbation of SWEEP; obs [S, E, N, O]. nets and norm are those of env's agents."""
    seen, S = obs, len(obs)
    if family == "gaussian":
        seen = perturb.observation_noise(env, obs.flatten(0, 1), family, strength, generators).unflatten(0, (S, -1))
    x = normalize(seen.transpose(1, 2), norm)  # [S, N, E, O]
    if family in ("mad", "critic"):
        x = attack_policies(family, nets, x, perturbation_unit(norm, args), strength, generators, env, args)
    z = policy(nets["actor"], x, env, args).transpose(1, 2)  # [S, E, N, A]
    if args.eval_policy == "sample":
        z = z + draw(gumbel, z.shape[1:], generators)
    action = z.argmax(-1)
    if family not in ("flip_one", "flip_each", "worst_one"):
        return action
    if family == "worst_one":
        joint = F.one_hot(action, z.shape[-1]).to(x.dtype)
        q = counterfactual_values(nets["critic"], everybody(x), joint, args).transpose(1, 2)
        other = q.masked_fill(~env.action_mask, math.inf).argmin(-1)
    else:  # one of the other actions; of two, the opposite
        sizes = env.action_mask.sum(1)
        other = (action + 1 + (draw(torch.rand, action.shape[1:], generators) * (sizes - 1)).long()) % sizes
    if family == "flip_each":
        hit = draw(torch.rand, action.shape[1:], generators) < strength
        return torch.where(hit & env.cooperators, other, action)
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


@torch.no_grad()
def episodic_return(env, nets: Nets, norm, args: Args, generators, family="clean", strength=0.0, frames=None) -> Tensor:
    """Returns in a particle task, mean over cooperating agents, [S, E], under one perturbation of PARTICLE_SWEEP;
    opponents see and act undisturbed. Pictures of the first environment are appended to `frames`."""
    S, total = args.num_seeds, 0.0
    state, obs = env.reset(generators)
    for _ in range(env.horizon):
        if frames is not None:
            frames.append(Image.fromarray(env.render(state, 0)))
        action = act(family, strength, nets, norm, obs.unflatten(0, (S, -1)), generators, env, args)
        state, obs, reward, *_ = env.step(state, action.flatten(0, 1), env.draw(generators))
        total = total + team_mean(reward, env)
    return total.unflatten(0, (S, -1))


def particles_report(nets: Nets, norm, args: Args, device: torch.device, run_dir: Path, wandb_runs: list) -> None:
    """Sweep all perturbations on fresh environments: a table on the terminal, robustness.csv and .png, and in wandb.
    95% t-intervals over seeds; with one seed, over its episodes."""
    env = make_particles(args, args.num_seeds * args.eval_episodes, device)
    families = [f for f in PARTICLE_SWEEP if f not in DYNAMICS or f in getattr(env, "dynamics", ())]
    points = [("clean", 0.0), *((f, strength) for f in families for strength in PARTICLE_SWEEP[f])]
    columns = ["env_id", "regularizer", "seed", "perturbation", "strength", "return", "standard_error", "episodes"]
    rows, table = [], {}
    for family, strength in tqdm(points, desc="robustness", unit="point", disable=None, leave=False):
        changed = make_particles(args, env.num_envs, device, **{family: strength}) if family in DYNAMICS else env
        generators = make_generators(args.seed, args.num_seeds, "evaluation", device)
        returns = episodic_return(changed, nets, norm, args, generators, family, strength).double().cpu().numpy()
        for k, episodes in enumerate(returns):
            row = [args.env_id, args.regularizer, args.seed + k, family, strength]
            rows.append([*row, episodes.mean(), episodes.std() / len(episodes) ** 0.5, len(episodes)])
        found = returns.mean(1) if args.num_seeds > 1 else returns[0]
        half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found) if len(found) > 1 else math.nan
        table.setdefault(family, {})[strength] = (found.mean(), half)
    path = run_dir / "robustness.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    plot_robustness(table, args, path.with_suffix(".png"))
    over = f"{args.num_seeds} seeds" if args.num_seeds > 1 else f"{args.eval_episodes} episodes"
    print(f"\nReturn of the cooperating agents, {args.env_id}, {args.regularizer}: mean and 95% interval over {over}")
    for family, cells in table.items():
        cells = (f"{strength:>4g}: {mean:7.2f} ± {half:<5.2f}" for strength, (mean, half) in cells.items())
        print(f"  {family:16s}" + "   ".join(cells))
    with wandb_may_fail(wandb_runs):
        for k, run in enumerate(wandb_runs):
            import wandb

            data = [row for row in rows if row[2] == args.seed + k]
            image = wandb.Image(str(path.with_suffix(".png")))
            run.log({"robustness": wandb.Table(columns=columns, data=data), "robustness_plot": image})
            run.finish()


def plot_robustness(table: dict[str, dict[float, tuple[float, float]]], args: Args, path: Path) -> None:
    """Return against strength, a panel per perturbation; clean is at strength 0, or at factor 1 for the dynamics."""
    families = [f for f in table if f != "clean"]
    figure = Figure(figsize=(13, 2.7 * math.ceil(len(families) / 5)), layout="constrained")
    for place, family in enumerate(families):
        axis = figure.add_subplot(math.ceil(len(families) / 5), 5, place + 1, sharey=figure.axes[0] if place else None)
        factor = family in DYNAMICS
        points = sorted((table[family] | {float(factor): table["clean"][0.0]}).items())
        strength, (mean, half) = [s for s, _ in points], np.array([v for _, v in points]).T
        axis.fill_between(strength, mean - half, mean + half, alpha=0.3)
        axis.plot(strength, mean, marker="o", markersize=3)
        axis.set(title=family, xlabel="factor" if factor else "probability" if "action" in family else "strength")
        axis.grid(alpha=0.3)
        if factor:
            axis.set_xscale("log")
            axis.minorticks_off()
            axis.set_xticks(strength, [f"{s:g}" for s in strength])
    figure.supylabel("episodic return")
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


def make_coma(env, args: Args, state: dict | None = None) -> tuple[Nets, dict[str, torch.optim.Optimizer]]:
    """A policy per agent, the critic, its target; an Adam for the policies and one for the critic. As in `state`."""
    generators = make_generators(args.seed, args.num_seeds, "init", env.device)
    N, (O, A), hidden = env.num_agents, (env.obs_mask.shape[1], env.action_mask.shape[1]), [args.hidden_size] * 2
    nets = {"actor": init_mlp([O, *hidden, A], N, generators)}
    nets["actor"].layers()[-1][1].detach()[:, 0] += args.idle_logit
    nets["critic"] = init_mlp([N * O + N * A + N, *hidden, A], 1, generators)
    rates = {"actor": args.learning_rate, "critic": args.critic_learning_rate}
    optimizers = {name: torch.optim.Adam([nets[name].flat], rate, fused=True) for name, rate in rates.items()}
    nets["critic_target"] = MLP(nets["critic"].flat.detach().clone(), nets["critic"].sizes)
    if state is not None:
        for name, net in nets.items():
            net.flat.detach().copy_(state["nets"][name])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    return nets, optimizers


def train(env, nets, optimizers, compiled, args: Args, run_dir: Path, wandb_runs: list, state: dict | None = None):
    """Train from the start or from `state`, a checkpoint: the norm of observations, or None if Ctrl-C or SIGTERM ended
    it, after a checkpoint."""
    env_step = env.step if args.env_id.startswith("zoo:") else compiled(env.step)  # Python environments do not compile
    losses = {"critic": coma_critic_loss, "actor": coma_actor_loss}
    losses = {name: compiled(loss) if env.device.type == "cuda" else loss for name, loss in losses.items()}
    names, per_iteration, labels = ("rollout", "noise"), args.num_envs * args.rollout_steps, run_labels(args)
    streams = {name: make_generators(args.seed, args.num_seeds, name, env.device, RANK) for name in names}
    log_path, iteration, step, world, obs = run_dir / "metrics.csv", 0, 0, None, None
    sums, happened, count, first = {}, {}, 0, 0  # of metrics, of outcomes, updates: since the log at step `first`
    if state is None:
        norm = measure_norm(random_play(env_step, env, args), args.num_envs)
    else:
        for name, generators in streams.items():
            for generator, saved in zip(generators, state["streams"][name]):
                generator.set_state(saved)
        norm, iteration, step = state["norm"].to(env.device), state["iteration"], state["step"]
        if state["world"] is not None:
            kind, obs = traffic.State if args.is_traffic else particle.State, state["obs"].to(env.device)
            world = kind(**{name: value.to(env.device) for name, value in state["world"].items()})
        if dist.is_initialized():
            iterations = [None] * dist.get_world_size()
            dist.all_gather_object(iterations, iteration)
            if len(set(iterations)) > 1:
                fail(f"the ranks' checkpoints in {run_dir} are of different iterations: {iterations}")
        sums, happened, count, first = state["window"]
        sums, happened = ({k: v.to(env.device) for k, v in values.items()} for values in (sums, happened))
        if RANK == 0 and log_path.exists():  # drop rows that will be written again, and one cut off by a kill
            os.truncate(log_path, state["log_size"])
    stops, is_over = [], step >= args.total_timesteps
    handlers = {s: signal.signal(s, lambda *caught: stops.append(caught)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=True if RANK else None)
    started = time.perf_counter()
    while not is_over:
        progress, last_step = step / args.total_timesteps, step
        if iteration * args.rollout_steps % env.horizon == 0:
            world, obs = env.reset(streams["rollout"], env_step) if args.is_traffic else env.reset(streams["rollout"])
            step += args.warmup * args.num_envs if args.is_traffic else 0
        ends = ((args.exploration, args.exploration_end), (args.entropy_coef, args.entropy_coef_end))
        schedule = torch.tensor([start + (end - start) * progress for start, end in ends], device=env.device)
        rest = (nets["actor"], norm, world, obs, schedule[0], iteration, streams["rollout"], args)
        rollout, world, obs, outcomes = play_rollout(env_step, env, *rest)
        happened, step = add(happened, outcomes), step + per_iteration
        for optimizer, rate in zip(optimizers.values(), (args.learning_rate, args.critic_learning_rate)):
            optimizer.param_groups[0]["lr"] = rate * (1 - progress) if args.anneal_lr else rate
        rest = (schedule, draw_attack(streams["noise"], env, args), iteration)
        metrics = update_coma(nets, optimizers, losses, rollout, norm, *rest, env, args)
        sums, count, iteration = add(sums, metrics), count + 1, iteration + 1
        bar.update(step - last_step)
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
            row = {f"charts/{name}": value / (count * args.rollout_steps) for name, value in happened.items()}
            row |= {name: value / count for name, value in sums.items()}
            row |= inspect_policies(nets, norm, rollout, compiled, env, args)
            speed = args.num_seeds * (step - first) / (time.perf_counter() - started)
            row["charts/SPS"] = torch.full((args.num_seeds,), round(speed))
            if RANK == 0:
                log_metrics(log_path, wandb_runs, labels, step, row)
            bar.set_postfix(reward=f"{row['eval/reward'].mean():.1f}", refresh=False)
            sums, happened, count, first, started = {}, {}, 0, step, time.perf_counter()
        if save:
            data = {"script": Path(__file__).stem, "args": asdict(args), "iteration": iteration, "step": step}
            data |= {"norm": norm, "window": (sums, happened, count, first), "world": None, "obs": None}
            if iteration * args.rollout_steps % env.horizon:  # in the middle of an episode
                data |= {"world": {f.name: getattr(world, f.name) for f in fields(world)}, "obs": obs}
            data |= {"log_size": log_path.stat().st_size if log_path.exists() else 0}
            data |= {"nets": {name: net.flat.detach() for name, net in nets.items()}}
            data |= {"optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}}
            data |= {"streams": {p: [g.get_state() for g in generators] for p, generators in streams.items()}}
            save_checkpoint(run_dir / CHECKPOINT, data)
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return norm if step >= args.total_timesteps else None


def inspect_policies(nets: Nets, norm: Tensor, rollout: Batch, compiled: Callable, env, args: Args) -> Batch:
    """How the policies do in evaluation (traffic: two episodes of five minutes after five of random switching), and
    diagnose() on the rollout."""
    streams = make_generators(args.seed, args.num_seeds, "test", env.device)
    if args.is_traffic:
        warmup, seconds = min(300, args.eval_warmup), min(300, args.eval_seconds)
        test = replace(args, eval_episodes=2, eval_warmup=warmup, eval_seconds=seconds)
        happened = simulate_points(nets, norm, [("clean", 0.0)], "test", compiled, test, env.device)
        row = {f"eval/{name}": value.mean((1, 2)) for name, value in happened.items()}
    else:
        test = make_particles(args, args.num_seeds * min(100, args.eval_episodes), env.device)
        row = {"eval/reward": episodic_return(test, nets, norm, args, streams).mean(1)}
    if args.regularized:
        obs = normalize(rollout["obs"][:, :, :-1].flatten(1, 2).transpose(1, 2), norm)
        network, noise = partial(policy, nets["actor"], env=env, args=args), draw_attack(streams, env, args)
        row |= diagnose(nets["actor"], network, obs, noise, perturbation_unit(norm, args), env.cooperators, args)
    return row


def main() -> None:
    args = parse_args()
    args, state, run_dir = load_run(args) if args.resume or args.evaluate else (args, None, None)
    device, num_envs = setup(args), args.num_seeds * args.num_envs
    try:
        if args.is_traffic:
            fields = {"horizon": args.horizon - args.warmup, "warmup": args.warmup}
            env = make_traffic(replace(args, backend="torch"), num_envs, device, **fields)
        else:
            env = make_particles(args, num_envs, device)
        if args.backend == "sumo":
            sumo.require_sumo()
    except (ValueError, ImportError) as error:
        fail(str(error))
    if not env.discrete:
        fail(f"--env-id must have discrete actions, got {args.env_id!r}")
    whole = args.env_id.startswith("zoo:")  # episodes of a Python environment cannot be cut by a checkpoint
    if env.horizon % args.rollout_steps or (whole and env.horizon != args.rollout_steps):
        rule = "be" if whole else "divide"
        fail(f"--rollout-steps must {rule} the {env.horizon} steps of an episode, got {args.rollout_steps}")
    options = {"comprehensive_padding": False}  # with it gradients are wrong on GPUs (torch 2.11)
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, options=options) if args.compile else lambda f: f
    if args.compile:
        torch._dynamo.config.recompile_limit = 32  # the step is compiled for each network and number of environments
    nets, optimizers = make_coma(env, args, state)
    run_dir = run_dir or make_run_dir(args)
    wandb_runs = [] if args.evaluate else start_wandb(args, run_dir, run_labels(args))
    if args.evaluate:
        norm = state["norm"].to(device)
    else:
        norm = train(env, nets, optimizers, compiled, args, run_dir, wandb_runs, state)
    if norm is None:
        print(f"stopped; go on with: python {Path(__file__).name} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(130)
    if RANK == 0:
        if args.is_traffic:
            compiled = compiled if args.backend == "torch" else lambda f: f
            lights_report(nets, norm, args, device, compiled, run_dir, wandb_runs)
        else:
            particles_report(nets, norm, args, device, run_dir, wandb_runs)
        if args.capture_video:
            shown, frames = replace(args, backend="torch", eval_episodes=1, eval_warmup=300, eval_seconds=240), []
            if args.is_traffic:
                simulate_points(nets, norm, [("clean", 0.0)], "video", lambda f: f, shown, device, frames)
            else:
                streams = make_generators(args.seed, args.num_seeds, "video", device)
                episodic_return(make_particles(args, args.num_seeds, device), nets, norm, args, streams, frames=frames)
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
