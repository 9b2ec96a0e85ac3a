"""Fidelity against cost: one network converted at several budgets, as a table and a picture; resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from . import atomic
from .budgets import ParamBudget
from .config import InheritConfig, RefineConfig
from .console import progress
from .decompose import Plan, cut, inherit, plan, refine_blocks, summary, verify, weights_hash
from .decompose import elastic as make_elastic
from .decompose.batches import call, device_of, model_inputs, reusable
from .decompose.levels import levels_of
from .fingerprint import contents
from .measure import interleaved

FILE = "sweep.json"


@dataclass(frozen=True)
class SweepRow:
    """One network, "decomposed", "refined", or a level of an "elastic" one. Errors are `verify`'s of its first output, on the
    judging data; `macs` and `milliseconds` for the first batch of it, and what the teacher takes beside (timed in the same
    rounds)."""

    share: float
    kind: str
    params: int
    teacher_params: int
    macs: int
    teacher_macs: int
    milliseconds: float
    teacher_milliseconds: float
    relative_error: float
    cosine: float
    agreement: float | None = None
    accuracy: float | None = None
    teacher_accuracy: float | None = None


def sweep(
    teacher: nn.Module,
    calibration: Iterable[Any],
    judging: Iterable[Any],
    shares: Sequence[float] = (0.8, 0.65, 0.5, 0.35, 0.2),
    config: InheritConfig | None = None,
    refine: RefineConfig | bool = True,
    output_fn: Callable[[Any], Any] | None = None,
    directory: str | os.PathLike[str] | None = None,
    seconds: float = 1.0,
    elastic: bool = False,
) -> list[SweepRow]:
    """Convert a teacher at each share of its selected layers' parameters and measure what is kept, as decomposed and refined.

    Args:
        teacher: the trained model; untouched.
        calibration: batches as for `plan`; read once for all budgets.
        judging: batches as for `verify`.
        shares: budgets, as `ParamBudget` takes them.
        config: everything else about the conversion; its budget is not used.
        refine: a `RefineConfig`, or False for decomposed networks only.
        output_fn: what of the output counts, as for `plan` and `verify`.
        directory: every finished row is written to `sweep.json` there at once; called again with the same teacher,
            settings and first batches, rows that are there are taken over.
        seconds: for each latency.
        elastic: also make one elastic network with all shares as its levels, and measure each.

    Returns:
        One to three rows (decomposed, refined, elastic) per share, in the order of `shares`.

    Raises:
        ValueError: what `plan`, `inherit` and `verify` raise.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> data = [torch.randn(64, 64)]
        >>> [row.share for row in sweep(net, data, data, (0.5,), refine=False, seconds=0.01)]
        [0.5]
    """
    config, calibration, judging = config or InheritConfig(), reusable(calibration), reusable(judging, "judging")
    settings = replace(config, budget=ParamBudget(1.0))
    how = RefineConfig() if refine is True else refine
    first = next(iter(judging))
    parts = [weights_hash(teacher), settings.to_json(), repr(how), contents(next(iter(calibration))), contents(first)]
    identity = contents(parts + [sorted(shares)] * elastic)
    done = _read(directory, identity)
    kinds = ["decomposed"] + ["refined"] * bool(how)
    shared: Plan | None = None
    with progress("sweep", len(shares)) as bar:
        for share in shares:
            if any((share, kind) not in done for kind in kinds):
                planned = plan(
                    teacher,
                    replace(config, budget=ParamBudget(share)),
                    calibration if shared is None else None,
                    output_fn if shared is None else None,
                    statistics=shared,
                )
                shared = shared or planned
                model = inherit(teacher, planned, refine=False)
                for kind in kinds:
                    if kind == "refined" and isinstance(how, RefineConfig):
                        refine_blocks(model, teacher, calibration, how, output_fn)
                    row = _measured(share, kind, model, teacher, judging, first, output_fn, seconds)
                    done[share, kind] = row
                    _write(directory, identity, done)
            bar.advance(1, f"{share:.0%}")
    if elastic and any((share, "elastic") not in done for share in shares):
        whole = make_elastic(teacher, shares, config, calibration, output_fn, refine=how)
        for number, level in enumerate(levels_of(whole)):
            model = cut(whole, number)
            row = _measured(level.share, "elastic", model, teacher, judging, first, output_fn, seconds)
            done[level.share, "elastic"] = row
        _write(directory, identity, done)
    return [done[share, kind] for share in shares for kind in kinds + ["elastic"] * elastic]


def _measured(
    share: float,
    kind: str,
    model: nn.Module,
    teacher: nn.Module,
    judging: Iterable[Any],
    first: Any,
    output_fn: Callable[[Any], Any] | None,
    seconds: float,
) -> SweepRow:
    report = verify(model, teacher, judging, output_fn)
    output = report.outputs[0]
    inputs = model_inputs(first, device_of(teacher))
    flags = [(net, net.training) for net in (model, teacher)]
    calls = {"model": partial(call, model, inputs), "teacher": partial(call, teacher, inputs)}
    try:
        model.eval(), teacher.eval()
        found = interleaved(calls, seconds)
    finally:
        for net, training in flags:
            net.train(training)
    macs, dense = summary(model, first).macs or (0, 0)
    return SweepRow(
        share, kind, report.params, report.teacher_params, macs, dense, found["model"].p50, found["teacher"].p50,
        output.relative_error, output.cosine, output.agreement, report.accuracy, report.teacher_accuracy,
    )  # fmt: skip


def _read(directory: str | os.PathLike[str] | None, identity: str) -> dict[tuple[float, str], SweepRow]:
    if directory is None:
        return {}
    names = {field.name for field in fields(SweepRow)}
    try:
        data = json.loads((Path(directory) / FILE).read_text(encoding="utf-8"))
        rows = [SweepRow(**row) for row in data["rows"] if set(row) == names] if data["identity"] == identity else []
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # none yet, or not of this sweep: it is made anew
    return {(row.share, row.kind): row for row in rows}


def _write(directory: str | os.PathLike[str] | None, identity: str, done: dict[tuple[float, str], SweepRow]) -> None:
    if directory is None:
        return
    data = {"identity": identity, "rows": [asdict(row) for row in done.values()]}
    with atomic.file(Path(directory) / FILE) as aside:
        aside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def draw(rows: Sequence[SweepRow], path: str | os.PathLike[str], title: str = "") -> None:
    """Write the picture: error against parameters, multiply-accumulates and time, each as a share of the teacher's.

    Raises:
        ModuleNotFoundError: no matplotlib, with the command that installs it.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the picture needs matplotlib: pip install 'inherit-kernels[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    costs: dict[str, Callable[[SweepRow], float]] = {
        "parameters": lambda row: row.params / row.teacher_params,
        "multiply-accumulates": lambda row: row.macs / row.teacher_macs if row.teacher_macs else 1.0,
        "time of a call": lambda row: row.milliseconds / row.teacher_milliseconds,
    }
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained", sharey=True)
        for axes, (name, cost) in zip(panels, costs.items(), strict=True):
            # Okabe-Ito colours, told apart by line style in grey.
            for kind, label, colour, style in (
                ("decomposed", "decomposed", "#D55E00", "--"),
                ("refined", "refined", "#0072B2", "-"),
                ("elastic", "one elastic network", "#009E73", "-."),
            ):
                chosen = sorted((row for row in rows if row.kind == kind), key=cost)
                if chosen:
                    points = [cost(row) for row in chosen], [row.relative_error for row in chosen]
                    axes.plot(*points, style, color=colour, marker="o", markersize=4, label=label)
            axes.axvline(1.0, color="#666666", lw=0.8, ls=":")
            axes.set_xlabel(f"{name}, teacher = 1")
        panels[0].set_ylabel("relative error of the output")
        panels[0].set_ylim(bottom=0)
        panels[0].legend(frameon=False)
        figure.suptitle(title, weight="bold")
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
