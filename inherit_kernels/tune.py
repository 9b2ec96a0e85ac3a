"""Measure the tables of this machine: `python -m inherit_kernels.tune [op …] [--device cuda]`.

Each op's folder names the cases to measure; the table goes to `configs/<op>/<device>.json`, where dispatch reads it. On an
idle 2-core machine with bfloat16 units all four ops take about six minutes. Without them torch's bfloat16 is ten times slower:
leave it out of large cases with `--rows 8` (four and a half minutes). On a GPU the Triton configurations are measured
first, then the backends. Interrupting keeps the tables written; `--minutes` ends in time.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

import inherit_kernels
from inherit_kernels.dispatch import device_slug, problem_of, table_path, use_backend
from inherit_kernels.registry import OPS
from inherit_kernels.testing.cases import Case, arguments_of, make_inputs
from inherit_kernels.testing.timing import time_interleaved
from inherit_kernels.tune_tables import LAYOUTS, entries_of, replaced, spread, write_table

DTYPES = (torch.float32, torch.bfloat16)
# A backend this many times slower than the fastest is timed once: bfloat16 products without bfloat16 units.
HOPELESS = 3
WRITTEN_EVERY = 20  # entries: a kernel that ends the process costs no more


def measure(
    op: str, case: Case, dtype: torch.dtype, training: bool, seconds: float, device: str = "cpu"
) -> dict[str, Any] | None:
    """One entry of a table: the medians of all backends but the reference, or None where fewer than two can serve."""
    spec = OPS[op]
    inputs = make_inputs(op, case, dtype, device=device, layout=LAYOUTS[device])
    if training:
        inputs = {name: value if value is None else value.requires_grad_() for name, value in inputs.items()}
    tensors, chosen = arguments_of(op, inputs, case)
    problem = problem_of(spec, tensors, chosen, training)
    names = [
        name for name, backend in spec.backends.items() if name != "reference" and backend.supports(problem) is None
    ]
    if len(names) < 2:
        return None
    if device == "cuda":
        medians = _medians_on_gpu(names, lambda name, given: call_of(op, given, case.options, name, training), inputs)
    else:
        candidates = {name: call_of(op, inputs, case.options, name, training) for name in names}
        medians = _medians_on_cpu(candidates, seconds)
    if len(medians) < 2:
        return None
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "training": training,
        "sizes": problem.sizes,
        **({"activation": chosen[-1]} if chosen[-1] else {}),
        **({"residual": True} if problem.residual else {}),
        "microseconds": {name: round(medians[name], 1) for name in names if name in medians},
    }


def _measured(
    op: str, case: Case, dtype: torch.dtype, training: bool, seconds: float, device: str
) -> dict[str, Any] | None:
    """`measure`; on a GPU a case that fails is printed and left out, unless it has ended the use of the device."""
    try:
        return measure(op, case, dtype, training, seconds, device)
    except Exception as problem:
        if device == "cpu":
            raise
        print(f"left out: {op} {case}: {str(problem).splitlines()[:1]}")
        torch.cuda.synchronize()
        return None


def _medians_on_cpu(candidates: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    once = {name: _seconds(call) for name, call in candidates.items()}
    hopeless = {name: first for name, first in once.items() if first > HOPELESS * min(once.values())}
    timings = time_interleaved(
        {name: call for name, call in candidates.items() if name not in hopeless}, seconds=seconds
    )
    return {name: timing.median for name, timing in timings.items()} | {
        name: first * 1e6 for name, first in hopeless.items()
    }


def _medians_on_gpu(
    names: Sequence[str], call: Callable[[str, dict[str, Any]], Callable[[], Any]], inputs: dict[str, Any]
) -> dict[str, float]:
    from inherit_kernels.testing.gpu_timing import copies_of, time_on_gpu

    sets = copies_of(inputs)
    expected = call("unfused", inputs)() if "unfused" in names else None
    timings = time_on_gpu({name: [call(name, given) for given in sets] for name in names}, expected)
    return {name: timing.median for name, timing in timings.items()}


def _seconds(call: Callable[[], Any]) -> float:
    """The time of a second call, or of the first if that is long: it need not be warmed up."""
    for _ in range(2):
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        if elapsed > 0.1:
            break
    return elapsed


def call_of(
    op: str, inputs: dict[str, Any], options: dict[str, Any], backend: str, training: bool
) -> Callable[[], Any]:
    """The forward of a case on a backend as a call without arguments, or its forward and backward."""
    function = getattr(inherit_kernels, op)
    leaves = [value for value in inputs.values() if value is not None]

    def forward() -> Any:
        with use_backend(backend):
            return function(*inputs.values(), **options)

    if not training:
        return forward
    cotangent = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, cotangent)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m inherit_kernels.tune", description="Measure the dispatch tables.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; all when none is named")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop measuring in time; what was measured is kept")
    parser.add_argument("--seconds", type=float, default=0.05, help="time for each backend of each case, on a CPU")
    parser.add_argument("--rows", type=int, metavar="N", help="bfloat16 only up to N rows or images; all by default")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(OPS)
    if unknown:
        parser.error(f"op: expected one of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    ops = arguments.ops or list(OPS)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends it as Ctrl-C does: the table is written
    start, share = time.monotonic(), 60 * arguments.minutes / len(ops)
    for i, op in enumerate(ops):
        end = start + (i + 1) * share
        if arguments.device == "cuda":
            from inherit_kernels.tune_kernels import tune_kernels

            tune_kernels(op, time.monotonic() + 0.6 * (end - time.monotonic()))
        tune_dispatch(op, arguments.device, arguments.seconds, arguments.rows, end)


def tune_dispatch(op: str, device: str, seconds: float, rows: int | None, end: float) -> None:
    """Measure the backends of an op on its tuning cases until `end`, and write the entries as they come."""
    from rich.progress import track

    slug = device_slug(torch.device(device))
    module = import_module(f"inherit_kernels.ops.{op}.cases")
    grid = [
        (case, dtype, training)
        for dtype in reversed(DTYPES)
        for case in spread(module.gpu_tuning_cases() if device == "cuda" else module.tuning_cases())
        for training in (False, True)
        if dtype == torch.float32 or rows is None or case.shapes["x"][0] <= rows
    ]
    before = entries_of(op, slug)
    found: list[dict[str, Any]] = []
    skipped = len(grid)
    try:
        for point in track(grid, description=op):
            if time.monotonic() > end:
                break
            if entry := _measured(op, *point, seconds, device):
                found.append(entry)
            skipped -= 1
            if len(found) % WRITTEN_EVERY == WRITTEN_EVERY - 1:
                write_table(op, slug, entries=replaced(before, found))
    finally:
        if found:
            write_table(op, slug, entries=replaced(before, found) if skipped else found)
    if not found:
        why = "no time was left" if skipped else "only one backend can serve here, so there is nothing to choose"
        print(f"{op}: {why}")
        return
    wins = [min(entry["microseconds"], key=entry["microseconds"].get) for entry in found]
    counts = ", ".join(f"{name} fastest {wins.count(name)}" for name in sorted(set(wins)))
    left = f", {skipped} cases left out for lack of time" if skipped else ""
    print(f"{op}: {len(found)} measured, {counts}{left} -> {table_path(op, slug)}")


if __name__ == "__main__":
    main()
