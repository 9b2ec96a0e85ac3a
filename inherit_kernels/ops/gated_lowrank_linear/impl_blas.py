"""The heads side by side in one library product, residual and activation in its epilogue (cuBLASLt).

[g_1 t … g_H t g]·[up_1 … up_H biasᵀ]ᵀ: the left side in one kernel from t, the depth filled up to a multiple of eight. At a
depth of 260 cuBLAS leaves its fast path: 101 µs where 256 takes 62 (H200, 4,096 × 4,096 → 64 → 4 × 4,096, bfloat16).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from inherit_kernels.common import blas, costs
from inherit_kernels.common.heads import side_by_side
from inherit_kernels.common.rows import rows_of
from inherit_kernels.ops.gated_lowrank_linear import impl_unfused
from inherit_kernels.registry import Problem

checks_arguments = False
SERVES = blas.SERVES
PROVEN = {device: f"{how}; backward: the unfused one" for device, how in blas.PROVEN.items()}
doubts, backward = blas.doubts, impl_unfused.backward
estimate = costs.library_with_epilogue


def supports(problem: Problem) -> str | None:
    return blas.declines(problem)


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
    weight = side_by_side(up, bias, multiple=8)
    scaled = blas.scale_by_gate(rows_of(t), gate_weight, gate_bias, weight.shape[1])
    y = blas.linear(scaled, weight, None, residual if residual is None else rows_of(residual), activation)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], up.shape[1]), t
