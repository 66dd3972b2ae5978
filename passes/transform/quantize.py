"""Quantize: a stored matrix becomes packed codes that are unpacked where they are read.

    linear(x, W, b)      ->  linear(x, dequantize(codes, scale, zero), b)
    embedding(W, ids)    ->  embedding(dequantize(codes, scale, zero), ids)

Every call that reads the tensor changes with it, so tied embeddings and heads stay tied.

With `rank`, the leading directions of what was lost are added back beside it, in 8 bits:
    linear(x, W, b)      ->  linear(x, Q, b) + linear(linear(x, A), B)          B A ~ W - Q in the norm of the outputs

Source: affine grids by group; the values are found by a solver (GPTQ, HQQ, round to nearest, or a plugin's). The low-rank
correction is LQER's (arXiv 2402.02446; trained in INT2.1, arXiv 2306.08162).
Cost: the solver's, once per tensor; with `rank` an eigendecomposition more.
Refuses: a tensor that is not a matrix, holds NaN, or is read by anything but linears and embeddings; with `rank`, all but a linear's
own weight, and ranks whose 8-bit factors take more than the weight itself would in 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import fx

from lwcompile.context import Context
from lwcompile.contract import Solver, StoredTensor, TransformPass
from lwcompile.errors import BadPlan, Refused
from lwcompile.formats import NumericFormat
from lwcompile.graph import ModelGraph
from lwcompile.passes.transform._factors import factor_sites, only_call, principal, stats_for, values_of
from lwcompile.registry import make
from lwcompile.site import Site, SiteKind
from lwcompile.spec import Spec
from lwcompile.stats import InputStats

aten = torch.ops.aten

FACTORS = NumericFormat(8, None, "none")
"""Of a correction's factors."""


@dataclass(frozen=True)
class Quantize(TransformPass):
    """Give a weight `bits` per code and one scale per `group_size` input channels (none: per output channel).

    `symmetric` leaves the zero point out; `zero_point` is `integer` (a code) or `float`. `solver` finds the values. `rank` directions
    of the error are corrected (0: none).
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
    rank: int = 0

    def __post_init__(self) -> None:
        _ = self.format
        if self.rank < 0:
            raise BadPlan(f"quantize takes a rank of 0 or more, not {self.rank}")

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
        if self.rank:
            only_call(graph, site)
            (n, k), numbers = site.shape, self.rank * sum(site.shape)
            if numbers >= n * k:
                raise Refused(f"a correction of rank {self.rank} holds {numbers} numbers, and the weight {n * k}", site=site.id)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        assert site.weight is not None
        if site.weight not in graph.tensors:  # a tied site was quantized first, and this one with it
            return
        reads = graph.uses(site.weight)
        token = ("quantize", site.id, graph.tensors[site.weight], str(self.spec()))
        packed = ctx.solved(token, lambda: self._solve(graph, site, ctx))
        for part, tensor in packed.items():
            graph.set_tensor(f"{site.weight}.{part}", tensor)
        for read in reads:
            weight = _unpacked(graph, site, self.format, read)
            read.replace_all_uses_with(weight)
        if self.rank:
            self._add_correction(graph, site)
        graph.prune()

    def _add_correction(self, graph: ModelGraph, site: Site) -> None:
        """The call's node becomes the sum, so that the site's name goes on standing for what the layer puts out."""
        call, (inner, outer) = graph.node(site.node), factor_sites(site, self.rank)
        value, new = call.meta.get("val"), graph.graph.create_node
        with graph.graph.inserting_before(call):
            main = new("call_function", call.target, call.args, name=f"{site.node}_q")
            thin = new("call_function", call.target, (call.args[0], _unpacked(graph, inner, FACTORS, call)), name=inner.node)
            wide = new("call_function", call.target, (thin, _unpacked(graph, outer, FACTORS, call)), name=outer.node)
        for node, made in ((main, value), (thin, values_of(call, self.rank)), (wide, value)):
            node.meta.update(path=site.path, val=made)
        call.target, call.args = aten.add.Tensor, (main, wide)

    def _solve(self, graph: ModelGraph, site: Site, ctx: Context) -> dict[str, torch.Tensor]:
        assert site.weight is not None
        solver: Solver = make("solvers", self.solver)
        stats = ctx.stats_of(graph, site, solver.wanted) if solver.needs_hessian or ctx.prefix is not None else None
        if stats is None and solver.needs_hessian and site.kind == "embedding":
            stats = InputStats(site.shape[1])  # a row that is looked up counts by its squared error alone: H is the identity
            stats.update(torch.eye(site.shape[1]))
        weight = graph.tensor(site.weight).float()
        made = solver.solve(weight.to(ctx.device), self.format, stats).cpu()
        if not self.rank:
            return made.pack()
        known = stats if stats is not None else stats_for(graph, site, ctx, solver.wanted.importance)
        b, a = principal(weight - made.dequantize(), self.rank, None if known is None else known.hessian)
        factors = {part: make("solvers", Spec("rtn")).solve(f.float(), FACTORS, None).pack() for part, f in (("a", a), ("b", b))}
        return made.pack() | {f"{part}.{key}": t for part, packed in factors.items() for key, t in packed.items()}

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        factors = factor_sites(site, self.rank) if self.rank else ()
        role = "embedding" if site.kind == "embedding" else "linear"
        return [
            StoredTensor(site.shape, self.format, role=role),
            *(StoredTensor(f.shape, FACTORS, role="linear") for f in factors),
        ]


def _unpacked(graph: ModelGraph, site: Site, format: NumericFormat, before: fx.Node) -> fx.Node:
    """A node before another one that unpacks what is stored of the site's weight, in the type that the other one has."""
    (n, k), zero = site.shape, f"{site.weight}.zero"
    with graph.graph.inserting_before(before):
        codes, scale = graph.get_attr(f"{site.weight}.codes"), graph.get_attr(f"{site.weight}.scale")
        args = (codes, scale, graph.get_attr(zero) if zero in graph.tensors else None, format.bits, format.group(k), k)
        weight: fx.Node = graph.graph.call_function(torch.ops.lwcompile.dequantize.default, args)
        weight.meta.update(val=scale.meta["val"].new_empty((n, k), dtype=torch.float32), path=site.path)
        if (dtype := before.meta["val"].dtype) is not torch.float32:
            value = weight.meta["val"].to(dtype)
            weight = graph.graph.call_function(aten._to_copy.default, (weight,), {"dtype": dtype})
            weight.meta.update(val=value, path=site.path)
    return weight
