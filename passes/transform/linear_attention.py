"""Linear: attention keeps its softmax for the nearest positions, and reads all others through feature maps.

    sum_j<=i exp(q_i k_j) v_j                     y_i: softmax over i - window < j <= i,
    -------------------------    ->    linear attention f(q_i) f(k_j) over what is further away,
    sum_j<=i exp(q_i k_j)              under one normaliser, the softmax weighed by a gate per head

The maps start as the identity and are fitted with the gates to what the softmax attention puts out for the calibration samples, one
layer at a time on the dense model's activations (attention transfer): `steps` of AdamW over sequences in an order that the seed gives.
Samples no longer than the window teach nothing. Keys share their map where queries share a key-value head. Decoding keeps
`window - 1` positions and one state a layer; a sequence no longer than the window comes out as it did.

Source: LoLCATs (arXiv 2410.10254), with a window that slides instead of tiles; the maps are Hedgehog's (arXiv 2402.04347).
Cost: a forward up to the layer over `tokens`, and `steps` forwards and backwards of one attention; again for each time it is scored.
Refuses: attention that is no single operator, reads another stream or later positions, or has a window or a mask of unknown rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lwcompile.attention import HYBRID, Attention, attentions_at, beside_weights
from lwcompile.attention_cost import AttentionCost, say
from lwcompile.context import Context
from lwcompile.contract import StoredTensor, TransformPass
from lwcompile.errors import BadPlan, Refused
from lwcompile.graph import ModelGraph
from lwcompile.linear_attention import GATE, Maps, attend
from lwcompile.masks import Formula, padding_of
from lwcompile.passes.transform._transfer import Sample, dtype_of, fit, samples, scale_of, stored_maps
from lwcompile.site import Site, SiteKind

NAMES = ("map_query", "map_key", "gate")


@dataclass(frozen=True)
class Linear(TransformPass):
    """Softmax over `window` positions and feature maps for the rest, fitted in `steps` on about `tokens` calibration tokens."""

    name: ClassVar[str] = "linear"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("attention",)
    conflicts: ClassVar[tuple[str, ...]] = ("window", "drop")

    window: int = 64
    steps: int = 200
    tokens: int = 4096
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("steps", 0), ("tokens", 1)):
            if getattr(self, name) < least:
                raise BadPlan(f"linear: {name} must be at least {least}, and is {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            raise BadPlan(f"linear: learning_rate must be between 0 and 1, and is {self.learning_rate}")

    def check(self, graph: ModelGraph, site: Site) -> None:
        self._attention(graph, site)

    def _attention(self, graph: ModelGraph, site: Site) -> Attention:
        a, *others = attentions_at(graph, site)
        if others:
            raise Refused(f"it holds {1 + len(others)} attentions, and this replaces one", site=site.id)
        if a.kind != "self" or a.mask is None or not a.mask.causal:
            what = "reads another stream" if a.kind != "self" else "reads later positions" if a.mask else "follows no known rule"
            beside = " (linear_relu reads both ways)" if a.kind == "self" and a.mask else ""
            raise Refused(f"its attention {what}; only causal attention has a state to carry{beside}", site=site.id)
        if a.mask.window is not None or a.features:
            raise Refused("its attention is narrowed or linear already", site=site.id)
        return a

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        a = self._attention(graph, site)
        assert a.mask is not None
        token = ("linear", site.id, str(self.spec()), ctx.seed)
        maps = ctx.solved(token, lambda: self._fit(graph, site, a, ctx))
        open_ = padding_of(Formula(graph, a.node), a.mask.padding) if a.mask.padding is not None else None
        with graph.graph.inserting_before(a.node):
            stored = [graph.get_attr(f"{site.id}.linear.{name}", maps[name].to(dtype_of(a))) for name in NAMES]
            args = (a.query, a.key, a.value, open_, None, *stored, self.window, scale_of(a))
            call = graph.graph.call_function(HYBRID, args)
        call.meta.update(path=a.node.meta.get("path", ""), val=a.node.meta["val"])
        a.node.replace_all_uses_with(call)
        graph.prune()
        old = AttentionCost(a.heads, a.kv_heads, a.key_width, a.value_width)
        new = AttentionCost(a.heads, a.kv_heads, a.key_width, a.value_width, self.window, features=2 * a.key_width)
        text, numbers = say(new, old)
        error = {"error": float(maps["error"])} if "error" in maps else {}
        fitted = f"its output is {error['error']:.3g} of its size away from the softmax's on the samples; " if error else ""
        ctx.remark(self.name, site.id, "did", fitted + text, **numbers, **error)

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        a = self._attention(graph, site)
        maps = [(n, a.key_width, a.key_width) for n in (a.heads, a.kv_heads)]
        return [*beside_weights(graph, site), *stored_maps(a, *maps, (a.heads,))]

    # --- attention transfer

    def _fit(self, graph: ModelGraph, site: Site, a: Attention, ctx: Context) -> dict[str, Tensor]:
        eye = torch.eye(a.key_width, device=ctx.device)
        gate = torch.full((a.heads,), GATE, device=ctx.device)
        maps = Maps(eye.expand(a.heads, -1, -1).clone(), eye.expand(a.kv_heads, -1, -1).clone(), gate)
        if not self.steps:
            return dict(zip(NAMES, maps))
        given = self._samples(graph, site, a, ctx)
        scale = scale_of(a)

        def attended(sample: Sample) -> Tensor:
            return attend(*sample[:4], None, maps, self.window, scale)

        error = fit(maps, attended, given, self.steps, self.learning_rate, ctx.seed)
        return {**{name: p.detach().cpu() for name, p in zip(NAMES, maps)}, "error": error.cpu()}

    def _samples(self, graph: ModelGraph, site: Site, a: Attention, ctx: Context) -> list[Sample]:
        """Sequence by sequence, those with more positions than the window."""
        batches = [b for b in samples(graph, site, a, ctx, self.tokens) if b.query.shape[2] > self.window]
        rows = [(b, slice(i, i + 1)) for b in batches for i in range(len(b.query))]
        if not rows:
            raise Refused(
                f"no calibration sample is longer than its window of {self.window}, so nothing can be fitted", site=site.id
            )
        return [Sample(*(None if tensor is None else tensor[row] for tensor in batch)) for batch, row in rows]  # type: ignore[arg-type]
