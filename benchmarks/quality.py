"""Damage at equal bytes: uniform GPTQ beside our plan, everything stored counted.

    python -m benchmarks.quality --calibration debian-reference/ --evaluation gpl3=GPL-3 --evaluation NAME=FILE ...

Calibration text shares nothing with the evaluation texts (checked), and nothing is tuned to those. Uniform GPTQ is 4 bits at group
64 throughout, or 3 bits with a 4-bit embedding and head; it is asymmetric, with act-order and the clip search, calibrated on the
same tokens in the same run. Our plan gets exactly its bytes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.models import digits, program
from lwcompile.budget import Budget
from lwcompile.pipeline import Settings, session
from lwcompile.plans import Plan
from lwcompile.progress import terminal_progress
from lwcompile.recipe import Recipe
from lwcompile.session import Session
from lwcompile.spec import Spec

UNIFORM = {"4.3 bits": (4, 4), "3.5 bits": (3, 4)}
"""Label -> bits of the body, and of embedding and head."""


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


def compare(name: str, recipe: Recipe, evaluations: dict[str, dict[str, Any]], run_dir: Path) -> list[dict[str, Any]]:
    dense = program(name)
    rows: list[dict[str, Any]] = []
    base = session(dense, Settings(recipe=recipe, backend="program", run_dir=run_dir / name), terminal_progress())
    for label, (body, ends) in UNIFORM.items():
        plain = uniform(base, body, ends)
        started = time.perf_counter()
        ours = base.plan(Budget(bytes=plain.bytes))
        planned = time.perf_counter() - started
        programs = {"uniform GPTQ": base.compress(plain), "ours": base.compress(ours)}
        for text, data in evaluations.items():
            measured: dict[str, Any] = {}
            for who, compressed in programs.items():
                other = session(dense, Settings(recipe=recipe.with_(evaluation=data), backend="program", run_dir=run_dir / name))
                other.__dict__.update({k: v for k, v in base.__dict__.items() if k in ("structure", "context", "dense")})
                measured[who] = other.measure(compressed)["damage"]
            u, o = measured["uniform GPTQ"], measured["ours"]
            rows.append({
                "model": name, "point": label, "text": text, "bits": 8 * (plain.bytes or 0) / base.table.parameters,
                "bytes": plain.bytes, "our bytes": ours.bytes, "uniform": u.to_json(), "ours": o.to_json(),
                "ratio": o.mean / u.mean, "predicted": ours.predicted, "planning seconds": planned,
            })  # fmt: skip
            print(
                f"{name:8} {label:9} {text:12} {plain.bytes / 1e6:7.2f} MB  uniform {u.mean:.4f} [{u.low:.4f}, {u.high:.4f}]  "
                f"ours {o.mean:.4f} [{o.low:.4f}, {o.high:.4f}]  ratio {o.mean / u.mean:.2f}  ({ours.bytes / 1e6:.2f} MB)",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["twin", "minilm", "dinov2", "smollm2"])
    parser.add_argument("--recipe", default="quality")
    parser.add_argument("--calibration", help="text file or folder; default: the recipe's")
    parser.add_argument("--evaluation", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--tokens", type=int, default=2048, help="evaluated in windows of 256")
    parser.add_argument("--run-dir", type=Path, default=Path("lwcompile-runs/quality"))
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    texts = dict(item.split("=", 1) for item in options.evaluation)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        calibration_images, evaluation_images = digits(Path(scratch))
        for name in options.models:
            recipe = Recipe.find(options.recipe)
            if name == "dinov2":
                recipe = recipe.with_(calibration={"dataset": str(calibration_images), "samples": 256})
                evaluations = {"digits": {"dataset": str(evaluation_images), "samples": 512}}
            else:
                recipe = recipe.with_(calibration={"dataset": options.calibration, "samples": 64, "seqlen": 256})
                samples = max(options.tokens // 256, 1)
                shape = {"samples": samples, "seqlen": 256, "order": "sequential"}
                if name == "minilm":
                    shape = {"samples": 256, "seqlen": 32, "order": "sequential"}
                    recipe = recipe.with_(calibration={"samples": 512, "seqlen": 32})
                evaluations = {text: {"dataset": path, **shape} for text, path in texts.items()}
            rows += compare(name, recipe, evaluations, options.run_dir)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
