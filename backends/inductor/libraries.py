"""Where the libraries of Inductor's code lie, noted when they are compiled.

Inductor finds each by the compiler's command, its headers, and sets of instructions that it tries out in processes of their own: a
second's work. A library that was noted and still lies there is loaded at once; the rest Inductor finds, or compiles, as always.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any


def is_kernel(value: Any) -> bool:
    """Whether this is the function of a library, as Inductor's code calls it."""
    return isinstance(value, BuiltinFunctionType) and value.__name__ == "kernel" and hasattr(value.__self__, "__file__")


def library_of(kernel: Any) -> Path:
    return Path(kernel.__self__.__file__)


Find = Callable[[Any, list[str], str], Any]
"""Inductor's: the function of a library, or what has it later, from the types of its arguments and its source."""


class Libraries:
    """The functions that Inductor's code takes from libraries, by what it says of them."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what Inductor compiles or finds."""

        def note(inductor: Any, types: list[str], source: str) -> Any:
            made = self._found[_key(types, source)] = find(inductor, types, source)
            return made

        with _finding(note) as find:
            yield

    def save(self, path: Path) -> None:
        """Write where they lie in Inductor's cache."""
        functions = {key: f.result() if hasattr(f, "result") else f for key, f in self._found.items()}
        files = {key: library_of(f) for key, f in functions.items() if is_kernel(f)}
        there = {key: str(file.relative_to(_folder())) for key, file in files.items() if file.is_relative_to(_folder())}
        path.write_text(json.dumps(there), encoding="utf-8")


@contextmanager
def noted(path: Path) -> Iterator[None]:
    """Have Inductor's code load the libraries that were saved in this file."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Loader

    files = json.loads(path.read_text(encoding="utf-8"))

    def load(inductor: Any, types: list[str], source: str) -> Any:
        key = _key(types, source)
        if key not in files or not (file := _folder() / files[key]).is_file():
            return find(inductor, types, source)
        return getattr(Loader._load_library(str(file), key), Loader.entry_function)

    with _finding(load) as find:
        yield


@contextmanager
def _finding(way: Find) -> Iterator[Find]:
    """Have Inductor's code look for libraries in this way; yields Inductor's own."""
    from torch._inductor.async_compile import AsyncCompile

    own: Find = AsyncCompile.cpp_pybinding
    AsyncCompile.cpp_pybinding = way  # type: ignore[method-assign, assignment]
    try:
        yield own
    finally:
        AsyncCompile.cpp_pybinding = own  # type: ignore[method-assign, assignment]


def _key(types: list[str], source: str) -> str:
    return sha256(json.dumps([types, source]).encode()).hexdigest()


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())
