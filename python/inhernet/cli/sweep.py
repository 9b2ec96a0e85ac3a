"""`inhernet sweep`: what is kept at several budgets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from inhernet.console import say, table

from .options import Command, add_teacher
from .usage import DATA_HELP

if TYPE_CHECKING:
    from inhernet.sweep import SweepRow


def add(command: Command) -> None:
    parser = command("sweep", run, "convert at several budgets: fidelity against parameters, MACs and time; resumes")
    add_teacher(parser)
    parser.add_argument("--data", metavar="DATA", required=True, help=f"to calibrate and to judge by: {DATA_HELP}")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35, 0.2], metavar="SHARE",
                        help="of the selected layers' parameters")  # fmt: skip
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--exclude", action="append", default=[], metavar="NAME", help='layer, or "re:PATTERN"')
    parser.add_argument("--no-refine", action="store_true", help="decomposed networks only")
    parser.add_argument("--refine-steps", type=int, default=300, metavar="N", help="per block (default: 300)")
    parser.add_argument("--elastic", action="store_true", help="also one network with all shares as its levels")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each latency")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="where sweep.json and sweep.png go, and are read from"
    )


def run(arguments: argparse.Namespace) -> None:
    from inhernet.config import InheritConfig, RefineConfig
    from inhernet.sweep import draw, sweep

    from . import specs

    teacher, data = specs.teacher(arguments.teacher, arguments.weights), specs.data(arguments.data, arguments.teacher)
    config = InheritConfig(heads=arguments.heads, exclude=tuple(arguments.exclude), seed=arguments.seed)
    refine = not arguments.no_refine and RefineConfig(steps=arguments.refine_steps, seed=arguments.seed)
    rows = sweep(
        teacher, data.calibration, data.judge, arguments.shares, config, refine, directory=arguments.out,
        seconds=arguments.seconds, elastic=arguments.elastic,
    )  # fmt: skip
    show(rows)
    picture = Path(arguments.out) / "sweep.png"
    try:
        draw(rows, picture, arguments.teacher)
        say(f"written to {arguments.out}: sweep.json, sweep.png")
    except ModuleNotFoundError as error:
        say(f"written to {arguments.out}: sweep.json; {error}")


def show(rows: Sequence[SweepRow]) -> None:
    cells = []
    for row in rows:
        figures = [row.agreement, row.accuracy]
        cells.append((
            f"{row.share:.0%}", row.kind, f"{row.params:,}",
            f"{row.params / row.teacher_params:.1%}", f"{row.macs / row.teacher_macs:.1%}" if row.teacher_macs else "",
            f"{row.milliseconds:.2f}", f"{row.teacher_milliseconds / row.milliseconds:.2f}×",
            f"{row.relative_error:.4f}", f"{row.cosine:.4f}", *("" if f is None else f"{f:.4f}" for f in figures),
        ))  # fmt: skip
    columns = ("budget", "", "parameters", "of all", "MACs", "ms", "speed", "relative error", "cosine", "same decision",
               "accuracy")  # fmt: skip
    accuracy = "" if rows[0].teacher_accuracy is None else f"; teacher's accuracy {rows[0].teacher_accuracy:.4f}"
    table(f"fidelity by budget (speed: teacher = 1{accuracy})", columns, cells, left=(0, 1))
