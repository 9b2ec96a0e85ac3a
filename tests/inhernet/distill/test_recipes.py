"""The two recipes, and the figures of a network on a loader."""

from __future__ import annotations

import copy
import math

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


class Passes(nn.Module):
    """Gives what it gets, so that a batch is its logits."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return x


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_evaluate_hides_no_row_that_is_not_finite(value: float) -> None:
    # Seen: accuracy 0.5 and agreement 1.0, because the argmax of a row with NaN is some class too.
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    broken = logits.clone()
    broken[1, 0] = value
    target = torch.tensor([0, 1, 0])

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return broken

    ours = evaluate(Broken(), [(logits, target)], Passes())
    assert ours["nonfinite_rows"] == 1
    assert "teacher_nonfinite_rows" not in ours
    assert ours["teacher_accuracy"] == 1.0
    assert all(not math.isfinite(ours[name]) for name in ("accuracy", "kl", "agreement"))
    theirs = evaluate(Passes(), [(logits, target)], Broken())
    assert theirs["teacher_nonfinite_rows"] == 1
    assert theirs["accuracy"] == 1.0
    assert all(math.isnan(theirs[name]) for name in ("teacher_accuracy", "kl", "agreement"))


def test_evaluate_leaves_out_ignored_and_padded_rows() -> None:
    # Seen: accuracy 0.4 (ignored rows in the denominator), KL over padding.
    logits = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [9.0, 0.0]], [[0.0, 3.0], [0.0, 9.0], [0.0, 9.0]]])
    labels = torch.tensor([[0, 1, -100], [1, -100, -100]])

    class Padded(Passes):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return torch.where(x.abs() > 5, torch.nan, x)

    found = evaluate(Padded(), [(logits, labels)], Padded())
    assert found["accuracy"] == found["teacher_accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())))
    assert (found["kl"], found["agreement"]) == (0.0, 1.0)
    masked = evaluate(Padded(), [{"x": logits, "attention_mask": (labels >= 0).long()}], Padded())
    assert masked == {"kl": 0.0, "agreement": 1.0}


def test_evaluate_takes_probabilities_as_targets() -> None:
    logits = torch.randn(5, 3)
    soft = torch.softmax(torch.randn(5, 3), -1)
    found = evaluate(Passes(), [(logits, soft)])
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, soft)), rel=1e-5)
    assert found["accuracy"] == float((logits.argmax(-1) == soft.argmax(-1)).double().mean())


def test_evaluate_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="no rows"):
        evaluate(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="no targets"):
        evaluate(nn.Linear(2, 2), [torch.randn(3, 2)])
    with pytest.raises(ValueError, match="no rows"):
        evaluate(nn.Linear(2, 2), [(torch.randn(0, 2), torch.randint(2, (0,)))])
    once = iter([(torch.randn(3, 2), torch.randint(2, (3,)))])
    evaluate(nn.Linear(2, 2), once)
    with pytest.raises(ValueError, match="no rows.*generator"):
        evaluate(nn.Linear(2, 2), once)
    with pytest.raises(ValueError, match="3 rows, but each is left out"):
        evaluate(nn.Linear(2, 2), [(torch.randn(3, 2), torch.full((3,), -100))])
    with pytest.raises(TypeError, match="loader is Tensor"):
        evaluate(nn.Linear(2, 2), torch.randn(3, 2))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.tensor([0, 2]), "batch 2: target has the class 2, expected 0 to 1"),
        (torch.tensor([0, -1]), "batch 2: target has the class -1"),
        (torch.tensor([0, 1, 1]), r"batch 2: target has shape \(3,\), expected \(2,\)"),
        (torch.rand(2), r"batch 2: target is torch.float32 of shape \(2,\)"),
    ],
)
def test_evaluate_names_the_batch_of_a_wrong_target(target: torch.Tensor, words: str) -> None:
    # Seen: IndexError `Target 2 is out of bounds`, which ends a process on a GPU.
    good = (torch.randn(2, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=words):
        evaluate(nn.Linear(2, 2), [good, (torch.randn(2, 2), target)])
