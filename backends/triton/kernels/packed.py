"""Packed weights as the kernels read them, and the part that all of them share: from words to weights.

    w[n, k] = (code[n, k] - zero[n, k // group]) * scale[n, k // group]

A row of codes is int32 words, in chunks of 32 codes. A code of 3, 5, 6 or 7 bits is split over planes of 4, 2 and 1 bits, lowest
bits first, so that no code straddles two words: plane p of a row holds `p` words a chunk, each of 32 / p codes. Codes 2i and 2i + 1
of a word lie in its two halves, both from bit i * p on: one shift and one mask take a pair out, where two 16-bit floats belong.
A row takes `bits` words a chunk, whatever the width.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwcompile.backends.triton.kernels.launch import INTERPRETED

CHUNK = 32
NO_ZERO, INTEGER_ZERO, FLOAT_ZERO = 0, 1, 2
PAIRED = tl.constexpr(not INTERPRETED)
"""Whether codes are widened two at a time, by instructions that the interpreter does not have."""
MAGIC = tl.constexpr(0x43004300)
"""A pair of bfloat16 128: in its lowest 7 bits, one is 1."""


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
            place = torch.arange(32 // plane, dtype=torch.int32, device=words.device)
            shifts = place // 2 * plane + place % 2 * 16
            codes |= ((words[:, :, None] >> shifts) & ((1 << plane) - 1)).flatten(1) << below
            below, first = below + plane, first + plane * self.chunks
        group = torch.arange(self.in_features, device=codes.device) // self.group
        zero = torch.full_like(self.scale, 2 ** (self.bits - 1)) if self.zero is None else self.zero
        return (codes[:, : self.in_features].float() - zero.float()[:, group]) * self.scale.float()[:, group]


def planes(bits: int) -> tuple[int, ...]:
    """The widths that a code is split into, lowest bits first: powers of two whose sum is `bits`."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@triton.jit
def load_words(words, row, rows, first, CHUNKS, BITS: tl.constexpr, BELOW: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr):
    """A plane's words of rows [R] and C chunks from `first` on: int32 [R, C, WIDTH, 1]; 0 past the last row or chunk.

    The load is two-dimensional, so that the compiler sees words in a row and lets neighbours read neighbours.
    """
    at = first * WIDTH + tl.arange(0, C * WIDTH)
    inside = (row < rows)[:, None] & (at < CHUNKS * WIDTH)[None, :]
    start = words + row.to(tl.int64) * (CHUNKS * BITS) + BELOW * CHUNKS
    return tl.reshape(tl.load(start[:, None] + at[None, :], mask=inside, other=0), (row.shape[0], C, WIDTH, 1))


@triton.jit
def load_plane(
    words, row, rows, first, CHUNKS, BITS: tl.constexpr, BELOW: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """A plane's share of the codes, at its place in the code: int32 [R, C, 32], or pairs [R, C, 16], one in each half.

    Pairs of an only plane are left unmasked.
    """
    made = load_words(words, row, rows, first, CHUNKS, BITS, BELOW, WIDTH, C)
    COUNT: tl.constexpr = 16 if PAIRS else 32
    place = tl.arange(0, COUNT // WIDTH)
    shift = place * WIDTH if PAIRS else place // 2 * WIDTH + place % 2 * 16
    codes = made >> shift[None, None, None, :]
    if not PAIRS or WIDTH < BITS:
        codes = codes & (((1 << WIDTH) - 1) * (0x10001 if PAIRS else 1))
    return tl.reshape(codes, (row.shape[0], C, COUNT)) << BELOW


@triton.jit
def load_codes(words, row, rows, first, CHUNKS, BITS: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr):
    """Codes of rows [R], of which those below `rows` are read, and C chunks: int32 [R, C, 32], or pairs [R, C, 16]."""
    HIGH: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    codes = load_plane(words, row, rows, first, CHUNKS, BITS, 0, HIGH, C, PAIRS)
    REST: tl.constexpr = BITS - HIGH
    if REST >= 2:
        codes |= load_plane(words, row, rows, first, CHUNKS, BITS, HIGH, 2, C, PAIRS)
    if REST % 2 == 1:
        codes |= load_plane(words, row, rows, first, CHUNKS, BITS, BITS - 1, 1, C, PAIRS)
    return codes


@triton.jit
def load_grid(grid, row, rows, first, K, GROUP: tl.constexpr, C: tl.constexpr):
    """Scales or zero points of rows [R]: [R, C, 1] where a group holds whole chunks, else [R, C, 32]; 0 outside."""
    groups = (K + GROUP - 1) // GROUP
    chunk = first + tl.arange(0, C)
    if GROUP % 32 == 0:  # noqa: SIM108  (the compiler drops the other branch, whose shape differs)
        group = ((chunk * 32) // GROUP)[:, None]
    else:
        group = (chunk[:, None] * 32 + tl.arange(0, 32)[None, :]) // GROUP
    inside = (row < rows)[:, None, None] & (group < groups)[None, :, :]
    return tl.load(grid + (row.to(tl.int64) * groups)[:, None, None] + group[None, :, :], mask=inside, other=0)


@triton.jit
def widen(codes, factor, offset, ZERO: tl.constexpr):
    """(codes - offset) * factor in float32."""
    # A small integer in the lowest bits of 2**23 is that number plus 2**23: one float subtraction instead of a slow conversion.
    number = (codes | 0x4B000000).to(tl.float32, bitcast=True)
    if ZERO == 2:
        return ((number - 8388608.0) - offset) * factor
    return (number - (8388608.0 + offset)) * factor


@triton.jit
def merge(codes, MASK: tl.constexpr, under):
    """(codes & MASK) | under, in the one instruction that the assembler does not find where two of the three are constants."""
    if PAIRED:
        return tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0xea;", "=r,r,r,r", [codes, MASK, under], tl.int32, True, 1)
    else:
        return (codes & MASK) | under


@triton.jit
def widen_pairs(numbers, factor, offset):
    """(codes - offset) * factor of pairs of codes below 8 bits, in pairs of bfloat16: int32 like `numbers`; offset is an integer.

    Each code comes as the lowest bits of a 128 (`MAGIC`), less 128 and its zero point, which is exact, times the scale in bfloat16.
    That is a third of the work of the way by float32, for one more rounding.
    """
    factor = (factor.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001
    return tl.inline_asm_elementwise(
        """{ .reg .b32 pair, one, nothing;
        mov.b32 one, 0x3f803f80;
        mov.b32 nothing, 0x80008000;
        fma.rn.bf16x2 pair, $1, one, $2;
        fma.rn.bf16x2 $0, pair, $3, nothing; }""",
        "=r,r,r,r", [numbers, (offset.to(tl.int32) | 0xC300) * 0x10001, factor], tl.int32, True, 1,
    )  # fmt: skip


@triton.jit
def widen_bytes(low, high, factor, offset):
    """`widen_pairs` of 8-bit codes, by halves of 4 bits each in a `MAGIC`: their places and zero points go in where it is exact."""
    factor = (factor.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001
    offset = offset.to(tl.int32)
    return tl.inline_asm_elementwise(
        """{ .reg .b32 lower, upper, one, sixteen, nothing;
        mov.b32 one, 0x3f803f80;
        mov.b32 sixteen, 0x41804180;
        mov.b32 nothing, 0x80008000;
        fma.rn.bf16x2 lower, $1, one, $3;
        fma.rn.bf16x2 upper, $2, sixteen, $4;
        fma.rn.bf16x2 lower, lower, one, upper;
        fma.rn.bf16x2 $0, lower, $5, nothing; }""",
        "=r,r,r,r,r,r", [low, high, (offset & 15 | 0xC300) * 0x10001, (offset >> 4 | 0xC500) * 0x10001, factor], tl.int32, True, 1,
    )  # fmt: skip


@triton.jit
def load_weights(
    words, scale, zero, row, rows, first, K, CHUNKS,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Weights of rows [R] and C chunks: float32 [R, C, 32]. Those past K are finite, or 0 where a group begins past K."""
    # Scales are loaded before words: the compiler lays a tile out as its last load is, and words make the better layout.
    factor = load_grid(scale, row, rows, first, K, GROUP, C).to(tl.float32)
    offset = factor * 0 + (1 << (BITS - 1))
    if ZERO != 0:
        offset = load_grid(zero, row, rows, first, K, GROUP, C).to(tl.float32)
    codes = load_codes(words, row, rows, first, CHUNKS, BITS, C, False)
    return widen(codes, factor, offset, ZERO)


@triton.jit
def load_tile(
    words, scale, zero, row, rows, first, K, CHUNKS,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Weights of rows [R] and C chunks as a product or a store wants them: [R, C * 32] of `dtype`.

    In bfloat16, codes below 8 bits stay two to a register (`widen_pairs`).
    """
    if PAIRED and dtype == tl.bfloat16 and BITS < 8 and GROUP % 32 == 0 and ZERO != 2:
        factor = load_grid(scale, row, rows, first, K, GROUP, C)
        offset = (factor * 0).to(tl.int32) + (1 << (BITS - 1))
        if ZERO == 1:
            offset = load_grid(zero, row, rows, first, K, GROUP, C)
        pairs = load_codes(words, row, rows, first, CHUNKS, BITS, C, True)
        pairs = widen_pairs(merge(pairs, ((1 << BITS) - 1) * 0x10001, MAGIC), factor, offset)
        # What is reshaped is given its dtype afterwards: the compiler fails on some shapes where a product reads a reshape itself.
        pairs = tl.join((pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16))
        return tl.reshape(pairs, (row.shape[0], C * 32)).to(dtype, bitcast=True)
    else:
        made = load_weights(words, scale, zero, row, rows, first, K, CHUNKS, BITS, GROUP, ZERO, C)
        return tl.reshape(made, (row.shape[0], C * 32)).to(dtype)
