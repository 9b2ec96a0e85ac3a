"""The layout that DESIGN fixes: who imports whom, mirrored names, nothing stray, a lean import.

Seen failing once each: `import inhernet` inside inherit_kernels, an op importing another op, an op folder without cases,
a new top-level package, `import triton` at the top of a module, a file of 700 lines, a circle of imports.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = sorted(path.name for path in (ROOT / "inherit_kernels" / "ops").iterdir() if (path / "op.py").exists())

# inhernet, lowest first: a layer may import what stands before it, never what stands after it.
LAYERS = [
    "atomic",
    "checks",
    "fingerprint",
    "budgets",
    "config",
    "models",
    "layers",
    "nn",
    "decompose",
    "export",
    "formats",
    "architecture",
    "checkpoint",
    "streaming",
    "distill",
    "serve",
    "demos",
    "cli",
]


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in run_on_import(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({node.module} | {f"{node.module}.{alias.name}" for alias in node.names})
    return found


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes outside function bodies, those in `try` and `if` included."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from run_on_import(child)


def our_modules() -> dict[str, Path]:
    paths = {}
    for folder, root in (("inherit_kernels", ROOT), ("python/inhernet", ROOT / "python"), ("benchmarks", ROOT)):
        for path in modules(folder):
            parts = path.relative_to(root).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def our_imports(name: str, path: Path, paths: dict[str, Path]) -> set[str]:
    """The modules of ours that one imports, relative imports and those inside functions included."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            full = [f"{start}.{alias.name}" for alias in node.names]
            found |= {module if module in paths else start for module in full}
    return found & (set(paths) - {name})


def test_no_module_imports_itself_round_a_circle():
    """Imports inside functions count: they are how circles hide."""
    paths = our_modules()
    graph = {name: our_imports(name, path, paths) for name, path in paths.items()}
    assert sum(map(len, graph.values())) > 300
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules of a circle


def test_the_op_library_never_imports_the_front_end():
    for path in modules("inherit_kernels"):
        assert not {name for name in imports(path) if name.split(".")[0] == "inhernet"}, path


def test_ops_never_import_each_other_and_common_never_imports_an_op():
    for path in modules("inherit_kernels/ops"):
        own = path.relative_to(ROOT / "inherit_kernels" / "ops").parts[0]
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["inherit_kernels", "ops"] and len(parts) > 2:
                assert parts[2] == own, f"{path} imports {name}"
    for path in modules("inherit_kernels/common"):
        assert not {name for name in imports(path) if name.startswith("inherit_kernels.ops")}, path


def test_the_front_end_uses_public_names_of_the_op_library_only():
    public = {"inherit_kernels", "inherit_kernels.testing"}
    for path in modules("python/inhernet"):
        for name in imports(path):
            if name.split(".")[0] == "inherit_kernels":
                module = name.rsplit(".", 1)[0] if name not in public else name
                assert module in public, f"{path} imports {name}"
                assert not name.rsplit(".", 1)[-1].startswith("_"), f"{path} imports {name}"


def test_the_layers_of_the_front_end_import_downwards_only():
    paths = our_modules()
    looked_at = 0
    for name, path in paths.items():
        own = name.split(".")[1] if name.startswith("inhernet.") else ""
        if own not in LAYERS:
            continue
        for other in our_imports(name, path, paths):
            pieces = other.split(".")
            if pieces[0] == "inhernet" and len(pieces) > 1 and pieces[1] in LAYERS:
                looked_at += 1
                assert LAYERS.index(pieces[1]) <= LAYERS.index(own), f"{name} imports {other}"
    assert looked_at > 150


def test_the_configuration_imports_budgets_and_checks_only():
    paths = our_modules()
    found = our_imports("inhernet.config", paths["inhernet.config"], paths)
    assert found == {"inhernet.budgets", "inhernet.checks"}


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_the_same_name_everywhere(op):
    folder = ROOT / "inherit_kernels" / "ops" / op
    for name in ("op.py", "reference.py", "cases.py"):
        assert (folder / name).exists(), f"{folder} has no {name}"
    assert f"def {op}(" in (folder / "op.py").read_text()
    assert f"def {op}_reference(" in (folder / "reference.py").read_text()
    assert (ROOT / "benchmarks" / "ops" / f"bench_{op}.py").exists()
    assert f"import {op} as {op}" in (ROOT / "inherit_kernels" / "__init__.py").read_text()
    if (folder / "impl_native.py").exists():
        assert (ROOT / "csrc" / "cpu" / f"{op}.cpp").exists()
        assert op in (ROOT / "csrc" / "registration.cpp").read_text()


def test_no_stray_top_level_packages():
    allowed = {"inherit_kernels", "python", "tests", "benchmarks"}
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode or not tracked.stdout:
        pytest.skip("not a git checkout: the list of files is not known")
    tops = {line.split("/")[0] for line in tracked.stdout.split()}
    assert tops <= allowed | {"setup.py"}, tops - allowed
    assert {line.split("/")[1] for line in tracked.stdout.split() if line.startswith("python/")} == {"inhernet"}


def test_c_sources_depend_downwards_only():
    for path in (ROOT / "csrc" / "include").rglob("*.h"):
        text = path.read_text()
        assert "torch" not in "".join(line for line in text.splitlines() if line.startswith("#include")), path
    for path in (ROOT / "csrc" / "cuda").glob("*.cu"):
        assert "#include <torch" not in path.read_text(), path


def test_files_can_be_held_in_one_head():
    for path in [*modules("inherit_kernels"), *modules("python"), *(ROOT / "csrc").rglob("*.*")]:
        if path.suffix in (".py", ".cpp", ".h", ".cu"):
            assert len(path.read_text().splitlines()) <= 600, path


def test_heavy_packages_are_never_imported_at_the_top():
    heavy = {"triton", "transformers", "matplotlib", "sklearn", "onnx", "onnxscript", "onnxruntime"}
    device_code = {"kernels_triton.py", "triton_functions.py", "triton_conv.py"}  # imported by the first launch
    for path in [*modules("inherit_kernels"), *modules("python")]:
        if path.name in device_code:
            continue
        top = {name.split(".")[0] for name in imports(path, top_level_only=True)}
        assert not top & heavy, path


@pytest.mark.parametrize("package", ("inherit_kernels", "inhernet"))
def test_importing_is_lean(package):
    code = (
        f"import sys, torch, {package}\n"
        "heavy = {'triton', 'transformers', 'matplotlib', 'sklearn', 'torch._dynamo', 'torch._inductor', 'torch.onnx'}\n"
        "print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""}, check=True)
    assert done.stdout.strip() == "[] False"
