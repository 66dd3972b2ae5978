"""Weights multiplied as they are packed: `lwcompile::packed_linear` and `lwcompile::packed_embedding`, C++ of our own.

before: codes as they are stored, row by row in exactly their bits
after:  panels of 32 rows in words of 32 bits (`panels.h`): 2, 4 and 8 bits take no more room, 3, 5, 6 and 7 about a tenth more

Every width, group size and kind of zero point is taken. Sums are float32, whatever the type of x, and nothing is rounded: a product
differs from the dequantized one as float32 sums do that are added in another order. With `int8`, x is rounded to 127 steps in each
block, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lwcompile.backends.inductor.native import load
from lwcompile.formats import QuantizedTensor

PANEL = 32
"""Rows whose codes lie side by side, as `panels.h` has it."""

INT8_BITS = (2, 4)
"""Bits whose products with int8 are made of bytes."""

BLOCK, LARGE = 32, 4 / 127
"""Numbers of x that share a step, or the rest of a group of the weight; what part of the root mean square of its row a step may be.
As `int8.h` has them."""

SOURCE = Path(__file__).with_name("packed.cpp")

_TAKES = "Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size, int out_features, int few, bool int8"
torch.library.define("lwcompile::packed_linear", f"({_TAKES}) -> Tensor")
torch.library.define("lwcompile::packed_linear.into", f"(Tensor(a!) out, {_TAKES}) -> ()")  # for a tape, see tape.py
torch.library.define(
    "lwcompile::packed_embedding",
    "(Tensor ids, Tensor codes, Tensor scale, Tensor? zero, int bits, int group_size, int rows, int columns) -> Tensor",
)


@torch.library.register_fake("lwcompile::packed_linear")
def _linear(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
            bits: int, group_size: int, out_features: int, few: int, int8: bool) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("lwcompile::packed_embedding")
def _embedding(ids: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None,
               bits: int, group_size: int, rows: int, columns: int) -> Tensor:  # fmt: skip
    return ids.new_empty((*ids.shape, columns), dtype=torch.float32)


def unavailable() -> str | None:
    """Why the operators cannot run here; None if they can, and then they are loaded."""
    return load(SOURCE)


@dataclass(frozen=True, eq=False)
class Panels:
    """A weight as the operators read it.

    `codes` int32 [N/32, G, W, 32], the codes of one group in W words a row; `scale` float16 or float32, `zero` uint8 or float or
    None, both [N/32, G, 32]. Rows are padded to whole panels, groups to whole words.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Panels:
        rows, columns = weight.shape
        bits, group = weight.format.bits, weight.format.group(columns)
        per_word, groups = 32 // bits, weight.format.groups(columns)
        held = -(-group // per_word)
        panels = []
        for start in range(0, rows, _STEP):
            codes = weight.codes[start : start + _STEP]
            codes = F.pad(codes, (0, groups * group - columns, 0, -len(codes) % PANEL)).view(-1, groups, group)
            codes = F.pad(codes, (0, held * per_word - group)).view(-1, PANEL, groups, held, per_word)
            words = sum(codes[..., t].int() << (bits * t) for t in range(per_word))
            panels.append(words.permute(0, 2, 3, 1).contiguous())  # type: ignore[union-attr]
        zero = None if weight.zero is None else _in_panels(weight.zero)
        return cls(torch.cat(panels), _in_panels(weight.scale), zero, bits, group, (rows, columns))

    @classmethod
    def joined(cls, several: Sequence[Panels]) -> Panels:
        """Weights of one format and width, one under the other; all but the last fill their panels."""
        first = several[0]
        if len(several) == 1:
            return first
        parts = {name: torch.cat([one.parts[name] for one in several]) for name in first.parts}
        return replace(first, **parts, shape=(sum(one.shape[0] for one in several), first.shape[1]))

    @property
    def parts(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scale": self.scale} | ({} if self.zero is None else {"zero": self.zero})

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def clone(self) -> Panels:
        return replace(self, **{name: part.clone() for name, part in self.parts.items()})

    def multiply(self, x: Tensor, bias: Tensor | None = None, few: int = 0, int8: bool = False) -> Tensor:
        """x [..., K] -> [..., N] of its type; up to `few` rows of x multiply codes in place, more of them weights made a part at a time.

        int8, for codes of `INT8_BITS` bits: each `BLOCK` of x is rounded to 127 steps of its largest value; where such a step is more than
        `LARGE`, what that left is rounded to steps a 254th as large, and added. A row that is not finite gives NaN.
        """
        made = (self.codes, self.scale, self.zero, bias, self.bits, self.group_size, self.shape[0], few, int8)
        return torch.ops.lwcompile.packed_linear.default(x, *made)

    def look_up(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> rows float32 [..., K]."""
        return torch.ops.lwcompile.packed_embedding.default(
            ids, self.codes, self.scale, self.zero, self.bits, self.group_size, *self.shape
        )


_STEP = 2048
"""Rows packed at a time, so that temporaries stay small."""


def _in_panels(grid: Tensor) -> Tensor:
    """[N, G] -> [N/32, G, 32]."""
    rows, groups = grid.shape
    return F.pad(grid, (0, 0, 0, -rows % PANEL)).view(-1, PANEL, groups).transpose(1, 2).contiguous()
