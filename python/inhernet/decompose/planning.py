"""`plan`: choose layers and ranks without changing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..config import Budget, EnergyBudget, InheritConfig, ParamBudget, UniformRank, UniformRatio
from ..layers import open_layers
from .allocate import energy_rank, global_ranks, grid_of, ratio_rank, uniform_ranks
from .batches import device_of, reusable
from .calibration import Key, collect_moments
from .factorise import Factors, Moments, plain_factors, weighted_factors
from .layers import LayerPlan
from .plans import Plan, weights_hash
from .selection import candidates, check_teacher, hits

NEEDS = ("activation", "fisher")


def plan(
    model: nn.Module,
    config: InheritConfig | None = None,
    calibration: Iterable[Any] | None = None,
    output_fn: Callable[[Any], Any] | None = None,
    *,
    statistics: Plan | None = None,
) -> Plan:
    """Decide for every linear layer and convolution whether it is factorised, and at which rank. A dry run.

    Packed attention, transposed weights, experts and 1-D convolutions are listed as the layers they are opened into (see
    `inhernet.layers`); matrices of other modules with the reason why they stay dense.

    Args:
        model: the teacher; flags, buffers and gradients are untouched.
        config: defaults to `InheritConfig()`: half of the selected layers' parameters, one head.
        calibration: batches (tensors, tuples whose first element is the input, or dicts of keyword arguments with
            `attention_mask` marking real tokens); 256 varied samples serve. With it `init=None` means "fisher".
        output_fn: what of the model's output init="fisher" preserves (default: every floating tensor of it), e.g.
            `lambda out: out.last_hidden_state`; for a classifier judged by KL, `lambda z: z.softmax(-1).sqrt()`.
        statistics: an earlier plan of the same teacher whose second moments (and data for BatchNorm) are used again, so
            that several budgets cost one pass over the data.

    Returns:
        A `Plan`: print it, edit it, save it, hand it to `inherit`.

    Raises:
        TypeError, ValueError: the model is no `nn.Module`, or its weights are on meta, made under inference mode, NaN.
        ValueError: no layer can be factorised (with the reasons), a pattern without a match, a rule's rank above
            break-even, a budget that cannot be met, an initialisation that needs calibration without it, or a NaN or
            infinity in calibration (with the batch and the layer).

    Example:
        >>> teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan(teacher, InheritConfig(budget=UniformRank(8)))["0"].params
        1088
    """
    config = config or InheritConfig()
    calibration = None if calibration is None else reusable(calibration)
    check_teacher(model)
    config = replace(config, device=config.device or device_of(model).type)
    digest, total = weights_hash(model), sum(p.numel() for p in model.parameters())
    model = open_layers(model)
    if statistics is not None:
        _reusable_statistics(statistics, calibration, digest)
    measured = calibration is not None or statistics is not None
    default_init = config.init or ("fisher" if measured else "svd")
    pairs = candidates(model, config)
    chosen = [(layer, rule) for layer, rule in pairs if layer.selected]
    for layer, rule in chosen:
        _set_form(layer, rule, config, default_init)
    chosen = [(layer, rule) for layer, rule in chosen if layer.selected]
    moments = None if statistics is None else statistics.statistics
    if calibration is not None:
        moments = _collect(model, chosen, config, calibration, output_fn)
    elif (
        not measured
        and _allocation(config, default_init) == "fisher"
        and isinstance(config.budget, ParamBudget)
        and default_init != "fisher"
    ):
        raise ValueError("allocation='fisher' needs calibration data; pass calibration=, or use allocation='uniform'")
    chosen = _drop_unreached(chosen, moments or {})
    names = [layer.name for layer, _ in pairs if layer.kind != "other"]
    matches = {f"rules {k!r}": hits(k, names) for k in config.rules if k != "_default"}
    matches |= {f"exclude {k!r}": hits(k, names) for k in config.exclude}
    result = Plan([layer for layer, _ in pairs], config, digest, total, matches, moments)
    result.calibration = calibration if statistics is None else statistics.calibration
    result.output_fn = output_fn if statistics is None else statistics.output_fn
    if statistics is not None and _shrinkage(config) == _shrinkage(statistics.config):
        result.factors = dict(statistics.factors)
    for layer, _ in chosen:
        needed = missing_moments(layer, moments)
        if needed:
            raise ValueError(f"layer {layer.name!r}: {needed}")
    free = [(layer, rule) for layer, rule in chosen if _explicit(layer, rule, config)]
    _spend(result, model, free, default_init)
    return result


def _reusable_statistics(statistics: Plan, calibration: Iterable[Any] | None, digest: str) -> None:
    if calibration is not None:
        raise ValueError("statistics and calibration are both given; expected one of them")
    if statistics.statistics is None:
        raise ValueError("statistics is a plan that carries none; expected one made with calibration data")
    if statistics.teacher_hash != digest:
        raise ValueError(
            "statistics is a plan for other weights (teacher_hash differs); collect them again with calibration="
        )


def _shrinkage(config: InheritConfig) -> dict[str, float]:
    return {"shrinkage_input": config.shrinkage_input, "shrinkage_output": config.shrinkage_output}


def _set_form(layer: LayerPlan, rule: Any, config: InheritConfig, default_init: str) -> None:
    options = rule if isinstance(rule, Mapping) else {}
    layer.heads = options.get("heads", config.heads)
    layer.gate = layer.heads > 1 if config.gate == "auto" else bool(config.gate) or layer.heads > 1
    layer.head_bias = layer.bias or config.head_bias == "always"
    layer.init = options.get("init", default_init)
    if layer.init in NEEDS and min(layer.shape) > config.max_moment:
        layer.keep_dense(f"min(N, K) = {min(layer.shape)} > max_moment {config.max_moment}").selected = False


def _allocation(config: InheritConfig, default_init: str) -> str:
    if config.allocation != "auto":
        return config.allocation
    return "fisher" if default_init == "fisher" else "uniform"


def _collect(
    model: nn.Module,
    chosen: list[tuple[LayerPlan, Any]],
    config: InheritConfig,
    calibration: Iterable[Any],
    output_fn: Callable[[Any], Any] | None,
) -> dict[Key, Moments] | None:
    fisher_ranks = isinstance(config.budget, ParamBudget) and config.allocation == "fisher"
    inits = {layer.name: {layer.init, "fisher"} if fisher_ranks else {layer.init} for layer, _ in chosen}
    needs = [(name, init) for name, wanted in inits.items() for init in NEEDS if init in wanted]
    if not needs:
        return None
    return collect_moments(
        model,
        needs,
        calibration,
        output_fn=output_fn,
        projections=config.projections,
        seed=config.seed,
    )


def _drop_unreached(chosen: list[tuple[LayerPlan, Any]], statistics: dict[Key, Moments]) -> list[tuple[LayerPlan, Any]]:
    for layer, _ in chosen:
        if not all(statistics[key].reached for key in ((layer.name, init) for init in NEEDS) if key in statistics):
            layer.keep_dense("the calibration data (or its output gradient) does not reach it").selected = False
    return [(layer, rule) for layer, rule in chosen if layer.selected]


def missing_moments(layer: LayerPlan, statistics: dict[Key, Moments] | None) -> str | None:
    """What the layer's initialisation needs and does not have, as a sentence, or None."""
    if layer.init not in NEEDS or (layer.name, layer.init) in (statistics or {}):
        return None
    return f"init={layer.init!r} needs calibration statistics and there are none; pass calibration="


def _explicit(layer: LayerPlan, rule: Any, config: InheritConfig) -> bool:
    """Apply a rank or ratio a rule asks for; True if the rule leaves the rank to the budget."""
    if isinstance(rule, Mapping):
        rule = rule.get("rank", rule.get("ratio"))
    if rule is None:
        return True
    if isinstance(rule, int):
        problem = layer.refusal(rule, config.break_even)
        if problem and config.break_even:
            raise ValueError(
                f"rules: layer {layer.name!r}: {problem}; ask for a smaller rank, None (dense), or break_even=False"
            )
        _assign(layer, rule, config)
    else:
        _assign_ratio(layer, rule, config)
    return False


def _assign(layer: LayerPlan, rank: int | None, config: InheritConfig, why: str = "the budget leaves it dense") -> None:
    problem = why if rank is None else layer.refusal(rank, config.break_even)
    if problem:
        layer.keep_dense(problem)
    else:
        layer.rank = rank


def _assign_ratio(layer: LayerPlan, ratio: float, config: InheritConfig) -> None:
    rank = ratio_rank(layer, ratio, config.break_even, grid_of(config.round_to, config.device))
    if rank == 0:
        layer.keep_dense(f"not even rank 1 fits in {100 * ratio:g} % of {layer.dense_params:,} parameters")
    else:
        _assign(
            layer,
            rank,
            config,
            f"at {100 * ratio:g} % of its parameters the rank reaches break-even {layer.break_even}",
        )


def _spend(result: Plan, model: nn.Module, pairs: list[tuple[LayerPlan, Any]], default_init: str) -> None:
    layers, config = [layer for layer, _ in pairs], result.config
    budget: Budget = config.budget
    grid = grid_of(config.round_to, config.device)
    if isinstance(budget, UniformRank):
        for layer in layers:
            _assign(layer, budget.rank if config.round_to == "auto" else grid.below(budget.rank), config)
    elif isinstance(budget, UniformRatio):
        for layer in layers:
            _assign_ratio(layer, budget.ratio, config)
    elif isinstance(budget, EnergyBudget):
        for layer in layers:
            rank = energy_rank(factors_of(result, model, layer).spectrum, budget.energy)
            _assign(layer, grid.above(rank), config)
    else:
        _spend_params(result, model, layers, budget, default_init)
    for layer in result.factorised:
        layer.kept = _kept(result, layer)


def _spend_params(
    result: Plan, model: nn.Module, layers: list[LayerPlan], budget: ParamBudget, default_init: str
) -> None:
    config, grid = result.config, grid_of(result.config.round_to, result.config.device)
    after, before = result.selected_params
    settled = after - sum(layer.dense_params for layer in layers)  # what explicit rules have already spent
    if budget.of == "model":
        allowed = budget.target(result.model_params) - (result.model_params - before) - settled
    else:
        allowed = budget.target(before) - settled
    if not layers:
        return  # the rules have fixed every rank: nothing is left to give out
    if _allocation(config, default_init) == "fisher":
        odd = next((layer for layer in layers if (layer.name, "fisher") not in (result.statistics or {})), None)
        if odd is not None:
            raise ValueError(
                f"layer {odd.name!r} has init={odd.init!r}, whose energy is no currency of the global allocation; "
                "set allocation='fisher' to measure every layer, or allocation='uniform'"
            )
        spectra = {layer.name: factors_of(result, model, layer, "fisher").spectrum for layer in layers}
        ranks = global_ranks(layers, spectra, allowed, config.break_even, grid, config.rank_step)
    else:
        ranks = uniform_ranks(layers, allowed, config.break_even, grid)
    for layer in layers:
        _assign(layer, ranks[layer.name], config)


def factors_of(result: Plan, model: nn.Module, layer: LayerPlan, init: str | None = None) -> Factors:
    """Factors of one layer under an initialisation, computed once and kept at the ranks that can be used."""
    init = init or (layer.init if layer.init in NEEDS else "svd")
    known = result.factors.get(layer.name)
    if known is not None and known[0] == init and len(known[1].down) >= (layer.rank or 1):
        return known[1]
    keep = max(layer.limit(result.config.break_even) - 1, layer.rank or 1, 1)
    weight = model.get_parameter(f"{layer.name}.weight".lstrip(".")).detach().flatten(1)
    if init == "svd":
        factors = plain_factors(weight, keep)
    else:
        moments = (result.statistics or {})[layer.name, init]
        factors = weighted_factors(weight, moments, keep=keep, **_shrinkage(result.config))
    result.factors[layer.name] = (init, factors)
    return factors


def _kept(result: Plan, layer: LayerPlan) -> float | None:
    known = result.factors.get(layer.name)
    if known is None or known[0] != layer.init:
        return None
    squares = known[1].spectrum.square()
    return float(squares[: layer.rank].sum() / squares.sum()) if float(squares.sum()) > 0 else 1.0
