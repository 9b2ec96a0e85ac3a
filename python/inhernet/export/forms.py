"""The forms of a layer: equal functions, one of which is the fastest for given inputs on a given machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inherit_kernels

from ..nn import LowRankModule
from .sites import Site, is_linear

#: dense: one layer with the merged weight. unfused: two torch calls. fused: our kernel on plain weights (on a GPU the one
#: that the op chooses). packed: on panels. blas: two products of NVIDIA's libraries. triton: the Triton kernels.
FORMS = ("dense", "unfused", "fused", "packed", "blas", "triton")
_BACKENDS = {"unfused": "unfused", "fused": "native", "packed": "native", "blas": "blas", "triton": "triton"}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "silu": lambda y: F.silu(y, inplace=True),
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


@dataclass(frozen=True)
class Form:
    """One way of computing a site: `run(x)`, or `run(x, residual)`; `tensors` are what it holds."""

    name: str
    run: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def extra_bytes(self, canonical: set[int]) -> int:
        """Bytes beside the storages in `canonical`."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(size for place, size in storages.items() if place not in canonical)


@torch.no_grad()
def form_of(name: str, site: Site, model: nn.Module, channels_last: bool = False) -> Form:
    """Build one form of a site.

    Raises:
        ValueError: the layer has no such form here; the message says why.
    """
    layer: Any = model.get_submodule(site.name)
    norm = None if site.batchnorm is None else model.get_submodule(site.batchnorm)
    if name not in FORMS:
        raise ValueError(f"form is {name!r}, expected one of {', '.join(FORMS)}")
    if name == "dense":
        return _dense_form(site, layer, norm, channels_last)
    if not isinstance(layer, LowRankModule):
        raise ValueError("a dense layer has no other form than 'dense'")
    weights: Any = _folded_factors(layer, norm, channels_last)
    tensors = tuple(w for w in weights if w is not None)
    if name == "packed":
        weights = inherit_kernels.pack(layer.op_name, *weights)
        if weights.layout != "panels":
            raise ValueError(f"{layer.op_name} has no packed kernel for {layer.up.dtype} on {layer.up.device} here")
        tensors += weights.panels

    def bound(activation: str | None) -> Callable[..., Tensor]:
        options = {**getattr(layer, "_window", {}), "activation": activation}
        if name == "fused" and layer.up.is_cuda:
            return _padded(_chosen(layer.op_name, weights, options), layer)
        return _padded(inherit_kernels.bind(layer.op_name, weights, backend=_BACKENDS[name], **options), layer)

    finish = _finish(site.activation)
    if name == "unfused":  # the backend would add and activate into fresh memory
        bare = bound(None)
        return Form(name, lambda x, residual=None: finish(bare(x), residual), tensors)
    run = bound(site.activation)
    return Form(name, _tolerant(run, bound(None), finish) if site.residual else run, tensors)


def _chosen(op: str, weights: tuple[Tensor | None, ...], options: dict[str, Any]) -> Callable[..., Tensor]:
    """The op itself, which chooses at each call: on a GPU few rows have other kernels than many."""
    function = getattr(inherit_kernels, op)
    return lambda x, residual=None: function(x, *weights, residual, **options)


def _padded(run: Callable[..., Tensor], layer: Any) -> Callable[..., Tensor]:
    """With the asymmetric part of "same" padding before it, where the layer has one."""
    pad = getattr(layer, "_pad", None)
    return run if pad is None else lambda x, residual=None: run(F.pad(x, pad), residual)


def _tolerant(run: Callable[..., Tensor], bare: Callable[..., Tensor], finish: Any) -> Callable[..., Tensor]:
    """An addition that broadcasts or promotes, which the op refuses, is done outside it, as the model does it."""

    def tolerant(x: Tensor, residual: Tensor) -> Tensor:
        try:
            return run(x, residual)
        except (ValueError, TypeError):
            return finish(bare(x), residual)

    return tolerant


def _dense_form(site: Site, layer: Any, norm: Any, channels_last: bool) -> Form:
    dense: Any = layer
    if isinstance(layer, LowRankModule):
        dense = dense.to_dense()
    weight, bias = _folded(dense.weight, dense.bias, norm)
    if channels_last and weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    finish = _finish(site.activation)
    tensors = (weight,) if bias is None else (weight, bias)
    if is_linear(layer):

        def linear(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return finish(F.linear(x, weight, bias), residual)

        return Form("dense", linear, tensors)

    window = dense.stride, dense.padding, dense.dilation, dense.groups

    def convolution(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(F.conv2d(x, weight, bias, *window), residual)

    return Form("dense", convolution, tensors)


def _finish(activation: str | None) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`act(y + residual)` for a fresh y, in place where that gives the same tensor."""
    activate = None if activation is None else _ACTIVATIONS[activation]

    def finish(y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            same = residual.shape == y.shape and residual.dtype == y.dtype
            y = y.add_(residual) if same else y + residual
        return y if activate is None else activate(y)

    return finish


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """The affine map per channel that a BatchNorm is in eval mode, in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _folded(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor | None]:
    """`norm(W x + b)` as another weight `[N, ...]` and bias `[N]`."""
    if norm is None:
        return weight.detach(), None if bias is None else bias.detach()
    scale, shift = scale_and_shift(norm)
    columns = scale.view(-1, *[1] * (weight.dim() - 1))
    shift = shift if bias is None else bias.double() * scale + shift
    return (weight.double() * columns).to(weight.dtype), shift.to(weight.dtype)


def _folded_factors(layer: LowRankModule, norm: Any, channels_last: bool) -> tuple[Tensor | None, ...]:
    """The op's weights with the BatchNorm in `up` and bias: every head's, exact because gates sum to one."""
    down, up, *gate, bias = (w if w is None else w.detach() for w in layer.weights())
    if channels_last and down is not None and down.dim() == 4:
        down = down.contiguous(memory_format=torch.channels_last)
    if norm is None or up is None:
        return (down, up, *gate, bias)
    scale, shift = scale_and_shift(norm)
    shift = shift.expand(up.shape[:-1]) if bias is None else bias.double() * scale + shift
    return (down, (up.double() * scale[:, None]).to(up.dtype), *gate, shift.to(up.dtype).contiguous())


def candidates(site: Site, model: nn.Module, channels_last: bool) -> tuple[dict[str, Form], dict[str, str]]:
    """Every form that the site has here, and for the others the sentence why not."""
    forms: dict[str, Form] = {}
    refused: dict[str, str] = {}
    for name in FORMS:
        try:
            forms[name] = form_of(name, site, model, channels_last)
        except ValueError as error:
            refused[name] = f"layer {site.name!r} has no form {name!r}: {error}"
    return forms, refused


def storages_of(tensors: Iterable[Tensor]) -> set[int]:
    """Where the tensors lie, to tell what a form holds beside them."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
