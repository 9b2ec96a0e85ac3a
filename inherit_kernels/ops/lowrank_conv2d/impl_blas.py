"""A library convolution (cuDNN), then a library product with bias, residual and activation in its epilogue (cuBLASLt).

With the channels side by side the second stage is a product of rows; other images are turned around before and after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inherit_kernels.common import blas, costs
from inherit_kernels.common.conv import Pair, as_rows, first_stage, from_rows, in_format, memory_format_of
from inherit_kernels.ops.lowrank_conv2d import impl_unfused
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
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    t = first_stage(x, down, stride, padding, dilation)
    rows = blas.linear(_rows(t), up, bias, None if residual is None else _rows(residual), activation)
    batch, _, height, width = t.shape
    y = from_rows(rows.view(batch, height * width, up.shape[0]), (height, width))
    return in_format(y, memory_format_of(x)), t


def _rows(image: Tensor) -> Tensor:
    """`[B·H·W, C]`, a view of a channels-last image."""
    return as_rows(in_format(image, torch.channels_last)).flatten(0, 1)
