"""The dense network that equals an inherited one: for tools that know nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..decompose.batches import copied
from ..decompose.levels import ordinary
from ..layers import replaced
from ..nn import LowRankModule


def to_dense(model: nn.Module) -> nn.Module:
    """A new model whose low-rank modules are the dense layers they equal: the teacher's size again, the inherited weights.

    Raises:
        ValueError: a gate reads its input, so that no dense layer equals its module (the layer is named).

    Example:
        >>> to_dense(nn.Sequential(inhernet.nn.LowRankLinear(8, 6, 2)))
        Sequential(
          (0): Linear(in_features=8, out_features=6, bias=True)
        )
    """
    result = copied(ordinary(model))
    for name, module in list(result.named_modules()):
        if not isinstance(module, LowRankModule):
            continue
        source: Any = module
        try:
            dense = source.to_dense()
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        result = replaced(result, name, dense.train(module.training))
    for stale in ("inhernet_plan", "inhernet_refinement", "save_pretrained"):
        result.__dict__.pop(stale, None)
    return result
