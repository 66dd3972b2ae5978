"""Latent caches: equal to the module with the products in place, and decoded token for token from what is cached."""

from __future__ import annotations

import dataclasses
from typing import Any

import language_models as zoo
import pytest
import torch
from test_decode import assert_decodes, greedy_by_prefill
from tiny import calibration

from lwcompile.apply import apply_plan
from lwcompile.attention_cost import AttentionCost, pays_from
from lwcompile.choices import offer
from lwcompile.context import Context
from lwcompile.contract import Wanted
from lwcompile.decode import cache_bytes_per_token, derive_decode
from lwcompile.errors import BadPlan, Refused
from lwcompile.folder import ProgramFolder
from lwcompile.generate import generate
from lwcompile.graph import ModelGraph
from lwcompile.manager import Manager
from lwcompile.passes.transform.latent import Latent
from lwcompile.program import Program
from lwcompile.recipe import Recipe
from lwcompile.spec import Spec
from lwcompile.structure import find_structure
from lwcompile.testing import check_pass

pytest.importorskip("transformers", reason="the references are transformers' own modules: install lwcompile[hf]")


def latent(graph: ModelGraph, how: Latent, layers: tuple[int, ...] = (0, 1, 2)) -> tuple[ModelGraph, Context]:
    program = Program({"forward": graph.copy()}, graph.store)
    structure = find_structure(program)
    ctx = Context(structure=structure, program=program)
    steps: list[Any] = [(structure.sites[f"block{i}.attention"], how) for i in layers]
    assert len(Manager(ctx).transform(program, steps)) == len(steps), ctx.remarks
    return program.main, ctx


# --- the function


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_it_equals_the_module_with_the_products_in_place(name, joint):
    graph, model = zoo.captured(name), zoo.build(name)
    edited, _ = latent(graph, Latent(ratio=0.4, joint=joint), (0, 2))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    changed = 0
    try:
        for key, p in model.named_parameters():
            if f"{key}.b" in edited.tensors:
                lower = key.replace("v_proj", "k_proj") if joint else key
                p.data.copy_(edited.tensor(f"{key}.b").double() @ edited.tensor(f"{lower}.a").double())
                changed += 1
        inputs = zoo.batch(3, 13)
        with torch.no_grad():
            wanted = model(**{i.name: inputs[i.name] for i in graph.inputs}, use_cache=False).logits
    finally:
        for key, p in model.named_parameters():
            p.data.copy_(before[key])
    assert changed == 4
    assert zoo.closeness(zoo.run(edited, inputs), wanted, inputs["attention_mask"]) < 1e-5
    assert zoo.closeness(zoo.run(graph, inputs), wanted, inputs["attention_mask"]) > 1e-3


def test_as_many_numbers_as_the_stream_is_wide_lose_nothing():
    """Without grouped queries keys and values are twice as wide as what they are made of: half the cache, and the same model."""
    graph = zoo.captured("opt")
    edited, _ = latent(graph, Latent(rank=32))
    inputs = zoo.batch(3, 13)
    assert zoo.closeness(zoo.run(edited, inputs), zoo.run(graph, inputs), inputs["attention_mask"]) < 1e-5
    assert 2 * cache_bytes_per_token(edited) == cache_bytes_per_token(graph)


# --- decoding


CASES = [("llama", Latent(), (0, 1, 2)), ("llama", Latent(joint=False), (0, 2)), ("qwen3", Latent(rank=20), (1,)),
         ("opt", Latent(rank=32), (0, 1, 2)), ("phi", Latent(), (0, 1))]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "layers"), CASES)
def test_decoding_from_latents_equals_prefill(name, how, layers):
    """Teacher-forced in pieces, and greedily token by token, for one row and for three padded on the left."""
    graph, _ = latent(zoo.captured(name), how, layers)
    assert_decodes(graph, derive_decode(graph), tokens=8)


def test_caches_hold_the_latents_and_the_positions_once():
    graph, ctx = latent(zoo.captured("llama"), Latent(rank=12), (0, 2))
    decode = derive_decode(graph)
    shapes = {i.name: (i.shape, dict(i.dynamic)) for i in decode.inputs[3:]}
    free, past = {0: "batch", 2: "past"}, "past_key_values."
    assert shapes == {
        f"{past}0.latent": ((2, 1, 3, 12), free),
        f"{past}1.key": ((2, 2, 3, 8), free), f"{past}1.value": ((2, 2, 3, 8), free),
        f"{past}2.latent": ((2, 1, 3, 12), free),
        f"{past}position_ids": ((2, 3), {0: "batch", 1: "past"}),
    }  # fmt: skip
    assert decode.outputs == ["logits", *(name.replace("past_key_values", "present") for name in shapes)]
    assert cache_bytes_per_token(graph) == 4 * (12 + 32 + 12)
    assert [r.numbers["cache_per_token"] for r in ctx.remarks] == [48, 48]
    separate, _ = latent(zoo.captured("llama"), Latent(rank=12, joint=False), (0,))
    names = [i.name for i in derive_decode(separate).inputs]
    assert f"{past}0.key" in names and cache_bytes_per_token(separate) == 4 * (12 + 32 + 32)


@pytest.mark.parametrize("without", [("position_ids",), ("position_ids", "attention_mask")])
def test_positions_that_are_counted_are_not_cached(without):
    graph, _ = latent(zoo.captured("llama", without), Latent())
    decode = derive_decode(graph)
    assert not [i for i in decode.inputs if i.name.endswith("past_key_values.position_ids")]


@pytest.mark.parametrize(("how", "layers"), [(Latent(), (0, 1, 2)), (Latent(joint=False), (1,))])
def test_a_file_caches_latents_too(how, layers, tmp_path):
    """The decode graph run by onnxruntime, for one row and for three padded on the left."""
    pytest.importorskip("onnxruntime")
    from lwcompile.backends.onnx.backend import Onnx

    graph, _ = latent(zoo.captured("llama"), how, layers)
    decode = derive_decode(graph)
    backend, path = Onnx(), tmp_path / "model.onnx"
    assert backend.lower(Program({"forward": graph, "decode": decode}, graph.store), path, None).worst < 1e-4
    step = backend.decode_step(path)
    for rows in (1, 3):
        prompt = zoo.batch(rows, 9)
        made = generate(step, prompt["input_ids"], prompt["attention_mask"], max_new_tokens=12)
        assert torch.equal(made, greedy_by_prefill(graph, prompt, 12))
    assert set(backend.speed(path)) == {"prefill_ms", "decode_ms"}


# --- factors, formats, costs


def test_the_factors_are_the_nearest_of_keys_and_values_in_their_own_sizes():
    """At each rank their error is the tail of the spectrum of both weights, each over its size, behind the inputs' moments."""
    import tiny

    program = tiny.llama_program()
    ctx = Context(calibration=calibration(8), program=program, structure=find_structure(program), batch_size=8)
    edited = ctx.edited(program, ["block1.attention"], [Spec.parse("latent{rank=9,importance=0.0}")]).main
    site = ctx.find_structure(program).sites["block1.attention.k_proj"]
    stats = ctx.stats_of(program.main, site, Wanted(0.0))
    assert stats is not None
    lower = torch.linalg.cholesky(stats.hessian.double())
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "kv"]
    whole = [program.main.tensor(name).double() @ lower for name in names]
    made = [edited.tensor(f"{name}.b").double() @ edited.tensor(f"{names[0]}.a").double() @ lower for name in names]
    stacked = torch.cat([w / w.norm() for w in whole])
    error = torch.cat([(w - m) / w.norm() for w, m in zip(whole, made)])
    tail = torch.linalg.svdvals(stacked)[9:].square().sum()
    assert error.square().sum().item() == pytest.approx(tail.item(), rel=1e-4)


def test_a_joint_format_goes_to_every_factor_and_its_bytes_are_as_priced():
    import tiny

    program = tiny.llama_program()
    structure = find_structure(program)
    ctx = Context(calibration=calibration(8), program=program, structure=structure, batch_size=8)
    option = Spec.parse("latent{rank=12} + quantize{bits=4,group_size=16}")
    made = apply_plan(program, {"block1.attention": option.parts}, structure, ctx)
    assert not [r for r in ctx.remarks if r.kind == "refused"]
    stem = "model.layers.1.self_attn."
    codes = {name for name in made.main.tensors if name.startswith(stem) and name.endswith(".codes")}
    wanted = {"k_proj.weight.a", "k_proj.weight.b", "v_proj.weight.b", "q_proj.weight", "o_proj.weight"}
    assert codes == {f"{stem}{name}.codes" for name in wanted}
    offered = offer(program, structure, Recipe.parse(f"options: {{attention: ['{option}']}}"))
    site = structure.sites["block1.attention"]
    stored = sum(map(ProgramFolder().price, offered.stored(program.main, site, option)))
    norm = 4 * program.main.tensor("model.layers.1.input_layernorm.weight").numel()
    assert stored == norm + sum(made.main.store.nbytes(key) for name, key in made.main.tensors.items() if name.startswith(stem))
    derive_decode(made.main)


def test_costs_count_latents_and_what_reviving_takes():
    """SmolLM2's attention: 3 key-value heads of 64, half the cache."""
    old = AttentionCost(9, 3, 64, 64)
    new = dataclasses.replace(old, latent=192, revived=192 * 384)
    assert (old.cache_bytes(100), new.cache_bytes(100)) == (4 * 100 * 384, 4 * 100 * 192)
    assert new.decode_flops(100) - old.decode_flops(100) == 2 * 100 * 192 * 384
    assert pays_from(new.cache_bytes, old.cache_bytes) == 1
    assert pays_from(new.decode_flops, old.decode_flops) is None
    assert new.prefill_flops(7) == old.prefill_flops(7)


# --- refusals


def test_refusals_say_why():
    def reason(name: str, how: Latent) -> str:
        graph = zoo.captured(name)
        structure = find_structure(Program({"forward": graph}, graph.store))
        with pytest.raises(Refused) as caught:
            how.check(graph, structure.sites["block0.attention"])
        return str(caught.value)

    assert "no products of their own" in reason("gpt_neox", Latent())
    assert "is no product of a stored weight with [batch, length, width]" in reason("gpt2", Latent())
    assert "no more than the 6 positions of its window" in reason("mistral", Latent())
    assert "40 numbers a token are more than it takes" in reason("llama", Latent(rank=40))
    bad: dict[str, Any]
    for bad in ({"ratio": 1.0}, {"rank": 1}, {"importance": 2.0}):
        with pytest.raises(BadPlan):
            Latent(**bad)


def test_contract():
    assert any(line.startswith("sites: applied at") for line in check_pass(Latent(rank=8))), check_pass(Latent(rank=8))
