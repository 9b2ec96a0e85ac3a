"""`inhernet restore`: give an inherited network some of its rank back."""

from __future__ import annotations

import argparse
from typing import Any

from inhernet.console import say

from .convert import show_refinement
from .options import Command, add_model, add_weights, load_model, need_free
from .plan import show_plan
from .usage import DATA_HELP, OVERWRITE_HELP, TEACHER_HELP


def add(command: Command) -> None:
    parser = command("restore", run, "give an inherited network rank back, in the layers where it hurts most")
    add_model(parser)
    parser.add_argument("--teacher", metavar="TEACHER", required=True, help=TEACHER_HELP)
    add_weights(parser)
    parser.add_argument("--data", metavar="DATA", help=f"calibration data: {DATA_HELP}")
    parser.add_argument(
        "--budget", type=float, required=True, help="share of the selected layers' parameters, more than now"
    )
    parser.add_argument(
        "--no-refine", action="store_true", help="leave the blocks as they are; default: refine with --data"
    )
    parser.add_argument("--refine-steps", type=int, default=300, metavar="N", help="per block (default: 300)")
    parser.add_argument("--out", metavar="DIR", required=True, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)


def run(arguments: argparse.Namespace) -> None:
    import inhernet
    from inhernet.config import RefineConfig

    from . import specs

    need_free(arguments.out, arguments, arguments.dir, arguments.weights)
    model = load_model(arguments, optimized=False)
    teacher = specs.teacher(arguments.teacher, arguments.weights)
    calibration = specs.data(arguments.data, arguments.teacher).calibration if arguments.data else None
    refine = not arguments.no_refine and RefineConfig(steps=arguments.refine_steps)
    larger: Any = inhernet.restore(model, teacher, arguments.budget, calibration, refine=refine)
    show_plan(larger.inhernet_plan)
    show_refinement(larger.inhernet_refinement)
    inhernet.save(larger, arguments.out)
    say(f"written to {arguments.out}")
