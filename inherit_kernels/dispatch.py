"""Choosing an implementation: by force, or by measured tables."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from inherit_kernels import _native
from inherit_kernels.common.conv import memory_format_of
from inherit_kernels.common.costs import blended, rates_of
from inherit_kernels.common.tables import read_table
from inherit_kernels.common.triton_launch import REFERENCE_GPU, hint
from inherit_kernels.registry import OPS, Backend, OpSpec, Problem

CHOICES_KEPT = 4096  # per op; a server that sees every length once must not grow without end

_forced: ContextVar[str | None] = ContextVar(
    "inherit_kernels_backend", default=os.environ.get("INHERIT_KERNELS_BACKEND") or None
)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force the named backend for every op inside the block; None chooses automatically again.

    A backward uses the backend of its forward. A compiled function keeps the backend in force while it was compiled.

    Args:
        name: "reference", "unfused", "blas", "native", "triton" or None.

    Raises:
        ValueError: no op has a backend of that name. An op call inside the block raises the declining sentence when the
            backend cannot serve it.

    Example:
        >>> import torch, inherit_kernels as ik
        >>> with ik.use_backend("reference"):
        ...     y = ik.lowrank_linear(torch.randn(2, 8), torch.randn(3, 8), torch.randn(5, 3))
    """
    known = sorted({backend for spec in OPS.values() for backend in spec.backends})
    if name is not None and name not in known:
        raise ValueError(f"name: expected one of {', '.join(known)} or None, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend forced by `use_backend` or INHERIT_KERNELS_BACKEND, or None."""
    return _forced.get()


# Dynamo cannot trace ContextVar.get; this is what torch.compiler.assume_constant_result sets, without importing dynamo
# (1.1 s) at import time. The backend in force while compiling is compiled in.
forced_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select(
    spec: OpSpec, tensors: Sequence[Any], options: tuple[Any, ...], training: bool, forced: str | None
) -> Backend:
    """The implementation for a call: one dictionary look-up in the steady state.

    Raises:
        ValueError: the forced backend does not exist for this op or declines; the message is its sentence.
    """
    x = tensors[0]
    key = (x.dtype, x.is_cpu or place_of(x, tensors[-1]), x.shape, tensors[2].shape, options, training, forced)
    choice = spec.choices.get(key)
    if choice is None:
        name = decide(spec, problem_of(spec, tensors, options, training), forced)
        choice = remember(spec.choices, key, spec.backends[name])
    return choice


def select_traced(
    spec: OpSpec, tensors: Sequence[Any], options: tuple[Any, ...], training: bool, forced: str | None
) -> Backend | None:
    """The Triton backend that is the choice for GPU tensors of these (hinted) sizes; None for any other choice."""
    if not spec.triton_backends or tensors[0].device.type != "cuda":
        return None
    problem = problem_of(spec, tensors, options, training)
    hinted = replace(problem, sizes={letter: hint(size) for letter, size in problem.sizes.items()})
    return spec.triton_backends.get(decide(spec, hinted, forced))


def place_of(x: Any, residual: Any) -> Any:
    """What a choice depends on beside sizes where x is not on the CPU: device, residual, layout."""
    return x.device, residual is None, x.stride()


def remember(cache: dict[Any, Any], key: Any, value: Any) -> Any:
    """Put a choice into a cache of bounded size; returns it."""
    if len(cache) >= CHOICES_KEPT:
        cache.clear()
    cache[key] = value
    return value


def problem_of(spec: OpSpec, tensors: Sequence[Any], options: tuple[Any, ...], training: bool) -> Problem:
    """The description of a call that backends and tables decide from."""
    x, *_, residual = tensors
    channels_last = x.dim() == 4 and memory_format_of(x) == torch.channels_last
    sizes = spec.sizes(*tensors, *options)
    return Problem(spec.name, x.dtype, x.device, sizes, options, training, residual is not None, channels_last)


def decide(spec: OpSpec, problem: Problem, forced: str | None) -> str:
    """The name of the backend for a problem.

    Raises:
        ValueError: the forced backend does not exist for this op or declines; the message is its sentence.
    """
    _native.warn_once()
    if forced is not None:
        backend = spec.backends.get(forced)
        sentence = backend.supports(problem) if backend else f"it has {', '.join(spec.backends)}"
        if backend is None or sentence is not None:
            raise ValueError(f"backend {forced!r} cannot serve {problem}: {sentence}")
        return forced
    candidates = [
        name for name, backend in spec.backends.items() if not (backend.supports(problem) or doubt(backend, problem))
    ]
    return choose(spec, problem, candidates)[0]


def choose(spec: OpSpec, problem: Problem, candidates: Sequence[str]) -> tuple[str, str]:
    """The candidate that should be fastest, and why."""
    slug = device_slug(problem.device)
    times = predicted(spec, problem, candidates)
    if times:
        rounded = {name: round(time, 1) for name, time in times.items()}
        return min(times, key=times.__getitem__), f"least of the µs predicted for {slug}: {rounded}"
    name, entry = measured_choice(problem, candidates)
    if name and entry:
        return name, f"fastest of the nearest measured bucket {entry['sizes']} on {slug}: {entry['microseconds']} µs"
    unmeasured = "unfused" if problem.device.type == "cuda" else candidates[0]
    return unmeasured, (
        f"nothing was measured for {problem.dtype} on {slug}; measure with `python -m inherit_kernels.tune {problem.op}`"
    )


def doubt(backend: Backend, problem: Problem) -> str | None:
    """Why only force may choose a backend that can serve the problem, or None; few backends have a `doubts` to ask."""
    doubts = getattr(backend, "doubts", None)
    return doubts(problem) if doubts else None


# --- measured tables ---------------------------------------------------------------------------------------------------


def device_slug(device: torch.device) -> str:
    """The name of a kind of device in `configs/` and `benchmarks/results/`, such as `cpu-avx512_bf16`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    isa = _native.isa() if device.type == "cpu" and _native.load() else None
    return f"{device.type}-{isa}" if isa else device.type


def table_path(op: str, slug: str) -> Path:
    """Where the measured table of an op on a device lies."""
    return Path(__file__).parent / "configs" / op / f"{slug}.json"


@cache
def _table(op: str, slug: str) -> list[dict[str, Any]]:
    """The entries of a measured table; none, with one warning that names the file, where it is damaged."""
    return read_table(table_path(op, slug), "entries") or []


NEAREST = 3  # measurements that a prediction is blended from


def predicted(spec: OpSpec, problem: Problem, candidates: Sequence[str]) -> dict[str, float]:
    """µs of a forward on a GPU for each candidate with an estimate: a model times what the nearest measurements say of it.

    Empty where nothing comparable was measured: for training, for a dtype without measurements.
    """
    if problem.device.type != "cuda" or problem.training or not problem.sizes:
        return {}
    slug = device_slug(problem.device)
    tabled = slug if _table(problem.op, slug) else REFERENCE_GPU
    entries = _comparable(problem, tabled)
    if not entries:
        return {}
    here, there = _rates(problem.device, slug), _rates(problem.device, tabled)
    times = {}
    for name in candidates:
        estimate = getattr(spec.backends[name], "estimate", None)
        if estimate is None:
            continue
        ratios = [
            (_apart(problem, known), entry["microseconds"][name] / estimate(known, there))
            for known, entry in entries
            if name in entry["microseconds"]
        ]
        times[name] = estimate(problem, here) * (blended(sorted(ratios)[:NEAREST]) if ratios else 1.0)
    return times


_rates = cache(rates_of)


def _comparable(problem: Problem, slug: str) -> list[tuple[Problem, dict[str, Any]]]:
    """A GPU's entries of the problem's op, dtype and mode, each with the problem that was timed."""
    return [
        (
            replace(
                problem,
                sizes=entry["sizes"],
                options=(entry.get("activation"),),
                residual=entry.get("residual", False),
                channels_last=True,
            ),
            entry,
        )
        for entry in _table(problem.op, slug)
        if entry["dtype"] == _measured_dtype(problem) and entry["training"] == problem.training
    ]


def _apart(one: Problem, other: Problem) -> float:
    """Σ |log2| of the ratios of sizes, half a step more where one has an activation or a residual and the other has not."""
    epilogues = ((one.options[-1] is None) != (other.options[-1] is None)) + (one.residual != other.residual)
    return _distance(other.sizes, one) + 0.5 * epilogues


def _distance(sizes: dict[str, int], problem: Problem) -> float:
    return sum(abs(math.log2(max(problem.sizes[letter], 1) / max(size, 1))) for letter, size in sizes.items())


def _measured_dtype(problem: Problem) -> str:
    """float16, which is never measured, takes the choices of bfloat16: the same units compute both on a GPU."""
    return "bfloat16" if problem.dtype == torch.float16 else str(problem.dtype).removeprefix("torch.")


def measured_choice(problem: Problem, candidates: Sequence[str]) -> tuple[str | None, dict[str, Any] | None]:
    """The fastest candidate in the nearest measured bucket, and that bucket; (None, None) where nothing was measured.

    Buckets are powers of two; the nearest has the least sum of |log2| ratios over the sizes.
    """
    entries = [
        entry
        for entry in _table(problem.op, device_slug(problem.device))
        if entry["dtype"] == _measured_dtype(problem)
        and entry["training"] == problem.training
        and entry["sizes"].keys() <= problem.sizes.keys()
        if any(name in entry["microseconds"] for name in candidates)
    ]
    if not entries:
        return None, None

    entry = min(entries, key=lambda entry: _distance(entry["sizes"], problem))
    times = {name: entry["microseconds"][name] for name in candidates if name in entry["microseconds"]}
    return min(times, key=times.__getitem__), entry
