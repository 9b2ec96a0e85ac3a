"""Distillation: losses, one trainer, recipes. Framework-free: loaders are iterables, models are `nn.Module`s."""

from __future__ import annotations

from .evaluate import evaluate
from .guards import Interrupted
from .losses import OBJECTIVES, Objective, kd_loss, kl_to_teacher
from .trainer import TrainConfig, TrainResult, fit

__all__ = [
    "OBJECTIVES",
    "Interrupted",
    "Objective",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "fit",
    "kd_loss",
    "kl_to_teacher",
]
