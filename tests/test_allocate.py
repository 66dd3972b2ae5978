"""Allocators against exhaustive search on small tables, and on their constraints."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import random
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lwcompile.budget import Budget
from lwcompile.contract import Allocator, configure
from lwcompile.errors import BadPlan, InfeasibleBudget
from lwcompile.passes.allocate._unheard import unheard
from lwcompile.passes.allocate.greedy import Greedy, State
from lwcompile.passes.allocate.integer_program import IntegerProgram
from lwcompile.spec import KEEP, Spec
from lwcompile.table import Choice, Evaluation, Exclusion, Group, Options, OptionTable, SiteRow, pareto

EXACT = IntegerProgram(gap=0.0)
BOTH = (Greedy(), EXACT)
SHARE = Spec.of("share", source=-1)
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def bits(count: int) -> Spec:
    return Spec.of("quantize", bits=count)


def linear(site: str, parent: str | None, damages: list[float], sizes: list[int], kind: str = "linear") -> SiteRow:
    choices = [Choice(bits(8 - k), d, b) for k, (d, b) in enumerate(zip(damages, sizes[1:]))]
    return SiteRow(site, parent, kind, sizes[0], sizes[0], tuple(choices))


def sublayer(
    site: str, parent: str | None, drop: float | None, own: int = 0, kind: str = "attention", replaces: bool = False
) -> SiteRow:
    choices = () if drop is None else (Choice(Spec("drop"), drop, 0, silences=True, replaces=replaces),)
    return SiteRow(site, parent, kind, 1, own, choices)


@st.composite
def tables(draw: st.DrawFn) -> OptionTable:
    """Two blocks with a fused pair and a lone linear each, a tied embedding and head, maybe a tensor tied across blocks."""
    damage = st.floats(-0.05, 2.0, allow_nan=False).map(lambda x: round(x, 3))
    size = st.integers(1, 60)

    def one(site: str, parent: str | None, options: int) -> SiteRow:
        sizes = sorted([draw(size) for _ in range(options + 1)], reverse=True)
        return linear(site, parent, [draw(damage) for _ in range(options)], sizes)

    rows = [one("embedding", None, 1)]
    rows.append(dataclasses.replace(rows[0], site="head", choices=tuple(
        dataclasses.replace(c, damage=draw(damage) if c.options else 0.0) for c in rows[0].choices)))  # fmt: skip
    groups = [Group("tied", ("embedding", "head"), "tied")]
    for k in range(2):
        rows.append(sublayer(f"b{k}", None, draw(st.none() | damage), kind="block", replaces=draw(st.booleans())))
        rows.append(sublayer(f"b{k}.attention", f"b{k}", draw(st.none() | damage), own=draw(st.integers(0, 4))))
        rows += [one(f"b{k}.attention.q", f"b{k}.attention", 1), one(f"b{k}.attention.k", f"b{k}.attention", 1)]
        groups.append(Group(f"qk{k}", (f"b{k}.attention.q", f"b{k}.attention.k")))
        rows.append(sublayer(f"b{k}.mlp", f"b{k}", draw(st.none() | damage), kind="mlp"))
        rows.append(one(f"b{k}.mlp.up", f"b{k}.mlp", 2))
    if draw(st.booleans()):
        groups.append(Group("shared", ("b0.mlp.up", "b1.mlp.up"), draw(st.sampled_from(["tied", "fused"]))))
    pairs = [("b0.mlp.up", bits(8), "b1.attention.q", bits(8)), ("b0.mlp.up", bits(7), "embedding", bits(8))]
    pairs += [("b0.attention.q", bits(8), "b1.mlp.up", bits(7)), ("b1.mlp.up", bits(8), "b0.attention", Spec("drop"))]
    exclusions = [Exclusion(*pair) for pair in pairs if draw(st.booleans())]
    sites = {row.site: row for row in rows}
    if len(groups) == 3:  # the second block, or its MLP alone, may compute with the first one's weights
        for site, below in (("b1", ("attention.q", "attention.k", "mlp.up")), ("b1.mlp", ("mlp.up",))):
            if draw(st.booleans()):
                pairs = tuple((f"b1.{w}", f"b0.{w}") for w in below)
                shared = Choice(SHARE, draw(damage), draw(st.integers(0, 4)), silences=True, replaces=True, shares=pairs)
                sites[site] = dataclasses.replace(sites[site], choices=(*sites[site].choices, shared))
                kept = [id for id in ("b0", "b0.attention", "b0.mlp") if id != "b0.attention" or site == "b1"]
                exclusions += [Exclusion(site, SHARE, id, Spec("drop")) for id in kept]
    if draw(st.booleans()):
        last = rows[-1]
        choices = (*last.choices[:-1], dataclasses.replace(last.choices[-1], refused="the backend has no such width"))
        sites[last.site] = dataclasses.replace(last, choices=choices)
    return OptionTable("nats/token", 100, sites, tuple(groups), draw(st.integers(0, 20)), tuple(exclusions))


def every(table: OptionTable) -> Iterator[tuple[dict[str, Options], Evaluation]]:
    """All assignments that the table allows: one option per unit, conflicts left out."""
    units = table.units
    for options in itertools.product(*(unit.options for unit in units)):
        assignment = {site: o for unit, o in zip(units, options) for site in unit.sites}
        if not table.violations(assignment):
            yield assignment, table.evaluate(assignment)


def meets(found: Evaluation, budget: Budget, parameters: int) -> bool:
    limit = budget.max_bytes(parameters)
    return (
        (limit is None or found.bytes <= limit)
        and (budget.drop_sublayers is None or len(found.dropped) == budget.drop_sublayers)
        and (budget.max_damage is None or found.damage <= budget.max_damage + 1e-12)
    )


budgets = st.one_of(
    st.builds(Budget, bytes=st.integers(20, 250), drop_sublayers=st.none() | st.integers(0, 4)),
    st.builds(Budget, avg_bits=st.floats(1.0, 16.0), max_damage=st.none() | st.floats(0.0, 3.0)),
    st.builds(Budget, max_damage=st.floats(0.0, 4.0), drop_sublayers=st.none() | st.integers(0, 3)),
    st.builds(Budget, drop_sublayers=st.integers(0, 5)),
)


@FAST
@given(tables(), budgets)
def test_the_integer_program_equals_exhaustive_search(table: OptionTable, budget: Budget) -> None:
    feasible = [e for _, e in every(table) if meets(e, budget, table.parameters)]
    if not feasible:
        with pytest.raises(InfeasibleBudget):
            EXACT.allocate(table, budget)
        return
    plan = EXACT.allocate(table, budget)
    found = table.evaluate(plan.choices)
    assert not table.violations(plan.choices)
    assert meets(found, budget, table.parameters)
    assert (plan.predicted, plan.bytes, plan.avg_bits) == (found.damage, found.bytes, found.avg_bits)
    if budget.sized or budget.max_damage is None:
        assert found.damage == pytest.approx(min(e.damage for e in feasible), abs=1e-9)
    else:
        assert found.bytes == min(e.bytes for e in feasible)


@FAST
@given(tables(), budgets)
def test_greedy_is_feasible_and_never_better(table: OptionTable, budget: Budget) -> None:
    try:
        plan = Greedy().allocate(table, budget)
    except InfeasibleBudget:
        return  # it may miss a plan that the integer program finds
    found = table.evaluate(plan.choices)
    assert not table.violations(plan.choices)
    assert meets(found, budget, table.parameters)
    assert plan.predicted == found.damage and plan.bytes == found.bytes
    best = table.evaluate(EXACT.allocate(table, budget).choices)
    if budget.sized or budget.max_damage is None:
        assert found.damage >= best.damage - 1e-9
    else:
        assert found.bytes >= best.bytes


@FAST
@given(tables(), st.randoms(use_true_random=False))
def test_each_step_of_greedy_is_worth_what_the_table_says(table: OptionTable, rng: random.Random) -> None:
    state = State(table, Budget(bytes=1000))
    for _ in range(12):
        unit = rng.randrange(len(table.units))
        steps = dict(state.steps(unit))
        for options in table.units[unit].options:
            tried = state.carried | dict.fromkeys(table.units[unit].sites, options)
            if options in steps:
                before, after = table.evaluate(state.carried), table.evaluate(tried)
                assert not table.violations(tried)
                assert steps[options].damage == pytest.approx(after.damage - before.damage, abs=1e-9)
                assert steps[options].bytes == after.bytes - before.bytes
                assert steps[options].dropped == len(after.dropped) - len(before.dropped)
            elif options != state.carried[table.units[unit].sites[0]]:
                assert table.violations(tried) or table.evaluate(tried) == table.evaluate(state.carried)  # all silenced
        if steps:
            options, change = rng.choice(list(steps.items()))
            state.take(unit, options, change)
    assert state.now.bytes == table.evaluate(state.carried).bytes


@FAST
@given(tables(), st.integers(20, 250), st.integers(0, 60))
def test_more_bytes_are_never_more_damage(table: OptionTable, size: int, more: int) -> None:
    try:
        small = EXACT.allocate(table, Budget(bytes=size))
    except InfeasibleBudget:
        assume(False)
        raise
    large = EXACT.allocate(table, Budget(bytes=size + more))
    assert (large.predicted or 0) <= (small.predicted or 0) + 1e-9


@settings(FAST, max_examples=25)
@given(tables())
def test_the_size_in_the_message_is_the_smallest_there_is(table: OptionTable) -> None:
    smallest = min(e.bytes for _, e in every(table))
    assume(smallest > 1)
    with pytest.raises(InfeasibleBudget, match=rf"the smallest plan is {smallest} bytes"):
        EXACT.allocate(table, Budget(bytes=smallest - 1))
    assert EXACT.allocate(table, Budget(bytes=smallest)).bytes == smallest
    assert EXACT.allocate(table, Budget(max_damage=math.inf)).bytes == smallest


def chain(blocks: int, *, drops: bool = True) -> OptionTable:
    """Blocks with one attention (damage of its drop 0.1 k) and one linear below it, 100 bytes dense, 50 or 25 quantized."""
    rows: list[SiteRow] = []
    for k in range(blocks):
        rows.append(sublayer(f"b{k}.attention", None, 0.1 * (k + 1) if drops else None))
        rows.append(linear(f"b{k}.attention.q", f"b{k}.attention", [0.01, 0.03 * (k + 1)], [100, 50, 25]))
    return OptionTable("nats/token", 50 * blocks, {row.site: row for row in rows})


@pytest.mark.parametrize("allocator", BOTH, ids=lambda a: a.name)
def test_exactly_so_many_sublayers_are_dropped_and_their_children_silenced(allocator: Allocator) -> None:
    table = chain(4)
    plan = allocator.allocate(table, Budget(bytes=150, drop_sublayers=2))
    assert table.evaluate(plan.choices).dropped == ("b0.attention", "b1.attention")
    assert not {"b0.attention.q", "b1.attention.q"} & set(plan.choices)
    assert plan.bytes == 150 or plan.predicted == pytest.approx(0.32)  # 50 + 100 fits: one linear stays whole
    assert allocator.allocate(table, Budget(avg_bits=16, drop_sublayers=0)).choices == {}


def test_a_block_drop_counts_its_sublayers() -> None:
    block = sublayer("b0", None, 0.1, kind="block")
    halves = [sublayer("b0.attention", "b0", None), sublayer("b0.mlp", "b0", None, kind="mlp")]
    table = OptionTable("u", 10, {row.site: row for row in (block, *halves)})
    assert EXACT.allocate(table, Budget(drop_sublayers=2)).choices == {"b0": (Spec("drop"),)}
    for allocator in BOTH:
        with pytest.raises(InfeasibleBudget):
            allocator.allocate(table, Budget(drop_sublayers=1))
    with pytest.raises(InfeasibleBudget, match="drops exactly 1 sublayers with the options offered: 0 or 2 can be"):
        EXACT.allocate(table, Budget(drop_sublayers=1))


def test_messages_say_what_could_be_met() -> None:
    table = chain(4, drops=False)
    for allocator in BOTH:
        with pytest.raises(
            InfeasibleBudget, match=r"no plan fits in 99 bytes \(3.96 bits\): the smallest plan is 100 bytes \(4.00 "
        ):
            allocator.allocate(table, Budget(bytes=99))
    with pytest.raises(InfeasibleBudget, match=r"drops exactly 3 sublayers with the options offered: 0 can be dropped; offer it"):
        EXACT.allocate(table, Budget(drop_sublayers=3))
    with pytest.raises(InfeasibleBudget, match=r"the least is 0.3; the smallest plan within that damage is 250 bytes"):
        EXACT.allocate(table, Budget(bytes=100, max_damage=0.03))
    for allocator in BOTH:
        with pytest.raises(BadPlan, match="a budget needs"):
            allocator.allocate(table, Budget())


def test_noise_below_zero_counts_as_zero_and_saves_bytes() -> None:
    row = SiteRow("a", None, "linear", 8, 32, (Choice(bits(8), -0.01, 8), Choice(bits(4), 0.2, 4)))
    table = OptionTable("u", 8, {"a": row})
    for allocator in BOTH:
        plan = allocator.allocate(table, Budget(bytes=32))
        assert (plan.predicted, plan.bytes) == (0.0, 8)


def test_a_choice_refused_or_without_a_number_is_never_taken() -> None:
    choices = (Choice(bits(2), 0.0, 1, refused="slow"), Choice(bits(3), math.nan, 2), Choice(bits(4), 0.5, 4))
    table = OptionTable("u", 8, {"a": SiteRow("a", None, "linear", 8, 32, choices)})
    for allocator in BOTH:
        assert allocator.allocate(table, Budget(bytes=31)).choices == {"a": (bits(4),)}


def test_a_structural_and_a_numeric_option_go_together() -> None:
    joint = Choice(bits(8), 0.1, 2, structural=Spec.of("lowrank", rank=4))
    table = OptionTable("u", 8, {"a": SiteRow("a", None, "linear", 8, 32, (joint, Choice(bits(4), 0.5, 4)))})
    assert EXACT.allocate(table, Budget(bytes=4)).choices == {"a": (Spec.of("lowrank", rank=4), bits(8))}


def big_table(sites: int = 250, options: int = 12, seed: int = 0) -> OptionTable:
    """As wide as a model of 36 blocks: fused q/k/v and gate/up, drops, damages that fall exponentially with bits, with noise."""
    rng = random.Random(seed)
    rows: list[SiteRow] = []
    groups: list[Group] = []
    for k in range(sites // 7):
        rows += [sublayer(f"block{k}", None, None, kind="block")]
        names = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
        for kind, linears in names.items():
            parent = f"block{k}.{kind}"
            rows.append(sublayer(parent, f"block{k}", rng.uniform(0.02, 2.0), own=4096, kind=kind))
            for name in linears:
                parameters = rng.choice([110_592, 331_776, 884_736])
                scale = math.exp(rng.gauss(-3, 1.5))
                choices = []
                for j in range(options - 1):
                    width = 2 + 0.5 * j
                    noise = math.exp(rng.gauss(0, 0.1))
                    choices.append(
                        Choice(Spec.of("quantize", bits=width), scale * 4**-width * noise, int(parameters * width / 8))
                    )
                rows.append(SiteRow(f"{parent}.{name}", parent, "linear", parameters, 2 * parameters, tuple(choices)))
            groups.append(Group(f"{parent}.in", tuple(f"{parent}.{n}" for n in linears[:-1])))
    parameters = sum(row.parameters for row in rows if row.kind == "linear")
    return OptionTable("nats/token", parameters, {row.site: row for row in rows}, tuple(groups), 50_000)


def test_a_model_of_250_sites_is_solved_and_solved_again() -> None:
    table = big_table()
    for budget in (Budget(avg_bits=4.25), Budget(avg_bits=3.0, drop_sublayers=4), Budget(max_damage=0.05)):
        start = time.perf_counter()
        plan = IntegerProgram().allocate(table, budget)
        middle = time.perf_counter()
        other = Greedy().allocate(table, budget)
        print(f"{budget}: {middle - start:.2f} s and {time.perf_counter() - middle:.2f} s, ", end="")
        print(f"{plan.predicted:.5g} and {other.predicted:.5g}, {plan.avg_bits:.4f} and {other.avg_bits:.4f} bits")
        assert "notes" not in plan.origin  # finished in time
        assert meets(table.evaluate(plan.choices), budget, table.parameters)
        assert not table.violations(plan.choices)
        if budget.sized:
            assert (plan.predicted or 0) <= (other.predicted or 0)
            assert (plan.avg_bits or 0) > 0.999 * (budget.avg_bits or 0)  # spends it
        else:
            assert (plan.bytes or 0) <= (other.bytes or 0)


def test_the_curve_falls(n: int = 6) -> None:
    table = chain(4)
    for allocator in BOTH:
        curve = pareto(table, allocator, n)
        sizes, damages = [p.bytes or 0 for p in curve], [p.predicted or 0.0 for p in curve]
        assert sizes == sorted(set(sizes)) and damages == sorted(set(damages), reverse=True)
        assert sizes[0] == 0 and damages[-1] == 0.0 and len(curve) > 2


def test_out_of_time_still_answers() -> None:
    table = big_table(70, 6)
    plan = IntegerProgram(seconds=1e-3).allocate(table, Budget(avg_bits=3.0))
    assert meets(table.evaluate(plan.choices), Budget(avg_bits=3.0), table.parameters)
    assert (plan.predicted or 0) <= (Greedy().allocate(table, Budget(avg_bits=3.0)).predicted or 0)


def test_options_are_validated() -> None:
    assert configure(IntegerProgram, Spec.parse("integer_program{gap=0.01}")) == IntegerProgram(gap=0.01)
    with pytest.raises(BadPlan, match="gap lies between"):
        configure(IntegerProgram, Spec.parse("integer_program{gap=2}"))
    with pytest.raises(BadPlan, match="has no option 'speed'"):
        configure(Greedy, Spec.parse("greedy{speed=2}"))
    assert str(IntegerProgram().spec()) == "integer_program" and KEEP.name == "keep"


def test_what_a_native_library_prints_is_not_heard(capfd):
    """HiGHS prints through C's buffers, which must be empty before and after."""
    printed = ctypes.CDLL(None).puts
    printed(b"before")
    with unheard():
        printed(b"meanwhile")
    printed(b"after")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out.split() == ["before", "after"]
