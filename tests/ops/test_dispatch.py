"""Choosing, forcing and explaining backends."""

from __future__ import annotations

import json
import threading
import warnings
from importlib import import_module
from unittest.mock import patch

import pytest
import torch

import inherit_kernels
from inherit_kernels import _native, dispatch, tune_tables
from inherit_kernels.common.tables import TABLE_VERSION, read_table
from inherit_kernels.explain import Explanation
from inherit_kernels.registry import OPS, Problem

X, DOWN, UP = torch.randn(4, 8), torch.randn(3, 8), torch.randn(5, 3)


@pytest.fixture
def clean():
    spec = OPS["lowrank_linear"]
    spec.choices.clear()
    spec.forwards.clear()
    dispatch._table.cache_clear()
    yield spec
    spec.choices.clear()
    spec.forwards.clear()
    dispatch._table.cache_clear()


def test_a_forced_backend_that_declines_raises_its_sentence(clean, monkeypatch):
    monkeypatch.setattr(clean.backends["unfused"], "supports", lambda problem: "it is Sunday")
    with (
        inherit_kernels.use_backend("unfused"),
        pytest.raises(ValueError, match="'unfused' cannot serve .* it is Sunday"),
    ):
        inherit_kernels.lowrank_linear(X, DOWN, UP)
    assert inherit_kernels.lowrank_linear(X, DOWN, UP).shape == (4, 5)  # an automatic choice moves on


@patch.dict(OPS["lowrank_conv2d"].backends)  # put back in its order, which the README's table shows
def test_an_op_without_the_forced_backend_says_what_it_has():
    del OPS["lowrank_conv2d"].backends["native"]
    with (
        inherit_kernels.use_backend("native"),
        pytest.raises(ValueError, match="it has unfused, blas, triton, reference"),
    ):
        inherit_kernels.lowrank_conv2d(torch.randn(1, 8, 4, 4), DOWN[:, :, None, None], UP)


def test_an_unknown_backend_is_named():
    with (
        pytest.raises(ValueError, match="name: expected one of .*unfused.* got 'fast'"),
        inherit_kernels.use_backend("fast"),
    ):
        pass


def test_forcing_nests_and_does_not_leak_to_other_threads():
    seen = []
    with inherit_kernels.use_backend("reference"):
        with inherit_kernels.use_backend(None):
            assert dispatch.forced_backend() is None
        assert dispatch.forced_backend() == "reference"
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced_backend()))
        thread.start()
        thread.join()
    assert seen == [None]
    assert dispatch.forced_backend() is None


def test_the_backward_uses_the_backend_of_its_forward(monkeypatch):
    ran = []
    reference = OPS["lowrank_linear"].backends["reference"]
    backward = reference.backward
    monkeypatch.setattr(reference, "backward", lambda *args: ran.append(1) or backward(*args))
    with inherit_kernels.use_backend("reference"):
        y = inherit_kernels.lowrank_linear(X.clone().requires_grad_(), DOWN, UP)
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join()
    assert ran == [1]


def test_the_measured_table_decides_by_the_nearest_bucket(clean, monkeypatch, tmp_path):
    def entry(m, unfused, reference):
        return {
            "dtype": "float32",
            "training": False,
            "sizes": {"M": m, "K": 8, "N": 8, "R": 4},
            "microseconds": {"unfused": unfused, "reference": reference, "absent": 0.1},
        }

    path = tmp_path / "table.json"
    path.write_text(json.dumps({"version": 1, "entries": [entry(1, 2.0, 1.0), entry(1024, 1.0, 2.0)]}))
    monkeypatch.setattr(dispatch, "table_path", lambda op, slug: path)
    assert inherit_kernels.explain("lowrank_linear", X, DOWN, UP).choice == "reference"
    assert inherit_kernels.explain("lowrank_linear", X.repeat(200, 1), DOWN, UP).choice == "unfused"
    # another dtype, or training, was not measured here
    assert inherit_kernels.explain("lowrank_linear", X.bfloat16(), DOWN.bfloat16(), UP.bfloat16()).choice == "unfused"


GOOD = {"dtype": "float32", "training": False, "sizes": {"M": 1}, "microseconds": {"unfused": 1.0}}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"version": 0, "entries": []}',
        '{"version": 1, "entries": {}}',
        '{"version": 1, "entries": [3]}',
        *(json.dumps({"version": 1, "entries": [GOOD, {k: v for k, v in GOOD.items() if k != gone}]}) for gone in GOOD),
        json.dumps({"version": 1, "entries": [GOOD | {"microseconds": {"unfused": "fast"}}]}),
        json.dumps({"version": 1, "entries": [GOOD | {"microseconds": {"unfused": float("nan")}}]}),
        json.dumps({"version": 1, "entries": [GOOD | {"sizes": {"M": -1}}]}),
        json.dumps({"version": 1, "entries": [GOOD | {"sizes": {"Q": 1}}]}),
    ],
    ids=str,
)
def test_a_damaged_table_is_left_out_with_one_warning(clean, monkeypatch, tmp_path, text):
    """Seen failing: JSONDecodeError or KeyError from every call, without the file's name."""
    path = tmp_path / "table.json"
    path.write_text(text)
    monkeypatch.setattr(dispatch, "table_path", lambda op, slug: path)
    with pytest.warns(UserWarning, match="table.json are left out: .*measure them again") as caught:
        outputs = [inherit_kernels.lowrank_linear(X[:rows], DOWN, UP) for rows in (1, 2, 3)]
    assert [len(y) for y in outputs] == [1, 2, 3] and len(caught) == 1
    path.write_bytes(b"\xff\xfe\x00")
    dispatch._table.cache_clear()
    clean.choices.clear()
    clean.forwards.clear()
    with pytest.warns(UserWarning, match="table.json are left out"):
        inherit_kernels.lowrank_linear(X, DOWN, UP)


def test_a_damaged_table_does_not_end_the_status(clean, monkeypatch, tmp_path):
    """`python -m inherit_kernels` died of any of them; tune, which is what mends it, too."""
    status = import_module("inherit_kernels.status")  # the package's name is the function
    for module in (status, tune_tables):
        monkeypatch.setattr(module, "table_path", lambda op, slug: tmp_path / f"{slug}.json")
    (tmp_path / "cpu-mine.json").write_text('{"version": 1, "entries": [3')
    with pytest.warns(UserWarning, match="cpu-mine.json are left out"):
        assert "cpu-mine" not in status.support_table()
    with pytest.warns(UserWarning, match="cpu-mine.json are left out"):
        assert tune_tables.entries_of("lowrank_linear", "cpu-mine") == []
    with pytest.warns(UserWarning, match="cpu-mine.json are left out"):
        tune_tables.write_table("lowrank_linear", "cpu-mine", entries=[GOOD])
    assert tune_tables.entries_of("lowrank_linear", "cpu-mine") == [GOOD]


def test_committed_tables_name_real_backends_and_letters():
    for op, spec in OPS.items():
        kernels = {kernel for backend in spec.triton_backends.values() for kernel in backend.KERNELS}
        for path in dispatch.table_path(op, "x").parent.glob("*.json"):
            table = json.loads(path.read_text())
            assert table["version"] == TABLE_VERSION
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert [read_table(path, part) for part in ("entries", "kernels")] == [
                    table.get("entries"),
                    table.get("kernels"),
                ]
            assert table.get("entries") or table.get("kernels"), path
            for item in table.get("entries", []):
                assert set(item["microseconds"]) <= set(spec.backends)
                assert set(item["sizes"]) <= set("MKNRHBCTP")
            for kernel, buckets in table.get("kernels", {}).items():
                assert kernel in kernels, path
                assert all({"bits", "config"} <= set(bucket) for bucket in buckets)


def test_the_choice_is_one_look_up_and_bounded(clean, monkeypatch):
    calls = []
    decide = dispatch.decide
    monkeypatch.setattr(dispatch, "decide", lambda *args: calls.append(1) or decide(*args))
    for _ in range(5):
        inherit_kernels.lowrank_linear(X, DOWN, UP)
    assert len(calls) == 1
    monkeypatch.setattr(dispatch, "CHOICES_KEPT", 4)
    for rows in range(1, 20):
        inherit_kernels.lowrank_linear(torch.randn(rows, 8), DOWN, UP)
    assert 0 < len(clean.choices) <= 4
    assert 0 < len(clean.forwards) <= 4


def test_explain_names_every_backend_and_computes_nothing(monkeypatch):
    spec = OPS["gated_lowrank_linear"]
    monkeypatch.setattr(spec.backends["unfused"], "forward", lambda *args: pytest.fail("computed"))
    text = str(inherit_kernels.explain("gated_lowrank_linear", X, DOWN, UP[None], gate_weight=torch.randn(1, 3)))
    assert all(name in text for name in spec.backends)
    assert "choice:" in text
    with pytest.raises(ValueError, match="op: expected one of"):
        inherit_kernels.explain("linear", X)
    with pytest.raises(ValueError, match="up: expected shape"):
        inherit_kernels.explain("lowrank_linear", X, DOWN, UP.t())


def test_every_backend_answers_for_a_problem_elsewhere():
    for spec in OPS.values():
        for name, backend in spec.backends.items():
            sentence = backend.supports(Problem(spec.name, torch.float64, torch.device("cuda"), {}, (), False))
            assert (sentence is None) == (name in ("unfused", "reference"))


def test_status_says_what_to_do_about_what_is_missing():
    status = inherit_kernels.status()
    text = str(status)
    assert torch.__version__ in text
    if not inherit_kernels._native.load():
        assert any("INHERIT_KERNELS_BUILD" in sentence or "install" in sentence for sentence in status.problems)


def test_the_dtypes_that_a_backend_declares_for_this_machine_are_those_it_takes():
    for op, spec in OPS.items():
        for name, backend in spec.backends.items():
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32):
                problem = Problem(op, dtype, torch.device("cpu"), {}, (), False)
                declared = dtype in backend.SERVES.get("cpu", ())
                if backend.supports(problem) is None and dtype != torch.int32:
                    assert declared or name in spec.triton_backends, (
                        op,
                        name,
                        dtype,
                    )  # which the interpreter runs on CPU tensors
                elif declared:
                    assert name == "native" and not _native.load(), (op, name, dtype)


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_takes_the_unfused_form_where_nothing_was_measured_anywhere(op, monkeypatch):
    monkeypatch.setattr(dispatch, "device_slug", lambda device: "nvidia-unknown")
    monkeypatch.setattr(dispatch, "_table", lambda op, slug: [])
    for backend in OPS[op].backends.values():
        monkeypatch.setattr(backend, "supports", lambda problem: None)
    problem = Problem(op, torch.bfloat16, torch.device("cuda"), {"M": 8, "B": 8}, (), False)
    assert dispatch.decide(OPS[op], problem, None) == "unfused"


def test_what_no_gpu_has_proven_is_chosen_by_force_alone(monkeypatch):
    """Its backward was wrong on an H200; a table that found it fastest chose it."""
    op = "gated_lowrank_linear"
    sizes = {"M": 64, "K": 64, "N": 64, "R": 16, "H": 2}
    times = {"triton": 1.0, "unfused": 2.0, "reference": 3.0}
    entry = {"dtype": "bfloat16", "sizes": sizes, "microseconds": times}
    table = [{**entry, "training": training} for training in (False, True)]
    monkeypatch.setattr(dispatch, "_table", lambda op, slug: table)
    monkeypatch.setattr(dispatch, "device_slug", lambda device: "nvidia-h200")
    for backend in OPS[op].backends.values():
        monkeypatch.setattr(backend, "supports", lambda problem: None)
    inference, training = (Problem(op, torch.bfloat16, torch.device("cuda"), sizes, (None,), t) for t in (False, True))
    assert dispatch.decide(OPS[op], inference, None) == "triton"
    assert dispatch.decide(OPS[op], training, None) == "unfused"
    assert dispatch.decide(OPS[op], training, "triton") == "triton"
    assert "wrong on an H200" in dispatch.doubt(OPS[op].backends["triton"], training)
    explanation = Explanation(training, {"triton": None}, {"triton": "it is Sunday"}, "unfused", "")
    assert "triton            can serve if forced: it is Sunday" in str(explanation)
