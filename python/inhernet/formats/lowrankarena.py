"""LowRankArena's layout ("ABLinear"), so that its benchmark ranks our factorisations beside others'."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import atomic
from ..decompose.levels import ordinary
from ..layers import replaced, sharing
from ..nn import LowRankModule
from .compare import check, outputs_of

# Families whose runtime the arena has, by transformers' model_type; and its name of ours.
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


class Pair(nn.Module):
    """`ALinear(BLinear(x))`: their names for `up` and `down`."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        like = {"device": module.down.device, "dtype": module.down.dtype}
        rows, rank, columns = module.up.shape[0], module.rank, module.down.shape[1]
        self.BLinear = nn.Linear(columns, rank, bias=False, **like)
        self.ALinear = nn.Linear(rank, rows, bias=module.bias is not None, **like)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.ALinear(self.BLinear(x))
        return result


def export_lowrankarena(model: nn.Module, directory: str | os.PathLike[str], example_inputs: Any) -> float:
    """Write a directory in the layout that LowRankArena's runtime loads: `config.json`, `model.safetensors`, and what was done.

    Their runtime is copied beside it by hand, from `src/modeling` of their repository: `common.py` and the two files of the
    family that `auto_map` names.

    Args:
        model: an inherited language model of the families Llama, Mistral, Qwen2 or Qwen3, one head a layer.
        directory: must not exist, or be empty.
        example_inputs: a mapping of keyword arguments. What was written is read again and compared on them.

    Returns:
        The largest relative difference of an output between the file and the model.

    Raises:
        ValueError: another family, several heads, a factorised output head (their runtime replaces layers of the inner model
            only), a directory that holds something.

    Source: the layout of github.com/Zishan-Shao/lowrankarena (format version 1).
    """
    model = ordinary(model).eval()
    config: Any = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None or type(model).__name__ != f"{family}ForCausalLM":
        raise ValueError(
            f"model is {type(model).__name__}; LowRankArena runs {', '.join(f'{name}ForCausalLM' for name in FAMILIES.values())}"
        )
    pairs = {name: module for name, module in model.named_modules() if isinstance(module, LowRankModule)}
    for name, module in pairs.items():
        if module.gated:
            raise ValueError(f"layer {name!r} has a gate; LowRankArena knows plain pairs: convert with heads=1")
        if not name.startswith("model."):
            raise ValueError(
                f"layer {name!r} is outside of the inner model, where LowRankArena replaces nothing; exclude it"
            )
    target = Path(os.path.realpath(directory))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"directory is {str(target)!r}, which holds something; give a new one")
    tensors = _tensors(model, pairs)
    lower = family.lower()
    told = {
        **json.loads(config.to_json_string(use_diff=False)),
        "model_type": f"lowrank_{lower}",
        "architectures": [f"LowRank{family}ForCausalLM"],
        "low_rank_modules": {name: {"rank": module.rank} for name, module in pairs.items()},
        "low_rank_method": "inhernet",
        "low_rank_schema": "ABLinear",
        "low_rank_format_version": 1,
        "auto_map": {
            "AutoConfig": f"configuration_lowrank_{lower}.LowRank{family}Config",
            "AutoModel": f"modeling_lowrank_{lower}.LowRank{family}Model",
            "AutoModelForCausalLM": f"modeling_lowrank_{lower}.LowRank{family}ForCausalLM",
        },
    }
    told.pop("quantization_config", None)
    dense = sum(module.up.shape[0] * module.down.shape[1] for module in pairs.values())
    kept = sum(module.down.numel() + module.up.numel() for module in pairs.values())
    method = {
        "method": "InherNet",
        "dense_target_parameters": dense,
        "factor_target_parameters": kept,
        "achieved_target_keep_ratio": kept / dense if dense else 1.0,
        "refined": getattr(model, "inhernet_refinement", None) is not None,
        "quantization": False,
        "external_recovery": False,
    }
    differences: list[float] = []

    def write(fresh: Path) -> None:
        save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
        (fresh / "config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        (fresh / "lowrankarena_method.json").write_text(json.dumps(method, indent=2) + "\n", encoding="utf-8")
        run = partial(outputs_of, _read(model, pairs, fresh / "model.safetensors"))
        differences.append(check(run, model, example_inputs, "the exported directory"))

    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace_directory(target, write)
    return differences[0]


def _tensors(model: nn.Module, pairs: dict[str, LowRankModule]) -> dict[str, Tensor]:
    inside = tuple(f"{name}." for name in pairs)
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside) and tensor.data_ptr() not in seen:  # a tied head is not stored twice
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().cpu().contiguous()
    for name, module in pairs.items():
        parts = {"ALinear.weight": module.up, "BLinear.weight": module.down, "ALinear.bias": module.bias}
        tensors |= {f"{name}.{key}": t.detach().cpu().contiguous() for key, t in parts.items() if t is not None}
    return tensors


def _read(model: nn.Module, pairs: dict[str, LowRankModule], file: Path) -> nn.Module:
    """The network of the file: the model's own modules, with pairs in the places of low-rank ones."""
    result: Any = sharing(model)
    for name, module in pairs.items():
        result = replaced(result, name, Pair(module))
    state = {name: tensor.to(next(model.parameters()).device) for name, tensor in load_file(file).items()}
    missing, unexpected = result.load_state_dict(state, strict=False, assign=True)
    lacking = [name for name in missing if name.startswith(tuple(pairs))]
    if lacking or unexpected:
        raise ValueError(f"the exported directory does not hold what the model does: {(lacking + unexpected)[:3]}")
    return result.eval()  # type: ignore[no-any-return]
