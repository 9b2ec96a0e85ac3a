"""Measures Triton configurations on the current GPU and puts the fastest of each bucket into `configs/<op>/<device>.json`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from multiprocessing import TimeoutError as TookTooLong
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from inherit_kernels.common import triton_launch
from inherit_kernels.common.triton_launch import (
    SHIPPED,
    SOUND_PTXAS,
    Config,
    assembler_release,
    forced_configs,
    kernel_tables,
    padded_rank,
)
from inherit_kernels.common.triton_plan import forget_plans
from inherit_kernels.dispatch import device_slug, problem_of
from inherit_kernels.registry import OPS, Problem
from inherit_kernels.testing.cases import Case, arguments_of, make_inputs
from inherit_kernels.testing.gpu_timing import copies_of, time_on_gpu
from inherit_kernels.testing.triton_compile import SHARED_LIMIT, compile_launch, compiled, record
from inherit_kernels.tune_tables import LAYOUTS, replaced, spread, write_table

DTYPES = (torch.bfloat16, torch.float32)  # a configuration for bfloat16 serves float16
MOST_WAITING = 90.0  # seconds for the candidates of one bucket


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

    Other processes compile ahead of time; configurations that exceed the shared memory are never measured.
    """
    from rich.progress import track

    slug = device_slug(torch.device("cuda"))
    points = list(points_of(op))
    known = dict(kernel_tables(op, slug))
    found: dict[str, list[dict[str, Any]]] = {}
    major, minor = torch.cuda.get_device_capability()
    compilers = max(1, (os.cpu_count() or 1) - 2)  # this process and the driver need one each
    with get_context("spawn").Pool(compilers) as pool:  # terminated at the end of the block
        waiting = [pool.apply_async(fitting_candidates, (point, 10 * major + minor)) for point in points]
        for point, result in track(list(zip(points, waiting, strict=True)), description=f"{op} kernels"):
            left = end - time.monotonic()
            if left < 0:
                break
            try:
                candidates = result.get(timeout=min(left, MOST_WAITING))
            except TookTooLong:  # no time is left, or the compiler was killed and never answers
                continue
            if bucket := _measured(point._replace(candidates=candidates)):
                found.setdefault(point.kernel, []).append(bucket)
                known[point.kernel] = replaced(known.get(point.kernel, []), found[point.kernel])
                write_table(op, slug, kernels=known)
    kernel_tables.cache_clear()
    triton_launch._config.cache_clear()
    forget_plans()
    measured = sum(map(len, found.values()))
    print(f"{op}: {measured} of {len(points)} buckets of {', '.join(found) or 'no kernel'} measured on {slug}")


def points_of(op: str) -> Iterator[Point]:
    """The buckets to measure, of square layers and images: bfloat16 first, then from coarse to fine, every kernel of each."""
    cases = import_module(f"inherit_kernels.ops.{op}.cases").gpu_tuning_cases()
    # What follows a layer does not decide its tiles.
    square = [
        case
        for case in cases
        if (case.shapes["x"][-1] == case.shapes["up"][-2] and not case.options) or len(case.shapes["x"]) == 4
    ]
    for dtype in DTYPES:
        bits = 32 if dtype == torch.float32 else 16
        for case in spread(square):
            for name, backend in OPS[op].triton_backends.items():
                for kernel in backend.KERNELS:
                    rank = padded_rank(case.shapes["down"][0])
                    space = [*shipped_configs(op, kernel, bits, rank), *backend.tuning_space(kernel, bits, rank)]
                    different = [config for i, config in enumerate(space) if config not in space[:i]]
                    point = Point(op, name, kernel, case, dtype, different)
                    if backend.supports(_problem(point, make_inputs(op, case, dtype, device="meta"))) is None:
                        yield point


def shipped_configs(op: str, kernel: str, bits: int, rank: int) -> list[Config]:
    """What a machine without a table would use, for any sizes."""
    buckets = kernel_tables(op, SHIPPED).get(kernel, [])
    return [b["config"] for b in buckets if b["bits"] == bits and b.get("BR", rank) == rank]


def _problem(point: Point, inputs: dict[str, Any]) -> Problem:
    tensors, options = arguments_of(point.op, inputs, point.case)
    return replace(problem_of(OPS[point.op], tensors, options, point.training), device=torch.device("cuda"))


def fitting_candidates(point: Point, arch: int) -> list[Config]:
    """The candidates that compile for the architecture, and rightly, within its shared memory: the others are timed."""
    return [config for config in point.candidates if _fits(point, config, arch)]


def _fits(point: Point, config: Config, arch: int) -> bool:
    try:
        with forced_configs({point.kernel: config}):
            launches = record(point.op, point.case, point.dtype, point.training, LAYOUTS["cuda"], point.backend)
        used = [compiled(launch, arch).metadata.shared for launch in launches]
        # 0.7 s a kernel, where the assembler is one that must be looked after.
        wrong = assembler_release() < SOUND_PTXAS and any(compile_launch(launch, arch).undefined for launch in launches)
    except Exception as problem:  # a configuration that Triton cannot compile is no candidate, whatever it raises
        print(f"left out: {point.kernel} {config}: {str(problem).splitlines()[:1]}")
        return False
    limit = SHARED_LIMIT.get(arch, SHARED_LIMIT[80])
    return not wrong and max(used) <= limit


def _measured(point: Point) -> dict[str, Any] | None:
    """`_fastest`; a bucket that fails is printed and left out, unless it has ended the use of the device."""
    try:
        return _fastest(point)
    except Exception as problem:
        print(f"left out: {point.op} {point.kernel} {point.case}: {str(problem).splitlines()[:1]}")
        torch.cuda.synchronize()
        return None


@torch.no_grad()
def _fastest(point: Point) -> dict[str, Any] | None:
    """The bucket of a point with its fastest configuration, or None where none runs."""
    inputs = make_inputs(point.op, point.case, point.dtype, device="cuda", layout=LAYOUTS["cuda"])
    runs = [_run_of(point, given) for given in copies_of(inputs)]

    def under(config: Config, run: Callable[[str], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with forced_configs({point.kernel: config}):
                return run(point.backend)

        return call

    candidates = {str(i): [under(config, run) for run in runs] for i, config in enumerate(point.candidates)}
    timings = time_on_gpu(candidates, expected=runs[0]("unfused"))
    if not timings:
        return None
    best = min(timings, key=lambda name: timings[name].median)
    measured = {"config": point.candidates[int(best)], "microseconds": round(timings[best].median, 1)}
    bits = 32 if point.dtype == torch.float32 else 16
    return {"bits": bits, **sizes_of(_problem(point, inputs)), **measured}


def _run_of(point: Point, inputs: dict[str, Any]) -> Callable[[str], Any]:
    """The forward of a case as a call of the backend's name; for a kernel of the backward, that alone, with t saved."""
    spec = OPS[point.op]
    tensors, options = arguments_of(point.op, inputs, point.case)
    if not point.training:
        return lambda name: spec.backends[name].forward(*tensors, *options)
    y, t = spec.backends[point.backend].forward_saving(*tensors, *options)
    dz, needs = torch.randn_like(y), [tensor is not None for tensor in tensors[:-1]]
    return lambda name: spec.backends[name].backward(dz, t, *tensors[:-1], *options, needs)


def sizes_of(problem: Problem) -> dict[str, int]:
    """What a bucket says of a problem's sizes: the padded rank and the other letters."""
    others = {letter: size for letter, size in problem.sizes.items() if letter != "R"}
    return {"BR": padded_rank(problem.sizes["R"]), **others}
