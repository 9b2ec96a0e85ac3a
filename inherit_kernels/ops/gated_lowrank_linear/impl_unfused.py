"""Torch products with the heads merged; the backward likewise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inherit_kernels.common import costs
from inherit_kernels.common.activation import activate
from inherit_kernels.common.heads import (
    exact_gate_of,
    gate_of,
    scale_by_gate,
    scaled_rows,
    side_by_side,
    softmax_backward,
)
from inherit_kernels.common.rows import rows_of
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
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    t = F.linear(x, down)
    g = gate_of(t, gate_weight, gate_bias)
    # The bias mix is H more columns of the same product. A GPU wants their number in eights: impl_blas.py.
    weight = side_by_side(up, bias, multiple=8 if x.is_cuda else 1)
    z = F.linear(scaled_rows(t, g, weight.shape[1]), weight)
    return activate(z if residual is None else z + residual, activation), t


def backward(
    dz: Tensor,
    t: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    need_x, need_down, need_up, need_gate_weight, need_gate_bias, need_bias = needs
    heads, _, rank = up.shape
    dz, t, rows = rows_of(dz), rows_of(t), rows_of(x)
    exact_g = exact_gate_of(t, gate_weight, gate_bias)
    g = exact_g.to(t.dtype)
    d_up = d_bias = None
    if need_up:
        d_up = (dz.t() @ scale_by_gate(t, g)).view(-1, heads, rank).permute(1, 0, 2)
    if need_bias:
        d_bias = g.t() @ dz
    if not (need_x or need_down or need_gate_weight or need_gate_bias):
        return None, None, d_up, None, None, d_bias
    by_head = (dz @ side_by_side(up)).view(-1, heads, rank)
    dg = torch.einsum("mhr,mr->mh", by_head, t)
    if bias is not None:
        dg = dg + dz @ bias.t()
    d_logits = softmax_backward(exact_g, dg).to(t.dtype)
    dt = torch.einsum("mhr,mh->mr", by_head, g) + d_logits @ gate_weight if need_x or need_down else None
    return (
        (dt @ down).view(x.shape) if need_x else None,
        dt.t() @ rows if need_down else None,
        d_up,
        d_logits.t() @ t if need_gate_weight else None,
        d_logits.sum(0) if need_gate_bias else None,
        d_bias,
    )
