"""The Triton kernels for NVIDIA GPUs: `kernels_triton.py`.

Launches: the forward one, or two in the split form for few rows; the backward one or two for dx and t's gradient, then one
or two a weight gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from inherit_kernels.common import costs, triton_launch
from inherit_kernels.common.activation import ACTIVATION_CODES
from inherit_kernels.common.rows import rows_of
from inherit_kernels.common.triton_launch import Config, ceil_div, config_for, declines, launch, padded_rank, precision
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
OP = "lowrank_linear"
#: The kernels of the configuration tables.
KERNELS = ("forward", "backward_dx", "weight_gradient")


def supports(problem: Problem) -> str | None:
    return declines(problem)


def tuning_space(kernel: str, bits: int, BR: int) -> list[Config]:
    """Candidate configurations of a kernel of the tables, for a dtype of so many bits and a padded rank."""
    return gradient_space(bits, BR) if kernel == "weight_gradient" else two_stage_space(bits, BR)


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
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], up.shape[0])
    t = x.new_empty(*x.shape[:-1], down.shape[0]) if store_t else y
    _two_stages(
        "forward", rows_of(x), down, up, bias, residual, ACTIVATION_CODES[activation], y, t if store_t else None
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
    activation: str | None,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    need_x, need_down, need_up, need_bias = needs
    rows, dz, t = rows_of(x), rows_of(dz), rows_of(t)
    dx = x.new_empty(x.shape) if need_x else None
    dt = t.new_empty(t.shape) if need_down else None
    d_down = d_up = d_bias = None
    if need_x or need_down:
        _two_stages("backward_dx", dz, up.t(), down.t(), None, None, 0, dx, dt)
    if need_down or need_up or need_bias:
        config = config_for(OP, "weight_gradient", x.dtype, x.device, _sizes(rows, down, up))
        if need_down:
            d_down = weight_gradient(config, rows, dt, transposed=True)[0].select(0, 0)
        d_up, d_bias = weight_gradient(config, dz, t, need_out=need_up, need_sums=need_bias)
    return dx, d_down, d_up.select(0, 0) if need_up else None, d_bias.select(0, 0) if need_bias else None


def _sizes(x: Tensor, down: Tensor, up: Tensor) -> dict[str, Any]:
    return {"BR": padded_rank(down.shape[0]), "M": x.shape[0], "K": x.shape[1], "N": up.shape[0]}


def _two_stages(
    kernel: str,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    code: int,
    y: Tensor | None,
    t: Tensor | None,
) -> None:
    """y = act(x·downᵀ·upᵀ + bias + residual) and t = x·downᵀ into the outputs given, x `[M, K]`."""
    from inherit_kernels.ops.lowrank_linear.kernels_triton import lowrank_linear_fwd_kernel

    (rows, depth), (columns, rank) = x.shape, up.shape
    if rows == 0:
        return
    sizes = _sizes(x, down, up)
    config = config_for(OP, kernel, x.dtype, x.device, sizes)
    splits = config.get("SPLIT_K", 0)
    partials = partial_product(config, x, down) if splits else x
    residual_rows = x if residual is None else rows_of(residual)
    programs_n = 1 if y is None else config["SPLIT_N"] or ceil_div(columns, config["BN"])
    launch(
        lowrank_linear_fwd_kernel,
        (ceil_div(rows, config["BM"]) * programs_n,),
        x,
        down,
        up,
        x if bias is None else bias,
        residual_rows,
        partials,
        x if y is None else y,
        x if t is None else t,
        rows,
        depth,
        columns,
        rank,
        programs_n,
        *x.stride(),
        *down.stride(),
        *up.stride(),
        1 if bias is None else bias.stride(0),
        *residual_rows.stride(),
        SPLIT_K=splits,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        STORE_Y=y is not None,
        STORE_T=t is not None,
        ACTIVATION=code,
        PRECISION=precision(x.dtype),
        BM=config["BM"],
        BN=config["BN"],
        BK=config["BK"],
        BR=sizes["BR"],
        **options_of(config),
    )
