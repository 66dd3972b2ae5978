"""What the analyses of a run say together: scores turned into damages where some were measured, and how well each one did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lwcompile.calibration import calibrate_options, rank_correlation
from lwcompile.choices import Offer
from lwcompile.context import Context
from lwcompile.contract import Damage, Score
from lwcompile.errors import BadInput
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.spec import Spec
from lwcompile.structure import Structure


def price_by_scores(
    ctx: Context, program: Program, name: str, scores: Mapping[str, Score], found: dict[str, dict[Spec, Damage]]
) -> None:
    """Give the options that nothing has priced yet, at sites that `scores` ranks, the damage that their score stands for.

    A site without a score has that of the nearest site above it. The fit rests on what was measured; without enough of that
    the options stay unpriced, with a remark.
    """
    sites = ctx.find_structure(program).sites
    offers = ctx.offers(program)
    ranked: dict[tuple[str, ...], float] = {}
    for unit in {unit for unit, _ in offers}:
        above = [unit[0]]
        while (parent := sites[above[-1]].parent) is not None:
            above.append(parent)
        if (nearest := next((id for id in above if id in scores), None)) is not None:
            ranked[unit] = scores[nearest].value
    priced = {(unit, option): [found.get(id, {}).get(option) for id in unit] for unit, option in offers if unit in ranked}
    unpriced = [key for key, damages in priced.items() if all(d is None for d in damages)]
    measured = {k: sum(d.value for d in ds if d) for k, ds in priced.items() if all(d is not None and d.measured for d in ds)}
    if not unpriced:
        return
    try:
        lines = calibrate_options(ranked, measured)
    except BadInput as error:
        ctx.remark(
            name, "", "note", f"its scores price nothing ({error}); add an analysis that measures a few units to fit them to"
        )
        return
    for unit, option in unpriced:
        if option in lines:
            for id, damage in ctx.shares(program, unit, lines[option].damage(ranked[unit])):
                found.setdefault(id, {})[option] = damage
    ctx.remark(name, "", "note", f"its scores stand for {next(iter(lines.values()))}", points=len(measured))


def price_joint(program: Program, offer: Offer, structure: Structure, found: dict[str, dict[Spec, Damage]]) -> None:
    """Give joint options that nothing has priced the sum of what their parts do: the structural one at its site, and the numeric
    one at each weight that it leaves there, less what of the weight is gone. Weights that are new (factors) have no such figure.

    Where the structural part is measured and the joint option only predicted, the sum replaces the prediction: otherwise a change
    whose damage a prediction misses would look cheaper with a coarser format than without one.
    """
    weights = {(s.entry, s.weight): s for s in structure.sites.values() if s.kind in ("linear", "embedding")}
    for id, options in offer.options.items():
        site = structure.sites[id]
        for option in (o for o in options if o.then):
            structural, numeric = option.parts
            alone, joint = (found.get(id, {}).get(o) for o in (structural, option))
            if joint is not None and (joint.measured or alone is None or not alone.measured):
                continue
            children = offer.transforms[option].children(program.entries[site.entry], site)
            whole = [weights.get((child.entry, child.weight)) for child in children]
            below = [None if w is None else found.get(w.id, {}).get(numeric) for w in whole]
            if alone is None or any(damage is None for damage in below):
                continue
            total = alone.value
            for child, weight, damage in zip(children, whole, below):
                if weight is not None and damage is not None:
                    total += max(damage.value, 0.0) * math.prod(child.shape) / math.prod(weight.shape)
            found[id][option] = Damage(total, samples=alone.samples)


def analysis_reports(
    annotations: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float], plan: Plan | None = None
) -> list[dict[str, Any]]:
    """Each analysis with its cost and, where options were measured one by one too, how well it ranks them.

    `spearman` is over the (site, option) pairs that both price, or over sites for an analysis that scores sites; `pairs` are
    the predictions beside the measurements. `plan_predicted` is what the plan's choices add up to by this analysis alone.
    """
    truth = {
        (site, option): damage.value
        for found in annotations.values()
        for site, value in found.items()
        if isinstance(value, dict)
        for option, damage in value.items()
        if damage.measured
    }
    worst: dict[Any, float] = {}
    for (site, _), value in truth.items():
        worst[site] = max(worst.get(site, 0.0), value)
    reports: list[dict[str, Any]] = []
    for spec, found in annotations.items():
        priced: dict[Any, float] = {
            (s, o): d.value for s, v in found.items() if isinstance(v, dict) for o, d in v.items() if not d.measured
        }
        scored: dict[Any, float] = {s: v.value for s, v in found.items() if isinstance(v, Score)}
        row: dict[str, Any] = {"name": spec, "seconds": round(seconds.get(spec, 0.0), 2)}
        for mine, theirs in ((priced, truth), (scored, worst)):
            if len(mine.keys() & theirs.keys()) >= 3:
                row["spearman"] = rank_correlation(mine, theirs)
        pairs = [(k, v) for k, v in priced.items() if k in truth]
        row["pairs"] = [{"site": s, "option": str(o), "predicted": v, "measured": truth[s, o]} for (s, o), v in pairs]
        if plan is not None and priced:
            chosen = [(site, Spec.joined(options)) for site, options in plan.choices.items()]
            row["plan_predicted"] = sum(max(priced.get(key, 0.0), 0.0) for key in chosen)
            row["plan_measured"] = plan.measured
        reports.append(row)
    return reports
