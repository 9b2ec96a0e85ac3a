"""The cases: shapes of transformer and convolutional layers, with biases, activations and residuals.

`small` is about eight cases an op that span the regimes by hand. `full` covers every pair of values of the grid (every size
with every number of rows, every rank with every activation, …), not the cross product: an all-pairs selection, found
greedily and the same on every run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from benchmarks.roofline import Work
from inherit_kernels.registry import OPS
from inherit_kernels.testing import Case

SIZES = [  # K -> N of transformer layers: MiniLM, BERT-base and ViT, 1024 wide, LLaMA
    (384, 384),
    (384, 1536),
    (1536, 384),
    (768, 768),
    (768, 3072),
    (3072, 768),
    (1024, 1024),
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
]
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the break-even rank K·N / (K + N)
ROWS = (1, 4, 8, 16, 64, 256, 1024, 4096)
HEADS = (1, 2, 3, 4)
LAYERS = [  # channels in, side, channels out, kernel, stride: ResNet-18, ResNet-50, CIFAR ResNets, larger kernels
    (64, 56, 64, 3, 1),
    (64, 56, 128, 3, 2),
    (128, 28, 128, 3, 1),
    (128, 28, 256, 3, 2),
    (256, 14, 256, 3, 1),
    (256, 14, 512, 3, 2),
    (512, 7, 512, 3, 1),
    (64, 56, 256, 1, 1),
    (256, 56, 128, 1, 1),
    (256, 56, 512, 1, 2),
    (1024, 14, 256, 1, 1),
    (512, 7, 2048, 1, 1),
    (16, 32, 16, 3, 1),
    (16, 32, 32, 3, 2),
    (32, 16, 32, 3, 1),
    (64, 8, 64, 3, 1),
    (64, 32, 64, 3, 1),
    (64, 28, 64, 5, 1),
    (128, 14, 128, 5, 1),
    (64, 28, 64, 7, 1),
]
BATCHES = (1, 8, 32)
CHANNEL_SHARES = (1 / 4, 1 / 2)  # R = C/4, C/2
LAYOUTS = ("contiguous", "channels_last")
EPILOGUES: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"activation": "relu"},
    {"activation": "gelu"},
    {"activation": "silu"},
    {"residual": True},
    {"residual": True, "activation": "relu"},
]
MOST_FLOPS = 40e9  # of the dense layer, a call: half a second on one core


@dataclass(frozen=True)
class Point:
    """One case of a suite and the memory layout of its images."""

    op: str
    case: Case
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{self.case}{' nhwc' if self.layout == 'channels_last' else ''}"


def suite(op: str, name: str) -> list[Point]:
    """The points of an op's suite, "small" or "full".

    Raises:
        ValueError: no such suite.
    """
    if name not in ("small", "full"):
        raise ValueError(f"suite: expected small or full, got {name!r}")
    if name == "small":
        return _small_linear(op) if "linear" in op else _small_conv(op)
    return _full_linear(op) if "linear" in op else _full_conv(op)


def _small_linear(op: str) -> list[Point]:
    shapes: list[tuple[Any, ...]] = [
        (1, 1024, 1024, 64, {}),
        (1, 4096, 4096, 256, {"activation": "silu"}),
        (8, 768, 3072, 154, {"activation": "gelu"}),
        (16, 4096, 11008, 187, {}),
        (64, 4096, 4096, 256, {}),
        (128, 384, 1536, 77, {"activation": "gelu"}),
        (197, 3072, 768, 77, {"residual": True}),
        (1024, 1024, 1024, 64, {}),
    ]
    return [linear_point(op, m, k, n, r, 3, **epilogue) for m, k, n, r, epilogue in shapes]


def _small_conv(op: str) -> list[Point]:
    shapes: list[tuple[Any, ...]] = [
        (1, (256, 14, 256, 3, 1), 64, "contiguous", {}),
        (1, (512, 7, 512, 3, 1), 128, "channels_last", {"activation": "relu"}),
        (1, (128, 28, 256, 3, 2), 32, "contiguous", {}),
        (8, (16, 32, 16, 3, 1), 8, "contiguous", {"activation": "relu"}),
        (8, (64, 56, 64, 3, 1), 32, "contiguous", {}),
        (8, (64, 56, 64, 3, 1), 16, "channels_last", {"residual": True, "activation": "relu"}),
        (8, (256, 14, 1024, 1, 1), 64, "channels_last", {}),
        (32, (64, 32, 64, 3, 1), 16, "contiguous", {}),
    ]
    return [conv_point(op, b, layer, r, 3, layout, **epilogue) for b, layer, r, layout, epilogue in shapes]


def _full_linear(op: str) -> list[Point]:
    gated = "gated" in op
    factors: list[Sequence[Any]] = [ROWS, SIZES, SHARES, HEADS if gated else (1,), EPILOGUES]

    def allowed(m: int, size: tuple[int, int], *_: Any) -> bool:
        return 2 * m * size[0] * size[1] <= MOST_FLOPS

    points = []
    for m, (k, n), share, h, epilogue in all_pairs(factors, allowed):
        points.append(linear_point(op, m, k, n, max(1, round(share * k * n / (k + n))), h, **epilogue))
    return points


def _full_conv(op: str) -> list[Point]:
    gated = "gated" in op
    factors: list[Sequence[Any]] = [LAYERS, BATCHES, CHANNEL_SHARES, HEADS if gated else (1,), EPILOGUES, LAYOUTS]

    def allowed(layer: tuple[int, ...], batch: int, *_: Any) -> bool:
        c, side, n, kernel, stride = layer
        return 2 * batch * (side // stride) ** 2 * c * kernel**2 * n <= MOST_FLOPS

    points = []
    for layer, batch, share, h, epilogue, layout in all_pairs(factors, allowed):
        rank = max(1, int(share * min(layer[0], layer[2])))
        points.append(conv_point(op, batch, layer, rank, h, layout, **epilogue))
    return points


def linear_point(op: str, m: int, k: int, n: int, r: int, h: int, **epilogue: Any) -> Point:
    """A linear case named after its sizes; plain ops ignore `h`."""
    case = import_module(f"inherit_kernels.ops.{op}.cases").case
    heads = (h,) if "gated" in op else ()
    name = f"{m}x{k}->{r}->{f'{h}x' if heads else ''}{n}{_suffix(epilogue)}"
    return Point(op, case(name, (m,), k, n, r, *heads, **epilogue))


def conv_point(
    op: str, b: int, layer: tuple[int, int, int, int, int], r: int, h: int, layout: str, **epilogue: Any
) -> Point:
    """A convolution case named after its sizes, `layer` as in `LAYERS`; plain ops ignore `h`."""
    c, side, n, kernel, stride = layer
    case = import_module(f"inherit_kernels.ops.{op}.cases").case
    heads = (h,) if "gated" in op else ()
    window = f"k{kernel}" + (f"s{stride}" if stride > 1 else "")
    name = f"b{b} {c}x{side}²->{r}->{f'{h}x' if heads else ''}{n} {window}{_suffix(epilogue)}"
    options = {"stride": stride, "padding": kernel // 2} | epilogue
    return Point(op, case(name, (b,), c, (side, side), n, r, *heads, (kernel, kernel), **options), layout)


def _suffix(epilogue: dict[str, Any]) -> str:
    words = [] if epilogue.get("bias", True) else ["nobias"]
    words += [epilogue["activation"]] if epilogue.get("activation") else []
    words += ["residual"] if epilogue.get("residual") else []
    return "".join(f" {word}" for word in words)


def all_pairs(factors: Sequence[Sequence[Any]], allowed: Callable[..., bool]) -> list[tuple[Any, ...]]:
    """Combinations, one value of each factor, in which every allowed pair of values of two factors occurs.

    Greedy: the next combination starts from the first pair not yet covered; every other factor takes the value that covers
    most further pairs. Deterministic.
    """
    positions = [range(len(values)) for values in factors]

    def permitted(choice: Sequence[int]) -> bool:
        return allowed(*(values[i] for values, i in zip(factors, choice, strict=True)))

    def pairs(choice: dict[int, int]) -> Iterable[tuple[int, int, int, int]]:
        return ((f, i, g, j) for (f, i), (g, j) in itertools.combinations(sorted(choice.items()), 2))

    possible = [choice for choice in itertools.product(*positions) if permitted(choice)]
    uncovered = dict.fromkeys(pair for choice in possible for pair in pairs(dict(enumerate(choice))))
    selection = []
    while uncovered:
        first = next(iter(uncovered))
        candidates = [choice for choice in possible if choice[first[0]] == first[1] and choice[first[2]] == first[3]]
        best = max(candidates, key=lambda choice: sum(pair in uncovered for pair in pairs(dict(enumerate(choice)))))
        for pair in pairs(dict(enumerate(best))):
            uncovered.pop(pair, None)
        selection.append(best)
    return [tuple(values[i] for values, i in zip(factors, choice, strict=True)) for choice in sorted(selection)]


# --- the work of a case ------------------------------------------------------------------------------------------------


def work_of(point: Point, element_size: int, training: bool, dense: bool = False) -> Work:
    """What a case needs at least: heads merged, every distinct tensor moved once; `dense`, the layer it replaces.

    Training adds the two products of each product's backward, and reads dy, writes dx and the weights' gradients.
    """
    case, spec = point.case, OPS[point.op]
    sizes = _sizes(point)
    shapes = dict(case.shapes)
    if dense:
        shapes = {name: shapes[name] for name in ("x", "residual") if name in shapes}
        shapes["weight"] = (case.shapes["up"][-2], *case.shapes["down"][1:])
        if "bias" in case.shapes:
            shapes["bias"] = (case.shapes["up"][-2],)
    products = _dense_products(sizes) if dense else _products(sizes)
    output = spec.fake(*_meta(point))[0].numel()
    elements = {name: _count(shape) for name, shape in shapes.items()}
    elements["x"] = _touched(point, elements["x"])
    moved = sum(elements.values()) + output
    if training:
        products = [product for m, n, k, c in products for product in ((m, n, k, c), (m, k, n, c), (n, k, m, c))]
        moved += output + sum(count for name, count in elements.items() if name != "residual")
    return Work(tuple(products), moved * element_size)


def _products(sizes: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """(m, n, k, count) of both stages and the gate; heads merge along the depth (linear) or into the weights (conv)."""
    n, r, h = sizes["N"], sizes["R"], sizes.get("H")
    if "M" in sizes:
        m, k = sizes["M"], sizes["K"]
        return [(m, r, k, 1), (m, n, r * (h or 1), 1)] + ([(m, h, r, 1)] if h else [])
    b, p, depth = sizes["B"], sizes["P"], sizes["C"] * sizes["T"]
    mixing = [(b, h, r, 1), (b, n * r, h, 1)] if h else []
    return [(b * p, r, depth, 1), (p, n, r, b), *mixing]


def _dense_products(sizes: dict[str, int]) -> list[tuple[int, int, int, int]]:
    if "M" in sizes:
        return [(sizes["M"], sizes["N"], sizes["K"], 1)]
    return [(sizes["B"] * sizes["P"], sizes["N"], sizes["C"] * sizes["T"], 1)]


def _sizes(point: Point) -> dict[str, int]:
    return OPS[point.op].sizes(*_meta(point))


def _meta(point: Point) -> tuple[Any, ...]:
    """The complete argument list of a case on the meta device."""
    import torch

    spec = OPS[point.op]
    names = [part.split()[-1] for part in spec.options.split(", ")]
    options = dict(zip(names, spec.default_options, strict=True)) | point.case.options
    shapes = point.case.shapes
    tensors = [torch.empty(shapes[name], device="meta") if name in shapes else None for name in spec.tensors]
    arguments, chosen = spec.normalise(tuple(tensors), tuple(options.values()))
    return *arguments, *chosen


def _touched(point: Point, count: int) -> int:
    """Elements of x that are read: a stride wider than the kernel skips some."""
    if "conv2d" not in point.op:
        return count
    stride, kernel = point.case.options.get("stride", 1), point.case.shapes["down"][2:]
    strides = (stride, stride) if isinstance(stride, int) else stride
    for size, step in zip(kernel, strides, strict=True):
        count = int(count * min(1.0, size / step))
    return count


def _count(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
