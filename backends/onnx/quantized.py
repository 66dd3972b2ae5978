"""Quantized weights: `linear(x, dequantize(...), b)` and `embedding(dequantize(...), ids)` -> packed operators.

    linear      MatMulNBits(x, codes, scales, zeros, b)
    embedding   GatherBlockQuantized(codes, ids, scales, zeros)
    elsewhere   (codes - zeros) * scales, once, when the session starts

Two readers of one weight (a tied embedding and head) read the same initializers. A float zero point z is the centre c of the
grid plus a correction, since kernels take none:  x @ ((q - z) s)^T = x @ ((q - c) s)^T + blocksum(x) @ ((c - z) s)^T.
Source: com.microsoft contrib operators of onnxruntime; `packing` for the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor, fx

from lwcompile.backends.onnx.builder import MICROSOFT, Builder
from lwcompile.backends.onnx.packing import (
    Storage,
    centre_byte,
    nibbles_function,
    plane_shapes,
    stored_codes,
    stored_zeros,
    unpack_function,
)
from lwcompile.formats import NumericFormat
from lwcompile.graph import ModelGraph
from lwcompile.packed import packed_weight

INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy level that rounds activations to int8, block by block: about 0.6 % of error, three times as fast."""

UINT8, FLOAT, INT64 = ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.INT64


@dataclass(frozen=True)
class QuantizedWeight:
    """One `dequantize` call, or several whose rows are joined: the names of their tensors, and the layout of the whole."""

    storage: Storage
    codes: tuple[str, ...]
    scale: tuple[str, ...]
    zero: tuple[str, ...] | None

    @property
    def format(self) -> NumericFormat:
        return self.storage.format


def quantized_weight(graph: ModelGraph, node: fx.Node) -> QuantizedWeight | None:
    """What a `dequantize` call reads; None for any other node, and if it does not read stored tensors."""
    found = packed_weight(graph, node)
    if found is None:
        return None
    zero = None if found.zero is None else (found.zero,)
    return QuantizedWeight(Storage.of(found.format, found.shape), (found.codes,), (found.scale,), zero)


def joined_weight(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of weights in one form, one below the other."""
    storage = replace(weights[0].storage, rows=sum(w.storage.rows for w in weights))
    codes, scale = (tuple(name for w in weights for name in getattr(w, part)) for part in ("codes", "scale"))
    zero = None if weights[0].zero is None else tuple(name for w in weights for name in w.zero or ())
    return QuantizedWeight(storage, codes, scale, zero)


class Quantized:
    """Writes quantized weights into a builder, each stored tensor once per entry of the store."""

    def __init__(self, builder: Builder, graph: ModelGraph, accuracy_level: int) -> None:
        self.b, self.graph, self.accuracy_level = builder, graph, accuracy_level
        self._bound: dict[tuple[tuple[str, ...], Storage | None], str] = {}

    # --- operators

    def linear(self, weight: QuantizedWeight, x: ir.Value, bias: ir.Value | None, rank: int) -> ir.Value | None:
        """x [..., K] -> [..., N]; None where no packed kernel fits."""
        s = weight.storage
        if s.block is None or (s.width == 8 and self.accuracy_level != INT8_ACTIVATIONS):
            return None  # 8-bit kernels with float32 activations take 30 times as long as a dense product
        y = self.b.op(
            "MatMulNBits", x, self.codes(weight, (s.rows, s.blocks, s.block * s.width // 8)), self.scales(weight),
            self.zeros(weight), None, bias, domain=MICROSOFT, K=s.in_features, N=s.rows, bits=s.width,
            block_size=s.block, accuracy_level=self.accuracy_level,
        )  # fmt: skip
        if s.format.zero_point != "float":
            return y
        sums = self.group_sums(x, s, rank)
        return self.b.op("Add", y, self.b.op("MatMul", sums, self.b.op("Transpose", self.offsets(weight), perm=[1, 0])))

    def group_sums(self, x: ir.Value, s: Storage, rank: int) -> ir.Value:
        """x [..., K] -> sums over each group of channels, [..., G]."""
        b = self.b
        if s.groups == 1:
            return b.op("ReduceSum", x, b.ints([-1]), keepdims=1)
        group = s.format.group(s.in_features)
        if pad := s.groups * group - s.in_features:
            x = b.op("Pad", x, b.ints([0] * (2 * rank - 1) + [pad]))
        split = b.op("Reshape", x, b.ints([0] * (rank - 1) + [s.groups, group]))
        return b.op("ReduceSum", split, b.ints([-1]), keepdims=0)

    def embedding(self, weight: QuantizedWeight, ids: ir.Value, rank: int) -> ir.Value | None:
        """ids [...] -> [..., K]; None where no packed kernel fits."""
        b, s = self.b, weight.storage
        if s.block is None:
            return None
        rows = b.op(
            "GatherBlockQuantized", self.codes(weight, (s.rows, s.columns * s.width // 8)), ids, self.scales(weight),
            self.zeros(weight), domain=MICROSOFT, bits=s.width, block_size=s.block, gather_axis=0, quantize_axis=1, dtype=FLOAT,
        )  # fmt: skip
        if s.columns != s.in_features:
            rows = b.op("Slice", rows, b.ints([0]), b.ints([s.in_features]), b.ints([-1]))
        if s.format.zero_point != "float":
            return rows
        offsets = b.op("Gather", self.offsets(weight), ids, axis=0)
        group = s.format.group(s.in_features)
        spread = b.op("Expand", b.op("Unsqueeze", offsets, b.ints([-1])), b.ints([1, group]))
        flat = b.op("Reshape", spread, b.ints([0] * rank + [-1]))
        if s.groups * group != s.in_features:
            flat = b.op("Slice", flat, b.ints([0]), b.ints([s.in_features]), b.ints([-1]))
        return b.op("Add", rows, flat)

    def dense(self, weight: QuantizedWeight) -> ir.Value:
        """The float32 weight [N, K], computed from what is stored."""
        b, s = self.b, weight.storage
        group = s.format.group(s.in_features)
        codes = b.cast(self.codes(weight, (s.rows, s.columns), width=8), FLOAT)
        padded = s.groups * group
        if padded < s.columns:
            codes = b.op("Slice", codes, b.ints([0]), b.ints([padded]), b.ints([1]))
        elif padded > s.columns:
            codes = b.op("Pad", codes, b.ints([0, 0, 0, padded - s.columns]))
        split = b.op("Reshape", codes, b.ints([s.rows, s.groups, group]))
        scale, zero = (b.op("Unsqueeze", v, b.ints([2])) for v in (self.group_scales(weight), self.group_zeros(weight)))
        value = b.op("Mul", b.op("Sub", split, zero), scale)
        flat = b.op("Reshape", value, b.ints([s.rows, padded]))
        return flat if padded == s.in_features else b.op("Slice", flat, b.ints([0]), b.ints([s.in_features]), b.ints([1]))

    # --- stored tensors as the runtime reads them

    def codes(self, weight: QuantizedWeight, shape: tuple[int, ...], width: int | None = None) -> ir.Value:
        s = weight.storage
        natural = (s.rows, s.blocks, s.block * s.width // 8) if s.block else ()
        stored = self._stored(weight.codes, s, s.rows * s.columns, s.width, natural, stored_codes)
        return self._widened(stored, s.bits, s.width, width or s.width, shape)

    def scales(self, weight: QuantizedWeight) -> ir.Value:
        """float32 [N, blocks]."""
        return self._repeated(self.group_scales(weight), weight.storage)

    def group_scales(self, weight: QuantizedWeight) -> ir.Value:
        """float32 [N, G]."""
        return self.b.cast(self._float(weight.scale), FLOAT)

    def zeros(self, weight: QuantizedWeight) -> ir.Value | None:
        """Packed [N, bytes] as the kernels read them; None where the runtime's default is the centre already."""
        b, s = self.b, weight.storage
        if s.format.zero_point != "integer":
            if s.format.bits == s.width:
                return None
            shape = b.ints([s.rows, -(-s.blocks * s.width // 8)])
            return b.op("ConstantOfShape", shape, value=ir.tensor([centre_byte(s)], dtype=UINT8, name="centre"), dtype=UINT8)
        stored = self._zeros(weight)
        if s.repeats == 1:
            return self._widened(stored, s.bits, s.width, s.width, (s.rows, s.zero_columns * s.width // 8))
        zeros = self._repeated(self._widened(stored, s.bits, 8, 8, (s.rows, s.groups)), s)
        return zeros if s.width == 8 else b.call("PackNibbles", nibbles_function, zeros, dtype=UINT8)

    def group_zeros(self, weight: QuantizedWeight) -> ir.Value:
        """float32 zero points [N, G]."""
        b, s = self.b, weight.storage
        if s.format.zero_point == "float":
            assert weight.zero is not None
            return b.cast(self._float(weight.zero), FLOAT)
        if s.format.zero_point == "none":
            return b.constant([[float(s.format.center)]], FLOAT)
        zeros = self._widened(self._zeros(weight), s.bits, s.zero_width, 8, (s.rows, s.zero_columns))
        if s.zero_columns != s.groups:
            zeros = b.op("Slice", zeros, b.ints([0]), b.ints([s.groups]), b.ints([1]))
        return b.cast(zeros, FLOAT)

    def _zeros(self, weight: QuantizedWeight) -> list[ir.Value]:
        assert weight.zero is not None
        s = weight.storage
        natural = (s.rows, s.zero_columns * s.zero_width // 8)
        return self._stored(weight.zero, s, s.rows * s.zero_columns, s.zero_width, natural, stored_zeros)

    def offsets(self, weight: QuantizedWeight) -> ir.Value:
        """(centre - zero) * scale, float32 [N, G]: what float zero points add to each group."""
        b = self.b
        centre = b.constant(float(weight.format.center), FLOAT)
        return b.op("Mul", b.op("Sub", centre, self.group_zeros(weight)), self.group_scales(weight))

    # --- bytes

    def _stored(
        self,
        names: tuple[str, ...],
        s: Storage,
        count: int,
        width: int,
        natural: tuple[int, ...],
        convert: Callable[[Tensor, Storage], list[Tensor]],
    ) -> list[ir.Value]:
        """Initializers of stored bytes, once per entry of the program's store and layout; in their natural shape if they fill it."""
        keys, name = self._keys(names), _joined_name(names)
        bound = self._bound.setdefault((keys, s), name if name not in self.b.initializers else self.b.fresh(name))
        shapes = plane_shapes(count, s.bits, width)
        if shapes == [(math.prod(natural),)]:
            shapes = [natural]
        return [
            self.b.stored(
                bound + suffix, lambda i=i, shape=shape: convert(self._read(keys), s)[i].reshape(shape), shape, torch.uint8
            )
            for i, (suffix, shape) in enumerate(zip(("", ".high"), shapes))
        ]

    def _float(self, names: tuple[str, ...]) -> ir.Value:
        keys, store = self._keys(names), self.graph.store
        bound = self._bound.setdefault((keys, None), _joined_name(names))
        shape = (sum(store.shape(key)[0] for key in keys), *store.shape(keys[0])[1:])
        return self.b.stored(bound, lambda: self._read(keys), shape, store.dtype(keys[0]))

    def _keys(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self.graph.tensors[name] for name in names)

    def _read(self, keys: tuple[str, ...]) -> Tensor:
        return self.graph.store[keys[0]] if len(keys) == 1 else torch.cat([self.graph.store[key] for key in keys])

    def _widened(self, stored: list[ir.Value], bits: int, stored_width: int, width: int, shape: tuple[int, ...]) -> ir.Value:
        """Stored bytes -> a tensor of this shape with codes of `width` bits."""
        b, count = self.b, math.prod(shape)
        if width != stored_width:
            flat = self._nibbles(self._widened(stored, bits, stored_width, stored_width, (-(-count // 16) * 8, 1)))
            return b.op("Reshape", self._cut(flat, count), b.ints(shape))
        if list(stored[0].shape or ()) == list(shape):
            return stored[0]
        exact = count % 8 == 0
        if bits != width:
            make = partial(unpack_function, bits, width)
            flat = b.call(f"Unpack{bits}to{width}", make, *stored, b.ints(shape if exact else [-1]), dtype=UINT8)
            return flat if exact else b.op("Reshape", self._cut(flat, count), b.ints(shape))
        return b.op("Reshape", stored[0] if exact else self._cut(stored[0], count), b.ints(shape))

    def _cut(self, flat: ir.Value, count: int) -> ir.Value:
        return self.b.op("Slice", flat, self.b.ints([0]), self.b.ints([count]), self.b.ints([0]))

    def _nibbles(self, packed: ir.Value) -> ir.Value:
        """Bytes [M, 1] -> their two nibbles, low first, [2 M]."""
        b = self.b
        moves = b.constant([[0, 4]], UINT8)
        pairs = b.op("BitwiseAnd", b.op("BitShift", packed, moves, direction="RIGHT"), b.constant(15, UINT8))
        return b.op("Reshape", pairs, b.ints([-1]))

    def _repeated(self, value: ir.Value, s: Storage) -> ir.Value:
        """[N, G] -> [N, blocks], each group's value once per block."""
        if s.repeats == 1:
            return value
        b = self.b
        if s.groups == 1:
            return b.op("Expand", value, b.ints([s.rows, s.blocks]))
        spread = b.op("Expand", b.op("Unsqueeze", value, b.ints([2])), b.ints([s.rows, s.groups, s.repeats]))
        flat = b.op("Reshape", spread, b.ints([s.rows, s.groups * s.repeats]))
        if s.groups * s.repeats == s.blocks:
            return flat
        return b.op("Slice", flat, b.ints([0]), b.ints([s.blocks]), b.ints([1]))


def _joined_name(names: tuple[str, ...]) -> str:
    """The first name, with how many more there are before its last part, which says what the bytes are."""
    first, dot, part = names[0].rpartition(".")
    return names[0] if len(names) == 1 else f"{first}+{len(names) - 1}{dot}{part}"
