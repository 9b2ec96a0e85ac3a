"""transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored `[K, N]`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .copies import linear_of, own_weight


def opens(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def why_not(module: Any) -> str | None:
    return None if own_weight(module) else "its weight is made by other code"


def opened(module: Any) -> nn.Linear:
    """`nn.Linear` with the transposed weight."""
    return linear_of(module.weight.mT, module.bias, module.weight)
