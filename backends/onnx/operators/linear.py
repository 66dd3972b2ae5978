"""Products of matrices: linear (dense or packed), matmul and its kin, einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from torch import fx

from lwcompile.backends.onnx.lowering import Lowering, lowers, operator_name
from lwcompile.backends.onnx.quantized import quantized_weight
from lwcompile.errors import Refused

INT64 = ir.DataType.INT64


@lowers("lwcompile.dequantize", nodes=True)
def dequantize(g: Lowering, node: fx.Node, *args: Any) -> ir.Value:
    """The dense weight, for readers that have no packed kernel; dropped again if there is none."""
    packed = quantized_weight(g.graph, node)
    if packed is None:
        raise Refused("the packed weight is computed, not stored", site=node.meta.get("path") or node.name)
    return g.quantized.dense(packed)


@lowers("linear", nodes=True)
def linear(g: Lowering, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> ir.Value:
    source, offset = g.value(x), None if bias is None else g.value(bias)
    packed = quantized_weight(g.graph, weight)
    if packed is not None:
        if (joined := _joined(g, node, source)) is not None:
            return joined
        value = g.quantized.linear(packed, source, offset, g.rank(x))
        if value is not None:
            return value
    stored = weight.op == "get_attr" and g.rank(weight) == 2
    matrix = g.transposed(weight) if stored else g.b.op("Transpose", g.value(weight), perm=[1, 0])
    value = g.b.op("MatMul", source, matrix)
    return value if offset is None else g.b.op("Add", value, offset)


def _joined(g: Lowering, node: fx.Node, source: ir.Value) -> ir.Value | None:
    """The product computed with others of the same input, which are noted as done; None where it stands alone."""
    if (found := g.joins.group(node)) is None:
        return None
    members, weight = found
    biases = [g.value(m.args[2]) for m in members if len(m.args) > 2 and m.args[2] is not None]
    bias = g.b.op("Concat", *biases, axis=0) if biases else None
    whole = g.quantized.linear(weight, source, bias, g.rank(node.args[0]))
    if whole is None:
        return None
    rows = g.b.ints([int(g.dims(m)[-1]) for m in members])  # type: ignore[arg-type]
    parts = g.b.ops("Split", whole, rows, outputs=len(members), axis=-1)
    g.values |= {m: g._typed(m, part) for m, part in zip(members, parts)}
    return g.values[node]


@lowers("matmul", "mm", "bmm", "mv", "dot")
def matmul(g: Lowering, node: fx.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    return g.b.op("MatMul", x, y)


@lowers("addmm", "baddbmm", "addbmm")
def addmm(g: Lowering, node: fx.Node, bias: ir.Value, x: ir.Value, y: ir.Value, *, beta: float = 1, alpha: float = 1) -> ir.Value:
    b = g.b
    if operator_name(node) == "addbmm":
        raise Refused("addbmm", site=node.name)
    product = b.op("MatMul", x, y)
    product = product if alpha == 1 else b.op("Mul", product, b.scalar(float(alpha), product))
    if beta == 0:
        return product
    return b.op("Add", bias if beta == 1 else b.op("Mul", bias, b.scalar(float(beta), bias)), product)


@lowers("einsum")
def einsum(g: Lowering, node: fx.Node, equation: str, parts: Sequence[ir.Value], **kwargs: Any) -> ir.Value:
    return g.b.op("Einsum", *parts, equation=equation)


@lowers("transformers.grouped_mm_fallback", "_grouped_mm")
def grouped_matmul(
    g: Lowering, node: fx.Node, x: ir.Value, weights: ir.Value, ends: ir.Value, *args: Any, **kwargs: Any
) -> ir.Value:
    """x [T, K], its rows sorted by expert; weights [E, K, N]; ends [E]: expert e has the rows before ends[e].

    Every expert multiplies every row, and each row keeps its own expert's product: right at any routing, at E times the work.
    """
    b = g.b
    rows = b.op("Range", b.point(0), b.point(g.size(g.dims(node.args[0])[0], x, 0)), b.point(1), dtype=INT64)
    before = b.op("LessOrEqual", b.cast(ends, INT64), b.op("Unsqueeze", rows, b.ints([1])), dtype=ir.DataType.BOOL)
    expert = b.op("ReduceSum", b.cast(before, INT64), b.ints([1]), keepdims=1)
    products = b.op("MatMul", b.op("Unsqueeze", x, b.ints([0])), weights)
    return b.op("GatherND", products, b.op("Concat", expert, b.op("Unsqueeze", rows, b.ints([1])), axis=1))
