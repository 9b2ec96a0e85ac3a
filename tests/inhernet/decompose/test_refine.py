"""Refinement: closer to the teacher on data of both kinds, or nothing at all; only factors move; a run can be resumed."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

import inhernet
from inhernet import InheritConfig, ParamBudget
from inhernet.config import RefineConfig
from inhernet.decompose import Refinement, pieces, refine_blocks, sensitivity
from inhernet.decompose import refine as house
from inhernet.models import resnet20
from inhernet.nn import LowRankModule

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99}
QUICK = RefineConfig(steps=40)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.outer(torch.relu(self.inner(self.norm(x))))


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(*(Block() for _ in range(3)), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        for block in net[:3]:
            block.inner.weight.mul_(3)  # far from linear, and what a block adds is no trifle
            block.outer.weight.mul_(4)
    return net


def rows(seed: int = 1, count: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, 32, generator=torch.Generator().manual_seed(7)) * torch.linspace(2, 0.05, 32)
    return torch.randn(count, 32, generator=generator) @ mix.T


def inherited(teacher: nn.Module, data: list, budget: float = 0.4, **options) -> nn.Module:
    return inhernet.inherit(teacher, InheritConfig(budget=ParamBudget(budget), **options), data, refine=False)


def tokens(seed: int = 0, rows: int = 32, length: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    ids = torch.randint(1, 99, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_output_comes_closer_to_the_teachers_on_data_it_has_not_seen(teacher, heads):
    data = [rows(count=1024)]
    model = inherited(teacher, data, heads=heads)
    before = inhernet.verify(model, teacher, [rows(9)])["output"].relative_error
    report = refine_blocks(model, teacher, data, RefineConfig(steps=200))
    after = inhernet.verify(model, teacher, [rows(9)])["output"].relative_error
    assert after < 0.95 * before
    assert [block.name for block in report.blocks] == ["0", "1", "2"]  # the last layer is cheap and stays dense
    better = [b for b in report.blocks if b.why is None]
    assert all(b.held_out[1] <= b.held_out[0] and b.elsewhere[1] <= b.elsewhere[0] for b in better)
    assert len(better) >= 2


def test_a_report_can_be_read(teacher):
    model = inherited(teacher, [rows()])
    text = str(refine_blocks(model, teacher, [rows()], QUICK))
    assert "error, held out" in text
    assert "of 3 blocks refined in" in text
    assert "→" in text


def test_only_factors_move_and_flags_stay(teacher):
    model = inherited(teacher, [rows()])
    model[0].norm.weight.requires_grad_(False)
    model[1].train()
    taught = state(teacher)
    before, trainable = state(model), [p.requires_grad for p in model.parameters()]
    training = [m.training for m in model.modules()]
    refine_blocks(model, teacher, [rows()], QUICK)
    assert same(state(teacher), taught)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert [m.training for m in model.modules()] == training
    assert all(p.grad is None for p in model.parameters())
    low = {name: module for name, module in model.named_modules() if isinstance(module, LowRankModule)}
    factors = {f"{name}.{own}" for name, module in low.items() for own, _ in module.named_parameters()}
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert moved <= factors


def test_it_repeats_bit_for_bit(teacher):
    first, second = (inherited(teacher, [rows()]) for _ in range(2))
    for model in (first, second):
        refine_blocks(model, teacher, [rows()], QUICK)
    assert same(state(first), state(second))


def test_a_block_that_would_become_worse_keeps_what_it_had(teacher):
    model = inherited(teacher, [rows()])
    before = state(model)
    report = refine_blocks(model, teacher, [rows()], RefineConfig(steps=5, lr=1.0))
    assert same(state(model), before)
    assert all("would rise" in block.why for block in report.blocks)
    assert "0 of 3 blocks refined" in str(report)


def test_data_unlike_the_calibration_data_is_guarded_too(teacher, monkeypatch):
    """Without the second guard the block is refined; with an error there that rises it is not."""
    errors = iter([{"held out": 0.5, "elsewhere": 0.5}, {"held out": 0.4, "elsewhere": 0.6}])
    better = {"held out": 0.1, "elsewhere": 0.1}
    model = inherited(teacher, [rows()])
    monkeypatch.setattr(sensitivity.Judge, "errors", lambda self: next(errors, better))
    report = refine_blocks(model, teacher, [rows()], RefineConfig(steps=2))
    assert report.blocks[0].why == "the network's error on other data would rise (0.5000 → 0.6000)"
    assert report.blocks[1].why is None


def test_a_loss_that_overflows_changes_nothing():
    teacher = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2)))
    model = inhernet.inherit(teacher, InheritConfig(budget=ParamBudget(0.4)))
    before = state(model)
    report = refine_blocks(model, teacher, [rows() * 1e21], QUICK)
    assert same(state(model), before)
    assert "NaN or infinite" in report.blocks[0].why


def test_padded_tokens_do_not_matter():
    torch.manual_seed(0)
    teacher = transformers.BertModel(transformers.BertConfig(**SMALL, initializer_range=0.2)).eval()
    results = []
    for filling in (0, 57):
        batches = [tokens(seed) for seed in range(4)]
        model = inherited(teacher, batches)
        for batch in batches:
            batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], filling)
        report = refine_blocks(model, teacher, batches, QUICK)
        results.append([block.held_out for block in report.blocks[:3]])
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(results[1]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5", "vit"])
def test_transformers_of_every_structure(kind):
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, initializer_range=0.2)
        teacher, batches = transformers.LlamaForCausalLM(config), [tokens(seed) for seed in range(4)]
    elif kind == "t5":
        config = transformers.T5Config(d_model=48, d_ff=96, d_kv=12, num_layers=2, num_heads=4, vocab_size=99)
        teacher = transformers.T5ForConditionalGeneration(config)
        batches = [{**tokens(seed), "decoder_input_ids": tokens(seed + 9, length=7)["input_ids"]} for seed in range(4)]
    else:
        small = {key: value for key, value in SMALL.items() if key != "vocab_size"}
        config = transformers.ViTConfig(**small, image_size=32, patch_size=8, initializer_range=0.2)
        generator = torch.Generator().manual_seed(0)
        teacher = transformers.ViTModel(config)
        batches = [{"pixel_values": torch.randn(32, 3, 32, 32, generator=generator)} for _ in range(4)]
    model = inherited(teacher.eval(), batches, 0.5)
    layers = sum(isinstance(module, LowRankModule) for module in model.modules())
    report = refine_blocks(model, teacher, batches, QUICK)
    assert sum(block.layers for block in report.blocks) == layers
    assert sum(block.why is None for block in report.blocks) > len(report.blocks) / 2
    assert teacher.config.to_dict() == model.config.to_dict()  # the cache's switch is back


def test_convolutions_with_batchnorm():
    torch.manual_seed(0)
    teacher = resnet20(num_classes=10, in_channels=1).eval()
    batches = [torch.randn(32, 1, 16, 16) for _ in range(4)]
    model = inhernet.inherit(teacher, InheritConfig(budget=ParamBudget(0.5)), batches, batchnorm=False, refine=False)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = refine_blocks(model, teacher, batches, QUICK)
    assert any(block.why is None for block in report.blocks)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_half_precision_is_refined_in_float32_and_stays_half(teacher):
    half = copy.deepcopy(teacher).bfloat16()
    model = inherited(half, [rows().bfloat16()])
    report = refine_blocks(model, half, [rows().bfloat16()], RefineConfig(steps=100))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert any(block.why is None for block in report.blocks)
    assert model(rows().bfloat16()).isfinite().all()


def test_a_time_limit_ends_it(teacher):
    model = inherited(teacher, [rows()])
    started = time.monotonic()
    report = refine_blocks(model, teacher, [rows()], RefineConfig(steps=10**6, seconds=1.0))
    assert time.monotonic() - started < 20
    assert all(0 < block.steps < 10**6 for block in report.blocks)


def test_an_interrupted_run_goes_on_where_it_was(teacher, tmp_path, monkeypatch):
    config = RefineConfig(steps=40, state=str(tmp_path / "blocks"))
    whole, stopped = (inherited(teacher, [rows()]) for _ in range(2))
    expected = refine_blocks(whole, teacher, [rows()], RefineConfig(steps=40))
    write, trained = house._Saved.write, []

    def write_and_stop(self, index, block, report):
        write(self, index, block, report)
        if index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(house._Saved, "write", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        refine_blocks(stopped, teacher, [rows()], config)
    monkeypatch.setattr(house._Saved, "write", write)
    train = house._Block._train
    monkeypatch.setattr(house._Block, "_train", lambda self, *a: trained.append(self.name) or train(self, *a))
    fresh = inherited(teacher, [rows()])
    report = refine_blocks(fresh, teacher, [rows()], config)
    assert trained == ["2"]
    assert same(state(fresh), state(whole))
    assert report.blocks == expected.blocks


def test_a_block_that_is_interrupted_keeps_what_it_had(teacher, monkeypatch):
    model = inherited(teacher, [rows()])
    before, steps = state(model), []
    relative = house._relative

    def stopped(y, target):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return relative(y, target)

    monkeypatch.setattr(house, "_relative", stopped)
    with pytest.raises(KeyboardInterrupt):
        refine_blocks(model, teacher, [rows()], QUICK)
    assert same(state(model), before)


@pytest.mark.parametrize("harm", ["other data", "damaged"])
def test_what_another_run_left_is_not_taken_over(teacher, tmp_path, harm):
    config = RefineConfig(steps=20, state=str(tmp_path))
    refine_blocks(inherited(teacher, [rows()]), teacher, [rows()], config)
    data = [rows(5)] if harm == "other data" else [rows()]
    if harm == "damaged":
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:100])
    model, fresh = (inherited(teacher, [rows()]) for _ in range(2))
    refine_blocks(model, teacher, data, config)
    refine_blocks(fresh, teacher, data, RefineConfig(steps=20))
    assert same(state(model), state(fresh))


def test_inherit_refines_where_it_has_calibration_data_unless_told_not_to(teacher, tmp_path):
    plan = inhernet.plan(teacher, InheritConfig(budget=ParamBudget(0.4)), [rows()])
    plain, refined = (inhernet.inherit(teacher, plan, refine=choice) for choice in (False, QUICK))
    assert plain.inhernet_refinement is None
    assert isinstance(refined.inhernet_refinement, Refinement)
    errors = [inhernet.verify(model, teacher, [rows(9)])["output"].relative_error for model in (refined, plain)]
    assert errors[0] < errors[1]
    plan.save(tmp_path)
    assert inhernet.inherit(teacher, inhernet.Plan.load(tmp_path)).inhernet_refinement is None  # no data in a file
    assert inhernet.inherit(teacher, inhernet.Plan.load(tmp_path), [rows()], refine=QUICK).inhernet_refinement


def test_what_cannot_be_refined_is_an_error(teacher):
    with pytest.raises(ValueError, match="no low-rank layer"):
        refine_blocks(teacher, teacher, [rows()])
    with pytest.raises(ValueError, match="needs 2 at least"):
        refine_blocks(inherited(teacher, [rows()]), teacher, [rows()[:1]])
    one = [rows()[:1]]
    with pytest.warns(UserWarning, match="holds 1 sample,"):
        model = inhernet.inherit(teacher, InheritConfig(), one)
    assert model.inhernet_refinement is None  # by default it is left out
    with pytest.raises(ValueError, match="needs 2 at least"):  # asked for it is an error
        inhernet.inherit(teacher, InheritConfig(init="svd"), one, refine=QUICK)
    with pytest.raises(ValueError, match="holds NaN or infinity.*; the batch itself is finite, so the model"):
        refine_blocks(inherited(teacher, [rows()]), teacher, [rows() * 1e25])
    with pytest.raises(ValueError, match="RefineConfig.lr is 2"):
        RefineConfig(lr=2)
    with pytest.raises(ValueError, match="RefineConfig.seconds"):
        RefineConfig(seconds=0)


def test_words_in_another_order_and_images_over_each_other():
    generator = torch.Generator().manual_seed(0)
    batch = tokens()
    other = pieces.unlike(batch, generator)
    real = batch["attention_mask"].bool()
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    assert torch.equal(other["input_ids"][~real], batch["input_ids"][~real])
    assert torch.equal(other["input_ids"][real].sort().values, batch["input_ids"][real].sort().values)
    assert torch.equal(other["attention_mask"], batch["attention_mask"])
    images = torch.randn(4, 3, 8, 8)
    assert not torch.equal(pieces.unlike(images, generator), images)
    assert pieces.unlike(images, generator).shape == images.shape


class Routed(nn.Module):
    """Which rows the second layer gets, the first one decides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return torch.zeros_like(x).masked_scatter((x[:, :1] > 0).expand_as(x), self.second(x[x[:, 0] > 0]))


def test_a_layer_that_gets_other_rows_than_the_teachers_is_left():
    torch.manual_seed(0)
    teacher = Routed().eval()
    data = [torch.randn(64, 32) for _ in range(2)]
    plain = inhernet.inherit(teacher, InheritConfig(budget=inhernet.UniformRank(2)), data, refine=False)
    model = inhernet.inherit(teacher, InheritConfig(budget=inhernet.UniformRank(2)), data, refine=RefineConfig(steps=3))
    second = next(block for block in model.inhernet_refinement.blocks if block.name == "second")
    assert "rows where the teacher's block computes" in second.why
    assert torch.equal(model.second.down, plain.second.down)
