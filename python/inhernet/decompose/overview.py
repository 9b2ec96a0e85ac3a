"""`summary`: what a model is made of, layer by layer, and what the low-rank layers save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..budgets.macs import low_rank_macs
from ..nn import LowRankModule
from .batches import call, device_of, model_inputs, undisturbed
from .levels import ordinary
from .text import share, text_table


@dataclass(frozen=True)
class LayerSummary:
    """One layer. `dense_params`/`dense_macs` are those of the dense layer it stands for; MACs are per example batch."""

    name: str
    kind: str
    params: int
    dense_params: int
    rank: int | None = None
    heads: int | None = None
    macs: int | None = None
    dense_macs: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Summary:
    """What `summary` found: `layers`, and the parameters of the whole model, now and dense."""

    layers: tuple[LayerSummary, ...]
    params: int
    dense_params: int

    @property
    def macs(self) -> tuple[int, int] | None:
        """Multiply-accumulates of the listed layers: now, dense; None without example inputs."""
        counted = [(c.macs, c.dense_macs or 0) for c in self.layers if c.macs is not None]
        return (sum(now for now, _ in counted), sum(dense for _, dense in counted)) if counted else None

    def __str__(self) -> str:
        rows = []
        for layer in self.layers:
            macs = ("", "") if layer.macs is None else (f"{layer.dense_macs:,}", f"{layer.macs:,}")
            form = ("dense", "") if layer.rank is None else (layer.rank, layer.heads)
            counts = (f"{layer.dense_params:,}", f"{layer.params:,}")
            rows.append((layer.name or "(model)", layer.kind, *form, *counts, *macs, layer.reason or ""))
        columns = ("layer", "kind", "rank", "heads", "dense", "inherited", "dense MACs", "MACs", "stays dense")
        lines = [text_table(columns, rows, left=(0, 1, 8))]
        lines.append(f"parameters: {self.params:,} of {self.dense_params:,} ({share(self.params, self.dense_params)})")
        if self.macs is not None:
            lines.append(f"MACs: {self.macs[0]:,} of {self.macs[1]:,} ({share(*self.macs)})")
        return "\n".join(lines)


def summary(model: nn.Module, example_inputs: Any = None) -> Summary:
    """List every linear layer, convolution and low-rank module of a model.

    MACs count the merged heads: a gated linear layer `rows·(R·K + H·N·R + H·R)`, a gated convolution the mixing of its
    heads once per image. Norms, activations and attention products are not counted.

    Args:
        model: any model; reasons for dense layers come from its `inhernet_plan`, if it has one. Of an elastic one its present
            level is listed.
        example_inputs: a batch as for `plan`; with it the MACs are counted by running the model once.

    Example:
        >>> summary(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)).macs
        (24, 24)
    """
    model = ordinary(model)
    plan = getattr(model, "inhernet_plan", None)
    reasons = {layer.name: layer.reason for layer in plan} if plan is not None else {}
    modules: list[tuple[str, Any]] = [
        (n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, LowRankModule))
    ]
    shapes = {} if example_inputs is None else _output_shapes(model, modules, example_inputs)
    layers = tuple(_layer(name, module, reasons.get(name), shapes.get(name)) for name, module in modules)
    params = sum(p.numel() for p in model.parameters())
    saved = sum(layer.dense_params - layer.params for layer in layers)
    return Summary(layers, params, params + saved)


def _output_shapes(model: nn.Module, modules: list[tuple[str, Any]], batch: Any) -> dict[str, list[torch.Size]]:
    shapes: dict[str, list[torch.Size]] = {}

    def record(name: str) -> Any:
        return lambda module, args, output: shapes.setdefault(name, []).append(output.shape)

    handles = [module.register_forward_hook(record(name)) for name, module in modules]
    try:
        with undisturbed(model), torch.no_grad():
            call(model, model_inputs(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _layer(name: str, module: Any, reason: str | None, shapes: list[torch.Size] | None) -> LayerSummary:
    params = sum(p.numel() for p in module.parameters())
    low = isinstance(module, LowRankModule)
    weight: Tensor = module.down if low else module.weight
    conv = weight.dim() == 4
    kind = "conv2d" if conv else "linear"
    rows, columns = (module.up.shape[-2] if low else weight.shape[0]), weight[0].numel()
    macs = dense_macs = None
    if shapes is not None:
        dense_macs = sum(_positions(shape, conv) * rows * columns for shape in shapes)
        macs = sum(_low_macs(module, shape, conv, rows, columns) for shape in shapes) if low else dense_macs
    if not low:
        return LayerSummary(name, kind, params, params, None, None, macs, dense_macs, reason)
    bias = 0 if module.bias is None else rows
    return LayerSummary(name, kind, params, rows * columns + bias, module.rank, module.heads, macs, dense_macs)


def _positions(shape: torch.Size, conv: bool) -> int:
    total = int(torch.Size(shape).numel())
    channels = shape[-3] if conv else shape[-1]
    return total // channels if channels else 0


def _low_macs(module: Any, shape: torch.Size, conv: bool, rows: int, columns: int) -> int:
    images = (shape[0] if len(shape) == 4 else 1) if conv else None
    heads = module.heads if module.gated else None
    return low_rank_macs(rows, columns, module.rank, heads, _positions(shape, conv), images)
