"""One budget, every transform: what each way of spending the same bytes does to SmolLM2, unhealed and healed.

    python -m benchmarks.texts texts && python -m benchmarks.budget --texts texts

quantization only: bits and groups at every weight. Drops on a 4-bit base: everything in 4 bits, and whole sublayers leave until the size
is met. All together: bits, groups, dropped sublayers and narrower MLPs in one table. All are chosen by the same search over whole plans
(as many measured each; `--evaluations 0`: by the integer program alone) from the same scores, on the Debian Reference, compressed by the
same solver, and judged on the Python tutorial. Bytes are the program folder's, everything stored counted; 40 MB is 2.4 bits a parameter.
SmolLM2's linears lie on a Q4_1 grid, so figures at 4 bits are of a re-quantization.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks import texts as texts_of
from benchmarks.models import program
from lwcompile.budget import Budget, parse_size
from lwcompile.damage import Estimate
from lwcompile.data import load_dataset
from lwcompile.errors import InfeasibleBudget
from lwcompile.manager import Manager
from lwcompile.oracle import Oracle
from lwcompile.pipeline import Settings, session
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.progress import terminal_progress
from lwcompile.recipe import Recipe
from lwcompile.registry import make
from lwcompile.session import Session
from lwcompile.spec import Spec
from lwcompile.table import Options, OptionTable

NUMERIC = (
    "quantize{bits=[2,3,4,5,6,8],group_size=64}",
    "quantize{bits=2,group_size=[32,128]}",
    "quantize{bits=[3,4],group_size=128}",
)
NARROW = "prune_mlp{ratio=[0.125,0.25,0.5],multiple=64}"
WITH_BITS = NARROW + " + quantize{bits=[2,3,4],group_size=64}"
BASE = Spec.parse("quantize{bits=4,group_size=64}")
CASES: dict[str, Callable[[Options], bool]] = {
    "quantization only": lambda options: all(o.name == "quantize" for o in options),
    "drops on a 4-bit base": lambda options: options in ((BASE,), (Spec("drop"),)),
    "all together": lambda options: True,
}


def recipe(texts: Path) -> Recipe:
    specs = lambda *texts: tuple(map(Spec.parse, texts))  # noqa: E731
    return Recipe.named("quality").with_(
        analyses=specs("fisher{tokens=8192,only=quantize}", "measured{only=[drop,prune_mlp],joint=false,tokens=1024}"),
        options={
            "linear": specs(*NUMERIC), "embedding": specs(*NUMERIC), "attention": specs("drop"),
            "mlp": specs("drop", NARROW, WITH_BITS),
        },
        calibration={"dataset": texts_of.calibration(texts), "samples": 64, "seqlen": 256},
        evaluation={"dataset": texts_of.evaluations(texts)["tutorial"], "samples": 16, "seqlen": 256, "order": "sequential"},
    )  # fmt: skip


def spent(plan: Plan) -> str:
    """What a plan chose, in a cell."""
    drops = [id for id, options in plan.choices.items() if any(o.name == "drop" for o in options)]
    narrow = [id for id, options in plan.choices.items() if any(o.name == "prune_mlp" for o in options)]
    bits: dict[Any, int] = {}
    for options in plan.choices.values():
        for o in options:
            if o.name == "quantize":
                bits[o.get("bits")] = bits.get(o.get("bits"), 0) + 1
    words = [f"{n} at {b} bits" for b, n in sorted(bits.items())]
    for kind in ("attention", "mlp"):
        if gone := sum(id.endswith(kind) for id in drops):
            words.append(f"{gone} {kind} dropped")
    return ", ".join([*words, *([f"{len(narrow)} MLPs narrowed"] if narrow else [])])


def scored(run: Session, options: argparse.Namespace) -> OptionTable:
    """The table of options, as an earlier run left it or made now; left in the run directory."""
    table = run.table if options.table is None else OptionTable.from_json(options.table.read_bytes())
    if unknown := sorted(table.sites.keys() - run.structure.sites.keys()):
        raise SystemExit(f"{options.table} has a site {unknown[0]}, which this model has not")
    options.run_dir.mkdir(parents=True, exist_ok=True)
    (options.run_dir / "table.json").write_text(table.to_json(), encoding="utf-8")
    return table


def planned(run: Session, table: OptionTable, case: str, size: str, options: argparse.Namespace) -> Plan:
    """The plan that the same allocator made earlier in this run directory, or a new one. `InfeasibleBudget` where none fits."""
    kept = options.run_dir / f"{case.replace(' ', '-')}-{size}.yaml"
    way = Spec.of("search", evaluations=options.evaluations) if options.evaluations else Spec("integer_program")
    allocator = make("allocators", way)
    if kept.is_file() and (plan := Plan.load(kept)).origin["allocator"] == str(allocator.spec()):
        return plan
    budget = Budget(bytes=parse_size(size))
    offered = table.offering(lambda choice: CASES[case](choice.options))
    with run.progress.task(f"{case}, {size}", options.evaluations) if options.evaluations else nullcontext() as task:
        plan = allocator.allocate(offered, budget, Oracle(run.dense, run.structure, run._ready(), options.tokens, task))
    plan.save(kept, table)
    return plan


def said(damage: Estimate | None) -> str:
    return "refused" if damage is None else f"{damage.mean:.3f} ({damage.low:.3f} to {damage.high:.3f})"


def healed(run: Session, made: Program, healer: str, options: argparse.Namespace) -> Program | None:
    """The program distilled on windows of the calibration text, as many steps as the tokens take; None if refused."""
    seqlen, batch = 256, 8
    samples = options.heal // seqlen + 16
    text = load_dataset(texts_of.calibration(options.texts), tokenizer=run.program.tokenizer(), samples=samples, seqlen=seqlen)
    ctx, copy = dataclasses.replace(run._ready(), calibration=text), made.copy()
    steps = max(1, round(options.heal / (seqlen * batch)))
    done = Manager(ctx).heal(copy, run.dense, dataclasses.replace(make("passes", Spec.parse(healer)), steps=steps))
    return copy if done is not None else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts_of.arguments(parser)
    parser.add_argument("--sizes", nargs="*", default=["72MB", "60MB", "50MB", "40MB"], help="none: only score")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--evaluations", type=int, default=64, help="whole plans that each search measures; 0: no search")
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens that each of them runs over")
    parser.add_argument("--heal", type=int, default=100_000, help="tokens to distil on; 0 heals nothing")
    parser.add_argument("--healers", nargs="*", default=["distill"], help="how, one or more; the steps follow from the tokens")
    parser.add_argument("--table", type=Path, help="scores that another run left in its run directory, instead of scoring")
    parser.add_argument("--run-dir", type=Path, default=Path("lwcompile-runs/budget"), help="keeps scores (table.json) and plans")
    parser.add_argument("--out", type=Path, help="add the rows to this file as JSON lines")
    options = parser.parse_args()
    settings = Settings(recipe=recipe(options.texts), run_dir=options.run_dir, device=options.device)
    run = session(program("smollm2"), settings, terminal_progress())
    table = scored(run, options)
    healers = options.healers if options.heal else []
    head = ["size", "way", "plan", "predicted", "searched on calibration text", "KL, nats a token", *healers]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for size in options.sizes:
        for case in options.cases:
            started = time.process_time()
            try:
                plan = planned(run, table, case, size, options)
            except InfeasibleBudget as error:
                print(f"| {size} | {case} | {error} |{' |' * (len(head) - 3)}", flush=True)
                continue
            made = run.compress(plan)
            found, after = run.measure(made)["damage"], {}
            start = plan.origin.get("conditional_at_start")
            searched = "not searched" if start is None else f"{start:.3f} to {plan.conditional:.3f}"
            cells = [size, case, spent(plan), f"{plan.predicted:.3f}", searched, said(found)]
            print(f"| {' | '.join(cells)} |", end="", flush=True)  # healing takes long: what is known is shown
            for healer in healers:
                better = healed(run, made, healer, options)
                after[healer] = None if better is None else run.measure(better)["damage"]
                print(f" {said(after[healer])} |", end="", flush=True)
            print(f" <!-- {time.process_time() - started:.0f} s of processor time -->", flush=True)
            if options.out is not None:
                row = {"size": size, "case": case, "plan": spent(plan), "damage": found.to_json()}
                row |= {"healed": {healer: e and e.to_json() for healer, e in after.items()}}
                row |= {"origin": plan.origin, "bytes": plan.bytes}
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
