"""What a user of a GPU would run instead, each on several sets of tensors: a cold measurement needs fresh memory a call.

Every peer is a function of the sets' `Setting`s; it returns one runner a set, and compiles once for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.baselines import layers
from benchmarks.baselines.setting import Runner, Setting
from benchmarks.gpu.cases import COMPILED, FAST, SLOW, Item
from inherit_kernels.common.heads import gate_of, scaled_rows, side_by_side

Make = Callable[[Sequence[Setting], "str | None"], list[Runner]]  # the second: the compiler to use in a rehearsal


@dataclass(frozen=True)
class Peer:
    """A way of running a case; `dense` ones compute the layer that the factored one replaces."""

    make: Make
    cost: str = FAST
    dense: bool = False


def peers_of(item: Item) -> dict[str, Peer]:
    """The peers that a measurement asks for, in the order of the tables."""
    op, gated = item.point.op, "gated" in item.point.op
    if item.mode == "backward":
        if gated:
            return {}
        return {"cuDNN backward": Peer(_conv_backward)} if "conv2d" in op else {"four GEMMs": Peer(_four_gemms)}
    first = ("published", layers.Published) if gated else ("pair", layers.Pair)
    known = _forms(*first)
    if op == "gated_lowrank_linear" and item.mode == "forward":
        known |= {"concat GEMM": Peer(_concat_gemm), "concat GEMM, compiled": Peer(_compiled_concat_gemm, COMPILED)}
    if op == "lowrank_linear" and "bias" not in item.point.case.shapes:
        known["pair, B2B pass"] = Peer(_module(layers.Pair, {"options": {"b2b_gemm_pass": True}}), SLOW)
    known |= _forms("dense", layers.Dense, dense=True)
    return {name: peer for name, peer in known.items() if peer.cost in item.peers}


def _forms(name: str, layer: Callable[[Setting], nn.Module], dense: bool = False) -> dict[str, Peer]:
    """Eager, compiled, and compiled with autotuning; the dense layer, one product, is not compiled but in the few cases."""
    tuned = {"mode": "max-autotune-no-cudagraphs"}
    return {
        name: Peer(_module(layer), FAST, dense),
        f"{name}, compiled": Peer(_module(layer, {}), SLOW if dense else COMPILED, dense),
        f"{name}, max-autotune": Peer(_module(layer, tuned), SLOW, dense),
    }


def _module(layer: Callable[[Setting], nn.Module], compiled: dict[str, Any] | None = None) -> Make:
    """A torch module; `compiled` holds torch.compile's arguments."""

    def make(settings: Sequence[Setting], compiler: str | None) -> list[Runner]:
        modules = [_laid_out(layer(setting).eval(), setting) for setting in settings]
        if compiled is None:
            return [setting.runner(module, _leaves(module)) for setting, module in zip(settings, modules, strict=True)]
        shape = copy.deepcopy(modules[0]).to("meta")  # were its tensors those of a set, that set would compile anew

        def run(tensors: dict[str, Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
            return functional_call(shape, tensors, (x, residual))

        function = _compile(run, compiled, compiler)
        runners = []
        for setting, module in zip(settings, modules, strict=True):
            tensors = dict(module.named_parameters())
            bound = _bind(function, tensors)
            runners.append(setting.runner(bound, _leaves(module)))
        return runners

    return make


def _compile(function: Callable[..., Tensor], options: dict[str, Any], compiler: str | None) -> Callable[..., Tensor]:
    return torch.compile(function, backend=compiler) if compiler else torch.compile(function, **options)


def _bind(function: Callable[..., Tensor], tensors: Any) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda x, residual: function(tensors, x, residual)


def _leaves(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _laid_out(module: Any, setting: Setting) -> nn.Module:
    """Weights in the images' memory format, as cuDNN wants them."""
    x: Any = setting.inputs["x"]
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return module.to(memory_format=torch.channels_last)
    return module


# --- heads as one product ----------------------------------------------------------------------------------------------


def _concat(weights: Sequence[Any], x: Tensor, residual: Tensor | None) -> Tensor:
    """[g_1 t … g_H t g]·[up_1 … up_H biasᵀ]ᵀ with the weights side by side beforehand."""
    down, up, gate_weight, gate_bias, activation = weights
    t = F.linear(x, down)
    z = F.linear(scaled_rows(t, gate_of(t, gate_weight, gate_bias), up.shape[1]), up)
    return layers.ACTIVATIONS[activation](z if residual is None else z + residual)


def _concat_gemm(settings: Sequence[Setting], compiler: str | None) -> list[Runner]:
    return [setting.runner(_bind(_concat, _concat_weights(setting)), []) for setting in settings]


def _compiled_concat_gemm(settings: Sequence[Setting], compiler: str | None) -> list[Runner]:
    function = _compile(_concat, {}, compiler)
    return [setting.runner(_bind(function, _concat_weights(setting)), []) for setting in settings]


def _concat_weights(setting: Setting) -> list[Any]:
    inputs: Any = setting.inputs
    up = side_by_side(inputs["up"], inputs["bias"], multiple=8)
    gate = [inputs[name] for name in ("gate_weight", "gate_bias")]
    return [inputs["down"], up.contiguous(), *gate, setting.options.get("activation")]


# --- backward alone ----------------------------------------------------------------------------------------------------


def _four_gemms(settings: Sequence[Setting], compiler: str | None) -> list[Runner]:
    """What autograd of two linear layers computes, t saved: four products and the bias's sum."""

    def runner(setting: Setting) -> Runner:
        inputs: Any = setting.inputs
        dz: Any = setting.cotangent
        x, down, up = inputs["x"], inputs["down"], inputs["up"]
        t = F.linear(x, down)
        biased = inputs["bias"] is not None

        def run() -> tuple[Tensor, ...]:
            dt = dz @ up
            gradients = (dt @ down, dt.t() @ x, dz.t() @ t)
            return (*gradients, dz.sum(0)) if biased else gradients

        return Runner(run)

    return [runner(setting) for setting in settings]


def _conv_backward(settings: Sequence[Setting], compiler: str | None) -> list[Runner]:
    """What autograd of two convolutions computes, t saved."""

    def runner(setting: Setting) -> Runner:
        inputs: Any = setting.inputs
        x, dz = inputs["x"], setting.cotangent
        window: Any = [_pair(setting.window.get(key, default)) for key, default in _WINDOW]
        as_images = {"memory_format": torch.channels_last} if not x.is_contiguous() else {}
        down = inputs["down"].contiguous(**as_images)
        up = inputs["up"][:, :, None, None].contiguous(**as_images)
        t = F.conv2d(x, down, None, *window)
        sizes = [up.shape[0]] if inputs["bias"] is not None else None
        single = ([1, 1], [0, 0], [1, 1])

        def run() -> tuple[Tensor, ...]:
            wanted = [True, True, sizes is not None]
            dt, d_up, d_bias = _backward_of_conv(dz, t, up, sizes, *single, False, [0, 0], 1, wanted)
            dx, d_down, _ = _backward_of_conv(dt, x, down, None, *window, False, [0, 0], 1, [True, True, False])
            d_up = d_up.flatten(1)
            return (dx, d_down, d_up) if d_bias is None else (dx, d_down, d_up, d_bias)

        return Runner(run)

    return [runner(setting) for setting in settings]


_WINDOW = (("stride", 1), ("padding", 0), ("dilation", 1))
_backward_of_conv = torch.ops.aten.convolution_backward.default


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
