"""Rows of a packed table: y = w[ids], only the looked-up rows unpacked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwcompile.backends.triton.kernels.launch import config_for, launch
from lwcompile.backends.triton.kernels.packed import Packed, load_weights


@triton.jit
def embedding_kernel(
    ids, words, scale, zero, y, M, N, K, CHUNKS,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.load(ids + m, mask=m < M, other=0)
    codes, factor = load_weights(words, scale, zero, row, N, chunk, K, CHUNKS, BITS, GROUP, ZERO)
    k = chunk[:, None] * 32 + tl.arange(0, 32)[None, :]
    at = m.to(tl.int64)[:, None, None] * K + k[None, :, :]
    inside = (m < M)[:, None, None] & (k < K)[None, :, :]
    tl.store(y + at, (codes * factor).to(y.dtype.element_ty), mask=inside)


def embedding(table: Packed, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """ids int [...] below the table's rows -> [..., K] of `dtype`."""
    y = torch.empty((*ids.shape, table.in_features), dtype=dtype, device=ids.device)
    if ids.numel() == 0:
        return y
    config = config_for("embedding", ids.device, ids.numel(), table.rows, table.in_features, table.bits)
    grid = (triton.cdiv(ids.numel(), config["BLOCK_M"]), triton.cdiv(table.chunks, config["BLOCK_C"]))
    launch(
        embedding_kernel, grid, config, ids.contiguous(), *table.pointers, y, ids.numel(), table.rows, table.in_features, table.chunks,
        BITS=table.bits, GROUP=table.group, ZERO=table.kind,
    )  # fmt: skip
    return y


def embedding_reference(table: Packed, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `embedding` computes, in plain PyTorch."""
    return table.dequantize()[ids].to(dtype)
