"""onnxruntime as the code behind `torch.compile`: the graph becomes a file in a temporary folder, and a session that runs it.

Packed weights stay packed. The first call is compared with the graph: what an operator's lowering gets wrong on these inputs is
an error then, and not a result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lwcompile.backends.onnx.backend import Onnx, file_inputs
from lwcompile.backends.onnx.parity import open_session, relative_error, run_session
from lwcompile.contract import Code, Codegen
from lwcompile.errors import VerificationError
from lwcompile.graph import ModelGraph
from lwcompile.program import Program

INT8_TOLERANCE = 0.1
"""What int8 activations may move an output by, relative to its largest value: past it something else is wrong."""


@dataclass(frozen=True)
class OnnxRuntime(Codegen):
    """onnxruntime on CPU. `activations` as the `onnx` backend has them; float32 computes the graph's own numbers."""

    name: ClassVar[str] = "onnxruntime"

    activations: Literal["int8", "float32"] = "float32"
    tolerance: float = 1e-3

    def unsupported(self, graph: ModelGraph) -> list[str]:
        graph.propagate()
        values = [*graph.input_nodes().items(), *zip(graph.outputs, graph.output_node.args[0])]  # type: ignore[arg-type]
        kinds = {name: getattr(getattr(node, "meta", {}).get("val"), "dtype", None) for name, node in values}
        reasons = [f"{name} is a number and no tensor" for name, dtype in kinds.items() if dtype is None]
        reasons += [f"{name} is in bfloat16" for name, dtype in kinds.items() if dtype is torch.bfloat16]
        return reasons or Onnx(self.activations).unsupported(Program({"forward": graph}, graph.store))

    def executors(self, graph: ModelGraph) -> dict[str, str]:
        return Onnx(self.activations).executors(graph)

    def compile(self, graph: ModelGraph, examples: Sequence[Tensor], writes: Mapping[str, str]) -> Code:
        return Code(_Session(graph, self, writes))


class _Session:
    def __init__(self, graph: ModelGraph, how: OnnxRuntime, writes: Mapping[str, str]) -> None:
        import onnx_ir as ir

        self.graph, self.how = graph, how
        self.folder = tempfile.TemporaryDirectory(prefix="lwcompile-")  # onnxruntime maps its weights from there
        path = Path(self.folder.name) / "model.onnx"
        model, names = Onnx(how.activations).model(graph, "model"), file_inputs(graph, "model")
        for value in model.graph.inputs:
            value.name = names[str(value.name)]
        ir.save(model, path, external_data="model.onnx.data", size_threshold_bytes=1024)
        self.session = open_session(path, torch.get_num_threads())
        self.names = [names[i.name] for i in graph.inputs]
        positions = {i.name: at for at, i in enumerate(graph.inputs)}
        self.writes = [(graph.outputs.index(output), positions[target]) for output, target in writes.items()]
        self.checked = False

    def __call__(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        feed = dict(zip(self.names, (value.detach() for value in values)))
        made = [torch.from_numpy(value) for value in run_session(self.session, feed)]
        if not self.checked:
            self._check(values, made)
        with torch.no_grad():
            for output, target in self.writes:
                values[target].copy_(made[output])
        return made

    def _check(self, values: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        rounded = self.how.activations == "int8" and self.graph.level() == "quantized"
        with torch.no_grad():
            wanted = self.graph.module(dense=True)(*values)
        for name, a, b in zip(self.graph.outputs, wanted, made, strict=True):
            allowed = INT8_TOLERANCE if rounded else self.how.tolerance
            if not (error := relative_error(a, b)) <= allowed:
                raise VerificationError(f"onnxruntime's {name} is {error:.1e} of the largest value away from the graph's")
        self.checked = True
