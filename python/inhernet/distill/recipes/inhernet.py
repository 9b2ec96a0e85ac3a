"""InherNet: decompose the trained teacher, then train the whole decomposition end to end against it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from inhernet.config import InheritConfig
from inhernet.decompose import Plan, inherit
from inhernet.distill.losses import OBJECTIVES, Loss
from inhernet.distill.trainer import TrainConfig, TrainResult, fit

# An inherited network starts near its goal: a fifth of a student's learning rate keeps what it starts with.
CONFIG = TrainConfig(epochs=5, optimizer="sgd", lr=0.02, weight_decay=5e-4, clip_norm=1.0)


def inhernet(
    teacher: nn.Module,
    loader: Iterable[Any],
    plan: Plan | InheritConfig | None = None,
    config: TrainConfig = CONFIG,
    loss: Loss = OBJECTIVES["default"],
    calibration: Iterable[Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, TrainResult]:
    """Inherit from `teacher` and fine-tune: every weight trains, nothing is frozen.

    The paper trains with three heads and its own objective: `plan=InheritConfig(heads=3, ...)` and
    `loss=OBJECTIVES["published"]`. The defaults here are ours: one head, a mild objective, a short schedule.

    Args:
        teacher: the trained network; left untouched.
        loader: training batches, as in `fit`.
        plan: what to factorise; a `Plan` that carries statistics needs no calibration.
        config: the schedule.
        loss: an `Objective`, or any `loss(output, target, teacher_output)`.
        calibration: batches for the two-sided init; `loader` if None.
        **options: passed to `fit`.

    Returns:
        The trained network and what happened.

    Raises:
        What `inhernet.inherit` and `fit` raise.

    Source: InherNet (arXiv 2602.09509), algorithm; the two-sided init and the schedule are ours.
    """
    # A plan was made with its own statistics; a configuration (or none) is planned on the calibration data here.
    data = calibration if calibration is not None or isinstance(plan, Plan) else loader
    model = inherit(teacher, plan if plan is not None else InheritConfig(), calibration=data)
    return model, fit(model, loader, config, loss=loss, teacher=teacher, **options)
