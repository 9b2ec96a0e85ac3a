"""What a network does on an example, for networks that torch.fx cannot trace: who calls what, who consumes what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .sites import Site, foldable, has_hooks, is_layer, is_linear


class _Consumers(TorchDispatchMode):
    """Counts the operators that take a tensor on one of the watched storages, outside the module it is meant for."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, str] = {}
        self.foreign: Counter[str] = Counter()
        self.inside: str | None = None  # the layer whose BatchNorm runs just now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place in places((args, kwargs)):
            layer = self.watched.get(place)
            if layer is not None and layer != self.inside:
                self.foreign[layer] += 1
        return func(*args, **kwargs)


def places(values: Any) -> set[int]:
    """The storages of all tensors inside."""
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def observe(model: nn.Module, call: Callable[[], Any]) -> tuple[list[Site], dict[str, Tensor]]:
    """Run the model once; the sites of its layers, and the input of each.

    A BatchNorm belongs to a layer only if its input is the very tensor that the layer returned, no operator but the
    BatchNorm's touches that memory (through views and in-place writes too), the model does not return it, and both
    modules run once and have no hooks. Outputs are held until the end, so that no storage is taken for another.

    Args:
        model: in eval mode; hooks are added for the run.
        call: runs it.
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    hooked = {module for module in names if has_hooks(module)}
    calls: Counter[nn.Module] = Counter()
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    pairs: dict[str, str] = {}
    consumers = _Consumers()
    by_output: dict[int, str] = {}

    def before(module: nn.Module, args: Any) -> None:
        calls[module] += 1
        if is_layer(module) and len(args) == 1 and isinstance(args[0], Tensor):
            inputs.setdefault(names[module], args[0])
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and len(args) == 1:
            layer = by_output.get(id(args[0]))
            if layer is not None and layer not in pairs:
                pairs[layer] = names[module]
                consumers.inside = layer

    def after(module: nn.Module, args: Any, output: Any) -> None:
        consumers.inside = None
        if is_layer(module) and isinstance(output, Tensor):
            name = names[module]
            outputs[name] = output
            by_output[id(output)] = name
            consumers.watched[output.untyped_storage()._cdata] = name

    handles = [module.register_forward_pre_hook(before) for module in names]
    handles += [module.register_forward_hook(after) for module in names]
    try:
        with torch.no_grad(), consumers:
            returned = places(call())
    finally:
        for handle in handles:
            handle.remove()

    def kept(layer: str, norm: str) -> bool:
        modules = model.get_submodule(layer), model.get_submodule(norm)
        once = all(calls[module] == 1 for module in modules)
        unseen = not consumers.foreign[layer] and outputs[layer].untyped_storage()._cdata not in returned
        flat = not is_linear(modules[0]) or outputs[layer].dim() == 2
        return once and unseen and flat and foldable(*modules)

    norms = {layer: norm for layer, norm in pairs.items() if kept(layer, norm)}
    layers = [name for name in inputs if model.get_submodule(name) not in hooked]
    return [Site(name, norms.get(name)) for name in layers], inputs
