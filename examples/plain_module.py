"""Compile a plain nn.Module, with data and a measure of damage of your own.

    python examples/plain_module.py

The model is a small classifier with a residual stream; damage is the share of samples that get another class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import lwcompile as lw
from lwcompile.structure import find_structure

HERE = Path(__file__).resolve()
RECIPE = f"""
analyses: [measured]
options:
  linear: ["quantize{{bits=[2,3,4,8],group_size=16,solver=rtn}}"]
  mlp: [drop]
budget: {{avg_bits: 12}}
backend: program
metric: "{HERE}:other_class"
calibration: {{dataset: "{HERE}:calibration", samples: 64}}
evaluation: {{dataset: "{HERE}:evaluation", samples: 64}}
"""


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """x [batch, 16] -> scores of 5 classes [batch, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(16, 32), nn.Sequential(*[Residual(32) for _ in range(4)])
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.stem(x)))


def samples(seed: int) -> dict[str, Tensor]:
    return {"x": torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))}


def calibration() -> dict[str, Tensor]:
    return samples(1)


def evaluation() -> dict[str, Tensor]:
    return samples(2)


def other_class(dense: Tensor, compressed: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """1 for each sample that the compressed model puts into another class."""
    return (dense.argmax(-1) != compressed.argmax(-1)).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("classifier"))
    given = parser.parse_args()

    torch.manual_seed(0)
    program = lw.capture(Classifier(), {"x": torch.randn(2, 16)}, {"x": {0: "batch"}})
    structure = find_structure(program)
    print("blocks:", ", ".join(site.id for site in structure.of_kind("block")))
    print("other weights:", ", ".join(site.id for site in structure.of_kind("linear") if site.parent is None))

    result = lw.compress(program, given.out, recipe=lw.Recipe.parse(RECIPE))
    print(result.plan.to_yaml())
    print(f"{result.plan.measured:.1%} of held-out samples get another class")
    print("scores of one sample:", lw.load(given.out).run(**samples(3))["output0"][0].tolist())


if __name__ == "__main__":
    main()
