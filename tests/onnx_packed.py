"""Helpers of the ONNX tests: packed graphs and plain sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch

from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.passes.solve.rtn import Rtn

aten = torch.ops.aten
PLACES = (aten.linear.default, aten.embedding.default)


def pack(graph: ModelGraph, format: NumericFormat) -> dict[str, QuantizedTensor]:
    """Quantize every matrix that linears and embeddings read, tied ones once. By content key, what was made of it."""
    made: dict[str, QuantizedTensor] = {}
    for node in list(iterate_calls(graph, *PLACES)):
        place = 1 if node.target is aten.linear.default else 0
        read: Any = node.args[place]
        if read.op != "get_attr" or graph.tensor(str(read.target)).dim() != 2:
            continue
        name = str(read.target)
        weight, key = graph.tensor(name), graph.tensors[name]
        if key not in made:
            made[key] = Rtn(steps=1, refits=0).solve(weight, format, None)
        with graph.graph.inserting_before(node):
            packed = made[key].pack()
            parts = [graph.get_attr(f"{name}.{p}", packed[p]) if p in packed else None for p in ("codes", "scale", "zero")]
            args = (*parts, format.bits, format.group(weight.shape[1]), weight.shape[1])
            dense = graph.graph.call_function(torch.ops.lwcompile.dequantize.default, args)
        node.args = (*node.args[:place], dense, *node.args[place + 1 :])
    graph.prune()
    graph.propagate()
    return made


def plain_session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
