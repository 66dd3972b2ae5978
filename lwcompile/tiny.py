"""Three small random models in plain torch, and their programs: what `lwcompile.testing` and the examples run on.

    decoder     pre-norm, causal attention, head tied to the embedding          logits
    encoder     post-norm, attention in both directions                         last_hidden_state
    parallel    x + attention(norm(x)) + mlp(norm(x)) under one RMSNorm         logits

Two blocks of width 32. No positions are embedded: the causal mask is what tells them apart.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwcompile.program import Program
from lwcompile.tracing import capture_module

VOCABULARY = 61


class Attention(nn.Module):
    """Softmax attention of 4 heads: x [batch, sequence, width] -> the same shape."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """up, GELU, down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class PreNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, causal=True)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class PostNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, causal=False), nn.LayerNorm(width)
        self.mlp, self.mlp_norm = Mlp(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x))
        return self.mlp_norm(x + self.mlp(x))


class Parallel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.RMSNorm(width), Attention(width, causal=True), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.attention(normed) + self.mlp(normed)


class Decoder(nn.Module):
    """ids [batch, sequence] -> logits [batch, sequence, vocabulary]; the head reads the embedding's weight."""

    def __init__(self, block: type[nn.Module] = PreNorm, width: int = 32, blocks: int = 2, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x))}


class Encoder(nn.Module):
    """ids [batch, sequence] -> features [batch, sequence, width]."""

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(PostNorm(width) for _ in range(blocks))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"last_hidden_state": x}


def token_ids(rows: int = 8, length: int = 12, seed: int = 0) -> Tensor:
    """Random ids, int64 [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def models(seed: int = 0) -> dict[str, nn.Module]:
    """The three models by name, in eval mode, each with its own random weights; no global seed is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"decoder": Decoder().eval(), "encoder": Encoder().eval(), "parallel": Decoder(Parallel, tied=False).eval()}


@cache
def _captured() -> dict[str, Program]:
    programs, free = {}, {"input_ids": {0: "batch", 1: "sequence"}}
    for name, model in models().items():
        graph, _ = capture_module(model, {"input_ids": token_ids(2, 9)}, free)
        programs[name] = Program({"forward": graph}, graph.store, "unknown", name)
    return programs


def programs() -> dict[str, Program]:
    """Fresh copies of the three captured programs; batch and sequence are free."""
    return {name: program.copy() for name, program in _captured().items()}
