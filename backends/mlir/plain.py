"""Packed weights in operators that torch-mlir takes: integers of 32 bits, floats, nothing of ours.

    dequantize(codes, scale, zero, bits, g, K)
        ->  codes [N, eights, bits] of bytes
            low, high = the byte that each of eight fields starts in, and the next one
            q = (low >> shift | high << 8 - shift) & mask       [N, K] int32
            (float32(q) - float32(zero)) * float32(scale)       the same roundings as the operator's: equal to the last bit

Cost: the bytes on file stay packed; a compiler may fuse this into the product, or compute it once when the file is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lwcompile.formats import row_bytes
from lwcompile.graph import ModelGraph, iterate_calls

aten = torch.ops.aten


def plain(graph: ModelGraph) -> ModelGraph:
    """A copy in which no operator of the project's is left; equal packed weights are read once."""
    made, done = graph.copy(), {}
    for node in list(iterate_calls(made, torch.ops.lwcompile.dequantize.default)):
        key = tuple(made.tensors[str(a.target)] if isinstance(a, fx.Node) else a for a in node.args)
        if key not in done:
            with made.graph.inserting_before(node):
                done[key] = _weight(_Builder(made, node.meta.get("path", "")), *node.args)  # type: ignore
        node.replace_all_uses_with(done[key])
    made.prune()
    made.propagate()
    return made


class _Builder:
    """Calls at the graph's insert point, each with the place it stands for."""

    def __init__(self, graph: ModelGraph, path: str) -> None:
        self.graph, self.path = graph, path

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.graph.call_function(target, args, kwargs)
        if self.path:
            node.meta["path"] = self.path
        return node

    def to(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return self(aten._to_copy.default, x, dtype=dtype)

    def stored(self, name: str, tensor: Tensor) -> fx.Node:
        return self.graph.get_attr(name, tensor)

    def shape(self, x: fx.Node) -> torch.Size:
        return self.graph.store.shape(self.graph.tensors[str(x.target)])  # type: ignore[return-value]


def _weight(b: _Builder, codes: fx.Node, scale: fx.Node, zero: fx.Node | None, bits: int, group: int, columns: int) -> fx.Node:
    rows, groups = b.shape(scale)
    weight = b.to(_unpacked(b, codes, rows, columns, bits), torch.float32)
    center = None
    if zero is None:
        center = float(2 ** (bits - 1))
    elif b.graph.store.dtype(b.graph.tensors[str(zero.target)]) == torch.uint8:
        zero = b.to(_unpacked(b, zero, rows, groups, bits), torch.float32)
    else:
        zero = b.to(zero, torch.float32)
    scale = b.to(scale, torch.float32)
    if groups * group == columns:
        grouped = b(aten.view.default, weight, [rows, groups, group])
        grids = [None if grid is None else b(aten.unsqueeze.default, grid, 2) for grid in (zero, scale)]
    else:  # the last group is partial: a grid value for every column
        grouped, grids = weight, [None if g is None else _repeated(b, g, rows, groups, group, columns) for g in (zero, scale)]
    shifted = b(aten.sub.Tensor, grouped, center if grids[0] is None else grids[0])
    return b(aten.view.default, b(aten.mul.Tensor, shifted, grids[1]), [rows, columns])


def _repeated(b: _Builder, grid: fx.Node, rows: int, groups: int, group: int, columns: int) -> fx.Node:
    """[N, G] -> [N, K], each value for the columns of its group."""
    wide = b(aten.expand.default, b(aten.unsqueeze.default, grid, 2), [rows, groups, group])
    return b(aten.slice.Tensor, b(aten.reshape.default, wide, [rows, groups * group]), 1, 0, columns)


def _unpacked(b: _Builder, packed: fx.Node, rows: int, length: int, bits: int) -> fx.Node:
    """uint8 [N, ceil(length*bits/8)] as `pack_bits` writes it -> int32 [N, length]."""
    wide = b.to(packed, torch.int32)
    if bits == 8:
        return wide
    eights = -(-length // 8)
    if missing := eights * bits - row_bytes(length, bits):
        wide = b(aten.constant_pad_nd.default, wide, [0, missing], 0)
    if 8 % bits == 0:  # no field crosses a byte
        count = 8 // bits
        low = b(aten.view.default, wide, [rows, eights * bits, 1])
        shifts = b.stored(f"lwcompile.shifts{bits}", torch.arange(count, dtype=torch.int32) * bits)
        fields = b(aten.bitwise_right_shift.Tensor, low, shifts)
    else:
        starts = torch.arange(8) * bits
        words = b(aten.view.default, wide, [rows, eights, bits])
        first = b.stored(f"lwcompile.first{bits}", starts // 8)
        second = b.stored(f"lwcompile.second{bits}", (starts // 8 + 1).clamp(max=bits - 1))
        shifts = b.stored(f"lwcompile.shifts{bits}", (starts % 8).int())
        low, high = (b(aten.index_select.default, words, 2, index) for index in (first, second))
        # A field that ends in its first byte takes nothing from the second: what stands there is above the mask.
        wide = b(aten.add.Tensor, low, b(aten.mul.Tensor, high, 256))
        fields = b(aten.bitwise_right_shift.Tensor, wide, shifts)
    fields = b(aten.bitwise_and.Scalar, fields, 2**bits - 1)
    flat = b(aten.view.default, fields, [rows, eights * 8])
    return flat if eights * 8 == length else b(aten.slice.Tensor, flat, 1, 0, length)
