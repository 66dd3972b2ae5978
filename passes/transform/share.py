"""Share: a block, or one sublayer, computes with the weights of another one, and stores none of its own.

    block 5:  x + W5(norm5(x))    ->  x + W4(norm5(x))                      norms, masks, positions and cache stay its own
    rank=r:   linear(x, W5, b5)   ->  linear(x, W4, b5) + linear(linear(x, A), B)     B A = W5 - W4 to rank r
    mean:     both 4 and 5        ->  (W4 + W5) / 2; of a third that shares 4 so, (W4 + W5 + W6) / 3, at all of them

The two names are bound to one stored tensor, so every file holds it once, and a numeric format given to the source is the
sharer's too. The graph stays unrolled: each depth keeps its own cache and masks, runtimes need no loop, and a recursive model of
K blocks is a plan in which block K + i shares block i (`source=-K`; with a rank, a relaxed one).

Source: FoldGPT (arXiv 2407.00928) for blocks with norms of their own; Skrr (arXiv 2502.08690) for the re-use of a sublayer in the
place of a removed one, there with `norms=source`; Relaxed Recursive Transformers (arXiv 2410.20672) for low-rank residuals.
Cost: none; with a rank, an SVD of each weight, and two thin products each time it runs. Second-order analyses do not price it:
add `measured{only=share}`. Sites that share one source should all ask for the mean, or none.
Refuses: a source that is not there or has other operators or shapes, and weights that are read elsewhere too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from lwcompile.context import Context
from lwcompile.contract import Needs, StoredTensor, TransformPass
from lwcompile.errors import Refused
from lwcompile.graph import ModelGraph
from lwcompile.passes.transform._factors import add_residual, residual_sites
from lwcompile.passes.transform._reads import Read, consumers_of, readers_of, stored_reads
from lwcompile.site import SUBLAYER_KINDS, Site, SiteKind
from lwcompile.structure import Structure

aten = torch.ops.aten


@dataclass(frozen=True)
class Share(TransformPass):
    """Compute with another's weights: `source` is a site's id, or how many sites of this sort away it stands (-1: the one before).

    Options:
        norms: `own` keeps what is no product's weight (norms, layer scales); `source` takes that along.
        rank: above 0, each linear adds the residual between its own weight and the source's to this rank, and keeps its bias.
        mean: the group computes with the mean of its weights instead of the source's; norms stay everyone's own.
    """

    name: ClassVar[str] = "share"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("block", *SUBLAYER_KINDS)
    silences: ClassVar[bool] = True
    replaces: ClassVar[bool] = True

    source: int | str = -1
    norms: Literal["own", "source"] = "own"
    rank: int = 0
    mean: bool = False

    def __post_init__(self) -> None:
        if self.source == 0 or self.rank < 0:
            raise ValueError("source is another site, not 0 sites away, and rank at least 0")
        if self.mean and (self.rank or self.norms == "source"):
            raise ValueError("a mean moves its source as well, so it goes with norms=own and rank=0")

    def needs(self, graph: ModelGraph, site: Site, structure: Structure) -> Needs:
        source = self._source(site, structure)
        pairs = self.pairs(graph, site, source)
        if self.mean:
            self.require_private(graph, source, [theirs for _, theirs in pairs])
        names = {own: other for mine, theirs in pairs for own, other in zip(mine.names, theirs.names)}
        weights = [s for s in structure.sites.values() if s.kind in ("linear", "embedding") and s.entry == site.entry]
        of = {s.weight: s.id for s in weights if s.id.startswith(f"{source.id}.")}
        shared = {s.id: of[names[str(s.weight)]] for s in weights if names.get(str(s.weight)) in of}
        inner = [s.id for s in structure.children(source.id) if s.kind in SUBLAYER_KINDS]
        return Needs((source.id, *inner), {own: other for own, other in shared.items() if own.startswith(f"{site.id}.")})

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        if ctx.structure is None:
            raise Refused("its source is found by the structure, which the context lacks", site=site.id)
        for mine, theirs in self.pairs(graph, site, self._source(site, ctx.structure)):
            if self.mean:
                self._average(graph, mine, theirs, site)
                continue
            if self.rank and mine.multiplies:
                self._relax(graph, mine, theirs, site)
                graph.tensors[mine.names[0]] = graph.tensors[theirs.names[0]]
                continue
            for own, other in zip(mine.names, theirs.names):
                graph.tensors[own] = graph.tensors[other]

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        kept: list[StoredTensor] = []
        for read in stored_reads(graph, site):
            left = read.names[1 if self.rank else len(read.names) :] if read.multiplies else read.names
            left = () if self.norms == "source" and not read.multiplies else left
            tensors = [(graph.tensors[name], graph.store) for name in left]
            kept += [StoredTensor(s.shape(key), dtype=str(s.dtype(key)).removeprefix("torch.")) for key, s in tensors]
            if self.rank and read.multiplies:
                out, width = graph.store.shape(graph.tensors[read.names[0]])[:2]
                rank = min(self.rank, out, width)
                kept += [StoredTensor((rank, width)), StoredTensor((out, rank))]
        return [tensor for tensor in kept if tensor.shape]

    def _source(self, site: Site, structure: Structure) -> Site:
        if isinstance(self.source, str):
            found = structure.sites.get(self.source)
            if found is None or found.kind != site.kind or found.entry != site.entry or found.id == site.id:
                raise Refused(f"{self.source!r} is no other {site.kind} of this model", site=site.id)
            return found
        alike = peers(site, structure)
        at = alike.index(site) + self.source
        if not 0 <= at < len(alike):
            where = "before" if self.source < 0 else "after"
            raise Refused(f"there is no {site.kind} {abs(self.source)} {where} it to share with", site=site.id)
        return alike[at]

    def pairs(self, graph: ModelGraph, site: Site, source: Site) -> list[tuple[Read, Read]]:
        """What the site reads, each with what the source reads in its place; only what is to be shared."""
        mine, theirs = stored_reads(graph, site), stored_reads(graph, source)
        if [(r.call.target, len(r.names)) for r in mine] != [(r.call.target, len(r.names)) for r in theirs]:
            raise Refused(f"{source.id} is built of other operators than it", site=site.id)
        pairs = [pair for pair in zip(mine, theirs) if pair[0].multiplies or self.norms == "source"]
        for own, other in ((o, p) for a, b in pairs for o, p in zip(a.names, b.names)):
            shapes = [(graph.store.shape(key), graph.store.dtype(key)) for key in (graph.tensors[own], graph.tensors[other])]
            if shapes[0] != shapes[1]:
                raise Refused(f"{own} is {list(shapes[0][0])}, and {other} is {list(shapes[1][0])}", site=site.id)
        if all(graph.tensors[o] == graph.tensors[p] for a, b in pairs for o, p in zip(a.names, b.names)):
            raise Refused(f"it reads what {source.id} reads already", site=site.id)
        if self.rank and (odd := next((a for a, _ in pairs if a.multiplies and a.call.target is not aten.linear.default), None)):
            raise Refused(f"{odd.call.name} is no linear, and so has no residual of low rank", site=site.id)
        stored = [(a.names[0], graph.tensors[a.names[0]]) for a, _ in pairs if a.multiplies]
        if self.rank and (packed := next((n for n, key in stored if not graph.store.dtype(key).is_floating_point), None)):
            raise Refused(f"{packed} is packed, and codes have no residual of low rank: share first, quantize then", site=site.id)
        self.require_private(graph, site, [own for own, _ in pairs])
        return pairs

    def require_private(self, graph: ModelGraph, site: Site, reads: list[Read]) -> None:
        """Refuse where the change would reach past the site, or part what reads one tensor."""
        inside = {read.call for read in stored_reads(graph, site)}
        consumers, tied = consumers_of(graph), defaultdict[str, list[str]](list)
        for name, key in graph.tensors.items():
            tied[key].append(name)
        for read in reads:
            for name in read.names:
                matrix = read.multiplies and len(graph.store.shape(graph.tensors[name])) > 1  # equal biases are no tie
                names = tied[graph.tensors[name]] if matrix else [name]
                if others := [c.name for n in names for c in consumers[n] if c not in inside]:
                    raise Refused(f"its {name} is also read by {others[0]}", site=site.id)

    def _average(self, graph: ModelGraph, mine: Read, theirs: Read, site: Site) -> None:
        """Put this one's weight and bias into the mean of those that compute with the source's already."""
        members = [read for read in readers_of(graph, theirs.names[0]) if read.multiplies]
        for i, (own, other) in enumerate(zip(mine.names, theirs.names)):
            so_far, new = graph.tensor(other), graph.tensor(own)
            if not new.is_floating_point():
                raise Refused(f"{own} is packed, and codes have no mean: share first, quantize then", site=site.id)
            mean = ((len(members) * so_far.double() + new.double()) / (len(members) + 1)).to(new.dtype)
            for name in (own, *(read.names[i] for read in members)):
                graph.set_tensor(name, mean)

    def _relax(self, graph: ModelGraph, mine: Read, theirs: Read, site: Site) -> None:
        """Beside a linear, the residual of its own weight: B = U_r S_r and A = V_r^T of its SVD."""
        own, other = (graph.tensor(read.names[0]) for read in (mine, theirs))
        u, s, vh = torch.linalg.svd(own.double() - other.double(), full_matrices=False)
        rank = min(self.rank, len(s))
        sites = residual_sites(site, mine.call, mine.names[0], (len(own), own.shape[1]), rank)
        add_residual(graph, mine.call, sites, vh[:rank].to(own.dtype), (u[:, :rank] * s[:rank]).to(own.dtype))


def peers(site: Site, structure: Structure) -> list[Site]:
    """The sites of this sort in one stack, in order, itself among them."""
    sort = _sort(site)
    return [s for s in structure.sites.values() if s.kind == site.kind and _sort(s) == sort]


def _sort(site: Site) -> str:
    """A site's id without its block's number: what its peers in one stack have in common."""
    return re.sub(r"(^|\.)block\d+(?=\.|$)", r"\1block", site.id)
