"""What is timed on one case: our backends, packed and not, and the peers; each checked before it may be."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import inherit_kernels
from benchmarks.baselines import Runner, Setting, Unavailable, peers_of
from benchmarks.baselines.layers import ACTIVATIONS
from benchmarks.correctness import Truth, mask_kink
from benchmarks.suites import Point, work_of
from inherit_kernels.dispatch import _forced
from inherit_kernels.registry import OPS
from inherit_kernels.testing import make_inputs
from inherit_kernels.testing.cases import generator_on

OURS = ("automatic", "packed")  # beside the backends by name


@dataclass
class Candidate:
    """One way of running a case and what became of it before the clock started."""

    name: str
    kind: str  # ours or peer
    dense: bool = False
    runner: Runner | None = None
    status: str = "ok"  # ok, declined, wrong
    note: str = ""
    resolved: str = ""
    max_error: float | None = None


def prepare(
    point: Point,
    dtype: torch.dtype,
    training: bool,
    backends: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    forms: Sequence[str] = ("unpacked", "packed"),
) -> list[Candidate]:
    """All candidates of a case, checked; those that cannot run or are wrong say why and have no runner.

    Args:
        backends: names of our backends; None for all that are not the definition itself.
        peers: names of peers; None for all.
        forms: whether our plain calls ("unpacked"), those on packed weights ("packed"), or both are wanted.
    """
    setting, truth, dense_truth = set_up(point, dtype, training)
    return [
        *(_ours(setting, truth, name) for name in _names_of_ours(point.op, training, backends, forms)),
        *(
            _checked_peer(name, peer, setting, dense_truth if peer.dense else truth)
            for name, peer in peers_of(point.op, training).items()
            if peers is None or name in peers
        ),
    ]


def set_up(point: Point, dtype: torch.dtype, training: bool) -> tuple[Setting, Truth, Truth]:
    """The tensors of a case, and the truth of the factored and of the dense layer."""
    setting = set_up_without_truth(point, dtype, training)
    dense_inputs = {"x": setting.inputs["x"], **setting.dense, "residual": setting.inputs["residual"]}
    factored_flops, dense_flops = (work_of(point, 4, training, dense).flops for dense in (False, True))
    truth = Truth(lambda tensors: factored(point, tensors), setting.inputs, setting.cotangent, factored_flops)
    # The kink of relu lies elsewhere in the dense layer, so that only its output is compared.
    return setting, truth, Truth(lambda tensors: whole(setting, tensors), dense_inputs, None, dense_flops)


def set_up_without_truth(point: Point, dtype: torch.dtype, training: bool, device: str = "cpu") -> Setting:
    """The tensors of a case, in training with the gradient at y."""
    inputs = make_inputs(point.op, point.case, dtype, device=device, layout=point.layout)
    with torch.no_grad():
        y = factored(point, inputs)
    setting = Setting(point, dtype, inputs, _dense_weights(inputs, dtype), y.shape)
    if training:
        generator = generator_on(device, 1000)
        cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64, device=device).to(dtype)
        if setting.options.get("activation") == "relu":
            wide = {name: None if value is None else value.double() for name, value in inputs.items()}
            with torch.no_grad():
                cotangent = mask_kink(cotangent, factored(point, wide, activation=None), dtype)
        setting.cotangent = cotangent.contiguous(memory_format=_memory_format(y))
    return setting


def factored(point: Point, tensors: dict[str, Any], **changed: Any) -> Tensor:
    """The op's definition."""
    with inherit_kernels.use_backend("reference"):
        return getattr(inherit_kernels, point.op)(*tensors.values(), **point.case.options | changed)


def whole(setting: Setting, tensors: dict[str, Any]) -> Tensor:
    """The definition of the dense layer."""
    product = F.conv2d if setting.is_conv else F.linear
    z = product(tensors["x"], tensors["weight"], tensors["bias"], **setting.window)
    z = z if tensors["residual"] is None else z + tensors["residual"]
    return ACTIVATIONS[setting.options.get("activation")](z)


def _memory_format(y: Tensor) -> torch.memory_format:
    return torch.channels_last if y.dim() == 4 and not y.is_contiguous() else torch.contiguous_format


def _dense_weights(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Random, of the scale that keeps the output of order one."""
    shape = (inputs["up"].shape[-2], *inputs["down"].shape[1:])
    device = inputs["up"].device
    generator = generator_on(device, 7)
    weight = torch.randn(shape, generator=generator, device=device) / _depth(shape) ** 0.5
    bias = None if inputs["bias"] is None else torch.randn(shape[0], generator=generator, device=device).to(dtype)
    return {"weight": weight.to(dtype), "bias": bias}


def _depth(shape: Sequence[int]) -> int:
    """Products summed for one output."""
    depth = 1
    for size in shape[1:]:
        depth *= size
    return depth


# --- ours --------------------------------------------------------------------------------------------------------------


def _names_of_ours(op: str, training: bool, backends: Sequence[str] | None, forms: Sequence[str]) -> list[str]:
    known = [name for name in OPS[op].backends if name != "reference"]
    names = ["automatic", *known] if backends is None else [name for name in backends if name in OPS[op].backends]
    if "unpacked" not in forms:
        names = []
    # A pack serves calls that need no gradient, so that there is nothing to time in training.
    return [*names, "packed"] if "packed" in forms and not training and backends is None else names


def _ours(setting: Setting, truth: Truth, name: str) -> Candidate:
    """The automatic choice, a backend by force, or the automatic choice on packed weights."""
    candidate = Candidate(name, "ours")
    try:
        candidate.runner, candidate.resolved = our_runner(setting, name)
        with torch.set_grad_enabled(setting.training):
            results = candidate.runner.result(candidate.runner.run())
    except ValueError as declined:
        return _stopped(candidate, "declined", declined)
    names = ["y", *(f"d_{key}" for key, value in setting.inputs.items() if value is not None)]
    return _check(candidate, truth, dict(zip(names, results, strict=False)), truth.check_ours)


def our_runner(setting: Setting, name: str) -> tuple[Runner, str]:
    """One of ours, and the backend that serves it."""
    op, inputs, options = setting.point.op, setting.inputs, setting.options
    function = getattr(inherit_kernels, op)
    if name == "packed":
        *weights, residual = list(inputs.values())[1:]
        packed = inherit_kernels.pack(op, *weights)
        bound = partial(function, inputs["x"], packed, residual=residual, **options)
        kept = f"{packed.bytes / 1e6:.2f} MB of panels" if packed.panels else "no panels"
        with torch.no_grad():
            choice = inherit_kernels.explain(op, *inputs.values(), **options).choice
        return Runner(bound, note=kept), "native packed" if packed.panels else choice
    forced = None if name == "automatic" else name
    if not setting.training:
        call = _in_backend(forced, partial(function, *inputs.values(), **options))
        with torch.no_grad(), inherit_kernels.use_backend(forced):
            return Runner(call), inherit_kernels.explain(op, *inputs.values(), **options).choice
    leaves: Any = {key: None if value is None else value.detach().requires_grad_() for key, value in inputs.items()}
    wanted = [leaf for leaf in leaves.values() if leaf is not None]

    def step() -> tuple[Tensor, ...]:
        y = function(*leaves.values(), **options)
        return y, *torch.autograd.grad(y, wanted, setting.cotangent)

    with torch.enable_grad(), inherit_kernels.use_backend(forced):
        choice = inherit_kernels.explain(op, *leaves.values(), **options).choice
    return Runner(_in_backend(forced, step), lambda value: (value[0].detach(), *value[1:])), choice


def _in_backend(name: str | None, call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with a backend forced, for 0.1 µs: entering `use_backend` in every call would cost ten times that."""
    if name is None:
        return call
    context = contextvars.copy_context()
    context.run(_forced.set, name)  # entering `use_backend` here and dropping it would reset it at once
    return partial(context.run, call)


# --- peers -------------------------------------------------------------------------------------------------------------


def _checked_peer(name: str, peer: Any, setting: Setting, truth: Truth) -> Candidate:
    candidate = Candidate(name, "peer", peer.dense)
    try:
        candidate.runner = peer.make(setting)
        candidate.resolved = candidate.runner.note
        with torch.set_grad_enabled(setting.training):
            results = candidate.runner.result(candidate.runner.run())
    except Unavailable as declined:
        return _stopped(candidate, "declined", declined)
    except Exception as failed:  # whatever a foreign engine throws is a reason to report, not to stop
        return _stopped(candidate, "declined", f"{type(failed).__name__}: {failed}")
    names = ["y"] if peer.dense else ["y", "d_x"]
    return _check(candidate, truth, dict(zip(names, results, strict=False)), truth.check_peer)


def _check(candidate: Candidate, truth: Truth, results: dict[str, Tensor], check: Callable[..., None]) -> Candidate:
    candidate.max_error = truth.error(results)
    try:
        check(candidate.name, results)
    except AssertionError as wrong:
        return _stopped(candidate, "wrong", wrong)
    return candidate


def _stopped(candidate: Candidate, status: str, reason: object) -> Candidate:
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    candidate.status, candidate.note, candidate.runner = status, lines[0][:300], None
    return candidate
