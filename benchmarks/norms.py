"""How many norms go within a damage, unhealed and healed, and the curve that leads towards removing all of them.

    python -m benchmarks.texts texts && python -m benchmarks.norms --texts texts

A norm takes the cheaper of `freeze_norm{first=own}` and `freeze_norm{first=same}`, by its damage alone on calibration samples. The
cheapest norms are then frozen together, and judged on samples that nothing was calibrated on. `by the sum` is how many the damages
alone, added up, would have promised.

Unhealed, the longest run of cheapest norms within a limit is looked for by halving; damages together are not quite monotone, so a
longer run that fits may be missed. Healed, counts at equal distances are tried (`--probes`; the last is all norms), and for each limit
`--halvings` more between the last count that keeps it and the next that was tried: what is said to fit was healed and measured, and
more might fit. Every healing starts from the dense weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import texts as texts_of
from benchmarks.models import digits, program
from lwcompile.budget import Budget
from lwcompile.damage import Estimate
from lwcompile.graph import iterate_calls
from lwcompile.pipeline import Settings, session
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.progress import terminal_progress
from lwcompile.recipe import Recipe
from lwcompile.residual import NORMS
from lwcompile.session import Session
from lwcompile.spec import Spec

Priced = list[tuple[float, str, Spec]]


@dataclass(frozen=True)
class Case:
    """A model's samples, how many of them are held out for judging, and how it is healed."""

    samples: int
    seqlen: int
    judged: int
    healer: str


CASES = {
    "dinov2": Case(512, 0, 256, "distill{steps=60,train=all,blend=0.5,batch=32,accumulate=1,every=15}"),
    "minilm": Case(512, 32, 128, "distill{steps=60,train=all,blend=0.5,batch=32,accumulate=1,every=15}"),
    "smollm2": Case(128, 128, 16, "distill{steps=40,train=[norms,frozen],blend=0.5,batch=2,accumulate=1,every=20}"),
}


def singles(run: Session) -> Priced:
    """(damage alone, site, its cheaper option), the cheapest first."""
    found = ((damage.value, id, spec) for id, options in run.damages.items() for spec, damage in options.items())
    best: dict[str, tuple[float, str, Spec]] = {}
    for row in sorted(found, key=lambda row: row[0]):
        best.setdefault(row[1], row)
    return list(best.values())


@dataclass
class Curve:
    """The damage with the so many cheapest norms frozen, before and after healing: measured once each."""

    run: Session
    priced: Priced
    before: dict[int, Estimate] = field(default_factory=dict)
    after: dict[int, Estimate] = field(default_factory=dict)
    open: dict[int, int] = field(default_factory=dict)
    kept: dict[int, str] = field(default_factory=dict)

    def frozen(self, count: int) -> Program:
        plan = Plan({id: (spec,) for _, id, spec in self.priced[:count]}, Budget(), unit=self.run.metric.unit)
        made = self.run.compress(plan)
        self.open[count] = open_norms(self.run.dense, made, count)
        return made

    def unhealed(self, count: int) -> float:
        if count not in self.before:
            self.before[count] = self.run.measure(self.frozen(count))["damage"]
            print(f"<!-- {count} frozen: {_cell(self.before[count])} -->", flush=True)  # a run may be stopped
        return self.before[count].mean

    def healed(self, count: int) -> float:
        self.unhealed(count)
        if count not in self.after:
            made, done = self.run.heal(self.frozen(count))
            if done is None:
                raise SystemExit(f"{self.run.recipe.heal} refused: {self.run.context.remarks[-1].text}")
            self.after[count] = self.run.measure(made)["damage"]
            self.kept[count] = f"{done.kept}/{done.steps}"
            print(f"<!-- {count} healed: {_cell(self.after[count])}, step {self.kept[count]} -->", flush=True)
        return self.after[count].mean

    def most_unhealed(self, limit: float) -> int:
        """The number of cheapest norms whose measured damage together keeps the limit, by halving."""
        low, high = 0, len(self.priced) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.unhealed(middle) <= limit else (low, middle)
        return low

    def most_healed(self, limit: float, halvings: int) -> int:
        """The largest count that was healed to within the limit, the bracket at the end of the counts tried halved."""
        for _ in range(halvings):
            low = max((n for n in self.after if self.after[n].mean <= limit), default=0)
            high = min((n for n in self.after if n > low), default=len(self.priced) + 1)
            if high - low <= 1:
                break
            self.healed((low + high) // 2)
        return max((n for n in self.after if self.after[n].mean <= limit), default=0)


def open_norms(dense: Program, made: Program, frozen_norms: int) -> int:
    """Of the frozen norms, those that stay as arithmetic of their own: means that are taken away, or gains multiplied with."""
    kept = sum(len(list(iterate_calls(graph, *NORMS))) for graph in made.entries.values())
    whole = sum(len(list(iterate_calls(graph, *NORMS))) for graph in dense.entries.values())
    if whole - kept != frozen_norms:
        raise SystemExit(f"{frozen_norms} norms were frozen, and {whole - kept} are gone")
    return sum(name.endswith(".frozen") for graph in made.entries.values() for name in graph.tensors)


def run_of(name: str, options: argparse.Namespace, scratch: Path) -> Session:
    case = CASES[name]
    guard = "" if options.guard is None else f",guard={options.guard:g}"
    offered = Spec.parse(f"freeze_norm{{first=[{','.join(options.first)}]{guard}}}")
    if name == "dinov2":
        pictures = digits(scratch)
        data: dict[str, dict[str, Any]] = {
            "calibration": {"dataset": str(pictures[0]), "samples": case.samples},
            "evaluation": {"dataset": str(pictures[1]), "samples": case.judged},
        }
    else:
        data = {
            "calibration": {"dataset": str(options.text or texts_of.calibration(options.texts)), "seqlen": case.seqlen,
                            "samples": options.samples or case.samples},
            "evaluation": {"dataset": texts_of.evaluations(options.texts)["tutorial"], "samples": case.judged,
                           "seqlen": case.seqlen, "order": "sequential"},
        }  # fmt: skip
    recipe = Recipe.named("fast").with_(
        analyses=[Spec.parse(f"measured{{tokens={options.tokens}}}")], options={"norm": [offered]}, **data
    )
    settings = Settings(recipe=recipe, backend="program", run_dir=options.run_dir / name, heal=options.healer or case.healer,
                        device=options.device)  # fmt: skip
    return session(program(name), settings, terminal_progress())


def rows_of(name: str, curve: Curve, options: argparse.Namespace) -> dict[str, Any]:
    """Find the counts of each limit, and print them and the curve."""
    priced, total = curve.priced, len(curve.run.structure.of_kind("norm"))
    sums = [sum(max(d, 0.0) for d, _, _ in priced[: k + 1]) for k in range(len(priced))]
    unhealed = {limit: curve.most_unhealed(limit) for limit in options.limits}
    counts = options.counts or [round(len(priced) * (i + 1) / options.probes) for i in range(options.probes)]
    for count in counts:
        curve.healed(min(count, len(priced)))
    limits = []
    for limit in options.limits:
        count, healed = unhealed[limit], curve.most_healed(limit, options.halvings) if counts else 0
        healed = max(healed, count)  # what fits unhealed needs no healing
        limits.append({"limit": limit, "by the sum": sum(s <= limit for s in sums), "unhealed": count, "healed": healed})
        print(f"| {name} | {total} | {limit:g} | {limits[-1]['by the sum']} | {count} | {healed} |", flush=True)
    print("\n| model | frozen | in the open | before | healed | step kept |\n|---|---|---|---|---|---|")
    for count in sorted(curve.after):
        cells = [name, count, curve.open[count], _cell(curve.before[count]), _cell(curve.after[count]), curve.kept[count]]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    points = [{"frozen": n, "before": e.to_json(), "after": curve.after[n].to_json() if n in curve.after else None}
              for n, e in sorted(curve.before.items())]  # fmt: skip
    return {"model": name, "norms": total, "limits": limits, "curve": points, "alone": [(id, d) for d, id, _ in priced]}


def _cell(damage: Estimate) -> str:
    return f"{damage.mean:.4f} ({damage.low:.4f} to {damage.high:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--limits", nargs="*", type=float, default=[0.01, 0.05, 0.2])
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens that single norms are measured on")
    parser.add_argument("--first", nargs="*", default=["own", "same"], choices=["own", "same"])
    parser.add_argument(
        "--guard", type=float, help="a token that deviates by more than so many constants keeps its own deviation"
    )
    parser.add_argument("--healer", help="instead of the models' own")
    parser.add_argument("--probes", type=int, default=4, help="counts that are healed, at equal distances; 0 heals nothing")
    parser.add_argument("--counts", nargs="*", type=int, help="the counts that are healed, instead of --probes")
    parser.add_argument("--text", type=Path, help="calibrate and heal on this text instead of the Debian Reference")
    parser.add_argument("--samples", type=int, help="windows of it, instead of the models' own numbers")
    parser.add_argument("--halvings", type=int, default=2, help="further counts that are healed for a limit")
    texts_of.arguments(parser)
    parser.add_argument("--run-dir", type=Path, default=Path("lwcompile-runs/norms"))
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            started = time.process_time()
            print("| model | norms | damage at most | by the sum | frozen | healed |\n|---|---|---|---|---|---|")
            run = run_of(name, options, Path(scratch))
            rows.append(rows_of(name, Curve(run, singles(run)), options))
            spent = time.process_time() - started
            alone = ", ".join(f"{id} {value:.3g}" for id, value in [*rows[-1]["alone"][:3], *rows[-1]["alone"][-3:]])
            print(f"\n{name}: {run.recipe.heal}; {spent:.0f} s of processor time; alone {alone}\n", flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
