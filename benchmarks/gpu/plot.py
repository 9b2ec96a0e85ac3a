"""Pictures of the sweep: `python -m benchmarks.gpu.plot [folder]` writes one an op beside the CSVs, if matplotlib is there.

Left, how many times faster the automatic choice is than each peer, a dot a case, cold L2; right, percent of the measured
limit over the arithmetic intensity.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.gpu import rows
from benchmarks.gpu.candidates import AUTOMATIC
from benchmarks.gpu.figures import times_of
from benchmarks.summary import geometric_mean

BLUE, GREEN, GREY = "#0072B2", "#009E73", "#777777"
Measured = Sequence[Sequence[dict[str, str]]]


def ratios(measured: Measured) -> dict[str, list[float]]:
    """peer, or another backend of ours -> its time over the automatic choice's, a figure a case."""
    found: dict[str, list[float]] = {}
    for case in measured:
        times = times_of(case, "cold")
        ours = times.pop(AUTOMATIC, None)
        mode = "" if case[0]["mode"] == "forward" else f", {case[0]['mode']}"
        for name, time in times.items():
            if ours:
                found.setdefault(name + mode, []).append(time / ours)
    return found


def draw(op: str, measured: Measured, folder: Path) -> Path | None:
    """The picture of one op; None where nothing can be compared."""
    from matplotlib import pyplot

    found = ratios(measured)
    if not found:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 1.2 + 0.3 * max(len(found), 8)), width_ratios=(2, 1))
    for line, values in enumerate(found.values()):
        spread = [line + 0.22 * ((7 * i) % 5 - 2) / 2 for i in range(len(values))]
        left.plot(values, spread, "o", color=BLUE, markersize=4, alpha=0.7)
        left.plot([geometric_mean(values)] * 2, [line - 0.35, line + 0.35], color="black", linewidth=1.5)
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    left.set_xscale("log", base=2)
    left.axvline(1, color=GREY, linewidth=0.8)
    left.set_xlabel("times faster than it, in a CUDA graph, cold L2; the bar is the geometric mean")
    _limits(right, measured)
    last = max((row for case in measured for row in case), key=lambda row: row["time"])
    figure.suptitle(f"{op}: {last['gpu']}, commit {last['commit']}", fontsize=11)
    path = folder / f"gpu_{op}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _limits(axes: Any, measured: Measured) -> None:
    for kind, colour, marker in (("memory", BLUE, "o"), ("compute", GREEN, "s")):
        points = [
            (float(row["intensity"]), float(row["percent"]))
            for case in measured
            for row in case
            if row["candidate"] == AUTOMATIC and row["percent"] and row["bound"] == kind
        ]
        axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=4, label=kind) if points else None
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.axhline(100, color=GREY, linewidth=0.8)
    axes.set_xlabel("FLOP a byte")
    axes.set_ylabel("percent of the measured limit")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.plot", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of CSVs; every GPU's when none is named")
    arguments = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("no pictures: matplotlib is not installed") from None
    matplotlib.use("Agg")
    for folder in arguments.folders or sorted({path.parent for path in store.RESULTS.glob("*/gpu_*.csv")}):
        newest = rows.newest(rows.read(folder))
        for op in dict.fromkeys(key[0] for key in newest):
            path = draw(op, [case for key, case in newest.items() if key[0] == op], folder)
            if path:
                print(path)


if __name__ == "__main__":
    main()
