"""Memory for parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..checks import MOST, is_int, is_number, refuse
from .allocate import Layer, params
from .base import Budget, Decision, Scene, give_out, ranks_or_dense, settled


@dataclass(frozen=True)
class ByteBudget(Budget):
    """Bytes of the parameters, in the dtypes that the teacher has, given out globally; the total never exceeds it.

    `amount`: a float in (0, 1] is a fraction of what the dense parameters of the whole model (``of="model"``) or of the
    selected layers (``of="selected"``) take; an integer above 1 is a number of bytes for the same. Factors have their layer's
    dtype: for half the bytes at equal ranks convert ``teacher.bfloat16()``. Example: ``ByteBudget(10_000_000)``.
    """

    amount: float | int
    of: str = "model"
    kind: ClassVar[str] = "bytes"

    def __post_init__(self) -> None:
        if not (is_int(self.amount) and 1 < self.amount <= MOST) and not (
            is_number(self.amount) and 0.0 < self.amount <= 1.0
        ):
            refuse("ByteBudget.amount", self.amount, f"a fraction above 0 and at most 1, or bytes from 2 to {MOST:,}")
        if self.of not in ("selected", "model"):
            refuse("ByteBudget.of", self.of, "'selected' or 'model'")

    def spend(self, scene: Scene) -> dict[str, Decision]:
        def price(layer: Layer, rank: int | None) -> float:
            return params(layer, rank) * scene.bytes_each(layer)

        before = int(sum(price(layer, None) for layer in scene.selected))
        rest = scene.model_bytes() - before if self.of == "model" else 0
        whole = is_int(self.amount) and self.amount > 1
        allowed = self.amount if whole else math.floor(self.amount * (before + rest) + 1e-6)
        return ranks_or_dense(give_out(scene, allowed - rest - settled(scene, price), price, "bytes"))
