"""C++ of our own: built once by the compiler that Inductor uses, and kept in the user's cache."""

from __future__ import annotations

import os
import sys
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

    The library is named after the source, the flags, torch's version, the processor and the compiler's settings, so that an edited one
    is built anew. The compiler's command would say the same, but takes half a second of trying instructions out.
    """
    import torch._inductor.config as inductor

    folder = cache_root() / "native"
    try:
        settings = inductor.cpp.cxx, inductor.cpp.simdlen, os.environ.get("CXX"), os.environ.get("ATEN_CPU_CAPABILITY")
        words = code_of(source), flags, torch.__version__, sys.version, instructions(), settings
        target = folder / f"{source.stem}-{xxhash.xxh3_64_hexdigest(repr(words).encode())}.so"
        if not target.is_file():
            _build(source, flags, target)
        torch.ops.load_library(target)
        _libraries[source] = target
    except Exception as error:  # no compiler, or one that refuses the source; a folder or a library that cannot be used
        return f"{source.name} cannot be built ({type(error).__name__}: {_first_line(error)})"
    return None


def instructions() -> str:
    """The sets of instructions that the processor has."""
    has = torch.cpu.get_capabilities()
    return " ".join(sorted(str(name) for name, value in has.items() if value is True))


def _build(source: Path, flags: tuple[str, ...], target: Path) -> None:
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = CppTorchOptions(vec_isa=pick_vec_isa(), warning_all=False, extra_flags=("-ffp-contract=fast", *flags))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        builder = CppBuilder(source.stem, str(source), options, folder)
        builder.build()
        Path(builder.get_target_file_path()).replace(target)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
