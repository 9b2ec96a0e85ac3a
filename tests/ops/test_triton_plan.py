"""Calls that launch from memory: the same bits as calls that do not, for every case; and what must never be remembered.

Kernels run in the interpreter here; that a compiled kernel is started likewise is shown by a stand-in, on no GPU.
"""

from __future__ import annotations

import pytest
import torch

from inherit_kernels.common import triton_launch, triton_plan
from inherit_kernels.common.triton_launch import forced_configs, observing
from inherit_kernels.registry import OPS
from inherit_kernels.testing import cases_of, make_inputs
from inherit_kernels.testing.cases import arguments_of

pytest.importorskip("triton", reason="no call was launched from memory: triton is not installed")
interpreted = pytest.mark.skipif(
    not triton_launch.interpreting(), reason="kernels not run: they need TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def nothing_remembered():
    triton_plan.forget_plans()
    yield
    triton_plan.forget_plans()


def tensors_of(op, case, seed, layout="contiguous"):
    inputs = make_inputs(op, case, torch.float32, seed=seed, layout=layout)
    if layout == "channels_last":  # weights as such a network has them: no call copies them
        inputs["down"] = inputs["down"].contiguous(memory_format=torch.channels_last)
    tensors, options = arguments_of(op, inputs, case)
    return tensors, (*options[:-1], "relu")


def step(op, tensors, options):
    """Forward, forward that saves, backward: every tensor that they return."""
    backend = OPS[op].backends["triton"]
    y, t = backend.forward_saving(*tensors, *options)
    needs = [tensor is not None for tensor in tensors[:-1]]
    gradients = backend.backward(y.clone(), t.clone(), *tensors[:-1], *options, needs)
    return [backend.forward(*tensors, *options), y, t, *gradients]


def remembered() -> list[bool]:
    return [plan is not None for plans in triton_plan._ALL for plan in plans.values()]


@interpreted
@pytest.mark.parametrize(
    "op, case",
    [
        pytest.param(op, case, marks=() if case.name in ("one_row", "one_pixel") else pytest.mark.slow)
        for op in OPS
        for case in cases_of(op)
    ],
    ids=str,
)
def test_a_call_from_memory_gives_the_same_bits(op, case):
    layout = "channels_last" if "conv" in op else "contiguous"
    step(op, *tensors_of(op, case, 0, layout))
    for seed in (1, 2):
        tensors, options = tensors_of(op, case, seed, layout)
        found = step(op, tensors, options)
        with observing():  # written out: nothing is taken from memory while launches are watched
            wanted = step(op, tensors, options)
        for mine, other in zip(found, wanted, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                assert torch.equal(mine, other) and mine.stride() == other.stride() and mine.dtype == other.dtype
    sizes = [tensor.numel() for tensor in tensors if tensor is not None]
    assert not sizes or not all(sizes) or any(remembered())


@interpreted
def test_outputs_are_each_calls_own():
    case = next(case for case in cases_of("lowrank_linear") if case.name == "ragged")
    tensors, options = tensors_of("lowrank_linear", case, 0)
    calls = [step("lowrank_linear", tensors, options) for _ in range(3)]
    assert all(remembered())
    kept = [value.clone() for value in calls[1]]
    for value in calls[2]:
        value.fill_(7.0)  # also the views: every output can be written into
    assert all(torch.equal(value, wanted) for value, wanted in zip(calls[1], kept, strict=True))


@interpreted
@pytest.mark.parametrize("what", ("aliased", "negative", "copied", "forced", "other options", "unaligned"))
def test_what_the_kind_does_not_tell_is_not_remembered(what):
    op = "lowrank_linear"
    backend = OPS[op].backends["triton"]
    x, down, up, residual = (torch.randn(size) for size in ((8, 8), (4, 8), (8, 4), (8, 8)))

    def check(x, down, up, residual, activation=None):
        y = backend.forward(x, down, up, None, residual, activation)
        z = x @ down.t() @ up.t() + residual
        torch.testing.assert_close(y, z.relu() if activation else z, rtol=1e-4, atol=1e-4)

    if what == "aliased":  # residual is x, then another tensor of the same kind
        for second in (x, residual, x, residual):
            check(x, down, up, second)
    elif what == "negative":  # lazily negated: the memory holds the other sign
        for sign in (False, True, False, True):
            check(torch._neg_view(x) if sign else x, down, up, residual)
    elif what == "copied":  # rows that no view makes: a copy, each time
        wide = torch.randn(4, 3, 2, 8).transpose(0, 1)
        for values in (wide, torch.randn(4, 3, 2, 8).transpose(0, 1)) * 2:
            y = backend.forward(values, down, up, None, None, None)
            torch.testing.assert_close(y, values @ down.t() @ up.t(), rtol=1e-4, atol=1e-4)
        assert remembered() == [False]
    elif what == "forced":
        check(x, down, up, residual)
        check(x, down, up, residual)
        config = triton_launch.config_for(op, "forward", x.dtype, x.device, {"BR": 16, "M": 8, "K": 8, "N": 8})
        with forced_configs({"forward": config | {"BN": 16}}), observing() as launches:
            check(x, down, up, residual)
        assert [launch.keywords["BN"] for launch, _ in launches if "BN" in launch.keywords] == [16]
    elif what == "other options":
        for activation in (None, "relu", None, "relu"):
            check(x, down, up, residual, activation)
    else:
        memory = torch.randn(65)
        for offset in (0, 1, 0, 1):
            check(memory[offset : offset + 64].view(8, 8), down, up, residual)
        assert len(remembered()) == 2


@interpreted
def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(triton_plan, "PLANS_KEPT", 3)
    backend = OPS["lowrank_linear"].backends["triton"]
    for rows in range(1, 9):
        backend.forward(torch.randn(rows, 4), torch.randn(2, 4), torch.randn(3, 2), None, None, None)
    assert 0 < len(remembered()) <= 3


def test_arguments_reach_the_compiled_kernel_in_its_order(monkeypatch):
    """As Triton itself hands them over: grid, stream, function, metadata, hooks, then every parameter."""
    if triton_launch.interpreting():
        pytest.skip("the interpreter compiles nothing")
    started = []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def run(self, *args):
            started.append(args)

    class Kernel:
        arg_names = ("p_x", "p_y", "M", "BM", "FLAG")
        __name__ = "kernel"

        def __getitem__(self, grid):
            return lambda *args, **keywords: Compiled()

    @triton_plan.planned
    def double(x):
        y = torch.empty_like(x)
        triton_launch.launch(Kernel(), (5,), x, y, x.shape[0], FLAG=True, BM=16, num_warps=4)
        return y

    monkeypatch.setattr(triton_plan, "_served", lambda tensor: True)
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    double(first)
    y = double(second)
    (found,) = started
    # The stream and the two hooks are those of the device.
    assert (*found[:3], *found[4:7]) == (5, 1, 1, "function", "metadata", None)
    assert found[9] is second and found[10] is y and found[11:] == (3, 16, True)
