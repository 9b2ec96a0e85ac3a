"""`lowrank_linear`: a linear layer as two factors."""

from __future__ import annotations

import math

from torch import Tensor

from inherit_kernels import autograd
from inherit_kernels.common.checks import check_activation, check_rank, check_shape, check_tensors
from inherit_kernels.ops.lowrank_linear import impl_blas, impl_native, impl_triton, impl_unfused
from inherit_kernels.ops.lowrank_linear.reference import lowrank_linear_reference
from inherit_kernels.packing import Packed, call_packed
from inherit_kernels.registry import OpSpec, ReferenceBackend


def lowrank_linear(
    x: Tensor,
    down: Tensor | Packed,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """A linear layer in factored form: t = x·downᵀ; y = act(t·upᵀ + bias + residual).

    Args:
        x: `[..., K]`, at least one dimension, any strides; float32, bfloat16 or float16 (float64 without native kernels).
        down: `[R, K]`, or the result of `pack("lowrank_linear", down, up, bias)` in place of `down`, `up` and `bias`.
        up: `[N, R]`.
        bias: `[N]`.
        residual: `[..., N]`, exactly the shape of y.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        y `[..., N]`, contiguous, dtype of x. Accumulation is in float32.

    Saved for backward: x, down, up, t `[..., R]`; y for relu, the pre-activation for the other activations.

    Raises:
        ValueError, TypeError: an argument of the wrong rank, size, dtype or device, named in the message.

    Source: InherNet (arXiv 2602.09509), section 2, with one head.

    Example:
        >>> import torch, inherit_kernels as ik
        >>> ik.lowrank_linear(torch.randn(2, 8), torch.randn(3, 8), torch.randn(5, 3), activation="relu").shape
        torch.Size([2, 5])
    """
    if type(down) is Packed:
        return call_packed(SPEC, x, down, residual, (activation,))
    return autograd.call(SPEC, (x, down, up, bias, residual, activation))


def check(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> None:
    """Raise the error that names the first argument that does not fit."""
    check_activation(activation)
    check_tensors({"x": x, "down": down, "up": up}, {"bias": bias, "residual": residual})
    check_rank("x", x, 1)
    check_rank("down", down, 2, 2)
    check_shape("down", down, ["R", x.shape[-1]], f"[R, K], K from x's shape {list(x.shape)}")
    check_shape("up", up, ["N", down.shape[0]], f"[N, R], R from down's shape {list(down.shape)}")
    check_shape("bias", bias, [up.shape[0]], "[N], N from up")
    check_shape("residual", residual, [*x.shape[:-1], up.shape[0]], "that of the output")


def fake(x: Tensor, down: Tensor, up: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Empty y and t."""
    return x.new_empty(*x.shape[:-1], up.shape[0]), x.new_empty(*x.shape[:-1], down.shape[0])


def sizes(x: Tensor, down: Tensor, up: Tensor, *_: object) -> dict[str, int]:
    """M, K, N, R of a call."""
    return {"M": math.prod(x.shape[:-1]), "K": x.shape[-1], "N": up.shape[0], "R": down.shape[0]}


def flops(sizes: dict[str, int]) -> int:
    """2·M·R·(K + N)."""
    return 2 * sizes["M"] * sizes["R"] * (sizes["K"] + sizes["N"])


SPEC = autograd.register_op(
    OpSpec(
        name="lowrank_linear",
        required=("x", "down", "up"),
        optional=("bias", "residual"),
        options="str? activation",
        reference=lowrank_linear_reference,
        check=check,
        fake=fake,
        sizes=sizes,
        flops=flops,
        backends={
            "unfused": impl_unfused,
            "blas": impl_blas,
            "triton": impl_triton,
            "native": impl_native,
            "reference": ReferenceBackend("reference", lowrank_linear_reference, fake),
        },
        default_options=(None,),
    )
)
