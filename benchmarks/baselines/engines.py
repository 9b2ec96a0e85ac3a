"""Peers outside torch: ONNX Runtime and OpenVINO, on the graphs of `graphs.py`, with torch's number of threads.

Images go in contiguous, which is these engines' own layout; inputs are bound once, so that no call copies them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.graphs import element_of, graph_of
from benchmarks.baselines.setting import Runner, Setting, Unavailable


def onnx_runtime(setting: Setting) -> Runner:
    """The factored graph in ONNX Runtime."""
    return _onnx_runtime(setting, setting.inputs)


def dense_onnx_runtime(setting: Setting) -> Runner:
    """The dense layer in ONNX Runtime."""
    return _onnx_runtime(setting, _dense(setting))


def openvino(setting: Setting) -> Runner:
    """The factored graph in OpenVINO."""
    return _openvino(setting, setting.inputs)


def dense_openvino(setting: Setting) -> Runner:
    """The dense layer in OpenVINO."""
    return _openvino(setting, _dense(setting))


def _dense(setting: Setting) -> dict[str, Tensor | None]:
    return {"x": setting.inputs["x"], **setting.dense, "residual": setting.inputs["residual"]}


def _bound(setting: Setting) -> dict[str, Tensor]:
    """The inputs of the graph by name, contiguous."""
    given = {name: setting.inputs[name] for name in ("x", "residual")}
    return {name: value.contiguous() for name, value in given.items() if value is not None}


def _graph(setting: Setting, tensors: dict[str, Tensor | None]) -> bytes:
    try:
        return graph_of(tensors, setting.options, setting.dtype, setting.output_shape)
    except ImportError as missing:
        raise Unavailable(f"{missing}; pip install 'inherit-kernels[bench]'") from None


def _onnx_runtime(setting: Setting, tensors: dict[str, Tensor | None]) -> Runner:
    setting.inference_only("ONNX Runtime")
    model = _graph(setting, tensors)
    try:
        import onnxruntime
    except ImportError as missing:
        raise Unavailable(f"{missing}; pip install 'inherit-kernels[bench]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Its threads spin inside a run only: beyond it they would take the core of the next candidate.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as refused:  # its exceptions share no base class
        raise Unavailable(f"ONNX Runtime: {str(refused).splitlines()[0]}") from None
    binding = session.io_binding()
    bound = _bound(setting)
    element = element_of(setting.dtype)
    for name, value in bound.items():
        binding.bind_input(name, "cpu", 0, element, list(value.shape), value.data_ptr())
    y = torch.empty(setting.output_shape, dtype=setting.dtype)
    binding.bind_output(session.get_outputs()[0].name, "cpu", 0, element, list(y.shape), y.data_ptr())

    def run(kept: Any = bound) -> Tensor:  # the binding only points at the inputs: they live as long as this does
        session.run_with_iobinding(binding)
        return y

    return Runner(run, lambda value: (value.clone(),), note=f"onnxruntime {onnxruntime.__version__}")


def _openvino(setting: Setting, tensors: dict[str, Tensor | None]) -> Runner:
    setting.inference_only("OpenVINO")
    model = _graph(setting, tensors)
    try:
        import openvino
    except ImportError as missing:
        raise Unavailable(f"{missing}; pip install 'inherit-kernels[bench]'") from None
    short = {torch.float32: "f32", torch.bfloat16: "bf16"}[setting.dtype]
    core = openvino.Core()
    properties = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": short,
        "ENABLE_CPU_PINNING": False,
    }
    try:
        compiled = core.compile_model(core.read_model(model), "CPU", properties)
    except RuntimeError as refused:
        raise Unavailable(f"OpenVINO: {str(refused).strip().splitlines()[-1]}") from None
    request = compiled.create_infer_request()
    kind = getattr(openvino.Type, short)
    bound = _bound(setting)
    for name, value in bound.items():
        request.set_tensor(name, _openvino_tensor(openvino, value, kind))
    output = request.get_output_tensor(0)  # the engine's own buffer, read in place

    def run(kept: Any = bound) -> Any:
        request.infer(share_outputs=True)  # 13 µs around an empty graph; start_async and wait take 26
        return output

    def result(value: Any) -> tuple[Tensor, ...]:
        y = torch.frombuffer(bytearray(value.data.tobytes()), dtype=setting.dtype)
        return (y.view(setting.output_shape),)

    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return Runner(run, result, note=f"openvino {openvino.__version__.split('-')[0]}, computes in {precision}")


def _openvino_tensor(openvino: Any, value: Tensor, kind: Any) -> Any:
    """A view of a torch tensor; numpy has no bfloat16, so that its bytes are handed over as 16-bit integers."""
    if value.dtype == torch.float32:
        return openvino.Tensor(value.numpy(), shared_memory=True)
    return openvino.Tensor(value.view(torch.int16).numpy(), openvino.Shape(list(value.shape)), kind)
