"""Softmax attention inside a window and linear attention outside it, under one normaliser (LoLCATs, arXiv 2410.10254).

    y_i = (s sum_near exp(q_i k_j / sqrt(d) - m_i) v_j + sum_far f(q_i) f(k_j) v_j) / (the same sums without v_j)
    f(x) = [softmax(W x), softmax(-W x)], at least 1e-12                  (Hedgehog's feature map, arXiv 2402.04347)

    near: 0 <= i - j < window    far: i - j >= window    m_i: the largest score in the window    s = sigmoid(gate), per head

The far sums need no keys: state = sum of f(k_j) [v_j, 1] over all that has left the window. So decoding keeps `window - 1` keys and
values and one state [features, value_width + 1] a key-value head. A long sequence is worked on in pieces of `PIECE` queries, each with
the state of what lies before it: cost linear in the length. Both operators below are the same function in both uses: a whole sequence
is one that continues from an empty cache and no state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

GATE = -2.197
"""The gate's initial logit: a weight of 0.1 on the window."""

PIECE = 128
LEAST = 1e-12


def features(x: Tensor, maps: Tensor) -> Tensor:
    """Feature maps of each head: x [B, H, S, d], maps [H, d, f] -> [B, H, S, 2 f], positive."""
    mapped = x @ maps
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1).clamp(min=LEAST)


def with_one(value: Tensor) -> Tensor:
    """Values with a 1 behind them, whose weighted sum is the normaliser."""
    return torch.cat([value, torch.ones_like(value[..., :1])], -1)


def absorbed(key: Tensor, value: Tensor, open: Tensor | None, state: Tensor | None, map_key: Tensor) -> Tensor:
    """The state after these keys [B, G, L, d] and values [B, G, L, v]: [B, G, 2 f, v + 1]."""
    mapped = features(key, map_key)
    mapped = mapped if open is None else mapped * open[:, None, :, None].to(mapped.dtype)
    added = mapped.transpose(-1, -2) @ with_one(value)
    return added if state is None else state + added


class Maps(NamedTuple):
    """What is learned of one attention. query: [H, d, f]. key: [G, d, f]. gate: [H], a logit."""

    query: Tensor
    key: Tensor
    gate: Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, open: Tensor | None, state: Tensor | None, maps: Maps, window: int, scale: float
) -> Tensor:
    """See `lwcompile::hybrid_attention`; differentiable."""
    length, offset = query.shape[2], key.shape[2] - query.shape[2]
    kept, pieces = 0, []
    for start in range(0, length, PIECE):
        stop = min(start + PIECE, length)
        first = max(0, offset + start - window + 1)
        if first > kept:
            gone = slice(kept, first)
            state = absorbed(key[:, :, gone], value[:, :, gone], None if open is None else open[:, gone], state, maps.key)
            kept = first
        held = slice(kept, offset + stop)
        part = None if open is None else open[:, held]
        pieces.append(_piece(query[:, :, start:stop], key[:, :, held], value[:, :, held], part, state, maps, window, scale))
    return torch.cat(pieces, 2) if pieces else value.new_empty((*query.shape[:3], value.shape[-1]))


def _piece(
    query: Tensor, key: Tensor, value: Tensor, open: Tensor | None, state: Tensor | None, maps: Maps, window: int, scale: float
) -> Tensor:
    """All pairs of these queries and keys, the queries being the last positions, and the state for what is before them."""
    batch, heads, count, _ = query.shape
    groups, keys = key.shape[1], key.shape[2]
    split = (batch, groups, heads // groups, count)
    scores = (query * scale).reshape(*split, -1) @ key[:, :, None].transpose(-1, -2)
    place = torch.arange(keys, device=query.device)
    distance = place[keys - count :, None] - place
    near, far = (distance >= 0) & (distance < window), distance >= window
    if open is not None:
        near, far = near & open[:, None, None, None], far & open[:, None, None, None]
    scores = scores.masked_fill(~near, torch.finfo(scores.dtype).min)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * near
    mapped = features(query, maps.query).reshape(*split, -1)
    linear = mapped @ features(key, maps.key)[:, :, None].transpose(-1, -2)
    weights = maps.gate.sigmoid().reshape(groups, -1, 1, 1) * weights + linear * far
    sums = weights @ with_one(value)[:, :, None]
    sums = sums if state is None else sums + mapped @ state[:, :, None]
    y = sums[..., :-1] / sums[..., -1:].clamp(min=torch.finfo(sums.dtype).tiny)
    return y.reshape(batch, heads, count, -1)


@torch.library.custom_op("lwcompile::hybrid_attention", mutates_args=())
def hybrid_attention(
    query: Tensor, key: Tensor, value: Tensor, open: Tensor | None, state: Tensor | None, map_query: Tensor, map_key: Tensor,
    gate: Tensor, window: int, scale: float,
) -> Tensor:  # fmt: skip
    """Causal attention [B, H, S, v] of the last S of L positions.

    Args:
        query: [B, H, S, d]. key: [B, G, L, d]. value: [B, G, L, v]. open: bool [B, L], False where a key is padding.
        state: [B, G, 2 f, v + 1], what lies before the L keys; all of it must be `window` or more away from every query.
        map_query: [H, d, f]. map_key: [G, d, f]. gate: [H], a logit. window: at least 2. scale: of scores.
    """
    return attend(query, key, value, open, state, Maps(map_query, map_key, gate), window, scale)


@hybrid_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return value.new_empty((*query.shape[:3], value.shape[-1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Computed anew with gradients on."""
    wanted = ctx.needs_input_grad[:8]
    tensors: list[Any] = [
        t.detach().requires_grad_() if t is not None and need else t for t, need in zip(ctx.saved_tensors, wanted)
    ]
    query, key, value, open_, state, *maps = tensors
    with torch.enable_grad():
        output = attend(query, key, value, open_, state, Maps(*maps), ctx.window, ctx.scale)
    found = iter(torch.autograd.grad(output, [t for t, need in zip(tensors, wanted) if need], gradient))
    return (*(next(found) if need else None for need in wanted), None, None)


hybrid_attention.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("lwcompile::absorb_keys", mutates_args=())
def absorb_keys(key: Tensor, value: Tensor, open: Tensor | None, state: Tensor | None, map_key: Tensor, window: int) -> Tensor:
    """The state [B, G, 2 f, v + 1] once all but the last `window - 1` of these L keys have left the window."""
    gone = slice(0, max(0, key.shape[2] - window + 1))
    return absorbed(key[:, :, gone], value[:, :, gone], None if open is None else open[:, gone], state, map_key)


@absorb_keys.register_fake
def _(key: Tensor, value: Tensor, open: Tensor | None, state: Tensor | None, map_key: Tensor, window: int) -> Tensor:
    return value.new_empty((*key.shape[:2], 2 * map_key.shape[-1], value.shape[-1] + 1))
