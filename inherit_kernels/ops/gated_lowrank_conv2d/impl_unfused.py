"""A torch convolution and one batched product with the heads merged a sample; the backward likewise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inherit_kernels.common import costs
from inherit_kernels.common.activation import activate
from inherit_kernels.common.conv import (
    Pair,
    as_rows,
    first_stage,
    first_stage_backward,
    from_rows,
    in_format,
    memory_format_of,
)
from inherit_kernels.common.heads import exact_gate_of, gate_of, softmax_backward
from inherit_kernels.registry import EVERYWHERE, PLAIN_TORCH, Problem

checks_arguments = False
SERVES = EVERYWHERE
PROVEN = PLAIN_TORCH
estimate = costs.library


def supports(problem: Problem) -> str | None:
    return None


def forward(*args: Any) -> Tensor:
    return forward_saving(*args)[0]


def forward_saving(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    t = first_stage(x, down, stride, padding, dilation)
    g = gate_of(t.mean((2, 3)), gate_weight, gate_bias)
    z = _mix(t, _merge(g, up), memory_format_of(x))
    if bias is not None:
        z = z + (g @ bias)[:, :, None, None]
    return in_format(activate(z if residual is None else z + residual, activation), memory_format_of(x)), t


def _merge(g: Tensor, up: Tensor) -> Tensor:
    """up_eff `[B, N, R]` = Σ_h g_h up_h from g `[B, H]` and up `[H, N, R]`."""
    return (g @ up.flatten(1)).unflatten(1, up.shape[1:])


def _mix(t: Tensor, up_eff: Tensor, memory_format: torch.memory_format) -> Tensor:
    """up_eff·t a sample, written in the format of the output."""
    if memory_format == torch.channels_last:
        return from_rows(as_rows(t) @ up_eff.mT, t.shape[2:])
    return (up_eff @ t.flatten(2)).unflatten(2, t.shape[2:])


def backward(
    dz: Tensor,
    t: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    need_x, need_down, need_up, need_gate_weight, need_gate_bias, need_bias = needs
    s = t.mean((2, 3))
    exact_g = exact_gate_of(s, gate_weight, gate_bias)
    g = exact_g.to(t.dtype)
    products = as_rows(dz).mT @ as_rows(t)  # [B, N, R], dz·tᵀ a sample: all that the heads need
    dg = products.flatten(1) @ up.flatten(1).t()
    d_bias = None
    if bias is not None:
        dz_sums = dz.sum((2, 3))
        dg = dg + dz_sums @ bias.t()
        d_bias = g.t() @ dz_sums if need_bias else None
    d_logits = softmax_backward(exact_g, dg).to(t.dtype)
    dx = d_down = None
    if need_x or need_down:
        ds = d_logits @ gate_weight / (t.shape[2] * t.shape[3])
        dt = _mix(dz, _merge(g, up).mT, memory_format_of(x)) + ds[:, :, None, None]
        dx, d_down = first_stage_backward(dt, x, down, (stride, padding, dilation), need_x, need_down)
    return (
        dx,
        d_down,
        (g.t() @ products.flatten(1)).view(up.shape) if need_up else None,
        d_logits.t() @ s if need_gate_weight else None,
        d_logits.sum(0) if need_gate_bias else None,
        d_bias,
    )
