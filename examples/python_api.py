"""Plan, compress, load and generate, from Python.

python examples/python_api.py                            a small random decoder, in seconds
python examples/python_api.py MODEL [--bits 4.25]        a Hugging Face folder or a .gguf file
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lwcompile as lw
from lwcompile.tiny import Decoder, token_ids

HERE = Path(__file__).resolve()
RECIPE = f"""
analyses: [measured]
options:
  linear: ["quantize{{bits=[4,6,8],group_size=32,solver=hqq}}"]
  embedding: ["quantize{{bits=[4,6,8],group_size=32,solver=hqq}}"]
  attention: [drop]
  mlp: [drop]
budget: {{avg_bits: 16}}                 # everything is counted, and the graph of so small a model is half of it
backend: program
calibration: {{dataset: "{HERE}:calibration", samples: 8}}
evaluation: {{dataset: "{HERE}:evaluation", samples: 8}}
"""


def calibration() -> dict:
    """What `dataset: file.py:function` calls: a tensor for each input, a row for each sample."""
    return {"input_ids": token_ids(8, 12, seed=1)}


def evaluation() -> dict:
    return {"input_ids": token_ids(8, 12, seed=2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, default=Path("small"))
    parser.add_argument("--bits", type=float)
    given = parser.parse_args()

    if given.model is None:
        free = {"input_ids": {0: "batch", 1: "sequence"}}
        program = lw.capture(Decoder(), {"input_ids": token_ids(2, 9)}, free)
        recipe = lw.Recipe.parse(RECIPE)
    else:
        program, recipe = lw.capture(given.model), lw.Recipe.named("fast")

    plan = lw.plan(program, recipe=recipe, avg_bits=given.bits)
    print(plan.to_yaml())

    result = lw.compress(program, given.out, recipe=recipe, plan=plan)
    low, high = result.plan.interval or (0.0, 0.0)
    print(f"{program.nbytes():,} bytes -> {result.program.nbytes():,}")
    print(f"damage {result.plan.measured:.4g} {result.plan.unit} (95 %: {low:.4g} to {high:.4g})")

    model = lw.load(given.out)
    prompt = token_ids(1, 6) if given.model is None else "Once upon a time"
    print("continued:", model.generate(prompt, max_new_tokens=12))


if __name__ == "__main__":
    main()
