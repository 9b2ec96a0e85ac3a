"""`inhernet doctor`: what is installed, built and fast here, and why not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib import metadata

import inherit_kernels
from inhernet.console import say, table

EXTRAS = {
    "demo": ("sklearn", "matplotlib"),
    "hf": ("transformers",),
    "triton": ("triton",),
}
_DISTRIBUTION = {"sklearn": "scikit-learn"}
COMPILERS = ("g++", "clang++", "nvcc", "ninja")


def doctor() -> None:
    """Print the state of this installation."""
    import torch

    say(str(inherit_kernels.status()))
    say()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    rows = [("python", platform.python_version()), ("torch", f"{torch.__version__}, {threads}")]
    rows.append(("torch vector width", torch.backends.cpu.get_cpu_capability()))
    rows += [(name, _compiler(name)) for name in COMPILERS]
    rows += [(f"extra [{name}]", _extra(name, modules)) for name, modules in EXTRAS.items()]
    table("inhernet doctor", ("what", "found"), rows, left=(0, 1))


def _compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        return "not found (only needed to build)"
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = (answer.stdout or answer.stderr).strip().splitlines()
    return lines[-1 if name == "nvcc" else 0] if lines else "found, but --version says nothing"


def _extra(name: str, modules: tuple[str, ...]) -> str:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        wanted = ", ".join(_DISTRIBUTION.get(module, module) for module in missing)
        return f"{wanted} not installed: pip install 'inherit-kernels[{name}]'"
    return ", ".join(f"{_DISTRIBUTION.get(m, m)} {metadata.version(_DISTRIBUTION.get(m, m))}" for m in modules)
