"""The peers: what a user would run instead of our ops, each as strong as it gets without our kernels.

`PEERS` maps a name to how the peer is made for one case; making it raises `Unavailable` with one sentence where it cannot run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import engines, layers
from benchmarks.baselines.setting import Runner, Setting, Unavailable

__all__ = ["PEERS", "Peer", "Runner", "Setting", "Unavailable", "peers_of"]


@dataclass(frozen=True)
class Peer:
    """A way of running a case; `dense` ones compute the layer that the factored one replaces."""

    make: Callable[[Setting], Runner]
    dense: bool = False
    gated: bool | None = None  # only for gated ops, only for plain ones, or for both


def _module(layer: Callable[[Setting], nn.Module], compiled: bool = False, frozen: bool = False):
    """A torch module, eager or compiled; `frozen` folds its weights into the compiled code (inference only)."""

    def make(setting: Setting) -> Runner:
        module: Any = layer(setting).eval()
        leaves = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if frozen and setting.training:
            raise Unavailable("freezing is for inference only")
        if compiled:
            module = torch.compile(module, options={"freezing": True} if frozen else None)
        return setting.runner(module, leaves)

    return make


PEERS: dict[str, Peer] = {
    "eager pair": Peer(_module(layers.Pair), gated=False),
    "compiled pair": Peer(_module(layers.Pair, compiled=True), gated=False),
    "compiled pair, frozen": Peer(_module(layers.Pair, compiled=True, frozen=True), gated=False),
    "published": Peer(_module(layers.Published), gated=True),
    "published, compiled": Peer(_module(layers.Published, compiled=True), gated=True),
    "published, compiled, frozen": Peer(_module(layers.Published, compiled=True, frozen=True), gated=True),
    "oneDNN pair": Peer(layers.onednn_pair),
    "ONNX Runtime": Peer(engines.onnx_runtime),
    "OpenVINO": Peer(engines.openvino),
    "dense": Peer(_module(layers.Dense), dense=True),
    "dense, compiled": Peer(_module(layers.Dense, compiled=True, frozen=True), dense=True),
    "dense, oneDNN": Peer(layers.onednn_dense, dense=True),
    "dense, ONNX Runtime": Peer(engines.dense_onnx_runtime, dense=True),
    "dense, OpenVINO": Peer(engines.dense_openvino, dense=True),
}
# Freezing changes nothing in training, where the plain compilation is the strong form.
PEERS_IN_TRAINING = PEERS | {"dense, compiled": Peer(_module(layers.Dense, compiled=True), dense=True)}


def peers_of(op: str, training: bool) -> dict[str, Peer]:
    """The peers of an op, in the order of the tables."""
    known = PEERS_IN_TRAINING if training else PEERS
    return {name: peer for name, peer in known.items() if peer.gated in (None, "gated" in op)}
