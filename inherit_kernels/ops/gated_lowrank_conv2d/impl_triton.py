"""Triton kernels: the forward in two (three where positions are few), the backward in at most ten.

Five of the ten are those of `lowrank_conv2d`; two find the gate and what flows back through it, three sum over samples.
"""

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
    tap_matrix,
)
from inherit_kernels.common.triton_launch import (
    Config,
    ceil_div,
    launch,
    padded_heads,
    padded_rank,
    precision,
    strides,
)
from inherit_kernels.common.triton_plan import planned
from inherit_kernels.registry import Problem

OP = "gated_lowrank_conv2d"
KERNELS = ("forward_down", "forward", "backward_dt", "backward_dx", "backward_down", "backward_up")

checks_arguments = False
SERVES, PROVEN = triton_launch.SERVES, triton_launch.PROVEN
doubts, estimate = triton_conv_launch.doubts, costs.fused


def supports(problem: Problem) -> str | None:
    return declines(problem)


def tuning_space(kernel: str, bits: int, BR: int) -> list[Config]:
    """Configurations of a kernel for a tuner to measure; some may not fit every device."""
    rows = {16: (64, 128), 32: (16, 32)}[bits] if BR <= 128 else {16: (32, 64), 32: (16, 16)}[bits]
    deep = 64 if bits == 16 and BR < 512 else 32
    if kernel == "forward_down":
        choices = [(rows[1], deep, 1), *((rows[0], deep, splits) for splits in (1, 2, 4, 8))]
        return candidates(("BM", "BK", "SPLIT_K"), choices, {})
    if kernel == "forward":
        wide = 64 if bits == 16 and BR < 256 else 32 if BR < 512 else 16
        choices = [(rows[1], wide, 4), *((rows[0], wide, tiles) for tiles in (1, 2, 4, 8))]
        return candidates(("BM", "BN", "TILES"), choices, {})
    return backward_tuning_space(kernel, bits, BR)


@planned
@triton_launch.on_plain_memory
def forward(*args: Any) -> Tensor:
    return forward_saving(*args)[0]


@planned
@triton_launch.on_plain_memory
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
    g = Geometry(x, down, up, stride, padding, dilation)
    y = empty_image(x, up.shape[1], g.size)
    t = empty_image(x, g.rank, g.size)
    if y.numel() > 0:
        sums = _forward_down(x, tap_matrix(down), positions(t), g)
        rows = None if residual is None else positions(residual)
        _forward(positions(t), sums, up, gate_weight, gate_bias, bias, rows, positions(y), x, g, activation)
    return y, t


def _forward_down(x: Tensor, matrix: Tensor, t: Tensor, g: Geometry) -> Tensor:
    """Fills t `[B, R, P]`; returns its sums over tiles of positions `[B, tiles, R]` in float32."""
    from inherit_kernels.ops.gated_lowrank_conv2d.kernels_triton import gated_lowrank_conv2d_fwd_down_kernel

    config = g.config(OP, "forward_down", x)
    partials = partial_sums(x, matrix, g, config) if config["SPLIT_K"] > 1 else x
    tiles = ceil_div(g.positions, config["BM"])
    sums = torch.empty((g.batch, tiles, g.rank), dtype=torch.float32, device=x.device)
    launch(
        gated_lowrank_conv2d_fwd_down_kernel,
        (g.batch * tiles,),
        *(x, matrix, partials, t, sums, g.rows, g.positions, g.size[1], g.rank, g.channels, g.height, g.width),
        *(*g.windows, *strides(x, matrix, t), tiles),
        KH=g.kh,
        KW=g.kw,
        BR=padded_rank(g.rank),
        FEW=g.few_channels,
        PRECISION=precision(x.dtype),
        **config,
    )
    return sums


def _forward(
    t: Tensor,
    sums: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    x: Tensor,
    g: Geometry,
    activation: str | None,
) -> None:
    """Fills y `[B, N, P]` from t `[B, R, P]` and its sums."""
    from inherit_kernels.ops.gated_lowrank_conv2d.kernels_triton import gated_lowrank_conv2d_fwd_kernel

    config = g.config(OP, "forward", x)
    heads, outputs, rank = up.shape
    shares = ceil_div(g.positions, config["BM"] * config["TILES"])
    n_tiles = ceil_div(outputs, config["BN"])
    rows = y if residual is None else residual
    launch(
        gated_lowrank_conv2d_fwd_kernel,
        (g.batch * shares * n_tiles,),
        *(t, sums, up, gate_weight, t if gate_bias is None else gate_bias, t if bias is None else bias, rows, y),
        *(g.positions, rank, outputs, heads, sums.shape[1], *strides(up, gate_weight)),
        0 if gate_bias is None else gate_bias.stride(0),
        *((0, 0) if bias is None else bias.stride()),
        *(*strides(rows, t, y), shares, n_tiles),
        ACTIVATION=ACTIVATION_CODES[activation],
        HAS_GATE_BIAS=gate_bias is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BR=padded_rank(rank),
        BH=padded_heads(heads),
        PRECISION=precision(x.dtype),
        **config,
    )


@planned
@triton_launch.on_plain_memory
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
    if dz.numel() == 0:
        inputs = (x, down, up, gate_weight, gate_bias, bias)
        return [torch.zeros_like(v) if v is not None and need else None for v, need in zip(inputs, needs, strict=True)]
    need_x, need_down, need_up, need_gate_weight, need_gate_bias, need_bias = needs
    g = Geometry(x, down, up, stride, padding, dilation)
    dz, t = positions(dz), positions(t)
    parts = backward_up(OP, dz, t, x, g, per_sample=True, with_sums=True)
    products, dz_sums, t_sums = (part.sum(1) if part.shape[1] > 1 else part.squeeze(1) for part in parts)
    merged, gate, dg = _backward_merge(products, dz_sums, t_sums, up, gate_weight, gate_bias, bias, g)
    d_logits, ds = _backward_gate(dg, gate, gate_weight, g)
    dx = d_down = d_up = d_gate_weight = d_gate_bias = d_bias = None
    if need_x or need_down:
        dt = backward_dt(OP, dz, merged, ds, x, g)
        dx = backward_x(OP, dt, x, tap_matrix(down), g) if need_x else None
        d_down = backward_down(OP, dt, x, down, g) if need_down else None
    if need_up:
        d_up = _sum_over_samples(gate, products, 1, up.new_empty(up.shape))
    if need_bias and bias is not None:
        d_bias = _sum_over_samples(gate, dz_sums, 1, bias.new_empty(bias.shape))
    if need_gate_weight or need_gate_bias:
        d_gate_weight, d_gate_bias = up.new_empty(gate_weight.shape), up.new_empty(g.heads)
        _sum_over_samples(d_logits, t_sums, g.positions, d_gate_weight, d_gate_bias)
    return dx, d_down, d_up, d_gate_weight, d_gate_bias if need_gate_bias else None, d_bias


def _backward_merge(
    products: Tensor,
    dz_sums: Tensor,
    t_sums: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    g: Geometry,
) -> tuple[Tensor, Tensor, Tensor]:
    """One up projection a sample `[B, N, R]`; its gate `[B, H]` and parts of the gate's gradient `[B, tiles, H]`, float32.

    The gate stays in float32: rounded to 16 bits its entries no longer sum to one.
    """
    from inherit_kernels.ops.gated_lowrank_conv2d.kernels_triton import gated_lowrank_conv2d_bwd_merge_kernel

    block = 32
    n_tiles = ceil_div(g.outputs, block)
    merged = up.new_empty(g.batch, g.outputs, g.rank)
    gate = products.new_empty(g.batch, g.heads)
    dg = products.new_empty(g.batch, n_tiles, g.heads)
    launch(
        gated_lowrank_conv2d_bwd_merge_kernel,
        (g.batch * n_tiles,),
        *(products, dz_sums, t_sums, up, gate_weight, up if gate_bias is None else gate_bias),
        *(up if bias is None else bias, merged, gate, dg, g.positions, g.rank, g.outputs, g.heads),
        *(*strides(up, gate_weight), 0 if gate_bias is None else gate_bias.stride(0)),
        *((0, 0) if bias is None else bias.stride()),
        n_tiles,
        HAS_GATE_BIAS=gate_bias is not None,
        HAS_BIAS=bias is not None,
        BN=block,
        BR=min(padded_rank(g.rank), 64),
        BH=padded_heads(g.heads),
        num_warps=4,
    )
    return merged, gate, dg


def _backward_gate(dg: Tensor, gate: Tensor, gate_weight: Tensor, g: Geometry) -> tuple[Tensor, Tensor]:
    """The gradients at the gate's logits `[B, H]` and at t, a position `[B, R]`, in float32."""
    from inherit_kernels.ops.gated_lowrank_conv2d.kernels_triton import gated_lowrank_conv2d_bwd_gate_kernel

    d_logits, ds = (dg.new_empty(g.batch, width) for width in (g.heads, g.rank))
    launch(
        gated_lowrank_conv2d_bwd_gate_kernel,
        (g.batch,),
        *(dg, gate, gate_weight, d_logits, ds, g.positions, g.rank, g.heads, *gate_weight.stride(), dg.shape[1]),
        BT=16,
        BR=64,
        BH=padded_heads(g.heads),
        num_warps=4,
    )
    return d_logits, ds


def _sum_over_samples(
    scale: Tensor, values: Tensor, divisor: Any, out: Tensor, scale_sums: Tensor | None = None
) -> Tensor:
    """out `[H, …]` = Σ_b scale[b] values[b] / divisor; also fills `scale_sums` `[H]` = Σ_b scale[b]."""
    from inherit_kernels.ops.gated_lowrank_conv2d.kernels_triton import gated_lowrank_conv2d_bwd_sum_kernel

    batch, heads, width = values.shape[0], out.shape[0], out.numel() // out.shape[0]
    q_tiles = ceil_div(width, 256)
    launch(
        gated_lowrank_conv2d_bwd_sum_kernel,
        (heads * q_tiles,),
        *(scale, values, out, out if scale_sums is None else scale_sums, batch, width, heads, divisor, q_tiles),
        HAS_SCALE_SUMS=scale_sums is not None,
        BB=8,
        BQ=256,
        num_warps=4,
    )
    return out
