"""No call ends the process or runs without end, whatever it is given: see `hostile_calls.py`.

Seen failing: sizes that overflow on their way to an allocation (heap corruption), a stride of zero in a raw operator
(SIGFPE), gradients asked of a tensor that is not there, sparse tensors refused without a name, a t of another shape under
Triton's interpreter (heap corruption). `--fuzz 5000` makes more calls, `--fuzz-random` others.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inherit_kernels
from inherit_kernels import _native

LIMIT = 300  # seconds for a process; 1,000 calls take about 10


def test_hostile_calls(request):
    count = request.config.getoption("--fuzz")
    seed = random.randrange(10**6) if request.config.getoption("--fuzz-random") else 1
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        str(Path(__file__).with_name("hostile_calls.py")),
        str(seed),
        str(count),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT + count / 10)
    end = "\n".join([*done.stdout.splitlines()[-4:], *done.stderr.splitlines()[-25:]])
    assert done.returncode == 0 and "done" in done.stdout, f"seed {seed}, exit {done.returncode}:\n{end}"


HUGE = [("stride", 2**63 - 1), ("stride", 2**31), ("padding", 2**61), ("padding", (0, 2**63)), ("dilation", 2**62)]


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("name, value", HUGE)
def test_geometry_beyond_arithmetic_is_named(name, value, backend):
    x, down, up = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(5, 4)
    with inherit_kernels.use_backend(backend), pytest.raises(ValueError, match=f"^{name}: expected values of at most"):
        inherit_kernels.lowrank_conv2d(x, down, up, **{name: value})
    with pytest.raises(ValueError, match="^padding: .* positions an image"):
        inherit_kernels.lowrank_conv2d(x, down, up, padding=2**30)


def test_large_geometry_that_fits_is_right():
    """A window that lies far outside, and steps far apart."""
    x, down, up = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(5, 4)
    middle = inherit_kernels.lowrank_conv2d(x, down[:, :, 1:2, 1:2], up)
    far = inherit_kernels.lowrank_conv2d(x, down, up, padding=2**30, dilation=2**30)
    torch.testing.assert_close(far, middle)
    assert inherit_kernels.lowrank_conv2d(x, down, up, stride=2**31 - 1).shape == (1, 5, 1, 1)


@pytest.mark.skipif(not _native.load(), reason="the native library is not built: its border was not tested")
@pytest.mark.parametrize("rank, out", [(2**62, 5), (3, 2**62), (-1, 5), (3, -1), (2**31, 5)])
def test_numbers_of_a_packed_call_are_checked(rank, out):
    panels = inherit_kernels.pack("lowrank_linear", torch.randn(3, 8), torch.randn(5, 3)).panels
    with pytest.raises(RuntimeError, match="rank: expected|out_features: expected"):
        _native.ops.lowrank_linear_packed(torch.randn(2, 8), *panels, rank, out, False, None, 0)
