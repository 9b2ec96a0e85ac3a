"""The activations an op can end with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# The native overloads take the activation as a number; the order is that of csrc/include/inherit_kernels/epilogue.h.
ACTIVATION_CODES = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def activate(z: Tensor, activation: str | None) -> Tensor:
    """act(z) for an activation name of `ACTIVATIONS`; `z` itself for None."""
    if activation is None:
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "silu":
        return F.silu(z)
    raise ValueError(f"activation: expected one of {', '.join(map(str, ACTIVATION_CODES))}, got {activation!r}")


def activate_outside(z: Tensor, activation: str | None) -> Tensor:
    """act(z) with the strides of z: torch's pointwise ops renumber the strides of dimensions of size one."""
    y = activate(z, activation)
    return y if y.stride() == z.stride() else y.as_strided(z.shape, z.stride())
