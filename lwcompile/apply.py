"""Applying a plan: structure first, then numeric formats in the order the program runs, each layer calibrated on what the
compressed layers before it put out (true-sequential, METHODS 3.1).

Both halves go through the manager, so that each is a transaction that the verifier has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lwcompile.contract import TransformPass
from lwcompile.executor import Executor
from lwcompile.manager import Manager, Step
from lwcompile.memory import give_back
from lwcompile.prefix import Cursor
from lwcompile.registry import make
from lwcompile.stats import InputStats

if TYPE_CHECKING:
    from lwcompile.context import Context
    from lwcompile.program import Program
    from lwcompile.site import Site
    from lwcompile.spec import Spec
    from lwcompile.structure import Structure


class SequentialPrefix:
    """Input statistics at one linear after the other, in program order, of a program that is being compressed.

    One pass over the model in all: `Cursor` advances the calibration batches and never goes back. Layers that are fed one tensor
    share its statistics. Tied weights and embeddings have none here: they are not read at one place.
    """

    def __init__(self, program: Program, ctx: Context, tied: Sequence[str], samples: int | None = None) -> None:
        self.cursor = Cursor(program, ctx.batches(program, samples=samples), ctx.device)
        self.tied = set(tied)
        self._last: tuple[str, InputStats] | None = None

    def stats(self, site: Site) -> InputStats | None:
        if site.kind != "linear" or site.id in self.tied:
            return None
        executor = self.cursor.executor
        key = executor.key(site)
        source = executor.input_of(key)
        if self._last is None or self._last[0] != source:
            values = self.cursor.inputs_at([key])[key]
            stats = InputStats(values[0].shape[-1], device=values[0].device)
            for value in values:
                stats.update(value)
            self._last = (source, stats)
        return self._last[1]


def apply_plan(
    program: Program, choices: Mapping[str, Sequence[Spec]], structure: Structure, ctx: Context, manager: Manager | None = None
) -> Program:
    """A compressed copy of `program`; remarks say what was refused. `program` itself is not touched."""
    manager = manager or Manager(ctx)
    compressed = program.copy()
    structural, numeric = _steps(program, choices, structure)
    if structural:
        manager.transform(compressed, structural)
    if numeric:
        numeric = _in_order(compressed, numeric)
        tied = [id for ids in structure.tied for id in ids]
        with ctx.progress.task("compressing", len(numeric)) as task:

            def done(step: Step) -> None:
                task.advance()
                give_back()

            manager.transform(compressed, numeric, _Start(ctx, tied), done)
        ctx.prefix = None
    return compressed


class _Start:
    """Puts the calibration batches before the first layer of the draft that a transaction edits."""

    def __init__(self, ctx: Context, tied: Sequence[str]) -> None:
        self.ctx, self.tied = ctx, tied

    def __call__(self, draft: Program) -> None:
        self.ctx.prefix = SequentialPrefix(draft, self.ctx, self.tied) if self.ctx.calibration is not None else None


def _steps(program: Program, choices: Mapping[str, Sequence[Spec]], structure: Structure) -> tuple[list[Step], list[Step]]:
    """Structural steps from the outside in (a block before what it holds), and numeric ones of what is left."""
    structural: list[Step] = []
    numeric: list[Step] = []
    silenced: set[str] = set()
    cache: dict[Spec, TransformPass] = {}
    for id in sorted(choices, key=lambda id: id.count(".")):
        if any(id.startswith(f"{gone}.") for gone in silenced):
            continue
        for spec in choices[id]:
            transform = cache.setdefault(spec, make("passes", spec))
            (structural if transform.structural else numeric).append((structure.sites[id], transform))
            if transform.silences:
                silenced.add(id)
    return structural, numeric


def _in_order(program: Program, steps: Sequence[Step]) -> list[Step]:
    """By position in the program; a site whose call is gone comes last and is refused there."""
    executor = Executor(program)
    return sorted(steps, key=lambda step: executor.index.get(executor.key(step[0]), len(executor.index)))
