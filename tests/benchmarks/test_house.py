"""The benchmark house: what makes its figures honest.

Seen failing once: the test of a wrong peer.
"""

from __future__ import annotations

import csv
import itertools

import pytest
import torch

from benchmarks import candidates, roofline, store, suites, summary
from benchmarks.baselines import PEERS, Peer, Runner, peers_of
from benchmarks.correctness import Truth
from benchmarks.gpu.rows import COLUMNS
from benchmarks.roofline import Level, Roofline, Work, limit
from inherit_kernels.registry import OPS
from inherit_kernels.testing.timing import time_interleaved

MACHINE = Roofline(
    {"float32": 100e9, "bfloat16": 200e9},
    (Level("L1", 32e3, 200e9, 200e9), Level("L2", 512e3, 100e9, 90e9), Level("memory", float("inf"), 20e9, 16e9)),
    lanes=8,
    threads=1,
)
SMALL = {
    "lowrank_linear": suites.linear_point("lowrank_linear", 5, 24, 40, 6, 1, residual=True, activation="relu"),
    "gated_lowrank_linear": suites.linear_point("gated_lowrank_linear", 5, 24, 40, 6, 3, activation="gelu"),
    "lowrank_conv2d": suites.conv_point(
        "lowrank_conv2d", 2, (8, 9, 12, 3, 2), 4, 1, "channels_last", activation="silu"
    ),
    "gated_lowrank_conv2d": suites.conv_point(
        "gated_lowrank_conv2d", 2, (8, 9, 12, 3, 1), 4, 3, "contiguous", residual=True
    ),
}


@pytest.mark.parametrize("name", ("small", "full"))
@pytest.mark.parametrize("op", OPS)
def test_suites_are_well_formed(op, name):
    points = suites.suite(op, name)
    assert len({str(point) for point in points}) == len(points)
    assert 8 <= len(points) <= 200
    for point in points:
        for training, dense in itertools.product((False, True), repeat=2):
            work = suites.work_of(point, 4, training, dense)
            assert work.padded_flops(8) >= work.flops > 0 and work.bytes > 0
        assert suites.work_of(point, 2, False).bytes * 2 == suites.work_of(point, 4, False).bytes
        shapes = point.case.shapes
        if "conv2d" not in op:  # a factored layer that costs more than the dense one is no use
            assert suites.work_of(point, 4, False).flops < 4 * suites.work_of(point, 4, False, dense=True).flops
            assert shapes["down"][0] * (shapes["x"][-1] + shapes["up"][-2]) < shapes["x"][-1] * shapes["up"][-2]


@pytest.mark.parametrize("op", OPS)
def test_merged_flops_are_those_of_the_op(op):
    for point in suites.suite(op, "small"):
        # The convolution mixes weights a sample: those products are counted here and not in the op's formula.
        own = OPS[op].flops(suites._sizes(point))
        assert suites.work_of(point, 4, False).flops == pytest.approx(own, rel=0.05)
        assert suites.work_of(point, 4, True).flops == 3 * suites.work_of(point, 4, False).flops


def test_all_pairs_covers_every_allowed_pair():
    factors = [range(4), range(3), range(3), range(2)]

    def allowed(a, b, c, d):
        return (a, b) != (3, 2)

    chosen = suites.all_pairs(factors, allowed)
    wanted = {
        (f, g, choice[f], choice[g])
        for choice in itertools.product(*factors)
        if allowed(*choice)
        for f, g in itertools.combinations(range(4), 2)
    }
    covered = {(f, g, choice[f], choice[g]) for choice in chosen for f, g in itertools.combinations(range(4), 2)}
    assert covered == wanted
    assert all(allowed(*choice) for choice in chosen)
    assert len(chosen) < 20  # of 66


def test_limit_counts_padding_and_the_level_that_holds_the_data():
    full, ragged = Work(((64, 64, 64, 1),), 4), Work(((65, 65, 65, 1),), 4)
    assert full.padded_flops(8) == full.flops
    assert ragged.padded_flops(8) == 2 * 65 * 65 * 72
    assert limit(full, "float32", MACHINE) == (pytest.approx(full.flops / 100e9 * 1e6), "compute")
    assert limit(full, "bfloat16", MACHINE).microseconds == pytest.approx(full.flops / 200e9 * 1e6)
    tiny = ((1, 1, 1, 1),)
    assert limit(Work(tiny, 32_000), "float32", MACHINE) == (pytest.approx(32e3 / 200e9 * 1e6), "L1")
    in_l2 = 32e3 / 200e9 + 68e3 / 100e9
    assert limit(Work(tiny, 100_000), "float32", MACHINE) == (pytest.approx(1e6 * in_l2), "L2")
    beyond = 32e3 / 200e9 + 480e3 / 100e9 + 488e3 / 20e9
    assert limit(Work(tiny, 1_000_000), "float32", MACHINE) == (pytest.approx(1e6 * beyond), "memory")


def test_nothing_beats_the_limit_that_the_machine_itself_was_measured_by():
    """A working set as the probes had it, timed at the probes' own rates, is at 100 % and not above."""
    for level in MACHINE.levels[:2]:
        time = 1e6 * level.capacity / level.rate
        assert limit(Work(((1, 1, 1, 1),), int(level.capacity)), "float32", MACHINE).microseconds <= time
    work = Work(((6, 16, 320, 1000),), 22_000)
    assert limit(work, "float32", MACHINE).microseconds <= 1e6 * work.padded_flops(8) / 100e9


def test_the_better_of_two_measurements_counts():
    slow = Roofline(
        {"float32": 80e9, "bfloat16": 210e9}, tuple(x._replace(read=x.read / 2) for x in MACHINE.levels), 8, 1
    )
    best = slow.best(MACHINE)
    assert best.peaks == {"float32": 100e9, "bfloat16": 210e9}
    assert best.levels == MACHINE.levels


def test_this_machine_can_be_measured():
    try:
        machine = roofline.measure("cpu" if torch.get_num_threads() == 1 else "wall", seconds=0.02)
    except RuntimeError as reason:
        pytest.skip(f"no roofline was measured: {reason}")
    assert machine.peaks["bfloat16"] >= machine.peaks["float32"] > 1e9
    assert machine.levels[-1].capacity == float("inf")
    assert machine.levels[0].rate > machine.levels[-1].rate > 1e8
    assert [level.capacity for level in machine.levels] == sorted(level.capacity for level in machine.levels)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("op", OPS)
def test_candidates_agree_and_say_why_not(op, training):
    names = [name for name in peers_of(op, training) if "compiled" not in name]  # compiling takes seconds each
    found = {c.name: c for c in candidates.prepare(SMALL[op], torch.float32, training, peers=names)}
    assert set(names) <= set(found)
    assert found["automatic"].status == found["unfused"].status == "ok"
    assert ("packed" in found) != training
    for candidate in found.values():
        assert candidate.status in ("ok", "declined"), candidate
        assert (candidate.runner is None) == (candidate.status == "declined")
        assert candidate.status == "ok" or candidate.note, candidate
    eager = [name for name in ("eager pair", "published", "dense") if name in found]
    assert all(found[name].status == "ok" for name in eager)
    if training:
        assert "inference only" in found["oneDNN pair"].note
    times = time_interleaved({c.name: c.runner.run for c in found.values() if c.runner}, seconds=0.001, rounds=2)
    assert all(timing.median > 0 for timing in times.values())


@pytest.mark.parametrize("module, name", [("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")])
@pytest.mark.parametrize("op", OPS)
def test_engines_compute_the_layer(op, module, name):
    pytest.importorskip("onnx", reason="no onnx: no graph was built")
    pytest.importorskip(module, reason=f"no {module}: its results were not checked")
    one_head = suites.linear_point(op, 5, 24, 40, 6, 1) if "linear" in op else _one_headed_conv(op)
    for point, form in ((SMALL[op], name), (SMALL[op], f"dense, {name}"), (one_head, name)):
        (found,) = candidates.prepare(point, torch.float32, False, backends=[], peers=[form])
        assert found.status == "ok", found
        assert found.max_error < 1e-5


def _one_headed_conv(op):
    return suites.conv_point(op, 2, (4, 6, 8, 3, 1), 3, 1, "contiguous")


def test_a_wrong_peer_is_reported_and_not_timed(monkeypatch):
    right = PEERS["eager pair"]

    def wrong(setting):
        good = right.make(setting)
        return Runner(lambda: good.run() * 1.001)

    monkeypatch.setitem(PEERS, "eager pair", Peer(wrong, gated=False))
    (found,) = candidates.prepare(SMALL["lowrank_linear"], torch.float32, False, backends=[], peers=["eager pair"])
    assert found.status == "wrong" and found.runner is None and "off by" in found.note


def test_a_wrong_backend_is_reported_and_not_timed():
    setting, truth, _ = candidates.set_up(SMALL["lowrank_linear"], torch.float32, training=False)
    y = candidates.factored(setting.point, setting.inputs)
    truth.check_ours("right", {"y": y})
    y[0, 0] += 1e-4 * y.abs().max()
    with pytest.raises(AssertionError, match="element"):
        truth.check_ours("one element", {"y": y})


def test_nan_is_wrong():
    x = torch.randn(4, 4)
    truth = Truth(lambda tensors: tensors["x"] * 2, {"x": x}, None, 1.0)
    with pytest.raises(AssertionError):
        truth.check_peer("nan", {"y": torch.full((4, 4), float("nan"))})


# --- files -------------------------------------------------------------------------------------------------------------


def row(case="a", candidate="packed", us=10.0, **changed):
    filled = dict.fromkeys(store.OP_COLUMNS, "")
    kind = "ours" if candidate in summary.OURS else "peer"
    return (
        filled
        | store.stamp("wall", "cpu")
        | {"op": "lowrank_linear", "case": case, "dtype": "float32", "mode": "forward", "candidate": candidate}
        | {"kind": kind, "status": "ok", "us_p50": us, "percent": 50.0}
        | changed
    )


def test_csv_appends_under_one_header_and_resumes(tmp_path):
    path = tmp_path / "device" / "lowrank_linear.csv"
    store.append(path, [row("a")])
    store.append(path, [row("b")])
    store.append(path, [row("c", commit="another"), row("d", threads=99)])
    assert path.read_text().count("schema,") == 1
    assert [found["case"] for found in store.read(path)] == ["a", "b", "c", "d"]
    assert store.finished(path, store.stamp("wall", "cpu"), ("case",)) == {("a",), ("b",)}


def test_an_older_header_is_replaced_and_its_rows_are_kept(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("time,commit,case,us_p50\n2026,abc,before,1.5\n")
    store.append(path, [row("after")])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(found["case"], found["schema"]) for found in rows] == [("before", "1"), ("after", str(store.SCHEMA))]
    assert [found["case"] for found in store.read(path)] == ["after"]
    path.write_text("time,unknown\n2026,7\n")
    with pytest.raises(ValueError, match="unknown"):
        store.append(path, [row()])


def test_committed_results_have_one_header_each():
    for path in store.RESULTS.glob("*/*.csv"):
        with path.open(newline="") as file:
            first, *others = csv.reader(file)
        stamp = COLUMNS if path.name.startswith("gpu_") else store.STAMP
        assert first[: len(stamp)] == list(stamp), path
        assert all(len(other) == len(first) and other != first for other in others), path


# --- tables ------------------------------------------------------------------------------------------------------------


def test_summary_means_worst_and_losses():
    rows = [
        *(row(case, "packed", 10.0) for case in "abc"),
        *(row(case, "automatic", 20.0) for case in "abc"),
        row("a", "eager pair", 80.0),
        row("b", "eager pair", 5.0),
        row("c", "eager pair", 20.0),
        row("a", "OpenVINO", 40.0),
        row("b", "OpenVINO", status="declined", note="no such thing", us_p50=""),
    ]
    found = {(ratio.peer, ratio.ours): ratio for ratio in summary.ratios(rows)}
    assert found["eager pair", "packed"].mean == pytest.approx(2.0)  # of 8, 0.5 and 2
    assert found["eager pair", "automatic"].mean == pytest.approx(1.0)
    assert found["eager pair", "packed"].worst == "b"
    assert found["eager pair", "packed"].losses == {"b": 0.5}
    assert found["OpenVINO", "packed"].ratios == {"a": 4.0}
    assert found["best of the factored", "packed"].ratios == {"a": 4.0, "b": 0.5, "c": 2.0}
    text = summary.markdown(rows)
    assert "| eager pair | 2.00 | 1.00 | 0.50 | b | 1 of 3 |" in text
    assert "slower than eager pair: b 0.50" in text
    assert "OpenVINO declined: no such thing (1 of 3 cases)" in text
    assert "50 % of the limit" in text


def test_summary_names_a_limit_that_was_beaten():
    rows = [row("a", "packed", percent_of_best=104.0), row("a", "eager pair")]
    assert any("beats the limit in a" in sentence for sentence in summary.notes(rows))


def test_only_the_newest_run_of_a_case_counts():
    rows = [
        row("a", us=1.0, time="2026-01-01"),
        row("a", us=2.0, time="2026-01-02"),
        row("b", us=3.0, time="2026-01-01"),
    ]
    assert [found["us_p50"] for found in summary.newest(rows)] == [2.0, 3.0]


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib: nothing was drawn")
    import matplotlib

    matplotlib.use("Agg")
    from benchmarks import plot

    rows = [
        row(case, name, us, intensity=7.0) for case in "ab" for name, us in (("packed", 10.0), ("eager pair", 30.0))
    ]
    for draw in (plot.by_peer, plot.by_shape):
        assert draw(rows, "title", tmp_path / f"{draw.__name__}.png")
    assert plot.roofline({"lowrank_linear": rows}, "title", tmp_path / "roofline.png")
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))
    assert not plot.by_peer([], "title", tmp_path / "none.png")


# --- timing ------------------------------------------------------------------------------------------------------------


def test_candidates_take_turns_and_long_calls_get_fewer_rounds(monkeypatch):
    from inherit_kernels.testing import timing

    now, calls = [0.0], []
    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: now[0])

    def call(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return run

    found = time_interleaved({"short": call("short", 0.1), "long": call("long", 1.0)}, seconds=1.5, rounds=10)
    assert found["short"].median == pytest.approx(1e5) and found["long"].median == pytest.approx(1e6)
    timed = calls[4:]  # two calls each before the first round
    assert timed.count("short") == 10 and timed.count("long") == timing.FEWEST_ROUNDS
    assert "".join(name[0] for name in timed) == "ssl" * 5  # every second round


def test_candidates_settle_before_they_are_timed_and_gauges_report_their_own_figure():
    calls = []
    found = time_interleaved(
        {"settled": lambda: calls.append("c")}, seconds=1e-9, rounds=5, settle=0.002, gauges={"gauge": lambda: 7.0}
    )
    assert found["gauge"] == (7.0, 7.0, 7.0)
    assert len(calls) > 100  # 2 + 5 are timed, the others fill five times 2 ms


def test_a_gauge_is_the_limit_of_the_moment():
    machine = roofline.measure(seconds=0.02)
    for work in (Work(((600, 600, 600, 1),), 4), Work(((1, 1, 1, 1),), 200_000)):
        bound = limit(work, "float32", machine).microseconds
        assert bound / 3 < roofline.gauge(work, "float32", machine, "wall")() < bound * 30
    assert roofline.gauge(Work(((1, 1, 1, 1),), 1 << 33), "float32", machine, "wall")() > 1e4


def test_the_compact_table_names_every_peer_once():
    rows = [row("a", "packed"), row("a", "eager pair", us=30.0), row("b", "packed"), row("b", "eager pair", us=10.0)]
    lines = summary.compact({"lowrank_linear": rows}).splitlines()
    assert lines[0] == "| peer | `lowrank_linear`, 2 cases |"
    assert lines[2:] == ["| eager pair | 1.73 (1.00) |"]


def test_an_unknown_clock_is_refused():
    with pytest.raises(ValueError, match="clock: expected one of wall, cpu"):
        time_interleaved({"nothing": lambda: None}, clock="sundial")
