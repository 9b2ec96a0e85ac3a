"""What is timed on one case: our backends and the peers, each checked against float64 before it may be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.setting import Runner, Setting
from benchmarks.candidates import factored, our_runner, set_up_without_truth, whole
from benchmarks.correctness import Truth
from benchmarks.gpu.cases import Item
from benchmarks.gpu.device import Device
from benchmarks.gpu.peers import Peer, peers_of
from benchmarks.suites import work_of
from inherit_kernels.dispatch import problem_of, select
from inherit_kernels.registry import OPS

AUTOMATIC = "automatic"
SETS = 16  # at most so many sets of tensors for a cold graph,
SET_BYTES = 1 << 30  # or as many as this holds
COLD_BY_SIZE = 4  # times L2: data that evict themselves need one set
PIECE = 1 << 25  # elements compared at a time: five float64 copies of each are 1.3 GB
PEER_ROWS = 256  # rows or images of a peer's result that are compared


@dataclass
class Candidate:
    """One way of running a case and what became of it."""

    name: str
    kind: str  # ours or peer
    dense: bool = False
    runners: list[Runner] = field(default_factory=list)  # one a set of tensors
    status: str = "ok"  # ok, declined (cannot run), failed (an error), wrong (not timed)
    note: str = ""
    resolved: str = ""
    max_error: float | None = None

    def stop(self, status: str, reason: object) -> None:
        """Not to be timed, and why."""
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        self.status, self.note, self.runners = status, lines[0][:300], []


class Case:
    """The tensors of a measurement and its truths; makes and checks candidates one by one."""

    def __init__(self, item: Item, device: Device) -> None:
        self.item, self.device = item, device
        self.dtype = getattr(torch, item.dtype)
        with_gradient = item.mode != "forward"
        first = set_up_without_truth(item.point, self.dtype, with_gradient, str(device.device))
        self.settings = [first, *(_copy(first) for _ in range(self._sets(first) - 1))]
        self.truth = self._truth(first)
        self.dense_truth: Truth | None = None

    def names(self) -> list[tuple[str, Peer | None]]:
        """Every candidate's name, ours first; the peer to make it from."""
        backends = [name for name in OPS[self.item.point.op].backends if name != "reference"]
        return [(name, None) for name in (AUTOMATIC, *backends)] + list(peers_of(self.item).items())

    def candidate(self, name: str, peer: Peer | None) -> Candidate:
        """Make and check one candidate; an error of its own is recorded, one that ended the device is raised."""
        candidate = Candidate(name, "peer" if peer else "ours", bool(peer and peer.dense))
        try:
            if peer is None:
                sentence = self._declines(name)
                if sentence is not None:
                    candidate.stop("declined", sentence)
                    return candidate
                candidate.runners, candidate.resolved = self._ours(name)
            else:
                candidate.runners = peer.make(self.settings, self.device.compiler)
            with torch.set_grad_enabled(self.item.mode == "training"):
                results = candidate.runners[0].result(candidate.runners[0].run())
            self._check(candidate, results)
        except torch.OutOfMemoryError:
            candidate.stop("failed", "out of memory")
        except AssertionError as wrong:
            candidate.stop("wrong", wrong)
        except Exception as error:  # one candidate's failure is a row, not the end of the run
            if self.device.broken():
                raise
            candidate.stop("failed", f"{type(error).__name__}: {error}")
        return candidate

    def _declines(self, name: str) -> str | None:
        if name == AUTOMATIC:
            return None
        tensors, options = self._arguments(self.settings[0])
        problem = problem_of(OPS[self.item.point.op], tensors, options, self.item.mode != "forward")
        return OPS[self.item.point.op].backends[name].supports(problem)

    def _sets(self, setting: Setting) -> int:
        tensors = [*setting.inputs.values(), *setting.dense.values(), setting.cotangent]
        size = sum(value.nbytes for value in tensors if value is not None)
        moved = work_of(self.item.point, self.dtype.itemsize, False).bytes
        return 1 if moved > COLD_BY_SIZE * self.device.l2 else max(1, min(SETS, SET_BYTES // max(size, 1)))

    def _arguments(self, setting: Setting) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        spec = OPS[self.item.point.op]
        names = [part.split()[-1] for part in spec.options.split(", ")]
        options = dict(zip(names, spec.default_options, strict=True)) | setting.options
        return spec.normalise(tuple(setting.inputs.values()), tuple(options.values()))

    # --- ours ----------------------------------------------------------------------------------------------------------

    def _ours(self, name: str) -> tuple[list[Runner], str]:
        make = self._backward_of if self.item.mode == "backward" else our_runner
        made = [make(setting, name) for setting in self.settings]
        return [runner for runner, _ in made], made[0][1]

    def _backward_of(self, setting: Setting, name: str) -> tuple[Runner, str]:
        """A backend's backward as autograd calls it, on the t that its own forward saved."""
        spec = OPS[self.item.point.op]
        tensors, options = self._arguments(setting)
        backend = select(spec, tensors, options, True, None if name == AUTOMATIC else name)
        with torch.no_grad():
            _, t = backend.forward_saving(*tensors, *options)
        needs = [tensor is not None for tensor in tensors[:-1]]
        dz: Any = setting.cotangent
        run = partial(backend.backward, dz, t, *tensors[:-1], *options, needs)
        resolved = next(key for key, known in spec.backends.items() if known is backend)
        return Runner(run, lambda found: tuple(value for value in found if value is not None)), resolved

    # --- checking ------------------------------------------------------------------------------------------------------

    def _truth(self, setting: Setting) -> Truth:
        point = self.item.point
        flops = work_of(point, 4, setting.training).flops
        return _without_search(
            lambda: Truth(lambda tensors: factored(point, tensors), setting.inputs, setting.cotangent, flops)
        )

    def _check(self, candidate: Candidate, results: Sequence[Tensor]) -> None:
        """Ours by the accuracy rule on every element; a peer by a looser one on its first rows.

        Raises:
            AssertionError: the results are wrong.
        """
        names = self._names_of_results(candidate)
        found = dict(zip(names, results, strict=False))
        if candidate.kind == "ours":
            missing = set(names) - set(found)
            if missing:
                raise AssertionError(f"{candidate.name} returned no {', '.join(sorted(missing))}")
            self._compare(candidate, self.truth, found, Truth.check_ours)
        elif candidate.dense:
            self._compare(candidate, self._truth_of_dense(), {"y": found["y"][:PEER_ROWS]}, Truth.check_peer)
        else:
            first = {name: value[:PEER_ROWS] for name, value in found.items()}
            sliced = _narrowed(self.truth, {name: slice(0, PEER_ROWS) for name in found})
            self._compare(candidate, sliced, first, Truth.check_peer)

    def _names_of_results(self, candidate: Candidate) -> list[str]:
        given = [f"d_{name}" for name, value in self.settings[0].inputs.items() if value is not None]
        if self.item.mode == "forward":
            return ["y"]
        if self.item.mode == "backward":
            given = [name for name in given if name != "d_residual"]
            return given if candidate.kind == "ours" else ["d_x", "d_down", "d_up", "d_bias"]
        return ["y", *given] if candidate.kind == "ours" else ["y"] if candidate.dense else ["y", "d_x"]

    def _compare(
        self, candidate: Candidate, truth: Truth, results: dict[str, Tensor], check: Callable[..., None]
    ) -> None:
        worst = 0.0
        for name, result in results.items():
            exact = truth.exact[name]
            if result.shape != exact.shape:
                raise AssertionError(f"{name}: shape {list(result.shape)}, expected {list(exact.shape)}")
            rows = max(1, PIECE // max(1, exact.numel() // max(1, exact.shape[0])))
            for start in range(0, exact.shape[0], rows):
                piece = slice(start, start + rows)
                part = _narrowed(truth, {name: piece})
                worst = max(worst, part.error({name: result[piece]}))
                candidate.max_error = worst
                check(part, candidate.name, {name: result[piece]})

    def _truth_of_dense(self) -> Truth:
        if self.dense_truth is None:
            setting = self.settings[0]
            inputs: Any = setting.inputs
            residual = inputs["residual"]
            first = {
                "x": inputs["x"][:PEER_ROWS],
                **setting.dense,
                "residual": None if residual is None else residual[:PEER_ROWS],
            }
            flops = work_of(self.item.point, 4, False, dense=True).flops
            self.dense_truth = _without_search(
                lambda: Truth(lambda tensors: whole(setting, tensors), first, None, flops)
            )
        return self.dense_truth


def _without_search(make: Callable[[], Truth]) -> Truth:
    """In float64 it would take longer to try every algorithm of cuDNN than to run the slowest."""
    torch.backends.cudnn.benchmark, wanted = False, torch.backends.cudnn.benchmark
    try:
        return make()
    finally:
        torch.backends.cudnn.benchmark = wanted


def _copy(setting: Setting) -> Setting:
    """The same values in memory of their own."""
    twin = copy.copy(setting)
    twin.inputs = {name: None if value is None else value.clone() for name, value in setting.inputs.items()}
    twin.dense = {name: None if value is None else value.clone() for name, value in setting.dense.items()}
    twin.cotangent = None if setting.cotangent is None else setting.cotangent.clone()
    return twin


def _narrowed(truth: Truth, pieces: dict[str, slice]) -> Truth:
    """A truth about some rows of some results."""
    part = copy.copy(truth)
    part.exact = {name: truth.exact[name][piece] for name, piece in pieces.items()}
    part.plain = {name: truth.plain[name][piece] for name, piece in pieces.items()}
    part.perturbed = [{name: other[name][piece] for name, piece in pieces.items()} for other in truth.perturbed]
    return part
