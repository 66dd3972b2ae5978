"""torch's own operators where no kernel stands: for activations that met in unlike dtypes, and for caches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, bias)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    if mask is not None and mask.is_floating_point():
        mask = mask.to(value.dtype)
    return F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, mask, **options)


def append(past: Tensor, new: Tensor, places: Tensor | None) -> Tensor:
    """A cache [B, heads, P, width] with new entries [B, heads, S, width] behind it; at `places`, int64 [S], they are written into it."""
    return torch.cat([past, new], 2) if places is None else past.index_copy_(2, places, new)


def relu_attention(
    query: Tensor, key: Tensor, value: Tensor, open: Tensor | None, map_query: Tensor, map_key: Tensor, kernel: Tensor, first: int,
    rows: int,
) -> Tensor:  # fmt: skip
    """ReLU feature maps, summed over all positions, and each channel of the values convolved from position `first` on, along the
    sequence or, with `rows`, over an image (SLAB, arXiv 2405.11582). query [B, H, T, d], key [B, G, T, d], value [B, G, T, v]."""
    (batch, heads, count, _), (groups, width) = query.shape, (value.shape[1], value.shape[3])
    asked, mapped = (
        _either_side(x.float() @ m[:, :-1].float() + m[:, -1:].float()) for x, m in ((query, map_query), (key, map_key))
    )
    taken = value.float() if open is None else value.float() * open[:, None, :, None]
    mapped = mapped if open is None else mapped * open[:, None, :, None]
    state = mapped.transpose(-1, -2) @ F.pad(taken, (0, 1), value=1.0)
    sums = asked.reshape(batch, groups, -1, count, asked.shape[-1]) @ state[:, :, None]
    x = taken[:, :, first:].transpose(2, 3).reshape(batch, groups * width, -1)
    x = x.unflatten(2, (rows, -1)) if rows else x
    convolve = F.conv2d if rows else F.conv1d
    y = convolve(x, kernel.float(), padding="same", groups=groups * width).reshape(batch, groups, width, -1).transpose(2, 3)
    y = F.pad(y, (0, 0, first, 0))[:, :, None] + sums[..., :-1] / (sums[..., -1:] + 1e-6)
    return y.reshape(batch, heads, count, width).to(value.dtype)


def _either_side(x: Tensor) -> Tensor:
    return torch.cat([x.relu(), (-x).relu()], -1)
