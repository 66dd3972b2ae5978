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
    g: Lowering, node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None = None,
    dropout: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> ir.Value:  # fmt: skip
    b, width = g.b, g.dims(query)[-1]
    scale = 1 / math.sqrt(width) if scale is None and isinstance(width, int) else scale
    q, k, v = (four(g, n) for n in (query, key, value))
    m = None if mask is None else attention_mask(g, mask, query)
    y = b.op("Attention", q, k, v, m, scale=scale, is_causal=int(is_causal))
    return y if g.rank(query) == 4 else b.op("Squeeze", y, b.ints(list(range(4 - g.rank(query)))))


def four(g: Lowering, node: fx.Node) -> ir.Value:
    """A tensor of rank 4: leading axes of one element are added."""
    x, missing = g.value(node), 4 - g.rank(node)
    return x if missing == 0 else g.b.op("Unsqueeze", x, g.b.ints(list(range(missing))))


def attention_mask(g: Lowering, mask: fx.Node, query: fx.Node) -> ir.Value:
    """The kernel broadcasts a mask over batch and heads, and wants a row per query."""
    value, dims, rows = g.value(mask), g.dims(mask), g.dims(query)[-2]
    if len(dims) < 2 or dims[-2] != rows:
        if len(dims) < 2:
            value = g.b.op("Unsqueeze", value, g.b.ints([0]))
        count = g.size(rows, g.value(query), g.rank(query) - 2)
        value = g.b.op("Expand", value, g.b.shape([count, 1]))
    return value


_ = Any
