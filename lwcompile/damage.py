"""Damage with its interval: the mean over tokens, and how far chance could have moved it.

`DamageMeter` turns batches into one `Estimate`; `evaluate` adds argmax agreement and, for language models, perplexity.
Intervals are bootstrapped over whole windows, because the tokens of one window are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor

from lwcompile.errors import BadInput
from lwcompile.metric import CHUNK, Inputs, Metric, Outputs, main_output


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values in `clusters` windows, with its 95 % interval [low, high], in `unit`."""

    mean: float
    low: float
    high: float
    n: int
    unit: str
    clusters: int = 0

    @property
    def spread(self) -> float:
        """One standard error, as the interval states it."""
        return (self.high - self.low) / (2 * 1.96)

    def __str__(self) -> str:
        return f"{self.mean:.4g} {self.unit} (95 % {self.low:.4g} to {self.high:.4g})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Estimate:
        return cls(**row)


def estimate(values: Tensor, clusters: Tensor | None = None, unit: str = "", seed: int = 0) -> Estimate:
    """The mean of `values` [n] and its 95 % interval: 2,000 bootstrap resamples of whole clusters, seeded.

    Tokens of one window are not independent, so windows are drawn, each with all its tokens. For few windows the
    percentile interval is too narrow; it is widened around the mean by Student's t over 1.96 and sqrt(c / (c - 1)).
    """
    x = values.detach().double().cpu().numpy()
    if x.size == 0:
        raise BadInput("nothing was measured: the evaluation set masks every token")
    if not np.isfinite(x).all():
        return Estimate(math.inf, math.inf, math.inf, x.size, unit)
    labels = np.arange(x.size) if clusters is None else clusters.cpu().numpy()
    _, index = np.unique(labels, return_inverse=True)
    if index.max() == 0:  # one window: its tokens are all there is to draw from
        index = np.arange(x.size)
    sums, counts = np.bincount(index, x), np.bincount(index)
    c, mean = len(sums), float(x.mean())
    if c == 1:
        return Estimate(mean, mean, mean, x.size, unit, 1)
    generator = np.random.default_rng(seed)
    means = np.empty(2000)
    step = max(1, CHUNK // c)
    for start in range(0, len(means), step):
        drawn = generator.multinomial(c, np.full(c, 1 / c), size=min(step, len(means) - start))
        means[start : start + step] = (drawn @ sums) / (drawn @ counts)
    widen = special.stdtrit(c - 1, 0.975) / special.ndtri(0.975) * math.sqrt(c / (c - 1))
    low, high = (mean + widen * (q - mean) for q in np.percentile(means, [2.5, 97.5]))
    return Estimate(mean, max(float(low), float((sums / counts).min())), float(high), x.size, unit, c)


class DamageMeter:
    """One damage from many batches. A joint metric sees all samples at once, so the batch size never matters."""

    def __init__(self, metric: Metric, seed: int = 0) -> None:
        self.metric, self.seed = metric, seed
        self._values: list[Tensor] = []
        self._clusters: list[Tensor] = []
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._samples = 0

    def update(self, dense: Outputs, compressed: Outputs, inputs: Inputs) -> None:
        with torch.no_grad():
            if self.metric.joint:
                self._kept.append((self._keep(dense, inputs), self._keep(compressed, inputs)))
                return
            self._values.append(self.metric.compare(dense, compressed, inputs).cpu())
            self._clusters.append(self.metric.clusters(compressed, inputs).cpu() + self._samples)
            self._samples += len(main_output(compressed))

    def _keep(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        return self.metric.keep(outputs, inputs, torch.float32).cpu()

    def result(self) -> Estimate:
        """The damage: 0 for the dense model, more is worse, infinite where outputs are not finite."""
        values, clusters = self.values()
        return estimate(values, clusters, self.metric.unit, self.seed)

    def values(self) -> tuple[Tensor, Tensor]:
        """All damages [n] and the sample that each belongs to [n]."""
        if self.metric.joint and self._kept:
            dense, compressed = map(torch.cat, zip(*self._kept))
            values = self.metric.compare(dense, compressed, {})
            return values, self.metric.clusters(compressed, {})
        if not self._values:
            raise BadInput("nothing was measured: the evaluation set is empty")
        return torch.cat(self._values), torch.cat(self._clusters)


def evaluate(
    metric: Metric, dense: Iterable[Outputs], compressed: Iterable[Outputs], inputs: Iterable[Inputs], seed: int = 0
) -> dict[str, Estimate]:
    """Damage, argmax agreement and, where logits predict the next token, perplexity of both; each with its interval.

    The three iterables run in step, one batch at a time. Agreement of features is agreement on the nearest neighbour; a user's
    metric that states no distribution has none.
    """
    meter = DamageMeter(metric, seed)
    losses: dict[str, list[Tensor]] = {"perplexity dense": [], "perplexity": []}
    equal: list[Tensor] = []
    windows: dict[str, list[Tensor]] = {"loss": [], "equal": []}
    with torch.no_grad():
        for p, q, batch in zip(dense, compressed, inputs):
            at = meter._samples
            meter.update(p, q, batch)
            if metric.joint:
                continue
            if metric.predicts:
                equal.append((metric.predictions(p, batch) == metric.predictions(q, batch)).float().cpu())
                windows["equal"].append(metric.clusters(q, batch).cpu() + at)
            if predicts_next(q, batch):
                losses["perplexity dense"].append(next_token_loss(p, batch)[0])
                values, samples = next_token_loss(q, batch)
                losses["perplexity"].append(values)
                windows["loss"].append(samples + at)
    if metric.joint:
        p, q = (torch.cat(side) for side in zip(*meter._kept))
        equal = [(metric.predictions(p, {}) == metric.predictions(q, {})).float()]
        windows["equal"] = [torch.arange(len(equal[0]))]
    made: dict[str, Estimate] = {"damage": meter.result()}
    if equal:
        made["agreement"] = estimate(torch.cat(equal), torch.cat(windows["equal"]), "of argmax", seed)
    for name, values in losses.items():
        if values:
            e = estimate(torch.cat(values), torch.cat(windows["loss"]), "nats/token", seed)
            made[name] = Estimate(math.exp(e.mean), math.exp(e.low), math.exp(e.high), e.n, "perplexity", e.clusters)
    return made


def predicts_next(outputs: Outputs, inputs: Inputs) -> bool:
    """Whether these are logits [batch, seq, vocabulary] over the input's own tokens."""
    logits, ids = main_output(outputs), inputs.get("input_ids")
    return ids is not None and logits.ndim == 3 and logits.shape[:2] == ids.shape and int(ids.max()) < logits.shape[2]


def next_token_loss(outputs: Outputs, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-log p(next token) in nats, and its sample: both [n], for each position whose next token is given and unmasked."""
    logits, ids = main_output(outputs)[:, :-1], inputs["input_ids"][:, 1:]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    rows, columns = (mask[:, 1:] & mask[:, :-1]).nonzero(as_tuple=True)
    step = max(1, CHUNK // logits.shape[-1])
    made = [
        F.cross_entropy(logits[r, c].float(), ids[r, c].to(logits.device), reduction="none").cpu()
        for r, c in zip(rows.split(step), columns.split(step))
    ]
    return torch.cat(made) if made else torch.zeros(0), rows.cpu()
