"""The process that torch-mlir and IREE run in: `python -m lwcompile.backends.mlir.worker FOLDER`.

They can take Python down with them, so this one is theirs. FOLDER/job.json says what to do, FOLDER/at what it is doing, and
FOLDER/result.json what came of it; no result is a death. Programs and tensors come and go as safetensors and JSON.
"""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

TORCH = "builtin.module(torchdynamo-export-to-torch-backend-pipeline)"
LINALG = "builtin.module(torch-backend-to-linalg-on-tensors-backend-pipeline)"
STRIP = "builtin.module(strip-debuginfo)"
"""Where each operation came from: this machine's paths, which are nobody's business."""

At = Callable[[str], Any]


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    _limit(job["memory"])
    warnings.simplefilter("ignore")
    at = (folder / "at").write_text
    try:
        result = JOBS[job["do"]](job, folder, at)
    except Exception as error:  # whatever the other side raises: its first words are the message
        result = {"error": _reason(error)}
    (folder / "result.partial").write_text(json.dumps(result), encoding="utf-8")
    (folder / "result.partial").replace(folder / "result.json")


def _limit(memory: int) -> None:
    """No more than `memory` bytes of data, so that the system's own killer has no reason to choose a process."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _reason(error: BaseException) -> str:
    """The first line that says what failed, of messages that open with a page of locations."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line.partition("error: ")[2] for line in lines if "error: " in line]
    line = re.sub(r'^(loc\()?"[^"]*":\d+:\d+\)?: ', "", next(iter(said or lines), "no reason given"))
    return f"{type(error).__name__}: {line}"[:500]


# --- a program becomes a module


class _Traced(nn.Module):
    """A graph as a module whose every call leaves its node's name in what the tracer writes down."""

    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.graph = graph
        for key in dict.fromkeys(graph.tensors.values()):
            self.register_buffer(f"t{key}", graph.store[key].clone())  # not a map of the whole file each: they count as memory

    def forward(self, *inputs: Tensor) -> Any:
        from torch.fx.traceback import annotate

        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = self._buffers[f"t{self.graph.tensors[str(node.target)]}"]
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                with annotate({"node": node.name}):
                    values[node] = node.target(*args, **kwargs)
        return fx.map_arg(self.graph.output_node.args[0], values.__getitem__)


def _traced(graph: Any) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The graph as torch-mlir reads it, and the symbols that had to become numbers."""
    from torch.export import Dim
    from torch.fx.traceback import preserve_node_meta
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table

    args = tuple(graph.example(i.name) for i in graph.inputs)
    failures: list[Exception] = []
    for free in (Dim.DYNAMIC, Dim.AUTO):
        shapes = tuple({d: free for d in i.dynamic} for i in graph.inputs)
        try:
            with torch.no_grad(), preserve_node_meta():
                exported = torch.export.export(_Traced(graph), args, dynamic_shapes=(shapes,), strict=False)
            exported = exported.run_decompositions(get_decomposition_table())
            _collapse_views(exported.graph)
            return exported, _fixed(graph, exported)
        except Exception as error:
            failures.append(error)
    raise failures[0]


def _collapse_views(graph: fx.Graph) -> None:
    """`view` that only joins neighbouring dimensions -> `collapse`: of a view with two free lengths, torch-mlir takes one to be 1."""
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)):
        source = node.args[0]
        spans = _joined(_sizes(source.meta["val"]), _sizes(node.meta["val"]))
        value, last = source.meta["val"], source
        for start, end in reversed(spans or []):
            value = value.new_empty([*value.shape[:start], math.prod(value.shape[start : end + 1]), *value.shape[end + 1 :]])
            with graph.inserting_before(node):
                last = graph.call_function(torch.ops.prims.collapse.default, (last, start, end))
            last.meta = {**node.meta, "val": value}
        if last is not source:
            last.meta = dict(node.meta)
            node.replace_all_uses_with(last)
            graph.erase_node(node)


def _sizes(value: Tensor) -> list[Any]:
    """Sizes as expressions: comparing symbolic ones would bind them."""
    return [s.node.expr if isinstance(s, torch.SymInt) else s for s in value.shape]


def _joined(before: list[Any], after: list[Any]) -> list[tuple[int, int]] | None:
    """The spans of dimensions that were joined into one each; None if that is not all that happened."""
    spans, at = [], 0
    for size in after:
        start, product = at, 1
        while at < len(before) and (product != size or at == start):
            product, at = product * before[at], at + 1
        if product != size:
            return None
        if at > start + 1:
            spans.append((start, at - 1))
    return spans if at == len(before) else None


def _fixed(graph: Any, exported: torch.export.ExportedProgram) -> list[str]:
    named = set(exported.graph_signature.user_inputs)
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in named]
    sizes = [(i.dynamic[d], n.meta["val"].shape[d]) for i, n in zip(graph.inputs, nodes) for d in i.dynamic]
    return sorted({symbol for symbol, size in sizes if isinstance(size, int)})


def _importer() -> Any:
    """An importer that reads a tensor's memory as it lies, and equal tensors once."""
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.extras.fx_importer import FxImporter, FxImporterHooks, create_mlir_tensor_type

    from lwcompile.store import tensor_bytes, tensor_key

    class Hooks(FxImporterHooks):
        def __init__(self) -> None:
            self.made: dict[str, Any] = {}

        def resolve_literal(self, gni: Any, literal: Any, info: Any) -> Any:
            if not isinstance(literal, Tensor) or literal.numel() < 2:
                return None
            key = tensor_key(literal)
            if key not in self.made:
                import numpy as np

                data, kind = np.frombuffer(tensor_bytes(literal), np.uint8), create_mlir_tensor_type(literal)
                self.made[key] = ir.DenseResourceElementsAttr.get_from_buffer(data, f"t{key}", kind)
            kind = gni._cc.tensor_to_vtensor_type(literal)
            return ir.Operation.create("torch.vtensor.literal", results=[kind], attributes={"value": self.made[key]}).result

    context = ir.Context()
    torch_dialect.register_dialect(context)
    return FxImporter(context=context, hooks=Hooks())


def _lower(module: Any, at: At = lambda _: None) -> None:
    from torch_mlir.passmanager import PassManager

    with module.context:
        for name, pipeline in (("torch", TORCH), ("linalg", LINALG), ("its final form", STRIP)):
            at(f"lowering to {name}")
            PassManager.parse(pipeline).run(module.operation)


def convert(job: dict[str, Any], folder: Path, at: At) -> dict[str, Any]:
    """One function an entry point, in one module over one set of weights; written if the job names a file."""
    from lwcompile.program import Program

    program, importer, fixed = Program.load(folder / "program"), _importer(), {}
    for name, graph in program.entries.items():
        at(f"tracing {name}")
        exported, fixed[name] = _traced(graph)
        at(f"importing {name}")
        importer.import_program(exported, func_name=name)
    _lower(importer.module, at)
    if job["out"] is not None:
        at("writing")
        operation = importer.module.operation
        operation.verify()
        with Path(job["out"]).open("wb") as file:
            operation.print(file=file, binary=True) if job["form"] == "text" else operation.write_bytecode(file)
    return {"fixed": fixed}


def probe(job: dict[str, Any], folder: Path, at: At) -> dict[str, Any]:
    """Convert each kind of call on its own; the one that this process dies at is left in `at`, those that fail come back."""
    from lwcompile.program import Program

    failed: list[dict[str, str]] = []
    for name, graph in Program.load(folder / "program").entries.items():
        at(f"tracing {name}")
        for node, alone in _calls(_traced(graph)[0].graph):
            at(json.dumps({"entry": name, "node": _origin(node), "operator": str(node.target)}))
            importer = _importer()
            try:
                importer.import_stateless_graph(alone, func_name="alone")
                _lower(importer.module)
            except Exception as error:
                failed.append({"entry": name, "node": _origin(node), "operator": str(node.target), "reason": _reason(error)})
    return {"failed": failed}


def _origin(node: fx.Node) -> str:
    return node.meta.get("custom", {}).get("node", node.name)


def _calls(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Graph]]:
    """Each kind of call (target, types and constants), first one first, as a graph of its own."""
    seen: set[str] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        kind = repr((node.target, fx.map_arg((node.args, node.kwargs), lambda n: _Type(n.meta.get("val")))))  # type: ignore
        if kind in seen:
            continue
        seen.add(kind)
        alone, values = fx.Graph(), {}
        for source in node.all_input_nodes:
            values[source] = alone.placeholder(source.name)
            values[source].meta = dict(source.meta)
        made = alone.node_copy(node, values.__getitem__)
        alone.output((made,))
        yield node, alone


class _Type:
    """Stands for a value in the text of a call."""

    def __init__(self, value: Any) -> None:
        self.text = f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    def __repr__(self) -> str:
        return self.text


# --- a module becomes machine code, and runs


def compile(job: dict[str, Any], folder: Path, at: At) -> dict[str, Any]:
    from iree.compiler import compile_file

    at("compiling")
    compile_file(job["source"], output_file=job["out"], extra_args=job["flags"])
    return {}


def run(job: dict[str, Any], folder: Path, at: At) -> dict[str, Any]:
    """FOLDER/case-<k>.safetensors of inputs -> FOLDER/made-<k>.safetensors of outputs."""
    from safetensors.torch import load_file, save_file

    from lwcompile.backends.mlir.runtime import Module

    at("loading")
    module = Module(Path(job["module"]))
    for k, function in enumerate(job["cases"]):
        at(f"running {function}")
        made = module.call(function, load_file(folder / f"case-{k}.safetensors"))
        save_file({name: value.contiguous() for name, value in made.items()}, folder / f"made-{k}.safetensors")
    return {}


JOBS: dict[str, Callable[[dict[str, Any], Path, At], dict[str, Any]]] = {
    "convert": convert,
    "probe": probe,
    "compile": compile,
    "run": run,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
