"""Ranks for the layers a budget governs."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from .layers import LayerPlan

# Cost in parameters, kept squared singular values, rank (None: dense).
_Point = tuple[int, float, "int | None"]


def rounded(rank: int, round_to: int) -> int:
    """`rank` down to a multiple of `round_to`, but not below the first multiple if the rank itself is smaller."""
    return rank // round_to * round_to if rank >= round_to else rank


def ratio_rank(layer: LayerPlan, ratio: float, guard: bool, round_to: int = 1) -> int | None:
    """The largest rank whose cost is at most `ratio` of the dense parameters; None when the layer is dense at that
    ratio.

    0 means that not even rank 1 fits.
    """
    if ratio >= 1.0:
        return None
    rank = rounded(layer.largest_rank(ratio * layer.dense_params + 1e-6), round_to)
    return None if rank >= layer.limit(guard) else rank


def energy_rank(spectrum: Tensor, energy: float) -> int:
    """The smallest rank that keeps at least `energy` of the squared singular values (1 for a spectrum of zeros)."""
    squares = spectrum.to(torch.float64).square()
    if float(squares.sum()) == 0.0:
        return 1
    kept = squares.cumsum(0) / squares.sum()
    # 1e-12: the cumulative sum of a full spectrum rounds to 1 − 1e-16, and energy=1.0 must still find a rank.
    return min(int((kept < energy - 1e-12).sum()) + 1, len(squares))


def uniform_ranks(layers: list[LayerPlan], allowed: int, guard: bool, round_to: int) -> dict[str, int | None]:
    """One ratio for all layers, the largest whose total is within `allowed`.

    Raises ValueError when even the smallest ranks cost more.
    """
    floor = {layer.name: _least(layer, guard, round_to) for layer in layers}

    def at(ratio: float) -> dict[str, int | None]:
        wanted = {layer.name: ratio_rank(layer, ratio, guard, round_to) for layer in layers}
        return {name: floor[name] if rank == 0 else rank for name, rank in wanted.items()}

    if _total(layers, at(1.0)) <= allowed:
        return at(1.0)
    _need(layers, floor, allowed)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(layers, at(middle)) <= allowed else (low, middle)
    return at(low)


def global_ranks(
    layers: list[LayerPlan],
    spectra: dict[str, Tensor],
    allowed: int,
    guard: bool,
    round_to: int = 1,
    rank_step: int = 8,
) -> dict[str, int | None]:
    """Ranks given out globally: always to the layer whose next ranks keep most per parameter they cost.

    The squared singular values must be in one currency across layers (two-sided weighting; the activation energy of a
    layer is not: METHODS measured it worse than uniform ranks). A layer may move by several steps at once, and its last
    step is "stay dense": just below break-even the whole tail of its spectrum comes for a handful of parameters. Steps
    that the remaining budget cannot pay are not considered, so the total never exceeds `allowed`.

    Raises ValueError when even the smallest ranks cost more than `allowed`.
    """
    ranks: dict[str, int | None] = {layer.name: _least(layer, guard, round_to) for layer in layers}
    left = allowed - _need(layers, ranks, allowed)
    # Coarse steps look past small dips of a spectrum; single ranks then spend what no coarse step could pay.
    for step in (rank_step, 1):
        points = {
            layer.name: _points(layer, ranks[layer.name], spectra[layer.name], guard, round_to, step)
            for layer in layers
        }
        left = _give_out(points, ranks, left)
    return ranks


def _give_out(points: dict[str, list[_Point]], ranks: dict[str, int | None], left: int) -> int:
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


def _grain(layer: LayerPlan, round_to: int, rank_step: int) -> int:
    """`rank_step`, but not more than a sixteenth of the full rank (a 16-channel convolution moves by single ranks)."""
    step = max(1, min(rank_step, min(layer.shape) // 16))
    return -(-step // round_to) * round_to


def _least(layer: LayerPlan, guard: bool, round_to: int) -> int | None:
    """The smallest sensible rank: `round_to`, or less in a layer too small for it; None if no rank saves anything."""
    limit = layer.limit(guard)
    return None if limit <= 1 else min(round_to, limit - 1)


def _points(
    layer: LayerPlan, start: int | None, spectrum: Tensor, guard: bool, round_to: int, rank_step: int
) -> list[_Point]:
    """From rank `start` on: what the layer may cost, what it then keeps, the rank (None: dense); all increasing."""
    if start is None:
        return [(layer.dense_params, 0.0, None)]
    kept = torch.cat([spectrum.new_zeros(1), spectrum.square().cumsum(0)]).tolist()
    grain = _grain(layer, round_to, rank_step)
    ranks = range((start // grain + 1) * grain, layer.limit(guard), grain)
    points: list[_Point] = [(layer.cost(start), kept[start], start)]
    points += [(layer.cost(rank), kept[rank], rank) for rank in ranks if layer.cost(rank) < layer.dense_params]
    return [*points, (layer.dense_params, kept[-1], None)] if points[0][0] < layer.dense_params else points


def _best_step(points: list[_Point], at: int, left: int) -> tuple[float, int]:
    """Slope and index of the affordable point with most kept per parameter; the farthest of equals; index 0 if none."""
    best = (0.0, 0)
    for to in range(at + 1, len(points)):
        cost = points[to][0] - points[at][0]
        if cost > left:
            break
        best = max(best, ((points[to][1] - points[at][1]) / cost, to))
    return best


def _total(layers: list[LayerPlan], ranks: dict[str, int | None]) -> int:
    return sum(_price(layer, ranks[layer.name]) for layer in layers)


def _price(layer: LayerPlan, rank: int | None) -> int:
    return layer.dense_params if rank is None else layer.cost(rank)


def _need(layers: list[LayerPlan], smallest: dict[str, int | None], allowed: int) -> int:
    total = _total(layers, smallest)
    if total > allowed:
        raise ValueError(
            f"budget leaves {allowed:,} parameters for the {len(layers)} layers it governs, but the smallest ranks "
            f"already cost {total:,}; raise the budget, lower heads or round_to, or exclude layers"
        )
    return total
