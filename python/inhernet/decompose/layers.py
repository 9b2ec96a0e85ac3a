"""What is known of one layer before and after planning: its shape, what it costs, and why it stays dense."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..config import INITS


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**48


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(n, int) and n >= 0 for n in value)


def _is_share(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


# What a file may hold in each field. Rank, heads and kind are looked at again after an edit: see `check`.
_BOOL: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool), "true or false")
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda value: isinstance(value, str), "a string"),
    "shape": (lambda value: _is_pair(value) and max(value) < 2**48, "two sizes"),
    "kernel_size": (lambda value: value is None or _is_pair(value), "null or two sizes"),
    "init": (lambda value: value in INITS, f"one of {', '.join(INITS)}"),
    "why_dense": (lambda value: value is None or isinstance(value, str), "null or a string"),
    "kept": (lambda value: value is None or _is_share(value), "null or a number"),
    **dict.fromkeys(("bias", "gate", "head_bias", "fixed", "selected"), _BOOL),
}


@dataclass
class LayerPlan:
    """The decision about one layer; `rank` may be edited (an int, or None to keep it dense).

    `kind`: "linear", "conv2d", or "other" for a matrix that is only listed with its reason. `shape`: `(N, K)`,
    K = C·kh·kw for a convolution. `bias`: whether the dense layer has one; `head_bias`: whether each head gets one.
    `fixed`: the layer cannot be factorised at all. `why_dense` explains a rank of None. `kept`: share of the squared
    singular values (in the initialisation's weighting) the rank keeps, where known.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    bias: bool
    kernel_size: tuple[int, int] | None = None
    rank: int | None = None
    heads: int = 1
    gate: bool = False
    head_bias: bool = False
    init: str = "svd"
    fixed: bool = False
    selected: bool = False
    why_dense: str | None = None
    kept: float | None = None

    @property
    def reason(self) -> str | None:
        """None if the layer is factorised, else why it stays dense."""
        return None if self.rank is not None else self.why_dense or "kept dense by hand"

    @property
    def dense_params(self) -> int:
        """`N·K`, plus N for a bias."""
        return self.shape[0] * self.shape[1] + (self.shape[0] if self.bias else 0)

    def cost(self, rank: int) -> int:
        """Parameters at a rank: `R·K + H·N·R`, the gate's `H·R + H`, the heads' biases `H·N`."""
        return self.fixed_cost + rank * self.rank_cost

    @property
    def rank_cost(self) -> int:
        rows, columns = self.shape
        return columns + self.heads * rows + (self.heads if self.gate else 0)

    @property
    def fixed_cost(self) -> int:
        rows, heads = self.shape[0], self.heads
        return (heads if self.gate else 0) + (heads * rows if self.head_bias else 0)

    @property
    def form(self) -> dict[str, Any]:
        """What `from_dense` takes beside the rank."""
        return {"heads": self.heads, "gate": self.gate, "head_bias": "always" if self.head_bias else "source"}

    @property
    def params(self) -> int:
        return self.dense_params if self.rank is None else self.cost(self.rank)

    @property
    def break_even(self) -> int:
        """The smallest rank that saves nothing: `cost(rank) >= dense_params`."""
        return max(0, -(-(self.dense_params - self.fixed_cost) // self.rank_cost))

    def largest_rank(self, params: float) -> int:
        """The largest rank whose cost is at most `params` (0 if none is)."""
        return max(0, math.floor((params - self.fixed_cost) / self.rank_cost))

    def limit(self, guard: bool) -> int:
        """Ranks must stay below this: min(N, K), and the break-even rank where it is guarded."""
        return min(*self.shape, self.break_even) if guard else min(self.shape)

    def refusal(self, rank: int, guard: bool) -> str | None:
        """Why this rank makes no sense for the layer, or None."""
        if rank >= min(self.shape):
            return f"rank {rank} >= min(N, K) = {min(self.shape)}: nothing is factorised"
        if guard and rank >= self.break_even:
            counts = f"{self.cost(rank):,} parameters against {self.dense_params:,}"
            return f"rank {rank} >= break-even {self.break_even}: {counts}"
        return None

    def keep_dense(self, why: str, fixed: bool = False) -> LayerPlan:
        self.rank, self.why_dense, self.fixed = None, why, fixed
        return self

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["shape"] = list(self.shape)
        data["kernel_size"] = None if self.kernel_size is None else list(self.kernel_size)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerPlan:
        """The inverse of `to_dict`. Raises ValueError naming the layer and the field."""
        if not isinstance(data, dict):
            raise ValueError(f"plan: a layer is {type(data).__name__}, expected an object")
        name = data.get("name")
        known = {f.name for f in fields(cls)}
        for key in set(data) ^ known:
            what = "is missing" if key in known else "is unknown"
            raise ValueError(f"plan, layer {name!r}: field {key!r} {what}; expected exactly {', '.join(sorted(known))}")
        for key, (good, expected) in _FIELDS.items():
            if not good(data[key]):
                raise ValueError(f"plan, layer {name!r}: {key} is {str(data[key])[:60]!r}, expected {expected}")
        pairs = {key: tuple(data[key]) for key in ("shape", "kernel_size") if data[key] is not None}
        layer = cls(**{**data, **pairs})
        layer.check()
        return layer

    def check(self, guard: bool = False) -> None:
        """Raise ValueError if an edit made the layer impossible; `guard` also refuses ranks above break-even."""
        where = f"plan, layer {self.name!r}"
        if self.kind not in ("linear", "conv2d", "other"):
            raise ValueError(f"{where}: kind is {self.kind!r}, expected 'linear', 'conv2d' or 'other'")
        if not _is_count(self.heads):
            raise ValueError(f"{where}: heads is {self.heads!r}, expected an integer of at least 1")
        if self.heads > 1 and not self.gate:
            raise ValueError(f"{where}: gate is {self.gate!r} with {self.heads} heads; several heads need a gate")
        if self.rank is None:
            return
        if not _is_count(self.rank):
            raise ValueError(f"{where}: rank is {self.rank!r}, expected None (dense) or an integer of at least 1")
        if self.fixed:
            raise ValueError(f"{where}: rank is {self.rank}, but the layer cannot be factorised: {self.why_dense}")
        problem = self.refusal(self.rank, guard)
        if problem:
            raise ValueError(f"{where}: {problem}; choose a smaller rank, or None to keep it dense")
