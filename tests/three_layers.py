"""A small network with data that leans on some directions, and its distance to another: for tests of conversions."""

from __future__ import annotations

import torch
from torch import nn


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 10)).eval()


def rows(seed: int = 1) -> list[torch.Tensor]:
    mix = torch.randn(48, 48, generator=torch.Generator().manual_seed(9)) * torch.linspace(2, 0.1, 48)
    return list((torch.randn(256, 48, generator=torch.Generator().manual_seed(seed)) @ mix.T).split(32))


def error(model: nn.Module, teacher: nn.Module, data: list[torch.Tensor]) -> float:
    """`‖model − teacher‖ / ‖teacher‖` of the outputs."""
    with torch.no_grad():
        found, wanted = (torch.cat([net(batch) for batch in data]) for net in (model, teacher))
    return float((found - wanted).norm() / wanted.norm())
