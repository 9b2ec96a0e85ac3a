"""A forward inside CUDA graphs: one launch a call, where Python and the driver would take longer than the device.

A layer of 1 × 4,096 → 128 → 4,096 takes 32 to 38 µs from Python and 5.8 in a graph (H200, docs/gpu.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

#: Kinds of inputs that get a graph; each keeps its inputs, its outputs and everything between.
MOST_GRAPHS = 16
MOST_SEEN = 1024  # a server that sees every length once must not grow without end
WARM_UPS = 3  # calls before a capture: libraries allocate and choose in the first ones
_PLAIN = (Tensor, torch.nn.Parameter)
_CONSTANTS = (type(None), bool, int, float, str)


class CudaGraphs:
    """Runs a function through a CUDA graph from the second call with inputs of one kind on.

    A kind is the shapes, strides and dtypes of CUDA tensors and the values of all other arguments, on one stream. Outputs
    are copies: a later call does not change them. Whatever a graph cannot repeat runs as it is, always: arguments of other
    types, gradients, autocast, compilation, a function that writes into its inputs, that waits for the device, or whose
    output is no tree of tensors and constants; and every kind beyond `MOST_GRAPHS`.
    """

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._graphs: dict[Any, _Graph | None] = {}  # None: it cannot be captured
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> CudaGraphs:
        return CudaGraphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return CudaGraphs, ()

    def __call__(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        kind = _kind_of(leaves, structure)
        if kind is not None:
            with self._lock:  # a graph's inputs and outputs are one memory
                graph = self._graph_of(kind, run, leaves, structure)
                if graph is not None:
                    return graph(leaves)
        return run(*args, **kwargs)

    def _graph_of(self, kind: Any, run: Callable[..., Any], leaves: list[Any], structure: Any) -> _Graph | None:
        if kind not in self._graphs and kind in self._seen and len(self._graphs) < MOST_GRAPHS:
            self._graphs[kind] = captured(run, leaves, structure)
        if len(self._seen) > MOST_SEEN:
            self._seen.clear()
        self._seen.add(kind)
        return self._graphs.get(kind)


class _Graph:
    """A captured call: copies inputs in, replays, copies outputs out."""

    def __init__(self, replay: Callable[[], object], inputs: list[Any], outputs: Any) -> None:
        self.replay, self.inputs, self.outputs = replay, inputs, outputs

    @torch.no_grad()
    def __call__(self, leaves: list[Any]) -> Any:
        for mine, given in zip(self.inputs, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        self.replay()
        return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, self.outputs)


def captured(run: Callable[..., Any], leaves: list[Any], structure: Any) -> _Graph | None:
    """The graph of a call, or None where it cannot be captured."""
    inputs = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(inputs, structure)

    def call() -> Any:
        return run(*args, **kwargs)

    try:
        with torch.inference_mode(False), torch.no_grad():
            replay, outputs = capture(call)
    except RuntimeError:  # a synchronisation, an allocation outside of the graph
        return None
    written = any(isinstance(leaf, Tensor) and leaf._version > 0 for leaf in inputs)
    if written or not all(isinstance(leaf, (*_PLAIN, *_CONSTANTS)) for leaf in tree_flatten(outputs)[0]):
        return None
    return _Graph(replay, inputs, outputs)


def capture(call: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    """A replay of the call and the outputs that it fills.

    Raises:
        RuntimeError: the call does what a capture forbids.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    current = torch.cuda.current_stream()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads go on
            outputs = call()
    except BaseException:  # a capture that failed leaves its own stream as the current one
        torch.cuda.set_stream(current)
        raise
    return graph.replay, outputs


def _kind_of(leaves: list[Any], structure: Any) -> Any:
    """What decides which graph serves a call; None where none may."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return None
    found: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            asks = leaf.requires_grad and torch.is_grad_enabled()
            if type(leaf) not in _PLAIN or not _on_gpu(leaf) or asks:
                return None
            found.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        elif isinstance(leaf, _CONSTANTS):
            found.append((type(leaf), leaf))
        else:
            return None
    return (_stream(), str(structure), *found)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
