"""The model: its weights on one device in one dtype, and its entry points as `model.json` describes them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lwcompile.backends.triton.kernels.packed import Packed

HERE = Path(__file__).parent


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
        described = self.entries["decode"]
        roles, pasts = described["roles"], [i for i in described["inputs"] if i["name"].startswith("past_key_values.")]
        if cache is None:
            shapes = [
                (len(input_ids), i["shape"][1], 0, i["shape"][3]) if len(i["shape"]) > 2 else (len(input_ids), 0) for i in pasts
            ]
            dtypes = [self.weights.dtype if i["dtype"].startswith("float") else getattr(torch, i["dtype"]) for i in pasts]
            cache = [torch.empty(s, dtype=dtype, device=self.weights.device) for s, dtype in zip(shapes, dtypes)]
        named = {roles["tokens"]: input_ids, roles["padding"]: attention_mask, roles["positions"]: position_ids}
        made = list(self.run("decode", named | dict(zip((i["name"] for i in pasts), cache))).values())
        kept = len(made) - len(pasts)
        return made[0][:, -1].float(), made[kept:]

    def generate(self, input_ids: Tensor, max_new_tokens: int = 32) -> Tensor:
        """The likeliest continuation of prompts without padding: int64 [B, S] -> [B, S + max_new_tokens]."""
        found, tokens, cache = input_ids, input_ids, None
        for _ in range(max_new_tokens):
            length = found.shape[1]
            places = torch.arange(length - tokens.shape[1], length).expand_as(tokens)
            logits, cache = self.step(tokens, torch.ones_like(found), places, cache)
            tokens = logits.argmax(-1, keepdim=True).to(found.device)
            found = torch.cat([found, tokens], 1)
        return found


def load(
    device: str | torch.device = "cuda", dtype: torch.dtype = torch.float32, stored: Mapping[str, Tensor] | None = None
) -> Model:
    """The model in this folder.

    dtype: of activations and of weights that are not packed; sums are always made in float32.
    stored: what is used instead of weights.safetensors, under the names that it has there.
    """
    return Model(device, dtype, stored)
