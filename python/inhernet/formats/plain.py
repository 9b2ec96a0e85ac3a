"""An inherited model written with torch's own operations, for engines that know nothing of ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decompose.levels import ordinary
from ..layers import replaced, sharing
from ..nn import LowRankModule
from ..nn.dense_view import DenseWeightView


class Plain(nn.Module):
    """The parameters of a low-rank module, and what models look at in a layer."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.down, self.bias = module.down, module.bias
        self.up, self.gate = module.up, module.gate if module.gated else None
        self.__dict__["_source"] = module  # no child: its parameters are ours already

    @property
    def weight(self) -> DenseWeightView:
        """For code that looks at its dtype, as transformers' does (ViT, CLIP, T5)."""
        return DenseWeightView(self._source, (self.up.shape[-2], *self.down.shape[1:]))


class PlainLinear(Plain):
    """`y = (x·downᵀ)·upᵀ + bias`, or with heads `Σ_h g_h (up_h t + bias_h)`, in products that every engine has."""

    def forward(self, x: Tensor) -> Tensor:
        t = F.linear(x, self.down)
        if self.gate is None:
            return F.linear(t, self.up, self.bias)
        g = torch.softmax(F.linear(t, self.gate.weight, self.gate.bias), -1)
        # Heads side by side: one product of depth H·R.
        scaled = (g.unsqueeze(-1) * t.unsqueeze(-2)).flatten(-2)
        y = F.linear(scaled, self.up.transpose(0, 1).flatten(1))
        return y if self.bias is None else y + g @ self.bias


class PlainConv2d(Plain):
    """A convolution to R channels and a 1 × 1 convolution; heads are mixed per image by the mean of the R channels."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.stride, self.padding, self.dilation = module.stride, module.padding, module.dilation

    def forward(self, x: Tensor) -> Tensor:
        t = F.conv2d(x, self.down, None, self.stride, self.padding, self.dilation)
        if self.gate is None:
            return F.conv2d(t, self.up[:, :, None, None], self.bias)
        g = torch.softmax(F.linear(t.mean((-2, -1)), self.gate.weight, self.gate.bias), -1)
        scaled = (g[..., :, None, None, None] * t.unsqueeze(-4)).flatten(-4, -3)
        y = F.conv2d(scaled, self.up.transpose(0, 1).flatten(1)[:, :, None, None])
        return y if self.bias is None else y + (g @ self.bias)[..., None, None]


def plain(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that shares every tensor, its low-rank modules replaced by torch's own operations.

    `torch.export`, `torch.onnx.export` and other tracers see nothing but linear layers, convolutions and a softmax; the
    result computes the same up to rounding.

    Example:
        >>> layer = inhernet.nn.LowRankLinear(8, 6, 2)
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(plain(layer)(x), layer(x), atol=1e-5)
        True
    """
    result: Any = sharing(ordinary(model))
    for name, module in list(result.named_modules()):
        if isinstance(module, LowRankModule):
            made = PlainLinear(module) if module.down.dim() == 2 else PlainConv2d(module)
            result = replaced(result, name, made)
    return result.eval()
