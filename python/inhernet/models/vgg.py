"""VGG with BatchNorm for small images (Simonyan and Zisserman 2015, arXiv 1409.1556), one linear layer at the end."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from .common import check_positive, factory, initialise

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """x `[B, in_channels, Hi, Wi]` → logits `[B, num_classes]`; five stages, halved in size after the first three.

    The convolutions have no bias (the BatchNorm behind them has one).
    """

    def __init__(self, convs: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels)
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            self._stage(before, after, convs) for before, after in pairwise((in_channels, *WIDTHS))
        )
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        initialise(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, convs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for index in range(convs):
            conv = nn.Conv2d(inputs if index == 0 else outputs, outputs, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        for stage in (self.block0, self.block1, self.block2):
            x = F.max_pool2d(stage(x), 2)
        x = self.block4(self.block3(x))
        return self.classifier(x.mean((2, 3)))


@factory
def vgg8(num_classes: int = 100, in_channels: int = 3) -> VGG:
    """VGG-8: one convolution per stage, 3,963,556 parameters."""
    return VGG(1, num_classes, in_channels)


@factory
def vgg13(num_classes: int = 100, in_channels: int = 3) -> VGG:
    """VGG-13: two convolutions per stage, 9,459,236 parameters."""
    return VGG(2, num_classes, in_channels)
