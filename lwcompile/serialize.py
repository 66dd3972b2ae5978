"""FX graphs as JSON and back, without pickle.

Targets are written by name and resolved from a closed list: operators registered with torch, and a few Python functions on
sizes. A file can therefore name no function that the list does not hold.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import fx

from lwcompile.errors import BadInput, Refused

_SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in (
        "add",
        "sub",
        "mul",
        "floordiv",
        "truediv",
        "mod",
        "neg",
        "getitem",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "pow",
        "and_",
        "or_",
        "not_",
    )
}
_SIZE_FUNCTIONS |= {f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")}
_SIZE_FUNCTIONS |= {f"builtins.{name}": getattr(builtins, name) for name in ("max", "min", "round", "abs")}
_SIZE_FUNCTIONS |= {
    f"torch.{name}": getattr(torch, name)
    for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_ite", "sym_not", "sym_sum", "sym_sqrt")
    if hasattr(torch, name)
}
_SIZE_NAMES = {function: name for name, function in _SIZE_FUNCTIONS.items()}

_TOUCHES_FILES = ("from_file",)

_TORCH_VALUES: dict[type, str] = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


def target_name(target: object) -> str:
    """The name a call's target is saved under; `Refused` if it is not in the closed list."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if callable(target) and target in _SIZE_NAMES:
        return _SIZE_NAMES[target]
    raise Refused(f"the graph calls {target}, which is neither a torch operator nor arithmetic on sizes")


def resolve_target(name: str) -> Callable[..., Any]:
    if name in _SIZE_FUNCTIONS:
        return _SIZE_FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3:
        raise BadInput(f"the program calls {name!r}, which this version does not know")
    namespace, operation, overload = parts
    _register(namespace)
    try:
        target = getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    except (AttributeError, RuntimeError) as error:
        raise BadInput(f"the program calls {name!r}, which this version of torch does not have") from error
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or operation in _TOUCHES_FILES:
        raise BadInput(f"the program calls {name!r}, which is no operator that computes values from values")
    return target


@cache
def _register(namespace: str) -> None:
    """Import what an installed plugin registers its operators with: see `lwcompile.ops`."""
    for point in entry_points(group="lwcompile.operators", name=namespace):
        point.load()


def encode(value: Any) -> Any:
    """An argument of a node as JSON; nodes become `{"node": name}`."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, tag in _TORCH_VALUES.items():
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    raise Refused(f"the graph holds an argument of type {type(value).__name__}, which cannot be saved")


def decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise BadInput(f"the program holds a value with {len(value)} kinds, not one; it was written by another version")
    ((tag, content),) = value.items()
    if tag == "node":
        return nodes[content]
    if tag == "float":
        return float(content)
    if tag == "device":
        return torch.device(content)
    if tag == "slice":
        return slice(*(decode(v, nodes) for v in content))
    if tag in _TORCH_VALUES.values():
        return torch_value(tag, content)
    raise BadInput(f"the program holds a value of unknown kind {tag!r}; it was written by another version")


def torch_value(tag: str, name: str) -> Any:
    """`torch.<name>`, if that is a dtype, layout or memory format as `tag` says."""
    value = getattr(torch, name, None)
    if _TORCH_VALUES.get(type(value)) != tag:
        raise BadInput(f"the program names {name!r} as a {tag}, which torch does not have")
    return value


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """One dict a node, in order: name, op, target, args, kwargs, and the module path it came from."""
    rows = []
    for node in graph.nodes:
        target = target_name(node.target) if node.op == "call_function" else str(node.target)
        row: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
        if node.args:
            row["args"] = encode(node.args)
        if node.kwargs:
            row["kwargs"] = {key: encode(v) for key, v in node.kwargs.items()}
        if path := node.meta.get("path"):
            row["path"] = path
        rows.append(row)
    return rows


def graph_from_json(rows: list[dict[str, Any]]) -> fx.Graph:
    graph, nodes = fx.Graph(), {}
    for row in rows:
        op, name = row["op"], row["name"]
        if op not in ("placeholder", "get_attr", "call_function", "output"):
            raise BadInput(f"the program's node {name!r} has the unknown kind {op!r}")
        target = resolve_target(row["target"]) if op == "call_function" else row["target"]
        args = tuple(decode(row.get("args", []), nodes))
        kwargs = {key: decode(v, nodes) for key, v in row.get("kwargs", {}).items()}
        node = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise BadInput(f"the program names two nodes {name!r}")
        if "path" in row:
            node.meta["path"] = row["path"]
        nodes[name] = node
    return graph
