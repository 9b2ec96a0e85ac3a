"""The CUDA kernels of few-row linear layers, executed on the CPU (tests/emulation), and what the compiler made of them.

Every run uses guarded memory that starts as NaN, a poisoned workspace, and first computes another input into another
output, so that what an earlier launch left cannot stand in for what a barrier should have waited for.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from emulation import build
from emulation.build import Array, from_bits, to_bits
from inherit_kernels.common.activation import ACTIVATION_CODES, activate
from inherit_kernels.testing.accuracy import assert_within

if build.missing():
    pytest.skip(build.missing(), allow_module_level=True)

SOURCES = ("csrc/cuda/lowrank_linear.cu", "csrc/cuda/gated_lowrank_linear.cu", "tests/emulation/bind_decode.cpp")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = dict(zip(DTYPES, range(3), strict=True))


@dataclasses.dataclass(frozen=True)
class Layer:
    rows: int
    depth: int
    rank: int
    out: int
    heads: int = 0  # 0: plain
    extras: str = "bias residual gate_bias t"
    activation: str | None = None
    pad: int = 0  # elements between rows of x, residual and y
    aligned: bool = True

    @property
    def op(self) -> str:
        return "gated_lowrank_linear" if self.heads else "lowrank_linear"

    def tensors(self, dtype: str, seed: int) -> dict[str, torch.Tensor]:
        """Random values of the dtype, as float64."""
        heads = max(self.heads, 1)
        scale = max(self.depth, 1) ** -0.5
        shapes = {
            "x": ((self.rows, self.depth), 1.0),
            "down": ((self.rank, self.depth), scale),
            "up": ((heads, self.out, self.rank), self.rank**-0.5),
            "gate_weight": ((self.heads, self.rank), 0.5),
            "gate_bias": ((self.heads,), 1.0),
            "bias": ((heads, self.out), 1.0),
            "residual": ((self.rows, self.out), 1.0),
        }
        random = np.random.default_rng(seed)
        values = {name: random.standard_normal(shape) * scale for name, (shape, scale) in shapes.items()}
        return {name: torch.from_numpy(from_bits(to_bits(value, dtype), dtype)) for name, value in values.items()}


def definition(layer: Layer, a: dict[str, torch.Tensor]) -> torch.Tensor:
    """y in the dtype of the tensors, one torch expression."""
    t = a["x"] @ a["down"].T
    z = torch.einsum("mr,hnr->mhn", t, a["up"]) + (a["bias"] if "bias" in layer.extras.split() else 0)
    if layer.heads:
        logits = t @ a["gate_weight"].T + (a["gate_bias"] if "gate_bias" in layer.extras else 0)
        gates = torch.softmax(logits.to(torch.promote_types(t.dtype, torch.float32)), -1).to(t.dtype)
        z = (gates[:, :, None] * z).sum(1)
    else:
        z = z[:, 0]
    return activate(z + (a["residual"] if "residual" in layer.extras else 0), layer.activation)


class Run:
    """One layer's arrays beside the emulation, and its launches."""

    def __init__(self, module, layer: Layer, dtype: str, tensors: dict[str, torch.Tensor]):
        self.module, self.layer, self.dtype = module, layer, dtype
        self.tensors = tensors
        self.kind = np.float32 if dtype == "float32" else np.uint16
        self.given = {name: self._array(name, value) for name, value in tensors.items() if self._present(name)}

    def _present(self, name: str) -> bool:
        if name in ("gate_weight", "gate_bias") and not self.layer.heads:
            return False
        return name in ("x", "down", "up", "gate_weight") or name in self.layer.extras.split()

    def _array(self, name: str, value: torch.Tensor) -> Array:
        values = value.numpy()
        if name in ("x", "residual") and self.layer.pad:  # rows further apart, NaN between them
            values = np.pad(values, ((0, 0), (0, self.layer.pad)), constant_values=np.nan)
        return Array.of(self.module, to_bits(values, self.dtype), self.layer.aligned)

    def launch(self, sign: int = 1) -> tuple[Array, Array, Array]:
        """Enqueues the layer on sign·x; y, t and the workspace, written by synchronize()."""
        layer, pad = self.layer, self.layer.pad
        x = self.given["x"]
        if sign < 0:
            x = self._array("x", -self.tensors["x"])
        call = {name: self.given[name].address if name in self.given else 0 for name in self.tensors} | {"x": x.address}
        call |= {"rows": layer.rows, "in": layer.depth, "rank": layer.rank, "out": layer.out}
        call |= {"ld_x": layer.depth + pad, "ld_residual": layer.out + pad, "ld_y": layer.out + pad}
        call |= {"heads": max(layer.heads, 1), "dtype": CODES[self.dtype]}
        call |= {"activation": ACTIVATION_CODES[layer.activation]}
        y = Array(self.module, (layer.rows, layer.out + pad), self.kind, layer.aligned)
        t = Array(self.module, (layer.rows, layer.rank), self.kind, layer.aligned)
        call |= {"y": y.address, "t": t.address if "t" in layer.extras.split() else 0, "workspace": 0}
        size = getattr(self.module, f"{layer.op}_workspace")(call)
        assert size > 0
        workspace = Array(self.module, (size,), np.uint8)
        self.x = x  # both launches of a run read after this function has returned
        assert getattr(self.module, layer.op)(call | {"workspace": workspace.address}) == 0
        return y, t, (workspace, x)

    def result(self, seed: int, overlap: bool = True) -> np.ndarray:
        """y, bits as stored, after a run on −x; checks what may not have changed and what must have."""
        layer = self.layer
        before = {name: array.read() for name, array in self.given.items()}
        self.module.configure(seed, overlap)
        other = self.launch(-1)
        y, t, kept = self.launch()
        self.module.synchronize()
        del other, kept
        for name, array in self.given.items():
            np.testing.assert_array_equal(array.read(), before[name], err_msg=f"{name} was changed")
        stored = y.read()
        unwritten = np.full((layer.rows, layer.pad), -1, np.int32).view(np.float32) if self.kind is np.float32 else 0xFFFF
        np.testing.assert_array_equal(stored[:, layer.out :], unwritten, err_msg="y was written between its rows")
        if "t" in layer.extras.split():
            truth = self.tensors["x"] @ self.tensors["down"].T
            close = torch.from_numpy(from_bits(t.read(), self.dtype)) - truth
            assert bool((close.abs() <= 2 * torch.finfo(DTYPES[self.dtype]).eps * (truth.abs() + 1)).all())
        return stored[:, : layer.out]


def check(module, layer: Layer, dtype: str, seeds, tensor_seed: int = 0) -> None:
    """Every schedule gives the same bits, and they keep the rule of accuracy."""
    run = Run(module, layer, dtype, layer.tensors(dtype, tensor_seed))
    first, *others = [run.result(seed, overlap=seed % 4 != 3) for seed in seeds]
    for other in others:
        np.testing.assert_array_equal(first, other)
    truth = definition(layer, run.tensors)
    plain = definition(layer, {name: value.to(DTYPES[dtype]) for name, value in run.tensors.items()})
    epsilon = torch.finfo(DTYPES[dtype]).eps
    generator = torch.Generator().manual_seed(1)

    def perturbed() -> torch.Tensor:
        signs = {n: torch.randint(0, 2, v.shape, generator=generator) * 2 - 1 for n, v in run.tensors.items()}
        return definition(layer, {name: v * (1 + epsilon * signs[name]) for name, v in run.tensors.items()})

    y = torch.from_numpy(from_bits(first, dtype))
    assert_within(f"{layer} {dtype}", y, truth, plain.double(), [perturbed() for _ in range(4)], 2, epsilon)


@pytest.fixture(scope="module")
def decode():
    return build.load("decode", SOURCES)


LAYERS = [
    Layer(1, 64, 8, 40),
    Layer(3, 320, 24, 33, activation="relu"),
    Layer(16, 136, 40, 72, activation="gelu"),
    Layer(9, 65, 63, 31, activation="silu", pad=3),
    Layer(5, 1, 1, 1, extras=""),
    Layer(2, 0, 3, 5, extras="bias"),
    Layer(8, 1100, 16, 8, extras="residual", pad=8),
    Layer(4, 64, 16, 40, aligned=False, activation="gelu_tanh"),
    Layer(1, 64, 512, 16, extras=""),
    Layer(1, 64, 8, 40, heads=3),
    Layer(16, 136, 40, 35, heads=4, activation="gelu_tanh", pad=8),
    Layer(7, 63, 65, 33, heads=2, activation="relu"),
    Layer(11, 320, 17, 64, heads=16, extras="bias", activation="silu"),
    Layer(2, 96, 24, 9, heads=1, extras="t", pad=1),
    Layer(3, 40, 512, 8, heads=16, extras="gate_bias"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_decode_is_right_under_every_schedule(decode, layer, dtype):
    check(decode, layer, dtype, [0, 1, 2 + LAYERS.index(layer)])
