"""Cases of `gated_lowrank_conv2d` for the contract tests and the fuzz."""

from __future__ import annotations

from typing import Any

from inherit_kernels.common.checks import ACTIVATIONS
from inherit_kernels.common.conv import as_pair, output_size
from inherit_kernels.testing.cases import Case, Pick


def case(
    name: str,
    batch: tuple[int, ...],
    c: int,
    size: tuple[int, int],
    n: int,
    r: int,
    h: int,
    kernel: tuple[int, int],
    *,
    gate_bias=True,
    bias=True,
    residual=False,
    **options: Any,
) -> Case:
    """A case from its letters; `batch` is (B,), or () for an unbatched image."""
    shapes: dict[str, Any] = {"x": (*batch, c, *size), "down": (r, c, *kernel), "up": (h, n, r), "gate_weight": (h, r)}
    if gate_bias:
        shapes["gate_bias"] = (h,)
    if bias:
        shapes["bias"] = (h, n)
    if residual:
        stride, padding, dilation = (
            as_pair(key, options.get(key, default), 0)
            for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))
        )
        shapes["residual"] = (*batch, n, *output_size(size, kernel, stride, padding, dilation))
    return Case(name, shapes, {key: value for key, value in options.items() if value is not None})


CASES = [
    case("pointwise", (2,), 7, (5, 6), 9, 3, 3, (1, 1), residual=True),
    case("three_by_three", (3,), 8, (9, 7), 12, 5, 2, (3, 3), padding=1, activation="relu"),
    case("strided", (2,), 6, (11, 8), 10, 4, 3, (3, 3), stride=2, padding=1, residual=True, activation="gelu"),
    case("beyond_the_map", (3,), 4, (9, 1), 5, 2, 3, (5, 1), stride=(3, 5), padding=(2, 2), dilation=(1, 2)),
    case("dilated", (1,), 5, (12, 10), 6, 3, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 3), bias=False),
    case("unbatched", (), 4, (6, 6), 5, 2, 3, (3, 3), padding=1, residual=True),
    case("one_head", (2,), 4, (6, 6), 5, 2, 1, (3, 3), padding=1),
    case("one_pixel", (4,), 6, (3, 3), 5, 2, 3, (3, 3), activation="silu"),
    case("one_channel", (2,), 1, (6, 5), 1, 1, 2, (2, 2), gate_bias=False, activation="gelu_tanh"),
    case("larger_than_blocks", (2,), 70, (17, 19), 130, 40, 3, (3, 3), padding=1, residual=True, activation="relu"),
    case("empty", (0,), 6, (5, 5), 7, 2, 3, (3, 3), residual=True),
]


def random_case(pick: Pick) -> Case:
    """Any small image, kernel and geometry that has an output."""
    kernel = pick((1, 2, 3, 5)), pick((1, 2, 3))
    dilation = pick((1, 2)), pick((1, 2, 3))
    padding = pick((0, 1, 2, 3)), pick((0, 1, 2))  # which may reach past the map
    size = tuple(max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i] + pick((0, 1, 2, 5, 9))) for i in range(2))
    channels = (1, 2, 3, 7, 8, 16, 17, 33)
    return case(
        "random",
        pick([(), (0,), (1,), (2,), (5,)]),
        pick(channels),
        size,
        pick(channels),
        pick(channels),
        pick((1, 2, 3, 4)),
        kernel,
        gate_bias=pick((False, True)),
        bias=pick((False, True)),
        residual=pick((False, True)),
        stride=(pick((1, 2, 3)), pick((1, 2, 5))),
        padding=padding,
        dilation=dilation,
        activation=pick(ACTIVATIONS),
    )


def tuning_cases() -> list[Case]:
    """The buckets of the dispatch table: the layers of residual networks."""
    return [
        case(f"b{b}_c{c}_{side}x{side}_r{r}_k{k}", (b,), c, (side, side), c, r, 3, (k, k), padding=k // 2)
        for c, side in ((16, 8), (16, 32), (64, 56), (128, 28), (256, 14), (512, 7))
        for r in (c // 4, c // 2)
        for k in (1, 3)
        for b in (1, 8, 32)
    ]


def gpu_tuning_cases() -> list[Case]:
    """The same for a GPU: the layers of residual networks, the first one included, at batch 32 and 1."""
    layers = [
        case(f"b{b}_c{c}_{side}x{side}_r{r}_k3", (b,), c, (side, side), c, r, 3, (3, 3), padding=1)
        for b in (32, 1)
        for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))
        for r in (c // 4, c // 2)
    ]
    return layers + [case(f"b{b}_first", (b,), 3, (224, 224), 64, 32, 3, (7, 7), stride=2, padding=3) for b in (32, 1)]
