"""Networks of the transformers library convert, run, save and load (random weights: structure and numerics only)."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref

import pytest
import torch

import inhernet

transformers = pytest.importorskip("transformers", reason="no transformers: its networks were not converted")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4)), {
        "pixel_values": torch.randn(2, 3, 16, 16)
    }


def clip():
    config = transformers.CLIPVisionConfig(**SMALL, image_size=16, patch_size=4)
    return transformers.CLIPVisionModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def t5():
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    ids = torch.randint(1, 50, (2, 7))
    return transformers.T5Model(config), {"input_ids": ids, "decoder_input_ids": ids}


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=50)
    return transformers.LlamaModel(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50)), {
        "input_ids": torch.randint(0, 50, (2, 7))
    }


@pytest.mark.parametrize("build", [vit, clip, t5, llama, bert], ids=lambda build: build.__name__)
def test_convert_run_save_load(build, tmp_path):
    torch.manual_seed(0)
    teacher, inputs = build()
    teacher.eval()
    config = inhernet.InheritConfig(budget=inhernet.UniformRatio(0.5))
    model = inhernet.inherit(teacher, inhernet.plan(teacher, config))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in teacher.parameters())
    with torch.no_grad():
        expected, actual = teacher(**inputs)[0], model(**inputs)[0]
        assert actual.shape == expected.shape
        assert actual.isfinite().all()
        inhernet.save(model, tmp_path / "model")
        torch.testing.assert_close(inhernet.load(tmp_path / "model")(**inputs)[0], actual)


def test_save_pretrained_says_what_it_loses(tmp_path):
    # from_pretrained builds the dense class; that the replaced layers come back random was said by nobody.
    model = inhernet.inherit(bert()[0], inhernet.InheritConfig(budget=inhernet.UniformRatio(0.5)))
    inhernet.save(model, tmp_path / "ours")
    for variant in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), inhernet.load(tmp_path / "ours")):
        with pytest.warns(UserWarning, match="from_pretrained will not bring.*BertModel.*13 inherited.*inhernet.save"):
            variant.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bert()[0].save_pretrained(tmp_path / "dense")
    # No cycle: the memory is free without the garbage collector.
    reference = weakref.ref(variant)
    del variant
    assert reference() is None


def test_gpt2_says_that_it_stays_dense():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*8 × transformers' Conv1D.*1 × tied"):
        inhernet.inherit(model)


def test_experts_are_listed():
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, vocab_size=50, num_local_experts=4)
    plan = inhernet.plan(transformers.MixtralForCausalLM(config))
    experts = [layer for layer in plan if "experts" in layer.name and layer.kind == "other"]
    linear = [layer for layer in plan if "experts" in layer.name and layer.kind == "linear"]
    assert linear or (experts and all("4 experts in one tensor" in layer.reason for layer in experts))
