"""Products of a few rows with large dense weights under torch.compile: forms against float64, the choice by the device table, kept code."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import logging
import shutil
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lwcompile.backends.dynamo import kept
from lwcompile.backends.inductor import codegen, rows
from lwcompile.backends.inductor.codegen import Inductor
from lwcompile.backends.inductor.ways import example
from lwcompile.formats import NumericFormat
from lwcompile.graph import Input, ModelGraph
from lwcompile.manager import relative_error
from lwcompile.store import ParameterStore
from lwcompile.timings import DeviceTable

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1, cpp_cache_precompile_headers=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def small(monkeypatch):
    """Weights of any size are candidates."""
    monkeypatch.setattr(rows, "LEAST", 0)


def measured(monkeypatch, ours: float) -> None:
    monkeypatch.setattr(DeviceTable, "get", lambda self, key, measure: ours if "ours" in key else 1.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(x: tuple[int, ...], weight: tuple[int, int], bias: bool, dtype: Any = torch.float32) -> ModelGraph:
    nodes, store = fx.Graph(), ParameterStore()
    parts = {"w": random(*weight, seed=1).to(dtype)} | ({"b": random(weight[0], seed=2).to(dtype)} if bias else {})
    given = [nodes.placeholder("x"), *(nodes.create_node("get_attr", name) for name in parts)]
    nodes.output((nodes.call_function(aten.linear.default, tuple(given)),))
    made = ModelGraph(nodes, {name: store.put(part) for name, part in parts.items()}, store, [Input("x", x, dtype)], ["y"])
    made.propagate()
    return made


def wanted(graph: ModelGraph, x: Tensor) -> Tensor:
    bias = graph.tensor("b").double() if "b" in graph.tensors else None
    return F.linear(x.double(), graph.tensor("w").double(), bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 70), (1, 1, 17), (2, 33), (1, 3, 70), (2, 2, 5)])
@pytest.mark.parametrize("outs", [1, 33])
def test_the_forms_compute_the_product(shape, outs, bias, small, monkeypatch):
    measured(monkeypatch, 0.5)
    graph, x = product(shape, (outs, shape[-1]), bias), random(*shape)
    made = Inductor()._lowered(graph)
    assert aten.linear.default in {n.target for n in graph.graph.nodes} - {n.target for n in made.graph.nodes}
    found = made.module()(x)[0]
    assert found.shape == (*shape[:-1], outs) and found.is_contiguous() and relative_error(wanted(graph, x), found) < 2e-6


@pytest.mark.parametrize(("count", "threads"), [(1, 1), (1, 2), (3, 2)])
def test_inductor_s_code_computes_them(count, threads, small, monkeypatch):
    measured(monkeypatch, 0.5)
    graph, x = product((count, 70), (1030, 70), True), random(count, 70)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        code = Inductor().compile(graph, [x], {})
        made = code.call([*code.tensors, x])[0]
    finally:
        torch.set_num_threads(before)
    assert made.is_contiguous() and relative_error(wanted(graph, x), made) < 2e-6


def test_the_table_decides_and_it_is_said(small, monkeypatch):
    for count, form in (
        (1, "C++ loops by Inductor, a product summed row by row"),
        (2, "the linear algebra library, a product turned"),
    ):
        graph = product((count, 70), (33, 70), False)
        measured(monkeypatch, 0.5)
        (said,) = Inductor().executors(graph).values()
        assert said.startswith(form) and "(measured, us: torch's 1000000, ours 500000)" in said
        measured(monkeypatch, 0.95)
        (said,) = Inductor().executors(graph).values()
        assert said.startswith("the linear algebra library, called by Inductor's code (measured"), "not clearly faster"
        assert Inductor()._lowered(graph) is graph


def test_a_dense_product_behind_a_packed_one(small, monkeypatch):
    measured(monkeypatch, 0.5)
    parts, nodes, store = example(NumericFormat(4, 16), (32, 64)).pack(), fx.Graph(), ParameterStore()
    parts = {**parts, "dense": random(40, 32)}
    x, *held = nodes.placeholder("x"), *(nodes.create_node("get_attr", name) for name in parts)
    stored = dict(zip(parts, held))
    weight = nodes.call_function(
        torch.ops.lwcompile.dequantize.default, (stored["codes"], stored["scale"], stored.get("zero"), 4, 16, 64)
    )
    y = nodes.call_function(aten.linear.default, (x, weight))
    nodes.output((nodes.call_function(aten.linear.default, (y, stored["dense"])),))
    tensors = {name: store.put(part) for name, part in parts.items()}
    graph, x = ModelGraph(nodes, tensors, store, [Input("x", (1, 64), torch.float32)], ["y"]), random(1, 64)
    graph.propagate()
    made = Inductor()._lowered(graph)
    targets = {n.target for n in made.graph.nodes}
    assert aten.linear.default not in targets and torch.ops.lwcompile.packed_linear.default in targets
    assert relative_error(graph.module()(x)[0], made.module()(x)[0]) < 1e-5


def test_what_is_not_a_candidate_is_not_measured(monkeypatch):
    monkeypatch.setattr(DeviceTable, "get", lambda *given: pytest.fail("measured"))
    large = product((1, 70), (33, 70), False)
    assert Inductor()._lowered(large) is large, "a small weight"
    monkeypatch.setattr(rows, "LEAST", 0)
    for other in (product((5, 70), (33, 70), False), product((1, 70), (33, 70), False, torch.bfloat16)):
        assert Inductor()._lowered(other) is other
    for chosen in (Inductor(freezing=True), Inductor(products="dense")):
        assert chosen._lowered(large) is large
    monkeypatch.setattr(codegen, "missing_compiler", lambda: "no C++ compiler")
    assert Inductor()._lowered(large) is large


def test_measuring_proves_the_form(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rows, "SPREAD", 0)
    monkeypatch.setattr(rows, "BUDGET", 0.01)
    monkeypatch.setattr(rows, "MOST", 4 * 64 * 16)
    halves, whole = rows._seconds((32, 64), 2, DeviceTable(tmp_path / "t.json")), DeviceTable(tmp_path / "t.json")
    assert all(0 < took < 1 for took in halves.values()) and len(whole.seconds) == 2
    assert sorted(2 * took for took in whole.seconds.values()) == sorted(halves.values()), "16 rows were measured, of 32"
    monkeypatch.setattr(rows, "_compiled", lambda x, weight: lambda x, weight: torch.zeros(len(x), len(weight)))
    with caplog.at_level(logging.WARNING, "lwcompile"):
        assert not rows.Few((16, 64), 1, rows._seconds((16, 64), 1, whole)).ours
    assert "away from torch's: not used" in caplog.text
    monkeypatch.setattr(rows, "_compiled", lambda x, weight: 1 / 0)
    assert not rows.Few((16, 64), 3, rows._seconds((16, 64), 3, whole)).ours, "torch's is taken"


class Head(nn.Module):
    """A block's end and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(512, 48), nn.RMSNorm(48), nn.Linear(48, 512, bias=False)
        self.up, self.head.weight = nn.Linear(48, 96), self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + F.silu(self.up(x)).unflatten(-1, (2, -1)).sum(-2)))


def test_a_model_computes_what_eager_does_and_its_code_is_kept(graphs, small, monkeypatch, caplog):
    """Kept code is Inductor's alone: it needs neither the table nor a library of ours."""
    from torch._inductor.codecache import PyCodeCache

    measured(monkeypatch, 0.5)
    ids = torch.tensor([[7]])
    with caplog.at_level(logging.INFO, "lwcompile"), torch.no_grad():
        for known in (False, True):
            torch._dynamo.reset()
            kept._loaded.clear()
            PyCodeCache.cache_clear()
            model = Head()
            run = torch.compile(model, backend="layerwise")
            for _ in range(5):  # the fourth on without Python
                assert relative_error(model(ids), run(ids)) < 1e-5
            assert graphs[-1].was_kept is known
            monkeypatch.setattr(DeviceTable, "get", lambda *given: pytest.fail("measured again"))
    assert "2 aten.linear: C++ loops by Inductor, a product summed row by row (measured, us:" in caplog.text
