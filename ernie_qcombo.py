"""ERNIE-QCOMBO: Q-learning of traffic lights, kept smooth by an adversarial regulariser.

QCOMBO (Zhang et al. 2019, arXiv 1909.10651; ERNIE's appendix E.1) trains a Q-network per light on its own observation,
which drives it, a global Q-network on everybody's observations and actions, and pulls the global value and the weighted
sum of the individual ones together. ERNIE (Bukharin et al. 2023, arXiv 2310.10810) adds the largest change of each
individual Q under a small perturbation of its observation (Eq. 4, 5), found by K steps of projected gradient ascent
through which the gradient of Q flows (Eq. 6, the Stackelberg game). ERNIE-A (Eq. 7) adds the largest change of the
global Q when `--malicious-agents` lights act otherwise.

    python ernie_qcombo.py --epsilon 0.1                       # 2 x 2 lights: minutes on two CPU cores
    python ernie_qcombo.py --num-seeds 5                       # five runs side by side
    python ernie_qcombo.py --evaluate runs/RUN --backend sumo  # the same lights in SUMO

Usage, metrics and results: docs/ernie_qcombo.md.
Differences to the paper (docs/paper_to_code.md): 1 l2 ball in raw units, 2 squared l2 of Q-values, 7
projection after every step, 8 random start, 16-21 sequential greedy ERNIE-A in the loss of the global Q, 23 malicious
actions by the run's own global Q, 34 target networks (--tau 1: none), 35 greedy actions of the next step, 36 mean
instead of sum, 37 the individual Q-functions are regularised, 39 Gaussian noise of mean length epsilon, 41 mean reward.

Axes: S seeds, N agents (lights), M samples of a minibatch (B environments in a rollout), R of them that are perturbed,
T steps of a rollout, O observation, A = 2 actions. What an agent sees, does and is worth is [S, N, M, ...]; the state,
which the global Q sees, is [S, 1, M, N * O], and C joint actions in each are [S, M, C, N].
"""

import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below prints no traceback

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

import envs
from envs import Env, perturb, robustness, runs, sumo, traffic
from envs.runs import Name, Share, Switch, Threads, arguments, log, make_run_dir, setup

Batch = dict[str, Tensor]  # samples and random numbers of an update, or metrics [S]
Generators = list[torch.Generator]  # one per seed
Nets = dict[str, "MLP | Normalizer"]  # local, global, local_target, global_target, normalizer
Side = Annotated[int, Field(ge=1, le=64)]  # of a grid, lights
Flow = Annotated[float, Field(ge=0, le=3600)] | Literal[*traffic.FLOWS]


@arguments
class Experiment:
    exp_name: Name = Path(__file__).stem  # name of this experiment
    seed: NonNegativeInt = 1  # seed of the first run; run k uses seed + k
    num_seeds: PositiveInt = 1  # S, independent runs trained side by side (paper: five, ten for percentiles)
    torch_deterministic: bool = True  # deterministic algorithms only: same seed, same machine, same numbers
    cuda: bool = True  # use the GPU if there is one
    num_threads: Threads = 1  # CPU threads; with more set OMP_WAIT_POLICY=PASSIVE, or one busy core stalls all
    compile: Switch = None
    """torch.compile the environment step (a minute, then 9x as fast) and, on a GPU, the loss; default: the step, where
    there is a C++ compiler"""
    cuda_graphs: bool = False
    """on a GPU: updates and rollouts as CUDA graphs, without deterministic algorithms; not measured; CPUs ignore it"""
    runs_dir: str = "runs"  # folder that receives a folder per run
    resume: str | None = None  # run folder to continue; other flags are read from it
    evaluate: str | None = None  # run folder or policy file whose policies are evaluated again, without training
    backend: Literal["torch", "sumo"] = "torch"
    """with --evaluate: the batched simulator or SUMO (requirements-sumo.txt), a process per environment"""
    capture_video: bool = False  # write a GIF of the trained lights
    log_interval: PositiveInt = 32_000  # environment steps between two rows of metrics.csv
    checkpoint_interval: PositiveInt = 64_000  # environment steps between two checkpoints
    eval_episodes: NonNegativeInt = 4  # episodes of one seed at each point of the robustness report; 0: no report
    eval_warmup: NonNegativeInt = 1000  # seconds of random switching before an evaluation (paper: 1,000)
    eval_seconds: PositiveInt = 1000  # seconds of an evaluation (paper: 4,000)
    eval_norm: Literal["l2", "linf"] = "l2"  # norm of the ball of the report's worst-case observations
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline needs no account; `wandb sync` later
    wandb_project_name: str = "robust-marl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team


@arguments
class QCOMBO:
    env_id: Literal["traffic_grid_v0", "traffic_irregular_v0", "traffic_atlanta_v0"] = "traffic_grid_v0"
    """network and flow"""
    rows: Side | None = None  # rows of lights; default: the task's own (traffic_grid_v0: 2)
    cols: Side | None = None  # columns of lights; default: the task's own
    flow: tuple[Flow, ...] = ()
    """cars per hour: train or a flow of the paper's table 1, one number, or one per entry; default: the task's own"""
    model: Literal["idm", "krauss"] = "idm"  # car-following model (paper's code: idm)
    total_timesteps: PositiveInt = 320_000  # environment steps (seconds) of one seed (paper: 15,000)
    num_envs: PositiveInt = 32  # B, environments of one seed that step together (paper: 1)
    horizon: PositiveInt = 2000  # seconds of an episode (paper: 3,000)
    warmup: PositiveInt = 1000
    """of these, seconds of random switching at the start; learning begins after the first (paper's code: 1,000)"""
    rollout_steps: PositiveInt = 10  # T, seconds between updates (paper's code: 10)
    updates_per_rollout: PositiveInt = 8  # minibatches after each rollout (paper's code: 100)
    buffer_size: PositiveInt = 250_000  # replay capacity of one seed in environment steps (paper's code: 30,000)
    batch_size: PositiveInt = 128  # M, transitions per minibatch (paper's code: 30)
    learning_rate: PositiveFloat = 1e-3  # Adam step size (paper's code: 1e-4)
    anneal_lr: bool = True  # let the step size fall linearly to 0
    gamma: Share = 0.995  # discount factor of a second (paper's code: 0.95)
    tau: Share = 0.03  # share by which the targets move at each update; 1: no target networks (paper's formulas)
    hidden_size: PositiveInt = 128  # width of the two hidden layers (paper: 256; its code: 64)
    activation: Literal["relu", "silu", "tanh"] = "relu"  # hidden activation
    exploration: Share = 0.02  # probability of a random action at the start (paper's code: 0.05)
    exploration_end: Share = 0.0  # the same at the end, linear in between
    reward_scale: PositiveFloat = 0.01  # factor on the rewards that are learnt from
    team_reward: Literal["mean", "sum"] = "mean"  # of the individual rewards and values: the global ones
    consistency_coef: NonNegativeFloat = 1.7  # lambda_Q, weight of the consistency regulariser (paper's code: 1.7)
    global_q: Literal["auto", "joint", "action_in"] = "auto"
    """global Q with an output per joint action, or with the actions as inputs; auto: joint up to six lights"""
    max_grad_norm: PositiveFloat = 10.0  # the gradient of each network of each seed is clipped to this norm


@arguments
class ERNIE:
    regularizer: Literal["none", "gaussian", "random", "adversarial", "stackelberg"] = "stackelberg"
    """none: QCOMBO; gaussian: appendix H; random: a direction of length epsilon; adversarial: Eq. 4; stackelberg: 6"""
    regularize: Literal["local", "global", "both"] = "local"
    """which Q-functions are regularised: the individual ones (paper), the global one (its code), or both"""
    epsilon: NonNegativeFloat = 0.1  # radius of the perturbation ball
    epsilon_units: Literal["raw", "std"] = "raw"  # of the observation, or its standard deviation in the first warm-up
    norm: Literal["l2", "linf"] = "l2"  # norm of the ball
    attack_steps: NonNegativeInt = 3  # K, ascent steps; 0 is the baseline
    attack_lr: PositiveFloat | None = None  # eta, length of an ascent step / epsilon; default: 1 if K = 1, else 2.5 / K
    reg_coef: NonNegativeFloat = 0.04  # lambda, weight of the regulariser, a mean over lights
    reg_batch_size: PositiveInt = 128  # R, samples of the minibatch on which the regulariser is estimated
    divergence: Literal["l2", "kl", "l2_probs"] = "l2"  # D: squared l2 of Q-values (paper); KL or l2 of their softmax
    action_reg_coef: NonNegativeFloat = 0.0  # lambda_A, weight of ERNIE-A (Eq. 7) in the loss of the global Q
    malicious_agents: PositiveInt = 1  # ERNIE-A: so many lights act otherwise (K of Eq. 7)


@arguments
class Args(ERNIE, QCOMBO, Experiment):
    def __post_init__(self):
        num_lights = math.prod(self.grid)
        if self.global_q == "auto":
            self.global_q = "joint" if num_lights <= 6 else "action_in"
        if self.attack_lr is None:
            self.attack_lr = 1.0 if self.attack_steps <= 1 else 2.5 / self.attack_steps
        is_numbers = all(isinstance(rate, float) for rate in self.flow)
        has_two_values = self.global_q == "joint" or self.regularize == "local"
        at_once = self.num_envs * self.rollout_steps
        rules = (
            ("backend", self.backend == "torch" or self.evaluate, "torch unless --evaluate is given"),
            ("flow", is_numbers or len(self.flow) == 1, "a name, or numbers"),
            ("horizon", self.horizon % self.rollout_steps == 0, "a multiple of --rollout-steps"),
            ("warmup", self.warmup % self.rollout_steps == 0, "a multiple of --rollout-steps"),
            ("warmup", self.warmup < self.horizon, "below --horizon"),
            ("total_timesteps", self.total_timesteps > self.warmup * self.num_envs, "above --warmup times --num-envs"),
            ("buffer_size", self.buffer_size >= at_once, "at least --num-envs times --rollout-steps"),
            ("malicious_agents", self.malicious_agents <= num_lights, f"at most the number of lights, {num_lights}"),
            ("global_q", self.global_q == "action_in" or num_lights <= 12, "action_in with more than 12 lights"),
            (
                "divergence",
                has_two_values or self.divergence == "l2",
                "l2 where a global Q of one output is regularised",
            ),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {getattr(self, name)}")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of lights."""
        task = {"rows": 2, "cols": 2} | traffic.TASKS[self.env_id]
        return self.rows or task["rows"], self.cols or task["cols"]

    @property
    def regularized(self) -> list[str]:
        """Which Q-functions; with K, epsilon or lambda at 0 none: this is QCOMBO, at its speed."""
        idle = self.regularizer in ("adversarial", "stackelberg") and self.attack_steps == 0
        if self.regularizer == "none" or self.reg_coef * self.epsilon == 0 or idle:
            return []
        return ["local", "global"] if self.regularize == "both" else [self.regularize]


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


@dataclass
class Normalizer:
    """Observations as networks see them. `flat` [S, N, 2, O]: mean and standard deviation, measured once."""

    flat: Tensor

    def __call__(self, obs: Tensor) -> Tensor:
        """obs [S, N, M, O] in standard deviations from the mean, cut to +-10. Entries that did not vary are 0: to a
        network of its own they say nothing."""
        mean, std = self.flat.unsqueeze(3).unbind(2)
        std = torch.where(std > 0, std, math.inf)  # where a division by 0 is left out, its gradient is still nan
        return ((obs - mean) / std).clamp(-10, 10)

    def unit(self, kind: str) -> Tensor:
        """Of a perturbation in each entry of a normalised observation [S, N, 1, O], 0 where it does not vary."""
        std = self.flat[:, :, 1:]
        return torch.where(std > 0, 1.0 if kind == "std" else 1 / std, 0.0)

    def measure(self, obs: Tensor) -> None:
        """Normalise by the moments of obs [S, E, T, N, O] from now on."""
        obs = obs.double()
        mean, square = obs.mean((1, 2)), obs.square().mean((1, 2))
        variance = square - mean.square()
        std = torch.where(variance > 1e-12 * square, variance, 0).sqrt()  # 0 where only rounding varies
        self.flat.copy_(torch.stack([mean, std], 2))


def make_nets(env: Env, args: Args) -> tuple[Nets, dict[str, torch.optim.Optimizer]]:
    """The Q-networks, their targets and the normaliser of observations; an Adam for all."""
    generators = envs.make_generators(args.seed, args.num_seeds, "init", env.device)
    N, O = env.obs_mask.shape
    hidden = [args.hidden_size, args.hidden_size]
    joint = [N * O + N, *hidden, 1]
    if args.global_q == "joint":
        joint = [N * O, *hidden, 2**N]
    nets = {
        "local": init_mlp([O, *hidden, 2], args.activation, N, generators),
        "global": init_mlp(joint, args.activation, 1, generators),
    }
    optimizer = torch.optim.Adam([net.flat for net in nets.values()], args.learning_rate, fused=True)
    for name in ("local", "global"):
        flat = nets[name].flat.detach().clone()
        nets[f"{name}_target"] = replace(nets[name], flat=flat)
    moments = torch.zeros(args.num_seeds, N, 2, O, dtype=env.dtype, device=env.device)
    nets["normalizer"] = Normalizer(moments)
    return nets, {"q": optimizer}


def everybody(obs: Tensor) -> Tensor:
    """The state, [S, N, M, O] of each agent -> [S, 1, M, N * O]."""
    return obs.transpose(1, 2).flatten(2).unsqueeze(1)


def joint_values(net: MLP, state: Tensor) -> Callable[[Tensor], Tensor]:
    """The global Q(s, .) as a function of C joint actions in each state, [S, M, C, N] -> [S, M, C]. The network has an
    output per joint action, or the actions are inputs beside the state [S, 1, M, N * O]."""
    num_inputs = state.shape[-1]
    if num_inputs == net.sizes[0]:
        table = net(state).squeeze(1)  # [S, M, 2^N]
        bit = torch.arange(int(math.log2(net.sizes[-1])), device=state.device)
        return lambda joint: table.gather(2, (joint << bit).sum(-1))

    (weight, bias), *rest = net.layers()
    encoded = torch.baddbmm(bias, weight[:, :, :num_inputs], state.squeeze(1).mT)  # [S, H, M], once for all actions

    def values(joint: Tensor) -> Tensor:
        actions = joint.flatten(1, 2).to(state.dtype).mT  # [S, N, M * C]
        h = torch.bmm(weight[:, :, num_inputs:], actions)
        h = h.unflatten(2, joint.shape[1:3])
        h = (h + encoded.unsqueeze(3)).flatten(2)
        for weight_k, bias_k in rest:
            h = torch.baddbmm(bias_k, weight_k, ACTIVATIONS[net.activation](h))
        return h.view(joint.shape[:3])

    return values


# --------------------------------------------------------------------------------------------------------------------
# ALGO LOGIC: the adversarial regulariser, ERNIE Eq. (4) and (6). Observations are normalised from here on.


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


def divergence(kind: str, output: Tensor, clean: Tensor) -> Tensor:
    """D [S, N, M] of Q-values [S, N, M, A]: squared l2, or KL(output || clean) or squared l2 of their softmax. Squared,
    because the plain norm has no gradient where the outputs agree."""
    if kind == "kl":
        logprobs, clean_logprobs = output.log_softmax(-1), clean.log_softmax(-1)
        return (logprobs.exp() * (logprobs - clean_logprobs)).sum(-1)
    if kind == "l2_probs":
        output, clean = output.softmax(-1), clean.softmax(-1)
    return (output - clean).square().sum(-1)


def regularizer(
    network: Callable, obs: Tensor, clean: Tensor, noise: Tensor, unit: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """R [S, N, M] of each agent at each observation [S, N, M, O] and its perturbation delta in units of `unit`, which
    is 0 where nothing is perturbed; `clean` is the network's output there, which the loss has too; noise is standard
    normal."""
    live = (unit > 0).to(obs.dtype)  # [S, N, 1, O]
    noise = noise * live

    def change(delta: Tensor) -> Tensor:
        return divergence(args.divergence, network(obs + unit * delta), clean)

    if args.regularizer == "gaussian":  # of mean length epsilon
        delta = noise * (args.epsilon / perturb.mean_length(live))
    elif args.regularizer == "random":
        delta = perturb.rescale(noise, args.epsilon, args.norm)
    else:
        start = perturb.rescale(noise, 0.5 * args.epsilon, args.norm)  # at 0 the divergence has no gradient
        size = args.attack_lr * perturb.reach(args.epsilon, live, args.norm)
        ball = partial(perturb.project, epsilon=args.epsilon, norm=args.norm)
        delta = unroll(change, start, args.attack_steps, size, ball, args.regularizer == "stackelberg")
    return change(delta), delta


def perturbable(kind: str, nets: Nets, batch: Batch, args: Args) -> tuple[Callable, Tensor, Tensor]:
    """What the regulariser of the "local" or "global" Q-functions perturbs: the network as a function of its input, the
    input [S, N, R, O] or [S, 1, R, N * O], and the unit of delta."""
    obs = batch["obs"][:, :, : args.reg_batch_size]
    unit = nets["normalizer"].unit(args.epsilon_units)
    if kind == "local":
        return nets["local"], obs, unit
    if args.global_q == "joint":
        return nets["global"], everybody(obs), everybody(unit)
    actions = batch["actions"][:, :, : args.reg_batch_size]
    joint = actions.transpose(1, 2).unsqueeze(2)  # [S, R, 1, N]

    def network(state: Tensor) -> Tensor:
        return joint_values(nets["global"], state)(joint).unsqueeze(1)

    return network, everybody(obs), everybody(unit)


def diagnose(kind: str, nets: Nets, batch: Batch, args: Args) -> Batch:
    """R of the "local" or "global" Q-functions under attack and in a random direction, the share of attacks that reach
    the sphere, and of the Stackelberg gradient the leader-follower term: its norm relative to the leader's, and their
    cosine, [S]."""
    network, obs, unit = perturbable(kind, nets, batch, args)
    clean = network(obs)
    changes, gradients = {}, {}
    for mode in ("random", "adversarial", "stackelberg"):
        mode_args = replace(args, regularizer=mode)
        change, delta = regularizer(network, obs, clean, batch[f"{kind}_noise"], unit, mode_args)
        change = change.mean(2)  # [S, N]
        changes[mode] = change.mean(1)
        (gradient,) = torch.autograd.grad(change.sum(), nets[kind].flat, retain_graph=True)
        gradients[mode] = gradient.view(len(obs), -1)
    leader = gradients["adversarial"]
    follower = gradients["stackelberg"] - leader
    length = perturb.length(delta.detach(), args.norm)
    at_edge = length >= 0.999 * args.epsilon
    return {
        f"ernie/{kind}_attack": changes["stackelberg"],
        f"ernie/{kind}_random_direction": changes["random"],
        f"ernie/{kind}_perturbation_norm": length.mean((1, 2, 3)),
        f"ernie/{kind}_saturation": at_edge.to(obs.dtype).mean((1, 2, 3)),
        f"ernie/{kind}_interaction_ratio": follower.norm(dim=1) / leader.norm(dim=1).clamp_min(1e-12),
        f"ernie/{kind}_interaction_cosine": F.cosine_similarity(follower, leader, dim=1),
    }


# --------------------------------------------------------------------------------------------------------------------
# ALGO LOGIC: other actions than those that were taken, in ERNIE-A, Eq. (7)


def greedy_changes(values: Callable, joint: Tensor, num_changed: int) -> Tensor:
    """Appendix G: K times the light whose other action changes Q(s, .) most, none twice. joint [S, M, N] -> a'
    [S, M, N]; N values per round."""
    N = joint.shape[-1]
    flips = torch.eye(N, dtype=torch.int64, device=joint.device)
    clean = values(joint.unsqueeze(2))
    changed = joint
    allowed = torch.ones_like(joint, dtype=torch.bool)
    for _ in range(num_changed):
        score = (values(changed.unsqueeze(2) ^ flips) - clean).square()  # [S, M, N]
        best = score.masked_fill(~allowed, -1.0).argmax(-1)
        flip = flips[best]
        changed = changed ^ flip
        allowed = allowed & (flip == 0)
    return changed


# --------------------------------------------------------------------------------------------------------------------
# Loss and update. The loss is a mean over samples and a sum over seeds, which do not share parameters.


def qcombo_loss(nets: Nets, batch: Batch, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: appendix E.1, L(theta) + L(omega) + lambda_Q L_reg, plus lambda R (Eq. 5) and lambda_A R^A (Eq. 7).
    The targets: y^n = r^n + gamma max Q^n'(o'), y = r + gamma Q'(s', a'), a' greedy with Q^n. Returns loss, metrics."""
    obs, next_obs, actions = batch["obs"], batch["next_obs"], batch["actions"]
    joint = actions.transpose(1, 2)  # [S, M, N]
    rewards = args.reward_scale * batch["rewards"]  # [S, N, M]
    share = 1 / obs.shape[1] if args.team_reward == "mean" else 1.0
    with torch.no_grad():
        discount = args.gamma * (1 - batch["terminated"])  # [S, M]
        greedy = nets["local"](next_obs).argmax(-1).transpose(1, 2)
        next_q = nets["local_target"](next_obs).amax(-1)
        target = rewards + discount.unsqueeze(1) * next_q  # [S, N, M]
        next_values = joint_values(nets["global_target"], everybody(next_obs))
        next_team_q = next_values(greedy.unsqueeze(2)).squeeze(2)
        team_target = share * rewards.sum(1) + discount * next_team_q  # [S, M]
    output = nets["local"](obs)  # [S, N, M, A]
    q = output.gather(3, actions.unsqueeze(3)).squeeze(3)
    values = joint_values(nets["global"], everybody(obs))
    team_q = values(joint.unsqueeze(2)).squeeze(2)
    parts = {
        "losses/local": 0.5 * (q - target).square().mean((1, 2)),
        "losses/global": 0.5 * (team_q - team_target).square().mean(1),
        "losses/consistency": 0.5 * (team_q - share * q.sum(1)).square().mean(1),
    }
    loss = parts["losses/local"] + parts["losses/global"] + args.consistency_coef * parts["losses/consistency"]
    if args.action_reg_coef > 0:
        with torch.no_grad():
            changed = greedy_changes(values, joint, args.malicious_agents)
        changed_q = values(changed.unsqueeze(2)).squeeze(2)
        change = (changed_q - team_q).square().mean(1)
        loss = loss + args.action_reg_coef * change
        parts["ernie/action_regularizer"] = change
    for kind in args.regularized:
        network, seen, unit = perturbable(kind, nets, batch, args)
        clean = output[:, :, : args.reg_batch_size] if kind == "local" else network(seen)
        change, _ = regularizer(network, seen, clean, batch[f"{kind}_noise"], unit, args)
        loss = loss + args.reg_coef * change.mean((1, 2))
        parts[f"ernie/{kind}_regularizer"] = change.mean((1, 2))
    parts["losses/q_values"] = q.mean((1, 2))
    return loss.sum(), {name: value.detach() for name, value in parts.items()}


def update(nets: Nets, optimizers: dict, loss: Callable, batch: Batch, args: Args) -> Batch:
    """A step of all Q-functions, then of their targets. Each network's gradient is clipped on its own. Returns metrics
    [S]."""
    value, metrics = loss(nets, batch, args)
    flats = [nets["local"].flat, nets["global"].flat]
    for flat, gradient in zip(flats, torch.autograd.grad(value, flats)):
        flat.grad = perturb.project(gradient, args.max_grad_norm, "l2")
    optimizers["q"].step()
    for name in ("local", "global"):
        nets[f"{name}_target"].flat.lerp_(nets[name].flat.detach(), args.tau)
    return metrics


# --------------------------------------------------------------------------------------------------------------------
# Rollout of a few seconds of long episodes, whose state goes on in the next one, and replay


def draw_rollout(env: Env, t: int, exploration: float, generators: Generators, args: Args) -> tuple:
    """What is random in the T seconds from t on: which lights [S, T, B, N] do not act greedily, what they do instead,
    and noise of each second of the environments. During the warm-up each light switches every tenth second with
    probability 1/2, as in the paper's code."""
    T = args.rollout_steps
    which, what = envs.per_seed(torch.rand, (T, 2, args.num_envs, env.num_agents), generators).unbind(2)
    env_noise = [env.draw(generators) for _ in range(T)]
    is_random, action = which < exploration, what < 0.5
    if t < args.warmup:
        second = torch.arange(t, t + T, device=env.device).view(T, 1, 1)
        is_random, action = torch.ones_like(is_random), action & (second % 10 == 0)
    return is_random, action.long(), env_noise


@torch.no_grad()
def rollout(
    step_env: Callable, env: Env, nets: Nets, state: traffic.State, draws: tuple
) -> tuple[traffic.State, Batch]:
    """The next T seconds of every environment, lights greedy unless `draws` say otherwise. Returns the new state,
    what make_replay has room for, and [S, B, T] each of traffic.outcome."""
    is_random, random_action, env_noise = draws
    S = len(is_random)
    obs = env.observe(state)
    steps = defaultdict(list, obs=[obs])
    for t, step_noise in enumerate(env_noise):
        q = nets["local"](nets["normalizer"](envs.by_agent(obs, S)))  # [S, N, B, A]
        greedy = q.argmax(-1).transpose(1, 2)
        action = torch.where(is_random[:, t], random_action[:, t], greedy).flatten(0, 1)
        state, obs, reward, terminated, _, info = step_env(state, action, step_noise)
        steps["obs"].append(obs)
        steps["actions"].append(action)
        steps["rewards"].append(reward)
        steps["terminated"].append(terminated.to(reward.dtype))
        for name, value in traffic.outcome(reward, info).items():
            steps[name].append(value)
    episodes = {name: torch.stack(values, 1) for name, values in steps.items()}
    episodes = {name: values.unflatten(0, (S, -1)) for name, values in episodes.items()}
    return state, episodes


def make_replay(env: Env, num_seeds: int, num_episodes: int, T: int) -> Batch:
    """Room for E rollouts of each seed: obs [S, E, T + 1, N, O], actions and rewards [S, E, T, N], terminated."""
    zeros = partial(torch.zeros, dtype=env.dtype, device=env.device)
    shape = (num_seeds, num_episodes, T, env.num_agents)
    return {
        "obs": zeros(num_seeds, num_episodes, T + 1, *env.obs_mask.shape),
        "actions": zeros(shape, dtype=torch.int64),
        "rewards": zeros(shape),
        "terminated": zeros(shape[:3]),
    }


def sample(replay: Batch, filled: int, normalizer: Normalizer, args: Args, generators: Generators) -> Batch:
    """Minibatch of the first `filled` rollouts: obs, next_obs, normalised, [S, N, M, O], actions, rewards [S, N, M],
    terminated [S, M]."""
    S, E, T = replay["terminated"].shape
    pick = envs.per_seed(partial(torch.randint, filled * T), (args.batch_size,), generators)
    seed = torch.arange(S, device=pick.device)
    pick = pick + E * T * seed[:, None]  # [S, M] into the flattened [S, E, T]
    row = pick + pick // T  # a rollout has one observation more than transitions

    def gather(name: str, index: Tensor) -> Tensor:
        samples = replay[name].flatten(0, 2).index_select(0, index.flatten())
        return samples.unflatten(0, index.shape)

    return {
        "obs": normalizer(gather("obs", row).transpose(1, 2)),
        "next_obs": normalizer(gather("obs", row + 1).transpose(1, 2)),
        "actions": gather("actions", pick).transpose(1, 2),
        "rewards": gather("rewards", pick).transpose(1, 2),
        "terminated": gather("terminated", pick),
    }


def draw_noise(generators: Generators, env: Env, args: Args) -> Batch:
    """The random numbers of one update, drawn outside what may be compiled."""
    N, O = env.obs_mask.shape
    R = min(args.batch_size, args.reg_batch_size)
    shapes = {"local": (N, R, O), "global": (1, R, N * O)}
    noise = {}
    for kind in args.regularized:
        noise[f"{kind}_noise"] = envs.per_seed(torch.randn, shapes[kind], generators)
    return noise


# --------------------------------------------------------------------------------------------------------------------
# Robustness evaluation, by envs/robustness.py


def trained_policy(nets: Nets, env: Env, args: Args) -> robustness.Policy:
    """Greedy lights, the trained grid again and again where env has more of them; Q sees the true observations."""
    twins = traffic.twins(env, *args.grid)  # [L]
    flat = nets["local"].flat.detach().unflatten(0, (args.num_seeds, -1))
    local = replace(nets["local"], flat=flat[:, twins].flatten(0, 1))
    normalizer = Normalizer(nets["normalizer"].flat[:, twins])

    def output(obs: Tensor) -> Tensor:
        return local(normalizer(obs))

    def dislike(obs: Tensor) -> Callable:
        q = output(obs)
        return lambda seen: -(output(seen).softmax(-1) * q).sum(-1)  # an argmax has no gradient

    def team_value(obs: Tensor, action: Tensor) -> Tensor:
        joint = action.argmax(-1).transpose(1, 2).unsqueeze(2)
        return joint_values(nets["global"], everybody(normalizer(obs)))(joint).squeeze(2)

    return robustness.Policy(
        output=output,
        to_action=lambda q: F.one_hot(q.argmax(-1), 2),
        divergence=partial(divergence, "l2"),
        attacks={"critic": dislike},
        team_value=team_value,
        norm=args.eval_norm,
        unit=normalizer.flat[:, :, 1:],
        ascent_steps=5,
    )


def make_lights(nets: Nets, args: Args, device: torch.device, episodes: int, limit: float) -> robustness.Lights:
    """The trained lights and where they are tried out, of warm-up and the rest at most `limit` seconds."""
    warmup, seconds = min(limit, args.eval_warmup), min(limit, args.eval_seconds)
    return robustness.Lights(
        make_env=partial(make_env, args, device=device, warmup=warmup, horizon=seconds),
        make_step=lambda env: compiled(env, args)[0],
        make_policy=partial(trained_policy, nets, args=args),
        seeds=args.seeds,
        episodes=episodes,
    )


# --------------------------------------------------------------------------------------------------------------------
# Environment


def make_env(args: Args, num_envs: int, device: torch.device, **fields) -> Env:
    """The task of `args`, or another one where `fields` name its env_id; in SUMO if the backend is."""
    if "env_id" not in fields:
        rows, cols = args.grid
        fields |= {"env_id": args.env_id, "rows": rows, "cols": cols}
        if args.flow:
            fields["flow"] = args.flow if len(args.flow) > 1 else args.flow[0]
    env = envs.make(
        num_envs=num_envs,
        device=device,
        model=args.model,
        **fields,
    )
    return sumo.from_traffic(env) if args.backend == "sumo" else env


load_policy = robustness.loader(Args, make_env, make_nets, trained_policy)  # act = load_policy("runs/RUN")


# --------------------------------------------------------------------------------------------------------------------
# Training


def compiled(env: Env, args: Args) -> tuple[Callable, Callable]:
    """The environment's step and the loss, compiled where that is asked for and right."""
    if args.compile is False or args.backend == "sumo":
        return env.step, qcombo_loss
    step = traffic.compiled_step(env)
    if env.device.type == "cpu" or not args.compile:  # on CPUs torch 2.13 gets the gradient through an attack wrong
        return step, qcombo_loss
    options = {"comprehensive_padding": False}  # with it gradients are wrong on GPUs
    return step, torch.compile(qcombo_loss, fullgraph=True, dynamic=False, options=options)


def train(env: Env, nets: Nets, optimizers: dict, args: Args, run: runs.Run, checkpoint: dict) -> None:
    """Train from the start or from a checkpoint; a signal ends it, after a checkpoint, with KeyboardInterrupt."""
    S, T = args.num_seeds, args.rollout_steps
    steps_per_iteration = args.num_envs * T
    step_env, loss = compiled(env, args)
    learn = partial(update, nets, optimizers, loss, args=args)
    play = partial(rollout, step_env, env, nets)
    if args.cuda_graphs:
        learn = envs.graphed(learn, env.device, optimizers)
        play = envs.graphed(play, env.device)
    test_lights = make_lights(nets, args, env.device, 2, 300)
    new_streams = partial(envs.make_generators, args.seed, S, device=env.device)
    streams = {purpose: new_streams(purpose) for purpose in ("rollout", "replay", "noise")}
    num_iterations = math.ceil(args.total_timesteps / steps_per_iteration)
    slots = min(args.buffer_size // steps_per_iteration, num_iterations)
    replay = make_replay(env, S, slots * args.num_envs, T)  # a slot holds a rollout of every environment
    iteration = 0
    state = None
    window = defaultdict(list)  # metrics [S] since the last row of metrics.csv
    if checkpoint:
        with runs.exits(2, ValueError):
            live = {"optimizers": optimizers, "streams": streams, "iteration": 0}
            runs.restore(live | {"window": {}, "replay": {}, "state": {}}, checkpoint)
        iteration = checkpoint["iteration"]
        state = traffic.State(**runs.moved(checkpoint["state"], env.device))
        for name, values in checkpoint["replay"].items():
            replay[name][:, : values.shape[1]] = values
        window.update(runs.moved(checkpoint["window"], env.device))

    step = iteration * steps_per_iteration
    started, first_step = time.perf_counter(), step
    bar = runs.progress_bar(args.total_timesteps, step)
    with runs.stop_signals() as caught:
        while step < args.total_timesteps and not caught:
            progress = step / args.total_timesteps
            exploration = args.exploration + (args.exploration_end - args.exploration) * progress
            t = iteration * T % args.horizon
            if t == 0:
                state, _ = env.reset(streams["rollout"])
            draws = draw_rollout(env, t, exploration, streams["rollout"], args)
            state, episodes = play(state, draws)
            slot = iteration % slots * args.num_envs
            for name, values in episodes.items():
                if name in replay:
                    replay[name][:, slot : slot + args.num_envs] = values
                elif t >= args.warmup:
                    window[f"charts/{name}"].append(values.mean((1, 2)))
            iteration += 1
            step += steps_per_iteration
            filled = min(iteration, slots) * args.num_envs
            if iteration * T == args.warmup:
                nets["normalizer"].measure(replay["obs"][:, :filled, :-1])
            if args.anneal_lr:
                optimizers["q"].param_groups[0]["lr"] = args.learning_rate * (1 - progress)
            num_updates = args.updates_per_rollout * (iteration * T >= args.warmup)
            for _ in range(num_updates):
                batch = sample(replay, filled, nets["normalizer"], args, streams["replay"])
                batch |= draw_noise(streams["noise"], env, args)
                for name, value in learn(batch).items():
                    window[name].append(value)
            bar.update(steps_per_iteration)

            done = step >= args.total_timesteps
            has_metrics = {"charts/reward", "losses/local"} <= window.keys()
            if has_metrics and (done or step % args.log_interval < steps_per_iteration):
                metrics = {name: torch.stack(values).mean(0) for name, values in window.items()}
                metrics["charts/exploration"] = torch.full((S,), exploration)
                for name, values in robustness.drive(test_lights, [("clean", 0.0)], "test").items():
                    metrics[f"eval/{name}"] = values.mean((1, 2))
                test_streams = new_streams("test")
                batch = sample(replay, filled, nets["normalizer"], args, test_streams)
                batch |= draw_noise(test_streams, env, args)
                for kind in args.regularized:
                    metrics |= diagnose(kind, nets, batch, args)
                speed = S * (step - first_step) / (time.perf_counter() - started)
                metrics["charts/SPS"] = torch.full((S,), speed)
                log(run, step, metrics)
                runs.show_progress(bar, reward=f"{metrics['eval/reward'].mean():.1f}")
                window = defaultdict(list)
                started, first_step = time.perf_counter(), step
            if done or caught or step % args.checkpoint_interval < steps_per_iteration:
                contents = {
                    "args": asdict(args),
                    "nets": {name: net.flat for name, net in nets.items()},
                    "optimizers": optimizers,
                    "streams": streams,
                    "iteration": iteration,
                    "window": window,
                    "rows": run.rows,
                    "replay": {name: values[:, :filled] for name, values in replay.items()},
                    "state": vars(state),
                }
                runs.save(run.dir / "checkpoint.pt", contents)
    bar.close()
    if caught:
        raise KeyboardInterrupt(f"at step {step}")


def main() -> None:
    with runs.exits(2, ValueError, ImportError, OSError):
        args, checkpoint = runs.parse_args(Args, __doc__)
        device = setup(args)
        env = make_env(args, args.num_seeds * args.num_envs, device, horizon=args.horizon)
        runs.check_memory(replace(env, horizon=args.rollout_steps), args)
        nets, optimizers = make_nets(env, args)
        weights = {name: net.flat for name, net in nets.items()}
        if checkpoint:
            runs.restore({"nets": weights}, checkpoint)
        if args.evaluate and not nets["normalizer"].flat.any():
            raise ValueError(f"{args.evaluate} was stopped during its first warm-up and has learnt nothing")
        rows = checkpoint.get("rows", [])
        labels = [{"seed": seed} for seed in args.seeds]
        run = runs.Run(make_run_dir(args, __file__), labels, rows)
    if not args.evaluate:
        with runs.training(run.dir):
            runs.start_wandb(run, args)
            train(env, nets, optimizers, args, run, checkpoint)
            runs.save(run.dir / "policy.pt", {"args": asdict(args), "nets": weights})
    with runs.reporting(run):
        if args.eval_episodes:
            name = "robustness" if args.backend == "torch" else f"robustness_{args.backend}"
            labels = {"env_id": args.env_id, "policy": args.regularizer}
            lights = make_lights(nets, args, device, args.eval_episodes, math.inf)
            robustness.report_lights(lights, robustness.LIGHTS, robustness.NETWORKS, run, labels, name)
        if args.capture_video:
            seconds = min(120, args.eval_seconds)
            env = make_env(replace(args, backend="torch"), args.num_seeds, device, horizon=seconds)
            streams = envs.make_generators(args.seed, args.num_seeds, "video", device)
            envs.write_gif(env, trained_policy(nets, env, args).act, streams, run.dir / "episode.gif")
    print(f"results: {run.dir}")


if __name__ == "__main__":
    main()
