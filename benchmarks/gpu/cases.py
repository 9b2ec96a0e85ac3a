"""What the sweep measures, the most important first: the regimes of the figures in turn, then a covering part of the grid.

A regime is a predicate on sizes: whatever case lies in it counts for its figures, also those of the covering part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.suites import Point, _sizes, all_pairs, conv_point, linear_point
from inherit_kernels.registry import OPS

LINEAR, GATED, CONV, GATED_CONV = "lowrank_linear", "gated_lowrank_linear", "lowrank_conv2d", "gated_lowrank_conv2d"
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
SIZES = [(1024, 1024), (4096, 4096), (8192, 8192), (4096, 11008), (11008, 4096)]  # K, N
RANKS = (16, 32, 64, 128, 256, 512)
HEADS = (1, 2, 3, 4, 8)
BATCH = 32
MAPS = [(64, 56), (128, 28), (256, 14), (512, 7)]  # channels, side
SHARES = (1 / 4, 1 / 2)  # R = C/4, C/2
EPILOGUES: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"activation": "relu"},
    {"activation": "gelu"},
    {"activation": "silu", "residual": True},
    {"residual": True},
]
DTYPES = ("bfloat16", "float16", "float32")
FAST, COMPILED, SLOW = "fast", "compiled", "slow"  # what a peer costs to prepare: nothing, seconds, a minute
EVERY = frozenset((FAST, COMPILED, SLOW))
BETWEEN_SLOW = 12  # cases of the covering part: about as long as one case with slow peers


@dataclass(frozen=True)
class Item:
    """One measurement: a case, forward, backward alone, or training (both, through autograd)."""

    point: Point
    mode: str = "forward"
    dtype: str = "bfloat16"
    peers: frozenset[str] = frozenset((FAST,))

    @property
    def key(self) -> str:
        """Tells measurements apart in the journal and on the command line."""
        return f"{self.point.op} {self.point} {self.dtype} {self.mode}" + (" all peers" if SLOW in self.peers else "")

    @property
    def sizes(self) -> dict[str, int]:
        return _sizes(self.point)

    @property
    def regimes(self) -> list[str]:
        """The regimes that it counts for; figures are asked of 16-bit dtypes."""
        return [name for name, contains in REGIMES.items() if self.dtype != "float32" and contains(self)]


def _plain(item: Item) -> bool:
    """No epilogue but a bias, forward."""
    return item.mode == "forward" and not item.point.case.options.get("activation") and not _has(item, "residual")


def _has(item: Item, name: str) -> bool:
    return name in item.point.case.shapes


def _is_decode(item: Item) -> bool:
    s = item.sizes
    return (
        item.point.op == LINEAR and _plain(item) and s["M"] <= 16 and s["K"] == s["N"] == 4096 and 64 <= s["R"] <= 256
    )


def _is_large(item: Item) -> bool:
    return item.point.op == LINEAR and _plain(item) and item.sizes["M"] >= 8192 and item.sizes["R"] <= 128


def _is_epilogue(item: Item) -> bool:
    whole = _has(item, "bias") and _has(item, "residual") and item.point.case.options.get("activation")
    return item.point.op == LINEAR and item.mode == "forward" and bool(whole) and item.sizes["R"] <= 128


def _is_heads(item: Item) -> bool:
    s = item.sizes
    return item.point.op == GATED and _plain(item) and s["H"] == 4 and 64 <= s["R"] <= 128 and s["M"] >= 256


def _is_conv(item: Item, sides: tuple[int, int]) -> bool:
    """3×3 layers whose output has one of these sides."""
    positions = (sides[0] ** 2, sides[1] ** 2)
    return item.point.op == CONV and _plain(item) and item.sizes["T"] == 9 and item.sizes["P"] in positions


def _is_gated_conv(item: Item) -> bool:
    return item.point.op == GATED_CONV and _plain(item) and item.sizes["H"] == 3 and item.sizes["T"] == 9


REGIMES: dict[str, Callable[[Item], bool]] = {
    "decode": _is_decode,
    "large": _is_large,
    "epilogue": _is_epilogue,
    "heads": _is_heads,
    "conv": lambda item: _is_conv(item, (56, 28)),
    "conv_small": lambda item: _is_conv(item, (14, 7)),
    "gated_conv": _is_gated_conv,
    "backward": lambda item: item.mode == "backward",
    "training": lambda item: item.mode == "training",
}


def sweep() -> list[Item]:
    """Everything, in the order in which it is measured; no key twice."""
    covered = covering()
    pieces = [covered[i : i + BETWEEN_SLOW] for i in range(0, len(covered), BETWEEN_SLOW)]
    rounds = itertools.zip_longest(pieces, ([item] for item in with_slow_peers()), fillvalue=())
    items = [*core(), *(item for pair in rounds for piece in pair for item in piece)]
    return list({item.key: item for item in items}.values())


def core() -> list[Item]:
    """The regimes of the figures, one case of each in turn."""
    rounds = itertools.zip_longest(*_core_by_regime())
    return [item for items in rounds for item in items if item is not None]


def _core_by_regime() -> list[list[Item]]:
    whole = {"residual": True}
    epilogues = [
        (4096, 4096, 4096, 128, "gelu"),
        (256, 4096, 4096, 64, "silu"),
        (16384, 1024, 1024, 128, "relu"),
        (1024, 1024, 1024, 64, "gelu"),
        (16384, 4096, 4096, 64, "gelu"),
        (64, 4096, 4096, 128, "silu"),
        (65536, 1024, 1024, 64, "relu"),
    ]
    large = [(16384, 4096, 4096), (65536, 1024, 1024), (8192, 4096, 11008), (8192, 11008, 4096), (65536, 4096, 4096)]
    gated_few = [linear_point(GATED, m, 4096, 4096, 64, 3) for m in (1, 16, 64)]
    return [
        [
            Item(linear_point(LINEAR, m, 4096, 4096, r, 1), peers=frozenset((FAST, COMPILED) if m == 1 else (FAST,)))
            for r in (256, 64, 128)
            for m in (1, 16, 4)
        ],
        [Item(linear_point(LINEAR, m, k, n, r, 1)) for r in (128, 64, 16) for m, k, n in large if r > 16 or m > 8192],
        [
            Item(linear_point(LINEAR, m, k, n, r, 1, activation=name, **whole), peers=frozenset((FAST, COMPILED)))
            for m, k, n, r, name in epilogues
        ],
        [
            Item(linear_point(GATED, m, size, size, r, 4), peers=frozenset((FAST, COMPILED) if r == 64 else (FAST,)))
            for m, size in ((4096, 4096), (1024, 4096), (256, 4096), (16384, 4096), (1024, 1024), (16384, 1024))
            for r in (64, 128)
        ],
        [Item(_conv(CONV, c, side, share, 1)) for share in SHARES for c, side in MAPS],
        [Item(_conv(GATED_CONV, c, side, share, 3)) for share in SHARES for c, side in MAPS]
        + [Item(conv_point(GATED_CONV, BATCH, (3, 224, 64, 7, 2), 32, 3, "channels_last"))],  # a network's first layer
        _backwards(),
        [Item(point) for point in gated_few] + [Item(linear_point(LINEAR, 512, 4096, 4096, r, 1)) for r in (64, 256)],
        [
            Item(linear_point(GATED, 4096, 4096, 4096, 64, 4), "training"),
            Item(_conv(GATED_CONV, 64, 56, 1 / 4, 3), "training"),
        ],
    ]


def _backwards() -> list[Item]:
    points = [
        linear_point(LINEAR, 4096, 4096, 4096, 64, 1),
        linear_point(GATED, 4096, 4096, 4096, 64, 4),
        _conv(CONV, 64, 56, 1 / 2, 1),
        _conv(GATED_CONV, 64, 56, 1 / 2, 3),
        linear_point(LINEAR, 16384, 4096, 4096, 128, 1),
        linear_point(LINEAR, 1024, 4096, 4096, 128, 1),
        linear_point(GATED, 16384, 1024, 1024, 64, 8),
        _conv(CONV, 256, 14, 1 / 4, 1),
        linear_point(LINEAR, 16384, 1024, 1024, 32, 1),
        _conv(GATED_CONV, 256, 14, 1 / 4, 3),
    ]
    return [Item(point, "backward") for point in points]


def with_slow_peers() -> list[Item]:
    """The few cases on which every form of torch.compile is compared, Inductor's B2B pass included."""
    points = [
        linear_point(LINEAR, 4096, 4096, 4096, 128, 1, activation="gelu", residual=True),
        linear_point(LINEAR, 16, 4096, 4096, 256, 1),
        linear_point(LINEAR, 16384, 1024, 1024, 32, 1, bias=False),
        linear_point(GATED, 4096, 4096, 4096, 64, 4),
        _conv(GATED_CONV, 64, 56, 1 / 4, 3),
        _conv(CONV, 64, 56, 1 / 4, 1),
    ]
    return [Item(point, peers=EVERY) for point in points]


def covering() -> list[Item]:
    """Every pair of values of the grid in some case, ops in turn."""
    per_op = [_covering_linear(LINEAR), _covering_linear(GATED), _covering_conv(CONV), _covering_conv(GATED_CONV)]
    rounds = itertools.zip_longest(*(_spread(items) for items in per_op))
    return [item for items in rounds for item in items if item is not None]


def _covering_linear(op: str) -> list[Item]:
    factors: list[Sequence[Any]] = [ROWS, SIZES, RANKS, HEADS if op == GATED else (1,), EPILOGUES, DTYPES]

    def allowed(m: int, size: tuple[int, int], r: int, *_: Any) -> bool:
        k, n = size
        return r * (k + n) < k * n and m * (k + n) <= 2**30  # 2 GB of bfloat16

    chosen = [
        Item(linear_point(op, m, k, n, r, h, **epilogue), dtype=dtype)
        for m, (k, n), r, h, epilogue, dtype in all_pairs(factors, allowed)
    ]
    sizes = itertools.product((256, 16384), ((1024, 1024), (4096, 11008)), (32, 256))
    return chosen + [Item(linear_point(op, m, k, n, r, 3), "backward") for m, (k, n), r in sizes]


def _covering_conv(op: str) -> list[Item]:
    heads = HEADS if op == GATED_CONV else (1,)
    layouts = ("channels_last", "contiguous")
    factors: list[Sequence[Any]] = [MAPS, SHARES, heads, EPILOGUES, (3, 1), layouts, DTYPES]
    chosen = [
        Item(_conv(op, c, side, share, h, kernel, layout, **epilogue), dtype=dtype)
        for (c, side), share, h, epilogue, kernel, layout, dtype in all_pairs(factors, lambda *_: True)
    ]
    return chosen + [Item(_conv(op, c, side, share, 3), "backward") for c, side in MAPS for share in SHARES]


def _conv(
    op: str, c: int, side: int, share: float, h: int, kernel: int = 3, layout: str = "channels_last", **epilogue: Any
) -> Point:
    return conv_point(op, BATCH, (c, side, c, kernel, 1), max(1, int(share * c)), h, layout, **epilogue)


def _spread(items: Sequence[Item]) -> list[Item]:
    """The same items in an order whose beginnings are spread over the whole: a run that stops early covers all sizes."""
    step = next(s for s in (7, 11, 13, 17, 19, 1) if len(items) % s or s == 1)
    return [items[(i * step) % len(items)] for i in range(len(items))]


def select(items: Iterable[Item], part: str = "1/1", ops: Sequence[str] = (), words: Sequence[str] = ()) -> list[Item]:
    """Every n-th item from the i-th on, of some ops, of some regimes or modes.

    Raises:
        ValueError: `part` is not of the form i/n with 1 <= i <= n.
    """
    index, _, count = part.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"part: expected i/n with 1 <= i <= n, such as 1/3, got {part!r}")
    unknown = set(ops) - set(OPS)
    if unknown:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    wanted = [item for item in items if not ops or item.point.op in ops]
    wanted = [item for item in wanted if not words or set(words) & {*item.regimes, item.mode}]
    return wanted[int(index) - 1 :: int(count)]


def rehearsal() -> list[Item]:
    """Tiny cases through the same code: every op and mode, every kind of peer."""

    def small(op: str, h: int, **epilogue: Any) -> Point:
        return linear_point(op, 9, 40, 24, 8, h, **epilogue)

    def image(op: str, h: int, layout: str = "channels_last") -> Point:
        return conv_point(op, 2, (8, 6, 12, 3, 1), 4, h, layout)

    return [
        Item(small(LINEAR, 1, activation="gelu", residual=True), peers=EVERY),
        Item(small(GATED, 4, activation="relu"), peers=EVERY),
        Item(image(CONV, 1)),
        Item(image(GATED_CONV, 3)),
        Item(small(LINEAR, 1), "backward"),
        Item(small(GATED, 4), "backward"),
        Item(image(CONV, 1), "backward"),
        Item(image(GATED_CONV, 3), "backward"),
        Item(small(GATED, 2), "training"),
        Item(small(LINEAR, 1), dtype="float32"),
    ]
