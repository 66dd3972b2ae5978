"""Applying a plan: structure first, then numeric formats in the order the program runs, each layer calibrated on what the
compressed layers before it put out (true-sequential, arXiv 2210.17323).

Both halves go through the manager, so that each is a transaction that the verifier has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lwcompile.activations import moments
from lwcompile.contract import TransformPass, Wanted
from lwcompile.executor import Executor
from lwcompile.manager import Manager, Step
from lwcompile.memory import give_back
from lwcompile.prefix import Cursor
from lwcompile.registry import make

if TYPE_CHECKING:
    from torch import Tensor

    from lwcompile.context import Context
    from lwcompile.program import Program
    from lwcompile.site import Site
    from lwcompile.spec import Spec
    from lwcompile.stats import InputStats
    from lwcompile.structure import Structure


class SequentialPrefix:
    """Input statistics at one linear after the other, in program order, of a program that is being compressed.

    One pass over the model in all: `Cursor` advances the calibration batches and never goes back; a second one, for solvers that
    want the drift, does the same with the dense program. Layers that are fed one tensor share its statistics and the importance
    of its tokens. Tied weights and embeddings have none here: they are not read at one place.
    """

    def __init__(self, program: Program, ctx: Context, tied: Sequence[str]) -> None:
        self.ctx = ctx
        self.cursor = Cursor(program, ctx.batches(program), ctx.device)
        self.tied = set(tied)
        self._dense: Cursor | None = None
        self._last: tuple[tuple[str, Wanted], InputStats] | None = None

    def stats(self, site: Site, wanted: Wanted) -> InputStats | None:
        if site.kind != "linear" or site.id in self.tied:
            return None
        executor = self.cursor.executor
        key = executor.key(site)
        token = (executor.input_of(key), wanted)
        if self._last is None or self._last[0] != token:
            values = self.cursor.inputs_at([key])[key]
            dense = self._dense_inputs(site, key, values) if wanted.drift else None
            self._last = (token, moments(self.ctx, site, values, wanted.importance, dense))
        return self._last[1]

    def _dense_inputs(self, site: Site, key: str, values: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """What the dense program feeds the same call; None, with a note, where it has no such call or feeds it other tokens."""
        if self.ctx.program is None:
            return None
        if self._dense is None:
            self._dense = Cursor(self.ctx.program, self.ctx.batches(self.ctx.program), self.ctx.device)
        if key in self._dense.executor.index:
            found = self._dense.inputs_at([key])[key]
            if all(a.shape == b.shape for a, b in zip(found, values)):
                return found
        self.ctx.note("calibration", site.id, "the dense model feeds it other tokens: the drift of its inputs is not made up for")
        return None


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
