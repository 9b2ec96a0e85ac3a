"""What surrounds a training run: the teacher in eval mode, signals that wait for a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Interrupted(KeyboardInterrupt):
    """Training stopped by a signal after its state was saved; call `fit` again with the same arguments to go on."""

    def __init__(self, signum: int, path: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; state saved in {path}")
        self.signum = signum
        self.path = path


@contextmanager
def evaluating(teacher: nn.Module | None) -> Iterator[None]:
    """Eval mode for the block; every module's own flag is put back after it."""
    flags = {} if teacher is None else {module: module.training for module in teacher.modules()}
    if teacher is not None:
        teacher.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def caught_signals(enabled: bool) -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying; a second one acts as usual. Only the main thread may do so."""
    received: list[int] = []
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    for caught in before:
        signal.signal(caught, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
