"""Whether a candidate computes the right thing: ours by the project's accuracy rule, peers within a looser one.

The truth of a case is computed once, in float64, and shared by all candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inherit_kernels.testing.accuracy import GRADIENT_FACTOR, OUTPUT_FACTOR, PERTURBATIONS, assert_within
from inherit_kernels.testing.cases import generator_on

PEER_FACTOR = 32  # engines approximate erf and exp, and round each head: still far from a wrong answer
PEER_ELEMENT = 64
LARGE = 2e9  # FLOPs above which one perturbation serves: fewer make the rule stricter, never laxer

Function = Callable[[dict[str, Tensor | None]], Tensor]


class Truth:
    """Outputs, and gradients where a cotangent is given, in float64, in the dtype itself, and of perturbed inputs.

    Args:
        function: the definition, from tensors of any dtype.
        inputs: its tensors in the dtype that is timed.
        flops: of one evaluation.
    """

    def __init__(
        self, function: Function, inputs: dict[str, Tensor | None], cotangent: Tensor | None, flops: float
    ) -> None:
        dtype = next(value.dtype for value in inputs.values() if value is not None)
        self.epsilon = torch.finfo(dtype).eps
        self.exact = _evaluate(function, inputs, cotangent, torch.float64)
        self.plain = _evaluate(function, inputs, cotangent, dtype)
        self.perturbed = []
        for seed in range(PERTURBATIONS if flops < LARGE else 1):
            moved = {name: _perturb(value, self.epsilon, seed) for name, value in inputs.items()}
            self.perturbed.append(_evaluate(function, moved, _perturb(cotangent, self.epsilon, seed), torch.float64))

    def check_ours(self, who: str, results: dict[str, Tensor]) -> None:
        """The accuracy rule on every result.

        Raises:
            AssertionError: it is broken.
        """
        for name, result in results.items():
            factor = OUTPUT_FACTOR if name == "y" else GRADIENT_FACTOR
            others = [other[name] for other in self.perturbed]
            assert_within(f"{who} {name}", result, self.exact[name], self.plain[name], others, factor, self.epsilon)

    def check_peer(self, who: str, results: dict[str, Tensor]) -> None:
        """Norm and every element within a multiple of what plain torch loses.

        Raises:
            AssertionError: a peer computes something else.
        """
        for name, result in results.items():
            exact = self.exact[name]
            if result.shape != exact.shape:
                raise AssertionError(f"{who} {name}: shape {list(result.shape)}, expected {list(exact.shape)}")
            error = result.double() - exact
            losses = [other[name].double() - exact for other in (self.plain, *self.perturbed)]
            for what, size, factor in (("norm", _norm, PEER_FACTOR), ("an element", _largest, PEER_ELEMENT)):
                allowed = factor * (max(map(size, losses)) + self.epsilon * size(exact))
                if not size(error) <= allowed:
                    raise AssertionError(f"{who} {name}: {what} is off by {size(error):.3g}, allowed {allowed:.3g}")

    def error(self, results: dict[str, Tensor]) -> float:
        """The largest |r − a| over the largest |a|, of the worst result."""
        worst = 0.0
        for name, result in results.items():
            exact = self.exact[name]
            worst = max(worst, _largest(result.double() - exact) / max(_largest(exact), 1e-300))
        return worst


def mask_kink(cotangent: Tensor, preactivation: Tensor, dtype: torch.dtype) -> Tensor:
    """The cotangent, zero where relu has its kink and either one-sided derivative is right."""
    near = preactivation.abs() < 16 * torch.finfo(dtype).eps * preactivation.abs().max()
    return cotangent.masked_fill(near, 0.0)


def _evaluate(
    function: Function, inputs: dict[str, Tensor | None], cotangent: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    leaves: dict[str, Any] = {
        name: None if value is None else value.detach().to(dtype).requires_grad_(cotangent is not None)
        for name, value in inputs.items()
    }
    with torch.set_grad_enabled(cotangent is not None):
        y = function(leaves)
    if cotangent is None:
        return {"y": y}
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(y, list(present.values()), cotangent.to(dtype))
    return {"y": y.detach(), **{f"d_{name}": gradient for name, gradient in zip(present, gradients, strict=True)}}


def _perturb(value: Tensor | None, epsilon: float, seed: int) -> Tensor | None:
    if value is None:
        return None
    generator = generator_on(value.device, seed)
    signs = torch.randint(0, 2, value.shape, generator=generator, device=value.device) * 2 - 1
    return value.double() * (1 + epsilon * signs)


def _norm(value: Tensor) -> float:
    return float(value.double().norm())


def _largest(value: Tensor) -> float:
    """NaN stays NaN, and no comparison lets it pass."""
    return float(value.abs().max()) if value.numel() else 0.0
