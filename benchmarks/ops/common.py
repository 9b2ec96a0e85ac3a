"""The regression benchmark of an op: every backend and the packed form, forward and forward with backward, on a few shapes.

A check comes first: a wrong result is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import inherit_kernels
from inherit_kernels.registry import OPS
from inherit_kernels.testing import Case, make_inputs

PACKED = "packed"


def parameters(op: str, cases: list[Case], *, training: bool = False) -> Any:
    """pytest parameters: case × (backends, and in inference the packed form)."""
    forms = [name for name in OPS[op].backends if name != "reference"] + ([] if training else [PACKED])
    return pytest.mark.parametrize(
        "case, form", [pytest.param(case, form, id=f"{case}-{form}") for case in cases for form in forms]
    )


def bench(benchmark: Any, op: str, case: Case, form: str) -> None:
    """Time one form on one case in float32, forward."""
    inputs = make_inputs(op, case, torch.float32)
    call = partial(getattr(inherit_kernels, op), *_arguments(op, inputs, form), **case.options)
    backend = None if form == PACKED else form
    with torch.no_grad(), inherit_kernels.use_backend(backend):
        benchmark.group = f"{op} {case}"
        _check(op, case, inputs, _or_skip(call))
        benchmark(call)


def bench_training(benchmark: Any, op: str, case: Case, form: str) -> None:
    """Time one form on one case in float32, forward and backward to every tensor."""
    inputs = make_inputs(op, case, torch.float32)
    leaves: dict[str, Any] = {k: None if v is None else v.requires_grad_() for k, v in inputs.items()}
    call = partial(getattr(inherit_kernels, op), *leaves.values(), **case.options)
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    with inherit_kernels.use_backend(form):
        benchmark.group = f"{op} {case}, training"
        y = _or_skip(call)
        _check(op, case, inputs, y.detach())
        cotangent = torch.ones_like(y)
        benchmark(lambda: torch.autograd.grad(call(), wanted, cotangent))


def bench_baseline(benchmark: Any, op: str, case: Case, call: Callable[[], object]) -> None:
    """Time something that a user would run instead."""
    benchmark.group = f"{op} {case}"
    with torch.no_grad():
        benchmark(call)


def _arguments(op: str, inputs: dict[str, Tensor | None], form: str) -> list[Any]:
    if form != PACKED:
        return list(inputs.values())
    x, *weights, residual = inputs.values()
    if residual is not None:
        raise ValueError("residual: expected None, for a packed call takes it by name")
    return [x, inherit_kernels.pack(op, *weights)]


def _or_skip(call: Callable[[], Tensor]) -> Tensor:
    try:
        return call()
    except ValueError as sentence:
        pytest.skip(str(sentence))


def _check(op: str, case: Case, inputs: dict[str, Tensor | None], result: Tensor) -> None:
    with torch.no_grad(), inherit_kernels.use_backend("reference"):
        expected = getattr(inherit_kernels, op)(*inputs.values(), **case.options)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
