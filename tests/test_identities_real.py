"""The identities on real weights, in float64: rewrites that at their limit are the model itself, and attention's two forms."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from test_real import WHEELS, _in_order, example, real
from test_share import share
from torch import Tensor

from lwcompile import pipeline
from lwcompile.context import Context
from lwcompile.contract import TransformPass
from lwcompile.decode import derive_decode
from lwcompile.executor import Executor
from lwcompile.generate import GraphStep, generate
from lwcompile.manager import relative_error
from lwcompile.passes.transform._reads import stored_reads
from lwcompile.passes.transform.linear_attention import Linear
from lwcompile.passes.transform.loop import Loop
from lwcompile.passes.transform.low_rank import LowRank
from lwcompile.passes.transform.share import Share
from lwcompile.passes.transform.window import Window
from lwcompile.program import Program
from lwcompile.structure import Structure, find_structure


@cache
def of(name: str) -> tuple[Program, Structure, dict[str, Tensor]]:
    source = real(name)
    assert isinstance(source.model, torch.nn.Module)
    source.model.double()
    source = replace(source, example_kwargs=_doubled(source.example_kwargs))
    program = pipeline.capture(source)
    return program, find_structure(program), _in_order(program, _doubled(example(source)))


def _doubled(given: Any) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def error(changed: Program, name: str, program: Program | None = None) -> float:
    dense, _, inputs = of(name)
    wanted, got = Executor(program or dense).run(inputs), Executor(changed).run(inputs)
    return max(relative_error(wanted[output], got[output]) for output in wanted)


@pytest.mark.parametrize("name", WHEELS)
def test_full_rank_recursion_is_the_model(name: str) -> None:
    program, structure, _ = of(name)
    half = sum(site.kind == "block" for site in structure.sites.values()) // 2
    cycled = f"block{half + 2}"  # with the weights of block 2
    assert error(share(program, (cycled, Loop(first=0, last=0, rank=10**6))), name) < 1e-9
    assert error(share(program, (cycled, Loop(first=0, last=0, rank=8))), name) > 1e-3


@pytest.mark.parametrize("name", WHEELS)
def test_factors_of_full_rank_are_the_weight(name: str) -> None:
    program, structure, _ = of(name)
    linears = [site for site in structure.of_kind("linear") if site.id.startswith("block2.")]

    ctx = Context(structure=structure, program=program)

    def factored(part: int) -> Program:
        made = program.copy()
        for site in linears:
            LowRank(rank=min(site.shape) // part).apply(made.main, site, ctx)  # unasked whether it pays: at full rank it does not
        return made

    assert len(linears) >= 6
    assert error(factored(1), name) < 1e-9
    assert error(factored(4), name) > 1e-3


@pytest.mark.parametrize("name", WHEELS)
def test_sharing_a_block_with_its_own_copy_is_the_model(name: str) -> None:
    program, structure, _ = of(name)
    twins = program.copy()  # block 2 stores block 1's weights, but for the last digit
    reads = zip(*(stored_reads(twins.main, structure.sites[f"block{i}"]) for i in (1, 2)))
    for source, own in ((s, o) for a, b in reads if b.multiplies for s, o in zip(a.names, b.names)):
        twins.main.set_tensor(own, twins.main.tensor(source) * (1 + 1e-14))
    shared = share(twins, ("block2", Share()))
    assert error(shared, name, twins) < 1e-9
    assert error(twins, name) > 1e-3
    assert shared.nbytes() < twins.nbytes()


@pytest.mark.parametrize(("name", "length", "sinks"), [("smollm2", 24, 0), ("minilm", 24, 0), ("dinov2", 36, 1)])
def test_a_window_that_hides_no_pair_is_the_model(name: str, length: int, sinks: int) -> None:
    program, structure, _ = of(name)

    def windowed(size: int) -> Program:
        how: TransformPass = Window(size, sinks)
        return share(program, *((site.id, how) for site in structure.of_kind("attention")))

    assert error(windowed(length), name) < 1e-9
    assert error(windowed(3), name) > 1e-3


def test_linear_attention_of_smollm2_carries_its_state() -> None:
    """Step by step, each token sees the state; the whole sequence at once is the parallel form."""
    program, _, inputs = of("smollm2")
    linear = share(program, *((f"block{i}.attention", Linear(window=8, steps=0)) for i in (3, 17)))
    prompt, new = inputs["input_ids"][1:, :12], 16
    found = generate(GraphStep(derive_decode(linear.main)), prompt, max_new_tokens=new)
    whole = Executor(linear)
    for _ in range(new):
        ids = prompt
        mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits = whole.run({name: given[name] for name in whole.inputs()})["logits"]
        prompt = torch.cat([prompt, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, prompt)
    softmax = generate(GraphStep(derive_decode(program.main)), inputs["input_ids"][1:, :12], max_new_tokens=new)
    assert not torch.equal(found, softmax)
