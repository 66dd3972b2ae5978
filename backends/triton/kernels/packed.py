"""Packed weights as the kernels read them, and the part that all of them share: from words to weights.

    w[n, k] = (code[n, k] - zero[n, k // group]) * scale[n, k // group]

A row of codes is int32 words, in chunks of 32 codes. A code of 3, 5, 6 or 7 bits is split over planes of 4, 2 and 1 bits, lowest
bits first, so that no code straddles two words: plane p of a row holds `p` words a chunk, code c of a chunk in bits
(c * p) % 32 .. of word (c * p) // 32. A row takes `bits` words a chunk, whatever the width.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32
NO_ZERO, INTEGER_ZERO, FLOAT_ZERO = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [N, in_features].

    words: int32 [N, bits * ceil(in_features / 32)]. scale: float16 or float32 [N, G], G = ceil(in_features / group).
    zero: uint8 [N, G] codes, or [N, G] of the scale's dtype, or None for the code 2**(bits - 1).
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int
    in_features: int

    @property
    def rows(self) -> int:
        return self.words.shape[0]

    @property
    def chunks(self) -> int:
        return self.words.shape[1] // self.bits

    @property
    def kind(self) -> int:
        """How kernels treat the zero point."""
        if self.zero is None:
            return NO_ZERO
        return INTEGER_ZERO if self.zero.dtype == torch.uint8 else FLOAT_ZERO

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Words, scale and zero; a weight without zero points passes its scale, which is then not read twice."""
        return self.words, self.scale, self.scale if self.zero is None else self.zero

    def to(self, device: torch.device | str) -> Packed:
        zero = None if self.zero is None else self.zero.to(device)
        return Packed(self.words.to(device), self.scale.to(device), zero, self.bits, self.group, self.in_features)

    def dequantize(self) -> Tensor:
        """The float32 weight [N, in_features], by plain PyTorch: what every kernel is compared with."""
        codes, below, first = torch.zeros(self.rows, self.chunks * CHUNK, dtype=torch.int32, device=self.words.device), 0, 0
        for plane in planes(self.bits):
            words = self.words[:, first : first + plane * self.chunks]
            shifts = torch.arange(0, 32, plane, dtype=torch.int32, device=words.device)
            codes |= ((words[:, :, None] >> shifts) & ((1 << plane) - 1)).flatten(1) << below
            below, first = below + plane, first + plane * self.chunks
        group = torch.arange(self.in_features, device=codes.device) // self.group
        zero = torch.full_like(self.scale, 2 ** (self.bits - 1)) if self.zero is None else self.zero
        return (codes[:, : self.in_features].float() - zero.float()[:, group]) * self.scale.float()[:, group]


def planes(bits: int) -> tuple[int, ...]:
    """The widths that a code is split into, lowest bits first: powers of two whose sum is `bits`."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@triton.jit
def load_plane(start, chunk, mask, CHUNKS, BELOW: tl.constexpr, WIDTH: tl.constexpr):
    """One plane's share of the codes: start [R] of its rows, chunk [C], mask [R, C] -> int32 [R, C, 32], at its place in the code."""
    word = tl.arange(0, WIDTH)
    at = start[:, None, None] + BELOW * CHUNKS + chunk[None, :, None] * WIDTH + word[None, None, :]
    words = tl.load(at, mask=mask[:, :, None], other=0)
    shift = tl.arange(0, 32 // WIDTH) * WIDTH
    codes = (words[:, :, :, None] >> shift[None, None, None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(codes, (mask.shape[0], mask.shape[1], 32)) << BELOW


@triton.jit
def load_codes(words, row, chunk, mask, CHUNKS, BITS: tl.constexpr):
    """Codes int32 [R, C, 32] of rows [R] and chunks [C]; 0 where the mask [R, C] is closed."""
    start = words + row.to(tl.int64) * CHUNKS * BITS
    HIGH: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    codes = load_plane(start, chunk, mask, CHUNKS, 0, HIGH)
    REST: tl.constexpr = BITS - HIGH
    if REST >= 2:
        codes |= load_plane(start, chunk, mask, CHUNKS, HIGH, 2)
    if REST % 2 == 1:
        codes |= load_plane(start, chunk, mask, CHUNKS, BITS - 1, 1)
    return codes


@triton.jit
def load_weights(
    words, scale, zero, row, rows, chunk, K, CHUNKS, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr
):  # fmt: skip
    """(codes - zero, scale): float32 [R, C, 32], and their scales [R, C, 1] where a group holds whole chunks, else [R, C, 32].

    row: [R], of which those below `rows` are read. chunk: [C]. Beyond K the first is anything and the second may be 0.
    """
    mask = (row < rows)[:, None] & (chunk < CHUNKS)[None, :]
    codes = load_codes(words, row, chunk, mask, CHUNKS, BITS)
    groups = (K + GROUP - 1) // GROUP
    if GROUP % 32 == 0:  # noqa: SIM108  (the compiler drops the other branch, whose shape differs)
        group = ((chunk * 32) // GROUP)[:, None]
    else:
        group = (chunk[:, None] * 32 + tl.arange(0, 32)[None, :]) // GROUP
    at = row.to(tl.int64)[:, None, None] * groups + group[None, :, :]
    inside = (row < rows)[:, None, None] & (group < groups)[None, :, :]
    factor = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    # A small integer in the lowest bits of 2**23 is that number plus 2**23: one float subtraction instead of a slow conversion.
    number = (codes | 0x4B000000).to(tl.float32, bitcast=True)
    if ZERO == 0:
        return number - (8388608.0 + (1 << (BITS - 1))), factor
    offset = tl.load(zero + at, mask=inside, other=0).to(tl.float32)
    if ZERO == 1:
        return number - (8388608.0 + offset), factor
    return (number - 8388608.0) - offset, factor
