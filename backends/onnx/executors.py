"""Who runs each call of a graph under onnxruntime: the operators that it is written as."""

from __future__ import annotations

from lwcompile.backends.onnx.lowering import Lowering, operator_name
from lwcompile.graph import ModelGraph

FOLDED = "nobody: folded into its neighbours"


def executors(graph: ModelGraph, accuracy_level: int) -> dict[str, str]:
    """Node -> the ONNX operators of its own, in the order in which they run."""
    written: dict[str, dict[str, None]] = {}
    for node in Lowering(graph, accuracy_level).run("model"):
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        written.setdefault((node.name or "").partition(".")[0], {})[kind] = None
    found = {}
    for call in (n for n in graph.graph.nodes if n.op == "call_function"):
        kinds = written.get(call.name, {})
        if operator_name(call) == "lwcompile.dequantize" and not kinds:
            found[call.name] = "nobody: what reads the weight takes its codes"
        else:
            found[call.name] = f"onnxruntime: {', '.join(kinds)}" if kinds else FOLDED
    return found
