"""y = act(x @ w.T + bias) + residual for some rows of x, w packed: widened weights go from registers into Hopper's tensor cores.

The product is w @ x.T. Of the weights, the first operand, a lane of a warp group holds what it would of `few`: so what it widens is
what it multiplies, by the same free choice of which k are which columns, and only x passes through shared memory, in that order of
columns already (`arranged`). Products of warp groups are asynchronous, so the next weights are widened meanwhile.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from lwcompile.backends.triton.kernels.activation import activate
from lwcompile.backends.triton.kernels.few import fragment, fragment_grids


@triton.jit
def several_kernel(
    x, words, scale, zero, words2, scale2, zero2, bias, residual, y, M, N, K, CHUNKS, WIDTH, SPLIT_K,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BITS2: tl.constexpr, GROUP2: tl.constexpr, ZERO2: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, WARPS: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """x [M, WIDTH]; y [M, N] or, where K is split, [SPLIT_K, M, N]."""
    BLOCK_N: tl.constexpr = WARPS * 16
    dtype: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    row = tl.arange(0, WARPS)[None, None, :, None] * 16 + tl.arange(0, 2)[None, None, None, :] * 8
    row = tl.program_id(0) * BLOCK_N + row + tl.arange(0, 8)[None, :, None, None]
    chunk = tl.arange(0, 4)[:, None, None, None] * Q + tl.zeros((1, 1, WARPS, 1), tl.int32)
    column = tl.arange(0, Q * 128)
    first = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    factor, offset = fragment_grids(scale, zero, row, N, part * (4 * Q) + chunk, K, BITS, GROUP, ZERO, Q)
    if GATED:
        factor2, offset2 = fragment_grids(scale2, zero2, row, N, part * (4 * Q) + chunk, K, BITS2, GROUP2, ZERO2, Q)
    for start in range(part * (4 * Q), CHUNKS, SPLIT_K * (4 * Q)):
        at = start + chunk
        after = at + SPLIT_K * (4 * Q)
        k = start * 32 + column
        values = tl.trans(tl.load(x + m.to(tl.int64)[:, None] * WIDTH + k[None, :], mask=(m < M)[:, None], other=0.0))
        now, less = factor, offset
        factor, offset = fragment_grids(scale, zero, row, N, after, K, BITS, GROUP, ZERO, Q)
        weights = fragment(words, now, less, row, N, at, CHUNKS, BITS, GROUP, ZERO, WARPS, 2, Q, dtype, True)
        first = tl.dot(weights, values, first, input_precision="ieee")
        if GATED:
            now, less = factor2, offset2
            factor2, offset2 = fragment_grids(scale2, zero2, row, N, after, K, BITS2, GROUP2, ZERO2, Q)
            weights = fragment(words2, now, less, row, N, at, CHUNKS, BITS2, GROUP2, ZERO2, WARPS, 2, Q, dtype, True)
            second = tl.dot(weights, values, second, input_precision="ieee")
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + row[:, None]
    if BIAS:
        first += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    first = activate(first, ACT)
    if GATED:
        first *= second
    if RESIDUAL:
        first += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + part.to(tl.int64) * M * N + at, first.to(y.dtype.element_ty), mask=inside)
