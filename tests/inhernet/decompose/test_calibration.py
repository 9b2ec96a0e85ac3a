"""Second moments against brute force, whatever the convolution, the padding content or the form of the batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inhernet.decompose.calibration import collect_moments, patches
from inhernet.decompose.factorise import Moments


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brute_patches(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Patches read off by convolving with one-hot kernels."""
    size = conv.weight[0].numel()
    hot = torch.eye(size, dtype=x.dtype).reshape(size, *conv.weight.shape[1:])
    y = F.conv2d(x, hot, None, conv.stride, conv.padding, conv.dilation)
    return y.permute(0, 2, 3, 1).reshape(-1, size)


CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 1, "stride": 2, "bias": False},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("channels", [(4, 6), (2, 40)], ids=["N<K", "N>K"])
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_convolution_moments(options, channels):
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, **options).double()
    nn.init.normal_(conv.weight)
    data = [torch.randn(n, channels[0], 9, 8, generator=seeded(n), dtype=torch.float64) for n in (3, 2)]
    rows = torch.cat([brute_patches(conv, x) for x in data])
    torch.testing.assert_close(patches(conv, data[0]), brute_patches(conv, data[0]))
    w = conv.weight.detach().flatten(1)

    got = collect_moments(conv, [("", "activation")], data)["", "activation"]
    expected = Moments.of(w, rows.T @ rows / len(rows))
    torch.testing.assert_close(got.inputs, expected.inputs)
    assert got.input_mean == pytest.approx(expected.input_mean)

    # The gradient at the convolution's output is the random direction itself, over the first batch's RMS.
    got = collect_moments(conv, [("", "fisher")], data, seed=3)["", "fisher"]
    generator, scale = seeded(3), 1 / float(conv(data[0]).detach().square().mean().sqrt())
    shapes = [conv(x).shape for x in data]
    g = torch.cat(
        [scale * torch.randn(s, generator=generator).double().permute(0, 2, 3, 1).flatten(0, 2) for s in shapes]
    )
    share = g.square().sum(1, keepdim=True)
    expected = Moments.of(w, (rows * share).T @ rows / share.sum(), g.T @ g / 5)
    for name in ("inputs", "outputs"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-6, atol=1e-9)
    assert got.input_mean == pytest.approx(expected.input_mean, rel=1e-6)
    assert got.output_mean == pytest.approx(expected.output_mean, rel=1e-6)


def test_pieces_of_a_large_image_batch_add_up(monkeypatch):
    conv = nn.Conv2d(1, 30, 3)
    data = [torch.randn(7, 1, 12, 12, generator=seeded())]
    keys = [("", "activation"), ("", "fisher")]
    whole = collect_moments(conv, keys, data)
    monkeypatch.setattr("inhernet.decompose.calibration.UNFOLD_LIMIT", 2000)
    for key, pieces in collect_moments(conv, keys, data).items():
        torch.testing.assert_close(pieces.inputs, whole[key].inputs)


def test_several_projections_and_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)).double()
    x = torch.randn(50, 5, generator=seeded(), dtype=torch.float64)
    keys = [("0", "fisher"), ("2", "fisher")]
    got = collect_moments(net, keys, [x], projections=3, seed=1)
    hidden = net[0](x).detach()
    scale = 1 / float(net(x).detach().square().mean().sqrt())
    generator = seeded(1)
    gs = [scale * torch.randn(50, 4, generator=generator).double() for _ in range(3)]
    first = [(g @ net[2].weight.detach()) * (hidden > 0) for g in gs]
    g_last, g_first = (sum(g.T @ g for g in group) / 150 for group in (gs, first))
    share = sum(g.square().sum(1, keepdim=True) for g in first)
    expected = Moments.of(net[0].weight.detach(), (x * share).T @ x / share.sum(), g_first)
    torch.testing.assert_close(got["0", "fisher"].outputs, expected.outputs, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(got["0", "fisher"].inputs, expected.inputs, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(got["2", "fisher"].outputs, g_last, rtol=1e-6, atol=1e-10)


class Tokens(nn.Module):
    """A toy encoder whose attention obeys the mask; `out` also returns an integer tensor and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.mix = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 8)

    def forward(self, input_ids, attention_mask):
        h = self.embed(input_ids)
        keep = attention_mask.unsqueeze(-1).to(h.dtype)
        context = (self.mix(h) * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True)
        h = self.narrow(torch.relu(self.wide(h + context)))
        return {"loss": h.sum(), "ids": input_ids, "hidden": h}


def test_padding_content_does_not_count():
    torch.manual_seed(0)
    model = Tokens()
    ids = torch.randint(1, 30, (6, 9), generator=seeded())
    mask = (torch.arange(9) < torch.tensor([[9], [7], [5], [3], [2], [1]])).long()
    keys = [(name, init) for name in ("mix", "wide", "narrow") for init in ("activation", "fisher")]
    results = []
    for filler in (0, 17):
        batch = {"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask}
        results.append(collect_moments(model, keys, [batch]))
    unmasked = collect_moments(model, keys, [{"input_ids": ids, "attention_mask": torch.ones_like(mask)}])
    for key in keys:
        a, b = (vars(result[key]) for result in results)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(results[0][key].inputs, unmasked[key].inputs, rtol=1e-2)


def test_forms_of_batches_agree():
    net, x = nn.Linear(4, 3), torch.randn(10, 4, generator=seeded())
    labels = torch.zeros(10)
    key = ("", "activation")
    truth = collect_moments(net, [key], [x])[key].inputs
    for batch in ((x, labels), [x, labels], {"input": x}, ({"input": x}, labels)):
        torch.testing.assert_close(collect_moments(net, [key], [batch])[key].inputs, truth)
    torch.testing.assert_close(collect_moments(net, [key], iter([x]))[key].inputs, truth)
    for wrong, message in ((x, "put a single batch in a list"), (["text"], "a calibration batch is str")):
        with pytest.raises(TypeError, match=message):
            collect_moments(net, [key], wrong)
    with pytest.raises(ValueError, match="no batches"):
        collect_moments(net, [key], [])


def test_repeats_bit_for_bit_and_depends_on_the_seed():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    data = [torch.randn(8, 6, generator=seeded())]
    a, b, c = (collect_moments(net, [("0", "fisher")], data, seed=s)["0", "fisher"].outputs for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.fail = False

    def forward(self, x):
        y = self.drop(torch.relu_(self.norm(self.conv(x)))).mean((2, 3))
        if self.fail:
            raise RuntimeError("the model fails")
        return self.head(y)


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail):
    torch.manual_seed(0)
    model = Fragile().train()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    model(torch.randn(2, 1, 5, 5)).sum().backward()
    model.fail = fail
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    data = [torch.randn(4, 1, 5, 5)]
    if fail:
        with pytest.raises(RuntimeError, match="the model fails"):
            collect_moments(model, [("conv", "fisher"), ("head", "fisher")], data)
    else:
        collect_moments(model, [("conv", "fisher"), ("head", "fisher")], data)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == wanted
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert not model.conv._forward_hooks


def test_in_place_change_of_an_input_is_noticed():
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide = nn.Linear(3, 3), nn.Linear(3, 8)

        def forward(self, x):
            h = self.stem(x) * 1.0
            y = self.wide(h)
            h.add_(1.0)
            return y

    with pytest.raises(RuntimeError, match="changed in place"):
        collect_moments(Careless(), [("stem", "fisher"), ("wide", "fisher")], [torch.randn(4, 3)])


def test_works_inside_no_grad_and_inference_mode():
    net, data = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), [torch.randn(6, 4)]
    truth = collect_moments(net, [("0", "fisher")], data)["0", "fisher"].outputs
    with torch.no_grad():
        torch.testing.assert_close(collect_moments(net, [("0", "fisher")], data)["0", "fisher"].outputs, truth)
    with torch.inference_mode():
        same = [data[0] * 1.0]
        torch.testing.assert_close(collect_moments(net, [("0", "fisher")], same)["0", "fisher"].outputs, truth)
