"""What a whole plan does, measured: for allocators that search.

A weight is solved once for each format it is tried in, against what the dense model feeds it, and kept; so a plan costs its edits
and one run over some calibration samples. Sequential compression makes up for part of what earlier layers lose, which these figures
know nothing of: they rank plans, and what is compressed in the end does a little less damage.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch

from lwcompile.apply import edit
from lwcompile.damage import DamageMeter
from lwcompile.graph import OverlayStore
from lwcompile.prefix import PrefixCache
from lwcompile.progress import Task
from lwcompile.rundir import content_key, versions

if TYPE_CHECKING:
    from lwcompile.context import Context
    from lwcompile.plans import Plan
    from lwcompile.program import Program
    from lwcompile.structure import Structure

TOKENS = 2048
"""Calibration tokens that a plan runs over."""


class Oracle:
    """Plan -> damage in the metric's unit, on the first `tokens` calibration tokens; infinite where an option refuses.

    Figures and solved weights are kept in the run directory, so that a search that was killed goes on where it was.
    """

    def __init__(
        self, program: Program, structure: Structure, ctx: Context, tokens: int = TOKENS, task: Task | None = None
    ) -> None:
        self.program, self.structure, self.tokens, self.task = program, structure, tokens, task
        self.metric = ctx.need_metric()
        self.scope = content_key(
            "oracle", program.digest(), ctx.need_calibration().content_hash, repr(self.metric), ctx.seed, versions()
        )
        self.ctx = dataclasses.replace(ctx, remarks=[], prefix=None, memo={}, stats={}, derived={}, scope=self.scope)
        self.asked = 0
        self._cache: PrefixCache | None = None

    def __call__(self, plan: Plan) -> float:
        self.asked += 1
        specs = sorted({spec for options in plan.choices.values() for spec in options}, key=str)
        codes = [code for spec in specs for code in self.ctx.code_of(spec)]
        found = self.ctx.cached(
            content_key(self.scope, plan.digest(), self.tokens, codes), lambda: {"damage": self._measure(plan)}
        )
        if self.task is not None:
            self.task.advance()
        return found["damage"]

    def _measure(self, plan: Plan) -> float:
        edited = self.program.copy()
        edited.store = OverlayStore(self.program.store)
        for graph in edited.entries.values():
            graph.store = edited.store
        if not edit(edited, plan.choices, self.structure, self.ctx):
            return math.inf  # it would not be the size that it promises
        meter = DamageMeter(self.metric, self.ctx.seed)
        for i, outputs in enumerate(self.cache.suffix_outputs(edited)):
            meter.update(self.cache.kept(i), outputs, self.cache.batches[i])
        return meter.result().mean

    @property
    def cache(self) -> PrefixCache:
        """The dense program's values and outputs, made when the first plan is measured."""
        if self._cache is None:
            self._cache = PrefixCache(
                self.program,
                self.ctx.batches(self.program, tokens=self.tokens),
                memory=self.ctx.memory,
                folder=self.ctx.workdir,
                keep=lambda outputs, batch: self.metric.keep(outputs, batch, torch.float32),
                device=self.ctx.device,
            )
        return self._cache
