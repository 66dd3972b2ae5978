"""Damage at equal bytes: uniform GPTQ beside our plan, everything stored counted.

    python -m benchmarks.texts texts && python -m benchmarks.quality --texts texts

Calibration text shares nothing with the evaluation texts (checked), and nothing is tuned to those. Uniform GPTQ at group 64 is
4 bits throughout, or 3 bits with a 4-bit embedding and head: asymmetric, with act-order and the clip search, true-sequential, each
token counted alike. Beside it stands the same plan by our solver, so that what the solver gains and what the plan gains are told
apart. All three see the same tokens in the same run, and ours gets exactly the uniform plan's bytes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import texts as texts_of
from benchmarks.models import digits, program
from lwcompile.budget import Budget
from lwcompile.damage import Estimate
from lwcompile.pipeline import Settings, session
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.progress import terminal_progress
from lwcompile.recipe import Recipe
from lwcompile.session import Session
from lwcompile.spec import Spec

UNIFORM = {"4 bits": (4, 4), "3 bits": (3, 4)}
"""Label -> bits of the body, and of embedding and head."""
TEXTBOOK = Spec.parse("gptq{channel_damp=0.0,rounds=0,importance=0.0,drift=0.0}")


@dataclass
class Bench:
    """One model: its recipe (with the calibration set) and where its damage is measured."""

    name: str
    dense: Program
    recipe: Recipe
    evaluations: Mapping[str, Mapping[str, Any]]
    run_dir: Path

    def session(self, **changes: Any) -> Session:
        settings = Settings(recipe=self.recipe.with_(**changes), backend="program", run_dir=self.run_dir / self.name)
        return session(self.dense, settings, terminal_progress())

    def measure(self, compressed: Program) -> dict[str, Estimate]:
        """The damage on each evaluation set."""
        return {text: self.session(evaluation=data).measure(compressed)["damage"] for text, data in self.evaluations.items()}


def uniform(run: Session, body: int, ends: int) -> Plan:
    """Every linear at `body` bits, embedding and whatever stands outside the blocks at `ends`."""
    choices: dict[str, tuple[Spec, ...]] = {}
    for id, specs in run.offer.options.items():
        site = run.structure.sites[id]
        if site.kind not in ("linear", "embedding"):
            continue
        bits = body if site.parent is not None else ends
        wanted = next((s for s in specs if s.get("bits") == bits and s.get("group_size") == 64 and s.name == "quantize"), None)
        if wanted is None:
            raise SystemExit(f"the recipe offers no quantize{{bits={bits},group_size=64}} at {id}")
        choices[id] = (wanted,)
    found = run.table.evaluate(choices)
    return Plan(choices, Budget(), unit=run.metric.unit).replace(predicted=found.damage, bytes=found.bytes)


def solved_by(plan: Plan, solver: Spec) -> Plan:
    """The same formats, their values found by another solver."""

    def change(option: Spec) -> Spec:
        return Spec(option.name, (*(a for a in option.args if a[0] != "solver"), ("solver", solver)))

    return plan.replace(choices={id: tuple(change(o) for o in options) for id, options in plan.choices.items()})


def compare(bench: Bench, points: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    base = bench.session()
    for label, (body, ends) in points.items():
        plain = uniform(base, body, ends)
        started = time.perf_counter()
        ours = base.plan(Budget(bytes=plain.bytes))
        planned = time.perf_counter() - started
        plans = {"uniform GPTQ": solved_by(plain, TEXTBOOK), "uniform, our solver": plain, "our plan": ours}
        found = {who: bench.measure(base.compress(plan)) for who, plan in plans.items()}
        for text in bench.evaluations:
            textbook, solver, plan = (found[who][text] for who in plans)
            rows.append({
                "model": bench.name, "point": label, "text": text, "bits": 8 * (plain.bytes or 0) / base.table.parameters,
                "bytes": plain.bytes, "our bytes": ours.bytes, **{who: found[who][text].to_json() for who in plans},
                "ratio": plan.mean / textbook.mean, "predicted": ours.predicted, "planning seconds": planned,
            })  # fmt: skip
            print(
                f"{bench.name:8} {label:9} {text:12} {plain.bytes / 1e6:7.2f} MB ({ours.bytes / 1e6:.2f})  "
                f"uniform GPTQ {textbook.mean:.4f} [{textbook.low:.4f}, {textbook.high:.4f}]  our solver {solver.mean:.4f}  "
                f"our plan {plan.mean:.4f} [{plan.low:.4f}, {plan.high:.4f}]  ratio {plan.mean / textbook.mean:.2f}",
                flush=True,
            )
    return rows


def bench(name: str, recipe: Recipe, options: argparse.Namespace, pictures: tuple[Path, Path]) -> Bench:
    calibration, texts = texts_of.calibration(options.texts), texts_of.evaluations(options.texts)
    if name == "dinov2":
        recipe = recipe.with_(calibration={"dataset": str(pictures[0]), "samples": 256})
        evaluations: dict[str, Any] = {"digits": {"dataset": str(pictures[1]), "samples": 512}}
    elif name == "minilm":
        recipe = recipe.with_(calibration={"dataset": calibration, "samples": 512, "seqlen": 32})
        evaluations = {t: {"dataset": path, "samples": 192, "seqlen": 32, "order": "sequential"} for t, path in texts.items()}
    else:
        recipe = recipe.with_(calibration={"dataset": calibration, "samples": 64, "seqlen": 256})
        samples = max(options.tokens // 256, 1)
        evaluations = {
            t: {"dataset": path, "samples": samples, "seqlen": 256, "order": "sequential"} for t, path in texts.items()
        }
    return Bench(name, program(name), recipe, evaluations, options.run_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["twin", "minilm", "dinov2", "smollm2"])
    parser.add_argument("--points", nargs="*", default=list(UNIFORM), choices=list(UNIFORM))
    parser.add_argument("--recipe", default="quality")
    texts_of.arguments(parser)
    parser.add_argument("--tokens", type=int, default=2048, help="evaluated in windows of 256")
    parser.add_argument("--run-dir", type=Path, default=Path("lwcompile-runs/quality"))
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        pictures = digits(Path(scratch))
        for name in options.models:
            made = bench(name, Recipe.find(options.recipe), options, pictures)
            rows += compare(made, {label: UNIFORM[label] for label in options.points})
            if options.out is not None:
                options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
