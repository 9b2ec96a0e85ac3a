"""What a user would run instead: the dense layer, the published layer, both as torch.compile leaves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inherit_kernels.testing import Case
from inhernet.demos.published import published_layer
from inhernet.nn import GatedLowRankConv2d, GatedLowRankLinear


def dense(op: str, case: Case) -> nn.Module:
    """The layer before its decomposition, random weights."""
    x, down, up = case.shapes["x"], case.shapes["down"], case.shapes["up"]
    if "linear" in op:
        return nn.Linear(x[-1], up[-2])
    return nn.Conv2d(x[1], up[-2], down[2:], **case.options)


def published(op: str, case: Case, inputs: dict[str, Tensor | None]) -> nn.Module:
    """The published form of a gated layer with the given weights: every head evaluated, stacked, summed."""
    down, up = case.shapes["down"], case.shapes["up"]
    heads, outputs, rank = up
    module: Any
    if "linear" in op:
        module = GatedLowRankLinear(down[1], outputs, rank, heads)
    else:
        module = GatedLowRankConv2d(down[1], outputs, down[2:], rank, heads, **case.options)
    module.load_state_dict(
        {
            "down": inputs["down"],
            "up": inputs["up"],
            "bias": inputs["bias"],
            "gate.weight": inputs["gate_weight"],
            "gate.bias": inputs["gate_bias"],
        }
    )
    return published_layer(module).eval()


def baselines(op: str, case: Case, inputs: dict[str, Tensor | None], compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """name -> a call without arguments."""
    x = inputs["x"]
    layers: dict[str, Any] = {"dense": dense(op, case)}
    if "gated" in op:
        layers["published"] = published(op, case, inputs)
        if compiled:
            torch._dynamo.reset()
            layers["published, compiled"] = torch.compile(layers["published"])
    return {name: lambda layer=layer: layer(x) for name, layer in layers.items()}  # type: ignore[misc]
