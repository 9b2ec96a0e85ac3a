"""The files of measurements, `configs/<op>/<device>.json`: what they may hold, and reading them without trust.

A table has `version`, `entries` (timings by which backends are chosen) and `kernels` (configurations of Triton kernels).
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

from inherit_kernels.common.activation import ACTIVATION_CODES

TABLE_VERSION = 1
LETTERS = frozenset("MKNRHBCTP")  # of the sizes that tables name


def read_table(path: Path, part: str) -> Any:
    """One part of a table: `entries`, a list, or `kernels`, lists by name; None where there is no such file or part.

    A damaged part is None too, with a warning that names the file.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}, expected an object")
        if table.get("version") != TABLE_VERSION:
            raise ValueError(f"version {table.get('version')!r}, expected {TABLE_VERSION}")
        found = table.get(part)
        if found is not None:
            {"entries": _check_entries, "kernels": _check_kernels}[part](found)
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as problem:
        warnings.warn(
            f"the {part} of the table {path} are left out: {problem or 'too deep'}; "
            f"measure them again with `python -m inherit_kernels.tune`, or delete the file",
            stacklevel=3,
        )
        return None


def _check_entries(entries: Any) -> None:
    if not isinstance(entries, list):
        raise ValueError("its entries are no list")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not (
            isinstance(entry.get("dtype"), str) and isinstance(entry.get("training"), bool)
        ):
            raise ValueError(f"entry {number} has no dtype and training")
        for name in ("sizes", "microseconds"):
            values = entry.get(name)
            if not isinstance(values, dict) or not all(_is_size(value) for value in values.values()):
                raise ValueError(f"{name} of entry {number} are not numbers by name")
        if entry.get("activation") not in ACTIVATION_CODES or not isinstance(entry.get("residual", False), bool):
            raise ValueError(f"entry {number} has an activation or a residual that is none")
        if not set(entry["sizes"]) <= LETTERS:
            raise ValueError(f"entry {number} has sizes of unknown letters")


def _check_kernels(kernels: Any) -> None:
    if not isinstance(kernels, dict):
        raise ValueError("its kernels are no object")
    for name, buckets in kernels.items():
        if not isinstance(buckets, list) or not all(isinstance(bucket, dict) for bucket in buckets):
            raise ValueError(f"{name} is no list of buckets")
        for bucket in buckets:
            config = bucket.get("config")
            sizes = {name: value for name, value in bucket.items() if name not in ("config", "microseconds")}
            if sizes.get("bits") not in (16, 32) or not all(_is_size(value) for value in sizes.values()):
                raise ValueError(f"{name} has a bucket whose bits or sizes are no numbers")
            if not isinstance(config, dict) or not all(type(value) is int and value >= 0 for value in config.values()):
                raise ValueError(f"{name} has a configuration that is not whole numbers by name")


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
