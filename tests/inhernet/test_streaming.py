"""Checkpoints converted a layer at a time are those of the conversion in memory, bit for bit, however often it was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import inhernet
from inhernet import EnergyBudget, InheritConfig, UniformRatio
from inhernet.cli import main
from inhernet.decompose.plans import weights_hash
from inhernet.streaming import convert, convert_stream

transformers = pytest.importorskip("transformers", reason="no transformers: no checkpoint was streamed")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {**SMALL, "num_key_value_heads": 2, "vocab_size": 50}
HALF = InheritConfig(budget=UniformRatio(0.5))


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":  # transposed weights, opened; a tied head
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config)
    if kind == "vit":  # names that are converted while they are loaded
        return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4))
    if kind == "mixtral":  # experts apart in the files, in one tensor in memory
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=3, head_dim=8))
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.1)
        return model
    if kind == "resnet":  # convolutions, and buffers
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"}
        return transformers.ResNetModel(transformers.ResNetConfig(**sizes))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def saved(kind: str, folder: Path, **options: object) -> Path:
    make(kind).save_pretrained(folder / kind, **options)
    return folder / kind


def loaded(kind: str, folder: Path) -> nn.Module:
    inhernet.register()
    return type(make(kind)).from_pretrained(folder).eval()


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "vit", "resnet"])
def test_it_is_the_conversion_in_memory(kind, heads, tmp_path):
    source = saved(kind, tmp_path, max_shard_size="30KB")
    config = InheritConfig(budget=UniformRatio(0.6), heads=heads)
    plan = convert_stream(source, tmp_path / "out", config, shard_bytes=20_000)
    teacher = loaded(kind, source)
    assert plan.teacher_hash == weights_hash(teacher)
    same(loaded(kind, tmp_path / "out"), inhernet.inherit(teacher, config))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert not (tmp_path / "out.streaming").exists()


def test_dtype_and_other_files_stay(tmp_path):
    make("llama").bfloat16().save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    convert_stream(tmp_path / "llama", tmp_path / "out", HALF)
    tensors = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_it_goes_on(number, tmp_path, monkeypatch):
    """The child holds still before its third shard, so that the signal finds two finished."""
    source = saved("llama", tmp_path)
    code = (
        "import signal, sys, time; from inhernet.streaming import convert, convert_stream; import inhernet\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "real, seen = convert.save_file, []\n"
        "def slow(*args, **options):\n"
        "    seen.append(1); len(seen) > 2 and (print('here', flush=True), time.sleep(60)); real(*args, **options)\n"
        "convert.save_file = slow\n"
        f"config = inhernet.InheritConfig(budget=inhernet.UniformRatio(0.5))\n"
        f"convert_stream({str(source)!r}, {str(tmp_path / 'out')!r}, config, shard_bytes=8_000)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "here\n"
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode != 0
    assert not (tmp_path / "out").exists()
    kept = sorted((tmp_path / "out.streaming").glob("shard-*"))
    assert len(kept) == 2
    (kept[0]).write_bytes(b"damaged")  # is made again
    written = []
    real = convert.save_file
    monkeypatch.setattr(convert, "save_file", lambda *a, **k: written.append(1) or real(*a, **k))
    convert_stream(source, tmp_path / "out", HALF, shard_bytes=8_000)
    assert len(written) == len(list((tmp_path / "out").glob("*.safetensors"))) - 1
    same(loaded("llama", tmp_path / "out"), inhernet.inherit(loaded("llama", source), HALF))


def test_shards_of_another_run_are_not_taken(tmp_path):
    source = saved("llama", tmp_path)
    convert_stream(source, tmp_path / "a", HALF, shard_bytes=8_000)
    shutil.copytree(tmp_path / "a", tmp_path / "b.streaming")
    for path in (tmp_path / "b.streaming").glob("model-*"):
        path.rename(path.with_name(f"shard-{int(path.name[6:11]) - 1:05}.safetensors"))
    other = InheritConfig(budget=UniformRatio(0.4))
    convert_stream(source, tmp_path / "b", other, shard_bytes=8_000)
    same(loaded("llama", tmp_path / "b"), inhernet.inherit(loaded("llama", source), other))


def test_two_processes_share_the_work(tmp_path):
    source = saved("gpt2", tmp_path)
    command = [sys.executable, "-m", "inhernet", "convert", f"hf:{source}", "--stream", "--ratio", "0.5"]
    command += ["--out", str(tmp_path / "out")]
    port = 20_000 + os.getpid() % 20_000
    both = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    children = [
        subprocess.Popen(
            command, env={**both, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    said = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert "8 of" in said[0][0]
    assert said[1][0] == ""
    same(loaded("gpt2", tmp_path / "out"), inhernet.inherit(loaded("gpt2", source), HALF))


def test_every_shard_has_one_owner(tmp_path, monkeypatch):
    """Each of two processes makes its own half."""
    source = saved("llama", tmp_path)
    made: list[str] = []
    real = convert.Piece.convert
    monkeypatch.setattr(convert.Piece, "convert", lambda self, *a: made.append(self.name) or real(self, *a))
    monkeypatch.setattr(convert, "_wait", lambda processes: None)
    counts = []
    for rank in (1, 0):  # the first one puts everything together
        monkeypatch.setattr(convert, "_processes", lambda rank=rank: (rank, 2))
        convert_stream(source, tmp_path / "out", HALF, shard_bytes=8_000)
        counts.append(len(made))
    assert counts[0] > 5
    assert counts[1] - counts[0] > 5
    assert len(made) == len(set(made))
    same(loaded("llama", tmp_path / "out"), inhernet.inherit(loaded("llama", source), HALF))


def test_memory_holds_a_part_only(tmp_path):
    """A checkpoint of 300 MB: what the process holds at most grows by less than a fifth of it."""
    layers, size = 24, 1024
    config = transformers.LlamaConfig(hidden_size=size, intermediate_size=2 * size, num_hidden_layers=layers, vocab_size=64,
                                      num_attention_heads=8, num_key_value_heads=1)  # fmt: skip
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    for number in range(4):
        part = {n: torch.randn(s, dtype=torch.bfloat16) for i, (n, s) in enumerate(shapes.items()) if i % 4 == number}
        save_file(part, tmp_path / f"part{number}.safetensors", metadata={"format": "pt"})
    where = {name: f"part{i % 4}.safetensors" for i, name in enumerate(shapes)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    code = (
        "import resource, inhernet; from inhernet.streaming import convert_stream, source\n"
        f"from pathlib import Path; source.skeleton(Path({str(tmp_path)!r}))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); config = inhernet.InheritConfig(budget=inhernet.UniformRank(8), init='random')\n"
        f"convert_stream({str(tmp_path)!r}, {str(tmp_path / 'out')!r}, config, shard_bytes=2**20)\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert total > 290e6
    assert int(done.stdout) < total / 5


WRONG = {
    "init": (InheritConfig(init="fisher"), "init is 'fisher'.*through a network that is on disk"),
    "budget": (InheritConfig(budget=EnergyBudget(0.9)), "budget is EnergyBudget.*UniformRank or UniformRatio"),
    "allocation": (InheritConfig(allocation="fisher"), "allocation is 'fisher'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_needs_the_network_is_refused(what, tmp_path):
    config, words = WRONG[what]
    with pytest.raises(ValueError, match=words):
        convert_stream(saved("llama", tmp_path), tmp_path / "out", config)


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    source = saved("llama", tmp_path)
    file = source / "model.safetensors"
    good = load_file(file)

    def refused(words: str, tensors: dict[str, torch.Tensor], error: type[Exception] = ValueError) -> None:
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(error, match=words):
            convert_stream(source, tmp_path / "out", HALF)
        assert not (tmp_path / "out").exists()

    name = "model.layers.1.mlp.up_proj.weight"
    refused(f"{name}' holds NaN", {**good, name: torch.full((64, 32), float("nan"))})
    refused(f"{name}' has shape .7, 32., expected .64, 32", {**good, name: torch.zeros(7, 32)})
    refused(f"has no '{name}' of LlamaForCausalLM", {key: value for key, value in good.items() if key != name})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "gone.safetensors"}}))
    refused("gone.safetensors is missing", good, FileNotFoundError)
    (source / "model.safetensors.index.json").unlink()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="neither .* nor model.safetensors; pickles"):
        convert_stream(source, tmp_path / "out", HALF)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        convert_stream(tmp_path, tmp_path / "out", HALF)


def test_nothing_is_overwritten_unasked(tmp_path):
    source = saved("llama", tmp_path)
    with pytest.raises(ValueError, match="another directory than the source"):
        convert_stream(source, source, HALF)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files"):
            convert_stream(source, tmp_path / "mine", HALF, overwrite=overwrite)
    convert_stream(source, tmp_path / "out", HALF)
    with pytest.raises(ValueError, match="an earlier result .overwrite replaces it"):
        convert_stream(source, tmp_path / "out", HALF)
    convert_stream(source, tmp_path / "out", HALF, overwrite=True)
    with pytest.raises(ValueError, match="inherited already"):
        convert_stream(tmp_path / "out", tmp_path / "again", HALF)


def test_the_command(tmp_path, capsys):
    source = saved("llama", tmp_path)
    command = ["convert", f"hf:{source}", "--stream", "--out", str(tmp_path / "out")]
    assert main([*command, "--ratio", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "22 of 23 layers factorised" in shown
    assert "AutoModel.from_pretrained" in shown
    for words, more in (
        ("--data is given beside", ["--data", "digits"]),
        ("budget is EnergyBudget", ["--energy", "0.5"]),
    ):
        assert main([*command, "--overwrite", *more]) == 2
        assert words in capsys.readouterr().err
    assert main(["convert", "inhernet.models:resnet20", "--stream", "--out", str(tmp_path / "x")]) == 2
    assert "expected hf:DIR with --stream" in capsys.readouterr().err
