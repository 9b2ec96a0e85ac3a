"""The C++ kernel for CPUs: `csrc/cpu/gated_lowrank_conv2d.cpp`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from inherit_kernels.common.activation import ACTIVATION_CODES
from inherit_kernels.common.conv import Pair
from inherit_kernels.common.native import CPU_DTYPES, CPU_PROOF, declines, kernels, only_needed
from inherit_kernels.registry import Problem

checks_arguments = True
SERVES = {"cpu": CPU_DTYPES}
PROVEN = {"cpu": CPU_PROOF}


def supports(problem: Problem) -> str | None:
    return declines(problem)


def forward(
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
) -> Tensor:
    code = ACTIVATION_CODES[activation]
    return kernels.gated_lowrank_conv2d(
        x, down, up, gate_weight, gate_bias, bias, residual, *stride, *padding, *dilation, code
    )


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
    code = ACTIVATION_CODES[activation]
    return kernels.gated_lowrank_conv2d_saving(
        x, down, up, gate_weight, gate_bias, bias, residual, *stride, *padding, *dilation, code
    )


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
    weights = down, up, gate_weight, gate_bias, bias
    gradients = kernels.gated_lowrank_conv2d_backward(dz, x, t, *weights, *stride, *padding, *dilation, *needs)
    return only_needed(gradients, needs)


def pack(
    down: Tensor, up: Tensor, gate_weight: Tensor, gate_bias: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The panels of `down`, tap by tap, and of `up`, head by head, in float32."""
    return kernels.pack_conv2d(down, up)


def forward_packed(
    x: Tensor,
    panels: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...],
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
) -> Tensor:
    down, up, gate_weight, gate_bias, bias = weights
    rank, _, *kernel = down.shape
    code = ACTIVATION_CODES[activation]
    return kernels.gated_lowrank_conv2d_packed(
        x,
        *panels,
        rank,
        up.shape[-2],
        *kernel,
        gate_weight,
        gate_bias,
        bias,
        residual,
        *stride,
        *padding,
        *dilation,
        code,
    )
