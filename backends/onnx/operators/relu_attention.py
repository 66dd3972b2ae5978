"""Attention over ReLU feature maps, with a convolution of the values (`lwcompile.relu_attention`), from plain operators.

Where the length is fixed and short, pairs of positions cost less than the sum over features, and are computed instead.
"""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir
from torch import fx

from lwcompile.backends.onnx.lowering import Lowering, lowers
from lwcompile.backends.onnx.operators.linear_attention import with_one
from lwcompile.relu_attention import EPSILON

FLOAT = ir.DataType.FLOAT


@lowers("lwcompile.relu_attention", nodes=True)
def relu_attention(
    g: Lowering, node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, open_: fx.Node | None, map_query: fx.Node,
    map_key: fx.Node, kernel: fx.Node, first: int, rows: int,
) -> ir.Value:  # fmt: skip
    b, (_, heads, count, _) = g.b, g.dims(query)
    _, groups, _, wide = g.dims(value)
    assert isinstance(heads, int) and isinstance(groups, int) and isinstance(wide, int)
    width = g.dims(map_query)[-1]
    assert isinstance(width, int)
    features = 2 * width
    v, mapped_k = g.value(value), _features(g, key, map_key)
    if open_ is not None:
        open_rows = b.cast(b.op("Unsqueeze", g.value(open_), b.ints([1, 3])), v.dtype or FLOAT)
        v, mapped_k = b.op("Mul", v, open_rows), b.op("Mul", mapped_k, open_rows)
    mapped_q = b.op("Reshape", _features(g, query, map_query), b.ints([0, groups, heads // groups, -1, features]))
    swapped, ones = b.op("Transpose", mapped_k, perm=[0, 1, 3, 2]), b.op("Unsqueeze", with_one(g, v), b.ints([2]))
    if isinstance(count, int) and count * (features + wide + 1) < 2 * features * (wide + 1):
        sums = b.op("MatMul", b.op("MatMul", mapped_q, b.op("Unsqueeze", swapped, b.ints([2]))), ones)
    else:
        sums = b.op("MatMul", mapped_q, b.op("MatMul", b.op("Unsqueeze", swapped, b.ints([2])), ones))
    above = b.op("Slice", sums, b.ints([0]), b.ints([wide]), b.ints([4]))
    below = b.op("Slice", sums, b.ints([wide]), b.ints([wide + 1]), b.ints([4]))
    y = b.op("Div", above, b.op("Add", below, b.scalar(EPSILON, below)))
    local = _convolved(g, v, kernel, groups, wide, first, rows)
    return b.op("Reshape", b.op("Add", y, b.op("Unsqueeze", local, b.ints([2]))), b.ints([0, heads, -1, wide]))


def _features(g: Lowering, x: fx.Node, maps: fx.Node) -> ir.Value:
    b, width = g.b, g.dims(x)[3]
    assert isinstance(width, int)
    ends = (b.ints([n]) for n in (0, width, width + 1))
    weight, shift = (b.op("Slice", g.value(maps), *part, b.ints([1])) for part in pairwise(ends))
    mapped = b.op("Add", b.op("MatMul", g.value(x), weight), shift)
    return b.op("Concat", b.op("Relu", mapped), b.op("Relu", b.op("Neg", mapped)), axis=-1)


def _convolved(g: Lowering, v: ir.Value, kernel: fx.Node, groups: int, wide: int, first: int, rows: int) -> ir.Value:
    """[B, G, T, v] convolved from `first` on, zeros before it."""
    b, taps = g.b, [int(n) for n in g.dims(kernel)[2:]]  # type: ignore[arg-type]
    x = b.op("Slice", v, b.ints([first]), b.ints([1 << 60]), b.ints([2])) if first else v
    x = b.op("Transpose", x, perm=[0, 1, 3, 2])
    x = b.op("Reshape", x, b.ints([0, groups * wide, rows, -1] if rows else [0, groups * wide, -1]))
    pads = [n // 2 for n in taps] * 2
    y = b.op("Conv", x, g.value(kernel), pads=pads, group=groups * wide, kernel_shape=taps)
    y = b.op("Transpose", b.op("Reshape", y, b.ints([0, groups, wide, -1])), perm=[0, 1, 3, 2])
    return b.op("Pad", y, b.ints([0, 0, first, 0, 0, 0, 0, 0])) if first else y
