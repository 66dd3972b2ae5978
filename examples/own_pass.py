"""A pass of your own, tried out before it becomes a plugin: written here, checked, and run by the manager.

    python examples/own_pass.py

`docs/writing-a-pass.md` goes on from here to a distribution that recipes name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Score, StoredTensor, TransformPass
from lwcompile.errors import Refused
from lwcompile.graph import ModelGraph
from lwcompile.manager import Manager
from lwcompile.program import Program
from lwcompile.site import Site, SiteKind
from lwcompile.structure import find_structure
from lwcompile.testing import check_pass
from lwcompile.tiny import programs


@dataclass(frozen=True)
class Peak(AnalysisPass):
    """The largest weight of each linear over their root mean square: what a grid without groups has to span.

    Cost: one look at the weights.
    """

    name: ClassVar[str] = "peak"
    provides: ClassVar[tuple[str, ...]] = ("peak",)

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Score]]:
        for site in ctx.find_structure(program).of_kind("linear"):
            weight = program.entries[site.entry].tensor(str(site.weight))
            yield site.id, Score((weight.abs().max() / weight.square().mean().sqrt()).item(), weight.numel())


@dataclass(frozen=True)
class Sparsify(TransformPass):
    """linear(x, W) -> linear(x, W'), where the `fraction` of W that is smallest in magnitude is 0.

    Source: magnitude pruning. Cost: one sort; the weight is still stored dense. Refuses: a weight that other calls read.
    """

    name: ClassVar[str] = "sparsify"
    kinds: ClassVar[tuple[SiteKind, ...]] = ("linear",)

    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must lie between 0 and 1, not {self.fraction}")

    def check(self, graph: ModelGraph, site: Site) -> None:
        readers = [user.name for read in graph.uses(str(site.weight)) for user in read.users]
        if len(readers) > 1:
            raise Refused(f"its weight is read by {', '.join(readers)}", site=site.id)

    def apply(self, graph: ModelGraph, site: Site, ctx: Context) -> None:
        weight = graph.tensor(str(site.weight))
        limit = weight.abs().flatten().kthvalue(max(1, round(self.fraction * weight.numel()))).values
        graph.set_tensor(str(site.weight), torch.where(weight.abs() > limit, weight, 0.0))

    def stored(self, graph: ModelGraph, site: Site) -> list[StoredTensor]:
        return [StoredTensor(site.shape, role="linear")]


def main() -> None:
    program = programs()["decoder"]
    for line in [*check_pass(Peak, program), *check_pass(Sparsify(0.3), program)]:
        print(line)

    structure = find_structure(program)
    manager = Manager(Context(structure=structure, program=program))
    found = manager.analyze(program, Peak())
    sharpest = max(found, key=lambda id: found[id].value)  # type: ignore[union-attr]
    print(f"\nthe sharpest weight is {sharpest}: {found[sharpest]}")

    before = program.digest()
    (done,) = manager.transform(program, [(structure.sites["block0.mlp.up_proj"], Sparsify(0.3))])
    print(f"{done[1].spec()} at {done[0].id}: {before[:8]} -> {program.digest()[:8]}")
    manager.transform(program, [(structure.sites["head"], Sparsify())])
    print("refused:", manager.ctx.remarks[-1].text)


if __name__ == "__main__":
    main()
