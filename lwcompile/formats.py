"""Numeric formats: what a quantized weight is, what it stores, and the bytes it takes.

A format is one affine grid per group of consecutive input channels:

    w[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g],    code in 0 .. 2**bits - 1

Solvers write it (`QuantizedTensor`), graphs compute with it (`lwcompile.ops`), every backend reads it. What is stored
takes exactly `bits` per code: eight codes are `bits` bytes, little-endian, and each row starts on a byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lwcompile.errors import BadInput, BadPlan

ZeroPoint = Literal["none", "integer", "float"]
ScaleDtype = Literal["float16", "float32"]

CHUNK = 1 << 17
"""Elements worked on at a time, so that temporaries stay in a core's cache."""


@dataclass(frozen=True)
class NumericFormat:
    """An affine grid with `bits` per code and one scale (and zero point) per group of `group_size` input channels.

    `group_size=None` is one group per row. The zero point is absent ("none": the grid is symmetric about the code
    2**(bits-1), and the scale may be negative), a code ("integer", stored in `bits` bits) or a number of the scale's
    dtype ("float", any position, so a grid of scale and minimum as in GGUF's Q4_1 fits).
    """

    bits: int
    group_size: int | None = 64
    zero_point: ZeroPoint = "integer"
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise BadPlan(f"a numeric format has 2 to 8 bits, not {self.bits!r}")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise BadPlan(f"group_size is a positive number of input channels or none, not {self.group_size!r}")
        for key, kinds in (("zero_point", get_args(ZeroPoint)), ("scale_dtype", get_args(ScaleDtype))):
            if getattr(self, key) not in kinds:
                raise BadPlan(f"{key} is one of {', '.join(kinds)}, not {getattr(self, key)!r}")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def center(self) -> int:
        """The code of 0.0 where there is no zero point."""
        return 2 ** (self.bits - 1)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.scale_dtype == "float16" else torch.float32

    def group(self, in_features: int) -> int:
        """Input channels per group in a weight that has `in_features` of them."""
        return in_features if self.group_size is None else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Groups per row; the last one may be partial."""
        return -(-in_features // self.group(in_features))

    def stored_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of all that `QuantizedTensor.pack` stores for a weight of this shape, [..., in_features]."""
        in_features = shape[-1]
        groups = self.groups(in_features)
        zero = {"none": 0, "integer": row_bytes(groups, self.bits), "float": groups * self.dtype.itemsize}
        per_row = row_bytes(in_features, self.bits) + groups * self.dtype.itemsize + zero[self.zero_point]
        return math.prod(shape[:-1]) * per_row

    def bits_per_weight(self, shape: Sequence[int]) -> float:
        """Stored bits per weight: codes, scales, zero points, and the padding of rows and of the last group."""
        return 8 * self.stored_bytes(shape) / math.prod(shape)

    def round_scale(self, scale: Tensor) -> Tensor:
        """float32 scales as they will read back from storage: finite, and 1 where the group has no range."""
        finite = torch.finfo(self.dtype)
        magnitude = scale.abs().clamp(2.0**-24, finite.max).to(self.dtype).float().copysign(scale)
        return torch.where(scale == 0, 1.0, magnitude)

    def round_zero(self, zero: Tensor) -> Tensor:
        """float32 zero points as they will read back from storage."""
        if self.zero_point == "integer":
            return zero.round().clamp(0, self.top)
        limit = torch.finfo(self.dtype).max
        return zero.clamp(-limit, limit).to(self.dtype).float()


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight on its grid, unpacked.

    `codes` uint8 [N, K]; `scale` [N, G] in the format's scale dtype; `zero` [N, G]: uint8 codes, or the scale dtype,
    or None, as the format's zero point says.
    """

    format: NumericFormat
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @classmethod
    def nearest(cls, weight: Tensor, format: NumericFormat, scale: Tensor, zero: Tensor | None = None) -> QuantizedTensor:
        """Round each weight [N, K] to the nearest point of a given grid; `scale` and `zero` are [N, G] floats."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        group = format.group(weight.shape[1])
        scale = format.round_scale(scale.float())
        zero = None if zero is None else format.round_zero(zero.float())
        for rows in row_chunks(weight.shape):
            x = weight[rows].float().clone()
            for part, columns in _group_views(x, group):
                part.div_(scale[rows, columns, None])
                part.add_(format.center if zero is None else zero[rows, columns, None])
            codes[rows] = x.round_().clamp_(0, format.top)
        return cls.of(format, codes, scale, zero)

    @classmethod
    def of(cls, format: NumericFormat, codes: Tensor, scale: Tensor, zero: Tensor | None) -> QuantizedTensor:
        """From codes and float32 grids that are already rounded to what the format stores."""
        if zero is not None:
            zero = zero.to(torch.uint8 if format.zero_point == "integer" else format.dtype)
        return cls(format, codes.to(torch.uint8), scale.to(format.dtype), zero)

    def cpu(self) -> QuantizedTensor:
        zero = None if self.zero is None else self.zero.cpu()
        return QuantizedTensor(self.format, self.codes.cpu(), self.scale.cpu(), zero)

    @property
    def shape(self) -> tuple[int, int]:
        rows, in_features = self.codes.shape
        return rows, in_features

    def dequantize(self) -> Tensor:
        """The float32 weight [N, K] that the codes stand for."""
        out = torch.empty(self.shape, dtype=torch.float32, device=self.codes.device)
        zero = torch.full_like(self.scale, self.format.center) if self.zero is None else self.zero
        for rows in row_chunks(self.shape):
            out[rows] = self.codes[rows]
            to_weights_(out[rows], self.scale[rows].float(), zero[rows].float(), self.format.group(self.shape[1]))
        return out

    def pack(self) -> dict[str, Tensor]:
        """What is stored: "codes" uint8 [N, ceil(K*bits/8)], "scale" [N, G], and "zero" (integer ones packed too)."""
        tensors = {"codes": pack_bits(self.codes, self.format.bits), "scale": self.scale.contiguous()}
        if self.zero is not None:
            packed = self.format.zero_point == "integer"
            tensors["zero"] = pack_bits(self.zero, self.format.bits) if packed else self.zero.contiguous()
        return tensors

    @classmethod
    def unpack(cls, format: NumericFormat, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """Read back what `pack` stored for a weight of this shape; `BadInput` if the tensors do not fit the format."""
        rows, in_features = shape
        groups = format.groups(in_features)
        wanted = {
            "codes": ((rows, row_bytes(in_features, format.bits)), torch.uint8),
            "scale": ((rows, groups), format.dtype),
            "zero": ((rows, groups), format.dtype),
        }
        if format.zero_point == "none":
            del wanted["zero"]
        if format.zero_point == "integer":
            wanted["zero"] = ((rows, row_bytes(groups, format.bits)), torch.uint8)
        found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        if found != wanted:
            raise BadInput(f"packed tensors do not fit {format} at shape {tuple(shape)}: found {found}, need {wanted}")
        zero = tensors.get("zero")
        if format.zero_point == "integer" and zero is not None:
            zero = unpack_bits(zero, format.bits, groups)
        return cls(format, unpack_bits(tensors["codes"], format.bits, in_features), tensors["scale"], zero)


def row_bytes(length: int, bits: int) -> int:
    """Bytes of one packed row of `length` codes."""
    return -(-length * bits // 8)


def row_chunks(shape: Sequence[int]) -> list[slice]:
    """Slices of rows of about `CHUNK` elements."""
    step = max(1, CHUNK // shape[1])
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def to_weights_(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> None:
    """Turn float codes [N, K] into weights in place, by float32 scales and zero points [N, G]."""
    for part, columns in _group_views(codes, group):
        part.sub_(zero[:, columns, None]).mul_(scale[:, columns, None])


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] below 2**bits -> uint8 [N, ceil(K*bits/8)]: code k at bits k*bits.. of its row."""
    rows, length = codes.shape
    if bits == 8:
        return codes.contiguous()
    words = F.pad(codes, (0, -length % 8)).contiguous().view(torch.int64)
    for low, high, shift in reversed(_moves(bits)):
        words = (words & low) | ((words >> shift) & high)
    stream = words.unsqueeze(-1).view(torch.uint8)[..., :bits].reshape(rows, -1)
    return stream[:, : row_bytes(length, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [N, ceil(length*bits/8)] -> uint8 [N, length]."""
    if bits == 8:
        return packed
    rows, stored = packed.shape
    eights = -(-length // 8)
    if stored != eights * bits:
        packed = F.pad(packed, (0, eights * bits - stored))
    words = F.pad(packed.reshape(rows, eights, bits), (0, 8 - bits)).view(torch.int64).squeeze(-1)
    for low, high, shift in _moves(bits):
        moved = (words & high) << shift
        words.bitwise_and_(low).bitwise_or_(moved)
    return words.view(torch.uint8)[:, :length]


def _moves(bits: int) -> list[tuple[int, int, int]]:
    """How eight adjacent fields spread to eight bytes: halves move apart, then quarters, then single fields.

    Each step is (mask of what stays, mask of what moves, distance), over lanes that are twice as many each time.
    """
    moves = []
    for fields in (4, 2, 1):
        lanes = sum(1 << lane for lane in range(0, 64, 16 * fields))
        low = lanes * ((1 << fields * bits) - 1)
        moves.append((low, low << fields * bits, fields * (8 - bits)))
    return moves


def _group_views(x: Tensor, group: int) -> list[tuple[Tensor, slice]]:
    """[N, K] as [N, whole groups, group] and [N, 1, rest] views, with the columns of [N, G] each one takes."""
    whole = x.shape[1] // group
    views = [(x[:, : whole * group].unflatten(1, (whole, group)), slice(0, whole))]
    if whole * group < x.shape[1]:
        views.append((x[:, whole * group :].unsqueeze(1), slice(whole, whole + 1)))
    return views
