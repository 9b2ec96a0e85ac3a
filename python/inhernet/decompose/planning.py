"""`plan`: choose layers and ranks without changing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..budgets import EnergyBudget, UniformRank, UniformRatio
from ..budgets.allocate import grid_of
from ..budgets.base import Decision
from ..budgets.uniform import at_ratio
from ..config import InheritConfig, match_rule
from ..layers import open_layers
from .batches import device_of, reusable
from .calibration import Key, collect_moments
from .factorise import Factors, Moments, plain_factors, weighted_factors
from .layers import LayerPlan
from .plans import Plan, weights_hash
from .scene import PlanScene
from .selection import candidates, check_teacher, hits

NEEDS = ("activation", "fisher")


def plan(
    model: nn.Module,
    config: InheritConfig | None = None,
    calibration: Iterable[Any] | None = None,
    output_fn: Callable[[Any], Any] | None = None,
    *,
    statistics: Plan | None = None,
    example_inputs: Any = None,
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
        example_inputs: a batch as the network will be called with, for budgets of multiply-accumulates or time (default: the
            first of calibration).

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
    digest = weights_hash(model)
    if statistics is not None:
        _reusable_statistics(statistics, calibration, digest)
    return planned(model, config, digest, calibration, output_fn, statistics, example_inputs)


def planned(
    model: nn.Module,
    config: InheritConfig,
    digest: str,
    calibration: Iterable[Any] | None = None,
    output_fn: Callable[[Any], Any] | None = None,
    statistics: Plan | None = None,
    example_inputs: Any = None,
) -> Plan:
    """`plan` of a model that was looked at. Without data and spectra, shapes suffice: it may be on meta."""
    total = sum(p.numel() for p in model.parameters())
    model = open_layers(model)
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
        not measured and _allocation(config, default_init) == "fisher" and _shares(config) and default_init != "fisher"
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
    result.effects = {} if statistics is None else statistics.effects
    result.times = {} if statistics is None else statistics.times
    for layer, _ in chosen:
        needed = missing_moments(layer, moments)
        if needed:
            raise ValueError(f"layer {layer.name!r}: {needed}")
    free = [(layer, rule) for layer, rule in chosen if _explicit(layer, rule, config)]
    _spend(result, model, [layer for layer, _ in free], default_init, example_inputs)
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


def _shares(config: InheritConfig) -> bool:
    """Whether the budget is one for all layers together."""
    return not isinstance(config.budget, (UniformRank, UniformRatio, EnergyBudget))


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
    fisher_ranks = _shares(config) and config.allocation == "fisher"
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


def fixed_by_rule(layer: LayerPlan, config: InheritConfig) -> bool:
    """Whether a rule of the configuration has decided the layer's rank."""
    key = match_rule(config.rules, layer.name)
    return key is not None and _size_in(config.rules[key]) is not None


def _size_in(rule: Any) -> int | float | None:
    """The rank or the ratio that a rule asks for."""
    return rule.get("rank", rule.get("ratio")) if isinstance(rule, Mapping) else rule


def _explicit(layer: LayerPlan, rule: Any, config: InheritConfig) -> bool:
    """Apply a rank or ratio a rule asks for; True if the rule leaves the rank to the budget."""
    rule = _size_in(rule)
    if rule is None:
        return True
    if isinstance(rule, int):
        problem = layer.refusal(rule, config.break_even)
        if problem and config.break_even:
            raise ValueError(
                f"rules: layer {layer.name!r}: {problem}; ask for a smaller rank, None (dense), or break_even=False"
            )
        _decide(layer, rule, config)
    else:
        _decide(layer, at_ratio(layer, rule, config.break_even, grid_of(config.round_to, config.device)), config)
    return False


def _decide(layer: LayerPlan, decision: Decision, config: InheritConfig) -> None:
    problem = decision if isinstance(decision, str) else layer.refusal(decision, config.break_even)
    if problem:
        layer.keep_dense(problem)
    elif isinstance(decision, int):
        layer.rank = decision


def _spend(result: Plan, model: nn.Module, layers: list[LayerPlan], default_init: str, example_inputs: Any) -> None:
    config = result.config
    shared = _allocation(config, default_init) == "fisher"
    scene = PlanScene(result, model, layers, shared, factors_of, example_inputs)
    decisions = config.budget.spend(scene)
    for layer in layers:
        if layer.name in decisions:
            _decide(layer, decisions[layer.name], config)
    for layer in result.factorised:
        layer.kept = _kept(result, layer)


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
