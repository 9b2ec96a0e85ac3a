"""Products by cuBLASLt with what follows them in the same kernel: what the `blas` backends share.

Two library products are the strongest peer at many rows, where fusing both loses (docs/gpu.md). What they leave to gain is
the passes over y of an addition and an activation, and over dz of the bias's gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inherit_kernels import _native
from inherit_kernels.common.activation import ACTIVATION_CODES, activate
from inherit_kernels.common.heads import gate_of, scaled_rows
from inherit_kernels.common.native import kernels
from inherit_kernels.common.triton_launch import precision
from inherit_kernels.registry import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SERVES = {"cuda": DTYPES}
PROVEN = {"cuda": "calls of cuBLASLt against a stand-in on CPU"}
EPILOGUES = (None, "relu", "gelu_tanh")  # cuBLASLt's GELU is the tanh form; the others are a pass of torch's
MOST_HEADS = 8  # kMostScaleHeads of csrc/include/inherit_kernels/cuda/gated_lowrank_linear.h


def declines(problem: Problem) -> str | None:
    """One sentence why cuBLASLt cannot serve the problem, or None."""
    if problem.device.type != "cuda":
        return f"cuBLASLt computes on NVIDIA GPUs, not on {problem.device.type} tensors"
    if problem.dtype not in DTYPES:
        return f"the products are in float32, bfloat16 and float16, not {problem.dtype}"
    return None if _native.load() else _native.error


def doubts(problem: Problem) -> str | None:
    """Why an automatic choice leaves alone what can serve."""
    return "it has run on no GPU yet"


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """act(x·weightᵀ + bias + residual) `[M, N]`, x `[M, R]`, weight `[N, R]`, bias `[N]`, residual `[M, N]`.

    Where cuBLASLt has no algorithm (nothing to compute, odd alignments), torch's own product and passes.
    """
    inside = activation if activation in EPILOGUES else None
    y, found = kernels.linear_with_epilogue(x, weight, bias, residual, ACTIVATION_CODES[inside], _tf32(x))
    if not found:
        z = F.linear(x, weight, bias)
        return activate(z if residual is None else z + residual, activation)
    return y if inside == activation else activate(y, activation)


def weight_gradient(dz: Tensor, t: Tensor, need_weight: bool, need_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """dzᵀ·t `[N, R]` and Σ dz `[N]` over the rows, dz `[M, N]`, t `[M, R]`: one pass over dz where both are needed."""
    if need_weight and need_bias:
        d_weight, d_bias, found = kernels.weight_gradient_with_sums(dz, t, _tf32(dz))
        if found:
            return d_weight, d_bias
    return dz.t() @ t if need_weight else None, dz.sum(0) if need_bias else None


def scale_by_gate(t: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, columns: int) -> Tensor:
    """[g_1 t … g_H t] `[M, columns]`, then g and zeros where there are more columns than H·R; t `[M, R]`."""
    if gate_weight.shape[0] <= MOST_HEADS and t.shape[0] > 0 and _native.cuda_built():
        return kernels.scale_by_gate(t, gate_weight, gate_bias, columns)
    return scaled_rows(t, gate_of(t, gate_weight, gate_bias), columns)


def _tf32(x: Tensor) -> bool:
    return precision(x.dtype) == "tf32"
