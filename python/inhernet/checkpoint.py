"""Save and load an inherited model: `config.json`, `plan.json`, `model.safetensors`, and no code.

`config.json` names how the dense architecture is built and which tensors are tied, `plan.json` says which layers are
low-rank and how, `model.safetensors` holds parameters and buffers. The teacher is not needed to load. An optimised model
adds `optimized.json`, its choices per layer; the other files are those of the model it was made from. An elastic one adds
`levels.json`, the ranks of each level.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inherit_kernels

from . import architecture, atomic
from .decompose import Levels, Plan, set_level
from .decompose.levels import attach
from .decompose.rebuild import with_empty_layers
from .export import Optimization, restore
from .nn import LowRankModule
from .pretrained import kept_by_pretrained

FORMAT_VERSION = 1
CONFIG, PLAN, WEIGHTS, OPTIMIZED = "config.json", "plan.json", "model.safetensors", "optimized.json"
LEVELS = "levels.json"
_OURS = {CONFIG, PLAN, WEIGHTS, OPTIMIZED, LEVELS}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LIMIT = 64 * 2**20  # bytes of JSON; a plan of a thousand layers has 0.5 MB


def save(
    model: nn.Module,
    dir: str | os.PathLike[str],
    factory: str | Callable[..., nn.Module] | None = None,
    args: dict[str, Any] | None = None,
) -> None:
    """Write a model to a directory, atomically: killed at any moment it leaves the previous version or the new one.

    Args:
        model: made by `inhernet.inherit` or `inhernet.optimize`, or a dense model. It is not changed.
        dir: created (parents too), or replaced if it holds an earlier save of inhernet and nothing else.
        factory: what builds the dense architecture: a top-level function or "package.module.function". None for the
            models of `inhernet.models` and of transformers, which know it themselves.
        args: the factory's keyword arguments, plain data.

    Raises:
        ValueError: nothing says how the model is built; the directory holds other files or another tool's model; low-rank
            modules that the plan does not list. TypeError: an argument or a state entry that is not plain data or a tensor.

    Example:
        >>> save(inhernet.models.resnet20(num_classes=10), "student")  # doctest: +SKIP
    """
    name, arguments = architecture.describe(model, factory, args)
    plan = _checked_plan(model)
    optimization, levels = getattr(model, "optimization", None), model.__dict__.get("inhernet_levels")
    tensors, ties = _unique_tensors(model)
    target = check_target(dir)
    config = {
        "format": "inhernet",
        "version": FORMAT_VERSION,
        "inhernet": inherit_kernels.__version__,
        "torch": str(torch.__version__),
        "factory": name,
        "args": arguments,
        "ties": ties,
    }

    def write(directory: Path) -> None:
        if plan is not None:
            (directory / PLAN).write_text(plan.to_json() + "\n", encoding="utf-8")
        if isinstance(optimization, Optimization):
            (directory / OPTIMIZED).write_text(optimization.to_json() + "\n", encoding="utf-8")
        if isinstance(levels, Levels):
            (directory / LEVELS).write_text(levels.to_json() + "\n", encoding="utf-8")
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        whole = {**config, "weights_sha256": _sha256(directory / WEIGHTS)}
        (directory / CONFIG).write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace_directory(target, write)


def load(
    dir: str | os.PathLike[str],
    factory: Callable[..., nn.Module] | None = None,
    trust: Sequence[str] = (),
    *,
    optimized: bool = True,
) -> nn.Module:
    """Read a model that `save` wrote: on the CPU, in eval mode, without the teacher.

    An optimised model comes back optimised where processor, threads and versions are those it was measured with;
    elsewhere a note says what differs and the plain model is returned. An elastic model comes back at its largest level.

    No file of the directory runs code. Without consent it may only name a function of `inhernet.models` or a
    configuration class of transformers.

    Args:
        dir: the directory.
        factory: your own function that builds the dense architecture; it gets the saved arguments.
        trust: packages whose functions the directory may name, such as `("mypackage.",)`. Importing one runs it.
        optimized: False returns the plain model of a directory that holds an optimised one, to train or export it.

    Raises:
        FileNotFoundError: no directory, or a file of it is missing.
        ValueError: a file is damaged (the weights' SHA-256 is in `config.json`), escapes the directory or is a pickle; a
            factory that is not allowed; missing, extra or misshapen tensors (the key is named).

    Example:
        >>> model = load("student")  # doctest: +SKIP
    """
    directory, config, tensors, (plan_text, choices, levels) = _read_consistently(Path(dir))
    name, args = config["factory"], config["args"]
    # A dense layer has at most two parameters where a low-rank one has three to five; builders may make some in vain.
    most = 4 * (len(tensors) + len(config["ties"])) + 1000
    model = architecture.build(name, args, factory, trust, most)
    plan = None
    if plan_text is not None:
        plan = _parse(lambda: Plan.from_json(plan_text), directory / PLAN)
        model = _parse(lambda: with_empty_layers(model, plan.layers), directory / PLAN)
    if plan is not None:
        model.inhernet_plan = plan
    if levels is not None:
        _parse(lambda: attach(model, Levels.from_json(levels)), directory / LEVELS)
    _assign(model, tensors, config["ties"], directory)
    model.__dict__["inhernet_factory"] = (name, args)
    if plan is not None:
        kept_by_pretrained(model)
    model.eval()
    if levels is not None:
        set_level(model, 0)
    if choices is None or not optimized:
        return model
    return _parse(lambda: restore(model, choices), directory / OPTIMIZED)


def _checked_plan(model: nn.Module) -> Any:
    """The model's plan, after a look that it describes the modules that are really there."""
    plan = getattr(model, "inhernet_plan", None)
    present = {name: m for name, m in model.named_modules() if isinstance(m, LowRankModule)}
    planned = {} if plan is None else {layer.name: layer for layer in plan.layers if layer.reason is None}
    if set(present) != set(planned):
        odd = sorted(set(present) ^ set(planned))[0]
        where = "is low-rank in the model but not in its plan" if odd in present else "is in the plan but not low-rank"
        raise ValueError(f"layer {odd!r} {where}; convert with inhernet.inherit, which keeps both in step")
    for name, module in present.items():
        layer = planned[name]
        if (module.rank, module.heads, module.gated) != (layer.rank, layer.heads, layer.gate):
            raise ValueError(
                f"layer {name!r} has rank {module.rank}, {module.heads} heads, gate {module.gated}, but the plan says "
                f"rank {layer.rank}, {layer.heads} heads, gate {layer.gate}; edit the plan and convert again"
            )
    return plan


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State tensors with every tied one stored once, and the map from the other names to the stored one."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[Any, str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state entry {name!r} is {type(value).__name__}, expected a tensor: no pickle is written")
        if value.is_meta:
            raise ValueError(f"tensor {name!r} is on the meta device and has no values to save")
        place = id(value) if value.numel() == 0 else (value.device, value.data_ptr(), value.shape, value.stride())
        if place in seen:
            ties[name] = seen[place]
            continue
        seen[place] = name
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # Views of one storage that are not the same tensor (slices of a fused weight) are stored apart.
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors, ties


def check_target(dir: str | os.PathLike[str]) -> Path:
    """Where `save` would write, links resolved. Raises ValueError where something would be lost that is not ours."""
    target = Path(os.path.realpath(dir))
    if target.exists() and not target.is_dir():
        raise ValueError(f"dir {target} is a file, expected a directory")
    others = sorted({path.name for path in target.iterdir()} - _OURS) if target.is_dir() else []
    if others:
        raise ValueError(
            f"dir {target} holds other files ({', '.join(others[:3])}); a save replaces the whole directory, "
            "so give it one of its own"
        )
    if target.is_dir() and any(target.iterdir()):
        _refuse_what_is_not_ours(target)
    return target


def _refuse_what_is_not_ours(target: Path) -> None:
    """Ours by the mark in `config.json`, not by names: transformers' directories hold the same two files, and a plan that
    was edited by hand is called as a model's."""
    try:
        config = json.loads((target / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or config.get("format") != "inhernet":
        raise ValueError(
            f"dir {target} holds something else than a model that inhernet saved ({CONFIG} does not say so), which would be "
            "lost; "
            "give another directory"
        )


def _read_consistently(path: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor], tuple[str | None, ...]]:
    """Read all files of one version, even if another process swaps the directory meanwhile."""
    target = Path(os.path.realpath(path))
    for attempt in range(10):
        directory = atomic.readable(target)
        if not directory.is_dir():
            raise FileNotFoundError(f"dir {path} is not a directory")
        before = directory.stat().st_ino
        try:
            optional = tuple(_read_optional(directory / name) for name in (PLAN, OPTIMIZED, LEVELS))
            config = _read_config(directory)
            tensors = _read_tensors(directory)
            intact = config.get("weights_sha256") in (None, _sha256(_inside(directory, WEIGHTS)))  # None: an older save
            content = directory, config, tensors, optional
        except FileNotFoundError:
            if attempt == 9 or _inode(directory) == before:
                raise
            continue
        if _inode(directory) != before:
            continue
        if not intact:
            raise ValueError(
                f"{directory / WEIGHTS} is damaged or not the file that was saved: its SHA-256 is not the one in {CONFIG}; "
                "copy the directory again, or save the model again"
            )
        return content
    raise ValueError(f"dir {path} is replaced faster than it can be read")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _inode(directory: Path) -> int | None:
    try:
        return directory.stat().st_ino
    except FileNotFoundError:
        return None


def _inside(directory: Path, name: str) -> Path:
    """The path of a regular file that lies in the directory."""
    path = directory / name
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"{path} is missing")
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(directory):
        raise ValueError(f"{path} is a link that leaves the directory (to {real}); copy the file into it")
    if not stat.S_ISREG(real.stat().st_mode):
        raise ValueError(f"{path} is not a regular file")
    return real


def _read_json(path: Path) -> str:
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {_LIMIT} that are read")
    return _parse(lambda: path.read_bytes().decode("utf-8"), path)


def _parse(read: Callable[[], Any], path: Path) -> Any:
    try:
        return read()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not what it should be: {error}") from error


def _read_config(directory: Path) -> dict[str, Any]:
    path = _inside(directory, CONFIG)
    text = _read_json(path)
    config = _parse(lambda: json.loads(text, parse_constant=_refuse_constant), path)
    if not isinstance(config, dict) or config.get("format") != "inhernet":
        raise ValueError(f'{path} does not say "format": "inhernet"; it is not a directory written by inhernet.save')
    if config.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has version {config.get('version')!r}, expected {FORMAT_VERSION}; update inhernet")
    for key, kind in (("factory", str), ("args", dict), ("ties", dict)):
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{path}: {key!r} is {config.get(key)!r}, expected {kind.__name__}")
    return config


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _read_optional(path: Path) -> str | None:
    return _read_json(_inside(path.parent, path.name)) if path.exists() or path.is_symlink() else None


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    if not (directory / WEIGHTS).exists():
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"{directory} has {pickles[0]} but no {WEIGHTS}: a pickle can run code and is never read; "
                "convert it to safetensors where you trust it"
            )
    path = _inside(directory, WEIGHTS)
    try:
        return load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _assign(model: nn.Module, tensors: dict[str, Tensor], ties: dict[str, Any], directory: Path) -> None:
    """Check every key and shape, hand the tensors to the model without a copy, then tie again."""
    for name, source in ties.items():
        if name in tensors or not isinstance(source, str) or source not in tensors:
            raise ValueError(f"{directory / CONFIG}: tie {name!r} to {source!r}, expected a new name and a stored one")
        tensors[name] = tensors[source]
    expected = model.state_dict()
    path = directory / WEIGHTS
    _refuse_keys(path, "lacks", expected.keys() - tensors.keys())
    _refuse_keys(path, "has the unexpected", tensors.keys() - expected.keys())
    for name, wanted in expected.items():
        found = tensors[name]
        if found.shape != wanted.shape:
            raise ValueError(f"{path}: {name!r} has shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
        if found.is_floating_point() != wanted.is_floating_point() or found.is_complex() != wanted.is_complex():
            raise ValueError(f"{path}: {name!r} has dtype {found.dtype}, expected one like {wanted.dtype}")
    model.load_state_dict(tensors, assign=True)
    for name, source in ties.items():
        _tie(model, name, source)


def _refuse_keys(path: Path, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{path} {what} key {', '.join(map(repr, names[:3]))}{more}")


def _tie(model: nn.Module, name: str, source: str) -> None:
    (parent, _, child), (origin, _, key) = name.rpartition("."), source.rpartition(".")
    setattr(model.get_submodule(parent), child, getattr(model.get_submodule(origin), key))
