"""The networks: dense teachers with random weights and an input of the given batch size. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inhernet import models

Built = tuple[nn.Module, tuple[Tensor, ...]]


class FirstOutput(nn.Module):
    """A transformers network as a function of one tensor: every engine and tracer takes that."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, return_dict=False)[0]


def resnet18(batch: int) -> Built:
    """ResNet-18, ImageNet stem, 224²."""
    return models.resnet18(num_classes=1000), (torch.randn(batch, 3, 224, 224),)


def resnet56(batch: int) -> Built:
    """CIFAR ResNet-56, 32²."""
    return models.resnet56(), (torch.randn(batch, 3, 32, 32),)


def vit_s(batch: int) -> Built:
    """ViT-S/16, 224²: 12 layers, 384 wide."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6
    )
    return FirstOutput(transformers.ViTModel(config, add_pooling_layer=False)), (torch.randn(batch, 3, 224, 224),)


def bert_base(batch: int) -> Built:
    """BERT-base, 128 tokens: 12 layers, 768 wide."""
    import transformers

    return _bert(transformers.BertConfig(), batch)


def minilm(batch: int) -> Built:
    """MiniLM-L6, 128 tokens: 6 layers, 384 wide."""
    import transformers

    return _bert(
        transformers.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12),
        batch,
    )


def _bert(config: Any, batch: int) -> Built:
    import transformers

    ids = torch.randint(0, config.vocab_size, (batch, 128), generator=torch.Generator().manual_seed(0))
    return FirstOutput(transformers.BertModel(config, add_pooling_layer=False)), (ids,)


NETWORKS: dict[str, Callable[[int], Built]] = {
    "resnet18": resnet18,
    "resnet56": resnet56,
    "vit_s": vit_s,
    "bert_base": bert_base,
    "minilm": minilm,
}
