"""transformers' own saving, which cannot bring back an inherited model."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class _SavePretrained:
    """`save_pretrained` of an inherited model: as transformers' own, with a warning that names what is lost."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # no cycle: a model's memory is free as soon as the last name is gone

    def __reduce__(self) -> tuple[Any, ...]:
        return _SavePretrained, (self._model(),)  # for pickle and deepcopy: the copy speaks of the copied model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        replaced = model.inhernet_plan.factorised
        warnings.warn(
            f"from_pretrained will not bring this model back: it builds the dense {type(model).__name__} and leaves "
            f"its {len(replaced)} inherited layers (first {replaced[0].name!r}) at random weights; save with "
            "inhernet.save(model, directory), load with inhernet.load(directory)",
            stacklevel=2,
        )
        return type(model).save_pretrained(model, *args, **kwargs)


def warn_of_pretrained(model: Model) -> Model:
    """Let `model.save_pretrained`, if there is one, say what it loses. Refusing would end a Trainer at its first
    checkpoint, and what it writes can still be read as a state dict."""
    plan: Any = getattr(model, "inhernet_plan", None)
    if hasattr(type(model), "save_pretrained") and plan is not None and plan.factorised:
        model.__dict__["save_pretrained"] = _SavePretrained(model)
    return model
