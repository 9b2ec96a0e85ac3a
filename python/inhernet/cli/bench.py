"""`inhernet bench`: latency against the dense network and the published form."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from inhernet.console import table

from .options import Command, add_model, add_weights, load_model, trusted
from .usage import DATA_HELP, TEACHER_HELP

if TYPE_CHECKING:
    from torch import nn


def add(command: Command) -> None:
    parser = command("bench", run, "latency against the dense network and the published form, interleaved, medians")
    add_model(parser)
    parser.add_argument("--teacher", metavar="TEACHER", help=f"{TEACHER_HELP} (default: the dense architecture of DIR)")
    add_weights(parser)
    parser.add_argument("--data", metavar="DATA", help=f"take an input from here: {DATA_HELP}")
    parser.add_argument("--input", metavar="SHAPE", help="shape of one example, such as 3x32x32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], metavar="B")
    parser.add_argument("--seconds", type=float, default=1.0, help="per figure")
    parser.add_argument("--compile", action="store_true", help="add torch.compile of all three")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from inhernet.decompose.levels import ordinary
    from inhernet.demos.published import published
    from inhernet.measure import interleaved

    from . import specs

    if min(arguments.batch) < 1:
        raise specs.UsageError(f"--batch is {arguments.batch}, expected sizes of at least 1")
    model, fast = ordinary(load_model(arguments, optimized=False)), load_model(arguments)
    dense = (
        specs.teacher(arguments.teacher, arguments.weights)
        if arguments.teacher
        else dense_like(model, trusted(arguments))
    )
    loader = specs.data(arguments.data, arguments.teacher).judge if arguments.data else None
    example = specs.example_inputs(model, arguments.input, loader)
    networks: dict[str, Any] = {"dense": dense.eval(), "inherited": model, "published form": published(model).eval()}
    if hasattr(fast, "optimization"):
        networks["optimised"] = fast
    if arguments.compile:
        networks |= {f"{name}, torch.compile": torch.compile(network) for name, network in list(networks.items())}
    rows = []
    for size in arguments.batch:
        inputs = example(size)

        def call(network: Callable[..., Any], inputs: Any = inputs) -> Any:
            return network(**inputs) if isinstance(inputs, dict) else network(inputs)

        calls = {name: (lambda network=network, call=call: call(network)) for name, network in networks.items()}
        found = interleaved(calls, arguments.seconds)
        base = found["dense"].p50
        for name, value in found.items():
            figures = [f"{figure:.3f}" for figure in (value.p20, value.p50, value.p80)]
            rows.append((name, size, *figures, f"{base / value.p50:.2f}×", value.rounds))
    threads = torch.get_num_threads()
    columns = ("network", "batch", "p20 ms", "median ms", "p80 ms", "speed, dense = 1", "calls")
    table(f"latency of {arguments.dir}, {threads} threads, interleaved", columns, rows)


def dense_like(model: nn.Module, trust: Sequence[str] = ()) -> nn.Module:
    """The dense architecture behind a loaded network, with arbitrary weights: enough to be timed."""
    import torch

    from inhernet import architecture

    name, args = cast("tuple[str, dict[str, Any]]", model.inhernet_factory)
    dense = architecture.build(name, args, None, tuple(trust)).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in dense.state_dict().values():
            # Ordinary numbers: NaN or denormals of fresh memory would be timed as something else.
            tensor.copy_(torch.full_like(tensor, 0.02) if tensor.is_floating_point() else torch.zeros_like(tensor))
    return dense.eval()
