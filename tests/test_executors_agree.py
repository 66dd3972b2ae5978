"""Executors agree: one mixed plan through everything that runs a compressed model.

The plan drops two sublayers, and has weights of 3, 4 and 8 bits and a tied embedding and head of packed codes. The reference is the
module itself, edited by hand: each packed weight put in as the numbers that its codes stand for, and each dropped sublayer's output
projection set to zero. Every executor computes the reference's logits, and continues a prompt by the same 32 tokens. Those that
decode from a cache generate them; of the others each next token is looked up behind the tokens before it, which is the same by
induction.

Models: a tiny Llama of 3 blocks, and SmolLM2 cut to its first 4 blocks, with its own embedding and head: eager and onnxruntime take
both, IREE SmolLM2, torch.compile both, the cut SmolLM2 without Inductor, and the others the tiny one. With LWCOMPILE_WHOLE=1, SmolLM2
is whole, and Inductor compiles it for a minute.
"""

# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lwcompile import demo
from lwcompile.apply import apply_plan
from lwcompile.context import Context
from lwcompile.decode import derive_decode
from lwcompile.errors import BadInput
from lwcompile.generate import GraphStep, generate
from lwcompile.manager import relative_error
from lwcompile.pipeline import capture
from lwcompile.plans import Plan
from lwcompile.program import Program
from lwcompile.registry import make
from lwcompile.sources import open_source
from lwcompile.structure import find_structure

pytest.importorskip("transformers", reason="the models are transformers' own: install lwcompile[hf]")
import tiny

aten = torch.ops.aten
NEW = 32
WHOLE = os.environ.get("LWCOMPILE_WHOLE") == "1"
DROPPED = {"block1.attention": "model.layers.1.self_attn.o_proj", "block2.mlp": "model.layers.2.mlp.down_proj"}


def mixed_plan(group: int) -> Plan:
    packed = {3: ["block0.attention.q_proj", "block0.attention.k_proj", "block0.attention.v_proj", "block1.mlp.down_proj"],
              4: ["block0.mlp.gate_proj", "block0.mlp.up_proj", "block2.attention.o_proj"],
              8: ["block0.mlp.down_proj", "block0.attention.o_proj", "embedding", "head"]}  # fmt: skip
    lines = [f"  {id}: quantize{{bits={bits},group_size={group},solver=rtn}}" for bits, ids in packed.items() for id in ids]
    return Plan.parse("\n".join(["sites:", *lines, *(f"  {id}: drop" for id in DROPPED)]))


@dataclass
class Subject:
    """A model under the plan. `tokens` are the prompt and what the reference continues it by; `logits` the reference's for them."""

    model: nn.Module
    plan: Plan
    program: Program
    tokens: Tensor
    prompt: int
    logits: Tensor


@torch.no_grad()
def subject(model: Any, program: Program, plan: Plan, prompt: Tensor) -> Subject:
    structure = find_structure(program)
    ctx = Context(structure=structure, program=program)
    small = apply_plan(program, plan.choices, structure, ctx)
    assert not [r for r in ctx.remarks if r.kind == "refused"]
    assert {n.args[3] for n in small.main.graph.nodes if n.target is torch.ops.lwcompile.dequantize.default} == {3, 4, 8}
    small = dataclasses.replace(small, entries={**small.entries, "decode": derive_decode(small.main)})
    edited = copy.deepcopy(model)
    folded = small.main.folded()
    for node in folded.graph.nodes:
        if node.target in (aten.linear.default, aten.embedding.default):
            weight = node.args[int(node.target is aten.linear.default)]
            edited.get_submodule(node.meta["path"]).weight.copy_(folded.tensor(str(weight.target)))
    for path in DROPPED.values():
        edited.get_submodule(path).weight.zero_()
    tokens = prompt
    for _ in range(NEW):
        tokens = torch.cat([tokens, edited(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return Subject(model, plan, small, tokens, prompt.shape[1], edited(tokens, use_cache=False).logits)


@pytest.fixture(scope="module")
def small_llama() -> Subject:
    return subject(tiny.llama(), tiny.llama_program(), mixed_plan(16), tiny.ids(1, 7))


@pytest.fixture(scope="module")
def smollm2() -> Subject:
    try:
        source = open_source(demo.demo_model())
    except BadInput as error:
        pytest.skip(str(error))
    model: Any = source.model
    if not WHOLE:
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:4], 4
    prompt = torch.randint(5, 20000, (1, 9), generator=torch.Generator().manual_seed(0))
    if WHOLE:  # over 30 blocks float32 itself is 2.8e-4 from float64 on random ids, and 1.6e-5 on text
        prompt = source.tokenizer()("A compiler is a program that reads", return_tensors="pt")["input_ids"]  # type: ignore[misc]
    return subject(model, capture(source), mixed_plan(32), prompt)


# --- executors: the logits of the tokens, and what follows the prompt where it decodes from a cache


def feed(given: Subject) -> dict[str, Tensor]:
    width = given.tokens.shape[1]
    known = {
        "input_ids": given.tokens,
        "attention_mask": torch.ones_like(given.tokens),
        "position_ids": torch.arange(width)[None],
    }
    return {i.name: known[i.name] for i in given.program.main.inputs}


def decoded(given: Subject, step: Any) -> Tensor:
    return generate(step, given.tokens[:, : given.prompt], max_new_tokens=NEW)


def eager(given: Subject, folder: Path) -> tuple[Tensor, Tensor]:
    logits = given.program.main.module()(*feed(given).values())[0]
    return logits, decoded(given, GraphStep(given.program.entries["decode"]))


def compiled(given: Subject, folder: Path) -> tuple[Tensor, None]:
    """By Inductor, where there is a compiler. The last of several calls, which C++ makes again by then."""
    return by_codegen(given, "eager" if shutil.which("g++") is None else "inductor")


def compiled_by_eager(given: Subject, folder: Path) -> tuple[Tensor, None]:
    return by_codegen(given, "eager")


def by_codegen(given: Subject, codegen: str) -> tuple[Tensor, None]:
    """Behind torch.compile; the plan's weights are solved anew from the model's own."""
    torch._dynamo.reset()
    model = torch.compile(given.model, backend="layerwise", options={"plan": given.plan, "codegen": codegen})
    try:
        return [model(given.tokens, use_cache=False).logits for _ in range(5)][-1], None
    finally:
        torch._dynamo.reset()


def lowered(spec: str, file: str, *needs: str) -> Callable[[Subject, Path], tuple[Tensor, Tensor]]:
    def run(given: Subject, folder: Path) -> tuple[Tensor, Tensor]:
        for module in needs:
            pytest.importorskip(module, reason="the extra is not installed")
        backend = make("backends", spec)
        backend.lower(given.program, folder / file, None)
        return backend.run(folder / file, feed(given))["logits"], decoded(given, backend.decode_step(folder / file))

    return run


def interpreted(given: Subject, folder: Path) -> tuple[Tensor, None]:
    """Triton's kernels in its interpreter, in a process of their own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from lwcompile.backends.triton.emit import write_package
    from lwcompile.backends.triton.parity import run_package

    write_package(given.program, folder / "triton_model")
    (made,) = run_package(folder / "triton_model", [("forward", feed(given), [])], folder)
    return made["logits"], None


INTERPRETED = """
import sys, torch
folder = sys.argv[1]
model, tokens = torch.load(f"{folder}/model.pt", weights_only=False)
with torch.no_grad():
    options = {"plan": f"{folder}/plan.yaml", "codegen": "triton"}
    logits = torch.compile(model, backend="layerwise", options=options)(tokens, use_cache=False).logits
torch.save(logits, f"{folder}/logits.pt")
"""


def compiled_by_triton(given: Subject, folder: Path) -> tuple[Tensor, None]:
    """The same kernels behind torch.compile; Triton is told to interpret before its process begins."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    torch.save((given.model, given.tokens), folder / "model.pt")
    given.plan.save(folder / "plan.yaml")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "logits.pt"), None


EXECUTORS: dict[str, Callable[[Subject, Path], tuple[Tensor, Tensor | None]]] = {
    "eager": eager,
    "torch.compile": compiled,
    "torch.compile by eager": compiled_by_eager,
    "onnxruntime": lowered("onnx{activations=float32}", "model.onnx", "onnxruntime"),
    "iree": lowered("mlir", "model.vmfb", "torch_mlir", "iree.compiler", "iree.runtime"),
    "triton": interpreted,
    "torch.compile by triton": compiled_by_triton,
}
OF_SMOLLM2 = ["eager", "onnxruntime", "iree", "torch.compile" if WHOLE else "torch.compile by eager"]
CASES = [*(("small_llama", name) for name in EXECUTORS if name != "iree"), *(("smollm2", name) for name in OF_SMOLLM2)]


@pytest.mark.parametrize(("model", "executor"), CASES)
@torch.no_grad()
def test_executors_agree(model: str, executor: str, request: pytest.FixtureRequest, tmp_path: Path):
    given: Subject = request.getfixturevalue(model)
    logits, tokens = EXECUTORS[executor](given, tmp_path)
    assert relative_error(given.logits, logits) < 1e-4
    assert torch.equal(logits[:, given.prompt - 1 : -1].argmax(-1), given.tokens[:, given.prompt :])
    assert tokens is None or torch.equal(tokens, given.tokens)
