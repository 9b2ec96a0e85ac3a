"""Ranks given out by what the output feels, as measured: where, when, kept and used again."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import inhernet
from inhernet import InheritConfig, ParamBudget
from inhernet.decompose import Plan, scene


class Parallel(nn.Module):
    """Two equal layers side by side; a steep function behind the second one, flat where the calibration data lies."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.calm, self.steep = nn.Linear(32, 32), nn.Linear(32, 32)
        self.steep.weight.data.copy_(self.calm.weight.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        calm, steep = self.calm(x), self.steep(x)
        target = (x @ self.calm.weight.detach().T + self.steep.bias).detach()
        # Its first order is 0.3: the currency sees nothing else. The error itself costs its square.
        return torch.cat([calm, 0.3 * steep + 3 * (steep - target).square()], -1)


def rows() -> list[torch.Tensor]:
    return list(torch.randn(128, 32, generator=torch.Generator().manual_seed(1)).split(32))


def ranks(plan: Plan) -> dict[str, int]:
    return {layer.name: layer.rank for layer in plan.factorised}


def test_what_the_first_order_does_not_see_is_measured():
    teacher = Parallel().eval()
    plain = inhernet.plan(teacher, InheritConfig(budget=ParamBudget(0.5), allocation="fisher"), rows())
    corrected = inhernet.plan(teacher, InheritConfig(budget=ParamBudget(0.5)), rows())
    assert not plain.effects
    assert corrected.effects["steep"] > 2 * corrected.effects["calm"]
    assert ranks(corrected)["steep"] > ranks(plain)["steep"]
    errors = []
    for plan in (plain, corrected):
        model = inhernet.inherit(teacher, plan, refine=False)
        with torch.no_grad():
            errors.append(float(sum((model(x) - teacher(x)).square().sum() for x in rows())))
    assert errors[1] < errors[0]


def test_measured_once_for_several_budgets_and_kept_in_files(tmp_path, monkeypatch):
    teacher = Parallel().eval()
    first = inhernet.plan(teacher, InheritConfig(budget=ParamBudget(0.5)), rows())
    first.save(tmp_path)
    monkeypatch.setattr(scene.PlanScene, "_measured_effects", lambda self: pytest.fail("measured again"))
    config = InheritConfig(budget=ParamBudget(0.4))
    again = [inhernet.plan(teacher, config, statistics=plan) for plan in (first, Plan.load(tmp_path))]
    assert again[0].effects == again[1].effects == first.effects
    assert ranks(again[0]) == ranks(again[1])
    model = inhernet.inherit(teacher, first, refine=False)
    assert model.inhernet_plan.effects == first.effects


class Endless(torch.utils.data.IterableDataset):
    """A loader of it has no length: `bool` of it is an error."""

    def __iter__(self):
        return iter(torch.cat(rows()))


def test_a_loader_without_a_length():
    loader = torch.utils.data.DataLoader(Endless(), batch_size=32)
    plan = inhernet.plan(Parallel().eval(), InheritConfig(budget=ParamBudget(0.5)), loader)
    assert plan.effects


def test_a_layer_that_was_not_measured_does_not_cost_the_others_their_effect(tmp_path):
    teacher = Parallel().eval()
    inhernet.plan(teacher, InheritConfig(budget=ParamBudget(0.5), rules={"calm": 8}), rows()).save(tmp_path)
    first = Plan.load(tmp_path)
    plain = inhernet.plan(teacher, InheritConfig(budget=ParamBudget(0.5), allocation="fisher"), statistics=first)
    first.effects = {"steep": 3.0}
    again = inhernet.plan(teacher, InheritConfig(budget=ParamBudget(0.5)), statistics=first)
    assert again.effects == {"steep": 3.0}
    assert ranks(again)["steep"] > ranks(plain)["steep"]


def test_plans_without_effects_load_and_damaged_ones_are_refused(tmp_path):
    plan = inhernet.plan(Parallel().eval(), InheritConfig(budget=ParamBudget(0.5)), rows())
    plan.save(tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    del data["effects"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert Plan.load(tmp_path).effects == {}
    for wrong in ([1], {"calm": 0}, {"calm": "x"}, {"calm": -1.0}):
        (tmp_path / "plan.json").write_text(json.dumps({**data, "effects": wrong}))
        with pytest.raises(ValueError, match="'effects' is .*expected positive numbers"):
            Plan.load(tmp_path)


def test_not_with_batchnorm():
    teacher = inhernet.models.cifar_resnet(8, num_classes=10, in_channels=1, widths=[8, 8, 16, 32])
    plan = inhernet.plan(teacher, InheritConfig(budget=ParamBudget(0.5)), [torch.randn(16, 1, 8, 8) for _ in range(2)])
    assert plan.effects == {}
