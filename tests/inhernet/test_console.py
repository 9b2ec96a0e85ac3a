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
