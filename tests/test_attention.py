"""Attention in one form: against the models themselves, against rules written as loops, and against look-alikes."""

from __future__ import annotations

import math

import language_models as zoo
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import lwcompile.attention as attention
from lwcompile.attention import SDPA, find_attentions
from lwcompile.canonical import canonicalize
from lwcompile.graph import Input, ModelGraph, iterate_calls
from lwcompile.masks import Formula, MaskRule, build, recognise
from lwcompile.probe import evaluate, value_inputs, zeros
from lwcompile.store import ParameterStore
from lwcompile.tracing import capture_module

aten = torch.ops.aten


# --- whole models


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_attention_is_found_with_its_heads_and_rule(name):
    found = find_attentions(zoo.captured(name))
    _, _, kv_heads, window = zoo.MODELS[name]
    windows = [window if name != "gemma3" or layer != 1 else None for layer in range(len(found))]
    assert [a.mask for a in found] == [MaskRule(True, w, "attention_mask") for w in windows]
    assert [(a.heads, a.kv_heads, a.key_width, a.value_width, a.kind) for a in found] == [(4, kv_heads, 8, 8, "self")] * len(
        found
    )


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_the_canonical_graph_is_the_model(name, side):
    inputs = zoo.batch(3, 13)
    if side != "left":
        inputs["attention_mask"] = inputs["attention_mask"].flip(1) if side == "right" else torch.ones(3, 13, dtype=torch.int64)
    graph = zoo.captured(name)
    with torch.no_grad():
        wanted = zoo.build(name)(**{i.name: inputs[i.name] for i in graph.inputs}, use_cache=False).logits
    got = zoo.run(graph, inputs)
    assert not got.isnan().any()
    assert zoo.closeness(got, wanted, torch.ones(3, 13)) < 1e-6  # also where there is padding


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon", "opt"])
def test_canonical_form_is_reached_once_for_all(name):
    graph = zoo.captured(name)
    before = graph.digest()
    canonicalize(graph)
    assert graph.digest() == before


def test_no_size_is_read_from_the_mask_but_the_masks_own(name="llama"):
    graph = zoo.captured(name)
    mask = graph.input_nodes()["attention_mask"]
    readers = [user for n in iterate_calls(graph, aten.sym_size.int) if n.args[0] is mask for user in n.users]
    closed = attention.mask_only(graph)
    assert readers and all(user in closed for user in readers)


def test_each_distinct_mask_is_evaluated_once(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "recognise", lambda graph, mask, reads: seen.append(mask) or recognise(graph, mask, reads))
    find_attentions(zoo.captured("gemma3"))
    assert len(seen) == len(set(seen)) == 2


# --- rules


rules = st.builds(
    MaskRule, causal=st.booleans(), window=st.none() | st.integers(1, 12), padding=st.sampled_from([None, "attention_mask"])
) | st.builds(
    MaskRule,
    causal=st.booleans(),
    window=st.integers(5, 12),
    padding=st.sampled_from([None, "attention_mask"]),
    sinks=st.integers(1, 4),
)


def by_loops(rule: MaskRule, queries: int, keys: int, padding: Tensor) -> Tensor:
    open_ = torch.zeros(len(padding), 1, queries, keys, dtype=torch.bool)
    for b in range(len(padding)):
        for i in range(queries):
            for j in range(keys):
                place = keys - queries + i
                late = rule.causal and j > place
                sinks = next((k for k in range(keys) if padding[b, k]), 0) + rule.sinks if rule.padding else rule.sinks
                sunk = rule.sinks and (j < sinks or (place < sinks and not rule.causal))
                far = rule.window is not None and abs(place - j) >= rule.window and not sunk
                padded = rule.padding is not None and padding[b, j] == 0
                open_[b, 0, i, j] = not (late or far or padded)
    return open_


def empty_graph() -> tuple[ModelGraph, fx.Node]:
    """A graph of two inputs whose output can be made to depend on anything."""
    graph = fx.Graph()
    free = {0: "batch", 1: "sequence"}
    inputs = [Input(name, (2, 16), torch.int64, free) for name in ("input_ids", "attention_mask")]
    nodes = [graph.create_node("placeholder", i.name, name=i.name) for i in inputs]
    output = graph.output((nodes[0],))
    return ModelGraph(graph, {}, ParameterStore(), inputs, ["ids"]), output


@given(rules, st.integers(1, 6), st.integers(0, 9), st.integers(0, 1 << 20))
@settings(max_examples=40, deadline=None)
def test_a_built_mask_is_the_rule_also_where_keys_exceed_queries(rule, queries, past, seed):
    graph, output = empty_graph()
    call, nodes = Formula(graph, output), graph.input_nodes()
    mask = build(call, rule, call.size(nodes["input_ids"], 1), call.size(nodes["attention_mask"], 1))
    keys = queries + past
    padding = torch.randint(0, 2, (2, keys), generator=torch.Generator().manual_seed(seed))
    wanted = by_loops(rule, queries, keys, padding)
    assert torch.equal(rule.allowed(queries, keys, padding).expand_as(wanted), wanted)
    if mask is None:
        assert wanted.all()
        return
    feeds = zeros(graph, {"batch": 2, "sequence": queries}) | {nodes["attention_mask"]: padding}
    assert torch.equal(evaluate(graph, mask, feeds).expand_as(wanted), wanted)


@given(rules)
@settings(max_examples=30, deadline=None)
def test_a_built_mask_is_recognised(rule):
    graph, output = empty_graph()
    call, nodes = Formula(graph, output), graph.input_nodes()
    mask = build(call, rule, call.size(nodes["input_ids"], 1), call.size(nodes["attention_mask"], 1))
    if mask is not None:
        found = recognise(graph, mask, value_inputs(graph))
        assert found in (rule, MaskRule(False, 1, rule.padding) if rule.window == 1 else rule)  # a window of 1 is causal anyway


class Masked(nn.Module):
    """One attention whose mask is written in one of many ways."""

    def __init__(self, spelling: str, window: int = 4) -> None:
        super().__init__()
        self.embed, self.spelling, self.window = nn.Embedding(50, 16), spelling, window
        self.register_buffer("table", torch.ones(20, 20, dtype=torch.bool).tril())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x if self.spelling == "no heads" else x.unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(x, x, x, self.mask(input_ids, attention_mask))

    def mask(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch, length = input_ids.shape
        lowest = torch.finfo(torch.float32).min
        place = torch.arange(length)
        lower = place[None, :] <= place[:, None]
        match self.spelling:
            case "additive":
                padding = (1.0 - attention_mask[:, None, None, :].float()) * lowest
                return torch.where(lower, 0.0, lowest) + padding.clamp(min=lowest / 2)
            case "triangle":
                return torch.ones(length, length, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None, :]
            case "window":
                near = place[None, :] > place[:, None] - self.window
                return (lower & near)[None, None] & (attention_mask[:, None, None, :] > 0)
            case "local":
                return ((place[None, :] - place[:, None]).abs() <= self.window)[None, None].expand(batch, 1, length, length)
            case "padding":
                return attention_mask[:, None, None, :].bool().expand(batch, 1, length, length)
            case "old padding":
                return (1.0 - attention_mask[:, None, None, :].float()) * -10000.0
            case "open":
                return torch.ones(batch, 1, length, length, dtype=torch.bool)
            case "slopes":
                return (place[None, :] - place[:, None]).float()[None, None] + torch.where(lower, 0.0, lowest)
            case "short table":
                return self.table[:length, :length]  # type: ignore[index]
            case "no heads":
                return lower
            case "every second":
                return (lower & ((place[:, None] - place[None, :]) % 2 == 0))[None, None]
            case _:
                chunk = torch.div(place, 4, rounding_mode="floor")
                return (lower & (chunk[None, :] == chunk[:, None]))[None, None]


def traced(module: nn.Module) -> ModelGraph:
    inputs = zoo.batch(2, 16)
    example = {"input_ids": inputs["input_ids"] % 50, "attention_mask": inputs["attention_mask"]}
    return capture_module(module.eval(), example, {name: {0: "batch", 1: "sequence"} for name in example})[0]


@pytest.mark.parametrize(
    ("spelling", "window", "rule"),
    [
        ("additive", 0, MaskRule(True, None, "attention_mask")),
        ("triangle", 0, MaskRule(True, None, "attention_mask")),
        ("window", 4, MaskRule(True, 4, "attention_mask")),
        ("window", 300, MaskRule(True, 300, "attention_mask")),
        ("window", 131072, MaskRule(True, 131072, "attention_mask")),
        ("local", 3, MaskRule(False, 4)),
        ("padding", 0, MaskRule(False, None, "attention_mask")),
        ("old padding", 0, MaskRule(False, None, "attention_mask")),
        ("open", 0, MaskRule(False)),
        ("short table", 0, MaskRule(True)),
        ("slopes", 0, None),
        ("every second", 0, None),
        ("chunks", 0, None),
    ],
)
def test_masks_are_known_by_what_they_do(spelling, window, rule):
    module = Masked(spelling, window)
    graph = traced(module)
    (found,) = find_attentions(graph)
    assert found.mask == rule
    inputs = zoo.batch(3, 9)
    inputs["input_ids"] %= 50
    with torch.no_grad():
        wanted = module(inputs["input_ids"], inputs["attention_mask"])
        mask = module.mask(inputs["input_ids"], inputs["attention_mask"])
    got = graph.module()(*(inputs[i.name] for i in graph.inputs))[0]
    rows = ((mask == 0) | (mask == 1)).any(-1).expand(3, 1, 9) if rule else torch.ones(3, 1, 9, dtype=torch.bool)
    torch.testing.assert_close(got[rows], wanted[rows], rtol=1e-5, atol=1e-6)


def test_attention_without_heads_is_left_alone():
    graph = traced(Masked("no heads"))
    assert list(iterate_calls(graph, SDPA)) and not find_attentions(graph)


def test_a_mask_without_padding_becomes_the_operators_own_flag():
    call = next(iterate_calls(zoo.captured("gpt2", ("attention_mask", "position_ids")), SDPA))
    assert attention.slots(call)["is_causal"] and attention.slots(call)["attn_mask"] is None


# --- grouped queries


class Grouped(nn.Module):
    """Keys and values of fewer heads, made as many as the queries' in one of several ways."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.embed, self.q, self.k, self.v = nn.Embedding(50, 24), nn.Linear(24, 48), nn.Linear(24, 16), nn.Linear(24, 16)

    def widen(self, x: Tensor) -> Tensor:
        """[B, S, 2 * 8] -> [B, 6, S, 8]."""
        batch, length, _ = x.shape
        x = x.view(batch, length, 2, 8)
        match self.spelling:
            case "repeat_interleave":
                return x.transpose(1, 2).repeat_interleave(3, dim=1)
            case "expand":
                return x.transpose(1, 2)[:, :, None].expand(batch, 2, 3, length, 8).reshape(batch, 6, length, 8)
            case "length first":
                return x[:, :, :, None].expand(batch, length, 2, 3, 8).reshape(batch, length, 6, 8).transpose(1, 2)
            case _:
                return x.transpose(1, 2).repeat(1, 3, 1, 1)  # heads in another order: no grouped queries

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q = self.q(x).view(*input_ids.shape, 6, 8).transpose(1, 2)
        mask = attention_mask.bool()[:, None, None, :]
        return nn.functional.scaled_dot_product_attention(q, self.widen(self.k(x)), self.widen(self.v(x)), mask)


@pytest.mark.parametrize(
    ("spelling", "heads"), [("repeat_interleave", 2), ("expand", 2), ("length first", 2), ("heads in turn", 6)]
)
def test_repeated_heads_are_read_unrepeated(spelling, heads):
    module = Grouped(spelling)
    graph = traced(module)
    (found,) = find_attentions(graph)
    assert found.kv_heads == heads and bool(found.node.kwargs.get("enable_gqa")) == (heads < 6)
    inputs = zoo.batch(3, 9)
    ids = inputs["input_ids"] % 50
    with torch.no_grad():
        wanted, got = module(ids, inputs["attention_mask"]), graph.module()(ids, inputs["attention_mask"])[0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_rows_in_which_everything_is_masked_are_no_nan():
    inputs = zoo.batch(3, 9)
    inputs["attention_mask"][2] = 0
    for name in ("llama", "gemma3", "opt"):
        assert not zoo.run(zoo.captured(name), inputs).isnan().any()


def test_scale_is_stated():
    (first, *_) = find_attentions(zoo.captured("llama"))
    assert math.isclose(attention.slots(first.node)["scale"], 8**-0.5)
