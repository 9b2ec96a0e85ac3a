"""Networks of the distillation literature, small and plain.

Every name in `__all__` builds a model from plain values; a saved directory may name exactly these.
"""

from .resnet import (
    cifar_resnet,
    cifar_resnet_near,
    resnet8x4,
    resnet18,
    resnet20,
    resnet32,
    resnet32x4,
    resnet56,
    resnet110,
)
from .vgg import vgg8, vgg13
from .wide_resnet import wide_resnet, wrn16_2, wrn40_1, wrn40_2

__all__ = [
    "cifar_resnet",
    "cifar_resnet_near",
    "resnet8x4",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet56",
    "resnet110",
    "vgg8",
    "vgg13",
    "wide_resnet",
    "wrn16_2",
    "wrn40_1",
    "wrn40_2",
]
