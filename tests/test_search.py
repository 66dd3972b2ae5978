"""Search against exhaustive search where damages do not add up, and the oracle against a compressed program."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import tiny
import torch

from lwcompile.budget import Budget
from lwcompile.contract import configure
from lwcompile.damage import DamageMeter
from lwcompile.errors import BadPlan, InfeasibleBudget
from lwcompile.executor import Executor
from lwcompile.passes.allocate.integer_program import IntegerProgram
from lwcompile.passes.allocate.search import Search
from lwcompile.pipeline import Settings, session
from lwcompile.plans import Plan
from lwcompile.recipe import Recipe
from lwcompile.spec import Spec
from lwcompile.table import Choice, Group, Options, OptionTable, SiteRow

BITS = (8, 4, 3, 2)
HARM = {"q_proj": 0.02, "down_proj": 0.06}
TRUE = {"q_proj": 0.3, "down_proj": 3.0}
"""What really happens to each weight: queries matter less than they seem alone, and down projections more."""


def quantize(bits: int) -> Options:
    return (Spec.of("quantize", bits=bits),)


def table(blocks: int = 3, drop: float = 0.5) -> OptionTable:
    rows = []
    for k in range(blocks):
        rows.append(SiteRow(f"block{k}.mlp", None, "mlp", 1, 0, (Choice(Spec("drop"), drop * (1 + k), 0, silences=True),)))
        for name, harm in HARM.items():
            choices = tuple(Choice(quantize(b)[0], harm * (1 + 0.1 * k) * 4.0 ** (4 - b) / 4, 100 * b) for b in BITS)
            rows.append(SiteRow(f"block{k}.mlp.{name}", f"block{k}.mlp", "linear", 800, 3200, choices))
    return OptionTable("nats/token", 800 * 2 * blocks, {row.site: row for row in rows})


def world(given: OptionTable, drops: float = 0.2) -> Callable[[Plan], float]:
    """Families have factors of their own, drops do `drops` of their damage, and the whole saturates."""

    def damage(plan: Plan) -> float:
        total = 0.0
        for id, options in plan.choices.items():
            name = id.rpartition(".")[2]
            total += given.sites[id].choice(options).predicted * TRUE.get(name, drops)
        return 4 * math.tanh(total / 4)

    return damage


def best(given: OptionTable, budget: Budget, oracle: Callable[[Plan], float]) -> float:
    sites = list(given.sites)
    offered = [list(given.sites[s].by_options) for s in sites]
    limit, found = budget.max_bytes(given.parameters), math.inf
    for combination in itertools.product(*offered):
        choices = dict(zip(sites, combination))
        if given.evaluate(choices).bytes <= (limit or math.inf):
            found = min(found, oracle(Plan.of(given, choices)))
    return found


@pytest.mark.parametrize("size", [900, 1300, 1700])
def test_it_finds_what_trying_everything_finds(size: int) -> None:
    given, budget = table(blocks=2), Budget(bytes=size)
    oracle = world(given)
    start = oracle(IntegerProgram().allocate(given, budget))
    plan = Search(evaluations=60).allocate(given, budget, oracle)
    least = best(given, budget, oracle)
    assert least < 0.9 * start  # the start is no answer already
    assert oracle(plan) <= 1.02 * least
    assert plan.bytes is not None and plan.bytes <= size
    assert plan.conditional == oracle(plan) and plan.origin["conditional_at_start"] == start


def test_it_is_never_worse_than_its_start_and_keeps_to_its_evaluations() -> None:
    given, budget, asked = table(), Budget(bytes=2000), []

    def oracle(plan: Plan) -> float:
        asked.append(plan.digest())
        return float(int(plan.digest()[:6], 16)) / 2**24  # nothing to be learned

    search = Search(evaluations=17, step=3)
    plan = search.allocate(given, budget, oracle)
    assert len(asked) == len(set(asked)) == 17 == search.measurements(budget, 3)
    assert plan.conditional is not None and plan.conditional <= plan.origin["conditional_at_start"]
    again = search.allocate(given, budget, lambda p: float(int(p.digest()[:6], 16)) / 2**24)
    assert again.choices == plan.choices


def test_it_is_never_worse_than_one_transform_by_itself() -> None:
    """Drops that look free and are not: whatever few plans are measured, the formats' own plan is among them."""
    given, budget = table(drop=0.01), Budget(bytes=2000)
    oracle = world(given, drops=100.0)
    formats = IntegerProgram().allocate(given.offering(lambda c: c.option.name == "quantize"), budget)
    assert oracle(IntegerProgram().allocate(given, budget)) > 2 * oracle(formats)
    assert oracle(Search(evaluations=3).allocate(given, budget, oracle)) <= oracle(formats)


def test_groups_stay_whole_and_drops_stay_counted() -> None:
    given = table()
    groups = (Group("pair", ("block0.mlp.q_proj", "block1.mlp.q_proj"), "fused"),)
    given = OptionTable(given.unit, given.parameters, given.sites, groups)
    plan = Search(evaluations=40).allocate(given, Budget(bytes=2000, drop_sublayers=1), world(given))
    assert not given.violations(plan.choices)
    assert len(given.evaluate(plan.choices).dropped) == 1


def test_without_an_oracle_it_is_its_start() -> None:
    given = table()
    for budget in (Budget(bytes=2000), Budget(max_damage=0.3)):
        start = IntegerProgram().allocate(given, budget)
        assert Search().allocate(given, budget).choices == start.choices
    assert Search().allocate(given, Budget(max_damage=0.3), world(given)).choices == start.choices
    assert Search().measurements(Budget(max_damage=0.3), 3) == 0
    with pytest.raises(InfeasibleBudget, match="smallest plan"):
        Search(start=Spec("greedy")).allocate(table(drop=math.nan), Budget(bytes=10), world(given))
    with pytest.raises(BadPlan, match="evaluation"):
        configure(Search, Spec.parse("search{evaluations=0}"))


def test_the_oracle_measures_what_compressing_makes(tmp_path) -> None:
    """By HQQ, which asks for no statistics, both are the same program."""
    from lwcompile.oracle import Oracle

    four = "quantize{bits=4,group_size=16,solver=hqq}"
    formats = [Spec.parse("quantize{bits=[3,4],group_size=16,solver=hqq}")]
    data = {"dataset": "random", "samples": 8, "seqlen": 12}
    mlp = [Spec.parse(text) for text in ("drop", "prune_mlp", f"prune_mlp + {four}")]
    recipe = Recipe.named("fast").with_(
        options={"linear": formats, "embedding": formats, "mlp": mlp},
        allocator=Spec.parse("search{evaluations=5}"),
        analyses=[Spec.parse("fisher"), Spec.parse("measured{only=drop}"), Spec.parse("measured{only=prune_mlp,joint=false}")],
        calibration=data,
        evaluation=data,
        budget=Budget(avg_bits=14),
    )
    run = session(tiny.llama_program(), Settings(recipe=recipe, backend="program", run_dir=tmp_path / "run"))
    plan = Plan({"block0.mlp": (Spec("drop"),), "block1.attention.q_proj": (Spec.parse(four),), "embedding": (Spec.parse(four),),
                 "head": (Spec.parse(four),), "block2.mlp": (Spec.parse("prune_mlp"), Spec.parse(four))})  # fmt: skip
    oracle = Oracle(run.dense, run.structure, run._ready())
    found = oracle(plan)
    compressed, meter = run.compress(plan), DamageMeter(run.metric)
    dense, changed = Executor(run.dense), Executor(compressed)
    assert len([n for n in compressed.main.nodes if n.target is torch.ops.aten.linear.default]) < 22
    with torch.no_grad():
        for batch in run.calibration.batches(4, dense.inputs()):
            meter.update(dense.run(batch), changed.run(batch), batch)
    assert found == pytest.approx(meter.result().mean, rel=1e-4)
    assert run.dense.digest() == run.digest  # a trial leaves nothing behind
    again = Oracle(run.dense, run.structure, run._ready())
    assert again(plan) == found and again._cache is None  # from the run directory
    refused = Plan({"block0.attention.q_proj": (Spec.parse("quantize{bits=4,group_size=16,rank=400,solver=hqq}"),)})
    assert oracle(refused) == math.inf  # and not what the rest of the plan does
    made = run.plan()
    assert made.conditional is not None and made.conditional <= made.origin["conditional_at_start"]


def test_a_joint_option_does_what_its_parts_do_together(tmp_path) -> None:
    format = "quantize{bits=4,group_size=16,solver=hqq}"
    data = {"dataset": "random", "samples": 8, "seqlen": 12}
    mlp = [Spec.parse(text) for text in ("prune_mlp", f"prune_mlp + {format}")]
    analyses = [Spec.parse("fisher"), Spec.parse("measured{joint=false,only=prune_mlp}")]
    recipe = Recipe.named("fast").with_(
        options={"linear": [Spec.parse(format)], "mlp": mlp}, analyses=analyses, calibration=data, evaluation=data
    )
    run = session(tiny.llama_program(), Settings(recipe=recipe, backend="program", run_dir=tmp_path / "run"))
    row = run.table.sites["block1.mlp"]
    below = [s.id for s in run.structure.children("block1.mlp") if s.kind == "linear"]
    alone, joint = (row.by_options[o] for o in ((mlp[0],), (mlp[0], Spec.parse(format))))
    parts = sum(run.table.sites[id].by_options[(Spec.parse(format),)].predicted for id in below)
    assert joint.damage == pytest.approx(alone.damage + 0.75 * parts)
    assert joint.bytes < alone.bytes


def test_the_report_says_what_the_same_size_costs_in_numeric_formats_alone(tmp_path) -> None:
    from lwcompile.pipeline import formats_alone

    numeric = [Spec.parse("quantize{bits=[2,4],group_size=16,solver=hqq}")]
    data = {"dataset": "random", "samples": 8, "seqlen": 12}
    options = {"linear": numeric, "embedding": numeric, "mlp": [Spec("drop")]}
    recipe = Recipe.named("fast").with_(options=options, calibration=data, evaluation=data)
    run = session(tiny.llama_program(), Settings(recipe=recipe, backend="program", run_dir=tmp_path / "run"))
    plan = run.plan(Budget(bytes=int(0.9 * run.table.evaluate({}).bytes), drop_sublayers=2))
    said = formats_alone(run, plan)
    assert said is not None and said["bytes"] <= plan.bytes and said["predicted"] < said["predicted with all options"]
    smallest = run.plan(Budget(bytes=1 + run.table.evaluate(run.plan(Budget(max_damage=math.inf)).choices).bytes))
    said = formats_alone(run, smallest)
    assert said is not None and "smallest plan" in said["refused"]  # without dropping, that size is not to be had
    only = Recipe.named("fast").with_(options={"linear": numeric}, calibration=data, evaluation=data)
    other = session(tiny.llama_program(), Settings(recipe=only, backend="program", run_dir=tmp_path / "other"))
    assert formats_alone(other, other.plan(Budget(avg_bits=20))) is None


def test_a_dry_run_counts_the_whole_plans() -> None:
    from lwcompile.estimate import estimate

    one = estimate(tiny.llama_program(), command="plan", recipe=Recipe.named("fast"), dataset="random")
    recipe = Recipe.named("fast").with_(allocator=Spec.parse("search{evaluations=9}"))
    searched = estimate(tiny.llama_program(), command="plan", recipe=recipe, dataset="random")
    assert "whole plans" in searched.seconds and "whole plans" not in one.seconds
