"""A number of multiply-accumulates for one example."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..checks import MOST, is_int, is_number, refuse
from .allocate import Layer
from .base import Budget, Decision, Scene, give_out, ranks_or_dense, settled


@dataclass(frozen=True)
class MacBudget(Budget):
    """Multiply-accumulates of the selected layers for one example, given out globally; the total never exceeds it.

    `amount`: a float in (0, 1] is a fraction of the dense layers'; an integer above 1 is absolute. Merged heads are
    counted, as `summary` does: a gated linear layer `rows·(R·K + H·N·R + H·R)`, a gated convolution the mixing of its heads
    once per image. It needs calibration data or `plan(example_inputs=)`, for the sizes of images and texts.
    Example: ``MacBudget(0.5)``.
    """

    amount: float | int
    kind: ClassVar[str] = "macs"

    def __post_init__(self) -> None:
        if not (is_int(self.amount) and 1 < self.amount <= MOST) and not (
            is_number(self.amount) and 0.0 < self.amount <= 1.0
        ):
            refuse(
                "MacBudget.amount", self.amount, f"a fraction above 0 and at most 1, or an integer from 2 to {MOST:,}"
            )

    def spend(self, scene: Scene) -> dict[str, Decision]:
        def price(layer: Layer, rank: int | None) -> float:
            return macs(layer, rank, *scene.positions(layer))

        dense = sum(price(layer, None) for layer in scene.selected)
        whole = is_int(self.amount) and self.amount > 1
        allowed = self.amount if whole else math.floor(self.amount * dense + 1e-6)
        return ranks_or_dense(give_out(scene, allowed - settled(scene, price), price, "multiply-accumulates"))


def macs(layer: Layer, rank: int | None, positions: int, per_gate: int) -> int:
    """Multiply-accumulates of a layer at `positions` rows or pixels, `per_gate` of which share one gate."""
    rows, columns = layer.shape
    if rank is None:
        return positions * rows * columns
    images = positions // per_gate if layer.kind == "conv2d" else None
    return low_rank_macs(rows, columns, rank, layer.heads if layer.gate else None, positions, images)


def low_rank_macs(rows: int, columns: int, rank: int, heads: int | None, positions: int, images: int | None) -> int:
    """The same of two factors; `heads` None without a gate, `images` None where every position has a gate of its own."""
    if heads is None:
        return positions * rank * (columns + rows)
    if images is None:
        return positions * rank * (columns + heads * rows + heads)
    return positions * rank * (columns + rows) + images * heads * rank * (rows + 1)
