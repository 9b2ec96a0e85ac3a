"""What an inherited network may cost, and the ranks that follow; a file for each kind of budget."""

from .base import Budget, budget_from_dict, budget_to_dict
from .bytes import ByteBudget
from .energy import EnergyBudget
from .fidelity import FidelityBudget
from .latency import LatencyBudget
from .macs import MacBudget
from .params import ParamBudget
from .uniform import UniformRank, UniformRatio

__all__ = [
    "Budget",
    "ByteBudget",
    "EnergyBudget",
    "FidelityBudget",
    "LatencyBudget",
    "MacBudget",
    "ParamBudget",
    "UniformRank",
    "UniformRatio",
    "budget_from_dict",
    "budget_to_dict",
]
