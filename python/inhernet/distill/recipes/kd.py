"""Knowledge distillation into a given student: the control that every inherited network is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from inhernet.distill.losses import OBJECTIVES, Loss
from inhernet.distill.trainer import TrainConfig, TrainResult, fit

CONFIG = TrainConfig(epochs=20, optimizer="sgd", lr=0.1, weight_decay=5e-4)


def kd(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    config: TrainConfig = CONFIG,
    loss: Loss = OBJECTIVES["default"],
    **options: Any,
) -> TrainResult:
    """Train `student` in place against `teacher`: `ce · CE + kd · T² · KL(p_t^T ‖ p^T)`.

    Args:
        student: any network with the teacher's outputs.
        teacher: left untouched.
        loader: as in `fit`.
        config: the schedule for a network that starts from random weights.
        loss: an `Objective`, or any `loss(output, target, teacher_output)`.
        **options: passed to `fit`.

    Raises:
        What `fit` raises.

    Source: Hinton et al. 2015 (arXiv 1503.02531).

    Example:
        >>> import torch
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> result = kd(nn.Linear(4, 3), nn.Linear(4, 3), batches, TrainConfig(epochs=1), show_progress=False)
        >>> len(result.history)
        2
    """
    return fit(student, loader, config, loss=loss, teacher=teacher, **options)
