"""What this machine could do, measured in the same run, and the least time that a case can take on it.

`measure()` compiles `roofline.cpp` at first use (g++, about three seconds) and measures, on as many threads as torch uses:
the product rate of a plain register-blocked loop, a dtype each, and the read and copy rate of working sets the size of L1,
L2, L3 and memory. `limit()` turns the work of a case into the time that no implementation can beat.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

SOURCE = Path(__file__).with_name("roofline.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
MEMORY = 256 << 20  # a working set that no cache holds
MEMORY_IF_LARGER = 4  # times L3, where a server's L3 would hold it


class Level(NamedTuple):
    """A place where data can live: how many bytes it holds, all threads together, and how fast it moves them."""

    name: str
    capacity: float
    read: float  # bytes a second
    copy: float  # bytes a second, read and written counted

    @property
    def rate(self) -> float:
        """The faster of the two: where caches load and store at once a copy moves more bytes than a read."""
        return max(self.read, self.copy)


@dataclass(frozen=True)
class Roofline:
    """The measured machine."""

    peaks: dict[str, float]  # dtype -> FLOP/s
    levels: tuple[Level, ...]  # fastest first; the last holds everything
    lanes: int  # float32 values in one vector
    threads: int

    def best(self, other: Roofline) -> Roofline:
        """The better of two measurements, figure by figure: a slow moment must not make a limit that can be beaten."""
        peaks = {dtype: max(peak, other.peaks[dtype]) for dtype, peak in self.peaks.items()}
        levels = [
            Level(a.name, a.capacity, max(a.read, b.read), max(a.copy, b.copy))
            for a, b in zip(self.levels, other.levels, strict=True)
        ]
        return Roofline(peaks, tuple(levels), self.lanes, self.threads)

    def __str__(self) -> str:
        peaks = ", ".join(f"{dtype} {peak / 1e9:,.0f} GFLOP/s" for dtype, peak in self.peaks.items())
        levels = ", ".join(f"{x.name} {x.read / 1e9:,.0f}/{x.copy / 1e9:,.0f}" for x in self.levels)
        return f"{self.threads} thread{'s' * (self.threads > 1)}: {peaks}; read/copy GB/s {levels}"


@dataclass(frozen=True)
class Work:
    """What one call must do at least: products as (m, n, k, count), and the bytes of every distinct tensor once."""

    products: tuple[tuple[int, int, int, int], ...]
    bytes: int

    @property
    def flops(self) -> int:
        return sum(2 * m * n * k * count for m, n, k, count in self.products)

    def padded_flops(self, lanes: int) -> int:
        """FLOPs with idle lanes counted: some dimension of a product runs along the vectors, the best of the three."""

        def fill(size: int) -> int:
            return -(-size // lanes) * lanes

        return sum(
            2 * count * min(fill(m) * n * k, m * fill(n) * k, m * n * fill(k)) for m, n, k, count in self.products
        )


class Limit(NamedTuple):
    """The least time of a case in µs, and what sets it: "compute" or the level that most bytes come from."""

    microseconds: float
    bound: str


def limit(work: Work, dtype: str, machine: Roofline) -> Limit:
    """The larger of padded FLOPs over the peak, and bytes over the levels: each serves as much as it holds."""
    compute = work.padded_flops(machine.lanes) / machine.peaks[dtype]
    memory, left, slowest = 0.0, float(work.bytes), machine.levels[0].name
    below = 0.0
    for level in machine.levels:
        # Inclusive caches: what a level adds is what it holds beyond the level before it.
        served = min(left, max(level.capacity - below, 0.0))
        if served > 0:
            memory += served / level.rate
            slowest = level.name
        left -= served
        below = max(below, level.capacity)
    return Limit(1e6 * max(compute, memory), "compute" if compute >= memory else slowest)


def gauge(work: Work, dtype: str, machine: Roofline, clock: str) -> Callable[[], float]:
    """A call that measures, for 2 ms, what limits a case, and returns the case's limit in µs as of this moment.

    A processor of a shared machine can lose half its speed for seconds: beside the best figures of a run that looks like a
    slow kernel.
    """
    best = limit(work, dtype, machine)
    library, threads, processor_time = _load(), machine.threads, int(clock == "cpu")
    seconds = ctypes.c_double(0.002)
    if best.bound == "compute":
        rate = best.microseconds * machine.peaks[dtype]
        product = (
            library.roofline_bfloat16 if machine.peaks[dtype] > machine.peaks["float32"] else library.roofline_float32
        )
        product.restype = ctypes.c_double
        return lambda: rate / product(threads, seconds, processor_time)
    if best.bound == machine.levels[-1].name:  # too large to be laid out every time
        return lambda: best.microseconds
    read = library.roofline_read
    read.restype = ctypes.c_double
    size = ctypes.c_size_t(max(work.bytes, 4096 * threads))
    return lambda: 1e6 * work.bytes / float(read(size, threads, seconds, processor_time))


def measure(clock: str = "wall", seconds: float = 0.25) -> Roofline:
    """Measure this machine on torch's number of threads.

    Args:
        clock: "wall" or "cpu", as in `time_interleaved`.
        seconds: time of each probe; there are ten.

    Raises:
        RuntimeError: no compiler, or it failed; the message says what to do.
    """
    library = _load()
    threads, processor_time = torch.get_num_threads(), int(clock == "cpu")

    def probe(name: str, *size: Any) -> float:
        function = getattr(library, f"roofline_{name}")
        function.restype = ctypes.c_double
        return float(function(*size, threads, ctypes.c_double(seconds), processor_time))

    float32, bfloat16 = probe("float32"), probe("bfloat16")
    levels = []
    for name, capacity in capacities(threads).items():
        # Half of a cache, so that neither its other users nor its associativity push the working set out.
        size = ctypes.c_size_t(int(capacity / 2) if capacity < float("inf") else _memory_sized(threads))
        levels.append(Level(name, capacity, probe("read", size), probe("copy", size)))
    # Without instructions for it, bfloat16 is computed in float32.
    peaks = {"float32": float32, "bfloat16": max(bfloat16, float32)}
    return Roofline(peaks, tuple(levels), int(library.roofline_lanes()), threads)


def capacities(threads: int) -> dict[str, float]:
    """Bytes of each data cache over the threads in use, by level; memory holds everything."""
    found: dict[str, float] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size, sharers = (
            (index / n).read_text().strip() for n in ("level", "type", "size", "shared_cpu_list")
        )
        if kind != "Instruction":
            instances = -(-threads // _count(sharers))
            found[f"L{level}"] = float(int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)) * instances
    # Where the system does not tell: too large is safe, a limit is then too good rather than beaten.
    return (found or {"L1": 64e3 * threads, "L2": 4e6 * threads, "L3": 64e6}) | {"memory": float("inf")}


def _count(sharers: str) -> int:
    """How many processors a list such as `0-3,8` names."""
    ends = [part.split("-") for part in sharers.split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


def _memory_sized(threads: int) -> int:
    largest = max(size for size in capacities(threads).values() if size < float("inf"))
    return max(MEMORY, int(MEMORY_IF_LARGER * largest))


def cpu_name() -> str:
    """The processor's model name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _load() -> ctypes.CDLL:
    """The compiled probes, from the cache folder of the user."""
    key = hashlib.sha256(SOURCE.read_bytes() + cpu_name().encode() + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inherit_kernels"
    path = folder / f"roofline-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        compiler = os.environ.get("CXX", "g++")
        try:
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(aside)], check=True, capture_output=True, text=True
            )
        except FileNotFoundError:
            raise RuntimeError(
                f"the roofline needs a C++ compiler and {compiler} is not here: install g++ or set CXX"
            ) from None
        except subprocess.CalledProcessError as failure:
            raise RuntimeError(f"{compiler} could not compile {SOURCE}: {failure.stderr.strip()}") from None
        os.replace(aside, path)
    return ctypes.CDLL(str(path))
