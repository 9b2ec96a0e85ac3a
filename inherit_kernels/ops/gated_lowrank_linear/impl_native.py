"""C++ kernels: `csrc/cpu/gated_lowrank_linear.cpp`, and for up to 16 rows on a GPU `csrc/cuda/gated_lowrank_linear.cu`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from inherit_kernels.common import costs
from inherit_kernels.common.activation import ACTIVATION_CODES
from inherit_kernels.common.native import (
    CPU_DTYPES,
    CPU_PROOF,
    CUDA_DTYPES,
    CUDA_PROOF,
    declines,
    declines_linear_on_cuda,
    kernels,
    only_needed,
)
from inherit_kernels.ops.gated_lowrank_linear import impl_unfused
from inherit_kernels.registry import Problem

checks_arguments = True
SERVES = {"cpu": CPU_DTYPES, "cuda": CUDA_DTYPES}
PROVEN = {"cpu": CPU_PROOF, "cuda": f"{CUDA_PROOF}; backward: the unfused one"}
estimate = costs.decode


def supports(problem: Problem) -> str | None:
    return declines_linear_on_cuda(problem) if problem.device.type == "cuda" else declines(problem)


def forward(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    code = ACTIVATION_CODES[activation]
    return kernels.gated_lowrank_linear(x, down, up, gate_weight, gate_bias, bias, residual, code)


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
    code = ACTIVATION_CODES[activation]
    return kernels.gated_lowrank_linear_saving(x, down, up, gate_weight, gate_bias, bias, residual, code)


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
    if x.is_cuda:
        return impl_unfused.backward(dz, t, x, down, up, gate_weight, gate_bias, bias, activation, needs)
    gradients = kernels.gated_lowrank_linear_backward(dz, x, t, down, up, gate_weight, gate_bias, bias, *needs)
    return only_needed(gradients, needs)


def pack(
    down: Tensor, up: Tensor, gate_weight: Tensor, gate_bias: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The panels of `down` and of [up_1 … up_H] with the biases."""
    return kernels.pack_panels(down), kernels.pack_panels(up, bias)


def forward_packed(
    x: Tensor,
    panels: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    down, up, gate_weight, gate_bias, bias = weights
    code = ACTIVATION_CODES[activation]
    return kernels.gated_lowrank_linear_packed(
        x, *panels, down.shape[0], up.shape[1], gate_weight, gate_bias, bias is not None, residual, code
    )
