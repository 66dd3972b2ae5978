"""The table of choices: what a plan is worth against a walk down the tree, what is refused, and its JSON."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_allocate import bits, tables

from lwcompile.budget import Budget, format_size, parse_size
from lwcompile.errors import BadInput, BadPlan
from lwcompile.spec import KEEP, Spec
from lwcompile.table import Choice, Exclusion, Group, Options, OptionTable, SiteRow, canonical

DROP = Spec("drop")


def row(site: str, parent: str | None = None, kind: str = "linear", dense: int = 16, *choices: Choice) -> SiteRow:
    return SiteRow(site, parent, kind, 4, dense, choices)


def small() -> OptionTable:
    four, two = Choice(bits(4), 0.1, 4), Choice(bits(2), 0.5, 2)
    rows = [
        row("embedding", None, "embedding", 16, four, two),
        row("head", None, "linear", 16, four, two),
        row("b0", None, "block", 0, Choice(DROP, 0.9, 0, silences=True)),
        row("b0.attention", "b0", "attention", 1, Choice(DROP, 0.3, 0, silences=True)),
        row("b0.attention.q", "b0.attention", "linear", 16, four, two),
        row("b0.attention.k", "b0.attention", "linear", 16, four, two),
        row("b0.mlp", "b0", "mlp", 1, Choice(Spec.of("share", source="b1"), 0.2, 0, silences=True, replaces=True)),
        row("b0.mlp.up", "b0.mlp", "linear", 16, four, dataclasses.replace(two, refused="the backend has no 2-bit embedding")),
    ]
    groups = (Group("tied", ("embedding", "head"), "tied"), Group("qk", ("b0.attention.q", "b0.attention.k")))
    return OptionTable("nats/token", 20, {r.site: r for r in rows}, groups, fixed_bytes=5)


def walk(table: OptionTable, assignment: Mapping[str, Options]) -> tuple[float, int, set[str]]:
    """Another definition of a plan's worth: down the tree from the top, with a set of stored tensors."""
    damage, stored, dropped = 0.0, {}, set()
    tied = {site: group.sites for group in table.groups if group.reason == "tied" for site in group.sites}

    def visit(site: str, gone: bool, counted: bool) -> None:
        nonlocal damage
        row = table.sites[site]
        choice = next(c for c in row.choices if c.options == assignment.get(site, ()))
        if not gone:
            damage += max(0.0, choice.damage)
            for own, source in choice.shares:
                reads = assignment.get(source, ())
                there = next((c for c in table.sites[own].choices if c.options == reads and c.refused is None), None)
                damage += max(0.0, (there or next(c for c in table.sites[source].choices if c.options == reads)).damage)
            readers = tied.get(site, (site,))
            stored[readers, choice.options] = max(
                c.bytes for reader in readers for c in table.sites[reader].choices if c.options == choice.options
            )
        removed = counted or (not gone and choice.silences and not choice.replaces)
        if removed and row.kind in ("attention", "mlp", "moe", "sublayer"):
            dropped.add(site)
        for child in table.sites.values():
            if child.parent == site:
                visit(child.site, gone or choice.silences, removed)

    for row in table.sites.values():
        if row.parent is None:
            visit(row.site, False, False)
    return damage, table.fixed_bytes + sum(stored.values()), dropped


@settings(max_examples=100, deadline=None)
@given(tables(), st.integers(0, 2**32))
def test_evaluate_equals_a_walk_down_the_tree(table: OptionTable, seed: int) -> None:
    rng = random.Random(seed)
    assignment = {site: o for unit in table.units for o in [rng.choice(unit.options)] for site in unit.sites}
    assume(not table.violations(assignment))
    found = table.evaluate(assignment)
    damage, stored, dropped = walk(table, assignment)
    assert found.damage == pytest.approx(damage, abs=1e-12)
    assert (found.bytes, set(found.dropped)) == (stored, dropped)
    assert found.avg_bits == 8 * stored / table.parameters
    assert table.evaluate(table.effective(assignment)) == found
    assert OptionTable.from_json(table.to_json()) == table


def test_a_plan_of_a_small_table() -> None:
    table = small()
    assert table.evaluate({}) == (0.0, 5 + 16 + 1 + 32 + 1 + 16, 8 * 71 / 20, ())
    both = {"embedding": (bits(4),), "head": (bits(4),)}
    assert table.evaluate(both)[:2] == (0.2, 71 - 12)  # one tensor, two uses that both do damage
    assert table.evaluate({"b0.attention": (DROP,), "b0.attention.q": (bits(2),)}) == (0.3, 38, 15.2, ("b0.attention",))
    assert table.evaluate({"b0": (DROP,), "b0.attention": (DROP,)}).dropped == ("b0.attention", "b0.mlp")
    shared = table.evaluate({"b0.mlp": (Spec.of("share", source="b1"),)})
    assert (shared.damage, shared.bytes, shared.dropped) == (0.2, 71 - 17, ())


def test_violations_name_the_sites() -> None:
    table = small()
    assert not table.violations({"b0.attention": (DROP,), "b0.attention.q": (bits(4),)})  # silenced, so the group is moot
    (broken,) = table.violations({"b0.attention.q": (bits(4),)})
    assert set(broken.sites) == {"b0.attention.q", "b0.attention.k"} and "run as one matrix (group 'qk')" in broken.message
    (tied,) = table.violations({"head": (bits(4),), "embedding": (bits(2),)})
    assert "read one tensor" in tied.message
    (unknown,) = table.violations({"b0.attn": (DROP,)})
    assert unknown.message == "unknown site 'b0.attn'; did you mean 'b0.attention'?"
    (missing,) = table.violations({"b0.mlp.up": (bits(3),)})
    assert "is offered keep, quantize{bits=4}" in missing.message and "bits=2" not in missing.message
    (refused,) = table.violations({"b0.mlp.up": (bits(2),)})
    assert refused.message.endswith("cannot carry quantize{bits=2}: the backend has no 2-bit embedding")
    conflicts = dataclasses.replace(table, exclusions=(Exclusion("b0.attention", DROP, "b0.mlp.up", bits(4)),))
    (conflict,) = conflicts.violations({"b0.attention": (DROP,), "b0.mlp.up": (bits(4),)})
    assert "conflict" in conflict.message
    assert not conflicts.violations(
        {"b0.attention": (DROP,), "b0.mlp.up": (bits(4),), "b0.mlp": (Spec.of("share", source="b1"),)}
    )


def test_options_that_mean_the_same_are_one() -> None:
    a = Spec.parse("quantize{bits=4,group_size=64,solver=gptq}")
    b = Spec.parse("quantize{solver=gptq{},group_size=64,bits=4}")
    assert canonical([a]) == canonical([KEEP, b]) != canonical([Spec.parse("quantize{bits=4}")])
    table = OptionTable("u", 4, {"a": row("a", None, "linear", 16, Choice(a, 0.1, 4))})
    assert table.evaluate({"a": (b,)}).bytes == 4


def test_a_row_begins_with_keep() -> None:
    made = row("a", None, "linear", 16, Choice(bits(4), 0.1, 4))
    assert made.choices[0] == Choice(KEEP, 0.0, 16)
    kept = row("a", None, "linear", 16, Choice(bits(4), 0.1, 4), Choice(KEEP, 0.0, 15))
    assert [c.bytes for c in kept.choices] == [15, 4]
    with pytest.raises(BadInput, match="a: the same option stands twice"):
        row("a", None, "linear", 16, Choice(bits(4), 0.1, 4), Choice(bits(4), 0.2, 4))
    with pytest.raises(BadInput, match="a: keep must do no damage"):
        row("a", None, "linear", 16, Choice(KEEP, 0.1, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": 0}, "counts no parameters"),
        ({"groups": (Group("g", ("head", "nowhere")),)}, "names site 'nowhere', which has no row"),
        ({"groups": (Group("g", ("b0", "b0.mlp")),)}, "holds 'b0.mlp' and a site above it"),
        ({"exclusions": (Exclusion("head", DROP, "nowhere", DROP),)}, "names site 'nowhere', which has no row"),
        ({"exclusions": (Exclusion("head", KEEP, "b0", DROP),)}, "names keep"),
        ({"sites": {"a": row("a", "above")}, "groups": ()}, "'a' stands below 'above', which has no row"),
        ({"sites": {"a": row("b")}, "groups": ()}, "keeps site 'b' under 'a'"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(change: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        dataclasses.replace(small(), **change)


def test_a_cycle_is_refused() -> None:
    rows = {"a": row("a", "b"), "b": row("b", "a")}
    with pytest.raises(BadInput, match="stands above itself"):
        OptionTable("u", 4, rows).evaluate({})


def test_json_keeps_what_has_no_number() -> None:
    joint = Choice(bits(8), math.nan, 3, spread=0.1, structural=Spec.of("lowrank", rank=4))
    table = OptionTable("u", 4, {"a": row("a", None, "linear", 16, joint)}, origin={"model": "x"})
    back = OptionTable.from_json(table.to_json())
    assert back.to_json() == table.to_json() and back.digest() == table.digest()
    choice = back.sites["a"].choices[1]
    assert choice.refused == "its damage is nan, not a number to compare" and choice.options == joint.options
    for broken in ("{", "[]", '{"unit": "u"}', table.to_json().replace('"bytes"', '"bites"')):
        with pytest.raises(BadInput, match="the table of choices is damaged"):
            OptionTable.from_json(broken)


def test_budgets() -> None:
    assert parse_size("80MB") == 80_000_000 and parse_size("1.5 GiB") == 1_610_612_736 and parse_size(7) == 7
    assert format_size(41_234_567) == "41.23 MB" and format_size(12) == "12 bytes"
    assert Budget(avg_bits=4.25).max_bytes(1000) == 531 and Budget(bytes=500, avg_bits=4.25).max_bytes(1000) == 500
    assert Budget(max_damage=1.0).max_bytes(1000) is None
    recipe = Budget(avg_bits=4.25, drop_sublayers=2)
    assert recipe.override(Budget(bytes=80)) == Budget(bytes=80, drop_sublayers=2)
    assert recipe.override(Budget(max_damage=0.1)) == Budget(max_damage=0.1, drop_sublayers=2)
    assert recipe.override(Budget(drop_sublayers=0)) == Budget(avg_bits=4.25, drop_sublayers=0)
    assert recipe.override(Budget()) == recipe
    assert Budget.of(recipe.to_dict()) == recipe
    assert Budget.of({"bytes": "80 MB", "max_damage": "1e-3"}) == Budget(bytes=80_000_000, max_damage=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"avg_bit": 3}, r"unknown key 'avg_bit' \(did you mean 'avg_bits'\?\)"),
        ({"bytes": "8 monkeys"}, "cannot read '8 monkeys' as a size"),
        ({"bytes": 0}, "bytes must be at least 1, and is 0"),
        ({"avg_bits": 0}, "avg_bits must be above 0"),
        ({"avg_bits": "many"}, "avg_bits wants a number, and got 'many'"),
        ({"drop_sublayers": 1.5}, "drop_sublayers wants a whole number, and got 1.5"),
        ({"drop_sublayers": True}, "drop_sublayers wants a whole number"),
        ({"max_damage": float("nan")}, "max_damage wants a number"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(values: dict, message: str) -> None:
    with pytest.raises(BadPlan, match=message):
        Budget.of(values)
