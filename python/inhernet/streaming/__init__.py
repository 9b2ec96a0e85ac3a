"""Checkpoints larger than memory: `source` reads one a tensor at a time, `convert` writes its inherited network."""

from .convert import convert_stream

__all__ = ["convert_stream"]
