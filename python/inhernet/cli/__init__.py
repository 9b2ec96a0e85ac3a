"""The command line: `inhernet plan|convert|restore|sweep|train|eval|bench|optimize|export|doctor|demo`, a file for each command.

Exit status: 0 done, 1 a check failed, 2 wrong input, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from inhernet.console import say

from . import bench, convert, demo, doctor, evaluate, export, optimize, plan, restore, sweep, train

COMMANDS = (plan, convert, restore, sweep, train, evaluate, bench, optimize, export, doctor, demo)
EPILOG = """\
TEACHER  hf:DIR (a transformers directory), or package.module:function called without arguments; with
         --weights FILE.safetensors for its weights
DATA     digits; text:PATH, a file or folder of .txt, .md, .jsonl, .csv; images:DIR, a folder of images (both read by
         the tokenizer or image processor of a teacher hf:DIR); or package.module:function returning (train, val),
         (train, val, test), a mapping with these keys, or one iterable of batches (x, target)
DIR      a directory that `convert` wrote (or `optimize`)

examples
  inhernet plan inhernet.models:resnet20 --rank 8
  inhernet convert hf:DIR --data text:notes.txt --budget 0.5 --out SMALL
  inhernet convert TEACHER --weights W.safetensors --data DATA --budget 0.5 --out DIR
  inhernet convert TEACHER --weights W.safetensors --data DATA --levels 0.75 0.5 0.3 --out ELASTIC
  inhernet restore DIR --teacher TEACHER --weights W.safetensors --data DATA --budget 0.7 --out LARGER
  inhernet sweep TEACHER --weights W.safetensors --data DATA --out SWEEP
  inhernet train DIR --teacher TEACHER --weights W.safetensors --data digits --epochs 5 --out TRAINED
  inhernet eval TRAINED --teacher TEACHER --weights W.safetensors --data digits
  inhernet bench TRAINED
  inhernet optimize TRAINED --input 3x32x32 --batch 1 --out FAST
  inhernet export TRAINED --format onnx --input 3x32x32 --out net.onnx
  inhernet demo digits"""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message: str) -> NoReturn:
        say(f"inhernet: error: {message} (see `{self.prog} --help`)", stderr=True)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Example:
        >>> main(["plan", "inhernet.models:resnet20", "--rank", "x"])  # doctest: +SKIP
        2
    """
    try:
        arguments = build_parser().parse_args(argv)
        return _guarded(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0


def _guarded(arguments: argparse.Namespace) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signum", signal.SIGINT)
        text = str(stop) or "stopped"
        again = "; the same command goes on from there" if hasattr(stop, "path") else ""
        say(f"inhernet: {text}{again}", stderr=True)
        return 128 + number
    except BrokenPipeError:
        # The reader (head, less) went away: nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        return _failed(arguments, error, 2)
    except Exception as error:
        return _failed(arguments, error, 1)


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    say(f"inhernet: warning: {' '.join(str(message).split())}", stderr=True)


def _failed(arguments: argparse.Namespace, error: Exception, status: int) -> int:
    if arguments.debug:
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    hint = "" if status == 2 else f" ({type(error).__name__}; --debug shows where)"
    say(f"inhernet: error: {text}{hint}", stderr=True)
    return status


def build_parser() -> Parser:
    """The parser of all commands."""
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = Parser("inhernet", description="Make a trained network smaller by inheriting from it.", epilog=EPILOG,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(run=run)
        return added

    for each in COMMANDS:
        each.add(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
