"""The networks that people bring: each is converted, trained, saved, copied and used (random weights: structure and
numerics only)."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import inhernet
from inhernet import InheritConfig, UniformRank, UniformRatio
from inhernet.cli import main
from inhernet.layers import open_layers
from inhernet.models import resnet20
from inhernet.nn import LowRankModule

transformers = pytest.importorskip("transformers", reason="no transformers: its networks were not converted")

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SMALL, "num_key_value_heads": 2, "vocab_size": 50}
IMAGES = {"image_size": 16, "patch_size": 4}


def tokens(*names: str) -> dict[str, Tensor]:
    ids = torch.randint(2, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    return dict.fromkeys(names or ("input_ids",), ids)


def pixels(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


def hf(model: str, config: str, /, **options: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def whisper() -> nn.Module:
    return hf(
        "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=50, num_mel_bins=8, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=10, max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip


def wav2vec2() -> nn.Module:
    return hf(
        "Wav2Vec2Model", "Wav2Vec2Config", **SMALL, conv_dim=(16, 16), conv_kernel=(5, 3), conv_stride=(3, 2),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, num_feat_extract_layers=2,
    )  # fmt: skip


def audio() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 200, generator=torch.Generator().manual_seed(0))}


def mel() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, **tokens("decoder_input_ids")}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], float]] = {
    # name: the network, its inputs, the least share of its parameters that can be factorised
    "bert": (lambda: hf("BertModel", "BertConfig", **SMALL, vocab_size=50), tokens, 0.45),
    "roberta": (lambda: hf("RobertaModel", "RobertaConfig", **SMALL, vocab_size=50), tokens, 0.45),
    "distilbert": (
        lambda: hf("DistilBertModel", "DistilBertConfig", dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=50),
        tokens,
        0.45,
    ),
    "t5": (
        lambda: hf(
            "T5ForConditionalGeneration", "T5Config", vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2,
            num_heads=4, decoder_start_token_id=0,
        ),
        lambda: tokens("input_ids", "decoder_input_ids"),
        0.9,
    ),
    "gpt2": (lambda: hf("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16),
             tokens, 0.85),
    "llama": (lambda: hf("LlamaForCausalLM", "LlamaConfig", **DECODER), tokens, 0.8),
    "mistral": (lambda: hf("MistralForCausalLM", "MistralConfig", **DECODER, head_dim=8), tokens, 0.8),
    "qwen": (lambda: hf("Qwen2ForCausalLM", "Qwen2Config", **DECODER), tokens, 0.8),
    "mixtral": (
        lambda: hf("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=3, head_dim=8,
                   experts_implementation="eager"),
        tokens,
        0.9,
    ),
    "vit": (lambda: hf("ViTModel", "ViTConfig", **SMALL, **IMAGES), pixels, 0.8),
    "clip": (lambda: hf("CLIPVisionModel", "CLIPVisionConfig", **SMALL, **IMAGES), pixels, 0.85),
    "whisper": (whisper, mel, 0.8),
    "wav2vec2": (wav2vec2, audio, 0.65),
    "resnet": (
        lambda: hf("ResNetModel", "ResNetConfig", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2],
                   layer_type="basic"),
        lambda: pixels(32),
        0.9,
    ),
    "convnext": (
        lambda: hf("ConvNextModel", "ConvNextConfig", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1]),
        lambda: pixels(32),
        0.6,
    ),
    "cifar": (lambda: resnet20(num_classes=10), lambda: {"x": pixels(16)["pixel_values"]}, 0.9),
    "encoder": (encoder, lambda: {"src": torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))}, 0.9),
}  # fmt: skip
GENERATING = ["gpt2", "llama", "mistral", "qwen", "mixtral", "t5", "whisper"]
each = pytest.mark.parametrize("name", NETWORKS)


def network(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    make, inputs, _ = NETWORKS[name]
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # transformers leaves the memory of experts as it finds it
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    return model, inputs()


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    options = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) else {}
    found = model(**inputs, **options)
    return found if isinstance(found, Tensor) else found[0]


def of_low_rank(model: nn.Module, rank: int) -> None:
    """Give every matrix that can be factorised this rank, in place."""
    for module in open_layers(model).modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            matrix = module.weight.detach().flatten(1)
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            module.weight.detach().copy_(((u[:, :rank] * s[:rank]) @ v[:rank]).view_as(module.weight))


@each
def test_a_network_whose_matrices_have_the_rank_is_inherited_exactly(name):
    teacher, inputs = network(name)
    teacher = teacher.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    of_low_rank(teacher, 6)
    plan = inhernet.plan(teacher, InheritConfig(budget=UniformRank(6), break_even=False))
    model = inhernet.inherit(teacher, plan)
    before = sum(layer.dense_params for layer in plan.factorised)
    assert before > NETWORKS[name][2] * sum(p.numel() for p in teacher.parameters())
    with torch.no_grad():
        expected, found = output(teacher, inputs), output(model, inputs)
    assert float((found - expected).norm() / expected.norm()) < 1e-5  # factors are computed in float32


@each
def test_half_of_it_is_trained_saved_loaded_and_copied(name, tmp_path):
    teacher, inputs = network(name)
    model = inhernet.inherit(teacher, InheritConfig(budget=UniformRatio(0.5)))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in teacher.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    output(model.train(), inputs).square().mean().backward()
    reached = [
        module for module in model.modules() if isinstance(module, LowRankModule) and module.down.grad is not None
    ]
    assert len(reached) > 0.8 * len(model.inhernet_plan.factorised)
    assert any(bool((module.down.grad != 0).any()) for module in reached)
    optimizer.step()
    with torch.no_grad():
        expected = output(model.eval(), inputs)
        assert expected.isfinite().all()
        factory = encoder if name == "encoder" else None
        inhernet.save(model, tmp_path / "model", factory=factory)
        trust = ("transformers.",) if name == "wav2vec2" else ()
        copies = {
            "loaded": inhernet.load(tmp_path / "model", factory=factory, trust=trust),
            "deepcopy": copy.deepcopy(model),
        }
        if name != "wav2vec2":  # torch does not pickle its parametrised weight_norm
            copies["pickle"] = pickle.loads(pickle.dumps(model))
        for what, other in copies.items():
            assert torch.equal(output(other.eval(), inputs), expected), what


@pytest.mark.parametrize("name", GENERATING)
def test_it_generates_as_without_a_cache(name):
    teacher, inputs = network(name)
    model = inhernet.inherit(teacher, InheritConfig(budget=UniformRatio(0.5)))
    inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = [model.generate(**inputs, **options, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)
    assert found[0].shape[1] >= 4


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "whisper", "resnet"])
def test_fisher_and_refinement_reach_it(name):
    teacher, inputs = network(name)
    batches = [{key: torch.cat([value] * 4) for key, value in inputs.items()} for _ in range(2)]
    config = InheritConfig(budget=inhernet.ParamBudget(0.5))
    model = inhernet.inherit(teacher, config, batches, refine=inhernet.RefineConfig(steps=3))
    assert model.inhernet_refinement.blocks
    assert output(model, inputs).isfinite().all()


@pytest.mark.slow
@each
def test_compile_and_export(name):
    if name == "mixtral":
        pytest.skip(
            "which experts a batch reaches decides about the graph: not exportable, by transformers' loop either"
        )
    teacher, inputs = network(name)
    model = inhernet.inherit(teacher, InheritConfig(budget=UniformRatio(0.5)))
    with torch.no_grad():
        expected = output(model, inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model)
        torch.testing.assert_close(output(compiled, inputs), expected, rtol=1e-3, atol=1e-4)
        options = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) else {}
        program = torch.export.export(model, (), {**inputs, **options}, strict=False)
        found = program.module()(**inputs, **options)
        torch.testing.assert_close(found if isinstance(found, Tensor) else found[0], expected, rtol=1e-3, atol=1e-4)


BROUGHT = """
import torch
from safetensors.torch import load_file
from torch import nn
from inhernet.models import resnet20

def cifar():
    return resnet20(num_classes=10)

def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

def data():
    inputs = load_file("inputs.safetensors")
    batches = [{key: value.repeat(4, *[1] * (value.dim() - 1)) for key, value in inputs.items()} for _ in range(2)]
    return [next(iter(b.values())) for b in batches] if set(inputs) <= {"x", "src"} else batches
"""


@pytest.mark.slow
@each
def test_the_command_line_takes_it(name, tmp_path, monkeypatch, capsys):
    """plan, convert with refinement, sweep and export, from a directory of transformers or from a function."""
    teacher, inputs = network(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "brought", raising=False)
    (tmp_path / "brought.py").write_text(BROUGHT)
    save_file({key: value.clone() for key, value in inputs.items()}, "inputs.safetensors")
    if name in ("cifar", "encoder"):
        save_file(teacher.state_dict(), "weights.safetensors")
        who = [f"brought:{name}", "--weights", "weights.safetensors"]
    else:
        teacher.save_pretrained("teacher")
        who = ["hf:teacher"]

    def run(*words: str) -> str:
        status = main(list(words))
        shown = capsys.readouterr()
        assert status == 0, shown.err
        return shown.out

    data = ["--data", "brought:data"]
    assert "factorised" in run("plan", *who, *data, "--ratio", "0.6")
    assert "blocks refined" in run("convert", *who, *data, "--ratio", "0.6", "--refine-steps", "2", "--out", "small")
    sweep = run("sweep", *who, *data, "--shares", "0.6", "--refine-steps", "1", "--seconds", "0.05", "--out", "swept")
    assert "60" in sweep
    assert (tmp_path / "swept" / "sweep.png").stat().st_size > 5_000
    trust = (
        ["--trust", "brought"] if who[0].startswith("brought") else ["--trust", "transformers"] * (name == "wav2vec2")
    )
    if name == "mixtral":
        return  # not exportable: see test_compile_and_export
    for kind, file in (("onnx", "net.onnx"), ("program", "net.pt2")):
        assert "difference" in run("export", "small", "--format", kind, *data, *trust, "--out", file)
