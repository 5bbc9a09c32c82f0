"""envs/sumo.py: the real SUMO behaves like envs/traffic.py. Needs requirements-sumo.txt, but for the last test."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from envs import sumo, traffic

try:
    sumo.require_sumo()
    installed = True
except ImportError:
    installed = False
needs_sumo = pytest.mark.skipif(not installed, reason="needs requirements-sumo.txt")
KRAUSS = {"model": "krauss", "sigma": 0.0, "speed_dev": 0.0}
# Krauss cars brake with exactly `decel`, so that without a tolerance rounding decides which of them count
STRICT = {"emergency_tolerance": 1e-3}


FLOWS = torch.tensor([[300.0] * 8, [900.0] * 8])


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def make():
    """Pairs of environments, ours and SUMO's; SUMO is stopped after the test."""
    opened = []

    def build(num_envs=1, dtype=torch.float64, **fields):
        ours = traffic.make("traffic_grid_v0", num_envs, dtype=dtype, **fields)
        opened.append(sumo.from_traffic(ours))
        return ours, opened[-1]

    yield build
    for env in opened:
        env.close()
    assert not multiprocessing.active_children()


@needs_sumo
@pytest.mark.parametrize(
    "num_envs, fields",
    [
        (1, {"depart": "max"}),
        (1, {"depart": "fixed", "flow": "flow3"}),
        (1, {"lengths": traffic.IRREGULAR, "flow": 675.0, "initial_cars": False}),
        (1, {"rows": 1, "cols": 3, "junction": 30.0, "car_length": 4.0, "min_gap": 1.0, "tau": 1.5, "accel": 2.0}),
        (2, {"speed": torch.tensor([30.0, 40.0]), "speed_limit": torch.tensor([20.0, 45.0]), "flow": FLOWS}),
    ],
)
def test_deterministic_cars_agree(make, num_envs, fields):
    ours, theirs = make(num_envs, **{"depart": "max"} | KRAUSS | STRICT | fields)
    (state, obs), (handle, seen) = ours.reset(generators(0)), theirs.reset(generators(0))
    torch.testing.assert_close(seen, obs)
    for _ in range(200):
        action = traffic.fixed_time(ours, state)
        assert torch.equal(traffic.fixed_time(theirs, handle), action)
        state, *expected, info = ours.step(state, action, ours.draw(generators(0)))
        handle, *got, terms = theirs.step(handle, action, theirs.draw(generators(0)))
        for a, b in zip([*got, theirs.global_state(handle)], [*expected, ours.global_state(state)]):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert terms.keys() == info.keys()
        for name, value in info.items():
            torch.testing.assert_close(terms[name], value, rtol=0, atol=1e-5)
    there = state.position < traffic.FAR
    # where tau is not 1 s, ours stop a millimetre further on
    torch.testing.assert_close(handle.position[there], state.position[there], rtol=0, atol=5e-3)
    assert (theirs.render(handle) == ours.render(state)).mean() > 0.999 and info["vehicles"].min() > 20


@needs_sumo
@pytest.mark.parametrize("model, depart", [("krauss", "max"), ("idm", "fixed")])
def test_means_agree(make, model, depart):
    """Dawdling and different drivers (Krauss), or IDM's look-ahead: means over lights, environments and time."""
    ours, theirs = make(4, torch.float32, model=model, depart=depart, **STRICT)
    means = []
    for env in (ours, theirs):
        drawn = generators(0)
        (state, _), total = env.reset(drawn), 0.0
        for t in range(600):
            state, _, reward, *_ = env.step(state, traffic.fixed_time(env, state), env.draw(drawn))
            total += reward.mean().item() * (t >= 120) / 480
        means.append(total)
    assert means[1] == pytest.approx(means[0], rel=0.1)


@needs_sumo
def test_interface_and_seeds(make):
    ours, theirs = make(2, torch.float32, model="krauss", depart="max", horizon=30, warmup=20)
    for name in ("agents", "num_agents", "obs_sizes", "action_sizes", "discrete", "horizon"):
        assert getattr(theirs, name) == getattr(ours, name), name
    for name in ("obs_mask", "action_mask", "cooperators"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
    runs = []
    for seeds in ((1, 2), (1, 2), (1, 3)):
        drawn = generators(*seeds)
        state, obs = theirs.reset(drawn)
        processes = {process.pid for process in multiprocessing.active_children()}
        assert len(processes) == 2 and state.t.tolist() == [20, 20]
        for t in range(30):
            old, action = state, traffic.longest_queue(theirs, state)
            state, obs, reward, terminated, truncated, _ = theirs.step(state, action, theirs.draw(drawn))
            assert truncated.tolist() == [t == 29] * 2 and not terminated.any()
        assert obs.shape == (2, 4, 22) and reward.shape == (2, 4) and obs.dtype == reward.dtype == torch.float32
        assert theirs.global_state(state).shape == (2, 72)
        runs.append((state.position, processes))
    (first, one), (again, two), (other, _) = runs
    assert one == two and torch.equal(first, again)
    assert torch.equal(first[..., 0], other[..., 0]) and not torch.equal(first[..., 1], other[..., 1])
    assert not torch.equal(first[..., 0], first[..., 1])
    with pytest.raises(ValueError, match="newest state"):
        theirs.step(old, action)
    with pytest.raises(ValueError, match="multiple of the 3 generators"):
        theirs.reset(generators(1, 2, 3))
    _, another = make(1)
    state_of_another, _ = another.reset(generators(0))
    theirs.close()
    assert len(multiprocessing.active_children()) == 1
    another.step(state_of_another, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="call reset"):
        theirs.step(state, action)
    assert theirs.reset(generators(1, 2))[1].shape == (2, 4, 22)


@needs_sumo
def test_a_failure_of_sumo_is_reported_and_stops_it(make):
    _, theirs = make(2, flow=0.0)
    theirs.reset(generators(0))
    with pytest.raises(RuntimeError, match="(?s)SUMO failed.*Traceback"):
        theirs._ask(["no order"] * 2)
    assert not multiprocessing.active_children()
    state, _ = theirs.reset(generators(0))
    multiprocessing.active_children()[0].kill()
    with pytest.raises(RuntimeError, match="died"):
        theirs.step(state, torch.zeros(2, 4, dtype=torch.int64))
    assert not multiprocessing.active_children()


@needs_sumo
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_survives(number, tmp_path):
    """Ctrl-C (which all processes of a terminal get), and a parent that cannot clean up."""
    code = """if True:
        import multiprocessing, torch
        from envs import sumo, traffic
        env = sumo.from_traffic(traffic.make("traffic_grid_v0", 3))
        state, _ = env.reset([torch.Generator().manual_seed(0)])
        print(*[p.pid for p in multiprocessing.active_children()], flush=True)
        while True:
            state, *_ = env.step(state, traffic.fixed_time(env, state))
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "start_new_session": True}
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environ, **options)
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 3
    (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
    parent.wait(30)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())


def alive(pid):
    """Zombies, which an orphanage may be slow to bury, are not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_sumo_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "libsumo", None)
    with pytest.raises(ImportError, match="^envs.sumo needs SUMO: pip install -r requirements-sumo.txt$"):
        sumo.from_traffic(traffic.make("traffic_grid_v0", 1))
