"""ERNIE-MAPPO: multi-agent PPO whose policies are kept smooth by an adversarial regulariser.

MAPPO (Yu et al. 2022, arXiv 2103.01955) trains a stochastic policy per agent on its own observation with PPO's clipped
objective (Schulman et al. 2017, arXiv 1707.06347); advantages come from a central value function that sees everybody's
observations and is trained on normalised returns. ERNIE (Bukharin et al. 2023, arXiv 2310.10810; appendix D.1) adds the
largest KL divergence of each policy under a small perturbation of its observation (Eq. 4, 5), found by K steps of
projected gradient ascent through which the gradient of the policy flows (Eq. 6, the Stackelberg game).

    python ernie_mappo.py --epsilon 0.1                                     # two quadcopters, minutes on two CPU cores
    python ernie_mappo.py --env-id leader_follower_v1 --num-agents 4        # three followers, in three dimensions
    python ernie_mappo.py --env-id simple_spread_v3 --no-continuous-actions --num-seeds 5 --share-parameters

Usage, metrics and results: docs/ernie_mappo.md.
Differences to the paper (docs/paper_to_code.md): 1 l2 ball, 5 on the on-policy batch, 7 projection after every
step, 8 random start, 36 mean instead of sum, 39 Gaussian noise of mean length epsilon. Appendix D.1 gives neither
settings nor figures: task and hyper-parameters are ours.

Axes: S seeds, N agents, B environments of a seed, T steps of an episode, M = B * T samples or those of a minibatch, O
observation, A action. What an agent sees, does and is worth is [S, N, M, ...], in episodes [S, N, B, T, ...]. Policies
put out logits [S, N, M, A] or, with continuous actions, mean and log standard deviation side by side, [S, N, M, 2 A].
"""

import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
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
from envs import Env, Moments, bullet, drones, perturb, robustness, runs
from envs.runs import Name, Share, Threads, arguments, log, make_run_dir, setup

Batch = dict[str, Tensor]  # episodes, samples and random numbers of an update, or metrics [S]
Generators = list[torch.Generator]  # one per seed
Nets = dict[str, "MLP | Normalizer | Moments"]  # actor, critic, normalizer, return_moments


@arguments
class Experiment:
    exp_name: Name = Path(__file__).stem  # name of this experiment
    seed: NonNegativeInt = 1  # seed of the first run; run k uses seed + k
    num_seeds: PositiveInt = 1  # S, independent runs trained side by side (paper: five)
    torch_deterministic: bool = True  # deterministic algorithms only: same seed, same machine, same numbers
    cuda: bool = True  # use the GPU if there is one
    num_threads: Threads = 1  # CPU threads; with more set OMP_WAIT_POLICY=PASSIVE, or one busy core stalls all
    compile: bool = False  # torch.compile the environment step and, on a GPU, the losses
    cuda_graphs: bool = False
    """on a GPU: updates and rollouts (but PettingZoo's) as CUDA graphs, without deterministic algorithms; not measured;
    ignored on a CPU"""
    runs_dir: str = "runs"  # folder that receives a folder per run
    resume: str | None = None  # run folder to continue; other flags are read from it
    evaluate: str | None = None  # run folder or policy file whose policies are evaluated again, without training
    backend: Literal["torch", "pybullet"] = "torch"  # with --evaluate: the batched quadcopters or Bullet's
    capture_video: bool = False  # write a GIF of an episode of the trained policy
    log_interval: PositiveInt = 50_000  # environment steps between two rows of metrics.csv
    checkpoint_interval: PositiveInt = 200_000  # environment steps between two checkpoints
    eval_episodes: NonNegativeInt | None = None
    """episodes of one seed at each point of the robustness report, 0: none; default: 200 of drones, 10 of PettingZoo's
    environments, else 1,000"""
    eval_norm: Literal["l2", "linf"] = "l2"  # norm of the ball of the report's worst-case observations
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline needs no account; `wandb sync` later
    wandb_project_name: str = "robust-marl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team


@arguments
class MAPPO:
    env_id: Annotated[str, envs.tasks("drones", "particle", "traffic")] = "leader_follower_v0"
    """leader_follower_v0, leader_follower_v1, hover_v0, a particle or traffic task, or PettingZoo's zoo:package.module
    or zoo:namespace/Name-v0"""
    env_kwargs: tuple[str, ...] = ()  # its keywords or constants, name=value or JSON
    horizon: PositiveInt | None = None  # steps after which an episode is cut; default: the task's own
    cooperators: tuple[str, ...] = ()  # PettingZoo: first letters of the agents that are the team; default: all
    num_workers: PositiveInt | None = None  # PettingZoo: processes for the environments; default: one per core
    num_agents: PositiveInt | None = None  # N where the task allows a choice (drones, simple_spread_v3)
    continuous_actions: bool = True  # or discrete ones; drones have continuous ones
    total_timesteps: PositiveInt = 1_000_000  # environment steps of one seed
    num_envs: PositiveInt = 64  # B, environments of one seed that step together
    share_parameters: bool = False  # one policy for all agents, which is told the agent's number, instead of one each
    state_dependent_std: bool = False  # continuous: a standard deviation per observation instead of one per action
    init_std: Annotated[float, Field(ge=0.01, le=7)] = 0.5
    """continuous actions: first standard deviation, in half-widths of the action range"""
    hidden_size: PositiveInt = 64  # width of the two hidden layers
    activation: Literal["relu", "silu", "tanh"] = "tanh"  # hidden activation
    learning_rate: PositiveFloat = 2e-3  # Adam step size
    anneal_lr: bool = True  # let the step size fall linearly to 0
    gamma: Share = 0.95  # discount factor
    gae_lambda: Share = 0.95  # lambda of generalised advantage estimation
    update_epochs: PositiveInt = 10  # passes over the episodes of an iteration
    num_minibatches: PositiveInt = 8  # minibatches of a pass
    clip_coef: PositiveFloat = 0.2  # PPO's clipping of the probability ratio
    clip_vloss: bool = True  # clip the change of the values too
    entropy_coef: NonNegativeFloat = 0.0  # weight of the policies' entropy
    normalize_advantage: bool = True  # advantages of an iteration have mean 0 and deviation 1, per seed and agent
    value_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """weight of the past in the running moments by which returns are normalised, per seed and agent"""
    reward_scale: PositiveFloat = 1.0  # factor on the rewards that are learnt from
    team_reward: Literal["own", "mean", "sum"] = "own"  # an agent learns from its own reward or from its team's
    max_grad_norm: PositiveFloat = 0.5  # the gradient of each network of each seed is clipped to this norm


@arguments
class ERNIE:
    regularizer: Literal["none", "gaussian", "random", "adversarial", "stackelberg"] = "stackelberg"
    """none: MAPPO; gaussian: appendix H; random: a direction of length epsilon; adversarial: Eq. 4; stackelberg: 6"""
    epsilon: NonNegativeFloat = 0.3  # radius of the perturbation ball
    epsilon_units: Literal["raw", "std"] = "std"  # of the observation, or its standard deviation under random play
    norm: Literal["l2", "linf"] = "l2"  # norm of the ball
    attack_steps: NonNegativeInt = 3  # K, ascent steps; 0 is the baseline
    attack_lr: PositiveFloat | None = None  # eta, length of an ascent step / epsilon; default: 1 if K = 1, else 2.5 / K
    reg_coef: NonNegativeFloat = 0.1  # lambda, weight of the regulariser
    reg_batch_size: PositiveInt = 256  # samples of the minibatch on which the regulariser is estimated
    divergence: Literal["auto", "kl", "kl_normal", "l2", "l2_probs"] = "auto"
    """D: KL of the policies (auto; kl_normal with continuous actions), squared l2 of outputs or of probabilities"""
    detach_std: bool = True  # D takes standard deviations for constants: to raise them is the easiest way to a small KL


@arguments
class Args(ERNIE, MAPPO, Experiment):
    def __post_init__(self):
        kinds = ("kl_normal", "l2") if self.continuous_actions else ("kl", "l2", "l2_probs")
        if self.divergence == "auto":
            self.divergence = kinds[0]
        if self.attack_lr is None:
            self.attack_lr = 1.0 if self.attack_steps <= 1 else 2.5 / self.attack_steps
        if self.eval_episodes is None:
            few = 200 if self.is_drones else 10
            self.eval_episodes = few if self.is_drones or self.is_zoo else 1000
        if self.divergence not in kinds:
            raise ValueError(f"divergence must be one of {kinds} with these actions, got {self.divergence}")
        if self.backend != "torch" and not (self.evaluate and self.is_drones):
            raise ValueError(f"backend must be torch unless evaluate is given, of drones, got {self.backend}")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def is_drones(self) -> bool:
        return self.env_id in drones.TASKS

    @property
    def is_zoo(self) -> bool:
        return self.env_id.startswith("zoo:")

    @property
    def regularized(self) -> bool:
        """With K, epsilon or lambda at 0 this is MAPPO, at its speed."""
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


def orthogonal_mlp(sizes: list[int], activation: str, num_agents: int, last_gain: float, generators: Generators) -> MLP:
    """Orthogonal weights of gain sqrt(2), in the last layer `last_gain`; biases 0."""
    used = sum((n_in + 1) * n_out for n_in, n_out in pairwise(sizes))
    flat = torch.zeros(len(generators) * num_agents, used + -used % 16, device=generators[0].device)
    net = MLP(flat, sizes, activation)
    gains = [math.sqrt(2)] * (len(sizes) - 2) + [last_gain]
    for (weight, _), gain in zip(net.layers(), gains):
        _, rows, columns = weight.shape
        tall = (num_agents, max(rows, columns), min(rows, columns))
        normal = envs.per_seed(torch.randn, tall, generators)
        q, r = torch.linalg.qr(normal.flatten(0, 1))
        q = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)  # uniform over orthogonal matrices
        weight += gain * (q if rows >= columns else q.mT)
    flat.requires_grad_()
    return net


def make_nets(env: Env, args: Args) -> tuple[Nets, dict[str, torch.optim.Optimizer]]:
    """Actors, or the one that all share, a critic with a value per agent, and what normalises observations and returns;
    one Adam."""
    generators = envs.make_generators(args.seed, args.num_seeds, "init", env.device)
    S = args.num_seeds
    N, O = env.obs_mask.shape
    A = env.action_mask.shape[1]
    hidden = [args.hidden_size] * 2
    inputs, actors = (O + N, 1) if args.share_parameters else (O, N)
    outputs = A if env.discrete else 2 * A
    actor = orthogonal_mlp([inputs, *hidden, outputs], args.activation, actors, 0.01, generators)
    critic = orthogonal_mlp([N * O, *hidden, N], args.activation, 1, 1.0, generators)
    if not env.discrete:
        _, bias = actor.layers()[-1]
        bias.detach()[:, A:] = math.log(args.init_std)
    nets = {
        "actor": actor,
        "critic": critic,
        "normalizer": Normalizer(torch.zeros(S, N, 2, O, device=env.device)),
        "return_moments": Moments(torch.zeros(S, N, 3, dtype=torch.float64, device=env.device)),
    }
    return nets, {"adam": torch.optim.Adam([actor.flat, critic.flat], args.learning_rate, eps=1e-5, fused=True)}


def policy(actor: MLP, obs: Tensor, env: Env, args: Args) -> Tensor:
    """Logits, -1e9 of what is not legal, or means and log standard deviations, 0 in padding, [S, N, M, A or 2 A], at
    normalised obs [S, N, M, O]."""
    S, N, M, _ = obs.shape
    legal = envs.legal_actions(obs, env)
    if args.share_parameters:
        number = torch.eye(N, device=obs.device)[:, None]
        obs = torch.cat([obs, number.expand(S, N, M, N)], -1)
        obs = obs.flatten(1, 2).unsqueeze(1)
    output = actor(obs).view(S, N, M, -1)
    if env.discrete:
        return torch.where(legal, output, -1e9)
    mean, log_std = output.chunk(2, -1)
    if not args.state_dependent_std:  # the bias alone
        _, bias = actor.layers()[-1]
        _, log_std = bias.mT.unflatten(0, (S, -1)).chunk(2, -1)
    log_std = log_std.clamp(-5, 2).expand_as(mean)
    return torch.cat([mean, log_std], -1) * env.action_mask.repeat(1, 2)[:, None]


def logprob_and_entropy(output: Tensor, action: Tensor, env: Env) -> tuple[Tensor, Tensor]:
    """log pi(action) and entropy [S, N, M] of policies at actions [S, N, M, A], one-hot, or normal and not clipped."""
    if env.discrete:
        logprobs = output.log_softmax(-1)
        return (logprobs * action).sum(-1), -(logprobs.exp() * logprobs).sum(-1)
    mean, log_std = output.chunk(2, -1)
    live = env.action_mask[:, None]
    distance = (action - mean) / log_std.exp()
    log_scale = log_std + 0.5 * math.log(2 * math.pi)
    logprobs = -0.5 * distance.square() - log_scale
    entropy = 0.5 + log_scale
    return (logprobs * live).sum(-1), (entropy * live).sum(-1)


def draw_action(output: Tensor, noise: Tensor | float, env: Env) -> Tensor:
    """A sample [S, N, M, A] of policies, one-hot by Gumbel noise or normal; without noise (0) the likeliest action."""
    if env.discrete:
        best = (output + noise).argmax(-1, keepdim=True)
        return torch.zeros_like(output).scatter(-1, best, 1.0)
    mean, log_std = output.chunk(2, -1)
    return (mean + log_std.exp() * noise) * env.action_mask[:, None]


def squash(action: Tensor, env: Env) -> Tensor:
    """The action that is played: a normal one is clipped to [-1, 1], which becomes the action range."""
    if env.discrete:
        return action
    center = (env.action_high + env.action_low) / 2
    half_width = (env.action_high - env.action_low) / 2
    return (center + half_width * action.clamp(-1, 1)) * env.action_mask[:, None]


def state_values(critic: MLP, obs: Tensor) -> Tensor:
    """V_i(s) of every agent [S, N, M], normalised, from everybody's obs [S, N, M, O]."""
    everybody = obs.transpose(1, 2).flatten(2).unsqueeze(1)  # [S, 1, M, N * O]
    return critic(everybody).squeeze(1).mT


# --------------------------------------------------------------------------------------------------------------------
# ALGO LOGIC: the adversarial regulariser, ERNIE Eq. (4) and (6)


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
    """D [S, N, M] of policy outputs: KL(output || clean) of softmax or of normal policies, or squared l2 of outputs or
    of probabilities. Squared, because the plain norm has no gradient where the outputs agree."""
    if kind == "kl":
        logprobs, clean_logprobs = output.log_softmax(-1), clean.log_softmax(-1)
        return (logprobs.exp() * (logprobs - clean_logprobs)).sum(-1)
    if kind == "kl_normal":
        mean, log_std = output.chunk(2, -1)
        clean_mean, clean_log_std = clean.chunk(2, -1)
        distance = (mean - clean_mean) * torch.exp(-clean_log_std)
        log_ratio = 2 * (log_std - clean_log_std)  # of the variances
        return 0.5 * (log_ratio.exp() - 1 - log_ratio + distance.square()).sum(-1)
    if kind == "l2_probs":
        output, clean = output.softmax(-1), clean.softmax(-1)
    return (output - clean).square().sum(-1)


def hold_std(output: Tensor, env: Env, args: Args) -> Tensor:
    """Policies as the regulariser sees them: with detach_std only their means can adapt to it."""
    if env.discrete or not args.detach_std:
        return output
    mean, log_std = output.chunk(2, -1)
    return torch.cat([mean, log_std.detach()], -1)


def regularizer(nets: Nets, obs: Tensor, clean: Tensor, noise: Tensor, env: Env, args: Args) -> tuple[Tensor, Tensor]:
    """R [S, N, M] of each agent at each normalised observation [S, N, M, O] and its perturbation delta in units of
    epsilon_units; `clean` is the policy's output there, which the loss has too; noise is standard normal. Entries of an
    observation that do not vary stay so."""
    unit = nets["normalizer"].unit(args.epsilon_units) * env.obs_mask[:, None]  # an action mask stays as it is
    live = (unit > 0).to(obs.dtype)  # [S, N, 1, O]
    noise = noise * live
    clean = hold_std(clean, env, args)

    def change(delta: Tensor) -> Tensor:
        output = policy(nets["actor"], obs + unit * delta, env, args)
        return divergence(args.divergence, hold_std(output, env, args), clean)

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
    clean = policy(actor, obs, env, args)
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


def gae(rewards: Tensor, values: Tensor, terminated: Tensor, args: Args, live: Tensor | None = None) -> Tensor:
    """Generalised advantage estimates [S, N, B, T] (Schulman et al. 2016): rewards [S, N, B, T], values [S, N, B,
    T + 1], terminated [S, 1 or N, B, T]. After the last step the return goes on with its value: the time limit is no
    end. The same after a step in which an agent is not `live`: it had ended, and its next episode begins."""
    advantage = 0.0
    advantages = []
    for t in reversed(range(rewards.shape[-1])):
        discount = args.gamma * (1 - terminated[..., t])
        delta = rewards[..., t] + discount * values[..., t + 1] - values[..., t]
        advantage = delta + discount * args.gae_lambda * advantage
        if live is not None:
            advantage = advantage * live[..., t]
        advantages.append(advantage)
    return torch.stack(advantages[::-1], -1)


def team_rewards(rewards: Tensor, env: Env, args: Args) -> Tensor:
    """What each agent learns from [S, N, B, T]: its own reward, or its team's mean or sum."""
    if args.team_reward == "own":
        return rewards
    share = (env.cooperators[:, None] == env.cooperators).to(rewards.dtype)  # [N, N]
    if args.team_reward == "mean":
        share = share / share.sum(0)
    return torch.einsum("nk,sk...->sn...", share, rewards)


@torch.no_grad()
def prepare(nets: Nets, episodes: Batch, env: Env, args: Args) -> Batch:
    """Episodes as samples for the losses, [S, N, M, ...] each; the moments of returns move on."""
    obs = episodes["obs"]  # [S, N, B, T + 1, O]
    values = state_values(nets["critic"], obs.flatten(2, 3)).unflatten(2, obs.shape[2:4])
    mean, std = nets["return_moments"].mean_and_std()
    worth = mean + std * values  # in units of rewards
    rewards = args.reward_scale * team_rewards(episodes["rewards"], env, args)
    live = episodes.get("live")
    advantages = gae(rewards, worth, episodes["terminated"], args, live)
    returns = advantages + worth[..., :-1]
    nets["return_moments"].update(returns, args.value_decay, live)
    mean, std = nets["return_moments"].mean_and_std()
    returns = (returns - mean) / std
    if args.normalize_advantage:
        std, mean = envs.std_mean(advantages, (2, 3), live)
        advantages = (advantages - mean) / std.clamp_min(0.01)
    obs = obs[:, :, :, :-1].flatten(2, 3)
    actions = episodes["actions"].flatten(2, 3)
    logprobs, _ = logprob_and_entropy(policy(nets["actor"], obs, env, args), actions, env)
    samples = {
        "obs": obs,
        "actions": actions,
        "logprobs": logprobs,
        "advantages": advantages.flatten(2),
        "values": values[..., :-1].flatten(2),
        "returns": returns.flatten(2),
    }
    if live is not None:
        samples["live"] = live.flatten(2)
    return samples


def critic_loss(nets: Nets, batch: Batch, env: Env, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: squared error of the values, the larger one of theirs and of values that moved by at most clip_coef.
    Returns loss, metrics [S]."""
    values = state_values(nets["critic"], batch["obs"])
    error = (values - batch["returns"]).square()
    if args.clip_vloss:
        move = (values - batch["values"]).clamp(-args.clip_coef, args.clip_coef)
        near = batch["values"] + move
        error = torch.maximum(error, (near - batch["returns"]).square())
    loss = 0.5 * envs.live_mean(error, batch.get("live")).mean(1)
    return loss.sum(), {"losses/value_loss": loss.detach()}


def actor_loss(nets: Nets, batch: Batch, env: Env, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: PPO's clipped objective for every policy, minus the entropy bonus, plus lambda R (Eq. 5) of
    cooperating agents. Returns loss, metrics [S]."""
    obs, advantages = batch["obs"], batch["advantages"]
    mean = partial(envs.live_mean, live=batch.get("live"))
    output = policy(nets["actor"], obs, env, args)
    logprobs, entropy = logprob_and_entropy(output, batch["actions"], env)
    log_ratio = logprobs - batch["logprobs"]  # [S, N, M]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    policy_loss = -mean(gain)  # [S, N]
    loss = policy_loss - args.entropy_coef * mean(entropy)
    with torch.no_grad():
        metrics = {
            "losses/policy_loss": policy_loss.mean(1),
            "losses/entropy": mean(entropy).mean(1),
            "losses/approx_kl": mean(ratio - 1 - log_ratio).mean(1),
            "losses/clipfrac": mean((ratio != clipped).to(obs.dtype)).mean(1),
        }
    if args.regularized:
        obs, clean = obs[:, :, : args.reg_batch_size], output[:, :, : args.reg_batch_size]
        change, _ = regularizer(nets, obs, clean, batch["perturbation"], env, args)
        change = mean(change)  # [S, N]
        loss = loss + args.reg_coef * change * env.cooperators
        metrics["ernie/regularizer"] = envs.team_mean(change.detach(), env)
    return loss.sum(), metrics


def update(nets: Nets, optimizers: dict, losses: dict, batch: Batch, env: Env, args: Args) -> Batch:
    """A step of all critics and actors. Each network's gradient is clipped on its own. Returns metrics [S]."""
    metrics = {}
    for name in ("critic", "actor"):
        loss, new_metrics = losses[name](nets, batch, env, args)
        metrics.update(new_metrics)
        flat = nets[name].flat
        (gradient,) = torch.autograd.grad(loss, flat)
        flat.grad = perturb.project(gradient, args.max_grad_norm, "l2")
    optimizers["adam"].step()
    return metrics


# --------------------------------------------------------------------------------------------------------------------
# Rollout of whole episodes, so that between two of them a checkpoint needs no environment state, and their minibatches


def draw_rollout(env: Env, generators: Generators) -> tuple:
    """What is random in episodes: state and obs at their start (PettingZoo's environments are reset); noise of
    actions [S, T, N, B, A], Gumbel or standard normal; noise of each step of the environments."""
    sampler = envs.gumbel if env.discrete else torch.randn
    N, A = env.action_mask.shape
    noise = envs.per_seed(sampler, (env.horizon, N, env.num_envs // len(generators), A), generators)
    start = env.reset(generators)
    return start, noise, [env.draw(generators) for _ in range(env.horizon)]


@torch.no_grad()
def rollout(step_env: Callable, env: Env, nets: Nets, args: Args, draws: tuple) -> Batch:
    """Episodes of sampled actions: obs, normalised, [S, N, B, T + 1, O], actions, not clipped, [S, N, B, T, A], rewards
    [S, N, B, T], terminated [S, 1, B, T]. Of PettingZoo's environments terminated is each agent's, and `live`
    [S, N, B, T] is 0 where it had ended before: one episode follows another there."""
    (state, obs), noise, env_noise = draws
    S = len(noise)
    obs = nets["normalizer"](envs.by_agent(obs, S))
    steps = defaultdict(list, obs=[obs])
    for t, step_noise in enumerate(env_noise):
        action = draw_action(policy(nets["actor"], obs, env, args), noise[:, t], env)
        env_action = envs.for_env(squash(action, env), env)
        state, obs, reward, terminated, _, info = step_env(state, env_action, step_noise)
        obs = nets["normalizer"](envs.by_agent(obs, S))
        steps["obs"].append(obs)
        steps["actions"].append(action)
        steps["rewards"].append(envs.by_agent(reward, S))
        ended = info.get("terminated", terminated[:, None])
        steps["terminated"].append(envs.by_agent(ended.to(reward.dtype), S))
        if "live" in info:
            steps["live"].append(envs.by_agent(info["live"], S))
    return {name: torch.stack(values, 3) for name, values in steps.items()}


def minibatches(samples: Batch, generators: Generators, args: Args) -> Iterator[Batch]:
    """Parts of the samples, [S, N, M, ...] each: in every epoch each sample once, in an order of its seed."""
    S, N, M = samples["advantages"].shape
    first = M * torch.arange(S * N, device=generators[0].device)
    for _ in range(args.update_epochs):
        order = envs.per_seed(torch.randperm, M, generators)
        for chosen in order.chunk(args.num_minibatches, 1):
            index = first.view(S, N, 1) + chosen.unsqueeze(1)  # into the flattened [S, N, M]
            batch = {}
            for name, values in samples.items():
                rows = values.flatten(0, 2).index_select(0, index.flatten())
                batch[name] = rows.unflatten(0, index.shape)
            yield batch


def draw_noise(generators: Generators, env: Env, args: Args) -> Batch:
    """The random numbers of one update, drawn outside what may be compiled."""
    if not args.regularized:
        return {}
    N, O = env.obs_mask.shape
    M = args.num_envs * env.horizon // args.num_minibatches
    shape = (N, min(M, args.reg_batch_size), O)
    return {"perturbation": envs.per_seed(torch.randn, shape, generators)}


# --------------------------------------------------------------------------------------------------------------------
# Robustness evaluation, by envs/robustness.py

SWEEP = {  # perturbation: strengths
    "gaussian": (0.1, 0.2, 0.5, 1.0),  # observation noise, standard deviation
    "uniform": (0.1, 0.2, 0.5, 1.0),  # observation noise, half-width
    "mad": (0.1, 0.2, 0.5, 1.0),  # radius; the observations that change the policy most (maximal action difference)
    "executed": (0.1, 0.2, 0.5, 1.0),  # the same; the observations that change the action that is played most
    "random_action": (0.05, 0.2, 0.5),  # probability that one cooperating agent acts at random in a step
    "damping": (0.5, 2.0),  # factors on physical constants
    "mass": (0.5, 2.0),
    "max_speed_scale": (0.5, 2.0),
    "contact_force": (0.5, 2.0),
}
DRONE_SWEEP = {
    "gaussian": (0.01, 0.03, 0.1, 0.3),  # observation noise, standard deviation (paper, Figure 6)
    "uniform": (0.01, 0.03, 0.1, 0.3),
    "mad": (0.01, 0.03, 0.1),
    "executed": (0.01, 0.03, 0.1),  # the same; the observations that change the action that is played most
    "random_action": (0.05, 0.2, 0.5),
    "mass": (0.95, 1.05),  # factor
    "updraft": (-0.01, 0.01),  # N, constant force upwards; a drone weighs 0.265
    "wind": (0.005, 0.01),  # N, constant force along x
    "gust": (0.005, 0.01),  # N, standard deviation of a changing force along each axis
    "delay": (1,),  # steps until an action takes effect
}


def trained_policy(nets: Nets, env: Env, args: Args) -> robustness.Policy:
    """The likeliest actions at observations as the environment gives them, in whose own units attacks are."""
    normalizer = nets["normalizer"]
    return robustness.Policy(
        output=lambda obs: policy(nets["actor"], normalizer(obs), env, args),
        to_action=lambda output: squash(draw_action(output, 0.0, env), env),
        divergence=partial(divergence, "kl" if env.discrete else "kl_normal"),
        norm=args.eval_norm,
        unit=normalizer.unit("std"),  # 1 where an entry matters
    )


def assess(nets: Nets, samples: Batch, env: Env, test_env: Env, args: Args) -> Batch:
    """Returns of the likeliest actions, of each agent and the team; how much of the returns' variance values explain;
    the policies' mean standard deviation; `diagnose` on the newest episodes. All [S]."""
    streams = envs.make_generators(args.seed, args.num_seeds, "test", env.device)
    returns = robustness.evaluate(test_env, trained_policy(nets, test_env, args), streams).mean(1)  # [S, N]
    metrics = {f"eval/{name}": values for name, values in zip(env.agents, returns.unbind(1))}
    metrics["eval/episodic_return"] = envs.team_mean(returns, env)
    obs = samples["obs"][:, :, : args.reg_batch_size]
    live = samples.get("live")
    with torch.no_grad():
        error = samples["returns"] - state_values(nets["critic"], samples["obs"])
        output = policy(nets["actor"], obs, env, args)
    unexplained, spread = (envs.std_mean(x, 2, live)[0].squeeze(2).square() for x in (error, samples["returns"]))
    unexplained = unexplained / spread.clamp_min(1e-8)
    metrics["losses/explained_variance"] = 1 - unexplained.mean(1)
    if not env.discrete:
        _, log_std = output.chunk(2, -1)
        metrics["charts/policy_std"] = log_std.exp().mean(2)[:, env.action_mask].mean(1)
    if args.regularized:
        noise = draw_noise(streams, env, args)["perturbation"]
        metrics |= diagnose(nets, obs[:, :, : noise.shape[2]], noise, env, args)
    return metrics


# --------------------------------------------------------------------------------------------------------------------
# Environment


def make_env(args: Args, num_envs: int, device: torch.device) -> Env:
    """The task of `args`. Raise ValueError where the arguments do not fit it."""
    options = envs.task_options(args)
    env = envs.make(args.env_id, num_envs, device, torch.float32, args.num_agents, args.continuous_actions, **options)
    env = envs.for_training(env, args)
    if env.discrete == args.continuous_actions:
        raise ValueError(f"--continuous-actions must be {not env.discrete} with {args.env_id}")
    samples = args.num_envs * env.horizon
    if samples % args.num_minibatches:
        raise ValueError(f"--num-minibatches must divide an iteration's {samples} steps, got {args.num_minibatches}")
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
    # on CPUs torch 2.13 gets the gradient through an attack wrong
    if env.device.type == "cuda" or not args.regularized:
        losses = {name: compile(loss) for name, loss in losses.items()}
    return env.step if args.is_zoo else compile(env.step), losses


def train(env: Env, nets: Nets, optimizers: dict, args: Args, run: runs.Run, checkpoint: dict) -> None:
    """Train from the start or from a checkpoint; a signal ends it, after a checkpoint, with KeyboardInterrupt."""
    S = args.num_seeds
    steps_per_iteration = args.num_envs * env.horizon
    step_env, losses = compiled(env, args)
    learn = partial(update, nets, optimizers, losses, env=env, args=args)
    play = partial(rollout, step_env, env, nets, args)
    if args.cuda_graphs:
        learn = envs.graphed(learn, env.device, optimizers)
        if not args.is_zoo:
            play = envs.graphed(play, env.device)
    test_env = envs.for_tests(env, S * min(100, args.eval_episodes or 10))
    new_streams = partial(envs.make_generators, args.seed, S, device=env.device)
    streams = {purpose: new_streams(purpose) for purpose in ("rollout", "minibatches", "noise")}
    iteration = 0
    window = defaultdict(list)  # metrics [S] since the last row of metrics.csv
    if checkpoint:
        with runs.exits(2, ValueError):
            live = {"optimizers": optimizers, "streams": streams, "iteration": 0, "window": {}}
            runs.restore(live, checkpoint)
        iteration = checkpoint["iteration"]
        window.update(runs.moved(checkpoint["window"], env.device))
    else:
        nets["normalizer"].flat.copy_(perturb.observation_moments(step_env, env, new_streams("norm")))

    step = iteration * steps_per_iteration
    started, first_step = time.perf_counter(), step
    bar = runs.progress_bar(args.total_timesteps, step)
    with runs.stop_signals() as caught:
        while step < args.total_timesteps and not caught:
            progress = step / args.total_timesteps if args.anneal_lr else 0.0
            optimizers["adam"].param_groups[0]["lr"] = args.learning_rate * (1 - progress)
            episodes = play(draw_rollout(env, streams["rollout"]))
            returns = episodes["rewards"].sum(3).mT  # [S, B, N]
            window["charts/episodic_return"].append(envs.episodic_return(returns, env))
            samples = prepare(nets, episodes, env, args)
            for batch in minibatches(samples, streams["minibatches"], args):
                batch |= draw_noise(streams["noise"], env, args)
                for name, value in learn(batch).items():
                    window[name].append(value)
            iteration += 1
            step += steps_per_iteration
            bar.update(steps_per_iteration)

            done = step >= args.total_timesteps
            if done or step % args.log_interval < steps_per_iteration:
                metrics = {name: sum(values) / len(values) for name, values in window.items()}
                metrics |= assess(nets, samples, env, test_env, args)
                speed = S * (step - first_step) / (time.perf_counter() - started)
                metrics["charts/SPS"] = torch.full((S,), speed)
                log(run, step, metrics)
                runs.show_progress(bar, episodic_return=f"{metrics['eval/episodic_return'].mean():.2f}")
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
                }
                runs.save(run.dir / "checkpoint.pt", state)
    bar.close()
    if caught:
        raise KeyboardInterrupt(f"at step {step}")


def main() -> None:
    with runs.exits(2, ValueError, ImportError, OSError):
        args, checkpoint = runs.parse_args(Args, __doc__)
        device = setup(args)
        env = make_env(args, args.num_seeds * args.num_envs, device)
        runs.check_memory(env, args)
        if args.backend == "pybullet":
            bullet.require_pybullet(args.num_seeds * args.eval_episodes)
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
        name = "robustness"
        labels = {"env_id": args.env_id, "regularizer": args.regularizer}
        make_policy = partial(trained_policy, nets, args=args)
        if args.eval_episodes:
            test_env = envs.for_tests(env, args.num_seeds * args.eval_episodes)
            if args.backend == "pybullet":
                test_env = bullet.from_drones(test_env)
                name = "robustness_pybullet"
            sweep = DRONE_SWEEP if args.is_drones else SWEEP
            robustness.report(test_env, make_policy, sweep, run, labels, name, per_agent=args.is_drones)
        if args.capture_video:
            env = envs.for_tests(env, args.num_seeds * min(100, args.eval_episodes or 1))
            act = make_policy(env).act
            streams = envs.make_generators(args.seed, args.num_seeds, "video", device)
            envs.write_gif(env, act, streams, run.dir / "episode.gif")
            if args.env_id == "leader_follower_v1":
                drones.plot_distances(env, act, streams, run.dir / "distance.png")
    print(f"results: {run.dir}")


if __name__ == "__main__":
    main()
