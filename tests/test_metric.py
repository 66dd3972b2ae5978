"""Metrics against definitions written out in float64, intervals against their coverage, the cache against its bound."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lwcompile import metric as metrics
from lwcompile.damage import DamageMeter, Estimate, estimate, evaluate, next_token_loss
from lwcompile.dense import DenseOutputs
from lwcompile.errors import BadInput, BadPlan, PluginError
from lwcompile.metric import FeatureKl, Kl, UserMetric, default_metric, load_metric, main_output


def random_pair(*shape: int, seed: int = 0, step: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = 3 * torch.randn(*shape, generator=generator)
    return dense, dense + step * torch.randn(*shape, generator=generator)


def reference_kl(dense: Tensor, compressed: Tensor) -> np.ndarray:
    """Sum of p log(p / q) in float64, by its definition."""
    p, q = (np.exp(t.double().numpy()) for t in (dense, compressed))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(2, 40)),
    skip_last=st.booleans(),
    seed=st.integers(0, 99),
    chunk=st.sampled_from([1, 50, metrics.CHUNK]),
)
def test_kl_is_its_definition(shape, skip_last, seed, chunk):
    dense, compressed = random_pair(*shape, seed=seed)
    mask = torch.randint(0, 2, shape[:2], generator=torch.Generator().manual_seed(seed))
    wanted, clusters = [], []
    for b, row in enumerate(mask.tolist()):
        inside = [s for s, m in enumerate(row) if m]
        for s in inside[: len(inside) - skip_last]:
            wanted.append(reference_kl(dense[b, s], compressed[b, s]))
            clusters.append(b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "CHUNK", chunk)
        kl = Kl(skip_last=skip_last)
        inputs = {"attention_mask": mask}
        got = kl.compare({"logits": dense}, [compressed], inputs)
        np.testing.assert_allclose(got.numpy(), np.array(wanted).reshape(-1), rtol=1e-4, atol=1e-6)
        assert kl.clusters(compressed, inputs).tolist() == clusters
        assert kl.distribution(dense, inputs).shape == (len(wanted), shape[2])
        assert torch.equal(kl.predictions(dense, inputs), kl.distribution(dense, inputs).argmax(-1))


def test_kl_of_equal_outputs_is_zero_also_through_half_precision():
    dense, compressed = random_pair(4, 32, 1000, step=0.05)
    assert Kl().compare(dense, dense, {}).abs().max() < 1e-6
    kept = Kl().keep(dense, {})
    assert kept.dtype == torch.float16 and kept.shape == dense.shape
    assert Kl().compare(kept, dense, {}).abs().max() < 1e-5
    exact, cached = (Kl().compare(side, compressed, {}).mean() for side in (dense, kept))
    assert cached == pytest.approx(exact.item(), rel=5e-3)


def test_classes_that_are_ruled_out_count_nothing():
    dense, compressed = random_pair(2, 3, 10)
    masked = [torch.cat([t, torch.full((2, 3, 2), -math.inf)], -1) for t in (dense, compressed)]
    torch.testing.assert_close(Kl().compare(masked[0], masked[1], {}), Kl().compare(dense, compressed, {}))


def test_kl_of_classes_and_of_a_decoder():
    dense, compressed = random_pair(5, 4)
    np.testing.assert_allclose(Kl().compare(dense, compressed, {}), reference_kl(dense, compressed), rtol=1e-4)
    dense, compressed = random_pair(2, 3, 6)
    inputs = {"attention_mask": torch.ones(2, 9), "decoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert len(Kl().compare(dense, compressed, inputs)) == 3
    with pytest.raises(BadInput, match="shapes"):
        Kl().compare(dense, compressed[:, :2], inputs)


def test_kl_holds_one_chunk_at_a_time():
    dense, compressed = random_pair(2, 64, 2000)
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        rows = metrics._kl_rows
        patch.setattr(metrics, "CHUNK", 10_000)
        patch.setattr(metrics, "_kl_rows", lambda p, q: seen.append(p.numel()) or rows(p, q))
        Kl().compare(dense, compressed, {})
    assert max(seen) <= 10_000 and sum(seen) == dense.numel()


def reference_feature_kl(dense: Tensor, compressed: Tensor, temperature: float) -> np.ndarray:
    def rows(features: Tensor) -> np.ndarray:
        x = features.double().numpy()
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        similar = x @ x.T / temperature
        others = [[similar[i, j] for j in range(len(x)) if j != i] for i in range(len(x))]
        weights = np.exp(np.array(others))
        return weights / weights.sum(1, keepdims=True)

    p, q = rows(dense), rows(compressed)
    return (p * np.log(p / q)).sum(1)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(3, 40), d=st.integers(2, 9), temperature=st.floats(0.05, 2), batch=st.integers(3, 20))
def test_feature_kl_is_its_definition_in_groups(n, d, temperature, batch):
    dense, compressed = random_pair(n, d, seed=n)
    got = FeatureKl(temperature=temperature, batch=batch).compare(dense, compressed, {})
    starts = [s for s in range(0, n, batch) if n - s >= 3 or s == 0]
    ends = [*starts[1:], n]
    wanted = [reference_feature_kl(dense[a:b], compressed[a:b], temperature) for a, b in zip(starts, ends)]
    np.testing.assert_allclose(got.numpy(), np.concatenate(wanted), rtol=1e-3, atol=1e-5)
    rows = FeatureKl(temperature=temperature, batch=batch).distribution(dense, {}).exp()
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-5)


def test_pooling():
    hidden, _ = random_pair(4, 5, 6)
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 4)
    inputs = {"attention_mask": mask}
    mean = hidden[:, :2].mean(1)
    torch.testing.assert_close(FeatureKl().keep({"pooler_output": hidden[:, 3], "last_hidden_state": hidden}, inputs), mean)
    torch.testing.assert_close(FeatureKl(pool="cls").keep(hidden, inputs), hidden[:, 0])
    torch.testing.assert_close(FeatureKl().keep(hidden, {}), hidden[:, 0])
    torch.testing.assert_close(FeatureKl(pool="mean").keep(hidden, {}), hidden.mean(1))
    assert torch.equal(FeatureKl().keep(hidden[:, 0], inputs), hidden[:, 0])


def test_text_and_image_embeddings_count_both():
    text, image = random_pair(5, 6)
    outputs = {"logits_per_image": text @ image.T, "text_embeds": text, "image_embeds": image}
    features = FeatureKl().keep(outputs, {})
    cosines = [torch.nn.functional.cosine_similarity(t[:, None], t[None], dim=-1) for t in (text, image)]
    torch.testing.assert_close(features @ features.T, sum(cosines))


def test_feature_kl_needs_three_samples():
    with pytest.raises(BadInput, match="at least 3"):
        FeatureKl().compare(*random_pair(2, 4), {})
    with pytest.raises(BadPlan, match="batch"):
        FeatureKl(batch=2)


@pytest.mark.parametrize("metric", [Kl(), FeatureKl(batch=5)], ids=str)
def test_damage_does_not_depend_on_the_batch_size(metric):
    dense, compressed = random_pair(12, 6, 8)

    def measured(size: int) -> Estimate:
        meter = DamageMeter(metric)
        for start in range(0, 12, size):
            meter.update(dense[start : start + size], compressed[start : start + size], {})
        return meter.result()

    one, five = measured(12), measured(5)
    assert one == dataclasses.replace(five, mean=one.mean, low=one.low, high=one.high)
    assert one.mean == pytest.approx(five.mean) and one.high == pytest.approx(five.high)
    assert one.clusters == 12 and one.unit == metric.unit and one.low < one.mean < one.high


def test_the_interval_covers_the_truth():
    """200 samples of 12 windows with a window effect: a 95 % interval should hold the true mean in 88 % or more."""
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        window = generator.normal(0, 1, (12, 1))
        values = torch.from_numpy(5 + window + generator.normal(0, 1, (12, 20))).flatten()
        interval = estimate(values, torch.arange(12).repeat_interleave(20), seed=trial)
        covered += interval.low <= 5 <= interval.high
    assert 176 <= covered <= 199


def test_the_interval_draws_windows_not_tokens():
    window = torch.randn(8, 1, generator=torch.Generator().manual_seed(0)).expand(8, 100).flatten()
    honest, naive = estimate(window, torch.arange(8).repeat_interleave(100)), estimate(window)
    assert honest.high - honest.low > 5 * (naive.high - naive.low)
    assert estimate(window, seed=3) == estimate(window, seed=3)
    assert estimate(torch.ones(50), torch.zeros(50)).spread == 0


def test_outputs_that_are_not_finite_are_infinite_damage():
    dense, compressed = random_pair(3, 2, 4)
    compressed[1, 1, 0] = math.nan
    meter = DamageMeter(Kl())
    meter.update(dense, compressed, {})
    assert meter.result().mean == math.inf
    with pytest.raises(BadInput, match="nothing was measured"):
        DamageMeter(Kl()).result()


def test_estimates_survive_json():
    one = Estimate(0.5, 0.4, 0.6, 100, "nats/token", 4)
    assert Estimate.from_json(one.to_json()) == one
    assert "0.5 nats/token" in str(one) and one.spread == pytest.approx(0.1 / 1.96)


def test_perplexity_is_its_definition():
    logits, other = random_pair(3, 6, 9)
    inputs = {"input_ids": torch.randint(0, 9, (3, 6)), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]] + [[1] * 6] * 2)}
    losses = []
    for b in range(3):
        for s in range(5):
            if inputs["attention_mask"][b, s]:
                p = torch.softmax(logits[b, s].double(), 0)
                losses.append(-math.log(p[inputs["input_ids"][b, s + 1]]))
    made = evaluate(Kl(), [logits], [other], [inputs])
    assert made["perplexity dense"].mean == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert made["perplexity dense"].n == len(losses) and made["perplexity dense"].clusters == 3
    assert next_token_loss(logits, inputs)[0].mean() == pytest.approx(np.mean(losses), rel=1e-5)
    counted = inputs["attention_mask"].bool()
    assert made["agreement"].mean == pytest.approx((logits.argmax(-1) == other.argmax(-1))[counted].float().mean().item())
    assert made["damage"].mean == pytest.approx(reference_kl(logits, other)[counted.numpy()].mean(), rel=1e-4)


def test_evaluation_from_kept_outputs_and_of_features():
    logits, other = random_pair(4, 6, 9)
    inputs = [{"input_ids": torch.randint(0, 9, (2, 6))}] * 2
    direct = evaluate(Kl(), logits.split(2), other.split(2), inputs)
    kept = evaluate(Kl(), [Kl().keep(half, {}) for half in logits.split(2)], other.split(2), inputs)
    assert {k: v.mean for k, v in kept.items()} == pytest.approx({k: v.mean for k, v in direct.items()}, rel=1e-2)
    same = evaluate(FeatureKl(), logits.split(2), logits.split(2), [{}, {}])
    assert set(same) == {"damage", "agreement"} and same["agreement"].mean == 1 and same["damage"].mean == 0


def test_dense_outputs_spill_and_come_back(tmp_path):
    batches = [torch.randn(2, 3, 50, dtype=torch.float32) for _ in range(6)]
    with DenseOutputs(tmp_path / "cache", memory_limit=2 * batches[0].nbytes) as dense:
        for batch in batches:
            dense.append(batch)
        assert dense.memory_bytes <= dense.memory_limit and dense.disk_bytes == 4 * batches[0].nbytes
        assert len(list((tmp_path / "cache").iterdir())) == 4
        assert all(torch.equal(a, b) for a, b in zip(dense, batches)) and len(dense) == 6
    assert list((tmp_path / "cache").iterdir()) == []


def test_dense_outputs_do_not_alias_what_they_were_given():
    batch = torch.ones(3)
    dense = DenseOutputs()
    dense.append(batch)
    batch.zero_()
    assert dense[0].sum() == 3


def test_dense_outputs_say_what_to_do_when_there_is_no_room(tmp_path):
    with pytest.raises(BadInput, match="name a directory"):
        DenseOutputs(memory_limit=1).append(torch.ones(4))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        DenseOutputs(tmp_path / "file", memory_limit=1).append(torch.ones(4))


def test_metrics_by_name_and_by_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mymetric_for_test.py").write_text(
        "def agreement(dense, compressed, inputs):\n"
        "    return (dense.argmax(-1) == compressed.argmax(-1)).float()\n"
        "agreement.higher_is_worse = False\n"
        "def distance(dense, compressed, inputs):\n"
        "    return (dense - compressed).abs().mean()\n"
        "def broken(dense, compressed, inputs):\n"
        "    raise KeyError('labels')\n"
    )
    assert load_metric("kl{skip_last=true}") == Kl(skip_last=True)
    assert load_metric("feature_kl{temperature=0.2,pool=cls}") == FeatureKl(temperature=0.2, pool="cls")
    assert default_metric("logits") == Kl() and default_metric("features") == FeatureKl()
    dense, compressed = random_pair(4, 5, 7, step=3)
    agreement = load_metric("mymetric_for_test:agreement")
    assert isinstance(agreement, UserMetric) and agreement.unit == "agreement" and not agreement.higher_is_worse
    wanted = (dense.argmax(-1) != compressed.argmax(-1)).float().flatten()
    assert torch.equal(agreement.compare(dense, compressed, {}), wanted)  # damage: agreement lost
    assert agreement.clusters(compressed, {}).tolist() == [b for b in range(4) for _ in range(5)]
    distance = load_metric("mymetric_for_test:distance{unit=logits}")
    assert distance.unit == "logits" and distance.compare(dense, compressed, {}).shape == (1,)
    meter = DamageMeter(distance)
    meter.update(dense, compressed, {})
    assert meter.result().mean == pytest.approx((dense - compressed).abs().mean().item())
    with pytest.raises(PluginError, match="broken raised KeyError: 'labels'"):
        load_metric("mymetric_for_test:broken").compare(dense, compressed, {})
    with pytest.raises(BadInput, match="states no distribution"):
        distance.distribution(dense, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [("ki", "no metric is named 'ki'"), ("kl{skip=true}", "kl"), ("feature_kl{pool=max}", "pool"), ("kl{", "column")],
)
def test_unknown_metrics_are_one_sentence(text, message):
    with pytest.raises(BadPlan, match=message):
        load_metric(text)


def test_main_output():
    a, b = torch.zeros(1), torch.ones(1)
    assert main_output({"x": a, "logits": b}) is b and main_output((torch.tensor([1]), b)) is b
    with pytest.raises(BadInput, match="no floating-point"):
        main_output([torch.tensor([1])])
    assert isinstance(Estimate(1, 1, 1, 1, "x"), Estimate)


def test_a_users_metric_without_a_distribution_is_evaluated_without_agreement() -> None:
    def distance(dense: Tensor, compressed: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return (dense - compressed).abs().mean(-1)

    metric = UserMetric("test:distance", distance)
    dense, compressed = torch.zeros(4, 3), torch.full((4, 3), 0.5)
    found = evaluate(metric, [dense], [compressed], [{"x": torch.zeros(4, 2)}])
    assert set(found) == {"damage"}
    assert found["damage"].mean == 0.5
