"""y = act(norm(x) @ w.T + bias) + residual for a few rows of x, w packed: as fast as w is read.

Warps split K between them and add up at the end; they share nothing before that. The product is w @ x.T on tensor cores, of which
lane 4 * g + t of a warp holds w's rows g and g + 8, and of every 8 columns the two that t says. Which k are those columns is free, as
long as w and x agree. So lane t takes `Q` chunks for itself, reads them 16 bytes at a time, and what it widens is what it multiplies;
it reads the same chunks of x. Axes of 8 and 4 below are lanes: tensors are shaped so that the compiler, which hands out the last axes
first, puts lanes there and warps on the axis of `PARTS`. Then no value has to move, neither through shared memory nor by shuffles.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from lwcompile.backends.triton.kernels.activation import activate
from lwcompile.backends.triton.kernels.packed import MAGIC, PAIRED, merge, widen, widen_bytes, widen_pairs


@triton.jit
def fragment_words(
    words, row, rows, chunk, CHUNKS, BITS: tl.constexpr, BELOW: tl.constexpr, WIDTH: tl.constexpr, Q: tl.constexpr
):  # fmt: skip
    """A plane's words: int32 [4, 8, PARTS, H, of each 16 bytes, of each word]."""
    VECTOR: tl.constexpr = Q * WIDTH if Q * WIDTH < 4 else 4
    at = tl.arange(0, Q * WIDTH // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    at = (chunk * WIDTH)[:, :, :, :, None, None] + at[None, None, None, None, :, :]
    inside = (row < rows)[:, :, :, :, None, None] & (at < CHUNKS * WIDTH)
    start = words + row.to(tl.int64) * (CHUNKS * BITS) + BELOW * CHUNKS
    return tl.load(start[:, :, :, :, None, None] + at, mask=inside, other=0, eviction_policy="evict_first")  # x may stay


@triton.jit
def fragment_pairs(
    made, under, BELOW: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, FROM: tl.constexpr, Q: tl.constexpr
):
    """The bits `MASK` of a plane's codes from bit `FROM` on, at place `BELOW` over `under`: pairs, int32 [4, 8, PARTS, H, Q, 16]."""
    shift = (tl.arange(0, 16 // WIDTH) * WIDTH + FROM - BELOW)[None, None, None, None, None, None, :]
    made = made[:, :, :, :, :, :, None]
    codes = tl.reshape(tl.where(shift < 0, made << -shift, made >> shift), (4, 8, made.shape[2], made.shape[3], Q, 16))
    return merge(codes, (MASK << BELOW) * 0x10001, under)


@triton.jit
def fragment_grid(grid, row, rows, chunk, K, GROUP: tl.constexpr, Q: tl.constexpr):
    """Scales or zero points: [4, 8, PARTS, H, Q or 1, 1, 1] where a group holds whole chunks, else [4, 8, PARTS, H, Q, 16, 2]."""
    COUNT: tl.constexpr = 1 if GROUP % (32 * Q) == 0 else Q
    k = (chunk[:, :, :, :, None] + tl.arange(0, COUNT)[None, None, None, None, :])[:, :, :, :, :, None, None] * 32
    if GROUP % 32 != 0:
        k += tl.reshape(tl.arange(0, 32), (1, 1, 1, 1, 1, 16, 2))
    groups = (K + GROUP - 1) // GROUP
    start = grid + row.to(tl.int64) * groups
    inside = (row < rows)[:, :, :, :, None, None, None] & (k // GROUP < groups)
    return tl.load(start[:, :, :, :, None, None, None] + k // GROUP, mask=inside, other=0)


@triton.jit
def fragment_grids(
    scale, zero, row, rows, chunk, K, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, Q: tl.constexpr
):
    """Scales and zero points."""
    factor = fragment_grid(scale, row, rows, chunk, K, GROUP, Q)
    if ZERO != 0:  # noqa: SIM108  (the compiler drops the other branch, whose type differs)
        offset = fragment_grid(zero, row, rows, chunk, K, GROUP, Q)
    else:
        offset = (factor * 0).to(tl.int32) + (1 << (BITS - 1))
    return factor, offset


@triton.jit
def fragment(
    words, factor, offset, row, rows, chunk, CHUNKS, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    PARTS: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, dtype: tl.constexpr, GROUPED: tl.constexpr = False,
):  # fmt: skip
    """Weights as the product takes them: [PARTS, H * 8, Q * 128] of `dtype`, columns in the order of (Q * 4, 4 lanes, 8).

    GROUPED: as a warp group's does, [PARTS * H * 8, Q * 128], in the order of (Q * 8, 2, 4 lanes, 2).
    """
    HIGH: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    REST: tl.constexpr = BITS - HIGH
    SHORT: tl.constexpr = PAIRED and dtype == tl.bfloat16 and GROUP % 32 == 0 and ZERO != 2
    made = fragment_words(words, row, rows, chunk, CHUNKS, BITS, 0, HIGH, Q)
    pairs = fragment_pairs(made, MAGIC if SHORT else 0, 0, HIGH, 15 if SHORT and BITS == 8 else (1 << HIGH) - 1, 0, Q)
    if REST >= 2:
        more = fragment_words(words, row, rows, chunk, CHUNKS, BITS, HIGH, 2, Q)
        pairs = fragment_pairs(more, pairs, HIGH, 2, 3, 0, Q)
    if REST % 2 == 1:
        more = fragment_words(words, row, rows, chunk, CHUNKS, BITS, BITS - 1, 1, Q)
        pairs = fragment_pairs(more, pairs, BITS - 1, 1, 1, 0, Q)
    if SHORT:
        COUNT: tl.constexpr = factor.shape[4]
        factor = tl.reshape(factor, (4, 8, PARTS, H, COUNT, 1))
        offset = tl.reshape(offset, (4, 8, PARTS, H, COUNT, 1))
        if BITS == 8:
            pairs = widen_bytes(pairs, fragment_pairs(made, MAGIC, 0, 8, 15, 4, Q), factor, offset)
        else:
            pairs = widen_pairs(pairs, factor, offset)
        made = tl.join((pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16))
    else:
        codes = tl.join(pairs, pairs >> 16) & ((1 << BITS) - 1)
        made = widen(codes, factor.to(tl.float32), offset.to(tl.float32), ZERO).to(dtype)
    if GROUPED:
        made = tl.permute(tl.reshape(made, (4, 8, PARTS, H, Q * 8, 2, 2)), (2, 3, 1, 4, 5, 0, 6))
        return tl.reshape(made, (PARTS * H * 8, Q * 128)).to(dtype, bitcast=True)
    else:
        made = tl.permute(tl.reshape(made, (4, 8, PARTS, H, Q * 4, 8)), (2, 3, 1, 4, 0, 5))
        return tl.reshape(made, (PARTS, H * 8, Q * 128)).to(dtype, bitcast=True)


@triton.jit
def few_kernel(
    x, words, scale, zero, words2, scale2, zero2, bias, residual, gain, y, M, N, K, CHUNKS, eps,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BITS2: tl.constexpr, GROUP2: tl.constexpr, ZERO2: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = BLOCK_N // 8
    MH: tl.constexpr = BLOCK_M // 8
    dtype: tl.constexpr = x.dtype.element_ty
    eight = tl.arange(0, 8)[None, :, None, None]
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, H)[None, None, None, :] * 8 + eight
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, MH)[None, None, None, :] * 8 + eight
    m = m[:, :, :, :, None, None]
    chunk = (tl.arange(0, PARTS)[None, None, :, None] * 4 + tl.arange(0, 4)[:, None, None, None]) * Q
    place = tl.arange(0, Q * 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    place = (chunk * 32)[:, :, :, :, None, None] + place[None, None, None, None, :, :]
    first = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    second = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((PARTS, BLOCK_M), tl.float32)
    for start in range(0, CHUNKS, PARTS * 4 * Q):
        k = start * 32 + place
        values = tl.load(x + m.to(tl.int64) * K + k, mask=(m < M) & (k < K), other=0.0)
        if NORM:
            wide = values.to(tl.float32)
            squares += tl.reshape(tl.permute(tl.sum(tl.sum(tl.sum(wide * wide, 5), 4), 0), (1, 2, 0)), (PARTS, BLOCK_M))
            values = (wide * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)).to(dtype)
        values = tl.reshape(tl.permute(values, (2, 4, 0, 5, 3, 1)), (PARTS, Q * 128, BLOCK_M))
        factor, offset = fragment_grids(scale, zero, row, N, start + chunk, K, BITS, GROUP, ZERO, Q)
        weights = fragment(words, factor, offset, row, N, start + chunk, CHUNKS, BITS, GROUP, ZERO, PARTS, H, Q, dtype)
        first = tl.dot(weights, values, first, input_precision="ieee")
        if GATED:
            factor, offset = fragment_grids(scale2, zero2, row, N, start + chunk, K, BITS2, GROUP2, ZERO2, Q)
            weights = fragment(words2, factor, offset, row, N, start + chunk, CHUNKS, BITS2, GROUP2, ZERO2, PARTS, H, Q, dtype)
            second = tl.dot(weights, values, second, input_precision="ieee")
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + row[:, None]
    total = tl.sum(first, 0)
    if NORM:
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)[None, :]
        total *= rstd
    if BIAS:
        total += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    total = activate(total, ACT)
    if GATED:
        factor = tl.sum(second, 0)
        if NORM:
            factor *= rstd
        total *= factor
    if RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
