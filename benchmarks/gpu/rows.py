"""The rows of the sweep: `gpu_<op>.csv`, append-only, one file an op and device."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.gpu.device import Device

SCHEMA = 1
COLUMNS = (
    "schema",
    "time",  # of the case: its candidates were timed together
    "commit",  # or "tree-" and a digest of the sources, where there is no git
    "device",
    "gpu",
    "driver",
    "cuda",
    "torch",
    "triton",
    "max_clocks",  # MHz: multiprocessors/memory
    "clocks",  # after the case: MHz of both, degrees, watts
    "op",
    "case",
    "sizes",  # by the letters of the op's definition
    "regimes",  # the figures that it counts for
    "dtype",
    "mode",  # forward; backward, alone; training, both through autograd
    "candidate",
    "kind",  # ours or peer
    "resolved",  # the backend that "automatic" chose
    "status",  # ok, declined (cannot run), failed (an error or a crash), wrong (not timed)
    "note",
    "cold_us_p20",  # in a CUDA graph, nothing of the case in L2
    "cold_us",
    "cold_us_p80",
    "warm_us_p20",  # in a CUDA graph, the same memory again and again
    "warm_us",
    "warm_us_p80",
    "eager_us",  # one call from Python, elapsed
    "tflops",  # merged FLOPs (the dense layer: its own) over cold_us
    "gbs",  # every distinct tensor once over cold_us
    "limit_us",  # the larger of FLOPs over the product rate and bytes over the copy rate, both measured in this run
    "percent",  # limit over cold_us
    "percent_warm",  # may exceed 100: L2 is faster than the memory of the limit
    "bound",  # memory or compute
    "intensity",  # FLOP a byte
    "max_error",  # against float64, relative to the largest value
    "peak_mb",  # memory of one call beyond its inputs, results included
    "output_mb",
    "copy_gbs",
    "product_tflops",
)


def stamp(device: Device, commit: str | None) -> dict[str, Any]:
    """Machine and code; `time` and `clocks` are added a case."""
    return {"schema": SCHEMA, "commit": commit or commit_or_digest(), **device.machine()}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit_or_digest() -> str:
    """The commit, or a digest of the sources, which the same files give anywhere."""
    try:
        commit = store.commit()
    except OSError:  # there is no git
        commit = "unknown"
    if not commit.startswith("unknown"):
        return commit
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for folder in ("csrc", "inherit_kernels", "benchmarks"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h") or (
                path.suffix == ".json" and "configs" in path.parts
            ):
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"tree-{digest.hexdigest()[:8]}"


def path_of(folder: Path, op: str) -> Path:
    return folder / f"gpu_{op}.csv"


def append(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows, each to the file of its op."""
    for op in dict.fromkeys(row["op"] for row in rows):
        store.append(path_of(folder, op), [row for row in rows if row["op"] == op], COLUMNS)


def read(folder: Path) -> list[dict[str, str]]:
    """The rows of all ops in a folder, oldest first in each file."""
    found: list[dict[str, str]] = []
    for path in sorted(folder.glob("gpu_*.csv")):
        with path.open(newline="") as file:
            found += [row for row in csv.DictReader(file) if row.get("schema") == str(SCHEMA)]
    return found


def newest(rows: Sequence[dict[str, str]]) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """(op, case, dtype, mode) -> the rows of its last measurement."""
    cases: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["case"], row["dtype"], row["mode"]), []).append(row)
    return {key: [r for r in found if r["time"] == max(x["time"] for x in found)] for key, found in cases.items()}
