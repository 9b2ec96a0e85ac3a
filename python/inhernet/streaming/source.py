"""A transformers checkpoint on disk: its architecture on meta, and its tensors one at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ..architecture import parameters_on_meta

INDEX, ONE_FILE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"


def skeleton(source: Path) -> Any:
    """The dense architecture, every parameter on meta.

    Raises:
        FileNotFoundError: no transformers directory. ValueError: its model is quantised or inherited.
    """
    if not (source / CONFIG).is_file():
        raise FileNotFoundError(f"{source} has no {CONFIG}; expected a transformers directory")
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("needs transformers: pip install 'inherit-kernels[hf]'") from error
    config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{source} is quantised, or inherited already; expected a dense checkpoint")
    names = [name for name in config.architectures or [] if hasattr(transformers, name)]
    kind: Any = getattr(transformers, names[0]) if names else transformers.AutoModel
    with parameters_on_meta():
        model = kind._from_config(config) if names else kind.from_config(config)
    model.tie_weights()
    return model.eval()


@dataclass
class Origin:
    """What one or several of the model's tensors are made of: tensors of the files, as they are or by a conversion."""

    parts: list[tuple[str, str]] = field(default_factory=list)  # name in the files, the conversion's pattern
    target: str = ""
    converter: Any = None


class Checkpoint:
    """The tensors of a transformers directory by the names of its model."""

    def __init__(self, source: Path, model: Any) -> None:
        """
        Raises:
            FileNotFoundError: a file is missing. ValueError: so is a tensor (it is named).
        """
        self.model, self.files = model, _files(source)
        self.origins = _origins(model, self.files)
        tied = tied_names(model)
        missing = [name for name in model.state_dict() if name not in self.origins and name not in tied]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(
                f"{source} has no {missing[0]!r}{more} of {type(model).__name__}; its names are such as "
                f"{next(iter(self.files))!r}: is it the checkpoint of another model?"
            )
        self.names = [name for name in model.state_dict() if name not in tied]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors of the model. Files are mapped no longer than that."""
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def tensor(key: str) -> Tensor:
                path = self.files[key]
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                value: Tensor = opened[path].get_tensor(key)
                return value.clone()

            for name in names:
                if name in found:
                    continue
                origin = self.origins[name]
                if origin.converter is None:
                    found[name] = tensor(origin.parts[0][0])
                    continue
                converter = copy.deepcopy(origin.converter)
                for key, pattern in origin.parts:
                    converter.add_tensor(origin.target, key, pattern, tensor(key))
                made = converter.convert(origin.target, model=self.model, config=self.model.config)
                found |= {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        return found

    def parameters(self, bar: Any) -> Iterator[tuple[str, Tensor]]:
        """Every parameter in the order of names.

        Raises:
            ValueError: one has another shape than the model's, or holds NaN or infinity.
        """
        for name, wanted in sorted(self.model.named_parameters(), key=lambda pair: pair[0]):
            tensor = self.read([name])[name]
            if tensor.shape != wanted.shape:
                raise ValueError(
                    f"the checkpoint's {name!r} has shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)}"
                )
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(f"the checkpoint's {name!r} holds NaN or infinity and cannot be decomposed")
            bar.advance(1, name)
            yield name, tensor


def tied_names(model: nn.Module) -> set[str]:
    """State names whose tensor has an earlier name too."""
    seen: set[int] = set()
    names = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            names.add(name)
        seen.add(id(tensor))
    return names


def _files(source: Path) -> dict[str, Path]:
    """The file of each tensor."""
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {name: source / Path(file).name for name, file in index.items()}
    elif (source / ONE_FILE).is_file():
        with safe_open(source / ONE_FILE, framework="pt") as file:
            files = dict.fromkeys(file.keys(), source / ONE_FILE)
    else:
        raise FileNotFoundError(f"{source} has neither {INDEX} nor {ONE_FILE}; pickles are not read")
    absent = sorted({str(path) for path in files.values() if not path.is_file()})
    if absent:
        raise FileNotFoundError(f"{absent[0]} is missing, which {INDEX} names")
    return files


def _origins(model: Any, keys: Iterable[str]) -> dict[str, Origin]:
    """Which tensors of the files each of the model's is made of, by transformers' own rules.

    transformers 5 renames and merges while it loads: the experts of Mixtral lie apart in its files and in one tensor in
    memory. Before, names were the model's, with or without the prefix of the inner model.
    """
    wanted, prefix = model.state_dict(), model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:
        pairs = {key: (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}") for key in keys}
        names = {key: next((name for name in given if name in wanted), None) for key, given in pairs.items()}
        return {name: Origin([(key, "")]) for key, name in names.items() if name is not None}
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    origins: dict[str, Origin] = {}
    for key in sorted(keys, key=dot_natural_key):  # experts by number
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = key, None
        if name not in wanted:
            continue  # of a head that this model does not have
        if pattern is None:
            origins[name] = Origin([(key, "")])
            continue
        rule = of_pattern[pattern]
        origin = origins.setdefault(name, Origin(target=name, converter=rule))
        origin.parts.append((key, pattern))
        first = rule.target_patterns[0]
        origins |= {name.replace(first, other): origin for other in rule.target_patterns[1:]}
    return origins
