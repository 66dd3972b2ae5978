"""Block influence and layer input modification: how much a block or sublayer turns the residual stream.

    block influence               1 - mean_t cos(a_t, b_t)
    layer input modification        - mean_t cos(a_t, b_t)      (one less)

with a the stream before a block or sublayer and b after it, norm and residual included: b = a + f(norm(a)). Removing the k lowest
is LLM-Drop's order in one shot, attention and MLP in one list. `removals=k` is its iterative order: the lowest goes, with the option
on offer that removes it, and all others are scored again on what is left, k times.

Source: ShortGPT (arXiv 2403.03853), LLM-Drop for sublayers (2406.15786), LIM (2406.17415, blocks). Cosines in float32.
Cost: one forward, and one for each removal. Higher: touching it hurts more.
Refuses: a model without a residual stream; removals where nothing on offer removes.
Caution: cosine misses growth of the norm, and the first and last blocks always score high.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Score
from lwcompile.errors import Refused
from lwcompile.executor import Executor
from lwcompile.program import Program
from lwcompile.site import SUBLAYER_KINDS, Site
from lwcompile.spec import KEEP, Spec


@dataclass(frozen=True)
class BlockInfluence(AnalysisPass):
    """1 - cosine of the residual stream before and after each block, attention and MLP, over `tokens` tokens (none: all).

    removals: above 0, so many rounds of removing the lowest and scoring anew. What went in round r scores no less than what went
    before it, and what stays no less than all that went, so the scores keep the order.
    """

    name: ClassVar[str] = "block_influence"
    provides: ClassVar[tuple[str, ...]] = ("block_influence",)

    tokens: int | None = 16384
    removals: int = 0

    def __post_init__(self) -> None:
        if self.removals < 0:
            raise ValueError(f"removals is at least 0, not {self.removals}")

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Score]]:
        found, least = self._scores(program, ctx), 0.0
        removing, removed = self._removing(ctx) if self.removals else {}, dict[str, Spec]()
        for _ in range(self.removals):
            left = [id for id in found if id in removing]
            if not left:
                raise Refused(f"only {len(removed)} of {self.removals} removals can be made with what is on offer")
            lowest = min(left, key=lambda id: found[id].value)
            below = {id: spec for id, spec in removed.items() if not id.startswith(f"{lowest}.")}
            try:
                edited = program
                for id, spec in {**below, lowest: removing[lowest]}.items():
                    edited = ctx.edited(edited, [id], [spec])
            except Refused as refusal:
                ctx.remark(self.name, lowest, "refused", f"{removing.pop(lowest)}: {refusal.reason}")
                continue
            removed = {**below, lowest: removing[lowest]}
            least = max(least, found[lowest].value)
            yield lowest, replace(found[lowest], value=least)
            found = self._scores(edited, ctx)
        for id, score in found.items():
            yield id, replace(score, value=max(least, score.value) if removed else score.value)

    def _scores(self, program: Program, ctx: Context) -> dict[str, Score]:
        found = _similarities(program, ctx, ("block", *SUBLAYER_KINDS), self.tokens, self.name)
        return {site.id: Score(1.0 - s.value, s.samples, s.spread) for site, s in found}

    def _removing(self, ctx: Context) -> dict[str, Spec]:
        """The first option on offer at each site that removes it."""
        found: dict[str, Spec] = {}
        for id, options in ctx.options.items():
            for spec in options:
                if spec != KEEP and (t := ctx.transform(spec)).silences and not t.replaces:
                    found.setdefault(id, spec)
        if not found:
            raise Refused("no option on offer removes a block or sublayer: offer one, or set removals to 0")
        return found


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
    every = list(ctx.find_structure(program).sites.values())
    executor = Executor(program, ctx.device)
    prefix = {entry: f"{entry}/" if len(program.entries) > 1 else "" for entry in program.entries}
    past = {prefix[s.entry] + s.end: s.skip for s in every if s.kind in SUBLAYER_KINDS}

    def triple(site: Site) -> list[str]:
        """Keys of the stream before, the branch and the stream after; where a removed branch ended, what flows past it."""
        found = []
        for name in (site.skip, site.node, site.end):
            while (key := prefix[site.entry] + name) not in executor.index and key in past:
                name = past[key]
            found.append(key)
        return found

    keys = {site.id: triple(site) for site in every if site.kind in kinds}
    sites = [s for s in every if s.kind in kinds and keys[s.id][0] != keys[s.id][2]]
    sites = [s for s in sites if s.kind not in SUBLAYER_KINDS or keys[s.id][1] in executor.index]
    if not sites:
        raise Refused(f"{name} compares the residual stream before and after blocks, and this model has no residual stream")
    siblings = Counter((site.parent, site.end) for site in every if site.kind in kinds)
    found: dict[str, list[Tensor]] = {site.id: [] for site in sites}
    batches = ctx.batches(program, tokens=tokens)
    with ctx.progress.task(name, len(batches)) as task:
        for batch in batches:
            watch = {key for site in sites for key in keys[site.id] if key in executor.index}
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
