"""The references against the definitions in DESIGN, written head by head and with dense weights, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import inherit_kernels
from inherit_kernels.registry import OPS, Problem
from inherit_kernels.testing import cases_of, make_inputs

ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def definition(op: str, inputs: dict, options: dict) -> torch.Tensor:
    """One dense layer a head, mixed by the softmax of the gate."""
    options = dict(options)
    activation = options.pop("activation", None)
    x, down, up = inputs["x"], inputs["down"], inputs["up"]
    ups = up if up.dim() == 3 else up[None]
    bias = inputs.get("bias")
    biases = [None] * len(ups) if bias is None else list(bias if bias.dim() == 2 else bias[None])
    if "conv" in op:
        t = F.conv2d(x, down, **options)
        heads = [
            F.conv2d(x, torch.einsum("nr,rcij->ncij", u, down), b, **options) for u, b in zip(ups, biases, strict=True)
        ]
        features = t.mean((-2, -1))
    else:
        features = F.linear(x, down)
        heads = [F.linear(x, u @ down, b) for u, b in zip(ups, biases, strict=True)]
    if "gate_weight" in inputs:
        g = torch.softmax(F.linear(features, inputs["gate_weight"], inputs["gate_bias"]), -1)
        assert torch.allclose(g.sum(-1), torch.ones_like(g.sum(-1)))
    else:
        g = torch.ones(*features.shape[:-1], 1, dtype=x.dtype)
    over_output = (..., None, None, None) if "conv" in op else (..., None)
    z = sum(g[..., h][over_output] * head for h, head in enumerate(heads))
    residual = inputs.get("residual")
    return ACTIVATIONS[activation](z if residual is None else z + residual)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_is_the_definition(op):
    for case in cases_of(op):
        inputs = make_inputs(op, case, torch.float64)
        with inherit_kernels.use_backend("reference"):
            y = getattr(inherit_kernels, op)(*inputs.values(), **case.options)
        torch.testing.assert_close(y, definition(op, inputs, case.options).reshape(y.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", [op for op in OPS if "gated" in op])
def test_extreme_gates_choose_one_head(op):
    """Logits of ±10⁴ would overflow an exponential without its maximum taken off."""
    case = next(case for case in cases_of(op) if case.name in ("no_bias", "pointwise"))
    inputs = make_inputs(op, case, torch.float32)
    inputs["gate_weight"] *= 1e4
    wide = {k: None if v is None else v.double() for k, v in inputs.items()}
    expected = definition(op, wide, case.options)
    for backend in OPS[op].backends:
        if OPS[op].backends[backend].supports(Problem(op, torch.float32, torch.device("cpu"), {}, (), False)):
            continue
        with inherit_kernels.use_backend(backend):
            y = getattr(inherit_kernels, op)(*inputs.values(), **case.options)
        assert y.isfinite().all(), backend
        close = torch.isclose(y.double(), expected, rtol=1e-2, atol=1e-2).float().mean()
        assert close > 0.98, (backend, close)  # a tie within rounding may choose the other head


def test_leading_dimensions_are_rows():
    inputs = make_inputs("gated_lowrank_linear", cases_of("gated_lowrank_linear")[5], torch.float64)
    y = inherit_kernels.gated_lowrank_linear(*inputs.values())
    rows = inputs | {k: inputs[k].flatten(0, -2) for k in ("x", "residual")}
    assert torch.equal(y.flatten(0, -2), inherit_kernels.gated_lowrank_linear(*rows.values()))
