"""Leading singular directions of a large weight, by the cheapest method that proves how much it may have missed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .factorise import Factors, finite, plain_factors

# Share of the best possible captured energy that may be missed, proven for every result.
LOSS = 1e-3
# Up to this side torch's SVD is quick: 512 × 512 0.1 s, × 2,048 0.5 s, × 11,008 1.9 s.
SMALL = 512
# 4096 × 11008, two cores: SVD in float32 45 s, all eigenvectors of the Gram matrix 11 s, by `_filtered` at rank 256 3 to 4 s
# and at rank 1024 8 to 14 s.
FEW = 1 / 4
LOOPS, DEGREE, GROWTH = 12, 8, 1e5


def truncated_factors(weight: Tensor, rank: int) -> Factors:
    """The balanced pair of `weight` `[N, K]` at `rank`, as `plain_factors(weight).take(rank)` up to the loss below.

    With s the singular values, `‖up·down‖² ≥ (1 − 1e-3) · Σ_{i≤rank} s_i²`. `spectrum` holds the leading values only.

    Large weights are reduced to the Gram matrix of their smaller side. A few of its directions are found by subspace
    iteration with a Chebyshev filter (Zhou et al., J. Comput. Phys. 219, 2006); more, or directions that cannot be proven,
    by an eigendecomposition.

    Raises:
        ValueError: the weight holds NaN or infinity.

    Example:
        >>> truncated_factors(torch.randn(600, 800), 8).down.shape
        torch.Size([8, 800])
    """
    side = min(weight.shape)
    if side <= SMALL:
        factors = plain_factors(weight, rank)
        return Factors(factors.down, factors.up, factors.spectrum[:rank])
    matrix = finite(weight.detach(), "weight")
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    wide = len(matrix) <= matrix.shape[1]
    gram = _gram(matrix if wide else matrix.mT)
    basis = _filtered(gram, rank) if rank <= FEW * side else None
    if basis is None:
        basis = torch.linalg.eigh(gram.double())[1].flip(1)[:, :rank].to(matrix)
    projected = basis.mT @ matrix if wide else (matrix @ basis).mT
    spectrum = torch.linalg.vector_norm(projected, dim=1)
    root = spectrum.clamp_min(torch.finfo(spectrum.dtype).tiny).sqrt()[:, None]
    narrow, broad = basis.mT * root, projected / root
    down, up = (broad, narrow.mT) if wide else (narrow, broad.mT)
    return Factors(down.float().contiguous(), up.float().contiguous(), spectrum.double())


def _gram(matrix: Tensor) -> Tensor:
    """`A Aᵀ` `[N, N]`; the upper triangle is the lower one's mirror, which saves 45 % of the products."""
    size, step = len(matrix), -(-len(matrix) // 8)
    gram = matrix.new_empty(size, size)
    for start in range(0, size, step):
        rows, columns = slice(start, start + step), slice(0, start + step)
        block = matrix[rows] @ matrix[columns].mT
        gram[rows, columns], gram[columns, rows] = block, block.mT
    return gram


def _filtered(gram: Tensor, rank: int) -> Tensor | None:
    """Orthonormal directions `[N, rank]` that are proven to lose at most `LOSS`, or None."""
    size = min(len(gram), rank + max(32, rank // 2))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(gram), size, generator=generator, dtype=gram.dtype).to(gram.device)
    basis, captured = torch.linalg.qr(gram @ start)[0], 0.0
    for _ in range(LOOPS):
        image = gram @ basis
        values, rotation = torch.linalg.eigh(basis.mT @ image)
        values, rotation = values.flip(0), rotation.flip(1)
        basis, image = basis @ rotation, image @ rotation
        before, captured = captured, float(values[:rank].sum())
        if captured - before <= LOSS * captured and _proven(gram, basis[:, :rank], values[:rank]):
            return basis[:, :rank]
        if captured <= 0:
            return None  # nothing but zeros
        basis = _next(gram, basis, image, values)
    return None


def _proven(gram: Tensor, basis: Tensor, values: Tensor) -> bool:
    """Whether no `rank` directions capture more than `Σ values · (1 + LOSS)`.

    With σ the smallest value, `G = V (Θ − σ) Vᵀ + D`. If `D ≺ (σ + δ) I`, which a Cholesky factorisation tells, the
    `rank` largest eigenvalues of G add up to at most `Σ(θ − σ) + rank·(σ + δ)` (Ky Fan), which is `Σθ + rank·δ`. Rounding of
    the Gram matrix adds about `rank·ε` of `Σθ`: 3e-5 in float32 at rank 256.
    """
    least, slack = values[-1], LOSS * values.mean()
    rest = torch.addmm(-gram, basis * (values - least), basis.mT)
    rest.diagonal().add_(least + slack)
    return int(torch.linalg.cholesky_ex(rest)[1]) == 0


def _next(gram: Tensor, basis: Tensor, image: Tensor, values: Tensor) -> Tensor:
    """The basis after a Chebyshev polynomial of the Gram matrix that is small on [0, smallest value] and grows above.

    Its degree is such that the largest direction grows 1e5 times: with more, float32 would see nothing else.
    """
    centre = values[-1].clamp_min(torch.finfo(values.dtype).eps * values[0]) / 2
    largest = float((values[0] - centre) / centre)
    degree = max(2, min(DEGREE, int(math.log(GROWTH) / math.acosh(max(largest, 1.0 + 1e-6)))))
    before, now = basis, (image - centre * basis) / centre
    for _ in range(degree - 1):
        before, now = now, 2 / centre * (gram @ now - centre * now) - before
    return torch.linalg.qr(now / torch.linalg.vector_norm(now, dim=0).clamp_min(torch.finfo(now.dtype).tiny))[0]
