"""What is installed, built and loaded, and why not."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from inherit_kernels import _native
from inherit_kernels.common.checks import DTYPES
from inherit_kernels.dispatch import device_slug, forced_backend, table_path
from inherit_kernels.registry import OPS, Problem


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
        "inherit_kernels": _version(),
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


def _version() -> str:
    import inherit_kernels

    return inherit_kernels.__version__


def support_table() -> str:
    """Which backend of which op serves which device and dtype, with its backward, as a Markdown table.

    Generated from the registry; the README holds a copy that a test compares.
    """
    lines = ["| op | backend | CPU | CUDA | backward |", "|---|---|---|---|---|"]
    for op, spec in OPS.items():
        for name, backend in spec.backends.items():
            served = [
                ", ".join(_short(dtype) for dtype in DTYPES if backend.supports(_somewhere(op, dtype, device)) is None)
                or "–"
                for device in ("cpu", "cuda")
            ]
            lines.append(f"| `{op}` | {name} | {served[0]} | {served[1]} | yes |")
    return "\n".join(lines)


def _somewhere(op: str, dtype: torch.dtype, device: str) -> Problem:
    return Problem(op, dtype, torch.device(device), {}, (), False)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
