"""Elementwise operators: arithmetic, comparisons, activations, casts, with torch's promotion of types."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from lwcompile.backends.onnx.builder import MICROSOFT, Size, onnx_dtype
from lwcompile.backends.onnx.lowering import Lowering, lowers
from lwcompile.errors import Refused

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

UNARY = {
    "abs": "Abs", "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tan": "Tan",
    "tanh": "Tanh", "sigmoid": "Sigmoid", "relu": "Relu", "floor": "Floor", "ceil": "Ceil", "round": "Round", "sign": "Sign",
    "erf": "Erf", "reciprocal": "Reciprocal", "atan": "Atan", "asin": "Asin", "acos": "Acos", "sinh": "Sinh", "cosh": "Cosh",
    "selu": "Selu", "softsign": "Softsign", "mish": "Mish",
}  # fmt: skip

BINARY = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "multiply": "Mul", "div": "Div", "divide": "Div", "true_divide": "Div",
    "pow": "Pow", "minimum": "Min", "maximum": "Max", "min": "Min", "max": "Max",
}  # fmt: skip

COMPARISONS = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}

LOGIC = {"and": ("And", "BitwiseAnd"), "or": ("Or", "BitwiseOr"), "xor": ("Xor", "BitwiseXor")}


def operand(l: Lowering, item: Any, kind: ir.DataType) -> ir.Value:
    """A tensor, number or size as a tensor of this dtype; numbers have rank 0."""
    return l.b.cast(item, kind) if isinstance(item, ir.Value) else l.b.point(item, kind)


def promoted(l: Lowering, *items: Any) -> ir.DataType:
    """The dtype torch computes with: of nodes by their tensors, of numbers by their kind."""
    examples: list[Any] = []
    for item in items:
        if isinstance(item, fx.Node) and item in l.extents.dtypes:
            examples.append(torch.empty((1,) * l.rank(item), dtype=l.dtype(item)))
        elif isinstance(item, fx.Node):
            examples.append(1)
        else:
            examples.append(item)
    dtype = examples[0].dtype if isinstance(examples[0], torch.Tensor) else torch.result_type(*examples[:2])
    for example in examples[1:]:
        dtype = torch.result_type(torch.empty((1,) * 4, dtype=dtype) if len(examples) > 2 else examples[0], example)
    return onnx_dtype(dtype)


@lowers(*UNARY)
def unary(l: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    return l.b.op(UNARY[name], l.b.cast(x, l.kind(node)))


@lowers(*(f"{name}.{kind}" for name in BINARY for kind in ("Tensor", "Scalar", "other", "Tensor_Tensor", "Tensor_Scalar")),
        "minimum", "maximum", "pow.Scalar", "rsub.Scalar", "rsub.Tensor")  # fmt: skip
def binary(l: Lowering, node: fx.Node, x: Any, y: Any, alpha: Any = 1) -> ir.Value:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    if name == "rsub":
        name, x, y = "sub", y, x
    kind = l.kind(node)
    if name == "pow":
        return power(l, operand(l, x, kind), y, kind)
    if name in ("add", "sub") and alpha == 1 and not isinstance(y, ir.Value | Size) and y == 0:
        return l.b.cast(x, kind)
    left, right = operand(l, x, kind), operand(l, y, kind)
    if alpha != 1:
        right = l.b.op("Mul", right, operand(l, alpha, kind))
    if kind == BOOL:
        return l.b.op({"add": "Or", "mul": "And", "max": "Or", "min": "And"}[name], left, right)
    return l.b.op(BINARY[name], left, right)


def power(l: Lowering, x: ir.Value, exponent: Any, kind: ir.DataType) -> ir.Value:
    if exponent == 2:
        return l.b.op("Mul", x, x)
    if exponent == 3:
        return l.b.op("Mul", l.b.op("Mul", x, x), x)
    if exponent == 0.5:
        return l.b.op("Sqrt", x)
    if exponent == -0.5:
        return l.b.op("Reciprocal", l.b.op("Sqrt", x))
    return l.b.op("Pow", x, operand(l, exponent, kind))


@lowers("div.Tensor_mode", "div.Scalar_mode")
def rounded_division(l: Lowering, node: fx.Node, x: Any, y: Any, rounding_mode: str | None = None) -> ir.Value:
    if rounding_mode == "floor":
        return floor_divide(l, node, x, y)
    kind = l.kind(node)
    quotient = l.b.op("Div", operand(l, x, kind), operand(l, y, kind))
    if rounding_mode is None or kind not in _FLOATS:
        return quotient
    return l.b.op("Mul", l.b.op("Sign", quotient), l.b.op("Floor", l.b.op("Abs", quotient)))


@lowers("floor_divide", "floor_divide.Scalar")
def floor_divide(l: Lowering, node: fx.Node, x: Any, y: Any) -> ir.Value:
    b, kind = l.b, l.kind(node)
    left, right = operand(l, x, kind), operand(l, y, kind)
    if kind in _FLOATS:
        return b.op("Floor", b.op("Div", left, right))
    return b.op("Div", b.op("Sub", left, b.op("Mod", left, right)), right)


@lowers("remainder.Tensor", "remainder.Scalar", "fmod.Tensor", "fmod.Scalar")
def remainder(l: Lowering, node: fx.Node, x: Any, y: Any) -> ir.Value:
    b, kind = l.b, l.kind(node)
    left, right = operand(l, x, kind), operand(l, y, kind)
    if "fmod" in str(node.target):
        return b.op("Mod", left, right, fmod=1)
    if kind not in _FLOATS:
        return b.op("Mod", left, right)
    return b.op("Sub", left, b.op("Mul", b.op("Floor", b.op("Div", left, right)), right))


@lowers(*(f"{name}.{kind}" for name in (*COMPARISONS, "ne") for kind in ("Tensor", "Scalar")))
def comparison(l: Lowering, node: fx.Node, x: Any, y: Any) -> ir.Value:
    kind = promoted(l, *node.args)
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    if kind == BOOL and name not in ("eq", "ne"):
        kind = ir.DataType.INT32
    left, right = operand(l, x, kind), operand(l, y, kind)
    if name == "ne":
        return l.b.op("Not", l.b.op("Equal", left, right, dtype=BOOL))
    return l.b.op(COMPARISONS[name], left, right, dtype=BOOL)


@lowers(*(f"{prefix}{name}{suffix}" for name in LOGIC for prefix, suffix in (("bitwise_", ".Tensor"), ("bitwise_", ".Scalar"),
        ("logical_", ""), ("__", "__.Tensor"), ("__", "__.Scalar"))))  # fmt: skip
def logic(l: Lowering, node: fx.Node, x: Any, y: Any) -> ir.Value:
    name = node.target._schema.name.removeprefix("aten::").removeprefix("bitwise_").removeprefix("logical_").strip("_")  # type: ignore[union-attr]
    kind = l.kind(node)
    return l.b.op(LOGIC[name][kind != BOOL], truth(l, x, kind), truth(l, y, kind))


def truth(l: Lowering, x: Any, kind: ir.DataType) -> ir.Value:
    return operand(l, x, kind)


@lowers("logical_not", "bitwise_not")
def logical_not(l: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    if x.dtype == BOOL or "logical" in str(node.target):
        return l.b.op("Not", l.b.cast(x, BOOL))
    return l.b.op("BitwiseNot", x)


@lowers("isnan")
def isnan(l: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return l.b.op("IsNaN", x, dtype=BOOL)


@lowers("isinf")
def isinf(l: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return l.b.op("IsInf", x, dtype=BOOL)


@lowers("rsqrt")
def rsqrt(l: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return l.b.op("Reciprocal", l.b.op("Sqrt", l.b.cast(x, l.kind(node))))


@lowers("square")
def square(l: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return l.b.op("Mul", x, x)


@lowers("log1p", "expm1", "log2", "log10")
def shifted(l: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    b, name, x = l.b, str(node.target), l.b.cast(x, l.kind(node))
    if "log1p" in name:
        return b.op("Log", b.op("Add", x, b.scalar(1.0, x)))
    if "expm1" in name:
        return b.op("Sub", b.op("Exp", x), b.scalar(1.0, x))
    return b.op("Mul", b.op("Log", x), b.scalar(1 / math.log(2 if "log2" in name else 10), x))


# --- choice and limits


@lowers("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(l: Lowering, node: fx.Node, condition: ir.Value, x: Any, y: Any) -> ir.Value:
    kind = l.kind(node)
    return l.b.op("Where", l.b.cast(condition, BOOL), operand(l, x, kind), operand(l, y, kind), dtype=kind)


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(l: Lowering, node: fx.Node, x: ir.Value, mask: ir.Value, value: Any) -> ir.Value:
    return l.b.op("Where", l.b.cast(mask, BOOL), operand(l, value, l.kind(node)), x, dtype=l.kind(node))


@lowers("clamp", "clamp.Tensor", "hardtanh", "clip")
def clamp(l: Lowering, node: fx.Node, x: ir.Value, low: Any = None, high: Any = None) -> ir.Value:
    kind = l.kind(node)
    if "hardtanh" in str(node.target):
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    x = l.b.cast(x, kind)
    if low is not None:
        x = l.b.op("Max", x, operand(l, low, kind))
    return x if high is None else l.b.op("Min", x, operand(l, high, kind))


@lowers("clamp_min", "clamp_min.Tensor")
def clamp_min(l: Lowering, node: fx.Node, x: ir.Value, low: Any) -> ir.Value:
    return clamp(l, node, x, low)


@lowers("clamp_max", "clamp_max.Tensor")
def clamp_max(l: Lowering, node: fx.Node, x: ir.Value, high: Any) -> ir.Value:
    return clamp(l, node, x, None, high)


# --- activations


@lowers("silu")
def silu(l: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return l.b.op("Mul", x, l.b.op("Sigmoid", x))


@lowers("gelu")
def gelu(l: Lowering, node: fx.Node, x: ir.Value, approximate: str = "none") -> ir.Value:
    return l.b.op("Gelu", x, approximate=approximate)


@lowers("leaky_relu")
def leaky_relu(l: Lowering, node: fx.Node, x: ir.Value, slope: float = 0.01) -> ir.Value:
    return l.b.op("LeakyRelu", x, alpha=float(slope))


@lowers("elu")
def elu(l: Lowering, node: fx.Node, x: ir.Value, alpha: float = 1.0, scale: float = 1, input_scale: float = 1) -> ir.Value:
    if (scale, input_scale) != (1, 1):
        raise Refused("elu with scales", site=node.name)
    return l.b.op("Elu", x, alpha=float(alpha))


@lowers("softplus")
def softplus(l: Lowering, node: fx.Node, x: ir.Value, beta: float = 1, threshold: float = 20) -> ir.Value:
    b, scaled = l.b, x if beta == 1 else l.b.op("Mul", x, l.b.scalar(float(beta), x))
    soft = b.op("Softplus", scaled)
    soft = soft if beta == 1 else b.op("Div", soft, b.scalar(float(beta), x))
    return b.op("Where", b.op("Greater", scaled, b.scalar(float(threshold), x), dtype=BOOL), x, soft, dtype=x.dtype)


@lowers("hardsigmoid")
def hardsigmoid(l: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return l.b.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


@lowers("hardswish")
def hardswish(l: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return l.b.op("HardSwish", x)


@lowers("log_sigmoid")
def log_sigmoid(l: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return l.b.op("Neg", l.b.op("Softplus", l.b.op("Neg", x)))


@lowers("prelu")
def prelu(l: Lowering, node: fx.Node, x: ir.Value, weight: ir.Value) -> ir.Value:
    if l.dims(node.args[1]) != (1,):
        weight = l.b.op("Reshape", weight, l.b.ints([-1] + [1] * (l.rank(node) - 2)))
    return l.b.op("PRelu", x, weight)


@lowers("glu")
def glu(l: Lowering, node: fx.Node, x: ir.Value, dim: int = -1) -> ir.Value:
    value, gate = l.b.ops("Split", x, outputs=2, axis=dim, num_outputs=2)
    return l.b.op("Mul", value, l.b.op("Sigmoid", gate))


# --- casts and copies


@lowers("_to_copy", "type_as", "to.dtype", "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "copy", "dropout")
def copy(l: Lowering, node: fx.Node, x: ir.Value, *args: Any, **kwargs: Any) -> ir.Value:
    if str(node.target) == "aten.copy.default":
        source = l.b.cast(args[0], l.kind(node))
        dims = l.dims(node)
        return source if l.dims(node.args[1]) == dims else l.b.op("Expand", source, l.b.shape(l.sizes(node, x)))
    return l.b.cast(x, l.kind(node))


@lowers("addcmul")
def addcmul(l: Lowering, node: fx.Node, x: ir.Value, a: ir.Value, c: ir.Value, value: float = 1) -> ir.Value:
    product = l.b.op("Mul", a, c)
    return l.b.op("Add", x, product if value == 1 else l.b.op("Mul", product, l.b.scalar(value, product)))


@lowers("lerp.Scalar", "lerp.Tensor")
def lerp(l: Lowering, node: fx.Node, x: ir.Value, y: ir.Value, weight: Any) -> ir.Value:
    return l.b.op("Add", x, l.b.op("Mul", l.b.op("Sub", y, x), operand(l, weight, l.kind(node))))


_ = MICROSOFT, INT64, FLOAT
