"""Tensors out of nothing: `arange`, `zeros`, `full` and their likes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import fx

from lwcompile.backends.onnx.builder import Size
from lwcompile.backends.onnx.lowering import Lowering, lowers
from lwcompile.backends.onnx.operators.elementwise import operand

INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


@lowers("arange")
def arange_end(g: Lowering, node: fx.Node, end: Any, **kwargs: Any) -> ir.Value:
    return arange(g, node, 0, end)


@lowers("arange.start", "arange.start_step")
def arange(g: Lowering, node: fx.Node, start: Any, end: Any, step: Any = 1, **kwargs: Any) -> ir.Value:
    """Computed in the widest type of its kind: a Range in float32 would count wrong past 2**24."""
    fractional = any(isinstance(v, float) for v in (start, end, step))
    kind = FLOAT if fractional else INT64
    value = g.b.op("Range", *(g.b.point(v, kind) for v in (start, end, step)), dtype=kind)
    return g.b.cast(value, g.kind(node))


def filled(g: Lowering, node: fx.Node, number: Any, sizes: list[int | Size]) -> ir.Value:
    kind = g.kind(node)
    if isinstance(number, ir.Value | Size):
        return g.b.op("Expand", operand(g, number, kind), g.b.shape(sizes))
    if not sizes:
        return g.b.constant(number, kind)
    return g.b.op("Expand", g.b.constant(number, kind), g.b.shape(sizes))


@lowers("zeros", "new_zeros", "ones", "new_ones", "full", "new_full", "empty.memory_format", "new_empty")
def of_sizes(g: Lowering, node: fx.Node, *args: Any, **kwargs: Any) -> ir.Value:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    sizes, *rest = args[1:] if name.startswith("new_") else args
    number = 1 if "ones" in name else rest[0] if "full" in name else 0
    return filled(g, node, number, list(sizes))


@lowers("zeros_like", "ones_like", "full_like", "empty_like", "fill.Scalar", "fill.Tensor")
def like(g: Lowering, node: fx.Node, x: ir.Value, *args: Any, **kwargs: Any) -> ir.Value:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    number = 1 if "ones" in name else args[0] if name in ("full_like", "fill") else 0
    return filled(g, node, number, g.sizes(node, x))


@lowers("scalar_tensor")
def scalar_tensor(g: Lowering, node: fx.Node, number: Any, **kwargs: Any) -> ir.Value:
    return g.b.point(number, g.kind(node))


@lowers("triu", "tril")
def triangle(g: Lowering, node: fx.Node, x: ir.Value, diagonal: int = 0) -> ir.Value:
    return g.b.op("Trilu", x, g.b.point(diagonal), upper=int("triu" in str(node.target)))


@lowers("linspace")
def linspace(g: Lowering, node: fx.Node, start: float, end: float, steps: int, **kwargs: Any) -> ir.Value:
    step = (end - start) / (steps - 1) if steps > 1 else 0.0
    return g.b.constant([start + i * step for i in range(steps)], g.kind(node))
