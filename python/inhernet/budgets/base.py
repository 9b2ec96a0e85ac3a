"""What a budget is: a few numbers that survive a trip through JSON, and the ranks that they allow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..checks import known_keys, refuse
from .allocate import Grid, Layer, Price, global_ranks, uniform_ranks


class Scene(Protocol):
    """What a budget may look at: the layers, and what ranks would cost or change."""

    layers: Sequence[Layer]  # whose ranks the budget decides
    selected: Sequence[Layer]  # those, and the ones that rules have decided
    model_params: int
    guard: bool  # ranks that save no parameters are refused
    grid: Grid
    own_ranks: bool  # ranks that the user names are kept, whatever the grid
    rank_step: int

    def is_global(self) -> bool:
        """Whether ranks are given out in one currency across layers (else the same ratio everywhere)."""

    def spectrum(self, layer: Layer, shared: bool = False) -> Tensor:
        """Singular values of the layer in its initialisation's weighting; `shared`: in the currency across layers."""

    def bytes_each(self, layer: Layer) -> int:
        """Bytes of one of the layer's numbers."""

    def model_bytes(self) -> int:
        """What all parameters of the dense model take."""

    def positions(self, layer: Layer) -> tuple[int, int]:
        """Rows (or pixels) that the layer computes for one example, and how many of them share a gate."""

    def milliseconds(self, layer: Layer, rank: int | None) -> float:
        """Measured time of the layer at a rank (None: dense), between measured ranks interpolated."""

    def latency(self, ranks: Mapping[str, int | None] | None) -> float:
        """Measured time of the whole network with these ranks, in milliseconds (None: the teacher's)."""

    def error(self, ranks: Mapping[str, int | None]) -> float:
        """`‖model − teacher‖ / ‖teacher‖` of the output with these ranks, on calibration data."""


# A rank, or why the layer stays dense.
Decision = int | str
DENSE = "the budget leaves it dense"


@dataclass(frozen=True)
class Budget(ABC):
    """Base of all budgets. A new one is a frozen dataclass with a `kind` and a `spend`; it is known by being defined."""

    kind: ClassVar[str]
    known: ClassVar[dict[str, type[Budget]]] = {}

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            Budget.known[cls.kind] = cls

    @abstractmethod
    def spend(self, scene: Scene) -> Mapping[str, Decision]:
        """A decision for each of `scene.layers`, by name. Raises ValueError naming the nearest budget that is possible."""


def ranks_or_dense(ranks: Mapping[str, int | None]) -> dict[str, Decision]:
    return {name: DENSE if rank is None else rank for name, rank in ranks.items()}


def give_out(scene: Scene, allowed: float, price: Price, unit: str) -> dict[str, int | None]:
    """Ranks whose prices add up to at most `allowed`: globally where the layers share a currency, else one ratio."""
    if not scene.layers:
        return {}  # rules have fixed every rank: nothing is left to give out
    if not scene.is_global():
        return uniform_ranks(scene.layers, allowed, scene.guard, scene.grid, price, unit)
    spectra = {layer.name: scene.spectrum(layer, shared=True) for layer in scene.layers}
    return global_ranks(scene.layers, spectra, allowed, scene.guard, scene.grid, scene.rank_step, price, unit)


def settled(scene: Scene, price: Price) -> float:
    """What the layers cost that rules have decided."""
    free = {layer.name for layer in scene.layers}
    return sum(price(layer, layer.rank) for layer in scene.selected if layer.name not in free)


def budget_to_dict(budget: Budget) -> dict[str, Any]:
    """The budget as plain JSON data; `kind` says which one it is."""
    return {"kind": budget.kind, **asdict(budget)}


def budget_from_dict(data: Any) -> Budget:
    """The inverse of `budget_to_dict`. Raises ValueError for an unknown kind, key or value."""
    if not isinstance(data, Mapping) or data.get("kind") not in list(
        Budget.known
    ):  # a list: the kind may be unhashable
        refuse("budget", data, f"an object whose 'kind' is one of {', '.join(Budget.known)}")
    cls = Budget.known[data["kind"]]
    values = {k: v for k, v in data.items() if k != "kind"}
    names = tuple(f.name for f in fields(cls))
    known_keys(f"budget of kind {data['kind']!r}", values, names)
    if names[0] not in values:
        refuse(f"budget of kind {data['kind']!r}", dict(values), f"an object with the key {names[0]!r}")
    return cls(**values)
