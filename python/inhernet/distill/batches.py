"""How a batch is read: `(x, target)`, a mapping with `labels`, or a bare tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def default_forward(model: nn.Module, batch: Any) -> Any:
    """`model(x)` for a tensor or `(x, …)`, `model(**batch)` without `labels` for a mapping; `.logits` is unwrapped."""
    if isinstance(batch, Mapping):
        output = model(**{name: value for name, value in batch.items() if name != "labels"})
    else:
        output = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    return getattr(output, "logits", output)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(to_device(value, device) for value in batch)
    return batch


def outside_inference(output: Any) -> Any:
    """Autograd cannot save inference tensors; a copy outside inference mode is an ordinary tensor."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        return {name: outside_inference(value) for name, value in output.items()}
    if isinstance(output, (tuple, list)):
        return tuple(outside_inference(value) for value in output)
    return output
