"""Damaged and hostile files: what is read is what was saved, or a ValueError; never another model, a fetch or a hang."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import random
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inhernet
from inhernet import InheritConfig, ParamBudget, Plan, UniformRank, architecture
from inhernet.models import cifar_resnet

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    10**400,
    1.5,
    1e308,
    "",
    "x",
    "re:a{99999999999}",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    teacher = cifar_resnet(8, (4, 4, 8, 16), num_classes=5, in_channels=1).eval()
    config = InheritConfig(heads=2, budget=UniformRank(2), rules={"fc": None}, exclude=("re:.*nope|conv1",))
    model = inhernet.inherit(teacher, config)
    folder = tmp_path_factory.mktemp("damaged")
    inhernet.save(model, folder / "model")
    inhernet.plan(teacher, InheritConfig(init="activation"), [torch.randn(8, 1, 8, 8)]).save(folder / "plan")
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "model", tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_flipped_bit_in_the_weights_is_found(saved: Path) -> None:
    # 206 of 572 were accepted, with another output.
    content, chance = (saved / WEIGHTS).read_bytes(), random.Random(0)
    for _ in range(200):
        place = chance.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << chance.randrange(8)
        (saved / WEIGHTS).write_bytes(flipped)
        with pytest.raises(ValueError, match="model.safetensors"):
            inhernet.load(saved)
    (saved / WEIGHTS).write_bytes(content)
    inhernet.load(saved)


def test_a_flipped_bit_in_a_plans_statistics_is_found(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original / "plan", tmp_path / "plan"))
    content, chance = (folder / "statistics.safetensors").read_bytes(), random.Random(0)
    for _ in range(50):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (folder / "statistics.safetensors").write_bytes(flipped)
        try:
            found = Plan.load(folder).statistics
        except ValueError as error:
            assert "statistics.safetensors" in str(error)  # noqa: PT017
        else:  # a bit of the header's padding or metadata
            expected = Plan.load(original / "plan").statistics
            assert all(torch.equal(found[key].inputs, expected[key].inputs) for key in expected)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, item in items for inner in places(item, (*path, key)))]


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


def test_a_damaged_plan_is_a_value_error(original: Path) -> None:
    # 110 of 2,600 raised TypeError, AttributeError or OverflowError.
    data = json.loads((original / "model" / "plan.json").read_text())
    every, chance, accepted = places(data), random.Random(0), 0
    for path in every:
        for value in ODD if len(path) < 3 else chance.sample(ODD, 6):
            text = json.dumps(changed(data, path, value))
            try:
                Plan.from_json(text).check()
                accepted += 1
            except ValueError as error:
                assert str(error), (path, value)  # noqa: PT017
    assert accepted < 0.3 * 6 * len(every)  # free text and numbers within their range
    text = json.dumps(data)
    for _ in range(500):
        characters = list(text)
        characters[chance.randrange(len(text))] = chance.choice('{}[],:"0a-.')
        with contextlib.suppress(ValueError):
            Plan.from_json("".join(characters))
    with pytest.raises(ValueError, match="nested too deep"):
        Plan.from_json("[" * 100_000)


def test_a_damaged_plan_in_a_model_names_the_file(saved: Path) -> None:
    data, chance = json.loads((saved / "plan.json").read_text()), random.Random(1)
    expected, refused = inhernet.load(saved).state_dict(), 0
    for path in chance.sample(places(data), 60):
        (saved / "plan.json").write_text(json.dumps(changed(data, path, chance.choice(ODD))))
        try:
            model = inhernet.load(saved)
        except ValueError as error:
            assert "plan.json" in str(error) or "model.safetensors" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert refused > 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 120_002}, "more than 1,[0-9]+ parameters, far more than were saved"),
        ({"depth": 10**12 + 2}, r"args\['depth'\] is 1000000000002, expected a number of at most 16,777,216"),
        ({"num_classes": 2**24}, "has shape"),
        ({"widths": [4, 4, 8, 2**62]}, r"args\['widths'\]\[3\]"),
    ],
)
def test_a_depth_that_would_build_for_hours_is_refused(change: dict[str, Any], message: str, saved: Path) -> None:
    args = json.loads((saved / CONFIG).read_text())["args"]
    edit(saved / CONFIG, args={**args, **change})
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        inhernet.load(saved)
    assert time.perf_counter() - started < 20


# transformers

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def saved_bert(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers", reason="no transformers: its trust rules were not proven")
    inhernet.save(transformers.BertModel(transformers.BertConfig(vocab_size=5, **SIZES)), folder / "bert")
    return folder / "bert"


def test_depths_of_transformers_are_bounded(tmp_path: Path) -> None:
    folder = saved_bert(tmp_path)
    args = json.loads((folder / CONFIG).read_text())["args"]
    for change, message in (({"num_hidden_layers": 10**6}, "far more than"), ({"vocab_size": 10**12}, "vocab_size")):
        edit(folder / CONFIG, args={**args, "config": {**args["config"], **change}})
        with pytest.raises(ValueError, match=message):
            inhernet.load(folder)


@pytest.fixture
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A timm that notes what it is asked for, in the place where transformers looks for it."""
    pytest.importorskip("transformers", reason="no transformers: its trust rules were not proven")
    from transformers.models.timm_wrapper import configuration_timm_wrapper as configuration
    from transformers.models.timm_wrapper import modeling_timm_wrapper as wrapper

    asked: list[Any] = []

    class Model(nn.Linear):
        num_features = 2

        def __init__(self) -> None:
            super().__init__(2, 2)

    def create_model(name: str, *args: Any, **kwargs: Any) -> nn.Module:
        asked.append(name)
        return Model()

    timm = types.ModuleType("timm")
    timm.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setattr(wrapper, "timm", timm, raising=False)
    monkeypatch.setattr(wrapper, "is_timm_available", lambda: True)
    for module in (wrapper, configuration):
        monkeypatch.setattr(module, "requires_backends", lambda *args: None)
    monkeypatch.setattr(
        wrapper, "_create_timm_model_with_error_handling", lambda config, **k: create_model(config.architecture)
    )
    return asked


def test_no_file_makes_timm_fetch(tmp_path: Path, fake_timm: list[Any]) -> None:
    folder = saved_bert(tmp_path)
    config = {
        "architecture": "hf-hub:evil/model",
        "model_type": "timm_wrapper",
        "label_names": ["a", "b"],
        "num_classes": 2,
    }
    edit(
        folder / CONFIG, factory="transformers.TimmWrapperConfig", args={"model": "TimmWrapperModel", "config": config}
    )
    with pytest.raises(architecture.Untrusted, match=r"model type 'timm_wrapper' .*trust=\('transformers.',\)"):
        inhernet.load(folder)
    assert fake_timm == []
    with pytest.raises(ValueError, match="lacks key 'timm_model"):
        inhernet.load(folder, trust=("transformers.",))
    assert fake_timm == ["hf-hub:evil/model"]  # so that the assertion above can fail


def test_a_backbone_inside_of_another_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="no transformers: its trust rules were not proven")
    folder = saved_bert(tmp_path)
    for name, model, change in (
        ("BertConfig", "BertModel", {"extra": [{"inner": {"model_type": "timm_wrapper"}}]}),
        ("DetrConfig", "DetrModel", {"use_timm_backbone": True, "backbone": "hf-hub:evil/model"}),
        ("EncoderDecoderConfig", "EncoderDecoderModel", {"encoder": {"model_type": "bert"}}),
    ):
        assert hasattr(transformers, name)
        edit(folder / CONFIG, factory=f"transformers.{name}", args={"model": model, "config": change})
        with pytest.raises(
            architecture.Untrusted, match="is not among those of transformers that build without consent"
        ):
            inhernet.load(folder)


REACH_OUT = {
    "timm", "load_backbone", "import_module", "__import__", "from_pretrained", "create_model", "hf_hub_download",
    "snapshot_download", "cached_file", "urlopen", "requests", "get_kernel", "exec", "eval", "open",
}  # fmt: skip


def reaches_out(path: Path) -> set[str]:
    """Names in a module's code by which it could import, fetch or choose another model; docstrings do not count."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        names += [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else []
        found |= {name for name in names if name.split(".")[0] in REACH_OUT or name.startswith("Auto")}
    return found


def test_types_that_need_no_consent_build_from_their_own_code() -> None:
    transformers = pytest.importorskip("transformers", reason="no transformers: its trust rules were not proven")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    models = Path(transformers.__file__).parent / "models"
    known = {kind for kind in architecture.MODEL_TYPES if kind in CONFIG_MAPPING_NAMES}
    assert len(known) > 0.9 * len(architecture.MODEL_TYPES)  # an older or newer release knows most of them
    folders = {models / model_type_to_module_name(kind) for kind in known}
    found = {file: reaches_out(file) for folder in folders for file in folder.glob("*ing_*.py") if "token" not in file.name
             and "process" not in file.name}  # fmt: skip
    assert {file.name: names for file, names in found.items() if names} == {}
    assert "timm" in reaches_out(models / "timm_wrapper" / "modeling_timm_wrapper.py")
    assert "load_backbone" in reaches_out(models / "detr" / "modeling_detr.py")


def test_what_they_save_by_default_loads_without_consent() -> None:
    """Parts of a configuration have types of their own (those of SAM were forgotten), and numbers of their own."""
    transformers = pytest.importorskip("transformers", reason="no transformers: its trust rules were not proven")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for kind in sorted(architecture.MODEL_TYPES & set(CONFIG_MAPPING_NAMES)):
        make = getattr(transformers, CONFIG_MAPPING_NAMES[kind])
        values = json.loads(make().to_json_string(use_diff=False))
        values = {key: value for key, value in values.items() if key not in architecture._REFUSED}
        architecture._refuse_unknown_types(make.model_type, values)
        architecture._need_moderate(values, kind)
        architecture._refuse_fetching(values, kind)


def test_a_budget_of_any_size_is_a_value_error() -> None:
    for amount in (10**400, 2**41, float("inf"), float("nan"), True, None, "1"):
        with pytest.raises(ValueError, match="ParamBudget.amount"):
            ParamBudget(amount)  # type: ignore[arg-type]
