"""Tensors kept in memory up to a limit and in memory-mapped files beyond it: what lets a cache be bounded.

A tensor comes back with the bytes, sizes and strides it was given with, so that what is computed from it is bit for bit
what would have been computed from the original. A file's tensor goes back to the device it came from at each use.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Hashable
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor

from lwcompile.errors import BadInput


class TensorCache:
    """A mapping of tensors with at most `memory` bytes resident; the rest lies in files that go away with the cache.

    folder: where the files go; a temporary one if None. Raises `BadInput` when the disk is full.
    """

    def __init__(self, memory: int = 1 << 30, folder: Path | None = None) -> None:
        self.memory, self.resident, self.spilled = memory, 0, 0
        self._parent, self._folder = folder, None
        self._tensors: dict[Hashable, Tensor] = {}
        self._devices: dict[Hashable, torch.device] = {}
        self._storages: dict[int, Tensor] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, key: Hashable) -> Tensor:
        return self._tensors[key].to(self._devices[key])

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        storage, self._devices[key] = tensor.untyped_storage(), tensor.device
        if storage.data_ptr() in self._storages:  # a view of what is held already
            self._tensors[key] = tensor
        elif self.resident + storage.nbytes() <= self.memory:
            self._storages[storage.data_ptr()] = tensor
            self.resident += storage.nbytes()
            self._tensors[key] = tensor
        else:
            self._tensors[key] = self._on_disk(tensor)

    def _on_disk(self, tensor: Tensor) -> Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        if extent == 0:
            return tensor
        nbytes = extent * tensor.element_size()
        folder = self._files()
        if shutil.disk_usage(folder).free < nbytes + (1 << 28):
            raise BadInput(
                f"{folder} has no room for {nbytes >> 20} MiB of cached activations; use fewer samples or another run-dir"
            )
        path = folder / f"{len(self._tensors)}.bin"
        flat = tensor.as_strided((extent,), (1,))
        mapped = torch.from_file(str(path), shared=True, size=extent, dtype=tensor.dtype)
        mapped.copy_(flat)
        self.spilled += nbytes
        return mapped.as_strided(tensor.shape, tensor.stride())

    def _files(self) -> Path:
        if self._folder is None:
            if self._parent is not None:
                self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=self._parent))
            self._cleanup = finalize(self, shutil.rmtree, self._folder, True)
        return self._folder
