"""Trajectory: how far the path of the mean hidden state bends before each block, for groups of blocks that share.

    p_l = mean over tokens of the stream before block l         a line of points from the embedding to the last block's end

    between two points that are kept, the one farthest from their chord is kept next; a score is the distance down to which a
    simplification by Ramer, Douglas and Peucker keeps p_l

So the blocks above a threshold begin groups, whatever the threshold, and those below it lie on what is nearly a straight line with
the block before them. The first block scores as the highest does.

Source: RDP LoRA (arXiv 2604.19321), there to choose what is trained; its votes over resolutions and its speed are left out.
Cost: one forward. Higher: touching it hurts more. Refuses: a model without a residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Score
from lwcompile.errors import Refused
from lwcompile.executor import Executor
from lwcompile.program import Program
from lwcompile.site import Site

Place = tuple[str, str]
"""Entry point and node of the stream."""


@dataclass(frozen=True)
class Trajectory(AnalysisPass):
    """The distance at which each block's beginning is a turn of the path, over `tokens` tokens (none: all).

    unit: each token's state counts with length 1, since a few with huge states (the first, as a rule) would be all of the mean.
    """

    name: ClassVar[str] = "trajectory"
    provides: ClassVar[tuple[str, ...]] = ("trajectory",)

    tokens: int | None = 16384
    unit: bool = True

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Score]]:
        paths: dict[str, list[Site]] = {}
        for site in ctx.find_structure(program).of_kind("block"):
            paths.setdefault(site.entry + site.id.rpartition("block")[0], []).append(site)
        if not paths:
            raise Refused("it follows the residual stream from block to block, and this model has none")
        means, counts = self._means(program, ctx, [site for blocks in paths.values() for site in blocks])
        for blocks in paths.values():
            kept = turns(torch.stack([means[b.entry, b.skip] for b in blocks] + [means[blocks[-1].entry, blocks[-1].end]]))
            for block, value in zip(blocks, [max(kept[1:-1], default=0.0), *kept[1:-1]]):
                yield block.id, Score(value, counts[block.entry, block.skip])

    @torch.no_grad()
    def _means(self, program: Program, ctx: Context, blocks: list[Site]) -> tuple[dict[Place, Tensor], dict[Place, int]]:
        executor = Executor(program, ctx.device)
        prefix = {entry: f"{entry}/" if len(program.entries) > 1 else "" for entry in program.entries}
        keys = {(b.entry, name): prefix[b.entry] + name for b in blocks for name in (b.skip, b.end)}
        sums: dict[Place, Tensor] = {}
        counts: dict[Place, int] = dict.fromkeys(keys, 0)
        batches = ctx.batches(program, tokens=self.tokens)
        with ctx.progress.task(self.name, len(batches)) as task:
            for batch in batches:
                watch = [key for key in dict.fromkeys(keys.values()) if key in executor.index]
                seen = {**executor.start(batch), **executor.run(batch, watch)}
                for place, key in keys.items():
                    state = seen[key].flatten(0, -2).double()
                    state = torch.nn.functional.normalize(state, dim=-1) if self.unit else state
                    counts[place] += len(state)
                    sums[place] = sums.get(place, 0) + state.sum(0).cpu()
                task.advance()
        return {place: total / counts[place] for place, total in sums.items()}, counts


def turns(points: Tensor) -> list[float]:
    """Of points [n, d], the distance below which the simplification keeps each; infinite for the two ends."""
    kept = [float("inf")] * len(points)
    spans = [(0, len(points) - 1)]
    while spans:
        a, b = spans.pop()
        if b - a < 2:
            continue
        away, chord = points[a + 1 : b] - points[a], points[b] - points[a]
        length = chord.norm()
        along = away @ chord / length**2 if length > 0 else away.new_zeros(len(away))
        far = (away - along[:, None] * chord).norm(dim=1)
        k = int(far.argmax())
        middle = a + 1 + k
        kept[middle] = min(far[k].item(), kept[a], kept[b])
        spans += [(a, middle), (middle, b)]
    return kept
