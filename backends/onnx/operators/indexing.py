"""Reads and writes at computed places: embedding, index, gather, scatter, topk, sort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from torch import fx

from lwcompile.backends.onnx.lowering import Lowering, lowers
from lwcompile.backends.onnx.operators.elementwise import operand
from lwcompile.backends.onnx.quantized import quantized_weight
from lwcompile.errors import Refused

INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL
LAST = (1 << 63) - 1


@lowers("embedding", nodes=True)
def embedding(g: Lowering, node: fx.Node, weight: fx.Node, ids: fx.Node, *args: Any) -> ir.Value:
    packed = quantized_weight(g.graph, weight)
    if packed is not None:
        rows = g.quantized.embedding(packed, g.value(ids), g.rank(ids))
        if rows is not None:
            return rows
    return g.b.op("Gather", g.value(weight), g.value(ids), axis=0)


@lowers("index_select")
def index_select(g: Lowering, node: fx.Node, x: ir.Value, dim: int, index: ir.Value) -> ir.Value:
    return g.b.op("Gather", x, index, axis=dim)


@lowers("gather")
def gather(g: Lowering, node: fx.Node, x: ir.Value, dim: int, index: ir.Value, **kwargs: Any) -> ir.Value:
    return g.b.op("GatherElements", x, index, axis=dim)


@lowers("index.Tensor")
def index(g: Lowering, node: fx.Node, x: ir.Value, indices: Sequence[ir.Value | None]) -> ir.Value:
    places = [i for i, v in enumerate(indices) if v is not None]
    if any(indices[i].dtype == BOOL for i in places):  # type: ignore[union-attr]
        raise Refused("a boolean index gives a result whose size depends on the data", site=node.meta.get("path") or node.name)
    if len(places) == 1:
        return g.b.op("Gather", x, indices[places[0]], axis=places[0])
    order, _ = _indexed_first(g.rank(node.args[0]), places)
    moved = x if order == sorted(order) else g.b.op("Transpose", x, perm=order)
    picked = g.b.op("GatherND", moved, _stacked(g, [indices[i] for i in places]))
    adjacent = places == list(range(places[0], places[-1] + 1))
    if not adjacent or places[0] == 0:
        return picked
    rank, lead = g.rank(node), places[0]
    spread = rank - (g.rank(node.args[0]) - len(places))
    return g.b.op("Transpose", picked, perm=[*range(spread, spread + lead), *range(spread), *range(spread + lead, rank)])


def _indexed_first(rank: int, places: Sequence[int]) -> tuple[list[int], list[int]]:
    order = [*places, *(d for d in range(rank) if d not in places)]
    return order, [order.index(d) for d in range(rank)]


def _stacked(g: Lowering, indices: Sequence[Any]) -> ir.Value:
    """Index tensors of different shapes -> one of [..., number of indices]."""
    b = g.b
    indices = [b.cast(i, INT64) for i in indices]
    total = indices[0]
    for other in indices[1:]:
        total = b.op("Add", total, other)
    shape = b.op("Shape", total, dtype=INT64)
    return b.op("Concat", *(b.op("Unsqueeze", b.op("Expand", i, shape), b.ints([-1])) for i in indices), axis=-1)


@lowers("index_put")
def index_put(
    g: Lowering, node: fx.Node, x: ir.Value, indices: Sequence[Any], values: ir.Value, accumulate: bool = False
) -> ir.Value:
    places = [i for i, v in enumerate(indices) if v is not None]
    if any(indices[i].dtype == BOOL for i in places):
        if len(places) == 1 and g.rank(node.args[2]) == 0:
            mask = indices[0]
            missing = g.rank(node) - g.rank(node.args[1][0])  # type: ignore[index]
            wide = g.b.op("Unsqueeze", mask, g.b.ints([-1 - i for i in range(missing)])) if missing else mask
            return g.b.op("Where", wide, values, x, dtype=x.dtype)
        raise Refused("a boolean index writes a number of values that depends on the data", site=node.name)
    if places != list(range(len(places))):
        raise Refused("index_put into axes that are not the first ones", site=node.name)
    at = _stacked(g, [indices[i] for i in places]) if len(places) > 1 else g.b.op("Unsqueeze", indices[0], g.b.ints([-1]))
    b = g.b
    rest = b.op("Shape", x, start=len(places), dtype=INT64)
    front = b.op("Shape", at, start=0, end=-1, dtype=INT64)
    wide = b.op("Expand", b.cast(values, g.kind(node)), b.op("Concat", front, rest, axis=0))
    return b.op("ScatterND", x, at, wide, reduction="add" if accumulate else "none")


@lowers("scatter.src", "scatter_add", "scatter.value", "scatter.reduce", "scatter_reduce.two")
def scatter(
    g: Lowering, node: fx.Node, x: ir.Value, dim: int, at: ir.Value, source: Any, reduce: str = "none", **kwargs: Any
) -> ir.Value:
    if not isinstance(source, ir.Value):
        source = g.b.op("Expand", operand(g, source, g.kind(node)), g.b.op("Shape", at, dtype=INT64))
    reduction = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min", "add": "add", "none": "none", "multiply": "mul"}[
        reduce
    ]
    if "scatter_add" in str(node.target):
        reduction = "add"
    return g.b.op("ScatterElements", x, at, source, axis=dim, reduction=reduction)


@lowers("select_scatter")
def select_scatter(g: Lowering, node: fx.Node, x: ir.Value, source: ir.Value, dim: int, index: int) -> ir.Value:
    source = g.b.op("Unsqueeze", source, g.b.ints([dim % g.rank(node)]))
    return _written(g, x, source, dim, index, index + 1 if index != -1 else LAST)


@lowers("slice_scatter")
def slice_scatter(
    g: Lowering, node: fx.Node, x: ir.Value, source: ir.Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> ir.Value:
    if step != 1:
        raise Refused("slice_scatter with a step", site=node.name)
    return _written(g, x, source, dim, 0 if start is None else start, LAST if end is None else end)


def _written(g: Lowering, x: ir.Value, source: ir.Value, dim: int, start: Any, end: Any) -> ir.Value:
    """x with its part [start, end) along `dim` replaced: what lies before, the part, what lies behind."""
    b, parts = g.b, [source]
    source = b.cast(source, x.dtype) if x.dtype else source
    if not (isinstance(start, int) and start == 0):
        parts.insert(0, b.op("Slice", x, b.ints([0]), b.vector(start), b.ints([dim])))
    if not (isinstance(end, int) and end >= LAST):
        parts.append(b.op("Slice", x, b.vector(end), b.ints([LAST]), b.ints([dim])))
    return parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=dim)


@lowers("topk")
def topk(
    g: Lowering, node: fx.Node, x: ir.Value, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[ir.Value, ...]:
    return _ranked(g, x, g.b.vector(k), dim, largest)


@lowers("sort", "sort.stable")
def sort(g: Lowering, node: fx.Node, x: ir.Value, *args: Any, **kwargs: Any) -> tuple[ir.Value, ...]:
    settings = [a for a in args if a is not None and not (isinstance(a, bool) and "stable" in str(node.target) and a is args[0])]
    dim = kwargs.get("dim", settings[0] if settings else -1)
    descending = kwargs.get("descending", settings[1] if len(settings) > 1 else False)
    source = node.args[0]
    count = g.size(g.dims(source)[dim], x, dim % g.rank(source))
    return _ranked(g, x, g.b.vector(count), dim, descending)


def _ranked(g: Lowering, x: ir.Value, k: ir.Value, dim: int, largest: bool) -> tuple[ir.Value, ir.Value]:
    kind = x.dtype
    values, at = g.b.ops(
        "TopK", g.b.cast(x, INT64) if kind == BOOL else x, k, outputs=2, axis=dim, largest=int(largest), sorted=1
    )
    at.dtype = INT64
    return values, at


@lowers("argsort")
def argsort(g: Lowering, node: fx.Node, x: ir.Value, dim: int = -1, descending: bool = False) -> ir.Value:
    count = g.size(g.dims(node)[dim], x, dim % g.rank(node))
    return _ranked(g, x, g.b.vector(count), dim, descending)[1]


@lowers("one_hot")
def one_hot(g: Lowering, node: fx.Node, x: ir.Value, classes: int = -1) -> ir.Value:
    b = g.b
    if classes < 0:
        raise Refused("one_hot without a number of classes", site=node.name)
    return b.op("OneHot", x, b.ints([classes]), b.ints([0, 1]), axis=-1, dtype=INT64)


@lowers("bucketize.Tensor")
def bucketize(g: Lowering, node: fx.Node, x: ir.Value, edges: ir.Value, out_int32: bool = False, right: bool = False) -> ir.Value:
    """The number of edges below each value."""
    b = g.b
    values = b.op("Unsqueeze", b.cast(x, g.kind(node.args[1])), b.ints([-1]))
    below = b.op("LessOrEqual" if right else "Less", edges, values, dtype=BOOL)
    return b.op("ReduceSum", b.cast(below, INT64), b.ints([-1]), keepdims=0)
