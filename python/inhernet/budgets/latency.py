"""A time for one call of the whole network, on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..checks import is_number, refuse
from .base import Budget, Decision, Scene, give_out, ranks_or_dense, settled

# The network is measured with the ranks that the layers' times suggest, and the budget corrected by what it misses.
ROUNDS, CLOSE = 4, 0.02


@dataclass(frozen=True)
class LatencyBudget(Budget):
    """The time of one call with the plan's example inputs, in evaluation mode on the teacher's device and threads.

    `amount`: a share of the teacher's time (`unit="teacher"`) or milliseconds (`unit="ms"`). Every layer is timed dense and
    at six ranks (layers of one shape once), the ranks go where they keep most per millisecond, and the network is measured
    with them and corrected, up to four times. It needs calibration data or `plan(example_inputs=)`.
    Example: ``LatencyBudget(0.6)``, ``LatencyBudget(12.0, "ms")``.
    """

    amount: float
    unit: str = "teacher"
    kind: ClassVar[str] = "latency"

    def __post_init__(self) -> None:
        if not is_number(self.amount) or self.amount <= 0:
            refuse("LatencyBudget.amount", self.amount, "a number above 0")
        if self.unit not in ("teacher", "ms"):
            refuse("LatencyBudget.unit", self.unit, "'teacher' (a share of its time) or 'ms'")

    def spend(self, scene: Scene) -> dict[str, Decision]:
        teacher = scene.latency(None)
        target = self.amount if self.unit == "ms" else self.amount * teacher
        if target >= teacher:
            return ranks_or_dense(dict.fromkeys((layer.name for layer in scene.layers), None))
        price = scene.milliseconds
        # What the layers do not explain: attention, norms, activations, Python.
        rest = teacher - sum(price(layer, None) for layer in scene.selected)
        allowed = target - rest - settled(scene, price)
        best: tuple[float, dict[str, int | None]] | None = None
        for _ in range(ROUNDS):
            try:
                ranks = give_out(scene, allowed, price, "milliseconds")
            except ValueError as problem:
                if best is not None:
                    break
                raise ValueError(
                    f"LatencyBudget asks for {target:.3g} ms, of which {rest:.3g} ms are not in the layers it may change "
                    f"(the teacher takes {teacher:.3g} ms): {problem}"
                ) from None
            found = scene.latency(ranks)
            miss = abs(found - target) / target
            if best is None or miss < best[0]:
                best = miss, ranks
            if miss <= CLOSE:
                break
            allowed += target - found
        return ranks_or_dense(best[1] if best else {})
