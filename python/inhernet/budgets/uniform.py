"""The same rank, or the same share of its parameters, for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..checks import need_fraction, need_int
from .allocate import Grid, Layer, ratio_rank
from .base import Budget, Decision, Scene


@dataclass(frozen=True)
class UniformRank(Budget):
    """The same rank for every selected layer; a layer whose break-even is not above it stays dense.

    Example: ``UniformRank(16)``.
    """

    rank: int
    kind: ClassVar[str] = "uniform_rank"

    def __post_init__(self) -> None:
        need_int("UniformRank.rank", self.rank, 1)

    def spend(self, scene: Scene) -> dict[str, Decision]:
        rank = self.rank if scene.own_ranks else scene.grid.below(self.rank)
        return {layer.name: rank for layer in scene.layers}


@dataclass(frozen=True)
class UniformRatio(Budget):
    """Every selected layer keeps at most `ratio` of its own parameters, heads, gate and biases counted.

    Example: ``UniformRatio(0.5)``.
    """

    ratio: float
    kind: ClassVar[str] = "uniform_ratio"

    def __post_init__(self) -> None:
        need_fraction("UniformRatio.ratio", self.ratio)

    def spend(self, scene: Scene) -> dict[str, Decision]:
        return {layer.name: at_ratio(layer, self.ratio, scene.guard, scene.grid) for layer in scene.layers}


def at_ratio(layer: Layer, ratio: float, guard: bool, grid: Grid) -> Decision:
    """The rank of a layer that keeps at most this share of its parameters."""
    rank = ratio_rank(layer, ratio, guard, grid)
    if rank == 0:
        return f"not even rank 1 fits in {100 * ratio:g} % of {layer.dense_params:,} parameters"
    if rank is None:
        return f"at {100 * ratio:g} % of its parameters the rank reaches break-even {layer.break_even}"
    return rank
