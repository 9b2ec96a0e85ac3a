"""Rows that are judged: which of them count, what a classifier decides on them, and what is said of those not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The class index of a row that counts in no figure: torch's `ignore_index`."""


def batches_of(loader: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The loader's batches, numbered from 1; they are read once, and none is held.

    Raises:
        TypeError: `loader` is a single batch, or not iterable.
    """
    if isinstance(loader, (Tensor, Mapping, str)) or not isinstance(loader, Iterable):
        raise TypeError(
            f"loader is {type(loader).__name__}, expected an iterable of batches; put a single batch in a list"
        )
    return enumerate(loader, 1)


def length_of(loader: Iterable[Any]) -> int | None:
    """How many batches the loader will give, None where it does not say."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # none, or a DataLoader over a dataset that has none
        return None


def target_of(batch: Any) -> Any:
    """The target of `(x, target)` or of a mapping with `labels`, None if there is none."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def class_targets(target: Tensor, logits: Tensor) -> Tensor:
    """The targets of `logits` `[..., C]`, one per row: class indices `[P]`, or probabilities `[P, C]`.

    Raises:
        ValueError: another shape, or an index that is neither a class nor `IGNORED`.
    """
    classes = logits.shape[-1]
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f"target is {target.dtype} of shape {tuple(target.shape)}, expected class indices of shape "
                f"{tuple(logits.shape[:-1])}, or probabilities of the logits' shape {tuple(logits.shape)}"
            )
        return target.reshape(-1, classes)
    if target.numel() != logits.shape[:-1].numel():
        raise ValueError(f"target has shape {tuple(target.shape)}, expected {tuple(logits.shape[:-1])}, one per row")
    indices = target.reshape(-1).long()
    wrong = indices[((indices < 0) | (indices >= classes)) & (indices != IGNORED)]
    if len(wrong):
        raise ValueError(
            f"target has the class {int(wrong[0])}, expected 0 to {classes - 1}, or {IGNORED} for a row to be ignored"
        )
    return indices


def counted(output: Tensor, masks: list[Tensor], target: Tensor | None = None) -> Tensor:
    """Which rows of `output` `[..., C]` count, `[P]`: real tokens by a mask of their shape, with a target not ignored."""
    keep = torch.ones(output.shape[:-1], dtype=torch.bool, device=output.device)
    for mask in masks:
        if output.dim() >= 3 and output.shape[:2] == mask.shape:
            keep &= mask.to(keep.device).reshape(*mask.shape, *[1] * (keep.dim() - 2))
            break
    keep = keep.flatten()
    return keep if target is None or target.is_floating_point() else keep & (target != IGNORED)


def not_finite(rows: Tensor) -> Tensor:
    """Which rows hold a NaN or an infinity."""
    return ~rows.isfinite().all(-1)


def decided(logits: Tensor, wanted: Tensor) -> Tensor:
    """1.0 where a row's largest logit is at `wanted`, 0.0 where not, NaN in a row that is not finite: it decides nothing.

    `wanted`: class indices `[P]`, or rows `[P, C]` whose own largest element is meant (NaN where they are not finite).
    """
    bad = not_finite(logits)
    if wanted.is_floating_point():
        bad, wanted = bad | not_finite(wanted), wanted.argmax(-1)
    return (logits.argmax(-1) == wanted).double().masked_fill(bad, torch.nan)


def nothing_counted(seen: int) -> ValueError:
    """The error for a loader of which no row counts, `seen` rows being there."""
    if seen:
        return ValueError(
            f"loader gave {seen} rows, but each is left out by its target {IGNORED} or by the attention mask: nothing "
            "to measure"
        )
    return ValueError(
        "loader gave no rows, expected at least one; what can be read only once (a generator) is used up by then"
    )


def trouble(found: Iterable[tuple[str, int, int]]) -> str:
    """One sentence on outputs that are not finite, from (whose, such rows, rows); empty if there are none."""
    parts = [f"{whose} in {bad:,} of {rows:,} rows" for whose, bad, rows in found if bad]
    return f"not finite (NaN or infinity): {'; '.join(parts)}" if parts else ""
