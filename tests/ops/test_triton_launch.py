"""Choosing Triton configurations, and what the tuner does before it times anything.

Seen failing: the farthest bucket taken for the nearest, the device's table ignored, a warning at every call, a table
written without the part that it had, a configuration too large for the device left among the candidates, a lookup without
the letters that the tuner writes (every bucket was then as near as the first).
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch

from inherit_kernels import dispatch, tune
from inherit_kernels.common import triton_launch
from inherit_kernels.common.triton_launch import config_for, declines, forced_configs, padded_rank
from inherit_kernels.registry import OPS, Problem
from inherit_kernels.testing.cases import arguments_of, make_inputs

CUDA = torch.device("cuda")


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """A shipped table of one op on one kind of GPU, and the folder that it lies in."""

    def bucket(m, bm, br=64):
        return {"bits": 16, "BR": br, "M": m, "config": {"BM": bm}}

    folder = tmp_path / "some_op"
    folder.mkdir()
    shipped = {"kernels": {"forward": [bucket(16, 16), bucket(4096, 128), bucket(4096, 32, br=512)]}}
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


def test_the_table_of_the_device_comes_first(tables):
    entry = {"bits": 16, "BR": 64, "M": 4096, "K": 4096, "config": {"BM": 77}, "microseconds": 3.5}
    (tables / "nvidia-h200.json").write_text(json.dumps({"kernels": {"forward": [entry]}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(1) == 77


def test_forced_configurations_nest(tables):
    with forced_configs({"forward": {"BM": 1}}):
        with forced_configs({"forward": {"BM": 2}, "backward": {"BM": 3}}):
            assert chosen(1) == 2
        assert chosen(1) == 1
    assert not triton_launch._forced


def test_padded_rank():
    assert [padded_rank(rank) for rank in (1, 16, 17, 64, 65, 512)] == [16, 16, 32, 64, 128, 512]


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


# --- the tuner ---------------------------------------------------------------------------------------------------------


def test_a_table_keeps_the_part_that_is_not_written(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "table_path", lambda op, slug: tmp_path / op / f"{slug}.json")
    kernels = {"forward": [{"bits": 16, "BR": 64, "config": {"BM": 16}}]}
    entries = [{"dtype": "bfloat16", "training": False, "sizes": {"M": 1}, "microseconds": {"triton": 1.0}}]
    tune.write_table("some_op", "nvidia-h200", kernels=kernels)
    tune.write_table("some_op", "nvidia-h200", entries=entries)
    table = json.loads((tmp_path / "some_op" / "nvidia-h200.json").read_text())
    assert (table["kernels"], table["entries"], table["version"]) == (kernels, entries, dispatch.TABLE_VERSION)


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
