"""Orders of removal: beam search against exhaustive search under a made-up oracle, re-use, and even spreads."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable

import pytest

from lwcompile.budget import Budget
from lwcompile.contract import configure
from lwcompile.errors import BadPlan, InfeasibleBudget
from lwcompile.options import Choice, Exclusion, SiteRow
from lwcompile.passes.allocate.beam import Beam
from lwcompile.passes.allocate.uniform import Uniform
from lwcompile.plans import Plan
from lwcompile.spec import Spec
from lwcompile.table import OptionTable

DROP = Spec("drop")
KINDS = ("attention", "mlp")


def table(blocks: int = 4, kinds: Iterable[str] = KINDS, alone: Callable[[str], float] = lambda id: 1.0) -> OptionTable:
    """Blocks of two sublayers with one weight each; what is in `kinds` may be removed, sublayers also take a neighbour's weight."""
    rows: list[SiteRow] = []
    exclusions: list[Exclusion] = []

    def choices(id: str, kind: str, more: Iterable[Choice] = ()) -> tuple[Choice, ...]:
        return ((Choice(DROP, alone(id), 0, silences=True),) if kind in kinds else ()) + tuple(more)

    for i in range(blocks):
        rows.append(SiteRow(f"b{i}", None, "block", 0, 0, choices(f"b{i}", "block")))
        for kind in KINDS:
            id, shares = f"b{i}.{kind}", []
            for step in (-2, -1, 1, 2) if kind in kinds else ():
                if 0 <= i + step < blocks:
                    source, spec = f"b{i + step}.{kind}", Spec.of("share", source=step)
                    pair = ((f"{id}.w", f"{source}.w"),)
                    shares.append(Choice(spec, 0.5, 0, silences=True, replaces=True, shares=pair))
                    exclusions += [Exclusion(id, spec, source, DROP)]
                    exclusions += [Exclusion(id, spec, source, Spec.of("share", source=s)) for s in (-2, -1, 1, 2)]
            rows.append(SiteRow(id, f"b{i}", kind, 100, 0, choices(id, kind, shares)))
            rows.append(SiteRow(f"{id}.w", id, "linear", 100, 400, (Choice(Spec.of("quantize", bits=4), 0.25, 50),)))
    return OptionTable("nats/token", 200 * blocks, {row.site: row for row in rows}, (), 0, tuple(exclusions))


class Oracle:
    """Damages drawn once for each set of sublayers gone; what another's weights stand in for does a tenth of that."""

    def __init__(self, made: OptionTable, seed: int) -> None:
        self.table, self.seed, self.calls = made, seed, 0

    def __call__(self, plan: Plan) -> float:
        self.calls += 1
        gone = self.table.evaluate(plan.choices).dropped
        shared = sorted(id for id, options in plan.choices.items() if options[0].name == "share")
        return self.damage(gone) + sum(self.damage([f"{id} shared"]) / 10 for id in shared)

    def damage(self, gone: Iterable[str]) -> float:
        gone = sorted(gone)
        pairs = [random.Random(f"{self.seed} {a} {b}").uniform(-1, 1) for a, b in itertools.combinations(gone, 2)]
        return sum(random.Random(f"{self.seed} {a}").uniform(0, 1) for a in gone) + sum(pairs)


def dropped(made: OptionTable, plan: Plan) -> tuple[str, ...]:
    return made.evaluate(plan.choices).dropped


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kinds", [KINDS, ("block", "attention", "mlp"), ("mlp",)])
def test_a_beam_as_wide_as_the_choice_finds_the_best_list(kinds: tuple[str, ...], seed: int) -> None:
    made = table(kinds=kinds)
    oracle = Oracle(made, seed)
    plan = Beam(width=100).allocate(made, Budget(drop_sublayers=3), oracle)
    free = [id for id in made.sublayers if id.rpartition(".")[2] in kinds]
    best = min(oracle.damage(gone) for gone in itertools.combinations(free, 3))
    assert len(dropped(made, plan)) == 3 and plan.conditional == pytest.approx(best)
    assert not made.violations(plan.choices)


def test_a_beam_of_one_goes_for_the_least_at_every_step_and_a_wider_one_asks_more() -> None:
    made = table()
    oracle = Oracle(made, 7)
    plan = Beam(width=1).allocate(made, Budget(drop_sublayers=3), oracle)
    gone: list[str] = []
    for _ in range(3):
        gone.append(min((id for id in made.sublayers if id not in gone), key=lambda id: oracle.damage([*gone, id])))
    assert set(dropped(made, plan)) == set(gone)
    assert oracle.calls == 8 + 7 + 6 <= Beam(width=1).measurements(Budget(drop_sublayers=3), len(made.sublayers))
    narrow, wide = Oracle(made, 7), Oracle(made, 7)
    cheap = table(alone=lambda id: float(id[1]))  # only those of the first two blocks may grow a list
    few = Beam(width=1, candidates=4).allocate(cheap, Budget(drop_sublayers=2), narrow)
    assert narrow.calls == 4 + 4 == Beam(width=1, candidates=4).measurements(Budget(drop_sublayers=2), 8) and all(
        id[1] in "012" for id in dropped(cheap, few)
    )
    wider = Beam(width=2).allocate(made, Budget(drop_sublayers=3), wide)
    assert wide.calls > 8 + 7 + 6 and wider.conditional <= plan.conditional  # type: ignore[operator]


def test_blocks_are_lists_of_their_own() -> None:
    made = table(kinds=("block",))
    oracle = Oracle(made, 1)
    plan = Beam(width=100).allocate(made, Budget(drop_sublayers=4), oracle)
    pairs = itertools.combinations(range(4), 2)
    best = min(pairs, key=lambda pair: oracle.damage(f"b{i}.{kind}" for i in pair for kind in KINDS))
    assert set(plan.choices) == {f"b{i}" for i in best}
    with pytest.raises(InfeasibleBudget, match="exactly 3"):
        Beam().allocate(made, Budget(drop_sublayers=3), oracle)


@pytest.mark.parametrize("seed", range(4))
def test_reuse_takes_the_nearest_kept_one_where_that_is_better(seed: int) -> None:
    made = table(blocks=5)
    oracle, budget = Oracle(made, seed), Budget(drop_sublayers=4)
    oracle.damage = lambda gone: 0.0 if not gone else sum(random.Random(f"{seed} {a}").uniform(0.5, 1) for a in gone)  # type: ignore[method-assign]
    removed = Beam().allocate(made, budget, oracle)
    again = Beam(reuse=True).allocate(made, budget, oracle)
    assert set(again.choices) == set(removed.choices), "what is re-used stands where something was removed"
    assert not made.violations(again.choices)
    assert again.conditional == pytest.approx(oracle(again)) and again.conditional < removed.conditional  # type: ignore[operator]
    for id, (option,) in again.choices.items():
        if option != DROP:  # none of its type that is kept lies nearer on that side
            i, kind, step = int(id[1]), id[2:], int(dict(option.args)["source"])  # type: ignore[arg-type]
            between = range(min(i, i + step) + 1, max(i, i + step))
            assert all(f"b{k}{kind}" in again.choices for k in between)
    assert removed.bytes == again.bytes


def test_a_size_beside_the_count_is_met_by_steps_on_predicted_damage() -> None:
    made = table()
    plan = Beam().allocate(made, Budget(drop_sublayers=2, bytes=1000), Oracle(made, 3))
    assert len(dropped(made, plan)) == 2 and (plan.bytes or math.inf) <= 1000
    assert any(option.name == "quantize" for options in plan.choices.values() for option in options)
    with pytest.raises(InfeasibleBudget, match="no plan fits"):
        Beam().allocate(made, Budget(drop_sublayers=2, bytes=1), Oracle(made, 3))


def test_a_beam_needs_a_count_and_an_oracle() -> None:
    made = table()
    with pytest.raises(BadPlan, match="drop_sublayers"):
        Beam().allocate(made, Budget(bytes=1000), Oracle(made, 0))
    with pytest.raises(BadPlan, match="nothing to measure with"):
        Beam().allocate(made, Budget(drop_sublayers=2))
    assert Beam().allocate(made, Budget(drop_sublayers=0), Oracle(made, 0)).choices == {}
    for bad in ("beam{width=0}", "beam{candidates=0}"):
        with pytest.raises(BadPlan, match="at least 1"):
            configure(Beam, Spec.parse(bad))


@pytest.mark.parametrize(
    ("blocks", "count", "gone"), [(10, 2, [2, 7]), (8, 6, [1, 2, 3, 4, 5, 6]), (7, 3, [1, 3, 5]), (5, 0, [])]
)
def test_uniform_spreads_whole_blocks(blocks: int, count: int, gone: list[int]) -> None:
    made = table(blocks, kinds=("block", "mlp"))
    plan = Uniform().allocate(made, Budget(drop_sublayers=2 * count))
    assert set(plan.choices) == {f"b{i}" for i in gone}


def test_uniform_spreads_sublayers_where_no_block_may_go() -> None:
    made = table(10)
    plan = Uniform().allocate(made, Budget(drop_sublayers=4))
    order = [list(made.sublayers).index(id) for id in plan.choices]
    assert order == [2, 7, 12, 17]
    for refused in (Budget(drop_sublayers=19), Budget(drop_sublayers=3)):
        with pytest.raises(InfeasibleBudget, match="even removals"):
            Uniform().allocate(made if refused.drop_sublayers == 19 else table(kinds=("block",)), refused)
    with pytest.raises(BadPlan, match="no other limit"):
        Uniform().allocate(made, Budget(drop_sublayers=2, bytes=100))
