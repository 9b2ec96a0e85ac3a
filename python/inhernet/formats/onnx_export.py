"""ONNX, for ONNX Runtime, OpenVINO and what else reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import atomic
from ..decompose.blocks import without_cache
from .compare import check
from .program import exported


def export_onnx(model: nn.Module, path: str | os.PathLike[str], example_inputs: Any) -> float:
    """Write an ONNX file with its weights inside; its inputs have the names of the model's arguments.

    Args:
        model: inherited or dense; exported in evaluation mode.
        path: the file; replaced only when the new one is whole and computes the same.
        example_inputs: a tensor, or a mapping of keyword arguments. The number of examples is free.

    Returns:
        The largest relative difference of an output between ONNX Runtime and the model, at two numbers of examples.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is missing (with the command that installs them).
        ValueError: they differ by more than 1e-3. What torch raises for a model that it cannot translate.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it, and says so less plainly)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"ONNX needs {error.name}: pip install 'inherit-kernels[onnx]'") from error
    model = model.eval()
    with atomic.file(path) as target, without_cache(model):
        # torch.onnx writes attention as its formula, whose result lies otherwise in memory than the fused kernel's: a view of
        # that (T5's) could not be translated.
        with sdpa_kernel(SDPBackend.MATH):
            program: Any = torch.onnx.export(exported(model, example_inputs), dynamo=True, verbose=False)
        program.save(str(target), external_data=False)
        session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        floating = [i for i, t in enumerate(session.get_outputs()) if "float" in t.type or "double" in t.type]

        def run(inputs: Any) -> list[Tensor]:
            values = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
            feed = inputs if isinstance(inputs, Mapping) else dict(zip(names, values, strict=True))
            found = session.run(None, {name: feed[name].numpy() for name in names})
            return [torch.from_numpy(found[i]) for i in floating]

        return check(run, model, example_inputs, "the ONNX file")
