"""The numbers behind the modules."""

from __future__ import annotations

import pytest
import torch

from inhernet import nn as inn

F64 = torch.float64


def test_svd_factors_reach_the_eckart_young_bound():
    weight = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(0))
    matrix = weight.flatten(1).double()
    spectrum = torch.linalg.svdvals(matrix)
    for rank in (1, 6, 12):
        down, up = inn.svd_factors(weight, rank)
        assert down.shape == (rank, 15)
        assert up.shape == (12, rank)
        error = (matrix - up @ down).square().sum()
        torch.testing.assert_close(error, spectrum[rank:].square().sum(), rtol=1e-9, atol=1e-20)


def test_published_factors_are_unbalanced_and_have_the_same_product():
    weight = torch.randn(8, 9, dtype=F64)
    (down, up), (other_down, other_up) = inn.published_factors(weight, 4), inn.svd_factors(weight, 4)
    torch.testing.assert_close(up @ down, other_up @ other_down)
    torch.testing.assert_close(down @ down.T, torch.eye(4, dtype=F64))


def test_balance_equalises_norms_and_leaves_dead_directions_finite():
    down, up = torch.randn(5, 7, dtype=F64), torch.randn(9, 5, dtype=F64) * 40
    down[1], up[:, 3] = 0.0, 0.0
    new_down, new_up = inn.balance(down, up)
    torch.testing.assert_close(new_up @ new_down, up @ down)
    alive = [0, 2, 4]
    torch.testing.assert_close(new_down[alive].norm(dim=1), new_up[:, alive].norm(dim=0))
    assert torch.equal(new_up[:, 1], up[:, 1])
    assert torch.equal(new_down[3], down[3])


def test_balance_does_nothing_to_a_balanced_pair():
    down, up = inn.svd_factors(torch.randn(10, 6, dtype=F64), 4)
    for a, b in zip(inn.balance(down, up), (down, up), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("rank", [0, 7, -1])
def test_rank_out_of_range_is_named(rank):
    with pytest.raises(ValueError, match=f"rank is {rank}, expected 1 to 6"):
        inn.svd_factors(torch.randn(6, 8), rank)
