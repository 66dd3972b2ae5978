"""Latent: decoding caches a few numbers that keys and values follow from, in their place.

    k = W_k x, v = W_v x    ->    c = A x,  k = B_k c,  v = B_v c          the cache holds c, [r] a token and layer

B A is the nearest of its rank to [W_k; W_v] in the norm of the outputs over the calibration tokens, keys and values each counted
relative to their own size. `joint=false` caches one latent of keys and one of values, of half the numbers each, whose upper factors
are half as wide. Rotary positions and norms of keys come after B_k, so what is cached knows no position; the positions of the past
are cached beside it, once for all layers. Key-value heads stay as few as they are. Each step computes the keys and values of the
whole past anew, 2 r (heads d) products a past token: a saving of memory, paid for in work. A `quantize` joined to it applies to the
factors and to the attention's other linears.

Source: CSKV (arXiv 2409.10593) for latents before rotation; X-EcoMLA (arXiv 2503.11132) for one decomposition of keys and values.
Cost: an eigendecomposition of the smaller side of the stacked weights.
Refuses: attention that is not causal or is behind a window (whose cache is bounded already), keys or values whose product is fused
with others or shared, and ranks that save nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from lwcompile.attention import SDPA, Attention, attentions_at, beside_weights
from lwcompile.attention_cost import AttentionCost, say
from lwcompile.context import Context
from lwcompile.contract import StoredTensor, TransformPass
from lwcompile.errors import BadPlan, Refused
from lwcompile.graph import ModelGraph
from lwcompile.passes.transform._factors import only_call, principal, stats_for, values_of
from lwcompile.probe import ancestors
from lwcompile.site import Site, SiteKind

aten = torch.ops.aten


class Part(NamedTuple):
    """One latent: the linears [n, K] that follow from it, and its width."""

    calls: tuple[fx.Node, ...]
    rank: int


@dataclass(frozen=True)
class Latent(TransformPass):
    """Cache `ratio` of the numbers that keys and values take, or `rank` numbers; in one latent, or one each of keys and values.

    `importance` is the power of the calibration tokens' weights (0: all count alike).
    """

    name: ClassVar[str] = "latent"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("attention",)
    silences: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    conflicts: ClassVar[tuple[str, ...]] = ("window", "linear", "drop")

    ratio: float = 0.5
    rank: int | None = None
    joint: bool = True
    importance: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1 or (self.rank is not None and self.rank < 2) or not 0 <= self.importance <= 1:
            raise BadPlan(f"latent needs 0 < ratio < 1, rank >= 2 and 0 <= importance <= 1, not {self}")

    def check(self, graph: ModelGraph, site: Site) -> None:
        self._parts(graph, site)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        a, parts = self._parts(graph, site)
        revived = sum(part.rank * _shape(graph, call)[0] for part in parts for call in part.calls)
        children = iter(self.children(graph, site))
        origins = {s.node: s for s in ctx.children(site)}
        for part in parts:
            down, origin = next(children), origins[part.calls[0].name]
            token = ("latent", down.id, *(graph.tensors[_weight(call)] for call in part.calls), str(self.spec()))
            found = ctx.solved(token, lambda part=part, origin=origin: self._solve(graph, origin, part, ctx))
            head = _narrow(graph, down, found["a"], part)
            ctx.derive(down, origin)
            for call in part.calls:
                up = next(children)
                ctx.derive(up, origin, found["a"])
                _widen(graph, up, found[call.name], call, head)
        for child in children:
            ctx.derive(child, origins[child.node])
        graph.prune()
        after = attentions_at(graph, site)[0]
        if after.key_latent is None or after.value_latent is None:
            raise Refused("its keys or values read more of the stream than one product", site=site.id)
        old = AttentionCost(a.heads, a.kv_heads, a.key_width, a.value_width)
        text, numbers = say(replace(old, latent=sum(part.rank for part in parts), revived=revived), old)
        ctx.remark(self.name, site.id, "did", text, **numbers)

    def _parts(self, graph: ModelGraph, site: Site) -> tuple[Attention, list[Part]]:
        a, *others = attentions_at(graph, site)
        if others or a.kind != "self" or a.node.target is not SDPA or a.mask is None or not a.mask.causal:
            raise Refused("it is no causal attention of one operator, which alone has a cache to shrink", site=site.id)
        if a.mask.window is not None:
            raise Refused(f"its cache holds no more than the {a.mask.window} positions of its window", site=site.id)
        if a.key_latent is not None or a.value_latent is not None:
            raise Refused("it caches a latent already", site=site.id)
        key, value = (_product(graph, site, node) for node in (a.key, a.value))
        if key is value or key.args[0] is not value.args[0] or key in ancestors(a.query):
            raise Refused("its queries, keys and values are no products of their own of one input", site=site.id)
        (n, k), m = _shape(graph, key), _shape(graph, value)[0]
        rank = self.rank if self.rank is not None else max(2, round(self.ratio * (n + m)))
        rank = min(rank, k) if self.joint and self.rank is None else rank  # all that there is to know
        parts = [Part((key, value), rank)] if self.joint else [Part((key,), rank // 2), Part((value,), rank - rank // 2)]
        most = [min(k, n + m)] if self.joint else [min(k, n), min(k, m)]
        if rank >= n + m or any(part.rank > limit for part, limit in zip(parts, most)):
            raise Refused(f"{rank} numbers a token are more than it takes, or no fewer than the {n + m} now", site=site.id)
        return a, parts

    def _solve(self, graph: ModelGraph, origin: Site, part: Part, ctx: Context) -> dict[str, Tensor]:
        stats = stats_for(graph, origin, ctx, self.importance)
        hessian = None if stats is None else stats.hessian.double()
        weights = [graph.tensor(_weight(call)).double() for call in part.calls]
        sizes = [(w.square() if hessian is None else (w @ hessian) * w).sum().clamp_min(1e-30).sqrt() for w in weights]
        b, a = principal(torch.cat([w / size for w, size in zip(weights, sizes)]), part.rank, hessian)
        uppers = zip(part.calls, b.split([len(w) for w in weights]), sizes)
        dtype = graph.tensor(_weight(part.calls[0])).dtype
        made = {"a": a, **{call.name: upper * size for call, upper, size in uppers}}
        return {name: factor.to(dtype).contiguous() for name, factor in made.items()}

    def children(self, graph: ModelGraph, site: Site) -> list[Site]:
        """Of each latent A and its B, then the sublayer's other linears."""
        _, parts = self._parts(graph, site)
        made: list[Site] = []
        for part in parts:
            first = part.calls[0]
            word = "latent" if self.joint else f"{first.name}_latent"
            down = _child(
                site, first, f"{site.id}.{word}".replace(".", "_"), f"{_weight(first)}.a", (part.rank, _shape(graph, first)[1])
            )
            made.append(replace(down, id=f"{site.id}.{word}", path=site.path))
            for call in part.calls:
                shape = (_shape(graph, call)[0], part.rank)
                made.append(_child(site, call, f"{call.name}_b", f"{_weight(call)}.b", shape))
        taken = {call for part in parts for call in part.calls}
        return made + [_child(site, c, c.name, _weight(c), _shape(graph, c)) for c in _linears(graph, site) if c not in taken]

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        weights = (StoredTensor(child.shape, role="linear") for child in self.children(graph, site))
        return [*weights, *beside_weights(graph, site)]


def _product(graph: ModelGraph, site: Site, node: fx.Node) -> fx.Node:
    """The linear [B, S, K] -> [B, S, n] that keys or values are made of."""
    linears = {n for n in ancestors(node) if n.target is aten.linear.default}
    nearest = linears - {above for n in linears for above in ancestors(n) - {n}}
    if len(nearest) != 1:
        raise Refused(f"its keys or values are made of {len(nearest)} products, not of one", site=site.id)
    (call,) = nearest
    stored, value = call.args[1], call.args[0].meta["val"]  # type: ignore[union-attr]
    if not isinstance(stored, fx.Node) or stored.op != "get_attr" or value.dim() != 3:
        raise Refused(f"{call.format_node()} is no product of a stored weight with [batch, length, width]", site=site.id)
    only_call(graph, _child(site, call, call.name, _weight(call), _shape(graph, call)))
    return call


def _linears(graph: ModelGraph, site: Site) -> list[fx.Node]:
    stops = {node for node in graph.graph.nodes if node.name == site.skip}
    within = ancestors(graph.node(site.node), stops)
    return [n for n in graph.graph.nodes if n in within and n.target is aten.linear.default and n.args[1].op == "get_attr"]


def _narrow(graph: ModelGraph, down: Site, weight: Tensor, part: Part) -> fx.Node:
    """c = A x, laid out as one head of a cache: [B, 1, S, r]."""
    first = min(part.calls)
    with graph.graph.inserting_before(first):
        args = (first.args[0], graph.get_attr(str(down.weight), weight))
        thin = graph.graph.create_node("call_function", aten.linear.default, args, name=down.node)
        head = graph.graph.call_function(aten.unsqueeze.default, (thin, 1))
    value = values_of(first, part.rank)
    for node, fake in ((thin, value), (head, value.unsqueeze(1))):  # type: ignore[attr-defined]
        node.meta.update(path=down.path, val=fake)
    return head


def _widen(graph: ModelGraph, up: Site, weight: Tensor, call: fx.Node, head: fx.Node) -> None:
    """B c in the place of W x: the call's node becomes the reshaping behind, and goes on standing for what it puts out."""
    with graph.graph.inserting_before(call):
        args = (head, graph.get_attr(str(up.weight), weight), *call.args[2:])
        wide = graph.graph.create_node("call_function", aten.linear.default, args, name=up.node)
    wide.meta.update(path=call.meta.get("path", ""), val=call.meta["val"].unsqueeze(1))
    call.target, call.args = aten.squeeze.dim, (wide, 1)


def _child(site: Site, call: fx.Node, node: str, weight: str, shape: tuple[int, int]) -> Site:
    path = call.meta.get("path", "")
    return Site(f"{site.id}.{node}", "linear", site.id, site.entry, path, node, weight=weight, shape=shape)


def _weight(call: fx.Node) -> str:
    return str(call.args[1].target)  # type: ignore[union-attr]


def _shape(graph: ModelGraph, call: fx.Node) -> tuple[int, int]:
    n, k = graph.store.shape(graph.tensors[_weight(call)])
    return n, k
