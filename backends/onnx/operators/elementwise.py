"""Elementwise operators: arithmetic, comparisons, activations, casts, with torch's promotion of types."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from lwcompile.backends.onnx.builder import Size, onnx_dtype
from lwcompile.backends.onnx.lowering import Lowering, lowers
from lwcompile.errors import Refused

BOOL = ir.DataType.BOOL
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


def operand(g: Lowering, item: Any, kind: ir.DataType) -> ir.Value:
    """A tensor, number or size as a tensor of this dtype; numbers have rank 0."""
    return g.b.cast(item, kind) if isinstance(item, ir.Value) else g.b.point(item, kind)


def promoted(g: Lowering, *items: Any) -> ir.DataType:
    """The dtype torch computes with: of nodes by their tensors, of numbers by their kind."""
    examples: list[Any] = []
    for item in items:
        if isinstance(item, fx.Node) and item in g.extents.dtypes:
            examples.append(torch.empty((1,) * g.rank(item), dtype=g.dtype(item)))
        elif isinstance(item, fx.Node):
            examples.append(1)
        else:
            examples.append(item)
    dtype = examples[0].dtype if isinstance(examples[0], torch.Tensor) else torch.result_type(*examples[:2])
    for example in examples[1:]:
        dtype = torch.result_type(torch.empty((1,) * 4, dtype=dtype) if len(examples) > 2 else examples[0], example)
    return onnx_dtype(dtype)


@lowers(*UNARY)
def unary(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    return g.b.op(UNARY[name], g.b.cast(x, g.kind(node)))


@lowers(*(f"{name}.{kind}" for name in BINARY for kind in ("Tensor", "Scalar", "other", "Tensor_Tensor", "Tensor_Scalar")),
        "minimum", "maximum", "pow.Scalar", "rsub.Scalar", "rsub.Tensor")  # fmt: skip
def binary(g: Lowering, node: fx.Node, x: Any, y: Any, alpha: Any = 1) -> ir.Value:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    if name == "rsub":
        name, x, y = "sub", y, x
    kind = g.kind(node)
    if name == "pow":
        return power(g, operand(g, x, kind), y, kind)
    if name in ("add", "sub") and alpha == 1 and not isinstance(y, ir.Value | Size) and y == 0:
        return g.b.cast(x, kind)
    left, right = operand(g, x, kind), operand(g, y, kind)
    if alpha != 1:
        right = g.b.op("Mul", right, operand(g, alpha, kind))
    if kind == BOOL:
        return g.b.op({"add": "Or", "mul": "And", "max": "Or", "min": "And"}[name], left, right)
    return g.b.op(BINARY[name], left, right)


def power(g: Lowering, x: ir.Value, exponent: Any, kind: ir.DataType) -> ir.Value:
    if exponent == 2:
        return g.b.op("Mul", x, x)
    if exponent == 3:
        return g.b.op("Mul", g.b.op("Mul", x, x), x)
    if exponent == 0.5:
        return g.b.op("Sqrt", x)
    if exponent == -0.5:
        return g.b.op("Reciprocal", g.b.op("Sqrt", x))
    return g.b.op("Pow", x, operand(g, exponent, kind))


@lowers("div.Tensor_mode", "div.Scalar_mode")
def rounded_division(g: Lowering, node: fx.Node, x: Any, y: Any, rounding_mode: str | None = None) -> ir.Value:
    if rounding_mode == "floor":
        return floor_divide(g, node, x, y)
    kind = g.kind(node)
    quotient = g.b.op("Div", operand(g, x, kind), operand(g, y, kind))
    if rounding_mode is None or kind not in _FLOATS:
        return quotient
    return g.b.op("Mul", g.b.op("Sign", quotient), g.b.op("Floor", g.b.op("Abs", quotient)))


@lowers("floor_divide", "floor_divide.Scalar")
def floor_divide(g: Lowering, node: fx.Node, x: Any, y: Any) -> ir.Value:
    b, kind = g.b, g.kind(node)
    left, right = operand(g, x, kind), operand(g, y, kind)
    if kind in _FLOATS:
        return b.op("Floor", b.op("Div", left, right))
    return b.op("Div", b.op("Sub", left, b.op("Mod", left, right)), right)


@lowers("remainder.Tensor", "remainder.Scalar", "fmod.Tensor", "fmod.Scalar")
def remainder(g: Lowering, node: fx.Node, x: Any, y: Any) -> ir.Value:
    b, kind = g.b, g.kind(node)
    left, right = operand(g, x, kind), operand(g, y, kind)
    if "fmod" in str(node.target):
        return b.op("Mod", left, right, fmod=1)
    if kind not in _FLOATS:
        return b.op("Mod", left, right)
    return b.op("Sub", left, b.op("Mul", b.op("Floor", b.op("Div", left, right)), right))


@lowers(*(f"{name}.{kind}" for name in (*COMPARISONS, "ne") for kind in ("Tensor", "Scalar")))
def comparison(g: Lowering, node: fx.Node, x: Any, y: Any) -> ir.Value:
    kind = promoted(g, *node.args)
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    if kind == BOOL and name not in ("eq", "ne"):
        kind = ir.DataType.INT32
    left, right = operand(g, x, kind), operand(g, y, kind)
    if name == "ne":
        return g.b.op("Not", g.b.op("Equal", left, right, dtype=BOOL))
    return g.b.op(COMPARISONS[name], left, right, dtype=BOOL)


@lowers(*(f"{prefix}{name}{suffix}" for name in LOGIC for prefix, suffix in (("bitwise_", ".Tensor"), ("bitwise_", ".Scalar"),
        ("logical_", ""), ("__", "__.Tensor"), ("__", "__.Scalar"))))  # fmt: skip
def logic(g: Lowering, node: fx.Node, x: Any, y: Any) -> ir.Value:
    name = node.target._schema.name.removeprefix("aten::").removeprefix("bitwise_").removeprefix("logical_").strip("_")  # type: ignore[union-attr]
    kind = g.kind(node)
    return g.b.op(LOGIC[name][kind != BOOL], truth(g, x, kind), truth(g, y, kind))


def truth(g: Lowering, x: Any, kind: ir.DataType) -> ir.Value:
    return operand(g, x, kind)


@lowers("logical_not", "bitwise_not")
def logical_not(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    if x.dtype == BOOL or "logical" in str(node.target):
        return g.b.op("Not", g.b.cast(x, BOOL))
    return g.b.op("BitwiseNot", x)


@lowers("isnan")
def isnan(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return g.b.op("IsNaN", x, dtype=BOOL)


@lowers("isinf")
def isinf(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return g.b.op("IsInf", x, dtype=BOOL)


@lowers("rsqrt")
def rsqrt(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return g.b.op("Reciprocal", g.b.op("Sqrt", g.b.cast(x, g.kind(node))))


@lowers("square")
def square(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return g.b.op("Mul", x, x)


@lowers("log1p", "expm1", "log2", "log10")
def shifted(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    b, name, x = g.b, str(node.target), g.b.cast(x, g.kind(node))
    if "log1p" in name:
        return b.op("Log", b.op("Add", x, b.scalar(1.0, x)))
    if "expm1" in name:
        return b.op("Sub", b.op("Exp", x), b.scalar(1.0, x))
    return b.op("Mul", b.op("Log", x), b.scalar(1 / math.log(2 if "log2" in name else 10), x))


# --- choice and limits


@lowers("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(g: Lowering, node: fx.Node, condition: ir.Value, x: Any, y: Any) -> ir.Value:
    kind = g.kind(node)
    return g.b.op("Where", g.b.cast(condition, BOOL), operand(g, x, kind), operand(g, y, kind), dtype=kind)


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(g: Lowering, node: fx.Node, x: ir.Value, mask: ir.Value, value: Any) -> ir.Value:
    return g.b.op("Where", g.b.cast(mask, BOOL), operand(g, value, g.kind(node)), x, dtype=g.kind(node))


@lowers("clamp", "clamp.Tensor", "hardtanh", "clip")
def clamp(g: Lowering, node: fx.Node, x: ir.Value, low: Any = None, high: Any = None) -> ir.Value:
    kind = g.kind(node)
    if "hardtanh" in str(node.target):
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    x = g.b.cast(x, kind)
    if low is not None:
        x = g.b.op("Max", x, operand(g, low, kind))
    return x if high is None else g.b.op("Min", x, operand(g, high, kind))


@lowers("clamp_min", "clamp_min.Tensor")
def clamp_min(g: Lowering, node: fx.Node, x: ir.Value, low: Any) -> ir.Value:
    return clamp(g, node, x, low)


@lowers("clamp_max", "clamp_max.Tensor")
def clamp_max(g: Lowering, node: fx.Node, x: ir.Value, high: Any) -> ir.Value:
    return clamp(g, node, x, None, high)


# --- activations


@lowers("silu")
def silu(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return g.b.op("Mul", x, g.b.op("Sigmoid", x))


@lowers("gelu")
def gelu(g: Lowering, node: fx.Node, x: ir.Value, approximate: str = "none") -> ir.Value:
    return g.b.op("Gelu", x, approximate=approximate)


@lowers("leaky_relu")
def leaky_relu(g: Lowering, node: fx.Node, x: ir.Value, slope: float = 0.01) -> ir.Value:
    return g.b.op("LeakyRelu", x, alpha=float(slope))


@lowers("elu")
def elu(g: Lowering, node: fx.Node, x: ir.Value, alpha: float = 1.0, scale: float = 1, input_scale: float = 1) -> ir.Value:
    if (scale, input_scale) != (1, 1):
        raise Refused("elu with scales", site=node.name)
    return g.b.op("Elu", x, alpha=float(alpha))


@lowers("softplus")
def softplus(g: Lowering, node: fx.Node, x: ir.Value, beta: float = 1, threshold: float = 20) -> ir.Value:
    b, scaled = g.b, x if beta == 1 else g.b.op("Mul", x, g.b.scalar(float(beta), x))
    soft = b.op("Softplus", scaled)
    soft = soft if beta == 1 else b.op("Div", soft, b.scalar(float(beta), x))
    return b.op("Where", b.op("Greater", scaled, b.scalar(float(threshold), x), dtype=BOOL), x, soft, dtype=x.dtype)


@lowers("hardsigmoid")
def hardsigmoid(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return g.b.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


@lowers("hardswish")
def hardswish(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return g.b.op("HardSwish", x)


@lowers("log_sigmoid")
def log_sigmoid(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return g.b.op("Neg", g.b.op("Softplus", g.b.op("Neg", x)))


@lowers("prelu")
def prelu(g: Lowering, node: fx.Node, x: ir.Value, weight: ir.Value) -> ir.Value:
    if g.dims(node.args[1]) != (1,):
        weight = g.b.op("Reshape", weight, g.b.ints([-1] + [1] * (g.rank(node) - 2)))
    return g.b.op("PRelu", x, weight)


@lowers("glu")
def glu(g: Lowering, node: fx.Node, x: ir.Value, dim: int = -1) -> ir.Value:
    value, gate = g.b.ops("Split", x, outputs=2, axis=dim, num_outputs=2)
    return g.b.op("Mul", value, g.b.op("Sigmoid", gate))


# --- casts and copies


@lowers("_to_copy", "type_as", "to.dtype", "clone", "contiguous", "detach", "alias", "lift_fresh_copy", "copy", "dropout")
def copy(g: Lowering, node: fx.Node, x: ir.Value, *args: Any, **kwargs: Any) -> ir.Value:
    if str(node.target) == "aten.copy.default":
        source = g.b.cast(args[0], g.kind(node))
        dims = g.dims(node)
        return source if g.dims(node.args[1]) == dims else g.b.op("Expand", source, g.b.shape(g.sizes(node, x)))
    return g.b.cast(x, g.kind(node))


@lowers("addcmul")
def addcmul(g: Lowering, node: fx.Node, x: ir.Value, a: ir.Value, c: ir.Value, value: float = 1) -> ir.Value:
    product = g.b.op("Mul", a, c)
    return g.b.op("Add", x, product if value == 1 else g.b.op("Mul", product, g.b.scalar(value, product)))


@lowers("lerp.Scalar", "lerp.Tensor")
def lerp(g: Lowering, node: fx.Node, x: ir.Value, y: ir.Value, weight: Any) -> ir.Value:
    return g.b.op("Add", x, g.b.op("Mul", g.b.op("Sub", y, x), operand(g, weight, g.kind(node))))
