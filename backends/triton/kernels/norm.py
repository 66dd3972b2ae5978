"""RMSNorm and LayerNorm over the last dimension, by themselves or with the residual add before them.

normalize       norm(x)
add_normalize   s = x + branch; (s, norm(s)): the stream is written once and not read again
arranged        norm(x), or x, with its columns in the order that `several` multiplies them in
"""

# pyright: reportArgumentType=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lwcompile.backends.triton.kernels.launch import cdiv, config_for, launch, next_power_of_2

NORMS = {"rms": 1, "layer": 2}


@dataclass(frozen=True, eq=False)
class Norm:
    """kind "rms": x / sqrt(mean(x^2) + eps) * gain. kind "layer": (x - mean) / sqrt(var + eps) * gain + shift. gain, shift [K]."""

    kind: str
    gain: Tensor
    shift: Tensor | None
    eps: float

    def reference(self, x: Tensor) -> Tensor:
        """In plain PyTorch and float32."""
        gain, shift = self.gain.float(), None if self.shift is None else self.shift.float()
        if self.kind == "layer":
            return F.layer_norm(x.float(), gain.shape, gain, shift, self.eps)
        made = F.rms_norm(x.float(), gain.shape, gain, self.eps)
        return made if shift is None else made + shift


@triton.jit
def norm_kernel(
    x, branch, gain, shift, total, y, K, WIDTH, eps, KIND: tl.constexpr, ADD: tl.constexpr, SHIFT: tl.constexpr, K2: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """y has WIDTH columns, 0 past K, in order where Q is 0."""
    start = tl.program_id(0).to(tl.int64) * K
    k = tl.arange(0, K2)
    inside = k < K
    values = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(branch + start + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + start + k, values.to(total.dtype.element_ty), mask=inside)
    if KIND == 2:
        values = tl.where(inside, values - tl.sum(values, 0) / K, 0.0)
    if KIND != 0:
        values *= 1.0 / tl.sqrt(tl.sum(values * values, 0) / K + eps)
        values *= tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        values += tl.load(shift + k, mask=inside, other=0.0).to(tl.float32)
    column = k
    if Q != 0:  # (blocks, 4 lanes, Q * 8, 2, 2) in the order of (blocks, Q * 8, 2, 4 lanes, 2)
        lane = k // (Q * 32) % 4
        column = k // (Q * 128) * (Q * 128) + k % (Q * 32) // 4 * 16 + k // 2 % 2 * 8 + lane * 2 + k % 2
    tl.store(y + tl.program_id(0).to(tl.int64) * WIDTH + column, values.to(y.dtype.element_ty), mask=k < WIDTH)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """x [..., K] -> norm(x), of x's dtype."""
    return _run(x, None, norm)[1]


def add_normalize(x: Tensor, branch: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """x, branch [..., K] -> x + branch, and its norm."""
    return _run(x, branch, norm)


def arranged(x: Tensor, norm: Norm | None, q: int) -> Tensor:
    """x [M, K] -> norm(x), [M, K up to a multiple of q * 128]."""
    return _run(x, None, norm, q)[1]


def _run(x: Tensor, branch: Tensor | None, norm: Norm | None, q: int = 0) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    x = x.contiguous()
    width = cdiv(k, q * 128) * q * 128 if q else k
    y = x.new_empty((*x.shape[:-1], width))
    gain, shift, eps, kind = (x, None, 0.0, 0) if norm is None else (norm.gain, norm.shift, norm.eps, NORMS[norm.kind])
    total = x if branch is None else torch.empty_like(x)
    if x.numel():
        config = config_for("norm", x.device, x.numel() // k, k, k)
        launch(
            norm_kernel, (x.numel() // k,), config,
            x, x if branch is None else branch.contiguous(), gain, gain if shift is None else shift, total, y, k, width, eps,
            KIND=kind, ADD=branch is not None, SHIFT=shift is not None, K2=next_power_of_2(width), Q=q,
        )  # fmt: skip
    return total, y


def add_normalize_reference(x: Tensor, branch: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """What `add_normalize` computes, in plain PyTorch and float32."""
    total = x.float() + branch.float()
    return total.to(x.dtype), norm.reference(total).to(x.dtype)
