"""y = act(norm(x) @ w.T + bias) + residual, w packed.

    gemv     M == 1: a program makes a few outputs and reads its rows of w once; the norm of x is computed on the way
    few      M up to 16 or so: likewise on tensor cores, and without shared memory (`few`); RMSNorm is computed on the way
    several  up to a thousand rows or so, on Hopper: weights are widened in registers and multiplied from there (`several`)
    matmul   weights are widened tile by tile and multiplied on tensor cores; where rows and columns alone are too few programs,
             K is split and the parts are added up afterwards. A norm runs before, as a kernel of its own.
    dense    many rows: the weight is widened once, by a kernel bound by memory, and multiplied by cuBLAS

The tuning table says which, by sizes. `gated` is y = act(x @ gate.T) * (x @ up.T), the first half of a SwiGLU or GEGLU MLP, in one
pass over x; the two may differ in width and groups.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lwcompile.backends.triton.kernels.activation import ACTIVATIONS, activate
from lwcompile.backends.triton.kernels.embedding import dequantize
from lwcompile.backends.triton.kernels.few import few_kernel
from lwcompile.backends.triton.kernels.launch import cdiv, config_for, launch, next_power_of_2
from lwcompile.backends.triton.kernels.norm import NORMS, Norm, arranged, normalize
from lwcompile.backends.triton.kernels.packed import Packed, load_grid, load_tile, load_weights, load_words
from lwcompile.backends.triton.kernels.several import several_kernel


@triton.jit
def plane_dot(
    values, words, row, rows, first, CHUNKS, BITS: tl.constexpr, BELOW: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr
):
    """Products of x's chunks [C, 32] with one plane's share of the codes, times 2**-85: float32 [R, C].

    A masked integer read as a float is that integer times 2**-149. So codes are neither shifted down nor converted: their place in
    the word and the 2**-149 go, exactly, into x, once for all the rows.
    """
    made = load_words(words, row, rows, first, CHUNKS, BITS, BELOW, WIDTH, C)
    place = tl.arange(0, 32 // WIDTH)
    bit = place // 2 * WIDTH
    codes = (made >> (place % 2 * 16)[None, None, None, :]) & (((1 << WIDTH) - 1) << bit)[None, None, None, :]
    power = ((127 + 64 + BELOW - bit) << 23).to(tl.float32, bitcast=True)
    scaled = tl.reshape(values, (C, WIDTH, 32 // WIDTH)) * power[None, None, :]
    return tl.sum(tl.reshape(codes.to(tl.float32, bitcast=True) * scaled[None, :, :, :], (row.shape[0], C, 32)), 2)


@triton.jit
def grouped_dot(
    values, words, scale, zero, row, rows, first, K, CHUNKS,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`chunk_dot` where a group holds whole chunks: its zero point meets the sum of x, and its scale the sum of products."""
    HIGH: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else 2)
    REST: tl.constexpr = BITS - HIGH
    factor = tl.reshape(load_grid(scale, row, rows, first, K, GROUP, C), (row.shape[0], C)).to(tl.float32)
    offset = factor * 0 + (1 << (BITS - 1))
    if ZERO != 0:
        offset = tl.reshape(load_grid(zero, row, rows, first, K, GROUP, C), (row.shape[0], C)).to(tl.float32)
    made = plane_dot(values, words, row, rows, first, CHUNKS, BITS, 0, HIGH, C)
    if REST >= 2:
        made += plane_dot(values, words, row, rows, first, CHUNKS, BITS, HIGH, 2, C)
    if REST % 2 == 1:
        made += plane_dot(values, words, row, rows, first, CHUNKS, BITS, BITS - 1, 1, C)
    return (made * 38685626227668133590597632.0 - offset * tl.sum(values, 1)[None, :]) * factor


@triton.jit
def chunk_dot(
    values, words, scale, zero, row, rows, first, K, CHUNKS,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Products of x's chunks [C, 32] with rows [R] of a weight: float32 [R, C]."""
    if GROUP % 32 == 0:
        return grouped_dot(values, words, scale, zero, row, rows, first, K, CHUNKS, BITS, GROUP, ZERO, C)
    else:
        weights = load_weights(words, scale, zero, row, rows, first, K, CHUNKS, BITS, GROUP, ZERO, C)
        return tl.sum(weights * values[None, :, :], 2)


@triton.jit
def gemv_kernel(
    x, words, scale, zero, words2, scale2, zero2, bias, residual, gain, shift, y, N, K, CHUNKS, eps,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BITS2: tl.constexpr, GROUP2: tl.constexpr, ZERO2: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr, ACT: tl.constexpr,
    K2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    for start in tl.range(0, CHUNKS, BLOCK_C, num_stages=STAGES):  # said here, loads are pipelined in loops without tl.dot too
        k = start * 32 + tl.arange(0, BLOCK_C * 32)
        values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM != 0:
            values = (values - mean) * rstd * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
            if SHIFT:
                values += tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
        values = tl.reshape(values, (BLOCK_C, 32))
        first += chunk_dot(values, words, scale, zero, row, N, start, K, CHUNKS, BITS, GROUP, ZERO, BLOCK_C)
        if GATED:
            second += chunk_dot(values, words2, scale2, zero2, row, N, start, K, CHUNKS, BITS2, GROUP2, ZERO2, BLOCK_C)
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
def matmul_kernel(
    x, words, scale, zero, words2, scale2, zero2, bias, residual, y, M, N, K, CHUNKS, SPLIT_K,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BITS2: tl.constexpr, GROUP2: tl.constexpr, ZERO2: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    dtype: tl.constexpr = x.dtype.element_ty
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(part * BLOCK_C, CHUNKS, SPLIT_K * BLOCK_C):
        k = start * 32 + tl.arange(0, BLOCK_C * 32)
        inside = (m < M)[:, None] & (k < K)[None, :]
        values = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
        weights = load_tile(words, scale, zero, row, N, start, K, CHUNKS, BITS, GROUP, ZERO, BLOCK_C, dtype)
        first = tl.dot(values, tl.trans(weights), first, input_precision="ieee")
        if GATED:
            weights = load_tile(words2, scale2, zero2, row, N, start, K, CHUNKS, BITS2, GROUP2, ZERO2, BLOCK_C, dtype)
            second = tl.dot(values, tl.trans(weights), second, input_precision="ieee")
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


@triton.jit
def finish_kernel(
    parts, parts2, bias, residual, y, N, SIZE, ROW, SPLIT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts: SPLIT of them, SIZE apart, of rows ROW apart."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        at = tl.cast(part, tl.int64) * SIZE + m * ROW + n
        first += tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            second += tl.load(parts2 + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        first += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    first = activate(first, ACT)
    if GATED:
        first *= second
    if RESIDUAL:
        first += tl.load(residual + m * N + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, first.to(y.dtype.element_ty), mask=inside)


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
    ends = {
        "GATED": second is not None, "BIAS": bias is not None, "RESIDUAL": residual is not None, "ACT": ACTIVATIONS[activation],
    }  # fmt: skip
    other = first if second is None else second
    constants = {**_format(first), **_format(other, "2"), **ends}
    config = config_for("gated" if second is not None else "gemv" if m == 1 else "matmul", x.device, m, n, k, first.bits)
    if "WARPS" in config and x.is_cuda and (x.element_size() > 2 or first.group % 32 or other.group % 32):
        config = {"DENSE": 1}  # those tensor cores take halves, and registers hold no scale for each weight
    if "STAGES" in config:
        gain, shift, eps, kind = (norm.gain, norm.shift, norm.eps, NORMS[norm.kind]) if norm is not None else (None, None, 0.0, 0)
        args = (flat, *first.pointers, *other.pointers, *_or(x, bias, residual, gain, shift), y, n, k, first.chunks, eps)
        constants |= {"NORM": kind, "SHIFT": shift is not None, "K2": next_power_of_2(k) if kind else 1}
        launch(gemv_kernel, (cdiv(n, config["BLOCK_N"]),), config, *args, **constants)
        return y
    if "PARTS" in config:
        if norm is not None and (norm.kind != "rms" or flat.dtype == torch.float16):  # x * gain may pass float16's largest number
            flat, norm = normalize(flat, norm), None
        gain, eps = (flat, 0.0) if norm is None else (norm.gain, norm.eps)
        args = (flat, *first.pointers, *other.pointers, *_or(x, bias, residual), gain, y, m, n, k, first.chunks, eps)
        grid = (cdiv(n, config["BLOCK_N"]), cdiv(m, config["BLOCK_M"]))
        launch(few_kernel, grid, config, *args, **constants, NORM=norm is not None)
        return y
    if "WARPS" in config:
        flat, norm = arranged(flat, norm, config["Q"]), None
    if norm is not None:
        flat = normalize(flat, norm)
    if "DENSE" in config:
        return _dense(flat, first, second, bias, activation, residual, y)
    if config["SPLIT_K"] > 1:
        parts = _parts(flat, first, config)
        _finish(
            parts, parts if second is None else _parts(flat, second, config), bias, activation, residual, y, second is not None
        )
        return y
    _tiles(flat, first, other, (bias, residual), y, config, constants)
    return y


def _tiles(
    flat: Tensor, first: Packed, other: Packed, ends: tuple[Tensor | None, ...], y: Tensor, config: dict[str, int],
    constants: dict[str, int],
) -> None:  # fmt: skip
    """Launch what multiplies by tiles, y [M, N] or [SPLIT_K, M, N]."""
    m, n = len(flat), first.rows
    args = (flat, *first.pointers, *other.pointers, *_or(flat, *ends), y, m, n, first.in_features, first.chunks)
    split = config["SPLIT_K"]
    config = {name: value for name, value in config.items() if name != "SPLIT_K"}
    if "WARPS" in config:
        grid = (cdiv(n, 16 * config["WARPS"]), cdiv(m, config["BLOCK_M"]), split)
        launch(several_kernel, grid, config, *args, flat.shape[1], split, **constants)
    else:
        launch(matmul_kernel, (cdiv(m, config["BLOCK_M"]), cdiv(n, config["BLOCK_N"]), split), config, *args, split, **constants)


def _dense(
    flat: Tensor, first: Packed, second: Packed | None, bias: Tensor | None, activation: str | None, residual: Tensor | None, y: Tensor
) -> Tensor:  # fmt: skip
    """By cuBLAS, once the weight is widened; a gate and its partner in one product."""
    n, k = first.rows, first.in_features
    weights = (first,) if second is None else (first, second)
    wide = flat.new_empty((n * len(weights), k))
    for i, weight in enumerate(weights):
        dequantize(weight, flat.dtype, wide[i * n : (i + 1) * n])
    ends = [end if end.ndim == 1 else end.view(-1, n) for end in (bias, residual) if end is not None]
    if second is not None or activation is not None or len(ends) > 1 or any(end.dtype != flat.dtype for end in ends):
        made = flat @ wide.T
        _finish(made[:, :n], made[:, -n:], bias, activation, residual, y, second is not None)
    elif ends:
        torch.addmm(ends[0], flat, wide.T, out=y.view(-1, n))
    else:
        torch.mm(flat, wide.T, out=y.view(-1, n))
    return y


def _finish(
    parts: Tensor, parts2: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None, y: Tensor, gated: bool
) -> None:
    """parts, parts2 [M, N] or, to be added up, [SPLIT, M, N], of rows of unit stride."""
    n = parts.shape[-1]
    residual, y = (None if t is None else t.view(-1, t.shape[-1]) for t in (residual, y))  # type: ignore[assignment]
    config = config_for("finish", parts.device, len(y), n, n)
    launch(
        finish_kernel, (len(y), cdiv(n, config["BLOCK"])), config, parts, parts2, *_or(parts, bias, residual), y, n,
        parts.stride(0), parts.stride(-2), SPLIT=len(parts) if parts.ndim == 3 else 1, GATED=gated,
        BIAS=bias is not None, RESIDUAL=residual is not None, ACT=ACTIVATIONS[activation],
    )  # fmt: skip


def _parts(flat: Tensor, weight: Packed, config: dict[str, int]) -> Tensor:
    """flat [M, K] @ weight.T, [SPLIT_K, M, N] in float32."""
    parts = flat.new_empty((config["SPLIT_K"], len(flat), weight.rows), dtype=torch.float32)
    constants = {**_format(weight), **_format(weight, "2"), "GATED": False, "BIAS": False, "RESIDUAL": False, "ACT": 0}
    _tiles(flat, weight, weight, (None, None), parts, config, constants)
    return parts


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
