"""One measurement from beginning to end: make and check every candidate, time them in turn, describe them as rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import rows, timing
from benchmarks.gpu.candidates import Candidate, Case
from benchmarks.gpu.cases import Item
from benchmarks.gpu.device import Device
from benchmarks.gpu.peers import Peer
from benchmarks.suites import work_of

Journal = Callable[[str], None]  # told what is about to run; if the process dies, that was it


class Rates:
    """What the machine does, measured once a run and dtype."""

    def __init__(self, device: Device) -> None:
        self.device, self.copy = device, device.copy_rate()
        self._products: dict[str, float] = {}

    def product(self, dtype: str) -> float:
        if dtype not in self._products:
            self._products[dtype] = self.device.product_rate(getattr(torch, dtype))
        return self._products[dtype]


def measure(
    item: Item, device: Device, rates: Rates, stamp: dict[str, Any], skipped: dict[str, str], journal: Journal
) -> list[dict[str, Any]]:
    """The rows of one measurement, a row for every candidate, those that could not run included.

    Args:
        skipped: candidates that are not to be tried, and why.
    """
    device.begin()
    torch._dynamo.reset()  # a case's compiled peers share one code object, so that its limit must be a case's
    torch._dynamo.config.recompile_limit = 64
    product_rate = rates.product(item.dtype)
    journal("inputs and truth")
    case = Case(item, device)
    found: list[tuple[Candidate, timing.Clocked | None, int | None]] = []
    for name, peer in case.names():
        journal(name)
        found.append(_prepared(case, name, peer, skipped.get(name)))
    case.truth = case.dense_truth = None  # type: ignore[assignment]  # gigabytes, before graphs are replayed
    journal("timing")
    with torch.set_grad_enabled(item.mode == "training"):
        timing.time_in_turn(device, [clocked for _, clocked, _ in found if clocked is not None])
    common = stamp | {
        "time": rows.now(),
        "clocks": device.clocks(),
        "op": item.point.op,
        "case": str(item.point),
        "sizes": " ".join(f"{letter}={size}" for letter, size in item.sizes.items()),
        "regimes": " ".join(item.regimes),
        "dtype": item.dtype,
        "mode": item.mode,
        "copy_gbs": round(rates.copy / 1e9, 1),
        "product_tflops": round(product_rate / 1e12, 2),
        "output_mb": round(_output_bytes(item) / 1e6, 3),
    }
    return [common | _describe(item, *entry, rates) for entry in found]


def _prepared(
    case: Case, name: str, peer: Peer | None, skipped: str | None
) -> tuple[Candidate, timing.Clocked | None, int | None]:
    """A candidate with its graphs and its peak of memory."""
    if skipped is not None:
        candidate = Candidate(name, "peer" if peer else "ours", bool(peer and peer.dense))
        candidate.stop("failed", skipped)
        return candidate, None, None
    candidate = case.candidate(name, peer)
    if not candidate.runners:
        return candidate, None, None
    device = case.device
    calls = [runner.run for runner in candidate.runners]
    try:
        with torch.set_grad_enabled(case.item.mode == "training"):
            clocked = timing.prepare(device, calls)
            peak = device.peak(calls[0])
    except torch.OutOfMemoryError:
        candidate.stop("failed", "out of memory")
        return candidate, None, None
    except Exception as error:
        if device.broken():
            raise
        candidate.stop("failed", f"{type(error).__name__}: {error}")
        return candidate, None, None
    candidate.note = clocked.error
    return candidate, clocked, peak


def _output_bytes(item: Item) -> int:
    s = item.sizes
    positions = s["M"] if "M" in s else s["B"] * s["P"]
    return int(positions * s["N"] * getattr(torch, item.dtype).itemsize)


def _describe(
    item: Item, candidate: Candidate, clocked: timing.Clocked | None, peak: int | None, rates: Rates
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "candidate": candidate.name,
        "kind": candidate.kind,
        "resolved": candidate.resolved,
        "status": candidate.status,
        "note": candidate.note,
    }
    if candidate.max_error is not None:
        row["max_error"] = f"{candidate.max_error:.3g}"
    if clocked is None:
        return row
    if peak is not None:
        row["peak_mb"] = round(peak / 1e6, 3)
    for state in ("cold", "warm"):
        found = clocked.timing(state)
        if found is not None:
            row |= {
                f"{state}_us_p20": _us(found.low),
                f"{state}_us": _us(found.median),
                f"{state}_us_p80": _us(found.high),
            }
    eager = clocked.timing("eager")
    if eager is not None:
        row["eager_us"] = _us(eager.median)
    return row | _against_limit(item, candidate, row, rates)


def _against_limit(item: Item, candidate: Candidate, row: dict[str, Any], rates: Rates) -> dict[str, Any]:
    """The least time of the case and how near to it the candidate came; FLOPs with heads merged, bytes once."""
    flops, moved = _work(item, candidate.dense)
    by_compute, by_memory = flops / rates.product(item.dtype) * 1e6, moved / rates.copy * 1e6
    limit = max(by_compute, by_memory)
    found = {
        "limit_us": _us(limit),
        "bound": "compute" if by_compute > by_memory else "memory",
        "intensity": round(flops / moved, 2),
    }
    if "cold_us" in row:
        found |= {
            "tflops": round(flops / row["cold_us"] / 1e6, 2),
            "gbs": round(moved / row["cold_us"] / 1e3, 1),
            "percent": round(100 * limit / row["cold_us"], 1),
            "percent_warm": round(100 * limit / row["warm_us"], 1),
        }
    return found


def _work(item: Item, dense: bool) -> tuple[float, float]:
    """FLOPs and bytes. The backward alone does two thirds of training's products; it reads x, the weights, t and dy and
    writes every gradient but the residual's."""
    size = getattr(torch, item.dtype).itemsize
    if item.mode == "forward":
        work = work_of(item.point, size, False, dense)
        return work.flops, work.bytes
    if item.mode == "training":
        work = work_of(item.point, size, True, dense)
        return work.flops, work.bytes
    flops = work_of(item.point, size, True, dense).flops - work_of(item.point, size, False, dense).flops
    shapes = item.point.case.shapes
    counts = {name: _count(shape) for name, shape in shapes.items() if name != "residual"}
    s = item.sizes
    t = (s["M"] if "M" in s else s["B"] * s["P"]) * s["R"]
    return flops, 2 * sum(counts.values()) * size + t * size + _output_bytes(item)


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _us(value: float) -> float:
    return round(value, 3)
