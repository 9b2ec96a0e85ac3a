"""Exported files run in other engines and compute what the model does, for any number of examples."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import inhernet
from inhernet import InheritConfig, UniformRank, UniformRatio, atomic, formats
from inhernet.cli import main
from inhernet.formats import compare
from inhernet.nn import LowRankModule

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(3, 16, 3, padding="same"),
            nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False),
        )
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.second(torch.relu(self.first(x)))))
        return self.head(x.mean((2, 3)))


def inherited(heads: int) -> nn.Module:
    torch.manual_seed(0)
    model = inhernet.inherit(Images().eval(), InheritConfig(heads=heads, budget=UniformRank(4)))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRankModule) and module.gated:
                module.gate.weight.normal_()  # heads that do something
                module.up.add_(torch.randn_like(module.up) / 4)
    return model


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    teacher = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50)).eval()
    ids = torch.randint(1, 50, (2, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [4]])).long()
    return inhernet.inherit(teacher, InheritConfig(budget=UniformRatio(0.5))), {
        "input_ids": ids,
        "attention_mask": mask,
    }


@pytest.mark.parametrize("heads", [1, 3])
def test_plain_is_the_same_without_our_modules(heads):
    model = inherited(heads)
    plain = formats.plain(model)
    assert not any(isinstance(module, LowRankModule) for module in plain.modules())
    assert any(isinstance(module, LowRankModule) for module in model.modules())
    torch.testing.assert_close(plain(images()), model(images()), rtol=1e-4, atol=1e-5)
    layer = inhernet.nn.GatedLowRankLinear(8, 6, 3, 2)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(formats.plain(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
def test_onnx(heads, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    difference = formats.export_onnx(inherited(heads), tmp_path / "net.onnx", images())
    assert difference < 1e-4
    shape = onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_param  # the number of examples is free
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_onnx_of_an_encoder(tmp_path):
    pytest.importorskip("onnxscript")
    model, inputs = bert()
    assert formats.export_onnx(model, tmp_path / "net.onnx", inputs) < 1e-4
    import onnxruntime

    names = {value.name for value in onnxruntime.InferenceSession(str(tmp_path / "net.onnx")).get_inputs()}
    assert names == set(inputs)


def test_a_program_runs_without_inhernet(tmp_path):
    model = inherited(3)
    assert formats.export_program(model, tmp_path / "net.pt2", images()) < 1e-5
    torch.save((images(5), model(images(5)).detach()), tmp_path / "pair.pt")
    code = (
        f"import sys, torch; x, y = torch.load({str(tmp_path / 'pair.pt')!r})\n"
        f"z = torch.export.load({str(tmp_path / 'net.pt2')!r}).module()(x)\n"
        "print(float((z - y).norm() / y.norm()) < 1e-5, 'inhernet' in sys.modules, 'inherit_kernels' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


def language_model(heads: int = 1, exclude: tuple[str, ...] = ("lm_head",), tied: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {"num_key_value_heads": 2, "vocab_size": 50, "attention_bias": True, "tie_word_embeddings": tied}
    teacher = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **options)).eval()
    return inhernet.inherit(teacher, InheritConfig(heads=heads, budget=UniformRatio(0.5), exclude=exclude))


@pytest.mark.parametrize("tied", [False, True])
def test_lowrankarena(tied, tmp_path):
    """The tensors have the names and shapes that its runtime builds modules for, and its modules give the same output."""
    model, inputs = (
        language_model(tied=tied, exclude=() if tied else ("lm_head",)),
        {"input_ids": torch.arange(2, 14).view(2, 6)},
    )
    assert formats.export_lowrankarena(model, tmp_path / "arena", inputs) < 1e-5
    config = json.loads((tmp_path / "arena" / "config.json").read_text())
    tensors = load_file(tmp_path / "arena" / "model.safetensors")
    assert config["low_rank_schema"] == "ABLinear"
    assert config["auto_map"]["AutoConfig"] == "configuration_lowrank_llama.LowRankLlamaConfig"
    assert set(config["low_rank_modules"]) == {layer.name for layer in model.inhernet_plan.factorised}
    name, spec = next(iter(config["low_rank_modules"].items()))
    assert tensors[f"{name}.ALinear.weight"].shape == (32, spec["rank"])
    assert tensors[f"{name}.BLinear.weight"].shape == (spec["rank"], 32)
    assert tensors[f"{name}.ALinear.bias"].shape == (32,)
    assert ("lm_head.weight" in tensors) is not tied


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: inherited(1), "model is Images; LowRankArena runs LlamaForCausalLM"),
        (lambda: language_model(heads=2), "has a gate"),
        (lambda: language_model(exclude=()), "'lm_head' is outside of the inner model"),
    ],
)
def test_what_lowrankarena_cannot_run_is_refused(make, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        formats.export_lowrankarena(make(), tmp_path / "arena", {"input_ids": torch.ones(2, 3, dtype=torch.long)})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(ValueError, match="holds something"):
        formats.export_lowrankarena(
            language_model(), tmp_path / "full", {"input_ids": torch.ones(2, 3, dtype=torch.long)}
        )
    assert not (tmp_path / "arena").exists()


@pytest.mark.parametrize("heads", [1, 3])
def test_a_model_that_looks_at_its_layers_weight_is_exported(heads, tmp_path):
    """transformers' ViT asks its patch embedding for `projection.weight.dtype`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4)
    model = inhernet.inherit(transformers.ViTModel(config).eval(), InheritConfig(heads=heads, budget=UniformRatio(0.5)))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRankModule) and module.gated:
                module.gate.weight.normal_()  # no dense weight equals it
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert formats.export_program(model, tmp_path / "net.pt2", inputs) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("what", [1, 3, "bert"])
def test_a_compiled_package_runs_without_inhernet(what, tmp_path):
    model, inputs = bert() if what == "bert" else (inherited(what), images())
    assert formats.export_aoti(model, tmp_path / "net.pt2", inputs) < 1e-4


@pytest.mark.slow
def test_openvino_reads_the_onnx_file(tmp_path):
    openvino = pytest.importorskip("openvino")
    model = inherited(3)
    formats.export_onnx(model, tmp_path / "net.onnx", images())
    code = (
        f"import openvino, numpy; net = openvino.compile_model({str(tmp_path / 'net.onnx')!r}, 'CPU')\n"
        f"numpy.save({str(tmp_path / 'out.npy')!r}, net(numpy.load({str(tmp_path / 'in.npy')!r}))[0])"
    )
    import numpy

    assert openvino is not None
    numpy.save(tmp_path / "in.npy", images(3).numpy())
    subprocess.run([sys.executable, "-c", code], check=True)
    found = torch.from_numpy(numpy.load(tmp_path / "out.npy"))
    torch.testing.assert_close(found, model(images(3)).detach(), rtol=1e-2, atol=1e-2)


def test_dense_is_the_network_that_it_equals():
    model = inhernet.inherit(Images().eval(), InheritConfig(heads=2, budget=UniformRank(4)))  # gates still at zero
    dense = formats.to_dense(model)
    assert [type(module) for module in dense.children()] == [nn.Conv2d, nn.Conv2d, nn.BatchNorm2d, nn.Linear]
    torch.testing.assert_close(dense(images()), model(images()), rtol=1e-4, atol=1e-5)
    assert not hasattr(dense, "inhernet_plan")
    with pytest.raises(ValueError, match=r"layer 'first'.*depends on the input"):
        formats.to_dense(inherited(3))


def test_a_file_that_computes_something_else_is_not_written(tmp_path):
    model = inherited(1)
    (tmp_path / "net.pt2").write_text("the earlier one")
    with pytest.raises(ValueError, match="away from the model"):
        compare.check(lambda x: [model(x) * 1.01], model, images(), "the file")
    with pytest.raises(ValueError, match="shapes"):
        compare.check(lambda x: [model(x)[:1]], model, images(), "the file")
    with pytest.raises(RuntimeError), atomic.file(tmp_path / "net.pt2") as path:
        path.write_text("half of it")
        raise RuntimeError
    assert (tmp_path / "net.pt2").read_text() == "the earlier one"
    assert len(list(tmp_path.iterdir())) == 1


def test_from_a_shell(tmp_path, capsys):
    pytest.importorskip("onnxscript")
    assert main(["convert", "inhernet.models:resnet20", "--rank", "8", "--out", str(tmp_path / "model")]) == 0
    for kind, name in (("onnx", "net.onnx"), ("dense", "net.safetensors")):
        command = ["export", str(tmp_path / "model"), "--format", kind, "--out", str(tmp_path / name)]
        assert main(command) == 0
        assert "written to" in capsys.readouterr().out
        assert main(command) == 2
        assert "--overwrite" in capsys.readouterr().err
    from safetensors.torch import load_file

    inhernet.models.resnet20(num_classes=100).load_state_dict(load_file(tmp_path / "net.safetensors"), strict=False)
