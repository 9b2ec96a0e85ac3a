"""The figures asked of the GPU kernels, and what the rows of the sweep say about each.

A ratio is the fastest of the named peers over ours, both in a CUDA graph in the same run; ours is the automatic choice. A
figure is judged with cold and with warm L2, and by the lower of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.gpu.candidates import AUTOMATIC
from benchmarks.summary import geometric_mean

Rows = Sequence[dict[str, str]]  # of one measurement
STATES = ("cold", "warm")
PAIR = ("pair", "pair, compiled", "pair, max-autotune", "pair, B2B pass")
COMPILED_PAIR = PAIR[1:]
STACK = ("published",)
CONCAT = ("concat GEMM", "concat GEMM, compiled")
DENSE = ("dense", "dense, compiled", "dense, max-autotune")


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    regime: str
    where: str
    what: str
    asked: float
    value: Callable[[Rows, str, str], float | None]  # of a measurement, a state of L2, one of ours
    unit: str = "×"
    lower: bool = False  # whether less is better
    contains: Callable[[Rows], bool] = lambda rows: True


@dataclass(frozen=True)
class Reached:
    """What the cases of a figure reached: state of L2 -> case -> value."""

    figure: Figure
    values: dict[str, dict[str, float]]
    best: dict[str, dict[str, float]]  # the same with the fastest of our backends in place of the automatic choice

    @property
    def cases(self) -> int:
        return len({case for found in self.values.values() for case in found})

    def mean(self, state: str, best: bool = False) -> float | None:
        found = (self.best if best else self.values).get(state, {})
        return geometric_mean(max(v, 1e-9) for v in found.values()) if found else None

    def worst(self, state: str) -> tuple[str, float] | None:
        found = self.values.get(state, {})
        if not found:
            return None
        pick = max if self.figure.lower else min
        case = pick(found, key=found.__getitem__)
        return case, found[case]

    @property
    def verdict(self) -> str:
        """every case, on average, or missed; by the lower of cold and warm."""
        states = [state for state in STATES if self.values.get(state)]
        if not states:
            return "not measured"
        worst = [found[1] for found in map(self.worst, states) if found]
        means = [mean for mean in map(self.mean, states) if mean is not None]
        if all(self._enough(value) for value in worst):
            return "every case"
        return "on average" if all(self._enough(value) for value in means) else "missed"

    def _enough(self, value: float) -> bool:
        return value <= self.figure.asked if self.figure.lower else value >= self.figure.asked


def ratio(*peers: str) -> Callable[[Rows, str, str], float | None]:
    """The fastest of the peers that ran over ours."""

    def value(rows: Rows, state: str, ours: str) -> float | None:
        times = times_of(rows, state)
        theirs = [times[name] for name in peers if name in times]
        return min(theirs) / times[ours] if theirs and ours in times else None

    return value


def percent(rows: Rows, state: str, ours: str) -> float | None:
    """Percent of the memory limit; cold only, since L2 is no memory."""
    row = next((row for row in rows if row["candidate"] == ours and row["percent"]), None)
    return float(row["percent"]) if row and state == "cold" and row["bound"] == "memory" else None


def best_alternative(rows: Rows, state: str, ours: str) -> float | None:
    """The fastest of all others that compute the factored layer, our other backends included, over ours."""
    times = times_of(rows, state)
    others = [time for name, time in times.items() if name not in (ours, AUTOMATIC, *DENSE)]
    return min(others) / times[ours] if others and ours in times else None


def output_sizes(rows: Rows, state: str, ours: str) -> float | None:
    """Most memory held at once in a backward, in outputs: H of them would be one for every head."""
    row = next((row for row in rows if row["candidate"] == ours and row["peak_mb"]), None)
    heads = sizes_of(rows).get("H", 0)
    if row is None or state != "cold" or heads < 2:
        return None
    return float(row["peak_mb"]) / float(row["output_mb"]) / heads


def times_of(rows: Rows, state: str) -> dict[str, float]:
    """candidate -> median µs of those that ran."""
    return {r["candidate"]: float(r[f"{state}_us"]) for r in rows if r["status"] == "ok" and r[f"{state}_us"]}


def sizes_of(rows: Rows) -> dict[str, int]:
    text = next((row["sizes"] for row in rows if row.get("sizes")), "")
    return {letter: int(size) for letter, _, size in (part.partition("=") for part in text.split())}


FIGURES = [
    Figure("decode", "M 1-16, K=N=4096, R 64-256", "best pair", 1.2, ratio(*PAIR)),
    Figure(
        "decode", "M 1-16, R 256", "dense", 2.3, ratio(*DENSE), contains=lambda rows: sizes_of(rows).get("R") == 256
    ),
    Figure("large", "M >= 8192, R <= 128", "memory limit", 90.0, percent, unit=" %"),
    Figure("large", "M >= 8192, R <= 128", "best alternative", 0.98, best_alternative),
    Figure("epilogue", "bias + activation + residual, R <= 128", "eager pair", 1.8, ratio("pair")),
    Figure("epilogue", "bias + activation + residual, R <= 128", "torch.compile", 1.4, ratio(*COMPILED_PAIR)),
    Figure("heads", "H=4, R 64-128, M >= 256", "eager stack", 3.0, ratio(*STACK)),
    Figure("heads", "H=4, R 64-128, M >= 256", "one concat GEMM", 1.15, ratio(*CONCAT)),
    Figure("conv", "C 64-128, 56²-28²", "cuDNN pair", 1.2, ratio(*PAIR)),
    Figure("conv_small", "14²-7²", "cuDNN pair", 1.4, ratio(*PAIR)),
    Figure("gated_conv", "gated conv, H=3", "published", 4.0, ratio(*STACK)),
    Figure("gated_conv", "gated conv, H=3", "dense conv", 1.0, ratio(*DENSE)),
    Figure("backward", "backward", "four GEMMs, cuDNN", 1.0, ratio("four GEMMs", "cuDNN backward")),
    Figure(
        "backward", "backward, gated", "composed in torch", 1.0, ratio("unfused"), contains=lambda rows: _gated(rows)
    ),
    Figure("backward", "backward, gated", "memory in H outputs, at most", 1.0, output_sizes, lower=True),
    Figure("training", "forward + backward, gated", "published", 1.0, ratio(*STACK)),
]


def _gated(rows: Rows) -> bool:
    return rows[0]["op"].startswith("gated")


def reached(measured: Iterable[Rows]) -> list[Reached]:
    """Every figure over the measurements of its regime."""
    found = list(measured)
    results = []
    for figure in FIGURES:
        members = [rows for rows in found if _in_regime(rows, figure.regime) and figure.contains(rows)]
        values: dict[str, dict[str, float]] = {state: {} for state in STATES}
        best: dict[str, dict[str, float]] = {state: {} for state in STATES}
        for rows in members:
            name = f"{rows[0]['op']} {rows[0]['case']} {rows[0]['dtype']}"
            for state in STATES:
                value = figure.value(rows, state, AUTOMATIC)
                if value is None or not math.isfinite(value):
                    continue
                values[state][name] = value
                fastest = _fastest_of_ours(rows, state)
                best[state][name] = figure.value(rows, state, fastest) or value
        results.append(Reached(figure, values, best))
    return results


def _in_regime(rows: Rows, regime: str) -> bool:
    return any(regime in row.get("regimes", "").split() for row in rows)


def _fastest_of_ours(rows: Rows, state: str) -> str:
    times = times_of(rows, state)
    ours = {
        row["candidate"]: times[row["candidate"]] for row in rows if row["kind"] == "ours" and row["candidate"] in times
    }
    return min(ours, key=ours.__getitem__) if ours else AUTOMATIC
