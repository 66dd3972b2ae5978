"""Quantize: a stored matrix becomes packed codes that are unpacked where they are read.

    linear(x, W, b)      ->  linear(x, dequantize(codes, scale, zero), b)
    embedding(W, ids)    ->  embedding(dequantize(codes, scale, zero), ids)

Every call that reads the tensor changes with it, so tied embeddings and heads stay tied.

Source: affine grids by group; the values are found by a solver (GPTQ, HQQ, round to nearest, or a plugin's).
Cost: the solver's, once per tensor.
Refuses: a tensor that is not a matrix, holds NaN, or is read by anything but linears and embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import fx

from lwcompile.context import Context
from lwcompile.contract import Solver, StoredTensor, TransformPass
from lwcompile.errors import Refused
from lwcompile.formats import NumericFormat
from lwcompile.graph import ModelGraph
from lwcompile.registry import make
from lwcompile.site import Site, SiteKind
from lwcompile.spec import Spec
from lwcompile.stats import InputStats

aten = torch.ops.aten


@dataclass(frozen=True)
class Quantize(TransformPass):
    """Give a weight `bits` per code and one scale per `group_size` input channels (none: per output channel).

    `symmetric` leaves the zero point out; `zero_point` is `integer` (a code) or `float`. `solver` finds the values.
    """

    name: ClassVar[str] = "quantize"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("linear", "embedding")
    structural: ClassVar[bool] = False

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    zero_point: Literal["integer", "float"] = "integer"
    scale_dtype: Literal["float16", "float32"] = "float16"
    solver: Spec = field(default=Spec("gptq"))

    def __post_init__(self) -> None:
        _ = self.format

    @property
    def format(self) -> NumericFormat:
        return NumericFormat(self.bits, self.group_size, "none" if self.symmetric else self.zero_point, self.scale_dtype)

    def check(self, graph: ModelGraph, site: Site) -> None:
        if site.weight is None or len(site.shape) != 2:
            raise Refused("it has no stored matrix", site=site.id)
        if site.weight not in graph.tensors:
            return
        for read in graph.uses(site.weight):
            for user in read.users:
                whole = (user.target is aten.linear.default and user.args[1] is read) or (
                    user.target is aten.embedding.default and user.args[0] is read
                )
                if not whole:
                    raise Refused(f"its weight is also read by {user.format_node()}", site=site.id)
        if not torch.isfinite(graph.tensor(site.weight)).all():
            raise Refused("its weight holds NaN or infinity", site=site.id)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        assert site.weight is not None
        if site.weight not in graph.tensors:  # a tied site was quantized first, and this one with it
            return
        reads = graph.uses(site.weight)
        token = ("quantize", site.id, graph.tensors[site.weight], str(self.spec()))
        packed = ctx.solved(token, lambda: self._solve(graph, site, ctx))
        names = {part: f"{site.weight}.{part}" for part in packed}
        for part, tensor in packed.items():
            graph.set_tensor(names[part], tensor)
        in_features = site.shape[1]
        for read in reads:
            with graph.graph.inserting_before(read):
                codes, scale = graph.get_attr(names["codes"]), graph.get_attr(names["scale"])
                zero = graph.get_attr(names["zero"]) if "zero" in packed else None
                args = (codes, scale, zero, self.bits, self.format.group(in_features), in_features)
                weight: fx.Node = graph.graph.call_function(torch.ops.lwcompile.dequantize.default, args)
            weight.meta.update(val=read.meta.get("val"), path=site.path)
            read.replace_all_uses_with(weight)
        graph.prune()

    def _solve(self, graph: ModelGraph, site: Site, ctx: Context) -> dict[str, torch.Tensor]:
        assert site.weight is not None
        solver: Solver = make("solvers", self.solver)
        stats = ctx.stats_of(graph, site, solver.wanted) if solver.needs_hessian or ctx.prefix is not None else None
        if stats is None and solver.needs_hessian and site.kind == "embedding":
            stats = InputStats(site.shape[1])  # a row that is looked up counts by its squared error alone: H is the identity
            stats.update(torch.eye(site.shape[1]))
        return solver.solve(graph.tensor(site.weight).float(), self.format, stats).pack()

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        return [StoredTensor(site.shape, self.format, role="embedding" if site.kind == "embedding" else "linear")]
