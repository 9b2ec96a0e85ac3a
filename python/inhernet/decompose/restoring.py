"""Rank given back to an inherited network, where it hurts most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..budgets.allocate import grid_of
from ..budgets.nested import nested_ranks
from ..checks import need_fraction
from ..config import RefineConfig
from ..layers import open_layers, replaced
from ..nn import LowRankModule, balance, empty_like_dense
from ..pretrained import kept_by_pretrained
from .batches import copied, reusable
from .batchnorm import reestimate_batchnorm
from .conversion import prepare
from .layers import LayerPlan
from .levels import ordinary
from .planning import factors_of
from .refine import refined_if


def restore(
    model: nn.Module,
    teacher: nn.Module,
    share: float,
    calibration: Iterable[Any] | None = None,
    output_fn: Callable[[Any], Any] | None = None,
    *,
    refine: RefineConfig | bool = True,
) -> nn.Module:
    """A larger inherited network: `model` with more rank in the layers that lose most for want of it.

    What the model has learnt stays: each layer keeps its factors and gets the teacher's next directions behind them, as the
    decomposition orders them; the layers are chosen by what these keep for what they cost. With calibration data the blocks
    are then refined again.

    Args:
        model: made by `inhernet.inherit`, refined or trained since; not changed. Of an elastic one its present level counts.
        teacher: the network that it was made from.
        share: of the dense parameters of the selected layers, as `ParamBudget`'s; more than the model has.
        calibration, output_fn, refine: as for `inherit`. Needed where the model was made with calibration data.

    Raises:
        ValueError: the share is not above 0 and at most 1, or not more than the model has; another teacher; no calibration
            data where factors need it.

    Example:
        >>> teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> small = inhernet.inherit(teacher, inhernet.InheritConfig(budget=inhernet.ParamBudget(0.3)))
        >>> larger = restore(small, teacher, 0.6)
        >>> small[0].rank, larger[0].rank
        (9, 19)
    """
    need_fraction("share", share)
    model = ordinary(model)
    before: Any = getattr(model, "inhernet_plan", None)
    if before is None or not before.factorised:
        raise ValueError("model has no plan with a factorised layer; make it with inhernet.inherit")
    calibration = None if calibration is None else reusable(calibration)
    plan = before.bare()
    prepare(plan, teacher, calibration, output_fn)
    opened = open_layers(teacher)
    after, dense = plan.selected_params
    allowed = math.floor(share * dense + 1e-6)
    if allowed <= after:
        raise ValueError(
            f"share is {share}, {allowed:,} parameters, but the model has {after:,} ({after / dense:.3f}) already"
        )
    wanted = _larger(plan, opened, allowed - (after - sum(layer.params for layer in plan.factorised)))
    result = copied(model)
    for layer in plan.factorised:
        old, rank = layer.rank or 1, wanted[layer.name]
        if rank > old:
            layer.rank, layer.kept = rank, None
            down, up = factors_of(plan, opened, layer).take(rank)
            module = _grown(
                result.get_submodule(layer.name), opened.get_submodule(layer.name), layer, down[old:], up[:, old:]
            )
            result = replaced(result, layer.name, module)
    if calibration is not None:
        reestimate_batchnorm(result, calibration)
    result.inhernet_plan = plan.bare()
    result.inhernet_refinement = refined_if(result, teacher, calibration, refine, output_fn)
    return kept_by_pretrained(result)


def _larger(plan: Any, opened: nn.Module, allowed: float) -> dict[str, int]:
    layers, config = plan.factorised, plan.config
    spectra = None
    if all(layer.init == "fisher" for layer in layers):
        spectra = {}
        for layer in layers:
            # Asked for at the largest rank that it may get, so that it is decomposed once.
            most = replace(layer, rank=max(layer.rank, layer.limit(config.break_even) - 1))
            spectra[layer.name] = factors_of(plan, opened, most).spectrum * plan.effects.get(layer.name, 1.0) ** 0.5
    ranks = {layer.name: layer.rank for layer in layers}
    grid = grid_of(config.round_to, config.device)
    found = nested_ranks(layers, ranks, [allowed], spectra, config.break_even, grid, config.rank_step, False)[0]
    return {name: rank for name, rank in found.items() if rank is not None}


@torch.no_grad()
def _grown(old: Any, dense: Any, layer: LayerPlan, down: Tensor, up: Tensor) -> LowRankModule:
    """The module with more directions behind its own; every head gets the same ones, and no gate looks at them yet."""
    module: Any = empty_like_dense(dense, layer.rank or 1, **layer.form)
    down, up = balance(down.double(), up.double())
    rank = old.rank
    module.down[:rank], module.up[..., :rank] = old.down, old.up
    module.down[rank:] = down.reshape(module.down[rank:].shape)
    module.up[..., rank:] = up
    if old.bias is not None:
        module.bias.copy_(old.bias)
    if old.gated:
        module.gate.weight.zero_()
        module.gate.weight[:, :rank] = old.gate.weight
        module.gate.bias.copy_(old.gate.bias)
    result: LowRankModule = module.to(old.down.dtype).train(old.training)
    return result
