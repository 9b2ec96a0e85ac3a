"""The device of the GPU tests, or the CPU to rehearse their bodies on (`--gpu-rehearsal`)."""

from __future__ import annotations

import os

import pytest
import torch

REHEARSED = {  # parameter -> the values that a rehearsal runs
    "case": ("ragged", "strided", "empty"),
    "dtype": ("torch.float32",),
    "rows": ("3", "33"),
    "rank": ("7",),
    "heads": ("2",),
    "side": ("7",),
}


@pytest.fixture(scope="session")
def device(request) -> str:
    """The device that the tests run on."""
    if request.config.getoption("--gpu-rehearsal"):
        torch.set_num_threads(1)
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the GPU kernels are not proven here")
    return "cuda"


@pytest.fixture
def cuda(device) -> str:
    """For what a CPU cannot rehearse."""
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(autouse=True)
def a_device_that_lives(device):
    """After an illegal access a process can use the device no more: end it, so that what fails next is not blamed."""
    torch.backends.cudnn.deterministic = True  # what torch computes must repeat too
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # others run beside this one
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(70)  # xdist reports this test as failed and starts another process
            pytest.exit(f"a kernel has ended the use of the device: {error}", returncode=70)


def pytest_collection_modifyitems(config, items):
    """The first case of every test, then the second …: time may end them. A rehearsal runs a few cases in float32."""
    if not config.getoption("--gpu-rehearsal"):
        seen: dict[str, int] = {}
        turns = {}
        for item in items:
            name = item.nodeid.partition("[")[0]
            turns[item] = seen[name] = seen.get(name, 0) + 1
        items.sort(key=turns.__getitem__)
        return

    def kept(item) -> bool:
        values = getattr(getattr(item, "callspec", None), "params", {})
        return all(str(value) in REHEARSED.get(name, (str(value),)) for name, value in values.items())

    items[:] = [item for item in items if kept(item)]
