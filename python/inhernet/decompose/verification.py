"""`verify`: what of the teacher survived in the inherited model, output by output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..console import progress
from .batches import call, device_of, floating_outputs, model_inputs, real_rows, reusable, token_masks, undisturbed
from .text import text_table


@dataclass(frozen=True)
class OutputReport:
    """One output tensor: `cosine` is the mean over rows, `relative_error` is `‖model − teacher‖ / ‖teacher‖` over
    everything.

    Rows are vectors along the last dimension, padded tokens left out. `kl` (nats per row, KL(teacher ‖ model) of the
    softmax) and `agreement` (same argmax) only for classifier outputs: a bare `[B, C]` tensor, or one named "logits".
    """

    name: str
    rows: int
    cosine: float
    relative_error: float
    kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Report:
    """What `verify` measured. `accuracy` and `teacher_accuracy` where the loader gave integer labels for logits."""

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
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Tally:
    rows: int = 0
    cosine: float = 0.0
    error: float = 0.0
    norm: float = 0.0
    kl: float = 0.0
    agree: int = 0
    classifier: bool = False


def verify(
    model: nn.Module, teacher: nn.Module, loader: Iterable[Any], output_fn: Callable[[Any], Any] | None = None
) -> Report:
    """Run both models in evaluation mode over the same batches and compare every floating output.

    Args:
        model, teacher: called alike; flags and buffers are as before afterwards.
        loader: batches as for `plan`; `(inputs, labels)` with integer labels adds accuracies.
        output_fn: what of the output to compare, e.g. `lambda out: out.last_hidden_state`.

    Raises:
        ValueError: no batches, or outputs that do not correspond.

    Example:
        >>> teacher = nn.Linear(4, 3)
        >>> verify(teacher, teacher, [torch.randn(8, 4)])["output"].agreement
        1.0
    """
    tallies: dict[str, _Tally] = {}
    hits = teacher_hits = labelled = 0
    loader = reusable(loader, "loader")
    with undisturbed(model), undisturbed(teacher), torch.no_grad(), progress("verify") as bar:
        for batch in loader:
            ours, theirs = (_outputs(net, batch, output_fn) for net in (model, teacher))
            if [(n, t.shape) for n, t in ours] != [(n, t.shape) for n, t in theirs] or not ours:
                raise ValueError(
                    f"outputs do not correspond: model gives {[(n, tuple(t.shape)) for n, t in ours]}, "
                    f"teacher {[(n, tuple(t.shape)) for n, t in theirs]}; pass output_fn= to pick comparable ones"
                )
            masks = token_masks(model_inputs(batch, theirs[0][1].device))
            for (name, a), (_, b) in zip(ours, theirs, strict=True):
                _compare(tallies.setdefault(name, _Tally(classifier=_is_logits(name, b))), a, b, masks)
            labels = _labels(batch, theirs)
            if labels is not None:
                hits += int((ours[0][1].argmax(-1).cpu() == labels).sum())
                teacher_hits += int((theirs[0][1].argmax(-1).cpu() == labels).sum())
                labelled += len(labels)
            bar.advance()
    if not tallies:
        raise ValueError("loader yielded no batches; expected at least one")
    accuracies = (hits / labelled, teacher_hits / labelled) if labelled else (None, None)
    counts = [sum(p.numel() for p in net.parameters()) for net in (model, teacher)]
    return Report(tuple(_report(name, tally) for name, tally in tallies.items()), *counts, *accuracies)


def _outputs(net: nn.Module, batch: Any, output_fn: Callable[[Any], Any] | None) -> list[tuple[str, Tensor]]:
    output = call(net, model_inputs(batch, device_of(net)))
    return floating_outputs(output if output_fn is None else output_fn(output))


def _is_logits(name: str, tensor: Tensor) -> bool:
    return name == "logits" or (name == "output" and tensor.dim() == 2 and tensor.shape[1] > 1)


def _labels(batch: Any, outputs: list[tuple[str, Tensor]]) -> Tensor | None:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        return None
    labels, (name, logits) = batch[1], outputs[0]
    fits = not labels.is_floating_point() and labels.shape == logits.shape[:-1]
    return labels.cpu() if fits and _is_logits(name, logits) else None


def _compare(tally: _Tally, ours: Tensor, theirs: Tensor, masks: list[Tensor]) -> None:
    if ours.dim() == 1:
        ours, theirs = ours.unsqueeze(-1), theirs.unsqueeze(-1)
    a, b = (real_rows(t, masks if t.dim() >= 3 else []).double() for t in (ours, theirs.to(ours.device)))
    tally.rows += len(a)
    tally.cosine += float(torch.cosine_similarity(a, b, dim=-1).sum())
    tally.error += float((a - b).square().sum())
    tally.norm += float(b.square().sum())
    if tally.classifier:
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        tally.kl += float((p.exp() * (p - q)).sum())
        tally.agree += int((a.argmax(-1) == b.argmax(-1)).sum())


def _report(name: str, tally: _Tally) -> OutputReport:
    rows = max(tally.rows, 1)
    error = (tally.error / tally.norm) ** 0.5 if tally.norm > 0 else float(tally.error > 0)
    extra = (tally.kl / rows, tally.agree / rows) if tally.classifier else (None, None)
    return OutputReport(name, tally.rows, tally.cosine / rows, error, *extra)
