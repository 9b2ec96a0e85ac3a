"""Whole networks on a GPU: `python -m benchmarks.gpu.networks`, inherited ones against their teachers.

Each network at 50 and 25 % of its layers' parameters, in bfloat16: the teacher (from Python, in a CUDA graph, compiled), the
inherited network likewise, and what `inhernet.optimize` makes of it, which must never be slower than the teacher. Beside it
stands the limit: the teacher's time less the share that the removed work took in its linear and convolution layers. Weights
are random, which speed does not depend on. `--rehearse` runs tiny ones on a CPU.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inhernet
from benchmarks.gpu import rows
from inhernet.console import say, table
from inhernet.export.graphed import CudaGraphs
from inhernet.measure import interleaved

BUDGETS = (0.5, 0.25)
COLUMNS = ("time", "commit", "device", "torch", "network", "budget", "candidate", "ms", "times", "limit", "note")


class Attention(nn.Module):
    """Self-attention; with `past` tokens cached, over these too (decoding)."""

    def __init__(self, width: int, heads: int, past: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.register_buffer("cached", torch.randn(2, 1, heads, past, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        if self.cached.shape[3]:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self.cached, (k, v), strict=True))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: GELU, or SwiGLU with RMSNorm as in Llama."""

    def __init__(self, width: int, hidden: int, heads: int, llama: bool, past: int) -> None:
        super().__init__()
        norm: Any = nn.RMSNorm if llama else nn.LayerNorm
        self.first, self.second = norm(width), norm(width)
        self.attention = Attention(width, heads, past)
        self.gate = nn.Linear(width, hidden) if llama else None
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        y = self.second(x)
        y = F.gelu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return x + self.down(y)


class Bottleneck(nn.Module):
    """ResNet-50's block: 1×1, 3×3, 1×1."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        same = stride == 1 and inputs == 4 * width
        shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def resnet(blocks: tuple[int, ...], width: int) -> nn.Module:
    """ResNet-50 for blocks (3, 4, 6, 3) and width 64."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(inputs, width << stage, 2 if stage and not block else 1))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def transformer(depth: int, width: int, hidden: int, heads: int, llama: bool = False, past: int = 0) -> nn.Module:
    return nn.Sequential(*(Block(width, hidden, heads, llama, past) for _ in range(depth)))


def networks(rehearse: bool) -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """name -> teacher and input; the tiny ones of a rehearsal have the same names."""
    if rehearse:
        return {
            "bert": lambda: (transformer(1, 32, 64, 2), torch.randn(2, 5, 32)),
            "vit": lambda: (transformer(1, 32, 48, 2), torch.randn(1, 7, 32)),
            "resnet50": lambda: (resnet((1, 1), 8), torch.randn(2, 3, 32, 32)),
            "llama": lambda: (transformer(1, 32, 64, 2, llama=True, past=6), torch.randn(1, 1, 32)),
        }
    return {
        "bert": lambda: (transformer(4, 768, 3072, 12), torch.randn(128, 128, 768)),
        "resnet50": lambda: (resnet((3, 4, 6, 3), 64), torch.randn(128, 3, 224, 224)),
        "llama": lambda: (transformer(2, 4096, 11008, 32, llama=True, past=512), torch.randn(1, 1, 4096)),
        "vit": lambda: (transformer(12, 768, 3072, 12), torch.randn(32, 197, 768)),
        "bert, one sentence": lambda: (transformer(4, 768, 3072, 12), torch.randn(1, 128, 768)),
        "resnet50, one image": lambda: (resnet((3, 4, 6, 3), 64), torch.randn(1, 3, 224, 224)),
    }


class Graphed:
    """A network in a CUDA graph; on a CPU as it is."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run, self.graphs = run, CudaGraphs()

    def __call__(self, x: Tensor) -> Any:
        return self.graphs(self.run, (x,), {})


def measure(
    name: str, build: Callable[[], tuple[nn.Module, Tensor]], budget: float, device: str
) -> list[dict[str, Any]]:
    """The rows of one network at one budget: every candidate checked against the plain form, then all interleaved."""
    torch.manual_seed(0)
    teacher, x = build()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = inhernet.InheritConfig(init="random", budget=inhernet.ParamBudget(budget), device=device)
    inherited = inhernet.inherit(teacher.eval(), inhernet.plan(teacher, config)).eval()
    images = {"memory_format": torch.channels_last} if x.dim() == 4 else {}
    teacher, inherited = (model.to(device, dtype, **images).requires_grad_(False) for model in (teacher, inherited))
    x = x.to(device, dtype, **images)
    candidates: dict[str, Callable[[Tensor], Any]] = {
        "teacher": teacher,
        "teacher, graph": Graphed(teacher),
        "inherited": inherited,
        "inherited, graph": Graphed(inherited),
    }
    notes: dict[str, str] = {}
    fast = inhernet.optimize(inherited, x, seconds=0.03, show=False)
    candidates["optimised"] = fast
    notes["optimised"] = _described(fast)
    if device == "cuda":
        candidates["teacher, compiled, graph"] = Graphed(torch.compile(teacher))
    times: dict[str, float] = {}
    with torch.no_grad():
        expected = {True: teacher(x), False: inherited(x)}
        for candidate, run in list(candidates.items()):
            try:
                for _ in range(3):
                    output = run(x)
                _close(output, expected["teacher" in candidate])
            except Exception as failed:  # whatever a compiler or a kernel throws is a result, not the end
                notes[candidate] = f"failed: {type(failed).__name__}: {str(failed)[:160]}"
                del candidates[candidate]
        found = interleaved({c: (lambda run=run: run(x)) for c, run in candidates.items()}, seconds=0.4)
        times = {candidate: latency.p50 for candidate, latency in found.items()}
    base = min(ms for candidate, ms in times.items() if candidate in ("teacher", "teacher, graph"))
    limit = _limit(fast, base, budget)
    return [
        {
            "network": name,
            "budget": budget,
            "candidate": candidate,
            "ms": round(times[candidate], 4) if candidate in times else "",
            "times": round(base / times[candidate], 3) if candidate in times else "",
            "limit": round(limit, 3) if limit else "",
            "note": notes.get(candidate, ""),
        }
        for candidate in (*times, *(c for c in notes if c not in times))
    ]


def _limit(fast: nn.Module, teacher_ms: float, budget: float) -> float | None:
    """How many times faster the whole could be, were each dense layer's own time cut to its share of the parameters."""
    dense = [layer.microseconds["dense"] for layer in fast.optimization.layers if "dense" in layer.microseconds]  # type: ignore[union-attr]
    left = teacher_ms - sum(dense) / 1e3 * (1 - budget)
    return teacher_ms / left if dense and left > 0 else None


def _described(fast: nn.Module) -> str:
    """What `optimize` kept, and how many layers of each form."""
    found: Any = fast.optimization
    forms = list(found.forms.values())
    counts = ", ".join(f"{form} {forms.count(form)}" for form in sorted(set(forms)))
    return f"{found.kept}{', graph' * found.cuda_graph}{', channels-last' * found.channels_last}: {counts}"


def _close(actual: Tensor, expected: Tensor) -> None:
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not error <= torch.finfo(expected.dtype).eps ** 0.5:
        raise AssertionError(f"off by {error:.2g} of the norm")


def show(found: list[dict[str, Any]]) -> None:
    """The table: every network's candidates against the faster of its teacher's two plain forms."""
    columns = ("network", "budget", "candidate", "ms", "times the teacher", "limit", "what it is")
    lines = [[str(row[c]) for c in ("network", "budget", "candidate", "ms", "times", "limit", "note")] for row in found]
    table("whole networks, bfloat16", columns, lines, left=(0, 2, 6))
    slower = [
        f"{row['network']} at {row['budget']}"
        for row in found
        if row["candidate"] == "optimised" and float(row["times"] or 0) < 0.99
    ]
    say("optimised networks slower than their teacher: " + (", ".join(slower) or "none"))


def main(argv: list[str] | None = None) -> None:
    """Measure until time is up; every network's rows are on disk before the next begins."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.networks", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args(argv)
    device = "cpu" if arguments.rehearse else "cuda"
    name = "rehearsal" if arguments.rehearse else torch.cuda.get_device_name().lower().replace(" ", "-")
    stamp = {"commit": rows.commit_or_digest(), "device": name, "torch": torch.__version__}
    end, everything = time.monotonic() + arguments.seconds, []
    todo = [(network, build, budget) for budget in BUDGETS for network, build in networks(arguments.rehearse).items()]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for network, build, budget in todo:
            if time.monotonic() > end:
                say(f"left out for want of time: {network} at {budget}")
                continue
            try:
                found = measure(network, build, budget, device)
            except Exception as failed:
                found = [
                    {"network": network, "budget": budget, "candidate": "all", "note": json.dumps(str(failed)[:300])}
                ]
            everything += [dict.fromkeys(COLUMNS, "") | row for row in found]
            writer.writerows({"time": rows.now(), **stamp, **row} for row in found)
            file.flush()
            say(f"{network} at {budget}: " + ", ".join(f"{r['candidate']} {r.get('ms', '')}" for r in found))
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    show(everything)


if __name__ == "__main__":
    main()
