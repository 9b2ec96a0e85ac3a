"""Timing that can be compared: candidates interleaved in one run, medians."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import NamedTuple


class Timing(NamedTuple):
    """Microseconds of one call: the 20th, 50th and 80th percentile over the rounds."""

    low: float
    median: float
    high: float


def time_interleaved(
    candidates: dict[str, Callable[[], object]], *, seconds: float = 0.2, rounds: int = 15
) -> dict[str, Timing]:
    """Time the candidates in turn, A B C A B C …, so that a change of the machine's speed meets all of them.

    Args:
        candidates: name -> a call without arguments.
        seconds: about how long each candidate is measured in all.
        rounds: how many samples each gets; a sample repeats a short call until it takes a measurable time.

    Returns:
        name -> `Timing` in microseconds a call.

    Example:
        >>> sorted(time_interleaved({"sum": lambda: sum(range(9))}, seconds=0.01))
        ['sum']
    """
    repeats = {}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, int(seconds / rounds / once))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            count = repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) / count * 1e6)
    return {name: Timing(quantiles(s, n=5)[0], median(s), quantiles(s, n=5)[3]) for name, s in samples.items()}
