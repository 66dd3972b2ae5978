"""The table of choices: for every site, each option with its damage and its bytes.

The prediction is additive: a plan's damage is the sum of its sites' damages, where the sites below a dropped or replaced one
count nothing. `OptionTable.evaluate` is the one definition of a plan's damage, bytes and bits; allocators, reports and tests
all use it. Summed damages are known not to be monotone end to end (arXiv 2410.14649), so a plan is measured afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lwcompile.budget import Budget
from lwcompile.errors import BadInput, BadPlan
from lwcompile.options import (
    NOTHING,
    Assignment,
    Choice,
    Exclusion,
    Group,
    Options,
    SiteRow,
    canonical,
    choice_from_json,
    choice_to_json,
    format_options,
)
from lwcompile.site import SUBLAYER_KINDS
from lwcompile.spec import KEEP, Spec

if TYPE_CHECKING:
    from lwcompile.contract import Allocator
    from lwcompile.plans import Plan

__all__ = [
    "Assignment", "Choice", "Evaluation", "Exclusion", "Group", "OptionTable", "Options", "SiteRow", "Unit", "Violation",
    "canonical", "format_options", "pareto",
]  # fmt: skip


class Evaluation(NamedTuple):
    """What a plan is predicted to be: damage in the table's unit, everything stored, and the sublayers it drops."""

    damage: float
    bytes: int
    avg_bits: float
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Violation:
    """One reason why an assignment is not a plan of the table; `sites` are the places to mend, the worst first."""

    sites: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class Unit:
    """Sites that groups bind to one option, and the options that none of them lacks or refuses, keep first."""

    sites: tuple[str, ...]
    options: tuple[Options, ...]


@dataclass(frozen=True)
class OptionTable:
    """Every choice of a model.

    Attributes:
        unit: of damage, such as `nats/token`.
        parameters: numbers in the dense model, tied ones counted once: what average bits divide by.
        sites: rows by site id; the parent of a row has a row too.
        groups: sites that carry one option together.
        fixed_bytes: stored by no site: norms, biases, buffers, the graph.
        exclusions: pairs of options that conflict.
    """

    unit: str
    parameters: int
    sites: dict[str, SiteRow]
    groups: tuple[Group, ...] = ()
    fixed_bytes: int = 0
    exclusions: tuple[Exclusion, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        object.__setattr__(self, "exclusions", tuple(Exclusion(*e) for e in self.exclusions))
        if self.parameters <= 0:
            raise BadInput("the table counts no parameters, so average bits mean nothing")
        for id, row in self.sites.items():
            if row.site != id:
                raise BadInput(f"the table keeps site {row.site!r} under {id!r}")
            if row.parent is not None and row.parent not in self.sites:
                raise BadInput(f"site {id!r} stands below {row.parent!r}, which has no row in the table")
        for group in self.groups:
            for id in group.sites:
                if id not in self.sites:
                    raise BadInput(f"group {group.name!r} names site {id!r}, which has no row in the table")
                if set(self.ancestors(id)) & set(group.sites):
                    raise BadInput(f"group {group.name!r} holds {id!r} and a site above it")
        for exclusion in self.exclusions:
            if missing := {exclusion.site, exclusion.other} - set(self.sites):
                raise BadInput(f"an exclusion names site {min(missing)!r}, which has no row in the table")
            if KEEP in (exclusion.option, exclusion.other_option):
                raise BadInput(f"an exclusion at site {exclusion.site!r} names keep, which conflicts with nothing")
        for id, row in self.sites.items():
            for other in (other for choice in row.choices for pair in choice.shares for other in pair):
                if other not in self.sites:
                    raise BadInput(f"an option of site {id!r} shares site {other!r}, which has no row in the table")

    # --- the tree

    def ancestors(self, id: str) -> list[str]:
        """The sites above, nearest first."""
        chain: list[str] = []
        parent = self.sites[id].parent
        while parent is not None:
            if parent in chain or parent == id:
                raise BadInput(f"site {id!r} stands above itself")
            chain.append(parent)
            parent = self.sites[parent].parent
        return chain

    @cached_property
    def paths(self) -> dict[str, tuple[str, ...]]:
        """Site id -> the sites above it, nearest first."""
        return {id: tuple(self.ancestors(id)) for id in self.sites}

    @cached_property
    def sublayers(self) -> tuple[str, ...]:
        """The sites that `drop_sublayers` counts: attention, MLP and their like, one inside another counted once."""
        kinds = {id: row.kind in SUBLAYER_KINDS for id, row in self.sites.items()}
        return tuple(id for id in self.sites if kinds[id] and not any(kinds[a] for a in self.paths[id]))

    # --- the groups

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The sites, joined where a group binds them, with what each unit may carry."""
        return tuple(Unit(sites, self._common(sites)) for sites in _components(self.sites, self.groups))

    @cached_property
    def stores(self) -> tuple[tuple[str, ...], ...]:
        """The sites, joined where they read one tensor: what bytes are counted by."""
        return tuple(_components(self.sites, [g for g in self.groups if g.reason == "tied"]))

    def _common(self, sites: Sequence[str]) -> tuple[Options, ...]:
        allowed = [{o for o, c in self.sites[id].by_options.items() if c.refused is None} for id in sites]
        return tuple(c.options for c in self.sites[sites[0]].choices if all(c.options in a for a in allowed))

    def price(self, store: Sequence[str], options: Options) -> int:
        """Bytes of one stored tensor under `options`; where its sites are priced differently, the highest."""
        return max(self.sites[id].choice(options).bytes for id in store)

    def shared(self, choice: Choice, carried: Assignment) -> float:
        """The damage that tensors do where `choice` reads them a second time, under what their own sites carry."""
        return math.fsum(self.damage_at(own, source, carried.get(source, ())) for own, source in choice.shares)

    def damage_at(self, own: str, source: str, options: Options) -> float:
        """What `options` at `source` do at `own`, which reads the same tensor: what they would do there, else what they do there."""
        there = self.sites[own].by_options.get(options)
        return (self.sites[source].choice(options) if there is None or there.refused else there).predicted

    def offering(self, wanted: Callable[[Choice], bool]) -> OptionTable:
        """The table with some of its choices alone, keep always among them: what a part of the options would do."""
        rows = {
            id: replace(row, choices=tuple(c for c in row.choices if not c.options or wanted(c)))
            for id, row in self.sites.items()
        }
        named = {id: {spec for options in row.by_options for spec in options} for id, row in rows.items()}
        pairs = [e for e in self.exclusions if canonical([e.option])[0] in named[e.site]]
        pairs = [e for e in pairs if canonical([e.other_option])[0] in named[e.other]]
        return replace(self, sites=rows, exclusions=tuple(pairs))

    # --- what a plan is

    def effective(self, assignment: Assignment) -> dict[str, Options]:
        """The assignment in canonical form, without keeps and without what stands below a silencing choice."""
        carried = {id: options for id in self.sites if (options := canonical(assignment.get(id, ())))}
        return {id: o for id, o in carried.items() if self._silenced(id, carried) is None}

    def _silenced(self, id: str, carried: Assignment) -> Choice | None:
        """The topmost choice that silences `id`."""
        for above in reversed(self.paths[id]):
            if options := carried.get(above):
                choice = self.sites[above].choice(options)
                if choice.silences:
                    return choice
        return None

    def evaluate(self, assignment: Assignment) -> Evaluation:
        """Predicted damage, bytes, average bits and dropped sublayers; `BadPlan` for what the table does not offer."""
        for id in assignment:
            if id not in self.sites:
                raise BadPlan(f"unknown site {id!r}{self._nearest(id)}")
        carried = self.effective(assignment)
        silenced = {id: self._silenced(id, carried) for id in self.sites}
        alive = {id: self.sites[id].choice(carried.get(id, ())) for id in self.sites if silenced[id] is None}
        damage = math.fsum(choice.predicted + self.shared(choice, carried) for choice in alive.values())
        stored = self.fixed_bytes
        for store in self.stores:
            variants = {alive[id].options for id in store if id in alive}
            stored += sum(self.price(store, options) for options in variants)
        dropped = tuple(id for id in self.sublayers if (alive.get(id) or silenced[id] or NOTHING).removes)
        return Evaluation(damage, stored, 8 * stored / self.parameters, dropped)

    def violations(self, assignment: Assignment) -> list[Violation]:
        """Why `assignment` is not a plan of this table: unknown sites, options not offered, broken groups, conflicts."""
        found = [Violation((id,), f"unknown site {id!r}{self._nearest(id)}") for id in assignment if id not in self.sites]
        for id in (id for id in assignment if id in self.sites):
            try:
                self.sites[id].choice(assignment[id])
            except BadPlan as error:
                found.append(Violation((id,), str(error)))
        if found:
            return found
        carried = self.effective(assignment)
        alive = {id: carried.get(id, ()) for id in self.sites if self._silenced(id, carried) is None}
        for group in self.groups:
            first, *others = [id for id in group.sites if id in alive] or [""]
            for other in others:
                if alive[other] != alive[first]:
                    found.append(Violation((other, first), _broken(group, first, alive[first], other, alive[other])))
                    break
        for site, option, other, other_option in self.exclusions:
            if canonical([option])[0] in alive.get(site, ()) and canonical([other_option])[0] in alive.get(other, ()):
                message = f"site {other!r} cannot carry {other_option} while {site!r} carries {option}: they conflict"
                found.append(Violation((other, site), message))
        return found

    def _nearest(self, id: str) -> str:
        near = get_close_matches(id, list(self.sites), n=1, cutoff=0.5)
        return f"; did you mean {near[0]!r}?" if near else ""

    # --- on disk

    def to_json(self) -> str:
        """One deterministic JSON text; `from_json` reads it back to an equal table."""
        rows = [
            {
                "site": row.site, "parent": row.parent, "kind": row.kind, "parameters": row.parameters,
                "dense_bytes": row.dense_bytes, "choices": [choice_to_json(c) for c in row.choices],
            }
            for row in self.sites.values()
        ]  # fmt: skip
        body = {
            "unit": self.unit,
            "parameters": self.parameters,
            "fixed_bytes": self.fixed_bytes,
            "groups": [{"name": g.name, "sites": list(g.sites), "reason": g.reason} for g in self.groups],
            "exclusions": [[e.site, str(e.option), e.other, str(e.other_option)] for e in self.exclusions],
            "origin": self.origin,
            "sites": rows,
        }
        return json.dumps(body, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> OptionTable:
        """The table that `to_json` wrote; `BadInput` if it is damaged."""
        try:
            body = json.loads(text)
            rows = [SiteRow(**{**row, "choices": tuple(map(choice_from_json, row["choices"]))}) for row in body["sites"]]
            groups = tuple(Group(g["name"], tuple(g["sites"]), g["reason"]) for g in body["groups"])
            exclusions = tuple(Exclusion(s, Spec.parse(o), t, Spec.parse(p)) for s, o, t, p in body["exclusions"])
            sites = {row.site: row for row in rows}
            return cls(body["unit"], body["parameters"], sites, groups, body["fixed_bytes"], exclusions, body["origin"])
        except (ValueError, KeyError, TypeError, BadPlan) as error:
            raise BadInput(f"the table of choices is damaged ({error}); remove it and score again") from error

    def digest(self) -> str:
        """A hash of everything in the table."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def pareto(
    table: OptionTable, allocator: Allocator, n: int = 24, *, low: int | None = None, high: int | None = None
) -> list[Plan]:
    """The curve of size against predicted damage, from the scores the table holds: at most `n` plans, smallest first.

    Sizes are spaced evenly in the logarithm from `low` (default: the smallest plan there is) to `high` (default: the dense
    model); plans that another beats in both are left out.
    """
    low = low or allocator.allocate(table, Budget(max_damage=math.inf)).bytes or 1
    high = max(high or table.evaluate({}).bytes, low)
    sizes = sorted({math.ceil(low * (high / low) ** (k / max(n - 1, 1))) for k in range(n)}, reverse=True)
    curve: list[Plan] = []
    for size in sizes:
        plan = allocator.allocate(table, Budget(bytes=max(size, low)))
        while curve and (curve[-1].predicted or 0.0) >= (plan.predicted or 0.0):  # smaller and no worse
            curve.pop()
        curve.append(plan)
    return curve[::-1]


def _components(sites: Iterable[str], groups: Iterable[Group]) -> list[tuple[str, ...]]:
    """The sites, joined where a group connects them, in the order of their first member."""
    members = {site: [site] for site in sites}
    rank = {site: k for k, site in enumerate(members)}
    for group in groups:
        for site in group.sites[1:]:
            into, other = members[group.sites[0]], members[site]
            if into is not other:
                into.extend(other)
                members.update((moved, into) for moved in other)
    return [tuple(sorted(m, key=rank.__getitem__)) for m in {id(m): m for m in members.values()}.values()]


def _broken(group: Group, first: str, options: Options, other: str, other_options: Options) -> str:
    why = "read one tensor" if group.reason == "tied" else "run as one matrix"
    return (
        f"site {other!r} carries {format_options(other_options)} and {first!r} carries {format_options(options)}, "
        f"but they {why} (group {group.name!r}): give both the same option"
    )
