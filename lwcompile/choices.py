"""From a recipe to the table: which options stand at which sites, what each costs, and the damage the analyses found.

Bytes are the backend's own: a weight is priced as the backend would store it under the option, a sublayer by what it holds beside
its weights (biases, and norms that nothing is offered at), and everything that no site owns is fixed. A norm with options is priced
by its gain and shift, so that the smallest plan within a damage is the one that removes the most of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lwcompile.contract import Backend, Damage, Needs, StoredTensor, TransformPass
from lwcompile.errors import BadPlan, Refused
from lwcompile.graph import ModelGraph
from lwcompile.program import Program
from lwcompile.recipe import Recipe
from lwcompile.registry import make
from lwcompile.site import SUBLAYER_KINDS, Site
from lwcompile.spec import KEEP, Spec
from lwcompile.structure import Structure
from lwcompile.table import Choice, Exclusion, Group, OptionTable, SiteRow

Damages = Mapping[str, Mapping[Spec, Damage]]
"""Site id -> option -> damage, as analyses found it."""


@dataclass
class Offer:
    """The options on offer at each site, what they need of others, the transforms behind them, and the refusals with reasons.

    Behind a joint option stands its structural transform; `formats` gives the numeric one that follows.
    """

    options: dict[str, list[Spec]] = field(default_factory=dict)
    refused: dict[tuple[str, Spec], str] = field(default_factory=dict)
    transforms: dict[Spec, TransformPass] = field(default_factory=dict)
    needs: dict[tuple[str, Spec], Needs] = field(default_factory=dict)

    def formats(self, spec: Spec) -> list[TransformPass]:
        return [self.transforms[part] for part in spec.then]

    def stored(self, graph: ModelGraph, site: Site, spec: Spec) -> list[StoredTensor]:
        """What the site stores under an option: what a numeric format makes of each weight that a structural one leaves."""
        transform = self.transforms[spec]
        if not spec.then:
            return transform.stored(graph, site)
        beside = [t for t in transform.stored(graph, site) if t.role == "other"]
        return beside + [t for f in self.formats(spec) for c in transform.children(graph, site) for t in f.stored(graph, c)]


def offer(program: Program, structure: Structure, recipe: Recipe) -> Offer:
    """Every option of the recipe at every site it names; what a transform's `check` refuses is kept with the reason."""
    made = Offer()
    for site in structure.sites.values():
        graph = program.entries[site.entry]
        for spec in recipe.offered(site.id, site.kind):
            if spec == KEEP:
                continue
            for part in spec.parts:
                if part not in made.transforms:
                    made.transforms[part] = make("passes", part)
            transform, formats = made.transforms.setdefault(spec, made.transforms[spec.parts[0]]), made.formats(spec)
            if formats and (len(formats) > 1 or not transform.structural or formats[0].structural):
                raise BadPlan(f"{spec}: a site takes one structural option and one numeric format, in that order")
            try:
                if not transform.sites([site]):
                    raise Refused(f"{spec.name} does not apply to a site of kind {site.kind}", site=site.id)
                transform.check(graph, site)
                made.needs[site.id, spec] = transform.needs(graph, site, structure)
                for numeric in formats:
                    if len(numeric.sites(children := transform.children(graph, site))) != len(children) or not children:
                        raise Refused(f"{spec.name} leaves no weights here for {numeric.name}", site=site.id)
            except Refused as refusal:
                made.refused[site.id, spec] = refusal.reason
                continue
            made.options.setdefault(site.id, []).append(spec)
    return made


def groups_of(structure: Structure) -> list[Group]:
    """Sites that carry one option: what a runtime fuses, and what reads one tensor."""
    fused = [Group(ids[0], ids, "fused") for ids in structure.fused]
    return fused + [Group(ids[0], ids, "tied") for ids in structure.tied]


def build_table(
    program: Program, structure: Structure, made: Offer, damages: Damages, backend: Backend, unit: str
) -> OptionTable:
    """Price and score every offered option. One that no analysis scored is refused, with that as the reason."""
    named = {s.parent for s in structure.sites.values() if s.id in made.options or _refusals(made, s.id)}
    wanted = {id for id in (*made.options, *named) if id is not None}
    wanted |= {s.id for s in structure.sites.values() if s.kind in ("linear", "embedding", "block", *SUBLAYER_KINDS)}
    wanted |= {p for id in list(wanted) if (p := structure.sites[id].parent) is not None}
    rows: dict[str, SiteRow] = {}
    for site in structure.sites.values():
        if site.id in wanted:
            rows[site.id] = _row(program, structure, site, made, damages, backend)
    weights = {(s.entry, program.entries[s.entry].tensors[str(s.weight)]): s for s in _weight_sites(structure, rows)}
    owned = sum(rows[s.id].dense_bytes for s in weights.values())
    beside = sum(rows[s.id].dense_bytes for s in structure.sites.values() if s.id in rows and s.kind in ("norm", *SUBLAYER_KINDS))
    everything = sum(_dense_price(backend, program, key) for key in program.keys())
    fixed = max(0, everything - owned - beside) + backend.overhead(program)
    groups = [g for g in groups_of(structure) if all(id in rows for id in g.sites)]
    return OptionTable(unit, program.parameter_count(), rows, tuple(groups), fixed, tuple(_exclusions(structure, made)))


def _exclusions(structure: Structure, made: Offer) -> Iterator[Exclusion]:
    """Options that would take away what another one needs: what it keeps stays, and what it shares stays a stored tensor."""
    for (id, spec), needs in made.needs.items():
        for kept in needs.kept:
            above: str | None = kept
            while above is not None and above != id:
                silencing = (s for s in made.options.get(above, ()) if made.transforms[s].silences)
                yield from (Exclusion(id, spec, above, other) for other in silencing)
                above = structure.sites[above].parent
        for source in dict.fromkeys(needs.shared.values()):
            structural = (s for s in made.options.get(source, ()) if made.transforms[s].structural)
            yield from (Exclusion(id, spec, source, other) for other in structural)


def _weight_sites(structure: Structure, rows: Mapping[str, SiteRow]) -> list[Site]:
    return [s for s in structure.sites.values() if s.id in rows and s.kind in ("linear", "embedding") and s.weight]


def _refusals(made: Offer, id: str) -> bool:
    return any(site == id for site, _ in made.refused)


def _dense_price(backend: Backend, program: Program, key: str) -> int:
    dtype = str(program.store.dtype(key)).removeprefix("torch.")
    return backend.price(StoredTensor(program.store.shape(key), None, dtype))


def _row(program: Program, structure: Structure, site: Site, made: Offer, damages: Damages, backend: Backend) -> SiteRow:
    graph = program.entries[site.entry]
    if site.kind in ("linear", "embedding") and site.weight is not None:
        dense = _dense_price(backend, program, graph.tensors[site.weight])
    elif site.kind in SUBLAYER_KINDS:
        below = [s for s in structure.children(site.id) if s.kind in ("linear", "embedding")]
        norms = [s for s in structure.children(site.id) if s.kind == "norm" and s.id in made.options]  # rows of their own
        dense = max(0, 4 * (site.parameters - sum(s.shape[0] * s.shape[1] for s in below) - sum(s.parameters for s in norms)))
    elif site.kind == "norm":
        dense = 4 * site.parameters
    else:
        dense = 0
    choices = [Choice(KEEP, 0.0, dense)]
    for spec in made.options.get(site.id, ()):
        transform = made.transforms[spec]
        *structural, last = spec.parts
        facts: dict[str, Any] = {"silences": transform.silences, "replaces": transform.replaces}
        facts |= {"structural": next(iter(structural), None), "shares": tuple(made.needs[site.id, spec].shared.items())}
        try:
            stored = sum(backend.price(t) for t in made.stored(graph, site, spec))
        except Refused as refusal:
            choices.append(Choice(last, 0.0, dense, refused=refusal.reason, **facts))
            continue
        found = damages.get(site.id, {}).get(spec)
        if found is None:
            choices.append(Choice(last, 0.0, stored, refused="no analysis scored it", **facts))
            continue
        spread = (found.high - found.low) / 3.92 if found.high == found.high else 0.0
        choices.append(Choice(last, found.value, stored, spread, **facts))
    for (id, spec), reason in made.refused.items():
        if id == site.id:
            *structural, last = spec.parts
            choices.append(Choice(last, 0.0, dense, refused=reason, structural=next(iter(structural), None)))
    return SiteRow(site.id, site.parent, site.kind, site.parameters, dense, tuple(choices))


def dense_bytes(program: Program, backend: Backend) -> int:
    """What the dense program would store on this backend."""
    return sum(_dense_price(backend, program, key) for key in program.keys()) + backend.overhead(program)
