"""Builds inherit_kernels/_C.abi3.so where it can; the package works without it.

INHERIT_KERNELS_BUILD   auto (default): build what the machine allows, never fail. none: pure Python.
                        cpu, cuda: build exactly this, fail loudly if it cannot be done.
TORCH_CUDA_ARCH_LIST    as in torch, default "8.0;9.0a".  MAX_JOBS  parallel compilations.
DEBUG=1                 assertions and NaN-filled scratch memory, symbols kept.  CXX, CUDA_HOME  as usual.

`python setup.py native` builds the library into the source tree and needs no setuptools, however old or absent it is.

The library uses torch's stable ABI (2.11): one binary serves every later torch, and only the files of csrc/cpu that
adapt tensors see torch headers. torch is never a build requirement; it is found next to the interpreter that installs.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("INHERIT_KERNELS_BUILD", "auto") or "auto"
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
TORCH_TARGET = (2, 11)
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512"
X86_LEVELS = {"generic": "", "avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}
AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir ."


class CannotBuild(Exception):
    """One sentence: what is missing and what to do."""


def find_torch():
    """The folder of torch and its version, without importing it: build isolation hides it from the path."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    for place in [*sys.path, *places, sysconfig.get_path("purelib", vars=base)]:
        version_file = Path(place or ".") / "torch" / "version.py"
        if not version_file.is_file():
            continue
        version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", version_file.read_text())
        if version and tuple(map(int, version.group(2, 3))) >= TORCH_TARGET:
            return version_file.parent, tuple(map(int, version.group(2, 3)))
        raise CannotBuild(f"the torch in {place} is older than 2.11: upgrade torch, then {AGAIN}")
    raise CannotBuild(
        "torch was not found when this package was installed: install torch >= 2.11, then "
        f"{AGAIN} (with --no-build-isolation if your installer hides torch)"
    )


def find_compiler():
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        try:
            command = shlex.split(name)
        except ValueError as problem:
            raise CannotBuild(f"CXX is {name!r}, which is no command ({problem}): set it to a C++ compiler") from None
        if command and shutil.which(command[0]):
            return command
    looked = wanted or "g++, clang++, c++"
    raise CannotBuild(f"no C++ compiler was found (looked for {looked}): install one, or set CXX, then {AGAIN}")


def find_nvcc():
    """nvcc and the root of its toolkit. nvcc itself is asked: the one on PATH may be a wrapper somewhere else."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvccs = [shutil.which("nvcc", path=f"{home}/bin") for home in homes if home] + [shutil.which("nvcc")]
    nvcc = next(filter(None, nvccs), None)
    if nvcc is None:
        raise CannotBuild("no nvcc was found: install the CUDA toolkit, or set CUDA_HOME, and install again")
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry.stdout + dry.stderr, re.MULTILINE)
    root = Path(top.group(1).strip() if top else Path(nvcc).resolve().parents[1]).resolve()
    libraries = [root / "lib64", root / "lib", root / "targets" / "x86_64-linux" / "lib"]
    library = next((folder for folder in libraries if (folder / "libcudart_static.a").is_file()), None)
    if library is None:
        raise CannotBuild(f"the CUDA toolkit in {root} has no libcudart_static.a: install its development package")
    return nvcc, library


def cuda_architectures():
    """Flags of nvcc for the architectures asked for, and their names."""
    flags, names = [], []
    for item in re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "") or "8.0;9.0a"):
        number, _, ptx = item.partition("+")
        if not re.fullmatch(r"\d+\.\d[a-z]?", number) or ptx not in ("", "PTX"):
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST has '{item}', expected entries such as 8.0, 9.0a or 9.0+PTX")
        number = number.replace(".", "")
        codes = [f"sm_{number}", *([f"compute_{number}"] if ptx else [])]
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
        names.append(f"sm_{number}" + ("+ptx" if ptx else ""))
    return flags, ",".join(names)


class Plan:
    """Every command of one build: (object, source, command) and the link line."""

    def __init__(self, folder, cuda):
        torch, version = find_torch()
        compiler = find_compiler()
        if sys.platform != "linux":
            raise CannotBuild(f"the native library is built on Linux only, this is {sys.platform}")
        self.folder, self.steps = folder, []
        csrc = ROOT / "csrc"
        # -ffp-contract: a multiply-add is one rounding everywhere, so that a row's bits do not depend on its tile.
        common = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra", f"-I{csrc / 'include'}"]
        common += ["-O2", "-g", "-DINHERIT_KERNELS_POISON"] if DEBUG else ["-O3", "-g0", "-DNDEBUG"]
        x86 = platform.machine() in ("x86_64", "AMD64")
        defines = ["-DINHERIT_KERNELS_X86"] if x86 else []
        kernels = csrc / "cpu" / "microkernels.cpp"
        for level, flags in (X86_LEVELS if x86 else {"generic": ""}).items():
            flags = ["-std=c++17", f"-DINHERIT_KERNELS_ISA={level}", *flags.split()]
            self._add(f"microkernels_{level}.o", kernels, [*compiler, *common, *flags])
        # torch's headers choose the standard: 2.11 is C++17, later ones C++20.
        headers = ["-std=c++17" if version < (2, 12) else "-std=c++20", "-isystem", f"{torch / 'include'}"]
        headers.append("-DTORCH_TARGET_VERSION=0x020b000000000000")
        link = ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu"] + ([] if DEBUG else ["-Wl,-s"])
        if cuda:
            nvcc, library = find_nvcc()
            architectures, names = cuda_architectures()
            host = ["-ccbin", compiler[0]] if os.environ.get("CXX") else []
            flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{csrc / 'include'}"]
            flags.append(f'-DINHERIT_KERNELS_CUDA_ARCHITECTURES="{names}"')
            for source in sorted((csrc / "cuda").glob("*.cu")):
                self._add(f"{source.stem}.cu.o", source, [nvcc, *host, *flags, *architectures])
            link += [f"-L{library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
            defines.append("-DINHERIT_KERNELS_CUDA")
            for source in sorted((csrc / "cuda").glob("*.cpp")):
                self._add(f"cuda_{source.stem}.o", source, [*compiler, *common, *headers, *defines])
        for source in sorted([*csrc.glob("*.cpp"), *(csrc / "cpu").glob("*.cpp")]):
            if source != kernels:
                self._add(f"{source.stem}.o", source, [*compiler, *common, *headers, *defines])
        self.library = folder / "_C.abi3.so"
        self.link = [*compiler, *[str(step[0]) for step in self.steps], *link, "-o", str(self.library)]

    def _add(self, name, source, command):
        target = self.folder / name
        depfile = ["-MMD", "-MF", f"{target}.d"]
        self.steps.append((target, source, [*command, *depfile, "-c", str(source), "-o", str(target)]))

    def run(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = parallel_jobs()
        ninja = shutil.which("ninja")
        if ninja:  # recompiles what changed
            (self.folder / "build.ninja").write_text(self._ninja())
            call([ninja, "-C", str(self.folder), "-j", str(jobs)])
        else:
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(call, [command for _, _, command in self.steps]))
            call(self.link)

    def _ninja(self):
        def build(target, rule, inputs, command):
            paths = [re.sub(r"([$ :])", r"$\1", str(path)) for path in (target, *inputs)]
            return (
                f"build {paths[0]}: {rule} {' '.join(paths[1:])}\n  line = {shlex.join(command).replace('$', '$$')}\n"
            )

        rules = "rule compile\n  command = $line\n  depfile = $out.d\n  deps = gcc\nrule link\n  command = $line\n"
        steps = [build(target, "compile", [source], command) for target, source, command in self.steps]
        return "".join([rules, *steps, build(self.library, "link", [step[0] for step in self.steps], self.link)])


def parallel_jobs():
    wanted = os.environ.get("MAX_JOBS", "")
    if not wanted:
        return os.cpu_count() or 1
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}", wanted):
        raise CannotBuild(f"MAX_JOBS is {wanted!r}, expected a number of compilations from 1 on")
    return int(wanted)


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def call(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CannotBuild(f"compiling failed, the end of the output: {done.stdout.strip()[-2000:]}")


def build_native(target):
    """Build the library `target`; what was not built, and why, goes into _build.json beside it."""
    if MODE not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"INHERIT_KERNELS_BUILD is '{MODE}', expected auto, none, cpu or cuda")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a library left from an earlier build must not enter a pure wheel
    notes = {}
    if MODE == "none":
        notes["error"] = f"INHERIT_KERNELS_BUILD=none was set when this package was installed: unset it, then {AGAIN}"
        notes["deliberate"] = True
    for kind in {"auto": ("cuda", "cpu"), "none": ()}.get(MODE, (MODE,)):
        try:
            plan = Plan(ROOT / "build" / ("native-debug" if DEBUG else "native"), kind == "cuda")
            plan.run()
            shutil.copyfile(plan.library, target)
            # What is loaded later is this file and no other, and built for these operators.
            notes |= {"error": None, "sha256": sha256(target), "interface": sha256(ROOT / "csrc" / "registration.cpp")}
            break
        except (CannotBuild, OSError) as problem:
            if MODE != "auto":
                raise SystemExit(f"INHERIT_KERNELS_BUILD={MODE}: {problem}") from None
            notes["error" if kind == "cpu" else "cuda_error"] = str(problem)
    (target.parent / "_build.json").write_text(json.dumps(notes, indent=1) + "\n")
    print(f"inherit_kernels: {notes['error'] or 'native library built'}", file=sys.stderr)


def version():
    """That of the package; with "+pure.python" where an auto build is known to find no torch or no compiler.

    pip shows nothing of a build that succeeds but the version, in its last line and in `pip list`.
    """
    plain = re.search(r'^__version__ = "(.+)"', (ROOT / "inherit_kernels" / "version.py").read_text(), re.M).group(1)
    try:
        if MODE == "auto":
            find_torch(), find_compiler()
    except CannotBuild:
        return f"{plain}+pure.python"
    return plain


if sys.argv[1:] == ["native"]:
    build_native(ROOT / "inherit_kernels" / "_C.abi3.so")
    sys.exit()

from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402


class BuildNative(build_ext):
    """build_ext with our own commands."""

    def run(self):
        """As setuptools' own, but without its C compiler, for which it would read CXX and fail."""
        inplace, self.inplace = self.inplace, 0
        for ext in self.extensions:
            self.build_extension(ext)
        self.inplace = inplace
        if inplace:
            self.copy_extensions_to_source()

    def build_extension(self, ext):
        build_native(Path(self.get_ext_fullpath(ext.name)))

    def copy_extensions_to_source(self):
        """In place: the library if there is one, and the note."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, built = map(Path, self._get_inplace_equivalent(build_py, ext))
            for source, target in [(built, inplace), (built.parent / "_build.json", inplace.parent / "_build.json")]:
                target.unlink(missing_ok=True)
                if source.exists():
                    shutil.copyfile(source, target)


class TaggedWheel(bdist_wheel):
    """One wheel per platform for every Python >= 3.10 with the library, one for all platforms without."""

    def get_tag(self):
        platform_tag = super().get_tag()[2]
        self.root_is_pure = not any(Path(self.bdist_dir).rglob("_C.abi3.so"))
        return ("py3", "none", "any") if self.root_is_pure else ("cp310", "abi3", platform_tag)


setup(
    version=version(),
    packages=find_packages(include=["inherit_kernels*"]) + find_packages("python"),
    package_dir={"inhernet": "python/inhernet"},
    ext_modules=[Extension("inherit_kernels._C", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": TaggedWheel},
)
