"""Packed weights in compressed-tensors' own terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwcompile.errors import BadInput, Refused
from lwcompile.formats import NumericFormat, QuantizedTensor


def scheme(format: NumericFormat, columns: int | None) -> dict[str, Any]:
    """The `weights` of a config group; `Refused` for what the format cannot say. columns: of the weight, None if checked before."""
    if format.zero_point != "none":  # the format has them, but what transformers builds to load them into has another shape
        raise Refused("transformers 5 does not load packed zero points: offer quantize{symmetric=true}")
    if columns is not None and format.group_size is not None and columns % format.group(columns):
        raise Refused(f"compressed-tensors wants groups of one size, and {format.group_size} does not divide {columns}")
    return {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if format.group_size is None else "group",
        "group_size": format.group_size,
        "dynamic": False,
    }


def compressed(weight: QuantizedTensor) -> dict[str, Tensor]:
    """`weight_packed` int32 of signed codes, `weight_scale`, and `weight_shape` int64 [2]."""
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise BadInput("quantized weights need compressed-tensors: pip install 'lwcompile[hf]'") from error

    return {
        "weight_packed": pack_to_int32((weight.codes.to(torch.int16) - weight.format.center).to(torch.int8), weight.format.bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.shape),
    }
