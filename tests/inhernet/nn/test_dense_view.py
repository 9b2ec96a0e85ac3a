"""`layer.weight`: a dense weight whose numbers are computed only when they are used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from inhernet.nn import from_dense


@pytest.mark.parametrize("dense", (nn.Linear(9, 7), nn.Conv2d(3, 8, 3)), ids=("linear", "conv"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_view_is_the_dense_weight(dense, dtype):
    layer = from_dense(copy.deepcopy(dense).to(dtype), 4)
    expected = layer.dense_weight()[0].view(dense.weight.shape)
    view = layer.weight
    assert isinstance(view, torch.Tensor)
    assert (view.shape, view.dtype, view.device) == (dense.weight.shape, dtype, dense.weight.device)
    assert torch.equal(view + 0, expected)
    assert torch.equal(view.detach().clone(), expected)
    assert torch.equal(torch.cat([view, view]), torch.cat([expected, expected]))
    assert torch.equal(view[1:, 0], expected[1:, 0])
    assert view.tolist() == expected.tolist()
    assert repr(expected).split("(")[1][:20] in repr(view)
    if dtype == torch.float32:
        assert (view.numpy() == expected.numpy()).all()
    with torch.no_grad():
        layer.up.zero_()
    assert not view.any()  # always that of the module as it is


def test_reading_the_dtype_computes_nothing(monkeypatch):
    layer = from_dense(nn.Linear(9, 7), 4)
    monkeypatch.setattr(type(layer), "dense_weight", lambda self: pytest.fail("the product was computed"))
    view = layer.weight
    assert (view.dtype, view.device.type, view.dim(), view.numel()) == (torch.float32, "cpu", 2, 63)


def test_a_gate_that_reads_the_input_has_a_dtype_but_no_dense_weight():
    layer = from_dense(nn.Linear(9, 7), 4, heads=2)
    nn.init.normal_(layer.gate.weight)
    assert layer.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="no dense layer equals this module"):
        layer.weight.sum()


def test_under_compile():
    layer = from_dense(nn.Linear(9, 7), 4)
    run = torch.compile(lambda x: layer(x.to(layer.weight.dtype)), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, dtype=torch.float64)
    torch.testing.assert_close(run(x), layer(x.float()))
