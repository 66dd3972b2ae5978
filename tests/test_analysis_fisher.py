"""Fisher's predictions against the exact KL of small changes, and its parts against autograd on the module."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import calibration, llama, llama_program
from torch import Tensor, nn

from lwcompile.context import Context
from lwcompile.contract import Damage, Score
from lwcompile.data import CalibrationSet
from lwcompile.errors import BadPlan
from lwcompile.executor import run
from lwcompile.metric import FeatureKl, Kl, sample_labels
from lwcompile.passes.analysis import fisher as fisher_module
from lwcompile.passes.analysis.fisher import Fisher
from lwcompile.passes.analysis.measured import Measured
from lwcompile.program import Program
from lwcompile.rundir import RunDir
from lwcompile.spec import Spec
from lwcompile.tracing import capture_module

SEVEN = Spec.parse("quantize{bits=7,group_size=16,solver=rtn}")
EIGHT = Spec.parse("quantize{bits=8,group_size=16,solver=rtn}")
DROP = Spec("drop")

Predicted = dict[tuple[str, Spec], Damage]


def context(options: dict[str, list[Spec]], rows: int = 64, **fields: object) -> Context:
    return Context(calibration=calibration(rows), metric=Kl(), options=options, batch_size=16, **fields)  # type: ignore[arg-type]


def predict(program: Program, ctx: Context, **options: object) -> Predicted:
    rows = list(Fisher(**{"solver": None, **options}).run(program, ctx))  # type: ignore[arg-type]
    return {(row[0], row[1]): row[2] for row in rows if len(row) == 3}


def exact(program: Program, ctx: Context, unit: tuple[str, ...], option: Spec) -> float:
    """The metric's damage of the edited program, in double precision from the outputs on."""
    assert ctx.metric is not None and ctx.calibration is not None
    batch = dict(ctx.calibration.samples)
    (name,) = program.main.outputs
    dense, changed = (run(p, batch)[name].double() for p in (program, ctx.edited(program, unit, [option])))
    return ctx.metric.compare(dense, changed, batch).mean().item()


def test_small_changes_are_predicted_to_their_exact_kl() -> None:
    program = llama_program(tied=False)
    sites = [s.id for s in Context().find_structure(program).of_kind("linear", "embedding")]
    ctx = context({id: [SEVEN, EIGHT] for id in sites}, groups=())
    digest = program.digest()
    found = predict(program, ctx, draws=12)
    assert len(found) == 2 * len(sites) == 46
    ratios = [damage.value / exact(program, ctx, (id,), option) for (id, option), damage in found.items()]
    # a figure from 64 samples x 12 draws has a relative standard error of sqrt(2 / 768) = 5 %
    assert max(ratios) < 1.25 and min(ratios) > 0.8
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.04)
    assert all(d.low < d.value < d.high and not d.measured and d.samples == 768 for d in found.values())
    assert program.digest() == digest


def test_intervals_hold_the_exact_kl() -> None:
    program = llama_program(tied=False)
    sites = [s.id for s in Context().find_structure(program).of_kind("linear")]
    ctx = context({id: [SEVEN] for id in sites}, groups=())
    found = predict(program, ctx)
    inside = [d.low <= exact(program, ctx, (id,), option) <= d.high for (id, option), d in found.items()]
    assert sum(inside) >= 0.8 * len(inside)


def test_sites_that_go_together_are_predicted_together() -> None:
    program = llama_program()
    fused, tied = tuple(f"block0.attention.{x}_proj" for x in "qkv"), ("embedding", "head")
    ctx = context({id: [SEVEN] for id in (*fused, *tied)})
    found = predict(program, ctx, draws=12)
    for unit in (fused, tied):
        whole = sum(found[id, SEVEN].value for id in unit)
        assert whole == pytest.approx(exact(program, ctx, unit, SEVEN), rel=0.2)
    assert found["head", SEVEN].value == 0


def test_predictions_rank_as_measurements_do() -> None:
    from lwcompile.calibration import calibrate, rank_correlation

    program = llama_program()
    options = [Spec.parse(f"quantize{{bits={b},group_size=16,solver=rtn}}") for b in (3, 4, 6)]
    sites = [s.id for s in Context().find_structure(program).of_kind("linear")]
    ctx = context({id: options for id in sites if id != "head"}, rows=16)
    found = predict(program, ctx, draws=2)
    measured = {(id, option): damage for id, option, damage in Measured().run(program, ctx)}
    assert rank_correlation(found, measured) > 0.9
    few = dict(list(measured.items())[::5])
    assert calibrate(found, few).error < 0.7


def test_a_dropped_branch_is_judged_by_its_output_and_gradient() -> None:
    """Against 1/2 of the variance under p of the logits' first-order change, by forward differentiation of the module."""
    program, model = llama_program(), llama()
    rows = calibration(4).samples["input_ids"]
    ctx = context({"block2.mlp": [DROP]}, rows=4)
    found = predict(program, ctx, draws=400)["block2.mlp", DROP].value
    seen: dict[str, Tensor] = {}

    def see(name: str, value: object) -> None:
        assert isinstance(value, Tensor)
        seen[name] = value.detach()

    layer = model.get_submodule("model.layers.2")
    handles = [
        layer.get_submodule("mlp").register_forward_hook(lambda _m, _a, out: see("branch", out)),
        layer.get_submodule("post_attention_layernorm").register_forward_pre_hook(lambda _m, args: see("stream", args[0])),
    ]
    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits
    for handle in handles:
        handle.remove()
    norm, head = model.get_submodule("model.norm"), model.get_submodule("lm_head")
    branch, stream = seen["branch"], seen["stream"]
    moved = torch.func.jvp(lambda y: head(norm(stream + y)), (branch,), (-branch,))[1]
    p = logits.softmax(-1)
    variance = (p * moved.square()).sum(-1) - (p * moved).sum(-1).square()
    assert found == pytest.approx(0.5 * variance.mean().item(), rel=0.1)


def test_linears_without_options_get_the_trace_of_their_fisher_information() -> None:
    """Against per-label gradients of the module's own weights, weighted by the labels' probabilities."""
    program, model = llama_program(), llama()
    ctx = context({}, rows=1)
    scores = {row[0]: row[1] for row in Fisher(solver=None, draws=600).run(program, ctx) if isinstance(row[1], Score)}
    assert len(scores) == 22
    weight = model.get_parameter("model.layers.1.self_attn.o_proj.weight")
    log_p = model(input_ids=calibration(1).samples["input_ids"], use_cache=False).logits[0].log_softmax(-1)
    total = 0.0
    for t in range(len(log_p)):
        for label in range(log_p.shape[1]):
            if (p := log_p[t, label].exp().item()) > 1e-5:
                gradient = torch.autograd.grad(log_p[t, label], weight, retain_graph=True)[0]
                total += p * gradient.square().sum().item()
    assert scores["block1.attention.o_proj"].value == pytest.approx(total / len(log_p), rel=0.15)  # type: ignore[union-attr]


class Pooled(nn.Module):
    """Features of a sample, behind a layer that flattens batch and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.first(x))
        flat = self.second(hidden.reshape(-1, 8))
        return {"features": flat.reshape(x.shape[0], -1, 5).mean(1)}


def test_features_are_scored_group_by_group() -> None:
    torch.manual_seed(0)
    x = torch.randn(96, 3, 6)
    graph, _ = capture_module(Pooled().eval(), {"x": x[:4]}, {"x": {0: "batch"}})
    program = Program({"forward": graph}, graph.store)
    sites = [s.id for s in Context().find_structure(program).of_kind("linear")]
    option = Spec.parse("quantize{bits=7,group_size=none,solver=rtn}")
    ctx = Context(
        calibration=CalibrationSet({"x": x}, "tensors", "noise"),
        metric=FeatureKl(0.5, batch=32),
        options={id: [option] for id in sites},
    )
    found = predict(program, ctx, draws=300)
    assert len(found) == 2
    for (id, _), damage in found.items():
        assert damage.samples == 900
        assert damage.value == pytest.approx(exact(program, ctx, (id,), option), rel=0.25)


def test_rows_flattened_over_batch_and_positions_still_count_sample_bysample_labels() -> None:
    torch.manual_seed(0)
    x = torch.randn(96, 3, 6)
    graph, _ = capture_module(Pooled().eval(), {"x": x[:4]}, {"x": {0: "batch"}})
    program = Program({"forward": graph}, graph.store)
    sites = [s.id for s in Context().find_structure(program).of_kind("linear")]
    option = Spec.parse("quantize{bits=7,group_size=none,solver=rtn}")
    samples = CalibrationSet({"x": x}, "tensors", "noise")
    ctx = Context(calibration=samples, metric=Kl(), options={id: [option] for id in sites}, batch_size=16)
    found = predict(program, ctx, draws=20)
    for (id, _), damage in found.items():
        assert damage.samples == 96 * 20
        assert damage.value == pytest.approx(exact(program, ctx, (id,), option), rel=0.2)


def test_the_anchor_is_solved_by_the_options_own_solver_and_the_rest_by_the_cheap_one() -> None:
    program, site = llama_program(), "block1.mlp.down_proj"
    options = [Spec.parse(f"quantize{{bits={b},group_size=16,solver=gptq}}") for b in (4, 6, 8)]
    found = predict(program, context({site: options}), solver=Fisher().solver)
    own = predict(program, context({site: options}), solver=None)
    assert found[site, options[1]] == own[site, options[1]]
    assert found[site, options[0]] != own[site, options[0]]
    assert found[site, options[0]].value > found[site, options[1]].value > found[site, options[2]].value > 0


def test_a_second_run_computes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"block1.mlp.down_proj": [SEVEN, EIGHT], "final_norm": [SEVEN]}
    ctx = context(options, rundir=RunDir(tmp_path))
    first = list(Fisher(solver=None).run(llama_program(), ctx))
    (remark,) = ctx.remarks
    assert remark.site == "final_norm" and remark.kind == "refused"

    def fail(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(fisher_module, "Moves", fail)
    assert list(Fisher(solver=None).run(llama_program(), context(options, rundir=RunDir(tmp_path)))) == first
    with pytest.raises(AssertionError, match="computed again"):
        list(Fisher(solver=None, draws=2).run(llama_program(), context(options, rundir=RunDir(tmp_path))))


def test_memory_is_bounded_by_files(tmp_path: Path) -> None:
    options = {"block1.mlp.down_proj": [SEVEN], "head": [SEVEN], "embedding": [SEVEN]}
    resident = predict(llama_program(), context(options, rows=16))
    spilled = predict(llama_program(), context(options, rows=16, memory=0, workdir=tmp_path))
    assert spilled == resident


def test_options_are_checked() -> None:
    with pytest.raises(BadPlan, match="at least one"):
        Fisher(solver=None, tokens=0)


def test_one_option_of_a_site_stands_for_its_other_widths() -> None:
    program = llama_program(tied=False)
    options = [Spec.parse(f"quantize{{bits={b},group_size=16,solver=rtn}}") for b in (5, 6, 7, 8)]
    sites = [s.id for s in Context().find_structure(program).of_kind("linear")]
    ctx = context({id: options for id in sites}, groups=())
    truth = predict(program, ctx, draws=20)
    found = predict(program, ctx, draws=20, solver=Fisher().solver)
    assert found.keys() == truth.keys()
    assert all(found[id, options[1]] == truth[id, options[1]] for id in sites)  # the middle one, moved by itself
    errors = torch.tensor([math.log(found[key].value / truth[key].value) for key in truth])
    assert errors.square().mean().sqrt() < 0.25 and abs(errors.mean()) < 0.06
    inside = [found[key].low <= truth[key].value * 1.15 and truth[key].value <= found[key].high * 1.15 for key in truth]
    assert sum(inside) / len(inside) > 0.8


def test_what_the_metric_does_not_read_costs_nothing() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.aside = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.first(x)
            return {"logits": hidden, "aside": self.aside(hidden)}

    graph, _ = capture_module(Unread(), {"x": torch.randn(4, 8)}, {"x": {0: "batch"}})
    program = Program({"forward": graph}, graph.store)
    site = next(s.id for s in Context().find_structure(program).of_kind("linear") if "aside" in s.path)
    options = [Spec.parse(f"quantize{{bits={b},group_size=none,solver=rtn}}") for b in (3, 4)]
    samples = CalibrationSet({"x": torch.randn(16, 8)}, "tensors", "noise")
    ctx = Context(calibration=samples, metric=Kl(), options={site: options}, batch_size=16)
    assert [d.value for d in predict(program, ctx, solver=Fisher().solver).values()] == [0.0, 0.0]


def test_labels_are_drawn_as_often_as_the_model_says() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = sample_labels(p.log().expand(20000, 6), torch.Generator().manual_seed(0))
    counted = torch.bincount(drawn.flatten(), minlength=6) / 20000
    assert drawn.shape == (20000, 1) and (counted[p == 0] == 0).all()
    torch.testing.assert_close(counted, p, atol=0.015, rtol=0)


def test_some_transforms_may_be_asked_for_alone() -> None:
    program, joined = llama_program(), Spec.parse("prune_mlp + quantize{bits=7,group_size=16,solver=rtn}")
    ctx = context({"block0.mlp": [DROP, joined], "block0.mlp.down_proj": [SEVEN]})
    asked = lambda **options: {option for _, option in predict(program, ctx, **options)}  # noqa: E731
    assert asked() == {DROP, joined, SEVEN}
    assert asked(joint=False) == {DROP, SEVEN}
    assert asked(only="quantize") == {SEVEN} and asked(only=("drop", "quantize")) == {DROP, SEVEN}
