"""One network at several budgets: nested, near the networks made for each, and saved, cut, exported as any other."""

from __future__ import annotations

import copy
import itertools
import json
import pickle

import pytest
import torch
from three_layers import error, network, rows
from torch import nn

import inhernet
from inhernet import InheritConfig, ParamBudget, RefineConfig, at_level, cut, elastic, formats, set_level
from inhernet.budgets.allocate import Grid
from inhernet.budgets.nested import nested_ranks
from inhernet.cli import main
from inhernet.decompose.levels import Levels
from inhernet.distill import fit
from inhernet.models import cifar_resnet
from inhernet.nn import LowRankModule

SHARES = (0.7, 0.5, 0.3)
QUICK = RefineConfig(steps=30)


def images() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    net = cifar_resnet(8, num_classes=10, in_channels=1, widths=[8, 8, 16, 32])
    data = [torch.randn(16, 1, 8, 8) * 2 + 1 for _ in range(4)]
    net.train()
    for batch in data:
        net(batch)  # statistics of its own
    return net.eval(), data


@pytest.fixture(scope="module")
def refined() -> tuple[nn.Module, nn.Module]:
    teacher = network()
    return elastic(teacher, SHARES, calibration=rows(), refine=QUICK), teacher


def test_levels_are_nested_in_the_same_tensors(refined):
    model, teacher = refined
    levels = model.inhernet_levels
    assert [level.share for level in levels] == list(SHARES)
    storages = {parameter.data_ptr() for parameter in model.parameters()}
    dense = sum(layer.dense_params for layer in model.inhernet_plan.selected)
    for number, level in enumerate(levels):
        set_level(model, number)
        assert level.params <= level.share * dense + sum(p.numel() for p in teacher.parameters()) - dense
        for name, module in model.named_modules():
            if isinstance(module, LowRankModule):
                larger = levels[max(number - 1, 0)].ranks[name] or 1000
                if level.ranks[name] == 0:  # dense, then dense at all larger levels
                    assert larger == 1000
                    continue
                down, up, *_ = module.weights()
                assert down.shape[0] == up.shape[-1] == level.ranks[name] <= larger
                assert {down.data_ptr(), up.data_ptr()} <= storages
    set_level(model, 0)
    assert levels[0].ranks["0"] == 0  # the first layer: no rank pays at 70 %
    with torch.no_grad():
        x = rows()[0]
        assert torch.equal(model[0](x), teacher[0](x))


def test_each_level_is_near_the_network_made_for_it(refined):
    model, teacher = refined
    for number, share in enumerate(SHARES):
        alone = inhernet.inherit(teacher, InheritConfig(budget=ParamBudget(share)), rows(), refine=QUICK)
        with at_level(model, number):
            assert error(model, teacher, rows(2)) < 1.15 * error(alone, teacher, rows(2))


def test_refinement_helps_every_level():
    teacher, data = images()
    plain, model = (elastic(teacher, (0.7, 0.45, 0.25), calibration=data, refine=how) for how in (False, QUICK))
    for number in range(3):
        with at_level(model, number), at_level(plain, number):
            assert error(model, teacher, data) < 0.95 * error(plain, teacher, data)


def test_nested_ranks_keep_what_free_ones_keep():
    """Each level on its own may choose other ranks, and layers left dense; nested ones keep as much, but for that."""
    teacher, spectra = network(), {}
    plans = [inhernet.plan(teacher, InheritConfig(budget=ParamBudget(share)), rows()) for share in (0.3, 0.5, 0.7)]
    first = plans[0]
    for layer in first.selected:
        spectra[layer.name] = first.factors[layer.name][1].spectrum
    dense = first.selected_params[1]
    ranks = {layer.name: layer.rank for layer in first.selected}
    found = nested_ranks(first.selected, ranks, [0.5 * dense, 0.7 * dense], spectra, True, Grid(), 8)

    def kept(given: dict[str, int | None]) -> float:
        parts = [(spectra[name].square(), rank) for name, rank in given.items()]  # None, dense: all of it
        return float(sum(s[:rank].sum() for s, rank in parts) / sum(s.sum() for s, _ in parts))

    for given, plan in zip(found, plans[1:], strict=True):
        assert (
            sum(plan[n].cost(r) if r else plan[n].dense_params for n, r in given.items())
            <= plan.config.budget.amount * dense
        )
        assert kept(given) > kept({layer.name: layer.rank for layer in plan.selected}) - 0.005
    sizes = [{name: rank or 1000 for name, rank in given.items()} for given in (ranks, *found)]
    assert all(a[name] <= b[name] for a, b in itertools.pairwise(sizes) for name in ranks)


@pytest.mark.parametrize("heads", [1, 3])
def test_a_cut_network_is_the_level(heads, tmp_path):
    teacher, data = images()
    model = elastic(teacher, (0.8, 0.5), InheritConfig(heads=heads), data, refine=QUICK)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, inhernet.nn.Gate):
                module.weight.normal_()
    for number in (0, 1):
        small = cut(model, number)
        assert sum(p.numel() for p in small.parameters()) == model.inhernet_levels[number].params
        assert sum(layer.rank is not None for layer in small.inhernet_plan) == len(_pairs(small, model))
        with torch.no_grad(), at_level(model, number):
            torch.testing.assert_close(small(data[0]), model(data[0]), rtol=1e-5, atol=1e-5)
            for first, second in _pairs(small, model) if heads > 1 else ():
                x = torch.randn(2, first.down.shape[1], *[5] * (first.down.dim() - 2))
                torch.testing.assert_close(first.gates(x), second.gates(x))
        inhernet.save(small, tmp_path / f"{number}")
        assert error(inhernet.load(tmp_path / f"{number}"), small, data) == 0.0
    assert model.__dict__["inhernet_level"] == 0


def _pairs(a: nn.Module, b: nn.Module) -> list[tuple[LowRankModule, LowRankModule]]:
    others = dict(b.named_modules())
    return [(module, others[name]) for name, module in a.named_modules() if isinstance(module, LowRankModule)]


def test_batchnorm_has_statistics_for_each_level():
    teacher, data = images()
    model = elastic(teacher, (0.8, 0.3), calibration=data, refine=False)
    norm = model.layer3[0].bn2
    seen = []
    for number in (0, 1, 0):
        set_level(model, number)
        seen.append(norm.running_mean.clone())
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    alone = inhernet.inherit(teacher, InheritConfig(budget=ParamBudget(0.3)), data, refine=False)
    with at_level(model, 1):
        assert error(model, teacher, data) == pytest.approx(error(alone, teacher, data), rel=1e-3)


def test_saved_copied_and_pickled_it_keeps_its_levels(tmp_path):
    teacher, data = images()
    model = elastic(teacher, (0.8, 0.5), calibration=data, refine=QUICK)
    inhernet.save(model, tmp_path / "model")
    for other in (inhernet.load(tmp_path / "model"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for number in (0, 1, 0):
            with torch.no_grad(), at_level(model, number), at_level(other, number):
                assert torch.equal(model(data[0]), other(data[0]))
    with at_level(model, 1):  # saved at a lower level, it is whole too
        inhernet.save(model, tmp_path / "model")
    assert error(inhernet.load(tmp_path / "model"), model, data) == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data | {"version": 2}, "version 1"),
        (lambda data: data | {"levels": []}, "list is empty"),
        (lambda data: data | {"levels": [{"share": 1}]}, "entry 0 is not"),
        (
            lambda data: data | {"levels": [{"share": 0.5, "ranks": {"0": "x"}, "params": 1}]},
            "entry 0 holds no numbers",
        ),
        (lambda data: data | {"levels": [{"share": 0.5, "ranks": {"0": 900}, "params": 1}]}, "wants rank 900 of '0'"),
        (lambda data: data | {"levels": [{"share": 0.5, "ranks": {"1": 1}, "params": 1}]}, "no low-rank layer"),
    ],
)
def test_damaged_levels_are_refused(tmp_path, change, words):
    model = elastic(network(), (0.6, 0.3))
    inhernet.save(model, tmp_path / "model", factory=network)
    file = tmp_path / "model" / "levels.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=rf"levels\.json is damaged or not what it should be: .*{words}"):
        inhernet.load(tmp_path / "model", factory=network)


def test_what_does_not_know_levels_gets_the_present_one():
    teacher, data = network(), rows()
    model = elastic(teacher, (0.7, 0.3), calibration=data, refine=False)
    x = data[0]
    with torch.no_grad(), at_level(model, 1):
        expected = model(x)
        for other in (
            formats.plain(model),
            formats.to_dense(model),
            inhernet.optimize(model, x, seconds=0.005, show=False),
        ):
            torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-4)
        listed = inhernet.summary(model, x)
        assert listed.params == model.inhernet_levels[1].params
        assert listed.macs[0] < listed.macs[1]
        torch._dynamo.reset()
        compiled = torch.compile(model)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        set_level(model, 0)
        torch.testing.assert_close(
            compiled(x), model(x), rtol=1e-4, atol=1e-4
        )  # a level is compiled anew, not mixed up
        set_level(model, 1)
        first = model[0].pack()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        set_level(model, 0)
        assert not first.packed


def test_gradients_reach_the_directions_in_use_only():
    model = elastic(network(), (0.7, 0.3))
    set_level(model, 1)
    model(rows()[0]).square().sum().backward()
    module, rank = model[0], model.inhernet_levels[1].ranks["0"]
    assert module.down.grad[:rank].abs().min() > 0
    assert (module.down.grad[rank:] == 0).all()
    assert (module.up.grad[:, rank:] == 0).all()


def test_wrong_use_is_named(refined):
    model, teacher = refined
    for level in (3, -1, True, 0.5):
        with pytest.raises(ValueError, match=rf"level is {level}, expected 0 to 2"):
            set_level(model, level)
    with pytest.raises(ValueError, match=r"has no levels; make it with inhernet\.elastic"):
        set_level(teacher, 0)
    for levels in ((), (1.5,), ("x", 0.5), 0.5, "0.5"):
        with pytest.raises(ValueError, match="levels is .*; expected one or more shares"):
            elastic(teacher, levels)
    with pytest.raises(ValueError, match="smallest ranks already cost"):
        elastic(teacher, (0.5, 0.001))
    with pytest.raises(ValueError, match="model is elastic.*train inhernet.cut"):
        fit(model, [(rows()[0], torch.zeros(32, dtype=torch.long))], loss=lambda y, t, _: y.sum())
    with pytest.raises(ValueError, match="rank is 1000, expected 1 to"):
        model[0].use(1000)


def test_rules_stay_and_levels_without_data_share_alike():
    config = InheritConfig(rules={"0": 5, "4": None})
    model = elastic(network(), (0.7, 0.4), config)
    assert [set(level.ranks) for level in model.inhernet_levels] == [{"2"}, {"2"}]
    assert model[0].rank == 5
    assert isinstance(model[4], nn.Linear)
    assert Levels.from_json(model.inhernet_levels.to_json()) == model.inhernet_levels


def test_from_a_shell(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert = ["convert", "inhernet.demos.digits:digits_teacher", "--data", "digits", "--levels", "0.6", "0.3"]
    assert main([*convert, "--refine-steps", "2", "--out", "net"]) == 0
    shown = capsys.readouterr().out
    assert "level 0: 60%" in shown
    assert "level 1: 30%" in shown
    counts = []
    for options in ([], ["--level", "1"]):
        assert (
            main(["eval", "net", "--data", "digits", "--teacher", "inhernet.demos.digits:digits_teacher", *options])
            == 0
        )
        counts.append(capsys.readouterr().out)
    assert counts[0] != counts[1]
    assert main(["bench", "net", "--input", "1x8x8", "--batch", "1", "--seconds", "0.01"]) == 0
    assert main(["eval", "net", "--data", "digits", "--level", "2"]) == 2
    assert "level is 2, expected 0 to 1" in capsys.readouterr().err
    assert main([*convert, "--budget", "0.5", "--out", "other"]) == 2
    assert "--budget is given beside --levels" in capsys.readouterr().err
    assert main(["train", "net", "--data", "digits", "--out", "trained"]) == 2
    assert "model is elastic" in capsys.readouterr().err
