"""Fresh memory that cannot pass for a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block, memory that torch allocates uninitialised is NaN (integers: the largest value).

    Outputs of the native library are covered; its scratch is its own, and NaN in a build with DEBUG=1.

    Example:
        >>> import torch
        >>> with poisoned_memory():
        ...     bool(torch.empty(3).isnan().all())
        True
    """
    settings: Any = deterministic
    fill, mode = settings.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
