"""Two library products, the second with bias, residual and activation in its epilogue (cuBLASLt)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from inherit_kernels.common import blas, costs
from inherit_kernels.common.rows import rows_of
from inherit_kernels.registry import Problem

checks_arguments = False
SERVES, PROVEN = blas.SERVES, blas.PROVEN
doubts = blas.doubts
estimate = costs.library_with_epilogue


def supports(problem: Problem) -> str | None:
    return blas.declines(problem)


def forward(*args: Any) -> Tensor:
    return forward_saving(*args)[0]


def forward_saving(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    t = F.linear(x, down)
    y = blas.linear(rows_of(t), up, bias, residual if residual is None else rows_of(residual), activation)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], up.shape[0]), t


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
    dz_rows = rows_of(dz)
    dt = dz_rows @ up if need_x or need_down else dz_rows
    d_up, d_bias = blas.weight_gradient(dz_rows, rows_of(t), need_up, need_bias)
    return (
        (dt @ down).view(x.shape) if need_x else None,
        dt.t() @ rows_of(x) if need_down else None,
        d_up,
        d_bias,
    )
