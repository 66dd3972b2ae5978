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
def sym_size(l: Lowering, node: fx.Node, x: ir.Value, dim: int) -> int | Size:
    return l.size(l.dims(node.args[0])[dim], x, dim % l.rank(node.args[0]))


@lowers("sym_numel")
def sym_numel(l: Lowering, node: fx.Node, x: ir.Value) -> Size:
    return Size(l.b.op("Reshape", l.b.op("Size", x, dtype=INT64), l.b.ints([1])))


@lowers(*(f"size.{name}" for name in _KINDS))
def arithmetic(l: Lowering, node: fx.Node, x: Any, y: Any) -> Size:
    name = getattr(node.target, "__name__", "")
    kind = FLOAT if any(isinstance(v, float) or (isinstance(v, Size) and v.value.dtype == FLOAT) for v in (x, y)) else INT64
    return Size(l.b.op(_KINDS[name], l.b.vector(x, kind), l.b.vector(y, kind)))


@lowers("size.floordiv")
def floordiv(l: Lowering, node: fx.Node, x: Any, y: Any) -> Size:
    """Rounds down: integer division in ONNX truncates, which differs for a negative numerator."""
    b = l.b
    left, right = b.vector(x), b.vector(y)
    return Size(b.op("Div", b.op("Sub", left, b.op("Mod", left, right)), right))


@lowers("size.truediv")
def truediv(l: Lowering, node: fx.Node, x: Any, y: Any) -> Size:
    return Size(l.b.op("Div", l.b.vector(x, FLOAT), l.b.vector(y, FLOAT)))


@lowers("size.neg")
def negative(l: Lowering, node: fx.Node, x: Size) -> Size:
    return Size(l.b.op("Neg", x.value))


@lowers("size.sym_float")
def as_float(l: Lowering, node: fx.Node, x: Size) -> Size:
    return Size(l.b.cast(x.value, FLOAT))


@lowers("size.sym_int", "size.trunc")
def as_int(l: Lowering, node: fx.Node, x: Size) -> Size:
    return Size(l.b.cast(x.value, INT64))


@lowers("size.ceil", "size.floor")
def rounded(l: Lowering, node: fx.Node, x: Size) -> Size:
    if x.value.dtype == INT64:
        return x
    kind = "Ceil" if getattr(node.target, "__name__", "") == "ceil" else "Floor"
    return Size(l.b.cast(l.b.op(kind, x.value), INT64))


@lowers("size.sym_sqrt", "size.sqrt", "size._sym_sqrt")
def root(l: Lowering, node: fx.Node, x: Size) -> Size:
    return Size(l.b.op("Sqrt", l.b.cast(x.value, FLOAT)))


@lowers("size.pow")
def power(l: Lowering, node: fx.Node, x: Any, y: Any) -> Size:
    kind = FLOAT if isinstance(y, float) else INT64
    return Size(l.b.op("Pow", l.b.vector(x, kind), l.b.vector(y, kind)))


@lowers("size.sym_sum")
def total(l: Lowering, node: fx.Node, items: list[Any]) -> Size:
    value = l.b.vector(items[0])
    for item in items[1:]:
        value = l.b.op("Add", value, l.b.vector(item))
    return Size(value)


@lowers("size.getitem")
def getitem(l: Lowering, node: fx.Node, items: Any, index: int) -> Any:
    return operator.getitem(items, index)


@lowers(*(f"size.{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "sym_ite", "sym_not")))
def branch(l: Lowering, node: fx.Node, *args: Any) -> Any:
    raise Refused("what it computes depends on a comparison of free sizes", site=node.meta.get("path") or node.name)
