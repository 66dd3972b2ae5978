"""The two sides of `gpu_model`: Llama's shape as the Triton backend runs it, its weights packed, and as transformers does, dense.

The model is traced with weights that take no memory; each matrix becomes packed codes of which only the shapes are known; the package's
source is written as for any program, and loaded with random codes and scales made on the device.
"""

from __future__ import annotations

import functools
import importlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lwcompile.backends.triton.emit import Stored, write_source
from lwcompile.backends.triton.kernels.launch import TABLES
from lwcompile.decode import derive_decode
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.graph import ModelGraph, OverlayStore, iterate_calls
from lwcompile.program import Program
from lwcompile.store import ParameterStore
from lwcompile.tracing import capture_module

aten = torch.ops.aten
PEER = "Inductor bf16"


@dataclass(frozen=True)
class Step:
    """What is timed: decode of one token a sequence behind `tokens` cached ones, prefill of `tokens`, or generation behind a prompt of
    `tokens`."""

    kind: str
    batch: int
    tokens: int

    @property
    def made(self) -> int:
        """Tokens that one call takes in."""
        return self.batch * (self.tokens if self.kind == "prefill" else 1)


# --- the model, without its weights


def llama(config: LlamaConfig, weight: Callable[[Sequence[int]], Tensor], device: str) -> LlamaForCausalLM:
    """The model with each weight made of its shape alone."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.load_state_dict({name: weight(p.shape) for name, p in model.state_dict().items()}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model


class Nameless(OverlayStore):
    """Tensors by number and not by content: of weights without values, all would be one."""

    def put(self, tensor: Tensor) -> str:
        return self.hold(tensor.detach())


def captured(config: LlamaConfig) -> ModelGraph:
    """The forward graph of input_ids, attention_mask and position_ids, int64 [B, S]. Each weight is a single 1, expanded."""
    model = llama(config, torch.ones(()).expand, "cpu")
    ids = torch.arange(32).view(2, 16)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": ids % 16}
    dynamic = {name: {0: "batch", 1: "sequence"} for name in example}
    return capture_module(model, example | {"use_cache": False}, dynamic, store=Nameless(ParameterStore()))[0]


def pack(graph: ModelGraph, bits: int, mlp_bits: int, group: int) -> None:
    """Every matrix becomes a read of packed codes, scales and zero points on the meta device."""
    for node in list(iterate_calls(graph, aten.linear.default, aten.embedding.default)):
        place = 1 if node.target is aten.linear.default else 0
        name = str(node.args[place].target)  # type: ignore[union-attr]
        format = NumericFormat(mlp_bits if ".mlp." in name else bits, group)
        rows, width = graph.store.shape(graph.tensors[name])
        codes, grid = (torch.empty(rows, n, device="meta") for n in (width, format.groups(width)))
        parts = QuantizedTensor.of(format, codes, grid, grid).pack()
        with graph.graph.inserting_before(node):
            reads = [graph.get_attr(f"{name}.{part}", parts[part]) for part in ("codes", "scale", "zero")]
            args = (*reads, format.bits, format.group(width), width)
            dense = graph.graph.call_function(torch.ops.lwcompile.dequantize.default, args)
        node.args = (*node.args[:place], dense, *node.args[place + 1 :])
    graph.prune()


def filled(stored: Stored, device: str) -> dict[str, Tensor]:
    """What the package stores, on the device: random codes and zero points, and scales that keep activations of one size."""
    random = torch.Generator(device).manual_seed(0)
    made = {name: tensor.contiguous().to(device) for name, tensor in stored.tensors.items() if not tensor.is_meta}
    for name, form in stored.packed.items():
        words, scale, zero = (stored.tensors[f"{name}.{part}"].shape for part in ("words", "scale", "zero"))
        size = 2 ** form["bits"]
        made[f"{name}.words"] = torch.randint(-(1 << 31), 1 << 31, words, dtype=torch.int32, device=device, generator=random)
        made[f"{name}.zero"] = torch.randint(0, size, zero, dtype=torch.uint8, device=device, generator=random)
        steps = torch.rand(scale, device=device, generator=random) + 0.5
        made[f"{name}.scale"] = (steps * (2 / (size * math.sqrt(form["in_features"])))).half()
    return made


# --- the sides


def inputs(config: LlamaConfig, step: Step, device: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Tokens, mask and positions by name, and a decode step's cache: key, value, key, ... [B, kv_heads, P, width]."""
    random = torch.Generator(device).manual_seed(1)
    past, new = (step.tokens, 1) if step.kind == "decode" else (0, step.tokens)
    ids = torch.randint(0, config.vocab_size, (step.batch, new), device=device, generator=random)
    named = {
        "input_ids": ids,
        "attention_mask": torch.ones(step.batch, past + new, dtype=torch.int64, device=device),
        "position_ids": torch.arange(past, past + new, device=device).expand(step.batch, -1).contiguous(),
    }
    shape = (step.batch, config.num_key_value_heads, past, config.head_dim)
    count = 2 * config.num_hidden_layers if past else 0
    return named, [torch.randn(shape, device=device, generator=random).to(dtype) for _ in range(count)]  # type: ignore[arg-type]


class Ours:
    """What the Triton backend writes for the captured graph at some widths."""

    def __init__(
        self, graph: ModelGraph, config: LlamaConfig, plan: str, group: int, folder: Path, device: str, dtype: torch.dtype,
        hold: Path | None = None,
    ) -> None:  # fmt: skip
        """hold: a file to wait for when the package is written; the tuning table is then the one that there is."""
        self.name, self.config, self.device, self.dtype = f"lwcompile {plan}", config, device, dtype
        bits = [int(width) for width in plan.split("/")]
        graph = graph.copy()
        pack(graph, bits[0], bits[-1], group)
        package = f"packed_{plan.replace('/', '_')}"
        program = Program({"forward": graph, "decode": derive_decode(graph, check=False)}, graph.store, "causal-lm", package)
        source = write_source(program, folder / package)
        while hold is not None and not hold.exists():
            time.sleep(0.2)
        shutil.copytree(TABLES, folder / package / "tuning", dirs_exist_ok=True)
        stored = filled(source, device)
        self.model = importlib.import_module(package).load(device, dtype, stored)
        self.stored = sum(t.nbytes for t in stored.values())
        self.read = self.stored - sum(t.nbytes for name, t in stored.items() if name.startswith("model.embed_tokens"))

    def call(self, step: Step) -> Callable[[], Tensor]:
        """A function that gives logits [B, S, vocabulary]."""
        named, cache = inputs(self.config, step, self.device, self.dtype)
        pasts = [f"past_key_values.{i // 2}.{'value' if i % 2 else 'key'}" for i in range(len(cache))]
        entry = "decode" if step.kind == "decode" else "forward"
        return lambda: self.model.run(entry, named | dict(zip(pasts, cache)))["logits"]

    def generate(self, step: Step, new: int) -> Callable[[], Tensor]:
        """A function that continues a prompt by `new` tokens a sequence: int64 [B, S + new].

        Raises:
            ValueError: the package does it without a CUDA graph.
        """
        if (why := self.model.why_growing) is not None:
            raise ValueError(f"it generates without a CUDA graph: {why}")
        ids = inputs(self.config, Step("prefill", step.batch, step.tokens), self.device, self.dtype)[0]["input_ids"]
        return lambda: self.model.generate(ids, new)

    def stepwise(self, step: Step, new: int) -> Tensor:
        """What `generate` makes, by the package's `step`, whose caches grow."""
        named = inputs(self.config, Step("prefill", step.batch, step.tokens), self.device, self.dtype)[0]
        tokens, mask, positions = named["input_ids"], named["attention_mask"], named["position_ids"]
        found, cache = [tokens], None
        for _ in range(new):
            logits, cache = self.model.step(tokens, mask, positions, cache)
            tokens, positions = logits.argmax(-1, keepdim=True), positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            found.append(tokens)
        return torch.cat(found, 1)

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of what is stored, the packed ones dequantized; those stored as one, one after the other."""
        for name, weight in self.model.weights.items():
            yield name, weight if isinstance(weight, Tensor) else weight.dequantize()


@dataclass
class Slot:
    """A layer's static cache: key and value [B, kv_heads, P + 1, width], of which a step writes the position `last`, int64 [1]."""

    key: Tensor
    value: Tensor
    last: Tensor

    def update(self, key: Tensor, value: Tensor, _: int) -> tuple[Tensor, Tensor]:
        """As transformers' caches."""
        return self.key.index_copy_(2, self.last, key), self.value.index_copy_(2, self.last, value)


class Peer:
    """transformers' own model, dense: layer after layer as its forward calls them, without a mask, which neither step needs."""

    def __init__(self, config: LlamaConfig, device: str, dtype: torch.dtype) -> None:
        self.name, self.config, self.device, self.dtype = PEER, config, device, dtype
        self.model = llama(config, lambda shape: torch.empty(shape, dtype=dtype, device=device), device)
        self.stored = sum(p.nbytes for p in self.model.parameters())
        self.filled: Ours | None = None
        self.read = self.stored - self.model.model.embed_tokens.weight.nbytes
        self.run, self.start, self.block, self.end = self._run, self._start, self._block, self._end

    def compile(self, whole: bool) -> None:
        compiled: Any = functools.partial(torch.compile, dynamic=False, fullgraph=True)
        if whole:
            self.run = compiled(self._run)
        else:
            self.start, self.block, self.end = map(compiled, (self._start, self._block, self._end))

    @torch.no_grad()
    def fill(self, other: Ours) -> None:
        """Take the values of the other's weights, in place, unless it has them."""
        if self.filled is other:
            return
        self.filled = other
        own = dict(self.model.named_parameters())
        for names, weight in other.dense():
            parts = [own[name] for name in names.split(" + ") if name in own]
            for part, rows in zip(parts, weight.split([len(p) for p in parts]) if parts else ()):
                part.copy_(rows)

    def call(self, step: Step) -> Callable[[], Tensor]:
        """A function that gives logits [B, S, vocabulary]."""
        named, past = inputs(self.config, step, self.device, self.dtype)
        ids, positions = named["input_ids"], named["position_ids"]
        last = positions[0, -1:].clone()
        grown = [torch.cat([tensor, torch.zeros_like(tensor[:, :, :1])], 2) for tensor in past]
        slots = [Slot(key, value, last) for key, value in zip(grown[::2], grown[1::2])]
        return torch.no_grad()(lambda: self.run(ids, positions, slots or [None] * self.config.num_hidden_layers))

    def _run(self, ids: Tensor, positions: Tensor, slots: Sequence[Slot | None]) -> Tensor:
        hidden, rotary = self.start(ids, positions)
        for layer, slot in zip(self.model.model.layers, slots):
            hidden = self.block(layer, hidden, rotary, slot)
        return self.end(hidden)

    def _start(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden = self.model.model.embed_tokens(ids)
        return hidden, self.model.model.rotary_emb(hidden, position_ids=positions)

    def _block(self, layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], slot: Slot | None) -> Tensor:
        return layer(hidden, position_embeddings=rotary, past_key_values=slot)

    def _end(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))
