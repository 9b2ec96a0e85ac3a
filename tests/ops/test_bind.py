"""`bind`: an op with weights, options and backend fixed gives what the op gives, on every path, and names what is wrong."""

from __future__ import annotations

import pytest
import torch

import inherit_kernels
from inherit_kernels.registry import OPS
from inherit_kernels.testing import cases_of, make_inputs


def parts(op, case, dtype=torch.float32):
    inputs = make_inputs(op, case, dtype)
    x, *weights, residual = inputs.values()
    return x, tuple(weights), residual


def expected_of(op, case, x, weights, residual):
    return getattr(inherit_kernels, op)(x, *weights, residual, **case.options)


@pytest.mark.parametrize("form", ("reference", "unfused", "native", "packed"))
@pytest.mark.parametrize("op", OPS)
def test_bound_equals_the_op(op, form):
    backend = "native" if form == "packed" else form
    if backend not in OPS[op].backends:
        pytest.skip(f"{op} has no {backend} backend")
    if backend == "native" and "not loaded" in inherit_kernels.status().facts["native library"]:
        pytest.skip("no native library: bound native kernels were not run")
    for case in cases_of(op):
        x, weights, residual = parts(op, case)
        held = inherit_kernels.pack(op, *weights) if form == "packed" else weights
        bound = inherit_kernels.bind(op, held, backend=backend, **case.options)
        with torch.no_grad():
            expected = expected_of(op, case, x, weights, residual)
            actual = bound(x, residual)
        assert actual.stride() == expected.stride(), case.name
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=case.name: f"{n}: {m}")


@pytest.mark.parametrize("op", OPS)
def test_bound_under_gradient_autocast_and_compile(op):
    case = next(case for case in cases_of(op) if case.name == ("strided" if "conv" in op else "few_rows"))
    x, weights, residual = parts(op, case)
    bound = inherit_kernels.bind(op, weights, backend="unfused", **case.options)
    expected = expected_of(op, case, x, weights, residual)
    image = x.clone().requires_grad_()
    y = bound(image, residual)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert image.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        lower = expected_of(op, case, x, weights, residual)
        torch.testing.assert_close(bound(x, residual), lower)
    compiled = torch.compile(bound, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, residual), expected)


def test_bound_weights_are_constants_of_the_caller():
    down, up = torch.randn(3, 8, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    bound = inherit_kernels.bind("lowrank_linear", (down, up), backend="unfused")
    assert not bound(torch.randn(2, 8)).requires_grad


def test_bad_binds_are_named():
    bind = inherit_kernels.bind
    weights = torch.randn(3, 8), torch.randn(5, 3)
    with pytest.raises(ValueError, match="op: expected one of"):
        bind("lowrank", weights)
    with pytest.raises(
        ValueError, match="backend: expected one of unfused, blas, triton, native, reference, got 'fast'"
    ):
        bind("lowrank_linear", weights, backend="fast")
    with pytest.raises(ValueError, match="stride: lowrank_linear has no such option; it has activation"):
        bind("lowrank_linear", weights, backend="unfused", stride=2)
    with pytest.raises(ValueError, match="activation"):
        bind("lowrank_linear", weights, backend="unfused", activation="tanh")
    with pytest.raises(ValueError, match="up: expected shape"):
        bind("lowrank_linear", (weights[0], weights[1].t()), backend="unfused")
    with pytest.raises(ValueError, match="packed for lowrank_linear, expected lowrank_conv2d"):
        bind("lowrank_conv2d", inherit_kernels.pack("lowrank_linear", *weights), backend="unfused")
    with pytest.raises(ValueError, match="'native' cannot serve lowrank_linear"):
        bind("lowrank_linear", tuple(w.double() for w in weights), backend="native")
    for backend in ("unfused", "reference"):
        bound = inherit_kernels.bind("lowrank_linear", weights, backend=backend)
        with pytest.raises(ValueError, match="down: expected shape"):
            bound(torch.randn(2, 7))
        with pytest.raises(TypeError, match="down: dtype"):
            bound(torch.randn(2, 8).double())
        with pytest.raises(ValueError, match="residual"):
            bound(torch.randn(2, 8), torch.randn(5))
