"""Scaled dot product attention -> one `Attention` operator (opset 23, a CPU kernel in onnxruntime).

Boolean masks stay boolean: the kernel gives zeros, as torch does, for a query that may see nothing (left padding), so no
-inf meets a softmax. Grouped key and value heads are not expanded.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from torch import fx

from lwcompile.backends.onnx.lowering import Lowering, lowers


@lowers("scaled_dot_product_attention", nodes=True)
def attention(
    l: Lowering, node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None = None,
    dropout: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> ir.Value:  # fmt: skip
    b, width = l.b, l.dims(query)[-1]
    scale = 1 / math.sqrt(width) if scale is None and isinstance(width, int) else scale
    q, k, v = (four(l, n) for n in (query, key, value))
    m = None if mask is None else attention_mask(l, mask, query)
    y = b.op("Attention", q, k, v, m, scale=scale, is_causal=int(is_causal))
    return y if l.rank(query) == 4 else b.op("Squeeze", y, b.ints(list(range(4 - l.rank(query)))))


def four(l: Lowering, node: fx.Node) -> ir.Value:
    """A tensor of rank 4: leading axes of one element are added."""
    x, missing = l.value(node), 4 - l.rank(node)
    return x if missing == 0 else l.b.op("Unsqueeze", x, l.b.ints(list(range(missing))))


def attention_mask(l: Lowering, mask: fx.Node, query: fx.Node) -> ir.Value:
    """The kernel broadcasts a mask over batch and heads, and wants a row per query."""
    value, dims, rows = l.value(mask), l.dims(mask), l.dims(query)[-2]
    if len(dims) < 2 or dims[-2] != rows:
        if len(dims) < 2:
            value = l.b.op("Unsqueeze", value, l.b.ints([0]))
        count = l.size(rows, l.value(query), l.rank(query) - 2)
        value = l.b.op("Expand", value, l.b.shape([count, 1]))
    return value


_ = Any
