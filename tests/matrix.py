"""The tests against an installed wheel, for each pair of a Python and a torch: `make matrix`.

For each pair: a new environment with that torch, the wheel built from this tree against it, and the tests that need neither
the source tree nor its compilers, run from an empty folder; the packages are deleted from the copy of the sources that holds
the tests, so that only the installed ones can be imported. Then the values and gradients of the native kernels once more with
the wheel of the first pair, as an installer would bring it: one library for every torch from 2.11 and every Python from 3.10.

A pair takes about ten minutes on two cores and 6 GB of disk while it runs. `--torch newest` is whatever pip takes.

    python tests/matrix.py --python python3.10 python3.13 --torch 2.11 newest
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
# What looks at the source tree, or compiles it, says nothing of a torch.
LEFT_OUT = ("architecture", "readme", "install", "emulation", "cuda_kernels", "machine_code")
WHERE = """
import sys, torch, inherit_kernels, inhernet
assert all("site-packages" in package.__file__ for package in (inherit_kernels, inhernet)), inherit_kernels.__file__
assert "native library   loaded" in str(inherit_kernels.status()), inherit_kernels.status()
print(sys.version.split()[0], torch.__version__)
"""


class Failed(Exception):
    """A step that ended with an error; the log says more."""


class Pair:
    """One Python with one torch."""

    def __init__(self, python: str, torch: str):
        self.name = f"{python.strip('/').replace('/', '-')}-torch{torch}"
        self.python, self.torch = python, torch
        self.folder = FOLDER / self.name
        self.log = FOLDER / f"{self.name}.log"
        self.found, self.result = "", "not run"
        self.wheel: Path | None = None

    def run(self, first: Pair) -> None:
        """Everything of this pair; `first` is the one whose wheel is tried once more."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.log.unlink(missing_ok=True)
        try:
            self._call("no such Python, or no venv in it", self.python, "-m", "venv", "venv")
            wanted = "torch" if self.torch == "newest" else f"torch=={self.torch}.*"
            self._pip("torch was not installed", wanted, "setuptools>=77", "wheel", "ninja")
            self._build()
            self._pip("the wheel was not installed", f"{self.wheel}[demo,test]")
            self.found = self._python("the wheel does not work", "-c", WHERE).split("\n")[0]
            tests = self._tests()
            if first is not self and first.wheel:
                self._pip("the first wheel was not installed", "--force-reinstall", "--no-deps", str(first.wheel))
                self._python("the first wheel does not work", "-c", WHERE)
                contract = str(self.folder / "source" / "tests" / "ops" / "test_contract.py")
                tests += "; first wheel " + self._pytest("the first wheel fails", contract, "-k", "native")
            self.result = tests
        except Failed as problem:
            self.result = f"FAILED: {problem}"

    def _build(self) -> None:
        names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
        for name in filter(lambda name: (ROOT / name).is_file(), names.splitlines()):
            target = self.folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "wheel", "./source"]
        self._python("the wheel was not built", *build, INHERIT_KERNELS_BUILD="cpu")
        self.wheel = next((self.folder / "wheel").glob("*.whl"))
        for package in ("inherit_kernels", "python", "build"):
            shutil.rmtree(self.folder / "source" / package)

    def _tests(self) -> str:
        tests = self.folder / "source" / "tests"
        out = [tests / "benchmarks", tests / "gpu", *(tests / f"test_{name}.py" for name in LEFT_OUT)]
        out += (tests / "ops").glob("test_triton_*.py")
        return self._pytest("tests fail", str(tests), *(f"--ignore={path}" for path in out), "-k", "not sanitizers")

    def _pytest(self, problem: str, *arguments: str) -> str:
        (self.folder / "empty").mkdir(exist_ok=True)
        said = self._python(problem, "-m", "pytest", "-m", "not slow and not gpu", *arguments, folder="empty")
        return re.findall(r"(\d+ passed.*) in ", said)[-1]

    def _pip(self, problem: str, *packages: str) -> None:
        self._python(
            problem, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", *packages
        )

    def _python(self, problem: str, *arguments: str, folder: str = ".", **environment: str) -> str:
        python = str(self.folder / "venv" / "bin" / "python")
        return self._call(problem, python, *arguments, folder=folder, **environment)

    def _call(self, problem: str, *command: str, folder: str = ".", **environment: str) -> str:
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            begin = log.tell()
            try:
                done = subprocess.run(
                    command, cwd=self.folder / folder, env=clean | environment, stdout=log, stderr=subprocess.STDOUT
                )
            except OSError as error:
                raise Failed(f"{problem} ({error})") from None
        said = self.log.read_text()[begin:]
        if done.returncode:
            raise Failed(problem)
        return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=["python3.10", "python3.12", "python3.13"], help="interpreters")
    parser.add_argument("--torch", nargs="+", default=["2.11", "2.13", "newest"], help="versions, oldest first")
    parser.add_argument("--keep", action="store_true", help="leave the environments, 6 GB each, in build/matrix")
    options = parser.parse_args()
    pairs = [Pair(python, torch) for python, torch in itertools.product(options.python, options.torch)]
    for number, pair in enumerate(pairs, 1):
        print(f"[{number}/{len(pairs)}] {pair.name} …", flush=True)
        begin = time.monotonic()
        pair.run(pairs[0])
        print(
            f"    {pair.result} ({(time.monotonic() - begin) / 60:.0f} min, {pair.log.relative_to(ROOT)})", flush=True
        )
        if not options.keep:
            for name in ("venv", "source"):
                shutil.rmtree(pair.folder / name, ignore_errors=True)
    print(f"\n{'asked for':28}{'Python, torch':26}result")
    for pair in pairs:
        print(f"{pair.name:28}{pair.found or '-':26}{pair.result}")
    return int(any("passed" not in pair.result for pair in pairs))


if __name__ == "__main__":
    sys.exit(main())
