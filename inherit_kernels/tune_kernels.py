"""Measures Triton configurations on the current GPU and puts the fastest of each bucket into `configs/<op>/<device>.json`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from inherit_kernels.common.triton_launch import Config, forced_configs, kernel_tables, padded_rank
from inherit_kernels.dispatch import device_slug, problem_of
from inherit_kernels.registry import OPS, Problem
from inherit_kernels.testing.cases import Case, arguments_of, make_inputs
from inherit_kernels.testing.gpu_timing import time_on_gpu
from inherit_kernels.testing.triton_compile import SHARED_LIMIT, compile_launch, record
from inherit_kernels.tune import LAYOUTS, call_of, replaced, write_table

DTYPES = (torch.bfloat16, torch.float32)  # a configuration for bfloat16 serves float16


class Point(NamedTuple):
    """A bucket of a kernel's table and the configurations to try in it."""

    op: str
    backend: str
    kernel: str
    case: Case
    dtype: torch.dtype
    candidates: list[Config]

    @property
    def training(self) -> bool:
        return self.kernel.startswith("backward") or self.kernel.endswith("gradient")


def tune_kernels(op: str, end: float) -> None:
    """Measure each kernel of an op in each of its buckets until `end` (`time.monotonic()`), and write the table.

    Configurations that would spill registers or exceed the shared memory are compiled ahead of time, on all processors,
    and never measured.
    """
    from rich.progress import track

    slug = device_slug(torch.device("cuda"))
    points = list(points_of(op))
    known = dict(kernel_tables(op, slug))
    found: dict[str, list[dict[str, Any]]] = {}
    major, minor = torch.cuda.get_device_capability()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        fitting = [pool.submit(fitting_candidates, point, 10 * major + minor) for point in points]
        for point, future in track(list(zip(points, fitting, strict=True)), description=f"{op} kernels"):
            if time.monotonic() > end:
                future.cancel()
                continue
            bucket = _fastest(point._replace(candidates=future.result()))
            if bucket:
                found.setdefault(point.kernel, []).append(bucket)
                known[point.kernel] = replaced(known.get(point.kernel, []), found[point.kernel])
                write_table(op, slug, kernels=known)
        pool.shutdown(cancel_futures=True)
    kernel_tables.cache_clear()
    measured = sum(map(len, found.values()))
    print(f"{op}: {measured} of {len(points)} buckets of {', '.join(found) or 'no kernel'} measured on {slug}")


def points_of(op: str) -> Iterator[Point]:
    """The buckets to measure: the square cases first, bfloat16 before float32, the forward before the backward."""
    cases = import_module(f"inherit_kernels.ops.{op}.cases").gpu_tuning_cases()
    square = [case for case in cases if case.shapes["x"][-1] == case.shapes["up"][-2] or len(case.shapes["x"]) == 4]
    for dtype in DTYPES:
        bits = 32 if dtype == torch.float32 else 16
        for name, backend in OPS[op].triton_backends.items():
            for kernel in backend.KERNELS:
                for case in square:
                    rank = padded_rank(case.shapes["down"][0])
                    yield Point(op, name, kernel, case, dtype, backend.tuning_space(kernel, bits, rank))


def fitting_candidates(point: Point, arch: int) -> list[Config]:
    """The candidates that compile for the architecture without spilling, within its shared memory."""
    return [config for config in point.candidates if _fits(point, config, arch)]


def _fits(point: Point, config: Config, arch: int) -> bool:
    with forced_configs({point.kernel: config}):
        launches = record(point.op, point.case, point.dtype, point.training, LAYOUTS["cuda"], point.backend)
    for launch in launches:
        try:
            used = compile_launch(launch, arch)
        except Exception as problem:  # a configuration that Triton cannot compile is no candidate, whatever it raises
            print(f"left out: {point.kernel} {config}: {str(problem).splitlines()[0]}")
            return False
        if used.stack or used.shared > SHARED_LIMIT.get(arch, SHARED_LIMIT[80]):
            return False
    return True


def _fastest(point: Point) -> dict[str, Any] | None:
    """The bucket of a point with its fastest configuration, or None where none runs."""
    bits = 32 if point.dtype == torch.float32 else 16
    inputs = make_inputs(point.op, point.case, point.dtype, device="cuda", layout=LAYOUTS["cuda"])
    if point.training:
        inputs = {name: value if value is None else value.requires_grad_() for name, value in inputs.items()}
    tensors, options = arguments_of(point.op, inputs, point.case)
    problem = problem_of(OPS[point.op], tensors, options, point.training)
    if OPS[point.op].backends[point.backend].supports(problem) is not None:
        return None

    def under(config: Config) -> Any:
        def call() -> Any:
            with forced_configs({point.kernel: config}):
                return run()

        with forced_configs({point.kernel: config}):
            run = call_of(point.op, inputs, point.case.options, point.backend, point.training)
        return call

    timings = time_on_gpu({str(i): under(config) for i, config in enumerate(point.candidates)})
    if not timings:
        return None
    best = min(timings, key=lambda name: timings[name].median)
    measured = {"config": point.candidates[int(best)], "microseconds": round(timings[best].median, 1)}
    return {"bits": bits, **sizes_of(problem), **measured}


def sizes_of(problem: Problem) -> dict[str, int]:
    """What a bucket says of a problem's sizes: the padded rank and the other letters."""
    others = {letter: size for letter, size in problem.sizes.items() if letter != "R"}
    return {"BR": padded_rank(problem.sizes["R"]), **others}
