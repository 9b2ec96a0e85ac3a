"""torch's convolution, then the C++ mixing of `csrc/cpu/gated_lowrank_conv2d.cpp`: gate, merge, product, epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inherit_kernels.common.activation import ACTIVATION_CODES
from inherit_kernels.common.conv import Pair, first_stage, first_stage_backward, memory_format_of
from inherit_kernels.common.native import declines, kernels, only_needed
from inherit_kernels.registry import Problem

checks_arguments = False


def supports(problem: Problem) -> str | None:
    return declines(problem)


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
    channels_last = memory_format_of(x) == torch.channels_last
    code = ACTIVATION_CODES[activation]
    y = kernels.gated_lowrank_conv2d_mix(t, up, gate_weight, gate_bias, bias, residual, code, channels_last)
    return y, t


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
    need_x, need_down, *needs = needs
    dt, *gradients = kernels.gated_lowrank_conv2d_mix_backward(dz, t, up, gate_weight, gate_bias, bias, *needs)
    dx, d_down = first_stage_backward(dt, x, down, (stride, padding, dilation), need_x, need_down)
    return dx, d_down, *only_needed(gradients, needs)
