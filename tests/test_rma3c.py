"""baselines/rma3c.py: losses by hand, who is moved by which step, what is perturbed, MADDPG at radius 0, runs."""

import csv
import json
import math
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import pytest
import torch
from commands import ROOT, alike, bad_value, finish, fourth_order, only, plain, refusal, start_script, without_speed

import ernie_maddpg as maddpg
from envs import particle

sys.path.insert(0, str(ROOT / "baselines"))

import rma3c as script  # noqa: E402
from rma3c import Args  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = dict(num_envs=4, batch_size=32, hidden_size=16, learning_starts=100, buffer_size=1000, track=False)
SMALL |= dict(total_timesteps=400, log_interval=100, checkpoint_interval=200, eval_episodes=4)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "track"]
LOSSES = {"critic": script.td_loss, "actor": script.policy_loss, "adversary": script.adversary_loss}


@pytest.fixture(autouse=True)
def one_thread_and_float32_afterwards():
    script.setup(Args(**SMALL))
    yield
    torch.set_default_dtype(torch.float32)


def world(double=False, num_envs=8, size=1.0, **options):
    """(args, env, nets, optimizers, batch, noise) of a small problem, after short episodes of random play. Targets
    differ from their networks, and the weights of actors and adversaries are `size` times what they start with."""
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    args = Args(**(SMALL | options))
    make = {"num_agents": args.num_agents, "continuous_actions": args.continuous_actions, "device": DEVICE}
    env = script.envs.make(args.env_id, args.num_seeds * num_envs, dtype=torch.get_default_dtype(), **make)
    env = replace(env, horizon=5)
    nets, optimizers = script.make_players(env, args)
    others, _ = script.make_players(env, Args(**(SMALL | options | {"seed": 100})))
    with torch.no_grad():
        for name in ("actor", "critic", "adversary"):
            nets[name + "_target"].flat.copy_(others[name].flat)
        for name in ("actor", "adversary", "actor_target", "adversary_target"):
            nets[name].flat.mul_(size)
    replay = script.make_replay(env, args.num_seeds, num_envs, env.horizon)
    streams = script.make_generators(3, args.num_seeds, "test", DEVICE)
    playing = Args(**(SMALL | options | {"num_envs": num_envs}))
    script.deceived_rollout(env.step, env, nets, replay, 0, 0.5, streams, playing)
    batch = script.sample(replay, num_envs, args.batch_size, streams)
    return args, env, nets, optimizers, batch, script.draw_alternations(streams, env, args)


def encoded_of(nets, batch):
    return script.encode(nets["critic"], batch["obs"]).detach()


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
    args, env, nets, _, batch, _ = world(double=True, size=3.0, batch_size=2, **options)
    batch["terminated"] = torch.tensor([[0.0, 1.0]], device=DEVICE)
    loss, metrics = script.td_loss(nets, batch, env, args)
    errors = torch.zeros(2, env.num_agents, device=DEVICE)
    for m in range(2):
        obs, next_obs = batch["obs"][0, m], batch["next_obs"][0, m]
        seen = seen_by_hand(nets["adversary_target"], next_obs, env, args)
        _, next_action = actions_by_hand(nets["actor_target"], seen, env)
        for i in range(env.num_agents):
            after = q_by_hand(nets["critic_target"], i, next_obs, next_action)
            target = batch["rewards"][0, m, i] + 0.9 * (1 - batch["terminated"][0, m]) * after
            errors[m, i] = q_by_hand(nets["critic"], i, obs, batch["actions"][0, m]) - target
    assert loss.item() == pytest.approx(errors.square().mean(0).sum().item(), rel=1e-10)
    assert metrics["losses/critic_loss"].item() == pytest.approx(errors.square().mean().item(), rel=1e-10)


@pytest.mark.parametrize("others", ["policy", "replay"])
@torch.no_grad()
def test_policy_and_adversary_losses_by_hand(others):
    options = dict(env_id="simple_tag_v3", activation="tanh", epsilon=0.7, others_actions=others, policy_l2=0.01)
    args, env, nets, _, batch, _ = world(double=True, size=3.0, batch_size=2, **options)
    encoded, (q, penalty) = encoded_of(nets, batch), torch.zeros(2, 2, env.num_agents, device=DEVICE).unbind()
    for m in range(2):
        obs = batch["obs"][0, m]
        z, present = actions_by_hand(nets["actor"], seen_by_hand(nets["adversary"], obs, env, args), env)
        for i in range(env.num_agents):
            joint = (present if others == "policy" else batch["actions"][0, m]).clone()
            joint[i] = present[i]
            q[m, i], penalty[m, i] = q_by_hand(nets["critic"], i, obs, joint), 0.01 * z[i].square().mean()
    loss, metrics = script.policy_loss(nets, encoded, batch, None, env, args)
    assert loss.item() == pytest.approx((penalty - q).mean(0).sum().item(), rel=1e-10)
    assert metrics["losses/actor_loss"].item() == pytest.approx(-q.mean().item(), rel=1e-10)
    loss, metrics = script.adversary_loss(nets, encoded, batch, None, env, args)
    of_team = q[:, env.cooperators].mean(0)
    assert loss.item() == pytest.approx(of_team.sum().item(), rel=1e-10)
    assert metrics["losses/adversary_loss"].item() == pytest.approx(of_team.mean().item(), rel=1e-10)


@pytest.mark.parametrize("player", ["actor", "adversary"])
def test_gradient_is_the_derivative_of_the_loss_with_the_others_held(player):
    options = dict(env_id="simple_tag_v3", activation="tanh", epsilon=0.5)
    args, env, nets, _, batch, _ = world(double=True, size=3.0, **options)
    encoded, flat = encoded_of(nets, batch), nets[player].flat
    grad = torch.autograd.grad(LOSSES[player](nets, encoded, batch, None, env, args)[0], flat)[0]
    seen = script.deceive(nets["adversary"], batch["obs"].transpose(1, 2), 0.5, env, args)
    present = script.squash(script.policy(nets["actor"], seen, env, args), env).transpose(1, 2).detach()
    batch, args.others_actions = batch | {"actions": present}, "replay"  # so that moving one moves no other
    direction = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def moved(h):
        net = script.MLP((flat + h * direction).detach(), nets[player].sizes)
        return LOSSES[player](nets | {player: net}, encoded, batch, None, env, args)[0].item()

    assert (grad * direction).sum().item() == pytest.approx(fourth_order(moved), rel=1e-6)


def test_discrete_gradient_is_that_of_the_gumbel_softmax():
    """A critic linear in the action: its gradient meets the softmax's slope at the noise of this alternation."""
    args, env, nets, _, batch, noise = world(double=True, continuous_actions=False, gumbel_temperature=0.7, epsilon=0.5)
    nets["critic"] = script.init_mlp([3 * (18 + 5), 1, 1], 3, script.make_generators(0, 1, "test", DEVICE))
    with torch.no_grad():  # the hidden unit is always active
        nets["critic"].layers()[0][1].fill_(100.0)
        nets["critic"].layers()[1][0].fill_(1.0)
    loss, _ = script.adversary_loss(nets, encoded_of(nets, batch), batch, noise[1], env, args)
    actual = torch.autograd.grad(loss, nets["adversary"].flat)[0]
    own = nets["critic"].layers()[0][0][:, 0, 54:].view(3, 3, 5)[range(3), range(3)].detach()  # weight on own action
    seen = script.deceive(nets["adversary"], batch["obs"].transpose(1, 2), 0.5, env, args)
    soft = torch.softmax((script.policy(nets["actor"], seen, env, args) + noise[1]) / 0.7, -1)
    expected = torch.autograd.grad((soft * own[:, None]).sum(-1).mean(-1).sum(), nets["adversary"].flat)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------- the turns of an update


@pytest.mark.parametrize("continuous", [True, False])
def test_adversary_steps_lower_q_and_policy_steps_raise_it_each_with_the_other_at_rest(continuous):
    options = dict(env_id="simple_tag_v3", continuous_actions=continuous, epsilon=0.5, policy_l2=0.0, tau=0.0)
    args, env, nets, optimizers, batch, noise = world(batch_size=128, size=3.0, **options)
    encoded, team = encoded_of(nets, batch), env.cooperators

    def values():  # of the Gumbel-softmax's noise where discrete
        z = deceived_z()
        z = torch.softmax(z + noise[0], -1) if env.discrete else script.squash(z, env)
        joint = torch.where(script.own_slot(env), z.transpose(1, 2).unsqueeze(1), batch["actions"].unsqueeze(1))
        return script.q_values(nets["critic"], encoded, joint, args).mean(-1)[0].detach()

    def deceived_z():
        seen = script.deceive(nets["adversary"], batch["obs"].transpose(1, 2), args.epsilon, env, args)
        return script.policy(nets["actor"], seen, env, args)

    args.others_actions = "replay"
    for name, sign, movers in (("adversary", -1, team), ("actor", 1, torch.ones_like(team))):
        before, old = snapshot(nets), values()
        for _ in range(5):
            loss, _ = LOSSES[name](nets, encoded, batch, noise[0], env, args)
            script.descend(loss, [nets[name]], optimizers[name], args.max_grad_norm)
        change = sign * (values() - old)
        assert (change[movers] > 1e-4).all() and (change[~movers] == 0).all()
        after = snapshot(nets)
        assert [n for n in nets if not torch.equal(before[n], after[n])] == [name]
        assert torch.equal((before[name] != after[name]).any(1), movers)  # opponents have no adversary


@pytest.mark.parametrize("continuous", [True, False])
def test_an_update_is_a_critic_step_then_alternations_then_the_targets(continuous):
    args, env, nets, optimizers, batch, noise = world(descent_steps=3, continuous_actions=continuous, epsilon=0.3)
    turns, parts = [], []

    def watched(name):
        def loss(nets, *rest):
            turns.append((name, snapshot(nets)))
            parts.append(rest[2] if name != "critic" else None)
            if name != "critic":  # the critics' first layer is evaluated after their step
                torch.testing.assert_close(rest[0], encoded_of(nets, batch))
            return LOSSES[name](nets, *rest)

        return loss

    script.update_rma3c(nets, optimizers, {name: watched(name) for name in LOSSES}, batch, noise, env, args)
    assert [name for name, _ in turns] == ["critic", *["actor", "adversary"] * 3]
    assert len(noise) == 3 and all(parts[1 + k] is noise[k // 2] for k in range(6))
    if not continuous:
        assert noise[0].shape == (1, 3, 32, 5) and not torch.equal(noise[0], noise[1])
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
    args, env, nets, optimizers, batch, noise = world(num_seeds=2, **options)
    theirs = {name: script.MLP(net.flat.detach().clone().requires_grad_(), net.sizes) for name, net in nets.items()}
    adam = {name: torch.optim.Adam([theirs[name].flat], args.learning_rate, fused=True) for name in ("actor", "critic")}
    plain_args = maddpg.Args(regularizer="none", continuous_actions=continuous, hidden_size=16)
    losses, start = {name: [] for name in ("critic", "actor")}, snapshot(nets)
    for _ in range(2):
        script.update_rma3c(nets, optimizers, LOSSES, batch, noise, env, args)
        for name, part in [("critic", None), *(("actor", part) for part in noise)]:
            loss, _ = getattr(maddpg, f"{name}_loss")(theirs, batch, {"gumbel": part}, env, plain_args)
            maddpg.descend(loss, [theirs[name]], adam[name], args.max_grad_norm)
            losses[name].append(loss)
        for name in ("actor", "critic"):
            theirs[name + "_target"].flat.detach().lerp_(theirs[name].flat.detach(), args.tau)
    for name in ("actor", "critic", "actor_target", "critic_target"):
        assert torch.equal(nets[name].flat, theirs[name].flat) and not torch.equal(nets[name].flat, start[name])
    assert torch.equal(nets["adversary"].flat, start["adversary"])


# ---------------------------------------------------------------------------------------------- what is perturbed


@pytest.mark.parametrize("env_id", particle.TASKS)
def test_perturbation_is_in_the_ball_and_only_in_what_the_team_observes(env_id):
    args, env, nets, _, batch, _ = world(double=True, env_id=env_id, size=20.0)
    obs = batch["obs"].transpose(1, 2)
    seen = script.deceive(nets["adversary"], obs, 0.3, env, args)
    delta, live = (seen - obs).transpose(2, 3)[0], env.obs_mask & env.cooperators[:, None]  # [N, O, M]
    assert 0.29 < delta.abs().max() <= 0.3 + 1e-12
    assert (delta[~live] == 0).all() and (delta[live].abs().amax(-1) > 1e-3).all()
    assert torch.equal(script.deceive(nets["adversary"], obs, 0.0, env, args), obs)


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("perturbed", [True, False])
def test_rollout_acts_on_perturbed_observations_and_keeps_the_true_ones(perturbed, continuous):
    options = dict(env_id="simple_tag_v3", continuous_actions=continuous, perturb_rollout=perturbed, epsilon=1.0)
    args, env, nets, _, _, _ = world(size=5.0, num_envs=64, **options)
    args.num_envs = 64
    replay = script.make_replay(env, 1, 64, env.horizon)
    script.deceived_rollout(env.step, env, nets, replay, 0, 0.0, script.make_generators(7, 1, "test", DEVICE), args)
    state, true = env.reset(script.make_generators(7, 1, "test", DEVICE))
    for t in range(env.horizon):
        torch.testing.assert_close(replay["obs"][0, :, t], true)
        state, true, *_ = env.step(state, script.to_env(replay["actions"][:, :, t], env), None)
    torch.testing.assert_close(replay["obs"][0, :, -1], true)
    obs = replay["obs"][:, :, :-1].flatten(1, 2).transpose(1, 2)
    seen = script.deceive(nets["adversary"], obs, 1.0, env, args)
    played = replay["actions"].flatten(1, 2).transpose(1, 2)[0]  # [N, B * T, A]
    right, wrong = (script.policy(nets["actor"], x, env, args)[0] for x in ((seen, obs) if perturbed else (obs, seen)))
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


def test_returns_under_a_constant_perturbation_are_those_of_actors_with_shifted_biases():
    args, env, nets, *_ = world(double=True, env_id="simple_adversary_v3", size=3.0)
    O, returns = env.obs_mask.shape[1], {}
    bias = torch.randn(O, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    constant_adversary(nets, bias)
    for name, radius in (("true", 0.0), ("deceived", 0.4)):
        streams = script.make_generators(1, 1, "evaluation", DEVICE)
        returns[name] = script.evaluate_deceived(env, nets, args, streams, radius)
    undisturbed = script.evaluate(env, nets, args, script.make_generators(1, 1, "evaluation", DEVICE))
    assert torch.equal(returns["true"], undisturbed)
    with torch.no_grad():
        weight, b = nets["actor"].layers()[0]
        live = (env.obs_mask & env.cooperators[:, None]).to(bias.dtype)
        b += weight @ (0.4 * torch.tanh(bias) * live)[..., None]
    shifted = script.evaluate(env, nets, args, script.make_generators(1, 1, "evaluation", DEVICE))
    torch.testing.assert_close(returns["deceived"], shifted)
    assert (shifted - undisturbed).abs().max() > 1e-3


@pytest.mark.parametrize("env_id", ["simple_spread_v3", "simple_adversary_v3"])
def test_length_and_saturation_by_hand(env_id):
    """Over live entries, which spread has 14 of 18 of, and the team, which is all but the first agent in adversary."""
    args, env, nets, _, batch, _ = world(double=True, env_id=env_id, epsilon=0.5)
    obs, live = batch["obs"].transpose(1, 2), env.obs_mask[env.cooperators].double()
    bias = torch.zeros(env.obs_mask.shape[1], device=DEVICE)
    bias[:2] = torch.tensor([5.0, -0.5])  # the first entry at the edge, the second not, the others not moved
    constant_adversary(nets, bias)
    metrics = script.inspect_adversaries(nets, obs, env, args)
    length = (0.5 * torch.tanh(bias) * live).norm(dim=1).mean().item()
    assert metrics["rma3c/perturbation_norm"].item() == pytest.approx(length, rel=1e-10)
    assert metrics["rma3c/saturation"].item() == pytest.approx((live[:, 0].sum() / live.sum()).item(), rel=1e-10)


# ---------------------------------------------------------------------------------------------- training


def short_train(tmp_path, name, module=script, make="make_players", **options):
    args = module.Args(**(SMALL | options))
    env = module.make_env(args, args.num_seeds * args.num_envs, DEVICE)
    nets, optimizers = getattr(module, make)(env, args)
    folder = tmp_path / name
    folder.mkdir()
    assert module.train(env, nets, optimizers, args, folder, [])
    return args, env, nets, list(csv.DictReader(open(folder / "metrics.csv")))


@pytest.mark.parametrize("continuous", [True, False])
def test_a_whole_run_at_radius_0_is_one_of_maddpg(tmp_path, continuous):
    script.setup(Args(**SMALL))
    options = dict(continuous_actions=continuous, epsilon=0.0)
    _, _, ours, rows = short_train(tmp_path, "ours", descent_steps=1, **options)
    _, _, theirs, expected = short_train(tmp_path, "theirs", maddpg, "make_nets", regularizer="none", **options)
    assert all(torch.equal(ours[name].flat, theirs[name].flat) for name in theirs)
    for row, other in zip(rows, expected, strict=True):
        assert without_speed([{name: row[name] for name in other}]) == without_speed([other])
        assert row["eval/attacked_return"] == row["eval/episodic_return"]


@pytest.mark.parametrize("continuous", [True, False])
def test_a_seed_does_not_depend_on_the_others(tmp_path, continuous):
    _, _, together, rows = short_train(tmp_path, "together", seed=5, num_seeds=3, continuous_actions=continuous)
    for k in range(3):
        _, _, alone, own = short_train(tmp_path, f"alone{k}", seed=5 + k, continuous_actions=continuous)
        for name in alone:
            assert alike(alone[name].flat, together[name].flat[3 * k : 3 * k + 3])
        assert alike(without_speed(own), without_speed([row for row in rows if row["seed"] == str(5 + k)]))


def test_all_networks_learn_at_their_own_rates_but_no_opponent_has_an_adversary(tmp_path):
    args, env, nets, _ = short_train(tmp_path, "run", env_id="simple_tag_v3")
    options = SMALL | dict(env_id=args.env_id, adversary_learning_rate=0.5)
    fresh, optimizers = script.make_players(env, Args(**options))
    moved = {name: (nets[name].flat != fresh[name].flat).any(1) for name in nets}
    for name in ("actor", "critic"):
        assert moved[name].all() and moved[name + "_target"].all()
    assert moved["adversary"].equal(env.cooperators) and moved["adversary_target"].equal(env.cooperators)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    assert rates == {"actor": 1e-3, "critic": 1e-3, "adversary": 0.5}


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("env_id", particle.TASKS)
def test_every_task_trains(tmp_path, env_id, continuous):
    _, _, _, rows = short_train(tmp_path, "run", env_id=env_id, continuous_actions=continuous, total_timesteps=200)
    assert rows and all(math.isfinite(float(v)) for v in rows[-1].values())


@pytest.mark.parametrize(
    "options",
    [dict(others_actions="replay", activation="silu"), dict(perturb_rollout=False, activation="tanh", norm="linf")],
)
def test_every_option_trains(tmp_path, options):
    short_train(tmp_path, "run", **options)


def test_learns_cooperative_navigation_and_to_attack(tmp_path):
    """A random policy has -27; the adversaries' direction does more harm than its opposite."""
    options = dict(num_envs=40, batch_size=256, hidden_size=64, learning_starts=2000, buffer_size=100_000)
    options |= dict(total_timesteps=60_000, log_interval=10_000, checkpoint_interval=60_000, descent_steps=1)
    args, env, nets, rows = short_train(tmp_path, "run", **options)
    assert float(rows[-1]["eval/episodic_return"]) > -24.5
    returns = []
    for radius in (0.3, -0.3):
        streams = script.make_generators(1, 1, "evaluation", DEVICE)
        returns.append(script.evaluate_deceived(env, nets, args, streams, radius).mean().item())
    assert returns[0] < returns[1] - 1.0


# ---------------------------------------------------------------------------------------------- runs


def run(tmp_path, *flags):
    """The script as a user starts it."""
    if any(flag.startswith(("--resume", "--evaluate")) for flag in flags):
        return start_script("baselines/rma3c.py", *flags)
    return start_script("baselines/rma3c.py", f"--runs-dir={tmp_path}", *FLAGS, *flags)


def run_here(monkeypatch, *flags):
    """The same in this process."""
    monkeypatch.setattr(sys, "argv", ["rma3c.py", *map(str, flags)])
    script.main()


def test_a_whole_run_leaves_what_it_promises(tmp_path, monkeypatch, capsys):
    out, _ = finish(run(tmp_path, "--capture-video", "--num-seeds=2", "--epsilon=0.2"))
    folder = only(tmp_path)
    assert folder.name.startswith("simple_spread_v3__rma3c__1__")
    assert json.loads((folder / "args.json").read_text())["versions"]["torch"] == version("torch")
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2  # one run per seed
    for name in ("metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "robustness.png", "videos/episode.gif"):
        assert (folder / name).stat().st_size > 0
    rows = list(csv.DictReader(open(folder / "robustness.csv")))
    families = {"clean", "adversary", *script.SWEEP} - {"max_speed_scale"}
    assert {r["perturbation"] for r in rows} == families and {r["seed"] for r in rows} == {"1", "2"}
    assert {r["regularizer"] for r in rows} == {"rma3c"} and all(name in out for name in families)
    assert {r["strength"] for r in rows if r["perturbation"] == "adversary"} == {"0.1", "0.2", "0.4"}
    assert "losses/adversary_loss" in (folder / "metrics.csv").read_text()
    before = (folder / "robustness.csv").read_text()
    run_here(monkeypatch, f"--evaluate={folder}", "--eval-episodes=4")
    assert (folder / "robustness.csv").read_text() == before  # the same policies, the same episodes
    monkeypatch.setattr(script, "SWEEP", {name: script.SWEEP[name] for name in ("critic", "damping")})
    run_here(monkeypatch, f"--evaluate={folder}", "--eval-episodes=1", "--backend=pettingzoo")
    text = (folder / "robustness_pettingzoo.csv").read_text()
    assert "damping" not in text and "adversary,0.4" in text


def test_stopped_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    long = ["--total-timesteps=6000", "--log-interval=500", "--checkpoint-interval=500", "--no-track"]
    long += ["--eval-episodes=1", "--no-continuous-actions"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process, err = run(cut, *long), {}
    for how in (signal.SIGINT, signal.SIGKILL):
        until, seen = time.time() + 120, set()
        while len(seen) < 3 and time.time() < until:  # two checkpoints written by this process, or one and another's
            seen |= {path.stat().st_mtime_ns for path in cut.glob("*/checkpoint.pt")}
            time.sleep(0.005)
        process.send_signal(how)
        _, err[how] = process.communicate()
        assert process.returncode == (130 if how == signal.SIGINT else -how)
        folder = only(cut)
        if how == signal.SIGINT:
            process = run(tmp_path, f"--resume={folder}")
    assert f"go on with: python baselines/rma3c.py --resume {folder}" in err[signal.SIGINT]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 0 < state["num_updates"] < 100
    with open(folder / "metrics.csv", "a") as file:
        file.write("1,99")  # what a kill in the middle of a write leaves
    for name in ("robustness_report", "adversary_report"):
        monkeypatch.setattr(script, name, lambda *a: None)
    run_here(monkeypatch, f"--resume={folder}")
    run_here(monkeypatch, f"--runs-dir={whole}", *FLAGS, *long)
    ours, theirs = (list(csv.DictReader(open(f / "metrics.csv"))) for f in (folder, only(whole)))
    assert without_speed(ours) == without_speed(theirs) and len(ours) == 12
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, only(whole))]
    assert states[0]["nets"].keys() == {*LOSSES, *(name + "_target" for name in LOSSES)}
    for name in states[0]["nets"]:
        assert torch.equal(*(state["nets"][name] for state in states))


def test_no_report_of_adversaries_at_radius_0(tmp_path, capsys):
    args, _, nets, *_ = world(epsilon=0.0)
    script.adversary_report(nets, args, DEVICE, tmp_path)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


BAD_VALUES = {
    **dict.fromkeys(["num_seeds", "num_threads", "num_agents", "total_timesteps", "num_envs", "steps_per_update"], 0),
    **dict.fromkeys(["buffer_size", "batch_size", "hidden_size", "descent_steps", "eval_episodes"], 0),
    **dict.fromkeys(["log_interval", "checkpoint_interval"], 0),
    **dict.fromkeys(["learning_rate", "adversary_learning_rate", "gumbel_temperature", "max_grad_norm"], 0.0),
    **dict.fromkeys(["seed", "learning_starts"], -1),
    **dict.fromkeys(["exploration_noise", "policy_l2", "epsilon", "tau"], -0.1),
    **{"exploration_noise_end": math.nan, "gamma": 1.5, "backend": "pettingzoo"},
}

main_with = partial(refusal, script)


@pytest.mark.parametrize("name,value", BAD_VALUES.items())
def test_bad_value_is_one_line_that_names_the_flag(monkeypatch, capsys, name, value):
    bad_value(script, monkeypatch, capsys, name, value)


def test_every_number_has_a_bad_value():
    values = {name: v for name, v in Args().__dict__.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    assert values.keys() <= BAD_VALUES.keys()


def test_unknown_names_and_files(monkeypatch, capsys, tmp_path):
    bad = partial(main_with, monkeypatch, capsys)
    assert "simple_spread_v3" in bad("--env-id=simple_sprad_v3")
    assert "--no-such-flag" in bad("--no-such-flag")
    assert "--buffer-size" in bad("--buffer-size=10")
    assert "no checkpoint at" in bad(f"--resume={tmp_path}/nowhere")
    assert "--learning-starts" in bad("--learning-starts=1000", "--total-timesteps=500")
    assert "--resume must be left out" in bad("--resume=a", "--evaluate=a")
    short_train(tmp_path, "run")
    assert "--epsilon is read from" in bad(f"--resume={tmp_path}/run", "--epsilon=0.2")
    short_train(tmp_path, "theirs", maddpg, "make_nets", regularizer="none")
    assert "was written by ernie_maddpg.py" in bad(f"--evaluate={tmp_path}/theirs")


def test_non_finite_loss_stops_with_the_step_and_the_last_checkpoint(monkeypatch, capsys, tmp_path):
    real, calls = script.adversary_loss, []

    def poisoned(*a):
        loss, metrics = real(*a)
        calls.append(1)
        return loss, {name: value * (math.nan if len(calls) > 8 else 1) for name, value in metrics.items()}

    monkeypatch.setattr(script, "adversary_loss", poisoned)
    error = main_with(monkeypatch, capsys, *FLAGS, "--no-track", f"--runs-dir={tmp_path}", "--total-timesteps=800")
    last = only(tmp_path) / "checkpoint.pt"
    assert "losses/adversary_loss is not finite at step" in error and str(last) in error and last.exists()
