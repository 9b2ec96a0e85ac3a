"""Opened layers compute what the closed ones did; what is made of them is used, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import inhernet
from inhernet import InheritConfig, UniformRank, UniformRatio
from inhernet.layers import open_layers, register, registry
from inhernet.layers.attention import Attention
from inhernet.nn import LowRankConv2d, LowRankLinear

transformers = pytest.importorskip("transformers")


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "by head", "both", "floating"])
def test_attention(batch_first, options, weights, masks):
    closed = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=torch.float64, **options)
    opened = open_layers(closed)
    assert isinstance(opened, Attention)
    shapes = [(3, 5, 8), (3, 4, options.get("kdim", 8)), (3, 4, options.get("vdim", 8))]
    query, key, value = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    padding = torch.tensor([[False] * 4, [False, False, True, True], [False, False, False, True]])
    causal = torch.ones(5, 4, dtype=torch.bool).triu(1)
    given = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "by head": {"attn_mask": torch.rand(6, 5, 4) > 0.9},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "floating": {"attn_mask": torch.randn(5, 4, dtype=torch.float64)},
    }[masks]
    for average in (True, False):
        calls = {"need_weights": weights, "average_attn_weights": average, **given}
        found, expected = (net(query, key, value, **calls) for net in (opened, closed))
        close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        if weights:
            close(found[1], expected[1])


def test_attention_of_one_sequence():
    closed = nn.MultiheadAttention(8, 2, dtype=torch.float64)
    x, mask = torch.randn(5, 8, dtype=torch.float64), torch.tensor([False] * 4 + [True])
    found, expected = (net(x, x, x, key_padding_mask=mask) for net in (open_layers(closed), closed))
    close(found[0], expected[0])
    close(found[1], expected[1])


def test_attention_with_keys_of_its_own_stays_closed_with_a_reason():
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        closed = nn.Sequential(nn.MultiheadAttention(8, 2, **options), nn.Linear(8, 8))
        assert open_layers(closed) is closed
        plan = inhernet.plan(closed, InheritConfig(budget=UniformRank(2)))
        assert "key of its own" in plan["0.in_proj_weight"].reason


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padded", [True, False])
def test_the_fast_path_of_an_encoder_does_not_bypass_the_factors(norm_first, activation, padded):
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True, norm_first=norm_first)
    teacher = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    model = inhernet.inherit(teacher, InheritConfig(budget=UniformRank(3)))
    assert sum(isinstance(m, LowRankLinear) for m in model.modules()) == 12
    x = torch.randn(3, 6, 16)
    mask = torch.arange(6) >= torch.tensor([[6], [4], [5]]) if padded else None
    ordinary = model(x, src_key_padding_mask=mask)  # with gradients no fast path is taken
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    real = slice(None) if mask is None else ~mask
    torch.testing.assert_close(fast[real], ordinary[real].detach(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(fast[real], teacher(x, src_key_padding_mask=mask)[real], atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 3}, {"padding": "same"}, {"dilation": 2}, {"groups": 2}]
)
@pytest.mark.parametrize("shape", [(2, 4, 20), (4, 20)])
def test_convolutions_of_one_dimension(options, shape):
    closed = nn.Conv1d(4, 6, 5, dtype=torch.float64, **options)
    x = torch.randn(shape, dtype=torch.float64)
    close(open_layers(closed)(x), closed(x))


def test_a_converted_convolution_of_one_dimension():
    teacher = nn.Sequential(nn.Conv1d(16, 24, 5, padding=2), nn.ReLU(), nn.Conv1d(24, 24, 3, groups=2))
    plan = inhernet.plan(teacher, InheritConfig(budget=UniformRank(8)))
    assert plan["0.conv"].rank == 8
    assert "grouped" in plan["2.conv"].reason
    model = inhernet.inherit(teacher, plan)
    assert isinstance(model[0].conv, LowRankConv2d)
    assert type(model[2]) is nn.Conv1d  # what stays dense stays as it was
    assert model(torch.randn(2, 16, 30)).shape == teacher(torch.randn(2, 16, 30)).shape


def test_transposed_weights():
    closed = transformers.pytorch_utils.Conv1D(6, 4).double()
    opened = open_layers(closed)
    assert type(opened) is nn.Linear
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    close(opened(x), closed(x))
    assert opened.weight.data_ptr() == closed.weight.data_ptr()


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts(kind):
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, vocab_size=50, num_local_experts=3, num_experts=3, num_experts_per_tok=2,
        experts_implementation="eager",
    )  # fmt: skip
    closed = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in closed.parameters():  # transformers leaves the experts' memory as it finds it
            parameter.normal_(0, 0.2)
    opened = open_layers(closed)
    ids = torch.randint(0, 50, (2, 9))
    close(opened(input_ids=ids, use_cache=False).logits, closed(input_ids=ids, use_cache=False).logits)
    plan = inhernet.plan(closed, InheritConfig(budget=UniformRatio(0.5)))
    assert plan["model.layers.0.mlp.experts.experts.2.gate_up"].rank
    after, before = plan.selected_params
    assert before > 0.8 * sum(p.numel() for p in closed.parameters())
    assert after <= 0.5 * before


def test_the_closed_model_is_not_changed_and_shares_its_numbers():
    closed = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Conv1d(8, 8, 3)).eval()
    before = copy.deepcopy(closed)
    opened = open_layers(closed)
    assert closed[0].activation_relu_or_gelu == before[0].activation_relu_or_gelu == 1
    assert isinstance(closed[0].self_attn, nn.MultiheadAttention)
    assert sum(p.numel() for p in opened.parameters()) == sum(p.numel() for p in closed.parameters())
    assert not opened.training
    with torch.no_grad():
        closed[0].self_attn.in_proj_weight[0, 0] = 5.0
    assert float(opened[0].self_attn.q_proj.weight[0, 0]) == 5.0


def test_only_what_is_asked_for_is_opened():
    closed = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))
    opened = open_layers(closed, ["1.k_proj"])
    assert isinstance(opened[0], nn.MultiheadAttention)
    assert isinstance(opened[1], Attention)
    assert open_layers(closed, ["other"]) is closed


def test_a_weight_that_is_tied_or_made_by_other_code_stays_closed():
    convs = [nn.Conv1d(4, 4, 3) for _ in range(3)]
    convs[1].weight = convs[0].weight
    nn.utils.parametrizations.weight_norm(convs[2])
    opened = open_layers(nn.Sequential(*convs))
    assert [type(module).__name__ for module in opened] == ["Conv1d", "Conv1d", "ParametrizedConv1d"]
    assert all(isinstance(module, nn.Conv1d) for module in opened)


def test_a_module_in_two_places_is_opened_once():
    shared = nn.Conv1d(4, 4, 3)
    opened = open_layers(nn.ModuleList([shared, shared]))
    assert opened[0] is opened[1]
    assert opened[0] is not shared


class Outer(nn.Module):
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(size, size))

    def forward(self, x):
        return x @ self.kernel


def test_a_kind_of_ones_own(monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", list(registry._KINDS))

    def as_linear(module):
        linear = nn.Linear(*module.kernel.shape, bias=False, device="meta")
        linear.weight = nn.Parameter(module.kernel.detach().T)
        return linear

    register(lambda module: type(module) is Outer, as_linear)
    model = inhernet.inherit(nn.Sequential(Outer()), InheritConfig(budget=UniformRank(4)))
    assert isinstance(model[0], LowRankLinear)
