"""Window: attention reads only the nearest positions, and a few first ones.

    softmax(q k) v over j <= i    ->  softmax(q k) v over i - size < j <= i and j < sinks      (a decoder)
    softmax(q k) v over all j     ->  softmax(q k) v over |i - j| < size, i < sinks or j < sinks   (an encoder)

The operator stays, its mask changes. A sequence no longer than the window comes out as it did. The first `sinks` positions, behind
left padding, are open to all: a decoder's attention sinks, or an encoder's global tokens, such as a class token, which also read
all. In an image, distance counts along the rows of patches. Decoding keeps `size - 1 + sinks` positions a layer in a cache that
rolls. ONNX files compute near keys only, a block of queries at a time, unless an encoder has sinks; elsewhere a prompt is masked,
and costs what it did.

Source: windows and global tokens as in Longformer (arXiv 2004.05150), sinks as in StreamingLLM (arXiv 2309.17453); as one choice
among others at a layer, LayerBoost (arXiv 2604.22050).
Cost: none; no weight changes.
Refuses: attention that is no single operator, that reads another stream, whose mask follows no known rule, or that has such a
window already; and fixed lengths within the window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lwcompile.attention import Attention, attentions_at, beside_weights, lengths, set_slots
from lwcompile.attention_cost import AttentionCost, say
from lwcompile.context import Context
from lwcompile.contract import StoredTensor, TransformPass
from lwcompile.errors import BadPlan, Refused
from lwcompile.graph import ModelGraph
from lwcompile.masks import Formula, MaskRule, build
from lwcompile.site import Site, SiteKind


@dataclass(frozen=True)
class Window(TransformPass):
    """Let attention read `size` positions, its own among them, and the first `sinks` of the sequence."""

    name: ClassVar[str] = "window"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("attention",)
    conflicts: ClassVar[tuple[str, ...]] = ("linear", "drop")

    size: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.size < 2:
            raise BadPlan(f"window: size must be at least 2, and is {self.size}")
        if not 0 <= self.sinks < self.size:
            raise BadPlan(f"window: sinks must be at least 0 and fewer than the window's {self.size}, and are {self.sinks}")

    def check(self, graph: ModelGraph, site: Site) -> None:
        for a in attentions_at(graph, site):
            self._rule(graph, site, a)

    def _rule(self, graph: ModelGraph, site: Site, a: Attention) -> MaskRule:
        if a.kind != "self":
            raise Refused("it reads another stream, where no position is near", site=site.id)
        if a.features:
            raise Refused("its attention is linear outside a window already", site=site.id)
        if a.mask is None:
            raise Refused("its mask follows no rule that is known, so it cannot be narrowed", site=site.id)
        if a.mask.window is not None and a.mask.window <= self.size:
            raise Refused(f"it has a window of {a.mask.window} already", site=site.id)
        length, free = a.query.meta["val"].shape[2], any(d > 0 for i in graph.inputs for d in i.dynamic)
        if length <= self.size and not free:
            raise Refused(f"its {length} positions are always within the window", site=site.id)
        return replace(a.mask, window=self.size, sinks=self.sinks)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        for a in attentions_at(graph, site):
            rule, call = self._rule(graph, site, a), Formula(graph, a.node)
            set_slots(a.node, attn_mask=build(call, rule, *lengths(graph, a, call)), is_causal=False)
            before = a.mask.window if a.mask else None
            old = AttentionCost(a.heads, a.kv_heads, a.key_width, a.value_width, before, causal=rule.causal)
            text, numbers = say(replace(old, window=self.size, sinks=self.sinks), old)
            ctx.remark(self.name, site.id, "did", text, **numbers)
        graph.prune()

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        return beside_weights(graph, site)
