"""CUDA graphs around a forward, and choosing by them, rehearsed on a CPU: a capture keeps the call and its outputs' memory.

What only a GPU can show (that a capture forbids synchronisation, that replays see new inputs) is in tests/gpu.
"""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import inhernet
from inherit_kernels.testing.timing import Timing
from inhernet.export import graphed
from inhernet.export.graphed import CudaGraphs
from inhernet.measure import Latency
from inhernet.nn import LowRankConv2d, LowRankLinear


class Captures:
    """In place of `graphed.capture`; `forbidden` makes the next one fail."""

    def __init__(self):
        self.made, self.forbidden = 0, False

    def __call__(self, call):
        if self.forbidden:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.made += 1
        outputs = call()

        def replay():
            for mine, new in zip(tree_leaves(outputs), tree_leaves(call()), strict=True):
                if isinstance(mine, torch.Tensor):
                    mine.copy_(new)

        return replay, outputs


@pytest.fixture
def captures(monkeypatch):
    made = Captures()
    monkeypatch.setattr(graphed, "capture", made)
    monkeypatch.setattr(graphed, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(graphed, "_stream", lambda: 0)
    return made


def double(x, scale=2):
    return {"y": x * scale, "n": 3}


def test_a_kind_is_captured_the_second_time_and_outputs_stay(captures):
    graphs = CudaGraphs()
    inputs = [torch.randn(4, 3) for _ in range(5)]
    outputs = [graphs(double, (x,), {}) for x in inputs]
    assert captures.made == 1
    for x, output in zip(inputs, outputs, strict=True):
        assert output["n"] == 3 and torch.equal(output["y"], 2 * x)
    outputs[2]["y"].zero_()  # the caller's, not the graph's
    assert torch.equal(graphs(double, (inputs[0],), {})["y"], 2 * inputs[0])


def test_every_kind_has_its_own_graph(captures):
    graphs = CudaGraphs()
    kinds = [
        ((torch.randn(4, 3),), {}),
        ((torch.randn(5, 3),), {}),
        ((torch.randn(3, 4).t(),), {}),
        ((torch.randn(4, 3).double(),), {}),
        ((torch.randn(4, 3),), {"scale": 3}),
        ((torch.randn(4, 3), True), {}),
        ((torch.randn(4, 3), 1), {}),  # equal to True, yet another kind
    ]
    for _ in range(3):
        for args, kwargs in kinds:
            assert torch.equal(graphs(double, args, kwargs)["y"], double(*args, **kwargs)["y"])
    assert captures.made == len(kinds)


@pytest.mark.parametrize("what", ("gradient", "object", "written", "forbidden", "output", "autocast"))
def test_what_a_graph_cannot_repeat_runs_as_it_is(what, captures, monkeypatch):
    if what == "autocast":
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    graphs, x = CudaGraphs(), torch.randn(4, 3, requires_grad=what == "gradient")
    runs = []

    def run(x, cache=None):
        runs.append(x)
        y = x * 2
        if what == "written":
            x.add_(1)
        return object() if what == "output" else y

    captures.forbidden = what == "forbidden"
    arguments = (x, ["a list is a tree"], object()) if what == "object" else (x,)
    call = (lambda x, *_: run(x)) if what == "object" else run
    for _ in range(4):
        before = x.detach().clone()
        y = graphs(call, arguments, {})
        if what != "output":
            assert torch.equal(y, before * 2)
        if what == "written":
            assert torch.equal(x, before + 1)  # the caller sees it each time
        if what == "gradient":
            assert y.requires_grad
    assert sum(given is x for given in runs) == 4


def test_no_more_than_so_many_graphs(captures, monkeypatch):
    graphs = CudaGraphs()
    for _ in range(3):
        for rows in range(1, 40):
            assert graphs(double, (torch.ones(rows),), {})["y"].sum() == 2 * rows
    assert captures.made == graphed.MOST_GRAPHS
    monkeypatch.setattr(graphed, "MOST_SEEN", 50)
    for rows in range(100, 400):
        graphs(double, (torch.ones(rows),), {})
    assert len(graphs._seen) <= 52


def test_threads_do_not_mix_their_calls(captures):
    graphs, wrong = CudaGraphs(), []

    def work(value):
        for _ in range(50):
            if not torch.equal(graphs(double, (torch.full((8,), value),), {})["y"], torch.full((8,), 2 * value)):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_capture_anew(captures):
    graphs = CudaGraphs()
    for _ in range(3):
        graphs(double, (torch.ones(2),), {})
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert not other._graphs and not other._seen


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = LowRankConv2d(3, 8, 3, 4, padding=1), nn.BatchNorm2d(8)
        self.fc = LowRankLinear(8, 5, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture
def on_gpu(captures, monkeypatch):
    """`optimize` as on a GPU: what it times in graphs, by name of the form, and what it finds."""
    module = inhernet.export.optimize.__globals__
    timed = []

    def time_on_gpu(calls, expected):
        names = list(calls)
        timed.append(names)
        assert all(len(copies) == 2 for copies in calls.values())
        inputs = [{tensor.data_ptr() for call in calls[name] for tensor in call.args} for name in names[1:]]
        assert all(len(found) == 2 * len(calls["unfused"][0].args) for found in inputs)  # each call has its own
        for copies in calls.values():
            for call in copies:
                torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-4)
        return {name: Timing(*[float(len(names) - i)] * 3) for i, name in enumerate(names)}  # the last is the fastest

    monkeypatch.setitem(module, "on_gpu", lambda model: True)
    monkeypatch.setitem(module, "cold_copies", lambda nbytes: 2)
    monkeypatch.setitem(module, "time_on_gpu", time_on_gpu)
    return timed


def fastest(monkeypatch, wanted):
    module = inhernet.export.optimize.__globals__
    seen = []

    def interleaved(calls, seconds, **_):
        seen.append(list(calls))
        return {name: Latency(1.0, 0.5 if name == wanted else 1.0, 1.0, 5) for name in calls}

    monkeypatch.setitem(module, "interleaved", interleaved)
    return seen


@pytest.mark.parametrize(
    "wanted, kept, graph",
    [
        ("optimised, channels-last, in a CUDA graph", "optimised", True),
        ("optimised", "optimised", False),
        ("given, in a CUDA graph", "given", True),
        ("given", "given", False),
    ],
)
def test_a_graph_is_kept_where_the_whole_is_fastest_in_one(
    wanted, kept, graph, on_gpu, captures, monkeypatch, tmp_path
):
    torch.manual_seed(0)
    model, x = Network().eval(), torch.randn(2, 3, 8, 8)
    seen = fastest(monkeypatch, wanted)
    fast = inhernet.optimize(model, x, seconds=0.01, show=False)
    assert set(seen[-1]) == {"given", "optimised", "optimised, channels-last", "optimised, in a CUDA graph",
                             "optimised, channels-last, in a CUDA graph", "given, in a CUDA graph"}  # fmt: skip
    assert all(names[0] == "given" and "unfused" in names for names in on_gpu)
    assert (fast.optimization.kept, fast.optimization.cuda_graph) == (kept, graph)
    made = captures.made
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)
    assert (captures.made > made or captures.made > 0) if graph else captures.made == made
    again = inhernet.export.optimize.__globals__["apply"](copy.deepcopy(model), fast.optimization)
    assert (again._graphs is not None) == graph


@pytest.mark.parametrize("cuda_graph", (True, False))
def test_the_caller_decides_about_graphs(cuda_graph, on_gpu, monkeypatch):
    seen = fastest(monkeypatch, "optimised")
    inhernet.optimize(Network().eval(), torch.randn(2, 3, 8, 8), cuda_graph=cuda_graph, seconds=0.01, show=False)
    assert {"in a CUDA graph" in name for name in seen[-1] if name != "given"} == {cuda_graph}
    assert bool(on_gpu) == cuda_graph  # layers are timed in graphs only where graphs may run them


def test_a_cpu_has_no_graphs():
    fast = inhernet.optimize(Network().eval(), torch.randn(2, 3, 8, 8), cuda_graph=True, seconds=0.005, show=False)
    assert fast._graphs is None and not fast.optimization.cuda_graph


def test_a_single_layer_runs_in_a_graph_too(on_gpu, captures, monkeypatch):
    fastest(monkeypatch, "optimised, in a CUDA graph")
    layer, inputs = LowRankLinear(6, 5, 3).eval(), [torch.randn(4, 6) for _ in range(4)]
    fast = inhernet.optimize(layer, inputs[0], cuda_graph=True, seconds=0.01, show=False)
    with torch.no_grad():
        outputs = [fast(x) for x in inputs]
        for x, y in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(y, layer(x))
    assert fast.optimization.cuda_graph and any(fast._graphs._graphs.values())
