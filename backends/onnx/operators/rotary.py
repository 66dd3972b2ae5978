"""Rotary position embeddings -> one `RotaryEmbedding` (opset 23).

    before: x * cos + cat(-x[..., d/2:], x[..., :d/2]) * sin,   cos = cos(cat(f, f)) over [batch, sequence, d], unsqueezed for heads
    after:  RotaryEmbedding(x, cos[..., :d/2], sin[..., :d/2])
    and:    cat(that of x[..., :r], x[..., r:])  ->  the same operator with rotary_embedding_dim = r

Seven operators a tensor become one, twice a layer. What looks otherwise stays as it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch import fx

from lwcompile.backends.onnx.lowering import Lowering, fuses

aten = torch.ops.aten
_POINTWISE = (aten.cos.default, aten.sin.default, aten.mul.Tensor, aten._to_copy.default)


class Rotation(NamedTuple):
    """x [batch, heads, sequence, d] turned by tables [batch, sequence, d] whose halves are equal."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node


@fuses("add.Tensor")
def rotary(g: Lowering, node: fx.Node) -> ir.Value | None:
    turned = rotation(g, node)
    return None if turned is None else apply_rotation(g, node, turned, 0)


@fuses("cat")
def partial_rotary(g: Lowering, node: fx.Node) -> ir.Value | None:
    """Only the first channels are turned."""
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 2 or node.args[1:] not in ((-1,), (3,)):
        return None
    first, rest = parts
    if not isinstance(first, fx.Node) or first.target is not aten.add.Tensor or (turned := rotation(g, first)) is None:
        return None
    head, width = _slice(g, turned.x), g.dims(turned.x)[-1]
    tail = _slice(g, rest)
    if head is None or tail is None or head[0] is not tail[0] or head[1:] != (0, width) or tail[1:] != (width, g.dims(node)[-1]):
        return None
    return apply_rotation(g, node, turned._replace(x=head[0]), tail[1])


def rotation(g: Lowering, node: fx.Node) -> Rotation | None:
    """The rotation that an addition completes, or None."""
    pairs: Any = (node.args[:2], node.args[1::-1])
    for straight, crossed in pairs:
        if not _is_product(straight) or not _is_product(crossed):
            continue
        for x, cos in (straight.args[:2], straight.args[1::-1]):
            for half, sin in (crossed.args[:2], crossed.args[1::-1]):
                if _swapped_half(g, half, x) and (c := _table(g, cos, x)) is not None and (s := _table(g, sin, x)) is not None:
                    return Rotation(x, c, s)
    return None


def _is_product(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.mul.Tensor


def _slice(g: Lowering, node: object) -> tuple[fx.Node, int, int] | None:
    """(source, start, end) of a slice of the last axis."""
    if not isinstance(node, fx.Node) or node.target is not aten.slice.Tensor or node.args[4:] not in ((), (1,)):
        return None
    source, dim, start, end = (*node.args, 0, None, None)[:4] if len(node.args) < 4 else node.args[:4]
    width = g.dims(source)[-1]
    if dim not in (-1, g.rank(source) - 1) or not isinstance(width, int):
        return None
    bounds = [0 if start is None else start, width if end is None else end]
    if not all(isinstance(b, int) for b in bounds):
        return None
    low, high = (min(b if b >= 0 else b + width, width) for b in bounds)  # type: ignore[operator]
    return source, low, high  # type: ignore[return-value]


def _swapped_half(g: Lowering, node: object, x: object) -> bool:
    """Whether `node` is cat(-x[..., d/2:], x[..., :d/2])."""
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default or not isinstance(x, fx.Node) or g.rank(x) != 4:
        return False
    parts: Any = node.args[0]
    width = g.dims(x)[-1]
    if node.args[1:] not in ((-1,), (3,)) or len(parts) != 2 or not isinstance(width, int) or width % 2:
        return False
    negated, plain = parts
    if negated.target is not aten.neg.default:
        return False
    return _slice(g, negated.args[0]) == (x, width // 2, width) and _slice(g, plain) == (x, 0, width // 2)


def _table(g: Lowering, node: object, x: fx.Node) -> fx.Node | None:
    """The [batch, sequence, d] table behind one that was unsqueezed for heads, if its halves are equal by construction."""
    if not isinstance(node, fx.Node) or node.target is not aten.unsqueeze.default or node.args[1] != 1:
        return None
    table: Any = node.args[0]
    wanted = g.dims(x)
    if g.dims(table) != (wanted[0], wanted[2], wanted[3]):
        return None
    current = table
    while current.target in _POINTWISE and len(current.all_input_nodes) == 1:
        current = current.args[0]
    if current.target is not aten.cat.default or current.args[1:] not in ((-1,), (2,)):
        return None
    halves = current.args[0]
    return table if len(halves) == 2 and halves[0] is halves[1] else None


def apply_rotation(g: Lowering, node: fx.Node, turned: Rotation, width: int) -> ir.Value:
    b, half = g.b, int(g.dims(turned.cos)[-1]) // 2  # type: ignore[arg-type]
    tables: list[Any] = [
        b.op("Slice", g.value(t), b.ints([0]), b.ints([half]), b.ints([-1]), b.ints([1])) for t in (turned.cos, turned.sin)
    ]
    settings: dict[str, Any] = {"rotary_embedding_dim": width} if width else {}
    heads, merged = g.dims(turned.x)[1], g.merged(turned.x)
    if merged is None or not isinstance(heads, int):
        return b.op("RotaryEmbedding", g.value(turned.x), *tables, **settings)
    flat = b.op("RotaryEmbedding", merged, *tables, num_heads=heads, **settings)
    return g.split_heads(node, flat)
