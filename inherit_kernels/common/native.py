"""What the native backends of the ops share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inherit_kernels import _native
from inherit_kernels.registry import Problem

CPU_DTYPES = (torch.float32, torch.bfloat16)
CPU_PROOF = "tests on CPU; sanitizers"


class _Kernels:
    """The native overloads by name, each looked up once: `torch.ops` attribute chains cost 0.2 µs a call."""

    def __getattr__(self, name: str) -> Any:
        overload = getattr(_native.ops, name).default
        setattr(self, name, overload)
        return overload


kernels = _Kernels()


def declines(problem: Problem) -> str | None:
    """One sentence why no native CPU kernel can serve the problem, or None."""
    if problem.device.type != "cpu":
        return f"the native library has no kernel for {problem.device.type} tensors"
    if problem.dtype not in CPU_DTYPES:
        return f"the native kernels take float32 and bfloat16, not {problem.dtype}"
    return None if _native.load() else _native.error


def only_needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The native backwards return an empty tensor for a gradient that nobody needs."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
