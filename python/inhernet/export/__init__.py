"""What becomes of a finished network: its fastest form on this machine."""

from .optimize import optimize, restore
from .report import LayerChoice, Optimization

__all__ = ["LayerChoice", "Optimization", "optimize", "restore"]
