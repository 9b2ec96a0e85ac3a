"""Calibration data as refinement uses it: in pieces to train on, to judge by, and unlike the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batches import batch_size, model_inputs, reusable, token_masks

# Samples per step; a loader's larger batches are cut, so that a step costs about the same whatever they are.
PIECE = 32
# One of so many pieces is held out, to see whether the network has become better and not only used to its data; and at most.
HELD_OUT, MOST_HELD_OUT = 8, 8


@dataclass(frozen=True)
class Piece:
    """Some samples of the calibration data: the model's inputs, which of its tokens are real, what they are for."""

    inputs: Any
    masks: list[Tensor]
    role: str  # "train", "held out", "elsewhere"


class TooFew(ValueError):
    """Not enough samples to hold one out."""


def pieces_of(calibration: Iterable[Any], device: torch.device, seed: int) -> list[Piece]:
    """The data in pieces of at most 32 samples, some held out, and those again made unlike themselves."""
    batches = [model_inputs(batch, device) for batch in reusable(calibration)]
    samples = sum(batch_size(inputs) for inputs in batches)
    if samples < 2:
        raise TooFew(
            f"calibration holds {samples} samples and refinement needs 2 at least (256 varied ones serve); give more, or "
            "refine=False"
        )
    size = min(PIECE, max(1, samples // HELD_OUT))
    cut = [piece for inputs in batches for piece in _cut(inputs, size)]
    generator = torch.Generator().manual_seed(seed)
    held = set(
        torch.randperm(len(cut), generator=generator)[: min(max(1, len(cut) // HELD_OUT), MOST_HELD_OUT)].tolist()
    )
    pieces = [Piece(p, token_masks(p), "held out" if i in held else "train") for i, p in enumerate(cut)]
    others = [unlike(cut[i], generator) for i in sorted(held)]
    return pieces + [Piece(p, token_masks(p), "elsewhere") for p in others]


def _cut(inputs: Any, size: int) -> Iterator[Any]:
    total = batch_size(inputs)
    for start in range(0, total, size):
        part = slice(start, min(start + size, total))
        if isinstance(inputs, Mapping):
            yield {
                k: v[part] if isinstance(v, Tensor) and v.dim() and len(v) == total else v for k, v in inputs.items()
            }
        else:
            yield inputs[part]


def unlike(inputs: Any, generator: torch.Generator) -> Any:
    """The same kind of input from elsewhere: words in random order across the batch, each image (or other floating tensor)
    averaged with another one mirrored."""
    if not isinstance(inputs, Mapping):
        return _mixed(inputs) if inputs.is_floating_point() else _shuffled(inputs, None, generator)
    result = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and "mask" not in key:
            result[key] = _mixed(value)
        elif isinstance(value, Tensor) and key.endswith("input_ids"):
            mask = inputs.get(key.replace("input_ids", "attention_mask"))
            result[key] = _shuffled(
                value, mask if isinstance(mask, Tensor) and mask.shape == value.shape else None, generator
            )
    return result


def _mixed(x: Tensor) -> Tensor:
    return (x + x.roll(1, 0).flip(-1)) / 2


def _shuffled(ids: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    words = ids[real]
    result = ids.clone()
    result[real] = words[torch.randperm(len(words), generator=generator).to(ids.device)]
    return result


def rows_of(x: Tensor, masks: list[Tensor]) -> Tensor:
    """`[..., D]`, or `[B, D, ...]` of a convolution, as rows `[P, D]`; padded tokens left out."""
    if x.dim() > 3:
        return x.movedim(1, -1).flatten(0, -2)
    for mask in masks:
        if x.dim() == 3 and x.shape[:2] == mask.shape:
            return x[mask]
    return x.reshape(-1, x.shape[-1])
