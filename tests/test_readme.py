"""What the README shows is what the project does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from inherit_kernels.status import support_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_support_table_is_that_of_the_registry():
    assert support_table() in README


def test_the_python_examples_run(tmp_path):
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) >= 2
    script = tmp_path / "examples.py"
    script.write_text("\n".join(examples))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_it_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 250
