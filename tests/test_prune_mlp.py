"""Pruned MLPs equal the module with those rows and columns deleted; dead neurons cost nothing; scores are the exact derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_drop import build, capture, outputs_differ
from test_real import _in_order, example, real, real_program
from tiny import calibration, ids, llama, llama_program
from torch import nn

from lwcompile.budget import Budget
from lwcompile.choices import build_table, offer
from lwcompile.context import Context
from lwcompile.contract import Damage, Wanted
from lwcompile.data import CalibrationSet
from lwcompile.decode import derive_decode
from lwcompile.errors import Refused
from lwcompile.executor import Executor
from lwcompile.folder import ProgramFolder
from lwcompile.manager import Manager, relative_error
from lwcompile.metric import Kl, sample_labels
from lwcompile.passes.transform._neurons import find_mlp, taylor_scores
from lwcompile.passes.transform.prune_mlp import PruneMlp
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.recipe import Recipe
from lwcompile.registry import make
from lwcompile.session import Session
from lwcompile.spec import Spec
from lwcompile.structure import find_structure
from lwcompile.tracing import capture_module


def known(program: Program, samples: CalibrationSet | None = None) -> Context:
    given = calibration(8) if samples is None else samples
    return Context(calibration=given, metric=Kl(), program=program, structure=find_structure(program), batch_size=8)


def pruned(program: Program, ctx: Context, transform: PruneMlp) -> Program:
    changed = program.copy()
    mlps = ctx.find_structure(program).of_kind("mlp")
    assert len(Manager(ctx).transform(changed, [(site, transform) for site in mlps])) == len(mlps), ctx.remarks
    return changed


def linears_of(name: str, layer: Any) -> tuple[list[nn.Module], nn.Module]:
    """The modules before the neurons and the one behind, by hand."""
    if name == "llama":
        return [layer.mlp.gate_proj, layer.mlp.up_proj], layer.mlp.down_proj
    if name == "gpt2":
        return [layer.mlp.c_fc], layer.mlp.c_proj
    if name == "bert":
        return [layer.intermediate.dense], layer.output.dense
    if name == "dinov2":
        return [layer.mlp.fc1], layer.mlp.fc2
    assert name == "t5"
    return [layer.layer[1].DenseReluDense.wi], layer.layer[1].DenseReluDense.wo


def delete(name: str, ups: list[nn.Module], down: nn.Module, kept: torch.Tensor, matrix: torch.Tensor | None) -> None:
    transposed = name == "gpt2"  # its Conv1D stores [in, out]
    for module in [*ups, down]:
        weight: Any = module.weight
        data = weight.data.T if transposed else weight.data
        data = data[:, kept] if module is down else data[kept]
        if module is down and matrix is not None:
            data = matrix
        module.weight = nn.Parameter((data.T if transposed else data).contiguous())
        if module is not down and getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(module.bias.data[kept])  # type: ignore[index]
        if transposed:
            module.nf = module.weight.shape[1]  # type: ignore[assignment]


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "dinov2", "t5"])
def test_pruning_equals_the_module_with_rows_and_columns_deleted(name: str, compensate: bool) -> None:
    model, example, layers = build(name)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    program = capture(model.eval(), example)
    data = {k: v for k, v in example.items() if isinstance(v, torch.Tensor)}
    ctx = Context(calibration=CalibrationSet(data, "text", "x"), program=program, structure=find_structure(program))
    changed = pruned(program, ctx, PruneMlp(0.3, "energy", compensate))
    for site, layer in zip(ctx.find_structure(program).of_kind("mlp"), layers):
        ups, down = linears_of(name, layer)
        mlp = find_mlp(program.main, site)
        old, new = (g.tensor(str(mlp.ups[0].args[1].target)) for g in (program.main, changed.main))  # type: ignore[union-attr]
        assert new.shape == ({64: 48, 128: 96}[len(old)], 32)  # less 30 %, up to a multiple of 8
        kept = torch.tensor([int((old == row).all(1).nonzero()[0]) for row in new])
        matrix = changed.main.tensor(str(mlp.down.args[1].target)) if compensate else None  # type: ignore[union-attr]
        delete(name, ups, down, kept, matrix)
    with torch.no_grad():
        wanted = model(**example)[program.main.outputs[0]]
    found = changed.main.module()(*[example[i.name] for i in program.main.inputs])[0]
    assert relative_error(wanted, found) < 1e-5
    assert changed.parameter_count() < program.parameter_count()


@pytest.mark.parametrize("score", ["taylor", "energy"])
def test_neurons_that_are_zero_cost_nothing(score: Any) -> None:
    program = llama_program()
    for site in find_structure(program).of_kind("mlp"):
        name = str(find_mlp(program.main, site).ups[0].args[1].target)  # type: ignore[union-attr]
        weight = program.main.tensor(name).clone()
        weight[torch.randperm(64, generator=torch.Generator().manual_seed(len(site.id)))[:24]] = 0
        program.main.set_tensor(name, weight)
    changed = pruned(program, known(program), PruneMlp(0.375, score))
    a, b = (Executor(p).run({"input_ids": ids(3, 11)})["logits"] for p in (program, changed))
    assert relative_error(a, b) < 1e-5
    assert find_structure(changed).sites["block1.mlp.down_proj"].shape == (32, 40)


def test_scores_are_the_derivative_of_the_modules_own_likelihood() -> None:
    model: Any = llama(tied=False)
    program = llama_program(tied=False)
    ctx, seen = known(program), []
    site = find_structure(program).sites["block1.mlp"]
    scores = taylor_scores(program, {"x": ("forward", find_mlp(program.main, site).neurons.name)}, ctx)["x"]

    def watch(_: object, given: tuple[torch.Tensor]) -> None:
        given[0].retain_grad()
        seen.append(given[0])

    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(watch)
    log_p = model.requires_grad_()(input_ids=ctx.need_calibration().samples["input_ids"]).logits.flatten(0, 1).log_softmax(-1)
    log_p.gather(1, sample_labels(log_p.detach(), torch.Generator().manual_seed(0))).sum().backward()
    handle.remove()
    wanted = (seen[0].grad * seen[0]).sum(1).square().sum(0).double()
    torch.testing.assert_close(scores, wanted.detach(), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("score", ["taylor", "energy"])
def test_the_refit_lowers_the_damage_on_other_tokens(score: Any) -> None:
    program, other = llama_program(), dict(calibration(32, 12, seed=99).samples)
    ctx, dense = known(program, calibration(64)), Executor(program).run(other)
    harm = []
    for compensate in (True, False):
        low = Executor(pruned(program, ctx, PruneMlp(0.5, score, compensate))).run(other)
        harm.append(Kl().compare(dense, low, {}).mean().item())
    assert harm[0] < 0.9 * harm[1]


def test_what_is_no_plain_mlp_is_refused() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            gate, up = self.up(x).chunk(2, -1)
            return x + self.down(torch.nn.functional.silu(gate) * up)

    graph, _ = capture_module(Fused(), {"x": torch.randn(2, 8)}, {"x": {0: "batch"}})
    site = find_structure(Program({"forward": graph}, graph.store)).sites["block0.mlp"]
    with pytest.raises(Refused, match="no elementwise function of linears"):
        PruneMlp().check(graph, site)


def test_pruned_and_quantized_in_one_plan(tmp_path) -> None:
    joint = Spec.parse("prune_mlp{ratio=0.5} + quantize{bits=4,group_size=16}")
    recipe = Recipe.parse(
        f"""
analyses: [measured]
options: {{mlp: [prune_mlp, "{joint}", drop], linear: ["quantize{{bits=[4,8],group_size=16}}"]}}
allocator: integer_program
budget: {{avg_bits: 12}}
calibration: {{dataset: random, samples: 8, seqlen: 12}}
evaluation: {{dataset: random, samples: 4, seqlen: 12}}
"""
    )
    run = Session(llama_program(), recipe, tmp_path)
    dense = run.table.evaluate({}).bytes
    assert not [c.refused for s in ("block0.mlp", "block2.mlp") for c in run.table.sites[s].choices if c.refused]
    for option, label in ((Spec("prune_mlp"), "pruned"), (joint, "pruned and quantized")):
        choices = {"block1.mlp": option.parts, "block0.mlp.up_proj": (), "block2.attention.o_proj": ()}
        found = run.table.evaluate(choices)
        compressed = run.compress(Plan(choices))
        assert found.dropped == () and not [r for r in run.context.remarks if r.kind == "refused"]
        assert dense - found.bytes == run.dense.main.nbytes() - compressed.main.nbytes(), label
        derive_decode(compressed.main)
    pytest.importorskip("onnxruntime")
    parity = make("backends", Spec.parse("onnx{activations=float32}")).lower(compressed, tmp_path / "model.onnx", run.context)
    assert parity.worst < 1e-4


def test_solvers_know_what_the_kept_neurons_put_out() -> None:
    """Statistics derived from the dense model's are those of running the pruned one, where nothing before it changed."""
    program = llama_program()
    ctx = known(program)
    site = find_structure(program).sites["block0.mlp"]
    option = PruneMlp(0.5, compensate=False)
    changed = ctx.edited(program, [site.id], [option.spec()])
    down = option.children(program.main, site)[-1]
    derived = ctx.stats_of(changed.main, down, Wanted(0.5))
    direct = ctx.input_stats(changed, [down], importance=0.5)[down.id]
    assert derived is not None
    torch.testing.assert_close(derived.hessian, direct.hessian, rtol=1e-4, atol=1e-5)


def test_pruning_the_real_model_equals_the_module_with_rows_and_columns_deleted() -> None:
    program, source = real_program("smollm2"), real("smollm2")
    model = source.model
    site = find_structure(program).sites["block7.mlp"]
    changed = program.copy()
    ctx = Context(program=program, structure=find_structure(program))
    assert Manager(ctx).transform(changed, [(site, PruneMlp(0.5, "energy"))])
    old, new = (g.tensor("model.layers.7.mlp.up_proj.weight") for g in (program.main, changed.main))
    energy = program.main.tensor("model.layers.7.mlp.down_proj.weight").square().sum(0)
    kept = energy.argsort(descending=True)[:768].sort().values
    assert torch.equal(new, old[kept])
    given = _in_order(changed, {**example(source), "use_cache": False})
    delete("llama", *linears_of("llama", model.model.layers[7]), kept, None)  # type: ignore[union-attr,index]
    assert outputs_differ(changed, model, given) < 1e-5  # type: ignore[arg-type]
    assert outputs_differ(program, model, given) > 1e-4  # type: ignore[arg-type]


def test_the_integer_program_beats_the_largest_ratio_within_a_tolerance():
    """AMP (arXiv 2603.08100) takes the largest ratio whose damage stays within a tolerance, MLP by MLP; the plan of the same damage
    is no larger."""
    generator = torch.Generator().manual_seed(0)
    ratios, tolerance = [0.125, 0.25, 0.5, 0.75], 0.05
    program = llama_program()
    structure = find_structure(program)
    made = offer(program, structure, Recipe.parse(f"options: {{mlp: ['prune_mlp{{ratio={ratios}}}']}}"))
    steps = {id: torch.rand(len(ratios), generator=generator).cumsum(0) * 0.03 for id in made.options}
    damages = {id: dict(zip(specs, map(Damage, steps[id].tolist()))) for id, specs in made.options.items()}
    table = build_table(program, structure, made, damages, ProgramFolder(), "nats/token")
    bisected = {id: [s.parts for s, d in row.items() if d.value <= tolerance][-1:] for id, row in damages.items()}
    by_hand = table.evaluate({id: found[0] for id, found in bisected.items() if found})
    assert by_hand.damage > 0
    plan = make("allocators", Spec("integer_program")).allocate(table, Budget(max_damage=by_hand.damage))
    chosen = table.evaluate(plan.choices)
    assert chosen.bytes <= by_hand.bytes and chosen.damage <= by_hand.damage + 1e-9
