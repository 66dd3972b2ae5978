"""Loop: a stack of L blocks becomes K blocks looped B times; a block computes with the looped block's weights, and stores no others.

    blocks  a | b c d e f g | h      ->      a | b' c' d' b' c' d' | h          first=1, loops=2, last=1: the middle is cycled
    rank=r  linear(x, W_e, bias)     ->      linear(x, W_b', bias) + linear(linear(x, A), B)        B A = W_e - W_b' to rank r

b' is what b and e both become: by `init` their mean, the weights of a block of the old stack (`stepwise`: K of them at equal
distances, the first and the last among them), or b's own (`lower`). With a rank b has a residual of its own too, and at full rank the
model is as it was. The residual is the nearest in the norm of the outputs over the calibration tokens. `ratio` gives a block so many
of its numbers instead of one rank to all, spread over its linears so that sum of effective rank / rank is least.

The graph stays unrolled, with the looped weights stored once: each depth has norms, masks, residuals and a cache of its own, other
options go to single depths, numeric formats to the looped blocks, and no runtime needs to know of loops. Offered in several ranks,
the allocator decides block by block; a plan that loops all of a model says `"block*": loop{...}`.

Source: Relaxed Recursive Transformers (arXiv 2410.20672); the cycled middle as in Mixture-of-Recursions (arXiv 2507.10524); ranks
by D-Rank (arXiv 2509.25622).
Cost: none; with a rank, an eigendecomposition of each weight, and two thin products each time it runs.
Refuses: the looped blocks themselves (what they need comes with the others), stacks that do not divide, and what `share` refuses.
The source trains what it has looped; without that, let damages decide. Second-order analyses do not price it: add
`measured{only=loop}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from lwcompile.context import Context
from lwcompile.contract import Needs, StoredTensor, TransformPass
from lwcompile.errors import BadPlan, Refused
from lwcompile.graph import ModelGraph
from lwcompile.passes.transform._factors import add_residual, entropy_rank, principal, residual_sites, spectrum, stats_for
from lwcompile.passes.transform._reads import Read, stored_reads
from lwcompile.passes.transform.share import Share, peers
from lwcompile.program import Program
from lwcompile.site import Site, SiteKind
from lwcompile.structure import Structure, find_structure


class Slot(NamedTuple):
    """One looped block: where it stands, every place that computes with it, and the block whose weights it takes if not the mean."""

    home: Site
    members: tuple[Site, ...]
    pick: Site | None


@dataclass(frozen=True)
class Loop(TransformPass):
    """Cycle the blocks between the `first` and the `last` ones `loops` times, with residuals of `rank`, or of `ratio` of the numbers.

    `importance` is the power of the calibration tokens' weights (0: all count alike).
    """

    name: ClassVar[str] = "loop"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("block",)
    silences: ClassVar[bool] = True
    replaces: ClassVar[bool] = True

    loops: int = 2
    first: int = 1
    last: int = 1
    init: Literal["average", "stepwise", "lower"] = "average"
    rank: int = 0
    ratio: float = 0.0
    importance: float = 0.5

    def __post_init__(self) -> None:
        if self.loops < 2 or min(self.first, self.last, self.rank) < 0 or not 0 <= self.ratio <= 1 or (self.rank and self.ratio):
            raise BadPlan(f"loop needs loops >= 2, first and last >= 0, and a rank or a ratio up to 1, not {self}")
        if not 0 <= self.importance <= 1:
            raise BadPlan(f"loop takes an importance between 0 and 1, not {self.importance:g}")

    @property
    def relaxed(self) -> bool:
        return bool(self.rank or self.ratio)

    def needs(self, graph: ModelGraph, site: Site, structure: Structure) -> Needs:
        slot = self._slot(site, structure)
        share = Share(slot.home.id, rank=int(self.relaxed))
        for other in slot.members:
            share.pairs(graph, other, slot.home) if other is not slot.home else None
        if slot.pick is not slot.home:
            share.require_private(graph, slot.home, _products(graph, slot.home))
        return share.needs(graph, site, structure)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        if ctx.structure is None or ctx.program is None:
            raise Refused(
                "the blocks that it is looped with are found in the dense program, which the context lacks", site=site.id
            )
        slot, dense = self._slot(site, ctx.structure), ctx.program.entries[site.entry]
        sources = _sources(dense, slot)
        pairs = Share(slot.home.id, rank=int(self.relaxed)).pairs(graph, site, slot.home)
        if self.relaxed:
            for place in self._residuals(slot, site):
                self._relax(graph, dense, slot, place, site, ctx)
        for i, (mine, theirs) in enumerate(pairs):
            for part, (own, other) in enumerate(zip(mine.names, theirs.names)):
                if part == 0 or not self.relaxed:  # with residuals, biases stay everyone's own
                    made = _target(dense, sources, i, part)
                    graph.set_tensor(own, made)
                    graph.set_tensor(other, made)

    def children(self, graph: ModelGraph, site: Site) -> list[Site]:
        """The factors of its residuals; the first block that comes to a looped one counts that one's with its own."""
        if not self.relaxed:
            return []
        slot, made = self._slot(site, _structure_of(graph)), list[Site]()
        for place in self._residuals(slot, site) if site.end == slot.members[1].end else [site]:
            for read, rank in zip(_products(graph, place), self._ranks(graph, slot, place)):
                made += residual_sites(site, read.call, read.names[0], _shape(graph, read), rank)
        return made

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        """Its norms, with residuals its biases too, and the residuals."""
        reads = stored_reads(graph, site)
        left = (name for r in reads for name in (r.names[1 if self.relaxed else len(r.names) :] if r.multiplies else r.names))
        keys = [graph.tensors[name] for name in left]
        kept = (StoredTensor(graph.store.shape(k), dtype=str(graph.store.dtype(k)).removeprefix("torch.")) for k in keys)
        factors = (StoredTensor(child.shape, role="linear") for child in self.children(graph, site))
        return [*(tensor for tensor in kept if tensor.shape), *factors]

    def _slot(self, site: Site, structure: Structure) -> Slot:
        stack = peers(site, structure)
        at = next(i for i, block in enumerate(stack) if block.end == site.end)
        inner = stack[self.first : len(stack) - self.last]
        count = len(inner) // self.loops
        if not inner or len(inner) % self.loops:
            raise Refused(f"the {len(inner)} blocks between the first and the last ones are not {self.loops} loops", site=site.id)
        if not 0 <= at - self.first < len(inner):
            raise Refused("it stands outside of the loop", site=site.id)
        if at - self.first < count:
            raise Refused("it is a looped block, which the others come to", site=site.id)
        number = (at - self.first) % count
        members = tuple(inner[number::count])
        spread = round(number * (len(inner) - 1) / max(1, count - 1))
        picks = {"average": None, "stepwise": inner[spread], "lower": members[0]}
        return Slot(members[0], members, picks[self.init])

    def _residuals(self, slot: Slot, site: Site) -> list[Site]:
        """The looped block and the one that comes to it, but for that whose weights are the loop's."""
        return [place for place in (slot.home, site) if slot.pick is None or slot.pick.end != place.end]

    def _ranks(self, graph: ModelGraph, slot: Slot, place: Site) -> list[int]:
        """Of the residuals of a block's products, in order."""
        reads = _products(graph, place)
        shapes = [_shape(graph, read) for read in reads]
        if not self.ratio:
            return [min(self.rank, *shape) for shape in shapes]
        keys, sources = [graph.tensors[read.names[0]] for read in reads], _sources(graph, slot)
        token = f"{self.init}{self.loops}-{slot.home.end}-"
        effective = [
            entropy_rank(spectrum(token + key, lambda i=i, read=read: _difference(graph, sources, read, i)))
            for i, (key, read) in enumerate(zip(keys, reads))
        ]
        total = self.ratio * sum(n * k for n, k in shapes)
        scale = total / sum((r * (n + k)) ** 0.5 for r, (n, k) in zip(effective, shapes))
        return [min(max(1, round(scale * (r / (n + k)) ** 0.5)), n, k) for r, (n, k) in zip(effective, shapes)]

    def _relax(self, graph: ModelGraph, dense: ModelGraph, slot: Slot, place: Site, site: Site, ctx: Context) -> None:
        assert ctx.structure is not None
        origins, sources = {s.node: s for s in ctx.structure.of_kind("linear")}, _sources(dense, slot)
        for i, (read, rank) in enumerate(zip(_products(dense, place), self._ranks(dense, slot, place))):
            sites = inner, outer = residual_sites(site, read.call, read.names[0], _shape(dense, read), rank)
            if str(inner.weight) in graph.tensors:
                continue  # the looped block's, which came with another block
            origin = origins[read.call.name]

            def solve(i: int = i, read: Read = read, rank: int = rank, origin: Site = origin) -> dict[str, Tensor]:
                stats = stats_for(dense, origin, ctx, self.importance)
                found = principal(_difference(dense, sources, read, i), rank, None if stats is None else stats.hessian)
                dtype = dense.tensor(read.names[0]).dtype
                return {part: factor.to(dtype).contiguous() for part, factor in zip("ba", found)}

            found = ctx.solved(("loop", str(inner.weight), str(self.spec())), solve)
            add_residual(graph, graph.node(read.call.name), sites, found["a"], found["b"])
            ctx.derive(inner, origin)
            ctx.derive(outer, origin, found["a"])


def _products(graph: ModelGraph, site: Site) -> list[Read]:
    return [read for read in stored_reads(graph, site) if read.multiplies]


def _shape(graph: ModelGraph, read: Read) -> tuple[int, int]:
    n, k = graph.store.shape(graph.tensors[read.names[0]])
    return n, k


def _sources(dense: ModelGraph, slot: Slot) -> list[list[Read]]:
    """The products of the blocks whose mean the looped one's weights are, block by block."""
    return [_products(dense, block) for block in (slot.members if slot.pick is None else (slot.pick,))]


def _target(dense: ModelGraph, sources: Sequence[Sequence[Read]], i: int, part: int = 0) -> Tensor:
    """The looped block's tensor at its product `i`: the weight, or with `part` what stands beside it."""
    tensors = [dense.tensor(reads[i].names[part]) for reads in sources]
    return torch.stack([t.double() for t in tensors]).mean(0).to(tensors[0].dtype)


def _difference(dense: ModelGraph, sources: Sequence[Sequence[Read]], read: Read, i: int) -> Tensor:
    return dense.tensor(read.names[0]).double() - _target(dense, sources, i).double()


def _structure_of(graph: ModelGraph) -> Structure:
    """Of one entry as it is before an edit, found once; its sites are known by their nodes, for their ids lack the entry's name."""
    if graph.graph not in _STRUCTURES:
        _STRUCTURES[graph.graph] = find_structure(Program({"forward": graph}, graph.store))
    return _STRUCTURES[graph.graph]


_STRUCTURES: WeakKeyDictionary[fx.Graph, Structure] = WeakKeyDictionary()
