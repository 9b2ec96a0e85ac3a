"""Figures of a network on a loader: accuracy, loss, and fidelity to its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inhernet.console import progress
from inhernet.decompose.batches import token_masks
from inhernet.decompose.rows import (
    batches_of,
    class_targets,
    counted,
    decided,
    length_of,
    not_finite,
    nothing_counted,
    target_of,
)

from .batches import default_forward, to_device
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

    Padded tokens (a mapping's `attention_mask`) and rows with the target −100 count in no figure.

    Args:
        model: judged on the device its parameters are on; outputs logits `[..., C]`.
        loader: batches as in `fit`, read once; targets are class indices `[...]` or probabilities `[..., C]`, and may
            be missing.
        teacher: what fidelity is measured against.
        forward: as in `fit`.

    Returns:
        `accuracy` and `loss` (cross-entropy) if there are targets; with a teacher `kl` (mean `KL(p_t ‖ p)`),
        `agreement` (share of equal decisions) and, with targets, `teacher_accuracy`. Where logits are not finite, the
        figures that they enter are NaN or infinite, and `nonfinite_rows` and `teacher_nonfinite_rows` count such rows.

    Raises:
        TypeError: the loader is a single batch.
        ValueError: no rows, neither targets nor a teacher, or targets that are no classes (with the batch's number).

    Example:
        >>> evaluate(nn.Linear(4, 3), [(torch.randn(8, 4), torch.randint(3, (8,)))]).keys()
        dict_keys(['accuracy', 'loss'])
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    nonfinite: dict[str, int] = {}
    seen = 0

    def add(name: str, total: Tensor, rows: int) -> None:
        sums[name] = sums.get(name, 0.0) + float(total)
        counts[name] = counts.get(name, 0) + rows

    batches = batches_of(loader)
    with evaluating(model), evaluating(teacher), progress("evaluate", length_of(loader)) as bar:
        for number, batch in batches:
            batch = to_device(batch, device)
            logits, target = forward(model, batch).float(), target_of(batch)
            seen += logits.shape[:-1].numel()
            try:
                target = None if target is None else class_targets(target, logits)
            except ValueError as error:
                raise ValueError(f"batch {number}: {error}") from error
            keep = counted(logits, token_masks(batch), target)
            rows = int(keep.sum())
            logits = _rows(logits, keep)
            bad = {"nonfinite_rows": not_finite(logits)}
            if target is not None:
                target = target[keep]
                add("accuracy", decided(logits, target).sum(), rows)
                add("loss", F.cross_entropy(logits, target, reduction="sum"), rows)
            if teacher is not None:
                guide = _rows(forward(teacher, batch).float(), keep)
                bad["teacher_nonfinite_rows"] = not_finite(guide)
                add("kl", kl_to_teacher(logits, guide) * rows, rows)
                add("agreement", decided(logits, guide).sum(), rows)
                if target is not None:
                    add("teacher_accuracy", decided(guide, target).sum(), rows)
            for name, where in bad.items():
                nonfinite[name] = nonfinite.get(name, 0) + int(where.sum())
            bar.advance()
    if nonfinite and not sums:
        raise ValueError("the batches have no targets and there is no teacher: nothing to measure")
    if not any(counts.values()):
        raise nothing_counted(seen)
    figures = {name: total / counts[name] for name, total in sums.items() if counts[name]}
    return figures | {name: count for name, count in nonfinite.items() if count}


def _rows(logits: Tensor, keep: Tensor) -> Tensor:
    return logits.flatten(0, -2)[keep]
