"""The plan: every layer with its rank or its reason, editable, on disk as JSON beside the moments it needs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checks import is_number
from ..config import InheritConfig
from .calibration import Key
from .factorise import Factors, Moments
from .layers import LayerPlan
from .text import share, text_table

PLAN_VERSION = 1
_KINDS = {"teacher_hash": str, "model_params": int, "config": dict, "matches": dict, "layers": list}
PLAN_FILE, STATISTICS_FILE = "plan.json", "statistics.safetensors"


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the parameters (buffers may drift, weights may not)."""
    return hash_of(sorted(model.named_parameters(), key=lambda pair: pair[0]))


def hash_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """`weights_hash` of a model's parameters, given in the order of their names, one at a time."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name}|{parameter.dtype}|{tuple(parameter.shape)}|".encode())
        data = parameter.detach().cpu().contiguous().reshape(-1)
        if data.numel():
            digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class Plan:
    """What `inherit` will do, layer by layer. Nothing has been changed yet.

    `plan["encoder.layer.0.output.dense"].rank = 16` edits a layer (None keeps it dense); `print(plan)` shows the table;
    `save`/`load` carry it, with the calibration's second moments, to another process. `teacher_hash` ties it to the
    weights it was made for. `model_params` counts the whole dense model. `matches` says how many layers each pattern
    hit. `effects`: how much more than its spectrum says the output felt of each layer's loss, where that was measured.
    """

    layers: list[LayerPlan]
    config: InheritConfig
    teacher_hash: str
    model_params: int
    matches: dict[str, int] = field(default_factory=dict)
    statistics: dict[Key, Moments] | None = None
    effects: dict[str, float] = field(default_factory=dict)
    # In memory only: factors and times already computed, and the batches that BatchNorm is re-estimated from and blocks are
    # refined on.
    factors: dict[str, tuple[str, Factors]] = field(default_factory=dict, repr=False, compare=False)
    calibration: Iterable[Any] | None = field(default=None, repr=False, compare=False)
    output_fn: Callable[[Any], Any] | None = field(default=None, repr=False, compare=False)
    times: dict[Any, list[tuple[int, float]]] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"plan has no layer {name!r}; it has {', '.join(layer.name for layer in self.layers[:4])}, …")

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def factorised(self) -> list[LayerPlan]:
        """The layers that will be replaced."""
        return [layer for layer in self.layers if layer.rank is not None]

    @property
    def selected(self) -> list[LayerPlan]:
        """The layers the budget and the rules are about, replaced or not."""
        return [layer for layer in self.layers if layer.selected or layer.rank is not None]

    @property
    def selected_params(self) -> tuple[int, int]:
        """Parameters of the selected layers: after, before."""
        return sum(layer.params for layer in self.selected), sum(layer.dense_params for layer in self.selected)

    @property
    def total_params(self) -> tuple[int, int]:
        """Parameters of the whole model: after, before."""
        after, before = self.selected_params
        return self.model_params - before + after, self.model_params

    @property
    def advice(self) -> list[str]:
        """What a reader of the plan should know of its ranks, a sentence each."""
        odd = sum(layer.rank % 8 > 0 for layer in self.factorised if layer.rank and layer.rank > 8)
        if not odd:
            return []  # a rank below 8 is that of a layer too small for more
        # H200: BERT at 50 % in 7.07 ms with ranks as they come, in 2.73 with multiples of 64.
        of = f"{odd} of {len(self.factorised)} ranks are no multiples of 8"
        return [f"{of}, which is slow on a GPU (a BERT took 2.6 times as long): for one, plan with device='cuda'"]

    def __str__(self) -> str:
        columns = (
            "layer",
            "shape",
            "rank",
            "break-even",
            "heads",
            "init",
            "dense",
            "inherited",
            "share",
            "kept",
            "stays dense",
        )
        table = text_table(columns, [_row(layer) for layer in self.layers], left=(0, 1, 10))
        selected, whole = self.selected_params, self.total_params
        lines = [
            table,
            f"{len(self.factorised)} of {len(self.layers)} layers factorised",
            f"selected layers: {selected[0]:,} of {selected[1]:,} parameters ({share(*selected)})",
            f"whole model:     {whole[0]:,} of {whole[1]:,} parameters ({share(*whole)})",
        ]
        lines += self.advice
        lines += [f"{key}: {count} of {len(self.layers)} layers" for key, count in self.matches.items()]
        return "\n".join(lines)

    def check(self) -> None:
        """Raise ValueError if an edit made a layer impossible (or, with the guard on, not worth it)."""
        for layer in self.layers:
            layer.check(guard=self.config.break_even)

    def bare(self) -> Plan:
        """A copy without statistics, factors and data: what a converted model carries."""
        layers = [LayerPlan.from_dict(layer.to_dict()) for layer in self.layers]
        matches, effects = dict(self.matches), dict(self.effects)
        return Plan(layers, self.config, self.teacher_hash, self.model_params, matches, effects=effects)

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": PLAN_VERSION,
            "teacher_hash": self.teacher_hash,
            "model_params": self.model_params,
            "config": self.config.to_dict(),
            "matches": dict(self.matches),
            "effects": dict(self.effects),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_dict`. Raises ValueError naming what is missing or wrong."""
        if not isinstance(data, dict) or data.get("version") != PLAN_VERSION:
            version = data.get("version") if isinstance(data, dict) else data
            raise ValueError(f"plan: version is {version!r}, expected {PLAN_VERSION} (the format this release writes)")
        for key, kind in _KINDS.items():
            if not isinstance(data.get(key), kind) or isinstance(data[key], bool):
                raise ValueError(f"plan: {key!r} is {_short(data.get(key))}, expected {kind.__name__}")
        layers = [LayerPlan.from_dict(layer) for layer in data["layers"]]
        config = InheritConfig.from_dict(data["config"])
        effects = data.get("effects", {})  # plans of older versions have none
        if not isinstance(effects, dict) or not all(is_number(value) and value > 0 for value in effects.values()):
            raise ValueError(f"plan: 'effects' is {_short(effects)}, expected positive numbers by layer")
        matches = dict(data["matches"])
        return cls(layers, config, data["teacher_hash"], data["model_params"], matches, effects=dict(effects))

    def to_json(self, indent: int | None = 1) -> str:
        """Everything but statistics and data."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`. Raises ValueError for anything else."""
        try:
            return cls.from_dict(json.loads(text))
        except RecursionError as error:
            raise ValueError("plan: nested too deep to be a plan") from error

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `plan.json` and, with statistics, `statistics.safetensors`; each is written aside and renamed.

        Raises:
            ValueError: the directory holds a model, whose own `plan.json` would be lost and with it the model, or files of
                these names that are not ours.
        """
        folder = self.check_target(directory)
        folder.mkdir(parents=True, exist_ok=True)
        data = self.to_dict()
        statistics = folder / STATISTICS_FILE
        if self.statistics is not None:
            tensors = _flatten(self.statistics)
            # The stamp ties the two files: a save interrupted between the renames is noticed, not believed.
            data["statistics"] = _stamp(tensors)
            aside = folder / f".{STATISTICS_FILE}.{os.getpid()}"
            save_file(tensors, aside, metadata={"stamp": data["statistics"]})
            os.replace(aside, statistics)
        aside = folder / f".{PLAN_FILE}.{os.getpid()}"
        aside.write_text(json.dumps(data, indent=1), encoding="utf-8")
        os.replace(aside, folder / PLAN_FILE)
        if self.statistics is None:
            statistics.unlink(missing_ok=True)

    @staticmethod
    def check_target(directory: str | os.PathLike[str]) -> Path:
        """Where `save` would write. Raises ValueError where a model, or a file that is not ours, would be lost."""
        folder = Path(directory)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"directory {folder} is a file, expected a directory")
        if (folder / "config.json").exists():
            raise ValueError(f"directory {folder} holds a model, which would not load with this plan; give another one")
        for name, ours in ((PLAN_FILE, _is_plan), (STATISTICS_FILE, _is_statistics)):
            if (folder / name).exists() and not ours(folder / name):
                raise ValueError(
                    f"{folder / name} is not what inhernet wrote and would be lost; give another directory"
                )
        return folder

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no `plan.json` there.
            ValueError: another format, damaged files (the statistics' hash is in `plan.json`), or statistics of another
                plan. Statistics that were removed are no error here: `inherit` says which layers need them.
        """
        folder = Path(directory)
        try:
            text = (folder / PLAN_FILE).read_text(encoding="utf-8")
            plan, stamp = cls.from_json(text), json.loads(text).get("statistics")
        except ValueError as error:
            raise ValueError(f"{folder / PLAN_FILE} is damaged or not a plan: {error}") from error
        if stamp and (folder / STATISTICS_FILE).exists():
            plan.statistics = _read_statistics(folder / STATISTICS_FILE, stamp)
        return plan


def _read_statistics(path: Path, stamp: str) -> dict[Key, Moments]:
    try:
        tensors = load_file(path)
        if _stamp(tensors) == stamp:
            return _unflatten(tensors)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    raise ValueError(f"{path} is damaged, or belongs to another plan (an interrupted save?); save the plan again")


def _is_plan(path: Path) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "teacher_hash" in data


def _is_statistics(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return "stamp" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _row(layer: LayerPlan) -> tuple[object, ...]:
    shape = "×".join(str(n) for n in layer.shape)
    if layer.kernel_size is not None:
        shape += f" ({layer.kernel_size[0]}×{layer.kernel_size[1]})"
    even = "" if layer.fixed else layer.break_even
    head = (layer.name or "(model)", shape)
    if layer.rank is None:
        return (*head, "dense", even, "", "", f"{layer.dense_params:,}", f"{layer.params:,}", "", "", layer.reason)
    kept = "" if layer.kept is None else f"{layer.kept:.3f}"
    heads = f"{layer.heads}{' gated' if layer.gate else ''}"
    counts = (f"{layer.dense_params:,}", f"{layer.params:,}", share(layer.params, layer.dense_params))
    return (*head, layer.rank, even, heads, layer.init, *counts, kept, "")


def _flatten(statistics: dict[Key, Moments]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for (name, init), moments in statistics.items():
        tensors[f"{name}|{init}|inputs"] = moments.inputs.contiguous()
        if moments.outputs is not None:
            tensors[f"{name}|{init}|outputs"] = moments.outputs.contiguous()
        tensors[f"{name}|{init}|means"] = torch.tensor([moments.input_mean, moments.output_mean], dtype=torch.float64)
    return tensors


def _unflatten(tensors: dict[str, Tensor]) -> dict[Key, Moments]:
    statistics = {}
    for key, tensor in tensors.items():
        name, init, part = key.rsplit("|", 2)
        if part == "inputs":
            means = tensors[f"{name}|{init}|means"].tolist()
            statistics[name, init] = Moments(tensor, means[0], tensors.get(f"{name}|{init}|outputs"), means[1])
    return statistics


def _stamp(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key}|{tuple(tensors[key].shape)}|".encode())
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
