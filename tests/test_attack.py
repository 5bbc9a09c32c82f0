"""benchmarks/attack.py: learned attacks on the policies of a run."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, call, finish, only, start_script

sys.path.insert(0, str(ROOT / "benchmarks"))

import attack

import envs

pytestmark = pytest.mark.slow  # each trains a short run of every script
torch.set_num_threads(1)
CPU = torch.device("cpu")
LIGHTS = (
    "--total-timesteps=240 --num-envs=2 --rollout-steps=20 --warmup=20 --horizon=60 --eval-warmup=2 --eval-seconds=2"
    " --no-compile"
)
RUNS = (  # script, flags of a short run
    ("ernie_maddpg", "--total-timesteps=2000 --learning-starts=1000 --hidden-size=16"),
    ("baselines/rma3c", "--total-timesteps=2000 --learning-starts=1000 --hidden-size=16"),
    ("ernie_mappo", "--env-id=simple_adversary_v3 --num-envs=8 --total-timesteps=400 --num-minibatches=2"),
    ("ernie_coma", "--env-id=simple_spread_v3 --num-envs=8 --total-timesteps=800 --epsilon-units=raw"),
    (
        "ernie_meanfield",
        "--total-timesteps=2000 --learning-starts=1000 --hidden-size=16 --num-agents=4 --no-compile-transport",
    ),
    ("ernie_qcombo", LIGHTS),
    ("ernie_coma", f"{LIGHTS} --idle-logit=0"),  # untrained lights with a head start only keep
)
SHORT = {"seconds": 20, "warmup": 10}  # of the lights' episodes


@pytest.fixture(scope="module", params=RUNS, ids=[f"{script}-{k}" for k, (script, _) in enumerate(RUNS)])
def run_dir(request, tmp_path_factory) -> Path:
    """Of a run, made in this process, without a report."""
    folder, (script, flags) = tmp_path_factory.mktemp("runs"), request.param
    flags = [*flags.split(), "--num-seeds=2", "--eval-episodes=0", "--wandb-mode=disabled", f"--runs-dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "baselines")
        assert call(importlib.import_module(Path(script).name), patch, *flags) == 0
    return only(folder)


def adversaries(run_dir, **options):
    args = attack.Args(run_dir, **SHORT, **options)
    victim = attack.load(CPU, args)
    env = attack.Adversaries(victim, 2 * 8, 0.3, args)
    (_, obs), seen = env.reset(envs.make_generators(1, 2, "test", CPU))
    assert torch.equal(seen, obs[:, env.team])
    return victim, args, env, envs.by_agent(obs, 2)


@pytest.mark.parametrize("space", ["policy", "observation"])
def test_observations_stay_in_the_ball_and_opponents_see_clearly(run_dir, space):
    _, _, env, obs = adversaries(run_dir, space=space)
    choice = torch.randn(*obs.shape[:3], env.action_mask.shape[1])
    moved = env.perturb(obs, choice) - obs
    unit = env.unit.expand_as(moved)
    assert not moved[:, ~env.team].any() and not moved[unit == 0].any() and moved.isfinite().all()
    length = torch.where(unit > 0, moved / unit, 0)[:, env.team].norm(dim=-1)
    assert (length <= 0.3 * (1 + 1e-4)).all() and length.max() > 0.9 * 0.3
    assert torch.equal(env.perturb(obs, torch.zeros_like(choice)), obs)


def test_a_direction_of_the_output_is_followed(run_dir):
    victim, _, env, obs = adversaries(run_dir)
    clean = env.policy.output(obs)
    choice = torch.zeros(*obs.shape[:3], env.action_mask.shape[1])
    choice[..., 0] = 1
    gain = env.policy.output(env.perturb(obs, choice)) - clean
    loss = env.policy.output(env.perturb(obs, -choice)) - clean
    gain, loss = gain[:, env.team, :, 0], loss[:, env.team, :, 0]
    most = 0.9 if hasattr(victim.args, "nearest_agents") else 1.0  # of whom an agent sees others once these move
    assert (gain > -1e-6).float().mean() >= most and gain.max() > 1e-4
    assert (loss < 1e-6).float().mean() >= most


def test_undisturbed_returns_are_those_of_the_task(run_dir):
    """Radius 0, and an adversary that does nothing: the same episodes, the same return."""
    args = attack.Args(run_dir, eval_episodes=8, **SHORT)
    victim = attack.load(CPU, args)
    clean = attack.returns(victim, "clean", 0.0, args)
    env = attack.Adversaries(victim, 2, 0.3, args)

    def idle(seen):
        return torch.zeros(*seen.shape[:3], env.action_mask.shape[1])

    assert torch.allclose(attack.returns(victim, "learned", 0.3, args, idle), clean)
    assert torch.allclose(attack.returns(victim, "gaussian", 0.0, args), clean)
    assert not torch.allclose(attack.returns(victim, "gaussian", 20.0, args), clean)


def test_the_adversary_learns_to_hurt(monkeypatch):
    """A task in which an agent is paid minus the square of what it sees one step later: it acts on its observation as
    if that were its place. The adversary must find a constant shift, of which noise has the mean 0."""

    class Task:
        num_agents, horizon, device, dtype, discrete, num_envs = 1, 6, CPU, torch.float32, False, 0
        agents = ["agent"]
        cooperators, obs_mask, action_mask = torch.tensor([True]), torch.ones(1, 2).bool(), torch.ones(1, 2).bool()

        def __init__(self, num_envs):
            self.num_envs = num_envs

        def reset(self, generators):
            size = self.num_envs // len(generators)
            place = torch.cat([torch.randn(size, 1, 2, generator=g) for g in generators])
            return place, place

        def draw(self, generators):
            return None

        def step(self, place, action, noise):
            place = place + action
            over = torch.zeros(len(place), dtype=torch.bool)
            return place, place, -place.sum(-1), over, over, {}

    policy = attack.robustness.Policy(lambda obs: -obs, lambda output: output, None)
    victim = attack.Victim(attack.ernie_mappo.Args(num_seeds=1), Task, lambda env: policy)
    for space in ("policy", "observation"):
        args = attack.Args(Path("."), space=space, iterations=30, num_envs=64, eval_episodes=64, learning_rate=5e-3)
        choose = attack.learn(victim, 1.0, args)
        # every step the place is minus the shift, of length 1: at best sqrt(2) is lost in each of six steps
        found = attack.returns(victim, "learned", 1.0, args, choose).item()
        noise = attack.returns(victim, "gaussian", 1.0, args).item()
        assert -6 * 2**0.5 - 0.1 < found < -6 * 1.3 and abs(noise) < 1.5, space


def test_as_a_user_starts_it(run_dir):
    words = ["--radius=0.5", "--iterations=2", "--num-envs=4", "--eval-episodes=4", "--seconds=10", "--warmup=5"]
    out, _ = finish(start_script("benchmarks/attack.py", run_dir, *words))
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["clean", "gaussian", "mad", "learned"]
    with open(run_dir / "learned_attack.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 and {row["seed"] for row in rows} == {"1", "2"}
    assert all(float(row["return"]) == float(row["return"]) for row in rows)


def test_it_starts_in_a_process_of_its_own():
    out, _ = finish(start_script("benchmarks/attack.py", "--help", is_forked=False))
    assert "--radius" in out


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere"], "no folder of a run"),
        (["x", "--radius=0"], "radius"),
        (["x", "--radius", "1", "1"], "radius must have different values"),
        (["x", "--attack"], "attack"),
    ],
)
def test_bad_input_is_named(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["attack.py", *words])
    with pytest.raises(SystemExit) as stop:
        attack.main()
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
