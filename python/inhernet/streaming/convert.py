"""Convert a transformers checkpoint that does not fit into memory: a layer at a time, from its files to new ones."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import atomic
from ..budgets import ParamBudget, UniformRank, UniformRatio
from ..checks import need_int, refuse
from ..config import InheritConfig
from ..console import progress
from ..decompose import Plan
from ..decompose.conversion import low_rank_module
from ..decompose.layers import LayerPlan
from ..decompose.planning import planned
from ..decompose.plans import hash_of
from ..fingerprint import contents
from ..layers import can_open, open_layers, replaced
from ..pretrained import METHOD, inherited_config
from .source import CONFIG, INDEX, Checkpoint, skeleton

# Output held in memory before it is written.
SHARD = 256 * 2**20


def convert_stream(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: InheritConfig | None = None,
    *,
    shard_bytes: int = SHARD,
    overwrite: bool = False,
) -> Plan:
    """Write the inherited network of a transformers directory with one layer of it in memory at a time.

    Factors come from the weights alone (init "svd", "random" or "published"), ranks from a `ParamBudget`, `UniformRank` or
    `UniformRatio`. Finished shards stay beside `out`, in `OUT.streaming`, until all are there: the same call goes on from
    them. Under `torch.distributed` the processes share the shards, and the first one writes the rest.

    Args:
        source: a directory with `config.json` and safetensors, one file or shards with their index.
        out: the new transformers directory. `inhernet.register()`, then `AutoModel.from_pretrained(out)` loads it.
        config: as for `plan`.
        shard_bytes: about the size of a file of the result, which is held in memory until it is written.
        overwrite: replace an inherited model at `out`.

    Returns:
        The plan that was followed.

    Raises:
        ValueError: a configuration that needs the network's data or spectra; weights with NaN or infinity, by name; a
            checkpoint whose names are not the model's (transformers converts some while it loads them); `out` holds
            something.
        FileNotFoundError: a file of the checkpoint is missing.

    Example:
        >>> convert_stream("llama-70b", "smaller", InheritConfig(budget=UniformRatio(0.6)))  # doctest: +SKIP
    """
    config = replace(config or InheritConfig(), device=(config.device if config else None) or "cpu")
    _check_config(config)
    need_int("shard_bytes", shard_bytes, 1)
    source, target = Path(source), Path(os.path.realpath(out))
    _check_target(target, overwrite, source)
    model = skeleton(source)
    checkpoint = Checkpoint(source, model)
    with progress("read", len(list(model.parameters()))) as bar:
        digest = hash_of(checkpoint.parameters(bar))
    plan = planned(model, config, digest)
    shards = _shards(model, plan, checkpoint, shard_bytes)
    identity = contents([digest, plan.to_json(), shard_bytes])
    aside = target.parent / f"{target.name}.streaming"
    aside.mkdir(parents=True, exist_ok=True)
    rank, processes = _processes()
    mine = [number for number in range(len(shards)) if number % processes == rank]
    try:
        with progress("convert", len(mine)) as bar:
            for number in mine:
                path = aside / f"shard-{number:05}.safetensors"
                if not _is_of(path, identity):
                    tensors = {name: t for piece in shards[number] for name, t in piece.convert(checkpoint, plan)}
                    with atomic.file(path) as file:
                        save_file(tensors, file, metadata={"format": "pt", "identity": identity})
                bar.advance(1, shards[number][0].name)
    except KeyboardInterrupt as stop:
        stop.args, stop.path = (f"stopped; finished shards are in {aside}",), str(aside)  # type: ignore[attr-defined]
        raise
    _wait(processes)
    if rank == 0:
        atomic.replace_directory(target, lambda fresh: _assemble(fresh, source, aside, len(shards), model, plan))
        shutil.rmtree(aside)
    _wait(processes)
    return plan


def _processes() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _wait(processes: int) -> None:
    if processes > 1:
        dist.barrier()


def _check_config(config: InheritConfig) -> None:
    if config.init not in (None, "svd", "random", "published"):
        refuse(
            "init", config.init, "'svd', 'random' or 'published': data cannot be run through a network that is on disk"
        )
    if not isinstance(config.budget, (ParamBudget, UniformRank, UniformRatio)):
        refuse("budget", config.budget, "a ParamBudget, UniformRank or UniformRatio: others look at the whole network")
    if config.allocation == "fisher":
        refuse("allocation", config.allocation, "'auto' or 'uniform': the other needs calibration data")


def _check_target(target: Path, overwrite: bool, source: Path) -> None:
    if target == Path(os.path.realpath(source)):
        refuse("out", str(target), "another directory than the source")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        known = json.loads((target / CONFIG).read_text(encoding="utf-8"))["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if known != METHOD or not overwrite:
        what = "an earlier result" if known == METHOD else "other files"
        refuse("out", str(target), f"a new directory: it holds {what}" + (" (overwrite replaces it)" if known else ""))


@dataclass
class Piece:
    """A module that holds factorised layers, or a tensor that stays as it is."""

    name: str
    module: nn.Module | None = None
    layers: list[LayerPlan] = field(default_factory=list)

    def convert(self, checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[str, Tensor]]:
        if self.module is None:
            yield self.name, checkpoint.read([self.name])[self.name].contiguous()
            return
        module = copy.deepcopy(self.module)
        tensors = checkpoint.read(f"{self.name}.{name}" for name in module.state_dict())
        module.load_state_dict({name: tensors[f"{self.name}.{name}"] for name in module.state_dict()}, assign=True)
        module = open_layers(module.requires_grad_(False))
        for layer in self.layers:
            inner = layer.name.removeprefix(self.name).lstrip(".")
            dense = module.get_submodule(inner)
            module = replaced(module, inner, low_rank_module(dense, layer, plan.config))
        for name, tensor in module.state_dict().items():
            yield f"{self.name}.{name}", tensor.contiguous()


def _shards(model: nn.Module, plan: Plan, checkpoint: Checkpoint, limit: int) -> list[list[Piece]]:
    """All pieces in the model's order, those in one list together about `limit` bytes when converted."""
    shards: list[list[Piece]] = [[]]
    held = 0
    inside: set[str] = set()
    names = set(checkpoint.names)
    sizes = {name: tensor.numel() * 4 for name, tensor in model.state_dict().items()}

    def put(piece: Piece, size: int) -> None:
        nonlocal held
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += size

    for name, module in model.named_modules():
        if any(name.startswith(f"{root}.") for root in inside):
            continue
        layers = [layer for layer in plan.factorised if layer.name == name or layer.name.startswith(f"{name}.")]
        whole = bool(name) and bool(layers) and (can_open(module) or layers[0].name == name)
        if whole:
            inside.add(name)
            put(Piece(name, module, layers), sum(layer.params for layer in layers) * 4)
            continue
        own = (*module._parameters, *(n for n in module._buffers if n not in module._non_persistent_buffers_set))
        for tensor in (f"{name}.{n}".lstrip(".") for n in own):
            if tensor in names:
                put(Piece(tensor), sizes[tensor])
    return shards


def _is_of(path: Path, identity: str) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("identity") == identity
    except (OSError, SafetensorError):
        return False


def _assemble(fresh: Path, source: Path, aside: Path, count: int, model: Any, plan: Plan) -> None:
    """The finished shards under the names that transformers expects, its index, configuration and tokenizer files."""
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(count):
        shard, name = aside / f"shard-{number:05}.safetensors", f"model-{number + 1:05}-of-{count:05}.safetensors"
        try:
            os.link(shard, fresh / name)
        except OSError:
            shutil.copyfile(shard, fresh / name)  # a file system without links
        with safe_open(shard, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        total += shard.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (fresh / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
        if path.is_file() and not weights and path.name not in (CONFIG, INDEX):
            shutil.copyfile(path, fresh / path.name)
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = inherited_config(plan)
    model.config.save_pretrained(fresh)
