"""C++ of our own: built once by the compiler that Inductor uses, and kept in the user's cache."""

from __future__ import annotations

import tempfile
import threading
from functools import cache
from pathlib import Path

import torch
import xxhash

from lwcompile.demo import cache_root


@cache
def code_of(source: Path) -> str:
    """A hash of a source file and the headers beside it, so that what was measured of another does not count."""
    return xxhash.xxh3_64_hexdigest(b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))))


BUILDING = "its library is being built"
_libraries: dict[Path, Path] = {}
_builders: dict[Path, threading.Thread] = {}
_lock = threading.Lock()


def beside(source: Path, *flags: str) -> str | None:
    """`load` for those who can do without: a library that is not there is built beside what they do, and `BUILDING` until then."""
    with _lock:
        if source not in _builders:
            _builders[source] = threading.Thread(target=load, args=(source, *flags), name=f"lwcompile builds {source.name}")
            _builders[source].start()
            _builders[source].join(0.1)  # enough where it is only loaded
    return BUILDING if _builders[source].is_alive() else load(source, *flags)


def library(source: Path) -> Path:
    """The file of a library that is loaded."""
    return _libraries[source]


@cache
def load(source: Path, *flags: str) -> str | None:
    """Build a source file's library, with more flags for the compiler, and load the operators that it registers; why it cannot be had,
    or None.

    The library is named after the source, the compiler's command and torch's version, so that an edited one is built anew.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    folder = cache_root() / "native"
    try:
        options = CppTorchOptions(vec_isa=pick_vec_isa(), warning_all=False, extra_flags=("-ffp-contract=fast", *flags))
        command = CppBuilder("library", source.name, options, str(folder)).get_command_line()
        key = xxhash.xxh3_64_hexdigest(f"{code_of(source)} {torch.__version__} {command}".encode())
        target = folder / f"{source.stem}-{key}.so"
        if not target.is_file():
            _build(source, options, target)
        torch.ops.load_library(target)
        _libraries[source] = target
    except Exception as error:  # no compiler, or one that refuses the source; a folder or a library that cannot be used
        return f"{source.name} cannot be built ({type(error).__name__}: {_first_line(error)})"
    return None


def _build(source: Path, options: object, target: Path) -> None:
    from torch._inductor.cpp_builder import CppBuilder

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        builder = CppBuilder(source.stem, str(source), options, folder)  # type: ignore[arg-type]
        builder.build()
        Path(builder.get_target_file_path()).replace(target)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
