"""From a dense layer to a low-rank module, whatever its kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import LowRankModule, take_over
from .factors import published_factors
from .gated_lowrank_conv2d import GatedLowRankConv2d
from .gated_lowrank_linear import GatedLowRankLinear
from .lowrank_conv2d import LowRankConv2d
from .lowrank_linear import LowRankLinear


def from_dense(
    layer: nn.Module,
    rank: int,
    *,
    heads: int = 1,
    gate: bool | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    noise: float = 0.005,
    head_bias: str | None = None,
    generator: torch.Generator | None = None,
) -> LowRankModule:
    """Replace a dense layer by a low-rank one that starts as the given (or the best) rank-`rank` layer, exactly.

    Factors are balanced (each rank direction's `down` row and `up` column have equal norm), every head gets the full
    `up` and the full bias plus zero-sum noise, the gate is zero. A layer on the meta device gives a module on meta.

    Args:
        layer: `nn.Linear` or `nn.Conv2d`, left unchanged; device, dtype, training flag and `requires_grad` carry over.
        rank: R, at most `min(N, K)`.
        heads: H; several heads need a gate.
        gate: whether to mix by a gate; None means iff `heads > 1`. True with one head stores a gate without effect.
        factors: `(down [R, K], up [N, R])`, K = C·kh·kw for a convolution; None takes the exact truncated SVD.
        noise: zero-sum head perturbation relative to `std(up)`.
        head_bias: "source" (None): a bias iff the source has one; "always": zeros where it has none.
        generator: source of the perturbation.

    Raises:
        TypeError: the layer is neither linear nor 2-D convolution, or its weight is not floating point.
        ValueError: rank out of range, grouped or not zero-padded convolution, heads without a gate, bad factors.

    Example:
        >>> from_dense(nn.Linear(8, 6), 4, heads=3)
        GatedLowRankLinear(
          in_features=8, out_features=6, rank=4, heads=3, bias=True
          (gate): Gate(rank=4, heads=3)
        )
    """
    module = empty_like_dense(layer, rank, heads=heads, gate=gate, head_bias=head_bias)
    return take_over(module, layer, factors, noise, generator)


def empty_like_dense(
    layer: nn.Module, rank: int, *, heads: int = 1, gate: bool | None = None, head_bias: str | None = None
) -> LowRankModule:
    """The module `from_dense` would return, with uninitialised parameters (for loading, or a filling of one's own).

    Arguments and errors are those of `from_dense`; a meta layer gives a meta module.
    """
    source: Any = layer
    kind, gated = _kind(source), _gated(heads, gate)
    if gated:
        gated_class: Any = GatedLowRankLinear if kind == "linear" else GatedLowRankConv2d
        return gated_class.empty_like(source, rank, heads, head_bias=head_bias)
    plain_class: Any = LowRankLinear if kind == "linear" else LowRankConv2d
    return plain_class.empty_like(source, rank, head_bias=head_bias)


@torch.no_grad()
def fill_published_(module: LowRankModule, layer: nn.Module, generator: torch.Generator | None = None) -> LowRankModule:
    """Fill with the scaling of the InherNet authors' demo, for comparison only.

    `down = V_rᵀ`, `up_h = U_r S_r / H`, `bias_h = b / H`, the gate as torch initialises a linear layer. Softmax gates
    sum to one, so the layer starts as `(W_r x + b) / H`: H times too small.

    Args:
        module: made by `empty_like_dense(layer, …)`.
        layer: the dense source.
        generator: source of the gate's numbers.
    """
    source: Any = layer
    down, up = published_factors(source.weight, module.rank)
    bias = None if source.bias is None else source.bias / module.heads
    module.fill_(down, up / module.heads, bias)
    if module.gated:
        bound = module.rank**-0.5
        for parameter in (module.gate.weight, module.gate.bias):
            device = parameter.device if generator is None else generator.device
            draw = torch.rand(parameter.shape, generator=generator, device=device)
            parameter.copy_((draw * 2 - 1) * bound)
    return module


def _kind(layer: Any) -> str:
    kind = "linear" if isinstance(layer, nn.Linear) else "conv2d" if isinstance(layer, nn.Conv2d) else None
    if kind is None:
        raise TypeError(f"layer is {type(layer).__name__}, expected nn.Linear or nn.Conv2d")
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        raise TypeError(
            f"layer.weight is a {type(layer.weight).__name__} that is made at every call (weight_norm, spectral_norm, "
            "pruning, a parametrisation), expected an nn.Parameter; remove that first (torch.nn.utils.remove_weight_norm, "
            "remove_spectral_norm, prune.remove, parametrize.remove_parametrizations)"
        )
    if not layer.weight.is_floating_point():
        raise TypeError(f"layer.weight has dtype {layer.weight.dtype}, expected a floating dtype")
    return kind


def _gated(heads: int, gate: bool | None) -> bool:
    if gate is False and heads > 1:
        raise ValueError(f"heads is {heads} and gate is False: several heads need a gate to mix them; use heads=1")
    return heads > 1 if gate is None else gate
