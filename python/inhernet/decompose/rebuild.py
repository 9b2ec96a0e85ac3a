"""The architecture of an inherited model: a dense one with the layers of a plan swapped for empty low-rank modules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..layers import open_layers, replaced
from ..nn import empty_like_dense
from .layers import LayerPlan


def with_empty_layers(model: nn.Module, layers: Iterable[LayerPlan]) -> nn.Module:
    """`model` with a low-rank module of uninitialised factors (on meta where the layer is) for each factorised layer.

    Raises:
        ValueError: a layer does not fit the architecture (it is named).
    """
    chosen = [layer for layer in layers if layer.reason is None]
    model = open_layers(model, [layer.name for layer in chosen])
    for layer in chosen:
        try:
            dense = model.get_submodule(layer.name)
            module = empty_like_dense(dense, layer.rank or 1, **layer.form)
            model = replaced(model, layer.name, module)
        except (AttributeError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"layer {layer.name!r} does not fit the architecture: {error}") from error
    return model
