"""Kernels that start while the one before them still runs ("programmatic dependent launch", NVIDIA's sm_90 and newer).

A rule with AHEAD launches its kernel so. What earlier kernels write is not there until `follow`; weights are, and `fetch` asks for
them before: they come to the L2 cache while the kernel before ends. What is only fetched is not used, so it may still be written.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lwcompile.backends.triton.kernels.launch import INTERPRETED

REAL = tl.constexpr(not INTERPRETED)
"""Whether there is anything to start before something else: the interpreter runs one program after the other."""


@triton.jit
def follow(AHEAD: tl.constexpr):
    """Wait for the kernels before, and let the one behind start."""
    if REAL and AHEAD != 0:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fetch(array, first, count, size, BYTES: tl.constexpr, THREADS: tl.constexpr):
    """Bring `count` of an array's `size` items of BYTES, from `first` on, to the L2 cache: a line of 128 bytes a thread."""
    LINE: tl.constexpr = 128 // BYTES
    for start in range(0, count, THREADS * LINE):
        at = tl.minimum(first + start + tl.arange(0, THREADS) * LINE, size - 1)
        where = (array + at).to(tl.int64)
        if REAL:
            tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [where], tl.int32, False, 1)


@triton.jit
def fetch_rows(
    words, scale, zero, row, rows, K, CHUNKS, BITS: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, THREADS: tl.constexpr
):
    """Bring COUNT rows of a packed weight of `rows`, from `row` on, to the L2 cache."""
    groups = (K + GROUP - 1) // GROUP
    wide = row.to(tl.int64)
    fetch(words, wide * (CHUNKS * BITS), COUNT * CHUNKS * BITS, tl.cast(rows, tl.int64) * (CHUNKS * BITS), 4, THREADS)
    SCALE: tl.constexpr = scale.dtype.element_ty.primitive_bitwidth // 8
    fetch(scale, wide * groups, COUNT * groups, tl.cast(rows, tl.int64) * groups, SCALE, THREADS)
    ZERO: tl.constexpr = zero.dtype.element_ty.primitive_bitwidth // 8
    fetch(zero, wide * groups, COUNT * groups, tl.cast(rows, tl.int64) * groups, ZERO, THREADS)
