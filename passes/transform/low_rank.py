"""Low rank: a linear becomes two thin ones.

    linear(x, W, b)      ->  linear(linear(x, A), B, b)          A [r, K], B [N, r]

B A is the nearest of its rank in the norm of the outputs, E |(W - B A) x|^2 over the calibration tokens (in Frobenius norm without
samples): B holds the leading principal directions of the outputs, and A = B^T W.

Source: SVD-LLM (arXiv 2403.07378), whose whitened SVD has the same optimum; effective rank from D-Rank (arXiv 2509.25622).
Cost: an eigendecomposition of the smaller of N and K a weight. A `quantize` joined to it applies to both factors.
Refuses: a weight that something else reads too (tied, shared), and a rank at which the factors hold no fewer numbers than the weight.
Models a few hundred channels wide gain little: quantization loses less at the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lwcompile.context import Context
from lwcompile.contract import StoredTensor, TransformPass
from lwcompile.errors import BadPlan, Refused
from lwcompile.graph import ModelGraph
from lwcompile.passes.transform._factors import (
    effective_rank,
    energy_rank,
    factor_sites,
    only_call,
    principal,
    stats_for,
    values_of,
)
from lwcompile.site import Site, SiteKind


@dataclass(frozen=True)
class LowRank(TransformPass):
    """Keep `ratio` of a weight's numbers; or so many directions: `rank`, `effective` times the weight's effective rank, or as few as
    hold `energy` of its squared singular values.

    `importance` is the power of the calibration tokens' weights (0: all count alike).
    """

    name: ClassVar[str] = "low_rank"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("linear",)

    ratio: float = 0.5
    rank: int | None = None
    effective: float | None = None
    energy: float | None = None
    importance: float = 0.5

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.rank, self.effective, self.energy)) > 1:
            raise BadPlan("low_rank takes a rank, a multiple of the effective rank, or an energy, not several of them")
        if (
            not 0 < self.ratio < 1
            or (self.rank is not None and self.rank < 1)
            or not (self.effective is None or self.effective > 0)
            or not (self.energy is None or 0 < self.energy <= 1)
        ):
            raise BadPlan(f"low_rank needs 0 < ratio < 1, rank >= 1, effective > 0 and 0 < energy <= 1, not {self}")
        if not 0 <= self.importance <= 1:
            raise BadPlan(f"low_rank takes an importance between 0 and 1, not {self.importance:g}")

    def check(self, graph: ModelGraph, site: Site) -> None:
        only_call(graph, site)
        (n, k), rank = site.shape, self._rank(graph, site)
        if rank * (n + k) >= n * k:
            raise Refused(f"its factors at rank {rank} would hold {rank * (n + k)} numbers, and the weight {n * k}", site=site.id)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        call = only_call(graph, site)
        inner, outer = self._factors(graph, site)
        token = ("low_rank", site.id, graph.tensors[str(site.weight)], str(self.spec()))
        found = ctx.solved(token, lambda: self._solve(graph, site, inner.shape[0], ctx))
        with graph.graph.inserting_before(call):
            a, b = (graph.get_attr(str(s.weight), found[part]) for s, part in ((inner, "a"), (outer, "b")))
            thin = graph.graph.create_node("call_function", call.target, (call.args[0], a), name=inner.node)
        thin.meta.update(path=site.path, val=values_of(call, inner.shape[0]))
        call.args = (thin, b, *call.args[2:])
        graph.prune()
        ctx.derive(inner, site)
        ctx.derive(outer, site, found["a"])

    def _solve(self, graph: ModelGraph, site: Site, rank: int, ctx: Context) -> dict[str, Tensor]:
        weight, stats = graph.tensor(str(site.weight)), stats_for(graph, site, ctx, self.importance)
        b, a = principal(weight, rank, None if stats is None else stats.hessian)
        return {"a": a.to(weight.dtype).contiguous(), "b": b.to(weight.dtype).contiguous()}

    def _rank(self, graph: ModelGraph, site: Site) -> int:
        n, k = site.shape
        if self.rank is not None:
            wanted = self.rank
        elif self.effective is not None:
            wanted = round(self.effective * effective_rank(graph, str(site.weight)))
        elif self.energy is not None:
            wanted = energy_rank(graph, str(site.weight), self.energy)
        else:
            wanted = int(self.ratio * n * k / (n + k))
        return min(max(wanted, 1), n, k)

    def _factors(self, graph: ModelGraph, site: Site) -> tuple[Site, Site]:
        inner, outer = factor_sites(site, self._rank(graph, site))
        return inner, replace(outer, node=site.node)  # the call that stood there now reads B

    def children(self, graph: ModelGraph, site: Site) -> list[Site]:
        return list(self._factors(graph, site))

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        dtype = str(graph.store.dtype(graph.tensors[str(site.weight)])).removeprefix("torch.")
        return [StoredTensor(child.shape, dtype=dtype, role="linear") for child in self._factors(graph, site)]
