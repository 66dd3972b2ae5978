"""Views and rearrangements: reshape, transpose, expand, slice, cat, split, pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from torch import fx

from lwcompile.backends.onnx.builder import Size
from lwcompile.backends.onnx.lowering import Lowering, lowers

INT64 = ir.DataType.INT64
LAST = (1 << 63) - 1


@lowers("reshape", "view", "_unsafe_view", "flatten.using_ints", "unflatten.int", "view_as", "reshape_as", "ravel")
def reshape(g: Lowering, node: fx.Node, x: ir.Value, *args: Any) -> ir.Value:
    if (flat := g.known_flat(node)) is not None:
        return flat
    sizes = args[0] if str(node.target) in ("aten.reshape.default", "aten.view.default", "aten._unsafe_view.default") else None
    return g.reshape(x, g.dims(node), g.dims(node.args[0]), sizes)


@lowers("unsqueeze")
def unsqueeze(g: Lowering, node: fx.Node, x: ir.Value, dim: int) -> ir.Value:
    return g.b.op("Unsqueeze", x, g.b.ints([dim % g.rank(node)]))


@lowers("squeeze.dim", "squeeze.dims", "squeeze")
def squeeze(g: Lowering, node: fx.Node, x: ir.Value, dims: int | Sequence[int] | None = None) -> ir.Value:
    before = g.dims(node.args[0])
    wished = range(len(before)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = [d % len(before) for d in wished if before[d] == 1]
    return g.b.op("Squeeze", x, g.b.ints(sorted(gone))) if gone else x


@lowers("mT", "adjoint")
def matrix_transpose(g: Lowering, node: fx.Node, x: ir.Value) -> ir.Value:
    return transpose(g, node, x, -1, -2)


@lowers("transpose.int", "t", "swapaxes", "swapdims")
def transpose(g: Lowering, node: fx.Node, x: ir.Value, a: int = 0, c: int = 1) -> ir.Value:
    order = list(range(g.rank(node)))
    if len(order) < 2:
        return x
    order[a], order[c] = order[c], order[a]
    return g.b.op("Transpose", x, perm=order)


@lowers("permute")
def permute(g: Lowering, node: fx.Node, x: ir.Value, order: Sequence[int]) -> ir.Value:
    order = [d % len(order) for d in order]
    return x if order == sorted(order) else g.b.op("Transpose", x, perm=order)


@lowers("movedim.int", "movedim.intlist")
def movedim(g: Lowering, node: fx.Node, x: ir.Value, source: Any, target: Any) -> ir.Value:
    rank = g.rank(node)
    sources = [d % rank for d in ([source] if isinstance(source, int) else source)]
    targets = [d % rank for d in ([target] if isinstance(target, int) else target)]
    rest = iter(d for d in range(rank) if d not in sources)
    order = [sources[targets.index(d)] if d in targets else next(rest) for d in range(rank)]
    return g.b.op("Transpose", x, perm=order)


@lowers("expand", "expand_as", "broadcast_to")
def expand(g: Lowering, node: fx.Node, x: ir.Value, target: Any, **kwargs: Any) -> ir.Value:
    """A size that stays is asked for as 1, which ONNX reads as "as it is"."""
    before, after = g.dims(node.args[0]), g.dims(node)
    before = (1,) * (len(after) - len(before)) + tuple(before)
    if before == after:
        return x if len(after) == g.rank(node.args[0]) else g.reshape(x, after, g.dims(node.args[0]))
    given = target if isinstance(target, list | tuple) else None
    sizes: list[int | Size] = []
    for i, (old, new) in enumerate(zip(before, after)):
        if old == new:
            sizes.append(1)
        elif given is not None and given[i] != -1:
            sizes.append(given[i])
        else:
            sizes.append(g.size(new, target if isinstance(target, ir.Value) else None, i))
    return g.b.op("Expand", x, g.b.shape(sizes))


@lowers("repeat", "tile")
def repeat(g: Lowering, node: fx.Node, x: ir.Value, repeats: Sequence[Any]) -> ir.Value:
    rank = g.rank(node.args[0])
    repeats = [1] * (rank - len(repeats)) + list(repeats)
    if len(repeats) > rank:
        x = g.b.op("Unsqueeze", x, g.b.ints(list(range(len(repeats) - rank))))
    return (
        x
        if all(r == 1 for r in repeats if isinstance(r, int)) and not _any_size(repeats)
        else g.b.op("Tile", x, g.b.shape(repeats))
    )


def _any_size(items: Sequence[Any]) -> bool:
    return any(isinstance(i, Size) for i in items)


@lowers("repeat_interleave.self_int")
def repeat_interleave(g: Lowering, node: fx.Node, x: ir.Value, count: Any, dim: int | None = None, **kwargs: Any) -> ir.Value:
    """Each element `count` times: a new axis behind `dim`, expanded and merged."""
    b, before = g.b, list(g.dims(node.args[0]))
    if dim is None:
        x, before, dim = b.op("Reshape", x, b.ints([-1])), [*g.dims(node)], 0
    dim %= len(before)
    wide = b.op(
        "Expand", b.op("Unsqueeze", x, b.ints([dim + 1])), b.shape([1] * (dim + 1) + [count] + [1] * (len(before) - dim - 1))
    )
    return b.op("Reshape", wide, b.shape([*[0] * dim, -1, *_tail(g, node, dim, x)]))


def _tail(g: Lowering, node: fx.Node, dim: int, x: ir.Value) -> list[int | Size]:
    return [g.size(d, x, i + dim + 1) for i, d in enumerate(g.dims(node)[dim + 1 :])]


# --- parts


@lowers("slice.Tensor", "narrow")
def slice_(g: Lowering, node: fx.Node, x: ir.Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> ir.Value:
    if "narrow" in str(node.target):
        end = start + end
    start, end = 0 if start is None else start, LAST if end is None else end
    if isinstance(start, int) and isinstance(end, int) and start == 0 and end == LAST and step == 1:
        return x
    bites = isinstance(start, int) and start < 0 and not isinstance(g.dims(node)[dim], int)  # once x is longer than in the trials
    if g.dims(node) == g.dims(node.args[0]) and step == 1 and not bites:
        return x
    b = g.b
    return b.op("Slice", x, b.vector(start), b.vector(end), b.ints([dim]), b.ints([step]))


@lowers("select.int")
def select(g: Lowering, node: fx.Node, x: ir.Value, dim: int, index: Any) -> ir.Value:
    return g.b.op("Gather", x, g.b.point(index), axis=dim)


@lowers(
    "split.Tensor", "split.sizes", "split_with_sizes", "chunk", "tensor_split.sections", "unsafe_chunk", "unsafe_split.Tensor"
)
def split(g: Lowering, node: fx.Node, x: ir.Value, spec: Any, dim: int = 0) -> tuple[ir.Value, ...]:
    """Part sizes come from the graph, except where they are free; then the parts are equal."""
    sizes = [v.shape[dim] for v in node.meta["val"]]
    whole = g.dims(node.args[0])[dim]
    if len(sizes) == 1:
        return (x,)
    if isinstance(whole, int) or (isinstance(spec, list | tuple) and not _any_size(spec)):
        return g.b.ops("Split", x, g.b.ints(sizes), outputs=len(sizes), axis=dim)
    if isinstance(spec, list | tuple):
        return g.b.ops("Split", x, g.b.shape(spec), outputs=len(sizes), axis=dim)
    return g.b.ops("Split", x, outputs=len(sizes), axis=dim, num_outputs=len(sizes))


@lowers("unbind.int")
def unbind(g: Lowering, node: fx.Node, x: ir.Value, dim: int = 0) -> tuple[ir.Value, ...]:
    return tuple(g.b.op("Gather", x, g.b.point(i), axis=dim) for i in range(len(node.meta["val"])))


# --- joins


@lowers("cat", "concat")
def cat(g: Lowering, node: fx.Node, parts: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    kind = g.kind(node)
    real = [g.b.cast(p, kind) for p, n in zip(parts, node.args[0]) if g.dims(n) != (0,)]  # type: ignore[arg-type]
    return real[0] if len(real) == 1 else g.b.op("Concat", *real, axis=dim)


@lowers("stack")
def stack(g: Lowering, node: fx.Node, parts: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    axis = g.b.ints([dim % g.rank(node)])
    return g.b.op("Concat", *(g.b.op("Unsqueeze", g.b.cast(p, g.kind(node)), axis) for p in parts), axis=dim % g.rank(node))


@lowers("constant_pad_nd", "pad")
def pad(g: Lowering, node: fx.Node, x: ir.Value, pads: Sequence[Any], *args: Any) -> ir.Value:
    mode, fill = "constant", 0
    for arg in args:
        mode, fill = (arg, fill) if isinstance(arg, str) else (mode, arg if arg is not None else 0)
    rank, count = g.rank(node), len(pads) // 2
    before: list[Any] = [0] * (rank - count) + [pads[2 * i] for i in reversed(range(count))]
    after: list[Any] = [0] * (rank - count) + [pads[2 * i + 1] for i in reversed(range(count))]
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    value = g.b.constant(fill, g.kind(node)) if mode == "constant" else None
    return g.b.op("Pad", x, g.b.shape(before + after), value, mode=mode)


@lowers("roll")
def roll(g: Lowering, node: fx.Node, x: ir.Value, shifts: Sequence[Any], dims: Sequence[int] = ()) -> ir.Value:
    b = g.b
    for shift, dim in zip(shifts, dims):
        cut = b.vector(shift) if isinstance(shift, int) else shift.value
        at = b.ints([-shift]) if isinstance(shift, int) else b.op("Neg", cut)
        tail = b.op("Slice", x, at, b.ints([LAST]), b.ints([dim]))
        head = b.op("Slice", x, b.ints([0]), at, b.ints([dim]))
        x = b.op("Concat", tail, head, axis=dim)
    return x


@lowers("flip")
def flip(g: Lowering, node: fx.Node, x: ir.Value, dims: Sequence[int]) -> ir.Value:
    b, n = g.b, len(dims)
    return b.op("Slice", x, b.ints([-1] * n), b.ints([-LAST] * n), b.ints(list(dims)), b.ints([-1] * n))


@lowers("meshgrid", "meshgrid.indexing")
def meshgrid(g: Lowering, node: fx.Node, parts: Sequence[ir.Value], indexing: str = "ij") -> tuple[ir.Value, ...]:
    b, n, sources = g.b, len(parts), list(node.args[0])  # type: ignore[call-overload]
    order = [1, 0, *range(2, n)] if indexing == "xy" else list(range(n))
    axes = {i: order.index(i) for i in range(n)}
    sizes: list[int | Size] = [0] * n
    for i, (part, source) in enumerate(zip(parts, sources)):
        sizes[axes[i]] = g.size(g.dims(source)[0], part, 0) if g.rank(source) else 1
    return tuple(
        b.op("Expand", b.op("Reshape", p, b.ints([-1 if d == axes[i] else 1 for d in range(n)])), b.shape(sizes))
        for i, p in enumerate(parts)
    )


@lowers("diff")
def diff(g: Lowering, node: fx.Node, x: ir.Value, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> ir.Value:
    b = g.b
    parts = [p for p in (prepend, x, append) if p is not None]
    x = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=dim)
    for _ in range(n):
        later = b.op("Slice", x, b.ints([1]), b.ints([LAST]), b.ints([dim]))
        x = b.op("Sub", later, b.op("Slice", x, b.ints([0]), b.ints([-1]), b.ints([dim])))
    return x
