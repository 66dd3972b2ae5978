"""Windowed attention against modules whose masks were narrowed by hand, and rolling caches against the whole sequence."""

from __future__ import annotations

from typing import Any

import language_models as zoo
import pytest
import torch
from test_decode import greedy_by_prefill
from test_drop import outputs_differ
from test_share import captured
from torch import Tensor, nn

from lwcompile.attention import find_attentions
from lwcompile.attention_cost import AttentionCost, pays_from
from lwcompile.context import Context
from lwcompile.contract import TransformPass
from lwcompile.decode import derive_decode
from lwcompile.errors import BadPlan, Refused
from lwcompile.generate import GraphStep, generate
from lwcompile.graph import ModelGraph
from lwcompile.manager import Manager, relative_error
from lwcompile.masks import MaskRule
from lwcompile.passes.transform.drop import Drop
from lwcompile.passes.transform.window import Window
from lwcompile.program import Program
from lwcompile.structure import find_structure
from lwcompile.tracing import capture_module

pytest.importorskip("transformers", reason="the references are transformers' own modules: install lwcompile[hf]")


def windowed(
    graph: ModelGraph, transform: TransformPass, layers: tuple[int, ...] = (0, 1, 2), drops: tuple[str, ...] = ()
) -> ModelGraph:
    program = Program({"forward": graph.copy()}, graph.store)
    structure = find_structure(program)
    ctx = Context(structure=structure, program=program)
    steps: list[Any] = [(structure.sites[id.removesuffix(".")], Drop()) for id in drops]
    sites = [id for i in layers if not (id := f"block{i}.attention").startswith(drops)]
    steps += [(structure.sites[id], transform) for id in sites]
    assert len(Manager(ctx).transform(program, steps)) == len(steps), ctx.remarks
    return program.main


def in_pieces(decode: ModelGraph, inputs: dict[str, Tensor], pieces: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, S, vocabulary] of given tokens, fed in pieces of these lengths, and the last cache."""
    step, cache, start, logits = GraphStep(decode), None, 0, []
    for size in pieces:
        end = start + size
        part = (inputs["input_ids"][:, start:end], inputs["attention_mask"][:, :end], inputs["position_ids"][:, start:end])
        piece, cache = step.all_logits(*part, cache)
        logits.append(piece)
        start = end
    return torch.cat(logits, 1), cache or []


# --- the mask


@pytest.mark.parametrize(("size", "sinks"), [(4, 0), (5, 2), (3, 1)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_window_equals_the_model_under_a_mask_made_by_hand(name, size, sinks):
    """transformers takes a mask of its own making as [B, 1, S, S], additive."""
    graph, inputs = zoo.captured(name), zoo.batch(3, 14)
    mask = inputs["attention_mask"]
    first = mask.argmax(1)
    allowed = torch.zeros(3, 1, 14, 14, dtype=torch.bool)
    for b in range(3):
        for i in range(14):
            for j in range(i + 1):
                allowed[b, 0, i, j] = mask[b, j] == 1 and (i - j < size or j < int(first[b]) + sinks)
    bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted = zoo.build(name)(
            input_ids=inputs["input_ids"], attention_mask=bias, position_ids=inputs["position_ids"], use_cache=False
        ).logits
    found = zoo.run(windowed(graph, Window(size, sinks)), inputs)
    assert zoo.closeness(found, wanted, mask) < 1e-5
    assert zoo.closeness(zoo.run(graph, inputs), wanted, mask) > 1e-3, "the window changed nothing, so the test shows nothing"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "opt", "gemma3", "mistral"])
def test_a_window_as_long_as_the_sequence_changes_nothing(name):
    graph, inputs = zoo.captured(name), zoo.batch(3, 14)
    narrow = [a.mask.window for a in find_attentions(graph) if a.mask is not None]
    layers = tuple(i for i, w in enumerate(narrow) if w is None)
    if not layers:
        with pytest.raises(Refused, match="a window of 6 already"):
            program = Program({"forward": graph}, graph.store)
            Window(14).check(graph, find_structure(program).sites["block0.attention"])
        return
    found = zoo.run(windowed(graph, Window(14, 0), layers), inputs)
    with torch.no_grad():
        wanted = zoo.build(name)(**{i.name: inputs[i.name] for i in graph.inputs}, use_cache=False).logits
    assert zoo.closeness(found, zoo.run(graph, inputs), inputs["attention_mask"]) < 1e-6
    assert zoo.closeness(found, wanted, inputs["attention_mask"]) < 1e-5


def test_a_window_that_hides_no_pair_of_patches_changes_nothing():
    """Of ViT's class token and 16 patches the first and the last alone are 16 apart, and the class token is open to all."""
    model, example, program = captured("vit")
    wide, narrow = (windowed(program.main, Window(size, 1), (0, 1, 2, 3)) for size in (16, 5))
    assert outputs_differ(Program({"forward": wide}, wide.store), model, example) < 1e-5
    assert outputs_differ(Program({"forward": narrow}, narrow.store), model, example) > 1e-3, "so narrow a window changes nothing"
    with pytest.raises(Refused, match="its 17 positions are always within the window"):
        Window(17, 1).check(program.main, find_structure(program).sites["block0.attention"])


def test_the_rule_is_read_back_from_the_graph():
    graph = windowed(zoo.captured("llama"), Window(7, 2), (1,))
    assert [a.mask for a in find_attentions(graph)] == [
        MaskRule(True, None, "attention_mask"), MaskRule(True, 7, "attention_mask", 2), MaskRule(True, None, "attention_mask")
    ]  # fmt: skip


class Encoder(nn.Module):
    """One attention over a fixed number of patches behind a class token, and the reference by loops over pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.out = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.allowed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (f(n).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("free", [False, True])
def test_an_encoders_window_keeps_the_class_token_global(free):
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 11, 16)
    graph, _ = capture_module(model, {"x": x}, {"x": {0: "batch", 1: "patches"} if free else {0: "batch"}})
    program = Program({"forward": graph}, graph.store)
    place = torch.arange(11)
    near = (place[:, None] - place).abs() < 3
    near[0], near[:, 0] = True, True
    model.allowed = near
    with torch.no_grad():
        wanted = model(x)
    structure = find_structure(program)
    edited = windowed(graph, Window(3, 1), (0,))
    assert relative_error(wanted, edited.module()(x)[0]) < 1e-5
    site = structure.sites["block0.attention"]
    if free:
        Window(11, 1).check(graph, site)
    else:
        with pytest.raises(Refused, match="always within the window"):
            Window(11, 1).check(graph, site)


# --- the cache


CASES = [
    ("llama", 4, 0, ()),
    ("llama", 5, 3, ()),
    ("llama", 5, 3, ("block1.attention",)),
    ("gpt2", 4, 2, ("block0.attention", "block2.mlp")),
    ("falcon", 6, 1, ("block1.",)),
]


@pytest.mark.parametrize(("name", "size", "sinks", "drops"), CASES)
def test_a_rolling_cache_decodes_as_the_whole_sequence(name, size, sinks, drops):
    """Teacher-forced in pieces, and greedily token by token, for one row and for three padded on the left."""
    graph = windowed(zoo.captured(name), Window(size, sinks), drops=drops)
    decode = derive_decode(graph)
    for rows in (1, 3):
        inputs = zoo.batch(rows, 17)
        wanted = zoo.run(graph, inputs)
        for pieces in ([1] * 17, [6, 1, 1, 4, 5], [2, 3, 12], [17]):
            got, cache = in_pieces(decode, inputs, pieces)
            assert zoo.closeness(got, wanted, inputs["attention_mask"]) < 1e-4
            assert {c.shape[2] for c in cache} == {size - 1 + sinks}
        prompt = zoo.batch(rows, 9)
        produced = generate(GraphStep(decode), prompt["input_ids"], prompt["attention_mask"], max_new_tokens=24)
        assert torch.equal(produced, greedy_by_prefill(graph, prompt, 24))


def test_whole_and_rolling_caches_stand_side_by_side():
    graph = windowed(windowed(zoo.captured("llama"), Window(4, 2), (0,)), Window(6, 0), (2,))
    decode, inputs = derive_decode(graph), zoo.batch(3, 17)
    assert [i.dynamic[2] for i in decode.inputs[3:]] == ["past_5"] * 2 + ["past"] * 2 + ["past_5"] * 2
    got, cache = in_pieces(decode, inputs, [6, 1, 7, 3])
    assert zoo.closeness(got, zoo.run(graph, inputs), inputs["attention_mask"]) < 1e-4
    assert [c.shape[2] for c in cache] == [5, 5, 17, 17, 5, 5]
    whole, cache = in_pieces(derive_decode(graph, roll=False), inputs, [6, 1, 7, 3])
    assert zoo.closeness(whole, got, inputs["attention_mask"]) < 1e-4 and {c.shape[2] for c in cache} == {17}


def test_without_a_padding_input_one_cache_stays_whole():
    """Positions are counted, and nothing else says how long the sequence is."""
    graph = windowed(zoo.captured("gpt2", ("position_ids", "attention_mask")), Window(4, 2))
    decode, inputs = derive_decode(graph), zoo.batch(1, 13)
    got, cache = in_pieces(decode, inputs, [5, 1, 1, 6])
    assert zoo.closeness(got, zoo.run(graph, inputs), inputs["attention_mask"]) < 1e-4
    assert [c.shape[2] for c in cache] == [13, 13, 5, 5, 5, 5]


def test_the_check_sees_a_cache_that_forgets_too_early():
    from lwcompile.decode import verify_decode

    graph = windowed(zoo.captured("llama"), Window(5, 0))
    decode = derive_decode(graph)
    for node in decode.graph.nodes:
        if node.target is torch.ops.aten.slice.Tensor and node.args[1:] == (2, -4):
            node.args = (node.args[0], 2, -3)
    with pytest.raises(Refused, match="differs"):
        verify_decode(graph, decode)


# --- costs and refusals


def test_costs_count_pairs():
    """By loops over queries and keys."""
    for window, sinks, length in ((None, 0, 9), (4, 0, 9), (4, 2, 20), (30, 2, 9)):
        cost = AttentionCost(6, 2, 8, 10, window, sinks)
        pairs = sum(window is None or i - j < window or j < sinks for i in range(length) for j in range(i + 1))
        assert cost.prefill_flops(length) == 2 * pairs * 6 * 18
        last = sum(window is None or length - j < window or j < sinks for j in range(length + 1))
        assert cost.decode_flops(length) == 2 * last * 6 * 18
        kept = sum(window is None or length - j < window or j < sinks for j in range(length))
        assert cost.cache_bytes(length) == 4 * kept * 2 * 18


def test_a_form_pays_from_a_stated_length():
    dense, narrow = AttentionCost(9, 3, 64, 64), AttentionCost(9, 3, 64, 64, 128, 4)
    length = pays_from(narrow.cache_bytes, dense.cache_bytes)
    assert (
        length == 132 and narrow.cache_bytes(132) < dense.cache_bytes(132) and narrow.cache_bytes(131) == dense.cache_bytes(131)
    )
    assert pays_from(dense.cache_bytes, narrow.cache_bytes) is None


@pytest.mark.parametrize("options", [{"size": 1}, {"size": 4, "sinks": 4}, {"sinks": -1}])
def test_windows_that_make_no_sense_are_refused(options):
    with pytest.raises(BadPlan):
        Window(**options)


# --- in a file


@pytest.mark.parametrize(("size", "sinks"), [(4, 0), (5, 2)])
def test_a_file_rolls_its_cache_too(size, sinks, tmp_path):
    """The decode graph run by onnxruntime: prompts longer and shorter than the window, three rows padded on the left."""
    pytest.importorskip("onnxruntime")
    from lwcompile.backends.onnx.backend import Onnx

    graph = windowed(zoo.captured("llama"), Window(size, sinks), (0, 2))
    decode = derive_decode(graph)
    backend, path = Onnx(), tmp_path / "model.onnx"
    backend.lower(Program({"forward": graph, "decode": decode}, graph.store), path, None)
    step = backend.decode_step(path)
    for length in (3, 9):
        prompt = {name: value[:, -length:] for name, value in zoo.batch(3, 9).items()}
        made = generate(step, prompt["input_ids"], prompt["attention_mask"], max_new_tokens=12)
        assert torch.equal(made, greedy_by_prefill(graph, prompt, 12))
    assert set(backend.speed(path)) == {"prefill_ms", "decode_ms"}
