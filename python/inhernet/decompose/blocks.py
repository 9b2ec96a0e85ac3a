"""Where a network is cut for refinement: its repeated blocks, and what they are called with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batches import call as call_model

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def blocks_of(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The modules that are refined as one: the repeated blocks that hold `layers`, and each layer outside of them alone.

    A block is a child of a list of modules (`encoder.layer.0`, `layer1.0`); a list inside of a block counts where most of
    the block's layers are in it (a stage that holds a list of blocks, T5's sublayers). Experts stay together: which rows
    one of them gets is another matter in the teacher.

    Example:
        >>> stack = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        >>> blocks_of(nn.Sequential(stack, nn.Linear(4, 2)), ["0.0.0", "0.1.0", "1"])
        ['0.0', '0.1', '1']
    """
    return list(_cut(model, "", frozenset(layers), repeated=False))


def _cut(module: nn.Module, name: str, layers: frozenset[str], repeated: bool) -> Iterator[str]:
    inside = _inside(name, layers)
    if name in layers or (inside and _routes(module)):
        yield name
        return
    children = [(_joined(name, child), part) for child, part in module.named_children()]
    children = [(child, part) for child, part in children if child in layers or _inside(child, layers)]
    stack = isinstance(module, _CONTAINERS) and any(child not in layers for child, _ in children)
    if repeated and not stack and 2 * _stacked(module, name, layers) < len(inside):
        yield name
        return
    for child, part in children:
        yield from _cut(part, child, layers, stack)


def _stacked(module: nn.Module, name: str, layers: frozenset[str]) -> int:
    """How many of `layers` are in lists of modules inside of this one, not counting lists of plain layers."""
    held: set[str] = set()
    routers = tuple(f"{below}." for below, part in module.named_modules(prefix=name) if _routes(part))
    for below, part in module.named_modules(prefix=name):
        if below != name and isinstance(part, _CONTAINERS) and not f"{below}.".startswith(routers):
            inside = _inside(below, layers)
            plain = {layer for layer in inside if "." not in layer.removeprefix(f"{below}.")}
            held |= inside - plain
    return len(held)


def _routes(module: nn.Module) -> bool:
    return "experts" in type(module).__name__.lower()


def _inside(name: str, layers: frozenset[str]) -> set[str]:
    return {layer for layer in layers if not name or layer.startswith(f"{name}.")}


def _joined(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


@dataclass(frozen=True)
class Call:
    """What a block was called with: the tensors and other values of its arguments, and how these are nested."""

    leaves: tuple[Any, ...]
    spec: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return cls(tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec)

    def on(self, block: nn.Module) -> Tensor:
        """The block's main output: its first floating tensor."""
        # Clones: a block may begin with an operation in place.
        fresh = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(fresh, self.spec)
        return main_output(block(*args, **kwargs))

    def with_input(self, x: Tensor, at: int) -> Call:
        return Call((*self.leaves[:at], x, *self.leaves[at + 1 :]), self.spec)

    def in_float32(self) -> Call:
        """The same with its tensors of half precision in float32, for a block that is trained in it."""
        return Call(tuple(leaf.float() if _is_half(leaf) else leaf for leaf in self.leaves), self.spec)


def main_output(output: Any) -> Tensor:
    """The first floating tensor of a block's output. Raises TypeError where there is none."""
    for leaf in pytree.tree_leaves(output):
        if _is_floating(leaf):
            return leaf
    raise TypeError(f"a block returned {type(output).__name__} without a floating tensor in it")


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _is_half(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)


class _Reached(BaseException):
    """Ends a forward as soon as what was looked for is known."""


def call_of(model: nn.Module, name: str, inputs: Any) -> Call:
    """What the block is called with when the model is called with `inputs`; the model runs no further."""
    found: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call.of(args, kwargs))
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        call_model(model, inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not found:
        raise ValueError(f"block {name!r} is not reached by every batch of the calibration data")
    return found[0]


def order_of(model: nn.Module, names: Iterable[str], inputs: Any) -> tuple[dict[str, int | None], dict[str, str]]:
    """The blocks in the order in which the model calls them, and why others cannot be refined.

    With each block: where among its arguments the output of the block before stands, if that is all in which the two
    calls differ (the next call then follows from the last one); else None.
    """
    calls: list[tuple[str, tuple[list[Any], Any], list[Any]]] = []

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append((name, pytree.tree_flatten((args, kwargs)), pytree.tree_leaves(output)))

        return record

    names = list(names)
    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        call_model(model, inputs)
    times = {name: sum(called == name for called, _, _ in calls) for name in names}
    refused = {name: "the calibration data does not reach it" for name in names if not times[name]}
    refused |= {name: f"it is called {times[name]} times in one forward" for name in names if times[name] > 1}
    kept = [entry for entry in calls if entry[0] not in refused]
    order: dict[str, int | None] = {}
    for index, (name, arguments, _) in enumerate(kept):
        before = kept[index - 1] if index else None
        order[name] = None if before is None else _follows(before[1], before[2], arguments)
    return order, refused


def _follows(before: tuple[list[Any], Any], output: list[Any], after: tuple[list[Any], Any]) -> int | None:
    (old, old_spec), (new, new_spec) = before, after
    if old_spec != new_spec or not any(_is_floating(leaf) for leaf in output):
        return None
    main = main_output(output)
    places = [i for i, leaf in enumerate(new) if leaf is main]
    same = all(_same(a, b) for i, (a, b) in enumerate(zip(old, new, strict=True)) if i not in places)
    return places[0] if len(places) == 1 and same else None


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b


@contextmanager
def without_cache(*models: nn.Module) -> Iterator[None]:
    """No keys and values are remembered inside: a block that is run again would find its own there."""
    configs: dict[int, Any] = {
        id(c): c for m in models for part in m.modules() for c in [getattr(part, "config", None)]
    }
    changed = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    try:
        for config in changed:
            config.use_cache = False
        yield
    finally:
        for config in changed:
            config.use_cache = True
