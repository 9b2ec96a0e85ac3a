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

#: Bytes of shared memory that one block may use.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl")
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}


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


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile a launch as Triton would at its first call on an aligned call, for compute capability arch/10.

    Raises:
        RuntimeError: the kernel does not compile for the architecture; the message is Triton's.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parameters = launch.kernel.params
    values = dict(zip([parameter.name for parameter in parameters], launch.args, strict=False))
    options = {name: launch.keywords[name] for name in _OPTIONS if name in launch.keywords}
    values |= {name: value for name, value in launch.keywords.items() if name not in options}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(parameters):
        kind, constant, attribute = _specialise(values[parameter.name], parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = constant
        attributes[(index,)] = (
            [["tt.divisibility", 16]] if attribute else []
        )  # [] too: part of the key in Triton's cache
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, stack = _usage(compiled.asm["cubin"])
    return Resources(
        kernel=launch.kernel.__name__,
        arch=arch,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        loads16=len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64|cp\.async\.cg", ptx)),
        loads=len(re.findall(r"\bld\.global|cp\.async\.c[ag]", ptx)),
    )


def _specialise(value: Any, parameter: Any) -> tuple[str, Any, bool]:
    """Type, constant and divisibility by 16 that the just-in-time compiler gives an argument."""
    if parameter.is_constexpr or value is None:
        return "constexpr", value, False
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}", None, True
    if isinstance(value, bool):
        return "i1", None, False
    if isinstance(value, int):
        if value == 1 and not parameter.do_not_specialize:
            return "constexpr", 1, False
        wide = "i32" if -(2**31) <= value < 2**31 else "i64"
        return wide, None, value % 16 == 0 and not parameter.do_not_specialize
    return "fp32", None, False


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump reported no resources: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


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
