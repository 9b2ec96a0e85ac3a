"""Calls of Triton backends without their Python: what one call launched, the next one of its kind launches again.

Between two kernels of one call lie some 20 µs of ours (shapes, strides, configurations) and 20 µs of Triton's a launch (binding
arguments, finding the compiled kernel). All of it follows from the kind of the call: sizes, strides, dtypes and alignment of
its tensors, its options. So the first call of a kind runs as it is written while its launches and allocations are
noted; later ones allocate, put their own tensors in the places of the first's, and start the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inherit_kernels.common import triton_launch
from inherit_kernels.common.triton_launch import Launch, interpreting, launching_now, observing, precision

PLANS_KEPT = 4096
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_FRESH = {torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.new_empty, torch.ops.aten.empty_like}


def planned(function: Callable[..., Any]) -> Callable[..., Any]:
    """A backend's function whose launches are remembered by the kind of its arguments."""
    plans: dict[Any, _Plan | None] = {}  # None: a call of this kind does more than launch and allocate
    _ALL.append(plans)

    @wraps(function)
    def call(*args: Any) -> Any:
        kind = _kind_of(args)
        if kind is None:
            return function(*args)
        try:
            plan = plans[kind]
        except KeyError:
            return _first_call(function, args, plans, kind)
        return function(*args) if plan is None else plan(args)

    return call


_ALL: list[dict[Any, Any]] = []


def forget_plans() -> None:
    """After configurations have changed."""
    for plans in _ALL:
        plans.clear()


def _kind_of(args: Sequence[Any]) -> Any:
    """What decides everything that a call does but for values and addresses; None where nothing may be remembered."""
    if launching_now():
        return None
    x = args[0]
    kind: list[Any] = [x.get_device(), precision(x.dtype)]
    addresses = []
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            if type(arg) not in _PLAIN or arg.is_neg() or arg._is_zerotensor() or not _served(arg):
                return None
            kind.append((arg.shape, arg.stride(), arg.dtype, address % 16 == 0))
            addresses.append(address)
        else:
            kind.append(tuple(arg) if isinstance(arg, list) else arg)
    # Two arguments in one place: which of them a kernel was given could not be told.
    return tuple(kind) if len(set(addresses)) == len(addresses) else None


def _served(tensor: Tensor) -> bool:
    """Whether launches of this tensor may be remembered: on the current CUDA device, or interpreted."""
    if tensor.is_cuda:
        return tensor.get_device() == torch.cuda.current_device() and _known_triton()
    return interpreting()


@cache
def _known_triton() -> bool:
    """Whether compiled kernels are started as here: Triton 3.6 to 3.9 (read in both ends' sources)."""
    import triton

    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return major == 3 and 6 <= minor <= 9


class _OtherWork(TorchDispatchMode):
    """Notices torch operations that are neither views nor fresh memory: a plan would leave them out."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or not (operator.is_view or operator.overloadpacket in _FRESH)
        return operator(*args, **(kwargs or {}))


def _first_call(function: Callable[..., Any], args: Sequence[Any], plans: dict[Any, _Plan | None], kind: Any) -> Any:
    with observing() as launches, _OtherWork() as other:
        results = function(*args)
    if len(plans) >= PLANS_KEPT:
        plans.clear()
    plans[kind] = None if other.found else _plan_of(args, launches, results)
    return results


def _plan_of(args: Sequence[Any], launches: Sequence[tuple[Launch, Any]], results: Any) -> _Plan | None:
    """The plan of a call, or None where a tensor of it is neither an argument nor in fresh memory of its own."""
    places = _Places([arg for arg in args if isinstance(arg, Tensor)])
    single = isinstance(results, Tensor)
    returned = [results] if single else list(results)
    try:
        views = [None if tensor is None else places.fresh(tensor) for tensor in returned]
        starts = [_Start(launch, started, places) for launch, started in launches]
    except LookupError:
        return None
    return _Plan(places.allocations, starts, views, single)


class _Places:
    """Which tensor of a call lies where: its arguments, then memory that it allocated."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = {tensor.data_ptr(): index for index, tensor in enumerate(inputs)}
        self.count, self.device = len(inputs), inputs[0].device
        self.taken = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.own: dict[int, int] = {}  # address of a storage -> index
        self.allocations: list[tuple[Any, Any, torch.dtype, torch.device]] = []

    def fresh(self, tensor: Tensor) -> tuple[int, tuple[Any, Any, Any] | None]:
        """Index of a tensor in memory of the call's own; size, strides and offset where it is a part of it.

        Raises:
            LookupError: it is not in such memory.
        """
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.taken:
            raise LookupError
        whole = tensor.storage_offset() == 0 and tensor.nbytes == storage.nbytes()
        if storage.data_ptr() not in self.own:
            self.own[storage.data_ptr()] = self.count + len(self.allocations)
            count = storage.nbytes() // tensor.element_size()
            size, stride = (tensor.shape, tensor.stride()) if whole else ((count,), (1,))
            self.allocations.append((size, stride, tensor.dtype, self.device))
        index = self.own[storage.data_ptr()]
        size, stride, dtype, _ = self.allocations[index - self.count]
        if dtype != tensor.dtype:
            raise LookupError
        same = whole and size == tensor.shape and stride == tensor.stride()
        return index, None if same else (tensor.shape, tensor.stride(), tensor.storage_offset())

    def argument(self, tensor: Tensor) -> tuple[int, tuple[Any, Any, Any] | None]:
        """The same for what a kernel is given, of which only the address counts."""
        if tensor.data_ptr() in self.inputs:
            return self.inputs[tensor.data_ptr()], None
        index, view = self.fresh(tensor)
        return index, view if view is not None and view[2] else None


class _Start:
    """One launch: the compiled kernel, and its arguments with the places of tensors."""

    def __init__(self, launch: Launch, started: Any, places: _Places) -> None:
        self.tensors = [
            (position, *places.argument(value))
            for position, value in enumerate(launch.args)
            if isinstance(value, Tensor)
        ]
        self.grid = (*launch.grid, 1, 1)[:3]
        if interpreting():
            self.values, self.start = list(launch.args), None
            self.interpreted = lambda *args: launch.kernel[launch.grid](*args, **launch.keywords)
        else:
            named = launch.kernel.arg_names[len(launch.args) :]
            self.values = [*launch.args, *(launch.keywords[name] for name in named)]
            self.start = (started.run, started.function, started.packed_metadata)
        for position, _, _ in self.tensors:
            self.values[position] = None  # keeps no memory

    def __call__(self, tensors: Sequence[Tensor], stream: Any, hooks: tuple[Any, Any]) -> None:
        values = self.values.copy()
        for position, index, view in self.tensors:
            tensor = tensors[index]
            values[position] = tensor if view is None else tensor.as_strided(*view)
        if self.start is None:
            self.interpreted(*values)
        else:
            run, function, metadata = self.start
            run(*self.grid, stream, function, metadata, None, *hooks, *values)


class _Plan:
    """What a call of one kind does."""

    def __init__(self, allocations: Any, starts: Sequence[_Start], views: Sequence[Any], single: bool) -> None:
        self.allocations, self.starts, self.views, self.single = allocations, starts, views, single

    def __call__(self, args: Sequence[Any]) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        tensors += [
            torch.empty_strided(size, stride, dtype=dtype, device=device)
            for size, stride, dtype, device in self.allocations
        ]
        stream, hooks = triton_launch.stream_and_hooks(tensors[0])
        for start in self.starts:
            start(tensors, stream, hooks)
        results = [
            None if view is None else tensors[view[0]] if view[1] is None else tensors[view[0]].as_strided(*view[1])
            for view in self.views
        ]
        return results[0] if self.single else tuple(results)
