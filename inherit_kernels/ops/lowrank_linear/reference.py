"""The definition of `lowrank_linear`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from inherit_kernels.common.activation import activate


def lowrank_linear_reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """t = x·downᵀ; y = act(t·upᵀ + bias + residual)."""
    t = F.linear(x, down)
    z = F.linear(t, up, bias)
    return activate(z if residual is None else z + residual, activation)
