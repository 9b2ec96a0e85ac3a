"""What an op is: its arguments, its definition, its backends. Imports nothing of ours.

An op lives in `ops/<op>/` and registers one `OpSpec` (`autograd.register_op`). Everything else (dispatch, autograd, contract
tests, benchmarks, the support table) iterates `OPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

OPS: dict[str, OpSpec] = {}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: `SERVES` and `PROVEN` of a backend that is plain torch.
EVERYWHERE = {"cpu": _FLOATS, "cuda": _FLOATS}
PLAIN_TORCH = {"cpu": "tests on CPU", "cuda": "the same code on CPU"}


@dataclass(frozen=True)
class Problem:
    """One call, as far as choosing an implementation needs to know it."""

    op: str
    dtype: torch.dtype
    device: torch.device
    sizes: dict[str, int]  # by the letters of the op's definition: M, K, N, R, H, or B, C, P, T, N, R, H
    options: tuple[Any, ...]
    training: bool
    residual: bool = False
    channels_last: bool = False  # images whose channels lie side by side

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}={size}" for letter, size in self.sizes.items())
        more = [self.options[-1] if self.options else None, self.residual and "residual", self.training and "training"]
        words = [str(self.dtype).removeprefix("torch."), self.device, sizes, *filter(None, more)]
        return " ".join([self.op, *map(str, words)])


class Backend(Protocol):
    """A module that computes an op: `ops/<op>/impl_<name>.py`. One with packed kernels also has `pack` and `forward_packed`.

    It may have `doubts(problem)`, why only force chooses it, and `estimate(problem, rates)`, µs of a forward on a GPU
    (`common/costs.py`).

    `forward_saving` returns the output and the rank-sized `t`; it and `backward` only see the activations None and relu,
    and `backward` gets `dz`, the gradient at the pre-activation. `backward` returns one gradient, or None where `needs`
    is False, for each tensor argument but the residual (whose gradient is `dz` itself).
    """

    checks_arguments: bool  # bad input makes it fail, never read out of bounds or broadcast

    @property
    def SERVES(self) -> Mapping[str, Sequence[torch.dtype]]: ...  # kind of device -> dtypes, if all of it is built
    @property
    def PROVEN(self) -> Mapping[str, str]: ...  # kind of device -> how the tests prove it, for the support table
    def supports(self, problem: Problem) -> str | None: ...  # None, or one sentence why not
    def forward(self, *args: Any) -> Tensor: ...
    def forward_saving(self, *args: Any) -> tuple[Tensor, Tensor]: ...
    def backward(self, dz: Tensor, t: Tensor, *args: Any) -> Sequence[Tensor | None]: ...


@dataclass(frozen=True, eq=False)
class OpSpec:
    """An op: arguments, definition, shapes, cost and backends.

    A call is a tuple `tensors` in the order of `required + optional` (the last one is always the residual) and a tuple
    `options` whose last entry is always the activation.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    options: str  # as in a torch schema
    reference: Callable[..., Tensor]
    check: Callable[..., None]  # raises ValueError or TypeError that names the argument
    fake: Callable[..., tuple[Tensor, Tensor]]  # empty (y, t) of the right shape, dtype and strides
    sizes: Callable[..., dict[str, int]]
    flops: Callable[[dict[str, int]], int]  # multiply-adds count two
    backends: dict[str, Backend]
    default_options: tuple[Any, ...]
    normalise: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]] = lambda tensors, options: (tensors, options)
    choices: dict[Any, Backend] = field(default_factory=dict)  # filled by dispatch.select
    forwards: dict[Any, Callable[..., Tensor]] = field(default_factory=dict)  # filled by autograd.call
    checked: dict[Any, bool] = field(default_factory=dict)  # filled by autograd.check_once
    tensor_count: int = field(init=False)
    option_slice: slice = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor_count", len(self.tensors))
        object.__setattr__(self, "option_slice", slice(len(self.tensors), None))

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.required + self.optional

    @property
    def triton_backends(self) -> dict[str, Any]:
        """Those whose launches a compiler can see and whose kernels have configuration tables."""
        return {name: backend for name, backend in self.backends.items() if name.startswith("triton")}

    def split(self, args: Sequence[Any]) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """The tensors and the options of a complete positional argument list."""
        options = (tuple(option) if isinstance(option, list) else option for option in args[self.tensor_count :])
        return tuple(args[: self.tensor_count]), tuple(options)  # hashable: torch operators receive lists


class ReferenceBackend:
    """The definition itself as a backend; its backward differentiates it."""

    checks_arguments = False
    SERVES = EVERYWHERE
    PROVEN = PLAIN_TORCH

    def __init__(self, name: str, reference: Callable[..., Tensor], fake: Callable[..., tuple[Tensor, Tensor]]):
        self.name, self.forward, self.fake = name, reference, fake

    def supports(self, problem: Problem) -> str | None:
        return None

    def forward_saving(self, *args: Any) -> tuple[Tensor, Tensor]:
        t = self.fake(*args)[1]
        return self.forward(*args), t.zero_()

    def backward(self, dz: Tensor, t: Tensor, *args: Any) -> Sequence[Tensor | None]:
        *arguments, needs = args
        count = len(needs)
        return differentiate(self.forward, dz, arguments[:count], arguments[count:], needs, create_graph=False)


def differentiate(
    reference: Callable[..., Tensor],
    dz: Tensor,
    tensors: Sequence[Tensor | None],
    options: Sequence[Any],
    needs: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """The gradients of `reference(*tensors, residual=None, *options[:-1], activation=None)` at the tensors needed."""
    with torch.enable_grad():
        # Views keep the graph back to the caller's tensors, detached copies end it.
        inputs = [
            tensor if tensor is None else tensor.view_as(tensor) if create_graph else tensor.detach()
            for tensor in tensors
        ]
        wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need and tensor is not None]
        for tensor in wanted:
            tensor.requires_grad_()
        z = reference(*inputs, None, *options[:-1], None)
        gradients = iter(torch.autograd.grad(z, wanted, dz, create_graph=create_graph, allow_unused=True))
    found = [next(gradients) if need else None for need in needs]
    return [
        torch.zeros_like(tensor) if tensor is not None and need and gradient is None else gradient
        for tensor, need, gradient in zip(inputs, needs, found, strict=True)
    ]


def flop_formulas_of(spec: OpSpec) -> dict[Any, Callable[..., int]]:
    """Formulas for `FlopCounterMode(custom_mapping=…)`: the backward costs twice the forward, heads merged in both."""

    class Shape:
        """A shape where `sizes` and `fake` expect a tensor."""

        def __init__(self, shape: Sequence[int]):
            self.shape = torch.Size(shape)

    def count(args: Sequence[Any]) -> int:
        count = len(spec.required)
        shapes = [Shape(shape) for shape in args[:count]]
        tensors = (*shapes, *[None] * len(spec.optional))
        return spec.flops(spec.sizes(*tensors, *args[len(spec.tensors) :]))

    def forward(*args: Any, out_shape: Any = None, **_: Any) -> int:
        return count(args[:-1])

    def backward(dz: Any, t: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
        *arguments, _, _ = args
        position = len(spec.tensors) - 1
        return 2 * count((*arguments[:position], None, *arguments[position:]))

    packets = torch.ops.inherit_kernels
    return {
        getattr(packets, spec.name): forward,
        getattr(packets, f"{spec.name}_saving"): forward,
        getattr(packets, f"{spec.name}_backward"): backward,
    }
