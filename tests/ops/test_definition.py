"""The references against the definitions in DESIGN, written head by head and with dense weights, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import inherit_kernels
from inherit_kernels.registry import OPS, Problem
from inherit_kernels.testing import Case, cases_of, make_inputs
from inherit_kernels.testing.cases import arguments_of

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


class WeightGradients(TorchDispatchMode):
    """Notes the (input, weight, stride) of each weight gradient that torch computes of a convolution."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default and args[10][1]:
            self.calls.append((args[1], args[2], args[4]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ("reference", "unfused"))
@pytest.mark.parametrize("op", [op for op in OPS if "conv" in op])
def test_torch_computes_no_weight_gradient_that_writes_past_its_memory(op, backend):
    """oneDNN issue 6035: 1×1, strided, channels-last, fewer channels than a block.

    Seen with a guard page behind each block of memory, where both backends ended the process; without guard pages a fuzz run
    of torch's convolution alone ended with a corrupted heap after 8,000 to 70,000 calls."""
    shapes = {"x": (2, 3, 9, 10), "down": (4, 3, 1, 1), "up": (5, 4)}
    if "gated" in op:
        shapes |= {"up": (2, 5, 4), "gate_weight": (2, 4)}
    case = Case("strided_pointwise", shapes, {"stride": (3, 2)})
    inputs = make_inputs(op, case, torch.float32, layout="channels_last")
    tensors, options = arguments_of(op, inputs, case)
    *differentiable, _ = tensors  # without the residual
    implementation = OPS[op].backends[backend]
    y, t = implementation.forward_saving(*tensors, *options)
    with WeightGradients() as seen:
        needs = [tensor is not None for tensor in differentiable]
        dx, d_down, *_ = implementation.backward(torch.ones_like(y), t, *differentiable, *options, needs)
    assert [call for call in seen.calls if call[1].shape == inputs["down"].shape], "no gradient of down was seen"
    assert not [stride for _, weight, stride in seen.calls if weight.shape[2:] == (1, 1) and list(stride) != [1, 1]]
    wide = {name: None if value is None else value.double().requires_grad_() for name, value in inputs.items()}
    z = definition(op, wide, case.options)
    for got, expected in zip((dx, d_down), torch.autograd.grad(z.sum(), (wide["x"], wide["down"])), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
