"""Attention through a window, in blocks: each `BLOCK` queries read the keys near them, and the sinks, and no others.

queries [B, S, H d]  ->  [B * n, b, H d]      n blocks of b = min(S, BLOCK)
keys    [B, T, G d]  ->  [B * n, s + window - 1 + b, G d]: the sinks, and what the block's queries have in their windows

So a prompt costs S (window + BLOCK + s) pairs instead of S T, in the one `Attention` operator that all attention becomes. One
graph serves prompts and steps of one token, whose block is one query long.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx_ir as ir
from torch import fx

from lwcompile.backends.onnx.lowering import Lowering
from lwcompile.bands import Band

BLOCK = 64
INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL


class Blocks:
    """Which rows each block reads, for size vectors S and T. Equal ones are made once for all layers.

    behind, ahead: keys that a block reads before its first and after its last query.
    """

    def __init__(self, g: Lowering, queries: ir.Value, keys: ir.Value, window: int, causal: bool) -> None:
        b = g.b
        self.b, self.queries, self.keys, self.window, self.causal = b, queries, keys, window, causal
        self.op, one = partial(b.op, dtype=INT64), b.ints([1])
        self.size = self.op("Min", queries, b.ints([BLOCK]))
        self.count = self.op("Div", self.op("Sub", self.op("Add", queries, self.size), one), self.size)
        self.behind = self.op("Min", b.ints([window - 1]), self.op("Sub", keys, one))
        self.ahead = b.ints([0]) if causal else self.behind
        self.before = self.op("Sub", keys, queries)
        self.width = self.op("Add", self.op("Add", self.behind, self.ahead), self.size)
        self.starts = self.op("Mul", self.counted(self.count), self.size)
        self.first_key = self.op("Sub", self.op("Add", self.before, self.starts), self.behind)

    def counted(self, count: ir.Value) -> ir.Value:
        """0 .. count - 1 of a size vector."""
        return self.op("Range", self.b.point(0), self.op("Squeeze", count, self.b.ints([0])), self.b.point(1))

    def column(self, x: ir.Value) -> ir.Value:
        return self.op("Unsqueeze", x, self.b.ints([1]))

    def within(self, rows: ir.Value, count: ir.Value) -> ir.Value:
        """Row numbers, those outside 0 .. count - 1 at its ends."""
        last = self.op("Sub", count, self.b.ints([1]))
        return self.op("Max", self.op("Min", rows, last), self.b.ints([0]))

    def query_rows(self) -> ir.Value:
        """[n * b]: a last block that is not full repeats the last query."""
        return self.within(self.counted(self.op("Mul", self.count, self.size)), self.queries)

    def key_places(self) -> ir.Value:
        """[n, K], below 0 or beyond T where a block's window reaches out of the sequence."""
        return self.op("Add", self.column(self.first_key), self.counted(self.width))

    def distances(self) -> ir.Value:
        """[b, K]: how far behind its query a block's key is; the same in every block."""
        return self.op("Sub", self.column(self.op("Add", self.counted(self.size), self.behind)), self.counted(self.width))

    def near(self) -> ir.Value:
        """bool [b, K]: in the window."""
        distance = self.distances()
        close = self.b.op("Less", distance, self.b.constant(self.window, INT64), dtype=BOOL)
        least = 0 if self.causal else 1 - self.window
        return self.b.op("And", close, self.b.op("GreaterOrEqual", distance, self.b.constant(least, INT64), dtype=BOOL))

    def inside(self, places: ir.Value) -> ir.Value:
        """bool, like `places`: in the sequence. Behind its end, only a window that reads later positions can be."""
        found = self.b.op("GreaterOrEqual", places, self.b.constant(0, INT64), dtype=BOOL)
        return found if self.causal else self.b.op("And", found, self.b.op("Less", places, self.keys, dtype=BOOL))


def near_attention(g: Lowering, band: Band, parts: tuple[fx.Node, fx.Node, fx.Node], settings: dict[str, Any]) -> ir.Value | None:
    """Attention under a band, as [B, S, H v]; None where it would not pay or has global tokens, which read all keys."""
    b, (query, key, value) = g.b, parts
    (_, heads, count, _), (_, kv_heads, keys, _) = g.dims(query), g.dims(key)
    wide = g.dims(value)[3]
    assert isinstance(heads, int) and isinstance(wide, int)
    if (band.sinks and not band.causal) or (isinstance(keys, int) and keys < 2 * band.window + BLOCK):
        return None
    q, k, v = (_flat(g, node) for node in parts)
    blocks = Blocks(g, b.vector(g.size(count, q, 1)), b.vector(g.size(keys, k, 1)), band.window, band.causal)
    places = blocks.key_places()
    rows = blocks.within(places, blocks.keys)
    near = b.op("Unsqueeze", blocks.near(), b.ints([0, 1, 2]))
    mask = b.op("And", near, b.op("Unsqueeze", blocks.inside(places), b.ints([0, 2, 3])))
    if band.open_ is not None:
        mask = b.op("And", mask, b.op("Unsqueeze", b.op("Gather", g.value(band.open_), rows, axis=1), b.ints([2, 3])))
    read = [b.op("Gather", x, rows, axis=1) for x in (k, v)]
    batch = b.size_of(q, 0).value
    if band.sinks:
        places, sunk = _sinks(g, band, blocks)
        read = [b.op("Concat", _sink_rows(g, x, places, blocks, batch), near, axis=2) for x, near in zip((k, v), read)]
        both = b.op("Concat", batch, blocks.count, b.ints([1]), blocks.size, axis=0)
        mask = b.op("Concat", *(b.op("Expand", m, b.op("Concat", both, b.ints([1]), axis=0)) for m in (sunk, mask)), axis=4)
    whole = b.op("Concat", batch, blocks.count, b.ints([1, 1, 1]), axis=0)
    flat = b.op("Concat", b.ints([-1, 1]), blocks.size, b.size_of(mask, 4).value, axis=0)
    mask = b.op("Reshape", b.op("Expand", mask, whole), flat)
    asked = b.op("Reshape", b.op("Gather", q, blocks.query_rows(), axis=1), _blocked(g, blocks.size, query))
    k, v = (b.op("Reshape", x, _blocked(g, b.size_of(x, 2).value, node)) for x, node in zip(read, (key, value)))
    y = b.op("Attention", asked, k, v, mask, **settings, q_num_heads=heads, kv_num_heads=kv_heads)
    y = b.op("Reshape", y, b.op("Concat", batch, b.ints([-1, heads * wide]), axis=0))
    return b.op("Slice", y, b.ints([0]), blocks.queries, b.ints([1]))


def _flat(g: Lowering, node: fx.Node) -> ir.Value:
    """[B, heads, S, width] as [B, S, heads * width]."""
    if (merged := g.merged(node)) is not None:
        return merged
    _, heads, _, width = g.dims(node)
    swapped = g.b.op("Transpose", g.value(node), perm=[0, 2, 1, 3])
    return g.b.op("Reshape", swapped, g.b.ints([0, 0, heads * width]))  # type: ignore[operator,list-item]


def _blocked(g: Lowering, rows: ir.Value, node: fx.Node) -> ir.Value:
    """The shape [B * n, rows, heads * width]."""
    _, heads, _, width = g.dims(node)
    return g.b.op("Concat", g.b.ints([-1]), rows, g.b.ints([heads * width]), axis=0)  # type: ignore[operator,list-item]


def _sinks(g: Lowering, band: Band, blocks: Blocks) -> tuple[ir.Value, ir.Value]:
    """Their places [B or 1, s], and which queries read them beside their windows: bool [B or 1, n, 1, b, s]."""
    b, op = g.b, blocks.op
    first = b.constant([[0]], INT64) if band.first is None else g.value(band.first)
    places = op("Add", first, b.ints(list(range(band.sinks))))
    asking = op("Add", blocks.column(op("Add", blocks.before, blocks.starts)), blocks.counted(blocks.size))
    distance = op("Sub", op("Unsqueeze", asking, b.ints([0, 2, 4])), op("Unsqueeze", places, b.ints([1, 2, 3])))
    far = b.op("GreaterOrEqual", distance, b.constant(band.window, INT64), dtype=BOOL)
    places = blocks.within(places, blocks.keys)
    if band.open_ is not None:
        rows = op("Expand", places, op("Concat", b.size_of(g.value(band.open_), 0).value, b.ints([1]), axis=0))
        open_ = b.op("GatherElements", g.value(band.open_), rows, axis=1)
        far = b.op("And", far, b.op("Unsqueeze", open_, b.ints([1, 2, 3])))
    return places, far


def _sink_rows(g: Lowering, x: ir.Value, places: ir.Value, blocks: Blocks, batch: ir.Value) -> ir.Value:
    """Rows of x [B, T, width] at the sinks, for every block: [B, n, s, width]."""
    b = g.b
    rows = b.op("Expand", places, b.op("Concat", batch, b.ints([1]), axis=0), dtype=INT64)
    found = b.op("GatherND", x, b.op("Unsqueeze", rows, b.ints([2])), batch_dims=1)
    shape = b.op("Concat", b.ints([1]), blocks.count, b.ints([1, 1]), axis=0)
    return b.op("Expand", b.op("Unsqueeze", found, b.ints([1])), shape)
