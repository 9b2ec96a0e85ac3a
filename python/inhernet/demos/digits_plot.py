"""The demo's picture: fidelity and accuracy by epoch, latency by network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .digits_row import Row

# Okabe-Ito: told apart with every common colour blindness, and by line style in grey.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
STUDENT, TEACHER, GREY = "#D55E00", "#000000", "#666666"
STYLES = ("-", "--")  # one head, several


def require_matplotlib() -> Any:
    """matplotlib's pyplot on the file backend; ModuleNotFoundError with the command to install it."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the picture needs matplotlib: pip install 'inherit-kernels[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(rows: Sequence[Row], extra: Sequence[Row], path: Path) -> None:
    """Write the picture. `rows`: teacher, student, inherited networks; `extra`: only timed."""
    pyplot = require_matplotlib()
    colours = dict(zip([r.name for r in rows[2:]], COLOURS, strict=False)) | {
        rows[1].name: STUDENT,
        rows[0].name: TEACHER,
    }
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(12, 8), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1))
        draw_fidelity(figure.add_subplot(grid[0, 0]), rows, colours)
        draw_accuracy(figure.add_subplot(grid[0, 1]), rows, colours)
        for column, size in enumerate((1, 64)):
            draw_latency(figure.add_subplot(grid[1, column]), [*rows, *extra], size, colours, names=column == 0)
        figure.suptitle(
            "Digits: networks that inherit from their teacher, and a student of equal size trained from scratch",
            weight="bold",
        )
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def draw_fidelity(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    ends = []
    for r in rows[1:]:
        epochs, kl = [h["epoch"] for h in r.history], [h["kl"] for h in r.history]
        axes.plot(epochs, kl, STYLES["heads" in r.name], color=colours[r.name], marker="o", markersize=3, lw=1.6)
        ends.append((epochs[-1], kl[-1], r.name))
    axes.set_yscale("log")
    label_ends(axes, ends, colours)
    goal = rows[1].history[-1]["kl"]
    axes.axhline(goal, color=STUDENT, lw=0.8, ls=":")
    whole_epochs(axes, max(x for x, _, _ in ends))
    axes.set(xlabel="epoch (0: before any training)", ylabel="KL(teacher ‖ network), nats, test images")
    axes.set_title("Fidelity to the teacher (lower is better)", loc="left")


def draw_accuracy(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    ends = []
    for r in rows[1:]:
        epochs, accuracy = [h["epoch"] for h in r.history], [100 * h["accuracy"] for h in r.history]
        axes.plot(epochs, accuracy, STYLES["heads" in r.name], color=colours[r.name], marker="o", markersize=3, lw=1.6)
        ends.append((epochs[-1], accuracy[-1], r.name))
    teacher = 100 * rows[0].best["accuracy"]
    axes.axhline(teacher, color=TEACHER, lw=0.8, ls=":")
    lowest = min(100 * h["accuracy"] for r in rows[2:] for h in r.history)
    # Accuracy saturates here: show where the inherited networks live, the student climbs in from below.
    axes.set_ylim(min(90.0, lowest - 1), 100.4)
    last = max(x for x, _, _ in ends)
    axes.annotate(
        f"teacher {teacher:.1f} %", (last, teacher), xytext=(0, 3), textcoords="offset points", ha="right", va="bottom"
    )  # fmt: skip
    whole_epochs(axes, last)
    axes.set(xlabel="epoch (0: before any training)", ylabel="accuracy, %, test images")
    axes.set_title("Accuracy (colours as on the left)", loc="left")


def whole_epochs(axes: Any, last: float) -> None:
    axes.set_xticks(range(0, int(last) + 1, max(1, round(last / 10))))
    axes.set_xlim(-0.03 * last, 1.03 * last)


def label_ends(axes: Any, ends: Sequence[tuple[float, float, str]], colours: dict[str, str]) -> None:
    """Name every curve at its end, pushed apart where ends meet (logarithmic axis)."""
    low, high = axes.get_ylim()
    step = (high / low) ** 0.055
    previous = 0.0
    for x, y, name in sorted(ends, key=lambda end: end[1]):
        place = max(y, previous * step)
        previous = place
        axes.annotate(
            name, (x, y), xytext=(x + 0.6, place), color=colours[name], va="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "color": colours[name], "lw": 0.5, "alpha": 0.6},
        )  # fmt: skip


def draw_latency(axes: Any, rows: Sequence[Row], size: int, colours: dict[str, str], names: bool) -> None:
    timed = [r for r in rows if size in r.latency][::-1]
    values = [r.latency[size] for r in timed]
    spread = [[v.p50 - v.p20 for v in values], [v.p80 - v.p50 for v in values]]
    bars = axes.barh(
        [r.name.strip() for r in timed], [v.p50 for v in values], color=[colours.get(r.name, GREY) for r in timed],
        xerr=spread, error_kw={"lw": 0.8, "ecolor": "#333333"}, height=0.7,
    )  # fmt: skip
    teacher = timed[-1].latency[size].p50
    for bar, value in zip(bars, values, strict=True):
        text = f"  {value.p50:.2f} ms  ({value.p50 / teacher:.2f}×)"
        axes.text(value.p80, bar.get_y() + bar.get_height() / 2, text, va="center", fontsize=8)
    axes.set_xlim(0, 1.35 * max(v.p80 for v in values))
    axes.set(xlabel="ms per call: median, 20th to 80th percentile (× teacher)")
    axes.set_title(f"Latency, batch {size} (lower is better)", loc="left")
    if not names:
        axes.set_yticklabels([])
