"""What a peer is made from, and what it becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.suites import Point


class Unavailable(Exception):
    """One sentence why a peer cannot run here."""


@dataclass
class Runner:
    """Something to time: `run()` computes one call, `result(run())` is y, followed in training by the gradient at x."""

    run: Callable[[], Any]
    result: Callable[[Any], tuple[Tensor, ...]] = lambda value: value if isinstance(value, tuple) else (value,)
    note: str = ""


@dataclass
class Setting:
    """One case with its tensors: everything that a peer is made from.

    Attributes:
        inputs: the op's tensors by name, None for the optional ones that the case leaves out.
        dense: the weight `[N, K]` or `[N, C, kh, kw]` and the bias of the layer that the case replaces.
        cotangent: the gradient at y, in training.
    """

    point: Point
    dtype: torch.dtype
    inputs: dict[str, Tensor | None]
    dense: dict[str, Tensor | None]
    output_shape: torch.Size
    cotangent: Tensor | None = None

    @property
    def training(self) -> bool:
        return self.cotangent is not None

    @property
    def options(self) -> dict[str, Any]:
        return self.point.case.options

    @property
    def window(self) -> dict[str, Any]:
        """stride, padding and dilation of a convolution."""
        return {key: value for key, value in self.options.items() if key != "activation"}

    @property
    def is_conv(self) -> bool:
        return "conv2d" in self.point.op

    def runner(self, module: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Runner:
        """A module of (x, residual), forward or forward and backward; `leaves` get a gradient beside x and residual."""
        x: Any = self.inputs["x"]
        residual = self.inputs["residual"]
        if not self.training:
            return Runner(lambda: module(x, residual))
        x = x.detach().requires_grad_()
        residual = None if residual is None else residual.detach().requires_grad_()
        wanted = [x, *leaves, *([] if residual is None else [residual])]

        def step() -> tuple[Tensor, ...]:
            y = module(x, residual)
            return y, *torch.autograd.grad(y, wanted, self.cotangent)

        return Runner(step, lambda value: (value[0].detach(), value[1]))

    def inference_only(self, who: str) -> None:
        """Raise where a gradient is asked for."""
        if self.training:
            raise Unavailable(f"{who} is for inference only")
