"""Attention that is linear outside a window: against its formula by loops, against softmax, and step by step against the whole."""

from __future__ import annotations

from typing import Any

import language_models as zoo
import pytest
import tiny
import torch
from test_decode import greedy_by_prefill
from test_window import in_pieces, windowed
from torch import Tensor

from lwcompile import linear_attention
from lwcompile.attention import attentions_at, find_attentions
from lwcompile.attention_cost import AttentionCost, pays_from
from lwcompile.context import Context
from lwcompile.decode import derive_decode
from lwcompile.errors import BadPlan, Refused
from lwcompile.generate import GraphStep, generate
from lwcompile.linear_attention import GATE, Maps, absorb_keys, attend, hybrid_attention
from lwcompile.manager import Manager
from lwcompile.passes.transform.linear_attention import Linear
from lwcompile.passes.transform.window import Window
from lwcompile.program import Program
from lwcompile.structure import find_structure

pytest.importorskip("transformers", reason="the models are transformers': install lwcompile[hf]")

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def given(length: int, dtype: torch.dtype = torch.float64, padded: bool = True) -> dict[str, Any]:
    """Two sequences of 4 heads over 2, the second padded by 3 on the left."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    open_ = torch.ones(2, length, dtype=torch.bool)
    open_[1, :3] = False
    return {
        "query": noise(2, 4, length, 6), "key": noise(2, 2, length, 6), "value": noise(2, 2, length, 5),
        "open": open_ if padded else None, "state": None, "map_query": noise(4, 6, 7), "map_key": noise(2, 6, 7), "gate": noise(4),
    }  # fmt: skip


def by_loops(x: dict[str, Any], window: int, scale: float) -> Tensor:
    """The formula as it is written."""
    batch, heads, length, _ = x["query"].shape
    out = torch.zeros(batch, heads, length, x["value"].shape[-1], dtype=torch.float64)

    def mapped(vector: Tensor, matrix: Tensor) -> Tensor:
        return torch.cat([(vector @ matrix).softmax(-1), (-(vector @ matrix)).softmax(-1)]).clamp(min=1e-12)

    for b in range(batch):
        for h in range(heads):
            group = h // 2
            for i in range(length):
                q = x["query"][b, h, i].double()
                places = [j for j in range(i + 1) if x["open"] is None or x["open"][b, j]]
                near = [j for j in places if i - j < window]
                scores = {j: float(q @ x["key"][b, group, j].double()) * scale for j in near}
                above, below = torch.zeros(x["value"].shape[-1], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
                for j in places:
                    if j in near:
                        weight = (
                            x["gate"][h].double().sigmoid()
                            * torch.tensor(scores[j] - max(scores.values()), dtype=torch.float64).exp()
                        )
                    else:
                        f_q = mapped(q, x["map_query"][h].double())
                        weight = f_q @ mapped(x["key"][b, group, j].double(), x["map_key"][group].double())
                    above, below = above + weight * x["value"][b, group, j].double(), below + weight
                out[b, h, i] = above / below if places else 0.0
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("piece", "window"), [(128, 5), (4, 5), (6, 2)])
def test_attention_is_its_formula(dtype, piece, window, monkeypatch):
    monkeypatch.setattr(linear_attention, "PIECE", piece)
    x = given(14, dtype)
    found = hybrid_attention(**x, window=window, scale=0.4)
    wanted = by_loops(x, window, 0.4)
    assert (found - wanted).abs().max() < TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pieces", [[1] * 30, [11, 1, 1, 10, 7], [2, 28]])
def test_the_recurrent_form_is_the_parallel_form(dtype, pieces, monkeypatch):
    monkeypatch.setattr(linear_attention, "PIECE", 8)
    x, window = given(30, dtype), 5
    whole = hybrid_attention(**x, window=window, scale=0.4)
    maps = {name: x[name] for name in ("map_query", "map_key", "gate")}
    held = {name: x[name][:, :, :0] for name in ("key", "value")}
    state, end, out = torch.zeros(2, 2, 14, 6, dtype=dtype), 0, []
    for size in pieces:
        start, end = end, end + size
        joined = [torch.cat([held[name], x[name][:, :, start:end]], 2) for name in ("key", "value")]
        open_ = x["open"][:, end - joined[0].shape[2] : end]
        out.append(hybrid_attention(x["query"][:, :, start:end], *joined, open_, state, **maps, window=window, scale=0.4))
        state = absorb_keys(*joined, open_, state, maps["map_key"], window)
        held = {name: tensor[:, :, 1 - window :] for name, tensor in zip(("key", "value"), joined)}
        assert held["key"].shape[2] <= window - 1
    assert (torch.cat(out, 2) - whole).abs().max() < TOLERANCE[dtype] * whole.abs().max()


def test_a_window_as_long_as_the_sequence_is_softmax():
    x = given(12, padded=False)
    found = hybrid_attention(**x, window=12, scale=0.4)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        x["query"], x["key"], x["value"], is_causal=True, scale=0.4, enable_gqa=True
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_the_formula():
    x = given(11)
    names = ("query", "key", "value", "map_query", "map_key", "gate")
    made = []
    for form in (lambda q, k, v, *m: attend(q, k, v, x["open"], None, Maps(*m), 4, 0.4),
                 lambda q, k, v, *m: hybrid_attention(q, k, v, x["open"], None, *m, 4, 0.4)):  # fmt: skip
        leaves = [x[name].clone().requires_grad_() for name in names]
        form(*leaves).square().sum().backward()
        made.append([leaf.grad for leaf in leaves])
    for a, b in zip(*made):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    leaves = [x[name].clone().requires_grad_() for name in names]
    q, k, v, *maps = leaves
    assert torch.autograd.gradcheck(lambda q, k, v, *m: hybrid_attention(q, k, v, x["open"], None, *m, 4, 0.4), (q, k, v, *maps))


# --- in a model


@pytest.mark.parametrize(("name", "drops"), [("llama", ()), ("gpt2", ("block1.attention",))])
def test_decoding_carries_a_state(name, drops):
    graph = windowed(zoo.captured(name), Linear(4, steps=0), drops=drops)
    decode = derive_decode(graph)
    heads = 2 if name == "llama" else 4
    assert [a.features for a in find_attentions(graph)] == [16] * (3 - len(drops))
    for rows in (1, 3):
        inputs = zoo.batch(rows, 15)
        wanted = zoo.run(graph, inputs)
        for pieces in ([1] * 15, [6, 1, 1, 7], [15]):
            got, cache = in_pieces(decode, inputs, pieces)
            assert zoo.closeness(got, wanted, inputs["attention_mask"]) < 1e-5
            assert [tuple(c.shape[1:]) for c in cache[:3]] == [(heads, 3, 8), (heads, 3, 8), (heads, 16, 9)]
        prompt = zoo.batch(rows, 9)
        produced = generate(GraphStep(decode), prompt["input_ids"], prompt["attention_mask"], max_new_tokens=16)
        assert torch.equal(produced, greedy_by_prefill(graph, prompt, 16))


def test_a_long_window_reproduces_the_model():
    graph, inputs = zoo.captured("llama"), zoo.batch(3, 15)
    found = zoo.run(windowed(graph, Linear(15, steps=0)), inputs)
    assert zoo.closeness(found, zoo.run(graph, inputs), inputs["attention_mask"]) < 1e-5


def test_all_three_forms_stand_in_one_file(tmp_path):
    """A linear, a windowed and a whole attention, decoded by onnxruntime, with prompts shorter and longer than the windows."""
    pytest.importorskip("onnxruntime")
    from lwcompile.backends.onnx.backend import Onnx

    graph = windowed(windowed(zoo.captured("llama"), Linear(4, steps=0), (0,)), Window(5, 2), (2,))
    decode, backend, path = derive_decode(graph), Onnx(), tmp_path / "model.onnx"
    assert backend.lower(Program({"forward": graph}, graph.store), path, None).worst < 1e-5
    assert backend.lower(Program({"forward": graph, "decode": decode}, graph.store), path, None).worst < 1e-5
    step = backend.decode_step(path)
    for length in (2, 9):
        prompt = {name: value[:, -length:] for name, value in zoo.batch(3, 9).items()}
        made = generate(step, prompt["input_ids"], prompt["attention_mask"], max_new_tokens=12)
        assert torch.equal(made, greedy_by_prefill(graph, prompt, 12))


# --- attention transfer


def transferred(**options: Any) -> tuple[Program, float, dict[str, Tensor]]:
    program = tiny.llama_program()
    structure = find_structure(program)
    ctx = Context(calibration=tiny.calibration(8, 24), structure=structure, program=program, seed=options.pop("seed", 0))
    transform = Linear(3, **options)
    edited = program.copy()
    Manager(ctx).transform(edited, [(structure.sites["block1.attention"], transform)])
    (remark,) = ctx.remarks
    maps = {name: edited.main.tensor(name) for name in edited.main.tensors if ".linear." in name}
    return edited, remark.numbers.get("error", float("nan")), maps


def test_transfer_brings_the_layer_nearer_to_its_softmax():
    """The error that is reported is that of the layer in the edited model, and steps make it smaller."""
    from lwcompile.executor import Executor

    wanted = Executor(tiny.llama_program()).run(dict(tiny.calibration(8, 24).samples), [softmax_node()])[softmax_node()]
    errors = []
    for steps in (1, 60):
        edited, reported, _ = transferred(steps=steps)
        call = attentions_at(edited.main, find_structure(edited).sites["block1.attention"])[0].node.name
        found = Executor(edited).run(dict(tiny.calibration(8, 24).samples), [call])[call]
        errors.append(float((found - wanted).norm() / wanted.norm()))
        assert reported == pytest.approx(errors[-1], rel=1e-4)
    assert errors[1] < 0.8 * errors[0]


def softmax_node() -> str:
    program = tiny.llama_program()
    return attentions_at(program.main, find_structure(program).sites["block1.attention"])[0].node.name


def test_transfer_follows_its_seed_alone():
    (_, _, a), (_, _, again), (_, _, other) = transferred(steps=5), transferred(steps=5), transferred(steps=5, seed=1)
    assert all(torch.equal(a[name], again[name]) for name in a)
    assert any(not torch.equal(a[name], other[name]) for name in a)


def test_without_steps_maps_are_the_identity():
    _, _, maps = transferred(steps=0)
    eye = torch.eye(8)
    assert torch.equal(maps["block1.attention.linear.map_query"], eye.expand(4, 8, 8))
    assert torch.equal(maps["block1.attention.linear.map_key"], eye.expand(2, 8, 8))
    assert torch.equal(maps["block1.attention.linear.gate"], torch.full((4,), GATE))


# --- prices, scores and plans


def test_what_is_stored_is_what_the_program_grows_by():
    program = tiny.llama_program()
    site = find_structure(program).sites["block1.attention"]
    edited, _, _ = transferred(steps=0)
    stored = sum(torch.Size(t.shape).numel() for t in Linear(3).stored(program.main, site))
    beside = sum(torch.Size(t.shape).numel() for t in Window(3, 1).stored(program.main, site))
    assert stored - beside == edited.main.parameter_count() - program.main.parameter_count() == 4 * 64 + 2 * 64 + 4


def test_the_forms_are_scored_and_planned_with_the_others(tmp_path):
    """One plan by hand: a window with quantized weights below it, a linear attention, and one that goes."""
    from lwcompile.plans import Plan
    from lwcompile.recipe import Recipe
    from lwcompile.session import Session
    from lwcompile.spec import Spec

    options = {
        "attention": ["drop", "window{size=4,sinks=1}", "linear{window=4,steps=3}"],
        "linear": ["quantize{bits=[4,8],group_size=16,solver=rtn}"],
    }
    recipe = Recipe.named("fast").with_(
        analyses=["measured{tokens=96}"], options=options, budget={"avg_bits": 20}, backend="program",
        calibration={"dataset": "random", "samples": 8, "seqlen": 16}, evaluation={"dataset": "random", "samples": 4, "seqlen": 16},
    )  # fmt: skip
    session = Session(tiny.llama_program(), recipe, run_dir=tmp_path / "run")
    row = session.table.sites["block1.attention"]
    damages = {str(c.option): c.damage for c in row.choices if c.refused is None}
    assert len(damages) == 4 and 0 < damages["window{size=4,sinks=1}"] < damages["drop"]
    assert row.choice((Spec.parse("window{size=4,sinks=1}"),)).bytes == row.dense_bytes
    choices = {
        "block0.attention": ["drop"], "block1.attention": ["window{size=4,sinks=1}"], "block2.attention": ["linear{window=4,steps=3}"],
        "block1.attention.q_proj": ["quantize{bits=8,group_size=16,solver=rtn}"],
        "block1.attention.k_proj": ["quantize{bits=8,group_size=16,solver=rtn}"],
        "block1.attention.v_proj": ["quantize{bits=8,group_size=16,solver=rtn}"],
    }  # fmt: skip
    plan = session.adopt(Plan({id: tuple(map(Spec.parse, specs)) for id, specs in choices.items()}))
    made = session.compress(plan)
    assert [(a.mask.window if a.mask else None, a.softmax_window) for a in find_attentions(made.main)] == [(4, None), (None, 4)]
    assert made.main.level() == "quantized" and session.measure(made)["damage"].mean > 0
    again = Program.load(made.save(tmp_path / "saved"))
    assert again.digest() == made.digest()
    assert (session.plan().bytes or 0) <= 20 / 8 * session.table.parameters


def test_costs_count_maps_and_states():
    cost = AttentionCost(9, 3, 64, 64, 64, features=128)
    state = 3 * 128 * 65
    assert cost.cache_bytes(10) == 4 * (10 * 3 * 128 + state) and cost.cache_bytes(10**6) == 4 * (63 * 3 * 128 + state)
    step = 2 * (64 * 9 * 128 + (9 + 3) * 64 * 64 + (9 + 3) * 128 * 65)  # pairs, maps, and the state read by 9 and written by 3
    assert cost.decode_flops(10**6) == step
    dense = AttentionCost(9, 3, 64, 64)
    length = pays_from(cost.cache_bytes, dense.cache_bytes)
    assert length == 63 + 65 + 1 and cost.cache_bytes(length - 1) >= dense.cache_bytes(length - 1)


# --- refusals


def test_what_has_no_state_is_refused():
    from lwcompile.tiny import programs

    program = programs()["encoder"]
    with pytest.raises(Refused, match="later positions"):
        Linear().check(program.main, find_structure(program).sites["block0.attention"])
    graph = windowed(zoo.captured("llama"), Window(4, 1), (0,))
    sites = find_structure(Program({"forward": graph}, graph.store)).sites
    with pytest.raises(Refused, match="narrowed or linear already"):
        Linear().check(graph, sites["block0.attention"])
    graph = windowed(zoo.captured("llama"), Linear(4, steps=0), (0,))
    sites = find_structure(Program({"forward": graph}, graph.store)).sites
    assert sites["block0.attention"].kind == "attention"
    for transform in (Linear(), Window(8)):
        with pytest.raises(Refused):
            transform.check(graph, sites["block0.attention"])


def test_samples_within_the_window_teach_nothing():
    program = tiny.llama_program()
    structure = find_structure(program)
    ctx = Context(calibration=tiny.calibration(), structure=structure, program=program)
    assert not Manager(ctx).transform(program.copy(), [(structure.sites["block1.attention"], Linear(64))])
    assert "no calibration sample is longer than its window of 64" in ctx.remarks[0].text


@pytest.mark.parametrize("options", [{"window": 1}, {"steps": -1}, {"tokens": 0}, {"learning_rate": 2.0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(BadPlan):
        Linear(**options)
