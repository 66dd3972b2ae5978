"""What each analysis costs, how well it ranks what it has not seen, and what the plan made from it really costs.

    python -m benchmarks.texts texts && python -m benchmarks.analyses --model minilm --texts texts

Every option is measured once, one at a time (`measured`), as the truth. `fisher` prices options by itself; LIM, ZD and block influence
rank sites, and their scores become damages by a fit to `--units` measured units of each kind. Rank correlation is Spearman's over
the (site, option) pairs that the fit has not seen; beside it stands the middle half of predicted over measured there. Each
analysis's plan gets the bytes of uniform 4 bits at group 64; its damage is measured on evaluation text that no analysis has seen.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks import texts as texts_of
from benchmarks.models import program
from benchmarks.quality import uniform
from lwcompile.budget import Budget
from lwcompile.calibration import rank_correlation
from lwcompile.contract import Damage
from lwcompile.pipeline import Settings, session
from lwcompile.progress import terminal_progress
from lwcompile.recipe import Recipe
from lwcompile.session import Session
from lwcompile.spec import Spec

OPTIONS = ["quantize{bits=[3,4,6],group_size=64,solver=gptq}"]
Prices = dict[tuple[str, Spec], Damage]


def prices(run: Session) -> Prices:
    return {(id, option): damage for id, found in run.damages.items() for option, damage in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", choices=["minilm", "twin", "smollm2"])
    texts_of.arguments(parser)
    parser.add_argument("--units", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--run-dir", type=Path, default=Path("lwcompile-runs/analyses"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seqlen = 32 if options.model == "minilm" else 256
    dense = program(options.model)
    truth_pass = f"measured{{tokens={options.tokens}}}"
    few = f"measured{{tokens={options.tokens},units={options.units}}}"
    runs = {
        "measured": [truth_pass],
        "fisher": ["fisher"],
        "lim": ["lim", few],
        "zd": ["zd", few],
        "block_influence": ["block_influence", few],
    }
    recipe = Recipe.find("quality").with_(
        options={"linear": OPTIONS, "embedding": OPTIONS},
        calibration={"dataset": texts_of.calibration(options.texts), "samples": 16384 // seqlen, "seqlen": seqlen},
        evaluation={
            "dataset": texts_of.evaluations(options.texts)["tutorial"],
            "samples": 6144 // seqlen,
            "seqlen": seqlen,
            "order": "sequential",
        },
    )
    truth: Prices = {}
    rows: list[dict[str, Any]] = []
    for name, analyses in runs.items():
        settings = Settings(recipe=recipe.with_(analyses=analyses), backend="program", run_dir=options.run_dir / options.model)
        run = session(dense, settings, terminal_progress())
        started = time.perf_counter()
        found = prices(run)
        seconds = time.perf_counter() - started
        truth = truth or found
        unseen = {key: damage for key, damage in found.items() if not damage.measured and truth.get(key) is not None}
        ratios = sorted(d.value / truth[key].value for key, d in unseen.items() if truth[key].value > 0)
        quartiles = [ratios[len(ratios) * k // 4] for k in (1, 2, 3)] if ratios else None
        plan = run.plan(Budget(bytes=uniform(run, 4, 4).bytes))
        measured = run.measure(run.compress(plan))["damage"]
        rows.append({
            "analysis": name, "seconds": round(seconds, 1), "unseen": len(unseen),
            "spearman": rank_correlation(unseen, truth) if unseen else None, "predicted over measured": quartiles,
            "predicted": plan.predicted, "damage": measured.mean, "low": measured.low, "high": measured.high, "bytes": plan.bytes,
        })  # fmt: skip
        row = rows[-1]
        rank = f"{row['spearman']:.3f} on {len(unseen)}" if unseen else "(the truth)"
        rank += f", {quartiles[0]:.2f} to {quartiles[2]:.2f} of measured" if quartiles else ""
        print(f"{name:16} {seconds:7.1f} s  rank correlation {rank:40}  its plan: predicted {plan.predicted:.4f}, really "
              f"{measured.mean:.4f} [{measured.low:.4f}, {measured.high:.4f}] {run.metric.unit}", flush=True)  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
