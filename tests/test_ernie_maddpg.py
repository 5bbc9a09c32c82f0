"""ernie_maddpg.py: gradients against finite differences, losses against hand-computed and brute-force cases, runs."""

import csv
import json
import math
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version

import pytest
import torch
from commands import ROOT, alike, bad_value, finish, on, only, refusal, start_script, without_speed

import ernie_maddpg as script
from envs import particle
from ernie_maddpg import Args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = dict(num_envs=4, batch_size=32, hidden_size=16, learning_starts=100, buffer_size=1000, reg_batch_size=16)
SMALL |= dict(total_timesteps=400, log_interval=100, checkpoint_interval=200, eval_episodes=4, track=False)


@pytest.fixture(autouse=True)
def float32_afterwards():
    yield
    torch.set_default_dtype(torch.float32)


def world(double=False, num_envs=8, **options):
    """(args, env, nets, batch, noise) of a small problem with one episode of random play in replay, drawn on a CPU, so
    that it is the same on every device."""
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    args = Args(**(SMALL | options))
    make = {"num_agents": args.num_agents, "continuous_actions": args.continuous_actions}
    make |= {"env_id": args.env_id, "num_envs": args.num_seeds * num_envs, "dtype": torch.get_default_dtype()}
    cpu, env = (script.envs.make(device=device, **make) for device in ("cpu", DEVICE))
    nets, _ = script.make_nets(cpu, args)
    replay = script.make_replay(cpu, args.num_seeds, num_envs, env.horizon)
    streams = script.make_generators(3, args.num_seeds, "test", torch.device("cpu"))
    script.rollout(
        cpu.step, cpu, nets["actor"], replay, 0, 0.5, streams, Args(**(SMALL | options | {"num_envs": num_envs}))
    )
    batch = script.sample(replay, num_envs, args.batch_size, streams)
    nets, batch, noise = (on(DEVICE, x) for x in (nets, batch, script.draw_noise(streams, cpu, args)))
    return args, env, nets, batch, noise


def regularize(mode, actor, obs, noise, env, args):
    """R and delta."""
    network, scale = partial(script.policy, actor, env=env, args=args), script.perturbation_scale(obs, env, args)
    return script.regularizer(mode, network, obs, network(obs), noise, scale, args)


def mean_reg(actor, obs, noise, env, args, mode=None):
    value, _ = regularize(mode or args.regularizer, actor, obs, noise, env, args)
    return (value.mean(2) * env.cooperators).sum()


CASES = [(True, "l2"), (True, "l2_squashed"), (False, "kl"), (False, "l2_probs")]


@pytest.mark.parametrize("continuous,kind", CASES)
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_hypergradient_is_the_derivative_of_the_whole_unroll(continuous, kind, norm, steps):
    options = dict(continuous_actions=continuous, divergence=kind, norm=norm, attack_steps=steps, activation="tanh")
    args, env, nets, batch, noise = world(double=True, env_id="simple_tag_v3", **options)
    obs, noise = batch["obs"].transpose(1, 2)[:, :, :16], noise["perturbation"]
    flat = (3 * nets["actor"].flat).detach().requires_grad_()  # larger weights: a policy far from linear
    actor = script.MLP(flat, nets["actor"].sizes)
    grad = torch.autograd.grad(mean_reg(actor, obs, noise, env, args), flat)[0]
    direction = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    predicted = (grad * direction).sum().item()
    h, values = 1e-6, []
    for sign in (2, 1, -1, -2):  # fourth-order central difference
        moved = script.MLP((flat + sign * h * direction).detach(), actor.sizes)
        values.append(mean_reg(moved, obs, noise, env, args).item())
    measured = (-values[0] + 8 * values[1] - 8 * values[2] + values[3]) / (12 * h)
    assert predicted == pytest.approx(measured, rel=1e-6)
    leader = torch.autograd.grad(mean_reg(actor, obs, noise, env, args, "adversarial"), flat)[0]
    other = (leader * direction).sum().item()
    assert abs(other - measured) > 1e-4 * abs(measured)  # the leader term alone would fail this test


@pytest.mark.parametrize("continuous", [True, False])
def test_adversarial_gradient_is_the_leader_term(continuous):
    args, env, nets, batch, noise = world(double=True, continuous_actions=continuous)
    obs, noise = batch["obs"].transpose(1, 2)[:, :, :16], noise["perturbation"]
    z = script.policy(nets["actor"], obs, env, args)
    _, delta = regularize("stackelberg", nets["actor"], obs, noise, env, args)
    perturbed = script.policy(nets["actor"], obs + delta.detach(), env, args)
    leader = script.divergence(args.divergence, perturbed, z).mean(2).sum()
    flat = nets["actor"].flat
    expected = torch.autograd.grad(leader, flat, retain_graph=True)[0]
    actual = torch.autograd.grad(mean_reg(nets["actor"], obs, noise, env, args, "adversarial"), flat)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("continuous", [True, False])
def test_compiled_losses_have_the_eager_gradients(continuous):
    args, env, nets, batch, noise = world(
        double=True, continuous_actions=continuous, attack_steps=2, action_reg_coef=0.1
    )
    for name in ("critic", "actor"):
        loss = getattr(script, f"{name}_loss")
        gradients = []
        for function in (loss, torch.compile(loss, fullgraph=True)):
            value, _ = function(nets, batch, noise, env, args)
            gradients.append(torch.autograd.grad(value, nets[name].flat)[0])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("continuous", [True, False])
def test_attack_is_in_the_ball_and_beats_a_random_direction(norm, continuous):
    args, env, nets, batch, noise = world(norm=norm, continuous_actions=continuous, env_id="simple_tag_v3", epsilon=0.5)
    obs, noise = batch["obs"].transpose(1, 2)[:, :, :16], noise["perturbation"]
    order = math.inf if norm == "linf" else 2
    values = {}
    for mode in ("random", "adversarial", "stackelberg"):
        values[mode], delta = regularize(mode, nets["actor"], obs, noise, env, args)
        assert torch.linalg.vector_norm(delta, order, dim=-1).max() <= args.epsilon * (1 + 1e-5)
        assert (delta.transpose(2, 3)[:, ~env.obs_mask] == 0).all()  # padding and dead entries stay
    assert values["adversarial"].mean() > 1.3 * values["random"].mean()
    torch.testing.assert_close(values["adversarial"], values["stackelberg"])


def test_gaussian_mode_has_mean_length_epsilon_or_the_papers_unit_variance():
    args, env, nets, batch, _ = world(epsilon=0.4)
    obs = batch["obs"].transpose(1, 2).repeat(1, 1, 200, 1)
    noise = torch.randn(obs.shape, device=DEVICE)
    _, delta = regularize("gaussian", nets["actor"], obs, noise, env, args)
    assert delta.norm(dim=-1).mean().item() == pytest.approx(0.4, rel=0.01)
    args.gaussian_std = 1.0
    _, delta = regularize("gaussian", nets["actor"], obs, noise, env, args)
    assert delta.transpose(2, 3)[:, env.obs_mask].std().item() == pytest.approx(1.0, rel=0.01)


def test_perturbations_of_samples_do_not_depend_on_each_other():
    args, env, nets, batch, noise = world(double=True)
    obs, noise = batch["obs"].transpose(1, 2)[:, :, :16], noise["perturbation"]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    deltas = []
    for index in (torch.arange(16, device=DEVICE), order):
        deltas.append(regularize("stackelberg", nets["actor"], obs[:, :, index], noise[:, :, index], env, args)[1])
    torch.testing.assert_close(deltas[0][:, :, order], deltas[1], rtol=1e-9, atol=1e-12)


def test_only_cooperators_are_regularised():
    options = dict(env_id="simple_tag_v3", policy_l2=0.0)
    args, env, nets, batch, noise = world(double=True, **options)
    grads = []
    for coef in (0.1, 10.0):
        args.reg_coef = coef
        loss, _ = script.actor_loss(nets, batch, noise, env, args)
        grads.append(torch.autograd.grad(loss, nets["actor"].flat)[0])
    changed = (grads[0] != grads[1]).flatten(1).any(1)
    assert torch.equal(changed, env.cooperators)


@pytest.mark.parametrize("off", [dict(regularizer="none"), dict(reg_coef=0.0), dict(attack_steps=0), dict(epsilon=0.0)])
def test_switched_off_regulariser_is_maddpg(off):
    args, env, nets, batch, noise = world(**off)
    assert not args.regularized and "perturbation" not in noise
    _, metrics = script.actor_loss(nets, batch, noise, env, args)
    assert "ernie/regularizer" not in metrics


def test_critic_target_by_hand():
    args, env, nets, batch, noise = world(double=True, gamma=0.9)
    for net, constant in ((nets["critic"], 0.0), (nets["critic_target"], 5.0)):
        with torch.no_grad():
            net.flat.zero_()
            net.layers()[-1][1].fill_(constant)  # every Q is this constant
    batch["terminated"] = (torch.arange(args.batch_size, device=DEVICE) % 2).double()[None]
    loss, _ = script.critic_loss(nets, batch, noise, env, args)
    target = batch["rewards"] + 0.9 * 5.0 * (1 - batch["terminated"])[..., None]
    assert loss.item() == pytest.approx(target.square().mean(1).sum().item(), rel=1e-12)


def test_next_observation_follows_the_observation():
    args = Args(**SMALL)
    env = script.make_env(args, 8, DEVICE)
    replay = script.make_replay(env, 1, 8, env.horizon)
    marks = torch.arange(8 * (env.horizon + 1), device=DEVICE, dtype=torch.float32).view(1, 8, -1, 1, 1)
    replay["obs"] += marks
    replay["rewards"] += marks[:, :, :-1, :, 0]
    batch = script.sample(replay, 8, 500, script.make_generators(0, 1, "test", DEVICE))
    torch.testing.assert_close(batch["next_obs"], batch["obs"] + 1)
    torch.testing.assert_close(batch["rewards"], batch["obs"][..., 0])
    assert len(batch["rewards"].unique()) > 100


def test_minimax_actions_step_down_each_critics_slope():
    args, env, nets, batch, _ = world(double=True, minimax_epsilon=0.05, env_id="simple_tag_v3")
    joint, encoded = batch["actions"].unsqueeze(1), script.encode(nets["critic"], batch["obs"])
    moved = script.minimax_actions(nets["critic"], encoded, joint, env, args)
    for i in range(4):
        for j in range(4):
            change = (moved - joint)[0, i, :, j]
            if i == j or not env.cooperators[i]:
                assert (change == 0).all()
                continue
            bump = torch.zeros_like(joint)
            bump[:, :, :, j, 2] = 1e-6
            up, down = (script.q_values(nets["critic"], encoded, joint + s * bump, args)[0, i] for s in (1, -1))
            torch.testing.assert_close(change[:, 2], -0.05 * (up - down) / 2e-6, rtol=1e-5, atol=1e-9)
    before, after = (script.q_values(nets["critic"], encoded, a, args)[:, :3] for a in (joint, moved))
    assert (after <= before + 1e-9).all()


def test_minimax_reaches_critic_and_actor():
    args, env, nets, batch, noise = world(double=True, regularizer="none")
    for loss, name in ((script.critic_loss, "critic"), (script.actor_loss, "actor")):
        values = []
        for alpha in (0.0, 0.5):
            args.minimax_epsilon = alpha
            values.append(torch.autograd.grad(loss(nets, batch, noise, env, args)[0], nets[name].flat)[0])
        assert not torch.allclose(*values)


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_discrete_action_search_against_brute_force(changed):
    args, env, nets, batch, _ = world(double=True, continuous_actions=False, action_agents=changed, batch_size=6)
    joint, encoded = batch["actions"].unsqueeze(1), script.encode(nets["critic"], batch["obs"])
    found = script.greedy_changes(nets["critic"], encoded, joint, env, args)
    q = partial(script.q_values, nets["critic"], args=args)
    for m in range(6):
        obs = encoded[:, :, m : m + 1]
        for i in range(3):
            start = batch["actions"][0, m].argmax(-1).tolist()
            current, done = list(start), set()

            def score(actions, i=i, obs=obs, clean=joint[:, :, m : m + 1]):
                other = torch.eye(5, device=DEVICE)[torch.tensor(actions)][None, None, None]
                return (q(obs, other) - q(obs, clean))[0, i, 0].square().item()

            for _ in range(changed):
                options = [
                    (score([*current[:j], k, *current[j + 1 :]]), j, k)
                    for j in range(3)
                    if j not in done
                    for k in range(5)
                ]
                _, j, k = max(options)
                current[j] = k
                done.add(j)
            assert found[0, i, m].argmax(-1).tolist() == current


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_continuous_action_search_against_the_exact_answer(changed):
    """With a linear critic the worst change lies along the weights of the agents with the largest weight norms."""
    args, env, _, batch, _ = world(
        double=True, action_epsilon=0.3, action_agents=changed, attack_steps=20, attack_lr=4.0
    )
    generators = script.make_generators(0, 1, "test", DEVICE)
    critic = script.init_mlp([3 * (18 + 5), 1, 1], 3, generators)
    with torch.no_grad():  # the hidden unit is always active, so that Q is linear
        critic.layers()[0][1].fill_(100.0)
        critic.layers()[1][0].fill_(1.0)
    joint, encoded = batch["actions"].unsqueeze(1), script.encode(critic, batch["obs"])
    q = script.q_values(critic, encoded, joint, args)
    noise = {"action": script.draw(torch.randn, (3, args.batch_size, 15), generators)}
    change = script.action_regularizer(critic, encoded, joint, q, noise, env, args)
    weights = critic.layers()[0][0][:, 0, 54:].view(3, 3, 5).norm(dim=-1)  # [critic, agent]
    exact = 0.09 * weights.square().topk(changed, -1).values.sum(-1)[None, :, None]
    assert (change <= exact * (1 + 1e-9)).all()
    assert (change / exact).median() > (
        0.999 if changed == 3 else 0.95
    )  # from a bad start the second-best agent is kept
    delta = script.sparse_project(torch.randn(50, 15, device=DEVICE), 0.3, 3, changed).view(50, 3, 5)
    assert ((delta.norm(dim=-1) > 0).sum(-1) == changed).all() and (delta.flatten(1).norm(dim=-1) <= 0.3 + 1e-9).all()


@pytest.mark.parametrize("env_id", ["simple_speaker_listener_v4", "simple_world_comm_v3"])
def test_padding_is_never_played_and_never_matters(env_id):
    args, env, nets, batch, noise = world(double=True, env_id=env_id, continuous_actions=False)
    sizes = torch.tensor(env.action_sizes, device=DEVICE)
    assert (batch["actions"].argmax(-1) < sizes).all()
    obs = batch["obs"].transpose(1, 2)
    z = script.policy(nets["actor"], obs, env, args)
    hard = script.straight_through(z, noise["gumbel"], 1.0)
    assert (hard.detach().argmax(-1) < sizes[:, None]).all() and (
        hard.detach().transpose(2, 3)[:, ~env.action_mask].abs() < 1e-9
    ).all()
    torch.testing.assert_close(hard.detach().sum(-1), torch.ones_like(hard[..., 0]))
    grad = torch.autograd.grad(script.actor_loss(nets, batch, noise, env, args)[0], nets["actor"].flat)[0]
    bias = script.MLP(grad, nets["actor"].sizes).layers()[-1][1][..., 0]  # [N, A]
    assert (bias[~env.action_mask] == 0).all() and bias[env.action_mask].abs().sum() > 0


def test_straight_through_gradient_is_the_softmax_gradient():
    z = torch.randn(1, 1, 7, 5, dtype=torch.float64, requires_grad=True)
    noise, weight = script.gumbel((1, 1, 7, 5), dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    hard, soft = script.straight_through(z, noise, 0.7), torch.softmax((z + noise) / 0.7, -1)
    assert set(hard.detach().round(decimals=9).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(
        *(torch.autograd.grad((x * weight).sum(), z, retain_graph=True)[0] for x in (hard, soft))
    )


def test_clipping_is_per_network():
    net = script.MLP(torch.zeros(3, 6, requires_grad=True), [2, 2])
    loss = (net.flat * torch.tensor([0.01, 1.0, 100.0])[:, None]).sum()
    script.descend(loss, [net], torch.optim.SGD([net.flat], 1.0), max_grad_norm=0.5)
    torch.testing.assert_close(net.flat.grad.norm(dim=1), torch.tensor([0.01 * 6**0.5, 0.5, 0.5]))


def short_train(tmp_path, name, **options):
    args = Args(**(SMALL | options))
    env = script.make_env(args, args.num_seeds * args.num_envs, DEVICE)
    nets, optimizers = script.make_nets(env, args)
    folder = tmp_path / name
    folder.mkdir()
    assert script.train(env, nets, optimizers, args, folder, [])
    return args, env, nets, list(csv.DictReader(open(folder / "metrics.csv")))


@pytest.mark.parametrize("options", [{}, dict(continuous_actions=False)])
def test_a_seed_does_not_depend_on_the_others(tmp_path, options):
    script.setup(Args(**SMALL))
    _, _, together, rows = short_train(tmp_path, "together", seed=5, num_seeds=3, **options)
    for k in range(3):
        _, _, alone, own = short_train(tmp_path, f"alone{k}", seed=5 + k, **options)
        for name in alone:
            assert alike(alone[name].flat, together[name].flat[3 * k : 3 * k + 3])
        of_seed = [row for row in rows if row["seed"] == str(5 + k)]
        assert alike(without_speed(own), without_speed(of_seed))


def test_opponents_keep_their_own_critic_and_all_networks_learn(tmp_path):
    args, env, nets, _ = short_train(tmp_path, "run", env_id="simple_tag_v3", minimax_epsilon=0.01, action_reg_coef=0.1)
    fresh, _ = script.make_nets(env, args)
    for name in ("actor", "critic", "actor_target", "critic_target"):
        assert (nets[name].flat != fresh[name].flat).any(1).all()


MODES = [
    *(dict(regularizer=m) for m in ("none", "gaussian", "random", "adversarial", "stackelberg")),
    dict(norm="linf", epsilon_units="std", divergence="l2_squashed", detach_reference=True, activation="silu"),
    dict(continuous_actions=False, divergence="l2_probs", action_reg_coef=0.1, action_agents=2),
    dict(continuous_actions=False, minimax_epsilon=0.01, activation="tanh"),
]


@pytest.mark.parametrize("options", MODES)
def test_every_option_trains(tmp_path, options):
    _, _, _, rows = short_train(tmp_path, "run", **options)
    assert len(rows) == 3 and all(math.isfinite(float(v)) for v in rows[-1].values())


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("env_id", particle.TASKS)
def test_every_task_trains(tmp_path, env_id, continuous):
    short_train(tmp_path, "run", env_id=env_id, continuous_actions=continuous, total_timesteps=200)


def test_learns_cooperative_navigation(tmp_path):
    """A random policy has -27; 1,600 small updates reach about -20."""
    options = dict(num_envs=40, batch_size=256, hidden_size=64, learning_starts=2000, buffer_size=100_000)
    _, _, _, rows = short_train(
        tmp_path, "run", **options, total_timesteps=80_000, log_interval=10_000, reg_batch_size=64
    )
    assert float(rows[-1]["eval/episodic_return"]) > -22.5


def run(tmp_path, *flags, **environment):
    """The script as a user starts it; returns the finished process."""
    small = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "track"]
    if any(f.startswith(("--resume", "--evaluate")) for f in flags):
        return start_script("ernie_maddpg.py", *flags, **environment)
    return start_script("ernie_maddpg.py", "--runs-dir", tmp_path, *small, *flags, **environment)


def test_a_whole_run_leaves_what_it_promises(tmp_path):
    out, _ = finish(run(tmp_path, "--capture-video", "--num-seeds=2"))
    folder = only(tmp_path)
    assert json.loads((folder / "args.json").read_text())["versions"]["torch"] == version("torch")
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2  # one run per seed
    for name in ("metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "robustness.png", "videos/episode.gif"):
        assert (folder / name).stat().st_size > 0
    rows = list(csv.DictReader(open(folder / "robustness.csv")))
    assert {r["perturbation"] for r in rows} == {"clean", *script.SWEEP} - {"max_speed_scale"} and {
        r["seed"] for r in rows
    } == {"1", "2"}
    assert all(name in out for name in script.SWEEP if name != "max_speed_scale")
    before = (folder / "robustness.csv").read_text()
    finish(run(tmp_path, "--evaluate", str(folder), "--eval-episodes=4"))
    assert (folder / "robustness.csv").read_text() == before  # the same policies, the same episodes
    finish(run(tmp_path, "--evaluate", str(folder), "--eval-episodes=2", "--backend=pettingzoo"))
    assert "damping" not in (folder / "robustness_pettingzoo.csv").read_text()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, how):
    long = (
        "--total-timesteps=6000",
        "--log-interval=500",
        "--checkpoint-interval=1000",
        "--wandb-mode=disabled",
        "--eval-episodes=1",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = run(whole, *long)
    process = run(cut, *long)
    until = time.time() + 120
    while not (cut.exists() and list(cut.glob("*/checkpoint.pt"))) and time.time() < until:
        time.sleep(0.05)
    process.send_signal(how)
    _, err = process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    folder = only(cut)
    if how == signal.SIGINT:
        assert f"--resume {folder}" in err
    with open(folder / "metrics.csv", "a") as file:
        file.write("1,99")  # what a kill in the middle of a write leaves
    finish(run(tmp_path, "--resume", str(folder), "--track", "--wandb-mode=disabled"))
    finish(first)
    reference = only(whole)
    ours, theirs = (list(csv.DictReader(open(f / "metrics.csv"))) for f in (folder, reference))
    assert without_speed(ours) == without_speed(theirs)
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, reference)]
    for name in states[0]["nets"]:
        assert torch.equal(*(state["nets"][name] for state in states))


def test_resume_before_the_first_update_and_evaluate_afterwards(tmp_path):
    """With one environment the first checkpoint comes before the first update; git is not needed."""
    process = run(tmp_path, "--num-envs=1", "--learning-starts=300", "--checkpoint-interval=25", "--no-track", PATH="")
    finish(process)
    folder = only(tmp_path)
    metrics = (folder / "metrics.csv").read_text()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["num_updates"] == 2 and json.loads((folder / "args.json").read_text())["git_commit"] is None
    finish(run(tmp_path, "--resume", str(folder), "--track", "--wandb-mode=disabled"))
    assert (folder / "metrics.csv").read_text() == metrics
    finish(run(tmp_path, "--evaluate", str(folder), "--eval-episodes=1000"))
    assert next(csv.DictReader(open(folder / "robustness.csv")))["episodes"] == "1000"  # the flag beats the saved value


def test_two_ranks_train_one_policy(tmp_path):
    small = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "track"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        str(ROOT / "ernie_maddpg.py"),
    ]
    finish(
        subprocess.Popen(
            [*command, "--no-track", "--no-cuda", f"--runs-dir={tmp_path}", *small], stderr=subprocess.PIPE, text=True
        )
    )
    folder = only(tmp_path)
    a, b = (torch.load(folder / n, weights_only=True) for n in ("checkpoint.pt", "checkpoint_rank1.pt"))
    assert torch.equal(a["nets"]["actor"], b["nets"]["actor"])
    assert not torch.equal(a["replay"]["obs"], b["replay"]["obs"])


BAD_VALUES = {
    **dict.fromkeys(["num_seeds", "num_threads", "num_agents", "total_timesteps", "num_envs", "steps_per_update"], 0),
    **dict.fromkeys(["buffer_size", "batch_size", "hidden_size", "reg_batch_size", "action_agents"], 0),
    **dict.fromkeys(["log_interval", "checkpoint_interval", "eval_episodes"], 0),
    **dict.fromkeys(["learning_rate", "gumbel_temperature", "max_grad_norm", "attack_lr", "attack_init"], 0.0),
    **dict.fromkeys(["gaussian_std", "action_epsilon"], 0.0),
    **dict.fromkeys(["seed", "learning_starts", "attack_steps"], -1),
    **dict.fromkeys(["exploration_noise", "policy_l2", "epsilon", "action_reg_coef", "minimax_epsilon", "tau"], -0.1),
    **{"exploration_noise_end": math.nan, "reg_coef": math.inf, "gamma": 1.5},
    **{"divergence": "kl", "backend": "pettingzoo"},
}


main_with = partial(refusal, script)


@pytest.mark.parametrize("name,value", BAD_VALUES.items())
def test_bad_value_is_one_line_that_names_the_flag(monkeypatch, capsys, name, value):
    bad_value(script, monkeypatch, capsys, name, value)


def test_every_number_has_a_bad_value():
    numbers = {
        name
        for name, value in Args().__dict__.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert numbers <= BAD_VALUES.keys()


def test_unknown_names_and_files(monkeypatch, capsys, tmp_path):
    bad = partial(main_with, monkeypatch, capsys)
    assert "simple_spread_v3" in bad("--env-id=simple_sprad_v3")
    assert "--no-such-flag" in bad("--no-such-flag")
    assert "num_agents" in bad("--env-id=simple_tag_v3", "--num-agents=7")
    assert "--buffer-size" in bad("--buffer-size=10")
    assert "no checkpoint at" in bad(f"--resume={tmp_path}/nowhere")
    assert "--learning-starts" in bad("--learning-starts=1000", "--total-timesteps=500")
    (tmp_path / "file").write_text("")
    assert "--runs-dir must be a writable folder" in bad(f"--runs-dir={tmp_path}/file")


def test_broken_checkpoints(monkeypatch, capsys, tmp_path):
    bad = partial(main_with, monkeypatch, capsys)
    short_train(tmp_path, "run")
    folder = tmp_path / "run"
    whole = (folder / "checkpoint.pt").read_bytes()
    assert "--learning-rate is read from" in bad(f"--resume={folder}", "--learning-rate=0.1")
    (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    error = bad(f"--resume={folder}")
    assert error.count("\n") == 1 and "no readable checkpoint" in error and "checkpoint.previous.pt" in error
    state, _ = script.load_run(Args(resume=f"{folder}/checkpoint.previous.pt"))[1:]
    assert state["iteration"] > 0  # the one before still loads
    torch.save({"weights": torch.zeros(3)}, folder / "checkpoint.pt")
    assert "no readable checkpoint" in bad(f"--evaluate={folder}")
    torch.save({"script": "ernie_coma"}, folder / "checkpoint.pt")
    assert "was written by ernie_coma.py" in bad(f"--resume={folder}")


def test_non_finite_loss_stops_with_the_step_and_the_last_checkpoint(monkeypatch, capsys, tmp_path):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "track"]
    real, calls = script.critic_loss, []

    def poisoned(*a):
        loss, metrics = real(*a)
        calls.append(1)
        return (
            (loss, metrics | {"losses/critic_loss": metrics["losses/critic_loss"] * math.nan})
            if len(calls) > 4
            else (loss, metrics)
        )

    monkeypatch.setattr(script, "critic_loss", poisoned)
    error = main_with(monkeypatch, capsys, *flags, "--no-track", f"--runs-dir={tmp_path}", "--total-timesteps=800")
    last = only(tmp_path) / "checkpoint.pt"
    assert "losses/critic_loss is not finite at step" in error and str(last) in error and last.exists()


def test_wandb_that_fails_does_not_stop_the_run(monkeypatch, capsys, tmp_path):
    wandb = pytest.importorskip("wandb")

    def unreachable(**options):
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", unreachable)
    args = Args(**(SMALL | dict(track=True, wandb_mode="online")))
    assert script.start_wandb(args, tmp_path, script.run_labels(args)) == []
    assert "no route to host" in capsys.readouterr().err
