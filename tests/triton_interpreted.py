"""What `test_triton_kernels` runs in a process of its own, under TRITON_INTERPRET=1: every kernel against plain PyTorch.

Sizes are small, since the interpreter takes about a millisecond a program, and odd, since edges are where kernels go wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these tests need TRITON_INTERPRET=1: run tests/test_triton_kernels.py", allow_module_level=True)

from lwcompile.backends.triton.kernels import attention as attention_of
from lwcompile.backends.triton.kernels import embedding as embedding_of
from lwcompile.backends.triton.kernels import launch as launch_of
from lwcompile.backends.triton.kernels import linear as linear_of
from lwcompile.backends.triton.kernels import norm as norm_of
from lwcompile.backends.triton.kernels import rotary as rotary_of
from lwcompile.backends.triton.kernels.norm import Norm
from lwcompile.backends.triton.kernels.packed import Packed
from lwcompile.backends.triton.packing import packed_bytes, repack
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.masks import MaskRule

TOLERANCE = 1e-5
BITS = st.sampled_from([2, 3, 4, 5, 6, 7, 8])
FORMATS = st.builds(
    NumericFormat, BITS, st.sampled_from([None, 7, 24, 32, 64, 128]), st.sampled_from(["none", "integer", "float"]),
    st.sampled_from(["float16", "float32"]),
)  # fmt: skip
SEEDS = st.integers(0, 1 << 20)
few = settings(
    max_examples=int(os.environ.get("LWCOMPILE_TRITON_EXAMPLES", "12")), deadline=None, derandomize=True, database=None
)


def random_weight(rows: int, width: int, format: NumericFormat) -> tuple[Packed, Tensor]:
    """Random codes on a random grid, packed, with the float64 weight that they stand for by the format's own definition."""
    codes = torch.randint(0, 2**format.bits, (rows, width), dtype=torch.uint8)
    groups, top = format.groups(width), 2**format.bits
    scale = torch.rand(rows, groups) + 0.5
    zero = {"none": None, "integer": torch.randint(0, top, (rows, groups)), "float": torch.rand(rows, groups) * top}
    quantized = QuantizedTensor.of(format, codes, scale, zero[format.zero_point])
    stored = quantized.pack()
    words, unpacked = repack(stored["codes"], stored.get("zero"), format.bits, width, groups)
    packed = Packed(words, stored["scale"], unpacked, format.bits, format.group(width), width)
    each = torch.arange(width) // format.group(width)
    middle = torch.full_like(quantized.scale, 2 ** (format.bits - 1)) if quantized.zero is None else quantized.zero
    return packed, (codes.double() - middle.double()[:, each]) * quantized.scale.double()[:, each]


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and torch.isfinite(found).all()
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))


@contextmanager
def ruled(**ways: dict[str, int]) -> Iterator[None]:
    """Each named kernel has one rule, and every product takes it."""
    with mock.patch.dict(launch_of.table_of("default"), {kernel: [way] for kernel, way in ways.items()}):
        launch_of.config_for.cache_clear()
        yield
    launch_of.config_for.cache_clear()


def a_norm(kind: str, width: int) -> Norm | None:
    if kind == "none":
        return None
    return Norm(kind, torch.rand(width) + 0.5, torch.randn(width) if kind == "layer" else None, 1e-5)


@few
@given(FORMATS, st.integers(1, 20), st.integers(1, 200), SEEDS)
def test_repacked_weights_are_the_weights(format: NumericFormat, rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    packed, weight = random_weight(rows, width, format)
    assert error(packed.dequantize(), weight) < 1e-6
    held = sum(t.numel() * t.element_size() for t in (packed.words, packed.scale, packed.zero) if t is not None)
    assert held == packed_bytes(format, (rows, width))


@few
@given(
    FORMATS, st.sampled_from([1, 1, 2, 5, 17, 33]), st.integers(1, 40), st.integers(1, 300), st.sampled_from(["none", "rms", "layer"]),
    st.sampled_from([None, "silu", "gelu", "gelu_tanh", "relu"]), st.booleans(), st.booleans(), SEEDS,
)  # fmt: skip
def test_linear(format, m, n, k, norm, activation, bias, residual, seed) -> None:
    torch.manual_seed(seed)
    packed, weight = random_weight(n, k, format)
    x = torch.randn(m, k)
    options = {
        "bias": torch.randn(n) if bias else None, "residual": torch.randn(m, n) if residual else None,
        "norm": a_norm(norm, k), "activation": activation,
    }  # fmt: skip
    found = linear_of.linear(x, packed, **options)
    given_ = x if options["norm"] is None else options["norm"].reference(x)
    total = linear_of.finish(given_.double() @ weight.T, options["bias"], activation)
    wanted = total if options["residual"] is None else total + options["residual"]
    # What cancels in the sum is still rounded: errors are relative to what is added up.
    terms = (given_.double().abs() @ weight.abs().T).max() + 1
    assert float((found.double() - wanted).abs().max() / terms) < 1e-6
    assert error(found, linear_of.linear_reference(x, packed, **options)) < TOLERANCE


@few
@given(
    FORMATS,
    FORMATS,
    st.sampled_from([1, 3, 20]),
    st.integers(1, 40),
    st.integers(1, 200),
    st.sampled_from(["none", "rms"]),
    SEEDS,
)
def test_gated_takes_two_weights_of_unlike_formats(first, second, m, n, k, norm, seed) -> None:
    torch.manual_seed(seed)
    (gate, _), (up, _) = random_weight(n, k, first), random_weight(n, k, second)
    x, chosen = torch.randn(m, k), a_norm(norm, k)
    for activation in ("silu", "gelu_tanh"):
        found = linear_of.gated(x, gate, up, activation, norm=chosen)
        assert error(found, linear_of.gated_reference(x, gate, up, activation, norm=chosen)) < TOLERANCE


WAYS = st.sampled_from(
    [
        {"DENSE": 1},
        *(
            {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_C": c, "SPLIT_K": s, "num_warps": 1, "num_stages": 1}
            for c in (1, 4)
            for s in (1, 3)
        ),
        *(
            {"BLOCK_M": m, "BLOCK_N": n, "PARTS": p, "Q": q, "num_warps": 1, "num_stages": 1}
            for m, n, p, q in ((8, 16, 1, 1), (8, 32, 2, 4), (16, 16, 4, 2))
        ),
        *(
            {"BLOCK_M": 16, "WARPS": w, "Q": q, "SPLIT_K": s, "num_warps": 1, "num_stages": 1}
            for w, q, s in ((1, 1, 1), (2, 2, 3))
        ),
    ]
)


@few
@given(FORMATS, WAYS, st.sampled_from([1, 3, 20]), st.integers(1, 40), st.integers(1, 300), st.booleans(), st.booleans(), SEEDS)
def test_every_way_that_a_table_may_choose(format, way, m, n, k, bias, residual, seed) -> None:
    torch.manual_seed(seed)
    (packed, _), (up, _) = random_weight(n, k, format), random_weight(n, k, format)
    x, added = torch.randn(m, k), torch.randn(m, n) if residual else None
    options = {"bias": torch.randn(n) if bias else None, "residual": added, "norm": a_norm("rms", k), "activation": "silu"}
    with ruled(gemv=way, matmul=way, gated=way):
        assert error(linear_of.linear(x, packed), linear_of.linear_reference(x, packed)) < TOLERANCE
        assert error(linear_of.linear(x, packed, **options), linear_of.linear_reference(x, packed, **options)) < TOLERANCE
        found = linear_of.gated(x, packed, up, "gelu", residual=added)
        assert error(found, linear_of.gated_reference(x, packed, up, "gelu", residual=added)) < TOLERANCE


@pytest.mark.parametrize("m", [1, 4, 17])
def test_a_norm_holds_large_activations_within_half_precision(m: int) -> None:
    """A residual stream of thousands under a gain of tens passes 65504, float16's largest, before it is divided by its size."""
    torch.manual_seed(0)
    packed, _ = random_weight(40, 256, NumericFormat(4, 64))
    x, norm = 4000 * torch.randn(m, 256), Norm("rms", torch.full((256,), 30.0), None, 1e-5)
    wanted = linear_of.linear_reference(x, packed, norm=norm)
    assert error(linear_of.linear(x.half(), packed, norm=norm), wanted) < 5e-3


@pytest.mark.parametrize("rows,chunks", [(8, 4), (16, 16), (64, 2)])
def test_one_row_in_blocks_of_other_sizes(rows: int, chunks: int) -> None:
    torch.manual_seed(0)
    way = {"BLOCK_N": rows, "BLOCK_C": chunks, "STAGES": 1, "num_warps": 1, "num_stages": 1}
    x = torch.randn(1, 300)
    for bits in (2, 3, 6, 8):
        packed, _ = random_weight(40, 300, NumericFormat(bits, 32))
        with ruled(gemv=way):
            assert error(linear_of.linear(x, packed), linear_of.linear_reference(x, packed)) < TOLERANCE


@few
@given(FORMATS, st.integers(1, 30), st.integers(1, 200), SEEDS)
def test_the_whole_weight(format, rows, width, seed) -> None:
    torch.manual_seed(seed)
    packed, weight = random_weight(rows, width, format)
    assert error(embedding_of.dequantize(packed, torch.float32), weight) < 1e-6


@few
@given(FORMATS, st.integers(1, 30), st.integers(1, 200), st.lists(st.integers(0, 1 << 20), min_size=1, max_size=6), SEEDS)
def test_embedding(format, rows, width, ids, seed) -> None:
    torch.manual_seed(seed)
    packed, weight = random_weight(rows, width, format)
    chosen = torch.tensor([i % rows for i in ids])[None]
    assert error(embedding_of.embedding(packed, chosen), weight[chosen]) < 1e-6


@few
@given(st.integers(1, 5), st.integers(1, 300), st.sampled_from(["rms", "layer"]), SEEDS)
def test_norms(m, k, kind, seed) -> None:
    torch.manual_seed(seed)
    x, branch, norm = torch.randn(m, k), torch.randn(m, k), a_norm(kind, k)
    assert norm is not None
    assert error(norm_of.normalize(x, norm), norm.reference(x)) < TOLERANCE
    for found, wanted in zip(norm_of.add_normalize(x, branch, norm), norm_of.add_normalize_reference(x, branch, norm)):
        assert error(found, wanted) < TOLERANCE


@few
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.booleans(), SEEDS)
def test_rotary_reads_views(batch, heads, length, half, shared, seed) -> None:
    torch.manual_seed(seed)
    x = torch.randn(batch, length, heads, 2 * half).transpose(1, 2)
    cos, sin = (torch.randn(1 if shared else batch, 1, length, 2 * half) for _ in range(2))
    assert error(rotary_of.rotary(x, cos, sin), rotary_of.rotary_reference(x, cos, sin)) < TOLERANCE


WINDOWS = st.sampled_from([(None, 0), (1, 0), (5, 0), (5, 1), (5, 3), (40, 0), (40, 4), (3, 30)])
"""With how many sinks."""


def by_the_rule(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, causal: bool, window: tuple, scale: float | None
) -> Tensor:
    """Attention in float64 under the mask that the rule itself writes."""
    rule = MaskRule(causal, window[0], None if padding is None else "padding", window[1])
    mask = rule.allowed(q.shape[2], k.shape[2], padding)
    y = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask.expand(len(q), 1, -1, -1), scale=scale, enable_gqa=True
    )
    return y.nan_to_num(0.0).float()


@few
@given(
    st.integers(1, 2), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(1, 70), st.integers(0, 70), st.integers(1, 20),
    st.integers(1, 20), st.booleans(), WINDOWS, st.booleans(), SEEDS,
)  # fmt: skip
def test_attention_follows_the_rule(batch, heads, queries, past, width, value_width, causal, window, padded, seed) -> None:
    torch.manual_seed(seed)
    keys = queries + past
    q = torch.randn(batch, queries, heads[0], width).transpose(1, 2)
    k, v = torch.randn(batch, heads[1], keys, width), torch.randn(batch, heads[1], keys, value_width)
    padding = (torch.arange(keys) >= torch.tensor([keys // 3] * batch)[:, None]).long() if padded else None
    options = {"causal": causal, "window": window[0], "sinks": window[1], "scale": None if queries % 2 else 0.3}
    found = attention_of.attention(q, k, v, padding, **options)
    wanted = by_the_rule(q, k, v, padding, causal, window, options["scale"])
    assert float((found - wanted).abs().max()) < TOLERANCE * float(v.abs().max())
    assert float((attention_of.attention_reference(q, k, v, padding, **options) - wanted).abs().max()) < TOLERANCE * float(
        v.abs().max()
    )


@few
@given(
    st.integers(1, 2), st.sampled_from([(1, 1), (4, 2), (3, 1), (6, 1)]), st.integers(1, 12), st.integers(0, 150), st.integers(1, 20),
    st.booleans(), WINDOWS, st.booleans(), st.sampled_from([1, 7, 64]), SEEDS,
)  # fmt: skip
def test_attention_of_few_queries_is_split(batch, heads, queries, past, width, causal, window, padded, programs, seed) -> None:
    torch.manual_seed(seed)
    keys, way = queries + past, {"BLOCK_S": 16, "BLOCK_T": 16, "PROGRAMS": programs, "num_warps": 1, "num_stages": 1}
    q, k = torch.randn(batch, heads[0], queries, width), torch.randn(batch, heads[1], keys, width)
    v = torch.randn(batch, heads[1], keys, 24)
    padding = (torch.arange(keys) >= torch.tensor([keys // 3] * batch)[:, None]).long() if padded else None
    with ruled(attention=way):
        found = attention_of.attention(q, k, v, padding, causal=causal, window=window[0], sinks=window[1])
    wanted = by_the_rule(q, k, v, padding, causal, window, None)
    assert float((found - wanted).abs().max()) < TOLERANCE * float(v.abs().max())


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 70), st.integers(0, 70), WINDOWS, st.booleans(), SEEDS)
def test_attention_reads_a_cache_as_far_as_it_is_filled(batch, queries, past, room, window, padded, seed) -> None:
    """What lies behind may be anything, and a mask over all of it is read by rows."""
    torch.manual_seed(seed)
    live = past + queries
    q = torch.randn(batch, queries, 4, 9).transpose(1, 2)
    k, v = (torch.full((batch, 2, live + room, 9), torch.nan) for _ in range(2))
    for cache in (k, v):
        cache[:, :, :live] = torch.randn(batch, 2, live, 9)
    padding = (torch.arange(live + room) >= torch.arange(batch)[:, None]).long() if padded else None
    found = attention_of.attention(q, k, v, padding, torch.arange(past, live), window=window[0], sinks=window[1])
    padding = None if padding is None else padding[:, :live]
    wanted = by_the_rule(q, k[:, :, :live], v[:, :, :live], padding, True, window, None)
    assert float((found - wanted).abs().max()) < TOLERANCE * float(wanted.abs().max().clamp(min=1))


@pytest.mark.parametrize("m", [1, 4, 17])
def test_half_precision_activations_lose_no_more_than_their_rounding(m: int) -> None:
    torch.manual_seed(0)
    packed, _ = random_weight(40, 256, NumericFormat(4, 64))
    x = torch.randn(m, 256, dtype=torch.float16)
    found = linear_of.linear(x, packed)
    assert found.dtype == torch.float16
    assert error(found, linear_of.linear_reference(x.float(), packed)) < 2e-3


def test_no_rows_and_no_ids() -> None:
    packed, _ = random_weight(5, 40, NumericFormat(4, 32))
    assert linear_of.linear(torch.empty(0, 40), packed).shape == (0, 5)
    assert embedding_of.embedding(packed, torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 40)
