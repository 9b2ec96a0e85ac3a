"""The definition of `gated_lowrank_conv2d`."""

from __future__ import annotations

import torch
from torch import Tensor

from inherit_kernels.common.activation import activate
from inherit_kernels.common.conv import Pair, first_stage, in_format, memory_format_of
from inherit_kernels.common.heads import gate_of


def gated_lowrank_conv2d_reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    activation: str | None = None,
) -> Tensor:
    """t = conv2d(x, down); g = softmax(mean(t)·gate_weightᵀ + gate_bias); y = act(Σ_h g_h (up_h t + bias_h) + residual).

    The gate is one vector a sample, so the heads merge into one up projection a sample: up_eff = Σ_h g_h up_h.
    """
    t = first_stage(x, down, stride, padding, dilation)
    g = gate_of(t.mean((2, 3)), gate_weight, gate_bias)
    up_eff = torch.einsum("bh,hnr->bnr", g, up)
    z = torch.einsum("bnr,brij->bnij", up_eff, t)
    if bias is not None:
        z = z + (g @ bias)[:, :, None, None]
    return in_format(activate(z if residual is None else z + residual, activation), memory_format_of(x))
