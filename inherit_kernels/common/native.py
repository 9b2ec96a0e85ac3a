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


def declines_on_cuda(problem: Problem, dtypes: Sequence[torch.dtype]) -> str | None:
    """One sentence why no CUDA C++ kernel can serve a problem of these dtypes, whatever its sizes, or None."""
    if problem.dtype not in dtypes:
        return f"the CUDA kernels of {problem.op} take {', '.join(map(str, dtypes))}, not {problem.dtype}"
    if not _native.cuda_built():
        reason = _native.build_notes().get("cuda_error") or "install this package again with INHERIT_KERNELS_BUILD=cuda"
        return _native.error or f"the native library was built without CUDA: {reason}"
    return None


def declines_linear_on_cuda(problem: Problem) -> str | None:
    """The same for the linear ops: up to 16 rows on any device, more of them in clusters of Hopper's."""
    rows, rank, heads = (problem.sizes.get(letter, 1) for letter in "MRH")
    if "M" not in problem.sizes:
        return "the CUDA kernels are chosen by the number of rows, which is not known beforehand"
    sentence = declines_on_cuda(problem, CUDA_DTYPES)
    if sentence is not None:
        return sentence
    if not problem.sizes["N"]:
        return "there is no output to compute"
    if rows <= DECODE_ROWS:
        fits = rank <= 512 and heads <= 16
        return None if fits else f"up to rank 512 and 16 heads are served at few rows, not {rank} and {heads}"
    if torch.cuda.get_device_capability(problem.device)[0] != 9:
        return f"more than {DECODE_ROWS} rows take a device with clusters (compute capability 9)"
    if problem.dtype == torch.float32:
        return f"more than {DECODE_ROWS} rows are served in bfloat16 and float16"
    if rank > 256 or heads > 8 or rank % 8 or problem.sizes["K"] % 8 or not problem.sizes["K"]:
        return f"clusters take ranks to 256 and inputs in multiples of 8, and up to 8 heads, not {problem.sizes}"
    return None


def only_needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The native backwards return an empty tensor for a gradient that nobody needs."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
