"""Rewrites that at their limit are the model itself, in float64, on one model of each kind: full-rank loops and factors, a block
that shares with its own copy, and windows that hide no pair."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from test_share import captured, share

from lwcompile.context import Context
from lwcompile.errors import Refused
from lwcompile.executor import Executor
from lwcompile.manager import relative_error
from lwcompile.passes.transform._factors import only_call
from lwcompile.passes.transform._reads import stored_reads
from lwcompile.passes.transform.loop import Loop
from lwcompile.passes.transform.low_rank import LowRank
from lwcompile.passes.transform.share import Share
from lwcompile.passes.transform.window import Window
from lwcompile.program import Program
from lwcompile.structure import find_structure
from lwcompile.tracing import capture_module

NAMES = ["gpt2", "qwen3", "gpt_neox", "vit", "t5", "whisper"]


@cache
def program_of(name: str) -> tuple[Program, dict[str, Any]]:
    if name != "whisper":
        _, example, program = captured(name, torch.float64)
        values = {k: v for k, v in example.items() if isinstance(v, torch.Tensor)}
        return program, {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
    import transformers as t

    torch.manual_seed(0)
    config = t.WhisperConfig(d_model=32, encoder_layers=4, decoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=64,
                             decoder_attention_heads=4, decoder_ffn_dim=64,
                             num_mel_bins=8, max_source_positions=10, vocab_size=61, decoder_start_token_id=1, pad_token_id=0,
                             bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = t.WhisperModel(config).get_encoder().double().eval()
    example = {"input_features": torch.randn(2, 8, 20, dtype=torch.float64)}
    graph, _ = capture_module(model, example, {"input_features": {0: "batch"}})
    return Program({"forward": graph}, graph.store), example


def error(changed: Program, program: Program, example: dict[str, Any]) -> float:
    inputs = {i: example[i] for i in Executor(program).inputs()}
    wanted, got = Executor(program).run(inputs), Executor(changed).run(inputs)
    return max(relative_error(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize("name", NAMES)
def test_what_loses_nothing_is_the_model_itself(name: str) -> None:
    program, example = program_of(name)
    structure = find_structure(program)
    looped = share(program, *((f"block{i}", Loop(first=0, last=0, rank=10**6)) for i in (2, 3)))
    assert error(looped, program, example) < 1e-9

    ctx, factored, count = Context(structure=structure, program=program), program.copy(), 0
    for site in structure.of_kind("linear"):
        try:
            only_call(factored.main, site)
        except Refused:  # a head that is tied to the embedding
            continue
        LowRank(rank=min(site.shape)).apply(factored.main, site, ctx)
        count += 1
    assert count >= 16
    assert error(factored, program, example) < 1e-9

    twins = program.copy()  # block 2 stores block 1's weights, but for the last digit
    reads = zip(*(stored_reads(twins.main, structure.sites[f"block{i}"]) for i in (1, 2)))
    for source, own in ((s, o) for a, b in reads if b.multiplies for s, o in zip(a.names, b.names)):
        twins.main.set_tensor(own, twins.main.tensor(source) * (1 + 1e-14))
    assert error(share(twins, ("block2", Share())), twins, example) < 1e-9
    assert error(twins, program, example) > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_window_that_hides_no_pair_is_the_model_itself(name: str) -> None:
    """A decoder's is as long as the sequence; of an encoder's fixed length, the first position alone is that far, and open to all."""
    program, example = program_of(name)
    structure = find_structure(program)
    sites = [site.id for site in structure.of_kind("attention")]
    length, sinks = {"vit": (16, 1), "whisper": (9, 1)}.get(name, (9, 0))
    if name == "t5":
        for id in sites:
            with pytest.raises(Refused, match="its mask follows no rule that is known"):  # it is a learned position bias
                Window(length, sinks).check(program.main, structure.sites[id])
        return
    assert error(share(program, *((id, Window(length, sinks)) for id in sites)), program, example) < 1e-9
    assert error(share(program, *((id, Window(3, sinks)) for id in sites)), program, example) > 1e-6
