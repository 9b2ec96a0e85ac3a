"""Cases of `lowrank_linear` for the contract tests and the fuzz."""

from __future__ import annotations

from typing import Any

from inherit_kernels.common.checks import ACTIVATIONS
from inherit_kernels.testing.cases import Case, Pick


def case(
    name: str, rows: tuple[int, ...], k: int, n: int, r: int, *, bias=True, residual=False, activation=None
) -> Case:
    """A case from its letters."""
    shapes: dict[str, Any] = {"x": (*rows, k), "down": (r, k), "up": (n, r)}
    if bias:
        shapes["bias"] = (n,)
    if residual:
        shapes["residual"] = (*rows, n)
    return Case(name, shapes, {"activation": activation} if activation else {})


CASES = [
    case("vector", (), 17, 9, 3),
    case("one_row", (1,), 65, 33, 7, residual=True),
    case("few_rows", (5,), 63, 65, 16, activation="gelu"),
    case("ragged", (63,), 65, 33, 7, residual=True, activation="relu"),
    case("three_dims", (2, 9), 31, 20, 5, bias=False, activation="silu"),
    case("four_dims", (2, 1, 3), 8, 16, 4, residual=True, activation="gelu_tanh"),
    case("rank_one", (10,), 12, 14, 1),
    case("one_output", (10,), 12, 1, 3, residual=True),
    case("one_input", (10,), 1, 5, 1),
    case("larger_than_blocks", (131,), 300, 270, 72, residual=True, activation="relu"),
    case("deep", (40,), 4500, 40, 24),
    case("no_bias", (33,), 16, 16, 16, bias=False),
    case("empty", (0,), 12, 14, 3, residual=True, activation="relu"),
    case("empty_depth", (3,), 0, 5, 2),
    case("empty_inside", (3, 0), 12, 14, 3),
]


def random_case(pick: Pick) -> Case:
    """Any shapes up to a few blocks, any subset of the options."""
    sizes = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100)
    rows = pick([(), (0,), (1,), (2,), (4,), (7,), (8,), (9,), (33,), (65,), (2, 5), (3, 1, 4), (1, 0)])
    return case(
        "random",
        rows,
        pick(sizes),
        pick(sizes),
        pick(sizes),
        bias=pick((False, True)),
        residual=pick((False, True)),
        activation=pick(ACTIVATIONS),
    )


def tuning_cases() -> list[Case]:
    """The buckets of the dispatch table."""
    return [
        case(f"{m}x{k}->{r}->{n}", (m,), k, n, r)
        for k, n in ((256, 256), (512, 2048), (2048, 512), (4096, 4096))
        for r in (16, 64, 256)
        for m in (1, 8, 64, 512, 4096)
        if r * (k + n) < k * n
    ]


def gpu_tuning_cases() -> list[Case]:
    """The same for a GPU: few rows to many, square layers and those of a transformer; some with what follows a layer."""
    plain = [
        case(f"{m}x{k}->{r}->{n}", (m,), k, n, r)
        for k, n in ((4096, 4096), (1024, 1024), (4096, 11008), (11008, 4096))
        for m in (1, 16, 64, 256, 1024, 4096, 8192, 16384)
        for r in (64, 128, 256, 32, 512, 16)
        if r * (k + n) < k * n
    ]
    followed = [
        case(f"{m}x{k}->{r}->{n} {activation} residual", (m,), k, n, r, residual=True, activation=activation)
        for k, n, activation in ((4096, 4096, "gelu"), (1024, 1024, "relu"))
        for m in (16, 256, 4096, 16384)
        for r in (64, 256)
    ]
    return plain + followed
