"""Exact allocation by an integer program: least predicted damage under the budget.

Before -> after: a table of damages and bytes -> the plan of least summed damage. A binary variable per site and option:
    min   sum_{s,o} damage[s,o] x[s,o]
    s.t.  sum_o x[s,o] = 1 at the top, sum_o x[s,o] = sum_{o not silencing} x[parent(s),o] below it
          x[s,o] <= z[g,o],  sum_o z[g,o] = 1    a group across parents; within one parent its sites share their variables
          y[t,o] >= x[s,o]                       a tensor t that sites below several parents read: its bytes count once
          sum_p m[s,o,p] = x[s,o], m <= x[t,p]   option o reads the tensor of t at s too, where p does its damage once more
          x[s,o] + x[t,p] <= 1                   options that conflict
          fixed + sum bytes x <= budget,  sum damage x <= limit,  sum dropped x = count
Source: arXiv 2006.10518 (section on the integer program), arXiv 2405.17873; solved with HiGHS (Huangfu and Hall, 2018).
Cost: seconds for hundreds of sites, no model needed. Hits the budget from below; what the gap leaves is spent by greedy steps.
Refuses: a budget that no plan meets, with what could be met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from scipy import optimize, sparse

from lwcompile.budget import Budget, format_size
from lwcompile.contract import Allocator
from lwcompile.errors import BadPlan, InfeasibleBudget
from lwcompile.passes.allocate._unheard import unheard
from lwcompile.passes.allocate.greedy import Greedy, refine, too_small
from lwcompile.plans import Plan
from lwcompile.table import Evaluation, Options, OptionTable, canonical

_AIM = 1e4  # largest cost: HiGHS stops at an absolute gap of 1e-6, whatever the relative one
_SIDE = 100.0  # a limit in its row: HiGHS keeps rows to an absolute 1e-6

Row = dict[int, float]
Found = dict[str, Options]


@dataclass(frozen=True)
class IntegerProgram(Allocator):
    """The best additive plan, by branch and bound.

    Options:
        gap: how far from the optimum it may stop, relative to it.
        seconds: after this long, the best plan so far, or greedy's if that is better.
    """

    name: ClassVar[str] = "integer_program"
    gap: float = 1e-4
    seconds: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.gap < 1 or not self.seconds > 0:
            raise ValueError("gap lies between 0 and 1, and seconds above 0")

    def allocate(self, table: OptionTable, budget: Budget, oracle: Callable[[Plan], float] | None = None) -> Plan:
        if budget.empty:
            raise BadPlan("a budget needs a size, a number of sublayers to drop, or a limit on damage")
        program = _Program(table, self.gap, self.seconds)
        saving = budget.max_damage is not None and not budget.sized
        limit, count = budget.max_bytes(table.parameters), budget.drop_sublayers
        found, finished = program.solve("bytes" if saving else "damage", limit, budget.max_damage, (count, count))
        if found is None and finished:
            raise InfeasibleBudget(_explain(program, table, budget, limit))
        notes: dict[str, str] = {}
        if not finished:
            notes["notes"] = f"stopped after {self.seconds:g} s, before the optimum was proven"
            found = _better(table, budget, found)
        assert found is not None
        return Plan.of(table, refine(table, found, budget), budget, allocator=str(self.spec()), **notes)


def _better(table: OptionTable, budget: Budget, found: Found | None) -> Found:
    """What the solver had when time was up, or greedy's plan if that is better; `InfeasibleBudget` if there is neither."""
    try:
        greedy = Greedy().allocate(table, budget).choices
    except InfeasibleBudget:
        if found is None:
            raise
        return found
    if found is None:
        return greedy
    saving = budget.max_damage is not None and not budget.sized
    key: Callable[[Evaluation], tuple[float, float]] = (
        (lambda e: (e.bytes, e.damage)) if saving else (lambda e: (e.damage, e.bytes))
    )
    return min(found, greedy, key=lambda choices: key(table.evaluate(choices)))


def _explain(program: _Program, table: OptionTable, budget: Budget, limit: int | None) -> str:
    """Why nothing meets the budget, and what would: the count of drops first, then the size, then the damage."""
    count = (budget.drop_sublayers, budget.drop_sublayers)
    smallest, _ = program.solve("bytes", None, None, count)
    if smallest is None:
        ends = (
            program.solve("most_drops", None, None, (None, count[1])),
            program.solve("fewest_drops", None, None, (count[0], None)),
        )
        near = [str(len(table.evaluate(found).dropped)) for found, _ in ends if found is not None]
        offering = "; offer it in the recipe, as in `options: {attention: drop, mlp: drop}`" if near == ["0"] else ""
        return (
            f"no plan drops exactly {count[0]} sublayers with the options offered: {' or '.join(near)} can be dropped{offering}"
        )
    least = table.evaluate(smallest).bytes
    if limit is not None and least > limit:
        return too_small(table, least, limit, budget)
    mildest, _ = program.solve("damage", limit, None, count)
    within, _ = program.solve("bytes", None, budget.max_damage, count)
    harm = f": the least is {table.evaluate(mildest).damage:.4g}" if mildest is not None else ""
    size = f"; the smallest plan within that damage is {format_size(table.evaluate(within).bytes)}" if within is not None else ""
    return f"no plan meets {budget} (damage in {table.unit}){harm}{size}"


class _Program:
    """The table as variables and rows; solved for several ends while explaining."""

    def __init__(self, table: OptionTable, gap: float, seconds: float) -> None:
        self.table, self.gap, self.seconds = table, gap, seconds
        self.vars: list[bool] = []  # whether each variable is whole
        self.rows: list[tuple[Row, float, float]] = []
        self.at: dict[str, dict[Options, int]] = {}
        self.cells: list[tuple[tuple[str, ...], dict[Options, int]]] = []
        self.damage: Row = {}
        self.bytes: Row = {}
        self.drops: Row = {}
        self._variables()
        self._hierarchy()
        self._stores()
        self._shares()
        self._exclusions()
        self._drops()

    def _new(self, options: Iterable[Options], whole: bool) -> dict[Options, int]:
        options = tuple(options)
        first = len(self.vars)
        self.vars += [whole] * len(options)
        return {o: first + k for k, o in enumerate(options)}

    def _variables(self) -> None:
        """One variable per option of a cell: the sites of a unit that stand below one parent, which live and die together."""
        for unit in self.table.units:
            cells: dict[str | None, list[str]] = {}
            for site in unit.sites:
                cells.setdefault(self.table.sites[site].parent, []).append(site)
            shared = self._new(unit.options, True) if len(cells) > 1 else None
            if shared is not None:
                self.rows.append((dict.fromkeys(shared.values(), 1.0), 1.0, 1.0))
            for sites in cells.values():
                x = self._new(unit.options, True)
                self.cells.append((tuple(sites), x))
                for site in sites:
                    self.at[site] = x
                    for o, v in x.items():
                        self.damage[v] = self.damage.get(v, 0.0) + self.table.sites[site].by_options[o].predicted
                if shared is not None:
                    self.rows += [({v: 1.0, shared[o]: -1.0}, -math.inf, 0.0) for o, v in x.items()]

    def _hierarchy(self) -> None:
        for sites, x in self.cells:
            row: Row = dict.fromkeys(x.values(), 1.0)
            parent = self.table.sites[sites[0]].parent
            if parent is not None:
                keeps = [o for o in self.at[parent] if not self.table.sites[parent].by_options[o].silences]
                row |= {self.at[parent][o]: -1.0 for o in keeps}
            alive = 1.0 if parent is None else 0.0
            self.rows.append((row, alive, alive))

    def _stores(self) -> None:
        for store in self.table.stores:
            cells = {min(x.values()): x for x in (self.at[site] for site in store)}
            variables = next(iter(cells.values()))
            if len(cells) > 1:
                stored = self._new(variables, False)
                self.rows += [({v: 1.0, stored[o]: -1.0}, -math.inf, 0.0) for x in cells.values() for o, v in x.items()]
                variables = stored
            for o, v in variables.items():
                self.bytes[v] = self.bytes.get(v, 0.0) + self.table.price(store, o)

    def _shares(self) -> None:
        """What a shared tensor's options do at the place that shares it; sources of one cell are counted in one go."""
        for site, row in self.table.sites.items():
            for options, v in self.at[site].items():
                cells: dict[int, list[tuple[str, str]]] = {}
                for own, source in row.by_options[options].shares:
                    cells.setdefault(min(self.at[source].values()), []).append((own, source))
                for pairs in cells.values():
                    x = self.at[pairs[0][1]]
                    harm = {o: math.fsum(self.table.damage_at(own, source, o) for own, source in pairs) for o in x}
                    if not any(harm.values()):
                        continue
                    twice = self._new(x, False)
                    self.rows.append(({v: -1.0, **dict.fromkeys(twice.values(), 1.0)}, 0.0, 0.0))
                    self.rows += [({twice[o]: 1.0, x[o]: -1.0}, -math.inf, 0.0) for o in x]
                    self.damage |= {twice[o]: harm[o] for o in x}

    def _exclusions(self) -> None:
        for site, option, other, other_option in self.table.exclusions:
            row: Row = {}
            for at, spec in ((site, option), (other, other_option)):
                for o, v in self.at[at].items():
                    if canonical([spec])[0] in o:
                        row[v] = row.get(v, 0.0) + 1.0
            self.rows.append((row, -math.inf, 1.0))

    def _drops(self) -> None:
        """A sublayer is dropped by its own choice or by one above it; at most one of them is taken."""
        for site in self.table.sublayers:
            for at in (site, *self.table.paths[site]):
                for o, v in self.at[at].items():
                    if self.table.sites[at].by_options[o].removes:
                        self.drops[v] = self.drops.get(v, 0.0) + 1.0

    def solve(
        self,
        end: Literal["damage", "bytes", "most_drops", "fewest_drops"],
        limit: int | None,
        most: float | None,
        count: tuple[int | None, int | None],
    ) -> tuple[Found | None, bool]:
        """The best assignment and whether the search finished; None if there is none (or, unfinished, none yet)."""
        room = math.inf if limit is None else limit - self.table.fixed_bytes
        allowed = math.inf if most is None else most
        if room < 0:
            return None, True
        for _ in range(4):
            found, finished = self._milp(end, room, allowed, count)
            if found is None:
                return None, finished
            total = self.table.evaluate(found)
            over = total.bytes - limit if limit is not None else 0
            harm = total.damage - most if most is not None and most < math.inf else 0.0
            if over <= 0 and harm <= 1e-12 * total.damage:
                return found, finished
            # within the solver's tolerance and still a few bytes too large: ask for less
            room, allowed = room - max(over, 0), allowed - max(harm, 0.0)
        return None, False

    def _milp(self, end: str, room: float, most: float, count: tuple[int | None, int | None]) -> tuple[Found | None, bool]:
        rows = list(self.rows)
        high: Any = np.ones(len(self.vars))
        for row, limit in ((self.bytes, room), (self.damage, most)):
            if limit == math.inf:
                continue
            high[[v for v, c in row.items() if c > limit]] = 0.0
            if limit > 0:
                fitting = {v: _SIDE * c / limit for v, c in row.items() if c <= limit}
                rows.append((fitting, -math.inf, _SIDE))
        if count != (None, None):
            least, top = count
            rows.append((self.drops, -math.inf if least is None else least, math.inf if top is None else top))
        ends = {"damage": (self.damage, 1.0), "bytes": (self.bytes, 1.0), "most_drops": (self.drops, -1.0)}
        aim, sign = ends.get(end, (self.drops, 1.0))
        cost = np.zeros(len(self.vars))
        cost[list(aim)] = list(aim.values())
        cost *= sign * _AIM / (np.abs(cost).max(initial=0.0) or 1.0)
        with unheard():
            result = optimize.milp(
                cost,
                integrality=np.array(self.vars, dtype=int),
                bounds=optimize.Bounds(0, high),
                constraints=_constraints(rows, len(self.vars)),
                options={"mip_rel_gap": self.gap, "time_limit": self.seconds},
            )
        finished = result.status in (0, 2)  # optimal, or proven infeasible
        if result.x is None:
            return None, finished
        return self._assignment(result.x), finished

    def _assignment(self, values: np.ndarray) -> Found:
        best = {site: max(x, key=lambda o: values[x[o]]) for site, x in self.at.items()}
        return self.table.effective(best)


def _constraints(rows: list[tuple[Row, float, float]], width: int) -> optimize.LinearConstraint:
    data = np.array([c for row, _, _ in rows for c in row.values()])
    columns = np.array([v for row, _, _ in rows for v in row], dtype=int)
    starts = np.cumsum([0, *(len(row) for row, _, _ in rows)])
    matrix = sparse.csr_array((data, columns, starts), shape=(len(rows), width))
    low: Any = np.array([low for _, low, _ in rows])
    high: Any = np.array([high for _, _, high in rows])
    return optimize.LinearConstraint(matrix, low, high)
