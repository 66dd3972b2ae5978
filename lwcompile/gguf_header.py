"""The header of a GGUF file: metadata and where each tensor lies, read in a fraction of a second.

It tells a whole file from a truncated one before anything is dequantized, and holds the licence and the name.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwcompile.errors import BadInput

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """Scalars and strings of the metadata (arrays only by length), and (name, shape, type, offset) of each tensor."""

    metadata: dict[str, Any]
    tensors: tuple[tuple[str, tuple[int, ...], int, int], ...]
    data_offset: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header; `BadInput` where the file is not GGUF, or ends before its header or its last tensor does."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise BadInput(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
            header = _Reader(data).header(path)
            _require_whole(path, header, len(data))
            return header
    except (struct.error, IndexError, UnicodeDecodeError, KeyError):
        raise BadInput(f"{path} is truncated or damaged: its header cannot be read; get the file again") from None
    except ValueError:  # an empty file cannot be mapped
        raise BadInput(f"{path} is empty; get the file again") from None


def _require_whole(path: Path, header: GgufHeader, size: int) -> None:
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): blocks for kind, blocks in GGML_QUANT_SIZES.items()}
    for name, shape, kind, offset in header.tensors:
        if kind not in sizes:
            raise BadInput(f"{path}: the tensor {name} has the unknown GGUF type {kind}; a newer gguf package may read it")
        block, nbytes = sizes[kind]
        end = header.data_offset + offset + math.prod(shape) // block * nbytes
        if end > size:
            raise BadInput(f"{path} is truncated: the tensor {name} ends at byte {end}, the file at {size}; get the file again")


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def header(self, path: Path) -> GgufHeader:
        version = self.scalar("I")
        if version not in (2, 3):
            raise BadInput(f"{path} is GGUF version {version}; versions 2 and 3, little-endian, can be read")
        tensor_count, pair_count = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            name = self.string()
            metadata[name] = self.value(self.scalar("I"))
        tensors = tuple(self.tensor() for _ in range(tensor_count))
        alignment = metadata.get("general.alignment", 32)
        return GgufHeader(metadata, tensors, -(-self.at // alignment) * alignment)

    def scalar(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        text = self.data[self.at : self.at + length]
        if len(text) < length:
            raise IndexError
        self.at += length
        return text.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            self.at += count * struct.calcsize("<" + _SCALARS[item])
            return count
        for _ in range(count):
            self.skip(item)
        return count

    def skip(self, kind: int) -> None:
        if kind == _STRING:
            length = self.scalar("Q")
            self.at += length
        else:
            self.value(kind)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))
        return name, shape, self.scalar("I"), self.scalar("Q")
