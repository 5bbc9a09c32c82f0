"""ernie_maddpg.py: gradients against finite differences, losses against hand-computed and brute-force cases, runs."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from commands import (
    BACKEND,
    Recorder,
    alike,
    check_rollouts_in_a_cuda_graph,
    check_updates_in_a_cuda_graph,
    learner,
    on,
    record_cuda_graphs,
    without_speed,
)
from torch.utils._pytree import tree_leaves

import envs
import ernie_maddpg as script
from envs import particle, perturb, robustness, runs
from ernie_maddpg import Args

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU ignores it")
SMALL = dict(num_envs=4, batch_size=32, hidden_size=16, learning_starts=100, buffer_size=1000, reg_batch_size=16)
SMALL |= dict(total_timesteps=400, log_interval=100, checkpoint_interval=200, eval_episodes=4, wandb_mode="disabled")


def world(double=False, num_envs=8, **options):
    """(args, env, nets, batch with noise) of a small problem with an episode of random play, drawn on a CPU, so that it
    is the same on every device."""
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    args = Args(**(SMALL | options))
    make = {"num_agents": args.num_agents, "continuous_actions": args.continuous_actions}
    make |= {"env_id": args.env_id, "num_envs": args.num_seeds * num_envs, "dtype": torch.get_default_dtype()}
    cpu, env = (script.envs.make(device=device, **make) for device in ("cpu", DEVICE))
    nets, _ = script.make_nets(cpu, args)
    streams = script.envs.make_generators(3, args.num_seeds, "test", torch.device("cpu"))
    replay = script.rollout(cpu.step, cpu, nets["actor"], script.draw_rollout(cpu, 0.5, streams))
    batch = script.sample(replay, num_envs, args, streams) | script.draw_noise(streams, cpu, args)
    return args, env, on(DEVICE, nets), on(DEVICE, batch)


def regularize(mode, actor, obs, noise, env, args):
    """R and delta."""
    clean = script.policy(actor, obs, env)
    return script.regularizer(actor, obs, clean, noise, env, replace(args, regularizer=mode))


def mean_reg(actor, obs, noise, env, args, mode=None):
    value, _ = regularize(mode or args.regularizer, actor, obs, noise, env, args)
    return (value.mean(2) * env.cooperators).sum()


CASES = [(True, "l2"), (True, "l2_squashed"), (False, "kl"), (False, "l2_probs")]


@pytest.mark.parametrize("continuous,kind", CASES)
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_hypergradient_is_the_derivative_of_the_whole_unroll(continuous, kind, norm, steps):
    options = dict(continuous_actions=continuous, divergence=kind, norm=norm, attack_steps=steps, activation="tanh")
    args, env, nets, batch = world(double=True, env_id="simple_tag_v3", **options)
    obs, noise = batch["obs"][:, :, :16], batch["perturbation"]
    flat = (3 * nets["actor"].flat).detach().requires_grad_()  # larger weights: a policy far from linear
    actor = replace(nets["actor"], flat=flat)
    grad = torch.autograd.grad(mean_reg(actor, obs, noise, env, args), flat)[0]
    direction = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    predicted = (grad * direction).sum().item()
    h, values = 3e-7, []  # a kink of the linf ball may lie 2e-6 away
    for sign in (2, 1, -1, -2):  # fourth-order central difference
        moved = replace(actor, flat=(flat + sign * h * direction).detach())
        values.append(mean_reg(moved, obs, noise, env, args).item())
    measured = (-values[0] + 8 * values[1] - 8 * values[2] + values[3]) / (12 * h)
    assert predicted == pytest.approx(measured, rel=1e-6)
    leader = torch.autograd.grad(mean_reg(actor, obs, noise, env, args, "adversarial"), flat)[0]
    other = (leader * direction).sum().item()
    assert abs(other - measured) > 1e-4 * abs(measured)  # the leader term alone would fail this test


@pytest.mark.parametrize("regularizer", ["adversarial", "stackelberg"])
def test_steps_in_the_linf_ball_reach_its_corners(regularizer):
    """Ten steps of a quarter of the radius; of l2 length epsilon they would end at half of it."""
    options = dict(norm="linf", attack_steps=10, attack_lr=0.25, regularizer=regularizer, epsilon=0.1)
    args, env, nets, batch = world(double=True, **options)
    obs = batch["obs"][:, :, :16]
    _, delta = regularize(regularizer, nets["actor"], obs, batch["perturbation"], env, args)
    live = env.obs_mask[:, None].expand(delta.shape)
    assert delta.abs()[live].mean() > 0.85 * args.epsilon
    assert delta.abs().max() <= args.epsilon * (1 + 1e-9)


@pytest.mark.parametrize("continuous,kind", [(True, "l2_squashed"), (False, "l2_probs")])
def test_evaluation_does_not_depend_on_how_training_attacked(continuous, kind):
    found = []
    for options in ({}, dict(norm="linf", divergence=kind, epsilon_units="std")):
        args, env, nets, batch = world(continuous_actions=continuous, **options)
        policy = script.trained_policy(nets, env, args)
        for attack in ("mad", "executed", "critic"):
            streams = envs.make_generators(3, len(batch["obs"]), "test", DEVICE)
            with torch.no_grad():
                found.append(robustness.worst_observations(env, policy, attack, batch["obs"], 0.3, streams))
    for first, second in zip(found[:3], found[3:]):
        assert torch.equal(first, second)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_environment_has_its_own_radius(norm):
    args, env, nets, batch = world(eval_norm=norm)
    policy, obs = script.trained_policy(nets, env, args), batch["obs"]
    radius = torch.where(torch.arange(obs.shape[2], device=DEVICE) % 3 > 0, 0.1, 0.4)[:, None]
    streams = envs.make_generators(3, len(obs), "test", DEVICE)
    with torch.no_grad():
        seen = robustness.worst_observations(env, policy, "mad", obs, radius, streams)
    length = perturb.length(seen - obs, norm)
    assert (length <= radius * (1 + 1e-4)).all() and (length > 0.9 * radius).double().mean() > 0.9


def test_an_attack_on_the_margin_changes_more_actions_than_one_on_the_divergence():
    args, env, nets, batch = world(continuous_actions=False)
    policy, obs = script.trained_policy(nets, env, args), batch["obs"]
    flips = {}
    for attack in ("mad", "executed"):
        streams = envs.make_generators(3, len(obs), "test", DEVICE)
        with torch.no_grad():
            seen = robustness.worst_observations(env, policy, attack, obs, 0.5, streams)
            flips[attack] = (policy.act(seen) != policy.act(obs)).any(-1).double().mean().item()
    assert flips["executed"] > flips["mad"] > 0


@pytest.mark.parametrize("continuous", [True, False])
def test_adversarial_gradient_is_the_leader_term(continuous):
    args, env, nets, batch = world(double=True, continuous_actions=continuous)
    obs, noise = batch["obs"][:, :, :16], batch["perturbation"]
    z = script.policy(nets["actor"], obs, env)
    _, delta = regularize("stackelberg", nets["actor"], obs, noise, env, args)
    perturbed = script.policy(nets["actor"], obs + delta.detach(), env)
    leader = script.divergence(args.divergence, perturbed, z).mean(2).sum()
    flat = nets["actor"].flat
    expected = torch.autograd.grad(leader, flat, retain_graph=True)[0]
    actual = torch.autograd.grad(mean_reg(nets["actor"], obs, noise, env, args, "adversarial"), flat)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("continuous,attacks", [(True, True), (False, True), (True, False)])
def test_compiled_losses_have_the_eager_gradients(continuous, attacks):
    options = dict(attack_steps=2, action_reg_coef=0.1) if attacks else dict(regularizer="none")
    backend = BACKEND if attacks else "inductor"  # a CPU compiles losses without attacks
    args, env, nets, batch = world(double=True, continuous_actions=continuous, **options)
    for name in ("critic", "actor"):
        loss = getattr(script, f"{name}_loss")
        gradients = []
        for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
            value, _ = function(nets, batch, env, args)
            gradients.append(torch.autograd.grad(value, nets[name].flat)[0])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("continuous", [True, False])
def test_attack_is_in_the_ball_and_beats_a_random_direction(norm, continuous):
    args, env, nets, batch = world(norm=norm, continuous_actions=continuous, env_id="simple_tag_v3", epsilon=0.5)
    obs, noise = batch["obs"][:, :, :16], batch["perturbation"]
    order = math.inf if norm == "linf" else 2
    values = {}
    for mode in ("random", "adversarial", "stackelberg"):
        values[mode], delta = regularize(mode, nets["actor"], obs, noise, env, args)
        assert torch.linalg.vector_norm(delta, order, dim=-1).max() <= args.epsilon * (1 + 1e-5)
        assert (delta.transpose(2, 3)[:, ~env.obs_mask] == 0).all()  # padding and dead entries stay
    assert values["adversarial"].mean() > 1.3 * values["random"].mean()
    torch.testing.assert_close(values["adversarial"], values["stackelberg"])


def test_gaussian_mode_has_mean_length_epsilon():
    args, env, nets, batch = world(epsilon=0.4)
    obs = batch["obs"].repeat(1, 1, 200, 1)
    noise = torch.randn(obs.shape, device=DEVICE)
    _, delta = regularize("gaussian", nets["actor"], obs, noise, env, args)
    assert delta.norm(dim=-1).mean().item() == pytest.approx(0.4, rel=0.01)


def test_perturbations_of_samples_do_not_depend_on_each_other():
    args, env, nets, batch = world(double=True)
    obs, noise = batch["obs"][:, :, :16], batch["perturbation"]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    deltas = []
    for index in (torch.arange(16, device=DEVICE), order):
        deltas.append(regularize("stackelberg", nets["actor"], obs[:, :, index], noise[:, :, index], env, args)[1])
    torch.testing.assert_close(deltas[0][:, :, order], deltas[1], rtol=1e-9, atol=1e-12)


def test_only_cooperators_are_regularised():
    options = dict(env_id="simple_tag_v3", policy_l2=0.0)
    args, env, nets, batch = world(double=True, **options)
    grads = []
    for coef in (0.1, 10.0):
        args.reg_coef = coef
        loss, _ = script.actor_loss(nets, batch, env, args)
        grads.append(torch.autograd.grad(loss, nets["actor"].flat)[0])
    changed = (grads[0] != grads[1]).flatten(1).any(1)
    assert torch.equal(changed, env.cooperators)


@pytest.mark.parametrize("off", [dict(regularizer="none"), dict(reg_coef=0.0), dict(attack_steps=0), dict(epsilon=0.0)])
def test_switched_off_regulariser_is_maddpg(off):
    args, env, nets, batch = world(**off)
    assert not args.regularized and "perturbation" not in batch
    _, metrics = script.actor_loss(nets, batch, env, args)
    assert "ernie/regularizer" not in metrics


def test_critic_target_by_hand():
    args, env, nets, batch = world(double=True, gamma=0.9)
    for net, constant in ((nets["critic"], 0.0), (nets["critic_target"], 5.0)):
        with torch.no_grad():
            net.flat.zero_()
            net.layers()[-1][1].fill_(constant)  # every Q is this constant
    batch["terminated"] = (torch.arange(args.batch_size, device=DEVICE) % 2).double()[None]
    loss, _ = script.critic_loss(nets, batch, env, args)
    target = batch["rewards"] + 0.9 * 5.0 * (1 - batch["terminated"])[:, None]
    assert loss.item() == pytest.approx(target.square().mean(2).sum().item(), rel=1e-12)


def test_shared_networks_are_asked_about_each_agent_in_turn():
    """As N equal networks would be, whose critics see themselves first."""
    args, env, nets, batch = world(double=True, share_parameters=True)
    alone, _ = script.make_nets(env, replace(args, share_parameters=False))
    obs, joint = batch["obs"], script.everybody(batch["actions"])
    S, N = obs.shape[:2]
    assert len(nets["actor"].flat) == S and len(alone["actor"].flat) == S * N
    for name in ("actor", "critic"):
        alone[name] = replace(nets[name], flat=nets[name].flat.detach().repeat_interleave(N, 0))
    torch.testing.assert_close(script.policy(nets["actor"], obs, env), script.policy(alone["actor"], obs, env))
    shared = script.q_values(nets["critic"], obs, joint)
    for i in range(N):
        order = [(i + k) % N for k in range(N)]
        rolled = script.q_values(alone["critic"], obs[:, order], joint[..., order, :])
        torch.testing.assert_close(shared[:, i], rolled[:, 0])
    tag = script.make_env(Args(env_id="simple_tag_v3"), 1, DEVICE)
    nets, _ = script.make_nets(tag, Args(env_id="simple_tag_v3"))
    assert len(nets["actor"].flat) == 4  # roles differ


def test_next_observation_follows_the_observation():
    args = Args(**(SMALL | dict(batch_size=500)))
    env = script.make_env(args, 8, DEVICE)
    streams = script.envs.make_generators(0, 1, "test", DEVICE)
    nets, _ = script.make_nets(env, args)
    episodes = script.rollout(env.step, env, nets["actor"], script.draw_rollout(env, 0.0, streams))
    replay = script.make_replay(episodes, 20)
    marks = torch.arange(20 * (env.horizon + 1), device=DEVICE, dtype=torch.float32).view(1, 20, -1, 1, 1)
    replay["obs"] += marks
    replay["rewards"] += marks[:, :, :-1, :, 0]
    batch = script.sample(replay, 8, args, script.envs.make_generators(0, 1, "test", DEVICE))
    torch.testing.assert_close(batch["next_obs"], batch["obs"] + 1)
    torch.testing.assert_close(batch["rewards"], batch["obs"][..., 0])
    assert len(batch["rewards"].unique()) > 100 and batch["obs"].max() < 8 * (env.horizon + 1)


def test_minimax_actions_step_down_each_critics_slope():
    args, env, nets, batch = world(double=True, minimax_epsilon=0.05, env_id="simple_tag_v3")
    joint, obs = script.everybody(batch["actions"]), batch["obs"]
    moved = script.minimax_actions(nets["critic"], obs, joint, env, args)
    for i in range(4):
        for j in range(4):
            change = (moved - joint)[0, i, :, j]
            if i == j or not env.cooperators[i]:
                assert (change == 0).all()
                continue
            bump = torch.zeros_like(joint)
            bump[:, :, :, j, 2] = 1e-6
            up, down = (script.q_values(nets["critic"], obs, joint + s * bump)[0, i] for s in (1, -1))
            torch.testing.assert_close(change[:, 2], -0.05 * (up - down) / 2e-6, rtol=1e-5, atol=1e-9)
    before, after = (script.q_values(nets["critic"], obs, a)[:, :3] for a in (joint, moved))
    assert (after <= before + 1e-9).all()


def test_minimax_reaches_critic_and_actor():
    args, env, nets, batch = world(double=True, regularizer="none")
    for loss, name in ((script.critic_loss, "critic"), (script.actor_loss, "actor")):
        values = []
        for alpha in (0.0, 0.5):
            args.minimax_epsilon = alpha
            values.append(torch.autograd.grad(loss(nets, batch, env, args)[0], nets[name].flat)[0])
        assert not torch.allclose(*values)


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_discrete_action_search_against_brute_force(changed):
    args, env, nets, batch = world(double=True, continuous_actions=False, action_agents=changed, batch_size=6)
    joint = script.everybody(batch["actions"])
    found = script.greedy_changes(nets["critic"], batch["obs"], joint, env, args)
    q = partial(script.q_values, nets["critic"])
    for m in range(6):
        obs = batch["obs"][:, :, m : m + 1]
        for i in range(3):
            start = batch["actions"][0, :, m].argmax(-1).tolist()
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
    args, env, _, batch = world(double=True, action_epsilon=0.3, action_agents=changed, attack_steps=20, attack_lr=4.0)
    generators = script.envs.make_generators(0, 1, "test", DEVICE)
    critic = script.init_mlp([3 * (18 + 5), 1, 1], "relu", 3, generators)
    with torch.no_grad():  # the hidden unit is always active, so that Q is linear
        critic.layers()[0][1].fill_(100.0)
        critic.layers()[1][0].fill_(1.0)
    joint = script.everybody(batch["actions"])
    q = script.q_values(critic, batch["obs"], joint)
    batch["action_noise"] = script.envs.per_seed(torch.randn, (3, args.batch_size, 15), generators)
    change = script.action_regularizer(critic, batch, q, env, args)
    weights = critic.layers()[0][0][:, 0, 54:].view(3, 3, 5).norm(dim=-1)  # [critic, agent]
    exact = 0.09 * weights.square().topk(changed, -1).values.sum(-1)[:, None]
    assert (change <= exact * (1 + 1e-9)).all()
    assert (change / exact).median() > (
        0.999 if changed == 3 else 0.95
    )  # from a bad start the second-best agent is kept
    delta = script.sparse_project(torch.randn(50, 15, device=DEVICE), 0.3, 3, changed).view(50, 3, 5)
    assert ((delta.norm(dim=-1) > 0).sum(-1) == changed).all() and (delta.flatten(1).norm(dim=-1) <= 0.3 + 1e-9).all()


@pytest.mark.parametrize("env_id", ["simple_speaker_listener_v4", "simple_world_comm_v3"])
def test_padding_is_never_played_and_never_matters(env_id):
    args, env, nets, batch = world(double=True, env_id=env_id, continuous_actions=False)
    sizes = torch.tensor(env.action_sizes, device=DEVICE)
    assert (batch["actions"].argmax(-1) < sizes[:, None]).all()
    output = script.policy(nets["actor"], batch["obs"], env)
    hard = script.straight_through(output, batch["gumbel"]).detach()
    assert (hard.argmax(-1) < sizes[:, None]).all() and (hard.transpose(2, 3)[:, ~env.action_mask].abs() < 1e-9).all()
    torch.testing.assert_close(hard.sum(-1), torch.ones_like(hard[..., 0]))
    grad = torch.autograd.grad(script.actor_loss(nets, batch, env, args)[0], nets["actor"].flat)[0]
    bias = replace(nets["actor"], flat=grad).layers()[-1][1][..., 0]  # [N, A]
    assert (bias[~env.action_mask] == 0).all() and bias[env.action_mask].abs().sum() > 0


def test_straight_through_gradient_is_the_softmax_gradient():
    z = torch.randn(1, 1, 7, 5, dtype=torch.float64, requires_grad=True)
    noise, weight = script.envs.gumbel((1, 1, 7, 5), dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    hard, soft = script.straight_through(z, noise), torch.softmax(z + noise, -1)
    assert set(hard.detach().round(decimals=9).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(
        *(torch.autograd.grad((x * weight).sum(), z, retain_graph=True)[0] for x in (hard, soft))
    )


def test_clipping_is_per_network():
    net = script.MLP(torch.zeros(3, 6, requires_grad=True), [2, 2], "relu")
    optimizer, scale = torch.optim.SGD([net.flat], 1.0), torch.tensor([0.01, 1.0, 100.0])[:, None]
    nets = dict.fromkeys(("critic", "actor"), net)
    nets |= dict.fromkeys(("critic_target", "actor_target"), replace(net, flat=net.flat.detach().clone()))
    losses = dict.fromkeys(("critic", "actor"), lambda *_: ((net.flat * scale).sum(), {}))
    args = Args(**(SMALL | dict(max_grad_norm=0.5, tau=0.0)))
    script.update(nets, dict.fromkeys(("critic", "actor"), optimizer), losses, {}, None, args)
    torch.testing.assert_close(net.flat.grad.norm(dim=1), torch.tensor([0.01 * 6**0.5, 0.5, 0.5]))


def short_train(tmp_path, name, **options):
    args = Args(**(SMALL | options))
    env = script.make_env(args, args.num_seeds * args.num_envs, DEVICE)
    nets, optimizers = script.make_nets(env, args)
    run = runs.Run(tmp_path / name, [{"seed": seed} for seed in args.seeds])
    run.dir.mkdir()
    script.train(env, nets, optimizers, args, run, {})
    assert runs.read_rows(run.dir / "metrics.csv")[-1]["global_step"] == str(args.total_timesteps)
    return args, env, nets, run.rows


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(continuous_actions=False), dict(share_parameters=False)])
def test_a_seed_does_not_depend_on_the_others(tmp_path, options):
    script.setup(Args(**SMALL))
    _, _, together, rows = short_train(tmp_path, "together", seed=5, num_seeds=3, **options)
    for k in range(3):
        _, _, alone, own = short_train(tmp_path, f"alone{k}", seed=5 + k, **options)
        for name in alone:
            assert alike(alone[name].flat, together[name].flat.unflatten(0, (3, -1))[k])
        of_seed = [row for row in rows if row["seed"] == 5 + k]
        assert alike(without_speed(own), without_speed(of_seed))


def test_opponents_keep_their_own_critic_and_all_networks_learn(tmp_path):
    args, env, nets, _ = short_train(tmp_path, "run", env_id="simple_tag_v3", minimax_epsilon=0.01, action_reg_coef=0.1)
    fresh, _ = script.make_nets(env, args)
    for name in ("actor", "critic", "actor_target", "critic_target"):
        assert (nets[name].flat != fresh[name].flat).any(1).all()


MODES = [
    *(dict(regularizer=m) for m in ("none", "gaussian", "random", "adversarial", "stackelberg")),
    dict(norm="linf", epsilon_units="std", divergence="l2_squashed", activation="silu"),
    dict(continuous_actions=False, divergence="l2_probs", action_reg_coef=0.1, action_agents=2),
    dict(continuous_actions=False, minimax_epsilon=0.01, activation="tanh"),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", [*MODES, pytest.param(dict(cuda_graphs=True), marks=NEEDS_GPU)])
def test_every_option_trains(tmp_path, options):
    _, _, _, rows = short_train(tmp_path, "run", **options)
    assert len(rows) == 3 and all(math.isfinite(float(v)) for v in rows[-1].values())


GRAPHS = [
    dict(regularizer="none"),
    dict(regularizer="stackelberg"),
    dict(action_reg_coef=0.1),
    dict(action_reg_coef=0.1, continuous_actions=False),
]


@pytest.mark.parametrize("options", GRAPHS)
@pytest.mark.parametrize("resumed", [False, True])
def test_updates_in_a_cuda_graph_are_those_without(options, resumed, monkeypatch):
    args = Args(num_seeds=2, **(SMALL | options))
    script.setup(args)
    env = script.make_env(args, 8, DEVICE)
    nets, _ = script.make_nets(env, args)
    streams = envs.make_generators(3, 2, "test", DEVICE)
    replay = script.rollout(env.step, env, nets["actor"], script.draw_rollout(env, 0.5, streams))
    batches = [script.sample(replay, 4, args, streams) | script.draw_noise(streams, env, args) for _ in range(9)]
    learners = [learner(script, nets, env, args) for _ in range(2)]
    check_updates_in_a_cuda_graph(learners, batches, DEVICE, monkeypatch, resumed, least=300)


@pytest.mark.parametrize(
    "options",
    [
        dict(env_id="simple_spread_v3"),
        dict(env_id="simple_spread_v3", continuous_actions=False),
        dict(env_id="simple_world_comm_v3"),
        dict(env_id="simple_world_comm_v3", continuous_actions=False),
        dict(env_id="leader_follower_v0", env_kwargs=("gust=1.0",), horizon=25),
    ],
)
def test_rollouts_in_a_cuda_graph_are_those_without(options, monkeypatch):
    args = Args(num_seeds=2, **(SMALL | options))
    env = script.make_env(args, 8, DEVICE)
    nets, _ = script.make_nets(env, args)
    streams = envs.make_generators(3, 2, "test", DEVICE)
    draws = [(script.draw_rollout(env, 0.1 * k, streams),) for k in range(7)]
    play = partial(script.rollout, env.step, env, nets["actor"])
    check_rollouts_in_a_cuda_graph(play, nets, draws, DEVICE, monkeypatch)


def test_a_cuda_graph_takes_tensors_by_name_and_shape(monkeypatch):
    if DEVICE.type == "cpu":
        record_cuda_graphs(monkeypatch)
    difference = envs.captured(lambda batch: {"c": batch["a"] - batch["b"]}, DEVICE)
    a, b = torch.tensor([3.0], device=DEVICE), torch.tensor([1.0], device=DEVICE)
    for _ in range(5):
        assert difference({"a": a, "b": b})["c"] == 2
    assert difference({"b": b, "a": a})["c"] == 2
    for wrong in ({"a": a}, {"a": a, "b": b[0]}, {"a": a, "b": b.long()}):
        with pytest.raises(ValueError):
            difference(wrong)


def test_metrics_keep_no_gradients():
    """A capture would meet what these hold of the networks, on another stream, and fail."""
    args, env, nets, batch = world()
    metrics = script.diagnose(nets["actor"], batch["obs"][:, :, :16], batch["perturbation"], env, args)
    for loss in (script.critic_loss, script.actor_loss):
        metrics |= loss(nets, batch, env, args)[1]
    assert len(metrics) > 8 and not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("options", [*MODES, dict(action_reg_coef=0.1)])
def test_losses_need_nothing_from_the_host(options):
    """On the meta device, where tensors have no values and do not go with a CPU's."""
    args, env, nets, batch = world(**options)
    env = script.make_env(args, env.num_envs, torch.device("meta"))
    nets, batch = on("meta", nets), on("meta", batch)
    for name in ("critic", "actor"):
        with Recorder() as recorder:
            loss, _ = getattr(script, f"{name}_loss")(nets, batch, env, args)
            torch.autograd.grad(loss, nets[name].flat)
        tensors = [x for x in tree_leaves(recorder.calls) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors} == {"meta"}


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("env_id", particle.TASKS)
def test_every_task_trains(tmp_path, env_id, continuous):
    short_train(tmp_path, "run", env_id=env_id, continuous_actions=continuous, total_timesteps=200)


@pytest.mark.slow
def test_learns_cooperative_navigation(tmp_path):
    """A random policy has -27; 1,600 small updates reach about -20."""
    options = dict(num_envs=40, batch_size=128, hidden_size=64, learning_starts=2000, buffer_size=40_000)
    options |= dict(total_timesteps=40_000, log_interval=40_000, eval_episodes=100)
    _, _, _, rows = short_train(tmp_path, "run", **options)
    assert float(rows[-1]["eval/episodic_return"]) > -22.5
