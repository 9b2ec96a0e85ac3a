"""The trainer: resuming to the bit, signals, the untouched teacher, parameter groups, accumulation, averaging."""

from __future__ import annotations

import copy
import math
import os
import random
import signal
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import inhernet
from inhernet.distill import OBJECTIVES, Interrupted, TrainConfig, fit
from inhernet.distill.state import FILE, load_state
from inhernet.distill.trainer import learning_rate, parameter_groups
from inhernet.nn import from_dense


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class RandomLoader:
    """Shuffles by torch's generator and distorts batches by all three, as augmentations do."""

    def __init__(self, batches: int = 5, size: int = 6) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(batches * size, 3, 6, 6, generator=generator)
        self.y = torch.randint(4, (batches * size,), generator=generator)
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self):
        for rows in torch.randperm(len(self.x)).chunk(self.batches):
            scale = 1 + 0.1 * random.random() + 0.1 * numpy.random.rand() + 0.1 * float(torch.randn(()))
            yield self.x[rows] * scale, self.y[rows]


def small_net(seed: int = 0, heads: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    conv = from_dense(nn.Conv2d(3, 8, 3, padding=1), 4, heads=heads)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(288, 4))


def teacher_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def figures(model: nn.Module) -> dict[str, float]:
    loader = RandomLoader()
    return {"loss": F.cross_entropy(model(loader.x), loader.y).item()}


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def train(model: nn.Module, config: TrainConfig, **options):
    return fit(model, RandomLoader(), config, loss=OBJECTIVES["default"], show_progress=False, **options)


def stop_after(batches: int, number: int):
    """A `forward` that raises the signal while a batch is in flight."""
    count = 0

    def forward(model: nn.Module, batch) -> torch.Tensor:
        nonlocal count
        if model.training:
            count += 1
            if count == batches:
                os.kill(os.getpid(), number)
        return model(batch[0])

    return forward


CONFIGS = {
    "sgd": TrainConfig(epochs=3, lr=0.02, keep_best="min:loss", clip_norm=1.0),
    "adamw": TrainConfig(epochs=3, optimizer="adamw", lr=0.003, ema=0.8, accumulate=2, seed=5),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stops", [[1], [4, 3], [5], [7, 5, 1]])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path: Path, name: str, stops: list[int]) -> None:
    # Seen failing: without replaying the epoch's drawing, without the optimiser's slots, without the step counter.
    config, teacher = CONFIGS[name], teacher_net()
    random.seed(3), numpy.random.seed(3)
    straight = small_net()
    wanted = train(straight, config, teacher=teacher, validate=figures)

    random.seed(3), numpy.random.seed(3)
    for index, batches in enumerate(stops):
        with pytest.raises(Interrupted):
            forward = stop_after(batches, signal.SIGTERM)
            net = small_net(9 if index else 0)
            train(net, config, teacher=teacher, validate=figures, checkpoint_dir=tmp_path, forward=forward)
        random.seed(99), numpy.random.seed(99), torch.manual_seed(99)
    resumed = small_net(9)  # other weights: all that counts is in the checkpoint
    got = train(resumed, config, teacher=teacher, validate=figures, checkpoint_dir=tmp_path)
    assert got.resumed_from is not None
    assert same(straight, resumed)
    drop = [{k: v for k, v in record.items() if k != "seconds"} for record in got.history]
    assert drop == [{k: v for k, v in record.items() if k != "seconds"} for record in wanted.history]
    assert got.best_epoch == wanted.best_epoch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_handlers_come_back(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        train(
            small_net(),
            TrainConfig(epochs=2),
            checkpoint_dir=tmp_path,
            teacher=teacher_net(),
            forward=stop_after(2, number),
        )
    assert caught.value.signum == number
    assert (tmp_path / FILE).exists()
    assert signal.getsignal(number) is before
    _, plain = load_state(tmp_path)
    assert (plain["epoch"], plain["position"]) == (0, 2)


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, second = small_net(), small_net(2)
    config = TrainConfig(epochs=2)
    train(first, config, teacher=teacher_net(), checkpoint_dir=tmp_path)
    result = train(second, config, teacher=teacher_net(), checkpoint_dir=tmp_path, forward=lambda *_: 1 / 0)
    assert same(first, second)
    assert len(result.history) == 3


class OtherLoader(RandomLoader):
    """The same sizes, other data."""

    def __init__(self) -> None:
        super().__init__()
        self.x = self.x + 1


def mean_squares(output, target, guidance) -> torch.Tensor:
    return (output - guidance).square().mean()


def stopped(directory: Path, **options) -> None:
    with pytest.raises(Interrupted):
        train(small_net(), TrainConfig(epochs=2), checkpoint_dir=directory, forward=stop_after(2, 15), **options)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    # Seen: another objective, teacher or data went on from the checkpoint without a word.
    teacher = teacher_net()
    stopped(tmp_path, teacher=teacher)

    def refused(words: str, config: TrainConfig | None = None, net: nn.Module | None = None, **options) -> None:
        model = net or small_net(3)
        before = copy.deepcopy(model)
        options = {"loader": RandomLoader(), "loss": OBJECTIVES["default"], "teacher": teacher} | options
        with pytest.raises(ValueError, match=f"holds another run .*{words}.*resume=False .*--restart"):
            fit(
                model, config=config or TrainConfig(epochs=2), checkpoint_dir=tmp_path, show_progress=False, **options
            )  # fmt: skip
        assert same(model, before)

    refused(r"lr was 0\.01, is 0\.5", TrainConfig(epochs=2, lr=0.5))
    refused("layers or plan differ", net=small_net(heads=2))
    refused("objective was 'Objective.ce=0.1.*is 'Objective.ce=0.3", loss=OBJECTIVES["published-demo"])
    refused("objective was 'Objective.*mean_squares", loss=mean_squares)
    refused("teacher's class or weights differ", teacher=None, loss=OBJECTIVES["default"])
    shifted = copy.deepcopy(teacher)
    shifted[1].running_mean += 1e-3  # a buffer: parameters are not all that a teacher computes with
    refused("teacher's class or weights differ", teacher=shifted)
    refused("batches was 5, is 4", loader=RandomLoader(4))
    refused("the data's first batch differs", loader=OtherLoader())

    train(small_net(3), TrainConfig(epochs=2), teacher=teacher, checkpoint_dir=tmp_path)
    train(small_net(heads=2), TrainConfig(epochs=1), teacher=teacher, checkpoint_dir=tmp_path, resume=False)
    (tmp_path / FILE).write_bytes(b"\x80\x04junk")
    with pytest.raises(ValueError, match="not a readable training checkpoint"):
        train(small_net(), TrainConfig(epochs=1), teacher=teacher, checkpoint_dir=tmp_path)


def test_an_inherited_network_goes_on_from_its_own_start_only(tmp_path: Path) -> None:
    teacher = teacher_net()
    plan = inhernet.plan(teacher, inhernet.InheritConfig())
    stopped_net, other = inhernet.inherit(teacher, plan), inhernet.inherit(teacher, plan)
    options = {"teacher": teacher, "checkpoint_dir": tmp_path}
    with pytest.raises(Interrupted):
        train(stopped_net, TrainConfig(epochs=2), forward=stop_after(2, 15), **options)
    with torch.no_grad():
        other[4].bias.add_(1e-3)
    with pytest.raises(ValueError, match="the weights that the model starts from differ"):
        train(other, TrainConfig(epochs=2), **options)
    train(inhernet.inherit(teacher, plan), TrainConfig(epochs=2), **options)


class Restless(RandomLoader):
    """Draws from a generator of its own that nobody can put back."""

    def __init__(self) -> None:
        super().__init__()
        self.own = numpy.random.default_rng()

    def __iter__(self):
        for x, y in super().__iter__():
            yield x + self.own.random(), y


def test_data_that_does_not_repeat_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"loss": OBJECTIVES["default"], "teacher": teacher_net(), "checkpoint_dir": tmp_path}
    with pytest.raises(Interrupted):
        fit(small_net(), Restless(), TrainConfig(epochs=1), forward=stop_after(2, 15), show_progress=False, **options)
    result = fit(small_net(), Restless(), TrainConfig(epochs=1), **options)
    assert result.resumed_from == 2
    assert "cannot be compared" in capsys.readouterr().out


def test_a_dataloader_with_its_own_generator_goes_on_as_before(tmp_path: Path) -> None:
    def loader() -> torch.utils.data.DataLoader:
        data = RandomLoader()
        own = torch.Generator().manual_seed(4)
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(data.x, data.y), 6, shuffle=True, generator=own
        )

    nets = [small_net(), small_net(), small_net(2)]
    options = {"loss": OBJECTIVES["default"], "teacher": teacher_net(), "show_progress": False}
    fit(nets[0], loader(), TrainConfig(epochs=1), **options)
    with pytest.raises(Interrupted):
        fit(nets[1], loader(), TrainConfig(epochs=1), checkpoint_dir=tmp_path, forward=stop_after(2, 15), **options)
    fit(nets[2], loader(), TrainConfig(epochs=1), checkpoint_dir=tmp_path, **options)
    assert same(nets[0], nets[2])


def test_a_resumed_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Seen: not a word, the bar began in its middle.
    options = {"loss": OBJECTIVES["default"], "teacher": teacher_net(), "checkpoint_dir": tmp_path}
    with pytest.raises(Interrupted):
        fit(small_net(), RandomLoader(), TrainConfig(epochs=2), forward=stop_after(7, 15), **options)
    assert "resuming" not in capsys.readouterr().out
    fit(small_net(), RandomLoader(), TrainConfig(epochs=2), **options)
    shown = capsys.readouterr().out
    assert f"resuming in epoch 2 of 2, after batch 2 of 5 (saved 0 s ago in {tmp_path})" in shown
    fit(small_net(), RandomLoader(), TrainConfig(epochs=2), **options)
    assert "all 2 epochs are done (saved" in capsys.readouterr().out


def test_failed_save_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small_net(), TrainConfig(epochs=1), teacher=teacher_net(), checkpoint_dir=tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("inhernet.distill.state.save_file", full)
    with pytest.raises(OSError, match="no space"):
        train(small_net(), TrainConfig(epochs=1), teacher=teacher_net(), checkpoint_dir=tmp_path, resume=False)
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_teacher_is_untouched_and_in_eval_mode() -> None:
    teacher = teacher_net().train()
    teacher[0].eval()
    flags = [module.training for module in teacher.modules()]
    before, seen = copy.deepcopy(teacher), []
    teacher.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_inference_mode_enabled())))
    train(small_net(), TrainConfig(epochs=2), teacher=teacher)
    assert same(teacher, before)
    assert [module.training for module in teacher.modules()] == flags
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert set(seen) == {(False, True)}
    assert len(seen) == 10


def test_every_epoch_trains_in_train_mode_though_validation_does_not() -> None:
    modes, model = [], small_net().eval()
    model[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    train(model, TrainConfig(epochs=3), teacher=teacher_net(), validate=figures)
    assert modes == [False] + ([True] * 5 + [False]) * 3
    assert not model.training


def test_factors_gates_biases_and_norms_are_not_decayed() -> None:
    model = small_net()
    groups = parameter_groups(model, TrainConfig(weight_decay=0.1, factor_weight_decay=0.01))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decays[id(p)] for name, p in model.named_parameters()}
    assert found == {
        "0.down": 0.01, "0.up": 0.01, "0.bias": 0.0, "0.gate.weight": 0.0, "0.gate.bias": 0.0,
        "1.weight": 0.0, "1.bias": 0.0, "5.weight": 0.1, "5.bias": 0.0,
    }  # fmt: skip


def test_accumulation_equals_the_large_batch() -> None:
    x, y = torch.randn(24, 5), torch.randint(3, (24,))
    small, large = nn.Linear(5, 3), nn.Linear(5, 3)
    large.load_state_dict(small.state_dict())
    halves = [(x[:12], y[:12]), (x[12:], y[12:])]
    for model, batches, accumulate in ((small, halves, 2), (large, [(x, y)], 1)):
        config = TrainConfig(epochs=3, lr=0.1, accumulate=accumulate, clip_norm=0.5)
        fit(model, batches, config, loss=OBJECTIVES["task"], show_progress=False)
    assert torch.allclose(small.weight, large.weight, atol=1e-6)


def test_last_incomplete_accumulation_is_a_mean_too() -> None:
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    one, two = nn.Linear(5, 3), nn.Linear(5, 3)
    two.load_state_dict(one.state_dict())
    for model, accumulate in ((one, 1), (two, 4)):
        config = TrainConfig(epochs=2, lr=0.1, accumulate=accumulate)
        fit(model, [(x, y)], config, loss=OBJECTIVES["task"], show_progress=False)
    assert torch.allclose(one.weight, two.weight, atol=1e-7)


def test_average_and_best_epoch_are_what_the_model_is_left_at() -> None:
    scores = iter([5.0, 3.0, 4.0, 9.0])
    seen: list[dict[str, torch.Tensor]] = []

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"score": next(scores)}

    model = small_net()
    config = TrainConfig(epochs=3, lr=0.05, ema=0.9, keep_best="min:score")
    result = train(model, config, teacher=teacher_net(), validate=validate)
    assert result.best_epoch == 1
    assert all(torch.equal(value, seen[1][key]) for key, value in model.state_dict().items())
    assert not torch.equal(seen[1]["0.up"], seen[2]["0.up"])


def test_best_weights_survive_an_interruption(tmp_path: Path) -> None:
    # Seen failing: with `best` left out of the checkpoint.
    config = TrainConfig(epochs=3, lr=0.05, keep_best="min:score")
    nets, scores = [small_net(), small_net(), small_net(4)], {0: 5.0, 1: 3.0, 2: 4.0, 3: 9.0}

    def validate(epochs: list[int]):
        left = iter(epochs)
        return lambda model: {"score": scores[next(left)]}

    options = {"teacher": teacher_net(), "validate": validate([0, 1, 2, 3])}
    random.seed(0), numpy.random.seed(0)
    train(nets[0], config, **options)
    random.seed(0), numpy.random.seed(0)
    options |= {"checkpoint_dir": tmp_path, "validate": validate([0, 1])}
    with pytest.raises(Interrupted):
        train(nets[1], config, forward=stop_after(7, signal.SIGTERM), **options)
    result = train(nets[2], config, **(options | {"validate": validate([2, 3])}))
    assert result.best_epoch == 1
    assert same(nets[0], nets[2])


def test_a_nan_score_is_never_the_best_and_hides_no_other() -> None:
    # Seen: with NaN at epoch 0, min() stays NaN, and no later epoch was kept.
    for scores, best in (([math.nan, 3.0, 4.0, math.nan], 1), ([5.0, math.nan, 6.0, 7.0], 0)):
        left = iter(scores)
        config = TrainConfig(epochs=3, keep_best="min:score")
        result = train(
            small_net(), config, teacher=teacher_net(), validate=lambda model, left=left: {"score": next(left)}
        )
        assert result.best_epoch == best


def test_schedule_rises_and_falls() -> None:
    config = TrainConfig(lr=1.0, warmup=0.2)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[19] == pytest.approx(1.0) == pytest.approx(max(rates))
    assert rates[60] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates[20:]))


def test_bfloat16_autocast_reaches_model_and_teacher() -> None:
    seen = []
    model, teacher = small_net(), teacher_net()
    model[5].register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    teacher[4].register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    train(model, TrainConfig(epochs=1, amp="bfloat16"), teacher=teacher)
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_callers_generator_is_left_alone_and_the_seed_decides() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    nets = [small_net() for _ in range(3)]
    torch.set_rng_state(state)
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        random.seed(0), numpy.random.seed(0)
        train(net, TrainConfig(epochs=1, seed=seed), teacher=teacher_net_without_drawing())
    assert torch.equal(torch.get_rng_state(), state)
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


def teacher_net_without_drawing() -> nn.Module:
    with torch.random.fork_rng():
        return teacher_net()


def test_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    batches = [(x, (x[:, 0] > 0).long())]
    model = nn.Linear(5, 2)
    result = fit(model, batches, TrainConfig(epochs=30, lr=0.5), loss=OBJECTIVES["task"], show_progress=False)
    assert result.history[-1]["loss"] < 0.5 * result.history[1]["loss"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": -1}, "epochs is -1"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"amp": "float16"}, "amp is 'float16'"),
        ({"keep_best": "loss"}, "keep_best is 'loss'"),
    ],
)
def test_bad_configuration_is_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**options)


def test_bad_runs_are_named() -> None:
    with pytest.raises(ValueError, match="no batch"):
        fit(nn.Linear(2, 2), [], loss=OBJECTIVES["task"], show_progress=False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(nn.Linear(2, 2).requires_grad_(False), [], loss=OBJECTIVES["task"])
    with pytest.raises(FloatingPointError, match="epoch 1, batch 1"):
        fit(nn.Linear(2, 2), [(torch.full((1, 2), torch.inf), torch.tensor([0]))], loss=OBJECTIVES["task"])
    with pytest.raises(ValueError, match="epoch 1, batch 2: target has the class 4"):
        good, bad = (torch.randn(1, 2), torch.tensor([0])), (torch.randn(1, 2), torch.tensor([4]))
        fit(nn.Linear(2, 2), [good, bad], loss=OBJECTIVES["task"], show_progress=False)
    with pytest.raises(ValueError, match="loader is a list_iterator, which can be read only once, and epochs is 5"):
        fit(nn.Linear(2, 2), iter([good]), loss=OBJECTIVES["task"])
    with pytest.raises(TypeError, match="loader is Tensor"):
        fit(nn.Linear(2, 2), torch.randn(3, 2), loss=OBJECTIVES["task"])
    with pytest.raises(FloatingPointError, match="the teacher's output is not finite"):
        broken = nn.Linear(2, 2)
        nn.init.constant_(broken.weight, torch.nan)
        fit(nn.Linear(2, 2), [good], loss=OBJECTIVES["default"], teacher=broken, show_progress=False)
    with pytest.raises(ValueError, match="keep_best names 'kl'"):
        train(small_net(), TrainConfig(keep_best="min:kl"), validate=figures)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(clip: float | None) -> None:
    # Seen: a finite loss whose gradient is infinite, then NaN weights, and only in the next step an error.
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model)
    with pytest.raises(FloatingPointError, match="the gradient's norm is (nan|inf) in epoch 1, batch 1"):
        fit(
            model,
            [(torch.randn(3, 2), torch.tensor([0, 1, 1]))],
            TrainConfig(epochs=1, clip_norm=clip),
            loss=lambda output, *_: (output - output.detach()).abs().sqrt().sum(),
            show_progress=False,
        )
    assert same(model, before)
