"""Finds and loads the native library, and remembers why it could not.

`inherit_kernels/_C.abi3.so` holds torch operators only (no Python symbols): loading it registers the namespace
`inherit_kernels_C`. Without it the package works in plain torch; `error` then says what is missing and what to do.

A library runs code as it is loaded, and a damaged one ends the process. So only the file that the build noted in
`_build.json`, by its SHA-256, is loaded (6.5 MB: 10 ms).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

#: Where the library lies when it was built.
path: Path = Path(__file__).with_name("_C.abi3.so")
#: One sentence: why the library is not loaded and what to do; None once it is.
error: str | None = None
#: `torch.ops.inherit_kernels_C`; its operators exist once `load()` returned True.
ops: Any = torch.ops.inherit_kernels_C

_ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
_loaded: bool | None = None
_warned = False
_AGAIN = "install this package again: pip install --force-reinstall --no-deps --no-cache-dir ."


def load() -> bool:
    """Whether the native library is loaded; loads it on the first call. Never raises: see `error`.

    Example:
        >>> from inherit_kernels import _native
        >>> _native.load() or _native.error is not None
        True
    """
    global _loaded, error
    if _loaded is None:
        error = _try_load()
        _loaded = error is None
    return _loaded


def warn_once() -> None:
    """Say, at the first use of an op in this process, that the native library is missing and how to get it; nothing
    where it was left out on purpose (INHERIT_KERNELS_BUILD=none)."""
    global _warned
    if not _warned:
        _warned = True
        if not load() and not build_notes().get("deliberate"):
            warnings.warn(f"inherit_kernels computes in plain torch: {error}", RuntimeWarning, stacklevel=2)


def isa() -> str | None:
    """The CPU instruction set in use (`generic`, `avx2`, `avx512`, `avx512_bf16`), or None without the library."""
    return ops.cpu_isa.default() if load() else None


def cuda_built() -> bool:
    """Whether the library carries CUDA kernels. Touches no device."""
    return load() and bool(ops.cuda_build_info.default())


def build_notes() -> dict[str, Any]:
    """What the build wrote down: `error` (of the library) and `cuda_error` (of its CUDA part), a sentence or None each,
    `sha256` of the library, `interface` (of the operators' declarations), `deliberate` where nothing was to be built."""
    try:
        notes = json.loads(path.with_name("_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _not_ours() -> str | None:
    """Why the library that lies there is not loaded: another file than was built, or built from other declarations."""
    notes, declarations = build_notes(), path.parents[1] / "csrc" / "registration.cpp"
    if notes.get("sha256") != _sha256(path):
        return "it is not the file that the build of this package noted in _build.json (damaged, or another version's)"
    if declarations.is_file() and notes.get("interface") != _sha256(declarations):
        return "it was built from other sources than those beside it"
    return None


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _try_load() -> str | None:
    wanted = os.environ.get("INHERIT_KERNELS_CPU_ISA")
    if wanted and wanted not in _ISAS:
        return f"INHERIT_KERNELS_CPU_ISA is '{wanted}', expected one of {', '.join(_ISAS)}"
    if not path.is_file():
        reason = build_notes().get("error") or f"with a C++ compiler and torch >= 2.11, {_AGAIN}"
        return f"the native library was not built: {reason}"
    try:
        reason = _not_ours()
        if reason is not None:
            return f"the native library {path} is left out: {reason}; {_AGAIN}"
        torch.ops.load_library(str(path))
        ops.cpu_isa.default()
    except (OSError, RuntimeError) as problem:
        return f"the native library {path} did not load: {str(problem).splitlines()[0]}; {_AGAIN}"
    return None
