"""`nn.TransformerEncoder` and its layers: their fast paths read their layers' weights, past whatever replaces them."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def opens(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoder):
        return bool(getattr(module, "use_nested_tensor", False))
    return isinstance(module, nn.TransformerEncoderLayer) and module.activation_relu_or_gelu != 0


def opened(module: Any) -> nn.Module:
    """The same module on its ordinary path, in evaluation as in training: torch takes the fast one of a layer for relu and
    gelu, by a number; that of the encoder, on nested tensors, by a flag."""
    result = copy.copy(module)
    result._modules = dict(module._modules)
    if isinstance(result, nn.TransformerEncoder):
        result.use_nested_tensor = False
    else:
        result.activation_relu_or_gelu = 0
    return result
