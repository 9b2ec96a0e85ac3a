"""Low-rank 2-D convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import inherit_kernels

from .base import LowRankModule, like_dense, take_over, wants_bias
from .lowrank_linear import put_dense


class LowRankConv2d(LowRankModule):
    """A convolution through `rank` channels: `t = conv2d(x, down)`, `y = up·t + bias` at every position.

    Shapes: x `[B, C, Hi, Wi]` or `[C, Hi, Wi]`, `down` `[R, C, kh, kw]`, `up` `[N, R]`, `bias` `[N]`,
    y `[B, N, Ho, Wo]`. A drop-in replacement for an ungrouped, zero-padded `nn.Conv2d`; stride, padding and dilation
    belong to the down convolution.

    Args:
        in_channels: C.
        out_channels: N.
        kernel_size: int or pair.
        rank: R, at least 1.
        stride: int or pair.
        padding: int, pair, "same" (stride 1 only; asymmetric for even kernels as in torch) or "valid".
        dilation: int or pair.
        bias: whether to add a bias.
        device: where the parameters live.
        dtype: float32, bfloat16, float16 or float64.

    Raises:
        ValueError: a size, stride, padding or dilation that no convolution can have.

    Source: InherNet (arXiv 2602.09509), channel decomposition, one head without a gate.

    Example:
        >>> layer = LowRankConv2d.from_conv2d(nn.Conv2d(3, 8, 3, padding=1), rank=4)
        >>> layer(torch.randn(2, 3, 9, 9)).shape
        torch.Size([2, 8, 9, 9])
    """

    kernel_size: tuple[int, int]
    _window: dict[str, Any]
    op_name = "lowrank_conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        set_geometry(self, in_channels, out_channels, kernel_size, stride, padding, dilation)
        self._register_factors((rank, in_channels, *self.kernel_size), out_channels, bias, None, device, dtype)

    @classmethod
    def empty_like(cls, conv: nn.Conv2d, rank: int, *, head_bias: str | None = None) -> LowRankConv2d:
        """A module of the layer's geometry, device, dtype and flags, its parameters uninitialised."""
        return like_dense(cls, conv, wants_bias(conv, head_bias), rank=rank, **geometry_of(conv))

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        rank: int,
        *,
        factors: tuple[Tensor, Tensor] | None = None,
        head_bias: str | None = None,
    ) -> LowRankConv2d:
        """Take over a dense convolution: the best rank-`rank` pair of its `[N, C·kh·kw]` matrix, and its bias.

        Args:
            conv: the source; left unchanged.
            rank: R, at most `min(N, C·kh·kw)`.
            factors: `(down [R, C·kh·kw], up [N, R])` to use in place of the exact truncated SVD; balanced before use.
            head_bias: "source" (None): a bias iff the source has one; "always": zeros where it has none.

        Raises:
            ValueError: grouped convolution or padding other than zeros (keep such a layer dense), rank out of range,
                factors of another shape, unknown `head_bias`.
        """
        return take_over(cls.empty_like(conv, rank, head_bias=head_bias), conv, factors)

    def to_dense(self) -> nn.Conv2d:
        """The dense convolution that computes the same function."""
        return conv2d_of(self)

    def forward(self, input: Tensor) -> Tensor:
        if self.leading == 0:
            return self.densely(input)
        return inherit_kernels.lowrank_conv2d(pad_input(self, input), *self._operands(), **self._window)

    def extra_repr(self) -> str:
        return describe(self)


def set_geometry(
    module: Any, in_channels: int, out_channels: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> None:
    """Check and store the dense layer's arguments, and resolve the padding into what the op takes.

    `module._pad` is an `F.pad` tuple for asymmetric "same" padding, else None; `module._window` the op's keywords.
    """
    module.in_channels, module.out_channels = in_channels, out_channels
    module.kernel_size = _pair("kernel_size", kernel_size, 1)
    module.stride = _pair("stride", stride, 1)
    module.dilation = _pair("dilation", dilation, 1)
    module._pad = None
    if padding == "same":
        if module.stride != (1, 1):
            raise ValueError(f'padding is "same" and stride is {module.stride}: "same" needs stride 1')
        module.padding = "same"
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        before = [t // 2 for t in total]
        after = [t - b for t, b in zip(total, before, strict=True)]
        if before == after:
            resolved = tuple(before)
        else:
            resolved, module._pad = (0, 0), (before[1], after[1], before[0], after[0])
    elif padding == "valid":
        module.padding, resolved = "valid", (0, 0)
    elif isinstance(padding, str):
        raise ValueError(f'padding is {padding!r}, expected an integer, a pair, "same" or "valid"')
    else:
        module.padding = resolved = _pair("padding", padding, 0)
    module._window = {"stride": module.stride, "padding": resolved, "dilation": module.dilation}


def geometry_of(conv: nn.Conv2d) -> dict[str, Any]:
    """Constructor arguments taken from a dense convolution; refuses what the pair cannot express."""
    if conv.groups != 1:
        raise ValueError(f"groups is {conv.groups}, expected 1: a grouped or depthwise convolution stays dense")
    if conv.padding_mode != "zeros":
        raise ValueError(f'padding_mode is {conv.padding_mode!r}, expected "zeros": such a convolution stays dense')
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {name: getattr(conv, name) for name in names}


def pad_input(module: Any, input: Tensor) -> Tensor:
    """Apply the asymmetric part of "same" padding, which no symmetric op argument can express."""
    return input if module._pad is None else nn.functional.pad(input, module._pad)


@torch.no_grad()
def conv2d_of(module: Any) -> nn.Conv2d:
    """`nn.Conv2d` equal to a plain module, or to a gated one with a frozen gate (ValueError otherwise)."""
    weight, bias = module.dense_weight()
    dense = nn.utils.skip_init(
        nn.Conv2d,
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    return put_dense(dense, module, weight, bias)


def describe(module: Any) -> str:
    """One line in the manner of `nn.Conv2d`, with rank and heads."""
    text = f"{module.in_channels}, {module.out_channels}, kernel_size={module.kernel_size}, rank={module.rank}"
    if module.gated:
        text += f", heads={module.heads}"
    text += f", stride={module.stride}"
    if module.padding != (0, 0):
        text += f", padding={module.padding}"
    if module.dilation != (1, 1):
        text += f", dilation={module.dilation}"
    return text if module.bias is not None else text + ", bias=False"


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    good = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not good or any(isinstance(v, bool) or not isinstance(v, int) or v < least for v in pair):
        raise ValueError(f"{name} is {value!r}, expected an integer or a pair of integers of at least {least}")
    return tuple(pair)
