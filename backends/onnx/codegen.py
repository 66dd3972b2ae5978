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
from lwcompile.backends.onnx.parity import open_session, run_session
from lwcompile.contract import Code, Codegen
from lwcompile.graph import ModelGraph
from lwcompile.manager import require_same
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

        self.how = how
        self.unchecked: ModelGraph | None = graph
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

    def __call__(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        feed = dict(zip(self.names, (value.detach() for value in values)))
        made = [torch.from_numpy(value) for value in run_session(self.session, feed)]
        if self.unchecked is not None:
            rounded = self.how.activations == "int8" and self.unchecked.level() == "quantized"
            require_same(self.unchecked, values, made, INT8_TOLERANCE if rounded else self.how.tolerance, "onnxruntime's")
            self.unchecked = None
        with torch.no_grad():
            for output, target in self.writes:
                values[target].copy_(made[output])
        return made
