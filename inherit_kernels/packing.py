"""Weights laid out once for a kernel, explicitly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inherit_kernels import _native, autograd
from inherit_kernels.common.checks import check_activation
from inherit_kernels.registry import OPS, OpSpec, Problem


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
    spec, weights = _checked(op, weights)
    down: Any = weights[0]
    native: Any = spec.backends.get("native")
    packable = hasattr(native, "pack") and down.device.type == "cpu" and down.dtype in (torch.float32, torch.bfloat16)
    if packable and _native.load():
        panels = native.pack(*weights)
        return Packed(op, weights, panels, "panels", _native.isa(), sum(panel.nbytes for panel in panels))
    return Packed(op, weights, (), "plain", None, 0)


def bind(
    op: str, weights: Packed | tuple[Tensor | None, ...], *, backend: str = "native", **options: Any
) -> Callable[..., Tensor]:
    """An op with its weights, options and backend fixed: a function `(x, residual=None) -> y`.

    Checks and choices are made here once, not at each call; the weights are constants. A call that needs more than the
    values (a gradient to x, autocast, compilation, transforms) goes the op's general way, its backend chosen there.

    Args:
        op: the op's name.
        weights: a `Packed` of this op, or the tensor arguments after `x` and before `residual`.
        backend: what computes: "native", "unfused", "reference"; on a GPU "blas" or "triton". Packed panels are for "native".
        options: the op's keywords, such as `activation="relu"`, `stride=2`.

    Raises:
        ValueError: no such op, backend or option, weights that do not fit, or a backend that declines device or dtype.

    Example:
        >>> import torch, inherit_kernels as ik
        >>> layer = ik.bind("lowrank_linear", (torch.randn(3, 8), torch.randn(5, 3)), backend="unfused")
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 5])
    """
    panels = weights.panels if isinstance(weights, Packed) and backend == "native" else ()
    if isinstance(weights, Packed) and weights.op != op:
        raise ValueError(f"weights: packed for {weights.op}, expected {op}")
    spec, plain = _checked(op, weights.weights if isinstance(weights, Packed) else weights)
    settings = _settings(spec, options)
    down: Any = plain[0]
    image = down.dim() == 4
    if backend not in spec.backends:
        raise ValueError(f"backend: expected one of {', '.join(spec.backends)}, got {backend!r}")
    chosen: Any = spec.backends[backend]
    sentence = chosen.supports(Problem(op, down.dtype, down.device, {}, settings, False))
    if sentence is not None:
        raise ValueError(f"backend: {backend!r} cannot serve {op}: {sentence}")
    checks, forward = chosen.checks_arguments, chosen.forward

    def general(x: Tensor, residual: Tensor | None) -> Tensor:
        (x, *_, residual), _ = spec.normalise((x, *plain, residual), settings)
        return autograd.call(spec, (x, *plain, residual, *settings))

    def bound(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not autograd.is_plain_inference((x, residual)) or (image and x.dim() != 4):
            y = general(x, residual)
            return y.squeeze(0) if image and x.dim() == 3 else y
        try:
            if residual is not None and not checks:
                autograd.check_once(spec, (x, *plain, residual, *settings))
            if panels:
                return chosen.forward_packed(x, panels, plain, residual, *settings)
            return forward(x, *plain, residual, *settings)
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError):
            autograd.raise_named(spec, (x, *plain, residual, *settings))
            raise

    return bound


def _checked(op: str, weights: tuple[Tensor | None, ...]) -> tuple[OpSpec, tuple[Tensor | None, ...]]:
    """The op, and its weights complete and detached; raises the error that names what does not fit."""
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
    return spec, weights


def _settings(spec: OpSpec, options: dict[str, Any]) -> tuple[Any, ...]:
    """The op's options in order, checked and normalised."""
    names = [option.split()[1] for option in spec.options.split(", ")]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise ValueError(f"{unknown[0]}: {spec.name} has no such option; it has {', '.join(names)}")
    given = tuple(options.get(name, default) for name, default in zip(names, spec.default_options, strict=True))
    settings = spec.normalise((None,) * len(spec.tensors), given)[1]
    check_activation(settings[-1])
    return settings


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
