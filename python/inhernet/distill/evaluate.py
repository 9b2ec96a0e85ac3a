"""Figures of a network on a loader: accuracy, loss, and fidelity to its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .batches import default_forward, target_of, to_device
from .guards import evaluating
from .losses import kl_to_teacher


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    teacher: nn.Module | None = None,
    forward: Callable[[nn.Module, Any], Any] = default_forward,
) -> dict[str, float]:
    """Mean figures over a loader of classification batches, in eval mode; flags are put back.

    Args:
        model: judged on the device its parameters are on; outputs logits `[..., C]`.
        loader: batches as in `fit`; targets are class indices `[...]`, and may be missing.
        teacher: what fidelity is measured against.
        forward: as in `fit`.

    Returns:
        `accuracy` and `loss` (cross-entropy) if there are targets; with a teacher `kl` (mean `KL(p_t ‖ p)`),
        `agreement` (share of equal decisions) and, with targets, `teacher_accuracy`.

    Raises:
        ValueError: no batches, or neither targets nor a teacher.

    Example:
        >>> evaluate(nn.Linear(4, 3), [(torch.randn(8, 4), torch.randint(3, (8,)))]).keys()
        dict_keys(['accuracy', 'loss'])
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums: dict[str, float] = {}
    rows = 0

    def add(name: str, value: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + float(value)

    with evaluating(model), evaluating(teacher):
        for batch in loader:
            batch = to_device(batch, device)
            logits, target = forward(model, batch).float().flatten(0, -2), target_of(batch)
            rows += len(logits)
            if target is not None:
                target = target.flatten()
                add("accuracy", (logits.argmax(-1) == target).sum())
                add("loss", F.cross_entropy(logits, target, reduction="sum"))
            if teacher is not None:
                guide = forward(teacher, batch).float().flatten(0, -2)
                add("kl", kl_to_teacher(logits, guide) * len(logits))
                add("agreement", (logits.argmax(-1) == guide.argmax(-1)).sum())
                if target is not None:
                    add("teacher_accuracy", (guide.argmax(-1) == target).sum())
    if rows == 0:
        raise ValueError("loader gave no rows, expected at least one batch")
    if not sums:
        raise ValueError("the batches have no targets and there is no teacher: nothing to measure")
    return {name: value / rows for name, value in sums.items()}
