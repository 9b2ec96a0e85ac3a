"""Finds and loads the native library, and remembers why it could not.

`inherit_kernels/_C.abi3.so` holds torch operators only (no Python symbols): loading it registers the namespace
`inherit_kernels_C`. Without it the package works in plain torch; `error` then says what is missing and what to do.
"""

from __future__ import annotations

import json
import os
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


def isa() -> str | None:
    """The CPU instruction set in use (`generic`, `avx2`, `avx512`, `avx512_bf16`), or None without the library."""
    return ops.cpu_isa.default() if load() else None


def cuda_built() -> bool:
    """Whether the library carries CUDA kernels. Touches no device."""
    return load() and bool(ops.cuda_build_info.default())


def build_notes() -> dict[str, str | None]:
    """What the build left unbuilt: `error` (the library) and `cuda_error` (its CUDA part), a sentence or None each."""
    file = path.with_name("_build.json")
    return json.loads(file.read_text()) if file.is_file() else {}


def _try_load() -> str | None:
    wanted = os.environ.get("INHERIT_KERNELS_CPU_ISA")
    if wanted and wanted not in _ISAS:
        return f"INHERIT_KERNELS_CPU_ISA is '{wanted}', expected one of {', '.join(_ISAS)}"
    if not path.is_file():
        reason = build_notes().get("error")
        if reason is None:
            return "the native library was not built: install this package with a C++ compiler and torch >= 2.11"
        return f"the native library was not built: {reason}"
    try:
        torch.ops.load_library(str(path))
        ops.cpu_isa.default()
    except (OSError, RuntimeError) as problem:
        return f"the native library {path} did not load: {str(problem).splitlines()[0]}; install this package again"
    return None
