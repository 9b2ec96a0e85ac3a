"""Which layers may be factorised, by kind, rules and patterns, and why the others may not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import InheritConfig, match_rule
from .layers import LayerPlan

# torch's own containers that read `.weight` of these children instead of calling them.
_READ_DIRECTLY = {nn.TransformerEncoderLayer: ("linear1", "linear2")}


def candidates(model: nn.Module, config: InheritConfig) -> list[tuple[LayerPlan, Any]]:
    """Every linear and 2-D convolution of `model` with the rule that applies to it (None: the budget decides).

    Raises:
        ValueError: the model has no such layer, or a rule or exclusion names nothing.
    """
    found = [(name, module) for name, module in model.named_modules() if _kind(module)]
    if not found:
        raise ValueError(f"model ({type(model).__name__}) has no nn.Linear or nn.Conv2d; there is nothing to inherit")
    names = [name for name, _ in found]
    check_matches(config, names)
    shared = _shared(model)
    return [_candidate(name, module, model, config, shared) for name, module in found]


def check_matches(config: InheritConfig, names: list[str]) -> None:
    """Raise ValueError for a rule or exclusion that hits no layer."""
    for where, keys in (("rules", config.rules), ("exclude", config.exclude)):
        for key in keys:
            if key != "_default" and not hits(key, names):
                raise ValueError(
                    f"{where}: {key!r} matches none of the {len(names)} linear and convolution layers "
                    f"(such as {names[0]!r}); a pattern must match the whole name"
                    f", e.g. 're:.*{names[-1].rpartition('.')[2]}'"
                )


def hits(key: str, names: list[str]) -> int:
    """How many names a rule key covers, whether or not an earlier key takes precedence."""
    if key.startswith("re:"):
        return sum(re.fullmatch(key[3:], name) is not None for name in names)
    return names.count(key)


def _kind(module: Any) -> str | None:
    if isinstance(module, nn.Linear) or _is_transposed(module):
        return "linear"
    return "conv2d" if isinstance(module, nn.Conv2d) else None


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _shared(model: nn.Module) -> dict[str, str]:
    """Layer name → what it shares: the module itself or its weight occurs more than once in the model."""
    first_module: dict[int, str] = {}
    first_weight: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in first_module:
            shared[first_module[id(module)]] = f"the same module is also {name!r}"
            continue
        first_module[id(module)] = name
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            other = first_weight.setdefault(id(parameter), name)
            if other != name:
                shared[name] = f"shares a parameter with {other!r}"
                shared.setdefault(other, f"shares a parameter with {name!r}")
    return shared


def _candidate(
    name: str, module: Any, model: nn.Module, config: InheritConfig, shared: Mapping[str, str]
) -> tuple[LayerPlan, Any]:
    kind = _kind(module) or ""
    weight = module.weight
    rows, columns = weight.shape[0], weight[0].numel() if weight.numel() else 0
    if _is_transposed(module):
        rows, columns = columns, rows
    layer = LayerPlan(name, kind, (rows, columns), getattr(module, "bias", None) is not None)
    if kind == "conv2d":
        layer.kernel_size = tuple(module.kernel_size)
    impossible = _impossible(name, module, model, shared)
    if impossible:
        return layer.keep_dense(impossible, fixed=True), None
    key = match_rule(config.rules, name)
    rule = config.rules[key] if key is not None else {}
    unwanted = _unwanted(layer, module, config, key, rule)
    if unwanted:
        layer.keep_dense(unwanted)
    else:
        layer.selected = True
    return layer, rule


def _impossible(name: str, module: Any, model: nn.Module, shared: Mapping[str, str]) -> str | None:
    if _is_transposed(module):
        return "transformers' Conv1D stores its weight transposed; not supported"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} is a subclass: its owner may read the weight directly"
    parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
    for owner, children in _READ_DIRECTLY.items():
        if isinstance(parent, owner) and name.rpartition(".")[2] in children:
            return f"nn.{owner.__name__} reads this layer's weight directly"
    if not module.weight.is_floating_point():
        return f"weight has dtype {module.weight.dtype}"
    if module.weight.numel() == 0:
        return "empty weight"
    if name in shared:
        return f"tied: {shared[name]}"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            what = "depthwise" if module.groups == module.in_channels else "grouped"
            return f"{what} convolution (groups={module.groups})"
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r}"
    return None


def _unwanted(layer: LayerPlan, module: nn.Module, config: InheritConfig, key: str | None, rule: Any) -> str | None:
    if layer.kind not in config.layers:
        return f"layers={list(config.layers)} leaves out {layer.kind}"
    excluded = next((pattern for pattern in config.exclude if hits(pattern, [layer.name])), None)
    if excluded is not None:
        return f"excluded by {excluded!r}"
    if config.filter_fn is not None and not config.filter_fn(module, layer.name):
        return "filter_fn returned False"
    if rule is None:
        return f"rule {key!r} keeps it dense"
    if layer.dense_params < config.min_params:
        return f"{layer.dense_params:,} parameters < min_params {config.min_params:,}"
    return None
