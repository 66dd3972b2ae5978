"""Tiny random language models of many architectures, captured once a session, and edits that tests make to their graphs."""

from __future__ import annotations

import inspect
from functools import cache

import torch
from captures import captured_module
from torch import Tensor, fx, nn

from lwcompile.attention import SDPA
from lwcompile.formats import NumericFormat
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.passes.solve.rtn import Rtn

aten = torch.ops.aten
VOCABULARY = 99
_WIDTHS = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_GATED = {**_WIDTHS, "intermediate_size": 64}
_GROUPED = {**_GATED, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": 1}
_OPT = {**_WIDTHS, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

# name -> class, configuration, key-value heads, window
MODELS: dict[str, tuple[str, dict, int, int | None]] = {
    "llama": ("Llama", _GROUPED, 2, None),
    "gpt2": ("GPT2", {**_GPT2, "eos_token_id": None}, 4, None),
    "gpt_neox": ("GPTNeoX", _GATED, 4, None),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 8}, 2, None),
    "gemma3": ("Gemma3", {**_GROUPED, "head_dim": 8, "sliding_window": 5, "layer_types": _LAYERS}, 2, 5),
    "opt": ("OPT", _OPT, 4, None),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 6}, 2, 6),
    "phi": ("Phi", _GATED, 4, None),
    "cohere": ("Cohere", _GROUPED, 2, None),
    "falcon": ("Falcon", _WIDTHS, 1, None),
}
NAMES = sorted(MODELS)
_MOE = {**_GROUPED, "num_local_experts": 2, "head_dim": 8}
# Attention that is written out, with slopes instead of positions, or in chunks; not in `NAMES`.
OTHERS: dict[str, tuple[str, dict, int, int | None]] = {
    "gptj": ("GPTJ", {**_GPT2, "rotary_dim": 8}, 4, None),
    "gpt_neo": (
        "GPTNeo",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 5,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128},
        4, 5,
    ),
    "mpt": ("Mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4}, 4, None),
    "llama4": ("Llama4", {**_MOE, "num_hidden_layers": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 6}, 2, None),
}  # fmt: skip


@cache
def build(name: str) -> nn.Module:
    """The model with weights large enough that layers matter, and without an end token."""
    import transformers

    family, options, _, _ = (MODELS | OTHERS)[name]
    language = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    config = getattr(transformers, f"{family}TextConfig" if family in ("Gemma3", "Llama4") else f"{family}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, language)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def batch(rows: int, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Random ids; of several rows, all but the first are padded on the left."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row + 1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}


def capture(model: nn.Module, without: tuple[str, ...] = ()) -> ModelGraph:
    """The model's graph with free batch and sequence; `without` leaves inputs out."""
    takes = inspect.signature(model.forward).parameters
    example = {name: tensor for name, tensor in batch(2, 16).items() if name in takes and name not in without}
    dynamic = {name: {0: "batch", 1: "sequence"} for name in example}
    return captured_module(model, {**example, "use_cache": False}, dynamic)


@cache
def _captured(name: str, without: tuple[str, ...]) -> ModelGraph:
    return capture(build(name), without)


def captured(name: str, without: tuple[str, ...] = ()) -> ModelGraph:
    """A copy of the named model's graph."""
    return _captured(name, without).copy()


def run(graph: ModelGraph, inputs: dict[str, Tensor]) -> Tensor:
    """The first output."""
    with torch.no_grad():
        return graph.module(dense=True)(*(inputs[i.name] for i in graph.inputs))[0]


def closeness(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """The largest difference relative to the largest value, where there is no padding."""
    rows = mask.bool()
    return float((a - b)[rows].abs().max() / b[rows].abs().max())


def without_attention(graph: ModelGraph, index: int) -> ModelGraph:
    """The graph in which the residual stream goes past one attention."""
    edited = graph.copy()
    edited.propagate()
    node = list(iterate_calls(edited, SDPA))[index]
    reached: set[fx.Node] = {node}
    for user in edited.graph.nodes:
        sources = set(user.all_input_nodes)
        if not sources & reached:
            continue
        if user.target is aten.add.Tensor and all(isinstance(a, fx.Node) and a.op == "call_function" for a in user.args):
            (skip,) = sources - reached
            user.replace_all_uses_with(skip)
            break
        reached.add(user)
    edited.prune()
    return edited


def silence_attention(model: nn.Module, index: int) -> list:
    """Hooks that make one attention module return zeros: what `without_attention` must equal."""
    wanted = ("self_attn", "self_attention", "attn", "attention")
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] in wanted]

    def zero(module: nn.Module, args: object, output: tuple) -> tuple:
        return (torch.zeros_like(output[0]), *output[1:])

    return [modules[index].register_forward_hook(zero)]


def quantized(graph: ModelGraph, bits: int = 6) -> ModelGraph:
    """The graph with every linear weight packed."""
    edited, format = graph.copy(), NumericFormat(bits=bits, group_size=16)
    for name in {str(n.args[1].target) for n in iterate_calls(edited, aten.linear.default)}:  # type: ignore[union-attr]
        weight = edited.tensor(name)
        packed = Rtn(steps=1, refits=0).solve(weight, format, None).pack()
        for read in [u for u in edited.uses(name) if any(use.target is aten.linear.default for use in u.users)]:
            with edited.graph.inserting_before(read):
                parts = [edited.get_attr(f"{name}.{part}", tensor) for part, tensor in packed.items()]
                args = (*parts, bits, format.group(weight.shape[1]), weight.shape[1])
                dense = edited.graph.call_function(torch.ops.lwcompile.dequantize.default, args)
            read.replace_all_uses_with(dense)
    edited.prune()
    edited.propagate()
    return edited
