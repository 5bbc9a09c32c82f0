"""ERNIE-MADDPG: multi-agent DDPG whose policies are kept smooth by an adversarial regulariser.

MADDPG (Lowe et al. 2017, arXiv 1706.02275) trains an actor per agent on its own observation and a centralised critic
per agent on everybody's observations and actions. ERNIE (Bukharin et al. 2023, arXiv 2310.10810) adds to the actor loss
of each cooperating agent the largest change of its policy under a small perturbation of its observation (Eq. 4, 5),
found by K steps of projected gradient ascent through which the policy's gradient flows (Eq. 6, the Stackelberg game).
ERNIE-A (Eq. 7) does so for critics and joint actions. M3DDPG (Li et al. 2019) and appendix H's baseline are modes here.

    python ernie_maddpg.py --epsilon 0.1                              # simple_spread_v3, five minutes on two CPU cores
    python ernie_maddpg.py --env-id simple_tag_v3 --num-seeds 5       # five independent runs side by side
    python ernie_maddpg.py --evaluate runs/RUN --backend pettingzoo   # the trained policies in the original mpe2

Differences to the paper, by their number in the README: 2 squared l2 before tanh, 7 projection after every step,
8 random start, 14 critics see clean observations, 22 at most K agents in continuous ERNIE-A, 29 discounted targets,
30 a critic per agent, 31 the others' present actions, 33 Adam, 39 Gaussian noise of mean length epsilon.

Axes: S seeds, N agents, B environments of a seed, T steps of an episode, M minibatch, O observation, A action.
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
from envs import perturb, zoo

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
    """compile the environment step and, on a GPU or without regulariser, the losses (torch.compile)"""
    runs_dir: str = "runs"
    """folder that receives a folder per run"""
    resume: str | None = None
    """run folder or checkpoint file to continue; all other flags are read from it"""
    evaluate: str | None = None
    """run folder or checkpoint file whose policies are evaluated again, without training"""
    backend: Literal["torch", "pettingzoo"] = "torch"
    """with --evaluate: the batched environment or the original mpe2"""
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

    env_id: str = "simple_spread_v3"
    """a particle task, or zoo:package.module for a PettingZoo module with a parallel_env"""
    num_agents: int | None = None
    """N where the task allows a choice (simple_spread_v3); default: the task's own"""
    continuous_actions: bool = True
    """continuous actions; --no-continuous-actions: discrete ones by straight-through Gumbel-softmax"""
    total_timesteps: int = 500_000
    """environment steps of one seed"""
    num_envs: int = 40
    """B, environments of one seed that step together"""
    steps_per_update: int = 50
    """environment steps of one seed per update, whatever num_envs is (maddpg-pytorch: 100)"""
    learning_starts: int = 5_000
    """environment steps before the first update"""
    buffer_size: int = 250_000
    """replay capacity of one seed in environment steps (maddpg-pytorch: 1e6)"""
    batch_size: int = 1024
    """M, transitions per minibatch"""
    learning_rate: float = 1e-3
    """Adam step size of actors and critics (maddpg-pytorch: 1e-2)"""
    gamma: float = 0.95
    """discount factor"""
    tau: float = 0.01
    """share by which the targets move at each update"""
    hidden_size: int = 64
    """width of the two hidden layers (paper: 64; 32 to 256 in Figure 4d)"""
    activation: Literal["relu", "silu", "tanh"] = "relu"
    """hidden activation"""
    exploration_noise: float = 0.8
    """continuous actions: standard deviation of the first exploration noise, in half-widths of the action range"""
    exploration_noise_end: float = 0.2
    """the same at the end, linear in between"""
    gumbel_temperature: float = 1.0
    """discrete actions: temperature of the Gumbel-softmax"""
    others_actions: Literal["policy", "replay"] = "policy"
    """others' actions in the actor loss: their present policies (maddpg-pytorch) or replay (paper, openai/maddpg)"""
    policy_l2: float = 1e-3
    """weight of the mean squared actor output in the actor loss"""
    max_grad_norm: float = 0.5
    """the gradient of each network of each seed is clipped to this norm"""

    regularizer: Literal["none", "gaussian", "random", "adversarial", "stackelberg"] = "stackelberg"
    """none: MADDPG; gaussian: appendix H; random: a direction of length epsilon; adversarial: Eq. 4; stackelberg: 6"""
    epsilon: float = 0.3
    """radius of the perturbation ball"""
    epsilon_units: Literal["raw", "std"] = "raw"
    """unit of epsilon: the observation's own, or each entry's standard deviation over the minibatch"""
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
    """samples of the minibatch on which the regulariser is estimated"""
    divergence: Literal["auto", "l2", "l2_squashed", "kl", "l2_probs"] = "auto"
    """D: squared l2 before or after tanh (continuous); KL or squared l2 of probabilities (discrete); auto: l2 or kl"""
    detach_reference: bool = False
    """treat the clean policy in D as a constant"""
    gaussian_std: float | None = None
    """standard deviation of the gaussian mode; default: mean length epsilon (the paper's text: 1)"""
    action_reg_coef: float = 0.0
    """lambda_A, weight of ERNIE-A (Eq. 7) in the critic loss; unrolled as --regularizer is (stackelberg) or not"""
    action_epsilon: float = 0.5
    """continuous ERNIE-A: l2 radius of the joint-action perturbation"""
    action_agents: int = 1
    """ERNIE-A: at most so many agents' actions change (K of Eq. 7)"""
    minimax_epsilon: float = 0.0
    """M3DDPG: step size alpha by which the others' actions move against the critic; 0 is off"""

    log_interval: int = 10_000
    """environment steps between two rows of metrics.csv"""
    checkpoint_interval: int = 100_000
    """environment steps between two checkpoints"""
    eval_episodes: int = 1000
    """episodes of one seed at each point of the robustness report"""

    def __post_init__(self):
        divergences = ("auto", "l2", "l2_squashed") if self.continuous_actions else ("auto", "kl", "l2_probs")
        floats = " ".join(name for name, value in asdict(self).items() if isinstance(value, float))
        counts = "num_seeds num_threads num_agents total_timesteps num_envs steps_per_update buffer_size batch_size"
        amounts = "seed learning_starts exploration_noise exploration_noise_end policy_l2 epsilon attack_steps"
        for names, holds, rule in (
            (floats, math.isfinite, "a finite number"),
            (counts, lambda v: v >= 1, "at least 1"),
            ("hidden_size reg_batch_size action_agents eval_episodes", lambda v: v >= 1, "at least 1"),
            ("log_interval checkpoint_interval", lambda v: v >= 1, "at least 1"),
            ("learning_rate gumbel_temperature max_grad_norm attack_lr", lambda v: v > 0, "above 0"),
            ("gaussian_std action_epsilon", lambda v: v > 0, "above 0"),
            (amounts, lambda v: v >= 0, "0 or more"),
            ("reg_coef action_reg_coef minimax_epsilon", lambda v: v >= 0, "0 or more"),
            ("learning_starts", lambda v: v < self.total_timesteps, "below --total-timesteps"),
            ("gamma tau", lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("attack_init", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("divergence", lambda v: v in divergences, f"one of {', '.join(divergences)} with these actions"),
            ("backend", lambda v: v == "torch" or self.evaluate, "torch unless --evaluate is given"),
            ("resume", lambda v: not self.evaluate, "left out with --evaluate"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {value!r}")
        if self.divergence == "auto":
            self.divergence = "l2" if self.continuous_actions else "kl"
        if self.attack_lr is None:
            self.attack_lr = 1.0 if self.attack_steps <= 1 else 2.5 / self.attack_steps

    @property
    def regularized(self) -> bool:
        """Whether the regulariser does anything: with K, epsilon or lambda at 0 this is MADDPG, at its speed."""
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


Nets = dict[str, MLP]  # actor, critic, actor_target, critic_target


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


def policy(actor: MLP, obs: Tensor, env, args: Args) -> Tensor:
    """Actions before tanh, or logits: obs [S, N, M, O] -> [S, N, M, A]. Padding is 0, or -1e9 where discrete."""
    z = forward(actor.layers(), obs, args.activation)
    return torch.where(env.action_mask[:, None], z, -1e9 if env.discrete else 0.0)


def squash(z: Tensor, env) -> Tensor:
    """Deterministic action [S, N, M, A]: tanh scaled to the action range, or the best action as one-hot."""
    if env.discrete:
        return F.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype)
    center, half = (env.action_high + env.action_low) / 2, (env.action_high - env.action_low) / 2
    return (center + half * torch.tanh(z)) * env.action_mask[:, None]


def gumbel(shape: tuple[int, ...], **where) -> Tensor:
    """Standard Gumbel noise."""
    return -torch.log(-torch.log(torch.rand(shape, **where).clamp(1e-10, 1 - 1e-7)))


def straight_through(z: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """One-hot sample of softmax(z) [S, N, M, A] whose gradient is the Gumbel-softmax's."""
    soft = F.softmax((z + noise) / temperature, -1)
    return F.one_hot(soft.argmax(-1), z.shape[-1]).to(z.dtype) + soft - soft.detach()


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


def perturbation_scale(obs: Tensor, env, args: Args) -> Tensor:
    """One unit of delta in each observation entry, 0 in padding: [N, 1, O], or [S, N, 1, O] in standard deviations over
    the samples of obs [S, N, M, O]."""
    live = env.obs_mask[:, None].to(obs.dtype)
    return live * obs.std(2, keepdim=True) if args.epsilon_units == "std" else live


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
# Losses and update. A joint action is [S, C, M, N, A]: C = N where every critic sees another one, else 1.


def encode(critic: MLP, obs: Tensor) -> Tensor:
    """The share of obs [S, M, N, O] of all agents in the first layer of each critic [S, N, M, H], before activation."""
    S, M, N = obs.shape[:3]
    x = obs.flatten(2).mT.unsqueeze(1).expand(S, N, -1, M).flatten(0, 1)
    weight, bias = critic.layers()[0]
    return torch.baddbmm(bias, weight[:, :, : x.shape[1]], x).mT.unflatten(0, (S, N))


def q_values(critic: MLP, encoded: Tensor, joint: Tensor, args: Args) -> Tensor:
    """Q_i(x, a) of every agent's critic [S, N, M]: encoded [S, N, M, H] is encode(critic, x), joint [S, C, M, N, A]."""
    a = joint.flatten(3).mT.expand(*encoded.shape[:2], -1, -1).flatten(0, 1).contiguous()
    (weight, _), *rest = critic.layers()
    h = torch.baddbmm(encoded.flatten(0, 1).mT, weight[:, :, -a.shape[1] :], a)
    h = ACTIVATIONS[args.activation](h).mT.unflatten(0, encoded.shape[:2])
    return forward(rest, h, args.activation).squeeze(-1)


def own_slot(env) -> Tensor:
    """[N, 1, N, 1]: True where the critic of an agent meets that agent's own action in a joint action."""
    return torch.eye(env.num_agents, dtype=torch.bool, device=env.device)[:, None, :, None]


def minimax_actions(critic: MLP, encoded: Tensor, joint: Tensor, env, args: Args) -> Tensor:
    """ALGO LOGIC: M3DDPG. The others step against each cooperator's critic: a_j - alpha grad_{a_j} Q_i for j != i."""
    joint = joint.expand(-1, env.num_agents, -1, -1, -1)
    with torch.no_grad():
        slope = torch.func.grad(lambda a: q_values(critic, encoded, a, args).sum())(joint)
    moved = ~own_slot(env) & env.cooperators[:, None, None, None] & env.action_mask
    return joint - args.minimax_epsilon * slope * moved


def sparse_project(delta: Tensor, epsilon: float, num_agents: int, num_changed: int) -> Tensor:
    """Nearest joint perturbation [..., N * A] that moves at most `num_changed` agents and has l2 norm <= epsilon."""
    each = delta.unflatten(-1, (num_agents, -1))
    length = torch.linalg.vector_norm(each, dim=-1)  # [..., N]
    kept = length.topk(min(num_changed, num_agents), -1).indices
    each = each * torch.zeros_like(length).scatter(-1, kept, 1.0).unsqueeze(-1)
    return project(each.flatten(-2), epsilon, "l2")


def single_changes(joint: Tensor, env) -> Tensor:
    """[..., N, A] one-hot -> [..., N * A, N, A]: the joint actions in which agent j plays k instead, for all (j, k)."""
    action = torch.eye(joint.shape[-1], dtype=joint.dtype, device=joint.device)[:, None]  # [A, 1, A]
    return torch.where(own_slot(env), action, joint[..., None, None, :, :]).flatten(-4, -3)


def greedy_changes(critic: MLP, encoded: Tensor, joint: Tensor, env, args: Args) -> Tensor:
    """Greedy search of Eq. (7), appendix G, for each critic: K times the change of one agent's action, no agent twice,
    that makes (Q(x, a) - Q(x, a'))^2 largest. joint [S, 1, M, N, A] -> a' [S, N, M, N, A]; N A K evaluations."""
    N, A = joint.shape[-2:]
    clean, repeated = q_values(critic, encoded, joint, args), encoded.repeat_interleave(N * A, 2)
    changed = joint.expand(-1, N, -1, -1, -1)
    open_slots = env.action_mask.flatten().expand(*clean.shape, N * A)  # [S, N, M, N * A]
    for _ in range(min(args.action_agents, N)):
        candidates = single_changes(changed, env)  # [S, N, M, N * A, N, A]
        value = q_values(critic, repeated, candidates.flatten(2, 3), args).view(*clean.shape, N * A)
        best = (value - clean[..., None]).square().masked_fill(~open_slots, -1.0).argmax(-1, keepdim=True)
        changed = candidates.gather(3, best[..., None, None].expand(-1, -1, -1, 1, N, A)).squeeze(3)
        open_slots = open_slots & (torch.arange(N * A, device=joint.device) // A != best // A)
    return changed


def action_regularizer(critic: MLP, encoded: Tensor, joint: Tensor, q: Tensor, noise: Batch, env, args) -> Tensor:
    """ALGO LOGIC: ERNIE-A, Eq. (7): (Q(x, a) - Q(x, a'))^2 [S, N, M] for the worst a' that changes at most K agents:
    discrete by greedy search, continuous by projected gradient ascent from noise["action"] [S, N, M, N * A]."""
    if env.discrete:
        with torch.no_grad():
            changed = greedy_changes(critic, encoded, joint, env, args)
        return (q_values(critic, encoded, changed, args) - q).square()

    def change(delta: Tensor) -> Tensor:
        moved = joint + delta.unflatten(-1, env.action_mask.shape) * env.action_mask
        return (q_values(critic, encoded, moved, args) - q).square()

    epsilon, steps, follow = args.action_epsilon, max(1, args.attack_steps), args.regularizer == "stackelberg"
    start = rescale(noise["action"] * env.action_mask.flatten(), args.attack_init * epsilon, "l2")
    ball = partial(sparse_project, epsilon=epsilon, num_agents=env.num_agents, num_changed=args.action_agents)
    return change(unroll(change, start, steps, args.attack_lr * epsilon, ball, follow))


def critic_loss(nets: Nets, batch: Batch, noise: Batch, env, args: Args):
    """Squared TD error of each critic, plus ERNIE-A: loss, metrics. ALGO LOGIC: the critic target, MADDPG Eq. (6),
    y_i = r_i + gamma (1 - terminated) Q'_i(x', a'), a' from the target actors; truncation does not end the return."""
    with torch.no_grad():
        critic, next_obs = nets["critic_target"], batch["next_obs"]
        next_action = squash(policy(nets["actor_target"], next_obs.transpose(1, 2), env, args), env)
        next_joint, encoded = next_action.transpose(1, 2).unsqueeze(1), encode(critic, next_obs)  # [S, 1, M, N, A]
        if args.minimax_epsilon > 0:
            next_joint = minimax_actions(critic, encoded, next_joint, env, args)
        discount = args.gamma * (1 - batch["terminated"]).unsqueeze(1)
        target = batch["rewards"].transpose(1, 2) + discount * q_values(critic, encoded, next_joint, args)  # [S, N, M]
    joint, encoded = batch["actions"].unsqueeze(1), encode(nets["critic"], batch["obs"])
    q = q_values(nets["critic"], encoded, joint, args)
    loss = (q - target).square().mean(-1)  # [S, N]
    metrics = {"losses/critic_loss": loss.detach().mean(1), "losses/q_values": q.detach().mean((1, 2))}
    if args.action_reg_coef > 0:
        change = action_regularizer(nets["critic"], encoded, joint, q, noise, env, args).mean(-1) * env.cooperators
        loss = loss + args.action_reg_coef * change
        metrics["ernie/action_regularizer"] = change.detach().sum(1) / env.cooperators.sum()
    return loss.sum(), metrics


def actor_loss(nets: Nets, batch: Batch, noise: Batch, env, args: Args):
    """ALGO LOGIC: the policy loss, Eq. (5): -Q_i(x, a) at agent i's own present action, plus lambda R for cooperating
    agents: loss, metrics."""
    obs, joint = batch["obs"].transpose(1, 2), batch["actions"].unsqueeze(1)
    z = policy(nets["actor"], obs, env, args)  # [S, N, M, A]
    action = straight_through(z, noise["gumbel"], args.gumbel_temperature) if env.discrete else squash(z, env)
    critic = MLP(nets["critic"].flat.detach(), nets["critic"].sizes)
    encoded = encode(critic, batch["obs"])
    if args.others_actions == "policy":
        joint = squash(z.detach(), env).transpose(1, 2).unsqueeze(1)
    joint = torch.where(own_slot(env), action.transpose(1, 2).unsqueeze(1), joint)
    if args.minimax_epsilon > 0:
        joint = torch.where(own_slot(env), joint, minimax_actions(critic, encoded, joint.detach(), env, args))
    policy_loss = -q_values(critic, encoded, joint, args).mean(-1)  # [S, N]
    loss = policy_loss + args.policy_l2 * (z * env.action_mask[:, None]).square().mean((2, 3))
    metrics = {"losses/actor_loss": policy_loss.detach().mean(1)}
    if args.regularized:
        part = [x[:, :, : args.reg_batch_size] for x in (obs, z)]
        network = partial(policy, nets["actor"], env=env, args=args)
        scale = perturbation_scale(part[0], env, args)
        change, _ = regularizer(args.regularizer, network, *part, noise["perturbation"], scale, args)
        change = change.mean(-1) * env.cooperators  # [S, N]
        loss = loss + args.reg_coef * change
        metrics["ernie/regularizer"] = change.detach().sum(1) / env.cooperators.sum()
    return loss.sum(), metrics


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


def update(nets, optimizers, losses, batch: Batch, noise: Batch, env, args: Args) -> Batch:
    """A step of all critics and their targets, then of all actors and theirs."""
    metrics = {}
    for name in ("critic", "actor"):
        loss, more = losses[name](nets, batch, noise, env, args)
        descend(loss, [nets[name]], optimizers[name], args.max_grad_norm)
        nets[name + "_target"].flat.lerp_(nets[name].flat.detach(), args.tau)  # the other loss does not see this target
        metrics |= more
    return metrics


def draw_noise(generators: Generators, env, args: Args) -> Batch:
    """The random numbers of one update."""
    N, M, (O, A), noise = env.num_agents, args.batch_size, (env.obs_mask.shape[1], env.action_mask.shape[1]), {}
    if args.regularized:
        noise["perturbation"] = draw(torch.randn, (N, min(M, args.reg_batch_size), O), generators)
    if env.discrete:
        noise["gumbel"] = draw(gumbel, (N, M, A), generators)
    elif args.action_reg_coef > 0:
        noise["action"] = draw(torch.randn, (N, M, N * A), generators)
    return noise


# --------------------------------------------------------------------------------------------------------------------
# Rollout and replay of whole episodes, so that between two of them a checkpoint needs no environment state


def make_replay(env, num_seeds: int, num_episodes: int, T: int) -> Batch:
    """Of E episodes: obs [S, E, T + 1, N, O], actions [S, E, T, N, A], rewards [S, E, T, N], terminated [S, E, T]."""
    N, (O, A) = env.num_agents, (env.obs_mask.shape[1], env.action_mask.shape[1])
    shapes = {"obs": (T + 1, N, O), "actions": (T, N, A), "rewards": (T, N), "terminated": (T,)}
    return {k: torch.zeros(num_seeds, num_episodes, *v, dtype=env.dtype, device=env.device) for k, v in shapes.items()}


@torch.no_grad()
def rollout(step: Callable, env, actor: MLP, replay: Batch, slot: int, std: float, generators, args: Args) -> Tensor:
    """An episode of every environment, with exploration, into replay from `slot` on; mean return of agents [S, N]."""
    S, B = args.num_seeds, args.num_envs
    part = {k: v[:, slot : slot + B] for k, v in replay.items()}
    state, obs = env.reset(generators)
    shape = (env.horizon, env.num_agents, B, env.action_mask.shape[1])
    noise = draw(gumbel if env.discrete else torch.randn, shape, generators).unbind(1)
    half = (env.action_high - env.action_low) / 2
    part["obs"][:, :, 0] = obs.unflatten(0, (S, B))
    for t in range(env.horizon):
        z = policy(actor, obs.unflatten(0, (S, B)).transpose(1, 2), env, args)
        if env.discrete:
            action = squash(z + noise[t], env)  # a sample of the policy
        else:
            action = (squash(z, env) + std * half * noise[t]).clamp(env.action_low, env.action_high)
        action = (action * env.action_mask[:, None]).transpose(1, 2)  # [S, B, N, A]
        state, obs, reward, terminated, _, _ = step(state, to_env(action, env), env.draw(generators))
        part["actions"][:, :, t] = action
        part["obs"][:, :, t + 1] = obs.unflatten(0, (S, B))
        part["rewards"][:, :, t] = reward.unflatten(0, (S, B))
        part["terminated"][:, :, t] = terminated.unflatten(0, (S, B)).to(env.dtype)
    return part["rewards"].sum(2).mean(1)


def to_env(action: Tensor, env) -> Tensor:
    """[S, B, N, A] -> what env.step takes: [S*B, N, A], or action numbers [S*B, N]."""
    return action.flatten(0, 1).argmax(-1) if env.discrete else action.flatten(0, 1)


def sample(replay: Batch, filled: int, batch_size: int, generators: Generators) -> Batch:
    """Uniform minibatch of the first `filled` episodes: obs, next_obs, actions [S, M, N, .], rewards, terminated."""
    S, E, T = replay["terminated"].shape
    pick = torch.stack([torch.randint(filled * T, (batch_size,), generator=g, device=g.device) for g in generators])
    pick = pick + E * T * torch.arange(S, device=pick.device)[:, None]  # [S, M] into the flattened [S, E, T]
    row = pick + pick // T  # an episode has one observation more than transitions
    rows = {"obs": row, "next_obs": row + 1, "actions": pick, "rewards": pick, "terminated": pick}
    sources = {name: replay[name.removeprefix("next_")].flatten(0, 2) for name in rows}
    return {name: sources[name].index_select(0, i.flatten()).unflatten(0, i.shape) for name, i in rows.items()}


# --------------------------------------------------------------------------------------------------------------------
# Robustness evaluation

DYNAMICS = ("damping", "mass", "max_speed_scale", "contact_force")
SWEEP = {  # perturbation: strengths
    "gaussian": (0.1, 0.2, 0.5, 1.0),  # observation noise, standard deviation (paper, Figures 3 and 9)
    "uniform": (0.1, 0.2, 0.5, 1.0),  # observation noise, half-width
    "mad": (0.1, 0.2, 0.5, 1.0),  # radius; the observations that change the policy most (maximal action difference)
    "critic": (0.1, 0.2, 0.5, 1.0),  # radius; the observations whose action the agent's own critic likes least
    "random_action": (0.03, 0.05, 0.2, 0.5),  # probability that one cooperating agent acts at random in a step
    "worst_action": (0.03, 0.05, 0.2, 0.5),  # the same, with the action the team's critics like least (paper, 5.3)
    **{name: (0.25, 0.5, 2.0, 4.0) for name in DYNAMICS},  # factor on the trained value
}


def make_env(args: Args, num_envs: int, device: torch.device, **factors: float):
    """The task of `args` with physical constants multiplied by `factors`, or the same task in the original mpe2."""
    options = {"device": device, "num_agents": args.num_agents, "continuous_actions": args.continuous_actions}
    env = envs.make(args.env_id, num_envs, **options)
    env = replace(env, **{name: factor * getattr(env, name) for name, factor in factors.items()}) if factors else env
    return zoo.original(env) if args.backend == "pettingzoo" else env


def attack(family: str, nets, obs: Tensor, epsilon: float, generators: Generators, env, args: Args) -> Tensor:
    """Worst observations [S, N, B, O] of cooperating agents in a ball around obs, by ten projected ascent steps: "mad"
    on the policy divergence, "critic" on -Q_i of the agent's own critic, which sees the true observations."""
    mask = (env.obs_mask & env.cooperators[:, None])[:, None].to(obs.dtype)
    z = policy(nets["actor"], obs, env, args)
    joint, encoded = squash(z, env).transpose(1, 2).unsqueeze(1), encode(nets["critic"], obs.transpose(1, 2))

    def objective(delta: Tensor) -> Tensor:
        perturbed = policy(nets["actor"], obs + mask * delta, env, args)
        if family == "mad":
            return divergence(args.divergence, perturbed, z)
        action = F.softmax(perturbed, -1) if env.discrete else squash(perturbed, env)  # an argmax has no gradient
        attacked = torch.where(own_slot(env), action.transpose(1, 2).unsqueeze(1), joint)
        return -q_values(nets["critic"], encoded, attacked, args)

    start = rescale(draw(torch.randn, obs.shape[1:], generators) * env.obs_mask[:, None], 0.5 * epsilon, args.norm)
    ball = partial(project, epsilon=epsilon, norm=args.norm)
    return obs + mask * unroll(objective, start, 10, 0.25 * epsilon, ball, stackelberg=False)


def worst_actions(critic: MLP, obs: Tensor, joint: Tensor, env, args: Args) -> Tensor:
    """For each agent the action at which the cooperators' mean Q(x, a) is least, the others acting as in joint
    [S, B, N, A]: all are tried (discrete), or the corner of the action box against the slope is taken (continuous)."""
    A, encoded = joint.shape[-1], encode(critic, obs)

    def team_value(a: Tensor, encoded: Tensor) -> Tensor:
        return q_values(critic, encoded, a.unsqueeze(1), args)[:, env.cooperators].mean(1)

    if not env.discrete:
        slope = torch.func.grad(lambda a: team_value(a, encoded).sum())(joint)
        return torch.where(slope > 0, env.action_low, env.action_high) * env.action_mask
    candidates = single_changes(joint, env).flatten(1, 2)  # [S, B * N * A, N, A]
    value = team_value(candidates, encoded.repeat_interleave(env.num_agents * A, 2)).view(joint.shape)
    return F.one_hot(value.masked_fill(~env.action_mask, math.inf).argmin(-1), A).to(joint.dtype)


@torch.no_grad()
def evaluate(env, nets, args: Args, generators, family: str = "clean", strength: float = 0.0, frames=None) -> Tensor:
    """Returns of deterministic policies, mean over cooperating agents, [S, episodes], under one perturbation of SWEEP;
    opponents see and act undisturbed. Pictures of the first environment are appended to `frames`."""
    S, total = args.num_seeds, 0.0
    state, obs = env.reset(generators)
    for _ in range(env.horizon):
        if frames is not None:
            frames.append(Image.fromarray(env.render(state, 0)))
        seen = obs
        if family in ("gaussian", "uniform"):
            seen = perturb.observation_noise(env, obs, family, strength, generators)
        seen, everyone = seen.unflatten(0, (S, -1)).transpose(1, 2), obs.unflatten(0, (S, -1))
        if family in ("mad", "critic"):
            seen = attack(family, nets, seen, strength, generators, env, args)
        joint = squash(policy(nets["actor"], seen, env, args), env).transpose(1, 2)
        action = to_env(joint, env)
        if family == "random_action":
            action = perturb.replace_actions(env, action, perturb.random_actions(env, generators), strength, generators)
        if family == "worst_action":
            worst = to_env(worst_actions(nets["critic"], everyone, joint, env, args), env)
            action = perturb.replace_actions(env, action, worst, strength, generators)
        state, obs, reward, _, _, _ = env.step(state, action, env.draw(generators))
        total = total + reward
    return total[:, env.cooperators].mean(1).unflatten(0, (S, -1))


def robustness_report(nets: Nets, args: Args, device: torch.device, run_dir: Path, wandb_runs: list) -> None:
    """Sweep all perturbations on fresh environments: a table on the terminal, robustness.csv and .png, and in wandb.
    95% t-intervals over seeds; with one seed, over its episodes."""
    env = make_env(args, args.num_seeds * args.eval_episodes, device)
    families = [f for f in SWEEP if f not in DYNAMICS or f in getattr(env, "dynamics", ())]
    points = [("clean", 0.0), *((f, strength) for f in families for strength in SWEEP[f])]
    columns = ["env_id", "regularizer", "seed", "perturbation", "strength", "return", "standard_error", "episodes"]
    rows, table = [], {}
    for family, strength in tqdm(points, desc="robustness", unit="point", disable=None, leave=False):
        changed = make_env(args, env.num_envs, device, **{family: strength}) if family in DYNAMICS else env
        generators = make_generators(args.seed, args.num_seeds, "evaluation", device)
        returns = evaluate(changed, nets, args, generators, family, strength).double().cpu().numpy()
        for k, episodes in enumerate(returns):
            row = [args.env_id, args.regularizer, args.seed + k, family, strength]
            rows.append([*row, episodes.mean(), episodes.std() / len(episodes) ** 0.5, len(episodes)])
        sample = returns.mean(1) if args.num_seeds > 1 else returns[0]
        half = stats.t.ppf(0.975, len(sample) - 1) * stats.sem(sample) if len(sample) > 1 else math.nan
        table.setdefault(family, {})[strength] = (sample.mean(), half)
    path = run_dir / ("robustness.csv" if args.backend == "torch" else f"robustness_{args.backend}.csv")
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


def make_nets(env, args: Args, state: dict | None = None) -> tuple[Nets, dict[str, torch.optim.Optimizer]]:
    """Actors, critics and their targets; an Adam for all actors and one for all critics. As in checkpoint `state`."""
    generators = make_generators(args.seed, args.num_seeds, "init", env.device)
    N, (O, A), hidden = env.num_agents, (env.obs_mask.shape[1], env.action_mask.shape[1]), [args.hidden_size] * 2
    sizes = {"actor": [O, *hidden, A], "critic": [N * (O + A), *hidden, 1]}
    nets = {name: init_mlp(sizes[name], N, generators) for name in sizes}
    optimizers = {name: torch.optim.Adam([net.flat], args.learning_rate, fused=True) for name, net in nets.items()}
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
    env_step = env.step if args.env_id.startswith("zoo:") else compiled(env.step)  # Python environments do not compile
    # on CPUs torch.compile (2.13) gets the gradient through the unrolled attack wrong
    exact = env.device.type == "cuda" or not (args.regularized or args.action_reg_coef > 0)
    losses = {"critic": critic_loss, "actor": actor_loss}
    losses = {name: compiled(loss) if exact else loss for name, loss in losses.items()}
    names, per_iteration = ("rollout", "replay", "noise"), args.num_envs * env.horizon
    streams = {name: make_generators(args.seed, args.num_seeds, name, env.device, RANK) for name in names}
    slots = args.buffer_size // per_iteration  # a slot is an episode of each environment
    replay = make_replay(env, args.num_seeds, slots * args.num_envs, env.horizon)
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
        returns = returns + rollout(env_step, env, nets["actor"], replay, slot, std, streams["rollout"], args)
        iteration += 1
        last_step, step = step, iteration * per_iteration
        filled = min(iteration, slots) * args.num_envs
        for _ in range(max(0, step - args.learning_starts) // args.steps_per_update - num_updates):
            batch = sample(replay, filled, args.batch_size, streams["replay"])
            noise = draw_noise(streams["noise"], env, args)
            metrics = update(nets, optimizers, losses, batch, noise, env, args)
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
            row = {"charts/episodic_return": returns[:, env.cooperators].mean(1) / (iteration - first)}
            row |= {name: value / count for name, value in sums.items()}
            test_streams = make_generators(args.seed, args.num_seeds, "test", env.device)
            row["eval/episodic_return"] = evaluate(env, nets, args, test_streams).mean(1)
            if args.regularized:
                obs = sample(replay, filled, args.batch_size, test_streams)["obs"].transpose(1, 2)
                noise = draw_noise(test_streams, env, args)["perturbation"]
                network = partial(policy, nets["actor"], env=env, args=args)
                scale = perturbation_scale(obs[:, :, : noise.shape[2]], env, args)
                row |= diagnose(nets["actor"], network, obs, noise, scale, env.cooperators, args)
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
    try:
        env = make_env(args, args.num_seeds * args.num_envs, device)
    except (ValueError, ImportError) as error:
        fail(str(error))
    if env.discrete == args.continuous_actions:
        fail(f"--continuous-actions must fit {args.env_id}, where it is {not env.discrete}")
    if args.buffer_size < args.num_envs * env.horizon:
        fail(f"--buffer-size must hold {args.num_envs * env.horizon} steps, num_envs episodes, got {args.buffer_size}")
    nets, optimizers = make_nets(env, args, state)
    run_dir = run_dir or make_run_dir(args)
    wandb_runs = [] if args.evaluate else start_wandb(args, run_dir, run_labels(args))
    if not args.evaluate and not train(env, nets, optimizers, args, run_dir, wandb_runs, state):
        print(f"stopped; go on with: python {Path(__file__).name} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(130)
    if RANK == 0:
        robustness_report(nets, args, device, run_dir, wandb_runs)
        if args.capture_video:
            frames, streams = [], make_generators(args.seed, args.num_seeds, "video", device)
            env = make_env(replace(args, backend="torch"), args.num_seeds, device)
            evaluate(env, nets, args, streams, frames=frames)
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
