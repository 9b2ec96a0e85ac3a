"""A number of parameters for all layers together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..checks import MOST, is_int, is_number, refuse
from .allocate import params
from .base import Budget, Decision, Scene, give_out, ranks_or_dense, settled


@dataclass(frozen=True)
class ParamBudget(Budget):
    """A number of parameters, given out globally; the total never exceeds it.

    `amount`: a float in (0, 1] is a fraction of the dense parameters (weights and biases) of the selected layers
    (``of="selected"``) or of the whole model (``of="model"``: everything that is not selected counts too); an integer
    above 1 is an absolute number of parameters of the same. What rules fix is counted first; where rules fix every
    layer the budget is idle. Example: ``ParamBudget(0.5)``, ``ParamBudget(400_000, "model")``.
    """

    amount: float | int
    of: str = "selected"
    kind: ClassVar[str] = "params"

    def __post_init__(self) -> None:
        if is_int(self.amount) and 1 < self.amount <= MOST:
            pass
        elif not is_number(self.amount) or not 0.0 < self.amount <= 1.0:
            refuse(
                "ParamBudget.amount", self.amount, f"a fraction above 0 and at most 1, or an integer from 2 to {MOST:,}"
            )
        if self.of not in ("selected", "model"):
            refuse("ParamBudget.of", self.of, "'selected' or 'model'")

    def target(self, dense: int) -> int:
        """Parameters allowed when `dense` is the dense count of what the budget is about."""
        if is_int(self.amount) and self.amount > 1:
            return int(self.amount)
        return math.floor(self.amount * dense + 1e-6)

    def spend(self, scene: Scene) -> dict[str, Decision]:
        before = sum(layer.dense_params for layer in scene.selected)
        if self.of == "model":
            allowed = self.target(scene.model_params) - (scene.model_params - before)
        else:
            allowed = self.target(before)
        return ranks_or_dense(give_out(scene, allowed - settled(scene, params), params, "parameters"))
