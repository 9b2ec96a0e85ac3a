"""Rank given back: what was learnt stays, what is added helps most for its cost."""

from __future__ import annotations

import pytest
import torch
from three_layers import error, network, rows
from torch import nn

import inhernet
from inhernet import InheritConfig, ParamBudget, RefineConfig, restore
from inhernet.cli import main
from inhernet.nn import LowRankModule

QUICK = RefineConfig(steps=20)


@pytest.mark.parametrize("heads", [1, 3])
def test_what_was_there_stays_and_the_rest_is_the_teachers(heads):
    teacher = network()
    model = inhernet.inherit(teacher, InheritConfig(heads=heads, budget=ParamBudget(0.35)), rows(), refine=QUICK)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, inhernet.nn.Gate):
                module.weight.normal_()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    larger = restore(model, teacher, 0.7, rows(), refine=False)
    grown = 0
    for name, module in larger.named_modules():
        if isinstance(module, LowRankModule):
            rank = state[f"{name}.down"].shape[0]
            grown += module.rank > rank
            assert torch.equal(module.down[:rank], state[f"{name}.down"])
            assert torch.equal(module.up[..., :rank], state[f"{name}.up"])
            if module.gated:
                assert torch.equal(module.gate.weight[:, :rank], state[f"{name}.gate.weight"])
                assert (module.gate.weight[:, rank:] == 0).all()
    assert grown >= 2
    dense = sum(layer.dense_params for layer in larger.inhernet_plan.selected)
    kept, spent = larger.inhernet_plan.selected_params[0], sum(p.numel() for p in larger.parameters())
    assert 0.66 * dense < kept <= 0.7 * dense
    assert spent == larger.inhernet_plan.total_params[0]
    assert error(larger, teacher, rows(2)) < error(model, teacher, rows(2))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_refined_again_it_is_near_the_network_made_for_the_share(tmp_path):
    teacher = network()
    small = inhernet.inherit(teacher, InheritConfig(budget=ParamBudget(0.3)), rows(), refine=QUICK)
    larger = restore(small, teacher, 0.6, rows(), refine=QUICK)
    alone = inhernet.inherit(teacher, InheritConfig(budget=ParamBudget(0.6)), rows(), refine=QUICK)
    assert error(larger, teacher, rows(2)) < 1.25 * error(alone, teacher, rows(2))
    inhernet.save(larger, tmp_path / "larger", factory=network)
    assert error(inhernet.load(tmp_path / "larger", factory=network), larger, rows(2)) == 0.0


def test_without_data_a_plain_network_grows_evenly():
    teacher = network()
    small = inhernet.inherit(teacher, InheritConfig(budget=ParamBudget(0.3)))
    larger = restore(small, teacher, 0.6)
    alone = inhernet.inherit(teacher, InheritConfig(budget=ParamBudget(0.6)))
    assert {la.name: la.rank for la in larger.inhernet_plan} == {la.name: la.rank for la in alone.inhernet_plan}
    torch.testing.assert_close(larger(rows()[0]), alone(rows()[0]), rtol=1e-4, atol=1e-4)


def test_wrong_use_is_named():
    teacher = network()
    model = inhernet.inherit(teacher, InheritConfig(budget=ParamBudget(0.5)), rows(), refine=False)
    with pytest.raises(ValueError, match=r"share is 0.3, .* but the model has .* already"):
        restore(model, teacher, 0.3, rows())
    with pytest.raises(ValueError, match="share is 1.5"):
        restore(model, teacher, 1.5, rows())
    with pytest.raises(ValueError, match="carries no statistics"):
        restore(model, teacher, 0.7)
    with pytest.raises(ValueError, match="no plan"):
        restore(teacher, teacher, 0.7, rows())
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="teacher_hash does not match"):
        restore(model, nn.Sequential(*(nn.Linear(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m
                                       for m in teacher)), 0.7, rows())  # fmt: skip


def test_from_a_shell(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    teacher = ["inhernet.demos.digits:digits_teacher", "--weights", "weights.safetensors"]
    from safetensors.torch import save_file

    from inhernet.demos.digits import digits_teacher

    save_file(digits_teacher().state_dict(), "weights.safetensors")
    convert = ["convert", *teacher, "--data", "digits", "--budget", "0.3", "--refine-steps", "2", "--out", "small"]
    assert main(convert) == 0
    grow = ["restore", "small", "--teacher", *teacher, "--data", "digits", "--refine-steps", "2", "--out", "larger"]
    assert main([*grow, "--budget", "0.6"]) == 0
    assert "parameters" in capsys.readouterr().out
    larger = inhernet.load("larger")
    assert larger.inhernet_plan.selected_params[0] > 0.55 * larger.inhernet_plan.selected_params[1]
    assert main([*grow, "--overwrite", "--budget", "0.2"]) == 2
    assert "already" in capsys.readouterr().err
