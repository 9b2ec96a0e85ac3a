"""InherNet's front end: plan, convert, verify, save and load low-rank networks that inherit a teacher's weights.

Names are imported on first use, so that `import inhernet` costs nothing but the dictionary below.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import models as models
    from . import nn as nn
    from .budgets import (
        ByteBudget,
        EnergyBudget,
        FidelityBudget,
        LatencyBudget,
        MacBudget,
        ParamBudget,
        UniformRank,
        UniformRatio,
    )
    from .checkpoint import load, save
    from .config import InheritConfig, RefineConfig
    from .decompose import (
        Plan,
        at_level,
        cut,
        elastic,
        inherit,
        plan,
        refine_blocks,
        restore,
        set_level,
        summary,
        verify,
    )
    from .export import Optimization, optimize
    from .pretrained import register
    from .streaming import convert_stream

_HOME = {
    "InheritConfig": "config",
    "UniformRank": "budgets",
    "UniformRatio": "budgets",
    "EnergyBudget": "budgets",
    "ParamBudget": "budgets",
    "ByteBudget": "budgets",
    "MacBudget": "budgets",
    "LatencyBudget": "budgets",
    "FidelityBudget": "budgets",
    "RefineConfig": "config",
    "Plan": "decompose",
    "plan": "decompose",
    "inherit": "decompose",
    "elastic": "decompose",
    "restore": "decompose",
    "set_level": "decompose",
    "at_level": "decompose",
    "cut": "decompose",
    "refine_blocks": "decompose",
    "verify": "decompose",
    "summary": "decompose",
    "Optimization": "export",
    "optimize": "export",
    "register": "pretrained",
    "convert_stream": "streaming",
    "save": "checkpoint",
    "load": "checkpoint",
}

# Without `models` and `nn`: `from inhernet import *` must not shadow torch's.
__all__ = [
    "ByteBudget",
    "EnergyBudget",
    "FidelityBudget",
    "InheritConfig",
    "LatencyBudget",
    "MacBudget",
    "Optimization",
    "ParamBudget",
    "Plan",
    "RefineConfig",
    "UniformRank",
    "UniformRatio",
    "at_level",
    "convert_stream",
    "cut",
    "elastic",
    "inherit",
    "load",
    "optimize",
    "plan",
    "refine_blocks",
    "register",
    "restore",
    "save",
    "set_level",
    "summary",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("models", "nn"):
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "models", "nn"]
