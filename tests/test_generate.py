"""The generation loop, on steps whose answers are known, and sampling against the distribution it states."""

from __future__ import annotations

from typing import Any

import language_models as zoo
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lwcompile.decode import derive_decode
from lwcompile.errors import BadInput
from lwcompile.generate import GraphStep, Roles, Sampling, compare, divergence, generate, positions, stream

VOCABULARY = 20


class Counting:
    """Answers with the last token plus one, and writes down what it was asked."""

    def __init__(self, wrong_at: int | None = None) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Any]] = []
        self.wrong_at = wrong_at

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        self.calls.append((input_ids, attention_mask, position_ids, cache))
        step = 2 if len(self.calls) - 1 == self.wrong_at else 1
        logits = torch.nn.functional.one_hot((input_ids[:, -1] + step) % VOCABULARY, VOCABULARY).float()
        return logits, (cache or 0) + input_ids.shape[1]


PROMPTS = torch.tensor([[3, 4, 5], [0, 0, 9]])
MASK = torch.tensor([[1, 1, 1], [0, 0, 1]])


def test_the_loop_gives_each_step_what_it_needs():
    step = Counting()
    produced = generate(step, PROMPTS, MASK, max_new_tokens=3)
    assert produced.tolist() == [[3, 4, 5, 6, 7, 8], [0, 0, 9, 10, 11, 12]]
    tokens, masks, places, caches = zip(*step.calls)
    assert [t.tolist() for t in tokens] == [PROMPTS.tolist(), [[6], [10]], [[7], [11]]]
    assert [m.tolist()[1] for m in masks] == [[0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1, 1]]
    assert [p.tolist() for p in places] == [[[0, 1, 2], [0, 0, 0]], [[3], [1]], [[4], [2]]]
    assert list(caches) == [None, 3, 4]


def test_positions_count_what_is_no_padding():
    assert positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_an_ended_sequence_repeats_its_end_while_others_go_on():
    step = Counting()
    assert generate(step, PROMPTS, MASK, max_new_tokens=9, eos=[7, 12]).tolist() == [[3, 4, 5, 6, 7, 7], [0, 0, 9, 10, 11, 12]]
    assert len(step.calls) == 3
    assert generate(Counting(), PROMPTS[:1], max_new_tokens=9, eos=7).tolist() == [[3, 4, 5, 6, 7]]


def test_a_stop_condition_sees_a_sequences_new_tokens():
    seen = []

    def stop(made: list[int]) -> bool:
        seen.append(list(made))
        return made[-1] % 7 == 0

    produced = generate(Counting(), PROMPTS[:1], max_new_tokens=9, stop=stop)
    assert produced.tolist() == [[3, 4, 5, 6, 7]] and seen == [[6], [6, 7]]


def test_tokens_are_seen_as_they_are_made():
    seen: list[list[int]] = []
    produced = generate(Counting(), PROMPTS, MASK, max_new_tokens=4, on_token=lambda tokens: seen.append(tokens.tolist()))
    assert torch.tensor(seen).T.tolist() == produced[:, 3:].tolist()
    steps = stream(Counting(), PROMPTS, MASK, max_new_tokens=4)
    assert next(steps).tolist() == [6, 10]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"input_ids": PROMPTS[:, :0]}, "length >= 1"),
        ({"input_ids": PROMPTS[0]}, "batch"),
        ({"attention_mask": MASK[:, :2]}, "same shape"),
        ({"attention_mask": MASK.flip(1)}, "on the left"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(change, sentence):
    with pytest.raises(BadInput, match=sentence):
        generate(Counting(), **{"input_ids": PROMPTS, "attention_mask": MASK, **change})


# --- sampling


@given(st.integers(0, 1 << 20), st.floats(0.2, 3), st.none() | st.integers(1, VOCABULARY), st.none() | st.floats(0.05, 1))
@settings(max_examples=60, deadline=None)
def test_the_stated_distribution_is_the_cut_softmax(seed, temperature, top_k, top_p):
    logits = 3 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    got = Sampling(temperature, top_k, top_p).probabilities(logits)[0].double()
    weights = (logits[0].double() / temperature).exp()
    order = sorted(range(VOCABULARY), key=lambda i: -float(weights[i]))[: top_k or VOCABULARY]
    total, kept, mass = sum(float(weights[i]) for i in order), [], 0.0
    for i in order:
        if top_p is not None and mass >= top_p - 1e-6:
            break
        kept.append(i)
        mass += float(weights[i]) / total
    if top_p is not None and abs(mass - top_p) < 1e-5:
        return  # which side of the cut a token falls on is rounding
    wanted = torch.zeros(VOCABULARY, dtype=torch.double)
    wanted[kept] = weights[kept] / weights[kept].sum()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_draws_follow_the_distribution_and_the_seed():
    sampling = Sampling(temperature=1.0, top_k=3, seed=5)
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]]).expand(20000, -1)
    draws = [sampling.draw(logits, torch.Generator().manual_seed(sampling.seed)) for _ in range(2)]
    assert torch.equal(*draws)
    counts = torch.bincount(draws[0], minlength=4) / 20000
    torch.testing.assert_close(counts, sampling.probabilities(logits[:1])[0], rtol=0, atol=0.015)
    assert counts[3] == 0


def test_temperature_zero_is_greedy():
    logits = torch.randn(5, VOCABULARY)
    random = torch.Generator()
    assert torch.equal(Sampling().draw(logits, random), logits.argmax(-1))
    assert torch.equal(Sampling().probabilities(logits).argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(options):
    with pytest.raises(BadInput, match=next(iter(options))):
        Sampling(**options)


# --- two models side by side


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_divergence_is_the_first_place_that_differs(a, b):
    at = divergence(a, b)
    if at is None:
        assert a == b
    else:
        assert a[:at] == b[:at] and a[at : at + 1] != b[at : at + 1]


def test_two_steps_are_compared_token_by_token():
    found = compare(Counting(), Counting(wrong_at=2), PROMPTS[:1], max_new_tokens=5)
    assert found.a[0, 3:].tolist() == [6, 7, 8, 9, 10] and found.b[0, 3:].tolist() == [6, 7, 9, 10, 11]
    assert found.diverged == [2]
    assert compare(Counting(), Counting(), PROMPTS, MASK, max_new_tokens=5).diverged == [None, None]


# --- graphs as steps


def test_a_sampled_sequence_is_the_same_under_one_seed():
    step = GraphStep(derive_decode(zoo.captured("llama")))
    prompt = zoo.batch(3, 9)
    options: dict[str, Any] = {"attention_mask": prompt["attention_mask"], "max_new_tokens": 12}
    made = [generate(step, prompt["input_ids"], sampling=Sampling(0.9, top_p=0.9, seed=s), **options) for s in (1, 1, 2)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_quantization_is_seen_in_a_comparison():
    graph = zoo.captured("llama")
    steps = [GraphStep(derive_decode(g)) for g in (graph, zoo.quantized(graph, bits=2))]
    prompt = zoo.batch(1, 9)
    dense, packed = steps
    (at,) = compare(dense, packed, prompt["input_ids"], max_new_tokens=24).diverged
    assert at is not None


def test_the_inputs_of_a_decode_graph_are_told_apart():
    roles = Roles.of(derive_decode(zoo.captured("gpt2")))
    assert (roles.tokens, roles.padding, roles.positions, len(roles.pasts)) == ("input_ids", "attention_mask", "position_ids", 6)
    with pytest.raises(BadInput, match="no cache"):
        GraphStep(zoo.captured("gpt2"))


def test_padding_is_refused_by_a_graph_that_has_no_mask():
    step = GraphStep(derive_decode(zoo.captured("gpt2", ("position_ids", "attention_mask"))))
    prompt = zoo.batch(3, 9)
    with pytest.raises(BadInput, match="no attention mask"):
        generate(step, prompt["input_ids"], prompt["attention_mask"], max_new_tokens=2)
