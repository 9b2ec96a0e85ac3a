"""Modules that compute by other means than their parameters say, and therefore must not change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .graphed import CudaGraphs


class Frozen:
    """Mixed into the class of an optimised model and of every module replaced in it.

    Parameters, buffers and their names stay, so that the state dict is that of the model it came from. What is computed
    is `_run`, made from them once: whatever would change them raises.
    """

    training: bool
    _run: Callable[..., Any] | None
    _channels_last: bool
    _form: str
    _graphs: CudaGraphs | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._graphs is not None:
            return self._graphs(self._compute, args, kwargs)
        return self._compute(*args, **kwargs)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        if self._channels_last:
            args, kwargs = to_channels_last((args, kwargs))
        if self._run is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self._run(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(
                "train() on an optimised model: it is for inference only; train the model that it was made from"
            )
        return super().train(False)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "load_state_dict() on an optimised model: its folded and packed weights would not follow; load into the "
            "model that it was made from, and optimise again"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for tensor in (*self.parameters(), *self.buffers()):  # type: ignore[attr-defined]
            moved = fn(tensor)
            if moved.dtype != tensor.dtype or moved.device != tensor.device:
                raise RuntimeError(
                    f"moving an optimised model to {moved.dtype} on {moved.device}: its forms were measured and made "
                    f"for {tensor.dtype} on {tensor.device}; move the model that it was made from, and optimise again"
                )
        return self

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[misc]
        return ", ".join(part for part in (text, f"form={self._form}" if self._form else "") if part)


class _Leaf(Frozen):
    """A replaced layer or a folded BatchNorm: one tensor in, one out."""

    def forward(self, input: Tensor) -> Tensor:
        if self._graphs is not None:
            return self._graphs(self._run, (input,), {})  # type: ignore[arg-type]
        return self._run(input)  # type: ignore[misc]


@functools.cache
def _frozen_class(cls: type, mixin: type) -> type:
    # The name stays: a model of transformers is saved by the name of its class.
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def freeze(
    module: nn.Module,
    run: Callable[..., Any] | None = None,
    form: str = "",
    channels_last: bool = False,
    leaf: bool = False,
    cuda_graph: bool = False,
) -> nn.Module:
    """Freeze a module in place, with `run` for its forward (None keeps the forward it has)."""
    graphs = CudaGraphs() if cuda_graph else None
    module.__dict__.update(_run=run, _form=form, _channels_last=channels_last, _graphs=graphs)
    kind: Any = type(module)
    module.__class__ = _frozen_class(kind, _Leaf if leaf else Frozen)
    return module


def identity(input: Tensor) -> Tensor:
    """What is left of a BatchNorm that went into the layer before it."""
    return input


def to_channels_last(values: Any) -> Any:
    """The values with every floating tensor of four dimensions in channels-last strides."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
            return value
        value = value.contiguous(memory_format=torch.channels_last)
        # One channel is contiguous either way, and keeps the strides that torch then takes for contiguous.
        _, c, h, w = value.shape
        strides = (c * h * w, 1, c * w, c)
        return value if value.stride() == strides else value.as_strided(value.shape, strides)

    return tree_map(convert, values)
