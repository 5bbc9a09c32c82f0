"""RMA3C: multi-agent DDPG in which each agent trains against an adversary that perturbs what it observes.

Han et al. 2022, "What is the solution for state-adversarial multi-agent reinforcement learning?" (arXiv 2212.02705),
the baseline that the ERNIE paper compares with. Agent i has, as in MADDPG, a policy pi_i and a centralised critic Q_i,
and besides an adversary chi_i: the agent sees o_i + d chi_i(o_i), |chi_i| <= 1, and acts on that. Policies ascend and
adversaries descend on the critics in turns, several times per update. Of the two algorithms in the authors' repository
this is `pmaddpg`, the one that its README trains.

    python baselines/rma3c.py --epsilon 0.1                                 # simple_spread_v3
    python baselines/rma3c.py --env-id simple_tag_v3 --num-seeds 5          # five independent runs side by side
    python baselines/rma3c.py --evaluate runs/RUN --backend pettingzoo      # the trained policies in the original mpe2

Differences to the authors' code: radius 0.1 instead of 1.0, 2 alternations per update instead of 20, an update every 50
steps instead of 100, learning rate 1e-3 instead of 1e-2; target actions without Gumbel noise; the others' present
actions instead of replayed ones in the losses; continuous actions too; only the cooperating team has adversaries.

Axes: S seeds, N agents, B environments of a seed, T steps of an episode, M minibatch, O observation, A action, K
alternations of an update.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where envs is

import envs
from envs import perturb, zoo

Generators = list[torch.Generator]  # one per seed
Batch = dict[str, Tensor]  # a minibatch, or metrics [S]
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
    """compile the environment step and the losses (torch.compile)"""
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
    """continuous actions; --no-continuous-actions: discrete ones by straight-through Gumbel-softmax (RMA3C)"""
    total_timesteps: int = 500_000
    """environment steps of one seed"""
    num_envs: int = 40
    """B, environments of one seed that step together"""
    steps_per_update: int = 50
    """environment steps of one seed per update, whatever num_envs is (RMA3C: 100)"""
    learning_starts: int = 5_000
    """environment steps before the first update (RMA3C: 25,600)"""
    buffer_size: int = 250_000
    """replay capacity of one seed in environment steps (RMA3C: 1e6)"""
    batch_size: int = 1024
    """M, transitions per minibatch"""
    learning_rate: float = 1e-3
    """Adam step size of policies and critics (RMA3C: 1e-2)"""
    gamma: float = 0.95
    """discount factor"""
    tau: float = 0.01
    """share by which the targets move at each update"""
    hidden_size: int = 64
    """width of the two hidden layers"""
    activation: Literal["relu", "silu", "tanh"] = "relu"
    """hidden activation"""
    exploration_noise: float = 0.8
    """continuous actions: standard deviation of the first exploration noise, in half-widths of the action range"""
    exploration_noise_end: float = 0.2
    """the same at the end, linear in between"""
    gumbel_temperature: float = 1.0
    """discrete actions: temperature of the Gumbel-softmax"""
    others_actions: Literal["policy", "replay"] = "policy"
    """others' actions in the losses of policies and adversaries: their present policies, or replay (RMA3C)"""
    policy_l2: float = 1e-3
    """weight of the mean squared actor output in the policy loss"""
    max_grad_norm: float = 0.5
    """the gradient of each network of each seed is clipped to this norm"""

    epsilon: float = 0.1
    """d, largest change of an observation entry (RMA3C: 1.0, the half-width of the particles' arena); 0 is MADDPG"""
    descent_steps: int = 2
    """K, alternations of a policy step and an adversary step per update (RMA3C, gda_step: 20, at ten times the cost)"""
    adversary_learning_rate: float = 1e-3
    """Adam step size of the adversaries (RMA3C: 1e-2)"""
    perturb_rollout: bool = True
    """agents act on perturbed observations while training; --no-perturb-rollout: on true ones"""

    log_interval: int = 10_000
    """environment steps between two rows of metrics.csv"""
    checkpoint_interval: int = 100_000
    """environment steps between two checkpoints"""
    eval_episodes: int = 1000
    """episodes of one seed at each point of the robustness report"""
    norm: Literal["l2", "linf"] = "l2"
    """norm of the report's worst-case observations "mad" and "critic"; the adversary's own is linf"""

    def __post_init__(self):
        floats = " ".join(name for name, value in asdict(self).items() if isinstance(value, float))
        counts = "num_seeds num_threads num_agents total_timesteps num_envs steps_per_update buffer_size batch_size"
        counts += " hidden_size descent_steps log_interval checkpoint_interval eval_episodes"
        for names, holds, rule in (
            (floats, math.isfinite, "a finite number"),
            (counts, lambda v: v >= 1, "at least 1"),
            ("learning_rate adversary_learning_rate", lambda v: v > 0, "above 0"),
            ("gumbel_temperature max_grad_norm", lambda v: v > 0, "above 0"),
            ("seed learning_starts epsilon policy_l2", lambda v: v >= 0, "0 or more"),
            ("exploration_noise exploration_noise_end", lambda v: v >= 0, "0 or more"),
            ("learning_starts", lambda v: v < self.total_timesteps, "below --total-timesteps"),
            ("gamma tau", lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("backend", lambda v: v == "torch" or self.evaluate, "torch unless --evaluate is given"),
            ("resume", lambda v: not self.evaluate, "left out with --evaluate"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {value!r}")

    @property
    def regularizer(self) -> str:
        """What the report calls the method."""
        return "rma3c"

    @property
    def divergence(self) -> str:
        """What the report's attack "mad" increases, as by default in ernie_maddpg.py."""
        return "l2" if self.continuous_actions else "kl"


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


Nets = dict[str, MLP]  # actor, critic, adversary, and the target of each


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
# The adversary


def deceive(adversary: MLP, obs: Tensor, radius: float, env, args: Args) -> Tensor:
    """ALGO LOGIC: what agents see, o~_i = o_i + d chi_i(o_i), [S, N, M, O]. Padding, entries that are always 0 and what
    opponents see stay as they are."""
    live = (env.obs_mask & env.cooperators[:, None])[:, None].to(obs.dtype)
    return obs + radius * live * torch.tanh(forward(adversary.layers(), obs, args.activation))


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


def frozen(net: MLP) -> MLP:
    """The same network without gradient."""
    return MLP(net.flat.detach(), net.sizes)


def td_loss(nets: Nets, batch: Batch, env, args: Args):
    """Squared TD error of each critic: loss, metrics. ALGO LOGIC: y_i = r_i + gamma (1 - terminated) Q'_i(x', a') at
    true observations x', a'_j = pi'_j(o'_j + d chi'_j(o'_j)); truncation does not end the return."""
    with torch.no_grad():
        critic, next_obs = nets["critic_target"], batch["next_obs"]
        seen = deceive(nets["adversary_target"], next_obs.transpose(1, 2), args.epsilon, env, args)
        next_action = squash(policy(nets["actor_target"], seen, env, args), env)
        next_joint, encoded = next_action.transpose(1, 2).unsqueeze(1), encode(critic, next_obs)  # [S, 1, M, N, A]
        discount = args.gamma * (1 - batch["terminated"]).unsqueeze(1)
        target = batch["rewards"].transpose(1, 2) + discount * q_values(critic, encoded, next_joint, args)  # [S, N, M]
    q = q_values(nets["critic"], encode(nets["critic"], batch["obs"]), batch["actions"].unsqueeze(1), args)
    loss = (q - target).square().mean(-1)  # [S, N]
    return loss.sum(), {"losses/critic_loss": loss.detach().mean(1), "losses/q_values": q.detach().mean((1, 2))}


def deceived_values(actor: MLP, adversary: MLP, critic: MLP, encoded: Tensor, batch: Batch, noise, env, args: Args):
    """Q_i(x, a_i, a_-i) [S, N, M] at a_i = pi_i(o~_i), a_-i constant; the actors' outputs z [S, N, M, A]. encoded is
    encode(critic, x), noise the Gumbel noise [S, N, M, A] of discrete actions."""
    z = policy(actor, deceive(adversary, batch["obs"].transpose(1, 2), args.epsilon, env, args), env, args)
    action = straight_through(z, noise, args.gumbel_temperature) if env.discrete else squash(z, env)
    others = batch["actions"] if args.others_actions == "replay" else squash(z.detach(), env).transpose(1, 2)
    joint = torch.where(own_slot(env), action.transpose(1, 2).unsqueeze(1), others.unsqueeze(1))
    return q_values(critic, encoded, joint, args), z


def policy_loss(nets: Nets, encoded: Tensor, batch: Batch, noise: Tensor | None, env, args: Args):
    """ALGO LOGIC: policies maximise Q_i at what they do when deceived, the adversaries frozen: loss, metrics."""
    fixed = frozen(nets["adversary"]), frozen(nets["critic"])
    q, z = deceived_values(nets["actor"], *fixed, encoded, batch, noise, env, args)
    value = q.mean(-1)  # [S, N]
    loss = -value + args.policy_l2 * (z * env.action_mask[:, None]).square().mean((2, 3))
    return loss.sum(), {"losses/actor_loss": -value.detach().mean(1)}


def adversary_loss(nets: Nets, encoded: Tensor, batch: Batch, noise: Tensor | None, env, args: Args):
    """ALGO LOGIC: adversaries minimise the same Q_i through what the frozen policies see: loss, metrics."""
    actor, critic = frozen(nets["actor"]), frozen(nets["critic"])
    q, _ = deceived_values(actor, nets["adversary"], critic, encoded, batch, noise, env, args)
    value = q.mean(-1) * env.cooperators  # [S, N]
    return value.sum(), {"losses/adversary_loss": value.detach().sum(1) / env.cooperators.sum()}


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


def update_rma3c(nets, optimizers, losses, batch: Batch, noise: list, env, args: Args) -> Batch:
    """ALGO LOGIC: a step of all critics, then K alternations of a policy and an adversary step on the same minibatch,
    noise[k] in the k-th; then all targets move. Metrics are those of the last alternation."""
    loss, metrics = losses["critic"](nets, batch, env, args)
    descend(loss, [nets["critic"]], optimizers["critic"], args.max_grad_norm)
    with torch.no_grad():
        encoded = encode(nets["critic"], batch["obs"])  # the same in all alternations
    for part in noise:
        for name in ("actor", "adversary"):
            loss, more = losses[name](nets, encoded, batch, part, env, args)
            descend(loss, [nets[name]], optimizers[name], args.max_grad_norm)
            metrics |= more
    for name in ("actor", "critic", "adversary"):
        nets[name + "_target"].flat.lerp_(nets[name].flat.detach(), args.tau)
    return metrics


def draw_alternations(generators: Generators, env, args: Args) -> list[Tensor | None]:
    """The random numbers of one update: Gumbel noise [S, N, M, A] for each alternation if actions are discrete."""
    if not env.discrete:
        return [None] * args.descent_steps
    shape = (args.descent_steps, env.num_agents, args.batch_size, env.action_mask.shape[1])
    return list(draw(gumbel, shape, generators).unbind(1))


# --------------------------------------------------------------------------------------------------------------------
# Rollout and replay of whole episodes, so that between two of them a checkpoint needs no environment state


def make_replay(env, num_seeds: int, num_episodes: int, T: int) -> Batch:
    """Of E episodes: obs [S, E, T + 1, N, O], actions [S, E, T, N, A], rewards [S, E, T, N], terminated [S, E, T]."""
    N, (O, A) = env.num_agents, (env.obs_mask.shape[1], env.action_mask.shape[1])
    shapes = {"obs": (T + 1, N, O), "actions": (T, N, A), "rewards": (T, N), "terminated": (T,)}
    return {k: torch.zeros(num_seeds, num_episodes, *v, dtype=env.dtype, device=env.device) for k, v in shapes.items()}


@torch.no_grad()
def deceived_rollout(step: Callable, env, nets: Nets, replay: Batch, slot: int, std: float, generators, args) -> Tensor:
    """An episode of every environment, with exploration and, if so asked, perturbed observations, into replay from
    `slot` on, which keeps the true observations; mean return of agents [S, N]."""
    S, B = args.num_seeds, args.num_envs
    part = {k: v[:, slot : slot + B] for k, v in replay.items()}
    state, obs = env.reset(generators)
    shape = (env.horizon, env.num_agents, B, env.action_mask.shape[1])
    noise = draw(gumbel if env.discrete else torch.randn, shape, generators).unbind(1)
    half = (env.action_high - env.action_low) / 2
    part["obs"][:, :, 0] = obs.unflatten(0, (S, B))
    for t in range(env.horizon):
        seen = obs.unflatten(0, (S, B)).transpose(1, 2)
        if args.perturb_rollout:
            seen = deceive(nets["adversary"], seen, args.epsilon, env, args)
        z = policy(nets["actor"], seen, env, args)
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
SCALES = (0.5, 1.0, 2.0)  # of the trained adversary's radius


def make_env(args: Args, num_envs: int, device: torch.device, **factors: float):
    """The task of `args` with physical constants multiplied by `factors`, or the same task in the original mpe2."""
    options = {"device": device, "num_agents": args.num_agents, "continuous_actions": args.continuous_actions}
    env = envs.make(args.env_id, num_envs, **options)
    env = replace(env, **{name: factor * getattr(env, name) for name, factor in factors.items()}) if factors else env
    return zoo.original(env) if args.backend == "pettingzoo" else env


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


def single_changes(joint: Tensor, env) -> Tensor:
    """[..., N, A] one-hot -> [..., N * A, N, A]: the joint actions in which agent j plays k instead, for all (j, k)."""
    action = torch.eye(joint.shape[-1], dtype=joint.dtype, device=joint.device)[:, None]  # [A, 1, A]
    return torch.where(own_slot(env), action, joint[..., None, None, :, :]).flatten(-4, -3)


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


@torch.no_grad()
def evaluate_deceived(env, nets, args: Args, generators, radius: float) -> Tensor:
    """Returns as in `evaluate`, under the run's own adversaries: o + radius chi(o)."""
    S, total = args.num_seeds, 0.0
    state, obs = env.reset(generators)
    for _ in range(env.horizon):
        seen = deceive(nets["adversary"], obs.unflatten(0, (S, -1)).transpose(1, 2), radius, env, args)
        action = to_env(squash(policy(nets["actor"], seen, env, args), env).transpose(1, 2), env)
        state, obs, reward, _, _, _ = env.step(state, action, env.draw(generators))
        total = total + reward
    return total[:, env.cooperators].mean(1).unflatten(0, (S, -1))


@torch.no_grad()
def inspect_adversaries(nets: Nets, obs: Tensor, env, args: Args) -> Batch:
    """l2 length of cooperating agents' perturbations, and the share of perturbed entries within 1% of the radius."""
    delta = (deceive(nets["adversary"], obs, args.epsilon, env, args) - obs)[:, env.cooperators]  # [S, N, M, O]
    live = env.obs_mask[env.cooperators][:, None].to(obs.dtype)
    at_edge = (delta.abs() > 0.99 * args.epsilon) * live
    return {
        "rma3c/perturbation_norm": torch.linalg.vector_norm(delta, dim=-1).mean((1, 2)),
        "rma3c/saturation": at_edge.mean(2).sum((1, 2)) / live.sum(),
    }


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


def adversary_report(nets: Nets, args: Args, device: torch.device, run_dir: Path) -> None:
    """Add the returns under the run's own adversaries to robustness.csv and to the table, strength the linf radius."""
    env, cells = make_env(args, args.num_seeds * args.eval_episodes, device), []
    path = run_dir / ("robustness.csv" if args.backend == "torch" else f"robustness_{args.backend}.csv")
    for radius in [scale * args.epsilon for scale in SCALES if args.epsilon > 0]:
        generators = make_generators(args.seed, args.num_seeds, "evaluation", device)
        returns = evaluate_deceived(env, nets, args, generators, radius).double().cpu().numpy()
        with open(path, "a", newline="") as file:
            for k, episodes in enumerate(returns):
                row = [args.env_id, args.regularizer, args.seed + k, "adversary", radius, episodes.mean()]
                csv.writer(file).writerow([*row, episodes.std() / len(episodes) ** 0.5, len(episodes)])
        sample = returns.mean(1) if args.num_seeds > 1 else returns[0]
        half = stats.t.ppf(0.975, len(sample) - 1) * stats.sem(sample) if len(sample) > 1 else math.nan
        cells.append(f"{radius:>4g}: {sample.mean():7.2f} ± {half:<5.2f}")
    if cells:
        print(f"  {'adversary':16s}" + "   ".join(cells))


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


def make_players(env, args: Args, state: dict | None = None) -> tuple[Nets, dict[str, torch.optim.Optimizer]]:
    """Actors, critics, adversaries and their targets; an Adam for all of each kind. As in checkpoint `state`."""
    generators = make_generators(args.seed, args.num_seeds, "init", env.device)
    N, (O, A), hidden = env.num_agents, (env.obs_mask.shape[1], env.action_mask.shape[1]), [args.hidden_size] * 2
    sizes = {"actor": [O, *hidden, A], "critic": [N * (O + A), *hidden, 1], "adversary": [O, *hidden, O]}
    rates = {"actor": args.learning_rate, "critic": args.learning_rate, "adversary": args.adversary_learning_rate}
    nets = {name: init_mlp(sizes[name], N, generators) for name in sizes}
    optimizers = {name: torch.optim.Adam([net.flat], rates[name], fused=True) for name, net in nets.items()}
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
    losses = {"critic": td_loss, "actor": policy_loss, "adversary": adversary_loss}
    losses = {name: compiled(loss) for name, loss in losses.items()}
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
        returns = returns + deceived_rollout(env_step, env, nets, replay, slot, std, streams["rollout"], args)
        iteration += 1
        last_step, step = step, iteration * per_iteration
        filled = min(iteration, slots) * args.num_envs
        for _ in range(max(0, step - args.learning_starts) // args.steps_per_update - num_updates):
            batch = sample(replay, filled, args.batch_size, streams["replay"])
            noise = draw_alternations(streams["noise"], env, args)
            metrics = update_rma3c(nets, optimizers, losses, batch, noise, env, args)
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
            obs = sample(replay, filled, args.batch_size, test_streams)["obs"].transpose(1, 2)
            test_streams = make_generators(args.seed, args.num_seeds, "test", env.device)  # the same initial states
            row["eval/attacked_return"] = evaluate_deceived(env, nets, args, test_streams, args.epsilon).mean(1)
            row |= inspect_adversaries(nets, obs, env, args)
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
    nets, optimizers = make_players(env, args, state)
    run_dir = run_dir or make_run_dir(args)
    wandb_runs = [] if args.evaluate else start_wandb(args, run_dir, run_labels(args))
    if not args.evaluate and not train(env, nets, optimizers, args, run_dir, wandb_runs, state):
        print(f"stopped; go on with: python baselines/{Path(__file__).name} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(130)
    if RANK == 0:
        robustness_report(nets, args, device, run_dir, wandb_runs)
        adversary_report(nets, args, device, run_dir)
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
