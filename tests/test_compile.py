"""torch.compile(model, backend="layerwise"): the same function as the module, under changing sizes, weights, types and caches."""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn

import lwcompile as lw
from lwcompile.apply import apply_plan
from lwcompile.context import Context
from lwcompile.executor import run
from lwcompile.manager import relative_error
from lwcompile.structure import find_structure

pytest.importorskip("transformers", reason="the models are transformers' own: install lwcompile[hf]")
from tiny import ids, llama, llama_program

from lwcompile.backends.dynamo import backend, kept

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
EAGER = {"codegen": "eager"}


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    monkeypatch.setattr(backend, "_plain", lambda: "eager")  # what is left to torch is not compiled for minutes
    torch._dynamo.reset()
    backend._said.clear()
    with torch._inductor.config.patch(compile_threads=1, cpp_cache_precompile_headers=False):  # two kernels are quicker without
        yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="layerwise", options={**EAGER, **options})


def fresh_llama(**changes: Any) -> nn.Module:
    import copy

    return copy.deepcopy(llama(**changes))


@torch.no_grad()
def logits(model: Any, x: Tensor, **more: Any) -> Tensor:
    return model(x, use_cache=False, **more).logits


# --- without options


class Small(nn.Module):
    """Products, one of them the other way round, a norm, a weight that is computed, and a write into an input."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)
        self.turned, self.gain = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.down(self.norm(torch.relu(self.up(x)))) * (1 + self.gain) @ self.turned
        seen += x
        return x * 2


@needs_compiler
def test_inductor_computes_the_module_and_its_code_is_kept(graphs):
    """What was compiled once is found again, by whoever has the same graph and weights, in a process that never saw it."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    for seed, known in ((0, False), (0, True), (1, False)):
        torch._dynamo.reset()
        kept._loaded.clear()
        model, mine, theirs = Small(seed), torch.ones(3, 16), torch.ones(3, 16)
        with torch.no_grad():
            made, wanted = torch.compile(model, backend="layerwise")(x, mine), model(x, theirs)
        assert relative_error(wanted, made) < 1e-5 and relative_error(theirs, mine) < 1e-5
        assert graphs[-1].was_kept is known and len(graphs[-1].frozen.positions) == 8
    with torch.no_grad():
        model.gain.add_(1)
        assert relative_error(model(x, theirs), torch.compile(model, backend="layerwise")(x, mine)) < 1e-5


@needs_compiler
def test_the_libraries_of_kept_code_are_loaded_from_where_they_lie(graphs, monkeypatch):
    """Inductor is not asked for them, which is a second of compilers and processes; it is for those that are gone."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    asked = []
    inner = AsyncCompile.cpp_pybinding
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *given: asked.append(given) or inner(*given))
    x, counts = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), []
    for known in (False, True, True):
        torch._dynamo.reset()
        kept._loaded.clear()
        PyCodeCache.cache_clear()
        model = Small()
        with torch.no_grad():
            made = torch.compile(model, backend="layerwise")(x, torch.ones(5, 16))
            assert relative_error(model(x, torch.ones(5, 16)), made) < 1e-5
        assert graphs[-1].was_kept is known
        counts.append(len(asked))
        (places,) = Path(cache_dir()).glob("lwcompile/*/*.libraries.json")
        if known:
            places.write_text(places.read_text().replace(".so", ".gone"))
    assert counts[0] == counts[1] > 0 and counts[2] == 2 * counts[0]


def test_what_a_key_cannot_say_is_not_kept(graphs, monkeypatch):
    """Free sizes, whose guards would be lost."""
    keys = []
    inner = kept.key
    monkeypatch.setattr(kept, "key", lambda *given: keys.append(inner(*given)) or keys[-1])
    c = torch.compile(Small(), backend="layerwise", dynamic=True, options=EAGER)
    with torch.no_grad():
        c(torch.randn(3, 16), torch.ones(3, 16))
    assert keys == [None] and not graphs[0].was_kept


def test_the_backend_is_found_by_name_alone():
    code = (
        "import sys, torch\n"
        "assert not any(m.startswith('lwcompile') for m in sys.modules)\n"
        "with torch.no_grad():\n"
        "    torch.compile(torch.nn.Linear(4, 4), backend='layerwise', options={'codegen': 'eager'})(torch.ones(1, 4))\n"
        "assert 'lwcompile.backends.dynamo.backend' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_who_runs_each_operator_is_said(caplog):
    with caplog.at_level(logging.INFO, "lwcompile"):
        logits(compiled(llama(layers=1)), ids(1, 5))
    said = [line for line in caplog.messages if line.startswith("torch.compile, eager: ")]
    assert "torch.compile, eager: 8 aten.linear: torch, one by one" in said and len(said) > 5


def test_sizes_change_without_a_storm(graphs):
    model, c = llama(layers=2), compiled(llama(layers=2))
    for shape in ((2, 9), (3, 11), (5, 7), (4, 20), (2, 13)):
        assert relative_error(logits(model, ids(*shape)), logits(c, ids(*shape))) < 1e-5
    assert len(graphs) == 2  # one for the first sizes, one for all


def test_weights_are_named_however_dynamo_reads_them():
    """A module that was met before is read through its `__dict__`, as in Swin."""

    from types import SimpleNamespace

    from lwcompile.backends.dynamo.capture import _is_stored, _name

    for middle in ("._modules['norm']", ".__dict__['_modules']['norm']"):
        for last, stored in (("._buffers['w']", True), (".__dict__['_buffers']['w']", True), ("._parameters['w']", False)):
            source = SimpleNamespace(name=f"L['self']._modules['blocks']._modules['0']{middle}{last}")
            node: Any = SimpleNamespace(_dynamo_source=source)
            assert _name(node) == "blocks.0.norm.w" and _is_stored(node, torch.ones(1)) is stored


def test_a_graph_that_maps_a_function_is_left_to_torch(caplog, graphs):
    """Tracing it fails within the map, which must not stay entered."""

    class Maps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: (row * 2).cumsum(0))(x)

    c, x = compiled(Maps()), torch.randn(3, 4)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "lwcompile"):
        assert torch.equal(c(x), Maps()(x)) and torch.rand(2).shape == (2,)
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0 and (graphs or "as it stands" in caplog.text)


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=needs_compiler)])
def test_numbers_change_without_a_storm(codegen, graphs):
    """A number that is no tensor's size, as a cache's own count of tokens is."""

    class Counts(nn.Module):
        def forward(self, x: Tensor, n: int) -> tuple[Tensor, int]:
            return torch.where(torch.arange(8) < n, x * n, 0), n + 1

    c = torch.compile(Counts(), backend="layerwise", options={"codegen": codegen})
    x = torch.randn(3, 8)
    with torch.no_grad():
        for n in (3, 4, 5, 9, 17):
            made, wanted = c(x, n), Counts()(x, n)
            assert torch.equal(made[0], wanted[0]) and made[1] == n + 1
    assert len(graphs) == 2  # one for the first number, one for all


def test_a_number_that_nothing_is_computed_of_is_no_input(graphs):
    """The stride of a slice, which dynamo lets vary once it did: taken for a size, it kept kernels for fixed sizes from being used."""
    c = torch.compile(net := nn.Linear(8, 8), backend="layerwise", options={"codegen": "eager"})
    with torch.no_grad():
        for x in (torch.randn(1, 8), torch.randn(1, 24)[:, :8], torch.randn(1, 30)[:, 2:10]):
            assert torch.equal(c(x), net(x))
    assert any(isinstance(n.meta["example_value"], torch.SymInt) for n in graphs[-1].module.graph.find_nodes(op="placeholder"))
    assert all(len(made.inputs) == 1 for made in graphs)


def test_nobody_has_torch_s_trace_written_while_tests_run(caplog):
    """`conftest.Unheard`: pytest's listening had every graph printed."""
    from torch._logging import trace_structured

    trace_structured("artifact", payload_fn=lambda: pytest.fail("somebody listens"))


def test_twice_in_one_process(graphs):
    first, second = fresh_llama(layers=2), fresh_llama(layers=2, seed=1)
    a, b = compiled(first), compiled(second)
    x = ids(2, 9)
    for _ in range(2):
        assert relative_error(logits(first, x), logits(a, x)) < 1e-5
        assert relative_error(logits(second, x), logits(b, x)) < 1e-5


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_without_gradients(mode, graphs):
    model, x = llama(layers=2), ids(2, 9)
    with getattr(torch, mode)():
        assert relative_error(model(x).logits, compiled(model)(x).logits) < 1e-5
    assert len(graphs) == 1


def test_bf16(graphs):
    model, x = fresh_llama(layers=2).bfloat16(), ids(2, 9)
    assert relative_error(logits(model, x), logits(compiled(model), x)) < 0.05
    assert len(graphs) == 1


def test_an_output_that_was_a_copy_stays_one():
    class Copies(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = x + 1
            return x.clone(), y, y.clone()

    x = torch.zeros(3)
    with torch.no_grad():
        a, b, c = compiled(Copies())(x)
    a += 5
    b += 7
    assert x.eq(0).all() and a.eq(5).all() and b.eq(8).all() and c.eq(1).all()


def test_what_is_written_into_inputs_and_handed_through():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor, cache: Tensor, n: int) -> tuple[Tensor, Tensor, int, None]:
            self.count += 1
            cache[:, :2] = self.linear(x)[:, :2]
            return cache, cache.sum() + self.count, n + x.shape[0], None

    torch.manual_seed(0)
    model, other = Writes(), Writes()
    other.load_state_dict(model.state_dict())
    c = compiled(model)
    for rows in (2, 3, 5):
        x = torch.randn(rows, 4)
        mine, theirs = torch.zeros(rows, 4), torch.zeros(rows, 4)
        with torch.no_grad():
            made, wanted = c(x, mine, 7), other(x, theirs, 7)
        assert made[0] is mine and torch.allclose(mine, theirs, atol=1e-6)
        assert torch.allclose(made[1], wanted[1], atol=1e-6) and made[2:] == wanted[2:]
    assert model.count == other.count == 3


# --- weights are part of the code


@pytest.mark.parametrize("change", ["in place", "data", "replaced", "loaded"])
def test_a_changed_weight_is_noticed(change, graphs, caplog):
    model, x = fresh_llama(layers=2), ids(2, 9)
    c = compiled(model)
    before = logits(c, x)
    linear = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        if change == "in place":
            linear.weight.mul_(2)
        elif change == "data":
            linear.weight.data = linear.weight.data * 2
        elif change == "replaced":
            linear.weight = nn.Parameter(linear.weight * 2)
        else:
            model.load_state_dict(
                {k: v * 2 if k.endswith("1.mlp.down_proj.weight") else v for k, v in model.state_dict().items()}
            )
    with caplog.at_level(logging.WARNING, "lwcompile"):
        after = logits(c, x)
    assert relative_error(logits(model, x), after) < 1e-5 < relative_error(before, after)
    assert "a weight was changed" in caplog.text
    assert relative_error(after, logits(c, x)) == 0
    torch._dynamo.reset()
    assert relative_error(after, logits(c, x)) < 1e-5 and graphs[-1].unfrozen is None


def test_another_model_of_the_class_does_not_disturb_the_first(graphs, caplog):
    first, second, x = fresh_llama(layers=2), fresh_llama(layers=2, seed=1), ids(2, 9)
    a, b = compiled(first), compiled(second)
    with caplog.at_level(logging.WARNING, "lwcompile"):
        for c, model in ((a, first), (b, second), (a, first), (b, second)):
            assert relative_error(logits(model, x), logits(c, x)) < 1e-5
    assert len(graphs) == 1 and graphs[0].unfrozen is None and "a weight was changed" not in caplog.text
    assert caplog.text.count("another model of a class") == 1


def test_a_write_that_torch_does_not_count_is_read_in_place(graphs):
    model, x = fresh_llama(layers=2), ids(2, 9)
    c = compiled(model)
    before = logits(c, x)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(2)
    after = logits(c, x)
    assert relative_error(logits(model, x), after) < 1e-5 < relative_error(before, after) and graphs[-1].unfrozen is None


# --- what is not for us


def test_training_gets_its_gradients(caplog, graphs):
    model, x = fresh_llama(layers=2), ids(2, 9)
    with caplog.at_level(logging.WARNING, "lwcompile"):
        compiled(model)(x, labels=x, use_cache=False).loss.backward()
    found = model.model.layers[0].mlp.down_proj.weight.grad
    model.zero_grad()
    model(x, labels=x, use_cache=False).loss.backward()
    assert found is not None and relative_error(model.model.layers[0].mlp.down_proj.weight.grad, found) < 1e-4
    assert not graphs and caplog.text.count("gradients are on") == 1


def test_autocast_is_left_to_torch(caplog, graphs):
    model, x = llama(layers=2), ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16), caplog.at_level(logging.WARNING, "lwcompile"):
        assert relative_error(logits(model, x), logits(compiled(model), x)) < 0.05
    assert not graphs and "autocast" in caplog.text


def test_a_model_with_a_graph_break_runs(graphs):
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    torch.manual_seed(0)
    model, x = Breaks(), torch.randn(3, 4)
    with torch.no_grad():
        assert relative_error(model(x), compiled(model)(x)) < 1e-5
    assert len(graphs) == 2


def test_without_a_compiler_slower_code_is_said(monkeypatch, caplog):
    from lwcompile.backends.inductor.codegen import Inductor

    monkeypatch.setattr(Inductor, "unavailable", lambda self: "no C++ compiler was found")
    model, x = llama(layers=1), ids(2, 9)
    with caplog.at_level(logging.WARNING, "lwcompile"):
        made = logits(torch.compile(model, backend="layerwise"), x)
    assert relative_error(logits(model, x), made) < 1e-5
    assert "made by eager, which is slower than inductor is: no C++ compiler was found" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codegen": "hopes"}, "no codegen is named 'hopes'; installed are .*eager.*inductor"),
        ({"plans": "x"}, r"is unknown \(did you mean .*plan"),
        ({"plan": 4}, "the option plan wants a folder"),
        ({"recipe": 4}, "the option recipe wants a recipe, its name or its file, and got 4"),
        ({"recipe": "balanced"}, "the recipe's budget needs samples"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(Exception, match=words):
        logits(torch.compile(llama(layers=2), backend="layerwise", options=options), ids(2, 9))


@pytest.mark.parametrize("form", ["recipe", "file"])
def test_the_exact_passes_of_a_recipe_are_run(form, tmp_path, monkeypatch):
    model, x = fresh_llama(tied=False, layers=1), ids(2, 9)
    (tmp_path / "folds.yaml").write_text("passes: [fold_norms]")
    recipe = tmp_path / "folds.yaml" if form == "file" else lw.Recipe.load(tmp_path / "folds.yaml")
    norms: list[Any] = []
    make = backend._codegen

    def look(name: str, graph: Any) -> Any:
        norms.extend(n for n in graph.graph.nodes if n.target is torch.ops.aten.rms_norm.default)
        return make(name, graph)

    monkeypatch.setattr(backend, "_codegen", look)
    assert relative_error(logits(model, x), logits(compiled(model, recipe=recipe), x)) < 1e-5
    assert len(norms) == 3 and all(norm.args[2] is None for norm in norms), "a gain is left"


def test_triton_without_a_gpu_says_what_to_set(monkeypatch):
    pytest.importorskip("triton", reason="the extra is not installed")
    monkeypatch.setattr("lwcompile.backends.triton.codegen.device", lambda: "cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Exception, match="the codegen triton cannot be used: there is no GPU; set TRITON_INTERPRET=1"):
        logits(compiled(llama(layers=1), codegen="triton"), ids(1, 5))


# --- generating


@pytest.mark.parametrize(
    ("cache", "dynamic", "most"), [("static", None, 3), ("static", True, 2), ("dynamic", None, 4), ("dynamic", True, 2)]
)
def test_generating_compiles_few_graphs(cache, dynamic, most, graphs):
    model = fresh_llama(layers=2)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    how = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    wanted = [model.generate(ids(1, n), **how) for n in (9, 12, 7)]
    model.forward = torch.compile(model.forward, backend="layerwise", dynamic=dynamic, options=EAGER)
    for n, tokens in zip((9, 12, 7), wanted):
        assert torch.equal(model.generate(ids(1, n), **how), tokens)
    assert len(graphs) <= most and all(g.unfrozen is None for g in graphs)
    counted = len(graphs)
    model.generate(ids(1, 10), **how)
    assert len(graphs) == counted


# --- plans

PLAN = """
sites:
  block0.attention.q_proj: quantize{bits=4,group_size=16,solver=gptq}
  block0.attention.k_proj: quantize{bits=4,group_size=16,solver=gptq}
  block0.attention.v_proj: quantize{bits=4,group_size=16,solver=gptq}
  block1.attention: drop
  block2.mlp.down_proj: quantize{bits=3,group_size=16,solver=gptq}
  embedding: quantize{bits=8,group_size=16,solver=rtn}
  head: quantize{bits=8,group_size=16,solver=rtn}
"""
RECIPE = """
analyses: [measured]
options:
  linear: ["quantize{bits=[3,4],group_size=16,solver=gptq}", "quantize{bits=8,group_size=16,solver=rtn}"]
  embedding: ["quantize{bits=8,group_size=16,solver=rtn}"]
  attention: [drop]
backend: program
calibration: {dataset: random, samples: 2, seqlen: 12}
evaluation: {dataset: random, samples: 4, seqlen: 12}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Any:
    """`lw.compress` of the tiny Llama under `PLAN`, captured as a Hugging Face model is, with its folder."""
    folder = tmp_path_factory.mktemp("small")
    plan, recipe = lw.Plan.parse(PLAN), lw.Recipe.parse(RECIPE)
    return lw.compress(llama_program(), folder / "program", recipe=recipe, plan=plan, run_dir=folder / "run")


@pytest.mark.parametrize("form", ["folder", "result"])
def test_a_compressed_program_s_weights_are_used(form, small, graphs):
    model = llama()
    c = compiled(model, plan=str(small.path) if form == "folder" else small)
    for x in (ids(2, 9), ids(3, 14, seed=5)):
        wanted = run(small.program, {"input_ids": x})["logits"]
        assert relative_error(wanted, logits(c, x)) < 1e-4
        assert relative_error(logits(model, x), logits(c, x)) > 1e-3
    assert all(g.unfrozen is None for g in graphs)


def test_generating_with_a_plan_follows_the_compressed_program(small):
    model = fresh_llama()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    model.forward = torch.compile(model.forward, backend="layerwise", options={**EAGER, "plan": str(small.path)})
    tokens = model.generate(ids(1, 9), max_new_tokens=6, do_sample=False)
    x = ids(1, 9)
    for _ in range(6):
        x = torch.cat([x, run(small.program, {"input_ids": x})["logits"][:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, x)


def test_a_plan_without_weights_is_solved_here(tmp_path):
    plan = PLAN.replace("gptq", "rtn")
    (tmp_path / "plan.yaml").write_text(plan)
    program = llama_program()
    structure = find_structure(program)
    wanted = apply_plan(program, lw.Plan.parse(plan).choices, structure, Context(structure=structure, program=program))
    x = ids(2, 9)
    made = logits(compiled(llama(), plan=tmp_path / "plan.yaml"), x)
    assert relative_error(run(wanted, {"input_ids": x})["logits"], made) < 1e-4


def test_a_solver_that_needs_samples_is_refused(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    with pytest.raises(Exception, match="name the folder that `lwcompile compress` wrote"):
        logits(compiled(llama(), plan=tmp_path / "plan.yaml"), ids(2, 9))


def test_a_plan_of_another_model_is_not_half_applied(small, caplog, graphs):
    model = fresh_llama(layers=2)
    with caplog.at_level(logging.WARNING, "lwcompile"):
        made = logits(compiled(model, plan=small), ids(2, 9))
    assert relative_error(logits(model, ids(2, 9)), made) < 1e-5 and not graphs
    assert "without the plan: the plan names block2.mlp.down_proj, which this graph does not hold" in caplog.text


def test_a_mistyped_site_is_named_with_what_to_do(caplog, graphs):
    """No error: a graph cannot tell it from a site of the model's other graphs."""
    model, plan = fresh_llama(layers=1), lw.Plan.parse("sites: {block0.mlp: drop, block0.atention: drop}")
    with caplog.at_level(logging.WARNING, "lwcompile"):
        made = logits(compiled(model, plan=plan), ids(2, 9))
    assert relative_error(logits(model, ids(2, 9)), made) < 1e-5 and not graphs
    assert "without the plan: the plan names block0.atention, which this graph does not hold" in caplog.text
    assert "(did you mean 'block0.attention'?): mend an id that is mistyped (`lwcompile inspect` lists them)" in caplog.text


def test_a_part_of_a_model_takes_no_plan_for_the_whole(small, caplog, graphs):
    """Blocks of a part are counted from 0, and must not be taken for the model's first ones."""
    whole = llama().model

    class Rest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({str(i): whole.layers[i] for i in (1, 2)})
            self.rotary = whole.rotary_emb

        def forward(self, x: Tensor) -> Tensor:
            where = self.rotary(x, torch.arange(x.shape[1])[None])
            for layer in self.layers.values():
                x = layer(x, position_embeddings=where)
            return x

    model, x = Rest(), torch.randn(2, 9, 32)
    plan = lw.Plan.parse("sites: {block0.mlp: drop}")
    with torch.no_grad(), caplog.at_level(logging.WARNING, "lwcompile"):
        made, wanted = compiled(model, plan=plan)(x), model(x)
    assert relative_error(wanted, made) < 1e-5
    assert "it begins at layers.1, in the middle of the model" in caplog.text


@pytest.mark.parametrize("how", ["in place", "another", "of another shape"])
def test_a_weight_that_changes_under_a_plan_is_an_error(small, how):
    """Dynamo leaves looking at weights to us there."""
    model, x = fresh_llama(), ids(2, 9)
    c = compiled(model, plan=small)
    logits(c, x)
    up = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        if how == "in place":
            up.weight.add_(1)
        else:
            up.weight = torch.nn.Parameter(up.weight.clone() if how == "another" else torch.zeros(8, 32))
    with pytest.raises(Exception, match="a weight was changed after the model was compiled under a plan"):
        logits(c, x)


def test_two_models_of_a_class_under_one_plan(graphs):
    """Each is compressed from its own weights."""
    from lwcompile.plans import Plan
    from lwcompile.spec import Spec

    first, second, x = fresh_llama(layers=2), fresh_llama(layers=2, seed=1), ids(2, 9)
    plan = Plan({"block1.mlp.up_proj": (Spec.parse("quantize{bits=4,group_size=16,solver=rtn}"),)})
    pairs = [(compiled(model, plan=plan), model) for model in (first, second)]
    made = [logits(c, x) for c, _ in (*pairs, *pairs)]
    assert len(graphs) == 2 and torch.equal(made[0], made[2]) and torch.equal(made[1], made[3])
    for c, (_, model) in zip(made, pairs):
        assert 1e-4 < relative_error(logits(model, x), c) < 0.2
    torch._dynamo.reset()
    assert torch.equal(logits(compiled(second, plan=plan), x), made[1])


# --- onnxruntime


def test_onnxruntime_runs_the_graph(small, graphs):
    pytest.importorskip("onnxruntime", reason="the codegen is not installed")
    model, x = llama(), ids(2, 9)
    assert (
        relative_error(logits(model, x), logits(torch.compile(model, backend="layerwise", options={"codegen": "onnxruntime"}), x))
        < 1e-4
    )
    torch._dynamo.reset()
    c = torch.compile(model, backend="layerwise", dynamic=True, options={"codegen": "onnxruntime", "plan": small})
    for x in (ids(2, 9), ids(3, 14)):
        assert relative_error(run(small.program, {"input_ids": x})["logits"], logits(c, x)) < 1e-3
    assert len(graphs) == 2


# --- the zoo


@pytest.mark.parametrize("name", ["GPT-2", "Qwen3", "BERT", "DINOv2", "CLIP", "T5", "Gemma 3", "Mixtral"])
def test_a_sample_of_the_zoo(name, graphs):
    from benchmarks.zoo_models import MEMBERS
    from lwcompile.sources import open_source

    source = open_source(next(m for m in MEMBERS if m.name == name).build())
    for part in source.parts.values():
        with torch.no_grad():
            wanted, made = part.model(**part.example_kwargs), compiled(part.model)(**part.example_kwargs)
        wanted, made = (x.to_tuple() if hasattr(x, "to_tuple") else x for x in (wanted, made))
        pairs = list(zip(_tensors(wanted), _tensors(made), strict=True))
        assert pairs and all(relative_error(a, b) < 1e-4 for a, b in pairs)
    assert graphs, "rewritten, and not left to torch"


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]
