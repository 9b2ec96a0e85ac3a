"""What the digits demo knows of one network: a line of its table, a line of its picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from inhernet.measure import Latency


@dataclass
class Row:
    """One network of the comparison. `history` holds test and validation figures per epoch, 0 before training."""

    name: str
    model: Any
    history: list[dict[str, float]]
    best_epoch: int | None
    parameters: int
    macs: int
    seconds: float
    share: float | None = None
    heads: int = 0
    convert_seconds: float = 0.0
    latency: dict[int, Latency] = field(default_factory=dict)

    def at(self, epoch: int) -> dict[str, float]:
        return self.history[epoch]

    @property
    def best(self) -> dict[str, float]:
        return self.history[-1 if self.best_epoch is None else self.best_epoch]
