"""Tracing: a module and example inputs become a `ModelGraph` in canonical form, by torch.export.

Traced at the example's sizes with the named dimensions free. A model that cannot be traced with a free dimension is traced
with torch choosing which stay free; the ones that did not are named in a remark.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from lwcompile.canonical import canonicalize
from lwcompile.errors import BadInput, Refused
from lwcompile.graph import Input, ModelGraph
from lwcompile.store import ParameterStore

Dynamic = Mapping[str, Mapping[int, str]]

_ROOT = re.compile(r"^L\['[^']*'\]\.?")
"""How dynamo writes the module that it was called with."""


def capture_module(
    model: nn.Module,
    example: Mapping[str, Any],
    dynamic: Dynamic | None = None,
    *,
    store: ParameterStore | None = None,
) -> tuple[ModelGraph, list[str]]:
    """Trace `model(**example)`.

    Args:
        example: keyword inputs; tensors become inputs of the graph, everything else is a constant.
        dynamic: input -> dimension -> symbol, e.g. `{"input_ids": {0: "batch", 1: "sequence"}}`.

    Returns:
        the graph, equal to the module to float precision at every size of the free dimensions, and remarks.

    Raises:
        BadInput: the model cannot be traced; the message holds torch's reason.
    """
    store = store if store is not None else ParameterStore()
    model = model.eval()
    exported, remarks = _export(model, dict(example), dynamic or {})
    graph = from_exported(exported, store, dynamic or {})
    if fixed := _fixed(graph, dynamic or {}):
        free = [{d: symbol for d, symbol in i.dynamic.items() if symbol not in fixed} for i in graph.inputs]
        graph.inputs = [replace(i, dynamic=dims) for i, dims in zip(graph.inputs, free)]  # fixed in one input is fixed in all
        remarks = [f"the trace depends on the example's {', '.join(fixed)}, which cannot change"]
    return graph, remarks


def _fixed(graph: ModelGraph, dynamic: Dynamic) -> list[str]:
    """The sizes that were to be free and are not."""
    wished = ((i, dim, symbol) for i in graph.inputs for dim, symbol in dynamic.get(i.name, {}).items())
    return sorted({symbol for i, dim, symbol in wished if dim not in i.dynamic})


def _export(model: nn.Module, example: dict[str, Any], dynamic: Dynamic) -> tuple[ExportedProgram, list[str]]:
    symbols = {name: Dim(name, min=1) for dims in dynamic.values() for name in dims.values()}
    named = _shapes(example, dynamic, lambda name: symbols[name])
    attempts = [(named, ""), (_shapes(example, dynamic, lambda _: Dim.AUTO), "torch chose which sizes stay free")]
    if not dynamic:
        attempts = attempts[:1]
    failures: list[str] = []
    for shapes, remark in attempts:
        try:
            with torch.no_grad(), _quiet():
                exported = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
                return _functional(exported), [remark] if remark else []
        except Exception as error:
            failures.append(f"{type(error).__name__}: {_first_line(error)}")
    raise BadInput(f"cannot trace {type(model).__name__}: {failures[-1]}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"


class _quiet:
    """torch.export and transformers log warnings about tracing that a user can do nothing about."""

    def __enter__(self) -> None:
        self.catch = warnings.catch_warnings()
        self.catch.__enter__()
        warnings.simplefilter("ignore")
        self.level = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *details: object) -> None:
        logging.disable(self.level)
        self.catch.__exit__(None, None, None)


def _shapes(example: dict[str, Any], dynamic: Dynamic, dim: Any) -> dict[str, Any]:
    return {
        name: {d: dim(symbol) for d, symbol in dynamic.get(name, {}).items()} if isinstance(value, Tensor) else None
        for name, value in example.items()
    }


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Decompose only where the trace is not functional ATen yet: it takes twice as long as the trace itself."""
    for node in exported.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        overload = isinstance(node.target, torch._ops.OpOverload)
        if node.op != "call_function" or (overload and node.target._schema.is_mutable) or is_higher_order(node):
            return exported.run_decompositions({})
    return exported


def is_higher_order(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def from_exported(exported: ExportedProgram, store: ParameterStore, dynamic: Dynamic | None = None) -> ModelGraph:
    """Unlift an exported program into canonical form. Its buffers' mutations are dropped: the graph is a pure function."""
    source = exported.graph_module.graph
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    graph, values, inputs = fx.Graph(), {}, []
    tensors: dict[str, str] = {}
    for node in source.nodes:
        if node.op == "placeholder" and specs[node.name].kind == InputKind.USER_INPUT:
            if not isinstance(node.meta.get("val"), Tensor):
                values[node] = node.meta.get("val")
                continue
            values[node] = graph.create_node("placeholder", node.name, name=node.name)
            inputs.append(describe_input(node, dynamic or {}))
        elif node.op == "placeholder":
            target = specs[node.name].target
            if target is None or not isinstance(tensor := _stored(exported, target), Tensor):
                continue
            values[node] = graph.create_node("get_attr", target)
            tensors[target] = store.put(tensor)
        elif node.op == "output":
            break
        elif node.op == "get_attr":
            tensor = getattr(exported.graph_module, str(node.target))
            values[node] = graph.create_node("get_attr", str(node.target))
            tensors[str(node.target)] = store.put(tensor)
        else:
            if is_higher_order(node):
                raise Refused(f"the trace holds control flow ({node.target}), which is not rewritten yet")
            copied = graph.node_copy(node, values.__getitem__)
            copied.meta = {"path": path} if (path := module_path(node)) else {}
            values[node] = copied
    returned = [s.arg.name for s in exported.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    by_name = {n.name: n for n in source.nodes}
    kept = [(k, by_name[n]) for k, n in zip(_output_names(exported, len(returned)), returned) if n in by_name]
    graph.output(tuple(values[n] for _, n in kept))
    model = ModelGraph(graph, tensors, store, inputs, [k for k, _ in kept])
    model.prune()
    canonicalize(model)
    return model


def _stored(exported: ExportedProgram, target: str) -> Any:
    if target in exported.state_dict:
        return exported.state_dict[target]
    return exported.constants.get(target)


def describe_input(node: fx.Node, dynamic: Dynamic) -> Input:
    """The example's sizes; a dimension is free where the trace kept a symbol for it. A symbol may have become a number."""
    value = node.meta["val"]
    sizes = tuple(int(s.node.hint) if isinstance(s, torch.SymInt) else int(s) for s in value.shape)
    wished = dynamic.get(node.name, {})
    symbols = {d: s for d, s in enumerate(value.shape) if isinstance(s, torch.SymInt) and s.node.maybe_as_int() is None}
    free = {d: wished.get(d, str(s.node.expr)) for d, s in symbols.items()}
    return Input(node.name, sizes, value.dtype, free)


def module_path(node: fx.Node) -> str:
    """The innermost module a node was traced in, from any of the tracers' dialects of `nn_module_stack`."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return _ROOT.sub("", list(stack.values())[-1][0])


def _output_names(exported: ExportedProgram, count: int) -> list[str]:
    """Names from the structure the model returned (fields of a model output, keys of a dict), else output0, output1, ..."""
    from torch.utils._pytree import tree_unflatten

    spec = exported.call_spec.out_spec
    if spec is None:
        return [f"output{i}" for i in range(count)]
    value = tree_unflatten(list(range(count)), spec)
    names = [f"output{i}" for i in range(count)]
    for name, item in value.items() if isinstance(value, Mapping) else []:
        if isinstance(item, int) and not isinstance(item, bool):
            names[item] = name
    return names
