"""Solvers against textbook references: brute force for round-to-nearest, unblocked float64 GPTQ, and what must improve."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwcompile.errors import BadInput, BadPlan
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.passes.solve.gptq import Gptq, factorize
from lwcompile.passes.solve.hqq import Hqq
from lwcompile.passes.solve.rtn import Rtn
from lwcompile.registry import make
from lwcompile.stats import InputStats, proxy_loss

ZERO_POINTS = ["none", "integer", "float"]
MIN_MAX = Rtn(steps=1, refits=0)
FORMATS = st.builds(
    NumericFormat,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 8, 16, 32]),
    zero_point=st.sampled_from(ZERO_POINTS),
    scale_dtype=st.sampled_from(["float16", "float32"]),
)


def correlated(features: int, tokens: int = 600, seed: int = 0) -> InputStats:
    """Inputs whose covariance has a decaying spectrum and channels of unequal energy, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(features, features, generator=generator))[0]
    x = torch.randn(tokens, features, generator=generator) * torch.logspace(0, -1.5, features) @ mix
    stats = InputStats(features)
    stats.update(x * torch.exp(torch.randn(features, generator=generator)))
    return stats


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1000)) * 0.05


def squared(weight: torch.Tensor, quantized: QuantizedTensor) -> float:
    return (weight - quantized.dequantize()).double().square().sum().item()


# --- input statistics


def test_statistics_are_weighted_second_moments():
    x, w = torch.randn(3, 7, 5), torch.rand(3, 7)
    stats = InputStats(5)
    for part, weight in zip(x, w):
        stats.update(part, weight)
    flat, mass = x.reshape(-1, 5).double(), w.reshape(-1).double()
    wanted = 2 * sum(m * torch.outer(row, row) for m, row in zip(mass, flat)) / mass.sum()
    torch.testing.assert_close(stats.hessian.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.energy, stats.hessian.diagonal())
    torch.testing.assert_close(stats.mean_abs.double(), (mass[:, None] * flat.abs()).sum(0) / mass.sum())
    assert stats.tokens == 21
    doubled = InputStats(5)
    doubled.update(x, w * 2)
    torch.testing.assert_close(doubled.hessian, stats.hessian)


def test_proxy_loss_is_the_mean_squared_output_error():
    x, weight = torch.randn(200, 24), weights(6, 24)
    stats = InputStats(24)
    stats.update(x)
    quantized = Rtn().solve(weight, NumericFormat(3, 8), None)
    direct = (x @ (weight - quantized.dequantize()).T).double().square().sum(1).mean().item()
    assert proxy_loss(weight, quantized, stats) == pytest.approx(direct, rel=1e-4)


def test_statistics_refuse_what_is_not_there():
    stats = InputStats(4)
    with pytest.raises(BadInput, match="seen no tokens"):
        _ = stats.hessian
    with pytest.raises(BadInput, match="channels"):
        stats.update(torch.randn(2, 5))
    with pytest.raises(BadInput, match="token weights"):
        stats.update(torch.randn(2, 4), torch.ones(3))
    stats.update(torch.tensor([[1.0, torch.nan, 0, 0]]))
    with pytest.raises(BadInput, match="NaN"):
        Gptq().solve(weights(2, 4), NumericFormat(4), stats)


# --- round to nearest


def test_the_range_search_finds_the_brute_force_optimum():
    """Within 1 % of the best over a dense grid of scales and every zero point, for groups of 64 in 3 bits."""
    groups, format = weights(12, 64), NumericFormat(3, 64, "integer", "float32")
    found = (groups - Rtn().solve(groups, format, None).dequantize()).square().sum(1)
    best = torch.full((12,), torch.inf)
    full = (groups.amax(1) - groups.amin(1)) / 7
    for scale in (full.unsqueeze(1) * factor for factor in torch.linspace(0.3, 1.1, 400)):
        for zero in range(8):
            codes = (groups / scale + zero).round().clamp(0, 7)
            best = torch.minimum(best, ((codes - zero) * scale - groups).square().sum(1))
    assert (found >= best * 0.999).all()
    assert found.sum() <= best.sum() * 1.01


@given(format=FORMATS, seed=st.integers(0, 100), columns=st.integers(1, 70))
@settings(max_examples=40)
def test_search_is_never_worse_than_min_max(format, seed, columns):
    weight = weights(3, columns, seed)
    searched = squared(weight, Rtn().solve(weight, format, None))
    assert searched <= squared(weight, MIN_MAX.solve(weight, format, None)) * (1 + 1e-5)


@given(format=FORMATS, seed=st.integers(0, 100), columns=st.integers(1, 70))
@settings(max_examples=40)
def test_min_max_stays_within_half_a_step(format, seed, columns):
    """Of the stored grid; a rounded scale or zero point may cut a range by a little, and symmetric ones on one side."""
    weight = weights(3, columns, seed)
    quantized = MIN_MAX.solve(weight, format, None)
    step = quantized.scale.float().abs().repeat_interleave(format.group(columns), 1)[:, :columns]
    error = (quantized.dequantize() - weight).abs()
    allowed = {"none": 1.0, "integer": 1.0, "float": 0.5}[format.zero_point]
    assert (error <= step * (allowed + 2 ** (format.bits - 10) + 0.02)).all()


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("solver", ["rtn", "hqq", "gptq"])
def test_eight_bits_are_near_lossless(solver, zero_point):
    """A normal group of 64 reaches about 3.5 sigma: one of 128 steps on its longer side errs by 3.5/128/sqrt(12) sigma."""
    weight, stats = weights(32, 200), correlated(200)
    quantized = make("solvers", solver).solve(weight, NumericFormat(8, 64, zero_point), stats)
    assert proxy_loss(weight, quantized, stats) < 0.008**2 * proxy_loss(weight, torch.zeros_like(weight), stats)


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 8, 16]),
    zero_point=st.sampled_from(ZERO_POINTS),
    seed=st.integers(0, 100),
)
@settings(max_examples=40)
def test_min_max_rounding_is_idempotent(bits, group, zero_point, seed):
    """With float32 scales: rounded to float16, a group may come back a code short of its range."""
    format = NumericFormat(bits, group, zero_point, "float32")
    once = MIN_MAX.solve(weights(4, 40, seed), format, None).dequantize()
    torch.testing.assert_close(MIN_MAX.solve(once, format, None).dequantize(), once, rtol=1e-5, atol=1e-7)


def test_symmetric_ranges_reach_further_on_the_side_of_the_extreme():
    quantized = MIN_MAX.solve(torch.tensor([[-1.0, 0.5, 7.0, 8.0]]), NumericFormat(4, None, "none", "float32"), None)
    assert quantized.scale.item() == -1 and quantized.codes.tolist()[0][-1] == 0
    assert torch.equal(quantized.dequantize()[0, [0, 2, 3]], torch.tensor([-1.0, 7.0, 8.0]))


def test_importance_moves_error_to_quiet_channels():
    weight, stats = weights(64, 64), correlated(64)
    format = NumericFormat(3, 32)
    error = {
        key: (Rtn().solve(weight, format, s).dequantize() - weight).square() @ stats.energy
        for key, s in {"plain": None, "weighted": stats}.items()
    }
    assert error["weighted"].sum() < error["plain"].sum()


# --- every solver


@pytest.mark.parametrize("solver", ["rtn", "hqq", "gptq"])
def test_a_q4_1_weight_is_reproduced_by_a_float_zero_point(solver):
    """GGUF's Q4_1: w = code * d + m in groups of 32. Every group spans its range, as its quantizer makes it."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (24, 3, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    d, m = torch.rand(24, 3, 1, generator=generator) * 0.02 + 0.001, torch.randn(24, 3, 1, generator=generator) * 0.1
    weight = (codes * d + m).reshape(24, 96)
    quantized = make("solvers", solver).solve(weight, NumericFormat(4, 32, "float", "float32"), correlated(96))
    assert torch.equal(quantized.codes, codes.reshape(24, 96).to(torch.uint8))
    torch.testing.assert_close(quantized.dequantize(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", ["rtn", "hqq", "gptq"])
@given(format=FORMATS, seed=st.integers(0, 100), rows=st.integers(1, 4), columns=st.integers(1, 50))
@settings(max_examples=15)
def test_what_a_solver_returns_packs_and_is_finite(solver, format, seed, rows, columns):
    weight = weights(rows, columns, seed)
    weight[:, : columns // 3] = 0
    quantized = make("solvers", solver).solve(weight, format, correlated(columns, seed=seed))
    back = QuantizedTensor.unpack(format, (rows, columns), quantized.pack())
    assert torch.isfinite(back.dequantize()).all() and (back.scale != 0).all()
    assert torch.equal(back.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("solver", ["rtn", "hqq", "gptq"])
def test_dead_tiny_huge_and_constant_groups(solver, zero_point):
    weight = weights(6, 64)
    weight[0] = 0
    weight[1] *= 1e-8
    weight[2] *= 1e9
    weight[3] = 0.3
    weight[4] = -0.3
    quantized = make("solvers", solver).solve(weight, NumericFormat(4, 32, zero_point), correlated(64))
    out = quantized.dequantize()
    assert torch.isfinite(quantized.scale.float()).all() and torch.isfinite(out).all()
    assert (out[0] == 0).all()
    torch.testing.assert_close(out[3:5], weight[3:5], rtol=2e-3, atol=0)
    alone = make("solvers", solver).solve(weight[5:], NumericFormat(4, 32, zero_point), correlated(64))
    assert torch.equal(out[5:], alone.dequantize())


@pytest.mark.parametrize("solver", ["rtn", "hqq", "gptq"])
def test_solvers_refuse_nan_and_shapes_that_are_no_matrix(solver):
    stats = correlated(16)
    bad = weights(4, 16)
    bad[1, 2] = torch.nan
    for weight in (bad, weights(4, 16)[0], weights(4, 16).to(torch.int8), torch.empty(0, 16)):
        with pytest.raises(BadInput):
            make("solvers", solver).solve(weight, NumericFormat(4), stats)


@pytest.mark.parametrize(
    "spec",
    [
        "rtn{steps=0}", "rtn{shrink=0.0}", "rtn{refits=-1}", "hqq{p=0.0}", "hqq{iters=0}",
        "gptq{damp=0.0}", "gptq{channel_damp=-0.1}", "gptq{block=0}", "gptq{rounds=-1}",
    ],
)  # fmt: skip
def test_solvers_refuse_options_that_mean_nothing(spec):
    with pytest.raises(BadPlan):
        make("solvers", spec)


# --- HQQ


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_lowers_the_p_norm_of_the_error(bits, zero_point):
    weight = weights(64, 256) + weights(64, 256, 1) ** 3 * 40  # heavy tails
    format = NumericFormat(bits, 64, zero_point)

    def norm(solver: Any) -> float:
        return (solver.solve(weight, format, None).dequantize() - weight).abs().pow(0.7).sum().item()

    assert norm(Hqq()) < norm(MIN_MAX) * 0.995


# --- GPTQ


def textbook_gptq(weight: torch.Tensor, stats: InputStats, grid: QuantizedTensor, damp: float) -> torch.Tensor:
    """Frantar et al., algorithm 1 in float64: inverse Hessian, one column at a time, no blocks; on a given grid."""
    w, hessian = weight.double().clone(), stats.hessian.double()
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    group = grid.format.group(w.shape[1])
    for k in range(w.shape[1]):
        scale = grid.scale[:, k // group].double()
        zero = grid.format.center if grid.zero is None else grid.zero[:, k // group].double()
        code = (w[:, k] / scale + zero).round().clamp(0, grid.format.top)
        error = (w[:, k] - (code - zero) * scale) / inverse[k, k]
        w[:, k:] -= torch.outer(error, inverse[k, k:])
        codes[:, k] = code
    return codes


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize(("columns", "group", "block"), [(48, 16, 128), (50, 16, 16), (37, None, 8), (64, 32, 24)])
def test_gptq_gives_the_codes_of_the_textbook(columns, group, block, zero_point):
    weight, stats, format = weights(12, columns), correlated(columns), NumericFormat(4, group, zero_point)
    quantized = Gptq(channel_damp=0.0, act_order=False, block=block, steps=1, refits=0, rounds=0).solve(weight, format, stats)
    grid = MIN_MAX.solve(weight, format, None)
    assert torch.equal(quantized.scale, grid.scale)
    assert torch.equal(quantized.codes, textbook_gptq(weight, stats, grid, damp=0.01))


def test_act_order_is_the_textbook_on_permuted_columns():
    weight, stats, format = weights(12, 40), correlated(40), NumericFormat(4, None)
    order = stats.energy.argsort(descending=True)
    permuted = InputStats(40)
    permuted._gram, permuted._magnitude = stats._gram[order][:, order], stats._magnitude[order]
    permuted.weight = stats.weight
    grid = MIN_MAX.solve(weight, format, None)
    codes = textbook_gptq(weight[:, order], permuted, grid, damp=0.01)
    quantized = Gptq(channel_damp=0.0, steps=1, refits=0, rounds=0).solve(weight, format, stats)
    assert torch.equal(quantized.codes[:, order], codes)


@given(
    bits=st.integers(2, 6),
    group=st.sampled_from([None, 16, 24]),
    zero_point=st.sampled_from(ZERO_POINTS),
    act_order=st.booleans(),
    columns=st.integers(24, 72),
    seed=st.integers(0, 100),
)
@settings(max_examples=30)
def test_gptq_loses_less_than_round_to_nearest(bits, group, zero_point, act_order, columns, seed):
    weight, stats = weights(24, columns, seed), correlated(columns, seed=seed)
    format = NumericFormat(bits, group, zero_point)
    gptq = proxy_loss(weight, Gptq(act_order=act_order).solve(weight, format, stats), stats)
    assert gptq <= proxy_loss(weight, Rtn().solve(weight, format, stats), stats)


@given(zero_point=st.sampled_from(ZERO_POINTS), bits=st.integers(2, 4), seed=st.integers(0, 100))
@settings(max_examples=20)
def test_each_round_of_descent_lowers_the_damped_loss(zero_point, bits, seed):
    weight, stats = weights(16, 60, seed), correlated(60, seed=seed)
    format = NumericFormat(bits, 16, zero_point)
    damped, _, _ = factorize(stats.hessian.double(), 0.01, Gptq.channel_damp)
    losses = []
    for rounds in range(4):
        error = (weight - Gptq(rounds=rounds).solve(weight, format, stats).dequantize()).double()
        losses.append(((error @ damped.double()) * error).sum().item())
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_one_descent_leaves_no_code_that_a_step_would_better():
    """A fixed point of the sweeps: no single code can move by one and lower the damped loss."""
    weight, stats, format = weights(3, 20), correlated(20), NumericFormat(3, None)
    quantized = Gptq(rounds=30).solve(weight, format, stats)
    damped = factorize(stats.hessian.double(), 0.01, Gptq.channel_damp)[0].double()

    def losses(codes: torch.Tensor) -> torch.Tensor:
        other = QuantizedTensor(format, codes.to(torch.uint8), quantized.scale, quantized.zero)
        error = (weight - other.dequantize()).double()
        return ((error @ damped) * error).sum(1)

    least = losses(quantized.codes)
    for k in range(20):
        for step in (-1, 1):
            moved = quantized.codes.int()
            moved[:, k] = (moved[:, k] + step).clamp(0, format.top)
            assert (losses(moved) >= least * (1 - 1e-5)).all()


def test_dead_channels_and_few_tokens_are_no_obstacle():
    x = torch.randn(5, 40)  # rank 5
    x[:, 7] = 0
    stats = InputStats(40)
    stats.update(x)
    weight, format = weights(8, 40), NumericFormat(4, 16)
    quantized = Gptq().solve(weight, format, stats)
    assert proxy_loss(weight, quantized, stats) < proxy_loss(weight, Rtn().solve(weight, format, stats), stats) / 2
    assert (quantized.dequantize() - weight).abs().max() < 0.1
    silent = InputStats(40)
    silent.update(torch.zeros(5, 40))
    assert torch.isfinite(Gptq().solve(weight, format, silent).dequantize()).all()


def test_damping_grows_until_h_can_be_factorized():
    indefinite = torch.eye(6, dtype=torch.float64)
    indefinite[0, 0] = -0.05
    damped, feedback, pivots = factorize(indefinite, 0.01)
    assert (pivots > 0).all() and damped[1, 1] > 1.05
    unit = feedback.double() + torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(unit @ torch.diag(pivots) @ unit.T, damped.double())
    indefinite[0, 0] = -50
    with pytest.raises(BadInput, match="positive definite"):
        factorize(indefinite, 0.01)


def test_gptq_refuses_to_work_without_matching_statistics():
    with pytest.raises(BadInput, match="calibration"):
        Gptq().solve(weights(4, 16), NumericFormat(4), None)
    with pytest.raises(BadInput, match="channels"):
        Gptq().solve(weights(4, 16), NumericFormat(4), correlated(17))
