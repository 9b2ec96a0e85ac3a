"""Where a network can be rewritten: a layer and what directly follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..nn import LowRankModule

#: Exact types only: a subclass may compute something else.
DENSE = (nn.Linear, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Site:
    """`act(batchnorm(layer(x)) + residual)`; everything but the layer may be missing.

    Attributes:
        name: the layer's name in the model.
        batchnorm: the name of the BatchNorm to fold, or None.
        residual: whether a tensor is added.
        activation: None, "relu", "gelu", "gelu_tanh" or "silu".
    """

    name: str
    batchnorm: str | None = None
    residual: bool = False
    activation: str | None = None


def is_layer(module: nn.Module) -> bool:
    """Whether the module is a layer that can be rewritten: low-rank, or a plain dense linear layer or convolution."""
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return False
    return isinstance(module, LowRankModule) or type(module) in DENSE


def is_linear(layer: Any) -> bool:
    """Whether the layer's outputs lie in the last dimension (else in the channels of an image)."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, LowRankModule) and layer.down.dim() == 2)


def out_features(layer: Any) -> int:
    """The number of outputs, or of output channels."""
    return layer.up.shape[-2] if isinstance(layer, LowRankModule) else layer.weight.shape[0]


def foldable(layer: nn.Module, norm: Any) -> bool:
    """Whether `norm`, applied to the layer's output, is an affine map of the layer's output channels in eval mode.

    BatchNorm1d also takes `[B, C, L]`, and then normalises dimension 1, not a linear layer's outputs: that the output
    has two dimensions is for the caller to see.
    """
    if type(norm) not in NORMS or norm.training or norm.running_mean is None or has_hooks(layer) or has_hooks(norm):
        return False
    return (type(norm) is nn.BatchNorm1d) == is_linear(layer) and norm.num_features == out_features(layer)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody else watches or changes what goes in or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
