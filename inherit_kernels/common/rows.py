"""Batches of any number of dimensions as rows."""

from __future__ import annotations

import math

from torch import Tensor


def rows_of(tensor: Tensor) -> Tensor:
    """`[..., C]` as `[M, C]`, a view where the strides allow it; C may be 0."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
