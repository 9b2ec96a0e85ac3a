"""A short program for compute-sanitizer: `python -m benchmarks.gpu.sanitize BACKEND` runs a backend on small ragged cases.

Inputs are made and results compared on the CPU, so that the device runs the backend's kernels and little else. Give it
PYTORCH_NO_CUDA_MEMORY_CACHING=1: then every tensor is an allocation of its own and its end is seen.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import inherit_kernels
from benchmarks.suites import Point, conv_point, linear_point
from inherit_kernels.dispatch import problem_of
from inherit_kernels.registry import OPS
from inherit_kernels.testing import make_inputs

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # coarse: accuracy is tested elsewhere


def points(op: str) -> Iterator[Point]:
    """One row, few, some, many; maps of one pixel, of 7² and larger; epilogues."""
    if "linear" in op:
        for m, k, n, r in ((1, 256, 264, 24), (13, 520, 136, 64), (70, 136, 264, 40), (300, 72, 130, 16)):
            yield linear_point(op, m, k, n, r, 3, activation="gelu", residual=True)
            yield linear_point(op, m, k, n, r, 2)
    else:
        for c, side, n, r in ((16, 7, 24, 8), (24, 14, 40, 16), (8, 1, 8, 8), (16, 19, 72, 24)):
            yield conv_point(op, 2, (c, side, n, 3, 1), r, 3, "channels_last", activation="relu")
            yield conv_point(op, 2, (c, side, n, 1, 1), r, 2, "contiguous", residual=True)


def run(op: str, point: Point, backend: str, dtype: torch.dtype, device: str, training: bool) -> str | None:
    """One call, in training with its backward, against the definition on the CPU; the sentence of a backend that declines.

    Raises:
        AssertionError: a result is wrong.
    """
    spec, options = OPS[op], point.case.options
    inputs = make_inputs(op, point.case, dtype, layout=point.layout)
    on_device: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in inputs.items()}
    names = [part.split()[-1] for part in spec.options.split(", ")]
    full = dict(zip(names, spec.default_options, strict=True)) | options
    tensors, chosen = spec.normalise(tuple(on_device.values()), tuple(full.values()))
    sentence = spec.backends[backend].supports(problem_of(spec, tensors, chosen, training))
    if sentence is not None:
        return sentence
    function = getattr(inherit_kernels, op)

    def step(given: dict[str, Any], chosen_backend: str) -> list[Tensor]:
        leaves = {k: v if v is None else v.detach().requires_grad_(training) for k, v in given.items()}
        with inherit_kernels.use_backend(chosen_backend):
            y = function(*leaves.values(), **options)
        if not training:
            return [y]
        present = [leaf for leaf in leaves.values() if leaf is not None]
        cotangent = torch.ones(y.shape, dtype=y.dtype).to(y.device)
        return [y.detach(), *torch.autograd.grad(y, present, cotangent)]

    wide = {k: v if v is None else v.double() for k, v in inputs.items()}
    for actual, expected in zip(step(on_device, backend), step(wide, "reference"), strict=True):
        difference = float((actual.cpu().double() - expected).norm()) / max(float(expected.norm()), 1e-6)
        if not difference <= TOLERANCE[dtype]:
            raise AssertionError(f"{op} {point} {dtype} {backend}: off by {difference:.3g} of the norm")
    return None


def main() -> None:
    """Run every op; exit 3 where the backend served nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--forward", action="store_true", help="no backward: some backends leave it to torch")
    arguments = parser.parse_args()
    served, sentences, wrong = 0, [], []
    for op, spec in OPS.items():
        if arguments.backend not in spec.backends:
            sentences.append(f"{op} has no backend {arguments.backend}")
            continue
        for point in points(op):
            for dtype, training in itertools.product(arguments.dtype, (False,) if arguments.forward else (False, True)):
                try:
                    sentence = run(op, point, arguments.backend, getattr(torch, dtype), arguments.device, training)
                except AssertionError as problem:
                    wrong.append(str(problem))
                    continue
                served += sentence is None
                sentences += [sentence] if sentence else []
    print(f"{arguments.backend}: {served} cases ran, {len(sentences)} declined", *dict.fromkeys(sentences), sep="\n  ")
    if wrong:
        print(f"{len(wrong)} cases are wrong", *wrong, sep="\n  ")
        raise SystemExit(1)
    if not served:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
