"""`inhernet train`: fine-tune an inherited network against its teacher."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inhernet.console import say

from .options import Command, add_model, add_weights, load_model, need_free
from .usage import DATA_HELP, OVERWRITE_HELP, TEACHER_HELP

if TYPE_CHECKING:
    from torch import nn


def add(command: Command) -> None:
    parser = command("train", run, "fine-tune an inherited network against its teacher; resumes where it stopped")
    add_model(parser)
    parser.add_argument("--teacher", metavar="TEACHER", help=TEACHER_HELP)
    add_weights(parser)
    parser.add_argument("--data", metavar="DATA", required=True, help=DATA_HELP)
    parser.add_argument("--objective", choices=("default", "published", "published-demo", "task"), help="loss (default: "
                       "default with a teacher, task without)")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="of dense weights; factors are not decayed")
    parser.add_argument("--clip-norm", type=float, default=1.0)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--ema", type=float, help="decay of an average of the weights, such as 0.999")
    parser.add_argument("--amp", choices=("bfloat16",), help="autocast dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", help="where to write (with --overwrite default: DIR itself)")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    parser.add_argument("--restart", action="store_true", help="forget an interrupted run")


def run(arguments: argparse.Namespace) -> None:
    import inhernet
    from inhernet.distill import OBJECTIVES, TrainConfig, fit

    from . import specs

    names = ("epochs", "lr", "optimizer", "weight_decay", "clip_norm", "accumulate", "ema", "amp", "seed")
    config = TrainConfig(**{name: getattr(arguments, name) for name in names})
    objective = OBJECTIVES[arguments.objective or ("default" if arguments.teacher else "task")]
    if objective.kd and not arguments.teacher:
        raise specs.UsageError(f"--objective is {arguments.objective!r}, which needs --teacher TEACHER")
    if arguments.out is None and not arguments.overwrite:
        raise specs.UsageError("--out is missing; give a directory to write to, or --overwrite to replace DIR itself")
    out = Path(arguments.out or arguments.dir)
    need_free(out, arguments)
    model = load_model(arguments, optimized=False)
    teacher = specs.teacher(arguments.teacher, arguments.weights) if arguments.teacher else None
    data = specs.data(arguments.data, arguments.teacher)
    # Beside the directory, not in it: the model stays a model, and the run can go on until it is complete.
    state = out.resolve().parent / f"{out.resolve().name}.training"

    result = fit(
        model,
        data.train,
        config,
        loss=objective,
        teacher=teacher,
        validate=_validation(data.val, teacher),
        checkpoint_dir=state,
        resume=not arguments.restart,
    )
    last = result.history[-1 if result.best_epoch is None else result.best_epoch]
    need_finite(model, last, f"nothing was written to {out}, the run is in {state}; try --restart with a lower --lr")
    inhernet.save(model, out)
    shutil.rmtree(state, ignore_errors=True)
    say(f"trained in {result.seconds:.1f} s; written to {out}")


def need_finite(model: nn.Module, figures: Mapping[str, float], consequence: str) -> None:
    """Raise FloatingPointError for a trained network that is broken, by its validation figures or its tensors.

    An infinity in a buffer is none: attention masks hold some.
    """
    bad = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
    bad += [f"{name} holds NaN or infinity" for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    bad += [f"{name} holds NaN" for name, buffer in model.named_buffers() if bool(buffer.isnan().any())]
    if bad:
        raise FloatingPointError(f"the trained network is broken ({'; '.join(bad[:3])}): {consequence}")


def _validation(
    loader: Iterable[Any] | None, teacher: nn.Module | None
) -> Callable[[nn.Module], dict[str, float]] | None:
    from inhernet.distill import evaluate

    if loader is None:
        return None

    def validate(model: nn.Module) -> dict[str, float]:
        figures = evaluate(model, loader, teacher)
        return {f"val_{name}": figures[name] for name in ("accuracy", "loss", "kl") if name in figures}

    return validate
