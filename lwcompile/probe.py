"""Run a piece of a graph on small inputs: what a subgraph does decides what it is, not how it is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from lwcompile.graph import ModelGraph

aten = torch.ops.aten


def ancestors(node: fx.Node, stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """`node` and everything it is computed from, not looking behind the nodes in `stop`."""
    halted, seen, stack = set(stop), set(), [node]
    while stack:
        if (current := stack.pop()) not in seen:
            seen.add(current)
            stack += [] if current in halted else current.all_input_nodes
    return seen


def values_above(node: fx.Node, stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """What `node` is computed from by value: like `ancestors`, not looking behind sizes either."""
    halted, seen, stack = set(stop), set(), [node]
    while stack:
        if (current := stack.pop()) not in seen:
            seen.add(current)
            stack += [] if current in halted or current.target is aten.sym_size.int else current.all_input_nodes
    return seen


def evaluate(
    graph: ModelGraph, node: fx.Node, feeds: Mapping[fx.Node, Tensor], constants: Mapping[int, int] | None = None
) -> Any:
    """The value of `node` for the given values of inner nodes or inputs; `constants` replaces integer arguments."""
    needed = ancestors(node, feeds)
    values: dict[fx.Node, Any] = dict(feeds)
    swap = constants or {}

    def resolve(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return values[argument]
        return swap.get(argument, argument) if type(argument) is int else argument

    with torch.no_grad():
        for current in graph.graph.nodes:
            if current not in needed or current in values:
                continue
            if current.op == "get_attr":
                values[current] = graph.tensor(str(current.target))
                continue
            args, kwargs = map_aggregate(current.args, resolve), map_aggregate(current.kwargs, resolve)
            values[current] = current.target(*args, **kwargs)  # type: ignore[operator,misc]
            if current is node:
                break
    return values[node]


def value_inputs(graph: ModelGraph) -> dict[fx.Node, frozenset[str]]:
    """For each node, the inputs whose values (not merely sizes) it depends on."""
    reads: dict[fx.Node, frozenset[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            reads[node] = frozenset((str(node.target),))
        elif node.target is aten.sym_size.int:
            reads[node] = frozenset()
        else:
            reads[node] = frozenset().union(*(reads[source] for source in node.all_input_nodes))
    return reads


def symbols(graph: ModelGraph) -> tuple[list[str], list[str]]:
    """The free sizes: those that are some input's first dimension (batches), and the others (lengths)."""
    batches = sorted({i.dynamic[0] for i in graph.inputs if 0 in i.dynamic})
    lengths = sorted({s for i in graph.inputs for s in i.dynamic.values()} - set(batches))
    return batches, lengths


def sizes_at(graph: ModelGraph, batch: int, length: int) -> dict[str, int]:
    """A value for every free size; no two lengths are equal."""
    batches, lengths = symbols(graph)
    return dict.fromkeys(batches, batch) | {symbol: length + 2 * i for i, symbol in enumerate(lengths)}


def zeros(graph: ModelGraph, sizes: Mapping[str, int]) -> dict[fx.Node, Tensor]:
    """An all-zero tensor for each input, at these sizes."""
    nodes = graph.input_nodes()
    return {
        nodes[i.name]: torch.zeros([sizes.get(i.dynamic.get(d, ""), n) for d, n in enumerate(i.shape)], dtype=i.dtype)
        for i in graph.inputs
    }
