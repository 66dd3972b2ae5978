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
