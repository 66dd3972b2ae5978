"""Packed weights under torch.compile: our operators against float64, the choice of a way by the device table, and graphs that use them."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from lwcompile.apply import apply_plan
from lwcompile.backends.dynamo import backend
from lwcompile.backends.inductor import attention, native, packed, products, ways
from lwcompile.backends.inductor.checked import Checked
from lwcompile.backends.inductor.codegen import Inductor, in_place
from lwcompile.backends.inductor.lower import lowered
from lwcompile.backends.inductor.packed import Panels
from lwcompile.backends.inductor.ways import BY_PARTS, DENSE, IN_PLACE, INT8, Choice
from lwcompile.context import Context
from lwcompile.errors import VerificationError
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.graph import Input, ModelGraph
from lwcompile.manager import relative_error
from lwcompile.plans import Plan
from lwcompile.spec import Spec
from lwcompile.store import ParameterStore
from lwcompile.structure import find_structure
from lwcompile.timings import DeviceTable

pytest.importorskip("transformers", reason="the model is transformers' own: install lwcompile[hf]")
from tiny import VOCABULARY, ids, llama, llama_program

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the operators are C++")
whole = pytest.mark.skipif(os.environ.get("LWCOMPILE_WHOLE") != "1", reason="built once more, for LWCOMPILE_WHOLE=1 only")

SHAPES = [(33, 70, 16), (64, 128, 64), (5, 17, None), (70, 64, 7)]
"""Rows, columns and group size: whole and partial panels, words and groups."""


@pytest.fixture(autouse=True)
def operators():
    assert packed.unavailable() is None and attention.unavailable() is None


def weight_of(bits: int, shape: tuple[int, int, int | None], zero: Any, scale: Any = "float16") -> QuantizedTensor:
    rows, columns, group = shape
    return ways.example(NumericFormat(bits, group, zero, scale), (rows, columns))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the operators


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
def test_a_packed_product_is_the_dequantized_one(bits, zero):
    for shape in SHAPES:
        weight = weight_of(bits, shape, zero, "float32" if zero == "float" else "float16")
        panels, dense, bias = Panels.of(weight), weight.dequantize().double(), random(shape[0])
        for rows in (1, 2, 3, 4, 5, 7, 13):
            x = random(rows, shape[1], seed=rows)
            wanted = F.linear(x.double(), dense, bias.double())
            for few in (0, 1 << 30):
                assert relative_error(wanted, panels.multiply(x, bias, few)) < 5e-6, (shape, rows, few)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_a_looked_up_row_is_the_dequantized_one(bits):
    for shape in SHAPES:
        weight = weight_of(bits, shape, "integer")
        ids = torch.tensor([[0, shape[0] - 1], [3, 3]])
        assert torch.equal(Panels.of(weight).look_up(ids), weight.dequantize()[ids])


def test_an_id_out_of_range_is_an_error():
    with pytest.raises(IndexError):
        Panels.of(weight_of(4, SHAPES[0], "none")).look_up(torch.tensor([33]))


def rounded_to_int8(x: Tensor, group: int) -> tuple[Tensor, int]:
    """x float64 [m, K] as int8 products have it, by the formula, and how many of its blocks have a second term."""
    made, second = torch.zeros_like(x), 0
    large = packed.LARGE * x.square().mean(1).sqrt()
    for begin in range(0, x.shape[1], group):
        for start in range(begin, min(begin + group, x.shape[1]), packed.BLOCK):
            block = slice(start, min(start + packed.BLOCK, begin + group))
            step = x[:, block].abs().amax(1, keepdim=True) / 127
            once = (x[:, block] / step).round().nan_to_num() * step
            rest = ((x[:, block] - once) / (step / 254)).round().nan_to_num() * (step / 254)
            twice = step > large[:, None]
            made[:, block] = once + torch.where(twice, rest, 0)
            second += int(twice.sum())
    return made, second


@pytest.mark.parametrize("bits", packed.INT8_BITS)
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
def test_int8_rounds_x_by_blocks_and_nothing_else(bits, zero):
    for shape in [*SHAPES, (32, 200, 100), (40, 96, 96)]:
        weight, (_, columns, _) = weight_of(bits, shape, zero), shape
        dense = weight.dequantize().double()
        for rows in (1, 2, 3, 4, 9):
            x = random(rows, columns, seed=rows)
            rounded, _ = rounded_to_int8(x.double(), weight.format.group(columns))
            made = Panels.of(weight).multiply(x, int8=True)
            assert relative_error(rounded @ dense.T, made) < 5e-4  # a tie may round the other way
            assert relative_error(x.double() @ dense.T, made) < ways.INT8_TOLERANCE


@settings(max_examples=25)
@given(st.integers(1, 6), st.sampled_from([(64, 16), (320, 64), (200, 100), (96, None)]), st.floats(0, 5), st.integers(0, 1000))
def test_what_is_far_larger_than_the_rest_costs_its_block_no_precision(rows, widths, size, seed):
    """Whatever stands out, a row errs by less than 1 % of what it is made of; and the ordinary part of a block by no more than that."""
    columns, group = widths
    weight = weight_of(4, (64, columns, group), "integer")
    x = random(rows, columns, seed=seed)
    x[0, seed % columns] = 10**size
    made, dense = Panels.of(weight).multiply(x, int8=True), weight.dequantize().double()
    rounded, second = rounded_to_int8(x.double(), weight.format.group(columns))
    assert relative_error(rounded @ dense.T, made) < 5e-4
    assert second or size < 1.5
    error = (made - x.double() @ dense.T).square().mean(1).sqrt()
    assert bool((error < 0.01 * (x.double().square() @ dense.T.square()).mean(1).sqrt()).all())
    alone = x[:1].clone()
    alone[0, seed % columns] = 0
    rest = (rounded - x.double())[0].square().mean().sqrt()
    assert rest < 0.01 * alone.square().mean().sqrt() + x[0].abs().max() / 127 / 254


def test_int8_of_what_is_not_finite_is_nan_in_its_row_alone():
    x = random(3, 70)
    x[1, 5], x[2, 6] = torch.inf, 1e30
    made = Panels.of(weight_of(4, SHAPES[0], "integer")).multiply(x, int8=True)
    assert made[1].isnan().all() and made[[0, 2]].isfinite().all()


def test_int8_of_zeros_and_of_the_largest_codes():
    """Sums of bytes stay below 2**15, and an x of zeros has no step."""
    format = NumericFormat(4, 64, "none")
    weight = QuantizedTensor.of(format, torch.full((32, 128), 15, dtype=torch.uint8), torch.ones(32, 2), None)
    x = torch.cat([torch.ones(1, 128), torch.zeros(1, 128), -torch.ones(1, 128)])
    assert torch.allclose(Panels.of(weight).multiply(x, int8=True), x.sum(1, keepdim=True) * 7, rtol=1e-6)


def test_int8_of_other_widths_is_refused():
    with pytest.raises(RuntimeError, match="of 2 and 4 bits"):
        Panels.of(weight_of(3, SHAPES[0], "none")).multiply(random(1, 70), int8=True)


@pytest.mark.parametrize("flag", ["-DPLAIN", pytest.param("-DWITHOUT_VNNI", marks=whole)])
def test_on_other_processors_the_numbers_are_the_same(flag, tmp_path):
    """The plain C++ that runs without AVX2, and AVX2 alone, in a process of its own: operators are registered once."""
    weights = [Panels.of(weight_of(bits, (70, 200, 100), "integer")) for bits in (2, 3, 4)]
    x = random(5, 200)
    x[0, 3] = 1000
    cases = [(panels, x[:rows], few, False) for panels in weights for rows in (1, 5) for few in (0, 9)]
    cases += [(panels, x[:rows], 0, True) for panels in (weights[0], weights[2]) for rows in (1, 2, 5)]
    torch.save((weights, cases), tmp_path / "cases")
    script = """
import sys, torch
from lwcompile.backends.inductor import native, packed
reason = native.load(packed.SOURCE, sys.argv[3])
assert reason is None, reason
_, cases = torch.load(sys.argv[1], weights_only=False)
torch.save([panels.multiply(x, None, few, int8) for panels, x, few, int8 in cases], sys.argv[2])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "cases"), str(tmp_path / "made"), flag]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for (panels, part, few, int8), made in zip(cases, torch.load(tmp_path / "made")):
        assert relative_error(panels.multiply(part, None, few, int8), made) < 1e-5, (panels.bits, len(part), few, int8)


@pytest.mark.parametrize("int8", [False, True])
def test_threads_compute_what_one_does(int8):
    panels, x, before = Panels.of(weight_of(4, (1500, 600, 64), "integer")), random(150, 600), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append([panels.multiply(x[:rows], None, 4, int8) for rows in (1, 4, 150)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made))


@pytest.mark.parametrize("shape", [(1, 9, 3, 1, 256, 64), (2, 4, 4, 3, 17, 32), (1, 6, 2, 4, 33, 96), (2, 4, 1, 2, 40, 128)])
@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32])
def test_attention_of_few_queries(shape, kind):
    batch, heads, kept, queries, keys, width = shape
    q, k, v = (
        3 * random(batch, heads, queries, width),
        3 * random(batch, kept, keys, width, seed=1),
        random(batch, kept, keys, width),
    )
    mask = random(batch, 1, queries, keys, seed=2) > 0
    mask[0, :, 0] = False  # nothing to read: 0
    mask[..., -3:] = False
    given = None if kind is None else mask if kind is torch.bool else torch.where(mask, 0.0, -torch.inf)
    exact = given.double() if given is not None and kind is torch.float32 else given
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), exact, enable_gqa=heads != kept)
    if given is not None:
        k[:, :, -3:], v[:, :, -3:] = torch.nan, torch.inf  # what lies in a cache's free places is nobody's
    made = torch.ops.lwcompile.few_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, given, width**-0.5)
    assert relative_error(wanted, made) < 2e-6


def test_the_operators_are_well_formed():
    panels = Panels.of(weight_of(4, SHAPES[0], "integer"))
    stored = (panels.codes, panels.scale, panels.zero)
    calls = {
        torch.ops.lwcompile.packed_linear.default: (random(2, 3, 70), *stored, random(33), 4, 16, 33, 4, False),
        torch.ops.lwcompile.packed_embedding.default: (torch.tensor([[1, 2]]), *stored, 4, 16, 33, 70),
        torch.ops.lwcompile.few_attention.default: (random(1, 4, 1, 32), random(1, 2, 5, 32), random(1, 2, 5, 32), None, 0.2),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_written_into_what_is_given(dtype):
    panels = Panels.of(weight_of(4, SHAPES[0], "integer"))
    arguments = (random(2, 3, 70).to(dtype), panels.codes, panels.scale, panels.zero, random(33), 4, 16, 33, 4, False)
    wanted = torch.ops.lwcompile.packed_linear(*arguments)
    for out in (torch.full_like(wanted, torch.nan), torch.full((3, 2, 33), torch.nan, dtype=dtype).transpose(0, 1)):
        torch.ops.lwcompile.packed_linear.into(out, *arguments)
        assert torch.equal(out, wanted)
    with pytest.raises(RuntimeError, match="another shape"):
        torch.ops.lwcompile.packed_linear.into(torch.empty(2, 2, 33, dtype=dtype), *arguments)
    heads = (random(1, 4, 1, 32), random(1, 2, 5, 32), random(1, 2, 5, 32), None, 0.2)
    torch.ops.lwcompile.few_attention.into(out := torch.full((1, 4, 1, 32), torch.nan), *heads)
    assert torch.equal(out, torch.ops.lwcompile.few_attention(*heads))
    with pytest.raises(RuntimeError, match="a result like the query"):
        torch.ops.lwcompile.few_attention.into(torch.empty(1, 1, 4, 32).transpose(1, 2)[..., :16], *heads)


# --- the device table


def test_what_was_measured_is_not_measured_again(tmp_path):
    path, measured = tmp_path / "timings.json", []
    for _ in range(2):
        assert DeviceTable(path).get("a", lambda: measured.append(1) or 0.5) == 0.5
    assert len(measured) == 1 and len(json.loads(path.read_text())) == 1


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": "fast"}', "\0"])
def test_a_damaged_table_is_measured_again(tmp_path, text):
    path = tmp_path / "timings.json"
    path.write_text(text)
    assert DeviceTable(path).get("a", lambda: 0.5) == 0.5
    assert list(json.loads(path.read_text()).values()) == [0.5]


def test_a_table_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("")
    assert DeviceTable(tmp_path / "file" / "timings.json").get("a", lambda: 0.5) == 0.5


def test_two_tables_of_one_file_keep_both_figures(tmp_path):
    first, second = DeviceTable(tmp_path / "t.json"), DeviceTable(tmp_path / "t.json")
    first.get("a", lambda: 1.0)
    second.get("b", lambda: 2.0)
    assert sorted(DeviceTable(tmp_path / "t.json").seconds.values()) == [1.0, 2.0]


# --- choosing

FORMAT = NumericFormat(4, 16)


def table(**seconds: float) -> Any:
    """Seconds by the beginning of the key: the way, and `way@rows` where it depends on them."""

    def get(key: str, measure: object) -> float:
        way, rows = key.split(",")[0].replace(" ", "_"), key.split(" by ")[-1].split(",")[0]
        return seconds.get(f"{way}_{rows}", seconds.get(way, 1.0))

    return SimpleNamespace(get=get)


def test_the_fastest_way_is_taken():
    for name, way in (("dense", DENSE), ("in_place", IN_PLACE), ("by_parts", BY_PARTS)):
        assert ways.choose(FORMAT, (64, 64), 1, False, table(**{name: 0.5})).way == way
    assert ways.choose(FORMAT, (64, 64), 1, False, table(dense=0.95)).way != DENSE, "not worth its memory"


def test_int8_is_taken_only_where_it_may_be():
    assert ways.choose(FORMAT, (64, 64), 1, False, table(int8=0.5)).way != INT8
    assert ways.choose(FORMAT, (64, 64), 1, True, table(int8=0.5)).way == INT8
    assert ways.choose(NumericFormat(3, 16), (64, 64), 1, True, table(int8=0.5)).way != INT8
    assert ways.choose(FORMAT, (64, 64), None, True, table(int8=0.5)).way == INT8


def test_with_a_free_number_of_rows_the_operator_decides():
    way = ways.choose(FORMAT, (64, 64), None, False, table(dense=0.1, in_place_8=0.5, in_place_16=0.5, in_place_32=2)).way
    assert way.few == 16, "up to as many rows as were measured to be faster in place, and never dense"


def test_measuring_gives_seconds_and_proves_the_product(tmp_path, monkeypatch, caplog):
    kept = DeviceTable(tmp_path / "t.json")
    assert all(0 < took < 1 for took in ways.choose(FORMAT, (64, 64), 1, True, kept).seconds.values())
    monkeypatch.setattr(Panels, "multiply", lambda self, x, *_: torch.zeros(len(x), self.shape[0]))
    with caplog.at_level(logging.WARNING, "lwcompile"):
        assert ways.choose(FORMAT, (64, 32), 1, False, kept).way == DENSE
    assert "away from the dense one: not used" in caplog.text


# --- graphs


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    with torch._inductor.config.patch(compile_threads=1, cpp_cache_precompile_headers=False):
        yield


@pytest.fixture(scope="module")
def quantized() -> ModelGraph:
    """A tiny Llama of two blocks, tied embedding and head included, in 4 bits; one projection in 3."""
    program = llama_program(layers=2)
    structure = find_structure(program)
    plan = {
        s.id: (Spec.parse("quantize{bits=4,group_size=16,solver=rtn}"),)
        for s in structure.sites.values()
        if s.kind in ("linear", "embedding")
    }
    plan["block1.mlp.down_proj"] = (Spec.parse("quantize{bits=3,group_size=16,solver=rtn}"),)
    return apply_plan(program, plan, structure, Context(structure=structure, program=program)).main


def fixed(graph: ModelGraph) -> ModelGraph:
    """The graph at its example's sizes."""
    made = graph.copy()
    made.inputs = [Input(i.name, i.shape, i.dtype) for i in made.inputs]
    return made


def test_a_compiled_graph_reads_packed_weights(quantized):
    small = Inductor(products="packed")._lowered(fixed(quantized))
    with torch.no_grad():
        made = in_place(small, {})(ids(2, 9))[0]
    assert relative_error(run_graph(quantized, ids(2, 9)), made) < 1e-5
    stored = [small.tensor(name) for name in small.tensors]
    assert max(t.nbytes for t in stored if t.dtype == torch.float32) <= 32 * 4, "norms alone are dense"
    dense = sum(p.shape[0] * p.shape[1] * 4 for p in products.products(quantized) if not p.looks_up)
    assert sum(t.nbytes for t in stored) < dense / 4, "4 bits, the grids, and rows of 16 in panels of 32"


def test_dense_and_packed_products_stand_side_by_side(quantized):
    graph = fixed(quantized)
    chosen = [(p, Choice(DENSE if n % 2 else BY_PARTS)) for n, p in enumerate(products.products(graph))]
    with torch.no_grad():
        made = in_place(lowered(graph, chosen), {})(ids(2, 9))[0]
    assert relative_error(run_graph(quantized, ids(2, 9)), made) < 1e-5


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_calls_the_operator_for_fixed_and_for_free_rows(dynamic):
    graph = one_product(32, 64)
    graph.inputs = [Input("x", (2, 64), torch.float32, {0: "rows"} if dynamic else {})]
    wanted = {rows: run_graph(graph, random(rows, 64)) for rows in (2, 5)}
    seen: list[Any] = []

    def compiler(module: Any, arguments: Any) -> Any:
        example = next(n for n in module.graph.find_nodes(op="placeholder") if isinstance(n.meta["example_value"], Tensor)).meta[
            "example_value"
        ]
        seen.append(Inductor(products="packed").compile(graph, [example], {}))
        run = Inductor().bind(seen[-1].call, seen[-1].tensors)
        return lambda *values: run([v for v in values if isinstance(v, Tensor)])

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x * 2, backend=compiler, dynamic=dynamic)
    for rows in (2, 5) if dynamic else (2,):
        made = compiled(random(rows, 64))
        assert relative_error(wanted[rows], made) < 1e-5
    assert len(seen) == 1 and {t.dtype for t in seen[0].tensors} == {torch.int32, torch.float16, torch.uint8}


def one_product(rows: int, columns: int) -> ModelGraph:
    """linear(x, dequantize(...)), 4 bits in groups of 16."""
    parts, nodes, store = weight_of(4, (rows, columns, 16), "integer").pack(), fx.Graph(), ParameterStore()
    x = nodes.placeholder("x")
    stored = [nodes.create_node("get_attr", f"w.{name}") for name in ("codes", "scale", "zero")]
    weight = nodes.call_function(torch.ops.lwcompile.dequantize.default, (*stored, 4, 16, columns))
    nodes.output((nodes.call_function(torch.ops.aten.linear.default, (x, weight)),))
    tensors = {f"w.{name}": store.put(part) for name, part in parts.items()}
    made = ModelGraph(nodes, tensors, store, [Input("x", (2, columns), torch.float32)], ["y"])
    made.propagate()
    return made


def run_graph(graph: ModelGraph, x: Tensor) -> Tensor:
    with torch.no_grad():
        return graph.module(dense=True)(x)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_16_bits_is_rounded_once(dtype):
    weight, x = Panels.of(weight_of(4, SHAPES[1], "integer")), random(3, 128).to(dtype)
    assert torch.equal(weight.multiply(x), weight.multiply(x.float()).to(dtype))


def test_a_model_in_bf16_reads_packed_weights(monkeypatch):
    seen: list[ModelGraph] = []
    rewritten = backend._rewritten
    monkeypatch.setattr(backend, "_rewritten", lambda *given: seen.append(rewritten(*given)) or seen[-1])
    model: Any = copy.deepcopy(llama(layers=1)).bfloat16()
    sites = find_structure(llama_program(layers=1)).sites.values()
    plan = Plan(
        {s.id: (Spec.parse("quantize{bits=4,group_size=16,solver=rtn}"),) for s in sites if s.kind in ("linear", "embedding")}
    )
    torch._dynamo.reset()
    with torch.no_grad():
        options: Any = {"plan": plan, "codegen": "eager"}
        wanted = torch.compile(model, backend="layerwise", options=options)(ids(2, 9), use_cache=False)
        (graph,) = seen
        graph.propagate()
        small = Inductor(products="packed")._lowered(graph)
        (made,) = in_place(small, {})(ids(2, 9))
    assert made.dtype is torch.bfloat16 and relative_error(wanted.logits, made) < backend.HALF_TOLERANCE
    assert not any(n.target is torch.ops.lwcompile.dequantize.default for n in small.graph.nodes)
    said = Inductor(products="packed").executors(graph)
    assert sum("packed" in who for who in said.values()) == 9 and not any("made dense" in who for who in said.values())
    casts = graph.folded().graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)
    assert not any(n.args[0].op == "get_attr" for n in casts), "weights are cast when compiled, not at each call"


def test_a_tied_weight_is_packed_once_and_graphs_share_it(quantized):
    graph, codegen = fixed(quantized), Inductor(products="packed")
    first, second = codegen._lowered(graph), codegen._lowered(graph)
    embedding = next(n for n in first.graph.nodes if n.target is torch.ops.lwcompile.packed_embedding.default)
    heads = [n for n in first.graph.nodes if n.target is torch.ops.lwcompile.packed_linear.default and n.args[7] == VOCABULARY]
    assert [n.args[1].target for n in heads] == [embedding.args[1].target]
    mine, theirs = ({graph.tensor(n).data_ptr() for n in graph.tensors} for graph in (first, second))
    assert mine == theirs


def test_linears_of_one_input_are_one_call(quantized):
    found = products.products(fixed(quantized))
    assert [p.shape for p in found if len(p.calls) > 1] == [(128, 32)] * 2, "gates; keys and values are no whole panels"
    assert all(p.rows == 18 for p in found if not p.looks_up)
    assert all(p.rows is None for p in products.products(quantized))


def test_a_weight_that_is_read_in_other_company_stays_alone(quantized):
    graph = fixed(quantized)
    pairs = [p.calls for p in products.products(graph) if len(p.calls) > 1]
    pairs[1][0].update_arg(1, pairs[0][0].args[1])
    assert all(len(p.calls) == 1 for p in products.products(graph))


def test_without_a_plan_nothing_changes():
    graph = llama_program(layers=2).main
    assert Inductor()._lowered(graph) is graph
    assert not any("packed" in who for who in Inductor().executors(graph).values())


def test_who_runs_each_product_is_said(quantized):
    said = Inductor(products="packed").executors(fixed(quantized))
    words = list(said.values())
    assert "our packed look-up in C++, 4 bits, 67x32, float32" in words
    assert "our packed product in C++, 4 bits, 128x32, 2 in one call, in place or by parts, float32" in words
    assert not any("made dense" in word for word in words)
    dense = Inductor(products="dense").executors(fixed(quantized)).values()
    assert "the linear algebra library, 3 bits, 32x64, made dense when compiled" in dense


def test_what_int8_does_to_a_graph_is_checked_and_said_at_its_first_call(caplog):
    graph, x = one_product(32, 64), random(2, 64)
    wanted = run_graph(graph, x)
    checked = Checked(lambda x: [wanted * 1.05], graph, 0)
    with caplog.at_level(logging.WARNING, "lwcompile"):
        assert checked([x])[0] is not wanted and checked.unchecked is None
    assert "activations in int8 move y by 5.0e-02 of its root mean square" in caplog.text
    with pytest.raises(VerificationError, match=r"with activations in int8, y is 2.0e-01 of its root mean square away"):
        Checked(lambda x: [wanted * 1.2], graph, 0)([x])
    with pytest.raises(VerificationError, match="y is inf"):
        Checked(lambda x: [torch.where(wanted > 0, wanted, torch.nan)], graph, 0)([x])


def test_auto_takes_the_fastest_that_measures(monkeypatch):
    """Under a plan by seconds, else by rank; one that measures nothing is taken where none does."""

    def codegen(name: str, rank: int, seconds: float | None) -> Any:
        return SimpleNamespace(
            name=name, automatic=rank, seconds=lambda graph: seconds, unavailable=lambda: None, unsupported=lambda graph: []
        )

    def taken(graph: ModelGraph, *made: Any) -> str:
        by_name = {c.name: c for c in made}
        monkeypatch.setattr(backend, "plugins", lambda group: [SimpleNamespace(name=name) for name in by_name])
        monkeypatch.setattr(backend, "make", lambda group, name: by_name[name])
        return backend._codegen("auto", graph).name

    packed_graph, plain = one_product(32, 64), llama_program(layers=2).main
    slow, fast, silent = codegen("slow", 10, 2.0), codegen("fast", 1, 1.0), codegen("silent", 20, None)
    assert taken(packed_graph, slow, fast, silent) == "fast"
    assert taken(packed_graph, silent, codegen("other", 1, None)) == "silent"
    assert taken(plain, slow, fast) == "slow"


def test_without_a_compiler_products_are_dense_and_it_is_said(quantized, monkeypatch, caplog):
    monkeypatch.setattr(packed, "unavailable", lambda: "packed.cpp cannot be built (no compiler)")
    with caplog.at_level(logging.WARNING, "lwcompile"):
        made = Inductor()._lowered(fixed(quantized))
    assert not any("packed" in str(n.target) for n in made.graph.nodes)
    assert "products run with dense weights: packed.cpp cannot be built (no compiler)" in caplog.text


def test_a_source_that_does_not_compile_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "broken.cpp").write_text("this is no C++")
    reason = native.load(tmp_path / "broken.cpp")
    assert reason is not None and reason.startswith("broken.cpp cannot be built (")
    assert not list((tmp_path / "lwcompile" / "native").iterdir()), "nothing half made is left"
