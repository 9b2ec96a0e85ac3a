"""`inhernet convert`: write an inherited network."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any

from inhernet.console import say, table

from .options import Command, add_config, add_teacher, config_of, need_free
from .plan import make_plan, show_plan
from .usage import OVERWRITE_HELP


def add(command: Command) -> None:
    parser = command("convert", run, "write an inherited network")
    add_teacher(parser)
    add_config(parser)
    parser.add_argument("--levels", type=float, nargs="+", metavar="SHARE", help="one elastic network for several budgets, "
                        "in place of --budget: shares of the selected layers' parameters, such as 0.75 0.5 0.3")  # fmt: skip
    parser.add_argument("--plan", metavar="DIR", help="follow a plan that `inhernet plan --out` wrote")
    parser.add_argument("--keep-batchnorm", action="store_true", help="leave BatchNorm statistics as the teacher's: for "
                         "data that is not like its training's")  # fmt: skip
    parser.add_argument("--no-refine", action="store_true", help="leave the factors as decomposed; default: with --data, "
                        "each block is adjusted to the teacher's, going on where an interrupted run stopped")  # fmt: skip
    parser.add_argument("--refine-steps", type=int, default=300, metavar="N", help="per block (default: 300)")
    parser.add_argument("--refine-seconds", type=float, metavar="S", help="at most about so long in all")
    parser.add_argument("--stream", action="store_true", help="a layer at a time from a TEACHER hf:DIR that need not fit "
                        "into memory, into a transformers directory: by --budget, --ratio or --rank, without data; goes on "
                        "where it was stopped; under torchrun, processes share the work")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", required=True, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)


def run(arguments: argparse.Namespace) -> None:
    import inhernet
    from inhernet.config import RefineConfig
    from inhernet.decompose import Plan

    from . import specs

    if arguments.stream:
        convert_from_disk(arguments)
        return
    teacher_directory = arguments.teacher.removeprefix("hf:") if arguments.teacher.startswith("hf:") else None
    need_free(arguments.out, arguments, teacher_directory, arguments.weights, arguments.plan)
    plan: Any = None
    if arguments.levels:
        _check_levels(arguments)
        teacher = specs.teacher(arguments.teacher, arguments.weights)
        calibration = specs.data(arguments.data, arguments.teacher).calibration if arguments.data else None
    elif arguments.plan:
        blank = argparse.ArgumentParser(add_help=False)
        add_config(blank)
        for name, default in vars(blank.parse_args([])).items():
            if name != "data" and getattr(arguments, name) != default:
                raise specs.UsageError(f"--{name} is given beside --plan, which has decided it: leave one of them out")
        try:
            plan = Plan.load(arguments.plan)
        except FileNotFoundError as error:
            raise specs.UsageError(
                f"--plan is {arguments.plan!r}, which has no plan.json: write one with `inhernet plan --out`"
            ) from error
        teacher = specs.teacher(arguments.teacher, arguments.weights)
        calibration = specs.data(arguments.data, arguments.teacher).calibration if arguments.data else None
    else:
        teacher, plan = make_plan(arguments)
        calibration = plan.calibration
    started = time.perf_counter()
    # Beside the directory, as a training run's: it goes on there until the model is written.
    out = Path(arguments.out).resolve()
    state = out.parent / f"{out.name}.refining"
    refine = False if arguments.no_refine else RefineConfig(
        steps=arguments.refine_steps, seconds=arguments.refine_seconds, state=str(state),
        seed=arguments.seed if plan is None else plan.config.seed,
    )  # fmt: skip
    if arguments.levels:
        model = inhernet.elastic(teacher, arguments.levels, config_of(arguments), calibration, refine=refine)
        plan = model.inhernet_plan
    else:
        model = inhernet.inherit(
            teacher, plan, calibration=calibration, batchnorm=not arguments.keep_batchnorm, refine=refine
        )
    show_plan(plan)
    show_refinement(model.inhernet_refinement)
    if arguments.levels:
        say(str(model.inhernet_levels))
    factory = None
    if not hasattr(teacher, "inhernet_factory") and not arguments.teacher.startswith("hf:"):
        factory = specs.function_of(arguments.teacher, "TEACHER")
    inhernet.save(model, arguments.out, factory=factory)
    shutil.rmtree(state, ignore_errors=True)
    say(f"converted in {time.perf_counter() - started:.1f} s; written to {arguments.out}")


def _check_levels(arguments: argparse.Namespace) -> None:
    from . import specs

    for name in ("plan", "budget", "rank", "ratio", "energy", "macs", "bytes", "latency", "milliseconds", "error"):
        if getattr(arguments, name) is not None:
            raise specs.UsageError(f"--{name} is given beside --levels, which decide the size: leave one of them out")
    if arguments.of != "selected" or arguments.keep_batchnorm:
        option = "--keep-batchnorm" if arguments.keep_batchnorm else "--of model"
        raise specs.UsageError(f"{option} is given beside --levels, which have no such choice: leave it out")


def convert_from_disk(arguments: argparse.Namespace) -> None:
    import torch.distributed as dist

    from inhernet.streaming import convert_stream

    from . import specs

    if not arguments.teacher.startswith("hf:"):
        raise specs.UsageError(
            f"TEACHER is {arguments.teacher!r}, expected hf:DIR with --stream: files, not a function"
        )
    for name in ("data", "plan", "weights", "levels"):
        if getattr(arguments, name) is not None:
            raise specs.UsageError(f"--{name} is given beside --stream, which reads nothing but hf:DIR: leave it out")
    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if shared:
        dist.init_process_group("gloo")
    try:
        started = time.perf_counter()
        source = arguments.teacher.removeprefix("hf:")
        plan = convert_stream(source, arguments.out, config_of(arguments), overwrite=arguments.overwrite)
        if not shared or dist.get_rank() == 0:
            show_plan(plan)
            say(
                f"converted in {time.perf_counter() - started:.1f} s; written to {arguments.out}: inhernet.register(), then "
                "AutoModel.from_pretrained loads it"
            )
    finally:
        if shared:
            dist.destroy_process_group()


def show_refinement(refinement: Any) -> None:
    """What became of each block, as a table that fits the window; nothing where nothing was refined."""
    if refinement is None:
        return
    columns, rows = refinement.table
    table(refinement.outcome, columns, rows, left=(0, 5))
