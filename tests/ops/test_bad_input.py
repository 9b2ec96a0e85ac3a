"""Every kind of wrong argument, on every op and backend, raises an error that names the argument."""

from __future__ import annotations

import pytest
import torch

import inherit_kernels
from inherit_kernels.registry import OPS
from inherit_kernels.testing import cases_of, make_inputs


def table() -> list:
    rows = []
    for op, spec in OPS.items():
        for name in spec.tensors:
            for kind in ("list", "integer", "double", "rank", "size", "device", "size_one"):
                rows.append(pytest.param(op, name, kind, id=f"{op}-{name}-{kind}"))
    return rows


def spoil(value: torch.Tensor, kind: str) -> object:
    return {
        "list": lambda: value.tolist(),
        "integer": lambda: value.to(torch.int64),
        "double": lambda: value.double(),
        "rank": lambda: value[None, None],
        "size": lambda: torch.randn(*value.shape[:-1], value.shape[-1] + 1),
        "device": lambda: value.to("meta"),
        "size_one": lambda: value[..., :1],
    }[kind]()


@pytest.mark.parametrize("op, name, kind", table())
@pytest.mark.parametrize("grad", (False, True), ids=("inference", "training"))
def test_wrong_tensors_are_named(op, name, kind, grad):
    case = next(case for case in cases_of(op) if case.name == ("strided" if "conv" in op else "ragged"))
    inputs = make_inputs(op, case, torch.float32)
    if inputs[name] is None:
        inputs[name] = torch.randn(make_inputs(op, case, torch.float32)["up"].shape[-2])
    options = case.options
    if name == "x" and kind == "rank" and "conv" not in op:
        pytest.skip("a linear op takes any rank")
    if name in ("x", "down") and "conv" in op and kind in ("size", "size_one"):  # the last dimension may have any size
        inputs[name] = inputs[name][:, :1] if kind == "size_one" else torch.cat([inputs[name]] * 2, 1)
    else:
        inputs[name] = spoil(inputs[name], kind)
    if grad:
        first = next(v for v in inputs.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
        first.requires_grad_()
    words = {"integer": "dtype", "double": "dtype", "device": "device"}
    for backend in OPS[op].backends:
        if backend == "native" and not inherit_kernels._native.load():
            continue
        with inherit_kernels.use_backend(backend), pytest.raises((ValueError, TypeError)) as error:
            getattr(inherit_kernels, op)(*inputs.values(), **options)
        assert name in str(error.value)
        assert words.get(kind, "") in str(error.value)


@pytest.mark.parametrize("op", OPS)
def test_missing_weights_are_named(op):
    inputs, _ = make_inputs(op, cases_of(op)[0], torch.float32), None
    with pytest.raises(TypeError, match="up"):
        getattr(inherit_kernels, op)(inputs["x"], inputs["down"])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("activation", ("tanh", "", 3, ["relu"]), ids=str)
def test_unknown_activation_is_named(op, activation):
    inputs = make_inputs(op, cases_of(op)[0], torch.float32)
    with pytest.raises(ValueError, match="activation"):
        getattr(inherit_kernels, op)(*inputs.values(), activation=activation)


@pytest.mark.parametrize("op", [op for op in OPS if "conv" in op])
@pytest.mark.parametrize(
    "option, value",
    [
        ("stride", 0),
        ("stride", -1),
        ("stride", (1, 2, 3)),
        ("stride", "two"),
        ("stride", 1.5),
        ("padding", -1),
        ("padding", "same"),
        ("dilation", 0),
        ("dilation", True),
    ],
)
def test_wrong_geometry_is_named(op, option, value):
    inputs = make_inputs(op, cases_of(op)[1], torch.float32)
    if value is True:
        value = (True, 1)
    with pytest.raises((ValueError, TypeError), match=option):
        getattr(inherit_kernels, op)(*inputs.values(), **{option: value})


@pytest.mark.parametrize("op", [op for op in OPS if "conv" in op])
def test_a_kernel_larger_than_the_image_is_named(op):
    inputs = make_inputs(op, cases_of(op)[1], torch.float32)
    inputs["x"] = inputs["x"][:, :, :2, :2]
    with pytest.raises(ValueError, match="x: its padded height"):
        getattr(inherit_kernels, op)(*inputs.values())
