"""The examples of the docstrings run and give what they show. Seen failing: three that showed other numbers than they gave."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import inhernet
from inhernet.layers import registry

MODULES = sorted(
    info.name for info in pkgutil.walk_packages(inhernet.__path__, "inhernet.") if "__main__" not in info.name
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_KINDS", list(registry._KINDS))  # an example registers a kind of its own
    module = importlib.import_module(name)
    names = {**vars(module), "torch": torch, "nn": nn, "inhernet": inhernet}
    shown: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, globs=names):
        torch.manual_seed(0)
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=shown.append)
    assert not shown, "".join(shown)
