"""Block influence, LIM and ZD against their formulas on the module with hooks; calibration against known lines."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import calibration, llama, llama_program
from torch import Tensor, nn

from lwcompile.calibration import calibrate, rank_correlation
from lwcompile.context import Context
from lwcompile.contract import Damage, Score, Wanted
from lwcompile.data import CalibrationSet
from lwcompile.errors import BadInput, Refused
from lwcompile.passes.analysis.influence import BlockInfluence, LayerInputModification
from lwcompile.passes.analysis.zd import ZScoreDistribution
from lwcompile.program import Program
from lwcompile.spec import KEEP, Spec
from lwcompile.tracing import capture_module


def cosine(a: Tensor, b: Tensor) -> np.ndarray:
    x, y = a.double().flatten(0, 1).numpy(), b.double().flatten(0, 1).numpy()
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


def hooked(model: nn.Module, inputs: dict[str, Tensor], names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """(first input, first output) of each module."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
            first = args[0] if args else kwargs["hidden_states"]
            seen[name] = first, out[0] if isinstance(out, tuple) else out  # type: ignore[assignment]

        return hook

    handles = [model.get_submodule(n).register_forward_hook(see(n), with_kwargs=True) for n in names]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_block_influence_is_one_minus_the_cosine_of_the_stream() -> None:
    samples = calibration()
    program, ctx = llama_program(), Context(calibration=samples)
    digest = program.digest()
    found = dict(BlockInfluence().run(program, ctx))
    layers = [f"model.layers.{i}" for i in range(3)]
    parts = [f"{layer}.{part}" for layer in layers for part in ("self_attn", "mlp")]
    seen = hooked(llama(), dict(samples.samples), layers + parts)
    assert set(found) == {f"block{i}{part}" for i in range(3) for part in ("", ".attention", ".mlp")}
    for i, layer in enumerate(layers):
        before, after = seen[layer]
        middle = before + seen[f"{layer}.self_attn"][1]
        for part, a, b in (("", before, after), (".attention", before, middle), (".mlp", middle, after)):
            assert found[f"block{i}{part}"].value == pytest.approx(1 - cosine(a, b).mean(), abs=2e-6)
            assert found[f"block{i}{part}"].samples == 96
    assert program.digest() == digest


def test_lim_is_block_influence_less_one_for_blocks_only() -> None:
    program, ctx = llama_program(), Context(calibration=calibration(), batch_size=3)
    influence = dict(BlockInfluence().run(program, ctx))
    found = dict(LayerInputModification().run(program, ctx))
    assert set(found) == {"block0", "block1", "block2"}
    for id, score in found.items():
        assert score.value == pytest.approx(influence[id].value - 1, abs=1e-12)
        assert score.spread == influence[id].spread > 0


def test_removing_one_by_one_scores_what_is_left() -> None:
    samples, model = calibration(), copy.deepcopy(llama())
    program, ctx = llama_program(), Context(calibration=samples)
    kinds = ("attention", "mlp")
    ctx.options = {s.id: [KEEP, Spec("share"), Spec("drop")] for s in ctx.find_structure(program).of_kind(*kinds)}
    digest = program.digest()
    found = dict(BlockInfluence(removals=4).run(program, ctx))
    parts = {f"block{i}.{kind}": f"model.layers.{i}.{part}" for i in range(3) for kind, part in zip(kinds, ("self_attn", "mlp"))}
    norms = [f"model.layers.{i}.{norm}_layernorm" for i in range(3) for norm in ("input", "post_attention")]
    gone: list[str] = []

    def influence() -> dict[str, float]:
        """By the inputs of the norms, between which the sublayers lie; removed ones put out zeros."""
        seen = hooked(model, dict(samples.samples), [*norms, "model.norm"])
        stream = [seen[name][0] for name in [*norms, "model.norm"]]
        return {id: 1 - cosine(*stream[k : k + 2]).mean() for k, id in enumerate(parts) if id not in gone}

    values = []
    for _ in range(4):
        left = influence()
        gone.append(min(left, key=left.__getitem__))
        values.append(max([left[gone[-1]], *values]))
        zero = lambda module, args, out: (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else out * 0  # noqa: E731
        model.get_submodule(parts[gone[-1]]).register_forward_hook(zero)
    sublayers = [id for id in found if "." in id]
    assert sublayers[:4] == gone and set(sublayers) == set(parts)
    assert [found[id].value for id in gone] == pytest.approx(values, abs=2e-6)
    for id, value in influence().items():
        assert found[id].value == pytest.approx(max(value, *values), abs=2e-6)
    assert sorted(found[id].value for id in sublayers) == [found[id].value for id in sublayers[:4]] + sorted(
        found[id].value for id in sublayers[4:]
    )
    assert program.digest() == digest


def test_blocks_are_removed_one_by_one_too_and_only_what_is_on_offer() -> None:
    program, ctx = llama_program(), Context(calibration=calibration())
    structure = ctx.find_structure(program)
    ctx.options = {id: [Spec("drop")] for id in ("block1", "block2", "block1.mlp")}
    found = dict(BlockInfluence(removals=3).run(program, ctx))
    order = list(found)[:3]
    assert {"block1", "block2"} <= set(order) and "block1.attention" not in found  # it went with its block
    assert {"block0", "block0.attention", "block0.mlp"} <= set(found)
    ctx.options = {id: [Spec("share")] for id in structure.sites if id.count(".") == 0}
    with pytest.raises(Refused, match="no option on offer removes"):
        list(BlockInfluence(removals=1).run(program, ctx))
    ctx.options = {"block1.mlp": [Spec("drop")]}
    with pytest.raises(Refused, match="only 1 of 2 removals"):
        list(BlockInfluence(removals=2).run(program, ctx))


class Parallel(nn.Module):
    """x + f(x) + g(x), twice."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))
        self.g = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for f, g in zip(self.f, self.g):
            x = x + (f(x) + g(x))
        return x


def test_parallel_branches_are_judged_one_by_one() -> None:
    torch.manual_seed(0)
    model, x = Parallel().eval(), torch.randn(4, 5, 8)
    graph, _ = capture_module(model, {"x": x}, {"x": {0: "batch"}})
    program = Program({"forward": graph}, graph.store)
    ctx = Context(calibration=CalibrationSet({"x": x}, "tensors", "noise"))
    found = dict(BlockInfluence().run(program, ctx))
    with torch.no_grad():
        expected = [1 - cosine(x, x + branch(x)).mean() for branch in (model.f[0], model.g[0])]
        whole = 1 - cosine(x, x + model.f[0](x) + model.g[0](x)).mean()
    first = {id: score.value for id, score in found.items() if id.startswith("block0.")}
    assert sorted(first.values()) == pytest.approx(sorted(expected), abs=1e-6)
    assert found["block0"].value == pytest.approx(whole, abs=1e-6)


def test_a_model_without_a_residual_stream_is_refused() -> None:
    graph, _ = capture_module(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {"input": torch.randn(2, 4)})
    ctx = Context(calibration=CalibrationSet({"input": torch.randn(2, 4)}, "tensors", "noise"))
    with pytest.raises(Refused, match="no residual stream"):
        list(BlockInfluence().run(Program({"forward": graph}, graph.store), ctx))


@pytest.mark.parametrize("two_sided", [False, True])
def test_zd_counts_weights_beyond_one_deviation(two_sided: bool) -> None:
    program = llama_program(tied=False)
    digest = program.digest()
    found = dict(ZScoreDistribution(two_sided=two_sided).run(program, Context()))
    state = {name: p.detach().double().numpy() for name, p in llama(tied=False).named_parameters() if p.ndim == 2}

    def by_hand(names: list[str]) -> float:
        w = np.concatenate([state[name].ravel() for name in names])
        z = (w - w.mean()) / w.std()
        return -float(np.mean(np.abs(z) > 1 if two_sided else z > 1))

    for i in range(3):
        names = [name for name in state if name.startswith(f"model.layers.{i}.")]
        assert found[f"block{i}"].value == pytest.approx(by_hand(names), abs=1e-9)
        assert found[f"block{i}.mlp"].value == pytest.approx(by_hand([n for n in names if "mlp" in n]), abs=1e-9)
        name = f"model.layers.{i}.self_attn.k_proj.weight"
        assert found[f"block{i}.attention.k_proj"].value == pytest.approx(by_hand([name]), abs=1e-9)
    assert found["embedding"].value == pytest.approx(by_hand(["model.embed_tokens.weight"]), abs=1e-9)
    assert found["embedding"].samples == 67 * 32
    assert program.digest() == digest


def test_zd_needs_no_stream_and_no_data() -> None:
    graph, _ = capture_module(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), {"input": torch.randn(2, 4)})
    found = dict(ZScoreDistribution().run(Program({"forward": graph}, graph.store), Context()))
    assert sorted(score.samples for score in found.values()) == [8, 16]


# --- activations, as passes ask for them


def test_activations_are_what_hooks_see_in_program_order() -> None:
    samples = calibration(6)
    program, ctx = llama_program(), Context(calibration=samples, batch_size=4)
    structure = ctx.find_structure(program)
    wanted = [structure.sites[id] for id in ("block2.mlp.down_proj", "block1", "block0.attention.v_proj", "block1.mlp")]
    found = {site.id: x for site, x in ctx.activations(program, wanted)}
    assert list(found) == ["block0.attention.v_proj", "block1", "block1.mlp", "block2.mlp.down_proj"]
    names = ["model.layers.2.mlp.down_proj", "model.layers.1", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn"]
    seen = hooked(llama(), dict(samples.samples), names)
    for id, name in (("block2.mlp.down_proj", names[0]), ("block1", names[1]), ("block0.attention.v_proj", names[2])):
        torch.testing.assert_close(found[id], seen[name][0].flatten(0, 1), rtol=1e-4, atol=1e-5)
    middle = (seen[names[1]][0] + seen[names[3]][1]).flatten(0, 1)
    torch.testing.assert_close(found["block1.mlp"], middle, rtol=1e-4, atol=1e-5)


def test_input_statistics_are_the_second_moments_of_the_activations() -> None:
    program, ctx = llama_program(), Context(calibration=calibration(), batch_size=3)
    sites = ctx.find_structure(program).of_kind("linear")
    stats = ctx.input_stats(program, sites)
    for site, x in ctx.activations(program, sites):
        torch.testing.assert_close(stats[site.id].hessian, 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-4)
    assert stats["block0.attention.q_proj"] is stats["block0.attention.v_proj"]
    assert ctx.stats_of(program.main, ctx.find_structure(program).sites["embedding"], Wanted()).tokens == 96  # type: ignore[union-attr]


# --- calibration


@settings(max_examples=30, deadline=None)
@given(slope=st.floats(0.1, 3), intercept=st.floats(-5, 5), positive=st.booleans(), n=st.integers(4, 12))
def test_an_exact_line_is_recovered(slope: float, intercept: float, positive: bool, n: int) -> None:
    x = {i: (0.5 + i if positive else i - 2.0) for i in range(n)}
    y = {i: math.exp(intercept + slope * (math.log(v) if positive else v)) for i, v in x.items()}
    made = calibrate(x, y)
    assert made.logarithmic == positive and made.error < 1e-9
    assert made.slope == pytest.approx(slope) and made.intercept == pytest.approx(intercept, abs=1e-7)
    for i, v in x.items():
        assert made.damage(v).value == pytest.approx(y[i], rel=1e-6) and not made.damage(v).measured


def test_the_stated_error_holds_on_sites_that_were_not_fitted() -> None:
    generator = np.random.default_rng(0)
    x = {i: float(v) for i, v in enumerate(np.exp(generator.normal(size=400)))}
    y = {i: Damage(float(2 * v**1.3 * np.exp(0.5 * generator.normal()))) for i, v in x.items()}
    fitted = calibrate(x, {i: y[i] for i in range(20)})
    ratio = [math.log(fitted.damage(Score(x[i])).value / y[i].value) for i in range(20, 400)]
    assert fitted.error == pytest.approx(0.5, abs=0.15) and np.std(ratio) == pytest.approx(0.5, abs=0.1)
    inside = [fitted.damage(x[i]).low <= y[i].value <= fitted.damage(x[i]).high for i in range(20, 400)]
    assert 0.85 < np.mean(inside) <= 1


def test_a_score_that_orders_the_wrong_way_predicts_no_order() -> None:
    made = calibrate({i: 5.0 - i for i in range(5)}, {i: math.exp(i) for i in range(5)})
    assert made.slope == 0


def test_rank_correlation_is_spearmans_over_common_sites() -> None:
    scores = {"a": Score(1.0), "b": Score(2.0), "c": Score(9.0), "d": Score(4.0), "x": Score(0.0)}
    damages = {"a": Damage(0.1), "b": Damage(0.3), "c": Damage(0.2), "d": Damage(5.0), "y": Damage(1.0)}
    ranks, others = [1, 2, 4, 3], [1, 3, 2, 4]
    expected = 1 - 6 * sum((a - b) ** 2 for a, b in zip(ranks, others)) / (4 * 15)
    assert rank_correlation(scores, damages) == pytest.approx(expected)
    with pytest.raises(BadInput, match="at least 3"):
        rank_correlation({"a": 1.0}, damages)
    with pytest.raises(BadInput, match="at least 3"):
        calibrate(scores, {"a": Damage(0.0), "b": Damage(-1.0), "c": Damage(1.0), "d": Damage(2.0)})
