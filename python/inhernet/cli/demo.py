"""`inhernet demo`: the whole job on real data."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Command


def add(command: Command) -> None:
    parser = command("demo", run, "the whole job on real data")
    parser.add_argument("name", choices=("digits", "minilm", "lm"))
    parser.add_argument("--out", metavar="DIR", help="where results go (default: runs/NAME)")
    parser.add_argument("--seeds", type=int, default=1, help="digits: runs per split")
    parser.add_argument("--splits", type=int, default=1, help="digits: divisions of the images")
    parser.add_argument(
        "--no-compile", action="store_true", help="digits: leave out torch.compile of the published form"
    )


def run(arguments: argparse.Namespace) -> int:
    from .specs import UsageError

    out = Path(arguments.out or Path("runs") / arguments.name)
    for name in ("seeds", "splits"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if arguments.name == "minilm":
        from inhernet.demos import minilm

        minilm.run(out)
        return 0
    if arguments.name == "lm":
        from inhernet.demos import source_model

        source_model.run(out)
        return 0
    from inhernet.demos import digits

    config = digits.DigitsConfig(compile=not arguments.no_compile)
    return digits.run(out, config, seeds=arguments.seeds, splits=arguments.splits)
