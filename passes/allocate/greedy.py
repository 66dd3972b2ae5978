"""Greedy allocation: spend the least damage per byte saved, step by step.

Before -> after: every site kept -> a plan within the budget. Each step takes, over all sites, the option with the smallest ratio
of added damage to saved bytes, which walks every site's lower convex hull; sites in a group move as one, and dropping a parent
is a step that frees what its children store and harm. A last pass spends what is left of the budget.
Source: the marginal analysis of B. Fox, "Discrete optimization via marginal analysis", Management Science 13(3), 1966.
Cost: milliseconds to a second, no model needed. Optimal for one limit and no groups up to one step; see integer_program for more.
Refuses: a budget that its steps cannot reach, with the smallest plan they found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from lwcompile.budget import Budget, format_size
from lwcompile.contract import Allocator
from lwcompile.errors import BadPlan, InfeasibleBudget
from lwcompile.plans import Plan
from lwcompile.table import Assignment, Choice, Options, OptionTable, canonical

_EPS = 1e-12  # relative slack on sums of damages, which are kept up step by step


@dataclass(frozen=True)
class Greedy(Allocator):
    """By marginal damage per byte, hitting the budget from below."""

    name: ClassVar[str] = "greedy"

    def allocate(self, table: OptionTable, budget: Budget, oracle: Callable[[Plan], float] | None = None) -> Plan:
        if budget.empty:
            raise BadPlan("a budget needs a size, a number of sublayers to drop, or a limit on damage")
        state = State(table, budget)
        if budget.drop_sublayers:
            state.drop(budget.drop_sublayers)
        state.meet(budget)
        return Plan.of(table, state.carried, budget, allocator=str(self.spec()))


def too_small(table: OptionTable, smallest: int, limit: int, budget: Budget) -> str:
    """Why a size cannot be met, and which could."""
    drops = "" if budget.drop_sublayers is None else f" with exactly {budget.drop_sublayers} sublayers dropped"
    return (
        f"no plan fits in {format_size(limit)} ({8 * limit / table.parameters:.2f} bits){drops}: the smallest plan is "
        f"{format_size(smallest)} ({8 * smallest / table.parameters:.2f} bits); ask for at least that, "
        "or offer smaller options (fewer bits, dropping)"
    )


def refine(table: OptionTable, assignment: Assignment, budget: Budget) -> dict[str, Options]:
    """`assignment`, which meets `budget`, with what is left of the budget spent one step at a time. Never worse."""
    state = State(table, budget, assignment)
    state.fill()
    return state.carried


class Total(NamedTuple):
    """Damage, bytes and dropped sublayers: of a plan, of a part of it, or of the difference that a step makes."""

    damage: float
    bytes: int
    dropped: int

    def plus(self, other: Total) -> Total:
        return Total(self.damage + other.damage, self.bytes + other.bytes, self.dropped + other.dropped)

    def minus(self, other: Total) -> Total:
        return Total(self.damage - other.damage, self.bytes - other.bytes, self.dropped - other.dropped)


class State:
    """An assignment under way, with what each step would change. `budget` limits the steps."""

    def __init__(self, table: OptionTable, budget: Budget, assignment: Assignment | None = None) -> None:
        self.table = table
        self.limit = math.inf if (limit := budget.max_bytes(table.parameters)) is None else limit
        self.most = math.inf if budget.max_damage is None else budget.max_damage * (1 + _EPS)
        self.counted = budget.drop_sublayers is not None
        self.saving = not budget.sized and budget.max_damage is not None
        self.carried = {site: (assignment or {}).get(site, ()) for site in table.sites}
        self.units = table.units
        for unit in self.units:  # where part of a group is silenced, the others say what all would carry
            options = next((o for site in unit.sites if (o := self.carried[site])), ())
            self.carried.update(dict.fromkeys(unit.sites, options))
        self.store_of = {site: store for store in table.stores for site in store}
        self.sublayers = frozenset(table.sublayers)
        self.below: dict[str, list[str]] = {site: [] for site in table.sites}
        for site, above in table.paths.items():
            for parent in above:
                self.below[parent].append(site)
        self.unit_of = {site: k for k, unit in enumerate(self.units) for site in unit.sites}
        self.sharers: dict[str, list[str]] = {}  # where a site's tensor may be read a second time
        for site, row in table.sites.items():
            for source in {source for choice in row.choices for _, source in choice.shares}:
                self.sharers.setdefault(source, []).append(site)
        self.scopes = [self._scope(u.sites) for u in self.units]
        self.rivals: dict[str, list[tuple[Options, str, Options]]] = {}
        for site, option, other, other_option in table.exclusions:
            a, b = canonical([option]), canonical([other_option])
            self.rivals.setdefault(site, []).append((a, other, b))
            self.rivals.setdefault(other, []).append((b, site, a))
        self.related = [self._related(k) for k in range(len(self.units))]
        whole = table.evaluate(self.carried)
        self.now = Total(whole.damage, whole.bytes, len(whole.dropped))

    def _scope(self, sites: Iterable[str]) -> tuple[str, ...]:
        """The sites whose part of the total a step at `sites` may change."""
        scope = [s for site in sites for s in (site, *self.below[site])]
        return tuple(dict.fromkeys([*scope, *(sharer for site in scope for sharer in self.sharers.get(site, ()))]))

    def _related(self, unit: int) -> set[int]:
        """The units whose steps change their worth when this one takes a step."""
        scope = [*self.scopes[unit]]
        scope += [source for site in scope for c in self.table.sites[site].choices for _, source in c.shares]
        sites = {s for site in scope for s in (site, *self.table.paths[site], *(r[1] for r in self.rivals.get(site, ())))}
        sites |= {s for site in scope for near in self.store_of[site] for s in (near, *self.table.paths[near])}
        return {self.unit_of[site] for site in sites}

    # --- what a step changes

    def choice(self, site: str) -> Choice:
        return self.table.sites[site].by_options[self.carried[site]]

    def silenced(self, site: str) -> Choice | None:
        """The topmost choice above `site` that silences it."""
        return next((c for above in reversed(self.table.paths[site]) if (c := self.choice(above)).silences), None)

    def total(self, scope: Iterable[str]) -> Total:
        """What the sites in `scope` add to the whole; a tensor that is also read outside of it adds nothing."""
        scope = set(scope)
        damage, stored, dropped = 0.0, 0, 0
        seen: set[tuple[str, ...]] = set()
        for site in scope:
            above = self.silenced(site)
            choice = above or self.choice(site)
            dropped += site in self.sublayers and choice.removes
            if above is not None:
                continue
            damage += choice.predicted + (self.table.shared(choice, self.carried) if choice.shares else 0.0)
            store = self.store_of[site]
            if len(store) == 1:
                stored += choice.bytes
            elif store not in seen:
                seen.add(store)
                outside = any(s not in scope and self.silenced(s) is None for s in store)
                stored += 0 if outside else self.table.price(store, choice.options)
        return Total(damage, stored, dropped)

    def put(self, unit: int, options: Options) -> None:
        for site in self.units[unit].sites:
            self.carried[site] = options

    def change(self, unit: int, options: Options) -> Total | None:
        """What giving `unit` these options adds; None where it may not, or where all of it is silenced."""
        sites = self.units[unit].sites
        if all(self.silenced(site) is not None for site in sites):
            return None
        before, scope = self.carried[sites[0]], self.scopes[unit]
        old = self.total(scope)
        self.put(unit, options)
        new = self.total(scope) if self.allowed(scope) else None
        self.put(unit, before)
        return new and new.minus(old)

    def allowed(self, scope: Iterable[str]) -> bool:
        """Whether no two options that stand conflict, as far as `scope` is concerned."""
        for site in scope:
            for mine, other, theirs in self.rivals.get(site, ()):
                both = mine[0] in self.carried[site] and theirs[0] in self.carried[other]
                if both and self.silenced(site) is None and self.silenced(other) is None:
                    return False
        return True

    def take(self, unit: int, options: Options, change: Total) -> None:
        self.put(unit, options)
        self.now = self.now.plus(change)

    def steps(self, unit: int) -> Iterator[tuple[Options, Total]]:
        """Every step of `unit` that leaves the count of dropped sublayers alone where the budget states it."""
        carried = self.carried[self.units[unit].sites[0]]
        for options in self.units[unit].options:
            change = None if options == carried else self.change(unit, options)
            if change is not None and not (self.counted and change.dropped):
                yield options, change

    # --- the movements

    def drop(self, count: int) -> None:
        """Drop exactly `count` sublayers, each time those of least damage per sublayer."""
        self.counted = False
        while (left := count - self.now.dropped) > 0:
            steps = [
                (c.damage / c.dropped, -c.bytes, k, o, c)
                for k in range(len(self.units))
                for o, c in self.steps(k)
                if c.dropped > 0
            ]
            fitting = [step for step in steps if step[-1].dropped <= left]
            if not fitting:
                raise InfeasibleBudget(
                    f"greedy dropped {self.now.dropped} sublayers of the {count} asked for, and no option drops {left} more; "
                    "ask for fewer, or offer drop at more sites"
                )
            *_, unit, options, change = min(fitting, key=lambda step: step[:3])
            self.take(unit, options, change)
        self.counted = True

    def meet(self, budget: Budget) -> None:
        """Steps down to what the budget limits beside the count, then spends what is left; `InfeasibleBudget` if they cannot."""
        limit = budget.max_bytes(self.table.parameters)
        if limit is not None:
            self.descend(lambda now, step: now.bytes > limit)
        elif self.saving:
            self.descend(lambda now, step: now.damage + step.damage <= self.most)
        if limit is not None and self.now.bytes > limit:
            raise InfeasibleBudget(too_small(self.table, self.now.bytes, limit, budget))
        if self.now.damage > self.most:
            raise InfeasibleBudget(
                f"the plan that greedy finds for {budget} does {self.now.damage:.4g} {self.table.unit} of damage at "
                f"{format_size(self.now.bytes)}; allow more bytes or more damage"
            )
        self.fill()

    def descend(self, go_on: Callable[[Total, Total], bool]) -> None:
        """Take the step of least damage per saved byte for as long as `go_on(now, step)`."""
        best: dict[int, tuple[float, int, Options, Total]] = {}
        stale: Iterable[int] = range(len(self.units))
        while True:
            for unit in stale:
                smaller = [(c.damage / -c.bytes, c.bytes, o, c) for o, c in self.steps(unit) if c.bytes < 0]
                best.pop(unit, None)
                if smaller:
                    best[unit] = min(smaller, key=lambda step: step[:2])
            unit = min(best, key=lambda k: best[k][:2], default=None)
            if unit is None or not go_on(self.now, best[unit][-1]):
                return
            _, _, options, change = best[unit]
            self.take(unit, options, change)
            stale = self.related[unit]

    def fill(self) -> None:
        """Spend what is left: the best step that fits, in order of worth, until a whole round changes nothing."""
        moved = True
        while moved:
            moved = False
            steps = [(self.worth(c), k, o) for k in range(len(self.units)) for o, c in self.steps(k) if self.better(c)]
            for _, unit, options in sorted(steps, key=lambda step: step[:2], reverse=True):
                change = self.change(unit, options)
                if change is not None and self.better(change) and not (self.counted and change.dropped):
                    self.take(unit, options, change)
                    moved = True

    def better(self, change: Total) -> bool:
        """Whether a step fits and lowers what is minimised: damage, or bytes under a limit on damage alone."""
        after = self.now.plus(change)
        if after.bytes > self.limit or (after.damage > self.most and change.damage > 0):
            return False
        damage = 0.0 if abs(change.damage) <= _EPS * max(self.now.damage, 1e-9) else change.damage
        return (change.bytes, damage) < (0, 0.0) if self.saving else (damage, change.bytes) < (0.0, 0)

    def worth(self, change: Total) -> float:
        gain, price = (-change.bytes, change.damage) if self.saving else (-change.damage, change.bytes)
        return math.inf if price <= 0 else gain / price
