"""The memory that training takes: peak of forward and backward of a gated layer, beside the published and the dense layer.

Two figures a candidate, each from a process of its own: what torch's allocator hands out at the peak (from its profiler; the
native library's scratch is not in it), and how far the resident memory of the process rises (everything is in it, to the page).
Both begin after the tensors of the case are made, and both count the output and all gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline, store
from benchmarks.markdown import markdown_table
from benchmarks.suites import Point, conv_point, linear_point

COLUMNS = (*store.STAMP, "op", "case", "dtype", "candidate", "torch_bytes", "rss_bytes")
CANDIDATES = ("automatic", "published", "dense")
LINEAR, CONV = "gated_lowrank_linear", "gated_lowrank_conv2d"
POINTS = [
    linear_point(LINEAR, 1024, 1024, 1024, 64, 3),
    linear_point(LINEAR, 4096, 768, 3072, 154, 3, activation="gelu"),
    conv_point(CONV, 8, (64, 56, 64, 3, 1), 32, 3, "contiguous"),
    conv_point(CONV, 8, (64, 56, 64, 3, 1), 32, 3, "channels_last", activation="relu"),
    conv_point(CONV, 32, (128, 28, 128, 3, 1), 32, 3, "contiguous"),
]
WARM = {  # the same code on almost nothing, so that libraries are loaded before the measurement begins
    LINEAR: linear_point(LINEAR, 2, 8, 8, 2, 3),
    CONV: conv_point(CONV, 1, (4, 4, 4, 3, 1), 2, 3, "contiguous"),
}
# Freed blocks go back to the system at once, so that the resident memory follows what is in use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def run(arguments: argparse.Namespace) -> None:
    """Measure all points, append the rows, print the table."""
    from inhernet.console import say, table

    stamped = store.stamp(arguments.clock, roofline.cpu_name())
    rows = []
    for dtype in arguments.dtype:
        for index, point in enumerate(POINTS):
            for candidate in CANDIDATES:
                measured = in_child(index, candidate, dtype)
                common = {"op": point.op, "case": str(point), "dtype": dtype, "candidate": candidate}
                rows.append(stamped | common | measured)
    path = store.path_of("memory")
    store.append(path, rows, COLUMNS)
    table("Forward and backward, peak memory beyond weights and input, MB", HEADER, lines(rows), left=(0, 1))
    say(f"rows appended to {path}")


def in_child(index: int, candidate: str, dtype: str) -> dict[str, int]:
    """One candidate measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", str(index), candidate, dtype, str(torch.get_num_threads())]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {candidate} on {POINTS[index]} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def step_of(point: Point, candidate: str, dtype: torch.dtype) -> Callable[[], Any]:
    """Forward and backward of one candidate."""
    from benchmarks import candidates
    from benchmarks.baselines import peers_of

    setting = candidates.set_up_without_truth(point, dtype, training=True)
    if candidate == "automatic":
        return candidates.our_runner(setting, candidate)[0].run
    return peers_of(point.op, training=True)[candidate].make(setting).run


def allocated(step: Callable[[], Any]) -> int:
    """The peak of what torch's CPU allocator hands out during a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def resident(step: Callable[[], Any]) -> int:
    """How far the resident memory of this process rises during a step."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present
    before = _status("VmRSS")
    kept = step()
    rise = _status("VmHWM") - before
    del kept
    return rise


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


HEADER = ("case", "candidate", "torch's allocator", "of published", "resident", "of published")


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One line a candidate, with its share of the published layer's peak."""
    published = {(row["op"], row["case"], row["dtype"]): row for row in rows if row["candidate"] == "published"}
    found = []
    for row in rows:
        base = published[row["op"], row["case"], row["dtype"]]
        cells = [f"{row['op']} {row['case']} {row['dtype']}", row["candidate"]]
        for column in ("torch_bytes", "rss_bytes"):
            value, reference = float(row[column]), float(base[column])
            cells += [f"{value / 1e6:.1f}", f"{value / reference:.2f}"]
        found.append(cells)
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The newest run as a Markdown table."""
    newest = max(row["time"] for row in rows)
    return "### Memory of forward and backward, MB\n\n" + markdown_table(
        HEADER, lines([row for row in rows if row["time"] == newest]), text=(0, 1)
    )


def _child(index: str, candidate: str, dtype: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    point, kind = POINTS[int(index)], getattr(torch, dtype)
    step_of(WARM[point.op], candidate, kind)()
    rss = resident(step_of(point, candidate, kind))
    print(json.dumps({"torch_bytes": allocated(step_of(point, candidate, kind)), "rss_bytes": rss}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
