"""Options and environment of the tests."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=1000, help="random calls of the fuzz test")
    parser.addoption("--fuzz-random", action="store_true", help="other random calls on every run")
    parser.addoption("--gpu-rehearsal", action="store_true", help="the bodies of the GPU tests on the CPU, a few cases")


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") == "1":
        from inherit_kernels.testing.interpreter import repair

        repair()
