"""What the GPU tests share."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

import inherit_kernels
from inherit_kernels.dispatch import problem_of
from inherit_kernels.registry import OPS
from inherit_kernels.testing import Case, cases_of, make_inputs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def backends(op: str | None = None) -> list:
    """Parameters (op, backend): every backend but the definition itself."""
    ops = [op] if op else list(OPS)
    return [pytest.param(op, name, id=f"{op}-{name}") for op in ops for name in OPS[op].backends if name != "reference"]


def grid() -> list:
    """Parameters (op, backend, case)."""
    return [
        pytest.param(*pair.values, case, id=f"{pair.id}-{case}")
        for pair in backends()
        for case in cases_of(pair.values[0])
    ]


def full_arguments(op: str, inputs: dict[str, Any], options: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Tensors and options of a complete call, as backends get them."""
    spec = OPS[op]
    names = [part.split()[-1] for part in spec.options.split(", ")]
    full = dict(zip(names, spec.default_options, strict=True)) | options
    return spec.normalise(tuple(inputs.values()), tuple(full.values()))


def declines(op: str, backend: str, case: Case, dtype: torch.dtype, device: str, training: bool = False) -> str | None:
    """The backend's sentence why it cannot serve the case, or None."""
    inputs: dict[str, Any] = dict.fromkeys(OPS[op].tensors)
    inputs |= {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in case.shapes.items()}
    tensors, options = full_arguments(op, inputs, case.options)
    problem = problem_of(OPS[op], tensors, options, training)
    on_device = type(problem)(problem.op, dtype, torch.device(device), problem.sizes, options, training)
    return OPS[op].backends[backend].supports(on_device)


def skip_unless_served(
    op: str, backend: str, case: Case, dtype: torch.dtype, device: str, training: bool = False
) -> None:
    """Skip with the backend's own sentence."""
    sentence = declines(op, backend, case, dtype, device, training)
    if sentence is not None:
        pytest.skip(f"{backend} not proven: {sentence}")


def served(op: str, backend: str, dtype: torch.dtype, device: str, training: bool = False) -> list[Case]:
    """Ragged cases, some of several blocks, that the backend serves; skip with its sentence if there is none."""
    cases = [find(op, "larger_than_blocks"), usual(op), *aligned(op)]
    sentences = [declines(op, backend, case, dtype, device, training) for case in cases]
    if all(sentences):
        pytest.skip(f"{backend} not proven: {sentences[-1]}")
    return [case for case, sentence in zip(cases, sentences, strict=True) if sentence is None]


def aligned(op: str) -> list[Case]:
    """Cases whose sizes are multiples of eight, but not of blocks: few rows and more, or a small map."""
    make = import_module(f"inherit_kernels.ops.{op}.cases").case
    heads = (3,) if "gated" in op else ()
    whole: dict[str, Any] = {"residual": True, "activation": "silu"}
    if "conv" in op:
        return [make("aligned_map", (2,), 72, (14, 15), 136, 40, *heads, (3, 3), padding=1, **whole)]
    return [
        make("aligned_few_rows", (5,), 264, 136, 24, *heads, **whole),
        make("aligned_rows", (131,), 304, 272, 72, *heads, **whole),
    ]


def call(op: str, inputs: dict[str, Any], case: Case, backend: str | None = None) -> torch.Tensor:
    with inherit_kernels.use_backend(backend):
        return getattr(inherit_kernels, op)(*inputs.values(), **case.options)


def find(op: str, name: str) -> Case:
    return next(case for case in cases_of(op) if case.name == name)


def leaves_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, each asking for its gradient."""
    return {name: None if value is None else value.detach().requires_grad_() for name, value in inputs.items()}


def usual(op: str) -> Case:
    """A ragged case of every op."""
    return find(op, "strided" if "conv" in op else "ragged")


def inputs_of(op: str, case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    return make_inputs(op, case, dtype, device=device, seed=seed)
