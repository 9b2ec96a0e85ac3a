"""The real sentence encoder, converted without training. Small here; the published figures are in the slow test."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from inhernet import RefineConfig
from inhernet.demos import minilm

needs_encoder = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", minilm.ENCODER_PACKAGE)),
    reason="transformers or the encoder package is not installed: the MiniLM figures are not proven",
)


@needs_encoder
def test_half_of_the_encoder_keeps_its_embeddings(tmp_path, capsys):
    torch.set_num_threads(min(2, torch.get_num_threads()))
    sizes = {"sentences": 96, "refining": 96, "held_out": 48}
    row, refined = minilm.run(tmp_path, (0.5,), **sizes, save=False, refine=RefineConfig(steps=10))
    # 96 sentences: 0.85 and 0.75 measured. The slow test below uses the demo's thousands.
    assert row.docstrings > 0.82
    assert row.everyday > 0.70
    assert refined.docstrings > row.docstrings
    assert refined.everyday > row.everyday - 0.01
    assert row.encoder_params <= 0.5 * 10_646_784
    assert "MiniLM, converted without training" in capsys.readouterr().out


@needs_encoder
@pytest.mark.slow
def test_published_figures(tmp_path):
    rows = minilm.run(tmp_path, save=False)
    least = (0.96, 0.98, 0.89, 0.955, 0.78, 0.91), (0.94, 0.96, 0.84, 0.895, 0.69, 0.81)
    for row, docstrings, everyday in zip(rows, *least, strict=True):
        assert row.docstrings >= docstrings
        assert row.everyday >= everyday


def test_docstring_sentences():
    text = minilm.docstring_sentences()
    assert len(text) > 5000
    assert len(set(text)) == len(text)
    assert text == minilm.docstring_sentences()
    assert not set(text) & set(minilm.EVERYDAY_SENTENCES)
    assert all(6 <= len(sentence.split()) <= 40 for sentence in text)


def test_random_words_spare_special_tokens_and_padding():
    ids = torch.tensor([[101, 5000, 6000, 7000, 102, 0, 0]]).repeat(50, 1)
    batches = [{"input_ids": ids, "attention_mask": (ids > 0).long()} for _ in range(4)]
    noisy = minilm.with_random_words(batches, 0.5, 30522, seed=0)
    changed = [not torch.equal(batch["input_ids"], ids) for batch in noisy]
    assert changed == [False, True, False, True]
    special = ids < minilm.FIRST_WORD
    assert all(torch.equal(batch["input_ids"][special], ids[special]) for batch in noisy)
    swapped = float((noisy[1]["input_ids"] != ids)[~special].float().mean())
    assert 0.35 < swapped < 0.65


def test_neighbour_overlap():
    points = torch.eye(12) + 0.1 * torch.rand(12, 12, generator=torch.Generator().manual_seed(0))
    points = torch.nn.functional.normalize(points, dim=1)
    assert minilm.neighbour_overlap(points, points, 3) == 1.0
    assert minilm.neighbour_overlap(points, points.flip(0), 3) < 1.0
