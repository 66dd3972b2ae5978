"""Arithmetic on sizes: `sym_size` and Python's operators on what it returns. Numbers fold; the rest is int64 of one element."""

from __future__ import annotations

import operator
from typing import Any

import onnx_ir as ir
from torch import fx

from lwcompile.backends.onnx.builder import Size
from lwcompile.backends.onnx.lowering import Lowering, lowers
from lwcompile.errors import Refused

INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT

_KINDS = {"add": "Add", "sub": "Sub", "mul": "Mul", "sym_max": "Max", "sym_min": "Min", "max": "Max", "min": "Min", "mod": "Mod"}


@lowers("sym_size.int")
def sym_size(g: Lowering, node: fx.Node, x: ir.Value, dim: int) -> int | Size:
    return g.size(g.dims(node.args[0])[dim], x, dim % g.rank(node.args[0]))


@lowers("sym_numel")
def sym_numel(g: Lowering, node: fx.Node, x: ir.Value) -> Size:
    return Size(g.b.op("Reshape", g.b.op("Size", x, dtype=INT64), g.b.ints([1])))


@lowers(*(f"size.{name}" for name in _KINDS))
def arithmetic(g: Lowering, node: fx.Node, x: Any, y: Any) -> Size:
    name = getattr(node.target, "__name__", "")
    kind = FLOAT if any(isinstance(v, float) or (isinstance(v, Size) and v.value.dtype == FLOAT) for v in (x, y)) else INT64
    return Size(g.b.op(_KINDS[name], g.b.vector(x, kind), g.b.vector(y, kind)))


@lowers("size.floordiv")
def floordiv(g: Lowering, node: fx.Node, x: Any, y: Any) -> Size:
    """Rounds down: integer division in ONNX truncates, which differs for a negative numerator."""
    b = g.b
    left, right = b.vector(x), b.vector(y)
    return Size(b.op("Div", b.op("Sub", left, b.op("Mod", left, right)), right))


@lowers("size.truediv")
def truediv(g: Lowering, node: fx.Node, x: Any, y: Any) -> Size:
    return Size(g.b.op("Div", g.b.vector(x, FLOAT), g.b.vector(y, FLOAT)))


@lowers("size.neg")
def negative(g: Lowering, node: fx.Node, x: Size) -> Size:
    return Size(g.b.op("Neg", x.value))


@lowers("size.sym_float")
def as_float(g: Lowering, node: fx.Node, x: Size) -> Size:
    return Size(g.b.cast(x.value, FLOAT))


@lowers("size.sym_int", "size.trunc")
def as_int(g: Lowering, node: fx.Node, x: Size) -> Size:
    return Size(g.b.cast(x.value, INT64))


@lowers("size.ceil", "size.floor")
def rounded(g: Lowering, node: fx.Node, x: Size) -> Size:
    if x.value.dtype == INT64:
        return x
    kind = "Ceil" if getattr(node.target, "__name__", "") == "ceil" else "Floor"
    return Size(g.b.cast(g.b.op(kind, x.value), INT64))


@lowers("size.sym_sqrt", "size.sqrt", "size._sym_sqrt")
def root(g: Lowering, node: fx.Node, x: Size) -> Size:
    return Size(g.b.op("Sqrt", g.b.cast(x.value, FLOAT)))


@lowers("size.pow")
def power(g: Lowering, node: fx.Node, x: Any, y: Any) -> Size:
    kind = FLOAT if isinstance(y, float) else INT64
    return Size(g.b.op("Pow", g.b.vector(x, kind), g.b.vector(y, kind)))


@lowers("size.sym_sum")
def total(g: Lowering, node: fx.Node, items: list[Any]) -> Size:
    value = g.b.vector(items[0])
    for item in items[1:]:
        value = g.b.op("Add", value, g.b.vector(item))
    return Size(value)


@lowers("size.getitem")
def getitem(g: Lowering, node: fx.Node, items: Any, index: int) -> Any:
    return operator.getitem(items, index)


@lowers(*(f"size.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "sym_ite", "sym_not")))
def branch(g: Lowering, node: fx.Node, *args: Any) -> Any:
    raise Refused("what it computes depends on a comparison of free sizes", site=node.meta.get("path") or node.name)
