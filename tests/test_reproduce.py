"""benchmarks/reproduce.py: runs that fail, die or are there already, and what is made of their results."""

import importlib
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import reproduce

import ernie_qcombo
from envs import robustness, runs
from envs.runs import read_rows

# A script with the interface of ours: a checkpoint, then (a while later) a result with a row per seed.
SCRIPT = """
import sys, time
from pathlib import Path
flags = dict(word.lstrip("-").split("=") for word in sys.argv[1:] if "=" in word)
if "resume" in flags:
    folder, name = Path(flags["resume"]), Path(flags["resume"]).name.split("__")[1]
else:
    name = flags["exp-name"]
    folder = Path(flags["runs-dir"]) / f"toy__{name}__{flags['seed']}__{time.time_ns()}"
    folder.mkdir(parents=True)
with open(folder.parent / f"{name}.log", "a") as file:
    file.write("resumed " if "resume" in flags else "begun ")
(folder / "checkpoint.pt").touch()
if flags.get("fails"):
    sys.exit("toy.py: error: it fails")
time.sleep(float(flags.get("sleep", 0)))
rows = ["env_id,seed,perturbation,strength,return"]
for seed in range(int(flags.get("seed", 1)), int(flags.get("seed", 1)) + int(flags.get("num-seeds", 5))):
    for level in (0.0, 0.5, 1.0):
        value = float(flags.get("gain", 0)) + seed - level
        rows.append(f"toy,{seed},{'gaussian' if level else 'clean'},{level},{value}")
(folder / "robustness.csv").write_text("\\n".join(rows))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(SCRIPT)
    methods = {"none": [{}], "weak": [{"gain": 1}], "chosen": [{"gain": 0.5}, {"gain": 2}, {"gain": 1}]}
    claims = (("chosen", "none"), ("none", "weak"))
    study = reproduce.Study(str(tmp_path / "toy.py"), "a claim", methods, shown=("gaussian",), claims=claims)
    monkeypatch.setitem(reproduce.STUDIES, "toy", study)
    return study


@pytest.fixture
def ray(monkeypatch):
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(reproduce)  # workers do not have the tests' path
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    yield ray
    ray.shutdown()


def arguments(tmp_path, **options) -> reproduce.Args:
    (tmp_path / "results").mkdir(exist_ok=True)
    return reproduce.Args(runs_dir=tmp_path / "runs", results_dir=tmp_path / "results", **options)


def saved_run(folder, sign, *more_nets):
    """The path of a result beside policies of six seeds with three hunters and a prey, whose weights are numbered."""
    flat = sign * torch.arange(24.0)[:, None].expand(24, 16)  # [S * N, K]
    folder.mkdir()
    args = {"env_id": "simple_tag_v3", "seed": 5, "num_seeds": 6}
    runs.save(folder / "policy.pt", {"args": args, "nets": dict.fromkeys(("actor", *more_nets), flat)})
    return folder / "robustness.csv"


def test_cross_play_swaps_opponents_alone(tmp_path):
    result, rivals = saved_run(tmp_path / "a", 1, "adversary"), saved_run(tmp_path / "b", -1)
    folder, count = reproduce.cross_play(result, rivals)
    assert folder.parent == tmp_path / "a" and count == reproduce.OPPONENTS == 4
    saved = runs.load(folder / "policy.pt")
    assert saved["args"] == {"env_id": "simple_tag_v3", "seed": 5, "num_seeds": 24}
    numbers = saved["nets"]["actor"].view(6, 4, 4, 16)[..., 0]  # [S, rivals, N]
    for k, (team, others) in enumerate(zip(numbers[:, :, :3], numbers[:, :, 3])):
        assert team.tolist() == [[4 * k, 4 * k + 1, 4 * k + 2]] * 4
        assert others.tolist() == [-(4 * ((k + shift) % 6) + 3) for shift in (1, 2, 3, 4)]
    adversaries = saved["nets"]["adversary"].view(6, 4, 4, 16)[..., 0]
    assert torch.equal(adversaries[:, :, :3], numbers[:, :, :3])  # a team's own, which the rivals have not
    assert reproduce.cross_play(result, tmp_path / "a" / "robustness.csv")[0] != folder


def test_results_against_several_opponents_are_averaged(tmp_path):
    values = {"mad": (1.0, 5.0, 2.0, 2.0), "critic": (4.0, 0.0, 3.0, 3.0), "worst_case": (1.0, 0.0, 2.0, 2.0)}
    row = {"env_id": "x", "agent": "mean", "strength": 0.1, "standard_error": 1.0}
    rows = [row | {"perturbation": name, "seed": 5 + k, "return": value}
            for name, returns in values.items() for k, value in enumerate(returns)]  # fmt: skip
    runs.write_rows(tmp_path / "robustness.csv", rows)
    found = read_rows(reproduce.averaged(tmp_path / "robustness.csv", 2))
    means = {(row["perturbation"], row["seed"]): float(row["return"]) for row in found}
    expected = {"mad": (3, 2), "critic": (2, 3), "worst_case": (2, 2)}
    assert means == {(name, str(5 + k)): value for name, pair in expected.items() for k, value in enumerate(pair)}


def test_words_of_a_command_line():
    flags = {"a": 0.3, "eval_agents": (3, 6), "compile": True, "cuda": False, "env_id": "x"}
    expected = ["--a=0.3", "--eval-agents", "3", "6", "--compile", "--no-cuda", "--env-id=x"]
    assert reproduce.words(flags) == expected


def test_a_run_is_begun_resumed_and_then_left_alone(tmp_path, toy):
    script, runs = toy.script, tmp_path / "runs"
    command = [script, "--exp-name=x", "--seed=1", f"--runs-dir={runs}"]
    task = command, runs, "*__x__1__*", "robustness.csv"
    slow = subprocess.Popen([sys.executable, *command, "--sleep=60"])
    while not list(runs.glob("*/checkpoint.pt")):
        time.sleep(0.05)
    slow.kill()
    slow.wait()
    found = reproduce.run(*task)
    assert found.parent.parent == runs and (runs / "x.log").read_text() == "begun resumed "
    assert reproduce.run(*task) == found and (runs / "x.log").read_text() == "begun resumed "
    with pytest.raises(RuntimeError, match="toy.py: error: it fails"):
        reproduce.run([*command, "--fails=1", "--exp-name=y"], runs, "*__y__1__*", "robustness.csv")


def test_statistics_by_hand():
    assert reproduce.iqm(np.array([9.0, 1.0, 2.0, -70.0])) == 1.5
    values = np.array([[1.0, 2, 3, 4, 5], [11, 12, 13, 14, 15]])
    low, high = reproduce.bootstrap(values)
    assert 6 < low < reproduce.iqm(values.reshape(-1)) < high < 10
    assert reproduce.bootstrap(np.full((2, 5), 7.0)) == (7.0, 7.0)
    # the seeds of both levels are drawn together: levels that cancel leave nothing to vary
    assert reproduce.bootstrap(np.stack([values[0], -values[0]]), lambda x, axis: x.mean(axis)) == (0.0, 0.0)
    assert reproduce.interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(4.302653 * 1 / 3**0.5)


def test_verdicts_are_of_paired_differences():
    study = replace(reproduce.STUDIES["spread"], shown=("gaussian",), claims=(("a", "b"),))
    seeds, noise = 10.0 * np.arange(5), np.array([0.1, -0.1, 0, 0.1, -0.1])
    table = {("", "clean", "0.0"): seeds, ("", "gaussian", "0.5"): seeds, ("", "gaussian", "1.0"): seeds}
    better = {key: values + 1 + noise for key, values in table.items()}
    for first, second, verdict in (
        (better, table, "better"),
        (table, better, "worse"),
        (table, table, "no difference"),
    ):
        rows = reproduce.judge("spread", study, {"a": first, "b": second})
        assert [row["perturbation"] for row in rows] == ["clean", "gaussian"]
        assert all(row["verdict"] == verdict and row["seeds"] == 5 for row in rows)
    rows = reproduce.judge("spread", study, {"a": better, "b": table})
    assert rows[0]["mean"] == pytest.approx(1) and rows[0]["interval95"] == pytest.approx(2.776445 * 0.1 / 5**0.5)


def test_rows_of_agents_and_of_fixed_lights():
    study = reproduce.STUDIES["drones"]
    rows = [{"method": "none", "agent": a, "perturbation": "mad", "level": "0.1", "seed": s, "return": v}
            for a, v in (("leader_0", 1.0), ("mean", 2.0)) for s in "21"]  # fmt: skip
    table = reproduce.table_of(rows, "none", "return")
    (values,) = reproduce.cells(study, table, "mad")
    assert values.tolist() == [2.0, 2.0] and len(table) == 2


@pytest.mark.parametrize("agents", [("mean",), ("leader", "mean"), ("",)])
def test_pictures_of_a_mean_and_of_agents(agents):
    study = replace(reproduce.STUDIES["drones"], shown=("gaussian",))
    keys = [(agent, *point) for agent in agents for point in (("clean", "0.0"), ("gaussian", "0.1"))]
    tables = {method: {key: np.arange(3.0) for key in keys} for method in ("none", "stackelberg")}
    assert len(reproduce.draw("toy", study, tables).axes) == 2


def test_every_figure_and_table_has_its_studies():
    every = [name for group in (*reproduce.FIGURES.values(), *reproduce.TABLES.values()) for name in group]
    own = {"coma_sensitivity", "coma_settings", "spread_settings"}  # beyond the papers
    assert {*every, *own} == set(reproduce.STUDIES)
    for name, study in reproduce.STUDIES.items():
        assert study.label or {m for pair in study.claims for m in pair} <= set(study.methods), name
        assert not study.reuse or study.reuse[0] in study.methods
        assert set(study.scripts) <= set(study.methods)


@pytest.mark.parametrize("name", list(reproduce.STUDIES))
def test_every_command_is_understood(name, monkeypatch):
    """By the script that it is for, in both lengths."""
    study = reproduce.STUDIES[name]
    for method, grid in study.methods.items():
        path = Path(study.scripts.get(method, study.script))
        monkeypatch.syspath_prepend(reproduce.ROOT / path.parent)
        script = importlib.import_module(path.stem)
        for flags in grid:
            for more in (study.select, study.quick):
                words = reproduce.words(study.flags | flags | more | {"seed": 1, "num_seeds": 2})
                monkeypatch.setattr(sys, "argv", [study.script, *words])
                args, _ = runs.parse_args(script.Args, script.__doc__)
                assert args.num_seeds == 2


@pytest.mark.slow
def test_a_grid_with_a_failure(tmp_path, toy, ray, monkeypatch):
    methods = toy.methods | {"broken": [{"fails": 1}]}
    monkeypatch.setitem(reproduce.STUDIES, "toy", replace(toy, methods=methods))
    args = arguments(tmp_path, ray_address="local")
    cluster = reproduce.Cluster(args)
    found = reproduce.train("toy", cluster)
    assert list(found) == ["none", "weak", "chosen"] and found["chosen"][0] == {"gain": 2}
    assert len(cluster.failures) == 1 and "toy_broken-" in cluster.failures[0] and "it fails" in cluster.failures[0]
    reproduce.report("toy", found, args)
    rows = read_rows(tmp_path / "results" / "toy.csv")
    assert len(rows) == 3 * 3 * 5 and {row["seed"] for row in rows} == set("12345")
    assert set(rows[0]) == {"script", "env_id", "method", "perturbation", "level", "seed", "return"}
    summary = {(row["method"], row["level"]): row for row in read_rows(tmp_path / "results" / "toy_summary.csv")}
    row = summary["chosen", "0.5"]
    assert float(row["return"]) == 2 + 3 - 0.5 and float(row["less_none"]) == 2 and float(row["iqm"]) == 4.5
    verdicts = {(row["method"], row["perturbation"]): row for row in read_rows(tmp_path / "results" / "verdicts.csv")}
    assert verdicts["chosen", "gaussian"]["verdict"] == "better" and float(verdicts["none", "clean"]["mean"]) == -1
    assert (tmp_path / "results" / "toy.png").stat().st_size > 10_000
    # without opponents nothing is judged
    study = replace(toy, methods={"none": [{"fails": 1}], "weak": [{"gain": 1}]}, fixed_opponents=True)
    monkeypatch.setitem(reproduce.STUDIES, "toy", study)
    assert reproduce.train("toy", cluster) == {} and "toy_none" in cluster.failures[-1]


@pytest.mark.slow
def test_a_run_with_other_flags_or_seeds_is_another_run(tmp_path, toy, ray):
    """It is not taken for finished."""
    cluster = reproduce.Cluster(arguments(tmp_path, ray_address="local"))
    choices = [({"gain": 1}, (1, 2)), ({"gain": 2}, (1, 2)), ({"gain": 2}, (1, 3)), ({"gain": 1}, (1, 2))]
    paths = [cluster.get(cluster.start("toy_weak", toy, "weak", *choice)) for choice in choices]
    assert len(set(paths)) == 3 and paths[0] == paths[3]
    assert [len(read_rows(path)) for path in paths] == [6, 6, 9, 6]


@pytest.mark.parametrize(
    "words,said",
    [
        ([], "nothing asked for"),
        (["--study=toys"], "toys"),
        (["--extra=ladder", "--episodes=0"], "greater than 0"),
        (["--extra=ladder", "--seeds", "3", "1"], "the first and the last"),
        (["--extra=ladder", "--cpus-per-run=nan"], "finite number"),
        (["--extra=ladder", "--results-dir=FILE/results"], "FILE"),
        (["--extra=ladder", "--runs-dir=FILE"], "FILE"),
    ],
)
def test_wrong_input_is_refused(tmp_path, monkeypatch, capsys, words, said):
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", f"--results-dir={tmp_path}", *words])
    with pytest.raises(SystemExit) as stop:
        reproduce.main()
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_node_dies(tmp_path, toy, ray):
    """Its runs go on elsewhere from their checkpoints, and no finished run is repeated."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed, args = nodes.add_node(num_cpus=2), arguments(tmp_path, ray_address=nodes.address)
    study = replace(toy, methods={f"m{k}": [{"sleep": 4}] for k in range(4)}, claims=())
    cluster = reproduce.Cluster(args)
    runs = {method: cluster.start(f"toy_{method}", study, method, {"sleep": 4}, (1, 5)) for method in study.methods}
    while len(list(args.runs_dir.glob("*/checkpoint.pt"))) < 3:
        time.sleep(0.1)
    threading.Timer(0.5, nodes.remove_node, [doomed], {"allow_graceful": False}).start()
    paths = [cluster.get(started) for started in runs.values()]
    ray.shutdown()
    nodes.shutdown()
    assert all(paths) and not cluster.failures and len({path.parent for path in paths}) == 4
    logs = sorted(path.read_text() for path in args.runs_dir.glob("*.log"))
    assert logs == ["begun ", "begun ", "begun resumed ", "begun resumed "]


def test_lights_where_the_cars_change_are_named_and_drawn():
    networks = {"irregular": robustness.NETWORKS["irregular"]}
    args = ernie_qcombo.Args(num_seeds=2, eval_warmup=1, eval_seconds=30, compile=False)
    nets, _ = ernie_qcombo.make_nets(ernie_qcombo.make_env(args, 1, torch.device("cpu")), args)
    lights = ernie_qcombo.make_lights(nets, args, torch.device("cpu"), 1, np.inf)
    changes = [("clean", 0.0), ("speed", 30.0), ("speed", 40.0), *(("flow", k) for k in range(1, 6))]
    cars = {name: robustness.LIGHTS[name] for name in ("speed", "flow")}
    rows = robustness.try_lights(lights, cars, networks, {"policy": "none"})
    trained = [row for row in rows if row["policy"] == "none"]
    assert [(row["seed"], row["perturbation"], row["strength"]) for row in trained] == [
        *((seed, *change) for seed in (1, 2) for change in changes),
        *((seed, "network", "irregular") for seed in (1, 2)),
    ]
    first, second = robustness.SIGNALS
    alone = replace(lights, make_policy=None, seeds=[1])
    one = robustness.drive_rows(alone, changes, {}, {})
    one += robustness.drive_rows(alone, [("network", "irregular")], {}, networks["irregular"])
    assert [row["reward"] for row in rows if row["policy"] == first] == [row["reward"] for row in one]
    assert {row["policy"] for row in rows} == {"none", first, second}
    points = []
    for row in rows:
        both = {"torch": row["reward"], "sumo": 1.1 * row["reward"]}
        points.append({"study": "coma", "method": row["policy"]} | both)
    (axis,) = reproduce.draw_in_sumo(points).axes
    assert [len(dots.get_offsets()) for dots in axis.collections] == [18, 9, 9]
