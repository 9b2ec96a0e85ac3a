"""Peers in torch: two plain layers in a row, the published layer, the dense layer, and oneDNN with prepacked weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.setting import Runner, Setting, Unavailable
from inhernet.demos.published import published_layer
from inhernet.nn import GatedLowRankConv2d, GatedLowRankLinear

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


class Epilogue(nn.Module):
    """act(layer(x) + residual)."""

    def __init__(self, layer: Callable[[Tensor], Tensor], activation: str | None) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        z = self.layer(x)
        return ACTIVATIONS[self.activation](z if residual is None else z + residual)


def Pair(setting: Setting) -> nn.Module:
    """Two `nn.Linear`, or two `nn.Conv2d`, the second 1×1."""
    down: Any = setting.inputs["down"]
    up: Any = setting.inputs["up"]
    if setting.is_conv:
        up = up[:, :, None, None]
    second = _layer(up, setting.inputs["bias"], {} if setting.is_conv else None)
    first = _layer(down, None, setting.window if setting.is_conv else None)
    return Epilogue(nn.Sequential(first, second), setting.options.get("activation"))


def Dense(setting: Setting) -> nn.Module:
    """The layer before its decomposition."""
    layer = _layer(setting.dense["weight"], setting.dense["bias"], setting.window if setting.is_conv else None)
    return Epilogue(layer, setting.options.get("activation"))


def Published(setting: Setting) -> nn.Module:
    """The layer as the InherNet authors publish it: every head evaluated, stacked, weighted and summed."""
    inputs: Any = setting.inputs
    heads, outputs, rank = inputs["up"].shape
    biased = inputs["bias"] is not None
    module: Any
    if setting.is_conv:
        channels, size = inputs["down"].shape[1], tuple(inputs["down"].shape[2:])
        module = GatedLowRankConv2d(channels, outputs, size, rank, heads, bias=biased, **setting.window)
    else:
        module = GatedLowRankLinear(inputs["down"].shape[1], outputs, rank, heads, bias=biased)
    module = module.to(inputs["up"])
    names = {"down": "down", "up": "up", "bias": "bias", "gate.weight": "gate_weight", "gate.bias": "gate_bias"}
    module.load_state_dict({key: inputs[name] for key, name in names.items() if inputs[name] is not None})
    return Epilogue(published_layer(module), setting.options.get("activation"))


def _layer(weight: Any, bias: Tensor | None, window: dict[str, Any] | None) -> nn.Module:
    """A linear layer, or a convolution where there is a window, with these weights."""
    biased, placed = bias is not None, {"dtype": weight.dtype, "device": weight.device}
    layer: Any
    if window is None:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=biased, **placed)
    else:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=biased, **placed, **window)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if biased:
            layer.bias.copy_(bias)
    return layer


# --- oneDNN with prepacked weights -------------------------------------------------------------------------------------

_ONEDNN_ACTIVATIONS = {  # attribute, algorithm
    None: ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}
OneDnn = Callable[..., Tensor]


def onednn_pair(setting: Setting) -> Runner:
    """Both products by oneDNN, weights reordered beforehand, activation fused: what inductor emits when frozen.

    The gated forms merge the heads as our composed backend does: one product of depth H·R, or one weight a sample.
    """
    inputs: Any = setting.inputs
    down = _onednn(setting, inputs["down"], None, inputs["x"].shape, setting.window)
    if "gate_weight" in inputs:
        return _onednn_runner(setting, _onednn_gated(setting, down))
    t_shape = _with_channels(setting, inputs["down"].shape[0])
    up = _onednn(setting, _pointwise(setting, inputs["up"]), inputs["bias"], t_shape, {})
    return _onednn_runner(setting, lambda x, activation: up(down(x, None), activation))


def onednn_dense(setting: Setting) -> Runner:
    """The dense layer, its weight reordered beforehand."""
    weight, bias = setting.dense["weight"], setting.dense["bias"]
    x: Any = setting.inputs["x"]
    return _onednn_runner(setting, _onednn(setting, weight, bias, x.shape, setting.window))


def _onednn_runner(setting: Setting, layer: OneDnn) -> Runner:
    setting.inference_only("the prepacked form")
    x, residual = setting.inputs["x"], setting.inputs["residual"]
    activation = setting.options.get("activation")
    if residual is None:
        return Runner(lambda: layer(x, activation))
    act = ACTIVATIONS[activation]
    return Runner(lambda: act(layer(x, None) + residual))


def _onednn(setting: Setting, weight: Any, bias: Any, input_shape: Any, window: dict[str, Any]) -> OneDnn:
    """(x, activation) -> act(layer(x))."""
    ops = torch.ops.mkldnn
    try:
        if not setting.is_conv:
            packed = ops._reorder_linear_weight(weight, input_shape[0])
            linear = ops._linear_pointwise.default

            def product(x: Tensor, activation: str | None) -> Tensor:
                attribute, algorithm = _ONEDNN_ACTIVATIONS[activation]
                return linear(x, packed, bias, attribute, [], algorithm)

            return product
        stride, padding, dilation = (
            _pair(window.get(k, d)) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))
        )
        packed = ops._reorder_convolution_weight(weight, padding, stride, dilation, 1, list(input_shape))
    except RuntimeError as declined:
        raise Unavailable(str(declined).splitlines()[0]) from None
    convolution = ops._convolution_pointwise.default

    def convolve(x: Tensor, activation: str | None) -> Tensor:
        attribute, algorithm = _ONEDNN_ACTIVATIONS[activation]
        return convolution(x, packed, bias, padding, stride, dilation, 1, attribute, [], algorithm)

    return convolve


def _onednn_gated(setting: Setting, down: OneDnn) -> OneDnn:
    inputs: Any = setting.inputs
    gate_weight, gate_bias, bias = (inputs[name] for name in ("gate_weight", "gate_bias", "bias"))
    heads, outputs, rank = inputs["up"].shape
    if setting.is_conv:
        flat = inputs["up"].flatten(1)

        def mixed(x: Tensor, activation: str | None) -> Tensor:
            t = down(x, None)
            g = F.softmax(F.linear(t.mean((2, 3)), gate_weight, gate_bias), dim=-1)
            merged = (g @ flat).view(-1, outputs, rank)
            if t.is_contiguous():
                y = torch.bmm(merged, t.flatten(2)).unflatten(2, t.shape[2:])
            else:
                y = (
                    torch.bmm(t.permute(0, 2, 3, 1).flatten(1, 2), merged.mT)
                    .unflatten(1, t.shape[2:])
                    .permute(0, 3, 1, 2)
                )
            return ACTIVATIONS[activation](y if bias is None else y + (g @ bias)[:, :, None, None])

        return mixed
    rows = inputs["x"].shape[0]
    weight = inputs["up"].permute(1, 0, 2).flatten(1).contiguous()
    up = _onednn(setting, weight, None, (rows, heads * rank), {})

    def gated(x: Tensor, activation: str | None) -> Tensor:
        t = down(x, None)
        g = F.softmax(F.linear(t, gate_weight, gate_bias), dim=-1)
        y = up((g[:, :, None] * t[:, None]).flatten(1), None)
        return ACTIVATIONS[activation](y if bias is None else torch.addmm(y, g, bias))

    return gated


def _pointwise(setting: Setting, up: Tensor) -> Tensor:
    return up[:, :, None, None].contiguous() if setting.is_conv else up


def _with_channels(setting: Setting, channels: int) -> tuple[int, ...]:
    """The shape of t."""
    if setting.is_conv:
        return (setting.output_shape[0], channels, *setting.output_shape[2:])
    return (*setting.output_shape[:-1], channels)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
