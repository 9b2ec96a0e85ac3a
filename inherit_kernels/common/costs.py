"""What a forward costs on a GPU: bytes, FLOPs and launches, for sizes and devices that nobody has measured.

A model of a few terms, fitted to the timings of one H200 (bfloat16, CUDA graphs, cold L2; benchmarks/results/nvidia-h200).
`dispatch` multiplies it by what the nearest measurements of the same backend say; by itself it is right to a factor of
three. On 44 cases measured there, each left out in turn, the choice so made was on average 1.9 % slower than the best one,
at worst 34 %, and in 4 cases more than 5 %; that of the nearest measured bucket 6.7 %, 96 % and
in 11 (tests/ops/test_costs.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from inherit_kernels.registry import Problem

#: Of the largest copies and products, what a device reaches of its data sheet: 4.27 of 4.8 TB/s, 793 of 989 TFLOP/s.
REACHED_BYTES, REACHED_FLOPS = 0.89, 0.80
#: FLOPs a multiprocessor and clock of the tensor cores at 16 bits, by compute capability; of float32 without them.
TENSOR_FLOPS, PLAIN_FLOPS = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}, 256
PASS = 2.0  # µs of an elementwise launch inside a graph
WASTED = 1.25  # library products move this many times their bytes' or FLOPs' time


@dataclass(frozen=True)
class Rates:
    """What a device moves and computes in a µs."""

    bytes: float
    flops: float  # at 16 bits
    plain_flops: float  # float32 without tensor cores
    multiprocessors: int

    def time(self, moved: float, flops: float, dtype: torch.dtype) -> float:
        """µs of work that is limited by its bytes or its FLOPs."""
        return max(moved / self.bytes, flops / (self.plain_flops if dtype == torch.float32 else self.flops))


#: A copy and a product of bfloat16 where they were measured.
MEASURED = {"nvidia-h200": Rates(4.273e6, 793e6, 53e6, 132)}


def rates_of(device: torch.device, slug: str) -> Rates:
    """The rates of a CUDA device: measured, or from its properties."""
    if slug in MEASURED:
        return MEASURED[slug]
    properties = torch.cuda.get_device_properties(device)
    cycles = properties.multi_processor_count * getattr(properties, "clock_rate", 1_400_000) / 1e3 * REACHED_FLOPS
    # Two transfers a memory clock; where torch does not say, an A100's.
    lanes = getattr(properties, "memory_bus_width", 5120) / 8
    moved = 2 * getattr(properties, "memory_clock_rate", 1_215_000) / 1e3 * lanes * REACHED_BYTES
    tensor = TENSOR_FLOPS.get((properties.major, properties.minor), 1024)
    return Rates(moved, cycles * tensor, cycles * PLAIN_FLOPS, properties.multi_processor_count)


@dataclass(frozen=True)
class Layer:
    """A problem's two products: `rows` × `depth` → `rank` → `outputs`, over heads; bytes of its tensors."""

    rows: int
    depth: int
    rank: int
    outputs: int
    heads: int
    x: int
    down: int
    t: int
    up: int
    y: int
    dtype: torch.dtype
    conv: bool
    gated: bool

    @classmethod
    def of(cls, problem: Problem) -> Layer:
        sizes, element = problem.sizes, problem.dtype.itemsize
        rank, outputs, heads = sizes["R"], sizes["N"], sizes.get("H", 1)
        conv = "P" in sizes
        rows = sizes["B"] * sizes["P"] if conv else sizes["M"]
        depth = sizes["C"] * sizes["T"] if conv else sizes["K"]
        return cls(
            rows=rows,
            depth=depth,
            rank=rank,
            outputs=outputs,
            heads=heads,
            x=element * rows * (sizes["C"] if conv else depth),
            down=element * rank * depth,
            t=element * rows * rank,
            up=element * heads * rank * outputs,
            y=element * rows * outputs,
            dtype=problem.dtype,
            conv=conv,
            gated="H" in sizes,
        )

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.rank * (self.depth + self.heads * self.outputs)


def library(problem: Problem, rates: Rates, epilogue: bool = False) -> float:
    """µs of two library products with passes between and after them; `epilogue`: what follows the second is in it."""
    layer = Layer.of(problem)
    passes = 0 if epilogue else (problem.options[-1] is not None) * 2 + problem.residual * 3
    inside = layer.y if epilogue and problem.residual else 0
    if epilogue and problem.options[-1] in ("gelu", "silu"):
        passes = 2
    first = rates.time(layer.x + layer.down + layer.t, 2 * layer.rows * layer.rank * layer.depth, layer.dtype)
    time = _start(layer.depth) + WASTED * first + (PASS if passes else 0) + passes * layer.y / rates.bytes
    if layer.gated and layer.conv:  # mean, gate, merged weights, a batched product, a pass for the bias
        second = rates.time(layer.t + layer.y, 2 * layer.rows * layer.rank * layer.outputs, layer.dtype)
        return time + 8 * PASS + _start(layer.rank) + WASTED * (second + 2 * layer.y / rates.bytes)
    depth = layer.heads * layer.rank
    wide = layer.heads * layer.t if layer.gated else layer.t
    second = rates.time(wide + layer.up + layer.y + inside, 2 * layer.rows * depth * layer.outputs, layer.dtype)
    if layer.gated:  # the gate and its products with t (in one launch, or in seven), the weights side by side
        time += (2 if epilogue else 8) * PASS + (2 * wide + layer.t + 3 * layer.up) / rates.bytes
    return time + _start(depth) + WASTED * second


def library_with_epilogue(problem: Problem, rates: Rates) -> float:
    """`library` with bias, residual and activation in the second product."""
    return library(problem, rates, epilogue=True)


def _start(depth: int) -> float:
    """µs of a small product in a graph: 2.8 at a depth of 1,024, 5 at 4,096, whose loop waits for memory each time."""
    return 2.4 + 0.65 * depth / 1024


def fused(problem: Problem, rates: Rates) -> float:
    """µs of the Triton kernels: every tensor once; from rank 256 on registers leave the tensor cores waiting."""
    layer = Layer.of(problem)
    busy = min(1.0, layer.rows / 64 / rates.multiprocessors) if layer.rows > 256 else 1.0
    moved = layer.x + layer.down + layer.up + layer.y * (1 + problem.residual)
    slower = 0.5 * (1 + (layer.rank / 180) ** 3)
    computing = rates.time(0, layer.flops, layer.dtype)
    return 5 + 1.2 * moved / rates.bytes / max(busy, 0.45) + slower * computing


def decode(problem: Problem, rates: Rates) -> float:
    """µs of the CUDA C++ kernels for few rows: two overlapping launches."""
    layer = Layer.of(problem)
    return 4 + 1.1 * (layer.x + layer.down + layer.up + layer.y * (1 + problem.residual)) / rates.bytes


def blended(ratios: list[tuple[float, float]]) -> float:
    """The mean of ratios, given as (distance, ratio), in logarithms; the nearest count most."""
    weights = [(distance + 0.25) ** -2 for distance, _ in ratios]
    logs = [weight * math.log(ratio) for weight, (_, ratio) in zip(weights, ratios, strict=True)]
    return math.exp(sum(logs) / sum(weights))
