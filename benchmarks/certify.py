"""How far the observations of trained policies can be moved before they act otherwise: Lipschitz constants, what they
prove about the value (ERNIE's Theorem 3.3), and what perturbations do in fact.

    python benchmarks/certify.py runs/RUN [runs/RUN ...]                # runs of ernie_{maddpg,mappo,coma,qcombo}.py
    python benchmarks/certify.py runs/NONE runs/STACKELBERG --radii 0.1 # before and after ERNIE

It prints a table per run, mean over seeds and cooperating agents with the 95% t-interval over seeds, and leaves
RUN/certificates.csv with a row per seed, agent, quantity and radius. Constants are per unit of the run's --epsilon, and
radii are in that unit and in the run's --norm. What a number is worth stands beside it:

    certified  a theorem, for every observation and every perturbation within the radius
    visited    only at the observations that the policies met: exact for an l2 ball and up to eight actions; an upper
               bound, at most sqrt(O) times the constant, for linf, and sqrt(A) times for probabilities of more actions
    estimate   the largest value that a search found, or a theorem about numbers of that kind
    measured   mean over episodes

Global constants are products of the layers' spectral norms (Szegedy et al. 2014, arXiv 1312.6199): hidden activations
have slopes of at most 1 (relu, tanh) or 1.1 (silu), and softmax changes by at most 1/sqrt(2) in l1 per unit of its
logits in l2. A greedy action stays what it is within the distance at which the logits of two actions can meet (Tsuzuku
et al. 2018, arXiv 1802.04034).

Theorem 3.3 (Bukharin et al. 2023, arXiv 2310.10810) takes policies pi_i that change by at most L_i epsilon in l1, hence
by tv_i = min(1, L_i epsilon / 2) in total variation. Draw the actions of the clean and of the perturbed game from a
maximal coupling: in one state the joint actions differ with probability tv <= 1 - prod_i (1 - tv_i), and until they
first do, both games are one. With rewards in an interval of width W, T steps and gamma <= 1

    |V - V~| <= W sum_{t<T} gamma^t (1 - (1 - tv)^(t+1)) <= W/2 sum_{t<T} gamma^t min(2, (t+1) sum_i L_i epsilon),

whatever the perturbations depend on. The paper has 2 L epsilon / (1 - gamma)^2 for |r| <= 1, which is W/2 = 1. Without
any theorem the loss is at most W sum gamma^t, and a bound that comes within 1% of that is vacuous. As the games part at
a state that the clean one visits, E[tv(s_t)] over its states may stand for tv, 1 - (1 - tv)^(t+1) <= sum_{k<=t} tv_k:
this, with the local constants around visited observations, is the estimate.

Axes: S seeds, N agents, E episodes, T steps, M samples, O observation, A action.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import envs  # noqa: E402  (the root must be on the path first)
from benchmarks import attack  # noqa: E402
from envs import perturb, robustness, runs  # noqa: E402

SCRIPTS = ("ernie_maddpg", "ernie_mappo", "ernie_coma", "ernie_qcombo")
SAMPLED = ("ernie_coma", "ernie_mappo")  # whose discrete policies draw their actions
SLOPES = {"relu": 1.0, "tanh": 1.0, "silu": 1.1}  # of the activations, at most
REWARDS = {"simple_crypto_v3": 4.0}  # width of the interval of a team's rewards, where messages are one-hot


@runs.arguments
class Args:
    run_dirs: tyro.conf.Positional[Annotated[tuple[Path, ...], Field(min_length=1)]]  # folders of runs
    radii: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.001, 0.01, 0.1)
    """sizes of the perturbation in the run's own unit of --epsilon"""
    samples: PositiveInt = 1000  # M, visited observations of an agent and seed, rounded up to whole episodes
    episodes: PositiveInt | None = None  # of a seed, in which losses are measured; default: the run's --eval-episodes
    seconds: PositiveInt = 300  # traffic lights: length of an episode
    warmup: NonNegativeInt = 300  # traffic lights: seconds of random switching before it


@dataclass
class Run:
    """The policies of all seeds of a run, and S * E environments."""

    args: object
    env: envs.Env
    policy: robustness.Policy
    weights: list[Tensor]
    """of the layers, [S, N, out, in], the first one as seen by raw observations; of the last one only the rows of the
    output, 0 in padding"""
    std: Tensor | None  # [S, N, 1, O] by which observations are divided, 0 where an entry never varied
    sampled: bool = False  # actions are drawn from softmax policies; else the best one or the mean is taken
    unit: Tensor | None = None  # of epsilon in each entry of an observation, [S, N, 1, O]

    def network(self, x: Tensor) -> Tensor:
        """Observations [S, N, M, O] -> logits, Q-values, or means before squashing [S, N, M, A]."""
        return self.policy.output(x)[..., : self.env.action_mask.shape[1]]

    def measure_unit(self, x: Tensor) -> None:
        """The unit of the run's --epsilon, where it needs them from visited observations x."""
        live = self.env.obs_mask[:, None].to(x.dtype)
        if self.std is not None:
            live = live * (self.std > 0)
        std = x.std(2, keepdim=True) if self.std is None else self.std
        unit = live * std if self.args.epsilon_units == "std" else live
        self.unit = unit.expand(len(x), -1, -1, -1)

    @property
    def reach(self) -> Tensor:
        """Length in l2, at most, of a perturbation of norm 1, [S, N, 1]: Jacobians and layers are measured in l2."""
        live = (self.unit > 0).to(self.unit.dtype).sum(-1)
        return live.sqrt() if self.args.norm == "linf" else torch.ones_like(live)


def load(folder: Path, asked: Args) -> Run:
    """Environments and policies of a run. Raises ValueError for a folder of something else."""
    script, args, checkpoint = attack.load_run(folder)
    if script.__name__ not in SCRIPTS:
        raise ValueError(f"{folder} is a run of {script.__name__}.py; this is for {', '.join(SCRIPTS)}")
    args = replace(args, eval_episodes=asked.episodes or args.eval_episodes, cuda=False)
    device = script.setup(args)
    build, nets = attack.rebuild((script, args, checkpoint), device, asked.seconds, asked.warmup)
    enough = math.ceil(asked.samples / build(num_envs=1).horizon)
    env = build(num_envs=args.num_seeds * max(args.eval_episodes, enough))
    net = nets["local"] if "local" in nets else nets["actor"]
    net.flat.requires_grad_(False)
    O, A = env.obs_mask.shape[1], env.action_mask.shape[1]
    weights = [w.unflatten(0, (args.num_seeds, -1)).expand(-1, env.num_agents, -1, -1) for w, _ in net.layers()]
    weights[0] = weights[0][..., :O]  # behind the observation MAPPO's shared policy is told the agent's number
    weights[-1] = weights[-1][:, :, :A] * env.action_mask[..., None]
    std = None
    if "normalizer" in nets:
        std = nets["normalizer"].flat[:, :, 1:]
        weights[0] = torch.where(std > 0, weights[0] / std, 0.0)
    sampled = env.discrete and script.__name__ in SAMPLED
    return Run(args, env, script.trained_policy(nets, env, args), weights, std, sampled)


# --------------------------------------------------------------------------------------------------------------------
# Lipschitz constants


def spectral(matrix: Tensor) -> Tensor:
    """Largest singular value of [..., rows, columns]."""
    return torch.linalg.matrix_norm(matrix, 2)


def l2_to_l1(matrix: Tensor) -> Tensor:
    """max |J v|_1 over |v|_2 <= 1 of J [..., A, O]: the largest |J' s|_2 over signs s; of many rows a bound."""
    A = matrix.shape[-2]
    if A > 8:
        return math.sqrt(A) * spectral(matrix)
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=matrix.dtype)] * A).view(-1, A)[: 2 ** (A - 1)]
    return torch.linalg.vector_norm(signs @ matrix, dim=-1).amax(-1)


def global_constants(layers: list[Tensor], mask: Tensor, slope: float) -> dict[str, Tensor]:
    """Upper bounds [S, N, 1] from the layers' weights, the first in units of epsilon: of what enters the last layer and
    of the output, in l2, and of the softmax of the output in l1, which does not feel what all logits have in common.
    mask [N, A] of the actions there are."""
    *hidden, last = layers
    below = math.prod((slope * spectral(weight) for weight in hidden), start=torch.ones(last.shape[:2]).double())
    mean = last.sum(2, keepdim=True) / mask.sum(1)[:, None, None]  # rows of padding are 0
    centred = (last - mean) * mask[..., None]
    found = {"below": below, "output": below * spectral(last), "probabilities": below * spectral(centred) / 2**0.5}
    return {name: value[..., None] for name, value in found.items()}


def jacobian(network: Callable, x: Tensor) -> Tensor:
    """[S, N, M, A, O] of the output with respect to x [S, N, M, O]. A sample's output does not depend on the others'
    inputs, so that a product per output gives the rows of all samples."""
    z, pull = torch.func.vjp(network, x)
    heads = torch.eye(z.shape[-1], dtype=z.dtype)[:, None, None, None].expand(-1, *z.shape)
    (rows,) = torch.func.vmap(pull)(heads)
    return rows.movedim(0, 3)


def local_constants(run: Run, x: Tensor, kind: str) -> Tensor:
    """Norm [S, N, M] of the Jacobian at x, per unit of epsilon: of the output in l2, of its softmax in l1."""
    network, size = (run.network, spectral) if kind == "output" else (lambda x: run.network(x).softmax(-1), l2_to_l1)
    return size(jacobian(network, x) * run.unit.unsqueeze(3)) * run.reach


def largest_nearby(run: Run, x: Tensor, kind: str, radius: float, generators, starts: int = 2) -> Tensor:
    """The largest local constant [S, N, M] found within `radius` of x: at x, at random points and after three ascent
    steps from each (which find nothing where Jacobians are piecewise constant, as of a relu network's output)."""
    constant = partial(local_constants, run, kind=kind)
    best = constant(x)
    for k in range(starts):
        noise = envs.per_seed(torch.randn, x.shape[1:], generators) * (run.unit > 0)
        start = end = perturb.rescale(noise, radius * (k + 1) / starts, run.args.norm)
        for _ in range(3):
            slope = torch.func.grad(lambda d: constant(x + run.unit * d).sum())(end)
            step = 0.5 * radius * run.reach[..., None] * slope / perturb.length(slope, "l2").clamp_min(1e-8)
            end = perturb.project(end + step, radius, run.args.norm)
        best = torch.stack([best, constant(x + run.unit * start), constant(x + run.unit * end)]).amax(0)
    return best


def greedy_radius(z: Tensor, last: Tensor, below: Tensor) -> Tensor:
    """Distance in l2 [S, N, M] within which the best action provably stays the best: the least (z_a - z_b) / (below
    |w_a - w_b|) over the other actions b, from logits z [S, N, M, A] and the rows w of the last layer [S, N, A, in]."""
    best = z.argmax(-1, keepdim=True)
    apart = torch.linalg.vector_norm(last.unsqueeze(3) - last.unsqueeze(2), dim=-1)  # [S, N, A, A]
    apart = apart.gather(2, best.expand_as(z))  # the row of each sample's best action
    radius = (z.gather(3, best) - z) / (below[..., None] * apart).clamp_min(1e-30)
    return radius.masked_fill(torch.arange(z.shape[-1]) == best, math.inf).amin(-1)  # -1e9 in padding is far away


# --------------------------------------------------------------------------------------------------------------------
# Theorem 3.3


def total_variation(changes: Tensor) -> Tensor:
    """Of joint policies, at most: from the changes in l1 [..., N] of the agents' own policies."""
    return 1 - (1 - (changes / 2).clamp(max=1)).prod(-1)


def parted_anywhere(tv: Tensor, steps: int) -> Tensor:
    """Probability [..., T], at most, that the games differ at step t, where joint policies differ by tv everywhere."""
    return 1 - (1 - tv[..., None]) ** torch.arange(1, steps + 1)


def parted_along(tv: Tensor) -> Tensor:
    """The same where they differ by tv [..., T] in the mean over the states of the clean game at step t."""
    return tv.cumsum(-1).clamp(max=1)


def value_loss(parted: Tensor, width: float | Tensor, gamma: float) -> Tensor:
    """W sum_t gamma^t parted_t, of [..., T]."""
    return width * (parted * gamma ** torch.arange(parted.shape[-1], dtype=torch.float64)).sum(-1)


def printed_bound(changes: Tensor, width: float | Tensor, gamma: float) -> Tensor:
    """The paper's 2 L epsilon / (1 - gamma)^2 for |r| <= W/2, L epsilon summed over agents: [..., N] -> [...]."""
    return width * changes.sum(-1) / (1 - gamma) ** 2


# --------------------------------------------------------------------------------------------------------------------
# Play


def perturbation(run: Run, x: Tensor, mode: str, radius: float, generators) -> Tensor:
    """What is added to observations x [S, N, M, O] of cooperating agents: "gaussian" noise of mean length `radius`, cut
    to the ball, or ("adversarial") what changes the policies most, in five ascent steps (MAD)."""
    if mode == "adversarial":
        policy = replace(run.policy, unit=run.unit, norm=run.args.norm, ascent_steps=5, starts=1)
        return robustness.worst_observations(run.env, policy, "mad", x, radius, generators) - x
    live = (run.unit > 0).to(x.dtype)
    half = live.sum(-1, keepdim=True) / 2
    mean_length = math.sqrt(2) * (torch.lgamma(half + 0.5) - torch.lgamma(half)).exp()
    delta = envs.per_seed(torch.randn, x.shape[1:], generators) * live * radius / mean_length.clamp_min(1e-9)
    return perturb.project(delta, radius, run.args.norm) * run.unit * run.env.cooperators[:, None, None]


@torch.no_grad()
def play(run: Run, generators, attackers=None, mode: str = "clean", radius: float = 0.0, kept: int = 0):
    """Episodes of all environments: team rewards [S, E, T], mean over cooperating agents, and observations [S, N,
    kept * T, O] of the first episodes. `generators` are those of the game, `attackers` of what disturbs it."""
    env, S = run.env, run.args.num_seeds
    rewards, seen = [], []
    state, obs = env.reset(generators)
    for _ in range(env.horizon):
        x = envs.by_agent(obs, S)  # [S, N, E, O]
        seen.append(x[:, :, :kept])
        output = run.policy.output(x if mode == "clean" else x + perturbation(run, x, mode, radius, attackers))
        if run.sampled:
            output = output + envs.per_seed(envs.gumbel, output.shape[1:], generators)
        action = envs.for_env(run.policy.to_action(output), env)
        state, obs, reward, *_ = env.step(state, action, env.draw(generators))
        rewards.append(reward[:, env.cooperators].mean(1).unflatten(0, (S, -1)))
    return torch.stack(rewards, 2), torch.stack(seen, 3).flatten(2, 3)


def streams(run: Run, purpose: str) -> list[torch.Generator]:
    return envs.make_generators(run.args.seed, run.args.num_seeds, purpose, run.env.device)


# --------------------------------------------------------------------------------------------------------------------
# Report

Found = list[tuple[str, str, float | str, Tensor]]  # quantity, worth, radius, values [S, N] of agents or [S] of teams


def certify_policies(run: Run, x: Tensor, radii: tuple[float, ...]) -> tuple[Found, dict]:
    """Constants and margins at x [S, N, M, O]; and the constants by name, global [S, N, 1], or (name, radius), nearby,
    [S, N, M]."""
    found, generators, mask = [], streams(run, "nearby"), run.env.action_mask
    layers = [weight.double() for weight in (run.weights[0] * run.unit, *run.weights[1:])]
    known = {name: c * run.reach for name, c in global_constants(layers, mask, SLOPES[run.args.activation]).items()}
    for kind in ("output", "probabilities") if run.env.discrete else ("output",):
        found.append((f"{kind}, global", "certified", "", known[kind].squeeze(2)))
        local = local_constants(run, x, kind)
        for name, value in (("mean", local.mean(2)), ("95%", local.quantile(0.95, 2)), ("largest", local.amax(2))):
            found.append((f"{kind}, local, {name}", "visited", "", value))
        nearby = local
        for radius in sorted(radii):  # what a small ball holds, a larger one holds
            known[kind, radius] = nearby = torch.maximum(nearby, largest_nearby(run, x, kind, radius, generators))
            found.append((f"{kind}, nearby, mean", "estimate", radius, nearby.mean(2)))
            found.append((f"{kind}, nearby, largest", "estimate", radius, nearby.amax(2)))
    if run.env.discrete:
        z = run.network(x)
        safe = greedy_radius(z.double(), layers[-1], known["below"])
        for radius in radii:
            moved = run.network(x + perturbation(run, x, "adversarial", radius, generators))
            same = (moved.argmax(-1) == z.argmax(-1)).double()
            found.append(("best action kept", "certified", radius, (safe > radius).double().mean(2)))
            found.append(("best action kept under MAD", "measured", radius, same.mean(2)))
    return found, known


def certify_values(run: Run, clean: Tensor, known: dict, radii: tuple[float, ...]) -> Found:
    """Theorem 3.3 beside measured losses, discounted and not; clean [S, E, T] are the rewards without perturbation."""
    team, T, played = run.env.cooperators, run.env.horizon, {}
    for radius in radii:
        for mode in ("gaussian", "adversarial"):
            played[mode, radius], _ = play(run, streams(run, "certify"), streams(run, "attack"), mode, radius)
    every, worth = torch.stack([clean, *played.values()]).double(), "estimate"
    width = every.amax((0, 2, 3)) - every.amin((0, 2, 3))
    if run.args.env_id in REWARDS:
        width, worth = torch.full_like(width, REWARDS[run.args.env_id]), "certified"
    found: Found = [("width W of team rewards", worth, "", width)]
    for gamma, name in ((run.args.gamma, f"gamma {run.args.gamma:g}"), (1.0, "undiscounted")):
        trivial = value_loss(torch.ones(T), width, gamma)
        found.append((f"loss, {name}: trivial bound", worth, "", trivial))
        for radius in radii:
            changes = radius * known["probabilities"][:, team, 0]
            bound = value_loss(parted_anywhere(total_variation(changes), T), width, gamma)
            found.append((f"loss, {name}: bound / trivial", "certified", radius, bound / trivial))
            found.append((f"loss, {name}: bound", worth, radius, bound))
            if gamma < 1:
                found.append((f"loss, {name}: bound as printed", worth, radius, printed_bound(changes, width, gamma)))
            changes = radius * known["probabilities", radius][:, team].double()
            changes = changes.transpose(1, 2).unflatten(1, (-1, T))  # [S, E, T, N]
            bound = value_loss(parted_along(total_variation(changes).mean(1)), width, gamma)
            found.append((f"loss, {name}: local bound", "estimate", radius, bound))
            for mode, kind in (("gaussian", "Gaussian"), ("adversarial", "MAD")):
                lost = value_loss((clean - played[mode, radius]).double().mean(1), 1.0, gamma)
                found.append((f"loss, {name}: {kind}", "measured", radius, lost))
    return found


def write(found: Found, run: Run, path: Path) -> None:
    """A row per seed, agent (or team), quantity and radius."""
    team, rows = run.env.cooperators.tolist(), []
    for quantity, worth, radius, values in found:
        columns = {"team": values}
        if values.ndim > 1:
            columns = {name: values[:, n] for n, name in enumerate(run.env.agents) if team[n]}
        for agent, column in columns.items():
            for k, value in enumerate(column.tolist()):
                row = {"env_id": run.args.env_id, "regularizer": run.args.regularizer, "seed": run.args.seed + k}
                row |= {"agent": agent, "quantity": quantity, "worth": worth, "radius": radius, "value": value}
                rows.append(row)
    runs.write_rows(path, rows)


def table(found: Found, run: Run) -> str:
    """A line per quantity: mean over seeds and cooperating agents with 95% t-interval over seeds, for each radius."""
    lines, highest = {}, {q.partition(":")[0]: v for q, _, _, v in found if q.endswith("trivial bound")}
    for quantity, worth, radius, values in found:
        seeds = (values[:, run.env.cooperators].mean(1) if values.ndim > 1 else values).numpy()
        cell = f"{seeds.mean():.3g}"
        if len(seeds) > 1:
            cell += f" ±{robustness.half_interval(seeds):.2g}"
        part, _, bound = quantity.partition(": ")
        limit = 1.0 if bound == "bound / trivial" else highest.get(part)
        if "bound" in bound and bound != "trivial bound" and (values >= 0.99 * limit).all():
            cell += " vacuous"
        cells = lines.setdefault((quantity, worth), [])
        cells.append(f"{radius}: {cell}" if radius else cell)
    return "\n".join(f"  {q:37s} {worth:9s}  " + "   ".join(cells) for (q, worth), cells in lines.items())


def main() -> None:
    with runs.quiet_pipe():
        args = tyro.cli(Args, description=__doc__)
    with runs.exits(2, ValueError, ImportError, OSError):
        for folder in args.run_dirs:
            attack.load_run(folder)
    for folder in args.run_dirs:
        with runs.exits(2, ValueError, ImportError):
            run = load(folder, args)
        clean, x = play(run, streams(run, "certify"), kept=math.ceil(args.samples / run.env.horizon))
        run.measure_unit(x)
        found, known = certify_policies(run, x, args.radii)
        found += certify_values(run, clean, known, args.radii) if run.sampled else []
        with runs.exits(1, OSError):
            write(found, run, runs.folder(str(folder)) / "certificates.csv")
        about = f"{run.args.env_id}, {run.args.regularizer}, {run.args.num_seeds} seeds, {x.shape[2]} observations each"
        unit = f"epsilon in {run.args.norm}, {run.args.epsilon_units} units"
        print(f"\n{folder.name}: {about}; {unit}\n{table(found, run)}", flush=True)
        if not run.sampled:
            print("  no bound of the loss: Theorem 3.3 is about sampled actions, these are the best ones or the means")


if __name__ == "__main__":
    main()
