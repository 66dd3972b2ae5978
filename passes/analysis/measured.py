"""Measured damage: every option at every site, one at a time in the dense model, by what the outputs become.

    damage(site, option) = metric(dense outputs, outputs of the model with this option at this site alone)

Source: the reference that all cheaper scores are judged by.
Cost: for an option at a site in block k, one forward of blocks k.. over the samples: about half a forward each on average. Values
at the blocks' boundaries and the dense outputs are kept in bounded memory, the rest of them in files.
Refuses: nothing; an option that its transform refuses is remarked and gets no damage.

Sites that carry one option together (fused, tied) are changed together. Each measurement is kept in the run directory under its
own key as soon as it is there, so a killed run goes on where it was.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from lwcompile.context import Context
from lwcompile.contract import AnalysisPass, Damage
from lwcompile.damage import DamageMeter
from lwcompile.errors import BadPlan, Refused
from lwcompile.prefix import PrefixCache
from lwcompile.program import Program
from lwcompile.spec import Spec


@dataclass(frozen=True)
class Measured(AnalysisPass):
    """Damage of each option in the metric's unit, on about `tokens` tokens of the calibration samples (none: all of them).

    `only` names transforms: options of others are passed over, as after an analysis that predicts those well. `joint=false` passes
    over options that join two, which are then taken to do what both do alone. `units` are how many
    sites (or groups that go together) of each kind are measured, drawn by the seed: enough to turn other analyses' scores into
    damages, or to judge their ranking.
    """

    name: ClassVar[str] = "measured"
    provides: ClassVar[tuple[str, ...]] = ("damage",)

    tokens: int | None = 4096
    only: str | tuple[str, ...] | None = None
    joint: bool = True
    units: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise BadPlan(f"measured needs at least one token, not {self.tokens}")
        if self.units is not None and self.units < 1:
            raise BadPlan(f"measured needs at least one unit, not {self.units}")

    def run(self, program: Program, ctx: Context) -> Iterator[tuple[str, Spec, Damage]]:
        trial, whole = _Trial(self, program, ctx), replace(self, only=None, joint=True, units=None)
        offers = ctx.offers(program, self.only, self.joint)
        if self.units is not None:
            drawn = self._draw(program, ctx, [unit for unit, _ in offers])
            offers = [(unit, option) for unit, option in offers if unit in drawn]
        digest, codes = program.digest(), {option: ctx.code_of(option) for option in {option for _, option in offers}}
        with ctx.progress.task(self.name, sum(trial.work(unit) for unit, _ in offers)) as task:
            for unit, option in offers:
                key = ctx.key(whole, digest, *unit, option, *codes[option])
                found = ctx.cached(key, lambda unit=unit, option=option: trial.measure(unit, option))
                task.advance(trial.work(unit))
                if "refused" in found:
                    ctx.remark(self.name, unit[0], "refused", f"{option}: {found['refused']}")
                    continue
                for id, damage in ctx.shares(program, unit, Damage(**found, measured=True)):
                    yield id, option, damage

    def _draw(self, program: Program, ctx: Context, units: Sequence[tuple[str, ...]]) -> set[tuple[str, ...]]:
        """`units` of each kind of site, at random."""
        sites, by_kind = ctx.find_structure(program).sites, dict[str, list[tuple[str, ...]]]()
        for unit in dict.fromkeys(units):
            by_kind.setdefault(sites[unit[0]].kind, []).append(unit)
        draw = random.Random(ctx.seed)
        return {unit for kind in by_kind.values() for unit in draw.sample(kind, min(self.units or len(kind), len(kind)))}


class _Trial:
    """Measures edits of one program; its values are computed when the first is asked for."""

    def __init__(self, options: Measured, program: Program, ctx: Context) -> None:
        self.options, self.program, self.ctx = options, program, ctx
        self.metric = ctx.need_metric()
        self._positions = {id: i for i, id in enumerate(ctx.find_structure(program).sites)}
        self._cache: PrefixCache | None = None

    def work(self, unit: Sequence[str]) -> int:
        """What measuring a unit costs, in sites that come after it: a measure for the time left."""
        return len(self._positions) - min(self._positions[id] for id in unit)

    @property
    def cache(self) -> PrefixCache:
        if self._cache is None:
            ctx = self.ctx
            self._cache = PrefixCache(
                self.program,
                ctx.batches(self.program, tokens=self.options.tokens),
                memory=ctx.memory,
                folder=ctx.workdir,
                keep=lambda outputs, batch: self.metric.keep(outputs, batch, torch.float32),
                device=ctx.device,
            )
        return self._cache

    def measure(self, unit: Sequence[str], option: Spec) -> dict[str, Any]:
        try:
            edited = self.ctx.edited(self.program, unit, [option])
        except Refused as refusal:
            return {"refused": refusal.reason}
        meter = DamageMeter(self.metric, self.ctx.seed)
        for i, outputs in enumerate(self.cache.suffix_outputs(edited)):
            meter.update(self.cache.kept(i), outputs, self.cache.batches[i])
        made = meter.result()
        return {"value": made.mean, "low": made.low, "high": made.high, "samples": made.n}
