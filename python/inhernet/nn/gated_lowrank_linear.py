"""Low-rank linear layer with several gated heads."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

import inherit_kernels

from .base import LowRankModule, like_dense, take_over, wants_bias
from .lowrank_linear import linear_of


class GatedLowRankLinear(LowRankModule):
    """One shared down projection, `heads` up projections mixed by a softmax gate, per row:

    `t = x·downᵀ`, `g = softmax(t·gate.weightᵀ + gate.bias)`, `y = Σ_h g_h (up_h t + bias_h)`.

    Shapes: x `[..., K]`, `down` `[R, K]`, `up` `[H, N, R]`, `bias` `[H, N]`, `gate.weight` `[H, R]`,
    `gate.bias` `[H]`, y `[..., N]`.

    Args:
        in_features: K.
        out_features: N.
        rank: R, at least 1.
        heads: H, at least 1 (one gated head computes what `LowRankLinear` computes).
        bias: whether every head has a bias.
        device: where the parameters live.
        dtype: float32, bfloat16, float16 or float64.

    Raises:
        ValueError: a size is not a positive integer.

    Source: InherNet (arXiv 2602.09509), gate on the compressed feature.

    Example:
        >>> layer = GatedLowRankLinear.from_linear(nn.Linear(8, 6), rank=4, heads=3)
        >>> layer(torch.randn(2, 5, 8)).shape, layer.gates(torch.randn(2, 5, 8)).shape
        (torch.Size([2, 5, 6]), torch.Size([2, 5, 3]))
    """

    op_name = "gated_lowrank_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        heads: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._register_factors((rank, in_features), out_features, bias, heads, device, dtype)

    @classmethod
    def empty_like(
        cls, linear: nn.Linear, rank: int, heads: int, *, head_bias: str | None = None
    ) -> GatedLowRankLinear:
        """A module of the layer's geometry, device, dtype and flags, its parameters uninitialised."""
        return like_dense(
            cls, linear, wants_bias(linear, head_bias), linear.in_features, linear.out_features, rank, heads
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        heads: int,
        *,
        factors: tuple[Tensor, Tensor] | None = None,
        noise: float = 0.005,
        head_bias: str | None = None,
        generator: torch.Generator | None = None,
    ) -> GatedLowRankLinear:
        """Take over a dense layer: every head the full balanced `up` and the full bias, gate zero.

        Softmax gates sum to one, so the starting function is exactly the best rank-`rank` layer (no 1/H).

        Args:
            linear: the source; left unchanged.
            rank: R, at most `min(N, K)`.
            heads: H.
            factors: `(down [R, K], up [N, R])` to use in place of the exact truncated SVD; balanced before use.
            noise: zero-sum head perturbation relative to `std(up)`; without it heads never separate.
            head_bias: "source" (None): a bias iff the source has one; "always": zeros where it has none.
            generator: source of the perturbation.

        Raises:
            ValueError: rank out of range, factors of another shape, unknown `head_bias`.
        """
        module = cls.empty_like(linear, rank, heads, head_bias=head_bias)
        return take_over(module, linear, factors, noise, generator)

    def gates(self, input: Tensor) -> Tensor:
        """The mixing weights `[..., H]` for an input `[..., K]`: non-negative, summing to one."""
        down, _, weight, bias, _ = cast("tuple[Tensor, ...]", self.weights())
        t = nn.functional.linear(input, down)
        return torch.softmax(nn.functional.linear(t, weight, bias), dim=-1)

    def to_dense(self) -> nn.Linear:
        """The dense layer that computes the same function (ValueError if the gate reads the input)."""
        return linear_of(self)

    def forward(self, input: Tensor) -> Tensor:
        if self.leading == 0:
            return self.densely(input)
        return inherit_kernels.gated_lowrank_linear(input, *self._operands())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"heads={self.heads}, bias={self.bias is not None}"
        )
