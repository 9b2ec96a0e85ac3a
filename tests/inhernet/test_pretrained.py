"""transformers saves and loads inherited models itself: bit for bit, in a fresh process, in its Trainer, for generation."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import inhernet
from inhernet import InheritConfig, UniformRatio
from inhernet.nn import LowRankModule

transformers = pytest.importorskip("transformers", reason="no transformers: its own saving was not proven")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


@pytest.fixture(autouse=True)
def registered() -> None:
    torch.manual_seed(0)
    inhernet.register()
    inhernet.register()  # again does nothing


def make(kind: str) -> nn.Module:
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()
    if kind == "gpt2":  # opened: its layers are no linear ones
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32)
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=3)
        model = transformers.MixtralForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1)
        return model
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)).eval()


def ids() -> torch.Tensor:
    return torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(1))


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(a(ids())[0], b(ids())[0])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mixtral"])
def test_what_it_saves_it_loads_bit_for_bit(kind, heads, tmp_path):
    model = inhernet.inherit(make(kind), InheritConfig(heads=heads, budget=UniformRatio(0.6)))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "inhernet"
    assert not hasattr(model.config, "quantization_config")
    auto = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert sum(isinstance(m, LowRankModule) for m in loaded.modules()) == len(model.inhernet_plan.factorised)
    same(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    same(auto.from_pretrained(tmp_path / "again"), model)
    inhernet.save(loaded, tmp_path / "ours")
    same(inhernet.load(tmp_path / "ours"), model)


def test_copies_save_themselves(tmp_path):
    model = inhernet.inherit(make("bert"), InheritConfig(budget=UniformRatio(0.5)))
    inhernet.save(model, tmp_path / "ours")
    others = {
        "copy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "ours": inhernet.load(tmp_path / "ours"),
    }
    for name, other in others.items():
        with torch.no_grad():
            other.embeddings.word_embeddings.weight[0] += 1  # what is saved is the copy, not what it was copied from
        other.save_pretrained(tmp_path / name / "theirs") if name != "ours" else other.save_pretrained(
            tmp_path / "theirs"
        )
        found = transformers.AutoModel.from_pretrained(tmp_path / ("theirs" if name == "ours" else f"{name}/theirs"))
        same(found, other)
    reference = weakref.ref(other)
    others.clear()
    del other, found
    assert reference() is None  # no cycle: the memory is free without the garbage collector


def test_a_fresh_process_needs_one_call(tmp_path):
    model = inhernet.inherit(make("llama"), InheritConfig(budget=UniformRatio(0.5)))
    model.save_pretrained(tmp_path / "model")
    torch.save(model(ids()).logits.detach(), tmp_path / "logits.pt")
    code = (
        "import sys, torch, inhernet, transformers; inhernet.register()\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
        f"ids = torch.tensor({ids().tolist()})\n"
        f"print(torch.equal(model(ids).logits, torch.load({str(tmp_path / 'logits.pt')!r})))\n"
        "print(model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1])"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "10"]


def test_dtypes_as_asked_for(tmp_path):
    model = inhernet.inherit(make("llama"), InheritConfig(budget=UniformRatio(0.5)))
    model.save_pretrained(tmp_path)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.float().parameters()} == {torch.float32}


def test_the_trainer_trains_and_resumes_from_its_checkpoint(tmp_path):
    pytest.importorskip("accelerate")
    model = inhernet.inherit(make("llama"), InheritConfig(budget=UniformRatio(0.5)))
    model.save_pretrained(tmp_path / "start")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 50, (16, 7))]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    transformers.Trainer(model=loaded, args=arguments, train_dataset=data).train()
    saved = transformers.AutoModelForCausalLM.from_pretrained(Path(tmp_path / "out" / "checkpoint-4"))
    same(saved.eval(), loaded.eval())
    assert not torch.equal(saved.model.layers[0].mlp.up_proj.down, model.model.layers[0].mlp.up_proj.down)


def test_dense_models_are_left_alone(tmp_path):
    make("bert").save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
