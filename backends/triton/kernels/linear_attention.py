"""Softmax attention inside a window and linear attention outside it, under one normaliser (LoLCATs, arXiv 2410.10254).

    y_i = (s sum_near exp(q_i k_j * scale - m_i) v_j + sum_far f(q_i) f(k_j) v_j) / (the same sums without v_j)
    f(x) = [softmax(x @ maps), softmax(-x @ maps)], at least 1e-12        (Hedgehog's feature map, arXiv 2402.04347)

    near: 0 <= i - j < window    far: i - j >= window    m_i: the largest score in the window    s = sigmoid(gate), per head

The S queries are the last of the L positions. What is far from all of a chunk of queries is read as one state, the sum of
f(k_j) [v_j, 1]; what is far from some of them only, by pairs (chunked linear attention, arXiv 2312.06635). So a sequence takes three
steps: features, the state before each chunk, sums. With one query, or so few keys that no chunk leaves any behind, the state that
came is the only one: this is the recurrent step, and its programs read no more than the window and that state.

Features and states are float32 throughout. Where values are of half precision, they are multiplied in tf32: it keeps 11 bits, as
float16 does, and unlike it holds a feature of 1e-12. Tensor cores cut what does not fit (sm_80 and later do), which would make sums
smaller than their normaliser: so it is rounded away before.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwcompile.backends.triton.kernels.launch import cdiv, config_for, launch, next_power_of_2


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """x with the bits that a product of this precision takes."""
    if PRECISION == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def feature_kernel(
    x, maps, y, heads, length, x_batch, x_head, x_row,
    WIDTH: tl.constexpr, HALF: tl.constexpr, HALF2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y [B, H, S, 2 HALF] of x [B, H, S, WIDTH] and maps [H, WIDTH, HALF]."""
    head = tl.program_id(1)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    f = tl.arange(0, HALF2)
    x_at = (head // heads).to(tl.int64) * x_batch + head % heads * x_head + s[:, None] * x_row
    mapped = tl.zeros((BLOCK_S, HALF2), tl.float32)
    for d0 in range(0, WIDTH, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        part = tl.load(x + x_at + d[None, :], mask=(s < length)[:, None] & (d < WIDTH)[None, :], other=0.0)
        at = (head % heads * WIDTH + d[:, None]) * HALF + f[None, :]
        weight = tl.load(maps + at, mask=(d < WIDTH)[:, None] & (f < HALF)[None, :], other=0.0)
        mapped = tl.dot(part.to(tl.float32), weight.to(tl.float32), mapped, input_precision=PRECISION)
    at = (head.to(tl.int64) * length + s[:, None]) * (2 * HALF) + f[None, :]
    inside = (f < HALF)[None, :]
    for sign in tl.static_range(2):
        signed = tl.where(inside, mapped if sign == 0 else -mapped, -1.0e30)
        weights = tl.exp(signed - tl.max(signed, 1)[:, None])
        found = tl.maximum(weights / tl.sum(weights, 1)[:, None], 1.0e-12)
        tl.store(y + at + sign * HALF, rounded(found, PRECISION), mask=(s < length)[:, None] & inside)


@triton.jit(do_not_specialize=["rows", "gone", "chunks"])
def state_kernel(
    v, padding, mapped_k, state, states, groups, rows, gone, chunks, v_batch, v_head, v_row, padding_row,
    FEATURES: tl.constexpr, VALUE: tl.constexpr, PADDED: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """states [B, G, chunks, FEATURES, VALUE + 1], the c-th with the first gone + c * CHUNK keys; mapped_k [B, G, rows, FEATURES]."""
    head = tl.program_id(2).to(tl.int64)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    e = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    SIZE: tl.constexpr = FEATURES * (VALUE + 1)
    at = f[:, None] * (VALUE + 1) + e[None, :]
    one_at = f * (VALUE + 1) + VALUE
    inside = (f < FEATURES)[:, None] & (e < VALUE)[None, :]
    made = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_F,), tl.float32)
    if STATE:
        made += tl.load(state + head * SIZE + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(state + head * SIZE + one_at, mask=f < FEATURES, other=0.0).to(tl.float32)
    start = 0
    for chunk in range(chunks):
        end = tl.maximum(0, gone + chunk * CHUNK)
        for t0 in range(start, end, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            k_at = (head * rows + t[None, :]) * FEATURES + f[:, None]
            mapped = tl.load(mapped_k + k_at, mask=(f < FEATURES)[:, None] & (t < end)[None, :], other=0.0)
            if PADDED:
                is_open = tl.load(padding + head // groups * padding_row + t, mask=t < end, other=0) != 0
                mapped = tl.where(is_open[None, :], mapped, 0.0)
            v_at = head // groups * v_batch + head % groups * v_head + t[:, None] * v_row + e[None, :]
            value = tl.load(v + v_at, mask=(t < end)[:, None] & (e < VALUE)[None, :], other=0.0).to(tl.float32)
            made = tl.dot(mapped, value, made, input_precision=PRECISION)
            total += tl.sum(mapped, 1)
        start = end
        to = states + (head * chunks + chunk) * SIZE
        tl.store(to + at, made, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(to + one_at, total, mask=f < FEATURES)


@triton.jit(do_not_specialize=["rows", "gone", "chunks"])
def hybrid_kernel(
    q, k, v, padding, mapped_q, mapped_k, states, gate, y, factor, heads, times, queries, keys, rows, gone, chunks,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, padding_row, window,
    WIDTH: tl.constexpr, WIDTH2: tl.constexpr, VALUE: tl.constexpr, FEATURES: tl.constexpr,
    PADDED: tl.constexpr, STATE: tl.constexpr, PACK: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """PACK: heads of a query that are rows of one tile. gone, chunks, rows: as in `state_kernel`."""
    SPAN: tl.constexpr = BLOCK_S // PACK
    packs = heads // PACK
    batch = (tl.program_id(1) // packs).to(tl.int64)
    pack = tl.program_id(1) % packs
    group = pack * PACK // times
    row = tl.arange(0, BLOCK_S)
    mine = pack * PACK + row % PACK
    first = tl.program_id(0) * SPAN
    s = first + row // PACK
    real = (s < queries) & (row < SPAN * PACK)
    place = s + keys - queries
    end = tl.minimum(first + SPAN, queries) + keys - queries
    d = tl.arange(0, WIDTH2)
    e = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    v_base = v + batch * v_batch + group * v_head + e[None, :]
    d_at = batch * q_batch + mine[:, None] * q_head + s[:, None] * q_row + d[None, :]
    query = tl.load(q + d_at, mask=real[:, None] & (d < WIDTH)[None, :], other=0.0)
    top = tl.full((BLOCK_S,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    made = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
    start = tl.maximum(0, first + keys - queries - window + 1) // BLOCK_T * BLOCK_T
    for t0 in range(start, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        k_at = batch * k_batch + group * k_head + t[None, :] * k_row + d[:, None]
        key = tl.load(k + k_at, mask=(t < end)[None, :] & (d < WIDTH)[:, None], other=0.0)
        distance = place[:, None] - t[None, :]
        is_open = (distance >= 0) & (distance < window) & real[:, None]
        if PADDED:
            is_open &= (tl.load(padding + batch * padding_row + t, mask=t < end, other=0) != 0)[None, :]
        scores = tl.dot(query, key, input_precision="ieee") * factor
        scores = tl.where(is_open, scores, -1.0e30)
        highest = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(is_open, tl.exp(scores - highest[:, None]), 0.0)
        keep = tl.exp(top - highest)
        value = tl.load(v_base + t[:, None] * v_row, mask=(t < end)[:, None] & (e < VALUE)[None, :], other=0.0)
        made = made * keep[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * keep + tl.sum(weights, 1)
        top = highest
    # What is near is done, so that what is far needs no sums of its own.
    near = tl.sigmoid(tl.load(gate + mine, mask=real, other=0.0).to(tl.float32))
    made *= near[:, None]
    total *= near
    q_at = ((batch * heads + mine) * queries + s)[:, None] * FEATURES
    chunk = first // CHUNK
    if STATE:
        base = states + ((batch * (heads // times) + group) * chunks + tl.minimum(chunk, chunks - 1)) * (FEATURES * (VALUE + 1))
        for f0 in range(0, FEATURES, BLOCK_F):
            f = f0 + tl.arange(0, BLOCK_F)
            mapped = tl.load(mapped_q + q_at + f[None, :], mask=real[:, None] & (f < FEATURES)[None, :], other=0.0)
            state_at = f[:, None] * (VALUE + 1) + e[None, :]
            held = tl.load(base + state_at, mask=(f < FEATURES)[:, None] & (e < VALUE)[None, :], other=0.0).to(tl.float32)
            one = tl.load(base + f * (VALUE + 1) + VALUE, mask=f < FEATURES, other=0.0).to(tl.float32)
            made = tl.dot(mapped, rounded(held, PRECISION), made, input_precision=PRECISION)
            total += tl.sum(mapped * one[None, :], 1)
    for t0 in range(tl.maximum(0, gone + chunk * CHUNK), end - window, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        is_open = (place[:, None] - t[None, :] >= window) & real[:, None]
        if PADDED:
            is_open &= (tl.load(padding + batch * padding_row + t, mask=t < end, other=0) != 0)[None, :]
        weights = tl.zeros((BLOCK_S, BLOCK_T), tl.float32)
        k_at = ((batch * (heads // times) + group) * rows + t)[None, :] * FEATURES
        for f0 in range(0, FEATURES, BLOCK_F):
            f = f0 + tl.arange(0, BLOCK_F)
            mapped = tl.load(mapped_q + q_at + f[None, :], mask=real[:, None] & (f < FEATURES)[None, :], other=0.0)
            other = tl.load(mapped_k + k_at + f[:, None], mask=(f < FEATURES)[:, None] & (t < rows)[None, :], other=0.0)
            weights = tl.dot(mapped, other, weights, input_precision=PRECISION)
        weights = rounded(tl.where(is_open, weights, 0.0), PRECISION)
        value = tl.load(v_base + t[:, None] * v_row, mask=(t < end)[:, None] & (e < VALUE)[None, :], other=0.0)
        made = tl.dot(weights, value.to(tl.float32), made, input_precision=PRECISION)
        total += tl.sum(weights, 1)
    made = made / tl.where(total > 0, total, 1.0)[:, None]
    at = ((batch * queries + s) * heads + mine)[:, None] * VALUE + e[None, :]
    tl.store(y + at, made.to(y.dtype.element_ty), mask=real[:, None] & (e < VALUE)[None, :])


def hybrid_attention(
    query: Tensor, key: Tensor, value: Tensor, open: Tensor | None, state: Tensor | None, map_query: Tensor, map_key: Tensor,
    gate: Tensor, window: int, scale: float,
) -> Tensor:  # fmt: skip
    """Causal attention [B, H, S, v] of the last S of L positions, of the value's dtype, laid out as [B, S, H, v].

    query: [B, H, S, d]. key: [B, G, L, d]. value: [B, G, L, v]. H a multiple of G.
    open: bool [B, L], False where a key is padding.
    state: [B, G, 2 f, v + 1], what lies before the L keys; all of it is `window` or more away from every query.
    map_query: [H, d, f]. map_key: [G, d, f]. gate: [H], a logit. window: at least 2. scale: of scores.
    """
    (batch, heads, queries, width), (groups, keys), value_width = query.shape, key.shape[1:3], value.shape[3]
    y = torch.empty((batch, queries, heads, value_width), dtype=value.dtype, device=query.device).transpose(1, 2)
    if not y.numel():
        return y
    query, key = (t.to(value.dtype) for t in (query, key))
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    open = None if open is None else open.contiguous().view(torch.uint8)
    config = config_for("hybrid", query.device, queries, max(width, value_width), keys)
    times, features = heads // groups, 2 * map_key.shape[2]
    pack = times if times * queries <= config["BLOCK_S"] else 1
    blocks, chunks = cdiv(queries, config["BLOCK_S"] // pack), cdiv(queries, config["CHUNK"])
    rows, gone = max(0, keys - window), keys - queries - window + 1
    mapped_query, mapped_key = _features(query, map_query), _features(key[:, :, :rows], map_key)
    if gone + (chunks - 1) * config["CHUNK"] > 0:
        state = _states(mapped_key, value, open, state, gone, chunks, config["CHUNK"])
    else:
        state, chunks = None if state is None else state.contiguous(), 1
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], 0 if open is None else open.stride(0))
    args = (
        query, key, value, query if open is None else open, mapped_query, mapped_key, mapped_query if state is None else state,
        gate.contiguous(), y, scale, heads, times, queries, keys, rows, gone, chunks, *strides, window,
    )  # fmt: skip
    launch(
        hybrid_kernel, (blocks, batch * heads // pack, cdiv(value_width, config["BLOCK_V"])), config, *args,
        WIDTH=width, WIDTH2=max(16, next_power_of_2(width)), VALUE=value_width, FEATURES=features,
        PADDED=open is not None, STATE=state is not None, PACK=pack, PRECISION=_precision(value),
    )  # fmt: skip
    return y


def absorb_keys(key: Tensor, value: Tensor, open: Tensor | None, state: Tensor | None, map_key: Tensor, window: int) -> Tensor:
    """The state [B, G, 2 f, v + 1] once all but the last `window - 1` of these L keys have left the window.

    It is float32 whatever the values are: in bfloat16, 256 keys are a sum that one more does not change.
    """
    rows = max(0, key.shape[2] - window + 1)
    if not rows and state is not None:
        return state.to(torch.float32, copy=True)
    value = value if value.stride(-1) == 1 else value.contiguous()
    open = None if open is None else open.contiguous().view(torch.uint8)
    return _states(_features(key[:, :, :rows], map_key), value, open, state, rows, 1, 16)[:, :, 0]


def _features(x: Tensor, maps: Tensor) -> Tensor:
    """Feature maps of each head: x [B, H, S, d], maps [H, d, f] -> float32 [B, H, S, 2 f]."""
    batch, heads, length, width = x.shape
    half = maps.shape[2]
    y = torch.empty((batch, heads, length, 2 * half), dtype=torch.float32, device=x.device)
    if y.numel():
        x = x if x.stride(-1) == 1 else x.contiguous()
        config = config_for("features", x.device, length, half, width)
        launch(
            feature_kernel, (cdiv(length, config["BLOCK_S"]), batch * heads), config,
            x, maps.contiguous(), y, heads, length, *x.stride()[:3],
            WIDTH=width, HALF=half, HALF2=max(16, next_power_of_2(half)), PRECISION=_precision(x),
        )  # fmt: skip
    return y


def _states(
    mapped: Tensor, value: Tensor, open: Tensor | None, state: Tensor | None, gone: int, chunks: int, chunk: int
) -> Tensor:
    """float32 [B, G, chunks, 2 f, v + 1]: what comes before each chunk, the c-th with the first `gone` + c * `chunk` keys."""
    (batch, groups, rows, features), width = mapped.shape, value.shape[3]
    states = torch.empty((batch, groups, chunks, features, width + 1), dtype=torch.float32, device=value.device)
    config = config_for("state", value.device, rows, width, features)
    args = (
        value, value if open is None else open, mapped, mapped if state is None else state.contiguous(), states,
        groups, rows, gone, chunks, *value.stride()[:3], 0 if open is None else open.stride(0),
    )  # fmt: skip
    launch(
        state_kernel, (cdiv(features, config["BLOCK_F"]), cdiv(width, config["BLOCK_V"]), batch * groups), config, *args,
        FEATURES=features, VALUE=width, PADDED=open is not None, STATE=state is not None, CHUNK=chunk, PRECISION=_precision(value),
    )  # fmt: skip
    return states


def _precision(x: Tensor) -> str:
    """How float32 is multiplied next to tensors of this dtype."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
