"""The ONNX backend: prices what onnxruntime stores, lowers each entry graph, and proves the file against the graph.

    forward            -> <path>
    forward + decode   -> <path> holds the decode graph, which an empty cache makes the forward one
    encoder + decoder  -> encoder_<path>, decoder_<path>, beside each other

Opset 23, with onnxruntime's MatMulNBits and GatherBlockQuantized for packed weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import onnx_ir as ir
import torch
from torch import Tensor

import lwcompile.backends.onnx.operators  # noqa: F401  (fills the table)
from lwcompile.backends.onnx.builder import IR_VERSION, OWN
from lwcompile.backends.onnx.executors import executors
from lwcompile.backends.onnx.files import Draft, check_model, with_attribute
from lwcompile.backends.onnx.lowering import TABLE, Lowering, operator_name
from lwcompile.backends.onnx.packing import Storage
from lwcompile.backends.onnx.parity import errors
from lwcompile.backends.onnx.quantized import INT8_ACTIVATIONS
from lwcompile.backends.onnx.runtime import OnnxStep, Runtime
from lwcompile.contract import Backend, Parity, StoredTensor
from lwcompile.errors import LwError, VerificationError
from lwcompile.graph import ModelGraph
from lwcompile.samples import cases

if TYPE_CHECKING:
    from lwcompile.context import Context
    from lwcompile.program import Program

EXACT = 1
"""MatMulNBits' accuracy level that computes in float32."""

NODE_BYTES, WEIGHT_BYTES = 80, 1400
"""What a node of the graph takes, and what a packed weight adds beside its tensors: names, and the nodes that widen it."""


@dataclass(frozen=True)
class Onnx(Backend):
    """onnxruntime on CPU.

    Options:
        activations: what packed products round their inputs to: "int8" (fast), or "float32" (exact; a third of the speed at up to
            4 bits, and above that dense products: the speed and memory of the dense model).
        external_data: write weights into a file of their own, which happens anyway where protobuf's 2 GiB end.
        tolerance: the largest error relative to the largest output that parity may show, with float32 activations.
    """

    name: ClassVar[str] = "onnx"
    suffixes: ClassVar[tuple[str, ...]] = (".onnx",)
    activations: Literal["int8", "float32"] = "int8"
    external_data: bool = False
    tolerance: float = 1e-3

    @property
    def accuracy_level(self) -> int:
        return INT8_ACTIVATIONS if self.activations == "int8" else EXACT

    # --- before it starts

    def unsupported(self, program: Program) -> list[str]:
        """Operators without a lowering, by name and place; then whatever a trial of the whole graph stumbles over."""
        reasons: dict[str, None] = {}
        for name, graph in _entries(program).items():
            missing = [n for n in graph.graph.nodes if n.op == "call_function" and operator_name(n) not in TABLE]
            for node in missing:
                reasons[f"{name}: {node.target} has no ONNX form here (first at {_place(node)})"] = None
            if not missing:
                try:
                    Lowering(graph, self.accuracy_level).run(name)
                except LwError as error:
                    reasons[f"{name}: {error}"] = None
        return list(reasons)

    def price(self, tensor: StoredTensor) -> int:
        """Bytes on file: packed codes at their own width (rows padded to the runtime's blocks), scales and zero points."""
        if tensor.format is not None:
            return Storage.of(tensor.format, tensor.shape).nbytes
        return math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize

    def overhead(self, program: Program) -> int:
        """The graphs themselves, with what packing every weight would add; and tensors that two files hold."""
        total, seen = 0, set()
        for graph in _entries(program).values():
            keys = set(graph.tensors.values())
            total += NODE_BYTES * len(graph.graph.nodes) + WEIGHT_BYTES * len(_matrices(graph))
            total += sum(graph.store.nbytes(key) for key in keys & seen)
            seen |= keys
        return total

    def executors(self, graph: ModelGraph) -> dict[str, str]:
        return executors(graph, self.accuracy_level)

    # --- lowering

    def lower(self, program: Program, path: Path, ctx: Context | None) -> Parity:
        found: dict[str, float] = {}
        rounding: dict[str, float] = {}
        entries = _entries(program)
        with Draft(path.parent) as draft:
            for name, graph in entries.items():
                prefix = f"{name}." if len(entries) > 1 else ""
                model, names = self.model(graph, program.name), file_inputs(graph, name)
                for value in model.graph.inputs:
                    value.name = names[str(value.name)]
                written = draft.write(file_name(path, name), model, external=self.external_data)
                check_model(written)
                proof = [({names[k]: v for k, v in feed.items()}, outputs) for feed, outputs in cases(graph, ctx)]
                exact, rounded = self._errors(graph, written, proof)
                found |= {prefix + output: error for output, error in exact.items()}
                rounding |= {prefix + output: error for output, error in rounded.items()}
            for output, error in found.items():
                if not error <= self.tolerance:
                    raise VerificationError(
                        f"the ONNX file's {output} is {error:.1e} of the largest value away from the graph's, past {self.tolerance:g}; "
                        "nothing was written"
                    )
            draft.commit()
        return Parity(found, self.tolerance, _note(rounding))

    def model(self, graph: ModelGraph, name: str) -> ir.Model:
        lowering = Lowering(graph, self.accuracy_level)
        body = lowering.run(name or "model")
        functions = list(lowering.b.functions.values())
        return ir.Model(body, ir_version=IR_VERSION, producer_name=OWN, functions=functions)

    def _errors(self, graph: ModelGraph, path: Path, proof: list) -> tuple[dict[str, float], dict[str, float]]:
        """Errors of the file's numbers with float32 activations, and what int8 activations add, where it has them."""
        packed = graph.level() == "quantized" and self.accuracy_level != EXACT
        as_written = errors(path, graph.outputs, proof)
        if not packed:
            return as_written, {}
        other = with_attribute(path, "accuracy_level", EXACT)
        try:
            return errors(other, graph.outputs, proof), as_written
        finally:
            other.unlink()

    # --- running what was written

    def run(self, path: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One forward pass of a file; caches that are not given are empty. Outputs by name."""
        return Runtime.of(path).run(inputs)

    def decode_step(self, path: Path) -> OnnxStep:
        """What advances generation by some tokens; `Refused` if the file holds no decode graph."""
        return OnnxStep(Runtime.of(path).sessions[-1])

    def speed(self, path: Path) -> dict[str, float]:
        """Milliseconds of a forward pass over 128 tokens (or the fixed input), and of one more token behind 128."""
        return Runtime.of(path).speed()


def file_name(path: Path, entry: str) -> str:
    return path.name if entry in ("forward", "decode") else f"{entry}_{path.name}"


def file_inputs(graph: ModelGraph, entry: str) -> dict[str, str]:
    """Inputs as the file names them: `decoder_input_ids` of an entry `decoder` is its `input_ids`, as Optimum has it."""
    known = {i.name for i in graph.inputs}
    short = {name: name.removeprefix(f"{entry}_") for name in known}
    return {name: name if new in known else new for name, new in short.items()}


def _entries(program: Program) -> dict[str, ModelGraph]:
    """The graphs that become files: the decode graph stands for the forward one it was made from."""
    if "decode" in program.entries:
        return {name: graph for name, graph in program.entries.items() if name not in ("forward", "prefill")}
    return program.entries


def _matrices(graph: ModelGraph) -> set[str]:
    keys = {key for key in graph.tensors.values() if len(graph.store.shape(key)) == 2}
    return {key for key in keys if graph.store.dtype(key).is_floating_point}


def _place(node: torch.fx.Node) -> str:
    return node.meta.get("path") or node.name


def _note(rounding: Mapping[str, float]) -> str:
    if not rounding:
        return "as written"
    worst = max(rounding.values())
    return (
        f"errors with float32 activations; int8 activations, as written, move outputs by up to {worst:.1e} of the largest value"
    )
