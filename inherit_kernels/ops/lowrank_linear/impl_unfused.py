"""Two torch products; the backward as four."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from inherit_kernels.common import costs
from inherit_kernels.common.activation import activate
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
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    t = F.linear(x, down)
    z = F.linear(t, up, bias)
    return activate(z if residual is None else z + residual, activation), t


def backward(
    dz: Tensor,
    t: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str | None,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    need_x, need_down, need_up, need_bias = needs
    dz_rows, t_rows, x_rows = rows_of(dz), rows_of(t), rows_of(x)
    dt = dz_rows @ up if need_x or need_down else None
    return (
        (dt @ down).view(x.shape) if need_x else None,
        dt.t() @ x_rows if need_down else None,
        dz_rows.t() @ t_rows if need_up else None,
        dz_rows.sum(0) if need_bias else None,
    )
