"""Run directories: what a run has computed, addressed by content.

The key of a result holds everything it depends on: the graph, the pass's spec and the hash of its code, the calibration set, the
seed and the versions of the libraries. A killed run therefore resumes where it was, an edited plugin is not served stale
results, and a new budget is solved without scoring again. Entries are written whole or not at all.

    run.json            what the run was asked for, and when
    results/KEY.json    one result each
    tensors/KEY.safetensors
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from lwcompile import ranks
from lwcompile.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

LIBRARIES = ("lwcompile", "torch", "transformers", "onnxruntime", "numpy", "scipy")


@cache
def versions() -> dict[str, str]:
    """The versions that a number depends on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_hash(code: type | Callable[..., Any]) -> str:
    """A hash of the source behind a function, or a class and its bases, so that an edited pass is a different pass.

    Modules of the same package that the source imports from count too: a pass may keep its helpers beside it.
    """
    digest = xxhash.xxh3_64()
    names = [base.__module__ for base in code.__mro__[:-1]] if isinstance(code, type) else [code.__module__]
    for path in sorted({path for name in names for path in _sources(name)}):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _sources(name: str) -> set[str]:
    """The source files of a module and of those of its package that it imports from, transitively; the framework's own code is
    known by its version."""
    package = name.rpartition(".")[0]
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        path = _source_of(name := waiting.pop())
        if name in found or path is None:
            continue
        found[name] = path
        if package not in ("", "lwcompile"):
            waiting += [other for other in _imports(path, package) if other.rpartition(".")[0] == package]
    return set(found.values())


def _source_of(name: str) -> str | None:
    module = sys.modules.get(name)
    try:
        spec = None if module is not None else find_spec(name)
    except (ImportError, ValueError):
        spec = None
    path = getattr(module, "__file__", None) or (spec.origin if spec is not None else None)
    return path if path is not None and path.endswith(".py") and Path(path).is_file() else None


def _imports(path: str, package: str) -> Iterator[str]:
    """The dotted names that a file's import statements may mean, wherever they stand; relative ones against its package."""
    for node in ast.walk(ast.parse(Path(path).read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def content_key(*parts: Any) -> str:
    """One key for everything a result depends on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return xxhash.xxh3_128(text.encode()).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, on the file system it ends on; `BadInput` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)  # mkstemp's 0600 would keep an artifact to its owner
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}; free some space or name another directory") from error


class RunDir:
    """Results by key, under one directory. `hits` and `misses` count what was found and what had to be computed.

    Of several processes (`lwcompile.ranks`) only the first writes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hits = self.misses = 0

    @classmethod
    def default_root(cls) -> Path:
        """Where runs are kept unless a directory is named: `$LWCOMPILE_RUNS`, or the user's cache."""
        if place := os.environ.get("LWCOMPILE_RUNS"):
            return Path(place)
        return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lwcompile" / "runs"

    def _path(self, key: str, suffix: str = ".json") -> Path:
        folder = "results" if suffix == ".json" else "tensors"
        return self.root / folder / f"{key}{suffix}"

    def get(self, key: str) -> dict[str, Any] | None:
        """A result, or None. A damaged entry counts as missing: it is computed again."""
        try:
            value = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError):
            self.misses += 1
            return None
        self.hits += 1
        return value

    def put(self, key: str, value: dict[str, Any]) -> None:
        if not ranks.rank():
            write_atomic(self._path(key), json.dumps(value).encode())

    def get_tensors(self, key: str) -> dict[str, Tensor] | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(key, ".safetensors")
        try:
            value = load_file(path) if path.is_file() else None
        except (OSError, SafetensorError):
            value = None
        self.hits, self.misses = (self.hits, self.misses + 1) if value is None else (self.hits + 1, self.misses)
        return value

    def put_tensors(self, key: str, value: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        if not ranks.rank():
            write_atomic(self._path(key, ".safetensors"), save({name: t.contiguous() for name, t in value.items()}))

    def describe(self, **facts: Any) -> None:
        """Say what the run was asked for; `lwcompile runs` shows it."""
        if not ranks.rank():
            write_atomic(self.root / "run.json", json.dumps({"time": time.time(), **facts}, default=str, indent=1).encode())


@dataclass(frozen=True)
class RunInfo:
    """One run directory, as `lwcompile runs` lists it."""

    path: Path
    time: float
    facts: dict[str, Any]
    bytes: int

    @property
    def finished(self) -> bool:
        return (self.path / "report.json").is_file()


def list_runs(root: Path) -> list[RunInfo]:
    """The runs under a directory, the newest first."""
    runs = []
    for path in sorted(root.glob("*/run.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            facts = {}
        size = sum(f.stat().st_size for f in path.parent.rglob("*") if f.is_file())
        runs.append(RunInfo(path.parent, float(facts.get("time", 0)), facts, size))
    return sorted(runs, key=lambda run: run.time, reverse=True)


def clean_runs(runs: Iterable[RunInfo]) -> int:
    """Remove run directories; returns the bytes freed. Only directories that hold a run.json are touched."""
    freed = 0
    for run in runs:
        if (run.path / "run.json").is_file():
            shutil.rmtree(run.path)
            freed += run.bytes
    return freed


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
