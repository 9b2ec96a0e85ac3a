"""Timing on a GPU that can be compared: each candidate in a CUDA graph, replays interleaved, medians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from inherit_kernels.testing.timing import Timing, _percentiles

REPLAY = 200.0  # µs that one replay should take, so that the events' resolution (about 0.5 µs) does not matter
MOST_REPEATS = 50


def time_on_gpu(candidates: dict[str, Callable[[], object]], *, rounds: int = 11) -> dict[str, Timing]:
    """Microseconds of each call inside a CUDA graph, with a warm L2 cache; a call that fails is left out.

    Args:
        candidates: name -> a call without arguments that enqueues work on the current CUDA device.
        rounds: how many samples each gets, in turn: A B C A B C ….
    """
    pool = torch.cuda.graph_pool_handle()  # one: values do not matter, and each graph's own would soon fill the memory
    replays = {name: replay for name, call in candidates.items() if (replay := _capture(call, pool)) is not None}
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name, (graph, repeats) in replays.items():
            samples[name].append(_elapsed(graph.replay) / repeats)
    return {name: _percentiles(values) for name, values in samples.items()}


def _capture(call: Callable[[], object], pool: Any) -> tuple[torch.cuda.CUDAGraph, int] | None:
    """A graph that repeats the call, and how often; None where the call fails."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        once = min(_elapsed(call) for _ in range(3))
        repeats = max(1, min(MOST_REPEATS, int(REPLAY / max(once, 1.0)) + 1))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for _ in range(repeats):
                call()
    except (
        Exception
    ) as problem:  # too little shared memory for a configuration, say: Triton's errors share no other base
        print(f"left out: {str(problem).splitlines()[:1]}")
        return None
    return graph, repeats


def _elapsed(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3
