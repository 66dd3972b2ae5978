"""Search: an additive plan, mended by what whole plans really do.

Before -> after: a table of damages, each of one option alone in the dense model -> a plan whose measured damage was the least of all
those tried. Alone, options understate or flatter what they do together (error is not additive, nor even monotone: EvoPress, arXiv
2410.14649). So the damages are replaced, where it matters, by what they are at the plan in hand:

    conditional damage of an option = damage(plan with it) - damage(plan without it)

First by families (the same weight at all depths under one transform: one factor a family), then one by one for the changes that the
integer program was closest to making. After each round the start allocator solves the mended table again; its plan is kept if it
measures better, else the shortfall is charged to the options that changed. All plans meet the budget, which is thus hit from below.

The best plan of each transform by itself is measured too: what comes back does no more damage than any of those.

Source: the search over whole plans of EvoPress, with an integer program in place of random mutations, as MixDQ (arXiv 2405.17873)
re-ranks its candidates end to end.
Cost: `evaluations` runs of the model over the oracle's tokens, and a solve of each weight in each format that is tried.
Refuses: what the start allocator refuses; without an oracle it returns that one's plan.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from lwcompile.budget import Budget
from lwcompile.contract import Allocator
from lwcompile.errors import BadPlan, InfeasibleBudget
from lwcompile.plans import Plan
from lwcompile.registry import make
from lwcompile.spec import Spec
from lwcompile.table import Assignment, Options, OptionTable

FACTORS = 0.1, 10.0
"""Bounds on how far a family's damages are taken to be from what they are alone."""

POWERS = 1.0, 0.5, 0.25
"""Of the factors, tried until one makes a better plan: they are true of small changes, and a solution makes large ones."""

Damages = dict[tuple[str, Options], float]
"""(site, what it carries) -> damage, where it differs from the table's."""


@dataclass(frozen=True)
class Search(Allocator):
    """Start from `start`'s plan; `evaluations` whole plans are measured in all, `step` single changes between two solutions."""

    name: ClassVar[str] = "search"
    start: Spec = field(default=Spec("integer_program"))
    evaluations: int = 64
    step: int = 8

    def __post_init__(self) -> None:
        if self.evaluations < 1 or self.step < 1:
            raise BadPlan(f"search needs at least one evaluation and one change a step, not {self.evaluations} and {self.step}")

    def measurements(self, budget: Budget, sublayers: int) -> int:
        return self.evaluations if _searchable(budget) else 0

    def allocate(self, table: OptionTable, budget: Budget, oracle: Callable[[Plan], float] | None = None) -> Plan:
        first = self._solve(table, budget)
        if oracle is None or not _searchable(budget):
            return first
        hunt = _Hunt(self, table, budget, oracle, first)
        hunt.run()
        facts = {"conditional_at_start": hunt.start, "whole_plans": len(hunt.seen)}
        made = Plan.of(table, hunt.best.choices, budget, allocator=str(self.spec()), **facts)
        return made.replace(conditional=hunt.best.damage)

    def _solve(self, table: OptionTable, budget: Budget) -> Plan:
        return make("allocators", self.start).allocate(table, budget)


def _searchable(budget: Budget) -> bool:
    """A limit on damage is one on the predicted sum, which a search has no use for."""
    return budget.max_damage is None


class _State(NamedTuple):
    choices: Mapping[str, Options]
    damage: float


class _Move(NamedTuple):
    """A change of the plan by itself: the sites that change, what they then carry, and its reduced cost in units of damage."""

    sites: tuple[str, ...]
    options: Options
    cost: float


class _OutOfPlans(Exception):
    """The evaluations are used up."""


class _Hunt:
    def __init__(self, search: Search, table: OptionTable, budget: Budget, oracle: Callable[[Plan], float], first: Plan) -> None:
        self.search, self.table, self.budget, self.oracle = search, table, budget, oracle
        self.seen: dict[str, float] = {}
        self.mended: Damages = {}
        self.tried: set[tuple[str, Options, str]] = set()
        self.start = self.damage(first.choices)
        self.best = _State(first.choices, self.start)
        self.singles: list[_State] = []

    def damage(self, choices: Assignment) -> float:
        plan = Plan.of(self.table, choices)
        digest = plan.digest()
        if digest not in self.seen:
            if len(self.seen) >= self.search.evaluations:
                raise _OutOfPlans
            self.seen[digest] = self.oracle(plan)
        return self.seen[digest]

    def run(self) -> None:
        try:
            self._singles()
            self._families()
            while self._resolve() or self._moves():
                pass
        except _OutOfPlans:
            pass
        self.best = min([self.best, *self.singles], key=lambda state: state.damage)

    # --- what the table says, mended

    def now(self) -> OptionTable:
        """The table with the damages that were found at plans in hand."""
        rows = dict(self.table.sites)
        for id in {id for id, _ in self.mended}:
            row = rows[id]
            choices = [
                dataclasses.replace(c, damage=self.mended[id, c.options]) if (id, c.options) in self.mended else c
                for c in row.choices
            ]
            rows[id] = dataclasses.replace(row, choices=tuple(choices))
        return dataclasses.replace(self.table, sites=rows)

    def at(self, id: str, options: Options) -> float:
        return self.mended.get((id, options), self.table.sites[id].by_options[options].predicted)

    def mend(self, sites: Iterable[str], options: Options, damage: float) -> None:
        """The damage of one option at sites that carry it together, shared as the table shares it."""
        sites = list(sites)
        known = [self.table.sites[id].by_options[options].predicted for id in sites]
        whole = math.fsum(known)
        for id, part in zip(sites, known):
            self.mended[id, options] = max(damage, 0.0) * (part / whole if whole > 0 else 1 / len(sites))

    # --- steps

    def _singles(self) -> None:
        """Measure the best plan of each transform by itself."""
        names = sorted({option.name for row in self.table.sites.values() for c in row.choices for option in c.options})
        for name in names if len(names) > 1 else ():
            try:
                offered = self.table.offering(lambda c, name=name: all(option.name == name for option in c.options))
                choices = self.search._solve(offered, self.budget).choices
            except InfeasibleBudget:
                continue
            self.singles.append(_State(choices, self.damage(choices)))

    def _families(self) -> None:
        """One factor for each family in the plan: its damage at the plan over its damage alone."""
        families: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for id, options in self.best.choices.items():
            families[self._family(id, options)].append(id)
        if len(families) < 2:
            return
        factors: dict[tuple[str, str], float] = {}
        for family, sites in families.items():
            without = {id: o for id, o in self.best.choices.items() if id not in sites}
            alone = math.fsum(self.table.sites[id].by_options[self.best.choices[id]].predicted for id in sites)
            if alone > 0:
                there = self.best.damage - self.damage(without)
                factors[family] = min(max(there / alone, FACTORS[0]), FACTORS[1])
        usual = sorted(factors.values())[len(factors) // 2] if factors else 1.0
        for power in POWERS:
            for id, row in self.table.sites.items():
                for options, choice in row.by_options.items():
                    if options and choice.refused is None:
                        factor = factors.get(self._family(id, options), usual)
                        self.mended[id, options] = choice.predicted * factor**power
            before = self.best.damage
            if self._resolve(charge=False) and self.best.damage < before:
                return

    def _family(self, id: str, options: Options) -> tuple[str, str]:
        """The place within its block, and the transforms: `block#.mlp.down_proj`, `quantize`. What is dropped is one by itself."""
        place = id if self.table.sites[id].by_options[options].removes else re.sub(r"\d+", "#", id)
        return place, "+".join(option.name for option in options)

    def _resolve(self, charge: bool = True) -> bool:
        """Solve the mended table; whether its plan is new. It is kept if it measures better, and charged for if not."""
        try:
            made = self.search._solve(self.now(), self.budget).choices
        except InfeasibleBudget:
            return False
        if Plan.of(self.table, made).digest() in self.seen:
            return False
        found, expected = self.damage(made), self.best.damage
        if found < self.best.damage:
            self.best = _State(made, found)
            return True
        changed = [id for id, options in made.items() if self.best.choices.get(id, ()) != options] if charge else []
        for id in changed:
            self.mended[id, made[id]] = self.at(id, made[id]) + (found - expected) / len(changed)
        return True

    def _moves(self) -> bool:
        """Measure the next few single changes at the plan in hand, nearest first; whether there were any."""
        place = Plan.of(self.table, self.best.choices).digest()
        moves = [m for m in self._near() if (m.sites[0], m.options, place) not in self.tried][: self.search.step]
        for move in moves:
            self.tried.add((move.sites[0], move.options, place))
            there = self.damage(self._with(move)) - self.best.damage
            self.mend(move.sites, move.options, self._carried(move.sites, self.best.choices)[0] + there)
        return bool(moves)

    def _with(self, move: _Move) -> dict[str, Options]:
        changed = dict(self.best.choices) | dict.fromkeys(move.sites, move.options)
        return self.table.effective({id: o for id, o in changed.items() if o})

    def _carried(self, sites: Iterable[str], choices: Assignment) -> tuple[float, int]:
        """The damage and the bytes of what stands at some sites and below them."""
        below = {id for id in self.table.sites if any(id == s or id.startswith(f"{s}.") for s in sites)}
        alive = [id for id in below if not any(a in below and _silences(self.table, a, choices) for a in self.table.paths[id])]
        damage = math.fsum(self.at(id, choices.get(id, ())) for id in alive)
        return damage, sum(self.table.sites[id].by_options[choices.get(id, ())].bytes for id in alive)

    def _near(self) -> list[_Move]:
        """Single changes that the sites in hand may make, by what they would cost at the price of a byte."""
        price, moves = self._price(), []
        for unit in self.table.units:
            if any(_silences(self.table, a, self.best.choices) for id in unit.sites for a in self.table.paths[id]):
                continue
            damage, size = self._carried(unit.sites, self.best.choices)
            for options in unit.options:
                if options == self.best.choices.get(unit.sites[0], ()) or not options:
                    continue
                changed = dict(self.best.choices) | dict.fromkeys(unit.sites, options)
                new, fewer = self._carried(unit.sites, changed)
                moves.append(_Move(unit.sites, options, new - damage + price * (fewer - size)))
        return sorted(moves, key=lambda move: move.cost)

    def _price(self) -> float:
        """Damage a byte is worth at the budget: what a plan of one percent less would add."""
        limit = self.budget.max_bytes(self.table.parameters)
        if limit is None:
            return 0.0
        table = self.now()
        try:
            less = self.search._solve(table, dataclasses.replace(self.budget, bytes=int(0.99 * limit), avg_bits=None))
            here = self.search._solve(table, self.budget)
        except InfeasibleBudget:
            return math.inf
        return max((less.predicted or 0.0) - (here.predicted or 0.0), 0.0) / max((here.bytes or 0) - (less.bytes or 0), 1)


def _silences(table: OptionTable, id: str, choices: Assignment) -> bool:
    return table.sites[id].by_options[choices.get(id, ())].silences
