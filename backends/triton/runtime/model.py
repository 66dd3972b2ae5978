"""The model: its weights on one device in one dtype, and its entry points as `model.json` describes them."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lwcompile.backends.triton.kernels.packed import Packed
from lwcompile.backends.triton.runtime.decoding import Decoding

HERE = Path(__file__).parent
ROOM = 256
"""Caches that are written in place have room for a multiple of so many tokens, so that the next prompt often fits as well."""


class Weights(Mapping[str, Any]):
    """Tensors and packed weights by name, with the device and the dtype that activations have."""

    def __init__(
        self, described: Mapping[str, Any], stored: Mapping[str, Tensor], device: str | torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        stored, self._held = dict(stored), {}
        for name, form in described["packed"].items():
            parts = (stored.pop(f"{name}.{part}", None) for part in ("words", "scale", "zero"))
            self._held[name] = Packed(*parts, **form).to(device)  # type: ignore[arg-type]
        for name, tensor in stored.items():
            self._held[name] = tensor.to(device, dtype if name in described["cast"] else tensor.dtype)

    def __getitem__(self, name: str) -> Any:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class Model:
    """Runs the entry points; `forward` and `decode` where there are such."""

    def __init__(
        self,
        device: str | torch.device = "cuda",
        dtype: torch.dtype = torch.float32,
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        described = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
        self.entries: dict[str, dict[str, Any]] = described["entries"]
        if stored is None:
            stored = load_file(HERE / "weights.safetensors", device=str(device))
        self.weights = Weights(described, stored, device, dtype)
        self._functions = {
            name: getattr(importlib.import_module(f".graph_{name}", __package__), name) for name in self.entries
        }  # fmt: skip
        self._decoding: Decoding | None = None

    @torch.no_grad()
    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One entry point on inputs by name; its outputs by name."""
        described = self.entries[entry]
        given = [inputs[i["name"]].to(self.weights.device) for i in described["inputs"]]
        return dict(zip(described["outputs"], self._functions[entry](self.weights, *given)))

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return self.run("forward", inputs)

    def decode(self, **inputs: Tensor) -> dict[str, Tensor]:
        return self.run("decode", inputs)

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: list[Tensor] | None
    ) -> tuple[Tensor, Any]:
        """Advance B sequences by S tokens: the last position's logits, float32 [B, vocabulary], and the longer cache.

        input_ids, position_ids: int64 [B, S]. attention_mask: int64 [B, P + S], 0 at padding. cache: of the last call, or None.
        """
        if cache is None:
            cache = [torch.zeros(shape, dtype=dtype, device=self.weights.device) for shape, dtype in self._caches(len(input_ids))]
        tokens, mask, positions, *cache = (t.to(self.weights.device) for t in (input_ids, attention_mask, position_ids, *cache))
        return self.advance(tokens, mask, positions, cache)

    @torch.no_grad()
    def advance(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Sequence[Tensor],
        places: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """`step` on tensors that are on the model's device.

        places: int64 [S], the columns that new tokens take in caches which have room for them and are as long as the mask; they are
            written in place. Only where `why_growing` is None.
        """
        described, left = self.entries["decode"], iter(cache)
        roles = described["roles"]
        named = {roles["tokens"]: input_ids, roles["padding"]: attention_mask, roles["positions"]: position_ids}
        given = [named[i["name"]] if i["name"] in named else next(left) for i in described["inputs"]]
        made = self._functions["decode"](self.weights, *given, places=places, last=True)
        kept = len(made) - len(cache)
        return made[0][:, -1].float(), list(made[kept:])

    def _caches(self, batch: int) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of caches of no token. What has one size however many there were is a sum over them, kept in float32."""
        for i in self.entries["decode"]["inputs"]:
            if i["name"].startswith("past_key_values."):
                free = set(i["free"])
                shape = tuple(batch if d == 0 else 0 if d in free else size for d, size in enumerate(i["shape"]))
                follows = i["dtype"].startswith("float") and free - {0}
                yield shape, self.weights.dtype if follows else getattr(torch, i["dtype"])

    # --- generation

    @property
    def why_growing(self) -> str | None:
        """Why decoding joins caches anew at every step; None if `generate` writes them in place and, on a GPU, replays a CUDA graph."""
        return self.entries["decode"]["growing"]

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int = 32, attention_mask: Tensor | None = None) -> Tensor:
        """The likeliest continuation: int64 [B, S] -> [B, S + max_new_tokens]. attention_mask: [B, S], 0 at padding, on the left."""
        if max_new_tokens < 1:
            return input_ids
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if self.entries["decode"]["roles"]["padding"] is None and not mask.all():
            raise ValueError("this model takes no attention mask: generate prompts of one length at a time")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits, cache = self.step(input_ids, mask, positions, None)
        first = logits.argmax(-1, keepdim=True)
        if self.why_growing is not None and first.is_cuda:
            warnings.warn(f"each step is launched call by call, without a CUDA graph: {self.why_growing}", stacklevel=2)
        follow = self._in_place if self.why_growing is None else self._growing
        rest = follow(first, mask.to(first.device), positions[:, -1:].to(first.device) + 1, cache, mask.shape[1] + max_new_tokens)
        return torch.cat([input_ids, torch.cat([first, *islice(rest, max_new_tokens - 1)], 1).to(input_ids.device)], 1)

    def _growing(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: list[Tensor], _: int) -> Iterator[Tensor]:
        """What follows `tokens`, int64 [B, 1] each."""
        while True:
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            logits, cache = self.advance(tokens, mask, positions, cache)
            tokens, positions = logits.argmax(-1, keepdim=True), positions + 1
            yield tokens

    def _in_place(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: list[Tensor], length: int) -> Iterator[Tensor]:
        """As `_growing`, up to `length` tokens with the prompt's. The memory, and the graph in it, serve later calls that they fit."""
        if self._decoding is None or not self._decoding.fits(len(tokens), length):
            self._decoding = None
            self._decoding = Decoding(self.advance, cache, -(-length // ROOM) * ROOM)
        self._decoding.start(tokens, mask, positions, cache)
        while True:
            yield self._decoding.step()


def load(
    device: str | torch.device = "cuda", dtype: torch.dtype = torch.float32, stored: Mapping[str, Tensor] | None = None
) -> Model:
    """The model in this folder.

    dtype: of activations and of weights that are not packed; sums are always made in float32.
    stored: what is used instead of weights.safetensors, under the names that it has there.
    """
    return Model(device, dtype, stored)
