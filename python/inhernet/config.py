"""Configuration of an inheritance: what to factorise, how small, and how the factors are found.

Everything here is a frozen dataclass that survives a trip through JSON. Nothing here touches a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from .budgets import Budget, ParamBudget, budget_from_dict, budget_to_dict
from .checks import is_int, is_number, known_keys, need_fraction, need_int, refuse

CONFIG_VERSION = 1
INITS = ("svd", "activation", "fisher", "random", "published")
ALLOCATIONS = ("auto", "fisher", "uniform")
LAYER_KINDS = ("linear", "conv2d")
RULE_KEYS = ("rank", "ratio", "heads", "init")


@dataclass(frozen=True)
class InheritConfig:
    """How a teacher is turned into an inherited model. Immutable; `to_json`/`from_json` keep every field but
    `filter_fn`.

    Args:
        heads: up projections per layer. At equal budget three heads halve the rank, so one head keeps most without
            training; recipes that train set 3.
        budget: what it may cost: a `ParamBudget`, `ByteBudget`, `MacBudget`, `LatencyBudget`, `FidelityBudget`, `UniformRank`,
            `UniformRatio` or `EnergyBudget`.
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
            (needs calibration). "uniform": the same ratio everywhere. "auto": fisher when that is the init, corrected by the
            measured effect of each layer on the output (128 samples for each layer; not with BatchNorm), else uniform,
            because the energy of plain or activation-weighted factors is no common currency (measured: worse than uniform).
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
            need_int(name, getattr(self, name), 1)
        if self.round_to != "auto":
            need_int("round_to", self.round_to, 1)
        if not (self.device is None or (isinstance(self.device, str) and self.device.isalpha())):
            refuse("device", self.device, "None or a type of device, 'cpu' or 'cuda'")
        for name in ("min_params", "seed"):
            need_int(name, getattr(self, name), 0)
        if not isinstance(self.budget, Budget):
            refuse("budget", self.budget, "a budget such as ParamBudget(0.5)")
        if self.init is not None and self.init not in INITS:
            refuse("init", self.init, f"None or one of {', '.join(INITS)}")
        if not (isinstance(self.gate, bool) or self.gate == "auto"):
            refuse("gate", self.gate, "'auto', True or False")
        if self.gate is False and self.heads > 1:
            refuse("gate", self.gate, f"'auto' or True with heads={self.heads}: several heads need a gate to mix them")
        if self.allocation not in ALLOCATIONS:
            refuse("allocation", self.allocation, f"one of {', '.join(ALLOCATIONS)}")
        if self.head_bias not in ("source", "always"):
            refuse("head_bias", self.head_bias, "'source' or 'always'")
        if not isinstance(self.break_even, bool):
            refuse("break_even", self.break_even, "True or False")
        if self.filter_fn is not None and not callable(self.filter_fn):
            refuse("filter_fn", self.filter_fn, "None or a callable (module, name) -> bool")
        for name in ("noise", "shrinkage_input", "shrinkage_output"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                refuse(name, value, "a finite number of at least 0")
        self._check_names()
        if not isinstance(self.rules, Mapping):
            refuse("rules", self.rules, "a mapping from names or patterns to rules")
        for key, rule in self.rules.items():
            _check_pattern("rules", key)
            _check_rule(f"rules[{key!r}]", rule)
        # Read-only copies, so that a frozen configuration cannot be changed through the caller's dict.
        object.__setattr__(self, "rules", MappingProxyType({k: _frozen(v) for k, v in self.rules.items()}))

    def _check_names(self) -> None:
        for name in ("exclude", "layers"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(v, str) for v in value):
                refuse(name, value, "a sequence of strings")
            object.__setattr__(self, name, tuple(value))
        for pattern in self.exclude:
            _check_pattern("exclude", pattern)
        if not self.layers or set(self.layers) - set(LAYER_KINDS):
            refuse("layers", self.layers, f"one or both of {', '.join(LAYER_KINDS)}")

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
            refuse("configuration", data, "a JSON object")
        if data.get("version") != CONFIG_VERSION:
            refuse("version", data.get("version"), f"{CONFIG_VERSION} (the format this release writes)")
        names = tuple(f.name for f in fields(cls))
        known_keys("configuration", data, ("version", *names))
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
        need_int("RefineConfig.steps", self.steps, 1)
        need_int("RefineConfig.seed", self.seed, 0)
        need_fraction("RefineConfig.lr", self.lr)
        if self.seconds is not None and not (is_number(self.seconds) and self.seconds > 0):
            refuse("RefineConfig.seconds", self.seconds, "None or a number above 0")


def _frozen(rule: Any) -> Any:
    return MappingProxyType(dict(rule)) if isinstance(rule, Mapping) else rule


def _check_pattern(where: str, key: Any) -> None:
    if not isinstance(key, str) or not key:
        refuse(f"a key of {where}", key, "a layer name, 're:pattern' or '_default'")
    if key.startswith("re:"):
        try:
            re.compile(key[3:])
        except (re.error, OverflowError, RecursionError) as error:
            refuse(f"a pattern of {where}", key, f"a valid regular expression after 're:' ({error})")


def _check_rule(where: str, rule: Any) -> None:
    if rule is None:
        return
    if is_int(rule):
        need_int(where, rule, 1)
    elif isinstance(rule, float):
        need_fraction(where, rule)
    elif isinstance(rule, Mapping):
        known_keys(where, rule, RULE_KEYS)
        if "rank" in rule and "ratio" in rule:
            refuse(where, dict(rule), "rank or ratio, not both")
        if "rank" in rule:
            need_int(f"{where}['rank']", rule["rank"], 1)
        if "ratio" in rule:
            need_fraction(f"{where}['ratio']", rule["ratio"])
        if "heads" in rule:
            need_int(f"{where}['heads']", rule["heads"], 1)
        if "init" in rule and rule["init"] not in INITS:
            refuse(f"{where}['init']", rule["init"], f"one of {', '.join(INITS)}")
    else:
        refuse(
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
