"""Block influence and layer input modification: how much a block or sublayer turns the residual stream.

    block influence               1 - mean_t cos(a_t, b_t)
    layer input modification        - mean_t cos(a_t, b_t)      (one less)

with a the stream before a block or sublayer and b after it, norm and residual included: b = a + f(norm(a)).

Source: ShortGPT (arXiv 2403.03853), LLM-Drop for sublayers (2406.15786), LIM (2406.17415, blocks). Cosines in float32.
Cost: one forward. Higher: touching it hurts more. Refuses: a model without a residual stream.
Caution: cosine misses growth of the norm, and the first and last blocks always score high.
"""

from __future__ import annotations

from collections import Counter
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
from lwcompile.site import SUBLAYER_KINDS, Site


@dataclass(frozen=True)
class BlockInfluence(AnalysisPass):
    """1 - cosine of the residual stream before and after each block, attention and MLP, over `tokens` tokens (none: all)."""

    name: ClassVar[str] = "block_influence"
    provides: ClassVar[tuple[str, ...]] = ("block_influence",)

    tokens: int | None = 16384

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Score]]:
        for site, similarity in _similarities(program, ctx, ("block", *SUBLAYER_KINDS), self.tokens, self.name):
            yield site.id, Score(1.0 - similarity.value, similarity.samples, similarity.spread)


@dataclass(frozen=True)
class LayerInputModification(AnalysisPass):
    """Minus the cosine of each block's input and output, over `tokens` tokens (none: all)."""

    name: ClassVar[str] = "lim"
    provides: ClassVar[tuple[str, ...]] = ("lim",)

    tokens: int | None = 16384

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Score]]:
        for site, similarity in _similarities(program, ctx, ("block",), self.tokens, self.name):
            yield site.id, Score(-similarity.value, similarity.samples, similarity.spread)


@torch.no_grad()
def _similarities(
    program: Program, ctx: Context, kinds: tuple[str, ...], tokens: int | None, name: str
) -> list[tuple[Site, Score]]:
    """The mean cosine at each site over all positions, with its standard error over positions."""
    sites = [site for site in ctx.find_structure(program).sites.values() if site.kind in kinds]
    if not sites:
        raise Refused(f"{name} compares the residual stream before and after blocks, and this model has no residual stream")
    executor = Executor(program, ctx.device)
    keys = {
        site.id: [executor.key(site).removesuffix(site.node) + name for name in (site.skip, site.node, site.end)]
        for site in sites
    }
    siblings = Counter((site.parent, site.end) for site in sites)
    found: dict[str, list[Tensor]] = {site.id: [] for site in sites}
    batches = ctx.batches(program, tokens=tokens)
    with ctx.progress.task(name, len(batches)) as task:
        for batch in batches:
            watch = {key for triple in keys.values() for key in triple if key in executor.index}
            seen = {**executor.start(batch), **executor.run(batch, watch)}
            for site in sites:
                before, branch, after = (seen[key].float() for key in keys[site.id])
                parallel = siblings[site.parent, site.end] > 1  # their add holds the others' branches too
                after = before + branch if parallel else after
                found[site.id].append(torch.cosine_similarity(before, after, dim=-1).flatten().double().cpu())
            task.advance()
    return [(site, _mean(torch.cat(found[site.id]))) for site in sites]


def _mean(values: Tensor) -> Score:
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Score(values.mean().item(), len(values), error)
