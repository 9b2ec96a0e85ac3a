"""Compiles recorded Triton launches for a GPU that need not be there, and reads what they would use of it.

`triton.compile` and the `cuobjdump` in Triton's package work on a machine without a GPU; a configuration takes about a
second.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inherit_kernels.common.triton_launch import Launch, recording
from inherit_kernels.registry import OPS
from inherit_kernels.testing.cases import Case, arguments_of, make_inputs
from inherit_kernels.testing.machine_code import undefined_reads

#: Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses."""

    kernel: str
    arch: int
    registers: int  # a thread
    stack: int  # bytes a thread; above 0 registers were spilled
    shared: int  # bytes a block
    wgmma: int  # instructions in the PTX, as all that follow
    mma: int
    loads16: int  # 16-byte loads and asynchronous copies
    loads: int  # all of them
    serialised: str  # the codes of ptxas's warnings that it makes each wgmma wait for the one before, or ""
    undefined: (
        str  # instructions with a descriptor or address that nothing computes (`machine_code`), of wgmma kernels, or ""
    )


def compiled(launch: Launch, arch: int) -> Any:
    """Triton's own result for a launch, as at its first call on an aligned call, for compute capability arch/10.

    Raises:
        RuntimeError: the kernel does not compile for the architecture; the message is Triton's.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    # What a call does, by the just-in-time compiler's own functions: the result lies in its cache, where a call finds it.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialised, rest = bind(*launch.args, **launch.keywords)
    options, *described = kernel._pack_args(backend, launch.keywords, bound, specialised, rest)
    return triton.compile(ASTSource(kernel, *described), target=target, options=options.__dict__)


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile a launch (`compiled`) and read what it would use.

    Raises:
        RuntimeError: the kernel does not compile for the architecture; the message is Triton's.
    """
    result = compiled(launch, arch)
    ptx, cubin = result.asm["ptx"], result.asm["cubin"]
    registers, stack = _usage(cubin)
    has_wgmma = "wgmma.mma_async" in ptx
    return Resources(
        kernel=launch.kernel.__name__,
        arch=arch,
        registers=registers,
        stack=stack,
        shared=result.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        loads16=len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64|cp\.async\.cg", ptx)),
        loads=len(re.findall(r"\bld\.global|cp\.async\.c[ag]", ptx)),
        serialised=_serialised(ptx, arch) if has_wgmma else "",
        undefined="; ".join(undefined_reads(_cuobjdump(cubin, "-sass"))) if has_wgmma else "",  # 0.7 s
    )


def _serialised(ptx: str, arch: int) -> str:
    """What ptxas says of the wgmma instructions: C7510 to C7519, a reason each; the just-in-time compiler drops it."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [_tool("ptxas"), f"-arch=sm_{arch}a", "-o", "/dev/null", file.name]
        found = subprocess.run(command, capture_output=True, text=True)
    return " ".join(sorted(set(re.findall(r"C751\d", found.stdout + found.stderr))))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread."""
    text = _cuobjdump(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump reported no resources: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _tool(name: str) -> str:
    """One of the programs in Triton's package."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def record(
    op: str,
    case: Case,
    dtype: torch.dtype,
    training: bool = False,
    layout: str = "contiguous",
    backend_name: str = "triton",
) -> list[Launch]:
    """The launches of a forward, or of a forward and a backward with every gradient, on tensors without memory."""
    spec = OPS[op]
    inputs = make_inputs(op, case, dtype, device="meta", layout=layout)
    tensors, options = arguments_of(op, inputs, case)
    backend = spec.backends[backend_name]
    with recording() as launches:
        if not training:
            backend.forward(*tensors, *options)
            return launches
        y, t = backend.forward_saving(*tensors, *options)
        needs = [tensor is not None for tensor in tensors[:-1]]
        backend.backward(torch.empty_like(y), t, *tensors[:-1], *options[:-1], None, needs)
    return launches
