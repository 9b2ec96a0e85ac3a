"""Options and checks that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .usage import DATA_HELP, TEACHER_HELP, UsageError

if TYPE_CHECKING:
    from torch import nn

    from inhernet.config import InheritConfig


# Adds a command: its name, what runs it, its description; returns its parser.
Command = Callable[[str, Callable[[argparse.Namespace], "int | None"], str], argparse.ArgumentParser]


def add_teacher(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", metavar="TEACHER", help=TEACHER_HELP)
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", metavar="FILE", help="safetensors file with the teacher's weights")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="inherited network")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE",
                        help="let DIR build its architecture by this package's code")  # fmt: skip
    parser.add_argument(
        "--level", type=int, metavar="N", help="of an elastic network: this level alone (0: the largest)"
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DATA", help=f"calibration data: {DATA_HELP}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--budget", type=float, help="share of the parameters, or a count above 1 (default 0.5)")
    size.add_argument("--rank", type=int, help="the same rank everywhere")
    size.add_argument("--ratio", type=float, help="share of each layer's parameters")
    size.add_argument("--energy", type=float, help="share of the squared singular values to keep in each layer")
    size.add_argument("--macs", type=float, help="share of the multiply-accumulates, or a count above 1; needs --data")
    size.add_argument(
        "--bytes", type=int, metavar="N", help="all parameters in the teacher's dtype take at most so much memory"
    )
    size.add_argument("--latency", type=float, metavar="SHARE", help="of the teacher's time here; needs --data")
    size.add_argument("--milliseconds", type=float, metavar="MS", help="time of one call here; needs --data")
    size.add_argument("--error", type=float, help="the smallest network whose output is at most so far from the teacher's, "
                      "before refinement; needs --data")  # fmt: skip
    parser.add_argument("--of", choices=("selected", "model"), default="selected", help="what --budget is a share of")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where the network will run: a GPU gets ranks that it "
                        "multiplies fast (default: cpu)")  # fmt: skip
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--init", choices=("svd", "activation", "fisher", "random", "published"),
                        help="default: fisher with --data, svd without")  # fmt: skip
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="NAME", help='layer, or "re:PATTERN"; repeatable'
    )
    parser.add_argument("--seed", type=int, default=0)


def config_of(arguments: argparse.Namespace) -> InheritConfig:
    """The configuration that the options describe (ValueError naming a bad one)."""
    from inhernet.budgets import (
        ByteBudget,
        EnergyBudget,
        FidelityBudget,
        LatencyBudget,
        MacBudget,
        ParamBudget,
        UniformRank,
        UniformRatio,
    )
    from inhernet.config import InheritConfig

    if arguments.rank is not None:
        budget: Any = UniformRank(arguments.rank)
    elif arguments.ratio is not None:
        budget = UniformRatio(arguments.ratio)
    elif arguments.energy is not None:
        budget = EnergyBudget(arguments.energy)
    elif arguments.macs is not None:
        budget = MacBudget(_share_or_count(arguments.macs))
    elif arguments.bytes is not None:
        budget = ByteBudget(arguments.bytes)
    elif arguments.latency is not None:
        budget = LatencyBudget(arguments.latency)
    elif arguments.milliseconds is not None:
        budget = LatencyBudget(arguments.milliseconds, "ms")
    elif arguments.error is not None:
        budget = FidelityBudget(arguments.error)
    else:
        budget = ParamBudget(_share_or_count(0.5 if arguments.budget is None else arguments.budget), of=arguments.of)
    return InheritConfig(
        heads=arguments.heads, budget=budget, init=arguments.init, exclude=tuple(arguments.exclude), seed=arguments.seed,
        device=arguments.device,
    )  # fmt: skip


def _share_or_count(amount: float) -> float | int:
    return int(amount) if amount > 1 and amount == int(amount) else amount


def need_free(out: str | os.PathLike[str], arguments: argparse.Namespace, *inputs: str | None) -> None:
    """Refuse, before any work is done, to write where something is that would be lost (UsageError, ValueError).

    `inputs`: directories and files that the command reads, which it must not write to even when told to overwrite.
    """
    from inhernet import checkpoint

    target = Path(os.path.realpath(out))
    for name in filter(None, inputs):
        if target in (
            Path(os.path.realpath(name)),
            Path(os.path.realpath(name)).parent if Path(name).is_file() else None,
        ):
            raise UsageError(f"--out is {str(out)!r}, which holds the input {name!r}; give another directory")
    checkpoint.check_target(target)
    if not arguments.overwrite and target.is_dir() and any(target.iterdir()):
        raise UsageError(
            f"--out is {str(out)!r}, which holds an earlier result; give another directory, or --overwrite to replace it"
        )


def trusted(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What `--trust` names, and the module of a `--teacher module:function`: the command runs that anyway."""
    module = (getattr(arguments, "teacher", None) or "").partition(":")[0]
    return (*arguments.trust, *([module] if module not in ("", "hf") else []))


def load_model(arguments: argparse.Namespace, optimized: bool = True) -> nn.Module:
    import inhernet
    from inhernet import architecture

    from . import specs

    if trusted(arguments):
        specs.find_in_current_directory()
    try:
        model = inhernet.load(arguments.dir, trust=trusted(arguments), optimized=optimized)
        return model if arguments.level is None else inhernet.cut(model, arguments.level)
    except architecture.Untrusted as error:
        raise UsageError(f"{arguments.dir}: {error.message}; if you trust it, add --trust {error.package}") from error
