"""Levels of one network: prefixes of its ranks, nested in the same tensors, switched at run time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..budgets.base import DENSE
from ..layers import replaced
from ..nn import LowRankModule
from ..pretrained import kept_by_pretrained
from .batches import copied
from .layers import LayerPlan

VERSION = 1
_BATCHNORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Level:
    """`share`: of the selected layers' dense parameters that it may use. `ranks`: how many of each layer's are in use, 0 where
    it is dense. `params`: of the whole network with these ranks."""

    share: float
    ranks: dict[str, int]
    params: int


@dataclass(frozen=True)
class Levels:
    """The levels of an elastic network, largest first; `print` shows them."""

    levels: tuple[Level, ...]

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: int) -> Level:
        return self.levels[index]

    def __iter__(self) -> Iterator[Level]:
        return iter(self.levels)

    def __str__(self) -> str:
        lines = [f"level {i}: {level.share:.0%}, {level.params:,} parameters" for i, level in enumerate(self.levels)]
        return "\n".join(lines)

    def to_json(self) -> str:
        levels = [{"share": level.share, "ranks": level.ranks, "params": level.params} for level in self.levels]
        return json.dumps({"version": VERSION, "levels": levels}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Levels:
        """The inverse of `to_json`. Raises ValueError for anything else."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("levels"), list):
            raise ValueError(f"levels: expected an object with version {VERSION} and a list of levels")
        levels = []
        for number, entry in enumerate(data["levels"]):
            if not isinstance(entry, dict) or set(entry) != {"share", "ranks", "params"}:
                raise ValueError(f"levels: entry {number} is not an object of share, ranks and params")
            ranks = entry["ranks"]
            whole = isinstance(ranks, dict) and all(type(rank) is int and rank >= 0 for rank in ranks.values())
            if not whole or type(entry["params"]) is not int or not isinstance(entry["share"], (int, float)):
                raise ValueError(f"levels: entry {number} holds no numbers where they are expected")
            levels.append(Level(float(entry["share"]), ranks, entry["params"]))
        if not levels:
            raise ValueError("levels: the list is empty")
        return cls(tuple(levels))


def attach(model: nn.Module, levels: Levels) -> None:
    """Make `model` elastic: check the levels against its modules, give layers that are dense at a level an empty dense layer,
    and each BatchNorm statistics for each level.

    Raises:
        ValueError: a level names a layer that is not low-rank, or more ranks than it has.
    """
    modules = dict(model.named_modules())
    plan: Any = getattr(model, "inhernet_plan", ())
    biased = {layer.name: layer.bias for layer in plan}
    for number, level in enumerate(levels):
        for name, rank in level.ranks.items():
            module = modules.get(name)
            if not isinstance(module, LowRankModule) or rank > module.rank:
                has = f"rank {module.rank}" if isinstance(module, LowRankModule) else "no low-rank layer"
                raise ValueError(f"levels: level {number} wants rank {rank} of {name!r}, but there is {has}")
            if rank == 0 and module.full is None:
                module._modules["full"] = _empty_dense(module, biased.get(name, False))
    for norm in _norms(model):
        for number in range(len(levels)):
            for kind in ("running_mean", "running_var"):
                norm.register_buffer(f"level{number}_{kind}", getattr(norm, kind).clone())
    setattr(model, "inhernet_levels", levels)  # noqa: B010  (mypy takes a plain assignment for a tensor)


def set_level(model: nn.Module, level: int) -> None:
    """Let an elastic network compute at one of its levels from now on; 0 is the largest. Nothing is copied but BatchNorm's
    statistics, which each level has of its own: a BERT of MiniLM's size takes 0.3 ms.

    Raises:
        ValueError: the model has no levels, or not this one.

    Example:
        >>> model = elastic(teacher, (0.75, 0.5, 0.3), calibration=data)  # doctest: +SKIP
        >>> set_level(model, 2)  # doctest: +SKIP
    """
    levels = levels_of(model)
    if type(level) is not int or not 0 <= level < len(levels):
        raise ValueError(f"level is {level!r}, expected 0 to {len(levels) - 1}, 0 the largest")
    if model.__dict__.get("inhernet_level") == level:
        return
    ranks = levels[level].ranks
    for name, module in model.named_modules():
        if name in ranks:
            module.use(ranks[name])
        elif isinstance(module, _BATCHNORM) and module.running_mean is not None:
            _recall(module, level)
    setattr(model, "inhernet_level", level)  # noqa: B010


@contextmanager
def at_level(model: nn.Module, level: int) -> Iterator[None]:
    """At another level inside, back at the former one afterwards.

    Example:
        >>> with at_level(model, 1):  # doctest: +SKIP
        ...     quick = model(x)
    """
    before = model.__dict__.get("inhernet_level", 0)
    set_level(model, level)
    try:
        yield
    finally:
        set_level(model, before)


@torch.no_grad()
def _recall(norm: Any, level: int) -> None:
    """Give a BatchNorm its statistics of a level."""
    norm.running_mean.copy_(getattr(norm, f"level{level}_running_mean"))
    norm.running_var.copy_(getattr(norm, f"level{level}_running_var"))


def remember_batchnorm(model: nn.Module, level: int) -> None:
    """Take what BatchNorm has now for its statistics at a level."""
    for norm in _norms(model):
        getattr(norm, f"level{level}_running_mean").copy_(norm.running_mean)
        getattr(norm, f"level{level}_running_var").copy_(norm.running_var)


def cut(model: nn.Module, level: int | None = None) -> nn.Module:
    """An ordinary inherited model of one level's ranks, for what does not know levels: `optimize`, export, transformers.

    Args:
        model: elastic; not changed.
        level: default: the one it is at.

    Example:
        >>> small = cut(elastic(teacher, (0.75, 0.3), calibration=data), 1)  # doctest: +SKIP
    """
    levels = levels_of(model)
    before: int = model.__dict__.get("inhernet_level", 0)
    level = before if level is None else level
    with at_level(model, level):
        result = copied(model)
    ranks = levels[level].ranks
    for name, module in list(result.named_modules()):
        if isinstance(module, LowRankModule):
            dense = module._modules.pop("full", None)
            if module.leading == 0 and dense is not None:
                result = replaced(result, name, dense)
            else:
                _shorten(module)
    for norm in _norms(result):
        for name in [name for name in norm._buffers if name.startswith("level")]:
            del norm._buffers[name]
    plan: Any = model.inhernet_plan
    layers = [_planned(layer, ranks.get(layer.name, layer.rank)) for layer in plan]
    result.inhernet_plan = replace(plan.bare(), layers=layers)
    for name in ("inhernet_levels", "inhernet_level", "inhernet_refinement"):
        result.__dict__.pop(name, None)
    return kept_by_pretrained(result)


def _planned(layer: LayerPlan, rank: int | None) -> LayerPlan:
    if rank == 0:
        return replace(layer, rank=None, why_dense=DENSE, kept=None)
    return replace(layer, rank=rank, kept=None)


def ordinary(model: nn.Module) -> nn.Module:
    """`cut` at its present level, where a model is elastic; else the model itself."""
    return cut(model) if "inhernet_levels" in model.__dict__ else model


def levels_of(model: nn.Module) -> Levels:
    """The model's levels. Raises ValueError if it has none."""
    found = model.__dict__.get("inhernet_levels")
    if not isinstance(found, Levels):
        raise ValueError("model has no levels; make it with inhernet.elastic")
    return found


def levels_to_visit(model: nn.Module) -> list[int | None]:
    """The levels to visit where something is done at each: None alone for an ordinary model."""
    return list(range(len(levels_of(model)))) if "inhernet_levels" in model.__dict__ else [None]


@contextmanager
def visiting(model: nn.Module, level: int | None) -> Iterator[None]:
    """`at_level`, or nothing for None."""
    if level is None:
        yield
        return
    with at_level(model, level):
        yield


def _empty_dense(module: Any, bias: bool) -> nn.Module:
    """A dense layer of the module's geometry, dtype, device and flags, its parameters uninitialised."""
    like = {"device": module.down.device, "dtype": module.down.dtype}
    if module.down.dim() == 2:
        dense: nn.Module = nn.utils.skip_init(nn.Linear, module.in_features, module.out_features, bias, **like)
    else:
        window = (module.kernel_size, module.stride, module.padding, module.dilation)
        dense = nn.utils.skip_init(nn.Conv2d, module.in_channels, module.out_channels, *window, bias=bias, **like)
    return dense.requires_grad_(module.down.requires_grad).train(module.training)


def _shorten(module: LowRankModule) -> None:
    """Leave the ranks in use, in tensors of their own."""
    rank = module.leading
    if rank is None:
        return

    def own(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().clone(), requires_grad=module.down.requires_grad)

    down, up = own(module.down[:rank]), own(module.up[..., :rank])
    module.down, module.up, module.rank = down, up, rank
    if module.gated:
        module.gate.weight = own(module.gate.weight[:, :rank])
    module.use(None)


def _norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _BATCHNORM) and module.running_mean is not None]
