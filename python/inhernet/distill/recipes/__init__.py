"""One file per published method; each is a function from a teacher and a loader to a trained network."""

from __future__ import annotations

from .inhernet import inhernet
from .kd import kd

__all__ = ["inhernet", "kd"]
