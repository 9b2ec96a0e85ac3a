"""Text and images on disk as DATA: read by the teacher's own tokenizer and image processor, mistakes named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import inhernet
from inhernet.cli import main, sources
from inhernet.cli.usage import UsageError

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = ["the", "small", "network", "inherits", "from", "its", "teacher", "and", "keeps", "what", "it", "knows"]


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    directory = tmp_path / "encoder"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(directory)
    transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=20)).save_pretrained(directory)
    return f"hf:{directory}"


def sentences(count: int = 60) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [
        " ".join(WORDS[int(i)] for i in torch.randint(0, 12, (5 + n % 9,), generator=generator)) for n in range(count)
    ]


def write(folder: Path, suffix: str, lines: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"id": 3, "text": line}) for line in lines) + "\n\n")
    elif suffix == ".csv":
        path.write_text("label,text\n" + "\n".join(f'1,"{line}, so"' for line in lines))
    else:
        path.write_text("\n\n".join(lines))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl", ".csv"])
def test_text_of_each_kind(encoder, tmp_path, suffix):
    path = write(tmp_path / "texts", suffix, sentences())
    parts = sources.text(str(path), encoder)
    counts = {name: sum(len(batch["input_ids"]) for batch in batches) for name, batches in parts.items()}
    assert counts["val"] == 3
    assert counts["train"] + counts["val"] == len(set(sentences()))
    assert all(batch["attention_mask"].any(1).all() for batch in parts["train"])
    assert sources.text(str(path.parent), encoder)["train"][0]["input_ids"].equal(parts["train"][0]["input_ids"])


def test_a_network_is_converted_and_judged_with_it(encoder, tmp_path, capsys):
    data = ["--data", f"text:{write(tmp_path / 'texts', '.txt', sentences(200))}"]
    out = str(tmp_path / "model")
    assert main(["convert", encoder, *data, "--budget", "0.5", "--refine-steps", "5", "--out", out]) == 0
    assert "encoder.layer.1" in capsys.readouterr().out
    assert main(["eval", out, "--teacher", encoder, *data]) == 0
    assert "cosine" in capsys.readouterr().out
    assert inhernet.load(out).inhernet_plan.factorised
    assert (
        main(
            [
                "sweep",
                encoder,
                *data,
                "--shares",
                "0.5",
                "--no-refine",
                "--seconds",
                "0.01",
                "--out",
                str(tmp_path / "s"),
            ]
        )
        == 0
    )


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    directory = tmp_path / "classifier"
    torch.manual_seed(0)
    names = {0: "light", 1: "dark"}
    config = transformers.ViTConfig(
        **SMALL, image_size=16, patch_size=4, num_labels=2, id2label=names, label2id={v: k for k, v in names.items()}
    )
    transformers.ViTForImageClassification(config).save_pretrained(directory)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(directory)
    return f"hf:{directory}"


def pictures(folder: Path, names: tuple[str, ...] = ("light", "dark")) -> Path:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = torch.randint(0, 256, (20, 24, 3), generator=generator).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / name / f"{number}.{'png' if number % 2 else 'jpg'}")
    return folder


def test_images_with_labels_where_folders_are_classes(classifier, tmp_path):
    parts = sources.images(str(pictures(tmp_path / "a")), classifier)
    batch = parts["train"][0]
    assert batch["pixel_values"].shape == (23, 3, 16, 16)
    assert set(batch["labels"].tolist()) == {0, 1}
    assert "labels" not in sources.images(str(pictures(tmp_path / "b", ("cats", "dogs"))), classifier)["train"][0]
    out = str(tmp_path / "model")
    named = ["--data", f"images:{tmp_path / 'a'}"]
    assert main(["convert", classifier, *named, "--budget", "0.5", "--no-refine", "--out", out]) == 0
    assert main(["eval", out, "--teacher", classifier, *named]) == 0


def test_mistakes_are_named(encoder, classifier, tmp_path):
    empty, bad = write(tmp_path / "empty", ".txt", [""]), tmp_path / "bad.jsonl"
    bad.write_text('{"text": "one"}\n{"text": ')
    picture = tmp_path / "pictures" / "broken.png"
    picture.parent.mkdir()
    picture.write_bytes(b"no image")
    (picture.parent / "second.png").write_bytes(b"neither")
    for call, words in [
        (lambda: sources.text(str(tmp_path / "none.txt"), encoder), "there is no"),
        (lambda: sources.text(str(empty), encoder), "holds 0 samples"),
        (lambda: sources.text(str(bad), encoder), "line 2, is no JSON"),
        (lambda: sources.text(str(picture), encoder), "expected a file or a folder of .txt"),
        (lambda: sources.text(str(write(tmp_path / "t", ".txt", sentences())), "mine:net"), "needs a teacher hf:DIR"),
        (lambda: sources.text(str(write(tmp_path / "t", ".txt", sentences())), classifier), "no tokenizer"),
        (lambda: sources.images(str(picture.parent), classifier), "cannot be read as an image"),
        (lambda: sources.images(str(tmp_path / "empty"), classifier), "expected a file or a folder of .png"),
    ]:
        with pytest.raises(UsageError, match=words):
            call()
