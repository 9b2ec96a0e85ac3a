"""What transformers' own saving does to an inherited model."""

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


def bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50)), {
        "input_ids": torch.randint(0, 50, (2, 7))
    }


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
