"""The layer as the InherNet demo runs it, the baseline of every latency figure: every head is evaluated, the results
are stacked, weighted by the softmax gate and summed. Same function as our gated modules, heads times the work."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inhernet.decompose.batches import copied
from inhernet.nn import LowRankModule

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class PublishedConv2d(nn.Module):
    """`z = down(x)`, `g = softmax(gate(mean of z over positions))`, `y = Σ_h g_h · up_h(z)`, heads one by one.

    Shapes: x `[B, C, Hi, Wi]` → y `[B, N, Ho, Wo]`; holds `[B, H, N, Ho, Wo]` on the way.

    Source: InherNet (arXiv 2602.09509) and its released demo, restated.
    """

    def __init__(self, down: nn.Conv2d, ups: list[nn.Conv2d], gate: nn.Linear) -> None:
        super().__init__()
        self.down, self.ups, self.gate = down, nn.ModuleList(ups), gate

    def forward(self, x: Tensor) -> Tensor:
        z = self.down(x)
        weights = F.softmax(self.gate(z.mean((2, 3))), dim=1)
        outputs = torch.stack([up(z) for up in self.ups], dim=1)
        return (outputs * weights[:, :, None, None, None]).sum(1)

    @property
    def weight(self) -> Tensor:
        """The down projection's: some models ask a layer's weight for its dtype (transformers' ViT, T5)."""
        return self.down.weight


class PublishedLinear(nn.Module):
    """`z = down(x)`, `g = softmax(gate(z))` per row, `y = Σ_h g_h · up_h(z)`, heads one by one.

    Shapes: x `[..., K]` → y `[..., N]`; holds `[..., H, N]` on the way.
    """

    def __init__(self, down: nn.Linear, ups: list[nn.Linear], gate: nn.Linear) -> None:
        super().__init__()
        self.down, self.ups, self.gate = down, nn.ModuleList(ups), gate

    def forward(self, x: Tensor) -> Tensor:
        z = self.down(x)
        weights = F.softmax(self.gate(z), dim=-1)
        outputs = torch.stack([up(z) for up in self.ups], dim=-2)
        return (outputs * weights[..., None]).sum(-2)

    @property
    def weight(self) -> Tensor:
        """The down projection's: some models ask a layer's weight for its dtype (transformers' ViT, T5)."""
        return self.down.weight


def published(model: nn.Module) -> nn.Module:
    """A copy of an inherited model whose low-rank modules are replaced by the published form, weights included.

    A plain module (one head, no gate) becomes the published layer with one head, whose gate is 1.

    Raises:
        ValueError: there is no low-rank module, or one pads in a way the published layer cannot ("same" with an even
            kernel).

    Example:
        >>> from inhernet.nn import from_dense
        >>> model = nn.Sequential(from_dense(nn.Conv2d(3, 8, 3, padding=1), rank=4, heads=3))
        >>> x = torch.randn(2, 3, 5, 5)
        >>> bool(torch.allclose(published(model)(x), model(x), atol=1e-5))
        True
    """
    result = copied(model)
    found = [(name, module) for name, module in result.named_modules() if isinstance(module, LowRankModule)]
    if not found:
        raise ValueError(f"model ({type(model).__name__}) has no low-rank module: nothing to restate")
    for name, module in found:
        parent, _, attribute = name.rpartition(".")
        restated = published_layer(module).train(module.training)
        if not name:
            return restated
        setattr(result.get_submodule(parent), attribute, restated)
    return result


@torch.no_grad()
def published_layer(module: Any) -> PublishedConv2d | PublishedLinear:
    """One module restated, with copies of its weights."""
    ups = module.up if module.gated else module.up[None]
    biases = [None] * len(ups) if module.bias is None else list(module.bias if module.gated else module.bias[None])
    rank = module.down.shape[0]
    gate = nn.Linear(rank, len(ups))
    gate.weight.copy_(module.gate.weight if module.gated else torch.zeros_like(gate.weight))
    gate.bias.copy_(module.gate.bias if module.gated else torch.zeros_like(gate.bias))
    make: Any = _linear if module.down.dim() == 2 else _convolution
    return make(module, list(zip(ups, biases, strict=True)), gate).to(module.down)


def _linear(module: Any, heads: list[tuple[Tensor, Tensor | None]], gate: nn.Linear) -> PublishedLinear:
    rank, depth = module.down.shape
    down = _filled(nn.Linear(depth, rank, bias=False), module.down, None)
    ups = [_filled(nn.Linear(rank, len(up), bias=bias is not None), up, bias) for up, bias in heads]
    return PublishedLinear(down, ups, gate)


def _convolution(module: Any, heads: list[tuple[Tensor, Tensor | None]], gate: nn.Linear) -> PublishedConv2d:
    rank, channels = module.down.shape[:2]
    size, padding = module.kernel_size, module.padding
    if padding == "same" and any(side % 2 == 0 for side in size):
        raise ValueError(f"padding is 'same' with kernel_size {size}: the published layer has no such padding")
    down = nn.Conv2d(channels, rank, size, module.stride, padding, module.dilation, bias=False)
    ups = [
        _filled(nn.Conv2d(rank, len(up), 1, bias=bias is not None), up[:, :, None, None], bias) for up, bias in heads
    ]
    return PublishedConv2d(_filled(down, module.down, None), ups, gate)


def _filled(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    layer.weight.copy_(weight)
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
    return layer
