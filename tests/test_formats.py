"""Numeric formats: bit-exact packing, stored bytes, and the operator, each against plain integer arithmetic in Python."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lwcompile.ops  # registers the operator
from lwcompile.errors import BadInput, BadPlan, LwError
from lwcompile.formats import NumericFormat, QuantizedTensor, pack_bits, unpack_bits

BITS = st.integers(2, 8)
FORMATS = st.builds(
    NumericFormat,
    bits=BITS,
    group_size=st.sampled_from([None, 1, 3, 16, 32, 64]),
    zero_point=st.sampled_from(["none", "integer", "float"]),
    scale_dtype=st.sampled_from(["float16", "float32"]),
)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 90))


def random_tensor(format: NumericFormat, shape: tuple[int, int], seed: int) -> QuantizedTensor:
    """Any codes, scales and zero points that the format can hold."""
    generator = torch.Generator().manual_seed(seed)
    grid = (shape[0], format.groups(shape[1]))
    codes = torch.randint(0, 2**format.bits, shape, generator=generator, dtype=torch.uint8)
    scale = torch.randn(grid, generator=generator).to(format.dtype)
    zero = {
        "none": None,
        "integer": torch.randint(0, 2**format.bits, grid, generator=generator, dtype=torch.uint8),
        "float": (torch.randn(grid, generator=generator) * 8).to(format.dtype),
    }[format.zero_point]
    return QuantizedTensor(format, codes, scale, zero)


def operator(quantized: QuantizedTensor) -> tuple:
    packed, in_features = quantized.pack(), quantized.shape[1]
    group = quantized.format.group(in_features)
    return packed["codes"], packed["scale"], packed.get("zero"), quantized.format.bits, group, in_features


def reference(quantized: QuantizedTensor) -> torch.Tensor:
    """The definition, one element at a time: (code - zero) * scale in double precision."""
    rows, in_features = quantized.shape
    group = quantized.format.group_size or in_features
    out = torch.empty(rows, in_features, dtype=torch.float64)
    for n in range(rows):
        for k in range(in_features):
            zero = 2 ** (quantized.format.bits - 1) if quantized.zero is None else quantized.zero[n, k // group].item()
            out[n, k] = (quantized.codes[n, k].item() - zero) * quantized.scale[n, k // group].item()
    return out


@given(shape=SHAPES, bits=BITS, seed=st.integers(0, 1000))
def test_codes_are_one_little_endian_bitstream_per_row(shape, bits, seed):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (shape[0], math.ceil(shape[1] * bits / 8))
    for row, stream in zip(codes.tolist(), packed.tolist()):
        number = sum(code << (bits * k) for k, code in enumerate(row))
        assert int.from_bytes(bytes(stream), "little") == number
    assert torch.equal(unpack_bits(packed, bits, shape[1]), codes)


@given(shape=SHAPES, format=FORMATS, seed=st.integers(0, 1000))
def test_packing_round_trips_and_takes_the_bytes_it_says(shape, format, seed):
    quantized = random_tensor(format, shape, seed)
    packed = quantized.pack()
    back = QuantizedTensor.unpack(format, shape, packed)
    assert torch.equal(back.codes, quantized.codes) and torch.equal(back.scale, quantized.scale)
    assert (back.zero is None) == (quantized.zero is None)
    assert back.zero is None or (quantized.zero is not None and torch.equal(back.zero, quantized.zero))
    assert format.stored_bytes(shape) == sum(tensor.nbytes for tensor in packed.values())
    assert format.bits_per_weight(shape) == 8 * format.stored_bytes(shape) / math.prod(shape)


def test_bits_per_weight_of_known_formats():
    shape = (576, 1536)
    assert NumericFormat(4, 64).bits_per_weight(shape) == 4 + (16 + 4) / 64
    assert NumericFormat(3, 128).bits_per_weight(shape) == pytest.approx(3 + 16 / 128 + 8 * 5 / 1536)  # 12 zeros, 5 bytes
    assert NumericFormat(4, 32, "float").bits_per_weight(shape) == 5  # what Q4_1 takes
    assert NumericFormat(8, None, "none").bits_per_weight(shape) == 8 + 16 / 1536
    assert NumericFormat(4, 64, "none").stored_bytes((1, 65)) == 33 + 2 * 2  # a group of one has a scale too
    assert NumericFormat(4, 64, "none").stored_bytes((3, 2, 64)) == 6 * (32 + 2)


@given(shape=SHAPES, format=FORMATS, seed=st.integers(0, 1000))
def test_the_operator_and_dequantize_compute_the_definition(shape, format, seed):
    quantized = random_tensor(format, shape, seed)
    wanted = reference(quantized)
    for weight in (quantized.dequantize(), torch.ops.lwcompile.dequantize(*operator(quantized))):
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.double(), wanted, rtol=2e-7, atol=0)


def test_large_weights_are_worked_on_in_pieces():
    quantized = random_tensor(NumericFormat(3, 64), (700, 577), 0)
    assert quantized.zero is not None
    scale, zero = (part.double().repeat_interleave(64, 1)[:, :577] for part in (quantized.scale, quantized.zero))
    weight = torch.ops.lwcompile.dequantize(*operator(quantized)).double()
    torch.testing.assert_close(weight, (quantized.codes - zero) * scale, rtol=2e-7, atol=0)


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("shape", "group_size"), [((4, 40), 16), ((3, 37), 8), ((1, 5), None)])
def test_the_operator_passes_opcheck(bits, zero_point, shape, group_size):
    quantized = random_tensor(NumericFormat(bits, group_size, zero_point), shape, bits)
    checks = torch.library.opcheck(torch.ops.lwcompile.dequantize, operator(quantized))
    assert set(checks.values()) == {"SUCCESS"}


class Quantized(nn.Module):
    def __init__(self, quantized: QuantizedTensor) -> None:
        super().__init__()
        for name, tensor in quantized.pack().items():
            self.register_buffer(name, tensor)
        self.rest = operator(quantized)[3:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, torch.ops.lwcompile.dequantize(self.codes, self.scale, self.zero, *self.rest))


def test_the_operator_survives_export_and_a_pt2_file():
    quantized = random_tensor(NumericFormat(3, 16), (6, 40), 1)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(Quantized(quantized), (torch.randn(2, 40),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x = torch.randn(5, 40)
    torch.testing.assert_close(loaded(x), x @ quantized.dequantize().T)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.lwcompile.dequantize.default in targets


def test_the_operator_is_one_call_in_a_compiled_graph():
    """aot_eager traces as Inductor does, with fake tensors and symbolic sizes, and needs no compiler."""
    quantized, seen = random_tensor(NumericFormat(5, 8), (6, 37), 1), []

    def look(module, arguments):
        seen.extend(n.target for n in module.graph.nodes if n.op == "call_function")
        return module.forward

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(Quantized(quantized), backend=aot_autograd(fw_compiler=look), dynamic=True)
    for rows in (2, 5):
        x = torch.randn(rows, 37)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), x @ quantized.dequantize().T)
    assert seen.count(torch.ops.lwcompile.dequantize.default) == 1


@given(format=FORMATS, shape=SHAPES, seed=st.integers(0, 1000))
def test_nearest_takes_the_closest_point_of_the_grid(format, shape, seed):
    grid = random_tensor(format, shape, seed)
    scale = grid.scale.float().abs() + 0.01
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)) * 3
    zero = None if grid.zero is None else grid.zero.float()
    found = QuantizedTensor.nearest(weight, format, scale, zero)
    error = (found.dequantize() - weight).abs()
    for code in range(2**format.bits):
        codes = torch.full(shape, code, dtype=torch.uint8)
        other = QuantizedTensor(format, codes, found.scale, found.zero).dequantize()
        assert (error <= (other - weight).abs() * (1 + 1e-5) + 1e-5).all()


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_scales_stay_finite_and_nonzero_when_stored(scale_dtype):
    format = NumericFormat(4, scale_dtype=scale_dtype)
    scale = format.round_scale(torch.tensor([0.0, 1e-12, -1e-12, 1e9, -1e9, 0.1]))
    assert scale[0] == 1 and (scale != 0).all() and torch.isfinite(scale).all()
    assert torch.equal(scale.to(format.dtype).float(), scale)
    assert torch.equal(scale.sign(), torch.tensor([1.0, 1, -1, 1, -1, 1]))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1}, {"bits": 9}, {"bits": 4.0}, {"bits": True}, {"bits": 4, "group_size": 0}, {"bits": 4, "group_size": "64"},
        {"bits": 4, "zero_point": "int"}, {"bits": 4, "scale_dtype": "bfloat16"},
    ],
)  # fmt: skip
def test_formats_refuse_what_they_cannot_hold(options):
    with pytest.raises(BadPlan):
        NumericFormat(**options)


def test_unpack_refuses_tensors_of_another_format():
    quantized = random_tensor(NumericFormat(4, 16), (3, 40), 0)
    packed = quantized.pack()
    missing = {key: packed[key] for key in ("codes", "scale")}
    for format, tensors in ((NumericFormat(3, 16), packed), (NumericFormat(4, 16), missing), (NumericFormat(4, 32), packed)):
        with pytest.raises(BadInput, match="do not fit"):
            QuantizedTensor.unpack(format, (3, 40), tensors)
    assert issubclass(BadInput, LwError) and lwcompile.ops.dequantize is not None
