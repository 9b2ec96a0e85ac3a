"""What is installed, built and loaded, and why not."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from inherit_kernels import _native
from inherit_kernels.common.tables import read_table
from inherit_kernels.dispatch import device_slug, forced_backend, table_path
from inherit_kernels.registry import OPS
from inherit_kernels.version import __version__


@dataclass(frozen=True)
class Status:
    """What `status` found; prints as a table."""

    facts: dict[str, str]
    problems: tuple[str, ...]  # sentences: what is missing and what to do

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts.items()]
        return "\n".join(lines + [f"! {sentence}" for sentence in self.problems])

    __repr__ = __str__


def status() -> Status:
    """What is built and loaded here, what is missing, and what to do about it. Starts no CUDA, imports no triton.

    Example:
        >>> import inherit_kernels
        >>> print(inherit_kernels.status())  # doctest: +ELLIPSIS
        inherit_kernels...
    """
    problems = []
    native = "not loaded"
    if _native.load():
        native = f"loaded, instruction set {_native.isa()}, {torch.get_num_threads()} threads"
    else:
        problems.append(_native.error or "the native library did not load")
    if importlib.util.find_spec("triton") is None:
        triton = "not installed"
        if torch.version.cuda:
            problems.append("triton is not installed: pip install 'inherit-kernels[triton]'")
    else:
        triton = metadata.version("triton")
    slug = device_slug(torch.device("cpu"))
    measured = [op for op in OPS if table_path(op, slug).exists()]
    if _native.load() and not measured:
        problems.append(f"no dispatch table for {slug}: measure one with `python -m inherit_kernels.tune`")
    facts = {
        "inherit_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native library": native,
        "CUDA kernels": "built" if _native.cuda_built() else "not built",
        "triton": triton,
        "dispatch tables": f"{slug}: {', '.join(measured) or 'none'}",
        "forced backend": forced_backend() or "none",
        "environment": ", ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith("INHERIT_KERNELS_")) or "-",
    }
    return Status(facts, tuple(problems))


def support_table() -> str:
    """Which backend serves which ops and dtypes on which device, and how that was proven, as a Markdown table.

    Generated from the registry and the committed measurements; the README holds a copy that a test compares.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for op, spec in OPS.items():
        for name, backend in spec.backends.items():
            for device, dtypes in backend.SERVES.items():
                timed = ", ".join(measured_on(op, name, device))
                proofs = backend.PROVEN[device] + (f"; timed on {timed}" if timed else "")
                row = (name, device.upper(), ", ".join(map(_short, dtypes)), proofs)
                rows.setdefault(row, []).append(f"`{op}`")
    lines = ["| backend | device | ops | forward and backward in | proven by |", "|---|---|---|---|---|"]
    for (name, device, served, proofs), ops in sorted(rows.items()):
        which = "all four" if len(ops) == len(OPS) else ", ".join(ops)
        lines.append(f"| {name} | {device} | {which} | {served} | {proofs} |")
    return "\n".join(lines)


def measured_on(op: str, backend: str, device: str) -> list[str]:
    """The devices whose committed dispatch table of an op holds timings of a backend."""
    kinds = {"cpu": "cpu", "cuda": "nvidia"}
    found = []
    for path in sorted(table_path(op, "").parent.glob(f"{kinds[device]}*.json")):
        entries = read_table(path, "entries") or []
        if any(backend in entry["microseconds"] for entry in entries):
            found.append(path.stem)
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
