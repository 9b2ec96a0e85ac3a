"""Whole networks: inherited ones against their dense teachers, time ratio beside MAC ratio.

Weights are random (speed does not depend on them); the inherited network keeps half of every layer's parameters, with one head
and with three. The published form restates the same inherited network.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import inherit_kernels
import inhernet
from benchmarks import roofline, store
from benchmarks.markdown import markdown_table
from benchmarks.models.networks import NETWORKS as NETWORKS
from inherit_kernels.testing.timing import time_interleaved

COLUMNS = (
    *store.STAMP,
    "network",
    "batch",
    "heads",
    "candidate",
    "status",
    "note",
    "us_p20",
    "us_p50",
    "us_p80",
    "gmacs",
    "mac_ratio",  # the teacher's MACs over this candidate's, heads merged
    "parameters",
)
RATIO = 0.5  # of every layer's parameters
HEADS = (1, 3)
BATCHES = {"small": (1,), "full": (1, 8)}
ROUNDS = 15
RESUME_KEYS = ("network", "batch", "heads")


def run(networks: Sequence[str], arguments: argparse.Namespace) -> None:
    """Measure networks in inference, float32; append the rows, print the table."""
    from inhernet.console import progress, say, table

    path, stamped = store.path_of("models"), store.stamp(arguments.clock, roofline.cpu_name())
    done = store.finished(path, stamped, RESUME_KEYS) if arguments.resume else set()
    cases = [(n, b, h) for n in networks for b in BATCHES[arguments.suite] for h in HEADS]
    cases = [case for case in cases if tuple(map(str, case)) not in done]
    rows: list[dict[str, Any]] = []
    try:
        with progress("networks", len(cases)) as steps:
            for network, batch, heads in cases:
                found = measure(network, batch, heads, arguments.seconds, arguments.clock)
                now = store.stamp(arguments.clock, stamped["cpu"])
                rows += (found := [now | row for row in found])
                store.append(path, found, COLUMNS)
                steps.line(f"{network}, batch {batch}, {heads} head{'s' * (heads > 1)}")
                steps.advance()
    finally:
        if rows:
            table("Networks: times faster than the dense teacher in eager torch", HEADER, lines(rows), left=(0, 1))
            for sentence in absent(rows):
                say(f"  {sentence}")
            say(f"rows appended to {path}")


def measure(network: str, batch: int, heads: int, seconds: float, clock: str) -> list[dict[str, Any]]:
    """One network: every candidate checked, then all interleaved."""
    torch._dynamo.reset()
    gc.collect()
    torch.manual_seed(0)
    teacher, inputs = NETWORKS[network](batch)
    teacher.eval()
    found = candidates(teacher, inputs, heads)
    calls: dict[str, Callable[[], object]] = {}
    rows = []
    with torch.no_grad():
        expected = {True: teacher(*inputs), False: found["inherited"](*inputs)}
        for name, model in found.items():
            status, note = check(model, inputs, expected["teacher" in name])
            rows.append(
                {"network": network, "batch": batch, "heads": heads, "candidate": name} | status_of(status, note)
            )
            if status == "ok":
                calls[name] = lambda model=model: model(*inputs)  # type: ignore[misc]
        timings = time_interleaved(calls, seconds=seconds, rounds=ROUNDS, clock=clock)
        macs = {True: multiply_adds(teacher, inputs), False: multiply_adds(found["inherited"], inputs)}
    for row in rows:
        name = str(row["candidate"])
        dense = "teacher" in name
        # What a compiled or optimised network computes is not counted anew: the same function, the same MACs.
        row |= {"gmacs": round(macs[dense] / 1e9, 4), "mac_ratio": round(macs[True] / macs[dense], 3)}
        row["parameters"] = sum(p.numel() for p in (teacher if dense else found["inherited"]).parameters())
        if name in timings:
            low, middle, high = timings[name]
            row |= {"us_p20": round(low, 1), "us_p50": round(middle, 1), "us_p80": round(high, 1)}
    return rows


def candidates(teacher: nn.Module, inputs: tuple[Tensor, ...], heads: int) -> dict[str, Any]:
    """name -> a callable of the inputs, or the sentence why there is none."""
    from inhernet.demos.published import published

    config = inhernet.InheritConfig(heads=heads, init="random", budget=inhernet.UniformRatio(RATIO))
    inherited = inhernet.inherit(teacher, inhernet.plan(teacher, config)).eval()
    spread_gates(inherited)
    return {
        "teacher, eager": teacher,
        "teacher, compiled": torch.compile(teacher),
        "teacher, compiled, frozen": torch.compile(teacher, options={"freezing": True}),
        "published": published(inherited),
        "inherited": inherited,
        "inherited, packed": packed(inherited),
        "inherited, optimized": optimized(inherited, inputs),
    }


def spread_gates(model: nn.Module) -> None:
    """Gates start at zero, where every head counts the same and a merged layer would pass for a gated one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, inhernet.nn.LowRankModule) and module.gated:
                module.gate.weight.normal_(generator=generator)


def packed(model: nn.Module) -> nn.Module:
    """A copy, every low-rank module packed."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, inhernet.nn.LowRankModule):
            module.pack()
    return model


def optimized(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What `inhernet.optimize` makes of it, or why it cannot."""
    optimize = getattr(inhernet, "optimize", None)
    return optimize(model, inputs) if optimize else "this version has no inhernet.optimize"


def check(model: Any, inputs: tuple[Tensor, ...], expected: Tensor) -> tuple[str, str]:
    """(status, note): whether a candidate runs and agrees with the plain form of the same network."""
    if isinstance(model, str):
        return "declined", model
    try:
        actual = model(*inputs)
    except Exception as failed:  # whatever a compiler throws is a reason to report, not to stop
        return "declined", f"{type(failed).__name__}: {(str(failed).splitlines() or [''])[0]}"[:300]
    error = float((actual - expected).norm() / expected.norm())
    # Some 50 layers of float32 rounding; a wrong layer is off by order one.
    return ("ok", "") if error < 1e-3 else ("wrong", f"off by {error:.2g} of the norm")


def status_of(status: str, note: str) -> dict[str, str]:
    """The columns."""
    return {"status": status, "note": note}


def multiply_adds(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Multiply-adds of a forward, heads merged."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=inherit_kernels.flop_formulas) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


HEADER = ("network", "candidate", "ms", "times faster", "MAC ratio", "share of the MAC ratio")


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One line a candidate that ran."""
    base = {_case(row): float(row["us_p50"]) for row in rows if row["candidate"] == "teacher, eager"}
    found = []
    for row in rows:
        if row["status"] != "ok":
            continue
        speed, macs = base[_case(row)] / float(row["us_p50"]), float(row["mac_ratio"])
        case = f"{row['network']}, batch {row['batch']}, heads {row['heads']}"
        figures = [f"{float(row['us_p50']) / 1e3:.2f}", f"{speed:.2f}", f"{macs:.2f}", f"{100 * speed / macs:.0f} %"]
        found.append([case, str(row["candidate"]), *figures])
    return found


def absent(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Who could not run, and why."""
    return sorted({f"{row['candidate']} {row['status']}: {row['note']}" for row in rows if row["status"] != "ok"})


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The newest run of every case as a Markdown table."""
    latest: dict[tuple[str, ...], str] = {}
    for row in rows:
        latest[_case(row)] = max(latest.get(_case(row), ""), row["time"])
    rows = [row for row in rows if row["time"] == latest[_case(row)]]
    notes = "".join(f"\n* {sentence}" for sentence in absent(rows))
    return "### Networks\n\n" + markdown_table(HEADER, lines(rows), text=(0, 1)) + notes


def _case(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in (*RESUME_KEYS, "threads"))
