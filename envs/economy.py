"""The gather-trade-build economy of the AI Economist, batched: optimal taxation as in ERMAS (Zhao et al. 2021).

    env = make("economy_v0", num_envs=1024)                             # 25 x 25 tiles, four agents, 1,000 steps
    state, obs = env.reset([torch.Generator().manual_seed(0)])          # obs [B, N, O]
    mask = env.valid_actions(state)                                     # [B, N, A]; later info["valid_actions"]
    env.planner_obs(state), env.valid_rates(state)                      # [B, G], [B, brackets, 1 + rates]
    state, obs, reward, terminated, truncated, info = env.step(state, action, env.draw(generators), planner_action)

Mobile agents gather wood and stone, trade them for coin and build houses for coin; a planner sets marginal tax rates of
income brackets for each tax period, and all share the revenue. Rules and constants are those of ai-economist 1.7.1
(github.com/salesforce/ai-economist; Zheng et al. 2020), whose recorded episodes are reproduced exactly in float64. A
step is Build, ContinuousDoubleAuction, Gather, PeriodicBracketTax, regrowth.

Tasks: `economy_v0`, the four-agent Open-Quadrant game, and `economy_tiny_v0` for two CPU cores: 9 x 9 tiles with the
same four quadrants, 100 steps in five tax periods of 20, brackets narrower in proportion, regrowth three times faster.

The planner sees `planner_obs`; its reward is info["planner_reward"] [B]. planner_action [B, brackets] chooses rates: 0
keeps one, k sets it to (k - 1) * rate_step, in the first step of each period, and is ignored in others. None keeps all
(0 at first); a floating-point tensor has the rates themselves. `tax` replaces the planner: "free" (no taxes), "us"
(federal rates), "fixed" (`fixed_rates`), "saez" (Saez's formula).

Annealing is set by fields and counted in the state, per environment: `env.reset(generators, after=state)` begins the
episode after the one that ended in `state`. With k times the environments that a schedule was meant for, the same
experience takes 1 / k of the episodes: multiply `tax_slope` by k, divide `tax_warmup` and `labor_constant` by it.

Speed, and a GIF of a random policy: python -m envs.economy --env-id economy_tiny_v0 --compile --gif economy.gif

Axes: B environments, N agents, R = 2 resources (stone, wood), T tiles, S sources, K order slots, P price levels, A = 6
+ 4 P actions, O observation entries, M income pairs. Tensors inside are batch-last; the interface is batch-first.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from envs import print_speed

STONE, WOOD = 0, 1
GRASS, STONE_SOURCE, FULL_STONE, WOOD_SOURCE, FULL_WOOD, WATER, OUTSIDE, HOUSE = range(8)  # HOUSE + i: agent i's house
BID, ASK, AGE_BITS, AGENT_BITS = 1, 2, 7, 7  # sides of an order (0: an empty slot), parts of its priority
FAR = 1 << 28  # more than the key of any way
OPEN_QUADRANT = """
wwwww..w....~.w.......... ww.w........~.w......w.ww .w..........~.........w.w sw.s.s......~............
............~...w......w. .ss...................... .s....................... .........................
......................... s......s....~............ ............~............ ............~............
~~~~~....~~~~~~~....~~~~~ .s..........~............ s.s.........~............ ...s........~............
ss....................... .ss...................... ss....................... ..s......................
............~............ ............~............ ............~............ ............~............
s...........~............
""".split()  # row by row, "s" stone, "w" wood, "~" water
TINY = "ws..~..ww sw..~...w ..s...w.. ...w..... ~~.~~~.~~ ......... s.s...... s...~.... s...~....".split()
CUTOFFS = (0.0, 9.7, 39.475, 84.2, 160.725, 204.1, 510.3)  # coin
US_FEDERAL = (0.1, 0.12, 0.22, 0.24, 0.32, 0.35, 0.37)
RANKED_PAYMENT = (11.331640623590097, 13.267112338979295, 16.472372947006132, 22.249614304395735)
TAXES = ("planner", "free", "us", "fixed", "saez")
OBJECTIVES = ("equality_productivity", "inverse_income_coin", "inverse_income_utility")
PER_ENV = "eta labor_coef build_labor move_labor collect_labor order_labor regrowth payment_scale bonus_scale".split()
MOST = {"num_agents": 2**AGENT_BITS - HOUSE - 1, "max_price": 126, "order_duration": 126, "sight": 100}
GROUND = ("#f0f0e6", "#d4d4d4", "#7d7d82", "#d0e0bc", "#5f8c3c", "#82afd7", "#f0f0e6", "#f0f0e6")  # by contents
COLOURS = ("#c85046", "#426ebe", "#eb9628", "#965aaa", "#5aaab4", "#785a3c")  # of agents and their houses


@dataclasses.dataclass
class State:
    tiles: Tensor  # [T, B] int8 contents, row by row, with a border of `window` tiles
    position: Tensor  # [N, B] int32 tile
    coin: Tensor  # [N, B] in the inventory; what open bids set aside comes on top
    goods: Tensor  # [R, N, B] int32 in the inventory; what open asks set aside comes on top
    labor: Tensor  # [N, B] of this episode
    side: Tensor  # [R, N, K, B] int8 of open orders
    price: Tensor  # [R, N, K, B] int8
    age: Tensor  # [R, N, K, B] int8, steps since the order was placed
    history: Tensor  # [R, P, B] trades at each price, fading
    rates: Tensor  # [brackets, B] marginal tax rates in force
    last_coin: Tensor  # [N, B] coin endowment after the last tax day
    last_income: Tensor  # [N, B] of the period before
    last_rate: Tensor  # [N, B] marginal rate at that income
    payment: Tensor  # [N, B] coin for a house
    bonus: Tensor  # [N, B] probability of a second unit
    utility: Tensor  # [N, B]
    welfare: Tensor  # [B] the planner's objective
    worked: Tensor  # [B] int64, steps in which the mean reward was positive, over all episodes
    completions: Tensor  # [B] int64, episodes before this one
    pairs: Tensor  # [2, M, B] incomes and marginal rates (below 0: none yet), newest first (Saez; else M = 0)
    elasticity: Tensor  # [2, B] of income, and the intercept of its regression (Saez)
    t: Tensor  # [B] int64, steps since reset


def total(values: Tensor, dim: int = 0) -> Tensor:
    """Sum in float64, so that rounding does not depend on the size of the batch."""
    return values.sum(dim, dtype=torch.float64).to(values.dtype)


def equality_of(coin: Tensor) -> Tensor:
    """[B] one minus the normalised Gini index of coin [N, B]; from 30 agents on approximately, as in the original."""
    n = len(coin)
    if n < 30:
        return 1 - total((coin[:, None] - coin).abs().flatten(0, 1)) / (2 * n * total(coin) + 1e-10) * n / (n - 1)
    weight = torch.arange(n, 0, -1, dtype=coin.dtype, device=coin.device)[:, None]
    return 2 / (n + 1) * total(weight * coin.sort(0).values) / (total(coin) + 1e-10)


def estimate_elasticity(pairs: Tensor, before: Tensor) -> Tensor:
    """[2, B] elasticity of income and intercept: from pairs [2, M, B] (incomes, marginal rates) by regression of log
    income on log(1 - rate), smoothed; as before where few incomes are positive or rates do not differ."""
    income, rate = pairs
    used = (income > 0) & (rate >= 0) & (rate < 1)
    count = used.sum(0)

    def mean(values):
        return total(torch.where(used, values, 0)) / count.clamp_min(1)

    x, y = torch.log((1 - rate).clamp_min(1e-9)), torch.log(income.clamp_min(1e-9))
    mx, my = mean(x), mean(y)
    variance = mean((x - mx) ** 2)
    slope = mean((x - mx) * (y - my)) / torch.where(variance > 0, variance, 1)
    new = torch.stack((0.02 * slope.relu() + 0.98 * before[0], my - slope * mx))
    return torch.where((count >= 10) & (mean((rate - mean(rate)) ** 2) >= 1e-12), new, before)


def saez_schedule(pairs: Tensor, elasticity: Tensor, cutoffs: Sequence[float], uniform=False, bins=100) -> list[Tensor]:
    """Social weights g, Pareto parameters a and marginal rates (1 - g) / (1 - g + a elasticity) [bins + 1, B] each, of
    `bins` equal bins up to the last cut-off and an open one, and mean rates [brackets, B], from pairs [2, M, B]: Saez
    2001 as ai-economist discretises it, with social weights 1 / income or 1 (uniform)."""
    top, income, valid, dtype, device = cutoffs[-1], pairs[0], pairs[1] >= 0, pairs.dtype, pairs.device
    edges, width = torch.arange(bins + 1, dtype=dtype, device=device) * (top / bins), top / bins
    middle = 0.5 * (edges[:-1] + edges[1:])[:, None]
    place = (income / width).floor()  # torch.searchsorted is slow in compiled code
    place = place + (income >= (place + 1) * width).to(dtype) - (income < place * width).to(dtype)
    place = torch.where(income > top, bins + 1, (place + 1).clamp(0, bins)).long()  # 0: below 0
    counts = torch.zeros(bins + 2, income.shape[1], dtype=torch.int32, device=device)
    counts = counts.scatter_add(0, place, valid.int()).to(dtype)
    above, weigh = valid & (place == bins + 1), (torch.ones_like if uniform else lambda z: 1 / z.clamp_min(1))
    weight = torch.cat((counts[1:-1] * weigh(middle), total(torch.where(above, weigh(income), 0))[None]))
    share = weight / (total(weight) + counts[0] + 1e-9)  # incomes below 0 weigh 1
    density = counts[1:] / counts.sum(0)
    # sums of what is at least z, in order: torch.cumsum is not deterministic on GPUs, and near 0 / 0 the order matters
    sums = torch.stack(list(itertools.accumulate(torch.stack((share, density), 1).flip(0).unbind()))).flip(0)
    g = sums[:, 0] / (sums[:, 1] + 1e-9)
    g = torch.cat((0.5 * (g[:-1] + g[1:]), g[-1:]))
    a = middle * density[:-1] / ((sums[1:, 1] + 0.5 * density[:-1]).clamp(0, 1) + 1e-9) / width
    rich = total(torch.where(above, income, 0)) / counts[-1].clamp_min(1)
    a = torch.cat((a, torch.where(counts[-1] > 0, rich / (rich - top + 1e-9), 0)[None]))
    rate = (1 - g) / (1 - g + a * elasticity + 1e-9)
    # an empty bin: on the line between its neighbours with people in them; 0 to the left of all bins
    full = torch.cat((counts[1:-1], torch.ones_like(counts[:1]))) > 0
    index = torch.arange(bins + 1, dtype=torch.int32, device=device)[:, None]
    left = torch.where(full, index, -1).cummax(0).values
    right = torch.where(full, index, bins).flip(0).cummin(0).values.flip(0)
    low = torch.where(left < 0, 0, rate.gather(0, left.clamp_min(0).long()))
    between = low + (rate.gather(0, right.long()) - low) * ((index - left) / (right - left).clamp_min(1))
    rate = torch.where(full, rate, between)
    upto = torch.stack([(cutoff - edges[:-1]).clamp(0, width) for cutoff in cutoffs])
    share = upto.diff(dim=0) / upto.sum(1).diff()[:, None]  # [brackets - 1, bins] of each bracket
    brackets = torch.cat((total(share[..., None] * rate[:-1], 1), rate[-1:]))
    return [g, torch.where(full, a, math.nan), rate, brackets]


@dataclasses.dataclass(frozen=True, eq=False)
class Economy:
    """A description without state; `dataclasses.replace(env, eta=0.3)` is the same game with more risk-averse agents.
    Fields typed `float | Tensor` take a number or a value per environment [B]. Defaults are those of ai-economist's
    four-agent game without its curriculum (labor_constant=10,000 in phase 1, tax_warmup=-100 in phase 2)."""

    env_id: str
    num_envs: int
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    num_agents: int = 4
    layout: Sequence[str] = tuple(OPEN_QUADRANT)  # rows of tiles: "." grass, "~" water, "s" stone, "w" wood
    horizon: int = 1000  # steps of an episode
    regrowth: float | Tensor = 0.01  # probability that an empty source refills in a step
    ranked: bool = True  # four agents have fixed skills in random order and start in fixed corners; else all random
    start_coin: float = 0.0
    payment_scale: float | Tensor = 1.0  # times the coin for a house
    bonus_scale: float | Tensor = 1.0  # times the probability of a second unit
    build_labor: float | Tensor = 10.0
    move_labor: float | Tensor = 1.0
    collect_labor: float | Tensor = 1.0
    order_labor: float | Tensor = 0.25
    max_price: int = 10  # coin; P = max_price + 1
    max_orders: int = 5  # K, open at once, of one agent and resource
    order_duration: int = 50  # steps
    history_decay: float = 0.995  # per step
    eta: float | Tensor = 0.23  # risk aversion of isoelastic utility, up to 0.999
    labor_coef: float | Tensor = 0.21  # utility per labor
    labor_constant: float = 0.0  # steps; anneals labor_coef by 1 - exp(-n / labor_constant); 0: not annealed
    labor_schedule: str = "auto"  # n: "auto", steps in which the mean reward is positive; "decay", completed episodes
    tax: str = "planner"  # or "free", "us", "fixed", "saez"
    fixed_rates: Sequence[float] = US_FEDERAL  # where tax="fixed"
    period: int = 100  # steps between tax days
    cutoffs: Sequence[float] = CUTOFFS  # coin, where brackets begin
    rate_step: float = 0.05  # of the planner's rates
    tax_warmup: float | None = None  # rates <= tax_slope * (completed episodes - tax_warmup); None: <= 1
    tax_slope: float = 0.001
    saez_pairs: int = 500  # M; rates are random until an environment has seen so many
    saez_elasticity: float | None = None  # None: estimated
    saez_uniform: bool = False  # social weights 1 instead of 1 / income
    objective: str = "equality_productivity"  # or "inverse_income_coin", "inverse_income_utility"
    equality_weight: float = 1.0  # w in (w * equality + 1 - w) * productivity / N
    sight: int = 5  # tiles, half-width of the original's maps; how far offsets are seen
    window: int = 3  # tiles, half-width of the window in `obs`

    discrete: ClassVar[bool] = True
    action_low: ClassVar[float] = 0.0
    action_high: ClassVar[float] = 1.0

    def __post_init__(self):
        self._set(device=torch.device(self.device), layout=tuple(self.layout), cutoffs=tuple(map(float, self.cutoffs)))
        self._check()
        for name in PER_ENV:
            self._set(**{name: torch.as_tensor(getattr(self, name), dtype=self.dtype, device=self.device)})
        self._build()

    def _set(self, **values):
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen

    def _check(self):
        counts = ("num_envs", "horizon", "max_price", "max_orders", "order_duration", "period", "saez_pairs")
        amounts, shares = ("start_coin", "labor_constant", "tax_slope"), ("history_decay", "equality_weight")
        tiles, cuts, elasticity = "".join(self.layout), self.cutoffs, self.saez_elasticity or 0.0
        even = len({len(row) for row in self.layout}) == 1 and set(tiles) <= set(".~sw")
        rising = len(cuts) > 1 and cuts[0] == 0 and all(a < b < math.inf for a, b in zip(cuts, cuts[1:]))
        rates = len(self.fixed_rates) == len(cuts) and all(0 <= rate <= 1 for rate in self.fixed_rates)
        for name, rule, holds in (
            *((name, "1 or more", getattr(self, name) >= 1) for name in (*counts, "sight", "window")),
            *((name, f"{most} or less", getattr(self, name) <= most) for name, most in MOST.items()),
            *((name, "0 or more", 0 <= getattr(self, name) < math.inf) for name in amounts),
            *((name, "between 0 and 1", 0 <= getattr(self, name) <= 1) for name in shares),
            ("tax", f"one of {', '.join(TAXES)}", self.tax in TAXES),
            ("objective", f"one of {', '.join(OBJECTIVES)}", self.objective in OBJECTIVES),
            ("labor_schedule", "auto or decay", self.labor_schedule in ("auto", "decay")),
            ("layout", "equally long rows of . ~ s w with an s and a w", even and {"s", "w"} <= set(tiles)),
            ("num_agents", "2 or more", self.num_agents >= 2),
            ("num_agents", "no more than the tiles without water", self.num_agents <= len(tiles) - tiles.count("~")),
            ("cutoffs", "two or more, rising from 0", rising),
            ("cutoffs", "7 for the US rates", self.tax != "us" or len(cuts) == 7),
            ("fixed_rates", f"{len(cuts)} numbers between 0 and 1", self.tax != "fixed" or rates),
            ("rate_step", "above 0, at most 1", 0 < self.rate_step <= 1),
            ("tax_warmup", "None or finite", math.isfinite(self.tax_warmup or 0.0)),
            ("saez_elasticity", "None or 0 or more", 0 <= elasticity < math.inf),
        ):
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")
        rules = {"eta": (0.9999, "between 0 and 0.999"), "regrowth": (1, "between 0 and 1")}
        for name in PER_ENV:
            value, (most, rule) = torch.as_tensor(getattr(self, name)), rules.get(name, (1e9, "0 or more"))
            if value.shape not in ((), (self.num_envs,)):
                raise ValueError(f"{name} must be a number or [num_envs = {self.num_envs}], got {list(value.shape)}")
            if not bool(((value >= 0) & (value <= most)).all()):
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")

    def _build(self):
        N, P, W, b = self.num_agents, self.max_price + 1, self.window, len(self.cutoffs)
        codes = {".": GRASS, "~": WATER, "s": FULL_STONE, "w": FULL_WOOD}
        ground = torch.tensor([[codes[tile] for tile in row] for row in self.layout])
        (H, L), (start, stride) = ground.shape, (F.pad(ground, (W, W, W, W), value=OUTSIDE), ground.shape[1] + 2 * W)
        stone, wood = ((start.flatten() == kind).nonzero()[:, 0] for kind in (FULL_STONE, FULL_WOOD))
        sources, i, near = torch.cat((stone, wood)), torch.arange(N), torch.arange(-W, W + 1)
        corners = [(0, L - 1), (H - 1, 0), (0, 0), (H - 1, L - 1)]  # of the worst builder to the best
        ranked = self.ranked and N == len(set(corners)) == 4 and all(ground[corner] != WATER for corner in corners)
        A, O = 6 + 4 * P, 21 + 10 * P + b + N + 3 * (N - 1) + 5 * (2 * W + 1) ** 2

        def to(values, dtype=torch.int32, trailing=1):
            return torch.as_tensor(values, dtype=dtype, device=self.device)[(..., *[None] * trailing)]

        everybody = torch.ones(N, dtype=torch.bool, device=self.device)
        self._set(size=(H, L), stride=stride, agents=tuple(f"agent_{k}" for k in range(N)), cooperators=everybody)
        self._set(obs_sizes=(O,) * N, obs_mask=everybody[:, None].repeat(1, O))
        self._set(action_sizes=(A,) * N, action_mask=everybody[:, None].repeat(1, A))
        self._set(num_rates=1 + int(1 / self.rate_step + 1e-9), planner_obs_size=6 * P + 6 + b + 7 * N)
        self._set(noise_rows=2 * N + len(sources) + b * (self.tax == "saez"))
        self._set(start=to(start.flatten(), torch.int8), land=to(start.flatten() < WATER, torch.bool))  # [T, 1] each
        self._set(sources=to(sources, torch.int64, 0), num_stones=len(stone))  # [S] tiles, stone first
        self._set(source_place=to(torch.stack((sources // stride, sources % stride)) - W)[:, None])  # [2, 1, S, 1]
        self._set(corners=to([(r + W) * stride + c + W for r, c in corners], trailing=0) if ranked else None)
        self._set(payments=to(RANKED_PAYMENT, self.dtype, 0), near=to((near[:, None] * stride + near).flatten()))
        self._set(steps=to([-1, 1, -stride, stride], trailing=2), directions=to(range(4), trailing=2))  # [4, 1, 1]
        self._set(house=to(HOUSE + i), levels=to(range(P)), slots=to(range(self.max_orders)))  # [N, P or K, 1]
        self._set(seniority=to(2**AGENT_BITS - 1 - i, trailing=2), numbers=to(i, trailing=2))  # [N, 1, 1]
        self._set(myself=to(torch.eye(N), torch.bool), earlier=to(i[:, None] > i, torch.bool))  # [N, N, 1]
        self._set(others=to((i[:, None] + torch.arange(1, N)) % N, torch.int64, 0))  # [N, N - 1]
        # what each action needs, as bits (see valid_actions) and in coin, [A, 1, 1]
        self._set(needs=to([0, 1, *[2] * P, *[4] * P, *[8] * P, *[16] * P, 32, 64, 128, 256], trailing=2))
        self._set(cost=to([0, 0, *range(P), *[0] * P, *range(P), *[0] * (P + 4)], self.dtype, 2))
        self._set(lower=to(self.cutoffs, self.dtype, 2), upper=to((*self.cutoffs[1:], math.inf), self.dtype, 2))
        self._set(schedule=to(US_FEDERAL if self.tax == "us" else self.fixed_rates, torch.float64))  # [brackets, 1]

    # ---------------------------------------------------------------------------------- dynamics, in order of a step

    def build(self, state: State, wish: Tensor) -> State:
        """A house for each agent that wishes it [N, B], has stone and wood, and stands on bare grass."""
        here = self._at(state, state.position)
        built = (wish & (here == GRASS) & (state.goods[STONE] > 0) & (state.goods[WOOD] > 0)).int()
        new = {"tiles": self._put(state, torch.where(built > 0, self.house, here)), "goods": state.goods - built}
        coin = state.coin + built * (state.payment * self.payment_scale)
        return dataclasses.replace(state, coin=coin, labor=state.labor + built * self.build_labor, **new)

    def _at(self, state: State, tile: Tensor) -> Tensor:
        """int32 contents of the tiles [..., B]."""
        return state.tiles.gather(0, tile.flatten(0, -2).long()).view(tile.shape).int()

    def _put(self, state: State, contents: Tensor) -> Tensor:
        """Tiles with new contents [N, B] where agents stand."""
        return state.tiles.scatter(0, state.position.long(), contents.to(torch.int8))

    def place_orders(self, state: State, bids: Tensor, asks: Tensor) -> State:
        """Orders at prices bids and asks [R, N, B] int32, -1: none. One for which the agent lacks a slot, coin or goods
        is ignored; several of one agent count in the order stone, wood, and bid, ask."""
        coin, labor, goods = state.coin, state.labor, list(state.goods.unbind())
        books = [[x.int() for x in book] for book in zip(state.side, state.price, state.age)]  # [N, K, B] each
        for r, kind in itertools.product((STONE, WOOD), (BID, ASK)):
            wish, (side, price, age) = (bids, asks)[kind - BID][r], books[r]
            slot = torch.where(side == 0, self.slots, self.max_orders).amin(1)  # the first free one
            able = (coin >= wish) if kind == BID else (goods[r] > 0)
            slot = torch.where((wish >= 0) & able & (slot < self.max_orders), slot, -1)
            here, placed = slot[:, None] == self.slots, (slot >= 0).int()
            books[r] = [torch.where(here, x, y) for x, y in zip((kind, wish[:, None], 0), (side, price, age))]
            coin = coin - placed * wish if kind == BID else coin
            goods[r] = goods[r] - placed if kind == ASK else goods[r]
            labor = labor + placed * self.order_labor
        side, price, age = (torch.stack(books).to(torch.int8) for books in zip(*books))
        changed = {"side": side, "price": price, "age": age, "goods": torch.stack(goods)}
        return dataclasses.replace(state, coin=coin, labor=labor, **changed)

    def match_orders(self, state: State, rounds: int) -> tuple[State, list]:
        """The bid of the highest priority (price, then age, then the lower index of its agent) that another agent's ask
        crosses meets the best such ask, `rounds` times; the price is the older order's, else the ask's. Then orders
        age. Orders that stayed have met before, so that no more trades are possible than there are new orders.

        Returns also, per round, the priorities of bid and ask, -1 where there is no trade, and the price [R, B]."""
        high, last = AGE_BITS + AGENT_BITS, 2**AGE_BITS - 1
        price, age, most = state.price.int(), state.age.int(), self.max_price
        worth = torch.where(state.side == BID, price, most - price)
        priority = worth << high | age << AGENT_BITS | self.seniority
        bids, asks = (torch.where(state.side == side, priority, -1) for side in (BID, ASK))
        coin, goods, history, deals = state.coin, state.goods, self.history_decay * state.history, []
        for _ in range(rounds):
            bid, ask = bids.amax(2), asks.amax(2)  # [R, N, B]
            best = torch.where(self.myself, -1, ask[:, None]).amax(2)  # of the others
            crosses = (bid >= 0) & (best >= 0) & (bid >> high >= most - (best >> high))
            winner = torch.where(crosses, bid, -1).amax(1, keepdim=True)  # [R, 1, B]
            buys = crosses & (bid == winner)
            partner = torch.where(buys, best, -1).amax(1, keepdim=True)
            sells = (partner >= 0) & (ask == partner)
            offer, asked = winner >> high, most - (partner >> high)
            older = (winner >> AGENT_BITS & last) > (partner >> AGENT_BITS & last)
            paid = torch.where(older, offer, asked)
            coin = coin + (torch.where(buys, offer - paid, 0) + torch.where(sells, paid, 0)).sum(0, dtype=torch.int32)
            goods = goods + buys.int()
            history = history + ((partner >= 0) & (paid == self.levels)).int()
            bids = torch.where(bids == winner[:, :, None], -1, bids)
            asks = torch.where(asks == partner[:, :, None], -1, asks)
            deals.append((winner[:, 0], partner[:, 0], paid[:, 0]))
        ends = age >= self.order_duration
        back = torch.where(ends & (bids >= 0), price, 0).sum((0, 2), dtype=torch.int32)
        unsold = torch.where(ends & (asks >= 0), 1, 0).sum(2, dtype=torch.int32)
        side = torch.where(ends, 0, torch.where(bids >= 0, BID, torch.where(asks >= 0, ASK, 0)))
        new = {"side": side.to(torch.int8), "age": torch.where(side > 0, age + 1, 0).to(torch.int8)}
        return dataclasses.replace(state, coin=coin + back, goods=goods + unsold, history=history, **new), deals

    def ranks(self, keys: Tensor) -> Tensor:
        """[N, B] int32: 0 for the smallest of keys [N, B], the first of equal ones."""
        return ((keys[:, None] > keys) | ((keys[:, None] == keys) & self.earlier)).int().sum(1, dtype=torch.int32)

    def move(self, state: State, direction: Tensor, rank: Tensor) -> State:
        """Steps to the left, right, up or down (0 to 3, else none, [N, B]), one agent after the other by rank [N, B]:
        onto tiles without water, another's house or, at that moment, an agent."""
        offset = torch.where(direction == self.directions, self.steps, 0).sum(0, dtype=torch.int32)
        position = state.position
        target = torch.where((offset != 0) & self._enterable(state, position + offset), position + offset, -1)
        for turn in range(self.num_agents):
            goal = torch.where(rank == turn, target, 0).sum(0, dtype=torch.int32)
            taken = (position == goal).int().amax(0)
            position = torch.where((rank == turn) & (goal > 0) & (taken == 0), goal, position)
        labor = state.labor + (position != state.position).int() * self.move_labor
        return dataclasses.replace(state, position=position, labor=labor)

    def _enterable(self, state: State, tile: Tensor) -> Tensor:
        """May each agent, as far as the ground goes, enter its tiles [..., N, B]?"""
        code = self._at(state, tile)
        return (code < WATER) | (code == self.house)

    def collect(self, state: State, lucky: Tensor) -> State:
        """Whoever stands on a unit takes it, and one more if lucky [N, B]."""
        here = self._at(state, state.position)
        units = torch.stack((here == FULL_STONE, here == FULL_WOOD)).int()
        any_unit = units[0] + units[1]
        new = {"tiles": self._put(state, here - any_unit), "goods": state.goods + units * (1 + lucky.int())}
        return dataclasses.replace(state, labor=state.labor + any_unit * self.collect_labor, **new)

    def rate_limit(self, state: State) -> Tensor:
        """[B] float64: the highest tax rate so far in the annealing."""
        if self.tax_warmup is None:
            return torch.ones_like(state.t, dtype=torch.float64)
        return (self.tax_slope * (state.completions.double() - self.tax_warmup)).clamp(0, 1)

    def set_rates(self, state: State, planner_action: Tensor | None, uniform: Tensor) -> State:
        """The rates of a new period, where one begins; uniform numbers [brackets, B] for Saez's first ones."""
        limit, starts, rates = self.rate_limit(state), state.t % self.period == 0, state.rates
        if self.tax == "planner" and planner_action is not None:
            choice = planner_action.T.contiguous()  # batch-last in memory too
            if choice.is_floating_point():
                wanted = choice.clamp_min(0).minimum(limit)
            else:
                wanted = (choice - 1).double() * self.rate_step
                starts = starts & (choice > 0) & (choice <= self.num_rates) & (wanted <= limit)
            rates = torch.where(starts, wanted.to(self.dtype), rates)
        if self.tax != "saez":
            return dataclasses.replace(state, rates=rates)
        pairs, ready = state.pairs.double(), state.pairs[1, -1] >= 0
        new = estimate_elasticity(state.pairs, state.elasticity)
        used = new[0] if self.saez_elasticity is None else self.saez_elasticity
        saez = saez_schedule(pairs, used, self.cutoffs, self.saez_uniform)[-1].clamp_min(0).minimum(limit)
        rates = torch.where(starts, torch.where(ready, saez, limit * uniform).to(self.dtype), rates)
        elasticity = torch.where(starts & ready, new, state.elasticity)
        return dataclasses.replace(state, rates=rates, elasticity=elasticity)

    def escrow(self, state: State) -> tuple[Tensor, Tensor]:
        """Coin [N, B] and goods [R, N, B] int32 that open orders set aside."""
        coin = torch.where(state.side == BID, state.price.int(), 0).sum((0, 2), dtype=torch.int32)
        return coin, (state.side == ASK).int().sum(2, dtype=torch.int32)

    def endowment(self, state: State) -> Tensor:
        """[N, B] coin, what open bids set aside included."""
        return state.coin + self.escrow(state)[0]

    def marginal_rate(self, rates: Tensor, income: Tensor) -> Tensor:
        """[N, B] of the bracket with this income [N, B]; 0 below 0."""
        return torch.where((income >= self.lower) & (income < self.upper), rates[:, None], 0).sum(0)

    def tax_due(self, rates: Tensor, income: Tensor) -> Tensor:
        """[N, B] on incomes [N, B]."""
        return total(rates[:, None] * (income - self.lower).clamp_min(0).minimum(self.upper - self.lower))

    def levy(self, state: State) -> State:
        """A tax day: taxes on what endowments gained since the last one, at most the inventory; shared out."""
        income = self.endowment(state) - state.last_coin
        paid = self.tax_due(state.rates, income).minimum(state.coin)
        coin = state.coin - paid + total(paid) / self.num_agents
        rate, pairs = self.marginal_rate(state.rates, income), state.pairs
        if self.tax == "saez":
            pairs = torch.cat((torch.stack((income, rate)), pairs), 1)[:, : self.saez_pairs]
        seen = {"last_coin": coin + self.escrow(state)[0], "last_income": income, "last_rate": rate}
        return dataclasses.replace(state, coin=coin, pairs=pairs, **seen)

    def regrow(self, state: State, uniform: Tensor) -> Tensor:
        """Tiles in which the empty sources with uniform [S, B] below `regrowth` have refilled."""
        units = state.tiles[self.sources].int()
        grown = ((units == STONE_SOURCE) | (units == WOOD_SOURCE)) & (uniform < self.regrowth)
        return state.tiles.scatter(0, self.sources[:, None].expand(units.shape), (units + grown.int()).to(torch.int8))

    def labor_weight(self, state: State) -> Tensor | float:
        """[B] what the labor coefficient is multiplied with."""
        n = state.worked if self.labor_schedule == "auto" else state.completions
        return 1 - torch.exp(-n.to(self.dtype) / self.labor_constant) if self.labor_constant else 1.0

    def utility(self, coin: Tensor, labor: Tensor, weight: Tensor | float) -> Tensor:
        """[N, B] of coin endowments and the labor of the episode [N, B]."""
        power = torch.exp((1 - self.eta) * torch.log(coin))  # torch.pow rounds the end of a tensor in another way
        return (power - 1) / (1 - self.eta) - weight * self.labor_coef * labor

    def social_welfare(self, coin: Tensor, utility: Tensor) -> Tensor:
        """[B] the planner's objective."""
        if self.objective == "equality_productivity":
            w = self.equality_weight
            return (w * equality_of(coin) + 1 - w) * total(coin) / self.num_agents
        weight = 1 / coin.clamp_min(1)
        return total(weight / total(weight) * (coin if self.objective == "inverse_income_coin" else utility))

    def advance(self, state: State, action: Tensor, noise: Tensor | None = None, planner_action=None) -> State:
        """A step without observations and masks. Rewards are the changes of `utility` and `welfare`."""
        N, P, S = self.num_agents, self.max_price + 1, len(self.sources)
        if noise is None:
            noise = torch.ones(self.noise_rows, len(action), dtype=self.dtype, device=action.device)
        action, (keys, luck, grow, spin) = action.T.int(), noise.split((N, N, S, self.noise_rows - 2 * N - S))
        price = [torch.where((x >= 0) & (x < P), x, -1) for x in (action - 2 - k * P for k in range(4))]
        new = self.build(state, action == 1)
        new = self.place_orders(new, torch.stack(price[::2]), torch.stack(price[1::2]))
        new, _ = self.match_orders(new, rounds=N)
        new = self.move(new, action - (2 + 4 * P), self.ranks(keys))
        new = self.collect(new, luck < state.bonus * self.bonus_scale)
        new = self.set_rates(new, planner_action, spin)
        taxed, due = self.levy(new), (state.t + 1) % self.period == 0
        for name in ("coin", "last_coin", "last_income", "last_rate", "pairs"):
            new = dataclasses.replace(new, **{name: torch.where(due, getattr(taxed, name), getattr(new, name))})
        new = dataclasses.replace(new, tiles=self.regrow(new, grow), t=state.t + 1)
        coin = self.endowment(new)
        utility = self.utility(coin, new.labor, self.labor_weight(state))
        worked = state.worked + (total(utility - state.utility) > 0)
        return dataclasses.replace(new, utility=utility, welfare=self.social_welfare(coin, utility), worked=worked)

    # ----------------------------------------------------------------------------------------------------- interface

    def make_state(self, position: Tensor, payment: Tensor, bonus: Tensor, after: State | None = None) -> State:
        """The first state of an episode in which agents start on the tiles `position` with these skills, [N, B] each.
        The counters of `after`, a state, go on."""
        N, K, B, whole = self.num_agents, self.max_orders, position.shape[1], torch.int64

        def zeros(*shape, dtype=self.dtype):
            return torch.zeros(*shape, B, dtype=dtype, device=self.device)

        coin = zeros(N) + self.start_coin
        book = [*(zeros(2, N, K, dtype=torch.int8) for _ in range(3)), zeros(2, self.max_price + 1)]
        taxes = [zeros(len(self.cutoffs)), coin.clone(), zeros(N), zeros(N)]  # no tensor twice: code is compiled once
        skills, counters = [payment.to(self.dtype), bonus.to(self.dtype)], [zeros(dtype=whole), zeros(dtype=whole)]
        pairs = zeros(self.saez_pairs * (self.tax == "saez"))
        saez = [torch.stack((pairs, pairs - 1)), zeros(2) + 0.5]
        start = [self.start.repeat(1, B), position.int(), coin, zeros(2, N, dtype=torch.int32), zeros(N)]
        state = State(*start, *book, *taxes, *skills, zeros(N), zeros(), *counters, *saez, zeros(dtype=whole))
        if after is not None:
            carried = {name: getattr(after, name) for name in ("worked", "pairs", "elasticity")}
            state = dataclasses.replace(state, completions=after.completions + 1, **carried)
        if self.tax in ("us", "fixed"):
            state.rates = self.schedule.minimum(self.rate_limit(state)).to(self.dtype)
        state.utility = self.utility(coin, state.labor, self.labor_weight(state))
        state.welfare = self.social_welfare(coin, state.utility)
        return state

    def _block(self, generators: list[torch.Generator], rows: int) -> Tensor:
        """[rows, B] uniform numbers, the k-th block of environments from generator k."""
        size = self.num_envs // len(generators)
        parts = [torch.rand(rows, size, generator=g, device=g.device, dtype=self.dtype) for g in generators]
        return torch.cat(parts, 1).to(self.device)

    def reset(self, generators: list[torch.Generator], after: State | None = None) -> tuple[State, Tensor]:
        """Generator k alone draws the k-th block of num_envs / len(generators) environments. `after`: the last state of
        the episode before, whose counters (annealing, Saez's pairs) go on; each environment of a block gets the newest
        of all its pairs, as in ai-economist's trainer."""
        if self.num_envs % len(generators):
            raise ValueError(f"num_envs must be a multiple of the {len(generators)} generators, got {self.num_envs}")
        N = self.num_agents
        order, payment, bonus = self._block(generators, 3 * N).split(N)
        rank = self.ranks(order).long()
        bonus = (torch.exp(-torch.log(1 - bonus) / 3) - 1).clamp_max(2) / 2  # skills have Pareto distributions
        if self.corners is not None:
            payment, tile = self.payments[rank], self.corners[rank]
        else:
            payment = 10 * (2 * torch.exp(-torch.log(1 - payment) / 4) - 1).clamp_max(3)
            tile = torch.where(self.land, self._block(generators, len(self.start)), -1).topk(N, 0).indices
        state = self.make_state(tile, payment, bonus, after)
        if after is not None and self.tax == "saez":
            pairs = state.pairs.unflatten(2, (len(generators), -1)).transpose(2, 3).flatten(1, 2)  # newest first
            state.pairs = pairs[:, : self.saez_pairs].repeat_interleave(self.num_envs // len(generators), 2)
        return state, self.observe(state)

    def draw(self, generators: list[torch.Generator]) -> Tensor:
        """The random numbers of one step, uniform [2 N + S, B]: agents move in the order of the first N; the next N let
        an agent collect a second unit if below `bonus`, and S let a source (stone first, row by row) refill if below
        `regrowth`. For Saez come random rates, one per bracket."""
        return self._block(generators, self.noise_rows)

    def valid_actions(self, state: State) -> Tensor:
        """[B, N, A] bool: what `step` would not ignore. 0 does nothing, 1 builds; then come bids for stone at each
        price, asks, the same for wood; then left, right, up, down, which fail if somebody else gets there first. (The
        attribute `action_mask` only says which actions exist: all.)"""
        have, slot = state.goods > 0, state.side.int().amin(2) == 0
        here, target = self._at(state, state.position), state.position + self.steps
        others = ((target[:, :, None] == state.position) & ~self.myself).int().amax(2)  # [4, N, B]
        way = self._enterable(state, target) & (others == 0)
        able = ((here == GRASS) & have[STONE] & have[WOOD], slot[0], slot[0] & have[0], slot[1], slot[1] & have[1])
        bits = sum(x.int() << k for k, x in enumerate((*able, *way)))
        return (((self.needs & ~bits) == 0) & (state.coin >= self.cost)).permute(2, 1, 0)

    def valid_rates(self, state: State) -> Tensor:
        """[B, brackets, 1 + rates] bool: choice 0 keeps a rate, the others set it where a period starts."""
        level = torch.arange(-1, self.num_rates, dtype=torch.float64, device=self.device) * self.rate_step
        starts = (state.t % self.period == 0) & (self.tax == "planner")
        may = (level < 0) | ((level <= self.rate_limit(state)[:, None]) & starts[:, None])
        return may[:, None].expand(-1, len(self.cutoffs), -1)

    def market_rate(self, state: State) -> Tensor:
        """[R, B] mean price of past trades, recent ones first."""
        return total(self.levels * state.history, 1) / total(state.history, 1).clamp_min(0.001)

    def _place(self, state: State) -> Tensor:
        """[2, N, B] rows and columns (stacked, so that compiled code divides once)."""
        return torch.stack((state.position // self.stride, state.position % self.stride)) - self.window

    def _flat(self, state: State, price: float, goods: float, trades: float) -> tuple[Tensor, Tensor, Tensor]:
        """ai-economist's flat observations [N, F, B] of agents, without build_skill, [G, B] of the planner, without its
        empty inventory, and [N, 6, B] of what it sees of each agent, for units of prices, goods and past trades."""
        N, (H, L), side = self.num_agents, self.size, state.side[:, :, :, None]
        at = state.price[:, :, :, None].int() == self.levels  # [R, N, K, P, B]
        asks, bids = (((side == kind) & at).int().sum(2, dtype=torch.int32) for kind in (ASK, BID))  # [R, N, P, B]
        all_asks, all_bids = (x.sum(1, keepdim=True, dtype=torch.int32) for x in (asks, bids))
        rate, history = self.market_rate(state) / price, state.history.flatten(0, 1) / trades
        income = self.endowment(state) - state.last_coin
        marginal, day = self.marginal_rate(state.rates, income), state.t % self.period
        last, (row, col) = state.last_income / self.period, self._place(state)
        incomes = torch.where(self.ranks(last) == self.numbers, last, 0).sum(1)  # sorted
        taxes = [state.rates, torch.stack((day == 0, day == self.period - 1)), incomes]
        clock = torch.stack(((day + 1) / self.period, state.t / self.horizon))
        own = [marginal, *clock[:, None].expand(-1, N, -1), state.coin / 100, *(state.goods / goods), col / L, row / H]
        books = [x.transpose(0, 1).flatten(1, 2) for x in (all_asks - asks, all_bids - bids, asks, bids)]
        blocks = [state.payment[:, None] / 10, *books[:2], rate, *books[2:], history, state.bonus[:, None], *taxes]
        agents = torch.cat([x.to(self.dtype).expand(N, -1, -1) for x in (*blocks, torch.stack(own, 1))], 1)
        planner = [*(x.flatten(0, 2) for x in (all_asks, all_bids)), rate, history, *taxes, clock]
        seen = [marginal, last, state.last_rate, state.coin / 100, *(state.goods / goods)]
        return agents, torch.cat([x.to(self.dtype) for x in planner]), torch.stack(seen, 1)

    def observe(self, state: State) -> Tensor:
        """[B, N, O], flat and compact: "flat" of `original_obs` without its second entry, with market rates / max_price
        and goods and past trades / 10; then what the original shows on maps:

        1           (not on maps:) own income in this tax period so far, per step
        3 (N - 1)   rows and columns to the others, the next one first, / sight, and 1, each; 0 where out of sight
        6           the same for the nearest stone and the nearest wood
        5 (2 window + 1)^2  tiles around the agent, row by row: stone, wood, empty source, house, may not be entered
        """
        flat, place = self._flat(state, self.max_price, 10.0, 10.0)[0], self._place(state)
        income = (self.endowment(state) - state.last_coin)[:, None] / self.period
        way = place[:, self.others] - place[:, :, None]  # [2, N, N - 1, B]
        seen = (way.abs().amax(0) <= self.sight).to(self.dtype)
        others = torch.stack((*(way * seen / self.sight), seen), 2).flatten(1, 2)
        code = self._at(state, state.position[:, None] + self.near)  # [N, tiles, B]
        source = (code == STONE_SOURCE) | (code == WOOD_SOURCE)
        blocked = (code >= WATER) & (code != self.house[:, None])
        channels = (code == FULL_STONE, code == FULL_WOOD, source, code >= HOUSE, blocked)
        window = [torch.where(channel, 1.0, 0.0).to(self.dtype) for channel in channels]
        obs = torch.cat([flat, income, others, self._nearest(state, place), *window], 1)
        return obs.flatten(0, 1).T.contiguous().view(-1, *obs.shape[:2])

    def _nearest(self, state: State, place: Tensor) -> Tensor:
        """[N, 6, B] where the nearest stone and wood are, see `observe`."""
        units, (dr, dc) = state.tiles[self.sources].int(), self.source_place - place[:, :, None]  # [N, S, B] each
        seen = ((units == FULL_STONE) | (units == FULL_WOOD)) & (torch.maximum(dr.abs(), dc.abs()) <= self.sight)
        keys = torch.where(seen, (dr.abs() + dc.abs()) << 16 | (dr + 128) << 8 | (dc + 128), FAR)
        entries = []
        for key in (keys[:, : self.num_stones].amin(1), keys[:, self.num_stones :].amin(1)):
            way = [(key >> 8 & 255) - 128, (key & 255) - 128, torch.full_like(key, self.sight)]
            entries += [torch.where(key < FAR, x, 0) / self.sight for x in way]
        return torch.stack(entries, 1).to(self.dtype)

    def planner_obs(self, state: State) -> Tensor:
        """[B, G] of the planner, who sees neither map nor skills: "planner_flat" of `original_obs` without its last
        three entries, then "planner_agents", in the units of `observe`."""
        _, flat, agents = self._flat(state, self.max_price, 10.0, 10.0)
        return torch.cat((flat, agents.flatten(0, 1))).T.contiguous()

    def original_obs(self, state: State) -> dict[str, Tensor]:
        """What ai-economist's agents and planner see, in its order and units (V = 2 sight + 1, b brackets):

        "map" [B, N, 7, V, V]: stone, wood, house, water, stone source, wood source, inside the world
        "index_map" [B, N, 2, V, V]: owner of the house, and agent: 0 none, 1 oneself, i + 2 agent i
        "flat" [B, N, 15 + 10 P + b + N]: payment, skill (payment again), others' asks and bids at each price, market
            rates, own asks and bids, past trades, bonus, rates, first day, tax day, sorted last incomes, marginal rate,
            phase, time, coin, stone, wood, column, row
        "planner_flat" [B, 9 + 6 P + b + N]: asks, bids, market rates, past trades, rates, ..., incomes, phase, time, 0s
        "planner_agents" [B, N, 6]: marginal rate now, last income, rate at it, coin, stone, wood
        """
        (H, L), W, S, (row, col) = self.size, self.window, self.sight, self._place(state)
        flat, planner, seen = self._flat(state, 1.0, 100.0, 100.0)
        near = torch.arange(-S, S + 1, device=self.device)[:, None, None, None]
        r, c = row + near, col + near[:, 0]  # rows [V, 1, N, B] and columns [V, N, B] in view
        inside = (r >= 0) & (r < H) & (c >= 0) & (c < L)  # [V, V, N, B]
        tile = (r.clamp(0, H - 1) + W) * self.stride + c.clamp(0, L - 1) + W
        code = torch.where(inside, self._at(state, tile), OUTSIDE)
        sources = [(code == full) | (code == full - 1) for full in (FULL_STONE, FULL_WOOD)]
        maps = [code == FULL_STONE, code == FULL_WOOD, code >= HOUSE, code == WATER, *sources, inside]
        i = self.house - HOUSE  # [N, 1]
        there = inside[..., None, :, :] & (tile[..., None, :, :] == state.position[:, None])  # [V, V, agent seen, N, B]
        who = [code - HOUSE, torch.where(there, i[:, None], -1).amax(2)]
        index = [torch.where(agent < 0, 0, torch.where(agent == i, 1, agent + 2)) for agent in who]
        obs = {name: torch.stack(x).permute(4, 3, 0, 1, 2) for name, x in (("map", maps), ("index_map", index))}
        obs |= {"flat": torch.cat((flat[:, :1], flat), 1).permute(2, 0, 1), "planner_flat": F.pad(planner.T, (0, 3))}
        return obs | {"planner_agents": seen.permute(2, 0, 1)}

    def step(self, state: State, action: Tensor, noise: Tensor | None = None, planner_action: Tensor | None = None):
        """action [B, N] (see `valid_actions`), noise from `draw` (None: agents move in the order of their indices,
        nobody is lucky, nothing regrows), planner_action [B, brackets], int64 choices or floating-point rates.

        Returns state, obs [B, N, O], reward [B, N] (change of utility), terminated [B], truncated [B] and info:
        "valid_actions" [B, N, A], "planner_reward", "productivity" (everybody's coin), "equality" [B].
        """
        new = self.advance(state, action, noise, planner_action)
        coin, truncated, reward = self.endowment(new), new.t >= self.horizon, (new.utility - state.utility).T
        info = {"valid_actions": self.valid_actions(new), "planner_reward": new.welfare - state.welfare}
        info |= {"productivity": total(coin), "equality": equality_of(coin)}
        return new, self.observe(new), reward, torch.zeros_like(truncated), truncated, info

    def global_state(self, state: State) -> Tensor:
        """[B, N O + G] for centralised critics: what everybody sees, the planner included."""
        return torch.cat((self.observe(state).flatten(1), self.planner_obs(state)), 1)

    def render(self, state: State, index: int = 0, size: int = 400) -> np.ndarray:
        """[about 5/4 size, size, 3] uint8 picture of one environment: stone grey, wood green (pale: an empty source),
        water blue, agents as discs and their houses as squares; below, what each has."""
        (H, L), W = self.size, self.window
        cell = 3 * size // L  # drawn large and scaled down, which smooths
        big, row = cell * L, 3 * size // 16
        image = Image.new("RGB", (big, cell * H + row * (self.num_agents + 1)), GROUND[GRASS])
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(row * 0.55)
        contents = state.tiles[:, index].view(-1, self.stride)[W : W + H, W : W + L].tolist()
        for (r, line), c in itertools.product(enumerate(contents), range(L)):
            x, y, code, rim = c * cell, r * cell, line[c], cell // 7
            draw.rectangle((x, y, x + cell, y + cell), GROUND[min(code, HOUSE)])
            if code >= HOUSE:
                house = (x + rim, y + rim, x + cell - rim, y + cell - rim)
                draw.rectangle(house, COLOURS[(code - HOUSE) % len(COLOURS)])
        place, (stone, wood) = self._place(state)[..., index].T.tolist(), state.goods[..., index].tolist()
        coin, labor = (x[:, index].tolist() for x in (self.endowment(state), state.labor))
        for i, (r, c) in enumerate(place):
            colour, x, y, low = COLOURS[i % len(COLOURS)], c * cell, r * cell, cell * H + row * (i + 0.2)
            draw.ellipse((x, y, x + cell, y + cell), colour, "black", width=row // 14)
            draw.rectangle((row // 4, low, row, low + 0.6 * row), colour)
            words = f"{coin[i]:.0f} coin, {stone[i]} stone, {wood[i]} wood, {labor[i]:.0f} labor"
            draw.text((1.3 * row, low), words, "black", font)
        rates = " ".join(f"{100 * rate:.0f}" for rate in state.rates[:, index].tolist())
        words = f"step {state.t[index]}, taxes {rates} %"
        draw.text((row // 4, cell * H + row * (self.num_agents + 0.1)), words, "black", font)
        return np.asarray(image.resize((size, size * image.height // big), Image.Resampling.LANCZOS))


SMALL = {"layout": tuple(TINY), "horizon": 100, "period": 20, "cutoffs": tuple(c / 5 for c in CUTOFFS)}
TASKS = {"economy_v0": {}, "economy_tiny_v0": SMALL | {"regrowth": 0.03, "sight": 4, "window": 2}}


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_agents: int | None = None,
    continuous_actions: bool = False,
    **fields,
) -> Economy:
    """`fields` are those of `Economy` by name. Actions are always discrete: continuous_actions, which other
    environments know, is ignored.

    Raises ValueError for an unknown task or field, or a value that is out of range."""
    if env_id not in TASKS:
        raise ValueError(f"env_id must be one of {', '.join(TASKS)}, got {env_id!r}")
    known = [field.name for field in dataclasses.fields(Economy)[5:]]
    for name in fields:
        if name not in known:
            raise ValueError(f"fields of {env_id} are {', '.join(known)}, got {name!r}")
    number = {} if num_agents is None else {"num_agents": num_agents}
    return Economy(env_id, num_envs, device, dtype, **TASKS[env_id] | number | fields)


def write_gif(env: Economy, path: str):
    """An episode of environment 0 with random valid actions of everybody, the planner too, in about 125 frames."""
    generator, frames = torch.Generator().manual_seed(0), []
    state, _ = env.reset([generator])
    for t in range(env.horizon):
        if t % max(1, env.horizon // 125) == 0:
            frames.append(Image.fromarray(env.render(state)))
        masks = env.valid_actions(state), env.valid_rates(state)
        uniform = (torch.rand(mask.shape, generator=generator).to(env.device) for mask in masks)
        action, rates = (torch.where(mask, u, -1).argmax(-1) for mask, u in zip(masks, uniform))
        state, *_ = env.step(state, action, env.draw([generator]), rates)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)


def main(
    env_id: str = "economy_v0",
    num_envs: int = 1024,
    device: str = "cpu",
    threads: int = 1,
    compile: bool = False,
    seconds: float = 2.0,
    gif: str | None = None,
):
    """Measure env steps/s with random actions, observations and masks included, and write a GIF.

    Args:
        env_id: one of the tasks
        num_envs: environments in the batch
        device: torch device
        threads: CPU threads
        compile: measure the compiled step too
        seconds: how long to measure
        gif: where to write the GIF
    """
    torch.set_num_threads(threads)
    env = make(env_id, num_envs, device)
    state, _ = env.reset([torch.Generator().manual_seed(0)])
    size = sum(value.nbytes for value in vars(state).values()) // num_envs
    print(f"{env_id}, B = {num_envs}, {threads} threads, {size} bytes of state per environment")
    actions = [torch.randint(env.action_sizes[0], state.coin.T.shape, device=env.device) for _ in range(5)]
    print_speed(dataclasses.replace(env, horizon=50), actions, seconds, compile)
    if gif:
        write_gif(dataclasses.replace(env, num_envs=1), gif)
        print(f"wrote {gif}")


if __name__ == "__main__":
    tyro.cli(main)
