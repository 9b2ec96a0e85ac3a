"""The layer as the InherNet demo runs it, the baseline of every latency figure: every head is evaluated, the results
are stacked, weighted by the softmax gate and summed. Same function as our gated modules, heads times the work."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inhernet.nn import LowRankModule


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
    result = copy.deepcopy(model)
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
def published_layer(module: LowRankModule) -> PublishedConv2d | PublishedLinear:
    """One module restated, with copies of its weights."""
    ups = module.up if module.gated else module.up[None]
    biases = [None] * len(ups) if module.bias is None else list(module.bias if module.gated else module.bias[None])
    rank = module.down.shape[0]
    gate = nn.Linear(rank, len(ups))
    gate.weight.copy_(module.gate.weight if module.gated else torch.zeros_like(gate.weight))
    gate.bias.copy_(module.gate.bias if module.gated else torch.zeros_like(gate.bias))
    if module.down.dim() == 2:
        down = _filled(nn.Linear(module.down.shape[1], rank, bias=False), module.down, None)
        heads = [
            _filled(nn.Linear(rank, up.shape[0], bias=b is not None), up, b) for up, b in zip(ups, biases, strict=True)
        ]
        return PublishedLinear(down, heads, gate).to(module.down)
    padding = module.padding
    if padding == "same" and any(size % 2 == 0 for size in module.kernel_size):
        raise ValueError(
            f"padding is 'same' with kernel_size {module.kernel_size}: the published layer has no such padding"
        )
    down = nn.Conv2d(
        module.down.shape[1], rank, module.kernel_size, module.stride, padding, module.dilation, bias=False
    )  # fmt: skip
    heads = [
        _filled(nn.Conv2d(rank, up.shape[0], 1, bias=b is not None), up[:, :, None, None], b)
        for up, b in zip(ups, biases, strict=True)
    ]
    return PublishedConv2d(_filled(down, module.down, None), heads, gate).to(module.down)


def _filled(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Linear | nn.Conv2d:
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer
