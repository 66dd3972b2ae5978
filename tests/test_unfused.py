"""Attention written out as matmul, softmax, matmul: the operator in its place computes the same, and look-alikes are left."""

from __future__ import annotations

import language_models as zoo
import pytest
import torch
from torch import Tensor, nn

from lwcompile.attention import SDPA, find_attentions, slots
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.masks import MaskRule
from lwcompile.tracing import capture_module

LOWEST = torch.finfo(torch.float32).min


class Written(nn.Module):
    """One attention in one of the ways that libraries write it."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling, self.embed, self.mix = spelling, nn.Embedding(50, 24), nn.Linear(24, 72)
        self.register_buffer(
            "window", torch.ones(64, 64, dtype=torch.bool).tril() & ~torch.ones(64, 64, dtype=torch.bool).tril(-40)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch, length = input_ids.shape
        q, k, v = (x.view(batch, length, 3, 8).transpose(1, 2) for x in self.mix(self.embed(input_ids)).chunk(3, -1))
        weights = self.scores(q, k, attention_mask).softmax(-1, dtype=torch.float32)
        return weights.matmul(v)

    def scores(self, q: Tensor, k: Tensor, attention_mask: Tensor) -> Tensor:
        length = q.shape[2]
        lower = torch.ones(length, length, dtype=torch.bool).tril()
        open_ = lower & attention_mask[:, None, None, :].bool()
        bias = torch.where(open_, 0.0, LOWEST)
        product = torch.matmul(q, k.transpose(-1, -2))
        match self.spelling:
            case "divide, add":
                return product / 8**0.5 + bias
            case "add, divide":
                return (product + bias) / 8**0.5
            case "scale queries, add":
                return torch.matmul(q * 8**-0.5, k.permute(0, 1, 3, 2)) + bias
            case "fill":
                return (product * 0.3).masked_fill(~open_, LOWEST)
            case "fill twice":
                return product.masked_fill(~lower, -1e9).masked_fill(attention_mask[:, None, None, :] == 0, -1e9)
            case "stored window":
                return torch.where(self.window[:length, :length], product, LOWEST) * 0.3 + bias  # type: ignore[index]
            case "slopes, fill":
                place = torch.arange(length)
                return (product * 0.3 + (place[None, :] - place[:, None]) * 0.1).masked_fill(~open_, LOWEST)
            case "soft cap":
                return torch.tanh(product / 5) * 5 + bias
            case "bias from data":
                return product + q.sum(-1, keepdim=True) * torch.arange(length) + bias
            case _:
                return product.masked_fill(~open_, 0.0)


def traced(module: nn.Module) -> ModelGraph:
    inputs = zoo.batch(2, 16)
    example = {"input_ids": inputs["input_ids"] % 50, "attention_mask": inputs["attention_mask"]}
    return capture_module(module.eval(), example, {name: {0: "batch", 1: "sequence"} for name in example})[0]


CAUSAL = MaskRule(True, None, "attention_mask")
SPELLINGS = {
    "divide, add": (8**-0.5, CAUSAL),
    "add, divide": (8**-0.5, CAUSAL),
    "scale queries, add": (1.0, CAUSAL),
    "fill": (0.3, CAUSAL),
    "fill twice": (1.0, CAUSAL),
    "stored window": (0.3, MaskRule(True, 40, "attention_mask")),
    "slopes, fill": (0.3, None),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_written_attention_becomes_one_operator(spelling):
    torch.manual_seed(0)
    module = Written(spelling)
    graph = traced(module)
    scale, rule = SPELLINGS[spelling]
    (found,) = find_attentions(graph)
    assert found.mask == rule and abs(slots(found.node)["scale"] - scale) < 1e-9
    for length in (9, 47):
        inputs = zoo.batch(3, length)
        with torch.no_grad():
            wanted = module(inputs["input_ids"] % 50, inputs["attention_mask"]).transpose(1, 2)
            got = graph.module()(inputs["input_ids"] % 50, inputs["attention_mask"])[0].transpose(1, 2)
        assert not got.isnan().any()
        assert zoo.closeness(got, wanted, inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("spelling", ["soft cap", "bias from data", "filled with zero"])
def test_other_scores_are_left_as_they_are(spelling):
    module = Written(spelling)
    graph = traced(module)
    assert not list(iterate_calls(graph, SDPA))
    inputs = zoo.batch(3, 9)
    with torch.no_grad():
        wanted, got = (f(inputs["input_ids"] % 50, inputs["attention_mask"]) for f in (module, graph.module()))
    torch.testing.assert_close(got[0], wanted, rtol=1e-5, atol=1e-6)
