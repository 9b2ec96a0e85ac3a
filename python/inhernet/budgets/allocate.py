"""Ranks for the layers a budget governs."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Cost, kept squared singular values, rank (None: dense).
_Point = tuple[float, float, "int | None"]


class Layer(Protocol):
    """What is looked at of a layer: a matrix `[N, K]` that may get a rank."""

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int | None
    heads: int
    gate: bool

    @property
    def dense_params(self) -> int: ...
    @property
    def break_even(self) -> int: ...
    def cost(self, rank: int) -> int: ...
    def largest_rank(self, params: float) -> int: ...
    def limit(self, guard: bool) -> int: ...


#: What a layer costs at a rank (None: dense), in the unit of a budget.
Price = Callable[[Layer, "int | None"], float]


def params(layer: Layer, rank: int | None) -> int:
    """The price in parameters."""
    return layer.dense_params if rank is None else layer.cost(rank)


@dataclass(frozen=True)
class Grid:
    """The ranks that may be given out: from each start on the multiples of a number, `((start, multiple), …)`, ascending.

    A start is a multiple of the number before it and of its own.
    """

    steps: tuple[tuple[int, int], ...] = ((1, 1),)

    @property
    def first(self) -> int:
        return self.steps[0][1]

    def multiple(self, rank: int) -> int:
        """What ranks about as large as this are multiples of."""
        return next((multiple for start, multiple in reversed(self.steps) if rank >= start), self.first)

    def below(self, rank: int) -> int:
        """The largest of these ranks up to `rank`; `rank` itself where it is smaller than all of them."""
        return rank // self.multiple(rank) * self.multiple(rank) if rank >= self.first else rank

    def above(self, rank: int) -> int:
        """The smallest of these ranks from `rank` on."""
        return -(-rank // self.multiple(rank)) * self.multiple(rank)


#: What "auto" gives out for a kind of device; single ranks for the others, where nothing else was measured to be faster.
#: cuda: BERT at 50 % (H200, 4 layers, 128 × 128 tokens) took 7.07 ms with ranks as they came, 3.83 with multiples of 8,
#: 2.73 of 64, its teacher 2.48. The smaller steps below 128 are a rule, not a measurement.
FAST = {"cuda": Grid(((1, 8), (16, 16), (128, 64)))}


def grid_of(round_to: int | str, device: str | None) -> Grid:
    """The ranks of a configuration."""
    return Grid(((1, round_to),)) if isinstance(round_to, int) else FAST.get(device or "cpu", Grid())


def ratio_rank(layer: Layer, ratio: float, guard: bool, grid: Grid = Grid()) -> int | None:
    """The largest rank whose cost is at most `ratio` of the dense parameters; None when the layer is dense at that
    ratio.

    0 means that not even rank 1 fits.
    """
    if ratio >= 1.0:
        return None
    rank = grid.below(layer.largest_rank(ratio * layer.dense_params + 1e-6))
    return None if rank >= layer.limit(guard) else rank


def energy_rank(spectrum: Tensor, energy: float) -> int:
    """The smallest rank that keeps at least `energy` of the squared singular values (1 for a spectrum of zeros)."""
    squares = spectrum.to(torch.float64).square()
    if float(squares.sum()) == 0.0:
        return 1
    kept = squares.cumsum(0) / squares.sum()
    # 1e-12: the cumulative sum of a full spectrum rounds to 1 − 1e-16, and energy=1.0 must still find a rank.
    return min(int((kept < energy - 1e-12).sum()) + 1, len(squares))


def uniform_ranks(
    layers: Sequence[Layer], allowed: float, guard: bool, grid: Grid, price: Price = params, unit: str = "parameters"
) -> dict[str, int | None]:
    """One ratio for all layers, the largest whose total is within `allowed`; where ranks move in multiples, what these leave
    goes to the layers farthest below that ratio.

    Raises ValueError when even the smallest ranks cost more.
    """
    floor = {layer.name: _least(layer, guard, grid, price) for layer in layers}

    def at(ratio: float) -> dict[str, int | None]:
        wanted = {layer.name: ratio_rank(layer, ratio, guard, grid) for layer in layers}
        return {name: floor[name] if rank == 0 else rank for name, rank in wanted.items()}

    if _total(layers, at(1.0), price) <= allowed:
        return at(1.0)
    _need(layers, floor, allowed, price, unit)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(layers, at(middle), price) <= allowed else (low, middle)
    return at(low) if grid == Grid() else _evened_out(layers, at(low), allowed, guard, grid, price)


def _evened_out(
    layers: Sequence[Layer], ranks: dict[str, int | None], allowed: float, guard: bool, grid: Grid, price: Price
) -> dict[str, int | None]:
    """One more step of the grid to the layer with the smallest share of its parameters, as long as one can be paid."""
    left = allowed - _total(layers, ranks, price)
    queue = [(params(layer, ranks[layer.name]) / layer.dense_params, i) for i, layer in enumerate(layers)]
    heapq.heapify(queue)
    while queue:
        place = heapq.heappop(queue)[1]
        layer = layers[place]
        rank = ranks[layer.name]
        if rank is None or (above := grid.above(rank + 1)) >= layer.limit(guard):
            continue
        step = price(layer, above) - price(layer, rank)
        if step <= left:
            left, ranks[layer.name] = left - step, above
            heapq.heappush(queue, (layer.cost(above) / layer.dense_params, place))
    return ranks


def global_ranks(
    layers: Sequence[Layer],
    spectra: dict[str, Tensor],
    allowed: float,
    guard: bool,
    grid: Grid = Grid(),
    rank_step: int = 8,
    price: Price = params,
    unit: str = "parameters",
) -> dict[str, int | None]:
    """Ranks given out globally: always to the layer whose next ranks keep most per parameter they cost.

    The squared singular values must be in one currency across layers (two-sided weighting; the activation energy of a
    layer is not: METHODS measured it worse than uniform ranks). A layer may move by several steps at once, and its last
    step is "stay dense": just below break-even the whole tail of its spectrum comes for a handful of parameters. Steps
    that the remaining budget cannot pay are not considered, so the total never exceeds `allowed`.

    Raises ValueError when even the smallest ranks cost more than `allowed`.
    """
    ranks: dict[str, int | None] = {layer.name: _least(layer, guard, grid, price) for layer in layers}
    _need(layers, ranks, allowed, price, unit)
    give_out_from(layers, ranks, spectra, allowed, guard, grid, rank_step, price, dense=True)
    return ranks


def give_out_from(
    layers: Sequence[Layer],
    ranks: dict[str, int | None],
    spectra: Mapping[str, Tensor],
    allowed: float,
    guard: bool,
    grid: Grid = Grid(),
    rank_step: int = 8,
    price: Price = params,
    dense: bool = False,
) -> None:
    """Raise `ranks`, in place, as `global_ranks` does, to a total of at most `allowed`; `dense`: up to leaving a layer so."""
    left = allowed - _total(layers, ranks, price)
    # Coarse steps look past small dips of a spectrum; single ranks then spend what no coarse step could pay.
    for step in (rank_step, 1):
        points = {
            layer.name: _points(layer, ranks[layer.name], spectra[layer.name], guard, grid, step, price)
            for layer in layers
        }
        if not dense:
            points = {name: [point for point in found if point[2] is not None] for name, found in points.items()}
        left = _give_out(points, ranks, left)


def _give_out(points: dict[str, list[_Point]], ranks: dict[str, int | None], left: float) -> float:
    """Move `ranks` along `points`, best step first, until no step can be paid; returns what is left."""
    at = dict.fromkeys(points, 0)
    queue = [(-slope, name, to) for name in points for slope, to in [_best_step(points[name], 0, left)] if to]
    heapq.heapify(queue)
    while queue:
        _, name, to = heapq.heappop(queue)
        here, there = points[name][at[name]], points[name][to]
        if there[0] - here[0] <= left:
            left -= there[0] - here[0]
            at[name], ranks[name] = to, there[2]
        # Either the layer has moved, or what it wanted became too dear: look again with what is left.
        slope, to = _best_step(points[name], at[name], left)
        if to:
            heapq.heappush(queue, (-slope, name, to))
    return left


def _steps(layer: Layer, grid: Grid, rank_step: int, start: int, stop: int) -> list[int]:
    """The ranks between `start` and `stop` that a layer moves by: every `rank_step`, but not more than a sixteenth of the
    full rank (a 16-channel convolution moves by single ranks)."""
    step = max(1, min(rank_step, min(layer.shape) // 16))

    def grain(rank: int) -> int:
        return -(-step // grid.multiple(rank)) * grid.multiple(rank)

    return [rank for rank in range(start + 1, stop) if rank % grain(rank) == 0]


def _least(layer: Layer, guard: bool, grid: Grid, price: Price) -> int | None:
    """The smallest sensible rank: the first of the grid, or less in a layer too small for it; None if no rank saves
    anything."""
    limit = layer.limit(guard)
    least = None if limit <= 1 else min(grid.first, limit - 1)
    return None if least is not None and price is not params and price(layer, least) >= price(layer, None) else least


def _points(
    layer: Layer, start: int | None, spectrum: Tensor, guard: bool, grid: Grid, rank_step: int, price: Price
) -> list[_Point]:
    """From rank `start` on: what the layer may cost, what it then keeps, the rank (None: dense); all increasing."""
    dense = price(layer, None)
    if start is None:
        return [(dense, 0.0, None)]
    kept = torch.cat([spectrum.new_zeros(1), spectrum.square().cumsum(0)]).tolist()
    points: list[_Point] = [(price(layer, start), kept[start], start)]
    for rank in _steps(layer, grid, rank_step, start, layer.limit(guard)):
        cost = price(layer, rank)
        if cost >= dense:
            continue
        if cost <= points[-1][0]:  # a measured price may stand still: the larger rank for the same
            points[-1] = (points[-1][0], kept[rank], rank)
        else:
            points.append((cost, kept[rank], rank))
    return [*points, (dense, kept[-1], None)] if points[0][0] < dense else points


def _best_step(points: list[_Point], at: int, left: float) -> tuple[float, int]:
    """Slope and index of the affordable point with most kept per parameter; the farthest of equals; index 0 if none."""
    best = (0.0, 0)
    for to in range(at + 1, len(points)):
        cost = points[to][0] - points[at][0]
        if cost > left:
            break
        best = max(best, ((points[to][1] - points[at][1]) / cost, to))
    return best


def _total(layers: Sequence[Layer], ranks: dict[str, int | None], price: Price) -> float:
    return sum(price(layer, ranks[layer.name]) for layer in layers)


def _need(layers: Sequence[Layer], smallest: dict[str, int | None], allowed: float, price: Price, unit: str) -> None:
    total = _total(layers, smallest, price)
    if total > allowed:
        counts = [f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for value in (allowed, total)]
        raise ValueError(
            f"budget leaves {counts[0]} {unit} for the {len(layers)} layers it governs, but the smallest ranks already cost "
            f"{counts[1]}; raise the budget, lower heads or round_to, or exclude layers"
        )
