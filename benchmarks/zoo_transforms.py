"""Every transform that is installed, at one model: where it applies, why it does not elsewhere, and plans that hold them all.

Each is asked at every site of its kinds. Those that apply somewhere are put into a plan, at sites that do not get in each other's
way; what is refused there, or finds no place, is tried in a further plan. Each plan is applied by the manager, whose verifier sees
it, gets its decode graph if it is a language model's, and is written as an ONNX file that must compute what the graph does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lwcompile.apply import apply_plan
from lwcompile.contract import Needs, Pass, TransformPass
from lwcompile.decode import derive_decode
from lwcompile.errors import Refused
from lwcompile.program import Program
from lwcompile.registry import load, make, plugins
from lwcompile.site import Site
from lwcompile.spec import Spec
from lwcompile.structure import Structure
from lwcompile.trials import context

SIZES = ("window{size=4,sinks=1}", "linear{window=4,steps=1,tokens=64}", "linear_relu{taps=3,steps=1,tokens=64}",
         "quantize{bits=4,group_size=16,solver=rtn}", "prune_mlp{multiple=4}", "loop{loops=3,first=0,last=0}")  # fmt: skip
"""Options of transforms whose defaults are for models of another size; all others are tried at their defaults."""

PLANS = 6
"""At most so many for one model; a transform that found no place in any of them is said to be refused."""


@dataclass(frozen=True)
class Outcome:
    """A transform at one model. fit, sites: how many took it when asked, of how many; at: where it was applied; parity: of the file."""

    name: str
    fit: int = 0
    sites: int = 0
    at: str = ""
    parity: float = float("nan")
    reason: str = ""


@dataclass
class Candidate:
    """A transform with the sites that take it, and what it needs there."""

    transform: TransformPass
    outcome: Outcome
    places: list[tuple[Site, Needs]]


def transforms() -> list[TransformPass]:
    """By name, each once, configured for small models."""
    sizes = {spec.name: spec for spec in map(Spec.parse, SIZES)}
    found = [name for name in dict.fromkeys(p.name for p in plugins("passes")) if _is_transform(load("passes", name))]
    return [make("passes", sizes.get(name, Spec(name))) for name in found]


def _is_transform(plugin: type[Pass]) -> bool:
    return issubclass(plugin, TransformPass)


def outcomes(program: Program, structure: Structure, lower: Callable[[Program], float], causal: bool) -> list[Outcome]:
    """lower: writes a program as a file and returns its parity, or raises."""
    asked = [_ask(program, structure, transform) for transform in transforms()]
    left = sorted((c for c in asked if c.places), key=lambda c: len(c.places))
    for _ in range(PLANS):
        plan = dict(_places(left))
        if not plan:
            break
        choices = {site.id: (c.transform.spec(),) for c, site in plan.values()}
        ctx = context(program, structure)
        made = apply_plan(program, choices, structure, ctx)
        refused = {(r.by, r.site): r.text for r in ctx.remarks if r.kind == "refused"}
        done = [(c, site) for c, site in plan.values() if (c.transform.name, site.id) not in refused]
        parity = lower(_decoding(made) if causal else made) if done else float("nan")
        for c, site in plan.values():
            if (reason := refused.get((c.transform.name, site.id))) is None:
                c.outcome = replace(c.outcome, at=site.id, parity=parity, reason="")
                left.remove(c)
            else:
                c.outcome = replace(c.outcome, reason=reason)
                c.places = [p for p in c.places if p[0] is not site]
        left = [c for c in left if c.places]
    return [c.outcome for c in asked]


def _ask(program: Program, structure: Structure, transform: TransformPass) -> Candidate:
    sites, places, reasons = transform.sites(structure.sites.values()), [], Counter[str]()
    for site in sites:
        graph = program.entries[site.entry]
        try:
            transform.check(graph, site)
            places.append((site, transform.needs(graph, site, structure)))
        except Refused as refusal:
            reasons[refusal.reason] += 1
    why = reasons.most_common(1)[0][0] if reasons else f"it has no {' or '.join(transform.kinds)}"
    return Candidate(transform, Outcome(transform.name, len(places), len(sites), reason="" if places else why), places)


def _places(left: list[Candidate]) -> Iterator[tuple[str, tuple[Candidate, Site]]]:
    """A place for each that finds one beside the others: nothing above or below another's, and nothing that another one needs."""
    taken: set[str] = set()
    kept: set[str] = set()
    for candidate in left:
        for site, needs in candidate.places:
            wants = {*needs.kept, *needs.shared.values()}
            if any(_related(site.id, id) for id in taken | kept) or any(_related(want, id) for want in wants for id in taken):
                continue
            taken.add(site.id)
            kept |= wants
            yield candidate.transform.name, (candidate, site)
            break


def _related(a: str, b: str) -> bool:
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


def _decoding(program: Program) -> Program:
    """With its decode graph, if one can be derived."""
    try:
        return replace(program, entries={**program.entries, "decode": derive_decode(program.main)})
    except Refused:
        return program


def table(rows: dict[str, list[Outcome]]) -> list[str]:
    """How many sites of each model took each transform, of how many; and below, why others did not."""
    names = list(dict.fromkeys(o.name for found in rows.values() for o in found))
    lines = [f"| Architecture | {' | '.join(names)} | ONNX parity |", f"|{'---|' * (len(names) + 2)}"]
    for model, found in rows.items():
        cells = {o.name: f"{o.fit}/{o.sites}" if o.at else "refused" for o in found}
        worst = max((o.parity for o in found if o.at), default=float("nan"))
        lines.append(f"| {model} | {' | '.join(cells.get(name, '') for name in names)} | {worst:.0e} |")
    lines += ["", "### Where a transform is refused throughout, and why", ""]
    for name in names:
        reasons: dict[str, list[str]] = {}
        for model, found in rows.items():
            for o in found:
                if o.name == name and not o.at:
                    reasons.setdefault(o.reason or "it stood in the way of the others", []).append(model)
        lines += [f"- {name}: {reason} ({', '.join(models)})." for reason, models in reasons.items()]
    return lines
