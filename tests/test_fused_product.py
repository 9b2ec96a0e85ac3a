"""Products by cuBLASLt: the calls that `fused_product.h` makes of it, against a stand-in that computes what is documented.

There is no GPU here, and without one cuBLASLt chooses no algorithm. So this proves orders, transposes, leading dimensions,
epilogues, alignments and the memory of plans; not that cuBLASLt itself is as documented. Seen failing: a transpose, beta or
the epilogue left out, another leading dimension of c, alignments that count the address alone, plans that forget the
alignments or the bias of a call.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from emulation import build
from emulation.build import Array, from_bits, to_bits

if build.missing():
    pytest.skip(build.missing(), allow_module_level=True)

CODES = {"float32": 0, "float16": 1, "bfloat16": 2}  # Dtype of device.h
ACTIVATIONS = {
    0: lambda z: z,
    1: lambda z: np.maximum(z, 0),
    3: lambda z: 0.5 * z * (1 + np.tanh(0.7978845608028654 * (z + 0.044715 * z**3))),
}
EPSILON = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}


@pytest.fixture(scope="module")
def products():
    return build.load("fused_product", ("tests/emulation/bind_fused_product.cpp",))


class Call:
    """Random matrices, `pad` elements between their rows, and the call that multiplies them."""

    def __init__(self, module, dtype, rows, columns, depth, by_depth=False, pad=0, aligned=True, seed=0):
        self.module, self.dtype, self.by_depth = module, dtype, by_depth
        self.random = np.random.default_rng(seed)
        self.sizes = rows, columns, depth
        self.pad, self.aligned = pad, aligned
        self.values, self.arrays = {}, {}
        self.add("a", (depth, rows) if by_depth else (rows, depth))
        self.add("b", (depth, columns) if by_depth else (columns, depth))

    def add(self, name, shape):
        bits = to_bits(self.random.standard_normal(shape), self.dtype)
        self.values[name] = from_bits(bits, self.dtype)
        if len(shape) == 2:
            bits = np.pad(bits, ((0, 0), (0, self.pad)), constant_values=to_bits(np.float32([np.nan]), self.dtype)[0])
        self.arrays[name] = Array.of(self.module, bits, self.aligned)

    def run(self, activation=0, sums=False):
        rows, columns, depth = self.sizes
        kind = np.float32 if self.dtype == "float32" else np.uint16
        d, s = Array(self.module, (rows, columns + self.pad), kind), Array(self.module, (rows,), kind)
        address = {name: self.arrays[name].address if name in self.arrays else 0 for name in ("a", "b", "c", "bias")}
        leading = {
            "ld_a": (rows if self.by_depth else depth) + self.pad,
            "ld_b": (columns if self.by_depth else depth) + self.pad,
            "ld_c": columns + self.pad,
            "ld_d": columns + self.pad,
        }
        sizes = {"rows": rows, "columns": columns, "depth": depth, "dtype": CODES[self.dtype]}
        call = address | leading | sizes | {"d": d.address, "sums": s.address if sums else 0}
        status = self.module.multiply(call | {"activation": activation, "by_depth": int(self.by_depth)})
        return status, from_bits(d.read(), self.dtype)[:, :columns], from_bits(s.read(), self.dtype)

    def expected(self, activation=0):
        a, b = self.values["a"], self.values["b"]
        z = a.T @ b if self.by_depth else a @ b.T
        z = z + self.values.get("bias", 0) + self.values.get("c", 0)
        return ACTIVATIONS[activation](z)


def close(found, expected, dtype):
    np.testing.assert_allclose(found, expected, rtol=EPSILON[dtype], atol=EPSILON[dtype] * np.abs(expected).max())


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_epilogue(products, dtype, activation):
    for bias, residual, (pad, aligned) in itertools.product((0, 1), (0, 1), ((0, True), (3, True), (8, False))):
        call = Call(products, dtype, 5, 7, 16, pad=pad, aligned=aligned, seed=bias + 2 * residual)
        if bias:
            call.add("bias", (7,))
        if residual:
            call.add("c", (5, 7))
        status, d, _ = call.run(activation)
        assert status == 0
        close(d, call.expected(activation), dtype)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("sums", (False, True))
def test_weight_gradients_and_their_sums(products, dtype, sums):
    for rows, columns, depth in ((6, 9, 20), (1, 3, 8), (16, 16, 1)):
        call = Call(products, dtype, rows, columns, depth, by_depth=True, pad=2)
        status, d, s = call.run(sums=sums)
        assert status == 0
        close(d, call.expected(), dtype)
        if sums:
            close(s, call.values["a"].sum(0), dtype)


def test_plans_are_kept_and_see_the_arguments_of_each_call(products):
    """Same sizes, other memory: no search, and the other bias; another alignment of the memory is another plan."""
    first = None
    for seed in range(3):
        call = Call(products, "float32", 4, 6, 24, seed=seed)
        call.add("bias", (6,))
        status, d, _ = call.run()
        assert status == 0
        close(d, call.expected(), "float32")
        searches = products.searches()
        call.run()
        assert products.searches() == searches
        first = first if first is not None else searches
    shifted = Call(products, "float32", 4, 6, 25, seed=9)
    shifted.add("bias", (6,))
    assert shifted.run()[0] == 0 and products.searches() > first


def test_no_algorithm_is_remembered(products):
    call = Call(products, "bfloat16", 3, 11, 40)
    products.refuse(True)
    assert call.run()[0] == -1
    products.refuse(False)
    searches = products.searches()
    assert call.run()[0] == -1 and products.searches() == searches
