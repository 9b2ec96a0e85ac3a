"""Candidates timed in turn: in a graph with warm and with cold L2, and called eagerly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.gpu.device import Call, Device
from inherit_kernels.testing.timing import Timing, _percentiles

FEWEST_ROUNDS = 5
# Microseconds, as timed from Python: a graph holds so many calls that the gap before its first does not show. The calls
# of few rows take 20 from Python and a few in the graph.
IN_ONE_SAMPLE = 400.0
MOST_CALLS = 32
HEAT = 50_000.0  # microseconds of work before the first sample: a GPU that idled runs below its clocks
SECONDS = 0.25  # about what a candidate gets in all, a long call at least five rounds


@dataclass
class Clocked:
    """One candidate while it is timed.

    Attributes:
        calls: the candidate on different memory each, so that a cold graph meets no call's data twice.
    """

    calls: Sequence[Call]
    once: float = 0.0
    repeats: int = 1
    in_cold: int = 1  # calls in the cold graph
    warm: Call | None = None
    cold: Call | None = None
    error: str = ""
    samples: dict[str, list[float]] = field(default_factory=lambda: {"warm": [], "cold": [], "eager": []})

    def timing(self, state: str) -> Timing | None:
        """Percentiles of "warm", "cold" or "eager"; None where there is no sample."""
        return _percentiles(self.samples[state]) if self.samples[state] else None


def prepare(device: Device, calls: Sequence[Call]) -> Clocked:
    """Capture a candidate's graphs; where it cannot be captured, `error` says why and only eager calls are timed."""
    clocked = Clocked(calls)
    calls[0]()
    pending = [device.sample(calls[0]) for _ in range(3)]
    device.synchronize()
    clocked.once = max(min(microseconds() for microseconds in pending), 0.5)
    clocked.repeats = max(1, min(MOST_CALLS, round(IN_ONE_SAMPLE / clocked.once)))
    try:
        clocked.warm = device.capture([calls[0]] * clocked.repeats)
        # What needs no other memory to be cold drives its own data out of L2: many calls, as in the warm graph.
        alone = len(calls) == 1
        clocked.cold = clocked.warm if alone else device.capture(calls)
        clocked.in_cold = clocked.repeats if alone else len(calls)
    except RuntimeError as refused:
        if device.broken():
            raise
        clocked.warm = clocked.cold = None
        clocked.error = f"not captured: {str(refused).splitlines()[0]}"
    return clocked


def time_in_turn(device: Device, candidates: Sequence[Clocked]) -> None:
    """Fill the samples of all, A B C A B C …, so that a change of the clocks meets all alike."""
    longest = max((c.once * (2 * c.repeats + len(c.calls)) for c in candidates), default=1.0)
    rounds = min(device.rounds, max(FEWEST_ROUNDS, int(SECONDS * 1e6 / longest)))
    _heat(device, [c for c in candidates if c.warm is not None])
    for _ in range(rounds):
        pending = []
        for candidate in candidates:
            if candidate.warm is None or candidate.cold is None:
                continue
            device.evict()
            candidate.warm()
            pending.append((candidate, "warm", candidate.repeats, device.sample(candidate.warm)))
            device.evict()
            pending.append((candidate, "cold", candidate.in_cold, device.sample(candidate.cold)))
        device.synchronize()
        for candidate, state, calls, microseconds in pending:
            candidate.samples[state].append(microseconds() / calls)
    for _ in range(rounds):
        for candidate in candidates:
            candidate.samples["eager"].append(_eager(device, candidate))


def _heat(device: Device, candidates: Sequence[Clocked]) -> None:
    for candidate in candidates:
        share = HEAT / len(candidates) / (candidate.once * candidate.repeats)
        for _ in range(1 if device.rehearsal else max(1, int(share))):
            candidate.warm()  # type: ignore[misc]
    device.synchronize()


def _eager(device: Device, candidate: Clocked) -> float:
    """Elapsed microseconds of one call from Python, the GPU's work included, over a few calls in a row."""
    repeats = max(1, min(8, candidate.repeats))
    device.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        candidate.calls[0]()
    device.synchronize()
    return (time.perf_counter() - start) / repeats * 1e6
