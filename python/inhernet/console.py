"""What goes to the terminal: tables and progress bars on a terminal, plain lines in a pipe or a log."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

# In a pipe there is no window to fit: a table must not lose columns to rich's default of 80.
PIPE_WIDTH = 200
# A text column may be folded down to this width.
FOLD = 32


def console(stderr: bool = False) -> Console:
    """A console on the current stdout (or stderr); markup is off, so that `[hf]` stays `[hf]`."""
    stream = sys.stderr if stderr else sys.stdout
    width = shutil.get_terminal_size((PIPE_WIDTH, 24)).columns if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


def say(text: str = "", *, stderr: bool = False) -> None:
    """Print text as it is, unwrapped."""
    print(text, file=sys.stderr if stderr else sys.stdout, flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], left: Sequence[int] = (0,)) -> None:
    """Print a table; columns whose index is in `left` are text, aligned left; the others are figures.

    What is too wide for the window goes on in a second table below.
    """
    out = console()
    cells = [[str(cell) for cell in row] for row in rows]
    for group in _groups(columns, cells, left, out.width):
        _print(out, title, [columns[i] for i in group], [[row[i] for i in group] for row in cells], group, left)
        title = ""


def _groups(columns: Sequence[str], cells: list[list[str]], left: Sequence[int], window: int) -> list[list[int]]:
    """Column indices per table: one if all fit the window, else several that all begin with the first column."""
    widths = [max(map(len, (column, *(row[i] for row in cells)))) + 3 for i, column in enumerate(columns)]
    widths = [min(width, FOLD) if index in left else width for index, width in enumerate(widths)]
    groups, used = [[0]], widths[0]
    for index in range(1, len(columns)):
        if used + widths[index] > window and len(groups[-1]) > 1:
            groups.append([0])
            used = widths[0]
        groups[-1].append(index)
        used += widths[index]
    return groups


def _print(
    out: Console, title: str, columns: list[str], cells: list[list[str]], group: list[int], left: Sequence[int]
) -> None:
    result = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in zip(group, columns, strict=True):
        # no_wrap: a figure cut in two lines cannot be read; a narrow window folds the text columns only.
        result.add_column(column, justify="left" if index in left else "right", no_wrap=index not in left)
    for row in cells:
        result.add_row(*row)
    with out.capture() as drawn:
        out.print(result)
    # Rich pads every line to the table's width; in a log the padding is noise.
    say(
        "\n".join(line.rstrip() for line in drawn.get().splitlines())
        if not out.is_terminal
        else drawn.get().rstrip("\n")
    )


class Steps:
    """A running count: `advance()` per step moves the bar, if there is one; `line(text)` stays above it."""

    def __init__(self, bar: Progress | None, description: str, total: int | None) -> None:
        self._bar = bar
        self._description = description
        self._task = TaskID(0) if bar is None else bar.add_task(description, total=total)

    def advance(self, steps: int = 1) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, steps)

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(f"{self._description}  {text}", soft_wrap=True)
        else:
            say(f"{self._description}  {text}")


@contextmanager
def progress(description: str, total: int | None = None, enabled: bool = True) -> Iterator[Steps]:
    """Progress of one task. Not enabled: silent. On a terminal a bar on stderr, otherwise `line`s on stdout."""
    if not enabled:
        yield _Silent(None, description, total)
    elif not sys.stderr.isatty():
        yield Steps(None, description, total)
    else:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console(stderr=True), transient=True) as bar:
            yield Steps(bar, description, total)


class _Silent(Steps):
    def line(self, text: str) -> None:
        pass
