"""Scores that become damages: the fit against data made by its own model, and a run whose only prices come from a score."""

from __future__ import annotations

import math
import random

import pytest
from tiny import calibration, llama_program

from lwcompile.calibration import calibrate_options
from lwcompile.context import Context
from lwcompile.contract import Damage, Score
from lwcompile.errors import BadInput
from lwcompile.metric import Kl
from lwcompile.passes.analysis.influence import LayerInputModification
from lwcompile.passes.analysis.measured import Measured
from lwcompile.scoring import price_by_scores
from lwcompile.spec import Spec

THREE, FOUR, DROP = (
    Spec.parse(s) for s in ("quantize{bits=3,group_size=16,solver=rtn}", "quantize{bits=4,group_size=16,solver=rtn}", "drop")
)


def test_options_share_a_slope_and_have_their_own_heights():
    scores = {f"s{k}": 1.5**k for k in range(12)}
    truth = {"a": (0.7, -3.0), "b": (0.7, 1.0)}
    measured = {(s, o): math.exp(h + k * math.log(x)) for s, x in scores.items() for o, (k, h) in truth.items()}
    few = {key: measured[key] for key in random.Random(0).sample(sorted(measured), 9)}
    lines = calibrate_options(scores, few)
    assert lines["a"].error < 1e-9 and lines["a"].points == 9
    for (s, o), value in measured.items():
        assert lines[o].damage(scores[s]).value == pytest.approx(value, rel=1e-9)


def test_noise_shows_in_the_error_and_the_interval():
    draw = random.Random(1)
    scores = {k: math.exp(draw.uniform(-3, 3)) for k in range(200)}
    measured = {(k, "o"): math.exp(math.log(x) + draw.gauss(0, 0.4)) for k, x in scores.items()}
    line = calibrate_options(scores, measured)["o"]
    assert line.error == pytest.approx(0.4, rel=0.15) and line.slope == pytest.approx(1, abs=0.05)
    inside = [line.damage(x).low <= measured[k, "o"] <= line.damage(x).high for k, x in scores.items()]
    assert 0.9 <= sum(inside) / len(inside) <= 0.99


def test_two_points_are_too_few():
    with pytest.raises(BadInput, match="at least 3"):
        calibrate_options({"a": 1.0, "b": 2.0}, {("a", "o"): 0.1, ("b", "o"): 0.2})


def test_one_unmeasured_score_of_nothing_keeps_the_fit_out_of_the_logarithm():
    scores = {"a": 1.0, "b": 2.0, "c": 3.0, "never": 0.0}
    line = calibrate_options(scores, {(k, "o"): 0.1 * scores[k] for k in "abc"})["o"]
    assert not line.logarithmic and line.damage(0.0).value > 0.01


def test_options_measured_once_each_have_no_error_to_tell():
    with pytest.raises(BadInput, match="two sites"):
        calibrate_options({"a": 1.0, "b": 2.0, "c": 3.0}, {("a", "o"): 0.1, ("b", "p"): 0.2, ("c", "q"): 0.3})


def context(options: dict[str, list[Spec]]) -> Context:
    return Context(calibration=calibration(), metric=Kl(), options=options, batch_size=3)


def test_a_score_prices_what_was_not_measured():
    program = llama_program()
    sites = Context().find_structure(program).sites
    options = {id: [THREE, FOUR] for id, site in sites.items() if site.kind == "linear" and id != "head"}
    ctx = context(options)
    found: dict[str, dict[Spec, Damage]] = {}
    for id, option, damage in Measured(units=4).run(program, ctx):
        found.setdefault(id, {})[option] = damage
    units = ctx.units(program, options)
    measured = {unit for unit in units if unit[0] in found}
    assert len(measured) == 4 < len(units)
    scores = {id: Score(1.0 + k) for k, id in enumerate(sites)}
    price_by_scores(ctx, program, "order", scores, found)
    assert found.keys() == options.keys()
    assert all(found[u[0]][o].measured == (u in measured) for u in units for o in (THREE, FOUR))
    assert all(found[id][THREE].value >= found[id][FOUR].value for id in found if (id,) not in measured)
    assert "measured" in ctx.remarks[-1].text


def test_sites_without_a_score_take_that_of_the_sublayer_above():
    program = llama_program()
    sites = Context().find_structure(program).sites
    ctx = context({id: [FOUR] for id, site in sites.items() if site.kind == "linear" and ".mlp." in id})
    scores: dict[str, Score] = {row[0]: row[1] for row in LayerInputModification().run(program, ctx) if isinstance(row[1], Score)}
    assert not scores.keys() & ctx.options.keys()
    found = {id: {FOUR: Damage(0.01 * (k + 1), measured=True)} for k, id in enumerate(list(ctx.options)[:6])}
    price_by_scores(ctx, program, "lim", scores, found)
    assert found.keys() == ctx.options.keys()


def test_without_measured_damages_a_score_prices_nothing_and_says_so():
    program = llama_program()
    ctx = context({"block0.mlp.down_proj": [FOUR], "block1.mlp.down_proj": [FOUR]})
    found: dict[str, dict[Spec, Damage]] = {}
    price_by_scores(ctx, program, "order", {id: Score(1.0) for id in ctx.options}, found)
    assert not found and "add an analysis that measures a few units" in ctx.remarks[0].text
