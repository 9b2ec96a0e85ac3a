"""Timing that can be compared: candidates interleaved in one run, medians."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import NamedTuple

FEWEST_ROUNDS = 5  # quantiles of less say nothing
LONG = 20  # a call of so many settling times settles by itself

#: name -> seconds so far: elapsed time, or the processor time of all threads of this process. The second survives
#: neighbours on a shared machine, but only one thread may work: two threads would count twice.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Timing(NamedTuple):
    """Microseconds of one call: the 20th, 50th and 80th percentile over the rounds."""

    low: float
    median: float
    high: float


def time_interleaved(
    candidates: dict[str, Callable[[], object]],
    *,
    seconds: float = 0.2,
    rounds: int = 15,
    clock: str = "wall",
    settle: float = 0.0,
    gauges: dict[str, Callable[[], float]] | None = None,
) -> dict[str, Timing]:
    """Time the candidates in turn, A B C A B C …, so that a change of the machine's speed meets all of them.

    Args:
        candidates: name -> a call without arguments.
        seconds: about how long each candidate is measured in all.
        rounds: how many samples each gets; a sample repeats a short call until it takes a measurable time. A call so
            long that `seconds` does not hold this many gets fewer, at least five, spread evenly over the run.
        clock: "wall", or "cpu" for processor time (one thread only).
        settle: seconds that a candidate runs unmeasured before each of its samples. Candidates of one thread pool and
            small data need none. The threads of another engine go on spinning for milliseconds after its call: without
            6 ms to settle, ONNX Runtime was seen 1.8 to 7 times slower beside torch than alone.
        gauges: name -> a call that measures something by itself and returns the figure; one a round.

    Returns:
        name -> `Timing` in microseconds a call; of the gauges, of their figures.

    Raises:
        ValueError: no clock of that name.

    Example:
        >>> sorted(time_interleaved({"sum": lambda: sum(range(9))}, seconds=0.01))
        ['sum']
    """
    if clock not in CLOCKS:
        raise ValueError(f"clock: expected one of {', '.join(CLOCKS)}, got {clock!r}")
    samplers = [_Sampler(name, call, seconds, rounds, settle, CLOCKS[clock]) for name, call in candidates.items()]
    figures: dict[str, list[float]] = {name: [] for name in gauges or {}}
    for i in range(rounds):
        for sampler in samplers:
            sampler.join(i)
        for name, gauge in (gauges or {}).items():
            _run_for(settle, gauge)
            figures[name].append(gauge())
    timings = {sampler.name: _percentiles(sampler.samples) for sampler in samplers}
    return timings | {name: _percentiles(values) for name, values in figures.items()}


class _Sampler:
    """A candidate and its samples so far."""

    def __init__(
        self,
        name: str,
        call: Callable[[], object],
        seconds: float,
        rounds: int,
        settle: float,
        now: Callable[[], float],
    ) -> None:
        self.name, self.call, self.rounds, self.now = name, call, rounds, now
        call()
        start = now()
        call()
        once = max(now() - start, 1e-7)
        self.repeats = max(1, int(seconds / rounds / once))
        self.joins = min(rounds, max(FEWEST_ROUNDS, int(seconds / once)))
        self.settle = settle if once < LONG * settle else 0.0
        self.samples: list[float] = []

    def join(self, i: int) -> None:
        """Take part in round `i`, or in some of the rounds where a call is long."""
        if (i + 1) * self.joins // self.rounds == i * self.joins // self.rounds:
            return
        _run_for(self.settle, self.call)
        start = self.now()
        for _ in range(self.repeats):
            self.call()
        self.samples.append((self.now() - start) / self.repeats * 1e6)


def _run_for(seconds: float, call: Callable[[], object]) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()


def _percentiles(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    fifths = quantiles(values, n=5)
    return Timing(fifths[0], median(values), fifths[3])
