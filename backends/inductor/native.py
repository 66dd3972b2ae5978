"""C++ of our own: built once by the compiler that Inductor uses, and kept in the user's cache."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
import xxhash

from lwcompile.demo import cache_root


@cache
def code_of(source: Path) -> str:
    """A hash of a source file and the headers beside it, so that what was measured of another does not count."""
    return xxhash.xxh3_64_hexdigest(b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))))


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
