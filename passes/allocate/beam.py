"""Beam: what is removed is chosen by what the whole model then puts out, not by what each removal does alone.

Before -> after: every site kept -> exactly `drop_sublayers` sublayers removed. Lists of removals grow step by step:

    the `width` least harmful lists of k sublayers  ->  each grown by every removal on offer  ->  the `width` least harmful of k + 1

With `reuse`, each removed site in turn then tries the nearest kept one of its type on either side in its place, with an option on
offer that replaces it (shared weights), and keeps the better if the whole model is better for it. What is re-used stores nothing
but is computed: the budget counts it as removed here, and the plan's own count does not.

Source: Skrr's Skip and Re-use (arXiv 2502.08690), by damage of the outputs in the place of their distance. What else the budget
limits is met by greedy's steps on predicted damage.
Cost: about width * sites * drop_sublayers plans measured, or width * `candidates` * drop_sublayers; re-use two a removed site.
Refuses: a run without an oracle, a budget that names no number of sublayers, a number that no removals on offer add up to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from lwcompile.budget import Budget
from lwcompile.contract import Allocator
from lwcompile.errors import BadPlan, InfeasibleBudget
from lwcompile.passes.allocate.greedy import State
from lwcompile.plans import Plan
from lwcompile.table import Options, OptionTable

Carried = Mapping[str, Options]


class Removal(NamedTuple):
    """One step: the sites that go together, the option that removes them, the sublayers that are gone, their damage alone."""

    sites: tuple[str, ...]
    options: Options
    sublayers: frozenset[str]
    alone: float


@dataclass(frozen=True)
class Beam(Allocator):
    """Removals by a beam search of the whole model's damage; `candidates`: only the so many least harmful alone grow a list."""

    name: ClassVar[str] = "beam"

    width: int = 2
    candidates: int | None = None
    reuse: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or (self.candidates is not None and self.candidates < 1):
            raise ValueError("width and candidates are at least 1")

    def measurements(self, budget: Budget, sublayers: int) -> int:
        count = budget.drop_sublayers or 0
        lists = 1 + self.width * (count - 1) if count else 0
        return lists * min(self.candidates or sublayers, sublayers) + (2 * count if self.reuse else 0)

    def allocate(self, table: OptionTable, budget: Budget, oracle: Callable[[Plan], float] | None = None) -> Plan:
        if budget.drop_sublayers is None:
            raise BadPlan("beam removes an exact number of sublayers: give the budget drop_sublayers")
        if oracle is None:
            raise BadPlan("beam judges whole plans by measuring them, and was given nothing to measure with")
        judge = _Judge(table, oracle)
        carried, damage = self._removed(judge, removals(table), budget.drop_sublayers)
        if self.reuse:
            carried, damage = reused(judge, carried, damage)
        if budget.sized or budget.max_damage is not None:
            state = State(table, budget, carried)
            state.meet(budget)
            carried, damage = state.carried, None
        return Plan.of(table, carried, budget, allocator=str(self.spec())).replace(conditional=damage)

    def _removed(self, judge: _Judge, steps: list[Removal], count: int) -> tuple[dict[str, Options], float | None]:
        """The best list found whose removals take exactly `count` sublayers, and its damage."""
        beams: dict[int, list[tuple[float, tuple[Removal, ...]]]] = {0: [(0.0, ())]}
        met: set[frozenset[Removal]] = set()
        for k in range(count):
            beam = sorted(beams.get(k, []), key=lambda row: row[0])[: self.width]
            for _, removed in beam:
                for step in self._growth(steps, removed, count):
                    grown = (*(r for r in removed if not r.sublayers <= step.sublayers), step)
                    carried, gone = together(grown)
                    if frozenset(grown) in met or not judge.allowed(carried):
                        continue
                    met.add(frozenset(grown))
                    beams.setdefault(len(gone), []).append((judge(carried), grown))
        if count not in beams:
            raise InfeasibleBudget(
                f"no removals on offer take exactly {count} sublayers; ask for another number, or offer removal at more sites"
            )
        damage, removed = min(beams[count], key=lambda row: row[0])
        return together(removed)[0], damage if count else None

    def _growth(self, steps: Iterable[Removal], removed: tuple[Removal, ...], count: int) -> list[Removal]:
        """The removals that this list may grow by, the least harmful alone per sublayer first."""
        gone = together(removed)[1]
        fresh = [(s.alone / len(s.sublayers - gone), s) for s in steps if s.sublayers - gone and len(s.sublayers | gone) <= count]
        return [s for _, s in sorted(fresh, key=lambda row: row[0])[: self.candidates]]


class _Judge:
    """The damage of whole plans, and whether a table allows them."""

    def __init__(self, table: OptionTable, oracle: Callable[[Plan], float]) -> None:
        self.table, self.oracle = table, oracle

    def __call__(self, carried: Carried) -> float:
        damage = self.oracle(Plan.of(self.table, carried))
        return math.inf if math.isnan(damage) else damage

    def allowed(self, carried: Carried) -> bool:
        return not self.table.violations(carried)


def removals(table: OptionTable) -> list[Removal]:
    """Every removal on offer, in the order of the model."""
    found: list[Removal] = []
    for unit in table.units:
        gone = frozenset(s for s in table.sublayers if any(id == s or id in table.paths[s] for id in unit.sites))
        for options in unit.options:
            choices = [table.sites[id].by_options[options] for id in unit.sites]
            if gone and all(choice.removes for choice in choices):
                found.append(Removal(unit.sites, options, gone, sum(choice.predicted for choice in choices)))
    return found


def together(removed: Iterable[Removal]) -> tuple[dict[str, Options], frozenset[str]]:
    """What the sites carry under these removals, and the sublayers that are gone."""
    steps = list(removed)
    return {id: r.options for r in steps for id in r.sites}, frozenset().union(*(r.sublayers for r in steps))


def reused(judge: _Judge, carried: Carried, damage: float | None) -> tuple[dict[str, Options], float | None]:
    """One removed site after the other, in the order of removal: another's tensors in its place, where the model is better for it."""
    table, now = judge.table, dict(carried)
    rank = {id: k for k, id in enumerate(table.sites)}
    for id in carried:
        by_distance: dict[int, list[dict[str, Options]]] = {}  # below 0: sources before it
        for choice in table.sites[id].choices:
            if choice.replaces and choice.shares and not choice.refused and judge.allowed(tried := {**now, id: choice.options}):
                by_distance.setdefault(rank[choice.shares[0][1]] - rank[id], []).append(tried)
        sides = [min(side, key=abs) for side in ([d for d in by_distance if d < 0], [d for d in by_distance if d > 0]) if side]
        for tried in (tried for nearest in sides for tried in by_distance[nearest]):
            found = judge(tried)
            if damage is None or found < damage:
                now, damage = tried, found
    return now, damage
