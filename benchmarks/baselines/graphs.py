"""A layer as an ONNX graph, built node by node: what ONNX Runtime and OpenVINO get.

The gated forms carry the merged algebra (one product of depth H·R a row, one merged weight a sample), which is more than an
export of the published layer would give these engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OPSET = 20  # Gelu came with it


def element_of(dtype: torch.dtype) -> int:
    """The number of a dtype in ONNX."""
    from onnx import TensorProto

    return {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16}[dtype]


class Graph:
    """Nodes and constants of one graph; every method adds a node and returns the name of its output."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.element = element_of(dtype)
        self.dtype = dtype
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []

    def input(self, name: str, shape: Sequence[int]) -> str:
        from onnx import helper

        self.inputs.append(helper.make_tensor_value_info(name, self.element, list(shape)))
        return name

    def constant(self, value: Tensor) -> str:
        from onnx import helper

        name = f"c{len(self.constants)}"
        raw = value.to(self.dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()
        self.constants.append(helper.make_tensor(name, self.element, list(value.shape), raw, raw=True))
        return name

    def sizes(self, *values: int) -> str:
        from onnx import TensorProto, helper

        name = f"c{len(self.constants)}"
        self.constants.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], list(values)))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def activate(self, value: str, activation: str | None) -> str:
        if activation == "relu":
            return self.node("Relu", value)
        if activation in ("gelu", "gelu_tanh"):
            return self.node("Gelu", value, approximate="tanh" if activation == "gelu_tanh" else "none")
        return value if activation is None else self.node("Mul", value, self.node("Sigmoid", value))

    def serialize(self, output: str, shape: Sequence[int]) -> bytes:
        from onnx import helper

        result = helper.make_tensor_value_info(output, self.element, list(shape))
        graph = helper.make_graph(self.nodes, "layer", self.inputs, [result], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        return model.SerializeToString()


def graph_of(
    tensors: dict[str, Tensor | None], options: dict[str, Any], dtype: torch.dtype, output_shape: Sequence[int]
) -> bytes:
    """The factored layer (`down` and `up` given) or the dense one (`weight` given), serialised.

    Inputs are named `x` and, where there is one, `residual`.
    """
    graph = Graph(dtype)
    x: Any = tensors["x"]
    image = x.dim() == 4
    name = graph.input("x", x.shape)
    if "weight" in tensors:
        y = _stage(graph, name, tensors["weight"], tensors["bias"], options if image else None)
    elif "gate_weight" in tensors:
        gated = _gated_conv if image else _gated_linear
        y = gated(graph, name, tensors, options, output_shape)
    else:
        up: Any = tensors["up"]
        t = _stage(graph, name, tensors["down"], None, options if image else None)
        y = _stage(graph, t, up[:, :, None, None] if image else up, tensors["bias"], {} if image else None)
    if tensors["residual"] is not None:
        y = graph.node("Add", y, graph.input("residual", output_shape))
    return graph.serialize(graph.activate(y, options.get("activation")), output_shape)


def _stage(graph: Graph, x: str, weight: Any, bias: Tensor | None, window: dict[str, Any] | None) -> str:
    """A convolution where there is a window, else a product with the transposed weight."""
    biases = [] if bias is None else [graph.constant(bias)]
    if window is None:
        return graph.node("Gemm", x, graph.constant(weight.t()), *biases)
    stride, padding, dilation = (_pair(window.get(k, d)) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
    return graph.node(
        "Conv",
        x,
        graph.constant(weight),
        *biases,
        kernel_shape=list(weight.shape[2:]),
        strides=stride,
        pads=padding * 2,
        dilations=dilation,
    )


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _gates(graph: Graph, s: str, tensors: dict[str, Any]) -> str:
    biases = [] if tensors["gate_bias"] is None else [graph.constant(tensors["gate_bias"])]
    return graph.node("Softmax", graph.node("Gemm", s, graph.constant(tensors["gate_weight"].t()), *biases), axis=1)


def _gated_linear(graph: Graph, x: str, tensors: dict[str, Any], options: Any, output_shape: Sequence[int]) -> str:
    up = tensors["up"]
    t = _stage(graph, x, tensors["down"], None, None)
    g = _gates(graph, t, tensors)
    scaled = graph.node("Mul", graph.node("Unsqueeze", g, graph.sizes(2)), graph.node("Unsqueeze", t, graph.sizes(1)))
    rows = graph.node("Reshape", scaled, graph.sizes(output_shape[0], up.shape[0] * up.shape[2]))
    y = graph.node("MatMul", rows, graph.constant(up.transpose(1, 2).flatten(0, 1)))
    if tensors["bias"] is None:
        return y
    return graph.node("Add", y, graph.node("MatMul", g, graph.constant(tensors["bias"])))


def _gated_conv(graph: Graph, x: str, tensors: dict[str, Any], options: Any, output_shape: Sequence[int]) -> str:
    _, n, r = tensors["up"].shape
    batch, _, height, width = output_shape
    t = _stage(graph, x, tensors["down"], None, options)
    means = graph.node("GlobalAveragePool", t)
    g = _gates(graph, graph.node("Reshape", means, graph.sizes(batch, r)), tensors)
    merged = graph.node("MatMul", g, graph.constant(tensors["up"].flatten(1)))
    product = graph.node(
        "MatMul",
        graph.node("Reshape", merged, graph.sizes(batch, n, r)),
        graph.node("Reshape", t, graph.sizes(batch, r, height * width)),
    )
    y = graph.node("Reshape", product, graph.sizes(batch, n, height, width))
    if tensors["bias"] is None:
        return y
    bias = graph.node("MatMul", g, graph.constant(tensors["bias"]))
    return graph.node("Add", y, graph.node("Reshape", bias, graph.sizes(batch, n, 1, 1)))
