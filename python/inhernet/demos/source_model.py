"""A small language model of Python's own sources, compressed without training: `inhernet demo lm`.

The teacher (a Llama of 2.9 M parameters over 2,048 byte pairs) is trained here, once; then converted at several budgets
and judged by perplexity on files it has not seen, and on everyday English, which is nothing like them.
"""

from __future__ import annotations

import json
import math
import random
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inhernet

from ..console import progress, say, table
from .everyday_sentences import EVERYDAY_SENTENCES

VOCABULARY, LENGTH, BATCH = 2048, 128, 16
TEACHER = "teacher"


@dataclass(frozen=True)
class Text:
    """Rows of tokens `[S, LENGTH]`: to train on, to judge by (other files of the same library), and of another kind."""

    train: Tensor
    held_out: Tensor
    everyday: Tensor


@dataclass(frozen=True)
class Row:
    """One network: perplexity (per token) on held-out sources and on everyday sentences."""

    name: str
    layer_params: int
    params: int
    sources: float
    everyday: float
    seconds: float


def run(
    output_dir: str | Path,
    fractions: Sequence[float] = (0.8, 0.6, 0.4),
    minutes: float = 13.0,
    samples: int = 2048,
    seed: int = 0,
) -> list[Row]:
    """Train the teacher (or take the one of an earlier run), convert it at each fraction with and without refinement.

    Args:
        output_dir: keeps the teacher, the tokenizer and the figures.
        fractions: shares of the parameters of the blocks' linear layers.
        minutes: of training, where there is no teacher yet.
        samples: rows of calibration, of 128 tokens.
        seed: of the weights and of the order of the text.

    Returns:
        The teacher's row, then two per fraction.

    Raises:
        ModuleNotFoundError: transformers is missing.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = sources(folder, seed)
    teacher = load_teacher(folder, text, minutes, seed)
    calibration = [{"input_ids": rows} for rows in text.train[:samples].split(BATCH)]
    rows = [_row("teacher", teacher, text, 0.0)]
    shared: inhernet.Plan | None = None
    for fraction in fractions:
        config = inhernet.InheritConfig(
            budget=inhernet.ParamBudget(fraction), rules={r"re:model\.layers\..*": {}, "_default": None}, seed=seed
        )
        planned = shared = (
            inhernet.plan(teacher, config, calibration, _logits)
            if shared is None
            else inhernet.plan(teacher, config, statistics=shared)
        )
        for refine in (False, True):
            started = time.perf_counter()
            model = inhernet.inherit(teacher, planned, refine=refine)
            seconds = time.perf_counter() - started
            rows.append(_row(f"{fraction:.0%}{', refined' * refine}", model, text, seconds))
    (folder / "figures.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    _print(rows)
    return rows


def sources(folder: Path, seed: int) -> Text:
    """The standard library as tokens of a byte-pair code that is made of it (and kept in `folder`)."""
    try:
        from tokenizers import ByteLevelBPETokenizer, Tokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs transformers: pip install 'inherit-kernels[hf]'") from error
    files = sorted(_library_files())
    random.Random(seed).shuffle(files)
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    if not (folder / "tokenizer.json").exists():
        made = ByteLevelBPETokenizer()
        made.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
        made.save(str(folder / "tokenizer.json"))
    code = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def rows(parts: Sequence[str]) -> Tensor:
        ids = torch.tensor([i for encoded in code.encode_batch(list(parts)) for i in encoded.ids])
        return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    held = max(1, len(texts) // 20)
    train = rows(texts[held:])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Text(train[order], rows(texts[:held])[:256], rows([" ".join(EVERYDAY_SENTENCES)]))


def _library_files() -> Iterator[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        if not {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.relative_to(library).parts):
            yield path


def load_teacher(folder: Path, text: Text, minutes: float, seed: int) -> nn.Module:
    """The trained language model, from `folder` where it is, else trained now for so many minutes and written there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / TEACHER / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(folder / TEACHER).eval()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=224, intermediate_size=608, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    _train(model, text.train, 60 * minutes)
    aside = folder / f".{TEACHER}"
    model.save_pretrained(aside)
    aside.rename(folder / TEACHER)
    return model.eval()


def _train(model: nn.Module, rows: Tensor, seconds: float) -> None:
    """AdamW for a time, warm-up and cosine decay over it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    started, batches = time.monotonic(), rows.split(BATCH)
    step, where = 0, 0.0
    model.train()
    with progress("training the teacher", 1000) as bar:
        while where < 1.0:
            decay = 0.02 + 0.98 * math.cos(math.pi * where / 2) ** 2
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * decay
            loss = _loss(model, batches[step % len(batches)])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step, before, where = step + 1, where, (time.monotonic() - started) / seconds
            bar.advance(int(1000 * min(where, 1.0)) - int(1000 * before), f"loss {float(loss.detach()):.3f}")
    say(f"teacher: {step:,} steps of {BATCH * LENGTH:,} tokens")


def _loss(model: Any, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _logits(output: Any) -> Tensor:
    return output.logits


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    """`exp` of the mean negative log-likelihood per token, each row on its own."""
    losses = [(float(_loss(model, part)), len(part)) for part in rows.split(BATCH)]
    return math.exp(sum(loss * size for loss, size in losses) / len(rows))


def _row(name: str, model: nn.Module, text: Text, seconds: float) -> Row:
    plan: Any = getattr(model, "inhernet_plan", None)
    layers: Any = getattr(model.get_submodule("model"), "layers")  # noqa: B009  (mypy takes it for a tensor)
    kept = sum(p.numel() for p in layers.parameters()) if plan is None else plan.selected_params[0]
    counts = (kept, sum(p.numel() for p in model.parameters()))
    return Row(name, *counts, perplexity(model, text.held_out), perplexity(model, text.everyday), seconds)


def _print(rows: list[Row]) -> None:
    first = rows[0]
    cells = [
        (r.name, f"{r.layer_params:,}", f"{r.params:,}", f"{r.sources:.2f}", f"{r.sources / first.sources:.2f}",
         f"{r.everyday:.1f}", f"{r.everyday / first.everyday:.2f}", f"{r.seconds:.1f}")
        for r in rows
    ]  # fmt: skip
    columns = (
        "network",
        "linear layers",
        "all",
        "perplexity, sources",
        "× teacher",
        "everyday",
        "× teacher",
        "seconds",
    )
    table("A language model of Python's sources, converted without training", columns, cells)
