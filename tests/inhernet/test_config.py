"""Configurations survive JSON, cannot be changed, and refuse bad values by name."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from inhernet.budgets import EnergyBudget, ParamBudget, UniformRank, UniformRatio, budget_from_dict
from inhernet.config import InheritConfig, match_rule

FULL = InheritConfig(
    heads=3,
    budget=ParamBudget(400_000, of="model"),
    init="fisher",
    gate=True,
    rules={"a.b": None, "re:a.*": 16, "c": 0.25, "_default": {"ratio": 0.5, "heads": 2, "init": "svd"}},
    exclude=("re:.*head", "stem"),
    round_to=8,
    device="cuda",
    min_params=1000,
    break_even=False,
    head_bias="always",
    noise=0.01,
    seed=7,
    layers=("conv2d",),
)


@pytest.mark.parametrize("budget", [UniformRank(4), UniformRatio(0.5), EnergyBudget(0.9), ParamBudget(0.3, "model")])
def test_json_round_trip(budget):
    config = dataclasses.replace(FULL, budget=budget)
    again = InheritConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again.rules["_default"]["heads"] == 2
    assert type(again.budget) is type(budget)


def test_copies_and_pickles():
    assert copy.deepcopy(FULL) == FULL
    assert pickle.loads(pickle.dumps(FULL)) == FULL


def test_a_configuration_without_what_came_later_reads():
    data = FULL.to_dict()
    del data["device"]
    assert InheritConfig.from_dict(data) == dataclasses.replace(FULL, device=None)


def test_filter_fn_says_that_it_is_not_serialised():
    config = InheritConfig(filter_fn=lambda module, name: True)
    assert config.to_dict()["filter_fn"] == "not serialised"
    assert InheritConfig.from_json(config.to_json()).filter_fn is None


def test_is_immutable_also_through_the_callers_dict():
    rules = {"a": {"rank": 4}}
    config = InheritConfig(rules=rules)
    rules["a"]["rank"] = 99
    rules["b"] = None
    assert dict(config.rules["a"]) == {"rank": 4}
    assert "b" not in config.rules
    with pytest.raises(TypeError):
        config.rules["c"] = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.heads = 2


BAD = [
    ({"heads": 0}, "heads is 0"),
    ({"heads": True}, "heads is True"),
    ({"heads": 2, "gate": False}, "gate is False"),
    ({"budget": 0.5}, "budget is 0.5"),
    ({"init": "pca"}, "init is 'pca'"),
    ({"gate": "yes"}, "gate is 'yes'"),
    ({"rules": {"a": 0}}, r"rules\['a'\] is 0"),
    ({"rules": {"a": 1.5}}, r"rules\['a'\] is 1.5"),
    ({"rules": {"a": {"rank": 4, "ratio": 0.5}}}, "rank or ratio, not both"),
    ({"rules": {"a": {"ranks": 4}}}, "'ranks'"),
    ({"rules": {"a": "dense"}}, r"rules\['a'\] is 'dense'"),
    ({"rules": {"re:(": 4}}, "valid regular expression"),
    ({"rules": [("a", 4)]}, "rules is"),
    ({"exclude": "encoder"}, "exclude is 'encoder'"),
    ({"exclude": ("re:[",)}, "valid regular expression"),
    ({"filter_fn": 3}, "filter_fn is 3"),
    ({"round_to": 0}, "round_to is 0"),
    ({"round_to": "fast"}, "round_to is 'fast'"),
    ({"device": "cuda:0"}, "device is 'cuda:0'"),
    ({"min_params": -1}, "min_params is -1"),
    ({"break_even": 1}, "break_even is 1"),
    ({"head_bias": "none"}, "head_bias is 'none'"),
    ({"noise": float("nan")}, "noise is nan"),
    ({"shrinkage_output": -1.0}, "shrinkage_output is -1.0"),
    ({"seed": -1}, "seed is -1"),
    ({"layers": ("conv3d",)}, "layers is"),
    ({"allocation": "greedy"}, "allocation is 'greedy'"),
    ({"projections": 0}, "projections is 0"),
]


@pytest.mark.parametrize("fields, message", BAD, ids=[m for _, m in BAD])
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        InheritConfig(**fields)
    assert "expected" in str(error.value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: UniformRank(0), "UniformRank.rank is 0"),
        (lambda: UniformRank(2.0), "UniformRank.rank is 2.0"),
        (lambda: UniformRatio(0.0), "UniformRatio.ratio is 0.0"),
        (lambda: EnergyBudget(1.2), "EnergyBudget.energy is 1.2"),
        (lambda: ParamBudget(1.5), "ParamBudget.amount is 1.5"),
        (lambda: ParamBudget(-3), "ParamBudget.amount is -3"),
        (lambda: ParamBudget(0.5, of="layers"), "ParamBudget.of is 'layers'"),
        (lambda: budget_from_dict({"kind": "magic"}), "kind"),
        (lambda: budget_from_dict({"kind": "params", "amount": 0.5, "off": "model"}), "'off'"),
        (lambda: budget_from_dict({"kind": "params"}), "'amount'"),
    ],
)
def test_bad_budgets_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_json_is_named():
    data = FULL.to_dict()
    with pytest.raises(ValueError, match="version is 2"):
        InheritConfig.from_dict({**data, "version": 2})
    with pytest.raises(ValueError, match="'surprise'"):
        InheritConfig.from_dict({**data, "surprise": 1})


def test_param_budget_counts():
    assert ParamBudget(0.5).target(1001) == 500
    assert ParamBudget(1.0).target(1001) == 1001
    assert ParamBudget(700).target(1001) == 700


def test_rule_precedence():
    rules = {"_default": 1, "re:a.*": 2, "re:.*b": 3, "a.b": 4}
    assert match_rule(rules, "a.b") == "a.b"
    assert match_rule(rules, "a.c") == "re:a.*"
    assert match_rule(rules, "xb") == "re:.*b"
    assert match_rule(rules, "xa.") == "_default"  # the whole name must match, not a part of it
    assert match_rule({"a": 1}, "b") is None
