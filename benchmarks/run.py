"""Time the backends of an op against what a user would run instead: `python -m benchmarks.run gated_lowrank_linear`.

Correctness first; then all candidates interleaved in one run (A B C A B C …), medians with the 20th and 80th percentile.
Every figure becomes one row of `benchmarks/results/<device>/<op>.csv`, stamped with commit, torch and threads.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import inherit_kernels
from benchmarks.baselines import baselines
from inherit_kernels.dispatch import device_slug
from inherit_kernels.registry import OPS
from inherit_kernels.testing import Case, check_accuracy, make_inputs
from inherit_kernels.testing.timing import Timing, time_interleaved

RESULTS = Path(__file__).parent / "results"


def candidates(op: str, case: Case, compiled: bool) -> dict[str, Callable[[], Any]]:
    """The baselines, then every backend but the reference, then the automatic choice."""
    inputs = make_inputs(op, case, torch.float32)
    function = getattr(inherit_kernels, op)
    found = baselines(op, case, inputs, compiled)
    if "published" in found:
        torch.testing.assert_close(
            found["published"](), function(*inputs.values(), **case.options), rtol=1e-3, atol=1e-3
        )
    for backend in [name for name in OPS[op].backends if name != "reference"]:
        try:
            check_accuracy(op, case, backend, torch.float32, gradients=False)
        except ValueError as declined:
            print(f"{case}: {declined}")
            continue

        def forced(backend: str = backend) -> Any:
            with inherit_kernels.use_backend(backend):
                return function(*inputs.values(), **case.options)

        found[backend] = forced
    found["automatic"] = lambda: function(*inputs.values(), **case.options)
    return found


def stamp() -> dict[str, Any]:
    """Where and by what a figure was made."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "device": device_slug(torch.device("cpu")),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def append(op: str, rows: list[dict[str, Any]]) -> Path:
    """Add rows to the op's results on this device."""
    path = RESULTS / rows[0]["device"] / f"{op}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def run(op: str, seconds: float, compiled: bool) -> None:
    """Measure, print one table, append the rows."""
    cases = import_module(f"benchmarks.ops.bench_{op}").CASES
    rows, table = [], None
    for case in cases:
        with torch.no_grad():
            calls = candidates(op, case, compiled)
            found = time_interleaved(calls, seconds=seconds, rounds=31)
        if table is None:
            table = Table("µs, median", *found, title=f"{op}, float32, forward", title_justify="left")
        table.add_row(str(case), *(f"{timing.median:,.0f}" for timing in found.values()))
        rows += [row(op, case, name, timing) for name, timing in found.items()]
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    print(f"rows appended to {append(op, rows)}")


def row(op: str, case: Case, candidate: str, timing: Timing) -> dict[str, Any]:
    """One line of the CSV."""
    figures = {"us_p20": timing.low, "us_p50": timing.median, "us_p80": timing.high}
    return (
        stamp()
        | {"op": op, "case": str(case), "dtype": "float32", "candidate": candidate}
        | {name: round(value, 2) for name, value in figures.items()}
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; all when none is named")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each candidate of each case")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the published layer out")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(OPS)
    if unknown:
        parser.error(f"op: expected one of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    for op in arguments.ops or OPS:
        run(op, arguments.seconds, not arguments.no_compile)


if __name__ == "__main__":
    main()
