"""Choosing Triton configurations, and what the tuner does before it times anything.

Seen failing: the farthest bucket taken for the nearest, the device's table ignored, a warning at every call, a table
written without the part that it had, a configuration too large for the device left among the candidates, a lookup without
the letters that the tuner writes (every bucket was then as near as the first), a tuner that keeps only what its last run
measured, that compiles what no call finds in the cache, that times another configuration than it names; a weight gradient
of one row.
"""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from inherit_kernels import dispatch, tune, tune_tables
from inherit_kernels.common import triton_conv_launch as conv_launch
from inherit_kernels.common import triton_launch
from inherit_kernels.common.tables import TABLE_VERSION
from inherit_kernels.common.triton_launch import config_for, declines, forced_configs, padded_rank
from inherit_kernels.registry import OPS, Problem
from inherit_kernels.testing.cases import Case, arguments_of, cases_of, make_inputs
from inherit_kernels.testing.timing import Timing

CUDA = torch.device("cuda")


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """A shipped table of one op on one kind of GPU, and the folder that it lies in."""

    def bucket(m, bm, br=64):
        return {"bits": 16, "BR": br, "M": m, "config": {"BM": bm}}

    folder = tmp_path / "some_op"
    folder.mkdir()
    shipped = {
        "version": TABLE_VERSION,
        "kernels": {"forward": [bucket(16, 16), bucket(4096, 128), bucket(4096, 32, br=512)]},
    }
    (folder / "triton.json").write_text(json.dumps(shipped))
    monkeypatch.setattr(triton_launch, "CONFIGS", tmp_path)
    monkeypatch.setattr(triton_launch, "_slug", lambda device: "nvidia-h200")
    caches = (triton_launch.kernel_tables, triton_launch._config, triton_launch._warn_once)
    for cached in caches:
        cached.cache_clear()
    yield folder
    for cached in caches:
        cached.cache_clear()


def chosen(m: int, br: int = 64) -> int:
    return config_for("some_op", "forward", torch.float16, CUDA, {"BR": br, "M": m, "K": 7})["BM"]


def test_the_nearest_bucket_of_the_padded_rank(tables):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [chosen(m) for m in (1, 100, 1000, 10**6)] == [16, 16, 128, 128]
        assert chosen(1, br=512) == 32
        with pytest.raises(LookupError, match="no configuration of forward for 16 bits"):
            chosen(1, br=32)


def test_one_warning_names_the_command(tables):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for m in (1, 2, 5000):
            chosen(m)
    assert [str(warning.message) for warning in caught] == [
        "no Triton configuration of some_op was tuned on nvidia-h200: general ones are used; "
        "`python -m inherit_kernels.tune some_op --device cuda` measures them"
    ]


def test_the_table_of_the_device_comes_first_where_it_is_as_near(tables):
    entry = {"bits": 16, "BR": 64, "M": 4096, "K": 4096, "config": {"BM": 77}, "microseconds": 3.5}
    (tables / "nvidia-h200.json").write_text(json.dumps({"version": TABLE_VERSION, "kernels": {"forward": [entry]}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [chosen(m) for m in (1, 300, 4096, 10**6)] == [16, 77, 77, 77]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 2, "kernels": {}}',
        '{"version": 1, "kernels": []}',
        '{"version": 1, "kernels": {"forward": {}}}',
        '{"version": 1, "kernels": {"forward": [3]}}',
        '{"version": 1, "kernels": {"forward": [{"bits": 16, "BR": 64, "M": 4096}]}}',
        '{"version": 1, "kernels": {"forward": [{"bits": 8, "config": {"BM": 77}}]}}',
        '{"version": 1, "kernels": {"forward": [{"bits": 16, "M": "x", "config": {"BM": 77}}]}}',
        '{"version": 1, "kernels": {"forward": [{"bits": 16, "M": 4096, "config": {"BM": "77"}}]}}',
    ],
)
def test_a_damaged_table_of_the_device_is_left_out_with_one_warning(tables, text):
    """JSONDecodeError, KeyError or TypeError from every call, without the file's name."""
    (tables / "nvidia-h200.json").write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [chosen(m) for m in (1, 300, 4096)] == [16, 128, 128]
    found = [str(warning.message) for warning in caught if "left out" in str(warning.message)]
    assert len(found) == 1 and "nvidia-h200.json" in found[0]


def test_forced_configurations_nest(tables):
    with forced_configs({"forward": {"BM": 1}}):
        with forced_configs({"forward": {"BM": 2}, "backward": {"BM": 3}}):
            assert chosen(1) == 2
        assert chosen(1) == 1
    assert not triton_launch._forced


def test_padded_rank():
    assert [padded_rank(rank) for rank in (1, 16, 17, 64, 65, 512)] == [16, 16, 32, 64, 128, 512]


def test_tf32_where_torchs_switch_allows_it_by_either_name(monkeypatch):
    monkeypatch.setattr(triton_launch, "interpreting", lambda: False)
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        for name, value, expected in (
            ("allow_tf32", True, "tf32"),
            ("allow_tf32", False, "ieee"),
            ("fp32_precision", "tf32", "tf32"),  # after it, the older name raises
            ("fp32_precision", "ieee", "ieee"),
        ):
            setattr(switch, name, value)
            assert triton_launch.precision(torch.float32) == expected
            assert triton_launch.precision(torch.bfloat16) == "ieee"
    finally:
        switch.fp32_precision = before


def test_what_is_declined_says_why(monkeypatch):
    problem = Problem("lowrank_linear", torch.bfloat16, CUDA, {"R": 512}, (), False)
    assert declines(problem) is None
    assert "rank 512, not 513" in declines(replace(problem, sizes={"R": 513}))
    assert "not torch.float64" in declines(replace(problem, dtype=torch.float64))
    assert "no Triton kernel for xpu" in declines(replace(problem, device=torch.device("xpu")))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in declines(replace(problem, device=torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in declines(problem)


def test_an_assembler_that_breaks_products_is_declined(monkeypatch):
    """ptxas 12.8 gave a wrong d_bias on an H200."""
    backend = OPS["gated_lowrank_linear"].backends["triton"]
    problem = Problem("gated_lowrank_linear", torch.bfloat16, CUDA, {"R": 16}, (), True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_launch, "interpreting", lambda: False)
    monkeypatch.setattr(triton_launch, "_assembler", lambda: ("/bin/ptxas", (12, 8)))
    assert "ptxas 12.8 (/bin/ptxas)" in backend.supports(problem) and "TRITON_PTXAS_PATH" in backend.supports(problem)
    assert backend.supports(replace(problem, training=False)) is None
    assert backend.supports(replace(problem, dtype=torch.float32)) is None  # no wgmma
    monkeypatch.setattr(triton_launch, "_assembler", lambda: ("/bin/ptxas", (12, 9)))
    assert backend.supports(problem) is None


def test_the_assembler_of_this_triton_is_sound():
    path, release = triton_launch._assembler()
    assert "ptxas" in path and release >= triton_launch.SOUND_PTXAS


# --- the tuner ---------------------------------------------------------------------------------------------------------


def test_a_table_keeps_the_part_that_is_not_written(monkeypatch, tmp_path):
    monkeypatch.setattr(tune_tables, "table_path", lambda op, slug: tmp_path / op / f"{slug}.json")
    kernels = {"forward": [{"bits": 16, "BR": 64, "config": {"BM": 16}}]}
    entries = [{"dtype": "bfloat16", "training": False, "sizes": {"M": 1}, "microseconds": {"triton": 1.0}}]
    tune_tables.write_table("some_op", "nvidia-h200", kernels=kernels)
    tune_tables.write_table("some_op", "nvidia-h200", entries=entries)
    table = json.loads((tmp_path / "some_op" / "nvidia-h200.json").read_text())
    assert (table["kernels"], table["entries"], table["version"]) == (kernels, entries, TABLE_VERSION)


def test_a_run_that_ends_early_loses_nothing_measured_before(monkeypatch, tmp_path):
    monkeypatch.setattr(tune_tables, "table_path", lambda op, slug: tmp_path / op / f"{slug}.json")
    measured = iter(range(100))
    monkeypatch.setattr(
        tune,
        "measure",
        lambda op, case, dtype, training, *_: {
            "dtype": str(dtype),
            "training": training,
            "sizes": {"M": int(case.shapes["x"][0])},
            "microseconds": {"triton": next(measured)},
        },
    )
    cases = tune.import_module("inherit_kernels.ops.lowrank_linear.cases")
    monkeypatch.setattr(cases, "tuning_cases", lambda: [cases.case(str(m), (m,), 8, 8, 2) for m in (1, 2, 3)])

    def run(end, stop_after=None):
        calls = iter(range(99))
        clock = (lambda: next(calls)) if stop_after is None else lambda: 0 if next(calls) < stop_after else 9
        monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=clock))
        tune.tune_dispatch("lowrank_linear", "cpu", 0.0, None, end)
        return [entry["microseconds"]["triton"] for entry in tune_tables.entries_of("lowrank_linear", slug)]

    slug = dispatch.device_slug(torch.device("cpu"))
    assert run(1e9) == list(range(12))
    assert run(5, stop_after=2) == [12, 13, *range(2, 12)]
    assert run(1e9) == list(range(14, 26))


@pytest.mark.parametrize("op", OPS)
def test_lookups_name_every_size_of_a_tuned_bucket(op, monkeypatch):
    pytest.importorskip("triton", reason="no launch was recorded: triton is not installed")
    from inherit_kernels.testing.triton_compile import record
    from inherit_kernels.tune_kernels import points_of, sizes_of

    looked_up = []
    choose = triton_launch._config
    monkeypatch.setattr(triton_launch, "_config", lambda *args: looked_up.append(dict(args[-1])) or choose(*args))
    case = next(points_of(op)).case
    record(op, case, torch.bfloat16, training=True)
    tensors, options = arguments_of(op, make_inputs(op, case, torch.bfloat16, device="meta"), case)
    sizes = sizes_of(dispatch.problem_of(OPS[op], tensors, options, True))
    assert looked_up
    for found in looked_up:
        assert {letter: found[letter] for letter in sizes} == sizes


def test_the_tuner_times_what_fits_the_device_only():
    pytest.importorskip("triton", reason="no configuration was compiled: triton is not installed")
    if triton_launch.interpreting():
        pytest.skip("no configuration was compiled: the interpreter compiles nothing")
    from inherit_kernels.tune_kernels import fitting_candidates, points_of

    points = list(points_of("lowrank_linear"))
    assert {point.kernel for point in points} == {"forward", "backward_dx", "weight_gradient"}
    assert all(point.candidates for point in points)
    point = next(p for p in points if p.kernel == "forward" and p.case.shapes["down"][0] == 64)
    good = point.candidates[0]
    huge = {**good, "BM": 256, "BN": 256, "BK": 128, "num_stages": 5}
    assert fitting_candidates(point._replace(candidates=[good, huge]), 90) == [good]


def test_the_tuner_compiles_in_its_pool_and_writes_as_it_goes(monkeypatch, tmp_path):
    """All of it but the timing: two buckets, the second of which the time does not allow."""
    pytest.importorskip("triton", reason="no configuration was compiled: triton is not installed")
    if triton_launch.interpreting():
        pytest.skip("no configuration was compiled: the interpreter compiles nothing")
    from inherit_kernels import tune_kernels

    first, second = itertools.islice(tune_kernels.points_of("lowrank_conv2d"), 2)
    huge = {**first.candidates[0], "BM": 256, "BK": 128, "num_stages": 6}
    points = [first._replace(candidates=[first.candidates[0], huge]), second._replace(candidates=second.candidates[:1])]
    timed, now = [], [0.0]

    def fastest(point):
        timed.append(point.candidates)
        now.append(700.0)
        return {"bits": 16, "BR": 16, "P": 49, "config": point.candidates[0], "microseconds": 1.0}

    before = {"bits": 16, "BR": 16, "P": 196, "config": huge, "microseconds": 2.0}
    path = tmp_path / "lowrank_conv2d" / "some-gpu.json"
    monkeypatch.setattr(tune_tables, "table_path", lambda op, slug: path)
    monkeypatch.setattr(tune_kernels, "kernel_tables", _with_cache_clear(lambda op, slug: {"forward": [before]}))
    monkeypatch.setattr(tune_kernels, "device_slug", lambda device: "some-gpu")
    monkeypatch.setattr(tune_kernels, "points_of", lambda op: points)
    monkeypatch.setattr(tune_kernels, "_measured", fastest)
    monkeypatch.setattr(tune_kernels, "time", SimpleNamespace(monotonic=lambda: now[-1]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    tune_kernels.tune_kernels("lowrank_conv2d", end=600.0)
    assert timed == [[first.candidates[0]]]
    buckets = json.loads(path.read_text())["kernels"]["forward"]
    assert [bucket["P"] for bucket in buckets] == [49, 196]


def _with_cache_clear(function):
    function.cache_clear = lambda: None
    return function


@pytest.mark.parametrize("kernel", ("forward", pytest.param("backward_up", marks=pytest.mark.slow)))
def test_the_fastest_configuration_becomes_the_bucket(kernel, monkeypatch):
    """Each candidate is really in force while it is timed; timing is by this stand-in, the kernels are interpreted."""
    if not triton_launch.interpreting():
        pytest.skip("kernels not run: they need TRITON_INTERPRET=1 or a GPU")
    from inherit_kernels import tune_kernels
    from inherit_kernels.testing.gpu_timing import check_same

    op, used = "gated_lowrank_conv2d", []
    point = next(p for p in tune_kernels.points_of(op) if p.kernel == kernel)
    case = next(case for case in cases_of(op) if case.name == "three_by_three")
    point = point._replace(case=case, candidates=point.candidates[:3])

    def time_on_gpu(candidates, expected):
        for first, second in candidates.values():
            check_same(first(), expected)
            second()
        medians = {"0": 3.0, "2": 1.0}  # the second failed
        return {name: Timing(value, value, value) for name, value in medians.items()}

    configure = triton_launch.config_for
    monkeypatch.setattr(
        conv_launch, "config_for", lambda op, name, *a: used.append((name, configure(op, name, *a))) or used[-1][1]
    )
    monkeypatch.setattr(tune_kernels, "time_on_gpu", time_on_gpu)
    monkeypatch.setattr(tune_kernels, "copies_of", lambda inputs: [inputs, dict(inputs)])
    monkeypatch.setattr(tune_kernels, "make_inputs", lambda *a, device, **more: make_inputs(*a, **more))
    bucket = tune_kernels._fastest(point)
    assert bucket["config"] == point.candidates[2] and bucket["microseconds"] == 1.0
    assert {"bits", "BR", "B", "C", "T", "P", "N", "H"} <= set(bucket)
    in_force = [config for name, config in used if name == kernel]
    assert all(config in in_force for config in point.candidates)


def test_a_fast_wrong_result_wins_nothing():
    from inherit_kernels.testing.gpu_timing import check_same

    right = [torch.randn(40, 50), None, torch.randn(3)]
    check_same([right[0] * 1.01, None, right[2]], right)
    for wrong in (right[0] * 1.5, right[0].masked_fill(torch.eye(40, 50) > 0, 0.0), right[0] / 0):
        with pytest.raises(AssertionError, match="off by"):
            check_same([wrong, None, right[2]], right)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        check_same(right[:2], right)


def test_any_beginning_of_a_tuning_run_covers_the_range():
    for count in (1, 2, 5, 168):
        assert sorted(tune_tables.spread(range(count))) == list(range(count))
    assert sorted(itertools.islice(tune_tables.spread(range(168)), 6)) == [0, 32, 64, 96, 128, 160]


# --- what is compiled --------------------------------------------------------------------------------------------------


class Driver:
    """In place of Triton's, for an H100 that is not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class Aligned:
    """What the just-in-time compiler looks at in a tensor."""

    def __init__(self, tensor):
        self.dtype = tensor.dtype

    def data_ptr(self):
        return 0

    def ptr_range(self):
        return 0


@pytest.mark.parametrize("op", OPS)
def test_what_was_compiled_ahead_is_what_a_call_finds_in_the_cache(op, monkeypatch, tmp_path):
    """Else a tuner compiles everything twice, the second time one after another."""
    triton = pytest.importorskip("triton", reason="nothing was compiled: triton is not installed")
    if triton_launch.interpreting():
        pytest.skip("nothing was compiled: the interpreter compiles nothing")
    from inherit_kernels.testing.triton_compile import compile_launch, record

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(), raising=False)
    for launch in record(op, sized(op), torch.bfloat16)[-1:]:
        compile_launch(launch, 90)
        compiled = set(tmp_path.iterdir())
        arguments = [Aligned(a) if isinstance(a, torch.Tensor) else a for a in launch.args]
        launch.kernel.run(*arguments, grid=launch.grid, warmup=True, **launch.keywords)
        assert compiled
        assert set(tmp_path.iterdir()) == compiled, launch.kernel.__name__


def sized(op: str, **sizes: int) -> Case:
    """A case whose sizes are no multiples of 16 but a few, with these of them changed."""
    case = import_module(f"inherit_kernels.ops.{op}.cases").case
    s = {"M": 40, "K": 48, "N": 80, "R": 17, "H": 3, "B": 3, "C": 16, "P": 6, "T": 3} | sizes
    heads = (s["H"],) if op.startswith("gated") else ()
    if op.endswith("linear"):
        return case("sized", (s["M"],), s["K"], s["N"], s["R"], *heads, residual=True)
    window, side = (s["T"], s["T"]), (s["P"], s["P"])
    return case("sized", (s["B"],), s["C"], side, s["N"], s["R"], *heads, window, padding=s["T"] // 2, residual=True)


def sizes_of_one() -> list:
    """op × the letter that is one; those that once failed are not marked slow."""
    letters = {op: "MKNR" if op.endswith("linear") else "BCPTNR" for op in OPS}
    return [
        pytest.param(op, letter, marks=() if (op, letter) == ("lowrank_linear", "M") else pytest.mark.slow)
        for op in OPS
        for letter in letters[op] + ("H" if op.startswith("gated") else "")
    ]


@pytest.mark.parametrize("op, letter", sizes_of_one())
def test_a_size_of_one_compiles(op, letter):
    """Triton makes it a constant, on which tensors' methods fail: the interpreter never does."""
    pytest.importorskip("triton", reason="nothing was compiled: triton is not installed")
    if triton_launch.interpreting():
        pytest.skip("nothing was compiled: the interpreter compiles nothing")
    from inherit_kernels.testing.triton_compile import compile_launch, record

    for backend in OPS[op].triton_backends:
        for training in (False, True):
            for launch in record(op, sized(op, **{letter: 1}), torch.bfloat16, training, backend_name=backend):
                assert compile_launch(launch, 90).registers > 0
