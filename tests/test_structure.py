"""Structure from the graph, against the modules themselves: what they hold, what flows in and out, and nothing of names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from captures import captured_module
from torch import Tensor, nn

from lwcompile.executor import run
from lwcompile.pipeline import capture
from lwcompile.program import Program
from lwcompile.site import SUBLAYER_KINDS
from lwcompile.structure import Structure, find_structure
from lwcompile.tiny import programs
from lwcompile.tracing import capture_module

t = pytest.importorskip("transformers")

TEXT = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


@dataclass
class Case:
    """A model without equal tensors, the layers that its blocks should be, and their sublayers: name -> (kind, modules)."""

    model: nn.Module
    example: dict[str, Any]
    layers: list[nn.Module]
    sublayers: dict[str, tuple[str, Callable[[Any], list[nn.Module]]]]
    final_norm: bool = True

    def __post_init__(self) -> None:
        distinct(self.model)


def distinct(model: Any) -> Any:
    """The model with every parameter moved at random: stores hold equal tensors once, and fresh norms and biases are equal."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def build(name: str, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    ids, masked = {"input_ids": IDS}, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    causal = {**ids, "use_cache": False}
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name in ("llama", "mixtral"):
        config: dict[str, Any] = {**TEXT, "intermediate_size": 64, "num_key_value_heads": 2}
        model = {
            "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**config)),
            "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**config, num_local_experts=4)),
        }[name]()
        second = "moe" if name == "mixtral" else "mlp"
        parts = {
            "attention": ("attention", lambda b: [b.self_attn, b.input_layernorm]),
            second: (second, lambda b: [b.mlp, b.post_attention_layernorm]),
        }
        return Case(model, causal, list(model.model.layers), parts)
    if name == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=90))
        parts = {"attention": ("attention", lambda b: [b.attn, b.ln_1]), "mlp": ("mlp", lambda b: [b.mlp, b.ln_2])}
        return Case(model, causal, list(model.transformer.h), parts)
    if name == "gpt_neox":
        model = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT, intermediate_size=64))
        parts = {
            "attention": ("attention", lambda b: [b.attention, b.input_layernorm]),
            "mlp": ("mlp", lambda b: [b.mlp, b.post_attention_layernorm]),
        }
        return Case(model, causal, list(model.gpt_neox.layers), parts)
    if name == "bert":
        model = t.BertModel(t.BertConfig(**TEXT, intermediate_size=64), add_pooling_layer=False)
        parts = {"attention": ("attention", lambda b: [b.attention]), "mlp": ("mlp", lambda b: [b.intermediate, b.output])}
        return Case(model, masked, list(model.encoder.layer), parts, final_norm=False)
    assert name == "vit"
    model = t.ViTModel(t.ViTConfig(**VISION, intermediate_size=64), add_pooling_layer=False)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
    parts = {
        "attention": ("attention", lambda b: [b.attention, b.layernorm_before]),
        "mlp": ("mlp", lambda b: [b.layernorm_after, *_mlp_of(b)]),
    }
    return Case(model, pixels, list(layers), parts)


def _mlp_of(block: Any) -> list[nn.Module]:
    return [block.mlp] if hasattr(block, "mlp") else [block.intermediate, block.output]


def trace(case: Case) -> Program:
    free = {"pixel_values": {0: "batch"}, "input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}
    graph = captured_module(case.model.eval(), case.example, {k: free[k] for k in case.example if k in free})
    return Program({"forward": graph}, graph.store)


@cache
def found(name: str) -> tuple[Case, Program, Structure]:
    case = build(name)
    program = trace(case)
    return case, program, find_structure(program)


def numbers(modules: list[nn.Module]) -> int:
    """Parameters of modules, shared ones once."""
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


NAMES = ("llama", "gpt2", "gpt_neox", "bert", "vit", "mixtral")


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_sublayers_hold_what_the_layers_hold(name: str) -> None:
    case, _, structure = found(name)
    (stream,) = structure.streams
    assert len(stream.blocks) == len(case.layers) == 3
    assert (stream.final_norm is not None) == case.final_norm
    for i, layer in enumerate(case.layers):
        assert structure.sites[f"block{i}"].parameters == numbers([layer])
        names = {s.id for s in structure.children(f"block{i}")}
        assert names == {f"block{i}.{part}" for part in case.sublayers}
        for part, (kind, modules) in case.sublayers.items():
            site = structure.sites[f"block{i}.{part}"]
            assert site.kind == kind
            assert site.parameters == numbers(modules(layer)), site.id


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_is_what_flows_through_the_layers(name: str) -> None:
    """Values at a block's `skip` and `end` are what hooks see going in and out of the layer."""
    case, program, structure = found(name)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def hook(i: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            seen[i] = entering, output[0] if isinstance(output, tuple) else output

        return record

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(case.layers)]
    with torch.no_grad():
        case.model(**case.example)
    for handle in handles:
        handle.remove()
    sites = [structure.sites[f"block{i}"] for i in range(3)]
    names = {name for site in sites for name in (site.skip, site.end)}
    values = run(program, {i.name: case.example[i.name] for i in program.main.inputs}, names)
    for i, site in enumerate(sites):
        assert torch.allclose(values[site.skip], seen[i][0], atol=1e-5), f"into block{i}"
        assert torch.allclose(values[site.end], seen[i][1], atol=1e-5), f"out of block{i}"


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_modules_weights(name: str) -> None:
    case, program, structure = found(name)
    checked = 0
    for site in structure.of_kind("linear", "embedding"):
        assert site.weight is not None
        stored, own = program.main.tensor(site.weight), case.model.get_parameter(f"{site.path}.weight")
        assert torch.equal(stored, own) or torch.equal(stored, own.t()), site.id
        assert tuple(stored.shape) == site.shape
        checked += 1
    assert checked >= 2 * 3
    parents = {site.parent for site in structure.sites.values() if site.parent}
    assert parents <= set(structure.sites)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_the_embedding_and_the_head_are_found(name: str) -> None:
    case, program, structure = found(name)
    model: Any = case.model
    embedding, head = structure.sites["embedding"], structure.sites["head"]
    assert torch.equal(program.main.tensor(str(embedding.weight)), model.get_input_embeddings().weight)
    assert torch.equal(program.main.tensor(str(head.weight)), model.get_output_embeddings().weight)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert structure.tied == ([("embedding", "head")] if tied else [])


def test_position_embeddings_are_not_the_embedding_even_when_they_have_more_rows() -> None:
    _, _, structure = found("gpt2")
    assert structure.sites["embedding"].shape == (61, 32)
    assert structure.sites["wpe"].shape == (90, 32)


@pytest.mark.parametrize(("name", "groups"), [
    ("llama", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]),
    ("gpt2", []),
    ("bert", [("query", "key", "value")]),
])  # fmt: skip
def test_products_of_one_input_are_fused(name: str, groups: list[tuple[str, ...]]) -> None:
    _, _, structure = found(name)
    first = [tuple(id.rpartition(".")[2] for id in ids) for ids in structure.fused if ids[0].startswith("block0.")]
    assert first == groups


def test_parallel_branches_share_one_add() -> None:
    _, _, structure = found("gpt_neox")
    attention, mlp = structure.sites["block1.attention"], structure.sites["block1.mlp"]
    assert attention.end == mlp.end == structure.sites["block1"].end
    assert attention.skip == mlp.skip


def test_post_norms_belong_to_their_sublayers() -> None:
    _, _, structure = found("bert")
    for i in range(3):
        for kind in ("attention", "mlp"):
            norm = structure.sites[f"block{i}.{kind}.post_norm"]
            assert norm.kind == "norm" and norm.parent == f"block{i}.{kind}"


def test_a_mixture_of_experts_is_seen_and_named() -> None:
    _, _, structure = found("mixtral")
    experts = [structure.sites[f"block{i}.moe"] for i in range(3)]
    assert all(site.kind == "moe" for site in experts)
    assert structure.sites["block0.moe.gate"].shape == (4, 32)
    assert not structure.of_kind("mlp")


# --- several streams, several entries


def test_two_towers_are_two_streams_named_by_their_paths() -> None:
    torch.manual_seed(0)
    text, vision = {**TEXT, "intermediate_size": 64}, {**VISION, "intermediate_size": 64}
    model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    structure = find_structure(capture(distinct(model)))
    assert {stream.prefix for stream in structure.streams} == {"text_model.", "vision_model."}
    for tower, layers in (("text_model", model.text_model.encoder.layers), ("vision_model", model.vision_model.encoder.layers)):
        for i, layer in enumerate(layers):
            assert structure.sites[f"{tower}.block{i}"].parameters == numbers([layer])
            assert {s.kind for s in structure.children(f"{tower}.block{i}")} == {"attention", "mlp"}
    assert {s.id for s in structure.sites.values() if s.id.startswith("head")} == {
        "head.visual_projection",
        "head.text_projection",
    }


def test_an_encoder_and_a_decoder_are_two_entries() -> None:
    torch.manual_seed(0)
    model = t.T5ForConditionalGeneration(t.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    program = capture(distinct(model))
    structure = find_structure(program)
    assert list(program.entries) == ["encoder", "decoder"]
    kinds = {part: [s.id.rpartition(".")[2] for s in structure.children(f"{part}.block1")] for part in ("encoder", "decoder")}
    assert kinds == {"encoder": ["attention", "mlp"], "decoder": ["attention", "cross_attention", "mlp"]}
    for i in range(2):
        assert structure.sites[f"encoder.block{i}.mlp"].parameters == numbers([model.encoder.block[i].layer[1]])
        cross = structure.sites[f"decoder.block{i}.cross_attention"]
        assert cross.kind == "attention" and cross.parameters == numbers([model.decoder.block[i].layer[1]])
    assert ("decoder.block0.cross_attention.k", "decoder.block0.cross_attention.v") in structure.fused
    assert set(structure.tied[0]) >= {"encoder.embedding", "decoder.embedding"}, "one table, read in two entries"
    assert {site.entry for site in structure.sites.values()} == {"encoder", "decoder"}


# --- no residual stream


class Plain(nn.Module):
    """Layers one after the other, with nothing added back."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize(("model", "shape", "linears"), [(Plain(), (2, 8), 3), (Convolutions(), (2, 3, 12, 12), 1)])
def test_a_model_without_a_residual_stream_is_said_to_have_none(model: nn.Module, shape: tuple[int, ...], linears: int) -> None:
    graph, _ = capture_module(model.eval(), {"x": torch.randn(shape)}, {"x": {0: "batch"}})
    structure = find_structure(Program({"forward": graph}, graph.store))
    assert structure.streams == []
    assert not structure.of_kind("block", *SUBLAYER_KINDS)
    assert len(structure.of_kind("linear")) == linears, "its weights are sites all the same"


def test_adding_a_bias_or_a_mask_makes_no_stream() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shift = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.ones(2, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x) + self.shift)) + 1.0

    graph, _ = capture_module(Adds().eval(), {"x": torch.randn(2, 8)})
    assert find_structure(Program({"forward": graph}, graph.store)).streams == []


# --- what ids and kinds depend on


def described(structure: Structure) -> list[tuple[str, str, str | None, tuple[int, ...], int]]:
    return [(s.id, s.kind, s.parent, s.shape, s.parameters) for s in structure.sites.values()]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt_neox", "vit"])
def test_ids_are_stable_over_traces_sizes_and_weights(name: str) -> None:
    _, _, structure = found(name)
    again = build(name, seed=7)
    again.example = {
        key: value[:1].repeat(3, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
        for key, value in again.example.items()
    }
    for key in ("input_ids", "attention_mask"):
        if key in again.example:
            again.example[key] = again.example[key].repeat(1, 2)
    other = find_structure(trace(again))
    assert described(other) == described(structure)
    assert other.fused == structure.fused and other.tied == structure.tied


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_class_names_do_not_matter(name: str) -> None:
    _, _, structure = found(name)
    case = build(name)
    for i, module in enumerate(list(case.model.modules())):
        cls = type(module)
        module.__class__ = type(f"Thing{i}", (cls,), {"__module__": "things", "__qualname__": f"Thing{i}"})
    assert described(find_structure(trace(case))) == described(structure)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gpt_neox", "vit"])
def test_blocks_are_found_without_any_names(name: str) -> None:
    """No module paths, and tensors called t0, t1, ...: the same tree of kinds and parameters."""
    _, program, structure = found(name)
    blind = program.copy()
    graph = blind.main
    renamed = {old: f"t{i}" for i, old in enumerate(graph.tensors)}
    for node in graph.nodes:
        node.meta.pop("path", None)
        if node.op == "get_attr":
            node.target = renamed[str(node.target)]
    graph.tensors = {renamed[old]: key for old, key in graph.tensors.items()}
    graph.propagate()
    unnamed = find_structure(blind)

    def tree(of: Structure) -> list[Any]:
        return [
            (b.id, b.parameters, sorted((s.kind, s.parameters, len(of.children(s.id))) for s in of.children(b.id)))
            for b in of.of_kind("block")
        ]

    assert tree(unnamed) == tree(structure)
    assert [len(ids) for ids in unnamed.fused] == [len(ids) for ids in structure.fused]


def test_a_loaded_program_has_the_same_sites(tmp_path: Any) -> None:
    for name, program in programs().items():
        loaded = Program.load(program.save(tmp_path / name))
        assert find_structure(loaded).sites == find_structure(program).sites
