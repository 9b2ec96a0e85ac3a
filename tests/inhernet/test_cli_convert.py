"""`inhernet convert` with data refines, shows what it did, and loses nothing that is finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import inhernet
from inhernet.cli import main
from inhernet.decompose import refine, scene

USER_MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(c, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()) for c in (8, 24, 24, 24)))

def data():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 8, 8, 8, generator=generator) for _ in range(2)]
"""
TEACHER = "brought:net"


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The teacher's name and weights: a function alone would draw others at each call."""
    from safetensors.torch import save_file

    (tmp_path / "brought.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "brought", raising=False)
    import brought

    torch.manual_seed(0)
    save_file(brought.net().state_dict(), tmp_path / "weights.safetensors")
    return [TEACHER, "--weights", str(tmp_path / "weights.safetensors"), "--data", "brought:data", "--budget", "0.4"]


def state(directory: Path) -> dict[str, torch.Tensor]:
    return inhernet.load(directory, trust=("brought",)).state_dict()


def test_blocks_are_refined_and_shown(teacher, tmp_path, capsys):
    out = [tmp_path / name for name in ("refined", "plain")]
    assert main(["convert", *teacher, "--refine-steps", "3", "--out", str(out[0])]) == 0
    shown = capsys.readouterr().out
    assert "errors of the network's output" in shown
    assert "1.0" in shown
    assert "→" in shown
    assert not (tmp_path / "refined.refining").exists()
    assert main(["convert", *teacher, "--no-refine", "--out", str(out[1])]) == 0
    assert "errors of the network's output" not in capsys.readouterr().out
    refined, plain = (state(path) for path in out)
    assert any(not torch.equal(refined[name], plain[name]) for name in plain)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_conversion_that_was_stopped_goes_on(teacher, tmp_path, monkeypatch, number, status):
    command = ["convert", *teacher, "--refine-steps", "1000", "--out", str(tmp_path / "stopped")]
    whole = [*command[:-1], str(tmp_path / "whole")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "inhernet", *command]
    # A background job of a shell ignores Ctrl-C, and so would what it starts.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    first = subprocess.Popen(run, env=environment, preexec_fn=heed, **pipes)
    # Two blocks of 1,000 steps are left then, seconds: the signal comes in time on a busy machine too.
    finished = tmp_path / "stopped.refining" / "block-0001.safetensors"
    deadline = time.monotonic() + 120
    while not finished.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(number)
    message = first.communicate(timeout=60)[1]
    assert first.returncode == status
    assert "Traceback" not in message
    if number == signal.SIGINT:
        assert "the same command goes on from there" in message
    assert not (tmp_path / "stopped").exists()
    trained = []
    train = refine._Block._train
    monkeypatch.setattr(refine._Block, "_train", lambda self, *a: trained.append(self.name) or train(self, *a))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(command) == 0
        again = list(trained)
        assert main(whole) == 0
    finally:
        torch.set_num_threads(threads)
    assert 0 < len(again) <= len(trained) - len(again) - 2
    found, expected = state(tmp_path / "stopped"), state(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "stopped.refining").exists()


def test_a_saved_plan_without_its_data_says_what_is_missing(teacher, tmp_path, capsys):
    assert main(["plan", *teacher, "--out", str(tmp_path / "plan")]) == 0
    capsys.readouterr()
    named = [*teacher[:3], "--plan", str(tmp_path / "plan")]
    assert main(["convert", *named, "--out", str(tmp_path / "model")]) == 0
    error = capsys.readouterr().err
    assert "blocks are not refined and BatchNorm keeps the teacher's statistics" in error
    assert "--data" in error
    silent = ["--no-refine", "--keep-batchnorm", "--out", str(tmp_path / "silent")]
    assert main(["convert", *named, *silent]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("option", "words"), [("--macs", "MACs"), ("--error", "error"), ("--latency", "speed")])
def test_budgets_of_other_kinds(teacher, tmp_path, capsys, monkeypatch, option, words):
    monkeypatch.setattr(scene, "NETWORK_SECONDS", 0.05)
    amount = {"--macs": "0.5", "--error": "0.3", "--latency": "0.9"}[option]
    arguments = [*teacher[:-2], option, amount, "--no-refine", "--out", str(tmp_path / "model")]
    assert main(["convert", *arguments]) == 0
    assert "layers factorised" in capsys.readouterr().out
    plan = inhernet.load(tmp_path / "model", trust=("brought",)).inhernet_plan
    assert plan.config.budget.kind == {"MACs": "macs", "error": "fidelity", "speed": "latency"}[words]
