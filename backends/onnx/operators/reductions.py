"""Reductions, softmax, cumulative sums, norms over axes, and the normalising operators, whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from lwcompile.backends.onnx.builder import MICROSOFT
from lwcompile.backends.onnx.lowering import Lowering, fuses, lowers
from lwcompile.errors import Refused

INT64, BOOL, INT32, FLOAT = ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.FLOAT

REDUCTIONS = {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin", "prod": "ReduceProd",
              "logsumexp": "ReduceLogSumExp", "max": "ReduceMax", "min": "ReduceMin"}  # fmt: skip


def axes(g: Lowering, dims: Any) -> ir.Value | None:
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return None
    return g.b.ints([dims] if isinstance(dims, int) else list(dims))


@lowers("sum", "sum.dim_IntList", "mean", "mean.dim", "amax", "amin", "prod", "prod.dim_int", "logsumexp", "max", "min")
def reduction(g: Lowering, node: fx.Node, x: ir.Value, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> ir.Value:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    return g.b.op(REDUCTIONS[name], g.b.cast(x, g.kind(node)), axes(g, dims), keepdims=int(keepdim))


@lowers("any", "any.dim", "any.dims", "all", "all.dim", "all.dims")
def quantifier(g: Lowering, node: fx.Node, x: ir.Value, dims: Any = None, keepdim: bool = False) -> ir.Value:
    numbers = g.b.cast(g.b.cast(x, BOOL), INT32)
    kind = "ReduceMax" if "any" in str(node.target) else "ReduceMin"
    return g.b.cast(g.b.op(kind, numbers, axes(g, dims), keepdims=int(keepdim)), BOOL)


@lowers("max.dim", "min.dim")
def extreme(g: Lowering, node: fx.Node, x: ir.Value, dim: int, keepdim: bool = False) -> tuple[ir.Value, ir.Value]:
    largest = "max" in str(node.target)
    value = g.b.op("ReduceMax" if largest else "ReduceMin", x, g.b.ints([dim]), keepdims=int(keepdim))
    at = g.b.op("ArgMax" if largest else "ArgMin", x, axis=dim, keepdims=int(keepdim), dtype=INT64)
    return value, at


@lowers("argmax", "argmin")
def argument(g: Lowering, node: fx.Node, x: ir.Value, dim: int | None = None, keepdim: bool = False) -> ir.Value:
    kind = "ArgMax" if "argmax" in str(node.target) else "ArgMin"
    x = g.b.cast(x, INT32) if x.dtype in (BOOL, INT64) else x
    if dim is None:
        return g.b.op(kind, g.b.op("Reshape", x, g.b.ints([-1])), axis=0, keepdims=0, dtype=INT64)
    return g.b.op(kind, x, axis=dim, keepdims=int(keepdim), dtype=INT64)


@lowers("var.correction", "var.dim", "std.correction", "std.dim", "var_mean.correction", "var_mean.dim", "var_mean")
def variance(g: Lowering, node: fx.Node, x: ir.Value, dims: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    b, source = g.b, node.args[0]
    over = list(range(g.rank(source))) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    correction = kwargs.get("correction", 1)
    if args:
        correction, keepdim = int(args[0]), bool(args[1]) if len(args) > 1 else keepdim
    mean = b.op("ReduceMean", x, b.ints(over), keepdims=1)
    off = b.op("Sub", x, mean)
    spread = b.op("ReduceMean", b.op("Mul", off, off), b.ints(over), keepdims=int(keepdim))
    if correction:
        sizes = [s for d in over if isinstance(s := g.dims(source)[d], int)]
        if len(sizes) != len(over):
            raise Refused("the variance over a free size with Bessel's correction", site=node.name)
        count = math.prod(sizes)
        spread = b.op("Mul", spread, b.scalar(count / (count - correction), spread))
    if "std" in str(node.target):
        return b.op("Sqrt", spread)
    if "var_mean" in str(node.target):
        return spread, mean if keepdim else b.op("Squeeze", mean, b.ints(over))
    return spread


@lowers("norm.ScalarOpt_dim", "linalg_vector_norm", "norm.Scalar", "norm.ScalarOpt_dim_dtype")
def vector_norm(
    g: Lowering, node: fx.Node, x: ir.Value, order: Any = 2, dims: Any = None, keepdim: bool = False, **kwargs: Any
) -> ir.Value:
    if order not in (None, 1, 2):
        raise Refused(f"a vector norm of order {order}", site=node.name)
    return g.b.op("ReduceL1" if order == 1 else "ReduceL2", x, axes(g, dims), keepdims=int(keepdim))


@lowers("cumsum")
def cumsum(g: Lowering, node: fx.Node, x: ir.Value, dim: int, **kwargs: Any) -> ir.Value:
    return g.b.op("CumSum", g.b.cast(x, g.kind(node)), g.b.point(dim))


@lowers("softmax.int", "_softmax", "log_softmax.int", "_log_softmax")
def softmax(g: Lowering, node: fx.Node, x: ir.Value, dim: int, *args: Any, **kwargs: Any) -> ir.Value:
    kind = "LogSoftmax" if "log" in str(node.target) else "Softmax"
    return g.b.op(kind, g.b.cast(x, g.kind(node)), axis=dim)


@lowers("histc")
def histc(g: Lowering, node: fx.Node, x: ir.Value, bins: int = 100, low: float = 0, high: float = 0) -> ir.Value:
    """Counts per bin; values outside the range are in none."""
    if low >= high:
        raise Refused("histc over a range that depends on the data", site=node.name)
    b = g.b
    x = b.cast(x, FLOAT)
    place = b.op("Floor", b.op("Mul", b.op("Sub", x, b.scalar(float(low), x)), b.scalar(bins / (high - low), x)))
    place = b.op("Where", b.op("Equal", x, b.scalar(float(high), x), dtype=BOOL), b.scalar(bins - 1.0, x), place, dtype=FLOAT)
    hits = b.op("Equal", b.op("Unsqueeze", place, b.ints([-1])), b.constant([float(i) for i in range(bins)], FLOAT), dtype=BOOL)
    return b.op("ReduceSum", b.cast(hits, g.kind(node)), b.ints([0]), keepdims=0)


# --- whole norms


@lowers("rms_norm")
def rms_norm(
    g: Lowering, node: fx.Node, x: ir.Value, shape: Sequence[int], weight: ir.Value | None = None, eps: float | None = None
) -> ir.Value:
    """One kernel on CPU since opset 23. torch's default epsilon is the dtype's."""
    scale = weight if weight is not None else g.b.constant(_ones(shape), g.kind(node))
    return g.b.op("RMSNormalization", x, scale, axis=-len(shape), epsilon=1.1920929e-07 if eps is None else eps)


@fuses("rms_norm")
def skip_rms_norm(g: Lowering, node: fx.Node) -> ir.Value | None:
    """rms_norm(a + b), and the sum itself, which the residual stream goes on with, by one kernel."""
    x, shape, weight, eps = (*node.args, None, None)[:4]
    if not isinstance(x, fx.Node) or x.target is not torch.ops.aten.add.Tensor or x.kwargs or weight is None or len(shape) != 1:  # type: ignore[arg-type]
        return None
    a, b = x.args
    same = all(isinstance(n, fx.Node) and g.dims(n) == g.dims(x) and g.dtype(n) == torch.float32 for n in (a, b))
    if not same or g.rank(x) not in (2, 3) or g.dtype(weight) != torch.float32:
        return None
    epsilon = 1.1920929e-07 if eps is None else eps
    y, mean, spread, total = g.b.ops(
        "SkipSimplifiedLayerNormalization", g.value(a), g.value(b), g.value(weight), outputs=4, domain=MICROSOFT, epsilon=epsilon
    )
    mean.name = spread.name = ""  # the kernel gives neither
    g.values[x] = total
    return y


@lowers("layer_norm", "native_layer_norm")
def layer_norm(
    g: Lowering,
    node: fx.Node,
    x: ir.Value,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *args: Any,
) -> Any:
    scale = weight if weight is not None else g.b.constant(_ones(shape), x.dtype or ir.DataType.FLOAT)
    value = g.b.op("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=eps)
    return (value, None, None) if "native" in str(node.target) else value


def _ones(shape: Sequence[int]) -> Any:
    return 1.0 if not shape else [_ones(shape[1:])] * shape[0]


@lowers("group_norm")
def group_norm(
    g: Lowering, node: fx.Node, x: ir.Value, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *args: Any
) -> ir.Value:
    """Instance norm over groups of channels; then each channel's weight and bias."""
    b, dims = g.b, g.dims(node)
    grouped = b.op("Reshape", x, b.ints([0, groups, -1]))
    one, zero = b.constant([1.0] * groups, ir.DataType.FLOAT), b.constant([0.0] * groups, ir.DataType.FLOAT)
    normed = b.op("Reshape", b.op("InstanceNormalization", grouped, one, zero, epsilon=eps), b.op("Shape", x, dtype=INT64))
    tail = b.ints([-1] + [1] * (len(dims) - 2))
    if weight is not None:
        normed = b.op("Mul", normed, b.op("Reshape", weight, tail))
    return normed if bias is None else b.op("Add", normed, b.op("Reshape", bias, tail))


@lowers("batch_norm", "_native_batch_norm_legit_no_training")
def batch_norm(g: Lowering, node: fx.Node, x: ir.Value, weight: Any, bias: Any, mean: Any, var: Any, *args: Any) -> Any:
    numbers = [a for a in args if isinstance(a, float)]
    if args and args[0] is True:
        raise Refused("batch_norm in training mode; call eval() on the model first", site=node.name)
    eps, channels = numbers[-1], g.dims(node.args[0])[1]
    assert isinstance(channels, int)
    weight = weight if weight is not None else g.b.constant([1.0] * channels, ir.DataType.FLOAT)
    bias = bias if bias is not None else g.b.constant([0.0] * channels, ir.DataType.FLOAT)
    value = g.b.op("BatchNormalization", x, weight, bias, mean, var, epsilon=eps)
    return (value, None, None) if "native" in str(node.target) else value
