"""Whole networks on a GPU: `inhernet.optimize`, CUDA graphs. `pytest -m gpu`; `--gpu-rehearsal` runs what a CPU can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import inhernet
from inhernet.export.graphed import CudaGraphs
from inhernet.models import resnet20

pytestmark = pytest.mark.gpu


def inherited(kind: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """A network of inherited layers, and inputs."""
    torch.manual_seed(0)
    if kind == "resnet":
        teacher, x = resnet20(num_classes=10), torch.randn(8, 3, 32, 32)
    else:
        teacher = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64))
        x = torch.randn(48, 256)
    config = inhernet.InheritConfig(budget=inhernet.ParamBudget(0.5), heads=3 if kind == "heads" else 1)
    model = inhernet.inherit(teacher.eval(), inhernet.plan(teacher, config))
    return model.to(device, dtype).eval(), x.to(device, dtype)


def close(actual, expected, dtype):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= torch.finfo(dtype).eps ** 0.5, error


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("kind", ("resnet", "plain", "heads"))
def test_an_optimised_network_computes_the_same_and_is_not_slower(kind, dtype, device):
    model, x = inherited(kind, device, dtype)
    fast = inhernet.optimize(model, x, seconds=0.02, show=False)
    found = fast.optimization
    kept = found.kept + ", channels-last" * found.channels_last + ", in a CUDA graph" * found.cuda_graph
    assert found.milliseconds[kept] <= found.milliseconds["given"]
    assert (kept == "given") == (fast._graphs is None and found.kept == "given")
    with torch.no_grad():
        for rows in (len(x), len(x), len(x), 3, 3, 3):  # eagerly, captured, replayed; then other shapes
            other = torch.randn_like(x[:rows])
            close(fast(other), model(other), dtype)


@pytest.mark.parametrize("form", ("dense", "unfused", "fused", "blas", "triton"))
@pytest.mark.parametrize("kind", ("resnet", "plain"))
def test_every_form_computes_the_same(kind, form, cuda):
    model, x = inherited(kind, cuda, torch.bfloat16)
    layers = [name for name, module in model.named_modules() if isinstance(module, inhernet.nn.LowRankModule)]
    told = dict.fromkeys(layers, form)
    fast = inhernet.optimize(model, x, choices=told, cuda_graph=True, seconds=0.02, show=False)
    assert {fast.optimization.forms[name] for name in layers} == {form}
    with torch.no_grad():
        for _ in range(3):
            close(fast(x), model(x), torch.bfloat16)


def test_a_forward_that_waits_for_the_device_is_not_captured(cuda):
    graphs, layer = CudaGraphs(), nn.Linear(8, 8, device=cuda).requires_grad_(False)

    def run(x):
        return layer(x) if x.sum().item() > 0 else -layer(x)

    for sign in (1, -1, 1, -1):
        x = sign * torch.rand(4, 8, device=cuda)
        torch.testing.assert_close(graphs(run, (x,), {}), sign * layer(x))
    assert list(graphs._graphs.values()) == [None]


def test_replays_see_new_inputs_on_every_stream(cuda):
    graphs, layer = CudaGraphs(), nn.Linear(64, 64, device=cuda).requires_grad_(False)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream())
            outputs, inputs = [], [torch.randn(16, 64, device=cuda) for _ in range(6)]
            for x in inputs:
                outputs.append(graphs(layer, (x,), {}))
            stream.synchronize()
            for x, y in zip(inputs, outputs, strict=True):
                torch.testing.assert_close(y, layer(x))
    assert len(graphs._graphs) == 2 and all(graphs._graphs.values())
