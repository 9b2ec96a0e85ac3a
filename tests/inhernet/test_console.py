"""Tables and progress: plain in a pipe, nothing cut in a narrow window."""

from __future__ import annotations

import pytest

from inhernet import console

COLUMNS = ["network", *(f"figure {i}" for i in range(12))]
ROWS = [["a network with a name", *(f"{i}.123456" for i in range(12))] for _ in range(2)]


def test_a_pipe_gets_one_table_without_padding(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("title [hf]", COLUMNS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title [hf]"
    assert sum("a network" in line for line in lines) == 2
    assert all(line == line.rstrip() and len(line) <= console.PIPE_WIDTH for line in lines)


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_narrow_window_gets_several_tables_and_every_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(console, "PIPE_WIDTH", width)
    console.table("title", COLUMNS, ROWS)
    shown = capsys.readouterr().out
    assert all(len(line) <= width for line in shown.splitlines())
    assert all(shown.count(f" {i}.123456") == 2 for i in range(12))
    assert "…" not in shown


def test_progress_in_a_pipe_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("train", 3) as steps:
        steps.advance()
        steps.line("epoch 1/3")
    assert capsys.readouterr().out == "train  epoch 1/3\n"


def test_silent_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("train", 3, enabled=False) as steps:
        steps.advance()
        steps.line("epoch 1/3")
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until it is told."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_long_task_in_a_pipe_speaks_now_and_then(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    # Seen: not a line before the end of an epoch, however long it was.
    with console.progress("train", 36_000) as steps:
        for second in range(36_000):  # ten hours, a step per second
            clock[0] = float(second + 1)
            steps.advance(note="loss 0.5")
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == ""
    assert lines[0] == "train  step 2 of 36,000, about 9:59:58 left  loss 0.5"
    assert 50 < len(lines) < 150


def test_what_was_said_counts_and_an_inner_task_shares_it(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with console.progress("train", 10) as steps, console.progress("evaluate") as inner:
        clock[0] = 1.9
        steps.line("epoch 1/3")
        clock[0] = 2.1
        steps.advance()
        inner.advance()
        assert capsys.readouterr().err == ""
        clock[0] = 4.0
        inner.advance()
        steps.advance()
    assert capsys.readouterr().err == "evaluate  step 2\n"


def test_inside_a_silent_task_all_is_silent(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with console.progress("train", 3, enabled=False), console.progress("evaluate", 3) as inner:
        clock[0] = 60.0
        inner.advance()
        inner.line("done")
    assert capsys.readouterr() == ("", "")
    with console.progress("train", 3) as outer, console.progress("quiet", 3, enabled=False) as inner:
        inner.line("no")
        outer.line("yes")
    assert capsys.readouterr().out == "train  yes\n"
