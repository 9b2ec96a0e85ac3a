"""Timing on a GPU that can be compared: each candidate in a CUDA graph, L2 cold, replays interleaved, medians."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from inherit_kernels.testing.timing import Timing, _percentiles

REPLAY = 200.0  # µs that one replay should take, so that the events' resolution (about 0.5 µs) does not matter
MOST_REPEATS = 50
MOST_COPIES = 64
PROBE = 5  # calls of the graph from which the repeats follow: called from Python, a call of 5 µs takes 20 to 100
AHEAD = 200_000  # cycles, about 100 µs, that the device waits while a replay is enqueued
# Of the largest element: a race or an unwritten tile shows, cancellation in 16 bits (0.11 seen) does not.
TOLERANCE = 0.3


def time_on_gpu(
    candidates: Mapping[str, Sequence[Callable[[], Any]]], expected: Any = None, *, rounds: int = 11
) -> dict[str, Timing]:
    """Microseconds of a call inside a CUDA graph; a candidate that fails or is wrong is left out.

    Args:
        candidates: name -> calls without arguments that enqueue the same work on the current CUDA device, each on memory
            of its own (`copies_of`): they take turns, and each finds nothing of itself in the L2 cache.
        expected: what each call should return, a tensor or a sequence of them and of None; None is not compared.
        rounds: how many samples each gets, in turn: A B C A B C ….
    """
    pool = torch.cuda.graph_pool_handle()  # one: values do not matter, and each graph's own would soon fill the memory
    replays: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, calls in candidates.items():
        try:
            replays[name] = _capture(calls, expected, pool)
        except Exception as problem:  # too much shared memory, say: Triton's errors share no other base
            print(f"left out: {name}: {str(problem).splitlines()[:1]}")
            pool = torch.cuda.graph_pool_handle()  # a capture that failed keeps the other
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name, (graph, repeats) in replays.items():
            samples[name].append(_elapsed(graph.replay) / repeats)
    return {name: _percentiles(values) for name, values in samples.items()}


def cold_copies(nbytes: int) -> int:
    """How many copies of so many bytes are twice the L2 cache of the current device; at most MOST_COPIES."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(MOST_COPIES, -(-2 * l2 // max(nbytes, 1)))


def copies_of(inputs: Mapping[str, torch.Tensor | None]) -> list[dict[str, Any]]:
    """The inputs and clones, together twice the L2 cache of the current device or MOST_COPIES; alone where they are large.

    A layer finds its weights in L2 in no network but a tiny one.
    """
    count = cold_copies(sum(value.nbytes for value in inputs.values() if value is not None))

    def clone(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value.detach().clone().requires_grad_(value.requires_grad)

    return [dict(inputs)] + [{name: clone(value) for name, value in inputs.items()} for _ in range(count - 1)]


def _capture(calls: Sequence[Callable[[], Any]], expected: Any, pool: Any) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of the calls in turn, and of how many."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = [call() for call in (calls[0], calls[-1], calls[0])]
    torch.cuda.current_stream().wait_stream(stream)
    check_same(results[-1], expected)
    probe = _graph_of(calls, PROBE, pool)
    once = min(_elapsed(probe.replay) for _ in range(3)) / PROBE
    repeats = max(len(calls), min(MOST_REPEATS, int(REPLAY / max(once, 1.0)) + 1))
    return _graph_of(calls, repeats, pool), repeats


def check_same(results: Any, expected: Any) -> None:
    """Whether a candidate computes what it should: within TOLERANCE of the largest element of each expected tensor.

    Raises:
        AssertionError: it does not.
    """
    if expected is None:
        return
    if isinstance(expected, torch.Tensor):
        worst = float((results.float() - expected.float()).abs().max()) if expected.numel() else 0.0
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        if not worst <= TOLERANCE * largest:
            raise AssertionError(f"wrong: off by {worst:.3g} where the largest element is {largest:.3g}")
        return
    for result, wanted in zip(results, expected, strict=True):
        check_same(result, wanted)


def _graph_of(calls: Sequence[Callable[[], Any]], repeats: int, pool: Any) -> torch.cuda.CUDAGraph:
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            for i in range(repeats):
                calls[i % len(calls)]()
    except BaseException:  # a capture that failed leaves its own stream as the current one
        torch.cuda.set_stream(current)
        raise
    graph.replay()
    return graph


def _elapsed(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(AHEAD)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
