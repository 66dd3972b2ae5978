"""Packed weights on file: layout, prices that equal bytes, sharing, every width, group size, zero point and odd shape."""

from __future__ import annotations

import math
from pathlib import Path

import language_models
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_packed import pack, plain_session
from torch import Tensor, nn

from lwcompile.backends.onnx.backend import Onnx
from lwcompile.backends.onnx.packing import Storage, pack_planes, packed_bytes, plane_shapes, stored_bits
from lwcompile.contract import StoredTensor
from lwcompile.formats import NumericFormat
from lwcompile.graph import ModelGraph
from lwcompile.program import Program
from lwcompile.tracing import capture_module

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
formats = st.builds(
    NumericFormat,
    bits=st.sampled_from(WIDTHS),
    group_size=st.sampled_from([7, 16, 24, 32, 48, 64, 128, 512, None]),
    zero_point=st.sampled_from(["none", "integer", "float"]),
    scale_dtype=st.sampled_from(["float16", "float32"]),
)


class Layer(nn.Module):
    """A table of rows, a linear with or without bias, and the table again as a head."""

    def __init__(self, rows: int, width: int, out: int, bias: bool) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(rows, width), nn.Linear(width, out, bias=bias)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        return self.linear(x), self.head(x)


def layer(width: int, rows: int = 13, out: int = 10, bias: bool = True) -> ModelGraph:
    torch.manual_seed(width)
    ids = torch.randint(0, rows, (2, 5))
    return capture_module(Layer(rows, width, out, bias), {"ids": ids}, {"ids": {0: "batch", 1: "sequence"}})[0]


def lower(graph: ModelGraph, path: Path, **options) -> onnx.ModelProto:
    Onnx(**options).lower(Program({"forward": graph}, graph.store, name="layer"), path, None)
    return onnx.load(path)


def initializer_bytes(model: onnx.ModelProto, suffixes: tuple[str, ...]) -> int:
    return sum(len(t.raw_data) for t in model.graph.initializer if t.name.endswith(suffixes))


# --- values


@settings(max_examples=40)
@given(format=formats, width=st.sampled_from([5, 16, 31, 40, 64, 96, 130]), bias=st.booleans())
def test_any_format_and_shape_gives_the_weights_it_stands_for(format: NumericFormat, width: int, bias: bool, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    graph = layer(width, bias=bias)
    dense = {name: graph.tensor(name) for name in graph.tensors}
    made = {tuple(q.shape): q for q in pack(graph, format).values()}
    lower(graph, path, activations="float32")
    ids = torch.randint(0, 13, (3, 4))
    table, linear = (_reference(made[shape]) for shape in ((13, width), (10, width)))
    x = table[ids.numpy()]
    offset = dense["linear.bias"].numpy() if bias else 0
    got = plain_session(path).run(None, {"ids": ids.numpy()})
    for output, wanted in zip(got, (x @ linear.T + offset, x @ table.T)):
        assert np.abs(output - wanted).max() <= 1e-5 * np.abs(wanted).max() + 1e-6


def _reference(quantized) -> np.ndarray:
    """Codes to weights, one number at a time by the definition."""
    format, columns = quantized.format, quantized.shape[1]
    codes, scale = quantized.codes.numpy().astype(np.float64), quantized.scale.double().numpy()
    zero = np.full(scale.shape, 2.0 ** (format.bits - 1)) if quantized.zero is None else quantized.zero.double().numpy()
    group = columns if format.group_size is None else min(format.group_size, columns)
    place = np.arange(columns) // group
    return (codes - zero[:, place]) * scale[:, place]


@given(bits=st.sampled_from(WIDTHS), count=st.integers(1, 200), seed=st.integers(0, 99))
def test_planes_hold_every_bit_once(bits: int, count: int, seed: int):
    width = 4 if bits <= 4 else 8
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_planes(codes, stored_bits(bits), width)
    assert [tuple(p.shape) for p in packed] == plane_shapes(count, stored_bits(bits), width)
    assert (
        sum(p.numel() for p in packed)
        == packed_bytes(count, stored_bits(bits), width)
        == math.ceil(count * width / 64) * stored_bits(bits) * 8 // width
    )
    assert sum(np.unpackbits(p.numpy()).sum() for p in packed) == np.unpackbits(codes.numpy()).sum()


@pytest.mark.parametrize("bits", WIDTHS)
def test_only_widths_that_the_runtime_multiplies_by_reach_it(bits: int, tmp_path: Path):
    graph = layer(64)
    pack(graph, NumericFormat(bits, 32))
    model = lower(graph, tmp_path / "model.onnx")
    found = {a.i for n in model.graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"}
    assert found == {4 if bits <= 4 else 8}


def test_codes_are_widened_once_and_not_at_every_run(tmp_path: Path):
    graph = layer(64)
    pack(graph, NumericFormat(3, 32))
    lower(graph, tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = {n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert kinds == {"MatMulNBits", "GatherBlockQuantized"}


# --- prices


@given(format=formats, rows=st.integers(1, 40), width=st.integers(1, 300))
def test_a_price_is_at_least_what_the_format_stores_and_little_more(format: NumericFormat, rows: int, width: int):
    price = Onnx().price(StoredTensor((rows, width), format))
    storage = Storage.of(format, (rows, width))
    bare = (rows * width * format.bits + 7) // 8
    assert price >= bare
    assert price <= bare + storage.scale_bytes + storage.zero_bytes + 8 + rows * 16 * storage.bits // 8 + rows * width // 8


@settings(max_examples=30)
@given(format=formats, width=st.sampled_from([16, 31, 64, 100, 256]))
def test_a_price_is_the_bytes_on_file(format: NumericFormat, width: int, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    graph = layer(width, bias=False)
    made = pack(graph, format)
    model = lower(graph, path)
    price = sum(Onnx().price(StoredTensor(q.shape, format)) for q in made.values())
    assert initializer_bytes(model, (".codes", ".scale", ".zero", ".high")) == price


@pytest.mark.parametrize("bits", (3, 4, 6))
def test_prices_and_overhead_are_the_size_of_the_file(bits: int, tmp_path: Path):
    """On a model whose weights outweigh its graph, as real ones do."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
    graph, _ = capture_module(_Takes(model), {"x": torch.randn(2, 1024)}, {"x": {0: "batch"}})
    program = Program({"forward": graph}, graph.store, name="wide")
    overhead = Onnx().overhead(program)
    made = pack(graph, NumericFormat(bits, 64))
    lower(graph, tmp_path / "model.onnx")
    price = sum(Onnx().price(StoredTensor(q.shape, q.format)) for q in made.values())
    rest = sum(Onnx().price(StoredTensor(tuple(graph.tensor(n).shape))) for n in graph.tensors if n.endswith("bias"))
    size = (tmp_path / "model.onnx").stat().st_size
    assert price + rest <= size <= price + rest + overhead <= 1.01 * size


class _Takes(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_dense_tensor_is_priced_by_its_dtype():
    assert Onnx().price(StoredTensor((3, 5))) == 60
    assert Onnx().price(StoredTensor((3, 5), dtype="float16")) == 30


# --- sharing


@pytest.mark.parametrize("bits", (3, 4, 8))
def test_a_tied_embedding_and_head_are_stored_once(bits: int, tmp_path: Path):
    graph = layer(64, rows=257, out=3, bias=False)
    pack(graph, NumericFormat(bits, 32))
    model = lower(graph, tmp_path / "model.onnx")
    assert initializer_bytes(model, (".codes", ".codes.high")) == (3 + 257) * 64 * bits // 8


def test_a_dense_tied_table_is_stored_once_and_an_untied_one_transposed(tmp_path: Path):
    model = lower(layer(64, rows=257, out=3, bias=False), tmp_path / "model.onnx")
    shapes = sorted(tuple(t.dims) for t in model.graph.initializer if len(t.dims) == 2)
    assert shapes == [(64, 3), (257, 64)]


def test_scales_stay_16_bits_on_file(tmp_path: Path):
    graph = layer(64)
    pack(graph, NumericFormat(4, 32))
    model = lower(graph, tmp_path / "model.onnx")
    scales = [t for t in model.graph.initializer if t.name.endswith(".scale")]
    assert scales and all(t.data_type == onnx.TensorProto.FLOAT16 for t in scales)


def test_a_quantized_language_model_is_smaller_by_what_was_priced(tmp_path: Path):
    graph = language_models.captured("llama")
    program = Program({"forward": graph}, graph.store)
    Onnx().lower(program, tmp_path / "dense.onnx", None)
    dense = {q: graph.store.nbytes(q) for q in graph.tensors.values()}
    made = pack(graph, NumericFormat(4, 16))
    Onnx().lower(program, tmp_path / "packed.onnx", None)
    saved = sum(dense[key] - Onnx().price(StoredTensor(q.shape, q.format)) for key, q in made.items())
    sizes = {name: (tmp_path / f"{name}.onnx").stat().st_size for name in ("dense", "packed")}
    slack = 1100 * len(made)
    assert saved - slack <= sizes["dense"] - sizes["packed"] <= saved


# --- joined products


class _Heads(nn.Module):
    """Three linears of one input; with `twice`, the last one reads another input too."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.twice = nn.Linear(48, 24), nn.Linear(48, 8), nn.Linear(48, 10), twice

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.q(x).sum(-1, keepdim=True) + self.k(x).amax(-1, keepdim=True) * self.v(x)
        return y, self.v(x.exp()) if self.twice else y * 2


@pytest.mark.parametrize("zero_point", ("none", "integer", "float"))
@pytest.mark.parametrize(("twice", "products"), ((False, 1), (True, 4)))
def test_products_of_one_input_are_one_unless_a_weight_is_read_elsewhere(zero_point, twice: bool, products: int, tmp_path: Path):
    torch.manual_seed(0)
    graph, _ = capture_module(_Heads(twice), {"x": torch.randn(2, 3, 48)}, {"x": {0: "batch", 1: "sequence"}})
    made = pack(graph, NumericFormat(3, 16, zero_point))
    model = lower(graph, tmp_path / "model.onnx")  # checks the values
    assert sum(n.op_type == "MatMulNBits" for n in model.graph.node) == products
    price = sum(Onnx().price(StoredTensor(q.shape, q.format)) for q in made.values())
    assert initializer_bytes(model, (".codes", ".scale", ".zero", ".high")) == price
