"""The command line from a shell's point of view: output, exit statuses, one-line errors, Ctrl-C."""

from __future__ import annotations

import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inhernet import load, nn
from inhernet.cli import main
from inhernet.cli.train import need_finite
from inhernet.distill.state import load_state

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}

USER_MODULE = """
import time
import torch
from torch import nn
from inhernet import models

def tiny():
    torch.manual_seed(0)
    return models.cifar_resnet(8, (8, 8, 16, 32), num_classes=10, in_channels=1)

def own():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

def batches():
    torch.manual_seed(1)
    return [(torch.randn(16, 1, 8, 8), torch.randint(10, (16,))) for _ in range(4)]

def parts():
    return batches(), batches()

def once():
    return (batch for batch in batches())

def odd():
    return {"training": batches()}

class Slow(list):
    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.1)
            yield batch

def slow():
    return Slow(batches() * 20)

def broken_images():
    return [(torch.full((16, 1, 8, 8), torch.nan), torch.randint(10, (16,)))]

def broken_validation():
    return batches(), broken_images()

def one():
    return [torch.randn(1, 1, 8, 8)]

def empty_test():
    return batches(), batches(), []

def number():
    return 3

def broken():
    raise RuntimeError("this function fails")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working directory with a module of models and data."""
    (tmp_path / "mine.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    return tmp_path


def shell(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inhernet", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)


def converted(folder: Path, *options: str) -> None:
    quick = ["--refine-steps", "5"]
    assert main(["convert", "mine:tiny", "--data", "mine:parts", "--out", "student", *quick, *options]) == 0


def test_plan_from_a_shell(folder: Path) -> None:
    done = shell("plan", "inhernet.models:resnet20", "--rank", "8", cwd=folder)
    assert done.returncode == 0
    assert "22 of 22 layers factorised" in done.stdout
    assert "whole model: 54,780 of 278,324 parameters (19.7%)" in done.stdout
    assert not any(line.endswith(" ") for line in done.stdout.splitlines())
    assert done.stderr.count("\n") == 1
    assert "no --weights" in done.stderr


def test_a_plan_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "inhernet.models:resnet20", "--budget", "0.5"]) == 0
    assert "14 of 22 ranks are no multiples of 8, which is slow on a GPU" in capsys.readouterr().out
    assert main(["plan", "inhernet.models:resnet20", "--budget", "0.5", "--device", "cuda"]) == 0
    said = capsys.readouterr().out
    assert "multiples" not in said
    assert "selected layers: 138,108 of 276,756 parameters (49.9%)" in said


def test_plan_is_written_and_followed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "mine:parts", "--budget", "0.4", "--heads", "2"]
    assert main(["plan", "mine:tiny", *options, "--out", "planned"]) == 0
    assert main(["convert", "mine:tiny", "--plan", "planned", "--out", "student"]) == 0
    model = load("student")
    assert any(isinstance(module, nn.GatedLowRankConv2d) for module in model.modules())
    assert "fisher" in capsys.readouterr().out


def test_convert_train_eval_bench(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = folder / "teacher.safetensors"
    import mine

    save_file(mine.tiny().state_dict(), weights)
    teacher = ["--teacher", "mine:tiny", "--weights", str(weights)]
    converted(folder, "--budget", "0.5", "--weights", str(weights))
    before = load("student").state_dict()
    assert main(["train", "student", *teacher, "--data", "mine:parts", "--epochs", "2", "--out", "trained"]) == 0
    after = load("trained").state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(value, load("student").state_dict()[key]) for key, value in before.items())
    assert not (folder / "trained.training").exists()
    capsys.readouterr()
    assert main(["eval", "trained", *teacher, "--data", "mine:parts"]) == 0
    assert {"accuracy", "KL to the teacher", "same decision"} <= {
        line[:22].strip() for line in capsys.readouterr().out.splitlines()
    }  # fmt: skip
    assert main(["bench", "trained", "--input", "1x8x8", "--batch", "1", "3", "--seconds", "0.01"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    medians = [float(line[-4]) for line in lines if line and line[0] in ("dense", "inherited", "published")]
    assert len(medians) == 6
    assert min(medians) > 0


def test_eval_fails_where_outputs_are_not_finite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Seen: "relative error 0.0000", accuracy 0.0625 and exit status 0.
    converted(folder, "--rank", "2")
    capsys.readouterr()
    for options in (["--teacher", "mine:tiny"], []):
        assert main(["eval", "student", *options, "--data", "mine:broken_images"]) == 1
        shown = capsys.readouterr()
        assert "0.0000" not in shown.out
        assert "nan" in shown.out
        assert shown.err.count("\n") == 1
        assert "not finite" in shown.err
        assert "16 of 16 rows" in shown.err or "in 16 rows" in shown.err


def test_own_architecture_needs_trust(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "mine:own", "--rank", "4", "--out", "student"]) == 0
    capsys.readouterr()
    assert main(["eval", "student", "--data", "mine:batches"]) == 2
    error = capsys.readouterr().err
    assert "'mine.own'" in error and "add --trust mine\n" in error and "trust=(" not in error
    assert main(["eval", "student", "--data", "mine:batches", "--trust", "mine"]) == 0
    assert main(["train", "student", "--data", "mine:batches", "--trust", "mine", "--epochs", "1", "--overwrite"]) == 0
    assert main(["bench", "student", "--trust", "mine", "--data", "mine:batches", "--seconds", "0.01"]) == 0
    # The module that the command names as the teacher is run anyway.
    assert main(["eval", "student", "--data", "mine:batches", "--teacher", "mine:own"]) == 0


def test_the_users_module_is_found_in_the_current_directory(tmp_path: Path) -> None:
    # `convert` found it; train, eval and optimize, in processes of their own, did not.
    (tmp_path / "mine.py").write_text(USER_MODULE)
    (tmp_path / "elsewhere.py").write_text("from mine import batches")
    for command in (
        "convert mine:own --rank 4 --out student",
        "eval student --trust mine --data elsewhere:batches",
        "train student --teacher mine:own --data elsewhere:batches --epochs 1 --out trained",
        "optimize trained --trust mine --input 1x8x8 --seconds 0.002 --out fast",
        "bench fast --trust mine --input 1x8x8 --seconds 0.002 --batch 1",
    ):
        script = str(Path(sys.executable).with_name("inhernet"))  # `python -m` would add the current directory itself
        done = subprocess.run([script, *command.split()], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


def digest(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_nothing_is_replaced_without_being_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(folder, "--rank", "2")
    assert main(["plan", "mine:tiny", "--rank", "2", "--out", "planned"]) == 0
    (folder / "link").symlink_to("student")
    before = digest(folder / "student") | digest(folder / "planned")
    teacher = ["--teacher", "mine:tiny", "--data", "mine:parts", "--epochs", "1"]
    for command, words in (
        (["convert", "mine:tiny", "--rank", "4", "--out", "student"], "holds an earlier result; .* or --overwrite"),
        (["convert", "mine:broken", "--rank", "4", "--out", "link"], "holds an earlier result"),  # before any work
        (["train", "student", *teacher], "--out is missing; .* or --overwrite to replace DIR itself"),
        (["train", "student", *teacher, "--out", "link"], "holds an earlier result"),
        (["optimize", "student", "--input", "1x8x8", "--out", "student/"], "holds an earlier result"),
        (["plan", "mine:broken", "--rank", "4", "--out", "planned"], "holds a plan; .* or --overwrite"),
        (["plan", "mine:broken", "--rank", "4", "--out", "link", "--overwrite"], "holds a model"),
        (["convert", "mine:tiny", "--plan", "planned", "--out", "planned", "--overwrite"], "holds the input 'planned'"),
    ):
        capsys.readouterr()
        assert main(command) == 2, command
        assert re.search(words, capsys.readouterr().err), command
        assert digest(folder / "student") | digest(folder / "planned") == before
    assert main(["train", "student", *teacher, "--overwrite"]) == 0
    assert main(["plan", "mine:tiny", "--rank", "4", "--out", "planned", "--overwrite"]) == 0
    assert main(["convert", "mine:tiny", "--rank", "4", "--out", "link", "--overwrite"]) == 0
    assert (folder / "link").is_symlink()
    assert (
        not digest(folder / "student").items() & before.items()
        and not digest(folder / "planned").items() & before.items()
    )


def test_a_teachers_directory_is_never_written_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # `inhernet convert hf:DIR --out DIR` exited 0, and the teacher was gone.
    transformers = pytest.importorskip("transformers", reason="no transformers: its directories were not converted")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(vocab_size=5, **sizes)).save_pretrained("bert")
    (folder / "link").symlink_to("bert")
    before = digest(folder / "bert")
    for out in ("bert", "link", "bert/../link/"):
        for options in ([], ["--overwrite"]):
            capsys.readouterr()
            assert main(["convert", "hf:bert", "--rank", "2", "--out", out, *options]) == 2
            assert "holds the input 'bert'" in capsys.readouterr().err
    weights = folder / "weights" / "model.safetensors"
    weights.parent.mkdir()
    import mine

    save_file(mine.tiny().state_dict(), weights)
    command = ["convert", "mine:tiny", "--weights", str(weights), "--rank", "2", "--overwrite", "--out"]
    assert main([*command, "weights"]) == 2
    assert "holds the input" in capsys.readouterr().err
    assert main(["convert", "mine:tiny", "--rank", "2", "--overwrite", "--out", "bert"]) == 2
    assert "something else than a model that inhernet saved" in capsys.readouterr().err
    assert digest(folder / "bert") == before and weights.is_file()
    # A plan that was edited by hand is nothing that a model may replace.
    assert main(["plan", "mine:tiny", "--rank", "2", "--out", "planned"]) == 0
    assert main(["convert", "mine:tiny", "--rank", "2", "--overwrite", "--out", "planned"]) == 2
    assert (folder / "planned" / "plan.json").is_file()


def test_a_broken_network_replaces_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Validation was NaN, the exit status 0, and the network before was overwritten.
    converted(folder, "--rank", "2")
    before = digest(folder / "student")
    train = ["train", "student", "--teacher", "mine:tiny", "--epochs", "1", "--overwrite", "--data"]
    capsys.readouterr()
    assert main([*train, "mine:broken_validation"]) == 2
    error = capsys.readouterr().err
    assert "the trained network is broken (val_" in error and "nothing was written to student" in error
    assert digest(folder / "student") == before
    assert (folder / "student.training").is_dir()
    assert main([*train, "mine:parts", "--restart"]) == 0
    assert digest(folder / "student") != before


def test_a_mask_is_no_broken_network() -> None:
    network = torch.nn.Linear(2, 2)
    network.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    need_finite(network, {"loss": 0.5}, "")
    for tensor in (network.weight.data, network.mask):
        tensor[0] = math.nan
        with pytest.raises(FloatingPointError, match="holds NaN"):
            need_finite(network, {}, "")
        tensor[0] = 0.0


def test_batchnorm_can_be_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mine

    converted(folder, "--rank", "2", "--keep-batchnorm")
    teacher, kept = mine.tiny().state_dict(), load("student").state_dict()
    assert all(torch.equal(kept[name], teacher[name]) for name in teacher if "running_" in name)
    converted(folder, "--rank", "2", "--overwrite")
    assert not torch.equal(load("student").state_dict()["bn1.running_mean"], teacher["bn1.running_mean"])


def test_warnings_are_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mine:own", "--data", "mine:one"]) == 0
    error = capsys.readouterr().err
    assert "inhernet: warning: calibration holds 1 sample, " in error and "UserWarning" not in error


def test_data_that_can_be_read_once_lasts_for_all_epochs(folder: Path) -> None:
    converted(folder, "--rank", "2")
    train = ["train", "student", "--teacher", "mine:tiny", "--data", "mine:once", "--epochs", "2", "--overwrite"]
    assert main(train) == 0


WRONG = [
    ("plan nowhere:net", "no module 'nowhere'"),
    ("plan mine:nothing", "has no function 'nothing'"),
    ("plan resnet20", "expected hf:DIR"),
    ("plan mine:number", "returned int, expected an nn.Module"),
    ("plan hf:nowhere", "no config.json"),
    ("plan mine:tiny --rank 0", "rank is 0"),
    ("plan mine:tiny --rank 4 --ratio 0.5", "not allowed with argument"),
    ("plan mine:tiny --budget -1", "is -1.0"),
    ("plan mine:tiny --heads 0", "heads is 0"),
    ("plan mine:tiny --init fisher", "calibration"),
    ("plan mine:tiny --exclude nosuch", "nosuch"),
    ("plan mine:tiny --weights nowhere.safetensors", "is not a file"),
    ("plan mine:tiny --weights mine.py", "not a safetensors file"),
    ("plan mine:tiny --data mine:odd", "expected train, val, test"),
    ("plan mine:tiny --data mine:number", "expected an iterable"),
    ("plan mine:tiny --data digit", "expected digits; text:PATH"),
    ("convert mine:tiny", "--out"),
    ("convert mine:tiny --plan nowhere --out x", "has no plan.json"),
    ("convert mine:tiny --plan nowhere --budget 0.3 --out x", "--budget is given beside --plan"),
    ("convert mine:tiny --plan nowhere --heads 3 --out x", "--heads is given beside --plan"),
    ("train nowhere --data digits --overwrite", "nowhere"),
    ("train student --data mine:parts", "--out is missing"),
    ("train student --data mine:parts --objective published", "needs --teacher"),
    ("train student --data mine:parts --lr 0", "lr is 0.0"),
    ("eval nowhere --data mine:parts", "nowhere"),
    ("bench student --input 3xx", "--input is '3xx'"),
    ("bench student --batch 0", "--batch is [0]"),
    ("demo nothing", "invalid choice"),
    ("demo digits --seeds 0", "--seeds is 0"),
    ("bogus", "invalid choice"),
    ("", "required"),
]


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[line or "nothing" for line, _ in WRONG])
def test_wrong_input_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    if "student" in line:
        converted(folder, "--rank", "2")
        capsys.readouterr()
    assert main(line.split()) == 2
    errors = [e for e in capsys.readouterr().err.splitlines() if not e.startswith("note:")]
    assert len(errors) == 1
    assert errors[0].startswith("inhernet: error: ")
    assert words in errors[0]


def test_weights_of_another_network_name_the_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"conv1.weight": torch.zeros(2, 2), "extra": torch.zeros(1)}, "wrong.safetensors")
    assert main(["plan", "mine:tiny", "--weights", "wrong.safetensors"]) == 2
    message = capsys.readouterr().err
    assert "unknown 'extra'" in message or "no 'bn1.weight'" in message


def test_failures_inside_are_status_1_and_debug_shows_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mine:broken"]) == 1
    assert capsys.readouterr().err == "inhernet: error: this function fails (RuntimeError; --debug shows where)\n"
    with pytest.raises(RuntimeError, match="this function fails"):
        main(["plan", "mine:broken", "--debug"])


def test_missing_extra_names_the_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["plan", "mine:tiny", "--data", "digits"]) == 2
    assert "pip install 'inherit-kernels[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_loses_nothing(folder: Path, capsys: pytest.CaptureFixture[str], number: int, status: int) -> None:
    converted(folder, "--rank", "2")
    train = ["train", "student", "--overwrite", "--teacher", "mine:tiny", "--data", "mine:slow", "--epochs", "1"]
    command = [sys.executable, "-m", "inhernet", *train]
    run = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    time.sleep(0.2)
    state = folder / "student.training"
    deadline = time.monotonic() + 60
    # The handler is installed before the first batch; 80 batches of 0.1 s leave time to hit it.
    while not _handles(run.pid, number) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    run.send_signal(number)
    message = run.communicate(timeout=60)[1]
    assert run.returncode == status
    assert "Traceback" not in message
    assert "the same command goes on from there" in message
    _, plain = load_state(state)
    assert 0 < plain["position"] < 80
    assert main([*train[:-1], "2"]) == 2  # another schedule is another run
    assert "epochs was 1, is 2" in capsys.readouterr().err
    for change, words in (
        (["--objective", "task"], "objective was"),
        (["--data", "mine:parts"], "batches was 80, is 4"),
    ):
        assert main([*train, *change]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "--restart" in error
    assert main([*train[:6], "mine:parts", "--epochs", "1", "--restart"]) == 0
    assert not state.exists()


def _handles(pid: int, number: int) -> bool:
    """Whether the process catches the signal (Linux): the bit in SigCgt."""
    if number == signal.SIGINT:
        number = signal.SIGTERM  # Python itself catches SIGINT from the start; both handlers are set together
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(mask >> (number - 1) & 1)


def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    command = (
        f"{sys.executable} -m inhernet plan inhernet.models:resnet110 --rank 4 2>err | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Traceback" not in (folder / "err").read_text()
    assert "Broken" not in (folder / "err").read_text()


def test_on_a_terminal_there_is_a_bar(folder: Path) -> None:
    converted(folder, "--rank", "2")
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "inhernet", "train", "student", "--teacher", "mine:tiny", "--data", "mine:parts"]
    command.append("--overwrite")
    run = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=child, stderr=child, close_fds=True)
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
    assert run.wait(60) == 0
    assert "━".encode() in shown
    assert b"epoch 5/5" in shown


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert "native library" in shown
    assert "extra [hf]" in shown


def test_help_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "inhernet plan inhernet.models:resnet20 --rank 8" in capsys.readouterr().out


def test_optimize_writes_a_directory_that_runs_and_trains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted(folder, "--rank", "4")
    command = ["optimize", "student", "--data", "mine:parts", "--batch", "2", "--seconds", "0.002", "--out", "fast"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "forms of" in out and "whole model, given" in out and "written to fast" in out
    fast = load("fast")
    assert fast.optimization.milliseconds["given"] > 0
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), load("student")(x), rtol=1e-3, atol=1e-4)
    assert main(["eval", "fast", "--data", "mine:parts"]) == 0
    assert main(["bench", "fast", "--input", "1x8x8", "--batch", "1", "--seconds", "0.01"]) == 0
    assert "optimised" in capsys.readouterr().out
    assert main(["train", "fast", "--data", "mine:parts", "--epochs", "1", "--out", "again"]) == 0
    assert main(["optimize", "student", "--batch", "0", "--out", "x"]) == 2
    assert "--batch is 0" in capsys.readouterr().err
