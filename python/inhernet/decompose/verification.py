"""`verify`: what of the teacher survived in the inherited model, output by output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..console import progress
from .batches import call, device_of, floating_outputs, model_inputs, token_masks, undisturbed
from .rows import (
    batches_of,
    class_targets,
    counted,
    decided,
    length_of,
    not_finite,
    nothing_counted,
    target_of,
    trouble,
)
from .text import text_table


@dataclass(frozen=True)
class OutputReport:
    """One output tensor: `cosine` is the mean over rows, `relative_error` is `‖model − teacher‖ / ‖teacher‖` over
    everything.

    Rows are vectors along the last dimension, padded tokens and rows with the label −100 left out. `kl` (nats per row,
    KL(teacher ‖ model) of the softmax) and `agreement` (same argmax) only for classifier outputs: a bare `[B, C]`
    tensor, or one named "logits". `nonfinite` and `teacher_nonfinite` count the rows with a NaN or an infinity: a figure
    that such a row enters is NaN or infinite.
    """

    name: str
    rows: int
    cosine: float
    relative_error: float
    kl: float | None = None
    agreement: float | None = None
    nonfinite: int = 0
    teacher_nonfinite: int = 0


@dataclass(frozen=True)
class Report:
    """What `verify` measured. `accuracy` and `teacher_accuracy` where the loader gave integer labels for logits.

    `trouble` is one sentence on outputs that are not finite and whose they are, empty if all are.
    """

    outputs: tuple[OutputReport, ...]
    params: int
    teacher_params: int
    accuracy: float | None = None
    teacher_accuracy: float | None = None

    def __getitem__(self, name: str) -> OutputReport:
        for output in self.outputs:
            if output.name == name:
                return output
        raise KeyError(f"report has no output {name!r}; it has {', '.join(o.name for o in self.outputs)}")

    @property
    def trouble(self) -> str:
        found = []
        for o in self.outputs:
            found += [
                (f"the model's {o.name!r}", o.nonfinite, o.rows),
                (f"the teacher's {o.name!r}", o.teacher_nonfinite, o.rows),
            ]
        return trouble(found)

    def __str__(self) -> str:
        def shown(value: float | None) -> str:
            return "" if value is None else f"{value:.4f}"

        rows = [
            (o.name, o.rows, shown(o.cosine), shown(o.relative_error), shown(o.kl), shown(o.agreement))
            for o in self.outputs
        ]
        lines = [text_table(("output", "rows", "cosine", "relative error", "KL", "agreement"), rows)]
        lines.append(f"parameters: {self.params:,} of {self.teacher_params:,}")
        if self.accuracy is not None:
            lines.append(f"accuracy: {self.accuracy:.4f}, teacher {self.teacher_accuracy:.4f}")
        if self.trouble:
            lines.append(self.trouble)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Tally:
    classifier: bool
    rows: int = 0
    cosine: float = 0.0
    error: float = 0.0
    norm: float = 0.0
    kl: float = 0.0
    agree: float = 0.0
    nonfinite: int = 0
    teacher_nonfinite: int = 0


def verify(
    model: nn.Module, teacher: nn.Module, loader: Iterable[Any], output_fn: Callable[[Any], Any] | None = None
) -> Report:
    """Run both models in evaluation mode over the same batches and compare every floating output.

    Args:
        model, teacher: called alike; flags and buffers are as before afterwards.
        loader: batches as for `plan`, read once; `(inputs, labels)` or a mapping's `labels`, integers one per row of
            the first output's logits, add accuracies; −100 leaves a row out.
        output_fn: what of the output to compare, e.g. `lambda out: out.last_hidden_state`.

    Returns:
        The figures. Outputs that are not finite do not raise: see `Report.trouble`.

    Raises:
        TypeError: the loader is a single batch.
        ValueError: no rows, labels that are no classes (with the batch's number), or outputs that do not correspond.

    Example:
        >>> teacher = nn.Linear(4, 3)
        >>> verify(teacher, teacher, [torch.randn(8, 4)])["output"].agreement
        1.0
    """
    tallies: dict[str, _Tally] = {}
    hits, teacher_hits, labelled, seen = 0.0, 0.0, 0, 0
    batches = batches_of(loader)
    with undisturbed(model), undisturbed(teacher), torch.no_grad(), progress("verify", length_of(loader)) as bar:
        for number, batch in batches:
            ours, theirs = (_outputs(net, batch, output_fn) for net in (model, teacher))
            if [(n, t.shape) for n, t in ours] != [(n, t.shape) for n, t in theirs] or not ours:
                raise ValueError(
                    f"outputs do not correspond: model gives {[(n, tuple(t.shape)) for n, t in ours]}, "
                    f"teacher {[(n, tuple(t.shape)) for n, t in theirs]}; pass output_fn= to pick comparable ones"
                )
            masks = token_masks(model_inputs(batch, theirs[0][1].device))
            labels = _labels(batch, *theirs[0], number)
            for (name, a), (_, b) in zip(ours, theirs, strict=True):
                tally = tallies.setdefault(name, _Tally(classifier=_is_logits(name, b)))
                a, b, wanted = _judged(a, b, masks, labels)
                _compare(tally, a, b)
                if wanted is not None:
                    hits += float(decided(a, wanted).sum())
                    teacher_hits += float(decided(b, wanted).sum())
                    labelled += len(wanted)
                labels = None  # they belong to the first output
            seen += theirs[0][1].shape[:-1].numel()
            bar.advance()
    if not any(tally.rows for tally in tallies.values()):
        raise nothing_counted(seen)
    accuracies = (hits / labelled, teacher_hits / labelled) if labelled else (None, None)
    counts = [sum(p.numel() for p in net.parameters()) for net in (model, teacher)]
    return Report(tuple(_report(name, tally) for name, tally in tallies.items()), *counts, *accuracies)


def _outputs(net: nn.Module, batch: Any, output_fn: Callable[[Any], Any] | None) -> list[tuple[str, Tensor]]:
    output = call(net, model_inputs(batch, device_of(net)))
    return floating_outputs(output if output_fn is None else output_fn(output))


def _is_logits(name: str, tensor: Tensor) -> bool:
    return name == "logits" or (name == "output" and tensor.dim() == 2 and tensor.shape[1] > 1)


def _labels(batch: Any, name: str, logits: Tensor, number: int) -> Tensor | None:
    """The batch's labels `[P]` if they are class indices for these logits."""
    labels = target_of(batch)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not _is_logits(name, logits):
        return None
    if labels.shape != logits.shape[:-1]:
        return None
    try:
        return class_targets(labels, logits)
    except ValueError as error:
        raise ValueError(f"batch {number}: {error}") from error


def _judged(
    ours: Tensor, theirs: Tensor, masks: list[Tensor], labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows that count, `[P, C]` in float64, of both outputs, and their labels."""
    if ours.dim() == 1:
        ours, theirs = ours.unsqueeze(-1), theirs.unsqueeze(-1)
    labels = None if labels is None else labels.to(ours.device)
    keep = counted(ours, masks, labels)
    a, b = (t.to(ours.device).reshape(-1, t.shape[-1])[keep].double() for t in (ours, theirs))
    return a, b, None if labels is None else labels[keep]


def _compare(tally: _Tally, a: Tensor, b: Tensor) -> None:
    tally.rows += len(a)
    tally.nonfinite += int(not_finite(a).sum())
    tally.teacher_nonfinite += int(not_finite(b).sum())
    tally.cosine += float(torch.cosine_similarity(a, b, dim=-1).sum())
    tally.error += float((a - b).square().sum())
    tally.norm += float(b.square().sum())
    if tally.classifier:
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        tally.kl += float((p.exp() * (p - q)).sum())
        tally.agree += float(decided(a, b).sum())


def _report(name: str, tally: _Tally) -> OutputReport:
    def mean(total: float) -> float:
        return total / tally.rows if tally.rows else math.nan

    if tally.norm == 0:
        error = 0.0 if tally.error == 0 else math.inf
    else:
        error = (tally.error / tally.norm) ** 0.5
    return OutputReport(
        name,
        tally.rows,
        mean(tally.cosine),
        error,
        kl=mean(tally.kl) if tally.classifier else None,
        agreement=mean(tally.agree) if tally.classifier else None,
        nonfinite=tally.nonfinite,
        teacher_nonfinite=tally.teacher_nonfinite,
    )
