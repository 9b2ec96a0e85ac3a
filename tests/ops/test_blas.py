"""The `blas` backends on CPU, torch computing in place of cuBLASLt (which tests/test_fused_product.py stands in for)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import inherit_kernels
from inherit_kernels.common import blas
from inherit_kernels.common.activation import ACTIVATION_CODES, activate
from inherit_kernels.common.heads import gate_of, scaled_rows, side_by_side
from inherit_kernels.registry import OPS
from inherit_kernels.testing import cases_of, check_accuracy
from inherit_kernels.testing.memory import poisoned_memory

SERVED = [op for op, spec in OPS.items() if "blas" in spec.backends]
NAMES = {code: name for name, code in ACTIVATION_CODES.items()}


class Products:
    """What csrc/blas.cpp offers, in torch; `asked` are the epilogues that it was asked for."""

    def __init__(self, found: bool):
        self.found, self.asked = found, []

    def linear_with_epilogue(self, x, weight, bias, residual, code, tf32):
        self.asked.append((bias is not None, residual is not None, code))
        assert x.dim() == weight.dim() == 2 and code in (0, 1, 3) and tf32 is False
        z = F.linear(x, weight, bias)
        y = activate(z if residual is None else z + residual, NAMES[code])
        return (y if self.found else torch.full_like(y, float("nan"))), self.found

    def weight_gradient_with_sums(self, dz, t, tf32):
        self.asked.append("sums")
        if not self.found:
            return dz.new_full((dz.shape[1], t.shape[1]), float("nan")), dz.new_full(dz.shape[1:], float("nan")), False
        return dz.t() @ t, dz.sum(0), True

    def scale_by_gate(self, t, gate_weight, gate_bias, columns):
        return scaled_rows(t, gate_of(t, gate_weight, gate_bias), columns)


@pytest.fixture(params=(True, False), ids=("found", "no_algorithm"))
def products(request, monkeypatch):
    standing_in = Products(request.param)
    monkeypatch.setattr(blas, "kernels", standing_in)
    monkeypatch.setattr(blas, "declines", lambda problem: None)
    for spec in OPS.values():
        spec.choices.clear(), spec.forwards.clear()
    yield standing_in
    for spec in OPS.values():
        spec.choices.clear(), spec.forwards.clear()


@pytest.mark.parametrize(
    "op, case",
    [(op, case) for op in SERVED for case in cases_of(op)],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_the_contract(op, case, products):
    with poisoned_memory():
        check_accuracy(op, case, "blas", torch.float32)
        if "conv" in op:
            check_accuracy(op, case, "blas", torch.float32, layout="channels_last")


def test_what_follows_the_product_is_in_its_epilogue(products):
    x, down, up, bias, residual = (torch.randn(size) for size in ((5, 8), (3, 8), (6, 3), (6,), (5, 6)))
    for activation, code in (("relu", 1), ("gelu_tanh", 3), ("gelu", 0), ("silu", 0), (None, 0)):
        with inherit_kernels.use_backend("blas"):
            inherit_kernels.lowrank_linear(x, down, up, bias, residual, activation=activation)
        assert products.asked.pop() == (True, True, code)
    leaves = [value.requires_grad_() for value in (x, down, up, bias)]
    with inherit_kernels.use_backend("blas"):
        inherit_kernels.lowrank_linear(*leaves).sum().backward()
    assert products.asked.pop() == "sums"


@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("heads, rank", ((1, 8), (3, 64), (4, 7)))
def test_heads_are_one_product_of_a_depth_in_eights(heads, rank, biased):
    t, up, g = torch.randn(6, rank), torch.randn(heads, 5, rank), torch.rand(6, heads)
    bias = torch.randn(heads, 5) if biased else None
    weight = side_by_side(up, bias, multiple=8)
    assert weight.shape[1] % 8 == 0 and 0 <= weight.shape[1] - heads * (rank + biased) < 8
    expected = torch.einsum("mh,mhn->mn", g, torch.einsum("mr,hnr->mhn", t, up) + (0 if bias is None else bias))
    torch.testing.assert_close(scaled_rows(t, g, weight.shape[1]) @ weight.t(), expected, rtol=1e-4, atol=1e-5)
