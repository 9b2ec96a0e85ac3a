"""Refinement block by block: factors that follow the teacher's blocks on what the inherited network itself computes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import atomic
from ..config import RefineConfig
from ..console import Steps, progress
from ..fingerprint import contents
from ..layers import open_layers
from ..nn import LowRankModule
from .batches import device_of, undisturbed
from .blocks import Call, blocks_of, call_of, order_of, without_cache
from .levels import levels_to_visit, visiting
from .pieces import Piece, TooFew, pieces_of, rows_of
from .sensitivity import Judge, sensitivities
from .text import text_table


@dataclass(frozen=True)
class BlockReport:
    """One block. Errors are `‖model − teacher‖ / ‖teacher‖` at the network's output, before and after the block was
    refined, on held-out calibration data and on data that it is not like (words in another order, images laid over each
    other); `why` says why a block kept what it had."""

    name: str
    layers: int
    steps: int
    held_out: tuple[float, float]
    elsewhere: tuple[float, float]
    why: str | None = None


@dataclass(frozen=True)
class Refinement:
    """What `refine_blocks` did, block by block in the order of the forward."""

    blocks: tuple[BlockReport, ...]
    seconds: float

    @property
    def table(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """Columns and rows for a reader."""

        def change(pair: tuple[float, float]) -> str:
            return f"{pair[0]:.4f} → {pair[1]:.4f}" if math.isfinite(pair[0]) else ""

        rows: list[tuple[object, ...]] = [
            (b.name, b.layers, b.steps, change(b.held_out), change(b.elsewhere), b.why or "") for b in self.blocks
        ]
        return ("block", "layers", "steps", "error, held out", "error, other data", "kept as it was"), rows

    @property
    def outcome(self) -> str:
        """One sentence."""
        changed = sum(block.why is None for block in self.blocks)
        return f"{changed} of {len(self.blocks)} blocks refined in {self.seconds:.1f} s; errors of the network's output"

    def __str__(self) -> str:
        return f"{text_table(*self.table, left=(0, 5))}\n{self.outcome}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def refine_blocks(
    model: nn.Module,
    teacher: nn.Module,
    calibration: Iterable[Any],
    config: RefineConfig | None = None,
    output_fn: Callable[[Any], Any] | None = None,
) -> Refinement:
    """Adjust the factors of an inherited model, in place, so that each block's output is closer to the teacher's.

    Block after block in the order of the forward: its input is what the inherited network computes so far, its target the
    output t of the teacher's block on the teacher's own input, its loss `‖R (y − t)‖² / ‖R t‖²` over real positions with
    `RᵀR = G + I`, G the second moment of the gradients there of random projections of the network's output: errors count by
    how much the output feels them. Adam on the factors, gates and biases of its low-rank layers and on the layers that the
    budget left dense (MiniLM at 50 %: cosine 0.953 → 0.956 with these); norms, and layers that were not selected, stay. No
    labels, no gradient through more than one block. A block with which the network's error would rise, on held-out batches
    or on data unlike the calibration data, keeps what it had.

    Args:
        model: made by `inhernet.inherit` from `teacher`; flags are as before afterwards.
        teacher: the dense network with the same module names; untouched.
        calibration: batches as for `plan`; what the blocks are called with is kept in memory.
        config: steps, learning rate, time, seed.
        output_fn: what of the network's output to preserve, as for `plan`.

    Returns:
        What happened to each block.

    Raises:
        ValueError: nothing is low-rank, fewer than 2 samples, a batch that does not reach a block that the first reaches.

    Source: output reconstruction on the compressed network's own inputs is SVD-LLM's and AA-SVD's idea; the cut into
    blocks, the guard and the ranks that it starts from are ours. Figures: docs/keeping_more.md.

    Example:
        >>> teacher = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        >>> data = [torch.randn(64, 32)]
        >>> model = inhernet.inherit(teacher, calibration=data, refine=False)  # doctest: +SKIP
        >>> print(refine_blocks(model, teacher, data, RefineConfig(steps=100)))  # doctest: +SKIP
    """
    config = config or RefineConfig()
    started = time.monotonic()
    layers = [name for name, module in model.named_modules() if isinstance(module, LowRankModule)]
    if not layers:
        raise ValueError("model has no low-rank layer to refine; make it with inhernet.inherit")
    teacher = open_layers(teacher, layers)
    pieces = pieces_of(calibration, device_of(model), config.seed)
    saved = None
    if config.state is not None:
        settings = [config.steps, config.lr, config.seconds, config.seed, str(model.__dict__.get("inhernet_levels"))]
        parts = [settings, model.state_dict(), teacher.state_dict(), [piece.inputs for piece in pieces]]
        saved = _Saved(config.state, contents(parts))
    with undisturbed(model), undisturbed(teacher), without_cache(model, teacher), torch.inference_mode(False):
        with torch.no_grad():
            order, refused = order_of(model, blocks_of(model, layers), pieces[0].inputs)
        streams = _Streams(model, teacher, pieces)
        judge = Judge(model, teacher, pieces, output_fn)
        metrics = sensitivities(teacher, list(order), pieces, output_fn, config.seed)
        reports: list[BlockReport] = []
        with progress("refine", len(order) * config.steps) as bar, _told(config.state):
            for index, (name, follows) in enumerate(order.items()):
                streams.enter(name, follows)
                block = _Block(name, streams, metrics.get(name), judge)
                report = saved.restore(index, block) if saved else None
                if report is None:
                    left = None
                    if config.seconds is not None:
                        left = (config.seconds - (time.monotonic() - started)) / (len(order) - index)
                    report = block.refine(config.steps, config.lr, left, config.seed + index, bar)
                    if saved:
                        saved.write(index, block, report)
                else:
                    bar.advance(config.steps)
                reports.append(report)
    nothing = (math.nan, math.nan)
    reports += [BlockReport(name, _low_rank(model, name), 0, nothing, nothing, why) for name, why in refused.items()]
    return Refinement(tuple(reports), time.monotonic() - started)


def refined_if(
    model: nn.Module,
    teacher: nn.Module,
    calibration: Iterable[Any] | None,
    refine: RefineConfig | bool,
    output_fn: Callable[[Any], Any] | None,
) -> Refinement | None:
    """What `refine=` of `inherit`, `elastic` and `restore` means: True refines where it can, a configuration must be able to."""
    if not refine or calibration is None:
        return None
    try:
        return refine_blocks(model, teacher, calibration, None if refine is True else refine, output_fn)
    except TooFew:
        if refine is not True:
            raise  # asked for; by default a single sample, which planning has warned of, is simply not refined on
        return None


@contextmanager
def _told(state: str | None) -> Iterator[None]:
    """Ctrl-C says where the finished blocks are."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if state is not None:
            stop.args, stop.path = (f"stopped; finished blocks are in {state}",), state  # type: ignore[attr-defined]
        raise


def _low_rank(model: nn.Module, name: str) -> int:
    return sum(isinstance(module, LowRankModule) for module in model.get_submodule(name).modules())


class _Streams:
    """What the current block is called with, for every piece, in both networks (at each level of an elastic one); and the
    teacher's outputs."""

    def __init__(self, model: nn.Module, teacher: nn.Module, pieces: list[Piece]) -> None:
        self.model, self.teacher, self.pieces = model, teacher, pieces
        self.levels = levels_to_visit(model)
        plan: Any = getattr(model, "inhernet_plan", None)
        self.left_dense = set() if plan is None else {layer.name for layer in plan.selected if layer.rank is None}
        self.name: str | None = None
        self.calls: dict[int | None, list[Call]] = {}
        self.teacher_calls: list[Call] = []
        self.targets: list[Tensor] = []

    @torch.no_grad()
    def enter(self, name: str, follows: int | None) -> None:
        """Move on to the next block: from the last one's outputs where its call follows from them, else by running both
        networks up to it."""
        if self.name is None or follows is None:
            self.calls, self.teacher_calls = {}, []
            for level in self.levels:
                with visiting(self.model, level):
                    self.calls[level] = [call_of(self.model, name, piece.inputs) for piece in self.pieces]
            self.teacher_calls = [call_of(self.teacher, name, piece.inputs) for piece in self.pieces]
        else:
            before = self.model.get_submodule(self.name)
            for level in self.levels:
                with visiting(self.model, level):
                    self.calls[level] = [call.with_input(call.on(before), follows) for call in self.calls[level]]
            pairs = zip(self.teacher_calls, self.targets, strict=True)
            self.teacher_calls = [call.with_input(target, follows) for call, target in pairs]
        self.name = name
        block = self.teacher.get_submodule(name)
        self.targets = [call.on(block) for call in self.teacher_calls]


class _Block:
    """One block of the model, with its data, while it is refined."""

    def __init__(self, name: str, streams: _Streams, metric: Tensor | None, judge: Judge) -> None:
        self.name, self.metric, self.judge = name, metric, judge
        self.block = streams.model.get_submodule(name)
        self.model, self.levels = streams.model, streams.levels
        self.calls, self.targets, self.pieces = streams.calls, streams.targets, streams.pieces
        self.layers = _low_rank(streams.model, name)
        below = self.block.named_modules(prefix=name)
        modules = [m for n, m in below if isinstance(m, LowRankModule) or n in streams.left_dense]
        self.parameters = [parameter for module in modules for parameter in module.parameters()]

    def refine(self, steps: int, lr: float, seconds: float | None, seed: int, bar: Steps) -> BlockReport:
        old = [parameter.detach().clone() for parameter in self.parameters]
        try:
            with _in_float32(self.block):
                taken, why = self._train(steps, lr, seconds, seed, bar)
        except BaseException:
            self._put_back(old)
            raise
        before = after = self.judge.now
        if why is None:
            after = self.judge.errors()
            why = _worse(before, after)
        if why is None:
            self.judge.now = after
        else:
            self._put_back(old)
        held_out, elsewhere = ((before[role], after[role]) for role in ("held out", "elsewhere"))
        return BlockReport(self.name, self.layers, taken, held_out, elsewhere, why)

    @torch.no_grad()
    def _put_back(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def _train(self, steps: int, lr: float, seconds: float | None, seed: int, bar: Steps) -> tuple[int, str | None]:
        """Steps taken, and why the result is not to be used (None: it may be)."""
        generator, order = torch.Generator().manual_seed(seed), list[int]()
        train = [i for i, piece in enumerate(self.pieces) if piece.role == "train"]
        optimizer = torch.optim.Adam(self.parameters, lr=lr)
        started, where, taken = time.monotonic(), 0.0, 0
        with torch.enable_grad(), _requiring_grad(self.parameters):
            while where < 1.0:
                order = order or [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
                optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * where)) / 2
                index, error = order.pop(), 0.0
                optimizer.zero_grad()
                chosen = _sandwich(self.levels, generator)
                for level in chosen:
                    with visiting(self.model, level):
                        y, target = self._pair(level, index)
                        if y.shape != target.shape:
                            return taken, f"it computes {len(y)} rows where the teacher's block computes {len(target)}"
                        loss = _relative(y, target) / len(chosen)
                        if not loss.requires_grad:
                            return taken, "its output does not depend on its low-rank layers"
                        loss.backward()
                    error += float(loss.detach())
                if not math.isfinite(error):
                    return taken, "its loss became NaN or infinite"
                optimizer.step()
                taken += 1
                bar.advance(1, f"{self.name}  error {error**0.5:.4f}")
                spent = 0.0 if seconds is None else (time.monotonic() - started) / max(seconds, 1e-9)
                where = max(taken / steps, spent)
        bar.advance(steps - taken)
        return taken, None

    def _pair(self, level: int | None, index: int) -> tuple[Tensor, Tensor]:
        """The block's output and the teacher's on one piece: rows of real positions, in float32 or better."""
        y = rows_of(self.calls[level][index].in_float32().on(self.block), self.pieces[index].masks)
        target = rows_of(self.targets[index], self.pieces[index].masks).to(y.dtype)
        return (y, target) if self.metric is None else (y @ self.metric.to(y), target @ self.metric.to(y))


def _sandwich(levels: list[int | None], generator: torch.Generator) -> list[int | None]:
    """The largest, the smallest, and one between."""
    if len(levels) < 3:
        return levels
    return [levels[0], levels[int(torch.randint(1, len(levels) - 1, (1,), generator=generator))], levels[-1]]


def _relative(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum() / target.square().sum().clamp_min(torch.finfo(target.dtype).tiny)


def _worse(before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    for role, what in (("held out", "held-out"), ("elsewhere", "other")):
        if not after[role] <= before[role]:
            return f"the network's error on {what} data would rise ({before[role]:.4f} → {after[role]:.4f})"
    return None


@contextmanager
def _requiring_grad(parameters: list[nn.Parameter]) -> Iterator[None]:
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@contextmanager
def _in_float32(block: nn.Module) -> Iterator[None]:
    """A block of half precision is refined in float32 and rounded once, at the end: Adam's last steps are smaller than a
    bfloat16 unit."""
    tensors = [t for t in (*block.parameters(), *block.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    kinds = [tensor.dtype for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, kind in zip(tensors, kinds, strict=True):
            tensor.data = tensor.data.to(kind)


class _Saved:
    """Finished blocks on disk, each in a file that tells which run it belongs to."""

    def __init__(self, directory: str | os.PathLike[str], identity: str) -> None:
        self.directory, self.identity = Path(directory), identity

    def _path(self, index: int) -> Path:
        return self.directory / f"block-{index:04}.safetensors"

    def write(self, index: int, block: _Block, report: BlockReport) -> None:
        tensors = {str(number): p.detach().cpu().contiguous() for number, p in enumerate(block.parameters)}
        with atomic.file(self._path(index)) as aside:
            save_file(tensors, aside, metadata={"identity": self.identity, "report": json.dumps(asdict(report))})

    @torch.no_grad()
    def restore(self, index: int, block: _Block) -> BlockReport | None:
        """The report of a block that this very run has finished, its factors put back; None if there is none."""
        try:
            with safe_open(self._path(index), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != self.identity:
                    return None
                tensors = [file.get_tensor(str(number)) for number in range(len(block.parameters))]
            known = json.loads(metadata["report"])
        except (OSError, SafetensorError, ValueError, KeyError):
            return None  # not there, or damaged: the block is refined again
        for parameter, tensor in zip(block.parameters, tensors, strict=True):
            parameter.copy_(tensor)
        pairs = {key: (known[key][0], known[key][1]) for key in ("held_out", "elsewhere")}
        report = BlockReport(**{**known, **pairs})
        kept = int(report.why is None)
        block.judge.now = {"held out": report.held_out[kept], "elsewhere": report.elsewhere[kept]}
        return report
