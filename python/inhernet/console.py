"""What goes to the terminal: tables and progress bars on a terminal, plain lines in a pipe or a log."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# In a pipe there is no window to fit: a table must not lose columns to rich's default of 80.
PIPE_WIDTH = 200
# A text column may be folded down to this width.
FOLD = 32
# Seconds of silence without a terminal: until the first line of progress, and at most.
FIRST_LINE, LONGEST_SILENCE = 2.0, 600.0


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


class _Log:
    """Where there is no terminal: when a task and those inside it began, and when one of them last spoke."""

    def __init__(self) -> None:
        self.begun = self.said = time.monotonic()

    def due(self, now: float) -> bool:
        return now - self.said >= min(max(FIRST_LINE, (now - self.begun) / 10), LONGEST_SILENCE)

    def say(self, text: str, *, stderr: bool) -> None:
        self.said = time.monotonic()
        say(text, stderr=stderr)


class Steps:
    """A running count: `advance()` per step, with what there is to say of it; `line(text)` for what is to stay.

    On a terminal a row with a bar. Elsewhere a line on stderr whenever nothing was said for a while: 2 s at first, then a
    tenth of the time so far, so that an hour gives some twenty lines.
    """

    def __init__(self, where: Progress | _Log, description: str, total: int | None, done: int) -> None:
        self._where, self._description, self._total = where, description, total
        self._start = self._done = done
        self._begun = time.monotonic()
        if isinstance(where, Progress):
            self._task = where.add_task(description, total=total, completed=done, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        if isinstance(self._where, Progress):
            self._where.update(self._task, advance=steps, note=note)
            return
        now = time.monotonic()
        if self._where.due(now):
            text = "  ".join(filter(None, (self._description.rstrip(), self._figures(now), note)))
            self._where.say(text, stderr=True)

    def line(self, text: str) -> None:
        if isinstance(self._where, Progress):
            self._where.console.print(f"{self._description}  {text}", soft_wrap=True)
        else:
            self._where.say(f"{self._description}  {text}", stderr=False)

    def close(self) -> None:
        if isinstance(self._where, Progress):
            self._where.remove_task(self._task)

    def _figures(self, now: float) -> str:
        if self._total is None:
            return f"step {self._done:,}"
        left = (now - self._begun) * (self._total - self._done) / max(self._done - self._start, 1)
        return f"step {self._done:,} of {self._total:,}, about {_clock(left)} left"


class _Silent(Steps):
    def advance(self, steps: int = 1, note: str = "") -> None:
        pass

    def line(self, text: str) -> None:
        pass


def _bar() -> Progress:
    """Rows of a bar that pulses where the length is unknown, a count, the time so far and left, and what is said of it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[note]}", markup=False),
    )
    return Progress(*columns, console=console(stderr=True), transient=True)


# Where the running task shows, or False inside a silent one: what runs inside (a validation) is a row of the same bar, and
# shares its silence in a log.
_current: ContextVar[Progress | _Log | bool | None] = ContextVar("_current", default=None)


@contextmanager
def progress(description: str, total: int | None = None, enabled: bool = True, done: int = 0) -> Iterator[Steps]:
    """Progress of one task, of which `done` steps are behind us. Not enabled, or inside such a task: silent."""
    outer = _current.get()
    silent = not enabled or outer is False
    with ExitStack() as stack:
        where: Progress | _Log = _Log()
        if not silent and isinstance(outer, (Progress, _Log)):
            where = outer
        elif not silent and sys.stderr.isatty():
            where = stack.enter_context(_bar())
        token = _current.set(False if silent else where)
        stack.callback(_current.reset, token)
        steps = (_Silent if silent else Steps)(where, description, total, done)
        stack.callback(steps.close)
        yield steps


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
