"""Windowed masks read back from their formula, and attention in blocks in an ONNX file against masked attention in torch."""

from __future__ import annotations

from typing import Any

import language_models as zoo
import pytest
import torch
from test_window import Encoder, windowed

from lwcompile.attention import find_attentions, slots
from lwcompile.bands import read_band
from lwcompile.decode import derive_decode
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.passes.transform.linear_attention import Linear
from lwcompile.passes.transform.window import Window
from lwcompile.program import Program
from lwcompile.tracing import capture_module

pytest.importorskip("transformers", reason="the models are transformers': install lwcompile[hf]")


def bands(graph: ModelGraph) -> list[Any]:
    graph.propagate()
    masks = (slots(a.node)["attn_mask"] for a in find_attentions(graph))
    return [m if m is None else read_band(m) for m in masks]


@pytest.mark.parametrize(("size", "sinks"), [(4, 0), (5, 2)])
def test_a_band_is_what_the_mask_was_built_from(size, sinks):
    graph = windowed(zoo.captured("llama"), Window(size, sinks), (0, 2))
    for entry in (graph, derive_decode(graph, check=False)):
        first, none, last = bands(entry)
        assert none is None and first == last, "the mask without a window has no band"
        assert (first.window, first.causal, first.sinks) == (size, True, sinks)
        assert first.open_ is not None and (first.first is None) == (sinks == 0)
    native = bands(zoo.captured("gemma3"))
    assert [b.window if b else None for b in native] == [5, None, 5]


def test_an_encoders_band_reads_both_ways():
    model, x = Encoder().eval(), torch.randn(2, 11, 16)
    graph, _ = capture_module(model, {"x": x}, {"x": {0: "batch", 1: "patches"}})
    (band,) = bands(windowed(graph, Window(3, 1), (0,)))
    assert (band.window, band.causal, band.sinks, band.first) == (3, False, 1, None)


def test_a_mask_of_other_numbers_is_no_band():
    """The same operators over a key's own position in place of the query's."""
    graph = windowed(zoo.captured("llama"), Window(4, 0), (0,))
    (mask,) = {slots(n)["attn_mask"] for n in iterate_calls(graph, torch.ops.aten.scaled_dot_product_attention.default)
               if read_band(slots(n)["attn_mask"])}  # fmt: skip
    near = mask.args[0].args[1]
    near.args[0].args = tuple(reversed(near.args[0].args))
    assert read_band(mask) is None


@pytest.mark.parametrize(
    ("transform", "block"),
    [
        (Window(4, 0), 3),
        (Window(5, 2), 4),
        (Window(3, 1), 64),
        (Linear(4, steps=0), 3),
        (Linear(2, steps=0), 4),
        (Linear(5, steps=0), 64),
    ],
)
def test_blocks_are_the_whole_attention(transform, block, tmp_path, monkeypatch):
    """Lengths below, at and above window and block, three rows padded on the left; the parity of the backend has none of these."""
    pytest.importorskip("onnxruntime")
    from lwcompile.backends.onnx.backend import Onnx
    from lwcompile.backends.onnx.operators import bands as operators

    monkeypatch.setattr(operators, "BLOCK", block)
    graph = windowed(zoo.captured("llama"), transform)
    backend, path = Onnx(), tmp_path / "model.onnx"
    backend.lower(Program({"forward": graph}, graph.store), path, None)
    for length in (1, 3, 8, 9, 23):
        inputs = zoo.batch(3, length)
        found = backend.run(path, inputs)["logits"]
        assert zoo.closeness(found, zoo.run(graph, inputs), inputs["attention_mask"]) < 1e-5


def test_blocks_read_both_ways(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from lwcompile.backends.onnx.backend import Onnx
    from lwcompile.backends.onnx.operators import bands as operators

    monkeypatch.setattr(operators, "BLOCK", 4)
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 11, 16)
    graph, _ = capture_module(model, {"x": x}, {"x": {0: "batch", 1: "patches"}})
    graph = windowed(graph, Window(3, 0), (0,))
    backend, path = Onnx(), tmp_path / "model.onnx"
    backend.lower(Program({"forward": graph}, graph.store), path, None)
    for length in (1, 4, 7, 14):
        x = torch.randn(2, length, 16)
        (found,) = backend.run(path, {"x": x}).values()
        torch.testing.assert_close(found, graph.module()(x)[0], rtol=1e-5, atol=1e-5)
