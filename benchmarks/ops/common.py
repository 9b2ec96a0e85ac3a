"""The regression benchmark of an op: every backend, the published layer and the dense layer on a few shapes.

An equality check comes first: a wrong result is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import inherit_kernels
from inherit_kernels.registry import OPS
from inherit_kernels.testing import Case, make_inputs


def parameters(op: str, cases: list[Case]) -> Any:
    """pytest parameters: case × backend."""
    backends = [name for name in OPS[op].backends if name != "reference"]
    return pytest.mark.parametrize(
        "case, backend", [pytest.param(case, name, id=f"{case}-{name}") for case in cases for name in backends]
    )


def bench(benchmark: Any, op: str, case: Case, backend: str) -> None:
    """Time one backend on one case in float32, forward."""
    inputs = make_inputs(op, case, torch.float32)
    function = getattr(inherit_kernels, op)
    benchmark.group = str(case)
    with torch.no_grad():
        try:
            with inherit_kernels.use_backend(backend):
                result = function(*inputs.values(), **case.options)
        except ValueError as sentence:
            pytest.skip(str(sentence))
        with inherit_kernels.use_backend("reference"):
            torch.testing.assert_close(result, function(*inputs.values(), **case.options), rtol=1e-3, atol=1e-3)

        def call() -> object:
            with inherit_kernels.use_backend(backend):
                return function(*inputs.values(), **case.options)

        benchmark(call)


def bench_baseline(benchmark: Any, case: Case, call: Callable[[], object]) -> None:
    """Time something that a user would run instead."""
    benchmark.group = str(case)
    with torch.no_grad():
        benchmark(call)
