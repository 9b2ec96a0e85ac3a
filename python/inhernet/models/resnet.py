"""Residual networks: the CIFAR family (three stages) and ResNet-18 with the ImageNet stem.

Source: He et al. 2016 (arXiv 1512.03385); widths and names as in the CRD comparison (Tian et al. 2020,
arXiv 1910.10699), whose "×4" networks also widen the stem.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import check_positive, count_parameters, factory, initialise


class BasicBlock(nn.Module):
    """`relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))`; a 1×1 shortcut where width or resolution change."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


class CifarResNet(nn.Module):
    """x `[B, in_channels, Hi, Wi]` → logits `[B, num_classes]`; stages at full, half and quarter resolution."""

    def __init__(self, depth: int, widths: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_positive(depth=depth, num_classes=num_classes, in_channels=in_channels)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}, expected 6n + 2 with n of at least 1 (8, 14, 20, ...)")
        if len(widths) != 4:
            raise ValueError(f"widths is {widths!r}, expected four: the stem's and those of the three stages")
        check_positive(**{f"widths[{i}]": width for i, width in enumerate(widths)})
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[1], blocks, 1)
        self.layer2 = _stage(widths[1], widths[2], blocks, 2)
        self.layer3 = _stage(widths[2], widths[3], blocks, 2)
        self.fc = nn.Linear(widths[3], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class ResNet18(nn.Module):
    """x `[B, in_channels, Hi, Wi]` → logits `[B, num_classes]`; 7×7/2 stem, max-pool, four stages of two blocks."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, in_channels=in_channels)
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = _stage(64, 64, 2, 1)
        self.layer2 = _stage(64, 128, 2, 2)
        self.layer3 = _stage(128, 256, 2, 2)
        self.layer4 = _stage(256, 512, 2, 2)
        self.fc = nn.Linear(512, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


@factory
def cifar_resnet(
    depth: int, widths: Sequence[int] = (16, 16, 32, 64), num_classes: int = 100, in_channels: int = 3
) -> CifarResNet:
    """A CIFAR ResNet of any width.

    Args:
        depth: 6n + 2.
        widths: channels of the stem and of the three stages.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        ValueError: a depth, width or count that cannot be built.

    Example:
        >>> cifar_resnet(8, (4, 4, 8, 16), num_classes=10, in_channels=1)(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return CifarResNet(depth, widths, num_classes, in_channels)


@factory
def resnet20(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """CIFAR ResNet-20, 278,324 parameters."""
    return CifarResNet(20, (16, 16, 32, 64), num_classes, in_channels)


@factory
def resnet32(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """CIFAR ResNet-32, 472,756 parameters."""
    return CifarResNet(32, (16, 16, 32, 64), num_classes, in_channels)


@factory
def resnet56(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """CIFAR ResNet-56, 861,620 parameters."""
    return CifarResNet(56, (16, 16, 32, 64), num_classes, in_channels)


@factory
def resnet110(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """CIFAR ResNet-110, 1,736,564 parameters."""
    return CifarResNet(110, (16, 16, 32, 64), num_classes, in_channels)


@factory
def resnet8x4(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """CIFAR ResNet-8, four times as wide, stem of 32: 1,233,540 parameters."""
    return CifarResNet(8, (32, 64, 128, 256), num_classes, in_channels)


@factory
def resnet32x4(num_classes: int = 100, in_channels: int = 3) -> CifarResNet:
    """CIFAR ResNet-32, four times as wide, stem of 32: 7,433,860 parameters."""
    return CifarResNet(32, (32, 64, 128, 256), num_classes, in_channels)


@factory
def resnet18(num_classes: int = 10, in_channels: int = 3) -> ResNet18:
    """ResNet-18 with the ImageNet stem, as in the InherNet authors' CIFAR-10 demo: 11,181,642 parameters."""
    return ResNet18(num_classes, in_channels)


def cifar_resnet_near(
    parameters: int,
    depth: int = 20,
    widths: Sequence[int] = (16, 16, 32, 64),
    num_classes: int = 100,
    in_channels: int = 3,
    tolerance: float = 0.02,
) -> CifarResNet:
    """The width-scaled CIFAR ResNet whose parameter count is nearest to `parameters`.

    Every width is scaled by one factor and rounded; the last stage then moves by up to three channels, because
    that grid alone is too coarse for small networks. The equal-size student of a comparison is made by it.

    Args:
        parameters: the count to come near to.
        depth: as in `cifar_resnet`.
        widths: the widths that are scaled.
        num_classes: as in `cifar_resnet`.
        in_channels: as in `cifar_resnet`.
        tolerance: largest relative distance accepted.

    Raises:
        ValueError: no network of this depth comes within the tolerance.

    Example:
        >>> model = cifar_resnet_near(60_000, depth=20, num_classes=10, in_channels=1)
        >>> abs(sum(p.numel() for p in model.parameters()) - 60_000) < 1_200
        True
    """
    check_positive(parameters=parameters)

    def size(candidate: Sequence[int]) -> int:
        with torch.device("meta"):
            return count_parameters(CifarResNet(depth, candidate, num_classes, in_channels))

    def scaled(factor: float) -> list[int]:
        return [max(1, round(width * factor)) for width in widths]

    low, high = 0.0, 1.0
    while size(scaled(high)) < parameters:
        high *= 2
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if size(scaled(middle)) < parameters else (low, middle)
    ends = (scaled(low), scaled(high))
    candidates = [[*end[:3], max(1, end[3] + shift)] for end in ends for shift in (0, -1, 1, -2, 2, -3, 3)]
    sizes = [size(candidate) for candidate in candidates]
    best = min(range(len(sizes)), key=lambda i: abs(sizes[i] - parameters))
    if abs(sizes[best] - parameters) > tolerance * parameters:
        raise ValueError(
            f"parameters is {parameters}, but the nearest ResNet-{depth} with widths in the ratio {tuple(widths)} has "
            f"{sizes[best]}: more than {tolerance:.1%} away; change depth or tolerance"
        )
    return cifar_resnet(depth, tuple(candidates[best]), num_classes, in_channels)
