"""What measuring backends and measuring Triton configurations share: the order of cases, and the file that keeps both."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from inherit_kernels.common.tables import TABLE_VERSION, read_table
from inherit_kernels.dispatch import table_path

LAYOUTS = {"cpu": "contiguous", "cuda": "channels_last"}  # of images; tensor cores want their channels side by side

Item = TypeVar("Item")


def spread(items: Sequence[Item]) -> Iterator[Item]:
    """The items so that any beginning covers their whole range: the first, the middle, the quarters …."""
    bits = max(1, (len(items) - 1).bit_length())
    places = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return (items[place] for place in places if place < len(items))


def entries_of(op: str, slug: str) -> list[dict[str, Any]]:
    """The entries that a table holds."""
    return read_table(table_path(op, slug), "entries") or []


def write_table(op: str, slug: str, **tables: Any) -> None:
    """Put `entries` (a list) or `kernels` (a list by kernel) into a table, keeping its other part.

    Written aside, then renamed: a table is whole or not there. One entry a line, so that changes can be read.
    """
    path = table_path(op, slug)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {name: tables[name] if name in tables else read_table(path, name) for name in ("kernels", "entries")}
    head = {"version": TABLE_VERSION, "op": op, "device": slug, "torch": torch.__version__}
    if slug.startswith("cpu"):
        head["threads"] = torch.get_num_threads()
    aside = path.with_suffix(".tmp")
    aside.write_text(_as_text(head, parts))
    os.replace(aside, path)


def _as_text(head: dict[str, Any], parts: dict[str, Any]) -> str:
    def lines(entries: list[Any]) -> str:
        return "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]"

    text = json.dumps(head)[:-1]
    if parts["kernels"]:
        kernels = ",\n".join(f"{json.dumps(name)}: {lines(found)}" for name, found in parts["kernels"].items())
        text += ', "kernels": {\n' + kernels + "\n}"
    if parts["entries"]:
        text += ', "entries": ' + lines(parts["entries"])
    return text + "}\n"


def replaced(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`new`, and those of `old` that are about something else: a run that ended early loses nothing measured before."""

    def subject(item: dict[str, Any]) -> str:
        return json.dumps({k: v for k, v in item.items() if k not in ("config", "microseconds")}, sort_keys=True)

    known = {subject(item) for item in new}
    return new + [item for item in old if subject(item) not in known]
