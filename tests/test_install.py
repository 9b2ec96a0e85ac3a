"""Installing never fails for lack of something, and says what it left out.

Each test builds a wheel from a copy of the sources, unpacks it and imports it from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import inherit_kernels
from inherit_kernels import _native

ROOT = Path(__file__).parent.parent
PACKAGE = Path(inherit_kernels.__file__).parent  # what is tested: this tree, or an installed wheel
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "inherit_kernels", "python"]
HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)
NEEDS_COMPILER = pytest.mark.skipif(not HAS_COMPILER, reason="no wheel with the library was built: no C++ compiler")


def copy_sources(folder):
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def sources(tmp_path):
    return copy_sources(tmp_path / "sources")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder in which the library was built, and the wheel: one compilation for the tests that look at it."""
    folder = copy_sources(tmp_path_factory.mktemp("built") / "sources")
    done, wheel = build(folder, INHERIT_KERNELS_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    return folder, Path(shutil.copy(wheel, folder))


def build(sources, python=sys.executable, **environment):
    """(process, wheel or None)"""
    clean = {k: v for k, v in os.environ.items() if k not in ("INHERIT_KERNELS_BUILD", "CXX", "PYTHONPATH", "DEBUG")}
    out = sources.parent / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    command = [str(python), "setup.py", "-q", "bdist_wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=sources, env=clean | environment, capture_output=True, text=True)
    wheels = list(out.glob("*.whl")) if out.is_dir() else []
    return done, wheels[0] if wheels else None


def status_of(wheel, tmp_path, **environment):
    """What `status()` prints for the unpacked wheel, after one call of an op in a clean process."""
    place = tmp_path / "unpacked"
    shutil.rmtree(place, ignore_errors=True)
    zipfile.ZipFile(wheel).extractall(place)
    script = """
import torch, inherit_kernels
x, down, up = torch.randn(3, 8), torch.randn(2, 8), torch.randn(5, 2)
torch.testing.assert_close(inherit_kernels.lowrank_linear(x, down, up), x @ down.T @ up.T)
print(inherit_kernels.__file__)
print(inherit_kernels.status())
"""
    environment = os.environ | {"PYTHONPATH": str(place)} | environment
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(place) in done.stdout
    return done.stdout


@pytest.mark.slow  # a minute; `make test` has installed the library for itself
@NEEDS_COMPILER
def test_with_a_compiler_the_wheel_carries_the_library_for_every_python(built, tmp_path):
    sources, wheel = built
    assert re.search(r"-cp310-abi3-linux_\w+\.whl$", wheel.name), wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "inherit_kernels/_C.abi3.so" in names
    assert {name.split("/")[0] for name in names} == {"inherit_kernels", "inhernet", names[-1].split("/")[0]}
    assert "native library   loaded, instruction set" in status_of(wheel, tmp_path)
    # the same folder again, now without the library: nothing of the first build may stay
    done, wheel = build(sources, INHERIT_KERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "inherit_kernels/_C.abi3.so" not in zipfile.ZipFile(wheel).namelist()
    assert "INHERIT_KERNELS_BUILD=none" in status_of(wheel, tmp_path)


def test_without_a_compiler_the_wheel_is_pure_and_says_so(sources, tmp_path):
    done, wheel = build(sources, CXX="/nowhere/g++", CUDA_HOME="/nowhere")
    assert done.returncode == 0, done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    said = status_of(wheel, tmp_path)
    assert "no C++ compiler was found (looked for /nowhere/g++): install one" in said


def test_a_compiler_that_fails_leaves_a_pure_wheel_with_its_last_words(sources, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho broken on purpose\nexit 1\n")
    compiler.chmod(0o755)
    done, wheel = build(sources, CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "broken on purpose" in status_of(wheel, tmp_path)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("MAX_JOBS", "abc", "MAX_JOBS is 'abc', expected a number"),
        ("MAX_JOBS", "0", "MAX_JOBS is '0'"),
        ("CXX", 'g++ "', "CXX is 'g++ \"', which is no command"),
    ],
)
def test_a_variable_without_sense_leaves_a_pure_wheel(sources, tmp_path, name, value, said):
    """Seen failing: ValueError out of an `auto` build."""
    done, wheel = build(sources, **{"CUDA_HOME": "/nowhere", name: value})
    assert done.returncode == 0, done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said in status_of(wheel, tmp_path)


def test_the_wheel_holds_what_the_readme_uses(sources, tmp_path):
    """Every module and table, and the README's examples from an empty folder. Seen failing: `inhernet.demos` was left out."""
    done, wheel = build(sources, INHERIT_KERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    place, empty = tmp_path / "installed", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(place)
    empty.mkdir()
    for package, root in (("inherit_kernels", ROOT), ("inhernet", ROOT / "python")):
        files = [path for kind in ("*.py", "*.json", "py.typed") for path in (root / package).rglob(kind)]
        names = {str(path.relative_to(root)) for path in files if path.name != "_build.json"}
        assert len(names) > 20 and not {name for name in names if not (place / name).is_file()}
    examples = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL))
    environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "2"}
    where = "import inhernet, inherit_kernels; print(inhernet.__file__, inherit_kernels.__file__)\n"
    for command in (
        ["-c", where + examples],
        ["-m", "inhernet", "eval", "inherited", "--data", "digits"],
        ["-m", "inhernet", "bench", "inherited", "--data", "digits", "--seconds", "0.01", "--batch", "1"],
        ["-m", "inhernet", "demo", "--help"],
        ["-m", "inhernet", "doctor"],
    ):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=empty, env=environment)
        assert done.returncode == 0, (command[:3], done.stderr)
        assert command[0] != "-c" or done.stdout.startswith(f"{place}/inhernet/__init__.py {place}/inherit_kernels/")


def test_without_torch_at_build_time_the_wheel_is_pure_and_says_so(sources, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    packages = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    installed = Path(setuptools.__file__).parent.parent
    for part in [*installed.glob("setuptools*"), installed / "_distutils_hack"]:
        (packages / part.name).symlink_to(part)
    found = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is not None)"
    if subprocess.run([python, "-c", found]).returncode:
        pytest.skip("a build without torch was not tested: the base interpreter has torch")
    done, wheel = build(sources, python)
    assert done.returncode == 0, done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "torch was not found when this package was installed" in status_of(wheel, tmp_path)


def test_an_explicit_choice_that_cannot_be_met_fails(sources):
    for kind, environment in (("cpu", {"CXX": "/nowhere/g++"}), ("cuda", {"CXX": "/nowhere/g++"}), ("all", {})):
        done, wheel = build(sources, INHERIT_KERNELS_BUILD=kind, **environment)
        assert done.returncode != 0
        assert wheel is None
        assert f"INHERIT_KERNELS_BUILD={kind}" in done.stderr or f"is '{kind}'" in done.stderr
    done, wheel = build(sources, INHERIT_KERNELS_BUILD="cuda", TORCH_CUDA_ARCH_LIST="ninety")
    assert done.returncode != 0
    assert wheel is None


@pytest.mark.slow  # a minute; `make test` has built the CUDA part for itself, and test_native.py asks it what it is
@NEEDS_COMPILER
def test_with_nvcc_the_cuda_part_is_built_and_loads_without_a_gpu(built, tmp_path):
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("no .cu file was compiled or linked: no nvcc on this machine")
    done, wheel = build(built[0], INHERIT_KERNELS_BUILD="cuda")
    assert done.returncode == 0, done.stderr
    assert re.search(r"CUDA kernels +built", status_of(wheel, tmp_path))


FIRST_USE = """
import sys, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import inherit_kernels as ik
    ik.status()
    assert not caught, [str(w.message) for w in caught]
    x, down, up = torch.randn(3, 8), torch.randn(2, 8), torch.randn(5, 2)
    for rows in (3, 4, 5):
        torch.testing.assert_close(ik.lowrank_linear(x[:rows], down, up), x[:rows] @ down.T @ up.T)
    ik.lowrank_conv2d(torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3), torch.randn(4, 2))
print(*[f"{w.category.__name__}: {w.message}" for w in caught], sep="\\n")
"""


def warned_of(place):
    """What the first uses of ops in a process warn of, a line each."""
    environment = os.environ | {"PYTHONPATH": str(place)}
    done = subprocess.run([sys.executable, "-c", FIRST_USE], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.strip()


def test_a_pure_package_says_so_once_at_first_use_with_the_command_that_helps(sources, tmp_path):
    done, wheel = build(sources, CXX="/nowhere/g++", CUDA_HOME="/nowhere")
    assert done.returncode == 0, done.stderr
    assert wheel.name.startswith("inherit_kernels-0.1.0+pure.python-")  # the last line of pip's output
    zipfile.ZipFile(wheel).extractall(tmp_path / "pure")
    said = warned_of(tmp_path / "pure")
    assert said.count("\n") == 0 and said.startswith("RuntimeWarning: inherit_kernels computes in plain torch: ")
    assert "no C++ compiler was found" in said
    assert said.endswith("pip install --force-reinstall --no-deps --no-cache-dir .")
    done, wheel = build(sources, INHERIT_KERNELS_BUILD="none")
    assert wheel.name.startswith("inherit_kernels-0.1.0-py3")
    zipfile.ZipFile(wheel).extractall(tmp_path / "wanted")
    assert warned_of(tmp_path / "wanted") == ""


@pytest.mark.skipif(not _native.load(), reason="no library was damaged: there is none")
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign", "stale", "no note", "bad note"])
def test_a_library_that_is_not_the_one_that_was_built_is_left_out(damage, tmp_path):
    """A truncated one ended the process, one of other sources raised AttributeError."""
    place = tmp_path / "tree" / "inherit_kernels"
    shutil.copytree(PACKAGE, place, ignore=shutil.ignore_patterns("__pycache__"))
    library, note = place / "_C.abi3.so", place / "_build.json"
    content = library.read_bytes()
    if damage == "truncated":
        library.write_bytes(content[: len(content) // 3])
    elif damage == "empty":
        library.write_bytes(b"")
    elif damage == "flipped":
        library.write_bytes(content[:100_000] + bytes([content[100_000] ^ 1]) + content[100_001:])
    elif damage == "foreign":
        shutil.copy(Path(torch.__file__).parent / "lib" / "libshm.so", library)
    elif damage == "stale":
        (tmp_path / "tree" / "csrc").mkdir()
        (tmp_path / "tree" / "csrc" / "registration.cpp").write_text("// declares another operator")
    elif damage == "no note":
        note.unlink()
    else:
        note.write_text('{"sha256": ')
    said = warned_of(tmp_path / "tree")
    assert said.count("\n") == 0 and f"the native library {library} is left out: " in said
    assert ("other sources" in said) == (damage == "stale")
    assert "pip install --force-reinstall" in said


def test_a_library_that_does_not_load_is_reported_not_raised(sources, tmp_path):
    done, wheel = build(sources, INHERIT_KERNELS_BUILD="none")
    assert done.returncode == 0, done.stderr
    place = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(place)
    (place / "inherit_kernels" / "_C.abi3.so").write_bytes(b"not a library")
    note = {"error": None, "sha256": hashlib.sha256(b"not a library").hexdigest()}
    (place / "inherit_kernels" / "_build.json").write_text(json.dumps(note))
    said = warned_of(place)
    assert "did not load" in said and "install this package again" in said


@pytest.mark.skipif(shutil.which("nm") is None, reason="object files were not inspected: no nm")
def test_the_files_of_an_instruction_set_share_no_symbol_with_the_others():
    """A weak symbol in an AVX-512 object may be the copy that the linker keeps for all, and stop older machines."""
    objects = sorted((ROOT / "build" / "native").glob("microkernels_*.o"))
    if not objects:
        pytest.skip("object files were not inspected: the library was not built in place")
    for file in objects:
        symbols = subprocess.run(["nm", "-C", file], capture_output=True, text=True, check=True).stdout.splitlines()
        defined = [line for line in symbols if re.search(r"^[0-9a-f]+ [A-Zuvw] ", line)]
        assert len(defined) == 1, defined
        assert defined[0].endswith(file.stem.replace("microkernels", "inherit_kernels::kernels")), defined


def test_the_library_needs_nothing_newer_than_its_target():
    """Every torch symbol that the library imports belongs to the C interface, which only grows."""
    library = PACKAGE / "_C.abi3.so"
    if not library.exists() or shutil.which("nm") is None:
        pytest.skip("imported symbols were not inspected: no library, or no nm")
    symbols = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
    foreign = [s for s in re.findall(r"U (\S+)", symbols) if re.match(r"_ZN\w*(c10|at|torch)", s)]
    assert not foreign, foreign
    assert "aoti_torch_get_data_ptr" in symbols
