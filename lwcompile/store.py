"""The tensors of a program: immutable, content-addressed, lazy.

Copies of a graph share one store, so a transaction costs nodes and not weights; tying and sharing are two names for one key.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lwcompile.errors import BadInput, VerificationError


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor in row-major order, whatever its dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_key(tensor: Tensor) -> str:
    """The content address of a tensor: 128 bits over dtype, shape and bytes."""
    digest = xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


@dataclass(frozen=True)
class _OnDisk:
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class ParameterStore:
    """Tensors by content key. Entries are never replaced; one written in place is noticed by `check`.

    A tensor on disk is compared with its key when it is first read.
    """

    def __init__(self) -> None:
        self._resident: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._disk: dict[str, _OnDisk] = {}
        self._seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._resident or key in self._disk

    def keys(self) -> set[str]:
        return self._resident.keys() | self._disk.keys()

    def __len__(self) -> int:
        return len(self.keys())

    def put(self, tensor: Tensor) -> str:
        """Add a tensor and return its key; equal contents get one key. It is kept on the CPU, and not copied if it is there."""
        tensor = tensor.detach().cpu()
        key = tensor_key(tensor)
        if key not in self:
            self._resident[key] = tensor
            self._versions[key] = tensor._version
        return key

    def __getitem__(self, key: str) -> Tensor:
        if key in self._resident:
            return self._resident[key]
        entry = self._disk[key]
        with safe_open(entry.path, framework="pt") as file:
            tensor = file.get_tensor(entry.name)
        if key not in self._seen:
            if tensor_key(tensor) != key:
                raise BadInput(f"{entry.path} is damaged: a tensor {entry.shape} is not the one that was saved; write it again")
            self._seen.add(key)
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._resident[key].shape) if key in self._resident else self._disk[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._resident[key].dtype if key in self._resident else self._disk[key].dtype

    def nbytes(self, key: str) -> int:
        count = 1
        for size in self.shape(key):
            count *= size
        return count * self.dtype(key).itemsize

    def check(self, keys: Iterable[str], *, deep: bool = False) -> None:
        """Raise `VerificationError` if an entry was written in place.

        The shallow check reads autograd's version counters and is free; the deep one hashes the contents again
        and also sees writes through `.data` or another view of the memory.
        """
        for key in keys:
            tensor = self._resident.get(key)
            if tensor is None:
                continue
            if tensor._version != self._versions[key] or (deep and tensor_key(tensor) != key):
                raise VerificationError(
                    f"a stored tensor {tuple(tensor.shape)} was written in place; make a new tensor with set_tensor"
                )

    def save(self, path: Path, keys: Iterable[str]) -> None:
        """Write the entries to one safetensors file, each once, under its key."""
        save_file({key: self[key].cpu().contiguous().clone() for key in sorted(set(keys))}, path)

    @classmethod
    def open(cls, path: Path) -> ParameterStore:
        """Memory-map a file that `save` wrote; tensors are read when asked for."""
        store = cls()
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    view = file.get_slice(name)
                    store._disk[name] = _OnDisk(path, name, tuple(view.get_shape()), _DTYPES[view.get_dtype()])
        except Exception as error:
            raise BadInput(f"{path} is not a whole safetensors file ({error}); write it again") from error
        return store


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
