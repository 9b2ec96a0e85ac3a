"""scikit-learn's digits: 1797 real 8×8 images, one fixed stratified split, distorted copies to train on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TEST, VALIDATION = 360, 180


class Images:
    """Batches `(x [B, 1, 8, 8], y [B])`; shuffled and distorted anew in every pass when `training`.

    Draws from torch's global generator, as the trainer's resumption expects.
    """

    def __init__(self, x: Tensor, y: Tensor, batch: int = 64, training: bool = False) -> None:
        self.x, self.y, self.batch, self.training = x, y, batch, training

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x)) if self.training else torch.arange(len(self.x))
        for rows in order.split(self.batch):
            x = self.x[rows]
            yield (distort(x) if self.training else x), self.y[rows]


@dataclass(frozen=True)
class Digits:
    """The three parts of one split; `calibration` holds the training images undistorted."""

    train: Images
    calibration: Images
    val: Images
    test: Images


def digits(split: int = 0, batch: int = 64) -> Digits:
    """Load split number `split`: 1257 training, 180 validation, 360 test images, classes in equal shares.

    Pixels are scaled to [-1, 1].

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the sentence names the command.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits need scikit-learn: pip install 'inherit-kernels[demo]'") from error
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    y = torch.from_numpy(bunch.target).long()
    rest, test = train_test_split(range(len(y)), test_size=TEST, stratify=y, random_state=split)
    train, val = train_test_split(rest, test_size=VALIDATION, stratify=y[rest], random_state=split)

    def part(rows: list[int], training: bool = False) -> Images:
        return Images(x[rows], y[rows], batch, training)

    return Digits(part(train, training=True), part(train), part(val), part(test))


def distort(x: Tensor) -> Tensor:
    """Rotate by up to 0.2 rad, scale by 15 %, shear by 10 %, shift by 0.6 pixels; background fills in."""

    def draw(limit: float) -> Tensor:
        return (torch.rand(len(x)) * 2 - 1) * limit

    angle, scale, shear = draw(0.2), 1 + draw(0.15), draw(0.1)
    top = torch.stack([scale * angle.cos(), shear - scale * angle.sin(), draw(0.15)], dim=1)
    bottom = torch.stack([scale * angle.sin(), scale * angle.cos(), draw(0.15)], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1
