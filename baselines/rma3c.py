"""RMA3C: multi-agent DDPG in which each agent trains against an adversary that perturbs what it observes.

Han et al. 2022, "What is the solution for state-adversarial multi-agent reinforcement learning?" (arXiv 2212.02705),
the baseline that the ERNIE paper compares with. Agent i has, as in MADDPG, a policy pi_i and a centralised critic Q_i,
and besides an adversary chi_i: the agent sees o_i + d chi_i(o_i), |chi_i| <= 1, and acts on that. Policies ascend and
adversaries descend on the critics in turns, several times per update. Of the two algorithms in the authors' repository
this is `pmaddpg`, the one that its README trains.

    python baselines/rma3c.py --epsilon 0.1                                 # simple_spread_v3
    python baselines/rma3c.py --env-id simple_tag_v3 --num-seeds 5          # five independent runs side by side
    python baselines/rma3c.py --evaluate runs/RUN --backend pettingzoo      # the trained policies in the original mpe2

Usage, metrics, differences to the authors' code and results: docs/rma3c.md.

Axes: S seeds, N agents, M samples of a minibatch (B environments in a rollout), T steps of an episode, O observation,
A action, K alternations of an update. What an agent sees, does and is worth is [S, N, M, ...]; a joint action is
[S, C, M, N, A], C = N where every critic judges another one, else 1.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below prints no traceback

import math
import sys
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
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where envs is

import envs
from envs import Env, perturb, robustness, runs
from envs.runs import Name, Share, Threads, arguments, log, make_run_dir, setup

Batch = dict[str, Tensor]  # samples and random numbers of an update, or metrics [S]
Generators = list[torch.Generator]  # one per seed
Nets = dict[str, "MLP"]  # actor, critic, adversary, and a target of each


@arguments
class Experiment:
    exp_name: Name = Path(__file__).stem  # name of this experiment
    seed: NonNegativeInt = 1  # seed of the first run; run k uses seed + k
    num_seeds: PositiveInt = 1  # S, independent runs trained side by side
    torch_deterministic: bool = True  # deterministic algorithms only: same seed, same machine, same numbers
    cuda: bool = True  # use the GPU if there is one
    num_threads: Threads = 1  # CPU threads; with more set OMP_WAIT_POLICY=PASSIVE, or one busy core stalls all
    compile: bool = False  # torch.compile the environment step and the losses
    cuda_graphs: bool = False
    """on a GPU: updates and rollouts (but PettingZoo's) as CUDA graphs, without deterministic algorithms; not measured;
    ignored on a CPU"""
    runs_dir: str = "runs"  # folder that receives a folder per run
    resume: str | None = None  # run folder to continue; other flags are read from it
    evaluate: str | None = None  # run folder or policy file whose policies are evaluated again, without training
    backend: Literal["torch", "pettingzoo"] = "torch"  # with --evaluate: the batched environment or the original mpe2
    capture_video: bool = False  # write a GIF of an episode of the trained policy
    log_interval: PositiveInt = 10_000  # environment steps between two rows of metrics.csv
    checkpoint_interval: PositiveInt = 100_000  # environment steps between two checkpoints
    eval_episodes: NonNegativeInt | None = None
    """episodes of one seed at each point of the robustness report, 0: none; default: 10 of PettingZoo's environments,
    else 1,000"""
    eval_norm: Literal["l2", "linf"] = "l2"  # norm of the ball of the report's worst-case observations
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline needs no account; `wandb sync` later
    wandb_project_name: str = "robust-marl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team


@arguments
class MADDPG:
    env_id: Annotated[str, envs.tasks("particle", "drones")] = "simple_spread_v3"
    """a particle task, quadcopters, or PettingZoo's zoo:package.module or zoo:namespace/Name-v0"""
    env_kwargs: tuple[str, ...] = ()  # its keywords or constants, name=value or JSON
    horizon: PositiveInt | None = None  # steps after which an episode is cut; default: the task's own
    cooperators: tuple[str, ...] = ()  # PettingZoo: first letters of the agents that are the team; default: all
    num_workers: PositiveInt | None = None  # PettingZoo: processes for the environments; default: one per core
    num_agents: PositiveInt | None = None  # N where the task allows a choice (simple_spread_v3)
    continuous_actions: bool = True  # or discrete ones, by straight-through Gumbel-softmax
    total_timesteps: PositiveInt = 500_000  # environment steps of one seed
    num_envs: PositiveInt = 40  # B, environments of one seed that step together
    share_parameters: bool = True  # one network for all agents, if all are alike and of one team
    steps_per_update: PositiveInt = 25  # environment steps of one seed per update (RMA3C: 100)
    learning_starts: NonNegativeInt = 5_000  # environment steps before the first update (RMA3C: 25,600)
    buffer_size: PositiveInt = 250_000  # replay capacity of one seed in environment steps (RMA3C: 1e6)
    batch_size: PositiveInt = 128  # M, transitions per minibatch (RMA3C: 1024)
    learning_rate: PositiveFloat = 3e-3  # Adam step size of actors and critics (RMA3C: 1e-2)
    learning_rate_end: PositiveFloat = 3e-4  # the same at the end, linear in between
    gamma: Share = 0.9  # discount factor (RMA3C: 0.95)
    tau: Share = 0.03  # share by which the targets move at each update (RMA3C: 0.01)
    hidden_size: PositiveInt = 64  # width of the two hidden layers
    activation: Literal["relu", "silu", "tanh"] = "relu"  # hidden activation
    exploration_noise: NonNegativeFloat = 0.8  # continuous: first standard deviation, in half-widths of the range
    exploration_noise_end: NonNegativeFloat = 0.2  # the same at the end, linear in between
    others_actions: Literal["policy", "replay"] = "policy"  # in the losses of actors and adversaries (replay: RMA3C)
    policy_l2: NonNegativeFloat = 1e-3  # weight of the mean squared actor output in the actor loss
    max_grad_norm: PositiveFloat = 0.5  # the gradient of each network of each seed is clipped to this norm


@arguments
class RMA3C:
    epsilon: NonNegativeFloat = 0.1  # d, largest change of an observation entry (RMA3C: 1.0); 0 is MADDPG
    descent_steps: PositiveInt = 2  # K, alternations of actor and adversary step per update (RMA3C, gda_step: 20)
    adversary_learning_rate: PositiveFloat = 1e-3  # Adam step size of the adversaries (RMA3C: 1e-2)
    perturb_rollout: bool = True  # agents act on perturbed observations while training, or on true ones


@arguments
class Args(RMA3C, MADDPG, Experiment):
    def __post_init__(self):
        if self.eval_episodes is None:
            self.eval_episodes = 10 if self.is_zoo else 1000
        if self.learning_starts + self.steps_per_update > self.total_timesteps:
            raise ValueError(f"learning_starts must leave steps for an update, got {self.learning_starts}")
        if self.backend != "torch" and not self.evaluate:
            raise ValueError(f"backend must be torch unless evaluate is given, got {self.backend}")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def is_zoo(self) -> bool:
        return self.env_id.startswith("zoo:")


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
    """Actors, critics, adversaries and their targets, of each agent or of all; an Adam for each kind."""
    generators = envs.make_generators(args.seed, args.num_seeds, "init", env.device)
    N, O = env.obs_mask.shape
    A = env.action_mask.shape[1]
    hidden = [args.hidden_size, args.hidden_size]
    sizes = {
        "actor": [O, *hidden, A],
        "critic": [N * (O + A), *hidden, 2],  # the second output is for rounding: one alone has kernels of its own
        "adversary": [O, *hidden, O],
    }
    is_shared = args.share_parameters and envs.are_alike(env)
    nets, optimizers = {}, {}
    for name in sizes:
        net = init_mlp(sizes[name], args.activation, 1 if is_shared else N, generators)
        learning_rate = args.adversary_learning_rate if name == "adversary" else args.learning_rate
        nets[name] = net
        nets[f"{name}_target"] = replace(net, flat=net.flat.detach().clone())
        optimizers[name] = torch.optim.Adam([net.flat], learning_rate, fused=True)
    return nets, optimizers


def for_each(net: MLP, obs: Tensor) -> Tensor:
    """obs [S, N, M, O] through each agent's network, or the one that all share."""
    S, N, M, _ = obs.shape
    if len(net.flat) == S:
        obs = obs.reshape(S, 1, N * M, -1)
    return net(obs).view(S, N, M, -1)


def policy(actor: MLP, obs: Tensor, env: Env) -> Tensor:
    """Actions before tanh, or logits: obs [S, N, M, O] -> [S, N, M, A]. What is not legal is 0, or -1e9 if discrete."""
    return torch.where(envs.legal_actions(obs, env), for_each(actor, obs), -1e9 if env.discrete else 0.0)


def one_hot_best(output: Tensor) -> Tensor:
    """The largest of the last axis as one-hot."""
    return torch.zeros_like(output).scatter(-1, output.argmax(-1, keepdim=True), 1.0)


def squash(output: Tensor, env: Env) -> Tensor:
    """Deterministic action [S, N, M, A]: tanh scaled to the action range, or the best action as one-hot."""
    if env.discrete:
        return one_hot_best(output)
    span = env.action_high - env.action_low
    return (env.action_low + span * (torch.tanh(output) + 1) / 2) * env.action_mask[:, None]


def straight_through(logits: Tensor, noise: Tensor) -> Tensor:
    """One-hot sample of softmax(logits) whose gradient is the Gumbel-softmax's."""
    soft = F.softmax(logits + noise, -1)
    return one_hot_best(soft) + soft - soft.detach()


def everybody(x: Tensor) -> Tensor:
    """[S, N, M, X] of each agent -> [S, 1, M, N, X], what a central critic sees."""
    return x.transpose(1, 2).unsqueeze(1)


def own_first(x: Tensor) -> Tensor:
    """What a critic that all agents share is asked, [S, 1, N * M, N, X], of what they see or do, [S, 1 or N, M, N, X]:
    for each agent, itself and then the others in their order."""
    N = x.shape[3]
    agent = torch.arange(N, device=x.device)
    order = (agent[:, None] + agent) % N  # [N, N]
    x = x.expand(-1, N, -1, -1, -1).take_along_dim(order[None, :, None, :, None], 3)
    return x.flatten(1, 2).unsqueeze(1)


def q_values(critic: MLP, obs: Tensor, joint: Tensor) -> Tensor:
    """Q_i(x, a) of every agent's critic [S, N, M]: obs [S, N, M, O], joint actions [S, C, M, N, A]."""
    S, N, M, _ = obs.shape
    seen = everybody(obs)
    if len(critic.flat) == S:
        seen, joint = own_first(seen), own_first(joint)
    return critic(seen.flatten(3), joint.flatten(3))[..., 0].reshape(S, N, M)


def own_slot(env: Env) -> Tensor:
    """[N, 1, N, 1]: True where the critic of an agent meets that agent's own action in a joint action."""
    own = torch.eye(env.num_agents, dtype=torch.bool, device=env.device)
    return own[:, None, :, None]


# --------------------------------------------------------------------------------------------------------------------
# ALGO LOGIC: the adversary


def deceive(adversary: MLP, obs: Tensor, radius: float, env: Env) -> Tensor:
    """What agents see, o_i + d chi_i(o_i), [S, N, M, O]. Padding, entries that are always 0 and what opponents see stay
    as they are."""
    live = (env.obs_mask & env.cooperators[:, None])[:, None].to(obs.dtype)
    return obs + radius * live * torch.tanh(for_each(adversary, obs))


def diagnose(adversary: MLP, obs: Tensor, env: Env, args: Args) -> Batch:
    """l2 length of cooperating agents' perturbations, and the share of live entries within 1% of the radius, [S]."""
    delta = deceive(adversary, obs, args.epsilon, env) - obs
    delta = delta[:, env.cooperators]  # [S, N, M, O]
    live = env.obs_mask[env.cooperators][:, None].to(obs.dtype)
    at_edge = (delta.abs() > 0.99 * args.epsilon) * live
    return {
        "rma3c/perturbation_norm": perturb.length(delta, "l2").mean((1, 2, 3)),
        "rma3c/saturation": at_edge.mean(2).sum((1, 2)) / live.sum(),
    }


# --------------------------------------------------------------------------------------------------------------------
# Losses and update. Losses are means over samples and sums over agents and seeds, which do not share parameters.


def frozen(net: MLP) -> MLP:
    """The same network without gradient."""
    return replace(net, flat=net.flat.detach())


def critic_loss(nets: Nets, batch: Batch, env: Env, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: (Q_i(x, a) - y_i)^2 with y_i = r_i + gamma (1 - terminated) Q'_i(x', a') at true observations x', and
    a'_j = pi'_j(o'_j + d chi'_j(o'_j)); truncation does not end the return. Returns loss, metrics [S]."""
    next_obs = batch["next_obs"]
    with torch.no_grad():
        seen = deceive(nets["adversary_target"], next_obs, args.epsilon, env)
        next_joint = everybody(squash(policy(nets["actor_target"], seen, env), env))
        next_q = q_values(nets["critic_target"], next_obs, next_joint)
        discount = args.gamma * (1 - batch["terminated"])  # [S, 1 or N, M]
        target = batch["rewards"] + discount * next_q  # [S, N, M]
    q = q_values(nets["critic"], batch["obs"], everybody(batch["actions"]))
    mean = partial(envs.live_mean, live=batch.get("live"))
    loss = mean((q - target).square())  # [S, N]
    metrics = {
        "losses/critic_loss": loss.detach().mean(1),
        "losses/q_values": mean(q.detach()).mean(1),
    }
    return loss.sum(), metrics


def deceived_values(actor: MLP, adversary: MLP, critic: MLP, batch: Batch, env: Env, args: Args):
    """Q_i(x, a_i, a_-i) [S, N, M] at what agent i does when deceived, a_-i constant; the actors' outputs."""
    obs = batch["obs"]
    output = policy(actor, deceive(adversary, obs, args.epsilon, env), env)  # [S, N, M, A]
    action = straight_through(output, batch["gumbel"]) if env.discrete else squash(output, env)
    others = squash(output.detach(), env) if args.others_actions == "policy" else batch["actions"]
    joint = torch.where(own_slot(env), everybody(action), everybody(others))  # [S, N, M, N, A]
    return q_values(critic, obs, joint), output


def actor_loss(nets: Nets, batch: Batch, env: Env, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: actors maximise Q_i at what they do when deceived, the adversaries frozen. Returns loss, metrics."""
    adversary, critic = frozen(nets["adversary"]), frozen(nets["critic"])
    q, output = deceived_values(nets["actor"], adversary, critic, batch, env, args)
    mean = partial(envs.live_mean, live=batch.get("live"))
    policy_loss = -mean(q)  # [S, N]
    penalty = (output * envs.legal_actions(batch["obs"], env)).square().mean(3)
    loss = policy_loss + args.policy_l2 * mean(penalty)
    return loss.sum(), {"losses/actor_loss": policy_loss.detach().mean(1)}


def adversary_loss(nets: Nets, batch: Batch, env: Env, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: adversaries minimise the same Q_i through what the frozen actors see. Returns loss, metrics."""
    actor, critic = frozen(nets["actor"]), frozen(nets["critic"])
    q, _ = deceived_values(actor, nets["adversary"], critic, batch, env, args)
    loss = envs.live_mean(q, batch.get("live"))  # [S, N]
    return (loss * env.cooperators).sum(), {"losses/adversary_loss": envs.team_mean(loss.detach(), env)}


def update(nets: Nets, optimizers: dict, losses: dict, batch: Batch, env: Env, args: Args) -> Batch:
    """ALGO LOGIC: a step of all critics, then K alternations of an actor and an adversary step on the same minibatch,
    then all targets move. Each network's gradient is clipped on its own. Returns metrics [S] of the last one."""
    metrics = {}

    def descend(name: str, batch: Batch) -> None:
        loss, new_metrics = losses[name](nets, batch, env, args)
        metrics.update(new_metrics)
        flat = nets[name].flat
        (gradient,) = torch.autograd.grad(loss, flat)
        flat.grad = perturb.project(gradient, args.max_grad_norm, "l2")
        optimizers[name].step()

    descend("critic", batch)
    for k in range(args.descent_steps):
        gumbel = {"gumbel": batch["gumbel"][:, k]} if env.discrete else {}
        descend("actor", batch | gumbel)
        descend("adversary", batch | gumbel)
    for name in ("actor", "critic", "adversary"):
        nets[f"{name}_target"].flat.lerp_(nets[name].flat.detach(), args.tau)
    return metrics


# --------------------------------------------------------------------------------------------------------------------
# Rollout and replay of whole episodes, so that between two of them a checkpoint needs no environment state


def draw_rollout(env: Env, std: float, generators: Generators) -> tuple:
    """What is random in episodes: state and obs at their start (PettingZoo's environments are reset); noise of
    actions [S, T, N, B, A], in their unit; noise of each step of the environments."""
    start = env.reset(generators)
    sampler = envs.gumbel if env.discrete else torch.randn
    N, A = env.action_mask.shape
    noise = envs.per_seed(sampler, (env.horizon, N, env.num_envs // len(generators), A), generators)
    scale = 1.0 if env.discrete else std * (env.action_high - env.action_low) / 2
    return start, scale * noise, [env.draw(generators) for _ in range(env.horizon)]


@torch.no_grad()
def rollout(step_env: Callable, env: Env, nets: Nets, args: Args, draws: tuple) -> Batch:
    """Episodes with exploration on perturbed observations, of which the true ones are kept: obs [S, B, T + 1, N, O],
    actions [S, B, T, N, A], rewards [S, B, T, N], terminated [S, B, T, 1]. Of PettingZoo's environments terminated is
    each agent's, and `live` [S, B, T, N] is 0 where it had ended before: one episode follows another there."""
    (state, obs), noise, env_noise = draws
    S = len(noise)
    steps = defaultdict(list, obs=[obs])
    for t, step_noise in enumerate(env_noise):
        seen = envs.by_agent(obs, S)
        if args.perturb_rollout:
            seen = deceive(nets["adversary"], seen, args.epsilon, env)
        output = policy(nets["actor"], seen, env)
        if env.discrete:
            action = squash(output + noise[:, t], env)  # a sample of the policy
        else:
            explored = squash(output, env) + noise[:, t]
            action = explored.clamp(env.action_low, env.action_high)
        action = action * env.action_mask[:, None]
        env_action = envs.for_env(action, env)
        state, obs, reward, terminated, _, info = step_env(state, env_action, step_noise)
        steps["obs"].append(obs)
        steps["actions"].append(action.transpose(1, 2).flatten(0, 1))
        steps["rewards"].append(reward)
        steps["terminated"].append(info.get("terminated", terminated[:, None]).to(reward.dtype))
        if "live" in info:
            steps["live"].append(info["live"])
    episodes = {name: torch.stack(values, 1) for name, values in steps.items()}
    return {name: values.unflatten(0, (S, -1)) for name, values in episodes.items()}


def make_replay(episodes: Batch, num_episodes: int) -> Batch:
    """Room for E episodes of each seed like those that `rollout` returns, [S, E, ...]."""
    return {name: values.new_zeros(len(values), num_episodes, *values.shape[2:]) for name, values in episodes.items()}


def sample(replay: Batch, filled: int, args: Args, generators: Generators) -> Batch:
    """Minibatch of the first `filled` episodes: obs, next_obs, actions, rewards, terminated [S, N, M, ...]."""
    S, E, T, _ = replay["terminated"].shape
    pick = envs.per_seed(partial(torch.randint, filled * T), (args.batch_size,), generators)
    seed = torch.arange(S, device=pick.device)
    pick = pick + E * T * seed[:, None]  # [S, M] into the flattened [S, E, T]
    row = pick + pick // T  # an episode has one observation more than transitions

    def gather(name: str, index: Tensor) -> Tensor:
        samples = replay[name].flatten(0, 2).index_select(0, index.flatten())
        return samples.unflatten(0, index.shape).transpose(1, 2)

    batch = {name: gather(name, row if name == "obs" else pick) for name in replay}
    return batch | {"next_obs": gather("obs", row + 1)}


def draw_noise(generators: Generators, env: Env, args: Args) -> Batch:
    """The random numbers of one update: discrete actions' Gumbel noise [S, K, N, M, A] of each alternation."""
    if not env.discrete:
        return {}
    N, A = env.action_mask.shape
    shape = (args.descent_steps, N, args.batch_size, A)
    return {"gumbel": envs.per_seed(envs.gumbel, shape, generators)}


# --------------------------------------------------------------------------------------------------------------------
# Robustness evaluation, by envs/robustness.py

SCALES = (0.5, 1.0, 2.0)  # of the adversary's radius in the report
RADII = (0.1, 0.2, 0.5, 1.0)
CHANCES = (0.03, 0.05, 0.2, 0.5)
FACTORS = (0.25, 0.5, 2.0, 4.0)
SWEEP = {  # perturbation: strengths
    "gaussian": RADII,  # observation noise, standard deviation (paper, Figures 3 and 9)
    "uniform": RADII,  # observation noise, half-width
    "mad": RADII,  # radius; the observations that change the policy most (maximal action difference)
    "executed": RADII,  # the same; the observations that change the action that is played most
    "critic": RADII,  # radius; the observations whose action the agent's own critic likes least
    "random_action": CHANCES,  # probability that one cooperating agent acts at random in a step
    "worst_action": CHANCES,  # the same, with the action the team's critics like least (paper, 5.3)
    "damping": FACTORS,  # factors on physical constants
    "mass": FACTORS,
    "max_speed_scale": FACTORS,
    "contact_force": FACTORS,
}


def divergence(output: Tensor, clean: Tensor, env: Env) -> Tensor:
    """What the report's attack "mad" maximises [S, N, M], as by default in ernie_maddpg.py: KL, or squared l2."""
    if not env.discrete:
        return (output - clean).square().sum(-1)
    logprobs, clean_logprobs = output.log_softmax(-1), clean.log_softmax(-1)
    return (logprobs.exp() * (logprobs - clean_logprobs)).sum(-1)


def trained_policy(nets: Nets, env: Env, args: Args) -> robustness.Policy:
    """Deterministic policies, and what attacks on them maximise; critics see the true observations."""
    actor, critic = nets["actor"], nets["critic"]
    output = partial(policy, actor, env=env)

    def dislike(obs: Tensor) -> Callable:
        joint = everybody(squash(output(obs), env))

        def objective(seen: Tensor) -> Tensor:
            action = output(seen).softmax(-1) if env.discrete else squash(output(seen), env)  # argmax has no gradient
            attacked = torch.where(own_slot(env), everybody(action), joint)
            return -q_values(critic, obs, attacked)

        return objective

    def team_value(obs: Tensor, action: Tensor) -> Tensor:
        values = q_values(critic, obs, everybody(action))
        return values[:, env.cooperators].mean(1)

    return robustness.Policy(
        output=output,
        to_action=partial(squash, env=env),
        divergence=partial(divergence, env=env),
        attacks={"critic": dislike},
        adversaries={"adversary": partial(deceive, nets["adversary"], env=env)},
        team_value=team_value,
        norm=args.eval_norm,
    )


# --------------------------------------------------------------------------------------------------------------------
# Environment


def make_env(args: Args, num_envs: int, device: torch.device) -> Env:
    """The task of `args`. Raise ValueError where the arguments do not fit it."""
    options = envs.task_options(args)
    env = envs.make(args.env_id, num_envs, device, torch.float32, args.num_agents, args.continuous_actions, **options)
    env = envs.for_training(env, args)
    if env.discrete == args.continuous_actions:
        raise ValueError(f"--continuous-actions must be {not env.discrete} with {args.env_id}")
    if args.buffer_size < args.num_envs * env.horizon:
        raise ValueError(f"--buffer-size must hold an episode of each of --num-envs, got {args.buffer_size}")
    return env


load_policy = robustness.loader(Args, make_env, make_nets, trained_policy)  # act = load_policy("runs/RUN")


# --------------------------------------------------------------------------------------------------------------------
# Training


def compiled(env: Env, args: Args) -> tuple[Callable, dict[str, Callable]]:
    """The environment's step and the losses, compiled where that is asked for."""
    losses = {"critic": critic_loss, "actor": actor_loss, "adversary": adversary_loss}
    if not args.compile:
        return env.step, losses
    compile = partial(torch.compile, fullgraph=True, options={"comprehensive_padding": False})  # wrong on GPUs
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
    new_streams = partial(envs.make_generators, args.seed, S, device=env.device)
    streams = {purpose: new_streams(purpose) for purpose in ("rollout", "replay", "noise")}
    num_iterations = math.ceil(args.total_timesteps / steps_per_iteration)
    slots = min(args.buffer_size // steps_per_iteration, num_iterations)
    replay = {}  # of slots, each with an episode of every environment
    test_env = envs.for_tests(env, S * min(args.num_envs, args.eval_episodes or 10))
    iteration = 0
    window = defaultdict(list)  # metrics [S] since the last row of metrics.csv
    if checkpoint:
        with runs.exits(2, ValueError):
            live = {"optimizers": optimizers, "streams": streams, "iteration": 0, "window": {}, "replay": {}}
            runs.restore(live, checkpoint)
        iteration = checkpoint["iteration"]
        saved = runs.moved(checkpoint["replay"], env.device)
        replay = make_replay(saved, slots * args.num_envs)
        for name, values in saved.items():
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
            for name in ("actor", "critic"):
                step_size = (1 - progress) * args.learning_rate + progress * args.learning_rate_end
                optimizers[name].param_groups[0]["lr"] = step_size
            episodes = play(draw_rollout(env, std, streams["rollout"]))
            returns = episodes["rewards"].sum(2)  # [S, B, N]
            window["charts/episodic_return"].append(envs.episodic_return(returns, env))
            replay = replay or make_replay(episodes, slots * args.num_envs)
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
                trained = trained_policy(nets, test_env, args)
                test_streams = new_streams("test")
                returns = robustness.evaluate(test_env, trained, test_streams)
                metrics["eval/episodic_return"] = envs.team_mean(returns.mean(1), env)
                obs = sample(replay, filled, args, test_streams)["obs"]
                metrics |= diagnose(nets["adversary"], obs, env, args)
                returns = robustness.evaluate(test_env, trained, new_streams("test"), "adversary", args.epsilon)
                metrics["eval/attacked_return"] = envs.team_mean(returns.mean(1), env)
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
        name = "robustness"
        labels = {"env_id": args.env_id, "regularizer": "rma3c"}
        strengths = SWEEP | {"adversary": [scale * args.epsilon for scale in SCALES if args.epsilon > 0]}
        make_policy = partial(trained_policy, nets, args=args)
        if args.eval_episodes:
            test_env = envs.for_tests(env, args.num_seeds * args.eval_episodes)
            if args.backend == "pettingzoo":
                from envs import zoo  # PettingZoo is needed for nothing else

                test_env = zoo.original(test_env)
                name = "robustness_pettingzoo"
            robustness.report(test_env, make_policy, strengths, run, labels, name)
        if args.capture_video:
            env = envs.for_tests(env, args.num_seeds)
            streams = envs.make_generators(args.seed, args.num_seeds, "video", device)
            envs.write_gif(env, make_policy(env).act, streams, run.dir / "episode.gif")
    print(f"results: {run.dir}")


if __name__ == "__main__":
    main()
