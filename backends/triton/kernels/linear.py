"""y = act(norm(x) @ w.T + bias) + residual, w packed.

    M == 1   `gemv`: a program makes a few outputs and reads its rows of w once; the norm of x is computed on the way
    M > 1    `matmul`: weights are widened tile by tile and multiplied on tensor cores; where rows and columns alone are too few
             programs, K is split and the parts are added up afterwards. A norm runs before, as a kernel of its own.

`gated` is y = act(x @ gate.T) * (x @ up.T), the first half of a SwiGLU or GEGLU MLP, in one pass over x; the two may differ in
width and groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lwcompile.backends.triton.kernels.launch import config_for, launch
from lwcompile.backends.triton.kernels.norm import NORMS, Norm, normalize
from lwcompile.backends.triton.kernels.packed import Packed, load_weights

ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}


@triton.jit
def activate(y, ACT: tl.constexpr):
    if ACT == 1:
        y = y / (1.0 + tl.exp(-y))
    elif ACT == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACT == 3:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y / (1.0 + tl.exp(-2.0 * inner))
    elif ACT == 4:
        y = tl.maximum(y, 0.0)
    return y


@triton.jit
def chunk_dot(
    values, words, scale, zero, row, rows, chunk, K, CHUNKS, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr
):
    """Products of x's chunks [C, 32] with rows [R] of a weight: float32 [R, C]."""
    codes, factor = load_weights(words, scale, zero, row, rows, chunk, K, CHUNKS, BITS, GROUP, ZERO)
    if GROUP % 32 == 0:
        return tl.sum(codes * values[None, :, :], 2) * tl.reshape(factor, (row.shape[0], chunk.shape[0]))
    return tl.sum(codes * factor * values[None, :, :], 2)


@triton.jit
def gemv_kernel(
    x, words, scale, zero, words2, scale2, zero2, bias, residual, gain, shift, y, N, K, CHUNKS, eps,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BITS2: tl.constexpr, GROUP2: tl.constexpr, ZERO2: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr, ACT: tl.constexpr,
    K2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 32)
    mean = 0.0
    rstd = 1.0
    if NORM != 0:
        column = tl.arange(0, K2)
        whole = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
        if NORM == 2:
            mean = tl.sum(whole, 0) / K
            whole = tl.where(column < K, whole - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(whole * whole, 0) / K + eps)
    first = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, CHUNKS, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        k = chunk[:, None] * 32 + lane[None, :]
        values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM != 0:
            values = (values - mean) * rstd * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
            if SHIFT:
                values += tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
        first += chunk_dot(values, words, scale, zero, row, N, chunk, K, CHUNKS, BITS, GROUP, ZERO)
        if GATED:
            second += chunk_dot(values, words2, scale2, zero2, row, N, chunk, K, CHUNKS, BITS2, GROUP2, ZERO2)
    total = tl.sum(first, 1)
    if BIAS:
        total += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    total = activate(total, ACT)
    if GATED:
        total *= tl.sum(second, 1)
    if RESIDUAL:
        total += tl.load(residual + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(y + row, total.to(y.dtype.element_ty), mask=row < N)


@triton.jit
def tile(
    words,
    scale,
    zero,
    row,
    rows,
    chunk,
    K,
    CHUNKS,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    dtype: tl.constexpr,
):
    """A tile of weights as a product wants it: [C * 32, R] of x's dtype."""
    codes, factor = load_weights(words, scale, zero, row, rows, chunk, K, CHUNKS, BITS, GROUP, ZERO)
    return tl.trans(tl.reshape((codes * factor).to(dtype), (row.shape[0], chunk.shape[0] * 32)))


@triton.jit
def matmul_kernel(
    x, words, scale, zero, words2, scale2, zero2, bias, residual, y, M, N, K, CHUNKS,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BITS2: tl.constexpr, GROUP2: tl.constexpr, ZERO2: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(part * BLOCK_C, CHUNKS, SPLIT_K * BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        k = start * 32 + tl.arange(0, BLOCK_C * 32)
        inside = (m < M)[:, None] & (k < K)[None, :]
        values = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
        weights = tile(words, scale, zero, row, N, chunk, K, CHUNKS, BITS, GROUP, ZERO, dtype)
        first = tl.dot(values, weights, first, input_precision="ieee")
        if GATED:
            weights = tile(words2, scale2, zero2, row, N, chunk, K, CHUNKS, BITS2, GROUP2, ZERO2, dtype)
            second = tl.dot(values, weights, second, input_precision="ieee")
    inside = (m < M)[:, None] & (row < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + row[None, :]
    if BIAS:
        first += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[None, :]
    first = activate(first, ACT)
    if GATED:
        first *= second
    if RESIDUAL:
        first += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + part.to(tl.int64) * M * N + at, first.to(y.dtype.element_ty), mask=inside)


# --- calling them


def linear(
    x: Tensor, weight: Packed, bias: Tensor | None = None, *,
    norm: Norm | None = None, activation: str | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K] -> act(norm(x) @ weight.T + bias) + residual, [..., N] of x's dtype; bias [N], residual [..., N]."""
    return _run(x, weight, None, bias, norm, activation, residual)


def gated(
    x: Tensor, gate: Packed, up: Packed, activation: str, *, norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """x [..., K] -> act(norm(x) @ gate.T) * (norm(x) @ up.T), [..., N] of x's dtype."""
    return _run(x, gate, up, None, norm, activation, residual)


def _run(
    x: Tensor, first: Packed, second: Packed | None, bias: Tensor | None, norm: Norm | None, activation: str | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    flat = x.reshape(-1, first.in_features).contiguous()
    (m, k), n = flat.shape, first.rows
    y = x.new_empty((*x.shape[:-1], n))
    if m == 0:
        return y
    if residual is not None:
        residual = residual.expand(y.shape).contiguous()
    constants = {
        **_format(first), **_format(first if second is None else second, "2"), "GATED": second is not None,
        "BIAS": bias is not None, "RESIDUAL": residual is not None, "ACT": ACTIVATIONS[activation],
    }  # fmt: skip
    weights = (*first.pointers, *(first if second is None else second).pointers)
    if m == 1:
        config = config_for("gemv", x.device, m, n, k, first.bits)
        gain, shift, eps, kind = (norm.gain, norm.shift, norm.eps, NORMS[norm.kind]) if norm is not None else (None, None, 0.0, 0)
        args = (flat, *weights, *_or(x, bias, residual, gain, shift), y, n, k, first.chunks, eps)
        constants |= {"NORM": kind, "SHIFT": shift is not None, "K2": triton.next_power_of_2(k)}
        launch(gemv_kernel, (triton.cdiv(n, config["BLOCK_N"]),), config, *args, **constants)
        return y
    if norm is not None:
        flat = normalize(flat, norm)
    config = config_for("matmul" if second is None else "gated", x.device, m, n, k, first.bits)
    if config["SPLIT_K"] > 1:
        total = finish(
            _split(flat, first, config), bias, activation, None if second is None else _split(flat, second, config)
        ).view(y.shape)
        return (total if residual is None else total + residual).to(x.dtype)
    args = (flat, *weights, *_or(x, bias, residual), y, m, n, k, first.chunks)
    launch(matmul_kernel, _grid(m, n, config), config, *args, **constants)
    return y


def _split(flat: Tensor, weight: Packed, config: dict[str, int]) -> Tensor:
    """flat [M, K] @ weight.T in parts along K, added up in a fixed order: float32 [M, N]."""
    (m, k), n = flat.shape, weight.rows
    parts = torch.empty((config["SPLIT_K"], m, n), dtype=torch.float32, device=flat.device)
    args = (flat, *weight.pointers, *weight.pointers, flat, flat, parts, m, n, k, weight.chunks)
    constants = {**_format(weight), **_format(weight, "2"), "GATED": False, "BIAS": False, "RESIDUAL": False, "ACT": 0}
    launch(matmul_kernel, _grid(m, n, config), config, *args, **constants)
    return parts.sum(0)


def _grid(m: int, n: int, config: dict[str, int]) -> tuple[int, int, int]:
    return triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_N"]), config["SPLIT_K"]


def _format(weight: Packed, which: str = "") -> dict[str, int]:
    return {f"BITS{which}": weight.bits, f"GROUP{which}": weight.group, f"ZERO{which}": weight.kind}


def _or(stand_in: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
    """Kernels take a pointer for what is absent too, and do not read it."""
    return tuple(stand_in if tensor is None else tensor for tensor in given)


# --- references


def finish(total: Tensor, bias: Tensor | None, activation: str | None, factor: Tensor | None = None) -> Tensor:
    """Bias, activation and gate of a float32 sum, in plain PyTorch."""
    if bias is not None:
        total = total + bias.float()
    if activation == "gelu_tanh":
        total = F.gelu(total, approximate="tanh")
    elif activation is not None:
        total = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[activation](total)
    return total if factor is None else total * factor


def linear_reference(
    x: Tensor, weight: Packed, bias: Tensor | None = None, *,
    norm: Norm | None = None, activation: str | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `linear` computes, in plain PyTorch and float32."""
    given = x.float() if norm is None else norm.reference(x)
    total = finish(given @ weight.dequantize().T, bias, activation)
    return (total if residual is None else total + residual.float()).to(x.dtype)


def gated_reference(
    x: Tensor, gate: Packed, up: Packed, activation: str, *, norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """What `gated` computes, in plain PyTorch and float32."""
    given = x.float() if norm is None else norm.reference(x)
    total = finish(given @ gate.dequantize().T, None, activation, given @ up.dequantize().T)
    return (total if residual is None else total + residual.float()).to(x.dtype)
