"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146), pre-activation, without dropout."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .common import check_positive, factory, initialise


class PreactivationBlock(nn.Module):
    """`conv(relu(bn(conv(relu(bn(x)))))) + x`; where the width changes the 1×1 shortcut reads `relu(bn(x))`."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = None
        if inputs != outputs or stride != 1:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


class WideResNet(nn.Module):
    """x `[B, in_channels, Hi, Wi]` → logits `[B, num_classes]`; three stages of widths 16w, 32w, 64w."""

    def __init__(self, depth: int, widen: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_positive(depth=depth, widen=widen, num_classes=num_classes, in_channels=in_channels)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth is {depth}, expected 6n + 4 with n of at least 1 (10, 16, 22, ...)")
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.block1, self.block2, self.block3 = (
            self._stage(widths[i], widths[i + 1], (depth - 4) // 6, 1 if i == 0 else 2) for i in range(3)
        )
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        initialise(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = PreactivationBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(PreactivationBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


@factory
def wide_resnet(depth: int, widen: int = 1, num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """A wide ResNet of depth 6n + 4 and width factor `widen`."""
    return WideResNet(depth, widen, num_classes, in_channels)


@factory
def wrn16_2(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """WRN-16-2, 703,284 parameters."""
    return WideResNet(16, 2, num_classes, in_channels)


@factory
def wrn40_1(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """WRN-40-1, 569,780 parameters."""
    return WideResNet(40, 1, num_classes, in_channels)


@factory
def wrn40_2(num_classes: int = 100, in_channels: int = 3) -> WideResNet:
    """WRN-40-2, 2,255,156 parameters."""
    return WideResNet(40, 2, num_classes, in_channels)
