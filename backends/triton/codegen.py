"""Triton's kernels as the code behind `torch.compile`: the graph becomes a package in a temporary folder, which is imported here.

For a model on the processor: its weights are put on the GPU, inputs are copied to it, and outputs back. Without a GPU it runs in
Triton's interpreter, if that was asked for before the process began: for proof, and not for use. The first call is compared with
the graph: what a kernel gets wrong on these inputs is an error then, and not a result.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lwcompile.backends.triton.backend import Triton
from lwcompile.backends.triton.emit import reasons_against, write_source
from lwcompile.backends.triton.parity import device
from lwcompile.contract import Code, Codegen
from lwcompile.graph import ModelGraph
from lwcompile.manager import require_same
from lwcompile.program import Program

HALF_TOLERANCE = 0.05
"""In 16-bit types."""


@dataclass(frozen=True)
class TritonKernels(Codegen):
    """Packed weights and what is fused with them on an NVIDIA GPU; the rest by torch, call by call. Only by name.

    Options:
        tolerance: the largest error relative to the largest output that the first call may show, in float32.
    """

    name: ClassVar[str] = "triton"

    tolerance: float = 1e-3

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed: pip install 'lwcompile[triton]'"
        if device() == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "there is no GPU; set TRITON_INTERPRET=1 before the process begins to have its interpreter prove the code"

    def unsupported(self, graph: ModelGraph) -> list[str]:
        return reasons_against(graph)

    def executors(self, graph: ModelGraph) -> dict[str, str]:
        return Triton().executors(graph)

    def compile(self, graph: ModelGraph, examples: Sequence[Tensor], writes: Mapping[str, str]) -> Code:
        return Code(_Package(graph, writes, self.tolerance))


class _Package:
    def __init__(self, graph: ModelGraph, writes: Mapping[str, str], tolerance: float) -> None:
        self.unchecked: ModelGraph | None = graph
        self.inputs = [i.name for i in graph.inputs]
        self.writes = [(output, self.inputs.index(target)) for output, target in writes.items()]
        self.folder = tempfile.TemporaryDirectory(prefix="lwcompile-")  # Triton reads a kernel's source when it is first launched
        path = Path(self.folder.name) / "triton_model"
        stored = write_source(Program({"forward": graph}, graph.store), path)
        width = _width(graph)
        self.tolerance = tolerance if width == torch.float32 else HALF_TOLERANCE
        self.model = _imported(path).load(device(), width, stored.tensors)

    def __call__(self, values: Sequence[Tensor]) -> Sequence[Any]:
        place = values[0].device
        made = self.model.run("forward", dict(zip(self.inputs, values)))
        made = {name: value.to(place) if isinstance(value, Tensor) else value for name, value in made.items()}
        if self.unchecked is not None:
            require_same(self.unchecked, values, list(made.values()), self.tolerance, "the Triton kernels'")
            self.unchecked = None
        with torch.no_grad():
            for output, target in self.writes:
                values[target].copy_(made[output])
        return list(made.values())


def _imported(path: Path) -> Any:
    """The package as a module of its own, whatever else is called by its name."""
    name = f"_{path.parent.name.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _width(graph: ModelGraph) -> torch.dtype:
    """The type of activations: of the first output that is no integer."""
    graph.propagate()
    found = (getattr(node.meta.get("val"), "dtype", None) for node in graph.output_node.args[0])  # type: ignore[union-attr]
    return next((dtype for dtype in found if dtype is not None and dtype.is_floating_point), torch.float32)
