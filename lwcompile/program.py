"""`Program`: named entry points over one store, and its directory on disk.

program.json            entry points (nodes, names), task, configuration: JSON, no pickle
weights.safetensors     every tensor once, under its content key, memory-mapped when loaded
(tokenizer and configuration files of the source, copied as they were)
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from lwcompile.errors import BadInput
from lwcompile.graph import ModelGraph
from lwcompile.store import ParameterStore

FORMAT = 1


@dataclass
class Program:
    """Entry points (`forward`; or `encoder`, `decoder`) over one store, with what is known of the source."""

    entries: dict[str, ModelGraph]
    store: ParameterStore
    task: str = "unknown"
    name: str = "model"
    config: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    assets: tuple[Path, ...] = ()
    remarks: tuple[str, ...] = ()
    annotations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What analyses found: key -> site id -> score or damages. Per site and not per node, since a site outlives its nodes."""

    @property
    def main(self) -> ModelGraph:
        """The entry point whose output is the task's: `forward`, or the last one."""
        return self.entries.get("forward") or list(self.entries.values())[-1]

    @property
    def asset_dir(self) -> Path | None:
        """Where the source's tokenizer and configuration files lie, if it came with any."""
        return self.assets[0].parent if self.assets else None

    def tokenizer(self) -> Any:
        """The source's tokenizer, from its own files and never from a hub; None if it has none."""
        return None if self.asset_dir is None else load_tokenizer_from(self.asset_dir)

    def copy(self) -> Program:
        entries = {name: graph.copy() for name, graph in self.entries.items()}
        return dataclasses.replace(self, entries=entries, annotations=dict(self.annotations))

    def digest(self) -> str:
        names = sorted(self.entries)
        return xxhash.xxh3_128("".join(n + self.entries[n].digest() for n in names).encode()).hexdigest()

    def keys(self) -> set[str]:
        return {key for graph in self.entries.values() for key in graph.tensors.values()}

    def parameter_count(self) -> int:
        """Floating-point numbers over all entry points, tied tensors once."""
        keys = {key for key in self.keys() if self.store.dtype(key).is_floating_point}
        return sum(self.store.nbytes(key) // self.store.dtype(key).itemsize for key in keys)

    def nbytes(self) -> int:
        return sum(self.store.nbytes(key) for key in self.keys())

    def save(self, folder: Path) -> Path:
        """Write the program into `folder` (made if need be); the JSON comes last, so a folder with one is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        for asset in self.assets:
            if asset.is_file() and asset.parent.resolve() != folder.resolve():
                shutil.copyfile(asset, folder / asset.name)
        self.store.save(folder / "weights.safetensors", self.keys())
        data = {
            "format": FORMAT,
            "task": self.task,
            "name": self.name,
            "license": self.license,
            "config": self.config,
            "assets": sorted(a.name for a in self.assets),
            "remarks": list(self.remarks),
            "entries": {name: graph.to_json() for name, graph in self.entries.items()},
        }
        partial = folder / "program.json.partial"
        partial.write_text(json.dumps(data, indent=1), encoding="utf-8")
        partial.replace(folder / "program.json")
        return folder

    @classmethod
    def load(cls, folder: Path) -> Program:
        """Read what `save` wrote; weights stay on disk until they are asked for."""
        path = folder / "program.json"
        if not path.is_file():
            raise BadInput(f"{folder} holds no program.json; name a folder that `lwcompile compress` wrote")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{path} is not JSON ({error}); write the program again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else None
            raise BadInput(f"{path} has format {found}, and this version reads {FORMAT}")
        store = ParameterStore.open(folder / "weights.safetensors")
        try:
            return cls._from_json(data, store, folder)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        except Exception as error:  # whatever a file that `save` did not write makes of it
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
            raise BadInput(f"{path} is damaged ({reason}); write the program again") from error

    @classmethod
    def _from_json(cls, data: dict[str, Any], store: ParameterStore, folder: Path) -> Program:
        missing = {k for e in data["entries"].values() for k in e["tensors"].values()} - set(store.keys())
        if missing:
            raise BadInput(f"{folder / 'weights.safetensors'} lacks {len(missing)} tensors; write the program again")
        if outside := [name for name in data["assets"] if Path(name).name != name]:
            raise BadInput(f"it names the file {outside[0]!r}, which is not in its folder")
        entries = {name: ModelGraph.from_json(entry, store) for name, entry in data["entries"].items()}
        assets = tuple(folder / name for name in data["assets"])
        return cls(entries, store, data["task"], data["name"], data["config"], data["license"], assets, tuple(data["remarks"]))


def load_tokenizer_from(folder: Path) -> Any:
    """The tokenizer in a folder, from its own files and never from a hub; None if there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
