"""Time our ops, networks and memory against what a user would run instead.

    python -m benchmarks.run all                         every op's small suite, the networks, the memory of training
    python -m benchmarks.run gated_lowrank_linear --suite full --dtype bfloat16
    python -m benchmarks.run lowrank_linear --training --peers "eager pair" "compiled pair"

Correctness first; then all candidates of a case interleaved in one run (A B C A B C …), each after 6 ms to settle, medians
with the 20th and 80th percentile; what limits the case is measured in the same rounds. Every case is appended to
`benchmarks/results/<device>/<op>.csv` as soon as it is done: an interrupted run goes on with `--resume`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import roofline, store, summary
from benchmarks.baselines import PEERS
from benchmarks.candidates import Candidate, prepare
from benchmarks.roofline import Roofline, limit
from benchmarks.suites import Point, suite, work_of
from inherit_kernels.registry import OPS
from inherit_kernels.testing.timing import CLOCKS, Timing, time_interleaved
from inhernet.console import progress, say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = 15
SETTLE = 0.006  # seconds for the threads of the engine before to go to sleep
PROBE_AGAIN = 0.03  # seconds a probe beside every case: a shared machine was seen 20 % slower at the start of a run
LIMIT, DENSE_LIMIT = "limit", "limit of the dense layer"  # gauges beside the candidates
RESUME_KEYS = ("op", "case", "dtype", "mode")


def run_op(op: str, arguments: argparse.Namespace, machine: Roofline | None) -> None:
    """Measure an op's suite case by case, appending the rows of each."""
    mode = "training" if arguments.training else "forward"
    for dtype in arguments.dtype:
        stamped = store.stamp(arguments.clock, roofline.cpu_name())
        path = store.path_of(op)
        done = store.finished(path, stamped, RESUME_KEYS) if arguments.resume else set()
        wanted = [p for p in suite(op, arguments.suite) if re.search(arguments.cases, str(p))]
        points = [p for p in wanted if (op, str(p), dtype, mode) not in done]
        if len(points) < len(wanted):
            say(f"{op} {dtype} {mode}: {len(points)} of {len(wanted)} cases are left")
        rows: list[dict[str, Any]] = []
        try:
            with progress(f"{op} {dtype} {mode}", len(points)) as steps:
                for point in points:
                    if machine is not None:
                        machine = machine.best(roofline.measure(arguments.clock, seconds=PROBE_AGAIN))
                    found = measure_case(point, dtype, arguments, machine, store.stamp(arguments.clock, stamped["cpu"]))
                    store.append(path, found)
                    rows += found
                    steps.line(_headline(point, found))
                    steps.advance()
        finally:  # an interrupted run shows what it has
            if rows:
                summary.show(rows)
                say(f"rows appended to {path}")


def measure_case(
    point: Point, dtype: str, arguments: argparse.Namespace, machine: Roofline | None, stamped: dict[str, Any]
) -> list[dict[str, Any]]:
    """One case: check, time, describe; a row for every candidate, those that could not run included."""
    torch._dynamo.reset()
    gc.collect()
    found = prepare(
        point, DTYPES[dtype], arguments.training, arguments.backends, arguments.peers, arguments.forms or _BOTH_FORMS
    )
    calls = {c.name: c.runner.run for c in found if c.runner is not None}
    gauges = {}
    if machine is not None:
        for name, dense in ((LIMIT, False), (DENSE_LIMIT, True)):
            work = work_of(point, DTYPES[dtype].itemsize, arguments.training, dense)
            gauges[name] = roofline.gauge(work, dtype, machine, arguments.clock)
    with torch.set_grad_enabled(arguments.training):
        timings = time_interleaved(
            calls, seconds=arguments.seconds, rounds=ROUNDS, clock=arguments.clock, settle=SETTLE, gauges=gauges
        )
    common = stamped | {
        "op": point.op,
        "case": str(point),
        "dtype": dtype,
        "mode": "training" if arguments.training else "forward",
    }
    return [common | describe(point, c, timings, dtype, arguments.training, machine) for c in found]


def describe(
    point: Point,
    candidate: Candidate,
    timings: dict[str, Timing],
    dtype: str,
    training: bool,
    machine: Roofline | None,
) -> dict[str, Any]:
    """The part of a row that depends on the candidate."""
    timing = timings.get(candidate.name)
    row: dict[str, Any] = {
        "candidate": candidate.name,
        "kind": candidate.kind,
        "resolved": candidate.resolved,
        "status": candidate.status,
        "note": candidate.note,
    }
    if candidate.max_error is not None:
        row["max_error"] = f"{candidate.max_error:.3g}"
    if timing is None:
        return row
    work = work_of(point, DTYPES[dtype].itemsize, training, candidate.dense)
    row |= {
        "us_p20": round(timing.low, 2),
        "us_p50": round(timing.median, 2),
        "us_p80": round(timing.high, 2),
        "gflops": round(work.flops / timing.median / 1e3, 2),
        "gbs": round(work.bytes / timing.median / 1e3, 2),
        "intensity": round(work.flops / work.bytes, 2),
    }
    if machine is not None:
        best, beside = limit(work, dtype, machine), timings[DENSE_LIMIT if candidate.dense else LIMIT].median
        row |= {
            "limit_us": round(beside, 2),
            "percent": round(100 * beside / timing.median, 1),
            "percent_of_best": round(100 * best.microseconds / timing.median, 1),
            "bound": best.bound,
            "peak_gflops": round(machine.peaks[dtype] / 1e9, 1),
            "read_gbs": round(machine.levels[-1].read / 1e9, 1),
            "copy_gbs": round(machine.levels[-1].copy / 1e9, 1),
        }
    return row


def _headline(point: Point, rows: Sequence[dict[str, Any]]) -> str:
    """One line a case: ours, the best peer that computes the same, what failed."""
    ours = {row["candidate"]: row for row in rows if row["kind"] == "ours" and row["status"] == "ok"}
    peers = [row for row in rows if row["kind"] == "peer" and row["status"] == "ok" and "dense" not in row["candidate"]]
    parts = [
        f"{name} {row['us_p50']:,.0f} µs" + (f" ({row['percent']:.0f} % of the limit)" if "percent" in row else "")
        for name, row in ours.items()
        if name in ("automatic", "packed")
    ]
    if peers:
        best = min(peers, key=lambda row: row["us_p50"])
        parts.append(f"best peer {best['candidate']} {best['us_p50']:,.0f} µs")
    wrong = [f"{row['candidate']} is wrong: {row['note']}" for row in rows if row["status"] == "wrong"]
    beaten = [
        f"{row['candidate']} beats the limit: the model is wrong" for row in rows if row.get("percent_of_best", 0) > 100
    ]
    return "  ".join([f"{point!s:<36}", ", ".join(parts), *wrong, *beaten])


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_memory() -> None:
    """Let torch's outputs lie in memory that was in use before, as those of the engines do.

    glibc returns every block above 32 MiB to the system when it is freed; the page faults of the next one took 60 of the
    92 ms of a layer with an output of 103 MB, and all candidates but the engines, whose outputs are bound once, paid them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


_BOTH_FORMS = ("unpacked", "packed")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from benchmarks.models import NETWORKS

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    targets = [*OPS, *NETWORKS, "models", "memory", "all"]
    parser.add_argument("targets", nargs="+", metavar="target", help=f"of {', '.join(targets)}")
    backends = sorted({name for spec in OPS.values() for name in spec.backends} | {"automatic"})
    parser.add_argument("--backends", nargs="+", metavar="B", choices=backends, help=f"of {', '.join(backends)}")
    parser.add_argument("--peers", nargs="*", metavar="P", choices=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--suite", default="small", choices=["small", "full"])
    parser.add_argument("--cases", default="", metavar="REGEX", help="of ops only the cases whose name matches")
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--packed", dest="forms", action="append_const", const="packed", help="packed weights only")
    parser.add_argument("--unpacked", dest="forms", action="append_const", const="unpacked", help="plain weights only")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each candidate of each case")
    parser.add_argument("--threads", type=int, help="torch's threads, the engines' likewise")
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: processor time, for a shared machine"
    )
    parser.add_argument("--resume", action="store_true", help="skip what the CSV holds of this commit and machine")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.targets if name not in targets]
    if unknown:
        parser.error(f"target: expected one of {', '.join(targets)}, got {', '.join(unknown)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.clock == "cpu" and torch.get_num_threads() > 1:
        parser.error("--clock cpu counts the time of all threads: it needs --threads 1")
    return arguments


def main() -> None:
    """Measure what was asked for, in order."""
    from benchmarks import memory, models

    arguments = parse()
    keep_memory()
    wanted = set(arguments.targets)
    ops = [op for op in OPS if wanted & {op, "all"}]
    networks = [name for name in models.NETWORKS if wanted & {name, "models", "all"}]
    try:
        machine = None
        if ops:
            machine = measure_machine(arguments.clock)
        for op in ops:
            run_op(op, arguments, machine)
        if networks:
            models.run(networks, arguments)
        if wanted & {"memory", "all"}:
            memory.run(arguments)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; what is done is in the CSV, --resume goes on from there") from None


def measure_machine(clock: str) -> Roofline | None:
    """The roofline, printed; None with a sentence where it cannot be measured."""
    try:
        machine = roofline.measure(clock)
    except RuntimeError as reason:
        say(f"no percent of the limit: {reason}")
        return None
    say(f"{roofline.cpu_name()}, {machine}")
    return machine


if __name__ == "__main__":
    main()
