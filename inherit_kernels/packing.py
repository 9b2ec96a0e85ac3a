"""Weights laid out once for a kernel, explicitly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inherit_kernels import _native, autograd
from inherit_kernels.registry import OPS, OpSpec


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights of one op, laid out for the native kernels of this process; made by `pack`.

    Attributes:
        op: the op's name.
        weights: the plain tensors in the op's argument order, kept for every path that has no packed kernel.
        panels: the packed tensors; empty where the op has no packed kernel here.
        layout: "panels" or "plain".
        isa: the instruction set that the panels are made for, None for a plain layout.
        bytes: what the panels take beside the plain weights.
    """

    op: str
    weights: tuple[Tensor | None, ...]
    panels: tuple[Tensor, ...]
    layout: str
    isa: str | None
    bytes: int

    def __repr__(self) -> str:
        return f"Packed({self.op}, layout={self.layout}, isa={self.isa}, bytes={self.bytes:,})"


def pack(op: str, *weights: Tensor | None) -> Packed:
    """Lay weights out for inference; the result takes their place in a call of the op.

    Args:
        op: the op's name, such as "gated_lowrank_linear".
        weights: its tensor arguments after `x` and before `residual`, in order; trailing optional ones may be left out.

    Returns:
        A `Packed`. It refers to the plain weights and does not see later changes of them: pack again after a change.

    Raises:
        ValueError: no such op, or weights that do not fit each other; TypeError: a wrong type or dtype.

    Example:
        >>> import torch, inherit_kernels as ik
        >>> packed = ik.pack("lowrank_linear", torch.randn(3, 8), torch.randn(5, 3))
        >>> ik.lowrank_linear(torch.randn(2, 8), packed).shape
        torch.Size([2, 5])
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    spec = OPS[op]
    names = spec.tensors[1:-1]
    if not len(spec.required) - 1 <= len(weights) <= len(names):
        raise ValueError(f"weights: {op} takes {', '.join(names)}; got {len(weights)} tensors")
    for name, weight in zip(names, weights, strict=False):
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(weight).__name__}")
    weights = tuple(w if w is None else w.detach() for w in weights) + (None,) * (len(names) - len(weights))
    down = weights[0]
    if down is None:
        raise TypeError("down: expected a torch.Tensor, got None")
    spec.check(down.new_empty(1, *down.shape[1:]), *weights, None, *spec.default_options)
    native: Any = spec.backends.get("native")
    packable = hasattr(native, "pack") and down.device.type == "cpu" and down.dtype in (torch.float32, torch.bfloat16)
    if packable and _native.load():
        panels = native.pack(*weights)
        return Packed(op, weights, panels, "panels", _native.isa(), sum(panel.nbytes for panel in panels))
    return Packed(op, weights, (), "plain", None, 0)


def call_packed(spec: OpSpec, x: Tensor, packed: Packed, residual: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    """Run an op on packed weights; every path without a packed kernel takes the plain ones.

    Raises:
        ValueError: packed for another op.
    """
    if packed.op != spec.name:
        raise ValueError(f"down: packed for {packed.op}, got by {spec.name}; pack it with pack({spec.name!r}, ...)")
    forced = autograd.forced_backend()
    # The packed weights are detached, so only x and the residual can ask for a gradient.
    if not packed.panels or forced not in (None, "native") or not autograd.is_plain_inference((x, residual)):
        return autograd.call(spec, (x, *packed.weights, residual, *options))
    native: Any = spec.backends["native"]
    try:
        return native.forward_packed(x, packed.panels, packed.weights, residual, *options)
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError):
        autograd.raise_named(spec, (x, *packed.weights, residual, *options))
        raise
