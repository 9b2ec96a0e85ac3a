"""C++ kernels: `csrc/cpu/gated_lowrank_conv2d.cpp`, and `csrc/cuda/gated_lowrank_conv2d*.cu` for small maps on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inherit_kernels.common.activation import ACTIVATION_CODES
from inherit_kernels.common.conv import Pair, in_format, memory_format_of
from inherit_kernels.common.native import (
    CPU_DTYPES,
    CPU_PROOF,
    CUDA_PROOF,
    declines,
    declines_on_cuda,
    kernels,
    only_needed,
)
from inherit_kernels.ops.gated_lowrank_conv2d import impl_unfused
from inherit_kernels.registry import Problem

checks_arguments = True
CUDA_DTYPES = (torch.bfloat16, torch.float16)
SHARED_BYTES = 164 * 1024  # of compute capability 8.0; 8.6 and 8.9 have 100 KB, less than the tiles of any map
SERVES = {"cpu": CPU_DTYPES, "cuda": CUDA_DTYPES}
PROVEN = {"cpu": CPU_PROOF, "cuda": f"{CUDA_PROOF}; backward: the unfused one"}


def supports(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return declines(problem)
    sizes = problem.sizes
    if not sizes:
        return "the CUDA kernel is chosen by the size of the map, which is not known beforehand"
    if not sizes["N"] or not sizes["C"]:
        return "there is nothing to compute"
    if sizes["P"] > 256 or sizes["R"] > 256 or sizes["H"] > 8 or sizes["R"] % 8 or sizes["C"] % 8:
        return f"the CUDA kernel takes maps and ranks up to 256, up to 8 heads, channels and ranks by 8, not {sizes}"
    sentence = declines_on_cuda(problem, CUDA_DTYPES)
    if sentence is not None:
        return sentence
    if torch.cuda.get_device_properties(problem.device).shared_memory_per_multiprocessor < SHARED_BYTES:
        return "the CUDA kernel takes a device with 164 KB of shared memory a multiprocessor"
    if sizes["R"] > 128 and torch.cuda.get_device_capability(problem.device)[0] != 9:
        return f"ranks above 128 take a device with clusters (compute capability 9), not {sizes['R']}"
    return None


def _channels_last(*images: Tensor | None) -> list[Tensor | None]:
    """What the CUDA kernel reads, with the channels side by side."""
    return [None if image is None else in_format(image, torch.channels_last) for image in images]


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
    if x.is_cuda:
        images, weights = _channels_last(x, down, residual), (up, gate_weight, gate_bias, bias)
        y = kernels.gated_lowrank_conv2d(*images[:2], *weights, images[2], *stride, *padding, *dilation, code)
        return in_format(y, memory_format_of(x))
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
    if x.is_cuda:
        images, weights = _channels_last(x, down, residual), (up, gate_weight, gate_bias, bias)
        y, t = kernels.gated_lowrank_conv2d_saving(*images[:2], *weights, images[2], *stride, *padding, *dilation, code)
        return in_format(y, memory_format_of(x)), in_format(t, memory_format_of(x))
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
    if x.is_cuda:
        arguments = x, down, up, gate_weight, gate_bias, bias, stride, padding, dilation, activation, needs
        return impl_unfused.backward(dz, t, *arguments)
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
