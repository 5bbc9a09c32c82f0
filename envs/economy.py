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

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageFont
from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from envs import Description, Moments, by_agent, gumbel, new_figure, per_seed, print_speed, runs, save_gif
from envs.robustness import half_interval

STONE, WOOD = 0, 1
GRASS, STONE_SOURCE, FULL_STONE, WOOD_SOURCE, FULL_WOOD, WATER, OUTSIDE, HOUSE = range(8)  # HOUSE + i: agent i's house
BID, ASK = 1, 2  # sides of an order; 0: an empty slot
BUILD = 1  # the action
SYMBOLS = {".": GRASS, "~": WATER, "s": FULL_STONE, "w": FULL_WOOD}
OPEN_QUADRANT = """
wwwww..w....~.w..........
ww.w........~.w......w.ww
.w..........~.........w.w
sw.s.s......~............
............~...w......w.
.ss......................
.s.......................
.........................
.........................
s......s....~............
............~............
............~............
~~~~~....~~~~~~~....~~~~~
.s..........~............
s.s.........~............
...s........~............
ss.......................
.ss......................
ss.......................
..s......................
............~............
............~............
............~............
............~............
s...........~............
""".split()
TINY = """
ws..~..ww
sw..~...w
..s...w..
...w.....
~~.~~~.~~
.........
s.s......
s...~....
s...~....
""".split()
CUTOFFS = (0.0, 9.7, 39.475, 84.2, 160.725, 204.1, 510.3)  # coin
US_FEDERAL = (0.1, 0.12, 0.22, 0.24, 0.32, 0.35, 0.37)
RANKED_PAYMENT = (11.331640623590097, 13.267112338979295, 16.472372947006132, 22.249614304395735)
TAXES = ("planner", "free", "us", "fixed", "saez")
OBJECTIVES = ("equality_productivity", "inverse_income_coin", "inverse_income_utility")
PER_ENV = "eta labor_coef build_labor move_labor collect_labor order_labor regrowth payment_scale bonus_scale".split()
Eta = Annotated[float, Field(ge=0, le=0.999)]


def different(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError(f"must have different values, got {values}")
    return values


Etas = Annotated[tuple[Eta, ...], Field(min_length=1), AfterValidator(different)]
GROUND = ("#f0f0e6", "#d4d4d4", "#7d7d82", "#d0e0bc", "#5f8c3c", "#82afd7", "#f0f0e6", "#f0f0e6")  # by contents
COLOURS = ("#c85046", "#426ebe", "#eb9628", "#965aaa", "#5aaab4", "#785a3c")  # of agents and their houses


@dataclass
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


def int_sum(values: Tensor, dim: int | tuple[int, ...] = 0) -> Tensor:
    """Sum of whole numbers or booleans in int32, faster than torch's own int64."""
    return values.int().sum(dim, dtype=torch.int32)


def equality_of(coin: Tensor) -> Tensor:
    """[B] one minus the normalised Gini index of coin [N, B]; from 30 agents on approximately, as in the original."""
    n = len(coin)
    if n < 30:
        differences = (coin[:, None] - coin).abs().flatten(0, 1)
        gini = total(differences) / (2 * n * total(coin) + 1e-10)
        return 1 - gini * n / (n - 1)
    weight = torch.arange(n, 0, -1, dtype=coin.dtype, device=coin.device)[:, None]
    return 2 / (n + 1) * total(weight * coin.sort(0).values) / (total(coin) + 1e-10)


def order_key(worth: Tensor, age: Tensor, agent: Tensor) -> Tensor:
    """The order that is served first has the largest key: the one worth most, of these the oldest, of these that of the
    agent with the lowest index. Seven bits for each, so that a single maximum compares all three."""
    return worth << 14 | age << 7 | (127 - agent)


def worth_of(key: Tensor) -> Tensor:
    return key >> 14


def age_of(key: Tensor) -> Tensor:
    return key >> 7 & 127


@dataclass(eq=False)
class Economy(Description):
    """A description without state; `dataclasses.replace(env, eta=0.3)` is the same game with more risk-averse agents
    (assign nothing: constant tensors follow from the fields once, in `__post_init__`).

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
    fixed_rates: Sequence[float] | Tensor = US_FEDERAL  # where tax="fixed", or of each environment [B, brackets]
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

    # not fields: the same in every economy
    discrete = True
    action_low = 0.0
    action_high = 1.0

    def __post_init__(self):
        self.device = torch.device(self.device)
        self.layout = tuple(self.layout)
        self.cutoffs = tuple(float(cutoff) for cutoff in self.cutoffs)
        check(self)
        for name in PER_ENV:
            setattr(self, name, torch.as_tensor(getattr(self, name), dtype=self.dtype, device=self.device))
        self._build_map()
        self._build_agents()
        self._build_market()
        self._build_taxes()
        self._build_sizes()

    def _constant(self, values, dtype: torch.dtype = torch.int32, trailing: int = 1) -> Tensor:
        """A tensor of `values` with axes of length 1 behind them."""
        tensor = torch.as_tensor(values, dtype=dtype, device=self.device)
        return tensor.view(*tensor.shape, *[1] * trailing)

    def _build_map(self):
        W = self.window
        ground = torch.tensor([[SYMBOLS[symbol] for symbol in row] for row in self.layout])
        rows, columns = ground.shape
        self.size = (rows, columns)
        self.stride = columns + 2 * W  # tiles from one row to the next
        start = F.pad(ground, (W, W, W, W), value=OUTSIDE).flatten()
        self.start = self._constant(start, torch.int8)  # [T, 1] contents when an episode starts
        self.land = self._constant(start < WATER, torch.bool)  # [T, 1]
        stone = (start == FULL_STONE).nonzero()[:, 0]
        wood = (start == FULL_WOOD).nonzero()[:, 0]
        sources = torch.cat((stone, wood))
        place = torch.stack((sources // self.stride, sources % self.stride)) - W
        self.num_stones = len(stone)
        self.sources = sources.to(self.device)  # [S] tiles, stone first
        self.source_place = self._constant(place[:, None])  # [2, 1, S, 1] rows and columns
        near = torch.arange(-W, W + 1)
        self.near = self._constant((near[:, None] * self.stride + near).flatten())  # [tiles, 1] of the window
        corners = [(0, columns - 1), (rows - 1, 0), (0, 0), (rows - 1, columns - 1)]  # of the worst builder to the best
        dry = all(ground[corner] != WATER for corner in corners)
        self.corners = None  # [4] tiles, or None: agents start anywhere
        if self.ranked and self.num_agents == len(set(corners)) == 4 and dry:
            tiles = [(row + W) * self.stride + column + W for row, column in corners]
            self.corners = self._constant(tiles, trailing=0)
        self.directions = self._constant(range(4), trailing=2)  # [4, 1, 1] left, right, up, down
        self.steps = self._constant([-1, 1, -self.stride, self.stride], trailing=2)  # [4, 1, 1] tiles in each direction

    def _build_agents(self):
        N = self.num_agents
        i = torch.arange(N)
        self.payments = self._constant(RANKED_PAYMENT, self.dtype, 0)  # [4]
        self.house = self._constant(HOUSE + i)  # [N, 1] contents of a tile
        self.index = self._constant(i, trailing=2)  # [N, 1, 1] of agents
        self.myself = self._constant(torch.eye(N), torch.bool)  # [N, N, 1]
        self.earlier = self._constant(i[:, None] > i, torch.bool)  # [N, N, 1] has the second agent the lower index?
        self.others = ((i[:, None] + torch.arange(1, N)) % N).to(self.device)  # [N, N - 1] the next one first

    def _build_market(self):
        P = self.max_price + 1
        self.levels = self._constant(range(P))  # [P, 1] prices
        self.slots = self._constant(range(self.max_orders))  # [K, 1]

    def _build_taxes(self):
        self.num_rates = 1 + int(1 / self.rate_step + 1e-9)  # that a planner can choose
        self.lower = self._constant(self.cutoffs, self.dtype, 2)  # [brackets, 1, 1] coin
        self.upper = self._constant((*self.cutoffs[1:], math.inf), self.dtype, 2)
        rates = torch.as_tensor(US_FEDERAL if self.tax == "us" else self.fixed_rates, dtype=torch.float64)
        rates = rates[:, None] if rates.ndim == 1 else rates.T
        self.schedule = rates.to(self.device)  # [brackets, 1], or of each environment [brackets, B]

    def _build_sizes(self):
        N, b = self.num_agents, len(self.cutoffs)
        P = self.max_price + 1
        A = 6 + 4 * P
        O = 22 + 10 * P + b + N + 3 * (N - 1) + 5 * (2 * self.window + 1) ** 2  # see `observe`
        self.agents = tuple(f"agent_{i}" for i in range(N))
        self.cooperators = torch.ones(N, dtype=torch.bool, device=self.device)
        self.obs_sizes = (O,) * N
        self.obs_mask = self.cooperators[:, None].repeat(1, O)
        self.action_sizes = (A,) * N
        self.action_mask = self.cooperators[:, None].repeat(1, A)
        self.planner_obs_size = 6 * P + 6 + b + 7 * N
        self.noise_rows = 2 * N + len(self.sources) + b * (self.tax == "saez")

    # --------------------------------------------------------------------------------------------- reset, draw and step

    def reset(self, generators: list[torch.Generator], after: State | None = None) -> tuple[State, Tensor]:
        """Generator k alone draws the k-th block of num_envs / len(generators) environments. `after`: the last state of
        the episode before, whose counters (annealing, Saez's pairs) go on; each environment of a block gets the newest
        of all its pairs, as in ai-economist's trainer."""
        if self.num_envs % len(generators):
            raise ValueError(f"num_envs must be a multiple of the {len(generators)} generators, got {self.num_envs}")
        N = self.num_agents
        order, payment, bonus = self._block(torch.rand, generators, 3 * N).split(N)
        bonus = (torch.exp(-torch.log(1 - bonus) / 3) - 1).clamp_max(2) / 2  # min(2, Pareto(3)) / 2
        if self.corners is None:
            payment = 10 * (2 * torch.exp(-torch.log(1 - payment) / 4) - 1).clamp_max(3)  # 10 min(3, 2 Pareto(4) + 1)
            lots = self._block(torch.rand, generators, len(self.start))
            position = torch.where(self.land, lots, -1).topk(N, 0).indices
        else:
            rank = self.ranks(order).long()
            payment = self.payments[rank]
            position = self.corners[rank]
        state = self.make_state(position, payment, bonus, after)
        if after is not None and self.tax == "saez":
            blocks = state.pairs.unflatten(2, (len(generators), -1))
            newest = blocks.transpose(2, 3).flatten(1, 2)[:, : self.saez_pairs]  # [2, M, generators]
            state.pairs = newest.repeat_interleave(self.num_envs // len(generators), 2)
        return state, self.observe(state)

    def make_state(self, position: Tensor, payment: Tensor, bonus: Tensor, after: State | None = None) -> State:
        """The first state of an episode in which agents start on the tiles `position` with these skills, [N, B] each.
        The counters of `after`, a state, go on."""
        N, B = position.shape
        P, K = self.max_price + 1, self.max_orders
        M = self.saez_pairs if self.tax == "saez" else 0

        def zeros(*shape, dtype=self.dtype):
            return torch.zeros(*shape, B, dtype=dtype, device=self.device)

        # no tensor twice, or else a compiled step is compiled again
        state = State(
            tiles=self.start.repeat(1, B),
            position=position.int(),
            coin=zeros(N) + self.start_coin,
            goods=zeros(2, N, dtype=torch.int32),
            labor=zeros(N),
            side=zeros(2, N, K, dtype=torch.int8),
            price=zeros(2, N, K, dtype=torch.int8),
            age=zeros(2, N, K, dtype=torch.int8),
            history=zeros(2, P),
            rates=zeros(len(self.cutoffs)),
            last_coin=zeros(N) + self.start_coin,
            last_income=zeros(N),
            last_rate=zeros(N),
            payment=payment.to(self.dtype),
            bonus=bonus.to(self.dtype),
            utility=zeros(N),
            welfare=zeros(),
            worked=zeros(dtype=torch.int64),
            completions=zeros(dtype=torch.int64),
            pairs=torch.stack((zeros(M), zeros(M) - 1)),
            elasticity=zeros(2) + 0.5,
            t=zeros(dtype=torch.int64),
        )
        if after is not None:
            state.worked = after.worked
            state.pairs = after.pairs
            state.elasticity = after.elasticity
            state.completions = after.completions + 1
        if self.tax in ("us", "fixed"):
            state.rates = self.schedule.minimum(self.rate_limit(state)).to(self.dtype)
        state.utility = self.utility(state.coin, state.labor, self.labor_weight(state))
        state.welfare = self.social_welfare(state.coin, state.utility)
        return state

    def draw(self, generators: list[torch.Generator]) -> Tensor:
        """The random numbers of one step, uniform [2 N + S, B]: agents move in the order of the first N; the next N let
        an agent collect a second unit if below `bonus`, and S let a source (stone first, row by row) refill if below
        `regrowth`. For Saez come random rates, one per bracket."""
        return self._block(torch.rand, generators, self.noise_rows)

    def step(self, state: State, action: Tensor, noise: Tensor | None = None, planner_action: Tensor | None = None):
        """action [B, N] (see `valid_actions`), noise from `draw` (None: agents move in the order of their indices,
        nobody is lucky, nothing regrows), planner_action [B, brackets], int64 choices or floating-point rates.

        Returns state, obs [B, N, O], reward [B, N] (change of utility), terminated [B], truncated [B] and info:
        "valid_actions" [B, N, A], "planner_reward", "productivity" (everybody's coin), "equality" [B].
        """
        new = self.advance(state, action, noise, planner_action)
        coin = self.endowment(new)
        info = {
            "valid_actions": self.valid_actions(new),
            "planner_reward": new.welfare - state.welfare,
            "productivity": total(coin),
            "equality": equality_of(coin),
        }
        reward = (new.utility - state.utility).T
        truncated = new.t >= self.horizon
        return new, self.observe(new), reward, torch.zeros_like(truncated), truncated, info

    def advance(self, state: State, action: Tensor, noise: Tensor | None = None, planner_action=None) -> State:
        """A step without observations and masks. Rewards are the changes of `utility` and `welfare`."""
        N, S = self.num_agents, len(self.sources)
        P = self.max_price + 1
        if noise is None:
            noise = torch.ones(self.noise_rows, len(action), dtype=self.dtype, device=action.device)
        order, luck, growth, random_rates = noise.split((N, N, S, self.noise_rows - 2 * N - S))
        action = action.T.int().contiguous()  # batch-last in memory too
        prices = [self._prices(action, 2 + k * P) for k in range(4)]  # bids for stone, asks, bids for wood, asks
        new = self.build(state, action == BUILD)
        new = self.place_orders(new, bids=torch.stack(prices[::2]), asks=torch.stack(prices[1::2]))
        new, _ = self.match_orders(new, rounds=N)
        new = self.move(new, action - (2 + 4 * P), self.ranks(order))
        new = self.collect(new, luck < state.bonus * self.bonus_scale)
        new = self.set_rates(new, planner_action, random_rates)
        new = self._levy_if_due(new)
        new = replace(new, tiles=self.regrow(new, growth), t=state.t + 1)
        coin = self.endowment(new)
        utility = self.utility(coin, new.labor, self.labor_weight(state))
        gained = total(utility - state.utility) > 0
        welfare = self.social_welfare(coin, utility)
        return replace(new, utility=utility, welfare=welfare, worked=state.worked + gained)

    # ---------------------------------------------------------------------------------------- its parts, in their order

    def build(self, state: State, wish: Tensor) -> State:
        """A house for each agent that wishes it [N, B], has stone and wood, and stands on bare grass."""
        here = self._at(state, state.position)
        built = (wish & self._can_build(state, here)).int()
        return replace(
            state,
            tiles=self._put(state, torch.where(built > 0, self.house, here)),
            goods=state.goods - built,
            coin=state.coin + built * (state.payment * self.payment_scale),
            labor=state.labor + built * self.build_labor,
        )

    def _can_build(self, state: State, here: Tensor) -> Tensor:
        """[N, B] for agents on tiles with contents `here`."""
        return (here == GRASS) & (state.goods[STONE] > 0) & (state.goods[WOOD] > 0)

    def _at(self, state: State, tile: Tensor) -> Tensor:
        """int32 contents of the tiles [..., B]."""
        return state.tiles.gather(0, tile.flatten(0, -2).long()).view(tile.shape).int()

    def _put(self, state: State, contents: Tensor) -> Tensor:
        """Tiles with new contents [N, B] where agents stand."""
        return state.tiles.scatter(0, state.position.long(), contents.to(torch.int8))

    def _prices(self, action: Tensor, first: int) -> Tensor:
        """[N, B] of one kind of order, whose action at price 0 is `first`; -1: none."""
        price = action - first
        return torch.where((price >= 0) & (price <= self.max_price), price, -1)

    def place_orders(self, state: State, bids: Tensor, asks: Tensor) -> State:
        """Orders at prices bids and asks [R, N, B] int32, -1: none. One for which the agent lacks a slot, coin or goods
        is ignored; several of one agent count in the order stone, wood, and bid, ask."""
        coin, labor = state.coin, state.labor
        goods = list(state.goods)
        sides, prices, ages = (list(book.int()) for book in (state.side, state.price, state.age))
        for r, side in itertools.product((STONE, WOOD), (BID, ASK)):
            price = bids[r] if side == BID else asks[r]  # [N, B]
            able = coin >= price if side == BID else goods[r] > 0
            slot = torch.where(sides[r] == 0, self.slots, self.max_orders).amin(1)  # the first free one
            slot = torch.where((price >= 0) & able & (slot < self.max_orders), slot, -1)
            here = slot[:, None] == self.slots  # [N, K, B]
            sides[r] = torch.where(here, side, sides[r])
            prices[r] = torch.where(here, price[:, None], prices[r])
            ages[r] = torch.where(here, 0, ages[r])
            placed = (slot >= 0).int()
            labor = labor + placed * self.order_labor
            if side == BID:
                coin = coin - placed * price
            else:
                goods[r] = goods[r] - placed
        side, price, age = (torch.stack(book).to(torch.int8) for book in (sides, prices, ages))
        return replace(state, coin=coin, labor=labor, goods=torch.stack(goods), side=side, price=price, age=age)

    def match_orders(self, state: State, rounds: int) -> tuple[State, list]:
        """The bid of the highest priority (price, then age, then the lower index of its agent) that another agent's ask
        crosses meets the best such ask, `rounds` times; the price is the older order's, else the ask's. Then orders
        age. Orders that stayed have met before, so that no more trades are possible than there are new orders.

        Returns also, per round, the keys of bid and ask, -1 where there is no trade, and the price [R, B]."""
        price, age = state.price.int(), state.age.int()
        bids = torch.where(state.side == BID, order_key(price, age, self.index), -1)  # [R, N, K, B]
        asks = torch.where(state.side == ASK, order_key(self.max_price - price, age, self.index), -1)
        coin, goods = state.coin, state.goods
        history = self.history_decay * state.history
        deals = []
        for _ in range(rounds):
            bid, ask, buys, sells = self._best_pair(bids, asks)
            asked = self.max_price - worth_of(ask)
            paid = torch.where(age_of(bid) > age_of(ask), worth_of(bid), asked)
            refund = torch.where(buys, worth_of(bid) - paid, 0)
            coin = coin + int_sum(refund + torch.where(sells, paid, 0))
            goods = goods + buys.int()
            history = history + ((ask >= 0) & (paid == self.levels)).int()
            bids = torch.where(bids == bid[:, :, None], -1, bids)
            asks = torch.where(asks == ask[:, :, None], -1, asks)
            deals.append((bid[:, 0], ask[:, 0], paid[:, 0]))
        ends = age >= self.order_duration
        coin = coin + int_sum(torch.where(ends & (bids >= 0), price, 0), (0, 2))
        goods = goods + int_sum(ends & (asks >= 0), 2)
        stays = ((bids >= 0) | (asks >= 0)) & ~ends
        side = torch.where(stays, state.side.int(), 0).to(torch.int8)  # int32 is faster in compiled code
        age = torch.where(stays, age + 1, 0).to(torch.int8)
        return replace(state, coin=coin, goods=goods, side=side, age=age, history=history), deals

    def _best_pair(self, bids: Tensor, asks: Tensor) -> tuple[Tensor, ...]:
        """Of keys [R, N, K, B] the first bid that an ask of another agent crosses and the first such ask [R, 1, B],
        -1: none; and who buys and who sells [R, N, B]."""
        bid = bids.amax(2)  # [R, N, B] the first one of each agent
        own_ask = asks.amax(2)
        ask = torch.where(self.myself, -1, own_ask[:, None]).amax(2)  # of the others
        crosses = (bid >= 0) & (ask >= 0) & (worth_of(bid) >= self.max_price - worth_of(ask))
        first_bid = torch.where(crosses, bid, -1).amax(1, keepdim=True)
        buys = crosses & (bid == first_bid)
        first_ask = torch.where(buys, ask, -1).amax(1, keepdim=True)
        sells = (first_ask >= 0) & (own_ask == first_ask)
        return first_bid, first_ask, buys, sells

    def ranks(self, keys: Tensor) -> Tensor:
        """[N, B] int32: 0 for the smallest of keys [N, B], the first of equal ones."""
        smaller = keys[:, None] > keys
        equal = keys[:, None] == keys
        return int_sum(smaller | (equal & self.earlier), 1)

    def move(self, state: State, direction: Tensor, rank: Tensor) -> State:
        """Steps to the left, right, up or down (0 to 3, else none, [N, B]), one agent after the other by rank [N, B]:
        onto tiles without water, another's house or, at that moment, an agent."""
        position = state.position
        step = int_sum(torch.where(direction == self.directions, self.steps, 0))
        target = position + step
        target = torch.where((step != 0) & self._enterable(state, target), target, -1)
        for turn in range(self.num_agents):
            goal = int_sum(torch.where(rank == turn, target, 0))  # [B]
            taken = (position == goal).int().amax(0)
            position = torch.where((rank == turn) & (goal > 0) & (taken == 0), goal, position)
        moved = (position != state.position).int()
        return replace(state, position=position, labor=state.labor + moved * self.move_labor)

    def _enterable(self, state: State, tile: Tensor) -> Tensor:
        """May each agent, as far as the ground goes, enter its tiles [..., N, B]?"""
        code = self._at(state, tile)
        return (code < WATER) | (code == self.house)

    def collect(self, state: State, lucky: Tensor) -> State:
        """Whoever stands on a unit takes it, and one more if lucky [N, B]."""
        here = self._at(state, state.position)
        units = torch.stack((here == FULL_STONE, here == FULL_WOOD)).int()  # [R, N, B]
        any_unit = units[STONE] + units[WOOD]
        return replace(
            state,
            tiles=self._put(state, here - any_unit),
            goods=state.goods + units * (1 + lucky.int()),
            labor=state.labor + any_unit * self.collect_labor,
        )

    def set_rates(self, state: State, planner_action: Tensor | None, uniform: Tensor) -> State:
        """The rates of a new period, where one begins; uniform numbers [brackets, B] for Saez's first ones."""
        starts = state.t % self.period == 0
        limit = self.rate_limit(state)
        if self.tax == "saez":
            return self._saez_rates(state, starts, limit, uniform)
        if self.tax != "planner" or planner_action is None:
            return state
        choice = planner_action.T.contiguous()  # [brackets, B], batch-last in memory too
        if choice.is_floating_point():
            rates = choice.clamp_min(0).minimum(limit)
        else:
            rates = (choice - 1).double() * self.rate_step
            starts = starts & (choice > 0) & (choice <= self.num_rates) & (rates <= limit)
        return replace(state, rates=torch.where(starts, rates.to(self.dtype), state.rates))

    def levy(self, state: State) -> State:
        """A tax day: taxes on what endowments gained since the last one, at most the inventory; shared out."""
        income = self.income(state)
        rate = self.marginal_rate(state.rates, income)
        paid = self.tax_due(state.rates, income).minimum(state.coin)
        coin = state.coin - paid + total(paid) / self.num_agents
        last_coin = coin + self.escrow(state)[0]
        pairs = state.pairs
        if self.tax == "saez":
            newest = torch.stack((income, rate))
            pairs = torch.cat((newest, pairs), 1)[:, : self.saez_pairs]
        return replace(state, coin=coin, last_coin=last_coin, last_income=income, last_rate=rate, pairs=pairs)

    def _levy_if_due(self, state: State) -> State:
        """`levy` where a tax period ends."""
        due = (state.t + 1) % self.period == 0
        taxed = self.levy(state)
        changed = ("coin", "last_coin", "last_income", "last_rate", "pairs")
        values = {name: torch.where(due, getattr(taxed, name), getattr(state, name)) for name in changed}
        return replace(state, **values)

    def regrow(self, state: State, uniform: Tensor) -> Tensor:
        """Tiles in which the empty sources with uniform [S, B] below `regrowth` have refilled."""
        units = state.tiles[self.sources].int()
        empty = (units == STONE_SOURCE) | (units == WOOD_SOURCE)
        grown = units + (empty & (uniform < self.regrowth)).int()
        return state.tiles.scatter(0, self.sources[:, None].expand(units.shape), grown.to(torch.int8))

    # ----------------------------------------------------------------------------------------------------- observations

    def observe(self, state: State) -> Tensor:
        """[B, N, O], flat and compact: "flat" of `original_obs` without its second entry, with market rates / max_price
        and goods and past trades / 10; then what the original shows on maps:

        1           (not on maps:) own income in this tax period so far, per step
        1           taxes due on it, less the share of everybody's that comes back, per step
        3 (N - 1)   rows and columns to the others, the next one first, / sight, and 1, each; 0 where out of sight
        6           the same for the nearest stone and the nearest wood
        5 (2 window + 1)^2  tiles around the agent, row by row: stone, wood, empty source, house, may not be entered
        """
        flat = self._flat(state, self.max_price, 10.0, 10.0)
        income = self.income(state)
        due = self.tax_due(state.rates, income)
        coin = torch.stack((income, due - total(due) / self.num_agents), 1) / self.period
        place = self._place(state)
        blocks = [flat, coin, self._others(place), self._nearest(state, place), *self._window(state)]
        obs = torch.cat(blocks, 1)  # [N, O, B]
        return obs.flatten(0, 1).T.contiguous().view(-1, *obs.shape[:2])

    def planner_obs(self, state: State) -> Tensor:
        """[B, G] of the planner, who sees neither map nor skills: "planner_flat" of `original_obs` without its last
        three entries, then "planner_agents", in the units of `observe`."""
        flat = self._planner_flat(state, self.max_price, 10.0)
        agents = self._planner_agents(state, 10.0).flatten(0, 1)
        return torch.cat((flat, agents)).T.contiguous()

    def global_state(self, state: State) -> Tensor:
        """[B, N O + G] for centralised critics: what everybody sees, the planner included."""
        return torch.cat((self.observe(state).flatten(1), self.planner_obs(state)), 1)

    def _flat(self, state: State, price_unit: float, goods_unit: float, trades_unit: float) -> Tensor:
        """[N, F, B] ai-economist's flat observations of agents, without build_skill."""
        rows, columns = self.size
        row, column = self._place(state)
        asks, bids = self._order_counts(state)
        rate = self.marginal_rate(state.rates, self.income(state))
        own = [state.coin / 100, *(state.goods / goods_unit), column / columns, row / rows]
        blocks = [
            state.payment[:, None] / 10,
            int_sum(asks) - asks,
            int_sum(bids) - bids,
            self.market_rate(state) / price_unit,
            asks,
            bids,
            state.history.flatten(0, 1) / trades_unit,
            state.bonus[:, None],
            *self._tax_facts(state),
            rate[:, None],
            self._clock(state),
            torch.stack(own, 1),
        ]
        return torch.cat([block.to(self.dtype).expand(self.num_agents, -1, -1) for block in blocks], 1)

    def _planner_flat(self, state: State, price_unit: float, trades_unit: float) -> Tensor:
        """[G - 6 N, B] ai-economist's flat observations of the planner, without its empty inventory."""
        asks, bids = self._order_counts(state)
        blocks = [
            int_sum(asks),
            int_sum(bids),
            self.market_rate(state) / price_unit,
            state.history.flatten(0, 1) / trades_unit,
            *self._tax_facts(state),
            self._clock(state),
        ]
        return torch.cat([block.to(self.dtype) for block in blocks])

    def _planner_agents(self, state: State, goods_unit: float) -> Tensor:
        """[N, 6, B] what the planner sees of each agent."""
        rate = self.marginal_rate(state.rates, self.income(state))
        income = state.last_income / self.period
        return torch.stack([rate, income, state.last_rate, state.coin / 100, *(state.goods / goods_unit)], 1)

    def _order_counts(self, state: State) -> tuple[Tensor, Tensor]:
        """Each agent's open asks and bids at each price, [N, R P, B]."""
        side = state.side[:, :, :, None]
        at_price = state.price[:, :, :, None].int() == self.levels  # [R, N, K, P, B]
        asks = int_sum((side == ASK) & at_price, 2)
        bids = int_sum((side == BID) & at_price, 2)
        return asks.transpose(0, 1).flatten(1, 2), bids.transpose(0, 1).flatten(1, 2)

    def market_rate(self, state: State) -> Tensor:
        """[R, B] mean price of past trades, recent ones first."""
        return total(self.levels * state.history, 1) / total(state.history, 1).clamp_min(0.001)

    def _tax_facts(self, state: State) -> list[Tensor]:
        """Rates [brackets, B]; first day of a period? tax day? [2, B]; sorted incomes of the last one [N, B]."""
        day = state.t % self.period
        days = torch.stack((day == 0, day == self.period - 1))
        income = state.last_income / self.period
        incomes = torch.where(self.ranks(income) == self.index, income, 0).sum(1)  # torch.sort is slower once compiled
        return [state.rates, days, incomes]

    def _clock(self, state: State) -> Tensor:
        """[2, B] shares of the period and of the episode that are over."""
        day = state.t % self.period
        return torch.stack(((day + 1) / self.period, state.t / self.horizon))

    def _place(self, state: State) -> Tensor:
        """[2, N, B] rows and columns (stacked, so that compiled code divides once)."""
        return torch.stack((state.position // self.stride, state.position % self.stride)) - self.window

    def _others(self, place: Tensor) -> Tensor:
        """[N, 3 (N - 1), B] where the others are, see `observe`."""
        way = place[:, self.others] - place[:, :, None]  # [2, N, N - 1, B]
        seen = (way.abs().amax(0) <= self.sight).to(self.dtype)
        offsets = way * seen / self.sight
        return torch.stack((*offsets, seen), 2).flatten(1, 2)

    def _nearest(self, state: State, place: Tensor) -> Tensor:
        """[N, 6, B] where the nearest stone and wood are, see `observe`."""
        units = state.tiles[self.sources].int()
        rows, columns = self.source_place - place[:, :, None]  # [N, S, B] each
        full = (units == FULL_STONE) | (units == FULL_WOOD)
        seen = full & (torch.maximum(rows.abs(), columns.abs()) <= self.sight)
        # a way packed behind its length, so that a single minimum finds the nearest one
        far = 1 << 28
        length = rows.abs() + columns.abs()
        ways = torch.where(seen, length << 16 | (rows + 128) << 8 | (columns + 128), far)
        stone = ways[:, : self.num_stones].amin(1)
        wood = ways[:, self.num_stones :].amin(1)
        way = torch.stack((stone, wood), 1)  # [N, R, B]
        row = (way >> 8 & 255) - 128
        column = (way & 255) - 128
        entries = torch.stack((row, column, torch.full_like(way, self.sight)), 2)  # [N, R, 3, B]
        entries = torch.where(way[:, :, None] < far, entries, 0) / self.sight
        return entries.flatten(1, 2).to(self.dtype)

    def _window(self, state: State) -> list[Tensor]:
        """Five [N, tiles, B], see `observe`."""
        code = self._at(state, state.position[:, None] + self.near)
        channels = (
            code == FULL_STONE,
            code == FULL_WOOD,
            (code == STONE_SOURCE) | (code == WOOD_SOURCE),
            code >= HOUSE,
            (code >= WATER) & (code != self.house[:, None]),
        )
        return [channel.to(self.dtype) for channel in channels]

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
        maps, index_maps = self._original_maps(state)
        flat = self._flat(state, 1.0, 100.0, 100.0)
        return {
            "map": maps.permute(4, 3, 0, 1, 2),
            "index_map": index_maps.permute(4, 3, 0, 1, 2),
            "flat": torch.cat((flat[:, :1], flat), 1).permute(2, 0, 1),
            "planner_flat": F.pad(self._planner_flat(state, 1.0, 100.0).T, (0, 3)),
            "planner_agents": self._planner_agents(state, 100.0).permute(2, 0, 1),
        }

    def _original_maps(self, state: State) -> tuple[Tensor, Tensor]:
        """[7, V, V, N, B] bool and [2, V, V, N, B] int32, see `original_obs`."""
        rows, columns = self.size
        row, column = self._place(state)
        near = torch.arange(-self.sight, self.sight + 1, device=self.device)[:, None, None]
        r = row + near[:, None]  # [V, 1, N, B]
        c = column + near  # [V, N, B]
        inside = (r >= 0) & (r < rows) & (c >= 0) & (c < columns)  # [V, V, N, B]
        tile = (r + self.window) * self.stride + c + self.window
        code = torch.where(inside, self._at(state, tile.clamp(0, len(self.start) - 1)), OUTSIDE)
        maps = [
            code == FULL_STONE,
            code == FULL_WOOD,
            code >= HOUSE,
            code == WATER,
            (code == STONE_SOURCE) | (code == FULL_STONE),
            (code == WOOD_SOURCE) | (code == FULL_WOOD),
            inside,
        ]
        i = self.house - HOUSE  # [N, 1]
        there = inside[:, :, None] & (tile[:, :, None] == state.position[:, None])  # [V, V, agent seen, N, B]
        agent = torch.where(there, i[:, None], -1).amax(2)
        who = torch.stack((code - HOUSE, agent))
        index_maps = torch.where(who < 0, 0, torch.where(who == i, 1, who + 2))
        return torch.stack(maps), index_maps

    # ------------------------------------------------------------------------------------------------------------ masks

    def valid_actions(self, state: State) -> Tensor:
        """[B, N, A] bool: what `step` would not ignore. 0 does nothing, 1 builds; then come bids for stone at each
        price, asks, the same for wood; then left, right, up, down, which fail if somebody else gets there first. (The
        attribute `action_mask` only says which actions exist: all.)"""
        build = self._can_build(state, self._at(state, state.position))  # [N, B]
        slot = (state.side == 0).any(2)  # [R, N, B] is one free?
        bids = slot[:, None] & (state.coin >= self.levels[:, None])  # [R, P, N, B]
        asks = (slot & (state.goods > 0))[:, None].expand_as(bids)
        target = state.position + self.steps  # [4, N, B]
        taken = ((target[:, :, None] == state.position) & ~self.myself).any(2)
        moves = self._enterable(state, target) & ~taken
        nothing = torch.ones_like(build)
        mask = torch.cat((nothing[None], build[None], bids[STONE], asks[STONE], bids[WOOD], asks[WOOD], moves))
        return mask.permute(2, 1, 0)

    def valid_rates(self, state: State) -> Tensor:
        """[B, brackets, 1 + rates] bool: choice 0 keeps a rate, the others set it where a period starts."""
        rate = torch.arange(-1, self.num_rates, dtype=torch.float64, device=self.device) * self.rate_step
        starts = (state.t % self.period == 0) & (self.tax == "planner")
        allowed = (rate <= self.rate_limit(state)[:, None]) & starts[:, None]
        valid = (rate < 0) | allowed  # [B, 1 + rates]
        return valid[:, None].expand(-1, len(self.cutoffs), -1)

    # ------------------------------------------------------------------------------------------------------------ taxes

    def rate_limit(self, state: State) -> Tensor:
        """[B] float64: the highest tax rate so far in the annealing."""
        if self.tax_warmup is None:
            return torch.ones_like(state.t, dtype=torch.float64)
        return (self.tax_slope * (state.completions.double() - self.tax_warmup)).clamp(0, 1)

    def _saez_rates(self, state: State, starts: Tensor, limit: Tensor, uniform: Tensor) -> State:
        """By Saez's formula where a period starts [B], or random until there are enough incomes; limit [B]."""
        ready = state.pairs[1, -1] >= 0
        estimate = estimate_elasticity(state.pairs, state.elasticity)
        elasticity = estimate[0] if self.saez_elasticity is None else self.saez_elasticity
        *_, rates = saez_schedule(state.pairs.double(), elasticity, self.cutoffs, self.saez_uniform)
        rates = torch.where(ready, rates.clamp_min(0).minimum(limit), limit * uniform).to(self.dtype)
        return replace(
            state,
            rates=torch.where(starts, rates, state.rates),
            elasticity=torch.where(starts & ready, estimate, state.elasticity),
        )

    def escrow(self, state: State) -> tuple[Tensor, Tensor]:
        """Coin [N, B] and goods [R, N, B] int32 that open orders set aside."""
        coin = int_sum(torch.where(state.side == BID, state.price.int(), 0), (0, 2))
        goods = int_sum(state.side == ASK, 2)
        return coin, goods

    def endowment(self, state: State) -> Tensor:
        """[N, B] coin, what open bids set aside included."""
        return state.coin + self.escrow(state)[0]

    def income(self, state: State) -> Tensor:
        """[N, B] coin since the last tax day."""
        return self.endowment(state) - state.last_coin

    def marginal_rate(self, rates: Tensor, income: Tensor) -> Tensor:
        """[N, B] of the bracket with this income [N, B]; 0 below 0."""
        inside = (income >= self.lower) & (income < self.upper)  # [brackets, N, B]
        return torch.where(inside, rates[:, None], 0).sum(0)

    def tax_due(self, rates: Tensor, income: Tensor) -> Tensor:
        """[N, B] on incomes [N, B]."""
        taxed = (income - self.lower).clamp_min(0).minimum(self.upper - self.lower)  # [brackets, N, B] coin
        return total(rates[:, None] * taxed)

    # ----------------------------------------------------------------------------------------------------------- reward

    def labor_weight(self, state: State) -> Tensor | float:
        """[B] what the labor coefficient is multiplied with."""
        if not self.labor_constant:
            return 1.0
        n = state.worked if self.labor_schedule == "auto" else state.completions
        return 1 - torch.exp(-n.to(self.dtype) / self.labor_constant)

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
        values = coin if self.objective == "inverse_income_coin" else utility
        return total(weight / total(weight) * values)

    # ---------------------------------------------------------------------------------------------------------- picture

    def render(self, state: State, index: int = 0, size: int = 400) -> np.ndarray:
        """[about 5/4 size, size, 3] uint8 picture of one environment: stone grey, wood green (pale: an empty source),
        water blue, agents as discs and their houses as squares; below, what each has."""
        rows, columns = self.size
        W, N = self.window, self.num_agents
        cell = 3 * size // columns  # drawn large and scaled down, which smooths
        line = 3 * size // 16  # height of a line of text
        width, height = cell * columns, cell * rows
        image = Image.new("RGB", (width, height + line * (N + 1)), GROUND[GRASS])
        draw = ImageDraw.Draw(image)
        font = ImageFont.load_default(line * 0.55)

        def box(row, column, rim=0):
            x, y = column * cell, row * cell
            return (x + rim, y + rim, x + cell - rim, y + cell - rim)

        contents = state.tiles[:, index].view(-1, self.stride)[W : W + rows, W : W + columns].tolist()
        for row, column in itertools.product(range(rows), range(columns)):
            code = contents[row][column]
            draw.rectangle(box(row, column), GROUND[min(code, HOUSE)])
            if code >= HOUSE:
                draw.rectangle(box(row, column, cell // 7), COLOURS[(code - HOUSE) % len(COLOURS)])
        places = self._place(state)[..., index].T.tolist()
        stone, wood = state.goods[..., index].tolist()
        coin = self.endowment(state)[:, index].tolist()
        labor = state.labor[:, index].tolist()
        for i, (row, column) in enumerate(places):
            colour = COLOURS[i % len(COLOURS)]
            draw.ellipse(box(row, column), colour, "black", width=line // 14)
            y = height + line * (i + 0.2)
            draw.rectangle((line // 4, y, line, y + 0.6 * line), colour)
            words = f"{coin[i]:.0f} coin, {stone[i]} stone, {wood[i]} wood, {labor[i]:.0f} labor"
            draw.text((1.3 * line, y), words, "black", font)
        rates = " ".join(f"{100 * rate:.0f}" for rate in state.rates[:, index].tolist())
        draw.text((line // 4, height + line * (N + 0.1)), f"step {state.t[index]}, taxes {rates} %", "black", font)
        return np.asarray(image.resize((size, size * image.height // width), Image.Resampling.LANCZOS))


# ------------------------------------------------------------------------------------------------------- Saez's formula


def estimate_elasticity(pairs: Tensor, before: Tensor) -> Tensor:
    """[2, B] elasticity of income and intercept: from pairs [2, M, B] (incomes, marginal rates) by regression of log
    income on log(1 - rate), smoothed; as before where few incomes are positive or rates do not differ."""
    income, rate = pairs
    used = (income > 0) & (rate >= 0) & (rate < 1)
    count = used.sum(0)

    def mean(values):
        return total(torch.where(used, values, 0)) / count.clamp_min(1)

    x = torch.log((1 - rate).clamp_min(1e-9))
    y = torch.log(income.clamp_min(1e-9))
    mean_x, mean_y = mean(x), mean(y)
    variance = mean((x - mean_x) ** 2)
    slope = mean((x - mean_x) * (y - mean_y)) / torch.where(variance > 0, variance, 1)
    elasticity = 0.02 * slope.relu() + 0.98 * before[0]
    intercept = mean_y - slope * mean_x
    rates_differ = mean((rate - mean(rate)) ** 2) >= 1e-12
    return torch.where((count >= 10) & rates_differ, torch.stack((elasticity, intercept)), before)


def saez_schedule(pairs: Tensor, elasticity: Tensor, cutoffs: Sequence[float], uniform=False, bins=100) -> list[Tensor]:
    """Social weights g, Pareto parameters a and marginal rates (1 - g) / (1 - g + a elasticity) [bins + 1, B] each, of
    `bins` equal bins up to the last cut-off and an open one, and mean rates [brackets, B], from pairs [2, M, B]: Saez
    2001 as ai-economist discretises it, with social weights 1 / income or 1 (uniform)."""
    income = pairs[0]
    valid = pairs[1] >= 0
    top = cutoffs[-1]
    width = top / bins
    edges = torch.arange(bins + 1, dtype=pairs.dtype, device=pairs.device) * width
    middle = 0.5 * (edges[:-1] + edges[1:])[:, None]
    index = income_bins(income, top, bins)
    counts = index.new_zeros(bins + 2, index.shape[1], dtype=torch.int32)
    counts = counts.scatter_add(0, index, valid.int()).to(pairs.dtype)
    rich = valid & (index == bins + 1)

    def social_weight(income):
        return torch.ones_like(income) if uniform else 1 / income.clamp_min(1)

    rich_weight = total(torch.where(rich, social_weight(income), 0))
    weight = torch.cat((counts[1:-1] * social_weight(middle), rich_weight[None]))
    share = weight / (total(weight) + counts[0] + 1e-9)  # incomes below 0 weigh 1
    density = counts[1:] / counts.sum(0)
    share_above, people_above = sum_upwards(torch.stack((share, density), 1)).unbind(1)
    g = share_above / (people_above + 1e-9)
    g = torch.cat((0.5 * (g[:-1] + g[1:]), g[-1:]))
    above_middle = (people_above[1:] + 0.5 * density[:-1]).clamp(0, 1)
    a = middle * density[:-1] / (above_middle + 1e-9) / width
    rich_income = total(torch.where(rich, income, 0)) / counts[-1].clamp_min(1)
    rich_a = torch.where(counts[-1] > 0, rich_income / (rich_income - top + 1e-9), 0)
    a = torch.cat((a, rich_a[None]))
    rate = (1 - g) / (1 - g + a * elasticity + 1e-9)
    full = torch.cat((counts[1:-1], torch.ones_like(counts[:1]))) > 0
    rate = fill_gaps(rate, full)
    below = torch.stack([(cutoff - edges[:-1]).clamp(0, width) for cutoff in cutoffs])
    overlap = below.diff(dim=0) / below.sum(1).diff()[:, None]  # [brackets - 1, bins] share of each bracket
    brackets = torch.cat((total(overlap[..., None] * rate[:-1], 1), rate[-1:]))
    return [g, torch.where(full, a, math.nan), rate, brackets]


def income_bins(income: Tensor, top: float, bins: int) -> Tensor:
    """int64 index of the bin of each income: 1 to `bins` of equal bins up to `top`, 0 below 0, bins + 1 above top.
    torch.searchsorted is slow in compiled code."""
    width = top / bins
    index = (income / width).floor()
    too_low = (income >= (index + 1) * width).to(income.dtype)
    too_high = (income < index * width).to(income.dtype)
    index = index + too_low - too_high
    return torch.where(income > top, bins + 1, (index + 1).clamp(0, bins)).long()


def sum_upwards(values: Tensor) -> Tensor:
    """[bins + 1, ...] sums of each row and all above it, from the highest down: torch.cumsum is not deterministic on
    GPUs, and near 0 / 0 the order matters."""
    rows = itertools.accumulate(values.flip(0).unbind())
    return torch.stack(list(rows)).flip(0)


def fill_gaps(rate: Tensor, full: Tensor) -> Tensor:
    """Rates [bins + 1, B] with those of bins that are not full on the line between their full neighbours; 0 to the left
    of all bins. The last bin is full."""
    last = len(rate) - 1
    index = torch.arange(last + 1, dtype=torch.int32, device=rate.device)[:, None]
    left = torch.where(full, index, -1).cummax(0).values
    right = torch.where(full, index, last).flip(0).cummin(0).values.flip(0)
    left_rate = torch.where(left < 0, 0, rate.gather(0, left.clamp_min(0).long()))
    right_rate = rate.gather(0, right.long())
    line = left_rate + (right_rate - left_rate) * ((index - left) / (right - left).clamp_min(1))
    return torch.where(full, rate, line)


# ------------------------------------------------------------------------------------------------------------ the tasks

SMALL = {
    "layout": tuple(TINY),
    "horizon": 100,
    "regrowth": 0.03,
    "period": 20,
    "cutoffs": tuple(cutoff / 5 for cutoff in CUTOFFS),
    "sight": 4,
    "window": 2,
}
TASKS = {"economy_v0": {}, "economy_tiny_v0": SMALL}


def make(
    env_id: str,
    num_envs: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    num_agents: int | None = None,
    continuous_actions: bool = False,
    **changes,
) -> Economy:
    """`changes` are fields of `Economy` by name. Actions are always discrete: continuous_actions, which other
    environments know, is ignored.

    Raises ValueError for an unknown task or field, or a value that is out of range."""
    if env_id not in TASKS:
        raise ValueError(f"env_id must be one of {', '.join(TASKS)}, got {env_id!r}")
    known = [field.name for field in fields(Economy)[5:]]
    for name in changes:
        if name not in known:
            raise ValueError(f"fields of {env_id} are {', '.join(known)}, got {name!r}")
    if num_agents is not None:
        changes["num_agents"] = num_agents
    return Economy(env_id, num_envs, device, dtype, **TASKS[env_id] | changes)


COUNTS = "num_envs horizon max_price max_orders order_duration period saez_pairs sight window".split()
LARGEST = {"num_agents": 120, "max_price": 126, "order_duration": 126, "sight": 100}  # for int8 and for packed numbers
RANGES = {"eta": (0.9999, "between 0 and 0.999"), "regrowth": (1, "between 0 and 1")}  # of PER_ENV; else 0 or more


def check(env: Economy):
    """Raises ValueError for the first field that is out of range."""

    def require(holds: bool, name: str, rule: str):
        if not holds:
            raise ValueError(f"{name} must be {rule}, got {getattr(env, name)!r}")

    for name in COUNTS:
        require(getattr(env, name) >= 1, name, "1 or more")
    for name, most in LARGEST.items():
        require(getattr(env, name) <= most, name, f"{most} or less")
    for name in ("start_coin", "labor_constant", "tax_slope"):
        require(0 <= getattr(env, name) < math.inf, name, "0 or more")
    for name in ("history_decay", "equality_weight"):
        require(0 <= getattr(env, name) <= 1, name, "between 0 and 1")
    require(env.tax in TAXES, "tax", f"one of {', '.join(TAXES)}")
    require(env.objective in OBJECTIVES, "objective", f"one of {', '.join(OBJECTIVES)}")
    require(env.labor_schedule in ("auto", "decay"), "labor_schedule", "auto or decay")
    symbols = "".join(env.layout)
    even = len({len(row) for row in env.layout}) == 1
    drawn = {"s", "w"} <= set(symbols) <= set(SYMBOLS)
    require(even and drawn, "layout", "equally long rows of . ~ s w with an s and a w")
    require(env.num_agents >= 2, "num_agents", "2 or more")
    land = len(symbols) - symbols.count("~")
    require(env.num_agents <= land, "num_agents", "no more than the tiles without water")
    brackets = len(env.cutoffs)
    rising = all(low < high < math.inf for low, high in itertools.pairwise(env.cutoffs))
    require(brackets > 1 and env.cutoffs[0] == 0 and rising, "cutoffs", "two or more, rising from 0")
    if env.tax == "us":
        require(brackets == 7, "cutoffs", "7 for the US rates")
    if env.tax == "fixed":
        rates = torch.as_tensor(env.fixed_rates, dtype=torch.float64)
        shaped = rates.shape in ((brackets,), (env.num_envs, brackets))
        good = shaped and bool(((rates >= 0) & (rates <= 1)).all())
        require(good, "fixed_rates", f"{brackets} numbers between 0 and 1")
    require(0 < env.rate_step <= 1, "rate_step", "above 0, at most 1")
    require(math.isfinite(env.tax_warmup or 0.0), "tax_warmup", "None or finite")
    require(0 <= (env.saez_elasticity or 0.0) < math.inf, "saez_elasticity", "None or 0 or more")
    for name in PER_ENV:
        value = torch.as_tensor(getattr(env, name))
        if value.shape not in ((), (env.num_envs,)):
            raise ValueError(f"{name} must be a number or [num_envs = {env.num_envs}], got {list(value.shape)}")
        most, rule = RANGES.get(name, (1e9, "0 or more"))
        require(bool(((value >= 0) & (value <= most)).all()), name, rule)


@runs.arguments
class World:
    """What a script lets its user choose of the economy."""

    eta_train: Annotated[tuple[Eta, ...], Field(min_length=1, max_length=2)] = (0.23,)
    """the agents' risk aversion in training; two: from the first to the second, evenly over environments"""
    rates: tuple[runs.Share, ...] | str = (0.5,)
    """marginal rates of method fixed, and where a planner's schedule starts: one, one per bracket, these for each seed,
    or the schedule.json or schedule.csv of a run"""
    objective: Literal[OBJECTIVES] = OBJECTIVES[0]
    """the planner's: equality times productivity, or coin or utility weighted by the inverse of income"""
    labor_coef: NonNegativeFloat = 0.21  # utility that a unit of labor costs
    num_agents: PositiveInt = 4  # N
    horizon: PositiveInt | None = None  # steps of an episode; None: the map's, 100 or 1,000
    period: PositiveInt | None = None  # steps from tax day to tax day; None: the map's, 20 or 100
    cutoffs: tuple[NonNegativeFloat, ...] | None = None  # coin where brackets begin; None: the map's
    rate_step: Annotated[float, Field(gt=0, le=1)] = 0.25
    """a planner's policy chooses among multiples of this rate (AI Economist: 0.05, which takes far more episodes)"""

    def __post_init__(self):
        if isinstance(self.rates, str):
            try:
                schedules = read_schedules(self.rates)
            except OSError as error:
                raise ValueError(f"rates must be numbers or a schedule file, got {self.rates}: {error}") from None
            self.rates = tuple(itertools.chain(*schedules.values()))


def fields_of(args: World, num_runs: int, eta: Tensor | None = None) -> dict:
    """Fields of an `Economy` with args.num_envs environments for each of `num_runs` runs, with eta [num_runs] or that
    of training, which is the same in both halves of a run's environments. Raise ValueError if they do not fit."""
    fields = {name: getattr(args, name) for name in ("objective", "labor_coef", "num_agents", "rate_step")}
    for name in ("horizon", "period", "cutoffs"):
        if getattr(args, name) is not None:
            fields[name] = getattr(args, name)
    task = {"horizon": Economy.horizon, "period": Economy.period} | TASKS[args.env_id] | fields
    horizon, period = task["horizon"], task["period"]
    if period > horizon:
        raise ValueError(f"period must be at most {horizon}, the steps of an episode, got {period}")
    fields["eta"] = args.eta_train[0]
    if eta is not None:
        fields["eta"] = eta.repeat_interleave(args.num_envs)
    elif len(args.eta_train) == 2:
        even = torch.linspace(*args.eta_train, args.num_envs // 2)
        fields["eta"] = even.repeat(2 * num_runs)
    if args.method == "fixed":
        fields["fixed_rates"] = spread_rates(args, num_runs).repeat_interleave(args.num_envs, 0)
    return fields


def repeat_runs(env: Economy, num_runs: int, copies: int) -> Economy:
    """`env` with the environments of each of its runs `copies` times, [num_runs, copies, environments of a run]; itself
    where no constant differs between environments."""
    changes = {}
    for name in (*PER_ENV, "fixed_rates"):
        value = torch.as_tensor(getattr(env, name))
        if value.ndim == 1 + (name == "fixed_rates"):
            blocks = [value.unflatten(0, (num_runs, -1))] * copies
            changes[name] = torch.cat(blocks, 1).flatten(0, 1)
    return replace(env, num_envs=copies * env.num_envs, **changes) if changes else env


# ----------------------------------------------------------------------------------------- schedules of marginal rates


def spread_rates(args: World, num_runs: int) -> Tensor:
    """Marginal rates [num_runs, brackets] of args.rates: one for all, one per bracket, or one per bracket of each of
    args.num_seeds seeds, which repeat. Raise ValueError if there are others."""
    brackets = len(args.cutoffs or CUTOFFS)
    counts = (1, brackets, args.num_seeds * brackets)
    if len(args.rates) not in counts:
        raise ValueError(f"--rates must be one, one per bracket or these of each seed, {counts}, got {len(args.rates)}")
    width = 1 if len(args.rates) == 1 else brackets
    rates = torch.tensor(args.rates).view(-1, width).expand(-1, brackets)
    return rates.repeat(num_runs // len(rates), 1)


def random_schedules(shape: tuple[int, int], generators: list[torch.Generator]) -> Tensor:
    """Marginal rates [S, *shape], the last axis brackets: a uniform rate for all and uniform rates for each, in
    a uniform mixture. Independent rates alone hardly change what an income is taxed with."""
    count, brackets = shape
    uniform = per_seed(torch.rand, (count, 2 + brackets), generators)
    share, level, rates = uniform.split((1, 1, brackets), 2)
    return rates.lerp(level, share)


def write_schedules(folder: Path, env: Economy, schedules: dict[int, Sequence[float]]) -> None:
    """schedule.csv and schedule.json of marginal rates [brackets] by seed; `read_schedules` reads either."""
    rows = []
    for seed, rates in schedules.items():
        for bracket, (cutoff, rate) in enumerate(zip(env.cutoffs, rates)):
            rows.append({"seed": seed, "bracket": bracket, "from_coin": cutoff, "rate": rate})
    runs.write_rows(folder / "schedule.csv", rows)
    facts = {"env_id": env.env_id, "period": env.period, "cutoffs": env.cutoffs}
    with runs.written(folder / "schedule.json") as file:
        json.dump(facts | {"schedules": schedules}, file, indent=2)


def read_schedules(path: str | Path) -> dict[int, tuple[float, ...]]:
    """Marginal rates [brackets] by seed, of a schedule.json or schedule.csv. Raise ValueError if it is no such file."""
    try:
        if Path(path).suffix == ".json":
            table = json.loads(Path(path).read_text(encoding="utf-8"))["schedules"]
        else:
            table = {}
            for row in runs.read_rows(path):
                table.setdefault(row["seed"], []).append(row["rate"])
        schedules = {int(seed): tuple(map(float, rates)) for seed, rates in table.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"no schedule of marginal rates in {path}: {error!r}") from None
    rates = list(itertools.chain(*schedules.values()))
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(f"marginal rates must be between 0 and 1, got {rates} in {path}")
    return schedules


# ------------------------------------------------------------------------------------------- what episodes come to


@dataclass
class Layout:
    """How the environments of S runs lie in a wide batch [..., S * L * B]: L slices, in each the B environments of a
    run, of which blocks of B / copies are copies of the same games."""

    num_runs: int
    num_slices: int
    copies: int

    def repeat(self, x: Tensor) -> Tensor:
        """[..., S * B] -> the first block of games of each run in all blocks and slices [..., S * L * B]."""
        games = x.unflatten(-1, (self.num_runs, self.copies, -1))[..., :1, :]
        return torch.cat([games] * (self.num_slices * self.copies), -2).flatten(-3)

    def joint(self, x: Tensor) -> Tensor:
        """[..., S * L * B] -> the last slice, in which nobody deviates [..., S * B]."""
        return x.unflatten(-1, (self.num_runs, self.num_slices, -1))[..., -1, :].flatten(-2)

    def by_agent(self, x: Tensor) -> Tensor:
        """[S * L * B, N, ...] -> [S, N, L, B, ...]."""
        return by_agent(x, self.num_runs).unflatten(2, (self.num_slices, -1))

    def gumbel(self, shape: Sequence[int], generators: list[torch.Generator]) -> Tensor:
        """Noise [S, n, 1, B, ...] for logits of shape [S, n, L, B, ...], the same in all copies of a game."""
        _, n, _, B, *rest = shape
        noise = per_seed(gumbel, (n, 1, B // self.copies, *rest), generators)
        return torch.cat([noise] * self.copies, 3)


def of_all(function: Callable[[Tensor], Tensor], state: State) -> State:
    """The state of which each tensor is function(that of `state`)."""
    return State(**{name: function(x) for name, x in vars(state).items()})


def filmed(env: Economy) -> tuple[Callable, list[np.ndarray]]:
    """env.step, and a list of some 125 pictures of environment 0 in an episode, which fills as it is called."""
    frames = []
    count = itertools.count()

    def step(state: State, *rest) -> tuple:
        if next(count) % max(1, env.horizon // 125) == 0:
            frames.append(env.render(state, 0))
        return env.step(state, *rest)

    return step, frames


FACTS = ("coin", "labor", "payment", "houses", "income", "rates")  # of E episodes, see `describe`


def facts(env: Economy, last: State, tax_days: Sequence[State], num_runs: int) -> dict[str, Tensor]:
    """FACTS of episodes that ended in `last`, with states after each of D tax days: [S, N, E], rates [S, b, E, D]."""
    houses = [int_sum(last.tiles == HOUSE + i) for i in range(env.num_agents)]
    values = {
        "coin": env.endowment(last),
        "labor": last.labor,
        "payment": last.payment,
        "houses": torch.stack(houses),
        "income": sum(day.last_income for day in tax_days),
    }
    values = {name: x.unflatten(1, (num_runs, -1)).movedim(1, 0) for name, x in values.items()}
    rates = torch.stack([day.rates for day in tax_days], 2)
    return values | {"rates": rates.unflatten(1, (num_runs, -1)).movedim(1, 0)}


def charts(episodes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics [S] of episodes: `describe`, and the returns of agents and planner, rewards [S, n, E, T]."""
    metrics = {f"charts/{name}": values for name, values in describe(episodes).items()}
    metrics["charts/episodic_return"] = episodes["rewards"].sum(3).mean((1, 2))
    metrics["charts/planner_return"] = episodes["planner_rewards"].sum(3).mean((1, 2))
    return metrics


def describe(facts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over E episodes of S runs, [S] each, of what agents have at the end: coin, labor, houses [S, N, E]; and of
    the marginal rates of D tax periods [S, brackets, E, D]. Welfare is equality times productivity, the sum of all coin
    (ERMAS, Eq. 19 to 21)."""
    coin = facts["coin"]
    equality = equality_of(coin.transpose(0, 1).flatten(1)).view(len(coin), -1)
    productivity = coin.sum(1)
    return {
        "welfare": (equality * productivity).mean(1),
        "equality": equality.mean(1),
        "productivity": productivity.mean(1),
        "houses": facts["houses"].sum(1).to(coin.dtype).mean(1),
        "labor": facts["labor"].sum(1).mean(1),
        "tax_rate": facts["rates"].mean((1, 2, 3)),
    }


def by_skill(facts: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Means over the episodes of all runs of what the worst builder to the best one (by coin per house) earn by
    building, by trade (net) and by the redistribution of taxes (net), [N] each."""
    values = {name: facts[name].transpose(0, 1).flatten(1).double().cpu() for name in FACTS[:-1]}  # [N, S * E]
    built = values["houses"] * values["payment"]
    sources = {
        "building": built,
        "trade": values["income"] - built,
        "taxes": values["coin"] - values["income"],
    }
    order = values["payment"].argsort(0)
    return {name: coin.gather(0, order).mean(1).numpy() for name, coin in sources.items()}


def check_epsilon(regrets: Moments, args) -> None:
    """Say so if the standard error of the regrets of ERMAS's agents is above args.epsilon / 2: then chance decides
    whether a regret exceeds epsilon."""
    _, error = regrets.mean_and_error(args.regret_decay)
    if args.method == "ermas" and error.max() > args.epsilon / 2:
        print(
            f"epsilon {args.epsilon:g} is not measurable with {args.num_envs} environments: "
            f"the standard error of an agent's regret is {error.max():.2g} a step, more than half of it"
        )


def report(run: runs.Run, env: Economy, args, tests: dict[str, Tensor]) -> None:
    """What a run has found, facts of test episodes by args.eval_eta [Q, S, ...]: a table on the terminal, welfare.csv,
    schedule.csv, schedule.json and report.png in the run's folder, and in wandb. Rates and incomes are those of the eta
    that is nearest to the ones in training, env.eta."""
    etas = args.eval_eta
    labels = {"env_id": args.env_id, "method": args.method}
    if args.method == "ermas":
        labels["epsilon"] = args.epsilon
    rows = []
    for k, seed in enumerate(run.seeds):
        for q, eta in enumerate(etas):
            measures = describe({name: values[q, k : k + 1] for name, values in tests.items()})
            row = labels | {"seed": seed, "eta": eta}
            rows.append(row | {name: value.item() for name, value in measures.items()})
    runs.write_rows(run.dir / "welfare.csv", rows)
    table = {}  # of each measure [S, Q]
    for name in measures:
        table[name] = np.array([row[name] for row in rows]).reshape(len(run.seeds), -1)
    several = len(run.seeds) > 1
    over = f"mean and 95% interval over {len(run.seeds)} seeds" if several else "one seed"
    title = ", ".join(map(str, labels.values()))
    print(f"\n{title}: new agents, {over}")
    print(f"{'eta':>6s}" + "".join(f"{name:>18s}" for name in table))
    for q, eta in enumerate(etas):
        line = f"{eta:6g}"
        for values in table.values():
            half = f" ± {half_interval(values[:, q]):.2g}" if several else ""
            line += f"{f'{values[:, q].mean():.3g}{half}':>18s}"
        print(line)
    trained = env.eta.flatten().tolist()
    nearest = min(range(len(etas)), key=lambda q: abs(etas[q] - sum(trained) / len(trained)))
    schedules = tests["rates"][nearest].double().mean((2, 3)).tolist()
    write_schedules(run.dir, env, dict(zip(run.seeds, schedules)))
    rates = {f"eta {eta:g}": tests["rates"][q] for q, eta in enumerate(etas)}
    figure = new_figure(17, 3.8)
    welfare, parts, schedule, income = figure.subplots(1, 4)
    plot_welfare(welfare, etas, table["welfare"], (min(trained), max(trained)))
    plot_parts(parts, etas, table)
    plot_rates(schedule, env.cutoffs, rates)
    plot_income(income, by_skill({name: values[nearest] for name, values in tests.items()}))
    figure.suptitle(f"{title}, {over}")
    with runs.written(run.dir / "report.png", "wb") as file:
        figure.savefig(file, dpi=100)
    tables = [[row for row in rows if row["seed"] == seed] for seed in run.seeds]
    runs.log_report(run, {"welfare": tables}, {"report": run.dir / "report.png"})


def plot_welfare(axis, etas: Sequence[float], welfare: np.ndarray, trained: Sequence[float]):
    """Welfare [S, Q] of new agents, with 95% intervals over seeds (ERMAS, Figure 6)."""
    half = np.nan_to_num(half_interval(welfare))
    axis.errorbar(etas, welfare.mean(0), half, marker="o", capsize=3)
    for eta in trained:
        axis.axvline(eta, color="gray", ls="--", lw=1)
    axis.set(xlabel="eta of the test's agents", title="equality x productivity")


def plot_parts(axis, etas: Sequence[float], table: dict[str, np.ndarray]):
    axis.plot(etas, table["productivity"].mean(0), marker="o")
    right = axis.twinx()
    right.plot(etas, table["equality"].mean(0), marker="s", color="C1")
    right.set_ylim(0, 1)
    axis.set(xlabel="eta of the test's agents", title="productivity (dots), equality (squares, right)")


def plot_rates(axis, cutoffs: Sequence[float], rates: dict[str, Tensor]):
    """Mean marginal rate of each bracket, of rates [S, brackets, E, D]."""
    edges = [*cutoffs, 1.25 * cutoffs[-1]]
    for name, values in rates.items():
        axis.stairs(values.mean((0, 2, 3)).cpu().numpy(), edges, label=name)
    axis.set(xlabel="income in a tax period (coin)", ylim=(-0.02, 1.02), title="mean marginal tax rate")
    axis.legend(fontsize=7)


def plot_income(axis, sources: dict[str, np.ndarray]):
    """Bars of each agent's coin by source, losses downwards."""
    low = high = np.zeros(len(sources["building"]))
    for name, coin in sources.items():
        bottom = np.where(coin >= 0, high, low)
        axis.bar(range(len(coin)), coin, bottom=bottom, label=name)
        low = low + np.minimum(coin, 0)
        high = high + np.maximum(coin, 0)
    axis.set(xlabel="agents, the worst builder first", title="coin in an episode, by source")
    axis.set_xticks(range(len(low)))
    axis.axhline(0, color="black", lw=0.8)
    axis.legend(fontsize=8)


def write_gif(env: Economy, path: str):
    """An episode of environment 0 with random valid actions of everybody, the planner too, in about 125 frames."""
    generator = torch.Generator().manual_seed(0)

    def choose(mask):
        uniform = torch.rand(mask.shape, generator=generator).to(env.device)
        return torch.where(mask, uniform, -1).argmax(-1)

    frames = []
    state, _ = env.reset([generator])
    for t in range(env.horizon):
        if t % max(1, env.horizon // 125) == 0:
            frames.append(env.render(state))
        action = choose(env.valid_actions(state))
        rates = choose(env.valid_rates(state))
        state, *_ = env.step(state, action, env.draw([generator]), rates)
    save_gif(path, frames)


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
    print_speed(replace(env, horizon=50), actions, seconds, compile)
    if gif:
        write_gif(replace(env, num_envs=1), gif)
        print(f"wrote {gif}")


if __name__ == "__main__":
    with runs.quiet_pipe():
        tyro.cli(main)
