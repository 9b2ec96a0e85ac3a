"""Triton kernels: the forward in one (two where positions are few), the backward in at most seven."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inherit_kernels.common import costs, triton_conv_launch, triton_launch
from inherit_kernels.common.activation import ACTIVATION_CODES
from inherit_kernels.common.conv import Pair
from inherit_kernels.common.triton_conv_launch import (
    Geometry,
    backward_down,
    backward_dt,
    backward_tuning_space,
    backward_up,
    backward_x,
    candidates,
    declines,
    empty_image,
    partial_sums,
    positions,
    sum_partials,
    tap_matrix,
)
from inherit_kernels.common.triton_launch import Config, ceil_div, launch, padded_rank, precision, strides
from inherit_kernels.common.triton_plan import planned
from inherit_kernels.registry import Problem

OP = "lowrank_conv2d"
KERNELS = ("forward", "backward_dt", "backward_dx", "backward_down", "backward_up")

checks_arguments = False
SERVES, PROVEN = triton_launch.SERVES, triton_launch.PROVEN
doubts, estimate = triton_conv_launch.doubts, costs.fused


def supports(problem: Problem) -> str | None:
    return declines(problem)


def tuning_space(kernel: str, bits: int, BR: int) -> list[Config]:
    """Configurations of a kernel for a tuner to measure; some may not fit every device."""
    if kernel != "forward":
        return backward_tuning_space(kernel, bits, BR)
    rows = {16: (64, 128), 32: (16, 32)}[bits] if BR <= 128 else {16: (32, 64), 32: (16, 16)}[bits]
    deep = 64 if bits == 16 and BR < 512 else 32
    wide = 64 if bits == 16 and BR < 256 else 32
    choices = [(rows[1], wide, deep, 1, 1), (rows[0], wide, deep, 1, 1), (rows[0], wide, deep, 2, 1)]
    choices += [(rows[0], wide, deep, 4, splits) for splits in (2, 4, 8)]
    return candidates(("BM", "BN", "BK", "SPLIT_N", "SPLIT_K"), choices, {})


@planned
@triton_launch.on_plain_memory
def forward(*args: Any) -> Tensor:
    return _forward(False, *args)[0]


@planned
@triton_launch.on_plain_memory
def forward_saving(*args: Any) -> tuple[Tensor, Tensor]:
    y, t = _forward(True, *args)
    assert t is not None
    return y, t


def _forward(
    save: bool,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
) -> tuple[Tensor, Tensor | None]:
    from inherit_kernels.ops.lowrank_conv2d.kernels_triton import lowrank_conv2d_fwd_kernel

    g = Geometry(x, down, up, stride, padding, dilation)
    y = empty_image(x, up.shape[0], g.size)
    t = empty_image(x, g.rank, g.size) if save else None
    if y.numel() == 0:
        return y, t
    config = g.config(OP, "forward", x)
    matrix = tap_matrix(down)
    partials = partial_sums(x, matrix, g, config) if config["SPLIT_K"] > 1 else x
    outputs = positions(y)
    rows = outputs if residual is None else positions(residual)
    features = outputs if t is None else positions(t)
    launch(
        lowrank_conv2d_fwd_kernel,
        (ceil_div(g.rows, config["BM"]) * config["SPLIT_N"],),
        *(x, matrix, up, x if bias is None else bias, rows, partials, features, outputs),
        *(g.rows, g.positions, g.size[1], g.rank, g.channels, up.shape[0], g.height, g.width, *g.windows),
        *strides(x, matrix, up),
        0 if bias is None else bias.stride(0),
        *strides(rows, features, outputs),
        ACTIVATION=ACTIVATION_CODES[activation],
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        STORE_T=save,
        KH=g.kh,
        KW=g.kw,
        BR=padded_rank(g.rank),
        FEW=g.few_channels,
        PRECISION=precision(x.dtype),
        **config,
    )
    return y, t


@planned
@triton_launch.on_plain_memory
def backward(
    dz: Tensor,
    t: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    if dz.numel() == 0:
        inputs = (x, down, up, bias)
        return [torch.zeros_like(v) if v is not None and need else None for v, need in zip(inputs, needs, strict=True)]
    need_x, need_down, need_up, need_bias = needs
    g = Geometry(x, down, up, stride, padding, dilation)
    dz, t = positions(dz), positions(t)
    dx = d_down = d_up = d_bias = None
    if need_x or need_down:
        dt = backward_dt(OP, dz, up, None, x, g)
        dx = backward_x(OP, dt, x, tap_matrix(down), g) if need_x else None
        d_down = backward_down(OP, dt, x, down, g) if need_down else None
    if need_up or need_bias:
        products, dz_sums, _ = backward_up(OP, dz, t, x, g, per_sample=False, with_sums=need_bias)
        if need_up:
            d_up = sum_partials(products, up.new_empty(up.shape), 1, g.rank, (g.rank, 0, 1))
        if need_bias:
            d_bias = sum_partials(dz_sums, up.new_empty(up.shape[:1]), 1, up.shape[0], (0, 0, 1))
    return dx, d_down, d_up, d_bias
