"""What the README shows is what the project does; its examples run in `test_install.py`, from a wheel."""

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


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_it_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 250


def test_the_examples_of_the_guide_to_extensions_run():
    text = (ROOT / "docs" / "extending.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 of 1 layers factorised") == 2
