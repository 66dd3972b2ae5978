"""Rows of a packed table: y = w[ids], only the looked-up rows unpacked; or all of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwcompile.backends.triton.kernels.launch import cdiv, config_for, launch
from lwcompile.backends.triton.kernels.packed import Packed, load_tile


@triton.jit
def embedding_kernel(
    ids, words, scale, zero, y, M, N, K, CHUNKS, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    LOOKUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_C
    row = tl.load(ids + m, mask=m < M, other=0) if LOOKUP else m
    made = load_tile(words, scale, zero, row, N, first, K, CHUNKS, BITS, GROUP, ZERO, BLOCK_C, y.dtype.element_ty)
    k = first * 32 + tl.arange(0, BLOCK_C * 32)
    tl.store(y + m.to(tl.int64)[:, None] * K + k[None, :], made, mask=(m < M)[:, None] & (k < K)[None, :])


def embedding(table: Packed, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """ids int [...] below the table's rows -> [..., K] of `dtype`."""
    y = torch.empty((*ids.shape, table.in_features), dtype=dtype, device=ids.device)
    _run("embedding", table, ids.contiguous(), y, ids.numel(), True)
    return y


def dequantize(weight: Packed, dtype: torch.dtype, y: Tensor | None = None) -> Tensor:
    """The whole weight, [N, K] of `dtype`, by a kernel; into y, if that is given."""
    if y is None:
        y = torch.empty((weight.rows, weight.in_features), dtype=dtype, device=weight.words.device)
    _run("dequantize", weight, weight.words, y, weight.rows, False)
    return y


def _run(kernel: str, table: Packed, ids: Tensor, y: Tensor, m: int, lookup: bool) -> None:
    if m == 0:
        return
    config = config_for(kernel, y.device, m, table.rows, table.in_features, table.bits)
    grid = (cdiv(m, config["BLOCK_M"]), cdiv(table.chunks, config["BLOCK_C"]))
    launch(
        embedding_kernel, grid, config, ids, *table.pointers, y, m, table.rows, table.in_features, table.chunks,
        BITS=table.bits, GROUP=table.group, ZERO=table.kind, LOOKUP=lookup,
    )  # fmt: skip


def embedding_reference(table: Packed, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `embedding` computes, in plain PyTorch."""
    return table.dequantize()[ids].to(dtype)
