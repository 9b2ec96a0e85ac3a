"""The equal dense weight of a low-rank module, computed only when its numbers are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class DenseWeightView(torch.Tensor):
    """A tensor that knows its shape, dtype and device at once, and its numbers at each operation on it.

    Models look at `layer.weight.dtype` in every forward (transformers: ViT, CLIP, T5), where the product of the factors
    would cost more than the layer itself.
    """

    _module: Any

    @staticmethod
    def __new__(cls, module: Any, shape: Sequence[int]) -> DenseWeightView:
        view = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=module.up.dtype, device=module.up.device)
        view._module = module
        return view

    def __init__(self, module: Any, shape: Sequence[int]) -> None:
        pass

    def numbers(self) -> Tensor:
        """The plain tensor."""
        return self._module.dense_weight()[0].view(self.shape)

    def numpy(self, *, force: bool = False) -> Any:
        return self.numbers().numpy(force=force)

    def tolist(self) -> Any:
        return self.numbers().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        plain = tree_map(lambda value: value.numbers() if isinstance(value, cls) else value, (args, kwargs or {}))
        return func(*plain[0], **plain[1])
