"""Mean-field ERNIE: mean-field MADDPG made robust by an adversary that moves the distribution of the agents.

Mean-field MADDPG (Li et al. 2021, arXiv 2105.08268, in its setting; Lowe et al. 2017) has one actor and one critic for
all agents. Each sees an agent's own state (velocity, place, its nearest landmarks and neighbours), the empirical
distribution d_s of all agents, and of the landmarks, through a permutation-invariant mean embedding, and, the critic,
the agent's action and the mean action of the others: networks cost the same for each agent, however many there are, and
serve any number. ERNIE (Bukharin et al. 2023, arXiv 2310.10810, section 5.4 and appendix B) adds the largest squared
change of Q when d_s is moved within a Wasserstein distance, found by K steps of gradient ascent on the agents' places,
through which the gradient of the leader flows (Eq. 6). The distance is optimal transport, solved by IPOT (Xie et al.
2020, arXiv 1802.04307).

    python ernie_meanfield.py --num-agents 15 --epsilon 0.1           # fifteen agents cover fifteen landmarks
    python ernie_meanfield.py --num-agents 6 --num-seeds 5            # five independent runs side by side
    python ernie_meanfield.py --transport budget --regularize critic  # W <= epsilon as section 5.4 has it

Usage, metrics and results: docs/ernie_meanfield.md.
Differences to the paper (docs/paper_to_code.md): 7 projection after every step, 8 random start, 24 W1 with
Euclidean ground cost, 25 the leader does not see the transport term, 26 Q at the policy's action, 27 settings of IPOT,
29 discounted targets, 33 Adam, 39 Gaussian noise of mean length epsilon.

Axes: S seeds, N agents, L landmarks, M samples of a minibatch (B environments in a rollout), T steps of an episode, A
action, H embedding; n is 1 where all agents see the same crowd, else N. All agents share the networks and what an agent
knows is its crowd, so samples come before agents here, [S, M, N, ...]; policies turn observations at the border.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below prints no traceback

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

import envs
from envs import Env, perturb, robustness, runs
from envs.runs import Name, Share, Switch, Threads, arguments, log, make_run_dir, setup

Batch = dict[str, Tensor]  # samples and random numbers of an update, or metrics [S]
Generators = list[torch.Generator]  # one per seed
Nets = dict[str, "MLP"]  # each role of ROLES in PARTS: actor_head, ..., critic_target_landmarks
AtLeastTwo = Annotated[int, Field(ge=2)]
PARTS = ("head", "crowd", "landmarks")


@arguments
class Experiment:
    exp_name: Name = Path(__file__).stem  # name of this experiment
    seed: NonNegativeInt = 1  # seed of the first run; run k uses seed + k
    num_seeds: PositiveInt = 1  # S, independent runs trained side by side (paper: five)
    torch_deterministic: bool = True  # deterministic algorithms only: same seed, same machine, same numbers
    cuda: bool = True  # use the GPU if there is one
    num_threads: Threads = 1  # CPU threads; with more set OMP_WAIT_POLICY=PASSIVE, or one busy core stalls all
    compile: bool = False  # torch.compile the environment step and, on a GPU, the losses
    compile_transport: Switch = None  # torch.compile IPOT; default: where there is a C++ compiler
    cuda_graphs: bool = False
    """on a GPU: updates and rollouts as CUDA graphs, without deterministic algorithms; not measured; CPUs ignore it"""
    runs_dir: str = "runs"  # folder that receives a folder per run
    resume: str | None = None  # run folder to continue; other flags are read from it
    evaluate: str | None = None  # run folder or policy file whose policies are evaluated again, without training
    capture_video: bool = False  # write a GIF of an episode of the trained policy
    log_interval: PositiveInt = 10_000  # environment steps between two rows of metrics.csv
    checkpoint_interval: PositiveInt = 50_000  # environment steps between two checkpoints
    eval_episodes: NonNegativeInt | None = None
    """of one seed at each point of the report; 0: no report; default: 3,000 / N"""
    eval_agents: Annotated[tuple[AtLeastTwo, ...], Field(min_length=1)] = (
        3,
        6,
        15,
        30,
    )  # N of the report's other crowds
    eval_norm: Literal["l2", "linf"] = "l2"  # norm of the ball of the report's worst-case observations
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline needs no account; `wandb sync` later
    wandb_project_name: str = "robust-marl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team


@arguments
class MeanField:
    env_id: Literal["simple_spread_v3"] = "simple_spread_v3"  # cooperative navigation, the paper's task
    num_agents: AtLeastTwo = 6  # N (paper: 3, 6, 15, 30)
    total_timesteps: PositiveInt = 250_000  # environment steps of one seed (paper: 10,000 episodes of 25)
    num_envs: PositiveInt = 40  # B, environments of one seed that step together
    steps_per_update: PositiveInt = 50  # environment steps of one seed per update
    learning_starts: NonNegativeInt = 5_000  # environment steps before the first update
    buffer_size: PositiveInt = 100_000  # replay capacity of one seed in environment steps (paper: 100, of what unit?)
    batch_size: PositiveInt = 256  # M, transitions of all agents per minibatch (paper: 32 or 100)
    learning_rate: PositiveFloat = 3e-3  # Adam step size of actor and critic
    learning_rate_end: PositiveFloat = 3e-4  # the same at the end, linear in between
    gamma: Share = 0.9  # discount factor
    reward_scale: PositiveFloat | None = None  # factor on learnt rewards; default: 1 / N, as they sum over landmarks
    tau: Share = 0.03  # share by which the targets move at each update
    nearest_landmarks: NonNegativeInt = 3  # landmarks that an agent's own state has, the nearest first
    nearest_agents: NonNegativeInt = 2  # other agents that it has, the nearest first
    hidden_size: PositiveInt = 64  # width of hidden layers and embeddings (paper: 64; 32 to 256 in Figure 4d)
    activation: Literal["relu", "silu", "tanh"] = "relu"  # hidden activation
    exploration_noise: NonNegativeFloat = 0.8  # first standard deviation, in half-widths of the action range
    exploration_noise_end: NonNegativeFloat = 0.2  # the same at the end, linear in between
    policy_l2: NonNegativeFloat = 1e-3  # weight of the mean squared actor output in the actor loss
    max_grad_norm: PositiveFloat = 0.5  # the gradient of each network of each seed is clipped to this norm


@arguments
class ERNIE:
    regularizer: Literal["none", "gaussian", "random", "adversarial", "stackelberg"] = "stackelberg"
    """none: mean-field MADDPG; gaussian: appendix H; random: a direction of length epsilon; adversarial: the worst d_s,
    a constant to the leader; stackelberg: Eq. 6"""
    regularize: Literal["critic", "actor", "both"] = "both"  # whose output must not change: Q (paper), actor's, both
    transport: Literal["budget", "penalty"] = "budget"
    """budget: W is at most epsilon (section 5.4); penalty: the adversary pays for W (appendix B)"""
    epsilon: NonNegativeFloat = 0.1  # the limit of W; penalty: the W at which lambda_W = 1 lets it end
    transport_coef: NonNegativeFloat = 1.0  # lambda_W, in units of the price at which W ends near epsilon
    transport_steps: PositiveInt = 100  # iterations of IPOT; 500 where many plans are nearly as good (points on a line)
    transport_beta: PositiveFloat = 0.1  # proximal step of IPOT, in units of the mean cost
    attack_steps: NonNegativeInt = 3  # K, ascent steps; 0 is the baseline
    attack_lr: PositiveFloat | None = None  # eta, rms length of a step / epsilon; default: 1 if K = 1, else 2.5 / K
    reg_coef: NonNegativeFloat = 0.1  # lambda, weight of the regulariser
    reg_batch_size: PositiveInt = 32  # samples of the minibatch on which the regulariser is estimated
    mean_action_epsilon: NonNegativeFloat = 0.0  # radius of a change of the others' mean action in Q too; 0 is off


@arguments
class Args(ERNIE, MeanField, Experiment):
    def __post_init__(self):
        if self.attack_lr is None:
            self.attack_lr = 1.0 if self.attack_steps <= 1 else 2.5 / self.attack_steps
        if self.reward_scale is None:
            self.reward_scale = 1 / self.num_agents
        if self.eval_episodes is None:
            self.eval_episodes = max(1, 3000 // self.num_agents)
        fewest = min(self.num_agents, *self.eval_agents)
        if self.nearest_landmarks > fewest:
            raise ValueError(f"nearest_landmarks must be at most {fewest}, the fewest, got {self.nearest_landmarks}")
        if self.nearest_agents >= fewest:
            raise ValueError(f"nearest_agents must be below {fewest}, the fewest agents, got {self.nearest_agents}")
        if self.learning_starts + self.steps_per_update > self.total_timesteps:
            raise ValueError(f"learning_starts must leave steps for an update, got {self.learning_starts}")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def regularized(self) -> bool:
        """With K, epsilon or lambda at 0 this is mean-field MADDPG, at its speed."""
        idle = self.regularizer in ("adversarial", "stackelberg") and self.attack_steps == 0
        return self.regularizer != "none" and self.reg_coef * self.epsilon > 0 and not idle


# --------------------------------------------------------------------------------------------------------------------
# Networks

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


def make_nets(env: Env, args: Args) -> tuple[Nets, dict[str, torch.optim.Optimizer]]:
    """Actor, critic and their targets, each a head and two encoders; an Adam for the actor and one for the critic."""
    generators = envs.make_generators(args.seed, args.num_seeds, "init", env.device)
    A = env.action_mask.shape[1]
    H = args.hidden_size
    own = 4 + 2 * (args.nearest_landmarks + args.nearest_agents)
    heads = {
        "actor": [own + 2 * H, H, H, A],
        "critic": [own + 2 * A + 2 * H, H, H, 1],
    }
    nets, optimizers = {}, {}
    for role in heads:
        for part in PARTS:
            sizes = heads[role] if part == "head" else [2, H, H]
            net = init_mlp(sizes, args.activation, 1, generators)
            nets[f"{role}_{part}"] = net
            nets[f"{role}_target_{part}"] = replace(net, flat=net.flat.detach().clone())
        parameters = [nets[f"{role}_{part}"].flat for part in PARTS]
        optimizers[role] = torch.optim.Adam(parameters, args.learning_rate, fused=True)
    return nets, optimizers


def embed(net: MLP, points: Tensor) -> Tensor:
    """Mean embedding [S, M, n, H] of sets of points [S, M, n, P, 2]: their order does not matter, nor their number. The
    mean is taken before the last layer, which is linear: that layer then sees sets, not points."""
    (weight, bias), (last_weight, last_bias) = net.layers()
    x = points.flatten(1, 3).mT.contiguous()
    h = ACTIVATIONS[net.activation](torch.baddbmm(bias, weight, x))  # [S, H, M n P]
    h = h.unflatten(2, points.shape[1:4]).mean(-1)
    h = torch.baddbmm(last_bias, last_weight, h.flatten(2))
    return h.mT.contiguous().unflatten(1, points.shape[1:3])


def respond(nets: Nets, who: str, own: Tensor, crowd: Tensor, landmarks: Tensor) -> Tensor:
    """Output [S, M, N, out] of `who`, actor, critic or a target, for each agent: own [S, M, N, k] is what is its own,
    crowd [S, M, n, N, 2] the places of all agents, landmarks [S, M, n, L, 2]. What the agents share passes the first
    layer once."""
    embedded = embed(nets[f"{who}_crowd"], crowd), embed(nets[f"{who}_landmarks"], landmarks)
    shared = torch.cat(embedded, -1)  # [S, M, n, 2 H]
    head = nets[f"{who}_head"]
    (weight, bias), *rest = head.layers()
    k = own.shape[-1]
    own_weight, shared_weight = weight[:, :, :k], weight[:, :, k:]
    from_own = torch.baddbmm(bias, own_weight, own.flatten(1, 2).mT)
    from_shared = torch.bmm(shared_weight, shared.flatten(1, 2).mT)
    from_own = from_own.unflatten(2, own.shape[1:3])
    from_shared = from_shared.unflatten(2, shared.shape[1:3])
    h = from_own + from_shared  # [S, H, M, N]
    h = h.flatten(2)
    for weight, bias in rest:
        h = ACTIVATIONS[head.activation](h)
        h = torch.baddbmm(bias, weight, h)
    return h.mT.unflatten(1, own.shape[1:3])


def policy(nets: Nets, who: str, own: Tensor, crowd: Tensor, landmarks: Tensor, env: Env) -> Tensor:
    """Deterministic actions [S, M, N, A]."""
    return squash(respond(nets, who, own, crowd, landmarks), env)


def squash(output: Tensor, env: Env) -> Tensor:
    """tanh scaled to the action range."""
    span = env.action_high - env.action_low
    return env.action_low + span * (torch.tanh(output) + 1) / 2


def perceive(body: Tensor, crowd: Tensor, landmarks: Tensor, args: Args) -> Tensor:
    """Own states [S, M, N, 4 + 2 k]: velocities and places `body` [S, M, N, 4], then where, seen from the agent, the
    nearest of landmarks [S, M, n, L, 2] and of the other agents in crowd [S, M, n, N, 2] are, the nearest first."""
    parts = [body]
    kinds = ((landmarks, 0, args.nearest_landmarks), (crowd, 1, args.nearest_agents))
    for points, itself, count in kinds:
        away = points - body[..., None, 2:4]  # [S, M, N, P, 2]
        distance = away.square().sum(-1)
        nearest = distance.topk(itself + count, largest=False).indices
        nearest = nearest[..., itself:, None]
        parts.append(away.take_along_dim(nearest, -2).flatten(-2))
    return torch.cat(parts, -1)


def crowd_of(own: Tensor) -> Tensor:
    """Places of all agents as every one of them sees these, [S, M, 1, N, 2]."""
    return own[..., None, :, 2:4]


def others_mean(action: Tensor) -> Tensor:
    """Mean action of the other agents [S, M, N, A]."""
    others = action.sum(-2, keepdim=True) - action
    return others / (action.shape[-2] - 1)


def q_values(nets: Nets, who: str, batch: Batch, crowd: Tensor, action: Tensor, mean_action: Tensor) -> Tensor:
    """Q(s_n, d_s, a_n, mean action of the others) [S, M, N]; own states and landmarks are those of `batch`."""
    own = torch.cat([batch["own"], action, mean_action], -1)
    return respond(nets, who, own, crowd, batch["landmarks"]).squeeze(-1)


# --------------------------------------------------------------------------------------------------------------------
# Optimal transport


def distances(moved: Tensor, crowd: Tensor) -> Tensor:
    """[..., N, N] from each point of one crowd to each of the other, [..., N, 2]. Its derivative at 0 is 0."""
    away = moved.unsqueeze(-2) - crowd.unsqueeze(-3)
    return away.square().sum(-1).clamp_min(1e-12).sqrt()


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


compiled_steps = torch.compile(proximal_steps, fullgraph=True, options={"comprehensive_padding": False})


@torch.library.custom_op("ernie::proximal_points", mutates_args=())
def proximal_points(kernel: Tensor, steps: int, compiled: bool) -> Tensor:
    """Logarithm of the plan after `steps` iterations. An operator, so that torch.compile meets one call where it would
    unroll hundreds, and so that ten iterations at a time can be compiled inside torch.func.grad."""
    plan = torch.zeros_like(kernel)
    right = torch.zeros_like(kernel[..., :1, :])
    for done in range(0, steps, 10):
        take_steps = compiled_steps if compiled and steps - done >= 10 else proximal_steps
        plan, right = take_steps(plan, right, kernel, min(10, steps - done))
    return plan


@proximal_points.register_fake
def _(kernel: Tensor, steps: int, compiled: bool) -> Tensor:
    return torch.empty_like(kernel)


@torch.no_grad()
def transport_plan(cost: Tensor, args: Args) -> Tensor:
    """Plan [..., N, N] that carries equal masses at least cost [..., N, N], by inexact proximal points (IPOT) in
    logarithms. There is a best plan that carries nothing in parts: if the largest entries of IPOT's make one it is
    taken, or that of staying where it costs less, which is best before anybody has moved far."""
    N = cost.shape[-1]
    scale = args.transport_beta * cost.mean((-1, -2), keepdim=True).clamp_min(1e-12)
    plan = proximal_points(-cost / scale, args.transport_steps, bool(args.compile_transport))
    stay = torch.eye(N, dtype=cost.dtype, device=cost.device) / N
    whole = stay[plan.argmax(-1)]
    is_plan = (whole.sum(-2) * N == 1).all(-1)
    plan = torch.where(is_plan[..., None, None], whole, plan.exp())
    cost_of_stay = (stay * cost).sum((-1, -2))
    is_better = cost_of_stay <= (plan * cost).sum((-1, -2))
    return torch.where(is_better[..., None, None], stay, plan)


def wasserstein(moved: Tensor, crowd: Tensor, args: Args) -> Tensor:
    """W1 [...] between crowds [..., N, 2] of equal masses. The plan is a constant to the gradient, as the envelope
    theorem has it."""
    cost = distances(moved, crowd)
    plan = transport_plan(cost.detach(), args)
    return (cost * plan).sum((-1, -2))


def mean_move(delta: Tensor) -> Tensor:
    """How far delta [..., 2 N] moves an agent on average, [..., 1]."""
    move = delta.unflatten(-1, (-1, 2))
    return move.square().sum(-1).sqrt().mean(-1, keepdim=True)


def within_budget(delta: Tensor, crowd: Tensor, args: Args) -> Tensor:
    """`delta` [..., 2 N] shortened until W(crowd + delta, crowd) <= epsilon. W is at most the mean length of the moves,
    so their share epsilon of it is allowed; along a ray W mostly grows ever more slowly, as agents come to swap places,
    so that this share of epsilon / W is allowed too, and again: close to epsilon after four times, never above it."""
    epsilon = args.epsilon
    move = delta.unflatten(-1, (-1, 2))
    with torch.no_grad():
        share = most = (epsilon / mean_move(delta).clamp_min(epsilon)).unsqueeze(-1)
        for _ in range(4):
            distance = wasserstein(crowd + share * move, crowd, args)[..., None, None]
            most = torch.where(distance <= epsilon, share, most)
            share = (share * epsilon / distance.clamp_min(1e-12)).clamp(max=1)
    # where the ray meets the budget its share is a function of delta: W(share delta) = epsilon
    cost = distances(crowd + most * move, crowd)
    plan = transport_plan(cost, args)
    gap = (cost * plan).sum((-1, -2), keepdim=True)
    with torch.no_grad():
        away = (crowd + most * move).unsqueeze(-2) - crowd.unsqueeze(-3)
        toward = away / cost.unsqueeze(-1)
        speed = (toward * move.unsqueeze(-2)).sum(-1)
        slope = (plan * speed).sum((-1, -2), keepdim=True)
    share = most - (gap - gap.detach()) / slope.clamp_min(1e-8)
    share = torch.where(most < 1, share, most)
    return (share * move).flatten(-2)


# --------------------------------------------------------------------------------------------------------------------
# ALGO LOGIC: the distributionally robust regulariser, ERNIE section 5.4 and appendix B


def unroll(objective: Callable, delta: Tensor, steps: int, size: float, ball: Callable, stackelberg: bool) -> Tensor:
    """delta^K of Eq. (6): ascent steps of l2 length `size` on objective(delta), a value per sample, each projected.
    With `stackelberg` the result is a function of all that `objective` depends on; without, it is a constant (Eq. 4).
    torch.func.grad, because autograd.grad(create_graph=True) silently loses the interaction inside torch.compile;
    contiguous, because on CPUs torch.compile (2.13) gets the gradient of a norm over an axis that is strided wrong."""
    with torch.set_grad_enabled(stackelberg):
        for _ in range(steps):
            slope = torch.func.grad(lambda d: objective(d).sum())(delta).contiguous()
            length = perturb.length(slope, "l2").clamp_min(1e-8)
            delta = ball(delta + size * slope / length)
    return delta


def regularizer(change: Callable, crowd: Tensor, noise: Tensor, args: Args) -> tuple[Tensor, Tensor]:
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
        price = 2 * args.transport_coef / args.epsilon  # gain is as W^2: at W = epsilon what a step gains it costs
        return gain.clamp_min(1e-30).log() - price * wasserstein(moved(delta), crowd, args)

    def ball(delta: Tensor) -> Tensor:
        return within_budget(delta, crowd, args) if args.transport == "budget" else delta

    if args.regularizer == "gaussian":  # appendix H; a normal vector in the plane has a mean length of sqrt(pi / 2)
        delta = noise * args.epsilon / math.sqrt(math.pi / 2)
    elif args.regularizer == "random":
        delta = noise * args.epsilon / mean_move(noise)
    else:
        start = perturb.rescale(noise, 0.5 * length, "l2")  # W has no gradient at 0
        is_stackelberg = args.regularizer == "stackelberg"
        delta = unroll(objective, start, args.attack_steps, args.attack_lr * length, ball, is_stackelberg)
    return change(moved(delta)), delta


def change_of_q(nets: Nets, batch: Batch, action: Tensor) -> Callable:
    """crowd [S, M, N, 2] -> mean over agents of (Q(d_s') - Q(d_s))^2 [S, M]."""
    mean_action = others_mean(action)
    clean = q_values(nets, "critic", batch, crowd_of(batch["own"]), action, mean_action)

    def change(crowd: Tensor) -> Tensor:
        q = q_values(nets, "critic", batch, crowd.unsqueeze(2), action, mean_action)
        return (q - clean).square().mean(-1)

    return change


def change_of_actor(nets: Nets, batch: Batch) -> Callable:
    """crowd [S, M, N, 2] -> mean over agents of the squared change of the actor's output before tanh [S, M]."""
    own, landmarks = batch["own"], batch["landmarks"]
    clean = respond(nets, "actor", own, crowd_of(own), landmarks)

    def change(crowd: Tensor) -> Tensor:
        output = respond(nets, "actor", own, crowd.unsqueeze(2), landmarks)
        return (output - clean).square().sum(-1).mean(-1)

    return change


def mean_action_regularizer(nets: Nets, batch: Batch, args: Args) -> Tensor:
    """Mean over agents of (Q(mean action + delta) - Q(mean action))^2 [S, M], for the worst delta of length
    `mean_action_epsilon` of each agent; the paper names this regulariser in section 5.4."""
    epsilon = args.mean_action_epsilon
    action = batch["actions"]
    mean_action = others_mean(action)
    q = partial(q_values, nets, "critic", batch, crowd_of(batch["own"]), action)
    clean = q(mean_action)

    def change(delta: Tensor) -> Tensor:
        return (q(mean_action + delta) - clean).square()

    start = perturb.rescale(batch["mean_action_noise"], 0.5 * epsilon, "l2")
    ball = partial(perturb.project, epsilon=epsilon, norm="l2")
    steps = max(1, args.attack_steps)
    size = args.attack_lr * epsilon
    delta = unroll(change, start, steps, size, ball, args.regularizer == "stackelberg")
    return change(delta).mean(-1)


def diagnose(nets: Nets, batch: Batch, env: Env, args: Args) -> Batch:
    """Of each regularised network: R_W under attack and in a random direction, W, and the leader-follower term of the
    Stackelberg gradient with respect to its head: its norm relative to the leader's, and their cosine. [S] each."""
    batch = regularized_part(batch, args)
    own = batch["own"]
    landmarks = batch["landmarks"]
    crowd = crowd_of(own).squeeze(2)
    action = policy(nets, "actor", own, crowd_of(own), landmarks, env).detach()
    changes = {"critic": change_of_q(nets, batch, action), "actor": change_of_actor(nets, batch)}
    metrics = {}
    for role in ("critic", "actor"):
        if args.regularize not in (role, "both"):
            continue
        values, gradients = {}, {}
        for mode in ("random", "adversarial", "stackelberg"):
            mode_args = replace(args, regularizer=mode)
            change, delta = regularizer(changes[role], crowd, batch["crowd_noise"], mode_args)
            values[mode] = change.mean(1)
            head = nets[f"{role}_head"].flat
            (gradient,) = torch.autograd.grad(values[mode].sum(), head, retain_graph=True)
            gradients[mode] = gradient
        leader = gradients["adversarial"]
        follower = gradients["stackelberg"] - leader
        moved = crowd + delta.detach().unflatten(-1, (-1, 2))
        metrics |= {
            f"ernie/{role}_attack": values["stackelberg"].detach(),
            f"ernie/{role}_random_direction": values["random"].detach(),
            f"ernie/{role}_wasserstein": wasserstein(moved, crowd, args).mean(1),
            f"ernie/{role}_interaction_ratio": follower.norm(dim=1) / leader.norm(dim=1).clamp_min(1e-12),
            f"ernie/{role}_interaction_cosine": F.cosine_similarity(follower, leader, dim=1),
        }
    return metrics


# --------------------------------------------------------------------------------------------------------------------
# Losses and update


def regularized_part(batch: Batch, args: Args) -> Batch:
    """The first samples of a minibatch, those of the regulariser."""
    M = args.reg_batch_size
    return {name: x[:, :M] for name, x in batch.items()}


def critic_loss(nets: Nets, batch: Batch, env: Env, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: squared TD error with y_n = scale r_n + gamma (1 - terminated) Q'(s'_n, d_s', a'_n, mean of the
    others' a'), a' from the target actor, plus lambda R_W at the policy's actions. Returns loss, metrics [S]."""
    landmarks = batch["landmarks"]
    with torch.no_grad():
        after = {"own": batch["next_own"], "landmarks": landmarks}
        next_crowd = crowd_of(after["own"])
        next_action = policy(nets, "actor_target", after["own"], next_crowd, landmarks, env)
        next_q = q_values(nets, "critic_target", after, next_crowd, next_action, others_mean(next_action))
        discount = args.gamma * (1 - batch["terminated"])  # [S, M]
        target = args.reward_scale * batch["rewards"] + discount.unsqueeze(-1) * next_q
    crowd = crowd_of(batch["own"])
    action = batch["actions"]
    q = q_values(nets, "critic", batch, crowd, action, others_mean(action))
    loss = (q - target).square().mean((1, 2))  # [S]
    metrics = {
        "losses/critic_loss": loss.detach(),
        "losses/q_values": q.detach().mean((1, 2)),
    }
    part = regularized_part(batch, args)
    if args.regularized and args.regularize != "actor":
        crowd = crowd_of(part["own"])
        with torch.no_grad():  # of all actions those that matter
            present = policy(nets, "actor", part["own"], crowd, part["landmarks"], env)
        change = change_of_q(nets, part, present)
        change, _ = regularizer(change, crowd.squeeze(2), part["crowd_noise"], args)
        loss = loss + args.reg_coef * change.mean(1)
        metrics["ernie/critic_regularizer"] = change.detach().mean(1)
    if args.mean_action_epsilon > 0:
        change = mean_action_regularizer(nets, part, args).mean(1)
        loss = loss + args.reg_coef * change
        metrics["ernie/mean_action_regularizer"] = change.detach()
    return loss.sum(), metrics


def actor_loss(nets: Nets, batch: Batch, env: Env, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: -Q at each agent's own present action, the others' present ones as constants, plus lambda R_W of the
    actor. Returns loss, metrics [S]."""
    crowd = crowd_of(batch["own"])
    output = respond(nets, "actor", batch["own"], crowd, batch["landmarks"])  # [S, M, N, A]
    action = squash(output, env)
    critic = {}
    for part in PARTS:
        net = nets[f"critic_{part}"]
        critic[f"critic_{part}"] = replace(net, flat=net.flat.detach())
    q = q_values(critic, "critic", batch, crowd, action, others_mean(action.detach()))
    policy_loss = -q.mean((1, 2))
    loss = policy_loss + args.policy_l2 * output.square().mean((1, 2, 3))
    metrics = {"losses/actor_loss": policy_loss.detach()}
    if args.regularized and args.regularize != "critic":
        part = regularized_part(batch, args)
        crowd = crowd_of(part["own"]).squeeze(2)
        change, _ = regularizer(change_of_actor(nets, part), crowd, part["crowd_noise"], args)
        loss = loss + args.reg_coef * change.mean(1)
        metrics["ernie/actor_regularizer"] = change.detach().mean(1)
    return loss.sum(), metrics


def update(nets: Nets, optimizers: dict, losses: dict, batch: Batch, env: Env, args: Args) -> Batch:
    """A step of the critic and its target, then of the actor and its. Each network's gradient is clipped on its own.
    Returns metrics [S]."""
    metrics = {}
    for role in ("critic", "actor"):
        loss, new_metrics = losses[role](nets, batch, env, args)
        metrics.update(new_metrics)
        flats = [nets[f"{role}_{part}"].flat for part in PARTS]
        for flat, gradient in zip(flats, torch.autograd.grad(loss, flats)):
            flat.grad = perturb.project(gradient, args.max_grad_norm, "l2")
        optimizers[role].step()
        for part, flat in zip(PARTS, flats):
            nets[f"{role}_target_{part}"].flat.lerp_(flat.detach(), args.tau)
    return metrics


# --------------------------------------------------------------------------------------------------------------------
# Rollout and replay of whole episodes. What every agent knows stands once: memory is linear in N.


def views(obs: Tensor, num_agents: int) -> tuple[Tensor, Tensor]:
    """The crowd [S, B, N, N, 2] and the landmarks [S, B, N, L, 2] as each agent sees them: obs [S, B, N, O] has, after
    velocity and place, where the landmarks and then the others are, seen from the agent."""
    N = num_agents
    place = obs[..., None, 2:4]
    points = obs[..., 4 : 2 + 4 * N].unflatten(-1, (2 * N - 1, 2)) + place
    landmarks, others = points.split((N, N - 1), -2)
    return torch.cat([place, others], -2), landmarks


def draw_rollout(env: Env, std: float, generators: Generators) -> tuple:
    """What is random in episodes: state and obs at their start; noise of actions [S, T, B, N, A], in their unit; noise
    of each step of the environments."""
    start = env.reset(generators)
    shape = (env.horizon, env.num_envs // len(generators), *env.action_mask.shape)
    scale = std * (env.action_high - env.action_low) / 2
    noise = scale * envs.per_seed(torch.randn, shape, generators)
    return start, noise, [env.draw(generators) for _ in range(env.horizon)]


@torch.no_grad()
def rollout(step_env: Callable, env: Env, nets: Nets, args: Args, draws: tuple) -> Batch:
    """Episodes with exploration: body [S, B, T + 1, N, 4], landmarks [S, B, L, 2], actions [S, B, T, N, A], rewards
    [S, B, T, N], terminated [S, B, T]."""
    (state, obs), noise, env_noise = draws
    S = len(noise)
    obs = obs.unflatten(0, (S, -1))
    body = obs[..., :4]
    _, landmarks = views(obs, env.num_agents)
    landmarks = landmarks[:, :, :1]
    steps = defaultdict(list, body=[body])
    for t, step_noise in enumerate(env_noise):
        own = perceive(body, crowd_of(body), landmarks, args)
        action = policy(nets, "actor", own, crowd_of(own), landmarks, env)
        explored = action + noise[:, t]
        action = explored.clamp(env.action_low, env.action_high)
        step = step_env(state, action.flatten(0, 1), step_noise)
        state = step[0]
        step = [x.unflatten(0, (S, -1)) for x in step[1:4]]
        obs, reward, terminated = step
        body = obs[..., :4]
        steps["body"].append(body)
        steps["actions"].append(action)
        steps["rewards"].append(reward)
        steps["terminated"].append(terminated.to(reward.dtype))
    episodes = {name: torch.stack(values, 2) for name, values in steps.items()}
    return episodes | {"landmarks": landmarks.squeeze(2)}


def make_replay(env: Env, num_seeds: int, num_episodes: int) -> Batch:
    """Room for E episodes of each seed, [S, E, ...] as `rollout` returns them."""
    N, T, A = env.num_agents, env.horizon, env.action_mask.shape[1]
    shapes = {
        "body": (T + 1, N, 4),
        "landmarks": (N, 2),
        "actions": (T, N, A),
        "rewards": (T, N),
        "terminated": (T,),
    }
    make = partial(torch.zeros, dtype=env.dtype, device=env.device)
    return {name: make(num_seeds, num_episodes, *shape) for name, shape in shapes.items()}


def sample(replay: Batch, filled: int, args: Args, generators: Generators) -> Batch:
    """Minibatch of the first `filled` episodes: own, next_own [S, M, N, 4 + 2 k], landmarks [S, M, 1, L, 2], actions
    [S, M, N, A], rewards [S, M, N], terminated [S, M]."""
    S, E, T = replay["terminated"].shape
    pick = envs.per_seed(partial(torch.randint, filled * T), (args.batch_size,), generators)
    seed = torch.arange(S, device=pick.device)
    pick = pick + E * T * seed[:, None]  # [S, M] into the flattened [S, E, T]
    episode = pick // T
    row = pick + episode  # an episode has one observation more than transitions

    def gather(name: str, index: Tensor, axes: int = 2) -> Tensor:
        samples = replay[name].flatten(0, axes).index_select(0, index.flatten())
        return samples.unflatten(0, index.shape)

    landmarks = gather("landmarks", episode, 1).unsqueeze(2)
    batch = {name: gather(name, pick) for name in ("actions", "rewards", "terminated")}
    for name, index in (("own", row), ("next_own", row + 1)):
        body = gather("body", index)
        batch[name] = perceive(body, crowd_of(body), landmarks, args)
    return batch | {"landmarks": landmarks}


def draw_noise(generators: Generators, env: Env, args: Args) -> Batch:
    """The random numbers of one update, drawn outside what may be compiled."""
    N, A = env.action_mask.shape
    M = min(args.batch_size, args.reg_batch_size)
    noise = {}
    if args.regularized:
        noise["crowd_noise"] = envs.per_seed(torch.randn, (M, 2 * N), generators)
    if args.mean_action_epsilon > 0:
        noise["mean_action_noise"] = envs.per_seed(torch.randn, (M, N, A), generators)
    return noise


# --------------------------------------------------------------------------------------------------------------------
# Robustness evaluation, by envs/robustness.py

RADII = (0.1, 0.2, 0.5, 1.0)
FACTORS = (0.25, 0.5, 2.0, 4.0)
SWEEP = {  # perturbation: strengths; and "agents", other numbers of them
    "gaussian": RADII,  # observation noise, standard deviation (paper, Figure 4)
    "uniform": RADII,  # observation noise, half-width
    "mad": RADII,  # radius; the observations that change the policy most (maximal action difference)
    "executed": RADII,  # the same; the observations that change the action that is played most
    "random_action": (0.03, 0.05, 0.2, 0.5),  # probability that one agent acts at random in a step
    "damping": FACTORS,  # factors on physical constants
    "mass": FACTORS,
    "max_speed_scale": FACTORS,
    "contact_force": FACTORS,
}


def trained_policy(nets: Nets, env: Env, args: Args) -> robustness.Policy:
    """Deterministic policies of however many agents: obs [S, N, B, O], of which every agent has its own."""

    def output(obs: Tensor) -> Tensor:
        obs = obs.transpose(1, 2)
        crowd, landmarks = views(obs, env.num_agents)
        own = perceive(obs[..., :4], crowd, landmarks, args)
        return respond(nets, "actor", own, crowd, landmarks).transpose(1, 2)

    def divergence(output: Tensor, clean: Tensor) -> Tensor:
        return (output - clean).square().sum(-1)

    return robustness.Policy(output, partial(squash, env=env), divergence, norm=args.eval_norm)


# --------------------------------------------------------------------------------------------------------------------
# Environment


def make_env(args: Args, num_envs: int, device: torch.device) -> Env:
    env = envs.make(
        args.env_id,
        num_envs,
        device,
        num_agents=args.num_agents,
    )
    if args.buffer_size < args.num_envs * env.horizon:
        raise ValueError(f"--buffer-size must hold an episode of each of --num-envs, got {args.buffer_size}")
    return env


load_policy = robustness.loader(Args, make_env, make_nets, trained_policy)  # act = load_policy("runs/RUN")


# --------------------------------------------------------------------------------------------------------------------
# Training


def compiled(env: Env, args: Args) -> tuple[Callable, dict[str, Callable]]:
    """The environment's step and the losses, compiled where that is asked for and right."""
    losses = {"critic": critic_loss, "actor": actor_loss}
    if not args.compile:
        return env.step, losses
    compile = partial(torch.compile, fullgraph=True, options={"comprehensive_padding": False})  # wrong on GPUs
    attacks = args.regularized or args.mean_action_epsilon > 0
    if env.device.type == "cuda" or not attacks:  # on CPUs torch 2.13 gets the gradient through an attack wrong
        losses = {name: compile(loss) for name, loss in losses.items()}
    return compile(env.step), losses


def train(env: Env, nets: Nets, optimizers: dict, args: Args, run: runs.Run, checkpoint: dict) -> None:
    """Train from the start or from a checkpoint; a signal ends it, after a checkpoint, with KeyboardInterrupt."""
    S = args.num_seeds
    steps_per_iteration = args.num_envs * env.horizon
    step_env, losses = compiled(env, args)
    learn = partial(update, nets, optimizers, losses, env=env, args=args)
    play = partial(rollout, step_env, env, nets, args)
    if args.cuda_graphs:
        learn = envs.graphed(learn, env.device, optimizers)
        play = envs.graphed(play, env.device)
    new_streams = partial(envs.make_generators, args.seed, S, device=env.device)
    streams = {purpose: new_streams(purpose) for purpose in ("rollout", "replay", "noise")}
    num_iterations = math.ceil(args.total_timesteps / steps_per_iteration)
    slots = min(args.buffer_size // steps_per_iteration, num_iterations)
    replay = make_replay(env, S, slots * args.num_envs)  # a slot holds an episode of every environment
    iteration = 0
    window = defaultdict(list)  # metrics [S] since the last row of metrics.csv
    if checkpoint:
        with runs.exits(2, ValueError):
            live = {"optimizers": optimizers, "streams": streams, "iteration": 0, "window": {}, "replay": {}}
            runs.restore(live, checkpoint)
        iteration = checkpoint["iteration"]
        for name, values in checkpoint["replay"].items():
            replay[name][:, : values.shape[1]] = values
        window.update(runs.moved(checkpoint["window"], env.device))

    step = iteration * steps_per_iteration
    num_updates = max(0, step - args.learning_starts) // args.steps_per_update
    started, first_step = time.perf_counter(), step
    bar = runs.progress_bar(args.total_timesteps, step)
    with runs.stop_signals() as caught:
        while step < args.total_timesteps and not caught:
            progress = step / args.total_timesteps
            std = args.exploration_noise + (args.exploration_noise_end - args.exploration_noise) * progress
            for optimizer in optimizers.values():
                step_size = (1 - progress) * args.learning_rate + progress * args.learning_rate_end
                optimizer.param_groups[0]["lr"] = step_size
            episodes = play(draw_rollout(env, std, streams["rollout"]))
            returns = episodes["rewards"].sum(2)
            window["charts/episodic_return"].append(returns.mean((1, 2)))
            slot = iteration % slots * args.num_envs
            for name, values in episodes.items():
                replay[name][:, slot : slot + args.num_envs] = values
            iteration += 1
            step += steps_per_iteration
            filled = min(iteration, slots) * args.num_envs
            while (num_updates + 1) * args.steps_per_update <= step - args.learning_starts:
                batch = sample(replay, filled, args, streams["replay"])
                batch |= draw_noise(streams["noise"], env, args)
                for name, value in learn(batch).items():
                    window[name].append(value)
                num_updates += 1
            bar.update(steps_per_iteration)

            done = step >= args.total_timesteps
            if num_updates > 0 and (done or step % args.log_interval < steps_per_iteration):
                metrics = {name: torch.stack(values, 1).mean(1) for name, values in window.items()}
                test_streams = new_streams("test")
                test_env = make_env(args, S * min(100, args.eval_episodes or 10), env.device)
                returns = robustness.evaluate(test_env, trained_policy(nets, test_env, args), test_streams)
                metrics["eval/episodic_return"] = returns.flatten(1).mean(1)
                if args.regularized:
                    batch = sample(replay, filled, args, test_streams)
                    batch |= draw_noise(test_streams, env, args)
                    metrics |= diagnose(nets, batch, env, args)
                speed = S * (step - first_step) / (time.perf_counter() - started)
                metrics["charts/SPS"] = torch.full((S,), speed)
                log(run, step, metrics)
                mean_return = metrics["eval/episodic_return"].mean()
                runs.show_progress(bar, episodic_return=f"{mean_return:.2f}")
                window = defaultdict(list)
                started, first_step = time.perf_counter(), step
            if done or caught or step % args.checkpoint_interval < steps_per_iteration:
                state = {
                    "args": asdict(args),
                    "nets": {name: net.flat for name, net in nets.items()},
                    "optimizers": optimizers,
                    "streams": streams,
                    "iteration": iteration,
                    "window": window,
                    "rows": run.rows,
                    "replay": {name: values[:, :filled] for name, values in replay.items()},
                }
                runs.save(run.dir / "checkpoint.pt", state)
    bar.close()
    if caught:
        raise KeyboardInterrupt(f"at step {step}")


def main() -> None:
    with runs.exits(2, ValueError, ImportError, OSError):
        args, checkpoint = runs.parse_args(Args, __doc__)
        device = setup(args)
        if args.compile_transport is not False:
            args.compile_transport = args.regularized and envs.can_compile("optimal transport", "compile-transport")
        env = make_env(args, args.num_seeds * args.num_envs, device)
        runs.check_memory(env, args)
        nets, optimizers = make_nets(env, args)
        weights = {name: net.flat for name, net in nets.items()}
        if checkpoint:
            runs.restore({"nets": weights}, checkpoint)
        rows = checkpoint.get("rows", [])
        labels = [{"seed": seed} for seed in args.seeds]
        run = runs.Run(make_run_dir(args, __file__), labels, rows)
    if not args.evaluate:
        with runs.training(run.dir):
            runs.start_wandb(run, args)
            train(env, nets, optimizers, args, run, checkpoint)
            runs.save(run.dir / "policy.pt", {"args": asdict(args), "nets": weights})
    with runs.reporting(run):
        make_policy = partial(trained_policy, nets, args=args)
        if args.eval_episodes:
            env = make_env(args, args.num_seeds * args.eval_episodes, device)
            labels = {"env_id": args.env_id, "num_agents": args.num_agents, "regularizer": args.regularizer}
            robustness.report(env, make_policy, SWEEP | {"agents": args.eval_agents}, run, labels)
        if args.capture_video:
            env = make_env(args, args.num_seeds, device)
            streams = envs.make_generators(args.seed, args.num_seeds, "video", device)
            envs.write_gif(env, make_policy(env).act, streams, run.dir / "episode.gif")
    print(f"results: {run.dir}")


if __name__ == "__main__":
    main()
