"""Token by token: the loop over a `DecodeStep`, sampling, and two models side by side.

A step may be a decode graph in torch (`GraphStep`), or a backend's runtime: anything with the protocol's call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lwcompile.decode import PAST, empty_cache
from lwcompile.errors import BadInput
from lwcompile.graph import Input, ModelGraph


class DecodeStep(Protocol):
    """Advances B sequences by S tokens.

    Args:
        input_ids: int64 [B, S]. attention_mask: int64 [B, P + S], 0 where a token is padding.
        position_ids: int64 [B, S], counting from 0 at the first token that is no padding.
        cache: what the last call returned, covering P tokens; None at the start (P = 0). Its form is the step's own.

    Returns:
        the last position's logits, float32 [B, vocabulary], and the cache covering P + S tokens.
    """

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Roles:
    """Which input of a decode graph is what; `positions` and `padding` are None where the graph has none."""

    tokens: str
    padding: str | None
    positions: str | None
    pasts: tuple[Input, ...]

    @classmethod
    def of(cls, graph: ModelGraph, given: Collection[str] = ()) -> Roles:
        """The roles of a graph that `derive_decode` made; `given` names inputs that stay the same over all steps."""
        return cls.of_inputs(graph.inputs, given)

    @classmethod
    def of_inputs(cls, inputs: Sequence[Input], given: Collection[str] = ()) -> Roles:
        pasts = tuple(i for i in inputs if i.name.startswith(PAST))
        free = [i for i in inputs if i not in pasts and i.name not in given]
        padding = [i.name for i in free if i.dynamic.get(1) == "total"]
        rest = [i.name for i in free if i.name not in padding]
        positions = [name for name in rest if name.endswith("position_ids")]
        tokens = [name for name in rest if name not in positions]
        if not pasts:
            raise BadInput("this graph takes no cache, so it cannot continue a sequence; derive its decode graph first")
        if len(tokens) != 1:
            raise BadInput(f"generation does not know how to fill the inputs {', '.join(tokens)}; give all but the token ids")
        return cls(tokens[0], next(iter(padding), None), next(iter(positions), None), pasts)


class GraphStep:
    """A `DecodeStep` that runs a decode graph in torch; its cache is the list of past keys and values."""

    def __init__(self, graph: ModelGraph, given: Mapping[str, Tensor] | None = None) -> None:
        """given: inputs that stay the same over all steps, such as an encoder's hidden states."""
        self.given = dict(given or {})
        self.roles = Roles.of(graph, self.given)
        self.inputs = [i.name for i in graph.inputs]
        self.kept = len(graph.outputs) - len(self.roles.pasts)
        self.module = graph.module(dense=True)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        logits, cache = self.all_logits(input_ids, attention_mask, position_ids, cache)
        return logits[:, -1], cache

    def all_logits(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Like the call, with every position's logits [B, S, vocabulary]."""
        roles = self.roles
        if roles.padding is None and not attention_mask.all():
            raise BadInput("this graph has no attention mask, so it cannot take padded prompts; generate one at a time")
        values = {roles.tokens: input_ids, **self.given}
        values |= {roles.padding: attention_mask} if roles.padding else {}
        values |= {roles.positions: position_ids} if roles.positions else {}
        values |= zip((i.name for i in roles.pasts), cache or empty_cache(roles.pasts, len(input_ids)))
        with torch.no_grad():
            outputs = self.module(*(values[name] for name in self.inputs))
        return outputs[0].float(), list(outputs[self.kept :])


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, else from softmax(logits / temperature) cut to the `top_k`
    likeliest and to the fewest whose probabilities reach `top_p`. Equal seeds draw equal tokens."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise BadInput(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise BadInput(f"top_k is {self.top_k}; at least one token must be left to draw from")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadInput(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """[B, vocabulary] -> the distribution that is drawn from, float32 [B, vocabulary]."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        scores = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], -torch.inf)
        probabilities = scores.softmax(-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(beyond, 0))
        return probabilities / probabilities.sum(-1, keepdim=True)

    def draw(self, logits: Tensor, random: torch.Generator) -> Tensor:
        """[B, vocabulary] -> int64 [B]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=random)[:, 0]


GREEDY = Sampling()


def positions(attention_mask: Tensor) -> Tensor:
    """Each token's place among those that are no padding; 0 for padding. [B, T] -> int64 [B, T]."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def stream(
    step: DecodeStep,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    eos: int | Collection[int] | None = None,
    sampling: Sampling = GREEDY,
    stop: Callable[[list[int]], bool] | None = None,
) -> Iterator[Tensor]:
    """Yield the next tokens, int64 [B], until every sequence has ended or `max_new_tokens` were made.

    Args:
        input_ids: int64 [B, S], shorter prompts padded on the left. attention_mask: int64 [B, S], 1 for tokens; default all.
        eos: token or tokens that end a sequence; the ended one repeats its end token while others go on.
        stop: called with a sequence's new tokens after each; True ends it.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    _check_prompt(input_ids, mask, max_new_tokens)
    ends = torch.tensor(sorted({eos} if isinstance(eos, int) else set(eos or ())), dtype=torch.int64)
    random = torch.Generator().manual_seed(sampling.seed)
    tokens, places, cache = input_ids, positions(mask), None
    ended = torch.zeros(len(input_ids), dtype=torch.bool)
    last = input_ids[:, -1]
    made: list[list[int]] = [[] for _ in range(len(input_ids))]
    for _ in range(max_new_tokens):
        logits, cache = step(tokens, mask, places, cache)
        last = torch.where(ended, last, sampling.draw(logits, random))
        ended = ended | torch.isin(last, ends)
        if stop is not None:
            for row in (row for row in range(len(made)) if not ended[row]):
                made[row].append(int(last[row]))
                ended[row] = stop(made[row])
        yield last
        if ended.all():
            return
        tokens, places = last[:, None], places[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


def _check_prompt(input_ids: Tensor, mask: Tensor, max_new_tokens: int) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] == 0 or mask.shape != input_ids.shape:
        raise BadInput(f"prompts must be [batch, length >= 1] with a mask of the same shape, not {tuple(input_ids.shape)}")
    if not mask[:, -1].all():
        raise BadInput("the last column of the prompts holds padding; pad shorter prompts on the left")
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {max_new_tokens}; ask for at least 1")


def generate(
    step: DecodeStep,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    on_token: Callable[[Tensor], None] | None = None,
    **options: Any,
) -> Tensor:
    """The prompts with what follows them, int64 [B, S + new]; `on_token` sees each step's tokens [B]. Options as `stream`'s."""
    produced = [input_ids]
    for tokens in stream(step, input_ids, attention_mask, **options):
        produced.append(tokens[:, None])
        if on_token is not None:
            on_token(tokens)
    return torch.cat(produced, 1)


@dataclass(frozen=True)
class Comparison:
    """What two models made of the same prompts, int64 [B, S + new], and for each the first new token that differs."""

    a: Tensor
    b: Tensor
    diverged: list[int | None] = field(default_factory=list)


def compare(
    step_a: DecodeStep, step_b: DecodeStep, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> Comparison:
    """Both models' own continuations, each from its own tokens. Options as `stream`'s."""
    a = generate(step_a, input_ids, attention_mask, **options)
    b = generate(step_b, input_ids, attention_mask, **options)
    length = input_ids.shape[1]
    return Comparison(a, b, [divergence(x.tolist(), y.tolist()) for x, y in zip(a[:, length:], b[:, length:])])


def divergence(a: list[int], b: list[int]) -> int | None:
    """The first position at which two sequences differ (the shorter one's end counts); None if they are equal."""
    return None if a == b else next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def seq2seq_step(encoder: ModelGraph, decoder: ModelGraph, inputs: Mapping[str, Tensor]) -> GraphStep:
    """Run an encoder once; the step decodes against its hidden states. Start it from the decoder's start token.

    decoder: a decode graph. Cross-attention computes the encoder's keys and values anew at each step; only self-attention is
    cached.
    """
    with torch.no_grad():
        outputs = encoder.module(dense=True)(*(inputs[i.name] for i in encoder.inputs))
    given = {"encoder_hidden_states": outputs[0], "encoder_attention_mask": inputs.get("attention_mask")}
    names = {i.name for i in decoder.inputs}
    return GraphStep(decoder, {name: value for name, value in given.items() if name in names and value is not None})
