"""kill -9 at every step and at random moments of a save: the old or the new version is there, complete.

Three facts of a version must agree (all tensors, the architecture's arguments, the shapes), so a mixture is noticed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import inhernet
from inhernet import atomic

KILLER = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import shutil
import inhernet
from inhernet import atomic, checkpoint, models

def version(k):
    model = models.cifar_resnet(8, (4, 4, 8, 16), num_classes=2 + k % 3, in_channels=1)
    for tensor in model.state_dict().values():
        tensor.fill_(k)
    return model

def die_at(holder, name, call, after):
    original, count = getattr(holder, name), [0]
    def dying(*args, **kwargs):
        count[0] += 1
        if count[0] == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if count[0] == call and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(holder, name, dying)

HOLDERS = {"os": os, "shutil": shutil, "atomic": atomic, "checkpoint": checkpoint}
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        if not order["exchange"]:
            atomic._exchange = lambda a, b: False
        if "point" in order:
            holder, name, call, after = order["point"]
            die_at(HOLDERS[holder], name, call, after)
            inhernet.save(version(order["start"]), order["dir"])
            os._exit(0)
        print(os.getpid(), flush=True)
        k = order["start"]
        while True:
            inhernet.save(version(k), order["dir"])
            k += 1
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)
"""


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    script = tmp_path_factory.mktemp("killer") / "killer.py"
    script.write_text(textwrap.dedent(KILLER))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait(timeout=30)


def order(process, **values) -> str:
    process.stdin.write(json.dumps(values) + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def complete_version(directory: Path) -> int:
    """The version in a directory, after checking that all three facts about it agree."""
    loaded = inhernet.load(directory)
    values = {float(value) for tensor in loaded.state_dict().values() for value in tensor.flatten()[:1]}
    assert len(values) == 1
    number = int(values.pop())
    assert loaded.fc.out_features == 2 + number % 3
    return number


POINTS = [
    ("checkpoint", "save_file", 1, False),
    ("checkpoint", "save_file", 1, True),
    *(("atomic", "_flush", call, after) for call in (1, 2, 3, 4) for after in (False, True)),
    ("atomic", "_swap", 1, False),
    ("atomic", "_swap", 1, True),
    ("os", "rename", 1, False),
    ("os", "rename", 1, True),
    ("os", "rename", 2, False),
    ("os", "rename", 2, True),
    ("shutil", "rmtree", 1, False),
    ("shutil", "rmtree", 1, True),
]


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_every_step_leaves_the_old_or_the_new(killer, exchange, tmp_path):
    directory, seen, never = tmp_path / "m", set(), ["os", "rename", 9, False]
    for index, point in enumerate(POINTS):
        kept, number = 2 * index, 2 * index + 1
        assert order(killer, dir=str(directory), start=kept, exchange=True, point=never) == "ended"
        assert complete_version(directory) == kept
        assert os.listdir(tmp_path) == ["m"]
        end = order(killer, dir=str(directory), start=number, exchange=exchange, point=point)
        assert end == "killed" or (exchange and point[:2] == ("os", "rename")), point
        found = complete_version(directory)
        assert found in (kept, number), point
        seen.add("old" if found == kept else "new")
    assert seen == {"old", "new"}


def test_killed_at_random_moments_of_a_save_loop(killer, tmp_path):
    directory, chance, leftovers, newest = tmp_path / "m", random.Random(0), 0, 0
    order(killer, dir=str(directory), start=0, exchange=True, point=["os", "rename", 9, False])
    for _ in range(20):
        pid = int(order(killer, dir=str(directory), start=newest + 1, exchange=True))
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert killer.stdout.readline() == "killed\n"
        leftovers += len(os.listdir(tmp_path)) - 1
        found = complete_version(directory)
        assert found >= newest
        newest = found
    assert newest > 0
    assert leftovers > 0


@pytest.mark.parametrize("exchange", [True, False])
def test_replaces_a_directory_and_cleans_up(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    (tmp_path / ".[m].saving-dead").mkdir()
    (tmp_path / ".other.saving-alive").mkdir()
    for text in ("first", "second"):
        atomic.replace_directory(tmp_path / "[m]", lambda fresh, text=text: (fresh / "file").write_text(text))
        assert (tmp_path / "[m]" / "file").read_text() == text
    assert sorted(os.listdir(tmp_path)) == [".other.saving-alive", "[m]"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_writer_that_fails_changes_nothing(exchange, tmp_path, monkeypatch):
    target = tmp_path / "m"
    atomic.replace_directory(target, lambda fresh: (fresh / "file").write_text("good"))

    def refuse(*args):
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        atomic.replace_directory(target, refuse)
    if not exchange:
        rename = os.rename
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
        monkeypatch.setattr(os, "rename", lambda a, b: refuse() if "saving" in str(a) else rename(a, b))
        with pytest.raises(OSError, match="no"):
            atomic.replace_directory(target, lambda fresh: (fresh / "file").write_text("bad"))
    assert (target / "file").read_text() == "good"
    assert os.listdir(tmp_path) == ["m"]
