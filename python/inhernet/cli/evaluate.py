"""`inhernet eval`: accuracy, and fidelity to the teacher."""

from __future__ import annotations

import argparse
import math
from typing import Any

from inhernet.console import say, table

from .options import Command, add_model, add_weights, load_model
from .usage import DATA_HELP, TEACHER_HELP


def add(command: Command) -> None:
    parser = command("eval", run, "accuracy, and fidelity to the teacher, on the data's test part")
    add_model(parser)
    parser.add_argument("--teacher", metavar="TEACHER", help=TEACHER_HELP)
    add_weights(parser)
    parser.add_argument("--data", metavar="DATA", required=True, help=DATA_HELP)


def run(arguments: argparse.Namespace) -> int:
    import inhernet
    from inhernet.distill import evaluate

    from . import specs

    model = load_model(arguments)
    judge = specs.data(arguments.data, arguments.teacher).judge
    trouble = ""
    if arguments.teacher is None:
        figures: dict[str, Any] = {**evaluate(model, judge)}
        if bad := figures.pop("nonfinite_rows", 0):
            trouble = f"the network's output is not finite (NaN or infinity) in {bad:,} rows"
    else:
        teacher = specs.teacher(arguments.teacher, arguments.weights)
        report = inhernet.verify(model, teacher, judge)
        trouble = report.trouble
        figures = {"parameters": report.params, "teacher's parameters": report.teacher_params}
        if report.accuracy is not None:
            figures |= {"accuracy": report.accuracy, "teacher's accuracy": report.teacher_accuracy}
        for output in report.outputs:
            prefix = "" if len(report.outputs) == 1 else f"{output.name}: "
            figures |= {f"{prefix}rows": output.rows, f"{prefix}cosine": output.cosine}
            figures |= {f"{prefix}relative error": output.relative_error}
            if output.kl is not None:
                figures |= {f"{prefix}KL to the teacher": output.kl, f"{prefix}same decision": output.agreement}
    rows = [(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}") for name, value in figures.items()]
    table(str(arguments.dir), ("figure", "value"), rows)
    if not trouble and not all(math.isfinite(value) for value in figures.values()):
        trouble = "a figure is not finite: the targets are not, or the teacher's outputs are all 0"
    if trouble:
        say(f"inhernet: {trouble}", stderr=True)
    return 1 if trouble else 0
