"""Whether low rank pays at equal bytes: factors and corrections beside plain bits and smaller groups, on the linears of a model.

    python -m benchmarks.texts texts && python -m benchmarks.low_rank --texts texts --model minilm

Each row carries one option at every linear of the blocks that takes it (the others carry what `--rest` says); embeddings and head stay
dense and are not counted. With `--plan`, the integer program chooses among plain formats alone, and then among all of the rows'
options, at the bytes of three bits in groups of 64.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks import texts as texts_of
from benchmarks.models import program
from lwcompile.budget import Budget
from lwcompile.pipeline import Settings, session
from lwcompile.plans import Plan
from lwcompile.progress import terminal_progress
from lwcompile.recipe import Recipe
from lwcompile.session import Session
from lwcompile.spec import Spec

PLAIN = ("quantize{bits=2}", "quantize{bits=2,group_size=32}", "quantize{bits=2,group_size=16}", "quantize{bits=3,group_size=128}",
         "quantize{bits=3}", "quantize{bits=3,group_size=32}", "quantize{bits=4}")  # fmt: skip
CORRECTED = ("quantize{bits=2,rank=8}", "quantize{bits=2,rank=16}", "quantize{bits=2,rank=32}", "quantize{bits=3,rank=8}",
             "quantize{bits=3,rank=16}")  # fmt: skip
FACTORED = ("low_rank{ratio=0.5} + quantize{bits=4}", "low_rank{ratio=0.75} + quantize{bits=4}",
            "low_rank{ratio=0.75} + quantize{bits=3}", "low_rank{ratio=0.9} + quantize{bits=3}")  # fmt: skip


def body(run: Session) -> list[str]:
    return [site.id for site in run.structure.of_kind("linear") if site.parent is not None]


def plan_of(run: Session, option: Spec, rest: Spec) -> tuple[Plan, int]:
    """The option wherever it is taken, else `rest`; and the bytes of these linears."""
    choices, total = {}, 0
    for id in body(run):
        spec = option if option in run.offer.options.get(id, ()) else rest
        site = run.structure.sites[id]
        choices[id] = spec.parts
        total += sum(map(run.backend.price, run.offer.stored(run.dense.entries[site.entry], site, spec)))
    return Plan(choices), total


def row(run: Session, label: str, plan: Plan, size: int) -> dict[str, Any]:
    started = time.perf_counter()
    found = run.measure(run.compress(plan))["damage"]
    weights = sum(run.structure.sites[id].shape[0] * run.structure.sites[id].shape[1] for id in body(run))
    bits = 8 * size / weights
    print(
        f"| `{label}` | {size / 1e6:.3f} MB | {bits:.2f} | {found.mean:.4f} ({found.low:.4f} to {found.high:.4f}) |", flush=True
    )
    return {"option": label, "bytes": size, "bits": bits, "damage": found.to_json(), "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", choices=("minilm", "smollm2", "twin"))
    texts_of.arguments(parser)
    parser.add_argument("--evaluation", default="tutorial", choices=texts_of.EVALUATIONS)
    parser.add_argument("--options", nargs="*", default=[*PLAIN, *CORRECTED, *FACTORED])
    parser.add_argument("--rest", default="quantize{bits=3}")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples, of 32 tokens (MiniLM) or 256")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--run-dir", type=Path, default=Path("lwcompile-runs/low_rank"))
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    encoder = options.model == "minilm"
    wanted, rest = [Spec.parse(text) for text in options.options], Spec.parse(options.rest)
    offered = list(dict.fromkeys([*map(Spec.parse, PLAIN), *wanted, rest]))
    evaluation = {"dataset": texts_of.evaluations(options.texts)[options.evaluation], "order": "sequential"}
    recipe = Recipe.named("quality").with_(
        options={"linear": offered, "head": (), "embedding": ()},
        analyses=[Spec.parse("fisher{tokens=4096}")],
        calibration={"dataset": texts_of.calibration(options.texts), "samples": options.samples, "seqlen": 32 if encoder else 256},
        evaluation=evaluation | {"samples": 192 if encoder else 8, "seqlen": 32 if encoder else 256},
    )  # fmt: skip
    dense, rows = program(options.model), []

    def opened(**changes: Any) -> Session:
        settings = Settings(recipe=recipe.with_(**changes), backend="program", run_dir=options.run_dir / options.model)
        return session(dense, settings, terminal_progress())

    run = opened()
    for spec in wanted:
        rows.append(row(run, str(spec), *plan_of(run, spec, rest)))
        if options.out is not None:
            options.out.write_text(json.dumps(rows, indent=1))
    if options.plan:
        kept = run.dense_bytes - sum(run.table.sites[id].dense_bytes for id in body(run))
        size = plan_of(run, Spec.parse("quantize{bits=3}"), rest)[1]
        for label, chosen in (("plan of plain formats", [*map(Spec.parse, PLAIN)]), ("plan of all of these", offered)):
            part = opened(options={"linear": chosen, "head": (), "embedding": ()})
            plan = part.plan(Budget(bytes=kept + size))
            rows.append(row(part, label, plan, (plan.bytes or 0) - kept))
            print("   ", {str(o): list(plan.choices.values()).count(o) for o in dict.fromkeys(plan.choices.values())})
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
