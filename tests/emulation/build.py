"""Compiles CUDA sources for the CPU and loads them as a Python module.

    module = load("micro", ("tests/emulation/micro_kernels.cu", "tests/emulation/bind_micro_kernels.cpp"))

The sources are those that nvcc compiles, read as C++ with the host twin of their words; every `.cpp` among them is a
pybind11 binding (binding.h). Only g++ and pybind11 are needed. Results are kept under build/emulation and made again
when a source, a header or a flag has changed. `build(..., sanitize=True)` instruments the kernels with ThreadSanitizer;
`run_sanitized` uses such a module in a process that starts with the sanitizer's library.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FOLDER = ROOT / "build" / "emulation"
RACE_EXIT = 66  # ThreadSanitizer's exit status after a report


def missing() -> str | None:
    """One sentence: why nothing can be emulated here, or None."""
    if shutil.which("g++") is None:
        return "CUDA sources were not executed on the CPU: no g++ was found"
    if importlib.util.find_spec("pybind11") is None:
        return "CUDA sources were not executed on the CPU: pybind11 is not installed"
    return None


@functools.cache
def load(name: str, sources: tuple[str, ...], replace: tuple[str, str] | None = None) -> ModuleType:
    """Build, unless that was done before, and import.

    Args:
        name: of the module; several builds of one name may be loaded side by side.
        sources: paths from the root of the project, `.cu` and binding `.cpp`.
        replace: (path, text) that stands in for one source, or one header of csrc/include, for planted faults.
    """
    return load_path(build(name, sources, replace=replace))


def load_path(path: Path) -> ModuleType:
    """Import a built module. pybind11 knows modules by their full name, so each build gets its own."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}.{path.stem.rpartition('-')[0]}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name: str, sources: tuple[str, ...], sanitize: bool = False, replace: tuple[str, str] | None = None) -> Path:
    """The path of the module; arguments as for `load`, and `sanitize` for ThreadSanitizer."""
    flags = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DINHERIT_KERNELS_EMULATED", f"-DEMULATION_MODULE={name}"]
    flags += [f"-I{ROOT / 'csrc/include'}", f"-I{HERE}"]
    own = [HERE / "scheduler.cpp", HERE / "collectives.cpp"]
    texts = {file: file.read_text() for file in [*own, *(ROOT / source for source in sources)]}
    if replace and ROOT / replace[0] in texts:
        texts[ROOT / replace[0]] = replace[1]
    elif replace:
        header = FOLDER / f"instead-{_digest(replace)}" / Path(replace[0]).relative_to("csrc/include")
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(replace[1])
        flags.insert(0, f"-I{FOLDER / f'instead-{_digest(replace)}'}")
    objects = {file: _object(file, text, [*_flags_of(file, own, sanitize), *flags]) for file, text in texts.items()}
    _run_all([command for target, command in objects.values() if not target.exists()])
    target = FOLDER / f"{name}-{_digest(sorted(str(target) for target, _ in objects.values()))}.so"
    if not target.exists():
        partial = f"{target}.{os.getpid()}"
        link = ["g++", "-shared", *(str(target) for target, _ in objects.values()), "-o", partial]
        _run_all([[*link, "-fsanitize=thread"] if sanitize else link])
        os.replace(partial, target)
    return target


def _object(file: Path, text: str, flags: list[str]) -> tuple[Path, list[str]]:
    """Where the compiled form of a source belongs, and the command that makes it."""
    headers = sorted([*(ROOT / "csrc/include").rglob("*.h"), *HERE.glob("*.h")])
    stem = FOLDER / f"{file.name}-{_digest([sys.version, flags, text, *(header.read_text() for header in headers)])}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    source = stem.with_name(f"{stem.name}{file.suffix}")
    source.write_text(f'#line 1 "{file}"\n{text}')
    target = stem.with_name(f"{stem.name}.o")
    compile_it = ["g++", *flags, f"-I{file.parent}", "-c", str(source), "-o", f"{target}.{os.getpid()}"]
    return target, ["sh", "-c", f"{shlex.join(compile_it)} && mv {target}.{os.getpid()} {target}"]


def _digest(parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _flags_of(file: Path, own: list[Path], sanitize: bool) -> list[str]:
    if file in own:  # never instrumented, and no loop turned into a memcpy that the sanitizer would see
        return ["-O1", "-fno-tree-loop-distribute-patterns"] + (["-DINHERIT_KERNELS_TSAN"] if sanitize else [])
    if file.suffix == ".cu":
        return ["-O1", "-x", "c++"] + (["-fsanitize=thread"] if sanitize else [])
    import pybind11

    return ["-O0", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]


def _run_all(commands: list[list[str]]) -> None:
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"compiling failed: {output[-3000:]}")


def run_sanitized(module: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A Python program, with the built `module` under that name, in a process with ThreadSanitizer.

    `returncode` is RACE_EXIT where it found a race; the report is in `stderr`.
    """
    start = f"from pathlib import Path\nfrom emulation import build\nmodule = build.load_path(Path({str(module)!r}))\n"
    library = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": os.path.realpath(library.stdout.strip()),
        "TSAN_OPTIONS": f"exitcode={RACE_EXIT} report_signal_unsafe=0 history_size=0",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path]),
    }
    command = [sys.executable, "-c", start + code]
    if shutil.which("setarch"):  # the sanitizer of g++ 12 does not know the widest address randomisation
        command = ["setarch", os.uname().machine, "-R", *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


class Array:
    """A copy of a numpy array that ends at a guard page; `read` gives what lies there now, `address` goes to a launcher.

    `np.uint16` arrays stand for bfloat16 and float16 alike.
    """

    def __init__(self, module: ModuleType, shape: tuple[int, ...], dtype: np.dtype | type, aligned: bool = True):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.memory = module.Guarded(size, 16 if aligned else np.dtype(dtype).itemsize)
        self._flat = np.frombuffer(self.memory, np.uint8)[:size].view(dtype).reshape(shape)
        self.address = self.memory.address

    @classmethod
    def of(cls, module: ModuleType, values: np.ndarray, aligned: bool = True) -> Array:
        array = cls(module, values.shape, values.dtype, aligned)
        array._flat[...] = values
        return array

    def read(self) -> np.ndarray:
        return self._flat.copy()


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to `dtype` ("float32", "bfloat16", "float16"); 16-bit types as uint16."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The float64 values that `to_bits` made."""
    if dtype == "float32":
        return bits.astype(np.float64)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
