"""The benchmark house on a GPU, rehearsed on the CPU: cases, crashes, figures, the whole sweep.

Seen failing once: the crash test without `_record`, the figures with the ratio upside down, the rehearsal with a backend
whose last output element is wrong (its row says wrong and has no time).
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.candidates import _in_backend
from benchmarks.gpu import cases, figures, plot, rows, run, summary
from benchmarks.gpu.device import Cuda, Rehearsal
from benchmarks.gpu.measure import Rates, measure
from benchmarks.gpu.worker import State
from inherit_kernels.dispatch import forced_backend
from inherit_kernels.registry import OPS

ROOT = Path(__file__).parents[2]


def test_the_sweep_is_ordered_by_the_figures_and_covers_the_grid():
    sweep = cases.sweep()
    assert len({item.key for item in sweep}) == len(sweep) == len(cases.select(sweep))
    assert {regime for item in sweep[:12] for regime in item.regimes} >= set(cases.REGIMES) - {"conv_small"}
    assert {item.point.op for item in sweep} == set(OPS)
    linear = [item for item in sweep if item.point.op == cases.GATED]
    assert {item.sizes["M"] for item in linear} >= set(cases.ROWS)
    assert {item.sizes["R"] for item in linear} >= set(cases.RANKS)
    assert {item.sizes["H"] for item in linear} >= set(cases.HEADS)
    assert {(item.sizes["K"], item.sizes["N"]) for item in linear} >= set(cases.SIZES)
    assert {item.dtype for item in linear} == set(cases.DTYPES)
    for figure in figures.FIGURES:
        assert any(figure.regime in item.regimes for item in cases.core()), figure


def test_parts_cover_the_sweep_once():
    sweep = cases.sweep()
    parts = [cases.select(sweep, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(item.key for part in parts for item in part) == sorted(item.key for item in sweep)
    only = cases.select(sweep, ops=[cases.CONV], words=["conv_small"])
    assert only and all(item.sizes["P"] in (49, 196) for item in only)
    for wrong in ("0/3", "4/3", "x", "1"):
        with pytest.raises(ValueError, match="part"):
            cases.select(sweep, wrong)
    with pytest.raises(ValueError, match="op"):
        cases.select(sweep, ops=["linear"])


def test_both_devices_have_the_same_methods():
    def methods(device):
        found = inspect.getmembers(device, inspect.isfunction)
        return {name: inspect.signature(f) for name, f in found if not name.startswith("_")}

    assert methods(Cuda) == methods(Rehearsal)


# --- one measurement ---------------------------------------------------------------------------------------------------


@pytest.fixture
def measured():
    """A function that measures one item of the rehearsal."""
    device = Rehearsal()
    rates = Rates(device)

    def once(item, skipped=None):
        visited = []
        found = measure(item, device, rates, {"schema": rows.SCHEMA}, skipped or {}, visited.append)
        return {row["candidate"]: row for row in found}, visited

    return once


def test_a_wrong_a_failing_and_a_skipped_candidate_are_rows(measured, monkeypatch):
    item = next(item for item in cases.rehearsal() if item.point.op == cases.LINEAR and item.dtype == "float32")
    unfused = OPS[cases.LINEAR].backends["unfused"]
    forward = unfused.forward

    def wrong(*args):
        y = forward(*args).clone()
        y.view(-1)[-1] += 1
        return y

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    OPS[cases.LINEAR].forwards.clear()
    monkeypatch.setattr(unfused, "forward", wrong)
    found, visited = measured(item, {"dense": "the process ended with -11 while it ran"})
    assert found["unfused"]["status"] == "wrong" and "cold_us" not in found["unfused"]
    assert found["dense"]["status"] == "failed" and "-11" in found["dense"]["note"]
    assert found["pair"]["status"] == "ok" and found["pair"]["cold_us"] > 0 and found["pair"]["eager_us"] > 0
    backends = [name for name in OPS[cases.LINEAR].backends if name != "reference"]
    assert visited == ["inputs and truth", "automatic", *backends, "pair", "dense", "timing"]
    monkeypatch.setattr(unfused, "forward", out_of_memory)
    OPS[cases.LINEAR].forwards.clear()
    found, _ = measured(item)
    assert found["unfused"] == found["unfused"] | {"status": "failed", "note": "out of memory"}
    monkeypatch.undo()
    OPS[cases.LINEAR].forwards.clear()


def test_a_forced_candidate_runs_its_backend():
    assert _in_backend("unfused", forced_backend)() == "unfused"
    assert forced_backend() is None


# --- crashes -----------------------------------------------------------------------------------------------------------


def a_state(tmp_path, keys) -> State:
    results = tmp_path / "results"
    results.mkdir(exist_ok=True)
    return State(tmp_path / "state.json", list(keys), results, time.time() + 60, True, "c0ffee", {}, {})


def test_what_ends_the_process_is_recorded_and_not_tried_again(tmp_path, monkeypatch):
    keys = [item.key for item in cases.rehearsal()][:2]
    state = a_state(tmp_path, keys)
    lives = iter([[{"key": keys[0], "candidate": "automatic"}, {"key": keys[0], "candidate": "triton"}], None])

    def watch(state):
        life = next(lives)
        lines = [{"stamp": {"schema": 1, "commit": "c0ffee"}}, *(life or [{"done": key} for key in state.keys])]
        state.journal.write_text("\n".join(json.dumps(line) for line in lines))
        return None if life is None else "the process ended with -11"

    monkeypatch.setattr(run, "_watch", watch)
    assert run.sweep(state) == []
    assert state.skipped == {keys[0]: {"triton": "the process ended with -11 while it ran"}}
    (row,) = rows.read(state.results)
    assert (row["candidate"], row["status"]) == ("triton", "failed") and "-11" in row["note"]


def test_a_candidate_that_crashes_again_and_again_is_left_out_of_the_op(tmp_path, monkeypatch):
    keys = [item.key for item in cases.rehearsal() if item.point.op == cases.LINEAR]
    assert len(keys) >= run.MOST_CRASHES
    state = a_state(tmp_path, keys)

    def watch(state):
        waiting = [
            key for key in state.keys if key not in state.skipped and "triton" not in state.banned.get(cases.LINEAR, {})
        ]
        lines = [{"done": key} for key in state.keys if key in state.skipped or not waiting]
        if waiting:
            lines.append({"key": waiting[0], "candidate": "triton"})
        state.journal.write_text("\n".join(json.dumps(line) for line in lines))
        return "the process ended with 1" if waiting else None

    monkeypatch.setattr(run, "_watch", watch)
    assert run.sweep(state) == []
    assert "3 crashes" in state.banned[cases.LINEAR]["triton"]


def test_a_process_that_never_begins_is_started_twice_only(tmp_path, monkeypatch):
    state = a_state(tmp_path, [cases.rehearsal()[0].key])
    starts = []
    monkeypatch.setattr(run, "_watch", lambda state: starts.append(1) or "the process ended with 1")
    assert run.sweep(state) == state.keys and len(starts) == 2


# --- figures -----------------------------------------------------------------------------------------------------------


def rows_of(
    candidates: dict[str, float], regimes: str, case: str = "16x4096->256->4096", **more
) -> list[dict[str, str]]:
    """Rows of one measurement, cold and warm alike."""
    common = dict.fromkeys(rows.COLUMNS, "") | {
        "op": "lowrank_linear",
        "case": case,
        "sizes": "M=16 K=4096 N=4096 R=256",
        "regimes": regimes,
        "dtype": "bfloat16",
        "mode": "forward",
        "status": "ok",
        "time": "2",
        "bound": "memory",
    }
    ours = ("automatic", "triton", "native", "unfused")
    return [
        common
        | {"candidate": name, "kind": "ours" if name in ours else "peer", "cold_us": str(t), "warm_us": str(t)}
        | more
        for name, t in candidates.items()
    ]


def reached(measurements, regime, what) -> figures.Reached:
    return next(r for r in figures.reached(measurements) if (r.figure.regime, r.figure.what) == (regime, what))


def test_a_figure_is_judged_by_the_fastest_peer_and_the_worst_case():
    one = rows_of({"automatic": 5, "triton": 4, "pair": 10, "pair, compiled": 8, "dense": 20}, "decode", "a")
    two = rows_of({"automatic": 10, "triton": 10, "pair": 9, "dense": 15}, "decode", "b")
    pair = reached([one, two], "decode", "best pair")
    assert pair.cases == 2 and pair.values["cold"] == {
        "lowrank_linear a bfloat16": 1.6,
        "lowrank_linear b bfloat16": 0.9,
    }
    assert pair.worst("cold") == ("lowrank_linear b bfloat16", 0.9)
    assert pair.verdict == "on average"  # sqrt(1.6 · 0.9) is 1.2
    assert pair.mean("cold", best=True) == pytest.approx((2 * 0.9) ** 0.5)
    assert reached([one], "decode", "best pair").verdict == "every case"
    assert reached([two], "decode", "best pair").verdict == "missed"
    assert reached([one], "decode", "dense").values["warm"] == {"lowrank_linear a bfloat16": 4.0}
    assert reached([one], "large", "memory limit").verdict == "not measured"


def test_dispatch_is_compared_with_every_other_factored_form():
    measurement = rows_of({"automatic": 10, "triton": 9, "unfused": 11, "pair": 12, "dense": 1}, "large", percent="93")
    assert reached([measurement], "large", "best alternative").values["cold"] == {
        "lowrank_linear 16x4096->256->4096 bfloat16": 0.9
    }
    assert reached([measurement], "large", "memory limit").verdict == "every case"


def test_memory_of_a_backward_is_counted_in_outputs_of_all_heads():
    more = {"op": "gated_lowrank_linear", "sizes": "M=16 K=8 N=8 R=2 H=4", "output_mb": "10", "mode": "backward"}
    for peak, verdict in (("39", "every case"), ("41", "missed")):
        found = reached([rows_of({"automatic": 1}, "backward", peak_mb=peak, **more)], "backward", _MEMORY)
        assert found.verdict == verdict, peak


_MEMORY = "memory in H outputs, at most"


def test_the_newest_measurement_of_a_case_counts():
    old = [row | {"time": "1", "cold_us": "1"} for row in rows_of({"automatic": 5, "pair": 10}, "decode")]
    (kept,) = rows.newest([*old, *rows_of({"automatic": 5, "pair": 10}, "decode")]).values()
    assert {row["time"] for row in kept} == {"2"}


# --- the whole ---------------------------------------------------------------------------------------------------------


def test_a_rehearsal_of_the_sweep(tmp_path, capfd):
    """Every op, mode and kind of peer through a worker process into CSVs, the table and the pictures."""
    run.main(["--rehearse", "--results", str(tmp_path), "--minutes", "5", "--commit", "c0ffee"])
    printed = capfd.readouterr().out
    assert printed.startswith("none: ") and printed.rstrip().splitlines()[-1].lstrip().startswith("forward + backward")
    found = rows.read(tmp_path)
    measured = rows.newest(found)
    assert len(measured) == len(cases.rehearsal())
    assert {path.name for path in tmp_path.iterdir()} == {f"gpu_{op}.csv" for op in OPS}
    bad = [row for row in found if row["status"] in ("failed", "wrong") or row["note"].startswith("not captured")]
    assert not bad, bad
    for members in measured.values():
        assert {"automatic", "unfused"} <= {row["candidate"] for row in members}
        for row in members:
            if row["status"] == "ok":
                assert float(row["cold_us"]) > 0 and float(row["warm_us"]) > 0 and float(row["eager_us"]) > 0
                assert float(row["percent"]) > 0 and float(row["max_error"]) < 0.1 and row["commit"] == "c0ffee"
    peers = {row["candidate"] for row in found if row["kind"] == "peer" and row["status"] == "ok"}
    assert peers >= {"pair", "pair, compiled", "pair, max-autotune", "dense", "published", "concat GEMM", "four GEMMs"}
    text = summary.markdown(tmp_path)
    assert text.count("\n| ") == len(figures.FIGURES) + 2  # and the head, and the rule
    pytest.importorskip("matplotlib")
    plot.main([str(tmp_path)])
    assert len(list(tmp_path.glob("*.png"))) == len(OPS)
    capfd.readouterr()
    run.main(["--rehearse", "--results", str(tmp_path), "--resume", "--commit", "c0ffee"])
    assert f"0 of {len(cases.rehearsal())} cases are left" in capfd.readouterr().out


def test_the_script_parses_its_arguments():
    script = ROOT / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True, check=True)
    assert "check" in done.stdout and "--part" in done.stdout


@pytest.mark.slow
def test_a_rehearsal_of_the_gpu_tests():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "--gpu-rehearsal", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
