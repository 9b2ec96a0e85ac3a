"""`gated_lowrank_linear`: a linear layer as one down projection and several gated up projections."""

from __future__ import annotations

import math

from torch import Tensor

from inherit_kernels import autograd
from inherit_kernels.common.checks import check_activation, check_rank, check_shape, check_tensors
from inherit_kernels.ops.gated_lowrank_linear import impl_blas, impl_native, impl_triton, impl_unfused
from inherit_kernels.ops.gated_lowrank_linear.reference import gated_lowrank_linear_reference
from inherit_kernels.packing import Packed, call_packed
from inherit_kernels.registry import OpSpec, ReferenceBackend


def gated_lowrank_linear(
    x: Tensor,
    down: Tensor | Packed,
    up: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """A linear layer with H up projections mixed per row.

    t = x·downᵀ; g = softmax(t·gate_weightᵀ + gate_bias); y = act(Σ_h g_h (up_h t + bias_h) + residual).

    Args:
        x: `[..., K]`, at least one dimension, any strides; float32, bfloat16 or float16 (float64 without native kernels).
        down: `[R, K]`, or the result of `pack("gated_lowrank_linear", down, up, gate_weight, gate_bias, bias)` in place of
            all weights.
        up: `[H, N, R]`.
        gate_weight: `[H, R]`.
        gate_bias: `[H]`.
        bias: `[H, N]`, one row a head.
        residual: `[..., N]`, exactly the shape of y.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        y `[..., N]`, contiguous, dtype of x. Accumulation and softmax are in float32. No backend allocates H × output.

    Saved for backward: the inputs but the residual, t `[..., R]`; y for relu, the pre-activation for the others.

    Raises:
        ValueError, TypeError: an argument of the wrong rank, size, dtype or device, named in the message.

    Source: InherNet (arXiv 2602.09509), section 2; the gate reads the compressed feature t, as the authors' code does.

    Example:
        >>> import torch, inherit_kernels as ik
        >>> x, down, up, gate = torch.randn(2, 8), torch.randn(3, 8), torch.randn(4, 5, 3), torch.randn(4, 3)
        >>> ik.gated_lowrank_linear(x, down, up, gate).shape
        torch.Size([2, 5])
    """
    if type(down) is Packed:
        return call_packed(SPEC, x, down, residual, (activation,))
    return autograd.call(SPEC, (x, down, up, gate_weight, gate_bias, bias, residual, activation))


def check(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> None:
    """Raise the error that names the first argument that does not fit."""
    check_activation(activation)
    check_tensors(
        {"x": x, "down": down, "up": up, "gate_weight": gate_weight},
        {"gate_bias": gate_bias, "bias": bias, "residual": residual},
    )
    check_rank("x", x, 1)
    check_rank("down", down, 2, 2)
    check_shape("down", down, ["R", x.shape[-1]], f"[R, K], K from x's shape {list(x.shape)}")
    check_shape("up", up, ["H", "N", down.shape[0]], f"[H, N, R], R from down's shape {list(down.shape)}")
    heads, outputs, rank = up.shape
    check_shape("gate_weight", gate_weight, [heads, rank], "[H, R] of up")
    check_shape("gate_bias", gate_bias, [heads], "[H], H from up")
    check_shape("bias", bias, [heads, outputs], "[H, N] of up")
    check_shape("residual", residual, [*x.shape[:-1], outputs], "that of the output")


def fake(x: Tensor, down: Tensor, up: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Empty y and t."""
    return x.new_empty(*x.shape[:-1], up.shape[1]), x.new_empty(*x.shape[:-1], down.shape[0])


def sizes(x: Tensor, down: Tensor, up: Tensor, *_: object) -> dict[str, int]:
    """M, K, N, R, H of a call."""
    return {"M": math.prod(x.shape[:-1]), "K": x.shape[-1], "N": up.shape[1], "R": down.shape[0], "H": up.shape[0]}


def flops(sizes: dict[str, int]) -> int:
    """2·M·R·(K + H + H·N), the heads merged."""
    return 2 * sizes["M"] * sizes["R"] * (sizes["K"] + sizes["H"] * (1 + sizes["N"]))


SPEC = autograd.register_op(
    OpSpec(
        name="gated_lowrank_linear",
        required=("x", "down", "up", "gate_weight"),
        optional=("gate_bias", "bias", "residual"),
        options="str? activation",
        reference=gated_lowrank_linear_reference,
        check=check,
        fake=fake,
        sizes=sizes,
        flops=flops,
        backends={
            "unfused": impl_unfused,
            "blas": impl_blas,
            "triton": impl_triton,
            "native": impl_native,
            "reference": ReferenceBackend("reference", gated_lowrank_linear_reference, fake),
        },
        default_options=(None,),
    )
)
