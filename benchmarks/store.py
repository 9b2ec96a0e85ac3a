"""Results as files: append-only CSVs under `benchmarks/results/<device>/`, one header each.

A file whose header is older is rewritten under the new one before rows are added; its rows keep their `schema` number, and
only rows of the present schema are summarised.
"""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from inherit_kernels.dispatch import device_slug

RESULTS = Path(__file__).parent / "results"
SCHEMA = 3
#: Where and by what a figure was made; every file begins with these.
STAMP = ("schema", "time", "commit", "device", "cpu", "torch", "threads", "clock")
#: One candidate on one case of an op.
OP_COLUMNS = (
    *STAMP,
    "op",
    "case",
    "dtype",
    "mode",  # forward, or training: forward and backward
    "candidate",
    "kind",  # ours or peer
    "resolved",  # what "automatic" chose, or the version of a peer's engine
    "status",  # ok, declined (cannot run), wrong (not timed)
    "note",
    "us_p20",
    "us_p50",
    "us_p80",
    "gflops",  # merged FLOPs (the dense layer: its own) over the median
    "gbs",  # every distinct tensor once over the median
    "limit_us",  # by what was measured in the rounds of this case
    "percent",  # limit over median; of the dense layer's own limit for the dense peers
    "percent_of_best",  # the same by the best figures of the whole run
    "bound",  # compute, or the level of memory that limits
    "intensity",  # FLOP a byte
    "max_error",  # against float64, relative to the largest value
    "peak_gflops",  # the machine, measured in the same run
    "read_gbs",
    "copy_gbs",
)


def stamp(clock: str, cpu: str) -> dict[str, Any]:
    """Time, commit, machine."""
    return {
        "schema": SCHEMA,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_slug(torch.device("cpu")),
        "cpu": cpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": clock,
    }


def commit() -> str:
    """The commit of the code that runs, marked where the tree differs (the results themselves do not count)."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def path_of(name: str, device: str | None = None) -> Path:
    """The CSV of an op, or of "models" or "memory", on a device."""
    return RESULTS / (device or device_slug(torch.device("cpu"))) / f"{name}.csv"


def append(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] = OP_COLUMNS) -> None:
    """Add rows; a row without some column leaves it empty.

    Raises:
        ValueError: a row has a column that the file does not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and _header(path) != list(columns):
        _rewrite(path, columns)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of the present schema, oldest first; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("schema") == str(SCHEMA)]


def finished(path: Path, stamped: dict[str, Any], keys: Sequence[str]) -> set[tuple[str, ...]]:
    """What the file already holds of this commit, machine and number of threads: the values of `keys` of every row."""
    same = ("commit", "device", "cpu", "torch", "threads", "clock")
    return {
        tuple(row[key] for key in keys) for row in read(path) if all(row[name] == str(stamped[name]) for name in same)
    }


def _header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def _rewrite(path: Path, columns: Sequence[str]) -> None:
    """The same rows under another header, written aside and renamed; what the new header lacks is refused."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lost = {name for row in rows for name, value in row.items() if value and name not in columns}
    if lost:
        raise ValueError(f"{path}: its columns {', '.join(sorted(lost))} are unknown here; move the file away")
    aside = path.with_suffix(".tmp")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(_with_schema(rows))
    os.replace(aside, path)


def _with_schema(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return [{**row, "schema": row.get("schema") or "1"} for row in rows]
