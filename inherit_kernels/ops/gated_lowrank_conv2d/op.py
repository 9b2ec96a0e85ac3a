"""`gated_lowrank_conv2d`: a convolution as a narrow convolution and several gated 1×1 convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from inherit_kernels import autograd
from inherit_kernels.common.checks import check_activation, check_conv, check_shape, check_tensors
from inherit_kernels.common.conv import Pair, conv_fake, conv_sizes, normalise_conv, output_size
from inherit_kernels.ops.gated_lowrank_conv2d import impl_native, impl_triton, impl_unfused
from inherit_kernels.ops.gated_lowrank_conv2d.reference import gated_lowrank_conv2d_reference
from inherit_kernels.packing import Packed, call_packed
from inherit_kernels.registry import OpSpec, ReferenceBackend


def gated_lowrank_conv2d(
    x: Tensor,
    down: Tensor | Packed,
    up: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str | None = None,
) -> Tensor:
    """A 2-D convolution with H up projections mixed per sample.

    t = conv2d(x, down; stride, padding, dilation); g = softmax(mean(t)·gate_weightᵀ + gate_bias), the mean over the image;
    y = act(Σ_h g_h (up_h t + bias_h) + residual).

    Args:
        x: `[B, C, Hi, Wi]` or `[C, Hi, Wi]`, any strides; float32, bfloat16, float16 or float64.
        down: `[R, C, kh, kw]`, or the result of `pack("gated_lowrank_conv2d", down, up, gate_weight, gate_bias, bias)` in
            place of all weights.
        up: `[H, N, R]`.
        gate_weight: `[H, R]`.
        gate_bias: `[H]`.
        bias: `[H, N]`, one row a head.
        residual: exactly the shape of y.
        stride, padding, dilation: ints or pairs, in pixels.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        y `[B, N, Ho, Wo]` (or without B), dtype of x; channels-last exactly when the strides of x prefer it.
        The heads merge into one up projection a sample, so no backend allocates H × output.

    Saved for backward: the inputs but the residual, t `[B, R, Ho, Wo]`; y for relu, the pre-activation for the other activations.

    Raises:
        ValueError, TypeError: an argument of the wrong rank, size, dtype or device, named in the message.

    Source: InherNet (arXiv 2602.09509), section 2, the channel decomposition; the gate reads the pooled compressed
        feature, as the authors' code does.

    Example:
        >>> import torch, inherit_kernels as ik
        >>> x, down, up, gate = torch.randn(2, 8, 6, 6), torch.randn(3, 8, 3, 3), torch.randn(4, 5, 3), torch.randn(4, 3)
        >>> ik.gated_lowrank_conv2d(x, down, up, gate, padding=1).shape
        torch.Size([2, 5, 6, 6])
    """
    unbatched = isinstance(x, Tensor) and x.dim() == 3
    given = (x, down, up, gate_weight, gate_bias, bias, residual)
    tensors, options = normalise_conv(given, (stride, padding, dilation, activation))
    if type(down) is Packed:
        y = call_packed(SPEC, tensors[0], down, tensors[-1], options)
    else:
        y = autograd.call(SPEC, (*tensors, *options))
    return y.squeeze(0) if unbatched else y


def check(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
) -> None:
    """Raise the error that names the first argument that does not fit."""
    check_activation(activation)
    check_tensors(
        {"x": x, "down": down, "up": up, "gate_weight": gate_weight},
        {"gate_bias": gate_bias, "bias": bias, "residual": residual},
    )
    check_conv(x, down, stride, padding, dilation)
    check_shape("up", up, ["H", "N", down.shape[0]], f"[H, N, R], R from down's shape {list(down.shape)}")
    heads, outputs, rank = up.shape
    check_shape("gate_weight", gate_weight, [heads, rank], "[H, R] of up")
    check_shape("gate_bias", gate_bias, [heads], "[H], H from up")
    check_shape("bias", bias, [heads, outputs], "[H, N] of up")
    size = output_size(x.shape[2:], down.shape[2:], stride, padding, dilation)
    check_shape("residual", residual, [x.shape[0], outputs, *size], "that of the output")


def fake(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Empty y and t."""
    return conv_fake(x, down, up.shape[1], stride, padding, dilation)


def sizes(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
) -> dict[str, int]:
    """B, C, T, P, N, R, H of a call."""
    return conv_sizes(x, down, up.shape[1], stride, padding, dilation) | {"H": up.shape[0]}


def flops(sizes: dict[str, int]) -> int:
    """2·B·R·(P·(C·T + N) + H·(1 + N)), the heads merged."""
    per_sample = sizes["P"] * (sizes["C"] * sizes["T"] + sizes["N"]) + sizes["H"] * (1 + sizes["N"])
    return 2 * sizes["B"] * sizes["R"] * per_sample


SPEC = autograd.register_op(
    OpSpec(
        name="gated_lowrank_conv2d",
        required=("x", "down", "up", "gate_weight"),
        optional=("gate_bias", "bias", "residual"),
        options="int[] stride, int[] padding, int[] dilation, str? activation",
        reference=gated_lowrank_conv2d_reference,
        check=check,
        fake=fake,
        sizes=sizes,
        flops=flops,
        backends={
            "native": impl_native,
            "unfused": impl_unfused,
            "triton": impl_triton,
            "reference": ReferenceBackend("reference", gated_lowrank_conv2d_reference, fake),
        },
        default_options=((1, 1), (0, 0), (1, 1), None),
        normalise=normalise_conv,
    )
)
