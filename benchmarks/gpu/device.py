"""Every CUDA call of the house, and the same methods on a CPU, where the rest is rehearsed.

A figure is the time between two events around the replay of a CUDA graph. Reading a large buffer first does two things: the
GPU is busy while the CPU submits the replay, so that no launch is timed, and the L2 cache holds nothing of the case, nor
lines that must be written back.
"""

from __future__ import annotations

import gc
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch

Call = Callable[[], object]
Pending = Callable[[], float]  # microseconds, once the device was synchronized
EVICTION = 4  # times the L2 cache, what is read to empty it
GEMM = 8192  # the product that measures the matrix rate; float32 a half of it
BATCHES = 5


class Cuda:
    """One CUDA device."""

    rehearsal = False
    rounds = 15
    compiler: str | None = None  # torch.compile's own

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        torch.backends.cudnn.benchmark = True  # the peers' convolutions as fast as cuDNN has them
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in the products it is by torch's default
        properties: Any = torch.cuda.get_device_properties(self.device)
        self.l2 = int(getattr(properties, "L2_cache_size", 0)) or 64 << 20
        self.memory = int(properties.total_memory)
        self.processors = int(properties.multi_processor_count)
        self._evicting = torch.ones(EVICTION * self.l2 // 4, device=self.device)
        self._sum = torch.empty((), device=self.device)
        self._pool: Any = None

    def machine(self) -> dict[str, str]:
        """What stands in every row."""
        seen = _nvidia_smi("driver_version", "clocks.max.sm", "clocks.max.mem")
        driver, sm, memory = seen.split(", ") if seen.count(", ") == 2 else ("unknown", "", "")
        return {
            "device": torch.cuda.get_device_name(self.device).lower().replace(" ", "-"),
            "gpu": torch.cuda.get_device_name(self.device),
            "driver": driver,
            "cuda": str(torch.version.cuda),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "max_clocks": f"{sm}/{memory}",
        }

    def clocks(self) -> str:
        """MHz of the multiprocessors and of the memory, degrees, watts: as they are now."""
        return _nvidia_smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw").replace(", ", "/")

    def begin(self) -> None:
        """A new case: nothing of the one before stays in memory."""
        self._pool = None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, calls: Sequence[Call]) -> Call:
        """One CUDA graph of all calls in a row; returns its replay. Graphs of one case share their memory."""
        current = torch.cuda.current_stream()
        warm = torch.cuda.Stream()
        warm.wait_stream(current)
        with torch.cuda.stream(warm):  # handles, workspaces and compiled kernels are made outside the capture
            for call in (*calls[:2], *calls):
                call()
        current.wait_stream(warm)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                for call in calls:
                    call()
        except BaseException:  # a capture that failed leaves its own stream as the current one, and its pool in use
            torch.cuda.set_stream(current)
            self._pool = torch.cuda.graph_pool_handle()
            raise
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def evict(self) -> None:
        """Read a buffer that fills L2 several times."""
        torch.sum(self._evicting, dim=0, out=self._sum)

    def sample(self, run: Call) -> Pending:
        """Enqueue `run` between two events; call `evict()` before, `synchronize()` after."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end) * 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak(self, run: Call) -> int | None:
        """The most bytes that one call holds beyond what was allocated before it, its results included."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def broken(self) -> bool:
        """Whether an error of a kernel has ended this process's use of the device."""
        try:
            torch.cuda.synchronize()
            return int(torch.ones(2, device=self.device).sum()) != 2
        except RuntimeError:
            return True

    def copy_rate(self) -> float:
        """Bytes a second, read and written, of a copy of a gigabyte."""
        source = torch.randn(1 << 28, device=self.device)  # what zeros or ones move costs less power
        target = torch.empty_like(source)
        seconds = self._fastest(lambda: target.copy_(source), repeats=10)
        return 2 * source.nbytes / seconds

    def product_rate(self, dtype: torch.dtype) -> float:
        """FLOP a second of a large product on random data."""
        n = GEMM // 2 if dtype == torch.float32 else GEMM
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * n**3 / self._fastest(lambda: torch.mm(a, b, out=out), repeats=5)

    def _fastest(self, run: Call, repeats: int) -> float:
        """Seconds a call, of the fastest of several batches."""
        for _ in range(3):
            run()
        pending = [self.sample(lambda: [run() for _ in range(repeats)]) for _ in range(BATCHES)]
        self.synchronize()
        return min(microseconds() for microseconds in pending) / repeats / 1e6


class Rehearsal:
    """The same on a CPU: calls in a row in place of a graph, elapsed time in place of events. Its figures mean nothing."""

    rehearsal = True
    rounds = 2
    compiler: str | None = "eager"

    def __init__(self) -> None:
        torch.set_num_threads(1)  # on a busy machine, small calls on several threads wait for each other
        self.device = torch.device("cpu")
        self.l2, self.memory, self.processors = 1 << 20, 1 << 32, 1

    def machine(self) -> dict[str, str]:
        name = platform.processor() or platform.machine()
        versions = {"torch": torch.__version__, "triton": _version("triton")}
        return {"device": "rehearsal", "gpu": f"none: {name}", "driver": "", "cuda": "", **versions, "max_clocks": ""}

    def clocks(self) -> str:
        return ""

    def begin(self) -> None:
        gc.collect()

    def capture(self, calls: Sequence[Call]) -> Call:
        def replay() -> None:
            for call in calls:
                call()

        replay()
        return replay

    def evict(self) -> None:
        pass

    def sample(self, run: Call) -> Pending:
        start = time.perf_counter()
        run()
        microseconds = (time.perf_counter() - start) * 1e6
        return lambda: microseconds

    def synchronize(self) -> None:
        pass

    def peak(self, run: Call) -> int | None:
        run()
        return None

    def broken(self) -> bool:
        return False

    def copy_rate(self) -> float:
        source = torch.ones(1 << 20)
        target = torch.empty_like(source)
        return 2 * source.nbytes / (self.sample(lambda: target.copy_(source))() / 1e6)

    def product_rate(self, dtype: torch.dtype) -> float:
        a = torch.randn(256, 256, dtype=dtype)
        return 2 * 256**3 / (self.sample(lambda: a @ a)() / 1e6)


Device = Cuda | Rehearsal


def open_device(rehearse: bool) -> Device:
    """The current CUDA device, or the CPU to rehearse on.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if rehearse:
        return Rehearsal()
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is usable here; --rehearse runs the same on the CPU, with tiny sizes")
    return Cuda()


def _nvidia_smi(*fields: str) -> str:
    """The first device's fields, or nothing where the tool is missing. It only reads."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
