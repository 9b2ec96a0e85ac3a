"""Low-rank 2-D convolution with several gated heads."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

import inherit_kernels

from .base import LowRankModule, like_dense, take_over, wants_bias
from .lowrank_conv2d import conv2d_of, describe, geometry_of, pad_input, set_geometry


class GatedLowRankConv2d(LowRankModule):
    """One shared down convolution, `heads` 1×1 up convolutions mixed by a softmax gate, per sample:

    `t = conv2d(x, down)`, `s = mean of t over positions`, `g = softmax(s·gate.weightᵀ + gate.bias)`,
    `y = Σ_h g_h (up_h t + bias_h)`.

    Shapes: x `[B, C, Hi, Wi]` or `[C, Hi, Wi]`, `down` `[R, C, kh, kw]`, `up` `[H, N, R]`, `bias` `[H, N]`,
    `gate.weight` `[H, R]`, `gate.bias` `[H]`, y `[B, N, Ho, Wo]`.

    Args:
        in_channels: C.
        out_channels: N.
        kernel_size: int or pair.
        rank: R, at least 1.
        heads: H, at least 1 (one gated head computes what `LowRankConv2d` computes).
        stride: int or pair.
        padding: int, pair, "same" (stride 1 only; asymmetric for even kernels as in torch) or "valid".
        dilation: int or pair.
        bias: whether every head has a bias.
        device: where the parameters live.
        dtype: float32, bfloat16, float16 or float64.

    Raises:
        ValueError: a size, stride, padding or dilation that no convolution can have.

    Source: InherNet (arXiv 2602.09509), gate on the pooled compressed feature.

    Example:
        >>> layer = GatedLowRankConv2d.from_conv2d(nn.Conv2d(3, 8, 3, padding=1), rank=4, heads=3)
        >>> layer(torch.randn(2, 3, 9, 9)).shape, layer.gates(torch.randn(2, 3, 9, 9)).shape
        (torch.Size([2, 8, 9, 9]), torch.Size([2, 3]))
    """

    kernel_size: tuple[int, int]
    _window: dict[str, Any]
    op_name = "gated_lowrank_conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        heads: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        set_geometry(self, in_channels, out_channels, kernel_size, stride, padding, dilation)
        self._register_factors((rank, in_channels, *self.kernel_size), out_channels, bias, heads, device, dtype)

    @classmethod
    def empty_like(cls, conv: nn.Conv2d, rank: int, heads: int, *, head_bias: str | None = None) -> GatedLowRankConv2d:
        """A module of the layer's geometry, device, dtype and flags, its parameters uninitialised."""
        return like_dense(cls, conv, wants_bias(conv, head_bias), rank=rank, heads=heads, **geometry_of(conv))

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        rank: int,
        heads: int,
        *,
        factors: tuple[Tensor, Tensor] | None = None,
        noise: float = 0.005,
        head_bias: str | None = None,
        generator: torch.Generator | None = None,
    ) -> GatedLowRankConv2d:
        """Take over a dense convolution: every head the full balanced `up` and the full bias, gate zero.

        Softmax gates sum to one, so the starting function is exactly the best rank-`rank` layer (no 1/H).

        Args:
            conv: the source; left unchanged.
            rank: R, at most `min(N, C·kh·kw)`.
            heads: H.
            factors: `(down [R, C·kh·kw], up [N, R])` to use in place of the exact truncated SVD; balanced before use.
            noise: zero-sum head perturbation relative to `std(up)`; without it heads never separate.
            head_bias: "source" (None): a bias iff the source has one; "always": zeros where it has none.
            generator: source of the perturbation.

        Raises:
            ValueError: grouped convolution or padding other than zeros (keep such a layer dense), rank out of range,
                factors of another shape, unknown `head_bias`.
        """
        module = cls.empty_like(conv, rank, heads, head_bias=head_bias)
        return take_over(module, conv, factors, noise, generator)

    def gates(self, input: Tensor) -> Tensor:
        """The mixing weights `[B, H]` (`[H]` unbatched) for an input: non-negative, summing to one."""
        down, _, weight, bias, _ = cast("tuple[Tensor, ...]", self.weights())
        t = nn.functional.conv2d(pad_input(self, input), down, **self._window)
        return torch.softmax(nn.functional.linear(t.mean((-2, -1)), weight, bias), dim=-1)

    def to_dense(self) -> nn.Conv2d:
        """The dense convolution that computes the same function (ValueError if the gate reads the input)."""
        return conv2d_of(self)

    def forward(self, input: Tensor) -> Tensor:
        if self.leading == 0:
            return self.densely(input)
        return inherit_kernels.gated_lowrank_conv2d(pad_input(self, input), *self._operands(), **self._window)

    def extra_repr(self) -> str:
        return describe(self)
