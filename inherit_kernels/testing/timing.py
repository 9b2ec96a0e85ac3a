"""Timing that can be compared: candidates interleaved in one run, medians."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import NamedTuple

FEWEST_ROUNDS = 5  # quantiles of less say nothing

#: name -> seconds so far: elapsed time, or the processor time of all threads of this process. The second survives
#: neighbours on a shared machine, but only one thread may work: two threads would count twice.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Timing(NamedTuple):
    """Microseconds of one call: the 20th, 50th and 80th percentile over the rounds."""

    low: float
    median: float
    high: float


def time_interleaved(
    candidates: dict[str, Callable[[], object]], *, seconds: float = 0.2, rounds: int = 15, clock: str = "wall"
) -> dict[str, Timing]:
    """Time the candidates in turn, A B C A B C …, so that a change of the machine's speed meets all of them.

    Args:
        candidates: name -> a call without arguments.
        seconds: about how long each candidate is measured in all.
        rounds: how many samples each gets; a sample repeats a short call until it takes a measurable time. A call so
            long that `seconds` does not hold this many gets fewer, at least five, spread evenly over the run.
        clock: "wall", or "cpu" for processor time (one thread only).

    Returns:
        name -> `Timing` in microseconds a call.

    Raises:
        ValueError: no clock of that name.

    Example:
        >>> sorted(time_interleaved({"sum": lambda: sum(range(9))}, seconds=0.01))
        ['sum']
    """
    if clock not in CLOCKS:
        raise ValueError(f"clock: expected one of {', '.join(CLOCKS)}, got {clock!r}")
    now = CLOCKS[clock]
    repeats, joins = {}, {}
    for name, call in candidates.items():
        call()
        start = now()
        call()
        once = max(now() - start, 1e-7)
        repeats[name] = max(1, int(seconds / rounds / once))
        joins[name] = min(rounds, max(FEWEST_ROUNDS, int(seconds / once)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds):
        for name, call in candidates.items():
            if (i + 1) * joins[name] // rounds == i * joins[name] // rounds:
                continue
            count = repeats[name]
            start = now()
            for _ in range(count):
                call()
            samples[name].append((now() - start) / count * 1e6)
    return {name: _percentiles(values) for name, values in samples.items()}


def _percentiles(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    fifths = quantiles(values, n=5)
    return Timing(fifths[0], median(values), fifths[3])
