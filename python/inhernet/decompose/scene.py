"""What a budget may look at: spectra, sizes, times and errors of the layers that it governs, found when asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..budgets.allocate import Grid, Layer, grid_of
from ..console import progress
from ..layers import replaced, sharing
from ..measure import interleaved
from ..nn import empty_like_dense, from_dense
from .batches import batch_size, call, device_of, model_inputs, undisturbed
from .batchnorm import has_batchnorm
from .layers import LayerPlan
from .pieces import Piece, TooFew, pieces_of
from .plans import Plan
from .sensitivity import ENOUGH, Judge

# A layer is timed dense and at these shares of the rank where it stops paying, so long each.
SHARES, SECONDS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0), 0.05
# Seconds for a network, timed beside its teacher: with 1.5 MiniLM met its budgets to 3 to 5 %.
NETWORK_SECONDS = 4.0
# Pieces (of 32 samples) that each layer's effect is measured on.
FEW = 4


@dataclass(frozen=True)
class Sight:
    """What a layer was called with for the example inputs: its input, how often, and how many positions it computed."""

    x: Tensor
    calls: int
    positions: int
    per_gate: int


class PlanScene:
    """`inhernet.budgets.Scene` of a plan that is being made. `model` has its layers opened."""

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        layers: Sequence[LayerPlan],
        shared_currency: bool,
        factors_of: Any,
        example: Any,
    ) -> None:
        self.plan, self.model, self._global = plan, model, shared_currency
        self.layers: Sequence[Layer] = layers
        self._factors_of, self._example = factors_of, example
        self.selected: Sequence[Layer] = plan.selected
        self.model_params = plan.model_params
        config = plan.config
        self.guard, self.rank_step, self.own_ranks = config.break_even, config.rank_step, config.round_to == "auto"
        self.grid: Grid = grid_of(config.round_to, config.device)
        self._sights: dict[str, Sight] = {}
        self._judge: Judge | None = None
        self._reference = 0.0

    def is_global(self) -> bool:
        if not self._global:
            return False
        odd = next((la for la in self.layers if (la.name, "fisher") not in (self.plan.statistics or {})), None)
        if odd is not None:
            raise ValueError(
                f"layer {odd.name!r} has init={self.plan[odd.name].init!r}, whose energy is no currency across layers; "
                "set allocation='fisher' to measure every layer, or allocation='uniform'"
            )
        return True

    def spectrum(self, layer: Layer, shared: bool = False) -> Tensor:
        spectrum: Tensor = self._factors_of(self.plan, self.model, layer, "fisher" if shared else None).spectrum
        return spectrum * self._effect(layer) ** 0.5 if shared else spectrum

    def bytes_each(self, layer: Layer) -> int:
        dense: Any = self.model.get_submodule(layer.name)
        return int(dense.weight.element_size())

    def model_bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    def positions(self, layer: Layer) -> tuple[int, int]:
        sight = self._seen(layer)
        return sight.positions, sight.per_gate

    def milliseconds(self, layer: Layer, rank: int | None) -> float:
        times, calls = self._times(layer), self._seen(layer).calls
        if rank is None:
            return calls * times[0][1]
        points = times[1:]
        below = max((p for p in points if p[0] <= rank), default=points[0])
        above = min((p for p in points if p[0] >= rank), default=points[-1])
        share = 0.0 if above[0] == below[0] else (rank - below[0]) / (above[0] - below[0])
        return calls * (below[1] + share * (above[1] - below[1]))

    def latency(self, ranks: Mapping[str, int | None] | None) -> float:
        """Timed beside the teacher: what disturbs both drops out of the ratio."""
        inputs = self._inputs()
        nets = (
            {"teacher": self.model} if ranks is None else {"teacher": self.model, "model": self._network(ranks, False)}
        )
        calls = {name: (lambda net=net: call(net, inputs)) for name, net in nets.items()}
        with undisturbed(self.model):
            for net in nets.values():
                net.eval()
            found = interleaved(calls, NETWORK_SECONDS)
        if ranks is None:
            self._reference = found["teacher"].p50
            return self._reference
        return found["model"].p50 / found["teacher"].p50 * (self._reference or found["teacher"].p50)

    def error(self, ranks: Mapping[str, int | None]) -> float:
        if self.plan.calibration is None:
            raise ValueError("a FidelityBudget needs calibration data at hand; pass calibration=")
        with undisturbed(self.model):
            if self._judge is None:
                whole = self._pieces()
                chosen = whole[:: -(-len(whole) // ENOUGH)]
                self._judge = Judge(self.model, self.model, chosen, self.plan.output_fn)
            self._judge.model = self._network(ranks, True).eval()
            return self._judge.errors()["held out"]

    def _effect(self, layer: Layer) -> float:
        """How much more the output feels of what the layer loses than its spectrum says, measured for all layers at once.

        The currency is the first order of the output's change and takes errors of positions for independent; the value
        projections of MiniLM cost up to 1.8 times the average of what it says, the last block's dense layers 0.7 times. With
        it, cosine as decomposed at 74, 50 and 31 %: 0.965 → 0.969, 0.896 → 0.900, 0.787 → 0.791, on everyday sentences
        0.950 → 0.953, 0.850 → 0.851, 0.703 → 0.705. The whole curve of each layer instead of one rank: no better (0.970,
        0.900, 0.791). Not with BatchNorm, which is estimated anew only for the whole network: digits at 20 %, refined, error
        0.101 → 0.119.
        """
        effects = self.plan.effects
        if self.plan.config.allocation != "auto" or has_batchnorm(self.model):
            return 1.0
        if self.plan.calibration is not None and any(la.name not in effects for la in self.layers):
            effects |= self._measured_effects()
        return effects.get(layer.name, 1.0)  # a plan from a file brings those that were measured, not the data

    def _measured_effects(self) -> dict[str, float]:
        """Squared error of the output with one layer at a quarter of its ranks, over what its spectrum loses there."""
        try:
            whole = self._pieces()
        except TooFew:  # planning has warned of it
            return {layer.name: 1.0 for layer in self.layers}
        ratios: dict[str, float] = {}
        with undisturbed(self.model), progress("sensitivity", len(self.layers)) as bar:
            judge = Judge(self.model, self.model, whole[:: -(-len(whole) // FEW)], self.plan.output_fn)
            for layer in self.layers:
                factors = self._factors_of(self.plan, self.model, layer, "fisher")
                rank = max(1, layer.limit(self.guard) // 4)
                dense = self.model.get_submodule(layer.name)
                low = from_dense(dense, rank, factors=factors.take(rank), noise=0.0)
                judge.model = replaced(sharing(self.model), layer.name, low).eval()
                lost = float(factors.spectrum[rank:].square().sum())
                error = judge.errors()["held out"]
                ratios[layer.name] = error**2 / lost if lost > 0 and math.isfinite(error) else 0.0
                bar.advance(1, layer.name)
        usual = [ratio for ratio in ratios.values() if ratio > 0] or [1.0]
        scale = math.exp(sum(map(math.log, usual)) / len(usual))
        return {name: ratio / scale if ratio > 0 else 1.0 for name, ratio in ratios.items()}

    def _pieces(self) -> list[Piece]:
        """The calibration data, all of it to judge by."""
        assert self.plan.calibration is not None  # both callers have looked
        pieces = pieces_of(self.plan.calibration, device_of(self.model), self.plan.config.seed)
        return [replace(piece, role="held out") for piece in pieces if piece.role != "elsewhere"]

    def _network(self, ranks: Mapping[str, int | None], filled: bool) -> nn.Module:
        """The network with these ranks: factors of the teacher, or any numbers where only time matters."""
        model = sharing(self.model)
        decided = {layer.name: layer.rank for layer in self.selected} | dict(ranks)
        for layer in self.selected:
            rank = decided[layer.name]
            if rank is None:
                continue
            dense = model.get_submodule(layer.name)
            module: nn.Module
            if filled:
                factors = self._factors_of(self.plan, self.model, layer).take(rank)
                module = from_dense(dense, rank, factors=factors, noise=0.0, **self.plan[layer.name].form)
            else:
                module = empty_like_dense(dense, rank, **self.plan[layer.name].form)
            model = replaced(model, layer.name, module)
        return model

    def _inputs(self) -> Any:
        if self._example is None and self.plan.calibration is not None:
            self._example = next(iter(self.plan.calibration))
        if self._example is None:
            raise ValueError(
                f"{type(self.plan.config.budget).__name__} needs to know what the model is called with; pass "
                "example_inputs= (a batch), or calibration="
            )
        return model_inputs(self._example, device_of(self.model))

    def _seen(self, layer: Layer) -> Sight:
        if not self._sights:
            self._look()
        if layer.name not in self._sights:
            raise ValueError(
                f"layer {layer.name!r} is not reached by the example inputs; exclude it, or give other inputs"
            )
        return self._sights[layer.name]

    def _look(self) -> None:
        inputs = self._inputs()
        examples = max(1, batch_size(inputs))
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

        def hook(name: str) -> Any:
            def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                x = args[0] if args else kwargs["input"]
                calls.setdefault(name, []).append((x.detach(), output.detach()))

            return seen

        modules = {layer.name: self.model.get_submodule(layer.name) for layer in self.selected}
        handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
        try:
            with undisturbed(self.model), torch.no_grad():
                call(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        for layer in self.selected:
            seen = calls.get(layer.name, [])
            if seen:
                outputs = sum(y.numel() // layer.shape[0] for _, y in seen)
                pixels = seen[0][1][..., 0, :, :].numel() // max(1, len(seen[0][1])) if layer.kind == "conv2d" else 1
                self._sights[layer.name] = Sight(seen[0][0], len(seen), outputs // examples, pixels)

    def _times(self, layer: Layer) -> list[tuple[int, float]]:
        """Rank (0: dense) and milliseconds of one call, at candidate ranks; the times never fall with the rank."""
        dense, x = self.model.get_submodule(layer.name), self._seen(layer).x
        key = (
            repr(dense),
            str(x.dtype),
            tuple(x.shape),
            x.stride(),
            str(x.device),
            torch.get_num_threads(),
            repr(self.plan[layer.name].form),
        )
        if key not in self.plan.times:
            top = max(1, layer.limit(self.guard) - 1)
            ranks = sorted({max(1, round(share * top)) for share in SHARES})
            modules = {rank: empty_like_dense(dense, rank, **self.plan[layer.name].form).eval() for rank in ranks}
            calls = {str(rank): (lambda module=module: module(x)) for rank, module in modules.items()}
            found = interleaved({"0": lambda: dense(x), **calls}, SECONDS)
            times, least = [(0, found["0"].p50)], 0.0
            for rank in ranks:
                least = max(least, found[str(rank)].p50)
                times.append((rank, least))
            self.plan.times[key] = times
        return self.plan.times[key]
