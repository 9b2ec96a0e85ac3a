"""Two torch convolutions; the backward through torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inherit_kernels.common import costs
from inherit_kernels.common.activation import activate
from inherit_kernels.common.conv import (
    Pair,
    first_stage,
    first_stage_backward,
    in_format,
    memory_format_of,
)
from inherit_kernels.registry import EVERYWHERE, PLAIN_TORCH, Problem

checks_arguments = False
SERVES = EVERYWHERE
PROVEN = PLAIN_TORCH
estimate = costs.library


def supports(problem: Problem) -> str | None:
    return None


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
    z = F.conv2d(t, up[:, :, None, None], bias)
    return in_format(activate(z if residual is None else z + residual, activation), memory_format_of(x)), t


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
    need_x, need_down, need_up, need_bias = needs
    # torch's own second stage: one long matrix product for d_up errs up to 42 % beyond twice its error (8,192 positions).
    once, none = (1, 1), (0, 0)
    wanted = (need_x or need_down, need_up, need_bias)
    dt, d_up, d_bias = torch.ops.aten.convolution_backward(
        dz, t, up[:, :, None, None], [up.shape[0]], once, none, once, False, none, 1, wanted
    )
    dx, d_down = first_stage_backward(dt, x, down, (stride, padding, dilation), need_x, need_down)
    return dx, d_down, d_up.flatten(1) if need_up else None, d_bias
