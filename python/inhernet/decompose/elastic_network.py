"""One network for several budgets: nested levels of rank, made together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..budgets import ParamBudget
from ..budgets.allocate import grid_of, params
from ..budgets.nested import nested_ranks
from ..checks import is_number, refuse
from ..config import InheritConfig, RefineConfig
from ..layers import open_layers
from ..nn import LowRankModule
from .batches import reusable
from .batchnorm import reestimate_batchnorm
from .conversion import inherit
from .layers import LayerPlan
from .levels import Level, Levels, at_level, attach, remember_batchnorm, set_level
from .planning import factors_of, fixed_by_rule, plan
from .plans import Plan
from .refine import refined_if


def elastic(
    teacher: nn.Module,
    levels: Sequence[float] = (0.75, 0.5, 0.3),
    config: InheritConfig | None = None,
    calibration: Iterable[Any] | None = None,
    output_fn: Callable[[Any], Any] | None = None,
    *,
    refine: RefineConfig | bool = True,
) -> nn.Module:
    """An inherited network that computes at several budgets, each a prefix of its ranks in the same tensors.

    Directions are in the order of what they keep, and ranks are given out from the smallest level up, each layer's growing
    with the level. With calibration data, blocks are refined for all levels together: at each step the largest, the
    smallest and one between (the sandwich rule, Yu and Huang, ICCV 2019), each on what the network itself computes at that
    level. Where no rank pays at a larger level, the dense layer is kept beside the factors of the smaller ones, so that the
    whole may hold more than its largest level computes with.

    Args:
        teacher: the trained network; untouched.
        levels: shares of the dense parameters of the selected layers, as `ParamBudget`'s.
        config: as for `plan`; its budget is not used.
        calibration, output_fn, refine: as for `inherit`.

    Returns:
        A model at its largest level, with `inhernet_levels`. `set_level(model, i)` and `with at_level(model, i)` switch;
        `cut(model, i)` is an ordinary model of one level; `save` and `load` keep all of them.

    Raises:
        ValueError: levels that are no shares, or a smallest one that cannot be met; what `plan` and `inherit` raise.

    Example:
        >>> teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> model = elastic(teacher, (0.8, 0.4))
        >>> [level.params for level in model.inhernet_levels]
        [6528, 3200]
    """
    shares = _shares(levels)
    calibration = None if calibration is None else reusable(calibration)
    base = replace(config or InheritConfig(), budget=ParamBudget(shares[-1]))
    smallest = plan(teacher, base, calibration, output_fn)
    ranks = _nested(smallest, teacher, shares)
    most = {name: max(given.get(name, 0) for given in ranks) for name in ranks[-1]}
    top = replace(smallest, layers=[_at(layer, most.get(layer.name, layer.rank)) for layer in smallest])
    top.config = replace(base, budget=ParamBudget(shares[0]))
    model = inherit(teacher, top, calibration, refine=False)
    counts = [_total(smallest, given) for given in ranks]
    made = [Level(share, given, count) for share, given, count in zip(shares, ranks, counts, strict=True)]
    attach(model, Levels(tuple(made)))
    _fill_dense(model, open_layers(teacher))
    if calibration is not None:
        for number in range(len(made)):
            with at_level(model, number):
                if reestimate_batchnorm(model, calibration):
                    remember_batchnorm(model, number)
    set_level(model, 0)
    done = refined_if(model, teacher, calibration, refine, output_fn)
    setattr(model, "inhernet_refinement", done)  # noqa: B010
    return model


def _shares(levels: Sequence[float]) -> list[float]:
    shares = list(levels) if isinstance(levels, Iterable) else []
    if not shares or not all(is_number(share) and 0 < share <= 1 for share in shares):
        refuse("levels", levels, "one or more shares above 0 and at most 1, such as (0.75, 0.5, 0.3)")
    return sorted({float(share) for share in shares}, reverse=True)


def _nested(smallest: Plan, teacher: nn.Module, shares: list[float]) -> list[dict[str, int]]:
    """Ranks of the elastic layers at each share, in the order of `shares`."""
    config = smallest.config
    free = [layer for layer in smallest.selected if not fixed_by_rule(layer, config)]
    dense = smallest.selected_params[1]
    settled = sum(layer.params for layer in smallest.selected if layer not in free)
    spectra = None
    if config.allocation != "uniform" and all((la.name, "fisher") in (smallest.statistics or {}) for la in free):
        opened = open_layers(teacher)
        effects = smallest.effects
        spectra = {
            la.name: factors_of(smallest, opened, la, "fisher").spectrum * effects.get(la.name, 1.0) ** 0.5
            for la in free
        }
    first = {layer.name: layer.rank for layer in free}
    allowed = [math.floor(share * dense + 1e-6) - settled for share in reversed(shares[:-1])]
    grid = grid_of(config.round_to, config.device)
    larger = nested_ranks(free, first, allowed, spectra, config.break_even, grid, config.rank_step)
    elastic = [name for name, rank in first.items() if rank is not None]  # a layer that is always dense has no levels
    return [{name: ranks[name] or 0 for name in elastic} for ranks in reversed([first, *larger])]


@torch.no_grad()
def _fill_dense(model: nn.Module, opened: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LowRankModule) and module.full is not None:
            full, dense = module.full, opened.get_submodule(name)
            full.load_state_dict({key: tensor.to(module.down.device) for key, tensor in dense.state_dict().items()})


def _at(layer: LayerPlan, rank: int | None) -> LayerPlan:
    return replace(layer, rank=rank, kept=None)


def _total(plan: Plan, ranks: dict[str, int]) -> int:
    """Parameters of the whole network with these ranks."""
    selected = sum(params(layer, ranks.get(layer.name, layer.rank or 0) or None) for layer in plan.selected)
    return plan.model_params - plan.selected_params[1] + selected
