"""Numbers behind the modules: the exact low-rank pair of a weight, balancing, head noise."""

from __future__ import annotations

import torch
from torch import Tensor


def svd_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` pair of a weight, balanced.

    `W = U S Vᵀ`, `down = √S_r V_rᵀ`, `up = U_r √S_r`; `‖W − up·down‖² = Σ_{i>r} s_i²` (Eckart–Young).

    Args:
        weight: `[N, ...]`; trailing dimensions are flattened to `K` (for a convolution `C·kh·kw`).
        rank: number of singular directions kept, `1 ≤ rank ≤ min(N, K)`.

    Returns:
        `down` `[rank, K]` and `up` `[N, rank]`, float64, on the weight's device.

    Raises:
        ValueError: the rank is outside that range, or the weight holds NaN or infinity.

    Example:
        >>> down, up = svd_factors(torch.randn(8, 6), 6)
        >>> down.shape, up.shape
        (torch.Size([6, 6]), torch.Size([8, 6]))
    """
    left, spectrum, right = _svd(weight, rank)
    root = spectrum.sqrt()
    return root[:, None] * right, left * root


def published_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The unbalanced pair of the InherNet authors' demo: `down = V_rᵀ` `[rank, K]`, `up = U_r S_r` `[N, rank]`."""
    left, spectrum, right = _svd(weight, rank)
    return right, left * spectrum


def _svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    matrix = weight.detach().flatten(1).to(torch.float64)
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(
            f"rank is {rank}, expected 1 to {min(matrix.shape)}: a weight of shape {tuple(weight.shape)} has no more "
            "singular directions; lower the rank or keep the layer dense"
        )
    if not torch.isfinite(matrix).all():
        raise ValueError(f"weight of shape {tuple(weight.shape)} holds NaN or infinity and cannot be decomposed")
    left, spectrum, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], spectrum[:rank], right[:rank]


def balance(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each rank direction so that its `down` row and its `up` column have equal norm.

    `up·down` is unchanged. Two-sided factors split by √S alone leave the two norms up to 46× apart, and training
    then diverges at learning rates that are fine otherwise. A direction with a zero side is left as it is.

    Args:
        down: `[R, K]`.
        up: `[N, R]`.

    Returns:
        The scaled `down` and `up`, float64.
    """
    down, up = down.to(torch.float64), up.to(torch.float64)
    row, column = down.norm(dim=1), up.norm(dim=0)
    usable = (row > 0) & (column > 0)
    scale = torch.where(usable, column / row.where(usable, torch.ones_like(row)), torch.ones_like(row)).sqrt()
    return down * scale[:, None], up / scale


def zero_sum_noise(up: Tensor, heads: int, noise: float, generator: torch.Generator | None = None) -> Tensor:
    """Head perturbations `E` `[heads, N, R]` with `Σ_h E_h = 0` and standard deviation `noise · std(up)`.

    Under a uniform gate the heads' mean stays `up`, so the layer's function does not change, yet the heads differ and
    the gate receives a gradient from the first step (identical heads under a zero gate never separate).
    """
    if not noise >= 0.0:
        raise ValueError(f"noise is {noise!r}, expected a number of at least 0 (0.005 is usual)")
    if heads == 1 or noise == 0.0 or up.numel() < 2:
        return up.new_zeros((heads, *up.shape))
    device = up.device if generator is None else generator.device
    draw = torch.randn((heads, *up.shape), dtype=up.dtype, device=device, generator=generator).to(up.device)
    # Removing the mean takes 1/H of the variance away; the factor gives it back.
    return (draw - draw.mean(0)) * (noise * up.std() * (heads / (heads - 1)) ** 0.5)
