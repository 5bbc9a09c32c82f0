"""ERMAS in the AI Economist's economy: taxes that stay good when workers are not as risk-averse as in training.

Four agents gather, trade and build; a planner sets the marginal tax rates of each period and is paid by the change of
equality times productivity (Zheng et al. 2020, arXiv 2004.13332). ERMAS (Zhao et al. 2021, arXiv 2106.05492) trains it
against agents that lower social welfare as far as none of them could gain more than epsilon by changing its policy
alone (Eq. 7): each ascends on minus the planner's reward plus lambda times its own, corrected by a first-order
meta-gradient (Eq. 11, 15, 16), and lambda rises while the regret that a trust-region step finds (Eq. 13, 14) exceeds
epsilon (Eq. 12). Then new agents of other risk aversion learn from scratch under the frozen planner (Figure 6).

    python ermas_economy.py --epsilon 0.0005                     # a small map, 100 steps: for two CPU cores
    python ermas_economy.py --method fixed --rates 0.3           # own rates, or those of a run's schedule.json
    python ermas_economy.py --method marl --warm-start RUN_DIR   # the AI Economist, from the other run's first phase
    python ermas_economy.py --preset paper                       # 25 x 25 tiles, 1,000 steps: for a GPU

Phase one: agents learn without taxes while labor becomes costly. Then taxes are random in every episode, so that agents
learn how to respond to rates; a planner that moves before they do is drawn to 100%. Phase two: the planner moves too, a
Gaussian of each bracket's rate (`--planner policy`: the AI Economist's network). PPO trains agents and policies.
Methods without a planner have no phase two. All agents share one policy: a unilateral deviation of agent i is a copy of
it that only i follows, found by TRPO; in slice i of one wide batch of environments agent i plays its copy, in the last
slice nobody deviates.

Usage, metrics and results: docs/ermas_economy.md.
Differences to the paper (docs/paper_to_code.md): 4 sign of Eq. 9, 6 own regret only, 7 sign of Eq. 12, 8 bounds
and damping of lambda, 9 regret per step, 10 common random numbers, 13 KL to the anchor, 14 Eq. 15 is the bracket of
Eq. 11, 17 gradients, not parameters, 20 planner's turn, 21 warm-up, 29 change of utility. PPO in place of policy
gradients; feed-forward networks without maps in place of convolutions and an LSTM; the planner chooses rates for an
episode or, its network, for a period.

Axes: S runs (seeds, in the test seeds of every eta), N agents, L slices, B environments of a run, T steps, D tax
periods, M samples, O observation, A actions, b brackets, c choices of a rate, H kinds of reward (own, planner's), K
parameters. Episodes are [S, N, B, T, ...], what the planner sees, chooses and gets [S, 1, B, D, ...].
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below prints no traceback

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

import envs
from envs import Moments, economy, perturb, runs
from envs.economy import Economy, Etas, State
from envs.runs import Decay, Name, Share, Threads, arguments, log, make_run_dir, setup

Batch = dict[str, Tensor]  # episodes, samples, or metrics [S]
Generators = list[torch.Generator]  # one per run
Nets = dict[str, "MLP"]  # agents, agents_critic, planner, planner_critic
TAXES = {  # of each method; only "planner" has a phase two
    "ermas": "planner",
    "marl": "planner",
    "saez": "saez",
    "us-federal": "us",
    "free-market": "free",
    "fixed": "fixed",
}
# arguments that new agents do not depend on before there are taxes
TAXED = """exp_name runs_dir resume evaluate capture_video log_interval checkpoint_interval eval_timesteps
eval_episodes eval_agents wandb_mode wandb_project_name wandb_entity preset method rates eta_train rate_step
response_steps phase_two_timesteps warm_start planner_std agent_updates tax_annealing planner_learning_rate
planner_gae_lambda planner_ent_coef planner_ent_coef_end epsilon beta lambda_init lambda_lr lambda_damping regret_decay
lambda_max rho trust_batch_size meta_gradient cg_steps cg_damping warmup""".split()
PHASES = {"one": 1, "response": 1.5, "two": 2}


@arguments
class Experiment:
    exp_name: Name = Path(__file__).stem  # name of this experiment
    seed: NonNegativeInt = 1  # seed of the first run; run k uses seed + k
    num_seeds: PositiveInt = 1  # independent runs trained side by side (paper: 5 to 10)
    torch_deterministic: bool = True  # deterministic algorithms only: same seed, same machine, same numbers
    cuda: bool = True  # use the GPU if there is one
    num_threads: Threads = 1  # CPU threads; with more set OMP_WAIT_POLICY=PASSIVE, or one busy core stalls all
    compile: bool = False  # torch.compile the environment step
    runs_dir: str = "runs"  # folder that receives a folder per run
    resume: str | None = None  # run folder to continue; other flags are read from it
    evaluate: str | None = None  # run folder or policy file whose planners are evaluated again, without training
    capture_video: bool = False  # write a GIF of an episode of the trained policies
    log_interval: PositiveInt = 25_000  # environment steps between two rows of metrics.csv
    checkpoint_interval: PositiveInt = 100_000  # environment steps between two checkpoints
    eval_eta: Etas = (0.23, 0.32)
    """risk aversion of the test's agents, who learn from scratch under the frozen planner (paper: about 0.2 to 0.3)"""
    eval_timesteps: PositiveInt = 200_000
    """environment steps in which the test's agents, after their own phase one, learn to live with the taxes"""
    eval_episodes: NonNegativeInt = 512
    """episodes in which the welfare of one seed is measured at each eta; 0: no test"""
    eval_agents: str | None = None
    """test_agents.pt of another run, the test's agents at the end of their phase one, which does not depend on taxes;
    default: a run in --runs-dir with the same code and settings, if there is one"""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"  # offline needs no account; `wandb sync` later
    wandb_project_name: str = "robust-marl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases team


@arguments
class PPO:
    preset: Literal["tiny", "paper"] = "tiny"
    """defaults of the flags below: tiny, for two CPU cores; paper, the original's sizes, for a GPU"""
    env_id: Literal["economy_tiny_v0", "economy_v0"] = "economy_tiny_v0"
    """9 x 9 tiles and 100 steps in five tax periods, or 25 x 25 tiles and 1,000 steps in ten"""
    method: Literal["ermas", "marl", "saez", "us-federal", "free-market", "fixed"] = "ermas"
    """ermas; everybody for itself (the AI Economist); or no planner: Saez's formula, US rates of 2018, none, --rates"""
    phase_one_timesteps: PositiveInt = 400_000  # environment steps of one seed without taxes (AI Economist: 25 million)
    response_steps: NonNegativeInt = 800_000
    """the same with rates that are random in each episode, in which agents learn how to respond to rates"""
    phase_two_timesteps: PositiveInt = 400_000  # the same with the planner; without what deviating agents play besides
    warm_start: str | None = None  # run folder whose agents at the start of phase two take the place of earlier phases
    num_envs: PositiveInt = 64  # B, environments of one seed, even; an iteration plays 1 + M episodes of each
    labor_constant: NonNegativeFloat = 300.0
    """phase one: labor costs 1 - exp(-n / this) of its price after n steps of positive mean reward of an environment"""
    planner: Literal["schedule", "policy"] = "schedule"
    """a Gaussian for the rate of each bracket, drawn for an episode; or the AI Economist's network, for each period"""
    planner_std: PositiveFloat = 0.2  # standard deviation that a schedule's rates start with
    agent_updates: PositiveInt = 1  # updates of the agents for one of the planner
    tax_annealing: Share = 0.0  # share of phase two in which the highest allowed rate rises from 0.1 to 1; at 0 it is 1
    hidden_size: PositiveInt = 64  # width of the two hidden layers of the agents' policy and of their values
    planner_hidden_size: PositiveInt = 64  # the same of a planner's policy
    activation: Literal["relu", "silu", "tanh"] = "tanh"  # hidden activation
    learning_rate: PositiveFloat = 2e-3  # Adam step size of the agents
    planner_learning_rate: PositiveFloat | None = None  # Adam step size of the planner; None: 0.04, of a policy 0.005
    anneal_lr: bool = True  # step sizes fall to 0 in phase two, linearly
    gamma: Share = 0.99  # discount factor of a step
    gae_lambda: Share = 0.95  # lambda of generalised advantage estimation
    planner_gae_lambda: Share = 0.67  # the same of a planner's policy, per period (AI Economist: 0.98 a step)
    update_epochs: PositiveInt = 4  # passes over the episodes of an iteration, of a planner's policy over its decisions
    num_minibatches: PositiveInt = 8  # minibatches of a pass
    clip_coef: PositiveFloat = 0.2  # PPO's clipping of the probability ratio
    ent_coef: NonNegativeFloat = 0.025  # weight of the agents' entropy (AI Economist: 0.025)
    planner_ent_coef: NonNegativeFloat = 0.01  # weight of the planner's, summed over brackets, as phase two starts
    planner_ent_coef_end: NonNegativeFloat = 0.001  # the same at its end, linear in between
    vf_coef: NonNegativeFloat = 0.5  # weight of the squared error of normalised values
    value_decay: Decay = 0.9
    """weight of the past in the running moments by which returns are normalised"""
    max_grad_norm: PositiveFloat = 0.5  # the gradient of each network of each seed is clipped to this norm


@arguments
class ERMAS:
    epsilon: NonNegativeFloat = 0.0005  # slack on an agent's regret, utility per step
    beta: NonNegativeFloat = 0.4  # weight of the meta-gradient (Eq. 15)
    lambda_init: NonNegativeFloat = 10.0  # lambda_0, first weight of an agent's own reward, and during the warm-up
    lambda_lr: NonNegativeFloat = 300.0  # alpha_lambda, step size of lambda
    lambda_damping: NonNegativeFloat = 1000.0
    """kappa: an agent's own reward counts lambda + kappa * (regret - epsilon), so that lambda settles; 0: as printed"""
    regret_decay: Decay = 0.95
    """weight of the past in the running mean of regrets, which counts as 0 where it is below"""
    lambda_max: PositiveFloat = 100.0  # upper bound of lambda
    inner_steps: PositiveInt = 1  # M = n_inner, trust-region steps of a deviation
    rho: PositiveFloat = 0.05  # radius of the trust region, mean KL(policy || deviation) in nats
    trust_batch_size: PositiveInt = 1024  # samples of each agent that a trust-region step is found with
    meta_gradient: Literal["fomaml", "reptile"] = "fomaml"
    """estimate of grad J_i(deviation): the gradient at its end, or the mean along it (Eq. 15; with M = 1 just g_1)"""
    cg_steps: PositiveInt = 10  # conjugate gradient steps of the natural gradient
    cg_damping: NonNegativeFloat = 1e-2  # damping of the Fisher matrix
    warmup: Share = 0.1  # share of phase two with lambda_0, without deviations and with the planner at rest


@arguments
class Args(ERMAS, PPO, economy.World, Experiment):
    def __post_init__(self):
        super().__post_init__()
        if self.lambda_init > self.lambda_max:
            raise ValueError(f"lambda_init must be at most lambda_max, got {self.lambda_init}")
        if self.planner_learning_rate is None:
            self.planner_learning_rate = 0.04 if self.planner == "schedule" else 5e-3
        if TAXES[self.method] != "planner":  # nothing to respond to
            self.response_steps = 0
        if self.num_envs % 2:
            raise ValueError(f"num_envs must be even, because schedules come in pairs, got {self.num_envs}")


PAPER = {  # the AI Economist's training, but for whole episodes of as many environments as a GPU likes
    "env_id": "economy_v0",
    "planner": "policy",
    "response_steps": 0,
    "phase_one_timesteps": 25_000_000,
    "phase_two_timesteps": 50_000_000,
    "num_envs": 256,
    "labor_constant": 10_000.0,
    "rate_step": 0.05,
    "hidden_size": 128,
    "planner_hidden_size": 256,
    "tax_annealing": 0.54,
    "learning_rate": 3e-4,
    "planner_learning_rate": 1e-4,
    "planner_gae_lambda": 0.13,
    "anneal_lr": False,
    "gamma": 0.998,
    "gae_lambda": 0.98,
    "num_minibatches": 341,  # of 1,500 steps
    "update_epochs": 1,
    "clip_coef": 0.3,
    "planner_ent_coef": 2.0,
    "planner_ent_coef_end": 0.125,
    "vf_coef": 0.05,
    "max_grad_norm": 10.0,
    "log_interval": 1_000_000,
    "checkpoint_interval": 2_000_000,
    "eval_timesteps": 25_000_000,
}


@dataclass
class Task:
    """The economy of a phase, and how agents and planner learn in it."""

    env: Economy
    args: Args
    step: Callable  # env.step, or that compiled
    wide_step: Callable  # the same for N + 1 slices


@dataclass
class Learner:
    """What training changes. `moments` are of returns, of agents for own and planner's rewards, and of regrets."""

    nets: Nets
    optimizers: dict[str, torch.optim.Optimizer]  # agents, planner
    moments: dict[str, Moments]  # agents, planner, regrets
    lambdas: Tensor  # [S, N] weight of each agent's own reward
    streams: dict[str, Generators]  # games, minibatches
    last: State | None = None  # in which the last episodes ended

    def agents(self) -> dict:
        """What warm_agents.pt and test_agents.pt hold."""
        return {
            "policy": self.nets["agents"].flat,
            "critic": self.nets["agents_critic"].flat,
            "moments": self.moments["agents"].flat,
        }

    def trained(self) -> dict:
        """What policy.pt holds."""
        return {"nets": {name: net.flat for name, net in self.nets.items()}}

    def everything(self) -> dict:
        """What a checkpoint holds of it."""
        own = {name: getattr(self, name) for name in ("optimizers", "lambdas", "streams")}
        moments = {name: moments.flat for name, moments in self.moments.items()}
        return self.trained() | own | {"moments": moments, "last": vars(self.last)}


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
class Schedule:
    """Planners that draw the rates of an episode. `flat` [S, K]: the means of each run's Gaussians, and the logarithms
    of their standard deviations."""

    flat: Tensor
    brackets: int

    def mean_and_log_std(self) -> list[Tensor]:
        """[S, 1, b] each."""
        return [half[:, None, : self.brackets] for half in self.flat.chunk(2, 1)]


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


def make_learner(env: Economy, streams: dict[str, Generators], args: Args) -> Learner:
    """Policy and values of each run's agents, which share them, and of its planner."""
    S = len(streams["init"])
    O, A = env.obs_mask.shape[1], env.action_mask.shape[1]
    G = env.planner_obs_size
    brackets = len(env.cutoffs)
    rates = brackets * (1 + env.num_rates)
    sizes = {
        "agents": (O, A),
        "agents_critic": (O, 2),  # own rewards, the planner's
        "planner": (G, rates),
        "planner_critic": (G, 1),
    }
    nets = {}
    for name, (n_in, n_out) in sizes.items():
        width = args.planner_hidden_size if "planner" in name else args.hidden_size
        gain = 1.0 if "critic" in name else 0.01
        nets[name] = orthogonal_mlp([n_in, width, width, n_out], args.activation, 1, gain, streams["init"])
    if args.planner == "schedule":
        start = economy.spread_rates(args, S).to(env.device, env.dtype)
        start = F.pad(start, (0, -brackets % 8))  # K is a multiple of 16, see MLP
        log_std = torch.full_like(start, math.log(args.planner_std))
        flat = torch.cat((start, log_std), 1)
        nets["planner"] = Schedule(flat.requires_grad_(), brackets)
    moments = {}
    for name, heads in (("agents", 2), ("planner", 1), ("regrets", env.num_agents)):
        zeros = torch.zeros(S, heads, 3, dtype=torch.float64, device=env.device)
        moments[name] = Moments(zeros)
    lambdas = torch.zeros(S, env.num_agents, dtype=env.dtype, device=env.device)
    lambdas += args.lambda_init
    return Learner(nets, make_optimizers(nets), moments, lambdas, streams)


def make_optimizers(nets: Nets) -> dict[str, torch.optim.Optimizer]:
    """An Adam for agents and one for planners, whose step sizes `anneal` sets."""
    optimizers = {}
    for name in ("agents", "planner"):
        flats = [nets[name].flat, nets[f"{name}_critic"].flat]
        optimizers[name] = torch.optim.Adam(flats, eps=1e-5, fused=True)
    return optimizers


def log_policy(net: MLP, obs: Tensor, valid: Tensor) -> Tensor:
    """Log-probabilities at obs [S, n, M, O], of the shape of `valid`: of actions [S, n, M, A], or of a planner's rates
    [S, 1, M, b, c]. Invalid choices have none."""
    logits = net(obs).unflatten(-1, valid.shape[3:])
    return torch.where(valid, logits, -1e9).log_softmax(-1)


def logprob(logp: Tensor, choices: Tensor) -> Tensor:
    """Log-probability [S, n, M] of actions [S, n, M], or of the rates of all brackets at once [S, 1, M, b]."""
    return logp.gather(-1, choices.unsqueeze(-1)).flatten(3).sum(-1)


# --------------------------------------------------------------------------------------------------------------------
# Rollout of whole episodes, in slices where agents deviate


def join(games: list[Batch]) -> Batch:
    """Episodes [S, N, B, ...] of several games, side by side."""
    return {name: torch.cat([episodes[name] for episodes in games], 2) for name in games[0]}


def own_slices(x: Tensor) -> Tensor:
    """What the deviating agents see, do or get [S, N, B, ...] of x [S, N, N + 1, B, ...]: agent i in slice i."""
    return x[:, :, :-1].diagonal(0, 1, 2).movedim(-1, 1)


def act(net: MLP, deviations: MLP | None, obs: Tensor, valid: Tensor, noise: Tensor | float) -> Batch:
    """What is remembered of a choice [S, n, L, B, ...]: obs, valid, actions or a planner's rates, by the same Gumbel
    noise [S, n, 1, B, ...] in all slices (0: the likeliest), and their log-probabilities. In slice i agent i acts by
    its deviation."""
    seen = obs.flatten(1, 3).unsqueeze(1)
    logp = log_policy(net, seen, valid.flatten(1, 3).unsqueeze(1))
    logp = logp.reshape(valid.shape)
    if deviations is not None:
        own = log_policy(deviations, own_slices(obs), own_slices(valid))
        logp[:, :, :-1].diagonal(0, 1, 2).copy_(own.movedim(1, -1))
    actions = (logp + noise).argmax(-1)
    logprobs = logp.gather(-1, actions.unsqueeze(-1)).flatten(4).sum(-1)
    return {"obs": obs, "valid": valid, "actions": actions, "logprobs": logprobs}


def draw_schedules(task: Task, learner: Learner, stage: str) -> Tensor | None:
    """Rates [S, B, b] that hold for an episode, or None: the planner's policy chooses in every period, or there is no
    planner. The second half of a run's environments mirrors the first: antithetic pairs. Of stages (see `update`)
    "response" has random rates, "selfish" the means, without pairs, "probe" 0.25 and 0.75."""
    generators = learner.streams["games"]
    half = (task.args.num_envs // 2, len(task.env.cutoffs))
    if task.env.tax != "planner":
        return None
    if stage in ("response", "probe"):
        rates = economy.random_schedules(half, generators)
        if stage == "probe":
            rates = torch.full_like(rates, 0.25)
        return torch.cat((rates, 1 - rates), 1)
    if task.args.planner == "policy":
        return None
    mean, log_std = learner.nets["planner"].mean_and_log_std()
    if stage == "selfish":
        return mean.expand(-1, task.args.num_envs, -1)
    noise = envs.per_seed(torch.randn, half, generators)
    return mean + log_std.exp() * torch.cat((noise, -noise), 1)


@torch.no_grad()
def rollout(task: Task, learner: Learner, stage: str, deviations: MLP | None = None) -> tuple[Batch, Batch]:
    """An episode of every environment after the one that ended in learner.last, with sampled actions. With deviations
    of each agent of each run, S*N policies, L = N + 1 slices of the same games are played by the same random numbers,
    and in slice i agent i follows its deviation; without them L = 1. Environments whose schedules are an antithetic
    pair play by the same random numbers, too.

    Returns the joint policy's episodes with what came out of them (`economy.FACTS`), and of the deviating agents obs,
    valid, actions, logprobs and rewards [S, N, B, T, ...]."""
    env = task.env
    nets = learner.nets
    generators = learner.streams["games"]
    S = len(generators)
    L = 1 if deviations is None else env.num_agents + 1
    schedules = draw_schedules(task, learner, stage)
    copies = 1 if schedules is None or stage == "selfish" else 2
    layout = economy.Layout(S, L, copies)
    state, _ = env.reset(generators, learner.last)
    state = economy.of_all(layout.repeat, state)
    obs = env.observe(state)
    valid = env.valid_actions(state)
    rates = None
    if schedules is not None:
        rates = schedules.unsqueeze(1).expand(-1, L, -1, -1).flatten(0, 2)
    step_env = task.step if L == 1 else task.wide_step
    steps = defaultdict(list)
    own = defaultdict(list)
    tax_days = []
    for t in range(env.horizon):
        seen = layout.by_agent(valid)
        step = act(nets["agents"], deviations, layout.by_agent(obs), seen, layout.gumbel(seen.shape, generators))
        if env.tax == "planner" and schedules is None and t % env.period == 0:
            planner_obs = layout.by_agent(env.planner_obs(state).unsqueeze(1))
            valid_rates = layout.by_agent(env.valid_rates(state).unsqueeze(1))
            noise = 0.0 if stage == "selfish" else layout.gumbel(valid_rates.shape, generators)
            choice = act(nets["planner"], None, planner_obs, valid_rates, noise)
            rates = choice["actions"].flatten(0, 3)
            for name, x in choice.items():
                steps[f"planner_{name}"].append(x[:, :, -1])
        actions = step["actions"].movedim(1, -1).flatten(0, 2)
        noise = layout.repeat(env.draw(generators))
        state, obs, reward, _, _, info = step_env(state, actions, noise, rates)
        valid = info["valid_actions"]
        step["rewards"] = layout.by_agent(reward)
        for name, x in step.items():
            steps[name].append(x[:, :, -1].contiguous())  # a view would keep all slices
            if deviations is not None:
                own[name].append(own_slices(x).contiguous())
        steps["planner_rewards"].append(layout.joint(info["planner_reward"]).view(S, 1, -1))
        if (t + 1) % env.period == 0:
            tax_days.append(economy.of_all(layout.joint, state))
    learner.last = economy.of_all(layout.joint, state)
    episodes = {name: torch.stack(values, 3) for name, values in steps.items()}
    if schedules is not None:
        episodes["planner_actions"] = schedules[:, None, :, None]
    episodes |= economy.facts(env, learner.last, tax_days, S)
    return episodes, {name: torch.stack(values, 3) for name, values in own.items()}


# --------------------------------------------------------------------------------------------------------------------
# Losses: PPO for agents and planner. To losses all agents of a run are samples of one policy, [S, 1, M, ...].


def gae(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates [S, H, M, T] (Schulman et al. 2016): rewards [S, H, M, T], values [S, H, M,
    T + 1]."""
    advantage = 0.0
    advantages = []
    for t in reversed(range(rewards.shape[-1])):
        delta = rewards[..., t] + gamma * values[..., t + 1] - values[..., t]
        advantage = delta + gamma * gae_lambda * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1], -1)


def estimate(learner: Learner, name: str, obs: Tensor, rewards: Tensor, gamma: float, args: Args) -> tuple:
    """Advantages and returns [S, H, M, T] of the agents' or planner's rewards of that shape, observed obs [S, n, B, T,
    O], M = n * B. An episode's end is one: what counts is the sum over it (Eq. 18)."""
    H, M, T = rewards.shape[1:]
    critic = learner.nets[f"{name}_critic"]
    values = critic(obs.flatten(1, 3).unsqueeze(1))
    values = values.squeeze(1).mT.unflatten(2, (M, T))
    mean, std = learner.moments[name].mean_and_std()
    worth = (mean + std * values)[:, :H]  # in units of rewards
    decay = {"agents": args.gae_lambda, "planner": args.planner_gae_lambda}
    advantages = gae(rewards, F.pad(worth, (0, 1)), gamma, decay[name])
    return advantages, advantages + worth


@torch.no_grad()
def prepare(learner: Learner, name: str, episodes: Batch, rewards: Tensor, gamma: float, args: Args) -> Batch:
    """The agents' or planner's samples for the losses, [S, 1, M, ...] each, with advantages of each kind of reward
    [S, H, M]; the moments of returns move on. rewards [S, H, n * B, T]."""
    advantages, returns = estimate(learner, name, episodes["obs"], rewards, gamma, args)
    moments = learner.moments[name]
    moments.update(returns, args.value_decay)
    mean, std = moments.mean_and_std()
    returns = (returns - mean) / std
    samples = {"advantages": advantages.flatten(2), "returns": returns.flatten(2).mT.unsqueeze(1)}
    for key in ("obs", "valid", "actions", "logprobs"):
        samples[key] = episodes[key].flatten(1, 3).unsqueeze(1)
    return samples


def standardize(advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages [S, 1, M] of mean 0 and standard deviation 1, and what they were divided by [S, 1, 1]."""
    std, mean = torch.std_mean(advantages, 2, correction=0, keepdim=True)
    std = std.clamp_min(1e-6)
    return (advantages - mean) / std, std


def ppo_loss(learner: Learner, name: str, batch: Batch, correction: Tensor | float, args: Args) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: PPO's clipped objective of the agents or the planner, minus the entropy bonus, plus the squared error
    of values, plus <correction, parameters>: a gradient that is added as it is, [S, K]. Returns loss, metrics [S]."""
    policy = learner.nets[name]
    critic = learner.nets[f"{name}_critic"]
    advantages = batch["advantages"]
    logp = log_policy(policy, batch["obs"], batch["valid"])
    log_ratio = logprob(logp, batch["actions"]) - batch["logprobs"]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    surprise = -(logp.exp() * logp).flatten(3)
    entropy = surprise.sum(-1).mean((1, 2))  # of all brackets
    error = critic(batch["obs"]) - batch["returns"]
    value_loss = error.square().mean((1, 2, 3))
    policy_loss = -gain.mean((1, 2))
    ent_coef = learner.optimizers[name].param_groups[0]["ent_coef"]
    loss = policy_loss - ent_coef * entropy + args.vf_coef * value_loss
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": (ratio - 1 - log_ratio).mean((1, 2)),
        "clipfrac": (ratio != clipped).to(ratio.dtype).mean((1, 2)),
    }
    loss = loss.sum() + (correction * policy.flat).sum()
    return loss, metrics


def schedule_loss(planner: Schedule, rates: Tensor, advantages: Tensor, ent_coef: float) -> tuple[Tensor, Batch]:
    """ALGO LOGIC: minus the score-function estimate of the welfare that the planners' Gaussians expect, of rates
    [S, B, b] before they were limited to [0, 1] and advantages [S, B], minus the entropy bonus. In antithetic pairs the
    half of the welfare that is even in the noise drops out of the gradient of the means. Returns loss, metrics [S]."""
    mean, log_std = planner.mean_and_log_std()
    logprobs = -0.5 * ((rates - mean) / log_std.exp()).square() - log_std
    policy_loss = -(logprobs.sum(2) * advantages).mean(1)
    entropy = log_std.sum((1, 2))  # up to a constant
    loss = policy_loss - ent_coef * entropy
    return loss.sum(), {"losses/planner_policy_loss": policy_loss.detach(), "losses/planner_entropy": entropy.detach()}


def take(samples: Batch, chosen: Tensor) -> Batch:
    """Of samples [S, n, M, ...] those with the numbers `chosen` [S, m], for all n of a run the same: [S, n, m, ...]."""
    S, n, M = samples["advantages"].shape
    first = M * torch.arange(S * n, device=chosen.device)
    index = first.view(S, n, 1) + chosen.unsqueeze(1)  # into the flattened [S, n, M]
    batch = {}
    for name, values in samples.items():
        rows = values.flatten(0, 2).index_select(0, index.flatten())
        batch[name] = rows.unflatten(0, index.shape)
    return batch


def minibatches(samples: Batch, generators: Generators, args: Args) -> Iterator[Batch]:
    """Parts of the samples: in every epoch each sample once, in an order of its run."""
    M = samples["advantages"].shape[2]
    for _ in range(args.update_epochs):
        order = envs.per_seed(torch.randperm, M, generators)
        for chosen in order.chunk(args.num_minibatches, 1):
            yield take(samples, chosen)


def improve(learner: Learner, name: str, samples: Batch, correction: Tensor | float, args: Args) -> Batch:
    """Epochs of PPO; the gradient of each network of each run is clipped on its own. Returns mean metrics [S]."""
    policy = learner.nets[name]
    critic = learner.nets[f"{name}_critic"]
    flats = [policy.flat, critic.flat]
    prefix = {"agents": "losses/", "planner": "losses/planner_"}
    history = defaultdict(list)
    for batch in minibatches(samples, learner.streams["minibatches"], args):
        loss, metrics = ppo_loss(learner, name, batch, correction, args)
        for flat, gradient in zip(flats, torch.autograd.grad(loss, flats)):
            flat.grad = perturb.project(gradient, args.max_grad_norm, "l2")
        learner.optimizers[name].step()
        for key, value in metrics.items():
            history[prefix[name] + key].append(value.detach())
    return {key: sum(values) / len(values) for key, values in history.items()}


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


def policy_gradient(net: MLP, batch: Batch) -> Tensor:
    """g of Eq. (16) [S, N, K]: gradient of each of S*N policies from its own samples [S, N, M, ...]."""
    with torch.enable_grad():
        flat = net.flat.detach().requires_grad_()
        logp = log_policy(replace(net, flat=flat), batch["obs"], batch["valid"])
        objective = (logprob(logp, batch["actions"]) * batch["advantages"]).mean(2)
        (gradient,) = torch.autograd.grad(objective.sum(), flat)
    return gradient.view(*objective.shape, -1)


@torch.no_grad()
def own_samples(learner: Learner, games: Batch, args: Args) -> Batch:
    """Samples [S, N, M, ...] of each agent's games [S, N, B, T, ...], with advantages of its own rewards."""
    rewards = games["rewards"]
    advantages, _ = estimate(learner, "agents", games["obs"], rewards.flatten(1, 2).unsqueeze(1), args.gamma, args)
    samples = {"advantages": advantages.view(rewards.shape).flatten(2)}
    for name in ("obs", "valid", "actions"):
        samples[name] = games[name].flatten(2, 3)
    return samples


def deviate(task: Task, learner: Learner, episodes: Batch) -> tuple[Batch, list[Batch]]:
    """What each agent could gain alone: M trust-region steps of a copy of the policy that only agent i follows. Of the
    joint policy's B_0, `episodes`, come the first samples; in B_1 to B_M the deviating copies and, by the same random
    numbers, the joint policy play.

    Returns the estimate of grad J_i(deviation) [S, N, K] (Eq. 15), the local regrets [S, N] and the mean KL of the
    whole deviations [S, N] (Eq. 13, 14), on the states of the latest samples; and the joint policy's episodes B_1 to
    B_M."""
    args = task.args
    agents = learner.nets["agents"]
    S, N = learner.lambdas.shape
    anchor_flat = agents.flat.detach().repeat_interleave(N, 0)
    deviations = replace(agents, flat=anchor_flat)
    own = own_samples(learner, episodes, args)
    path = [policy_gradient(deviations, own)]
    joint = []
    for _ in range(args.inner_steps):
        order = envs.per_seed(torch.randperm, own["advantages"].shape[2], learner.streams["minibatches"])
        batch = take(own, order[:, : args.trust_batch_size])

        def policy(flat: Tensor, batch: Batch = batch) -> Tensor:
            return log_policy(replace(agents, flat=flat), batch["obs"], batch["valid"]).flatten(0, 1)

        advantages = batch["advantages"].flatten(0, 1)  # [S*N, m]
        visits = torch.full_like(advantages, 1 / advantages.shape[1])
        taken = F.one_hot(batch["actions"].flatten(0, 1), agents.sizes[-1])
        scores = taken * (visits * advantages).unsqueeze(2)
        anchor = {"logp": policy(anchor_flat).detach(), "visits": visits}
        weighted = {"scores": scores, "visits": visits}
        flat = trust_region_step(policy, deviations.flat, weighted, anchor, args.rho, args)
        deviations = replace(agents, flat=flat)
        kl = mean_kl(anchor, policy(flat).detach())
        joint_games, own_games = rollout(task, learner, "full", deviations)
        joint.append(joint_games)
        own = own_samples(learner, own_games, args)
        path.append(policy_gradient(deviations, own))
    outcome = {
        "gradient": path[-1] if args.meta_gradient == "fomaml" else torch.stack(path[:-1]).mean(0),
        "regrets": (own_games["rewards"] - joint_games["rewards"]).mean((2, 3)),
        "kl": kl.view(S, N),
    }
    return outcome, joint


def probe(task: Task, learner: Learner) -> Tensor:
    """How agents respond to taxes [S]: productivity under flat rates of 0.75 over that under 0.25, same games."""
    streams = make_streams(task.args, task.env.device, "probe ")
    task = replace(task, env=replace(task.env, tax_warmup=None))  # whatever rates are allowed in training
    episodes, _ = rollout(task, replace(learner, streams=streams), "probe")
    low, high = episodes["coin"].sum(1).chunk(2, 1)  # [S, B / 2] each
    return high.mean(1) / low.mean(1).clamp_min(1)


def update(task: Task, learner: Learner, stage: str) -> Batch:
    """1 + M episodes of every environment, an update of the agents, one iteration of Algorithm 2 if they are
    adversarial, and the planner's turn, Algorithm 1. Agent i ascends on -J_r + lambda_i (g_1 - beta grad
    J_i(deviation)), Eq. (11) with (15), else on its own reward. Stages: "selfish", each for itself; "response", the
    same under random rates; "warm-up", no deviations, the planner at rest; "agents", the planner at rest; "full".
    Returns metrics [S]."""
    args = task.args
    adversarial = args.method == "ermas" and stage not in ("selfish", "response")
    deviating = adversarial and stage != "warm-up"
    lambdas = learner.lambdas
    correction = 0.0
    regrets = error = excess = kl = torch.zeros_like(lambdas)
    first, _ = rollout(task, learner, stage)
    if deviating:
        outcome, joint = deviate(task, learner, first)
        moments = learner.moments["regrets"]
        moments.update(outcome["regrets"][..., None, None], args.regret_decay)
        regrets, error = moments.mean_and_error(args.regret_decay)
        kl = outcome["kl"]
        excess = regrets.clamp_min(0) - args.epsilon
    else:
        joint = [rollout(task, learner, stage)[0] for _ in range(args.inner_steps)]
    joint.insert(0, first)
    episodes = join(joint)
    weight = (lambdas + args.lambda_damping * excess).clamp(0, args.lambda_max)  # [S, N]
    rewards = episodes["rewards"]  # [S, N, B, T]
    both = torch.stack((rewards, episodes["planner_rewards"].expand_as(rewards)), 1)
    samples = prepare(learner, "agents", episodes, both.flatten(2, 3), args.gamma, args)
    advantages = samples["advantages"].unflatten(2, (rewards.shape[1], -1))
    own, welfare = advantages.unbind(1)  # [S, N, B * T]
    advantages = weight.unsqueeze(2) * own - welfare if adversarial else own
    samples["advantages"], scale = standardize(advantages.flatten(1).unsqueeze(1))
    if deviating:
        gradient = weight.unsqueeze(2) * outcome["gradient"]
        correction = args.beta * gradient.mean(1) / scale.squeeze(2)
    metrics = improve(learner, "agents", samples, correction, args)
    if task.env.tax == "planner" and stage == "full":
        turn = plan_schedules if args.planner == "schedule" else plan
        metrics |= turn(task, learner, episodes)
    learner.lambdas = (lambdas + args.lambda_lr * excess).clamp(0, args.lambda_max)  # ALGO LOGIC: Eq. (12)
    metrics |= economy.charts(episodes)
    metrics["ermas/lambda"] = lambdas.mean(1)
    metrics["ermas/local_regret"] = regrets.mean(1)
    metrics["ermas/regret_error"] = error.mean(1)
    metrics["ermas/deviation_kl"] = kl.amax(1)
    return metrics


def plan_schedules(task: Task, learner: Learner, episodes: Batch) -> Batch:
    """The planner's update from the schedules of whole episodes; means stay between 0 and 1."""
    planner = learner.nets["planner"]
    optimizer = learner.optimizers["planner"]
    welfare = episodes["planner_rewards"].sum(3)  # [S, 1, B]
    advantages, _ = standardize(welfare)
    rates = episodes["planner_actions"][:, 0, :, 0]
    loss, metrics = schedule_loss(planner, rates, advantages.squeeze(1), optimizer.param_groups[0]["ent_coef"])
    (planner.flat.grad,) = torch.autograd.grad(loss, planner.flat)
    optimizer.step()
    planner.mean_and_log_std()[0].detach().clamp_(0, 1)
    return metrics


def plan(task: Task, learner: Learner, episodes: Batch) -> Batch:
    """The update of planners' policies from decisions, each rewarded with the change of welfare until the next one."""
    env = task.env
    args = task.args
    missing = -env.horizon % env.period  # steps of the last period
    rewards = F.pad(episodes["planner_rewards"], (0, missing))
    rewards = rewards.unflatten(3, (-1, env.period)).sum(4)  # [S, 1, B, D]
    decisions = {name: episodes[f"planner_{name}"] for name in ("obs", "valid", "actions", "logprobs")}
    samples = prepare(learner, "planner", decisions, rewards, args.gamma**env.period, args)
    samples["advantages"], _ = standardize(samples["advantages"])
    return improve(learner, "planner", samples, 0.0, args)


def anneal(learner: Learner, phase: str, progress: float, args: Args) -> None:
    """In phase two step sizes and the planner's entropy bonus fall linearly."""
    left = 1 - progress if phase == "two" else 1.0
    scale = left if args.anneal_lr else 1.0
    ent_coef = args.planner_ent_coef_end + left * (args.planner_ent_coef - args.planner_ent_coef_end)
    settings = {"agents": (args.learning_rate, args.ent_coef), "planner": (args.planner_learning_rate, ent_coef)}
    for name, (rate, coef) in settings.items():
        learner.optimizers[name].param_groups[0].update(lr=scale * rate, ent_coef=coef)


# --------------------------------------------------------------------------------------------------------------------
# Evaluation: new agents of other risk aversion under the frozen planner


def play_tests(learner: Learner, tested: dict, args: Args, run_dir: Path) -> Batch:
    """New agents learn from scratch for each eta of args.eval_eta, phase one (or `tested`, who have done so), and then
    under each run's frozen planner or the method's taxes. Facts by eta and seed, [Q, S, N, E, ...]."""
    Q = len(args.eval_eta)
    S = args.num_seeds
    device = learner.lambdas.device
    eta = torch.tensor(args.eval_eta, device=device).repeat_interleave(S)  # runs are [Q, S]
    env = make_env(args, Q * S, "one", device, eta)
    new = make_learner(env, make_streams(args, device, "test ", Q), args)
    tested = tested or runs.find_part("test_agents", args, TAXED)
    planner = learner.nets["planner"]
    new.nets["planner"] = replace(planner, flat=planner.flat.detach().repeat(Q, 1))
    if tested:
        runs.restore({"test_agents": new.agents()}, tested)
    else:
        learn_selfishly("one", new, eta, args)
    if not args.evaluate and not args.eval_agents:  # which may be of other settings
        runs.save_part(run_dir, "test_agents", new.agents(), args)
    new.streams = make_streams(args, device, "test taxes ", Q)  # the same whether phase one was played or not
    task = learn_selfishly("two", new, eta, args)
    games = []
    for _ in range(math.ceil(args.eval_episodes / args.num_envs)):
        episodes, _ = rollout(task, new, "selfish")
        games.append({name: episodes[name] for name in economy.FACTS})
    facts = join(games)
    return {name: x[:, :, : args.eval_episodes].unflatten(0, (Q, S)) for name, x in facts.items()}


def learn_selfishly(phase: str, learner: Learner, eta: Tensor, args: Args) -> Task:
    """Agents with risk aversion eta [S] learn, each for itself; a planner keeps its policy. Returns the task."""
    task = make_task(make_env(args, len(eta), phase, eta.device, eta), args, len(eta))
    learner.last = None
    learner.optimizers = make_optimizers(learner.nets)
    timesteps = {"one": args.phase_one_timesteps, "two": args.eval_timesteps}[phase]
    count = math.ceil(timesteps / steps_per_iteration(task.env, args))
    for iteration in tqdm(range(count), desc=f"test, phase {phase}", disable=None, leave=False):
        anneal(learner, phase, iteration / count, args)
        update(task, learner, "selfish")
    return task


# --------------------------------------------------------------------------------------------------------------------
# Environment


def make_env(args: Args, num_runs: int, phase: str, device: torch.device, eta: Tensor | None = None) -> Economy:
    """The economy of a phase: "one", without taxes while labor becomes costly, "response" or "two"; eta [num_runs] or
    that of training. Annealing follows the number of episodes that the phase has."""
    fields = economy.fields_of(args, num_runs, eta)
    if phase == "one":
        fields |= {"tax": "free", "labor_constant": args.labor_constant}
    else:
        fields["tax"] = TAXES[args.method]
    env = envs.make(args.env_id, num_runs * args.num_envs, device, **fields)
    episodes = args.tax_annealing * args.phase_two_timesteps / (args.num_envs * env.horizon)
    if episodes == 0 or phase != "two" or eta is not None:  # the test's agents live with the taxes as they are
        return env
    return replace(env, tax_warmup=-episodes / 9, tax_slope=0.9 / episodes)


def make_streams(args: Args, device: torch.device, prefix: str = "", copies: int = 1) -> dict[str, Generators]:
    """Random streams of the runs, by purpose; all `copies` of a seed have the same."""
    streams = {}
    for purpose in ("init", "games", "minibatches"):
        streams[purpose] = []
        for _ in range(copies):
            streams[purpose] += envs.make_generators(args.seed, args.num_seeds, prefix + purpose, device)
    return streams


# --------------------------------------------------------------------------------------------------------------------
# Training


def make_task(env: Economy, args: Args, num_runs: int) -> Task:
    """Steps compiled if asked for. Torch refuses a ninth version of a function: earlier ones go."""
    steps = [env.step, economy.repeat_runs(env, num_runs, 1 + env.num_agents).step]
    if args.compile:
        torch.compiler.reset()
        options = {"comprehensive_padding": False}
        steps = [torch.compile(step, fullgraph=True, dynamic=False, options=options) for step in steps]
    return Task(env, args, *steps)


def steps_per_iteration(env: Economy, args: Args) -> int:
    """Environment steps of one run in which nobody deviates."""
    return (1 + args.inner_steps) * args.num_envs * env.horizon


def phase_bounds(env: Economy, args: Args) -> dict[str, tuple[int, int]]:
    """Iterations before a phase, and up to its end. Without a planner there is only phase one."""
    fresh = not args.warm_start
    steps = {
        "one": fresh * args.phase_one_timesteps,
        "response": fresh * args.response_steps,
        "two": (TAXES[args.method] == "planner") * args.phase_two_timesteps,
    }
    bounds = {}
    end = 0
    for phase, count in steps.items():
        begin = end
        end += math.ceil(count / steps_per_iteration(env, args))
        bounds[phase] = (begin, end)
    return bounds


def train(phase: str, learner: Learner, args: Args, run: runs.Run, checkpoint: dict) -> None:
    """A phase, from its start or from a checkpoint in it; a signal ends it, after a checkpoint, with
    KeyboardInterrupt."""
    S = args.num_seeds
    device = learner.lambdas.device
    env = make_env(args, S, phase, device)
    task = make_task(env, args, S)
    bounds = phase_bounds(env, args)
    begin, end = bounds[phase]
    iteration = begin
    window = defaultdict(list)  # metrics [S] since the last row of metrics.csv
    learner.last = None
    learner.optimizers = make_optimizers(learner.nets)
    if begin < checkpoint.get("iteration", 0):
        learner.last, _ = env.reset(learner.streams["games"])  # of the right shapes, to be filled
        with runs.exits(2, ValueError):
            runs.restore(learner.everything() | {"iteration": 0, "window": {}}, checkpoint)
        iteration = checkpoint["iteration"]
        window.update(runs.moved(checkpoint["window"], device))

    per_iteration = steps_per_iteration(env, args)
    step = iteration * per_iteration
    started, first_step = time.perf_counter(), step
    bar = runs.progress_bar(end * per_iteration, step)
    with runs.stop_signals() as caught:
        while iteration < end and not caught:
            progress = (iteration - begin) / (end - begin)
            stage = {"one": "selfish", "response": "response"}.get(phase, "warm-up")
            if phase == "two" and progress >= args.warmup:
                stage = "agents" if (iteration - begin) % args.agent_updates else "full"
            anneal(learner, phase, progress, args)
            for name, values in update(task, learner, stage).items():
                window[name].append(values)
            iteration += 1
            step += per_iteration
            bar.update(per_iteration)

            done = iteration == end
            if done or step % args.log_interval < per_iteration:
                metrics = {name: sum(values) / len(values) for name, values in window.items()}
                speed = S * (step - first_step) / (time.perf_counter() - started)
                metrics["charts/phase"] = torch.full((S,), PHASES[phase])
                if phase != "one":
                    metrics["charts/response"] = probe(task, learner)
                metrics["charts/SPS"] = torch.full((S,), speed)
                log(run, step, metrics)
                runs.show_progress(bar, welfare=f"{metrics['charts/welfare'].mean():.1f}")
                window = defaultdict(list)
                started, first_step = time.perf_counter(), step
            if done and end == bounds["two"][0]:
                runs.save_part(run.dir, "warm_agents", learner.agents(), args)
            if done or caught or step % args.checkpoint_interval < per_iteration:
                state = {"args": asdict(args), "iteration": iteration, "window": window, "rows": run.rows}
                runs.save(run.dir / "checkpoint.pt", state | learner.everything())
    bar.close()
    if caught:
        raise KeyboardInterrupt(f"at step {step}")


def main() -> None:
    with runs.exits(2, ValueError, ImportError, OSError):
        args, checkpoint = runs.parse_args(Args, __doc__, {"paper": PAPER})
        device = setup(args)
        env = make_env(args, args.num_seeds, "two", device)
        runs.check_memory(env, args)
        learner = make_learner(env, make_streams(args, device), args)
        bounds = phase_bounds(env, args)
        same = "env_id seed num_seeds num_agents cutoffs horizon period labor_coef hidden_size activation".split()
        tested = {}
        if args.eval_agents:
            tested = runs.load_part(args.eval_agents, "test_agents", args, [*same, "eval_eta", "phase_one_timesteps"])
        if args.warm_start and not checkpoint:
            names = [*same, "eta_train", "objective", *["response_steps"] * bool(args.response_steps)]
            warm = runs.load_part(f"{args.warm_start}/warm_agents.pt", "warm_agents", args, names)
            runs.restore({"warm_agents": learner.agents()}, warm)
        if args.evaluate:
            begin, end = bounds["two"]
            if checkpoint.get("iteration", math.inf) <= begin < end:
                raise ValueError(f"{args.evaluate} has no taxes yet; go on with --resume")
            runs.restore(learner.trained(), checkpoint)
        labels = [{"seed": args.seed + k} for k in range(args.num_seeds)]
        run = runs.Run(make_run_dir(args, __file__), labels, checkpoint.get("rows", []))
    if not args.evaluate:
        with runs.training(run.dir):
            runs.start_wandb(run, args)
            for phase, (_, end) in bounds.items():
                if checkpoint.get("iteration", 0) <= end:  # at its end: restored, and the next phase begins
                    train(phase, learner, args, run, checkpoint)
            economy.check_epsilon(learner.moments["regrets"], args)
            runs.save(run.dir / "policy.pt", {"args": asdict(args)} | learner.trained())
    with runs.reporting(run):
        if args.capture_video:
            env = replace(env, tax_warmup=None)  # all rates are allowed
            step, frames = economy.filmed(env)
            filmed = replace(learner, streams=make_streams(args, device, "video "), last=None)
            rollout(Task(env, args, step, step), filmed, "selfish")
            envs.save_gif(run.dir / "episode.gif", frames)
        if args.eval_episodes:
            tests = play_tests(learner, tested, args, run.dir)
            economy.report(run, env, args, tests)
    print(f"results: {run.dir}")


if __name__ == "__main__":
    main()
