"""How a call may run on a GPU: in a graph, on streams, on another device, compiled, packaged, beyond 32-bit offsets.

`pytest -m gpu`; `--gpu-rehearsal` runs what a CPU can.
"""

from __future__ import annotations

import pytest
import torch
from gpu_support import backends, call, find, inputs_of, leaves_of, served, skip_unless_served

import inherit_kernels
from benchmarks.gpu.device import open_device
from inherit_kernels.registry import OPS
from inherit_kernels.testing import Case, check_accuracy

pytestmark = pytest.mark.gpu
WIDE = 2**31


@pytest.fixture
def opened(device):
    """The device of the benchmark house: its capture is what a user of CUDA graphs does."""
    opened = open_device(rehearse=device == "cpu")
    opened.begin()
    torch.backends.cudnn.benchmark = False  # results are compared bit for bit, also those of torch's own products
    return opened


def reference(op, inputs, case):
    return call(op, inputs, case, "reference")


def close(actual, expected, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def fresh(inputs, seed):
    """New values in the same memory."""
    generator = torch.Generator(inputs["x"].device).manual_seed(seed)
    for value in inputs.values():
        if value is not None:
            value.copy_(torch.randn(value.shape, generator=generator, device=value.device) / 4)


# --- graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, backend", backends())
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_a_captured_call_replays_on_changed_inputs(op, backend, dtype, opened, device):
    for case in served(op, backend, dtype, device):
        inputs = inputs_of(op, case, dtype, device)
        y = torch.full_like(call(op, inputs, case, backend), float("nan"))

        def step(inputs=inputs, case=case, y=y):
            y.copy_(call(op, inputs, case, backend))

        replay = opened.capture([step])
        for seed in range(3):
            fresh(inputs, seed)
            y.fill_(float("nan"))
            replay()
            opened.synchronize()
            assert torch.equal(y, call(op, inputs, case, backend))
            close(y, reference(op, inputs, case), dtype)


@pytest.mark.parametrize("op, backend", backends())
def test_a_captured_training_step_replays_on_changed_inputs(op, backend, opened, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case, *_ = served(op, backend, dtype, device, training=True)
    inputs = inputs_of(op, case, dtype, device)
    given = [value.requires_grad_() for value in inputs.values() if value is not None]
    kept = [torch.zeros_like(value) for value in given]

    def gradients():
        y = call(op, inputs, case, backend)
        return torch.autograd.grad(y, given, torch.ones_like(y))

    def step():
        for target, gradient in zip(kept, gradients(), strict=True):
            target.copy_(gradient)

    replay = opened.capture([step])
    for seed in range(2):
        with torch.no_grad():
            fresh(inputs, seed)
        replay()
        opened.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(kept, gradients(), strict=True))


# --- streams and devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, backend", backends())
def test_on_a_stream_of_its_own(op, backend, cuda):
    """The inputs become what they are only on that stream, after a delay: work on another would read the old ones."""
    case = served(op, backend, torch.bfloat16, cuda)[-1]
    inputs = inputs_of(op, case, torch.bfloat16, cuda)
    expected = call(op, inputs, case, backend)
    final = {name: None if value is None else value.clone() for name, value in inputs.items()}
    for value in inputs.values():
        if value is not None:
            value.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        for name, value in inputs.items():
            if value is not None:
                value.copy_(final[name])
        y = call(op, inputs, case, backend)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("op, backend", backends())
def test_two_streams_at_once(op, backend, cuda):
    """Calls that overlap must not share scratch memory or counters."""
    case = served(op, backend, torch.bfloat16, cuda)[-1]
    sets = [inputs_of(op, case, torch.bfloat16, cuda, seed) for seed in range(2)]
    expected = [call(op, inputs, case, backend) for inputs in sets]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in sets]
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for stream, inputs, results in zip(streams, sets, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(op, inputs, case, backend))
    torch.cuda.synchronize()
    for results, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(result, wanted) for result in results)


@pytest.mark.parametrize("op, backend", backends())
def test_on_a_device_that_is_not_the_current_one(op, backend, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = served(op, backend, torch.bfloat16, "cuda:1")[-1]
    inputs = leaves_of(inputs_of(op, case, torch.bfloat16, "cuda:1"))
    y = call(op, inputs, case, backend)
    y.sum().backward()
    assert y.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    close(y.detach(), reference(op, inputs, case).detach(), torch.bfloat16)


# --- compiled and packaged ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, backend", backends())
def test_compiled_in_one_graph_forward_and_backward(op, backend, device):
    torch._dynamo.reset()
    case = served(op, backend, torch.float32, device, training=True)[-1]
    function = getattr(inherit_kernels, op)
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    check_accuracy(op, case, backend, torch.float32, device=device, function=compiled)


@pytest.mark.parametrize("op", OPS)
def test_one_compilation_serves_every_batch_from_two(op, device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    case = find(op, "three_by_three" if "conv" in op else "ragged")  # no size is that of a batch below
    inputs = inputs_of(op, case, torch.float32, device)
    function = getattr(inherit_kernels, op)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (11, 2, 4, 13, 29):
        sized = {
            name: torch.randn(rows, *value.shape[1:], device=device)
            if name in ("x", "residual") and value is not None
            else value
            for name, value in inputs.items()
        }
        expected = function(*sized.values(), **case.options)
        torch.testing.assert_close(compiled(*sized.values(), **case.options), expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


class Layer(torch.nn.Module):
    """An op as a module."""

    def __init__(self, op, inputs, options):
        super().__init__()
        self.op, self.options = op, options
        self.names = [name for name, value in inputs.items() if name not in ("x", "residual") and value is not None]
        for name in self.names:
            self.register_parameter(name, torch.nn.Parameter(inputs[name]))

    def forward(self, x):
        weights = {name: getattr(self, name) for name in self.names}
        return getattr(inherit_kernels, self.op)(x, **weights, **self.options)


@pytest.mark.parametrize("op, backend", [pair for pair in backends() if pair.values[1] != "unfused"])
def test_a_package_of_aotinductor_computes_the_same(op, backend, cuda, tmp_path):
    case = served(op, backend, torch.bfloat16, cuda)[-1]
    inputs = inputs_of(op, case, torch.bfloat16, cuda)
    layer = Layer(op, inputs, case.options).eval()
    with torch.no_grad(), inherit_kernels.use_backend(backend):
        expected = layer(inputs["x"])
        program = torch.export.export(layer, (inputs["x"],))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    close(loaded(inputs["x"]), expected, torch.bfloat16)


# --- beyond 32-bit offsets ---------------------------------------------------------------------------------------------


def _enough_memory(elements: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < 5 * elements:  # two bytes each, x and a copy in another layout
        pytest.skip(f"needs {5 * elements >> 30} GiB of free GPU memory, there are {free >> 30}")


@pytest.mark.parametrize("op, backend", [pair for pair in backends() if "linear" in pair.values[0]])
@pytest.mark.parametrize("side", ("x", "y"))
def test_more_than_2_to_the_31_elements_of_rows(op, backend, side, cuda):
    from importlib import import_module

    rows, wide, narrow = 65_600, 32_768, 16
    k, n = (wide, narrow) if side == "x" else (narrow, wide)
    heads = (2,) if "gated" in op else ()
    make = import_module(f"inherit_kernels.ops.{op}.cases").case
    case = make("wide", (rows,), k, n, 16, *heads)
    skip_unless_served(op, backend, case, torch.bfloat16, cuda)
    _enough_memory(rows * wide)
    inputs = inputs_of(op, make("narrow", (1,), k, n, 16, *heads), torch.bfloat16, cuda)
    inputs["x"] = torch.randn(rows, k, device=cuda, dtype=torch.bfloat16)
    y = call(op, inputs, case, backend)
    probes = [0, 1, WIDE // wide - 1, WIDE // wide, WIDE // wide + 1, rows - 2, rows - 1]
    expected = reference(op, inputs | {"x": inputs["x"][probes]}, case)
    close(y[probes], expected, torch.bfloat16)


@pytest.mark.parametrize(
    "op, backend", [pair for pair in backends() if "conv" in pair.values[0] and pair.values[1] != "unfused"]
)
@pytest.mark.parametrize("layout", ("channels_last", "contiguous"))
def test_more_than_2_to_the_31_elements_of_images(op, backend, layout, cuda):
    from importlib import import_module

    batch, channels, side = 258, 32, 512
    heads = (2,) if "gated" in op else ()
    make = import_module(f"inherit_kernels.ops.{op}.cases").case
    case: Case = make("wide", (batch,), channels, (side, side), 8, 8, *heads, (3, 3), padding=1)
    skip_unless_served(op, backend, case, torch.bfloat16, cuda)
    _enough_memory(batch * channels * side * side)
    inputs = inputs_of(
        op, make("narrow", (1,), channels, (3, 3), 8, 8, *heads, (3, 3), padding=1), torch.bfloat16, cuda
    )
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    inputs["x"] = torch.empty(
        batch, channels, side, side, device=cuda, dtype=torch.bfloat16, memory_format=memory_format
    ).normal_()
    y = call(op, inputs, case, backend)
    for image in (0, WIDE // (channels * side * side) - 1, batch - 1):
        one = inputs | {"x": inputs["x"][image : image + 1]}
        close(y[image : image + 1], reference(op, one, case), torch.bfloat16)
