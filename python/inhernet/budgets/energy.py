"""As much of every layer as keeps a share of its singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..checks import need_fraction
from .allocate import energy_rank
from .base import Budget, Decision, Scene


@dataclass(frozen=True)
class EnergyBudget(Budget):
    """Every layer takes the smallest rank that keeps `energy` of its squared singular values.

    The singular values are those of the initialisation's own weighting (plain, activation or fisher).
    Example: ``EnergyBudget(0.95)``.
    """

    energy: float
    kind: ClassVar[str] = "energy"

    def __post_init__(self) -> None:
        need_fraction("EnergyBudget.energy", self.energy)

    def spend(self, scene: Scene) -> dict[str, Decision]:
        found = {layer.name: energy_rank(scene.spectrum(layer), self.energy) for layer in scene.layers}
        return {name: scene.grid.above(rank) for name, rank in found.items()}
