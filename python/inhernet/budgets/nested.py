"""Ranks for several budgets at once, each layer's growing with the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .allocate import Grid, Layer, give_out_from, params, uniform_ranks


def nested_ranks(
    layers: Sequence[Layer],
    first: Mapping[str, int | None],
    allowed: Sequence[float],
    spectra: Mapping[str, Tensor] | None,
    guard: bool,
    grid: Grid,
    rank_step: int,
    dense: bool = True,
) -> list[dict[str, int | None]]:
    """Ranks for budgets that grow, none of a layer's ever smaller than for the budget before.

    FlexRank (ICML 2026) chooses nested ranks by dynamic programming over all layers. What a layer keeps is concave in its
    rank (its singular values fall), so that the same is done by always giving the next ranks to the layer where they keep
    most for what they cost, going on from the smaller budget's ranks.

    Args:
        layers: whose ranks are given out.
        first: ranks for the smallest budget; a layer that is dense (None) stays it for all larger ones.
        allowed: parameters for each larger budget, ascending.
        spectra: in one currency across layers; None: the same ratio everywhere.
        guard, grid, rank_step: as for a plan.
        dense: whether a layer may become dense where no rank pays.
    """
    ranks, found = dict(first), []
    for amount in allowed:
        growing = [layer for layer in layers if ranks[layer.name] is not None]
        left = amount - sum(params(layer, None) for layer in layers if ranks[layer.name] is None)
        if spectra is not None:
            give_out_from(growing, ranks, spectra, left, guard, grid, rank_step, dense=dense)
        else:
            even = uniform_ranks(growing, left, guard, grid)
            for layer in growing:
                wanted = even[layer.name]
                most = None if dense else grid.below(layer.limit(guard) - 1)
                ranks[layer.name] = most if wanted is None else max(wanted, ranks[layer.name] or 1)
        found.append(dict(ranks))
    return found
