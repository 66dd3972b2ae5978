"""Prune MLP: neurons between an MLP's linears leave, with their rows in the linears before and their columns in the one behind.

    down(act(gate(x)) * up(x))    ->  down[:, kept](act(gate[kept](x)) * up[kept](x))
    down(act(up(x)))              ->  down[:, kept](act(up[kept](x)))

`score=taylor` keeps the neurons whose removal would move the model's own predictions most, I_j = E (sum_t h_tj g_tj)^2 over samples,
with g the gradient of the log-likelihood of labels drawn from the model's distribution: the Fisher information of switching h_j off.
`score=energy` is E h_j^2 |down_j|^2. `compensate` refits the kept columns of down to what the removed ones put out: least squares over
the calibration tokens, of which it needs several times as many as there are neurons, or it fits their noise. A `quantize` joined to it
applies to each of the linears.

How much to take where is the plan's: with `ratio=[0.125,0.25,0.5]` on offer, the integer program gives each MLP a ratio by its damage
and its bytes, which for the damage that AMP's bisection MLP by MLP (the largest ratio within a tolerance) adds up to is at least as
small.

Source: AMP (arXiv 2603.08100) for label-free Taylor scores, here of the likelihood instead of the entropy; least squares over the
kept neurons as in Optimal Brain Surgeon (Hassibi and Stork, 1993).
Cost: one forward and backward over the samples for all MLPs, one solve of the kept width an MLP.
Refuses: an MLP whose neurons are anything but elementwise functions of linears with weights of their own (fused gate and up, experts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from lwcompile.context import Context
from lwcompile.contract import StoredTensor, TransformPass
from lwcompile.errors import BadPlan, Refused
from lwcompile.graph import ModelGraph
from lwcompile.passes.transform._factors import stats_for
from lwcompile.passes.transform._neurons import Mlp, find_mlp, taylor_scores, weight_shape
from lwcompile.site import Site, SiteKind

aten = torch.ops.aten


@dataclass(frozen=True)
class PruneMlp(TransformPass):
    """Remove about `ratio` of an MLP's neurons; what is kept is a multiple of `multiple`."""

    name: ClassVar[str] = "prune_mlp"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("mlp",)
    silences: ClassVar[bool] = True
    replaces: ClassVar[bool] = True

    ratio: float = 0.25
    score: Literal["taylor", "energy"] = "taylor"
    compensate: bool = True
    multiple: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1 or self.multiple < 1:
            raise BadPlan(f"prune_mlp needs 0 < ratio < 1 and multiple >= 1, not {self}")

    def check(self, graph: ModelGraph, site: Site) -> None:
        mlp = find_mlp(graph, site)
        if (kept := self._kept(mlp)) >= (width := weight_shape(graph, mlp.down)[1]):
            raise Refused(f"it has {width} neurons, and {kept} would be kept", site=site.id)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        mlp, children = find_mlp(graph, site), self.children(graph, site)
        token = ("prune_mlp", site.id, *(graph.tensors[str(c.weight)] for c in children), str(self.spec()))
        found = ctx.solved(token, lambda: self._solve(graph, site, mlp, ctx))
        kept = found["kept"]
        for call in mlp.ups:
            for stored in call.all_input_nodes[1:]:
                _put(graph, stored, graph.tensor(str(stored.target))[kept].contiguous())
        _put(graph, mlp.down.args[1], found["down"])  # type: ignore[arg-type]
        for node in (*mlp.ups, *mlp.between):
            value = node.meta["val"]
            node.meta["val"] = value.new_empty((*value.shape[:-1], len(kept)))
            if node.target is aten.reshape.default:
                node.args = (node.args[0], [*node.args[1][:-1], len(kept)])  # type: ignore[index,misc]
        origins = {s.node: s for s in ctx.children(site)}
        for child in children:
            ctx.derive(child, origins[child.node], kept if child.node == mlp.down.name else None)
        graph.prune()

    def _solve(self, graph: ModelGraph, site: Site, mlp: Mlp, ctx: Context) -> dict[str, Tensor]:
        down = graph.tensor(str(mlp.down.args[1].target)).double()  # type: ignore[union-attr]
        origin = next(s for s in ctx.children(site) if s.node == mlp.down.name)
        stats = stats_for(graph, origin, ctx, 0.5)
        score = self._score(site, ctx)
        if score is None:
            score = down.square().sum(0) * (1 if stats is None else stats.energy.double())
        order = score.argsort(descending=True, stable=True)
        kept, gone = order[: self._kept(mlp)].sort().values, order[self._kept(mlp) :]
        made = down[:, kept]
        if self.compensate and stats is not None:
            h = stats.hessian.double()
            ridge = 0.01 * h.diagonal().mean() * torch.eye(len(kept), dtype=h.dtype)
            made = made + down[:, gone] @ torch.linalg.solve(h[kept][:, kept] + ridge, h[kept][:, gone]).T
        return {"kept": kept, "down": made.float().contiguous()}

    def _score(self, site: Site, ctx: Context) -> Tensor | None:
        """The Taylor score of each neuron, float64 [F]; None, with a note, where there is nothing to draw labels from."""
        if self.score == "energy":
            return None
        if ctx.program is None or ctx.metric is None or ctx.calibration is None or not ctx.metric.predicts:
            ctx.note(self.name, site.id, "no samples, or no distribution to draw labels from: neurons are judged by their energy")
            return None
        program = ctx.program
        neurons = {}
        for other in ctx.find_structure(program).of_kind("mlp"):
            try:
                neurons[other.id] = other.entry, find_mlp(program.entries[other.entry], other).neurons.name
            except Refused:
                continue
        token = ctx.key(PruneMlp(), program.digest(), "taylor", *neurons)
        scores = ctx.once(token, lambda: ctx.cached_tensors(token, lambda: taylor_scores(program, neurons, ctx)))
        if site.id not in scores:
            ctx.note(self.name, site.id, "the metric reads nothing of it: neurons are judged by their energy")
        return scores.get(site.id)

    def _kept(self, mlp: Mlp) -> int:
        width = mlp.neurons.meta["val"].shape[-1]
        return min(width, -(-max(1, round((1 - self.ratio) * width)) // self.multiple) * self.multiple)

    def children(self, graph: ModelGraph, site: Site) -> list[Site]:
        mlp = find_mlp(graph, site)
        made, kept = [], self._kept(mlp)
        for call in (*mlp.ups, mlp.down):
            (n, k), name = weight_shape(graph, call), str(call.args[1].target)  # type: ignore[union-attr]
            shape = (n, kept) if call is mlp.down else (kept, k)
            path = call.meta.get("path", "")
            made.append(Site(f"{site.id}.{call.name}", "linear", site.id, site.entry, path, call.name, weight=name, shape=shape))
        return made

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        """The linears, and as one tensor all else that the MLP holds: norms and what is left of the biases."""
        mlp, children = find_mlp(graph, site), self.children(graph, site)
        full = [weight_shape(graph, call) for call in (*mlp.ups, mlp.down)]
        beside = site.parameters - sum(n * k for n, k in full)
        beside -= sum((n - c.shape[0]) * (len(call.all_input_nodes) - 2) for call, c, (n, _) in zip(mlp.ups, children, full))
        others = [StoredTensor((beside,))] if beside > 0 else []
        return [*(StoredTensor(child.shape, role="linear") for child in children), *others]


def _put(graph: ModelGraph, read: fx.Node, tensor: Tensor) -> None:
    graph.set_tensor(str(read.target), tensor)
    read.meta["val"] = read.meta["val"].new_empty(tensor.shape)
