"""Low-rank factors against the whitened SVD in float64, the model itself at full rank, and what a joint option must add up to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import calibration, ids, llama, llama_program

from lwcompile.apply import apply_plan
from lwcompile.budget import Budget
from lwcompile.choices import build_table, offer
from lwcompile.context import Context
from lwcompile.contract import Wanted
from lwcompile.decode import derive_decode
from lwcompile.errors import BadPlan, Refused
from lwcompile.executor import Executor
from lwcompile.folder import ProgramFolder
from lwcompile.formats import NumericFormat
from lwcompile.manager import Manager, relative_error
from lwcompile.metric import Kl
from lwcompile.passes.transform._factors import effective_rank, principal
from lwcompile.passes.transform.low_rank import LowRank
from lwcompile.passes.transform.quantize import FACTORS, Quantize
from lwcompile.program import Program
from lwcompile.recipe import Recipe
from lwcompile.registry import make
from lwcompile.session import Session
from lwcompile.spec import Spec
from lwcompile.structure import find_structure
from lwcompile.testing import check_pass
from lwcompile.tiny import programs

JOINT = Spec.parse("low_rank{rank=8} + quantize{bits=4,group_size=16}")


def known(program: Program) -> Context:
    return Context(calibration=calibration(8), metric=Kl(), program=program, structure=find_structure(program), batch_size=8)


def logits(program: Program) -> torch.Tensor:
    return Executor(program).run({"input_ids": ids(3, 11)})["logits"].detach()


def moments(width: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(400, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * torch.logspace(0, -2, width)).T @ x


@pytest.mark.parametrize("shape", [(20, 33), (33, 20)])
def test_factors_are_the_whitened_svd(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = moments(shape[1])
    h = h @ h.T + torch.eye(len(h), dtype=torch.float64)
    lower = torch.linalg.cholesky(h)
    u, s, vt = torch.linalg.svd(weight @ lower, full_matrices=False)
    wanted = torch.linalg.solve_triangular(lower, (u[:, :7] * s[:7]) @ vt[:7], upper=False, left=False)
    b, a = principal(weight, 7, h)
    torch.testing.assert_close(b @ a, wanted, rtol=1e-8, atol=1e-9 * wanted.abs().max().item())
    b, a = principal(weight, min(shape), h)
    torch.testing.assert_close(b @ a, weight, rtol=1e-9, atol=1e-9)


def test_full_rank_is_the_model_itself():
    program = llama_program()
    ctx, whole = known(program), program.copy()
    for site in ctx.find_structure(program).of_kind("linear"):
        if site.id != "head":
            LowRank(rank=min(site.shape)).apply(whole.main, site, ctx)
    assert relative_error(logits(program), logits(whole)) < 1e-5


def test_it_equals_the_module_with_the_products_in_place():
    """W replaced by B A in the module, for every linear of a block."""
    model: Any = llama(tied=False)
    program = llama_program(tied=False)
    ctx = known(program)
    sites = [s for s in ctx.find_structure(program).of_kind("linear") if s.id.startswith("block1.")]
    changed = program.copy()
    done = Manager(ctx).transform(changed, [(site, LowRank(ratio=0.7)) for site in sites])
    assert len(done) == 7
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        for site in sites:
            graph, weight = changed.main, str(site.weight)
            product = graph.tensor(f"{weight}.b").double() @ graph.tensor(f"{weight}.a").double()
            dict(model.named_parameters())[weight].data.copy_(product)
        with torch.no_grad():
            wanted = model(input_ids=ids(3, 11)).logits
    finally:
        for name, p in model.named_parameters():
            p.data.copy_(before[name])
    assert relative_error(wanted, logits(changed)) < 1e-5
    assert changed.parameter_count() < program.parameter_count()
    stored = sum(t.shape[0] * t.shape[1] for s in sites for t in LowRank(ratio=0.7).stored(program.main, s))
    removed = sum(s.shape[0] * s.shape[1] for s in sites)
    assert program.parameter_count() - changed.parameter_count() == removed - stored


def test_samples_lower_the_damage():
    program = llama_program()
    ctx, blind = known(program), Context(program=program, structure=find_structure(program))
    sites = [s for s in find_structure(program).of_kind("linear") if s.id != "head"]
    harm = []
    for given in (ctx, blind):
        changed = program.copy()
        Manager(given).transform(changed, [(site, LowRank(ratio=0.8)) for site in sites])
        dense, low = (Executor(p).run(dict(calibration(8).samples)) for p in (program, changed))
        harm.append(Kl().compare(dense, low, {}).mean().item())
    assert harm[0] < harm[1]


def test_ranks():
    program = llama_program()
    site = find_structure(program).sites["block0.mlp.up_proj"]
    assert [t.shape for t in LowRank(rank=5).stored(program.main, site)] == [(5, 32), (64, 5)]
    assert next(t.shape[0] for t in LowRank().stored(program.main, site)) == 10  # 0.5 * 64 * 32 / 96
    effective = effective_rank(program.main, str(site.weight))
    share = torch.linalg.svdvals(program.main.tensor(str(site.weight)).double()).square()
    share /= share.sum()
    assert effective == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=1e-9)
    assert LowRank(effective=0.5).stored(program.main, site)[0].shape == (round(0.5 * effective), 32)
    held = LowRank(energy=0.9).stored(program.main, site)[0].shape[0]
    assert share[:held].sum() >= 0.9 > share[: held - 1].sum()
    with pytest.raises(Refused, match="would hold"):
        LowRank(energy=1.0).check(program.main, site)
    with pytest.raises(Refused, match=r"would hold 2112 numbers, and the weight 2048"):
        LowRank(rank=22).check(program.main, site)
    with pytest.raises(Refused, match="also read by"):
        LowRank(rank=4).check(program.main, find_structure(program).sites["head"])
    bad: dict[str, Any]
    for bad in (
        {"rank": 0},
        {"ratio": 1.5},
        {"rank": 3, "effective": 1.0},
        {"rank": 3, "energy": 0.9},
        {"energy": 2.0},
        {"importance": 2.0},
    ):
        with pytest.raises(BadPlan):
            LowRank(**bad)


# --- joint with a numeric format


def test_a_joint_option_reads_back_and_expands():
    text = "low_rank{rank=[4,8]} + quantize{bits=[3,4]}"
    assert str(Spec.parse(text)) == text
    grid = Spec.parse(text).expand()
    assert len(grid) == 4 and str(grid[1]) == "low_rank{rank=4} + quantize{bits=4}"
    with pytest.raises(BadPlan, match="joins 2 passes"):
        make("passes", JOINT)


def test_a_joint_option_is_priced_scored_chosen_and_applied(tmp_path):
    recipe = Recipe.parse(
        """
analyses: [measured]
options: {mlp: [], linear: ["quantize{bits=[4,8],group_size=16}", "low_rank{rank=8} + quantize{bits=4,group_size=16}"]}
allocator: integer_program
budget: {avg_bits: 12}
calibration: {dataset: random, samples: 8, seqlen: 12}
evaluation: {dataset: random, samples: 4, seqlen: 12}
"""
    )
    run = Session(llama_program(), recipe, tmp_path)
    row = run.table.sites["block0.mlp.up_proj"]
    joint = row.choice(JOINT.parts)
    four = NumericFormat(4, 16)
    assert joint.bytes == four.stored_bytes((8, 32)) + four.stored_bytes((64, 8))
    assert joint.bytes < row.choice(Spec.parse("quantize{bits=4,group_size=16}").parts).bytes
    assert joint.damage > 0 and joint.structural == JOINT.parts[0]
    small = run.plan(Budget(max_damage=math.inf))  # the smallest
    assert JOINT.parts in small.choices.values()
    compressed = run.compress(small)
    assert not [r for r in run.context.remarks if r.kind == "refused" and "also read by" not in r.text]
    graph = compressed.main
    for site, options in small.choices.items():
        weight = str(run.structure.sites[site].weight)
        if options == JOINT.parts:
            assert {f"{weight}.a.codes", f"{weight}.b.codes"} <= graph.tensors.keys() and weight not in graph.tensors
    assert graph.nbytes() == sum(run.table.price([s], o) for s, o in small.choices.items()) + _kept(run, small)
    assert run.measure(compressed)["damage"].mean > 0


def _kept(run: Session, plan: Any) -> int:
    graph = run.dense.main
    changed = {graph.tensors[str(run.structure.sites[s].weight)] for s in plan.choices}
    return sum(graph.store.nbytes(key) for key in set(graph.tensors.values()) - changed)


def test_two_structural_options_at_one_site_are_no_recipe():
    program = llama_program()
    recipe = Recipe.parse("options: {linear: ['quantize{bits=4} + low_rank{rank=4}']}")
    with pytest.raises(BadPlan, match="one structural option and one numeric format"):
        offer(program, find_structure(program), recipe)
    recipe = Recipe.parse("options: {mlp: ['drop + quantize{bits=4}']}")
    made = offer(program, find_structure(program), recipe)
    assert "leaves no weights here" in next(iter(made.refused.values()))
    table = build_table(program, find_structure(program), made, {}, ProgramFolder(), "nats/token")
    assert all(c.refused for row in table.sites.values() for c in row.choices if c.options)


@pytest.mark.parametrize("option", ["low_rank{ratio=0.8}", "quantize{bits=3,group_size=16,rank=4}"])
def test_fisher_prices_the_change_of_the_product(option):
    """D is the directional derivative of the log-likelihood, whatever calls the weight has become."""
    from lwcompile.passes.analysis._changes import Changes

    program, spec = llama_program(), Spec.parse(option)
    ctx = known(program)
    changes = Changes(program, ctx, None)
    assert not changes.add([(0, ["block1.mlp.up_proj"])], spec)
    (change,) = next(iter(changes.by_key.values()))
    site = find_structure(program).sites["block1.mlp.up_proj"]
    edited = Executor(ctx.edited(program, [site.id], [spec]))
    x = torch.randn(1, 5, 32)
    start, stop = edited.position(Executor(program).input_of(site.node)) + 1, edited.position(site.node) + 1
    values = edited.advance({Executor(program).input_of(site.node): x}, start, stop)
    moved = values[site.node] - x @ program.main.tensor(str(site.weight)).T
    torch.testing.assert_close(x @ (change.scale * changes.delta(change).float()).T, moved, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    "option",
    ["prune_mlp{ratio=0.25}", "prune_mlp{ratio=0.5,compensate=false} + quantize{bits=8,group_size=16}", "latent{rank=12}"],
)
def test_fisher_prices_what_a_sublayers_own_weights_become(option):
    """The moves of all its linears together are what the sublayer's output moves by, as far as that is linear in them."""
    from lwcompile.passes.analysis._changes import Changes

    program, spec = llama_program(), Spec.parse(option)
    ctx = known(program)
    place = "block1.attention" if spec.name == "latent" else "block1.mlp"
    changes = Changes(program, ctx, None)
    assert not changes.add([(0, [place])], spec)
    edited, moved = ctx.edited(program, [place], [spec]), program.copy()
    for key, made in changes.by_key.items():
        (change,) = made
        name = str(next(s.weight for s in ctx.find_structure(program).of_kind("linear") if s.node == key))
        moved.main.set_tensor(name, program.main.tensor(name) + change.scale * changes.delta(change).float())
    assert relative_error(logits(edited), logits(moved)) < 2e-3 < relative_error(logits(edited), logits(program))


def test_fisher_does_not_price_other_weights_in_their_place():
    from lwcompile.passes.analysis._changes import Changes

    program = llama_program()
    refused = Changes(program, known(program), None).add([(0, ["block1"])], Spec.parse("share{rank=4}"))
    assert "other weights in the place" in refused[0]


# --- correction


def test_a_correction_lowers_the_error_and_counts_its_bytes():
    program = llama_program()
    site = find_structure(program).sites["block1.mlp.down_proj"]
    ctx, weight = known(program), str(site.weight)
    stats = ctx.stats_of(program.main, site, Wanted(0.5))
    assert stats is not None
    errors = []
    for rank in (0, 4, 8):
        option = Quantize(bits=2, group_size=16, rank=rank)
        changed = program.copy()
        Manager(ctx).transform(changed, [(site, option)])
        kept = program.main.nbytes() - program.main.tensor(weight).nbytes
        assert changed.main.nbytes() - kept == sum(ProgramFolder().price(t) for t in option.stored(program.main, site))
        x = torch.eye(64)[None]
        executor, fed = Executor(changed), Executor(program).input_of(site.node)
        values = executor.advance({fed: x}, executor.position(fed) + 1, executor.position(site.node) + 1)
        error = program.main.tensor(weight) - values[site.node][0].T
        errors.append(torch.trace(error @ stats.hessian @ error.T).item())
    assert errors[0] > 1.3 * errors[1] > 1.3 * errors[2]
    with pytest.raises(Refused, match="correction of rank 40 holds"):
        Quantize(rank=40).check(program.main, site)
    with pytest.raises(Refused, match="only the weight of a linear"):
        Quantize(rank=4).check(llama_program(tied=False).main, find_structure(llama_program(tied=False)).sites["embedding"])


def test_a_correction_is_the_best_of_its_rank():
    """What is left of the error after it is the tail of the whitened spectrum, but for the factors' 8 bits."""
    program = llama_program()
    site, weight = find_structure(program).sites["block0.mlp.down_proj"], "model.layers.0.mlp.down_proj.weight"
    ctx, changed = Context(program=program, structure=find_structure(program)), program.copy()
    option = Quantize(bits=2, group_size=16, solver=Spec("rtn"), rank=6)
    Manager(ctx).transform(changed, [(site, option)])
    q = make("solvers", Spec("rtn")).solve(program.main.tensor(weight), option.format, None).dequantize()
    executor, fed = Executor(changed), Executor(program).input_of(site.node)
    values = executor.advance({fed: torch.eye(64)[None]}, executor.position(fed) + 1, executor.position(site.node) + 1)
    left = (program.main.tensor(weight) - values[site.node][0].T).square().sum()
    tail = torch.linalg.svdvals(program.main.tensor(weight) - q)[6:].square().sum()
    assert tail <= left * (1 + 1e-5) and left < 1.02 * tail
    assert FACTORS.bits == 8


# --- the contract, and what comes after


@pytest.mark.parametrize("name", ["low_rank", "prune_mlp", "quantize{bits=3,group_size=16,rank=4,solver=rtn}"])
def test_contract(name: str):
    check_pass(make("passes", Spec.parse(name)), programs()["decoder"])


@pytest.mark.parametrize("option", [JOINT, Spec.parse("quantize{bits=4,group_size=16,rank=4}")])
def test_decoding_and_onnx_hold(option, tmp_path):
    program = llama_program()
    ctx = known(program)
    sites = [s.id for s in ctx.find_structure(program).of_kind("linear") if s.id != "head"]
    compressed = apply_plan(program, {id: option.parts for id in sites}, ctx.find_structure(program), ctx)
    assert not [r for r in ctx.remarks if r.kind == "refused"]
    derive_decode(compressed.main)  # raises where decoding step by step differs
    pytest.importorskip("onnxruntime")
    backend = make("backends", Spec.parse("onnx{activations=float32}"))
    assert not backend.unsupported(compressed)
    parity = backend.lower(compressed, tmp_path / "model.onnx", ctx)
    assert parity.worst < 1e-4
