"""Choosing a kernel's configuration and launching it; the kernels themselves are in `ops/<op>/kernels_triton.py`.

Triton is imported where a kernel first runs, never with the package.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from inherit_kernels.common.tables import read_table
from inherit_kernels.registry import Problem

MAX_RANK = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SERVES = {"cuda": DTYPES}
PROVEN = {"cuda": "interpreted on CPU; compiled for sm_80 and sm_90"}
CONFIGS = Path(__file__).parents[1] / "configs"
REFERENCE_GPU = (
    "nvidia-h200"  # whose measurements serve devices without any: configurations on Hopper, the model everywhere
)
SHIPPED = "triton"  # configs/<op>/triton.json: checked against the limits of sm_80 and sm_90, measured on none

Config = dict[str, int]


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what a kernel would have been started with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    keywords: dict[str, Any]


_recording: ContextVar[list[Launch] | None] = ContextVar("recording", default=None)
_tracing: ContextVar[bool] = ContextVar("tracing", default=False)
_observed: ContextVar[list[tuple[Launch, Any]] | None] = ContextVar("observed", default=None)
_forced: dict[str, Config] = {}  # no ContextVar: a backward on a GPU runs in a thread of autograd's own


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1, read when triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def declines(problem: Problem) -> str | None:
    """One sentence why no Triton kernel can serve the problem, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'inherit-kernels[triton]'"
    kind = problem.device.type
    if kind == "cpu" and not interpreting():
        return "Triton kernels run on NVIDIA GPUs; CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    if kind not in ("cuda", "cpu", "meta"):
        return f"there is no Triton kernel for {kind} tensors"
    if problem.dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {problem.dtype}"
    if problem.sizes.get("R", 0) > MAX_RANK:
        return f"the Triton kernels hold t in registers up to rank {MAX_RANK}, not {problem.sizes['R']}"
    if kind == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(problem.device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 or higher"
    return None


#: The first release of ptxas whose machine code passes `testing/machine_code.py`; triton 3.8 is the first to bring it.
SOUND_PTXAS = (12, 9)


def assembler_fault(problem: Problem) -> str | None:
    """One sentence if Triton's ptxas is one that breaks wgmma products which share their memory, or None.

    ptxas 12.8 takes descriptors of such operands from a register that nothing has written: `testing/machine_code.py`.
    """
    if (
        problem.device.type != "cuda"
        or problem.dtype == torch.float32
        or interpreting()
        or not torch.cuda.is_available()
    ):
        return None
    if torch.cuda.get_device_capability(problem.device)[0] != 9:
        return None
    path, release = _assembler()
    if release >= SOUND_PTXAS:
        return None
    return (
        f"ptxas {'.'.join(map(str, release))} ({path}) computes several products of one kernel wrongly on compute capability "
        "9.0: install triton >= 3.8, or set TRITON_PTXAS_PATH to a ptxas of CUDA 12.9 or later"
    )


def assembler_release() -> tuple[int, ...]:
    """The release of the ptxas that Triton runs for compute capability 9.0, such as (12, 9)."""
    return _assembler()[1]


@cache
def _assembler() -> tuple[str, tuple[int, ...]]:
    """The path and the release of the ptxas that Triton runs for compute capability 9.0."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(90)
    return tool.path, tuple(map(int, tool.version.split(".")[:2]))


def on_plain_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    """A backend's function whose tensors are what their memory says: kernels do not know torch's lazy signs and zeros."""

    @wraps(function)
    def call(*args: Any) -> Any:
        return function(*[_written_out(a) if isinstance(a, Tensor) else a for a in args])

    return call


def _written_out(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **keywords: Any) -> None:
    """Start a Triton kernel; while tracing, put it into the graph; while recording, only note it."""
    recorded, observed = _recording.get(), _observed.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, keywords))
    elif _tracing.get():
        from torch.library import wrap_triton

        wrap_triton(kernel)[grid](*args, **keywords)
    elif args[0].is_cuda and args[0].device.index != torch.cuda.current_device():
        with torch.cuda.device(args[0].device):
            kernel[grid](*args, **keywords)
    elif observed is None:
        kernel[grid](*args, **keywords)
    else:
        with _disable_current_modes():  # the interpreter computes with torch
            observed.append((Launch(kernel, grid, args, keywords), kernel[grid](*args, **keywords)))


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches inside the block in place of running them: for ahead-of-time compilation on meta tensors."""
    launches: list[Launch] = []
    token = _recording.set(launches)
    try:
        yield launches
    finally:
        _recording.reset(token)


@contextmanager
def observing() -> Iterator[list[tuple[Launch, Any]]]:
    """Collects the launches inside the block, each with the compiled kernel, while they run."""
    launches: list[tuple[Launch, Any]] = []
    token = _observed.set(launches)
    try:
        yield launches
    finally:
        _observed.reset(token)


def launching_now() -> bool:
    """Whether launches are watched, traced or forced now, so that none may be taken from memory."""
    return bool(_forced) or _tracing.get() or _recording.get() is not None or _observed.get() is not None


def stream_and_hooks(tensor: Tensor) -> tuple[Any, tuple[Any, Any]]:
    """The current stream of a tensor's device and a profiler's hooks, as Triton gives them to a compiled kernel."""
    if not tensor.is_cuda:
        return None, (None, None)
    runtime = _triton_runtime()
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()), (
        runtime.launch_enter_hook,
        runtime.launch_exit_hook,
    )


@cache
def _triton_runtime() -> Any:
    from triton import knobs

    return knobs.runtime


@contextmanager
def tracing() -> Iterator[None]:
    """Launches inside the block become nodes of the graph being traced."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)


@contextmanager
def forced_configs(configs: dict[str, Config]) -> Iterator[None]:
    """Forces the configuration of each kernel named, for tuning and tests, in all threads."""
    before = dict(_forced)
    _forced.update(configs)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


# --- configurations ----------------------------------------------------------------------------------------------------


def config_for(op: str, kernel: str, dtype: torch.dtype, device: torch.device, sizes: dict[str, Any]) -> Config:
    """The configuration of a kernel, of the nearest bucket of the device's table or of the shipped one.

    A bucket fits where its `bits` (16 or 32) and its `BR` (the rank padded to a power of two) are those of the call;
    among these the nearest has the least sum of |log2| ratios over the sizes that shipped buckets name, then over all of
    its own. Equally near, a measured one wins: a table of which a run measured only a part leaves the rest as it was.

    Args:
        kernel: the kernel's name in the table, such as "forward".
        sizes: the letters that buckets may name, with `BR`. Symbolic sizes count by their hint.
    """
    if kernel in _forced:
        return _forced[kernel]
    hints = tuple((letter, hint(size)) for letter, size in sizes.items())
    return _config(op, kernel, 32 if dtype == torch.float32 else 16, _slug(device), hints)


def hint(size: Any) -> int:
    """A size, or the example behind a symbolic one."""
    return size if isinstance(size, int) else int(size.node.hint)


def padded_rank(rank: int) -> int:
    """The rank rounded up to a power of two, at least 16: the least depth of a tensor-core product."""
    return max(16, 1 << (rank - 1).bit_length())


def padded_heads(heads: int) -> int:
    """The heads rounded up to a power of two."""
    return 1 << (heads - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: "ieee", unless torch's own switch allows TF32."""
    if dtype != torch.float32 or interpreting():
        return "ieee"
    switch = torch.backends.cuda.matmul
    # The older name raises once the newer was set.
    allowed = switch.fp32_precision == "tf32" if hasattr(switch, "fp32_precision") else switch.allow_tf32
    return "tf32" if allowed else "ieee"


@cache
def _slug(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return SHIPPED
    own = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    tabled = any(path.stem == own for path in CONFIGS.glob("*/*.json"))
    return REFERENCE_GPU if not tabled and torch.cuda.get_device_capability(device) == (9, 0) else own


@cache
def kernel_tables(op: str, slug: str) -> dict[str, list[dict[str, Any]]]:
    """kernel -> buckets `{"bits": 16, "BR": 64, "M": 4096, "config": {…}}` from `configs/<op>/<slug>.json`; none, with
    one warning that names the file, where it is damaged."""
    return read_table(CONFIGS / op / f"{slug}.json", "kernels") or {}


@cache
def _config(op: str, kernel: str, bits: int, slug: str, sizes: tuple[tuple[str, int], ...]) -> Config:
    wanted = dict(sizes)

    def fitting(table: str) -> list[dict[str, Any]]:
        return [
            bucket
            for bucket in kernel_tables(op, table).get(kernel, [])
            if bucket["bits"] == bits and bucket.get("BR", wanted["BR"]) == wanted["BR"]
        ]

    shipped = fitting(SHIPPED)
    measured = fitting(slug) if slug != SHIPPED else []
    if not measured:
        _warn_once(op, slug)
    if not shipped and not measured:
        raise LookupError(f"configs/{op}/{SHIPPED}.json has no configuration of {kernel} for {bits} bits, {wanted}")
    coarse = {letter for bucket in shipped for letter in bucket}

    def distance(bucket: dict[str, Any]) -> tuple[float, bool, float]:
        return _distance(bucket, wanted, coarse), bucket in shipped, _distance(bucket, wanted, bucket)

    return min(measured + shipped, key=distance)["config"]


def _distance(bucket: dict[str, Any], sizes: dict[str, int], among: Collection[str]) -> float:
    letters = [letter for letter in bucket if letter in sizes and letter in among and letter != "BR"]
    return sum(abs(math.log2(max(sizes[letter], 1) / max(bucket[letter], 1))) for letter in letters)


@cache
def _warn_once(op: str, slug: str) -> None:
    if slug != SHIPPED:
        warnings.warn(
            f"no Triton configuration of {op} was tuned on {slug}: general ones are used; "
            f"`python -m inherit_kernels.tune {op} --device cuda` measures them",
            stacklevel=2,
        )


def ceil_div(a: Any, b: Any) -> Any:
    """⌈a / b⌉, symbolic where a is."""
    return (a + b - 1) // b


def strides(*tensors: Any) -> Sequence[int]:
    """The strides of all tensors, one after another."""
    return [stride for tensor in tensors for stride in tensor.stride()]
