"""Decode graphs: equal to the prefill graph, to the model, and to the model's own generation, before and after surgery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import language_models as zoo
import pytest
import torch
from torch import Tensor, nn

from lwcompile.attention import SDPA, find_attentions
from lwcompile.decode import cache_bytes_per_token, cached_attentions, derive_decode, verify_decode
from lwcompile.errors import Refused
from lwcompile.generate import GraphStep, generate, seq2seq_step
from lwcompile.graph import ModelGraph, iterate_calls
from lwcompile.program import Program
from lwcompile.rolling import bound_of
from lwcompile.tracing import capture_module

aten = torch.ops.aten
TOLERANCE = 1e-4


def teacher_forced(decode: ModelGraph, inputs: dict[str, Tensor], pieces: list[int]) -> Tensor:
    """Logits [B, S, vocabulary] of given tokens, fed in pieces of these lengths."""
    step, cache, start, logits = GraphStep(decode), None, 0, []
    for size in pieces:
        end = start + size
        part = (inputs["input_ids"][:, start:end], inputs["attention_mask"][:, :end], inputs["position_ids"][:, start:end])
        piece, cache = step.all_logits(*part, cache)
        logits.append(piece)
        start = end
    for past, tensor in zip(step.roles.pasts, cache or []):
        dim, symbol = next((d, s) for d, s in past.dynamic.items() if d)
        assert tensor.shape[dim] == min(start, bound_of(symbol) or start) and not tensor.isnan().any()
    return torch.cat(logits, 1)


def greedy_by_prefill(graph: ModelGraph, inputs: dict[str, Tensor], count: int) -> Tensor:
    """The same loop without a cache: the whole sequence at each token."""
    module = graph.module(dense=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(count):
        values = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            logits = module(*(values[i.name] for i in graph.inputs))[0]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


def assert_decodes(graph: ModelGraph, decode: ModelGraph, reference: nn.Module | None = None, tokens: int = 64) -> None:
    """Teacher-forced logits and greedy tokens agree with prefill, and with the module where one is given."""
    step = GraphStep(decode)
    for rows in (1, 3):
        inputs = zoo.batch(rows, 13)
        wanted = zoo.run(graph, inputs)
        for pieces in ([1] * 13, [4, 3, 3, 3], [13]):
            got = teacher_forced(decode, inputs, pieces)
            assert not got.isnan().any()
            assert zoo.closeness(got, wanted, inputs["attention_mask"]) < TOLERANCE
        prompt = zoo.batch(rows, 9)
        produced = generate(step, prompt["input_ids"], prompt["attention_mask"], max_new_tokens=tokens)
        assert torch.equal(produced, greedy_by_prefill(graph, prompt, tokens))
        if reference is not None:
            made = reference.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], **OPTIONS(tokens))  # type: ignore[operator]
            assert torch.equal(produced, made)


def OPTIONS(tokens: int) -> dict:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}


# --- before and after surgery


@pytest.mark.parametrize("name", [*zoo.NAMES, *zoo.OTHERS])
def test_decoding_equals_prefill_and_the_models_own_generation(name):
    graph = zoo.captured(name)
    assert_decodes(graph, derive_decode(graph), zoo.build(name))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_and_with_an_attention_dropped(name):
    graph = zoo.without_attention(zoo.captured(name), 1)
    decode = derive_decode(graph)
    assert len(cached_attentions(decode)) == 2
    hooks = zoo.silence_attention(zoo.build(name), 1)
    try:
        assert_decodes(graph, decode, zoo.build(name), tokens=64)
    finally:
        [hook.remove() for hook in hooks]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_and_with_packed_weights(name):
    graph = zoo.quantized(zoo.captured(name))
    assert graph.level() == "quantized"
    assert_decodes(graph, derive_decode(graph), tokens=24)


def test_and_with_both():
    graph = zoo.quantized(zoo.without_attention(zoo.captured("qwen3"), 0))
    assert_decodes(graph, derive_decode(graph), tokens=24)


# --- the graph's form


def test_inputs_and_outputs_are_named_and_shaped_as_caches_are():
    graph = zoo.without_attention(zoo.captured("llama"), 0)
    decode = derive_decode(graph)
    pasts = [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [i.name for i in decode.inputs] == ["input_ids", "attention_mask", "position_ids", *pasts]
    assert decode.outputs == ["logits", *(name.replace("past_key_values", "present") for name in pasts)]
    shapes = {i.name: (i.shape[1], i.shape[3], dict(i.dynamic)) for i in decode.inputs if i.name in pasts}
    assert set(map(str, shapes.values())) == {str((2, 8, {0: "batch", 2: "past"}))}
    assert dict(decode.inputs[1].dynamic) == {0: "batch", 1: "total"}


def test_repeated_heads_are_not_cached():
    assert cache_bytes_per_token(zoo.captured("llama")) == 3 * 2 * (8 + 8) * 4
    assert cache_bytes_per_token(zoo.captured("falcon"), torch.float16) == 3 * 1 * (8 + 8) * 2
    assert cache_bytes_per_token(zoo.without_attention(zoo.captured("llama"), 2)) == 2 * 2 * (8 + 8) * 4


def test_the_prefill_graph_is_left_alone():
    graph = zoo.captured("gemma3")
    before = graph.digest()
    derive_decode(graph)
    assert graph.digest() == before


def test_a_decode_graph_survives_its_program_being_saved(tmp_path: Path):
    graph = zoo.quantized(zoo.captured("gemma3"))
    program = Program({"forward": graph, "decode": derive_decode(graph)}, graph.store)
    program.save(tmp_path)
    loaded = Program.load(tmp_path)
    assert loaded.digest() == program.digest()
    prompt = zoo.batch(3, 9)
    made = [
        generate(GraphStep(p.entries["decode"]), prompt["input_ids"], prompt["attention_mask"], max_new_tokens=8)
        for p in (program, loaded)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral"])
@pytest.mark.parametrize("without", [("position_ids",), ("position_ids", "attention_mask")])
def test_positions_that_are_counted_go_on_from_the_cache(name, without):
    graph = zoo.captured(name, without)
    decode = derive_decode(graph)
    inputs = zoo.batch(1, 13) if "attention_mask" in without else zoo.batch(3, 13)
    wanted = zoo.run(graph, inputs)
    for pieces in ([1] * 13, [5, 4, 4]):
        assert zoo.closeness(teacher_forced(decode, inputs, pieces), wanted, inputs["attention_mask"]) < TOLERANCE


# --- masks that follow no rule


class Biased(nn.Module):
    """Attention with slopes over distances, and chunks: causal, but no rule that we know."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids).unsqueeze(1)
        place = torch.arange(input_ids.shape[1])
        distance = place[:, None] - place[None, :]
        chunk = torch.div(place, 4, rounding_mode="floor")
        open_ = (distance >= 0) & (chunk[:, None] >= chunk[None, :] - 1) & attention_mask[:, None, None, :].bool()
        bias = torch.where(open_, -0.1 * distance.float(), -1e9)
        for _ in range(2):
            x = x + self.mix(nn.functional.scaled_dot_product_attention(x, x, x, bias))
        return self.head(x.squeeze(1))


def test_other_masks_are_computed_for_all_positions_and_read_from_the_last():
    torch.manual_seed(0)
    inputs = zoo.batch(2, 16)
    example = {"input_ids": inputs["input_ids"] % 50, "attention_mask": inputs["attention_mask"]}
    graph, _ = capture_module(Biased().eval(), example, {name: {0: "batch", 1: "sequence"} for name in example})
    assert [a.mask for a in find_attentions(graph)] == [None, None]
    inputs = {**zoo.batch(3, 13)}
    inputs["input_ids"] %= 50
    got = teacher_forced(derive_decode(graph), inputs, [1] * 13)
    assert zoo.closeness(got, zoo.run(graph, inputs), inputs["attention_mask"]) < TOLERANCE


# --- encoder-decoder


def seq2seq(family: str) -> Any:
    import transformers as t

    small: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
             "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99, "d_model": 32}  # fmt: skip
    torch.manual_seed(0)
    match family:
        case "t5":
            start: dict[str, Any] = {"decoder_start_token_id": 0}
            config = t.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **start)
            model = t.T5ForConditionalGeneration(config)
        case "bart":
            model = t.BartForConditionalGeneration(t.BartConfig(**small, max_position_embeddings=128, forced_eos_token_id=None))
        case _:
            tokens: dict[str, Any] = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            config = t.WhisperConfig(**small, **tokens, num_mel_bins=8, max_source_positions=30, max_target_positions=64,
                                     suppress_tokens=None, begin_suppress_tokens=None)  # fmt: skip
            model = t.WhisperForConditionalGeneration(config)
    with torch.no_grad():
        [parameter.mul_(3) for parameter in model.parameters() if parameter.ndim > 1]
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model.eval()


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_encoder_decoders_cache_their_self_attention(family):
    from lwcompile.sources import open_source

    model = seq2seq(family)
    parts = open_source(model).parts
    graphs = {name: capture_module(p.model, p.example_kwargs, p.dynamic)[0] for name, p in parts.items()}
    assert sorted({a.kind for a in find_attentions(graphs["decoder"])}) == ["cross", "self"]
    decode = derive_decode(graphs["decoder"])
    assert len([i for i in decode.inputs if i.name.startswith("past_key_values")]) == 4
    given = dict(parts["encoder"].example_kwargs)
    if "attention_mask" in given:
        given["attention_mask"] = given["attention_mask"].clone()
        given["attention_mask"][1, -2:] = 0
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    produced = generate(seq2seq_step(graphs["encoder"], decode, given), start, max_new_tokens=16)
    made = model.generate(**given, **({"decoder_input_ids": start} if family == "whisper" else {}), **OPTIONS(16), num_beams=1)
    assert torch.equal(produced[:, -16:], made[:, -16:])


# --- refusals


def test_encoders_are_refused():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    example = {name: tensor for name, tensor in zoo.batch(2, 16).items() if name != "position_ids"}
    graph, _ = capture_module(BertModel(config).eval(), example, {name: {0: "batch", 1: "sequence"} for name in example})
    with pytest.raises(Refused, match="later positions"):
        derive_decode(graph)


def test_graphs_without_attention_are_refused():
    graph = zoo.captured("llama")
    for _ in range(3):
        graph = zoo.without_attention(graph, 0)
    assert not list(iterate_calls(graph, SDPA))
    with pytest.raises(Refused, match="no self-attention"):
        derive_decode(graph)


class Shifting(nn.Module):
    """Attention, and then each position sees the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).unsqueeze(1)
        x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).squeeze(1)
        return x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def test_other_operators_that_mix_positions_are_refused():
    example = {"input_ids": zoo.batch(2, 16)["input_ids"] % 50}
    graph, _ = capture_module(Shifting().eval(), example, {"input_ids": {0: "batch", 1: "sequence"}})
    with pytest.raises(Refused, match="mixes positions"):
        derive_decode(graph)


def test_a_fixed_length_is_refused():
    inputs = zoo.batch(2, 16)
    example = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
    graph, _ = capture_module(zoo.build("llama"), {**example, "use_cache": False}, {name: {0: "batch"} for name in example})
    with pytest.raises(Refused, match="length is fixed"):
        derive_decode(graph)


@pytest.mark.parametrize("spoil", ["positions", "mask", "cache"])
def test_the_check_sees_a_decode_graph_that_is_wrong(spoil):
    graph = zoo.captured("llama")
    decode = derive_decode(graph)
    if spoil == "positions":
        rotary = next(n for n in decode.graph.nodes if n.target is aten.cos.default)
        rotary.target = aten.sin.default
    elif spoil == "mask":
        late = next(iterate_calls(decode, aten.le.Tensor))
        late.target = aten.lt.Tensor
    else:
        join = next(iterate_calls(decode, SDPA)).args[1]
        join.args = (list(reversed(join.args[0])), 2)  # type: ignore[union-attr,arg-type]
    with pytest.raises(Refused, match="differs"):
        verify_decode(graph, decode)


# --- real weights


@pytest.mark.slow
def test_smollm2_generates_as_transformers_does():
    from test_real import real, real_program

    source, graph = real("smollm2"), real_program("smollm2").main
    tokenizer = source.tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a small"]
    for surgery, rows in ((None, 3), (3, 1)):
        edited = graph if surgery is None else zoo.without_attention(graph, surgery)
        hooks = [] if surgery is None else zoo.silence_attention(source.model, surgery)
        step = GraphStep(derive_decode(edited))
        given = tokenizer(prompts[:rows], return_tensors="pt", padding=True)
        mask = given["attention_mask"]
        inputs = {"input_ids": given["input_ids"], "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        wanted = zoo.run(edited, inputs)
        got, _ = step.all_logits(inputs["input_ids"], mask, inputs["position_ids"], None)
        assert zoo.closeness(got, wanted, mask) < TOLERANCE
        produced = generate(step, inputs["input_ids"], mask, max_new_tokens=32)
        made = source.model.generate(inputs["input_ids"], attention_mask=mask, **OPTIONS(32), eos_token_id=None)  # type: ignore[operator]
        assert torch.equal(produced, made)
        [hook.remove() for hook in hooks]
