"""Freeze a norm: each token is divided by a constant instead of its own deviation. What is left is affine, and is folded away.

    linear((x - mean(x)) / s(x) * g + b, W)   ->   linear(x, W diag(g / s) C, W b)            first=same
                                              ->   linear(x * m(position), W diag(g / s) C, W b)   first=own
    anything else that reads it               ->   (x - mean(x)) * (g / s) [* m(position)] + b

C = I - 11'/d takes the mean away (LayerNorm only). s is the mean of the tokens' deviations over the calibration samples, padding
and the first position left out. That position has a constant of its own, since a causal model parks huge values there: m is their
ratio at position 0 and 1 elsewhere, one number a token, which leaves the weights folded.

Source: "Transformers Don't Need LayerNorm at Inference Time" (arXiv 2507.02559), without its healing. Frozen without training,
few norms of a small model come cheap: let damages decide.
Cost: one forward over about `tokens` tokens for all norms together.
Refuses: what a norm over several dimensions or with a computed gain is; `first=own` where tokens are no [batch, sequence, width].
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from lwcompile.context import Context
from lwcompile.contract import StoredTensor, TransformPass
from lwcompile.errors import BadPlan, Refused
from lwcompile.former import Former, leave
from lwcompile.graph import ModelGraph
from lwcompile.masks import Formula
from lwcompile.passes.transform._norms import Norm, by_its_own, fold, new_biases, norm_at, read_norm, readers
from lwcompile.prefix import Cursor
from lwcompile.program import Program
from lwcompile.site import Site, SiteKind

aten = torch.ops.aten
PADDING = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class FreezeNorm(TransformPass):
    """Divide by a constant from the calibration samples.

    first: whether position 0 has a constant of its own. fold: into the linears that read the norm, where nothing else does.
    guard: a token whose own deviation is more than `guard` times its constant is divided by its own over `guard`. That bounds
    what an outlier can do, and computes the deviation again, so that only the gain and shift are saved.
    """

    name: ClassVar[str] = "freeze_norm"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("norm",)

    first: Literal["own", "same"] = "own"
    fold: bool = True
    guard: float | None = None
    tokens: int = 4096

    def __post_init__(self) -> None:
        if self.guard is not None and self.guard < 1:
            raise BadPlan(f"freeze_norm: the guard is at least 1 (a token as wide as the constant), not {self.guard:g}")
        if self.tokens < 1:
            raise BadPlan(f"freeze_norm needs at least one token, not {self.tokens}")

    def check(self, graph: ModelGraph, site: Site) -> None:
        norm = norm_at(graph, site)
        rank = norm.node.meta["val"].dim()
        if self.first == "own" and rank != 3:
            reason = f"its tokens lie in {rank} dimensions, so which come first is not known; offer first=same"
            raise Refused(reason, site=site.id)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        norm = norm_at(graph, site)
        others, first = self._constants(graph, site, ctx)
        into: list[fx.Node] = []
        try:
            into = readers(graph, norm) if self.fold else []
        except Refused as refusal:
            ctx.note(self.name, site.id, f"frozen, and not folded: {refusal.reason}")
        freeze(graph, norm, others, first if self.first == "own" else others, into, self.guard)
        graph.prune()

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        norm = norm_at(graph, site)
        try:
            into = readers(graph, norm) if self.fold else []
        except Refused:
            into = []
        if into:
            return new_biases(graph, norm, into)
        return [StoredTensor((site.shape or norm.node.meta["val"].shape)[-1:]) for name in (norm.gain, norm.shift) if name]

    def _constants(self, graph: ModelGraph, site: Site, ctx: Context) -> tuple[float, float]:
        """The deviation of the tokens at other positions and at the first, in the dense program where it is known."""
        dense = ctx.program
        if dense is None:
            found = deviations(ctx, graph, [site], self.tokens)
        else:
            sites, token = ctx.find_structure(dense).of_kind("norm"), (self.name, self.tokens, dense.digest())
            found = ctx.once(token, lambda: deviations(ctx, dense, sites, self.tokens))
        if not all(math.isfinite(value) and value > 0 for value in found[site.id]):
            raise Refused(f"the calibration samples deviate by {found[site.id]}, which nothing can be divided by", site=site.id)
        return found[site.id]


# --- the constants


def deviations(ctx: Context, program: Program | ModelGraph, sites: Sequence[Site], tokens: int) -> dict[str, tuple[float, float]]:
    """By site id, the mean deviation of the calibration tokens after the first position, and at it; padding is left out."""
    batches = ctx.batches(program, tokens=tokens)
    cursor = Cursor(program, batches, ctx.device)
    ids = {cursor.executor.key(site): site.id for site in sites}
    found: dict[str, tuple[float, float]] = {}
    for key in sorted(ids, key=cursor.executor.position):
        step = cursor.executor.steps[cursor.executor.position(key)]
        norm, given = read_norm(step.node), {i.name for i in step.graph.inputs}
        parts = [norm.deviation(x).cpu() for x in cursor.inputs_at([key])[key]]
        values = torch.cat([part.flatten() for part in parts])
        kind = torch.cat([_kinds(batch, given, part.shape).flatten() for batch, part in zip(batches, parts)])
        means = [(values[kind == wanted] if (kind == wanted).any() else values).mean().item() for wanted in (1, 0)]
        found[ids[key]] = means[0], means[1]
    return found


def _kinds(batch: Mapping[str, Tensor], given: Collection[str], shape: torch.Size) -> Tensor:
    """What each token is: 0 at the first position, 1 after it, -1 padding. In other shapes than [batch, sequence], all are 1."""
    kinds = torch.ones(shape, dtype=torch.int64)
    if len(shape) != 2:
        return kinds
    fitting = {name: tensor for name, tensor in batch.items() if name in given and tensor.shape == shape}
    padding = next((fitting[name] for name in PADDING if name in fitting), None)
    if "position_ids" in fitting:
        kinds[fitting["position_ids"] <= 0] = 0
    elif padding is not None:
        kinds[padding.long().cumsum(1) <= 1] = 0
    else:
        kinds[:, 0] = 0
    return kinds if padding is None else kinds.masked_fill(padding == 0, -1)


# --- the rewrite


def freeze(
    graph: ModelGraph, norm: Norm, others: float, first: float, into: Sequence[fx.Node] = (), guard: float | None = None
) -> None:
    """Replace a norm's division by one by constants, and fold it into the linears `into` that read it, if any are given."""
    call, x = Formula(graph, norm.node), norm.x
    factor = _factor(graph, call, norm, others, first, guard)
    if into:
        fold(graph, norm, into, divisor=others, centre=norm.centred)
    elif norm.centred:
        x = call(aten.sub.Tensor, x, call(aten.mean.dim, x, [-1], True))
    if factor is not None:
        x = call(aten.mul.Tensor, x, factor)
    former = Former(norm.node.name, x.name, norm.x.name, partial(by_its_own, norm.centred, norm.eps, bool(into), others))
    if not into:
        gained, x = _affine(graph, call, norm, x, others)
    leave(into or [gained], former)
    if x is not norm.x:
        x.meta.update(norm.node.meta)
    norm.node.replace_all_uses_with(x)


def _factor(graph: ModelGraph, call: Formula, norm: Norm, others: float, first: float, guard: float | None) -> fx.Node | None:
    """What each token is multiplied with beside 1 / others, [..., 1]; None where that is 1 throughout."""
    factor: fx.Node | None = None
    dtype = norm.node.meta["val"].dtype
    if first != others:
        there = call(aten._to_copy.default, call(aten.unsqueeze.default, _first(graph, call, norm), -1), dtype=dtype)
        factor = call(aten.add.Tensor, call(aten.mul.Tensor, there, others / first - 1), 1.0)
    if guard is None:
        return factor
    x = call(aten.sub.Tensor, norm.x, call(aten.mean.dim, norm.x, [-1], True)) if norm.centred else norm.x
    spread = call(aten.mean.dim, call(aten.mul.Tensor, x, x), [-1], True)
    most = call(aten.mul.Tensor, call(aten.rsqrt.default, call(aten.add.Tensor, spread, norm.eps)), guard * others)
    return call(aten.clamp_max.default, most, 1.0) if factor is None else call(aten.minimum.default, factor, most)


def _first(graph: ModelGraph, call: Formula, norm: Norm) -> fx.Node:
    """Which tokens stand at the first position, bool [batch or 1, sequence]: by the positions given, else by counting."""
    shape = norm.node.meta["val"].shape[:2]
    nodes = graph.input_nodes()
    fitting = {i.name: i for i in graph.inputs if tuple(i.shape) == tuple(shape)}
    if "position_ids" in fitting:
        return call(aten.le.Scalar, nodes["position_ids"], 0)
    if padding := next((name for name in PADDING if name in fitting), None):
        counted = call(aten.cumsum.default, call(aten._to_copy.default, nodes[padding], dtype=torch.int64), 1)
        return call(aten.le.Scalar, counted, 1)
    sizes = [(nodes[i.name], d) for i in graph.inputs for d in i.dynamic if d > 0 and i.shape[d] == shape[1]]
    length = call.size(*(sizes[0] if sizes else (norm.x, 1)))
    return call(aten.unsqueeze.default, call(aten.eq.Scalar, call(aten.arange.default, length), 0), 0)


def _affine(graph: ModelGraph, call: Formula, norm: Norm, x: fx.Node, divisor: float) -> tuple[fx.Node, fx.Node]:
    """x / divisor * gain, and that + shift, in the open."""
    if norm.gain is None:
        x = call(aten.mul.Tensor, x, 1 / divisor)
    else:
        gain = graph.tensor(norm.gain)
        with graph.graph.inserting_before(norm.node):
            name = graph.fresh_name(f"{norm.gain}.frozen")
            read = graph.get_attr(name, (gain.double() / divisor).to(gain.dtype))
        x = call(aten.mul.Tensor, x, read)
    if norm.shift is None:
        return x, x
    with graph.graph.inserting_before(norm.node):
        return x, call(aten.add.Tensor, x, graph.get_attr(norm.shift))
