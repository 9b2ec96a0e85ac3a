"""What makes a run this run and no other: settings, networks and data, so that a checkpoint goes on with its own only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..fingerprint import contents
from .state import rng_state, set_rng_state


@dataclass(frozen=True)
class Identity:
    """`settings` are told with their values when they differ, `networks` (hashes) by name."""

    settings: Mapping[str, Any]
    networks: Mapping[str, str | None]

    def changes(self, settings: Mapping[str, Any], networks: Mapping[str, str | None]) -> list[str]:
        """What is another one here than in a checkpoint's `settings` and `networks`."""
        told = [(name, settings.get(name), value) for name, value in self.settings.items()]
        found = [f"{name} was {then!r}, is {now!r}" for name, then, now in told if then != now]
        return found + [f"{name} differ" for name, value in self.networks.items() if networks.get(name) != value]


def identify(
    model: nn.Module, teacher: nn.Module | None, loss: Any, batches: int | None, config: Mapping[str, Any]
) -> Identity:
    """The identity of a run that starts with these. The starting weights of a fresh network are a draw, and left out."""
    plan = getattr(model, "inhernet_plan", None)
    return Identity(
        {**config, "objective": name_of(loss), "batches": batches},
        {
            "the model's layers or plan": contents([_layers(model), None if plan is None else plan.to_json()]),
            "the weights that the model starts from": None if plan is None else contents(model.state_dict()),
            "the teacher's class or weights": None
            if teacher is None
            else contents([type(teacher).__qualname__, teacher.state_dict()]),
        },
    )


def name_of(loss: Any) -> str:
    """What tells one loss from another: a dataclass's values, the name of a function or of an object's class."""
    if is_dataclass(loss) and not isinstance(loss, type):
        return repr(loss)
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def same_first_batch(loader: Iterable[Any], saved: str | None, rng: dict[str, Tensor]) -> bool | None:
    """Whether the first batch, drawn in the generators' state `rng`, has the contents `saved`.

    None if that cannot be known: the loader can be read only once, or gives another first batch each time.
    """
    if isinstance(loader, Iterator) or saved is None:
        return None

    def first() -> str:
        set_rng_state(rng)
        return contents(next(iter(loader), None))

    now = rng_state()
    own = getattr(loader, "generator", None)  # a DataLoader may draw from one that is not global
    held = own.get_state() if isinstance(own, torch.Generator) else None
    try:
        found = first()
        if found == saved:
            return True
        return False if found == first() else None
    finally:
        set_rng_state(now)
        if isinstance(own, torch.Generator) and held is not None:
            own.set_state(held)


def _layers(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, f"{tuple(tensor.shape)} {tensor.dtype}") for name, tensor in sorted(model.state_dict().items())]
