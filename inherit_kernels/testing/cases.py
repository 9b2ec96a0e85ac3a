"""Test cases as data: the shapes and options of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from inherit_kernels.registry import OPS

Pick = Callable[[Sequence[Any]], Any]  # chooses one of a sequence


@dataclass(frozen=True)
class Case:
    """One call of an op: a shape for each tensor argument that is given, and the options that are not default."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def cases_of(op: str) -> list[Case]:
    """The cases in the op's folder."""
    return import_module(f"inherit_kernels.ops.{op}.cases").CASES


def random_case_of(op: str, pick: Pick) -> Case:
    """A random case of an op; `pick` chooses each size and option from a sequence."""
    return import_module(f"inherit_kernels.ops.{op}.cases").random_case(pick)


def make_inputs(
    op: str,
    case: Case,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    seed: int = 0,
    layout: str = "contiguous",
) -> dict[str, Tensor | None]:
    """Random tensors for a case, each scaled so that the output is of order one.

    Args:
        layout: "contiguous"; "strided", where no tensor of two or more elements a row is contiguous; "channels_last",
            which concerns 4-D tensors.

    Returns:
        name -> tensor, None for an optional tensor that the case leaves out, in the op's argument order.
    """
    generator = generator_on(device, seed)
    tensors: dict[str, Tensor | None] = {}
    for name in OPS[op].tensors:
        shape = case.shapes.get(name)
        if shape is None:
            tensors[name] = None
            continue
        depth = {"down": _product(shape[1:]), "up": shape[-1], "gate_weight": shape[-1]}.get(name, 1)
        value = torch.randn(shape, generator=generator, dtype=torch.float64, device=device) / max(depth, 1) ** 0.5
        tensors[name] = _laid_out(value.to(dtype), layout)
    return tensors


def arguments_of(op: str, inputs: dict[str, Tensor | None], case: Case) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The tensors and the options that a backend of the op gets for a case."""
    spec = OPS[op]
    names = [part.split()[-1] for part in spec.options.split(", ")]
    options = dict(zip(names, spec.default_options, strict=True)) | case.options
    return spec.normalise(tuple(inputs.values()), tuple(options.values()))


def generator_on(device: torch.device | str, seed: int) -> torch.Generator | None:
    """Random numbers made where they are needed: one CPU thread takes seconds for the inputs of a large GPU case.

    None for meta tensors, which hold no numbers.
    """
    return None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)


def _laid_out(value: Tensor, layout: str) -> Tensor:
    if layout == "strided" and value.dim() > 0:
        wide = value.new_full((*value.shape[:-1], 2 * value.shape[-1] + 1), float("nan"))
        view = wide[..., 1::2]
        view.copy_(value)
        return view
    if layout == "channels_last" and value.dim() == 4:
        return value.clone(memory_format=torch.channels_last)
    return value.contiguous()


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
