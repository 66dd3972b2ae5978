"""Hashes of code: what an edit changes, and what it does not."""

from __future__ import annotations

import importlib
import sys

import pytest

from lwcompile.rundir import code_hash as cached_hash

code_hash = cached_hash.__wrapped__  # an edit comes with another process

FILES = {
    "__init__.py": "",
    "shift.py": "from ._helper import LIMIT\nclass Shift:\n    def run(self):\n"
    "        from mine_to_hash.late import late\n        return LIMIT\n",
    "_helper.py": "from mine_to_hash import _deeper\nLIMIT = _deeper.ONE\n",
    "_deeper.py": "ONE = 1\n",
    "late.py": "def late(): ...\n",
    "stranger.py": "TWO = 2\n",
}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    folder = tmp_path / "mine_to_hash"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("mine_to_hash.shift").Shift, folder
    for name in [name for name in sys.modules if name.startswith("mine_to_hash")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["shift.py", "_helper.py", "_deeper.py", "late.py"])
def test_an_edited_helper_is_a_different_pass(plugin, name):
    shift, folder = plugin
    before = code_hash(shift)
    (folder / name).write_text(FILES[name] + "# another\n")
    assert code_hash(shift) != before


def test_a_module_that_is_not_imported_does_not_count(plugin):
    shift, folder = plugin
    before = code_hash(shift)
    (folder / "stranger.py").write_text("TWO = 3\n")
    assert code_hash(shift) == before
