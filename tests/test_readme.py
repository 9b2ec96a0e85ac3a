"""What the README shows is what the project does; its examples run in `test_install.py`, from a wheel."""

from __future__ import annotations

import re
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
