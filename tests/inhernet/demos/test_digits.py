"""The digits demo end to end at a small size, and its parts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inhernet import ParamBudget, load
from inhernet.demos import digits_plot
from inhernet.demos.digits import DigitsConfig, Row, check_reload, compare_outputs, epochs_to_reach, print_spread, run
from inhernet.demos.digits_data import Images, digits, distort
from inhernet.distill import TrainConfig

pytest.importorskip("sklearn", reason="the digits need scikit-learn; nothing was proven about the demo")

SMALL = DigitsConfig(
    depth=8,
    widths=(16, 16, 24, 32),
    budgets=(0.45,),
    teacher=TrainConfig(epochs=6, lr=0.1, clip_norm=1.0),
    student=TrainConfig(epochs=2, lr=0.1, clip_norm=1.0),
    tuning=TrainConfig(epochs=1, lr=0.02, clip_norm=1.0, keep_best="min:val_kl"),
    latency_seconds=0.01,
    compile=False,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    directory = tmp_path_factory.mktemp("digits")
    return directory, run(directory, SMALL, picture=True)


def test_demo_runs_and_the_model_survives_a_new_process(finished: tuple[Path, int]) -> None:
    directory, status = finished
    assert status == 0
    figures = {row["name"]: row for row in json.loads((directory / "figures.json").read_text())}
    teacher, student = figures["teacher"], figures["student 45%, from scratch"]
    assert teacher["history"][-1]["accuracy"] > 0.9
    for heads in ("1 head", "3 heads"):
        row = figures[f"inherited 45%, {heads}"]
        assert 0.44 < row["parameters"] / teacher["parameters"] <= 0.45
        assert len(row["history"]) == 2
        assert set(row["latency"]) == {"1", "64"}
    inherited = figures["inherited 45%, 1 head"]
    assert abs(student["parameters"] / inherited["parameters"] - 1) <= 0.02
    # What the demo is about: without training the inherited network is far ahead of where the student starts, and
    # stays ahead while both train. A tenth of the student's KL is far from the usual hundredth.
    assert inherited["history"][0]["kl"] < 0.1 * student["history"][0]["kl"]
    assert inherited["history"][-1]["kl"] < student["history"][-1]["kl"]
    assert inherited["history"][0]["accuracy"] > 0.8


def test_results_are_written(finished: tuple[Path, int]) -> None:
    directory, _ = finished
    assert (directory / "digits.png").read_bytes()[:4] == b"\x89PNG"
    assert len((directory / "digits.png").read_bytes()) > 50_000
    model = load(directory / "model")
    assert model.inhernet_plan.config.budget == ParamBudget(0.45, of="model")
    assert set(load_file(directory / "teacher.safetensors")) >= {"conv1.weight", "fc.bias"}


def test_a_changed_model_is_noticed(
    finished: tuple[Path, int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, _ = finished
    recorded = load_file(source / "outputs.safetensors")
    (tmp_path / "model").symlink_to(source / "model")
    save_file(recorded, tmp_path / "outputs.safetensors")
    assert compare_outputs(tmp_path) == 0
    recorded["outputs"][7, 3] += 0.01
    save_file(recorded, tmp_path / "outputs.safetensors")
    assert not check_reload(tmp_path)
    assert "WRONG" in capfd.readouterr().out


def test_splits_are_fixed_stratified_and_disjoint() -> None:
    first, again, other = digits(0), digits(0), digits(1)
    assert torch.equal(first.test.x, again.test.x)
    assert not torch.equal(first.test.x, other.test.x)
    sizes = [len(part.x) for part in (first.calibration, first.val, first.test)]
    assert sizes == [1257, 180, 360]
    rows = {tuple(image.flatten().tolist()) for part in (first.calibration, first.val, first.test) for image in part.x}
    assert len(rows) == 1797
    for part, least, most in ((first.test, 34, 38), (first.val, 17, 19)):
        shares = torch.bincount(part.y, minlength=10)
        assert int(shares.min()) >= least
        assert int(shares.max()) <= most


def test_training_images_are_distorted_and_the_rest_is_not() -> None:
    data = digits(0)
    torch.manual_seed(0)
    x, y = next(iter(data.train))
    assert x.shape == (64, 1, 8, 8)
    assert y.shape == (64,)
    assert x.min() >= -1.0001
    assert x.max() <= 1.0001
    assert not (x[:, None] == data.calibration.x[None]).flatten(2).all(-1).any()
    assert torch.equal(torch.cat([x for x, _ in data.test]), data.test.x)
    still = distort(data.test.x)
    change = (still - data.test.x).abs().mean()
    assert 0.02 < float(change) < 0.5


def test_images_cover_every_row_once_per_pass() -> None:
    x = torch.arange(10.0)[:, None, None, None].expand(10, 1, 8, 8)
    loader = Images(x, torch.arange(10), batch=4, training=True)
    assert len(loader) == 3
    assert sorted(torch.cat([y for _, y in loader]).tolist()) == list(range(10))


def test_epochs_to_reach() -> None:
    history = [{"epoch": i, "kl": kl} for i, kl in enumerate((0.5, 0.2, 0.3, 0.1))]
    row = Row("x", torch.nn.Identity(), history, None, 0, 0, 0.0)
    assert epochs_to_reach(row, 0.2) == 1
    assert epochs_to_reach(row, 0.15) == 3
    assert epochs_to_reach(row, 0.05) is None
    assert row.best == history[3]
    assert replace(row, best_epoch=1).best == history[1]


def test_spread_is_mean_deviation_and_range(capsys: pytest.CaptureFixture[str]) -> None:
    def rows(kl: float) -> list[Row]:
        teacher = Row("teacher", None, [{"epoch": 0, "accuracy": 0.1}, {"epoch": 1, "accuracy": 0.99}], 1, 0, 0, 0.0)
        history = [{"epoch": 0, "accuracy": 0.9, "kl": 1.0}, {"epoch": 1, "accuracy": 0.95, "kl": kl}]
        return [teacher, Row("student", None, history, None, 0, 0, 0.0)]

    print_spread([rows(0.1), rows(0.2), rows(0.6)])
    lines = capsys.readouterr().out.splitlines()
    assert "spread over 3 runs: mean ± sd (min-max)" in lines
    student = next(line for line in lines if "student" in line)
    assert student.count("0.3000 ± 0.2646 (0.1000-0.6000)") == 2
    assert "99.0 ± 0.0 (99.0-99.0)" in next(line for line in lines if "teacher" in line)


def test_missing_matplotlib_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'inherit-kernels\[demo\]'"):
        digits_plot.require_matplotlib()
