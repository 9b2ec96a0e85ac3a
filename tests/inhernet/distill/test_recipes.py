"""The two recipes, and the figures of a network on a loader."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from inhernet import InheritConfig, ParamBudget
from inhernet import nn as low_rank
from inhernet.distill import OBJECTIVES, Objective, TrainConfig, evaluate
from inhernet.distill.recipes import inhernet, kd


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def teacher_net() -> nn.Module:
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    with torch.no_grad():  # decided, as a trained network is
        net[4].weight.mul_(20)
    return net


def batches(teacher: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs = torch.randn(8, 32, 12)
    return [(x, teacher(x).argmax(-1)) for x in inputs]


QUIET = {"show_progress": False}


def test_inhernet_inherits_then_trains_everything() -> None:
    teacher = teacher_net()
    data, before = batches(teacher), copy.deepcopy(teacher.state_dict())
    plan, loss = InheritConfig(heads=2, budget=ParamBudget(0.4), rank_step=1), Objective(ce=0, kd=1, temperature=1)
    start, _ = inhernet(teacher, data, plan, TrainConfig(epochs=0), loss, **QUIET)
    model, result = inhernet(teacher, data, plan, TrainConfig(epochs=20, lr=0.02), loss, **QUIET)
    gated = [module for module in model.modules() if isinstance(module, low_rank.GatedLowRankLinear)]
    assert gated and all(not torch.equal(p, dict(start.named_parameters())[n]) for n, p in model.named_parameters())
    assert len(result.history) == 21
    assert evaluate(model, data, teacher)["kl"] < 0.8 * evaluate(start, data, teacher)["kl"]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_published_objective_and_a_ready_plan() -> None:
    import inhernet as front

    teacher = teacher_net()
    data = batches(teacher)
    plan = front.plan(teacher, InheritConfig(budget=ParamBudget(0.6)), calibration=data)
    model, _ = inhernet(teacher, data, plan, TrainConfig(epochs=1, lr=0.001), OBJECTIVES["published"], **QUIET)
    assert model.inhernet_plan.layers == plan.layers


def test_kd_brings_a_student_to_its_teacher() -> None:
    teacher = teacher_net()
    data = batches(teacher)
    student = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    before = evaluate(student, data, teacher)["kl"]
    kd(student, teacher, data, TrainConfig(epochs=30, lr=0.1), **QUIET)
    assert evaluate(student, data, teacher)["kl"] < 0.3 * before


def test_evaluate_counts_rows_not_batches() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        model.bias.zero_()
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    ragged = [(right.repeat(9, 1), torch.zeros(9, dtype=torch.long)), (wrong, torch.zeros(1, dtype=torch.long))]
    model.train()
    found = evaluate(model, ragged, copy.deepcopy(model))
    assert found["accuracy"] == pytest.approx(0.9)
    assert found["teacher_accuracy"] == pytest.approx(0.9)
    assert found["agreement"] == 1.0
    assert found["kl"] == pytest.approx(0.0, abs=1e-6)
    assert model.training


def test_evaluate_takes_sequences_and_mappings() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    data = [{"x": torch.randn(2, 7, 3), "labels": torch.randint(5, (2, 7))}]
    assert set(evaluate(Tagger(), data)) == {"accuracy", "loss"}
    assert set(evaluate(Tagger(), [torch.randn(4, 3)], Tagger())) == {"kl", "agreement"}


def test_evaluate_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="no rows"):
        evaluate(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="no targets"):
        evaluate(nn.Linear(2, 2), [torch.randn(3, 2)])
