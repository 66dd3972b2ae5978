"""From the stored packing to the kernels' words: done once, when a model is lowered.

Codes are padded to whole chunks of 32, split into planes of 1, 2, 4 and 8 bits, and laid out in pairs (`kernels.packed`).
Integer zero points are unpacked to a byte each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lwcompile.formats import NumericFormat, unpack_bits

CHUNK = 32


def plane_widths(bits: int) -> tuple[int, ...]:
    """As `kernels.packed.planes`, which only a machine with triton can import."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_bytes(format: NumericFormat, shape: Sequence[int]) -> int:
    """Bytes of what `repack` makes of a weight of this shape, [..., in_features]."""
    groups = format.groups(shape[-1])
    zero = {"none": 0, "integer": 1, "float": format.dtype.itemsize}[format.zero_point]
    row = 4 * format.bits * -(-shape[-1] // CHUNK) + groups * (format.dtype.itemsize + zero)
    return math.prod(shape[:-1]) * row


def repack(codes: Tensor, zero: Tensor | None, bits: int, in_features: int, groups: int) -> tuple[Tensor, Tensor | None]:
    """(words, zero) of packed codes uint8 [N, ceil(in_features*bits/8)] and zero points as `lwcompile::dequantize` takes them."""
    words = pack_words(unpack_bits(codes, bits, in_features), bits)
    if zero is not None and zero.dtype == torch.uint8:
        zero = unpack_bits(zero, bits, groups).contiguous()
    return words, zero


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] -> int32 words [N, bits * ceil(K / 32)], plane by plane; codes 2i and 2i + 1 of a word in its two halves."""
    padded = F.pad(codes, (0, -codes.shape[1] % CHUNK))
    found, below = [], 0
    for width in plane_widths(bits):
        part = ((padded >> below) & ((1 << width) - 1)).unflatten(1, (-1, 2, 8 // width, 2)).permute(0, 1, 4, 2, 3)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        found.append((part << shifts).sum(4, dtype=torch.uint8).flatten(1).view(torch.int32))
        below += width
    return torch.cat(found, 1)
