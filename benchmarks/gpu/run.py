"""The sweep: `python -m benchmarks.gpu.run`, on the current CUDA device, or on the CPU with `--rehearse`.

A process of its own measures; where a kernel ends it (an illegal access leaves a CUDA context unusable) or hangs it, the
candidate that ran is recorded as failed and the rest goes on in a new process. Stops in time and says what is left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import store
from benchmarks.gpu import cases, rows, summary
from benchmarks.gpu.candidates import AUTOMATIC
from benchmarks.gpu.worker import State, items_of, say
from inherit_kernels.dispatch import device_slug
from inherit_kernels.registry import OPS

SILENCE_OF_OURS = 60.0  # seconds without a line in the journal: the candidate hangs
SILENCE = 150.0
SILENCE_OF_AUTOTUNING = 300.0
MOST_CRASHES = 3  # of one candidate of one op; then it is left out there, and at once where it hung
HUNG = "no progress"
OUT_OF_TIME = "out of time"
SPARE = 25.0  # seconds in which it is worth starting a process again


def sweep(state: State) -> list[str]:
    """Measure everything that fits; returns the keys that are left."""
    lonely = 0
    while state.keys and time.time() < state.deadline - (0 if state.rehearse else SPARE):
        state.save()
        state.journal.write_text("")
        ended = _watch(state)
        entries = [json.loads(line) for line in state.journal.read_text().splitlines()]
        done = {entry["done"] for entry in entries if "done" in entry}
        state.keys = [key for key in state.keys if key not in done]
        if ended is None or ended == OUT_OF_TIME:
            break
        begun = [entry for entry in entries if "candidate" in entry]
        lonely = 0 if begun else lonely + 1
        if begun and begun[-1]["key"] not in done:
            _record(state, entries, begun[-1], ended)
        elif lonely > 1:
            say(f"the measuring process ended twice before its first case: {ended}")
            break
    return state.keys


def _watch(state: State) -> str | None:
    """Run one worker; None if it finished, else how it ended."""
    worker = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu.worker", str(state.path)])
    try:
        while True:
            try:
                code = worker.wait(timeout=0.5)
                return None if code == 0 else f"the process ended with {code}"
            except subprocess.TimeoutExpired:
                silent = time.time() - state.journal.stat().st_mtime
                if silent > _patience(state.journal.read_text().splitlines()):
                    return f"{HUNG} in {silent:.0f} s"
                if time.time() > state.deadline + SPARE:
                    return OUT_OF_TIME
    finally:
        worker.kill()
        worker.wait()


def _patience(journal: Sequence[str]) -> float:
    """How many seconds what the last line has begun may take."""
    if journal and ("autotune" in journal[-1] or "B2B" in journal[-1]):
        return SILENCE_OF_AUTOTUNING
    begun = json.loads(journal[-1]).get("candidate") if journal else None
    ours = {AUTOMATIC, *(name for spec in OPS.values() for name in spec.backends)} - {"unfused"}
    return SILENCE_OF_OURS if begun in ours else SILENCE


def _record(state: State, entries: Sequence[dict[str, Any]], last: dict[str, Any], ended: str) -> None:
    """The candidate that ran when the process ended: a row, and not again on this case."""
    key, candidate = last["key"], last["candidate"]
    reason = f"{ended} while it ran"
    say(f"! {key}: {candidate}: {ended}")
    item = next(item for item in items_of(state) if item.key == key)
    stamp = next((entry["stamp"] for entry in entries if "stamp" in entry), {"schema": rows.SCHEMA})
    common = {"time": rows.now(), "op": item.point.op, "case": str(item.point), "dtype": item.dtype, "mode": item.mode}
    row = stamp | common | {"candidate": candidate, "kind": "ours", "status": "failed", "note": reason}
    rows.append(state.results, [row])
    if candidate in ("inputs and truth", "timing"):  # no one candidate's fault: leave the case out
        state.keys = [other for other in state.keys if other != key]
        return
    state.skipped.setdefault(key, {})[candidate] = reason
    crashes = [k for k, found in state.skipped.items() if candidate in found and k.split()[0] == item.point.op]
    if len(crashes) >= MOST_CRASHES or ended.startswith(HUNG):
        state.banned.setdefault(item.point.op, {})[candidate] = f"left out after {len(crashes)} crashes on this op"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="stop in time")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th case from the I-th on")
    parser.add_argument("--op", nargs="+", default=[], metavar="OP", help="only these ops")
    parser.add_argument("--only", nargs="+", default=[], metavar="REGIME", help=f"of {', '.join(cases.REGIMES)}")
    parser.add_argument("--resume", action="store_true", help="leave out what the results hold of this commit")
    parser.add_argument("--results", type=Path, help="folder of the CSVs; benchmarks/results/<device> when left out")
    parser.add_argument("--commit", help="what the rows say; found out when left out")
    parser.add_argument("--list", action="store_true", help="print the cases in order, measure nothing")
    parser.add_argument("--rehearse", action="store_true", help="tiny cases on the CPU: the code, not the figures")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.only) - {*cases.REGIMES, "forward"}
    if unknown:
        parser.error(f"--only: expected regimes or modes, {', '.join(cases.REGIMES)}, got {', '.join(sorted(unknown))}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, then print the figures."""
    arguments = parse(argv)
    deadline = time.time() + 60 * arguments.minutes
    everything = cases.rehearsal() if arguments.rehearse else cases.sweep()
    try:
        wanted = cases.select(everything, arguments.part, arguments.op, arguments.only)
    except ValueError as wrong:
        raise SystemExit(str(wrong)) from None
    if arguments.list:
        say("\n".join(f"{item.key}  [{' '.join(item.regimes)}]" for item in wanted))
        return
    slug = "rehearsal" if arguments.rehearse else device_slug(torch.device("cuda"))
    results = arguments.results or store.path_of("", slug).parent
    results.mkdir(parents=True, exist_ok=True)
    commit = arguments.commit or rows.commit_or_digest()
    keys = [item.key for item in wanted]
    if arguments.resume:
        done = _done([row for row in rows.read(results) if row["commit"] == commit])
        keys = [key for key in keys if key not in done]
        say(f"{len(keys)} of {len(wanted)} cases are left")
    with tempfile.TemporaryDirectory() as folder:
        state = State(Path(folder) / "state.json", keys, results, deadline, arguments.rehearse, commit, {}, {})
        left = sweep(state)
    if left:
        say(f"left out for want of time: {len(left)} of {len(wanted)} cases, the first: {'; '.join(left[:5])}")
    summary.show(results)


def _done(found: Sequence[dict[str, str]]) -> set[str]:
    """The keys of measurements; those with every peer are told by max-autotune's rows."""
    keys = set()
    for row in found:
        key = f"{row['op']} {row['case']} {row['dtype']} {row['mode']}"
        keys.add(key + " all peers" if "max-autotune" in row["candidate"] else key)
    return keys


if __name__ == "__main__":
    main()
