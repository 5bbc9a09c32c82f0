"""ERNIE-COMA: counterfactual multi-agent policy gradients, kept smooth by an adversarial regulariser.

COMA (Foerster et al. 2018, arXiv 1705.08926; ERNIE's appendix E.3) trains a stochastic policy per agent on its own
observation. A central critic sees everybody's observations and what the others do, and has a head for each action of
the agent it is asked about, so that one pass gives the counterfactual advantage: how much better the agent's action was
than its policy's average, the others acting as they did. ERNIE (Bukharin et al. 2023, arXiv 2310.10810) adds the
largest divergence of each policy under a small perturbation of its observation (Eq. 4, 5), found by K steps of
projected gradient ascent through which the gradient of the policy flows (Eq. 6, the Stackelberg game).

    python ernie_coma.py                                          # 2 x 2 traffic lights: minutes on two CPU cores
    python ernie_coma.py --num-seeds 5                            # five runs side by side
    python ernie_coma.py --env-id simple_spread_v3 --epsilon 0.1  # a particle task with discrete actions

Usage, metrics and results: docs/ernie_coma.md.
Differences to the paper (docs/paper_to_code.md): 1 l2 ball in raw units, 2 KL of the policies, 5 on
the on-policy batch, 7 projection after every step, 8 random start, 36 mean instead of sum, 39 Gaussian noise of mean
length epsilon, 41 mean reward.

Axes: S seeds, N agents, B environments of a seed, T steps of a rollout, M = B * T samples, O observation, A action.
What an agent sees, does and is worth is [S, N, M, ...], in rollouts [S, N, B, T, ...]; actions are one-hot.
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
from envs import Env, particle, perturb, robustness, runs, sumo, traffic
from envs.runs import Name, Share, Switch, Threads, arguments, log, make_run_dir, setup

Batch = dict[str, Tensor]  # rollouts, samples and random numbers of an update, or metrics [S]
Generators = list[torch.Generator]  # one per seed
Nets = dict[str, "MLP | Normalizer"]  # actor, critic, critic_target, normalizer
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
    """torch.compile the environment step (traffic: a minute, then 9x as fast) and, on a GPU, the losses; default: the
    step of traffic, where there is a C++ compiler"""
    cuda_graphs: bool = False
    """on a GPU: updates and rollouts (but PettingZoo's) as CUDA graphs, without deterministic algorithms; not measured;
    ignored on a CPU"""
    runs_dir: str = "runs"  # folder that receives a folder per run
    resume: str | None = None  # run folder to continue; other flags are read from it
    evaluate: str | None = None  # run folder or policy file whose policies are evaluated again, without training
    backend: Literal["torch", "sumo"] = "torch"
    """with --evaluate: the batched simulator or SUMO (requirements-sumo.txt), a process per environment"""
    capture_video: bool = False  # write a GIF of the trained policies
    log_interval: PositiveInt = 96_000  # environment steps between two rows of metrics.csv
    checkpoint_interval: PositiveInt = 192_000  # environment steps between two checkpoints
    eval_policy: Literal["greedy", "sample"] = "greedy"  # the likeliest action, or a sample as in training
    eval_episodes: NonNegativeInt | None = None
    """episodes of one seed at each point of the robustness report, 0: none; default: 4 of traffic, 10 of PettingZoo's
    environments, else 1,000"""
    eval_warmup: NonNegativeInt = 1000  # traffic: seconds of random switching before an evaluation (paper: 1,000)
    eval_seconds: PositiveInt = 1000  # traffic: seconds of an evaluation (paper: 4,000)
    eval_norm: Literal["l2", "linf"] = "l2"  # norm of the ball of the report's worst-case observations
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline needs no account; `wandb sync` later
    wandb_project_name: str = "robust-marl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team


@arguments
class COMA:
    env_id: Annotated[str, envs.tasks("traffic", "particle")] = "traffic_grid_v0"
    """traffic_grid_v0, traffic_irregular_v0, traffic_atlanta_v0, a particle task, or PettingZoo's zoo:package.module or
    zoo:namespace/Name-v0"""
    env_kwargs: tuple[str, ...] = ()  # its keywords or constants, name=value or JSON
    cooperators: tuple[str, ...] = ()  # PettingZoo: first letters of the agents that are the team; default: all
    num_workers: PositiveInt | None = None  # PettingZoo: processes for the environments; default: one per core
    num_agents: PositiveInt | None = None  # N where the task allows a choice (simple_spread_v3)
    rows: Side | None = None  # rows of lights; default: the task's own (traffic_grid_v0: 2)
    cols: Side | None = None  # columns of lights; default: the task's own
    flow: tuple[Flow, ...] = ()
    """cars per hour: train or a flow of the paper's table 1, one number, or one per entry; default: the task's own"""
    model: Literal["idm", "krauss"] = "idm"  # car-following model (paper's code: idm)
    total_timesteps: PositiveInt = 480_000  # environment steps (seconds) of one seed (paper: 15,000)
    num_envs: PositiveInt = 32  # B, environments of one seed that step together (paper: 1)
    horizon: PositiveInt | None = None
    """steps of an episode; default: 2,000 s of traffic (paper: 3,000), else the task's own"""
    warmup: NonNegativeInt = 300
    """traffic: of these, seconds of random switching at the start, not learnt from (paper's code: 1,000)"""
    rollout_steps: PositiveInt | None = None
    """T, steps between updates, a divisor of the episode that is learnt from (paper's code: 50); default: 5, of
    PettingZoo's environments the whole episode, which a checkpoint cannot cut"""
    critic_updates: PositiveInt = 4  # gradient steps of the critic on each rollout; the policy takes one
    learning_rate: PositiveFloat = 3e-4  # Adam step size of the policies (paper's code: 5e-5)
    critic_learning_rate: PositiveFloat = 1e-3  # Adam step size of the critic (paper's code: 5e-4)
    anneal_lr: bool = True  # let both step sizes fall linearly to 0
    gamma: Share = 0.995  # discount factor of a step (paper's code: 0.95)
    td_lambda: Share = 0.8  # lambda of the critic's TD(lambda) targets
    advantage: Literal["q", "targets"] = "q"
    """what the action taken was worth: Q(s, a), as in COMA's paper, or its TD(lambda) target"""
    tau: Share = 0.1  # share by which the target critic moves at each of its updates
    hidden_size: PositiveInt = 128  # width of the two hidden layers (paper: 256; its code: 64 in the policies)
    activation: Literal["relu", "silu", "tanh"] = "relu"  # hidden activation
    exploration: Share = 0.02
    """epsilon of the policy (1 - epsilon) softmax + epsilon / A at the start (COMA's paper: 0.5; ERNIE's code: 0.05)"""
    exploration_end: Share = 0.0  # the same at the end, linear in between (COMA's paper: 0.02)
    idle_logit: Annotated[float, Field(ge=-20, le=20)] | None = None
    """head start of action 0 in the untrained policies; default: 3 in traffic, where it keeps the lights for some
    twenty seconds: lights that switch more often jam the streets before they have learnt anything; else 0"""
    entropy_coef: NonNegativeFloat = 0.01  # weight of the policies' entropy at the start
    entropy_coef_end: NonNegativeFloat = 0.0  # the same at the end, linear in between
    normalize_advantage: bool = True  # divide the advantages of a rollout and seed by their standard deviation
    reward_scale: PositiveFloat = 0.01  # factor on the rewards that are learnt from
    team_reward: Literal["own", "mean", "sum"] = "mean"  # an agent learns from its own reward or from its team's
    max_grad_norm: PositiveFloat = 10.0  # the gradient of each network of each seed is clipped to this norm


@arguments
class ERNIE:
    regularizer: Literal["none", "gaussian", "random", "adversarial", "stackelberg"] = "stackelberg"
    """none: COMA; gaussian: appendix H; random: a direction of length epsilon; adversarial: Eq. 4; stackelberg: 6"""
    epsilon: NonNegativeFloat | None = None
    """radius of the perturbation ball; default: 1 in traffic, else 0.1"""
    epsilon_units: Literal["raw", "std"] = "raw"  # of the observation, or its standard deviation under random play
    norm: Literal["l2", "linf"] = "l2"  # norm of the ball
    attack_steps: NonNegativeInt = 3  # K, ascent steps; 0 is the baseline
    attack_lr: PositiveFloat | None = None  # eta, length of an ascent step / epsilon; default: 1 if K = 1, else 2.5 / K
    reg_coef: NonNegativeFloat = 1.0  # lambda, weight of the regulariser (paper's code: 0.1)
    reg_batch_size: PositiveInt = 160  # samples of the rollout on which the regulariser is estimated
    divergence: Literal["kl", "l2_probs", "l2"] = "kl"
    """D: KL of the policies (paper), squared l2 of their probabilities (its code, unsquared) or of their logits"""


@arguments
class Args(ERNIE, COMA, Experiment):
    def __post_init__(self):
        if self.attack_lr is None:
            self.attack_lr = 1.0 if self.attack_steps <= 1 else 2.5 / self.attack_steps
        if self.epsilon is None:
            self.epsilon = 1.0 if self.is_traffic else 0.1
        if self.idle_logit is None:
            self.idle_logit = 3.0 if self.is_traffic else 0.0
        if self.eval_episodes is None:
            few = 4 if self.is_traffic else 10
            self.eval_episodes = few if self.is_traffic or self.is_zoo else 1000
        if self.is_traffic and (self.env_kwargs or self.cooperators):
            raise ValueError("env_kwargs and cooperators must be left out of traffic: it has flags of its own")
        if self.is_traffic and self.horizon is None:
            self.horizon = 2000
        if self.backend != "torch" and not (self.evaluate and self.is_traffic):
            raise ValueError(f"backend must be torch unless evaluate is given, of traffic, got {self.backend}")
        if len(self.flow) > 1 and not all(isinstance(rate, float) for rate in self.flow):
            raise ValueError(f"flow must be a name, or numbers, got {self.flow}")
        if self.is_traffic and self.warmup >= self.horizon:
            raise ValueError(f"warmup must be below horizon, {self.horizon}, got {self.warmup}")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def is_traffic(self) -> bool:
        return self.env_id in traffic.TASKS

    @property
    def is_zoo(self) -> bool:
        return self.env_id.startswith("zoo:")

    @property
    def regularized(self) -> bool:
        """With K, epsilon or lambda at 0 this is COMA, at its speed."""
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


def make_nets(env: Env, args: Args) -> tuple[Nets, dict[str, torch.optim.Optimizer]]:
    """A policy per agent, the critic, its target and the normaliser of observations; an Adam for the policies and one
    for the critic."""
    S = args.num_seeds
    generators = envs.make_generators(args.seed, S, "init", env.device)
    N, O = env.obs_mask.shape
    A = env.action_mask.shape[1]
    hidden = [args.hidden_size] * 2
    actor = init_mlp([O, *hidden, A], args.activation, N, generators)
    _, bias = actor.layers()[-1]
    bias.detach()[:, 0] += args.idle_logit
    critic = init_mlp([N * O + N * A + N, *hidden, A], args.activation, 1, generators)
    nets = {
        "actor": actor,
        "critic": critic,
        "critic_target": replace(critic, flat=critic.flat.detach().clone()),
        "normalizer": Normalizer(torch.zeros(S, N, 2, O, device=env.device)),
    }
    optimizers = {name: torch.optim.Adam([nets[name].flat], fused=True) for name in ("actor", "critic")}
    return nets, optimizers  # of step sizes that `train` sets


def policy(actor: MLP, obs: Tensor, env: Env) -> Tensor:
    """Logits at normalised obs: [S, N, M, O] -> [S, N, M, A], -1e9 of what is not legal."""
    return torch.where(envs.legal_actions(obs, env), actor(obs), -1e9)


def one_hot_best(output: Tensor) -> Tensor:
    """The largest of the last axis as one-hot."""
    return torch.zeros_like(output).scatter(-1, output.argmax(-1, keepdim=True), 1.0)


def mixed_logprobs(output: Tensor, exploration: Tensor) -> Tensor:
    """Log-probabilities [S, N, M, A] of the policies that act: softmax of logits, mixed with the uniform one of what is
    legal."""
    is_legal = output > -1e8
    num_actions = is_legal.sum(-1, keepdim=True).to(output.dtype)
    uniform = torch.where(is_legal, -num_actions.log(), -1e9)
    softmax = torch.log1p(-exploration) + output.log_softmax(-1)
    return torch.logaddexp(softmax, exploration.log() + uniform)


def counterfactual_values(critic: MLP, obs: Tensor, actions: Tensor) -> Tensor:
    """Q(s, (a_-n, .)) [S, N, M, A] of every action of each agent, the others acting as in actions [S, N, M, A]. Inputs
    of the critic: everybody's obs [S, N, M, O], the others' actions and the agent's number; the observations pass the
    first layer once for all agents."""
    N, M, A = actions.shape[1:]
    (weight, bias), *rest = critic.layers()
    state = obs.transpose(1, 2).flatten(2)  # [S, M, N * O]
    state_weight, action_weight, number_weight = weight.split([state.shape[2], N * A, N], 2)
    encoded = torch.baddbmm(bias, state_weight, state.mT)  # [S, H, M]
    is_other = 1 - torch.eye(N, dtype=obs.dtype, device=obs.device)
    others = actions.transpose(1, 2).unsqueeze(2) * is_other.unsqueeze(2)  # [S, M, N, N, A]
    h = torch.bmm(action_weight, others.flatten(3).flatten(1, 2).mT).unflatten(2, (M, N))
    h = (h + encoded.unsqueeze(3) + number_weight.unsqueeze(2)).flatten(2)  # [S, H, M * N]
    for weight, bias in rest:
        h = ACTIVATIONS[critic.activation](h)
        h = torch.baddbmm(bias, weight, h)
    return h.unflatten(2, (M, N)).transpose(1, 3)


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
    """D [S, N, M] of logits [S, N, M, A]: KL(output || clean) of the policies, or squared l2 of logits or of
    probabilities. Squared, because the plain norm has no gradient where the outputs agree."""
    if kind == "kl":
        logprobs, clean_logprobs = output.log_softmax(-1), clean.log_softmax(-1)
        return (logprobs.exp() * (logprobs - clean_logprobs)).sum(-1)
    if kind == "l2_probs":
        output, clean = output.softmax(-1), clean.softmax(-1)
    return (output - clean).square().sum(-1)


def regularizer(nets: Nets, obs: Tensor, clean: Tensor, noise: Tensor, env: Env, args: Args) -> tuple[Tensor, Tensor]:
    """R [S, N, M] of each agent at each normalised observation [S, N, M, O] and its perturbation delta in units of
    epsilon_units; `clean` is the policy's output there, which the loss has too; noise is standard normal. Entries of an
    observation that do not vary stay so."""
    unit = nets["normalizer"].unit(args.epsilon_units) * env.obs_mask[:, None]  # an action mask stays as it is
    live = (unit > 0).to(obs.dtype)  # [S, N, 1, O]
    noise = noise * live

    def change(delta: Tensor) -> Tensor:
        return divergence(args.divergence, policy(nets["actor"], obs + unit * delta, env), clean)

    if args.regularizer == "gaussian":  # of mean length epsilon
        delta = noise * args.epsilon / perturb.mean_length(live)
    elif args.regularizer == "random":
        delta = perturb.rescale(noise, args.epsilon, args.norm)
    else:
        start = perturb.rescale(noise, 0.5 * args.epsilon, args.norm)  # at 0 the divergence has no gradient
        size = args.attack_lr * perturb.reach(args.epsilon, live, args.norm)
        ball = partial(perturb.project, epsilon=args.epsilon, norm=args.norm)
        delta = unroll(change, start, args.attack_steps, size, ball, args.regularizer == "stackelberg")
    return change(delta), delta


def diagnose(nets: Nets, obs: Tensor, noise: Tensor, env: Env, args: Args) -> Batch:
    """R under attack and in a random direction, the share of attacks that reach the sphere, and of the Stackelberg
    gradient the leader-follower term: its norm relative to the leader's, and their cosine. Over cooperators, [S]."""
    team = env.cooperators
    actor = nets["actor"]
    clean = policy(actor, obs, env)
    changes, gradients = {}, {}
    for mode in ("random", "adversarial", "stackelberg"):
        change, delta = regularizer(nets, obs, clean, noise, env, replace(args, regularizer=mode))
        change = change[:, team].mean(2)  # [S, N]
        changes[mode] = change.mean(1)
        (gradient,) = torch.autograd.grad(change.sum(), actor.flat, retain_graph=True)
        gradients[mode] = gradient.view(len(obs), -1)
    leader = gradients["adversarial"]
    follower = gradients["stackelberg"] - leader
    length = perturb.length(delta[:, team].detach(), args.norm)
    at_edge = length >= 0.999 * args.epsilon
    return {
        "ernie/attack": changes["stackelberg"],
        "ernie/random_direction": changes["random"],
        "ernie/perturbation_norm": length.mean((1, 2, 3)),
        "ernie/saturation": at_edge.to(obs.dtype).mean((1, 2, 3)),
        "ernie/interaction_ratio": follower.norm(dim=1) / leader.norm(dim=1).clamp_min(1e-12),
        "ernie/interaction_cosine": F.cosine_similarity(follower, leader, dim=1),
    }


# --------------------------------------------------------------------------------------------------------------------
# Losses and update. Losses are means over samples and sums over seeds and, of actors, agents, which do not share
# parameters.


def td_lambda_targets(
    rewards: Tensor, values: Tensor, terminated: Tensor, args: Args, live: Tensor | None = None
) -> Tensor:
    """TD(lambda) targets [S, N, B, T]: G_t = r_t + gamma ((1 - lambda) Q_t+1 + lambda G_t+1), G_T = Q_T. rewards [S, N,
    B, T]; values [S, N, B, T + 1] are Q of the actions that were taken; terminated [S, 1 or N, B, T]. Where an agent is
    not `live`, it had ended, and G is Q: the step before was cut, not terminated."""
    target = values[..., -1]
    targets = []
    for t in reversed(range(rewards.shape[-1])):
        blend = (1 - args.td_lambda) * values[..., t + 1] + args.td_lambda * target
        target = rewards[..., t] + args.gamma * (1 - terminated[..., t]) * blend
        if live is not None:
            target = torch.where(live[..., t] > 0, target, values[..., t])
        targets.append(target)
    return torch.stack(targets[::-1], -1)


def team_rewards(rewards: Tensor, env: Env, args: Args) -> Tensor:
    """What each agent learns from [S, N, B, T]: its own reward, or its team's mean or sum."""
    if args.team_reward == "own":
        return rewards
    share = (env.cooperators[:, None] == env.cooperators).to(rewards.dtype)  # [N, N]
    if args.team_reward == "mean":
        share = share / share.sum(0)
    return torch.einsum("nk,sk...->sn...", share, rewards)


@torch.no_grad()
def prepare(nets: Nets, episodes: Batch, policy_steps: int, env: Env, args: Args) -> Batch:
    """Samples of a rollout for the losses, [S, N, M, ...]. Raises ValueError if it was played with other policies
    than those of now: COMA's gradient holds for their own actions only."""
    if episodes["policy_steps"] != policy_steps:
        raise ValueError(f"the rollout is of policies after {episodes['policy_steps']} steps, not {policy_steps}")
    obs, actions = episodes["obs"], episodes["actions"]  # [S, N, B, T + 1, ...]
    q = counterfactual_values(nets["critic_target"], obs.flatten(2, 3), actions.flatten(2, 3))
    q = q.unflatten(2, obs.shape[2:4])
    rewards = args.reward_scale * team_rewards(episodes["rewards"], env, args)
    live = episodes.get("live")
    targets = td_lambda_targets(rewards, (q * actions).sum(-1), episodes["terminated"], args, live)
    samples = {name: episodes[name] for name in ("exploration", "entropy_coef")}
    samples["obs"] = obs[:, :, :, :-1].flatten(2, 3)
    samples["actions"] = actions[:, :, :, :-1].flatten(2, 3)
    samples["targets"] = targets.flatten(2)
    if live is not None:
        samples["live"] = live.flatten(2)
    return samples


def critic_loss(nets: Nets, batch: Batch, env: Env, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: L(theta^c) of appendix E.3, squared error of the values of the actions that were taken, with
    TD(lambda) targets. Returns loss, metrics [S]."""
    q = counterfactual_values(nets["critic"], batch["obs"], batch["actions"])
    taken = (q * batch["actions"]).sum(-1)
    mean = partial(envs.live_mean, live=batch.get("live"))
    loss = 0.5 * mean((taken - batch["targets"]).square()).mean(1)
    return loss.sum(), {"losses/critic": loss.detach(), "losses/q_values": mean(taken.detach()).mean(1)}


def actor_loss(nets: Nets, batch: Batch, env: Env, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: Eq. (16) of appendix E.3, -E[sum_n log pi_n A_n], minus the entropy bonus, plus lambda R (Eq. 5) of
    cooperating agents. A_n(s, a) = Q(s, a) - sum_a' pi_n(a' | o_n) Q(s, (a_-n, a')), or with the target
    in place of Q(s, a). Returns loss, metrics [S]."""
    obs, actions = batch["obs"], batch["actions"]
    live = batch.get("live")
    mean = partial(envs.live_mean, live=live)
    output = policy(nets["actor"], obs, env)  # [S, N, M, A]
    logprobs = mixed_logprobs(output, batch["exploration"])
    with torch.no_grad():
        q = counterfactual_values(nets["critic"], obs, actions)
        advantages = ((actions - logprobs.exp()) * q).sum(-1)  # [S, N, M]
        if args.advantage == "targets":
            advantages = advantages + batch["targets"] - (actions * q).sum(-1)
        spread = envs.std_mean(advantages, (1, 2), live)[0].flatten() + 1e-8  # [S]
        if args.normalize_advantage:
            advantages = advantages / spread[:, None, None]
    entropy = mean(-(logprobs.exp() * logprobs).sum(-1))  # [S, N]
    gain = mean((logprobs * actions).sum(-1) * advantages)
    loss = -gain - batch["entropy_coef"] * entropy
    metrics = {
        "losses/policy": -gain.detach().mean(1),
        "losses/entropy": entropy.detach().mean(1),
        "losses/advantage_std": spread,
    }
    if args.regularized:
        obs, clean = obs[:, :, : args.reg_batch_size], output[:, :, : args.reg_batch_size]
        change, _ = regularizer(nets, obs, clean, batch["perturbation"], env, args)
        change = mean(change)  # [S, N]
        loss = loss + args.reg_coef * change * env.cooperators
        metrics["ernie/regularizer"] = envs.team_mean(change.detach(), env)
    return loss.sum(), metrics


def update(nets: Nets, optimizers: dict, losses: dict, batch: Batch, env: Env, args: Args) -> Batch:
    """Steps of the critic, each followed by its target, then one of all actors. Each network's gradient is clipped on
    its own. Returns metrics [S]."""
    metrics = {}
    for name in ["critic"] * args.critic_updates + ["actor"]:
        loss, new_metrics = losses[name](nets, batch, env, args)
        metrics.update(new_metrics)
        flat = nets[name].flat
        (gradient,) = torch.autograd.grad(loss, flat)
        flat.grad = perturb.project(gradient, args.max_grad_norm, "l2")
        optimizers[name].step()
        if name == "critic":
            nets["critic_target"].flat.lerp_(flat.detach(), args.tau)
    return metrics


# --------------------------------------------------------------------------------------------------------------------
# Rollout of a few steps of long episodes, whose state goes on in the next one


def draw_rollout(env: Env, generators: Generators, args: Args) -> tuple[Tensor, list]:
    """The random numbers of a rollout: of actions, [S, T + 1, N, B, A], and of each step of the environments."""
    shape = (args.rollout_steps + 1, args.num_envs, *env.action_mask.shape)
    noise = envs.per_seed(envs.gumbel, shape, generators).transpose(2, 3)
    return noise, [env.draw(generators) for _ in range(args.rollout_steps)]


@torch.no_grad()
def rollout(
    step_env: Callable, env: Env, nets: Nets, start: tuple, draws: tuple, schedule: Batch
) -> tuple[tuple, Batch, Batch]:
    """T steps of every environment from `start`, state and obs, with sampled actions. Returns where they end, the
    rollout, and mean outcomes [S]. The rollout: obs, normalised, and actions [S, N, B, T + 1, ...], the last one
    not played, rewards [S, N, B, T], terminated [S, 1, B, T] and `schedule`. Of PettingZoo's environments terminated is
    each agent's, and `live` [S, N, B, T] is 0 where it had ended before: one episode follows another there."""
    noise, env_noise = draws
    state, obs = start
    S = len(noise)
    steps, outcomes = defaultdict(list), defaultdict(list)

    def act(obs: Tensor, action_noise: Tensor) -> Tensor:
        seen = nets["normalizer"](envs.by_agent(obs, S))
        logprobs = mixed_logprobs(policy(nets["actor"], seen, env), schedule["exploration"])
        action = one_hot_best(logprobs + action_noise)
        steps["obs"].append(seen)
        steps["actions"].append(action)
        return envs.for_env(action, env)

    action = act(obs, noise[:, 0])
    for t, step_noise in enumerate(env_noise, 1):
        state, obs, reward, terminated, _, info = step_env(state, action, step_noise)
        action = act(obs, noise[:, t])
        steps["rewards"].append(envs.by_agent(reward, S))
        ended = info.get("terminated", terminated[:, None])
        steps["terminated"].append(envs.by_agent(ended.to(reward.dtype), S))
        if "live" in info:
            steps["live"].append(envs.by_agent(info["live"], S))
        is_traffic = isinstance(env, traffic.Traffic)
        outcome = traffic.outcome(reward, info) if is_traffic else {"reward": envs.team_mean(reward, env)}
        for name, values in outcome.items():
            outcomes[f"charts/{name}"].append(values)
    episodes = {name: torch.stack(values, 3) for name, values in steps.items()}
    outcomes = {name: torch.stack(values, 1).view(S, -1).mean(1) for name, values in outcomes.items()}
    return (state, obs), episodes | schedule, outcomes


def draw_noise(generators: Generators, env: Env, args: Args) -> Batch:
    """The random numbers of one update, drawn outside what may be compiled."""
    if not args.regularized:
        return {}
    N, O = env.obs_mask.shape
    shape = (N, min(args.num_envs * args.rollout_steps, args.reg_batch_size), O)
    return {"perturbation": envs.per_seed(torch.randn, shape, generators)}


# --------------------------------------------------------------------------------------------------------------------
# Robustness evaluation, by envs/robustness.py

SWEEP = {  # perturbation of a particle task: strengths; those of lights are robustness.LIGHTS
    "gaussian": (0.1, 0.2, 0.5, 1.0),  # observation noise, standard deviation
    "mad": (0.1, 0.3, 1.0),  # radius in standard deviations; the observations that change the policy most
    "executed": (0.1, 0.3, 1.0),  # the same; the observations that change the action that is played most
    "critic": (0.1, 0.3, 1.0),  # the same; the observations whose action the critic likes least
    "random_action": (0.05, 0.2, 0.5),  # probability that one cooperating agent acts at random in a step
    "worst_action": (0.05, 0.2, 0.5),  # the same, with the action that the critic likes least
    "damping": (0.5, 2.0),  # factors on physical constants
    "mass": (0.5, 2.0),
    "max_speed_scale": (0.5, 2.0),
    "contact_force": (0.5, 2.0),
}


def trained_policy(nets: Nets, env: Env, args: Args) -> robustness.Policy:
    """The likeliest actions, or samples, at observations as the environment gives them, and what attacks on them
    maximise; the critic sees the true observations. Where env has more lights than were trained, they are tiled."""
    agents = slice(None)
    if args.is_traffic:
        trained = make_env(args, 1, env.device)
        agents = traffic.twins(env, trained.rows, trained.cols)
    flat = nets["actor"].flat.detach().unflatten(0, (args.num_seeds, -1))
    actor = replace(nets["actor"], flat=flat[:, agents].flatten(0, 1))
    normalizer = Normalizer(nets["normalizer"].flat[:, agents])
    streams = envs.make_generators(args.seed, args.num_seeds, "evaluated actions", env.device)

    def output(obs: Tensor) -> Tensor:
        return policy(actor, normalizer(obs), env)

    def to_action(logits: Tensor) -> Tensor:
        if args.eval_policy == "sample":
            logits = logits + envs.per_seed(envs.gumbel, logits.shape[1:], streams)
        return one_hot_best(logits)

    def q_values(obs: Tensor, actions: Tensor) -> Tensor:
        return counterfactual_values(nets["critic"], normalizer(obs), actions)

    def dislike(obs: Tensor) -> Callable:
        q = q_values(obs, one_hot_best(output(obs)))
        return lambda seen: -(output(seen).softmax(-1) * q).sum(-1)  # an argmax has no gradient

    def team_value(obs: Tensor, actions: Tensor) -> Tensor:
        values = (q_values(obs, actions) * actions).sum(-1)
        return values[:, env.cooperators].mean(1)

    return robustness.Policy(
        output=output,
        to_action=to_action,
        divergence=partial(divergence, "kl"),
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


def assess(nets: Nets, batch: Batch, env: Env, args: Args) -> Batch:
    """How the policies do in a short evaluation, and `diagnose` on the newest rollout, [S]."""
    streams = envs.make_generators(args.seed, args.num_seeds, "test", env.device)
    if args.is_traffic:
        lights = make_lights(nets, args, env.device, 2, 300)
        outcomes = robustness.drive(lights, [("clean", 0.0)], "test")
    else:
        test_env = envs.for_tests(env, args.num_seeds * min(100, args.eval_episodes or 10))
        returns = robustness.evaluate(test_env, trained_policy(nets, test_env, args), streams)
        outcomes = {"reward": envs.team_mean(returns, env)}
    metrics = {f"eval/{name}": values.flatten(1).mean(1) for name, values in outcomes.items()}
    if args.regularized:
        noise = draw_noise(streams, env, args)["perturbation"]
        metrics |= diagnose(nets, batch["obs"][:, :, : args.reg_batch_size], noise, env, args)
    return metrics


# --------------------------------------------------------------------------------------------------------------------
# Environment


def make_env(args: Args, num_envs: int, device: torch.device, **lights) -> Env:
    """The task of `args`, of traffic with other fields, or other traffic where they name its env_id; in SUMO if the
    backend is."""
    task = {"env_id": args.env_id, "num_agents": args.num_agents, "rows": args.rows, "cols": args.cols}
    if args.flow:
        task["flow"] = args.flow if len(args.flow) > 1 else args.flow[0]
    fields = {name: value for name, value in task.items() if value is not None}
    if args.is_traffic:
        fields = lights if "env_id" in lights else fields | lights
        fields["model"] = args.model
    else:
        fields |= envs.task_options(args)
    env = envs.make(num_envs=num_envs, device=device, continuous_actions=False, **fields)
    env = envs.for_training(env, args)
    if not env.discrete:
        raise ValueError(f"--env-id must have discrete actions, got {args.env_id}")
    return sumo.from_traffic(env) if args.backend == "sumo" else env


load_policy = robustness.loader(Args, make_env, make_nets, trained_policy)  # act = load_policy("runs/RUN")


# --------------------------------------------------------------------------------------------------------------------
# Training


def compiled(env: Env, args: Args) -> tuple[Callable, dict[str, Callable]]:
    """The environment's step and the losses, compiled where that is asked for and right."""
    losses = {"critic": critic_loss, "actor": actor_loss}
    if args.compile is False or args.backend == "sumo":
        return env.step, losses
    options = {"comprehensive_padding": False}  # with it gradients are wrong on GPUs
    compile = partial(torch.compile, fullgraph=True, dynamic=False, options=options)
    if args.compile and env.device.type == "cuda":  # on CPUs torch 2.13 gets the gradient through an attack wrong
        losses = {name: compile(loss) for name, loss in losses.items()}
    if args.is_traffic:
        return traffic.compiled_step(env), losses
    return compile(env.step) if args.compile and not args.is_zoo else env.step, losses


def train(env: Env, nets: Nets, optimizers: dict, args: Args, run: runs.Run, checkpoint: dict) -> None:
    """Train from the start or from a checkpoint; a signal ends it, after a checkpoint, with KeyboardInterrupt."""
    S, T = args.num_seeds, args.rollout_steps
    step_env, losses = compiled(env, args)
    learn = partial(update, nets, optimizers, losses, env=env, args=args)
    play = partial(rollout, step_env, env, nets)
    if args.cuda_graphs:
        learn = envs.graphed(learn, env.device, optimizers)
        if not args.is_zoo:
            play = envs.graphed(play, env.device)
    reset = partial(env.reset, step=step_env) if args.is_traffic else env.reset
    skipped = args.num_envs * args.warmup if args.is_traffic else 0  # steps before the first rollout of an episode
    new_streams = partial(envs.make_generators, args.seed, S, device=env.device)
    streams = {purpose: new_streams(purpose) for purpose in ("rollout", "noise")}
    iteration = 0
    step = 0
    window = defaultdict(list)  # metrics [S] since the last row of metrics.csv
    if checkpoint:
        with runs.exits(2, ValueError):
            live = {"optimizers": optimizers, "streams": streams, "iteration": 0, "step": 0, "window": {}, "state": {}}
            runs.restore(live, checkpoint)
        iteration, step = checkpoint["iteration"], checkpoint["step"]
        if checkpoint["state"]:
            module = traffic if args.is_traffic else particle
            state = module.State(**runs.moved(checkpoint["state"], env.device))
            start = (state, env.observe(state))
        window.update(runs.moved(checkpoint["window"], env.device))
    else:
        period, norm_env = 1, env
        if args.is_traffic:  # lights switch every tenth second with probability 1/2, as in the paper's warm-up
            period, norm_env = 10, replace(env, warmup=0, horizon=args.horizon)
        moments = perturb.observation_moments(step_env, norm_env, new_streams("norm"), period)
        nets["normalizer"].flat.copy_(moments)

    started, first_step = time.perf_counter(), step
    bar = runs.progress_bar(args.total_timesteps, step)
    with runs.stop_signals() as caught:
        while step < args.total_timesteps and not caught:
            progress, last_step = step / args.total_timesteps, step
            if iteration * T % env.horizon == 0:
                start = reset(streams["rollout"])
                step += skipped
            exploration = args.exploration + (args.exploration_end - args.exploration) * progress
            entropy_coef = args.entropy_coef + (args.entropy_coef_end - args.entropy_coef) * progress
            schedule = {
                "exploration": torch.tensor(exploration, device=env.device),
                "entropy_coef": torch.tensor(entropy_coef, device=env.device),
                "policy_steps": torch.tensor(iteration),
            }
            draws = draw_rollout(env, streams["rollout"], args)
            start, episodes, outcomes = play(start, draws, schedule)
            batch = prepare(nets, episodes, iteration, env, args) | draw_noise(streams["noise"], env, args)
            remaining = 1 - progress if args.anneal_lr else 1.0
            optimizers["actor"].param_groups[0]["lr"] = args.learning_rate * remaining
            optimizers["critic"].param_groups[0]["lr"] = args.critic_learning_rate * remaining
            metrics = learn(batch)
            for name, value in (outcomes | metrics).items():
                window[name].append(value)
            iteration += 1
            step += args.num_envs * T
            bar.update(step - last_step)

            done = step >= args.total_timesteps
            if done or step % args.log_interval < step - last_step:
                metrics = {name: torch.stack(values, 1).mean(1) for name, values in window.items()}
                metrics |= assess(nets, batch, env, args)
                speed = S * (step - first_step) / (time.perf_counter() - started)
                metrics["charts/SPS"] = torch.full((S,), speed)
                log(run, step, metrics)
                runs.show_progress(bar, reward=f"{metrics['eval/reward'].mean():.1f}")
                window = defaultdict(list)
                started, first_step = time.perf_counter(), step
            if done or caught or step % args.checkpoint_interval < step - last_step:
                contents = {
                    "args": asdict(args),
                    "nets": {name: net.flat for name, net in nets.items()},
                    "optimizers": optimizers,
                    "streams": streams,
                    "iteration": iteration,
                    "step": step,
                    "window": window,
                    "rows": run.rows,
                    "state": vars(start[0]) if iteration * T % env.horizon else {},  # in the middle of an episode
                }
                runs.save(run.dir / "checkpoint.pt", contents)
    bar.close()
    if caught:
        raise KeyboardInterrupt(f"at step {step}")


def main() -> None:
    with runs.exits(2, ValueError, ImportError, OSError):
        args, checkpoint = runs.parse_args(Args, __doc__)
        device = setup(args)
        lights = {"warmup": args.warmup, "horizon": args.horizon - args.warmup} if args.is_traffic else {}
        env = make_env(args, args.num_seeds * args.num_envs, device, **lights)
        args.rollout_steps = args.rollout_steps or (env.horizon if args.is_zoo else 5)
        num_rollouts, rest = divmod(env.horizon, args.rollout_steps)
        if rest or (args.is_zoo and num_rollouts > 1):
            raise ValueError(f"--rollout-steps must fit an episode's {env.horizon} steps, got {args.rollout_steps}")
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
        labels = {"env_id": args.env_id, "policy": args.regularizer}
        if args.eval_episodes and args.is_traffic:
            name = "robustness" if args.backend == "torch" else "robustness_sumo"
            lights = make_lights(nets, args, device, args.eval_episodes, math.inf)
            robustness.report_lights(lights, robustness.LIGHTS, robustness.NETWORKS, run, labels, name)
        elif args.eval_episodes:
            test_env = envs.for_tests(env, args.num_seeds * args.eval_episodes)
            robustness.report(test_env, make_policy, SWEEP, run, labels)
        if args.capture_video:
            env = envs.for_tests(env, args.num_seeds)
            if args.is_traffic:
                seconds = min(120, args.eval_seconds)
                env = make_env(replace(args, backend="torch"), args.num_seeds, device, horizon=seconds)
            streams = envs.make_generators(args.seed, args.num_seeds, "video", device)
            envs.write_gif(env, make_policy(env).act, streams, run.dir / "episode.gif")
    print(f"results: {run.dir}")


if __name__ == "__main__":
    main()
