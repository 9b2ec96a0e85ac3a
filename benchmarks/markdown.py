"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]], text: Sequence[int]) -> str:
    """A Markdown table; the columns in `text` are aligned left, the others are figures."""
    rule = ["---" if index in text else "--:" for index in range(len(columns))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, rule, *lines))
