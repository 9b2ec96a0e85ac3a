"""The Triton kernels for NVIDIA GPUs: `kernels_triton.py`.

Launches: the forward one, or two in the split form for few rows; the backward one or two for dx and what it shares with
the gate, then one or two a weight gradient: of `down`, of `up` with `bias`, of `gate_weight` with `gate_bias`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inherit_kernels.common import costs, triton_launch
from inherit_kernels.common.activation import ACTIVATION_CODES
from inherit_kernels.common.rows import rows_of
from inherit_kernels.common.triton_launch import (
    Config,
    assembler_fault,
    ceil_div,
    config_for,
    declines,
    launch,
    padded_rank,
    precision,
)
from inherit_kernels.common.triton_plan import planned
from inherit_kernels.common.triton_products import (
    gradient_space,
    options_of,
    partial_product,
    two_stage_space,
    weight_gradient,
)
from inherit_kernels.registry import Problem

checks_arguments = False
SERVES, PROVEN = triton_launch.SERVES, triton_launch.PROVEN
estimate = costs.fused
OP = "gated_lowrank_linear"
#: The kernels of the configuration tables.
KERNELS = ("forward", "backward_dx", "weight_gradient", "gate_gradient")


def supports(problem: Problem) -> str | None:
    return declines(problem) or (assembler_fault(problem) if problem.training else None)


def doubts(problem: Problem) -> str | None:
    """Why an automatic choice leaves alone what can serve: its backward was wrong on the only GPU it has run on."""
    if problem.training and problem.device.type == "cuda":
        return "its backward was wrong on an H200 (triton 3.6) and has not run on a GPU since it was mended"
    return None


def tuning_space(kernel: str, bits: int, BR: int) -> list[Config]:
    """Candidate configurations of a kernel of the tables, for a dtype of so many bits and a padded rank."""
    if kernel == "weight_gradient":
        return gradient_space(bits, BR)
    if kernel == "gate_gradient":
        return [{**config, "BP": 16, "BQ": min(BR, 128), "num_warps": 4} for config in gradient_space(bits, BR)[:9]]
    space = two_stage_space(bits, BR)
    if kernel == "forward":
        return space
    # The partials of the gate's gradient, one a rank tile, are added up in one unrolled sum.
    for config in space:
        if "BR_TILE" in config:
            config["BR_TILE"] = max(config["BR_TILE"], BR // 4)
    return [{**config, "CHUNK": chunk} for config in space[::2] for chunk in (512, 2048)]


@planned
@triton_launch.on_plain_memory
def forward(*args: Any) -> Tensor:
    return _forward(False, *args)[0]


@planned
@triton_launch.on_plain_memory
def forward_saving(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward(True, *args)


def _forward(
    store_t: bool,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    from inherit_kernels.ops.gated_lowrank_linear.kernels_triton import gated_lowrank_linear_fwd_kernel

    y = x.new_empty(*x.shape[:-1], up.shape[1])
    t = x.new_empty(*x.shape[:-1], down.shape[0]) if store_t else y
    x = rows_of(x)
    (rows, depth), (heads, columns, rank) = x.shape, up.shape
    if rows == 0:
        return y, t
    sizes = _sizes(x, down, up)
    config = config_for(OP, "forward", x.dtype, x.device, sizes)
    splits = config.get("SPLIT_K", 0)
    partials = partial_product(config, x, down) if splits else x
    residual_rows = x if residual is None else rows_of(residual)
    programs_n = config["SPLIT_N"] or ceil_div(columns, config["BN"])
    launch(
        gated_lowrank_linear_fwd_kernel,
        (ceil_div(rows, config["BM"]) * programs_n,),
        x,
        down,
        up,
        gate_weight,
        x if gate_bias is None else gate_bias,
        x if bias is None else bias,
        residual_rows,
        partials,
        y,
        t,
        rows,
        depth,
        columns,
        rank,
        heads,
        programs_n,
        *x.stride(),
        *down.stride(),
        *up.stride(),
        *gate_weight.stride(),
        1 if gate_bias is None else gate_bias.stride(0),
        *((0, 1) if bias is None else bias.stride()),
        *residual_rows.stride(),
        SPLIT_K=splits,
        HAS_GATE_BIAS=gate_bias is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        STORE_T=store_t,
        ACTIVATION=ACTIVATION_CODES[activation],
        PRECISION=precision(x.dtype),
        BM=config["BM"],
        BN=config["BN"],
        BK=config["BK"],
        BR=sizes["BR"],
        BH=padded_rank(heads),
        **options_of(config),
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
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    need_x, need_down, need_up, need_gate_weight, need_gate_bias, need_bias = needs
    if not any(needs):
        return [None] * len(needs)
    rows, dz, t = rows_of(x), rows_of(dz), rows_of(t)
    sizes = _sizes(rows, down, up)
    dx = x.new_empty(x.shape) if need_x else None
    gate_only = not (need_x or need_down or need_gate_weight or need_gate_bias)
    dt, d_logits, g = _upstream(dz, t, rows, down, up, gate_weight, gate_bias, bias, dx, gate_only, sizes)
    d_down = d_up = d_bias = d_gate_weight = d_gate_bias = None
    if need_down or need_up or need_bias:
        config = config_for(OP, "weight_gradient", x.dtype, x.device, sizes)
        if need_down:
            d_down = weight_gradient(config, rows, dt, transposed=True)[0].select(0, 0)
        d_up, d_bias = weight_gradient(config, dz, t, g, need_out=need_up, need_sums=need_bias)
    if need_gate_weight or need_gate_bias:
        config = config_for(OP, "gate_gradient", x.dtype, x.device, sizes)
        d_gate_weight, d_gate_bias = weight_gradient(
            config, d_logits, t, need_out=need_gate_weight, need_sums=need_gate_bias
        )
    return (
        dx,
        d_down,
        d_up,
        d_gate_weight.select(0, 0) if need_gate_weight else None,
        d_gate_bias.select(0, 0) if need_gate_bias else None,
        d_bias,
    )


def _sizes(x: Tensor, down: Tensor, up: Tensor) -> dict[str, Any]:
    return {
        "BR": padded_rank(down.shape[0]),
        "M": x.shape[0],
        "K": x.shape[1],
        "N": up.shape[1],
        "H": up.shape[0],
    }


def _upstream(
    dz: Tensor,
    t: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    dx: Tensor | None,
    gate_only: bool,
    sizes: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx into the tensor given; dt `[M, R]`, the logits' gradient and g `[M, H]` float32, only g if `gate_only`."""
    from inherit_kernels.ops.gated_lowrank_linear.kernels_triton import gated_lowrank_linear_bwd_dx_kernel

    (rows, rank), (heads, columns, _) = t.shape, up.shape
    g = t.new_empty(rows, heads, dtype=torch.float32)
    dt = g if gate_only else t.new_empty(rows, rank)
    d_logits = g if gate_only else torch.empty_like(g)
    if rows == 0:
        return dt, d_logits, g
    config = config_for(OP, "backward_dx", x.dtype, x.device, sizes)
    splits = 0 if gate_only else config.get("SPLIT_K", 0)
    programs_n = 1 if dx is None else config["SPLIT_N"] or ceil_div(x.shape[1], config["BN"])
    gate = (gate_weight, x if gate_bias is None else gate_bias, x if bias is None else bias)
    strides = (
        *gate_weight.stride(),
        1 if gate_bias is None else gate_bias.stride(0),
        *((0, 1) if bias is None else bias.stride()),
    )
    flags = {"HAS_GATE_BIAS": gate_bias is not None, "HAS_BIAS": bias is not None, "PRECISION": precision(x.dtype)}
    blocks = {
        "BM": config["BM"],
        "BK": config["BK"],
        "CHUNK": config["CHUNK"],
        "BR": sizes["BR"],
        "BH": padded_rank(heads),
    }
    partials = (g, g)
    if splits:
        partials = _partials(config, dz, t, up, gate, strides, flags, blocks)
    launch(
        gated_lowrank_linear_bwd_dx_kernel,
        (ceil_div(rows, config["BM"]) * programs_n,),
        dz,
        t,
        down,
        up,
        *gate,
        *partials,
        x if dx is None else dx,
        dt,
        d_logits,
        g,
        rows,
        x.shape[1],
        columns,
        rank,
        heads,
        programs_n,
        *dz.stride(),
        *t.stride(),
        *down.stride(),
        *up.stride(),
        *strides,
        SPLIT_K=splits,
        RANK_TILES=partials[1].shape[0] // splits if splits else 1,
        GATE_ONLY=gate_only,
        STORE_DX=dx is not None,
        BN=config["BN"],
        **flags,
        **blocks,
        **options_of(config),
    )
    return dt, d_logits, g


def _partials(
    config: Config,
    dz: Tensor,
    t: Tensor,
    up: Tensor,
    gate: tuple[Tensor, Tensor, Tensor],
    strides: tuple[Any, ...],
    flags: dict[str, Any],
    blocks: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The split form's first stage in float32: partials of dt `[SPLIT_K, M, R]`, of g's gradient `[tiles, M, H]`.

    Each program forms BR_TILE of the ranks (all of them where the configuration does not say).
    """
    from inherit_kernels.ops.gated_lowrank_linear.kernels_triton import gated_lowrank_linear_bwd_partials_kernel

    (rows, rank), (heads, columns, _), splits = t.shape, up.shape, config["SPLIT_K"]
    partial_dt = t.new_empty(splits, rows, rank, dtype=torch.float32)
    tile = config.get("BR_TILE", blocks["BR"])
    tiles = blocks["BR"] // tile * splits
    partial_dg = t.new_empty(tiles, rows, heads, dtype=torch.float32)
    launch(
        gated_lowrank_linear_bwd_partials_kernel,
        (ceil_div(rows, config["BM"]) * tiles,),
        dz,
        t,
        up,
        *gate,
        partial_dt,
        partial_dg,
        rows,
        columns,
        rank,
        heads,
        *dz.stride(),
        *t.stride(),
        *up.stride(),
        *strides,
        SPLIT_K=splits,
        BR_TILE=tile,
        **flags,
        **blocks,
        **options_of(config),
    )
    return partial_dt, partial_dg
