"""Models by the name of their source."""

import sys

import pytest
from torch import nn

from normfree.sources import model_factory


def test_a_function_of_the_current_folder_is_found_and_the_path_is_as_it_was(tmp_path, monkeypatch):
    """Also what it imports only when it is called."""
    (tmp_path / "parts_of_mine.py").write_text("from torch import nn\n\nlayer = nn.Linear(2, 3)\n")
    make = "def make():\n    from parts_of_mine import layer\n\n    return layer\n"
    (tmp_path / "network_of_mine.py").write_text(make)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    factory = model_factory("network_of_mine:make")
    assert sys.path == before
    model = factory()
    assert isinstance(model, nn.Linear)
    assert sys.path == before


def test_a_factory_that_fails_leaves_the_path_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "failing_of_mine.py").write_text("def make():\n    raise KeyError('width')\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with pytest.raises(
        ValueError, match=r"failing_of_mine:make raised KeyError: 'width' \(.*failing_of_mine\.py, line 2\)"
    ):
        model_factory("failing_of_mine:make")()
    with pytest.raises(ImportError, match="cannot import 'nowhere_of_mine'"):
        model_factory("nowhere_of_mine:make")
    assert sys.path == before
