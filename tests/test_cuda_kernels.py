"""The CUDA kernels of few-row linear layers, executed on the CPU (tests/emulation), and what the compiler made of them.

Every run uses guarded memory that starts as NaN, a poisoned workspace, and first computes another input into another
output, so that what an earlier launch left cannot stand in for what a barrier should have waited for.

Seen failing: each synchronisation of decode.h removed (the slow test below; only release_next_grid() may go) and a
layer said to be larger than its arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import shutil
import subprocess

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
CODES = {"float32": 0, "float16": 1, "bfloat16": 2}  # Dtype of device.h


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
        unwritten = (
            np.full((layer.rows, layer.pad), -1, np.int32).view(np.float32) if self.kind is np.float32 else 0xFFFF
        )
        np.testing.assert_array_equal(stored[:, layer.out :], unwritten, err_msg="y was written between its rows")
        if "t" in layer.extras.split():
            truth = self.tensors["x"] @ self.tensors["down"].T
            close = torch.from_numpy(from_bits(t.read(), self.dtype)) - truth
            allowed = 2 * torch.finfo(DTYPES[self.dtype]).eps * (truth.abs() + 1) + 4e-6  # float32 sums of 4,300
            assert bool((close.abs() <= allowed).all())
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
# More steps than slots in the first launch as well: the second time round.
LONG = [Layer(9, 1200, 512, 8, extras=""), Layer(2, 4300, 512, 16, heads=2, extras="bias t")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_decode_is_right_under_every_schedule(decode, layer, dtype):
    check(decode, layer, dtype, [0, 1, 2 + LAYERS.index(layer)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LONG, ids=str)
def test_decode_of_long_layers(decode, layer, dtype):
    check(decode, layer, dtype, [0, 1, 4])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(2, 14))
def test_decode_of_random_layers(decode, seed, dtype):
    random = np.random.default_rng(seed)
    pick = lambda *values: int(random.choice(values))  # noqa: E731
    extras = " ".join(name for name in ("bias", "residual", "gate_bias", "t") if random.integers(2))
    activation = list(ACTIVATION_CODES)[random.integers(5)]
    sizes = (
        pick(1, 2, 7, 8, 9, 15, 16),
        int(random.integers(1, 700)),
        pick(1, 4, 8, 33, 64, 100),
        pick(1, 8, 31, 64, 65),
    )
    heads, pad, aligned = pick(0, 1, 2, 5, 16), pick(0, 1, 8), bool(random.integers(4))
    check(decode, Layer(*sizes, heads, extras, activation, pad, aligned), dtype, range(seed, seed + 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [Layer(16, 320, 24, 40), Layer(16, 65, 17, 33, heads=3)], ids=str)
def test_a_row_does_not_depend_on_the_others(decode, layer, dtype):
    """Bit for bit, also where another row holds infinities or NaN."""
    tensors = layer.tensors(dtype, 0)
    whole = Run(decode, layer, dtype, tensors).result(0)
    for rows in (slice(0, 1), slice(7, 12)):
        part = {name: v[rows] if name in ("x", "residual") else v for name, v in tensors.items()}
        fewer = dataclasses.replace(layer, rows=len(part["x"]))
        np.testing.assert_array_equal(Run(decode, fewer, dtype, part).result(2), whole[rows])
    tensors["x"][3, 5], tensors["x"][12, 0] = np.inf, np.nan
    layer = dataclasses.replace(layer, extras="bias residual gate_bias")
    spoiled = Run(decode, layer, dtype, tensors).result(0)
    others = [row for row in range(16) if row not in (3, 12)]
    np.testing.assert_array_equal(spoiled[others], whole[others])
    assert np.isnan(from_bits(spoiled[12], dtype)).all()
    plain = definition(layer, {name: value.to(DTYPES[dtype]) for name, value in tensors.items()})[3].double().numpy()
    np.testing.assert_array_equal(np.isfinite(from_bits(spoiled[3], dtype)), np.isfinite(plain))
    np.testing.assert_array_equal(np.isnan(from_bits(spoiled[3], dtype)), np.isnan(plain))


def test_what_is_not_supported_is_refused(decode):
    fine = {"rows": 16, "in": 64, "rank": 512, "out": 8, "heads": 1, "dtype": 0, "activation": 4}
    zeros = ["x", "down", "up", "gate_weight", "gate_bias", "bias", "residual", "y", "t", "workspace"]
    fine |= dict.fromkeys([*zeros, "ld_x", "ld_residual", "ld_y"], 0)
    assert decode.lowrank_linear_workspace(fine) > 0
    for change in ({"rows": 17}, {"rank": 0}, {"rank": 513}, {"heads": 2}, {"dtype": 3}, {"activation": 5}, {"in": -1}):
        assert decode.lowrank_linear_workspace(fine | change) == 0
        assert decode.lowrank_linear(fine | change | {"workspace": 16}) != 0
    gated = fine | {"gate_weight": 16, "heads": 16}
    assert decode.gated_lowrank_linear_workspace(gated) > 0
    assert decode.gated_lowrank_linear_workspace(gated | {"heads": 17}) == 0
    assert decode.gated_lowrank_linear_workspace(gated | {"gate_weight": 0}) == 0
    assert decode.lowrank_linear(fine | {"rows": 0}) == 0
    assert decode.lowrank_linear(fine | {"out": 0, "workspace": 16}) == 0
    decode.synchronize()


def test_a_read_past_an_array_is_caught(decode):
    """That the guard pages guard: a layer said to be one row longer than its arrays."""
    layer = Layer(4, 64, 8, 40)
    run = Run(decode, layer, "bfloat16", layer.tensors("bfloat16", 0))
    run.layer = dataclasses.replace(layer, out=48)
    decode.configure(0, True)
    kept = run.launch()
    with pytest.raises(RuntimeError, match="memory access outside every array"):
        decode.synchronize()
    del kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, rank, heads, more, pad, aligned",
    [
        (11, 64, 4, 4, 0, True),
        (1, 8, 1, 0, 8, True),
        (9, 264, 3, 5, 8, True),
        (3, 7, 2, 6, 1, True),
        (2, 16, 8, 48, 0, False),
    ],
)
def test_scaling_by_the_gate(decode, rows, rank, heads, more, pad, aligned, dtype):
    """[g_1 t … g_H t], then the gates and zeros; rows apart and unaligned, and one of NaN that spoils no other."""
    random = np.random.default_rng(rank)
    bits = [to_bits(random.standard_normal(shape), dtype) for shape in ((rows, rank), (heads, rank), (heads,))]
    t, weight, bias = (torch.from_numpy(from_bits(value, dtype)) for value in bits)
    padded = np.pad(bits[0], ((0, 0), (0, pad)), constant_values=to_bits(np.float32([np.nan]), dtype)[0])
    given = [Array.of(decode, value, aligned) for value in (padded, *bits[1:])]
    columns = heads * rank + more
    out = Array(decode, (rows, columns), np.float32 if dtype == "float32" else np.uint16, aligned)
    call = dict(zip(("t", "gate_weight", "gate_bias"), (array.address for array in given), strict=True))
    call |= {"out": out.address, "rows": rows, "rank": rank, "heads": heads, "columns": columns, "ld_t": rank + pad}
    decode.configure(rows, True)
    assert decode.scale_by_gate(call | {"dtype": CODES[dtype]}) == 0
    decode.synchronize()
    gates = torch.softmax(t @ weight.T + bias, -1)
    expected = torch.cat([(gates[:, :, None] * t[:, None]).flatten(1), gates, t.new_zeros(rows, more)], 1)[:, :columns]
    found = torch.from_numpy(from_bits(out.read(), dtype))
    epsilon = torch.finfo(DTYPES[dtype]).eps
    assert bool(((found - expected).abs() <= epsilon * expected.abs() + 16 * torch.finfo(torch.float32).eps).all())
    for change in ({"columns": columns - heads * rank + 1}, {"heads": 9}, {"rank": 0}):
        assert decode.scale_by_gate(call | {"dtype": CODES[dtype]} | change) != 0


SANITIZED = """
from test_cuda_kernels import Layer, check
for layer, dtype in [(Layer(9, 520, 16, 35), "bfloat16"), (Layer(3, 65, 17, 33, heads=3), "float32")]:
    check(module, layer, dtype, [0, 4])
"""


@pytest.mark.slow  # half a minute
def test_the_sanitizer_finds_no_race():
    done = build.run_sanitized(build.build("decode", SOURCES, sanitize=True), SANITIZED)
    assert done.returncode == 0, done.stderr[-3000:]


# Every synchronisation of the kernels, and what may survive its removal.
HEADER = "csrc/include/inherit_kernels/cuda/decode.h"
WORDS = r"^ *(__syncthreads|__syncwarp|wait_copies<.*?>|commit_copies|wait_previous_grid|release_next_grid)\(\);\n"
JUSTIFIED = {"release_next_grid": "lets the next grid start early: speed only"}


def statements() -> list[tuple[int, str]]:
    text = (build.ROOT / HEADER).read_text()
    return [(match.start(), match.group(1)) for match in re.finditer(WORDS, text, re.MULTILINE)]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(statements())))
def test_every_synchronisation_is_needed(number):
    start, word = statements()[number]
    text = (build.ROOT / HEADER).read_text()
    end = text.index("\n", start) + 1
    module = build.load("decode", SOURCES, replace=(HEADER, text[:start] + text[end:]))
    layers = [Layer(16, 136, 40, 35, heads=4), Layer(3, 65, 17, 33), LONG[0]]
    caught = None
    for layer, dtype, seed in itertools.product(layers, ("float32", "bfloat16"), range(4)):
        try:
            check(module, layer, dtype, [seed])
        except (AssertionError, RuntimeError) as problem:
            caught = problem
            break
    if word in JUSTIFIED:
        assert caught is None, f"{word} is said to be for speed only"
    else:
        assert caught is not None, f"{word}, line {text[:start].count(chr(10)) + 1}, was removed and nothing failed"


def nvcc_or_skip() -> str:
    for nvcc in ("/usr/local/cuda/bin/nvcc", shutil.which("nvcc")):
        if nvcc and shutil.which(nvcc):
            return nvcc
    pytest.skip("no CUDA kernel was compiled for a GPU: no nvcc on this machine")


@functools.cache
def resources(nvcc: str, source: str) -> list[tuple[str, int, int, int]]:
    """(kernel with its architecture, registers, bytes of stack, bytes spilled), with every warning an error."""
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra", "-Werror", "all-warnings"]
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ("80", "90a")]
    target = build.FOLDER / f"{source}.o"
    build.FOLDER.mkdir(parents=True, exist_ok=True)
    command = [nvcc, *flags, *architectures, f"-I{build.ROOT / 'csrc/include'}"]
    command += ["-c", str(build.ROOT / "csrc" / "cuda" / source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, done.stderr, re.DOTALL)
    return [(f"{arch} {name}", int(registers), int(stack), int(spill)) for name, arch, stack, spill, registers in found]


@pytest.mark.parametrize(
    "source, kernels", [("lowrank_linear.cu", 12), pytest.param("gated_lowrank_linear.cu", 18, marks=pytest.mark.slow)]
)
def test_no_kernel_spills_and_two_blocks_fit_an_sm(source, kernels):
    report = resources(nvcc_or_skip(), source)
    assert len(report) == 2 * kernels
    for name, registers, stack, spill in report:
        print(f"{registers:4} registers {name}")
        assert stack == 0 and spill == 0, name
        assert registers <= 128, name  # 256 threads: a block of the second launch fits beside one of the first


def test_shared_memory_fits_every_architecture(decode):
    """The largest layers ask for at most the 99 KB that a block may have on the smallest supported GPU."""
    for layer, dtype in itertools.product([Layer(16, 640, 512, 8), Layer(16, 640, 512, 8, heads=16)], DTYPES):
        run = Run(decode, layer, dtype, layer.tensors(dtype, 0))
        decode.configure(0, True)
        kept = run.launch()
        assert 0 < decode.discard() <= 99 * 1024
        del kept
