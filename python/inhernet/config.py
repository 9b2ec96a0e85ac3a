"""Configuration of an inheritance: what to factorise, how small, and how the factors are found.

Everything here is a frozen dataclass that survives a trip through JSON. Nothing here touches a model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar

CONFIG_VERSION = 1
INITS = ("svd", "activation", "fisher", "random", "published")
ALLOCATIONS = ("auto", "fisher", "uniform")
MOST = 2**40  # of every count and seed: what a computation with them can hold
LAYER_KINDS = ("linear", "conv2d")
RULE_KEYS = ("rank", "ratio", "heads", "init")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) and abs(value) <= MOST) or (isinstance(value, float) and math.isfinite(value))


def _refuse(where: str, value: object, expected: str) -> None:
    raise ValueError(f"{where} is {value!r}; expected {expected}")


def _need_int(where: str, value: Any, least: int) -> None:
    if not _is_int(value) or value < least:
        _refuse(where, value, f"an integer of at least {least}")
    if value > MOST:
        _refuse(where, value, f"an integer of at most {MOST:,}")


def _need_fraction(where: str, value: Any, top: float = 1.0) -> None:
    if not _is_number(value) or not 0.0 < value <= top:
        _refuse(where, value, f"a number above 0 and at most {top:g}")


def _known_keys(where: str, data: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    unknown = sorted(set(data) - set(allowed))
    if unknown:
        _refuse(where, unknown[0], f"one of the keys {', '.join(allowed)}")


@dataclass(frozen=True)
class UniformRank:
    """The same rank for every selected layer; a layer whose break-even is not above it stays dense.

    Example: ``UniformRank(16)``.
    """

    rank: int
    kind: ClassVar[str] = "uniform_rank"

    def __post_init__(self) -> None:
        _need_int("UniformRank.rank", self.rank, 1)


@dataclass(frozen=True)
class UniformRatio:
    """Every selected layer keeps at most `ratio` of its own parameters, heads, gate and biases counted.

    Example: ``UniformRatio(0.5)``.
    """

    ratio: float
    kind: ClassVar[str] = "uniform_ratio"

    def __post_init__(self) -> None:
        _need_fraction("UniformRatio.ratio", self.ratio)


@dataclass(frozen=True)
class EnergyBudget:
    """Every layer takes the smallest rank that keeps `energy` of its squared singular values.

    The singular values are those of the initialisation's own weighting (plain, activation or fisher).
    Example: ``EnergyBudget(0.95)``.
    """

    energy: float
    kind: ClassVar[str] = "energy"

    def __post_init__(self) -> None:
        _need_fraction("EnergyBudget.energy", self.energy)


@dataclass(frozen=True)
class ParamBudget:
    """A number of parameters, given out globally; the total never exceeds it.

    `amount`: a float in (0, 1] is a fraction of the dense parameters (weights and biases) of the selected layers
    (``of="selected"``) or of the whole model (``of="model"``: everything that is not selected counts too); an integer
    above 1 is an absolute number of parameters of the same. What rules fix is counted first; where rules fix every
    layer the budget is idle. Example: ``ParamBudget(0.5)``, ``ParamBudget(400_000, "model")``.
    """

    amount: float | int
    of: str = "selected"
    kind: ClassVar[str] = "params"

    def __post_init__(self) -> None:
        if _is_int(self.amount) and 1 < self.amount <= MOST:
            pass
        elif not _is_number(self.amount) or not 0.0 < self.amount <= 1.0:
            _refuse(
                "ParamBudget.amount", self.amount, f"a fraction above 0 and at most 1, or an integer from 2 to {MOST:,}"
            )
        if self.of not in ("selected", "model"):
            _refuse("ParamBudget.of", self.of, "'selected' or 'model'")

    def target(self, dense: int) -> int:
        """Parameters allowed when `dense` is the dense count of what the budget is about."""
        if _is_int(self.amount) and self.amount > 1:
            return int(self.amount)
        return math.floor(self.amount * dense + 1e-6)


Budget = UniformRank | UniformRatio | EnergyBudget | ParamBudget
_BUDGETS: dict[str, type] = {b.kind: b for b in (UniformRank, UniformRatio, EnergyBudget, ParamBudget)}


def budget_to_dict(budget: Budget) -> dict[str, Any]:
    """The budget as plain JSON data; `kind` says which one it is."""
    return {"kind": budget.kind, **asdict(budget)}


def budget_from_dict(data: Mapping[str, Any]) -> Budget:
    """The inverse of `budget_to_dict`. Raises ValueError for an unknown kind, key or value."""
    if not isinstance(data, Mapping) or data.get("kind") not in list(_BUDGETS):  # a list: the kind may be unhashable
        _refuse("budget", data, f"an object whose 'kind' is one of {', '.join(_BUDGETS)}")
    cls = _BUDGETS[data["kind"]]
    values = {k: v for k, v in data.items() if k != "kind"}
    names = tuple(f.name for f in fields(cls))
    _known_keys(f"budget of kind {data['kind']!r}", values, names)
    if names[0] not in values:
        _refuse(f"budget of kind {data['kind']!r}", dict(values), f"an object with the key {names[0]!r}")
    return cls(**values)


@dataclass(frozen=True)
class InheritConfig:
    """How a teacher is turned into an inherited model. Immutable; `to_json`/`from_json` keep every field but
    `filter_fn`.

    Args:
        heads: up projections per layer. At equal budget three heads halve the rank, so one head keeps most without
            training; recipes that train set 3.
        budget: `UniformRank`, `UniformRatio`, `EnergyBudget` or `ParamBudget`.
        init: "svd", "activation", "fisher", "random", "published", or None (fisher with calibration data, svd without).
        gate: "auto" (a gate exactly when heads > 1), True or False.
        rules: ``{key: value}`` in order of precedence exact name, then "re:pattern" (whole name, in the order given),
            then "_default". Value: None (stay dense), an int (rank), a float (share of the layer's parameters), or a
            dict with any of `rank`, `ratio`, `heads`, `init`.
        exclude: names or "re:pattern"s that stay dense.
        filter_fn: ``filter_fn(module, name) -> bool``; False keeps the layer dense. Not serialised: `to_json` writes
            `"filter_fn": "not serialised"` and a configuration read back has None.
        round_to: ranks are multiples of this, or "auto": of what `device` multiplies fast. Ranks of your own (`UniformRank`,
            rules) are kept by "auto". min_params: layers with fewer dense parameters stay dense.
        device: where the inherited network will run, "cpu" or "cuda"; None: where the teacher is when it is planned.
        break_even: refuse ranks that save no parameters. False: a layer stays dense only when rank >= min(m, n).
        head_bias: "source" (a bias where the dense layer had one) or "always".
        noise: standard deviation of the zero-sum head perturbation, as a share of std(up).
        shrinkage_input, shrinkage_output: multiples of the mean diagonal added to the two second moments.
        allocation: how a `ParamBudget` gives out ranks. "fisher": globally, in the currency of the two-sided weighting
            (needs calibration). "uniform": the same ratio everywhere. "auto": fisher when that is the init, else
            uniform, because the energy of plain or activation-weighted factors is no common currency (measured: worse
                than uniform).
        rank_step: largest step of the global allocation (smaller in layers with fewer than 16 times as many ranks).
        seed: of the projections, the perturbation and init="random".
        projections: random projections per calibration batch for init="fisher".
        max_moment: layers whose smaller side is above this stay dense under "activation" and "fisher": their moments
            and eigenproblems have that size (8192: 268 MB and minutes each). The larger side may have any size.
        layers: kinds that are selected, from "linear" and "conv2d".

    Raises ValueError naming the field, its value and what was expected.

    Example:
        >>> config = InheritConfig(budget=ParamBudget(0.5), exclude=("re:.*pooler.*",))
        >>> InheritConfig.from_json(config.to_json()) == config
        True
    """

    heads: int = 1
    budget: Budget = field(default_factory=lambda: ParamBudget(0.5))
    init: str | None = None
    gate: str | bool = "auto"
    rules: Mapping[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    filter_fn: Callable[[Any, str], bool] | None = field(default=None, compare=False)
    round_to: int | str = "auto"
    device: str | None = None
    min_params: int = 0
    break_even: bool = True
    head_bias: str = "source"
    noise: float = 0.005
    shrinkage_input: float = 1e-3
    shrinkage_output: float = 1e-2
    allocation: str = "auto"
    rank_step: int = 8
    seed: int = 0
    projections: int = 1
    max_moment: int = 8192
    layers: tuple[str, ...] = LAYER_KINDS

    def __post_init__(self) -> None:
        for name in ("heads", "rank_step", "projections", "max_moment"):
            _need_int(name, getattr(self, name), 1)
        if self.round_to != "auto":
            _need_int("round_to", self.round_to, 1)
        if not (self.device is None or (isinstance(self.device, str) and self.device.isalpha())):
            _refuse("device", self.device, "None or a type of device, 'cpu' or 'cuda'")
        for name in ("min_params", "seed"):
            _need_int(name, getattr(self, name), 0)
        if not isinstance(self.budget, tuple(_BUDGETS.values())):
            _refuse("budget", self.budget, "a UniformRank, UniformRatio, EnergyBudget or ParamBudget")
        if self.init is not None and self.init not in INITS:
            _refuse("init", self.init, f"None or one of {', '.join(INITS)}")
        if not (isinstance(self.gate, bool) or self.gate == "auto"):
            _refuse("gate", self.gate, "'auto', True or False")
        if self.gate is False and self.heads > 1:
            _refuse("gate", self.gate, f"'auto' or True with heads={self.heads}: several heads need a gate to mix them")
        if self.allocation not in ALLOCATIONS:
            _refuse("allocation", self.allocation, f"one of {', '.join(ALLOCATIONS)}")
        if self.head_bias not in ("source", "always"):
            _refuse("head_bias", self.head_bias, "'source' or 'always'")
        if not isinstance(self.break_even, bool):
            _refuse("break_even", self.break_even, "True or False")
        if self.filter_fn is not None and not callable(self.filter_fn):
            _refuse("filter_fn", self.filter_fn, "None or a callable (module, name) -> bool")
        for name in ("noise", "shrinkage_input", "shrinkage_output"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                _refuse(name, value, "a finite number of at least 0")
        self._check_names()
        if not isinstance(self.rules, Mapping):
            _refuse("rules", self.rules, "a mapping from names or patterns to rules")
        for key, rule in self.rules.items():
            _check_pattern("rules", key)
            _check_rule(f"rules[{key!r}]", rule)
        # Read-only copies, so that a frozen configuration cannot be changed through the caller's dict.
        object.__setattr__(self, "rules", MappingProxyType({k: _frozen(v) for k, v in self.rules.items()}))

    def _check_names(self) -> None:
        for name in ("exclude", "layers"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(v, str) for v in value):
                _refuse(name, value, "a sequence of strings")
            object.__setattr__(self, name, tuple(value))
        for pattern in self.exclude:
            _check_pattern("exclude", pattern)
        if not self.layers or set(self.layers) - set(LAYER_KINDS):
            _refuse("layers", self.layers, f"one or both of {', '.join(LAYER_KINDS)}")

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __getstate__(self) -> dict[str, Any]:
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        state["rules"] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in self.rules.items()}
        return state  # a mappingproxy cannot be pickled or deep-copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            object.__setattr__(self, key, value)
        object.__setattr__(self, "rules", MappingProxyType({k: _frozen(v) for k, v in state["rules"].items()}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data with `"version": 1`."""
        data: dict[str, Any] = {"version": CONFIG_VERSION}
        for f in fields(self):
            data[f.name] = getattr(self, f.name)
        data["budget"] = budget_to_dict(self.budget)
        data["rules"] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in self.rules.items()}
        data["exclude"], data["layers"] = list(self.exclude), list(self.layers)
        data["filter_fn"] = None if self.filter_fn is None else "not serialised"
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InheritConfig:
        """The inverse of `to_dict`. Raises ValueError for another version, an unknown key or a bad value."""
        if not isinstance(data, Mapping):
            _refuse("configuration", data, "a JSON object")
        if data.get("version") != CONFIG_VERSION:
            _refuse("version", data.get("version"), f"{CONFIG_VERSION} (the format this release writes)")
        names = tuple(f.name for f in fields(cls))
        _known_keys("configuration", data, ("version", *names))
        values = {k: v for k, v in data.items() if k not in ("version", "filter_fn")}
        if "budget" in values:
            values["budget"] = budget_from_dict(values["budget"])
        return cls(**values)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> InheritConfig:
        return cls.from_dict(json.loads(text))


@dataclass(frozen=True)
class RefineConfig:
    """How an inherited model's blocks are refined against the teacher's (`inherit(refine=)`).

    Args:
        steps: of Adam in each block, 32 samples each.
        lr: of the first step; the last is 0, along a cosine.
        seconds: about so long in all; each block gets an equal share of what is left, its schedule compressed.
            None: as long as the steps take.
        seed: of the order of the samples and of those held out.
        state: a directory where each finished block is written at once: started again with the same arguments, the blocks
            that are there are taken over. It may be deleted afterwards.

    Raises ValueError naming the field, its value and what was expected.

    Example: ``RefineConfig(steps=100, seconds=60)``.
    """

    steps: int = 300
    lr: float = 1e-3
    seconds: float | None = None
    seed: int = 0
    state: str | None = None

    def __post_init__(self) -> None:
        _need_int("RefineConfig.steps", self.steps, 1)
        _need_int("RefineConfig.seed", self.seed, 0)
        _need_fraction("RefineConfig.lr", self.lr)
        if self.seconds is not None and not (_is_number(self.seconds) and self.seconds > 0):
            _refuse("RefineConfig.seconds", self.seconds, "None or a number above 0")


def _frozen(rule: Any) -> Any:
    return MappingProxyType(dict(rule)) if isinstance(rule, Mapping) else rule


def _check_pattern(where: str, key: Any) -> None:
    if not isinstance(key, str) or not key:
        _refuse(f"a key of {where}", key, "a layer name, 're:pattern' or '_default'")
    if key.startswith("re:"):
        try:
            re.compile(key[3:])
        except (re.error, OverflowError, RecursionError) as error:
            _refuse(f"a pattern of {where}", key, f"a valid regular expression after 're:' ({error})")


def _check_rule(where: str, rule: Any) -> None:
    if rule is None:
        return
    if _is_int(rule):
        _need_int(where, rule, 1)
    elif isinstance(rule, float):
        _need_fraction(where, rule)
    elif isinstance(rule, Mapping):
        _known_keys(where, rule, RULE_KEYS)
        if "rank" in rule and "ratio" in rule:
            _refuse(where, dict(rule), "rank or ratio, not both")
        if "rank" in rule:
            _need_int(f"{where}['rank']", rule["rank"], 1)
        if "ratio" in rule:
            _need_fraction(f"{where}['ratio']", rule["ratio"])
        if "heads" in rule:
            _need_int(f"{where}['heads']", rule["heads"], 1)
        if "init" in rule and rule["init"] not in INITS:
            _refuse(f"{where}['init']", rule["init"], f"one of {', '.join(INITS)}")
    else:
        _refuse(
            where, rule, "None, a rank (int), a share of the parameters (float) or a dict of rank, ratio, heads, init"
        )


def match_rule(rules: Mapping[str, Any], name: str) -> str | None:
    """The key of `rules` that applies: the exact name, else the first matching "re:", else "_default", else None."""
    if name in rules:
        return name
    for key in rules:
        if key.startswith("re:") and re.fullmatch(key[3:], name):
            return key
    return "_default" if "_default" in rules else None
