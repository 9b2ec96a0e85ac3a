"""Packed weights give what plain weights give, on every path."""

from __future__ import annotations

import pytest
import torch

import inherit_kernels
from inherit_kernels import _native
from inherit_kernels.registry import OPS
from inherit_kernels.testing import cases_of, make_inputs


def packed_call(op, case, dtype=torch.float32):
    inputs = make_inputs(op, case, dtype)
    x, *weights, residual = inputs.values()
    packed = inherit_kernels.pack(op, *weights)
    return inputs, packed, lambda x=x: getattr(inherit_kernels, op)(x, packed, residual=residual, **case.options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("op", OPS)
def test_packed_equals_plain_within_the_accuracy_of_the_dtype(op, dtype):
    for case in cases_of(op):
        inputs, packed, call = packed_call(op, case, dtype)
        with torch.no_grad():
            plain = getattr(inherit_kernels, op)(*inputs.values(), **case.options)
            y = call()
        assert y.stride() == plain.stride()
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(y, plain, rtol=4 * epsilon, atol=32 * epsilon)
        if _native.load() and op in ("lowrank_linear", "gated_lowrank_linear"):
            assert packed.layout == "panels" and packed.isa == _native.isa()
            assert packed.bytes >= sum(inputs[name].numel() for name in ("down", "up")) * 2
        elif not _native.load():
            assert packed.layout == "plain" and packed.bytes == 0


@pytest.mark.parametrize("op", OPS)
def test_packed_under_compile_gradient_and_other_backends(op):
    case = next(case for case in cases_of(op) if case.name == ("strided" if "conv" in op else "few_rows"))
    inputs, _, call = packed_call(op, case)
    expected = getattr(inherit_kernels, op)(*inputs.values(), **case.options)
    x = inputs["x"].clone().requires_grad_()
    y = call(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert x.grad is not None
    for backend in ("unfused", "reference"):
        with inherit_kernels.use_backend(backend):
            torch.testing.assert_close(call(), expected)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(inputs["x"]), expected)


def test_bad_packs_are_named():
    down, up = torch.randn(3, 8), torch.randn(5, 3)
    with pytest.raises(ValueError, match="op: expected one of"):
        inherit_kernels.pack("lowrank", down, up)
    with pytest.raises(ValueError, match="weights: lowrank_linear takes down, up, bias; got 1"):
        inherit_kernels.pack("lowrank_linear", down)
    with pytest.raises(ValueError, match="up: expected shape"):
        inherit_kernels.pack("lowrank_linear", down, up.t())
    with pytest.raises(TypeError, match="up: expected"):
        inherit_kernels.pack("lowrank_linear", down, up.tolist())
    packed = inherit_kernels.pack("lowrank_linear", down, up)
    with pytest.raises(ValueError, match="packed for lowrank_linear, got by lowrank_conv2d"):
        inherit_kernels.lowrank_conv2d(torch.randn(1, 8, 4, 4), packed)
    with pytest.raises(ValueError, match="down: expected shape"):
        inherit_kernels.lowrank_linear(torch.randn(2, 7), packed)
