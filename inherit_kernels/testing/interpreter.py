"""Repairs of Triton's interpreter (3.6 and 3.9), which the tests run kernels under: its bfloat16 is not bfloat16.

Seen with triton 3.9: a product of bfloat16 tiles multiplies their bit patterns as integers, and float32 becomes bfloat16 by
cutting bits off where a GPU rounds to nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def repair() -> None:
    """Make bfloat16 products and conversions of the interpreter those of a GPU. Call once, before a kernel runs."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_from_bfloat16(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        return plain_cast(self, source, target)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)
