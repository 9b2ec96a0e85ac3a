"""From a weight and two second moments to a low-rank pair: the numbers behind every initialisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..nn import svd_factors


@dataclass(frozen=True)
class Factors:
    """A low-rank pair of a weight `[N, K]`, best direction first, and the full weighted spectrum.

    `down` `[R, K]`, `up` `[N, R]` (float32, R = the ranks kept), `spectrum` `[min(N, K)]` (float64, non-increasing):
    cutting at rank r loses `Σ_{i>r} spectrum_i²` of the weighting's objective.
    """

    down: Tensor
    up: Tensor
    spectrum: Tensor

    def take(self, rank: int) -> tuple[Tensor, Tensor]:
        """`(down [rank, K], up [N, rank])`."""
        return self.down[:rank], self.up[:, :rank]


@dataclass
class Moments:
    """Second moments of one layer, brought to its smaller side `s = min(N, K)`: nothing of size `max(N, K)²` exists.

    The wide side enters the factors only through the weight, so for N <= K (every usual convolution, no patches
    unfolded) `inputs = W M Wᵀ`, the second moment of the outputs without bias, and `outputs = G`; for N > K
    `inputs = M` and `outputs = Wᵀ G W`. M is `E[x xᵀ]` over real positions (for init="fisher" weighted by the squared
    norm of the output gradient), G is `Σ g gᵀ` per sample and projection. `input_mean`, `output_mean`: mean diagonals
    of M and G, for the shrinkage. `outputs` is None for init="activation".
    """

    inputs: Tensor
    input_mean: float
    outputs: Tensor | None = None
    output_mean: float = 0.0

    @property
    def reached(self) -> bool:
        """Whether any real position (and any output gradient) passed through the layer."""
        return self.input_mean > 0 and (self.outputs is None or self.output_mean > 0)

    @classmethod
    def of(cls, weight: Tensor, inputs: Tensor, outputs: Tensor | None = None) -> Moments:
        """From the full M `[K, K]` and G `[N, N]` of a weight `[N, K]`."""
        rows, columns = weight.shape
        for name, moment, size in (("inputs", inputs, columns), ("outputs", outputs, rows)):
            if moment is not None and moment.shape != (size, size):
                raise ValueError(f"{name} has shape {tuple(moment.shape)}, expected ({size}, {size})")
        means = [0.0 if m is None else float(m.diagonal().mean()) for m in (inputs, outputs)]
        if rows <= columns:
            inputs = weight @ inputs @ weight.mT
        elif outputs is not None:
            outputs = weight.mT @ outputs @ weight
        return cls(inputs, means[0], outputs, means[1])


def weighted_factors(
    weight: Tensor,
    moments: Moments,
    *,
    keep: int | None = None,
    shrinkage_input: float = 1e-3,
    shrinkage_output: float = 1e-2,
) -> Factors:
    """Low-rank pairs that minimise `tr(G (W − Ŵ) M (W − Ŵ)ᵀ)`, for every rank at once.

    With `G = RᵀR` and `M = L Lᵀ`: `R W L = U S Vᵀ`, `Ŵ_r = R⁻¹ U_r S_r V_rᵀ L⁻¹` (METHODS: two-sided weighting; M alone
    is activation-aware SVD, neither is plain SVD). Solved as an eigenproblem of the smaller side, where one of the two
    inverses cancels: for N <= K, `Ŵ_r = R⁻¹ U_r · U_rᵀ R W`, else `Ŵ_r = W L V_r · V_rᵀ L⁻¹`; a 384 × 1536 layer takes
    one eigendecomposition of size 384 and no factorisation of size 1536.

    Args:
        weight: `[N, K]`.
        moments: of this weight; without `outputs`, G is the identity.
        keep: ranks kept in the result (default all, min(N, K)).
        shrinkage_input, shrinkage_output: multiples of the mean diagonal added to M and G.

    Raises:
        ValueError: a moment does not fit the weight, or the weight or a moment is not finite.

    Example:
        >>> weight = torch.randn(6, 8)
        >>> factors = weighted_factors(weight, Moments.of(weight, torch.eye(8), torch.eye(6)))
        >>> factors.down.shape, factors.up.shape
        (torch.Size([6, 8]), torch.Size([6, 6]))
    """
    rows, columns = weight.shape
    side = min(rows, columns)
    for name in ("inputs", "outputs"):
        moment = getattr(moments, name)
        if moment is not None and moment.shape != (side, side):
            raise ValueError(f"moments.{name} has shape {tuple(moment.shape)}, expected ({side}, {side})")
    matrix = finite(weight.detach().to(torch.float64), "weight")
    inputs = finite(moments.inputs.to(matrix), "the input moment")
    outputs = None if moments.outputs is None else finite(moments.outputs.to(matrix), "the output moment")
    lift_input = shrinkage_input * moments.input_mean
    lift_output = shrinkage_output * moments.output_mean
    keep = side if keep is None else min(keep, side)
    eye = torch.eye(side, dtype=matrix.dtype, device=matrix.device)
    if rows <= columns:
        root = None if outputs is None else _cholesky(outputs + lift_output * eye).mT
        left = matrix if root is None else root @ matrix  # R W
        middle = inputs + lift_input * (matrix @ matrix.mT)  # W M Wᵀ
        spectrum, basis = _descending(middle if root is None else root @ middle @ root.mT)
        basis = basis[:, :keep]
        up = basis if root is None else torch.linalg.solve_triangular(root, basis, upper=True)
        return Factors((basis.mT @ left).float(), up.float(), spectrum)
    root = _cholesky(inputs + lift_input * eye)
    gram = matrix.mT @ matrix
    middle = gram if outputs is None else outputs + lift_output * gram  # Wᵀ G W
    spectrum, basis = _descending(root.mT @ middle @ root)
    basis = basis[:, :keep]
    down = torch.linalg.solve_triangular(root.mT, basis, upper=True).mT
    return Factors(down.float(), (matrix @ (root @ basis)).float(), spectrum)


def plain_factors(weight: Tensor, keep: int | None = None) -> Factors:
    """The exact truncated SVD of `[N, K]`, balanced: the paper's initialisation."""
    limit = min(weight.shape)
    keep = limit if keep is None else min(keep, limit)
    down, up = svd_factors(weight, limit)
    # Balanced factors carry √s on both sides, so the squared row norms of `down` are the singular values.
    return Factors(down[:keep].float(), up[:, :keep].float(), down.square().sum(1))


def random_factors(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A Gaussian pair whose product has the weight's Frobenius norm in expectation: an ablation, no inheritance."""
    rows, columns = weight.shape
    down = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    up = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    scale = (weight.detach().double().norm().cpu() / (rows * columns * rank) ** 0.5).sqrt()
    return (down * scale).to(weight.device), (up * scale).to(weight.device)


def finite(matrix: Tensor, what: str) -> Tensor:
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{what} of shape {tuple(matrix.shape)} holds NaN or infinity and cannot be decomposed")
    return matrix


def _descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return factor
    # float32 sums leave eigenvalues down to -1e-7 of the largest; unshrunk, that alone breaks it.
    lift = 1e-6 * matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny)
    return torch.linalg.cholesky(matrix + lift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))
