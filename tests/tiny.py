"""Small random models and their programs, for tests of passes that run a model. Built from transformers' own classes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from lwcompile.data import CalibrationSet
from lwcompile.program import Program
from lwcompile.store import ParameterStore
from lwcompile.tracing import capture_module

VOCABULARY = 67
DYNAMIC = {"input_ids": {0: "batch", 1: "sequence"}}


@cache
def llama(tied: bool = True, layers: int = 3, seed: int = 0) -> nn.Module:
    """A Llama of width 32 with 4 heads over 2 key-value heads; weights large enough that layers matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(rows: int = 4, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@cache
def _captured(tied: bool, layers: int) -> Program:
    graph, _ = capture_module(llama(tied, layers), {"input_ids": ids(2, 9), "use_cache": False}, DYNAMIC)
    return Program({"forward": graph}, graph.store, "causal-lm", "tiny")


def llama_program(tied: bool = True, layers: int = 3) -> Program:
    """A fresh copy of the captured `llama`."""
    return _captured(tied, layers).copy()


def calibration(rows: int = 8, length: int = 12, seed: int = 1) -> CalibrationSet:
    return CalibrationSet({"input_ids": ids(rows, length, seed)}, "text", "random ids")


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        return {"last_hidden_state": x + torch.tanh(self.inner(x))}


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.Linear(16, VOCABULARY)

    def forward(self, decoder_input_ids: Tensor, encoder_hidden_states: Tensor) -> dict[str, Tensor]:
        x = self.embed(decoder_input_ids)
        weights = torch.softmax(x @ encoder_hidden_states.transpose(1, 2), dim=-1)
        return {"logits": self.head(x + self.mix(weights @ encoder_hidden_states))}


@cache
def pair() -> tuple[nn.Module, nn.Module, Program]:
    """An encoder, a decoder that reads it, and the program of both."""
    torch.manual_seed(0)
    encoder, decoder, store = _Encoder().eval(), _Decoder().eval(), ParameterStore()
    free = {0: "batch", 1: "sequence"}
    first, _ = capture_module(encoder, {"input_ids": ids(2, 7)}, {"input_ids": free}, store=store)
    example = {"decoder_input_ids": ids(2, 5), "encoder_hidden_states": torch.randn(2, 7, 16)}
    dynamic = {"decoder_input_ids": {0: "batch", 1: "target"}, "encoder_hidden_states": free}
    second, _ = capture_module(decoder, example, dynamic, store=store)
    return encoder, decoder, Program({"encoder": first, "decoder": second}, store, "seq2seq", "pair")
