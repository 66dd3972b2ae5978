"""Gates: how much of each block or sublayer is left when all are priced together: one number each, trained against the dense model.

    x' = x + g f(x)      post-norm and blocks:  x' = x + g (f(x) - x)        every g starts at 1 and stays in [0, 1]

    loss = damage(dense, gated) + rate (mean g - keep)^2 + polarise * sum g (1 - g)

The rate pulls all gates down, damage holds up those that the others cannot stand in for, and the last term, which grows over the
steps from 0, parts them into 0 and 1. A score is the mean of a gate over its course, so that of two that end at 0 the one that gave
way first is the lower. What neighbours do for each other is in it, which no score of one site alone knows.

Source: gated block removal of FoldGPT (arXiv 2407.00928); the terms are a reconstruction, for no code was published.
Cost: `steps` batches forward and backward, and each batch forward once. Higher: touching it hurts more.
Refuses: a model without a residual stream; a metric without gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Score
from lwcompile.errors import Refused
from lwcompile.executor import Executor
from lwcompile.gradients import backward
from lwcompile.program import Program
from lwcompile.residual import NORMS
from lwcompile.site import SUBLAYER_KINDS
from lwcompile.spill import TensorCache


@dataclass(frozen=True)
class Gates(AnalysisPass):
    """The mean of each gate over `steps` steps of Adam; `of` says what carries one, and `keep` the share of them to be kept.

    batch: samples a step, by default the metric's group or the run's; taken in turn from about `tokens` tokens (none: all).
    """

    name: ClassVar[str] = "gates"
    provides: ClassVar[tuple[str, ...]] = ("gates",)

    of: Literal["sublayer", "block"] = "sublayer"
    steps: int = 60
    keep: float = 0.75
    lr: float = 0.05
    rate: float = 10.0
    polarise: float = 0.02
    tokens: int | None = 16384
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.batch is not None and self.batch < 1):
            raise ValueError("steps and batch are at least 1")
        if not 0 <= self.keep <= 1 or self.lr <= 0 or min(self.rate, self.polarise) < 0:
            raise ValueError("keep is a share, lr is above 0, and neither rate nor polarise below")

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Score]]:
        found = ctx.cached(ctx.key(self, program.digest(), ctx.device), lambda: self._train(program, ctx))
        for id, value in found["gates"].items():
            yield id, Score(value, found["samples"])

    def _train(self, program: Program, ctx: Context) -> dict[str, Any]:
        gated = _Gated(program, ctx, self.of)
        metric, count = ctx.need_metric(), len(gated.sites)
        size = self.batch or (getattr(metric, "batch", ctx.batch_size) if metric.joint else ctx.batch_size)
        batches = ctx.batches(program, tokens=self.tokens, size=size)
        gates = torch.ones(count, device=ctx.device, requires_grad=True)
        adam, dense = torch.optim.Adam([gates], self.lr), TensorCache(ctx.memory, ctx.workdir)
        course = torch.zeros(count, dtype=torch.float64)
        with ctx.progress.task(self.name, self.steps) as task:
            for step in range(self.steps):
                k = step % len(batches)
                if k not in dense:
                    with torch.no_grad():
                        dense[k] = metric.keep(gated.executor.run(batches[k]), batches[k], torch.float32)
                damage = metric.compare(dense[k], gated.run(batches[k], gates), batches[k]).mean()
                if not damage.requires_grad:
                    raise Refused(f"{metric!r} gives no gradient to train gates by")
                polarise = self.polarise * step / self.steps
                loss = damage + self.rate * (gates.mean() - self.keep) ** 2 + polarise * (gates * (1 - gates)).sum()
                adam.zero_grad()
                backward(loss)
                adam.step()
                with torch.no_grad():
                    gates.clamp_(0, 1)
                course += gates.detach().double().cpu() / self.steps
                task.advance()
        seen = min(self.steps, len(batches)) * size
        return {"gates": {site.id: value for site, value in zip(gated.sites, course.tolist())}, "samples": seen}


class _Gated:
    """A program that runs with gates at its blocks or sublayers."""

    def __init__(self, program: Program, ctx: Context, of: str) -> None:
        self.executor = Executor(program, ctx.device)
        kinds = ("block",) if of == "block" else SUBLAYER_KINDS
        sites = [site for site in ctx.find_structure(program).sites.values() if site.kind in kinds]
        nodes = {(entry, node.name): node for entry, graph in program.entries.items() for node in graph.nodes}
        self.whole = {s.id for s in sites if of == "block" or nodes[s.entry, s.end].target in NORMS}
        ends = Counter((s.entry, s.end) for s in sites if s.id in self.whole)
        self.sites = [s for s in sites if s.id not in self.whole or ends[s.entry, s.end] == 1]  # no branches under one norm
        if not self.sites:
            raise Refused("gates stand on a residual stream, and this model has none")
        self.prefix = {entry: f"{entry}/" if len(program.entries) > 1 else "" for entry in program.entries}

    def run(self, batch: Mapping[str, Tensor], gates: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = dict(self.executor.start(batch))
        taps: dict[str, Callable[[Tensor], Tensor]] = {}

        def scaled(gate: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda branch: (branch * gate).to(branch.dtype)

        def between(gate: Tensor, skip: str, end: str) -> Callable[[Tensor], Tensor]:
            def tap(after: Tensor) -> Tensor:
                seen[end] = (seen[skip] + gate * (after - seen[skip])).to(after.dtype)
                return seen[end]

            return tap

        def recorded(key: str) -> Callable[[Tensor], Tensor]:
            return lambda value: seen.setdefault(key, value)

        for site, gate in zip(self.sites, gates):
            skip, node, end = (self.prefix[site.entry] + name for name in (site.skip, site.node, site.end))
            if site.id in self.whole:
                taps[end] = between(gate, skip, end)
                if skip in self.executor.index:
                    taps.setdefault(skip, recorded(skip))
            else:
                taps[node] = scaled(gate)
        return self.executor.run(batch, taps=taps)
