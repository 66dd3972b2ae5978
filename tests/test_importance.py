"""The importance of tokens against gradients of the module itself, and the drift of inputs against least squares."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny import calibration, llama, llama_program
from torch import Tensor

from lwcompile.apply import SequentialPrefix, apply_plan
from lwcompile.budget import Budget
from lwcompile.context import Context
from lwcompile.contract import Wanted
from lwcompile.formats import NumericFormat
from lwcompile.importance import importance_of, token_importance, token_weights
from lwcompile.metric import Kl, UserMetric, sample_labels
from lwcompile.passes.solve.gptq import Gptq
from lwcompile.plans import Plan
from lwcompile.prefix import Cursor
from lwcompile.program import Program
from lwcompile.recipe import Recipe
from lwcompile.session import Session
from lwcompile.spec import Spec
from lwcompile.stats import InputStats
from lwcompile.structure import find_structure

THREE = Spec.parse("quantize{bits=3,group_size=16,solver=gptq}")


def agreement(dense: Tensor, compressed: Tensor, inputs: object) -> Tensor:
    return -(dense.argmax(-1) == compressed.argmax(-1)).float().mean((1,))


def known(program: Program, rows: int = 8) -> Context:
    return Context(
        calibration=calibration(rows), metric=Kl(), program=program, structure=find_structure(program), batch_size=rows
    )


def test_importance_is_the_energy_of_the_gradient_at_the_layers_output():
    model: Any = deepcopy(llama(tied=False))  # the model is everybody's, and hooks stay
    program = llama_program(tied=False)
    ctx = known(program)
    found = token_importance(program, ctx.find_structure(program).of_kind("linear"), ctx)
    seen: list[Tensor] = []

    def watch(_: object, __: object, out: Tensor) -> None:
        out.register_hook(seen.append)

    model.model.layers[1].mlp.down_proj.register_forward_hook(watch)
    ids = ctx.need_calibration().samples["input_ids"]
    log_p = model.requires_grad_()(input_ids=ids).logits.flatten(0, 1).log_softmax(-1)
    labels = sample_labels(log_p.detach(), torch.Generator().manual_seed(0))
    log_p.gather(1, labels).sum().backward()
    torch.testing.assert_close(found["block1.mlp.down_proj"], seen[0].square().sum(-1).flatten(), rtol=1e-3, atol=1e-6)
    assert torch.equal(found["block0.attention.q_proj"], found["block0.attention.v_proj"])  # fed one tensor


def test_a_metric_without_a_distribution_is_noted_once():
    program = llama_program(tied=False)
    ctx = known(program)
    ctx.metric = UserMetric("tests:none", lambda *_: 0.0)
    sites = ctx.find_structure(program).of_kind("linear")
    assert all(ctx.stats_of(program.main, site, Wanted(importance=1.0)) for site in sites)
    assert [r.text for r in ctx.remarks if "count alike" in r.text] == [ctx.remarks[0].text]


def test_a_layer_that_the_dense_model_feeds_other_tokens_is_named():
    program = llama_program(tied=False)
    ctx = known(program, rows=8)
    prefix = SequentialPrefix(program, ctx, ())
    ctx.program = llama_program(tied=False, layers=1)
    site = ctx.find_structure(program).sites["block2.mlp.down_proj"]
    stats = prefix.stats(site, Wanted(drift=True))
    assert stats is not None and stats.drift is None
    assert [(r.site, "drift" in r.text) for r in ctx.remarks] == [(site.id, True)]


def test_weights_have_a_floor_and_follow_the_power():
    weights = token_weights(torch.tensor([0.0, 1.0, 3.0]), 0.5)
    torch.testing.assert_close(weights, torch.tensor([1e-4, 0.75, 2.25]) ** 0.5)


def test_weighted_statistics_weigh_each_token_by_its_importance():
    program = llama_program(tied=False)
    ctx = known(program)
    site = ctx.find_structure(program).sites["block1.mlp.down_proj"]
    ((_, x),) = ctx.activations(program, [site])
    weight = token_weights(importance_of(ctx, program)[site.id], 1.0).double()
    expected = 2 * (x.double() * weight[:, None]).T @ x.double() / weight.sum()
    stats = ctx.stats_of(program.main, site, Wanted(importance=1.0))
    assert stats is not None
    torch.testing.assert_close(stats.hessian.double(), expected, rtol=1e-4, atol=1e-5)
    even = ctx.stats_of(program.main, site, Wanted())
    assert even is not None and not torch.allclose(even.hessian, stats.hessian, rtol=1e-2)


def test_the_prefix_reports_how_far_inputs_have_drifted_from_the_dense_models():
    program = llama_program(tied=False)
    ctx = known(program)
    changed = apply_plan(program, {"block0.mlp.down_proj": [THREE]}, ctx.find_structure(program), ctx)
    site, first = (ctx.find_structure(program).sites[f"block{k}.mlp.up_proj"] for k in (1, 0))
    prefix = SequentialPrefix(changed, ctx, ())
    before, after = prefix.stats(first, Wanted(drift=True)), prefix.stats(site, Wanted(drift=True))
    assert before is not None and before.drift is not None and not before.drift.any()
    (dense,), (present,) = (Cursor(p, ctx.batches(p)).inputs_at([site.node])[site.node] for p in (program, changed))
    dense, present = dense.flatten(0, -2).double(), present.flatten(0, -2).double()
    assert after is not None and after.drift is not None
    torch.testing.assert_close(after.drift.double(), 2 * (dense - present).T @ present / len(present), rtol=1e-3, atol=1e-5)


def drifted(share: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, InputStats]:
    generator = torch.Generator().manual_seed(seed)
    weight, dense = (torch.randn(n, 32, generator=generator) for n in (24, 4096))
    present = dense @ (torch.eye(32) + 0.05 * torch.randn(32, 32, generator=generator))
    stats = InputStats(32)
    stats.update(present, dense=dense if share else None)
    return weight, dense, present, stats


def test_making_up_for_drift_is_the_least_squares_fit_to_the_dense_output():
    weight, dense, present, stats = drifted(1.0)
    made = (
        Gptq(drift=1.0, damp=1e-6, channel_damp=0.0, rounds=0)
        .solve(weight, NumericFormat(8, 16, scale_dtype="float32"), stats)
        .dequantize()
    )
    fitted = torch.linalg.lstsq(present.double(), dense.double() @ weight.double().T).solution.T
    torch.testing.assert_close(made.double(), fitted, rtol=0, atol=0.03)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_dense_output_is_met_better_the_more_drift_is_made_up_for(bits):
    weight, dense, present, stats = drifted(1.0)
    target = dense @ weight.T
    errors = [
        (Gptq(drift=share).solve(weight, NumericFormat(bits, 16), stats).dequantize() @ present.T - target.T)
        .square()
        .mean()
        .item()
        for share in (0.0, 0.5, 1.0)
    ]
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2] * 0.9, errors


def test_the_same_plan_under_another_metric_is_solved_anew(tmp_path):
    recipe = Recipe.parse("calibration: {dataset: random, samples: 4, seqlen: 8}\nevaluation: {samples: 4, seqlen: 8}")
    program = llama_program(tied=False)
    plan = Plan({"block1.mlp.down_proj": (THREE,)}, Budget())

    def compressed(metric: str, folder: str) -> str:
        run = Session(program, recipe.with_(metric=metric), tmp_path / folder)
        return run.compress(plan).digest()

    assert compressed("kl", "a") != (alone := compressed("test_importance:agreement", "b"))
    assert compressed("test_importance:agreement", "a") == alone
