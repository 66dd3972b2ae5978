"""torch.compile with this package behind it: the same function, and then a compressed one.

    python examples/torch_compile.py [--codegen inductor]

The backend is found by its name, without an import. `--codegen` says what makes the code; "eager" needs no compiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lwcompile as lw
from lwcompile.manager import relative_error
from lwcompile.tiny import Decoder, token_ids

HERE = Path(__file__).resolve()
RECIPE = f"""
analyses: [measured]
options:
  linear: ["quantize{{bits=[4,8],group_size=32,solver=gptq}}"]
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


@torch.no_grad()
def logits(model: Callable[..., dict[str, Tensor]], ids: Tensor) -> Tensor:
    return model(ids)["logits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codegen", default="eager")
    parser.add_argument("--out", type=Path, default=Path("compiled"))
    given = parser.parse_args()

    torch.manual_seed(0)
    model, ids, how = Decoder().eval(), token_ids(2, 9), {"codegen": given.codegen}
    compiled = torch.compile(model, backend="layerwise", options=how)
    print(f"exact: {relative_error(logits(model, ids), logits(compiled, ids)):.1g} from the model")

    program = lw.capture(model, {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}})
    lw.compress(program, given.out, recipe=lw.Recipe.parse(RECIPE))
    small = torch.compile(model, backend="layerwise", options={**how, "plan": str(given.out)})
    wanted, made = lw.load(given.out).run(input_ids=ids)["logits"], logits(small, ids)
    print(f"under a plan: {relative_error(wanted, made):.1g} from the compressed program, ", end="")
    print(f"{relative_error(logits(model, ids), made):.1g} from the model")

    with torch.no_grad():
        model.norm.weight.mul_(2)
    print(f"after a weight has changed: {relative_error(logits(model, ids), logits(compiled, ids)):.1g} from the model")


if __name__ == "__main__":
    main()
