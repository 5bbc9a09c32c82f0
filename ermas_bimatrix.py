"""ERMAS in repeated bimatrix games: a planner that is robust to what the other agents want.

ERMAS (Zhao et al. 2021, arXiv 2106.05492) trains a robust actor, here the planner, against agents that hurt it as much
as they can while none could gain more than epsilon by changing its policy alone (Eq. 7). Agent i ascends on -J_r plus
lambda_i times its own reward, corrected by a first-order meta-gradient (Eq. 11, 15, 16); lambda_i rises while the
regret that TRPO finds in a KL ball (Eq. 13, 14) exceeds epsilon (Eq. 12). The planner ascends on J_r (Algorithm 1).

    python ermas_bimatrix.py --epsilon 0.1                   # ERMAS, five seeds: one to two minutes
    python ermas_bimatrix.py --method marl --q-train 0.5     # a baseline; also domain-randomization and risk
    python ermas_bimatrix.py --epsilon 0.1 0.2 --beta 0 0.4  # several settings side by side, each with five seeds

Usage, metrics and results: docs/ermas_bimatrix.md.
Differences to the paper (docs/paper_to_code.md): 2 factor 2, 4 sign of Eq. 9, 6 own regret only, 7 sign of
Eq. 12, 8 bounds and damping of lambda, 9 regret per step, 10 common random numbers, 13 KL to the anchor, 14 Eq. 15 is
the bracket of Eq. 11, 17 and 18 gradients, not parameters, 20 planner's turn, 21 warm-up, 23 payoffs, 24 moves,
25 incentives, 26 noise per transition, 27 shifted logarithm.

Axes: S runs (all seeds of all settings), n agents (0 row, 1 column), B games, T steps, X states, A moves or incentives,
F features, K parameters, M inner steps. The game is finite: a policy is evaluated once in each of the X states, games
are played by table lookup, and what a batch says about a policy is a score for each state and action.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below prints no traceback

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

import envs
from envs import bimatrix, runs
from envs.bimatrix import Bimatrix
from envs.runs import Name, Threads, arguments, log, make_run_dir, setup

Batch = dict[str, Tensor]  # what is known of a batch of games, its random numbers, or metrics [S]
Generators = list[torch.Generator]  # one per seed
Nets = dict[str, "MLP"]  # agents, planner
Values = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
Methods = Annotated[tuple[Literal["ermas", "marl", "domain-randomization", "risk"], ...], Field(min_length=1)]
PLAYERS = {"agents": [0, 1], "planner": [2]}


@arguments
class Experiment:
    exp_name: Name = Path(__file__).stem  # name of this experiment
    seed: NonNegativeInt = 1  # seed of the first run; run k of each setting uses seed + k
    num_seeds: PositiveInt = 5  # independent runs of each setting, trained side by side (paper: 5 to 10)
    torch_deterministic: bool = True  # deterministic algorithms only: same seed, same machine, same numbers
    cuda: bool = True  # use the GPU if there is one
    num_threads: Threads = 1  # CPU threads; with more set OMP_WAIT_POLICY=PASSIVE, or one busy core stalls all
    compile: bool = False  # torch.compile the playing of games
    runs_dir: str = "runs"  # folder that receives a folder per run
    resume: str | None = None  # run folder to continue; other flags are read from it
    evaluate: str | None = None  # run folder or policy file whose planners are evaluated again, without training
    capture_video: bool = False  # write a GIF of a game of the trained policies
    log_interval: PositiveInt = 10  # iterations between two rows of metrics.csv
    checkpoint_interval: PositiveInt = 100  # iterations between two checkpoints
    eval_q: Values = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # Q of test games against new agents
    eval_iterations: PositiveInt = 400  # updates of the new agents, who learn against the frozen planner
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline needs no account; `wandb sync` later
    wandb_project_name: str = "robust-marl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team


@arguments
class Games:
    env_id: Literal["augmented_bimatrix_v0", "repeated_bimatrix_v0"] = "augmented_bimatrix_v0"
    """augmented: the planner chooses incentives; repeated: it is passive (paper, Figures 3 and 4)"""
    payoffs: str | None = None  # JSON file, three R x C matrices of row, column, planner; default: a 4 x 4 dilemma
    horizon: PositiveInt = 16  # T, steps of a game
    num_moves: Literal[3, 2] = 3  # down, stay, up; or down, up
    max_incentive: NonNegativeInt = 3  # largest incentive of the augmented game
    payoff_scale: PositiveFloat = 4.0  # c: the planner gets incentive * c * payoff - incentive^2
    planner_observes: bool = False  # the planner sees the position; without, it commits to incentives beforehand
    method: Methods = ("ermas", "marl")  # ermas; each for itself; with noise on agents' rewards; log planner reward
    q_train: Values = (0.0,)  # Q in training: the agents' rewards are r_i - Q * (planner's reward)
    num_iterations: PositiveInt = 800  # iterations: search_steps updates of the agents, one of the planner
    search_steps: PositiveInt = 1  # n_train, updates of the agents per update of the planner
    num_envs: PositiveInt = 64  # B, games of a batch of one run
    learning_rate: PositiveFloat = 0.03  # Adam step size of the agents, linear to 0
    planner_learning_rate: PositiveFloat = 0.03  # Adam step size of the planner, linear to 0
    ent_coef: NonNegativeFloat = 0.1  # weight of the policies' mean entropy in nats, linear to 0
    hidden_size: NonNegativeInt = 0  # width of two hidden layers; 0: a table, one row of logits per observation
    activation: Literal["relu", "silu", "tanh"] = "tanh"  # hidden activation
    value_rate: Annotated[float, Field(gt=0, le=1)] = 0.1  # rate at which the baseline V(t, x) follows the batches
    randomize_interval: PositiveInt = 10  # domain randomization: updates between two draws of noise U[-1, 1]


@arguments
class ERMAS:
    """Several values of method, q_train, epsilon, beta, lambda_init train side by side."""

    epsilon: Values = (0.2,)  # slack on an agent's regret, per step
    beta: Values = (0.4,)  # weight of the meta-gradient (Eq. 15)
    lambda_init: Values = (1.0,)  # lambda_0, first weight of an agent's own reward, and during the warm-up
    fixed_lambda: bool = False  # keep lambda at lambda_0 (the ablation of Figure 4)
    lambda_lr: NonNegativeFloat = 0.3  # alpha_lambda, step size of lambda
    lambda_damping: NonNegativeFloat = 10.0  # kappa: own rewards count lambda + kappa * (regret - epsilon); 0: printed
    clamp_regret: bool = True  # an estimated regret below 0 counts as 0
    lambda_max: PositiveFloat = 20.0  # upper bound of lambda
    cross_terms: bool = False  # shared rewards -r_r + sum_j lambda_j r_j (Algorithm 2), not each its own (Eq. 11)
    warmup_steps: NonNegativeInt = 50  # k, first iterations: lambda_0, no deviations, the planner at rest
    inner_steps: PositiveInt = 3  # M = n_inner, trust-region steps of a deviation
    rho: PositiveFloat = 8.0  # trust region, mean KL(policy || deviation) in nats; a small one hides far gains
    trust_region: Literal["anchor", "literal"] = "anchor"
    """the whole deviation stays within rho of the policy, or each of its steps within rho / M of the last (printed)"""
    meta_gradient: Literal["reptile", "fomaml"] = "reptile"
    """estimate of grad J_i(deviation): mean of the gradients along it (Eq. 15), or the last one"""
    meta_rescale: bool = False  # scale the correction to the exact size: 4M/(M-1) for reptile, 2 for fomaml
    correction: Literal["gradients", "displacement"] = "gradients"
    """the path's gradients, or the deviation's displacement of parameters, scaled to their length (Algorithm 2)"""
    cg_steps: PositiveInt = 10  # conjugate gradient steps of the natural gradient
    cg_damping: NonNegativeFloat = 1e-4  # damping of the Fisher matrix


@arguments
class Args(ERMAS, Games, Experiment):
    def __post_init__(self):
        for name in ("method", "epsilon", "beta", "lambda_init", "q_train", "eval_q"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must have different values, got {values}")
        if max(self.lambda_init) > self.lambda_max:
            raise ValueError(f"lambda_init must be at most lambda_max, got {self.lambda_init}")
        if self.meta_rescale and self.inner_steps == 1:
            raise ValueError("meta_rescale must be off where inner_steps is 1: there is no curvature")
        is_plain = self.meta_gradient == "reptile" and not self.meta_rescale
        if self.correction == "displacement" and not is_plain:
            raise ValueError("correction must be gradients unless meta_gradient is reptile, not rescaled")

    @property
    def labels(self) -> list[dict]:
        """What tells the S runs apart, the seeds of a setting together. To baselines only q_train matters."""
        names = ("epsilon", "beta", "lambda_init", "q_train")
        columns = [getattr(self, name) for name in names]
        plain = [*(column[:1] for column in columns[:3]), self.q_train]
        if self.fixed_lambda:
            columns[0] = self.epsilon[:1]  # it bounds nothing there
        settings = []
        for method in self.method:
            for values in itertools.product(*(columns if method == "ermas" else plain)):
                settings.append({"method": method} | dict(zip(names, values)))
        seeds = range(self.seed, self.seed + self.num_seeds)
        return [setting | {"seed": seed} for setting in settings for seed in seeds]


@dataclass
class Task:
    """The game of S runs, and in what they differ."""

    env: Bimatrix
    args: Args
    settings: Batch  # [S] each
    features: Batch  # of agents [2, X, F] and planner [1, X, F]: what they see in each state


@dataclass
class Learner:
    """What training changes."""

    nets: Nets
    optimizers: dict[str, torch.optim.Optimizer]
    lambdas: Tensor  # [S, 2] weight of each agent's own reward
    values: Tensor  # [S, 3, T, X] baseline of each reward


# --------------------------------------------------------------------------------------------------------------------
# Policies: softmax over a table or a small network

ACTIVATIONS = {"relu": torch.relu_, "silu": F.silu, "tanh": torch.tanh_}  # in place where the output gives the slope


@dataclass
class MLP:
    """S*N networks evaluated at once. `flat` [S*N, K] has all weights and biases of a network in a row: one tensor to
    optimise, to clip row by row and to average into a target. K is a multiple of 16, so that vectorised elementwise
    operations round every row alike and a seed's numbers do not depend on the seeds beside it."""

    flat: Tensor
    sizes: list[int]
    activation: str

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """(weight [S*N, out, in], bias [S*N, out, 1]) of each layer, views of `flat`."""
        shapes = []
        for n_in, n_out in pairwise(self.sizes):
            shapes += [(n_out, n_in), (n_out, 1)]
        counts = [math.prod(shape) for shape in shapes]
        padding = self.flat.shape[1] - sum(counts)
        parts = self.flat.split([*counts, padding], 1)
        views = [part.unflatten(1, shape) for part, shape in zip(parts, shapes)]
        return list(zip(views[::2], views[1::2]))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Inputs in blocks side by side, each [S, N, M, in], or [S, 1, M, in] where all networks of a seed have the
        same -> [S, N, M, out]. Hidden units have samples last in memory: products with few outputs are several times
        faster so."""
        (weight, h), *rest = self.layers()
        S = len(inputs[0])
        N = len(self.flat) // S
        start = 0
        for x in inputs:
            x = x.contiguous().expand(-1, N, -1, -1).flatten(0, 1)  # [S*N, M, in], one layout for any S
            end = start + x.shape[2]
            part = weight[:, :, start:end]
            h = torch.baddbmm(h, part, x.mT)
            start = end
        for weight, bias in rest:
            h = ACTIVATIONS[self.activation](h)
            h = torch.baddbmm(bias, weight, h)
        return h.mT.unflatten(0, (S, -1))


def init_mlp(sizes: list[int], activation: str, num_agents: int, generators: Generators) -> MLP:
    """Uniform in +-1/sqrt(in), as torch.nn.Linear."""
    used = sum((n_in + 1) * n_out for n_in, n_out in pairwise(sizes))
    uniform = envs.per_seed(torch.rand, (num_agents, used + -used % 16), generators)
    net = MLP(2 * uniform.flatten(0, 1) - 1, sizes, activation)
    for layer, n_in in zip(net.layers(), sizes):
        for parameter in layer:
            parameter *= n_in**-0.5
    net.flat.requires_grad_()
    return net


def make_features(env: Bimatrix, args: Args) -> Batch:
    """What the policies see of each state [n, X, F]: observations, or which of the distinct ones it is."""
    features = {}
    for name, players in PLAYERS.items():
        seen = env.observations[:, players].transpose(0, 1)  # [n, X, O]
        if args.hidden_size == 0:
            rows = [torch.unique(x, dim=0, return_inverse=True)[1] for x in seen]
            seen = F.one_hot(torch.stack(rows)).to(env.dtype)
        features[name] = seen
    return features


def make_policies(task: Task, name: str, num_settings: int, purpose: str) -> MLP:
    """Policies of the agents or the planner for each seed, the same at the start in all settings."""
    env, args = task.env, task.args
    generators = envs.make_generators(args.seed, args.num_seeds, purpose, env.device)
    players = PLAYERS[name]
    hidden = [args.hidden_size, args.hidden_size] if args.hidden_size > 0 else []
    n_in, n_out = task.features[name].shape[2], env.action_sizes[players[0]]
    net = init_mlp([n_in, *hidden, n_out], args.activation, len(players), generators)
    flat = net.flat.detach().unflatten(0, (args.num_seeds, -1))
    flat = flat.repeat(num_settings, 1, 1).flatten(0, 1)
    return replace(net, flat=flat.requires_grad_())


def make_learner(task: Task, nets: Nets, learning: Iterable[str] = PLAYERS) -> Learner:
    """Adams for the networks that learn, lambdas and baselines of S runs."""
    env, args = task.env, task.args
    optimizers = {}
    for name in learning:
        flat = nets[name].flat
        optimizers[name] = torch.optim.Adam([flat], args.learning_rate, fused=True)
    lambdas = task.settings["lambda_init"][:, None].repeat(1, 2)
    values = lambdas.new_zeros(len(lambdas), 3, env.horizon, env.num_states)
    return Learner(nets, optimizers, lambdas, values)


def log_policy(net: MLP, features: Tensor) -> Tensor:
    """[S, n, X, A] log-probabilities: network (s, n) in each of its states; features [n, X, F]."""
    S = len(net.flat) // len(features)
    logits = net(features.expand(S, -1, -1, -1))
    return F.log_softmax(logits.mT, -2).mT  # along the states in memory, see `MLP`


def joint_policy(task: Task, nets: Nets) -> list[Tensor]:
    """Probabilities [S, X, A] of row, column and planner."""
    probs = []
    for name in PLAYERS:
        logp = log_policy(nets[name], task.features[name]).detach()
        probs += logp.exp().unbind(1)
    return probs


# --------------------------------------------------------------------------------------------------------------------
# Games


def draw_noise(generators: Generators, env: Bimatrix, args: Args) -> Batch:
    """The random numbers of B games of each seed: start [K, B] and action [T, 3, K, B], uniform in [0, 1)."""
    shape = (3 * env.horizon + 1, args.num_envs)
    uniform = envs.per_seed(torch.rand, shape, generators)
    action = uniform[:, 1:].unflatten(1, (env.horizon, 3))
    return {"start": uniform[:, 0], "action": action.permute(1, 2, 0, 3)}


def draw_reward_noise(task: Task, generators: Generators) -> Tensor:
    """Domain randomization: what is added to the agents' rewards [S, 2, X, M * M], 0 for other methods."""
    randomized = task.settings["randomized"][:, None, None, None]
    uniform = envs.per_seed(torch.rand, task.settings["noise"].shape[1:], generators)
    return (2 * uniform - 1).repeat(len(randomized) // len(generators), 1, 1, 1) * randomized


def play(env: Bimatrix, probs: list[Tensor], noise: Batch) -> tuple[Tensor, Tensor]:
    """Games of R runs with policies [R, X, A] of row, column and planner: states [R, B, T + 1], moves [T, 3, R, B].
    The noise of K seeds serves each block of K runs, so that runs differ by their policies alone."""
    R, X = probs[0].shape[:2]
    K, B = noise["start"].shape
    device = probs[0].device
    offset = X * torch.arange(R, device=device)[:, None]
    bounds = []  # of each player: cumulated probabilities, A - 1 of [R * X]
    for p in probs:
        *columns, _ = p.flatten(0, 1).unbind(-1)
        bounds.append(list(itertools.accumulate(columns)))
    up_to = torch.ones(X, X, dtype=env.dtype, device=device).tril()
    starts = up_to @ env.start_probs  # cumsum may vary on GPUs
    uniform = noise["start"].contiguous()
    first = torch.bucketize(uniform, starts[:-1], right=True)
    states = [first.repeat(R // K, 1)]
    moves = []
    for uniform in noise["action"]:
        row = (offset + states[-1]).flatten()
        uniform = uniform.repeat(1, R // K, 1).flatten(1)
        move = []
        for u, thresholds in zip(uniform, bounds):
            count = torch.zeros_like(row)
            for threshold in thresholds:
                count = count + (u >= threshold.index_select(0, row))
            move.append(count.view(R, B))
        first, second, planner = move
        states.append(env.transition[states[-1], first, second, planner])
        moves.append(torch.stack(move))
    return torch.stack(states, -1), torch.stack(moves)


compiled_play = torch.compile(play, fullgraph=True, options={"comprehensive_padding": False})  # at its first call


def rollout(task: Task, probs: list[Tensor], noise: Batch, values: Tensor) -> Batch:
    """Games of R = k S runs, the k-th S of them with the k-th part of `probs`: states [R, B, T], moves [3, R, B, T],
    mean reward per step [R, 3], visits [R, X] (share of the steps that begin in each state), and of each reward the
    return to go per step of a game [R, B, T, 3] and how much it exceeds the baseline `values` [S, 3, T, X]."""
    env, settings = task.env, task.settings
    k = len(probs[0]) // len(values)
    states, moves = (compiled_play if task.args.compile else play)(env, probs, noise)
    before, after = states[..., :-1], states[..., 1:]
    moves = moves.permute(1, 2, 3, 0)
    reward = env.rewards[after]  # [R, B, T, 3]
    planner = reward[..., 2:]
    q = settings["q"].repeat(k)
    agents = reward[..., :2] - q[:, None, None, None] * planner
    mean = torch.cat((agents, planner), -1).mean((1, 2))
    if "noise" in settings:  # domain randomization: [S, 2, X, M * M], 0 for other methods
        entry = before * env.num_moves**2 + moves[0] * env.num_moves + moves[1]
        entry = entry.flatten(1).unsqueeze(1).expand(-1, 2, -1)
        reward_noise = settings["noise"].repeat(k, 1, 1, 1).flatten(2)  # [R, 2, X * M * M]
        agents = agents + reward_noise.gather(2, entry).mT.view_as(agents)
    log_reward = (planner - env.rewards[:, 2].min()).log1p()
    risk = settings["risk"].repeat(k)
    planner = torch.where(risk[:, None, None, None] > 0, log_reward, planner)
    later = mean.new_ones(env.horizon, env.horizon).triu()
    returns = later @ torch.cat((agents, planner), -1) / env.horizon
    cell = torch.arange(env.horizon, device=env.device) * env.num_states + before  # [R, B, T] into [T, X]
    index = cell.flatten(1).unsqueeze(1).expand(-1, 3, -1)
    baseline = values.repeat(k, 1, 1, 1).flatten(2)
    baseline = baseline.gather(2, index)
    visited = before.flatten(1)
    visits = torch.zeros_like(probs[0][..., 0])
    visits = visits.scatter_add(1, visited, torch.ones_like(visited, dtype=env.dtype))
    return {
        "states": before,
        "moves": moves,
        "mean": mean,
        "visits": visits / visits.sum(1, keepdim=True),
        "cell": cell,
        "returns": returns,
        "advantages": returns - baseline.mT.view_as(returns),
    }


def part(batch: Batch, first: int, last: int) -> Batch:
    """The games of some of the runs."""
    chosen = {name: x[first:last] for name, x in batch.items()}
    chosen["moves"] = batch["moves"][:, first:last]
    return chosen


def score_table(env: Bimatrix, batch: Batch, player: int, reward: int) -> Tensor:
    """Policy gradient estimate of d E[reward] / d log pi of `player` [R, X, A]: sums of advantages per game."""
    A = env.action_sizes[player]
    states = batch["states"]
    entry = (states * A + batch["moves"][player]).flatten(1)
    advantages = batch["advantages"][..., reward].flatten(1) / states.shape[1]
    table = advantages.new_zeros(len(states), env.num_states * A)
    return table.scatter_add(1, entry, advantages).unflatten(1, (-1, A))


def follow(values: Tensor, batch: Batch, rate: float) -> Tensor:
    """The baseline V(t, x) [S, 3, T, X], moved towards the mean return to go wherever the games came by."""
    cell = batch["cell"].flatten(1).unsqueeze(1)
    cell = cell.expand(-1, 3, -1)
    zeros = torch.zeros_like(values).flatten(2)
    total = zeros.scatter_add(2, cell, batch["returns"].flatten(1, 2).mT)
    count = zeros.scatter_add(2, cell, torch.ones_like(cell, dtype=values.dtype))
    mean = total / count.clamp_min(1e-9)
    change = mean.view_as(values) - values
    return values + rate * change * (count > 0).view_as(values)


# --------------------------------------------------------------------------------------------------------------------
# ALGO LOGIC: the trust region, ERMAS Eq. (13) and (14); TRPO (Schulman et al. 2015) for P policies at once


def conjugate_gradient(product: Callable, b: Tensor, steps: int) -> Tensor:
    """Solves product(x) = b [P, K], P positive definite systems at once, from x = 0."""
    x = torch.zeros_like(b)
    residual = direction = b
    norm = b.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = product(direction)
        size = norm / (direction * image).sum(1, keepdim=True).clamp_min(1e-20)
        x = x + size * direction
        residual = residual - size * image
        last = norm.clamp_min(1e-20)
        norm = residual.square().sum(1, keepdim=True)
        direction = residual + norm / last * direction
    return x


def mean_kl(anchor: Batch, logp: Tensor) -> Tensor:
    """KL(anchor || policy), log-probabilities [P, X, A], mean over the anchor's visits [P, X]: [P]."""
    reference = anchor["logp"]
    kl = (reference.exp() * (reference - logp)).sum(-1)
    return (anchor["visits"] * kl).sum(-1)


def fisher_product(policy: Callable, flat: Tensor, visits: Tensor, vector: Tensor) -> Tensor:
    """The mean Fisher information matrix of policy(flat) [P, X, A] times vector [P, K]: Hessian of the KL at flat."""
    anchor = {"logp": policy(flat).detach(), "visits": visits}
    slope = torch.func.grad(lambda f: mean_kl(anchor, policy(f)).sum())
    return torch.func.grad(lambda f: (slope(f) * vector).sum())(flat)


@torch.no_grad()
def trust_region_step(policy: Callable, flat: Tensor, batch: Batch, anchor: Batch, rho: float, args: Args) -> Tensor:
    """Natural gradient step from flat [P, K] to where the importance-sampled objective, a sum of the batch's scores
    [P, X, A] times policy / old policy, is largest while the mean KL(anchor || policy) is at most rho. The batch's
    visits [P, X] are the old policy's. Where no length of the step gains anything, flat stays."""
    old = policy(flat)

    def gain(logp: Tensor) -> Tensor:
        ratio = (logp - old).exp()
        return (batch["scores"] * (ratio - 1)).sum((1, 2))

    def fisher(vector: Tensor) -> Tensor:
        return fisher_product(policy, flat, batch["visits"], vector) + args.cg_damping * vector

    gradient = torch.func.grad(lambda f: gain(policy(f)).sum())(flat)
    direction = conjugate_gradient(fisher, gradient, args.cg_steps)
    curvature = (direction * fisher(direction)).sum(1, keepdim=True)
    step = direction * (2 * rho / curvature.clamp_min(1e-20)).sqrt()
    best = flat
    most = torch.zeros_like(batch["visits"][:, 0])
    for halvings in range(-2, 10):  # from four times the length that is right for a quadratic KL
        candidate = flat + 0.5**halvings * step
        logp = policy(candidate)
        value = gain(logp)
        better = (value > most) & (mean_kl(anchor, logp) <= rho)
        best = torch.where(better[:, None], candidate, best)
        most = torch.where(better, value, most)
    return best


# --------------------------------------------------------------------------------------------------------------------
# ALGO LOGIC: Agent-Adv-Search, ERMAS Algorithm 2, and the planner's turn, Algorithm 1


def policy_gradient(net: MLP, features: Tensor, scores: Tensor) -> Tensor:
    """g of Eq. (16) [S*n, K]: gradient of the objective that scores [S*n, X, A] estimate."""
    with torch.enable_grad():
        flat = net.flat.detach().requires_grad_()
        logp = log_policy(replace(net, flat=flat), features).flatten(0, 1)
        return torch.autograd.grad((scores * logp).sum(), flat)[0]


def deviate(task: Task, learner: Learner, batch: Batch, noises: list[Batch]) -> tuple[Batch, list[Batch]]:
    """What each agent could gain alone: M trust-region steps of each while the two others stay. batch: the joint
    policy's games B_0; noises: the numbers of B_1 to B_M, in which both agents' deviations are played beside the joint
    policy, all with the same random numbers.

    Returns the estimate of grad J_i(deviation) [S*2, K] (Eq. 15), the local regrets [S, 2] and the mean KL of the whole
    deviations [S, 2] (Eq. 13, 14); and the joint policy's games B_1 to B_M."""
    env, args, features = task.env, task.args, task.features["agents"]
    agents, S = learner.nets["agents"], len(learner.values)
    row, column, planner = joint_policy(task, learner.nets)

    def policy(flat: Tensor) -> Tensor:
        return log_policy(replace(agents, flat=flat), features).flatten(0, 1)

    def own_games(row_games: Batch, column_games: Batch) -> Batch:
        """Scores [S*2, X, M] and visits [S*2, X] of each agent in its own games."""
        row_scores = score_table(env, row_games, 0, 0)
        column_scores = score_table(env, column_games, 1, 1)
        scores = torch.stack((row_scores, column_scores), 1)
        visits = torch.stack((row_games["visits"], column_games["visits"]), 1)
        return {"scores": scores.flatten(0, 1), "visits": visits.flatten(0, 1)}

    flat = agents.flat.detach()
    own = own_games(batch, batch)
    start = anchor = {"logp": policy(flat), "visits": own["visits"]}
    rho = args.rho / args.inner_steps if args.trust_region == "literal" else args.rho
    path = [policy_gradient(agents, features, own["scores"])]
    joint = []
    gains = []
    for noise in noises:
        flat = trust_region_step(policy, flat, own, anchor, rho, args)
        deviations = policy(flat).exp().unflatten(0, (S, 2))
        rows = torch.cat((deviations[:, 0], row, row))
        columns = torch.cat((column, deviations[:, 1], column))
        probs = [rows, columns, planner.repeat(3, 1, 1)]
        played = rollout(task, probs, noise, learner.values)
        by_row = part(played, 0, S)
        by_column = part(played, S, 2 * S)
        by_none = part(played, 2 * S, 3 * S)
        means = (by_row["mean"][:, 0], by_column["mean"][:, 1])
        gains.append(torch.stack(means, 1) - by_none["mean"][:, :2])
        own = own_games(by_row, by_column)
        if args.trust_region == "literal":
            anchor = {"logp": policy(flat), "visits": own["visits"]}
        moved = replace(agents, flat=flat)
        path.append(policy_gradient(moved, features, own["scores"]))
        joint.append(by_none)
    regrets = torch.stack(gains).amax(0)
    outcome = {
        "gradient": meta_gradient(path, flat - agents.flat.detach(), args),
        "regrets": regrets.clamp_min(0) if args.clamp_regret else regrets,
        "kl": mean_kl(start, policy(flat)).unflatten(0, (S, 2)),
    }
    return outcome, joint


def meta_gradient(path: list[Tensor], shift: Tensor, args: Args) -> Tensor:
    """Estimate of grad J_i(deviation) [S*2, K] (Eq. 15) from the gradients along the deviation and its displacement of
    parameters."""
    M = args.inner_steps
    if args.meta_gradient == "fomaml":
        estimate = path[-1]
        size = 2.0
    else:
        estimate = torch.stack(path[:-1]).mean(0)
        size = 4 * M / max(1, M - 1)
    if args.correction == "displacement":
        length = estimate.norm(dim=1, keepdim=True)
        estimate = shift * length / shift.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if args.meta_rescale:
        estimate = path[0] + size * (estimate - path[0])
    return estimate


def ascend(task: Task, learner: Learner, name: str, batch: Batch, correction: Tensor | float = 0.0) -> Tensor:
    """A step of Adam on the objective that the batch's scores [S, n, X, A] estimate, plus entropy, its gradient less
    `correction` [S*n, K]. Returns the entropy of each policy [S, n], mean over visits [S, X]."""
    net = learner.nets[name]
    optimizer = learner.optimizers[name]
    logp = log_policy(net, task.features[name])
    entropy = -(logp.exp() * logp).sum(-1)  # [S, n, X]
    entropy = (batch["visits"][:, None] * entropy).sum(-1)
    ent_coef = optimizer.param_groups[0]["ent_coef"]
    objective = (batch["scores"] * logp).sum() + ent_coef * entropy.sum()
    (gradient,) = torch.autograd.grad(objective, net.flat)
    net.flat.grad = correction - gradient
    optimizer.step()
    return entropy.detach()


def update(task: Task, learner: Learner, noises: list[Batch], deviating: bool) -> Batch:
    """An update of the agents, one iteration of Algorithm 2, from the random numbers of B_0 to B_M. Agent i ascends on
    -J_r + lambda_i (g_1 - beta grad J_i(deviation)), Eq. (11) with (15); without `deviating` (other methods, warm-up)
    the last term is left out and the joint policy plays all batches. Returns metrics [S]."""
    env, args, settings = task.env, task.args, task.settings
    lambdas = learner.lambdas
    adversarial = settings["adversarial"]
    policies = joint_policy(task, learner.nets)
    batch = rollout(task, policies, noises[0], learner.values)
    weight, correction = lambdas, 0.0
    regrets = excess = kl = torch.zeros_like(lambdas)
    if deviating:
        outcome, joint = deviate(task, learner, batch, noises[1:])
        regrets = outcome["regrets"]
        kl = outcome["kl"]
        excess = settings["learns_lambda"][:, None] * (regrets - settings["epsilon"][:, None])
        weight = (lambdas + args.lambda_damping * excess).clamp(0, args.lambda_max)
        beta = (adversarial * settings["beta"])[:, None] * weight
        correction = beta.flatten()[:, None] * outcome["gradient"]
    else:
        joint = [rollout(task, policies, noise, learner.values) for noise in noises[1:]]
    joint = [batch, *joint]
    tables = []  # of agent i and reward r, [S, X, A]
    for i, r in itertools.product(range(2), range(3)):
        scores = torch.stack([score_table(env, games, i, r) for games in joint])
        tables.append(scores.mean(0))
    own = torch.eye(2, device=env.device)
    counts = own.maximum(settings["cross_terms"][:, None, None])  # [S, 2, 2], reward j for agent i
    hurting = -adversarial[:, None, None].expand(-1, 2, 1)
    weights = torch.cat((counts * weight[:, None], hurting), 2)  # [S, 2, 3]
    scores = torch.stack(tables, 1).unflatten(1, (2, 3))
    scores = (weights[..., None, None] * scores).sum(2)  # [S, 2, X, A]
    visits = torch.stack([games["visits"] for games in joint]).mean(0)
    entropy = ascend(task, learner, "agents", {"scores": scores, "visits": visits}, correction)
    for games in joint:
        learner.values = follow(learner.values, games, args.value_rate)
    learner.lambdas = (lambdas + args.lambda_lr * excess).clamp(0, args.lambda_max)  # ALGO LOGIC: Eq. (12)
    mean = torch.stack([games["mean"] for games in joint]).mean(0)
    metrics = {f"charts/{name}_reward": mean[:, k] for k, name in enumerate(env.agents)}
    return metrics | {
        "charts/episodic_return": env.horizon * mean[:, 2],
        "ermas/lambda_row": lambdas[:, 0],
        "ermas/lambda_column": lambdas[:, 1],
        "ermas/local_regret_row": regrets[:, 0],
        "ermas/local_regret_column": regrets[:, 1],
        "ermas/deviation_kl": kl.amax(1),
        "losses/entropy": entropy.mean(1),
    }


def plan(task: Task, learner: Learner, noise: Batch) -> None:
    """The planner's policy gradient step on the agents that the search found; it takes their policies as given."""
    batch = rollout(task, joint_policy(task, learner.nets), noise, learner.values)
    scores = score_table(task.env, batch, 2, 2).unsqueeze(1)
    ascend(task, learner, "planner", batch | {"scores": scores})


def anneal(optimizers: dict[str, torch.optim.Optimizer], progress: float, args: Args) -> None:
    """Step sizes and the weight of the entropy fall linearly to 0."""
    sizes = {"agents": args.learning_rate, "planner": args.planner_learning_rate}
    for name, optimizer in optimizers.items():
        (group,) = optimizer.param_groups
        group["lr"] = sizes[name] * (1 - progress)
        group["ent_coef"] = args.ent_coef * (1 - progress)


# --------------------------------------------------------------------------------------------------------------------
# Evaluation: exact values, and new agents against the frozen planner in test games


def evaluate(task: Task, nets: Nets) -> Batch:
    """The exact value of the present policies for each player, and both agents' exact regret, per step [S]."""
    policies, q = joint_policy(task, nets), task.settings["q"]
    value = bimatrix.exact_value(task.env, policies, q=q)
    regret = bimatrix.regret(task.env, policies, q=q)
    metrics = {f"eval/{name}_reward": value[:, k] for k, name in enumerate(task.env.agents)}
    return metrics | {
        "eval/agent_reward": value[:, :2].mean(1),
        "ermas/exact_regret_row": regret[:, 0],
        "ermas/exact_regret_column": regret[:, 1],
    }


def play_tests(task: Task, planner: MLP) -> Batch:
    """New agents learn from scratch, each for itself, in the games with Q of args.eval_q against the frozen planners of
    S runs: the exact reward of the planner then, and the most that an agent could still gain, per step [S, Q]."""
    env, args = task.env, task.args
    S = len(planner.flat)
    Q = len(args.eval_q)
    q = torch.tensor(args.eval_q, dtype=env.dtype, device=env.device)
    q = q.repeat_interleave(S)  # runs are [Q, S]
    zero = torch.zeros_like(q)
    settings = {
        "q": q,
        "lambda_init": zero + 1,
        "adversarial": zero,
        "cross_terms": zero,
        "risk": zero,
    }
    task = replace(task, settings=settings)
    nets = {
        "planner": replace(planner, flat=planner.flat.detach().repeat(Q, 1)),
        "agents": make_policies(task, "agents", Q * S // args.num_seeds, "test"),
    }
    learner = make_learner(task, nets, ["agents"])
    generators = envs.make_generators(args.seed, args.num_seeds, "test games", env.device)
    for iteration in tqdm(range(args.eval_iterations), desc="test games", disable=None, leave=False):
        anneal(learner.optimizers, iteration / args.eval_iterations, args)
        update(task, learner, [draw_noise(generators, env, args)], deviating=False)
    policies = joint_policy(task, nets)
    reward = bimatrix.exact_value(env, policies, q=q)[:, 2]
    regret = bimatrix.regret(env, policies, q=q)[:, :2].amax(1)
    return {
        "planner_reward": reward.view(Q, S).T,
        "agent_regret": regret.view(Q, S).T,
    }


# --------------------------------------------------------------------------------------------------------------------
# Environment


def make_env(args: Args, num_envs: int, device: torch.device) -> Bimatrix:
    """The game that the flags describe, at Q = 0: each run's own Q is in its settings."""
    fields = {"horizon": args.horizon, "num_moves": args.num_moves}
    if args.payoffs:
        fields["payoffs"] = bimatrix.load_payoffs(args.payoffs)
    if args.env_id == "augmented_bimatrix_v0":
        for name in ("max_incentive", "payoff_scale", "planner_observes"):
            fields[name] = getattr(args, name)
    return envs.make(args.env_id, num_envs, device, **fields)


def make_task(env: Bimatrix, args: Args) -> Task:
    """The game, and what differs between the S runs, [S] each."""
    labels = args.labels
    is_ermas = [label["method"] == "ermas" for label in labels]
    columns = {
        "q": [label["q_train"] for label in labels],
        "epsilon": [label["epsilon"] for label in labels],
        "beta": [label["beta"] for label in labels],
        "lambda_init": [label["lambda_init"] if ermas else 1.0 for label, ermas in zip(labels, is_ermas)],
        "adversarial": is_ermas,
        "cross_terms": [ermas and args.cross_terms for ermas in is_ermas],
        "learns_lambda": [ermas and not args.fixed_lambda for ermas in is_ermas],
        "randomized": [label["method"] == "domain-randomization" for label in labels],
        "risk": [label["method"] == "risk" for label in labels],
    }
    settings = {name: torch.tensor(x, dtype=env.dtype, device=env.device) for name, x in columns.items()}
    if "domain-randomization" in args.method:
        settings["noise"] = settings["q"].new_zeros(len(labels), 2, env.num_states, env.num_moves**2)
    return Task(env, args, settings, make_features(env, args))


# --------------------------------------------------------------------------------------------------------------------
# Training


def environment_steps(iterations: int, args: Args) -> int:
    """Environment steps of a run after so many iterations."""
    after_warmup = max(0, iterations - args.warmup_steps)
    batches = iterations * (1 + args.inner_steps)
    if "ermas" in args.method:
        batches += after_warmup * 2 * args.inner_steps
    games = args.search_steps * batches
    if args.env_id == "augmented_bimatrix_v0":
        games += after_warmup  # the planner's
    return games * args.num_envs * args.horizon


def train(task: Task, learner: Learner, run: runs.Run, checkpoint: dict) -> None:
    """Train from the start or from a checkpoint; a signal ends it, after a checkpoint, with KeyboardInterrupt."""
    env, args, settings = task.env, task.args, task.settings
    streams = {}
    for purpose in ("games", "randomization"):
        streams[purpose] = envs.make_generators(args.seed, args.num_seeds, purpose, env.device)
    iteration = 0
    window = defaultdict(list)  # metrics [S] since the last row of metrics.csv
    if checkpoint:
        with runs.exits(2, ValueError):
            live = {"optimizers": learner.optimizers, "streams": streams, "iteration": 0, "window": {}}
            tensors = {"settings": settings, "lambdas": learner.lambdas, "values": learner.values}
            runs.restore(live | tensors, checkpoint)
        iteration = checkpoint["iteration"]
        window.update(runs.moved(checkpoint["window"], env.device))

    started, first_step = time.perf_counter(), environment_steps(iteration, args)
    bar = runs.progress_bar(args.num_iterations, iteration, unit="iteration")
    with runs.stop_signals() as caught:
        while iteration < args.num_iterations and not caught:
            anneal(learner.optimizers, iteration / args.num_iterations, args)
            is_warm = iteration < args.warmup_steps
            for k in range(args.search_steps):
                if "noise" in settings and (iteration * args.search_steps + k) % args.randomize_interval == 0:
                    settings["noise"] = draw_reward_noise(task, streams["randomization"])
                noises = [draw_noise(streams["games"], env, args) for _ in range(1 + args.inner_steps)]
                deviating = "ermas" in args.method and not is_warm
                metrics = update(task, learner, noises, deviating)
            if env.max_incentive is not None and not is_warm:
                plan(task, learner, draw_noise(streams["games"], env, args))
            for name, value in metrics.items():
                window[name].append(value)
            iteration += 1
            bar.update()

            done = iteration >= args.num_iterations
            if done or iteration % args.log_interval == 0:
                metrics = evaluate(task, learner.nets)
                for name, values in window.items():
                    metrics[name] = torch.stack(values, 1).mean(1)
                step = environment_steps(iteration, args)
                speed = len(run.labels) * (step - first_step) / (time.perf_counter() - started)
                metrics["charts/SPS"] = torch.full((len(run.labels),), speed)
                log(run, step, metrics)
                mean_reward = metrics["eval/planner_reward"].mean()
                runs.show_progress(bar, planner_reward=f"{mean_reward:.3f}")
                window = defaultdict(list)
                started, first_step = time.perf_counter(), step
            if done or caught or iteration % args.checkpoint_interval == 0:
                state = {
                    "args": asdict(args),
                    "nets": {name: net.flat for name, net in learner.nets.items()},
                    "optimizers": learner.optimizers,
                    "settings": settings,
                    "lambdas": learner.lambdas,
                    "values": learner.values,
                    "streams": streams,
                    "iteration": iteration,
                    "window": window,
                    "rows": run.rows,
                }
                runs.save(run.dir / "checkpoint.pt", state)
    bar.close()
    if caught:
        raise KeyboardInterrupt(f"at iteration {iteration}")


def main() -> None:
    with runs.exits(2, ValueError, ImportError, OSError):
        args, checkpoint = runs.parse_args(Args, __doc__)
        device = setup(args)
        env = make_env(args, 1, device)
        runs.check_memory(env, args)
        task = make_task(env, args)
        num_settings = len(args.labels) // args.num_seeds
        nets = {name: make_policies(task, name, num_settings, name) for name in PLAYERS}
        weights = {name: net.flat for name, net in nets.items()}
        if checkpoint:
            runs.restore({"nets": weights}, checkpoint)
        rows = checkpoint.get("rows", [])
        run = runs.Run(make_run_dir(args, __file__), args.labels, rows)
    if not args.evaluate:
        with runs.training(run.dir):
            runs.start_wandb(run, args)
            train(task, make_learner(task, nets), run, checkpoint)
            last_rows = run.rows[-len(run.labels) :]
            state = {"args": asdict(args), "nets": weights, "rows": last_rows}
            runs.save(run.dir / "policy.pt", state)
    with runs.reporting(run):
        bimatrix.report(run, args.eval_q, play_tests(task, nets["planner"]))
        if args.capture_video:
            streams = envs.make_generators(args.seed, 1, "video", device)
            bimatrix.write_gif(env, run.dir / "episode.gif", joint_policy(task, nets), streams[0])
    print(f"results: {run.dir}")


if __name__ == "__main__":
    main()
