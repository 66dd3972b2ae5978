"""Operators over windows: convolutions, pooling, im2col, interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from torch import fx

from lwcompile.backends.onnx.lowering import Lowering, lowers
from lwcompile.errors import Refused

INT64 = ir.DataType.INT64


def spread(value: Any, rank: int) -> list[int]:
    """One number or one per axis, as one per axis."""
    items = [value] if isinstance(value, int) else list(value)
    return items * rank if len(items) == 1 else items


@lowers("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding")
def conv(
    g: Lowering, node: fx.Node, x: ir.Value, weight: ir.Value, bias: Any = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> ir.Value:  # fmt: skip
    rank = g.rank(node) - 2
    kernel = [int(k) for k in g.dims(node.args[1])[2:]]  # type: ignore[arg-type]
    dilation = spread(dilation, rank)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = spread(padding, rank) * 2
    return g.b.op(
        "Conv", x, weight, bias, strides=spread(stride, rank), pads=pads, dilations=dilation, group=groups, kernel_shape=kernel
    )


@lowers("convolution")
def convolution(
    g: Lowering, node: fx.Node, x: ir.Value, weight: ir.Value, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> ir.Value:  # fmt: skip
    if transposed:
        return conv_transpose(g, node, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(g, node, x, weight, bias, stride, padding, dilation, groups)


@lowers("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def conv_transpose(
    g: Lowering, node: fx.Node, x: ir.Value, weight: ir.Value, bias: Any = None,
    stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> ir.Value:  # fmt: skip
    rank = g.rank(node) - 2
    return g.b.op(
        "ConvTranspose", x, weight, bias, strides=spread(stride, rank), pads=spread(padding, rank) * 2, group=groups,
        dilations=spread(dilation, rank), output_padding=spread(output_padding, rank),
    )  # fmt: skip


@lowers("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices")
def max_pool(
    g: Lowering,
    node: fx.Node,
    x: ir.Value,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil: bool = False,
) -> Any:
    rank = g.rank(node.args[0]) - 2
    kernel = spread(kernel, rank)
    value = g.b.op(
        "MaxPool", x, kernel_shape=kernel, strides=spread(stride, rank) or kernel, pads=spread(padding, rank) * 2,
        dilations=spread(dilation, rank), ceil_mode=int(ceil),
    )  # fmt: skip
    return (value, None) if "indices" in str(node.target) else value


@lowers("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    g: Lowering, node: fx.Node, x: ir.Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil: bool = False,
    count_pads: bool = True, divisor: int | None = None,
) -> ir.Value:  # fmt: skip
    if divisor is not None:
        raise Refused("avg_pool with a divisor of its own", site=node.name)
    rank = g.rank(node) - 2
    kernel = spread(kernel, rank)
    return g.b.op(
        "AveragePool", x, kernel_shape=kernel, strides=spread(stride, rank) or kernel, pads=spread(padding, rank) * 2,
        ceil_mode=int(ceil), count_include_pad=int(count_pads),
    )  # fmt: skip


@lowers("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_avg_pool(g: Lowering, node: fx.Node, x: ir.Value, target: Any) -> ir.Value:
    dims = g.dims(node.args[0])
    target = spread(target, len(dims) - 2) if isinstance(target, int) else list(target)
    rank = len(target)
    if all(t == 1 for t in target):
        return g.b.op("ReduceMean", x, g.b.ints(list(range(-rank, 0))), keepdims=1)
    before = dims[-rank:]
    if any(not isinstance(s, int) or s % t for s, t in zip(before, target)):
        raise Refused(f"adaptive pooling of {before} to {target}", site=node.name)
    kernel = [int(s) // t for s, t in zip(before, target)]  # type: ignore[arg-type]
    if len(dims) == rank + 2:
        return g.b.op("AveragePool", x, kernel_shape=kernel, strides=kernel)
    wide = g.b.op("Unsqueeze", x, g.b.ints([0]))
    return g.b.op("Squeeze", g.b.op("AveragePool", wide, kernel_shape=kernel, strides=kernel), g.b.ints([0]))


@lowers("im2col")
def im2col(g: Lowering, node: fx.Node, x: ir.Value, kernel: Sequence[int], dilation: Any, padding: Any, stride: Any) -> ir.Value:
    """[B, C, H, W] -> [B, C kh kw, windows]: a convolution whose weights pick one input each."""
    b, channels = g.b, g.dims(node.args[0])[1]
    kh, kw = kernel
    assert isinstance(channels, int)
    eye = b.op(
        "Reshape",
        b.op("EyeLike", b.constant([[0.0] * (kh * kw)] * (kh * kw), x.dtype or ir.DataType.FLOAT)),
        b.ints([kh * kw, 1, kh, kw]),
    )
    picks = b.op("Tile", eye, b.ints([channels, 1, 1, 1]))
    windows = b.op(
        "Conv", x, picks, strides=spread(stride, 2), pads=spread(padding, 2) * 2, dilations=spread(dilation, 2), group=channels,
        kernel_shape=list(kernel),
    )  # fmt: skip
    return b.op("Reshape", windows, b.ints([0, channels * kh * kw, -1]))


@lowers("upsample_bilinear2d.vec", "upsample_bicubic2d.vec", "upsample_nearest2d.vec", "upsample_linear1d.vec", "upsample_nearest1d.vec",
        "_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec")  # fmt: skip
def upsample(g: Lowering, node: fx.Node, x: ir.Value, target: Any, *args: Any) -> ir.Value:
    b, name = g.b, str(node.target)
    mode = "nearest" if "nearest" in name else "cubic" if "bicubic" in name else "linear"
    align = bool(args[0]) if mode != "nearest" else False
    grids = {"nearest": "asymmetric", "cubic": "half_pixel", "linear": "pytorch_half_pixel"}
    where = "align_corners" if align else grids[mode]
    antialias = "_aa" in name
    settings: dict[str, Any] = {
        "mode": mode,
        "coordinate_transformation_mode": where,
        "cubic_coeff_a": -0.5 if antialias else -0.75,
    }
    settings |= {"antialias": 1} if antialias else {}
    settings |= {"nearest_mode": "floor"} if mode == "nearest" else {}
    if target is None:
        scales = b.constant([1.0, 1.0, *(float(f) for f in args[-1])], ir.DataType.FLOAT)
        return b.op("Resize", x, None, scales, **settings)
    front = b.op("Shape", x, start=0, end=2, dtype=INT64)
    return b.op("Resize", x, None, None, b.op("Concat", front, b.shape(list(target)), axis=0), **settings)


@lowers("pixel_shuffle")
def pixel_shuffle(g: Lowering, node: fx.Node, x: ir.Value, factor: int) -> ir.Value:
    return g.b.op("DepthToSpace", x, blocksize=factor, mode="CRD")
