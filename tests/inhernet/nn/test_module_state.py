"""State: parameters' names, state_dict, copies, to_dense, and the pack that must never outlive its weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import inherit_kernels
from inhernet import nn as inn

GATE = {"gate.weight", "gate.bias"}
LAYERS = {
    "linear": nn.Linear(10, 8),
    "conv": nn.Conv2d(4, 8, 3, stride=2, padding=1),
    "conv same": nn.Conv2d(4, 8, 4, padding="same"),
}
INPUTS = {
    "linear": torch.randn(5, 10, generator=torch.Generator().manual_seed(0)),
    "conv": torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)),
}
CASES = [(kind, heads, gate) for kind in LAYERS for heads, gate in ((1, False), (1, True), (3, True))]


def build(kind: str, heads: int, gate: bool) -> tuple[nn.Module, torch.Tensor]:
    return inn.from_dense(LAYERS[kind], 5, heads=heads, gate=gate), INPUTS[kind.split()[0]]


@pytest.mark.parametrize("kind, heads, gate", CASES)
def test_state_dict_round_trip_with_exact_names(kind, heads, gate):
    module, x = build(kind, heads, gate)
    state = module.state_dict()
    assert set(state) == {"down", "up", "bias"} | (GATE if gate else set())
    other = inn.empty_like_dense(LAYERS[kind], 5, heads=heads, gate=gate)
    other.load_state_dict(state)
    assert torch.equal(other(x), module(x))
    on_meta = inn.empty_like_dense(copy.deepcopy(LAYERS[kind]).to("meta"), 5, heads=heads, gate=gate)
    on_meta.load_state_dict(state, assign=True)
    assert torch.equal(on_meta(x), module(x))


@pytest.mark.parametrize("kind, heads, gate", CASES)
def test_to_dense_computes_the_same_and_keeps_the_arguments(kind, heads, gate):
    module, x = build(kind, heads, gate)
    if gate:
        nn.init.normal_(module.gate.bias)  # frozen, though not uniform
    dense, source = module.double().eval().to_dense(), LAYERS[kind]
    torch.testing.assert_close(dense(x.double()), module(x.double()), rtol=1e-12, atol=1e-12)
    assert type(dense) is type(source)
    assert not dense.training
    for name in ("stride", "padding", "dilation", "kernel_size", "in_features", "out_features"):
        assert getattr(dense, name, None) == getattr(source, name, None)
    bare = inn.from_dense(nn.Linear(4, 4, bias=False), 2, heads=heads, gate=gate)
    assert bare.to_dense().bias is None


def test_to_dense_refuses_a_gate_that_reads_the_input():
    module, _ = build("linear", 3, True)
    nn.init.normal_(module.gate.weight)
    with pytest.raises(ValueError, match=r"gate.weight is not zero.*3 heads"):
        module.to_dense()
    single, x = build("conv", 1, True)
    nn.init.normal_(single.gate.weight)
    torch.testing.assert_close(single.to_dense()(x), single(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, heads, gate", CASES)
def test_packed_output_is_the_module_s(kind, heads, gate):
    module, x = build(kind, heads, gate)
    if gate:
        nn.init.normal_(module.gate.weight)
    expected = module.eval()(x)
    assert module.pack() is module
    assert module.packed
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert set(module.state_dict()) == {"down", "up", "bias"} | (GATE if gate else set())
    assert not module.unpack().packed


def test_only_a_call_without_gradient_uses_the_pack(monkeypatch):
    module, x = build("linear", 1, False)
    module.eval().pack()
    seen = []
    monkeypatch.setattr(inherit_kernels, "lowrank_linear", lambda input, *weights: seen.append(weights))
    module(x)
    with torch.no_grad():
        module(x)
    assert seen == [(module.down, module.up, module.bias), (module._packed,)]


def test_gradients_are_right_while_a_pack_is_held():
    module, x = build("linear", 3, True)
    x = x.clone().requires_grad_()
    expected = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    module.eval().pack()
    got = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.train(),
        lambda m: nn.Sequential(m).train(),
        lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
        lambda m: nn.Sequential(m).load_state_dict(nn.Sequential(m).state_dict()),
        lambda m: m.to(torch.float64),
        lambda m: m.bfloat16(),
        lambda m: nn.Sequential(m).to("cpu"),
        lambda m: m.reset_parameters(),
    ],
)
def test_pack_is_dropped_when_weights_may_change(change):
    for gate in (False, True):
        module, _ = build("conv", 1, gate)
        module.eval().pack()
        change(module)
        assert not module.packed


def test_eval_keeps_the_pack_and_training_mode_refuses_one():
    module, _ = build("linear", 1, False)
    with pytest.raises(RuntimeError, match="eval"):
        module.pack()
    assert module.eval().pack().eval().packed


def test_copies_and_pickles_carry_no_pack_and_leave_the_original_s():
    module, x = build("conv", 3, True)
    module.eval().pack()
    for twin in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert not twin.packed
        assert module.packed
        assert torch.equal(twin(x), module.unpack()(x))
        module.pack()


def test_hooks_and_summary():
    module, x = build("conv", 3, True)
    seen = []
    handle = module.register_forward_hook(lambda m, inputs, output: seen.append(output.shape))
    module(x)
    handle.remove()
    assert seen == [torch.Size([2, 8, 5, 5])]
    assert "4, 8, kernel_size=(3, 3), rank=5, heads=3, stride=(2, 2), padding=(1, 1)" in repr(module)
    assert "in_features=10, out_features=8, rank=5, bias=True" in repr(build("linear", 1, False)[0])


@pytest.mark.parametrize("kind, heads, gate", CASES)
def test_traces_into_one_graph(kind, heads, gate):
    module, x = build(kind, heads, gate)
    traced = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(x), module(x))
    module.eval().pack()
    with torch.no_grad():
        torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-5)


def test_export_of_a_packed_module_holds_the_plain_weights():
    module, x = build("linear", 3, True)
    module.eval().pack()
    with torch.no_grad():
        program = torch.export.export(module, (x,))
    assert set(program.state_dict) == {"down", "up", "bias"} | GATE
    assert not program.constants
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("kind, heads, gate", CASES)
def test_autocast_with_and_without_a_pack(kind, heads, gate):
    module, x = build(kind, heads, gate)
    module.eval()
    for pack in (False, True):
        if pack:
            module.pack()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)
