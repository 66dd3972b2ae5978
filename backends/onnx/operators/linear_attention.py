"""Attention that is softmax inside a window and linear outside it (`lwcompile.linear_attention`), from plain operators.

All pairs of new queries and held keys are computed: a step of decoding costs what the window and the state do, a long prompt the
square of its length.
"""

from __future__ import annotations

import onnx_ir as ir
from torch import fx

from lwcompile.backends.onnx.lowering import Lowering, lowers
from lwcompile.linear_attention import LEAST

INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
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
    assert isinstance(heads, int) and isinstance(groups, int) and isinstance(width, int)
    per = heads // groups
    q, k, v = g.value(query), g.value(key), g.value(value)

    def split(x: ir.Value, last: int) -> ir.Value:
        """[B, heads, S, last] -> [B, groups, heads of each, S, last]."""
        return b.op("Reshape", x, b.ints([0, groups, per, -1, last]))

    def shared(x: ir.Value) -> ir.Value:
        return b.op("Unsqueeze", x, b.ints([2]))

    def swapped(x: ir.Value) -> ir.Value:
        return b.op("Transpose", x, perm=[0, 1, 2, 4, 3])

    last = g.size(keys, k, 2)
    first = b.op("Sub", b.vector(last), b.vector(g.size(count, q, 2)))
    zero, step = b.point(0), b.point(1)
    ends = b.op("Range", b.op("Squeeze", first), b.point(last), step, dtype=INT64)
    distance = b.op("Sub", b.op("Unsqueeze", ends, b.ints([1])), b.op("Range", zero, b.point(last), step, dtype=INT64))
    far = b.op("GreaterOrEqual", distance, b.constant(window, INT64), dtype=ir.DataType.BOOL)
    near = b.op("GreaterOrEqual", distance, b.constant(0, INT64), dtype=ir.DataType.BOOL)
    near = b.op("And", near, b.op("Not", far))
    if open_ is not None:
        allowed = b.op("Unsqueeze", g.value(open_), b.ints([1, 2, 3]))
        near, far = b.op("And", near, allowed), b.op("And", far, allowed)

    scores = b.op("MatMul", split(b.op("Mul", q, b.scalar(scale, q)), width), swapped(shared(k)))
    scores = b.op("Where", near, scores, b.scalar(_LOWEST, q), dtype=q.dtype)
    weights = b.op("Exp", b.op("Sub", scores, b.op("ReduceMax", scores, b.ints([-1]), keepdims=1)))
    weights = b.op("Mul", weights, b.op("Reshape", b.op("Sigmoid", g.value(gate)), b.ints([groups, per, 1, 1])))
    weights = b.op("Mul", weights, b.cast(near, q.dtype or FLOAT))
    mapped = split(features(g, q, g.value(map_query)), 2 * _maps(g, map_query))
    linear = b.op("MatMul", mapped, swapped(shared(features(g, k, g.value(map_key)))))
    weights = b.op("Add", weights, b.op("Mul", linear, b.cast(far, q.dtype or FLOAT)))
    sums = b.op("MatMul", weights, shared(with_one(g, v)))
    if state is not None:
        sums = b.op("Add", sums, b.op("MatMul", mapped, shared(g.value(state))))
    wide = g.dims(value)[3]
    assert isinstance(wide, int)
    above = b.op("Slice", sums, b.ints([0]), b.ints([wide]), b.ints([4]))
    below = b.op("Slice", sums, b.ints([wide]), b.ints([wide + 1]), b.ints([4]))
    y = b.op("Div", above, b.op("Max", below, b.scalar(_TINY, q)))
    return b.op("Reshape", y, b.ints([0, heads, -1, wide]))


@lowers("lwcompile.absorb_keys", nodes=True)
def absorb_keys(
    g: Lowering, node: fx.Node, key: fx.Node, value: fx.Node, open_: fx.Node | None, state: fx.Node | None, map_key: fx.Node,
    window: int,
) -> ir.Value:  # fmt: skip
    b = g.b
    count = b.op("Sub", b.vector(g.size(g.dims(key)[2], g.value(key), 2)), b.ints([window - 1]))
    some = b.op("Max", count, b.ints([1]))  # onnxruntime leaves a product over nothing undefined: take one, and weigh it 0

    def first(x: ir.Value, axis: int) -> ir.Value:
        return b.op("Slice", x, b.ints([0]), some, b.ints([axis]))

    k, v = first(g.value(key), 2), first(g.value(value), 2)
    gone = b.op("Unsqueeze", b.op("Greater", count, b.ints([0]), dtype=ir.DataType.BOOL), b.ints([1]))
    if open_ is not None:
        gone = b.op("And", gone, first(g.value(open_), 1))
    mapped = features(g, k, g.value(map_key))
    mapped = b.op("Mul", mapped, b.cast(b.op("Unsqueeze", gone, b.ints([1, 3])), k.dtype or FLOAT))
    added = b.op("MatMul", b.op("Transpose", mapped, perm=[0, 1, 3, 2]), with_one(g, v))
    return added if state is None else b.op("Add", g.value(state), added)


def _maps(g: Lowering, maps: fx.Node) -> int:
    count = g.dims(maps)[-1]
    assert isinstance(count, int)
    return count
