"""Greedy decoding in memory that stays where it is: every step is the same calls on the same tensors, so a CUDA graph can replay it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Advance = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Tensor], tuple[Tensor, Sequence[Tensor]]]
"""Tokens, mask, positions, caches and places, as `Model.advance` takes them; the last position's logits, and the caches."""


class Decoding:
    """B sequences with room for C tokens each, all tensors on one device.

    tokens, positions: int64 [B, 1], what the next step takes in. mask: int64 [B, C], 0 at padding. places: int64 [1], the column that
    the next step writes. caches: [B, heads, C, width]. logits: float32 [B, vocabulary], of the last step.
    """

    def __init__(self, advance: Advance, cache: Sequence[Tensor], capacity: int) -> None:
        """cache: one that holds such sequences, for its shapes."""
        batch, device = len(cache[0]), cache[0].device
        self.tokens, self.positions = (torch.zeros(batch, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.mask = torch.ones(batch, capacity, dtype=torch.int64, device=device)
        self.places = torch.zeros(1, dtype=torch.int64, device=device)
        self.caches = [c.new_empty((batch, c.shape[1], capacity, c.shape[3])) for c in cache]
        self.logits = torch.empty(0, device=device)
        self._advance, self._is_warm = advance, False
        self._replay: Callable[[], None] | None = None

    def fits(self, batch: int, capacity: int) -> bool:
        return len(self.tokens) == batch and capacity <= self.mask.shape[1]

    def start(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Sequence[Tensor]) -> None:
        """Continue sequences of P tokens with `tokens`: mask [B, P], positions [B, 1] of the tokens, cache [B, heads, P, width]."""
        length = mask.shape[1]
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.places.fill_(length)
        self.mask.fill_(1)
        self.mask[:, :length] = mask
        for held, past in zip(self.caches, cache):
            held[:, :, :length] = past

    def step(self) -> Tensor:
        """Take in one token of each sequence: the next, int64 [B, 1]. On a GPU, from the second step on by replaying a graph."""
        if self._replay is None and self._is_warm and self.tokens.is_cuda:
            self._replay = self._captured()
        (self._replay or self._step)()
        self._is_warm = True
        return self.tokens.clone()

    def _step(self) -> None:
        self.logits, _ = self._advance(self.tokens, self.mask, self.positions, self.caches, self.places)
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))
        self.positions += 1
        self.places += 1

    def _captured(self) -> Callable[[], None]:
        """The step as a graph. It must have run before, which compiles its kernels."""
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.tokens.device), torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph of a decoding step ({error}): its kernels are launched one by one", stacklevel=2)
            return self._step
        return graph.replay
