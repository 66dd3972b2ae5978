"""Every lowering against torch itself: small functions of one or two tensors, captured with a free first size, run in onnxruntime."""

# ruff: noqa: E501  (a table of one-liners)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx_packed import plain_session
from torch import Tensor, nn

from lwcompile.backends.onnx.backend import Onnx
from lwcompile.errors import Refused
from lwcompile.program import Program
from lwcompile.tracing import capture_module

G = torch.Generator().manual_seed(0)
X = torch.randn(4, 6, 8, generator=G)
Y = torch.randn(4, 6, 8, generator=G)
P = X.abs() + 0.1
IMAGE = torch.randn(4, 6, 12, 10, generator=G)
INTS = torch.randint(-9, 9, (4, 6), generator=G)
DAYS = torch.randint(1, 9, (4, 6), generator=G)
MASK = X > 0
IDS = torch.randint(0, 6, (4, 5), generator=G)

CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "elementwise": (lambda x: x.abs().log() + (x.exp() - x.sin() * x.cos()).tanh() + x.sigmoid().neg() + x.erf(), (X,)),
    "roots": (lambda x: x.sqrt() + x.rsqrt() + x.reciprocal() + x.square() + x.log1p() + x.expm1() + x.log2() + x.log10(), (P,)),
    "rounding": (lambda x: x.floor() + 2 * x.ceil() + 3 * x.round() + x.sign(), (3 * X,)),
    "trigonometry": (lambda x: x.tan() + x.atan() + x.sinh() + x.cosh(), (X,)),
    "arithmetic": (lambda x, y: torch.add(x, y, alpha=2) - torch.sub(x, y, alpha=3) * 0.5 + 2 / (y.abs() + 1) + (1 - x), (X, Y)),
    "powers": (lambda x: x**2 + x**3 + x**0.5 + x**-0.5 + x**1.7 + 2.0**x, (P,)),
    "division of integers": (lambda a, b: (a // (b + 1), a % (b + 1), torch.fmod(a, b + 1), a / (b + 1)), (INTS, DAYS)),
    "division of floats": (lambda x, y: (x // y, x % y, torch.div(x, y, rounding_mode="trunc")), (3 * X, P)),
    "limits": (lambda x, y: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + torch.minimum(x, y) + torch.maximum(x, y) + x.clamp_max(0.2), (X, Y)),
    "comparisons": (lambda x, y: (x > y) & (x <= 0.5) | (x == y) ^ (x != 0.1), (X, Y)),
    "comparisons of mixed types": (lambda a, x: (a[:, :, None] >= x, a.eq(3), a < 2.5), (INTS, X)),
    "logic": (lambda m: (~m, m.logical_not(), m & True, m.any(-1), m.all(-1, keepdim=True), m.any()), (MASK,)),
    "bits": (lambda a: (a & 5, a | 3, a ^ 6, ~a), (DAYS,)),
    "choices": (lambda x, m: torch.where(m, x, 0.0) + x.masked_fill(m, -1.0) + torch.where(m, 2.0, x), (X, MASK)),
    "numbers": (lambda x: (x.isnan(), x.isinf()), (X,)),
    "activations": (lambda x: F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.relu(x) + F.leaky_relu(x, 0.2) + F.elu(x), (X,)),
    "gates": (lambda x: F.softplus(x) + F.hardswish(x) + F.hardsigmoid(x) + F.mish(x) + F.logsigmoid(x) + F.selu(x), (X,)),
    "glu": (lambda x: F.glu(x, -1), (X,)),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3) + torch.addcmul(x, x, y, value=0.5), (X, Y)),
    "casts": (lambda x, m: (x.long(), m.float(), m.long() + 1, x.double() * 2, x.to(torch.int32)), (3 * X, MASK)),
    "promotion": (lambda a, x: a[:, :, None] * x + a[:, :, None] * 2.5 + (a > 0)[:, :, None], (INTS, X)),
    "reshape": (lambda x: x.reshape(x.shape[0], -1) @ torch.ones(48, 3), (X,)),
    "two free sizes": (lambda x, y: (x[:, None] + y[None]).reshape(x.shape[0] * y.shape[0], 6, 8), (X, Y)),
    "flatten": (lambda x: (x.flatten(1), x.flatten(0, 1), x.unflatten(-1, (2, 4)), x.flatten()), (X,)),
    "axes": (lambda x: (x.transpose(1, 2), x.permute(2, 0, 1), x.movedim(0, 2), x[:, None].squeeze(1), x.unsqueeze(-1)), (X,)),
    "expand": (lambda x: (x[:, :1].expand(-1, 5, -1), x[:, None].expand(x.shape[0], 3, 6, 8), x.sum(0).expand_as(x)), (X,)),
    "repeat": (lambda x: (x.repeat(1, 2, 1), x.repeat(2, 1, 1, 1), x.tile(2), x.repeat_interleave(3, dim=1), x.repeat_interleave(2, 0)), (X,)),
    "slices": (lambda x: (x[:, 1:4], x[..., ::2], x[:, -2:], x[:, 3], x[..., -1], x.narrow(1, 2, 3), x[1:, :, 0]), (X,)),
    "parts": (lambda x: (*x.split(4, 1), *x.chunk(2, -1), *x.split([1, 2, 3], 1), *x.unbind(1)), (X,)),
    "joins": (lambda x, y: (torch.cat([x, y], 1), torch.stack([x, y], 1), torch.cat([x, y], -1), torch.stack([x, y], -1)), (X, Y)),
    "pads": (lambda x: (F.pad(x, (1, 2)), F.pad(x, (1, 0, 2, 1), value=3.0), F.pad(x, (2, 1), "reflect"), F.pad(x, (1, 1), "replicate")), (X,)),
    "shifts": (lambda x: (x.roll(1, 1), x.roll((1, -2), (1, 2)), x.flip(1), x.diff(dim=1), torch.diff(x, n=2)), (X,)),
    "grids": (lambda x: torch.meshgrid(x[0, 0], x[0, :, 0], indexing="xy") + torch.meshgrid(x[0, 0], x[0, :, 0], indexing="ij"), (X,)),
    "new tensors": (lambda x: (torch.zeros(x.shape[0], 2) + 1, torch.full_like(x, 2.5), x.new_ones(x.shape[0]), torch.zeros_like(x) + x), (X,)),
    "ranges": (lambda x: (torch.arange(x.shape[0]) * 2, torch.arange(1, x.shape[0] + 3, 2), torch.arange(x.shape[0]).float() / 3), (X,)),
    "triangles": (lambda x: (x.triu(1), x.tril(-1), torch.ones(8, 8).tril() * x[:, :1]), (X,)),
    "gathers": (lambda x, i: (x[:, i[0]], x.index_select(1, i[0]), x.gather(1, i[:, :, None].expand(-1, -1, 8)), x[..., i[0], :]), (X, IDS)),
    "index by several": (lambda x, i: (x[torch.arange(x.shape[0])[:, None], i], x[:, i[0], i[0]], x[:, i[0][:, None], i[0][None]]), (X, IDS)),
    "index around": (lambda x, i: x[torch.arange(x.shape[0])[:, None], :, i], (X, IDS)),
    "writes": (lambda x, i: (x.index_put((i[0],), x[:1].expand(5, 6, 8) * 0 + 1.0) if False else x.slice_scatter(x[:, :2] * 0, 1, 3, 5)), (X, IDS)),
    "scatter": (lambda x, i: (x.scatter(1, i[:, :, None], 1.5), x.scatter_add(1, i[:, :, None], x[:, :5, :1]), x.select_scatter(x[:, 0], 1, 2)), (X, IDS)),
    "index_put": (lambda x, i: (x.index_put((torch.arange(x.shape[0]), i[:, 0]), x[:, 0] * 0 + 2.0)), (X, IDS)),
    "index_put adds": (lambda x, i: x.flatten(0, 1).index_put((i.flatten(),), x[:, :5].flatten(0, 1), accumulate=True), (X, IDS)),
    "masked write": (lambda x, m: x.index_put((m,), torch.tensor(0.5)), (X, MASK)),
    "sorts": (lambda x: (*x.topk(3, -1), *x.sort(1), x.argsort(-1, descending=True)), (X,)),
    "one hot": (lambda i: F.one_hot(i, 6), (IDS,)),
    "buckets": (lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 0.5])), (X,)),
    "histogram": (lambda i: torch.histc(i.float().flatten(), bins=6, min=0, max=5), (IDS,)),
    "sums": (lambda x: (x.sum(), x.sum(1), x.mean(-1, keepdim=True), x.sum((1, 2)), x.prod(1), x.logsumexp(-1)), (X,)),
    "extremes": (lambda x: (*x.max(1), *x.min(-1), x.amax((1, 2)), x.amin(1), x.argmax(-1), x.argmin(1, keepdim=True), x.max()), (X,)),
    "variances": (lambda x: (x.var(-1), x.std(-1, keepdim=True), x.var(1, correction=0), *torch.var_mean(x, -1)), (X,)),
    "norms over axes": (lambda x: (x.norm(dim=-1), torch.linalg.vector_norm(x, 1, dim=1), F.normalize(x, dim=-1)), (X,)),
    "running sums": (lambda x, i: (x.cumsum(1), i.cumsum(-1), (i > 2).cumsum(-1)), (X, IDS)),
    "softmax": (lambda x: (x.softmax(-1), x.log_softmax(1)), (X,)),
    "layer norm": (lambda x: (F.layer_norm(x, (8,)), F.layer_norm(x, (6, 8), torch.full((6, 8), 2.0))), (X,)),
    "rms norm": (lambda x: (F.rms_norm(x, (8,)), F.rms_norm(x, (8,), torch.full((8,), 2.0), 1e-3)), (X,)),
    "group norm": (lambda x: F.group_norm(x, 3, torch.full((6,), 2.0), torch.full((6,), 0.5)), (IMAGE,)),
    "batch norm": (lambda x: F.batch_norm(x, torch.full((6,), 0.3), torch.full((6,), 1.7), torch.full((6,), 2.0)), (IMAGE,)),
    "products": (lambda x, y: (x @ y.transpose(1, 2), torch.bmm(x, y.mT), torch.baddbmm(x @ y.mT, x, y.mT, beta=0.5, alpha=2)), (X, Y)),
    "einsum": (lambda x, y: torch.einsum("bsd,btd->bst", x, y), (X, Y)),
    "conv1d": (lambda x: F.conv1d(x, torch.ones(4, 3, 3) / 9, stride=2, padding=1, groups=2), (X,)),
    "conv2d": (lambda x: F.conv2d(x, torch.ones(4, 6, 3, 2) / 36, torch.ones(4), padding="same"), (IMAGE,)),
    "conv transpose": (lambda x: F.conv_transpose2d(x, torch.ones(6, 4, 3, 3) / 9, stride=2, padding=1, output_padding=1), (IMAGE,)),
    "pooling": (lambda x: (F.max_pool2d(x, 2), F.avg_pool2d(x, 3, 2, 1), F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (4, 5))), (IMAGE,)),
    "unfold": (lambda x: F.unfold(x, (3, 2), stride=2, padding=1), (IMAGE,)),
    "bilinear": (lambda x: F.interpolate(x, size=(7, 15), mode="bilinear"), (IMAGE,)),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"), (IMAGE,)),
    "align corners": (lambda x: F.interpolate(x, size=(7, 15), mode="bilinear", align_corners=True), (IMAGE,)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), (IMAGE,)),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x[:, :4], 2), (IMAGE,)),
    "attention without a mask": (lambda x, y: F.scaled_dot_product_attention(x[:, None], y[:, None], x[:, None]), (X, Y)),
    "causal attention": (lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True), (X,)),
    "attention of rank 3": (lambda x, m: F.scaled_dot_product_attention(x, x, x, m[:, :, :6]), (X, MASK)),
    "attention with a row mask": (lambda x, i: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], (i[:, None, None] > 0)), (X, DAYS)),
    "attention with a bias": (lambda x, y: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], y[:, None, :, :6], scale=0.3), (X, Y)),
}  # fmt: skip


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor | None = None) -> Any:
        return self.function(a) if b is None else self.function(a, b)


def lowered(function: Callable[..., Any], inputs: tuple[Tensor, ...], folder: Path) -> Path:
    example = dict(zip("ab", inputs))
    free = {"a": "rows", "b": "others" if function is CASES["two free sizes"][0] else "rows"}
    graph, _ = capture_module(Function(function), example, {name: {0: free[name]} for name in example})
    Onnx().lower(Program({"forward": graph}, graph.store), folder / "model.onnx", None)
    return folder / "model.onnx"


@pytest.mark.parametrize("name", CASES)
def test_a_lowering_equals_torch(name: str, tmp_path: Path):
    function, inputs = CASES[name]
    path = lowered(function, inputs, tmp_path)
    for rows in (slice(None), slice(0, 3)):
        given = [value[rows] for value in inputs]
        wanted = function(*given)
        got = plain_session(path).run(None, {k: v.numpy() for k, v in zip("ab", given)})
        for a, b in zip(wanted if isinstance(wanted, tuple | list) else (wanted,), got, strict=True):
            b = torch.from_numpy(np.asarray(b))
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_what_depends_on_the_data_is_refused_by_name():
    graph, _ = capture_module(Function(lambda x: x * 2), {"a": X}, {"a": {0: "rows"}})
    node = next(n for n in graph.graph.nodes if n.op == "call_function")
    node.target = torch.ops.aten.erfinv.default
    node.args = node.args[:1]
    reasons = Onnx().unsupported(Program({"forward": graph}, graph.store))
    assert reasons == [f"forward: aten.erfinv.default has no ONNX form here (first at {node.name})"]


def test_a_dtype_that_onnx_lacks_is_refused():
    from lwcompile.backends.onnx.builder import onnx_dtype

    assert onnx_dtype(torch.float32) == ir.DataType.FLOAT
    with pytest.raises(Refused, match="complex64"):
        onnx_dtype(torch.complex64)
