"""`inherit`: a new model whose planned layers are low-rank modules filled from the teacher."""

from __future__ import annotations

import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InheritConfig, RefineConfig
from ..layers import open_layers, replaced
from ..nn import LowRankModule, empty_like_dense, fill_published_, from_dense
from ..pretrained import kept_by_pretrained
from .batches import copied, reusable
from .batchnorm import check_batchnorm, has_batchnorm, reestimate_batchnorm
from .calibration import collect_moments
from .factorise import random_factors
from .layers import LayerPlan
from .planning import NEEDS, factors_of, missing_moments, plan
from .plans import Plan, weights_hash
from .refine import refined_if
from .selection import check_teacher
from .truncated import truncated_factors


def inherit(
    teacher: nn.Module,
    plan_or_config: Plan | InheritConfig | None = None,
    calibration: Iterable[Any] | None = None,
    output_fn: Callable[[Any], Any] | None = None,
    *,
    check_hash: bool = True,
    batchnorm: bool = True,
    refine: RefineConfig | bool = True,
) -> nn.Module:
    """Convert a teacher. The teacher is untouched; the result keeps its device, dtypes, flags and module names.

    Args:
        teacher: the trained model.
        plan_or_config: a `Plan` (its ranks are followed to the letter), or a configuration, which is planned first.
        calibration: batches as for `plan`. Needed when a configuration or a plan without statistics asks for
            "activation" or "fisher".
        output_fn: as for `plan`, whose own is used where this is None.
        check_hash: refuse a plan made for other weights.
        batchnorm: re-estimate BatchNorm statistics from the calibration batches, or from those the plan was made with
            while it is still in memory (on the digits network: 51–73 % → 95 % before any training). False keeps the
            teacher's: for calibration data that is not like what the teacher was trained on.
        refine: adjust the factors, block by block, to what the teacher's blocks compute (see `refine_blocks`), with the
            calibration batches or those the plan was made with; a `RefineConfig` sets steps, time and a directory to resume
            from. MiniLM at 50 %: cosine 0.90 → 0.96 in three minutes. False: factors as they were decomposed.

    Returns:
        A new model with attributes `inhernet_plan`, the plan without its statistics, and `inhernet_refinement`, what
        refinement did to each block (None without).

    Raises:
        TypeError: the teacher is no `nn.Module`.
        ValueError: the plan is for other weights, was edited into something impossible, or lacks statistics; weights
            or calibration batches with NaN or infinity, by name; what `plan` raises.

    Warns:
        UserWarning: nothing was factorised; fewer than 8 samples; calibration data on which the teacher's own BatchNorm
            statistics are far from those of its training.

    Example:
        >>> from inhernet import UniformRank
        >>> model = inherit(nn.Sequential(nn.Linear(64, 64)), InheritConfig(budget=UniformRank(8)))
        >>> model[0].down.shape
        torch.Size([8, 64])
    """
    calibration = None if calibration is None else reusable(calibration)
    if isinstance(plan_or_config, Plan):
        result = plan_or_config
        prepare(result, teacher, calibration, output_fn, check_hash)
    else:
        result = plan(teacher, plan_or_config, calibration, output_fn)
    opened = open_layers(teacher)
    if not result.factorised:
        why = Counter(layer.reason for layer in result.selected or result).most_common(1)[0]
        warnings.warn(
            f"nothing was factorised, the result is a copy of the teacher: {why[0]} ({why[1]} of {len(result)} layers)",
            stacklevel=2,
        )
    # Open where a layer is factorised; what the plan leaves dense stays as the teacher has it.
    model = copied(open_layers(teacher, [layer.name for layer in result.factorised]))
    for layer in result.factorised:
        model = replaced(model, layer.name, _module(model.get_submodule(layer.name), layer, result, opened))
    batches = result.calibration if calibration is None else calibration
    if batchnorm and batches is not None and result.factorised and reestimate_batchnorm(model, batches):
        check_batchnorm(teacher, batches)
    setattr(model, "inhernet_plan", result.bare())  # noqa: B010  (mypy takes a plain assignment for a tensor)
    if batches is None and result.statistics and result.factorised:
        _warn_of_missing_data(model, bool(refine), batchnorm)
    refinement = None
    if result.factorised:
        refinement = refined_if(model, teacher, batches, refine, output_fn or result.output_fn)
    setattr(model, "inhernet_refinement", refinement)  # noqa: B010
    return kept_by_pretrained(model)


def prepare(
    result: Plan,
    teacher: nn.Module,
    calibration: Iterable[Any] | None,
    output_fn: Callable[[Any], Any] | None,
    check_hash: bool = True,
) -> None:
    """Look that a plan is for this teacher, and collect the statistics that it lacks."""
    check_teacher(teacher)
    _check_hash(result, teacher, check_hash)
    opened = open_layers(teacher)
    _check_shapes(result, opened)
    _complete(result, opened, calibration, output_fn)


def _warn_of_missing_data(model: nn.Module, refine: bool, batchnorm: bool) -> None:
    """A plan from a file brings the statistics of its calibration data, not the data."""
    missing = ["blocks are not refined"] * refine
    if batchnorm and has_batchnorm(model):
        missing.append("BatchNorm keeps the teacher's statistics, which do not fit the new weights")
    if missing:
        warnings.warn(
            f"the plan's calibration data is not at hand (a saved plan does not hold it), so {' and '.join(missing)}; pass "
            "calibration= (`inhernet convert --data`), or say that it is meant: refine=False, batchnorm=False",
            stacklevel=3,
        )


def _check_hash(result: Plan, teacher: nn.Module, check_hash: bool) -> None:
    result.check()
    if check_hash and weights_hash(teacher) != result.teacher_hash:
        raise ValueError(
            "plan: teacher_hash does not match the teacher's weights: the plan was made for another model or another "
            "state of it; plan again, or pass check_hash=False if the ranks are meant for these weights"
        )


def _check_shapes(result: Plan, opened: nn.Module) -> None:
    modules = dict(opened.named_modules())
    for layer in result.factorised:
        module = modules.get(layer.name)
        found = (
            None if not isinstance(module, (nn.Linear, nn.Conv2d)) else (len(module.weight), module.weight[0].numel())
        )
        if found != layer.shape:
            raise ValueError(f"plan: layer {layer.name!r} has shape {layer.shape}, but the teacher has {found} there")


def _complete(
    result: Plan, teacher: nn.Module, calibration: Iterable[Any] | None, output_fn: Callable[[Any], Any] | None
) -> None:
    """Collect what the plan's layers need and the plan does not carry."""
    lacking = {layer.name: missing_moments(layer, result.statistics) for layer in result.factorised}
    lacking = {name: sentence for name, sentence in lacking.items() if sentence}
    if not lacking:
        return
    if calibration is None:
        name, sentence = next(iter(lacking.items()))
        raise ValueError(f"plan carries no statistics for {len(lacking)} layers, first {name!r}: {sentence}")
    config = result.config
    collected = collect_moments(
        teacher,
        [(name, result[name].init) for name in lacking],
        calibration,
        output_fn=output_fn,
        projections=config.projections,
        seed=config.seed,
    )
    for (name, _), moments in collected.items():
        if not moments.reached:
            raise ValueError(
                f"layer {name!r}: the calibration data does not reach it; set its rank to None or its init to 'svd'"
            )
    result.statistics = {**(result.statistics or {}), **collected}


def _module(dense: Any, layer: LayerPlan, result: Plan, teacher: nn.Module) -> LowRankModule:
    if layer.init in NEEDS or (layer.init == "svd" and layer.name in result.factors):
        factors = factors_of(result, teacher, layer).take(layer.rank or 1)
        return low_rank_module(dense, layer, result.config, factors)
    return low_rank_module(dense, layer, result.config)


def low_rank_module(
    dense: Any, layer: LayerPlan, config: InheritConfig, factors: tuple[Tensor, Tensor] | None = None
) -> LowRankModule:
    """The module that takes the place of `dense` by its plan, of these factors or of those that the weight alone gives."""
    # A seed per name: a layer's numbers do not depend on which others are converted.
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + zlib.crc32(layer.name.encode()))
    rank = layer.rank or 1  # never None here: only factorised layers come
    form: dict[str, Any] = layer.form
    if layer.init == "published":
        return fill_published_(empty_like_dense(dense, rank, **form), dense, generator)
    if layer.init == "random":
        factors = random_factors(dense.weight.flatten(1), rank, generator)
    elif factors is None:
        factors = truncated_factors(dense.weight.flatten(1), rank).take(rank)
    return from_dense(dense, rank, factors=factors, noise=config.noise, generator=generator, **form)
