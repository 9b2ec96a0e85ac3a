"""Latencies that can be compared every candidate in one run, interleaved, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call: 20th, 50th and 80th percentile over `rounds` calls."""

    p20: float
    p50: float
    p80: float
    rounds: int


def interleaved(
    candidates: Mapping[str, Callable[[], object]], seconds: float = 1.0, *, cpu_time: bool = False
) -> dict[str, Latency]:
    """Time every candidate once per round, so that what the machine does in between hits all of them alike.

    Args:
        candidates: calls by name. Gradients are off inside.
        seconds: time per candidate, about; at least 5 rounds are made whatever they take.
        cpu_time: count this thread's CPU time, not the time on the wall: for work on one thread, what else the machine
            does then does not count.

    Returns:
        One `Latency` per name.

    Raises:
        ValueError: no candidates, or no time.

    Example:
        >>> x = torch.randn(8, 8)
        >>> interleaved({"matmul": lambda: x @ x}, seconds=0.01)["matmul"].p50 > 0
        True
    """
    if not candidates:
        raise ValueError("candidates is empty, expected at least one call by name")
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds!r}, expected a positive number")
    clock = time.thread_time if cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad():
        for call in candidates.values():
            for _ in range(3):  # first calls allocate, compile and fill caches
                call()
        _wait()
        deadline = time.perf_counter() + seconds * len(candidates)
        while len(next(iter(times.values()))) < 5 or time.perf_counter() < deadline:
            for name, call in candidates.items():
                started = clock()
                call()
                _wait()
                times[name].append(1e3 * (clock() - started))
    return {name: _percentiles(values) for name, values in times.items()}


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _percentiles(values: list[float]) -> Latency:
    ordered = sorted(values)
    p20, p50, p80 = (ordered[int(share * (len(ordered) - 1) + 0.5)] for share in (0.2, 0.5, 0.8))
    return Latency(p20, p50, p80, len(values))
