"""What a compiler sees of an op on a GPU: its Triton kernels, traced here on fake CUDA tensors.

Seen failing: the rule left unregistered, a kernel that writes into its input, the check for an export left out, rows counted
by `torch.Size.numel`.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import inherit_kernels
from inherit_kernels import dispatch
from inherit_kernels.registry import OPS
from inherit_kernels.testing import cases_of, make_inputs
from inherit_kernels.testing.cases import arguments_of

triton = pytest.importorskip("triton", reason="the kernels in a compiler's graph were not looked at")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not traced")


class Target:
    """In place of Triton's driver: without a GPU it cannot say which kernels' arguments are written."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def _target(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Target(), raising=False)


def trace(op: str, backend: str, training: bool):
    """The graph of an op on fake CUDA tensors, or of the two operators that its training is made of.

    (Tensors that require a gradient cannot be fake CUDA tensors in a torch without CUDA.)
    """
    case = next(case for case in cases_of(op) if case.name == ("strided" if "conv" in op else "ragged"))
    inputs = make_inputs(op, case, torch.bfloat16)
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}

    def run(named):
        if not training:
            with inherit_kernels.use_backend(backend):
                return [getattr(inherit_kernels, op)(*named.values(), **case.options)]
        tensors, options = arguments_of(op, named, case)
        operators = torch.ops.inherit_kernels
        y, t = getattr(operators, f"{op}_saving")(*tensors, *options[:-1], None, backend)
        needs = [tensor is not None for tensor in tensors[:-1]]
        return getattr(operators, f"{op}_backward")(y, t, *tensors[:-1], *options[:-1], None, needs, backend)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return tuple(run(inputs | dict(zip(given, tensors, strict=True))))

    with FakeTensorMode():
        fakes = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for tensor in given.values()]
        return aot_export_module(Module(), fakes, trace_joint=False)[0].graph


def kernels_in(graph) -> list:
    functional = torch.ops.higher_order.triton_kernel_wrapper_functional
    return [node for node in graph.nodes if node.target is functional]


def operators_in(graph) -> list:
    return [node for node in graph.nodes if getattr(node.target, "namespace", "") == "inherit_kernels"]


@pytest.mark.parametrize("op, backend", [(op, backend) for op, spec in OPS.items() for backend in spec.triton_backends])
@pytest.mark.parametrize("training", (False, True))
def test_a_compiler_sees_the_kernels_and_what_they_write(op, backend, training):
    graph = trace(op, backend, training)
    kernels = kernels_in(graph)
    assert kernels and not operators_in(graph)
    placeholders = {node for node in graph.nodes if node.op == "placeholder"}
    for node in kernels:
        written = {node.kwargs["kwargs"][name] for name in node.kwargs["tensors_to_clone"]}
        assert written, node
        assert not written & placeholders, node


@pytest.mark.parametrize("op", [op for op, spec in OPS.items() if spec.triton_backends])
def test_an_exported_program_keeps_the_operator(op):
    from torch.export._trace import _disable_custom_triton_op_functional_decomposition as exporting

    with exporting():
        graph = trace(op, "triton", False)
    assert not kernels_in(graph)
    assert len(operators_in(graph)) == 1


@pytest.mark.parametrize("backend", (None, "unfused", "triton"))
@pytest.mark.parametrize("op", OPS)
def test_one_compilation_serves_every_batch_from_two(op, backend, monkeypatch):
    """`torch.Size.numel` makes a symbolic size a number: five compilations for five batches, on a GPU alone."""
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(dispatch, "device_slug", lambda device: "nvidia-h200")
    case = next(case for case in cases_of(op) if case.name == ("three_by_three" if "conv" in op else "ragged"))
    inputs = make_inputs(op, case, torch.bfloat16)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(getattr(inherit_kernels, op), fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv()), inherit_kernels.use_backend(backend):
        fakes = {
            name: None if value is None else torch.empty(value.shape, dtype=value.dtype, device="cuda")
            for name, value in inputs.items()
        }
        for rows in (11, 2, 4, 13):
            for name in ("x", "residual"):
                if fakes[name] is not None:
                    fakes[name] = fakes[name].new_empty(rows, *fakes[name].shape[1:])
            assert compiled(*fakes.values(), **case.options).shape[0] == rows
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", OPS)
def test_another_choice_stays_one_operator(op):
    graph = trace(op, "unfused", False)
    assert not kernels_in(graph)
    assert len(operators_in(graph)) == 1
