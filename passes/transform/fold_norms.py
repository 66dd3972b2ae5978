"""Fold norms: a norm's gain and shift move into the linears that read it; what is left divides and centres, and stores nothing.

    linear(norm(x) * g + s, W, b)   ->   linear(norm(x), W diag(g), b + W s)

Source: the rewrite that offline rotations start from (SliceGPT, arXiv 2401.15024).
Cost: none; one tensor less for each gain and shift, and a bias more for a linear that had none and meets a shift.
Refuses: norms that anything but linears reads (a residual add, an output, rotary positions), and linears whose weights are read
elsewhere too (a head tied to the embedding) or are packed already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lwcompile.context import Context
from lwcompile.contract import StoredTensor, TransformPass
from lwcompile.errors import Refused
from lwcompile.graph import ModelGraph
from lwcompile.passes.transform._norms import fold, new_biases, norm_at, readers
from lwcompile.site import Site, SiteKind


@dataclass(frozen=True)
class FoldNorms(TransformPass):
    """Fold the affine part of a LayerNorm or RMSNorm into the linears behind it."""

    name: ClassVar[str] = "fold_norms"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("norm",)
    exact: ClassVar[bool] = True

    def check(self, graph: ModelGraph, site: Site) -> None:
        norm = norm_at(graph, site)
        if norm.gain is None and norm.shift is None:
            raise Refused("it has neither gain nor shift to fold", site=site.id)
        readers(graph, norm)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        norm = norm_at(graph, site)
        fold(graph, norm, readers(graph, norm))
        bare = (norm.x, norm.node.args[1], None, *([None] if norm.centred else []), norm.eps)
        norm.node.args, norm.node.kwargs = bare, {}
        graph.prune()

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        norm = norm_at(graph, site)
        return new_biases(graph, norm, readers(graph, norm))
