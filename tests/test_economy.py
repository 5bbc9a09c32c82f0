"""envs/economy.py against recordings of ai-economist, small cases by hand, and what the game's rules demand."""

import dataclasses
import itertools
import json
import math
import pathlib

import numpy as np
import pytest
import replay
import torch
from commands import alike
from pettingzoo.test import parallel_api_test

import envs
from envs import economy, perturb, zoo

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DATA = pathlib.Path(__file__).parent / "data" / "economy"
FILES = sorted(path.name for path in DATA.iterdir() if path.suffix in (".json", ".npz"))
LEFT, RIGHT, UP, DOWN = 46, 47, 48, 49
BUILD = 1


def bid(resource: int, price: int) -> int:
    return 2 + 22 * resource + price


def ask(resource: int, price: int) -> int:
    return 13 + 22 * resource + price


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make(env_id: str = "economy_tiny_v0", num_envs: int = 1, dtype=torch.float64, **fields) -> economy.Economy:
    return envs.make(env_id, num_envs, DEVICE, dtype, **fields)


def start(env: economy.Economy, places: list, **fields) -> economy.State:
    """All environments alike: agents at these (row, column), and fields [N, ...] as nested lists."""
    B, N = env.num_envs, env.num_agents
    tile = torch.as_tensor(replay.tile_of(env, places), device=DEVICE)[:, None].expand(N, B)
    values = {"payment": [10.0] * N, "bonus": [0.0] * N} | fields
    state = env.make_state(tile, torch.zeros(N, B, device=DEVICE), torch.zeros(N, B, device=DEVICE))
    for name, value in values.items():
        like = getattr(state, name)
        value = torch.as_tensor(value, dtype=like.dtype, device=DEVICE)
        setattr(state, name, value.permute(*range(value.ndim - 1, -1, -1))[..., None].expand_as(like).clone())
    return state


def play(env: economy.Economy, state: economy.State, *rows: list[int], noise=None) -> economy.State:
    """Steps with these actions of all agents, the same in all environments."""
    for row in rows:
        state = env.advance(state, torch.tensor([row], device=DEVICE).expand(env.num_envs, -1), noise)
    return state


def places(env: economy.Economy, state: economy.State, b: int = 0) -> list[tuple[int, int]]:
    return [tuple(place) for place in env._place(state)[..., b].T.tolist()]


def random_play(env: economy.Economy, state: economy.State, seed: int, eager: float = 0.6) -> torch.Tensor:
    """[B, N] valid actions: build where that is possible, with probability `eager` go for the nearest unit of what one
    has less of, else anything."""
    mask = env.valid_actions(state)
    uniform, coin = torch.rand(2, *mask.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    near = env._nearest(state, env._place(state))  # [N, 6, B]
    stone, wood = near[:, :3], near[:, 3:]
    to_wood = (wood[:, 2] > 0) & ((state.goods[0] > state.goods[1]) | (stone[:, 2] == 0))
    dr, dc, found = torch.where(to_wood[:, None], wood, stone).unbind(1)
    good = torch.zeros_like(mask)
    good[..., LEFT:] = (torch.stack((dc < 0, dc > 0, dr < 0, dr > 0)) & (found > 0)).permute(2, 1, 0)
    good[..., BUILD] = True
    good &= mask
    good[..., LEFT:] &= ~good[..., BUILD, None]
    wanted = good.any(-1, keepdim=True) & (coin[..., :1] < eager)
    return torch.where(torch.where(wanted, good, mask), uniform, -1).argmax(-1)


def midgame(env: economy.Economy, steps: int = 60, seed: int = 0) -> economy.State:
    """A state with houses, orders and taxes."""
    streams = generators(seed)
    state, _ = env.reset(streams)
    for t in range(steps):
        rates = torch.full((env.num_envs, len(env.cutoffs)), 1 + 2 * (t % 5), device=DEVICE)
        state = env.advance(state, random_play(env, state, 100 * seed + t), env.draw(streams), rates)
    return state


def everything(result) -> list[torch.Tensor]:
    """The tensors of a step's result."""
    state, obs, reward, terminated, truncated, info = result
    return [*vars(state).values(), obs, reward, terminated, truncated, *info.values()]


# ------------------------------------------------------------------------------------------------------ recordings


RECORDINGS = [
    pytest.param(name, id=name, marks=[pytest.mark.slow] * name.startswith(("episode", "auction"))) for name in FILES
]


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings(name):
    for quantity, (error, tolerance) in replay.replay_economy(DATA / name, {}).items():
        assert error <= tolerance, (quantity, error)


def spoil(arrays: dict, names: str) -> dict:
    for name in names.split():
        flat = arrays[name].reshape(-1)
        k = flat.argmax() if name in ("bids", "asks") else 3 % flat.size  # there most rows are padding
        flat[k] = 1 - flat[k] if flat.dtype.kind in "iu" else flat[k] + 1e-4
    return arrays


@pytest.mark.slow
def test_replay_tells_good_from_bad(tmp_path, capsys):
    """Everything that is compared is told from a slightly changed copy."""
    cases = {
        "move_collect.npz": "mask stone_1 wood_1 house_owner_1 loc_1 inv_1 labor_1",
        "auction.npz": "mask_buy mask_sell labor n_orders market_rate price_history bids asks",
        "saez.npz": "elas_t log_z0_t gz bin_rates rates",
        "episode_us_federal.npz": "loc inv esc labor reward rates pos energy_w obs_flat obs_map obs_idx_map obs_mask "
        "obs_pflat obs_pp final_stone final_wood final_house_owner",
    }
    for file, names in cases.items():
        arrays = dict(np.load(DATA / file))
        if file == "auction.npz":  # enough of the 150 scripts
            arrays |= {name: value[:30] for name, value in arrays.items() if name != "trades"}
        np.savez(tmp_path / file, **spoil(arrays, names))
        errors = replay.replay_economy(tmp_path / file, {})
        over = [name for name, (error, tolerance) in errors.items() if not error <= tolerance]
        assert len(over) >= len(names.split()), (file, over)
    for file, path in {
        "tax.json": ("tax_paid", 0),
        "utility.json": ("utility", 1),
        "social.json": ("equality", None),
        "annealing.json": ("mask", 20),
    }.items():
        data = json.loads((DATA / file).read_text())
        name, k = path
        case = data["cases"][0]
        case[name] = [*case[name][:k], case[name][k] + 1e-4, *case[name][k + 1 :]] if k is not None else case[name] + 1
        (tmp_path / file).write_text(json.dumps(data))
        error, tolerance = replay.replay_economy(tmp_path / file, {})[name]
        assert error > tolerance
    folder = tmp_path / "more"
    folder.mkdir()
    arrays = dict(np.load(DATA / "build.npz"))
    np.savez(folder / "good.npz", **arrays)
    assert replay.main(["economy", str(folder)]) == 0
    arrays["inv_1"][0, 0, 0] = np.nan
    np.savez(folder / "nan.npz", **arrays)
    assert replay.replay_economy(folder / "nan.npz", {})["coin"][0] == math.inf
    np.savez(folder / "other.npz", speed=np.zeros(3))
    with pytest.raises(ValueError, match="none of the known formats"):
        replay.replay_economy(folder / "other.npz", {})
    (folder / "cut.json").write_text((DATA / "tax.json").read_text()[:-9])
    assert replay.main(["economy", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 4 files within tolerance"


# ------------------------------------------------------------------------------------------- build, move and collect


def test_building_by_hand():
    """Agents 0 and 1 stand on grass with both goods, 2 lacks wood, 3 stands on a source."""
    env = make()
    goods = [[2, 1], [1, 1], [3, 0], [1, 1]]
    state = start(env, [(5, 0), (5, 1), (5, 2), (0, 0)], goods=goods, payment=[11.0, 12.5, 13.0, 14.0])
    state.tiles[int(state.position[3]), 0] = economy.WOOD_SOURCE  # an empty source
    mask = env.valid_actions(state)[0, :, BUILD].tolist()
    new = play(env, state, [BUILD] * 4)
    assert mask == [True, True, False, False]
    assert new.coin[:, 0].tolist() == [11.0, 12.5, 0.0, 0.0] and new.labor[:, 0].tolist() == [10.0, 10.0, 0.0, 0.0]
    assert new.goods[..., 0].T.tolist() == [[1, 0], [0, 0], [3, 0], [1, 1]]
    assert env._at(new, new.position)[:2, 0].tolist() == [economy.HOUSE, economy.HOUSE + 1]
    assert not env.valid_actions(new)[0, 0, BUILD]  # there is a house now
    assert play(env, new, [BUILD] * 4).coin[0, 0] == 11.0
    # the owner may come back to its house, the neighbour may not enter it
    away = play(env, new, [DOWN, 0, 0, 0])
    assert places(env, play(env, away, [UP, LEFT, 0, 0]))[:2] == [(5, 0), (5, 1)]
    assert env.valid_actions(away)[0, 0, UP] and not env.valid_actions(away)[0, 1, LEFT]


def test_moves_wait_for_their_turn():
    """A queue walks on if the first one acts first; whoever comes first gets a tile that two want."""
    env = make(num_envs=24)
    state = start(env, [(5, 3), (5, 2), (5, 1), (5, 5)])
    noise = torch.ones(env.noise_rows, 24, dtype=env.dtype, device=DEVICE)
    orders = list(itertools.permutations(range(4)))  # [environment][turn] -> agent
    for b, order in enumerate(orders):
        noise[list(order), b] = torch.arange(4.0, dtype=env.dtype, device=DEVICE)
    new = play(env, state, [RIGHT, RIGHT, RIGHT, LEFT], noise=noise)
    for b, order in enumerate(orders):
        taken = {0: (5, 3), 1: (5, 2), 2: (5, 1), 3: (5, 5)}
        for i in order:
            r, c = taken[i]
            goal = (r, c + (1 if i < 3 else -1))
            taken[i] = taken[i] if goal in taken.values() else goal
        assert places(env, new, b) == list(taken.values()), order
        assert new.labor[:, b].tolist() == [float(places(env, state)[i] != taken[i]) for i in range(4)]


def test_blocked_moves_cost_nothing():
    env = make()
    state = start(env, [(0, 0), (3, 4), (8, 8), (8, 7)])
    new = play(env, state, [UP, DOWN, RIGHT, RIGHT])  # out, into water, out, into an agent
    assert places(env, new) == places(env, state)
    assert new.labor[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0]  # the first one stands on wood and collects it
    mask = env.valid_actions(state)[0, :, LEFT:].tolist()
    assert mask == [[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 0], [1, 0, 1, 0]]


def test_collecting_by_hand():
    """Whatever one does, one collects; a second unit comes with luck and costs nothing."""
    env = make(num_envs=2)
    state = start(env, [(0, 0), (0, 2), (2, 1), (6, 1)], bonus=[0.5, 0.0, 0.25, 0.0])
    noise = torch.ones(env.noise_rows, 2, dtype=env.dtype, device=DEVICE)
    noise[4:8] = torch.tensor([[0.49, 0.5], [0.0, 0.9], [0.3, 0.24], [0.0, 0.0]], device=DEVICE)
    new = play(env, state, [0, LEFT, RIGHT, LEFT], noise=noise)  # stays on wood; onto stone; onto stone; onto stone
    assert new.goods[0].T.tolist() == [[0, 1, 1, 1], [0, 1, 2, 1]]
    assert new.goods[1].T.tolist() == [[2, 0, 0, 0], [1, 0, 0, 0]]
    assert new.labor.T.tolist() == [[1, 2, 2, 2]] * 2
    here = env._at(new, new.position)[:, 0].tolist()
    assert here == [economy.WOOD_SOURCE, *[economy.STONE_SOURCE] * 3]
    again = play(env, new, [0, 0, 0, 0])
    assert torch.equal(again.goods, new.goods) and torch.equal(again.labor, new.labor)


def test_sources_refill_with_their_probability():
    """Each on its own, also under an agent, nothing else."""
    B = 4000
    env = make(num_envs=B, regrowth=torch.linspace(0, 0.2, B, dtype=torch.float64), dtype=torch.float32)
    state = start(env, [(0, 0), (0, 2), (0, 3), (1, 3)])
    state.tiles = torch.where(
        (state.tiles == economy.FULL_STONE) | (state.tiles == economy.FULL_WOOD), state.tiles - 1, state.tiles
    )
    state = dataclasses.replace(state, tiles=env.regrow(state, env.draw(generators(0))[8:]))
    units = state.tiles[env.sources]
    full = (units == economy.FULL_STONE) | (units == economy.FULL_WOOD)  # [S, B]
    assert len(env.sources) == 14 and ((units > 0) & (units < 5)).all()
    assert not full[:, 0].any() and not full[:, :40].any(0).float().mean() > 0.1
    assert full[:, B // 2 :].float().mean().item() == pytest.approx(0.15, abs=0.006)
    assert (full[:, B // 2 :].float().mean(1) - 0.15).abs().max() < 0.03  # each source
    pairs = full[:7].float().mean(0) - env.regrowth.float(), full[7:].float().mean(0) - env.regrowth.float()
    assert torch.corrcoef(torch.stack(pairs))[0, 1].abs() < 0.06
    kinds = state.tiles == torch.where(env.start > 4, env.start, state.tiles)
    assert kinds.all()


def test_noise_has_its_distributions():
    """The order of moves is uniform over all orders; draws are uniform."""
    env = make(num_envs=24_000, dtype=torch.float32)
    noise = env.draw(generators(0))
    order = env.ranks(noise[:4])
    counts = torch.bincount((order * torch.tensor([[1], [4], [16], [64]], device=DEVICE)).sum(0))
    counts = counts[counts > 0]
    assert len(counts) == 24 and (counts - 1000).abs().max() < 150
    assert env.ranks(torch.zeros(4, 1, device=DEVICE))[:, 0].tolist() == [0, 1, 2, 3]
    assert noise.shape == (8 + 14, 24_000) and (noise.mean(1) - 0.5).abs().max() < 0.01
    assert 0 <= noise.min() and noise.max() < 1


def test_skills_and_starts():
    env = make("economy_v0", 6000, torch.float32)
    state, _ = env.reset(generators(0))
    rank = (state.payment[:, None] > state.payment).sum(1)
    assert torch.equal(state.payment.sort(0).values, env.payments[:, None].expand(-1, 6000))
    assert (rank.float().mean(1) - 1.5).abs().max() < 0.06
    corners = torch.tensor([[0, 24], [24, 0], [0, 0], [24, 24]], device=DEVICE)[rank]
    assert torch.equal(env._place(state).permute(1, 2, 0), corners.int())
    # min(2, Pareto(3)) / 2: P(bonus <= x) = 1 - (1 + 2 x)^-3 below 1
    for x in (0.1, 0.3, 0.9):
        assert (state.bonus <= x).float().mean().item() == pytest.approx(1 - (1 + 2 * x) ** -3, abs=0.01)
    assert (state.bonus == 1).float().mean().item() == pytest.approx(1 / 27, abs=0.005)
    env = make("economy_v0", 6000, torch.float32, ranked=False, num_agents=5)
    state, _ = env.reset(generators(0))
    for x in (12.0, 20.0, 29.0):  # 10 min(3, 2 Pareto(4) + 1)
        cdf = 1 - (1 + (x / 10 - 1) / 2) ** -4
        assert (state.payment <= x).float().mean().item() == pytest.approx(cdf, abs=0.01)
    assert state.payment.max() == 30 and state.payment.min() >= 10
    tiles = state.position.sort(0).values
    assert (tiles.diff(dim=0) > 0).all()  # nobody shares a tile
    counts = torch.bincount(state.position.flatten().long(), minlength=len(env.start))
    assert (counts[env.land[:, 0]] > 10).all() and not counts[~env.land[:, 0]].any()


# --------------------------------------------------------------------------------------------------------- auction


def test_auction_by_hand():
    """An old bid meets a new ask at the bid's price, a new bid an old ask at the ask's, two new ones at the ask's."""
    env = make()
    state = start(env, [(5, 0), (5, 1), (5, 2), (5, 3)], coin=[20.0, 20.0, 0.0, 5.0], goods=[[0, 0]] * 2 + [[3, 3]] * 2)
    state = play(env, state, [bid(0, 7), 0, 0, 0])
    assert state.coin[:, 0].tolist() == [13, 20, 0, 5] and env.endowment(state)[:, 0].tolist() == [20, 20, 0, 5]
    assert state.labor[:, 0].tolist() == [0.25, 0, 0, 0]
    old_bid = play(env, state, [0, 0, ask(0, 4), 0])
    assert old_bid.coin[:, 0].tolist() == [13, 20, 7, 5] and old_bid.goods[0, :, 0].tolist() == [1, 0, 2, 3]
    assert not old_bid.side.any() and old_bid.history[0, :, 0].nonzero()[:, 0].tolist() == [7]
    state = play(env, state, [0, 0, 0, ask(1, 3)])
    old_ask = play(env, state, [0, bid(1, 9), 0, 0])
    assert old_ask.coin[:, 0].tolist() == [13, 17, 0, 8] and old_ask.goods[1, :, 0].tolist() == [0, 1, 3, 2]
    both_new = play(env, state, [0, bid(0, 9), ask(0, 8), 0])
    assert both_new.coin[:, 0].tolist() == [13, 12, 8, 5] and both_new.goods[0, :, 0].tolist() == [0, 1, 2, 3]
    # two bids for one new ask: the higher one, then the older one, then that of the lower index
    for offers, winner in (((5, 6), 1), ((6, 5), 0), ((6, 6), 0)):
        two = play(env, start(env, [(5, 0), (5, 1), (5, 2), (5, 3)], coin=[9.0] * 4, goods=[[3, 3]] * 4), [0] * 4)
        two = play(env, two, [bid(0, offers[0]), bid(0, offers[1]), ask(0, 2), 0])
        assert two.coin[2, 0] == 9 + 2 and two.goods[0, :2, 0].tolist() == [3 + (winner == 0), 3 + (winner == 1)]
    older = start(env, [(5, 0), (5, 1), (5, 2), (5, 3)], coin=[9.0] * 4, goods=[[3, 3]] * 4)
    older = play(env, older, [0, bid(0, 6), 0, 0], [bid(0, 6), 0, 0, 0], [0, 0, ask(0, 6), 0])
    assert older.goods[0, :, 0].tolist() == [3, 4, 2, 3]
    # nobody trades with himself: the second best ask is taken, or none
    own = start(env, [(5, 0), (5, 1), (5, 2), (5, 3)], coin=[9.0] * 4, goods=[[3, 3]] * 4)
    own = play(env, own, [ask(0, 2), 0, 0, 0], [bid(0, 5), 0, 0, 0])
    assert own.side.count_nonzero() == 2 and own.goods[0, 0, 0] == 2
    own = play(env, own, [0, ask(0, 4), 0, 0])
    assert own.goods[0, :, 0].tolist() == [3, 2, 3, 3] and own.coin[:, 0].tolist() == [4, 14, 9, 9]
    rate = env.market_rate(own)[:, 0].tolist()
    assert rate == [pytest.approx(5.0), 0.0]


def test_orders_last_51_matchings_and_give_back():
    env = make(horizon=200)
    state = start(env, [(5, 0), (5, 1), (5, 2), (5, 3)], coin=[9.0] * 4, goods=[[3, 3]] * 4)
    state = play(env, state, [bid(0, 6), ask(1, 5), 0, 0], *[[0] * 4] * 49)
    assert state.age.max() == 50 and state.coin[0, 0] == 3 and state.goods[1, 1, 0] == 2
    met = play(env, state, [0, 0, ask(0, 6), bid(1, 5)])  # the 51st
    assert met.goods[..., 0].T.tolist() == [[4, 3], [3, 2], [2, 3], [3, 4]]
    gone = play(env, state, [0] * 4)
    assert not gone.side.any() and gone.coin[:, 0].tolist() == [9.0] * 4 and (gone.goods == 3).all()


def test_orders_need_slots_and_means():
    env = make(max_orders=2)
    state = start(env, [(5, 0), (5, 1), (5, 2), (5, 3)], coin=[9.0, 2.5, 0.0, 30.0], goods=[[0, 1]] * 4)
    mask = env.valid_actions(state)[0]
    for i, most in enumerate((9, 2, 0, 10)):
        assert mask[i, 2:13].tolist() == [price <= most for price in range(11)]
    assert not mask[:, 13:24].any() and mask[:, 35:46].all()
    state = play(env, state, [bid(0, 4), bid(0, 3), bid(0, 0), ask(1, 10)])
    assert state.side[0, :, 0, 0].tolist() == [1, 0, 1, 0] and state.coin[:, 0].tolist() == [5, 2.5, 0, 30]
    state = play(env, state, [bid(0, 5), 0, 0, ask(1, 10)])  # the second ask lacks wood
    assert state.coin[0, 0] == 0 and state.side[1, 3, :, 0].tolist() == [2, 0]
    mask = env.valid_actions(state)[0]
    assert not mask[0, 2:24].any() and mask[0, bid(1, 0)] and not mask[0, bid(1, 1)]
    full = play(env, state, [bid(0, 0), 0, 0, 0])
    assert torch.equal(full.side, state.side) and torch.equal(full.labor, state.labor)


# ----------------------------------------------------------------------------------------------------------- taxes


def test_fixed_rates_of_each_environment():
    rates = torch.tensor([[0.1] * 7, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]])
    env = make(num_envs=2, tax="fixed", fixed_rates=rates)
    state, _ = env.reset([torch.Generator(DEVICE).manual_seed(0)])
    torch.testing.assert_close(state.rates.T.cpu(), rates.to(env.dtype))
    wide = economy.repeat_runs(env, 2, 3)  # each of two runs three times
    assert wide.num_envs == 6 and torch.equal(wide.fixed_rates, rates.repeat_interleave(3, 0))
    same = make(num_envs=2)
    assert economy.repeat_runs(same, 2, 3) is same


def test_constants_of_environments_repeat_with_their_runs():
    eta = torch.tensor([0.1, 0.2, 0.3, 0.4])
    wide = economy.repeat_runs(make(num_envs=4, eta=eta), 2, 2)
    torch.testing.assert_close(wide.eta.cpu().float(), torch.tensor([0.1, 0.2, 0.1, 0.2, 0.3, 0.4, 0.3, 0.4]))


def test_random_schedules_are_a_mixture():
    """Uniform for all brackets and for each: the brackets of a schedule go together, and schedules differ."""
    rates = economy.random_schedules((4000, 7), [torch.Generator().manual_seed(k) for k in range(2)])
    assert rates.shape == (2, 4000, 7) and rates.min() >= 0 and rates.max() <= 1
    correlation = torch.corrcoef(rates[0].T)[0, 1]  # of two brackets: a third of the variance (E s^2 = E (1 - s)^2)
    assert abs(correlation - 0.5) < 0.05 and abs(rates.mean() - 0.5) < 0.02
    assert not torch.equal(rates[0], rates[1])


def test_schedules_of_files(tmp_path):
    """What is written is read, from either file; what is no schedule is refused by name."""
    schedules = {5: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 6: [0.0] * 6 + [1.0]}
    economy.write_schedules(tmp_path, make(), schedules)
    for name in ("schedule.csv", "schedule.json"):
        read = economy.read_schedules(tmp_path / name)
        assert {seed: list(rates) for seed, rates in read.items()} == schedules
    bad = {
        "a.json": '{"rates": [1]}',
        "b.json": "[",
        "c.csv": "seed,rate\n1,x\n",
        "d.csv": "seed,tax\n1,0.5\n",
        "e.csv": "seed,rate\n1,1.5\n",
        "f.csv": "",
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            economy.read_schedules(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        economy.read_schedules(tmp_path / "none.csv")


def test_tax_day_by_hand():
    """Brackets from 0, 10, 20 at 10 %, 50 %, 100 %: incomes 5, 14, 25 and -3 owe 0.5, 3, 11 and 0."""
    env = make(tax="fixed", fixed_rates=[0.1, 0.5, 1.0], cutoffs=[0.0, 10.0, 20.0], period=1, horizon=5)
    state = start(env, [(5, 0), (5, 1), (5, 2), (5, 3)], coin=[5.0, 14.0, 25.0, 7.0], last_coin=[0.0, 0.0, 0.0, 10.0])
    state.rates = env.schedule.expand(-1, 1)
    new = play(env, state, [0] * 4)
    share = (0.5 + 3 + 11) / 4
    expected = [5 - 0.5 + share, 14 - 3 + share, 25 - 11 + share, 7 + share]
    assert new.coin[:, 0].tolist() == pytest.approx(expected) and torch.equal(new.coin, new.last_coin)
    assert new.last_income[:, 0].tolist() == [5, 14, 25, -3] and new.last_rate[:, 0].tolist() == [0.1, 0.5, 1.0, 0.0]
    income = torch.tensor([0.0, 9.99, 10.0, 20.0], dtype=env.dtype, device=DEVICE)[
        :, None
    ]  # brackets begin inclusively
    assert env.marginal_rate(state.rates, income)[:, 0].tolist() == [0.1, 0.1, 0.5, 1.0]
    later = play(env, new, [0] * 4)  # what was shared out is nobody's income
    assert not later.last_income.any() and torch.equal(later.coin, new.coin)
    # escrow is income, but cannot be taken
    rich = start(env, [(5, 0), (5, 1), (5, 2), (5, 3)], coin=[3.0, 0.0, 0.0, 0.0], last_coin=[-27.0, 0.0, 0.0, 0.0])
    rich.side[0, 0, 0], rich.price[0, 0, 0], rich.rates = 1, 10, env.schedule.expand(-1, 1)
    new = play(env, rich, [0] * 4)  # income 40: 26 are due, 3 are there
    assert new.last_income[0, 0] == 40 and new.coin[:, 0].tolist() == [0.75] * 4
    assert new.last_coin[:, 0].tolist() == [10.75, 0.75, 0.75, 0.75]


def test_the_planner_sets_rates_where_a_period_starts():
    env = make(period=3, horizon=12)
    state, _ = env.reset(generators(0))
    choice = torch.tensor([[0, 1, 2, 11, 21, 5, 0]], device=DEVICE)
    seen = []
    for t in range(7):
        starts = t % 3 == 0
        mask = env.valid_rates(state)
        assert mask.shape == (1, 7, 22) and mask[..., 0].all() and (mask[..., 1:] == starts).all()
        state = env.advance(state, torch.zeros(1, 4, dtype=torch.int64, device=DEVICE), None, choice + (t > 0))
        seen.append(state.rates[:, 0].tolist())
    first, second = [0, 0, 0.05, 0.5, 1.0, 0.2, 0], [0, 0.05, 0.1, 0.55, 1.0, 0.25, 0.0]  # 22 is no rate: it keeps 1.0
    assert seen == [pytest.approx(first)] * 3 + [pytest.approx(second)] * 4
    exact = torch.tensor([[0.123, 2.0, -1.0, 0.0, 0.3, 0.4, 0.5]], dtype=torch.float64, device=DEVICE)
    state, _ = env.reset(generators(0))
    state = env.advance(state, torch.zeros(1, 4, dtype=torch.int64, device=DEVICE), None, exact)
    assert state.rates[:, 0].tolist() == [0.123, 1.0, 0.0, 0.0, 0.3, 0.4, 0.5]
    for tax, rates in (("free", [0.0] * 7), ("us", list(economy.US_FEDERAL)), ("fixed", [0.5] * 7)):
        other = make(tax=tax, fixed_rates=[0.5] * 7)
        state, _ = other.reset(generators(0))
        assert state.rates[:, 0].tolist() == rates and not other.valid_rates(state)[..., 1:].any()
        new = other.advance(state, torch.zeros(1, 4, dtype=torch.int64, device=DEVICE), None, exact)
        assert torch.equal(new.rates, state.rates)


def test_full_taxes_make_everybody_equal():
    """100 % on all income: after a tax day, who has nothing in open bids has as much as the others."""
    env = make(num_envs=64, tax="fixed", fixed_rates=[1.0] * 7)
    state = midgame(env, 20)
    free = env.escrow(state)[0] == 0
    spread = torch.where(free, state.coin - total_mean(state), 0).abs()
    assert (total_mean(state) > 1).float().mean() > 0.2 and spread.max() < 10 * 4 * 5
    everywhere = free.all(0)
    assert everywhere.any() and (state.coin.amax(0) - state.coin.amin(0))[everywhere].max() < 1e-9
    assert torch.allclose(economy.equality_of(state.coin)[everywhere], torch.ones(1, dtype=env.dtype, device=DEVICE))


def total_mean(state: economy.State) -> torch.Tensor:
    return state.coin.mean(0)


def test_annealing_goes_on_over_episodes():
    env = make(num_envs=2, horizon=2, tax_warmup=-2.0, tax_slope=0.1, labor_constant=3.0, labor_schedule="decay")
    state = None
    for episode in range(4):
        state, _ = env.reset(generators(0), after=state)
        limit = 0.1 * (episode + 2)
        assert env.rate_limit(state).tolist() == pytest.approx([limit] * 2)
        allowed = env.valid_rates(state)[0, 0, 1:].tolist()
        assert allowed == [0.05 * k <= 0.1 * (episode + 2.0) for k in range(21)]
        assert torch.as_tensor(env.labor_weight(state)).tolist() == pytest.approx([1 - math.exp(-episode / 3)] * 2)
        for _ in range(2):
            choice = torch.full((2, 7), 21, device=DEVICE)  # 1.0, not allowed
            state = env.advance(state, torch.zeros(2, 4, dtype=torch.int64, device=DEVICE), None, choice)
            assert not state.rates.any()
    capped, _ = make(tax="us", tax_warmup=-2.0, tax_slope=0.1).reset(generators(0))
    assert capped.rates[:, 0].tolist() == [0.1, 0.12, 0.2, 0.2, 0.2, 0.2, 0.2]


def test_labor_weight_counts_steps_in_which_people_gain():
    env = make(labor_constant=10.0, period=20)
    state = start(env, [(5, 0), (5, 1), (5, 2), (5, 3)], goods=[[1, 1]] * 4)
    gain = play(env, state, [BUILD, 0, 0, 0])
    assert gain.worked.item() == 1 and play(env, gain, [DOWN, 0, 0, 0]).worked.item() == 1
    # the first reward has weight 0, the second the weight after one gain, which also prices the labor before it
    free = ((10.0**0.77 - 1) / 0.77) + 1 / 0.77
    assert (gain.utility - state.utility)[0, 0].item() == pytest.approx(free)
    second = play(env, gain, [DOWN, 0, 0, 0])
    weight = 1 - math.exp(-0.1)
    assert (second.utility - gain.utility)[0, 0].item() == pytest.approx(-weight * 0.21 * 12)  # it finds a stone


def test_utilities_and_welfare_by_hand():
    coin = torch.tensor([[4.0, 0.0], [9.0, 16.0]], dtype=torch.float64, device=DEVICE)  # [N, B]
    labor = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, device=DEVICE)
    env = make(num_envs=2, num_agents=2, eta=torch.tensor([0.5, 0.0]), labor_coef=0.1)
    utility = env.utility(coin, labor, 0.5)
    expected = [[2 * (2 - 1) - 0.05, -1 - 0.1], [2 * (3 - 1) - 0.15, 15 - 0.2]]
    assert utility.tolist() == [pytest.approx(row) for row in expected]
    assert economy.equality_of(coin).tolist() == pytest.approx([1 - 5 / 13, 0.0], abs=1e-9)
    assert env.social_welfare(coin, utility).tolist() == pytest.approx([8 / 13 * 13 / 2, 0.0], abs=1e-9)
    half = dataclasses.replace(env, equality_weight=0.5)
    assert half.social_welfare(coin, utility).tolist() == pytest.approx([(0.5 * 8 / 13 + 0.5) * 6.5, 4.0])
    by_coin = dataclasses.replace(env, objective="inverse_income_coin")
    assert by_coin.social_welfare(coin, utility).tolist() == pytest.approx([2 / (1 / 4 + 1 / 9), 1 / (1 + 1 / 16)])
    by_utility = dataclasses.replace(env, objective="inverse_income_utility")
    u, v = utility[:, 0].tolist()
    assert by_utility.social_welfare(coin, utility)[0].item() == pytest.approx((u / 4 + v / 9) / (1 / 4 + 1 / 9))


# ------------------------------------------------------------------------------------------------------------ Saez


def test_saez_by_hand():
    """Four incomes, bins of width 1 up to 4: 0.5, 0.5, 2.5 and 6; weights 1, 1, 1 / 2.5, 1 / 6; elasticity 0.5."""
    income = torch.tensor([0.5, 0.5, 2.5, 6.0], dtype=torch.float64)
    pairs = torch.stack((income, torch.zeros(4)))[..., None]
    g, a, rates, brackets = economy.saez_schedule(pairs, torch.tensor([0.5]).double(), (0.0, 2.0, 4.0), False, 4)
    weights = [2.0, 0.0, 0.4, 0.0, 1 / 6]
    share = [w / sum(weights) for w in weights]
    people = [0.5, 0.0, 0.25, 0.0, 0.25]
    above = [sum(share[k:]) / sum(people[k:]) for k in range(5)]
    expected_g = [(x + y) / 2 for x, y in zip(above, above[1:])] + [above[4]]
    assert g[:, 0].tolist() == pytest.approx(expected_g, abs=1e-8)
    expected_a = [0.5 * 0.5 / 0.75, math.nan, 2.5 * 0.25 / (0.25 + 0.125), math.nan, 6 / 2]
    assert a[:, 0].tolist() == pytest.approx(expected_a, abs=1e-7, nan_ok=True)
    tau = [(1 - g) / (1 - g + 0.5 * a) for g, a in zip(expected_g, expected_a)]
    tau[1], tau[3] = (tau[0] + tau[2]) / 2, (tau[2] + tau[4]) / 2
    assert rates[:, 0].tolist() == pytest.approx(tau, abs=1e-7)
    assert brackets[:, 0].tolist() == pytest.approx([(tau[0] + tau[1]) / 2, (tau[2] + tau[3]) / 2, tau[4]], abs=1e-7)


def test_incomes_on_the_edges_of_bins():
    """As in numpy.histogram: a bin has its left edge, the last one its right edge, too."""
    edges = np.linspace(0, 510.3, 101)
    income = np.concatenate((edges, np.nextafter(edges, -1.0), np.nextafter(edges, 1e9)))
    pairs = torch.as_tensor(np.stack((income, np.zeros_like(income))))[:, None]
    _, a, _, _ = economy.saez_schedule(pairs, torch.full((303,), 0.5).double(), economy.CUTOFFS)
    counts = np.stack([np.histogram(x, edges)[0] for x in income], 1)
    assert np.array_equal(a[:-1].isfinite(), counts > 0) and np.array_equal(a[-1] > 0, income > 510.3)


def test_elasticity_of_a_power_law():
    """Incomes 7 (1 - rate)^0.8 have elasticity 0.8, of which one estimate takes 2 %."""
    rate = torch.linspace(0, 0.9, 20, dtype=torch.float64)
    pairs = torch.stack((7 * (1 - rate) ** 0.8, rate))[..., None].repeat(1, 1, 4)
    pairs[0, :11, 1] = -5.0  # nine positive incomes are too few
    pairs[1, :, 2] = 0.3  # equal rates tell nothing
    pairs[0, :, 3] = 1 / pairs[0, :, 3]  # a negative elasticity counts as 0
    before = torch.tensor([0.5, 1.0], dtype=torch.float64)[:, None].expand(2, 4)
    new = economy.estimate_elasticity(pairs, before)
    assert new[:, 0].tolist() == pytest.approx([0.02 * 0.8 + 0.98 * 0.5, math.log(7)])
    assert torch.equal(new[:, 1:3], before[:, 1:3])
    assert new[:, 3].tolist() == pytest.approx([0.98 * 0.5, -math.log(7)])


def test_saez_needs_pairs_and_shares_them():
    """Random rates until an environment has `saez_pairs`; after an episode, a block's environments share theirs."""
    env = make(num_envs=6, tax="saez", period=5, horizon=20, saez_pairs=48)
    streams = generators(0, 1)
    state, _ = env.reset(streams)
    rates = []
    for t in range(20):
        state = env.advance(state, random_play(env, state, t), env.draw(streams))
        rates.append(state.rates)
    assert (state.pairs[1, 16:] < 0).all() and (state.pairs[1, :16] >= 0).all()
    assert torch.equal(state.pairs[:, :4], torch.stack((state.last_income, state.last_rate)))
    assert all(torch.equal(a, b) == (t % 5 != 4) for t, (a, b) in enumerate(zip(rates, rates[1:])))
    assert 0.3 < torch.stack(rates[::5]).mean() < 0.7 and torch.unique(rates[0]).numel() == 42
    new, _ = env.reset(streams, after=state)
    for b in range(6):
        block = slice(3 * (b // 3), 3 * (b // 3) + 3)
        mine = sorted(state.pairs[..., :16, block].flatten(1).T.tolist())
        assert sorted(new.pairs[..., b].T.tolist()) == mine  # 3 x 16
    assert set(map(tuple, new.pairs[:, :12, 0].T.tolist())) == set(
        map(tuple, state.pairs[:, :4, :3].flatten(1).T.tolist())
    )
    new = env.advance(new, torch.zeros(6, 4, dtype=torch.int64, device=DEVICE), env.draw(streams))
    assert torch.equal(new.rates[:, 0], new.rates[:, 2]) and not torch.equal(new.rates[:, 0], new.rates[:, 3])
    expected = economy.estimate_elasticity(new.pairs, torch.full((2, 6), 0.5, dtype=env.dtype, device=DEVICE))
    torch.testing.assert_close(new.elasticity, expected)


# ------------------------------------------------------------------------------------------------- the whole game


@pytest.mark.slow
@pytest.mark.parametrize("env_id, tax", [("economy_v0", "planner"), ("economy_tiny_v0", "us")])
def test_nothing_appears_or_vanishes(env_id, tax):
    """1,000 steps: coin comes from houses only, units from sources only, taxes sum to what is shared out."""
    env = make(env_id, 6, horizon=1000, tax=tax, start_coin=3.0, num_agents=4)
    streams = generators(0)
    state, _ = env.reset(streams)
    wealth = economy.total(env.endowment(state))
    held = units_of(env, state)
    built = taxed = traded = grown = 0
    for t in range(1000):
        rates = torch.randint(22, (6, 7), generator=streams[0]).to(DEVICE)
        action, noise = random_play(env, state, t, 0.5), env.draw(streams)
        new = env.advance(state, action, noise, rates)
        houses = new.tiles.int() - torch.where(state.tiles >= economy.HOUSE, state.tiles, 0).int()
        houses = torch.stack([(houses == economy.HOUSE + i).sum(0) for i in range(4)])  # [N, B]
        wealth = wealth + economy.total(houses * state.payment)
        torch.testing.assert_close(economy.total(env.endowment(new)), wealth)
        full = (state.tiles[env.sources] == economy.FULL_STONE) | (state.tiles[env.sources] == economy.FULL_WOOD)
        there = env.sources[:, None, None] == new.position  # [S, N, B]
        second = (there & full[:, None] & (noise[4:8] < state.bonus)).sum(1)
        refilled = (~full | there.any(1)) & (noise[8:] < env.regrowth)
        gain = torch.stack([x.sum(0) for x in (second + refilled).split((env.num_stones, len(full) - env.num_stones))])
        now = units_of(env, new)
        assert torch.equal(now, held - houses.sum(0) + gain)
        assert (new.coin >= 0).all() and (new.goods >= 0).all()
        built, grown, held = built + houses.sum(), grown + refilled.sum(), now
        traded = traded + (new.history.sum((0, 1)) - env.history_decay * state.history.sum((0, 1))).sum()
        taxed = taxed + ((new.t % env.period == 0) & (new.last_income > 0)).sum()
        assert len(set(places(env, new, 3))) == 4
        state = new
    assert built > 100 and taxed > 50 and traded > 100 and grown > 100


def units_of(env: economy.Economy, state: economy.State) -> torch.Tensor:
    """[R, B] units on the map, in inventories and in open asks."""
    on_map = [(state.tiles == kind).sum(0) for kind in (economy.FULL_STONE, economy.FULL_WOOD)]
    return torch.stack(on_map) + state.goods.sum(1) + env.escrow(state)[1].sum(1)


def test_masks_allow_exactly_what_does_something():
    """Agent by agent and action by action, with the others at rest, in states full of houses and orders."""
    env = make(num_envs=48, layout=("w.s", "..~", "s.w", "..."), window=1, max_orders=2, horizon=500)
    state = midgame(env, 70)
    mask, rest = env.valid_actions(state), torch.zeros(48, 4, dtype=torch.int64, device=DEVICE)
    idle = env.advance(state, rest)
    assert (state.tiles >= economy.HOUSE).sum() > 100 and state.side.any((0, 1, 2)).float().mean() > 0.5
    names = ("tiles", "position", "coin", "goods", "labor", "side", "price")
    for i, action in itertools.product(range(4), range(1, 50)):
        acts = rest.clone()
        acts[:, i] = action
        new = env.advance(state, acts)
        changed = torch.zeros(48, dtype=torch.bool, device=DEVICE)
        for name in names:
            changed |= (getattr(new, name) != getattr(idle, name)).flatten(0, -2).any(0)
        assert torch.equal(changed, mask[:, i, action]), (i, action)
    assert mask[..., 0].all() and 0.02 < mask[..., 1].float().mean() < 0.9
    moves = mask[..., LEFT:].float().mean()
    assert 0.1 < moves < 0.9


def test_observations_by_hand():
    env = make()
    state = start(env, [(1, 2), (3, 2), (8, 8), (0, 0)], coin=[50.0, 0.0, 0.0, 0.0], goods=[[1, 2]] * 4)
    tile = int(replay.tile_of(env, (1, 3)))
    state.tiles[tile], state.tiles[tile - 1 - env.stride] = economy.HOUSE + 1, economy.HOUSE
    state.tiles[int(replay.tile_of(env, (2, 2)))] = economy.STONE_SOURCE
    state = play(env, state, [0, 0, ask(0, 4), bid(1, 0)])
    obs = env.observe(state)[0]
    P, b, N = 11, 7, 4
    flat = 14 + 10 * P + b + N
    assert obs.shape == (4, env.obs_sizes[0]) and env.obs_sizes == (flat + 2 + 9 + 6 + 125,) * 4
    original = env.original_obs(state)["flat"][0]
    original = torch.cat((original[:, :1], original[:, 2:]), 1)
    scale = torch.ones(flat, dtype=env.dtype, device=DEVICE)
    scale[1 + 4 * P : 3 + 4 * P], scale[3 + 8 * P : 3 + 10 * P], scale[-4:-2] = 0.1, 10.0, 10.0
    torch.testing.assert_close(obs[:, :flat], original * scale, rtol=1e-6, atol=1e-7)
    assert obs[0, 1 + 4] == 1 and obs[2, 1 + 4] == 0  # somebody else's ask of stone at 4
    income, owed, others, nearest, window = obs[0, flat:].split((1, 1, 9, 6, 125))
    assert income.item() == pytest.approx(2.5) and owed.item() == 0
    taxed = dataclasses.replace(state, rates=state.rates + 0.5)  # a quarter of the tax comes back
    assert env.observe(taxed)[0, :, flat + 1].tolist() == pytest.approx([0.75 * 25 / 20] + [-0.25 * 25 / 20] * 3)
    # agents 1, 2 and 3 from (1, 2): (2, 0), out of sight, (-1, -2)
    assert others.tolist() == pytest.approx([2 / 4, 0, 1, 0, 0, 0, -1 / 4, -2 / 4, 1])
    # stone at (0, 1), (1, 0) at distance 2, wood at (1, 1)
    assert nearest.tolist() == pytest.approx([-1 / 4, -1 / 4, 1, 0, -1 / 4, 1])
    assert not obs[2, flat + 11 : flat + 17].any()  # all too far, some in their columns only
    stone, wood, source, house, blocked = window.view(5, 5, 5).tolist()
    assert (stone[1][1], stone[2][0], wood[2][1], sum(map(sum, stone))) == (1, 1, 1, 2)
    assert source[3][2] == 1 and sum(map(sum, source)) == 2  # (2, 2), and (0, 0), which agent 3 has emptied
    assert house[1][2] == house[2][3] == 1 and sum(map(sum, house)) == 2
    assert blocked[2][3] == 1 and blocked[1][2] == 0 and blocked[1][4] == blocked[2][4] == 1  # water at (0, 4), (1, 4)
    assert blocked[0] == [1.0] * 5 and sum(map(sum, blocked)) == 5 + 3
    planner = env.planner_obs(state)[0]
    assert planner.shape == (env.planner_obs_size,) == (6 * P + b + N + 6 + 24,)
    assert planner[4] == 1 and planner[3 * P] == 1  # an ask of stone at 4, a bid for wood at 0
    per_agent = planner[-24:].view(4, 6)
    assert per_agent[:, 3].tolist() == [0.5, 0, 0, 0] and per_agent[0, 4:].tolist() == pytest.approx([0.1, 0.2])
    assert torch.equal(env.global_state(state)[0], torch.cat((obs.flatten(), planner)))


def test_step_agrees_with_its_parts():
    env = make(num_envs=5)
    state = midgame(env, 37)
    action, noise = random_play(env, state, 1), env.draw(generators(3))
    new, obs, reward, terminated, truncated, info = env.step(state, action, noise)
    other = env.advance(state, action, noise)
    assert all(torch.equal(a, b) for a, b in zip(vars(new).values(), vars(other).values()))
    assert torch.equal(obs, env.observe(new)) and torch.equal(info["valid_actions"], env.valid_actions(new))
    assert obs.is_contiguous() and obs.shape == (5, 4, env.obs_sizes[0])
    utility = env.utility(env.endowment(new), new.labor, 1.0)
    torch.testing.assert_close(reward, (utility - state.utility).T)
    torch.testing.assert_close(info["productivity"], env.endowment(new).sum(0))
    welfare = info["equality"] * info["productivity"] / 4
    torch.testing.assert_close(info["planner_reward"], welfare - state.welfare)
    assert not terminated.any() and not truncated.any() and info["valid_actions"].shape == (5, 4, 50)


def test_horizon_and_tasks():
    big, tiny = make("economy_v0"), make()
    assert (big.size, big.horizon, big.period, len(big.sources)) == ((25, 25), 1000, 100, 40)
    assert (tiny.size, tiny.horizon, tiny.period, tiny.num_stones) == ((9, 9), 100, 20, 7)
    assert tiny.cutoffs == pytest.approx([c / 5 for c in big.cutoffs])
    env = make(num_envs=2, horizon=3)
    state, _ = env.reset(generators(0))
    ends = []
    for _ in range(3):
        state, _, _, terminated, truncated, _ = env.step(state, torch.zeros(2, 4, dtype=torch.int64, device=DEVICE))
        ends.append(truncated.tolist())
        assert not terminated.any()
    assert ends == [[False, False], [False, False], [True, True]] and state.t.tolist() == [3, 3]


@pytest.mark.parametrize("num_agents", [2, 3, 7])
def test_any_number_of_agents(num_agents):
    env = make(num_envs=3, num_agents=num_agents)
    streams = generators(0)
    state, obs = env.reset(streams)
    for t in range(40):
        state, obs, reward, *_, info = env.step(state, random_play(env, state, t), env.draw(streams))
    assert reward.shape == (3, num_agents) and obs.shape == (3, num_agents, env.obs_sizes[0]) and obs.isfinite().all()
    assert env.original_obs(state)["flat"].shape == (3, num_agents, 15 + 110 + 7 + num_agents)
    assert (state.coin >= 0).all() and state.labor.min() > 0
    assert len(set(state.position[:, 0].tolist())) == num_agents


# -------------------------------------------------------------------------------------------- interface and numerics

CHANGES = {"eta": 0.31, "labor_coef": 0.4, "build_labor": 5.0, "move_labor": 2.0, "collect_labor": 3.0}
CHANGES |= {"order_labor": 1.0, "regrowth": 0.5, "payment_scale": 2.0, "bonus_scale": 3.0}


@pytest.mark.parametrize("field", CHANGES)
def test_a_value_per_environment_equals_numbers(field):
    """Half of a batch with the usual value, half with another one; each half is what it would be alone."""
    usual, results = float(getattr(make(), field)), []
    for value in (torch.tensor([usual] * 6 + [CHANGES[field]] * 6, dtype=torch.float64), usual, CHANGES[field]):
        env = make(num_envs=12, **{field: value})
        streams, scripted = generators(3), make(num_envs=12)
        state, _ = env.reset(streams)
        mirror, total = state, 0.0
        for t in range(30):
            noise, action = env.draw(streams), random_play(scripted, mirror, t)
            mirror = scripted.advance(mirror, action, noise)  # the same actions in all three
            new, obs, reward, *_ = env.step(state, action, noise)
            state, total = new, total + reward
        results.append((obs, total))
    both, first, second = results
    assert max((x - y).abs().max() for x, y in zip(first, second)) > 1e-3
    for index, alone in ((slice(0, 6), first), (slice(6, 12), second)):
        for ours, expected in zip(both, alone):
            torch.testing.assert_close(ours[index], expected[index], rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"tax": "saez", "saez_pairs": 12}, {"num_agents": 5, "labor_constant": 9.0}])
def test_results_do_not_depend_on_the_size_of_the_batch(fields):
    """Bit by bit on a CPU, in float32."""
    n = 37
    big = make(num_envs=n, dtype=torch.float32, **fields)
    state = midgame(big, 45)
    for t in range(20):
        action, noise = random_play(big, state, t), big.draw(generators(t))
        result = big.step(state, action, noise)
        for index in (slice(0, 1), slice(5, 21), slice(36, 37)) if t % 5 == 4 or t > 17 else ():
            small = dataclasses.replace(big, num_envs=index.stop - index.start)
            part = economy.State(**{name: value[..., index] for name, value in vars(state).items()})
            alone = small.step(part, action[index], noise[..., index])
            for name, value in vars(alone[0]).items():
                assert alike(value, getattr(result[0], name)[..., index]), name
            assert alike(alone[1], result[1][index]) and alike(alone[2], result[2][index])
        state = result[0]


def test_seeds_are_independent():
    env = make("economy_v0", 12, torch.float32)
    together = generators(5, 6, 7)
    state, obs = env.reset(together)
    noise = env.draw(together)
    for k, seed in enumerate((5, 6, 7)):
        block, alone = slice(4 * k, 4 * k + 4), generators(seed)
        part = dataclasses.replace(env, num_envs=4)
        one, one_obs = part.reset(alone)
        assert torch.equal(one_obs, obs[block]) and torch.equal(part.draw(alone), noise[:, block])
        for name, value in vars(one).items():
            assert torch.equal(value, getattr(state, name)[..., block]), name
    assert len(torch.unique(state.bonus[0])) == 12
    with pytest.raises(ValueError, match="multiple of the 5 generators"):
        env.reset(generators(*range(5)))


KINDS = [{}, {"tax": "saez", "saez_pairs": 8}, {"tax": "us", "tax_warmup": -100.0, "labor_constant": 100.0}]
KINDS += [{"objective": "inverse_income_utility", "eta": torch.tensor([0.1, 0.2, 0.3, 0.4])}]


@pytest.mark.slow
@pytest.mark.parametrize("fields", KINDS)
def test_step_is_pure_and_compiles(fields):
    env = make(num_envs=4, dtype=torch.float32, **fields)
    state = midgame(env, 40)
    action, noise, rates = random_play(env, state, 0), env.draw(generators(1)), torch.ones(4, 7, dtype=torch.int64)
    before = [value.clone() for value in (*vars(state).values(), action, noise)]
    torch.compiler.reset()
    graph = torch.compile(env.step, fullgraph=True, backend="eager")
    compiled = graph(state, action, noise, rates.to(DEVICE))
    for ours, expected in zip(everything(compiled), everything(env.step(state, action, noise, rates.to(DEVICE)))):
        assert torch.equal(ours, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, (*vars(state).values(), action, noise)))
    with torch.compiler.set_stance("fail_on_recompile"):
        graph(compiled[0], action, noise, rates.to(DEVICE))
        first, _ = env.reset(generators(0))
        second, *_ = graph(first, action, noise, rates.to(DEVICE))
        graph(env.reset(generators(0), after=second)[0], action, noise, rates.to(DEVICE))


@pytest.mark.slow
def test_compiled_code_agrees():
    """Each goes on from its own state: one's utility rounded by the other may look like a reward above zero."""
    env = make(num_envs=16, num_agents=2, max_orders=2, period=4)
    torch.compiler.reset()
    compiled = torch.compile(env.step, fullgraph=True)
    eager_state = compiled_state = midgame(env, 18)
    for t in range(7):
        action, noise = random_play(env, eager_state, t), env.draw(generators(t))
        rates = torch.full((16, 7), t + 2, device=DEVICE)
        expected = env.step(eager_state, action, noise, rates)
        with torch.compiler.set_stance("default" if t == 0 else "fail_on_recompile"):
            result = compiled(compiled_state, action, noise, rates)
        eager_state, compiled_state = expected[0], result[0]
        if t == 0:
            compiled_state.worked.copy_(eager_state.worked)
        for ours, theirs in zip(everything(result), everything(expected)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_compiled_saez_rates_agree():
    env = make(num_envs=16, tax="saez", saez_pairs=24, period=5)
    torch.compiler.reset()
    compiled = torch.compile(env.set_rates, fullgraph=True)
    state, uniform = midgame(env, 35), torch.rand(7, 16, dtype=env.dtype, device=DEVICE)
    ours, expected = compiled(state, None, uniform), env.set_rates(state, None, uniform)
    assert not torch.equal(expected.rates, state.rates) and (state.pairs[1] >= 0).all()
    torch.testing.assert_close(ours.rates, expected.rates, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.elasticity, expected.elasticity)


def test_single_precision_is_near_double():
    """The same actions and draws for 200 steps: integers are equal, coin and rewards near."""
    double, single = make(num_envs=16, horizon=200), make(num_envs=16, horizon=200, dtype=torch.float32)
    streams = generators(0)
    state, _ = double.reset(streams)
    rough = economy.State(**{k: v.float() if v.is_floating_point() else v for k, v in vars(state).items()})
    for t in range(200):
        noise = double.draw(streams).float()
        action = random_play(double, state, t)
        rates = torch.full((16, 7), 1 + t // 20, device=DEVICE)
        state, obs, reward, *_, info = double.step(state, action, noise.double(), rates)
        rough, rough_obs, rough_reward, *_, rough_info = single.step(rough, action, noise, rates)
        for name, value in vars(state).items():
            other = getattr(rough, name)
            if name == "last_rate":  # jumps where an income is a cut-off, such as 0
                value = torch.where((state.last_income[None] - double.lower).abs().amin(0) < 1e-3, other, value)
            if value.is_floating_point() and value.numel():
                assert other.dtype == torch.float32 and (other - value).abs().max() < 1e-3, name
            else:
                assert torch.equal(other, value), name
        assert rough_obs.dtype == rough_reward.dtype == torch.float32
        assert (rough_reward - reward).abs().max() < 1e-3
    assert 0 < (rough.coin - state.coin).abs().max() and info["productivity"].mean() > 30
    assert torch.equal(info["valid_actions"], rough_info["valid_actions"])
    marginal = 14 + 110 + 7 + 4 - 8  # jumps where an income meets a cut-off
    difference = (rough_obs - obs).abs()
    difference[..., marginal] = 0
    assert difference.max() < 1e-4


def test_interface():
    env = make(num_envs=3)
    assert env.agents == ("agent_0", "agent_1", "agent_2", "agent_3") and env.action_sizes == (50,) * 4 and env.discrete
    assert env.obs_mask.shape == (4, env.obs_sizes[0]) and env.action_mask.shape == (4, 50) and env.cooperators.all()
    state, obs = env.reset(generators(0))
    noisy = perturb.observation_noise(env, obs.float(), "gaussian", 0.1, generators(1))
    assert noisy.shape == obs.shape and perturb.random_actions(env, generators(1)).shape == (3, 4)
    parallel_api_test(zoo.to_parallel_env(make(dtype=torch.float32, tax="us")), num_cycles=20)


def test_pictures_show_what_moves():
    env = make("economy_v0", 2)
    state = midgame(env, 150)
    pictures = [env.render(state, 1, size=200), env.render(env.reset(generators(0))[0], 1, size=200)]
    for picture in pictures:
        assert picture.shape[1:] == (200, 3) and picture.dtype == np.uint8 and 230 < picture.shape[0] < 280
        for colour in economy.COLOURS[:4]:
            rgb = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
            assert (np.abs(picture[:200].astype(int) - rgb).max(-1) < 40).sum() > 15  # each agent is in view
    assert (pictures[0] != pictures[1]).any(-1).sum() > 500


@pytest.mark.parametrize(
    "options, message",
    [
        ({"env_id": "economy_v9"}, "env_id must be one of .*economy_v0, economy_tiny_v0.*, got 'economy_v9'"),
        ({"num_envs": 0}, "num_envs must be 1 or more, got 0"),
        ({"num_agents": 1}, "num_agents must be 2 or more, got 1"),
        ({"num_agents": 121}, "num_agents must be 120 or less, got 121"),
        ({"num_agents": 80}, "num_agents must be no more than the tiles without water, got 80"),
        ({"horizon": 0}, "horizon must be 1 or more, got 0"),
        ({"period": 0}, "period must be 1 or more, got 0"),
        ({"max_price": 127}, "max_price must be 126 or less, got 127"),
        ({"order_duration": 127}, "order_duration must be 126 or less, got 127"),
        ({"layout": ("s.", "w")}, "layout must be equally long rows of . ~ s w with an s and a w, got"),
        ({"layout": ("s.", "wx")}, "layout must be equally long rows"),
        ({"layout": ("s.", "..")}, "layout must be .* with an s and a w"),
        ({"regrowth": 1.5}, "regrowth must be between 0 and 1, got 1.5"),
        ({"eta": 1.0}, "eta must be between 0 and 0.999, got 1.0"),
        ({"eta": torch.tensor([0.2, float("nan")])}, "eta must be between 0 and 0.999"),
        ({"eta": torch.zeros(3)}, "eta must be a number or .num_envs = 2., got .3."),
        ({"labor_coef": -0.1}, "labor_coef must be 0 or more, got -0.1"),
        ({"labor_constant": float("nan")}, "labor_constant must be 0 or more, got nan"),
        ({"labor_schedule": "linear"}, "labor_schedule must be auto or decay, got 'linear'"),
        ({"tax": "flat"}, "tax must be one of planner, free, us, fixed, saez, got 'flat'"),
        ({"tax": "us", "cutoffs": (0.0, 1.0)}, "cutoffs must be 7 for the US rates"),
        ({"cutoffs": (1.0, 2.0)}, "cutoffs must be two or more, rising from 0, got"),
        ({"cutoffs": (0.0, 2.0, 2.0)}, "cutoffs must be two or more, rising from 0, got"),
        ({"tax": "fixed", "fixed_rates": (0.5,)}, "fixed_rates must be 7 numbers between 0 and 1, got"),
        ({"tax": "fixed", "fixed_rates": (1.5,) * 7}, "fixed_rates must be 7 numbers between 0 and 1, got"),
        ({"rate_step": 0.0}, "rate_step must be above 0, at most 1, got 0.0"),
        ({"tax_warmup": float("inf")}, "tax_warmup must be None or finite, got inf"),
        ({"saez_elasticity": -1.0}, "saez_elasticity must be None or 0 or more, got -1.0"),
        ({"objective": "coin"}, "objective must be one of equality_productivity, .*, got 'coin'"),
        ({"equality_weight": 2.0}, "equality_weight must be between 0 and 1, got 2.0"),
        ({"window": 0}, "window must be 1 or more, got 0"),
        ({"sight": 101}, "sight must be 100 or less, got 101"),
        ({"coins": 2}, "fields of economy_tiny_v0 are layout, .*eta.*, got 'coins'"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(**{"env_id": "economy_tiny_v0", "num_envs": 2, **options})
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_speed_and_gif_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(economy.SMALL, "horizon", 8)
    monkeypatch.setitem(economy.TASKS, "economy_tiny_v0", economy.SMALL)
    path = tmp_path / "economy.gif"
    economy.main("economy_tiny_v0", 4, seconds=0.01, threads=torch.get_num_threads(), gif=str(path))
    out = capsys.readouterr().out
    assert "env steps/s" in out and "bytes of state" in out and path.read_bytes().startswith(b"GIF")
