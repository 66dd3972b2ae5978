"""Parallel: a block, or one sublayer, reads the stream that the one before it read, so that both can run at once.

    x1 = x + f(x), x2 = x1 + g(x1)    ->    x1 = x + f(x), x2 = x1 + g(x)

Within a block the stream still runs from one sublayer to the next, only from x on:

    x2 = x1 + a(x1), x3 = x2 + m(x2)  ->    x2 = x1 + a(x), x3 = x2 + m(x + a(x))

Source: Make Deep Networks Shallow Again (arXiv 2309.08414), which drops the term of second order in h + f(h) + g(h + f(h)).
Cost: none, an addition for each inner sublayer; it saves no weight, but what a runtime can do side by side takes less time.
Refuses: the first of a stream, streams that pass through a norm (post-norm), and what runs beside the one before it already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lwcompile.context import Context
from lwcompile.contract import Needs, TransformPass
from lwcompile.errors import Refused
from lwcompile.graph import ModelGraph
from lwcompile.site import SUBLAYER_KINDS, Site, SiteKind
from lwcompile.structure import Structure

aten = torch.ops.aten


@dataclass(frozen=True)
class Parallel(TransformPass):
    """Feed a block or sublayer what the one before it was fed; both still add to the stream in order."""

    name: ClassVar[str] = "parallel"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("block", *SUBLAYER_KINDS)

    def needs(self, graph: ModelGraph, site: Site, structure: Structure) -> Needs:
        before, own = self._before(site, structure), _sublayers(site, structure)
        self._region(graph, site, own)
        return Needs((before.id, *(s.id for s in (*_sublayers(before, structure), *own) if s.id not in (before.id, site.id))))

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        if ctx.structure is None:
            raise Refused("what stands before it is found by the structure, which the context lacks", site=site.id)
        stream, adds, inside = self._region(graph, site, _sublayers(site, ctx.structure))
        fed = _named(graph, self._before(site, ctx.structure).skip, site)
        for add in adds:
            for node in inside:
                node.replace_input_with(stream, fed)
            if any(add in node.all_input_nodes for node in inside):
                branch = next(n for n in add.all_input_nodes if n is not stream)
                with graph.graph.inserting_before(add):
                    fed = graph.graph.call_function(aten.add.Tensor, (fed, branch))
                fed.meta["path"] = site.path
            stream = add

    def _before(self, site: Site, structure: Structure) -> Site:
        """What ends where `site` begins: a block for a block, a sublayer for a sublayer."""
        kinds = ("block",) if site.kind == "block" else SUBLAYER_KINDS
        found = [s for s in structure.of_kind(*kinds) if s.entry == site.entry and s.end == site.skip]
        if not found:
            raise Refused(f"no {site.kind if site.kind == 'block' else 'sublayer'} stands right before it", site=site.id)
        return found[-1]

    def _region(self, graph: ModelGraph, site: Site, own: list[Site]) -> tuple[fx.Node, list[fx.Node], list[fx.Node]]:
        """The stream before the site, the adds that put its branches on it, and the calls of the branches."""
        start, end = _named(graph, site.skip, site), _named(graph, site.end if site.kind == "block" else site.node, site)
        adds = list(dict.fromkeys(_named(graph, s.end, site) for s in own))
        if any(add.target is not aten.add.Tensor for add in adds):
            raise Refused("the stream passes through a norm behind it (post-norm)", site=site.id)
        inside = [node for node in between(graph, start, end) if node not in adds]
        if not any(start in node.all_input_nodes for node in inside):
            raise Refused("it runs beside the one before it already", site=site.id)
        if leaks := [user.name for node in inside for user in node.users if user not in (*inside, *adds)]:
            raise Refused(f"what it computes is also read by {leaks[0]}", site=site.id)
        return start, adds, inside


def _named(graph: ModelGraph, name: str, site: Site) -> fx.Node:
    for node in graph.graph.nodes:
        if node.name == name:
            return node
    raise Refused("it is no longer in the graph", site=site.id)


def _sublayers(site: Site, structure: Structure) -> list[Site]:
    return [site] if site.kind != "block" else [s for s in structure.children(site.id) if s.kind in SUBLAYER_KINDS]


def between(graph: ModelGraph, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The calls on the ways from one node to another, the end included."""
    after, needed = {start}, {end}
    for node in graph.graph.nodes:
        if after.intersection(node.all_input_nodes):
            after.add(node)
    for node in reversed(graph.graph.nodes):
        if node in needed and node is not start:
            needed.update(node.all_input_nodes)
    return [node for node in graph.graph.nodes if node in after and node in needed and node is not start]
