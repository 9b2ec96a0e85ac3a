"""Copies of modules that share their tensors, and parameters that are views of others."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def sharing(model: nn.Module) -> Any:
    """A copy of the modules with the very parameters and buffers of `model`."""
    tensors = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    # Old-style weight_norm, spectral_norm and pruning leave a computed tensor, which torch does not copy.
    made = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*tensors, *made)})


def replaced(model: nn.Module, name: str, module: nn.Module) -> Any:
    """`model` with `module` where `name` was, in place; the name "" is the model itself."""
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model


def linear_of(weight: Tensor, bias: Tensor | None, like: nn.Parameter) -> nn.Linear:
    """A linear layer of a weight `[N, K]` and a bias `[N]` that are views of others; trainable where `like` is."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = view_of(weight, like)
    if bias is not None:
        linear.bias = view_of(bias, like)
    return linear


def view_of(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    with torch.no_grad():
        return nn.Parameter(tensor.detach(), requires_grad=like.requires_grad)


def own_weight(module: nn.Module) -> bool:
    """Whether `weight` is a parameter, not made anew at every call (weight_norm, pruning, a parametrisation)."""
    return isinstance(module._parameters.get("weight"), nn.Parameter)
