"""The project's operators: what a graph of level `quantized` computes with, and attention that is partly linear.

`lwcompile::dequantize` turns packed codes into a float32 weight, so that a quantized linear is
`aten.linear(x, lwcompile::dequantize(codes, scale, zero, ...), bias)` and an embedding is
`aten.embedding(lwcompile::dequantize(...), ids)`. Import this module before loading a program that holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lwcompile.formats import row_chunks, to_weights_, unpack_bits
from lwcompile.linear_attention import absorb_keys, hybrid_attention

__all__ = ["absorb_keys", "dequantize", "hybrid_attention"]


@torch.library.custom_op("lwcompile::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, in_features: int) -> Tensor:
    """The float32 weight [N, in_features] of packed codes.

    `codes` uint8 [N, ceil(in_features*bits/8)] as `pack_bits` writes them; `scale` float [N, G] with
    G = ceil(in_features/group_size); `zero` is None (the code 2**(bits-1)), uint8 (packed as the codes are) or float
    [N, G]. Rows are worked on in pieces that fit a core's cache.
    """
    rows, groups = scale.shape
    out = torch.empty((rows, in_features), dtype=torch.float32, device=codes.device)
    if zero is None:
        zero = scale.new_full((1, groups), 2 ** (bits - 1)).expand(rows, groups)
    elif zero.dtype == torch.uint8:
        zero = unpack_bits(zero, bits, groups)
    scale, zero = scale.float(), zero.float()
    for chunk in row_chunks((rows, in_features)):
        piece = out[chunk]
        piece.copy_(unpack_bits(codes[chunk], bits, in_features))
        to_weights_(piece, scale[chunk], zero[chunk], group_size)
    return out


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, in_features: int) -> Tensor:
    return torch.empty((scale.shape[0], in_features), dtype=torch.float32, device=codes.device)
