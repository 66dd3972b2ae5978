"""Drop: a sublayer, or a block with all its sublayers, leaves the residual stream.

    x' = x + f(norm(x))      ->  x' = x
    x' = norm(x + f(x))      ->  x' = x       (post-norm: the norm goes with its sublayer)
    x' = x + f(x) + g(x)     ->  x' = x + g(x)

Source: LLM-Drop (arXiv 2406.15786; the norm goes with its sublayer), ShortGPT (arXiv 2403.03853) for blocks.
Cost: none; the branch's nodes and weights are gone.
Refuses: one of several parallel branches under one post-norm, and a branch that is read outside its residual add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lwcompile.context import Context
from lwcompile.contract import TransformPass
from lwcompile.errors import Refused
from lwcompile.graph import ModelGraph
from lwcompile.residual import NORMS
from lwcompile.site import SUBLAYER_KINDS, Site, SiteKind

aten = torch.ops.aten


@dataclass(frozen=True)
class Drop(TransformPass):
    """Remove a sublayer or a block; what flows around it is the residual stream."""

    name: ClassVar[str] = "drop"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("block", *SUBLAYER_KINDS)
    silences: ClassVar[bool] = True

    def check(self, graph: ModelGraph, site: Site) -> None:
        if site.kind != "block":
            self._add(graph, site)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        if site.kind != "block":
            self._drop(graph, site)
        else:
            for sublayer in ctx.children(site):
                if sublayer.kind in SUBLAYER_KINDS:
                    self._drop(graph, sublayer)
        graph.prune()

    def _drop(self, graph: ModelGraph, site: Site) -> None:
        add, rest = self._add(graph, site)
        after = add
        end = _named(graph, site.end)
        if end is not None and end.target in NORMS and end.args[0] is add:
            after = end
        after.replace_all_uses_with(rest)
        graph.graph.erase_node(after)
        if after is not add:
            graph.graph.erase_node(add)

    def _add(self, graph: ModelGraph, site: Site) -> tuple[fx.Node, fx.Node]:
        """The add that puts the branch back on the stream, and its other operand."""
        branch = _named(graph, site.node)
        if branch is None:
            raise Refused("it is no longer in the graph", site=site.id)
        users = list(branch.users)
        if len(users) != 1 or users[0].target is not aten.add.Tensor:
            readers = ", ".join(user.name for user in users)
            raise Refused(f"its output is read by {readers}, not by one residual add alone", site=site.id)
        add = users[0]
        rest = add.args[1] if add.args[0] is branch else add.args[0]
        if not isinstance(rest, fx.Node) or rest is branch:
            raise Refused("its residual add has no other operand", site=site.id)
        end = _named(graph, site.end)
        if end is not None and end.target in NORMS and end.args[0] is not add:
            raise Refused("it is one of several parallel branches under one norm", site=site.id)
        return add, rest


def _named(graph: ModelGraph, name: str) -> fx.Node | None:
    return next((node for node in graph.graph.nodes if node.name == name), None)
