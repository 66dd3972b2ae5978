"""Damage before and after healing, on held-out text.

    python -m benchmarks.heal

Each case is a plan written by hand (uniform bits by round-to-nearest, or sublayers that scores say are cheap to drop), distilled for
some steps on windows of 128 tokens of the built-in topics, and judged on the built-in docstrings.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import program
from lwcompile.context import Remark
from lwcompile.pipeline import Settings, session
from lwcompile.plans import Plan
from lwcompile.progress import terminal_progress
from lwcompile.recipe import Recipe
from lwcompile.session import Session
from lwcompile.spec import Spec


@dataclass(frozen=True)
class Case:
    """A model, what is done to it (kind of site or id -> option), and the healers that are tried on that."""

    model: str
    plan: Mapping[str, str]
    healers: tuple[str, ...]
    samples: int = 64
    seqlen: int = 128


CASES = {
    "3 bits": Case(
        "smollm2",
        {"linear": "quantize{bits=3,group_size=64,solver=rtn}"},
        ("distill{steps=32,lr=0.004,batch=1,accumulate=1,every=16}",),
    ),
    "4 sublayers dropped": Case(
        "smollm2",
        {"block10.attention": "drop", "block13.attention": "drop", "block16.mlp": "drop", "block20.attention": "drop"},
        ("distill{steps=32,train=norms,lr=0.004,batch=1,accumulate=1,every=16}",),
    ),
    "MiniLM, 3 bits": Case(
        "minilm",
        {"linear": "quantize{bits=3,group_size=64,solver=rtn}"},
        ("distill{steps=100,train=norms}", "distill{steps=50,accumulate=1}", "distill{steps=50,accumulate=1,lr=0.01}"),
        samples=512,
        seqlen=32,
    ),
}


def run_of(case: Case, healer: str, run_dir: Path, tokens: int) -> Session:
    offered = [Spec.parse(option) for option in dict.fromkeys(case.plan.values())]
    recipe = Recipe(
        options={kind: [o for o in offered] for kind in case.plan},  # type: ignore[arg-type]
        calibration={"dataset": "topics", "samples": case.samples, "seqlen": case.seqlen},  # type: ignore[arg-type]
        evaluation={"dataset": "docstrings", "samples": tokens // case.seqlen, "seqlen": case.seqlen},  # type: ignore[arg-type]
    )
    return session(program(case.model), Settings(recipe=recipe, heal=healer, run_dir=run_dir), terminal_progress())


def plan_of(case: Case, run: Session) -> Plan:
    sites = {
        id: option for key, option in case.plan.items() for id, site in run.structure.sites.items() if key in (id, site.kind)
    }
    return Plan(
        {id: (Spec.parse(option),) for id, option in sites.items() if id not in ("head", "embedding")}, unit=run.metric.unit
    )


def compare(name: str, case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for healer in options.healers or case.healers:
        run = run_of(case, healer, options.run_dir / name.replace(" ", "-"), options.tokens)
        compressed = run.compress(plan_of(case, run))
        before = run.measure(compressed)["damage"]
        started = time.process_time(), time.perf_counter()
        healed, done = run.heal(compressed)
        spent = time.process_time() - started[0], time.perf_counter() - started[1]
        if done is None:
            said: list[Remark] = run.context.remarks
            raise SystemExit(f"{healer} refused: {said[-1].text}")
        after = run.measure(healed)["damage"]
        rows.append({
            "case": name, "healer": healer, "before": before.to_json(), "after": after.to_json(), "trained": done.trained,
            "steps": done.steps, "kept": done.kept, "held out": done.damages, "processor seconds": spent[0], "seconds": spent[1],
        })  # fmt: skip
        print(
            f"{name:20} {healer:36} {done.trained:>9,} numbers, step {done.kept}/{done.steps}: {before} -> {after}, "
            f"{after.mean / before.mean:.2f}; {spent[0]:.0f} s of processor time ({spent[1]:.0f} s)",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--healers", nargs="*", help="instead of the cases' own")
    parser.add_argument("--tokens", type=int, default=4096, help="judged on")
    parser.add_argument("--run-dir", type=Path, default=Path("lwcompile-runs/heal"))
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        rows += compare(name, CASES[name], options)
        if options.out is not None:
            options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
