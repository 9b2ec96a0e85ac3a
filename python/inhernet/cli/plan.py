"""`inhernet plan`: what conversion would do, layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from inhernet.console import say, table

from .options import Command, add_config, add_teacher, config_of
from .usage import OVERWRITE_HELP

if TYPE_CHECKING:
    from torch import nn

    from inhernet.decompose import Plan


def add(command: Command) -> None:
    parser = command("plan", run, "show what conversion would do to every layer; nothing is changed")
    add_teacher(parser)
    add_config(parser)
    parser.add_argument("--out", metavar="DIR", help="write the plan here, to be edited and given to `convert --plan`")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)


def run(arguments: argparse.Namespace) -> None:
    if arguments.out:
        need_free_for_plan(arguments)
    plan = make_plan(arguments)[1]
    show_plan(plan)
    if arguments.out:
        plan.save(arguments.out)
        say(f"plan written to {arguments.out}")


def need_free_for_plan(arguments: argparse.Namespace) -> None:
    from inhernet.decompose import Plan

    from . import specs

    Plan.check_target(arguments.out)
    if not arguments.overwrite and (Path(arguments.out) / "plan.json").exists():
        raise specs.UsageError(
            f"--out is {arguments.out!r}, which holds a plan; give another directory, or --overwrite to replace it"
        )


def make_plan(arguments: argparse.Namespace) -> tuple[nn.Module, Plan]:
    import inhernet

    from . import specs

    config = config_of(arguments)
    teacher = specs.teacher(arguments.teacher, arguments.weights)
    if arguments.weights is None and not arguments.teacher.startswith("hf:"):
        say("note: no --weights, so the teacher is as its function built it", stderr=True)
    calibration = specs.data(arguments.data, arguments.teacher).calibration if arguments.data else None
    return teacher, inhernet.plan(teacher, config, calibration=calibration)


def show_plan(plan: Plan) -> None:
    """The plan as a table that fits the window."""
    rows = []
    for layer in plan.layers:
        shape = "×".join(str(size) for size in layer.shape)
        share = f"{layer.params / layer.dense_params:.1%}" if layer.dense_params else ""
        rank = "dense" if layer.rank is None else layer.rank
        heads = "" if layer.rank is None else layer.heads
        note = layer.reason if layer.rank is None else layer.init
        rows.append((layer.name, shape, rank, heads, f"{layer.dense_params:,}", f"{layer.params:,}", share, note))
    columns = ("layer", "shape", "rank", "heads", "dense", "inherited", "share", "init, or why it stays dense")
    table(f"plan: {len(plan.factorised)} of {len(plan.layers)} layers factorised", columns, rows, left=(0, 7))
    for what, (after, before) in (("selected layers", plan.selected_params), ("whole model", plan.total_params)):
        say(f"{what}: {after:,} of {before:,} parameters ({after / max(before, 1):.1%})")
    for sentence in plan.advice:
        say(sentence.replace("device='cuda'", "--device cuda"))
