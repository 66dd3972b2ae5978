"""Why a backend could not hold a plan from elsewhere: for a plan that a recipe does not offer, where offering it would not help."""

from __future__ import annotations

from fnmatch import fnmatchcase

from lwcompile.contract import Backend
from lwcompile.errors import LwError, Refused
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.structure import Structure
from lwcompile.table import Options, OptionTable, canonical


def cannot_hold(plan: Plan, table: OptionTable, structure: Structure, dense: Program, backend: Backend) -> str | None:
    """Why the backend would refuse the first option of a plan that its site is not offered; None if it would not."""
    rows = table.sites
    for key, options in plan.choices.items():
        matches = [id for id in rows if fnmatchcase(id, key)]
        choices = [c for id in matches if (c := rows[id].by_options.get(canonical(options))) is not None]
        if any(choice.refused is None for choice in choices):
            continue
        if choices:  # refused, and the table said why
            return None
        try:
            refusals = (_refusal(id, options, structure, dense, backend) for id in matches)
            return next((reason for reason in refusals if reason is not None), None)
        except LwError:  # the table has said what is wrong with it
            return None
    return None


def _refusal(id: str, options: Options, structure: Structure, dense: Program, backend: Backend) -> str | None:
    """What the backend says against the numeric formats that `options` would leave at a site."""
    site = structure.sites[id]
    graph = dense.entries[site.entry]
    try:
        for transform in (make("passes", option) for option in options):
            for tensor in transform.stored(graph, site) if transform.sites([site]) and not transform.structural else []:
                backend.price(tensor)
    except Refused as refusal:
        return refusal.reason
    return None
