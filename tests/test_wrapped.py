"""Scripts on PettingZoo environments whose episodes are short, whose agents die and whose actions are masked."""

import importlib
import sys
import types

import numpy as np
import pytest
import torch
from commands import call
from gymnasium import spaces
from test_zoo import Masked, Short, Trait

import envs
import ernie_coma
import ernie_mappo
from envs import runs

SCRIPTS = {
    "ernie_maddpg": ["--no-continuous-actions", "--batch-size=64", "--learning-starts=40", "--steps-per-update=10"],
    "ernie_mappo": ["--no-continuous-actions", "--num-minibatches=2", "--update-epochs=2"],
    "ernie_coma": [],
    "rma3c": ["--no-continuous-actions", "--batch-size=64", "--learning-starts=40", "--steps-per-update=10"],
}
SMALL = "--num-envs=4 --total-timesteps=160 --hidden-size=16 --log-interval=80 --num-workers=1".split()


class Fighters(Masked):
    """Masked agents that see a constant; c dies in step 2 of 5, where everybody is cut."""

    max_cycles = 12
    space = spaces.Box(0, 1, (2,), np.float32)

    def __init__(self):
        self.possible_agents = ["a", "b", "c"]
        self.legal = True

    def reset(self, seed=None, options=None):
        super().reset(seed)
        self.agents = ["a", "b", "c"]
        return self.observe(), self.infos()

    def step(self, actions):
        Fighters.legal = self.legal and all(action != self.illegal for action in actions.values())
        assert Fighters.legal and set(actions) == set(self.agents)
        return super().step(actions)

    def ends(self):
        died = {agent: agent == "c" and self.t == 2 for agent in self.agents}
        return died, dict.fromkeys(self.agents, self.t == 5)


class Nan(Trait):
    """Sees something that is no number in step 4."""

    def observe(self):
        obs = super().observe()
        if self.t == 4:
            obs["b"][:] = np.nan
        return obs


class Steady(Short):
    """Nothing to see: an episode's end cannot be foreseen."""

    def observe(self):
        return {agent: np.ones(2, np.float32) for agent in self.agents}


@pytest.fixture
def script(request, monkeypatch):
    for name, kind in {"fighters": Fighters, "nan": Nan, "steady": Steady}.items():
        module = types.ModuleType(f"traits_{name}")
        module.parallel_env = kind
        monkeypatch.setitem(sys.modules, module.__name__, module)
    name = request.param
    return importlib.import_module(f"baselines.{name}" if name == "rma3c" else name)


def flags(script) -> list[str]:
    return [*SCRIPTS[script.__name__.split(".")[-1]], *SMALL, "--wandb-mode=disabled"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_masked_agents_that_die_are_trained_and_reported(script, monkeypatch, tmp_path, capsys):
    """No illegal action is ever played: not in training, nor in tests, nor under any attack."""
    Fighters.legal = True
    options = [*flags(script), "--env-id=zoo:traits_fighters", f"--runs-dir={tmp_path}", "--cooperators", "a", "c"]
    assert call(script, monkeypatch, *options, "--eval-episodes=2", "--capture-video") == 0
    assert Fighters.legal
    (folder,) = tmp_path.iterdir()
    rows = runs.read_rows(folder / "metrics.csv")
    column = "charts/reward" if script.__name__ == "ernie_coma" else "charts/episodic_return"
    if column == "charts/episodic_return":  # of a, 5, and c, 2
        assert [float(row[column]) for row in rows] == [3.5] * len(rows)
    report = runs.read_rows(folder / "robustness.csv")
    assert {float(row["return"]) for row in report} == {3.5} and {row["episodes"] for row in report} == {"2"}
    assert (folder / "episode.gif").exists()
    act = script.load_policy(folder)
    env = Fighters()
    observations, infos = env.reset(seed=0)
    while env.agents:
        observations, rewards, terminations, truncations, infos = env.step(act(observations, infos))
        observations = {agent: observations[agent] for agent in env.agents}
    assert env.t == 5


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_without_a_report(script, monkeypatch, tmp_path):
    options = [*flags(script), "--env-id=zoo:traits_steady", f"--runs-dir={tmp_path}", "--eval-episodes=0"]
    assert call(script, monkeypatch, *options) == 0
    (folder,) = tmp_path.iterdir()
    assert (folder / "policy.pt").exists() and not (folder / "robustness.csv").exists()
    env = script.make_env(script.Args(**runs.load(folder / "policy.pt")["args"]), 4, torch.device("cpu"))
    assert env.horizon == 6 and env.autoreset


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_a_simulators_fault_is_one_line(script, monkeypatch, tmp_path, capsys):
    options = [*flags(script), "--env-id=zoo:traits_nan", f"--runs-dir={tmp_path}"]
    assert call(script, monkeypatch, *options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "observation of b" in error and "nan" in error and "step 3" in error


def fighters_batch(script, args):
    """What the losses take, of two copies and two episodes; who is live."""
    env = script.make_env(args, args.num_envs, torch.device("cpu"))
    nets, _ = script.make_nets(env, args)
    streams = envs.make_generators(1, 1, "test", "cpu")
    if script.__name__ == "ernie_mappo":
        nets["normalizer"].flat[:, :, 1] = 1
        episodes = script.rollout(env.step, env, nets, args, script.draw_rollout(env, streams))
        (batch,) = script.minibatches(script.prepare(nets, episodes, env, args), streams, args)
    else:
        episodes = script.rollout(env.step, env, nets["actor"], script.draw_rollout(env, 0.3, streams))
        batch = script.sample(episodes, args.num_envs, args, streams)
    return env, nets, batch | script.draw_noise(streams, env, args)


@pytest.mark.parametrize("script", ["ernie_maddpg", "ernie_mappo"], indirect=True)
def test_the_dead_contribute_nothing(script):
    """Whatever stands in their rows, losses and gradients are the same."""
    options = {"num_minibatches": 1, "update_epochs": 1} if script.__name__ == "ernie_mappo" else {"batch_size": 200}
    args = script.Args(env_id="zoo:traits_fighters", continuous_actions=False, num_envs=4, num_workers=1, **options)
    env, nets, batch = fighters_batch(script, args)
    dead = batch["live"] == 0
    assert 0.2 < dead.float().mean() < 0.6 and dead[:, 2].sum() > dead[:, 0].sum() > 0
    spoilt = dict(batch)
    for name in ("rewards", "advantages", "values", "returns", "logprobs"):
        if name in batch:
            spoilt[name] = torch.where(dead, 7.0, batch[name])
    for loss, net in ((script.critic_loss, "critic"), (script.actor_loss, "actor")):
        first, second = (loss(nets, data, env, args)[0] for data in (batch, spoilt))
        assert first.isfinite() and first == second
        for one, two in zip(*(torch.autograd.grad(x, nets[net].flat) for x in (first, second))):
            assert torch.equal(one, two)


@pytest.mark.parametrize("script", ["ernie_mappo"], indirect=True)
def test_advantages_and_moments_are_of_the_living(script):
    args = script.Args(env_id="zoo:traits_fighters", continuous_actions=False, num_envs=4, num_workers=1)
    env = script.make_env(args, 4, torch.device("cpu"))
    nets, _ = script.make_nets(env, args)
    nets["normalizer"].flat[:, :, 1] = 1
    streams = envs.make_generators(1, 1, "test", "cpu")
    episodes = script.rollout(env.step, env, nets, args, script.draw_rollout(env, streams))
    samples = script.prepare(nets, episodes, env, args)
    live, advantages = samples["live"].bool(), samples["advantages"]
    for i in range(3):
        own = advantages[0, i, live[0, i]]
        assert own.mean().abs() < 1e-5 and own.std(correction=0) == pytest.approx(1, abs=1e-4)
    mean, _ = nets["return_moments"].mean_and_std()
    assert mean[0, 2] == pytest.approx(1 + args.gamma / 2, rel=0.2)  # c gets 1 + gamma, then 1, and dies


def four_steps():
    """Rewards, values, terminated and live of two steps that are cut, a reset, and a step that terminates."""
    rows = ([1.0, 2.0, 0.0, 4.0], [10.0, 20.0, 30.0, 40.0, 50.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    return [torch.tensor(row).view(1, 1, 1, -1) for row in rows]


def test_generalised_advantages_stop_where_an_episode_does():
    """By hand."""
    *steps, live = four_steps()
    found = ernie_mappo.gae(*steps, ernie_mappo.Args(gamma=0.5, gae_lambda=0.5), live)[0, 0, 0]
    last = 2 + 0.5 * 30 - 20
    assert found.tolist() == [1 + 0.5 * 20 - 10 + 0.25 * last, last, 0, 4 - 40]


def test_td_lambda_targets_stop_where_an_episode_does():
    *steps, live = four_steps()
    found = ernie_coma.td_lambda_targets(*steps, ernie_coma.Args(gamma=0.5, td_lambda=0.5), live)[0, 0, 0]
    cut = 2 + 0.5 * 30
    assert found.tolist() == [1 + 0.5 * (0.5 * 20 + 0.5 * cut), cut, 30, 4]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ernie_maddpg", "ernie_mappo"], indirect=True)
def test_a_cut_episode_is_worth_what_follows(script, monkeypatch, tmp_path):
    """Reward 1 in every step and gamma 0.8: 5, though episodes are cut after 3 to 5 steps."""
    options = [*flags(script), "--env-id=zoo:traits_steady", "--gamma=0.8", "--regularizer=none", "--eval-episodes=0"]
    options += ["--total-timesteps=8000", "--learning-rate=0.01", "--log-interval=8000", f"--runs-dir={tmp_path}"]
    options += ["--tau=0.1", "--num-envs=20"] if script.__name__ == "ernie_maddpg" else ["--update-epochs=8"]
    assert call(script, monkeypatch, *options) == 0
    (folder,) = tmp_path.iterdir()
    args, saved = runs.saved(script.Args, folder)
    env = script.make_env(args, 4, torch.device("cpu"))
    nets, _ = script.make_nets(env, args)
    runs.restore({"nets": {name: net.flat for name, net in nets.items()}}, saved)
    _, obs = env.reset(envs.make_generators(0, 1, "test", "cpu"))
    obs = envs.by_agent(obs, 1)
    with torch.no_grad():
        if script.__name__ == "ernie_mappo":
            mean, std = nets["return_moments"].mean_and_std()
            value = mean + std * script.state_values(nets["critic"], nets["normalizer"](obs)).unsqueeze(3)
        else:
            action = script.everybody(script.squash(script.policy(nets["actor"], obs, env), env))
            value = script.q_values(nets["critic"], obs, action)
    assert value.mean() == pytest.approx(5, abs=0.4)
