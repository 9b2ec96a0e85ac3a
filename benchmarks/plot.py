"""Pictures of the results: `python -m benchmarks.plot` writes PNGs beside the CSVs of this machine (or `--device`).

* `<op>_ratio_<dtype>_<mode>.png`: how many times faster than each peer, a dot a shape, the bar at the geometric mean.
* `<op>_shapes_<dtype>_<mode>.png`: the same by shape, where there are few enough to name.
* `roofline_<dtype>_<mode>.png`: percent of the measured limit over the arithmetic intensity, all ops.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import store, summary
from benchmarks.baselines import PEERS
from inherit_kernels.registry import OPS

# Okabe and Ito's palette: told apart by every kind of colour vision; markers differ as well.
BLUE, ORANGE, GREEN, SKY, RED, PURPLE, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#777777",
)  # fmt: skip
FAMILIES = [  # word in the peer's name -> colour, marker; the first that matches
    ("frozen", RED, "D"),
    ("compiled", ORANGE, "s"),
    ("oneDNN", GREEN, "^"),
    ("ONNX", PURPLE, "v"),
    ("OpenVINO", SKY, "P"),
    ("", BLUE, "o"),
]
WIDTH = 8.0  # inches: a README shows about 800 pixels
NAMED = 16  # shapes that still can be named in one figure


def style_of(peer: str) -> dict[str, Any]:
    """Colour and marker of a peer; dense ones are hollow."""
    colour, marker = next((c, m) for word, c, m in FAMILIES if word in peer)
    hollow = PEERS[peer].dense if peer in PEERS else False
    return {"color": colour, "marker": marker, "markerfacecolor": "white" if hollow else colour, "linestyle": "none"}


def by_peer(rows: Sequence[dict[str, Any]], title: str, path: Path) -> bool:
    """One line a peer, one dot a shape; False where there is nothing to draw."""
    found = [ratio for ratio in _preferred(rows) if ratio.peer in PEERS]
    if not found:
        return False
    figure, axes = _figure(0.9 + 0.32 * len(found))
    for line, ratio in enumerate(found):
        values = list(ratio.ratios.values())
        offsets = [line + 0.22 * ((7 * i) % 5 - 2) / 2 for i in range(len(values))]  # spread, the same on every run
        axes.plot(values, offsets, markersize=4.5, alpha=0.75, markeredgewidth=0.9, **style_of(ratio.peer))
        axes.plot([ratio.mean] * 2, [line - 0.38, line + 0.38], color="black", linewidth=1.6)
        axes.annotate(f"{ratio.mean:.2f}×", (1.01, line), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(found)), [ratio.peer for ratio in found])
    axes.invert_yaxis()
    _finish(figure, axes, f"{title}\na dot is a shape, the bar and the figure are geometric means", path)
    return True


def by_shape(rows: Sequence[dict[str, Any]], title: str, path: Path) -> bool:
    """One line a shape, one marker a peer that computes the same; False where shapes are too many or none."""
    found = [ratio for ratio in _preferred(rows) if ratio.peer in PEERS and not PEERS[ratio.peer].dense]
    cases = list(dict.fromkeys(case for ratio in found for case in ratio.ratios))
    if not cases or len(cases) > NAMED:
        return False
    figure, axes = _figure(0.34 * len(cases))
    for ratio in found:
        lines = [cases.index(case) for case in ratio.ratios]
        axes.plot(list(ratio.ratios.values()), lines, markersize=6, label=ratio.peer, **style_of(ratio.peer))
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.35, -0.55 / (0.34 * len(cases))), ncols=3, frameon=False, fontsize=9
    )
    _finish(figure, axes, title, path)
    return True


def roofline(by_op: dict[str, Sequence[dict[str, Any]]], title: str, path: Path) -> bool:
    """Percent of the limit over intensity, one panel an op: packed, plain, and the best peer of the same function."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = {op: rows for op, rows in by_op.items() if any(row["percent"] for row in rows)}
    if not panels:
        return False
    columns = min(2, len(panels))
    figure, grid = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(WIDTH, 3.1 * -(-len(panels) // columns)), squeeze=False
    )
    for axes, (op, rows) in zip(grid.flat, panels.items(), strict=False):
        timed = [row for row in rows if row["status"] == "ok" and row["percent"]]
        best: dict[str, dict[str, Any]] = {}
        for row in timed:
            same = row["kind"] == "peer" and not PEERS[row["candidate"]].dense
            if same and float(row["us_p50"]) < float(best.get(row["case"], {"us_p50": "inf"})["us_p50"]):
                best[row["case"]] = row
        for label, members, colour, marker in (
            ("best peer", list(best.values()), GREY, "x"),
            ("plain call", [row for row in timed if row["candidate"] == "automatic"], ORANGE, "s"),
            ("packed", [row for row in timed if row["candidate"] == "packed"], BLUE, "o"),
        ):
            points = [(float(row["intensity"]), float(row["percent"])) for row in members]
            axes.plot(
                *zip(*points, strict=True) if points else ((), ()), marker, color=colour, label=label, markersize=5
            )
        axes.set(xscale="log", ylim=(0, 105))
        axes.set_title(op, fontsize=10)
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axhline(100, color="black", linewidth=1)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("% of the measured limit")
    for axes in grid[-1]:
        axes.set_xlabel("FLOP a byte")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    _save(figure, path)
    return True


def _preferred(rows: Sequence[dict[str, Any]]) -> list[summary.Ratio]:
    """A ratio a peer: of the packed form where there is one."""
    found: dict[str, summary.Ratio] = {}
    for ratio in summary.ratios(rows):
        if ratio.peer not in found or ratio.ours == "packed":
            found[ratio.peer] = ratio
    return list(found.values())


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(WIDTH, height + 0.6))


def _finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", linewidth=1)
    low, high = axes.get_xlim()
    axes.axvspan(low, 1, color=GREY, alpha=0.12, zorder=0)  # slower than the peer
    axes.set_xlim(low, high)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("times faster than the peer (grey: slower)")
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    print(path)


def main() -> None:
    """Draw whatever there are results of."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="the folder under benchmarks/results; this machine's when left out")
    parser.add_argument("--threads", help="only runs on that many threads")
    parser.add_argument("--out", type=Path, help="where the pictures go; beside the CSVs when left out")
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    folder = arguments.out or store.path_of("", arguments.device).parent
    folder.mkdir(parents=True, exist_ok=True)
    panels: dict[tuple[str, ...], dict[str, Any]] = {}
    for op in OPS:
        rows = [r for r in store.read(store.path_of(op, arguments.device)) if arguments.threads in (None, r["threads"])]
        for (_, dtype, mode, threads), members in summary.groups(summary.newest(rows)).items():
            if threads != max(row["threads"] for row in rows):
                continue  # one picture an op: that of the whole machine
            panels.setdefault((dtype, mode), {})[op] = members
            plural = "s" * (threads != "1")
            title = f"{op}, {dtype}, {mode}: {members[-1]['cpu']}, {threads} thread{plural}"
            by_peer(members, title, folder / f"{op}_ratio_{dtype}_{mode}.png")
            by_shape(members, title, folder / f"{op}_shapes_{dtype}_{mode}.png")
    for (dtype, mode), by_op in panels.items():
        machine = next(iter(by_op.values()))[-1]
        plural = "s" * (machine["threads"] != "1")
        title = f"{dtype}, {mode}: {machine['cpu']}, {machine['threads']} thread{plural}"
        roofline(by_op, title, folder / f"roofline_{dtype}_{mode}.png")


if __name__ == "__main__":
    main()
