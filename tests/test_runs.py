"""What every script's runs have in common: folders, checkpoints that survive, resumed runs, signals, wrong input."""

import errno
import fcntl
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import ROOT, call, finish, only, start_script, without_speed

import envs
from envs import robustness, runs

sys.path.insert(0, str(ROOT / "baselines"))

STEPS = "--total-timesteps=400 --log-interval=100 --checkpoint-interval=200 --eval-episodes=0"
REPLAY = f"{STEPS} --steps-per-update=50 --num-envs=4 --learning-starts=100 --buffer-size=1000"
SMALL = {  # script: flags of a run of seconds, with more than three updates and two checkpoints
    "ernie_maddpg": f"{REPLAY} --horizon=5 --batch-size=32 --hidden-size=16",
    "ernie_mappo": f"{STEPS} --checkpoint-interval=40 --env-id=simple_spread_v3 --horizon=5 --num-envs=8"
    " --num-minibatches=1 --update-epochs=1 --hidden-size=16",
    "ernie_meanfield": f"{REPLAY} --num-agents=3 --batch-size=8 --hidden-size=8 --reg-batch-size=4 --transport-steps=10"
    " --eval-agents 3 --no-compile-transport",
    "ernie_qcombo": f"{STEPS} --num-envs=4 --horizon=200 --warmup=45 --rollout-steps=5 --updates-per-rollout=1"
    " --buffer-size=1000 --batch-size=16 --hidden-size=16 --eval-warmup=1 --eval-seconds=2 --no-compile",
    "ernie_coma": f"{STEPS} --checkpoint-interval=40 --num-envs=2 --horizon=60 --warmup=10 --rollout-steps=10"
    " --hidden-size=16 --reg-batch-size=8 --eval-warmup=1 --eval-seconds=2 --no-compile",
    "rma3c": f"{REPLAY} --horizon=5 --batch-size=32 --hidden-size=16",
    "ermas_bimatrix": "--num-iterations=12 --log-interval=3 --checkpoint-interval=2 --num-envs=8 --horizon=6"
    " --inner-steps=2 --eval-iterations=3 --eval-q 0 0.5",
    "ermas_economy": "--horizon=40 --period=10 --phase-one-timesteps=320 --response-steps=160 --phase-two-timesteps=480"
    " --log-interval=160 --checkpoint-interval=160"
    " --num-envs=2 --hidden-size=8 --planner-hidden-size=8 --num-minibatches=2 --update-epochs=1"
    " --trust-batch-size=16 --cg-steps=3 --eval-eta 0.1 0.3 --eval-timesteps=320 --eval-episodes=0",
}
TASKS = {  # modules of envs/ whose tasks a script runs
    "ernie_maddpg": {"particle", "drones"},
    "ernie_mappo": {"particle", "drones", "traffic"},
    "ernie_meanfield": {"particle"},
    "ernie_qcombo": {"traffic"},
    "ernie_coma": {"particle", "traffic"},
    "rma3c": {"particle", "drones"},
    "ermas_bimatrix": {"bimatrix"},
    "ermas_economy": {"economy"},
}
LONGER = {"ermas_bimatrix": "--num-iterations=18", "ermas_economy": "--phase-two-timesteps=800"}  # half as long again
QUICK = {"ermas_bimatrix": "--eval-iterations=1"}  # the shortest report
REPORT = {"ermas_bimatrix": ("test_games.csv", "report.png"), "ermas_economy": ("welfare.csv", "report.png")}
OFFLINE = "--wandb-mode=disabled"
KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/baselines"]
sys.argv[0] = "{script}.py"
import {script} as script
calls, update = [], script.update
def counted(*args, **options):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.{signal})
    return update(*args, **options)
script.update = counted
script.main()
"""


DAILY = ("ernie_maddpg", "ermas_bimatrix")  # the others, whose plumbing is the same text, in the full suite


@pytest.fixture(params=[name if name in DAILY else pytest.param(name, marks=pytest.mark.slow) for name in SMALL])
def script(request):
    return importlib.import_module(request.param)


def flags_of(script) -> list[str]:
    return ["--no-cuda", *SMALL[script.__name__].split()]


def quick(script, episodes=0) -> str:
    """The flag of a short report; of none where that can be."""
    return QUICK.get(script.__name__, f"--eval-episodes={episodes}")


def report_of(script) -> tuple[str, str]:
    return REPORT.get(script.__name__, ("robustness.csv", "robustness.png"))


def path_of(script):
    return next(path for path in (ROOT, ROOT / "baselines") if (path / f"{script.__name__}.py").exists())


def file_of(script) -> str:
    return str(path_of(script) / f"{script.__name__}.py")


def start(script, tmp_path, *flags, **options):
    """A new small run as a user starts it."""
    return start_script(file_of(script), "--runs-dir", tmp_path, *flags_of(script), *flags, **options)


def refused(script, monkeypatch, capsys, *flags) -> str:
    """What the script says about wrong flags, with exit code 2."""
    assert call(script, monkeypatch, *flags) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(" ".join(line.strip(" │") for line in error.splitlines()).split())


def steps_of(rows) -> list[str]:
    return list(dict.fromkeys(row["global_step"] for row in rows))


def same_end(one, two) -> bool:
    """Have two run folders the same metrics and the same networks, bit for bit?"""
    tables = [without_speed(runs.read_rows(folder / "metrics.csv")) for folder in (one, two)]
    nets = [runs.load(folder / "checkpoint.pt")["nets"] for folder in (one, two)]
    return tables[0] == tables[1] and all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of two seeds per script: (folder, what it printed); made when it is first asked for by one of the
    processes that run tests side by side."""
    parent = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        parent = parent.parent

    def get(script):
        folder = parent / f"finished_{script.__name__}"
        folder.mkdir(exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "out").exists():
                flags = ["--capture-video", "--num-seeds=2"]
                if script.__name__ not in QUICK:
                    flags.append("--eval-episodes=10")  # as many as of the small run in training
                out, error = finish(start(script, folder / "runs", *flags, is_forked=False))  # wandb needs it
                assert "wandb" not in error
                (folder / "out").write_text(out)
        return only(folder / "runs"), (folder / "out").read_text()

    return get


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to be spoilt."""
    return lambda script: shutil.copytree(finished(script)[0], tmp_path / "copy")


@pytest.fixture
def short_report(monkeypatch):
    """One point of those of particles and drones, for tests that are not about the report."""
    sweep = robustness.sweep

    def first(env, make_policy, strengths, *rest, **options):
        name, (strength, *_) = next(iter(strengths.items()))
        return sweep(env, make_policy, {name: (strength,)}, *rest, **options)

    monkeypatch.setattr(robustness, "sweep", first)


# ---------------------------------------------------------------- a whole run


def test_a_run_leaves_what_it_promises(script, finished, monkeypatch):
    folder, out = finished(script)
    about = json.loads((folder / "args.json").read_text())
    assert about["versions"]["torch"] == version("torch") and about["num_seeds"] == 2
    rows = runs.read_rows(folder / "metrics.csv")
    num_runs = len(rows) // len(steps_of(rows))
    assert len(list(folder.glob("wandb/offline-run-*"))) == num_runs >= 2
    for name in ("metrics.csv", "checkpoint.pt", "policy.pt", *report_of(script), "episode.gif"):
        assert (folder / name).stat().st_size > 0
    assert not list(folder.glob("*.tmp"))
    assert any(float(row.get("charts/welfare", 1)) for row in rows)  # agents earn something in these few steps
    report = runs.read_rows(folder / report_of(script)[0])
    assert {row["seed"] for row in report} == {row["seed"] for row in rows} == {"1", "2"}
    assert len(steps_of(rows)) > 2 and out.count("/s, ") >= len(steps_of(rows))  # without a terminal, a line per log
    size = [(folder / name).stat().st_size for name in ("policy.pt", "checkpoint.pt")]
    assert size[0] < size[1]


@pytest.mark.slow
def test_the_policy_alone_is_enough_to_evaluate(script, copy, short_report, monkeypatch):
    folder = copy(script)
    report = folder / report_of(script)[0]
    before = runs.read_rows(report)
    (folder / "checkpoint.pt").unlink()
    assert call(script, monkeypatch, "--evaluate", folder) == 0
    assert all(row in before for row in runs.read_rows(report))  # the same policies, the same episodes
    assert call(script, monkeypatch, "--evaluate", folder / "policy.pt", quick(script, 1)) == 0
    assert not all(row in before for row in runs.read_rows(report))  # the flag beats the saved value


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ernie_maddpg", "ermas_economy"], indirect=True)
def test_a_renamed_copy_reads_its_parents_runs(script, finished, tmp_path):
    folder, _ = finished(script)
    shutil.copy(path_of(script) / f"{script.__name__}.py", tmp_path / "mine.py")
    finish(start_script(str(tmp_path / "mine.py"), "--evaluate", folder, quick(script), PYTHONPATH=str(ROOT)))


@pytest.mark.slow
def test_torchrun_shares_out_the_seeds(script, finished, tmp_path):
    """One script is started by it, the others in the environment that it makes."""
    flags = [OFFLINE, "--num-seeds=2"]
    if script.__name__ == "ernie_maddpg":
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        command = [*launch, file_of(script), *flags_of(script), *flags, f"--runs-dir={tmp_path}"]
        finish(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    else:
        both = [start(script, tmp_path, *flags, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank) for rank in "01"]
        for process in both:
            finish(process)
    together = without_speed(runs.read_rows(finished(script)[0] / "metrics.csv"))
    for seed in (1, 2):
        (folder,) = tmp_path.glob(f"*__{seed}__*")
        own = without_speed(runs.read_rows(folder / "metrics.csv"))
        expected = [row for row in together if row["seed"] == str(seed)]
        assert [row["global_step"] for row in own] == [row["global_step"] for row in expected]
        for row, other in zip(own, expected):
            numbers = [name for name in row if "/" in name and "interaction" not in name and row[name] != other[name]]
            assert all(float(row[k]) == pytest.approx(float(other[k]), rel=1e-3, abs=1e-4) for k in numbers)


def test_seeds_that_processes_cannot_share_are_refused(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = refused(script, monkeypatch, capsys, *flags_of(script), "--num-seeds=3", f"--runs-dir={tmp_path}/runs")
    assert "--num-seeds must be a multiple of torchrun's 2 processes, got 3" in error
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- killed, stopped, resumed


@pytest.mark.slow
@pytest.mark.parametrize("how,code", [("SIGKILL", -9), ("SIGINT", 130)])
def test_killed_or_stopped_and_resumed_equals_uninterrupted(script, finished, tmp_path, how, code):
    """At the third update, whatever the machine's load."""
    killed, folder = tmp_path / "killed.py", tmp_path / "runs"
    killed.write_text(KILLED.format(root=str(ROOT), script=script.__name__, call=3, signal=how))
    flags = [*flags_of(script), OFFLINE, "--num-seeds=2", f"--runs-dir={folder}"]
    _, error = finish(start_script(str(killed), *flags), code)
    folder = only(folder)
    if how == "SIGINT":
        assert error.strip().endswith(f"go on with --resume {folder}")
    (folder / "metrics.csv").write_text("seed,global_st")  # what a kill in the middle of a write leaves
    (folder / "checkpoint.pt.tmp").write_text("half")
    finish(start_script(file_of(script), "--resume", folder))
    assert same_end(folder, finished(script)[0]) and not list(folder.glob("*.tmp"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU ignores it")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_with_cuda_graphs(script, compiled, tmp_path, monkeypatch):
    """Of more than four rollouts, the last ones and their updates replayed."""
    if script.__name__.startswith("ermas"):
        pytest.skip("has no such flag")
    flags = [flag for flag in flags_of(script) if flag not in ("--no-cuda", "--no-compile")]
    flags += ["--cuda-graphs", "--compile" if compiled else "--no-compile", OFFLINE, f"--runs-dir={tmp_path}"]
    assert call(script, monkeypatch, *flags) == 0
    assert runs.read_rows(only(tmp_path) / "metrics.csv")


@pytest.fixture(scope="module")
def number_of_updates(tmp_path_factory):
    """Of a small run; counted in one that is not stopped."""
    counts = {}

    def get(script):
        name, update, save, updates = script.__name__, script.update, runs.save, []

        def counted(*args, **options):
            updates.append(1)
            return update(*args, **options)

        def noted(path, state):
            if path.name == "policy.pt":  # training is over
                counts[name] = len(updates)
            save(path, state)

        if name not in counts:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(script, "update", counted)
                patch.setattr(runs, "save", noted)
                flags = [*flags_of(script), OFFLINE, f"--runs-dir={folder}", quick(script)]
                assert call(script, patch, *flags) == 0
            assert (only(folder) / "policy.pt").exists()
        return counts[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_in_the_last_update_still_stops(script, number_of_updates, monkeypatch, capsys, tmp_path, how):
    updates, last, update = [], number_of_updates(script), script.update
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # the tests run under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def counted(*args, **options):
        updates.append(1)
        if len(updates) == last:
            os.kill(os.getpid(), getattr(signal, how))
        return update(*args, **options)

    monkeypatch.setattr(script, "update", counted)
    flags = [*flags_of(script), OFFLINE, f"--runs-dir={tmp_path}"]
    assert call(script, monkeypatch, *flags) == 130
    assert "--resume" in capsys.readouterr().err
    folder = only(tmp_path)
    assert (folder / "checkpoint.pt").exists() and not (folder / "policy.pt").exists()


def test_ctrl_c_while_importing_prints_no_traceback(script, tmp_path):
    """A package that presses it while it is imported."""
    (tmp_path / "pydantic.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    process = start(script, tmp_path, OFFLINE, PYTHONPATH=str(tmp_path), is_forked=False)
    out, error = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT and out == error == ""


@pytest.mark.slow
def test_a_finished_run_is_made_longer(script, copy, monkeypatch, tmp_path):
    folder = copy(script)
    before = runs.read_rows(folder / "metrics.csv")
    flag = LONGER.get(script.__name__, "--total-timesteps=600")
    assert call(script, monkeypatch, "--resume", folder, flag, quick(script), OFFLINE) == 0
    rows = runs.read_rows(folder / "metrics.csv")
    assert rows[: len(before)] == before and len(rows) > len(before)
    steps = [int(step) for step in steps_of(rows)]
    assert steps == sorted(steps) and len(rows) % len(steps) == 0
    name, value = flag.removeprefix("--").replace("-", "_").split("=")
    assert json.loads((folder / "args.json").read_text())[name] == int(value)


def test_a_longer_run_that_was_stopped_has_no_policy_of_before(script, copy, monkeypatch):
    """What evaluates it takes the checkpoint."""
    folder, update = copy(script), script.update

    def stopping(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return update(*args, **options)

    assert runs.trained_file(folder) == folder / "policy.pt"
    monkeypatch.setattr(script, "update", stopping)
    flag = LONGER.get(script.__name__, "--total-timesteps=600")
    assert call(script, monkeypatch, "--resume", folder, flag, OFFLINE) == 130
    assert runs.trained_file(folder) == folder / "checkpoint.pt" and not (folder / "policy.pt").exists()


def test_a_run_is_not_made_shorter(script, finished, monkeypatch, capsys):
    folder, _ = finished(script)
    flag, longer = LONGER.get(script.__name__, "--total-timesteps=600").split("=")
    error = refused(script, monkeypatch, capsys, "--resume", folder, f"{flag}={int(longer) // 2}")
    assert f"{flag} must be at least" in error


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ernie_maddpg"], indirect=True)
def test_a_run_that_overshot_its_total_is_resumed_and_evaluated_where_it_lies(
    script, short_report, monkeypatch, tmp_path
):
    flags = [*flags_of(script), "--num-envs=4", "--total-timesteps=450", OFFLINE]
    assert call(script, monkeypatch, f"--runs-dir={tmp_path}/runs", *flags) == 0
    folder = only(tmp_path / "runs")
    rows = runs.read_rows(folder / "metrics.csv")
    assert int(rows[-1]["global_step"]) > 450
    (folder / "policy.pt").unlink()
    assert call(script, monkeypatch, "--resume", folder, OFFLINE) == 0
    assert runs.read_rows(folder / "metrics.csv") == rows and (folder / "policy.pt").exists()
    moved = folder.rename(tmp_path / "moved")
    assert call(script, monkeypatch, "--evaluate", moved, quick(script, 1), OFFLINE) == 0
    assert (moved / "robustness.csv").exists() and not folder.exists()


def test_two_processes_cannot_resume_one_run(script, copy, monkeypatch, capsys):
    folder = copy(script)
    before = (folder / "args.json").read_text()
    flag = LONGER.get(script.__name__, "--total-timesteps=600")
    with runs.locked(folder):
        error = refused(script, monkeypatch, capsys, "--resume", folder, flag, OFFLINE)
    assert "another process is at work" in error and (folder / "args.json").read_text() == before


@pytest.mark.parametrize(
    "flag", ["--seed=3", "--num-seeds=3", "--hidden-size=32", "--epsilon=0.7", "--learning-rate=5"]
)
def test_what_cannot_change_is_refused_by_name(script, finished, monkeypatch, capsys, flag):
    folder, _ = finished(script)
    error = refused(script, monkeypatch, capsys, "--resume", folder, flag)
    assert f"{flag.split('=')[0]} must be" in error


# ---------------------------------------------------------------- files


def test_no_flipped_bit_of_a_checkpoint_loads_as_something_else(tmp_path):
    whole, damaged = tmp_path / "whole.pt", tmp_path / "damaged.pt"
    generator = torch.Generator().manual_seed(0)
    runs.save(whole, {"args": {"seed": 1}, "nets": {"actor": torch.randn(50, generator=generator)}})
    expected, data, draw = runs.load(whole), whole.read_bytes(), random.Random(0)
    refusals = 0
    for _ in range(300):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        damaged.write_bytes(flipped)
        try:
            loaded = runs.load(damaged)
        except ValueError as error:
            refusals += 1
            assert str(damaged) in str(error)
            continue
        assert loaded["args"] == expected["args"] and torch.equal(loaded["nets"]["actor"], expected["nets"]["actor"])
    assert refusals > 100  # the rest met padding and dates
    for cut in (0, 1, 30, len(data) // 2, len(data) - 1):
        damaged.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="no readable checkpoint"):
            runs.load(damaged)


def spoil(folder, change) -> None:
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "checkpoint.pt")


@pytest.mark.slow
def test_a_foreign_or_old_checkpoint_is_named(script, copy, monkeypatch, capsys):
    folder = copy(script)
    whole = (folder / "checkpoint.pt").read_bytes()

    def says(change):
        (folder / "checkpoint.pt").write_bytes(whole)
        spoil(folder, change)
        return refused(script, monkeypatch, capsys, "--resume", folder, OFFLINE)

    first = next(iter(torch.load(folder / "checkpoint.pt", weights_only=True)["nets"]))
    assert f"nets.{first} is missing" in says(lambda c: c["nets"].pop(first))
    assert f"nets.{first} is [3, 3]" in says(lambda c: c["nets"].update({first: torch.zeros(3, 3)}))
    assert "optimizer" in says(lambda c: c.pop("optimizers"))
    assert "streams is missing" in says(lambda c: c.pop("streams"))
    assert "args is missing" in says(lambda c: c.pop("args"))
    assert "no_such_flag" in says(lambda c: c["args"].update(no_such_flag=1))
    assert "seed" in says(lambda c: c["args"].update(seed=-3))
    (folder / "checkpoint.pt").write_bytes(whole)
    spoil(folder, lambda c: c["args"].pop("learning_rate"))
    assert call(script, monkeypatch, "--resume", folder, OFFLINE, quick(script)) == 0
    assert "set to their defaults: learning_rate" in capsys.readouterr().out


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_whole_files(script, short_report, monkeypatch, capsys, tmp_path):
    """One file after the other cannot be written; each time the run goes on from what is there."""
    table, picture = report_of(script)
    real, written = os.replace, []
    flags = [*flags_of(script), f"--runs-dir={tmp_path}", quick(script, 1)]

    def full(source, target):
        written.append(str(target))
        if str(target).endswith(which) and len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target)

    for which in ("checkpoint.pt", "metrics.csv", "policy.pt", table, picture):
        monkeypatch.setattr(os, "replace", full)
        assert call(script, monkeypatch, *flags, OFFLINE) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        folder = only(tmp_path)
        assert "No space left on device" in error and which in error and str(folder) in error
        assert "--resume" in error or "--evaluate" in error
        assert not list(folder.glob("*.tmp"))
        flags = ["--resume", folder]
    monkeypatch.setattr(os, "replace", real)
    assert call(script, monkeypatch, *flags, OFFLINE) == 0


def test_a_loss_that_is_not_finite_stops_with_the_step(script, monkeypatch, capsys, tmp_path):
    calls, update = [], script.update

    def poisoned(*args, **options):
        calls.append(1)
        metrics = update(*args, **options)
        return {name: value * (math.nan if len(calls) > 2 else 1.0) for name, value in metrics.items()}

    monkeypatch.setattr(script, "update", poisoned)
    flags = [*flags_of(script), OFFLINE, f"--runs-dir={tmp_path}", "--checkpoint-interval=1"]
    assert call(script, monkeypatch, *flags) == 1
    assert "not finite" in capsys.readouterr().err
    for path in tmp_path.glob("*/checkpoint.pt"):
        runs.check_finite(runs.load(path)["nets"], "nets")


def test_save_refuses_what_is_not_finite(tmp_path):
    with pytest.raises(FloatingPointError, match="nets.actor.1 is not finite"):
        runs.save(tmp_path / "x.pt", {"nets": {"actor": [torch.ones(2), torch.tensor([math.inf])]}})
    assert not list(tmp_path.iterdir())


def test_generators_of_another_device_begin_anew():
    """Not with the numbers that were drawn before."""
    other = torch.arange(16, dtype=torch.uint8)  # the state of a generator on a GPU has this size
    states = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(1)
        runs.restore({"streams": [generator]}, {"streams": [other]})
        states.append(generator.get_state())
    assert torch.equal(*states) and not torch.equal(states[0], torch.Generator().manual_seed(1).get_state())


def test_the_shell_never_sees_a_folders_name(tmp_path):
    folder = tmp_path / "x'; touch y; '"
    folder.mkdir()
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=b"]
    subprocess.run(["git", "-C", str(folder), *who, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = runs.provenance(str(folder / "script.py"))["git_commit"]
    assert commit and len(commit) == 40 and not (folder / "y").exists()


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert runs.provenance(__file__)["git_commit"] is None


# ---------------------------------------------------------------- Weights & Biases


@pytest.mark.slow
def test_wandb_that_fails_does_not_stop_the_run(script, monkeypatch, capsys, tmp_path):
    wandb = pytest.importorskip("wandb")

    def unreachable(**options):
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", unreachable)
    assert call(script, monkeypatch, *flags_of(script), f"--runs-dir={tmp_path}", "--wandb-mode=online") == 0
    error = capsys.readouterr().err
    assert error.count("no route to host") == 2  # online, then offline


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ernie_maddpg"], indirect=True)
def test_online_without_a_server_is_offline(script, tmp_path):
    """After half a minute; that every script goes on without wandb says the test above."""
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "x" * 40}
    _, error = finish(start(script, tmp_path, "--wandb-mode=online", **server))
    assert "wandb (online) is left out" in error and "wandb (offline)" not in error
    assert list(only(tmp_path).glob("wandb/offline-run-*"))


def test_a_resumed_run_logs_its_earlier_rows_again(script, copy, monkeypatch):
    folder = copy(script)
    logged = []

    class Recorder:
        def log(self, row, step):
            logged.append((row["seed"], step))

        def define_metric(self, name, summary):
            assert name == "eval/*"

    args = script.Args(**runs.load(folder / "checkpoint.pt")["args"])
    rows = runs.load(folder / "checkpoint.pt")["rows"]

    def init(config, **options):
        assert {"git_commit", "versions", "seed", "num_seeds"} <= config.keys()
        return Recorder()

    monkeypatch.setattr("wandb.init", init)
    labels = [{"seed": row["seed"]} for row in rows if row["global_step"] == rows[0]["global_step"]]
    runs.start_wandb(runs.Run(folder, labels, rows), args)
    assert logged == [(row["seed"], row["global_step"]) for row in rows] and len(rows) > 2


def test_a_run_that_trained_nothing_ends_its_record(tmp_path):
    """A warm start of a method without a planner has no row of metrics, but a film."""
    logged = []
    recorder = SimpleNamespace(log=lambda row, step: logged.append(step), finish=lambda: logged.append("finished"))
    envs.save_gif(tmp_path / "episode.gif", [np.zeros((8, 8, 3), np.uint8)] * 2)
    run = runs.Run(tmp_path, [{"seed": 1}], [])
    run.wandb_runs = [recorder]
    runs.finish_wandb(run)
    assert logged == [0, "finished"]


# ---------------------------------------------------------------- wrong input


def test_every_number_has_bounds(script, monkeypatch, capsys):
    """Of the type of each field: nan, infinity and a number below its range are refused, in code as by the flag."""
    tried = 0
    for name, value in script.Args().__dict__.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        bad = [-1] if isinstance(value, int) else [math.nan, math.inf, -1e30]
        for wrong in bad:
            with pytest.raises(ValueError, match=name):
                script.Args(**{name: wrong})
            tried += 1
    assert tried > 20
    error = refused(script, monkeypatch, capsys, "--num-seeds=0", "--log-interval=0")
    assert "num_seeds" in error and "log_interval" in error and "greater than" in error
    assert "learning_rate" in refused(script, monkeypatch, capsys, "--learning-rate=nan")


@pytest.mark.parametrize(
    "flags,words",
    [
        ("--exp-name=a/b", "exp_name"),
        ("--exp-name=../../x", "exp_name"),
        ("--exp-name=", "exp_name"),
        ("--resume=", "no checkpoint at checkpoint.pt"),
        ("--evaluate=", "no checkpoint at checkpoint.pt"),
        ("--resume=nowhere", "no checkpoint at nowhere"),
        ("--resume=a --evaluate=b", "exclude each other"),
        ("--num-seeds=100000000000", "--num-seeds"),
        ("--num-envs=1000000000", "--num-envs"),
        ("--hidden-size=10000000", "--hidden-size"),
        ("--num-threads=1000000", "num_threads"),
        ("--seed=-1", "seed"),
        ("--no-such-flag", "--no-such-flag"),
    ],
)
def test_wrong_input_is_named(script, monkeypatch, capsys, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(script, monkeypatch, capsys, *flags.split())
    assert not list(tmp_path.iterdir())


def test_tasks_of_other_scripts_are_not_offered(script, monkeypatch, capsys):
    error = refused(script, monkeypatch, capsys, "--env-id=no_such_task")
    modules = ("particle", "drones", "traffic", "bimatrix", "economy")
    names = {module: importlib.import_module(f"envs.{module}").TASKS for module in modules}
    assert {module for module in modules if any(name in error for name in names[module])} == TASKS[script.__name__]


TOOLS = [f"benchmarks/{name}.py" for name in ("attack", "certify", "reproduce", "speed", "third_party")]
TOOLS = [pytest.param(path, marks=pytest.mark.slow) for path in [*TOOLS, "tests/replay.py"]]


@pytest.mark.parametrize("path", ["ernie_maddpg.py", *TOOLS])
def test_help_that_nobody_reads_to_its_end(path):
    reader, writer = os.pipe()
    os.close(reader)
    said = subprocess.run([sys.executable, ROOT / path, "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (said.returncode, said.stderr) == (-signal.SIGPIPE, b"")


def test_flags_stand_in_groups(script, monkeypatch, capsys):
    """Those of the run, of the economy, of the algorithm and of what makes it robust; one wrong combination is one
    line."""
    monkeypatch.setenv("COLUMNS", "100")
    assert call(script, monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    num_groups = 4 if script.__name__ == "ermas_economy" else 3
    assert len(re.findall(r"\w+ options", out)) == num_groups and "Experiment options" in out
    assert max(map(len, out.splitlines()[3:])) <= 100  # below the docstring's first line
    error = refused(script, monkeypatch, capsys, "--resume=a", "--evaluate=b")
    assert "pydantic" not in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("script", ["ernie_maddpg", "ernie_meanfield", "rma3c"], indirect=True)
def test_a_replay_without_room_for_an_episode_is_refused(script, monkeypatch, capsys):
    flags = [flag for flag in flags_of(script) if "buffer-size" not in flag]
    assert "--buffer-size must hold" in refused(script, monkeypatch, capsys, *flags, "--buffer-size=10")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ernie_maddpg"], indirect=True)
def test_an_attack_too_small_for_a_gradient_is_no_error(script, monkeypatch, tmp_path):
    flags = [*flags_of(script), "--epsilon=1e-8", OFFLINE, f"--runs-dir={tmp_path}"]
    assert call(script, monkeypatch, *flags) == 0


def test_a_folder_that_cannot_be_written_is_named(script, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    error = refused(script, monkeypatch, capsys, f"--runs-dir={tmp_path}/file", *flags_of(script))
    assert f"{tmp_path}/file" in error


def test_memory_is_estimated_for_the_flag_to_blame():
    assert "--buffer-size" in str(pytest.raises(ValueError, check_maddpg, buffer_size=10**12, total_timesteps=10**12))
    assert "--batch-size" in str(pytest.raises(ValueError, check_maddpg, batch_size=10**9))
    assert "--eval-episodes" in str(pytest.raises(ValueError, check_maddpg, eval_episodes=10**11))
    check_maddpg()


def check_maddpg(**options):
    import ernie_maddpg

    args = ernie_maddpg.Args(**options)
    runs.check_memory(envs.make(args.env_id, args.num_envs), args)
