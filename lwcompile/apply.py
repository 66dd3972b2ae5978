"""Applying a plan: structure first, then numeric formats in the order the program runs, each layer calibrated on what the
compressed layers before it put out (true-sequential, arXiv 2210.17323).

Both halves go through the manager, so that each is a transaction that the verifier has seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import fx

from lwcompile.activations import input_stats, moments
from lwcompile.contract import TransformPass, Wanted
from lwcompile.errors import Refused
from lwcompile.executor import Executor
from lwcompile.manager import Manager, Step
from lwcompile.memory import give_back
from lwcompile.prefix import Cursor
from lwcompile.registry import make
from lwcompile.site import Site

if TYPE_CHECKING:
    from torch import Tensor

    from lwcompile.context import Context
    from lwcompile.program import Program
    from lwcompile.spec import Spec
    from lwcompile.stats import InputStats
    from lwcompile.structure import Structure


class SequentialPrefix:
    """Input statistics at one linear after the other, in program order, of a program that is being compressed.

    One pass over the model in all: `Cursor` advances the calibration batches and never goes back; a second one, for solvers that
    want the drift, does the same with the dense program. Layers that are fed one tensor share its statistics and the importance
    of its tokens. Weights that the dense model ties, and embeddings, have none here: they are not read at one place.

    A weight that the plan's structure made several calls share is known by the inputs of all of them: of the first behind the
    compressed layers, and of the others as they are before any layer is compressed.
    """

    def __init__(self, program: Program, ctx: Context, tied: Sequence[str]) -> None:
        self.ctx = ctx
        self.cursor = Cursor(program, ctx.batches(program), ctx.device)
        self.tied = set(tied)
        self.places = places(program, ctx.structure)
        self._before = program.copy() if any(len(sites) > 1 for sites in self.places.values()) else program
        self._others: dict[float, dict[str, InputStats]] = {}
        self._dense: Cursor | None = None
        self._last: tuple[tuple[tuple[str, ...], Wanted], InputStats] | None = None

    def stats(self, site: Site, wanted: Wanted) -> InputStats | None:
        if site.kind != "linear" or site.id in self.tied:
            return None
        executor = self.cursor.executor
        first, *others = self.places.get(site.id, [site])
        if executor.constant_input(first) is not None:
            return None  # compressed or not, it is fed the same
        key = executor.key(first)
        token = (tuple(executor.input_of(executor.key(s)) for s in (first, *others)), wanted)
        if self._last is None or self._last[0] != token:
            values = self.cursor.inputs_at([key])[key]
            dense = self._dense_inputs(site, key, values) if wanted.drift else None
            stats = moments(self.ctx, first, values, wanted.importance, dense)
            for other in others:
                stats.merge(self._elsewhere(wanted.importance)[other.id])
            self._last = (token, stats)
        return self._last[1]

    def _elsewhere(self, importance: float) -> dict[str, InputStats]:
        """By site id, at every place but the first that reads a shared weight."""
        if importance not in self._others:
            sites = {s.id: s for _, *others in self.places.values() for s in others}
            self._others[importance] = input_stats(self.ctx, self._before, sites.values(), importance=importance)
        return self._others[importance]

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
        left = {site.id: t.children(program.entries[site.entry], site) for site, t in manager.transform(compressed, structural)}
        numeric = [(child, format) for site, format in numeric for child in left.get(site.id, [site])]
    if numeric:
        numeric = _in_order(compressed, numeric, structure)
        tied = [id for ids in structure.tied for id in ids]
        with ctx.progress.task("compressing", len(numeric)) as task:

            def done(step: Step) -> None:
                task.advance()
                give_back()

            manager.transform(compressed, numeric, _Start(ctx, tied), done)
        ctx.prefix = None
    return compressed


def edit(program: Program, choices: Mapping[str, Sequence[Spec]], structure: Structure, ctx: Context) -> bool:
    """Apply a plan to `program` itself, outside of a transaction and with every layer calibrated on the dense model: a trial of it.

    Whether nothing refused: what does is passed over, as in the real run, which then stores more than the plan says. No verifier
    looks at the result.
    """
    before, whole = program.copy(), True
    structural, numeric = _steps(program, choices, structure)
    left: dict[str, list[Site]] = {}
    for site, transform in structural:
        if _tried(program, site, transform, ctx):
            left[site.id] = transform.children(before.entries[site.entry], site)
        else:
            whole = False
    for site, transform in numeric:
        for child in left.get(site.id, [site]):
            whole &= _tried(program, child, transform, ctx)
    return whole


def _tried(program: Program, site: Site, transform: TransformPass, ctx: Context) -> bool:
    graph = program.entries[site.entry]
    try:
        transform.check(graph, site)
        transform.apply(graph, site, ctx)
    except Refused:
        return False
    return True


class _Start:
    """Puts the calibration batches before the first layer of the draft that a transaction edits."""

    def __init__(self, ctx: Context, tied: Sequence[str]) -> None:
        self.ctx, self.tied = ctx, tied

    def __call__(self, draft: Program) -> None:
        self.ctx.prefix = SequentialPrefix(draft, self.ctx, self.tied) if self.ctx.calibration is not None else None


def _steps(program: Program, choices: Mapping[str, Sequence[Spec]], structure: Structure) -> tuple[list[Step], list[Step]]:
    """Structural steps from the outside in (a block before what it holds), and numeric ones of what is left.

    What takes another site's tensors goes first, while its source stands as the plan knows it.
    """
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
    return sorted(structural, key=lambda step: not step[1].replaces), numeric


def _in_order(program: Program, steps: Sequence[Step], structure: Structure) -> list[Step]:
    """By position in the program, of a shared weight the first; a site whose call is gone comes last and is refused there."""
    executor, shared = Executor(program), places(program, structure)
    last = len(executor.index)
    return sorted(steps, key=lambda step: executor.index.get(executor.key(shared.get(step[0].id, [step[0]])[0]), last))


def places(program: Program, structure: Structure | None) -> dict[str, list[Site]]:
    """Of each linear whose weight several calls read now: the sites of all of them, in the order the program runs."""
    executor, found = Executor(program), defaultdict[tuple[str, str], list[Site]](list)
    for site in structure.of_kind("linear") if structure is not None else ():
        if (at := executor.index.get(executor.key(site))) is None:
            continue
        stored = executor.steps[at].node.args[1]
        if isinstance(stored, fx.Node) and stored.op == "get_attr":
            found[site.entry, program.entries[site.entry].tensors[str(stored.target)]].append(site)
    together = [sorted(s, key=lambda site: executor.index[executor.key(site)]) for s in found.values() if len(s) > 1]
    return {site.id: sites for sites in together for site in sites}
