"""What the Python in front of a native overload costs: `python -m benchmarks.overhead`.

The public function against the same overload called directly with the same arguments, interleaved in one run, medians.
The bound is 1.5 µs (DESIGN, the contract of an op).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import inherit_kernels
from inherit_kernels import _native
from inherit_kernels.testing.timing import time_interleaved

BOUND = 1.5


def calls() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """name -> (public function, native overload), on the smallest useful sizes."""
    x, down, up, bias = torch.randn(1, 16), torch.randn(4, 16), torch.randn(16, 4), torch.randn(16)
    ups, gate, gate_bias, biases = torch.randn(3, 16, 4), torch.randn(3, 4), torch.randn(3), torch.randn(3, 16)
    plain = torch.ops.inherit_kernels_C.lowrank_linear.default
    gated = torch.ops.inherit_kernels_C.gated_lowrank_linear.default
    return {
        "lowrank_linear": (
            lambda: inherit_kernels.lowrank_linear(x, down, up, bias, None, activation="relu"),
            lambda: plain(x, down, up, bias, None, 1),
        ),
        "gated_lowrank_linear": (
            lambda: inherit_kernels.gated_lowrank_linear(
                x, down, ups, gate, gate_bias, biases, None, activation="relu"
            ),
            lambda: gated(x, down, ups, gate, gate_bias, biases, None, 1),
        ),
    }


def main() -> None:
    """Measure and print."""
    if not _native.load():
        raise SystemExit(_native.error)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {_native.isa()}, one thread, no gradient")
    with inherit_kernels.use_backend("native"), torch.no_grad():
        for name, (public, native) in calls().items():
            timing = time_interleaved({"public": public, "native": native}, seconds=2.0, rounds=101)
            extra = timing["public"].median - timing["native"].median
            verdict = "within" if extra <= BOUND else "above"
            print(
                f"{name:<22} public {timing['public'].median:.2f} µs, native {timing['native'].median:.2f} µs, "
                f"overhead {extra:.2f} µs ({verdict} {BOUND} µs)"
            )


if __name__ == "__main__":
    main()
