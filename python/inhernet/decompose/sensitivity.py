"""How much a network's output feels an error at a block's output, and how far the output is from the teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..console import progress
from .batches import call, floating_outputs
from .blocks import main_output
from .calibration import NotFinite, origin, project
from .levels import levels_to_visit, visiting
from .pieces import Piece, rows_of

# Pieces that the gradients are taken on (512 samples), and the widest output that gets a metric of its own.
ENOUGH, WIDEST = 16, 8192


def sensitivities(
    teacher: nn.Module, blocks: list[str], pieces: list[Piece], output_fn: Callable[[Any], Any] | None, seed: int
) -> dict[str, Tensor]:
    """For each block a matrix `Rᵀ` `[D, D]` with `RᵀR = G / mean diag G + I`.

    G is the second moment, over positions, of the gradients at the block's output of random projections of the network's
    output. The identity keeps what the output does not feel now but might with other data: MiniLM at 50 %, cosine on
    docstrings and on everyday sentences: I alone 0.9491, 0.8970; G + 0.1 I 0.9499, 0.8992; G + I 0.9503, 0.8994. Blocks
    that no gradient reaches are left out.
    """
    sums: dict[str, Tensor] = {}
    generator, scales = torch.Generator().manual_seed(seed), dict[str, float]()
    train = [piece for piece in pieces if piece.role == "train"]
    chosen = train[:: -(-len(train) // ENOUGH)]
    with ExitStack() as stack, torch.enable_grad(), progress("sensitivity", len(chosen)) as bar:
        leaves: list[Tensor] = []
        masks: list[list[Tensor]] = [[]]
        for name in blocks:
            handle = teacher.get_submodule(name).register_forward_hook(_watch(name, sums, masks, leaves))
            stack.callback(handle.remove)
        for piece in chosen:
            masks[0] = piece.masks
            leaves.clear()
            output = call(teacher, piece.inputs)
            targets = floating_outputs(output if output_fn is None else output_fn(output))
            try:
                terms = [project(*t, piece.masks, generator, scales) for t in targets if t[1].requires_grad]
            except NotFinite as problem:
                raise ValueError(f"calibration: {problem}; {origin(piece.inputs)}") from None
            if leaves and terms:
                torch.autograd.grad(torch.stack(terms).sum(), leaves, allow_unused=True)
            bar.advance()
    return {name: _root(total) for name, total in sums.items() if _usable(total)}


def _watch(name: str, sums: dict[str, Tensor], masks: list[list[Tensor]], leaves: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        main = main_output(output)
        if main.shape[1 if main.dim() > 3 else -1] > WIDEST:
            return None
        start = main
        if not main.requires_grad:  # parameters are frozen: the first block starts the graph
            leaves.append(main.detach().requires_grad_())
            start = leaves[-1]
        watched = start.clone()  # what an operation in place may overwrite

        def add(gradient: Tensor) -> None:
            rows = rows_of(gradient.detach(), masks[0]).float()
            sums[name] = sums.get(name, 0) + rows.mT @ rows

        watched.register_hook(add)
        found, spec = pytree.tree_flatten(output)
        return pytree.tree_unflatten([watched if leaf is main else leaf for leaf in found], spec)

    return hook


def _usable(total: Tensor) -> bool:
    mean = float(total.diagonal().mean())
    return bool(total.isfinite().all()) and mean > 0


def _root(total: Tensor) -> Tensor:
    metric = total.double()
    metric = metric / metric.diagonal().mean() + torch.eye(len(metric), dtype=torch.float64, device=metric.device)
    return torch.linalg.cholesky(metric).float()


class Judge:
    """The error of the network's output on the pieces to judge by; `now` is the last one that was kept."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module, pieces: list[Piece], output_fn: Callable[[Any], Any] | None
    ) -> None:
        self.model, self.output_fn = model, output_fn
        self.pieces = [piece for piece in pieces if piece.role != "train"]
        self.truths = [self._outputs(teacher, piece) for piece in self.pieces]
        self.now = self.errors()

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """By role: the root mean square over the output's tensors of `‖model − teacher‖ / ‖teacher‖`; of an elastic network
        the geometric mean over its levels."""
        found = []
        for level in levels_to_visit(self.model):
            with visiting(self.model, level):
                found.append(self._errors())
        return {role: math.prod(part[role] for part in found) ** (1 / len(found)) for role in found[0]}

    def _errors(self) -> dict[str, float]:
        sums: dict[str, dict[str, list[float]]] = {}
        for piece, truth in zip(self.pieces, self.truths, strict=True):
            found = self._outputs(self.model, piece)
            for name, wanted in truth.items():
                pair = sums.setdefault(piece.role, {}).setdefault(name, [0.0, 0.0])
                pair[0] += float((found[name] - wanted).double().square().sum())
                pair[1] += float(wanted.double().square().sum())
        return {role: _root_mean([e / n if n else e for e, n in part.values()]) for role, part in sums.items()}

    @torch.no_grad()
    def _outputs(self, net: nn.Module, piece: Piece) -> dict[str, Tensor]:
        output = call(net, piece.inputs)
        found = floating_outputs(output if self.output_fn is None else self.output_fn(output))
        return {name: rows_of(tensor, piece.masks) for name, tensor in found}


def _root_mean(squares: list[float]) -> float:
    return (sum(squares) / len(squares)) ** 0.5 if squares else 0.0
