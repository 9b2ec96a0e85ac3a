"""What the command line's names mean: TEACHER, DATA, weights, example inputs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..decompose.rows import length_of
from ..pretrained import register
from . import sources
from .usage import DATA_HELP, TEACHER_HELP, UsageError


@dataclass(frozen=True)
class Data:
    """The parts of a data source; parts it does not have fall back to the nearest one it has."""

    train: Iterable[Any]
    calibration: Iterable[Any]
    val: Iterable[Any] | None
    test: Iterable[Any] | None

    @property
    def judge(self) -> Iterable[Any]:
        """What figures are reported on: test, else val, else train."""
        return next(part for part in (self.test, self.val, self.train) if part is not None)


def find_in_current_directory() -> None:
    """Let modules of the current directory be imported, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def function_of(spec: str, argument: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; modules of the current directory are found too.

    Raises:
        UsageError: the spec has another form, or names nothing callable.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not module_name or not name:
        raise UsageError(f"{argument} is {spec!r}, expected {TEACHER_HELP if argument == 'TEACHER' else DATA_HELP}")
    find_in_current_directory()
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if not (error.name and (module_name + ".").startswith(error.name + ".")):
            raise  # the module is there, something that it imports is not
        raise UsageError(
            f"{argument} is {spec!r}, but there is no module {error.name!r}; it must be installed or in {os.getcwd()}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(
            f"{argument} is {spec!r}, but {module_name} has no function {name!r}; it has {', '.join(public[:12])}"
        )
    return function


def teacher(spec: str, weights: str | None = None) -> nn.Module:
    """The model that TEACHER names, with `weights` (a safetensors file) loaded into it, in eval mode.

    Raises:
        UsageError: a spec, file or result that does not fit; ModuleNotFoundError: transformers is missing.
    """
    model = _from_transformers(spec[3:]) if spec.startswith("hf:") else function_of(spec, "TEACHER")()
    if not isinstance(model, nn.Module):
        raise UsageError(f"TEACHER is {spec!r}, which returned {type(model).__name__}, expected an nn.Module")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: str) -> None:
    """Fill a model from a safetensors file.

    Raises:
        UsageError: no such file, not safetensors, or keys and shapes that are not the model's.
    """
    if not Path(path).is_file():
        raise UsageError(f"--weights is {path!r}, which is not a file; expected a .safetensors file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UsageError(
            f"--weights is {path!r}, which is not a safetensors file ({error}); pickles are not read"
        ) from error
    wanted = model.state_dict()
    problems = [f"no {name!r}" for name in wanted if name not in tensors]
    problems += [f"unknown {name!r}" for name in tensors if name not in wanted]
    problems += [
        f"{name!r} is {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UsageError(f"--weights is {path!r}, which does not fit the teacher: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(tensors)


def data(spec: str, teacher: str | None = None) -> Data:
    """The loaders that DATA names; `teacher`: the TEACHER whose tokenizer or image processor reads text: and images:.

    Raises:
        UsageError: a spec or result that does not fit; ModuleNotFoundError: digits without scikit-learn.
    """
    if spec == "digits":
        from ..demos.digits_data import digits

        images = digits()
        return Data(images.train, images.calibration, images.val, images.test)
    kind, colon, path = spec.partition(":")
    found: Any
    if colon and kind in ("text", "images"):
        found = (sources.text if kind == "text" else sources.images)(path, teacher)
    else:
        found = function_of(spec, "DATA")()
    if isinstance(found, tuple) and len(found) in (2, 3):
        found = dict(zip(("train", "val", "test"), found, strict=False))
    if isinstance(found, Mapping):
        if "train" not in found or set(found) - {"train", "calibration", "val", "test"}:
            raise UsageError(
                f"DATA is {spec!r}, which returned the keys {sorted(map(str, found))}, expected train, val, test"
            )
        parts = {name: _reiterable(value, spec, name) for name, value in found.items()}
        return Data(parts["train"], parts.get("calibration", parts["train"]), parts.get("val"), parts.get("test"))
    one = _reiterable(found, spec, "data")
    return Data(one, one, None, None)


def example_inputs(model: nn.Module, shape: str | None, loader: Iterable[Any] | None) -> Callable[[int], Any]:
    """A function from a batch size to model inputs: of the given shape, else of the data, else of the model's kind.

    Raises:
        UsageError: a shape that cannot be read, or nothing that tells what the model takes.
    """
    if shape is not None:
        try:
            sizes = [int(size) for size in shape.lower().split("x")]
        except ValueError:
            sizes = []
        if not sizes or min(sizes) < 1:
            raise UsageError(f"--input is {shape!r}, expected the shape of one example such as 3x32x32")
        return lambda batch: torch.randn(batch, *sizes, generator=torch.Generator().manual_seed(0))
    if loader is not None:
        batch = next(iter(loader))
        found = batch[0] if isinstance(batch, (tuple, list)) else batch
        return lambda size: _resized(found, size)
    factory: tuple[str, dict[str, Any]] = getattr(model, "inhernet_factory", ("", {}))
    name, args = factory
    if name.startswith("inhernet.models."):
        channels = args.get("in_channels", 3)
        return lambda batch: torch.randn(batch, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    if name.startswith("transformers."):
        return lambda batch: {"input_ids": torch.ones(batch, 128, dtype=torch.long)}
    raise UsageError(
        "nothing tells what the model takes; give --input SHAPE (of one example, such as 3x32x32) or --data DATA"
    )


def _resized(found: Any, size: int) -> Any:
    if isinstance(found, Mapping):
        return {name: _resized(value, size) for name, value in found.items() if name != "labels"}
    if not isinstance(found, Tensor):
        return found
    return found.repeat(-(-size // len(found)), *[1] * (found.dim() - 1))[:size].contiguous()


def _reiterable(value: Any, spec: str, part: str) -> Iterable[Any]:
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Tensor)):
        raise UsageError(f"DATA is {spec!r}, which returned {type(value).__name__}, expected an iterable of batches")
    batches = value if iter(value) is not value else list(value)
    if length_of(batches) == 0:
        raise UsageError(f"DATA is {spec!r}, whose {part!r} gives no batches, expected at least one")
    return batches


def _from_transformers(directory: str) -> nn.Module:
    if not (Path(directory) / "config.json").is_file():
        raise UsageError(
            f"TEACHER is 'hf:{directory}', but {directory!r} has no config.json; expected a transformers directory"
        )
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("hf: needs transformers: pip install 'inherit-kernels[hf]'") from error
    register()  # the directory may hold an inherited model
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    names = [name for name in config.architectures or [] if hasattr(transformers, name)]
    kind = getattr(transformers, names[0]) if names else transformers.AutoModel
    return kind.from_pretrained(directory, local_files_only=True)
