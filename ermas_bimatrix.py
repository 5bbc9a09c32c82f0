"""ERMAS in repeated bimatrix games: a planner that is robust to what the other agents want.

ERMAS (Zhao et al. 2021, arXiv 2106.05492) trains a robust actor, here the planner, against agents that hurt it as much
as they can while none could gain more than epsilon by changing its policy alone (Eq. 7). Agent i ascends on -J_r plus
lambda_i times its own reward, corrected by a first-order meta-gradient (Eq. 11, 15, 16); lambda_i rises while the
regret that TRPO finds in a KL ball (Eq. 13, 14) exceeds epsilon (Eq. 12). The planner ascends on J_r (Algorithm 1).

    python ermas_bimatrix.py --epsilon 0.1                   # ERMAS, five seeds: two minutes on two CPU cores
    python ermas_bimatrix.py --method marl --q-train 0.5     # a baseline; also domain-randomization and risk
    python ermas_bimatrix.py --figure 3                      # the paper's Figure 3, 4 or 5, all its runs side by side

Differences to the paper, by their number in the README: 2 factor 2, 4 sign of Eq. 9, 6 own regret only, 7 sign of
Eq. 12, 8 bounds and damping of lambda, 9 regret per step, 10 common random numbers, 13 KL to the anchor, 14 Eq. 15 is
the bracket of Eq. 11, 17 and 18 gradients, not parameters, 20 planner's turn, 21 warm-up, 23 payoffs, 24 moves,
25 incentives, 26 noise per transition, 27 shifted logarithm.

Axes: S runs (all seeds of all settings), n agents (0 row, 1 column), B games, T steps, X states, A moves or incentives,
F features, K parameters, M inner steps. The game is finite: a policy is evaluated once in each of the X states, games
are played by table lookup, and what a batch says about a policy is a score for each state and action.
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
from dataclasses import asdict, dataclass
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
from envs import bimatrix

Generators = list[torch.Generator]  # one per seed
Batch = dict[str, Tensor]  # what is known of a batch of games, its random numbers, or metrics [S]
RANK = int(os.environ.get("RANK", "0"))  # of this process under torchrun
CHECKPOINT = "checkpoint.pt" if RANK == 0 else f"checkpoint_rank{RANK}.pt"


@dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of this experiment"""
    seed: int = 1
    """seed of the first run; run k of each setting uses seed + k"""
    num_seeds: int = 5
    """independent runs of each setting, trained side by side (paper: 5 to 10)"""
    torch_deterministic: bool = True
    """deterministic algorithms only: same seed, same machine, same numbers"""
    cuda: bool = True
    """use the GPU if there is one"""
    num_threads: int = 1
    """CPU threads; with more than one set OMP_WAIT_POLICY=PASSIVE, or one busy core stalls all of them"""
    compile: bool = False
    """compile the playing of games (torch.compile)"""
    runs_dir: str = "runs"
    """folder that receives a folder per run"""
    resume: str | None = None
    """run folder or checkpoint file to continue; all other flags are read from it"""
    evaluate: str | None = None
    """run folder or checkpoint file whose planners are evaluated again, without training"""
    capture_video: bool = False
    """write a GIF of a game of the trained policies"""
    track: bool = True
    """log to Weights & Biases, one run per seed and setting"""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no account; `wandb sync` uploads later"""
    wandb_project_name: str = "robust-marl"
    """Weights & Biases project"""
    wandb_entity: str | None = None
    """Weights & Biases team"""
    figure: Literal["3", "4", "5"] | None = None
    """the settings of this figure of the paper in place of the flags', and its picture"""

    env_id: Literal["auto", "augmented_bimatrix_v0", "repeated_bimatrix_v0"] = "auto"
    """augmented: the planner chooses incentives; repeated: it is passive; auto: repeated for Figures 3 and 4 only"""
    payoffs: str | None = None
    """JSON file with the three R x C payoff matrices of row, column and planner; default: a 4 x 4 social dilemma"""
    horizon: int = 16
    """T, steps of a game"""
    num_moves: Literal[3, 2] = 3
    """down, stay, up; or down, up"""
    max_incentive: int = 3
    """largest incentive of the augmented game"""
    payoff_scale: float = 4.0
    """the planner's reward is incentive * scale * payoff - incentive^2; at payoff 1 half of it is the best incentive"""
    planner_observes: bool = False
    """the planner sees the position; without, it commits to incentives not knowing where the agents will be"""

    method: tuple[Literal["ermas", "marl", "domain-randomization", "risk"], ...] = ("ermas", "marl")
    """ermas; everybody for itself; the same with noise on the agents' rewards; the same with log planner reward"""
    epsilon: tuple[float, ...] = (0.2,)
    """slack on an agent's regret, per step; several values train side by side, as do methods and the next flags"""
    beta: tuple[float, ...] = (0.4,)
    """weight of the meta-gradient (Eq. 15)"""
    lambda_init: tuple[float, ...] = (1.0,)
    """lambda_0, first weight of an agent's own reward, and the weight during the warm-up"""
    q_train: tuple[float, ...] = (0.0,)
    """Q in training: the agents' rewards are r_i - Q * (planner's reward)"""
    fixed_lambda: bool = False
    """keep lambda at lambda_0 (the ablation of Figure 4)"""
    lambda_lr: float = 0.3
    """alpha_lambda, step size of lambda"""
    lambda_damping: float = 10.0
    """kappa: an agent's own reward counts lambda + kappa * (regret - epsilon), so that lambda settles; 0: as printed"""
    clamp_regret: bool = True
    """an estimated regret below 0 counts as 0; without, lambda also falls where a deviation failed"""
    lambda_max: float = 20.0
    """upper bound of lambda"""
    cross_terms: bool = False
    """agents share rewards, -r_r + sum_j lambda_j r_j (Algorithm 2), not each its own (Eq. 11): holds no regret here"""
    inner_steps: int = 3
    """M = n_inner, trust-region steps of a deviation"""
    rho: float = 8.0
    """radius of the trust region, mean KL(policy || deviation) in nats; a small one hides gains that are far away"""
    trust_region: Literal["anchor", "literal"] = "anchor"
    """the whole deviation stays within rho of the policy, or each of its steps within rho / M of the last (printed)"""
    meta_gradient: Literal["reptile", "fomaml"] = "reptile"
    """estimate of grad J_i(deviation): mean of the gradients along it (Eq. 15), or the last one"""
    meta_rescale: bool = False
    """scale g_1 minus that estimate to the size of the exact meta-gradient: 4M/(M-1) for reptile, 2 for fomaml"""
    correction: Literal["gradients", "displacement"] = "gradients"
    """the path's gradients, or the deviation's displacement of parameters, scaled to their length (Algorithm 2)"""
    cg_steps: int = 10
    """conjugate gradient steps of the natural gradient"""
    cg_damping: float = 1e-4
    """damping of the Fisher matrix"""

    num_iterations: int = 800
    """iterations of the training loop: n_train updates of the agents, one of the planner"""
    warmup_steps: int = 50
    """k, first iterations, with lambda_0, without deviations and with the planner at rest"""
    search_steps: int = 1
    """n_train, updates of the agents per update of the planner"""
    num_envs: int = 64
    """B, games of a batch of one run"""
    learning_rate: float = 0.03
    """Adam step size of the agents, linear to 0"""
    planner_learning_rate: float = 0.03
    """Adam step size of the planner, linear to 0"""
    ent_coef: float = 0.1
    """weight of the policies' mean entropy in nats, linear to 0; what is never tried has no estimated regret"""
    hidden_size: int = 0
    """width of two hidden layers; 0: a table, one row of logits for each observation"""
    activation: Literal["relu", "silu", "tanh"] = "tanh"
    """hidden activation"""
    value_rate: float = 0.1
    """rate at which the baseline V(t, x) follows the batches"""
    randomize_interval: int = 10
    """domain randomization: updates between two draws of the noise on the agents' rewards, U[-1, 1]"""

    log_interval: int = 10
    """iterations between two rows of metrics.csv"""
    checkpoint_interval: int = 100
    """iterations between two checkpoints"""
    eval_q: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Q of the test games, in which new agents learn against the frozen planner"""
    eval_iterations: int = 400
    """updates of the new agents"""

    def __post_init__(self):
        def refuse(name: str, rule: str, got):
            raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {got!r}")

        lists = ("method", "epsilon", "beta", "lambda_init", "q_train", "eval_q")
        fixed = ["method", "q_train", "lambda_init", "fixed_lambda", "cross_terms"]
        fixed += ["epsilon"] * (self.figure in ("3", "4"))
        plain = self.meta_gradient == "reptile" and not self.meta_rescale
        single = len(self.beta) == 1 or not self.figure
        values = {name: value if name in lists else (value,) for name, value in asdict(self).items()}
        floats = " ".join(name for name, value in values.items() if value and isinstance(value[0], float))
        counts = "num_seeds num_threads horizon inner_steps cg_steps num_iterations search_steps num_envs"
        for names, holds, rule in (
            (floats, math.isfinite, "a finite number"),
            (counts, lambda v: v >= 1, "at least 1"),
            ("randomize_interval log_interval checkpoint_interval eval_iterations", lambda v: v >= 1, "at least 1"),
            ("learning_rate planner_learning_rate rho lambda_max", lambda v: v > 0, "above 0"),
            ("seed max_incentive warmup_steps hidden_size epsilon beta", lambda v: v >= 0, "0 or more"),
            ("lambda_lr lambda_damping cg_damping ent_coef", lambda v: v >= 0, "0 or more"),
            ("lambda_init", lambda v: 0 <= v <= self.lambda_max, "between 0 and --lambda-max"),
            ("value_rate", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("meta_rescale", lambda v: not v or self.inner_steps > 1, "off where --inner-steps is 1: no curvature"),
            (
                "correction",
                lambda v: v == "gradients" or plain,
                "gradients unless --meta-gradient is reptile, not rescaled",
            ),
            ("beta", lambda v: single, "one value with --figure"),
            (
                "env_id",
                lambda v: self.figure != "5" or v != "repeated_bimatrix_v0",
                "augmented_bimatrix_v0 in Figure 5",
            ),
            ("resume", lambda v: v is None or not self.evaluate, "left out with --evaluate"),
        ):
            for name in names.split():
                for value in values[name]:
                    if not holds(value):
                        refuse(name, rule, value)
        for name in lists:
            if len(set(values[name])) != max(1, len(values[name])):
                refuse(name, "one value or more, all different", values[name])
        for name in fixed if self.figure else ():
            if getattr(self, name) != getattr(Args, name):
                refuse(name, "left out with --figure", getattr(self, name))
        if self.env_id == "auto":
            self.env_id = "repeated_bimatrix_v0" if self.figure in ("3", "4") else "augmented_bimatrix_v0"


# --------------------------------------------------------------------------------------------------------------------
# Settings: what the S runs differ in

EPSILONS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # of Figures 3 and 4
FIXED_LAMBDAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)  # Figure 4, left
CURVES = {"epsilon": 0.2, "beta": (0.0, 0.2, 0.6, 0.9, 1.5)}  # Figure 4, right, beside the beta of the flags


def run_labels(args: Args) -> list[dict]:
    """What tells the S runs apart, the seeds of a setting together."""
    names = ("epsilon", "beta", "lambda_init", "q_train")
    common = {"method": "ermas", "fixed_lambda": args.fixed_lambda, "cross_terms": args.cross_terms}
    common |= {name: getattr(args, name)[0] for name in names}
    settings = []
    for method in args.method:
        choices = {"method": [method], "q_train": args.q_train}  # to the baselines nothing else matters
        if method == "ermas":
            choices |= {name: getattr(args, name) for name in names}
            choices["epsilon"] = args.epsilon[:1] if args.fixed_lambda else args.epsilon  # it bounds nothing then
        settings += [dict(zip(choices, values)) for values in itertools.product(*choices.values())]
    if args.figure in ("3", "4"):
        settings = [{"method": "marl"}] + [{"epsilon": epsilon} for epsilon in EPSILONS]
    if args.figure == "4":
        fixed = itertools.product((False, True), FIXED_LAMBDAS)
        settings += [{"lambda_init": value, "fixed_lambda": True, "cross_terms": cross} for cross, value in fixed]
        settings += [{"epsilon": CURVES["epsilon"], "beta": b} for b in CURVES["beta"] if b != args.beta[0]]
    if args.figure == "5":
        settings = [{"epsilon": epsilon} for epsilon in args.epsilon] + [{"method": "marl"}]
        settings += [{"method": "marl", "q_train": 0.5}, {"method": "domain-randomization"}, {"method": "risk"}]
    return [common | setting | {"seed": args.seed + k} for setting in settings for k in range(args.num_seeds)]


def setting_name(label: dict, args: Args) -> str:
    """What distinguishes the setting of a run among those of `args`."""
    if label["method"] != "ermas":
        return f"{label['method']}, Q = {label['q_train']:g}"
    weight = f"fixed lambda {label['lambda_init']:g}" if label["fixed_lambda"] else f"epsilon {label['epsilon']:g}"
    keys = ("beta", "q_train") if label["fixed_lambda"] else ("beta", "lambda_init", "q_train")
    more = [f"{key} {label[key]:g}" for key in keys if label[key] != getattr(args, key)[0]]
    return ", ".join(("ermas", weight, *more, *["shared"] * label["cross_terms"]))


# --------------------------------------------------------------------------------------------------------------------
# Policies: softmax over a table or a small network; those of all agents and runs are one batched MLP

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


Nets = dict[str, MLP]  # agents, planner
PLAYERS = {"agents": [0, 1], "planner": [2]}


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


def features(env, players: list[int], args: Args) -> Tensor:
    """[n, X, F] what the policies of `players` see of each state: observations, or which of the distinct ones it is."""
    seen = env.observations[:, players].transpose(0, 1)  # [n, X, O]
    if args.hidden_size > 0:
        return seen
    rows = [torch.unique(x, dim=0, return_inverse=True)[1] for x in seen]
    return F.one_hot(torch.stack(rows)).to(env.dtype)


def log_policy(net: MLP, seen: Tensor, args: Args) -> Tensor:
    """[S, n, X, A] log-probabilities: network (s, n) in each of its states; seen [n, X, F]."""
    z = forward(net.layers(), seen.expand(len(net.flat) // len(seen), -1, -1, -1), args.activation)
    return F.log_softmax(z.mT, -2).mT  # along the states in memory, see `forward`


# --------------------------------------------------------------------------------------------------------------------
# Games


def draw_games(env, generators: Generators, args: Args) -> Batch:
    """The random numbers of B games of each seed: start [K, B] and action [T, 3, K, B], uniform in [0, 1)."""
    numbers = draw(torch.rand, (3 * env.horizon + 1, args.num_envs), generators)
    return {"start": numbers[:, 0], "action": numbers[:, 1:].unflatten(1, (env.horizon, 3)).permute(1, 2, 0, 3)}


def play(env, probs: list[Tensor], start: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Games of R runs with policies [R, X, A] of row, column and planner: states [R, B, T + 1], moves [T, 3, R, B].
    start [K, B] and action [T, 3, K, B] serve each block of K runs, so that runs differ by their policies alone."""
    R, X = probs[0].shape[:2]
    K, B = start.shape
    offset = X * torch.arange(R, device=start.device)[:, None]
    bounds = [list(itertools.accumulate(p.flatten(0, 1).unbind(-1)[:-1])) for p in probs]  # [A - 1] of [R * X]
    starts = torch.ones(X, X, dtype=env.dtype, device=start.device).tril() @ env.start_probs  # cumsum may vary on GPUs
    first = torch.bucketize(start.contiguous(), starts[:-1], right=True)
    states, moves = [first.repeat(R // K, 1)], []
    for uniform in action:
        row, move = (offset + states[-1]).flatten(), []
        for u, thresholds in zip(uniform.repeat(1, R // K, 1).flatten(1), bounds):
            count = torch.zeros_like(row)
            for threshold in thresholds:
                count = count + (u >= threshold.index_select(0, row))
            move.append(count.view(R, B))
        states.append(env.transition[states[-1], move[0], move[1], move[2]])
        moves.append(torch.stack(move))
    return torch.stack(states, -1), torch.stack(moves)


compiled_play = torch.compile(play, fullgraph=True, options={"comprehensive_padding": False})  # at its first call


def average_ranks(*tensors: Tensor) -> list[Tensor]:
    """Means over the ranks of torchrun that train the same seeds, all in one message."""
    if not dist.is_initialized():
        return list(tensors)
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([x.numel() for x in tensors])
    return [part.view_as(x) for part, x in zip(parts, tensors)]


def experience(env, probs: list[Tensor], games: Batch, values: Tensor, run: Batch, args: Args) -> Batch:
    """Games of R = k S runs, the k-th S of them with the k-th part of `probs`: states [R, B, T], moves [3, R, B, T],
    mean reward per step [R, 3], visits [R, X] (share of the steps that begin in each state), and of each reward the
    return to go per step of a game [R, B, T, 3] and how much it exceeds the baseline `values` [S, 3, T, X]."""
    k = len(probs[0]) // len(values)
    states, moves = (compiled_play if args.compile else play)(env, probs, games["start"], games["action"])
    before, after, moves = states[..., :-1], states[..., 1:], moves.permute(1, 2, 3, 0)
    reward = env.rewards[after]
    agents = reward[..., :2] - run["q"].repeat(k)[:, None, None, None] * reward[..., 2:]
    mean = torch.cat((agents, reward[..., 2:]), -1).mean((1, 2))
    if "noise" in run:  # domain randomization: [S, 2, X, M * M], 0 for other methods
        entry = before * env.num_moves**2 + moves[0] * env.num_moves + moves[1]
        noise = run["noise"].repeat(k, 1, 1, 1).flatten(2)  # [R, 2, X * M * M]
        agents = agents + noise.gather(2, entry.flatten(1).unsqueeze(1).expand(-1, 2, -1)).mT.view_as(agents)
    utility = (reward[..., 2] - env.rewards[:, 2].min()).log1p()
    planner = torch.where(run["risk"].repeat(k)[:, None, None], utility, reward[..., 2])
    later = torch.ones(env.horizon, env.horizon, dtype=env.dtype, device=before.device).triu()
    returns = later @ torch.cat((agents, planner[..., None]), -1) / env.horizon
    cell = torch.arange(env.horizon, device=before.device) * env.num_states + before  # [R, B, T] into [T, X]
    baseline = values.repeat(k, 1, 1, 1).flatten(2).gather(2, cell.flatten(1).unsqueeze(1).expand(-1, 3, -1))
    visits = torch.zeros_like(probs[0][..., 0])
    visits = visits.scatter_add(1, before.flatten(1), torch.ones_like(before, dtype=env.dtype).flatten(1))
    games = {"states": before, "moves": moves, "returns": returns, "cell": cell}
    games["mean"], games["visits"] = average_ranks(mean, visits / visits.sum(1, keepdim=True))
    return games | {"advantages": returns - baseline.mT.view_as(returns)}


def score_table(env, games: Batch, player: int, reward: int, runs: slice) -> Tensor:
    """Policy gradient estimate of d E[reward] / d log pi of `player` [R, X, A]: sums of advantages per game."""
    A, states = env.action_sizes[player], games["states"][runs]
    entry = (states * A + games["moves"][player][runs]).flatten(1)
    table = torch.zeros(len(states), env.num_states * A, dtype=env.dtype, device=entry.device)
    table = table.scatter_add(1, entry, games["advantages"][runs, ..., reward].flatten(1) / states.shape[1])
    return average_ranks(table.unflatten(1, (-1, A)))[0]


def follow(values: Tensor, games: Batch, runs: slice, rate: float) -> Tensor:
    """The baseline V(t, x) [S, 3, T, X], moved towards the mean return to go wherever the games came by."""
    cell = games["cell"][runs].flatten(1).unsqueeze(1).expand(-1, 3, -1)
    sums = values.new_zeros(2, *values.flatten(2).shape)
    parts = (games["returns"][runs].flatten(1, 2).mT, torch.ones_like(cell, dtype=values.dtype))
    total, count = average_ranks(*(s.scatter_add(2, cell, part) for s, part in zip(sums, parts)))
    change = (total / count.clamp_min(1e-9)).view_as(values) - values
    return values + rate * change * (count > 0).view_as(values)


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


def policy_gradient(net: MLP, scores: Tensor, seen: Tensor, args: Args) -> Tensor:
    """g of Eq. (16) [S*n, K]: gradient of the objective that scores [S, n, X, A] estimate."""
    with torch.enable_grad():
        flat = net.flat.detach().requires_grad_()
        return torch.autograd.grad((scores * log_policy(MLP(flat, net.sizes), seen, args)).sum(), flat)[0]


def deviate(agents: MLP, others: list[Tensor], first: Batch, games: list[Batch], values, env, seen, run, args: Args):
    """What each agent could gain alone: M trust-region steps of each while the two others stay as in `others`, the
    present policies of row, column and planner. first: the joint policy's games B_0; games: the numbers of B_1 to B_M,
    in which both agents' deviations are played beside the joint policy, all with the same random numbers.

    Returns the estimate of grad J_i(deviation) [S*2, K] (Eq. 15), the local regrets [S, 2] and the mean KL of the whole
    deviations [S, 2] (Eq. 13, 14), and the batches B_1 to B_M: runs 2S to 3S are the joint policy's.
    """
    S, n = len(values), 2
    row, column, planner = others

    def policy(flat: Tensor) -> Tensor:
        return log_policy(MLP(flat, agents.sizes), seen, args).flatten(0, 1)

    def tables(batch: Batch, runs: list[slice]) -> tuple[Tensor, Tensor]:
        """Scores [S, 2, X, M] and visits [S*2, X] of each agent in its own games."""
        scores = torch.stack([score_table(env, batch, i, i, runs[i]) for i in range(n)], 1)
        return scores, torch.stack([batch["visits"][runs[i]] for i in range(n)], 1).flatten(0, 1)

    flat, (scores, visits) = agents.flat.detach(), tables(first, [slice(0, S)] * n)
    start, literal = {"logp": policy(flat), "visits": visits}, args.trust_region == "literal"
    rho = args.rho / args.inner_steps if literal else args.rho
    path, batches, gains = [policy_gradient(agents, scores, seen, args)], [], []
    for numbers in games:
        anchor = {"logp": policy(flat), "visits": visits} if literal else start
        flat = trust_region_step(policy, flat, scores.flatten(0, 1), visits, anchor, rho, args)
        deviation = policy(flat).exp().unflatten(0, (S, n)).unbind(1)
        probs = [torch.cat((deviation[0], row, row)), torch.cat((column, deviation[1], column))]
        batch = experience(env, [*probs, planner.repeat(3, 1, 1)], numbers, values, run, args)
        mean = batch["mean"].unflatten(0, (3, S))
        gains.append(torch.stack([mean[i, :, i] - mean[2, :, i] for i in range(n)], 1))
        scores, visits = tables(batch, [slice(0, S), slice(S, 2 * S)])
        path.append(policy_gradient(MLP(flat, agents.sizes), scores, seen, args))
        batches.append(batch)
    estimate, size = torch.stack(path[:-1]).mean(0), 4 * args.inner_steps / max(1, args.inner_steps - 1)
    if args.meta_gradient == "fomaml":
        estimate, size = path[-1], 2.0
    if args.correction == "displacement":
        shift = flat - agents.flat.detach()
        estimate = shift * estimate.norm(dim=1, keepdim=True) / shift.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if args.meta_rescale:
        estimate = path[0] + size * (estimate - path[0])
    kl = mean_kl(start["visits"], start["logp"], policy(flat)).unflatten(0, (S, n))
    regrets = torch.stack(gains).amax(0)
    return estimate, regrets.clamp_min(0) if args.clamp_regret else regrets, kl, batches


def ascend(net: MLP, optimizer, scores: Tensor, visits: Tensor, seen: Tensor, correction, args: Args) -> Tensor:
    """A step of Adam on the objective that scores [S, n, X, A] estimate, plus entropy, its gradient less `correction`
    [S*n, K]. Returns the entropy of each policy [S, n], mean over visits [S, X]."""
    logp = log_policy(net, seen, args)
    entropy = -(visits[:, None] * (logp.exp() * logp).sum(-1)).sum(-1)
    objective = (scores * logp).sum() + optimizer.param_groups[0]["ent_coef"] * entropy.sum()
    net.flat.grad = correction - torch.autograd.grad(objective, net.flat)[0]
    optimizer.step()
    return entropy.detach()


def joint_policy(nets: Nets, seen: Batch, args: Args) -> list[Tensor]:
    """Probabilities [S, X, A] of row, column and planner."""
    logps = [log_policy(nets[name], seen[name], args).detach() for name in ("agents", "planner")]
    return [logp.exp() for both in logps for logp in both.unbind(1)]


def search(nets, optimizers, lambdas, values, env, seen, games: list[Batch], run: Batch, args: Args, deviating: bool):
    """An update of the agents, one iteration of Algorithm 2, from the random numbers of B_0 to B_M. Agent i ascends on
    -J_r + lambda_i (g_1 - beta grad J_i(deviation)), Eq. (11) with (15); without `deviating` (other methods, warm-up)
    the last term is left out and the joint policy plays all batches. Returns lambdas [S, 2] and the baseline `values`
    after the update, and metrics [S]."""
    S, policies = len(lambdas), joint_policy(nets, seen, args)
    batch, correction = experience(env, policies, games[0], values, run, args), 0.0
    joint, weight = [(batch, slice(0, S))], lambdas
    regrets = excess = kl = torch.zeros_like(lambdas)
    if deviating:
        estimate, regrets, kl, more = deviate(
            nets["agents"], policies, batch, games[1:], values, env, seen["agents"], run, args
        )
        joint += [(batch, slice(2 * S, 3 * S)) for batch in more]
        excess = run["learns_lambda"][:, None] * (regrets - run["epsilon"][:, None])
        weight = (lambdas + args.lambda_damping * excess).clamp(0, args.lambda_max)
        correction = ((run["adversarial"] * run["beta"])[:, None] * weight).flatten()[:, None] * estimate
    else:
        joint += [(experience(env, policies, numbers, values, run, args), slice(0, S)) for numbers in games[1:]]
    pairs = itertools.product(range(2), range(3))
    tables = [torch.stack([score_table(env, b, i, r, runs) for b, runs in joint]).mean(0) for i, r in pairs]
    counts = torch.eye(2, device=weight.device).maximum(run["cross_terms"][:, None, None])  # [S, 2, 2], reward j for i
    weights = torch.cat((counts * weight[:, None], -run["adversarial"][:, None, None].expand(-1, 2, 1)), 2)  # [S, 2, 3]
    scores = (weights[..., None, None] * torch.stack(tables, 1).unflatten(1, (2, 3))).sum(2)  # [S, 2, X, A]
    visits = torch.stack([b["visits"][runs] for b, runs in joint]).mean(0)
    entropy = ascend(nets["agents"], optimizers["agents"], scores, visits, seen["agents"], correction, args)
    for batch, runs in joint:
        values = follow(values, batch, runs, args.value_rate)
    mean = torch.stack([b["mean"][runs] for b, runs in joint]).mean(0)
    metrics = {f"charts/{name}_reward": mean[:, k] for k, name in enumerate(env.agents)}
    metrics["charts/episodic_return"] = env.horizon * mean[:, 2]
    metrics |= {"ermas/lambda_row": lambdas[:, 0], "ermas/lambda_column": lambdas[:, 1]}
    metrics |= {"ermas/local_regret_row": regrets[:, 0], "ermas/local_regret_column": regrets[:, 1]}
    metrics |= {"ermas/deviation_kl": kl.amax(1), "losses/entropy": entropy.mean(1)}
    lambdas = (lambdas + args.lambda_lr * excess).clamp(0, args.lambda_max)  # ALGO LOGIC: Eq. (12)
    return lambdas, values, metrics


def plan(nets, optimizers, values, env, seen, games: Batch, run: Batch, args: Args) -> None:
    """The planner's policy gradient step on the agents that the search found; it takes their policies as given."""
    batch = experience(env, joint_policy(nets, seen, args), games, values, run, args)
    scores = score_table(env, batch, 2, 2, slice(None)).unsqueeze(1)
    ascend(nets["planner"], optimizers["planner"], scores, batch["visits"], seen["planner"], 0.0, args)


# --------------------------------------------------------------------------------------------------------------------
# Evaluation: new agents against the frozen planner in test games, and exact values


def play_tests(env, planner: MLP, args: Args) -> tuple[Tensor, Tensor]:
    """New agents learn from scratch, each for itself, in the games with Q of args.eval_q against the frozen planners of
    S runs: exact values of the final policies [S, Q, 3] and what an agent could still gain [S, Q, 2], per step."""
    S, Q = len(planner.flat), len(args.eval_q)
    q = torch.tensor(args.eval_q, dtype=env.dtype, device=env.device).repeat_interleave(S)  # runs are [Q, S]
    zero = torch.zeros_like(q)
    run = {"q": q, "adversarial": zero, "cross_terms": zero, "risk": zero.bool()}
    nets = {"planner": MLP(planner.flat.detach().repeat(Q, 1), planner.sizes)}
    nets["agents"] = make_policies(env, PLAYERS["agents"], Q * S // args.num_seeds, "test", args)
    optimizers = {"agents": torch.optim.Adam([nets["agents"].flat], args.learning_rate, fused=True)}
    generators = make_generators(args.seed, args.num_seeds, "test games", env.device)
    seen, lambdas = make_features(env, args), torch.ones(Q * S, 2, dtype=env.dtype, device=env.device)
    values = torch.zeros(Q * S, 3, env.horizon, env.num_states, dtype=env.dtype, device=env.device)
    for iteration in tqdm(range(args.eval_iterations), desc="test games", disable=None, leave=False):
        anneal(optimizers, iteration / args.eval_iterations, args)
        games = [draw_games(env, generators, args)]
        _, values, _ = search(nets, optimizers, lambdas, values, env, seen, games, run, args, deviating=False)
    policies = joint_policy(nets, seen, args)
    value, regret = bimatrix.exact_value(env, policies, q=q), bimatrix.regret(env, policies, q=q)[:, :2]
    return value.unflatten(0, (Q, S)).transpose(0, 1), regret.unflatten(0, (Q, S)).transpose(0, 1)


def exact(nets: Nets, env, seen: Batch, run: Batch, args: Args) -> Batch:
    """The exact value of the present policies for the planner, and both agents' exact regret, per step [S]."""
    policies = joint_policy(nets, seen, args)
    value, regret = bimatrix.exact_value(env, policies, q=run["q"]), bimatrix.regret(env, policies, q=run["q"])
    metrics = {f"eval/{name}_reward": value[:, k] for k, name in enumerate(env.agents)}
    metrics["eval/agent_reward"] = value[:, :2].mean(1)
    return metrics | {"ermas/exact_regret_row": regret[:, 0], "ermas/exact_regret_column": regret[:, 1]}


def report(nets: Nets, last: Batch, env, args: Args, run_dir: Path, wandb_runs: list) -> None:
    """What the run has found: a table on the terminal, results.csv (end of training), test_games.csv and report.png."""
    labels, Q = run_labels(args), len(args.eval_q)
    results = [label | {name: metric[k].item() for name, metric in last.items()} for k, label in enumerate(labels)]
    tests = []
    if args.figure in (None, "5"):
        value, regret = (x.tolist() for x in play_tests(env, nets["planner"], args))
        for (k, label), (c, q) in itertools.product(enumerate(labels), enumerate(args.eval_q)):
            row = {"q": q, "planner_reward": value[k][c][2], "agent_regret": max(regret[k][c])}
            tests.append(label | row)
    for name, rows in {"results.csv": results, "test_games.csv": tests}.items():
        with open(run_dir / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
    print_tables(results, tests, args)
    plot(results, tests, env, args, run_dir)
    with wandb_may_fail(wandb_runs):
        for k, run in enumerate(wandb_runs):
            import wandb

            data = [list(test.values())[-3:] for test in tests[k * Q : (k + 1) * Q]]
            table = wandb.Table(columns=["q", "planner_reward", "agent_regret"], data=data)
            run.log({"test_games": table, "report": wandb.Image(str(run_dir / "report.png"))})
            run.finish()


def by_setting(rows: list[dict], args: Args) -> dict[str, dict[str, np.ndarray]]:
    """Columns of `rows` for each setting by its name, [K seeds, rows of a seed] each, and means over both agents."""
    groups = {}
    for row in rows:
        both = {key[:-4]: (row[key] + row[key[:-3] + "column"]) / 2 for key in row if key.endswith("_row")}
        groups.setdefault(setting_name(row, args), []).append(row | both)
    return {
        name: {key: np.array([row[key] for row in group]).reshape(args.num_seeds, -1) for key in group[0]}
        for name, group in groups.items()
    }


def interval(values: np.ndarray) -> np.ndarray:
    """Half-width of the 95% t-interval of the mean over seeds, of values [K, n]: [n]; NaN for a single seed."""
    K = len(values)
    return stats.t.ppf(0.975, K - 1) * stats.sem(values) if K > 1 else np.full(values.shape[1], math.nan)


def print_tables(results: list[dict], tests: list[dict], args: Args) -> None:
    """Mean and 95% interval over seeds for each setting."""

    def cells(values: np.ndarray, digits: int = 3) -> str:
        pairs = zip(values.mean(0), interval(values))
        return "".join(f"{f'{mean:.{digits}f} ± {half:.{digits}f}':16}" for mean, half in pairs)

    columns = {"planner reward": "eval/planner_reward", "agent reward": "eval/agent_reward"}
    columns |= {"exact regret": "ermas/exact_regret", "local regret": "ermas/local_regret", "lambda": "ermas/lambda"}
    print(f"\n{args.env_id}, per step: mean and 95% interval over {args.num_seeds} seeds; agents: mean of both")
    print(f"{'':36s}" + "".join(f"{name:16s}" for name in columns))
    for name, group in by_setting(results, args).items():
        print(f"  {name:34s}" + "".join(cells(group[key]) for key in columns.values()))
    if tests:
        print("\nReward of the planner when new agents learn against it, by Q of the test game")
        print(f"{'':36s}" + "".join(f"Q = {q:<12g}" for q in args.eval_q))
    for name, group in by_setting(tests, args).items():
        print(f"  {name:34s}" + cells(group["planner_reward"], 2))


def plot(results: list[dict], tests: list[dict], env, args: Args, run_dir: Path) -> None:
    """The paper's Figure 3 (payoffs, rewards, regret), 4 (rewards, learning curves) or 5 (test games), or of a run
    without --figure: rewards, regret, test games."""
    plots = {
        None: (plot_rewards, plot_regret, plot_tests) if "ermas" in args.method else (plot_rewards, plot_tests),
        "3": (partial(plot_payoffs, players=[0, 1]), partial(plot_payoffs, players=[2]), plot_rewards, plot_regret),
        "4": (plot_rewards, *(partial(plot_curves, metric=f"eval/{name}_reward") for name in env.agents)),
        "5": (plot_tests,),
    }[args.figure]
    figure = Figure(figsize=(max(7, 4.2 * len(plots)), 4), layout="constrained")
    for axis, draw_panel in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots):
        draw_panel(axis, results=results, tests=tests, env=env, args=args, run_dir=run_dir)
    figure.savefig(run_dir / "report.png", dpi=110)


def plot_payoffs(axis, players: list[int], env, **_) -> None:
    payoff = env.payoffs[players].sum(0).numpy()
    axis.imshow(payoff, origin="lower")
    for (i, j), value in np.ndenumerate(payoff):
        bright = value > (payoff.min() + payoff.max()) / 2
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if bright else "white")
    title = " + ".join(env.agents[player] for player in players)
    axis.set(title=f"payoff of {title}", xlabel="column j", ylabel="row i")
    axis.set(xticks=range(payoff.shape[1]), yticks=range(payoff.shape[0]))


def plot_rewards(axis, results: list[dict], args: Args, **_) -> None:
    """A point per setting with standard deviations over seeds, ERMAS named by its epsilon or its fixed lambda."""
    styles = {}
    for group in by_setting(results, args).values():
        x, y, fixed = group["eval/agent_reward"], group["eval/planner_reward"], group["fixed_lambda"].any()
        method, shared = group["method"][0, 0], ", shared rewards" * bool(group["cross_terms"].any())
        kind = ("fixed lambda" if fixed else "epsilon" if method == "ermas" else method) + shared
        if args.figure and (group["beta"] != args.beta[0]).any():
            continue
        new = kind not in styles
        color = styles.setdefault(kind, f"C{len(styles)}")
        axis.errorbar(
            x.mean(), y.mean(), y.std(), x.std(), marker="o", capsize=2, color=color, label=kind if new else None
        )
        name = "lambda_init" if fixed else "epsilon"
        if method == "ermas" and not (fixed and shared):  # those lie on top of each other
            place = {"xytext": (-16, -10) if fixed else (4, 4), "textcoords": "offset points", "fontsize": 8}
            axis.annotate(f"{group[name][0, 0]:g}", (x.mean(), y.mean()), **place)
    axis.set(xlabel="mean reward of both agents", ylabel="reward of the planner", title="rewards per step")
    axis.legend(fontsize=8)


def plot_regret(axis, results: list[dict], args: Args, **_) -> None:
    """Exact and local regret under ERMAS, mean over both agents, with standard deviations over seeds."""
    groups = [g for g in by_setting(results, args).values() if g["method"][0, 0] == "ermas"]
    epsilon = [group["epsilon"][0, 0] for group in groups]
    for kind, mark in (("exact", "o"), ("local", "^")):
        mean, sd = zip(
            *((group[f"ermas/{kind}_regret"].mean(), group[f"ermas/{kind}_regret"].std()) for group in groups)
        )
        axis.errorbar(epsilon, mean, sd, marker=mark, ls="", capsize=2, label=kind)
    axis.plot([0, max(epsilon)], [0, max(epsilon)], color="grey", lw=1, label="epsilon")
    axis.set(xlabel="epsilon", ylabel="regret per step", title="regret of the agents")
    axis.legend()


def plot_tests(axis, tests: list[dict], args: Args, **_) -> None:
    for name, group in by_setting(tests, args).items():
        q, reward = group["q"][0], group["planner_reward"]
        axis.plot(q, reward.mean(0), marker="o", markersize=3, label=name)
        axis.fill_between(q, reward.mean(0) - interval(reward), reward.mean(0) + interval(reward), alpha=0.15)
    axis.set(xlabel="Q of the test game", ylabel="reward of the planner", title="against new agents, 95% over seeds")
    axis.legend(fontsize=8)


def plot_curves(axis, metric: str, args: Args, run_dir: Path, **_) -> None:
    """Learning curves from metrics.csv, a line per beta, with standard errors over seeds."""
    curves = {}
    with open(run_dir / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["fixed_lambda"] == "False" and float(row["epsilon"]) == CURVES["epsilon"]:
                steps = curves.setdefault(float(row["beta"]), {})
                steps.setdefault(int(row["global_step"]), []).append(float(row[metric]))
    for beta, steps in sorted(curves.items()):
        values = np.array(list(steps.values()))  # [steps, K]
        mean, error = values.mean(1), stats.sem(values, 1)
        axis.plot(list(steps), mean, label=f"beta {beta:g}")
        axis.fill_between(list(steps), mean - error, mean + error, alpha=0.2)
    axis.set(xlabel="environment steps of a run", title=metric.removeprefix("eval/").replace("_", " "))
    axis.legend(fontsize=8)


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


def build_env(args: Args, num_envs: int, device: torch.device):
    """The game that the flags describe, at Q = 0: each run's own Q is in `make_run`."""
    fields = {"horizon": args.horizon, "num_moves": args.num_moves}
    if args.payoffs:
        try:
            fields["payoffs"] = torch.tensor(json.loads(Path(args.payoffs).read_text()), dtype=torch.float64)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"--payoffs must be a JSON file with three R x C matrices, got {args.payoffs!r} ({error})")
    if args.env_id == "augmented_bimatrix_v0":
        fields |= {"max_incentive": args.max_incentive, "payoff_scale": args.payoff_scale}
        fields["planner_observes"] = args.planner_observes
    return envs.make(args.env_id, num_envs, device, **fields)


def make_run(env, args: Args) -> Batch:
    """What differs between the S runs, [S] each."""
    labels = run_labels(args)
    ermas = [label["method"] == "ermas" for label in labels]
    columns = {"q": [label["q_train"] for label in labels], "adversarial": ermas}
    columns |= {name: [label[name] for label in labels] for name in ("epsilon", "beta")}
    columns["lambda_init"] = [label["lambda_init"] if e else 1.0 for label, e in zip(labels, ermas)]
    columns["cross_terms"] = [e and label["cross_terms"] for label, e in zip(labels, ermas)]
    columns["learns_lambda"] = [e and not label["fixed_lambda"] for label, e in zip(labels, ermas)]
    columns["randomized"] = [label["method"] == "domain-randomization" for label in labels]
    run = {name: torch.tensor(values, dtype=env.dtype, device=env.device) for name, values in columns.items()}
    return run | {"risk": torch.tensor([label["method"] == "risk" for label in labels], device=env.device)}


def make_features(env, args: Args) -> Batch:
    return {name: features(env, players, args) for name, players in PLAYERS.items()}


def make_policies(env, players: list[int], num_settings: int, purpose: str, args: Args) -> MLP:
    """Policies of `players` for each seed, the same at the start in all settings."""
    generators = make_generators(args.seed, args.num_seeds, purpose, env.device)
    hidden, outputs = [args.hidden_size] * 2 * (args.hidden_size > 0), env.action_sizes[players[0]]
    net = init_mlp([features(env, players, args).shape[2], *hidden, outputs], len(players), generators)
    flat = net.flat.detach().unflatten(0, (args.num_seeds, -1)).repeat(num_settings, 1, 1).flatten(0, 1)
    return MLP(flat.requires_grad_(), net.sizes)


def make_learners(env, args: Args, state: dict | None = None) -> tuple[Nets, dict[str, torch.optim.Optimizer]]:
    """Policies of all runs, and an Adam for the agents' and one for the planners'. As in checkpoint `state`."""
    settings = len(run_labels(args)) // args.num_seeds
    nets = {name: make_policies(env, players, settings, name, args) for name, players in PLAYERS.items()}
    optimizers = {name: torch.optim.Adam([net.flat], args.learning_rate, fused=True) for name, net in nets.items()}
    for name, net in nets.items() if state is not None else ():
        net.flat.detach().copy_(state["nets"][name])
        optimizers[name].load_state_dict(state["optimizers"][name])
    return nets, optimizers


def write_video(nets: Nets, env, args: Args, run_dir: Path) -> None:
    """A game of the first run's policies as videos/game.gif."""
    streams = make_generators(args.seed, 1, "video", env.device)
    policies, (state, _) = joint_policy(nets, make_features(env, args), args), env.reset(streams)
    frames = [Image.fromarray(env.render(state))]
    for _ in range(env.horizon):
        move = [torch.multinomial(policy[0, state.index], 1, generator=streams[0]) for policy in policies]
        state, *_ = env.step(state, torch.cat(move, 1))
        frames.append(Image.fromarray(env.render(state)))
    (run_dir / "videos").mkdir(exist_ok=True)
    frames[0].save(run_dir / "videos" / "game.gif", save_all=True, append_images=frames[1:], duration=400, loop=0)


def anneal(optimizers: dict[str, torch.optim.Optimizer], progress: float, args: Args) -> None:
    """Step sizes and the weight of the entropy fall linearly to 0."""
    sizes = {"agents": args.learning_rate, "planner": args.planner_learning_rate}
    for name, optimizer in optimizers.items():
        optimizer.param_groups[0] |= {"lr": sizes[name] * (1 - progress), "ent_coef": args.ent_coef * (1 - progress)}


def train(env, nets, optimizers, run: Batch, args: Args, run_dir: Path, wandb_runs: list, state: dict | None = None):
    """Train from the start or from `state`, a checkpoint. Returns the last row of metrics, and whether the end was
    reached: if not, Ctrl-C or SIGTERM ended it, after a checkpoint."""
    labels, seen, log_path = run_labels(args), make_features(env, args), run_dir / "metrics.csv"
    S, acts, methods = len(labels), env.max_incentive is not None, {label["method"] for label in labels}
    randomized = "domain-randomization" in methods

    def steps(iterations: int) -> int:
        """Environment steps of a run."""
        warm, deviations = min(iterations, args.warmup_steps), 2 * args.inner_steps * ("ermas" in methods)
        batches = iterations * (1 + args.inner_steps) + (iterations - warm) * deviations
        return (args.search_steps * batches + acts * (iterations - warm)) * args.num_envs * env.horizon

    ranks = {"games": RANK, "randomization": 0}  # the noise on rewards is the same in all processes
    streams = {n: make_generators(args.seed, args.num_seeds, n, env.device, rank) for n, rank in ranks.items()}
    lambdas, noise = run["lambda_init"][:, None].repeat(1, 2), torch.zeros(0, device=env.device)
    values = torch.zeros(S, 3, env.horizon, env.num_states, dtype=env.dtype, device=env.device)
    iteration, sums, count, row = 0, {}, 0, {}  # sums of metrics over `count` iterations since the last log
    if state is not None:
        for name, generators in streams.items():
            for generator, saved in zip(generators, state["streams"][name]):
                generator.set_state(saved)
        lambdas, values, noise = (tensor.to(env.device) for tensor in state["tensors"])
        sums, row = ({k: v.to(env.device) for k, v in metrics.items()} for metrics in state["metrics"])
        iteration, count = state["iteration"], state["count"]
        if RANK == 0 and log_path.exists():  # drop rows that will be written again, and one cut off by a kill
            os.truncate(log_path, state["log_size"])
    stops, is_over = [], iteration >= args.num_iterations
    handlers = {s: signal.signal(s, lambda *caught: stops.append(caught)) for s in (signal.SIGINT, signal.SIGTERM)}
    started = time.perf_counter()
    bar = tqdm(total=args.num_iterations, initial=iteration, unit="iteration", disable=True if RANK else None)
    while not is_over:
        anneal(optimizers, iteration / args.num_iterations, args)
        warm = iteration < args.warmup_steps
        deviating = "ermas" in methods and not warm
        for k in range(args.search_steps):
            if randomized and (iteration * args.search_steps + k) % args.randomize_interval == 0:
                shape = (2, env.num_states, env.num_moves**2)
                noise = (2 * draw(torch.rand, shape, streams["randomization"]) - 1).repeat(S // args.num_seeds, 1, 1, 1)
                noise = noise * run["randomized"][:, None, None, None]
            run |= {"noise": noise} if randomized else {}
            games = [draw_games(env, streams["games"], args) for _ in range(1 + args.inner_steps)]
            lambdas, values, metrics = search(nets, optimizers, lambdas, values, env, seen, games, run, args, deviating)
        if acts and not warm:
            plan(nets, optimizers, values, env, seen, draw_games(env, streams["games"], args), run, args)
        sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
        iteration, count = iteration + 1, count + 1
        bar.update()
        is_done, is_over = iteration >= args.num_iterations, bool(stops) or iteration >= args.num_iterations
        if dist.is_initialized():  # all ranks stop together
            over = torch.tensor(float(is_over), device=env.device)
            dist.all_reduce(over)
            is_over = bool(over)
        log = is_done or iteration % args.log_interval == 0
        save = is_over or iteration % args.checkpoint_interval == 0
        for name, value in sums.items() if log or save else ():
            if not value.isfinite().all():
                good = run_dir / CHECKPOINT if (run_dir / CHECKPOINT).exists() else "none yet"
                fail(f"{name} is not finite at iteration {iteration}; last good checkpoint: {good}")
        if log:
            row = exact(nets, env, seen, run, args) | {name: value / count for name, value in sums.items()}
            speed = S * (steps(iteration) - steps(iteration - count)) / (time.perf_counter() - started)
            row["charts/SPS"] = torch.full((S,), round(speed))
            if RANK == 0:
                log_metrics(log_path, wandb_runs, labels, steps(iteration), row)
            bar.set_postfix(planner_reward=f"{row['eval/planner_reward'].mean():.3f}", refresh=False)
            sums, count, started = {}, 0, time.perf_counter()
        if save:
            data = {"script": Path(__file__).stem, "args": asdict(args), "iteration": iteration, "count": count}
            data |= {"log_size": log_path.stat().st_size if log_path.exists() else 0}
            data |= {"nets": {name: net.flat.detach() for name, net in nets.items()}}
            data |= {"optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}}
            data |= {"streams": {p: [g.get_state() for g in generators] for p, generators in streams.items()}}
            data |= {"tensors": (lambdas, values, noise), "metrics": (sums, row)}
            save_checkpoint(run_dir / CHECKPOINT, data)
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return row, iteration >= args.num_iterations


def main() -> None:
    args = parse_args()
    args, state, run_dir = load_run(args) if args.resume or args.evaluate else (args, None, None)
    device = setup(args)
    try:
        env = build_env(args, 1, device)
    except ValueError as error:
        fail(str(error))
    run, (nets, optimizers) = make_run(env, args), make_learners(env, args, state)
    run_dir = run_dir or make_run_dir(args)
    wandb_runs = [] if args.evaluate else start_wandb(args, run_dir, run_labels(args))
    if args.evaluate:
        row, is_done = state["metrics"][1], True
        if not row:
            fail(f"{run_dir} has not trained long enough to be evaluated; go on with --resume")
    else:
        row, is_done = train(env, nets, optimizers, run, args, run_dir, wandb_runs, state)
    if not is_done:
        print(f"stopped; go on with: python {Path(__file__).name} --resume {run_dir}", file=sys.stderr)
        raise SystemExit(130)
    if dist.is_initialized():
        dist.destroy_process_group()  # the test games are played by one process
    if RANK == 0:
        report(nets, row, env, args, run_dir, wandb_runs)
        if args.capture_video:
            write_video(nets, env, args, run_dir)
        print(f"results: {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # training ends itself, with a checkpoint
        print("stopped during the report; repeat it with --evaluate RUN_DIR", file=sys.stderr)
        sys.exit(130)
