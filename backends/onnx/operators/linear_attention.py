"""Attention that is softmax inside a window and linear outside it (`lwcompile.linear_attention`), from plain operators.

In blocks of queries (`bands`): each is softmax over the keys near it, and reads the state of all before these. The states are a
running sum over blocks, so that a prompt costs what is linear in its length; a step of decoding is a block of one query.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from torch import fx

from lwcompile.backends.onnx.lowering import Lowering, lowers
from lwcompile.backends.onnx.operators.bands import BOOL, INT64, Blocks
from lwcompile.linear_attention import LEAST

FLOAT = ir.DataType.FLOAT
_LOWEST, _TINY = -3.0e38, 1e-37


def features(g: Lowering, x: ir.Value, maps: ir.Value) -> ir.Value:
    b = g.b
    mapped = b.op("MatMul", x, maps)
    both = b.op("Concat", b.op("Softmax", mapped, axis=-1), b.op("Softmax", b.op("Neg", mapped), axis=-1), axis=-1)
    return b.op("Max", both, b.scalar(LEAST, both))


def with_one(g: Lowering, value: ir.Value) -> ir.Value:
    b = g.b
    first = b.op("Slice", value, b.ints([0]), b.ints([1]), b.ints([3]))
    one = b.op("Add", b.op("Mul", first, b.scalar(0.0, first)), b.scalar(1.0, first))
    return b.op("Concat", value, one, axis=-1)


@lowers("lwcompile.hybrid_attention", nodes=True)
def hybrid_attention(
    g: Lowering, node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, open_: fx.Node | None, state: fx.Node | None,
    map_query: fx.Node, map_key: fx.Node, gate: fx.Node, window: int, scale: float,
) -> ir.Value:  # fmt: skip
    b, (_, heads, count, width) = g.b, g.dims(query)
    groups, keys = g.dims(key)[1:3]
    wide = g.dims(value)[3]
    assert isinstance(heads, int) and isinstance(groups, int) and isinstance(width, int) and isinstance(wide, int)
    q, k, v = g.value(query), g.value(key), with_one(g, g.value(value))
    blocks = Blocks(g, b.vector(g.size(count, q, 2)), b.vector(g.size(keys, k, 2)), window, causal=True)
    opened = None if open_ is None else g.value(open_)
    mapped_k = features(g, k, g.value(map_key))

    def asked(x: ir.Value, last: int) -> ir.Value:
        """[B, heads, S, last] -> [B, groups, heads of each, n, b, last]."""
        rows = b.op("Gather", x, blocks.query_rows(), axis=2)
        sizes = b.op("Concat", b.ints([0, groups, heads // groups, -1]), blocks.size, b.ints([last]), axis=0)
        return b.op("Reshape", rows, sizes)

    def shared(x: ir.Value) -> ir.Value:
        return b.op("Unsqueeze", x, b.ints([2]))

    def swapped(x: ir.Value) -> ir.Value:
        return b.op("Transpose", shared(x), perm=[0, 1, 2, 3, 5, 4])

    def allowed(places: ir.Value) -> ir.Value:
        """bool [B or 1, 1, 1, n, 1, rows] of places [n, rows]: in the sequence, and no padding."""
        found = b.op("Unsqueeze", blocks.inside(places), b.ints([0]))
        if opened is not None:
            found = b.op("And", found, b.op("Gather", opened, blocks.within(places, blocks.keys), axis=1))
        return b.op("Unsqueeze", found, b.ints([1, 2, 4]))

    places = blocks.key_places()
    rows, valid = blocks.within(places, blocks.keys), allowed(places)
    far = b.op("GreaterOrEqual", blocks.distances(), b.constant(window, INT64), dtype=BOOL)
    near, far = b.op("And", blocks.near(), valid), b.op("And", far, valid)
    kind = q.dtype or FLOAT
    scores = b.op("MatMul", asked(b.op("Mul", q, b.scalar(scale, q)), width), swapped(b.op("Gather", k, rows, axis=2)))
    scores = b.op("Where", near, scores, b.scalar(_LOWEST, q), dtype=kind)
    weights = b.op("Exp", b.op("Sub", scores, b.op("ReduceMax", scores, b.ints([-1]), keepdims=1)))
    per_head = b.op("Reshape", b.op("Sigmoid", g.value(gate)), b.ints([groups, heads // groups, 1, 1, 1]))
    weights = b.op("Mul", weights, b.op("Mul", per_head, b.cast(near, kind)))
    count_of = 2 * _maps(g, map_query)
    mapped = asked(features(g, q, g.value(map_query)), count_of)
    linear = b.op("MatMul", mapped, swapped(b.op("Gather", mapped_k, rows, axis=2)))
    weights = b.op("Add", weights, b.op("Mul", linear, b.cast(far, kind)))
    sums = b.op("MatMul", weights, shared(b.op("Gather", v, rows, axis=2)))
    before = _states(g, blocks, mapped_k, v, opened, None if state is None else g.value(state), allowed)
    sums = b.op("Add", sums, b.op("MatMul", mapped, shared(before)))
    above = b.op("Slice", sums, b.ints([0]), b.ints([wide]), b.ints([5]))
    below = b.op("Slice", sums, b.ints([wide]), b.ints([wide + 1]), b.ints([5]))
    y = b.op("Reshape", b.op("Div", above, b.op("Max", below, b.scalar(_TINY, q))), b.ints([0, heads, -1, wide]))
    return b.op("Slice", y, b.ints([0]), blocks.queries, b.ints([2]))


def _states(
    g: Lowering, blocks: Blocks, mapped: ir.Value, v: ir.Value, opened: ir.Value | None, state: ir.Value | None,
    allowed: Callable[[ir.Value], ir.Value],
) -> ir.Value:  # fmt: skip
    """What lies before each block's keys, [B, G, n, 2 f, v + 1]: before the first one's, and then a block of keys more at a time."""
    b, kind = g.b, mapped.dtype or FLOAT
    moved = blocks.op("Sub", blocks.first_key, blocks.size)
    places = blocks.op("Add", blocks.column(moved), blocks.counted(blocks.size))
    rows = blocks.within(places, blocks.keys)
    behind = b.op("Greater", blocks.counted(blocks.count), b.constant(0, INT64), dtype=BOOL)  # the first block's are in the start
    gone = b.op("And", allowed(places), b.op("Unsqueeze", behind, b.ints([0, 1, 2, 4, 5])))
    gone = b.op("Reshape", gone, b.op("Concat", b.ints([-1, 1]), blocks.count, blocks.size, b.ints([1]), axis=0))
    taken = b.op("Mul", b.op("Gather", mapped, rows, axis=2), b.cast(gone, kind))
    added = b.op("MatMul", b.op("Transpose", taken, perm=[0, 1, 2, 4, 3]), b.op("Gather", v, rows, axis=2))
    start = _absorbed(g, mapped, v, opened, state, blocks.op("Sub", blocks.before, blocks.behind))
    return b.op("Add", b.op("CumSum", added, b.point(2)), b.op("Unsqueeze", start, b.ints([2])))


def _absorbed(
    g: Lowering, mapped: ir.Value, v: ir.Value, opened: ir.Value | None, state: ir.Value | None, count: ir.Value
) -> ir.Value:
    """The state with the first `count` keys in it, none if that is below 1: [B, G, 2 f, v + 1]."""
    b = g.b
    some = b.op("Max", count, b.ints([1]))  # onnxruntime leaves a product over nothing undefined: take one, and weigh it 0

    def first(x: ir.Value, axis: int) -> ir.Value:
        return b.op("Slice", x, b.ints([0]), some, b.ints([axis]))

    gone = b.op("Unsqueeze", b.op("Greater", count, b.ints([0]), dtype=BOOL), b.ints([1]))
    if opened is not None:
        gone = b.op("And", gone, first(opened, 1))
    mapped = b.op("Mul", first(mapped, 2), b.cast(b.op("Unsqueeze", gone, b.ints([1, 3])), mapped.dtype or FLOAT))
    added = b.op("MatMul", b.op("Transpose", mapped, perm=[0, 1, 3, 2]), first(v, 2))
    return added if state is None else b.op("Add", state, added)


@lowers("lwcompile.absorb_keys", nodes=True)
def absorb_keys(
    g: Lowering, node: fx.Node, key: fx.Node, value: fx.Node, open_: fx.Node | None, state: fx.Node | None, map_key: fx.Node,
    window: int,
) -> ir.Value:  # fmt: skip
    count = g.b.op("Sub", g.b.vector(g.size(g.dims(key)[2], g.value(key), 2)), g.b.ints([window - 1]))
    mapped, v = features(g, g.value(key), g.value(map_key)), with_one(g, g.value(value))
    opened, before = (None if x is None else g.value(x) for x in (open_, state))
    return _absorbed(g, mapped, v, opened, before, count)


def _maps(g: Lowering, maps: fx.Node) -> int:
    count = g.dims(maps)[-1]
    assert isinstance(count, int)
    return count
