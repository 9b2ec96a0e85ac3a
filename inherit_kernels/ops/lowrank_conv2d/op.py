"""`lowrank_conv2d`: a convolution as a narrow convolution and a 1×1 convolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from inherit_kernels import autograd
from inherit_kernels.common.checks import check_activation, check_conv, check_shape, check_tensors
from inherit_kernels.common.conv import Pair, conv_fake, conv_sizes, normalise_conv, output_size
from inherit_kernels.ops.lowrank_conv2d import impl_blas, impl_native, impl_triton, impl_unfused
from inherit_kernels.ops.lowrank_conv2d.reference import lowrank_conv2d_reference
from inherit_kernels.packing import Packed, call_packed
from inherit_kernels.registry import OpSpec, ReferenceBackend


def lowrank_conv2d(
    x: Tensor,
    down: Tensor | Packed,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str | None = None,
) -> Tensor:
    """A 2-D convolution in factored form.

    t = conv2d(x, down; stride, padding, dilation); y = act(1×1 convolution of t by up + bias + residual).

    Args:
        x: `[B, C, Hi, Wi]` or `[C, Hi, Wi]`, any strides; float32, bfloat16, float16 or float64.
        down: `[R, C, kh, kw]`, or the result of `pack("lowrank_conv2d", down, up, bias)` in place of all weights.
        up: `[N, R]`.
        bias: `[N]`.
        residual: exactly the shape of y.
        stride, padding, dilation: ints or pairs, in pixels.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        y `[B, N, Ho, Wo]` (or without B), dtype of x; channels-last exactly when the strides of x prefer it.

    Saved for backward: x, down, up, t `[B, R, Ho, Wo]`; y for relu, the pre-activation for the other activations.

    Raises:
        ValueError, TypeError: an argument of the wrong rank, size, dtype or device, named in the message.

    Source: InherNet (arXiv 2602.09509), section 2, the channel decomposition of a convolution, with one head.

    Example:
        >>> import torch, inherit_kernels as ik
        >>> ik.lowrank_conv2d(torch.randn(2, 8, 6, 6), torch.randn(3, 8, 3, 3), torch.randn(5, 3), padding=1).shape
        torch.Size([2, 5, 6, 6])
    """
    unbatched = isinstance(x, Tensor) and x.dim() == 3
    tensors, options = normalise_conv((x, down, up, bias, residual), (stride, padding, dilation, activation))
    if type(down) is Packed:
        y = call_packed(SPEC, tensors[0], down, tensors[-1], options)
    else:
        y = autograd.call(SPEC, (*tensors, *options))
    return y.squeeze(0) if unbatched else y


def check(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
) -> None:
    """Raise the error that names the first argument that does not fit."""
    check_activation(activation)
    check_tensors({"x": x, "down": down, "up": up}, {"bias": bias, "residual": residual})
    check_conv(x, down, stride, padding, dilation)
    check_shape("up", up, ["N", down.shape[0]], f"[N, R], R from down's shape {list(down.shape)}")
    check_shape("bias", bias, [up.shape[0]], "[N], N from up")
    size = output_size(x.shape[2:], down.shape[2:], stride, padding, dilation)
    check_shape("residual", residual, [x.shape[0], up.shape[0], *size], "that of the output")


def fake(
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
    """Empty y and t."""
    return conv_fake(x, down, up.shape[0], stride, padding, dilation)


def sizes(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
) -> dict[str, int]:
    """B, C, T, P, N, R of a call."""
    return conv_sizes(x, down, up.shape[0], stride, padding, dilation)


def flops(sizes: dict[str, int]) -> int:
    """2·B·P·R·(C·T + N)."""
    return 2 * sizes["B"] * sizes["P"] * sizes["R"] * (sizes["C"] * sizes["T"] + sizes["N"])


SPEC = autograd.register_op(
    OpSpec(
        name="lowrank_conv2d",
        required=("x", "down", "up"),
        optional=("bias", "residual"),
        options="int[] stride, int[] padding, int[] dilation, str? activation",
        reference=lowrank_conv2d_reference,
        check=check,
        fake=fake,
        sizes=sizes,
        flops=flops,
        backends={
            "native": impl_native,
            "unfused": impl_unfused,
            "blas": impl_blas,
            "triton": impl_triton,
            "reference": ReferenceBackend("reference", lowrank_conv2d_reference, fake),
        },
        default_options=((1, 1), (0, 0), (1, 1), None),
        normalise=normalise_conv,
    )
)
