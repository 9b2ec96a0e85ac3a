"""Networks of the transformers library convert, run, save and load (random weights: structure and numerics only)."""

from __future__ import annotations

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
