"""The smallest network whose output stays near the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..checks import need_fraction
from .allocate import params
from .base import Budget, Decision, Scene, give_out, ranks_or_dense, settled

# Halvings of the share of the parameters: 2⁻⁸ is 0.4 %.
HALVINGS = 8


@dataclass(frozen=True)
class FidelityBudget(Budget):
    """The fewest parameters with which the output's error on (up to 512 samples of) the calibration data is at most `error`.

    The error is `‖model − teacher‖ / ‖teacher‖` as `verify` reports it, of the network as decomposed: refinement then
    lowers it further. Needs calibration data. Example: ``FidelityBudget(0.1)``.
    """

    error: float
    kind: ClassVar[str] = "fidelity"

    def __post_init__(self) -> None:
        need_fraction("FidelityBudget.error", self.error)

    def spend(self, scene: Scene) -> dict[str, Decision]:
        dense = sum(layer.dense_params for layer in scene.selected)
        spent = settled(scene, params)
        low, high = 0.0, 1.0
        best: dict[str, int | None] = dict.fromkeys((layer.name for layer in scene.layers), None)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            try:
                ranks = give_out(scene, middle * dense - spent, params, "parameters")
            except ValueError:  # not even the smallest ranks
                low = middle
                continue
            if scene.error(ranks) <= self.error:
                high, best = middle, ranks
            else:
                low = middle
        return ranks_or_dense(best)
