"""Drop-in low-rank modules, filled from a dense layer."""

from .base import Gate, LowRankModule
from .convert import empty_like_dense, fill_published_, from_dense
from .factors import balance, published_factors, svd_factors, zero_sum_noise
from .gated_lowrank_conv2d import GatedLowRankConv2d
from .gated_lowrank_linear import GatedLowRankLinear
from .lowrank_conv2d import LowRankConv2d
from .lowrank_linear import LowRankLinear

__all__ = [
    "Gate",
    "GatedLowRankConv2d",
    "GatedLowRankLinear",
    "LowRankConv2d",
    "LowRankLinear",
    "LowRankModule",
    "balance",
    "empty_like_dense",
    "fill_published_",
    "from_dense",
    "published_factors",
    "svd_factors",
    "zero_sum_noise",
]
