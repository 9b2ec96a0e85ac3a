"""Leading directions of large weights: what is proven holds, and what is wrong is not proven."""

from __future__ import annotations

import pytest
import torch

import inhernet
from inhernet.decompose import truncated
from inhernet.decompose.truncated import LOSS, truncated_factors

SPECTRA = {
    "flat": torch.ones(700),
    "slow": torch.arange(1, 701) ** -0.5,
    "fast": torch.exp(-torch.arange(700) / 15),
    "one": torch.cat([torch.tensor([1e4]), torch.ones(699)]),
    "rank 20": torch.cat([torch.ones(20), torch.zeros(680)]),
}


def weight(name: str, tall: bool = False) -> torch.Tensor:
    matrix = SPECTRA[name][:, None] * torch.randn(700, 900, generator=torch.Generator().manual_seed(0))
    return matrix.mT.contiguous() if tall else matrix


@pytest.mark.parametrize("rank", [1, 175, 500])
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_what_is_captured_is_within_the_bound(name, tall, rank):
    matrix = weight(name, tall)
    factors = truncated_factors(matrix, rank)
    down, up = (part.double() for part in factors.take(rank))
    squares = torch.linalg.svdvals(matrix.double()).square()
    lost = (matrix.double() - up @ down).square().sum() - squares[rank:].sum()
    assert abs(float(lost)) <= LOSS * float(squares[:rank].sum())
    assert down.shape == (rank, matrix.shape[1])
    alive = down.norm(dim=1) > 1e-3 * down.norm()
    torch.testing.assert_close(down.norm(dim=1)[alive], up.norm(dim=0)[alive], rtol=1e-4, atol=0.0)  # balanced


def test_directions_that_miss_something_are_not_proven():
    gram = truncated._gram(weight("slow"))
    values, basis = (part.flip(-1) for part in torch.linalg.eigh(gram))
    assert truncated._proven(gram, basis[:, :40], values[:40])
    without = [*range(5), *range(6, 41)]  # the sixth: 5 % of what the best forty capture
    assert not truncated._proven(gram, basis[:, without], values[without])


@pytest.mark.parametrize("loops", [0, 1])
def test_what_is_not_proven_is_decomposed_whole(monkeypatch, loops):
    monkeypatch.setattr(truncated, "LOOPS", loops)
    assert truncated._filtered(truncated._gram(weight("flat")), 30) is None
    factors = truncated_factors(weight("flat"), 30)
    best = torch.linalg.svdvals(weight("flat").double())[:30]
    torch.testing.assert_close(factors.spectrum, best, rtol=1e-5, atol=0.0)


def test_kinds_of_numbers():
    for matrix in (weight("slow").bfloat16(), weight("slow").double(), torch.zeros(700, 900)):
        factors = truncated_factors(matrix, 8)
        assert factors.down.dtype == torch.float32
        assert factors.down.isfinite().all()
        assert factors.up.isfinite().all()
    broken = weight("slow")
    broken[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"\(700, 900\) holds NaN"):
        truncated_factors(broken, 8)


def test_inherit_uses_them(monkeypatch):
    """A large layer is not handed to torch's SVD."""
    teacher = torch.nn.Linear(900, 700)
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("torch.linalg.svd was called"))
    model = inhernet.inherit(teacher, inhernet.InheritConfig(budget=inhernet.UniformRank(16)))
    assert model.down.shape == (16, 900)
