"""Scaled dot product attention -> one `Attention` operator (opset 23, a CPU kernel in onnxruntime).

Boolean masks stay boolean: the kernel gives zeros, as torch does, for a query that may see nothing (left padding), so no
-inf meets a softmax. Grouped key and value heads are not expanded. Where queries, keys and values come as [batch, sequence,
heads * width], the operator reads them so, without splitting and transposing heads; and where keys and values are a cache
and new ones joined, it joins them itself.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from lwcompile.backends.onnx.lowering import Lowering, lowers
from lwcompile.backends.onnx.operators.bands import near_attention
from lwcompile.bands import read_band

aten = torch.ops.aten


@lowers("scaled_dot_product_attention", nodes=True)
def attention(
    g: Lowering, node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, attn_mask: fx.Node | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> ir.Value:  # fmt: skip
    width = g.dims(query)[-1]
    scale = 1 / math.sqrt(width) if scale is None and isinstance(width, int) else scale
    settings = {"scale": scale, "is_causal": int(is_causal)}
    band = read_band(attn_mask) if attn_mask is not None and g.rank(query) == 4 else None
    if band is not None and (near := near_attention(g, band, (query, key, value), settings)) is not None:
        return g.split_heads(node, near)
    mask = None if attn_mask is None else attention_mask(g, attn_mask, query)
    if g.rank(query) == 4 and (flat := _from_flat(g, node, (query, key, value), mask, settings)) is not None:
        return flat
    q, k, v = (four(g, n) for n in (query, key, value))
    y = g.b.op("Attention", q, k, v, mask, **settings)
    return y if g.rank(query) == 4 else g.b.op("Squeeze", y, g.b.ints(list(range(4 - g.rank(query)))))


def _from_flat(
    g: Lowering, node: fx.Node, parts: tuple[fx.Node, fx.Node, fx.Node], mask: ir.Value | None, settings: dict[str, Any]
) -> ir.Value | None:
    """The form that reads [batch, sequence, heads * width]; None where one of the three comes otherwise."""
    query, key, value = parts
    joined = None if settings["is_causal"] else _joined(g, key, value)
    new_key, new_value = (key, value) if joined is None else (joined[1], joined[3])
    q, k, v = g.merged(query), g.merged(new_key), g.merged(new_value)
    heads, kv_heads = g.dims(query)[1], g.dims(key)[1]
    if q is None or k is None or v is None or not isinstance(heads, int) or not isinstance(kv_heads, int):
        return None
    settings = {**settings, "q_num_heads": heads, "kv_num_heads": kv_heads}
    if joined is None:
        return g.split_heads(node, g.b.op("Attention", q, k, v, mask, **settings))
    past_key, _, past_value, _ = joined
    flat, present_key, present_value = g.b.ops(
        "Attention", q, k, v, mask, g.value(past_key), g.value(past_value), outputs=3, **settings
    )
    g.values[key], g.values[value] = present_key, present_value
    return g.split_heads(node, flat)


def _joined(g: Lowering, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """(past key, new key, past value, new value) where both are such a pair, joined along the sequence."""
    found: list[Any] = []
    for node in (key, value):
        parts: Any = node.args[0]
        if node.target is not aten.cat.default or node.args[1:] not in ((2,), (-2,)) or len(parts) != 2:
            return None
        if parts[0].op != "placeholder":
            return None
        found += parts
    past_key, new_key, past_value, new_value = found
    return past_key, new_key, past_value, new_value


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
