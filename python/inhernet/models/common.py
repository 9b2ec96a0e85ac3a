"""What the model factories share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def factory(build: Callable[..., Model]) -> Callable[..., Model]:
    """Record name and arguments on the model, `model.inhernet_factory = ("inhernet.models.<name>", {...})`, so that a
    saved directory can name how its architecture is built."""

    @functools.wraps(build)
    def wrapper(*args: Any, **kwargs: Any) -> Model:
        bound = inspect.signature(build).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = {name: list(v) if isinstance(v, tuple) else v for name, v in bound.arguments.items()}
        model = build(*args, **kwargs)
        model.__dict__["inhernet_factory"] = (f"inhernet.models.{build.__name__}", arguments)
        return model

    return wrapper


def check_positive(**values: Any) -> None:
    """Raise ValueError for an argument that is not an integer of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Kaiming (fan out) for convolutions; BatchNorm and linear layers keep torch's default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())
