"""The factors are the best ones their objective allows, against plain matrix algebra in float64."""

from __future__ import annotations

import pytest
import torch

from inhernet.decompose.factorise import Moments, plain_factors, random_factors, weighted_factors

SHAPES = [(12, 20), (20, 12), (16, 16), (7, 1), (1, 9)]
EXACT = {"shrinkage_input": 0.0, "shrinkage_output": 0.0}


def spd(size: int, seed: int, skew: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=generator, dtype=torch.float64) * torch.linspace(skew, 0.1, size).double()
    return a @ a.T + 0.05 * torch.eye(size, dtype=torch.float64)


def weight(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(error: torch.Tensor, m: torch.Tensor, g: torch.Tensor) -> float:
    return float(torch.trace(g @ error @ m @ error.T))


def product(factors, rank: int) -> torch.Tensor:
    down, up = factors.take(rank)
    return up.double() @ down.double()


@pytest.mark.parametrize("shape", SHAPES)
def test_eckart_young(shape):
    w = weight(shape)
    factors = plain_factors(w)
    singular = torch.linalg.svdvals(w)
    torch.testing.assert_close(factors.spectrum, singular, rtol=1e-10, atol=1e-12)
    for rank in range(1, min(shape) + 1):
        lost = (w - product(factors, rank)).square().sum()
        torch.testing.assert_close(lost, singular[rank:].square().sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_sided_loss_is_the_tail_of_its_spectrum(shape):
    w, m, g = weight(shape), spd(shape[1], 1), spd(shape[0], 2)
    factors = weighted_factors(w, Moments.of(w, m, g), **EXACT)
    truth = torch.linalg.svdvals(torch.linalg.cholesky(g).T @ w @ torch.linalg.cholesky(m))
    torch.testing.assert_close(factors.spectrum, truth, rtol=1e-6, atol=1e-6 * float(truth[0]))
    for rank in range(1, min(shape) + 1):
        lost = loss(w - product(factors, rank), m, g)
        assert lost == pytest.approx(float(truth[rank:].square().sum()), rel=1e-4, abs=1e-8 * float(truth[0]) ** 2)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_each_weighting_is_best_at_its_own_objective(shape):
    w, m, g, rank = weight(shape), spd(shape[1], 1), spd(shape[0], 2), 4
    plain = product(plain_factors(w), rank)
    active = product(weighted_factors(w, Moments.of(w, m), **EXACT), rank)
    fisher = product(weighted_factors(w, Moments.of(w, m, g), **EXACT), rank)
    one = torch.eye(shape[0], dtype=torch.float64)
    # Strictly: these moments are far from the identity, so a weighting that is ignored would tie and fail here.
    assert loss(w - active, m, one) < 0.99 * loss(w - plain, m, one)
    assert loss(w - fisher, m, g) < 0.99 * loss(w - active, m, g)
    assert (w - plain).square().sum() < 0.99 * (w - active).square().sum()


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_identities_give_plain_svd(shape):
    w = weight(shape)
    m, g = (torch.eye(n, dtype=torch.float64) for n in (shape[1], shape[0]))
    for moments in (Moments.of(w, m), Moments.of(w, m, g)):
        # Shrinkage of an identity only scales it.
        factors = weighted_factors(w, moments)
        torch.testing.assert_close(product(factors, 3), product(plain_factors(w), 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_shrinkage_is_of_the_full_moments(shape):
    """The moments are stored on the smaller side; shrinking there must equal shrinking M and G themselves."""
    w, m, g = weight(shape), spd(shape[1], 1), spd(shape[0], 2)
    got = weighted_factors(w, Moments.of(w, m, g), shrinkage_input=0.3, shrinkage_output=0.2)
    full = [a + s * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype) for a, s in ((m, 0.3), (g, 0.2))]
    expected = weighted_factors(w, Moments.of(w, *full), **EXACT)
    torch.testing.assert_close(got.spectrum, expected.spectrum, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(product(got, 5), product(expected, 5), rtol=1e-5, atol=1e-5)


def test_singular_moments_are_no_obstacle():
    w = weight((10, 14))
    x = weight((14, 3), seed=5)  # the inputs span three directions only
    m = x @ x.T
    factors = weighted_factors(w, Moments.of(w, m, torch.zeros(10, 10, dtype=torch.float64)))
    assert torch.isfinite(factors.down).all()
    tall = weight((14, 10))
    x = weight((10, 3), seed=5)
    factors = weighted_factors(tall, Moments.of(tall, x @ x.T))
    assert loss(tall - product(factors, 3), x @ x.T, torch.eye(14, dtype=torch.float64)) < 1e-4 * float(
        (tall @ x).square().sum()
    )


def test_keep_bounds_the_ranks_but_not_the_spectrum():
    w = weight((12, 20))
    factors = weighted_factors(w, Moments.of(w, spd(20, 1)), keep=3)
    assert factors.down.shape == (3, 20)
    assert factors.up.shape == (12, 3)
    assert len(factors.spectrum) == 12


def test_random_factors_have_the_weights_norm():
    w = weight((200, 150)).float()
    down, up = random_factors(w, 64, torch.Generator().manual_seed(0))
    assert float((up @ down).norm()) == pytest.approx(float(w.norm()), rel=0.05)
    assert down.norm() == pytest.approx(float(up.norm()) * (150 / 200) ** 0.5, rel=0.05)


def test_bad_moments_are_named():
    w = weight((6, 8))
    with pytest.raises(ValueError, match="inputs has shape"):
        Moments.of(w, torch.eye(7))
    with pytest.raises(ValueError, match=r"moments.outputs has shape \(5, 5\)"):
        weighted_factors(w, Moments(torch.eye(6), 1.0, torch.eye(5), 1.0))
    with pytest.raises(ValueError, match=r"weight .* NaN"):
        weighted_factors(w * float("nan"), Moments.of(w, torch.eye(8).double()))
    with pytest.raises(ValueError, match=r"input moment .* NaN"):
        weighted_factors(w, Moments(torch.full((6, 6), float("inf")), 1.0))
