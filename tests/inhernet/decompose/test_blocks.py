"""Where networks of each kind are cut, and that a block's next call is known without running the network again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inhernet.decompose.blocks import Call, blocks_of, call_of, order_of, without_cache
from inhernet.layers import open_layers
from inhernet.models import resnet20

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def matrices(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2, vocab_size=50)
    return transformers.T5ForConditionalGeneration(config).eval()


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, head_dim=16)
    return open_layers(transformers.MixtralForCausalLM(config)).eval()


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=32)
    return transformers.ConvNextModel(config).eval()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (bert, ["encoder.layer.0", "encoder.layer.1", "pooler.dense"]),
        (llama, ["model.layers.0", "model.layers.1", "lm_head"]),
        (mixtral, ["model.layers.0", "model.layers.1", "lm_head"]),
        (
            t5,
            [f"encoder.block.0.layer.{i}" for i in (0, 1)]
            + [f"decoder.block.0.layer.{i}" for i in (0, 1, 2)]
            + ["lm_head"],
        ),
        (
            lambda: resnet20(num_classes=10),
            ["conv1"] + [f"layer{s}.{b}" for s in (1, 2, 3) for b in (0, 1, 2)] + ["fc"],
        ),
    ],
)
def test_the_repeated_blocks_are_found_and_every_layer_is_in_one(make, expected):
    net = make()
    found = blocks_of(net, matrices(net))
    assert found == expected
    assert all(sum(f"{layer}.".startswith(f"{block}.") for block in found) == 1 for layer in matrices(net))


def test_a_stage_that_is_mostly_a_list_of_blocks_is_cut_into_them():
    net = convnext()
    found = blocks_of(net, matrices(net))
    assert "encoder.stages.2.layers.1" in found
    assert "encoder.stages.2" not in found


def test_only_the_layers_asked_for_count():
    net = bert()
    assert blocks_of(net, ["encoder.layer.1.output.dense"]) == ["encoder.layer.1"]
    assert blocks_of(net.pooler, ["dense"]) == ["dense"]
    assert blocks_of(net.pooler.dense, [""]) == [""]


def test_a_sequence_of_plain_layers_is_cut_into_layers():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert blocks_of(net, ["0", "2"]) == ["0", "2"]


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [4], [5]])).long()}


@pytest.mark.parametrize("make", [bert, llama])
@torch.no_grad()
def test_the_next_call_follows_from_the_last_output(make):
    net = make()
    blocks = blocks_of(net, matrices(net))[:2]
    with without_cache(net):
        order, refused = order_of(net, blocks, tokens())
        assert refused == {}
        assert list(order) == blocks
        at = order[blocks[1]]
        assert order[blocks[0]] is None
        assert at is not None
        first, second = (call_of(net, name, tokens()) for name in blocks)
        followed = first.with_input(first.on(net.get_submodule(blocks[0])), at)
        for found, expected in zip(followed.leaves, second.leaves, strict=True):
            assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


@torch.no_grad()
def test_a_call_does_not_follow_where_something_is_done_between():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

        def forward(self, x):
            x = self.blocks[1](self.blocks[0](x))
            return self.blocks[2](2 * x)

    order, _ = order_of(Scaled(), ["blocks.0", "blocks.1", "blocks.2"], torch.randn(2, 4))
    assert order == {"blocks.0": None, "blocks.1": 0, "blocks.2": None}


@torch.no_grad()
def test_blocks_that_are_called_often_or_never_are_refused():
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.never, self.once = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.once(self.often(self.often(x)))

    order, refused = order_of(Looped(), ["often", "never", "once"], torch.randn(2, 4))
    assert list(order) == ["once"]
    assert "2 times" in refused["often"]
    assert "does not reach" in refused["never"]


@torch.no_grad()
def test_a_call_keeps_what_a_block_would_overwrite():
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    call = Call.of((x.clone(),), {})
    assert torch.equal(call.on(block), call.on(block))
    assert torch.equal(call.leaves[0], x)


def test_the_cache_is_switched_off_inside_only():
    net = llama()
    with without_cache(net):
        assert net.config.use_cache is False
        assert net(tokens()["input_ids"]).past_key_values is None
    assert net.config.use_cache is True
