"""The native CPU operators, called directly, against float64; the rule of accuracy is the project's one.

The whole file runs again in a process per instruction set (INHERIT_KERNELS_CPU_ISA is read once per process), and the
kernels run without torch under the address and undefined-behaviour sanitizers.

Seen failing, each by one edit of csrc: the depth tail of a dot product dropped, bias added twice, one head's gate taken
for another's, `relu` written as `x > 0 ? x : 0` (NaN lost), a chunk's sums overwriting the previous chunk's, the last
column of a ragged panel not stored, a residual read with y's strides, a softmax with another row's maximum, a
window reaching one pixel past the image's edge, every block of positions taken for the first, a strided gradient with
the wrong dilation, a run of a sum not added to the last, a read one element past a row (sanitizer).
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from inherit_kernels import _native
from inherit_kernels.common.conv import first_stage, memory_format_of, output_size
from inherit_kernels.registry import OPS
from inherit_kernels.testing.accuracy import assert_within

if not _native.load():
    pytest.skip(f"no native operator was tested: {_native.error}", allow_module_level=True)

ROOT = Path(__file__).parent.parent
CHILD = "INHERIT_KERNELS_TEST_CHILD" in os.environ  # this process tests one instruction set of the others
ops = _native.ops
DTYPES = [torch.float32, torch.bfloat16]


def gelu_tanh(z):
    if z.dtype == torch.float64:  # 1 + tanh(u) is 0 below -6 in float64 too; this form keeps its digits
        return z * torch.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z**3))
    return F.gelu(z, approximate="tanh")


ACTIVATIONS = [lambda z: z, torch.relu, F.gelu, gelu_tanh, F.silu]
ROWS = [0, 1, 3, 8, 9, 48, 63, 65, 130, 600]  # ways change after 8 and 48, the chunk of the backward ends at 512
SIZES = [(63, 5, 65, 2), (1, 1, 1, 1), (200, 33, 130, 4), (256, 64, 100, 3), (17, 200, 31, 3)]  # K, R, N, H
if CHILD:
    ROWS, SIZES = [0, 1, 3, 9, 65, 600], SIZES[:3]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def strided(tensor):
    """The same values, last dimension first in memory and every element two apart."""
    if tensor is None or tensor.dim() == 0:
        return tensor
    order = [tensor.dim() - 1, *range(tensor.dim() - 1)]
    moved = tensor.permute(order)
    store = torch.full((*moved.shape, 2), torch.nan, dtype=tensor.dtype)
    store[..., 0] = moved
    return store[..., 0].permute([*range(1, tensor.dim()), 0])


def linear(x, down, up, gate_weight, gate_bias, bias, residual, activation=0):
    """The definition, plain where there is no gate; the heads merged, as torch users would write it."""
    t = x @ down.mT
    if gate_weight is None:
        y = t @ up.mT
    else:
        g = torch.softmax(F.linear(t, gate_weight, gate_bias), -1)
        y = torch.einsum("...h,...r->...hr", g, t).flatten(-2) @ up.permute(0, 2, 1).flatten(0, 1)
        bias = None if bias is None else g @ bias
    y = y if bias is None else y + bias
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def conv(x, down, up, gate_weight, gate_bias, bias, residual, geometry, activation=0):
    """The definition, plain where there is no gate; the heads merged."""
    t = first_stage(x, down, *geometry)
    if gate_weight is None:
        y = torch.einsum("nr,brij->bnij", up, t)
        y = y if bias is None else y + bias[:, None, None]
    else:
        g = torch.softmax(F.linear(t.mean((2, 3)), gate_weight, gate_bias), -1)
        y = torch.einsum("bnr,brij->bnij", torch.einsum("bh,hnr->bnr", g, up), t)
        y = y if bias is None else y + (g @ bias)[:, :, None, None]
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def gradients(function, tensors, dz):
    leaves = [None if v is None else v.detach().requires_grad_() for v in tensors]
    return torch.autograd.grad(function(*leaves), [v for v in leaves if v is not None], dz)


def evaluate(function, tensors, dz):
    return [function(*tensors)] if dz is None else gradients(function, tensors, dz)


def check(what, got, function, tensors, dz=None):
    """Holds `got` (the value of `function`, or its gradients if dz is given) to the accuracy rule."""
    dtype = next(v.dtype for v in tensors if v is not None)
    epsilon = torch.finfo(dtype).eps

    def moved(v):
        return None if v is None else v.double() * (1 + epsilon * (torch.randint(0, 2, v.shape) * 2 - 1))

    wide = [None if v is None else v.double() for v in tensors]
    truth = evaluate(function, wide, None if dz is None else dz.double())
    plain = evaluate(function, tensors, dz)
    perturbed = [evaluate(function, [moved(v) for v in tensors], moved(dz)) for _ in range(4)]
    assert len(got) == len(truth)
    for i, result in enumerate(got):
        assert result.dtype == dtype
        assert_within(
            f"{what} [{i}]", result, truth[i], plain[i], [p[i] for p in perturbed], 2 if dz is None else 3, epsilon
        )


def linear_inputs(rows, sizes, dtype, gated, full):
    k, r, n, h = sizes
    up = (h, n, r) if gated else (n, r)
    x = random(rows, k, dtype=dtype)
    down, up = random(r, k, dtype=dtype, scale=k**-0.5), random(*up, dtype=dtype, scale=r**-0.5)
    gate_weight = random(h, r, dtype=dtype, scale=r**-0.5) if gated else None
    gate_bias = random(h, dtype=dtype) if gated and full else None
    bias = random(*((h, n) if gated else (n,)), dtype=dtype) if full else None
    return [x, down, up, gate_weight, gate_bias, bias, random(rows, n, dtype=dtype) if full else None]


def forward(inputs, activation=0, saving=False):
    x, down, up, gate_weight, gate_bias, bias, residual = inputs
    suffix = "_saving" if saving else ""
    if gate_weight is None:
        return getattr(ops, f"lowrank_linear{suffix}")(x, down, up, bias, residual, activation)
    op = getattr(ops, f"gated_lowrank_linear{suffix}")
    return op(x, down, up, gate_weight, gate_bias, bias, residual, activation)


def forward_packed(inputs, activation=0):
    x, down, up, gate_weight, gate_bias, bias, residual = inputs
    r, n = down.shape[0], up.shape[-2]
    panels, biased = (ops.pack_panels(down), ops.pack_panels(up, bias)), bias is not None
    if gate_weight is None:
        return ops.lowrank_linear_packed(x, *panels, r, n, biased, residual, activation)
    return ops.gated_lowrank_linear_packed(x, *panels, r, n, gate_weight, gate_bias, biased, residual, activation)


def backward(dz, t, inputs, needs=None):
    x, down, up, gate_weight, gate_bias, bias, _ = inputs
    if gate_weight is None:
        return ops.lowrank_linear_backward(dz, x, t, down, up, *(needs or [True] * 4))
    return ops.gated_lowrank_linear_backward(dz, x, t, down, up, gate_weight, gate_bias, bias, *(needs or [True] * 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("sizes", SIZES)
def test_linear_forward(sizes, gated, dtype):
    for i, rows in enumerate(ROWS):
        for full in (False, True):
            inputs = linear_inputs(rows, sizes, dtype, gated, full)
            before = [None if v is None else v.clone() for v in inputs]
            for activation in range(5) if full else (i % 5,):
                what = f"rows {rows} activation {activation} full {full}"
                check(what, [forward(inputs, activation)], lambda *v, a=activation: linear(*v, a), inputs)
                check(what, [forward_packed(inputs, activation)], lambda *v, a=activation: linear(*v, a), inputs)
            y, t = forward(inputs, 0, saving=True)
            check("y saving", [y], linear, inputs)
            check("t", [t], lambda x, down: x @ down.mT, inputs[:2])
            assert all(v is None or torch.equal(v, b) for v, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("sizes", SIZES)
def test_linear_backward(sizes, gated, dtype):
    for rows in ROWS:
        for full in (False, True):
            inputs = linear_inputs(rows, sizes, dtype, gated, full)
            dz = random(rows, sizes[2], dtype=dtype)
            _, t = forward(inputs, 0, saving=True)
            got = backward(dz, t, inputs)
            given = [inputs[i] is not None for i in ((0, 1, 2, 3, 4, 5) if gated else (0, 1, 2, 5))]
            got = [v for v, there in zip(got, given, strict=True) if there]
            check(f"rows {rows} full {full}", got, linear, [*inputs[:6], None], dz)


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("rows", (3, 20, 100))
def test_linear_strides_and_ranks(rows, gated):
    inputs = linear_inputs(rows, (63, 5, 65, 3), torch.float32, gated, True)
    odd = [strided(v) for v in inputs]
    assert not odd[0].is_contiguous() and not odd[-1].is_contiguous()
    check("strided", [forward(odd, 2)], lambda *v: linear(*v, 2), inputs)
    check("strided packed", [forward_packed(odd, 2)], lambda *v: linear(*v, 2), inputs)
    _, t = forward(inputs, saving=True)
    dz = random(rows, 65)
    check("strided backward", backward(strided(dz), strided(t), odd), linear, [*inputs[:6], None], dz)
    expanded = [inputs[0][:1].expand(rows, -1), *inputs[1:]]
    check("expanded", [forward(expanded)], linear, expanded)
    for shape in ((rows, 1), (1, rows), (2, rows // 2) if rows % 2 == 0 else (1, 1, rows)):
        reshaped = [inputs[0].view(*shape, 63), *inputs[1:6], inputs[6].view(*shape, 65)]
        turned = [strided(v) if i in (0, 6) else v for i, v in enumerate(reshaped)]
        for y in (forward(reshaped), forward(turned)):
            assert y.shape == (*shape, 65) and y.is_contiguous()
            check("ranks", [y.view(rows, 65)], linear, inputs)
    vector = [inputs[0][0], *inputs[1:6], inputs[6][0]]
    check("rank 1", [forward(vector)[None]], linear, [vector[0][None], *vector[1:6], vector[6][None]])


@pytest.mark.parametrize("gated", (False, True))
def test_only_the_needed_gradients_are_returned(gated):
    inputs = linear_inputs(70, (33, 7, 21, 2), torch.float32, gated, True)
    dz = random(70, 21)
    _, t = forward(inputs, saving=True)
    every = backward(dz, t, inputs)
    for i in range(len(every)):
        one = backward(dz, t, inputs, [j == i for j in range(len(every))])
        for j, v in enumerate(one):
            assert torch.equal(v, every[j]) if i == j else v.shape == (0,)


# B, C, (Hi, Wi), R, N, H, kernel, (stride, padding, dilation)
CONVOLUTIONS = [
    (2, 1, (1, 1), 1, 1, 1, (1, 1), ((1, 1), (0, 0), (1, 1))),
    (3, 16, (8, 8), 16, 33, 3, (3, 3), ((1, 1), (1, 1), (1, 1))),
    (1, 5, (23, 29), 33, 65, 4, (3, 2), ((2, 1), (1, 0), (1, 2))),
    (2, 70, (12, 9), 7, 16, 2, (5, 3), ((1, 2), (2, 1), (2, 1))),
    (2, 300, (5, 5), 20, 9, 3, (1, 1), ((2, 2), (0, 0), (1, 1))),
    (0, 3, (5, 5), 4, 6, 2, (3, 3), ((1, 1), (1, 1), (1, 1))),
    (2, 3, (17, 18), 8, 300, 3, (7, 7), ((2, 2), (3, 3), (1, 1))),
]
FORMATS = (torch.contiguous_format, torch.channels_last)


def conv_inputs(sizes, dtype, gated, full):
    b, c, size, r, n, h, kernel, geometry = sizes
    positions = output_size(size, kernel, *geometry)
    heads = (h,) if gated else ()
    return [
        random(b, c, *size, dtype=dtype),
        random(r, c, *kernel, dtype=dtype, scale=(c * kernel[0] * kernel[1]) ** -0.5),
        random(*heads, n, r, dtype=dtype, scale=r**-0.5),
        random(h, r, dtype=dtype, scale=2.0) if gated else None,
        random(h, dtype=dtype) if gated and full else None,
        random(*heads, n, dtype=dtype) if full else None,
        random(b, n, *positions, dtype=dtype) if full else None,
    ]


def conv_call(inputs, geometry, activation=0, form=""):
    """The native op; `form` is "", "_saving" or "_packed"."""
    x, down, up, gate_weight, gate_bias, bias, residual = inputs
    op = getattr(ops, ("lowrank_conv2d" if gate_weight is None else "gated_lowrank_conv2d") + form)
    gate = () if gate_weight is None else (gate_weight, gate_bias)
    weights = (down, up)
    if form == "_packed":
        weights = (*ops.pack_conv2d(down, up), down.shape[0], up.shape[-2], *down.shape[2:])
    return op(x, *weights, *gate, bias, residual, *(i for pair in geometry for i in pair), activation)


def conv_backward(dz, t, inputs, geometry, needs=None):
    x, down, up, gate_weight, gate_bias, bias, _ = inputs
    numbers = [i for pair in geometry for i in pair]
    if gate_weight is None:
        return ops.lowrank_conv2d_backward(dz, x, t, down, up, *numbers, *(needs or [True] * 4))
    weights = (down, up, gate_weight, gate_bias, bias)
    return ops.gated_lowrank_conv2d_backward(dz, x, t, *weights, *numbers, *(needs or [True] * 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", (False, True))
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("sizes", CONVOLUTIONS)
def test_convolution(sizes, gated, full, dtype):
    geometry = sizes[-1]
    inputs = conv_inputs(sizes, dtype, gated, full)
    for form in FORMATS:
        laid = [v.contiguous(memory_format=form) if v is not None and v.dim() == 4 else v for v in inputs]
        for activation in range(5) if full else (0,):
            for kind in ("", "_packed"):
                y = conv_call(laid, geometry, activation, kind)
                check(f"conv{kind}", [y], lambda *v, a=activation: conv(*v, geometry, a), inputs)
                assert y.is_contiguous(memory_format=memory_format_of(laid[0]))
        odd = [strided(v) for v in laid]
        check("conv strided", [conv_call(odd, geometry, 2)], lambda *v: conv(*v, geometry, 2), inputs)
        y, t = conv_call(laid, geometry, 0, "_saving")
        check("conv saving", [y], lambda *v: conv(*v, geometry), inputs)
        check("conv t", [t], lambda x, down: first_stage(x, down, *geometry), inputs[:2])
        assert t.stride() == first_stage(*laid[:2], *geometry).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", (False, True))
@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("sizes", CONVOLUTIONS)
def test_convolution_backward(sizes, gated, full, dtype):
    geometry = sizes[-1]
    inputs = conv_inputs(sizes, dtype, gated, full)
    _, t = conv_call(inputs, geometry, 0, "_saving")
    dz = random(t.shape[0], inputs[2].shape[-2], *t.shape[2:], dtype=dtype)
    given = [inputs[i] is not None for i in ((0, 1, 2, 3, 4, 5) if gated else (0, 1, 2, 5))]
    for form in (*FORMATS, None):
        laid = [strided(v) if form is None else v for v in inputs]
        laid = [v.contiguous(memory_format=form) if form and v is not None and v.dim() == 4 else v for v in laid]
        got = conv_backward(strided(dz) if form is None else dz.contiguous(memory_format=form), t, laid, geometry)
        got = [v for v, there in zip(got, given, strict=True) if there]
        if dz.numel() > 0:
            check("conv backward", got, lambda *v: conv(*v, None, geometry), inputs[:6], dz)
        else:
            assert all(not bool(v.any()) for v in got)
        if form:
            assert got[0].is_contiguous(memory_format=memory_format_of(laid[0]))
    every = conv_backward(dz, t, inputs, geometry)
    for i in range(len(every)):
        one = conv_backward(dz, t, inputs, geometry, [j == i and given[j] for j in range(len(every))])
        for j, v in enumerate(one):
            assert torch.equal(v, every[j]) if i == j and given[j] else v.shape == (0,)


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("form", FORMATS)
def test_convolution_keeps_nan_and_infinity_where_they_belong(form, gated):
    sizes = (3, 5, (9, 9), 4, 6, 2, (3, 3), ((1, 1), (1, 1), (1, 1)))
    inputs = conv_inputs(sizes, torch.float32, gated, True)
    inputs[0] = inputs[0].contiguous(memory_format=form)
    clean = conv_call(inputs, sizes[-1])
    for value in (math.nan, math.inf):
        spoiled = [inputs[0].clone(memory_format=torch.preserve_format), *inputs[1:]]
        spoiled[0][1, 2, 4, 4] = value
        y = conv_call(spoiled, sizes[-1])
        assert torch.equal(y[[0, 2]], clean[[0, 2]])
        touched = torch.zeros(9, 9, dtype=torch.bool)
        touched[3:6, 3:6] = True
        assert not bool(y[1][:, touched].isfinite().any())
        assert gated == (not bool(y[1][:, ~touched].isfinite().any()))  # the gate's mean sees every position
        assert gated or torch.equal(y[1][:, ~touched], clean[1][:, ~touched])


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", ((4, 4), (23, 17)))
def test_convolution_repeats_and_does_not_depend_on_neighbours(size, form, gated):
    sizes = (40, 32, size, 7, 40, 3, (3, 3), ((1, 1), (1, 1), (1, 1)))
    inputs = conv_inputs(sizes, torch.float32, gated, True)
    inputs[0], inputs[6] = (inputs[i].contiguous(memory_format=form) for i in (0, 6))
    y, t = conv_call(inputs, sizes[-1], 0, "_saving")
    dz = random(*y.shape)
    first = [y, t, *conv_backward(dz, t, inputs, sizes[-1])]
    again = [*conv_call(inputs, sizes[-1], 0, "_saving"), *conv_backward(dz, t, inputs, sizes[-1])]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    order = torch.randperm(40)[:17]
    some = [inputs[0][order].contiguous(memory_format=form), *inputs[1:6], inputs[6][order]]
    assert torch.equal(conv_call(some, sizes[-1]), y[order])
    assert torch.equal(conv_backward(dz[order], t[order], some, sizes[-1])[0], first[2][order])


@pytest.mark.parametrize("rows", (2, 30, 100))
@pytest.mark.parametrize("activation", range(5))
def test_nan_and_infinities_propagate_as_in_torch(rows, activation):
    x = random(rows, 20)
    x[1, 3] = math.nan
    residual = torch.zeros(rows, 9)
    residual[0] = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30, 100.0, -100.0])
    down, up = torch.zeros(4, 20), random(9, 4)
    y = ops.lowrank_linear(x, down, up, None, residual, activation)
    want = linear(x, down, up, None, None, None, residual, activation)
    if activation == 2:
        want[0, 0] = math.inf  # torch's vectorised gelu makes NaN of infinity, its scalar one does not
    torch.testing.assert_close(y, want, equal_nan=True)
    assert bool(y[1].isnan().all())
    assert not bool(y[2:].isnan().any())
    gate = random(2, 4)
    y = ops.gated_lowrank_linear(x, down, up.expand(2, 9, 4), gate, None, None, residual, activation)
    assert bool(y[1].isnan().all())
    assert not bool(y[2:].isnan().any())


def test_activations_keep_their_accuracy_over_the_whole_range():
    """Relative to |y|: 4 ε, and 256 ε for gelu_tanh, whose exponent of up to 88 is rounded; gelu may also lose 2 ε |x|
    to 1 + erf, as torch does. Below 1e-36 exp may have overflowed."""
    grid = torch.cat([torch.linspace(-100, 100, 40001), torch.linspace(-6, 6, 40001), torch.logspace(-30, 2, 4001)])
    zero, epsilon = torch.zeros(1, 1), torch.finfo(torch.float32).eps
    for activation in range(5):
        y = ops.lowrank_linear(zero, zero, torch.zeros(grid.numel(), 1), grid, None, activation)[0].double()
        x = grid.double()
        truth = x * torch.special.ndtr(x) if activation == 2 else ACTIVATIONS[activation](x)
        allowed = (256 if activation == 3 else 4) * epsilon * truth.abs() + 1e-36
        allowed += 2 * epsilon * x.abs() if activation == 2 else 0
        worst = int(((y - truth).abs() / allowed).argmax())
        assert (y - truth).abs()[worst] <= allowed[worst], (activation, x[worst], y[worst], truth[worst])


def test_results_repeat_and_do_not_depend_on_neighbours_or_place():
    for rows in (6, 40, 200, 700):
        for gated in (False, True):
            inputs = linear_inputs(rows, (70, 19, 45, 3), torch.float32, gated, True)
            y, t = forward(inputs, saving=True)
            dz = random(rows, 45)
            first = [y, t, *backward(dz, t, inputs)]
            for _ in range(3):
                again = [*forward(inputs, saving=True), *backward(dz, t, inputs)]
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            order = torch.randperm(rows)
            moved = [inputs[0][order], *inputs[1:6], inputs[6][order]]
            assert torch.equal(forward(moved), y[order])
            assert torch.equal(backward(dz[order], t[order], moved)[0], first[2][order])
            spoiled = [inputs[0].clone(), *inputs[1:]]
            spoiled[0][1:] = math.nan
            assert torch.equal(forward(spoiled)[0], y[0])


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(5)
            found = []
            for rows, sizes in (
                *((rows, (130, 37, 90, 3)) for rows in (5, 30, 300, 1100)),
                *((rows, (2050, 64, 1030, 3)) for rows in (1, 60)),
            ):
                inputs = linear_inputs(rows, sizes, torch.float32, True, True)
                y, t = forward(inputs, saving=True)
                found += [y, t, *backward(random(rows, sizes[2]), t, inputs)]
            for batch, form in itertools.product((1, 5), FORMATS):
                for gated in (False, True):
                    sizes = (batch, 20, (40, 30), 9, 50, 3, (3, 3), ((1, 2), (1, 1), (1, 1)))
                    inputs = conv_inputs(sizes, torch.float32, gated, True)
                    inputs[0] = inputs[0].contiguous(memory_format=form)
                    y, t = conv_call(inputs, sizes[-1], 0, "_saving")
                    found += [y, t, *conv_backward(random(*y.shape), t, inputs, sizes[-1])]
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def unpacked(panels, outputs, depth):
    """[outputs of whole panels, depth] from panels: [depth, width] each, or pairs of depths [depth / 2, width, 2]."""
    pair = 1 if panels.dtype == torch.float32 else 2
    pairs = math.ceil(depth / pair)
    width = next(w for w in (8, 16, 32) if math.ceil(outputs / w) * w * pairs * pair == panels.numel())
    return panels.view(-1, pairs, width, pair).transpose(1, 2).reshape(-1, pairs * pair)


def test_panels_hold_the_weight_and_zeros():
    weight, bias, heads, biases = random(70, 33), random(70), random(3, 70, 11), random(3, 70)
    side_by_side = torch.cat([*heads, biases.t()], 1)
    for weights, given in (
        ((weight,), weight),
        ((weight, bias), torch.cat([weight, bias[:, None]], 1)),
        ((heads, biases), side_by_side),
        ((heads,), side_by_side[:, :33]),
    ):
        for change in (lambda w: w, strided, torch.Tensor.bfloat16, lambda w: strided(w).bfloat16()):
            back = unpacked(ops.pack_panels(*map(change, weights)), 70, given.shape[1])
            assert torch.equal(back[:70, : given.shape[1]], change(given))
            assert not bool(back[70:].any()) and not bool(back[:, given.shape[1] :].any())


def test_wrong_arguments_raise():
    x, down, up, gate = random(3, 8), random(2, 8), random(5, 2), random(4, 2)
    images, filters, unit = random(2, 3, 4, 4), random(2, 3, 3, 3), ((1, 1), (0, 0), (1, 1))
    for call in (
        lambda: ops.lowrank_linear(x, random(2, 7), up, None, None, 0),
        lambda: ops.lowrank_linear(x, down, random(5, 3), None, None, 0),
        lambda: ops.lowrank_linear(x, down, up, random(4), None, 0),
        lambda: ops.lowrank_linear(x, down, up, None, random(3, 4), 0),
        lambda: ops.lowrank_linear(x, down, up.bfloat16(), None, None, 0),
        lambda: ops.lowrank_linear(x.double(), down, up, None, None, 0),
        lambda: ops.lowrank_linear(x, down, up, None, None, 5),
        lambda: ops.lowrank_linear(x, random(8), up, None, None, 0),
        lambda: ops.lowrank_linear(x[0, 0], down, up, None, None, 0),
        lambda: ops.lowrank_linear_packed(x, ops.pack_panels(down)[1:], ops.pack_panels(up), 2, 5, False, None, 0),
        lambda: ops.lowrank_linear_packed(x, ops.pack_panels(down), ops.pack_panels(up), 2, 5, True, None, 0),
        lambda: ops.pack_panels(up, random(4)),
        lambda: ops.gated_lowrank_linear(x, down, up, gate, None, None, None, 0),
        lambda: ops.gated_lowrank_linear(x, down, random(3, 5, 2), gate, None, None, None, 0),
        lambda: conv_call([images, filters, random(5, 3), *[None] * 4], unit),
        lambda: conv_call([images, random(2, 4, 3, 3), random(5, 2), *[None] * 4], unit),
        lambda: conv_call([images, random(2, 3, 5, 3), random(5, 2), *[None] * 4], unit),
        lambda: conv_call([images[0], filters, random(5, 2), *[None] * 4], unit),
        lambda: conv_call([images, filters, random(5, 2), None, None, random(4), None], unit),
        lambda: conv_call([images, filters, random(5, 2), None, None, None, random(2, 5, 4, 4)], unit),
        lambda: conv_call([images, filters, random(5, 2), *[None] * 4], ((0, 1), (0, 0), (1, 1))),
        lambda: conv_call([images, filters, random(5, 2), *[None] * 4], ((1, 1), (0, -1), (1, 1))),
        lambda: conv_call([images, filters, random(4, 5, 2), random(3, 2), None, None, None], unit),
        lambda: conv_call([images, filters.bfloat16(), random(5, 2), *[None] * 4], unit),
    ):
        with pytest.raises(RuntimeError):
            call()


def test_the_cuda_part_says_what_it_is():
    info, says = ops.cuda_build_info(), ops.cuda_self_test()
    assert _native.cuda_built() == bool(info)
    if not info:
        assert "built without CUDA" in says
    elif torch.cuda.is_available():
        assert says.startswith("ok"), says
    else:
        assert "sm_" in info and "no CUDA device is usable here" in says


def test_the_cuda_part_registers_the_ops_that_its_backend_offers():
    for op, spec in OPS.items():
        for name in (op, f"{op}_saving"):
            registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"inherit_kernels_C::{name}", "CUDA")
            assert registered == (_native.cuda_built() and "cuda" in spec.backends["native"].SERVES), name


def runs_here(level):
    if level == "generic":
        return True
    file = Path("/proc/cpuinfo")
    flags = set(file.read_text().split()) if file.is_file() and platform.machine() == "x86_64" else set()
    need = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    return (need.get(level) or need["avx512"] | {"avx512_bf16"}) <= flags


@pytest.mark.skipif(CHILD, reason="this process tests one instruction set of the others")
@pytest.mark.parametrize("level", ("generic", "avx2", "avx512", "avx512_bf16"))
def test_every_instruction_set(level):
    if _native.isa() == level:
        return  # this process
    script = "import torch; from inherit_kernels import _native; print(_native.load(), _native.isa(), _native.error)"
    environment = os.environ | {"INHERIT_KERNELS_CPU_ISA": level, "INHERIT_KERNELS_TEST_CHILD": "1"}
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    if not runs_here(level):
        assert said.stdout.startswith("False") and "this machine cannot run" in said.stdout
        pytest.skip(f"{level} was not tested: this CPU lacks it")
    assert said.stdout.split()[:2] == ["True", level]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.skipif(CHILD, reason="this process tests one instruction set of the others")
def test_a_wrong_instruction_set_is_an_error_that_names_the_choices():
    script = "from inherit_kernels import _native; print(_native.load(), _native.error)"
    environment = os.environ | {"INHERIT_KERNELS_CPU_ISA": "sse9"}
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert said.stdout.startswith("False") and "sse9" in said.stdout and "avx2" in said.stdout


@pytest.mark.skipif(CHILD, reason="this process tests one instruction set of the others")
@pytest.mark.parametrize(
    "level", (pytest.param("generic", marks=pytest.mark.slow), "avx2", "avx512", "emulated avx512_bf16")
)
def test_under_sanitizers(level, tmp_path):
    """Also the tile shapes and pair products of avx512_bf16 on any machine: the compiler splits the vectors."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or not runs_here("generic" if "emulated" in level else level):
        pytest.skip(f"no sanitizer looked at the {level} kernels: no g++, or the CPU lacks the instructions")
    flags = {
        "generic": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
        "emulated avx512_bf16": ["-DINHERIT_KERNELS_EMULATED", "-Wno-psabi"],
    }[level]
    common = [compiler, "-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    common += ["-DINHERIT_KERNELS_POISON", "-DINHERIT_KERNELS_ISA=under_test", f"-I{ROOT}/csrc/include"]
    kernels, programs = tmp_path / "kernels.o", [tmp_path / "sanitize_kernels", tmp_path / "sanitize_conv"]
    build = [[*common, *flags, "-c", f"{ROOT}/csrc/cpu/microkernels.cpp", "-o", f"{kernels}"]]
    build += [
        [*common, f"{ROOT}/tests/native/{program.name}.cpp", f"{kernels}", "-pthread", "-o", f"{program}"]
        for program in programs
    ]
    for command in build:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "fsanitize" in done.stderr:
            pytest.skip(f"no sanitizer looked at the kernels: {done.stderr.splitlines()[0]}")
        assert done.returncode == 0, done.stderr[-3000:]
    for program in programs:
        done = subprocess.run([str(program)], capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
