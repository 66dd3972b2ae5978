"""The unit in which damage is counted: what a compressed model's outputs lose against the dense model's.

A `Metric` compares outputs token by token (or sample by sample) and states the distribution that Fisher information is
taken in. A plan has one metric; units are never mixed. `lwcompile.damage` turns many batches into one figure.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lwcompile.errors import BadInput, BadPlan, PluginError
from lwcompile.readers import load_function
from lwcompile.spec import Spec

Outputs: TypeAlias = "Tensor | Mapping[str, Tensor] | Sequence[Tensor]"
Inputs: TypeAlias = Mapping[str, Tensor]

CHUNK = 1 << 23
"""Elements of float32 that a comparison holds at a time: 32 MB a tensor."""


class Metric(ABC):
    """The contract. A metric is a frozen dataclass; its fields are its options.

    Outputs are what the model returned: a tensor, or several by name or in order; or, for the dense side, what `keep`
    made of them. Damages are float32, 0 where nothing changed, and more is worse whatever the metric's own direction.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    higher_is_worse: bool = True
    joint: ClassVar[bool] = False
    """Whether samples are compared with each other, so that batches must be collected first."""

    @property
    def predicts(self) -> bool:
        """Whether it knows the model's distribution, which Fisher scores and argmax agreement need."""
        return True

    @abstractmethod
    def compare(self, dense: Outputs, compressed: Outputs, inputs: Inputs) -> Tensor:
        """Damages [n], one for each token (or sample) that counts."""

    @abstractmethod
    def distribution(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        """Log-probabilities [rows, classes] of the model's own distribution, differentiable; Fisher draws labels here."""

    def keep(self, outputs: Outputs, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
        """What of the dense outputs `compare` needs again, samples first."""
        return main_output(outputs).detach().to(dtype)

    def clusters(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        """Which sample of the batch each damage belongs to, int64 [n]: samples, not tokens, are independent."""
        return torch.arange(len(main_output(outputs)))

    def predictions(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        """The likeliest class of each row, int64 [rows]."""
        return self.distribution(outputs, inputs).argmax(-1)


@dataclass(frozen=True)
class Kl(Metric):
    """KL(dense || compressed) of the predicted distributions, in nats per token.

    For logits [batch, seq, vocabulary], or [batch, classes]. Tokens that the attention mask leaves out don't count;
    `skip_last` leaves out each window's last position too, whose next token is not in the window.
    """

    skip_last: bool = False
    name: ClassVar[str] = "kl"
    unit: ClassVar[str] = "nats/token"

    def compare(self, dense: Outputs, compressed: Outputs, inputs: Inputs) -> Tensor:
        p, q = main_output(dense), main_output(compressed)
        if p.shape != q.shape:
            raise BadInput(f"the outputs to compare have shapes {tuple(p.shape)} and {tuple(q.shape)}")
        rows, kept = self._kept(q, inputs)
        p, q = p.reshape(rows.numel(), -1), q.reshape(rows.numel(), -1)
        size = max(1, CHUNK // q.shape[1])
        if len(kept) == len(q):  # views: the gradient of an indexed part is as large as the whole
            made = [_kl_rows(*pair) for pair in zip(p.split(size), q.split(size))]
        else:
            made = [_kl_rows(p[at], q[at]) for at in kept.split(size)]
        return torch.cat(made) if made else q.new_zeros(0)

    def distribution(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        logits = main_output(outputs)
        _, kept = self._kept(logits, inputs)
        return F.log_softmax(logits.reshape(-1, logits.shape[-1])[kept].float(), dim=-1)

    def keep(self, outputs: Outputs, inputs: Inputs, dtype: torch.dtype = torch.float16) -> Tensor:
        """Log-probabilities. Half precision rounds them by 5e-4 of their value, which moves a KL only in second order."""
        logits = main_output(outputs).detach()
        rows = logits.reshape(-1, logits.shape[-1])
        made = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        step = max(1, CHUNK // rows.shape[1])
        for start in range(0, len(rows), step):
            made[start : start + step] = F.log_softmax(rows[start : start + step].float(), dim=-1)
        return made.view(logits.shape)

    def clusters(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        rows, kept = self._kept(main_output(outputs), inputs)
        return rows.flatten()[kept]

    def predictions(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        logits = main_output(outputs)
        _, kept = self._kept(logits, inputs)
        return logits.argmax(-1).flatten()[kept]

    def _kept(self, logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The sample of every row (shape of the logits less the last), and the flat indices of the rows that count."""
        shape = logits.shape[:-1]
        rows = torch.arange(shape[0], device=logits.device).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        mask = torch.ones(shape, dtype=torch.bool, device=logits.device)
        for name in ("decoder_attention_mask", "attention_mask"):
            if (given := inputs.get(name)) is not None and given.shape == shape:
                mask = given.to(logits.device).bool()
                break
        if self.skip_last and mask.ndim == 2:
            position = torch.arange(shape[1], device=logits.device)
            mask = mask & (position < (mask * position).amax(1, keepdim=True))
        return rows, mask.flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class FeatureKl(Metric):
    """KL of the in-batch cosine-similarity softmax, in nats per sample, for models that give features.

    Each sample's similarities to the others of its group, over `temperature`, make a distribution; KL(dense ||
    compressed) of it. Groups hold `batch` samples in order, however the model was fed.
    pool: how hidden states [batch, seq, d] become one vector: "cls" (the first), "mean" (over the attention mask),
    or "auto", which is "mean" with an attention mask and "cls" without.
    """

    temperature: float = 0.1
    pool: Literal["auto", "cls", "mean"] = "auto"
    batch: int = 32
    name: ClassVar[str] = "feature_kl"
    unit: ClassVar[str] = "nats/sample"
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise BadPlan(f"feature_kl: temperature must be above 0, not {self.temperature}")
        if self.pool not in ("auto", "cls", "mean"):
            raise BadPlan(f"feature_kl: pool is auto, cls or mean, not {self.pool!r}")
        if self.batch < 3:
            raise BadPlan(f"feature_kl: batch must be at least 3, not {self.batch}: one neighbour always has probability 1")

    def compare(self, dense: Outputs, compressed: Outputs, inputs: Inputs) -> Tensor:
        p, q = self._features(dense, inputs), self._features(compressed, inputs)
        return torch.cat([_kl_rows(self._similarity(p[g]), self._similarity(q[g])) for g in self._groups(len(p))])

    def distribution(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        features = self._features(outputs, inputs)
        made = [self._similarity(features[group]) for group in self._groups(len(features))]
        width = max(rows.shape[1] for rows in made)
        return torch.cat([F.pad(rows, (0, width - rows.shape[1]), value=-math.inf) for rows in made])

    def keep(self, outputs: Outputs, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._features(outputs, inputs).detach().to(dtype)

    def _features(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        """One float32 vector a sample, [batch, d]."""
        embeds = [t for k, t in outputs.items() if k.endswith("_embeds")] if isinstance(outputs, Mapping) else []
        if embeds:  # of text and image: the cosine of the joined vectors is the mean of both cosines
            return torch.cat([F.normalize(t.float(), dim=-1) for t in embeds], dim=-1)
        hidden = main_output(outputs).float()
        if hidden.ndim == 2:
            return hidden
        if hidden.ndim > 3:  # channels, then space
            return hidden.flatten(2).mean(-1)
        mask = inputs.get("attention_mask")
        mask = None if mask is None or mask.shape != hidden.shape[:2] else mask.to(hidden)
        if self.pool == "cls" or (self.pool == "auto" and mask is None):
            return hidden[:, 0]
        if mask is None:
            return hidden.mean(1)
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)

    def _groups(self, n: int) -> list[slice]:
        if n < 3:
            raise BadInput(f"feature_kl compares samples with each other and needs at least 3, not {n}: raise --samples")
        starts = list(range(0, n, self.batch))
        if n - starts[-1] < 3 and len(starts) > 1:
            starts.pop()
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], n])]

    def _similarity(self, features: Tensor) -> Tensor:
        """Log-softmax over the others, [n, n - 1]: the diagonal is cut out."""
        unit = F.normalize(features, dim=-1)
        n = len(unit)
        logits = (unit @ unit.T / self.temperature).flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)
        return F.log_softmax(logits, dim=-1)


@dataclass(frozen=True)
class UserMetric(Metric):
    """`module:function` of the user: function(dense, compressed, inputs) -> values [n], or one value a batch.

    It gets the models' main outputs as tensors. Damage is the change against what it says of the dense model and
    itself, counted so that more is worse. Direction and unit are attributes of the function, or options of the spec.
    """

    reference: str
    function: Callable[..., Any] = field(compare=False, repr=False)
    higher_is_worse: bool = True
    name: ClassVar[str] = "user"
    unit: str = ""  # type: ignore[assignment]

    def compare(self, dense: Outputs, compressed: Outputs, inputs: Inputs) -> Tensor:
        p, q = main_output(dense), main_output(compressed)
        change = self._call(p, q, inputs) - self._call(p, p, inputs)
        return change if self.higher_is_worse else -change

    def clusters(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        output = main_output(outputs)
        n, batch = len(self._call(output, output, inputs)), len(output)
        return torch.arange(n) // (n // batch) if n % batch == 0 else torch.zeros(n, dtype=torch.int64)

    @property
    def predicts(self) -> bool:
        return hasattr(self.function, "distribution")

    def distribution(self, outputs: Outputs, inputs: Inputs) -> Tensor:
        made = getattr(self.function, "distribution", None)
        if made is None:
            raise BadInput(f"the metric {self.reference} states no distribution, which Fisher scores need: use another one")
        return made(main_output(outputs), inputs)

    def _call(self, dense: Tensor, compressed: Tensor, inputs: Inputs) -> Tensor:
        try:
            return torch.as_tensor(self.function(dense, compressed, inputs), dtype=torch.float32).reshape(-1)
        except Exception as error:
            raise PluginError(f"the metric {self.reference} raised {type(error).__name__}: {error}") from error


def main_output(outputs: Outputs) -> Tensor:
    """The output that a metric reads: `logits` or `last_hidden_state` by name where there is one, else the first."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        named = next((outputs[k] for k in ("logits", "last_hidden_state") if k in outputs), None)
        outputs = list(outputs.values()) if named is None else [named]
    first = next((o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()), None)
    if first is None:
        raise BadInput("the model returned no floating-point tensor to compare")
    return first


def default_metric(outputs_kind: str) -> Metric:
    """`kl` for "logits", `feature_kl` for "features"."""
    return Kl() if outputs_kind == "logits" else FeatureKl()


def load_metric(text: str | Spec | Metric) -> Metric:
    """The metric of a one-line spec: `kl`, `feature_kl{temperature=0.05}`, `module:function{higher_is_worse=false}`."""
    if isinstance(text, Metric):
        return text
    head, brace, rest = str(text).partition("{")
    if ":" in head:
        options = dict(Spec.parse(f"user{brace}{rest}").args)
        return _user_metric(head.strip(), options)
    from lwcompile.registry import make

    return make("metrics", text if isinstance(text, Spec) else Spec.parse(str(text)))


def _user_metric(reference: str, options: dict[str, Any]) -> Metric:
    found = load_function(reference)
    if isinstance(found, type) and issubclass(found, Metric):
        return found(**options)
    if isinstance(found, Metric):
        return found
    if not callable(found):
        raise BadInput(f"the metric {reference} is not a function")
    if unknown := set(options) - {"higher_is_worse", "unit"}:
        raise BadPlan(f"the metric {reference} takes higher_is_worse and unit, not {', '.join(sorted(unknown))}")
    given = {"higher_is_worse": True, "unit": getattr(found, "__name__", "user")}
    given = {key: options.get(key, getattr(found, key, default)) for key, default in given.items()}
    return UserMetric(reference, found, **given)


def _kl_rows(p: Tensor, q: Tensor) -> Tensor:
    """KL of each row, from logits or log-probabilities [rows, classes]; classes that p rules out count nothing."""
    p, q = F.log_softmax(p.float(), dim=-1), F.log_softmax(q.float(), dim=-1)
    weight = p.exp()
    return torch.where(weight > 0, weight * (p - q), 0.0).sum(-1)


def sample_labels(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """One label a row, [rows, 1], by inverting the cumulative distribution: a random number a row instead of one a class."""
    made = []
    for rows in log_p.split(max(1, CHUNK // 2 // log_p.shape[1])):
        reached = rows.double().exp_().cumsum(-1)
        drawn = torch.rand(len(rows), 1, dtype=torch.float64, generator=generator).to(rows.device)
        made.append(torch.searchsorted(reached, drawn * reached[:, -1:], right=True).clamp_max(log_p.shape[1] - 1))
    return torch.cat(made)
