"""Measure the dispatch tables of this machine: `python -m inherit_kernels.tune [op …]`.

Each op's folder names the cases to measure; the table goes to `configs/<op>/<device>.json`, where dispatch reads it. On an
idle 2-core machine with bfloat16 units all four ops take about six minutes. Without them torch's bfloat16 is ten times slower:
leave it out of large cases with `--rows 8` (four and a half minutes). Interrupting keeps the tables written.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

import inherit_kernels
from inherit_kernels.dispatch import TABLE_VERSION, device_slug, problem_of, table_path, use_backend
from inherit_kernels.registry import OPS
from inherit_kernels.testing.cases import Case, make_inputs
from inherit_kernels.testing.timing import time_interleaved

DTYPES = (torch.float32, torch.bfloat16)
# A backend this many times slower than the fastest is timed once: bfloat16 products without bfloat16 units.
HOPELESS = 3


def measure(op: str, case: Case, dtype: torch.dtype, training: bool, seconds: float) -> dict[str, Any] | None:
    """One entry of a table: the medians of all backends but the reference, or None where fewer than two can serve."""
    spec = OPS[op]
    inputs = make_inputs(op, case, dtype)
    if training:
        inputs = {name: value if value is None else value.requires_grad_() for name, value in inputs.items()}
    names = [part.split()[-1] for part in spec.options.split(", ")]
    options = dict(zip(names, spec.default_options, strict=True)) | case.options
    tensors, chosen = spec.normalise(tuple(inputs.values()), tuple(options.values()))
    problem = problem_of(spec, tensors, chosen, training)
    candidates = {
        name: _call(op, inputs, case.options, name, training)
        for name, backend in spec.backends.items()
        if name != "reference" and backend.supports(problem) is None
    }
    if len(candidates) < 2:
        return None
    once = {name: _seconds(call) for name, call in candidates.items()}
    hopeless = {name: first for name, first in once.items() if first > HOPELESS * min(once.values())}
    timings = time_interleaved(
        {name: call for name, call in candidates.items() if name not in hopeless}, seconds=seconds
    )
    medians = {name: timing.median for name, timing in timings.items()}
    medians |= {name: first * 1e6 for name, first in hopeless.items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "training": training,
        "sizes": problem.sizes,
        "microseconds": {name: round(medians[name], 1) for name in candidates},
    }


def _seconds(call: Callable[[], Any]) -> float:
    """The time of a second call, or of the first if that is long: it need not be warmed up."""
    for _ in range(2):
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        if elapsed > 0.1:
            break
    return elapsed


def _call(op: str, inputs: dict[str, Any], options: dict[str, Any], backend: str, training: bool) -> Callable[[], Any]:
    function = getattr(inherit_kernels, op)
    leaves = [value for value in inputs.values() if value is not None]

    def forward() -> Any:
        with use_backend(backend):
            return function(*inputs.values(), **options)

    if not training:
        return forward
    cotangent = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, cotangent)


def write_table(op: str, slug: str, entries: list[dict[str, Any]]) -> None:
    """Write aside, then rename: a table is whole or not there. One entry a line, so that changes can be read."""
    path = table_path(op, slug)
    path.parent.mkdir(parents=True, exist_ok=True)
    made_by = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    head = {"version": TABLE_VERSION, "op": op, "device": slug, **made_by}
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(head)[:-1] + ', "entries": [\n' + lines + "\n]}\n")
    os.replace(aside, path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m inherit_kernels.tune", description="Measure the dispatch tables.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; all when none is named")
    parser.add_argument("--seconds", type=float, default=0.05, help="time for each backend of each case")
    parser.add_argument("--rows", type=int, metavar="N", help="bfloat16 only up to N rows or images; all by default")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(OPS)
    if unknown:
        parser.error(f"op: expected one of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    from rich.progress import track

    slug = device_slug(torch.device("cpu"))
    for op in arguments.ops or OPS:
        cases = import_module(f"inherit_kernels.ops.{op}.cases").tuning_cases()
        grid = [
            (case, dtype, training)
            for case in cases
            for dtype in DTYPES
            for training in (False, True)
            if dtype == torch.float32 or arguments.rows is None or case.shapes["x"][0] <= arguments.rows
        ]
        entries = [measure(op, *point, arguments.seconds) for point in track(grid, description=op)]
        found = [entry for entry in entries if entry]
        if not found:
            print(f"{op}: only one backend can serve here, so there is nothing to choose")
            continue
        write_table(op, slug, found)
        wins = [min(entry["microseconds"], key=entry["microseconds"].get) for entry in found]
        counts = ", ".join(f"{name} fastest {wins.count(name)}" for name in sorted(set(wins)))
        print(f"{op}: {len(found)} measured, {counts} -> {table_path(op, slug)}")


if __name__ == "__main__":
    main()
