"""`inhernet optimize`: the fastest form of every layer, by measuring."""

from __future__ import annotations

import argparse

from inhernet.console import say

from .options import Command, add_model, load_model, need_free
from .usage import DATA_HELP, OVERWRITE_HELP


def add(command: Command) -> None:
    parser = command("optimize", run, "the fastest form of every layer for inference here, by measuring")
    add_model(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="where to write")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    parser.add_argument("--data", metavar="DATA", help=f"take an input from here: {DATA_HELP}")
    parser.add_argument("--input", metavar="SHAPE", help="shape of one example, such as 3x32x32")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="examples per call (default: 1)")
    parser.add_argument("--seconds", type=float, default=0.1, help="per figure")


def run(arguments: argparse.Namespace) -> None:
    import inhernet

    from . import specs

    if arguments.batch < 1:
        raise specs.UsageError(f"--batch is {arguments.batch}, expected at least 1")
    need_free(arguments.out, arguments)
    model = load_model(arguments, optimized=False)
    loader = specs.data(arguments.data).judge if arguments.data else None
    inputs = specs.example_inputs(model, arguments.input, loader)(arguments.batch)
    inhernet.save(inhernet.optimize(model, inputs, seconds=arguments.seconds), arguments.out)
    say(f"written to {arguments.out}")
