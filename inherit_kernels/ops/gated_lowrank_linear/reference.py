"""The definition of `gated_lowrank_linear`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from inherit_kernels.common.activation import activate
from inherit_kernels.common.heads import gate_of, scale_by_gate, side_by_side


def gated_lowrank_linear_reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """t = x·downᵀ; g = softmax(t·gate_weightᵀ + gate_bias); y = act(Σ_h g_h (up_h t + bias_h) + residual).

    The sum over heads is one product: [g_1 t … g_H t]·[up_1 … up_H]ᵀ + g·bias.
    """
    t = F.linear(x, down)
    g = gate_of(t, gate_weight, gate_bias)
    z = F.linear(scale_by_gate(t, g), side_by_side(up))
    if bias is not None:
        z = z + g @ bias
    return activate(z if residual is None else z + residual, activation)
