"""Saying which backends could serve a call, which one does, and why."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from inherit_kernels.autograd import needs_gradient
from inherit_kernels.dispatch import choose, decide, doubt, forced_backend, problem_of
from inherit_kernels.registry import OPS, Problem


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a short text."""

    problem: Problem
    declined: dict[str, str | None]  # backend -> sentence, None where it can serve
    doubted: dict[str, str]  # backend -> why only force chooses it
    choice: str
    reason: str

    def __str__(self) -> str:
        lines = [str(self.problem)]
        for name, sentence in self.declined.items():
            mark = "->" if name == self.choice else "  "
            served = f"can serve if forced: {self.doubted[name]}" if name in self.doubted else "can serve"
            lines.append(f"{mark} {name:<18}{served if sentence is None else 'declines: ' + sentence}")
        return "\n".join([*lines, f"choice: {self.choice} ({self.reason})"])

    __repr__ = __str__


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backends could serve this call, which one does, and why. Computes nothing.

    Args:
        op: the op's name, such as "lowrank_linear".
        args, kwargs: the arguments that the public function would get.

    Raises:
        ValueError: no such op, or arguments that the op would refuse.

    Example:
        >>> import torch, inherit_kernels as ik
        >>> print(ik.explain("lowrank_linear", torch.randn(2, 8), torch.randn(3, 8), torch.randn(5, 3)))
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    spec = OPS[op]
    function = getattr(import_module(f"inherit_kernels.ops.{op}"), op)
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    tensors, options = spec.normalise(*spec.split(tuple(bound.arguments.values())))
    spec.check(*tensors, *options)
    training = torch.is_grad_enabled() and needs_gradient(tensors)
    problem = problem_of(spec, tensors, options, training)
    declined = {name: backend.supports(problem) for name, backend in spec.backends.items()}
    doubted = {name: sentence for name, backend in spec.backends.items() if (sentence := doubt(backend, problem))}
    forced = forced_backend()
    if forced is not None:
        choice, reason = decide(spec, problem, forced), "forced by use_backend or INHERIT_KERNELS_BACKEND"
    else:
        candidates = [name for name, sentence in declined.items() if sentence is None and name not in doubted]
        choice, reason = choose(spec, problem, candidates)
    return Explanation(problem, declined, doubted, choice, reason)
