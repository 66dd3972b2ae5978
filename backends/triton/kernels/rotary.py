"""Rotary positions: y = x * cos + cat(-x2, x1) * sin, with x1 and x2 the halves of the head width."""

# pyright: reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwcompile.backends.triton.kernels.launch import cdiv, config_for, launch, next_power_of_2


@triton.jit
def rotary_kernel(
    x, cos, sin, y, heads, length, batch_stride, head_stride, row_stride, table_stride,
    HALF: tl.constexpr, HALF2: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    batch = head // heads
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.arange(0, HALF2)
    inside = (s < length)[:, None] & (d < HALF)[None, :]
    at = batch.to(tl.int64) * batch_stride + (head % heads) * head_stride + s[:, None] * row_stride + d[None, :]
    low = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    place = batch * table_stride + s[:, None] * (2 * HALF) + d[None, :]
    cos_low = tl.load(cos + place, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + place + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + place, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + place + HALF, mask=inside, other=0.0).to(tl.float32)
    out = head.to(tl.int64) * length * (2 * HALF) + s[:, None] * (2 * HALF) + d[None, :]
    tl.store(y + out, (low * cos_low - high * sin_low).to(y.dtype.element_ty), mask=inside)
    tl.store(y + out + HALF, (high * cos_high + low * sin_high).to(y.dtype.element_ty), mask=inside)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, D], cos and sin [1 or B, 1, S, D] -> [B, H, S, D] of x's dtype. x may be a transposed view."""
    batch, heads, length, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return y
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    config = config_for("rotary", x.device, length, width, width)
    args = (x, cos, sin, y, heads, length, *x.stride()[:3], 0 if cos.shape[0] == 1 else length * width)
    grid = (batch * heads, cdiv(length, config["BLOCK_S"]))
    launch(rotary_kernel, grid, config, *args, HALF=width // 2, HALF2=next_power_of_2(width // 2))
    return y


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `rotary` computes, in plain PyTorch and float32."""
    low, high = x.float().chunk(2, -1)
    return (x.float() * cos.float() + torch.cat([-high, low], -1) * sin.float()).to(x.dtype)
