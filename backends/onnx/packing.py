"""How a numeric format lies in the file: exactly its bits, widened when the session starts.

onnxruntime multiplies by 4-bit and 8-bit weights (and 2-bit ones on some processors), in blocks of a power of two. A file can
hold any width nevertheless, since operators on constants run once, when a session is created:

    codes    b bits -> a plane of 2 or 4 bits and one of the rest -> `Unpack` -> w = 4 or 8 bits as MatMulNBits reads them
    scales   float16 [N, G] -> Cast to float32 -> repeated where a group spans several blocks
    zeros    integer: packed as the codes are; absent: a constant; float: `quantized` adds a correction

So 3 bits cost 3 bits on file and run at the speed, and in the memory, of 4. Seven are stored as eight.

Costs: about 3 ms of load time per million weights at widths other than 4 and 8, and for that moment up to 8 bytes of memory
per weight (4 at up to 4 bits). Refuses nothing: a group size that has no
power-of-two block of at least 16 is dequantized once, when the session starts (`block` is None).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from lwcompile.backends.onnx.builder import OPSET, OWN, Builder
from lwcompile.formats import NumericFormat, unpack_bits

LARGEST_BLOCK = 256


def width_of(bits: int) -> int:
    """The code width that the runtime computes with."""
    return 4 if bits <= 4 else 8


def stored_bits(bits: int) -> int:
    """The width on file: 7 bits are stored as 8, the others as they are."""
    return 8 if bits == 7 else bits


def planes(bits: int) -> tuple[int, int]:
    """The widths of the low and the high bit plane of codes that are widened; the high one may be 0."""
    low = 2 if bits <= 3 else 4
    return low, bits - low


@dataclass(frozen=True)
class Storage:
    """The layout of one weight [rows, in_features] in a format: what `price` counts and `quantized` writes."""

    format: NumericFormat
    rows: int
    in_features: int

    @classmethod
    def of(cls, format: NumericFormat, shape: Sequence[int]) -> Storage:
        return cls(format, math.prod(shape[:-1]), shape[-1])

    @property
    def form(self) -> tuple[NumericFormat, int]:
        """What two weights must share for their rows to be stored as one weight's."""
        return self.format, self.in_features

    @property
    def bits(self) -> int:
        """Bits per code on file."""
        return stored_bits(self.format.bits)

    @property
    def width(self) -> int:
        """Bits per code in memory."""
        return width_of(self.format.bits)

    @property
    def groups(self) -> int:
        return self.format.groups(self.in_features)

    @property
    def block(self) -> int | None:
        """The runtime's block size: the one that pads rows least, then the largest; None where none divides the groups."""
        group = self.format.group(self.in_features) if self.groups > 1 else LARGEST_BLOCK
        sizes = [1 << e for e in range(4, 9) if group % (1 << e) == 0]
        return min(sizes, key=lambda size: (-(-self.in_features // size) * size, -size), default=None)

    @property
    def blocks(self) -> int:
        """Blocks per row; where there is one group, as many as cover the row."""
        return -(-self.in_features // self.block) if self.block else self.groups

    @property
    def repeats(self) -> int:
        """Blocks per group, the last group's included."""
        if not self.block or self.groups == 1:
            return self.blocks if self.block else 1
        return self.format.group(self.in_features) // self.block

    @property
    def columns(self) -> int:
        """Codes per row, padded to whole blocks."""
        return self.blocks * self.block if self.block else -(-self.in_features // 16) * 16

    @property
    def zero_columns(self) -> int:
        """Zero points per row, padded to whole bytes where the runtime reads them as they are stored."""
        per_byte = 8 // self.width
        return -(-self.groups // per_byte) * per_byte if self.repeats == 1 and self.block else self.groups

    @property
    def code_bytes(self) -> int:
        return packed_bytes(self.rows * self.columns, self.bits, self.width)

    @property
    def zero_bytes(self) -> int:
        if self.format.zero_point == "none":
            return 0
        if self.format.zero_point == "float":
            return self.scale_bytes
        return packed_bytes(self.rows * self.zero_columns, self.bits, self.zero_width)

    @property
    def zero_width(self) -> int:
        """Zero points that are repeated over blocks are unpacked to one per byte first."""
        return self.width if self.repeats == 1 and self.block else 8

    @property
    def scale_bytes(self) -> int:
        return self.rows * self.groups * self.format.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.code_bytes + self.scale_bytes + self.zero_bytes


def packed_bytes(count: int, bits: int, width: int) -> int:
    """Bytes of `count` codes: whole runs of 8 bytes of width-`width` codes, times bits over width."""
    words = -(-count * width // 64)
    return words * bits * 8 // width


def plane_shapes(count: int, bits: int, width: int) -> list[tuple[int, ...]]:
    """Shapes of the uint8 tensors that hold `count` codes: [bytes], or a low plane [parts, n] and, if need be, a high one [1, n]."""
    total = packed_bytes(count, width, width)
    if bits == width:
        return [(total,)]
    low, high = planes(bits)
    parts = low // high if high else 1
    n = total * low // width // parts
    return [(parts, n), (1, n)] if high else [(parts, n)]


def pack_planes(codes: Tensor, bits: int, width: int) -> list[Tensor]:
    """uint8 codes (any shape, row-major) -> the tensors of `plane_shapes`, which `unpack_function` turns into codes of `width` bits.

    The codes are first laid out as the runtime wants them, low nibble first. That byte string is read as [slots, parts, n], and
    the low plane's bits of slot m go to bits m * low.. of the plane's byte [parts, n], the high plane's of (m, r) likewise to [n].
    """
    flat = codes.reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, packed_bytes(len(flat), width, width) * 8 // width - len(flat)))
    target = flat if width == 8 else flat[0::2] | (flat[1::2] << 4)
    if bits == width:
        return [target.contiguous()]
    low, high = planes(bits)
    slots, parts = width // low, low // high if high else 1
    target = target.reshape(slots, parts, -1)
    packed = [_gathered(target & _mask(low, width), low)]
    if high:
        packed.append(_gathered(((target >> low) & _mask(high, width)).reshape(slots * parts, 1, -1), high))
    return packed


def _gathered(pieces: Tensor, plane: int) -> Tensor:
    """[slots, ...] -> [...], slot m at bits m * plane."""
    whole = torch.zeros_like(pieces[0])
    for m, piece in enumerate(pieces):
        whole |= piece << (plane * m)
    return whole


def _mask(plane: int, width: int) -> int:
    ones = (1 << plane) - 1
    return ones if width == 8 else ones * 0x11


def unpack_function(bits: int, width: int) -> ir.Function:
    """`Unpack(plane, [plane,] shape) -> codes of `width` bits`, the inverse of `pack_planes`.

    Broadcast shifts do it in few steps: each makes a copy that the runtime keeps until the session stands.
    """
    uint8 = ir.DataType.UINT8
    first, second = (ir.Value(name=name, type=ir.TensorType(uint8)) for name in ("low", "high"))
    shape = ir.Value(name="shape", type=ir.TensorType(ir.DataType.INT64))
    body = _FunctionBody()
    low, high = planes(bits)
    slots, parts = width // low, low // high if high else 1

    def spread(plane: ir.Value, moves: list[list[list[int]]], bits: int) -> ir.Value:
        moved = body.op("BitShift", plane, body.constant(moves, uint8), direction="RIGHT", dtype=uint8)
        return body.op("BitwiseAnd", moved, body.constant(_mask(bits, width), uint8))

    whole = spread(first, [[[low * m]] for m in range(slots)], low)
    if high:
        top = spread(second, [[[high * (m * parts + r)] for r in range(parts)] for m in range(slots)], high)
        whole = body.op("BitwiseOr", whole, body.op("BitShift", top, body.constant(low, uint8), direction="LEFT"))
    inputs = [first, second, shape] if high else [first, shape]
    return body.function(f"Unpack{bits}to{width}", inputs, body.op("Reshape", whole, shape))


def nibbles_function() -> ir.Function:
    """`PackNibbles(codes [N, B]) -> [N, ceil(B/2)]`: one code per byte -> two, the first one low."""
    uint8, int32 = ir.DataType.UINT8, ir.DataType.INT32
    codes = ir.Value(name="codes", type=ir.TensorType(uint8))
    body = _FunctionBody()
    flat = body.op("Cast", codes, to=int32, dtype=int32)
    padded = body.op("Pad", flat, body.ints([0, 0, 0, 1]))
    ends, axis, step = body.ints([1 << 40]), body.ints([1]), body.ints([2])
    low = body.op("Slice", flat, body.ints([0]), ends, axis, step)
    high = body.op("Slice", padded, body.ints([1]), ends, axis, step)
    both = body.op("Add", low, body.op("Mul", high, body.constant(16, int32)))
    return body.function("PackNibbles", [codes], body.op("Cast", both, to=uint8, dtype=uint8))


class _FunctionBody(Builder):
    """A builder whose constants are nodes: functions have no initializers."""

    def initializer(self, name: str, tensor: ir.Tensor) -> ir.Value:
        return self.op("Constant", value=tensor, dtype=tensor.dtype)

    def function(self, name: str, inputs: list[ir.Value], output: ir.Value) -> ir.Function:
        graph = ir.Graph(inputs, [output], nodes=self.nodes, opset_imports={"": OPSET}, name=name)
        return ir.Function(OWN, name, graph=graph, attributes=[])


def stored_codes(packed: Tensor, storage: Storage) -> list[Tensor]:
    """Packed codes as the program stores them -> as the file does: the same bytes, at 4 and 8 bits without padding."""
    if storage.format.bits == storage.width and packed.numel() == storage.code_bytes:
        return [packed]
    codes = unpack_bits(packed, storage.format.bits, storage.in_features)
    codes = torch.nn.functional.pad(codes, (0, storage.columns - storage.in_features))
    return pack_planes(codes, storage.bits, storage.width)


def stored_zeros(packed: Tensor, storage: Storage) -> list[Tensor]:
    """Packed integer zero points as the program stores them -> as the file does."""
    zeros = unpack_bits(packed, storage.format.bits, storage.groups)
    zeros = torch.nn.functional.pad(zeros, (0, storage.zero_columns - storage.groups))
    return pack_planes(zeros, storage.bits, storage.zero_width)


def centre_byte(storage: Storage) -> int:
    """A byte of zero points for the symmetric grid: its centre, at the runtime's width."""
    return storage.format.center * (0x11 if storage.width == 4 else 1)
