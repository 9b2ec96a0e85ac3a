"""Teachers that cannot be converted, or only in part: each is said, and nothing that was not done looks done."""

from __future__ import annotations

import builtins
import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import inhernet
from inhernet import InheritConfig, ParamBudget, UniformRank

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize("kind", [lambda: nn.Linear(16, 16), lambda: nn.Conv2d(16, 16, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (weight_norm, r"weight_norm makes the weight anew at every call; torch.nn.utils.remove_weight_norm"),
        (spectral_norm, r"spectral_norm makes the weight anew.*remove_spectral_norm"),
        (pruned, r"pruning makes the weight anew.*prune.remove"),
        (parametrizations.weight_norm, r"Parametrized(Linear|Conv2d) is a subclass"),
    ],
    ids=["weight_norm", "spectral_norm", "pruned", "parametrised"],
)
def test_a_weight_that_is_made_at_every_call(kind, change, reason):
    # Seen: AttributeError "`weight` is not an nn.Parameter", with the name of no layer.
    teacher = nn.Sequential(change(kind()), nn.Flatten(), nn.Linear(16, 16)).eval()
    plan = inhernet.plan(teacher, InheritConfig(budget=UniformRank(4)))
    assert plan["0"].rank is None and re.search(reason, plan["0"].reason)
    assert plan["2"].rank == 4
    model = inhernet.inherit(teacher, plan)
    x = torch.randn(2, 16) if isinstance(teacher[0], nn.Linear) else torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(model[0](x), teacher[0](x))
    with pytest.raises(TypeError, match=r"layer.weight is a|layer is"):
        inhernet.nn.from_dense(nn.Sequential(teacher[0])[0], 4)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return x


def test_every_matrix_is_in_the_plan_with_its_reason():
    model = nn.ModuleDict(
        {
            "word": nn.Embedding(10, 8),
            "conv": nn.Conv3d(8, 8, 3),
            "deconv": nn.ConvTranspose2d(8, 8, 3),
            "lstm": nn.LSTM(8, 8),
            "attention": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "experts": Experts(),
            "linear": nn.Linear(8, 8),
            "norm": nn.LayerNorm(8),
        }
    )
    plan = inhernet.plan(model, InheritConfig(budget=UniformRank(2)))
    reasons = {layer.name: layer.reason for layer in plan}
    for name, reason in {
        "word.weight": "looked up",
        "conv.weight": "3-D convolution",
        "deconv.weight": "transposed convolution",
        "lstm.weight_ih_l0": "recurrent layer",
        "lstm.weight_hh_l0": "recurrent layer",
        "attention.in_proj_weight": "a learned or zero key of its own",
        "experts.up": "4 experts in one tensor",
    }.items():
        assert reason in reasons.pop(name)
    assert (
        reasons.pop("attention.out_proj")
        == "NonDynamicallyQuantizableLinear is a subclass: its owner may read the weight directly"
    )
    assert reasons == {"linear": None}
    shown = str(plan)
    assert "in_proj_weight" in shown and "1 of 9 layers factorised" in shown
    assert inhernet.Plan.from_json(plan.to_json()).to_dict() == plan.to_dict()
    with pytest.raises(ValueError, match="cannot be factorised: a recurrent layer"):
        plan["lstm.weight_ih_l0"].rank = 2
        inhernet.inherit(model, plan)


def test_nothing_to_factorise_is_an_error_with_the_reasons():
    with pytest.raises(ValueError, match=r"LSTM.*no nn.Linear or nn.Conv2d that can be factorised \(4 × a recurrent"):
        inhernet.plan(nn.LSTM(8, 8, 2))
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"\(2 × excluded by 're:\.\*'\)"):
        inhernet.inherit(net, InheritConfig(exclude=("re:.*",)))


def test_nothing_factorised_by_the_budget_is_loud():
    net = nn.Sequential(nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"nothing was factorised, the result is a copy of the teacher: "):
        inhernet.inherit(net, InheritConfig(budget=ParamBudget(1.0)))
    plan = inhernet.plan(net, InheritConfig(budget=UniformRank(2)))
    plan["0"].rank = None
    with pytest.warns(UserWarning, match=r"a copy of the teacher: kept dense by hand \(1 of 1 layers\)"):
        inhernet.inherit(net, plan)


def test_no_module_and_no_values():
    for call in (inhernet.plan, inhernet.inherit):
        with pytest.raises(TypeError, match="the teacher is str, expected an nn.Module"):
            call("resnet")
        with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device .* load its weights"):
            call(nn.Sequential(nn.Linear(8, 8, device="meta")))
        with torch.inference_mode():
            teacher = nn.Linear(8, 8)
        with pytest.raises(ValueError, match=r"'weight' was made under torch.inference_mode\(\)"):
            call(teacher)
        broken = nn.Sequential(nn.Linear(8, 8))
        broken[0].weight.data[3, 3] = float("nan")
        with pytest.raises(ValueError, match=r"the teacher's 0\.weight holds NaN or infinity"):
            call(broken)


def test_a_converted_model_is_a_plain_module():
    model = inhernet.inherit(nn.Sequential(nn.Linear(8, 8)), InheritConfig(budget=UniformRank(2)))
    x = torch.randn(3, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))


def test_a_star_import_shadows_nothing():
    # `models` and `nn` came with it, and took the place of torch's.
    names: dict[str, object] = {"nn": torch.nn, "models": None}
    exec("from inhernet import *", names)
    assert names["nn"] is torch.nn and names["models"] is None
    assert not {name for name in names if hasattr(builtins, name)} - {"__builtins__"}
    assert names["inherit"] is inhernet.inherit


def test_wrapped_and_compiled_teachers_say_what_to_pass():
    net = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"wrapped in DataParallel; pass what is inside, teacher\.module"):
        inhernet.plan(nn.DataParallel(net))
    with pytest.raises(ValueError, match=r"compiled; pass what it was made from, teacher\._orig_mod"):
        inhernet.inherit(torch.compile(net))


def test_weights_that_are_no_plain_tensors_stay_as_they_are():
    class Packed(torch.Tensor):
        """As libraries for quantisation leave them: floating to look at, something else inside."""

    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    net[0].weight = nn.Parameter(torch.randn(16, 16).as_subclass(Packed))
    plan = inhernet.plan(net, InheritConfig(budget=UniformRank(4)))
    assert "its weight is a Packed" in plan["0"].reason
    assert plan["1"].rank == 4


def test_adapters_stay_and_work():
    class Adapted(nn.Module):
        """A linear layer with a low-rank addition, as peft writes it."""

        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(32, 32)
            self.lora_A, self.lora_B = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    net = nn.Sequential(Adapted())
    model = inhernet.inherit(net, InheritConfig(budget=UniformRank(8)))
    assert [layer.name for layer in model.inhernet_plan.factorised] == ["0.base_layer"]
    assert torch.equal(model[0].lora_A.weight, net[0].lora_A.weight)
    assert model(torch.randn(2, 32)).shape == (2, 32)
