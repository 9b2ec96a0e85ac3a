"""The definition of `lowrank_conv2d`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from inherit_kernels.common.activation import activate
from inherit_kernels.common.conv import Pair, first_stage, in_format, memory_format_of


def lowrank_conv2d_reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    activation: str | None = None,
) -> Tensor:
    """t = conv2d(x, down); y = act(1×1 convolution of t by up + bias + residual)."""
    t = first_stage(x, down, stride, padding, dilation)
    z = F.conv2d(t, up[:, :, None, None], bias)
    return in_format(activate(z if residual is None else z + residual, activation), memory_format_of(x))
