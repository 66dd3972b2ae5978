"""Linear attention in both directions: ReLU feature maps, and a depthwise convolution of the values (SLAB, arXiv 2405.11582).

    y_i = sum_j f(q_i) f(k_j) v_j / (sum_j f(q_i) f(k_j) + 1e-6) + (C * v)_i        f(x) = [relu(W x + c), relu(-W x - c)]

The sums over j are computed once, [features, value_width + 1] a key-value head, and read by every position: cost linear in the
length. C holds what such a sum cannot say, which neighbour is meant: one small kernel a channel, along a sequence, or over the rows
and columns of an image's patches, which class and register tokens stand before and take no part in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lwcompile.linear_attention import with_one

EPSILON = 1e-6


class Maps(NamedTuple):
    """What is learned of one attention.

    query: [H, d + 1, f], the last row added as a constant. key: [G, d + 1, f].
    kernel: [G v, 1, taps] along a sequence, [G v, 1, taps, taps] over an image.
    """

    query: Tensor
    key: Tensor
    kernel: Tensor


def features(x: Tensor, maps: Tensor) -> Tensor:
    """x [B, H, S, d], maps [H, d + 1, f] -> [B, H, S, 2 f], at least 0."""
    mapped = x @ maps[:, :-1] + maps[:, -1:]
    return torch.cat([mapped.relu(), (-mapped).relu()], -1)


def attend(query: Tensor, key: Tensor, value: Tensor, open: Tensor | None, maps: Maps, first: int, rows: int) -> Tensor:
    """See `lwcompile::relu_attention`; differentiable."""
    batch, heads, count, _ = query.shape
    groups, width = value.shape[1], value.shape[3]
    if open is not None:
        value = value * open[:, None, :, None].to(value.dtype)
    mapped = features(key, maps.key)
    mapped = mapped if open is None else mapped * open[:, None, :, None].to(mapped.dtype)
    state = mapped.transpose(-1, -2) @ with_one(value)
    asked = features(query, maps.query).reshape(batch, groups, heads // groups, count, -1)
    sums = asked @ state[:, :, None]
    y = sums[..., :-1] / (sums[..., -1:] + EPSILON)
    return (y + convolved(value, maps.kernel, first, rows)[:, :, None]).reshape(batch, heads, count, width)


def convolved(value: Tensor, kernel: Tensor, first: int, rows: int) -> Tensor:
    """Each channel of value [B, G, T, v] convolved with its kernel, from position `first` on; nothing before it."""
    batch, groups, _, width = value.shape
    x = value[:, :, first:].transpose(2, 3).reshape(batch, groups * width, -1)
    if rows:
        y = functional.conv2d(x.unflatten(2, (rows, -1)), kernel, padding="same", groups=groups * width).flatten(2)
    else:
        y = functional.conv1d(x, kernel, padding="same", groups=groups * width)
    y = y.reshape(batch, groups, width, -1).transpose(2, 3)
    return functional.pad(y, (0, 0, first, 0)) if first else y


@torch.library.custom_op("lwcompile::relu_attention", mutates_args=())
def relu_attention(
    query: Tensor, key: Tensor, value: Tensor, open: Tensor | None, map_query: Tensor, map_key: Tensor, kernel: Tensor, first: int,
    rows: int,
) -> Tensor:  # fmt: skip
    """Attention [B, H, T, v] of all T positions to all.

    Args:
        query: [B, H, T, d]. key: [B, G, T, d]. value: [B, G, T, v]. open: bool [B, T], False where a key is padding.
        map_query, map_key, kernel: see `Maps`.
        first: positions that stand before the convolved ones. rows: of patches, of an image; 0 for a sequence.
    """
    return attend(query, key, value, open, Maps(map_query, map_key, kernel), first, rows)


@relu_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return value.new_empty((*query.shape[:3], value.shape[-1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.first, ctx.rows = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Computed anew with gradients on."""
    wanted = ctx.needs_input_grad[:7]
    tensors: list[Any] = [
        t.detach().requires_grad_() if t is not None and need else t for t, need in zip(ctx.saved_tensors, wanted)
    ]
    query, key, value, open_, *maps = tensors
    with torch.enable_grad():
        output = attend(query, key, value, open_, Maps(*maps), ctx.first, ctx.rows)
    found = iter(torch.autograd.grad(output, [t for t, need in zip(tensors, wanted) if need], gradient))
    return (*(next(found) if need else None for need in wanted), None, None)


relu_attention.register_autograd(_backward, setup_context=_save)
