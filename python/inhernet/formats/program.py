"""torch's own formats: an exported program, and a compiled package for C++ and Python without any model code."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import atomic
from ..decompose.batches import floating_outputs
from ..decompose.blocks import without_cache
from .compare import check, larger
from .plain import plain


def exported(model: nn.Module, inputs: Any) -> Any:
    """`torch.export`'s program of the model in torch's own operations, with any number of examples."""
    inputs = larger(inputs)  # one example would be taken for the only number there is
    named = isinstance(inputs, Mapping)
    shapes = {key: free(value) for key, value in inputs.items()} if named else (free(inputs),)
    args, kwargs = ((), dict(inputs)) if named else ((inputs,), {})
    with torch.no_grad(), without_cache(model):
        return torch.export.export(plain(model), args, kwargs, dynamic_shapes=shapes, strict=False)


def free(value: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None


def export_program(model: nn.Module, path: str | os.PathLike[str], example_inputs: Any) -> float:
    """Write `torch.export`'s program (.pt2): `torch.export.load(path).module()` runs it without inhernet.

    Args:
        model: inherited or dense; exported in evaluation mode.
        path: the file; replaced only when the new one is whole and computes the same.
        example_inputs: a tensor, or a mapping of keyword arguments. The number of examples is free.

    Returns:
        The largest relative difference of an output between the file and the model, at two numbers of examples.

    Raises:
        ValueError: they differ by more than 1e-3. What `torch.export` raises for a model that it cannot trace.
    """
    model = model.eval()
    with atomic.file(path) as target, without_cache(model):
        with target.open("wb") as file:
            torch.export.save(exported(model, example_inputs), file)
        with target.open("rb") as file:
            module = torch.export.load(file).module()
        return check(_runner(module), model, example_inputs, "the exported program")


def export_aoti(model: nn.Module, path: str | os.PathLike[str], example_inputs: Any) -> float:
    """Write an AOTInductor package (.pt2), compiled for this kind of processor or GPU: C++ loads it, and Python by
    `torch._inductor.aoti_load_package(path)`, without inhernet. Arguments, result and errors as `export_program`'s; needs a
    C++ compiler."""
    model = model.eval()
    with atomic.file(path) as target, without_cache(model):
        whole = target.with_name(f"{target.name}.pt2")  # the compiler asks for this ending
        try:
            torch._inductor.aoti_compile_and_package(exported(model, example_inputs), package_path=str(whole))
            os.replace(whole, target)
        finally:
            whole.unlink(missing_ok=True)
        module = torch._inductor.aoti_load_package(str(target))
        return check(_runner(module), model, example_inputs, "the compiled package")


def _runner(module: Callable[..., Any]) -> Callable[[Any], list[Tensor]]:
    def run(inputs: Any) -> list[Tensor]:
        with torch.no_grad():
            output = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
        return [tensor for _, tensor in floating_outputs(output)]

    return run
