"""The losses against their equations written out, and the published objectives' numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from inhernet.distill import OBJECTIVES, Objective, kd_loss, kl_to_teacher


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def by_hand(z: torch.Tensor, t: torch.Tensor, temperature: float) -> torch.Tensor:
    p = torch.softmax(t.double() / temperature, -1)
    q = torch.softmax(z.double() / temperature, -1)
    return (p * (p / q).log()).sum(-1).mean() * temperature**2


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_loss_is_the_divergence_from_the_teacher(shape: tuple[int, ...], temperature: float) -> None:
    z, t = torch.randn(shape), torch.randn(shape)
    assert torch.allclose(kd_loss(z, t, temperature).double(), by_hand(z, t, temperature), rtol=1e-5)
    # The direction matters: KL(teacher ‖ student) is not KL(student ‖ teacher).
    assert not torch.allclose(kd_loss(z, t, temperature).double(), by_hand(t, z, temperature), rtol=1e-3)


def test_kd_loss_ignores_constants_and_sends_no_gradient_to_the_teacher() -> None:
    z, t = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    kd_loss(z, t + 5.0, 2.0).backward()
    assert z.grad is not None
    assert z.grad.abs().max() > 0
    assert t.grad is None
    assert torch.allclose(kd_loss(z, t + 5.0), kd_loss(z, t), atol=1e-6)
    assert float(kl_to_teacher(z, z).detach()) == pytest.approx(0.0, abs=1e-7)


def test_gradient_size_does_not_depend_on_the_temperature() -> None:
    z, t = torch.randn(64, 10, requires_grad=True), torch.randn(64, 10)
    norms = [torch.autograd.grad(kd_loss(z, t, temperature), z)[0].norm() for temperature in (4.0, 16.0)]
    assert 0.7 < float(norms[0] / norms[1]) < 1.4


def test_low_precision_logits_are_judged_in_float32() -> None:
    z, t = torch.randn(32, 10).bfloat16(), torch.randn(32, 10).bfloat16()
    assert kd_loss(z, t).dtype == torch.float32
    assert torch.allclose(kd_loss(z, t).double(), by_hand(z, t, 1.0), rtol=1e-5)


def test_empty_batch_costs_nothing() -> None:
    assert float(kd_loss(torch.empty(0, 5), torch.empty(0, 5))) == 0.0


@pytest.mark.parametrize(
    ("name", "ce", "kd", "temperature"), [("published", 0.1, 9, 2), ("published-demo", 0.3, 0.7, 7)]
)
def test_published_objectives(name: str, ce: float, kd: float, temperature: float) -> None:
    z, t, y = torch.randn(8, 5), torch.randn(8, 5), torch.randint(5, (8,))
    expected = ce * F.cross_entropy(z, y).double() + kd * by_hand(z, t, temperature)
    assert torch.allclose(OBJECTIVES[name](z, y, t).double(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: kd_loss(torch.randn(2, 3), torch.randn(2, 4)), "teacher_logits has shape (2, 4), expected (2, 3)"),
        (lambda: kd_loss(torch.randn(2, 3), torch.randn(2, 3), 0.0), "temperature is 0.0"),
        (lambda: Objective(ce=-1.0), "ce is -1.0"),
        (lambda: Objective(ce=0.0, kd=0.0), "ce and kd are both 0"),
        (lambda: Objective(temperature=float("nan")), "temperature is nan"),
        (lambda: OBJECTIVES["default"](torch.randn(2, 3), torch.tensor([0, 1]), None), "no teacher"),
        (lambda: OBJECTIVES["task"](torch.randn(2, 3), None, None), "no target"),
    ],
)
def test_bad_input_is_named(make, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        make()


def test_ignored_targets_leave_the_cross_entropy_alone() -> None:
    # Seen: NaN where every target of a batch is ignored, and with it the advice to lower the learning rate.
    task = OBJECTIVES["task"]
    logits, target = torch.randn(4, 3), torch.tensor([0, -100, 2, -100])
    assert torch.allclose(task(logits, target, None), F.cross_entropy(logits[[0, 2]], target[[0, 2]]))
    assert float(task(logits, torch.full((4,), -100), None)) == 0.0
    soft = torch.softmax(torch.randn(4, 3), -1)
    assert torch.allclose(task(logits, soft, None), F.cross_entropy(logits, soft))
