"""Shared fixtures: real models where they can be had, tiny random ones everywhere."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Unheard(logging.Logger):
    """Nobody listens, whoever asks to. torch writes whole graphs into its trace as soon as somebody does, and pytest listens to all."""

    handlers = property(lambda self: [], lambda self, value: None)  # type: ignore[assignment]


logging.getLogger("torch.__trace").__class__ = Unheard

settings.register_profile("lwcompile", deadline=None)  # times vary on shared machines
settings.load_profile("lwcompile")


@pytest.fixture(autouse=True, scope="session")
def one_copy_of_every_class():
    """`import passes` from the root would load every class a second time."""
    yield
    twice = sorted(name for name in sys.modules if name.split(".")[0] in ("passes", "backends"))
    assert not twice, f"imported from the folder instead of through lwcompile: {twice}"


@pytest.fixture(autouse=True, scope="session")
def folder_of_all_processes(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    os.environ["LWCOMPILE_TESTS"] = str(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture
def graphs(monkeypatch) -> list[Any]:
    """What torch.compile's backend made of each graph, in order."""
    from lwcompile.backends.dynamo import backend

    made: list[Any] = []
    inner = backend.Compiled.__init__

    def record(self: Any, *given: Any) -> None:
        inner(self, *given)
        made.append(self)

    monkeypatch.setattr(backend.Compiled, "__init__", record)
    return made


@pytest.fixture(autouse=True)
def runs_in_a_temporary_place(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LWCOMPILE_RUNS", str(tmp_path_factory.mktemp("runs")))
