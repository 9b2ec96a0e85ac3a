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
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_PROOF = "emulated on CPU; compiled for sm_80 and sm_90a"
DECODE_ROWS = 16  # kDecodeRows of csrc/include/inherit_kernels/cuda/linear_call.h


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


def declines_linear_on_cuda(problem: Problem) -> str | None:
    """One sentence why no CUDA C++ kernel can serve a linear layer, or None: they are for few rows."""
    if "M" not in problem.sizes:
        return "the CUDA kernels are chosen by the number of rows, which is not known beforehand"
    if problem.dtype not in CUDA_DTYPES:
        return f"the CUDA kernels take {', '.join(map(str, CUDA_DTYPES))}, not {problem.dtype}"
    if not _native.cuda_built():
        reason = _native.build_notes().get("cuda_error") or "install this package again with INHERIT_KERNELS_BUILD=cuda"
        return _native.error or f"the native library was built without CUDA: {reason}"
    rows, rank, heads = (problem.sizes.get(letter, 1) for letter in "MRH")
    if rows > DECODE_ROWS or rank > 512 or heads > 16:
        return f"the CUDA kernels take up to {DECODE_ROWS} rows, rank 512 and 16 heads, not {rows}, {rank} and {heads}"
    return None if problem.sizes["N"] else "there is no output to compute"


def only_needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The native backwards return an empty tensor for a gradient that nobody needs."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
