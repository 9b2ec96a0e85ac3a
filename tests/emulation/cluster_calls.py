"""Calls the emulated cluster kernels and the small-map convolution on numpy arrays.

No torch here: a process under ThreadSanitizer imports this module. Inputs are dictionaries of uint16 arrays that hold
float16 or bfloat16 bits; everything lies in guarded memory, outputs start as NaN.
"""

from __future__ import annotations

import hashlib

import numpy as np
from emulation.build import Array, to_bits

SOURCES = (
    "csrc/cuda/lowrank_linear_sm90.cu",
    "csrc/cuda/gated_lowrank_linear_sm90.cu",
    "csrc/cuda/gated_lowrank_conv2d.cu",
    "csrc/cuda/gated_lowrank_conv2d_sm90.cu",
    "tests/emulation/bind_cluster_kernels.cpp",
)
DTYPES = {"float16": 1, "bfloat16": 2}
NOT_SUPPORTED = 801


def rows_with_gaps(values: np.ndarray, gap: int) -> np.ndarray:
    """[..., n] -> [..., n + gap], the gap NaN: a dense array's view from row to row."""
    return np.concatenate([values, np.full((*values.shape[:-1], gap), 0xFFFF, values.dtype)], -1)


def linear_inputs(dtype, rows, k, rank, out, heads=0, bias=True, residual=True, seed=0):
    """Random inputs of order one; heads = 0 is the plain op."""
    random = np.random.default_rng(seed)

    def numbers(*shape, scale=1.0):
        return to_bits(random.standard_normal(shape) * scale, dtype)

    many = (heads,) if heads else ()
    inputs = {
        "x": numbers(rows, k),
        "down": numbers(rank, k, scale=k**-0.5),
        "up": numbers(*many, out, rank, scale=rank**-0.5),
    }
    if heads:
        inputs |= {"gate_weight": numbers(heads, rank), "gate_bias": numbers(heads)}
    if bias:
        inputs["bias"] = numbers(*many, out)
    if residual:
        inputs["residual"] = numbers(rows, out)
    return inputs


class Launch:
    """A prepared call: its arrays live as long as it does, and may be another call's inputs."""

    def __init__(self, module, name, given, y, t, call):
        self.module, self.name, self.given, self.y, self.t, self.call = module, name, given, y, t, call

    def start(self) -> int:
        return getattr(self.module, self.name)(self.call)

    def declines(self) -> str | None:
        return getattr(self.module, f"{self.name}_declines")(self.call)


def finish(*launches: Launch) -> None:
    """Starts all, one behind the other in one stream, and waits."""
    for launch in launches:
        assert launch.start() == 0, launch.declines()
    launches[0].module.synchronize()


def prepare_linear(module, dtype, inputs, *, gap=0, want_t=True, x=None, **fields) -> Launch:
    """`gap` elements lie between rows of x, down, up, residual and y; `x` is an array of another launch."""
    gated = "gate_weight" in inputs
    rows, k = inputs["x"].shape
    out, rank = inputs["up"].shape[-2:]
    given = {
        name: Array.of(module, rows_with_gaps(value, gap) if name in ("x", "down", "up", "residual") else value)
        for name, value in inputs.items()
    }
    if x is not None:
        given["x"] = x
    y, t = Array(module, (rows, out + gap), np.uint16), Array(module, (rows, rank), np.uint16)
    call = {name: array.address for name, array in given.items()} | {"y": y.address}
    call |= {"t": t.address} if want_t else {}
    call |= {"x_stride": k + gap, "down_stride": k + gap, "up_stride": rank + gap, "residual_stride": out + gap}
    call |= {"y_stride": out + gap, "t_stride": rank, "rows": rows, "in": k, "rank": rank, "out": out}
    call |= {"dtype": DTYPES[dtype], "multiprocessors": 132}
    call |= {"heads": inputs["up"].shape[0], "up_head_stride": out * (rank + gap)} if gated else {}
    name = "gated_lowrank_linear_sm90" if gated else "lowrank_linear_sm90"
    return Launch(module, name, given, y, t, call | fields)


def run_linear(module, dtype, inputs, *, gap=0, want_t=True, **fields):
    """y and t."""
    launch = prepare_linear(module, dtype, inputs, gap=gap, want_t=want_t, **fields)
    finish(launch)
    y, out = launch.y.read(), launch.call["out"]
    assert np.all(y[:, out:] == 0xFFFF), "a gap between rows of y was written"
    assert want_t or np.all(launch.t.read() == 0xFFFF)
    return y[:, :out], launch.t.read()


def conv_inputs(dtype, batch, size, channels, rank, out, heads=3, kernel=(3, 3), bias=True, residual=None, seed=0):
    """Channels-last inputs; `residual` is the output's (height, width) or None."""
    random = np.random.default_rng(seed)

    def numbers(*shape, scale=1.0):
        return to_bits(random.standard_normal(shape) * scale, dtype)

    window = channels * kernel[0] * kernel[1]
    inputs = {
        "x": numbers(batch, *size, channels) if batch else np.zeros((0, *size, channels), np.uint16),
        "down": numbers(rank, *kernel, channels, scale=window**-0.5),
        "up": numbers(heads, out, rank, scale=rank**-0.5),
        "gate_weight": numbers(heads, rank, scale=4.0),
        "gate_bias": numbers(heads),
    }
    if bias:
        inputs["bias"] = numbers(heads, out)
    if residual:
        inputs["residual"] = numbers(batch, *residual, out)
    return inputs


def out_size(size, kernel, stride, padding, dilation):
    return tuple(
        (s + 2 * p - d * (k - 1) - 1) // st + 1
        for s, k, st, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )


def prepare_conv(
    module, dtype, inputs, *, sm90=False, stride=(1, 1), padding=(0, 0), dilation=(1, 1), want_t=True, x=None, **fields
) -> Launch:
    batch, height, width, channels = inputs["x"].shape
    rank, *kernel, _ = inputs["down"].shape
    heads, out, _ = inputs["up"].shape
    ho, wo = out_size((height, width), kernel, stride, padding, dilation)
    given = {name: Array.of(module, value) for name, value in inputs.items()}
    if x is not None:
        given["x"] = x
    y, t = Array(module, (batch, ho, wo, out), np.uint16), Array(module, (batch, ho, wo, rank), np.uint16)
    call = {name: array.address for name, array in given.items()} | {"y": y.address}
    call |= {"t": t.address} if want_t else {}
    call |= {"batch": batch, "channels": channels, "rank": rank, "out": out, "heads": heads, "height": height}
    call |= {"width": width, "out_height": ho, "out_width": wo, "dtype": DTYPES[dtype], "multiprocessors": 132}
    call |= {"shared_bytes": (227 if sm90 else 163) * 1024}
    for name, pair in {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}.items():
        call |= {f"{name}_height": pair[0], f"{name}_width": pair[1]}
    return Launch(module, "gated_lowrank_conv2d_sm90" if sm90 else "gated_lowrank_conv2d", given, y, t, call | fields)


def run_conv(module, dtype, inputs, *, want_t=True, **options):
    """y [batch, ho, wo, out] and t [batch, ho, wo, rank]; options as for `prepare_conv`."""
    launch = prepare_conv(module, dtype, inputs, want_t=want_t, **options)
    finish(launch)
    assert want_t or np.all(launch.t.read() == 0xFFFF)
    return launch.y.read(), launch.t.read()


def overlapped(module, dtype="bfloat16"):
    """Each kernel behind another one whose output it reads, overlapped: linear, linear, convolutions, linear."""
    first = linear_inputs(dtype, 72, 64, 16, 64)
    second = linear_inputs(dtype, 72, 64, 16, 16, heads=2, seed=1)
    conv = conv_inputs(dtype, 2, (6, 6), 16, 16, 16, kernel=(3, 3))
    last = linear_inputs(dtype, 72, 16, 8, 24, seed=2)
    early = {"after_previous": True, "want_t": False}
    launches = [prepare_linear(module, dtype, first)]
    launches.append(prepare_linear(module, dtype, second, x=launches[-1].y, **early))
    for sm90 in (False, True):
        launches.append(prepare_conv(module, dtype, conv, x=launches[-1].y, sm90=sm90, padding=(1, 1), **early))
    launches.append(prepare_linear(module, dtype, last, x=launches[-1].y, **early))
    return launches, (first, second, conv, conv, last)


def digest(module, seed) -> str:
    """Of what the kernels compute where pipelines wrap, CTAs take several tiles, and kernels overlap."""
    module.configure(seed)
    linear = linear_inputs("bfloat16", 66, 648, 72, 300, heads=2)
    results = list(run_linear(module, "bfloat16", linear, cluster=2))
    conv = conv_inputs("bfloat16", 1, (9, 9), 40, 72, 140, heads=2)
    for sm90, cluster in ((False, 0), (True, 1), (True, 4)):
        results += run_conv(module, "bfloat16", conv, sm90=sm90, cluster=cluster, padding=(1, 1))
    launches, _ = overlapped(module)
    finish(*launches)
    results += [launch.y.read() for launch in launches]
    return hashlib.sha256(b"".join(array.tobytes() for array in results)).hexdigest()
