"""What a training run needs to go on where it stopped, in one safetensors file written atomically.

Tensors (model, best weights, EMA, optimiser, RNG) are the file's tensors; everything else is JSON in its header. No
pickle is written or read.
"""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "training.safetensors"
# 2: the state says which teacher, objective and data the run has.
VERSION = 2


def rng_state() -> dict[str, Tensor]:
    """State of every generator a step may draw from: torch (CPU, all CUDA devices), Python and numpy."""
    _, internal, gauss = random.getstate()
    _, keys, *rest = numpy.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        # The Gaussian held back is a float or nothing; NaN stands for nothing.
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)),
        "numpy_rest": torch.tensor(rest, dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put back what `rng_state` took."""
    torch.set_rng_state(state["torch"])
    gauss = float(state["python_gauss"])
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    keys = state["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    for name, value in state.items():
        if name.startswith("cuda."):
            torch.cuda.set_rng_state(value, int(name[5:]))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors and JSON."""
    tensors, plain = {}, {}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                plain[f"{index}.{name}"] = value
    return tensors, plain


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what `pack_optimizer` took; the groups' settings stay those of this optimiser."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *plain.items()):
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_state(directory: str | os.PathLike[str], groups: dict[str, dict[str, Tensor]], plain: dict[str, Any]) -> Path:
    """Write tensors (`group/name`) and JSON to `directory/training.safetensors`; a crash leaves the previous file."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory (tied weights, views of one buffer).
    tensors = {
        f"{group}/{name}": value.detach().to("cpu", copy=True).contiguous()
        for group, named in groups.items()
        for name, value in named.items()
    }
    target, partial = directory / FILE, directory / f"{FILE}.{os.getpid()}.partial"
    try:
        save_file(tensors, partial, metadata={"state": json.dumps({"version": VERSION, **plain})})
        _sync(partial)
        os.replace(partial, target)
        _sync(directory)
    finally:
        partial.unlink(missing_ok=True)
    return target


def load_state(directory: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Read what `save_state` wrote; None if the directory holds no checkpoint.

    Raises:
        ValueError: the file is not such a checkpoint.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return None
    try:
        groups: dict[str, dict[str, Tensor]] = {}
        with safe_open(path, framework="pt") as file:
            plain = json.loads(file.metadata()["state"])
            for key in file.keys():  # noqa: SIM118 (not a mapping: it cannot be iterated)
                group, name = key.split("/", 1)
                groups.setdefault(group, {})[name] = file.get_tensor(key)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a readable training checkpoint ({error}); delete it to start over") from error
    if plain.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {plain.get('version')!r}, expected {VERSION}: another release wrote it; finish that run "
            "with it, or delete the file to start over"
        )
    return groups, plain


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
