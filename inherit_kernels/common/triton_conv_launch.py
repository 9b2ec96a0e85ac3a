"""Launches of the convolution kernels that both convolution ops need, and how they see their tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from inherit_kernels.common import triton_launch
from inherit_kernels.common.conv import Pair, memory_format_of, output_size
from inherit_kernels.common.triton_launch import (
    Config,
    ceil_div,
    config_for,
    hint,
    launch,
    padded_rank,
    precision,
    strides,
)
from inherit_kernels.registry import Problem

MAX_POSITIONS = 2**31 - 1


def declines(problem: Problem) -> str | None:
    """One sentence why no Triton kernel can serve the problem, or None."""
    if problem.sizes.get("P", 0) > MAX_POSITIONS:
        return f"the Triton kernels count the positions of an image in 32 bits, not {problem.sizes['P']} of them"
    return triton_launch.declines(problem)


def doubts(problem: Problem) -> str | None:
    """Why an automatic choice leaves alone what can serve."""
    if problem.device.type == "cuda" and not problem.channels_last:
        return "images that are not channels-last are gathered element by element, and were never timed"
    return None


def empty_image(x: Tensor, channels: int, size: Sequence[Any]) -> Tensor:
    """Empty `[B, channels, *size]` in the memory format of x."""
    shape = (x.shape[0], channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def tap_matrix(down: Tensor) -> Tensor:
    """`down` `[R, C, kh, kw]` as `[R, taps·C]`: a view where it is channels-last or 1×1, else a copy."""
    return down.permute(0, 2, 3, 1).flatten(1)


def positions(image: Tensor) -> Tensor:
    """`[B, N, Ho·Wo]` from `[B, N, Ho, Wo]`: a view of any tensor whose rows follow one another evenly, else a copy."""
    return image.flatten(2)


def candidates(names: Sequence[str], choices: Iterable[Sequence[int]], fixed: Config) -> list[Config]:
    """Configurations for a tuner: one for each choice of the named values with 4 and 8 warps and 2 and 3 stages."""
    return [
        dict(zip(names, choice, strict=True)) | fixed | {"num_warps": warps, "num_stages": stages}
        for choice in choices
        for warps, stages in ((4, 3), (4, 2), (8, 3), (8, 2))
    ]


def backward_tuning_space(kernel: str, bits: int, BR: int) -> list[Config]:
    """Sensible configurations of a backward kernel, to be measured; some may not fit every device."""
    rank = min(BR, 256 if bits == 16 else 64)
    half = min(BR, 128 if bits == 16 else 32)
    deep = 64 if bits == 16 else 32
    if kernel == "backward_dt":
        blocks: Iterable[Sequence[int]] = ((64, deep, rank), (128, deep, half), (64, 32, half), (32, deep, rank))
        return candidates(("BM", "BN", "BR"), blocks, {})
    if kernel == "backward_dx":
        depth = min(BR, deep)
        blocks = ((64, 64, depth), (128, 64, depth), (128, 128, min(depth, 32)), (64, 128, depth), (64, 32, depth))
        return candidates(("BM", "BC", "BK"), blocks, {})
    if kernel in ("backward_down", "backward_up"):
        columns = "BC" if kernel == "backward_down" else "BN"
        blocks = ((deep, 64, half, 264), (deep, 64, half, 528), (deep, 128, half, 264), (32, 64, half, 528))
        return candidates(("BM", columns, "BR", "PROGRAMS"), blocks, {})
    raise ValueError(f"kernel: expected one of the backward's, got {kernel!r}")


class Geometry:
    """A convolution's sizes and windows, as the kernels take them."""

    def __init__(self, x: Tensor, down: Tensor, up: Tensor, stride: Pair, padding: Pair, dilation: Pair):
        self.batch, self.channels, self.height, self.width = x.shape
        self.rank, _, self.kh, self.kw = down.shape
        self.heads, self.outputs = up.shape[:-1] if up.dim() == 3 else (1, up.shape[0])
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.size = output_size(x.shape[2:], down.shape[2:], stride, padding, dilation)
        self.positions = self.size[0] * self.size[1]
        self.rows = self.batch * self.positions

    @property
    def taps(self) -> int:
        return self.kh * self.kw

    @property
    def few_channels(self) -> bool:
        """Whether 16-byte loads of channels would be mostly padding."""
        return hint(self.channels) < 16

    @property
    def windows(self) -> tuple[int, ...]:
        return (*self.stride, *self.padding, *self.dilation)

    def config(self, op: str, kernel: str, x: Tensor) -> Config:
        letters = {"B": self.batch, "C": self.channels, "T": self.taps, "P": self.positions}
        letters |= {"N": self.outputs, "H": self.heads, "M": self.rows}  # M: of the shipped tables
        config = config_for(op, kernel, x.dtype, x.device, {"BR": padded_rank(self.rank), **letters})
        if self.few_channels and kernel in ("forward", "forward_down") and "BK" in config:
            # Each element of a step has an address of its own: at 64 columns they spilled 136 bytes a thread.
            return config | {"BK": 32 if x.element_size() == 2 else 16}
        return config


def partial_sums(x: Tensor, matrix: Tensor, geometry: Geometry, config: Config) -> Tensor:
    """Partials of t `[SPLIT_K, M, R]` in float32."""
    from inherit_kernels.common.triton_conv import conv_partials_kernel

    g, splits = geometry, config["SPLIT_K"]
    partials = torch.empty((splits, g.rows, g.rank), dtype=torch.float32, device=x.device)
    launch(
        conv_partials_kernel,
        (ceil_div(g.rows, config["BM"]) * splits,),
        *(x, matrix, partials, g.rows, g.positions, g.size[1], g.rank, g.channels, g.height, g.width),
        *(*g.windows, *strides(x, matrix)),
        KH=g.kh,
        KW=g.kw,
        BM=config["BM"],
        BR=padded_rank(g.rank),
        BK=config["BK"],
        SPLIT_K=splits,
        FEW=g.few_channels,
        PRECISION=precision(x.dtype),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return partials


def backward_dt(op: str, dz: Tensor, up: Tensor, ds: Tensor | None, x: Tensor, geometry: Geometry) -> Tensor:
    """dt `[B, P, R]` from dz `[B, N, P]`.

    Args:
        up: `[N, R]`, or `[B, N, R]`, one a sample.
        ds: `[B, R]`, added at every position.
    """
    from inherit_kernels.common.triton_conv import conv_bwd_dt_kernel

    g, config = geometry, geometry.config(op, "backward_dt", x)
    dt = torch.empty((g.batch, g.positions, g.rank), dtype=x.dtype, device=x.device)
    batch, count = g.batch, g.positions
    if up.dim() == 2 and dz.stride(0) == g.positions * dz.stride(2):  # then samples follow one another as positions do
        batch, count = 1, g.rows
    tiles, rank_tiles = ceil_div(count, config["BM"]), ceil_div(g.rank, config["BR"])
    s_zb, s_zn, s_zp = dz.stride()
    s_ub, s_un, s_ur = up.stride() if up.dim() == 3 else (0, *up.stride())
    launch(
        conv_bwd_dt_kernel,
        (batch * tiles * rank_tiles,),
        *(dz, up, dt if ds is None else ds, dt, count, dz.shape[1], g.rank),
        *(s_zb, s_zp, s_zn, s_ub, s_un, s_ur, tiles, rank_tiles),
        HAS_DS=ds is not None,
        PRECISION=precision(x.dtype),
        **config,
    )
    return dt


def backward_x(op: str, dt: Tensor, x: Tensor, matrix: Tensor, geometry: Geometry) -> Tensor:
    """dx, in the memory format of x, from dt `[B, P, R]`."""
    from inherit_kernels.common.triton_conv import conv_bwd_dx_kernel

    g, config = geometry, geometry.config(op, "backward_dx", x)
    dx = empty_image(x, g.channels, x.shape[2:])
    stride_h, stride_w = g.stride
    phase_rows = g.batch * ceil_div(g.height, stride_h) * ceil_div(g.width, stride_w)
    c_tiles = ceil_div(g.channels, config["BC"])
    launch(
        conv_bwd_dx_kernel,
        (ceil_div(phase_rows, config["BM"]) * stride_h * stride_w * c_tiles,),
        *(dt, matrix, dx, g.batch, g.rank, g.channels, g.height, g.width, *g.size, *g.padding, *g.dilation),
        *(*matrix.stride(), *dx.stride(), c_tiles),
        KH=g.kh,
        KW=g.kw,
        SH=stride_h,
        SW=stride_w,
        PH=stride_h // math.gcd(stride_h, g.dilation[0]),
        PW=stride_w // math.gcd(stride_w, g.dilation[1]),
        PRECISION=precision(x.dtype),
        **config,
    )
    return dx


def backward_down(op: str, dt: Tensor, x: Tensor, down: Tensor, geometry: Geometry) -> Tensor:
    """d_down from dt `[B, P, R]`: partial sums over shares of the positions, then their sum in order."""
    from inherit_kernels.common.triton_conv import conv_bwd_down_kernel

    g, config = geometry, geometry.config(op, "backward_down", x)
    c_tiles, rank_tiles = ceil_div(g.channels, config["BC"]), ceil_div(g.rank, config["BR"])
    programs = g.taps * c_tiles * rank_tiles
    tiles = ceil_div(g.positions, config["BM"])
    splits = share_of_programs(config, programs, hint(g.batch * tiles))
    partials = torch.empty((splits, g.rank, g.taps, g.channels), dtype=torch.float32, device=x.device)
    launch(
        conv_bwd_down_kernel,
        (programs, splits),
        *(x, dt, partials, g.batch, g.positions, g.size[1], g.rank, g.channels, g.height, g.width, *g.windows),
        *(*x.stride(), tiles, ceil_div(g.batch * tiles, splits), c_tiles, rank_tiles),
        KH=g.kh,
        KW=g.kw,
        PRECISION=precision(x.dtype),
        **without(config, "PROGRAMS"),
    )
    memory_format = torch.contiguous_format if down.is_contiguous() else torch.channels_last
    d_down = torch.empty(down.shape, dtype=down.dtype, device=x.device, memory_format=memory_format)
    s_r, s_c, _, s_t = d_down.stride()
    return sum_partials(partials, d_down, g.taps, g.channels, (s_r, s_t, s_c))


def backward_up(
    op: str, dz: Tensor, t: Tensor, x: Tensor, geometry: Geometry, *, per_sample: bool, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ over positions of dz·t, of dz and of t, each in float32 parts `[groups, splits, …]` still to be summed.

    Args:
        dz, t: `[B, N, P]` and `[B, R, P]`.
        per_sample: one group a sample, else a single group.
        with_sums: whether the sums of dz and t are wanted; they are not written otherwise.
    """
    from inherit_kernels.common.triton_conv import conv_bwd_up_kernel

    g, config = geometry, geometry.config(op, "backward_up", x)
    outputs, batch, count = dz.shape[1], g.batch, g.positions
    if not per_sample and all(image.stride(0) == count * image.stride(2) for image in (dz, t)):
        batch, count = 1, g.rows
    n_tiles, rank_tiles = ceil_div(outputs, config["BN"]), ceil_div(g.rank, config["BR"])
    tiles = ceil_div(count, config["BM"])
    groups, group_tiles = (batch, tiles) if per_sample else (1, batch * tiles)
    splits = share_of_programs(config, hint(groups) * n_tiles * rank_tiles, hint(group_tiles))
    products, dz_sums, t_sums = (
        torch.empty((groups, splits, *shape), dtype=torch.float32, device=x.device)
        for shape in ((outputs, g.rank), (outputs,), (g.rank,))
    )
    (s_zb, s_zn, s_zp), (s_tb, s_tr, s_tp) = dz.stride(), t.stride()
    launch(
        conv_bwd_up_kernel,
        (groups * splits * n_tiles * rank_tiles,),
        *(dz, t, products, dz_sums, t_sums, count, outputs, g.rank, s_zb, s_zp, s_zn, s_tb, s_tp, s_tr),
        *(tiles, ceil_div(group_tiles, splits), group_tiles, splits, n_tiles, rank_tiles),
        HAS_SUMS=with_sums,
        PRECISION=precision(x.dtype),
        **without(config, "PROGRAMS"),
    )
    return products, dz_sums, t_sums


def sum_partials(partials: Tensor, out: Tensor, taps: int, columns: int, strides: tuple[int, int, int]) -> Tensor:
    """`out` = the sum of float32 partials `[splits, R·taps·columns]`; `strides` are those of out's R, taps and columns."""
    from inherit_kernels.common.triton_conv import conv_sum_partials_kernel

    count = out.numel()
    launch(
        conv_sum_partials_kernel,
        (ceil_div(count, 128),),
        *(partials, out, partials.numel() // count, count, taps, columns, *strides),
        BS=16,
        BE=128,
        num_warps=4,
    )
    return out


def share_of_programs(config: Config, programs: int, tiles: int) -> int:
    """How many programs share each sum, so that about PROGRAMS run, none without a tile."""
    return max(1, min(config["PROGRAMS"] // max(1, programs), tiles))


def without(config: Config, name: str) -> Config:
    """A configuration but for one of its values, which is no argument of the kernel."""
    return {key: value for key, value in config.items() if key != name}
