"""The main job on real images: train a teacher, inherit from it, fine-tune, measure, save, load back.

`inhernet demo digits` runs it in a few minutes on two cores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import inhernet
from inhernet.console import say, table
from inhernet.distill import Objective, TrainConfig, TrainResult, evaluate, fit
from inhernet.measure import interleaved
from inhernet.models import cifar_resnet, cifar_resnet_near

from .digits_data import Digits, digits
from .digits_row import Row
from .published import published

# The task teaches the teacher; the others are taught by it. T² · KL at T = 4 keeps the gradient of a plain KL.
TASK = Objective(ce=1.0, kd=0.0)
GUIDED = Objective(ce=0.1, kd=0.9, temperature=4.0)
# 30 epochs: 98.9 to 99.7 % on four seeds; 20 epochs: 98.3 to 99.4 %.
TEACHING = TrainConfig(epochs=30, lr=0.1, clip_norm=1.0, keep_best="min:val_loss")
# The best of five schedules tried (SGD 0.02, 0.05, 0.1; AdamW 0.003, 0.01): final KL 0.021 against 0.022 to 0.038.
STUDYING = TrainConfig(epochs=20, lr=0.1, clip_norm=1.0, keep_best="min:val_kl")
# At 20 %, one head, one seed: KL 0.015 as decomposed, 0.0024 after 60 steps a block (6 s) as after 300 (16 s).
REFINING = inhernet.RefineConfig(steps=60)
TUNING = TrainConfig(epochs=5, lr=0.02, clip_norm=1.0, keep_best="min:val_kl")


@dataclass(frozen=True)
class DigitsConfig:
    """What the demo trains and compares.

    Args:
        depth, widths: the teacher, a CIFAR ResNet.
        budgets: shares of the teacher's parameters; the student has the size of the smallest.
        heads: heads of the inherited networks.
        teacher: schedule of the teacher.
        student: schedule of the student, from random weights.
        tuning: schedule of the inherited networks.
        batch: images per step.
        latency_seconds: time per latency figure.
        compile: whether torch.compile of the published network is measured too (it takes most of a minute).
    """

    depth: int = 20
    widths: tuple[int, int, int, int] = (32, 32, 64, 128)
    budgets: tuple[float, ...] = (0.35, 0.2)
    heads: tuple[int, ...] = (1, 3)
    teacher: TrainConfig = TEACHING
    student: TrainConfig = STUDYING
    tuning: TrainConfig = TUNING
    batch: int = 64
    latency_seconds: float = 0.6
    compile: bool = True


def compare(config: DigitsConfig, split: int, seed: int, show: bool = True) -> list[Row]:
    """Train teacher, student and inherited networks on one split: teacher first, student second."""
    data = digits(split, config.batch)
    example = data.test.x[:1]

    def schedule(chosen: TrainConfig) -> TrainConfig:
        return replace(chosen, seed=1000 * split + seed)

    def train(name: str, model: nn.Module, chosen: TrainConfig, teacher: nn.Module | None) -> Row:
        result = fit(
            model,
            data.train,
            schedule(chosen),
            loss=TASK if teacher is None else GUIDED,
            teacher=teacher,
            validate=judge(data, teacher),
            description=f"{name:<22}",
            show_progress=show,
        )
        return row(name, model, result, example)

    torch.manual_seed(1000 * split + seed)
    teacher = digits_teacher(config.depth, config.widths)
    rows = [train("teacher", teacher, config.teacher, None)]
    smallest = min(config.budgets)
    inherited: list[Row] = []
    plan = None
    for share in sorted(config.budgets, reverse=True):
        for heads in config.heads:
            started = time.perf_counter()
            plan = plan_for(teacher, data, share, heads, seed, plan)
            model = inhernet.inherit(teacher, plan, refine=REFINING)
            seconds = time.perf_counter() - started
            title = f"inherited {share:.0%}, {heads} head{'s' if heads > 1 else ''}"
            inherited.append(train(title, model, config.tuning, teacher))
            inherited[-1].share, inherited[-1].heads, inherited[-1].convert_seconds = share, heads, seconds
    size = inherited_smallest(inherited).parameters
    torch.manual_seed(1000 * split + seed + 1)
    student = cifar_resnet_near(size, config.depth, config.widths, num_classes=10, in_channels=1)
    return [*rows, train(f"student {smallest:.0%}, from scratch", student, config.student, teacher), *inherited]


def digits_teacher(depth: int = 20, widths: Sequence[int] = (32, 32, 64, 128)) -> nn.Module:
    """The demo's teacher, untrained: TEACHER `inhernet.demos.digits:digits_teacher` of the command line."""
    return cifar_resnet(depth, tuple(widths), num_classes=10, in_channels=1)


def plan_for(
    teacher: nn.Module, data: Digits, share: float, heads: int, seed: int = 0, statistics: inhernet.Plan | None = None
) -> inhernet.Plan:
    """A plan for `share` of the teacher's parameters: two-sided init, global ranks; BatchNorm will be re-estimated.

    `statistics`: an earlier plan of the same teacher, so that all budgets cost one pass over the calibration images.
    """
    budget = inhernet.ParamBudget(share, of="model")
    # Ranks here are 4 to 60: steps of 2 spend the budget to 0.1 %.
    config = inhernet.InheritConfig(heads=heads, budget=budget, init="fisher", rank_step=2, seed=seed)
    if statistics is not None:
        return inhernet.plan(teacher, config, statistics=statistics)
    return inhernet.plan(teacher, config, calibration=data.calibration)


def judge(data: Digits, teacher: nn.Module | None) -> Callable[[nn.Module], dict[str, float]]:
    """Validation figures (they select) and test figures (they only report)."""

    def validate(model: nn.Module) -> dict[str, float]:
        figures: dict[str, float] = {}
        for prefix, part in (("val_", data.val), ("", data.test)):
            found = evaluate(model, part, teacher)
            figures |= {prefix + name: found[name] for name in ("accuracy", "loss", "kl") if name in found}
        return figures

    return validate


def row(name: str, model: nn.Module, result: TrainResult, example: torch.Tensor) -> Row:
    found = inhernet.summary(model, example)
    macs = 0 if found.macs is None else found.macs[0]
    return Row(name, model, result.history, result.best_epoch, found.params, macs, result.seconds)


def epochs_to_reach(row: Row, kl: float) -> int | None:
    """The first epoch whose test KL is at most `kl`, None if none is."""
    return next((int(r["epoch"]) for r in row.history if r["kl"] <= kl), None)


def measure_latencies(rows: Sequence[Row], config: DigitsConfig, show: bool = True) -> list[Row]:
    """Time every network at batch 1 and 64, all in one interleaved run; returns the rows of the published form too."""
    widest = [r for r in rows if r.share is not None][-1]
    restated = published(widest.model).eval()
    extra = [Row(f"published form of {widest.name[10:]}", restated, [], None, 0, 0, 0.0)]
    if config.compile:
        # dynamic=True: one compilation serves both batch sizes (batch 1 is specialised, so two at most).
        compiled = torch.compile(restated, dynamic=True)
        extra.append(Row("  the same, torch.compile", compiled, [], None, 0, 0, 0.0))
    x = digits(0, config.batch).test.x
    for size in (64, 1):
        if show:
            say(f"latency at batch {size}: {len(rows) + len(extra)} networks, interleaved")
        inputs = x[:size].contiguous()
        calls = {r.name: partial(r.model, inputs) for r in (*rows, *extra)}
        found = interleaved(calls, config.latency_seconds)
        for candidate in (*rows, *extra):
            candidate.latency[size] = found[candidate.name]
    return extra


def check_reload(directory: Path) -> bool:
    """Load the saved model in a new process and compare its outputs with the recorded ones."""
    command = [sys.executable, "-m", "inhernet.demos.digits", str(directory)]
    return subprocess.run(command, check=False).returncode == 0


def compare_outputs(directory: Path) -> int:
    """The new process's side of `check_reload`: 0 if the loaded model repeats the recorded outputs, 1 if not."""
    recorded = load_file(directory / "outputs.safetensors")
    model = inhernet.load(directory / "model")
    with torch.no_grad():
        outputs = model(recorded["inputs"])
    distance = float((outputs - recorded["outputs"]).abs().max())
    # One float32 rounding per layer: another thread count may sum in another order.
    good = distance <= 1e-4 * float(recorded["outputs"].abs().max())
    verdict = "ok" if good else "WRONG"
    say(f"loaded in a new process: largest difference {distance:.1e} on {len(outputs)} images: {verdict}")
    return 0 if good else 1


def save_results(directory: Path, rows: Sequence[Row], extra: Sequence[Row], config: DigitsConfig) -> None:
    """The chosen model with its outputs, the teacher's weights, and every figure as JSON."""
    chosen = inherited_smallest(rows)
    inputs = digits(0, config.batch).test.x
    inhernet.save(chosen.model, directory / "model")
    with torch.no_grad():
        outputs = chosen.model.eval()(inputs)
    save_file({"inputs": inputs.contiguous(), "outputs": outputs.contiguous()}, directory / "outputs.safetensors")
    save_file(rows[0].model.state_dict(), directory / "teacher.safetensors")
    figures = [asdict(replace(r, model=None)) for r in (*rows, *extra)]
    (directory / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def inherited_smallest(rows: Sequence[Row]) -> Row:
    """The inherited network that the student is compared with: smallest budget, fewest heads."""
    return min((r for r in rows if r.share is not None), key=lambda r: (r.share, r.heads))


def run(
    directory: str | Path, config: DigitsConfig | None = None, seeds: int = 1, splits: int = 1, picture: bool = True
) -> int:
    """Run the demo, print its tables, write model, picture and figures to `directory`.

    Args:
        directory: created if needed.
        config: sizes and schedules.
        seeds: runs per split with other random weights.
        splits: other divisions into training, validation and test images.
        picture: whether to draw (needs matplotlib).

    Returns:
        The exit status: 0, or 1 if the model loaded in a new process computes something else.

    Raises:
        ModuleNotFoundError: scikit-learn or matplotlib is missing; the sentence names the command.
    """
    config, directory = config or DigitsConfig(), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if picture:
        from .digits_plot import draw, require_matplotlib

        require_matplotlib()
    started = time.perf_counter()
    runs = {
        f"split {split}, seed {seed}": compare(config, split, seed) for split in range(splits) for seed in range(seeds)
    }
    trained = time.perf_counter()
    rows = next(iter(runs.values()))
    extra = measure_latencies(rows, config)
    timed = time.perf_counter()
    print_table(rows, extra)
    print_goals(runs)
    if len(runs) > 1:
        print_spread(list(runs.values()))
    save_results(directory, rows, extra, config)
    if picture:
        draw(rows, extra, directory / "digits.png")
    good = check_reload(directory)
    phases = [trained - started, timed - trained, time.perf_counter() - timed]
    compiled = " (torch.compile included)" if config.compile else ""
    say(
        f"{phases[0]:.0f} s training, {phases[1]:.0f} s latencies{compiled}, {phases[2]:.0f} s saving, drawing, loading"
    )
    say(f"model, picture and figures are in {directory}")
    return 0 if good else 1


def print_table(rows: Sequence[Row], extra: Sequence[Row]) -> None:
    columns = [
        "network",
        "parameters",
        "MMACs",
        "step 0",
        "epoch 1",
        "epoch 2",
        "final",
        "best*",
        "seconds",
        "ms b=1",
        "ms b=64",
    ]

    def figures(record: dict[str, float]) -> str:
        kl = f" / {record['kl']:.3f}" if "kl" in record else ""
        return f"{100 * record['accuracy']:.1f}{kl}"

    lines = []
    for r in rows:
        cells = [figures(r.at(epoch)) if epoch < len(r.history) else "" for epoch in (0, 1, 2)]
        cells += [figures(r.history[-1]), f"{figures(r.best)} @{r.best['epoch']:.0f}"]
        share = f"{r.parameters:,} ({r.parameters / rows[0].parameters:.1%})"
        seconds = f"{r.seconds:.1f}" if r.share is None else f"{r.convert_seconds:.1f} + {r.seconds:.1f}"
        lines.append([r.name, share, f"{r.macs / 1e6:.2f}", *cells, seconds, *milliseconds(r)])
    lines += [[r.name, "", "", "", "", "", "", "", "", *milliseconds(r)] for r in extra]
    table("digits: test accuracy in % / KL to the teacher in nats, by epoch", columns, lines)
    say("* the epoch that the validation images select; test images only report. seconds: conversion + training.")
    say("MMACs: million multiply-adds per image. ms: median latency at batch 1 and 64, eager unless said.")


def milliseconds(row: Row) -> list[str]:
    return [f"{row.latency[size].p50:.2f}" if size in row.latency else "" for size in (1, 64)]


def print_goals(runs: Mapping[str, Sequence[Row]]) -> None:
    """Where the inherited network starts, and when it has caught up with the student."""
    for name, rows in runs.items():
        student, chosen = rows[1], inherited_smallest(rows)
        goal = student.history[-1]["kl"]
        epochs = epochs_to_reach(chosen, goal)
        taken = (
            f"after {epochs} of its epochs" if epochs is not None else f"not within {len(chosen.history) - 1} epochs"
        )
        start = chosen.at(0)
        say(
            f"{name}: {chosen.name} starts at {100 * start['accuracy']:.1f} %, KL {start['kl']:.3f}; reaches the "
            f"student's final KL {goal:.4f} (after {len(student.history) - 1} epochs) {taken}"
        )


def print_spread(runs: Sequence[Sequence[Row]]) -> None:
    """Mean ± standard deviation (smallest to largest) over the runs."""

    def spread(values: Sequence[float], form: str) -> str:
        numbers = [
            format(v, form) for v in (statistics.mean(values), statistics.stdev(values), min(values), max(values))
        ]
        return f"{numbers[0]} ± {numbers[1]} ({numbers[2]}-{numbers[3]})"

    lines = []
    for group in zip(*runs, strict=True):
        cells = []
        for records in ([r.at(0) for r in group], [r.history[-1] for r in group], [r.best for r in group]):
            cells.append(spread([100 * record["accuracy"] for record in records], ".1f"))
            cells.append(spread([record["kl"] for record in records], ".4f") if "kl" in records[0] else "")
        lines.append([group[0].name, *cells])
    # The teacher that the others inherit from is the best epoch's.
    columns = [
        "network",
        *(f"{figure} {when}" for when in ("step 0", "final", "best*") for figure in ("accuracy %", "KL")),
    ]
    table(f"spread over {len(runs)} runs: mean ± sd (min-max)", columns, lines)


if __name__ == "__main__":
    sys.exit(compare_outputs(Path(sys.argv[1])))
