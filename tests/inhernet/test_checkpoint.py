"""Saving and loading: the same function comes back, whatever was killed in between, and no file runs code."""

from __future__ import annotations

import json
import os
import pickle
import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import inhernet
from inhernet import architecture, models

SMALL = {"depth": 8, "widths": [4, 4, 8, 16], "num_classes": 5, "in_channels": 1}
FILES = {"config.json", "plan.json", "model.safetensors"}


def converted(heads: int = 2, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    teacher = models.cifar_resnet(**SMALL)
    config = inhernet.InheritConfig(budget=inhernet.UniformRank(2), heads=heads, break_even=False, **options)
    model = inhernet.inherit(teacher, config)
    for module in model.modules():
        if isinstance(module, inhernet.nn.Gate):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return converted()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    inhernet.save(model, tmp_path / "model")
    return tmp_path / "model"


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Round trips


@pytest.mark.parametrize(
    "options", [{"heads": 1}, {"heads": 3}, {"heads": 1, "gate": True, "head_bias": "always"}], ids=str
)
def test_round_trip(options, tmp_path):
    source = converted(**options)
    inhernet.save(source, tmp_path / "m")
    loaded = inhernet.load(tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} == FILES
    assert os.listdir(tmp_path) == ["m"]
    same(loaded, source)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded(x), source(x))
    assert not any(m.training for m in loaded.modules())
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.inhernet_factory == source.inhernet_factory
    assert loaded.inhernet_plan.to_json() == source.inhernet_plan.to_json()
    inhernet.save(loaded, tmp_path / "again")
    same(inhernet.load(tmp_path / "again"), source)


def test_dense_model_has_no_plan_file(tmp_path):
    student = models.cifar_resnet(**SMALL)
    inhernet.save(student, tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} == FILES - {"plan.json"}
    same(inhernet.load(tmp_path / "m"), student)


def test_loaded_model_trains_and_survives_a_later_save(saved, model):
    loaded = inhernet.load(saved).train()
    loaded(torch.randn(4, 1, 8, 8)).square().sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    inhernet.save(loaded, saved)  # the weights in memory are those of the file that is replaced
    same(inhernet.load(saved), loaded)
    assert not torch.equal(loaded.conv1.up, model.conv1.up)


def test_packed_model_saves_plain_weights(model, tmp_path):
    for module in model.modules():
        if isinstance(module, inhernet.nn.LowRankModule):
            module.pack()
    inhernet.save(model, tmp_path / "m")
    same(inhernet.load(tmp_path / "m"), model)


class Tied(nn.Module):
    """Tied weights, views of one storage, odd strides, buffers that no state dict holds, a plain tensor."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.inner = nn.Linear(width, width)
        self.out = nn.Linear(width, 9, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.full((width,), 2.0))
        self.register_buffer("drawn", torch.randn(width))
        self.register_buffer("table", torch.arange(width).float(), persistent=False)
        self.offset = torch.full((width,), 3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.inner(self.embed(x))) * self.scale + self.table + self.offset)


def test_ties_views_strides_and_buffers(tmp_path):
    source = Tied()
    fused = torch.randn(12, 6)
    source.inner.weight = nn.Parameter(fused[4:10])  # overlaps the bias
    source.inner.bias = nn.Parameter(fused[5])
    source.embed.weight.data = torch.randn(6, 9).t()
    source.out.weight = source.embed.weight
    source.scale = torch.randn(12)[::2]
    inhernet.save(source, tmp_path / "m", factory="some.module.tied", args={"width": 6})
    assert "out.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    state = torch.random.get_rng_state()
    loaded = inhernet.load(tmp_path / "m", factory=Tied)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = torch.arange(9)
    same(loaded, source)
    torch.testing.assert_close(loaded(x), source.eval()(x))  # a contiguous weight may round differently
    assert loaded.out.weight is loaded.embed.weight
    assert not any(p.is_meta for p in loaded.parameters())
    with torch.no_grad():
        loaded.embed.weight.zero_()
    assert not loaded.out.weight.any()


def test_what_was_untied_stays_untied(tmp_path):
    source = Tied()
    source.out.weight = nn.Parameter(torch.randn(9, 6))
    inhernet.save(source, tmp_path / "m", factory="some.module.tied")
    loaded = inhernet.load(tmp_path / "m", factory=Tied)
    same(loaded, source)
    assert loaded.out.weight is not loaded.embed.weight


def test_model_that_is_itself_one_layer(tmp_path):
    config = inhernet.InheritConfig(budget=inhernet.UniformRank(3))
    source = inhernet.inherit(nn.Linear(9, 8), config).eval()
    inhernet.save(source, tmp_path / "m", factory=nn.Linear, args={"in_features": 9, "out_features": 8})
    loaded = inhernet.load(tmp_path / "m", factory=nn.Linear)
    assert isinstance(loaded, inhernet.nn.LowRankLinear)
    same(loaded, source)


def test_half_precision_is_kept(tmp_path):
    source = converted().bfloat16()
    inhernet.save(source, tmp_path / "m")
    same(inhernet.load(tmp_path / "m"), source)


def test_transformers_round_trip(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the Hugging Face round trip was not proven")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, **sizes)
    tokens = torch.arange(10)[None]
    bert = transformers.BertModel(config).eval()
    plan = inhernet.InheritConfig(budget=inhernet.UniformRank(8), rules={"re:.*pooler.*": None})
    source = inhernet.inherit(bert, plan)
    inhernet.save(source, tmp_path / "m")
    loaded = inhernet.load(tmp_path / "m")
    assert type(loaded) is transformers.BertModel
    assert any(isinstance(m, inhernet.nn.LowRankLinear) for m in loaded.modules())
    same(loaded, source)
    assert torch.equal(loaded(tokens).last_hidden_state, source(tokens).last_hidden_state)

    masked = transformers.BertForMaskedLM(config).eval()
    inhernet.save(masked, tmp_path / "masked")
    loaded = inhernet.load(tmp_path / "masked")
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert torch.equal(loaded(tokens).logits, masked(tokens).logits)


def test_only_the_loading_thread_s_parameters_go_to_meta():
    built: list[nn.Module] = []
    with architecture.parameters_on_meta():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        mine = nn.BatchNorm1d(3)
    assert built[0].weight.device.type == "cpu"
    assert mine.weight.is_meta
    assert not mine.running_mean.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


# What save refuses


def test_save_names_what_is_wrong(model, tmp_path):
    with pytest.raises(ValueError, match="Linear does not say how it is built"):
        inhernet.save(nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(ValueError, match=r"factory is .*<lambda>"):
        inhernet.save(model, tmp_path / "m", factory=lambda: model)
    with pytest.raises(TypeError, match=r"args\['f'\] is <"):
        inhernet.save(model, tmp_path / "m", factory="a.b", args={"f": print})
    with pytest.raises(TypeError, match=r"args\['f'\]\[1\] is nan"):
        inhernet.save(model, tmp_path / "m", factory="a.b", args={"f": [1, float("nan")]})
    with pytest.raises(ValueError, match="without a factory"):
        inhernet.save(model, tmp_path / "m", args={})
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        inhernet.save(nn.Linear(2, 2, device="meta"), tmp_path / "m", factory="a.b")
    assert not any(tmp_path.iterdir())


def test_save_replaces_nothing_but_its_own_directories(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files .thesis.tex"):
        inhernet.save(model, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        inhernet.save(model, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_save_refuses_a_plan_that_is_not_the_model(tmp_path):
    changed = converted()
    changed.conv1 = nn.Conv2d(1, 4, 3, padding=1)
    with pytest.raises(ValueError, match="'conv1' is in the plan but not low-rank"):
        inhernet.save(changed, tmp_path / "m")
    changed.conv1 = inhernet.nn.from_dense(changed.conv1, 1)
    with pytest.raises(ValueError, match="'conv1' has rank 1, 1 heads, gate False, but the plan says"):
        inhernet.save(changed, tmp_path / "m")
    bare = models.cifar_resnet(**SMALL)
    bare.fc = inhernet.nn.from_dense(bare.fc, 2)
    with pytest.raises(ValueError, match="'fc' is low-rank in the model but not in its plan"):
        inhernet.save(bare, tmp_path / "m")


def test_failed_save_leaves_the_previous_one(saved, model, monkeypatch):
    monkeypatch.setattr("inhernet.checkpoint.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        inhernet.save(converted(seed=7), saved)
    assert os.listdir(saved.parent) == [saved.name]
    same(inhernet.load(saved), model)


# What load refuses

HOSTILE = [
    "os.system",
    "posix.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.Popen",
    "torch.load",
    "inhernet.models",
    "inhernet.models.",
    "inhernet.models.os",
    "inhernet.models.torch",
    "inhernet.models.resnet.torch",
    "inhernet.models.resnet.resnet20",
    "inhernet.models.common.factory",
    "inhernet.models.__all__",
    "inhernet.models.__builtins__",
    "inhernet.models.resnet20.__globals__",
    "inhernet.models.resnet20.__call__",
    "inhernet.models.../os.system",
    "inhernet.models.resnet20 ",
    "inhernet.models.resnet20\n",
    "inhernet.models.resnet２0",
    "inhernet.checkpoint.load",
    "inhernet.nn.from_dense",
    "transformers.pipeline",
    "transformers.AutoModel",
    "transformers.BertModel",
    "transformers.utils.hub.cached_file",
    "transformers.PretrainedConfig",
    "transformers.__loader__",
    "resnet20",
    "",
    ":",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_factory_runs_nothing(name, saved, tmp_path):
    sentinel = tmp_path / "ran"
    for args in ({"command": f"touch {sentinel}"}, {}, {"model": "BertModel", "config": {}}):
        edit(saved / "config.json", factory=name, args=args)
        with pytest.raises(ValueError, match=r"factory is|args"):
            inhernet.load(saved)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", [None, 3, ["os.system"], {"a": 1}, True])
def test_factory_of_another_type_is_refused(name, saved):
    edit(saved / "config.json", factory=name)
    with pytest.raises(ValueError, match=r"config.json: 'factory' is"):
        inhernet.load(saved)


@pytest.mark.parametrize(
    "args",
    [
        [5],
        "depth=8",
        None,
        {**SMALL, "num_classes": "__import__('os').system('touch ran')"},
        {**SMALL, "num_classes": {"a": 1}},
        {**SMALL, "widths": "os.system"},
        {**SMALL, "widths": [[4], 4, 8, 16]},
        {**SMALL, "depth": None},
        {**SMALL, "depth": 8.0},
        {**SMALL, "nope": 1},
        {**SMALL, "self": 1, "__class__": 2},
        {},
    ],
    ids=str,
)
def test_strange_arguments_are_refused(args, saved):
    edit(saved / "config.json", args=args)
    with pytest.raises(ValueError, match="args"):
        inhernet.load(saved)


def test_hostile_transformers_configuration(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the Hugging Face trust rule was not proven")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=5, **sizes))
    inhernet.save(bert, tmp_path / "m")
    good = json.loads((tmp_path / "m" / "config.json").read_text())["args"]
    inhernet.load(tmp_path / "m")
    for change in (
        {"auto_map": {"AutoModel": "evil--code.Model"}},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"nested": [{"trust_remote_code": True}]},
        {"quantization_config": {"quant_method": "gptq"}},
    ):
        edit(tmp_path / "m" / "config.json", args={**good, "config": {**good["config"], **change}})
        with pytest.raises(ValueError, match="may not make transformers fetch or run"):
            inhernet.load(tmp_path / "m")
    for name in ("GPT2Model", "AutoModel", "PreTrainedModel", "bert.BertModel", "__class__", 3, None):
        edit(tmp_path / "m" / "config.json", args={**good, "model": name})
        with pytest.raises(ValueError, match=r"args\['model'\]"):
            inhernet.load(tmp_path / "m")


PACKAGE = """
from os import mkdir, system
from pathlib import Path
import torch
Path(__file__).with_name("imported").touch()

def build(width=3):
    return torch.nn.Linear(width, 2)

def _hidden(width=3):
    return torch.nn.Linear(width, 2)

def not_a_model(width=3):
    return width
"""


def test_trust_covers_what_the_caller_names_and_no_more(tmp_path, monkeypatch):
    package = tmp_path / "trustedpkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "zoo.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    source, path = nn.Linear(4, 2), tmp_path / "m"
    inhernet.save(source, path, factory="trustedpkg.zoo.build", args={"width": 4})
    for trust in ((), ("other.",), ("trusted.",), ("trustedpkg.zoology",), ("pkg.",)):
        with pytest.raises(ValueError, match=r"trust=\('trustedpkg.',\)"):
            inhernet.load(path, trust=trust)
    assert not (package / "imported").exists()
    for trust in (("trustedpkg.",), ("trustedpkg",), ["x", "trustedpkg.zoo"]):
        same(inhernet.load(path, trust=trust), source)
    for name in ("system", "mkdir", "missing", "_hidden", "build.__wrapped__"):
        edit(path / "config.json", factory=f"trustedpkg.zoo.{name}", args={"path": str(tmp_path / "ran")})
        with pytest.raises(ValueError, match=f"trustedpkg.zoo.{name}"):
            inhernet.load(path, trust=("trustedpkg.",))
    edit(path / "config.json", factory="trustedpkg.zoo.not_a_model", args={})
    with pytest.raises(ValueError, match=r"returned int, expected an nn.Module"):
        inhernet.load(path, trust=("trustedpkg.",))
    assert not (tmp_path / "ran").exists()
    for trust in ("trustedpkg.", ("",), (".",), (3,)):
        with pytest.raises(ValueError, match="trust is"):
            inhernet.load(path, trust=trust)


def test_own_factory_is_used_in_place_of_the_name(saved, model):
    edit(saved / "config.json", factory="os.system")
    same(inhernet.load(saved, factory=models.cifar_resnet), model)
    with pytest.raises(ValueError, match="returned dict"):
        inhernet.load(saved, factory=lambda **args: args)
    with pytest.raises(ValueError, match="expected a callable"):
        inhernet.load(saved, factory="inhernet.models.resnet20")


def test_pickles_are_refused(saved):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(saved.parent / "ran"),)

    bomb = pickle.dumps(Bomb())
    (saved / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        inhernet.load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        inhernet.load(saved)
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"):
        (saved / name).write_bytes(bomb)
        with pytest.raises(ValueError, match=f"has {name} but no model.safetensors: a pickle"):
            inhernet.load(saved)
        (saved / name).unlink()
    assert not (saved.parent / "ran").exists()


@pytest.mark.parametrize("name", sorted(FILES))
def test_links_out_of_the_directory_and_odd_files_are_refused(name, saved, model):
    outside = saved.parent / "outside"
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} is a link that leaves the directory"):
        inhernet.load(saved)
    (saved / name).unlink()
    outside.rename(saved / "inside")
    (saved / name).symlink_to("inside")
    same(inhernet.load(saved), model)
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        inhernet.load(saved)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "deep"])
def test_damaged_files_are_named(name, damage, saved):
    content = (saved / name).read_bytes()
    cut = content[: len(content) // 2]
    noise = bytes(random.Random(1).randrange(256) for _ in range(200))
    (saved / name).write_bytes({"cut": cut, "noise": noise, "empty": b"", "deep": b"[" * 100_000}[damage])
    with pytest.raises(ValueError, match=name):
        inhernet.load(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "other"}, 'does not say "format": "inhernet"'),
        ({"version": 2}, "version 2, expected 1; update"),
        ({"ties": []}, "'ties' is"),
        ({"ties": {"new": "missing"}}, "tie 'new' to 'missing'"),
        ({"ties": {"fc.bias": "bn1.bias"}}, "tie 'fc.bias' to 'bn1.bias'"),
        ({"ties": {"invented": "bn1.bias"}}, "unexpected key 'invented'"),
    ],
)
def test_bad_configuration_is_named(change, message, saved):
    edit(saved / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        inhernet.load(saved)


def test_nan_is_not_json(saved):
    path = saved / "config.json"
    path.write_text(path.read_text().replace('"num_classes": 5', '"num_classes": NaN'))
    with pytest.raises(ValueError, match=r"config.json.*NaN is not JSON"):
        inhernet.load(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("conv1.up"), "lacks key 'conv1.up'"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected key 'extra'"),
        (lambda t: t.update({"conv1.up": torch.ones(2, 4, 3)}), r"'conv1.up' has shape \(2, 4, 3\), expected"),
        (lambda t: t.update({"bn1.bias": t["bn1.bias"].long()}), "'bn1.bias' has dtype torch.int64"),
        (lambda t: t.clear(), "lacks key .* and [0-9]+ more"),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(change, message, saved):
    tensors = load_file(saved / "model.safetensors")
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or not the file that was saved: its SHA-256"):
        inhernet.load(saved)
    edit(saved / "config.json", weights_sha256=None)  # a save of before there were hashes
    with pytest.raises(ValueError, match=message):
        inhernet.load(saved)


def test_lost_or_foreign_plan_is_an_error_not_another_model(saved, tmp_path):
    (saved / "plan.json").rename(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"lacks key 'conv1.weight'"):
        inhernet.load(saved)
    text = (tmp_path / "plan.json").read_text()
    for old, new in (
        ('"conv1"', '"nowhere"'),
        ('"conv1"', '"bn1"'),
        ('"conv1"', '""'),
        ('"conv1"', '["conv1"]'),
        ('"rank": 2', f'"rank": {10**30}'),
        ('"rank": 2', '"rank": 0'),
        ('"rank": 2', '"rank": "os.system"'),
    ):
        assert old in text
        (saved / "plan.json").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"plan.json"):
            inhernet.load(saved)


def test_plan_of_an_impossible_size(saved):
    plan = json.loads((saved / "plan.json").read_text())
    factorised = next(layer for layer in plan["layers"] if layer["rank"] is not None)
    for rank in (10**18, 10**30):
        factorised.update(rank=rank, shape=[2 * rank, 2 * rank])
        edit(saved / "plan.json", layers=plan["layers"])
        with pytest.raises(ValueError, match=r"plan\.json|model\.safetensors"):
            inhernet.load(saved)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        inhernet.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        inhernet.load(tmp_path)


@pytest.mark.parametrize("config", ('{"model_type": "bert"}', "[]", "not json", None))
def test_a_model_of_another_tool_is_never_replaced(tmp_path, config):
    """Seen failing: `convert hf:DIR --out DIR` replaced the teacher, whose files have the same names."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model.safetensors").write_bytes(b"weights")
    if config is not None:
        (teacher / "config.json").write_text(config)
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(teacher)
    for directory in (teacher, link, teacher / "."):
        with pytest.raises(ValueError, match="holds something else than a model that inhernet saved"):
            inhernet.save(inhernet.models.resnet20(num_classes=3), directory)
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before


def test_a_plan_is_never_written_into_a_model(tmp_path):
    """Seen failing: the model's own plan was replaced, after which it did not load."""
    teacher = inhernet.models.resnet20(num_classes=3)
    plan = inhernet.plan(teacher, inhernet.InheritConfig(budget=inhernet.UniformRank(4)))
    inhernet.save(inhernet.inherit(teacher, plan), tmp_path / "model")
    with pytest.raises(ValueError, match="holds a model"):
        inhernet.plan(teacher, inhernet.InheritConfig(budget=inhernet.UniformRank(2))).save(tmp_path / "model")
    inhernet.load(tmp_path / "model")
