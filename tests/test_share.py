"""Sharing equals the nn.Module whose weights were copied by hand, stores less wherever it is written, and is priced at every use."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_drop import build, capture, outputs_differ
from tiny import llama_program
from torch import nn

from lwcompile.apply import SequentialPrefix, apply_plan, places
from lwcompile.choices import Damages, build_table, offer
from lwcompile.context import Context
from lwcompile.contract import Damage, TransformPass, Wanted, configure
from lwcompile.decode import derive_decode
from lwcompile.errors import BadPlan, Refused
from lwcompile.executor import Executor
from lwcompile.folder import ProgramFolder
from lwcompile.manager import Manager, relative_error
from lwcompile.passes.transform.share import Share
from lwcompile.program import Program
from lwcompile.recipe import Recipe
from lwcompile.spec import Spec
from lwcompile.structure import find_structure
from lwcompile.testing import check_pass

PARTS = {
    "llama": ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
    "qwen3": ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
    "gpt2": ("attn", "mlp", "ln_1", "ln_2"),
    "gpt_neox": ("attention", "mlp", "input_layernorm", "post_attention_layernorm"),
    "bert": ("attention.self attention.output.dense", "intermediate output.dense", "attention.output.LayerNorm", "output.LayerNorm"),
    "vit": ("attention", "mlp", "layernorm_before", "layernorm_after"),
    "dinov2": ("attention", "mlp", "norm1 layer_scale1", "norm2 layer_scale2"),
    "t5": ("layer.0.SelfAttention", "layer.1.DenseReluDense", "layer.0.layer_norm", "layer.1.layer_norm"),
}  # fmt: skip
WORDS = {"block": (0, 1, 2, 3), "attention": (0, 2), "mlp": (1, 3)}


@cache
def captured(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any], Program]:
    model, example, _ = shaken(name)
    return model, example, capture(model.to(dtype), example)


def shaken(name: str) -> tuple[Any, dict[str, Any], nn.ModuleList]:
    """A model whose norms, layer scales and biases differ from layer to layer, as trained ones do."""
    model, example, layers = build(name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layers.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(4)
    return model.eval(), example, layers


def copy_by_hand(name: str, layers: nn.ModuleList, kind: str, into: int, source: int, norms: str) -> None:
    """Copy what multiplies, or with norms everything, from one layer into another."""
    for part in WORDS[kind]:
        for path in PARTS[name][part].split():
            mine, theirs = (layers[i].get_submodule(path) for i in (into, source))
            for sub, module in mine.named_modules():
                other = dict(theirs.named_modules())[sub]
                parameters = dict(module.named_parameters(recurse=False))
                matrix = any(p.ndim > 1 for p in parameters.values())
                for key, value in parameters.items():
                    if matrix or norms == "source":
                        value.data = getattr(other, key).data.clone()


def share(program: Program, *steps: tuple[str, TransformPass]) -> Program:
    structure = find_structure(program)
    ctx, shared = Context(structure=structure, program=program), program.copy()
    done = Manager(ctx).transform(shared, [(structure.sites[id], how) for id, how in steps])
    assert len(done) == len(steps), ctx.remarks
    return shared


# --- the function


@pytest.mark.parametrize("norms", ["own", "source"])
@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("name", PARTS)
def test_sharing_equals_the_module_copied_by_hand(name: str, kind: str, norms: Any) -> None:
    model, example, program = captured(name)
    model = copy.deepcopy(model)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    shared = share(program, ("block2" if kind == "block" else f"block2.{kind}", Share(-1, norms)))
    copy_by_hand(name, layers, kind, 2, 1, norms)
    assert outputs_differ(shared, model, example) < 1e-5
    assert outputs_differ(program, model, example) > 1e-3, "the copy changed nothing, so the test shows nothing"
    assert shared.parameter_count() < program.parameter_count()


def test_sources_are_named_or_counted() -> None:
    program = tiny.llama_program(layers=3)
    for counted, named in ((-2, "block0"), (-1, "block1")):
        assert share(program, ("block2", Share(counted))).digest() == share(program, ("block2", Share(named))).digest()
    ahead = share(program, ("block0.mlp", Share(1)))
    assert ahead.main.tensors["model.layers.0.mlp.up_proj.weight"] == program.main.tensors["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("llama", torch.float32, 1e-5), ("gpt2", torch.float32, 1e-5), ("bert", torch.float32, 1e-5), ("gpt2", torch.float64, 1e-9)],
)
def test_the_whole_residual_gives_the_model_back(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, example, program = captured(name, dtype)
    relaxed = share(program, *((f"block{i}", Share(-2, rank=10**6)) for i in (2, 3)))
    assert outputs_differ(relaxed, model, example) < tolerance
    assert relaxed.main.tensors != program.main.tensors


def test_a_residual_is_the_nearest_of_its_rank() -> None:
    program = tiny.llama_program(layers=2)
    relaxed = share(program, ("block1", Share(rank=5))).main
    name = "model.layers.1.mlp.gate_proj.weight"
    own, source = (program.main.tensor(name.replace("1", layer, 1)) for layer in "10")
    found = relaxed.tensor(f"{name}_up") @ relaxed.tensor(f"{name}_down")
    u, s, vh = torch.linalg.svd((own - source).double())
    assert relative_error((u[:, :5] * s[:5] @ vh[:5]), found.double()) < 1e-5
    errors = [outputs_of(share(program, ("block1", Share(rank=r))), program) for r in (0, 4, 16, 32)]
    assert errors[-1] < 1e-5 < min(errors[:-1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "dinov2"])
def test_a_group_computes_with_its_mean_and_norms_of_its_own(name: str) -> None:
    model, example, program = captured(name)
    model = copy.deepcopy(model)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    shared = share(program, *((f"block{i}", Share(1 - i, mean=True)) for i in (2, 3)))
    members = [layers[i] for i in (1, 2, 3)]
    for part in PARTS[name][0].split() + PARTS[name][1].split():
        for sub, module in members[0].get_submodule(part).named_modules():
            theirs = [dict(m.get_submodule(part).named_modules())[sub] for m in members]
            parameters = dict(module.named_parameters(recurse=False))
            for key in parameters if any(p.ndim > 1 for p in parameters.values()) else ():
                mean = torch.stack([getattr(m, key).data.double() for m in theirs]).mean(0)
                for m in theirs:
                    getattr(m, key).data = mean.to(parameters[key].dtype)
    assert outputs_differ(shared, model, example) < 1e-5
    assert outputs_differ(program, model, example) > 1e-3, "the mean changed nothing, so the test shows nothing"
    first = share(program, *((f"block{i}", Share(1 - i)) for i in (2, 3)))
    assert shared.nbytes() == first.nbytes() < program.nbytes()


def test_sharing_a_block_with_itself_is_exact() -> None:
    """Of blocks that the store tells apart by the last bit alone, one entry is left, and the function is what it was."""
    program = tiny.llama_program(layers=2)
    twins = [n for n in program.main.tensors if "layers.1." in n and program.main.tensor(n).ndim == 2]
    for name in twins:
        twin = program.main.tensor(name.replace("layers.1.", "layers.0."))
        program.main.set_tensor(name, torch.nextafter(twin, torch.full_like(twin, torch.inf)))
    for how in (Share(), Share(mean=True), Share("block0", rank=1)):
        shared = share(program, ("block1", how))
        assert outputs_of(shared, program) < 1e-5
        assert all(shared.main.tensors[n] == shared.main.tensors[n.replace("s.1.", "s.0.")] for n in twins)
    assert share(program, ("block1", Share())).nbytes() == program.nbytes() - sum(program.main.tensor(n).nbytes for n in twins)
    with pytest.raises(Refused, match="reads what block0 reads already"):
        Share().needs(share(program, ("block1", Share())).main, find_structure(program).sites["block1"], find_structure(program))


def outputs_of(changed: Program, program: Program) -> float:
    return relative_error(Executor(program).run({"input_ids": tiny.ids()})["logits"],
                          Executor(changed).run({"input_ids": tiny.ids()})["logits"])  # fmt: skip


def test_a_recursive_model_is_a_plan() -> None:
    """Four blocks as two, run twice: the same as the module whose list of layers holds each twice."""
    model = copy.deepcopy(tiny.llama(layers=4))
    program = tiny.llama_program(layers=4)
    looped = share(program, *((f"block{i}", Share(-2, "source")) for i in (2, 3)))
    layers: Any = model.model.layers  # type: ignore[union-attr]
    layers[2], layers[3] = layers[0], layers[1]
    with torch.no_grad():
        wanted = model(input_ids=tiny.ids(), use_cache=False).logits
    assert relative_error(wanted, Executor(looped).run({"input_ids": tiny.ids()})["logits"]) < 1e-5


def test_shared_layers_decode_with_caches_of_their_own() -> None:
    import language_models as zoo
    from test_decode import assert_decodes

    graph = zoo.captured(zoo.NAMES[0])
    program = Program({"forward": graph}, graph.store)
    for how in (Share(), Share(norms="source", rank=3)):
        shared = share(program, ("block1", how))
        decode = derive_decode(shared.main)
        assert len([i for i in decode.inputs if i.name.startswith("past")]) == len(
            [i for i in derive_decode(graph).inputs if i.name.startswith("past")]
        )
        assert_decodes(shared.main, decode, tokens=16)


# --- refusals


def test_refusals_say_why() -> None:
    program = tiny.llama_program(layers=3)
    structure = find_structure(program)

    def reason(id: str, how: Share) -> str:
        with pytest.raises(Refused) as caught:
            how.needs(program.main, structure.sites[id], structure)
        return str(caught.value)

    assert "block0: there is no block 1 before it" in reason("block0", Share())
    assert "'block7' is no other block" in reason("block0", Share("block7"))
    assert "'block1.mlp' is no other block" in reason("block0", Share("block1.mlp"))
    assert "'block1' is no other block" in reason("block1", Share("block1"))
    for refused in ("share{source=0}", "share{mean=true,rank=2}", "share{mean=true,norms=source}"):
        with pytest.raises(BadPlan):
            configure(Share, Spec.parse(refused))
    wide = program.copy()
    for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
        name = f"model.layers.1.mlp.{part}_proj.weight"
        wide.main.set_tensor(name, wide.main.tensor(name).narrow(dim, 0, 48))
    wide.main.propagate()
    wider = find_structure(wide)
    with pytest.raises(Refused, match=r"layers\.1\.mlp.* is \[48, 32\], and .* is \[64, 32\]"):
        Share().needs(wide.main, wider.sites["block1"], wider)
    # a source that stays may still be shared by another block; what others read may not go
    with pytest.raises(Refused, match="is also read by"):
        first = share(program, ("block2", Share()))
        Share().apply(first.main, structure.sites["block1"], Context(structure=structure))
    with pytest.raises(Refused, match="reads what block1 reads already"):
        Share().apply(share(program, ("block2", Share())).main, structure.sites["block2"], Context(structure=structure))


@pytest.mark.parametrize("how", [Share(), Share(rank=4, norms="source"), Share(mean=True)])
def test_the_contract(how: Share) -> None:
    report = check_pass(how)
    assert "sites: applied at 9 in all" in report
    assert "refused at decoder:block0: there is no block 1 before it to share with" in report


# --- what it stores and costs


def priced(program: Program, recipe: Recipe, damage: float = 0.1) -> tuple[Any, Any]:
    """The table of a recipe's options, each with a damage of its own, and the offer behind it."""
    structure = find_structure(program)
    made = offer(program, structure, recipe)
    found: Damages = {id: {s: Damage(damage + 0.01 * k) for k, s in enumerate(specs)} for id, specs in made.options.items()}
    return build_table(program, structure, made, found, ProgramFolder(), "nats/token"), made


FOUR = Spec.parse("quantize{bits=4,group_size=32,solver=rtn}")
RECIPE = Recipe.parse(f"""
options:
  linear: ["{FOUR}", "quantize{{bits=8,group_size=32,solver=rtn}}"]
  block: ["share{{source=[-1,-2]}}", "share{{source=-1,norms=source,rank=4}}", drop]
  mlp: [share, drop]
""")


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("option", ["share", "share{source=-1,norms=source,rank=1}", "share{source=-1,mean=true}"])
def test_bytes_are_predicted_and_really_saved(option: str, quantized: bool, tmp_path: Path) -> None:
    program = tiny.llama_program(layers=3)
    recipe = RECIPE.with_(options={**RECIPE.options, "block": [Spec.parse(option)]})
    table, _ = priced(program, recipe)
    numeric = {id: (FOUR,) for id, row in table.sites.items() if row.kind == "linear" and "block" in id and quantized}
    chosen = {**numeric, "block2": (Spec.parse(option),)}
    ctx = Context(structure=find_structure(program), program=program, calibration=tiny.calibration())
    made = {}
    for name, choices in (("plain", numeric), ("shared", chosen)):
        if name == "shared":
            choices = {id: o for id, o in choices.items() if not id.startswith("block2.")}
        compressed = apply_plan(program, choices, find_structure(program), dataclasses.replace(ctx, memo={}, stats={}))
        compressed.save(tmp_path / name)
        made[name] = compressed, (tmp_path / name / "weights.safetensors").stat().st_size
    saved = made["plain"][0].nbytes() - made["shared"][0].nbytes()
    assert saved == table.evaluate(numeric).bytes - table.evaluate(chosen).bytes > 0
    assert abs(made["plain"][1] - made["shared"][1] - saved) < 4000  # names and offsets in the header
    onnx = pytest.importorskip("lwcompile.backends.onnx.backend", reason="install lwcompile[onnx]")
    load = pytest.importorskip("onnx").load
    sizes, files = [], []
    for name in made:
        compressed = made[name][0]
        parity = onnx.Onnx().lower(compressed, tmp_path / name / "model.onnx", dataclasses.replace(ctx, program=compressed))
        assert parity.worst < 2e-5
        files.append(sum(f.stat().st_size for f in (tmp_path / name).glob("model.onnx*")))
        stored = load(tmp_path / name / "model.onnx").graph.initializer
        sizes.append(sum(len(t.raw_data) for t in stored if len(t.dims) > 1))  # of so small a model the nodes are half the file
    assert sizes[0] - sizes[1] > 0.7 * saved and files[1] < files[0]


def test_a_shared_weight_is_quantized_once_for_all_its_uses() -> None:
    program = tiny.llama_program(layers=3)
    structure = find_structure(program)
    ctx = Context(structure=structure, program=program, calibration=tiny.calibration())
    plan = {"block2": (Spec("share"),), "block1.mlp.up_proj": (FOUR,), "block1.mlp.gate_proj": (FOUR,)}
    graph = apply_plan(program, plan, structure, ctx).main
    codes = [n for n in graph.nodes if n.op == "get_attr" and str(n.target).endswith("up_proj.weight.codes")]
    assert len({graph.tensors[str(n.target)] for n in codes}) == 1 and len(codes) == 2
    by_hand = share(program, ("block2", Share()))
    for site in ("gate", "up"):
        name = f"model.layers.1.mlp.{site}_proj.weight"
        dequantized = graph.folded().tensor(f"{name}.codes.dense")
        for layer in (1, 2):
            by_hand.main.set_tensor(f"model.layers.{layer}.mlp.{site}_proj.weight", dequantized)
    inputs = {"input_ids": tiny.ids()}
    assert relative_error(Executor(by_hand).run(inputs)["logits"], Executor(graph).run(inputs)["logits"]) < 1e-6


@pytest.mark.parametrize("offset", [-1, 1])
def test_solvers_know_the_inputs_of_every_use(offset: int) -> None:
    program = tiny.llama_program(layers=3)
    shared = share(program, ("block1", Share(offset)))
    structure = find_structure(program)
    ctx = Context(structure=structure, program=program, calibration=tiny.calibration())
    source = structure.sites[f"block{1 + offset}.mlp.down_proj"]
    own = structure.sites["block1.mlp.down_proj"]
    assert {s.id for s in places(shared, structure)[source.id]} == {source.id, own.id}
    stats = SequentialPrefix(shared, ctx, []).stats(source, Wanted())
    executor = Executor(shared)
    watched = [executor.input_of(executor.key(site)) for site in (source, own)]
    seen = executor.run(next(iter(tiny.calibration().batches(8, ["input_ids"]))), watch=watched)
    x = torch.cat([seen[key].reshape(-1, 64) for key in watched]).double()
    assert stats is not None and stats.tokens == len(x)
    assert relative_error(2 * x.T @ x / len(x), stats.hessian.double()) < 1e-5


def test_what_a_shared_weight_carries_does_its_damage_twice() -> None:
    table, made = priced(tiny.llama_program(layers=3), RECIPE)
    near, far, relaxed = (Spec.parse(f"share{{{a}}}") for a in ("source=-1", "source=-2", "source=-1,norms=source,rank=4"))
    assert "no block 2 before it" in made.refused["block1", far].replace("there is ", "")
    assert all(table.sites["block2"].choice((s,)).replaces for s in (near, far, relaxed))
    up = {f"block{i}.mlp.up_proj": (FOUR,) for i in (0, 1)} | {f"block{i}.mlp.gate_proj": (FOUR,) for i in (0, 1)}
    alone = table.evaluate(up).damage
    for option, source in ((near, 1), (far, 0)):
        there = sum(table.sites[f"block2.mlp.{w}_proj"].choice((FOUR,)).damage for w in ("up", "gate"))
        found = table.evaluate({**up, "block2": (option,)})
        assert found.damage == pytest.approx(alone + table.sites["block2"].choice((option,)).damage + there), source
        assert found.dropped == ()
    for taken in (
        {"block1": (Spec("drop"),)},
        {"block1.mlp": (Spec("drop"),)},
        {"block1": (near,)},
        {"block1.mlp": (Spec("share"),)},
    ):
        assert any("conflict" in v.message for v in table.violations({"block2": (near,), **taken})), taken
        assert not table.violations({"block2": (far,), **taken})
    assert type(table).from_json(table.to_json()) == table


# --- a trained model


def test_sharing_equals_the_trained_module_copied_by_hand() -> None:
    """SmolLM2: a block with its own norms, an MLP re-used with its norm, a whole residual."""
    from test_real import _in_order, example, real, real_program

    source, program = real("smollm2"), real_program("smollm2")
    assert isinstance(source.model, nn.Module)
    inputs = _in_order(program, {**example(source), "use_cache": False})
    steps = (("block12", Share()), ("block20.mlp", Share(-1, "source")))
    shared = share(program, *steps)
    relaxed = share(program, ("block12", Share(rank=10**6)))
    values = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    assert relative_error(Executor(program).run(values)["logits"], Executor(relaxed).run(values)["logits"]) < 1e-5
    layers: Any = source.model.model.layers  # type: ignore[union-attr]
    for kind, into, norms in (("block", 12, "own"), ("mlp", 20, "source")):
        copy_by_hand("llama", layers, kind, into, into - 1, norms)
    assert outputs_differ(shared, source.model, inputs) < 1e-5
    assert outputs_differ(program, source.model, inputs) > 1e-2
    block = sum(p.numel() for n, p in layers[12].named_parameters() if p.ndim > 1)
    mlp = sum(p.numel() for p in (*layers[20].mlp.parameters(), *layers[20].post_attention_layernorm.parameters()))
    assert program.parameter_count() - shared.parameter_count() == block + mlp


def test_packed_weights_have_no_residual_of_low_rank():
    program = llama_program()
    structure = find_structure(program)
    four = (Spec.parse("quantize{bits=4,group_size=16,solver=rtn}"),)
    linears = {s.id: four for s in structure.of_kind("linear") if s.id.startswith("block")}
    packed = apply_plan(program, linears, structure, Context(structure=structure, program=program))
    with pytest.raises(Refused, match="is packed"):
        Share(rank=4).needs(packed.main, structure.sites["block1"], structure)
    assert Share().needs(packed.main, structure.sites["block1"], structure).shared is not None
