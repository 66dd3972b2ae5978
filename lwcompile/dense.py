"""The dense model's outputs, kept in bounded memory: every candidate is compared with them, and they never change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lwcompile.errors import BadInput


class DenseOutputs:
    """What `Metric.keep` made of each batch, in order: in memory up to `memory_limit` bytes, the rest in mapped files.

    directory: where batches go past the limit; without one, passing it is `BadInput`. `close` removes the files.
    """

    def __init__(self, directory: Path | None = None, memory_limit: int = 2 << 30) -> None:
        self.directory, self.memory_limit = directory, memory_limit
        self.memory_bytes = self.disk_bytes = 0
        self._batches: list[Tensor | Path] = []

    def append(self, batch: Tensor) -> None:
        kept = batch.detach().cpu().contiguous()
        if self.memory_bytes + kept.nbytes <= self.memory_limit:
            self._batches.append(kept.clone() if kept.data_ptr() == batch.data_ptr() else kept)
            self.memory_bytes += kept.nbytes
            return
        self._batches.append(self._spill(kept))
        self.disk_bytes += kept.nbytes

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Tensor:
        held = self._batches[index]
        if isinstance(held, Tensor):
            return held
        with safe_open(held, framework="pt") as file:
            return file.get_tensor("batch")

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        for held in self._batches:
            if isinstance(held, Path):
                held.unlink(missing_ok=True)
        self._batches.clear()
        self.memory_bytes = self.disk_bytes = 0

    def __enter__(self) -> DenseOutputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spill(self, batch: Tensor) -> Path:
        if self.directory is None:
            raise BadInput(f"the dense outputs pass {self.memory_limit >> 20} MB: name a directory for them, or lower --samples")
        path = self.directory / f"dense-{len(self):05d}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file({"batch": batch}, partial)
            partial.replace(path)
        except Exception as error:  # safetensors has its own exception for a full disk
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise BadInput(
                f"the dense outputs need {batch.nbytes >> 20} MB more in {self.directory}, which cannot be written: {error}"
            ) from error
        return path
