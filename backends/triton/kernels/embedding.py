"""Rows of a packed table: y = w[ids], only the looked-up rows unpacked; or a part of the table, or all of it."""

# pyright: reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwcompile.backends.triton.kernels.ahead import follow
from lwcompile.backends.triton.kernels.launch import cdiv, config_for, launch
from lwcompile.backends.triton.kernels.packed import CHUNK, Packed, load_tile


@triton.jit
def embedding_kernel(
    ids, words, scale, zero, y, M, N, K, CHUNKS, FIRST, WIDTH, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    LOOKUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr = 0,
):  # fmt: skip
    """y [M, WIDTH]: the columns from chunk FIRST on."""
    follow(AHEAD)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = FIRST + tl.program_id(1) * BLOCK_C
    row = tl.load(ids + m, mask=m < M, other=0) if LOOKUP else m
    made = load_tile(words, scale, zero, row, N, first, K, CHUNKS, BITS, GROUP, ZERO, BLOCK_C, y.dtype.element_ty)
    k = tl.program_id(1) * (BLOCK_C * 32) + tl.arange(0, BLOCK_C * 32)
    tl.store(y + m.to(tl.int64)[:, None] * WIDTH + k[None, :], made, mask=(m < M)[:, None] & (k < WIDTH)[None, :])


def embedding(table: Packed, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """ids int [...] below the table's rows -> [..., K] of `dtype`."""
    y = torch.empty((*ids.shape, table.in_features), dtype=dtype, device=ids.device)
    _run("embedding", table, ids.contiguous(), y, ids.numel(), 0, table.in_features)
    return y


def dequantize(weight: Packed, dtype: torch.dtype) -> Tensor:
    """The whole weight, [N, K] of `dtype`, by a kernel."""
    y = torch.empty((weight.rows, weight.in_features), dtype=dtype, device=weight.words.device)
    dequantize_part(weight, y)
    return y


def dequantize_part(weight: Packed, y: Tensor, first_row: int = 0, first_column: int = 0) -> None:
    """Write weight[first_row :, first_column :] into y, as far as it goes. first_column is a multiple of 32, and y contiguous."""
    rows = slice(first_row, first_row + y.shape[0])
    zero = None if weight.zero is None else weight.zero[rows]
    part = Packed(weight.words[rows], weight.scale[rows], zero, weight.bits, weight.group, weight.in_features)
    _run("dequantize", part, None, y, y.shape[0], first_column, y.shape[1])


def _run(kernel: str, table: Packed, ids: Tensor | None, y: Tensor, m: int, first: int, width: int) -> None:
    if m == 0:
        return
    config = config_for(kernel, y.device, m, table.rows, table.in_features, table.bits)
    grid = (cdiv(m, config["BLOCK_M"]), cdiv(cdiv(width, CHUNK), config["BLOCK_C"]))
    launch(
        embedding_kernel, grid, config, table.words if ids is None else ids, *table.pointers, y, m, table.rows, table.in_features,
        table.chunks, first // CHUNK, width, BITS=table.bits, GROUP=table.group, ZERO=table.kind, LOOKUP=ids is not None,
    )  # fmt: skip


def embedding_reference(table: Packed, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `embedding` computes, in plain PyTorch."""
    return table.dequantize()[ids].to(dtype)
