"""`optimize`: the fastest form of every layer, by measuring."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from inherit_kernels.testing import cold_copies, time_on_gpu

from ..console import Steps, progress, say
from ..decompose.batches import copied, device_of, floating_outputs
from ..decompose.levels import ordinary
from ..measure import interleaved
from ..nn import LowRankModule
from . import graph as graphs
from .forms import FORMS, Form, candidates, form_of, storages_of
from .frozen import Frozen, freeze, identity, to_channels_last
from .observe import observe
from .report import LayerChoice, Optimization, stamp, versions
from .sites import Site, is_layer

#: What medians of the same model differ by from run to run; a variant must be faster by more than that.
NOISE = 0.01


def optimize(
    model: nn.Module,
    example_inputs: Any,
    *,
    choices: Optimization | Mapping[str, str] | str | os.PathLike[str] | None = None,
    channels_last: bool | None = None,
    cuda_graph: bool | None = None,
    seconds: float = 0.1,
    show: bool = True,
) -> nn.Module:
    """A new model for inference that computes the same, as fast as its layers can go here.

    BatchNorm that directly follows a layer goes into its weights (exact in eval mode: `up` and every head's bias; gates
    sum to one). Where torch.fx can trace the model, a residual addition and an activation go into the layer too. Each
    layer gets the form that measures fastest on its own inputs: one dense layer with the merged weight, two torch calls,
    the fused kernel, or the fused kernel on packed weights; on a GPU also two library products and the Triton kernels. At
    the end the whole is measured against what was given, and if it is not faster, what was given is kept.
    On a GPU calls of one kind (shapes, dtypes, constants) run in one CUDA graph from the second on, where that is faster;
    layers are then timed in graphs too, each call with its weights out of the L2 cache.

    Args:
        model: inherited or dense, in any mode; it is not changed. Of an elastic one its present level is taken.
        example_inputs: what it will be called with: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments. Choices are for these shapes; other shapes stay correct.
        choices: an earlier result's `optimization` or its JSON file: nothing is measured. Or forms by layer name,
            `{"layer1.0.conv1": "unfused"}`: these are taken, the other layers measured.
        channels_last: whether images are turned to channels-last at the entry; None measures both, where there are
            convolutions.
        cuda_graph: whether calls on a GPU are captured into CUDA graphs; None measures both. What a graph cannot repeat
            (gradients, autocast, other types of arguments) runs without one.
        seconds: measuring time per candidate.
        show: print the table of what was chosen and why.

    Returns:
        A copy in eval mode whose parameters stay as they were, so that `inhernet.save` and `state_dict` work;
        `.optimization` says what was chosen. Its `train()`, `load_state_dict()` and moves to another device or dtype
        raise RuntimeError. The copy holds folded, merged and packed weights beside its parameters (reported).

    Raises:
        ValueError: the model is optimised already; a choice that does not exist, or for a layer that is not there.

    Example:
        >>> from inhernet.nn import LowRankLinear
        >>> layers = nn.Sequential(LowRankLinear(64, 64, 8), nn.ReLU())
        >>> fast = optimize(layers, torch.randn(4, 64), seconds=0.01, show=False)
        >>> fast.optimization.forms["0"] in ("dense", "unfused", "fused", "packed")
        True
    """
    if isinstance(model, Frozen):
        raise ValueError("model is optimised already; give the model that it was made from")
    model = ordinary(model)
    saved, forced = _read_choices(choices)
    example = Example(example_inputs)
    with torch.inference_mode(False), torch.no_grad():
        base = copied(model).eval().requires_grad_(False)
        if saved is not None:
            fast = apply(base, saved)
        else:
            given = base if any(module.training for module in model.modules()) else model
            fast = _Search(base, example, forced, channels_last, cuda_graph, seconds, show).best(given)
    if show:
        result(fast).show()
    return fast


def result(model: nn.Module) -> Optimization:
    """The report of an optimised model."""
    return model.__dict__["optimization"]


def restore(model: nn.Module, text: str) -> nn.Module:
    """A loaded model with the choices of its `optimized.json` applied, if they were measured on a device like this one.

    Otherwise it says why not, and returns the model as it is.

    Raises:
        ValueError: the text is damaged, or its choices do not fit the model.
    """
    saved = Optimization.from_json(text)
    sentence = saved.mismatch(device_of(model))
    if sentence is not None:
        say(
            f"note: the saved choices were measured elsewhere ({sentence}), so the plain model is loaded; "
            "inhernet.optimize(model, example_inputs) measures again",
            stderr=True,
        )
        return model
    with torch.no_grad():
        return apply(model.eval().requires_grad_(False), saved)


def apply(base: nn.Module, saved: Optimization) -> nn.Module:
    """Freeze `base`, in place, with the saved choices; nothing is measured."""
    if saved.kept == "given":
        return _finished(freeze(base, cuda_graph=saved.cuda_graph), saved)
    sites = {layer.site.name: layer.site for layer in saved.layers}
    modules = dict(base.named_modules())
    for site in sites.values():
        for name in filter(None, (site.name, site.batchnorm)):
            if name not in modules:
                raise ValueError(f"choices: layer {name!r} is not in the model; it was saved for another one")
        if not is_layer(modules[site.name]):
            raise ValueError(f"choices: layer {site.name!r} is {type(modules[site.name]).__name__}, which has no forms")
    forms = {layer.site.name: form_of(layer.form, layer.site, base, saved.channels_last) for layer in saved.layers}
    if not saved.traced:
        return _finished(_replace_layers(base, sites.values(), forms, saved), saved)
    graph, reason = graphs.trace(base)
    if graph is None:
        raise ValueError(f"choices: they were made for a traced model, but {reason}; optimise it again")
    chains = graphs.find_chains(graph, base, None, sites)
    run = graphs.rewrite(graph, base, chains, {name: form.run for name, form in forms.items()})
    return _finished(freeze(base, run, channels_last=saved.channels_last, cuda_graph=saved.cuda_graph), saved)


def _replace_layers(
    base: nn.Module, sites: Iterable[Site], forms: Mapping[str, Form], saved: Optimization
) -> nn.Module:
    for site in sites:
        form = forms[site.name]
        whole = saved.cuda_graph and not site.name  # the model is this one layer
        freeze(base.get_submodule(site.name), form.run, form.name, leaf=True, cuda_graph=whole)
        if site.batchnorm is not None:
            freeze(base.get_submodule(site.batchnorm), identity, "folded", leaf=True)
    if isinstance(base, Frozen):  # a single layer
        return base
    return freeze(base, channels_last=saved.channels_last, cuda_graph=saved.cuda_graph)


def _finished(model: nn.Module, report: Optimization) -> nn.Module:
    model.__dict__["optimization"] = report
    return model


def _read_choices(choices: Any) -> tuple[Optimization | None, dict[str, str]]:
    if isinstance(choices, (str, os.PathLike)):
        try:
            return Optimization.from_json(Path(choices).read_text(encoding="utf-8")), {}
        except ValueError as error:
            raise ValueError(f"choices: {os.fspath(choices)} cannot be read: {error}") from error
    if choices is None or isinstance(choices, Optimization):
        return choices, {}
    if not isinstance(choices, Mapping):
        raise TypeError(
            f"choices is {type(choices).__name__}, expected an Optimization, its file, or forms by layer name"
        )
    for name, form in choices.items():
        if form not in FORMS:
            raise ValueError(f"choices[{name!r}] is {form!r}, expected one of {', '.join(FORMS)}")
    return None, dict(choices)


class Example:
    """Example inputs and how a model is called with them. Copies are passed: a forward may write into its inputs."""

    def __init__(self, inputs: Any) -> None:
        self.args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
        self.kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}

    def __call__(self, run: Callable[..., Any]) -> Any:
        return self.bound(run)()

    def bound(self, run: Callable[..., Any]) -> Callable[[], Any]:
        """A call to be timed; its calls share one copy of the inputs."""
        args, kwargs = _copied((self.args, self.kwargs))
        return partial(run, *args, **kwargs)

    def positional(self, graph: fx.Graph) -> list[Any]:
        """The arguments in the order of a graph's placeholders."""
        names = [node.target for node in graph.nodes if node.op == "placeholder"]
        return _copied([*self.args, *(self.kwargs[str(name)] for name in names[len(self.args) :])])


def _copied(values: Any) -> Any:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, values)


class _Search:
    def __init__(
        self,
        base: nn.Module,
        example: Example,
        forced: dict[str, str],
        channels_last: bool | None,
        cuda_graph: bool | None,
        seconds: float,
        show: bool,
    ) -> None:
        self.base, self.example, self.forced, self.seconds, self.show = base, example, forced, seconds, show
        self.expected = floating_outputs(example(base))
        self.traced, self.untraced = self._traceable()
        layers = {name: module for name, module in base.named_modules() if is_layer(module)}
        for name in forced:
            if name not in layers:
                raise ValueError(f"choices: {name!r} is not a layer of the model; it has {', '.join(list(layers)[:8])}")
        images = any(_weight(layer).dim() == 4 for layer in layers.values())
        formats = [channels_last] if channels_last is not None else [False, True] if images else [False]
        self.gpu = on_gpu(base)
        graphs_wanted = [bool(cuda_graph)] if cuda_graph is not None or not self.gpu else [False, True]
        self.ways = [(format, graph and self.gpu) for graph in graphs_wanted for format in formats]
        self.canonical = storages_of(base.state_dict().values())
        self.measured: dict[Any, dict[str, float]] = {}

    def best(self, given: nn.Module) -> nn.Module:
        """The fastest variant, or the model as given."""
        variants: dict[str, nn.Module] = {}
        for channels_last, cuda_graph in self.ways:
            name = "optimised" + ", channels-last" * channels_last + ", in a CUDA graph" * cuda_graph
            try:
                report = self._choose(channels_last, cuda_graph)
                fast = apply(_twin(self.base), report)
                output = self._last_of_calls(fast)
            except RuntimeError:
                if not channels_last or all(other for other, _ in self.ways):
                    raise
                continue  # a forward that calls view() wants contiguous images
            if self._same(output):
                variants[name] = fast
        as_given = replace(report, kept="given", channels_last=False, cuda_graph=False)
        if any(cuda_graph for _, cuda_graph in self.ways):
            in_graph = apply(_twin(self.base), replace(as_given, cuda_graph=True))
            if self._same(self._last_of_calls(in_graph)):
                variants["given, in a CUDA graph"] = in_graph
        calls = {name: self.example.bound(run) for name, run in {"given": given, **variants}.items()}
        found = self._medians(calls, max(self.seconds * 5, 0.05))
        mine = [name for name in variants if result(variants[name]).kept == "optimised"]
        fastest = min(mine if self.forced else variants, key=found.__getitem__, default=None)
        if fastest is None or (not self.forced and found[fastest] > found["given"] * (1 - NOISE)):
            return _finished(freeze(self.base), replace(as_given, milliseconds=found))
        return _finished(variants[fastest], replace(result(variants[fastest]), milliseconds=found))

    def _last_of_calls(self, run: nn.Module) -> Any:
        """The output of a third call: a CUDA graph is captured in the second and replayed."""
        for _ in range(3 if result(run).cuda_graph else 1):
            output = self.example(run)
        return output

    def _traceable(self) -> tuple[bool, str]:
        graph, reason = graphs.trace(self.base)
        if graph is None:
            return False, reason
        try:
            output = fx.Interpreter(self.base, graph=graph).run(*self.example.positional(graph))
        except Exception as error:
            return False, f"its torch.fx graph does not run ({type(error).__name__})"
        return (True, "") if self._same(output) else (False, "its torch.fx graph computes something else")

    def _same(self, output: Any) -> bool:
        """Whether outputs agree with the given model's, to the square root of the dtype's precision."""
        found = floating_outputs(output)
        if [name for name, _ in found] != [name for name, _ in self.expected]:
            return False
        for (_, value), (_, wanted) in zip(found, self.expected, strict=True):
            if value.shape != wanted.shape or value.dtype != wanted.dtype:
                return False
            error = (value.double() - wanted.double()).norm()
            if not error <= torch.finfo(wanted.dtype).eps ** 0.5 * wanted.double().norm():
                return False
        return True

    def _choose(self, channels_last: bool, cuda_graph: bool) -> Optimization:
        """Measure every layer on what it gets in this memory format, in graphs or one call after another."""
        samples = self._samples()
        if channels_last:  # as the chosen forms will pass images on, whatever the given layers do
            samples = [(site, to_channels_last(inputs)) for site, inputs in samples]
        title = "measuring layers" + ", channels-last" * channels_last + ", in graphs" * cuda_graph
        with progress(title, len(samples), enabled=self.show) as bar:
            layers = tuple(self._layer(site, inputs, channels_last, cuda_graph, bar) for site, inputs in samples)
        return Optimization(
            layers=layers,
            channels_last=channels_last,
            cuda_graph=cuda_graph,
            traced=self.traced,
            untraced=self.untraced,
            device=stamp(device_of(self.base)),
            versions=versions(),
        )

    def _samples(self) -> list[tuple[Site, tuple[Tensor, ...]]]:
        """Every site with the tensors it gets: x, and the residual where it takes one."""
        if not self.traced:
            sites, inputs = observe(self.base, lambda: self.example(self.base))
            return [(site, (inputs[site.name],)) for site in sites]
        graph, _ = graphs.trace(self.base)
        assert graph is not None  # it was traced before
        recorder = graphs.Recorder(self.base, graph)
        recorder.run(*self.example.positional(graph))
        chains = graphs.find_chains(graph, self.base, recorder.values)
        wanted = {chain.site.name: chain for chain in reversed(chains)}
        return [(chain.site, recorder.inputs(chain)) for chain in wanted.values()]

    def _layer(
        self, site: Site, inputs: tuple[Tensor, ...], channels_last: bool, cuda_graph: bool, bar: Steps
    ) -> LayerChoice:
        forms, refused = candidates(site, self.base, channels_last)
        layer = self.base.get_submodule(site.name)
        times: dict[str, float] = {}
        if site.name in self.forced:
            form, reason = self.forced[site.name], "as told"
            if form not in forms:
                raise ValueError(f"choices: {refused[form]}")
        elif len(forms) == 1:
            form, reason = next(iter(forms)), "its only form"
        else:
            times = self._times(site, inputs, forms, channels_last, cuda_graph)
            form = min((name for name in forms if name in times), key=times.__getitem__, default=next(iter(forms)))
            reason = "fastest" if form in times else "none could be timed"
        bar.advance()
        return LayerChoice(
            site=site,
            form=form,
            reason=reason,
            microseconds=times,
            weight_bytes=sum(p.nbytes for p in layer.parameters()),
            extra_bytes=forms[form].extra_bytes(self.canonical),
        )

    def _times(
        self,
        site: Site,
        inputs: tuple[Tensor, ...],
        forms: Mapping[str, Form],
        channels_last: bool,
        cuda_graph: bool,
    ) -> dict[str, float]:
        """Medians in µs, from an earlier layer of equal shapes and settings if there was one."""
        layer = self.base.get_submodule(site.name)
        shapes = tuple((x.shape, x.stride(), x.dtype) for x in (*inputs, *layer.parameters()))
        key = (layer.extra_repr(), replace(site, name="", batchnorm=site.batchnorm and ""), shapes, cuda_graph, *forms)
        if key not in self.measured:
            if cuda_graph:
                found = self._times_in_graphs(site, inputs, forms, channels_last)
            else:
                calls = {"given": _as_given(site, self.base, inputs)}
                calls |= {name: partial(form.run, *inputs) for name, form in forms.items()}
                found = {name: 1e3 * value for name, value in self._medians(calls, self.seconds).items()}
            self.measured[key] = {name: round(value, 2) for name, value in found.items()}
        return self.measured[key]

    def _times_in_graphs(
        self, site: Site, inputs: tuple[Tensor, ...], forms: Mapping[str, Form], channels_last: bool
    ) -> dict[str, float]:
        """µs in CUDA graphs, each call on weights and inputs of its own, so that none are in the L2 cache.

        A form that fails or computes something else is left out.
        """
        parts = {name: self.base.get_submodule(name) for name in (site.name, site.batchnorm) if name is not None}
        tensors = [*inputs, *(tensor for part in parts.values() for tensor in part.parameters())]
        calls: dict[str, list[Callable[[], object]]] = {name: [] for name in ("given", *forms)}
        for _ in range(cold_copies(sum(tensor.nbytes for tensor in tensors))):
            copy: Any = _Parts({name: copied(part) for name, part in parts.items()})
            own = _copied(inputs)
            calls["given"].append(_as_given(site, copy, own))
            for name in forms:
                calls[name].append(partial(form_of(name, site, copy, channels_last).run, *own))
        expected = calls["given"][0]()
        return {name: timing.median for name, timing in time_on_gpu(calls, expected).items()}

    def _medians(self, calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        """Milliseconds; of CPU time on one thread, so that other processes do not count."""
        alone = torch.get_num_threads() == 1 and device_of(self.base).type == "cpu"
        return {name: value.p50 for name, value in interleaved(calls, seconds, cpu_time=alone).items()}


class _Parts(nn.Module):
    """Some modules under the names that they have in a model."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = dict(parts)  # no submodules: names with dots

    def get_submodule(self, target: str) -> nn.Module:
        return self.parts[target]


def on_gpu(model: nn.Module) -> bool:
    """Whether the model computes on a CUDA device."""
    return device_of(model).type == "cuda"


def _twin(model: nn.Module) -> nn.Module:
    """A copy that shares parameters and buffers, which nobody writes."""
    return copied(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _as_given(site: Site, model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """The site's modules as the model calls them."""
    layer = model.get_submodule(site.name)
    norm = None if site.batchnorm is None else model.get_submodule(site.batchnorm)
    activation = graphs.FUNCTIONS.get(site.activation)

    def call() -> Tensor:
        y = layer(inputs[0])
        y = y if norm is None else norm(y)
        y = y if len(inputs) == 1 else y + inputs[1]
        return y if activation is None else activation(y)

    return call


def _weight(layer: Any) -> Tensor:
    return layer.down if isinstance(layer, LowRankModule) else layer.weight
