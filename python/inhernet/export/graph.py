"""Rewriting a network's forward as a traced graph, where torch.fx can trace it.

The graph proves who consumes what, so that BatchNorm, residual addition and activation can move into the layer before
them; and it calls the forms directly, which saves `nn.Module.__call__` at every layer.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..nn import LowRankModule
from .sites import Site, foldable, has_hooks, is_layer, is_linear

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE_ADDITIONS = (operator.iadd, "add_")
_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", "relu": "relu",
    "relu_": "relu", nn.SiLU: "silu", F.silu: "silu", nn.GELU: "gelu", F.gelu: "gelu",
}  # fmt: skip
#: What a site's activation stands for.
FUNCTIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}  # fmt: skip


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LowRankModule) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> tuple[fx.Graph | None, str]:
    """The model's graph, or None and the reason why there is none."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        # A graph knows one set of arguments; `if mask is not None` would be decided once for all calls.
        return None, "its forward has optional arguments"
    if is_layer(model):
        return None, "it is a single layer"
    hooked = [name for name, module in model.named_modules() if has_hooks(module)]
    if hooked:
        return None, f"module {hooked[0]!r} has hooks"
    try:
        graph = _Tracer().trace(model)
        graph.lint()
    except Exception as error:  # whatever a forward does when it meets a proxy
        return (
            None,
            f"torch.fx cannot trace it ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
        )
    return graph, ""


@dataclass
class Chain:
    """A site in a graph: the nodes from the layer's call to the site's end, and the tensor that is added."""

    site: Site
    nodes: list[fx.Node]
    residual: fx.Node | None = None

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    def take(self, node: fx.Node, **changes: Any) -> None:
        self.nodes.append(node)
        self.site = replace(self.site, **changes)


def find_chains(
    graph: fx.Graph,
    model: nn.Module,
    values: Mapping[fx.Node, Any] | None,
    wanted: Mapping[str, Site] | None = None,
) -> list[Chain]:
    """Every layer call with what it can take in.

    Args:
        graph: the model's graph.
        model: what it was traced from.
        values: shape and dtype of each node on the example (`Recorder`); None trusts `wanted` for what they tell.
        wanted: sites by layer name that were found before; nothing else is taken.

    Raises:
        ValueError: a wanted site is not there.
    """
    finder = _Finder(model, graph, values, wanted)
    # Backwards: of two branches that meet in an addition, the later one takes it, and so stays where it is.
    chains = [finder.chain(node) for node in reversed(graph.nodes) if finder.starts(node)]
    for site in (wanted or {}).values():
        if site not in [chain.site for chain in chains]:
            raise ValueError(f"layer {site.name!r} is not followed by what the saved choices say; optimise it again")
    return chains


class _Finder:
    def __init__(self, model: nn.Module, graph: fx.Graph, values: Any, wanted: Any) -> None:
        self.modules: dict[Any, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        called = [self.modules[node.target] for node in graph.nodes if node.op == "call_module"]
        self.calls = Counter(id(module) for module in called)
        self.values, self.wanted = values, wanted
        self.taken: set[fx.Node] = set()

    def starts(self, node: fx.Node) -> bool:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return False
        return is_layer(self.modules[node.target]) and (self.wanted is None or node.target in self.wanted)

    def chain(self, node: fx.Node) -> Chain:
        chain = Chain(Site(str(node.target)), [node])
        # Only a layer called once: a form belongs to the layer, so every call of it would get what one call takes in.
        if self.calls[id(self.modules[node.target])] == 1:
            for take in (self._take_batchnorm, self._take_residual, self._take_activation):
                follower = self._follower(chain)
                if follower is not None:
                    take(chain, follower)
        self.taken.update(chain.nodes)
        return chain

    def _follower(self, chain: Chain) -> fx.Node | None:
        """The only consumer of the chain's end, if no other chain has it."""
        users = list(chain.end.users)
        return users[0] if len(users) == 1 and users[0] not in self.taken and users[0].op != "output" else None

    def _wants(self, chain: Chain, **changes: Any) -> bool:
        wanted = None if self.wanted is None else self.wanted[chain.site.name]
        return wanted is None or all(getattr(wanted, key) == value for key, value in changes.items())

    def _take_batchnorm(self, chain: Chain, node: fx.Node) -> None:
        if node.op != "call_module" or node.args != (chain.end,) or node.kwargs:
            return
        layer, norm = self.modules[chain.site.name], self.modules[node.target]
        known = self.values is None or not is_linear(layer) or len(self.values[chain.end][0]) == 2
        if known and self.calls[id(norm)] == 1 and foldable(layer, norm) and self._wants(chain, batchnorm=node.target):
            chain.take(node, batchnorm=node.target)

    def _take_residual(self, chain: Chain, node: fx.Node) -> None:
        if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
            return
        if len(node.args) != 2 or node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
            return
        first: Any
        second: Any
        first, second = node.args
        other = second if first is chain.end else first
        if other is chain.end or (node.target in _IN_PLACE_ADDITIONS and first is not chain.end):
            return
        # Another shape or dtype would broadcast or promote, which the ops refuse.
        alike = self.values is None or self.values.get(chain.end) == self.values.get(other)
        moves = any(_writes(between, self.modules) for between in _between(chain.nodes[0], node))
        if alike and not moves and self._wants(chain, residual=True):
            chain.take(node, residual=True)
            chain.residual = other

    def _take_activation(self, chain: Chain, node: fx.Node) -> None:
        if not node.args or node.args != (chain.end,):
            return
        module = self.modules[node.target] if node.op == "call_module" else None
        kind = _ACTIVATIONS.get(node.target if module is None else type(module))
        options = dict(node.kwargs) if module is None else {"approximate": getattr(module, "approximate", "none")}
        options.pop("inplace", None)  # nobody else consumes the chain's end, so nobody sees it written
        if options.pop("approximate", "none") == "tanh":
            kind = "gelu_tanh"
        if kind is not None and not options and self._wants(chain, activation=kind):
            chain.take(node, activation=kind)


def _between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    node = start.next
    while node is not end:
        yield node
        node = node.next


def _writes(node: fx.Node, modules: Mapping[Any, nn.Module]) -> bool:
    """Whether a node may write into a tensor that exists: then no layer moves past it."""
    if "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    if node.op == "call_module":
        return bool(getattr(modules[node.target], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "_")
        positional = any(arg is True for arg in node.args)  # F.relu(x, True)
        return name.endswith("_") or name == "setitem" or node.target in _OPERATORS_IN_PLACE or positional
    return False


_OPERATORS_IN_PLACE = {
    getattr(operator, name) for name in vars(operator) if name[0] == "i" and hasattr(operator, f"__{name[1:]}__")
} - {operator.index, operator.inv, operator.invert}


class Recorder(fx.Interpreter):
    """Runs a graph on the example and keeps what its nodes gave."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.values: dict[fx.Node, Any] = {}  # shape and dtype

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.values[n] = (tuple(value.shape), value.dtype)
        return value

    def inputs(self, chain: Chain) -> tuple[Tensor, ...]:
        """What the chain's layer got, and what is added."""
        nodes = (chain.nodes[0].args[0], *([] if chain.residual is None else [chain.residual]))
        return tuple(self.env[node] for node in nodes)  # type: ignore[index]


def rewrite(
    graph: fx.Graph, model: nn.Module, chains: Iterable[Chain], runs: Mapping[str, Callable[..., Tensor]]
) -> Callable[..., Any]:
    """A forward in which every layer that has an entry in `runs` is that call, with what its site takes in.

    Args:
        graph: the model's graph; it is changed.
        model: what the graph was traced from; the other modules stay its own.
        chains: as found in this graph.
        runs: layer name -> `run(x)`, or `run(x, residual)`.
    """
    for chain in chains:
        if chain.site.name not in runs:
            continue
        start = chain.nodes[0]
        arguments = (*start.args, chain.residual) if chain.residual is not None else start.args
        with graph.inserting_before(start if chain.residual is None else chain.end):
            call = graph.call_function(runs[chain.site.name], arguments)
        chain.end.replace_all_uses_with(call)
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(model, graph).forward
