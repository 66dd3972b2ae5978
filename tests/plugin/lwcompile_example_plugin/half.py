"""Half: a weight is stored in 16 bits, and widened where it is read.

    linear(x, W)        ->  linear(x, float32(W16))
    embedding(W, ids)   ->  embedding(float32(W16), ids)

Cost: none; half the bytes. Refuses: a weight that overflows the narrow type.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from lwcompile.context import Context
from lwcompile.contract import StoredTensor, TransformPass
from lwcompile.errors import Refused
from lwcompile.graph import ModelGraph
from lwcompile.site import Site, SiteKind


@dataclass(frozen=True)
class Half(TransformPass):
    """Store a weight in 16 bits: `float16` is finer, `bfloat16` reaches further."""

    name: ClassVar[str] = "half"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("linear", "embedding")
    structural: ClassVar[bool] = False

    dtype: Literal["float16", "bfloat16"] = "float16"

    def check(self, graph: ModelGraph, site: Site) -> None:
        if site.weight in graph.tensors:  # else a tied site was narrowed first, and this one with it
            largest, limit = graph.tensor(site.weight).abs().max().item(), torch.finfo(getattr(torch, self.dtype)).max
            if not largest <= limit:
                raise Refused(f"it holds {largest:g}, and {self.dtype} ends at {limit:g}", site=site.id)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        if site.weight not in graph.tensors:
            return
        narrow = graph.tensor(site.weight).to(getattr(torch, self.dtype))
        for read in graph.uses(site.weight):
            with graph.graph.inserting_before(read):
                stored = graph.get_attr(f"{site.weight}.{self.dtype}", narrow)
                wide = graph.graph.call_function(torch.ops.aten._to_copy.default, (stored,), {"dtype": torch.float32})
            read.replace_all_uses_with(wide)
        graph.prune()

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        return [StoredTensor(site.shape, dtype=self.dtype, role="embedding" if site.kind == "embedding" else "linear")]
