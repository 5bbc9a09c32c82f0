"""ERMAS in the AI Economist's economy: taxes that stay good when workers are not as risk-averse as in training.

Four agents gather, trade and build; a planner sets the marginal tax rates of each period and is paid by the change of
equality times productivity (Zheng et al. 2020, arXiv 2004.13332). ERMAS (Zhao et al. 2021, arXiv 2106.05492) trains it
against agents that lower social welfare as far as none of them could gain more than epsilon by changing its policy
alone (Eq. 7): each ascends on minus the planner's reward plus lambda times its own, corrected by a first-order
meta-gradient (Eq. 11, 15, 16), and lambda rises while the regret that a trust-region step finds (Eq. 13, 14) exceeds
epsilon (Eq. 12). Then new agents of other risk aversion learn from scratch under the frozen planner (Figure 6).

    python ermas_economy.py --epsilon 0.002                      # a small map, 100 steps: for two CPU cores
    python ermas_economy.py --method marl --warm-start RUN_DIR   # the AI Economist, from the other run's first phase
    python ermas_economy.py --preset paper                       # 25 x 25 tiles, 1,000 steps: for a GPU

Phase one: agents learn without taxes while labor becomes costly. Phase two: taxes, whose limit rises. PPO trains agents
and planner. All agents share one policy: a unilateral deviation of agent i is a copy of it that only i follows, found
by TRPO; in slice i of one wide batch of environments agent i plays its copy, in the last slice nobody deviates.

Differences to the paper, by their number in the README: 4 sign of Eq. 9, 6 own regret only, 7 sign of Eq. 12, 8 bounds
and damping of lambda, 9 regret per step, 10 common random numbers, 13 KL to the anchor, 14 Eq. 15 is the bracket of
Eq. 11, 17 gradients, not parameters, 20 planner's turn, 21 warm-up, 29 change of utility. PPO in place of policy
gradients; feed-forward networks without maps in place of convolutions and an LSTM; the planner decides once a period.

Axes: R runs (seeds, in the test seeds of every eta), N agents, B environments of a run, T steps, D tax periods, M
samples, O observation, A actions, G observation of the planner, b brackets, c choices of a rate, K parameters.
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
from torch import Tensor
from tqdm import tqdm

import envs
from envs import economy
from envs.robustness import half_interval as interval

Generators = list[torch.Generator]  # one per run
Batch = dict[str, Tensor]  # episodes, a minibatch, or metrics [R]
RANK = int(os.environ.get("RANK", "0"))  # of this process under torchrun
CHECKPOINT = "checkpoint.pt" if RANK == 0 else f"checkpoint_rank{RANK}.pt"
TAXES = {"ermas": "planner", "marl": "planner", "saez": "saez", "us-federal": "us", "free-market": "free"}


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of this experiment"""
    seed: int = 1
    """seed of the first run; run k uses seed + k"""
    num_seeds: int = 1
    """independent runs trained side by side (paper: 5 to 10)"""
    torch_deterministic: bool = True
    """deterministic algorithms only: same seed, same machine, same numbers"""
    cuda: bool = True
    """use the GPU if there is one"""
    num_threads: int = 1
    """CPU threads; with more than one set OMP_WAIT_POLICY=PASSIVE, or one busy core stalls all of them"""
    compile: bool = False
    """compile the environment step (torch.compile)"""
    runs_dir: str = "runs"
    """folder that receives a folder per run"""
    resume: str | None = None
    """run folder or checkpoint file to continue; all other flags are read from it"""
    evaluate: str | None = None
    """run folder or checkpoint file whose planners are evaluated again, without training"""
    capture_video: bool = False
    """write a GIF of an episode of the trained policies"""
    track: bool = True
    """log to Weights & Biases, one run per seed"""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no account; `wandb sync` uploads later"""
    wandb_project_name: str = "robust-marl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team"""

    preset: Literal["tiny", "paper"] = "tiny"
    """defaults of the flags below: tiny, for two CPU cores; paper, the original's sizes, for a GPU"""
    env_id: Literal["economy_tiny_v0", "economy_v0"] = "economy_tiny_v0"
    """9 x 9 tiles and 100 steps in five tax periods, or 25 x 25 tiles and 1,000 steps in ten"""
    method: Literal["ermas", "marl", "saez", "us-federal", "free-market"] = "ermas"
    """ermas; everybody for itself (the AI Economist); or no planner: Saez's formula, US rates of 2018, no taxes"""
    eta_train: float = 0.23
    """the agents' risk aversion in training"""
    phase_one_timesteps: int = 400_000
    """environment steps of one seed without taxes (AI Economist: 25 million)"""
    phase_two_timesteps: int = 400_000
    """environment steps of one seed with taxes, in which nobody deviates"""
    warm_start: str | None = None
    """run folder whose agents at the end of phase one take the place of phase one"""
    num_envs: int = 64
    """B, environments of one seed that step together; an iteration plays 1 + M episodes of each"""
    labor_constant: float = 300.0
    """phase one: labor costs 1 - exp(-n / this) of its price after n steps of positive mean reward of an environment"""
    tax_annealing: float = 0.5
    """share of phase two in which the highest allowed rate rises from 0.1 to 1; at 0 it is 1"""
    rate_step: float = 0.25
    """the planner chooses among multiples of this rate (AI Economist: 0.05, which takes far more episodes to learn)"""
    hidden_size: int = 64
    """width of the two hidden layers of the agents' policy and of their values"""
    planner_hidden_size: int = 64
    """the same of the planner"""
    activation: Literal["relu", "silu", "tanh"] = "tanh"
    """hidden activation"""
    learning_rate: float = 2e-3
    """Adam step size of the agents; in phase two linear to 0"""
    planner_learning_rate: float = 5e-3
    """Adam step size of the planner, linear to 0"""
    gamma: float = 0.99
    """discount factor of a step"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    update_epochs: int = 4
    """passes over the episodes of an iteration"""
    num_minibatches: int = 8
    """minibatches of a pass"""
    planner_epochs: int = 4
    """passes of the planner over its decisions of an iteration"""
    clip_coef: float = 0.2
    """PPO's clipping of the probability ratio"""
    ent_coef: float = 0.025
    """weight of the agents' entropy (AI Economist: 0.025)"""
    planner_ent_coef: float = 0.01
    """weight of the planner's entropy, summed over brackets, at the start of phase two"""
    planner_ent_coef_end: float = 0.001
    """the same at its end, linear in between"""
    vf_coef: float = 0.5
    """weight of the squared error of normalised values"""
    value_decay: float = 0.9
    """weight of the past in the running moments by which returns are normalised"""
    max_grad_norm: float = 0.5
    """the gradient of each network of each seed is clipped to this norm"""

    epsilon: float = 0.002
    """slack on an agent's regret, utility per step"""
    beta: float = 0.4
    """weight of the meta-gradient (Eq. 15)"""
    lambda_init: float = 10.0
    """lambda_0, first weight of an agent's own reward, and the weight during the warm-up"""
    lambda_lr: float = 300.0
    """alpha_lambda, step size of lambda"""
    lambda_damping: float = 1000.0
    """kappa: an agent's own reward counts lambda + kappa * (regret - epsilon), so that lambda settles; 0: as printed"""
    clamp_regret: bool = True
    """an estimated regret below 0 counts as 0; without, lambda also falls where a deviation failed"""
    lambda_max: float = 100.0
    """upper bound of lambda"""
    inner_steps: int = 1
    """M = n_inner, trust-region steps of a deviation"""
    rho: float = 0.05
    """radius of the trust region, mean KL(policy || deviation) in nats"""
    trust_batch_size: int = 1024
    """samples of each agent that a trust-region step is found with"""
    meta_gradient: Literal["fomaml", "reptile"] = "fomaml"
    """estimate of grad J_i(deviation): the gradient at its end, or the mean along it (Eq. 15; with M = 1 just g_1)"""
    cg_steps: int = 10
    """conjugate gradient steps of the natural gradient"""
    cg_damping: float = 1e-2
    """damping of the Fisher matrix"""
    warmup: float = 0.1
    """share of phase two with lambda_0, without deviations and with the planner at rest"""

    log_interval: int = 25_000
    """environment steps between two rows of metrics.csv"""
    checkpoint_interval: int = 100_000
    """environment steps between two checkpoints"""
    eval_eta: tuple[float, ...] = (0.1, 0.2, 0.23, 0.3, 0.5)
    """risk aversion of the test's agents, who learn from scratch under the frozen planner (paper: about 0.2 to 0.3)"""
    eval_timesteps: int = 200_000
    """environment steps in which the test's agents, after their own phase one, learn to live with the taxes"""
    eval_episodes: int = 512
    """episodes in which the welfare of one seed is measured at each eta"""
    eval_agents: str | None = None
    """test_agents.pt of another run, the test's agents at the end of their phase one, which does not depend on taxes"""

    def __post_init__(self):
        floats = " ".join(name for name, value in asdict(self).items() if isinstance(value, float))
        counts = "num_seeds num_threads phase_one_timesteps phase_two_timesteps num_envs hidden_size num_minibatches"
        for names, holds, rule in (
            (floats, math.isfinite, "a finite number"),
            (counts, lambda v: v >= 1, "at least 1"),
            ("planner_hidden_size update_epochs planner_epochs inner_steps", lambda v: v >= 1, "at least 1"),
            ("trust_batch_size cg_steps log_interval checkpoint_interval", lambda v: v >= 1, "at least 1"),
            ("eval_timesteps eval_episodes", lambda v: v >= 1, "at least 1"),
            ("learning_rate planner_learning_rate clip_coef", lambda v: v > 0, "above 0"),
            ("max_grad_norm rho lambda_max", lambda v: v > 0, "above 0"),
            ("seed labor_constant ent_coef planner_ent_coef", lambda v: v >= 0, "0 or more"),
            ("planner_ent_coef_end vf_coef epsilon beta lambda_lr", lambda v: v >= 0, "0 or more"),
            ("lambda_damping cg_damping", lambda v: v >= 0, "0 or more"),
            ("gamma gae_lambda tax_annealing warmup", lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("value_decay", lambda v: 0 <= v < 1, "at least 0 and below 1"),
            ("rate_step", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("lambda_init", lambda v: 0 <= v <= self.lambda_max, "between 0 and --lambda-max"),
            ("eta_train", lambda v: 0 <= v <= 0.999, "between 0 and 0.999"),
            ("eval_eta", lambda v: v and all(0 <= eta <= 0.999 for eta in v), "one value or more from 0 to 0.999"),
            ("eval_eta", lambda v: len(set(v)) == len(v), "values that differ"),
            ("resume", lambda v: v is None or not self.evaluate, "left out with --evaluate"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not holds(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {value!r}")

    @property
    def learns_taxes(self) -> bool:
        return TAXES[self.method] == "planner"


# of the AI Economist's training, per seed: 60 environments there; here as many as a GPU likes, and longer passes
PAPER = {"preset": "paper", "env_id": "economy_v0", "phase_one_timesteps": 25_000_000, "num_envs": 256}
PAPER |= {"phase_two_timesteps": 100_000_000, "labor_constant": 10_000.0, "hidden_size": 128, "gamma": 0.998}
PAPER |= {
    "rate_step": 0.05,
    "planner_hidden_size": 256,
    "learning_rate": 3e-4,
    "planner_learning_rate": 1e-4,
    "gae_lambda": 0.98,
}
PAPER |= {"num_minibatches": 64, "update_epochs": 1, "log_interval": 1_000_000, "checkpoint_interval": 2_000_000}
PAPER |= {"eval_timesteps": 25_000_000}


# --------------------------------------------------------------------------------------------------------------------
# Networks: the MLPs of all runs are one batched MLP

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


Nets = dict[str, MLP]  # agents, agents_values, planner, planner_values


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


def make_economists(env, generators: Generators, args: Args) -> Nets:
    """Policy and values of the agents of each run, two values each: own reward, planner's. The same of its planner."""
    (O, A), G, heads = (env.obs_mask.shape[1], env.action_mask.shape[1]), env.planner_obs_size, rate_heads(env)
    own, planner = [args.hidden_size] * 2, [args.planner_hidden_size] * 2
    sizes = {"agents": [O, *own, A], "agents_values": [O, *own, 2]}
    sizes |= {"planner": [G, *planner, math.prod(heads)], "planner_values": [G, *planner, 1]}
    gains = {"agents": 0.01, "planner": 0.01}
    return {name: orthogonal_mlp(size, 1, gains.get(name, 1.0), generators) for name, size in sizes.items()}


def make_optimizers(nets: Nets, args: Args, state: dict | None = None) -> dict[str, torch.optim.Optimizer]:
    """An Adam for agents and one for planners, as in checkpoint `state`."""
    rates = {"agents": args.learning_rate, "planner": args.planner_learning_rate}
    pairs = {who: [nets[who].flat, nets[f"{who}_values"].flat] for who in rates}
    optimizers = {who: torch.optim.Adam(flats, rates[who], eps=1e-5, fused=True) for who, flats in pairs.items()}
    for who, optimizer in optimizers.items() if state is not None else ():
        optimizer.load_state_dict(state["optimizers"][who])
    return optimizers


def rate_heads(env) -> tuple[int, int]:
    """b, c."""
    return len(env.cutoffs), 1 + env.num_rates


def masked_logp(net: MLP, obs: Tensor, valid: Tensor, args: Args) -> Tensor:
    """Log-probabilities [P, M, A] of P policies at obs [P, M, O]; invalid actions have none."""
    z = forward(net.layers(), obs.unsqueeze(1), args.activation).squeeze(1)
    return F.log_softmax(torch.where(valid, z, -1e9), -1)


def rate_logp(net: MLP, obs: Tensor, valid: Tensor, args: Args) -> Tensor:
    """Log-probabilities [P, M, b, c] of the planners' choices at obs [P, M, G], valid [P, M, b, c]."""
    z = forward(net.layers(), obs.unsqueeze(1), args.activation).squeeze(1)
    return F.log_softmax(torch.where(valid, z.unflatten(-1, valid.shape[-2:]), -1e9), -1)


def state_values(net: MLP, obs: Tensor, args: Args) -> Tensor:
    """Normalised values [R, M, heads] at obs [R, M, O]."""
    return forward(net.layers(), obs.unsqueeze(1), args.activation).squeeze(1)


def logp_of(logp: Tensor, choice: Tensor) -> Tensor:
    """Log-probabilities [...] of choices [...], of logp [..., A]."""
    return logp.gather(-1, choice.unsqueeze(-1)).squeeze(-1)


def entropy_of(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(-1)


def gumbel(shape: tuple[int, ...], **where) -> Tensor:
    """Standard Gumbel noise."""
    return -torch.log(-torch.log(torch.rand(shape, **where).clamp(1e-10, 1 - 1e-7)))


# --------------------------------------------------------------------------------------------------------------------
# Episodes


def own_part(x: Tensor) -> Tensor:
    """What the deviating agents see, do or get, [R * N, B, ...], of x [N + 1, R, B, N, ...]: agent i in slice i."""
    return x[:-1].diagonal(0, 0, 3).movedim(-1, 1).flatten(0, 1)


def sliced_logp(nets: Nets, deviations: MLP | None, obs: Tensor, valid: Tensor, args: Args) -> Tensor:
    """Log-probabilities [L, R, B, N, A] at obs [L, R, B, N, O]; in slice i agent i's are those of its deviation."""
    L, R, B, N, _ = obs.shape
    rows = (x.transpose(0, 1).flatten(1, 3) for x in (obs, valid))
    logp = masked_logp(nets["agents"], *rows, args).view(R, L, B, N, -1).transpose(0, 1)
    if deviations is not None:
        logp, own = logp.clone(), masked_logp(deviations, own_part(obs), own_part(valid), args)
        logp[:N].diagonal(0, 0, 3).copy_(own.view(R, N, B, -1).movedim(1, -1))
    return logp


def choose_rates(net: MLP, state, env, shape: tuple[int, int, int], generators: Generators, args: Args) -> Batch:
    """What the planner sees and chooses at the start of a period, [L, R, B, ...] each."""
    obs, valid = env.planner_obs(state).unflatten(0, shape), env.valid_rates(state).unflatten(0, shape)
    rows = (x.transpose(0, 1).flatten(1, 2) for x in (obs, valid))
    logp = rate_logp(net, *rows, args).unflatten(1, (shape[0], shape[2])).transpose(0, 1)  # [L, R, B, b, c]
    choices = (logp + draw(gumbel, logp.shape[2:], generators)).argmax(-1)
    taken = {"choices": choices, "choice_logprobs": logp_of(logp, choices).sum(-1)}
    return {"planner_obs": obs, "planner_valid": valid} | taken


@torch.no_grad()
def play_economy(env, step, nets: Nets, after, generators: Generators, args: Args, deviations: MLP | None = None):
    """An episode of every environment, `after` the one that ended in that state, with sampled actions. With deviations
    [R * N, K] of each agent of each run L = N + 1 slices of the same games are played by the same random numbers, and
    in slice i agent i follows its deviation; without them L = 1.

    Returns the joint policy's episodes, [R, B, T, N, ...] each, the deviating agents' obs, valid, actions and rewards
    [R * N, B, T, ...], and the joint policy's last state.
    """
    R, L = len(generators), 1 if deviations is None else env.num_agents + 1
    shape, kept, alone = (L, R, env.num_envs // R), [], []
    state, obs = env.reset(generators, after)
    state = economy.State(**{name: x.repeat(*[1] * (x.ndim - 1), L) for name, x in vars(state).items()})
    obs, valid, payment = obs.repeat(L, 1, 1), env.valid_actions(state), state.payment.T
    for t in range(env.horizon):
        new = {"obs": obs.unflatten(0, shape), "valid": valid.unflatten(0, shape)}
        logp = sliced_logp(nets, deviations, new["obs"], new["valid"], args)
        new["actions"] = (logp + draw(gumbel, logp.shape[2:], generators)).argmax(-1)  # [L, R, B, N]
        new["logprobs"] = logp_of(logp, new["actions"])
        if env.tax == "planner" and t % env.period == 0:
            new |= choose_rates(nets["planner"], state, env, shape, generators, args)
        rates, noise = new["choices"].flatten(0, 2) if "choices" in new else None, env.draw(generators).repeat(1, L)
        state, obs, reward, _, _, info = step(state, new["actions"].flatten(0, 2), noise, rates)
        valid, new["rewards"] = info["valid_actions"], reward.unflatten(0, shape)
        new["planner_rewards"] = info["planner_reward"].unflatten(0, shape)
        if (t + 1) % env.period == 0:  # a tax day
            new |= {name: getattr(state, name).T.unflatten(0, shape) for name in ("last_income", "rates")}
        kept.append({name: x[-1] for name, x in new.items()})
        if L > 1:
            alone.append({name: own_part(new[name]) for name in ("obs", "valid", "actions", "rewards")})
    episodes, lone = (
        {k: torch.stack([x[k] for x in part if k in x], 2) for k in dict.fromkeys(k for x in part for k in x)}
        for part in (kept, alone)
    )
    ends = {"coin": env.endowment(state).T, "labor": state.labor.T, "payment": payment}
    episodes |= {name: x.unflatten(0, shape)[-1] for name, x in ends.items()}
    return episodes, lone, economy.State(**{k: x[..., -env.num_envs :].contiguous() for k, x in vars(state).items()})


FACTS = ("coin", "labor", "payment", "houses", "income", "rates")


def facts_of(episodes: Batch) -> Batch:
    """What episodes [R, B, ...] come to: of each agent [R, B, N] coin and labor at the end, coin per house, houses and
    income before taxes; rates [R, B, D, b]."""
    totals = {"houses": (episodes["actions"] == 1).sum(2), "income": episodes["last_income"].sum(2)}
    return {name: totals[name] if name in totals else episodes[name] for name in FACTS}


# --------------------------------------------------------------------------------------------------------------------
# Losses: PPO for agents and planner. Samples come first in memory, [R, M, ...].


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


def average_ranks(*tensors: Tensor) -> list[Tensor]:
    """Means over the ranks of torchrun that train the same seeds, all in one message."""
    if not dist.is_initialized():
        return list(tensors)
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors)]


def mean_and_square(x: Tensor) -> Tensor:
    """Mean and mean square [2, S, 1, N], in float64, of x [S, M, N] over the samples of all ranks."""
    moments = torch.stack([x.double().mean(1, keepdim=True), x.double().square().mean(1, keepdim=True)])
    return average_ranks(moments)[0]


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[S, 1, N] each, the standard deviation at least 0.01."""
    mean, square = moments
    return mean.float(), (square - mean.square()).clamp_min(1e-4).sqrt().float()


def estimate(values: Tensor, rewards: Tensor, moments: Tensor, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages and normalised returns [R, B, T, n, heads] of rewards of that shape and normalised values, and the new
    `moments` [3, R, 1, heads]: decaying sums of mean, mean square and weight of the returns. An episode's end is one:
    what counts is the sum over it (Eq. 18)."""
    mean, std = (x[:, :, None, None] for x in mean_and_std(moments[:2] / moments[2].clamp_min(1e-8)))
    values = (mean + std * values).flatten(3)
    ends = torch.zeros_like(rewards[:, :, :, 0, 0])
    ends[:, :, -1] = 1
    advantages = gae(rewards.flatten(3), F.pad(values, (0, 0, 0, 1)), ends, args)
    returns = (advantages + values).view_as(rewards)
    newest = torch.cat([mean_and_square(returns.flatten(1, 3)), torch.ones_like(moments[2:])])
    moments = args.value_decay * moments + (1 - args.value_decay) * newest
    mean, std = (x[:, :, None, None] for x in mean_and_std(moments[:2] / moments[2]))
    return advantages.view_as(rewards), (returns - mean) / std, moments


def standardize(advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages [R, M] of mean 0 and standard deviation 1, and what they were divided by [R, 1]."""
    mean, square = mean_and_square(advantages.unsqueeze(2)).squeeze(3)
    std = (square - mean.square()).clamp_min(1e-12).sqrt().to(advantages.dtype)
    return (advantages - mean.to(advantages.dtype)) / std, std


def clipped_loss(logprobs: Tensor, rows: Batch, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: PPO's clipped objective, mean over samples [R, M]: loss [R], metrics [R]."""
    log_ratio = logprobs - rows["logprobs"]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    loss = -torch.minimum(ratio * rows["advantages"], clipped * rows["advantages"]).mean(1)
    with torch.no_grad():
        far = ((ratio - 1).abs() > args.clip_coef).to(ratio.dtype).mean(1)
        return loss, {"policy_loss": loss, "approx_kl": (ratio - 1 - log_ratio).mean(1), "clipfrac": far}


def agents_loss(nets: Nets, rows: Batch, correction: Tensor | float, ent_coef: float, args: Args):
    """PPO's loss of the shared policy and of the values, plus <correction, parameters>: a gradient that is added as it
    is, [R, K]. Returns loss, metrics."""
    logp = masked_logp(nets["agents"], rows["obs"], rows["valid"], args)
    policy, metrics = clipped_loss(logp_of(logp, rows["actions"]), rows, args)
    entropy = entropy_of(logp).mean(1)
    values = (state_values(nets["agents_values"], rows["obs"], args) - rows["returns"]).square().mean((1, 2))
    loss = (policy - ent_coef * entropy + args.vf_coef * values).sum() + (correction * nets["agents"].flat).sum()
    return loss, {name: x.detach() for name, x in (metrics | {"entropy": entropy, "value_loss": values}).items()}


def planner_loss(nets: Nets, rows: Batch, ent_coef: float, args: Args):
    """The same of the planner, whose action are rates of all brackets at once: loss, metrics."""
    logp = rate_logp(nets["planner"], rows["obs"], rows["valid"], args)
    policy, metrics = clipped_loss(logp_of(logp, rows["actions"]).sum(2), rows, args)
    entropy = entropy_of(logp).sum(2).mean(1)
    values = (state_values(nets["planner_values"], rows["obs"], args) - rows["returns"]).square().mean((1, 2))
    loss = (policy - ent_coef * entropy + args.vf_coef * values).sum()
    return loss, {name: x.detach() for name, x in (metrics | {"entropy": entropy, "value_loss": values}).items()}


def descend(loss: Tensor, nets: list[MLP], optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """One optimiser step; the gradient of each network of each seed is clipped on its own."""
    grads = average_ranks(*torch.autograd.grad(loss, [net.flat for net in nets]))
    for net, grad in zip(nets, grads):
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
        net.flat.grad = grad * (max_grad_norm / norm.clamp_min(max_grad_norm))
    optimizer.step()


def improve(
    nets: list[MLP], optimizer, loss_of: Callable, batch: Batch, epochs: int, streams: Generators, args
) -> Batch:
    """Epochs of minibatches of the samples of a batch; mean metrics."""
    R, M = batch["advantages"].shape
    first_row = M * torch.arange(R, device=batch["advantages"].device)[:, None]
    rows_of, sums = {name: value.flatten(0, 1) for name, value in batch.items()}, {}
    for _ in range(epochs):
        order = torch.stack([torch.randperm(M, generator=g, device=g.device) for g in streams])
        minibatches = (order + first_row).chunk(args.num_minibatches, 1)
        for chosen in minibatches:
            rows = {name: v.index_select(0, chosen.flatten()).unflatten(0, chosen.shape) for name, v in rows_of.items()}
            loss, metrics = loss_of(rows)
            descend(loss, nets, optimizer, args.max_grad_norm)
            sums = add(sums, metrics)
    return {name: value / (epochs * len(minibatches)) for name, value in sums.items()}


def add(sums: Batch, values: Batch) -> Batch:
    return {name: sums.get(name, 0.0) + value for name, value in values.items()}


# --------------------------------------------------------------------------------------------------------------------
# ALGO LOGIC: the trust region, ERMAS Eq. (13) and (14); TRPO (Schulman et al. 2015) for P policies at once


def conjugate_gradient(product: Callable, b: Tensor, steps: int) -> Tensor:
    """Solves product(x) = b [P, K], P positive definite systems at once, from x = 0."""
    x, residual, direction, norm = torch.zeros_like(b), b, b, b.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = product(direction)
        size = norm / (direction * image).sum(1, keepdim=True).clamp_min(1e-20)
        x, residual = x + size * direction, residual - size * image
        last, norm = norm, residual.square().sum(1, keepdim=True)
        direction = residual + norm / last.clamp_min(1e-20) * direction
    return x


def mean_kl(visits: Tensor, reference: Tensor, logp: Tensor) -> Tensor:
    """KL(reference || policy), log-probabilities [P, X, A], mean over visits [P, X]: [P]."""
    return (visits * (reference.exp() * (reference - logp)).sum(-1)).sum(-1)


def fisher_product(policy: Callable, flat: Tensor, visits: Tensor, vector: Tensor) -> Tensor:
    """The mean Fisher information matrix of policy(flat) [P, X, A] times vector [P, K]: Hessian of the KL at flat."""
    reference = policy(flat).detach()
    slope = torch.func.grad(lambda f: mean_kl(visits, reference, policy(f)).sum())
    return torch.func.grad(lambda f: (slope(f) * vector).sum())(flat)


@torch.no_grad()
def trust_region_step(policy, flat: Tensor, scores: Tensor, visits: Tensor, anchor: Batch, rho: float, args) -> Tensor:
    """Natural gradient step from flat [P, K] to where the importance-sampled objective, a sum of scores [P, X, A] times
    policy / old policy, is largest while the mean KL(anchor || policy) over the anchor's visits is at most rho. visits
    [P, X]: the old policy's. Where no length of the step gains anything, flat stays."""
    old = policy(flat)

    def gain(logp: Tensor) -> Tensor:
        return (scores * ((logp - old).exp() - 1)).sum((1, 2))

    def fisher(vector: Tensor) -> Tensor:
        return fisher_product(policy, flat, visits, vector) + args.cg_damping * vector

    gradient = torch.func.grad(lambda f: gain(policy(f)).sum())(flat)
    direction = conjugate_gradient(fisher, gradient, args.cg_steps)
    curvature = (direction * fisher(direction)).sum(1, keepdim=True)
    step = direction * (2 * rho / curvature.clamp_min(1e-20)).sqrt()
    best, most = flat, torch.zeros_like(visits[:, 0])
    for halvings in range(-2, 10):  # from four times the length that is right for a quadratic KL
        candidate = flat + 0.5**halvings * step
        logp = policy(candidate)
        value, kl = gain(logp), mean_kl(anchor["visits"], anchor["logp"], logp)
        better = (value > most) & (kl <= rho)
        best, most = torch.where(better[:, None], candidate, best), torch.where(better, value, most)
    return best


# --------------------------------------------------------------------------------------------------------------------
# ALGO LOGIC: Agent-Adv-Search, ERMAS Algorithm 2, and the planner's turn, Algorithm 1


def own_gradient(flat: Tensor, sizes: list[int], batch: Batch, args: Args) -> Tensor:
    """g of Eq. (16) [P, K]: policy gradient of each of P policies from its own samples, [P, M, ...]."""
    with torch.enable_grad():
        flat = flat.detach().requires_grad_()
        logp = masked_logp(MLP(flat, sizes), batch["obs"], batch["valid"], args)
        return torch.autograd.grad((logp_of(logp, batch["actions"]) * batch["advantages"]).mean(1).sum(), flat)[0]


def choose_rows(batch: Batch, count: int, generators: Generators) -> Batch:
    """`count` samples of each of the R * N policies of a batch [R * N, M, ...], the same places for all of a run."""
    R, (P, M) = len(generators), batch["advantages"].shape
    places = torch.stack([torch.randperm(M, generator=g, device=g.device)[:count] for g in generators])
    rows = places.repeat_interleave(P // R, 0) + M * torch.arange(P, device=places.device)[:, None]
    return {k: v.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape) for k, v in batch.items()}


def deviate_in_economy(nets: Nets, first: Batch, play: Callable, moments: Tensor, streams: dict, args: Args):
    """What each agent could gain alone: M trust-region steps of a copy of the policy that only agent i follows. first:
    samples of the joint policy's B_0 for each agent, [R * N, M, ...]; play(deviations) plays B_1 to B_M, in which the
    deviating copies and, by the same random numbers, the joint policy play.

    Returns the estimate of grad J_i(deviation) [R, N, K] (Eq. 15), local regrets [R, N] and the mean KL of the whole
    deviations [R, N] (Eq. 13, 14), and the joint policy's part of B_1 to B_M.
    """
    sizes, R = nets["agents"].sizes, len(streams["games"])
    anchor_flat = nets["agents"].flat.detach().repeat_interleave(len(first["advantages"]) // R, 0)
    flat, batch, joint, gains = anchor_flat, first, [], []
    path = [own_gradient(flat, sizes, batch, args)]
    for _ in range(args.inner_steps):
        rows = choose_rows(batch, args.trust_batch_size, streams["minibatches"])

        def policy(flat: Tensor, rows: Batch = rows) -> Tensor:
            return masked_logp(MLP(flat, sizes), rows["obs"], rows["valid"], args)

        count = rows["advantages"].shape[1]
        scores = F.one_hot(rows["actions"], sizes[-1]) * rows["advantages"].unsqueeze(2) / count
        visits = torch.full_like(rows["advantages"], 1 / count)
        anchor = {"logp": policy(anchor_flat).detach(), "visits": visits}
        flat = trust_region_step(policy, flat, scores, visits, anchor, args.rho, args)
        kl = mean_kl(visits, anchor["logp"], policy(flat).detach()).view(R, -1)
        episodes, lone = play(MLP(flat, sizes))
        joint.append(episodes)
        own = lone["rewards"].mean((1, 2)).view(R, -1)
        gains += average_ranks(own - episodes["rewards"].mean((1, 2)))
        batch = lone_samples(nets, lone, moments, args)
        path.append(own_gradient(flat, sizes, batch, args))
    gradients = path[-1] if args.meta_gradient == "fomaml" else torch.stack(path[:-1]).mean(0)
    regrets = torch.stack(gains).amax(0)
    regrets = regrets.clamp_min(0) if args.clamp_regret else regrets
    return gradients.view(R, -1, gradients.shape[1]), regrets, kl, joint


@torch.no_grad()
def lone_samples(nets: Nets, lone: Batch, moments: Tensor, args: Args) -> Batch:
    """Samples [R * N, M, ...] of deviating agents with advantages of their own rewards."""
    P, B, T, O = lone["obs"].shape
    R = len(nets["agents"].flat)
    values = state_values(nets["agents_values"], lone["obs"].reshape(R, -1, O), args)[..., 0].view(R, -1, T, 1, 1)
    own, _, _ = estimate(values, lone["rewards"].reshape(R, -1, T, 1, 1), moments[..., :1], args)
    return {k: lone[k].flatten(1, 2) for k in ("obs", "valid", "actions")} | {"advantages": own.view(P, B * T)}


@torch.no_grad()
def agents_samples(nets: Nets, episodes: Batch, moments: Tensor, args: Args) -> tuple[Batch, Tensor]:
    """Samples [R, M, ...] of all agents in the joint policy's episodes, with advantages of own and planner's rewards
    [R, M, 2], M running over episodes, steps and agents; and the new moments of returns."""
    R, B, T, N, _ = episodes["obs"].shape
    values = state_values(nets["agents_values"], episodes["obs"].flatten(1, 3), args).view(R, B, T, N, 2)
    welfare = episodes["planner_rewards"].unsqueeze(3).expand(-1, -1, -1, N)
    both, returns, moments = estimate(values, torch.stack((episodes["rewards"], welfare), 4), moments, args)
    batch = {k: episodes[k].flatten(1, 3) for k in ("obs", "valid", "actions", "logprobs")}
    return batch | {"both": both.flatten(1, 3), "returns": returns.flatten(1, 3)}, moments


@torch.no_grad()
def planner_samples(nets: Nets, episodes: Batch, moments: Tensor, env, args: Args) -> tuple[Batch, Tensor]:
    """The planner's decisions [R, M, ...], each rewarded with the change of welfare until the next one."""
    obs = episodes["planner_obs"]  # [R, B, D, G]
    values = state_values(nets["planner_values"], obs.flatten(1, 2), args).view(*obs.shape[:3], 1, 1)
    rewards = F.pad(episodes["planner_rewards"], (0, -env.horizon % env.period)).unflatten(2, (-1, env.period)).sum(3)
    per_period = replace(args, gamma=args.gamma**env.period)
    advantages, returns, moments = estimate(values, rewards[..., None, None], moments, per_period)
    kept = {"obs": "planner_obs", "valid": "planner_valid", "actions": "choices", "logprobs": "choice_logprobs"}
    batch = {name: episodes[source].flatten(1, 2) for name, source in kept.items()}
    batch |= {"advantages": standardize(advantages.flatten(1))[0], "returns": returns.flatten(1, 3)}
    return batch, moments


LOSSES = [
    f"{who}{name}" for who in ("", "planner_") for name in "policy_loss value_loss entropy approx_kl clipfrac".split()
]
METRICS = [f"charts/{name}" for name in "episodic_return welfare equality productivity houses labor tax_rate".split()]
METRICS += [f"losses/{name}" for name in LOSSES]
METRICS += [f"ermas/{name}" for name in "lambda local_regret deviation_kl".split()]  # 0 for what a method lacks


def iterate(env, step, nets: Nets, optimizers, memory: dict, streams: dict, schedule: dict, args: Args) -> Batch:
    """1 + M episodes of every environment, an update of the agents, one iteration of Algorithm 2 if they are
    adversarial, and the planner's turn, Algorithm 1. Agent i ascends on -J_r + lambda_i (g_1 - beta grad
    J_i(deviation)), Eq. (11) with (15), else on its own reward. `memory` (last state, moments, lambdas) is brought up
    to date. schedule: "adversarial", "deviating", "plans", "ent_coef", "planner_ent_coef". Returns metrics [R]."""

    def play(deviations: MLP | None = None) -> tuple[Batch, Batch]:
        games = play_economy(env, step, nets, memory["state"], streams["games"], args, deviations)
        memory["state"] = games[2]
        return games[:2]

    batches, lambdas, correction = [play()[0]], memory["lambdas"], 0.0
    regrets = excess = kl = torch.zeros_like(lambdas)
    if schedule["deviating"]:
        own = {k: batches[0][k].movedim(3, 1).flatten(0, 1) for k in ("obs", "valid", "actions", "rewards")}
        moments = memory["agents_moments"]
        first = lone_samples(nets, own, moments, args)
        gradients, regrets, kl, more = deviate_in_economy(nets, first, play, moments, streams, args)
        excess, batches = regrets - args.epsilon, batches + more
    else:
        batches += [play()[0] for _ in range(args.inner_steps)]
    episodes = {name: torch.cat([batch[name] for batch in batches], 1) for name in batches[0]}
    batch, memory["agents_moments"] = agents_samples(nets, episodes, memory["agents_moments"], args)
    weight = (lambdas + args.lambda_damping * excess).clamp(0, args.lambda_max)  # [R, N]
    own, welfare = batch.pop("both").unflatten(1, (-1, env.num_agents)).unbind(3)  # [R, B * T, N]
    advantages = weight[:, None] * own - welfare if schedule["adversarial"] else own
    batch["advantages"], scale = standardize(advantages.flatten(1))
    if schedule["deviating"]:
        correction = args.beta * (weight[..., None] * gradients).mean(1) / scale
    loss_of = partial(agents_loss, nets, correction=correction, ent_coef=schedule["ent_coef"], args=args)
    pair = [nets["agents"], nets["agents_values"]]
    found = improve(pair, optimizers["agents"], loss_of, batch, args.update_epochs, streams["minibatches"], args)
    metrics = {f"losses/{name}": value for name, value in found.items()}
    if schedule["plans"]:
        batch, memory["planner_moments"] = planner_samples(nets, episodes, memory["planner_moments"], env, args)
        loss_of = partial(planner_loss, nets, ent_coef=schedule["planner_ent_coef"], args=args)
        pair = [nets["planner"], nets["planner_values"]]
        found = improve(pair, optimizers["planner"], loss_of, batch, args.planner_epochs, streams["minibatches"], args)
        metrics |= {f"losses/planner_{name}": value for name, value in found.items()}
    metrics["charts/episodic_return"] = episodes["rewards"].sum(2).mean((1, 2))
    metrics |= {f"charts/{name}": value for name, value in describe(facts_of(episodes)).items()}
    metrics |= {
        "ermas/lambda": lambdas.mean(1),
        "ermas/local_regret": regrets.mean(1),
        "ermas/deviation_kl": kl.amax(1),
    }
    memory["lambdas"] = (lambdas + args.lambda_lr * excess).clamp(0, args.lambda_max)  # ALGO LOGIC: Eq. (12)
    return {name: metrics.get(name, torch.zeros_like(lambdas[:, 0])) for name in METRICS}


def describe(facts: Batch) -> Batch:
    """Means over episodes [R]: welfare is equality times productivity, the sum of all coin (Eq. 19 to 21)."""
    coin = facts["coin"]  # [R, E, N]
    equality, productivity = economy.equality_of(coin.flatten(0, 1).T).view(coin.shape[:2]), coin.sum(2)
    metrics = {"welfare": (equality * productivity).mean(1), "equality": equality.mean(1)}
    metrics |= {"productivity": productivity.mean(1), "houses": facts["houses"].sum(2).to(coin.dtype).mean(1)}
    return metrics | {"labor": facts["labor"].sum(2).mean(1), "tax_rate": facts["rates"].mean((1, 2, 3))}


# --------------------------------------------------------------------------------------------------------------------
# Phases


def build_economy(args: Args, num_runs: int, num_envs: int, phase: str, device: torch.device, eta=None):
    """The economy of a phase: "one", without taxes while labor becomes costly, or "two"; eta [num_runs] or that of
    training. Annealing follows the number of episodes that the phase has."""
    fields = {"eta": args.eta_train if eta is None else eta.repeat_interleave(num_envs), "rate_step": args.rate_step}
    fields |= {"tax": "free", "labor_constant": args.labor_constant} if phase == "one" else {"tax": TAXES[args.method]}
    env = envs.make(args.env_id, num_runs * num_envs, device, **fields)
    episodes = args.tax_annealing * args.phase_two_timesteps / (num_envs * env.horizon)
    if phase == "one" or episodes == 0 or eta is not None:  # the test's agents live with the taxes as they are
        return env
    return replace(env, tax_warmup=-episodes / 9, tax_slope=0.9 / episodes)


def step_of(env, args: Args) -> Callable:
    """env.step, compiled if asked for. Torch refuses a ninth version of a function: those of earlier phases go."""
    if not args.compile:
        return env.step
    torch.compiler.reset()
    return torch.compile(env.step, fullgraph=True, dynamic=False, options={"comprehensive_padding": False})


def start_memory(env, num_runs: int, args: Args) -> dict:
    """What iterations leave to the next one beside networks: the economy's last state, moments of returns, lambdas."""
    moments = {
        name: torch.zeros(3, num_runs, 1, heads, dtype=torch.float64) for name, heads in (("agents", 2), ("planner", 1))
    }
    memory = {f"{name}_moments": x.to(env.device) for name, x in moments.items()}
    lambdas = torch.full((num_runs, env.num_agents), args.lambda_init, dtype=env.dtype, device=env.device)
    return memory | {"state": None, "lambdas": lambdas}


def saved_state(checkpoint: dict, device: torch.device) -> economy.State:
    """The economy's last state."""
    return economy.State(**{name: value.to(device) for name, value in checkpoint["memory"]["state"].items()})


def schedule_of(phase: str, progress: float, optimizers, args: Args) -> dict:
    """What changes in the course of a phase; in phase two step sizes and the planner's entropy bonus fall."""
    two, start, end = phase == "two", args.planner_ent_coef, args.planner_ent_coef_end
    for who, rate in (("agents", args.learning_rate), ("planner", args.planner_learning_rate)):
        optimizers[who].param_groups[0]["lr"] = rate * (1 - progress) if two else rate
    adversarial, warm = two and args.method == "ermas", progress < args.warmup
    schedule = {"adversarial": adversarial, "deviating": adversarial and not warm}
    schedule["plans"] = two and args.learns_taxes and not warm
    return schedule | {"ent_coef": args.ent_coef, "planner_ent_coef": start + progress * (end - start)}


def timesteps_of(phase: str, args: Args) -> int:
    return args.phase_one_timesteps if phase == "one" else args.phase_two_timesteps


def load_agents(path: str, flag: str, key: dict) -> dict:
    """The "nets" and "agents_moments" that `save_agents` wrote for the same `key`; if not, one line and exit code 2."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["script"] != Path(__file__).stem:
            fail(f"{path} was written by {saved['script']}.py")
        differing = [name for name, value in key.items() if saved["key"].get(name) != value]
    except FileNotFoundError:
        fail(f"{flag}: no file {path}")
    except Exception as error:
        fail(f"{flag}: {path} is no readable file of agents ({type(error).__name__})")
    for name in differing:
        fail(f"{flag}: {path} has {name} {saved['key'].get(name)}, this run {key[name]}")
    return saved


def save_agents(path: Path, nets: Nets, memory: dict, key: dict) -> None:
    data = {"script": Path(__file__).stem, "key": key, "agents_moments": memory["agents_moments"]}
    save_checkpoint(path, data | {"nets": {name: nets[name].flat.detach() for name in ("agents", "agents_values")}})


def agents_key(args: Args, **more) -> dict:
    """What agents must have in common with a run that takes them over."""
    names = ("env_id", "seed", "num_seeds", "hidden_size", "activation")
    return {name: getattr(args, name) for name in names} | more


def take_over(nets: Nets, memory: dict, saved: dict) -> None:
    for name, flat in saved["nets"].items():
        nets[name].flat.detach().copy_(flat)
    memory["agents_moments"] = saved["agents_moments"].to(memory["agents_moments"].device)


# --------------------------------------------------------------------------------------------------------------------
# Evaluation: new agents of other risk aversion under the frozen planner


def test_key(args: Args) -> dict:
    return agents_key(args, eval_eta=list(args.eval_eta), timesteps=args.phase_one_timesteps)


def run_tests(planner: MLP, tested: dict | None, args: Args, device: torch.device, run_dir: Path) -> Batch:
    """New agents learn from scratch for each eta of args.eval_eta, phase one (or `tested`, who have done so), and then
    under each run's frozen planner or the method's taxes. Facts by eta and seed, [Q, S, E, ...]."""
    Q, S = len(args.eval_eta), args.num_seeds
    R, eta = Q * S, torch.tensor(args.eval_eta, device=device).repeat_interleave(S)  # runs are [Q, S]
    purposes = {name: f"test {name}" for name in ("games", "minibatches", "init")}
    streams = {n: [g for _ in range(Q) for g in make_generators(args.seed, S, p, device)] for n, p in purposes.items()}
    env = build_economy(args, R, args.num_envs, "one", device, eta)
    nets = make_economists(env, streams["init"], args)
    nets["planner"] = MLP(planner.flat.detach().repeat(Q, 1), planner.sizes)
    memory = start_memory(env, R, args)
    if tested is not None:
        take_over(nets, memory, tested)
    else:
        learn_alone("one", env, nets, memory, streams, args.phase_one_timesteps, args)
        save_agents(run_dir / "test_agents.pt", nets, memory, test_key(args))
    env = build_economy(args, R, args.num_envs, "two", device, eta)
    memory = start_memory(env, R, args) | {"agents_moments": memory["agents_moments"]}
    learn_alone("two", env, nets, memory, streams, args.eval_timesteps, args)
    found, last = [], memory["state"]
    for _ in range(math.ceil(args.eval_episodes / args.num_envs)):
        episodes, _, last = play_economy(env, env.step, nets, last, streams["games"], args)
        found.append(facts_of(episodes))
    facts = {k: torch.cat([f[k] for f in found], 1)[:, : args.eval_episodes] for k in found[0]}
    return {k: v.unflatten(0, (Q, S)) for k, v in facts.items()}


def learn_alone(phase: str, env, nets, memory, streams, timesteps: int, args: Args) -> None:
    """Agents learn, each for itself; a planner keeps its policy."""
    optimizers, step, done = make_optimizers(nets, args), step_of(env, args), 0
    per_iteration = (1 + args.inner_steps) * env.num_envs // len(streams["games"]) * env.horizon
    bar = tqdm(total=timesteps, desc=f"test, phase {phase}", unit="step", disable=None, leave=False)
    while done < timesteps:
        schedule = schedule_of(phase, done / timesteps, optimizers, args) | {"adversarial": False, "deviating": False}
        iterate(env, step, nets, optimizers, memory, streams, schedule | {"plans": False}, args)
        done += per_iteration
        bar.update(per_iteration)
    bar.close()


def welfare_report(
    nets: Nets, facts: Batch, tested: dict | None, args: Args, device, run_dir: Path, wandb_runs: list
) -> None:
    """What the run has found: a table on the terminal, welfare.csv, report.png."""
    tests = run_tests(nets["planner"], tested, args, device, run_dir)
    found = [describe({k: v[q] for k, v in tests.items()}) for q in range(len(args.eval_eta))]
    measures = {k: np.array([values[k].double().cpu().numpy() for values in found]) for k in found[0]}  # [Q, S] each
    columns, rows = ["env_id", "method", "epsilon", "seed", "eta", *measures], []
    for k in range(args.num_seeds):
        for q, eta in enumerate(args.eval_eta):
            found = [values[q, k] for values in measures.values()]
            rows.append([args.env_id, args.method, args.epsilon, args.seed + k, eta, *found])
    with open(run_dir / "welfare.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    many = args.num_seeds > 1
    over = f"mean and 95% interval over {args.num_seeds} seeds" if many else "one seed"
    print(f"\n{args.env_id}, {args.method}: new agents, {over}")
    print(f"{'eta':>6s}" + "".join(f"{name:>18s}" for name in measures))
    for q, eta in enumerate(args.eval_eta):
        halves = (f" ± {interval(values[q][:, None])[0]:.2g}" * many for values in measures.values())
        cells = (f"{values[q].mean():.3g}{half}" for values, half in zip(measures.values(), halves))
        print(f"{eta:6g}" + "".join(f"{cell:>18s}" for cell in cells))
    plot_welfare(measures, facts, tests, args, run_dir)
    with wandb_may_fail(wandb_runs):
        for k, run in enumerate(wandb_runs):
            import wandb

            data = [row for row in rows if row[3] == args.seed + k]
            image = wandb.Image(str(run_dir / "report.png"))
            run.log({"welfare": wandb.Table(columns=columns, data=data), "report": image})
            run.finish()


def by_skill(facts: Batch) -> dict[str, np.ndarray]:
    """Means over the episodes of all runs of what the worst builder to the best one (by coin per house) earn by
    building, by trade (net) and by the redistribution of taxes (net), [N] each, and their labor."""
    facts = {k: v.flatten(0, -2).double().cpu() for k, v in facts.items() if k != "rates"}
    order = facts["payment"].argsort(1)
    built = facts["houses"] * facts["payment"]
    kinds = {"building": built, "trade": facts["income"] - built, "taxes": facts["coin"] - facts["income"]}
    kinds |= {name: facts[name] for name in ("labor", "houses")}
    return {name: value.gather(1, order).mean(0).numpy() for name, value in kinds.items()}


def plot_welfare(measures: dict, facts: Batch, tests: Batch, args: Args, run_dir: Path) -> None:
    """Welfare against eta (Figure 6), equality and productivity, the tax schedule, and income by skill."""
    figure = Figure(figsize=(17, 3.8), layout="constrained")
    welfare, parts, rates, income = figure.subplots(1, 4)
    half = [interval(values[:, None])[0] for values in measures["welfare"]]
    welfare.errorbar(args.eval_eta, measures["welfare"].mean(1), np.nan_to_num(half), marker="o", capsize=3)
    welfare.axvline(args.eta_train, color="gray", ls="--", lw=1)
    welfare.set(xlabel="eta of the test's agents", title="equality x productivity")
    parts.plot(args.eval_eta, measures["productivity"].mean(1), marker="o", label="productivity (coin)")
    other = parts.twinx()
    other.plot(args.eval_eta, measures["equality"].mean(1), marker="s", color="C1", label="equality")
    other.set_ylim(0, 1)
    parts.set(xlabel="eta of the test's agents", title="productivity (dots), equality (squares, right)")
    env = build_economy(args, 1, 1, "two", torch.device("cpu"))
    cutoffs = np.array([*env.cutoffs, 1.25 * env.cutoffs[-1]])
    for name, found in (
        ("training", facts),
        *((f"eta {eta:g}", {"rates": tests["rates"][q]}) for q, eta in enumerate(args.eval_eta)),
    ):
        mean = found["rates"].flatten(0, -2).mean(0).cpu().numpy()
        rates.stairs(mean, cutoffs, label=name)
    rates.set(xlabel="income in a tax period (coin)", ylim=(-0.02, 1.02), title="mean marginal tax rate")
    rates.legend(fontsize=7)
    skill, low, high = by_skill(facts), 0.0, 0.0
    for name in ("building", "trade", "taxes"):
        base = np.where(skill[name] >= 0, high, low)
        income.bar(range(len(base)), skill[name], bottom=base, label=name)
        low, high = low + np.minimum(skill[name], 0), high + np.maximum(skill[name], 0)
    income.set(xlabel="agents, the worst builder first", title="coin in an episode of training, by source")
    income.set_xticks(range(len(low)))
    income.axhline(0, color="black", lw=0.8)
    income.legend(fontsize=8)
    figure.suptitle(f"{args.env_id}, {args.method}, {args.num_seeds} seed{'s' * (args.num_seeds > 1)}")
    figure.savefig(run_dir / "report.png", dpi=100)


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


def train(nets: Nets, args: Args, device, run_dir: Path, wandb_runs: list, warm: dict | None, state: dict | None):
    """Both phases, from the start, from agents `warm` after phase one, or from `state`, a checkpoint. Returns the
    economy's last state, or None if Ctrl-C or SIGTERM ended it, after a checkpoint."""
    S, labels, log_path = args.num_seeds, run_labels(args), run_dir / "metrics.csv"
    streams = {n: make_generators(args.seed, S, n, device, RANK) for n in ("games", "minibatches")}
    phase, step, before, sums, count = "one", 0, 0, {}, 0  # `before`: steps of phase one
    if warm is not None:
        phase = "two"
    if state is not None:
        for name, generators in streams.items():
            for generator, saved in zip(generators, state["streams"][name]):
                generator.set_state(saved)
        phase, step, before, count = (state[name] for name in ("phase", "step", "before", "count"))
        sums = {k: v.to(device) for k, v in state["sums"].items()}
        if RANK == 0 and log_path.exists():  # drop rows that will be written again, and one cut off by a kill
            os.truncate(log_path, state["log_size"])
    stops, is_over = [], False
    handlers = {s: signal.signal(s, lambda *caught: stops.append(caught)) for s in (signal.SIGINT, signal.SIGTERM)}
    optimizers, memory = make_optimizers(nets, args, state), None
    while not is_over:
        env = build_economy(args, S, args.num_envs, phase, device)
        step_env, fresh = step_of(env, args), start_memory(env, S, args)
        memory = fresh | ({} if memory is None else {"agents_moments": memory["agents_moments"]})
        if state is not None:
            memory = {name: value if name == "state" else value.to(device) for name, value in state["memory"].items()}
            memory["state"] = saved_state(state, device)
        elif warm is not None:
            take_over(nets, memory, warm)
        warm, state, total, started = None, None, timesteps_of(phase, args), time.perf_counter()
        per_iteration = (1 + args.inner_steps) * args.num_envs * env.horizon
        bar = tqdm(total=total, initial=step, desc=f"phase {phase}", unit="step", disable=True if RANK else None)
        while not is_over and step < total:
            schedule = schedule_of(phase, step / total, optimizers, args)
            metrics = iterate(env, step_env, nets, optimizers, memory, streams, schedule, args)
            sums, count = add(sums, metrics), count + 1
            last_step, step = step, step + per_iteration
            bar.update(per_iteration)
            is_done, is_over = step >= total, bool(stops)
            if dist.is_initialized():  # all ranks stop together
                over = torch.tensor(float(is_over), device=device)
                dist.all_reduce(over)
                is_over = bool(over)
            log = is_done or step // args.log_interval > last_step // args.log_interval
            save = is_done or is_over or step // args.checkpoint_interval > last_step // args.checkpoint_interval
            for name, value in sums.items() if log or save else ():
                if not value.isfinite().all():
                    good = run_dir / CHECKPOINT if (run_dir / CHECKPOINT).exists() else "none yet"
                    fail(f"{name} is not finite at step {before + step}; last good checkpoint: {good}")
            if log:
                row = {name: value / count for name, value in sums.items()}
                speed = S * per_iteration * count / (time.perf_counter() - started)
                row |= {
                    "charts/phase": torch.full((S,), 1 + (phase == "two")),
                    "charts/SPS": torch.full((S,), round(speed)),
                }
                if RANK == 0:
                    log_metrics(log_path, wandb_runs, labels, before + step, row)
                bar.set_postfix(welfare=f"{row['charts/welfare'].mean():.1f}", refresh=False)
                sums, count, started = {}, 0, time.perf_counter()
            if is_done and phase == "one" and RANK == 0:
                save_agents(run_dir / "warm_agents.pt", nets, memory, agents_key(args, eta_train=args.eta_train))
            if save:
                data = {"script": Path(__file__).stem, "args": asdict(args), "phase": phase, "step": step}
                data |= {"before": before, "count": count, "sums": sums}
                data |= {"log_size": log_path.stat().st_size if log_path.exists() else 0}
                data |= {"nets": {name: net.flat.detach() for name, net in nets.items()}}
                data |= {"optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}}
                data |= {"streams": {p: [g.get_state() for g in generators] for p, generators in streams.items()}}
                data |= {"memory": memory | {"state": vars(memory["state"])}}
                save_checkpoint(run_dir / CHECKPOINT, data)
        bar.close()
        if is_over or phase == "two":
            break
        phase, before, step, optimizers = "two", step, 0, make_optimizers(nets, args)
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return memory["state"] if phase == "two" and step >= timesteps_of("two", args) else None


def main() -> None:
    args = parse_args()
    if args.preset == "paper" and not args.resume and not args.evaluate:
        args = parse_args(Args(**PAPER))
    args, state, run_dir = load_run(args) if args.resume or args.evaluate else (args, None, None)
    device = setup(args)
    env = build_economy(args, args.num_seeds, args.num_envs, "two", device)
    nets = make_economists(env, make_generators(args.seed, args.num_seeds, "init", device), args)
    for name, net in nets.items() if state is not None else ():
        net.flat.detach().copy_(state["nets"][name])
    warm = None
    if args.warm_start and state is None:
        key = agents_key(args, eta_train=args.eta_train)
        warm = load_agents(str(Path(args.warm_start) / "warm_agents.pt"), "--warm-start", key)
    tested = load_agents(args.eval_agents, "--eval-agents", test_key(args)) if args.eval_agents else None
    run_dir = run_dir or make_run_dir(args)
    wandb_runs = [] if args.evaluate else start_wandb(args, run_dir, run_labels(args))
    if args.evaluate:
        if state["phase"] == "one":
            fail(f"{run_dir} has no taxes yet; go on with --resume")
        last = saved_state(state, device)
    else:
        last = train(nets, args, device, run_dir, wandb_runs, warm, state)
    if last is None:
        print(f"stopped; go on with: python {Path(__file__).name} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(130)
    if dist.is_initialized():
        dist.destroy_process_group()  # the test is run by one process
    if RANK == 0:
        facts = play_last(env, nets, last, args, run_dir)
        welfare_report(nets, facts, tested, args, device, run_dir, wandb_runs)
        print(f"results: {run_dir}")


def play_last(env, nets: Nets, after, args: Args, run_dir: Path) -> Batch:
    """Facts of an episode of every environment with the trained policies and, of the first one, a GIF."""
    env = replace(env, tax_warmup=None)
    streams, frames = make_generators(args.seed, args.num_seeds, "video", env.device), []

    def step(state, *rest):
        frames.append(Image.fromarray(env.render(state)))
        return env.step(state, *rest)

    episodes, _, _ = play_economy(env, step if args.capture_video else env.step, nets, after, streams, args)
    if frames:
        (run_dir / "videos").mkdir(exist_ok=True)
        path = run_dir / "videos" / "episode.gif"
        every = max(1, env.horizon // 125)
        frames[0].save(path, save_all=True, append_images=frames[every::every], duration=100, loop=0)
    return facts_of(episodes)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # training ends itself, with a checkpoint
        print("stopped during the report; repeat it with --evaluate RUN_DIR", file=sys.stderr)
        sys.exit(130)
