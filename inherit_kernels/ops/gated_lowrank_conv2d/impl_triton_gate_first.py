"""Triton kernels, the gate first: from sums of x over the windows of each tap, then one pass that never writes t.

mean(t) = down·(means of x over the positions that each tap visits), as t is linear in x. Against `impl_triton` this reads x
once more and neither writes nor reads t: Hi·Wi·C instead of 2·P·R elements an image, fewer where the rank is more than
half the input channels times the stride's area, as in a network's first convolution. A backward wants t: training is left
to `impl_triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inherit_kernels.common.activation import ACTIVATION_CODES
from inherit_kernels.common.conv import Pair
from inherit_kernels.common.triton_conv_launch import (
    Geometry,
    candidates,
    empty_image,
    positions,
    share_of_programs,
    tap_matrix,
    without,
)
from inherit_kernels.common.triton_launch import (
    Config,
    ceil_div,
    hint,
    launch,
    on_plain_memory,
    padded_heads,
    padded_rank,
    precision,
    strides,
)
from inherit_kernels.ops.gated_lowrank_conv2d import impl_triton
from inherit_kernels.registry import Problem

OP = impl_triton.OP
KERNELS = ("windows", "single_pass")
MAX_TAPS = 128  # rows of the windows kernel's accumulator
SUMS_16, SUMS_32 = 64 * 64, 16 * 64  # elements of that accumulator in the two widths: above, registers were spilled
MAX_RANK_32 = 128  # at 256 the float32 tiles of t and of up spilled 88 bytes a thread at the best of six tilings

checks_arguments = False
SERVES = impl_triton.SERVES
PROVEN = {device: f"{how}; training: as triton" for device, how in impl_triton.PROVEN.items()}
forward_saving, backward = impl_triton.forward_saving, impl_triton.backward


def supports(problem: Problem) -> str | None:
    if problem.sizes.get("T", 0) > MAX_TAPS:
        return f"the sums over windows are held in registers up to {MAX_TAPS} taps, not {problem.sizes['T']}"
    if problem.dtype == torch.float32 and problem.sizes.get("R", 0) > MAX_RANK_32:
        return f"t and up are held in registers in float32 up to rank {MAX_RANK_32}, not {problem.sizes['R']}"
    return impl_triton.supports(problem)


def tuning_space(kernel: str, bits: int, BR: int) -> list[Config]:
    """Configurations of a kernel for a tuner to measure; some may not fit every device."""
    deep = 64 if bits == 16 else 32
    if kernel == "windows":
        return candidates(("BP", "BC", "PROGRAMS"), ((deep, 64, 264), (deep, 64, 528), (2 * deep, 32, 528)), {})
    rows = {16: (64, 128), 32: (16, 32)}[bits] if BR <= 128 else {16: (32, 64), 32: (16, 16)}[bits]
    deep = deep if BR < 512 else 32
    choices = [(rows[1], deep, deep), (rows[0], deep, deep), (rows[0], 32, deep), (rows[0], 16, 32)]
    return candidates(("BM", "BN", "BK"), dict.fromkeys(choices), {})


@on_plain_memory
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
    from inherit_kernels.ops.gated_lowrank_conv2d.kernels_triton import gated_lowrank_conv2d_single_pass_kernel

    g = Geometry(x, down, up, stride, padding, dilation)
    y = empty_image(x, g.outputs, g.size)
    if y.numel() == 0:
        return y
    matrix, outputs = tap_matrix(down), positions(y)
    sums = _sums_of_t(x, matrix, g)
    config = g.config(OP, "single_pass", x)
    rows = outputs if residual is None else positions(residual)
    tiles = ceil_div(g.positions, config["BM"])
    launch(
        gated_lowrank_conv2d_single_pass_kernel,
        (g.batch * tiles,),
        *(x, matrix, sums, up, gate_weight, x if gate_bias is None else gate_bias, x if bias is None else bias),
        *(rows, outputs, g.positions, g.size[1], g.rank, g.channels, g.outputs, g.heads, g.height, g.width),
        *(*g.windows, *strides(x, matrix, up, gate_weight), 0 if gate_bias is None else gate_bias.stride(0)),
        *((0, 0) if bias is None else bias.stride()),
        *(*strides(rows, outputs), tiles),
        ACTIVATION=ACTIVATION_CODES[activation],
        HAS_GATE_BIAS=gate_bias is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        KH=g.kh,
        KW=g.kw,
        BR=padded_rank(g.rank),
        BH=padded_heads(g.heads),
        FEW=g.few_channels,
        PRECISION=precision(x.dtype),
        **config,
    )
    return y


def _sums_of_t(x: Tensor, matrix: Tensor, g: Geometry) -> Tensor:
    """The sums of t over the positions of each sample, `[B, R]` in float32."""
    from inherit_kernels.ops.gated_lowrank_conv2d.kernels_triton import (
        gated_lowrank_conv2d_features_kernel,
        gated_lowrank_conv2d_windows_kernel,
    )

    config = g.config(OP, "windows", x)
    taps = padded_rank(g.taps)
    # The accumulator [taps, BC] and what it is made from stay in registers; a first layer has few channels.
    most = (SUMS_16 if x.element_size() == 2 else SUMS_32) // taps
    config = config | {"BC": max(16, min(config["BC"], most, padded_rank(g.channels)))}
    c_tiles, tiles = ceil_div(g.channels, config["BC"]), ceil_div(g.height * g.width, config["BP"])
    splits = share_of_programs(config, hint(g.batch * c_tiles), hint(tiles))
    windows = torch.empty((g.batch, splits, g.taps, g.channels), dtype=torch.float32, device=x.device)
    launch(
        gated_lowrank_conv2d_windows_kernel,
        (g.batch * splits * c_tiles,),
        *(x, windows, g.channels, g.height, g.width, *g.size, *g.windows, *x.stride()),
        *(c_tiles, splits, ceil_div(tiles, splits)),
        KH=g.kh,
        KW=g.kw,
        BT=taps,
        PRECISION=precision(x.dtype),
        **without(config, "PROGRAMS"),
    )
    sums = torch.empty((g.batch, g.rank), dtype=torch.float32, device=x.device)
    rank_tiles = ceil_div(g.rank, 16)
    launch(
        gated_lowrank_conv2d_features_kernel,
        (g.batch * rank_tiles,),
        *(windows, matrix, sums, g.taps * g.channels, g.rank, splits, *matrix.stride(), rank_tiles),
        BR=16,
        BK=256,
        num_warps=4,
    )
    return sums
