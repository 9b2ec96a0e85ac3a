"""Sweeps: what each budget costs and keeps, in the order asked for; taken up again where they stopped."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from inhernet import RefineConfig
from inhernet import sweep as house
from inhernet.cli import main
from inhernet.sweep import draw, sweep

QUICK = RefineConfig(steps=60)


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).eval()


def data(seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, 32, generator=torch.Generator().manual_seed(9)) * torch.linspace(2, 0.1, 32)
    rows = torch.randn(1024, 32, generator=generator) @ mix.T
    return [(part, part.argmax(1) % 10) for part in rows.split(32)]


def test_rows_say_what_a_network_costs_and_keeps(teacher):
    rows = sweep(teacher, data(), data(2), (0.7, 0.3), refine=QUICK, seconds=0.01)
    assert [(row.share, row.kind) for row in rows] == [
        (share, kind) for share in (0.7, 0.3) for kind in ("decomposed", "refined")
    ]
    for row in rows:
        # Biases count as parameters: the first layer's share of them is the odd per cent.
        assert row.params <= row.share * row.teacher_params
        assert 0 < row.macs < row.teacher_macs
        assert row.milliseconds > 0 and row.teacher_milliseconds > 0
        assert 0 <= row.agreement <= 1 and row.teacher_accuracy is not None
    assert rows[0].relative_error < rows[2].relative_error
    assert rows[3].relative_error < rows[2].relative_error
    assert [r.kind for r in sweep(teacher, data(), data(2), (0.5,), refine=False, seconds=0.01)] == ["decomposed"]


def test_it_goes_on_where_it_stopped(teacher, tmp_path, monkeypatch):
    arguments = {"refine": QUICK, "seconds": 0.01, "directory": tmp_path}
    sweep(teacher, data(), data(2), (0.5,), **arguments)
    made = []
    inherit = house.inherit
    monkeypatch.setattr(house, "inherit", lambda *a, **k: made.append(a[1].config.budget.amount) or inherit(*a, **k))
    rows = sweep(teacher, data(), data(2), (0.7, 0.5, 0.3), **arguments)
    assert made == [0.7, 0.3]
    assert [row.share for row in rows] == [0.7, 0.7, 0.5, 0.5, 0.3, 0.3]
    with torch.no_grad():
        teacher[0].weight.mul_(2)
    made.clear()
    sweep(teacher, data(), data(2), (0.5,), **arguments)  # another teacher: nothing is taken over
    assert made == [0.5]


def test_levels_of_one_network_are_measured_beside(teacher, tmp_path, monkeypatch):
    arguments = {"refine": QUICK, "seconds": 0.01, "directory": tmp_path, "elastic": True}
    rows = sweep(teacher, data(), data(2), (0.7, 0.3), **arguments)
    kinds = ("decomposed", "refined", "elastic")
    assert [(row.share, row.kind) for row in rows] == [(share, kind) for share in (0.7, 0.3) for kind in kinds]
    assert rows[5].params <= rows[3].params < rows[2].params
    assert rows[2].relative_error < rows[5].relative_error <= rows[3].relative_error
    monkeypatch.setattr(house, "make_elastic", lambda *a, **k: pytest.fail("made again"))
    assert sweep(teacher, data(), data(2), (0.7, 0.3), **arguments) == rows


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": 1}', "damaged"])
def test_a_damaged_file_is_made_anew(teacher, tmp_path, content):
    rows = sweep(teacher, data(), data(2), (0.5,), refine=False, directory=tmp_path, seconds=0.01)
    whole = (tmp_path / "sweep.json").read_text()
    (tmp_path / "sweep.json").write_text(whole[: len(whole) // 2] if content == "damaged" else content)
    again = sweep(teacher, data(), data(2), (0.5,), refine=False, directory=tmp_path, seconds=0.01)
    assert again[0].relative_error == pytest.approx(rows[0].relative_error)
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"]


def test_the_picture(teacher, tmp_path):
    pytest.importorskip("matplotlib")
    rows = sweep(teacher, data(), data(2), (0.6, 0.3), refine=QUICK, seconds=0.01)
    draw(rows, tmp_path / "sweep.png", "a title")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_from_a_shell(tmp_path, capsys):
    options = ["--data", "digits", "--shares", "0.5", "--no-refine", "--seconds", "0.01", "--out", str(tmp_path)]
    assert main(["sweep", "inhernet.demos.digits:digits_teacher", *options]) == 0
    shown = capsys.readouterr().out
    assert "fidelity by budget" in shown
    assert "decomposed" in shown
    assert (tmp_path / "sweep.json").exists()
