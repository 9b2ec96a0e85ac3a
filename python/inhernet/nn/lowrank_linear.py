"""Low-rank linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import inherit_kernels

from .base import LowRankModule, like_dense, take_over, wants_bias


class LowRankLinear(LowRankModule):
    """A linear layer through `rank` features: `y = (x·downᵀ)·upᵀ + bias`.

    Shapes: x `[..., K]`, `down` `[R, K]`, `up` `[N, R]`, `bias` `[N]`, y `[..., N]`. A drop-in replacement for
    `nn.Linear(K, N)` with `R·(K + N)` weights.

    Args:
        in_features: K.
        out_features: N.
        rank: R, at least 1.
        bias: whether to add a bias.
        device: where the parameters live.
        dtype: float32, bfloat16, float16 or float64.

    Raises:
        ValueError: a size is not a positive integer.

    Source: InherNet (arXiv 2602.09509), one head without a gate.

    Example:
        >>> layer = LowRankLinear.from_linear(nn.Linear(8, 6), rank=6)
        >>> layer(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 6])
    """

    op_name = "lowrank_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._register_factors((rank, in_features), out_features, bias, None, device, dtype)

    @classmethod
    def empty_like(cls, linear: nn.Linear, rank: int, *, head_bias: str | None = None) -> LowRankLinear:
        """A module of the layer's geometry, device, dtype and flags, its parameters uninitialised."""
        return like_dense(cls, linear, wants_bias(linear, head_bias), linear.in_features, linear.out_features, rank)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        *,
        factors: tuple[Tensor, Tensor] | None = None,
        head_bias: str | None = None,
    ) -> LowRankLinear:
        """Take over a dense layer: its best rank-`rank` pair, balanced, and its bias.

        Args:
            linear: the source; left unchanged.
            rank: R, at most `min(N, K)`.
            factors: `(down [R, K], up [N, R])` to use in place of the exact truncated SVD; balanced before use.
            head_bias: "source" (None): a bias iff the source has one; "always": zeros where it has none.

        Raises:
            ValueError: rank out of range, factors of another shape, unknown `head_bias`.
        """
        return take_over(cls.empty_like(linear, rank, head_bias=head_bias), linear, factors)

    def to_dense(self) -> nn.Linear:
        """The dense layer that computes the same function."""
        return linear_of(self)

    def forward(self, input: Tensor) -> Tensor:
        if self.leading == 0:
            return self.densely(input)
        return inherit_kernels.lowrank_linear(input, *self._operands())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


@torch.no_grad()
def linear_of(module: Any) -> nn.Linear:
    """`nn.Linear` equal to a plain module, or to a gated one with a frozen gate (ValueError otherwise)."""
    weight, bias = module.dense_weight()
    make = {"device": weight.device, "dtype": weight.dtype}
    dense = nn.utils.skip_init(nn.Linear, module.in_features, module.out_features, bias is not None, **make)
    return put_dense(dense, module, weight, bias)


def put_dense(dense: Any, module: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """Copy weight and bias into a fresh dense layer and give it the module's flags."""
    dense.weight.copy_(weight.view_as(dense.weight))
    dense.requires_grad_(module.up.requires_grad)
    if bias is not None:
        dense.bias.copy_(bias).requires_grad_(module.bias.requires_grad)
    return dense.train(module.training)
