"""Which modules can be opened, and a network with those opened that are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .copies import sharing


@dataclass(frozen=True)
class _Kind:
    opens: Callable[[nn.Module], bool]
    opened: Callable[[Any], nn.Module]
    why_not: Callable[[Any], str | None]


_KINDS: list[_Kind] = []


def register(
    opens: Callable[[nn.Module], bool],
    opened: Callable[[Any], nn.Module],
    why_not: Callable[[Any], str | None] = lambda module: None,
) -> None:
    """Add a kind of module that is replaced by one that computes the same from `nn.Linear` and `nn.Conv2d` inside.

    A model that was converted with it needs the same registration where it is loaded.

    Args:
        opens: whether a module is of this kind. It is asked of every module, so it should look at the type.
        opened: the replacement, called alike, sharing the module's numbers (as views where the shapes differ); it must not
            change the module. Hooks of the module are not carried over.
        why_not: why this one cannot be opened, as a sentence, or None.

    Example:
        >>> class Outer(nn.Module):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.kernel = nn.Parameter(torch.randn(size, size))
        ...     def forward(self, x):
        ...         return x @ self.kernel
        >>> def as_linear(module):
        ...     linear = nn.Linear(*module.kernel.shape, bias=False, device="meta")
        ...     linear.weight = nn.Parameter(module.kernel.detach().T)
        ...     return linear
        >>> register(lambda module: type(module) is Outer, as_linear)
    """
    _KINDS.append(_Kind(opens, opened, why_not))


def open_layers(model: nn.Module, within: Iterable[str] | None = None) -> nn.Module:
    """The model with its closed layers opened: a copy that shares every tensor, or the model itself if there is none.

    Args:
        model: not changed.
        within: names of layers; only modules are opened that they are in (`"attention.q_proj"` opens `attention`). None: all.
    """
    names = None if within is None else tuple(within)
    if not any(_asked(name, names) and can_open(module) for name, module in model.named_modules()):
        return model
    result, owners = sharing(model), Counter(id(p) for m in model.modules() for p in m._parameters.values())
    # Again for each kind: what an opened module consists of may be of the next.
    for kind in _KINDS:
        for name, module in list(result.named_modules()):
            if not kind.opens(module) or kind.why_not(module) is not None or not _asked(name, names):
                continue
            if any(owners[id(p)] > 1 for p in module.parameters()):
                continue  # tied to another layer: opened, it would be that no longer
            modes = {part: part.training for part in module.modules()}
            fresh = kind.opened(module)
            for part in fresh.modules():
                part.training = modes.get(part, module.training)
            result = _placed(result, module, fresh)
    return result


def why_closed(module: nn.Module) -> str | None:
    """Why a module of a kind that can be opened is not, or None."""
    return next((why for kind in _KINDS if kind.opens(module) for why in [kind.why_not(module)] if why), None)


def can_open(module: nn.Module) -> bool:
    """Whether a module is of a kind that is opened, and can be."""
    return any(kind.opens(module) and kind.why_not(module) is None for kind in _KINDS)


def _asked(name: str, names: tuple[str, ...] | None) -> bool:
    return names is None or any(layer == name or layer.startswith(f"{name}." if name else "") for layer in names)


def _placed(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """`new` wherever `old` is (a shared module is in several places)."""
    if old is model:
        return new
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new
    return model
