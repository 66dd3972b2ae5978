"""Dropping equals the nn.Module with those sublayers removed by hand, to relative 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captures import captured_module
from torch import nn

from lwcompile.context import Context
from lwcompile.errors import Refused
from lwcompile.manager import Manager, relative_error
from lwcompile.passes.transform.drop import Drop
from lwcompile.program import Program
from lwcompile.structure import find_structure
from lwcompile.tracing import capture_module

transformers = pytest.importorskip("transformers", reason="the references are transformers' own modules: install lwcompile[hf]")

TEXT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
DYNAMIC = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}


class Nothing(nn.Module):
    """A branch that adds nothing to the stream; attentions return their weights beside it."""

    def __init__(self, results: int = 1, of: str | None = None) -> None:
        super().__init__()
        self.results, self.of = results, of

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs[self.of or "hidden_states"]
        zero = torch.zeros_like(x)
        return zero if self.results == 1 else (zero,) + (None,) * (self.results - 1)


class NothingButBias(Nothing):
    """T5's attentions hand the first block's position bias on, and the blocks after a removed one still need it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)[0], kwargs["position_bias"], None


class Same(nn.Module):
    """A post-norm sublayer removed with its norm: what comes in goes out."""

    def __init__(self, results: int) -> None:
        super().__init__()
        self.results = results

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) + (None,) * (self.results - 1)


def build(name: str) -> tuple[nn.Module, dict[str, Any], nn.ModuleList]:
    """A random model, its example inputs, and the list of its layers."""
    torch.manual_seed(0)
    t, ids = transformers, torch.randint(0, 61, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    text = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if name == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**TEXT, intermediate_size=64, num_key_value_heads=2))
        return model, text, model.model.layers
    if name == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, intermediate_size=64, num_key_value_heads=2, head_dim=8))
        return model, text, model.model.layers
    if name == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=0))
        return model, text, model.transformer.h
    if name == "gpt_neox":
        model = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT, intermediate_size=64, bos_token_id=0, eos_token_id=1))
        return model, text, model.gpt_neox.layers
    if name == "bert":
        model = t.BertModel(t.BertConfig(**TEXT, intermediate_size=64), add_pooling_layer=False)
        return model, {"input_ids": ids, "attention_mask": mask}, model.encoder.layer
    vision = {k: v for k, v in TEXT.items() if k != "vocab_size"}
    if name == "vit":
        model = t.ViTModel(t.ViTConfig(**vision, intermediate_size=64, image_size=32, patch_size=8), add_pooling_layer=False)
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, _layers(model)
    if name == "dinov2":
        model = t.Dinov2Model(t.Dinov2Config(**vision, image_size=32, patch_size=8))
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, _layers(model)
    assert name == "t5"
    model = t.T5EncoderModel(t.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4))
    return model, {"input_ids": ids, "attention_mask": mask}, model.encoder.block


def _layers(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)


def _set(layer: nn.Module, names: tuple[str, ...], value: nn.Module) -> None:
    name = next(n for n in names if hasattr(layer, n))
    setattr(layer, name, value)


def remove_attention(name: str, layer: Any) -> None:
    if name == "t5":
        layer.layer[0].SelfAttention = NothingButBias(3)
    elif name == "bert":
        layer.attention = Same(2)
    elif name in ("vit", "dinov2"):
        single = "Dinov2" in type(layer).__name__ or not _returns_tuple(layer.attention)
        layer.attention = Nothing(1 if single and not _returns_tuple(layer.attention) else 2)
    else:
        _set(layer, ("self_attn", "attn", "attention"), Nothing(2))


def _returns_tuple(attention: nn.Module) -> bool:
    """Whether a layer's attention returns (output, weights): vision models differ by version."""
    seen: list[bool] = []
    x = torch.randn(1, 4, 32)
    seen.append(isinstance(attention(x), tuple))
    return seen[0]


def remove_mlp(name: str, layer: Any) -> None:
    if name == "t5":
        layer.layer[1].DenseReluDense = Nothing()
    elif name == "bert":
        layer.feed_forward_chunk = lambda attention_output: attention_output
    elif name == "vit" and hasattr(layer, "intermediate"):
        layer.intermediate, layer.output.dense = nn.Identity(), Nothing()
    else:
        layer.mlp = Nothing()


def capture(model: nn.Module, example: dict[str, Any]) -> Program:
    dynamic = {k: v for k, v in DYNAMIC.items() if k in example} or {"pixel_values": {0: "batch"}}
    graph = captured_module(model, example, dynamic)
    return Program({"forward": graph}, graph.store)


def drop(program: Program, ids: list[str]) -> Program:
    structure = find_structure(program)
    ctx = Context(structure=structure, program=program)
    dropped = program.copy()
    done = Manager(ctx).transform(dropped, [(structure.sites[id], Drop()) for id in ids])
    assert [site.id for site, _ in done] == ids, ctx.remarks
    return dropped


def outputs_differ(program: Program, model: nn.Module, example: dict[str, Any]) -> float:
    graph = program.main
    with torch.no_grad():
        wanted = model(**example)[graph.outputs[0]]
        found = graph.module()(*[example[i.name] for i in graph.inputs])[0]
    return relative_error(wanted, found)


MODELS = ("llama", "qwen3", "gpt2", "gpt_neox", "bert", "vit", "dinov2", "t5")
REMOVALS: dict[str, tuple[list[str], Callable[[str, nn.ModuleList], None]]] = {
    "attention": (["block1.attention"], lambda name, layers: remove_attention(name, layers[1])),
    "mlp": (["block2.mlp"], lambda name, layers: remove_mlp(name, layers[2])),
    "both": (
        ["block3.mlp", "block1.attention"],
        lambda name, layers: (remove_mlp(name, layers[3]), remove_attention(name, layers[1]))[0],
    ),
    "block": (["block2"], lambda name, layers: layers.__delitem__(2)),
    "neighbours": (["block1", "block2"], lambda name, layers: layers.__delitem__(slice(1, 3))),
}


@pytest.mark.parametrize("what", REMOVALS)
@pytest.mark.parametrize("name", MODELS)
def test_dropping_equals_the_module_with_it_removed(name: str, what: str) -> None:
    model, example, layers = build(name)
    model = model.eval()
    ids, remove = REMOVALS[what]
    program = capture(model, example)
    dropped = drop(program, ids)
    intact = program.parameter_count()
    remove(name, layers)
    for i, layer in enumerate(layers):  # layers know their index only for a cache that is not used
        if hasattr(layer, "layer_idx"):
            setattr(layer, "layer_idx", i)  # noqa: B010
    assert outputs_differ(dropped, model, example) < 1e-5
    assert outputs_differ(program, model, example) > 1e-4, "the removal changed nothing, so the test shows nothing"
    assert dropped.parameter_count() < intact


def test_every_sublayer_but_one_can_go() -> None:
    model, example, layers = build("llama")
    program = capture(model.eval(), example)
    sites = [f"block{i}.{kind}" for i in range(4) for kind in ("attention", "mlp") if (i, kind) != (2, "mlp")]
    dropped = drop(program, sites)
    for i, layer in enumerate(layers):
        remove_attention("llama", layer)
        if i != 2:
            remove_mlp("llama", layer)
    assert outputs_differ(dropped, model, example) < 1e-5


def test_a_branch_that_is_read_elsewhere_is_refused() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            branch = self.b(torch.relu(self.a(x)))
            return x + branch, branch

    graph, _ = capture_module(Peeks(), {"x": torch.randn(2, 8)}, {"x": {0: "batch"}})
    program = Program({"forward": graph}, graph.store)
    site = find_structure(program).sites["block0.mlp"]
    with pytest.raises(Refused, match=r"block0\.mlp: its output is read by"):
        Drop().check(graph, site)
