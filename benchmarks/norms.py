"""How many norms go within a damage: each measured alone, then frozen together, the cheapest first. Nothing is healed.

    python -m benchmarks.texts texts && python -m benchmarks.norms --texts texts

A norm takes the cheaper of `freeze_norm{first=own}` and `freeze_norm{first=same}`, by its damage alone on calibration samples. For
each limit the longest run of cheapest norms is looked for by halving whose damage together, measured on samples that nothing was
calibrated on, keeps it; damages together are not quite monotone, so a longer run that fits may be missed. `by the sum` is how many
the damages alone, added up, would have promised.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

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


def singles(run: Session) -> Priced:
    """(damage alone, site, its cheaper option), the cheapest first."""
    found = ((damage.value, id, spec) for id, options in run.damages.items() for spec, damage in options.items())
    best: dict[str, tuple[float, str, Spec]] = {}
    for row in sorted(found, key=lambda row: row[0]):
        best.setdefault(row[1], row)
    return list(best.values())


def frozen(run: Session, priced: Priced) -> tuple[Program, Estimate]:
    """The program with these norms frozen, and its damage on the evaluation samples."""
    plan = Plan({id: (spec,) for _, id, spec in priced}, Budget(), unit=run.metric.unit)
    made = run.compress(plan)
    return made, run.measure(made)["damage"]


def most_within(run: Session, priced: Priced, limit: float) -> int:
    """The number of cheapest norms whose measured damage together keeps the limit, by halving."""
    low, high = 0, len(priced) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if frozen(run, priced[:middle])[1].mean <= limit:
            low = middle
        else:
            high = middle
    return low


def open_norms(dense: Program, made: Program, frozen_norms: int) -> int:
    """Of the frozen norms, those that stay as arithmetic of their own: means that are taken away, or gains multiplied with."""
    kept = sum(len(list(iterate_calls(graph, *NORMS))) for graph in made.entries.values())
    whole = sum(len(list(iterate_calls(graph, *NORMS))) for graph in dense.entries.values())
    if whole - kept != frozen_norms:
        raise SystemExit(f"{frozen_norms} norms were frozen, and {whole - kept} are gone")
    return sum(name.endswith(".frozen") for graph in made.entries.values() for name in graph.tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["dinov2", "minilm", "smollm2"])
    parser.add_argument("--limits", nargs="*", type=float, default=[0.01, 0.05, 0.2])
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens that single norms are measured on")
    parser.add_argument("--first", nargs="*", default=["own", "same"], choices=["own", "same"])
    texts_of.arguments(parser)
    parser.add_argument("--run-dir", type=Path, default=Path("lwcompile-runs/norms"))
    options = parser.parse_args()
    offered = Spec.parse(f"freeze_norm{{first=[{','.join(options.first)}]}}")
    recipe = Recipe.named("fast").with_(
        analyses=[Spec.parse(f"measured{{tokens={options.tokens}}}")], options={"norm": [offered]}
    )
    print(
        "| model | norms | damage at most | by the sum | frozen | of them in the open | measured |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        pictures = digits(Path(scratch))
        for name in options.models:
            started = time.process_time()
            data = (
                {
                    "calibration": {"dataset": str(pictures[0]), "samples": 128},
                    "evaluation": {"dataset": str(pictures[1]), "samples": 256},
                }
                if name == "dinov2"
                else _texts(options.texts, *((256, 32) if name == "minilm" else (16, 256)))
            )
            dense = program(name)
            settings = Settings(recipe=recipe.with_(**data), backend="program", run_dir=options.run_dir / name)
            run = session(dense, settings, terminal_progress())
            priced = singles(run)
            for limit in options.limits:
                sums = [sum(max(d, 0.0) for d, _, _ in priced[: k + 1]) for k in range(len(priced))]
                count = most_within(run, priced, limit)
                made, damage = frozen(run, priced[:count])
                cells = [name, len(run.structure.of_kind("norm")), f"{limit:g}", sum(s <= limit for s in sums), count]
                cells += [open_norms(dense, made, count), f"{damage.mean:.4f} ({damage.low:.4f} to {damage.high:.4f})"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            alone = ", ".join(f"{id} {value:.3g}" for value, id, _ in [*priced[:3], *priced[-3:]])
            print(f"{name}: {time.process_time() - started:.0f} s of processor time; alone {alone}\n", flush=True)


def _texts(folder: Path, samples: int, seqlen: int) -> dict[str, dict[str, object]]:
    evaluation = {"dataset": texts_of.evaluations(folder)["tutorial"], "samples": samples // 2, "seqlen": seqlen}
    return {
        "calibration": {"dataset": texts_of.calibration(folder), "samples": samples, "seqlen": seqlen},
        "evaluation": {**evaluation, "order": "sequential"},
    }


if __name__ == "__main__":
    main()
