"""Whether an exported file computes what the model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..decompose.batches import batch_size, call, floating_outputs

# `‖file − model‖ / ‖model‖` of each output: other engines add in another order.
CLOSE = 1e-3


def larger(inputs: Any) -> Any:
    """The same inputs with one example more, to see whether the number of examples is free."""
    size = batch_size(inputs)

    def more(value: Any) -> Any:
        examples = isinstance(value, Tensor) and value.dim() and len(value) == size
        return torch.cat([value, value[:1]]) if examples else value

    return {key: more(value) for key, value in inputs.items()} if isinstance(inputs, Mapping) else more(inputs)


def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [tensor for _, tensor in floating_outputs(call(model, inputs))]


@torch.no_grad()
def check(run: Callable[[Any], list[Tensor]], model: nn.Module, inputs: Any, what: str) -> float:
    """The largest relative difference of an output, at two numbers of examples.

    Raises:
        ValueError: it is above 1e-3, or the outputs have other shapes.
    """
    worst = 0.0
    for batch in (inputs, larger(inputs)):
        found, expected = run(batch), outputs_of(model, batch)
        if [t.shape for t in found] != [t.shape for t in expected]:
            shapes = [[tuple(t.shape) for t in tensors] for tensors in (found, expected)]
            raise ValueError(f"{what} gives outputs of shapes {shapes[0]}, the model {shapes[1]}; nothing was written")
        for a, b in zip(found, expected, strict=True):
            worst = max(worst, float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)))
    if not worst <= CLOSE:
        raise ValueError(f"{what} is {worst:.1e} away from the model, more than {CLOSE:g}; nothing was written")
    return worst
