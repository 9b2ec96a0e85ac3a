"""Launches the Triton kernels that several ops share: the split first product and the gradients of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inherit_kernels.common.triton_launch import Config, ceil_div, hint, launch, precision

SUM_BLOCK = 1024


def options_of(config: Config) -> Config:
    """The options of a configuration that are Triton's own."""
    return {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}


def partial_product(config: Config, a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ for a `[M, K]` and b `[R, K]`, as SPLIT_K float32 partials `[SPLIT_K, M, R]` over K.

    Reads SPLIT_K, BM, BR_TILE, BK, num_warps and num_stages of the configuration.
    """
    from inherit_kernels.common.kernels_triton import partial_product_kernel

    (rows, depth), rank, splits = a.shape, b.shape[0], config["SPLIT_K"]
    partials = a.new_empty(splits, rows, rank, dtype=torch.float32)
    launch(
        partial_product_kernel,
        (ceil_div(rows, config["BM"]) * ceil_div(rank, config["BR_TILE"]) * splits,),
        a,
        b,
        partials,
        rows,
        depth,
        rank,
        *a.stride(),
        *b.stride(),
        SPLIT_K=splits,
        PRECISION=precision(a.dtype),
        BM=config["BM"],
        BR_TILE=config["BR_TILE"],
        BK=config["BK"],
        **options_of(config),
    )
    return partials


def weight_gradient(
    config: Config,
    a: Tensor,
    b: Tensor,
    scale: Tensor | None = None,
    *,
    transposed: bool = False,
    need_out: bool = True,
    need_sums: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weights as sums over rows, in float32, split over the rows where there are few tiles.

    Args:
        config: BP, BQ, BM (rows a step), PROGRAMS (how many programs to split the rows for), num_warps, num_stages.
        a: `[M, P]`, cast to the dtype of b.
        b: `[M, Q]`.
        scale: `[M, H]` float32 and contiguous; None is H = 1 and a scale of one.
        transposed: the first result is `[H, Q, P]`.

    Returns:
        Σ_m scale[m, h]·a[m, p]·b[m, q] `[H, P, Q]` where `need_out`, and Σ_m scale[m, h]·a[m, p] `[H, P]` where
        `need_sums`, both in the dtype of b.
    """
    rows, wide, narrow = a.shape[0], a.shape[1], b.shape[1]
    heads = 1 if scale is None else scale.shape[1]
    shape = (heads, narrow, wide) if transposed else (heads, wide, narrow)
    new = b.new_zeros if rows == 0 else b.new_empty
    out = new(shape) if need_out else None
    sums = new(heads, wide) if need_sums else None
    if rows == 0 or not (need_out or need_sums):
        return out, sums
    # The split is that of the full problem, so that a gradient asked for alone is the same bit for bit.
    # A power of two: the kernels are compiled for it, and rows may vary from call to call.
    programs = max(1, ceil_div(hint(wide), config["BP"]) * ceil_div(hint(narrow), config["BQ"]) * hint(heads))
    splits = power_of_two(min(config["PROGRAMS"] // programs, hint(rows) // config["BM"]))
    if splits == 1:
        _launch_gradient(config, a, b, scale, out, sums, transposed, 1, 0)
        return out, sums
    size = 0 if out is None else heads * wide * narrow
    count = 0 if sums is None else heads * wide
    partials = b.new_empty(splits, size + count, dtype=torch.float32)
    partial_out = partials if need_out else None
    partial_sums = partials[:, size:] if need_sums else None
    _launch_gradient(config, a, b, scale, partial_out, partial_sums, transposed, splits, size + count)
    _sum_partials(partials, out, sums, size, count)
    return out, sums


def power_of_two(value: int) -> int:
    """The largest power of two that is not larger; 1 below."""
    return 1 << max(value.bit_length() - 1, 0) if value > 0 else 1


def _launch_gradient(
    config: Config,
    a: Tensor,
    b: Tensor,
    scale: Tensor | None,
    out: Tensor | None,
    sums: Tensor | None,
    transposed: bool,
    splits: int,
    stride_split: Any,
) -> None:
    from inherit_kernels.common.kernels_triton import weight_gradient_kernel

    rows, wide, narrow = a.shape[0], a.shape[1], b.shape[1]
    heads = 1 if scale is None else scale.shape[1]
    tiles_q = 1 if out is None else ceil_div(narrow, config["BQ"])
    launch(
        weight_gradient_kernel,
        (splits * ceil_div(wide, config["BP"]) * heads * tiles_q,),
        a,
        b,
        a if scale is None else scale,
        a if out is None else out,
        a if sums is None else sums,
        rows,
        wide,
        narrow,
        heads,
        *a.stride(),
        *b.stride(),
        stride_split,
        wide * narrow,
        *((1, wide) if transposed else (narrow, 1)),
        SPLIT_M=splits,
        HAS_SCALE=scale is not None,
        STORE_OUT=out is not None,
        STORE_SUMS=sums is not None,
        PRECISION=precision(b.dtype),
        BP=config["BP"],
        BQ=config["BQ"],
        BM=config["BM"],
        **options_of(config),
    )


def _sum_partials(partials: Tensor, out: Tensor | None, sums: Tensor | None, size: Any, count: Any) -> None:
    from inherit_kernels.common.kernels_triton import sum_partials_kernel

    launch(
        sum_partials_kernel,
        (ceil_div(size + count, SUM_BLOCK),),
        partials,
        partials if out is None else out,
        partials if sums is None else sums,
        size,
        count,
        SPLITS=partials.shape[0],
        BLOCK=SUM_BLOCK,
        num_warps=4,
        num_stages=1,
    )


# --- candidates for tuning ---------------------------------------------------------------------------------------------


def two_stage_space(bits: int, rank: int) -> list[Config]:
    """Candidates for kernels that form t (or dt) and multiply it on: fused ones for many rows, split ones for few.

    Args:
        bits: 16 or 32, of the dtype.
        rank: padded to a power of two.
    """
    warps = 8 if rank >= 128 else 4
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    if bits == 16:
        rows = (64, 128) if rank <= 128 else (32, 64) if rank == 256 else (16, 32)
        columns, depth = ((64, 128), 64) if rank <= 128 else ((32, 64), 32)
    else:
        rows, columns, depth = ((32, 64), (32, 64), 32) if rank <= 128 else ((16, 32), (32,), 16)
    four = {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
    fused = [{**four, "SPLIT_N": split} for split in (1, 2)] if bits == 16 and rank <= 128 else []
    fused += [
        {"BM": m, "BN": n, "BK": depth, "SPLIT_N": split, "num_warps": 8, "num_stages": stages}
        for m in rows
        for n in columns
        for split, stages in ((1, 2), (1, 3), (2, 3))
    ]
    few = [
        {"BM": 16, "BN": n, "BK": 2 * depth, "BR_TILE": min(rank, tile), "SPLIT_K": split_k, "SPLIT_N": 0}
        | {"num_warps": warps, "num_stages": stages}
        for n, tile, split_k, stages in (
            (columns[0], 16, 8, 2),
            (columns[0], 16, 16, 2),
            (columns[0], 16, 32, 2),
            (columns[0], 32, 8, 2),
            (32, 16, 8, 3),
            (32, 16, 16, 3),
            (32, 16, 32, 3),
        )
    ]
    split = [
        {"BM": rows[0], "BN": columns[0], "BK": depth, "BR_TILE": min(rank, 64), "SPLIT_K": split_k, "SPLIT_N": split_n}
        | {"num_warps": 8, "num_stages": 2}
        for split_k, split_n in ((2, 8), (4, 8), (8, 8), (4, 32), (8, 0))
    ]
    return fused + few + split


def gradient_space(bits: int, rank: int) -> list[Config]:
    """Candidates for `weight_gradient`, likewise."""
    wide, depths = ((64, 128), (32, 64, 128)) if bits == 16 else ((32, 64), (16, 32))
    return [
        {"BP": p, "BQ": min(rank, 2 * p), "BM": m, "PROGRAMS": programs, "num_warps": 8, "num_stages": 3}
        for p in wide
        for m in depths
        for programs in (132, 264, 528)
    ]
