"""The project's operators: what a graph of level `quantized` computes with, and attention that is partly linear.

`lwcompile::dequantize` turns packed codes into a float32 weight, so that a quantized linear is
`aten.linear(x, lwcompile::dequantize(codes, scale, zero, ...), bias)` and an embedding is
`aten.embedding(lwcompile::dequantize(...), ids)`. Being a torch operator, with a kernel that runs on every device and a fake one,
it passes through torch.export, `.pt2` files, torch.compile and this package's own program files as one call. It has gradients for
scales and float zero points, which healing trains.

Where others plug in:

    a device    a faster kernel for it: `lwcompile.ops.dequantize.register_kernel("cuda")(function)`, same arguments
    a format    an operator of your own, `torch.library.custom_op("acme::decode", mutates_args=())` with a fake, announced
                with `unpacks(torch.ops.acme.decode.default)`; the entry point group `lwcompile.operators` names the module
                that does so by its namespace (`acme = "acme_codes.ops"`), and a saved program that calls it then finds it

What is announced counts as packed storage: a graph that calls it is of level `quantized`, and where a runtime has no kernel for
packed weights, the call is replaced by its value, once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from lwcompile.formats import row_chunks, to_weights_, unpack_bits
from lwcompile.linear_attention import absorb_keys, hybrid_attention
from lwcompile.relu_attention import relu_attention

__all__ = ["absorb_keys", "dequantize", "hybrid_attention", "relu_attention"]

_UNPACKING: set[OpOverload] = set()


def unpacks(operator: OpOverload) -> OpOverload:
    """Announce an operator that makes a dense weight of packed tensors, reading nothing else."""
    _UNPACKING.add(operator)
    return operator


def is_unpacking(target: object) -> bool:
    """Whether a call's target is such an operator."""
    return target in _UNPACKING


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, scale, zero, *sizes = inputs
    ctx.save_for_backward(codes, scale, zero)
    ctx.sizes = sizes


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of the scales: sum of (code - zero) * grad over each group. Of float zero points: -scale * sum of grad. Codes have none."""
    codes, scale, zero = ctx.saved_tensors
    _, group_size, in_features = ctx.sizes
    rows, groups = scale.shape

    def summed(x: Tensor) -> Tensor:
        return F.pad(x, (0, groups * group_size - in_features)).view(rows, groups, group_size).sum(-1)

    of_scale = of_zero = None
    if ctx.needs_input_grad[1]:
        steps = dequantize(codes, torch.ones_like(scale), zero, *ctx.sizes)
        of_scale = summed(steps * grad).to(scale.dtype)
    if ctx.needs_input_grad[2]:
        of_zero = (-scale.float() * summed(grad)).to(zero.dtype)
    return None, of_scale, of_zero, None, None, None


dequantize.register_autograd(_gradients, setup_context=_save)
unpacks(torch.ops.lwcompile.dequantize.default)
