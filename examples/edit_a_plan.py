"""A plan is a file: write it, edit it by hand, and compile what it says now.

    python examples/edit_a_plan.py

One sublayer is dropped by hand and one weight kept as it is; an option that nobody offered is refused with its line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lwcompile as lw
from lwcompile.errors import BadPlan
from lwcompile.tiny import Decoder, token_ids

HERE = Path(__file__).resolve()
RECIPE = f"""
analyses: [measured]
options:
  linear: ["quantize{{bits=[4,8],group_size=32,solver=rtn}}"]
  mlp: [drop]
budget: {{avg_bits: 24}}
backend: program
calibration: {{dataset: "{HERE}:calibration", samples: 8}}
evaluation: {{dataset: "{HERE}:evaluation", samples: 8}}
"""


def calibration() -> dict:
    return {"input_ids": token_ids(8, 12, seed=1)}


def evaluation() -> dict:
    return {"input_ids": token_ids(8, 12, seed=2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("plan.yaml"))
    given = parser.parse_args()

    program = lw.capture(Decoder(), {"input_ids": token_ids(2, 9)}, {"input_ids": {0: "batch", 1: "sequence"}})
    recipe = lw.Recipe.parse(RECIPE)
    made = lw.plan(program, recipe=recipe)

    edited = {site: options for site, options in made.choices.items() if not site.startswith("block1.mlp")}
    edited["block1.mlp"] = (lw.Spec.parse("drop"),)
    edited.pop("block0.mlp.down_proj", None)
    made.replace(choices=edited).save(given.out)
    print(given.out.read_text())

    read = lw.Plan.load(given.out)
    for change in made.diff(read):
        print(change)
    for name, plan in {"as planned": made, "as edited": read}.items():
        result = lw.compress(program, recipe=recipe, plan=plan)
        print(f"{name}: {result.program.nbytes():,} bytes, damage {result.plan.measured:.4g} {result.plan.unit}")

    given.out.write_text(given.out.read_text().replace("bits=4", "bits=7").replace("bits=8", "bits=7"))
    try:
        lw.compress(program, recipe=recipe, plan=given.out)
    except BadPlan as error:
        print("refused:", error)


if __name__ == "__main__":
    main()
