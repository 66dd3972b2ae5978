"""What a block or sublayer reads of the stored tensors, call by call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from lwcompile.errors import Refused
from lwcompile.graph import ModelGraph
from lwcompile.residual import NORMS, PRODUCTS, WEIGHTED
from lwcompile.site import Site

aten = torch.ops.aten


class Read(NamedTuple):
    """A call and the names of the stored tensors behind its arguments, through whatever unpacks them."""

    call: fx.Node
    names: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        """Whether it is a layer's product with its weight; other reads are norms, layer scales and constants."""
        target = self.call.target
        return target in (*WEIGHTED, *PRODUCTS, aten.embedding.default) or "grouped_mm" in str(target)


def stored_reads(graph: ModelGraph, site: Site) -> list[Read]:
    """The calls of a block or sublayer that read stored tensors, in order: between the stream before it and its end, with what
    nothing else reads. `Refused` if it is no longer in the graph."""
    nodes = {node.name: node for node in graph.graph.nodes}
    start, end = nodes.get(site.skip), nodes.get(site.end if site.kind == "block" else site.node)
    if start is None or end is None:
        raise Refused("it is no longer in the graph", site=site.id)
    after, needed, own = {start}, {end}, {end}
    for node in graph.graph.nodes:
        if after.intersection(node.all_input_nodes):
            after.add(node)
    for node in reversed(graph.graph.nodes):
        if node in needed and node is not start:
            needed.update(node.all_input_nodes)
            if node in after or (node.op == "call_function" and all(user in own for user in node.users)):
                own.add(node)
    norm = nodes.get(site.end)
    if norm is not None and norm.target in NORMS and end in norm.args[0].all_input_nodes:  # type: ignore[union-attr]
        own.add(norm)
    fixed = _fixed(graph)
    reads = (Read(node, _names(node, fixed)) for node in graph.graph.nodes if node in own and node not in fixed)
    return [read for read in reads if read.names]


def consumers_of(graph: ModelGraph) -> dict[str, list[fx.Node]]:
    """Stored tensor -> the calls that read it, through whatever unpacks it."""
    found: dict[str, list[fx.Node]] = {name: [] for name in graph.tensors}
    fixed = _fixed(graph)
    for node in graph.graph.nodes:
        for name in _names(node, fixed) if node not in fixed else ():
            found[name].append(node)
    return found


def readers_of(graph: ModelGraph, name: str) -> list[Read]:
    """The calls whose first stored tensor is this one, under whatever name, in order."""
    fixed, key = _fixed(graph), graph.tensors[name]
    reads = (Read(node, _names(node, fixed)) for node in graph.graph.nodes if node not in fixed)
    return [read for read in reads if read.names and graph.tensors[read.names[0]] == key]


def _fixed(graph: ModelGraph) -> set[fx.Node]:
    """Stored tensors, and arithmetic on them alone."""
    fixed: set[fx.Node] = set()
    for node in graph.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and sources and fixed.issuperset(sources)):
            fixed.add(node)
    return fixed


def _names(node: fx.Node, fixed: set[fx.Node]) -> tuple[str, ...]:
    if node.op == "get_attr":
        return (str(node.target),)
    return tuple(name for source in node.all_input_nodes if source in fixed for name in _names(source, fixed))
