"""envs/traffic.py against recordings of SUMO 1.28, and what must hold for every flow and action."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest
import replay
import torch
from commands import BACKEND, alike
from torch._inductor import cpp_builder, exc

import envs
from envs import traffic

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DATA = pathlib.Path(__file__).parent / "data" / "traffic"
MODELS = ({"model": "krauss", "depart": "max"}, {"model": "idm"})


def make(num_envs: int = 1, dtype=torch.float64, **fields) -> traffic.Traffic:
    return envs.make("traffic_grid_v0", num_envs, DEVICE, dtype, **fields)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def random_action(env: traffic.Traffic, generator: torch.Generator, probability: float = 0.1) -> torch.Tensor:
    return (torch.rand(env.num_envs, env.num_agents, generator=generator) < probability).long().to(env.device)


def rollout(env: traffic.Traffic, steps: int, seed: int = 0, step=None):
    """Yields (state before, action, result of the step) under random actions."""
    streams = generators(seed)
    state, _ = env.reset(streams)
    for _ in range(steps):
        action = random_action(env, streams[0])
        result = (step or env.step)(state, action, env.draw(streams))
        yield state, action, result
        state = result[0]


RECORDINGS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * path.stem.startswith("macro"))
    for path in sorted(DATA.glob("*.json"))
]


@pytest.mark.parametrize("path", RECORDINGS)
def test_recordings_of_sumo(path):
    for quantity, (error, tolerance) in replay.replay_traffic(path, {}).items():
        assert error <= tolerance, quantity


@pytest.mark.slow
def test_replay_command_tells_good_from_bad(tmp_path, capsys):
    source = DATA / "micro_krauss.json"
    shutil.copy(source, tmp_path)
    assert replay.main(["traffic", str(tmp_path)]) == 0
    text = source.read_text()
    for broken in ("", "{}", "[]", text[:5000], text.replace('"speed"', '"s"', 1).replace('"rows"', '"lines"', 1)):
        (tmp_path / source.name).write_text(broken)
        assert replay.main(["traffic", str(tmp_path)]) == 1
        assert "cannot be replayed" in capsys.readouterr().out
    for wrong in ("7.702", "NaN"):
        (tmp_path / source.name).write_text(text.replace('"bot0_0_0",7.7,7.7,', f'"bot0_0_0",7.7,{wrong},', 1))
        assert replay.main(["traffic", str(tmp_path)]) == 1
        assert "FAIL micro_krauss.json: krauss position" in capsys.readouterr().out
    assert replay.main(["traffic", str(tmp_path / "missing")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("fields", MODELS, ids=lambda fields: fields["model"])
@pytest.mark.parametrize("size", [(2, 2), (1, 3)], ids=str)
def test_what_always_holds(fields, size):
    """Random actions, all flows: no car is lost, none overlap, totals agree, and cars obey the lights."""
    rows, cols = size  # both have eight entries
    flow = torch.tensor(list(traffic.FLOWS.values()))
    env = make(len(flow), rows=rows, cols=cols, flow=flow, **fields)
    crossed = 0
    for before, action, (state, obs, reward, terminated, truncated, info) in rollout(env, 400):
        there = state.position < traffic.FAR
        inside = there.sum(1)
        assert torch.equal(state.entered, inside + state.left)  # conservation
        assert torch.equal(env.due(before.t) + state.started, state.entered + env.backlog(state))
        assert torch.equal(inside.sum(0), info["vehicles"]) and not state.overflow.any()
        assert (there.sum((0, 1)) == info["vehicles"]).all() and not terminated.any()
        # a car's leader is in the place before: no overlap, up to the gap that IDM does not keep to the millimetre
        gap = state.position.roll(1, 1) - state.position - env.car_length
        assert gap[there].min() > (env.min_gap - 0.01 if fields["model"] == "krauss" else 0.5)
        assert (state.speed[there] >= 0).all() and (state.speed <= state.max_speed + 1e-9).all()
        # no car passes red; on yellow only those that could not stop
        lights, _ = env.signals(before, action)
        aspect = env.aspect(lights)[:-1, :, None]
        old, new = before.position, state.position
        passed = (old > env.previous) & (old <= env.line) & (new > env.line)  # [M, K, N, B]
        assert not (passed & (aspect == traffic.RED)).any()
        late = env.line - old < env.brake_distance(before.speed)
        assert not (passed & (aspect == traffic.AMBER) & ~late).any()
        crossed += passed.sum()
        torch.testing.assert_close(reward, sum(info[name] for name in traffic.TERMS))
        assert obs.shape == (len(flow), rows * cols, 22) and obs.isfinite().all()
    assert crossed > 1000


def test_signal_machine():
    """One light: at least 2 s of green, 3 s of yellow, in which a switch is ignored; direction shows the next green."""
    env = make(rows=1, cols=1, flow=0.0, initial_cars=False)
    state = env.make_state()
    R, A, G = traffic.RED, traffic.AMBER, traffic.GREEN
    # action, then direction, since, yellow, aspects of north-south and east-west in the second that follows
    table = [
        (1, 0, 1, 0, G, R),  # too young
        (1, 1, 0, 1, A, R),
        (1, 1, 1, 1, A, R),
        (0, 1, 2, 1, A, R),
        (1, 1, 0, 0, R, G),
        (1, 1, 1, 0, R, G),  # green for 1 s only
        (0, 1, 2, 0, R, G),
        (1, 0, 0, 1, R, A),
        (0, 0, 1, 1, R, A),
        (0, 0, 2, 1, R, A),
        (0, 0, 0, 0, G, R),
    ]
    for action, direction, since, yellow, north, east in table:
        lights, begins = env.signals(state, torch.tensor([[action]], device=DEVICE))
        assert [int(lights.direction), int(lights.since), int(lights.yellow)] == [direction, since, yellow]
        aspect = env.aspect(lights)[..., 0]
        assert aspect[0].tolist() == [north, north, east, east] and (aspect[1] == G).all()
        switched = bool(yellow and since == 0)
        assert bool(begins) == switched
        state, obs, _, _, _, info = env.step(state, torch.tensor([[action]], device=DEVICE))
        assert obs[0, 0, 16:18].tolist() == [direction, since] and info["switch"].item() == -switched


def test_observation_and_reward_by_hand():
    """One light. Eastbound: a car that has stood for 4 s at the line and one that comes to stand behind it. Northbound:
    a car at 35 m/s, 5 m before its green line, which it passes. Southbound and westbound roads are empty."""
    env = make(rows=1, cols=1, flow=0.0, initial_cars=False, model="krauss", depart="max", sigma=0.0, speed_dev=0.0)
    nan = torch.nan
    position = torch.tensor([[[nan, nan], [395.0, nan], [399.0, 391.4], [nan, nan]]], dtype=torch.float64)
    speed = torch.tensor([[[0.0, 0.0], [35.0, 0.0], [0.0, 0.05], [0.0, 0.0]]], dtype=torch.float64)
    state = env.make_state(position, speed)
    state.waiting[2, 0] = 4.0
    state, obs, reward, _, truncated, info = env.step(state, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE))
    # the follower has 0.1 m of gap left, so that it goes 0.099 m/s: its first second of waiting
    assert state.speed[2, 1].item() == pytest.approx(0.099, abs=1e-9)
    moving = 1 - 0.099 / (2 + 1e-5) / 35
    expected = [2, 0, 0, 0, (5 + 1) / 2, 0, 0, 0, moving, 1, 1, 1, 2, 0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert obs[0, 0].tolist() == pytest.approx(expected, abs=1e-9)
    parts = {"queue": -1.0, "wait": -1.5, "delay": -0.5 * (3 + moving), "emergency": 0.0, "switch": 0.0, "passed": 1.0}
    assert {name: info[name].item() for name in parts} == pytest.approx(parts)
    assert reward.item() == pytest.approx(sum(parts.values())) and not truncated
    # a car brakes with 4.5 m/s^2 for its red light: an emergency stop by the paper's code, none with a tolerance
    for tolerance, stops in ((0.0, 1), (1e-3, 0)):
        strict = dataclasses.replace(env, emergency_tolerance=tolerance)
        for dtype in (torch.float32, torch.float64):
            strict = dataclasses.replace(strict, dtype=dtype)
            state = strict.make_state([[[nan], [nan], [329.7], [nan]]], [[[0.0], [0.0], [27.3], [0.0]]])
            *_, info = strict.step(state, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE))
            assert info["emergency"].item() == -0.25 * stops


@pytest.mark.slow
@pytest.mark.parametrize("fields", MODELS, ids=lambda fields: fields["model"])
def test_compiled_step_equals_eager_and_compiles_once(fields):
    env = make(4, capacity=40, **fields)
    torch.compiler.reset()
    backend = "inductor" if fields["model"] == "krauss" else BACKEND  # IDM's kernels are tested below
    compiled = torch.compile(env.step, fullgraph=True, backend=backend)
    eager = [result for _, _, result in rollout(env, 60)]

    def guarded(*arguments):
        with torch.compiler.set_stance("default" if arguments[0].t[0] == 0 else "fail_on_recompile"):
            return compiled(*arguments)

    for result, (_, _, other) in zip(eager, rollout(env, 60, step=guarded)):
        for name, value in vars(result[0]).items():
            torch.testing.assert_close(getattr(other[0], name), value, rtol=1e-9, atol=1e-9)
        for value, twin in zip((*result[1:5], *result[5].values()), (*other[1:5], *other[5].values())):
            torch.testing.assert_close(twin, value, rtol=1e-9, atol=1e-9)


def test_step_is_pure_and_seeds_are_independent():
    env = make(6, capacity=60, warmup=40, **MODELS[0])
    together, alone = generators(1, 2, 3), generators(2)
    (state, obs), part = env.reset(together), dataclasses.replace(env, num_envs=2)
    one, one_obs = part.reset(alone)
    for _ in range(5):
        assert alike(obs[2:4], one_obs)
        for name, value in vars(state).items():
            assert alike(value[..., 2:4], getattr(one, name))
        action = torch.ones(6, 4, dtype=torch.int64, device=DEVICE)
        before = {name: value.clone() for name, value in vars(state).items()}
        new, obs, *_ = env.step(state, action, env.draw(together))
        assert all(torch.equal(value, getattr(state, name)) for name, value in before.items())
        one, one_obs, *_ = part.step(one, action[:2], part.draw(alone))
        state = new
    assert not torch.equal(state.position[..., :2], state.position[..., 2:4])
    with pytest.raises(ValueError, match="multiple of the 4 generators"):
        env.reset(generators(0, 1, 2, 3))


def test_values_per_environment_equal_numbers():
    fields = {"speed": [30.0, 35.0], "speed_limit": [35.0, 30.0], "sigma": [0.5, 0.1], "min_gap": [2.5, 3.0]}
    both = make(2, **MODELS[0], **{name: torch.tensor(value) for name, value in fields.items()})
    results = []
    for i in (None, 0, 1):
        env = (
            both
            if i is None
            else make(2, **MODELS[0], capacity=both.num_places, **{k: v[i] for k, v in fields.items()})
        )
        *_, (_, _, result) = rollout(env, 120)
        results.append(result)
    for i in (0, 1):
        assert alike(results[0][1][i], results[1 + i][1][i]) and alike(results[0][2][i], results[1 + i][2][i])
    assert not torch.equal(results[1][1][0], results[2][1][0])


def test_overflow_is_counted_and_nothing_lost():
    env = make(2, capacity=8)
    stay = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    state, _ = env.reset(generators(0))
    overflow = 0
    for _ in range(200):
        state, _, _, _, _, info = env.step(state, stay)
        overflow = overflow + info["overflow"]
    assert (state.overflow.sum(0) == overflow).all() and (overflow > 0).all()
    inside = (state.position < traffic.FAR).sum(1)
    assert inside.max() == 7 and torch.equal(state.entered, inside + state.left)


@pytest.mark.parametrize("offset", [0, 6, 15])
def test_fixed_time_lights_fall_in_step(offset):
    env = traffic.make("traffic_grid_v0", 3, warmup=43)
    state, _ = env.reset([torch.Generator().manual_seed(1)])
    assert len(set(state.direction.flatten().tolist())) == 2  # out of step
    seen = []
    for _ in range(120):
        state, *_ = env.step(state, traffic.fixed_time(env, state, green=12, offset=offset), None)
        seen.append(state.direction)
    first, second, third, last = torch.stack(seen)[40:].unbind(1)  # [t, B] of each light
    assert (first == first[:, :1]).all() and (first == last).all() and (second == third).all()
    assert (second[offset:] == first[: len(first) - offset]).all()
    changes = (first[1:, 0] != first[:-1, 0]).nonzero().flatten()
    assert (changes.diff() == 15).all()


@pytest.mark.slow
@pytest.mark.parametrize("env_id", traffic.TASKS)
def test_tasks_controllers_and_pictures(env_id):
    """Better control is better: of random switching and a fixed time, the latter keeps fewer cars waiting."""
    env = envs.make(env_id, 2, DEVICE)
    state, obs = env.reset(generators(0))
    rewards = []
    for controller in traffic.CONTROLLERS.values():
        state, obs = env.reset(generators(0))
        for _ in range(150):
            state, obs, reward, *_ = env.step(state, controller(env, state), None)
        rewards.append(reward.sum(1).mean().item())
        assert state.left.sum() > 0
    assert all(np.isfinite(rewards))
    picture = env.render(state, 1, 300)
    assert picture.shape == (300, 300, 3) and picture.dtype == np.uint8 and len(np.unique(picture)) > 20
    assert env.global_state(state).shape == (2, 18 * env.num_agents)
    assert torch.equal(env.global_state(state)[:, -env.num_agents :], obs[..., 17])


def test_roads_of_the_irregular_grids():
    irregular, atlanta = envs.make("traffic_irregular_v0", 1), envs.make("traffic_atlanta_v0", 1)
    assert irregular.lengths[0] == (250, 550, 300) and irregular.lengths[2] == (300, 550, 250)
    assert irregular.lengths[4] == irregular.lengths[6] == (300, 300, 300)
    assert atlanta.num_agents == 16 and atlanta.lengths[8][1] == pytest.approx((270**2 + 30**2) ** 0.5)
    assert atlanta.lengths[12] == atlanta.lengths[8][::-1]


def test_horizon_and_warm_up():
    env = make(2, torch.float32, horizon=3, warmup=30)
    state, _ = env.reset(generators(0))
    assert state.t.tolist() == [30, 30]
    action = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    ends = []
    for _ in range(3):
        state, _, _, terminated, truncated, _ = env.step(state, action, None)
        ends.append(truncated.tolist())
    assert ends == [[False, False], [False, False], [True, True]] and not terminated.any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"env_id": "traffic_grid_v9"}, "env_id must be one of .*traffic_grid_v0.*, got 'traffic_grid_v9'"),
        ({"flow": [700.0] * 7}, r"flow must have 8 entries .*, got \[7\]"),
        ({"flow": "flow9"}, "flow must be one of train, .*, got 'flow9'"),
        ({"flow": [-1.0] * 8}, "flow must be 0 or more"),
        ({"rows": 3, "flow": "flow1"}, r"flow must have 10 entries .*, got \[8\]"),
        ({"lengths": -400.0}, "lengths must be .*, got -400.0"),
        ({"lengths": [[400.0] * 3] * 7}, "lengths must be .* edges per street"),
        ({"rows": 0}, "rows must be 1 or more, got 0"),
        ({"cols": 0}, "cols must be 1 or more, got 0"),
        ({"num_envs": 0}, "num_envs must be 1 or more, got 0"),
        ({"horizon": 0}, "horizon must be 1 or more, got 0"),
        ({"warmup": -1}, "warmup must be 0 or more, got -1"),
        ({"model": "gipps"}, "model must be idm or krauss, got gipps"),
        ({"depart": "random"}, "depart must be fixed or max, got random"),
        ({"sigma": -0.1}, "sigma must be 0 or more, got -0.1"),
        ({"speed": 0.0}, "speed must be positive, got 0.0"),
        ({"speed": torch.ones(3)}, "speed must be a number or .num_envs = 2., got .3."),
        ({"accel": float("nan")}, "accel must be positive, got nan"),
        ({"capacity": 1}, "capacity must be None or 2 or more, got 1"),
        ({"num_agents": 5}, "num_agents of traffic_grid_v0 must be rows . cols = 4, got 5"),
        ({"lanes": 2}, "fields of traffic_grid_v0 are rows, .*capacity, got 'lanes'"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(**{"env_id": "traffic_grid_v0", "num_envs": 2, **options})
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_speed_and_gif_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(traffic.write_gif, "__defaults__", (2,))
    path = tmp_path / "traffic.gif"
    traffic.main(num_envs=2, seconds=0.01, threads=torch.get_num_threads(), gif=str(path))
    assert "car updates/s" in capsys.readouterr().out and path.read_bytes().startswith(b"GIF")


def test_without_a_compiler_the_step_is_the_eager_one(monkeypatch, capsys):
    def fail():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fail)
    envs.can_compile.cache_clear()
    env = make(2)
    assert traffic.compiled_step(env) == env.step
    assert traffic.compiled_step(env) == env.step
    assert capsys.readouterr().out == "no C++ compiler: the traffic simulator runs several times slower\n"
    envs.can_compile.cache_clear()


@pytest.mark.slow
def test_one_compiled_step_serves_all_of_a_report_and_equals_the_eager_one():
    """Any number of environments, that of the streets too, each at its own speed and flow or all at one, another
    network, with gradients or without."""
    torch.compiler.reset()
    others = traffic.side_by_side(make(10), [("speed", 30.0), ("flow", 2)], 1)
    elsewhere = envs.make("traffic_atlanta_v0", 18, DEVICE, torch.float64)
    for num_envs, env in ((10, others), (6, make(6)), (8, make(8)), (18, elsewhere)):
        step = traffic.compiled_step(env)
        (generator,) = envs.make_generators(1, 1, "test", "cpu")
        state, _ = env.reset([generator])
        stance = "default" if num_envs == 10 else "fail_on_recompile"
        for _ in range(5):
            action = torch.rand(env.num_agents, num_envs, generator=generator).T.round().long()
            noise = env.draw([generator])
            given = action.contiguous()[:] if num_envs == 6 else action  # a view, as the lights' own choices are
            with torch.compiler.set_stance(stance), torch.set_grad_enabled(num_envs == 6):
                _, *found = step(state, given, noise)
            state, *expected = env.step(state, action, noise)
            for x, y in zip(found[:2], expected[:2]):
                torch.testing.assert_close(x, y, rtol=0, atol=0)
