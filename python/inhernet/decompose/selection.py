"""Which layers may be factorised, by kind, rules and patterns, and why the others may not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import InheritConfig, match_rule
from ..layers import why_closed
from .layers import LayerPlan

_DECOMPOSED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Modules with matrices that no op here computes, and why; the first that fits speaks.
_NOT_SERVED: tuple[tuple[type, str], ...] = (
    (nn.Embedding, "a table that is looked up, not multiplied"),
    (nn.EmbeddingBag, "a table that is looked up, not multiplied"),
    (nn.MultiheadAttention, "a subclass of nn.MultiheadAttention, which may read its packed projection directly"),
    (nn.RNNBase, "a recurrent layer runs in torch's fused kernel, which reads its weights directly"),
    (nn.RNNCellBase, "a recurrent cell reads its weights directly"),
    (nn.Conv1d, "1-D convolution that is not torch's own class"),
    (nn.Conv3d, "3-D convolution; 1-D and 2-D ones are served"),
    (nn.modules.conv._ConvTransposeNd, "transposed convolution"),
    (nn.Bilinear, "bilinear: two inputs"),
)
# What runs a model on several devices: names and files would be the wrapper's, not the model's.
_WRAPPERS: dict[type, str] = {nn.DataParallel: "module", nn.parallel.DistributedDataParallel: "module"}
# What torch.nn.utils leaves in place of `weight`, which is then made of it at every call; and what ends that.
_MADE_OF = {
    ("weight_g", "weight_v"): ("weight_norm", "torch.nn.utils.remove_weight_norm(layer)"),
    ("weight_orig", "weight_mask"): ("pruning", "torch.nn.utils.prune.remove(layer, 'weight')"),
    ("weight_orig", "weight_u"): ("spectral_norm", "torch.nn.utils.remove_spectral_norm(layer)"),
}


def candidates(model: nn.Module, config: InheritConfig) -> list[tuple[LayerPlan, Any]]:
    """Every linear and 2-D convolution of `model` with the rule that applies to it (None: the budget decides); and, to
    be seen with the reason why they stay, its other matrices.

    Raises:
        ValueError: no layer can be factorised, or a rule or exclusion names nothing.
    """
    found = [(name, module) for name, module in model.named_modules() if _kind(module)]
    names = [name for name, _ in found]
    if found:
        check_matches(config, names)
    shared = _shared(model)
    pairs = [_candidate(name, module, config, shared) for name, module in found]
    others = [(layer, None) for layer in _others(model)]
    if not any(layer.selected for layer, _ in pairs):
        raise ValueError(_nothing(model, [layer for layer, _ in (*pairs, *others)]))
    return pairs + others


def check_teacher(model: Any) -> None:
    """Raise TypeError or ValueError, naming the tensor, for a teacher without weights that can be read and decomposed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the teacher is {type(model).__name__}, expected an nn.Module")
    for wrapper, inner in _WRAPPERS.items():
        if isinstance(model, wrapper):
            raise ValueError(f"the teacher is wrapped in {wrapper.__name__}; pass what is inside, teacher.{inner}")
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "the teacher is compiled; pass what it was made from, teacher._orig_mod, and compile the result"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"the teacher's {name!r} is on the meta device and has no values; load its weights first")
        if tensor.is_inference():
            raise ValueError(
                f"the teacher's {name!r} was made under torch.inference_mode(), so that nothing can be derived from it; "
                "build or load the model outside of it"
            )
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None) if _kind(module) else None
        if weight is not None and weight.dtype in _DECOMPOSED and not bool(weight.isfinite().all()):
            raise ValueError(f"the teacher's {name}.weight holds NaN or infinity and cannot be decomposed")


def _nothing(model: nn.Module, layers: list[LayerPlan]) -> str:
    """Why nothing can be inherited: every reason with how many matrices it keeps."""
    reasons = Counter(layer.reason for layer in layers).most_common()
    why = "; ".join(f"{count} × {reason}" for reason, count in reasons[:4]) or "it has no matrix at all"
    return f"model ({type(model).__name__}) has no nn.Linear or nn.Conv2d that can be factorised ({why})"


def _others(model: nn.Module) -> list[LayerPlan]:
    """The matrices outside of linear layers and 2-D convolutions, with the reason why they stay dense."""
    layers = []
    for name, module in model.named_modules():
        if _kind(module):
            continue
        for own, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2 or len(parameter) < 2 or parameter[0].numel() < 2:
                continue
            layer = LayerPlan(f"{name}.{own}".lstrip("."), "other", (len(parameter), parameter[0].numel()), bias=False)
            layers.append(layer.keep_dense(_why_not_served(module, parameter), fixed=True))
    return layers


def _why_not_served(module: nn.Module, parameter: nn.Parameter) -> str:
    closed = why_closed(module)
    if closed is not None:
        return closed
    for kind, why in _NOT_SERVED:
        if isinstance(module, kind):
            return why
    if parameter.dim() == 3 and "expert" in type(module).__name__.lower():
        return f"the weights of {len(parameter)} experts in one tensor, which {type(module).__name__} reads directly"
    return f"{type(module).__name__} reads it directly: only nn.Linear and nn.Conv2d are replaced"


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
    if isinstance(module, nn.Linear):
        return "linear"
    return "conv2d" if isinstance(module, nn.Conv2d) else None


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


def _candidate(name: str, module: Any, config: InheritConfig, shared: Mapping[str, str]) -> tuple[LayerPlan, Any]:
    kind = _kind(module) or ""
    weight = module.weight
    rows, columns = weight.shape[0], weight[0].numel() if weight.numel() else 0
    layer = LayerPlan(name, kind, (rows, columns), getattr(module, "bias", None) is not None)
    if kind == "conv2d":
        layer.kernel_size = tuple(module.kernel_size)
    impossible = _impossible(name, module, shared)
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


def _impossible(name: str, module: Any, shared: Mapping[str, str]) -> str | None:
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} is a subclass: its owner may read the weight directly"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return _made_of(module)
    if module.weight.dtype not in _DECOMPOSED:
        return f"weight has dtype {module.weight.dtype}"
    if type(module.weight.data) is not torch.Tensor:
        return f"its weight is a {type(module.weight.data).__name__} (quantised or distributed), no plain tensor"
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


def _made_of(module: nn.Module) -> str:
    parts = {**module._parameters, **module._buffers}
    for names, (what, ending) in _MADE_OF.items():
        if all(name in parts for name in names):
            return f"{what} makes the weight anew at every call; {ending} first"
    return "its weight is no parameter, but made by other code"


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
