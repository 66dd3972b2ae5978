"""Attention under a rule instead of a mask, in one pass over the keys (FlashAttention's running softmax, arXiv 2205.14135).

    y = softmax(scale * q @ k.T + open) @ v,   key j open to query i iff  j <= i + T - S  (causal),
        |i + T - S - j| < window  (window)  or  j < first[b] + sinks  (sinks),  and padding[b, j] != 0  (padding)

first[b] is the first position that is no padding. Where nothing is causal, the sinks also read all, as global tokens do.
The S queries are the last of the T positions, so one kernel serves prefill (T = S) and decoding; in a cache with room for more, T is
read on the device, so that a CUDA graph of the call holds for every T. Keys beyond the rule are never read, but for those that share
a block with others. Several query heads read one key head (grouped queries). A query to which nothing is open gets zeros.

Few queries are few programs. Where the table says how many there should be (PROGRAMS), the query heads of a key head are rows of one
tile, and keys are split between programs, each with a softmax of its own; what they found is added up afterwards (FlashDecoding).
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lwcompile.backends.triton.kernels.launch import cdiv, config_for, launch, next_power_of_2


@triton.jit
def attention_kernel(
    q, k, v, padding, places, ends, y, tops, totals, factor, heads, times, queries, keys, parts,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, padding_row, window, sinks,
    WIDTH: tl.constexpr, WIDTH2: tl.constexpr, VALUE: tl.constexpr, VALUE2: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, PADDED: tl.constexpr, PLACED: tl.constexpr,
    PACK: tl.constexpr, PARTED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """PACK: heads of a query that are rows of one tile. ends: int32 [batch], the position behind the sinks of each."""
    if PLACED:
        keys = tl.load(places + queries - 1).to(tl.int32) + 1
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
    d = tl.arange(0, WIDTH2)
    e = tl.arange(0, VALUE2)
    at = batch * q_batch + mine[:, None] * q_head + s[:, None] * q_row + d[None, :]
    query = tl.load(q + at, mask=real[:, None] & (d < WIDTH)[None, :], other=0.0)
    top = tl.full((BLOCK_S,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    made = tl.zeros((BLOCK_S, VALUE2), tl.float32)
    start = 0
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + SPAN + keys - queries)
    if WINDOW:
        start = tl.maximum(0, first + keys - queries - window + 1) // BLOCK_T * BLOCK_T
        if not CAUSAL:
            end = tl.minimum(keys, first + SPAN + keys - queries + window - 1)
    before = 0  # blocks of sinks, ahead of those from `start` on
    if SINKS:
        sunk = tl.load(ends + batch)
        lowest = (sunk - sinks) // BLOCK_T
        if not CAUSAL:
            reads_all = first + keys - queries < sunk
            start = tl.where(reads_all, 0, start)
            end = tl.where(reads_all, keys, end)
        before = tl.maximum(0, tl.minimum(tl.cdiv(sunk, BLOCK_T), start // BLOCK_T) - lowest)
    low = 0
    high = before + tl.cdiv(tl.maximum(end - start, 0), BLOCK_T)
    if PARTED:
        share = tl.cdiv(high, parts)
        low = tl.program_id(2) * share
        high = tl.minimum(high, low + share)
    for block in range(low, high):
        t0 = start + (block - before) * BLOCK_T
        if SINKS:
            t0 = tl.where(block < before, (lowest + block) * BLOCK_T, t0)
        t = t0 + tl.arange(0, BLOCK_T)
        k_at = batch * k_batch + group * k_head + t[None, :] * k_row + d[:, None]
        key = tl.load(k + k_at, mask=(t < keys)[None, :] & (d < WIDTH)[:, None], other=0.0)
        is_open = (t < keys)[None, :] & real[:, None]
        if CAUSAL:
            is_open &= t[None, :] <= place[:, None]
        if WINDOW:
            near = tl.abs(place[:, None] - t[None, :]) < window
            if SINKS:
                near |= (t < sunk)[None, :]
                if not CAUSAL:
                    near |= (place < sunk)[:, None]
            is_open &= near
        if PADDED:
            is_open &= (tl.load(padding + batch * padding_row + t, mask=t < keys, other=0) != 0)[None, :]
        scores = tl.dot(query, key, input_precision="ieee") * factor
        scores = tl.where(is_open, scores, -1.0e30)
        highest = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(is_open, tl.exp(scores - highest[:, None]), 0.0)
        keep = tl.exp(top - highest)
        v_at = batch * v_batch + group * v_head + t[:, None] * v_row + e[None, :]
        value = tl.load(v + v_at, mask=(t < keys)[:, None] & (e < VALUE)[None, :], other=0.0)
        made = made * keep[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * keep + tl.sum(weights, 1)
        top = highest
    at = (batch * queries + s) * heads + mine
    if PARTED:
        at = at * parts + tl.program_id(2)
        tl.store(tops + at, top, mask=real)
        tl.store(totals + at, total, mask=real)
    else:
        made = made / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(y + at[:, None] * VALUE + e[None, :], made.to(y.dtype.element_ty), mask=real[:, None] & (e < VALUE)[None, :])


@triton.jit
def gather_kernel(
    made, tops, totals, y, parts, VALUE: tl.constexpr, VALUE2: tl.constexpr, PARTS2: tl.constexpr
):  # fmt: skip
    """y [..., VALUE] of made [..., parts, VALUE], each a sum of `totals` times e ** `tops`."""
    part = tl.program_id(0).to(tl.int64) * parts + tl.arange(0, PARTS2)
    inside = tl.arange(0, PARTS2) < parts
    e = tl.arange(0, VALUE2)
    top = tl.load(tops + part, mask=inside, other=-1.0e30)
    weight = tl.where(inside, tl.exp(top - tl.max(top, 0)), 0.0)
    total = tl.sum(weight * tl.load(totals + part, mask=inside, other=0.0), 0)
    found = tl.load(made + part[:, None] * VALUE + e[None, :], mask=inside[:, None] & (e < VALUE)[None, :], other=0.0)
    found = tl.sum(found * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(y + tl.program_id(0).to(tl.int64) * VALUE + e, found.to(y.dtype.element_ty), mask=e < VALUE)


def attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None, places: Tensor | None = None, *,
    causal: bool = True, window: int | None = None, sinks: int = 0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """query [B, H, S, D], key [B, G, T, D], value [B, G, T, E], H a multiple of G -> [B, H, S, E] of the value's dtype, laid out as
    [B, S, H, E], which what follows it wants.

    padding: [B, T], 0 where a key is closed. window: how many positions back (and, not causal, ahead) are open, with one's own.
    sinks: with a window, how many first positions that are no padding are open to all beside it.
    places: int64 [S], the positions of the queries, one after the other, in keys that have room for more; what is behind the last of
        them is not read. None: they are the last S.
    """
    (batch, heads, queries, width), keys, value_width = query.shape, key.shape[2], value.shape[3]
    y = torch.empty((batch, queries, heads, value_width), dtype=value.dtype, device=query.device).transpose(1, 2)
    if not y.numel():
        return y
    query, key = (t.to(value.dtype) for t in (query, key))
    if padding is not None and padding.dtype == torch.bool:
        padding = padding.to(torch.uint8)
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if padding is not None and padding.stride(1) != 1:
        padding = padding.contiguous()
    ends = query if not sinks else torch.full((batch,), sinks, dtype=torch.int32, device=query.device)
    if sinks and padding is not None:
        ends += (padding != 0).int().argmax(1).int()
    config = config_for("attention", query.device, queries, max(width, value_width), keys)
    times, pack, parts = heads // key.shape[1], 1, 1
    if "PROGRAMS" in config:
        pack = times if times <= config["BLOCK_S"] else 1
    blocks = cdiv(queries, config["BLOCK_S"] // pack)
    if "PROGRAMS" in config:
        parts = min(cdiv(config["PROGRAMS"], blocks * batch * heads // pack), cdiv(keys, config["BLOCK_T"]))
        config = {name: value for name, value in config.items() if name != "PROGRAMS"}
    shape = (batch * queries * heads, parts)
    made, tops, totals = (y, query, query) if parts == 1 else (
        torch.empty(size, dtype=torch.float32, device=query.device) for size in ((*shape, value_width), shape, shape)
    )  # fmt: skip
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], 0 if padding is None else padding.stride(0))
    args = (
        query, key, value, query if padding is None else padding, query if places is None else places, ends, made, tops, totals,
        1 / math.sqrt(width) if scale is None else scale, heads, times, queries, keys, parts, *strides, window or 0, sinks,
    )  # fmt: skip
    value_room = next_power_of_2(value_width)
    launch(
        attention_kernel, (blocks, batch * heads // pack, parts), config, *args,
        WIDTH=width, WIDTH2=max(16, next_power_of_2(width)), VALUE=value_width, VALUE2=max(16, value_room),
        CAUSAL=causal, WINDOW=window is not None, SINKS=window is not None and sinks > 0, PADDED=padding is not None,
        PLACED=places is not None, PACK=pack, PARTED=parts > 1,
    )  # fmt: skip
    if parts > 1:
        config = {name: config[name] for name in ("num_warps", "num_stages")}
        sizes = {"VALUE": value_width, "VALUE2": value_room, "PARTS2": next_power_of_2(parts)}
        launch(gather_kernel, (len(made),), config, made, tops, totals, y, parts, **sizes)
    return y


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None, *,
    causal: bool = True, window: int | None = None, sinks: int = 0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """What `attention` computes, in plain PyTorch and float32, with the mask written out."""
    times = query.shape[1] // key.shape[1]
    key, longer = (t.float().repeat_interleave(times, 1) for t in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    distance = torch.arange(keys - queries, keys, device=query.device)[:, None] - torch.arange(keys, device=query.device)
    is_open = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    is_open = is_open[None, None]
    if window is not None:
        end = sinks if padding is None else ((padding != 0).int().argmax(1) + sinks)[:, None, None, None]
        place = torch.arange(keys, device=query.device)
        sunk = (place < end) | (False if causal else place[keys - queries :, None] < end)
        is_open = is_open & ((distance.abs() < window) | (sunk & (sinks > 0)))
    is_open = is_open if padding is None else is_open & (padding != 0)[:, None, None, :]
    scores = query.float() @ key.transpose(2, 3) * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    weights = scores.masked_fill(~is_open, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ longer).to(value.dtype)
