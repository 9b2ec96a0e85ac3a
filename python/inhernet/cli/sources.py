"""Data as people have it: text and images on disk, read as the teacher's own tokenizer or image processor reads them."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .usage import UsageError

TEXTS = (".txt", ".md", ".jsonl", ".csv")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# Samples taken at most, evenly; to calibrate and refine; the share that is held out to judge by.
MOST, CALIBRATION, JUDGED = 16384, 4096, 20
BATCH, TOKENS = 32, 128


def text(path: str, teacher: str | None) -> dict[str, list[Any]]:
    """Batches of tokens of a file (a sample a line of .txt and .md, a record of .jsonl, a row of .csv), or of a folder of
    these, by the tokenizer in the teacher's directory, 128 tokens at most.

    Raises:
        UsageError: no such file, none of these kinds, fewer than two samples, a teacher without a tokenizer.
    """
    samples = _spread([sample for file in _files(path, TEXTS, "text:") for sample in _samples(file)], path, "text:")
    transformers, directory = _transformers(teacher, "text:")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"DATA is 'text:{path}', but {directory!r} holds no tokenizer that can be read: {error}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    most = min(TOKENS, tokenizer.model_max_length)

    def batches(part: list[str]) -> list[Any]:
        lengths = [len(ids) for ids in tokenizer(part, truncation=True, max_length=most)["input_ids"]]
        ordered = [part[i] for i in sorted(range(len(part)), key=lengths.__getitem__) if lengths[i] > 1]
        options = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}
        return [dict(tokenizer(ordered[i : i + BATCH], **options)) for i in range(0, len(ordered), BATCH)]

    return _parts(samples, batches)


def images(path: str, teacher: str | None) -> dict[str, list[Any]]:
    """Batches of the images in a folder and its subfolders, by the image processor in the teacher's directory; labels where
    every subfolder has the name of one of the teacher's classes.

    Raises:
        UsageError: no folder, no images in it, an image that cannot be read, a teacher without an image processor.
    """
    files = _spread(_files(path, IMAGES, "images:"), path, "images:")
    transformers, directory = _transformers(teacher, "images:")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(directory, local_files_only=True)
        classes = transformers.AutoConfig.from_pretrained(directory, local_files_only=True).label2id
    except (OSError, ValueError) as error:
        raise UsageError(
            f"DATA is 'images:{path}', but {directory!r} holds no image processor that can be read: {error}"
        ) from error
    labelled = all(file.parent.name in classes for file in files)

    def batch(part: list[Path]) -> Any:
        import torch

        found = dict(processor([_image(file) for file in part], return_tensors="pt"))
        if labelled:
            found["labels"] = torch.tensor([classes[file.parent.name] for file in part])
        return found

    return _parts(files, lambda part: [batch(part[i : i + BATCH]) for i in range(0, len(part), BATCH)])


def _image(file: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UsageError(f"{file} cannot be read as an image: {error}") from error


def _transformers(teacher: str | None, kind: str) -> tuple[Any, str]:
    if teacher is None or not teacher.startswith("hf:"):
        raise UsageError(
            f"DATA is {kind}…, which the teacher's own files read: it needs a teacher hf:DIR, not {teacher!r}"
        )
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{kind} needs transformers: pip install 'inherit-kernels[hf]'") from error
    return transformers, teacher.removeprefix("hf:")


def _files(path: str, suffixes: tuple[str, ...], kind: str) -> list[Path]:
    place = Path(path)
    if not place.exists():
        raise UsageError(f"DATA is '{kind}{path}', but there is no {path!r}")
    found = sorted(file for file in place.rglob("*") if file.suffix.lower() in suffixes) if place.is_dir() else [place]
    if not found or any(file.suffix.lower() not in suffixes for file in found):
        raise UsageError(f"DATA is '{kind}{path}', expected a file or a folder of {', '.join(suffixes)}")
    return found


def _samples(file: Path) -> Iterator[str]:
    """The texts of a file: "text", or the first string, of a record."""
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        if file.suffix.lower() == ".csv":
            for row in csv.DictReader(lines):
                yield row.get("text") or next((value for value in row.values() if isinstance(value, str)), "")
            return
        for number, line in enumerate(lines, 1):
            if file.suffix.lower() != ".jsonl" or not line.strip():
                yield line.strip()
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{file}, line {number}, is no JSON: {error}") from error
            values = [record] if isinstance(record, str) else list(record.values()) if isinstance(record, dict) else []
            named = record.get("text") if isinstance(record, dict) else None
            yield named if isinstance(named, str) else next((value for value in values if isinstance(value, str)), "")


def _spread(samples: list[Any], path: str, kind: str) -> list[Any]:
    """At most `MOST` of the samples that hold something, in a fixed random order."""
    kept = list(dict.fromkeys(sample for sample in samples if not isinstance(sample, str) or sample.strip()))
    if len(kept) < 2:
        raise UsageError(
            f"DATA is '{kind}{path}', which holds {len(kept)} samples, expected 2 at least (256 varied ones serve)"
        )
    random.Random(0).shuffle(kept)
    return kept[:MOST]


def _parts(samples: list[Any], batches: Any) -> dict[str, list[Any]]:
    held = max(1, len(samples) // JUDGED)
    train = samples[held:]
    return {"train": batches(train), "calibration": batches(train[:CALIBRATION]), "val": batches(samples[:held])}
