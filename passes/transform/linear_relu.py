"""Linear ReLU: attention that reads both ways becomes a sum over ReLU feature maps, and a small convolution of the values.

    softmax(q k) v over all j    ->    f(q_i) sum_j f(k_j) v_j / (f(q_i) sum_j f(k_j) + 1e-6) + (C * v)_i
                                       f(x) = [relu(W x + c), relu(-W x - c)]

C is one kernel a channel: of `taps` x `taps` over an image's patches, beside which class and register tokens stand, or of `taps`
along a sequence. The maps start as the identity and C as nothing; both are fitted to what the softmax puts out for the calibration
samples (attention transfer), `steps` of AdamW on the dense model's activations. There are no tables of positions, so that lengths
stay free. Small models lose much before healing: SLAB trains from scratch.

Source: SLAB's simplified linear attention (arXiv 2405.11582), with learned maps, in pairs as Hedgehog's (arXiv 2402.04347).
Cost: a forward up to the layer over `tokens`, and `steps` forwards and backwards of one attention; again for each time it is scored.
Refuses: causal attention (`linear` carries a state), attention that is no single operator, reads another stream or a part of its
own, or has a mask of unknown rule; and patches that do not stand in rows of known length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lwcompile.attention import RELU, Attention, attentions_at, beside_weights
from lwcompile.attention_cost import AttentionCost, say
from lwcompile.context import Context
from lwcompile.contract import StoredTensor, TransformPass
from lwcompile.errors import BadPlan, Refused
from lwcompile.graph import ModelGraph
from lwcompile.masks import Formula, padding_of
from lwcompile.passes.transform._transfer import Sample, dtype_of, fit, samples, stored_maps
from lwcompile.probe import ancestors, value_inputs
from lwcompile.relu_attention import Maps, attend
from lwcompile.site import Site, SiteKind

aten = torch.ops.aten
NAMES = ("map_query", "map_key", "kernel")
IMAGES = (aten.conv2d.default, aten.conv2d.padding, aten.convolution.default)


@dataclass(frozen=True)
class LinearRelu(TransformPass):
    """ReLU maps and a convolution of `taps` (to each side of an image), fitted in `steps` on about `tokens` calibration tokens."""

    name: ClassVar[str] = "linear_relu"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("attention",)
    conflicts: ClassVar[tuple[str, ...]] = ("window", "linear", "drop")

    taps: int = 5
    steps: int = 200
    tokens: int = 4096
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if self.taps < 1 or self.taps % 2 == 0:
            raise BadPlan(f"linear_relu: taps must be odd, and are {self.taps}")
        if self.steps < 0 or self.tokens < 1 or not 0 < self.learning_rate < 1:
            raise BadPlan(f"linear_relu needs steps >= 0, tokens >= 1 and 0 < learning_rate < 1, not {self}")

    def check(self, graph: ModelGraph, site: Site) -> None:
        self._attention(graph, site)

    def _attention(self, graph: ModelGraph, site: Site) -> tuple[Attention, int, int]:
        """With the positions before the convolved ones, and rows of patches (0: a sequence)."""
        a, *others = attentions_at(graph, site)
        if others:
            raise Refused(f"it holds {1 + len(others)} attentions, and this replaces one", site=site.id)
        if a.features or (a.mask is not None and a.mask.window is not None):
            raise Refused("its attention is narrowed or linear already", site=site.id)
        if a.kind != "self" or a.mask is None:
            reason = "reads another stream" if a.kind != "self" else "follows no known rule"
            raise Refused(f"its attention {reason}", site=site.id)
        if a.mask.causal:
            raise Refused("its attention is causal, and a sum over all positions reads later ones; use linear", site=site.id)
        if a.query.meta["val"].shape[2] != a.key.meta["val"].shape[2]:
            raise Refused("it reads fewer keys than it has queries", site=site.id)
        return (a, *_patches(graph, site, a))

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        a, first, rows = self._attention(graph, site)
        token = ("linear_relu", site.id, str(self.spec()), ctx.seed)
        maps = ctx.solved(token, lambda: self._fit(graph, site, a, ctx, first, rows))
        padding = a.mask.padding if a.mask is not None else None
        open_ = padding_of(Formula(graph, a.node), padding) if padding is not None else None
        with graph.graph.inserting_before(a.node):
            stored = [graph.get_attr(f"{site.id}.linear_relu.{name}", maps[name].to(dtype_of(a))) for name in NAMES]
            call = graph.graph.call_function(RELU, (a.query, a.key, a.value, open_, *stored, first, rows))
        call.meta.update(path=a.node.meta.get("path", ""), val=a.node.meta["val"])
        a.node.replace_all_uses_with(call)
        graph.prune()
        old = AttentionCost(a.heads, a.kv_heads, a.key_width, a.value_width, causal=False)
        taps = self.taps**2 if rows else self.taps
        text, numbers = say(replace(old, window=0, features=2 * a.key_width, taps=taps), old)
        error = {"error": float(maps["error"])} if "error" in maps else {}
        fitted = f"its output is {error['error']:.3g} of its size away from the softmax's on the samples; " if error else ""
        ctx.remark(self.name, site.id, "did", fitted + text, **numbers, **error)

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        a, _, rows = self._attention(graph, site)
        return [*beside_weights(graph, site), *stored_maps(a, *self._shapes(a, rows))]

    def _shapes(self, a: Attention, rows: int) -> list[tuple[int, ...]]:
        maps = [(n, a.key_width + 1, a.key_width) for n in (a.heads, a.kv_heads)]
        return [*maps, (a.kv_heads * a.value_width, 1, *([self.taps] * (2 if rows else 1)))]

    def _fit(self, graph: ModelGraph, site: Site, a: Attention, ctx: Context, first: int, rows: int) -> dict[str, Tensor]:
        eye = torch.eye(a.key_width + 1, a.key_width, device=ctx.device)
        *_, kernel = self._shapes(a, rows)
        query, key = (eye.expand(n, -1, -1).clone() for n in (a.heads, a.kv_heads))
        maps = Maps(query, key, torch.zeros(kernel, device=ctx.device))
        if not self.steps:
            return dict(zip(NAMES, maps))

        def attended(sample: Sample) -> Tensor:
            return attend(*sample[:4], maps, first, rows)

        given = samples(graph, site, a, ctx, self.tokens)
        error = fit(maps, attended, given, self.steps, self.learning_rate, ctx.seed)
        return {**{name: p.detach().cpu() for name, p in zip(NAMES, maps)}, "error": error.cpu()}


def _patches(graph: ModelGraph, site: Site, a: Attention) -> tuple[int, int]:
    """Tokens that stand before the patches, and rows of patches, from the convolution that cut them; (0, 0) where none did."""
    count, above = a.query.meta["val"].shape[2], ancestors(a.query)
    cuts = [n for n in graph.graph.nodes if n in above and n.target in IMAGES and n.meta["val"].dim() == 4]
    if not cuts:
        return 0, 0
    read = value_inputs(graph)[a.query]
    if any(d > 0 for i in graph.inputs if i.name in read for d in i.dynamic):
        raise Refused("the size of its images is free, and so is the length of a row of patches", site=site.id)
    rows, columns = cuts[-1].meta["val"].shape[2:]
    if rows * columns == count:
        return 0, rows
    for node in (n for n in above if n.target is aten.cat.default and n.meta["val"].dim() == 3):
        parts = [part.meta["val"].shape[1] for part in node.args[0]]  # type: ignore[union-attr]
        if sum(parts) == count and parts[-1] == rows * columns:
            return sum(parts[:-1]), rows
    raise Refused(f"its {count} positions are no class tokens before {rows} x {columns} patches", site=site.id)
