"""Options and environment of the tests."""

from __future__ import annotations

import csv
import dataclasses
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=1000, help="random calls of the fuzz test")
    parser.addoption("--fuzz-random", action="store_true", help="other random calls on every run")
    parser.addoption("--gpu-rehearsal", action="store_true", help="the bodies of the GPU tests on the CPU, a few cases")


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") == "1":
        from inherit_kernels.testing.interpreter import repair

        repair()


# --- what compiled kernels use, printed and kept -----------------------------------------------------------------------

_used: list[dict] = []


@pytest.fixture
def keep_resources():
    """Notes the `Resources` of a compiled kernel with its bucket; the end of the run prints and writes them."""
    return lambda found, **bucket: _used.append({**dataclasses.asdict(found), **bucket})


def pytest_terminal_summary(terminalreporter):
    if not _used:
        return
    path = Path(terminalreporter.config.rootpath) / "build" / "triton_resources.csv"
    path.parent.mkdir(exist_ok=True)
    columns = list(dict.fromkeys(name for row in _used for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(_used, key=lambda row: [str(row.get(name, "")) for name in columns[:2]]))
    groups: dict[tuple, list[dict]] = {}
    for row in _used:
        groups.setdefault((row["kernel"], row["arch"], row["bits"]), []).append(row)
    terminalreporter.section("resources of compiled kernels, the most of any configuration")
    terminalreporter.line(f"{'kernel':40} arch  bits  compiled  registers  stack   shared  wgmma")
    for (kernel, arch, bits), rows in sorted(groups.items()):
        registers, stack, shared, wgmma = (max(row[name] for row in rows) for name in columns[2:6])
        terminalreporter.line(
            f"{kernel:40} sm_{arch} {bits:4} {len(rows):9} {registers:10} {stack:6} {shared:8} {wgmma:6}"
        )
    terminalreporter.line(f"all of them: {path}")
