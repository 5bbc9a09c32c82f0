"""baselines/rma3c.py: losses by hand, who is moved by which step, what is perturbed, MADDPG at radius 0, runs."""

import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from commands import (
    ROOT,
    alike,
    check_rollouts_in_a_cuda_graph,
    check_updates_in_a_cuda_graph,
    fourth_order,
    learner,
    plain,
    rotated,
    without_speed,
)

import ernie_maddpg as maddpg
from envs import particle, robustness, runs

sys.path.insert(0, str(ROOT / "baselines"))

import rma3c as script  # noqa: E402
from rma3c import Args  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = dict(num_envs=4, batch_size=32, hidden_size=16, learning_starts=100, buffer_size=1000)
SMALL |= dict(total_timesteps=400, log_interval=100, checkpoint_interval=200, eval_episodes=4)
LOSSES = {"critic": script.critic_loss, "actor": script.actor_loss, "adversary": script.adversary_loss}


@pytest.fixture(autouse=True)
def settings():
    script.setup(Args(**SMALL))


def world(double=False, num_envs=8, size=1.0, **options):
    """(args, env, nets, optimizers, batch with noise) of a small problem, after short episodes of random play. Targets
    differ from their networks, and the weights of actors and adversaries are `size` times what they start with."""
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    args = Args(**(SMALL | options))
    make = {"num_agents": args.num_agents, "continuous_actions": args.continuous_actions, "device": DEVICE}
    env = script.envs.make(args.env_id, args.num_seeds * num_envs, dtype=torch.get_default_dtype(), **make)
    env = replace(env, horizon=5)
    nets, optimizers = script.make_nets(env, args)
    others, _ = script.make_nets(env, Args(**(SMALL | options | {"seed": 100})))
    with torch.no_grad():
        for name in ("actor", "critic", "adversary"):
            nets[name + "_target"].flat.copy_(others[name].flat)
        for name in ("actor", "adversary", "actor_target", "adversary_target"):
            nets[name].flat.mul_(size)
    streams = script.envs.make_generators(3, args.num_seeds, "test", DEVICE)
    replay = script.rollout(env.step, env, nets, args, script.draw_rollout(env, 0.5, streams))
    batch = script.sample(replay, num_envs, args, streams) | script.draw_noise(streams, env, args)
    return args, env, nets, optimizers, batch


def alternation(batch, k):
    """The minibatch with the noise of the k-th alternation."""
    return batch | {"gumbel": batch["gumbel"][:, k]} if "gumbel" in batch else batch


def snapshot(nets):
    return {name: net.flat.detach().clone() for name, net in nets.items()}


# ---------------------------------------------------------------------------------------------- losses by hand


def seen_by_hand(adversary, obs, env, args):
    """o~ [N, O] of obs [N, O], one agent after the other."""
    seen = obs.clone()
    for i in range(env.num_agents):
        if env.cooperators[i]:
            live = env.obs_mask[i]
            seen[i, live] += args.epsilon * torch.tanh(plain(adversary, i, obs[i]))[live]
    return seen


def actions_by_hand(actor, seen, env):
    """(z, action) [N, A] before and after squashing to [0, 1]; the best action as one-hot if discrete."""
    z, action = torch.zeros_like(env.action_mask, dtype=seen.dtype), torch.zeros_like(env.action_mask, dtype=seen.dtype)
    for i, size in enumerate(env.action_sizes):
        z[i, :size] = plain(actor, i, seen[i])[:size]
        if env.discrete:
            action[i, z[i, :size].argmax()] = 1.0
        else:
            action[i, :size] = (torch.tanh(z[i, :size]) + 1) / 2
    return z, action


def q_by_hand(critic, i, obs, action):
    return plain(critic, i, torch.cat((obs.flatten(), action.flatten())))[0]


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("env_id", ["simple_tag_v3", "simple_speaker_listener_v4"])
@torch.no_grad()
def test_critic_target_by_hand(env_id, continuous):
    """True observations for the target critics, perturbed ones, by the target adversaries, for the target actors."""
    options = dict(env_id=env_id, continuous_actions=continuous, activation="tanh", epsilon=0.7, gamma=0.9)
    args, env, nets, _, batch = world(double=True, size=3.0, batch_size=2, **options)
    batch["terminated"] = torch.tensor([[0.0, 1.0]], device=DEVICE)
    loss, metrics = script.critic_loss(nets, batch, env, args)
    errors = torch.zeros(2, env.num_agents, device=DEVICE)
    for m in range(2):
        obs, next_obs = batch["obs"][0, :, m], batch["next_obs"][0, :, m]
        seen = seen_by_hand(nets["adversary_target"], next_obs, env, args)
        _, next_action = actions_by_hand(nets["actor_target"], seen, env)
        for i in range(env.num_agents):
            after = q_by_hand(nets["critic_target"], i, next_obs, next_action)
            target = batch["rewards"][0, i, m] + 0.9 * (1 - batch["terminated"][0, m]) * after
            errors[m, i] = q_by_hand(nets["critic"], i, obs, batch["actions"][0, :, m]) - target
    assert loss.item() == pytest.approx(errors.square().mean(0).sum().item(), rel=1e-10)
    assert metrics["losses/critic_loss"].item() == pytest.approx(errors.square().mean().item(), rel=1e-10)


@pytest.mark.parametrize("others", ["policy", "replay"])
@torch.no_grad()
def test_policy_and_adversary_losses_by_hand(others):
    options = dict(env_id="simple_tag_v3", activation="tanh", epsilon=0.7, others_actions=others, policy_l2=0.01)
    args, env, nets, _, batch = world(double=True, size=3.0, batch_size=2, **options)
    q, penalty = torch.zeros(2, 2, env.num_agents, device=DEVICE).unbind()
    for m in range(2):
        obs = batch["obs"][0, :, m]
        z, present = actions_by_hand(nets["actor"], seen_by_hand(nets["adversary"], obs, env, args), env)
        for i in range(env.num_agents):
            joint = (present if others == "policy" else batch["actions"][0, :, m]).clone()
            joint[i] = present[i]
            q[m, i], penalty[m, i] = q_by_hand(nets["critic"], i, obs, joint), 0.01 * z[i].square().mean()
    loss, metrics = script.actor_loss(nets, batch, env, args)
    assert loss.item() == pytest.approx((penalty - q).mean(0).sum().item(), rel=1e-10)
    assert metrics["losses/actor_loss"].item() == pytest.approx(-q.mean().item(), rel=1e-10)
    loss, metrics = script.adversary_loss(nets, batch, env, args)
    of_team = q[:, env.cooperators].mean(0)
    assert loss.item() == pytest.approx(of_team.sum().item(), rel=1e-10)
    assert metrics["losses/adversary_loss"].item() == pytest.approx(of_team.mean().item(), rel=1e-10)


@pytest.mark.parametrize("player", ["actor", "adversary"])
def test_gradient_is_the_derivative_of_the_loss_with_the_others_held(player):
    options = dict(env_id="simple_tag_v3", activation="tanh", epsilon=0.5)
    args, env, nets, _, batch = world(double=True, size=3.0, **options)
    flat = nets[player].flat
    grad = torch.autograd.grad(LOSSES[player](nets, batch, env, args)[0], flat)[0]
    seen = script.deceive(nets["adversary"], batch["obs"], 0.5, env)
    present = script.squash(script.policy(nets["actor"], seen, env), env).detach()
    batch, args.others_actions = batch | {"actions": present}, "replay"  # so that moving one moves no other
    direction = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def moved(h):
        net = replace(nets[player], flat=(flat + h * direction).detach())
        return LOSSES[player](nets | {player: net}, batch, env, args)[0].item()

    assert (grad * direction).sum().item() == pytest.approx(fourth_order(moved), rel=1e-6)


def test_discrete_gradient_is_that_of_the_gumbel_softmax():
    """A critic linear in the action: its gradient meets the softmax's slope at the noise of this alternation."""
    args, env, nets, _, batch = world(double=True, continuous_actions=False, epsilon=0.5)
    nets["critic"] = script.init_mlp([3 * (18 + 5), 1, 1], "relu", 3, script.envs.make_generators(0, 1, "test", DEVICE))
    with torch.no_grad():  # the hidden unit is always active
        nets["critic"].layers()[0][1].fill_(100.0)
        nets["critic"].layers()[1][0].fill_(1.0)
    loss, _ = script.adversary_loss(nets, alternation(batch, 1), env, args)
    actual = torch.autograd.grad(loss, nets["adversary"].flat)[0]
    own = nets["critic"].layers()[0][0][:, 0, 54:].view(3, 3, 5)[range(3), range(3)].detach()  # weight on own action
    seen = script.deceive(nets["adversary"], batch["obs"], 0.5, env)
    soft = torch.softmax(script.policy(nets["actor"], seen, env) + batch["gumbel"][:, 1], -1)
    expected = torch.autograd.grad((soft * own[:, None]).sum(-1).mean(-1).sum(), nets["adversary"].flat)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------- the turns of an update


@pytest.mark.parametrize("continuous", [True, False])
def test_adversary_steps_lower_q_and_policy_steps_raise_it_each_with_the_other_at_rest(continuous):
    options = dict(env_id="simple_tag_v3", continuous_actions=continuous, epsilon=0.5, policy_l2=0.0, tau=0.0)
    args, env, nets, optimizers, batch = world(batch_size=128, size=3.0, **options)
    team, batch = env.cooperators, alternation(batch, 0)

    def values():  # of the Gumbel-softmax's noise where discrete
        seen = script.deceive(nets["adversary"], batch["obs"], args.epsilon, env)
        output = script.policy(nets["actor"], seen, env)
        action = torch.softmax(output + batch["gumbel"], -1) if env.discrete else script.squash(output, env)
        everybody = script.everybody
        joint = torch.where(script.own_slot(env), everybody(action), everybody(batch["actions"]))
        return script.q_values(nets["critic"], batch["obs"], joint).mean(-1)[0].detach()

    args.others_actions = "replay"
    for name, sign, movers in (("adversary", -1, team), ("actor", 1, torch.ones_like(team))):
        before, old = snapshot(nets), values()
        for _ in range(5):
            loss, _ = LOSSES[name](nets, batch, env, args)
            nets[name].flat.grad = torch.autograd.grad(loss, nets[name].flat)[0]
            optimizers[name].step()
        change = sign * (values() - old)
        assert (change[movers] > 1e-4).all() and (change[~movers] == 0).all()
        after = snapshot(nets)
        assert [n for n in nets if not torch.equal(before[n], after[n])] == [name]
        assert torch.equal((before[name] != after[name]).any(1), movers)  # opponents have no adversary


@pytest.mark.parametrize("continuous", [True, False])
def test_an_update_is_a_critic_step_then_alternations_then_the_targets(continuous):
    args, env, nets, optimizers, batch = world(descent_steps=3, continuous_actions=continuous, epsilon=0.3)
    turns, parts = [], []

    def watched(name):
        def loss(nets, *rest):
            turns.append((name, snapshot(nets)))
            parts.append(rest[0].get("gumbel"))
            return LOSSES[name](nets, *rest)

        return loss

    script.update(nets, optimizers, {name: watched(name) for name in LOSSES}, batch, env, args)
    assert [name for name, _ in turns] == ["critic", *["actor", "adversary"] * 3]
    if not continuous:
        assert all(torch.equal(parts[1 + k], batch["gumbel"][:, k // 2]) for k in range(6))
        assert batch["gumbel"].shape == (1, 3, 3, 32, 5) and not torch.equal(parts[1], parts[3])
    states = [state for _, state in turns]
    end = snapshot(nets)
    for (name, before), after in zip(turns, [*states[1:], end]):
        changed = {n for n in LOSSES if not torch.equal(before[n], after[n])}
        assert changed == {name}
    for name in LOSSES:
        assert all(torch.equal(state[name + "_target"], states[0][name + "_target"]) for state in states)
        expected = states[0][name + "_target"].lerp(end[name], args.tau)
        torch.testing.assert_close(end[name + "_target"], expected)


@pytest.mark.parametrize("continuous", [True, False])
def test_radius_0_is_maddpg_with_as_many_policy_steps(continuous):
    options = dict(env_id="simple_tag_v3", continuous_actions=continuous, descent_steps=3, epsilon=0.0)
    args, env, nets, optimizers, batch = world(num_seeds=2, **options)
    theirs = {n: replace(net, flat=net.flat.detach().clone().requires_grad_()) for n, net in nets.items()}
    adam = {name: torch.optim.Adam([theirs[name].flat], args.learning_rate, fused=True) for name in ("actor", "critic")}
    plain_args = maddpg.Args(regularizer="none", continuous_actions=continuous, hidden_size=16)
    start = snapshot(nets)
    for _ in range(2):
        script.update(nets, optimizers, LOSSES, batch, env, args)
        for name, k in [("critic", 0), ("actor", 0), ("actor", 1), ("actor", 2)]:
            loss, _ = getattr(maddpg, f"{name}_loss")(theirs, alternation(batch, k), env, plain_args)
            gradient = torch.autograd.grad(loss, theirs[name].flat)[0]
            theirs[name].flat.grad = maddpg.perturb.project(gradient, args.max_grad_norm, "l2")
            adam[name].step()
        for name in ("actor", "critic"):
            theirs[name + "_target"].flat.detach().lerp_(theirs[name].flat.detach(), args.tau)
    for name in ("actor", "critic", "actor_target", "critic_target"):
        assert torch.equal(nets[name].flat, theirs[name].flat) and not torch.equal(nets[name].flat, start[name])
    assert torch.equal(nets["adversary"].flat, start["adversary"])


# ---------------------------------------------------------------------------------------------- what is perturbed


@pytest.mark.parametrize("env_id", particle.TASKS)
def test_perturbation_is_in_the_ball_and_only_in_what_the_team_observes(env_id):
    args, env, nets, _, batch = world(double=True, env_id=env_id, size=20.0)
    obs = batch["obs"]
    seen = script.deceive(nets["adversary"], obs, 0.3, env)
    delta, live = (seen - obs).transpose(2, 3)[0], env.obs_mask & env.cooperators[:, None]  # [N, O, M]
    assert 0.29 < delta.abs().max() <= 0.3 + 1e-12
    assert (delta[~live] == 0).all() and (delta[live].abs().amax(-1) > 1e-3).all()
    assert torch.equal(script.deceive(nets["adversary"], obs, 0.0, env), obs)


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("perturbed", [True, False])
def test_rollout_acts_on_perturbed_observations_and_keeps_the_true_ones(perturbed, continuous):
    options = dict(env_id="simple_tag_v3", continuous_actions=continuous, perturb_rollout=perturbed, epsilon=1.0)
    args, env, nets, *_ = world(size=5.0, num_envs=64, **options)
    make_generators = script.envs.make_generators
    draws = script.draw_rollout(env, 0.0, make_generators(7, 1, "test", DEVICE))
    replay = script.rollout(env.step, env, nets, args, draws)
    state, true = env.reset(make_generators(7, 1, "test", DEVICE))
    for t in range(env.horizon):
        torch.testing.assert_close(replay["obs"][0, :, t], true)
        state, true, *_ = env.step(state, script.envs.for_env(replay["actions"][:, :, t].transpose(1, 2), env), None)
    torch.testing.assert_close(replay["obs"][0, :, -1], true)
    obs = replay["obs"][:, :, :-1].flatten(1, 2).transpose(1, 2)
    seen = script.deceive(nets["adversary"], obs, 1.0, env)
    played = replay["actions"].flatten(1, 2).transpose(1, 2)[0]  # [N, B * T, A]
    right, wrong = (script.policy(nets["actor"], x, env)[0] for x in ((seen, obs) if perturbed else (obs, seen)))
    if continuous:
        torch.testing.assert_close(played, script.squash(right[None], env)[0])
        assert ((played - script.squash(wrong[None], env)[0]).abs().amax((1, 2)) > 0.1).equal(env.cooperators)
    else:  # samples are likelier under the logits that they were drawn from
        chosen = [(played * torch.log_softmax(z, -1)).sum(-1).mean(1) for z in (right, wrong)]
        assert (chosen[0] > chosen[1]).equal(env.cooperators) and chosen[0][3] == chosen[1][3]


def constant_adversary(nets, bias):
    """Adversaries whose output before tanh is `bias` [O] whatever they observe."""
    with torch.no_grad():
        nets["adversary"].flat.zero_()
        nets["adversary"].layers()[-1][1][...] = bias[:, None]


def returns_of(env, nets, args, perturbation="clean", radius=0.0):
    streams = script.envs.make_generators(1, 1, "evaluation", DEVICE)
    return robustness.evaluate(env, script.trained_policy(nets, env, args), streams, perturbation, radius)


def test_returns_under_a_constant_perturbation_are_those_of_actors_with_shifted_biases():
    args, env, nets, *_ = world(double=True, env_id="simple_adversary_v3", size=3.0)
    O, returns = env.obs_mask.shape[1], {}
    bias = torch.randn(O, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    constant_adversary(nets, bias)
    for name, radius in (("true", 0.0), ("deceived", 0.4)):
        returns[name] = returns_of(env, nets, args, "adversary", radius)
    undisturbed = returns_of(env, nets, args)
    assert torch.equal(returns["true"], undisturbed)
    with torch.no_grad():
        weight, b = nets["actor"].layers()[0]
        live = (env.obs_mask & env.cooperators[:, None]).to(bias.dtype)
        b += weight @ (0.4 * torch.tanh(bias) * live)[..., None]
    shifted = returns_of(env, nets, args)
    torch.testing.assert_close(returns["deceived"], shifted)
    assert (shifted - undisturbed).abs().max() > 1e-3


@pytest.mark.parametrize("env_id", ["simple_spread_v3", "simple_adversary_v3"])
def test_length_and_saturation_by_hand(env_id):
    """Over live entries, which spread has 14 of 18 of, and the team, which is all but the first agent in adversary."""
    args, env, nets, _, batch = world(double=True, env_id=env_id, epsilon=0.5)
    obs, live = batch["obs"], env.obs_mask[env.cooperators].double()
    bias = torch.zeros(env.obs_mask.shape[1], device=DEVICE)
    bias[:2] = torch.tensor([5.0, -0.5])  # the first entry at the edge, the second not, the others not moved
    constant_adversary(nets, bias)
    metrics = script.diagnose(nets["adversary"], obs, env, args)
    length = (0.5 * torch.tanh(bias) * live).norm(dim=1).mean().item()
    assert metrics["rma3c/perturbation_norm"].item() == pytest.approx(length, rel=1e-10)
    assert metrics["rma3c/saturation"].item() == pytest.approx((live[:, 0].sum() / live.sum()).item(), rel=1e-10)


# ---------------------------------------------------------------------------------------------- training


def short_train(tmp_path, name, module=script, **options):
    args = module.Args(**(SMALL | options))
    env = module.make_env(args, args.num_seeds * args.num_envs, DEVICE)
    nets, optimizers = module.make_nets(env, args)
    run = runs.Run(tmp_path / name, [{"seed": seed} for seed in args.seeds])
    run.dir.mkdir()
    module.train(env, nets, optimizers, args, run, {})
    return args, env, nets, run.rows


@pytest.mark.parametrize("continuous", [True, False])
def test_a_whole_run_at_radius_0_is_one_of_maddpg(tmp_path, continuous):
    script.setup(Args(**SMALL))
    options = dict(continuous_actions=continuous, epsilon=0.0)
    _, _, ours, rows = short_train(tmp_path, "ours", descent_steps=1, **options)
    _, _, theirs, expected = short_train(tmp_path, "theirs", maddpg, regularizer="none", **options)
    assert all(torch.equal(ours[name].flat, theirs[name].flat) for name in theirs)
    for row, other in zip(rows, expected, strict=True):
        assert without_speed([{name: row[name] for name in other}]) == without_speed([other])
        assert row["eval/attacked_return"] == row["eval/episodic_return"]


@pytest.mark.slow
@pytest.mark.parametrize("continuous", [True, False])
def test_a_seed_does_not_depend_on_the_others(tmp_path, continuous):
    _, _, together, rows = short_train(tmp_path, "together", seed=5, num_seeds=3, continuous_actions=continuous)
    for k in range(3):
        _, _, alone, own = short_train(tmp_path, f"alone{k}", seed=5 + k, continuous_actions=continuous)
        for name in alone:
            assert alike(alone[name].flat, together[name].flat.unflatten(0, (3, -1))[k])
        assert alike(without_speed(own), without_speed([row for row in rows if row["seed"] == 5 + k]))


def test_all_networks_learn_at_their_own_rates_but_no_opponent_has_an_adversary(tmp_path):
    args, env, nets, _ = short_train(tmp_path, "run", env_id="simple_tag_v3")
    options = SMALL | dict(env_id=args.env_id, adversary_learning_rate=0.5)
    fresh, optimizers = script.make_nets(env, Args(**options))
    moved = {name: (nets[name].flat != fresh[name].flat).any(1) for name in nets}
    for name in ("actor", "critic"):
        assert moved[name].all() and moved[name + "_target"].all()
    assert moved["adversary"].equal(env.cooperators) and moved["adversary_target"].equal(env.cooperators)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    assert rates == {"actor": 3e-3, "critic": 3e-3, "adversary": 0.5}


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("env_id", particle.TASKS)
def test_every_task_trains(tmp_path, env_id, continuous):
    _, _, _, rows = short_train(tmp_path, "run", env_id=env_id, continuous_actions=continuous, total_timesteps=200)
    assert rows and all(math.isfinite(float(v)) for v in rows[-1].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [dict(others_actions="replay", activation="silu"), dict(perturb_rollout=False, activation="tanh", norm="linf")],
)
def test_every_option_trains(tmp_path, options):
    short_train(tmp_path, "run", **options)


@pytest.mark.slow
def test_learns_cooperative_navigation_and_to_attack(tmp_path):
    """A random policy has -27; the adversaries' direction does more harm than its opposite."""
    options = dict(num_envs=40, batch_size=256, hidden_size=64, learning_starts=2000, buffer_size=100_000)
    options |= dict(total_timesteps=60_000, log_interval=10_000, checkpoint_interval=60_000, descent_steps=1)
    options |= dict(share_parameters=False, steps_per_update=50, gamma=0.95, tau=0.01)
    options |= dict(learning_rate=1e-3, learning_rate_end=1e-3)
    args, env, nets, rows = short_train(tmp_path, "run", **options)
    assert float(rows[-1]["eval/episodic_return"]) > -24.5
    returns = []
    for radius in (0.3, -0.3):
        returns.append(returns_of(env, nets, args, "adversary", radius).mean().item())
    assert returns[0] < returns[1] - 1.0


def test_the_report_has_the_runs_own_adversaries(tmp_path):
    args, env, nets, _ = short_train(tmp_path, "run", epsilon=0.2)
    make_policy = partial(script.trained_policy, nets, args=args)
    strengths = {"adversary": (0.1, 0.4), "mad": (0.1,)}
    rows = robustness.sweep(env, make_policy, strengths, [1], per_agent=False)
    points = [(row["perturbation"], row["strength"]) for row in rows]
    assert points == [("clean", 0.0), ("adversary", 0.1), ("adversary", 0.4), ("mad", 0.1)]


@pytest.mark.parametrize("continuous", [True, False])
def test_updates_in_a_cuda_graph_are_those_without(continuous, monkeypatch):
    args, env, nets, _, batch = world(continuous_actions=continuous, num_seeds=2)
    learners = [learner(script, nets, env, args) for _ in range(2)]
    check_updates_in_a_cuda_graph(learners, rotated(batch, 32, 9), DEVICE, monkeypatch)


@pytest.mark.parametrize("perturbed", [True, False])
def test_rollouts_in_a_cuda_graph_are_those_without(perturbed, monkeypatch):
    args, env, nets, *_ = world(num_seeds=2, perturb_rollout=perturbed)
    streams = script.envs.make_generators(5, 2, "test", DEVICE)
    play = partial(script.rollout, env.step, env, nets, args)
    draws = [(script.draw_rollout(env, 0.1 * k, streams),) for k in range(7)]
    check_rollouts_in_a_cuda_graph(play, nets, draws, DEVICE, monkeypatch)
