"""The interpreter against the modules it was traced from, and its shortcuts against full runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ids, llama, llama_program, pair
from torch import Tensor

from lwcompile.errors import BadInput, InternalError
from lwcompile.executor import Executor, run
from lwcompile.formats import NumericFormat, QuantizedTensor
from lwcompile.graph import ModelGraph
from lwcompile.prefix import Cursor, PrefixCache
from lwcompile.program import Program
from lwcompile.spill import TensorCache
from lwcompile.structure import find_structure

aten = torch.ops.aten


def linears(graph: ModelGraph) -> list[str]:
    return [n.name for n in graph.nodes if n.target is aten.linear.default]


def batches(n: int = 3) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids(2, 12, seed)} for seed in range(n)]


def scale_weight(graph: ModelGraph, node: str, factor: float = 1.1) -> None:
    name = str(graph.node(node).args[1].target)  # type: ignore[union-attr]
    graph.set_tensor(name, graph.tensor(name) * factor)


def quantize_by_hand(graph: ModelGraph, node: str, bits: int = 4) -> Tensor:
    """Replace a linear's weight by a dequantize call; returns the weight that it stands for."""
    call = graph.node(node)
    name = str(call.args[1].target)  # type: ignore[union-attr]
    format, weight = NumericFormat(bits, 16, "none"), graph.tensor(name)
    scale = weight.view(len(weight), -1, 16).abs().amax(-1) / 2 ** (bits - 1)
    made = QuantizedTensor.nearest(weight, format, scale)
    packed = made.pack()
    with graph.graph.inserting_before(call):
        codes, scales = (graph.get_attr(f"{name}.{part}", packed[part]) for part in ("codes", "scale"))
        args = (codes, scales, None, bits, 16, weight.shape[1])
        call.update_arg(1, graph.graph.call_function(torch.ops.lwcompile.dequantize.default, args))
    graph.prune()
    return made.dequantize()


def drop_branch(program: Program, id: str) -> None:
    """The residual add of a sublayer is replaced by what flows past it."""
    graph, site = program.main, find_structure(program).sites[id]
    graph.node(site.end).replace_all_uses_with(graph.node(site.skip))
    graph.prune()


# --- running


def test_a_run_equals_the_module_and_the_graph() -> None:
    program, inputs = llama_program(), {"input_ids": ids(3, 14, 5)}
    found = run(program, inputs)["logits"]
    with torch.no_grad():
        assert torch.equal(found, program.main.module()(inputs["input_ids"])[0])
        torch.testing.assert_close(found, llama()(**inputs, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_watched_values_equal_what_hooks_on_the_module_see() -> None:
    program, inputs, seen = llama_program(), {"input_ids": ids()}, {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, name=name: seen.__setitem__(name, out))
        for name, module in llama().named_modules()
        if isinstance(module, torch.nn.Linear) and "head" not in name
    ]
    with torch.no_grad():
        llama()(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    sites = find_structure(program).of_kind("linear")
    sites = [site for site in sites if site.id != "head"]
    found = run(program, inputs, watch=[site.node for site in sites])
    assert len(sites) == len(seen) == 21
    for site in sites:
        torch.testing.assert_close(found[site.node], seen[site.path], rtol=1e-4, atol=1e-5)


def test_values_are_freed_after_their_last_use() -> None:
    program = llama_program()
    executor = Executor(program)
    values, most = executor.start({"input_ids": ids()}), 0
    with torch.no_grad():
        for i in range(len(executor.steps)):
            executor.advance(values, i, i + 1)
            most = max(most, len(values))
            assert executor.needed(i + 1) == set(values)
    assert most < 20 < len(executor.steps)
    assert list(values) == [executor.outputs["logits"]]


def test_dequantizing_happens_once_per_executor() -> None:
    program = llama_program()
    for node in linears(program.main)[:5]:
        quantize_by_hand(program.main, node)
    executor, seen = Executor(program), []
    dequantized = [n for n in program.main.nodes if "dequantize" in n.name]
    for _ in range(2):
        with torch.no_grad():
            executor.run({"input_ids": ids()})
        seen.append([executor.constant(n).data_ptr() for n in dequantized])
    assert len(dequantized) == 5 and seen[0] == seen[1]
    expected = program.main.module()(ids())[0]
    assert torch.equal(run(program, {"input_ids": ids()})["logits"], expected)


def test_gradients_flow_to_tapped_values() -> None:
    program, inputs = llama_program(), {"input_ids": ids()}
    node, kept = linears(program.main)[3], {}

    def tap(value: Tensor) -> Tensor:
        kept["y"] = value.requires_grad_()
        return kept["y"]

    out = Executor(program).run(inputs, taps={node: tap})["logits"]
    (gradient,) = torch.autograd.grad(out.logsumexp(-1).sum(), [kept["y"]])
    captured: dict[str, Tensor] = {}
    model = llama()
    module = model.get_submodule("model.layers.0.self_attn.o_proj")
    handle = module.register_full_backward_hook(lambda _m, _i, o: captured.__setitem__("g", o[0]))
    model(**inputs, use_cache=False).logits.logsumexp(-1).sum().backward()
    handle.remove()
    model.zero_grad()
    torch.testing.assert_close(gradient, captured["g"], rtol=1e-3, atol=1e-5)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(BadInput, match="input_ids"):
        run(llama_program(), {"pixels": torch.zeros(1)})


def test_entries_are_linked_unless_the_sample_gives_the_states() -> None:
    encoder, decoder, program = pair()
    inputs = {"input_ids": ids(3, 9), "decoder_input_ids": ids(3, 6, 2)}
    assert Executor(program).inputs() == ["input_ids", "decoder_input_ids"]
    with torch.no_grad():
        states = encoder(inputs["input_ids"])["last_hidden_state"]
        expected = decoder(inputs["decoder_input_ids"], states)["logits"]
        other = decoder(inputs["decoder_input_ids"], 2 * states)["logits"]
    torch.testing.assert_close(run(program, inputs)["logits"], expected, rtol=1e-5, atol=1e-6)
    given = run(program, {**inputs, "encoder_hidden_states": 2 * states})["logits"]
    torch.testing.assert_close(given, other, rtol=1e-5, atol=1e-6)


# --- prefix re-use


EDITS = {
    "early weight": lambda p: scale_weight(p.main, linears(p.main)[1]),
    "late weight": lambda p: scale_weight(p.main, linears(p.main)[-2]),
    "head, and with it the tied embedding": lambda p: scale_weight(p.main, linears(p.main)[-1]),
    "quantized": lambda p: quantize_by_hand(p.main, linears(p.main)[9]),
    "attention dropped": lambda p: drop_branch(p, "block1.attention"),
    "mlp dropped": lambda p: drop_branch(p, "block2.mlp"),
    "two edits": lambda p: (drop_branch(p, "block2.attention"), scale_weight(p.main, linears(p.main)[8])),
    "nothing": lambda _: None,
}


@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["in memory", "on disk"])
@pytest.mark.parametrize("edit", EDITS)
def test_a_resumed_run_is_bit_for_bit_a_full_one(edit: str, memory: int, tmp_path: Path) -> None:
    program = llama_program()
    digest = program.digest()
    cache = PrefixCache(program, batches(), memory=memory, folder=tmp_path)
    edited = program.copy()
    EDITS[edit](edited)
    before = cache.executor.calls
    found = [out["logits"] for out in cache.suffix_outputs(edited)]
    calls = cache.executor.calls - before
    for batch, logits in zip(batches(), found):
        assert torch.equal(logits, run(edited, batch)["logits"])
    full = 3 * len(Executor(edited).steps)
    late = edit in ("late weight", "mlp dropped", "nothing")
    assert calls < 0.45 * full if late else calls <= full
    assert program.digest() == digest
    assert any(tmp_path.rglob("*.bin")) == (memory == 0)


def test_cuts_stand_between_blocks() -> None:
    program = llama_program(layers=6)
    cache = PrefixCache(program, [{"input_ids": ids(2, 24)}])
    ends = {site.end for site in find_structure(program).sites.values() if site.end}
    before = [cache.executor.steps[cut - 1].key for cut in cache.cuts if cut]
    assert sum(key in ends for key in before) >= 6 and len(before) <= 20
    assert len(cache.executor.steps) - cache.cuts[-1] <= 2  # the head alone can be run again


def test_files_of_a_cache_go_with_it(tmp_path: Path) -> None:
    cache = PrefixCache(llama_program(), batches(), memory=0, folder=tmp_path)
    assert list(tmp_path.iterdir())
    del cache
    assert not list(tmp_path.iterdir())


@settings(max_examples=15, deadline=None)
@given(node=st.integers(0, 21), cuts=st.sets(st.integers(0, 21), max_size=4))
def test_any_cuts_and_any_edited_weight_agree_with_a_full_run(node: int, cuts: set[int]) -> None:
    program = llama_program(tied=False)
    names = linears(program.main)
    cache = PrefixCache(program, batches(2), cuts=[names[c] for c in cuts])
    edited = program.copy()
    scale_weight(edited.main, names[node])
    before = cache.executor.calls
    for batch, out in zip(batches(2), cache.suffix_outputs(edited)):
        assert torch.equal(out["logits"], run(edited, batch)["logits"])
    start = max((c for c in cuts if c <= node), default=None)
    at = 0 if start is None else cache.executor.position(names[start])
    assert cache.executor.calls - before == 2 * (len(cache.executor.steps) - at)


def test_a_value_that_only_the_edited_program_needs_later_moves_the_start_back() -> None:
    program = llama_program()
    cache = PrefixCache(program, batches(1), cuts=linears(program.main)[7:15])
    edited = program.copy()
    sites = find_structure(edited).sites
    late, early = edited.main.node(sites["block2.mlp"].end), edited.main.node(sites["block0"].skip)
    with edited.main.graph.inserting_after(late):
        total = edited.main.graph.call_function(aten.add.Tensor, (late, early))
    late.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    (out,) = cache.suffix_outputs(edited)
    assert torch.equal(out["logits"], run(edited, batches(1)[0])["logits"])


def test_the_encoder_is_not_run_again_for_an_edit_in_the_decoder() -> None:
    _, _, program = pair()
    samples = [{"input_ids": ids(3, 9), "decoder_input_ids": ids(3, 6, 2)}]
    names = [f"decoder/{n}" for n in linears(program.entries["decoder"])]
    cache = PrefixCache(program, samples, cuts=names[:1])
    for entry in program.entries:
        edited = program.copy()
        scale_weight(edited.entries[entry], linears(edited.entries[entry])[0])
        before = cache.executor.calls
        (out,) = cache.suffix_outputs(edited)
        assert torch.equal(out["logits"], run(edited, samples[0])["logits"])
        full = sum(step.source is None for step in cache.executor.steps)
        assert (cache.executor.calls - before < full) == (entry == "decoder")


def test_kept_outputs_are_the_programs_own() -> None:
    program = llama_program()
    cache = PrefixCache(program, batches(), keep=lambda out, _: out["logits"])
    for i, batch in enumerate(batches()):
        assert torch.equal(cache.kept(i), run(program, batch)["logits"])


# --- the cursor


def test_a_cursor_shows_each_layer_what_the_quantized_ones_before_it_put_out() -> None:
    program, samples = llama_program(), batches()
    model = llama(seed=0)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    cursor = Cursor(program, samples)
    sites = [s for s in find_structure(program).of_kind("linear") if s.id != "head"]
    try:
        for site in sites:
            found = cursor.inputs_at([site.node])[site.node]
            for batch, x in zip(samples, found):
                seen: list[Tensor] = []
                module = model.get_submodule(site.path)
                handle = module.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
                with torch.no_grad():
                    model(**batch, use_cache=False)
                handle.remove()
                torch.testing.assert_close(x, seen[0], rtol=1e-4, atol=1e-4)
            weight = quantize_by_hand(program.main, site.node, 3)
            with torch.no_grad():
                model.get_submodule(site.path).weight.copy_(weight)  # type: ignore[union-attr]
    finally:
        model.load_state_dict(saved)
    assert cursor.calls < 3 * len(cursor.executor.steps)  # one pass over the model in all


def test_layers_that_share_an_input_come_together() -> None:
    program = llama_program()
    fused = next(f for f in find_structure(program).fused if len(f) == 3)
    nodes = [find_structure(program).sites[id].node for id in fused]
    found = Cursor(program, batches()).inputs_at(nodes)
    assert list(found) == nodes
    assert all(torch.equal(a, b) for node in nodes for a, b in zip(found[node], found[nodes[0]]))


def test_a_cursor_goes_forward_only() -> None:
    program = llama_program()
    names = linears(program.main)
    cursor = Cursor(program, batches(1))
    cursor.inputs_at([names[4]])
    with pytest.raises(InternalError, match="passed"):
        cursor.inputs_at([names[2]])
    with pytest.raises(InternalError, match="not computed yet"):
        cursor.inputs_at([names[4], names[8]])
    drop_branch(program, "block0.attention")
    with pytest.raises(InternalError, match="behind the cursor"):
        cursor.inputs_at([names[5]])


def test_the_stream_before_a_block_can_be_read() -> None:
    program = llama_program()
    site = find_structure(program).sites["block1"]
    (found,) = Cursor(program, batches(1)).values_of(site.skip)
    assert torch.equal(found, run(program, batches(1)[0], watch=[site.skip])[site.skip])


# --- spilling


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    memory=st.sampled_from([0, 1 << 20]),
    form=st.sampled_from(["plain", "transposed", "expanded", "offset"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]),
)
def test_a_cached_tensor_keeps_bytes_sizes_and_strides(shape: list[int], memory: int, form: str, dtype: torch.dtype) -> None:
    tensor = (10 * torch.randn(*shape)).to(dtype)
    match form:
        case "transposed":
            tensor = tensor.transpose(0, -1)
        case "expanded":
            tensor = tensor.unsqueeze(0).expand(3, *shape)
        case "offset":
            tensor = torch.cat([tensor, tensor])[len(tensor) :]
    cache = TensorCache(memory)
    cache["x"] = tensor
    assert torch.equal(cache["x"], tensor)
    assert cache["x"].stride() == tensor.stride() and cache["x"].dtype == dtype
    assert (cache.spilled > 0) == (memory == 0) and cache.resident <= memory
