"""torch's own operators where no kernel stands, for activations that met in unlike dtypes."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, bias)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    if mask is not None and mask.is_floating_point():
        mask = mask.to(value.dtype)
    return F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, mask, **options)
